"""Integer distributions for guides: their definitions, draws, gradients and supports."""

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import logistic

from numpyro_vimco.distributions import DiscretizedLogistic, IntervalCategorical


def test_discretized_logistic_is_its_definition(x64):
    loc, scale, low = np.array([0.2, 3.0, 40.0, -20.0]), np.array([0.3, 0.05, 9.0, 4.0]), np.array([0, 1, 0, 2])
    fn = DiscretizedLogistic(jnp.array(loc), jnp.array(scale), jnp.array(low))
    k = low + np.arange(600)[:, None]
    rounded = logistic(loc, scale)
    expected = (rounded.cdf(k + 0.5) - rounded.cdf(k - 0.5)) / rounded.sf(low - 0.5)
    np.testing.assert_allclose(np.exp(fn.log_prob(k)), expected, atol=1e-12)
    np.testing.assert_allclose(np.exp(fn.log_prob(k)).sum(0), 1, atol=1e-12)
    for q in (0.01, 0.3, 0.5, 0.99):
        quantile = low + (expected.cumsum(0) < q).sum(0)
        np.testing.assert_array_equal(fn.icdf(jnp.full(4, q)), quantile)


def test_discretized_logistic_draws_have_its_probabilities():
    fn = DiscretizedLogistic(2.0, 1.5, 1)
    draws = fn.sample(random.key(0), (100_000,))
    assert jnp.issubdtype(draws.dtype, jnp.integer)
    k = jnp.arange(1, 12)
    probability = jnp.exp(fn.log_prob(k))
    # 11 frequencies of 100,000 draws, each within 5.5 standard errors: fails once in 2 million runs.
    error = jnp.sqrt(probability * (1 - probability) / len(draws))
    assert jnp.all(jnp.abs((draws == k[:, None]).mean(1) - probability) < 5.5 * error)


@pytest.mark.parametrize("loc", [2.0**23 + 1, 2.0**24 + 2, 1e8, 2e9])
def test_discretized_logistic_of_big_counts_in_single_precision(loc):
    fn = DiscretizedLogistic(loc, 2.0)
    k = int(loc) + jnp.arange(-60, 61)
    np.testing.assert_allclose(jnp.exp(fn.log_prob(k)).sum(), 1, atol=1e-5)
    expected = logistic(loc, 2.0).cdf(np.asarray(k) + 0.5) - logistic(loc, 2.0).cdf(np.asarray(k) - 0.5)
    np.testing.assert_allclose(jnp.exp(fn.log_prob(k)), expected, atol=1e-6)
    draws = fn.sample(random.key(0), (20_000,))
    # 9 frequencies of 20,000 draws, each within 5.5 standard errors: fails less than once in 2 million runs.
    probability = expected[56:65]
    error = np.sqrt(probability * (1 - probability) / 20_000)
    assert np.all(np.abs((draws == k[56:65, None]).mean(1) - probability) < 5.5 * error)


def test_discretized_logistic_has_no_largest_integer():
    fn = DiscretizedLogistic(3.0, 2.0)
    for q in (1.0, jnp.array([0.5, 1.0]), -0.1, jnp.nan):
        with pytest.raises(ValueError, match="no largest integer"):
            fn.icdf(q)


def test_discretized_logistic_draws_do_not_wrap_around():
    draws = DiscretizedLogistic(2.1e9, 5e7).sample(random.key(0), (1000,))
    assert draws.min() > 10**9  # 22 scales below


def test_interval_categorical_with_big_bounds():
    low = 2**30 + 1
    fn = IntervalCategorical(jnp.log(jnp.array([1.0, 2.0, 1.0])), low, low + 2)
    np.testing.assert_allclose(jnp.exp(fn.log_prob(low + jnp.arange(3))), [0.25, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(fn.icdf(jnp.array([0.2, 0.5, 1.0])), [low, low + 1, low + 2])
    assert set(np.unique(fn.sample(random.key(0), (100,)))) == {low, low + 1, low + 2}


def test_discretized_logistic_is_narrower_and_wider_than_poisson():
    k = jnp.arange(400)
    for scale, narrower in [(0.5, True), (8.0, False)]:
        probability = jnp.exp(DiscretizedLogistic(20.0, scale).log_prob(k))
        mean = probability @ k
        assert (probability @ (k - mean) ** 2 < mean / 2) == narrower


@pytest.mark.parametrize("loc, scale", [(1e-6, 1e-3), (3.0, 1e-3), (1e5, 1e-2), (5.0, 1e6)])
def test_discretized_logistic_has_finite_gradients(loc, scale):
    value = jnp.array([0, 1, 100, 10**6])
    log_prob = lambda loc, scale: DiscretizedLogistic(loc, scale).log_prob(value)  # noqa: E731
    assert jnp.all(jnp.isfinite(log_prob(loc, scale)))
    assert jnp.all(jnp.isfinite(jnp.array(jax.jacobian(log_prob, (0, 1))(loc, scale))))


def test_interval_categorical_with_bounds_of_each_element():
    fn = IntervalCategorical(
        jnp.log(jnp.array([[1.0, 2.0, 1.0], [1.0, 3.0, 99.0]])), jnp.array([0, 5]), jnp.array([2, 6])
    )
    np.testing.assert_allclose(jnp.exp(fn.log_prob(jnp.array([1, 6]))), [0.5, 0.75], rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(fn.log_prob)(jnp.array([3, 4])), [-jnp.inf, -jnp.inf])  # as in a fit
    np.testing.assert_array_equal(fn.icdf(jnp.array([[0.2], [0.5], [1.0]])), [[0, 5], [1, 6], [2, 6]])
    draws = fn.sample(random.key(0), (1000,))
    assert set(np.unique(draws[:, 0])) == {0, 1, 2} and set(np.unique(draws[:, 1])) == {5, 6}


def test_supports_that_differ_cannot_be_enumerated_together():
    fn = IntervalCategorical(jnp.zeros((2, 3)), jnp.array([0, 1]), 2)
    with pytest.raises(NotImplementedError, match="supports of their own"):
        fn.enumerate_support()
