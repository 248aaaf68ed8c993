"""Variable selection: which of ten measurements of 442 patients explain the progression of diabetes (scikit-learn).

Truth: exact, by the sum over 1,024 models.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from sklearn.datasets import load_diabetes

from benchmarks.posteriors import exact_probabilities
from examples.variable_selection import INCLUSION, NOISE_VARIANCE, SLAB_VARIANCE, exact_posterior, model

__all__ = ["data", "enumerated", "model", "pymc_model", "standardized", "truth"]


def standardized(x):
    return jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)


def data():
    found = load_diabetes(scaled=False)
    return standardized(found.data), standardized(found.target)


def enumerated(predictors, response):
    """The indicators are one site of 1,024 subsets: NumPyro cannot sum out those of a plate that the data couple."""
    subsets = np.array(list(itertools.product([0, 1], repeat=predictors.shape[1])))
    probability = np.where(subsets, INCLUSION, 1 - INCLUSION).prod(1)
    subset = numpyro.sample("subset", dist.Categorical(jnp.asarray(probability)), infer={"enumerate": "parallel"})
    included = numpyro.deterministic("included", jnp.asarray(subsets)[subset])
    with numpyro.plate("predictor", predictors.shape[1]):
        coefficient = numpyro.sample("coefficient", dist.Normal(0, SLAB_VARIANCE**0.5))
    mean = (included * coefficient) @ predictors.T
    mean = mean[..., 0, :] if mean.ndim > 1 else mean  # of all subsets: (subsets, 1, patients)
    with numpyro.plate("patient", len(response)):
        numpyro.sample("response", dist.Normal(mean, NOISE_VARIANCE**0.5), obs=response)


def pymc_model(predictors, response):
    import pymc as pm

    predictors, response = np.asarray(predictors), np.asarray(response)
    with pm.Model() as built:
        included = pm.Bernoulli("included", INCLUSION, shape=predictors.shape[1])
        coefficient = pm.Normal("coefficient", 0, SLAB_VARIANCE**0.5, shape=predictors.shape[1])
        pm.Normal("response", predictors @ (included * coefficient), NOISE_VARIANCE**0.5, observed=response)
    return built


def truth(predictors, response):
    log_evidence, inclusion = exact_posterior(predictors, response)
    source = f"sum over {2 ** predictors.shape[1]:,} models"
    return exact_probabilities({"included": inclusion}, log_evidence, source)
