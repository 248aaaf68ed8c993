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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Table = Float[Array, "samples steps before *plates"]


def log_forward(log_v: Table, reverse: bool) -> Float[Array, "steps samples *plates"]:
    r""":math:`\log \alpha_{tk}`, the mean over the paths that end in sample k of step t, in :math:`O(T K^2)`.

    .. math:: \alpha_{tk} = \frac1K \sum_l v_{tkl} \, \alpha_{t-1,l}

    :param reverse: whether the first step is the last entry, as in a `scan` from the end.
    """
    tables = jnp.moveaxis(log_v, 1, 0)

    def step(log_alpha: Array, table: Array) -> tuple[Array, Array]:
        log_alpha = _log_mean_exp(table + log_alpha, axis=1)
        return log_alpha, log_alpha

    start = jnp.zeros(tables.shape[2:], tables.dtype)
    return jax.lax.scan(step, start, tables, reverse=reverse)[1]


def log_mean_path(log_v: Table, reverse: bool) -> Float[Array, "*plates"]:
    r""":math:`\log \hat Z` in nats."""
    log_alpha = log_forward(log_v, reverse)
    return _log_mean_exp(log_alpha[0 if reverse else -1], axis=0)


def path_shares(log_v: Table, reverse: bool) -> tuple[Float[Array, "*plates"], Table]:
    r""":math:`\log \hat Z`, and the shares :math:`\xi_{tkl}`: its derivative; 0 where all paths have weight zero."""
    log_mean, pull = jax.vjp(lambda log_v: log_mean_path(log_v, reverse), log_v)
    return log_mean, pull(jnp.ones_like(log_mean))[0]


def _log_mean_exp(x: Array, axis: int) -> Array:
    """``logsumexp`` less the logarithm of their number, with the derivative 0 where all are ``-inf``."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    total = jnp.sum(jnp.exp(x - largest), axis)
    is_zero = total == 0
    found = jnp.log(jnp.where(is_zero, 1, total) / x.shape[axis]) + jnp.squeeze(largest, axis)
    return jnp.where(is_zero, -jnp.inf, found)
