# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A wider copy of a guide: in known families, logits are halved and scales are multiplied by 1.5."""

from copy import copy
from functools import singledispatch

from numpyro import distributions as dist
from numpyro.primitives import Messenger

from numpyro_vimco.guides.distributions import DiscretizedLogistic, IntervalCategorical

WIDER = 1.5


class Widened(Messenger):
    """A guide whose latent sites are wider, where their family is known; other sites stay as they are."""

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = widened(msg["fn"])


@singledispatch
def widened(fn: dist.Distribution) -> dist.Distribution:
    """A wider distribution on the same support; ``fn`` itself, if its family is not known."""
    return fn


@widened.register(dist.Independent)
@widened.register(dist.ExpandedDistribution)
@widened.register(dist.MaskedDistribution)
@widened.register(dist.TransformedDistribution)
def _(fn):
    wide = copy(fn)
    wide.base_dist = widened(fn.base_dist)
    return wide


@widened.register
def _(fn: dist.Normal):
    return dist.Normal(fn.loc, WIDER * fn.scale)


@widened.register
def _(fn: dist.MultivariateNormal):
    return dist.MultivariateNormal(fn.loc, scale_tril=WIDER * fn.scale_tril)


@widened.register
def _(fn: dist.LowRankMultivariateNormal):
    return dist.LowRankMultivariateNormal(fn.loc, WIDER * fn.cov_factor, WIDER**2 * fn.cov_diag)


@widened.register(dist.BernoulliLogits)
@widened.register(dist.BernoulliProbs)
def _(fn):
    return dist.BernoulliLogits(fn.logits / 2)


@widened.register(dist.CategoricalLogits)
@widened.register(dist.CategoricalProbs)
def _(fn):
    return dist.CategoricalLogits(fn.logits / 2)


@widened.register
def _(fn: IntervalCategorical):
    return IntervalCategorical(fn.logits / 2, fn.low, fn.high)


@widened.register
def _(fn: DiscretizedLogistic):
    return DiscretizedLogistic(fn.loc, WIDER * fn.scale, fn.low)
