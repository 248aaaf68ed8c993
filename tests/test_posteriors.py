"""Structured guides find posteriors whose truth is known. Long: each fit takes thousands of steps."""

import itertools

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
import pytest
from scipy.special import expit
from scipy.stats import norm, poisson
from sklearn.datasets import load_diabetes

from helpers import load_example
from numpyro_vimco import AutoMixed, VIMCOStar, fit, importance_diagnostics, to_arviz

selection = load_example("variable_selection")


def fits(model, args, num_steps, site, num_starts=5, num_proposals=40_000):
    """For each start: the estimate of a site's mean, and diagnostics.

    The learning rate is held while the likelihood is annealed, and falls by a cosine afterwards.
    """
    half = num_steps // 2
    rate = optax.join_schedules([optax.constant_schedule(0.01), optax.cosine_decay_schedule(0.01, half)], [half])
    guide = AutoMixed(model, structure="autoregressive")
    svi = SVI(model, guide, optax.adam(rate), VIMCOStar(0.5, num_particles=64))
    result = fit(svi, random.key(0), num_steps, *args, num_starts=num_starts, progress_bar=False)
    for i in range(num_starts):
        arguments = {"model_args": args, "rng_key": random.key(1)}
        diagnostics = importance_diagnostics(svi, result.start(i), num_samples=num_proposals, **arguments)
        draws = to_arviz(
            svi, result.start(i), num_samples=num_proposals // 4, num_proposals=num_proposals, groups=(), **arguments
        )
        yield draws["posterior"][site].values[0].mean(0), diagnostics


def standardized(x):
    return jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)


def designs(correlation, num_cases, effect):
    """16 predictors, each correlated with its neighbours, of which four count."""
    rng = np.random.default_rng(0)
    covariance = correlation ** np.abs(np.subtract.outer(np.arange(16), np.arange(16)))
    predictors = standardized(rng.multivariate_normal(np.zeros(16), covariance, num_cases))
    weights = np.zeros(16)
    weights[[2, 5, 6, 12]] = effect * np.array([1.0, -1.0, 1.0, 0.6])
    response = np.asarray(predictors) @ weights + rng.normal(size=num_cases) * selection.NOISE_VARIANCE**0.5
    return predictors, jnp.asarray(response - response.mean(), jnp.float32)


def diabetes():
    data = load_diabetes(scaled=False)
    return standardized(data.data), standardized(data.target)


@pytest.mark.long
@pytest.mark.parametrize(
    "data, relative_ess",
    [(diabetes(), 0.25), (designs(0.9, 150, 0.5), 0.4), (designs(0.97, 600, 0.8), 0.4)],
    ids=["diabetes", "correlated", "strongly correlated"],
)
def test_variable_selection(data, relative_ess):
    log_evidence, inclusion = selection.exact_posterior(*data)
    for estimate, diagnostics in fits(selection.model, data, 4000, "included"):
        assert np.abs(estimate - inclusion).max() < 0.02
        assert diagnostics.ess > relative_ess * 40_000 and diagnostics.pareto_k < 0.7
        assert log_evidence - 1 < diagnostics.bounds[1]
        assert abs(diagnostics.log_evidence - log_evidence) < 0.03


# Change points: exact by the sum over all segmentations.

TIMES, PRIOR_SCALE, CHANGE = 60, 2.0, 0.05


def change_points(y):
    first = numpyro.sample("first", dist.Normal(0, PRIOR_SCALE))
    with numpyro.plate("time", TIMES - 1):
        switch = numpyro.sample("switch", dist.Bernoulli(CHANGE))
        new = numpyro.sample("new", dist.Normal(0, PRIOR_SCALE))
    changes = jnp.concatenate([jnp.zeros(1, int), switch]) == 1
    last = jax.lax.cummax(jnp.where(changes, jnp.arange(TIMES), 0))
    with numpyro.plate("data", TIMES):
        numpyro.sample("y", dist.Normal(jnp.concatenate([first[None], new])[last], 1), obs=y)


def exact_change_points(y):
    """Log evidence and switches, by dynamic programming (float64)."""
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
    return forward[TIMES], np.exp(forward[1:TIMES] + backward[1:TIMES] - forward[TIMES])


@pytest.mark.long
def test_change_points():
    levels = np.repeat([0.0, 2.5, 1.0, -1.0], [18, 14, 10, 18])
    y = jnp.asarray(levels + np.random.default_rng(3).normal(size=TIMES), jnp.float32)
    log_evidence, switches = exact_change_points(y)
    for estimate, diagnostics in fits(change_points, (y,), 8000, "switch"):
        assert np.abs(estimate - switches).max() < 0.03
        assert abs(diagnostics.log_evidence - log_evidence) < 0.1


# The karate club of Zachary (1977), as a stochastic block model.

# fmt: off
FRIENDS = {
    0: [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17, 19, 21, 31], 1: [2, 3, 7, 13, 17, 19, 21, 30],
    2: [3, 7, 8, 9, 13, 27, 28, 32], 3: [7, 12, 13], 4: [6, 10], 5: [6, 10, 16], 6: [16], 8: [30, 32, 33], 9: [33],
    13: [33], 14: [32, 33], 15: [32, 33], 18: [32, 33], 19: [33], 20: [32, 33], 22: [32, 33], 23: [25, 27, 29, 32, 33],
    24: [25, 27, 31], 25: [31], 26: [29, 33], 27: [33], 28: [31, 33], 29: [32, 33], 30: [32, 33], 31: [32, 33],
    32: [33],
}
# fmt: on
EDGES = np.zeros((34, 34), int)
for one, others in FRIENDS.items():
    EDGES[one, others] = EDGES[others, one] = 1


def blocks(edges):
    """Two groups, the first member in group 0, with more friends within groups than between them."""
    between = numpyro.sample("between", dist.Normal(-2, 1.5))
    more = numpyro.sample("more", dist.HalfNormal(2.0))
    with numpyro.plate("member", 33):
        group = numpyro.sample("group", dist.Bernoulli(0.5))
    group = jnp.concatenate([jnp.zeros(1, int), group])
    pairs = np.triu_indices(34, 1)
    logits = between + more * (group[pairs[0]] == group[pairs[1]])
    with numpyro.plate("pair", len(pairs[0])):
        numpyro.sample("edge", dist.Bernoulli(logits=logits), obs=edges[pairs])


def exact_blocks(num_sweeps=20_000):
    """Group probabilities by Gibbs sampling over members, with the two logits on a grid."""
    rng = np.random.default_rng(0)
    between, more = (x.ravel() for x in np.meshgrid(np.linspace(-5, 1, 61), np.linspace(0.05, 6, 60)))
    log_prior = norm(-2, 1.5).logpdf(between) + norm(0, 2.0).logpdf(more)
    outside, within = (np.log([expit(-logits), expit(logits)]) for logits in (between, between + more))
    group, total = (np.arange(34) >= 17).astype(int), np.zeros(33)
    upper = np.triu(np.ones((34, 34)), 1)
    for sweep in range(num_sweeps + 1000):
        same = group[:, None] == group
        counts = [[(upper * (EDGES == e) * (same == s)).sum() for e in (0, 1)] for s in (False, True)]
        log_joint = log_prior + sum(counts[0][e] * outside[e] + counts[1][e] * within[e] for e in (0, 1))
        probability = np.exp(log_joint - log_joint.max())
        chosen = np.searchsorted(probability.cumsum(), rng.random() * probability.sum())
        gain = within[:, chosen] - outside[:, chosen]  # of being in the same group
        for i in range(1, 34):
            signs = np.where(group == 1, 1.0, -1.0) * gain[EDGES[i]]
            signs[i] = 0
            group[i] = rng.random() < expit(signs.sum())
        total += (sweep >= 1000) * group[1:]
    return total / num_sweeps


@pytest.mark.long
def test_karate_club():
    exact = exact_blocks()
    for estimate, _ in fits(blocks, (jnp.asarray(EDGES),), 4000, "group"):
        assert np.abs(estimate - exact).max() < 0.02


# Small models of other kinds.


def switches(y):
    on = [numpyro.sample(f"switch_{i}", dist.Bernoulli(0.5)) for i in range(3)]
    numpyro.sample("y", dist.Normal(sum(on), 0.3), obs=y)  # exactly one is on, no matter which


@pytest.mark.long
def test_competing_switches():
    guide = AutoMixed(switches, structure="autoregressive")
    svi = SVI(switches, guide, optax.adam(optax.cosine_decay_schedule(0.02, 2000)), VIMCOStar(0.5, num_particles=16))
    result = fit(svi, random.key(0), 2000, 1.0, num_starts=5, progress_bar=False)
    for i in range(5):
        draws = guide.sample_posterior(random.key(1), result.start(i).params, sample_shape=(40_000,))
        for name in ("switch_0", "switch_1", "switch_2"):
            assert abs(draws[name].mean() - 1 / 3) < 0.02


def components(predictors, y):
    """The number of components decides which of six weights matter."""
    number = numpyro.sample("number", dist.DiscreteUniform(1, 6))
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(6), 1).to_event(1))
    mean = predictors @ (weights * (jnp.arange(6) < number))
    numpyro.sample("y", dist.Normal(mean, 1).to_event(1), obs=y)


def scaled(y):
    """A count that scales a vector."""
    number = numpyro.sample("number", dist.Poisson(3.0))
    direction = numpyro.sample("direction", dist.Normal(jnp.zeros(4), 1).to_event(1))
    numpyro.sample("y", dist.Normal(number * direction, 0.5).to_event(1), obs=y)


TABLE = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0], [0.5, 2.5, 1.5]])
ROWS, COLUMNS = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])


def interaction(y):
    """Two categories with an interaction."""
    row = numpyro.sample("row", dist.Categorical(jnp.asarray(ROWS)))
    column = numpyro.sample("column", dist.Categorical(jnp.asarray(COLUMNS)))
    numpyro.sample("y", dist.Normal(jnp.asarray(TABLE)[row, column], 0.3), obs=y)


def small_cases():
    rng = np.random.default_rng(0)
    predictors = rng.normal(size=(20, 6))
    y = predictors[:, :3] @ np.array([0.8, -0.6, 0.5]) + rng.normal(size=20)
    covariances = [predictors[:, :k] @ predictors[:, :k].T + np.eye(20) for k in range(1, 7)]
    log_joint = [
        -0.5 * (20 * np.log(2 * np.pi) + np.linalg.slogdet(c)[1] + y @ np.linalg.solve(c, y)) - np.log(6)
        for c in covariances
    ]
    to_float = lambda *x: tuple(jnp.asarray(value, jnp.float32) for value in x)  # noqa: E731
    yield components, to_float(predictors, y), np.logaddexp.reduce(log_joint), "number"
    y, number = np.array([2.0, -1.5, 3.0, 0.5]), np.arange(80)
    log_likelihood = norm(0, np.sqrt(number[:, None] ** 2 + 0.25)).logpdf(y).sum(1)
    yield scaled, to_float(y), np.logaddexp.reduce(poisson(3.0).logpmf(number) + log_likelihood), "number"
    log_joint = np.log(np.outer(ROWS, COLUMNS)) + norm(TABLE, 0.3).logpdf(2.2)
    yield interaction, (2.2,), np.logaddexp.reduce(log_joint.ravel()), "row"


@pytest.mark.long
@pytest.mark.parametrize("case", range(3), ids=["components", "scaled by a count", "interaction"])
def test_small_models(case):
    model, args, log_evidence, site = next(itertools.islice(small_cases(), case, None))
    for _, diagnostics in fits(model, args, 4000, site, num_starts=3):
        assert abs(diagnostics.log_evidence - log_evidence) < 0.05
