# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions over integers for guides: flexible, cheap to sample, and exact in float32. Knows no estimator."""

from jax import random
from jax.nn import log_sigmoid, log_softmax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes, validate_sample

__all__ = ["DiscretizedLogistic", "IntervalCategorical"]


class IntervalCategorical(dist.CategoricalLogits):
    """
    A categorical distribution over the integers from ``low`` to ``high``.

    The bounds may differ between elements of a batch: the values that an element does not have take no probability.

    :param logits: unnormalized log-probabilities of ``low``, ``low + 1``, …; of shape ``(*batch, K)`` with K at least
        the largest number of values.
    :param low: smallest value, that broadcasts against ``batch``.
    :param high: largest value, that broadcasts against ``batch``.
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "low": constraints.dependent(is_discrete=True, event_dim=0),
        "high": constraints.dependent(is_discrete=True, event_dim=0),
    }
    pytree_data_fields = ("low", "high")

    def __init__(self, logits, low, high, *, validate_args=None):
        self.low, self.high = low, high
        size = jnp.asarray(high - low + 1)[..., None]
        exists = jnp.arange(jnp.shape(logits)[-1]) < size
        super().__init__(jnp.where(exists, logits, jnp.finfo(jnp.result_type(float)).min), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        """All integers from ``low`` to ``high``."""
        return constraints.integer_interval(self.low, self.high)

    def sample(self, key, sample_shape=()):
        """Draw integers of shape ``(*sample_shape, *batch)``."""
        return self.low + super().sample(key, sample_shape)

    @validate_sample
    def log_prob(self, value):
        """Log-probability in nats."""
        index = jnp.asarray(value - self.low, int)[..., None]
        log_probs = log_softmax(self.logits)
        shape = jnp.broadcast_shapes(index.shape[:-1], log_probs.shape[:-1])
        log_probs = jnp.broadcast_to(log_probs, (*shape, log_probs.shape[-1]))
        index = jnp.broadcast_to(index, (*shape, 1))
        found = jnp.take_along_axis(log_probs, jnp.clip(index, 0, log_probs.shape[-1] - 1), axis=-1)[..., 0]
        return jnp.where((value >= self.low) & (value <= self.high), found, -jnp.inf)

    def icdf(self, q):
        """The smallest integer whose cumulative probability is at least ``q``."""
        cumulative = jnp.cumsum(self.probs, axis=-1)
        return jnp.minimum(self.low + jnp.sum(cumulative < jnp.asarray(q)[..., None], axis=-1), self.high)

    def enumerate_support(self, expand=True):
        """All values, where they are the same for all elements."""
        if jnp.size(self.low) > 1 or jnp.size(self.high) > 1:
            raise NotImplementedError(
                "The elements of this IntervalCategorical have supports of their own, which cannot be enumerated "
                "together. Give all of them one `low` and one `high`, or sample the site instead of enumerating it."
            )
        return self.low + super().enumerate_support(expand)


class DiscretizedLogistic(dist.Distribution):
    r"""
    The integers k ≥ ``low``, with the probability that a logistic variable, known to be above ``low`` - ½, rounds to
    k. With :math:`\sigma` the logistic function, :math:`a = (k - \frac12 - loc) / scale`,
    :math:`b = (k + \frac12 - loc) / scale` and :math:`a_0` the value of a at ``low``,

    .. math:: P(k) = \frac{\sigma(b) - \sigma(a)}{\sigma(-a_0)}
                   = \frac{\sigma(b) \, \sigma(-a) \, (1 - e^{-1/scale})}{\sigma(-a_0)},

    where the second form, in logarithms, loses no digits in the tails. As ``scale`` falls to 0 it becomes the one
    integer next to ``loc``: it can be narrower than a Poisson distribution of the same mean, and wider. Its upper tail
    is exponential, like a negative binomial's and heavier than a Poisson's, so that importance weights of Poisson-like
    posteriors are bounded. (Discretised logistic: Salimans et al. 2017, arXiv 1701.05517; truncation and second form
    are elementary.)

    :param loc: centre of the logistic distribution.
    :param scale: its scale, positive; its standard deviation is :math:`\pi/\sqrt 3 \approx 1.8` times that.
    :param low: smallest integer. Defaults to 0.
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.dependent(is_discrete=True, event_dim=0),
    }
    pytree_data_fields = ("loc", "scale", "low")

    def __init__(self, loc, scale, low=0, *, validate_args=None):
        self.loc, self.scale, self.low = promote_shapes(loc, scale, low)
        shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale), jnp.shape(low))
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        """All integers from ``low`` on."""
        return constraints.integer_greater_than(self.low)

    @property
    def _log_above(self):
        """Log-probability that the logistic variable is above ``low`` - ½."""
        return log_sigmoid((self.loc - self.low + 0.5) / self.scale)

    def sample(self, key, sample_shape=()):
        """Draw integers of shape ``(*sample_shape, *batch)``."""
        return self.icdf(random.uniform(key, sample_shape + self.batch_shape))

    @validate_sample
    def log_prob(self, value):
        """Log-probability in nats."""
        below, above = (value - 0.5 - self.loc) / self.scale, (value + 0.5 - self.loc) / self.scale
        return log_sigmoid(above) + log_sigmoid(-below) + jnp.log(-jnp.expm1(-1 / self.scale)) - self._log_above

    def icdf(self, q):
        """The smallest integer whose cumulative probability is at least ``q``."""
        log_survival = jnp.log1p(-q) + self._log_above
        logit = jnp.log(-jnp.expm1(log_survival)) - log_survival
        return jnp.maximum(jnp.ceil(self.loc + self.scale * logit - 0.5), self.low).astype(jnp.result_type(int))
