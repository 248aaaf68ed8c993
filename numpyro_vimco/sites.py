# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What kinds of sites a trace has.

A *score-function site* is a latent guide site whose distribution has no reparameterised sampler
(``has_rsample`` is False): no gradient flows through its sample. All other latent guide sites are *path sites*;
:func:`is_drawn` tells which of them a doubly reparameterised gradient may treat as draws from a fixed density.

A private part of NumPyro's distributions is read, in :func:`mask_of` only; it was seen in NumPyro 0.20, the oldest that
is admitted, and in 0.22.
"""

from collections.abc import Callable, Collection
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints

from numpyro_vimco.compilation import map_arrays
from numpyro_vimco.private.of_numpyro import own_mask

Trace = dict[str, dict]
# Distributions that only reshape or mask another one.
WRAPPERS = dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution


def sample_sites(tr: Trace) -> list[dict]:
    """The sample sites of a trace."""
    return [site for site in tr.values() if site["type"] == "sample"]


def is_latent_site(site: dict) -> bool:
    """Whether ``site`` is latent."""
    return site["type"] == "sample" and not site["is_observed"]


def is_marked(site: dict) -> bool:
    """Whether ``site`` is latent and finite, and marked to be summed out: ``infer={"enumerate": "parallel"}``.

    A site that is marked and sampled by the guide is sampled.
    """
    return is_latent_site(site) and site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support


def is_discrete(site: dict) -> bool:
    """Whether a site is discrete; True for a distribution that does not know its support."""
    support = support_of(site["fn"])
    return True if support is None else support.is_discrete


def without_plates(tr: Trace, names: Collection[str]) -> Trace:
    """A trace in which some sites are in no plate: their elements are those of a vector."""
    return {name: {**site, "cond_indep_stack": []} if name in names else site for name, site in tr.items()}


def states(fn: dist.Distribution) -> np.ndarray:
    """The values that a distribution can have, of shape ``(states,)``; empty if NumPyro cannot enumerate them.

    It cannot where elements have different ones, such as a Binomial of several numbers of trials, or bounds that are
    traced; of vectors they are not asked for.
    """
    if not fn.has_enumerate_support or fn.event_dim:
        return np.empty(0)
    try:
        with jax.ensure_compile_time_eval():
            return np.ravel(fn.enumerate_support(expand=False))
    except (NotImplementedError, jax.errors.JAXTypeError):
        return np.empty(0)


def can(method: Callable, argument: Array) -> bool:
    """Whether a distribution has a method: an improper prior cannot be sampled, nor some flows be inverted."""
    try:
        jax.eval_shape(method, argument)
    except NotImplementedError:
        return False
    return True


def log_prob_at_value(site: dict) -> Array:
    """Log-density of a site at its value, in nats, without its scale.

    NumPyro checks an array of NumPy by NumPy, which fails where JAX traces the bounds of the support, as
    those of a ``Binomial`` with a latent count. So data become arrays of JAX here.
    """
    value = jnp.asarray(site["value"])
    return site["fn"].log_prob(value, site["intermediates"]) if site["intermediates"] else site["fn"].log_prob(value)


def is_score_function_site(site: dict) -> bool:
    """Whether ``site`` is latent and its distribution has no reparameterised sampler.

    A discrete distribution or a mixture never has one, whatever its ``has_rsample`` says: that is True by default
    for a distribution without ``arg_constraints``, which mixtures were before NumPyro 0.22.
    """
    if not is_latent_site(site):
        return False
    fn = site["fn"]
    if not fn.has_rsample or getattr(fn.support, "is_discrete", False):
        return True
    return any(isinstance(base, (dist.MixtureSameFamily, dist.MixtureGeneral)) for base in base_distributions(fn))


def is_drawn(site: dict) -> bool:
    """Whether ``site`` is latent, and has a density that a doubly reparameterised gradient may hold fixed.

    The other latent sites keep plain gradients. These are Delta sites, which are functions of parameters and of other
    samples; distributions whose support may move with a parameter, as the mean of their score is then not zero; and
    masked distributions, which have no score.
    """
    if not is_latent_site(site):
        return False
    if is_score_function_site(site):
        return True
    bases = base_distributions(site["fn"])
    return (
        not isinstance(bases[-1], dist.Delta)
        and not any(isinstance(base, dist.MaskedDistribution) for base in bases)
        and has_fixed_support(site["fn"])
    )


def has_fixed_support(fn: dist.Distribution) -> bool:
    """Whether the support of a distribution is known not to move with its parameters, by the whole chain of transforms.

    A transform with parameters is admitted only after all of the reals, since the codomain that ``AffineTransform`` and
    others declare does not depend on what they are applied to. Numbers that are no JAX arrays are constants.
    Distributions and transforms that are defined outside of NumPyro may have any support.
    """
    if isinstance(fn, WRAPPERS):
        return has_fixed_support(fn.base_dist)
    if not all(is_of_numpyro(_definer(type(fn), name)) for name in ("support", "sample", "log_prob")):
        return False
    if not isinstance(fn, dist.TransformedDistribution):
        return support_of(fn) is not None and not _has_arrays(fn.support)
    everywhere = is_real(support_of(fn.base_dist))
    for transform in _parts(fn.transforms):
        if not is_of_numpyro(type(transform)) or (_has_arrays(transform) and not everywhere):
            return False
        everywhere = everywhere and _is_onto_reals(transform)
    return has_fixed_support(fn.base_dist)


def is_real(support: constraints.Constraint | None) -> bool:
    """Whether a support is all of the reals, or vectors or matrices of them."""
    return base_support(support) in (constraints.real, constraints.real_vector, constraints.real_matrix)


def _is_onto_reals(transform: dist.transforms.Transform) -> bool:
    try:
        return is_real(transform.codomain)
    except NotImplementedError:
        return False


def support_of(fn: dist.Distribution) -> constraints.Constraint | None:
    """The support of a distribution, or None if it does not know."""
    try:
        return fn.support
    except NotImplementedError:
        return None


def bounds_of(support: Any) -> list[Any]:
    """The numbers and arrays that a support is made of, without its event dimensions; none for None."""
    base = base_support(support)
    return jax.tree.leaves(vars(base)) if base else []


def base_support(support: Any) -> Any:
    """A support without its event dimensions; None for None."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_count(support: Any) -> bool:
    """Whether a support is of integers from some one on."""
    return isinstance(base_support(support), constraints.integer_greater_than)


def support_leaves(support: Any) -> list:
    """The bounds of a support; none of a user's that does not tell JAX what it holds."""
    try:
        return jax.tree.leaves(support)
    except NotImplementedError:
        return []


def _parts(transforms) -> list:
    """Transforms one by one, in the order in which they are applied."""
    found = []
    for transform in transforms:
        composed = isinstance(transform, dist.transforms.ComposeTransform)
        found += _parts(transform.parts) if composed else [transform]
    return found


def _has_arrays(tree: Any) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def _definer(cls: type, name: str) -> type:
    return next((base for base in cls.__mro__ if name in vars(base)), cls)


def is_of_numpyro(cls: type) -> bool:
    """Whether a class is one of NumPyro's, or of this package."""
    return cls.__module__.partition(".")[0] in ("numpyro", "numpyro_vimco")


def is_delta(site: dict) -> bool:
    """Whether a latent site has a single value."""
    return is_latent_site(site) and isinstance(unwrapped(site["fn"]), dist.Delta)


def element_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Names of the elements of an array: ``name[i,j]``, or the name alone for a scalar."""
    return [name + (f"[{','.join(map(str, index))}]" if index else "") for index in np.ndindex(*shape)]


def with_fixed_parameters(fn: dist.Distribution) -> dist.Distribution:
    """A distribution whose parameters have no gradient, so that its sampler is not differentiated.

    It would be for nothing where the gradient of the draw is stopped, and JAX 0.10.1 fails at samplers with loops.
    """
    return map_arrays(jax.lax.stop_gradient, fn)


def mask_of(fn: dist.Distribution) -> tuple[Array, int] | None:
    """Which elements of a distribution are not masked; None if it has no mask.

    :return: booleans, and the number k of event dimensions among their dimensions: they broadcast against the batch
        dimensions followed by the first k event dimensions.
    """
    if isinstance(fn, dist.MaskedDistribution):
        inner, own = mask_of(fn.base_dist), own_mask(fn)
        if own is True:
            return inner
        own = jnp.zeros(fn.batch_shape, bool) if own is False else own
        return (own, 0) if inner is None else (own.reshape(own.shape + (1,) * inner[1]) & inner[0], inner[1])
    if isinstance(fn, dist.ExpandedDistribution):
        return mask_of(fn.base_dist)
    if isinstance(fn, dist.Independent):
        inner = mask_of(fn.base_dist)
        return inner and (inner[0], inner[1] + fn.reinterpreted_batch_ndims)
    return None


def unmasked(fn: dist.Distribution) -> dist.Distribution:
    """A distribution without its masks."""
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = copy(fn)
        fn.base_dist = unmasked(fn.base_dist)
    return fn


def unwrapped(fn: dist.Distribution) -> dist.Distribution:
    """A distribution without the wrappers that only reshape or mask it."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def base_distributions(fn: dist.Distribution) -> list[dist.Distribution]:
    """A distribution and those that it wraps."""
    found = [fn]
    while hasattr(found[-1], "base_dist"):
        found.append(found[-1].base_dist)
    return found
