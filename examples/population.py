"""A population that is counted each year, and of which not all are seen: `fit` beside the exact posterior.

    python examples/population.py

The model of the README: growth, detection and the first number are unknown, and so is the number of animals in each of
eight years. `fit` draws 16 samples of each year and counts all 16^8 paths through them. The exact posterior sums over
all counts up to 160, at each point of a grid of the three unknown numbers.
"""

import argparse
from pathlib import Path
import time

from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from scipy.stats import beta, binom, norm, poisson

from numpyro_vimco import fit

SEEN = jnp.array([16, 17, 19, 21, 21, 16, 18, 10])
MOST = 160
LEVELS = (0.05, 0.5, 0.95)


def population(seen):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.2))
    detection = numpyro.sample("detection", dist.Beta(4, 4))
    first = numpyro.sample("first", dist.LogNormal(3.0, 0.5))

    def year(expected, seen):
        count = numpyro.sample("count", dist.Poisson(expected))
        numpyro.sample("seen", dist.Binomial(count, detection), obs=seen)
        return growth * count + 1.0, None

    scan(year, first, seen)


def exact_posterior(seen):
    """Log evidence in nats, and the distribution of the count of each year, by a forward and a backward recursion."""
    counts = np.arange(MOST + 1)
    log_growth, detection, log_first = np.linspace(-0.6, 0.5, 23), np.linspace(0.06, 0.94, 23), np.linspace(2, 4.9, 24)
    prior = norm.pdf(log_growth, 0, 0.2)[:, None, None] * beta.pdf(detection, 4, 4)[:, None]
    prior = prior * norm.pdf(log_first, 3, 0.5)
    cell = (log_growth[1] - log_growth[0]) * (detection[1] - detection[0]) * (log_first[1] - log_first[0])
    emission = binom.pmf(np.asarray(seen)[:, None, None], counts, detection[:, None])  # years, detection, counts
    first = poisson.pmf(counts, np.exp(log_first)[:, None])
    total = np.zeros((len(seen), MOST + 1))
    for weight, growth in zip(prior, np.exp(log_growth)):
        move = poisson.pmf(counts, growth * counts[:, None] + 1.0)
        forward = [first * emission[0][:, None]]  # detection, first, counts
        for seen_now in emission[1:]:
            forward.append(forward[-1] @ move * seen_now[:, None])
        backward = np.ones((len(detection), 1, MOST + 1))
        for t in reversed(range(len(seen))):
            total[t] += np.einsum("df,dfn,dn->n", weight, forward[t], backward[:, 0])
            backward = (backward * emission[t][:, None]) @ move.T
    evidence = total.sum(1) * cell
    return float(np.log(evidence[0])), total / total.sum(1, keepdims=True)


def quantiles(probability):
    """Of a distribution over counts, for each year."""
    return np.stack([(np.cumsum(probability, axis=1) < level).sum(1) for level in LEVELS])


def draw(path, draws, exact):
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    years = np.arange(1, len(SEEN) + 1)
    for values, shift, color, label in ((draws, -0.08, "C3", "fit"), (exact, 0.08, "0.3", "exact")):
        low, middle, high = values
        axes.errorbar(years + shift, middle, (middle - low, high - middle), fmt="o", ms=4, color=color, label=label)
    axes.plot(years, SEEN, "k_", ms=14, label="seen")
    axes.set(xlabel="year", ylabel="animals", ylim=(0, None))
    axes.legend(frameon=False, ncols=3, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(args):
    begin = time.perf_counter()
    posterior = fit(population, random.key(0), args.num_steps, SEEN, progress_bar=False)
    print(posterior)
    count = posterior.to_arviz(groups=(), progress_bar=False)["posterior"]["count"]
    seconds = time.perf_counter() - begin
    draws = np.quantile(np.asarray(count).reshape(-1, len(SEEN)), LEVELS, axis=0)
    log_evidence, probability = exact_posterior(SEEN)
    exact = quantiles(probability)
    print(f"\nexact log evidence: {log_evidence:.3f} nats; all of the fit took {seconds:.0f} s")
    print("alive in the last year, 5%, 50% and 95%:", *draws[:, -1].round(), "by the fit,", *exact[:, -1], "exact")
    draw(args.output / "population.png", draws, exact)
    print(f"saved {args.output / 'population.png'}")
    return posterior, log_evidence, draws, exact


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
