"""Counts that are latent: Poisson, zero-inflated and negative binomial, with Normal and Binomial data."""

import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

from benchmarks.small_posteriors.problem import Problem, positive, states, unit_interval


def zero_inflated(name, rate, gate, noise):
    def model(x):
        k = numpyro.sample("k", dist.ZeroInflatedPoisson(gate, rate))
        numpyro.sample("x", dist.Normal(0.01 * k, noise), obs=x)

    def log_joint(latents):
        k = latents["k"]
        prior = np.log((1 - gate) * stats.poisson.pmf(k, rate) + gate * (k == 0))
        return prior + stats.norm.logpdf(0.5, 0.01 * k, noise)

    near = np.arange(max(rate - 15 * np.sqrt(rate), 1), rate + 15 * np.sqrt(rate), dtype=int)
    axes = {"k": states(0, *near)}
    return Problem(name, model, (0.5,), axes, log_joint, {"k": lambda d: d["k"], "none": lambda d: d["k"] == 0})


def detection(y):
    n = numpyro.sample("n", dist.NegativeBinomial2(50.0, 2.0))
    p = numpyro.sample("p", dist.Beta(2.0, 2.0))
    with numpyro.plate("visits", len(y)):
        numpyro.sample("y", dist.Binomial(n, p), obs=y)


def detection_log_joint(latents):
    n, p = latents["n"], latents["p"]
    prior = stats.nbinom.logpmf(n, 2, 2 / 52) + stats.beta.logpdf(p, 2, 2)
    return prior + sum(stats.binom.logpmf(y, n, p) for y in (9, 12, 11))


def gamma_poisson(x):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 0.1))
    k = numpyro.sample("k", dist.Poisson(rate))
    numpyro.sample("x", dist.Normal(k, 2.0), obs=x)


def gamma_poisson_log_joint(latents):
    rate, k = latents["rate"], latents["k"]
    prior = stats.gamma.logpdf(rate, 2, scale=10) + stats.poisson.logpmf(k, rate)
    return prior + stats.norm.logpdf(25, k, 2)


def wide_counts(y):
    rate = numpyro.sample("rate", dist.Gamma(0.5, 1e-4))
    n = numpyro.sample("n", dist.Poisson(rate))
    numpyro.sample("y", dist.Binomial(n, 0.2), obs=y)


def wide_counts_log_joint(latents):
    rate, n = latents["rate"], latents["n"]
    prior = stats.gamma.logpdf(rate, 0.5, scale=1e4) + stats.poisson.logpmf(n, rate)
    return prior + stats.binom.logpmf(300, n, 0.2)


def conflict(x):
    k = numpyro.sample("k", dist.Poisson(3.0))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(k + 5.0 * z, 1.0), obs=x)


def conflict_log_joint(latents):
    k, z = latents["k"], latents["z"]
    prior = stats.poisson.logpmf(k, 3) + stats.bernoulli.logpmf(z, 0.5)
    return prior + stats.norm.logpdf(20, k + 5 * z, 1)


def itself(*names):
    """The latents of these names are asked."""
    return {name: lambda draws, name=name: draws[name] for name in names}


PROBLEMS = [
    zero_inflated("zero_inflated_100", 100.0, 0.5, 3.0),
    zero_inflated("zero_inflated_500", 500.0, 0.2, 5.0),
    Problem(
        "detection",
        detection,
        (np.array([9, 12, 11]),),
        {"n": states(*range(12, 900)), "p": unit_interval(-8, 8, 161)},
        detection_log_joint,
        itself("n", "p"),
    ),
    Problem(
        "gamma_poisson",
        gamma_poisson,
        (25.0,),
        {"rate": positive(0.5, 200, 200), "k": states(*range(5, 46))},
        gamma_poisson_log_joint,
        itself("rate", "k"),
    ),
    Problem(
        "wide_counts",
        wide_counts,
        (300,),
        {"rate": positive(600, 3500, 200), "n": states(*range(900, 2600))},
        wide_counts_log_joint,
        itself("rate", "n"),
    ),
    Problem(
        "counts_in_conflict",
        conflict,
        (20.0,),
        {"k": states(*range(0, 40)), "z": states(0, 1)},
        conflict_log_joint,
        itself("k", "z"),
    ),
]
