# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Units of a guide's locations: how far one step of an optimiser moves them.

An optimiser such as Adam moves each unconstrained parameter by about its learning rate, whatever the unit of the latent
is. So a location is written as centre + unit · (unconstrained parameter). Then a program in other units has the same
fit, up to rounding.

- ``svi.run`` keeps the *prior's* unit: a robust location and scale of draws of the prior, in unconstrained space.
- :func:`~numpyro_vimco.fit` renews the unit at each step: it is the guide's own scale, and at most the prior's
  (:meth:`RealInUnits.shrinkage`). Where the posterior is much narrower than the prior, a step of 0.01 of the prior's
  scale would jump across it. HMC renews its metric in the same way, in windows of its warm-up.
"""

from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform, Transform
from numpyro.handlers import block, seed, trace
from numpyro.infer import init_to_uniform
from numpyro.primitives import Messenger

from numpyro_vimco.compilation import at_once
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import can

# Draws of the prior: so many, and fewer where all of a draw's elements would be more than the second number.
PRIOR_DRAWS, PRIOR_SIZE = 200, 2**22
# Half of the distance of these quantiles is a standard deviation of a normal distribution.
LOWER, UPPER = 0.1587, 0.8413


class RealInUnits(constraints.Constraint):
    """All real numbers, as centre + unit · (unconstrained parameter).

    :ivar centre: where the unconstrained parameter is 0; it broadcasts to the parameter.
    :ivar unit: positive; likewise.
    :ivar scale: name of the parameter that is the guide's scale here; None where the unit is not renewed.
    :ivar log_scale: name of a parameter that is added to its logarithm; None for none.
    """

    def __init__(self, centre: Any, unit: Any, scale: str | None, log_scale: str | None = None):
        self.centre, self.unit, self.scale, self.log_scale = centre, unit, scale, log_scale

    def __call__(self, x):
        return constraints.real(x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale='{self.scale}')"

    def feasible_like(self, prototype):
        return jnp.broadcast_to(self.centre, jnp.shape(prototype))

    def tree_flatten(self):
        names = {"scale": self.scale, "log_scale": self.log_scale}
        return (self.centre, self.unit), (("centre", "unit"), names)

    def eq(self, other: object, static: bool = False) -> Any:
        """Whether ``other`` is the same."""
        return type(other) is type(self) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in vars(self)
        )

    def transform(self) -> Transform:
        """From the unconstrained parameter."""
        return AffineTransform(self.centre, self.unit)

    def shrinkage(self, name: str, params: Mapping[str, Array]) -> Array:
        """The guide's own scale in units of the prior's, at most 1.

        :param name: of this parameter.
        :param params: constrained parameters of the guide.
        """
        if self.scale is None:
            return jnp.ones(())
        scale = params[self.scale]
        if self.log_scale is not None:
            scale = scale[..., None] * jnp.exp(params[self.log_scale])
        return jnp.minimum(scale / self.unit, 1)


class PositiveInUnits(RealInUnits):
    """All positive numbers, as exp(centre + unit · (unconstrained parameter)); ``unit`` is relative to the value."""

    def __call__(self, x):
        return constraints.positive(x)

    def feasible_like(self, prototype):
        return jnp.broadcast_to(jnp.exp(self.centre), jnp.shape(prototype))

    def transform(self) -> Transform:
        return ComposeTransform([AffineTransform(self.centre, self.unit), ExpTransform()])

    def shrinkage(self, name: str, params: Mapping[str, Array]) -> Array:
        assert self.scale is not None
        return jnp.minimum(params[self.scale] / params[name] / self.unit, 1)


biject_to.register(RealInUnits, RealInUnits.transform)
biject_to.register(PositiveInUnits, PositiveInUnits.transform)


def concrete(x: Array) -> Array | np.ndarray:
    """An array of NumPy, unless JAX traces it: what is computed from it in a call that is traced is then no tracer.

    Constraints outlive such a call, in ``svi.constrain_fn``.
    """
    return x if isinstance(x, jax.core.Tracer) else np.asarray(x)


def units_of(guide_trace: Mapping[str, dict]) -> dict[str, RealInUnits]:
    """The units of a guide's parameters that have one, by name."""
    found = {name: site["kwargs"].get("constraint") for name, site in guide_trace.items() if site["type"] == "param"}
    return {name: constraint for name, constraint in found.items() if isinstance(constraint, RealInUnits)}


def unconstrained(site: dict) -> Array:
    """The value of a continuous latent in unconstrained space."""
    return biject_to(site["fn"].support).inv(site["value"])


def prior_draws(
    model: Callable,
    args: tuple,
    kwargs: dict,
    names: Iterable[str],
    value: Callable[[dict], Array] = itemgetter("value"),
) -> dict[str, Array]:
    """Draws of the prior of some latents, of shape ``(draws, *shape)``, the same at each call.

    An improper prior gives NumPyro's ``init_to_uniform``.

    :param value: what is returned of a site.
    """
    names = list(names)

    def draw(rng_key: Array) -> dict[str, Array]:
        with block():
            tr = trace(FromPrior(seed(model, rng_key))).get_trace(*args, **kwargs)
        return {name: value(tr[name]) for name in names}

    size = sum(np.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(draw, jax.random.key(0))))
    number = int(np.clip(PRIOR_SIZE // max(size, 1), 20, PRIOR_DRAWS))
    return at_once(lambda: jax.vmap(draw)(split(jax.random.key(0), number)))


class FromPrior(Messenger):
    """Give latents without a sampler a value of NumPyro's ``init_to_uniform``."""

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is None:
            if not can(msg["fn"].sample, jax.random.key(0)):
                msg["value"] = init_to_uniform(msg)


def location_and_scale(draws: Array, of_constant: float = 1.0) -> tuple[Array, Array]:
    """A robust location and scale of draws of shape ``(draws, *shape)``: their median, and half of the central 68%.

    Draws that are not finite count as missing.

    :param of_constant: the scale of draws that are all the same, or missing.
    """
    draws = jnp.where(jnp.isfinite(draws), draws, jnp.nan)
    lower, median, upper = jnp.nanquantile(draws, jnp.array([LOWER, 0.5, UPPER]), axis=0)
    scale = (upper - lower) / 2
    is_scale = jnp.isfinite(scale) & (scale > 0)
    return jnp.where(jnp.isfinite(median), median, 0), jnp.where(is_scale, scale, of_constant)
