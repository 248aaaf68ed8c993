"""Variable selection in logistic regression: which of 30 measurements of cells tell a malignant tumour?

569 cases of Wisconsin (scikit-learn); the measurements are standardised, and strongly correlated: radius, perimeter and
area of the same cells. Truth: two samplers in `spike_and_slab_logistic.py`.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from sklearn.datasets import load_breast_cancer

from benchmarks.posteriors import agreed
from benchmarks.posteriors.diabetes import standardized
from benchmarks.posteriors.spike_and_slab_logistic import LaplaceMetropolis, PolyaGammaGibbs, Prior, with_evidence

INCLUSION, SLAB_SCALE, INTERCEPT_SCALE = 0.2, 1.0, 2.0


def data():
    found = load_breast_cancer()
    return standardized(found.data), jnp.asarray(1 - found.target)  # 1 is malignant


def model(predictors, malignant):
    intercept = numpyro.sample("intercept", dist.Normal(0, INTERCEPT_SCALE))
    with numpyro.plate("predictor", predictors.shape[1]):
        included = numpyro.sample("included", dist.Bernoulli(INCLUSION))
        coefficient = numpyro.sample("coefficient", dist.Normal(0, SLAB_SCALE))
    logits = intercept + predictors @ (included * coefficient)
    with numpyro.plate("case", len(malignant)):
        numpyro.sample("malignant", dist.Bernoulli(logits=logits), obs=malignant)


def asked(draw, *_):
    effect = draw["included"] * draw["coefficient"]
    return {
        "included": draw["included"],
        "num_included": draw["included"].sum(),
        "effect": effect,
        "intercept": draw["intercept"],
    }


def pymc_model(predictors, malignant):
    import pymc as pm

    predictors, malignant = np.asarray(predictors), np.asarray(malignant)
    with pm.Model() as built:
        intercept = pm.Normal("intercept", 0, INTERCEPT_SCALE)
        included = pm.Bernoulli("included", INCLUSION, shape=predictors.shape[1])
        coefficient = pm.Normal("coefficient", 0, SLAB_SCALE, shape=predictors.shape[1])
        logits = intercept + pm.math.dot(predictors, included * coefficient)
        pm.Bernoulli("malignant", logit_p=logits, observed=malignant)
    return built


def truth(predictors, malignant, num_sweeps=4000, num_steps=8000):
    prior = Prior(INCLUSION, SLAB_SCALE, INTERCEPT_SCALE)
    gibbs = PolyaGammaGibbs(predictors, malignant, prior, num_chains=64, seed=0)
    metropolis = LaplaceMetropolis(predictors, malignant, prior, num_chains=64, seed=1)
    draws, one = gibbs.run(num_sweeps)
    return with_evidence(agreed(one, metropolis.run(num_steps)), metropolis, draws)
