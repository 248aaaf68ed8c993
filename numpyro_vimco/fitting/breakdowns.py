# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Why steps broke down: densities and gradients that are NaN, and data that rule out all draws."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI

from numpyro_vimco.arguments import first_of
from numpyro_vimco.compilation import at_once
from numpyro_vimco.control_flow import Given
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import Trace, is_latent_site, log_prob_at_value, sample_sites

# Draws of the guide that are looked at.
DRAWS = 256

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


def site_with_nan_density(
    svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict
) -> tuple[str, float] | None:
    """The first site of the model whose log-density is NaN at some draw, and at which share of them."""
    shares = _shares(lambda site: jnp.isnan(log_prob_at_value(site)).any(), svi, params, rng_key, args, kwargs)
    return next(((name, float(share)) for name, share in shares.items() if share > 0), None)


def ruled_out(svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict) -> str:
    """A sentence on the data that rule out draws of the guide."""

    def is_ruled_out(site: dict) -> Array:
        return jnp.isneginf(log_prob_at_value(site)) & site["is_observed"]

    shares = _shares(is_ruled_out, svi, params, rng_key, args, kwargs)
    name = max(shares, key=lambda name: shares[name].max(initial=0), default=None)
    if name is None or not shares[name].any():
        return "No observed site alone rules out a draw: look at the supports of model and guide."
    share = shares[name]
    if not share.ndim:
        return f"The datum of site '{name}' is impossible in {share:.0%} of draws of the guide."
    where = first_of([str(index) for index in np.argwhere(share == share.max()).tolist()])
    return f"Data of site '{name}' are impossible in {share.max():.0%} of draws of the guide, at {where}."


def _shares(
    is_so: Callable[[dict], Array], svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict
) -> dict[str, np.ndarray]:
    """For each site of the model, at which share of draws of the guide something holds, by element."""

    def look(rng_key: Array) -> dict[str, Array]:
        return {s["name"]: is_so(s) for s in sample_sites(_model_trace(svi, params, rng_key, args, kwargs))}

    return {name: np.mean(found, axis=0) for name, found in at_once(jax.vmap(look), split(rng_key, DRAWS)).items()}


def _model_trace(svi: SVI, params: Params, rng_key: Array, args: tuple, kwargs: dict) -> Trace:
    """The model at a draw of the guide."""
    guide_key, model_key = split(rng_key)
    guide = substitute(seed(svi.guide, guide_key), data=params)
    of_guide = sample_sites(trace(guide).get_trace(*args, **kwargs))
    latents = {site["name"]: site["value"] for site in of_guide if is_latent_site(site)}
    model = substitute(Given(seed(svi.model, model_key), latents), data=params)
    return trace(model).get_trace(*args, **kwargs)
