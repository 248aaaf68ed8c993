"""Item response with guessing: five items of the Law School Admission Test, section 6.

Who has mastered the subject answers an item right unless by a slip; who has not answers it right by a guess. Data: the
response patterns of 1,000 persons of Bock & Lieberman, "Fitting a response model for n dichotomously scored items",
Psychometrika 35 (1970), Table 1 (also `psych::lsat6`); every sixth person in the order of patterns, 167 in all.

Truth: two samplers of the shares, guesses and slips, given which the persons are independent.
"""

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from jax.scipy.special import logit
import numpy as np
import numpyro
import numpyro.distributions as dist

# How many answered so: patterns of five answers in the order 00000, 00001, …, 11111, where 1 is right.
# fmt: off
PERSONS = [
    3, 6, 2, 11, 1, 1, 3, 4, 1, 8, 0, 16, 0, 3, 2, 15, 10, 29, 14, 81, 3, 28, 15, 80, 16, 56, 21, 173, 11, 61, 28, 298,
]
# fmt: on


def parameters():
    share = numpyro.sample("share", dist.Beta(2, 2))
    with numpyro.plate("item", 5, dim=-2):
        guess = numpyro.sample("guess", dist.Beta(3, 3))
        slip = numpyro.sample("slip", dist.Beta(2, 8))
    return share, guess, slip


def model(right):
    """``right`` has shape (items, persons)."""
    share, guess, slip = parameters()
    with numpyro.plate("person", right.shape[1], dim=-1):
        mastery = numpyro.sample("mastery", dist.Bernoulli(share))
        with numpyro.plate("item", 5, dim=-2):
            numpyro.sample("right", dist.Bernoulli(jnp.where(mastery == 1, 1 - slip, guess)), obs=right)


def enumerated(right):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(right)


def log_terms(draw, right):
    """Log joint of each person's answers with no mastery, and with mastery: (2, persons)."""
    likelihood = lambda p: dist.Bernoulli(p).log_prob(right).sum(0)  # noqa: E731
    without = jnp.log1p(-draw["share"]) + likelihood(draw["guess"])
    return jnp.stack([without, jnp.log(draw["share"]) + likelihood(1 - draw["slip"])])


def summed(right):
    share, guess, slip = parameters()
    draw = {"share": share, "guess": guess, "slip": slip}
    numpyro.factor("likelihood", logsumexp(log_terms(draw, right), axis=0).sum())


def draw_latents(key, draw, right):
    return {"mastery": random.categorical(key, log_terms(draw, right), axis=0)}


def asked(draw, right):
    """The share of masters among those with at most 2, with 3, 4 and 5 right answers; parameters as logits."""
    group = jnp.clip(right.sum(0), 2, 5).astype(int) - 2
    total = lambda x: jax.ops.segment_sum(x, group, 4)  # noqa: E731
    mastery = draw["mastery"].astype(right.dtype)
    logits = {name: logit(draw[name]).ravel() for name in ("share", "guess", "slip")}
    return {"masters_by_score": total(mastery) / total(jnp.ones_like(mastery)), **logits}


def pymc_model(right):
    import pymc as pm

    with pm.Model() as model:
        share = pm.Beta("share", 2, 2)
        guess, slip = pm.Beta("guess", 3, 3, shape=(5, 1)), pm.Beta("slip", 2, 8, shape=(5, 1))
        mastery = pm.Bernoulli("mastery", share, shape=right.shape[1])
        pm.Bernoulli("right", pm.math.switch(mastery, 1 - slip, guess), observed=np.asarray(right, int))
    return model


def data():
    patterns = (np.arange(32)[:, None] >> np.arange(4, -1, -1)) & 1
    return (jnp.asarray(np.repeat(patterns, PERSONS, axis=0)[::6].T, jnp.float32),)


def truth(right):
    from benchmarks.posteriors.samplers import two_samplers

    return two_samplers(summed, draw_latents, asked, (right,))
