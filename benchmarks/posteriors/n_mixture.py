"""How many animals are at each of 30 sites, by counts of four visits at which not all are seen. Simulated.

The N-mixture model of Royle, "N-mixture models for estimating population size from spatially replicated counts",
Biometrics 60 (2004), with an abundance that depends on the habitat.

Truth: exact, by sums over counts up to 250 and quadrature over the three parameters.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit
from scipy.stats import binom, norm, poisson

SITES, VISITS = 30, 4
PLATE = "site"
# Counts that are summed over; in `enumerated` fewer, which hold all of the posterior but 1e-7 at each site.
MOST, MOST_ENUMERATED = 250, 120


def model(seen, habitat):
    """``seen`` has shape (visits, sites), ``habitat`` (sites,)."""
    intercept = numpyro.sample("intercept", dist.Normal(1, 1))
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    logit_detection = numpyro.sample("logit_detection", dist.Normal(0, 1))
    with numpyro.plate("site", seen.shape[1], dim=-1):
        count = numpyro.sample("count", dist.Poisson(jnp.exp(intercept + slope * habitat)))
        with numpyro.plate("visit", seen.shape[0], dim=-2):
            numpyro.sample("seen", dist.Binomial(count, logits=logit_detection), obs=seen)


def enumerated(seen, habitat):
    intercept = numpyro.sample("intercept", dist.Normal(1, 1))
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    logit_detection = numpyro.sample("logit_detection", dist.Normal(0, 1))
    abundance = jnp.exp(intercept + slope * habitat)
    log_prior = dist.Poisson(abundance[:, None]).log_prob(jnp.arange(MOST_ENUMERATED + 1))
    with numpyro.plate("site", seen.shape[1], dim=-1):
        count = numpyro.sample("count", dist.Categorical(logits=log_prior), infer={"enumerate": "parallel"})
        with numpyro.plate("visit", seen.shape[0], dim=-2):
            numpyro.sample("seen", dist.Binomial(count, logits=logit_detection), obs=seen)


def begin(seen, habitat):
    """A count below what was seen is impossible."""
    return {"count": seen.max(0) + 1}


def asked(draw, seen, habitat):
    """Parameters, the count at each site, and that of all sites."""
    latents = {name: draw[name] for name in ("intercept", "slope", "logit_detection", "count")}
    return {**latents, "total": draw["count"].sum()}


def pymc_model(seen, habitat):
    import pymc as pm

    seen = np.asarray(seen, int)
    with pm.Model() as model:
        intercept, slope = pm.Normal("intercept", 1, 1), pm.Normal("slope", 0, 1)
        logit_detection = pm.Normal("logit_detection", 0, 1)
        abundance = pm.math.exp(intercept + slope * np.asarray(habitat))
        count = pm.Poisson("count", abundance, shape=seen.shape[1], initval=seen.max(0) + 2)
        pm.Binomial("seen", count, logit_p=logit_detection, observed=seen)
    return model


def data():
    rng = np.random.default_rng(4)
    habitat = rng.normal(size=SITES)
    count = rng.poisson(np.exp(1.4 + 0.5 * habitat))
    seen = rng.binomial(count, 0.45, (VISITS, SITES))
    return jnp.asarray(seen, jnp.float32), jnp.asarray(habitat, jnp.float32)


def on_grid(axes, seen, habitat):
    """Log joint of parameters and data, and moments given the parameters, for `of_grid`."""
    from benchmarks.posteriors.quadrature import parameter_moments

    seen, habitat, counts = np.asarray(seen, int), np.asarray(habitat, float), np.arange(MOST + 1)
    intercept, slope = np.meshgrid(*axes[:2], indexing="ij")
    log_joint = (
        norm(1, 1).logpdf(axes[0])[:, None, None] + norm(0, 1).logpdf(axes[1])[:, None] + norm(0, 1).logpdf(axes[2])
    )
    means, variances = np.zeros((2, *log_joint.shape, len(habitat)))
    for i in range(len(habitat)):
        prior = poisson.pmf(counts, np.exp(intercept + slope * habitat[i])[..., None])
        likelihood = binom.pmf(seen[:, i, None, None], counts[:, None], expit(axes[2])).prod(0)
        evidence, first, second = (prior @ (counts[:, None] ** power * likelihood) for power in range(3))
        log_joint += np.log(evidence)
        means[..., i], variances[..., i] = first / evidence, second / evidence - (first / evidence) ** 2
    moments = dict(zip(("intercept", "slope", "logit_detection"), parameter_moments(axes)))
    moments |= {"count": (means, variances), "total": (means.sum(-1), variances.sum(-1))}
    return log_joint, moments


def truth(seen, habitat, size=48):
    from benchmarks.posteriors.quadrature import of_grid

    axes = np.linspace(0.4, 4, size), np.linspace(-0.2, 1, size), np.linspace(-3.5, 1.5, size)
    log_joint, moments = on_grid(axes, seen, habitat)
    return of_grid(axes, log_joint, moments, f"sums over counts, quadrature with {size} points for each parameter")
