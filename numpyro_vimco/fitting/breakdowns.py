# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Why steps broke down: densities and gradients that are NaN, and data that rule out all draws."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI

from numpyro_vimco.compilation import at_once
from numpyro_vimco.control_flow import Given
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import Trace, is_latent_site, log_prob_at_value, sample_sites

# Draws of the guide that are looked at.
DRAWS = 256
# So many elements are named.
NAMED = 5

Params = dict[str, Any]


def sites_with_nan_gradients(svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict) -> list[str]:
    """Names of the sites of the model whose log-density has a NaN gradient, by a parameter, at some draw."""

    def log_density(name: str, params: Params, rng_key: Array) -> Array:
        return jnp.sum(log_prob_at_value(_model_trace(svi, params, rng_key, args, kwargs)[name]))

    def look(rng_key: Array) -> dict[str, Array]:
        # Of one site at a time: a cotangent of zero times infinity is NaN.
        found = {}
        for site in sample_sites(_model_trace(svi, params, rng_key, args, kwargs)):
            gradient = jax.grad(log_density, 1)(site["name"], params, rng_key)
            found[site["name"]] = jnp.array([jnp.isnan(leaf).any() for leaf in jax.tree.leaves(gradient)]).any()
        return found

    found = at_once(jax.vmap(look), split(rng_key, DRAWS))
    return [name for name, is_nan in found.items() if is_nan.any()]


def sites_with_nan_densities(
    svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict
) -> list[tuple[str, float]]:
    """Names of the sites of the model whose log-density is NaN at some draw, and at which share of them."""

    def look(rng_key: Array) -> dict[str, Array]:
        sites = sample_sites(_model_trace(svi, params, rng_key, args, kwargs))
        return {site["name"]: jnp.isnan(log_prob_at_value(site)).any() for site in sites}

    found = at_once(jax.vmap(look), split(rng_key, DRAWS))
    return [(name, float(np.mean(is_nan))) for name, is_nan in found.items() if is_nan.any()]


def ruled_out(svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict) -> str:
    """A sentence on the data that rule out draws of the guide."""

    def look(rng_key: Array) -> dict[str, Array]:
        sites = sample_sites(_model_trace(svi, params, rng_key, args, kwargs))
        return {site["name"]: jnp.isneginf(log_prob_at_value(site)) for site in sites if site["is_observed"]}

    shares = {name: np.mean(found, axis=0) for name, found in at_once(jax.vmap(look), split(rng_key, DRAWS)).items()}
    name = max(shares, key=lambda name: shares[name].max(initial=0), default=None)
    if name is None or not shares[name].any():
        return "No observed site alone rules out a draw: look at the supports of model and guide."
    share = shares[name]
    if not share.ndim:
        return f"The datum of site '{name}' is impossible in {share:.0%} of draws of the guide."
    worst = np.argsort(-share, axis=None, kind="stable")[: min(NAMED, (share == share.max()).sum())]
    where = ", ".join(str([int(i) for i in index]) for index in np.transpose(np.unravel_index(worst, share.shape)))
    more = f", and {(share == share.max()).sum() - NAMED} more" if (share == share.max()).sum() > NAMED else ""
    return f"Data of site '{name}' are impossible in {share.max():.0%} of draws of the guide, at {where}{more}."


def _model_trace(svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict) -> Trace:
    """The model at a draw of the guide."""
    guide_key, model_key = split(rng_key)
    guide = substitute(seed(svi.guide, guide_key), data=params)
    of_guide = sample_sites(trace(guide).get_trace(*args, **kwargs))
    latents = {site["name"]: site["value"] for site in of_guide if is_latent_site(site)}
    model = substitute(Given(seed(svi.model, model_key), latents), data=params)
    return trace(model).get_trace(*args, **kwargs)
