"""What a small posterior is, and its exact answers: sums over discrete latents, quadrature over the others.

An axis is a pair for one latent: its values of shape (K, *event), and the logarithms of their quadrature weights (K,).
The rules are trapezoidal ones in coordinates in which the density is smooth and vanishes at both ends. There their
error falls exponentially. All is NumPy in double precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
import itertools

import numpy as np
from scipy.special import expit, log_expit, logsumexp


@dataclass(frozen=True)
class Problem:
    """A posterior with exact answers.

    :ivar name: its name.
    :ivar model: as a user of NumPyro writes it.
    :ivar args: the arguments of the model.
    :ivar axes: by latent, its axis.
    :ivar log_joint: from latents, a dict of arrays (M, *event), to log p(z, x) of shape (M,); in SciPy.
    :ivar asked: by quantity, a function from latents, a dict of arrays (M, *event), to an array (M,).
    :ivar guide: from the model to its guide, where it is not `AutoMixed`.
    :ivar tempering: the argument of `fit`.
    """

    name: str
    model: Callable
    args: tuple
    axes: dict
    log_joint: Callable
    asked: dict
    guide: Callable | None = None
    tempering: float = 0.5

    def points(self):
        """All combinations of values, a dict of arrays (M, *event), and the logarithm of their weights (M,)."""
        sizes = [len(log_weight) for _, log_weight in self.axes.values()]
        index = np.indices(sizes).reshape(len(sizes), -1)
        points = {name: values[i] for (name, (values, _)), i in zip(self.axes.items(), index)}
        return points, sum(log_weight[i] for (_, log_weight), i in zip(self.axes.values(), index))

    def exact(self):
        """The log evidence in nats, and by quantity its posterior mean and standard deviation."""
        points, log_weight = self.points()
        log_p = self.log_joint(points) + log_weight
        log_evidence = logsumexp(log_p)
        p = np.exp(log_p - log_evidence)
        found = {}
        for name, function in self.asked.items():
            value = function(points)
            mean = np.sum(p * value)
            found[name] = float(mean), float(np.sqrt(np.sum(p * (value - mean) ** 2)))
        return float(log_evidence), found


def states(*values):
    """A discrete latent with these values."""
    return np.array(values), np.zeros(len(values))


def line(low, high, step):
    """A latent on the real line, whose density vanishes at both ends."""
    values = np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)
    return values, np.full(len(values), np.log(values[1] - values[0]))


def heavy_line(scale=1.0, points=20001):
    """A latent on the real line with heavy tails: up to 3e8 times the scale."""
    u, log_step = line(-20, 20, 40 / (points - 1))
    return scale * np.sinh(u), log_step + np.log(scale * np.cosh(u))


def positive(low, high, points):
    """A positive latent, evenly in its logarithm."""
    u, log_step = line(np.log(low), np.log(high), np.log(high / low) / (points - 1))
    return np.exp(u), log_step + u


def unit_interval(low, high, points):
    """A latent in (0, 1), evenly in its logit from `low` to `high`."""
    u, log_step = line(low, high, (high - low) / (points - 1))
    return expit(u), log_step + log_expit(u) + log_expit(-u)


def circle(points):
    """An angle."""
    return np.arange(points) * 2 * np.pi / points - np.pi, np.full(points, np.log(2 * np.pi / points))


def simplex_of_three(widest, step):
    """Three probabilities, evenly in two logits; the density is that of the first two probabilities."""
    u, log_step = vector(line(-widest, widest, step), 2)
    logits = np.concatenate([u, np.zeros((len(u), 1))], 1)
    log_p = logits - logsumexp(logits, 1, keepdims=True)
    return np.exp(log_p), log_step + log_p.sum(1)


def vector(axis, size):
    """A vector of latents, each with this axis."""
    values, log_weight = axis
    index = np.array(list(itertools.product(range(len(values)), repeat=size)))
    return values[index], log_weight[index].sum(1)
