# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A model and its guide, evaluated one particle at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.lax import stop_gradient
from jaxtyping import Array
from numpyro.handlers import replay, substitute, trace

from numpyro_vimco.checks.guide_densities import auxiliary_sites, check_auxiliary, without_density
from numpyro_vimco.checks.independence import anywhere
from numpyro_vimco.checks.supports_and_plates import (
    NotSubstituted,
    check_joint_plates,
    check_plate_particles,
    check_traces,
)
from numpyro_vimco.control_flow import Given
from numpyro_vimco.densities.densities import Densities, Draw, Draws, SiteDensities, guide_log_prob, latent_masks
from numpyro_vimco.densities.enumerated_model import at_values, check_sums, densities_at, enumerate_model
from numpyro_vimco.densities.enumeration import Unmarked, summed_sites
from numpyro_vimco.densities.levels import Levels, level_of, map_levels, map_local
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

Values = dict[str, Array]


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
        """Draw all local particles, given the sites outside of named plates."""
        keys = particle_keys(rng_key, self.plate_particles)

        def draws(local):
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
        keys = particle_keys(rng_key, self.plate_particles)

        def traces(local) -> tuple[Trace, Trace, Trace]:
            given = dict(values.shared)
            for _, plate_values in local.values():
                given.update(plate_values)
            frozen = live = self._trace_guide(stop_gradient(params), _of_locals(keys, local), given)
            if any(not is_drawn(site) or site["scale"] is not None for site in sample_sites(frozen)):
                live = self._trace_guide(params, _of_locals(keys, local), given)
            return self._trace_model(params, _of_locals(keys, local), live), frozen, live

        def log_weights(local):
            model_trace, frozen, live = traces(local)
            sites = self._sites(params, _of_locals(keys, local), model_trace, frozen)
            rest = sites.of_guide_rest(is_drawn, live)
            log_weight = map_levels(lambda p, q, r: p - q - r, sites.of_model(), sites.of_guide(is_drawn), rest)
            return log_weight, sites.structure

        local = {name: (local_keys, values.local[name]) for name, local_keys in keys.local.items()}
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
        keys = particle_keys(rng_key, self.plate_particles)

        def traces(local) -> tuple[Trace, Trace]:
            given = dict(values.shared)
            for _, plate_values in local.values():
                given.update(plate_values)
            return self._traces(params, _of_locals(keys, local), given)

        def densities(local):
            sites = self._sites(params, _of_locals(keys, local), *traces(local))
            return (combine or self._densities)(sites), sites.structure

        local = {name: (local_keys, values.local[name]) for name, local_keys in keys.local.items()}
        return map_local(densities, lambda local: self._by_site(traces(local)), local)

    def kinds(self, params: dict[str, Any], rng_key: Array) -> Kinds:
        """Which kinds of sites and plates there are, from traces of shapes only."""
        found: list[Kinds] = []

        def look(params, rng_key):
            keys = self._first(rng_key)
            model_trace, guide_trace = self._traces(params, keys)
            latents = [site for site in sample_sites(guide_trace) if is_latent_site(site)]
            path = any(is_drawn(site) and not self.by_score(site) for site in latents)
            masks = any(mask_of(model_trace[s["name"]]["fn"]) for s in latents if s["name"] in model_trace)
            if auxiliary_sites(model_trace, guide_trace):
                check_auxiliary(model_trace, guide_trace, self.parents_of_deltas(params, rng_key))
            structure = self._structure(model_trace, guide_trace)
            kept = frozenset().union(*(structure.kept(level) for level in (None, *self.plate_particles)))
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
        return self._sites(params, keys, self._trace_model(params, keys, guide_trace, values), guide_trace)

    def of_summed(self, params: dict[str, Any], rng_key: Array) -> tuple[Trace, Callable[[Values], dict[str, Array]]]:
        """The sites of one particle that are summed out, each at a draw, and the densities of all sites given these."""
        keys = self._first(rng_key)
        model_trace, guide_trace = self._traces(params, keys)
        model = self._at_values(params, keys, model_trace, guide_trace)
        summed = {name: model_trace[name] for name in summed_sites(model_trace, guide_trace)}
        return summed, lambda values: densities_at(model, values, self.args, self.kwargs)

    def by_level(self, guide_trace: Trace, values: dict[str, Any]) -> Levels[dict[str, Any]]:
        """Sort values, given by the names of guide sites, into the levels of these sites."""
        levels: Levels[dict[str, Any]] = Levels({}, {name: {} for name in self.plate_particles})
        for name, value in values.items():
            levels.at(level_of(guide_trace[name], self.plate_particles))[name] = value
        return levels

    # Traces.

    def _first(self, rng_key: Array) -> ParticleKeys:
        keys = particle_keys(rng_key, self.plate_particles)
        return keys._replace(local={name: local[0] for name, local in keys.local.items()})

    def _run(self, params: dict[str, Any], rng_key: Array, combine: Callable) -> tuple[Levels, Structure]:
        keys = particle_keys(rng_key, self.plate_particles)

        def traces(local):
            return self._traces(params, keys._replace(local=local))

        def run(local):
            sites = self._sites(params, keys._replace(local=local), *traces(local))
            return combine(sites), sites.structure

        return map_local(run, lambda local: self._by_site(traces(local)), keys.local)

    def _densities(self, sites: SiteDensities) -> Levels[Densities]:
        rest = sites.of_guide_rest(self.by_score)
        return map_levels(Densities, sites.of_model(), rest, sites.of_guide(self.by_score))

    def _traces(self, params, keys: ParticleKeys, given: Values | None = None) -> tuple[Trace, Trace]:
        guide_trace = self._trace_guide(params, keys, given)
        return self._trace_model(params, keys, guide_trace), guide_trace

    def _trace_guide(self, params, keys: ParticleKeys, given: Values | None = None) -> Trace:
        # By substitution, as that reaches into control flow; a handler that stops the gradient of a draw does not.
        def draw(site: dict):
            if site["value"] is None and self.by_score(site):
                return stop_gradient(with_fixed_parameters(site["fn"])(*site["args"], **site["kwargs"]))

        guide = Given(substitute(SeedLevels(self.guide, keys.guide, keys.local), data=params), given or {})
        return trace(substitute(guide, substitute_fn=draw)).get_trace(*self.args, **self.kwargs)

    def _trace_model(self, params, keys: ParticleKeys, guide_trace: Trace, more: Values | None = None) -> Trace:
        model = at_values(NotSubstituted(self.model), params, guide_trace, guide_trace, more or {})
        model = SeedLevels(model, keys.model, {})
        model_trace = trace(model).get_trace(*self.args, **self.kwargs)
        check_traces(model_trace, guide_trace)
        check_plate_particles(self.plate_particles, model_trace, guide_trace)
        check_joint_plates(self.joint_plates, self.plate_particles, model_trace, guide_trace)
        return model_trace

    def _sites(self, params, keys: ParticleKeys, model_trace: Trace, guide_trace: Trace) -> SiteDensities:
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
        return plate_structure(model_trace, guide_trace, self.plate_particles, self.joint_plates, self.linear)

    def _draws(self, params, keys: ParticleKeys, given: Values | None, has_masks: bool) -> Levels[Draws]:
        guide_trace = self._trace_guide(params, keys, given)
        model_trace = self._trace_model(params, keys, guide_trace) if has_masks else {}
        masks = latent_masks(model_trace, guide_trace)
        draws = {
            name: Draw(
                site["value"], guide_log_prob(site, masks) if self.by_score(site) else None, site["fn"].event_dim
            )
            for name, site in guide_trace.items()
            if is_drawn(site)
        }
        return self.by_level(guide_trace, draws)

    def _by_site(self, traces: tuple[Trace, Trace]) -> tuple[dict[str, Array], dict[str, str | None]]:
        """The log-densities of all sites by name, those of guide and model together, and the level of each site."""
        densities: dict[str, Any] = {}
        levels = {}
        for site in (site for tr in traces for site in sample_sites(tr)):
            densities[site["name"]] = (*densities.get(site["name"], ()), log_prob_at_value(site))
            levels[site["name"]] = level_of(site, self.plate_particles)
        return densities, levels


def _of_locals(keys: ParticleKeys, local: Mapping[str, tuple[Array, Any]]) -> ParticleKeys:
    """Keys of one particle with those of one local particle of each plate; each comes with its values."""
    return keys._replace(local={name: key for name, (key, _) in local.items()})
