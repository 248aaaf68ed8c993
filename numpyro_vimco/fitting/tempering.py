# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Tempering: a model whose observed sites count with a power, the inverse temperature.

The target is p(z) p(x | z)^β, and β rises while a fit goes on, so that a guide is wide before it has to choose.
"""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro.handlers import block, seed, trace
from numpyro.primitives import Messenger

from numpyro_vimco.compilation import at_once
from numpyro_vimco.densities.plates import common_plates
from numpyro_vimco.densities.tempered import Tempered
from numpyro_vimco.families.units import FromPrior, location_and_scale
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import log_prob_at_value, sample_sites

# The power begins at the first number; or lower, where the log-likelihood of draws of the prior spreads so much that it
# would move log-weights by more than the second number of nats. The third is the lowest.
FIRST, SPREAD, LOWEST = 1e-3, 0.1, 1e-9
# With samples of each step of a chain it begins here. At a small power the steps of a chain depend on each other as in
# the prior, which proposals that are independent over time cannot follow (`benchmarks/plans.py --tempering`).
OF_CHAINS = 0.03
DRAWS = 100  # of the prior


class TemperedModel(Messenger):
    """A model whose observed sites (likelihoods and factors) count with a power: p(z) p(x | z)^β.

    The inverse temperature β multiplies the log-density itself, not the ``scale`` of the site, which
    :class:`numpyro.infer.TraceEnum_ELBO` refuses beside an enumerated latent. There it acts inside of the sum; in
    objectives of this library outside of it (:mod:`numpyro_vimco.densities.tempered`). Scales, masks and subsampled
    plates act as without it.

    :param fn: the model.
    :param inverse_temperature: β > 0; it may be traced.
    """

    def __init__(self, fn: Callable, inverse_temperature: Float[Array, ""]):
        super().__init__(fn)
        self.inverse_temperature = inverse_temperature

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            msg["fn"] = Tempered(msg["fn"], self.inverse_temperature)


def geometric(
    step: Int[Array, ""], num_steps: Int[Array, "*starts"], first: Float[Array, ""]
) -> Float[Array, "*starts"]:
    """An inverse temperature that rises geometrically from ``first`` to 1 over ``num_steps`` steps, and stays there."""
    rest = 1 - step / jnp.maximum(num_steps, 1)
    return jnp.where(step < num_steps, first**rest, 1.0)


def first_inverse_temperature(
    model: Callable, args: tuple, kwargs: dict, joint_plates: Collection[str]
) -> Float[Array, ""]:
    """The inverse temperature at which the data hardly count: a guide is then as wide as the prior when they begin to.

    :param joint_plates: plates whose elements share one weight.
    """

    def log_likelihood(rng_key: Array) -> Array:
        with block():
            sites = sample_sites(trace(FromPrior(seed(model, rng_key))).get_trace(*args, **kwargs))
        kept = {frame.dim for frame in common_plates(sites, frozenset(joint_plates))}
        total = jnp.zeros(())
        for site in filter(lambda site: site["is_observed"], sites):
            log_prob = log_prob_at_value(site)
            axes = [i for i in range(jnp.ndim(log_prob)) if i - jnp.ndim(log_prob) not in kept]
            total = total + jnp.sum(log_prob, axis=axes, keepdims=True)
        return total

    def first(rng_key: Array) -> Array:
        draws = jax.vmap(log_likelihood)(split(rng_key, DRAWS))
        spread = jnp.max(location_and_scale(draws)[1])
        return jnp.clip(SPREAD / spread, LOWEST, FIRST)

    return at_once(first, jax.random.key(0))
