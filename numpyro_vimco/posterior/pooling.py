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

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace

from numpyro_vimco.objectives.levels import Levels, level_of, map_levels
from numpyro_vimco.objectives.plates import Structure
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.proposals import (
    Draw,
    Sampler,
    check_independent,
    choose,
    merged,
    program_of,
    structure_of,
)
from numpyro_vimco.posterior.widening import Widened
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import Trace, is_delta, is_latent_site, sample_sites

# Of ten draws so many come from the guide of a start, and from its widened copy.
OWN, WIDENED = 7, 3

Values = dict[str, Array]
Bool = Array | np.ndarray | bool


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
        deltas = program_of(self.fit, {}).deltas_at_parameters(self.fit.params, random.key(0))
        for name, parents in deltas.items():
            if of_guide := parents - self.fit.of_model.keys():
                raise NotImplementedError(
                    f"Site '{name}' of the guide is a Delta whose value depends on the parameter '{min(of_guide)}', so "
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
        return self.fit.num_starts

    @property
    def log_shares(self) -> Array:
        """Logarithm of the share of the draws that each component takes, of shape ``(components,)``."""
        return jnp.log(np.repeat([OWN, WIDENED], self.num_starts) / (OWN + WIDENED) / self.num_starts)

    def local_counts(self, plate: str) -> tuple[int, int]:
        """How many local particles of a plate each start takes, and each widened copy; one at least."""
        each = self.fit.plate_particles[plate] / self.num_starts / (OWN + WIDENED)
        return max(round(OWN * each), 1), max(round(WIDENED * each), 1)

    def trace_guide(self, wide: Bool, params: dict[str, Any], rng_key: Array, given: Values | None = None) -> Trace:
        """A draw of a component, with one particle for each local element.

        :param wide: whether of the widened copy.
        :param given: values of some sites.
        """
        guide = seed(
            substitute(Widened(self.fit.svi.guide, wide), data={**params, **self.fit.of_model, **(given or {})}),
            rng_key,
        )
        return trace(guide).get_trace(*self.fit.args, **self.fit.kwargs)

    def draw(self, wide: Bool, params: dict[str, Any], rng_key: Array) -> Levels[Values]:
        """A draw of a component, with local particles of all components; sites that are Delta are left out.

        :param params: of the component.
        """
        shared_key, local_key = split(rng_key)
        plates = self.fit.plate_particles

        def values_of(tr: Trace, level: str | None) -> Values:
            return {name: value for name, value in drawn(tr).items() if level_of(tr[name], plates) == level}

        shared = values_of(self.trace_guide(wide, params, shared_key), None)
        local: dict[str, Values] = {}
        for plate, key in split_by_name(local_key, plates).items():
            wide_of_each = np.repeat([False, True], self.local_counts(plate))

            def particle(wide, params, rng_key, plate=plate):
                return values_of(self.trace_guide(wide, params, rng_key, shared), plate)

            of_start = jax.vmap(particle, in_axes=(0, None, 0))
            keys = split(key, (self.num_starts, len(wide_of_each)))
            found = jax.vmap(of_start, in_axes=(None, 0, 0))(wide_of_each, self.params, keys)
            local[plate] = merged(found)
        return Levels(shared, local)

    def densities(self, values: Levels[Values]) -> tuple[Levels[tuple[Array, Array]], Structure]:
        """Log p and the mixture's log q, of what is shared and of all local particles.

        :param values: as of :meth:`draw`.
        """
        structures: list[Structure] = []

        number = {name: len(next(iter(local.values()))) for name, local in values.local.items()}

        def under(wide: Bool, params: dict[str, Any]) -> Levels[tuple[Array, Array]]:
            program = replace(program_of(self.fit, number), guide=Widened(self.fit.svi.guide, wide))
            # The key is not used: all sites that are drawn have their value.
            levels, structure = program.densities({**params, **self.fit.of_model}, random.key(0), values)
            structures.append(structure)
            return map_levels(lambda densities: (densities.model, densities.log_guide), levels)

        of_starts = jax.vmap(under, in_axes=(None, 0), axis_size=self.num_starts)
        levels = merged(jax.vmap(of_starts, in_axes=(0, None))(np.array([False, True]), self.params))

        def mixed(densities: tuple[Array, Array], log_shares: Array) -> tuple[Array, Array]:
            log_p, log_q = densities
            shares = log_shares.reshape(-1, *(1,) * (log_q.ndim - 1))
            return log_p[0], logsumexp(shares + log_q, axis=0)

        local = {}
        for name in values.local:
            counts = np.repeat(self.local_counts(name), self.num_starts)
            local[name] = mixed(levels.local[name], jnp.log(counts / counts.sum()))
        return Levels(mixed(levels.shared, self.log_shares), local), structures[0]


def drawn(tr: Trace) -> Values:
    """The values of the latents of a guide that are no Delta."""
    return {site["name"]: site["value"] for site in sample_sites(tr) if is_latent_site(site) and not is_delta(site)}


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

    def particle(start: Array, params: dict[str, Any], wide: Array, rng_key: Array) -> Draw:
        draw_key, choice_key, rest_key = split(rng_key, 3)
        values = mixture.draw(wide, params, draw_key)
        levels, structure = mixture.densities(values)
        log_p, log_q = levels.shared
        draws = Levels(
            Draw(values.shared, log_p, log_q, log_ratio(log_p, log_q), start + wide * num_starts),
            {name: Draw(values.local[name], p, q, log_ratio(p, q)) for name, (p, q) in levels.local.items()},
        )
        chosen = choose(draws, choice_key, structure, event_dims)
        # The guide once more, for the sites that are functions of these.
        tr = mixture.trace_guide(wide, params, rest_key, chosen.values)
        latents = [site for site in sample_sites(tr) if is_latent_site(site) and site["name"] in fit.model_trace]
        return chosen._replace(values={site["name"]: site["value"] for site in latents})

    event_dims: dict[str, int] = {}

    def look(params: dict[str, Any], rng_key: Array) -> None:
        tr = mixture.trace_guide(False, params, rng_key)
        event_dims.update((site["name"], site["fn"].event_dim) for site in sample_sites(tr))

    jax.eval_shape(look, jax.tree.map(lambda leaf: leaf[0], params), random.key(0))

    def draw(rng_key: Array) -> Draw:
        order_key, draw_key = split(rng_key)
        wide = np.repeat([False, True], [OWN, WIDENED])

        def of_start(inputs):
            start, params, keys = inputs
            return jax.lax.map(lambda x: particle(start, params, *x), (wide, keys), batch_size=min(at_once, len(wide)))

        inputs = jnp.arange(num_starts), params, split(draw_key, (num_starts, len(wide)))
        draws = merged(jax.lax.map(of_start, inputs))
        order = random.permutation(order_key, size)
        return jax.tree.map(lambda x: x[order], draws)

    program = program_of(fit, plates)
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
