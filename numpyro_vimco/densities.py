# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Model and guide in, log-densities of one particle out. Knows NumPyro, no estimator.

A *score-function site* is a latent guide site whose distribution has no reparameterised sampler
(``has_rsample`` is False): no gradient flows through its sample. All other latent guide sites are *path sites*;
those that are ``Delta`` are no random choice, but a deterministic function of the parameters and other sites.

A *level* is a set of sites that are drawn together: a plate that has particles of its own, with all that is inside
of it, or what is *shared* by all of these, which is everything where no plate is named. The arrays of a named plate
have an axis for its particles before those of the plates.

Plate dimensions are kept: a density of one particle has as many dimensions as the deepest plate, of size 1 where
the plate is summed over, so that arrays of all levels broadcast.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
import math
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import random
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.handlers import replay, substitute, trace
from numpyro.primitives import Messenger

from numpyro_vimco.validation import (
    Trace,
    check_plate_particles,
    check_shape,
    check_traces,
    dependence_error,
    subsample_error,
)

T = TypeVar("T")
Density = Float[Array, "*plates"]


class Levels(NamedTuple, Generic[T]):
    """One thing for what all local particles share, and one for each named plate."""

    shared: T
    local: dict[str, T]


def map_levels(fn: Callable, *levels: Levels) -> Levels:
    """Apply a function to each level."""
    shared = fn(*(level.shared for level in levels))
    return Levels(shared, {name: fn(*(level.local[name] for level in levels)) for name in levels[0].local})


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
    def log_weight(self) -> Density:
        """The log-weight, log p(x, z) - log q(z)."""
        return self.model - self.guide_path - self.guide_score


@jax.tree_util.register_static
@dataclass(frozen=True)
class Structure:
    """How the plates combine densities; static.

    :ivar ndim: number of plate dimensions.
    :ivar dims: the dimensions that each level keeps: the plates common to all of its sites.
    :ivar scale: factor of the bound, from subsampled plates that are common to all sites.
    :ivar local_scale: factor of each named plate's sum of log-weights, from its own subsampling.
    """

    ndim: int
    dims: Levels[frozenset[int]]
    scale: float
    local_scale: dict[str, float]

    def __hash__(self) -> int:
        return hash((self.ndim, self.dims.shared, self.scale))

    def level_scale(self, level: str | None) -> float:
        """The factor by which the subsampling of its plates scales each density of a level."""
        return self.scale if level is None else self.scale * self.local_scale[level]

    def sum_to_level(self, log_prob: Array, level: str | None) -> Density:
        """Sum a log-density over all dimensions but those of its level, which are kept."""
        keep = self.dims.shared if level is None else self.dims.local[level]
        ndim = jnp.ndim(log_prob)
        summed = jnp.sum(log_prob, axis=[i for i in range(ndim) if i - ndim not in keep], keepdims=True)
        return summed.reshape((1,) * (self.ndim - ndim) + summed.shape[max(ndim - self.ndim, 0) :])

    def sum_to_shared(self, local: Array) -> Array:
        """Sum what is per element of a named plate to the plates of the shared level; leading axes are free."""
        axes = [dim for dim in range(-self.ndim, 0) if dim not in self.dims.shared]
        return jnp.sum(local, axis=axes, keepdims=True)


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


def is_latent_site(site: dict) -> bool:
    """Whether ``site`` is latent."""
    return site["type"] == "sample" and not site["is_observed"]


def is_score_function_site(site: dict) -> bool:
    """Whether ``site`` is latent and its distribution has no reparameterised sampler.

    A discrete distribution or a mixture never has one, whatever its ``has_rsample`` says: that is True by default
    for a distribution without ``arg_constraints``, which mixtures were before NumPyro 0.22.
    """
    if not is_latent_site(site):
        return False
    fn = site["fn"]
    if not fn.has_rsample or fn.support.is_discrete:
        return True
    return any(isinstance(base, (dist.MixtureSameFamily, dist.MixtureGeneral)) for base in _base_distributions(fn))


def is_drawn(site: dict) -> bool:
    """Whether ``site`` is latent and a random choice: a Delta is a function of parameters and other sites."""
    return is_latent_site(site) and not isinstance(_base_distributions(site["fn"])[-1], dist.Delta)


@dataclass(frozen=True)
class Program:
    """A model and its guide with their arguments, to be evaluated one particle at a time.

    :ivar by_score: tells the guide sites whose samples carry no gradient.
    :ivar plate_particles: number of particles of their own that the named plates have.
    :ivar linear: whether the objective is linear in the log-weights (α = 1), so that plates that are not common
        to all sites may be subsampled.

    All methods raise the errors of :mod:`numpyro_vimco.validation`.
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
        model_key, guide_key, local_keys = self._split(rng_key)

        def run(local_keys):
            guide_trace = self._trace_guide(params, guide_key, local_keys)
            return self._trace_model(params, model_key, guide_trace), guide_trace

        def densities(model_trace, guide_trace):
            structure = self._structure(model_trace, guide_trace)
            model = self._sum_sites(model_trace, structure, _scaled)
            score = self._sum_sites(guide_trace, structure, lambda site, _: self.by_score(site) and _log_prob(site))
            path = self._sum_sites(guide_trace, structure, partial(_scaled, beside=self.by_score))
            return map_levels(Densities, model, path, score), structure

        return self._over_local(run, densities, local_keys)

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
        are evaluated at parameters with gradients stopped. Delta sites, scales and factors of the guide are
        functions of the parameters like any other part of the model.
        """
        model_key, guide_key, local_keys = self._split(rng_key)

        def run(local):
            keys = {name: key for name, (key, _) in local.items()}
            given = dict(values.shared)
            for _, plate_values in local.values():
                given.update(plate_values)
            frozen = self._trace_guide(stop_gradient(params), guide_key, keys, given)
            live = frozen
            if any(not is_drawn(site) or site["scale"] is not None for site in _sample_sites(frozen)):
                live = self._trace_guide(params, guide_key, keys, given)
            return self._trace_model(params, model_key, live), frozen, live

        def log_weights(model_trace, frozen, live):
            structure = self._structure(model_trace, frozen)
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
                level = self._level(site)
                log_prob = _log_prob(site) if self.by_score(site) else None
                draws = levels.shared if level is None else levels.local[level]
                draws[name] = Draw(site["value"], log_prob, site["fn"].event_dim)
        return levels

    # Levels.

    def _level(self, site: dict) -> str | None:
        """The named plate that a site is in, or None."""
        return next((frame.name for frame in site["cond_indep_stack"] if frame.name in self.plate_particles), None)

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
            mapped = jax.vmap(mapped, in_axes=(axes,), out_axes=(Levels(None, axes), None), axis_name=name)
        try:
            return mapped(local)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            first = jax.tree.map(lambda x: x[0], local)
            raise self._dependence_error(run, local, first) from None

    def _dependence_error(self, run: Callable, local: dict, first: dict) -> Exception:
        """Name the site that is outside of a named plate and depends on its latents."""
        for plate in local:
            names: list[str] = []

            def log_probs(particle, plate=plate, names=names):
                sites = [site for tr in run({**first, plate: particle}) for site in _sample_sites(tr)]
                outside = [site for site in sites if plate != self._level(site)]
                names[:] = [site["name"] for site in outside]
                return [_log_prob(site) for site in outside]

            jax.eval_shape(log_probs, first[plate])
            for i, name in enumerate(names):
                try:
                    jax.eval_shape(jax.vmap(lambda particle, i=i: log_probs(particle)[i], out_axes=None), local[plate])
                except ValueError:
                    return dependence_error(name, plate)
        return AssertionError("no site outside of a named plate depends on it, but a density does")

    def _structure(self, model_trace: Trace, guide_trace: Trace) -> Structure:
        sites = _sample_sites(model_trace) + _sample_sites(guide_trace)
        plate_sites = {**guide_trace, **model_trace}
        common = _common_plates(sites)
        units = {
            name: _common_plates([site for site in sites if self._level(site) == name]) for name in self.plate_particles
        }
        scale, local_scale = 1.0, dict.fromkeys(units, 1.0)
        for frame in {frame for site in sites for frame in site["cond_indep_stack"]}:
            # A plate inside of `scan` is not recorded in the trace, and cannot be subsampled there.
            size = plate_sites[frame.name]["args"][0] if frame.name in plate_sites else frame.size
            if size == frame.size:
                continue
            inside = {self._level(site) for site in sites if frame in site["cond_indep_stack"]} - {None}
            level = next((name for name in units if frame in units[name]), None)
            if frame in common:
                scale *= size / frame.size
            elif self.linear and level is not None:
                local_scale[level] *= size / frame.size
            elif not self.linear or inside:
                raise subsample_error(frame, size, [s["name"] for s in sites if frame not in s["cond_indep_stack"]])
        deepest = min((frame.dim for site in sites for frame in site["cond_indep_stack"]), default=0)
        dims = Levels(_dims(common), {name: _dims(plates) for name, plates in units.items()})
        return Structure(-deepest, dims, scale, local_scale)

    def _sum_sites(self, tr: Trace, structure: Structure, density: Callable) -> Levels[Density]:
        """Sum ``density(site, plate_scale)`` over the sites of each level; None or False stands for nothing."""
        totals: dict[str | None, Density] = dict.fromkeys(
            [None, *self.plate_particles], jnp.zeros((1,) * structure.ndim)
        )
        for site in _sample_sites(tr):
            level = self._level(site)
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


def _sample_sites(tr: Trace) -> list[dict]:
    return [site for site in tr.values() if site["type"] == "sample"]


def _common_plates(sites: list[dict]) -> set:
    return set.intersection(*(set(site["cond_indep_stack"]) for site in sites)) if sites else set()


def _dims(plates: set) -> frozenset[int]:
    return frozenset(frame.dim for frame in plates)


def _base_distributions(fn: dist.Distribution) -> list[dist.Distribution]:
    """A distribution and those that it wraps."""
    found = [fn]
    while hasattr(found[-1], "base_dist"):
        found.append(found[-1].base_dist)
    return found


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
