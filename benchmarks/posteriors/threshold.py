"""Above which number of lynx does their cycle turn, and after how many years? A threshold autoregression.

Two regimes, each an autoregression of order two with noise of its own. Which one holds depends on whether the number
one, two or three years ago was above a threshold, which is one of the numbers that were trapped.

Data: lynx trapped in the Mackenzie River district of Canada in each year from 1821 to 1934, of Elton & Nicholson, "The
ten-year cycle in numbers of the lynx in Canada", Journal of Animal Ecology 11 (1942) (R's `datasets::lynx`). The model
is that of Tong, "Threshold models in non-linear time series analysis", Springer (1983): logarithms to base 10.

Truth: exact, by the sum over delays and thresholds, quadrature over each regime's noise, and conjugate coefficients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import logsumexp
from scipy.stats import halfnorm

# fmt: off
TRAPPED = np.array([
    269, 321, 585, 871, 1475, 2821, 3928, 5943, 4950, 2577, 523, 98, 184, 279, 409, 2285, 2685, 3409, 1824, 409, 151,
    45, 68, 213, 546, 1033, 2129, 2536, 957, 361, 377, 225, 360, 731, 1638, 2725, 2871, 2119, 684, 299, 236, 245, 552,
    1623, 3311, 6721, 4254, 687, 255, 473, 358, 784, 1594, 1676, 2251, 1426, 756, 299, 201, 229, 469, 736, 2042, 2811,
    4431, 2511, 389, 73, 39, 49, 59, 188, 377, 1292, 4031, 3495, 587, 105, 153, 387, 758, 1307, 3465, 6991, 6313, 3794,
    1836, 345, 382, 808, 1388, 2713, 3800, 3091, 2985, 3790, 674, 81, 80, 108, 229, 399, 1132, 2432, 3574, 2935, 1537,
    529, 485, 662, 1000, 1590, 2657, 3396,
])
# fmt: on
DELAYS, ORDER = 3, 2


def data():
    """Logarithms, shifted and scaled to about 1, and the candidates: without the largest and smallest tenths."""
    logs = (np.log10(TRAPPED) - 2.9) / 0.56
    tenth = len(logs) // 10
    return jnp.asarray(logs, jnp.float32), jnp.asarray(np.unique(np.sort(logs)[tenth:-tenth]), jnp.float32)


def regressors(logs):
    """For each year from the fourth on: the logarithms of 1, 2 and 3 years ago; a one and the first two of these."""
    lagged = jnp.stack([logs[DELAYS - lag : len(logs) - lag] for lag in range(1, DELAYS + 1)])
    return lagged, jnp.stack([jnp.ones_like(lagged[0]), *lagged[:ORDER]], -1)


def model(logs, candidates):
    lagged, before = regressors(logs)
    delay = numpyro.sample("delay", dist.Categorical(jnp.full(DELAYS, 1 / DELAYS)))  # in years, less one
    threshold = numpyro.sample("threshold", dist.Categorical(jnp.full(len(candidates), 1 / len(candidates))))
    with numpyro.plate("regime", 2):
        coefficients = numpyro.sample("coefficients", dist.Normal(0, 1).expand([1 + ORDER]).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1))
    above = (lagged[delay, jnp.arange(len(before))] > candidates[threshold]).astype(int)
    with numpyro.plate("year", len(before)):
        expected = (before * coefficients[above]).sum(-1)
        numpyro.sample("trapped", dist.Normal(expected, noise[above]), obs=logs[DELAYS:])


def enumerated(logs, candidates):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(logs, candidates)


def asked(draw, logs, candidates):
    """The threshold, which delay, the coefficients of both regimes, and the logarithm of their noise."""
    return {
        "threshold": candidates[draw["threshold"]],
        "delay": jax.nn.one_hot(draw["delay"], DELAYS),
        "coefficients": draw["coefficients"],
        "log_noise": jnp.log(draw["noise"]),
    }


def pymc_model(logs, candidates):
    import pymc as pm

    lagged, before = map(np.asarray, regressors(logs))
    logs, candidates = np.asarray(logs), np.asarray(candidates)
    with pm.Model() as built:
        delay = pm.Categorical("delay", np.full(DELAYS, 1 / DELAYS))
        threshold = pm.Categorical("threshold", np.full(len(candidates), 1 / len(candidates)))
        coefficients = pm.Normal("coefficients", 0, 1, shape=(2, 1 + ORDER))
        noise = pm.HalfNormal("noise", 1, shape=2)
        above = pm.math.gt(pm.math.constant(lagged)[delay], pm.math.constant(candidates)[threshold]).astype(int)
        pm.Normal("trapped", (before * coefficients[above]).sum(-1), noise[above], observed=logs[DELAYS:])
    return built


def given_noise(noise, before, now):
    """Log-likelihoods of a regime given its noise, and the means and covariances of its coefficients.

    :param noise: of shape (points,).
    :param before: of shape (years, coefficients).
    :param now: of shape (years,).
    """
    precision = np.eye(before.shape[1]) + before.T @ before / noise[:, None, None] ** 2
    covariance = np.linalg.inv(precision)
    mean = covariance @ (before.T @ now) / noise[:, None] ** 2
    log_likelihood = -len(now) * np.log(noise) - len(now) / 2 * np.log(2 * np.pi) - now @ now / (2 * noise**2)
    log_likelihood += (mean * (before.T @ now)).sum(1) / (2 * noise**2) - np.linalg.slogdet(precision)[1] / 2
    return log_likelihood, mean, covariance


def regime(before, now, log_noise):
    """Log evidence of a regime's years, and mean and mean square of its coefficients and of the log of its noise."""
    log_likelihood, mean, covariance = given_noise(np.exp(log_noise), before, now)
    log_joint = log_likelihood + halfnorm.logpdf(np.exp(log_noise)) + log_noise
    log_evidence = logsumexp(log_joint)
    weights = np.exp(log_joint - log_evidence)
    assert weights[[0, -1]].max() < 1e-9, "the grid of the noise is too short"
    square = mean**2 + np.diagonal(covariance, axis1=1, axis2=2)
    moments = weights @ np.column_stack([mean, log_noise]), weights @ np.column_stack([square, log_noise**2])
    return log_evidence + np.log(log_noise[1] - log_noise[0]), np.stack(moments)


def truth(logs, candidates, points=400):
    from benchmarks.posteriors import Truth

    now, log_noise = np.asarray(logs, float)[DELAYS:], np.linspace(-4, 2, points)
    lagged, before = (np.asarray(x, float) for x in regressors(logs))
    log_evidences, moments = [], []
    for compared in lagged:
        for candidate in np.asarray(candidates, float):
            above = compared > candidate
            pair = [regime(before[of_regime], now[of_regime], log_noise) for of_regime in (~above, above)]
            log_evidences.append(sum(log_evidence for log_evidence, _ in pair))
            moments.append(np.stack([moment for _, moment in pair], 1))  # (2, regimes, coefficients and noise)
    log_total = logsumexp(log_evidences)
    weight = np.exp(log_evidences - log_total)
    probability = weight.reshape(DELAYS, -1)
    mean, square = np.tensordot(weight, np.array(moments), 1)
    sd = np.sqrt(square - mean**2)
    at, of_delay = probability.sum(0), probability.sum(1)
    threshold = at @ np.asarray(candidates, float)
    spread = np.sqrt(at @ (np.asarray(candidates, float) - threshold) ** 2)
    means = {"threshold": threshold, "delay": of_delay, "coefficients": mean[:, :-1], "log_noise": mean[:, -1]}
    sds = {
        "threshold": spread, "delay": np.sqrt(of_delay * (1 - of_delay)),
        "coefficients": sd[:, :-1], "log_noise": sd[:, -1],
    }  # fmt: skip
    errors = {name: np.zeros_like(x) for name, x in means.items()}
    source = "exact: sum over delays and thresholds, quadrature over noise, conjugate coefficients"
    return Truth(means, sds, errors, float(log_total - np.log(len(weight))), 0.0, source)
