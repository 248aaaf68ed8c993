# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Traces of model and guide in, log-densities by level out. Knows NumPyro, no estimator.

Where the model masks an element of a latent, the element is out of the program: its density in the guide counts no
more than that in the model. What plates do to densities is in :mod:`numpyro_vimco.objectives.plates`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro.distributions as dist

from numpyro_vimco.objectives.checks import check_shape, event_mask_error
from numpyro_vimco.objectives.levels import Levels, level_of
from numpyro_vimco.objectives.plates import Density, Structure
from numpyro_vimco.objectives.zero_weights import safe_log_prob
from numpyro_vimco.sites import Trace, is_latent_site, mask_of, sample_sites, unmasked, unwrapped


class Densities(NamedTuple):
    """Log-densities in nats. Their gradients are what an estimator weights, so the split is by how parameters act:

    :ivar model: log p(x, z), of all sites of the model.
    :ivar guide_rest: the guide's log-density but for ``guide_score``: that of path sites, of observed sites and
        factors, and what `handlers.scale` adds to a score-function site.
    :ivar guide_score: the log-density that the score-function samples were drawn from, never scaled.
    """

    model: Density
    guide_rest: Density
    guide_score: Density

    @property
    def log_guide(self) -> Density:
        """The guide's log-density, log q(z)."""
        return self.guide_rest + self.guide_score

    @property
    def log_weight(self) -> Density:
        """The log-weight, log p(x, z) - log q(z)."""
        return self.model - self.guide_rest - self.guide_score


@partial(jax.tree_util.register_dataclass, data_fields=["value", "log_prob"], meta_fields=["event_dim"])
@dataclass
class Draw:
    """A latent guide site as drawn: its value, and its log-density (None for a path site)."""

    value: Array
    log_prob: Array | None
    event_dim: int

    @property
    def is_path(self) -> bool:
        """Whether the gradient of the guide's parameters flows through the value."""
        return self.log_prob is None

    @property
    def differentiable(self) -> Array:
        """What carries that gradient: the value, or the log-density."""
        return self.value if self.log_prob is None else self.log_prob


Draws = dict[str, Draw]


class SiteDensities:
    """The log-densities of the sites of a model and its guide at one particle.

    :param structure: how plates combine them.
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace, structure: Structure):
        self.model_trace, self.guide_trace, self.structure = model_trace, guide_trace, structure
        self.masks = latent_masks(model_trace, guide_trace)

    def of_model(self) -> Levels[Density]:
        """The log-density log p(x, z) of the model."""
        return self._sum(self.model_trace, self._of_model)

    def of_guide(self, tells: Callable[[dict], bool]) -> Levels[Density]:
        """Log-densities of some guide sites, never scaled.

        :param tells: the sites.
        """
        return self._sum(self.guide_trace, lambda site, level: self.of_guide_site(site) if tells(site) else None)

    def of_guide_beside(self, tells: Callable[[dict], bool], guide_trace: Trace | None = None) -> Levels[Density]:
        """The guide's log-density but for :meth:`of_guide`: of all other sites, and what scales add to those.

        :param guide_trace: another trace of the guide, with the same values.
        """

        def beside(site: dict, level: str | None) -> Array | None:
            scale = self._scale(site, level)
            if tells(site):
                return None if scale is None else (scale - 1) * self.of_guide_site(site)
            return self.of_guide_site(site) if scale is None else scale * self.of_guide_site(site)

        return self._sum(guide_trace or self.guide_trace, beside)

    def _of_model(self, site: dict, level: str | None) -> Array:
        name, scale = site["name"], self._scale(site, level)
        if name in self.guide_trace and is_latent_site(site) and name not in self.masks:
            # The guide has no density of single elements. Those that are masked count with the model's own density
            # instead: whatever else the weight holds, it integrates to one.
            site = {**site, "fn": unmasked(site["fn"])}
        log_prob = safe_log_prob(log_prob_of, site, self.structure.kept(level))
        return log_prob if scale is None else scale * log_prob

    def of_guide_site(self, site: dict) -> Array:
        """Log-density of a guide site, never scaled; 0 where the model masks the site."""
        return guide_log_prob(site, self.masks)

    def _scale(self, site: dict, level: str | None) -> Any:
        """The scale of a site, less that of subsampled plates whose sum is scaled as a whole; None for 1."""
        if site["scale"] is None:
            return None
        scale = site["scale"] / self.structure.level_scale(level)
        return None if isinstance(scale, float) and math.isclose(scale, 1.0) else scale

    def _sum(self, trace: Trace, density: Callable[[dict, str | None], Array | None]) -> Levels[Density]:
        """Sum the densities of sites over each level; None counts nothing."""
        zero = jnp.zeros((1,) * self.structure.ndim)
        shared, local = zero, {name: zero for name, *_ in self.structure.local}
        for site in sample_sites(trace):
            level = level_of(site, local)
            log_prob = density(site, level)
            if log_prob is None:
                continue
            if level is None:
                shared = shared + self.structure.sum_to_level(log_prob, level)
            else:
                local[level] = local[level] + self.structure.sum_to_level(log_prob, level)
        return Levels(shared, local)


Masks = dict[str, tuple[Array, int] | None]


def latent_masks(model_trace: Trace, guide_trace: Trace) -> Masks:
    """The model's mask of each latent: see :func:`numpyro_vimco.sites.mask_of`.

    A guide that draws latents jointly, as one auxiliary site, hands each out as a Delta: these are left out, as the
    guide has no density of their elements.
    """
    auxiliary = any(is_latent_site(site) and name not in model_trace for name, site in guide_trace.items())
    return {
        name: mask_of(model_trace[name]["fn"])
        for name, site in guide_trace.items()
        if is_latent_site(site)
        and name in model_trace
        and not (auxiliary and isinstance(unwrapped(site["fn"]), dist.Delta))
    }


def guide_log_prob(site: dict, masks: Masks) -> Array:
    """Log-density of a guide site, without its scale; 0 for elements that the model masks.

    :raises ValueError: for a mask within an event, of whose parts the guide has no densities.
    """
    found = masks.get(site["name"])
    if found is None:
        return log_prob_of(site)
    (mask, event_dims), fn, dims = found, site["fn"], 0
    if event_dims:
        while isinstance(fn, dist.Independent) and dims < event_dims:
            dims += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
        if dims < event_dims:
            raise event_mask_error(site["name"])
    log_prob = fn.log_prob(site["value"]) if dims else log_prob_of(site)
    mask = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (dims - event_dims)), log_prob.shape)
    return jnp.sum(jnp.where(mask, log_prob, 0), axis=tuple(range(-dims, 0)))


def log_prob_of(site: dict) -> Array:
    """Log-density of a site with its own mask, without its scale."""
    if site["intermediates"]:
        log_prob = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        log_prob = site["fn"].log_prob(site["value"])
    check_shape(site, jnp.shape(log_prob))
    return log_prob
