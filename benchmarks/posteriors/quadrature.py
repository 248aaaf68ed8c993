"""Truth by quadrature over a few parameters, given which latents have exact moments."""

import numpy as np
from scipy.special import logsumexp

from benchmarks.posteriors import Truth


def of_grid(axes, log_joint, moments, source):
    """Truth by the trapezoidal rule, whose error falls exponentially for a smooth density that vanishes at the edges.

    :param axes: evenly spaced values of each parameter.
    :param log_joint: log joint of parameters and data, of shape (*grid).
    :param moments: by quantity, its mean and its variance given the parameters, of shapes (*grid, *shape).
    :raises ValueError: if more than a millionth of the posterior is at the edges of the grid.
    """
    log_total = logsumexp(log_joint)
    weights = np.exp(log_joint - log_total)
    for i, _ in enumerate(axes):
        edges = np.take(weights, [0, -1], axis=i).sum()
        if edges > 1e-6:
            raise ValueError(f"the grid is too narrow: axis {i} has {edges:.1e} of the posterior at its ends")
    means, sds = {}, {}
    for name, (mean, variance) in moments.items():
        average = lambda x: np.tensordot(weights, x, len(axes))  # noqa: E731
        means[name] = average(mean)
        sds[name] = np.sqrt(average(variance + (mean - means[name]) ** 2))
    errors = {name: np.zeros_like(x) for name, x in means.items()}
    log_cell = sum(np.log(axis[1] - axis[0]) for axis in axes)
    return Truth(means, sds, errors, float(log_total + log_cell), 0.0, source)


def parameter_moments(axes):
    """Mean and variance of each parameter itself, for `of_grid`: pairs in the order of the axes."""
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    shape = tuple(map(len, axes))
    return [(np.broadcast_to(values, shape), np.zeros(shape)) for values in grid]
