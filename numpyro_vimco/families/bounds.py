# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Supports that depend on other latents: survivors are at most as many as were alive.

A guide that draws such a site after the latents that its support depends on cuts its distribution to :class:`Bounds`.
Another guide proposes all values that the site can ever have, its *cover*; impossible ones then have weight zero.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint
from numpyro.handlers import block, seed, trace
from numpyro.util import not_jax_tracer

from numpyro_vimco.compilation import at_once
from numpyro_vimco.control_flow import Given
from numpyro_vimco.dependence import dependence
from numpyro_vimco.sites import base_support, support_leaves

# A support that depends on discrete latents is looked at for so many of their values together; it is a categorical
# distribution up to so many values of its own.
MAX_COMBINATIONS, MAX_VALUES = 4096, 256

Samples = dict[str, Array]


class Bounds(NamedTuple):
    """The integers that an element can be given other latents: from ``low`` to ``high``, or without such a bound."""

    low: Array
    high: Array | None

    @classmethod
    def of(cls, support: Constraint, shape: tuple[int, ...]) -> "Bounds":
        """The bounds of a support; where no integer is between them, the smallest is taken.

        :param shape: of all elements.
        """
        support = base_support(support)
        low = jnp.broadcast_to(support.lower_bound, shape)
        if not isinstance(support, constraints.integer_interval):
            return cls(low, None)
        return cls(low, jnp.maximum(low, jnp.broadcast_to(support.upper_bound, shape)))

    @classmethod
    def of_rest(cls, total: Array, values: Array, number: int) -> "Bounds":
        """The bounds of counts with a given sum, each given those before it: what is left; the last one takes it.

        :param total: of each count its sum, of shape ``(*local, n)``.
        :param values: the counts, of the same shape.
        :param number: of counts that have a sum together; these are neighbours.
        """
        rows = values.reshape(*values.shape[:-1], -1, number)
        left = jnp.maximum(total.reshape(rows.shape) - (jnp.cumsum(rows, axis=-1) - rows), 0)
        low = jnp.where(jnp.arange(number) == number - 1, left, 0)
        return cls(low.reshape(values.shape), left.reshape(values.shape))

    def map(self, fn: Callable[[Array], Array]) -> "Bounds":
        """Both bounds, rearranged."""
        return Bounds(fn(self.low), None if self.high is None else fn(self.high))


@dataclass(frozen=True)
class Moving:
    """A support that depends on latents.

    :ivar parents: these.
    :ivar has_moving_low: whether its smallest value does.
    """

    parents: frozenset[str]
    has_moving_low: bool


def has_total(support: Any) -> bool:
    """Whether a support has counts with a given sum, as that of a Multinomial."""
    return isinstance(base_support(support), type(constraints.multinomial(1)))


def total_of(support: Any) -> Array:
    """The sum of counts."""
    return jnp.asarray(base_support(support).upper_bound)


def is_of_integers(support: Any) -> bool:
    """Whether a support is an interval of integers, with or without a largest one, or boolean."""
    kinds = constraints.integer_interval, constraints.integer_greater_than, type(constraints.boolean)
    return isinstance(base_support(support), kinds)


def supports_of(model: Callable, args: tuple, kwargs: dict) -> Callable[[Samples], dict[str, Constraint]]:
    """A function from the values of all latents to their supports."""

    def supports(values: Samples) -> dict[str, Constraint]:
        with block():
            tr = trace(Given(seed(model, jax.random.key(0)), values)).get_trace(*args, **kwargs)
        return {name: tr[name]["fn"].support for name in values}

    return supports


def moving_supports(supports: Callable[[Samples], dict[str, Constraint]], latents: Samples) -> dict[str, Moving]:
    """The sites whose support depends on latents.

    :param supports: of :func:`supports_of`.
    :param latents: values of all latents.
    """
    totals: set[str] = set()

    def leaves(latents: Samples) -> dict[Any, Array]:
        found = supports(latents)
        totals.update(name for name in found if has_total(found[name]))
        return {
            (name, i): jnp.asarray(leaf)
            for name, support in found.items()
            for i, leaf in enumerate(support_leaves(support))
        }

    found: dict[str, Moving] = {}
    by_leaf: Mapping[Any, set[str]] = dependence(leaves, latents)
    for (name, i), parents in by_leaf.items():
        if parents:
            before = found.get(name, Moving(frozenset(), False))
            is_low = i == 0 and name not in totals
            found[name] = Moving(before.parents | parents, before.has_moving_low or is_low)
    return found


def covering(
    name: str,
    support: Constraint,
    moving: Moving,
    supports: Callable[[Samples], dict[str, Constraint]],
    latents: Samples,
    covers: Mapping[str, Constraint],
    draws: Mapping[str, Array],
) -> Constraint:
    """A support that has all integers that a site can be.

    It is an interval where the latents that it depends on have few values together, and has no largest integer
    otherwise. Its smallest one is then that of draws of the prior, if it depends on latents: there may be smaller ones.

    :param support: of the site, at these values of all latents.
    :param covers: supports of the parents, as far as they are discrete.
    :param draws: of the prior of discrete latents.
    """
    support = base_support(support)
    if not not_jax_tracer(draws[name]):
        return support  # of the first call, which a family then refuses
    values = _combinations(sorted(moving.parents), latents, covers)

    def bounds(values: Samples) -> list[Array]:
        return support_leaves(base_support(supports({**latents, **values})[name]))

    if values is not None and isinstance(support, constraints.integer_interval):
        low, high = at_once(lambda: jax.vmap(bounds)(values))
        if (found := (int(np.min(low)), int(np.max(high))))[1] - found[0] < MAX_VALUES:
            return constraints.integer_interval(*found)
    low = support.lower_bound
    return constraints.integer_greater_than(int(np.min(draws[name])) if moving.has_moving_low else low)


def _combinations(parents: Iterable[str], latents: Samples, covers: Mapping[str, Constraint]) -> Samples | None:
    """All values of some latents, with a leading axis; None if they are not discrete, or too many."""
    axes, places = [], []
    for parent in parents:
        support = base_support(covers.get(parent))
        if isinstance(support, type(constraints.boolean)):
            ends = 0, 1
        elif isinstance(support, constraints.integer_interval):
            ends = int(np.min(support.lower_bound)), int(np.max(support.upper_bound))
        else:
            return None
        size = jnp.size(latents[parent])
        axes += [range(ends[0], ends[1] + 1)] * size
        places += [parent] * size
        if math.prod(map(len, axes)) > MAX_COMBINATIONS:
            return None
    table = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    found = {}
    for parent in parents:
        columns = table[:, [place == parent for place in places]]
        value = latents[parent]
        found[parent] = jnp.asarray(columns.reshape(-1, *jnp.shape(value)), jnp.result_type(value))
    return found
