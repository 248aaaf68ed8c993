"""Variable selection: which of ten measurements of 442 patients explain the progression of diabetes (scikit-learn).

Truth: exact, by the sum over 1,024 models.
"""

import jax.numpy as jnp
from sklearn.datasets import load_diabetes

from benchmarks.posteriors import exact_probabilities
from examples.variable_selection import exact_posterior, model

__all__ = ["data", "model", "standardized", "truth"]


def standardized(x):
    return jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)


def data():
    found = load_diabetes(scaled=False)
    return standardized(found.data), standardized(found.target)


def truth(predictors, response):
    log_evidence, inclusion = exact_posterior(predictors, response)
    source = f"sum over {2 ** predictors.shape[1]:,} models"
    return exact_probabilities({"included": inclusion}, log_evidence, source)
