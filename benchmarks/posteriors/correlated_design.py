"""Variable selection: 16 simulated predictors, neighbours correlated 0.9, 150 cases, of which four count.

Truth: exact, by the sum over 65,536 models.
"""

import jax.numpy as jnp
import numpy as np

from benchmarks.posteriors.diabetes import model, pymc_model, standardized, truth
from examples.variable_selection import NOISE_VARIANCE

__all__ = ["data", "model", "pymc_model", "truth"]


def data(correlation=0.9, num_cases=150, effect=0.5):
    rng = np.random.default_rng(0)
    covariance = correlation ** np.abs(np.subtract.outer(np.arange(16), np.arange(16)))
    predictors = standardized(rng.multivariate_normal(np.zeros(16), covariance, num_cases))
    weights = np.zeros(16)
    weights[[2, 5, 6, 12]] = effect * np.array([1.0, -1.0, 1.0, 0.6])
    response = np.asarray(predictors) @ weights + rng.normal(size=num_cases) * NOISE_VARIANCE**0.5
    return predictors, jnp.asarray(response - response.mean(), jnp.float32)
