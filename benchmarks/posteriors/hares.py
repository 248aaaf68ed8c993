"""How many snowshoe hares are there, when 68 were caught on six days, some more easily than others?

The 68 are joined by 132 that were never caught: each may be real or not (data augmentation), and a hare may be shy of
traps. Data: how many hares were caught on how many days, by Otis et al., "Statistical inference from capture data on
closed animal populations", Wildlife Monographs 62 (1978), as in Agresti, "Simple capture-recapture models permitting
unequal catchability and variable sampling effort", Biometrics 50 (1994).

Truth: exact, by sums over the hares and quadrature over the four parameters.
"""

from jax.nn import sigmoid
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit
from scipy.stats import binom, norm

DAYS, HARES = 6, 200
PRIORS = {"logit_real": (0, 1.5), "logit_shy": (0, 1.5), "detection": (0, 1), "log_shyness": (0.5, 0.5)}
TIMES_CAUGHT = np.array([25, 22, 13, 5, 1, 2])  # hares that were caught on 1, 2, …, 6 days


def model(caught):
    logit_real, logit_shy, detection, log_shyness = (
        numpyro.sample(name, dist.Normal(*prior)) for name, prior in PRIORS.items()
    )
    with numpyro.plate("hare", len(caught)):
        real = numpyro.sample("real", dist.Bernoulli(logits=logit_real))
        shy = numpyro.sample("shy", dist.Bernoulli(logits=logit_shy))
        probability = real * sigmoid(detection - jnp.exp(log_shyness) * shy)
        numpyro.sample("caught", dist.Binomial(DAYS, probability), obs=caught)


def enumerated(caught):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(caught)


def asked(draw, caught):
    """Parameters, how many hares are real, and how many shy of those that were caught once and twice."""
    shy = {f"shy_caught_{times}": jnp.sum(draw["shy"] * (caught == times)) for times in (1, 2)}
    return {**{name: draw[name] for name in PRIORS}, "number": draw["real"].sum(), **shy}


def pymc_model(caught):
    import pymc as pm

    caught = np.asarray(caught, int)
    with pm.Model() as model:
        logit_real, logit_shy, detection, log_shyness = (pm.Normal(name, *prior) for name, prior in PRIORS.items())
        real = pm.Bernoulli("real", logit_p=logit_real, shape=HARES, initval=np.ones(HARES, int))
        shy = pm.Bernoulli("shy", logit_p=logit_shy, shape=HARES)
        probability = real * pm.math.invlogit(detection - pm.math.exp(log_shyness) * shy)
        pm.Binomial("caught", DAYS, probability, observed=caught)
    return model


def data():
    caught = np.repeat(np.arange(1, DAYS + 1), TIMES_CAUGHT)
    return (jnp.asarray(np.pad(caught, (0, HARES - len(caught))), jnp.float32),)


def on_grid(axes, caught):
    """Log joint of parameters and data, and moments given the parameters, for `of_grid`."""
    from benchmarks.posteriors.quadrature import parameter_moments

    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    log_joint = sum(norm(*prior).logpdf(x) for prior, x in zip(PRIORS.values(), grid))
    real, shy, detection, shyness = expit(grid[0]), expit(grid[1]), grid[2], np.exp(grid[3])
    moments = dict(zip(PRIORS, parameter_moments(axes)))
    times, hares = np.unique(np.asarray(caught, int), return_counts=True)
    for caught_on, number in zip(times, hares):
        of_shy = real * shy * binom.pmf(caught_on, DAYS, expit(detection - shyness))
        of_real = of_shy + real * (1 - shy) * binom.pmf(caught_on, DAYS, expit(detection))
        either = of_real + (1 - real) * (caught_on == 0)
        log_joint = log_joint + number * np.log(either)
        if caught_on == 0:
            share = of_real / either
            moments["number"] = hares[1:].sum() + number * share, number * share * (1 - share)
        if caught_on in (1, 2):
            share = of_shy / of_real
            moments[f"shy_caught_{caught_on}"] = number * share, number * share * (1 - share)
    return log_joint, moments


def truth(caught, size=56):
    from benchmarks.posteriors.quadrature import of_grid

    axes = tuple(np.linspace(low, high, size) for low, high in ((-1.8, 7.5), (-7.5, 7), (-2.2, 4.4), (-2.3, 3)))
    log_joint, moments = on_grid(axes, caught)
    return of_grid(axes, log_joint, moments, f"sums over hares, quadrature with {size} points for each parameter")
