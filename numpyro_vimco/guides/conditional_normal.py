# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous latents given discrete values: Normal in unconstrained space, with an affine location and log-scale."""

from contextlib import ExitStack
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoNormal

from numpyro_vimco.guides.families import Family
from numpyro_vimco.guides.private import init_locs, init_scale, unconstrained_event_dim
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import is_latent_site

Samples = dict[str, Array]


class ConditionalNormal(NamedTuple):
    """
    An ``AutoNormal`` whose sites depend on discrete values. Formula, and what depends on what:
    :class:`~numpyro_vimco.AutoMixed`.

    :ivar normal: the guide of the continuous sites: its sites, parameters at the start, and names.
    :ivar sites: the discrete sites, as traced, keyed by name.
    :ivar families: their families.
    """

    normal: AutoNormal
    sites: dict[str, dict]
    families: dict[str, Family]

    def sample(self, plates: dict[str, numpyro.plate], given: Samples) -> Samples:
        """Sample statements of all continuous sites."""
        samples = {}
        for site in self._continuous_sites():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                features = self._features(site, given)
                fn = self._distribution(site, self._declare_params(site, features), features)
                samples[site["name"]] = numpyro.sample(site["name"], fn)
        return samples

    def sample_posterior(self, rng_key: Array, params: Samples, given: Samples, sample_shape: tuple) -> Samples:
        """Samples given samples of the discrete sites, of shape ``sample_shape``."""

        def draw(rng_key, given):
            samples = {}
            keys = split_by_name(rng_key, [site["name"] for site in self._continuous_sites()])
            for site in self._continuous_sites():
                features = self._features(site, given)
                own = {k: params[name] for k, name in self._param_names(site, features).items()}
                samples[site["name"]] = self._distribution(site, own, features).sample(keys[site["name"]])
            return samples

        for _ in sample_shape:
            draw = jax.vmap(draw)
        return draw(split(rng_key, sample_shape), given)

    def is_independent(self) -> bool:
        """Whether no continuous site depends on a discrete one."""
        return not any(_can_depend(site, parent) for site in self._continuous_sites() for parent in self.sites.values())

    def _continuous_sites(self) -> list[dict]:
        return [site for site in self.normal.prototype_trace.values() if is_latent_site(site)]

    def _param_names(self, site: dict, features: Samples) -> dict[str, str]:
        parts = ["loc", "scale", *(f"{part}_{parent}" for parent in features for part in ("loc", "log_scale"))]
        return {part: f"{site['name']}_{self.normal.prefix}_{part}" for part in parts}

    def _declare_params(self, site: dict, features: Samples) -> Samples:
        loc, event_dim = init_locs(self.normal)[site["name"]], unconstrained_event_dim(self.normal, site["name"])
        scale = jnp.full(jnp.shape(loc), init_scale(self.normal))
        names = self._param_names(site, features)
        params = {
            "loc": numpyro.param(names["loc"], loc, event_dim=event_dim),
            "scale": numpyro.param(names["scale"], scale, constraint=self.normal.scale_constraint, event_dim=event_dim),
        }
        for parent, value in features.items():
            zeros = jnp.zeros((*jnp.shape(loc), value.shape[-1]))
            for part in (f"loc_{parent}", f"log_scale_{parent}"):
                params[part] = numpyro.param(names[part], zeros, event_dim=event_dim + 1)
        return params

    def _distribution(self, site: dict, params: Samples, features: Samples) -> dist.Distribution:
        loc, log_scale = params["loc"], jnp.zeros(())
        for parent, value in features.items():
            loc = loc + jnp.sum(params[f"loc_{parent}"] * value, axis=-1)
            log_scale = log_scale + jnp.sum(params[f"log_scale_{parent}"] * value, axis=-1)
        fn = dist.Normal(loc, params["scale"] * jnp.exp(log_scale))
        fn = fn.to_event(unconstrained_event_dim(self.normal, site["name"]))
        return dist.TransformedDistribution(fn, biject_to(site["fn"].support))

    def _features(self, site: dict, given: Samples) -> Samples:
        """What a continuous site depends on: for each discrete site, features that broadcast to (*site, G)."""
        found = {}
        for name, family in self.families.items():
            parent = self.sites[name]
            if not _can_depend(site, parent):
                continue
            frames = parent["cond_indep_stack"]
            # From (*batch, *event, F) to (*plates, *ones, G): what is in no plate is a feature of all elements.
            features = family.features(given[name])
            batch_ndim = features.ndim - 1 - parent["fn"].event_dim
            dims = {frame.dim for frame in frames}
            plates = [features.shape[batch_ndim + dim] if dim in dims else 1 for dim in range(min(dims, default=0), 0)]
            kept = [i for i in range(batch_ndim) if i - batch_ndim in dims]
            others = [i for i in range(features.ndim) if i not in kept]
            ones = (1,) * unconstrained_event_dim(self.normal, site["name"])
            found[name] = features.transpose(kept + others).reshape(*plates, *ones, -1)
        return found


def _can_depend(site: dict, parent: dict) -> bool:
    """Whether a site is in all plates of another."""
    plates, own = ({frame.name for frame in s["cond_indep_stack"]} for s in (parent, site))
    return plates <= own
