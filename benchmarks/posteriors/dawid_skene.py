"""Raters with error: which of four classes of fitness are 45 patients in, by five anaesthetists.

Data: Table 1 of Dawid & Skene, "Maximum likelihood estimation of observer error-rates using the EM algorithm", Applied
Statistics 28 (1979); the first of the anaesthetists rated each patient three times. What fixes the order of the classes
is that a rater is expected to be right more often than not.

Truth: two samplers of prevalence and the raters' confusion of classes, given which the patients are independent.
"""

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

RATERS, CLASSES = 5, 4
RATER = np.array([0, 0, 0, 1, 2, 3, 4])
# One word for each patient, with a digit for each rating.
RATINGS = """
1111111 3334334 1122122 2223121 2223222 2223322 1222111 3333433 2222223 2322223 4444444 2223343 1111111 2223212 1211111
1112111 1111111 1111111 2222221 2221322 2222222 2222221 2223222 2212222 1111111 1111111 2322222 1111111 1111111 1121121
1111111 3333233 1111111 2222222 2223232 4334343 2212232 2323233 3333432 1111111 1111111 1212111 2322222 1211111 2222222
""".split()
# Patients whose seven ratings have no majority of five.
DISPUTED = np.array([i for i, word in enumerate(RATINGS) if max(map(word.count, "1234")) < 5])


def parameters():
    prevalence = numpyro.sample("prevalence", dist.Dirichlet(2 * jnp.ones(CLASSES)))
    with numpyro.plate("rater", RATERS, dim=-2), numpyro.plate("class", CLASSES, dim=-1):
        confusion = numpyro.sample("confusion", dist.Dirichlet(1 + 4 * jnp.eye(CLASSES)))
    return prevalence, confusion


def model(rating):
    """``rating`` has shape (7, patients); its first three rows are of one rater."""
    prevalence, confusion = parameters()
    with numpyro.plate("patient", rating.shape[1], dim=-1):
        fitness = numpyro.sample("fitness", dist.Categorical(prevalence))
        with numpyro.plate("occasion", len(RATER), dim=-2):
            numpyro.sample("rating", dist.Categorical(confusion[RATER[:, None], fitness]), obs=rating)


def enumerated(rating):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(rating)


def log_terms(draw, rating):
    """Log joint of each patient's ratings with each class: (4, patients)."""
    log_confusion = jnp.log(draw["confusion"])[RATER[:, None], :, rating]  # (7, patients, 4)
    return jnp.log(draw["prevalence"])[:, None] + log_confusion.sum(0).T


def summed(rating):
    prevalence, confusion = parameters()
    draw = {"prevalence": prevalence, "confusion": confusion}
    numpyro.factor("likelihood", logsumexp(log_terms(draw, rating), axis=0).sum())


def draw_latents(key, draw, rating):
    return {"fitness": random.categorical(key, log_terms(draw, rating), axis=0)}


def asked(draw, rating):
    """Patients in each class, classes (from 0) of disputed patients, log prevalence, how often each rater is right."""
    in_class = jax.nn.one_hot(draw["fitness"], CLASSES)
    return {
        "patients": in_class.sum(0),
        "disputed": draw["fitness"][DISPUTED],
        "log_prevalence": jnp.log(draw["prevalence"]),
        "right": jnp.diagonal(draw["confusion"], axis1=-2, axis2=-1),
    }


def pymc_model(rating):
    import pymc as pm

    with pm.Model() as model:
        prevalence = pm.Dirichlet("prevalence", 2 * np.ones(CLASSES))
        prior = np.broadcast_to(1 + 4 * np.eye(CLASSES), (RATERS, CLASSES, CLASSES))
        confusion = pm.Dirichlet("confusion", prior)
        fitness = pm.Categorical("fitness", prevalence, shape=rating.shape[1])
        pm.Categorical("rating", confusion[RATER[:, None], fitness[None]], observed=np.asarray(rating))
    return model


def data():
    return (jnp.asarray([[int(digit) - 1 for digit in word] for word in RATINGS]).T,)


def truth(rating):
    from benchmarks.posteriors.samplers import two_samplers

    return two_samplers(summed, draw_latents, asked, (rating,))
