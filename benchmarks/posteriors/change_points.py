"""Change points: at each of 60 times, a switch for a new level. Simulated, with three changes.

Truth: exact, by the sum over all segmentations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from benchmarks.posteriors import exact_probabilities

TIMES, PRIOR_SCALE, CHANGE = 60, 2.0, 0.05
NUM_STEPS = 8000


def model(y):
    first = numpyro.sample("first", dist.Normal(0, PRIOR_SCALE))
    with numpyro.plate("time", TIMES - 1):
        switch = numpyro.sample("switch", dist.Bernoulli(CHANGE))
        new = numpyro.sample("new", dist.Normal(0, PRIOR_SCALE))
    changes = jnp.concatenate([jnp.zeros(1, int), switch]) == 1
    last = jax.lax.cummax(jnp.where(changes, jnp.arange(TIMES), 0))
    with numpyro.plate("data", TIMES):
        numpyro.sample("y", dist.Normal(jnp.concatenate([first[None], new])[last], 1), obs=y)


def data():
    levels = np.repeat([0.0, 2.5, 1.0, -1.0], [18, 14, 10, 18])
    return (jnp.asarray(levels + np.random.default_rng(3).normal(size=TIMES), jnp.float32),)


def truth(y):
    """By dynamic programming (float64)."""
    sums, squares = (np.concatenate([[0], np.cumsum(np.asarray(y, float) ** power)]) for power in (1, 2))

    def log_segment(i, j):  # ∫ ∏ Normal(y; level, 1) Normal(level; 0, PRIOR_SCALE), and what begins it and stays on
        n, variance = j - i, 1 / (PRIOR_SCALE**-2 + j - i)
        log_marginal = -0.5 * (n * np.log(2 * np.pi) + np.log(PRIOR_SCALE**2 / variance) + squares[j] - squares[i])
        switches = (np.log(CHANGE) if i else 0) + (n - 1) * np.log1p(-CHANGE)
        return log_marginal + 0.5 * variance * (sums[j] - sums[i]) ** 2 + switches

    forward, backward = np.full(TIMES + 1, -np.inf), np.full(TIMES + 1, -np.inf)
    forward[0] = backward[TIMES] = 0
    for j in range(1, TIMES + 1):
        forward[j] = np.logaddexp.reduce([forward[i] + log_segment(i, j) for i in range(j)])
    for i in range(TIMES - 1, -1, -1):
        backward[i] = np.logaddexp.reduce([backward[j] + log_segment(i, j) for j in range(i + 1, TIMES + 1)])
    switch = np.exp(forward[1:TIMES] + backward[1:TIMES] - forward[TIMES])
    return exact_probabilities({"switch": switch}, forward[TIMES], "sum over all segmentations")
