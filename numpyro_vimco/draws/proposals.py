# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Draws from fitted guides with their importance weights: what is known of the posterior after a fit.

Weights are as in the objective of the fit: one for each element of the plates that are common to all sites. Where a
plate has local particles, one of them is drawn for each element in proportion to its local weight. The draw with the
chosen particles is then properly weighted by Ẑ, the weight of the shared sites times the mean local weight of each
element (``docs/mathematics.md``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from numpyro_vimco.checks.guide_densities import no_density_error
from numpyro_vimco.control_flow import Given
from numpyro_vimco.densities.levels import Levels, map_levels
from numpyro_vimco.densities.plates import Structure, aligned_shape
from numpyro_vimco.densities.program import Program
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.chunks import Chunked
from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.objectives import paths
from numpyro_vimco.objectives.elements import value_checks
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import sample_sites

Params = dict[str, Any]
# In place of a start: a draw of the mixture.
ANY = -1


class WeightedDraw(NamedTuple):
    """One weighted draw, or some of them.

    :ivar values: of each latent, of shape ``(*batch, *event)``.
    :ivar log_p: log p(x, z), of shape ``(*plates,)``, of size 1 where a plate is not common to all sites; in nats.
    :ivar log_q: log q(z), likewise.
    :ivar log_weight: log-weight, likewise; log_p - log_q but for local particles.
    :ivar component: which start's guide it is from; None for local particles.
    :ivar log_guide_share: of pooled draws, the logarithm of the share of the mixture's density that guides have without
        their defence; of the shape of ``log_weight``.
    """

    values: dict[str, Any]
    log_p: Any
    log_q: Any
    log_weight: Any
    component: Any = None
    log_guide_share: Any = None


@dataclass(frozen=True)
class Sampler:
    """A source of weighted draws in rounds, which is compiled once, whatever the parameters.

    :ivar chunked: from parameters of the starts, with a leading axis, and a key to a round of draws, with a leading
        axis; or from these and ``starts`` to one draw each. A :class:`WeightedDraw`.
    :ivar structure: what plates the densities have.
    :ivar size: number of draws of a round.
    :ivar starts: which start's guide each draw of a round is of, or :data:`ANY`; None where one key makes a round.
    :ivar undefended: of pooled draws, the latents that no defensive component draws with at most their parents.
    """

    chunked: Chunked
    structure: Structure
    size: int
    starts: np.ndarray | None = None
    undefended: tuple[str, ...] = ()

    def ahead(self, params: Params) -> None:
        """Compile in a thread, for parameters of these shapes."""
        of_one = (jax.random.key(0),) if self.starts is None else (jax.random.key(0), self.starts[0])
        self.chunked.ahead(params, *of_one)

    def all(self, params: Params, rng_key: Array, rounds: int, progress: str | None) -> WeightedDraw:
        """The draws of so many rounds, as NumPy arrays of shape ``(rounds, size, ...)``.

        :raises ValueError: for NaN weights, and where all are zero.
        """
        draws = self._in_rounds(self.chunked.all(params, *self._inputs(rng_key, rounds), progress=progress))
        by_draw = np.isnan(draws.log_weight).reshape(rounds * self.size, -1)
        zero = bool(np.isneginf(draws.log_weight).all((0, 1)).any())
        check_weights(int(by_draw.any(1).sum()), zero, len(by_draw))
        return draws

    def blocks(
        self, params: Params, rng_key: Array, rounds: int, then: Callable[[WeightedDraw], Any], progress: str | None
    ) -> Iterator[Any]:
        """The same, block by block.

        :param then: what is computed from a draw, and handed out.
        """
        then = jax.jit(jax.vmap(jax.vmap(then) if self.starts is None else then))
        for _, block in self.chunked.blocks(params, *self._inputs(rng_key, rounds), progress=progress, then=then):
            yield self._in_rounds(block)

    def _inputs(self, rng_key: Array, rounds: int) -> tuple:
        if self.starts is None:
            return (split(rng_key, rounds),)
        return split(rng_key, rounds * self.size), np.tile(self.starts, rounds)

    def _in_rounds(self, draws: Any) -> Any:
        if self.starts is None:
            return draws
        return jax.tree.map(lambda x: x.reshape(len(x) // self.size, self.size, *x.shape[1:]), draws)


def merged(draws: Any, number: int | None = None) -> Any:
    """The first draws, or all, of arrays of shape ``(keys, size, ...)``, of shape ``(number, ...)``."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:number], draws)


def each_start(approx: Approximation) -> Sampler:
    """One draw of the guide of each start, weighted with its own density, and its local particles chosen.

    Where the model has parameters, each start has its own.

    :raises ValueError: where there is no posterior to draw from.
    """
    approx.check_has_posterior()
    check_independent(approx, approx.local)
    num_starts = approx.num_starts

    def make() -> Sampler:
        program = program_of(approx, approx.local)
        event_dims = approx.event_dims

        def particle(component: Array, params: Params, rng_key: Array) -> WeightedDraw:
            program_key, choice_key = split(rng_key)
            levels, structure = program.propose(params, program_key)
            draws = map_levels(
                lambda pair: WeightedDraw(pair[0], pair[1].model, pair[1].log_guide, pair[1].log_weight), levels
            )
            chosen = choose(draws, choice_key, structure, event_dims)
            return chosen._replace(component=component, log_guide_share=jnp.zeros_like(chosen.log_weight))

        def draw(starts: Params, rng_key: Array) -> WeightedDraw:
            return jax.lax.map(lambda x: particle(*x), (jnp.arange(num_starts), starts, split(rng_key, num_starts)))

        at_once = max(approx.chunk_size() // num_starts, 1)
        return Sampler(Chunked(draw, at_once), structure_of(approx, approx.local), num_starts)

    return approx.kept(("each start", num_starts), make)


def choose(
    draws: Levels[WeightedDraw], rng_key: Array, structure: Structure, event_dims: Mapping[str, int]
) -> WeightedDraw:
    """A draw of the shared sites with one local particle of each element, chosen in proportion to its weight.

    Of a chain it is a path, in proportion to the weight of the paths.

    :param draws: arrays of named plates have a leading axis for local particles; those of chains, values too, have
        three, as :mod:`numpyro_vimco.objectives.paths` has them.
    :param event_dims: for each local site, the number of dimensions of an event.
    """
    values, log_p, log_q, log_weight, component, _ = draws.shared
    values, chains = dict(values), dict(structure.chains)
    for plate, key in split_by_name(rng_key, draws.local).items():
        local = draws.local[plate]
        if plate in chains:
            path = paths.draw_path(key, local.log_weight, chains[plate])
            values |= {
                name: _along(value[:, :, 0], path.samples, event_dims[name]) for name, value in local.values.items()
            }
            of_path = _along(local.log_q[:, :, 0], path.samples, 0).sum(0)
            log_weight = log_weight + structure.sum_to_shared(path.log_mean)
            log_p = log_p + structure.sum_to_shared(path.log_v + of_path)
            log_q = log_q + structure.sum_to_shared(of_path)
            continue
        log_weight = log_weight + structure.sum_to_shared(cv.log_mean_weight(local.log_weight))
        chosen = random.categorical(key, local.log_weight, axis=0)[None]
        values |= {name: take(value, chosen, event_dims[name])[0] for name, value in local.values.items()}
        log_p = log_p + structure.sum_to_shared(take(local.log_p, chosen)[0])
        log_q = log_q + structure.sum_to_shared(take(local.log_q, chosen)[0])
    return WeightedDraw(values, log_p, log_q, log_weight, component)


def _along(values: Array, path: Array, event_dim: int) -> Array:
    """The values of a path, of samples of shape ``(samples, steps, *batch, *event)``."""
    return jax.vmap(lambda value, index: take(value, index[None], event_dim)[0], in_axes=(1, 0))(values, path)


def propose(
    approx: Approximation, rng_key: Array, num_proposals: int, progress: str | None = None
) -> list[WeightedDraw]:
    """Draw from the guide of each start, as :func:`each_start` does.

    :return: of each start; arrays have a leading axis for the draws.
    :raises ValueError: for NaN weights, and where all are zero.
    """
    sampler = each_start(approx)
    draws = sampler.all(approx.starts, rng_key, num_proposals, progress)
    return [jax.tree.map(lambda x, i=i: x[:, i], draws) for i in range(sampler.size)]


def squeezed(log_prob, kept: Collection[int], structure: Structure):
    """Log-densities of shape ``(…, *plates)`` without the dimensions of plates that are summed over.

    :param kept: the dimensions that are not summed over, negative.
    """
    return log_prob.squeeze(tuple(dim for dim in range(-structure.ndim, 0) if dim not in kept))


def plate_names(approx: Approximation, dims: Iterable[int], inside: str | None = None) -> list[str]:
    """Names of the plates at some dimensions, from left to right.

    :param inside: a plate; only plates of sites that are in it are named. Defaults to None: those of all sites.
    """
    stacks = [site["cond_indep_stack"] for site in sample_sites(approx.model_trace)]
    stacks = [stack for stack in stacks if inside is None or any(frame.name == inside for frame in stack)]
    names = {frame.dim: frame.name for stack in stacks for frame in stack if frame.dim in set(dims)}
    return [names[dim] for dim in sorted(names)]


def plate_sizes(approx: Approximation) -> dict[str, int]:
    """Sizes of all plates, by name."""
    return {frame.name: frame.size for site in sample_sites(approx.model_trace) for frame in site["cond_indep_stack"]}


def check_weights(nan: int, zero: bool, num_draws: int) -> None:
    """Raise unless there are importance weights to work with.

    :param nan: number of draws with a NaN weight.
    :param zero: whether all weights of an element are zero.
    :raises ValueError: for NaN weights, and where all are zero.
    """
    if nan:
        raise ValueError(
            f"{nan:,} of {num_draws:,} draws of the guide have a NaN weight: model or guide has a NaN "
            "log-density there. `jax.config.update('jax_debug_nans', True)` finds where."
        )
    if zero:
        raise ValueError(
            f"None of {num_draws:,} draws of the guide has a density under the model: the guide proposes nothing "
            "that the posterior holds. Look at the supports of both, and at what the data rule out."
        )


def can_have_particles(approx: Approximation, local: Mapping[str, int]) -> bool:
    """Whether plates can be named together in ``plate_particles``, at these parameters, beside chains."""
    try:
        structure_of(approx, local)
        check_independent(approx, local)
    except ValueError:
        return False
    return True


def check_independent(approx: Approximation, local: Mapping[str, int]) -> None:
    """Raise for elements that have weights of their own, and are not independent at the parameters of the best start.

    :raises ValueError: as :func:`~numpyro_vimco.objectives.elements.value_checks`.
    """

    def make() -> Callable:
        program = program_of(approx, local)
        return value_checks(program, program.kinds(approx.params, random.key(0)))

    approx.kept(("checks", *local.items()), make)(approx.params)


def check_has_density(approx: Approximation) -> None:
    """Raise for a continuous latent that the guide fixes: its draws have no weights.

    :raises ValueError: naming the latent.
    """
    for name in fixed(approx):
        raise no_density_error(name)


def fixed(approx: Approximation) -> list[str]:
    """Names of continuous latents that the guide fixes, so that there is no evidence."""
    if not approx.has_deltas:
        return []
    program = program_of(approx, {})
    return approx.kept("fixed", lambda: list(program.without_density(approx.params, random.key(0))))


def structure_of(approx: Approximation, local: Mapping[str, int]) -> Structure:
    """How the plates of a program combine densities, found without computing anything."""
    program = program_of(approx, local)
    return approx.kept(
        ("structure", *local.items()),
        lambda: jax.eval_shape(program.evaluate, approx.params, random.key(0))[1],
    )


def program_of(approx: Approximation, local: Mapping[str, int], given: Mapping[str, Array] | None = None) -> Program:
    """A fit's model and guide as a program.

    :param local: number of local particles of plates, and of samples of chains.
    :param given: values of latents, in place of those that the guide draws.
    """
    return Program(
        model=approx.model,
        guide=Given(approx.guide, given or {}),
        args=approx.args,
        kwargs=approx.kwargs,
        by_score=lambda site: False,
        plate_particles={name: number for name, number in local.items() if name not in approx.chains},
        chains={n: replace(c, num_samples=local[n]) for n, c in approx.chains.items() if n in local},
        joint_plates=getattr(approx.svi.loss, "joint_plates", frozenset()),
        linear=False,
    )


def take(values, index, event_dim: int = 0):
    """For each element of plates, the value at its own index.

    :param values: of shape ``(N, *batch, *event)``, JAX's or NumPy's.
    :param index: of shape ``(S, *plates)``, aligned with batch on the right; of size 1 where a plate is summed over.
    :return: of shape ``(S, *batch, *event)``.
    """
    shape = aligned_shape(index.shape[1:], values.ndim - 1 - event_dim, event_dim)
    index = index.reshape(index.shape[0], *shape)
    if all(size == 1 for size in shape):
        return values[index.reshape(-1)]
    xp = np if isinstance(values, np.ndarray) else jnp
    return xp.take_along_axis(values, index, axis=0)
