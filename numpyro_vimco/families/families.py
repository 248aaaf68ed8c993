# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""From the support of a discrete site to a family of distributions for its guide, and to the parameters to begin with.

Why they begin there: :class:`~numpyro_vimco.AutoDiscrete`.
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any, ClassVar

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.util import not_jax_tracer

from numpyro_vimco.compilation import at_once
from numpyro_vimco.families.bounds import Bounds
from numpyro_vimco.families.components import Components, components_of_prior, spread_components
from numpyro_vimco.families.distributions import DiscretizedLogistic, DiscretizedLogisticMixture, IntervalCategorical
from numpyro_vimco.families.units import PositiveInUnits, concrete
from numpyro_vimco.sites import base_support, is_count, unwrapped

# At the start: the probability that is spread evenly over a finite support, the standard deviation of moves in
# unconstrained space, and the probability of a value that `init_loc_fn` gives.
SPREAD, JITTER, GIVEN = 0.01, 0.1, 0.9
# The least location above the smallest value that a component of counts begins with: nearly all of it is at zero.
LEAST_LOC = 0.1


@dataclass(frozen=True)
class Boolean:
    """Bernoulli."""

    support: ClassVar = constraints.boolean
    event_dim: ClassVar = 0
    low: ClassVar = 0
    num_values: ClassVar = 2
    num_shifts: ClassVar = 1
    num_features: ClassVar = 1

    def start(self, site: dict, given: Array | None) -> dict[str, Array]:
        """Parameters to begin with, one for each element of the site's value."""
        log_probs = _start_log_probs(site, 0, 1, given)
        return {"logits": log_probs[..., 1] - log_probs[..., 0]}

    def constraints(self, start: dict[str, Array], stem: str) -> dict[str, constraints.Constraint]:
        """Of each parameter.

        :param start: parameters to begin with, of full plates.
        :param stem: what the names of parameters begin with in the guide.
        """
        return {"logits": constraints.real}

    def distribution(self, logits: Array, within: Bounds | None = None) -> dist.Distribution:
        """The distribution with these parameters.

        :param within: what its values are cut to. A Boolean has no bounds that move.
        """
        return dist.BernoulliLogits(logits)

    def shifted(self, shifts: Array, logits: Array) -> dict[str, Array]:
        """Parameters, moved by shifts of shape ``(…, num_shifts)``."""
        return {"logits": logits + shifts[..., 0]}

    def over(self, arrange: Callable[[Any], Any]) -> "Boolean":
        """The family for rearranged elements: ``arrange`` is applied to bounds that each element has of its own."""
        return self

    def quantile(self, q: np.ndarray, logits: Array) -> Array:
        """The smallest value whose cumulative probability is at least ``q``."""
        return jnp.asarray(q > jax.nn.sigmoid(-logits), int)

    def features(self, value: Array) -> Array:
        """Features for sites that depend on this one, of shape ``(…, num_features)``."""
        return value[..., None].astype(float)


@dataclass(frozen=True)
class Interval:
    """A categorical distribution over an interval of integers.

    Methods and attributes are those of :class:`Boolean`.

    :ivar low: smallest value.
    :ivar high: largest value; both are an integer, or an array with one for each element.
    """

    low: Any
    high: Any
    event_dim: ClassVar = 1

    def start(self, site, given):
        return {"logits": _start_log_probs(site, self.low, self.high, given)}

    def constraints(self, start, stem):
        return {"logits": constraints.real_vector}

    def distribution(self, logits: Array, within: Bounds | None = None) -> IntervalCategorical:
        if within is not None:
            values = np.asarray(self.low)[..., None] + np.arange(self.num_values)
            low, high = (jnp.asarray(bound)[..., None] for bound in within)
            logits = jnp.where((values < low) | (values > high), jnp.finfo(logits.dtype).min, logits)
        return IntervalCategorical(logits, self.low, self.high)

    def shifted(self, shifts, logits):
        return {"logits": logits + shifts}

    def over(self, arrange):
        bounds = (arrange(bound) if isinstance(bound, np.ndarray) else bound for bound in (self.low, self.high))
        return Interval(*bounds)

    @property
    def support(self):
        return constraints.integer_interval(self.low, self.high)

    @property
    def num_values(self) -> int:
        """The largest number of values that an element has."""
        return int(np.max(self.high - self.low)) + 1

    num_shifts = num_features = num_values

    def quantile(self, q, logits):
        return self.distribution(logits).icdf(q)

    def features(self, value):
        return jax.nn.one_hot(value - self.low, self.num_values)


@dataclass(frozen=True)
class Count:
    """A discretised logistic distribution, whose variance may be smaller or larger than a Poisson's of the same mean.

    Location and scale are positive, so that a step of an optimiser changes them by a fraction of what they are. Methods
    and attributes are those of :class:`Boolean`.

    :ivar low: smallest value, an integer, or an array with one for each element. Where bounds move, draws may be less.
    :ivar loc: median of the prior above ``low``, for each element.
    :ivar scale: scale of the prior, for each element.
    """

    low: Any
    loc: Array
    scale: Array
    event_dim: ClassVar = 0
    num_shifts: ClassVar = 2
    num_features: ClassVar = 4

    @classmethod
    def of_prior(cls, site: dict, low: Any, rng_key: Array, number: int | None) -> "Count":
        """The family for a prior. Location and scale are quantiles of draws, as not all priors have moments.

        :param number: of mixture components; None for those of the prior, if it is a mixture.

        :raises ValueError: for counts that are too large for single precision.
        """

        def begin() -> tuple[Array, Array, Array, Components | None]:
            draws = (site["fn"].sample(rng_key, (200,)) - low).astype(float)
            lower, median, upper = jnp.quantile(draws, jnp.array([0.16, 0.5, 0.84]), axis=0)
            # Half of the central 68% is about a standard deviation.
            scale = jnp.maximum((upper - lower) / 2 * math.sqrt(3) / math.pi, 0.5)
            loc = jnp.maximum(median, 0.5)
            if number is None:
                components = components_of_prior(site, lambda draws: (draws - low).astype(float))
            else:
                components = spread_components(loc, scale, number) if number > 1 else None
            return loc, scale, jnp.max(median + 20 * scale), components

        loc, scale, reach, components = at_once(begin)
        if not_jax_tracer(reach) and reach.dtype == jnp.float32 and (reach > 2.0**31 or np.max(scale) > 2.0**20):
            raise ValueError(
                f"The counts of site '{site['name']}' reach about {reach:.1e} under their prior, which is too far for "
                "single precision. Call `numpyro.enable_x64()` before anything else, or count in larger units."
            )
        return cls(low, loc, scale) if components is None else CountMixture(low, loc, scale, components)

    def start(self, site, given):
        return {"loc": self.loc if given is None else jnp.maximum(given - self.low, 0.5), "scale": self.scale}

    def constraints(self, start: dict[str, Array], stem: str) -> dict[str, constraints.Constraint]:
        loc, scale = concrete(start["loc"]), concrete(start["scale"])
        unit = _relative(loc, scale)
        log = np.log if isinstance(loc, np.ndarray) else jnp.log
        return {"loc": PositiveInUnits(log(loc), unit, f"{stem}_scale"), "scale": constraints.positive}

    def distribution(self, loc: Array, scale: Array, within: Bounds | None = None) -> dist.Distribution:
        return DiscretizedLogistic(self.low + loc, scale, *(within or (self.low,)))

    def shifted(self, shifts: Array, loc: Array, scale: Array) -> dict[str, Array]:
        of_loc = _relative(loc, scale) * shifts[..., 0]
        return {"loc": loc * jnp.exp(of_loc), "scale": scale * jnp.exp(shifts[..., 1])}

    def over(self, arrange: Callable[[Any], Any]) -> "Count":
        low = arrange(self.low) if isinstance(self.low, np.ndarray) else self.low
        return Count(low, self.loc, self.scale)

    @property
    def support(self):
        return constraints.integer_greater_than(self.low)

    def quantile(self, q, loc, scale):
        return self.distribution(loc, scale).icdf(q)

    def features(self, value):
        # A difference of integers loses no digits.
        centre = jnp.round(jnp.mean(self.low + self.loc)).astype(jnp.result_type(int))
        above = jnp.maximum(value - self.low, 0).astype(float)
        standardized = (value - centre) / jnp.mean(self.scale)
        logarithm = jnp.log1p(above) - jnp.log1p(jnp.mean(self.loc))
        return jnp.stack([standardized, logarithm, 1 / (1 + above), (above == 0).astype(float)], axis=-1)


@dataclass(frozen=True)
class CountMixture(Count):
    """A mixture of discretised logistic distributions, for counts whose prior has several humps.

    Methods and attributes are those of :class:`Count`. Shifts move all components.

    :ivar components: where they begin, above ``low``.
    """

    components: Components
    event_dim: ClassVar = 1

    def start(self, site, given):
        logits, loc, scale = self.components
        if given is not None:
            loc = jnp.broadcast_to((given - self.low)[..., None], loc.shape).astype(loc.dtype)
        return {"logits": logits, "loc": jnp.maximum(loc, LEAST_LOC), "scale": scale}

    def constraints(self, start, stem):
        location = {name: start[name] for name in ("loc", "scale")}
        return {"logits": constraints.real_vector, **super().constraints(location, stem)}

    def distribution(self, logits, loc, scale, within=None):  # type: ignore[override]
        loc = jnp.asarray(self.low)[..., None] + loc
        return DiscretizedLogisticMixture(logits, loc, scale, *(within or (self.low,)))

    def shifted(self, shifts, logits, loc, scale):  # type: ignore[override]
        return {"logits": logits, **super().shifted(shifts[..., None, :], loc=loc, scale=scale)}

    def over(self, arrange):
        return CountMixture(super().over(arrange).low, self.loc, self.scale, self.components)

    def quantile(self, q, **params):  # type: ignore[override]
        raise NotImplementedError("The guide of a count with several components has no closed quantiles.")


Family = Boolean | Interval | Count


class PriorDraws(dist.Distribution):
    """Draws of a latent's prior in the place of its distribution, which is one given other latents.

    :param draws: of shape ``(draws, *batch)``.
    """

    def __init__(self, draws: Array, support: constraints.Constraint):
        self.draws, self._support = draws, support
        super().__init__(batch_shape=jnp.shape(draws)[1:])

    @property
    def support(self):
        return self._support

    def sample(self, key, sample_shape=()):
        index = random.randint(key, sample_shape, 0, len(self.draws))
        return self.draws[index]

    def log_prob(self, value):
        number = jax.lax.map(lambda draw: (draw == value).astype(float), self.draws).sum(0)
        return jnp.log((number + 1) / len(self.draws))  # in proportion


def with_prior_draws(site: dict, draws: dict[str, Array], covers: dict[str, constraints.Constraint]) -> dict:
    """A discrete site whose distribution are draws of its prior.

    :param draws: by site; others stay as they are.
    :param covers: the support of each site; draws below it are at its smallest value.
    """
    name = site["name"]
    if name not in draws:
        return site
    support = covers[name]
    low = getattr(support, "lower_bound", draws[name])
    return {**site, "fn": PriorDraws(jnp.maximum(draws[name], low), support).to_event(site["fn"].event_dim)}


def has_common_bounds(family: Family) -> bool:
    """Whether all elements of a site have the same bounds."""
    return not any(isinstance(getattr(family, bound, None), np.ndarray) for bound in ("low", "high"))


def family_of(site: dict, rng_key: Array, number: int | None = None) -> Family:
    """The family for a discrete site.

    :param number: of mixture components of a count; None for those of its prior.

    :raises NotImplementedError: for a support without a family.
    :raises ValueError: for bounds that are traced.
    """
    try:
        support = site["fn"].support
    except NotImplementedError:
        raise _no_automatic_guide_error(site) from None
    support = base_support(support)
    if isinstance(support, type(constraints.boolean)):
        return Boolean()
    if isinstance(support, constraints.integer_interval):
        return Interval(_bound(site, support.lower_bound), _bound(site, support.upper_bound))
    if is_count(support):
        return Count.of_prior(site, _bound(site, support.lower_bound), rng_key, number)
    raise _no_automatic_guide_error(site)


def bounds_error(site: dict, why: str) -> ValueError:
    """A discrete site with bounds that an automatic guide cannot use."""
    return ValueError(
        f"The bounds of the discrete site '{site['name']}' {why}. Write a guide by hand for this site, with "
        "IntervalCategorical(logits, low, high) of numpyro_vimco.distributions, say; "
        f"AutoMixed(numpyro.handlers.block(model, hide=['{site['name']}'])) can guide the others."
    )


def moving_support_error(site: dict, why: str) -> ValueError:
    """A site whose support depends on latents that a guide does not draw before it.

    :param why: that is so.
    """
    name = site["name"]
    if not site["fn"].support.is_discrete:
        return ValueError(
            f"The support of the continuous site '{name}' depends on other latents, and {why}, so that the guide "
            "cannot know it. Write the model with a site whose support is fixed (Uniform(0, 1), say) and scale it, or "
            f"write a guide by hand for this site; AutoMixed(numpyro.handlers.block(model, hide=['{name}'])) can guide "
            "the others."
        )
    return ValueError(
        f"The bounds of the discrete site '{name}' depend on other latents, and {why}, so that the guide cannot know "
        "its support. Write one by hand that draws these latents first, and then the site within the same bounds:\n\n"
        f"    others = AutoMixed(numpyro.handlers.block(model, hide=['{name}']))\n\n"
        "    def guide(*args, **kwargs):\n"
        "        latents = others(*args, **kwargs)\n"
        f"{_within_bounds(site)}"
    )


def _within_bounds(site: dict) -> str:
    """Lines of a guide by hand that draw a site above a bound that other latents decide."""
    name, shape, event_dim = site["name"], jnp.shape(site["value"]), site["fn"].event_dim
    is_interval = isinstance(base_support(site["fn"].support), constraints.integer_interval)
    event = f".to_event({event_dim})" if event_dim else ""
    lines = [
        "from numpyro_vimco.distributions import DiscretizedLogistic",
        f"{'low, high' if is_interval else 'low'} = ...  # from the latents",
        f"loc = numpyro.param('{name}_loc', jnp.ones({shape}), constraint=dist.constraints.positive)",
        f"q = DiscretizedLogistic(low + loc, 1.0, {'low, high' if is_interval else 'low'})",
        f"numpyro.sample('{name}', q{event})  # in its plates",
    ]
    return "".join(f"        {line}\n" for line in lines)


def _no_automatic_guide_error(site: dict) -> NotImplementedError:
    """A discrete site with a support that there is no automatic guide for."""
    name, fn = site["name"], site["fn"]
    shape, kind = jnp.shape(site["value"]), type(unwrapped(fn)).__name__
    return NotImplementedError(
        f"There is no automatic guide for site '{name}', a {kind} of shape {shape}. Write one "
        "by hand, in the plates of the site, beside an automatic guide for the other latents:\n\n"
        f"    others = AutoMixed(numpyro.handlers.block(model, hide=['{name}']))  # if there are any\n\n"
        "    def guide(*args, **kwargs):\n"
        "        others(*args, **kwargs)\n"
        f"        logits = numpyro.param('{name}_logits', jnp.full({shape}, 0.1))\n"
        f"        q = dist.Bernoulli(logits=logits).to_event({fn.event_dim})  # or what fits the site's support\n"
        f"        numpyro.sample('{name}', q)\n"
    )


def _relative(loc: Array | np.ndarray, scale: Array | np.ndarray) -> Array | np.ndarray:
    """The unit of the logarithm of a count's location: a step moves it by a share of its scale, and of itself at most.

    By a share of itself, a large count would leave what the data allow.
    """
    minimum = np.minimum if isinstance(loc, np.ndarray) and isinstance(scale, np.ndarray) else jnp.minimum
    return minimum(scale / loc, 1)


def jitter(start: Array, constraint: constraints.Constraint, rng_key: Array) -> Array:
    """A parameter to begin with, moved by :data:`JITTER` standard normals in unconstrained space."""
    transform = biject_to(constraint)
    return transform(transform.inv(start) + JITTER * random.normal(rng_key, jnp.shape(start)))


def _bound(site: dict, bound) -> Any:
    """A bound as an integer; as an array with one for each element of the site's value, if they differ."""
    if not not_jax_tracer(bound):
        raise bounds_error(site, "are traced by JAX when the guide is first called; call `svi.init` outside of `jit`")
    bound = np.asarray(bound)
    return int(bound.min()) if (bound == bound.min()).all() else np.broadcast_to(bound, jnp.shape(site["value"]))


def _start_log_probs(site: dict, low, high, given: Array | None) -> Array:
    """Log-probabilities in nats to begin with, of shape (*elements, K); 0 for values that an element does not have."""
    shape, last = jnp.shape(site["value"]), np.max(high - low)
    index = np.arange(last + 1).reshape(-1, *(1,) * len(shape))
    exists = np.broadcast_to(index <= high - low, (last + 1, *shape))
    probs = uniform = exists / exists.sum(0)
    prior = unwrapped(site["fn"])
    if not prior.event_dim:  # else its elements are not independent, and have no density of their own
        values = np.broadcast_to(np.minimum(low + index, high), exists.shape)
        probs = jax.nn.softmax(jnp.where(exists, prior.log_prob(values), -jnp.inf), axis=0)
    probs = (1 - SPREAD) * probs + SPREAD * uniform
    if given is not None:
        probs = (1 - GIVEN) * probs + GIVEN * (low + index == given)
    return jnp.moveaxis(jnp.where(exists, jnp.log(jnp.where(exists, probs, 1)), 0), 0, -1)
