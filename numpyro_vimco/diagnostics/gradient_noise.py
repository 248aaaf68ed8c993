# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Was the gradient good enough? Its signal-to-noise ratio."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array
import numpy as np
from tqdm.auto import tqdm

from numpyro_vimco.arguments import check_integer
from numpyro_vimco.compilation import Compiled
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.chunks import patient_bar
from numpyro_vimco.randomness import split


class GradientStatistics(NamedTuple):
    """Statistics of the gradient of one parameter over repeated draws; arrays of the parameter's shape.

    :ivar mean: mean of the gradient of the loss.
    :ivar std: standard deviation of the gradient.
    :ivar snr: absolute value of the mean over the standard deviation, elementwise. It is the same in unconstrained
        space if the constraint is elementwise.
    """

    mean: np.ndarray
    std: np.ndarray
    snr: np.ndarray


def gradient_statistics(
    approx: Approximation, rng_key: Array, num_draws: int, progress_bar: bool
) -> dict[str, GradientStatistics]:
    """Statistics of the gradient of each parameter at those of the best start, over so many draws."""
    num_draws = check_integer("num_draws", num_draws, 2, "a standard deviation needs as many")

    def loss(params: Any, rng_key: Array) -> Array:
        return approx.svi.loss.loss(rng_key, params, approx.svi.model, approx.svi.guide, *approx.args, **approx.kwargs)

    def gradients_of(params: Any, keys: Array) -> Any:
        return jax.lax.map(partial(jax.grad(loss), params), keys)

    gradients = approx.kept("gradients", lambda: Compiled(gradients_of, older_loops=False))
    with patient_bar(num_draws, "gradients" if progress_bar else None) as bar:
        mean, std = _moments(gradients, split(rng_key, num_draws), approx.params, bar)
    return {
        name: GradientStatistics(mean[name], std[name], jax.tree.map(_ratio, mean[name], std[name]))
        for name in approx.params
    }


def _moments(gradients: Callable, keys: Array, params, bar: tqdm) -> tuple[Any, Any]:
    """Mean and standard deviation over keys, in one pass and double precision on the host.

    :param bar: told of each key.
    """
    mean = square = jax.tree.map(lambda p: np.zeros(np.shape(p)), params)
    size = min(100, len(keys))
    for begin in range(0, len(keys), size):
        draws = jax.tree.map(lambda g: np.asarray(g, float), gradients(params, keys[begin : begin + size]))
        count = len(keys[begin : begin + size])
        # Chan's update: no difference of large squares.
        delta = jax.tree.map(lambda g, m: g.mean(0) - m, draws, mean)
        square = jax.tree.map(
            lambda s, g, d, n=begin, k=count: s + k * g.var(0) + d**2 * n * k / (n + k), square, draws, delta
        )
        mean = jax.tree.map(lambda m, d, n=begin, k=count: m + d * k / (n + k), mean, delta)
        bar.update(count)
    return mean, jax.tree.map(lambda s: np.sqrt(s / (len(keys) - 1)), square)


def _ratio(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """|mean| / std; 0 where a parameter has no gradient, infinite where it has no noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, np.abs(mean) / std)
