# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What plates do to densities: which are summed, which have weights or particles of their own, which are scaled.

A *level* is a set of sites that are drawn together: a plate that has particles of its own, with all that is inside
of it, or what is *shared* by all of these, which is everything where no plate is named. The arrays of a named plate
have an axis for its particles before those of the plates.

Plate dimensions are kept: a density of one particle has as many dimensions as the deepest plate, of size 1 where
the plate is summed over, so that arrays of all levels broadcast.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_vimco.objectives.checks import subsample_error
from numpyro_vimco.sites import Trace, sample_sites

T = TypeVar("T")
Density = Float[Array, "*plates"]


class Levels(NamedTuple, Generic[T]):
    """One thing for what all local particles share, and one for each named plate."""

    shared: T
    local: dict[str, T]

    def at(self, level: str | None) -> T:
        """What is for a named plate, or for what is shared (None): see :func:`level_of`."""
        return self.shared if level is None else self.local[level]


def map_levels(fn: Callable, *levels: Levels) -> Levels:
    """Apply a function to each level."""
    shared = fn(*(level.shared for level in levels))
    return Levels(shared, {name: fn(*(level.local[name] for level in levels)) for name in levels[0].local})


@jax.tree_util.register_static
@dataclass(frozen=True)
class Structure:
    """How the plates combine densities; static.

    :ivar ndim: number of plate dimensions.
    :ivar dims: the dimensions that each level keeps: the plates common to all of its sites.
    :ivar scale: factor of the bound, from subsampled plates that are common to all sites.
    :ivar local_scale: factor of each named plate's sum of log-weights, from its own subsampling.
    """

    ndim: int
    dims: Levels[frozenset[int]]
    scale: float
    local_scale: dict[str, float]

    def __hash__(self) -> int:
        return hash((self.ndim, self.dims.shared, self.scale))

    def level_scale(self, level: str | None) -> float:
        """The factor by which the subsampling of its plates scales each density of a level."""
        return self.scale if level is None else self.scale * self.local_scale[level]

    def sum_to_level(self, log_prob: Array, level: str | None) -> Density:
        """Sum a log-density over all dimensions but those of its level, which are kept."""
        keep = self.dims.at(level)
        ndim = jnp.ndim(log_prob)
        summed = jnp.sum(log_prob, axis=[i for i in range(ndim) if i - ndim not in keep], keepdims=True)
        return summed.reshape((1,) * (self.ndim - ndim) + summed.shape[max(ndim - self.ndim, 0) :])

    def sum_to_shared(self, local: Array) -> Array:
        """Sum what is per element of a named plate to the plates of the shared level; leading axes are free."""
        axes = [dim for dim in range(-self.ndim, 0) if dim not in self.dims.shared]
        return jnp.sum(local, axis=axes, keepdims=True)


def plate_structure(
    model_trace: Trace, guide_trace: Trace, plate_particles: Mapping[str, int], linear: bool
) -> Structure:
    """How the plates of a model and its guide combine densities.

    :param linear: whether plates that are not common to all sites may be subsampled (α = 1).
    :raises ValueError: for a subsampled plate whose scale would be a power inside of a logarithm.
    """
    sites = sample_sites(model_trace) + sample_sites(guide_trace)
    plate_sites = {**guide_trace, **model_trace}
    common = _common_plates(sites)
    local = {
        name: _common_plates([site for site in sites if level_of(site, plate_particles) == name])
        for name in plate_particles
    }
    scale, local_scale = 1.0, dict.fromkeys(local, 1.0)
    for frame in {frame for site in sites for frame in site["cond_indep_stack"]}:
        # A plate inside of `scan` is not recorded in the trace, and cannot be subsampled there.
        size = plate_sites[frame.name]["args"][0] if frame.name in plate_sites else frame.size
        if size == frame.size:
            continue
        inside = {level_of(site, plate_particles) for site in sites if frame in site["cond_indep_stack"]} - {None}
        level = next((name for name in local if frame in local[name]), None)
        if frame in common:
            scale *= size / frame.size
        elif linear and level is not None:
            local_scale[level] *= size / frame.size
        elif not linear or inside:
            raise subsample_error(frame, size, [s["name"] for s in sites if frame not in s["cond_indep_stack"]])
    deepest = min((frame.dim for site in sites for frame in site["cond_indep_stack"]), default=0)
    dims = Levels(_dims(common), {name: _dims(plates) for name, plates in local.items()})
    return Structure(-deepest, dims, scale, local_scale)


def aligned_shape(plates: tuple[int, ...], batch_ndim: int, event_dim: int) -> tuple[int, ...]:
    """Shape of what has one value per plate element, to broadcast against (*batch, *event).

    Plates and batch are aligned on the right; plates that the batch lacks have size 1.
    """
    return (1,) * (batch_ndim - len(plates)) + plates[max(len(plates) - batch_ndim, 0) :] + (1,) * event_dim


def level_of(site: dict, plate_particles: Iterable[str]) -> str | None:
    """The named plate that a site is in, or None."""
    return next((frame.name for frame in site["cond_indep_stack"] if frame.name in plate_particles), None)


def _common_plates(sites: list[dict]) -> set:
    return set.intersection(*(set(site["cond_indep_stack"]) for site in sites)) if sites else set()


def _dims(plates: set) -> frozenset[int]:
    return frozenset(frame.dim for frame in plates)
