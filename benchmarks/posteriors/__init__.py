"""Posteriors with a known truth: one module for each, listed in `PROBLEMS`.

A module has

- ``data()``: the arguments of the model, a tuple of arrays, from a package or simulated with a fixed seed;
- ``model(*args)``: as a user of NumPyro writes it;
- ``asked(draw, *args)``, where latents themselves are not what is asked: from one draw of all latents, a dict, to a
  dict of named arrays whose posterior means are compared (order of components removed, functions of several latents);
- ``truth(*args)``: a `Truth`, exact or of two samplers that agree; stored in ``truths/`` by
  ``python benchmarks/posteriors --truth NAME``;
- ``enumerated(*args)``, where its discrete latents can be summed out: the model with those marked
  ``infer={"enumerate": "parallel"}``, same names, written so that NumPyro enumerates it;
- ``given_others(key, draw, *args)``, where NumPyro cannot do it: the latents that were summed out, drawn given the
  others;
- ``PLATE``, where a plate has latents beside global ones, of too many states to sum out: its name;
- ``begin(*args)``, where a guide must: the values of latents that it begins at;
- ``pymc_model(*args)``, where PyMC can have it: a `pymc.Model` with the same names.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
import json
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import numpy as np
from numpyro.infer import init_to_value
import optax

TRUTHS = Path(__file__).parent / "truths"
PROBLEMS = (
    "diabetes",
    "correlated_design",
    "strongly_correlated_design",
    "change_points",
    "coal_mining",
    "nile",
    "publications",
    "turtles",
    "breast_cancer",
    "regimes",
    "karate_club",
    "karate_club_either",
    "lsat6",
    "dawid_skene",
    "n_mixture",
    "occupancy",
    "capture_recapture",
    "hares",
    "old_faithful",
    "galaxies",
    "trees",
    "cranes",
    "epidemic",
    "threshold",
    "restaurant",
    "topics",
    "binary_factors",
    "item_response",
    "stochastic_volatility",
    "latent_multinomial",
    "stick_breaking",
)


class Truth(NamedTuple):
    """What is known of a posterior.

    :ivar means: by quantity, posterior means of its elements.
    :ivar sds: their posterior standard deviations.
    :ivar errors: standard errors of the means; 0 where they are exact.
    :ivar log_evidence: in nats; None where it is not known.
    :ivar log_evidence_error: its standard error.
    :ivar source: by which methods.
    """

    means: dict[str, np.ndarray]
    sds: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    log_evidence: float | None
    log_evidence_error: float
    source: str

    def save(self, path):
        """Write it as JSON."""
        to_list = lambda x: np.asarray(x, float).round(10).tolist()  # noqa: E731
        fields = {**self._asdict(), **{n: jax.tree.map(to_list, getattr(self, n)) for n in ("means", "sds", "errors")}}
        path.write_text(json.dumps(fields, indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        arrays = {n: {q: np.array(x) for q, x in fields[n].items()} for n in ("means", "sds", "errors")}
        return cls(**{**fields, **arrays})


def exact_probabilities(probabilities, log_evidence, source):
    """Truth of binary quantities, from their exact probabilities."""
    probabilities = {name: np.asarray(p, float) for name, p in probabilities.items()}
    sds = {name: np.sqrt(p * (1 - p)) for name, p in probabilities.items()}
    zero = {name: np.zeros_like(p) for name, p in probabilities.items()}
    return Truth(probabilities, sds, zero, None if log_evidence is None else float(log_evidence), 0.0, source)


def of_chains(draws, source, log_evidence=None, log_evidence_error=0.0):
    """Truth of a sampler's draws, with standard errors by ArviZ.

    :param draws: by quantity, of shape (chains, draws, *shape).
    """
    draws = {name: np.asarray(x, float) for name, x in draws.items()}
    error = lambda x: np.asarray(az.mcse(x, method="mean")).item() if x.std() > 0 else 0.0  # noqa: E731
    errors = {
        name: np.reshape([error(x.reshape(*x.shape[:2], -1)[..., i]) for i in range(x[0, 0].size)], x.shape[2:])
        for name, x in draws.items()
    }
    means, sds = ({name: getattr(x, what)((0, 1)) for name, x in draws.items()} for what in ("mean", "std"))
    return Truth(means, sds, errors, log_evidence, log_evidence_error, source)


def agreed(one, other, tolerance=4.5):
    """The average of two samplers' truths, or an error that names the quantity in which they differ.

    :param tolerance: in standard errors of the difference, beside a hundredth of a posterior standard deviation.
    """
    for name, mean in one.means.items():
        apart = np.abs(mean - other.means[name])
        allowed = tolerance * np.hypot(one.errors[name], other.errors[name]) + 0.01 * one.sds[name]
        if (apart > allowed).any():
            raise ValueError(f"the samplers differ in {name}: by {apart.ravel()}, allowed {allowed.ravel()}")
    middle = lambda x, y: (x + y) / 2  # noqa: E731
    means, sds = (jax.tree.map(middle, getattr(one, what), getattr(other, what)) for what in ("means", "sds"))
    errors = jax.tree.map(lambda x, y: np.hypot(x, y) / 2, one.errors, other.errors)
    evidence = one if one.log_evidence is not None else other
    return Truth(
        means, sds, errors, evidence.log_evidence, evidence.log_evidence_error, f"{one.source}; {other.source}"
    )


class Problem(NamedTuple):
    """A posterior that is known; the fields are described above.

    :ivar num_steps: for how many steps it is fitted.
    """

    name: str
    model: Callable
    args: tuple
    truth: Truth
    asked: Callable
    enumerated: Callable | None
    pymc_model: Callable | None
    num_steps: int
    given_others: Callable | None = None
    plate: str | None = None
    begin: dict | None = None

    @property
    def guide_options(self):
        """Options of an automatic guide."""
        return {} if self.begin is None else {"init_loc_fn": init_to_value(values=self.begin)}


@cache
def problem(name: str) -> Problem:
    """A problem by the name of its module, with the stored truth."""
    module = import_module(f"benchmarks.posteriors.{name}")
    truth, args = Truth.load(TRUTHS / f"{name}.json"), module.data()

    def latents(draw, *args):
        return {quantity: draw[quantity] for quantity in truth.means}

    optional = lambda what, default=None: getattr(module, what, default)  # noqa: E731
    return Problem(
        name, module.model, args, truth, optional("asked", latents), optional("enumerated"),
        optional("pymc_model"), optional("NUM_STEPS", 4000), optional("given_others"),
        optional("PLATE"), optional("begin", lambda *args: None)(*args),
    )  # fmt: skip


def recommended(num_steps, rate=0.01):
    """The learning rate held while the likelihood is tempered, then a cosine."""
    return optax.warmup_cosine_decay_schedule(rate, rate, num_steps // 2, num_steps)
