# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A variational approximation: a model and a guide with parameters, arguments and data that have been checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
import inspect
from typing import Any
import warnings

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI

from numpyro_vimco.checks.supports_and_plates import check_plates
from numpyro_vimco.compilation import map_arrays
from numpyro_vimco.control_flow import Given, is_in_scan
from numpyro_vimco.densities.chains import Chains, find_chains, marked, numbers
from numpyro_vimco.densities.enumeration import summed_sites
from numpyro_vimco.dependence import dependence
from numpyro_vimco.draws.observed import Observed, find_observed, given_name, observed_sites, present_elements
from numpyro_vimco.guides.auto_mixed import AutoMixed
from numpyro_vimco.guides.automatic import automatic_guides, with_first_calls, with_known_draws
from numpyro_vimco.sites import Trace, base_distributions, is_delta, is_latent_site, sample_sites

# Elements of the largest array of a chunk of particles: 4 MiB in single precision, which a processor's cache holds.
# Four times as fast as 64 MiB, whose memory is new to the process for each chunk.
CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class Approximation:
    """A model and a guide, traced once, with the parameters of one fit or of several starts.

    :ivar args: arguments of model and guide.
    :ivar kwargs: keyword arguments, static ones among them.
    :ivar starts: parameters, with a leading axis for starts.
    :ivar num_starts: number of starts.
    :ivar best: the start whose parameters count where one has to be chosen.
    :ivar guide_trace: the guide at one draw, for the structure of its sites.
    :ivar model_trace: the model at this draw.
    :ivar sampled: names of the guide's latents.
    :ivar observed: its observed sites.
    :ivar subsampled: a subsampled plate, with its number of elements of how many; None where all data are there.
    """

    svi: SVI
    args: tuple
    kwargs: dict[str, Any]
    starts: dict[str, Any]
    num_starts: int
    best: int
    guide_trace: Trace
    model_trace: Trace
    sampled: frozenset[str]
    observed: dict[str, Observed]
    subsampled: tuple[str, int, int] | None
    _kept: dict[Any, Any]

    @classmethod
    def of(
        cls, svi: SVI, starts: Mapping[str, Any], num_starts: int, args: tuple, kwargs: Mapping[str, Any]
    ) -> "Approximation":
        """Trace model and guide at the parameters of the first start.

        :raises ValueError: for parameters that do not fit model and guide, or data that are drawn in part or NaN.
        """
        kwargs = {**svi.static_kwargs, **kwargs}
        params = taken(starts, 0)
        for part in automatic_guides(svi.guide):
            if isinstance(part, AutoMixed):
                part.check_arguments(*args, **kwargs)

        def traces() -> tuple[Trace, Trace]:
            guide = seed(with_known_draws(svi.guide), random.key(0))
            _check_params("guide", trace(guide).get_trace(*args, **kwargs), params)
            guide_trace = trace(substitute(guide, data=params)).get_trace(*args, **kwargs)
            latents = {name: site["value"] for name, site in guide_trace.items() if is_latent_site(site)}
            model = Given(seed(svi.model, random.key(1)), latents)
            model_trace = trace(model).get_trace(*args, **kwargs)
            _check_params("model", model_trace, params)
            if any(site["type"] == "param" for site in model_trace.values()):
                model = Given(substitute(seed(svi.model, random.key(1)), data=params), latents)
                model_trace = trace(model).get_trace(*args, **kwargs)
            return guide_trace, model_trace

        guide_trace, model_trace = with_first_calls(traces)
        _validate(guide_trace, model_trace)
        latents = {name: site["value"] for name, site in guide_trace.items() if is_latent_site(site)}
        subsampled = _subsampled(guide_trace) or _subsampled(model_trace)
        if not subsampled:
            check_plates(model_trace, guide_trace)
        check_given(svi.model, model_trace, args, kwargs)
        observed = find_observed(model_trace, *_moving(svi, params, latents, args, kwargs))
        check_data(model_trace, observed)
        sampled = frozenset(latents)
        found = guide_trace, model_trace, sampled, observed, subsampled
        return cls(svi, args, kwargs, dict(starts), num_starts, 0, *found, {})

    def at(self, starts: Mapping[str, Any], num_starts: int, best: int = 0) -> "Approximation":
        """The same model and guide with the parameters of other starts; what was found out and compiled stays."""
        return replace(self, starts=dict(starts), num_starts=num_starts, best=best)

    def only(self, start: int) -> "Approximation":
        """One start."""
        return self.at(taken(self.starts, np.array([start])), 1)

    def kept(self, name: Any, make: Callable[[], Any]) -> Any:
        """What was made under a name before, or is made now. It must not depend on parameters.

        Samplers with their compiled programs are kept, and what the structure of a program is.
        """
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def check_has_posterior(self) -> None:
        """Raise where there are no latents, or not all data.

        :raises ValueError: for a subsampled plate, with which the posterior would be that of the subsample; or for a
            model without latents.
        """
        if self.subsampled:
            name, number, size = self.subsampled
            raise ValueError(
                f"Plate '{name}' is subsampled ({number} of {size}). The posterior is that of all data: "
                "`Posterior(posterior.svi, posterior, ...)` with arguments of the model for which the plate is whole. "
                "An automatic guide subsamples as at its first call, unless it is given `create_plates`."
            )
        if not self._has_latents:
            raise ValueError(
                "The model has no latent site, so that there is no posterior to describe. Pass model arguments with "
                "which what is to be inferred is not observed."
            )

    def has_posterior(self) -> bool:
        """Whether there are latents, and all data."""
        return not self.subsampled and self._has_latents

    @property
    def _has_latents(self) -> bool:
        return any(is_latent_site(site) for site in self.model_trace.values())

    @cached_property
    def params(self) -> dict[str, Any]:
        """Parameters of the start ``best``."""
        return taken(self.starts, self.best)

    @cached_property
    def params_of_model(self) -> frozenset[str]:
        """Names of parameters of the model. Where there are any, each start has a posterior of its own."""
        return frozenset(name for name, site in self.model_trace.items() if site["type"] == "param")

    @property
    def summed(self) -> list[str]:
        """Names of the latents that are summed out: they are marked, and the guide does not sample them."""
        return summed_sites(self.model_trace, self.sampled)

    def latents(self, plate: str | None = None) -> Trace:
        """The sites of the model that the guide samples.

        :param plate: a plate that they are in. Defaults to None: all of them.
        """
        return {
            name: site
            for name, site in self.model_trace.items()
            if is_latent_site(site)
            and name in self.sampled
            and (plate is None or any(frame.name == plate for frame in site["cond_indep_stack"]))
        }

    @property
    def event_dims(self) -> dict[str, int]:
        """Number of dimensions of an event of each latent that the guide samples."""
        return {name: site["fn"].event_dim for name, site in self.latents().items()}

    @property
    def plate_particles(self) -> Mapping[str, int]:
        """The objective's number of local particles of each named plate; empty for objectives without them."""
        return getattr(self.svi.loss, "plate_particles", {})

    @property
    def chains(self) -> Chains:
        """The chains that the objective has samples of."""
        particles = getattr(self.svi.loss, "chain_particles", {})
        return self.kept("chains", lambda: self._find_chains(particles)) if particles else {}

    def _find_chains(self, particles: Mapping[str, int]) -> Chains:
        model, guide = (substitute(fn, data=self.params) for fn in (self.svi.model, self.svi.guide))
        return find_chains(model, guide, self.args, self.kwargs, particles)

    @property
    def local(self) -> dict[str, int]:
        """The objective's number of local particles of each named plate, and of samples of a step of each chain."""
        return numbers(self.plate_particles, self.chains)

    @property
    def joint_chain(self) -> str | None:
        """A latent inside of `scan` whose path is one value, and that could be a chain."""

        def make() -> str | None:
            known = {latent for chain in self.chains.values() for latent in chain.latents}
            for name, site in self.latents().items():
                if is_in_scan(site) and name not in known:
                    try:
                        self._find_chains({name: 2})
                    except ValueError:  # it is not of first order
                        continue
                    return name
            return None

        return self.kept("joint chain", make)

    @property
    def first_params(self) -> dict[str, Any]:
        """The guide's parameters where it begins."""

        def make() -> dict[str, Any]:
            tr = with_first_calls(
                lambda: trace(seed(self.svi.guide, random.key(0))).get_trace(*self.args, **self.kwargs)
            )
            return {name: site["value"] for name, site in tr.items() if site["type"] == "param"}

        return self.kept("first parameters", make)

    def latents_of(self, level: str) -> tuple[str, ...]:
        """Names of the latents of a named plate or a chain that the guide samples."""
        return self.chains[level].latents if level in self.chains else tuple(self.latents(level))

    @property
    def model(self) -> Callable:
        """The model, in which sites of chains are marked."""
        return marked(self.svi.model, self.chains)

    @property
    def guide(self) -> Callable:
        """The guide, likewise."""
        return marked(self.svi.guide, self.chains)

    def chunk_size(self) -> int:
        """How many particles to evaluate at a time: the objective's ``chunk_size``, else by the size of the model."""
        if getattr(self.svi.loss, "chunk_size", None):
            return self.svi.loss.chunk_size
        return self.num_at_a_time(self._locals)

    def num_at_a_time(self, local_particles: int = 1, largest: int = 1) -> int:
        """How many particles to evaluate at a time, by the size of the model's largest array.

        :param local_particles: number of local particles of each particle.
        :param largest: size of an array that there is beside the model's.
        """
        return int(np.clip(CHUNK_ELEMENTS // (max(largest, self.size) * local_particles), 1, 2**14))

    @cached_property
    def size(self) -> int:
        """The number of elements of the largest array of a particle.

        Tables of probabilities count as well: a draw of one of 30,000 values takes as many random numbers.
        """
        sites = sample_sites(self.model_trace) + sample_sites(self.guide_trace)
        return max(np.size(leaf) for site in sites for leaf in jax.tree.leaves((site["value"], site["fn"])))

    @cached_property
    def has_deltas(self) -> bool:
        """Whether the guide has a latent of a single value."""
        return any(map(is_delta, self.guide_trace.values()))

    @property
    def num_particles(self) -> int:
        """The number of particles of a step, local ones counted."""
        return self.svi.loss.num_particles * self._locals

    @property
    def _locals(self) -> int:
        """How often what depends on all levels is evaluated for a particle: of a chain at all pairs of samples."""
        return int(np.prod([1, *self.plate_particles.values(), *(c.num_samples**2 for c in self.chains.values())]))


def misfit(svi: SVI, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Why arguments do not fit the signature of the model or of the guide; None if they do."""
    return signature_misfit(svi.model, args, kwargs) or signature_misfit(svi.guide, args, kwargs)


def signature_misfit(fn: Callable, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Why arguments do not fit a signature; None if they do."""
    try:
        inspect.signature(fn).bind(*args, **kwargs)
    except TypeError as error:
        return f"`{getattr(fn, '__name__', type(fn).__name__)}`: {error}"
    return None


def one_start(starts: Any, start: Any) -> Any:
    """What is of one start, in a pytree with a leading axis for starts; inside of a program."""
    return jax.tree.map(lambda leaf: leaf[start], starts)


def taken(starts: Mapping[str, Any], index: int | np.ndarray) -> dict[str, Any]:
    """Parameters of one start, or of some. By NumPy, as JAX would compile a program for each shape."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[index]), dict(starts))


def _moving(svi: SVI, params, latents, args, kwargs) -> tuple[set[str], set[str]]:
    """The observed sites whose mask depends on a latent, and those whose value does."""

    def look(latents):
        model = Given(substitute(seed(svi.model, random.key(1)), data=params), latents)
        sites = observed_sites(trace(model).get_trace(*args, **kwargs))
        masks = {("mask", name): jnp.asarray(present_elements(site["fn"])) for name, site in sites.items()}
        return masks | {("value", name): jnp.asarray(site["value"]) for name, site in sites.items()}

    moving: set[Any] = {about for about, sources in dependence(look, latents).items() if sources}
    return {name for kind, name in moving if kind == "mask"}, {name for kind, name in moving if kind == "value"}


def drawn_sites(model: Callable, model_trace: Trace, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """Names of observed sites whose value depends on the key when all that is latent is given.

    Often `condition` has a series that is shorter than its `scan`, which draws the rest.
    """
    latents = {name: site["value"] for name, site in model_trace.items() if is_latent_site(site)}
    # A subsample is drawn too, but its data are data.
    others = {name: site["value"] for name, site in model_trace.items() if site["type"] in ("param", "plate")}

    def values(keys):
        given = Given(substitute(seed(model, keys["key"]), data=others), latents)
        return {name: site["value"] for name, site in observed_sites(trace(given).get_trace(*args, **kwargs)).items()}

    return [name for name, sources in dependence(values, {"key": random.key(1)}).items() if sources]


def check_given(model: Callable, model_trace: Trace, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise for an observed site whose value is random.

    :raises ValueError: naming the site.
    """
    for name in drawn_sites(model, model_trace, args, kwargs):
        raise ValueError(
            f"Site '{given_name(name, model_trace)}' is observed, but its value is drawn, in part at least: the "
            "drawn part is neither data nor latent. Often `condition` has a series that is shorter than its "
            "`scan`. Pass the whole series; or leave the future out, in the fit and after it; or make the rest a "
            "latent site of its own."
        )


def check_data(model_trace: Trace, observed: Mapping[str, Observed]) -> None:
    """Raise for NaN data that are not masked and have no density.

    :raises ValueError: naming the site.
    """
    for name, about in observed.items():
        fn: Distribution = model_trace[name]["fn"]
        value = np.broadcast_to(np.asarray(model_trace[name]["value"]), about.present.shape)
        if not np.issubdtype(value.dtype, np.inexact) or not np.any(missing := np.isnan(value) & about.present):
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Out-of-support values")  # NumPyro's, which names no site
            log_prob = fn.log_prob(model_trace[name]["value"])
        bad = missing.any(tuple(range(-fn.event_dim, 0))) & ~np.isfinite(log_prob)
        if bad.any():
            raise ValueError(
                f"The data of site '{about.name}' are NaN in {missing.sum():,} of {missing.size:,} places that are not "
                "masked, and have no density there. Missing data: mask them by "
                "`numpyro.handlers.mask(mask=~jnp.isnan(data))`, or have them imputed by "
                f"`numpyro.sample('{about.name}', …, obs=data, obs_mask=~jnp.isnan(data))`."
            )


def _validate(*traces: Trace) -> None:
    """NumPyro's validation of distributions, which it leaves out where JAX traces their arguments.

    :raises ValueError: as NumPyro, naming the site.
    """
    for site in (site for tr in traces for site in sample_sites(tr)):
        for fn in base_distributions(site["fn"]):
            if not getattr(fn, "_validate_args", False):  # by `numpyro.enable_validation`
                continue
            try:
                map_arrays(np.asarray, fn).validate_args(strict=False)  # by NumPy nothing is compiled
            except ValueError as error:
                raise ValueError(f"Site '{site['name']}' is wrong. NumPyro says: {error}") from None


def _check_params(program: str, declared: Trace, params: Mapping) -> None:
    """Raise unless the parameters are those that a model or a guide declares.

    :raises ValueError: for a parameter that is missing, has another shape, or is NaN.
    """
    for name, site in declared.items():
        if site["type"] != "param":
            continue
        if name not in params:
            raise ValueError(
                f"The {program} has a parameter '{name}', which the given ones lack: {', '.join(map(repr, params))}. "
                "Pass the result of its own fit."
            )
        expected, given = (jax.tree.map(jnp.shape, value) for value in (site["value"], params[name]))
        if expected != given:
            raise ValueError(
                f"The {program}'s parameter '{name}' has shape {expected}, but {given} was given. Pass the result of "
                "its own fit, and the model arguments that it was fitted with."
            )
        if any(np.isnan(leaf).any() for leaf in jax.tree.leaves(params[name]) if _is_float(leaf)):
            raise ValueError(
                f"The {program}'s parameter '{name}' is NaN: the fit broke down. Often the model computes something of "
                "infinite derivative before a distribution, such as `jnp.log(z)` where z can be 0: write "
                "`jnp.log(jnp.where(z > 0, z, 1))`, and let a mask or a factor say what is impossible. Else take a "
                "smaller learning rate, or skip such steps (`stable_update=True`)."
            )


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _subsampled(tr: Trace) -> tuple[str, int, int] | None:
    """The name of a subsampled plate, and how many of how many elements it has."""
    for name, site in tr.items():
        if site["type"] == "plate" and len(site["value"]) != site["args"][0]:
            return name, len(site["value"]), site["args"][0]
    return None
