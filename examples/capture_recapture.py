"""Survival of marked animals, where whether an animal is alive is summed out, and what survival depends on is sampled.

    python examples/capture_recapture.py
    python examples/capture_recapture.py --data dipper_capture_history.csv --flood 1 2

Animals are marked when they are first caught, and looked for in the years after (the Cormack-Jolly-Seber model). An
animal that is not seen may be dead, or overlooked: its state in each year is a chain that NumPyro's enumeration sums
out inside of each particle's weight. Left to the guide are the probabilities of survival and of recapture, and a
switch: did floods, in the intervals between years that `--flood` names, change survival? The exact posterior is a sum
over the switch, and over a grid of the three probabilities. `--nuts` adds NUTS with enumeration; it has no switch, so
that it is given the model with floods.

A file of `--data` has a line for each animal: its number, then 1 or 0 for each year. Without one, animals are
simulated.
"""

import argparse
from pathlib import Path

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import condition, mask
from numpyro.infer import MCMC, NUTS, SVI
import optax

from numpyro_vimco import AutoMixed, VIMCOStar, fit

PARAMETERS = ("survival", "survival_in_floods", "recapture")
SIMULATED = (0.6, 0.35, 0.85)
# A normal logit, for a nearly uniform probability. Where floods do not matter, survival in them keeps its prior, and
# the automatic guide, normal in the logit too, can be equal to it. A uniform probability has a logit of heavier tails.
PRIOR = dist.TransformedDistribution(dist.Normal(0.0, 1.5), dist.transforms.SigmoidTransform())


def model(caught, floods):
    """``caught`` has shape (animals, years), ``floods`` is 1 for each interval with a flood, of shape (years - 1,)."""
    matters = numpyro.sample("floods_matter", dist.Bernoulli(0.5))
    survival, in_floods, recapture = (numpyro.sample(name, PRIOR) for name in PARAMETERS)
    by_year = jnp.where(matters * floods, in_floods, survival)

    def next_year(carry, year):
        alive, marked = carry
        seen, survival = year
        with numpyro.plate("animal", len(caught)):
            # Before it is marked, an animal is alive. NumPyro sums over the states.
            probability = dist.util.clamp_probs(jnp.where(marked, survival * alive, 1.0))
            alive = numpyro.sample("alive", dist.Bernoulli(probability), infer={"enumerate": "parallel"})
            with mask(mask=marked):
                numpyro.sample("seen", dist.Bernoulli(dist.util.clamp_probs(recapture * alive)), obs=seen)
        return (alive, marked | (seen == 1)), None

    first = (jnp.ones(len(caught), int), caught[:, 0] == 1)
    scan(next_year, first, (caught[:, 1:].T, by_year))


def log_likelihoods(caught, survival, recapture):
    """Log-likelihood of each animal, by the forward algorithm; ``survival`` has shape (years - 1,)."""
    alive, dead, marked = jnp.zeros(len(caught)), jnp.full(len(caught), -jnp.inf), caught[:, 0] == 1
    for t, seen in enumerate(caught.T[1:]):
        stays = alive + jnp.log(survival[t])
        dies = jnp.logaddexp(dead, alive + jnp.log1p(-survival[t]))
        alive = jnp.where(marked, stays + jnp.where(seen == 1, jnp.log(recapture), jnp.log1p(-recapture)), 0.0)
        dead = jnp.where(marked & (seen == 0), dies, -jnp.inf)
        marked = marked | (seen == 1)
    return jnp.logaddexp(alive, dead)


def exact_posterior(caught, floods, size):
    """Log evidence, probability that floods matter, posterior means, and those given that they do, by midpoint sums."""
    # Animals with the same history count together.
    histories, counts = np.unique(np.asarray(caught), axis=0, return_counts=True)
    middles = (np.arange(size) + 0.5) / size

    def log_likelihood(survival, in_floods, recapture):
        found = log_likelihoods(jnp.asarray(histories), jnp.where(floods, in_floods, survival), recapture)
        return counts @ found

    grid = np.stack(np.meshgrid(middles, middles, middles, indexing="ij"), -1).reshape(-1, 3)
    with_floods = np.asarray(jax.lax.map(lambda x: log_likelihood(*x), grid, batch_size=4096), float)
    without = np.asarray(jax.lax.map(lambda x: log_likelihood(x[0], x[0], x[2]), grid, batch_size=4096), float)
    log_prior = np.asarray(PRIOR.log_prob(grid), float).sum(1) - np.log(2 * len(grid))
    log_joint = np.stack([without, with_floods]) + log_prior
    log_evidence = logsumexp(log_joint)
    weights = np.exp(log_joint - log_evidence)
    matter = weights[1].sum()
    return float(log_evidence), matter, weights.sum(0) @ grid, weights[1] @ grid / matter


def simulate(key, floods, animals):
    """Animals that are first caught in any year but the last."""
    years = len(floods) + 1
    survival, in_floods, recapture = SIMULATED
    survives, seen = np.asarray(random.uniform(key, (2, animals, years)))
    caught = np.zeros((animals, years), int)
    for i, first in enumerate(np.arange(animals) % (years - 1)):
        caught[i, first] = 1
        for t in range(first + 1, years):
            if survives[i, t] > (in_floods if floods[t - 1] else survival):
                break
            caught[i, t] = seen[i, t] < recapture
    return jnp.asarray(caught)


def by_nuts(key, caught, floods, num_samples):
    """Draws of NUTS given that floods matter, with the states summed out by NumPyro."""
    given = condition(model, data={"floods_matter": jnp.array(1)})
    mcmc = MCMC(NUTS(given), num_warmup=num_samples // 2, num_samples=num_samples, progress_bar=False)
    mcmc.run(key, caught, floods)
    return mcmc.get_samples()


def plot(draws, exact, path):
    """Posteriors given that floods matter."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, name, truth in zip(figure.subplots(1, 3), PARAMETERS, exact):
        bins = np.histogram_bin_edges(np.concatenate([np.ravel(values[name]) for values in draws.values()]), 30)
        for label, values in draws.items():
            axes.hist(np.ravel(values[name]), bins, density=True, histtype="step", lw=1.6, label=label)
        axes.axvline(truth, color="black", ls="--", lw=1, label="exact mean")
        axes.set(title=name.replace("_", " "), yticks=[])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), title="given that floods matter")
    figure.savefig(path, dpi=100)


def main(args):
    if args.data is None:
        floods = np.isin(np.arange(6), args.flood)
        caught = simulate(random.key(args.seed), floods, args.animals)
    else:
        caught = jnp.asarray(np.loadtxt(args.data, delimiter=",")[:, 1:].astype(int))
        floods = np.isin(np.arange(caught.shape[1] - 1), args.flood)
    data = caught, jnp.asarray(floods, int)
    log_evidence, exact_matter, exact, exact_given = exact_posterior(caught, floods, args.grid)

    # The rate is held while the likelihood is tempered, then falls by a cosine.
    schedule = optax.warmup_cosine_decay_schedule(0.01, 0.01, args.num_steps // 2, args.num_steps)
    svi = SVI(model, AutoMixed(model), optax.adam(schedule), VIMCOStar(0.5, 32))
    posterior = fit(svi, random.key(1), args.num_steps, *data, num_starts=2, progress_bar=False)
    posterior.diagnose(args.num_draws, random.key(2))
    tree = posterior.to_arviz(rng_key=random.key(3), num_samples=args.num_draws // 4, num_proposals=args.num_draws)
    of_all = tree["posterior"]
    print(posterior, f"\nexact log evidence {log_evidence:.3f}\n")

    matter = float(of_all["floods_matter"].mean())
    print(f"{'posterior mean':>20} {'here':>7} {'exact':>7}")
    means = [float(of_all[name].mean()) for name in PARAMETERS]
    for name, here, truth in zip((*PARAMETERS, "floods_matter"), (*means, matter), (*exact, exact_matter)):
        print(f"{name:>20} {here:7.4f} {truth:7.4f}")
    alive = of_all["alive"].values[..., -1, :].mean((0, 1))
    never = np.asarray(caught[:, -1]) == 0
    print(
        f"\nexpected number of animals alive in the last year, of {never.sum()} not seen then: {alive[never].sum():.1f}"
    )

    given = of_all["floods_matter"].values == 1
    draws = {"VIMCOStar, weighted": {name: of_all[name].values[given] for name in PARAMETERS}}
    if args.nuts:
        draws["NUTS"] = by_nuts(random.key(4), *data, args.nuts)
    print("\nposterior mean (standard deviation), given that floods matter")
    print(f"{'':>20} {'exact':>7} " + " ".join(f"{label:>19}" for label in draws))
    for name, truth in zip(PARAMETERS, exact_given):
        found = (f"{np.mean(values[name]):9.4f} ({np.std(values[name]):.4f})" for values in draws.values())
        print(f"{name:>20} {truth:7.4f} " + " ".join(f"{text:>19}" for text in found))
    args.output.mkdir(parents=True, exist_ok=True)
    plot(draws, exact_given, args.output / "capture_recapture.png")
    print(f"Saved capture_recapture.png in {args.output}/")
    errors = np.array([*means, matter]) - np.array([*exact, exact_matter])
    return posterior, log_evidence, errors


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of capture histories; without it, animals are simulated")
    parser.add_argument("--flood", type=int, nargs="*", default=[1, 2], help="intervals between years, from 0")
    parser.add_argument("--animals", type=int, default=150, help="number of simulated animals")
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--num-draws", type=int, default=8000, help="draws of the guide to be weighted")
    parser.add_argument("--grid", type=int, default=50, help="grid points per probability for the exact posterior")
    parser.add_argument("--nuts", type=int, default=0, help="number of draws of NUTS; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
