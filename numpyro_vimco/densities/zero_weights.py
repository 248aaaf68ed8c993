# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Log-densities that are :math:`-\infty`, without the infinite derivatives that they may have.

A Poisson observation of 3 at rate r z has, at z = 0, the log-density :math:`-\infty` and the derivative
:math:`\infty` with respect to r. Its particle has weight zero, and no part in the gradient; but a backward pass
multiplies the two, and :math:`0 \cdot \infty` is NaN for all particles. So where a site's log-density is
:math:`-\infty`, no derivative is taken of it. An observation of 0 at z = 0 is possible, and the derivative of
:math:`0 \log(r z)` NaN: there the rate is tiny. This cannot reach what a model computes before its distributions
(``jnp.log(z)``).
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpyro.distributions as dist

from numpyro_vimco.compilation import map_arrays
from numpyro_vimco.private.of_numpyro import without_validation
from numpyro_vimco.sites import WRAPPERS, is_real, support_of, unwrapped

# Where no difference is made between a tiny density and none; NumPyro has the smallest number for log 0 at times.
FLOOR = -1e30

# These have a finite density of derivative NaN: at a probability of 0, and at a count of 0 whose rate is 0.
_ZEROS = {dist.CategoricalProbs: "probs", dist.Poisson: "rate"}


def safe_log_prob(log_prob: Callable[[dict], Array], site: dict, kept: frozenset[int]) -> Array:
    """``log_prob(site)``, without a derivative for particles that have the weight zero because of this site.

    :param kept: the plate dimensions whose elements have weights of their own; elements along others share a weight.
    """
    value, fn = log_prob(site), site["fn"]
    if site["intermediates"] or not _may_be_impossible(fn):
        return value
    shared = [i for i in range(value.ndim) if i - value.ndim not in kept]
    impossible = jnp.any(value < FLOOR, axis=shared, keepdims=True)
    # The same density once more, which the compiler merges with the first: the derivative is that of this one.
    stopped = without_validation(_stopped(_without_zeros(fn), impossible))  # the first one looked at the value
    again = {**site, "fn": stopped, "value": _stop(impossible, site["value"], fn.event_dim)}
    return jnp.where(impossible, stop_gradient(value), log_prob(again))


def safe_table(log_prob: Callable[[dict], Array], site: dict) -> Array:
    """``log_prob(site)`` at all values of summed sites, without a derivative where it is -inf.

    Another value of a summed site may be possible, so that each entry is alone.
    """
    fn = unwrapped(site["fn"])
    if isinstance(fn, dist.BernoulliProbs):  # its probabilities are clamped
        return log_prob(site)
    if isinstance(fn, tuple(_ZEROS)):  # without zeros all derivatives are finite
        value = stop_gradient(log_prob(site))
        return jnp.where(value < FLOOR, value, log_prob({**site, "fn": _without_zeros(site["fn"])}))
    return safe_log_prob(log_prob, site, frozenset(range(-32, 0)))


def _without_zeros(fn: dist.Distribution) -> dist.Distribution:
    """A distribution with a tiny parameter where it was 0, if the derivative there is NaN."""
    name = next((name for kind, name in _ZEROS.items() if isinstance(unwrapped(fn), kind)), None)
    return fn if name is None else _map_base(partial(_positive, name=name), fn)


def _positive(fn: dist.Distribution, name: str) -> dist.Distribution:
    parameter = getattr(fn, name)
    # Added, so that it keeps its derivative; a count over it is finite in single precision.
    return _with(fn, **{name: parameter + jnp.where(parameter == 0, 1e-30, 0.0)})


def _may_be_impossible(fn: dist.Distribution) -> bool:
    """Whether a log-density may be -inf with an infinite derivative; in terms of logits all derivatives are finite."""
    fn = unwrapped(fn)
    return not (isinstance(fn, dist.Unit | dist.Delta) or "logits" in fn.arg_constraints or is_real(support_of(fn)))


def _stopped(fn: dist.Distribution, impossible: Bool[Array, "..."]) -> dist.Distribution:
    """A distribution whose parameters take no derivative at impossible elements of its batch."""
    if impossible.size == 1:
        # Not by `jax.tree.map`: the leaves of NumPyro's distributions have another order in each process, and a program
        # that another process left in JAX's cache would not be found.
        return map_arrays(partial(_stop, impossible.reshape(()), event_dim=0), fn)
    fn = copy(fn)
    if isinstance(fn, WRAPPERS):
        dims = fn.reinterpreted_batch_ndims if isinstance(fn, dist.Independent) else 0
        fn.base_dist = _stopped(fn.base_dist, impossible.reshape(impossible.shape + (1,) * dims))
        return fn
    for name, constraint in fn.arg_constraints.items():
        if name in vars(fn):
            vars(fn)[name] = _stop(impossible, vars(fn)[name], constraint.event_dim)
    return fn


def _map_base(change: Callable[[dist.Distribution], dist.Distribution], fn: dist.Distribution) -> dist.Distribution:
    """A distribution with the one inside of its wrappers changed."""
    if not isinstance(fn, WRAPPERS):
        return change(fn)
    return _with(fn, base_dist=_map_base(change, fn.base_dist))


def _with(fn: dist.Distribution, **attributes: Any) -> dist.Distribution:
    fn = copy(fn)
    vars(fn).update(attributes)
    return fn


def _stop(impossible: Bool[Array, "..."], x: Any, event_dim: int) -> Any:
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    impossible = impossible.reshape(impossible.shape + (1,) * (event_dim if impossible.ndim else 0))
    shape = jnp.broadcast_shapes(impossible.shape, x.shape)
    x = jnp.broadcast_to(x, shape)
    return jnp.where(jnp.broadcast_to(impossible, shape), stop_gradient(x), x)
