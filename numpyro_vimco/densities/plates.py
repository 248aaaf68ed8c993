# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What plates do to densities: which are summed, which have weights or local particles, which are scaled.

Levels of sites are in :mod:`numpyro_vimco.densities.levels`. A log-density of one particle has a dimension for each
dimension of plates, of size 1 where it is summed over, so that arrays of all levels broadcast.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_vimco.checks.supports_and_plates import subsample_error
from numpyro_vimco.densities.levels import level_of
from numpyro_vimco.sites import Trace, sample_sites

Density = Float[Array, "*plates"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Structure:
    """How the plates combine densities; static. Dimensions are negative, as NumPyro's ``dim``.

    :ivar ndim: number of plate dimensions.
    :ivar dims: dimensions of the plates common to all sites: they are not summed over, as their elements have weights
        of their own.
    :ivar scale: factor of the bound, from subsampled plates that are common to all sites.
    :ivar local: of each named plate and each chain its name, the dimensions of the plates common to its sites, and the
        factor of the sum of its elements' log-weights, from its own subsampling.
    :ivar chains: which of these are chains, and whether their `scan` begins at the end.
    """

    ndim: int
    dims: frozenset[int]
    scale: float
    local: tuple[tuple[str, frozenset[int], float], ...]
    chains: tuple[tuple[str, bool], ...] = ()

    def kept(self, level: str | None) -> frozenset[int]:
        """Dimensions that are not summed over: of the plates common to all sites of a level."""
        return self.dims if level is None else next(dims for name, dims, _ in self.local if name == level)

    def level_scale(self, level: str | None) -> float:
        """The factor by which subsampling scales each density of a level."""
        return self.scale if level is None else self.scale * self.local_scale(level)

    def local_scale(self, level: str) -> float:
        """The factor of the sum of a named plate's log-weights over its elements."""
        return next(scale for name, _, scale in self.local if name == level)

    def sum_to_level(self, log_prob: Array, level: str | None) -> Density:
        """Sum a log-density over all dimensions but those of :meth:`kept`."""
        keep = self.kept(level)
        ndim = jnp.ndim(log_prob)
        summed = jnp.sum(log_prob, axis=[i for i in range(ndim) if i - ndim not in keep], keepdims=True)
        return summed.reshape((1,) * (self.ndim - ndim) + summed.shape[max(ndim - self.ndim, 0) :])

    def sum_to_shared(self, local: Array) -> Array:
        """Sum values of the elements of a named plate over all plates that are not common to all sites.

        :param local: of shape (…, *plates); leading axes stay.
        """
        axes = [dim for dim in range(-self.ndim, 0) if dim not in self.dims]
        return jnp.sum(local, axis=axes, keepdims=True)


def plate_structure(
    model_trace: Trace,
    guide_trace: Trace,
    names: Collection[str],
    joint_plates: frozenset[str],
    linear: bool,
    chains: Mapping[str, bool] = MappingProxyType({}),
) -> Structure:
    """How the plates of a model and its guide combine densities.

    :param names: of named plates and chains.
    :param joint_plates: plates whose elements share one weight.
    :param chains: which of ``names`` are chains, and whether their `scan` begins at the end.
    :param linear: whether plates that are not common to all sites may be subsampled (α = 1).
    :raises ValueError: for a subsampled plate whose scale would be a power inside of the bound's logarithm.
    """
    sites = sample_sites(model_trace) + sample_sites(guide_trace)
    plate_sites = {**guide_trace, **model_trace}
    common = common_plates(sites, joint_plates)
    local = {
        name: common_plates([site for site in sites if level_of(site, names) == name], joint_plates) for name in names
    }
    scale, local_scale = 1.0, dict.fromkeys(local, 1.0)
    for frame in {frame for site in sites for frame in site["cond_indep_stack"]}:
        # A plate inside of `scan` is not recorded in the trace, and cannot be subsampled there.
        size = plate_sites[frame.name]["args"][0] if frame.name in plate_sites else frame.size
        if size == frame.size:
            continue
        inside = {level_of(site, names) for site in sites if frame in site["cond_indep_stack"]} - {None}
        level = next((name for name in local if frame in local[name]), None)
        if frame in common:
            scale *= size / frame.size
        elif linear and level is not None:
            local_scale[level] *= size / frame.size
        elif not linear or inside:
            raise subsample_error(frame, size, [s["name"] for s in sites if frame not in s["cond_indep_stack"]])
    deepest = min((frame.dim for site in sites for frame in site["cond_indep_stack"]), default=0)
    levels = tuple((name, _dims(plates), local_scale[name]) for name, plates in local.items())
    return Structure(-deepest, _dims(common), scale, levels, tuple(chains.items()))


def aligned_shape(plates: tuple[int, ...], batch_ndim: int, event_dim: int) -> tuple[int, ...]:
    """The shape to which an array of shape ``plates`` is reshaped, to broadcast against (*batch, *event).

    Plates and batch are aligned on the right. Plates that the batch lacks must have size 1; they are dropped.
    """
    return (1,) * (batch_ndim - len(plates)) + plates[max(len(plates) - batch_ndim, 0) :] + (1,) * event_dim


def common_plates(sites: list[dict], joint_plates: frozenset[str]) -> set:
    """The plates that all sites are in and whose elements have weights of their own."""
    common = set.intersection(*(set(site["cond_indep_stack"]) for site in sites)) if sites else set()
    return {frame for frame in common if frame.name not in joint_plates}


def _dims(plates: set) -> frozenset[int]:
    return frozenset(frame.dim for frame in plates)
