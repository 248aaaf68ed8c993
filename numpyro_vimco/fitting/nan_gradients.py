# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Which sites of a model have a gradient that is NaN, where their densities are finite."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI

from numpyro_vimco.control_flow import Given
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import is_latent_site, log_prob_at_value, sample_sites

# Draws of the guide that are looked at.
DRAWS = 256


def sites_with_nan_gradients(
    svi: SVI, params: dict[str, Any], rng_key: Array, args: tuple, kwargs: dict[str, Any]
) -> list[str]:
    """Names of the sites of the model whose log-density has a NaN gradient, by a parameter, at some draw."""

    def log_densities(params: dict[str, Any], rng_key: Array) -> dict[str, Array]:
        guide_key, model_key = split(rng_key)
        guide = substitute(seed(svi.guide, guide_key), data=params)
        latents = {
            s["name"]: s["value"] for s in sample_sites(trace(guide).get_trace(*args, **kwargs)) if is_latent_site(s)
        }
        model = substitute(Given(seed(svi.model, model_key), latents), data=params)
        sites = sample_sites(trace(model).get_trace(*args, **kwargs))
        return {site["name"]: jnp.sum(log_prob_at_value(site)) for site in sites}

    def is_nan(name: str, rng_key: Array) -> Array:
        # Of one site at a time: a cotangent of zero times infinity is NaN.
        gradient = jax.grad(lambda params: log_densities(params, rng_key)[name])(params)
        return jnp.array([jnp.isnan(leaf).any() for leaf in jax.tree.leaves(gradient)]).any()

    def look(rng_key: Array) -> dict[str, Array]:
        return {name: is_nan(name, rng_key) for name in jax.eval_shape(log_densities, params, rng_key)}

    found = jax.jit(jax.vmap(look))(split(rng_key, DRAWS))
    return [name for name, of_site in found.items() if of_site.any()]
