# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Draws from the guides of several starts, defended, weighted with the density of their mixture.

With :math:`\pi_k` the share of the draws that come from guide k, every draw has the weight
:math:`w(z) = p(x, z) / \sum_k \pi_k q_k(z)`, whichever guide it is from: the balance heuristic [1]. Its mean is p(x),
and it is large only where *no* guide proposes enough: what one start lost, another proposes. Each guide is defended
(:mod:`~numpyro_vimco.posterior.defence`): :math:`q_k` is the density of its own mixture with defensive components.

- Where plates are common to all sites, guides factorise over their elements, and so does the mixture: each element has
  a weight, with a mixture of its own.
- Where a plate has particles of its own (derived here), what is shared, g, comes from the mixture of the guides'
  :math:`q_k(g)`; for each element i there are then :math:`M_k` local particles from every :math:`q_k(e_i | g)`, and
  :math:`M_0` from the model, weighted with :math:`v_{im} = p(x_i, e_{im} | g) / \sum_k (M_k / M) q_k(e_{im} | g)`.
  Given g, the mean of :math:`v_{im}` over all M particles is an unbiased estimate of :math:`p(x_i | g)`, so that
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

from numpyro_vimco.objectives.levels import Levels, level_of
from numpyro_vimco.objectives.plates import Structure
from numpyro_vimco.posterior.defence import SHARE, Defence, find_defence
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.proposals import (
    Draw,
    Sampler,
    check_independent,
    choose,
    each_start,
    merged,
    program_of,
    structure_of,
)
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import Trace, is_delta, is_latent_site, sample_sites

# So many draws at a time at most, so that calls of any length share a program.
MOST_AT_ONCE = 1024

Values = dict[str, Array]


@dataclass(frozen=True)
class Mixture:
    """The defended guides of several starts.

    :ivar fit: of all starts.
    :ivar defence: of each guide.
    """

    fit: Fitted
    defence: Defence

    def __post_init__(self) -> None:
        """Raise unless each guide has a density at the draws of the others.

        :raises NotImplementedError: for a Delta site whose value depends on parameters.
        """
        deltas = program_of(self.fit, {}).deltas_at_parameters(self.fit.params, random.key(0))
        for name, parents in deltas.items():
            if self.num_starts > 1 and (of_guide := parents - self.fit.of_model.keys()):
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
        """Number of starts."""
        return self.fit.num_starts

    def local_counts(self, plate: str) -> tuple[int, int]:
        """How many local particles of a plate each start takes, one at least; and how many come from the model."""
        number = self.fit.plate_particles[plate]
        of_model = max(round(SHARE * number), 1) if self.defence.local[plate] and number > 1 else 0
        return -(-(number - of_model) // self.num_starts), of_model

    def draw(self, params: dict[str, Any], rng_key: Array) -> tuple[Levels[Values], Trace]:
        """A draw of one defended guide, with local particles of all; sites that are Delta are left out.

        :param params: of the guide.
        :return: values, and the trace of the guide that the shared ones are from.
        """
        shared_key, local_key = split(rng_key)
        plates = self.fit.plate_particles

        def values_of(tr: Trace, level: str | None) -> Values:
            return {name: value for name, value in drawn(tr).items() if level_of(tr[name], plates) == level}

        guide_trace = self.defence.draw({**params, **self.fit.of_model}, shared_key)
        shared = values_of(guide_trace, None)
        latents = {s["name"]: s["value"] for s in sample_sites(guide_trace) if level_of(s, plates) is None}
        local: dict[str, Values] = {}
        for plate, key in split_by_name(local_key, plates).items():
            of_start, of_model = self.local_counts(plate)
            guide_key, model_key = split(key)

            def from_guide(params, rng_key, plate=plate):
                params = {**params, **self.fit.of_model}
                return values_of(self.defence.trace_guide(params, rng_key, shared), plate)

            def from_model(rng_key, plate=plate):
                return self.defence.draw_local(plate, self.fit.of_model, rng_key, latents)

            keys = split(guide_key, (self.num_starts, of_start))
            local[plate] = merged(jax.vmap(jax.vmap(from_guide, in_axes=(None, 0)))(self.params, keys))
            if of_model:
                more = jax.vmap(from_model)(split(model_key, of_model))
                local[plate] = {name: jnp.concatenate([x, more[name]]) for name, x in local[plate].items()}
        return Levels(shared, local), guide_trace

    def densities(self, values: Levels[Values]) -> tuple[Levels[tuple[Array, Array]], Array, Structure]:
        """Log p and the mixture's log q, of what is shared and of all local particles.

        :param values: as of :meth:`draw`.
        :return: these, the mixture's log q without its defensive components, and how plates combine densities.
        """
        structures: list[Structure] = []
        number = {name: len(next(iter(local.values()))) for name, local in values.local.items()}
        program = program_of(self.fit, number)

        def under(params: dict[str, Any]) -> Levels[Any]:
            params = {**params, **self.fit.of_model}
            # The key is not used: all sites that are drawn have their value.
            levels, structure = program.densities(params, random.key(0), values, self.defence.densities)
            structures.append(structure)
            return levels._replace(shared=(levels.shared["model"], *self.defence.mixed(levels.shared)))

        levels = jax.vmap(under, axis_size=self.num_starts)(self.params)
        log_p, alone, mixture = levels.shared
        alone = logsumexp(alone, axis=0) - np.log(self.num_starts)
        mixture = logsumexp(mixture, axis=0) - np.log(self.num_starts)
        local = {}
        for name, found in levels.local.items():
            of_start, of_model = self.local_counts(name)
            counts, log_q = [of_start] * self.num_starts, found["guide"]
            if of_model:
                counts, log_q = [*counts, of_model], jnp.concatenate([log_q, found["prior"][:1]])
            shares = jnp.log(np.array(counts) / sum(counts)).reshape(-1, *(1,) * (log_q.ndim - 1))
            local[name] = found["model"][0], logsumexp(shares + log_q, axis=0)
        return Levels((log_p[0], mixture), local), alone, structures[0]


def drawn(tr: Trace) -> Values:
    """The values of the latents of a guide that are no Delta."""
    return {site["name"]: site["value"] for site in sample_sites(tr) if is_latent_site(site) and not is_delta(site)}


def pooled(fit: Fitted) -> Sampler:
    """Draws from the defended guides of several starts, weighted with the density of their mixture.

    Each draw is of any start, as likely as another.

    :raises NotImplementedError: for a guide with a Delta site whose value depends on parameters.
    """
    plates, num_starts = fit.plate_particles, fit.num_starts
    program = program_of(fit, plates)
    check_independent(program, fit)
    structure = structure_of(program, fit)
    defence = find_defence(fit, structure)
    if num_starts == 1 and not defence.components:  # weights that need no density at other draws than the guide's
        return replace(each_start(fit), undefended=defence.undefended)
    mixture = Mixture(fit, defence)
    event_dims = fit.event_dims

    def draw(rng_key: Array) -> Draw:
        (own_key,) = split(rng_key, 1)  # a level deeper than `each_start`, whose draws of the same key are others
        start_key, draw_key, choice_key, rest_key = split(own_key, 4)
        start = random.randint(start_key, (), 0, num_starts)
        params = jax.tree.map(lambda leaf: leaf[start], mixture.params)
        values, guide_trace = mixture.draw(params, draw_key)
        levels, alone, structure = mixture.densities(values)
        log_p, log_q = levels.shared
        draws = Levels(
            Draw(values.shared, log_p, log_q, log_ratio(log_p, log_q), start),
            {name: Draw(values.local[name], p, q, log_ratio(p, q)) for name, (p, q) in levels.local.items()},
        )
        chosen = choose(draws, choice_key, structure, event_dims)
        if plates:
            # The guide once more, for the sites that are functions of these.
            params = {**params, **fit.of_model}
            guide_trace = mixture.defence.trace_guide(params, rest_key, chosen.values)
        latents = [s for s in sample_sites(guide_trace) if is_latent_site(s) and s["name"] in fit.model_trace]
        chosen = chosen._replace(values={s["name"]: s["value"] for s in latents}, log_guide_share=alone - log_q)
        return jax.tree.map(lambda x: x[None], chosen)

    # The guides' densities are evaluated for all starts at a time.
    at_once = int(np.clip(fit.chunk_size() // num_starts, 1, MOST_AT_ONCE))
    return Sampler(draw, 1, at_once, structure, defence.undefended)


def log_ratio(log_p: Array, log_q: Array) -> Array:
    """Log-weights: -inf where p is 0, whatever q is, also where no component proposes what the model rules out."""
    return jnp.where(jnp.isneginf(log_p), -jnp.inf, log_p - log_q)


def propose_pooled(sampler: Sampler, rng_key: Array, num_draws: int, progress: str | None = None) -> Draw:
    """So many draws of :func:`pooled`, as NumPy arrays with a leading axis.

    :raises ValueError: for NaN weights, and where all are zero.
    """
    return merged(sampler.all(rng_key, -(-num_draws // sampler.size), progress), num_draws)
