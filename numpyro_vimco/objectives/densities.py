# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Model and guide in, log-densities of one particle out. Knows NumPyro, no estimator.

What plates do to densities is in :mod:`numpyro_vimco.objectives.plates`, what kinds of sites there are in
:mod:`numpyro_vimco.sites`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
import math
from typing import Any, NamedTuple

import jax
from jax import random
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import replay, substitute, trace
from numpyro.primitives import Messenger

from numpyro_vimco.objectives.checks import check_plate_particles, check_shape, check_traces, dependence_error
from numpyro_vimco.objectives.plates import Density, Levels, Structure, level_of, map_levels, plate_structure
from numpyro_vimco.sites import Trace, is_drawn, is_latent_site, sample_sites


class Densities(NamedTuple):
    """Log-densities in nats. Their gradients are what an estimator weights, so the split is by how parameters act:

    :ivar model: log p(x, z), of all sites of the model.
    :ivar guide_path: the part of the guide's log-density that is no density of a score-function sample: path
        sites, observed sites and factors, and what `handlers.scale` adds to a score-function site.
    :ivar guide_score: the log-density that the score-function samples were drawn from, never scaled.
    """

    model: Density
    guide_path: Density
    guide_score: Density

    @property
    def log_guide(self) -> Density:
        """The guide's log-density, log q(z)."""
        return self.guide_path + self.guide_score

    @property
    def log_weight(self) -> Density:
        """The log-weight, log p(x, z) - log q(z)."""
        return self.model - self.guide_path - self.guide_score


@partial(jax.tree_util.register_dataclass, data_fields=["value", "log_prob"], meta_fields=["event_dim"])
@dataclass
class Draw:
    """A latent guide site as drawn: its value, and its log-density (None for a path site)."""

    value: Array
    log_prob: Array | None
    event_dim: int

    @property
    def is_path(self) -> bool:
        """Whether the gradient of the guide's parameters flows through the value."""
        return self.log_prob is None

    @property
    def differentiable(self) -> Array:
        """What carries that gradient: the value, or the log-density."""
        return self.value if self.log_prob is None else self.log_prob


Draws = dict[str, Draw]


@dataclass(frozen=True)
class Program:
    """A model and its guide with their arguments, to be evaluated one particle at a time.

    :ivar by_score: tells the guide sites whose samples carry no gradient.
    :ivar plate_particles: number of particles of their own that the named plates have.
    :ivar linear: whether the objective is linear in the log-weights (α = 1), so that plates that are not common
        to all sites may be subsampled.

    All methods raise the errors of :mod:`numpyro_vimco.objectives.checks`.
    """

    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict
    by_score: Callable[[dict], bool]
    plate_particles: Mapping[str, int]
    linear: bool

    def evaluate(self, params: dict[str, Any], rng_key: Array) -> tuple[Levels[Densities], Structure]:
        """Draw one particle and evaluate it, in one pass of guide and model."""
        return self._run(params, rng_key, self._densities)

    def propose(
        self, params: dict[str, Any], rng_key: Array
    ) -> tuple[Levels[tuple[dict[str, Array], Densities]], Structure]:
        """:meth:`evaluate`, with the values of all latents."""

        def propose(model_trace, guide_trace):
            densities, structure = self._densities(model_trace, guide_trace)
            values: Levels[dict[str, Array]] = Levels({}, {name: {} for name in self.plate_particles})
            for name, site in guide_trace.items():
                if is_latent_site(site) and name in model_trace:
                    values.at(level_of(site, self.plate_particles))[name] = site["value"]
            return map_levels(lambda *parts: parts, values, densities), structure

        return self._run(params, rng_key, propose)

    def _run(self, params: dict[str, Any], rng_key: Array, combine: Callable) -> tuple:
        model_key, guide_key, local_keys = self._split(rng_key)

        def run(local_keys):
            guide_trace = self._trace_guide(params, guide_key, local_keys)
            return self._trace_model(params, model_key, guide_trace), guide_trace

        return self._over_local(run, combine, local_keys)

    def _densities(self, model_trace: Trace, guide_trace: Trace) -> tuple[Levels[Densities], Structure]:
        structure = plate_structure(model_trace, guide_trace, self.plate_particles, self.linear)
        model = self._sum_sites(model_trace, structure, _scaled)
        score = self._sum_sites(guide_trace, structure, lambda site, _: self.by_score(site) and _log_prob(site))
        path = self._sum_sites(guide_trace, structure, partial(_scaled, beside=self.by_score))
        return map_levels(Densities, model, path, score), structure

    def draw(self, params: dict[str, Any], rng_key: Array) -> Levels[Draws]:
        """Draw one particle, with the first local particle of each named plate."""
        _, guide_key, local_keys = self._split(rng_key)
        return self._draws(self._trace_guide(params, guide_key, {name: keys[0] for name, keys in local_keys.items()}))

    def has_path_sites(self, params: dict[str, Any], rng_key: Array) -> bool:
        """Whether the guide has path sites, found out without computing anything."""
        draws = jax.eval_shape(self.draw, params, rng_key)
        return any(draw.is_path for level in (draws.shared, *draws.local.values()) for draw in level.values())

    def draw_local(self, params: dict[str, Any], rng_key: Array, given: dict[str, Array]) -> dict[str, Draws]:
        """Draw all local particles, given the sites outside of named plates."""
        _, guide_key, local_keys = self._split(rng_key)

        def run(local_keys):
            return (self._trace_guide(params, guide_key, local_keys, given),)

        def draws(guide_trace):
            return Levels(None, self._draws(guide_trace).local), None

        return self._over_local(run, draws, local_keys)[0].local

    def log_weights(
        self, params: dict[str, Any], rng_key: Array, values: Levels[dict[str, Array]]
    ) -> tuple[Levels[Density], Structure]:
        """Log-weights of one particle as a function of its values, for doubly reparameterised gradients.

        Its derivative with respect to ``params`` leaves out the densities that the values were drawn from: these
        are evaluated at parameters with gradients stopped. What is not :func:`is_drawn`, and scales and factors of
        the guide, are functions of the parameters like any other part of the model.
        """
        model_key, guide_key, local_keys = self._split(rng_key)

        def run(local):
            keys = {name: key for name, (key, _) in local.items()}
            given = dict(values.shared)
            for _, plate_values in local.values():
                given.update(plate_values)
            frozen = self._trace_guide(stop_gradient(params), guide_key, keys, given)
            live = frozen
            if any(not is_drawn(site) or site["scale"] is not None for site in sample_sites(frozen)):
                live = self._trace_guide(params, guide_key, keys, given)
            return self._trace_model(params, model_key, live), frozen, live

        def log_weights(model_trace, frozen, live):
            structure = plate_structure(model_trace, frozen, self.plate_particles, self.linear)
            model = self._sum_sites(model_trace, structure, _scaled)
            sampling = self._sum_sites(frozen, structure, lambda site, _: is_drawn(site) and _log_prob(site))
            beside = self._sum_sites(live, structure, partial(_scaled, beside=is_drawn))
            return map_levels(lambda p, q, r: p - q - r, model, sampling, beside), structure

        local = {name: (keys, values.local[name]) for name, keys in local_keys.items()}
        return self._over_local(run, log_weights, local)

    # Traces.

    def _split(self, rng_key: Array) -> tuple[Array, Array, dict[str, Array]]:
        """Keys of the model, of the guide, and of each local particle; the first two are those of RenyiELBO."""
        model_key, guide_key = random.split(rng_key)
        local = {
            name: random.split(random.fold_in(guide_key, i), num_particles)
            for i, (name, num_particles) in enumerate(self.plate_particles.items())
        }
        return model_key, guide_key, local

    def _trace_guide(self, params, key, local_keys, given=None) -> Trace:
        # By substitution, not by a handler that stops the value afterwards: only a substitution reaches into `scan`.
        def choose(site: dict):
            if given is not None and site["name"] in given:
                return given[site["name"]]
            if self.by_score(site):
                return stop_gradient(site["fn"](*site["args"], **site["kwargs"]))

        guide = substitute(_SeedLevels(self.guide, key, local_keys), data=params)
        return trace(substitute(guide, substitute_fn=choose)).get_trace(*self.args, **self.kwargs)

    def _trace_model(self, params, key, guide_trace) -> Trace:
        proposed = {name: site for name, site in guide_trace.items() if site["type"] == "plate" or is_latent_site(site)}
        model = substitute(replay(_SeedLevels(self.model, key, {}), proposed), data=params)
        model_trace = trace(model).get_trace(*self.args, **self.kwargs)
        check_traces(model_trace, guide_trace)
        check_plate_particles(self.plate_particles, model_trace, guide_trace)
        return model_trace

    def _draws(self, guide_trace: Trace) -> Levels[Draws]:
        levels: Levels[Draws] = Levels({}, {name: {} for name in self.plate_particles})
        for name, site in guide_trace.items():
            if is_drawn(site):
                log_prob = _log_prob(site) if self.by_score(site) else None
                draw = Draw(site["value"], log_prob, site["fn"].event_dim)
                levels.at(level_of(site, self.plate_particles))[name] = draw
        return levels

    # Levels.

    def _over_local(self, run: Callable, combine: Callable, local: dict) -> tuple:
        """Map ``combine(*run(local))`` over the local particles of each plate in turn.

        :param run: from one local particle of each plate to traces.
        :param combine: from traces to levels, and something static. What is outside of a plate must not depend on
            the plate's particles: `vmap` then computes it once.
        """

        def mapped(local):
            return combine(*run(local))

        for name in local:
            axes = {other: 0 if other == name else None for other in local}
            # The axis is named, so that a handler around the program can tell the particles apart.
            mapped = jax.vmap(mapped, in_axes=(axes,), out_axes=(Levels(None, axes), None), axis_name=name)
        try:
            return mapped(local)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            dependence = self._find_dependence(run, local)
            if dependence is None:
                raise
            raise dependence_error(*dependence) from None

    def _find_dependence(self, run: Callable, local: dict) -> tuple[str, str] | None:
        """The site that is outside of a named plate and depends on its latents, and the plate."""
        first = jax.tree.map(lambda x: x[0], local)
        for plate in local:
            names: list[str] = []

            def log_probs(particle, plate=plate, names=names):
                sites = [site for tr in run({**first, plate: particle}) for site in sample_sites(tr)]
                outside = [site for site in sites if plate != level_of(site, self.plate_particles)]
                names[:] = [site["name"] for site in outside]
                return [_log_prob(site) for site in outside]

            jax.eval_shape(log_probs, first[plate])
            for i, name in enumerate(names):
                try:
                    jax.eval_shape(jax.vmap(lambda particle, i=i: log_probs(particle)[i], out_axes=None), local[plate])
                except ValueError:
                    return name, plate
        return None

    def _sum_sites(self, tr: Trace, structure: Structure, density: Callable) -> Levels[Density]:
        """Sum ``density(site, plate_scale)`` over the sites of each level; None or False stands for nothing."""
        totals: dict[str | None, Density] = dict.fromkeys(
            [None, *self.plate_particles], jnp.zeros((1,) * structure.ndim)
        )
        for site in sample_sites(tr):
            level = level_of(site, self.plate_particles)
            log_prob = density(site, structure.level_scale(level))
            if log_prob is not None and log_prob is not False:
                totals[level] = totals[level] + structure.sum_to_level(log_prob, level)
        return Levels(totals[None], {name: totals[name] for name in self.plate_particles})


class _SeedLevels(Messenger):
    """`numpyro.handlers.seed`, with a key of its own for each named plate."""

    def __init__(self, fn: Callable, key: Array, local_keys: dict[str, Array]):
        super().__init__(fn)
        self.keys: dict[str | None, Array] = {None: key}
        self.keys.update(local_keys)

    def process_message(self, msg: dict) -> None:
        if msg["type"] not in ("sample", "prng_key", "plate", "control_flow"):
            return
        if msg["kwargs"]["rng_key"] is not None or msg["value"] is not None:
            return
        plates = (frame.name for frame in msg.get("cond_indep_stack", ()))
        level = next((name for name in plates if name in self.keys), None)
        self.keys[level], msg["kwargs"]["rng_key"] = random.split(self.keys[level])


def _log_prob(site: dict) -> Array:
    """Log-density of a site with its mask, without its scale."""
    if site["intermediates"]:
        log_prob = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        log_prob = site["fn"].log_prob(site["value"])
    check_shape(site, jnp.shape(log_prob))
    return log_prob


def _scaled(site: dict, plate_scale: float, beside: Callable = lambda site: False) -> Array | None:
    """Log-density times the scale of the site, less that of subsampled plates whose sum is scaled as a whole.

    :param beside: tells the sites whose own log-density is left out of this: only what the scale adds remains.
    """
    scale = 1.0 if site["scale"] is None else site["scale"] / plate_scale
    unscaled = isinstance(scale, float) and math.isclose(scale, 1.0)
    if beside(site):
        return None if unscaled else (scale - 1) * _log_prob(site)
    return _log_prob(site) if unscaled else scale * _log_prob(site)
