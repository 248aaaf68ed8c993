"""Other objectives with the same guide, schedule and number of particles: three starts side by side, each by itself."""

from functools import partial

import jax
from jax import random
import numpy as np
from numpyro.infer import SVI, TraceGraph_ELBO
import optax

from benchmarks.posteriors import recommended as learning_rate
from benchmarks.posteriors.measuring import Clock, Mapped, Quantities
from benchmarks.posteriors.results import in_one_sentence
from benchmarks.posteriors.summed_out import summed_out
from numpyro_vimco import VIMCO, AutoMixed, ReweightedWakeSleep, VIMCOStar, fit
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.inference_data import _weighed
from numpyro_vimco.posterior.proposals import Draw, program_of

ALPHAS = (0.0, 0.1, 0.3, 0.5, 1.0)
STARTS, STEPS, PROPOSALS, CHUNK = 3, 2000, 20_000, 500


def objectives(num_particles):
    """By name."""
    found = {f"{of.__name__}({a})": of(a, num_particles) for a in ALPHAS for of in (VIMCOStar, VIMCO)}
    found["ReweightedWakeSleep"] = ReweightedWakeSleep(num_particles)
    found["TraceGraph_ELBO"] = TraceGraph_ELBO(num_particles)
    return found


def grid(about, seed, budget, num_particles=64):
    """A row for each objective and start; the number of steps is the same for all, and none is for a second seed.

    Times are those of three starts side by side.
    """
    if seed:
        return
    guide, starts = AutoMixed(about.model), Starts(about)
    for name, objective in objectives(num_particles).items():
        try:
            yield from of_objective(about, name, objective, guide, starts)
        except Exception as error:  # one that cannot treat the model should not hide the others
            yield {"method": name, "seed": 0, "note": in_one_sentence(error)}
    if about.enumerated is not None:
        try:
            yield from summed_out(about, STARTS, STEPS)
        except Exception as error:
            yield {"method": "TraceEnum_ELBO", "seed": 0, "note": in_one_sentence(error)}


def of_objective(about, name, objective, guide, starts):
    """Rows of one objective."""
    svi = SVI(about.model, guide, optax.adam(learning_rate(STEPS)), objective)
    fit_key, draw_key = random.split(random.key(0))
    clock = Clock()
    # What an earlier objective compiled for all.
    clock.total = clock.compiling = starts.compiling
    with clock:
        result = fit(svi, fit_key, STEPS, *about.args, num_starts=STARTS, progress_bar=False)
        found = [starts.weighed(svi, result.start(i).params, draw_key) for i in np.flatnonzero(~result.failed)]
    for start, (estimate, elbo, weights) in zip(np.flatnonzero(~result.failed), found):
        yield {
            "method": name, "seed": int(start), "size": STEPS, **clock.columns(), **starts.quantities.error(estimate),
            **starts.quantities.of_evidence(weights["log_evidence"], elbo), "relative_ess": weights["ess"] / PROPOSALS,
            "ess_per_second": weights["ess"] / clock.seconds, "pareto_k": weights["pareto_k"],
        }  # fmt: skip


class Starts:
    """Draws of single starts, weighted with the density of their own guide, by one program for all objectives.

    :ivar compiling: seconds of its compilation.
    """

    def __init__(self, about):
        self.about, self.quantities, self.compiling = about, Quantities(about), 0.0
        self._asked = Mapped(self.quantities.of, 1000)
        self._fitted = None

    def weighed(self, svi, params, rng_key):
        """Means of what is asked, the ELBO, and what the weights say.

        :param svi: of any objective, always with the same guide.
        """
        first, clock = self._fitted is None, Clock()
        with clock:
            if first:
                self._fitted = Fitted.of(svi, params, self.about.args, {})
                self._draw = jax.jit(jax.vmap(partial(weighted_draw, program_of(self._fitted, {})), in_axes=(None, 0)))
            keys = random.split(rng_key, PROPOSALS).reshape(-1, CHUNK)
            parts = [jax.device_get(self._draw(params, chunk)) for chunk in keys]
            draws = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
            latents, _, _, of_weights = _weighed(draws, self._fitted, rng_key, PROPOSALS // 2)
            estimate = self._asked(latents).astype(float).mean(0)
        self.compiling += clock.compiling if first else 0
        elbo = draws.log_weight.reshape(PROPOSALS, -1).sum(1).mean()
        return estimate, elbo, of_weights


def weighted_draw(program, params, rng_key):
    """A draw of a guide whose latents have no local particles."""
    values, densities = program.propose(params, rng_key)[0].shared
    return Draw(values, densities.model, densities.log_guide, densities.log_weight)
