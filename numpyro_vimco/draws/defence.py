# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Defensive draws: some latents are drawn from the model in place of the guide.

Weights tell only of values that somebody draws. So one tenth of the draws come from *defensive components* [1]. Each
has a set S of latents. A draw takes the latents before S from the guide q, in the guide's order; then S from the model,
given the parents of each latent there; and then the others from the guide, given all of these. With a share
:math:`w_S` for each set, and :math:`w_0` for the guide alone,

.. math:: \mathrm{mixture}(z) = q(z) \Big[ w_0 + \sum_S w_S \prod_{s \in S}
          \frac{p_s(z_s \mid \mathrm{parents})}{q_s(z_s \mid \mathrm{before})} \Big].

(Derived here.) A weight p(x, z) / mixture(z) is at most :math:`1 / w_0` times that of the guide alone, and at most
:math:`1 / w_S` times the ratio without S. So a good guide loses the defence's share of its effective sample size, and a
latent whose tail is too light in the guide does no harm.

There is a set for each latent, and one of all latents. A set has, beside its latent, the parents that the guide does
not draw before it. Where a site has several elements, its set is one of them, each as likely, and its density is the
mean over elements; those that the guide draws later are drawn again. A block of latents that a guide draws jointly
counts as one latent.

Samples of the steps of a chain are defended by the guide where it began (:mod:`.pooling`).

Not defended are latents with an improper prior, Delta sites of model or guide, latents whose prior depends on a site
that is summed out, and those in `scan` alone (they are in the set of all latents).

1. Hesterberg 1995, *Weighted Average Importance Sampling and Defensive Mixture Distributions*, Technometrics 37(2), for
   a mixture with a component that bounds the weights
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.autoguide import AutoContinuous

from numpyro_vimco.compilation import at_once
from numpyro_vimco.control_flow import Given, is_in_scan
from numpyro_vimco.densities.densities import SiteDensities
from numpyro_vimco.densities.levels import Levels
from numpyro_vimco.densities.plates import Structure
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.families.autoregressive import sample_rest
from numpyro_vimco.families.bounds import has_total
from numpyro_vimco.families.couplings import Graph, log_densities
from numpyro_vimco.guides.automatic import automatic_guides
from numpyro_vimco.private.of_numpyro import latents_of, packed
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import Trace, can, is_delta, is_latent_site, sample_sites, support_of

# The share of the draws that are defensive.
SHARE = 0.1

Values = dict[str, Array]
Params = dict[str, Any]
Choose = Callable[[dict], Any]


def _nothing(site: dict) -> None:
    pass


@dataclass(frozen=True)
class Block:
    """Latents that the guide draws jointly; mostly one.

    :ivar latents: their names.
    :ivar pack: from their values to that of the guide's auxiliary site; None where there is none.
    """

    latents: tuple[str, ...]
    pack: Callable[[Values], Array] | None = None


@dataclass(frozen=True)
class Component:
    """A defensive component.

    :ivar sites: the guide's sites of the blocks that come from the model.
    :ivar before: those that come from the guide before these.
    :ivar element: whether one element of the only site is drawn from the model.
    """

    sites: frozenset[str]
    before: frozenset[str]
    element: bool = False


@dataclass(frozen=True)
class Defence:
    """The defensive components of a fit: :func:`find_defence`.

    :ivar kept: dimensions of common plates, whose elements have a weight each, and so a draw of their own.
    :ivar blocks: by the guide's site, all blocks of shared latents that have a density, in the order of the guide.
    :ivar components: may be none.
    :ivar local: by named plate and chain, the latents that can all be drawn from the model; empty if they cannot, and
        for chains.
    :ivar undefended: the latents that have no component, or only one that is not of them and their parents.
    :ivar only: the one component that all draws are of, counted from 1, or 0 for the guide alone; None for the mixture.
    """

    approx: Approximation
    kept: frozenset[int]
    blocks: dict[str, Block]
    components: tuple[Component, ...]
    local: dict[str, tuple[str, ...]]
    undefended: tuple[str, ...]
    only: Array | None = None

    @property
    def log_shares(self) -> Array:
        """Logarithm of the shares of the guide alone and of each component, of shape ``(1 + components,)``."""
        n = len(self.components)
        if self.only is not None:
            return jnp.where(jnp.arange(1 + n) == self.only, 0.0, -jnp.inf)
        return jnp.log(jnp.array([1 - SHARE] + [SHARE / n] * n)) if n else jnp.zeros(1)

    # Drawing.

    def draw(self, params: Params, rng_key: Array, is_alone: Array) -> Trace:
        """A draw from the mixture with one guide, as a trace of the guide.

        :param params: of this guide and of the model.
        :param is_alone: whether it is a draw of the guide itself.
        """
        names = "component", "first", "model", "elements", "again", "last"
        keys = dict(zip(names, split(rng_key, len(names))))
        first = self.trace_guide(params, keys["first"], {})
        if not self.components:
            return first
        component = jnp.where(is_alone, 0, random.categorical(keys["component"], self.log_shares))
        chosen = self._chosen(component, keys["elements"])
        values = self._with_latents_of_model(component, params, keys["model"], chosen, first)
        given = {name: block.pack(values) if block.pack else values[name] for name, block in self.blocks.items()}
        if any(is_in_scan(first[name]) for name in given):  # the only component is of all latents
            return self.trace_guide(params, keys["last"], given)
        is_kept = self._by_component(lambda c, name: name in c.sites | c.before, component, guide=True)
        again = split_by_name(keys["again"], given)

        def choose(site: dict) -> Array | None:
            if (name := site["name"]) not in given:
                return None
            rest_key, new_key = split(again[name])
            kept = sample_rest(site["fn"], rest_key, given[name], chosen[name]) if name in chosen else given[name]
            return jnp.where(is_kept[name], kept, site["fn"].sample(new_key))

        return self.trace_guide(params, keys["last"], {}, choose)

    def draw_local(self, plate: str, params: Params, rng_key: Array, shared: Values) -> Values:
        """Latents of a named plate from the model, given the shared ones."""
        model_trace = self._trace_model(params, rng_key, shared)
        return {name: model_trace[name]["value"] for name in self.local[plate]}

    def trace_guide(self, params: Params, rng_key: Array, given: Values, choose: Choose = _nothing) -> Trace:
        """The guide at given values of some sites; the others are drawn."""
        return self._trace(self.approx.guide, params, rng_key, given, choose)

    def _trace_model(self, params: Params, rng_key: Array, given: Values, choose: Choose = _nothing) -> Trace:
        return self._trace(self.approx.model, params, rng_key, given, choose)

    def _trace(self, program: Callable, params: Params, rng_key: Array, given: Values, choose: Choose) -> Trace:
        program = substitute(Given(seed(program, rng_key), given), data=params)
        return trace(substitute(program, substitute_fn=choose)).get_trace(*self.approx.args, **self.approx.kwargs)

    def _chosen(self, component: Array, rng_key: Array) -> dict[str, Array]:
        """For each site that a component takes one element of: which one, at that component; all elements elsewhere."""
        ones = [name for name in self.blocks if any(c.element and name in c.sites for c in self.components)]
        found = {}
        for name, key in split_by_name(rng_key, ones).items():
            site = self.approx.model_trace[name]
            batch = jnp.shape(site["value"])[: jnp.ndim(site["value"]) - site["fn"].event_dim]
            is_one = self._by_component(lambda c, name: c.element and name in c.sites, component, guide=False)[name]
            found[name] = _one_element(key, batch, self.kept) | ~is_one
        return found

    def _with_latents_of_model(
        self, component: Array, params: Params, rng_key: Array, chosen: dict[str, Array], first: Trace
    ) -> Values:
        """All latents of a draw of the guide, but the component's from the model."""
        values = {name: first[name]["value"] for name in self.approx.latents()}
        of_block = self._by_component(lambda c, name: name in c.sites, component, guide=False)
        taken = frozenset().union(*(each.sites for each in self.components))
        # In the order of the guide: that of a set would be another one in each process, and so the keys.
        blocks = [(site, block) for site, block in self.blocks.items() if site in taken]
        from_model = {name: of_block[site] for site, block in blocks for name in block.latents}
        site_key, some_key, all_key = split(rng_key, 3)
        keys = split_by_name(site_key, from_model)
        in_scan = {name: value for name, value in values.items() if is_in_scan(self.approx.model_trace[name])}

        def choose(site: dict) -> Array | None:
            name = site["name"]
            if name not in from_model or name in in_scan:
                return values.get(name) if name not in in_scan else None
            which = from_model[name] & chosen.get(name, jnp.array(True))
            which = which.reshape(*which.shape, *(1,) * site["fn"].event_dim)
            return jnp.where(which, site["fn"].sample(keys[name]), values[name])

        model_trace = self._trace_model(params, some_key, in_scan, choose)
        found = {name: model_trace[name]["value"] for name in values}
        if in_scan.keys() & from_model.keys():  # all latents, then
            is_all = from_model[next(iter(in_scan.keys() & from_model.keys()))]
            model_trace = self._trace_model(params, all_key, {})
            found |= {name: jnp.where(is_all, model_trace[name]["value"], found[name]) for name in from_model}
        return found

    def _by_component(self, holds: Callable[[Component, str], bool], component: Array, guide: bool) -> dict[str, Array]:
        """For each block, whether something holds at the drawn component.

        :param guide: whether it holds where the guide alone is drawn.
        """
        return {
            name: jnp.array([guide, *(holds(each, name) for each in self.components)])[component]
            for name in self.blocks
        }

    # Densities.

    def densities(self, sites: SiteDensities) -> Levels:
        """Log-densities that :meth:`mixed` takes, of each level, at one guide."""
        is_of_block = partial(_is_among, {*self.blocks, *(x for block in self.blocks.values() for x in block.latents)})
        inside = partial(_inside, sites)
        rest, of_guide, of_model = (
            sites.of_guide_rest(is_of_block),
            sites.of_guide(is_of_block, inside),
            sites.of_model(),
        )
        guide, model, element = {}, {}, {}
        one_of = {name for c in self.components if c.element for name in c.sites}
        for name, block in self.blocks.items():
            guide[name] = sites.of_guide(partial(_is_among, {name, *block.latents}), inside).shared
            of_latents = [sites.of_latent(latent) for latent in block.latents]
            model[name] = sum(sites.structure.sum_to_level(log_prob, None) for log_prob in of_latents)
            if name in one_of:
                own = inside(sites.guide_trace[name])
                element[name] = _with_one_of_model(of_latents[0], own, self.kept, sites.structure)
        local = {
            plate: {
                "model": of_model.local[plate],
                "guide": of_guide.local[plate] + rest.local[plate],
                "prior": sum((sites.structure.sum_to_level(sites.of_latent(n), plate) for n in latents), jnp.zeros(())),
            }
            for plate, latents in self.local.items()
        }
        shared = {"model": of_model.shared, "rest": rest.shared, "guide": guide, "prior": model, "element": element}
        return Levels(shared, local)

    def mixed(self, shared: dict[str, Any]) -> tuple[Array, Array]:
        """The log-density of the guide alone, and of the mixture with one guide."""
        guide, prior = shared["guide"], shared["prior"]
        terms = [shared["rest"] + sum(guide.values())]
        for each in self.components:
            others = shared["rest"] + sum(value for name, value in guide.items() if name not in each.sites)
            of_model = shared["element"] if each.element else prior
            terms.append(others + sum(of_model[name] for name in guide if name in each.sites))
        shares = self.log_shares.reshape(-1, *(1,) * jnp.ndim(terms[0]))
        with_shares = shares + jnp.stack(jnp.broadcast_arrays(*terms))
        return terms[0], logsumexp(with_shares, axis=0)


def _is_among(names: Collection[str], site: dict) -> bool:
    return site["name"] in names


def _inside(sites: SiteDensities, site: dict) -> Array:
    """Log-density of a site of the guide, -inf outside of its support, where distributions of NumPyro give NaN.

    A value from the model may be there. It is asked of discrete sites only: a simplex, say, is one up to rounding.
    """
    log_prob, support = sites.of_guide_site(site), support_of(site["fn"])
    if support is None or not support.is_discrete:
        return log_prob
    return jnp.where(support(site["value"]), log_prob, -jnp.inf)


def find_defence(approx: Approximation, structure: Structure) -> Defence:
    """The defensive components of a fit.

    :param structure: of its program.
    """
    guide_trace = _guide_trace(approx)
    blocks = _blocks(approx, guide_trace)
    drawable = _drawable(approx)
    local = {}
    for plate in approx.plate_particles:
        latents = approx.latents_of(plate)
        local[plate] = latents if drawable.keys() >= set(latents) and blocks.keys() >= set(latents) else ()
    local |= dict.fromkeys(approx.chains, ())
    of_levels = {name for level in approx.local for name in approx.latents_of(level)}
    blocks = {name: block for name, block in blocks.items() if not of_levels & set(block.latents)}
    components, defended = _components(approx, guide_trace, blocks, drawable, structure.dims)
    defended = defended.union(*local.values(), *(approx.latents_of(chain) for chain in approx.chains))
    undefended = tuple(name for name in approx.latents() if name not in defended)
    return Defence(approx, structure.dims, blocks, tuple(components), local, undefended)


def _guide_trace(approx: Approximation) -> Trace:
    guide = substitute(Given(seed(approx.guide, random.key(0)), {}), data=approx.params)
    return at_once(lambda: trace(guide).get_trace(*approx.args, **approx.kwargs))


def blocks_of(approx: Approximation) -> dict[str, Block]:
    """The blocks of a guide that have a density, by site, in its order."""
    return _blocks(approx, _guide_trace(approx))


def _blocks(approx: Approximation, guide_trace: Trace) -> dict[str, Block]:
    joint = {
        f"_{part.prefix}_latent": part
        for part in automatic_guides(approx.svi.guide)
        if isinstance(part, AutoContinuous)
    }
    blocks = {}
    for site in filter(is_latent_site, sample_sites(guide_trace)):
        name = site["name"]
        if is_delta(site) or not can(site["fn"].log_prob, site["value"]):
            continue
        if name in approx.model_trace:
            blocks[name] = Block((name,))
        elif name in joint:
            latents = tuple(latents_of(joint[name]))
            supports = {latent: approx.model_trace[latent]["fn"].support for latent in latents}

            def pack(values: Values, guide=joint[name], supports=supports) -> Array:
                return packed(guide, {latent: biject_to(s).inv(values[latent]) for latent, s in supports.items()})

            blocks[name] = Block(latents, pack)
    return blocks


def _drawable(approx: Approximation) -> dict[str, set[str]]:
    """The latents that can be drawn from the model given their parents, and these."""
    latents = {name: site["value"] for name, site in approx.model_trace.items() if is_latent_site(site)}
    graph = Graph.of(
        log_densities(substitute(approx.svi.model, data=approx.params), approx.args, approx.kwargs), latents
    )
    found = {}
    for name, site in approx.latents().items():
        parents = graph.factors[name] - {name}
        # NumPyro (0.22) draws `total_count_max` counts of a Multinomial whose total is one number that is not constant.
        is_wrong = has_total(site["fn"].support) and not site["fn"].batch_shape and bool(parents)
        if parents <= approx.sampled and not is_delta(site) and not is_wrong and can(site["fn"].sample, random.key(0)):
            found[name] = parents
    return found


def _components(
    approx: Approximation,
    guide_trace: Trace,
    blocks: Mapping[str, Block],
    drawable: Mapping[str, set[str]],
    kept: frozenset[int],
) -> tuple[list[Component], set[str]]:
    """A component for each block as far as it can be drawn, and one of all; and the latents of these blocks."""
    parents = {}
    home = {latent: name for name, block in blocks.items() for latent in block.latents}
    for name, block in blocks.items():
        if drawable.keys() >= set(block.latents):
            of_block = {parent for latent in block.latents for parent in drawable[latent]} - set(block.latents)
            # A parent without a block, a Delta, is as good as drawn last.
            parents[name] = {home.get(parent, "") for parent in of_block}
    order = list(blocks)
    components: list[Component] = []
    defended: set[str] = set()
    in_scan = {name for name, block in blocks.items() if any(is_in_scan(approx.model_trace[x]) for x in block.latents)}
    if not any(is_in_scan(guide_trace[name]) for name in blocks):
        for name in blocks:
            found = _closed(name, parents, order)
            if found is None or found[0] & in_scan:
                continue
            defended.update(blocks[name].latents)
            if len(found[0]) == len(blocks) > 1:
                continue  # the one of all
            is_one = len(found[0]) == 1 and _has_elements(guide_trace[name], blocks[name], kept)
            components.append(Component(*found, element=is_one))
    if blocks and blocks.keys() == parents.keys() and all("" not in of_block for of_block in parents.values()):
        components.append(Component(frozenset(blocks), frozenset()))
    return list(dict.fromkeys(components)), defended


def _closed(name: str, parents: Mapping[str, set[str]], order: list[str]) -> tuple[frozenset, frozenset] | None:
    """A block with the parents that the guide does not draw before, and the blocks before all of these; or None."""
    chosen, todo = {name}, [name]
    while todo:
        if todo.pop() not in parents:
            return None
        first = min(map(order.index, chosen))
        missing = {parent for other in chosen for parent in parents.get(other, ())} - chosen - set(order[:first])
        chosen |= missing
        todo += missing
    first = min(map(order.index, chosen))
    return frozenset(chosen), frozenset(order[:first])


def _has_elements(site: dict, block: Block, kept: frozenset[int]) -> bool:
    """Whether a block's only site has several elements with a density each, beside those of common plates."""
    shape = jnp.shape(site["value"])
    batch = shape[: len(shape) - site["fn"].event_dim]
    elements = [size for dim, size in zip(range(-len(batch), 0), batch) if dim not in kept]
    return block.pack is None and int(np.prod(elements)) > 1


def _one_element(rng_key: Array, batch: tuple[int, ...], kept: frozenset[int]) -> Array:
    """True for one element, each as likely, of shape ``batch``; along kept dimensions each has one of its own."""
    noise = random.uniform(rng_key, batch)
    axes = tuple(i for i in range(len(batch)) if i - len(batch) not in kept)
    return noise == noise.max(axes, keepdims=True) if axes else jnp.ones(batch, bool)


def _with_one_of_model(of_model: Array, of_guide: Array, kept: frozenset[int], structure: Structure) -> Array:
    """Log-density of elements of which one is drawn from the model, each as likely, and the others from the guide.

    :param of_model: log-density of each element, of shape ``batch``.
    """
    of_model, of_guide = jnp.broadcast_arrays(of_model, of_guide)
    axes = tuple(i for i in range(of_guide.ndim) if i - of_guide.ndim not in kept)
    is_zero = jnp.isneginf(of_guide)
    finite = jnp.where(is_zero, 0, of_guide)
    others = jnp.sum(finite, axes, keepdims=True) - finite
    others = jnp.where(jnp.sum(is_zero, axes, keepdims=True) > is_zero, -jnp.inf, others)
    number = np.prod([of_guide.shape[axis] for axis in axes])
    found = logsumexp(others + of_model, axis=axes, keepdims=True) - np.log(number)
    return structure.sum_to_level(found, None)
