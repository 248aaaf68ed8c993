"""How long did each of 255 ringed dippers live? The Cormack-Jolly-Seber model, with survival of its own in the flood.

Each year from 1981 to 1987 birds were caught, ringed and released. One that is not seen again is dead or was missed.
The flood was in the years after the second and the third catch (Lebreton et al., "Modeling survival and testing
biological hypotheses using marked animals", Ecological Monographs 62, 1992). The latent is the last of the seven years
in which a bird lived.

Data: simulated, with as many birds first caught in each year as there were. The real ones, which may not be
distributed, are used where the path of their file of capture histories is given. There, posterior means are 0.45 and
-0.12 for the logits of survival without and with flood, and 2.13 for that of detection (as published, by maximum
likelihood: survival 0.61 and 0.47, detection 0.90). Birds first caught in the last year say nothing and are left out.

Truth: exact, by sums over each bird's last year and quadrature over the three parameters.
"""

from jax.nn import log_sigmoid, sigmoid
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import log_expit
from scipy.stats import norm

YEARS, FIRST_CAUGHT = 7, (22, 49, 52, 45, 41, 46)
FLOOD = np.isin(np.arange(YEARS - 1), (1, 2))
IMPOSSIBLE = -1e3  # log-probability of dying before having lived: NumPyro takes no logits of -inf
PARAMETERS = ("survival", "flood_survival", "detection")


def model(caught):
    """``caught`` has shape (years, birds)."""
    survival = numpyro.sample("survival", dist.Normal(0, 1.5))
    flood_survival = numpyro.sample("flood_survival", dist.Normal(0, 1.5))
    detection = numpyro.sample("detection", dist.Normal(0, 1.5))
    first, year = jnp.argmax(caught, axis=0), jnp.arange(YEARS)
    logits = jnp.where(FLOOD, flood_survival, survival)
    # Log-probability of living from the first year of the study to each, and of dying after each; none dies after it.
    log_living = jnp.concatenate([jnp.zeros(1), jnp.cumsum(log_sigmoid(logits))])
    log_dying = jnp.concatenate([log_sigmoid(-logits), jnp.zeros(1)])
    log_prior = jnp.where(year >= first[:, None], log_living - log_living[first][:, None] + log_dying, IMPOSSIBLE)
    with numpyro.plate("bird", caught.shape[1], dim=-1):
        last = numpyro.sample("last", dist.Categorical(logits=log_prior))
        with numpyro.plate("year", YEARS, dim=-2), numpyro.handlers.mask(mask=year[:, None] > first):
            probability = (year[:, None] <= last) * sigmoid(detection)
            numpyro.sample("caught", dist.Bernoulli(probability), obs=caught)


def enumerated(caught):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(caught)


def asked(draw, caught):
    """Parameters (as logits), and how many of the ringed birds live in each year after the first."""
    living = (draw["last"] >= jnp.arange(YEARS)[:, None]) & (jnp.argmax(caught, axis=0) <= jnp.arange(YEARS)[:, None])
    return {**{name: draw[name] for name in PARAMETERS}, "living": living.sum(1)[1:]}


def pymc_model(caught):
    import pymc as pm
    import pytensor.tensor as pt

    caught = np.asarray(caught, int)
    first, year = caught.argmax(0), np.arange(YEARS)
    seen_last = YEARS - 1 - caught[::-1].argmax(0)
    with pm.Model() as model:
        survival, flood_survival, detection = (pm.Normal(name, 0, 1.5) for name in PARAMETERS)
        log_survival = pt.log(pm.math.invlogit(pt.where(FLOOD, flood_survival, survival)))
        log_living = pt.concatenate([np.zeros(1), pt.cumsum(log_survival)])
        log_dying = pt.concatenate([pt.log1p(-pt.exp(log_survival)), np.zeros(1)])
        log_prior = pt.where(year >= first[:, None], log_living - log_living[first][:, None] + log_dying, -np.inf)
        last = pm.Categorical("last", pt.exp(log_prior), shape=len(first), initval=seen_last)
        bird, when = np.nonzero(year > first[:, None])
        probability = (when <= last[bird]) * pm.math.invlogit(detection)
        pm.Bernoulli("caught", probability, observed=caught[when, bird])
    return model


def data(path=None):
    if path is not None:
        caught = np.loadtxt(path, delimiter=",")[:, 1:]
        return (jnp.asarray(caught[caught.argmax(1) < YEARS - 1].T, jnp.float32),)
    rng = np.random.default_rng(6)
    first = np.repeat(np.arange(YEARS - 1), FIRST_CAUGHT)
    living, caught = np.zeros((2, YEARS, len(first)), bool)
    for year in range(YEARS):
        if year:
            living[year] = living[year - 1] & (rng.random(len(first)) < np.where(FLOOD[year - 1], 0.45, 0.6))
        living[year] |= first == year
        caught[year] = (first == year) | (living[year] & (rng.random(len(first)) < 0.8))
    return (jnp.asarray(caught, jnp.float32),)


def on_grid(axes, caught):
    """Log joint of parameters and data, and moments given the parameters, for `of_grid`."""
    from benchmarks.posteriors.quadrature import parameter_moments

    histories, birds = np.unique(np.asarray(caught, int).T, axis=0, return_counts=True)
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    log_joint = sum(norm(0, 1.5).logpdf(x) for x in grid)
    living, variances = np.zeros((2, *log_joint.shape, YEARS))
    for history, number in zip(histories, birds):
        first = history.argmax()
        terms = []  # log joint of the history with each last year from the first on
        log_term = 0.0
        for last in range(first, YEARS):
            if last > first:
                log_term = log_term + log_expit(grid[1] if FLOOD[last - 1] else grid[0])
                log_term = log_term + log_expit((2 * history[last] - 1) * grid[2])
            dying = log_expit(-(grid[1] if FLOOD[last] else grid[0])) if last < YEARS - 1 else 0.0
            possible = 0.0 if not history[last + 1 :].any() else -np.inf
            terms.append(np.broadcast_to(log_term + dying + possible, log_joint.shape))
        log_total = np.logaddexp.reduce(terms)
        log_joint = log_joint + number * log_total
        probability = np.cumsum(np.exp(np.stack(terms[::-1], -1) - log_total[..., None]), -1)[..., ::-1]
        living[..., first:] += number * probability
        variances[..., first:] += number * probability * (1 - probability)
    moments = dict(zip(PARAMETERS, parameter_moments(axes)))
    moments["living"] = living[..., 1:], variances[..., 1:]
    return log_joint, moments


def truth(caught, size=40):
    from benchmarks.posteriors.quadrature import of_grid

    axes = np.linspace(-1.5, 2.5, size), np.linspace(-2.5, 2.5, size), np.linspace(-0.5, 5.5, size)
    log_joint, moments = on_grid(axes, caught)
    return of_grid(axes, log_joint, moments, f"sums over last years, quadrature with {size} points for each parameter")
