# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""How a model is fitted: what is summed out, what has particles of its own, guide, objective and optimiser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpyro.infer import SVI
from numpyro.optim import optax_to_numpyro
import optax

from numpyro_vimco.arguments import listed
from numpyro_vimco.control_flow import with_marks
from numpyro_vimco.guides import AutoMixed
from numpyro_vimco.objectives import VIMCOStar

# Adam's learning rate: that of `benchmarks/posteriors`; with chains that of `benchmarks/chains.py`.
RATE, RATE_OF_CHAINS = 0.01, 0.02
STARTS = 4  # as many as chains in MCMC


@dataclass(frozen=True)
class Plan:
    """How :func:`~numpyro_vimco.fit` treats a model.

    ``print(posterior.plan)`` says it in words, :meth:`code` in Python. To change a part, pass ``guide``, ``optim`` or
    ``loss`` to :func:`~numpyro_vimco.fit`, or run the code with the change.

    :ivar num_steps: number of steps.
    :ivar summed: latents that the plan sums out, with their numbers of values.
    :ivar marked: latents that the model marks to be summed out, likewise.
    :ivar joint: latents that a particle draws together.
    :ivar num_particles: number of particles.
    :ivar plate_particles: number of particles of each element, by plate.
    :ivar chain_particles: number of samples of each step, by a latent of the chain.
    :ivar local: latents of each of these plates and chains.
    :ivar alpha: order of the bound.
    :ivar joint_plates: plates whose elements share one weight.
    :ivar num_starts: number of starts.
    :ivar chunk_size: number of particles that are evaluated at a time, where memory asks for it; else None.
    :ivar score_sites: latents that use the score function as the density jumps; None if none was found.
    :ivar given: what the user chose: ``guide``, ``optim`` and ``loss``, as far as they were given.
    :ivar arguments: those of the model, as they are written in the code.
    :ivar notes: why better plans were not possible, and advice.
    """

    num_steps: int
    summed: Mapping[str, int] = field(default_factory=dict)
    marked: Mapping[str, int] = field(default_factory=dict)
    joint: tuple[str, ...] = ()
    num_particles: int = 64
    plate_particles: Mapping[str, int] = field(default_factory=dict)
    chain_particles: Mapping[str, int] = field(default_factory=dict)
    local: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alpha: float = 0.5
    joint_plates: tuple[str, ...] = ()
    num_starts: int = STARTS
    chunk_size: int | None = None
    score_sites: frozenset[str] | None = None
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)
    arguments: str = "*args"
    notes: tuple[str, ...] = ()

    def svi(self, model: Callable) -> SVI:
        """The inference object of a model."""
        if self.summed:
            model = with_marks(model, self.summed, False)  # a call with other arguments may leave out their sites
        given = self.given
        return SVI(
            model,
            given["guide"] if "guide" in given else AutoMixed(model, chains=self.chain_particles.keys()),
            given["optim"] if "optim" in given else optax.adam(self.schedule()),
            self.loss(),
        )

    def loss(self) -> Any:
        """The objective."""
        if "loss" in self.given:
            return self.given["loss"]
        return VIMCOStar(self.alpha, self.num_particles, **self._options())

    def schedule(self) -> Callable:
        """The learning rate: held for half of the steps, over which the likelihood is tempered; then a cosine."""
        return optax.warmup_cosine_decay_schedule(*self._schedule)

    def optim_after(self, taken: int, num_steps: int) -> Any:
        """The optimiser of a fit that goes on after so many steps: behind its own end, a cosine from the same rate."""
        end = max(taken, self.num_steps)
        if taken + num_steps <= end:
            return optax_to_numpyro(optax.adam(self.schedule()))
        again = optax.cosine_decay_schedule(self._rate, taken + num_steps - end)
        return optax_to_numpyro(optax.adam(optax.join_schedules([self.schedule(), again], [end])))

    @property
    def _schedule(self) -> tuple[float, float, int, int]:
        return self._rate, self._rate, self.num_steps // 2, max(self.num_steps, 1)

    @property
    def _rate(self) -> float:
        return RATE_OF_CHAINS if self.chain_particles else RATE

    def _options(self) -> dict[str, Any]:
        options = {
            "plate_particles": dict(self.plate_particles),
            "chain_particles": dict(self.chain_particles),
            "joint_plates": list(self.joint_plates),
            "chunk_size": self.chunk_size,
        }
        found = {name: value for name, value in options.items() if value}
        return found if not self.score_sites else {**found, "score_sites": set(self.score_sites)}

    def code(self) -> str:
        """What the plan does, in Python: the lines that ``fit(model, ...)`` stands for.

        ``model`` and ``args`` are the user's, as is each part that the user chose. Other arguments of ``fit``, such as
        ``tempering``, are left out.
        """
        names = ["AutoMixed"] * ("guide" not in self.given) + ["VIMCOStar"] * ("loss" not in self.given) + ["fit"]
        lines = ["import jax", "from numpyro.infer import SVI"]
        lines += ["import optax"] * ("optim" not in self.given)
        lines += [f"from numpyro_vimco import {', '.join([*names, *['sum_out'] * bool(self.summed)])}", ""]
        if self.summed:
            lines.append(f"model = sum_out(model, {sorted(self.summed)})")
        if "guide" not in self.given:
            chains = f", chains={sorted(self.chain_particles)}" if self.chain_particles else ""
            lines.append(f"guide = AutoMixed(model{chains})")
        if "optim" not in self.given:
            lines.append(f"rate = optax.warmup_cosine_decay_schedule{self._schedule}")
            lines.append("optim = optax.adam(rate)")
        if "loss" not in self.given:
            options = "".join(f", {name}={_code(value)}" for name, value in self._options().items())
            lines.append(f"loss = VIMCOStar({self.alpha}, num_particles={self.num_particles}{options})")
        lines.append("svi = SVI(model, guide, optim, loss)")
        starts = "" if self.num_starts == STARTS else f", num_starts={self.num_starts}"
        lines.append(f"posterior = fit(svi, jax.random.key(0), {self.num_steps}, {self.arguments}{starts})")
        return "\n".join(lines)

    @property
    def what(self) -> str:
        """A phrase that distinguishes it from the model's other plans."""
        sums = [f"{listed(self.summed)} summed out"] if self.summed else []
        local = [f"particles of {listed(self.local)}"] if self.local else []
        return " and ".join(sums + local) or "weights of each element"

    def lines(self) -> list[str]:
        """The plan in words."""
        found = []
        if sums := {**self.marked, **self.summed}:
            values = ", ".join(f"'{name}' ({number} values)" for name, number in sums.items())
            found.append(f"{values}: summed out" + (", as the model says" if not self.summed else ""))
        for level, latents in self.local.items():
            number = self.chain_particles.get(level) or self.plate_particles[level]
            kind = (
                f"{number} samples of each step, of which all paths count"
                if level in self.chain_particles
                else f"{number} particles of each element of '{level}'"
            )
            found.append(f"{listed(latents)}: {kind}")
        if self.joint and "loss" not in self.given:
            beside = f"{self.num_particles} particles"
            found.append(f"{listed(self.joint)}: {beside}" + (" with all of these" if self.local else ""))
        if self.score_sites:
            found.append(f"{listed(sorted(self.score_sites))}: score function, as the density jumps there")
        starts = "" if self.num_starts == STARTS else f" of {self.num_starts} starts"
        names = [self._name(part) for part in ("guide", "loss", "optim")]
        found.append(f"{names[0]}, {names[1]}, {names[2]}, {self.num_steps:,} steps{starts}")
        return found

    def _name(self, part: str) -> str:
        if part in self.given:
            return f"your {part} ({type(self.given[part]).__name__})"
        if part == "loss":
            return f"VIMCOStar({self.alpha})" + (f" in chunks of {self.chunk_size}" if self.chunk_size else "")
        return "AutoMixed" if part == "guide" else f"Adam at {self._rate}"

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self.notes])


def _code(value: Any) -> str:
    return "{" + ", ".join(map(repr, sorted(value))) + "}" if isinstance(value, set) else repr(value)
