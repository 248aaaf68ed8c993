"""The karate club where friends may be within groups or between them: nothing says which.

The same stochastic block model with a prior that is symmetric about equal friendship: a split into leaders and the
others competes with that into two clubs. Truth: sequential Monte Carlo along powers of the likelihood, with Gibbs moves
of the members and the two logits on a grid, four times.
"""

import numpy as np
import numpyro.distributions as dist
from scipy.special import logsumexp

from benchmarks.posteriors import exact_probabilities
from benchmarks.posteriors.karate_club import Gibbs, block_model, block_model_of_pymc, data

__all__ = ["data", "model", "pymc_model", "truth"]


def model(edges):
    block_model(edges, dist.Normal(0, 2.0))


def pymc_model(edges):
    import pymc as pm

    return block_model_of_pymc(edges, lambda name: pm.Normal(name, 0, 2.0))


def truth(edges, num_runs=4):
    """Averages of runs, with standard errors over them."""
    log_evidence, group = zip(*(sequential_monte_carlo(edges, seed) for seed in range(num_runs)))
    found = exact_probabilities({"group": np.mean(group, 0)}, np.mean(log_evidence), "sequential Monte Carlo")
    error, of_evidence = (np.std(x, 0, ddof=1) / num_runs**0.5 for x in (group, log_evidence))
    return found._replace(errors={"group": error}, log_evidence_error=float(of_evidence))


def sequential_monte_carlo(edges, seed, num_particles=4000, num_powers=150):
    """Log evidence, and the probabilities of the members' groups."""
    rng = np.random.default_rng(seed)
    gibbs = Gibbs(edges, np.linspace(-6, 3, 46), np.linspace(-6, 6, 61), rng)
    sign = np.where(rng.random((num_particles, 34)) < 0.5, 1.0, -1.0)
    sign[:, 0] = -1
    chosen = rng.choice(len(gibbs.log_prior), num_particles, p=np.exp(gibbs.log_prior))
    log_evidence, inverse_temperature = 0.0, 0.0
    for new in np.linspace(0, 1, num_powers + 1)[1:] ** 2:
        edges_of, pairs_of = gibbs.counts(sign)
        log_likelihood = (edges_of * gibbs.logits[:, chosen] + pairs_of * gibbs.log_none[:, chosen]).sum(0)
        log_weight = (new - inverse_temperature) * log_likelihood
        log_evidence += logsumexp(log_weight) - np.log(num_particles)
        weight = np.exp(log_weight - logsumexp(log_weight))
        points = (np.arange(num_particles) + rng.random()) / num_particles
        index = np.searchsorted(weight.cumsum(), points).clip(max=num_particles - 1)
        sign, inverse_temperature = sign[index], new
        for _ in range(1 if new < 1 else 20):
            chosen = gibbs.sweep(sign, inverse_temperature)
    return log_evidence, (sign[:, 1:] > 0).mean(0)
