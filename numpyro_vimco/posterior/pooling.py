# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Draws from the guides of several starts, weighted with the density of their mixture.

With :math:`\pi_k` the share of the draws that come from guide k, every draw has the weight
:math:`w(z) = p(x, z) / \sum_k \pi_k q_k(z)`, whichever guide it is from: the balance heuristic [1]. Its mean is p(x),
and it is large only where *no* guide proposes enough: what one start lost, another proposes. Of each guide there is
also a *widened* copy (:mod:`~numpyro_vimco.posterior.widening`), for the tails; it may be any distribution, as its
density is in the mixture.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from numpyro_vimco.objectives.levels import Levels, level_of, map_levels
from numpyro_vimco.objectives.plates import Structure
from numpyro_vimco.objectives.program import Program
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.proposals import (
    Draw,
    Sampler,
    check_independent,
    merged,
    program_of,
    structure_of,
    take,
)
from numpyro_vimco.posterior.widening import Widened
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import Trace, is_latent_site, sample_sites, unwrapped

# Of ten draws so many come from the guide of a start, and from its widened copy.
OWN, WIDENED = 7, 3

Values = dict[str, Array]


@dataclass(frozen=True)
class Mixture:
    """The guides of several starts and their widened copies: its *components*, the copies last.

    :ivar fit: of all starts.
    """

    fit: Fitted

    def __post_init__(self) -> None:
        """Raise unless each guide has a density at the draws of the others.

        :raises NotImplementedError: for a Delta site whose value depends on parameters.
        """
        params = jax.tree.map(lambda leaf: leaf[0], self.params)
        values = drawn(self.trace_guide(False, params, random.key(0)))

        def deltas(params):
            found = self.trace_guide(False, params, random.key(0), values)
            return {site["name"]: site["value"] for site in sample_sites(found) if _is_delta(site)}

        for name, parents in dependence(deltas, params).items():
            if parents:
                raise NotImplementedError(
                    f"Site '{name}' of the guide is a Delta whose value depends on the parameter '{min(parents)}', so "
                    "that the guide of one start has no density at the draws of another, and they cannot be pooled. "
                    "Look at each start by itself (`to_arviz(..., pool=False)`, `importance_diagnostics(svi, "
                    "result.best, ...)`), or give the site a distribution."
                )

    @property
    def params(self) -> dict[str, Any]:
        """Of the guides of all starts, with a leading axis for them."""
        return self.fit.params_of_starts

    @property
    def num_starts(self) -> int:
        """Number of starts; there are twice as many components."""
        return len(jax.tree.leaves(self.params)[0]) if self.params else 1

    @property
    def log_shares(self) -> Array:
        """Logarithm of the share of the draws that each component takes, of shape ``(components,)``."""
        return jnp.log(np.repeat([OWN, WIDENED], self.num_starts) / (OWN + WIDENED) / self.num_starts)

    def local_counts(self, plate: str) -> tuple[int, int]:
        """How many local particles of a plate each start takes, and each widened copy; one at least."""
        each = self.fit.plate_particles[plate] / self.num_starts / (OWN + WIDENED)
        return max(round(OWN * each), 1), max(round(WIDENED * each), 1)

    def guide(self, wide: bool) -> Callable:
        """The guide, or its widened copy."""
        return Widened(self.fit.svi.guide) if wide else self.fit.svi.guide

    def trace_guide(self, wide: bool, params: dict[str, Any], rng_key: Array, given: Values | None = None) -> Trace:
        """A draw of a component, with one particle for each local element.

        :param given: values of some sites.
        """
        guide = seed(substitute(self.guide(wide), data={**params, **self.fit.of_model, **(given or {})}), rng_key)
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

                number = self.local_counts(plate)[is_wide]
                keys = split(key, (self.num_starts, number))
                found = jax.vmap(jax.vmap(particle, in_axes=(None, 0)))(self.params, keys)
                flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in found.items()}
                before = local.get(plate, {name: value[:0] for name, value in flat.items()})
                local[plate] = {name: jnp.concatenate([before[name], value]) for name, value in flat.items()}
        return Levels(shared, local)

    def densities(self, values: Levels[Values]) -> tuple[Levels[tuple[Array, Array]], Structure]:
        """Log p and the mixture's log q, of what is shared and of all local particles.

        :param values: as of :meth:`draw`.
        """
        structures: list[Structure] = []

        def under(wide: bool, params: dict[str, Any]) -> Levels[tuple[Array, Array]]:
            # The key is not used: all sites that are drawn have their value.
            number = {name: len(next(iter(local.values()))) for name, local in values.local.items()}
            levels, structure = self.program(wide, number).densities(
                {**params, **self.fit.of_model}, random.key(0), values
            )
            structures.append(structure)
            return map_levels(lambda densities: (densities.model, densities.log_guide), levels)

        of_guides = [jax.vmap(partial(under, wide), axis_size=self.num_starts)(self.params) for wide in (False, True)]
        levels = jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_guides)

        def mixed(densities: tuple[Array, Array], log_shares: Array) -> tuple[Array, Array]:
            log_p, log_q = densities
            shares = log_shares.reshape(-1, *(1,) * (log_q.ndim - 1))
            return log_p[0], logsumexp(shares + log_q, axis=0)

        local = {}
        for name in values.local:
            counts = np.repeat(self.local_counts(name), self.num_starts)
            local[name] = mixed(levels.local[name], jnp.log(counts / counts.sum()))
        return Levels(mixed(levels.shared, self.log_shares), local), structures[0]

    def program(self, wide: bool, plate_particles: Mapping[str, int]) -> Program:
        """The model with a component."""
        return replace(program_of(self.fit, plate_particles), guide=self.guide(wide))


def drawn(tr: Trace) -> Values:
    """The values of the latents of a guide that are no Delta."""
    return {site["name"]: site["value"] for site in sample_sites(tr) if is_latent_site(site) and not _is_delta(site)}


def _is_delta(site: dict) -> bool:
    return is_latent_site(site) and isinstance(unwrapped(site["fn"]), dist.Delta)


def pooled(fit: Fitted) -> Sampler:
    """Draws from the guides of several starts, weighted with the density of their mixture.

    A key gives seven draws of the guide of each start and three of its widened copy, in random order.

    :raises NotImplementedError: for a guide with a Delta site whose value depends on parameters.
    """
    mixture = Mixture(fit)
    plates = fit.plate_particles
    num_starts, params = mixture.num_starts, mixture.params
    size = (OWN + WIDENED) * num_starts
    # The guides' densities are evaluated for all components at a time.
    at_once = max(fit.chunk_size() // (2 * num_starts), 1)

    def particle(wide: bool, start: Array, params: dict[str, Any], rng_key: Array) -> Draw:
        draw_key, choice_key, rest_key = split(rng_key, 3)
        values = mixture.draw(wide, params, draw_key)
        levels, structure = mixture.densities(values)
        log_p, log_q = levels.shared
        log_weight, given = log_ratio(log_p, log_q), dict(values.shared)
        for plate, key in split_by_name(choice_key, values.local).items():
            local_p, local_q = levels.local[plate]
            local_weight = log_ratio(local_p, local_q)
            log_weight = log_weight + structure.sum_to_shared(cv.log_mean_weight(local_weight))
            chosen = random.categorical(key, local_weight, axis=0)[None]
            for name, value in values.local[plate].items():
                given[name] = take(value, chosen, event_dims[name])[0]
            log_p = log_p + structure.sum_to_shared(take(local_p, chosen)[0])
            log_q = log_q + structure.sum_to_shared(take(local_q, chosen)[0])
        # The guide once more, for the sites that are functions of these.
        tr = mixture.trace_guide(wide, params, rest_key, given)
        latents = [site for site in sample_sites(tr) if is_latent_site(site) and site["name"] in fit.model_trace]
        return Draw(
            {site["name"]: site["value"] for site in latents}, log_p, log_q, log_weight, start + wide * num_starts
        )

    first = jax.tree.map(lambda leaf: leaf[0], params)
    sites = sample_sites(mixture.trace_guide(False, first, random.key(0)))
    event_dims = {site["name"]: site["fn"].event_dim for site in sites}

    def draw(rng_key: Array) -> Draw:
        order_key, *keys = split(rng_key, 3)
        parts = []
        for wide, number, key in zip((False, True), (OWN, WIDENED), keys):

            def of_start(inputs, wide=wide, number=number):
                start, params, keys = inputs
                return jax.lax.map(partial(particle, wide, start, params), keys, batch_size=min(at_once, number))

            draws = jax.lax.map(of_start, (jnp.arange(num_starts), params, split(key, (num_starts, number))))
            parts.append(merged(draws, num_starts * number))
        order = random.permutation(order_key, size)
        return jax.tree.map(lambda *x: jnp.concatenate(x)[order], *parts)

    program = mixture.program(False, plates)
    check_independent(program, fit)
    return Sampler(draw, size, max(at_once // size, 1), structure_of(program, fit))


def log_ratio(log_p: Array, log_q: Array) -> Array:
    """Log-weights: -inf where p is 0, whatever q is, also where no component proposes what the model rules out."""
    return jnp.where(jnp.isneginf(log_p), -jnp.inf, log_p - log_q)


def propose_pooled(sampler: Sampler, rng_key: Array, num_draws: int, progress: str | None = None) -> Draw:
    """So many draws of :func:`pooled`, as NumPy arrays with a leading axis.

    :raises ValueError: for NaN weights, and where all are zero.
    """
    return merged(sampler.all(rng_key, -(-num_draws // sampler.size), progress), num_draws)
