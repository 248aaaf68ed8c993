"""A change point: in which year did British coal mining become safer, and how much? Disasters of 112 years.

Data: as in `examples/coal_mining.py`. Truth: exact, by the sum over 111 years with conjugate rates.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import digamma, polygamma

from benchmarks.posteriors import Truth
from examples.coal_mining import DISASTERS, exact_posterior, model

__all__ = ["asked", "data", "enumerated", "model", "pymc_model", "truth"]


def data():
    return (jnp.asarray(DISASTERS),)


def asked(draw, disasters):
    return {"change": draw["change"], "log_early": jnp.log(draw["early"]), "log_late": jnp.log(draw["late"])}


def enumerated(disasters):
    # NumPyro 0.22 sums over 0, 1, …, whatever the support of the site is.
    last = numpyro.sample("last_early", dist.DiscreteUniform(0, len(disasters) - 2), infer={"enumerate": "parallel"})
    change = numpyro.deterministic("change", last + 1)
    early = numpyro.sample("early", dist.Exponential(1.0))
    late = numpyro.sample("late", dist.Exponential(1.0))
    with numpyro.plate("year", len(disasters)):
        rate = jnp.where(jnp.arange(len(disasters)) < change, early, late)
        numpyro.sample("disasters", dist.Poisson(rate), obs=disasters)


def pymc_model(disasters):
    import pymc as pm

    disasters = np.asarray(disasters)
    with pm.Model() as built:
        change = pm.DiscreteUniform("change", 1, len(disasters) - 1)
        early = pm.Exponential("early", 1.0)
        late = pm.Exponential("late", 1.0)
        rate = pm.math.switch(np.arange(len(disasters)) < change, early, late)
        pm.Poisson("disasters", rate, observed=disasters)
    return built


def truth(disasters):
    disasters = np.asarray(disasters)
    log_evidence, probability = exact_posterior(disasters)
    years = np.arange(1, len(disasters))
    before = disasters.cumsum()[:-1]

    def moments(first, variance=0.0):  # of a quantity whose mean and variance depend on the year
        mean = probability @ first
        return mean, np.sqrt(probability @ ((first - mean) ** 2 + variance))

    def of_log_rate(total, years):  # given the year a rate is Gamma(total + 1, years + 1)
        return moments(digamma(total + 1) - np.log(years + 1), polygamma(1, total + 1))

    found = {
        "change": moments(years),
        "log_early": of_log_rate(before, years),
        "log_late": of_log_rate(disasters.sum() - before, len(disasters) - years),
    }
    means, sds = ({name: x[i] for name, x in found.items()} for i in (0, 1))
    errors = dict.fromkeys(found, 0.0)
    return Truth(means, sds, errors, float(log_evidence), 0.0, "exact: sum over the years, conjugate rates")
