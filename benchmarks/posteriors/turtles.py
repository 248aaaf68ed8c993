"""Two ways of turtles: a mixture of two von Mises distributions on the circle, with each turtle's group as a latent.

Data: directions of 76 turtles, as in `examples/turtles.py`. Which group is called first is open, so that the posterior
has two modes; what is asked does not depend on it: the larger group and the smaller one. Truth: exact, by quadrature
over the two directions, concentration and share.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import i0e
from scipy.stats import norm

from benchmarks.posteriors import Truth
from examples.turtles import DEGREES


def data():
    return (jnp.asarray(np.radians((DEGREES + 180) % 360 - 180), jnp.float32),)  # in [-π, π)


def mixture(angles, **infer):
    share = numpyro.sample("share", dist.Uniform(0, 1))  # of group 1
    concentration = numpyro.sample("concentration", dist.LogNormal(0, 1))
    with numpyro.plate("way", 2):
        direction = numpyro.sample("direction", dist.Uniform(-jnp.pi, jnp.pi))
    with numpyro.plate("turtle", len(angles)):
        group = numpyro.sample("group", dist.Bernoulli(share), infer=infer)
        numpyro.sample("angle", dist.VonMises(direction[group], concentration), obs=angles)


def model(angles):
    mixture(angles)


def enumerated(angles):
    mixture(angles, enumerate="parallel")


def asked(draw, angles):
    larger = (draw["share"] > 0.5).astype(int)
    on_circle = lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)])  # noqa: E731
    return {
        "larger_share": jnp.maximum(draw["share"], 1 - draw["share"]),
        "larger_direction": on_circle(draw["direction"][larger]),
        "smaller_direction": on_circle(draw["direction"][1 - larger]),
        "log_concentration": jnp.log(draw["concentration"]),
        "in_smaller": draw["group"] != larger,
    }


def pymc_model(angles):
    import pymc as pm

    angles = np.asarray(angles)
    with pm.Model() as built:
        share = pm.Uniform("share", 0, 1)
        concentration = pm.LogNormal("concentration", 0, 1)
        direction = pm.Uniform("direction", -np.pi, np.pi, shape=2)
        group = pm.Bernoulli("group", share, shape=len(angles))
        pm.VonMises("angle", direction[group], concentration, observed=angles)
    return built


class Quadrature:
    """Sums over a grid of (larger direction, smaller direction, share of the larger), for one concentration.

    The larger group is the one or the other with equal probability. Directions are on an equidistant grid, which is
    accurate for periodic functions; shares from a half to 1 are Gauss's.
    """

    def __init__(self, angles, size):
        self.angles = angles
        self.direction = np.linspace(-np.pi, np.pi, size, endpoint=False)
        nodes, weights = np.polynomial.legendre.leggauss(size // 2)
        self.share = 0.75 + 0.25 * nodes
        # With the priors, and twice: for each name of the larger group.
        self.cell = 2 * 0.25 * weights / size**2

    def terms(self, concentration):
        """For each turtle its density in the larger group and in the smaller one, times their shares."""
        for angle in self.angles:
            density = np.exp(concentration * (np.cos(angle - self.direction) - 1)) / (2 * np.pi * i0e(concentration))
            yield density[:, None, None] * self.share, density[:, None] * (1 - self.share)

    def joint(self, concentration):
        """The density of the data times the prior of the grid points, times their cells."""
        product = np.ones((len(self.direction), len(self.direction), len(self.share))) * self.cell
        for larger, smaller in self.terms(concentration):
            product *= larger + smaller
        return product

    def sums(self, concentration):
        """The evidence given the concentration; and times it, each quantity's mean and its mean square."""
        joint = self.joint(concentration)
        in_smaller = [(joint / (x + y) * y).sum() for x, y in self.terms(concentration)]
        circle = np.stack([np.cos(self.direction), np.sin(self.direction)])
        powers = lambda marginal, x: (x @ marginal, x**2 @ marginal)  # noqa: E731
        evidence = joint.sum()
        return evidence, {
            "larger_share": powers(joint.sum((0, 1)), self.share),
            "larger_direction": powers(joint.sum((1, 2)), circle),
            "smaller_direction": powers(joint.sum((0, 2)), circle),
            "log_concentration": (evidence * np.log(concentration), evidence * np.log(concentration) ** 2),
            "in_smaller": (np.array(in_smaller), np.array(in_smaller)),
        }


def truth(angles, size=96):
    quadrature = Quadrature(np.asarray(angles, float), size)
    log_concentration, step = np.linspace(-1.5, 2.5, size // 2, retstep=True)
    prior = norm.pdf(log_concentration) * step
    found = [quadrature.sums(concentration) for concentration in np.exp(log_concentration)]
    weight = prior * [evidence for evidence, _ in found]
    assert weight[[0, -1]].max() < 1e-9 * weight.sum(), "the grid of concentrations is too short"
    mean, square = (
        {name: np.tensordot(prior, [sums[name][i] for _, sums in found], 1) / weight.sum() for name in found[0][1]}
        for i in (0, 1)
    )
    sds = {name: np.sqrt(square[name] - mean[name] ** 2) for name in mean}
    errors = {name: np.zeros_like(x) for name, x in mean.items()}
    return Truth(mean, sds, errors, float(np.log(weight.sum())), 0.0, "exact: quadrature of four dimensions")
