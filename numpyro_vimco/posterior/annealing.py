# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Annealing: a model whose observed sites count with a power.

The target is p(z) p(x | z)^β, and β rises while a fit goes on, so that a guide is wide before it has to choose.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro.primitives import Messenger

from numpyro_vimco.objectives.tempered import Tempered

# Where the power begins.
FIRST_POWER = 0.001


class Annealed(Messenger):
    """A model whose observed sites (likelihoods and factors) count with a power: p(z) p(x | z)^β.

    The power multiplies the log-density itself, not the ``scale`` of the site, which
    :class:`numpyro.infer.TraceEnum_ELBO` refuses beside an enumerated latent. There it acts inside of the sum; in
    objectives of this library outside of it (:mod:`numpyro_vimco.objectives.tempered`). Scales, masks and subsampled
    plates act as without a power.

    :param fn: the model.
    :param power: β > 0; it may be traced.
    """

    def __init__(self, fn: Callable, power: Float[Array, ""]):
        super().__init__(fn)
        self.power = power

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            msg["fn"] = Tempered(msg["fn"], self.power)


def geometric(step: Int[Array, ""], num_steps: Int[Array, "*starts"]) -> Float[Array, "*starts"]:
    """A power that rises geometrically from 0.001 to 1 over ``num_steps`` steps, and stays there."""
    rest = 1 - step / jnp.maximum(num_steps, 1)
    return jnp.where(step < num_steps, FIRST_POWER**rest, 1.0)
