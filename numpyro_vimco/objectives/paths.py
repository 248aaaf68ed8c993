# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Weights of chains: all :math:`K^T` paths through K samples at each of T steps count.

Pure functions of a table of log-weights :math:`\log v_{tkl}`, in nats, of shape ``(K, T, L, *plates)`` with L = K: for
sample k of step t and sample l of the step before it. At the first step all l have the same entry. Each plate element
is a chain of its own. With the mean over all paths

.. math:: \hat Z = \frac{1}{K^T} \sum_{k_1, \ldots, k_T} \prod_t v_{t k_t k_{t-1}},

which is unbiased for p(x) [1], the *share* :math:`\xi_{tkl}` is that of the paths through both samples, and
:math:`V_{tk} = \sum_l \xi_{tkl}` that of the paths through sample k of step t.

1. Aitchison 2019, *Tensor Monte Carlo*, arXiv 1806.08593
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Table = Float[Array, "samples steps before *plates"]
OfSteps = Int[Array, "steps *plates"]


def log_mean_path(log_v: Table, reverse: bool) -> Float[Array, "*plates"]:
    r""":math:`\log \hat Z` in nats, by the mean over the paths that end in sample k of step t, in :math:`O(T K^2)`,

    .. math:: \alpha_{tk} = \frac1K \sum_l v_{tkl} \, \alpha_{t-1,l}.

    :param reverse: whether the first step is the last entry, as in a `scan` from the end.
    """

    def step(log_alpha: Array, table: Array) -> tuple[Array, None]:
        return _log_mean_exp(table + log_alpha, axis=1), None

    tables = jnp.moveaxis(log_v, 1, 0)
    log_alpha, _ = jax.lax.scan(step, jnp.zeros(tables.shape[2:], tables.dtype), tables, reverse=reverse)
    return _log_mean_exp(log_alpha, axis=0)


def path_shares(log_v: Table, reverse: bool) -> tuple[Float[Array, "*plates"], Table]:
    r""":math:`\log \hat Z`, and the shares :math:`\xi_{tkl}`: its derivative; 0 where all paths have weight zero."""
    log_mean, pull = jax.vjp(lambda log_v: log_mean_path(log_v, reverse), log_v)
    return log_mean, pull(jnp.ones_like(log_mean))[0]


class Path(NamedTuple):
    """A path that is drawn in proportion to the weights of paths.

    :ivar log_mean: log of the mean weight of all paths, in nats.
    :ivar samples: the sample of each step.
    :ivar log_v: the sum of the table's entries along it.
    """

    log_mean: Float[Array, "*plates"]
    samples: OfSteps
    log_v: Float[Array, "*plates"]


def draw_path(rng_key: Array, log_v: Table, reverse: bool) -> Path:
    r"""Backward sampling: sample l of step t - 1 given k in proportion to :math:`v_{tkl} \, \alpha_{t-1,l}`."""
    tables = jnp.moveaxis(log_v, 1, 0)
    uniform = jax.random.uniform(rng_key, (len(tables) + 1, *tables.shape[3:]), tables.dtype)

    def step(log_alpha: Array, table: Array) -> tuple[Array, Array]:
        return _log_mean_exp(table + log_alpha, axis=1), log_alpha

    log_alpha, before = jax.lax.scan(step, jnp.zeros(tables.shape[2:], tables.dtype), tables, reverse=reverse)
    last = _drawn(log_alpha, uniform[0])

    def back(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        chosen, log_path = carry
        table, log_alpha, uniform = inputs
        row = _selected(table, chosen)
        earlier = _drawn(row + log_alpha, uniform)
        return (earlier, log_path + _selected(row, earlier)), chosen

    start = last, jnp.zeros(tables.shape[3:], tables.dtype)
    (_, log_path), samples = jax.lax.scan(back, start, (tables, before, uniform[1:]), reverse=not reverse)
    return Path(_log_mean_exp(log_alpha, axis=0), samples, log_path)


def _drawn(log_weight: Array, uniform: Array) -> Array:
    """An index along the first axis in proportion to weights."""
    largest = jnp.max(log_weight, 0)
    total = jnp.cumsum(jnp.exp(log_weight - jnp.where(jnp.isneginf(largest), 0, largest)), 0)
    return jnp.minimum(jnp.sum(total <= uniform * total[-1], 0), len(log_weight) - 1)


def _selected(x: Array, index: Array) -> Array:
    """Entries at an index along the first axis, by a sum: many times as fast as a gather for each draw.

    :param index: of the shape of ``x`` without the first axis, or without more of the first ones.
    """
    number = jnp.arange(len(x)).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.sum(jnp.where(index == number, x, 0), 0)


def _log_mean_exp(x: Array, axis: int) -> Array:
    """``logsumexp`` less the logarithm of their number, with the derivative 0 where all are ``-inf``."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    total = jnp.sum(jnp.exp(x - largest), axis)
    is_zero = total == 0
    found = jnp.log(jnp.where(is_zero, 1, total) / x.shape[axis]) + jnp.squeeze(largest, axis)
    return jnp.where(is_zero, -jnp.inf, found)
