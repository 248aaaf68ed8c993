# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Traces of model and guide in, log-densities by level out. Knows NumPyro, no estimator.

Where the model masks an element of a latent, neither its density in the model nor that in the guide counts. What plates
do to densities is in :mod:`numpyro_vimco.densities.plates`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro.distributions as dist

from numpyro_vimco.checks.enumeration_checks import check_group
from numpyro_vimco.checks.supports_and_plates import check_shape, event_mask_error
from numpyro_vimco.control_flow import in_turn
from numpyro_vimco.densities.enumeration import (
    Group,
    entries_at,
    groups,
    log_sum,
    parents_of,
    root,
    summed_sites,
    time_dim_of,
)
from numpyro_vimco.densities.levels import Levels, level_of
from numpyro_vimco.densities.plates import Density, Structure
from numpyro_vimco.densities.tempered import power_of, untempered
from numpyro_vimco.densities.zero_weights import safe_log_prob, safe_table
from numpyro_vimco.sites import Trace, is_delta, is_latent_site, log_prob_at_value, mask_of, sample_sites, unmasked


class Densities(NamedTuple):
    """Log-densities of one level in nats, in three parts whose gradients an estimator weights differently.

    :ivar model: log p(x, z), of all sites of the model.
    :ivar guide_score: log-density that the score-function samples were drawn from, never scaled.
    :ivar guide_rest: the other terms of log q(z): path sites, observed sites and factors, and what `handlers.scale`
        adds to a score-function site.
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
    """The draw of a latent guide site: its value, and its log-density in nats, None for a path site."""

    value: Array
    log_prob: Array | None
    event_dim: int

    @property
    def is_path(self) -> bool:
        """Whether the site is a path site: gradients flow through its value."""
        return self.log_prob is None

    @property
    def differentiable(self) -> Array:
        """What depends on the guide's parameters differentiably: the value of a path site, else the log-density."""
        return self.value if self.log_prob is None else self.log_prob


Draws = dict[str, Draw]


class SiteDensities:
    """The log-densities of the sites of a model and its guide at one particle, in nats.

    :param structure: how plates combine them.
    :param enumerated: an enumerated trace of the model, if it has sites to sum out; these then have any value in
        ``model_trace``.
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace, structure: Structure, enumerated: Trace | None = None):
        self.model_trace, self.guide_trace, self.structure = model_trace, guide_trace, structure
        self.masks = latent_masks(model_trace, guide_trace)
        self.summed = summed_sites(model_trace, guide_trace) if enumerated else []
        self.groups = groups(enumerated, self.summed) if enumerated else []

    def of_model(self) -> Levels[Density]:
        """The model's log-density log p(x, z), of all its sites; marked sites that the guide lacks are summed out."""
        grouped = {root(site["name"]) for group in self.groups for site in group}
        alone = [site for site in sample_sites(self.model_trace) if site["name"] not in grouped]
        total = self._sum(alone, self._of_model_site)
        for group in self.groups:
            level, log_prob = self.of_group(group)
            if level is None:
                total = total._replace(shared=total.shared + log_prob)
            else:
                total.local[level] = total.local[level] + log_prob
        return total

    def of_group(self, group: Group, added: Mapping[str, Array] | None = None) -> tuple[str | None, Density]:
        """The level of sites that are connected by summed sites, and their log-density without these.

        :param added: what is added to the log-density of summed sites, by name; broadcasts to their tables.
        """
        level, scale = check_group(group, self.summed, self._level, self._scale)
        log_prob, power = self._log_sum(group, level, added or {}), power_of(group)
        if power is not None:
            latents = [site for site in group if not site["is_observed"]]
            is_sampled = any(root(site["name"]) not in self.summed for site in latents)
            log_prior = self._log_sum(latents, level, {}) if is_sampled else 0.0  # summed sites alone sum to one
            log_prob = power * log_prob + (1 - power) * log_prior
        return level, log_prob if scale is None else scale * log_prob

    def _log_sum(self, group: Group, level: str | None, added: Mapping[str, Array]) -> Density:
        """The log-density of sites, all that depend on summed ones, without the summed sites; never scaled."""
        kept = {frame.name: frame.dim for site in group for frame in site["cond_indep_stack"]}
        kept = {name: dim for name, dim in kept.items() if dim in self.structure.kept(level)}
        tables = {site["name"]: self._table(site) for site in group}
        tables |= {name: tables[name] + more for name, more in added.items()}
        return self.structure.sum_to_level(log_sum(group, tables, self.summed, kept), level)

    def parents(self) -> dict[str, set[str]]:
        """Of each site that depends on summed ones, their names."""
        return parents_of((site for group in self.groups for site in group), self.summed)

    def drawn_and_tabled(self) -> dict[str, tuple[Array, Array]]:
        """Of each site that depends on summed ones, its log-density at their values in ``model_trace``.

        :return: by name, the one of ``model_trace``, and the one of the enumerated trace, which must be the same.
        """
        found = {}
        values = {name: in_turn(site, site["value"]) for name, site in self.model_trace.items() if name in self.summed}
        for group in self.groups:
            names = [site["name"] for site in group]
            for name in dict.fromkeys(map(root, names)):
                site = untempered(self.model_trace[name])
                if name in self.summed:
                    site = {**site, "fn": unmasked(site["fn"])}
                drawn = in_turn(site, log_prob_of(site))
                parts = [s for s in group if root(s["name"]) == name]
                tabled = [jnp.ravel(entries_at(self._table(part), part, names, values)) for part in parts]
                found[name] = jnp.ravel(drawn), jnp.concatenate(tabled)
        return found

    def _table(self, site: dict) -> Array:
        """The log-density of a site of the enumerated trace, never scaled, without a power; times are in turn.

        A masked summed site takes its own density, which sums to one.
        """
        name = root(site["name"])
        if name in self.summed or (name in self.guide_trace and is_latent_site(site) and name not in self.masks):
            site = {**site, "fn": unmasked(site["fn"])}
        table = safe_table(partial(log_prob_of, is_table=True), untempered(site))
        return table if (time_dim := time_dim_of(site)) is None else in_turn(site, table, time_dim)

    def of_guide(
        self, is_part: Callable[[dict], bool], log_prob: Callable[[dict], Array] | None = None
    ) -> Levels[Density]:
        """The log-density of the guide sites that ``is_part`` is true of, never scaled.

        :param log_prob: of a site; defaults to :meth:`of_guide_site`.
        """
        return self._sum(filter(is_part, sample_sites(self.guide_trace)), log_prob or self.of_guide_site)

    def of_guide_rest(self, is_part: Callable[[dict], bool], guide_trace: Trace | None = None) -> Levels[Density]:
        """The other terms of the guide's log-density log q(z): :meth:`of_guide` of the same sites and this sum to it.

        These are the log-densities of the other sites, and what scales add to the log-densities of those sites.

        :param guide_trace: another trace of the guide, with the same values.
        """

        def is_in_rest(site: dict) -> bool:
            return not is_part(site) or self._scale(site) is not None

        def log_prob(site: dict) -> Array:
            scale, log_prob = self._scale(site), self.of_guide_site(site)
            if is_part(site):
                return (scale - 1) * log_prob
            return log_prob if scale is None else scale * log_prob

        return self._sum(filter(is_in_rest, sample_sites(guide_trace or self.guide_trace)), log_prob)

    def of_latent(self, name: str) -> Array:
        """Log-density of a latent given its parents in the model, never scaled, of each element; 0 where masked.

        It is the density that the model draws the latent from, but for the masks: see :meth:`of_guide_site`.
        """
        site = self.model_trace[name]
        return log_prob_of(site if name in self.masks else {**site, "fn": unmasked(site["fn"])})

    def _of_model_site(self, site: dict) -> Array:
        name, scale = site["name"], self._scale(site)
        if name in self.guide_trace and is_latent_site(site) and name not in self.masks:
            # The guide has no density of single elements. Masked ones count with the density that the model would give
            # them, which integrates to one.
            site = {**site, "fn": unmasked(site["fn"])}
        log_prob = safe_log_prob(log_prob_of, site, self.structure.kept(self._level(site)))
        return log_prob if scale is None else scale * log_prob

    def of_guide_site(self, site: dict) -> Array:
        """Log-density of a guide site, never scaled; 0 where the model masks the site."""
        return guide_log_prob(site, self.masks)

    def _level(self, site: dict) -> str | None:
        return level_of(site, [name for name, *_ in self.structure.local])

    def _scale(self, site: dict) -> Any:
        """The scale of a site, None for 1; without that of subsampled plates which scales sums of log-weights."""
        if site["scale"] is None:
            return None
        scale = site["scale"] / self.structure.level_scale(self._level(site))
        return None if isinstance(scale, float) and math.isclose(scale, 1.0) else scale

    def _sum(self, sites: Iterable[dict], log_prob: Callable[[dict], Array]) -> Levels[Density]:
        """Sum the log-densities of sites over each level."""
        zero = jnp.zeros((1,) * self.structure.ndim)
        shared, local = zero, {name: zero for name, *_ in self.structure.local}
        for site in sites:
            level = self._level(site)
            summed = self.structure.sum_to_level(log_prob(site), level)
            if level is None:
                shared = shared + summed
            else:
                local[level] = local[level] + summed
        return Levels(shared, local)


Masks = dict[str, tuple[Array, int] | None]


def latent_masks(model_trace: Trace, guide_trace: Trace) -> Masks:
    """The model's mask of each latent: see :func:`numpyro_vimco.sites.mask_of`.

    A guide that draws latents jointly does so as one auxiliary site, from which each latent is a Delta. It has no
    density of their elements, so that these latents are left out.
    """
    auxiliary = any(is_latent_site(site) and name not in model_trace for name, site in guide_trace.items())
    return {
        name: mask_of(model_trace[name]["fn"])
        for name, site in guide_trace.items()
        if is_latent_site(site) and name in model_trace and not (auxiliary and is_delta(site))
    }


def guide_log_prob(site: dict, masks: Masks) -> Array:
    """Log-density of a guide site in nats, without its scale; 0 for elements that the model masks.

    :raises ValueError: if the model masks parts of an event, and the guide has no density for each part.
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


def log_prob_of(site: dict, is_table: bool = False) -> Array:
    """Log-density of a site in nats, with its own mask, without its scale.

    :param is_table: whether it is at all values of summed sites, along dimensions that no plate explains.
    """
    log_prob = log_prob_at_value(site)
    if not is_table:
        check_shape(site, jnp.shape(log_prob))
    return log_prob
