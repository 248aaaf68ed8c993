"""Other objectives with the same guide, schedule and number of particles: three starts side by side, each by itself."""

from functools import partial

import jax
from jax import random
import numpy as np
from numpyro.infer import SVI, TraceGraph_ELBO
import optax

from benchmarks.posteriors import recommended as learning_rate
from benchmarks.posteriors.measuring import Clock, Mapped, Quantities, forget_compiled
from benchmarks.posteriors.results import in_one_sentence
from benchmarks.posteriors.summed_out import summed_out
from numpyro_vimco import VIMCO, AutoMixed, ReweightedWakeSleep, VIMCOStar, fit
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.proposals import WeightedDraw, program_of
from numpyro_vimco.export.posterior_draws import weighed

ALPHAS = (0.0, 0.1, 0.3, 0.5, 1.0)
STARTS, STEPS, PROPOSALS, CHUNK = 3, 2000, 20_000, 500


def objectives(num_particles):
    """By name; a run may be stopped, so that of the α those in between come last."""
    others = {of.__name__: of(num_particles) for of in (ReweightedWakeSleep, TraceGraph_ELBO)}
    in_order = sorted(ALPHAS, key=lambda alpha: alpha not in (0, 0.5, 1))
    return others | {f"{of.__name__}({a})": of(a, num_particles) for a in in_order for of in (VIMCOStar, VIMCO)}


def grid(about, seed, budget, num_particles=64):
    """A row for each objective and start; the number of steps is the same for all, and none is for a second seed.

    Times are those of three starts side by side.
    """
    if seed:
        return
    forget_compiled()
    guide, starts = AutoMixed(about.model, **about.guide_options), Starts(about)
    for name, objective in objectives(num_particles).items():
        yield from or_note(name, seed, of_objective(about, name, objective, guide, starts, STEPS, STARTS, seed))
    if about.enumerated is not None:
        yield from or_note("TraceEnum_ELBO", seed, summed_out(about, STEPS, STARTS, seed))


def elbos(about, seed, budget, num_particles=64):
    """NumPyro's ELBOs with all of the time, from one start: 2,000 steps, and as many as there is time for."""

    def graph(num_steps):
        forget_compiled()
        objective, guide = TraceGraph_ELBO(num_particles), AutoMixed(about.model, **about.guide_options)
        return of_objective(about, "TraceGraph_ELBO", objective, guide, Starts(about), num_steps, 1, seed)

    def enum(num_steps):
        forget_compiled()
        return summed_out(about, num_steps, 1, seed)

    for name, run in {"TraceGraph_ELBO": graph, **({"TraceEnum_ELBO": enum} if about.enumerated else {})}.items():
        for row in or_note(name, seed, longer(run, budget)):
            yield {**row, "method": f"{name}, all time"}


def longer(run, budget):
    """Rows of a run of 2,000 steps, and of one of as many as fill the budget with compilation counted.

    :param run: from a number of steps to rows, of which there is one.
    """
    (row,) = run(STEPS)
    yield row
    # What does not grow with the steps is taken to do so: a little fewer than there is time for.
    compiling = row["seconds_with_compilation"] - row["seconds"]
    num_steps = int(STEPS * (0.85 * budget - compiling) / row["seconds"] // 500 * 500)
    if num_steps > STEPS and row["seconds_with_compilation"] < 0.6 * budget:
        yield from run(num_steps)


def or_note(name, seed, rows):
    """Rows; or, where a method cannot treat the model, one that says why, as it should not hide the others."""
    try:
        yield from rows
    except Exception as error:
        yield {"method": name, "seed": seed, "note": in_one_sentence(error)}


def of_objective(about, name, objective, guide, starts, num_steps, num_starts, seed):
    """Rows of one objective."""
    svi = SVI(about.model, guide, optax.adam(learning_rate(num_steps)), objective)
    fit_key, *keys = random.split(random.key(seed), 1 + num_starts)
    clock = Clock()
    # What an earlier objective compiled for all.
    clock.total = clock.compiling = starts.compiling
    with clock:
        fitted = fit(svi, fit_key, num_steps, *about.args, num_starts=num_starts, progress_bar=False).starts
        found = [
            starts.weighed(svi, jax.tree.map(lambda leaf, i=i: leaf[i], fitted.params), keys[i]) for i in fitted.kept
        ]
    for start, (estimate, elbo, weights) in zip(fitted.kept, found):
        yield {
            "method": name, "seed": seed + int(start), "size": num_steps, **clock.columns(),
            **starts.quantities.error(estimate), **starts.quantities.of_evidence(weights["log_evidence"], elbo),
            "relative_ess": weights["ess"] / PROPOSALS, "ess_per_second": weights["ess"] / clock.seconds,
            "pareto_k": weights["pareto_k"],
        }  # fmt: skip


class Starts:
    """Draws of single starts, weighted with the density of their own guide, by one program for all objectives.

    :ivar compiling: seconds of its compilation.
    """

    def __init__(self, about):
        self.about, self.quantities, self.compiling = about, Quantities(about), 0.0
        self._asked = Mapped(self.quantities.of, 1000)
        self._approx = None

    def weighed(self, svi, params, rng_key):
        """Means of what is asked, the ELBO, and what the weights say.

        :param svi: of any objective, always with the same guide.
        """
        first, clock = self._approx is None, Clock()
        with clock:
            if first:
                one = jax.tree.map(lambda leaf: leaf[None], params)
                self._approx = Approximation.of(svi, one, 1, self.about.args, {})
                self._draw = jax.jit(jax.vmap(partial(weighted_draw, program_of(self._approx, {})), in_axes=(None, 0)))
            draw_key, resample_key = random.split(rng_key)
            chunks = random.split(draw_key, PROPOSALS).reshape(-1, CHUNK)
            parts = [jax.device_get(self._draw(params, keys)) for keys in chunks]
            draws = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
            latents, _, _, of_weights = weighed(draws, self._approx, False, resample_key, PROPOSALS // 2)
            estimate = self._asked(latents).astype(float).mean(0)
        self.compiling += clock.compiling if first else 0
        elbo = draws.log_weight.reshape(PROPOSALS, -1).sum(1).mean()
        return estimate, elbo, of_weights


def weighted_draw(program, params, rng_key):
    """A draw of a guide whose latents have no local particles."""
    values, densities = program.propose(params, rng_key)[0].shared
    return WeightedDraw(values, densities.model, densities.log_guide, densities.log_weight)
