# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A wider copy of a guide: in known families, logits are halved and scales are multiplied by 1.5."""

from collections.abc import Callable
from copy import copy
from functools import singledispatch
from typing import Any

import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.primitives import Messenger

from numpyro_vimco.guides.distributions import DiscretizedLogistic, IntervalCategorical

WIDER = 1.5


class Widened(Messenger):
    """A guide whose latent sites are wider, where their family is known; the others are as they were.

    :param wide: whether they are; it may be traced, so that a guide and its wider copy are one program.
    """

    def __init__(self, fn: Callable, wide: Any):
        super().__init__(fn)
        self.wide = wide

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = widened(msg["fn"], jnp.where(self.wide, WIDER, 1.0), jnp.where(self.wide, 0.5, 1.0))


@singledispatch
def widened(fn: dist.Distribution, scale: Any, logits: Any) -> dist.Distribution:
    """A wider distribution on the same support.

    :param scale: what scales are multiplied by.
    :param logits: what logits are multiplied by.
    """
    return fn


@widened.register(dist.Independent)
@widened.register(dist.ExpandedDistribution)
@widened.register(dist.MaskedDistribution)
@widened.register(dist.TransformedDistribution)
def _(fn, scale, logits):
    wide = copy(fn)
    wide.base_dist = widened(fn.base_dist, scale, logits)
    return wide


@widened.register
def _(fn: dist.Normal, scale, logits):
    return dist.Normal(fn.loc, scale * fn.scale)


@widened.register
def _(fn: dist.MultivariateNormal, scale, logits):
    return dist.MultivariateNormal(fn.loc, scale_tril=scale * fn.scale_tril)


@widened.register
def _(fn: dist.LowRankMultivariateNormal, scale, logits):
    return dist.LowRankMultivariateNormal(fn.loc, scale * fn.cov_factor, scale**2 * fn.cov_diag)


@widened.register(dist.BernoulliLogits)
@widened.register(dist.BernoulliProbs)
def _(fn, scale, logits):
    return dist.BernoulliLogits(logits * fn.logits)


@widened.register(dist.CategoricalLogits)
@widened.register(dist.CategoricalProbs)
def _(fn, scale, logits):
    return dist.CategoricalLogits(logits * fn.logits)


@widened.register
def _(fn: IntervalCategorical, scale, logits):
    return IntervalCategorical(logits * fn.logits, fn.low, fn.high)


@widened.register
def _(fn: DiscretizedLogistic, scale, logits):
    return DiscretizedLogistic(fn.loc, scale * fn.scale, fn.low)
