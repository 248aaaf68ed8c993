"""How many whooping cranes were there in the winters from 1938 to 1970? A population that grows from 18, counted.

The data and the model of `examples/cranes.py` (U.S. Fish and Wildlife Service), for the first 33 winters: a Poisson
number is alive, with a mean in proportion to that of the winter before, and a flight finds most of it.

Truth: exact, by sums over the numbers alive up to 160, and quadrature over the three parameters.
"""

import jax.numpy as jnp
from jax.scipy.special import logit
import numpy as np
from scipy.special import expit, log_expit
from scipy.stats import beta, binom, norm, poisson

from examples.cranes import SEEN
from examples.cranes import model as model_of_winters

WINTERS, MOST = 33, 160
ASKED = np.array([0, 3, 14, 18, 25, 32])  # 1938, 1941 with the fewest seen, 1952, 1956, 1963, 1970


def data():
    return (jnp.asarray(SEEN[:WINTERS], jnp.float32),)


def model(seen):
    model_of_winters(len(seen), seen)


def asked(draw, seen):
    """Parameters without bounds, and how many were alive in six winters."""
    parameters = {"log_growth": jnp.log(draw["growth"]), "logit_found": logit(draw["found"])}
    return {**parameters, "log_first": jnp.log(draw["first"]), "alive": draw["alive"][ASKED]}


def pymc_model(seen):
    import pymc as pm

    seen = np.asarray(seen, int)
    with pm.Model() as built:
        growth, found, first = pm.LogNormal("growth", 0, 0.2), pm.Beta("found", 38, 2), pm.LogNormal("first", 3, 0.5)
        alive = [pm.Poisson("alive_0", first, initval=seen[0] + 1)]
        for winter in range(1, len(seen)):
            alive.append(pm.Poisson(f"alive_{winter}", growth * alive[-1], initval=seen[winter] + 1))
        alive = pm.Deterministic("alive", pm.math.stack(alive))
        pm.Binomial("seen", alive, found, observed=seen)
    return built


def given_growth(growth, found, first_alive, seen):
    """Log-likelihoods, and the probabilities of the numbers alive in the `ASKED` winters, by the recursions of an HMM.

    :param found: of shape (points,).
    :param first_alive: probabilities of the numbers alive in the first winter, of shape (numbers,).
    :returns: of shapes (points,) and (winters, points, numbers).
    """
    alive = np.arange(len(first_alive))
    transition = poisson.pmf(alive, growth * alive[:, None])
    seen_given = binom.pmf(np.asarray(seen, int)[:, None, None], alive, np.asarray(found)[:, None])
    forward, backward, log_likelihood = [], [np.ones(seen_given.shape[1:])], 0.0
    predicted = first_alive
    for given in seen_given:
        joint = predicted * given
        total = joint.sum(1, keepdims=True)
        log_likelihood = log_likelihood + np.log(total[:, 0])
        forward.append(joint / total)
        predicted = forward[-1] @ transition
    for given in seen_given[:0:-1]:
        message = (backward[-1] * given) @ transition.T
        backward.append(message / message.max(1, keepdims=True))
    smoothed = [forward[winter] * backward[-1 - winter] for winter in ASKED if winter < len(seen)]
    return log_likelihood, np.stack([x / x.sum(1, keepdims=True) for x in smoothed])


def truth(seen, size=60):
    from benchmarks.posteriors.quadrature import of_grid

    axes = np.linspace(-0.16, 0.24, size), np.linspace(-0.5, 12, size)
    (log_growth, logit_found), alive = axes, np.arange(MOST + 1)
    # Of the first mean, all that is known comes through the number alive in the first winter.
    log_first = np.linspace(0, 6, 600)
    joint = norm.pdf(log_first, 3, 0.5) * poisson.pmf(alive[:, None], np.exp(log_first)) * (log_first[1] - log_first[0])
    first_alive = joint.sum(1)
    of_first, square_of_first = joint @ log_first / first_alive, joint @ log_first**2 / first_alive
    found = expit(logit_found)
    log_prior_found = beta.logpdf(found, 38, 2) + log_expit(logit_found) + log_expit(-logit_found)
    log_joint = norm.logpdf(log_growth, 0, 0.2)[:, None] + log_prior_found
    firsts, numbers = np.zeros((2, size, size)), np.zeros((2, size, size, len(ASKED)))
    for i, growth in enumerate(np.exp(log_growth)):
        log_likelihood, smoothed = given_growth(growth, found, first_alive, seen)
        log_joint[i] += log_likelihood
        firsts[:, i] = smoothed[0] @ of_first, smoothed[0] @ square_of_first
        numbers[:, i] = (smoothed @ alive).T, (smoothed @ alive**2).T
    variance = lambda moments: (moments[0], moments[1] - moments[0] ** 2)  # noqa: E731
    grid = np.meshgrid(*axes, indexing="ij")
    moments = {"log_growth": (grid[0], 0.0), "logit_found": (grid[1], 0.0)}
    moments |= {"log_first": variance(firsts), "alive": variance(numbers)}
    return of_grid(axes, log_joint, moments, f"sums over numbers alive, quadrature with {size} points for a parameter")
