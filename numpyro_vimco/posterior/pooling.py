# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Draws from the guides of several starts, weighted with the density of their mixture.

With :math:`\pi_k` the share of the draws that come from guide k, every draw has the weight
:math:`w(z) = p(x, z) / \sum_k \pi_k q_k(z)`, whichever guide it is from: the balance heuristic [1]. Its mean is p(x),
and it is large only where *no* guide proposes enough: what one start lost, another proposes. Of each guide there is
also a *widened* copy (:mod:`~numpyro_vimco.posterior.widening`), for the tails; it may be any distribution, as its
density is in the mixture. Since :math:`1 / w = \sum_k \pi_k / w_k`, the log-weights under each guide are all that is
needed.

- Where plates are common to all sites, guides factorise over their elements, and so does the mixture: each element has
  a weight, with a mixture of its own.
- Where a plate has particles of its own (derived here), what is shared, g, comes from the mixture of the guides'
  :math:`q_k(g)`; for each element i there are then :math:`M_k` local particles from every :math:`q_k(e_i | g)`,
  weighted with :math:`v_{im} = p(x_i, e_{im} | g) / \sum_k (M_k / M) q_k(e_{im} | g)`. Given g, the mean of
  :math:`v_{im}` over all M particles is an unbiased estimate of :math:`p(x_i | g)`, so that
  :math:`\hat Z = p(g) / q(g) \prod_i \frac1M \sum_m v_{im}` is one of p(x), and g with one particle for each element,
  chosen in proportion to :math:`v_{im}`, is properly weighted by it. Which guide proposed g has no part in this.

1. Veach and Guibas 1995, *Optimally Combining Sampling Techniques for Monte Carlo Rendering*; Owen and Zhou 2000, *Safe
   and Effective Importance Sampling*, for mixtures with fixed shares
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro import distributions as dist
from numpyro.handlers import seed, substitute, trace

from numpyro_vimco.dependence import dependence
from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.objectives.levels import Levels, level_of
from numpyro_vimco.objectives.plates import Structure
from numpyro_vimco.objectives.program import Program
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.proposals import take
from numpyro_vimco.posterior.widening import Widened
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import Trace, is_latent_site, sample_sites, unwrapped

# The share of the draws that come from widened copies.
WIDENED_SHARE = 0.3

Values = dict[str, Array]


@dataclass(frozen=True)
class Pooled:
    """Draws from the mixture of all guides; arrays have a leading axis for them.

    :ivar values: of each latent, of shape ``(N, *batch, *event)``.
    :ivar log_weight: of shape ``(N, *plates)``, of size 1 where a plate is not common to all sites; in nats.
    :ivar component: which guide a draw is from: first those of the starts, then the widened copies in the same order.
    :ivar structure: what plates those are.
    """

    values: dict[str, np.ndarray]
    log_weight: np.ndarray
    component: np.ndarray
    structure: Structure


@dataclass(frozen=True)
class Mixture:
    """The guides of several starts and their widened copies: its *components*.

    :ivar fit: for the model, its arguments, and its parameters, which are the target's.
    :ivar params: of all starts, with a leading axis for them.
    """

    fit: Fitted
    params: dict[str, Any]

    def __post_init__(self) -> None:
        """Raise unless each guide has a density at the draws of the others.

        :raises NotImplementedError: for a Delta site whose value depends on parameters.
        """
        params = self.params_of(0)
        values = drawn(self.trace_guide(False, params, random.key(0)))

        def deltas(params):
            found = self.trace_guide(False, params, random.key(0), values)
            return {site["name"]: site["value"] for site in sample_sites(found) if _is_delta(site)}

        for name, parents in dependence(deltas, params).items():
            if parents:
                raise NotImplementedError(
                    f"Site '{name}' of the guide is a Delta whose value depends on the parameter '{min(parents)}', so "
                    "that the guide of one start has no density at the draws of another, and they cannot be pooled. "
                    "Look at each start by itself, or give the site a distribution."
                )

    @property
    def num_starts(self) -> int:
        """Number of starts; there are twice as many components."""
        return len(jax.tree.leaves(self.params)[0])

    @property
    def of_model(self) -> dict[str, Any]:
        """Parameters of the model, which all components share."""
        return {name: self.fit.params[name] for name, site in self.fit.model_trace.items() if site["type"] == "param"}

    def params_of(self, start: int) -> dict[str, Any]:
        """Parameters of a start, with those of the model as they are in ``fit``."""
        return {**jax.tree.map(lambda leaf: leaf[start], self.params), **self.of_model}

    def counts(self, number: int) -> tuple[int, int]:
        """How many of about ``number`` draws each start takes, and each widened copy; one at least."""
        each = number / self.num_starts
        return max(round((1 - WIDENED_SHARE) * each), 1), max(round(WIDENED_SHARE * each), 1)

    def log_shares(self, number: int) -> Array:
        """Logarithm of the share of the draws that each component takes, of shape ``(components,)``."""
        counts = np.repeat(self.counts(number), self.num_starts)
        return jnp.log(counts / counts.sum())

    def guide(self, wide: bool) -> Callable:
        """The guide, or its widened copy."""
        return Widened(self.fit.svi.guide) if wide else self.fit.svi.guide

    def trace_guide(self, wide: bool, params: dict[str, Any], rng_key: Array, given: Values | None = None) -> Trace:
        """A draw of a component, with one particle for each local element.

        :param given: values of some sites.
        """
        guide = seed(substitute(self.guide(wide), data={**params, **self.of_model, **(given or {})}), rng_key)
        return trace(guide).get_trace(*self.fit.args, **self.fit.kwargs)

    def draw(self, wide: bool, params: dict[str, Any], rng_key: Array) -> Levels[Values]:
        """A draw of a component, with local particles of all components; sites that are Delta are left out.

        :param params: of the component.
        """
        rng_key, *wide_keys = split(rng_key, 3)
        plates = self.fit.plate_particles

        def shared_of(tr: Trace) -> Values:
            return {name: value for name, value in drawn(tr).items() if level_of(tr[name], plates) is None}

        shared = shared_of(self.trace_guide(wide, params, rng_key))
        local: dict[str, Values] = {}
        for is_wide, wide_key in zip((False, True), wide_keys):
            for plate, key in split_by_name(wide_key, plates).items():

                def particle(params, key, plate=plate, is_wide=is_wide):
                    tr = self.trace_guide(is_wide, params, key, shared)
                    return {name: value for name, value in drawn(tr).items() if level_of(tr[name], plates) == plate}

                number = self.counts(plates[plate])[is_wide]
                keys = split(key, (self.num_starts, number))
                found = jax.vmap(jax.vmap(particle, in_axes=(None, 0)))(self.params, keys)
                flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in found.items()}
                before = local.get(plate, {name: value[:0] for name, value in flat.items()})
                local[plate] = {name: jnp.concatenate([before[name], value]) for name, value in flat.items()}
        return Levels(shared, local)

    def log_weights(self, values: Levels[Values], log_shares: Array) -> tuple[Levels[Array], Structure]:
        """Log-weights under the mixture, of what is shared and of all local particles.

        :param values: as of :meth:`draw`.
        :param log_shares: of draws, of shape ``(components,)``; those of local particles follow from their numbers.
        """
        number = {name: len(next(iter(local.values()))) for name, local in values.local.items()}
        structures: list[Structure] = []

        def under(program: Program, params: dict[str, Any]) -> Levels[Array]:
            # The key is not used: all sites that are drawn have their value.
            levels, structure = program.log_weights({**params, **self.of_model}, random.key(0), values)
            structures.append(structure)
            return levels

        of_guides = [
            jax.vmap(partial(under, _program(self.fit, self.guide(wide), number)))(self.params)
            for wide in (False, True)
        ]
        log_weight = jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_guides)
        local = {
            name: mixed(level, self.log_shares(self.fit.plate_particles[name]))
            for name, level in log_weight.local.items()
        }
        return Levels(mixed(log_weight.shared, log_shares), local), structures[0]


def mixed(log_weight: Array, log_shares: Array) -> Array:
    """Log-weights under the mixture, from those under its components: 1 / w = Σ π_k / w_k.

    :param log_weight: of shape ``(components, *shape)``.
    :param log_shares: of shape ``(components,)``.
    """
    shares = log_shares.reshape(-1, *(1,) * (log_weight.ndim - 1))
    # Where the model rules a value out, a component that does not propose it either has the weight 0 / 0.
    impossible = jnp.isneginf(log_weight).any(0)
    return jnp.where(impossible, -jnp.inf, -logsumexp(shares - log_weight, axis=0))


def drawn(tr: Trace) -> Values:
    """The values of the latents of a guide that are no Delta."""
    return {site["name"]: site["value"] for site in sample_sites(tr) if is_latent_site(site) and not _is_delta(site)}


def _is_delta(site: dict) -> bool:
    return is_latent_site(site) and isinstance(unwrapped(site["fn"]), dist.Delta)


def _program(fit: Fitted, guide: Callable, plate_particles: dict[str, int]) -> Program:
    joint_plates: frozenset[str] = getattr(fit.svi.loss, "joint_plates", frozenset())
    args = fit.svi.model, guide, fit.args, fit.kwargs
    return Program(*args, lambda site: False, plate_particles, joint_plates, linear=False)


def pool(fit: Fitted, params: dict[str, Any], rng_key: Array, num_draws: int) -> Pooled:
    """Draw from the guides of several starts, and weight the draws with the density of their mixture.

    :param fit: one of the starts: the target is the posterior at its parameters of the model.
    :param params: parameters of all starts, with a leading axis for them.
    :param num_draws: about so many draws: each start takes as many, and each widened copy.
    :raises NotImplementedError: for a guide with a Delta site whose value depends on parameters.
    """
    mixture = Mixture(fit, params)
    log_shares = mixture.log_shares(num_draws)
    structures: list[Structure] = []
    sites = sample_sites(mixture.trace_guide(False, mixture.params_of(0), random.key(0)))
    event_dims = {site["name"]: site["fn"].event_dim for site in sites}

    def particle(wide: bool, params: dict[str, Any], rng_key: Array) -> tuple[Values, Array]:
        draw_key, choice_key, rest_key = split(rng_key, 3)
        values = mixture.draw(wide, params, draw_key)
        levels, structure = mixture.log_weights(values, log_shares)
        structures.append(structure)
        log_weight, given = levels.shared, dict(values.shared)
        for plate, key in split_by_name(choice_key, values.local).items():
            log_weight = log_weight + structure.sum_to_shared(cv.log_mean_weight(levels.local[plate]))
            chosen = random.categorical(key, levels.local[plate], axis=0)[None]
            for name, value in values.local[plate].items():
                given[name] = take(value, chosen, event_dims[name])[0]
        # The guide once more, for the sites that are functions of these.
        tr = mixture.trace_guide(wide, params, rest_key, given)
        latents = [site for site in sample_sites(tr) if is_latent_site(site) and site["name"] in fit.model_trace]
        return {site["name"]: site["value"] for site in latents}, log_weight

    draws = []
    counts = np.repeat(mixture.counts(num_draws), mixture.num_starts)
    size = max(fit.chunk_size() // len(counts), 1)
    for wide, keys in zip((False, True), split(rng_key)):
        compiled = jax.jit(jax.vmap(partial(particle, wide), in_axes=(None, 0)))
        for start, key in enumerate(split(keys, mixture.num_starts)):
            own = split(key, mixture.counts(num_draws)[wide])
            params_of_start = mixture.params_of(start)
            for begin in range(0, len(own), size):
                draws.append(jax.device_get(compiled(params_of_start, own[begin : begin + size])))
    values, log_weight = jax.tree.map(lambda *parts: np.concatenate(parts), *draws)
    return Pooled(values, log_weight.astype(float), np.repeat(np.arange(len(counts)), counts), structures[0])
