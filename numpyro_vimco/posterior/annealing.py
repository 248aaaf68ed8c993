# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Annealing: a model whose observed sites count with a power.

The target is p(z) p(x | z)^β, and β rises while a fit goes on, so that a guide is wide before it has to choose.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro import distributions as dist
from numpyro.primitives import Messenger

# Where the power begins.
FIRST_POWER = 0.001


class Tempered(dist.Independent):
    """A distribution whose log-density is multiplied by a power; it is not normalized.

    It is an ``Independent`` without a dimension, so that whatever looks through wrappers looks through it.
    """

    pytree_data_fields = ("power",)

    def __init__(self, base_dist: dist.Distribution, power: Array):
        self.power = power
        super().__init__(base_dist, 0)

    def log_prob(self, value):
        return self.power * super().log_prob(value)


class Annealed(Messenger):
    """A model whose observed sites (likelihoods and factors) count with a power: p(z) p(x | z)^β.

    The power multiplies the log-density itself, not the ``scale`` of the site. A scale acts outside of a sum over an
    enumerated latent (:class:`numpyro.infer.TraceEnum_ELBO` refuses it), and the power of a likelihood must act inside.
    Scales, masks and subsampled plates act as without a power.

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
