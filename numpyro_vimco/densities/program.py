# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A model and its guide, evaluated one particle at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import replay, substitute, trace

from numpyro_vimco.checks.chains import guide_outside_error
from numpyro_vimco.checks.guide_densities import auxiliary_sites, check_auxiliary, without_density
from numpyro_vimco.checks.independence import anywhere
from numpyro_vimco.checks.supports_and_plates import (
    NotSubstituted,
    check_joint_plates,
    check_plate_particles,
    check_score_sites,
    check_traces,
)
from numpyro_vimco.control_flow import Given
from numpyro_vimco.densities.chains import Chains, InStep, at_step, numbers, of_steps
from numpyro_vimco.densities.densities import Densities, Draw, Draws, SiteDensities, guide_log_prob, latent_masks
from numpyro_vimco.densities.enumerated_model import at_values, check_sums, densities_at, enumerate_model
from numpyro_vimco.densities.enumeration import Unmarked, summed_sites
from numpyro_vimco.densities.levels import Levels, Step, Values, level_of, map_levels, map_local
from numpyro_vimco.densities.plates import Density, Structure, plate_structure
from numpyro_vimco.dependence import dependence
from numpyro_vimco.randomness import ParticleKeys, SeedLevels, particle_keys
from numpyro_vimco.sites import (
    Trace,
    is_delta,
    is_drawn,
    is_latent_site,
    log_prob_at_value,
    mask_of,
    sample_sites,
    with_fixed_parameters,
)


class Kinds(NamedTuple):
    """Which kinds of sites and plates a program has.

    :ivar path_sites: whether any path site is drawn from a density (:func:`~numpyro_vimco.sites.is_drawn`), so that
        doubly reparameterised gradients differ from plain ones.
    :ivar masks: whether the model masks any element of a latent.
    :ivar elements: size of the largest plate whose elements have weights of their own; 0 if there is none.
    :ivar sums: whether there are sites that are summed out.
    :ivar masked_sums: whether a density may depend on masked elements of sites that are summed out.
    """

    path_sites: bool
    masks: bool
    elements: int
    sums: bool
    masked_sums: bool


@dataclass(frozen=True)
class Program:
    """A model and its guide with their arguments.

    :ivar by_score: whether no gradient flows through the sample of a latent guide site.
    :ivar plate_particles: number of local particles of each named plate.
    :ivar joint_plates: plates whose elements share one weight.
    :ivar linear: whether the objective is linear in the log-weights (α = 1), so that plates that are not common
        to all sites may be subsampled.
    :ivar chains: the chains whose latents have samples of their own at each step; ``model`` and ``guide`` are then
        :func:`.chains.marked`.
    :ivar score_sites: more sites through whose samples no gradient flows.

    All methods raise the errors of :mod:`numpyro_vimco.checks.supports_and_plates`.
    """

    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict
    by_score: Callable[[dict], bool]
    plate_particles: Mapping[str, int]
    joint_plates: frozenset[str]
    linear: bool
    chains: Chains = field(default_factory=dict)
    score_sites: frozenset[str] = frozenset()

    def _is_by_score(self, site: dict) -> bool:
        return self.by_score(site) or (is_latent_site(site) and site["name"] in self.score_sites)

    def _is_drawn(self, site: dict) -> bool:
        return is_drawn(site) or self._is_by_score(site)

    @property
    def local(self) -> dict[str, int]:
        """Of each named plate and each chain, the number of its local particles, or of its samples of a step."""
        return numbers(self.plate_particles, self.chains)

    def evaluate(self, params: dict[str, Any], rng_key: Array) -> tuple[Levels[Densities], Structure]:
        """Draw one particle, with all its local particles, and evaluate it in one pass of guide and model."""
        return self._run(params, rng_key, self._densities)

    def propose(self, params: dict[str, Any], rng_key: Array) -> tuple[Levels[tuple[Values, Densities]], Structure]:
        """:meth:`evaluate`, with the values of all latents of the model."""

        def propose(sites: SiteDensities) -> Levels[tuple[Values, Densities]]:
            latents = [site for site in sample_sites(sites.guide_trace) if is_latent_site(site)]
            values = {site["name"]: site["value"] for site in latents if site["name"] in sites.model_trace}
            by_level = self.by_level(sites.guide_trace, values)
            return map_levels(lambda *parts: parts, by_level, self._densities(sites))

        return self._run(params, rng_key, propose)

    def draw(self, params: dict[str, Any], rng_key: Array, has_masks: bool) -> Levels[Draws]:
        """Draw one particle, with the first local particle of each named plate.

        :param has_masks: ``masks`` of :meth:`kinds`. Where it is true the model is traced too, for its masks.
        """
        return self._draws(params, self._first(rng_key), None, has_masks)

    def draw_local(self, params: dict[str, Any], rng_key: Array, given: Values, has_masks: bool) -> dict[str, Draws]:
        """Draw all local particles, and all samples of chains, given the shared sites."""
        keys = particle_keys(rng_key, self.local)

        def draws(local: Any) -> tuple[Levels[Any], None]:
            return Levels(None, self._draws(params, keys._replace(local=local), given, has_masks).local), None

        def by_site(local):
            return self._by_site(self._traces(params, keys._replace(local=local), given))

        return map_local(draws, by_site, keys.local)[0].local

    def log_weights(
        self, params: dict[str, Any], rng_key: Array, values: Levels[Values]
    ) -> tuple[Levels[Density], Structure]:
        """Log-weights of one particle as a function of its values, for doubly reparameterised gradients.

        The densities that the values were drawn from (:func:`~numpyro_vimco.sites.is_drawn`) have no derivative with
        respect to ``params``. The guide's other terms have one: other sites, factors, and what scales add.
        """
        keys = particle_keys(rng_key, self.local)
        fixed = stop_gradient(params)
        local = self._inputs((fixed, params), keys, values)

        def traces(local) -> tuple[Trace, Trace, Trace]:
            of_local, given, steps = _parts(keys, local, values.shared)
            frozen = live = self._trace_guide(fixed, of_local, given)
            if any(not self._is_drawn(site) or site["scale"] is not None for site in sample_sites(frozen)):
                live = self._trace_guide(params, of_local, given)
            frozen, live = (at_step(tr, self.chains, steps, i) for i, tr in enumerate((frozen, live)))
            return self.in_steps(steps).trace_model(params, of_local, live), frozen, live

        def log_weights(local):
            of_local, _, steps = _parts(keys, local, values.shared)
            model_trace, frozen, live = traces(local)
            sites = self.in_steps(steps).sites_of(params, of_local, model_trace, frozen)
            rest = sites.of_guide_rest(self._is_drawn, live)
            log_weight = map_levels(lambda p, q, r: p - q - r, sites.of_model(), sites.of_guide(self._is_drawn), rest)
            return log_weight, sites.structure

        return map_local(log_weights, lambda local: self._by_site(traces(local)[:2]), local)

    def densities(
        self,
        params: dict[str, Any],
        rng_key: Array,
        values: Levels[Values],
        combine: Callable[[SiteDensities], Levels] | None = None,
    ) -> tuple[Levels, Structure]:
        """Evaluate one particle at given values, as :meth:`evaluate` does at values of its own.

        :param combine: from the densities of sites to what is returned of them. Defaults to the same as there.
        """
        keys = particle_keys(rng_key, self.local)
        return self._map(params, keys, self._inputs((params,), keys, values), values.shared, combine or self._densities)

    def kinds(self, params: dict[str, Any], rng_key: Array) -> Kinds:
        """Which kinds of sites and plates there are, from traces of shapes only."""
        found: list[Kinds] = []

        def look(params, rng_key):
            keys = self._first(rng_key)
            model_trace, guide_trace = self._traces(params, keys)
            latents = [site for site in sample_sites(guide_trace) if is_latent_site(site)]
            check_score_sites(self.score_sites, [site["name"] for site in latents])
            path = any(self._is_drawn(site) and not self._is_by_score(site) for site in latents)
            masks = any(mask_of(model_trace[s["name"]]["fn"]) for s in latents if s["name"] in model_trace)
            if auxiliary_sites(model_trace, guide_trace):
                check_auxiliary(model_trace, guide_trace, self.parents_of_deltas(params, rng_key))
            structure = self._structure(model_trace, guide_trace)
            self._check_chains(params, keys, guide_trace)
            kept = frozenset().union(*(structure.kept(level) for level in (None, *self.local)))
            frames = [frame for site in sample_sites(model_trace) for frame in site["cond_indep_stack"]]
            elements = max((frame.size for frame in frames if frame.dim in kept), default=0)
            summed = summed_sites(model_trace, guide_trace)
            masked_sums = False
            if summed:
                model = self._at_values(params, keys, model_trace, guide_trace)
                masked_sums = check_sums(model, model_trace, summed, self.args, self.kwargs)
            found.append(Kinds(path, masks, elements, bool(summed), masked_sums))

        jax.eval_shape(look, params, rng_key)
        return found[0]

    def samples(
        self, params: dict[str, Any], rng_key: Array
    ) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """The shapes of the samples of the guide: of those that gradients flow through, and of the others."""

        def look(params) -> tuple[Values, Values]:
            latents = filter(is_latent_site, sample_sites(self._trace_guide(params, self._first(rng_key))))
            found: tuple[Values, Values] = {}, {}
            for site in latents:
                if not is_delta(site):
                    found[self._is_by_score(site)][site["name"]] = site["value"]
            return found

        return jax.eval_shape(look, params)

    def parents_of_deltas(self, params: dict[str, Any], rng_key: Array) -> dict[str, set[str]]:
        """Of each latent guide site that is a Delta, the parameters and drawn sites that its value depends on."""
        keys, has_delta = self._first(rng_key), []

        def draw(params) -> Values:
            latents = [site for site in sample_sites(self._trace_guide(params, keys)) if is_latent_site(site)]
            has_delta.append(any(map(is_delta, latents)))
            return {site["name"]: site["value"] for site in latents if not is_delta(site)}

        drawn = jax.eval_shape(draw, params)
        if not has_delta[0]:
            return {}

        # Drawn sites have given values, so that what is computed from them only does not depend on parameters.
        def deltas(inputs):
            given = {name: inputs[name] for name in drawn}
            tr = self._trace_guide({name: inputs[name] for name in params}, keys, given)
            return {site["name"]: site["value"] for site in tr.values() if is_delta(site)}

        return dependence(deltas, {**params, **drawn})

    def deltas_at_parameters(self, params: dict[str, Any], rng_key: Array) -> dict[str, set[str]]:
        """The latent guide sites that are Delta distributions whose value depends on parameters, and on which."""
        parents = self.parents_of_deltas(params, rng_key)
        return {name: found & params.keys() for name, found in parents.items() if found & params.keys()}

    def without_density(self, params: dict[str, Any], rng_key: Array) -> list[str]:
        """The continuous latents that the guide fixes: :func:`.guide_densities.without_density`."""
        parents, found = self.parents_of_deltas(params, rng_key), []

        def look(params) -> None:
            found.extend(without_density(*self._traces(params, self._first(rng_key)), parents))

        if parents:
            jax.eval_shape(look, params)
        return found

    def first_params(self, params: dict[str, Any], rng_key: Array) -> dict[str, Any]:
        """The guide's parameters where it begins, unless they are given."""
        tr = self._trace_guide(params, self._first(rng_key))
        return {name: site["value"] for name, site in tr.items() if site["type"] == "param"}

    def sites(self, params: dict[str, Any], rng_key: Array, given: Values | None = None) -> SiteDensities:
        """The sites of one particle, with the first local particle of each named plate.

        :param given: values of guide sites; the others are drawn.
        """
        model_trace, guide_trace = self._traces(params, self._first(rng_key), given)
        return SiteDensities(model_trace, guide_trace, self._structure(model_trace, guide_trace))

    def anywhere(self, params: dict[str, Any], rng_key: Array, sites: SiteDensities, from_prior: Array) -> Values:
        """Values of the model's latents, summed ones too: of their prior, or from all of their support.

        :param sites: of a draw of the guide, whose plates the latents are in.
        """
        plates = {name: site for name, site in sites.guide_trace.items() if site["type"] == "plate"}

        def choose(site: dict) -> Array | None:
            if not is_latent_site(site):
                return None
            return anywhere(site, from_prior, sites.model_trace[site["name"]]["value"])

        model = SeedLevels(substitute(replay(self.model, plates), data=params), self._first(rng_key).model, {})
        model_trace = trace(substitute(model, substitute_fn=choose)).get_trace(*self.args, **self.kwargs)
        return {site["name"]: site["value"] for site in sample_sites(model_trace) if is_latent_site(site)}

    def at(self, params: dict[str, Any], rng_key: Array, values: Values) -> SiteDensities:
        """:meth:`sites` at values of all latents of the guide, for sites that are summed out.

        :param values: of summed sites too, or without: then these are drawn from their prior.
        """
        keys = self._first(rng_key)
        guide_trace = self._trace_guide(params, keys, values)
        return self.sites_of(params, keys, self.trace_model(params, keys, guide_trace, values), guide_trace)

    def of_summed(self, params: dict[str, Any], rng_key: Array) -> tuple[Trace, Callable[[Values], dict[str, Array]]]:
        """The sites of one particle that are summed out, each at a draw, and the densities of all sites given these."""
        keys = self._first(rng_key)
        model_trace, guide_trace = self._traces(params, keys)
        model = self._at_values(params, keys, model_trace, guide_trace)
        summed = {name: model_trace[name] for name in summed_sites(model_trace, guide_trace)}
        return summed, lambda values: densities_at(model, values, self.args, self.kwargs)

    def by_level(self, guide_trace: Trace, values: dict[str, Any]) -> Levels[dict[str, Any]]:
        """Sort values, given by the names of guide sites, into the levels of these sites."""
        levels: Levels[dict[str, Any]] = Levels({}, {name: {} for name in self.local})
        for name, value in values.items():
            levels.at(level_of(guide_trace[name], self.local))[name] = value
        return levels

    # Traces.

    def _first(self, rng_key: Array) -> ParticleKeys:
        return _firsts(particle_keys(rng_key, self.local))

    def _run(self, params: dict[str, Any], rng_key: Array, combine: Callable) -> tuple[Levels, Structure]:
        keys = particle_keys(rng_key, self.local)
        return self._map(params, keys, self._inputs((params,), keys, None), {}, combine)

    def _map(
        self, params, keys: ParticleKeys, local: dict[str, Any], shared: Values, combine: Callable
    ) -> tuple[Levels, Structure]:
        """Combine the sites of one particle, mapped over the inputs of its levels."""

        def traces(local) -> tuple[Trace, Trace]:
            of_local, given, steps = _parts(keys, local, shared)
            guide_trace = at_step(self._trace_guide(params, of_local, given), self.chains, steps)
            return self.in_steps(steps).trace_model(params, of_local, guide_trace), guide_trace

        def run(local):
            of_local, _, steps = _parts(keys, local, shared)
            sites = self.in_steps(steps).sites_of(params, of_local, *traces(local))
            return combine(sites), sites.structure

        return map_local(run, lambda local: self._by_site(traces(local)), local)

    # Levels.

    def _inputs(self, params: tuple, keys: ParticleKeys, values: Levels[Values] | None) -> dict[str, Any]:
        """What :func:`.map_local` maps a program over: of a plate keys, with values if there are any; of a chain steps.

        :param params: of guides under which samples of chains have a density each.
        :param values: those of all samples; None for draws.
        """
        given = {name: (key, values.local[name] if values else {}) for name, key in keys.local.items()}
        firsts = _firsts(keys)
        shared = {} if values is None else dict(values.shared)
        for plate in self.plate_particles if values else ():
            shared |= {name: value[0] for name, value in given[plate][1].items()}

        def of_sample(params, name: str, key: Array, own: Values) -> tuple[Values, Values]:
            of_key = firsts._replace(local={**firsts.local, name: key})
            return of_steps(self._trace_guide(params, of_key, {**shared, **own}), self.chains[name])

        for name, chain in self.chains.items():
            under = [jax.vmap(partial(of_sample, each, name), axis_name=name)(*given[name]) for each in params]
            own = under[0][0]
            path = {latent: stop_gradient(value[0]) for latent, value in own.items()}
            given[name] = Step(  # type: ignore[assignment]
                own, chain.shifted(own), tuple(log_q for _, log_q in under), jnp.arange(chain.length), path
            )
        return given

    def _check_chains(self, params, keys: ParticleKeys, guide_trace: Trace) -> None:
        """Raise for a guide that draws chains given local latents, or other sites given chains.

        :raises ValueError: naming the sites.
        """
        if not self.chains:
            return
        latents = {
            site["name"]: site for site in sample_sites(guide_trace) if is_latent_site(site) and not is_delta(site)
        }
        levels = {name: level_of(site, self.local) for name, site in latents.items()}

        def densities(values: Values) -> dict[str, Array]:
            tr = self._trace_guide(params, keys, values)
            return {site["name"]: log_prob_at_value(site) for site in sample_sites(tr)}

        for name, parents in dependence(densities, {name: site["value"] for name, site in latents.items()}).items():
            for parent in sorted(parents):
                both = levels.get(name), levels[parent]
                if both[1] not in (None, both[0]) and (found := [level for level in both if level in self.chains]):
                    raise guide_outside_error(name, str(found[0]), parent)

    def _densities(self, sites: SiteDensities) -> Levels[Densities]:
        rest = sites.of_guide_rest(self._is_by_score)
        return map_levels(Densities, sites.of_model(), rest, sites.of_guide(self._is_by_score))

    def _traces(self, params, keys: ParticleKeys, given: Values | None = None) -> tuple[Trace, Trace]:
        guide_trace = self._trace_guide(params, keys, given)
        return self.trace_model(params, keys, guide_trace), guide_trace

    def _trace_guide(self, params, keys: ParticleKeys, given: Values | None = None) -> Trace:
        # By substitution, as that reaches into control flow; a handler that stops the gradient of a draw does not.
        def draw(site: dict):
            if site["value"] is None and self._is_by_score(site):
                return stop_gradient(with_fixed_parameters(site["fn"])(*site["args"], **site["kwargs"]))

        guide = Given(substitute(SeedLevels(self.guide, keys.guide, keys.local), data=params), given or {})
        return trace(substitute(guide, substitute_fn=draw)).get_trace(*self.args, **self.kwargs)

    def trace_model(self, params, keys: ParticleKeys, guide_trace: Trace, more: Values | None = None) -> Trace:
        """The model at the values of a guide's trace, with which it is compared."""
        model = at_values(NotSubstituted(self.model), params, guide_trace, guide_trace, more or {})
        model = SeedLevels(model, keys.model, {})
        model_trace = trace(model).get_trace(*self.args, **self.kwargs)
        check_traces(model_trace, guide_trace)
        check_plate_particles(self.plate_particles, model_trace, guide_trace)
        check_joint_plates(self.joint_plates, self.plate_particles, model_trace, guide_trace)
        return model_trace

    def in_steps(self, steps: Mapping[str, Step]) -> "Program":
        """The program, whose chains are run in place at one step."""
        return replace(self, model=InStep(self.model, self.chains, steps)) if steps else self

    def sites_of(self, params, keys: ParticleKeys, model_trace: Trace, guide_trace: Trace) -> SiteDensities:
        """Densities of sites; where the model has sites to sum out, it is traced once more, with all their values."""
        structure = self._structure(model_trace, guide_trace)
        if not summed_sites(model_trace, guide_trace):
            return SiteDensities(model_trace, guide_trace, structure)
        model = self._at_values(params, keys, model_trace, guide_trace)
        enumerated = enumerate_model(model, model_trace, self.args, self.kwargs)
        return SiteDensities(model_trace, guide_trace, structure, enumerated)

    def _at_values(self, params, keys: ParticleKeys, model_trace: Trace, guide_trace: Trace) -> SeedLevels:
        """The model, to be enumerated at parameters and the guide's values."""
        given = at_values(self.model, params, model_trace, guide_trace)
        return SeedLevels(Unmarked(given, given.values), keys.model, {})

    def _structure(self, model_trace: Trace, guide_trace: Trace) -> Structure:
        reverse = {name: chain.reverse for name, chain in self.chains.items()}
        return plate_structure(model_trace, guide_trace, self.local, self.joint_plates, self.linear, reverse)

    def _draws(self, params, keys: ParticleKeys, given: Values | None, has_masks: bool) -> Levels[Draws]:
        guide_trace = self._trace_guide(params, keys, given)
        model_trace = self.trace_model(params, keys, guide_trace) if has_masks else {}
        masks = latent_masks(model_trace, guide_trace)
        draws = {
            name: Draw(
                site["value"], guide_log_prob(site, masks) if self._is_by_score(site) else None, site["fn"].event_dim
            )
            for name, site in guide_trace.items()
            if self._is_drawn(site)
        }
        return self.by_level(guide_trace, draws)

    def _by_site(self, traces: tuple[Trace, Trace]) -> tuple[dict[str, Array], dict[str, str | None]]:
        """The log-densities of all sites by name, those of guide and model together, and the level of each site."""
        densities: dict[str, Any] = {}
        levels = {}
        for site in (site for tr in traces for site in sample_sites(tr)):
            densities[site["name"]] = (*densities.get(site["name"], ()), log_prob_at_value(site))
            levels[site["name"]] = level_of(site, self.local)
        return densities, levels


def _parts(
    keys: ParticleKeys, local: Mapping[str, Any], shared: Values
) -> tuple[ParticleKeys, Values, dict[str, Step]]:
    """Of one local particle of each plate and one step of each chain: keys, given values, and steps."""
    steps = {name: x for name, x in local.items() if isinstance(x, Step)}
    given = dict(shared)
    for name, x in local.items():
        given |= x.path if name in steps else x[1]
    of_plates = {name: x[0] for name, x in local.items() if name not in steps}
    return _firsts(keys)._replace(local={**_firsts(keys).local, **of_plates}), given, steps


def _firsts(keys: ParticleKeys) -> ParticleKeys:
    """Keys of one particle with those of the first local particle of each level."""
    return keys._replace(local={name: local[0] for name, local in keys.local.items()})
