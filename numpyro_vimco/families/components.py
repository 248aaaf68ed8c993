# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Mixture components of a guide's site: where the prior has several humps, or the user asks for some."""

from typing import NamedTuple

from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from numpyro_vimco.families.units import location_and_scale
from numpyro_vimco.private.of_numpyro import Mixture
from numpyro_vimco.sites import unwrapped

# A prior of more components has the guide of one.
MOST_COMPONENTS, DRAWS = 8, 200
# The scale of a component of a single value, such as the zeros of an inflated count.
LEAST_SCALE = 0.1


class Components(NamedTuple):
    """Where K mixture components begin, each an array of shape ``(*shape, K)``.

    :ivar logits: of their weights.
    :ivar loc: their locations.
    :ivar scale: their scales.
    """

    logits: Array
    loc: Array
    scale: Array


def components_of_prior(site: dict, transform=lambda x: x) -> Components | None:
    """The components of a prior that is a finite mixture, or inflated at zero; None for another.

    :param site: with events of no dimension.
    :param transform: from values to the space of the components' locations.
    """
    fn, shape = unwrapped(site["fn"]), site["fn"].shape()
    if fn.event_shape:
        return None
    if isinstance(fn, Mixture) and 1 < fn.mixture_size <= MOST_COMPONENTS:
        draws, logits = fn.component_sample(random.key(0), (DRAWS,)), fn.mixing_distribution.logits
    elif hasattr(fn, "gate") and hasattr(fn, "base_dist"):
        base = fn.base_dist.sample(random.key(0), (DRAWS,))
        draws = jnp.stack([jnp.zeros_like(base), base], axis=-1)
        gate = jnp.clip(fn.gate, 0.01, 0.99)
        logits = jnp.log(jnp.stack([gate, 1 - gate], axis=-1))
    else:
        return None
    loc, scale = location_and_scale(transform(draws), of_constant=LEAST_SCALE)
    number = loc.shape[-1]
    return Components(*(jnp.broadcast_to(x, (*shape, number)) for x in (logits, loc, scale)))


def spread_components(loc: Array, scale: Array, number: int) -> Components:
    """So many components that share a prior of this location and scale, both of shape ``shape``, out among them."""
    place = np.linspace(-1, 1, number)
    locs = loc[..., None] + place * scale[..., None]
    scales = jnp.broadcast_to(scale[..., None] / number, locs.shape)
    return Components(jnp.zeros(locs.shape), locs, scales)
