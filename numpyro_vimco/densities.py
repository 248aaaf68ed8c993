# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Model and guide in, log-densities of one particle out. Knows NumPyro, no estimator.

A *score-function site* is a latent guide site whose distribution has no reparameterised sampler
(``has_rsample`` is False): no gradient flows through its sample. All other guide sites are *path sites*.
"""

from collections.abc import Callable
from functools import partial
import math
from typing import Any, NamedTuple

from jax import random
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.handlers import replay, seed, substitute, trace

from numpyro_vimco.validation import Trace, check_shape, check_traces

Density = Float[Array, "*plates"]


class Densities(NamedTuple):
    """Log-densities in nats, each of the shape of the plates that are common to all sample sites.

    Their gradients are what an estimator weights, so the split is by how the parameters act, not by site:

    :ivar model: log p(x, z), of all sites of the model.
    :ivar guide_path: the part of the guide's log-density that is no density of a score-function sample: path
        sites, observed sites and factors, and what `handlers.scale` adds to a score-function site.
    :ivar guide_score: the log-density that the score-function samples were drawn from, never scaled.
    """

    model: Density
    guide_path: Density
    guide_score: Density

    @property
    def log_weight(self) -> Density:
        """Log w = log p(x, z) - log q(z)."""
        return self.model - self.guide_path - self.guide_score


def is_score_function_site(site: dict) -> bool:
    """Whether ``site`` is latent and its distribution has no reparameterised sampler."""
    return site["type"] == "sample" and not site["is_observed"] and not site["fn"].has_rsample


def is_latent_site(site: dict) -> bool:
    """Whether ``site`` is latent."""
    return site["type"] == "sample" and not site["is_observed"]


def particle_densities(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict,
    params: dict[str, Any],
    by_score: Callable[[dict], bool],
    rng_key: Array,
) -> tuple[Densities, Float[Array, ""]]:
    """Draw one particle from the guide and evaluate it.

    :param by_score: the guide sites whose samples carry no gradient.
    :return: its densities, and the factor by which the bounds of subsampled common plates are to be
        multiplied. It is not in the densities: inside of the bound's logarithm it would be a power.
    :raises ValueError: see :mod:`numpyro_vimco.validation`.
    """
    model_key, guide_key = random.split(rng_key)
    guide_trace = _trace_guide(seed(guide, guide_key), args, kwargs, params, by_score)
    model_trace = _trace_model(seed(model, model_key), args, kwargs, params, guide_trace)
    check_traces(model_trace, guide_trace)

    model_sites = [site for site in model_trace.values() if site["type"] == "sample"]
    guide_sites = [site for site in guide_trace.values() if site["type"] == "sample"]
    plates, plate_scale = _common_plates(model_sites + guide_sites, {**guide_trace, **model_trace})
    sum_to_plates = partial(_sum_to_plates, dims=sorted(frame.dim for frame in plates))

    zero = jnp.zeros([frame.size for frame in sorted(plates, key=lambda frame: frame.dim)])
    model_density, guide_path, guide_score = zero, zero, zero
    for site in model_sites:
        model_density += sum_to_plates(_scaled(site, _log_prob(site), plate_scale))
    for site in guide_sites:
        log_prob = _log_prob(site)
        scaled = _scaled(site, log_prob, plate_scale)
        if by_score(site):
            guide_score += sum_to_plates(log_prob)
            if scaled is not log_prob:
                guide_path += sum_to_plates(scaled - log_prob)
        else:
            guide_path += sum_to_plates(scaled)
    return Densities(model_density, guide_path, guide_score), jnp.asarray(plate_scale)


def _trace_guide(guide, args, kwargs, params, by_score) -> Trace:
    # By substitution, not by a handler that stops the value afterwards: only a substitution reaches into `scan`.
    def sample_without_gradient(site: dict):
        if by_score(site):
            return stop_gradient(site["fn"](*site["args"], **site["kwargs"]))

    guide = substitute(substitute(guide, data=params), substitute_fn=sample_without_gradient)
    return trace(guide).get_trace(*args, **kwargs)


def _trace_model(model, args, kwargs, params, guide_trace) -> Trace:
    proposed = {name: site for name, site in guide_trace.items() if site["type"] == "plate" or is_latent_site(site)}
    return trace(substitute(replay(model, proposed), data=params)).get_trace(*args, **kwargs)


def _common_plates(sites: list[dict], plate_sites: Trace) -> tuple[set, float]:
    """The plates that are common to all sample sites, and the scale of those among them that are subsampled.

    :raises ValueError: for a subsampled plate that is not common to all sites.
    """
    stacks = [set(site["cond_indep_stack"]) for site in sites]
    common = set.intersection(*stacks) if stacks else set()
    scale = 1.0
    for frame in set().union(*stacks):
        # A plate inside of `scan` is not recorded in the trace, and cannot be subsampled there.
        size = plate_sites[frame.name]["args"][0] if frame.name in plate_sites else frame.size
        if size == frame.size:
            continue
        if frame not in common:
            outside = next(site["name"] for site, stack in zip(sites, stacks) if frame not in stack)
            raise ValueError(
                f"Plate '{frame.name}' is subsampled ({frame.size} of {size}), but site '{outside}' is outside of "
                "it. A subsample can be scaled only where the plate is common to all sample sites of model and "
                "guide, so that each of its elements has a bound of its own. Use the full plate, or make the "
                "global latents parameters."
            )
        scale *= size / frame.size
    return common, scale


def _log_prob(site: dict) -> Array:
    """Log-density of a site with its mask, without its scale."""
    if site["intermediates"]:
        log_prob = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        log_prob = site["fn"].log_prob(site["value"])
    check_shape(site, jnp.shape(log_prob))
    return log_prob


def _scaled(site: dict, log_prob: Array, plate_scale: float) -> Array:
    """``log_prob`` times the scale of ``site``, less that of the common plates."""
    if site["scale"] is None:
        return log_prob
    scale = site["scale"] / plate_scale
    if isinstance(scale, float) and math.isclose(scale, 1.0):
        return log_prob
    return scale * log_prob


def _sum_to_plates(log_prob: Array, dims: list[int]) -> Density:
    """Sum over all dimensions of ``log_prob`` but ``dims``, which are negative and ascending."""
    others = [axis for axis in range(jnp.ndim(log_prob)) if axis - jnp.ndim(log_prob) not in dims]
    return jnp.sum(log_prob, axis=others)
