"""At which of 60 sites does a species live, when visits that should find it may not. Simulated.

The occupancy model of MacKenzie et al., "Estimating site occupancy rates when detection probabilities are less than
one", Ecology 83 (2002): occupancy depends on the habitat, detection on the weather; a third of the visits were not
made.

Truth: exact, by sums over occupancy and quadrature over the four parameters.
"""

from functools import cache

from jax.nn import sigmoid
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit, log_expit
from scipy.stats import norm

SITES, VISITS = 60, 5
PARAMETERS = ("occupancy", "habitat_slope", "detection", "weather_slope")


def model(seen, visited, habitat, weather):
    """``seen``, ``visited`` and ``weather`` have shape (visits, sites), ``habitat`` (sites,)."""
    occupancy = numpyro.sample("occupancy", dist.Normal(0, 1.5))
    habitat_slope = numpyro.sample("habitat_slope", dist.Normal(0, 1))
    detection = numpyro.sample("detection", dist.Normal(0, 1.5))
    weather_slope = numpyro.sample("weather_slope", dist.Normal(0, 1))
    with numpyro.plate("site", seen.shape[1], dim=-1):
        occupied = numpyro.sample("occupied", dist.Bernoulli(logits=occupancy + habitat_slope * habitat))
        with numpyro.plate("visit", seen.shape[0], dim=-2), numpyro.handlers.mask(mask=visited):
            probability = occupied * sigmoid(detection + weather_slope * weather)
            numpyro.sample("seen", dist.Bernoulli(probability), obs=seen)


def enumerated(*args):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(*args)


def asked(draw, *args):
    """Parameters (as logits), occupancy where the species was not seen, and the number of occupied sites."""
    occupied = draw["occupied"]
    parameters = {name: draw[name] for name in PARAMETERS}
    return {**parameters, "unseen": occupied[~simulated()["ever_seen"]], "number": occupied.sum()}


def pymc_model(seen, visited, habitat, weather):
    import pymc as pm

    seen, visited, habitat, weather = map(np.asarray, (seen, visited, habitat, weather))
    with pm.Model() as model:
        occupancy, detection = pm.Normal("occupancy", 0, 1.5), pm.Normal("detection", 0, 1.5)
        habitat_slope, weather_slope = pm.Normal("habitat_slope", 0, 1), pm.Normal("weather_slope", 0, 1)
        logits = occupancy + habitat_slope * habitat
        occupied = pm.Bernoulli("occupied", logit_p=logits, shape=len(habitat), initval=np.ones(len(habitat), int))
        site = np.where(visited)[1]
        probability = occupied[site] * pm.math.invlogit(detection + weather_slope * weather[visited])
        pm.Bernoulli("seen", probability, observed=seen[visited].astype(int))
    return model


@cache
def simulated():
    rng = np.random.default_rng(5)
    habitat, weather = rng.normal(size=SITES), rng.normal(size=(VISITS, SITES))
    occupied = rng.random(SITES) < expit(0.3 + habitat)
    visited = rng.random((VISITS, SITES)) < 2 / 3
    seen = (rng.random((VISITS, SITES)) < occupied * expit(-0.7 + 0.6 * weather)) & visited
    return {"seen": seen, "visited": visited, "habitat": habitat, "weather": weather, "ever_seen": seen.any(0)}


def data():
    found = simulated()
    numbers = {name: jnp.asarray(found[name], jnp.float32) for name in ("seen", "habitat", "weather")}
    return numbers["seen"], jnp.asarray(found["visited"]), numbers["habitat"], numbers["weather"]


def on_grid(axes, seen, visited, habitat, weather):
    """Log joint of parameters and data, and moments given the parameters, for `of_grid`."""
    from benchmarks.posteriors.quadrature import parameter_moments

    seen, visited, habitat, weather = (np.asarray(x, float) for x in (seen, visited, habitat, weather))
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    log_joint = sum(norm(0, scale).logpdf(x) for x, scale in zip(grid, (1.5, 1, 1.5, 1)))
    probabilities = []  # of being occupied, at sites where the species was not seen
    for i in range(len(habitat)):
        logit = grid[0] + grid[1] * habitat[i]
        log_seen = 0.0
        for t in np.flatnonzero(visited[:, i]):
            log_seen = log_seen + log_expit((2 * seen[t, i] - 1) * (grid[2] + grid[3] * weather[t, i]))
        log_occupied = log_expit(logit) + log_seen
        if seen[:, i].any():
            log_joint = log_joint + log_occupied
            continue
        log_either = np.logaddexp(log_occupied, log_expit(-logit))
        log_joint = log_joint + log_either
        probabilities.append(np.exp(log_occupied - log_either).astype(np.float32))
    probabilities = np.stack(probabilities, -1)
    variances = probabilities * (1 - probabilities)
    moments = dict(zip(PARAMETERS, parameter_moments(axes)))
    moments["unseen"] = probabilities, variances
    moments["number"] = probabilities.sum(-1) + seen.any(0).sum(), variances.sum(-1)
    return log_joint, moments


def truth(*args, size=26):
    from benchmarks.posteriors.quadrature import of_grid

    axes = tuple(np.linspace(low, high, size) for low, high in ((-1.8, 8), (-2.5, 6), (-3, 1.3), (-1, 3)))
    log_joint, moments = on_grid(axes, *args)
    return of_grid(axes, log_joint, moments, f"sums over occupancy, quadrature with {size} points for each parameter")
