# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What the data say of counts, before a fit.

Their least values: a survey of 12 animals, and no fewer were there. A guide begins above them. In a chain it proposes
nothing below them, as one step with impossible values leaves no possible path; so a bound is taken only where the
observed site depends on no other discrete latent, and trials at other values of all elements agree.

And where the guide of a chain begins: at draws of the prior, weighted by the data of their own step. Draws of the prior
alone spread over orders of magnitude where a population grows by an unknown rate for sixty years.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np

from numpyro_vimco.compilation import ONCE, Compiled
from numpyro_vimco.dependence import dependence
from numpyro_vimco.families.couplings import log_densities
from numpyro_vimco.sites import Trace, base_support, is_count, is_discrete, is_latent_site, support_of

# Counts are looked for up to this size. Values below a bound are tried at so many points, and in subsets of the
# elements, where the others are so many times the size that is certainly possible.
LARGEST, POINTS, SUBSETS = 2**24, 32, (1, 1, 4, 64, 1024)
# Less than the log-density of what is possible.
FLOOR = -1e30
# Weights of draws of the prior are raised to the largest of these powers with which so many draws count.
POWERS, EFFECTIVE = (*(0.5**i for i in range(16)), 0.0), 25

Samples = dict[str, Array]


@dataclass(frozen=True)
class Data:
    """A model with its data.

    :ivar tr: a trace of it.
    :ivar evaluate: from latents to the log-density of each site.
    :ivar latents: their values in the trace.
    :ivar observed: of each observed site, the discrete latents that its density depends on.
    """

    tr: Trace
    evaluate: Callable[[Samples], Samples]
    latents: Samples
    observed: dict[str, set[str]]

    @classmethod
    def of(cls, model: Callable, args: tuple, kwargs: dict, tr: Trace) -> "Data":
        """The data of a model, by one trace of shapes."""
        latents = {name: site["value"] for name, site in tr.items() if is_latent_site(site)}
        discrete = {name for name in latents if is_discrete(tr[name])}
        evaluate = log_densities(model, args, kwargs)
        factors = dependence(evaluate, latents)
        observed = {site: parents & discrete for site, parents in factors.items() if tr[site]["is_observed"]}
        return cls(tr, evaluate, latents, observed)

    def of_shape(self, latents: set[str]) -> list[str]:
        """The observed sites that depend on some of these discrete latents, on no others, and have their shape."""
        shapes = {jnp.shape(self.latents[name]) for name in latents}
        own = [site for site, parents in self.observed.items() if parents and parents <= latents]
        return [site for site in own if {jnp.shape(self.tr[site]["value"])} == shapes]

    def is_traced(self, draws: Mapping[str, Array]) -> bool:
        """Whether JAX traces these latents or draws of them, so that nothing can be compared."""
        return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self.latents, dict(draws))))


def least_values(data: Data, prior_draws: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """For counts without an upper bound, the least values that the data admit, of the shape of the site's value.

    :param prior_draws: of the counts, with a leading axis.
    """
    if data.is_traced(prior_draws):
        return {}
    found = {}
    for name, draws in prior_draws.items():
        support = base_support(support_of(data.tr[name]["fn"]))
        own = [site for site, parents in data.observed.items() if parents == {name}]
        if not own or not is_count(support):
            continue
        low = np.broadcast_to(np.asarray(support.lower_bound), jnp.shape(data.latents[name]))

        def possible(value: Array, name=name, own=own) -> Array:
            densities = data.evaluate({**data.latents, name: value})
            return jnp.concatenate([jnp.ravel(densities[site] > FLOOR) for site in own])

        least = _least(Compiled(possible, ONCE), low, np.asarray(draws).max(0))
        if least is not None:
            found[name] = least
    return found


def near_data(data: Data, homes: Mapping[str, str], draws: Mapping[str, Array]) -> dict[str, Array]:
    """Draws of the latents of chains, each step from draws of the prior in proportion to the density of its data.

    The data of a step are observed sites that depend on latents of the chain, and on no other discrete ones. They must
    have the shape of the latents, so that each element has its own weights.

    :param homes: the chain of each latent.
    :param draws: of the prior of all latents, jointly, with a leading axis.
    """
    if data.is_traced(draws):
        return {}
    found: dict[str, Array] = {}
    for chain in sorted(set(homes.values())):
        own = {name for name, home in homes.items() if home == chain and is_discrete(data.tr[name])}
        sites = data.of_shape(own)
        if not sites:
            continue

        def of_data(values: Samples, sites: list[str] = sites) -> Array:
            densities = data.evaluate(values)
            return sum(densities[site] for site in sites)  # type: ignore[return-value]

        log_weight = np.asarray(Compiled(jax.vmap(of_data), ONCE)(dict(draws)), float)
        is_possible = np.isfinite(log_weight) & (log_weight > FLOOR)
        index = _resampled(np.where(is_possible, log_weight, -np.inf))
        found |= {name: jnp.asarray(np.take_along_axis(np.asarray(draws[name]), index, axis=0)) for name in own}
    return found


def _resampled(log_weight: np.ndarray) -> np.ndarray:
    """For each element, numbers of draws in proportion to tempered weights; all draws as they are where none counts."""
    number = len(log_weight)
    largest = log_weight.max(0)
    relative = np.where(np.isneginf(largest), 0, log_weight - np.where(np.isneginf(largest), 0, largest))
    possible = ~np.isneginf(relative)
    weight = np.zeros_like(relative)
    is_left = np.ones(largest.shape, bool)
    for power in POWERS:
        tempered = np.where(possible, np.exp(power * np.where(possible, relative, 0)), 0)
        ess = tempered.sum(0) ** 2 / (tempered**2).sum(0)
        is_enough = is_left & ((ess >= np.minimum(EFFECTIVE, 0.99 * possible.sum(0))) | (power == 0))
        weight = np.where(is_enough, tempered, weight)
        is_left &= ~is_enough
    cumulative = np.cumsum(weight, axis=0) / weight.sum(0)
    index = np.stack([((i + 0.5) / number > cumulative).sum(0) for i in range(number)])
    return np.minimum(index, number - 1)


def _least(possible: Callable, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """The least possible value of each element between two; None if there is none, or elements are not independent.

    :param possible: from the value of all elements to whether each datum is possible.
    """

    def is_bad(value: np.ndarray) -> Bool[np.ndarray, "..."]:
        return ~np.asarray(possible(jnp.asarray(value, jnp.result_type(int))))

    low, high = low.astype(int), np.maximum(high, low).astype(int)
    while is_bad(high).any():
        if high.max() > LARGEST:
            return None
        high = low + 2 * (high - low) + 1
    # A datum belongs to the one element that makes it impossible: digit by digit of the element's number.
    number = np.arange(low.size).reshape(low.shape)
    owner, has_owner = np.asarray(0), np.asarray(True)
    for digit in range(max(1, low.size.bit_length())):
        is_one = (number >> digit) & 1
        of_one, of_zero = is_bad(np.where(is_one, low, high)), is_bad(np.where(is_one, high, low))
        owner, has_owner = owner | (of_one.astype(int) << digit), has_owner & (of_one ^ of_zero)

    def at(value: np.ndarray) -> Bool[np.ndarray, "..."]:
        return (np.bincount(owner[has_owner & is_bad(value)], minlength=low.size) == 0).reshape(low.shape)

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
    for times in SUBSETS:
        is_below = (rng.random(top.shape) < 0.5) & (top > low)
        others = np.minimum(low + times * (high - low), LARGEST)
        if at(np.where(is_below, top - 1, others))[is_below].any():
            return None
    return top
