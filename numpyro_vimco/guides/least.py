# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The least values of counts in chains that the data admit: a survey of 12 animals, and no fewer were there.

A guide that proposes impossible values at one step of a chain has no possible path. Bounds are taken only where they
hold for sure, as what lies below them is never proposed: the observed site depends on no other discrete latent, and
trials at other values of all steps agree.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np
from numpyro.distributions import constraints

from numpyro_vimco.compilation import ONCE, Compiled
from numpyro_vimco.dependence import dependence
from numpyro_vimco.families.couplings import log_densities
from numpyro_vimco.sites import Trace, is_discrete, is_latent_site, support_of

# Counts are looked for up to this size. Values below a bound are tried at so many points, and steps at so many subsets.
LARGEST, POINTS, SUBSETS = 2**24, 32, 4
# Less than the log-density of what is possible.
FLOOR = -1e30

Samples = dict[str, Array]


def least_values(
    model: Callable, args: tuple, kwargs: dict, tr: Trace, prior_draws: Mapping[str, Array]
) -> dict[str, np.ndarray]:
    """For counts without an upper bound, the least values that the data admit, of the shape of the site's value.

    :param tr: a trace of the model.
    :param prior_draws: of the counts, with a leading axis.
    """
    latents = {name: site["value"] for name, site in tr.items() if is_latent_site(site)}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((latents, prior_draws))):
        return {}
    evaluate = log_densities(model, args, kwargs)
    factors = dependence(evaluate, latents)
    discrete = {name for name in latents if is_discrete(tr[name])}
    found = {}
    for name, draws in prior_draws.items():
        support = support_of(tr[name]["fn"])
        shape = jnp.shape(latents[name])
        own = [
            site
            for site, parents in factors.items()
            if tr[site]["is_observed"] and parents & discrete == {name} and jnp.shape(tr[site]["value"]) == shape
        ]
        if not own or not isinstance(support, constraints.integer_greater_than):
            continue
        low = np.broadcast_to(np.asarray(support.lower_bound), shape)

        def possible(value: Array, name=name, own=own) -> Array:
            densities = evaluate({**latents, name: value})
            return jnp.stack([densities[site] > FLOOR for site in own]).all(0)

        least = _least(Compiled(possible, ONCE), low, np.asarray(draws).max(0))
        if least is not None:
            found[name] = least
    return found


def _least(possible: Callable, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """The least possible value of each element between two; None if there is none, or elements are not independent."""

    def at(value: np.ndarray) -> Bool[np.ndarray, "..."]:
        return np.asarray(possible(jnp.asarray(value, jnp.result_type(int))))

    high = np.maximum(high, low)
    while not (is_possible := at(high)).all():
        if high.max() > LARGEST:
            return None
        high = np.where(is_possible, high, low + 2 * (high - low) + 1)
    bottom, top = low - 1, high
    while (top - bottom > 1).any():
        middle = np.where(top - bottom > 1, (bottom + top) // 2, top)
        is_possible = at(middle)
        bottom, top = np.where(is_possible, bottom, middle), np.where(is_possible, middle, top)
    if (top == low).all():
        return None
    rng = np.random.default_rng(0)
    for fraction in np.linspace(0, 1, POINTS):
        below = low + np.floor(fraction * (top - 1 - low)).astype(low.dtype)
        if at(np.where(top > low, below, top))[top > low].any():
            return None
    for _ in range(SUBSETS):
        is_below = (rng.random(top.shape) < 0.5) & (top > low)
        if (at(np.where(is_below, top - 1, high)) == is_below).any():
            return None
    return top
