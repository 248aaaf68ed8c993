"""Other objectives with the same guide, schedule and number of particles: three starts side by side, each by itself."""

from jax import random
import numpy as np
from numpyro.infer import SVI, TraceGraph_ELBO
import optax

from benchmarks.posteriors import recommended as learning_rate
from benchmarks.posteriors.measuring import Clock, Quantities, mean_asked
from benchmarks.posteriors.results import in_one_sentence
from benchmarks.posteriors.summed_out import summed_out
from numpyro_vimco import VIMCO, AutoMixed, ReweightedWakeSleep, VIMCOStar, fit
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.inference_data import _weighed
from numpyro_vimco.posterior.proposals import each_start, propose

ALPHAS = (0.0, 0.1, 0.3, 0.5, 1.0)
STARTS, STEPS, PROPOSALS = 3, 2000, 20_000


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
    for name, objective in objectives(num_particles).items():
        try:
            yield from of_objective(about, name, objective)
        except Exception as error:  # one that cannot treat the model should not hide the others
            yield {"method": name, "seed": 0, "note": in_one_sentence(error)}
    if about.enumerated is not None:
        try:
            yield from summed_out(about, STARTS, STEPS)
        except Exception as error:
            yield {"method": "TraceEnum_ELBO", "seed": 0, "note": in_one_sentence(error)}


def of_objective(about, name, objective):
    """Rows of one objective: draws of each start, weighted with the density of its own guide."""
    svi = SVI(about.model, AutoMixed(about.model), optax.adam(learning_rate(STEPS)), objective)
    fit_key, draw_key, *keys = random.split(random.key(0), 2 + STARTS)
    quantities, clock = Quantities(about), Clock()
    with clock:
        result = fit(svi, fit_key, STEPS, *about.args, num_starts=STARTS, progress_bar=False)
        fitted = Fitted.of(svi, result, about.args, {})
        found = propose(each_start(fitted), draw_key, PROPOSALS)
        weighed = [_weighed(draw, fitted, key, PROPOSALS // 2) for draw, key in zip(found, keys)]
        estimates = [mean_asked(quantities, latents) for latents, *_ in weighed]
    starts = np.flatnonzero(~result.failed)
    for start, draw, (*_, of_weights), estimate in zip(starts, found, weighed, estimates):
        relative_ess = of_weights["ess"] / PROPOSALS
        elbo = draw.log_weight.reshape(PROPOSALS, -1).sum(1).mean()
        yield {
            "method": name, "seed": int(start), "size": STEPS, **clock.columns(), **quantities.error(estimate),
            **quantities.of_evidence(of_weights["log_evidence"], elbo), "relative_ess": relative_ess,
            "ess_per_second": of_weights["ess"] / clock.seconds, "pareto_k": of_weights["pareto_k"],
        }  # fmt: skip
