"""Bounds, shares and signals against mpmath, and on degenerate weights."""

from functools import partial
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from numpyro_vimco.control_variates import (
    normalized_weights,
    reinforce_signal,
    vimco_arithmetic_signal,
    vimco_geometric_signal,
    vimco_star_signal,
    vr_iwae_bound,
)

ALPHAS = (0.0, 0.3, 1.0)
INF = np.inf
# Compiled, as users run them: the compiler's reassociations are part of what is tested.
bound, shares = (jax.jit(fn, static_argnames="alpha") for fn in (vr_iwae_bound, normalized_weights))
SIGNALS = {
    name: jax.jit(fn, static_argnames="alpha")
    for name, fn in {
        "star": vimco_star_signal,
        "geometric": vimco_geometric_signal,
        "arithmetic": vimco_arithmetic_signal,
        "reinforce": reinforce_signal,
    }.items()
}


def reference(log_weights, alpha, name):
    """Bound, shares and signals by the definitions of the design, with 100 digits; α = 1 as a limit."""
    with mpmath.workdps(100):
        power = 1 - mpmath.mpf(alpha) if alpha < 1 else mpmath.mpf(10) ** -40
        weights = [mpmath.exp(power * mpmath.mpf(float(x))) for x in log_weights]
        n, total = len(weights), mpmath.fsum(weights)
        estimate = mpmath.log(total / n) / power
        signals = []
        for j in range(n):
            others = [w for i, w in enumerate(weights) if i != j]
            rest = total - weights[j] if n > 20 else mpmath.fsum(others)
            if name == "star":
                baseline = mpmath.log((1 + (1 - power) / (n - 1)) * rest / n) / power
            elif name == "geometric":
                mean = mpmath.exp(mpmath.fsum(mpmath.log(w) for w in others) / (n - 1))
                baseline = mpmath.log((rest + mean) / n) / power
            elif name == "arithmetic":
                baseline = mpmath.log((rest + rest / (n - 1)) / n) / power
            else:
                baseline = 0
            signals.append(float(estimate - baseline - weights[j] / total))
        return float(estimate), np.array([float(w / total) for w in weights]), np.array(signals)


@pytest.mark.parametrize("gap", [0.0, 1.0, 50.0, 1e4])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_particles", [2, 3, 16])
def test_float32_agrees_with_mpmath_when_one_particle_dominates(num_particles, alpha, gap):
    rng = np.random.default_rng(0)
    log_weights = (rng.normal(size=num_particles) - 489).astype(np.float32)
    log_weights[0] = log_weights[1:].max() + gap
    for name, signal in SIGNALS.items():
        estimate, weights, signals = reference(log_weights, alpha, name)
        np.testing.assert_allclose(bound(log_weights, alpha=alpha), estimate, rtol=1e-6)
        np.testing.assert_allclose(shares(log_weights, alpha=alpha), weights, rtol=1e-4, atol=1e-30)
        actual = np.asarray(signal(log_weights, alpha=alpha))
        assert actual.dtype == np.float32
        # A signal matters if it is not lost beside the largest one.
        np.testing.assert_allclose(actual, signals, rtol=1e-3, atol=1e-5 * np.abs(signals).max() + 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_float32_keeps_the_small_signals_of_many_particles(spread, alpha):
    log_weights = (spread * np.random.default_rng(1).normal(size=1000)).astype(np.float32)
    _, _, signals = reference(log_weights, alpha, "star")
    rtol = 1e-3 if alpha == 0 else 0
    actual = SIGNALS["star"](log_weights, alpha=alpha)
    np.testing.assert_allclose(actual, signals, rtol=rtol, atol=1e-3 * np.abs(signals).max() if alpha else 0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float64_agrees_with_mpmath(alpha, x64):
    draws = np.append(np.random.default_rng(2).normal(size=30), [4.0, 60.0])
    for log_weights in (draws[:-1], draws, draws[:2]):
        for name, signal in SIGNALS.items():
            _, _, signals = reference(log_weights, alpha, name)
            actual = signal(jnp.asarray(log_weights), alpha=alpha)
            np.testing.assert_allclose(actual, signals, rtol=1e-10, atol=1e-13 * np.abs(signals).max())


@pytest.mark.parametrize("name", ["star", "arithmetic", "geometric"])
def test_alpha_near_one_approaches_its_limit(name, x64):
    log_weights = jnp.array([0.3, -1.0, 2.0, 0.1])
    limit = SIGNALS[name](log_weights, alpha=1.0)
    np.testing.assert_allclose(SIGNALS[name](log_weights, alpha=1 - 1e-7), limit, atol=1e-6)
    np.testing.assert_allclose(bound(log_weights, alpha=1 - 1e-7), bound(log_weights, alpha=1.0), atol=1e-6)


def test_star_at_alpha_zero_is_the_power_series_of_the_paper(x64):
    w = np.array([0.004, 0.02, 0.3, 0.676])
    series = sum(w**k / k for k in range(2, 400))
    np.testing.assert_allclose(SIGNALS["star"](jnp.log(w), alpha=0.0), series, rtol=1e-12)


def test_star_and_vimco_differ_by_the_order_one_over_n_term(x64):
    log_weights = jnp.array(np.random.default_rng(3).normal(size=500))
    difference = SIGNALS["star"](log_weights, alpha=0.0) - SIGNALS["arithmetic"](log_weights, alpha=0.0)
    np.testing.assert_allclose(difference, np.log(500 / 499), rtol=1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", SIGNALS)
def test_zero_weight_is_the_limit_of_a_small_one_and_leaves_the_others_alone(name, alpha):
    finite = np.array([-1.0, 0.5, 0.2], np.float32)
    with_zero = np.append(finite, np.float32(-INF))
    weights = shares(with_zero, alpha=alpha)
    assert weights[-1] == 0
    signals = SIGNALS[name](with_zero, alpha=alpha)
    assert np.isfinite(signals).all()
    if alpha < 1:
        with_tiny = np.append(finite, np.float32(-1e5))
        np.testing.assert_allclose(signals, SIGNALS[name](with_tiny, alpha=alpha), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(weights, shares(with_tiny, alpha=alpha), rtol=1e-5)
    else:
        assert bound(with_zero, alpha=alpha) == -INF
        assert name == "reinforce" or np.abs(signals[:3]).max() > 0.1
    if name == "star" and alpha in (0.0, 1.0):
        assert signals[-1] == 0


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", SIGNALS)
def test_signal_is_finite_where_all_others_or_all_have_weight_zero(name, alpha):
    alone = np.array([-3.0, -INF, -INF], np.float32)
    assert np.isfinite(SIGNALS[name](alone, alpha=alpha)).all()
    nothing = np.full(3, -INF, np.float32)
    assert np.isfinite(SIGNALS[name](nothing, alpha=alpha)).all()
    assert bound(nothing, alpha=alpha) == -INF
    assert (shares(nothing, alpha=alpha) == 0).all()


def test_signal_of_a_lone_particle_is_capped_by_the_smallest_normal_number():
    alone = np.array([-3.0, -INF, -INF], np.float32)
    expected = -np.log(np.finfo(np.float32).tiny) - 1
    np.testing.assert_allclose(SIGNALS["star"](alone, alpha=0.0), [expected, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_nan_log_weight_gives_a_nan_bound(alpha):
    assert np.isnan(bound(np.array([0.0, np.nan], np.float32), alpha=alpha))


def test_signals_are_elementwise_over_plates():
    log_weights = np.random.default_rng(4).normal(size=(5, 2, 3)).astype(np.float32)
    for alpha in ALPHAS:
        for signal in SIGNALS.values():
            together = signal(log_weights, alpha=alpha)
            for i, j in np.ndindex(2, 3):
                np.testing.assert_allclose(together[:, i, j], signal(log_weights[:, i, j], alpha=alpha), rtol=2e-5)


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_cost_order_n(name):
    """No intermediate array grows faster than N."""

    def largest_array(num_particles):
        jaxpr = str(jax.make_jaxpr(partial(SIGNALS[name], alpha=0.3))(jnp.zeros(num_particles)))
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", jaxpr))

    assert 100 <= largest_array(100) and largest_array(1000) <= 10 * largest_array(100)
