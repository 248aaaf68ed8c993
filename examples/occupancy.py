"""Where does the animal live, if one can overlook it? Occupancy with visits that did not take place.

    python examples/occupancy.py

100 sites are to be visited four times; a third of the visits fell through. Where the animal lives, a visit finds it
with a probability below one, and where it does not live, never. More forest makes a site more likely to be occupied.
Whether a site is occupied is latent and discrete, one per site, beside three global parameters, so that the sites have
particles of their own. Two states per site can be summed out, which gives the exact posterior on a grid.
"""

import argparse
from pathlib import Path

from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import mask
from numpyro.infer import SVI
import optax
from scipy.special import expit, logsumexp, softmax
from scipy.stats import norm

from numpyro_vimco import AutoMixed, VIMCOStar, fit

SITES, VISITS, MISSED = 100, 4, 1 / 3
BASE, FOREST, DETECTION = -0.3, 1.0, 0.35  # that the data are made with
PRIOR_SD = 1.5  # of all three parameters, on the logit scale


def model(forest, visited, seen):
    """``visited`` and ``seen`` have shape (visits, sites); visits that were missed have no part in it."""
    base = numpyro.sample("base", dist.Normal(0, PRIOR_SD))
    slope = numpyro.sample("slope", dist.Normal(0, PRIOR_SD))
    logit_detection = numpyro.sample("logit_detection", dist.Normal(0, PRIOR_SD))
    with numpyro.plate("site", len(forest), dim=-1):
        occupied = numpyro.sample("occupied", dist.Bernoulli(logits=base + slope * forest))
        # Where nobody lives the logit is -20: found once in 500 million visits.
        logit = jnp.where(occupied == 1, logit_detection, -20.0)
        with numpyro.plate("visit", len(seen), dim=-2), mask(mask=visited):
            numpyro.sample("seen", dist.Bernoulli(logits=logit), obs=seen)


def simulate(seed):
    rng = np.random.default_rng(seed)
    forest = rng.normal(size=SITES)
    occupied = rng.random(SITES) < expit(BASE + FOREST * forest)
    visited = rng.random((VISITS, SITES)) > MISSED
    seen = occupied & visited & (rng.random((VISITS, SITES)) < DETECTION)
    return jnp.asarray(forest, jnp.float32), jnp.asarray(visited), jnp.asarray(seen, jnp.float32), occupied


def exact_posterior(forest, visited, seen, size):
    """Log evidence, means of the parameters, and each site's probability, by a grid over the three parameters."""
    forest, visits, found = np.asarray(forest, float), np.asarray(visited).sum(0), np.asarray(seen).sum(0)
    base, slope, logit = (np.linspace(*ends, size) for ends in ((-3, 4), (-1.5, 4.5), (-2.5, 1.5)))
    log_occupied = -np.logaddexp(0, -(base[:, None, None] + slope[:, None] * forest))
    log_empty = log_occupied - (base[:, None, None] + slope[:, None] * forest)
    log_prior = norm.logpdf(base, 0, PRIOR_SD)[:, None] + norm.logpdf(slope, 0, PRIOR_SD)
    log_joint, probability = np.empty((size, size, size)), np.empty((size, size, size, len(forest)), np.float32)
    for i, detection in enumerate(expit(logit)):
        if_occupied = log_occupied + found * np.log(detection) + (visits - found) * np.log1p(-detection)
        if_empty = np.where(found == 0, log_empty, -np.inf)
        log_site = np.logaddexp(if_occupied, if_empty)
        log_joint[i] = log_site.sum(-1) + log_prior + norm.logpdf(logit[i], 0, PRIOR_SD)
        probability[i] = np.exp(if_occupied - log_site)
    cell = (base[1] - base[0]) * (slope[1] - slope[0]) * (logit[1] - logit[0])
    weight = softmax(log_joint)
    means = {"base": weight.sum((0, 2)) @ base, "slope": weight.sum((0, 1)) @ slope}
    means["logit_detection"] = weight.sum((1, 2)) @ logit
    return logsumexp(log_joint) + np.log(cell), means, np.tensordot(weight, probability, 3)


def learning_rate(num_steps):
    """Held while the likelihood is tempered, then a cosine."""
    return optax.warmup_cosine_decay_schedule(0.02, 0.02, num_steps // 2, num_steps)


def plot(visits, found, estimate, exact, occupied, totals, path):
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    never = found == 0
    shift = np.random.default_rng(0).uniform(-0.25, 0.25, never.sum())
    left.plot(visits[never] + shift, exact[never], "k_", ms=9, label="exact")
    left.plot(visits[never] + shift, estimate[never], "C0.", ms=6, label="VIMCOStar, importance-weighted")
    left.set(xlabel="visits", ylabel="probability that a site is occupied", title="sites where nothing was found")
    left.set_xticks(range(VISITS + 1))
    left.legend()
    values, counts = np.unique(totals, return_counts=True)
    right.bar(values, counts / counts.sum(), 1.0, color="C0", label="posterior")
    for value, style, label in ((occupied.sum(), "k-", "truth"), ((found > 0).sum(), "C3--", "where it was found")):
        right.plot([value, value], [0, 1.15 * counts.max() / counts.sum()], style, label=f"{label}: {value}")
    right.set(xlabel="occupied sites", ylabel="probability", title=f"how many of {SITES} sites are occupied")
    right.legend()
    figure.savefig(path, dpi=100)


def main(args):
    forest, visited, seen, occupied = simulate(args.seed)
    data = forest, visited, seen
    visits, found = np.asarray(visited.sum(0)), np.asarray(seen.sum(0))
    print(
        f"{SITES} sites, {visits.sum()} visits; found at {(found > 0).sum()} sites, never visited {(visits == 0).sum()}"
    )

    objective = VIMCOStar(0.5, num_particles=4, plate_particles={"site": 16})
    svi = SVI(model, AutoMixed(model), optax.adam(learning_rate(args.num_steps)), objective)
    posterior = fit(svi, random.key(0), args.num_steps, *data, progress_bar=args.progress)
    posterior.diagnose(args.num_draws, random.key(1))
    print(f"\n{posterior}\n")
    draws = posterior.to_arviz(rng_key=random.key(2), num_samples=4000, groups=())["posterior"]

    log_evidence, means, exact = exact_posterior(*data, args.grid)
    print(f"{'posterior means':>24} {'weighted':>9} {'exact':>7}")
    for name, value in means.items():
        print(f"{name:>24} {float(draws[name].mean()):9.3f} {value:7.3f}")
    estimate, totals = draws["occupied"].values[0].mean(0), draws["occupied"].values[0].sum(1)
    print(f"{'occupied sites':>24} {totals.mean():9.2f} {exact.sum():7.2f}   (in truth {occupied.sum()})")
    error = np.abs(estimate - exact).max()
    print(f"largest error of a site's probability {error:.3f}; log evidence (exact, in nats) {log_evidence:.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    plot(visits, found, estimate, exact, occupied, totals, args.output / "occupancy.png")
    print(f"Saved occupancy.png in {args.output}/")
    return posterior, log_evidence, error


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--num-draws", type=int, default=10_000)
    parser.add_argument("--grid", type=int, default=60, help="grid points per parameter for the exact posterior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="without progress bars")
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
