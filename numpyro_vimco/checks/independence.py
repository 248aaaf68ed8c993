# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Are the elements of a plate independent, as the plate says?

A plate only declares it: a model may compute anything inside, a cumulative sum for example. So the latents of some
elements are exchanged between two draws. The density of an independent element is then that of the draw which its own
latents are from. One exchange for each bit of the elements' index takes any two elements apart.

Dependence may show at some values only, such as a product of two indicators. So there are several pairs of draws, from
sources that differ: the prior, all of the support, and the guide if there is one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np
from numpyro.distributions import constraints
from numpyro.infer import init_to_uniform

from numpyro_vimco.compilation import ONCE, Compiled
from numpyro_vimco.private.of_jax import eval_jaxpr
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import base_support, is_count, support_of

# How far values may differ by rounding, relative to the sum of their terms' sizes.
ROUNDING = 1e-4
# Pairs of draws of each source, and elements of all these pairs. A large plate has fewer pairs; but there it is rarely
# two elements alone that depend on each other.
PAIRS, ELEMENTS = 12, 100_000
# Where a count has no upper bound, so many values from its prior draw on are taken.
COUNTS = 4

Values = dict[str, Array]


def splits(size: int) -> Bool[np.ndarray, "bits size"]:
    """For each bit of an index, the elements that have it: any two elements are apart in at least one row."""
    return (np.arange(size) >> np.arange((size - 1).bit_length())[:, None]) % 2 == 1


class Sum(NamedTuple):
    """Log-densities in nats, summed over the elements that share a weight.

    :ivar value: the sum.
    :ivar size: the sum of absolute values: rounding is relative to it.
    """

    value: Array
    size: Array

    @classmethod
    def of(cls, log_prob: Array, add_up: Callable[[Array], Array] = lambda x: x) -> "Sum":
        """A sum of log-densities."""
        return cls(add_up(log_prob), add_up(jnp.where(jnp.isfinite(log_prob), jnp.abs(log_prob), 0)))

    def plus(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value, self.size + other.size)

    def differs_from(self, other: Array) -> Bool[Array, ""]:
        """Whether any value differs by more than rounding. NaN does not count: other checks find it."""
        same = (self.value == other) | (jnp.abs(self.value - other) <= ROUNDING * (1 + self.size))
        return ~jnp.all(same | jnp.isnan(self.value) | jnp.isnan(other))


def are_dependent(
    densities: Callable[[Values], dict[str, Sum]],
    first: Values,
    second: Values,
    axes: Mapping[str, int],
    dim_of: Callable[[str], int],
    size: int,
) -> dict[str, Bool[Array, ""]]:
    """For each density, whether an element of it depends on the latents of other elements of a plate.

    :param densities: from latents to log-densities by site.
    :param first: a draw of the latents.
    :param second: another one.
    :param axes: of each latent in the plate, the axis of the plate, negative.
    :param dim_of: from a site to the axis of the plate in its log-density, negative.
    :param size: of the plate.
    """
    masks = np.concatenate([np.zeros((1, size), bool), np.ones((1, size), bool), splits(size)])

    def along(axis: int, mask: Any, ndim: int) -> Any:
        return mask.reshape(*mask.shape[:-1], *(1,) * (ndim + axis), size, *(1,) * (-1 - axis))

    def at(mask: Array) -> dict[str, Sum]:
        choose = {name: along(axis, mask, first[name].ndim) for name, axis in axes.items()}
        return densities({**first, **{name: jnp.where(choose[name], second[name], first[name]) for name in axes}})

    found = {}
    for name, sums in jax.lax.map(at, jnp.asarray(masks)).items():
        expected = jnp.where(along(dim_of(name), masks[2:], sums.value.ndim - 1), sums.value[1:2], sums.value[:1])
        found[name] = Sum(sums.value[2:], sums.size[2:]).differs_from(expected)
    return found


def any_draw(check: Callable[[Any, Array, Array], Any], num_sources: int, size: int) -> Callable[[Any], Any]:
    """Whether any of many draws shows something, for each boolean of ``check``.

    :param check: from parameters, a key and the number of a source of draws to a pytree of booleans.
    :param size: of the largest plate.
    :return: a function of parameters, compiled once. It returns None where ``check`` holds values that JAX traces.
    """
    number = num_sources * max(min(PAIRS, ELEMENTS // max(size, 1)), 1)

    def run(params: Any, rng_key: Array) -> Any:
        draws = split(rng_key, number), jnp.arange(number) % num_sources
        return jax.tree.map(lambda x: x.any(0), jax.lax.map(lambda x: check(params, *x), draws))

    computed: list[tuple[Callable, Any]] = []

    def found(params: Any) -> Any:
        args = params, random.key(0)
        if not computed:
            closed, shapes = jax.make_jaxpr(run, return_shape=True)(*args)
            if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
                return None
            computed.append((Compiled(partial(eval_jaxpr, closed.jaxpr, closed.consts), ONCE), shapes))
        evaluate, shapes = computed[0]
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(*jax.tree.leaves(args)))

    return found


def anywhere(site: dict, from_prior: Array, otherwise: Array) -> Array:
    """A value of a latent site that the posterior may have.

    :param site: with a key.
    :param from_prior: whether it is drawn from the prior; else from all of the support.
    :param otherwise: a value for what can be drawn in neither way.
    """
    prior_key, key = split(site["kwargs"]["rng_key"])
    try:
        prior = jnp.asarray(site["fn"](*site["args"], **{**site["kwargs"], "rng_key": prior_key}))
    except NotImplementedError:  # an improper prior
        prior = None
    other = _from_support({**site, "kwargs": {**site["kwargs"], "rng_key": key}}, prior)
    if prior is None or other is None:
        return next((value for value in (prior, other) if value is not None), otherwise)
    return jnp.where(from_prior, prior, other.astype(prior.dtype))


def _from_support(site: dict, near: Array | None) -> Array | None:
    """Integers uniform between their bounds, or just above ``near``; continuous values near 0 in unconstrained space.

    :return: None for other supports.
    """
    support = base_support(support_of(site["fn"]))
    if support is None:
        return None
    if not support.is_discrete:
        try:
            return init_to_uniform(site)
        except NotImplementedError:  # a support that has no transform
            return None
    low: Any
    if isinstance(support, type(constraints.boolean)):
        low, number = 0, 2
    elif isinstance(support, constraints.integer_interval):
        low, number = support.lower_bound, support.upper_bound - support.lower_bound + 1
    elif is_count(support) and near is not None:
        low, number = near, COUNTS
    else:
        return None
    shape = site["fn"].shape()
    index = random.uniform(site["kwargs"]["rng_key"], shape) * jnp.broadcast_to(number, shape).astype(float)
    return jnp.broadcast_to(low, shape).astype(int) + jnp.floor(index).astype(int)
