# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Draws from the guides of several starts, defended, weighted with the density of their mixture.

With :math:`\pi_k` the share of the draws that come from guide k, every draw has the weight
:math:`w(z) = p(x, z) / \sum_k \pi_k q_k(z)`, whichever guide it is from: the balance heuristic [1]. Its mean is p(x),
and it is large only where *no* guide proposes enough: what one start lost, another proposes. Each guide is defended
(:mod:`~numpyro_vimco.draws.defence`): :math:`q_k` is the density of its own mixture with defensive components.

- Where plates are common to all sites, guides factorise over their elements, and so does the mixture: each element has
  a weight, with a mixture of its own.
- Where a plate has particles of its own (derived here), what is shared, g, comes from the mixture of the guides'
  :math:`q_k(g)`; for each element i there are then :math:`M_k` local particles from every :math:`q_k(e_i | g)`, and
  :math:`M_0` from the model, weighted with :math:`v_{im} = p(x_i, e_{im} | g) / \sum_k (M_k / M) q_k(e_{im} | g)`.
  Given g, the mean of :math:`v_{im}` over all M particles is an unbiased estimate of :math:`p(x_i | g)`, so that
  :math:`\hat Z = p(g) / q(g) \prod_i \frac1M \sum_m v_{im}` is one of p(x), and g with one particle for each element,
  chosen in proportion to :math:`v_{im}`, is properly weighted by it. Which guide proposed g has no part in this.
- The same holds for the samples of each step of a chain, with the mean over paths in the place of that over particles.
  There the defensive samples come from the guide where it began, near the prior, as the model has no density of one
  step by itself.

1. Veach and Guibas 1995, *Optimally Combining Sampling Techniques for Monte Carlo Rendering*; Owen and Zhou 2000, *Safe
   and Effective Importance Sampling*, for mixtures with fixed shares
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from numpyro_vimco.densities.levels import Levels, level_of
from numpyro_vimco.densities.plates import Structure, aligned_shape
from numpyro_vimco.draws.approximation import Approximation, one_start
from numpyro_vimco.draws.chunks import Chunked
from numpyro_vimco.draws.defence import SHARE, Block, Defence, blocks_of, find_defence
from numpyro_vimco.draws.proposals import (
    ANY,
    Params,
    Sampler,
    WeightedDraw,
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
# Arrays of a particle have so many elements at most where starts by themselves are drawn by the program of the pool.
SMALL = 2**12

Values = dict[str, Array]


@dataclass(frozen=True)
class Mixture:
    """The defended guides of several starts, whatever their parameters.

    :ivar approx: for its structure.
    :ivar defence: of each guide.
    :ivar num_starts: number of guides.
    :ivar first_params: where they began, if there are chains.
    :ivar only: the one guide that all shared draws are of; None for the mixture.
    """

    approx: Approximation
    defence: Defence
    num_starts: int
    first_params: Params = field(default_factory=dict)
    only: Array | None = None

    def of_one(self, rng_key: Array) -> "Mixture":
        """One guide with one component of its defence, each with its probability.

        Draws of the mixture have these in common for all elements of common plates. So what single elements make of
        draws, and of how many draws there are of a guide, would be dependent.
        """
        start_key, component_key = split(rng_key)
        component = random.categorical(component_key, self.defence.log_shares)
        start = random.randint(start_key, (), 0, self.num_starts)
        return replace(self, only=start, defence=replace(self.defence, only=component))

    def local_counts(self, level: str) -> tuple[int, int]:
        """How many local particles of a level each start takes, one at least; and how many are defensive.

        Those of a plate come from the model, those of a chain from the guide where it began.
        """
        number = self.approx.local[level]
        is_defended = level in self.approx.chains or bool(self.defence.local[level])
        defensive = max(round(SHARE * number), 1) if is_defended and number > 1 else 0
        return -(-(number - defensive) // self.num_starts), defensive

    def draw(self, starts: Params, start: Array, is_alone: Array, rng_key: Array) -> tuple[Levels[Values], Trace]:
        """A draw of one defended guide, with local particles of all; sites that are Delta are left out.

        :param starts: parameters of all guides.
        :param start: which it is of.
        :param is_alone: whether it is of the guide without its defence.
        :return: values, and the trace of the guide that the shared ones are from.
        """
        shared_key, local_key = split(rng_key)
        params = one_start(starts, start)
        guide_trace = self.defence.draw(params, shared_key, is_alone)
        local = self._draw_local(starts, params, guide_trace, local_key)
        return Levels(self._of_level(guide_trace, None), local), guide_trace

    def _of_level(self, guide_trace: Trace, level: str | None) -> Values:
        return {n: x for n, x in drawn(guide_trace).items() if level_of(guide_trace[n], self.approx.local) == level}

    def _draw_local(self, starts: Params, params: Params, guide_trace: Trace, rng_key: Array) -> dict[str, Values]:
        """Local particles of all guides, and of the model, beside the shared sites of a trace of a guide."""
        plates, shared = self.approx.local, self._of_level(guide_trace, None)
        latents = {s["name"]: s["value"] for s in sample_sites(guide_trace) if level_of(s, plates) is None}
        local: dict[str, Values] = {}
        for plate, key in split_by_name(rng_key, plates).items():
            of_start, defensive = self.local_counts(plate)
            guide_key, defence_key = split(key)

            def from_guide(params: Params, rng_key: Array, plate: str = plate) -> Values:
                return self._of_level(self.defence.trace_guide(params, rng_key, shared), plate)

            def defended(rng_key: Array, plate: str = plate, from_guide: Callable[..., Values] = from_guide) -> Values:
                if plate in self.approx.chains:
                    return from_guide(self.first_params, rng_key)
                return self.defence.draw_local(plate, params, rng_key, latents)

            keys = split(guide_key, (self.num_starts, of_start))
            local[plate] = merged(jax.vmap(jax.vmap(from_guide, in_axes=(None, 0)))(starts, keys))
            if defensive:
                more = jax.vmap(defended)(split(defence_key, defensive))
                local[plate] = {name: jnp.concatenate([x, more[name]]) for name, x in local[plate].items()}
        return local

    def densities(self, starts: Params, values: Levels[Values]) -> tuple[Levels[tuple[Array, Array]], Array, Structure]:
        """Log p and the mixture's log q, of what is shared and of all local particles.

        :param values: as of :meth:`draw`.
        :return: these, those of local particles with a leading axis for the parts of the mixture, to be added; log q of
            each guide alone with a leading axis for starts; and how plates combine densities.
        """
        structures: list[Structure] = []
        number = {name: len(next(iter(local.values()))) for name, local in values.local.items()}
        program = program_of(self.approx, number)

        def under(params: dict[str, Any]) -> Levels[Any]:
            # The key is not used: all sites that are drawn have their value.
            levels, structure = program.densities(params, random.key(0), values, self.defence.densities)
            structures.append(structure)
            return levels._replace(shared=(levels.shared["model"], *self.defence.mixed(levels.shared)))

        number_of_guides = self.num_starts
        if self.approx.chains:  # the last guide is the one where it began
            number_of_guides += 1
            starts = {name: _with_last(leaf, self.first_params.get(name)) for name, leaf in starts.items()}
        levels = jax.vmap(under, axis_size=number_of_guides)(starts)
        log_p, alone, mixture = jax.tree.map(lambda x: x[: self.num_starts], levels.shared)
        mixture = logsumexp(mixture, axis=0) - np.log(self.num_starts) if self.only is None else mixture[self.only]
        local = {}
        for name, found in levels.local.items():
            of_start, defensive = self.local_counts(name)
            # A guide's steps are independent: the density of a sample is the same for all samples of the step before.
            of_guide = found["guide"][:, :, :, :1] if name in self.approx.chains else found["guide"]
            counts, log_q = [of_start] * self.num_starts, of_guide[: self.num_starts]
            if defensive:
                other = of_guide[-1:] if name in self.approx.chains else found["prior"][:1]
                counts, log_q = [*counts, defensive], jnp.concatenate([log_q, other])
            shares = jnp.log(np.array(counts) / sum(counts)).reshape(-1, *(1,) * (log_q.ndim - 1))
            local[name] = found["model"][0], shares + log_q
        return Levels((log_p[0], mixture), local), alone, structures[0]

    def weighted(self, starts: Params, rng_key: Array, chosen_start: Array) -> WeightedDraw:
        """A draw of any guide, or of a chosen one without its defence, with one local particle of each element.

        :param chosen_start: :data:`.ANY`, or which.
        """
        (own_key,) = split(rng_key, 1)  # a level deeper than `each_start`, whose draws of the same key are others
        start_key, draw_key, choice_key, rest_key = split(own_key, 4)
        is_alone = chosen_start != ANY
        start = jnp.where(is_alone, chosen_start, random.randint(start_key, (), 0, self.num_starts))
        values, guide_trace = self.draw(starts, start, is_alone, draw_key)
        levels, alone, structure = self.densities(starts, values)
        log_p, log_q = levels.shared
        of_guides = logsumexp(alone, axis=0) - np.log(self.num_starts) + self.defence.log_shares[0]
        log_share = jnp.where(is_alone, 0.0, of_guides - log_q)
        levels = levels._replace(shared=(log_p, jnp.where(is_alone, alone[start], log_q)))
        chosen = self._choose(values, levels, structure, choice_key)
        if self.approx.local:
            # The guide once more, for the sites that are functions of these.
            guide_trace = self.defence.trace_guide(one_start(starts, start), rest_key, chosen.values)
        found = self._latents(guide_trace)
        return chosen._replace(values=found, component=start, log_guide_share=log_share)

    def draw_any(self, starts: Params, rng_key: Array) -> Levels[Values]:
        """The values of a draw, of any guide."""
        start_key, draw_key = split(rng_key)
        start = random.randint(start_key, (), 0, self.num_starts) if self.only is None else self.only
        return self.draw(starts, start, jnp.array(False), draw_key)[0]

    def weigh(self, starts: Params, values: Levels[Values], rng_key: Array) -> WeightedDraw:
        """The weight of the values of a draw, with one local particle of each element."""
        choice_key, rest_key = split(rng_key)
        levels, _, structure = self.densities(starts, values)
        chosen = self._choose(values, levels, structure, choice_key)
        guide_trace = self.defence.trace_guide(one_start(starts, 0), rest_key, chosen.values)
        return chosen._replace(values=self._latents(guide_trace))

    def beside(self, starts: Params, latents: Values, rng_key: Array) -> Levels[Values]:
        """Latents as the values of a draw: in each level theirs are one of the local particles, and others are drawn.

        This is conditional importance sampling, derived here. Let the latents be of the posterior. Where a level has M
        particles, of which M_k are from part k of the mixture, theirs takes the place of one from part k with a
        probability in proportion to M_k q_k(e), each particle of the part as likely. Then all values have the law of
        draws, but for the factor that :meth:`weigh` gives them; and what it takes of the local particles has the
        posterior given what is shared.
        """
        guide_key, local_key, slot_key = split(rng_key, 3)
        params = one_start(starts, 0)
        guide_trace = self.defence.trace_guide(params, guide_key, self.packed(latents))
        local = {name: self._of_level(guide_trace, name) for name in self.approx.local}
        values = Levels(self._of_level(guide_trace, None), local)
        if self.approx.local:
            alone = {level: jax.tree.map(lambda x: x[None], of_level) for level, of_level in local.items()}
            parts = self.densities(starts, values._replace(local=alone))[0].local
            drawn = self._draw_local(starts, params, guide_trace, local_key)
            keys = split_by_name(slot_key, drawn)
            local = {n: self._with_present(n, parts[n][1], drawn[n], alone[n], keys[n]) for n in drawn}
            values = values._replace(local=local)
        return values

    @property
    def latents(self) -> set[str]:
        """Names of the model's latents that guides have a density for."""
        return {latent for block in self._blocks.values() for latent in block.latents}

    @property
    def _blocks(self) -> dict[str, Block]:
        return self.approx.kept("blocks", lambda: blocks_of(self.approx))

    def packed(self, latents: Values) -> Values:
        """What a guide draws, from the model's latents: of a guide that draws these jointly, its own site."""
        return {name: b.pack(latents) if b.pack else latents[name] for name, b in self._blocks.items()}

    def _with_present(self, level: str, of_parts: Array, drawn: Values, present: Values, rng_key: Array) -> Values:
        """Local particles, of which one of each element, and of each step of a chain, is the present one."""
        part_key, place_key = split(rng_key)
        of_start, defensive = self.local_counts(level)
        counts = np.array([of_start] * self.num_starts + [defensive] * (defensive > 0))
        if level in self.approx.chains:
            of_parts = of_parts[:, :, :, 0]
        part = random.categorical(part_key, of_parts, axis=0)
        first, size = jnp.asarray(np.cumsum(counts) - counts)[part], jnp.asarray(counts)[part]
        place = jnp.floor(random.uniform(place_key, part.shape) * size).astype(int)
        index = first + jnp.minimum(place, size - 1)
        number = jnp.arange(counts.sum()).reshape(-1, *(1,) * (index.ndim - 1))
        is_present = number == index

        def put(name: str) -> Array:
            ndim, event_dim = drawn[name].ndim, self.approx.event_dims[name]
            lead = 2 if level in self.approx.chains else 1
            shape = aligned_shape(is_present.shape[lead:], ndim - lead - event_dim, event_dim)
            return jnp.where(is_present.reshape(*is_present.shape[:lead], *shape), present[name], drawn[name])

        return {name: put(name) for name in drawn}

    def _choose(self, values: Levels[Values], levels: Levels, structure: Structure, rng_key: Array) -> WeightedDraw:
        log_p, log_q = levels.shared
        draws = Levels(WeightedDraw(values.shared, log_p, log_q, log_ratio(log_p, log_q)), {})
        for name, (of_model, of_parts) in levels.local.items():
            # Samples of chains have an axis for that of the step before.
            local = _before(values.local[name]) if name in self.approx.chains else values.local[name]
            of_guides = logsumexp(of_parts, axis=0)
            draws.local[name] = WeightedDraw(local, of_model, of_guides, log_ratio(of_model, of_guides))
        return choose(draws, rng_key, structure, self.approx.event_dims)

    def _latents(self, guide_trace: Trace) -> Values:
        sites = filter(is_latent_site, sample_sites(guide_trace))
        return {site["name"]: site["value"] for site in sites if site["name"] in self.approx.model_trace}


def _with_last(starts: Any, last: Any) -> Any:
    """Parameters of all starts, and of the guide where it began; those of the first start where it has none."""
    last = jax.tree.map(lambda leaf: leaf[0], starts) if last is None else last
    return jax.tree.map(lambda leaf, other: jnp.concatenate([leaf, jnp.asarray(other, leaf.dtype)[None]]), starts, last)


def drawn(tr: Trace) -> Values:
    """The values of the latents of a guide that are no Delta."""
    return {site["name"]: site["value"] for site in sample_sites(tr) if is_latent_site(site) and not is_delta(site)}


def in_pool(approx: Approximation) -> Approximation:
    """The starts whose draws are pooled: all, or the best one where each has a posterior of its own."""
    return approx.only(approx.best) if approx.params_of_model else approx


def pooled(approx: Approximation) -> Sampler:
    """Draws from the defended guides of several starts, weighted with the density of their mixture.

    Each draw is of any start, as likely as another.

    :param approx: as of :func:`in_pool`.
    :raises ValueError: where there is no posterior to draw from.
    :raises NotImplementedError: for a guide with a Delta site whose value depends on parameters.
    """
    approx.check_has_posterior()
    check_independent(approx, approx.local)
    defence = approx.kept("defence", lambda: find_defence(approx, structure_of(approx, approx.local)))
    if approx.num_starts > 1:
        _check_densities(approx)
    elif not defence.components and not approx.chains:  # weights that need no density at other draws than the guide's
        return replace(each_start(approx), undefended=defence.undefended)
    return approx.kept(("pooled", approx.num_starts), lambda: _pooled(approx, defence))


def mixture_of(approx: Approximation) -> Mixture:
    """The defended guides of the starts of a pool."""
    defence = approx.kept("defence", lambda: find_defence(approx, structure_of(approx, approx.local)))
    return Mixture(approx, defence, approx.num_starts, approx.first_params if approx.chains else {})


def _check_densities(approx: Approximation) -> None:
    """Raise unless each guide has a density at the draws of the others.

    :raises NotImplementedError: for a Delta site whose value depends on parameters.
    """
    if not approx.has_deltas:
        return
    program = program_of(approx, {})
    deltas = approx.kept("deltas", lambda: program.deltas_at_parameters(approx.params, random.key(0)))
    for name, parents in deltas.items():
        if parents:
            raise NotImplementedError(
                f"Site '{name}' of the guide is a Delta whose value depends on the parameter '{min(parents)}', so "
                "that the guide of one start has no density at the draws of another, and they cannot be pooled. "
                "Look at one start by itself (`Posterior(svi, posterior.params, ...)`), or at all as chains "
                "(`to_arviz(pool=False)`); or give the site a distribution."
            )


def by_start(approx: Approximation) -> Sampler:
    """One draw of the guide of each start, as :func:`.each_start` has them, by the program of :func:`pooled`.

    The density of each guide is computed at each draw, where only its own is needed. So it is taken for small models,
    whose compilation would take longer; and where the draws are the same ones.
    """
    starts = np.arange(approx.num_starts, dtype=np.int32)
    if approx.num_starts == 1 or approx.params_of_model or approx.local or approx.size > SMALL:
        return each_start(approx)
    try:
        return replace(pooled(approx), starts=starts, size=len(starts))
    except NotImplementedError:  # the density of a guide cannot be evaluated at the draws of others
        return each_start(approx)


def _pooled(approx: Approximation, defence: Defence) -> Sampler:
    num_starts = approx.num_starts
    # The guides' densities are evaluated for all starts at a time.
    at_once = int(np.clip(approx.chunk_size() // num_starts, 1, MOST_AT_ONCE))
    chunked = Chunked(mixture_of(approx).weighted, max(at_once // num_starts, 1) * num_starts)
    return Sampler(chunked, structure_of(approx, approx.local), 1, np.array([ANY], np.int32), defence.undefended)


def _before(values: Values) -> Values:
    return {name: value[:, :, None] for name, value in values.items()}


def log_ratio(log_p: Array, log_q: Array) -> Array:
    """Log-weights: -inf where p is 0, whatever q is, also where no component proposes what the model rules out."""
    return jnp.where(jnp.isneginf(log_p), -jnp.inf, log_p - log_q)


def propose_pooled(approx: Approximation, rng_key: Array, num_draws: int, progress: str | None = None) -> WeightedDraw:
    """So many draws of :func:`pooled`, as NumPy arrays with a leading axis.

    :raises ValueError: for NaN weights, and where all are zero.
    """
    approx = in_pool(approx)
    sampler = pooled(approx)
    return merged(sampler.all(approx.starts, rng_key, -(-num_draws // sampler.size), progress), num_draws)
