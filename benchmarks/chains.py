"""A population of counts, seen each year: chains of samples beside its exact posterior.

python benchmarks/chains.py [--years 30] [--samples 4 8 16] [--seeds 2] [--num-steps 2000]

N_1 ~ Poisson(initial), N_t ~ Poisson(growth N_{t-1} + 1), y_t ~ Binomial(N_t, detection). Growth, detection and initial
abundance are unknown. The truth is a sum over all counts below 220, at each point of a grid of the three. For each
number K of samples of a step: the verdict, the error of the log evidence in nats, the largest error of the mean of a
global latent in posterior standard deviations, the ESS, and seconds of processor and of wall for `fit` with its verdict
and 4,000 draws, compilation counted. K = 1 is a fit without `chain_particles`, in which a path is one particle.
"""

import argparse
import time

import jax
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
from scipy.stats import binom, norm, poisson

from numpyro_vimco import AutoMixed, VIMCOStar, fit

GLOBALS = ("growth", "detection", "initial")
LARGEST = 220


def simulated(years):
    rng = np.random.default_rng(1)
    counts = [rng.poisson(30)]
    for _ in range(years - 1):
        counts.append(rng.poisson(0.97 * counts[-1] + 1.0))
    return rng.binomial(counts, 0.5)


def population(seen):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.2))
    sigmoid = dist.transforms.SigmoidTransform()
    detection = numpyro.sample("detection", dist.TransformedDistribution(dist.Normal(0.0, 0.5), sigmoid))
    initial = numpyro.sample("initial", dist.LogNormal(3.0, 0.5))

    def year(expected, seen):
        count = numpyro.sample("count", dist.Poisson(expected))
        numpyro.sample("seen", dist.Binomial(count, detection), obs=seen)
        return growth * count + 1.0, None

    scan(year, initial, seen)


def log_likelihoods(seen, growth, detection, initial):
    """At all pairs of detection and initial abundance, by a forward recursion over all counts."""
    counts = np.arange(LARGEST)
    transition = poisson.pmf(counts, growth * counts[:, None] + 1.0)
    emission = binom.pmf(seen[:, None], counts, detection[:, None, None])
    forward = poisson.pmf(counts, initial[:, None]) * emission[:, None, 0]
    total = np.zeros(forward.shape[:2])
    for year in range(1, len(seen)):
        sums = forward.sum(-1)
        total += np.log(sums)
        forward = (forward / sums[..., None]) @ transition * emission[:, None, year]
    return total + np.log(forward.sum(-1))


def exact(seen, points=(46, 44, 40)):
    """Log evidence in nats, and mean and standard deviation of each global latent."""
    ends = (-0.3, 0.15), (-1.9, 2.4), (1.8, 5.2)
    grids = [np.linspace(*end, number) for end, number in zip(ends, points)]
    of_grid = np.exp(grids[0]), 1 / (1 + np.exp(-grids[1])), np.exp(grids[2])
    log_p = np.stack([log_likelihoods(seen, growth, *of_grid[1:]) for growth in of_grid[0]])
    log_p += norm.logpdf(grids[0], 0, 0.2)[:, None, None] + norm.logpdf(grids[1], 0, 0.5)[:, None]
    log_p += norm.logpdf(grids[2], 3, 0.5)
    cell = np.prod([grid[1] - grid[0] for grid in grids])
    weight = np.exp(log_p - log_p.max())
    log_evidence = np.log(weight.sum() * cell) + log_p.max()
    weight /= weight.sum()
    moments = {}
    for i, name in enumerate(GLOBALS):
        marginal = weight.sum(tuple(j for j in range(3) if j != i))
        mean = marginal @ of_grid[i]
        moments[name] = mean, np.sqrt(marginal @ (of_grid[i] - mean) ** 2)
    return log_evidence, moments


def main(years, samples, seeds, num_steps):
    seen = simulated(years)
    log_evidence, moments = exact(seen)
    print(f"{years} years; exact log evidence {log_evidence:.3f} nats")
    print(
        f"{'K':>4} {'seed':>4} {'verdict':>8} {'evidence':>16} {'largest':>8} {'ESS':>6} {'processor':>10} {'wall':>6}"
    )
    for number in samples:
        for seed in range(seeds):
            begin = time.process_time(), time.perf_counter()
            chains = {"count": number} if number > 1 else {}
            objective = VIMCOStar(0.5, 8, chain_particles=chains)
            svi = SVI(population, AutoMixed(population, chains=chains.keys()), optax.adam(0.02), objective)
            posterior = fit(svi, jax.random.key(seed), num_steps, seen, progress_bar=False)
            verdict = posterior.verdict
            drawn = posterior.to_arviz(num_samples=4000, groups=(), progress_bar=False).posterior
            spent = time.process_time() - begin[0], time.perf_counter() - begin[1]
            largest = max(abs(float(drawn[name].mean()) - mean) / sd for name, (mean, sd) in moments.items())
            error = f"{posterior.log_evidence - log_evidence:+.3f} ± {posterior.log_evidence_std_error:.3f}"
            ess = f"{posterior.ess / posterior.diagnostics.num_draws:.1%}"
            print(
                f"{number:>4} {seed:>4} {verdict:>8} {error:>16} {largest:>8.2f} {ess:>6} "
                f"{spent[0]:>9.0f}s {spent[1]:>5.0f}s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--years", type=int, default=30)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=2000)
    main(**vars(parser.parse_args()))
