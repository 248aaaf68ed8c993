# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions over integers for guides: flexible, cheap to sample, and exact in float32; and a transform."""

from jax import lax, random
from jax.nn import log_sigmoid, log_softmax, logsumexp
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import StickBreakingTransform
from numpyro.distributions.util import promote_shapes, validate_sample
from numpyro.util import not_jax_tracer

from numpyro_vimco.randomness import split

__all__ = ["DiscretizedLogistic", "IntervalCategorical"]

Integers = Array | np.ndarray | int
Reals = Array | np.ndarray | float


class IntervalCategorical(dist.CategoricalLogits):
    """
    A categorical distribution over the integers from ``low`` to ``high``.

    The bounds may differ between elements of a batch: values outside of an element's bounds have probability 0.

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

    def __init__(
        self, logits: Array | np.ndarray, low: Integers, high: Integers, *, validate_args: bool | None = None
    ) -> None:
        self.low, self.high = low, high
        size = jnp.asarray(high - low + 1)[..., None]
        index = jnp.arange(jnp.shape(logits)[-1]).reshape(*(1,) * (size.ndim - 1), -1)
        exists, logits = jnp.broadcast_arrays(index < size, logits)
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

    def icdf(self, q: Reals) -> Array:
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
    The integers k from ``low`` to ``high``, with the probability that a logistic variable, known to be from ``low`` - ½
    to ``high`` + ½, rounds to k. With :math:`\sigma` the logistic function, :math:`a = (k - \frac12 - loc) / scale`,
    :math:`b = (k + \frac12 - loc) / scale`, and :math:`a_0` and :math:`b_1` what a is at ``low`` and b at ``high``,

    .. math:: P(k) = \frac{\sigma(b) - \sigma(a)}{\sigma(b_1) - \sigma(a_0)}
                   = \frac{\sigma(b) \, \sigma(-a) \, (1 - e^{-1/scale})}
                          {\sigma(b_1) \, \sigma(-a_0) \, (1 - e^{-(high - low + 1)/scale})},

    where the second form, in logarithms, loses no digits in the tails. As ``scale`` falls to 0 it becomes the one
    integer next to ``loc``: it can be narrower than a Poisson distribution of the same mean, and wider. Its upper tail
    is exponential, like a negative binomial's and heavier than a Poisson's, so that importance weights of Poisson-like
    posteriors are bounded. (Discretised logistic: Salimans et al. 2017, arXiv 1701.05517; truncation and second form
    are elementary.)

    Differences from ``loc`` are taken of integers first, so that probabilities are right in single precision up to the
    largest 32-bit integer. Draws there have the digits of a float: with a ``scale`` above 2²⁰ some integers are never
    drawn.

    :param loc: centre of the logistic distribution.
    :param scale: its scale, positive; its standard deviation is :math:`\pi/\sqrt 3 \approx 1.8` times that.
    :param low: smallest integer. Defaults to 0.
    :param high: largest integer. Defaults to None, for no such bound.
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.dependent(is_discrete=True, event_dim=0),
        "high": constraints.dependent(is_discrete=True, event_dim=0),
    }
    pytree_data_fields = ("loc", "scale", "low", "high")

    def __init__(
        self,
        loc: Reals,
        scale: Reals,
        low: Integers = 0,
        high: Integers | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        bounds = (low,) if high is None else (low, high)
        self.loc, self.scale, self.low, *highest = promote_shapes(loc, scale, *bounds)
        self.high = highest[0] if highest else None
        shape = jnp.broadcast_shapes(*map(jnp.shape, (loc, scale, *bounds)))
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        """All integers from ``low`` to ``high``."""
        if self.high is None:
            return constraints.integer_greater_than(self.low)
        return constraints.integer_interval(self.low, self.high)

    @property
    def _whole(self):
        """The integer below ``loc``."""
        return jnp.floor(lax.stop_gradient(self.loc)).astype(jnp.result_type(int))

    def _standardized(self, value: Integers) -> Array:
        """(value - ½ - loc) / scale; a difference of integers loses no digits."""
        rest = self.loc - jnp.floor(lax.stop_gradient(self.loc))
        return ((value - self._whole) - (0.5 + rest)) / self.scale

    @property
    def _log_parts(self):
        """Log-probabilities that the logistic variable is below, within and above the bounds; None without one."""
        lowest = self._standardized(self.low)
        if self.high is None:
            return log_sigmoid(lowest), log_sigmoid(-lowest), None
        highest = self._standardized(self.high + 1)
        width = (self.high - self.low + 1) / self.scale
        within = log_sigmoid(highest) + log_sigmoid(-lowest) + _log_expm1_of_minus(width)
        return log_sigmoid(lowest), within, log_sigmoid(-highest)

    def sample(self, key, sample_shape=()):
        """Draw integers of shape ``(*sample_shape, *batch)``."""
        return self._icdf(random.uniform(key, sample_shape + self.batch_shape))

    @validate_sample
    def log_prob(self, value):
        """Log-probability in nats."""
        below, width = self._standardized(value), 1 / self.scale
        log_prob = log_sigmoid(below + width) + log_sigmoid(-below) + _log_expm1_of_minus(width) - self._log_parts[1]
        return log_prob if self.high is None else jnp.where(value > self.high, -jnp.inf, log_prob)

    def icdf(self, q):
        """The smallest integer whose cumulative probability is at least ``q``, from 0 to below 1.

        :raises ValueError: for another ``q``, unless it is traced: without ``high``, no integer has a cumulative
            probability of 1.
        """
        if self.high is None and not_jax_tracer(q) and not np.all((np.asarray(q) >= 0) & (np.asarray(q) < 1)):
            raise ValueError(
                f"`q` is {q}, but a DiscretizedLogistic has quantiles from 0 to below 1: it has no largest integer."
            )
        return self._icdf(q)

    def _icdf(self, q: Reals) -> Array:
        below, within, above = self._log_parts
        log_survival = jnp.log1p(-q) + within
        if above is not None:
            log_survival = jnp.logaddexp(above, log_survival)
        logit = jnp.logaddexp(below, jnp.log(q) + within) - log_survival
        difference = jnp.ceil(self.loc - jnp.floor(self.loc) + self.scale * logit - 0.5)
        largest = jnp.iinfo(jnp.result_type(int)).max - jnp.maximum(self._whole, 0)
        value = jnp.maximum(self._whole + jnp.minimum(difference.astype(largest.dtype), largest), self.low)
        return value if self.high is None else jnp.minimum(value, self.high)


def _log_expm1_of_minus(x: Array) -> Array:
    """log(1 - exp(-x)) for positive x."""
    return jnp.log(-jnp.expm1(-x))


class DiscretizedLogisticMixture(dist.Distribution):
    """
    A mixture of K discretised logistic distributions on the same integers.

    :param logits: of the weights, of shape ``(*batch, K)``.
    :param loc: centres, as in :class:`DiscretizedLogistic`, of the same shape.
    :param scale: scales, of the same shape.
    :param low: smallest integer, of a shape that broadcasts to ``batch``. Defaults to 0.
    :param high: largest integer, of such a shape. Defaults to None, for no such bound.
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "low": constraints.dependent(is_discrete=True, event_dim=0),
        "high": constraints.dependent(is_discrete=True, event_dim=0),
    }
    pytree_data_fields = ("logits", "loc", "scale", "low", "high")

    def __init__(
        self,
        logits: Array,
        loc: Array,
        scale: Array,
        low: Integers = 0,
        high: Integers | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.loc, self.scale = jnp.broadcast_arrays(logits, loc, scale)
        self.low, self.high = low, high
        super().__init__(batch_shape=self.logits.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        """All integers from ``low`` to ``high``."""
        if self.high is None:
            return constraints.integer_greater_than(self.low)
        return constraints.integer_interval(self.low, self.high)

    @property
    def _components(self):
        high = None if self.high is None else jnp.asarray(self.high)[..., None]
        return DiscretizedLogistic(self.loc, self.scale, jnp.asarray(self.low)[..., None], high)

    def sample(self, key, sample_shape=()):
        """Draw integers of shape ``(*sample_shape, *batch)``."""
        which_key, value_key = split(key)
        which = random.categorical(which_key, self.logits, shape=sample_shape + self.batch_shape)
        values = self._components.sample(value_key, sample_shape)
        return jnp.take_along_axis(values, which[..., None], axis=-1)[..., 0]

    @validate_sample
    def log_prob(self, value):
        """Log-probability in nats."""
        return logsumexp(log_softmax(self.logits) + self._components.log_prob(jnp.asarray(value)[..., None]), axis=-1)


class InsideSimplex(StickBreakingTransform):
    """NumPyro's stick breaking, with values inside of the simplex where a product underflows, and an exact inverse.

    On the boundary densities are NaN or infinite. What is left of the stick is a sum of small parts here, not 1 less a
    sum near 1, which has no digits left in single precision.
    """

    def __call__(self, x):
        """From real vectors to the simplex."""
        values = super().__call__(x)
        # Of a maximum XLA knows that it is positive. It would look whether all are, for seconds, while it compiles.
        return jnp.where(values < jnp.finfo(values.dtype).tiny, jnp.finfo(values.dtype).tiny, values)

    def _inverse(self, y):
        left = jnp.flip(jnp.cumsum(jnp.flip(y[..., 1:], -1), axis=-1), -1)
        x = jnp.log(y[..., :-1]) - jnp.log(left)
        return x + jnp.log(x.shape[-1] - jnp.arange(x.shape[-1]))
