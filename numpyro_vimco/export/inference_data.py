# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""From a fitted guide to ArviZ: draws first, then groups with names."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace

import numpyro_vimco
from numpyro_vimco.arguments import warn
from numpyro_vimco.control_flow import Given
from numpyro_vimco.draws.approximation import Approximation, one_start
from numpyro_vimco.draws.chunks import Chunked
from numpyro_vimco.draws.observed import imputed_name, observed_sites, whole
from numpyro_vimco.draws.proposals import plate_names, squeezed, structure_of
from numpyro_vimco.export.log_likelihoods import find_elements, local_evidence
from numpyro_vimco.export.posterior_draws import PosteriorDraws
from numpyro_vimco.randomness import split, split_by_name, split_into
from numpyro_vimco.sites import can, is_latent_site, log_prob_at_value

GROUPS = ("posterior_predictive", "log_likelihood", "log_likelihood_given_latents", "prior")


def to_arviz(
    draws: PosteriorDraws,
    rng_key: Array,
    *,
    groups: Collection[str] | str,
    predictions: Mapping[str, Any] | None,
    constant_data: Mapping[str, Any] | None,
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, list[str]] | None,
    attributes: Mapping[str, Any],
    progress_bar: bool,
):
    """Draws of the posterior with what follows from them, as :meth:`.Posterior.to_arviz` says.

    :param attributes: of the posterior, beside those of its draws.
    """
    groups = (groups,) if isinstance(groups, str) else groups
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"`groups` has {', '.join(map(repr, sorted(unknown)))}, but must be some of {GROUPS}.")
    approx = draws.approx
    found, found_dims = _groups(draws, rng_key, groups, progress_bar)
    data: dict[str, Any] = dict(found)
    data |= {
        "observed_data": {
            about.name: about.only_present(approx.model_trace[name]["value"])
            for name, about in approx.observed.items()
            if about.is_data
        },
        "constant_data": {name: np.asarray(value) for name, value in (constant_data or {}).items()},
        "predictions": {name: np.asarray(value)[None] for name, value in (predictions or {}).items()},
    }
    data = {group: values for group, values in data.items() if values}
    tree = _from_dict(data, coords, {**_dims(approx), **found_dims, **(dims or {})})
    quality: dict[str, Any] = dict(draws.quality[0])
    if draws.num_chains > 1:
        quality = {name: [of_chain[name] for of_chain in draws.quality] for name in quality}
    loss = approx.svi.loss
    tree["posterior"].attrs.update(
        {
            "inference_library": "numpyro_vimco",
            "inference_library_version": numpyro_vimco.__version__,
            "objective": type(loss).__name__,
            **{name: getattr(loss, name) for name in ("alpha", "num_particles") if hasattr(loss, name)},
            **attributes,
            **quality,
        }
    )
    return tree


def _groups(
    draws: PosteriorDraws, rng_key: Array, groups: Collection[str], progress_bar: bool
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, list[str]]]:
    """By group and variable, arrays of shape ``(chains, draws, ...)``; and dimensions of what is no site."""

    def progress(what: str) -> str | None:
        return what if progress_bar else None

    approx = draws.approx
    keys = split_by_name(rng_key, ("posterior", "elements", "prior"))
    structure = structure_of(approx, approx.local)
    stats = {name: squeezed(value, structure.dims, structure) for name, value in draws.stats.items()}
    dims = dict.fromkeys(stats, plate_names(approx, structure.dims))
    elements, averaged = find_elements(approx, structure) if "log_likelihood" in groups else ([], set())
    given_latents = {
        "log_likelihood": frozenset(approx.observed) - averaged if "log_likelihood" in groups else frozenset(),
        "log_likelihood_given_latents": frozenset(approx.observed if "log_likelihood_given_latents" in groups else ()),
    }
    found = _followed(approx, "posterior_predictive" in groups, given_latents).all(
        approx.starts,
        split(keys["posterior"], len(draws.start)),
        draws.start,
        draws.latents,
        progress=progress("posterior"),
    )
    found["sample_stats"] = stats | draws.extra
    for about, key in zip(elements, split_into(keys["elements"], max(len(elements), 1))):
        if about.plate is None:
            values = squeezed(draws.log_evidence, structure.dims, structure)
            values = np.repeat(values, draws.num_draws, axis=0)
        else:
            what = progress(f"log-likelihood of {about.name}")
            values = local_evidence(about.plate, approx, key, draws.sampled, draws.start, what)
        found["log_likelihood"][about.name] = np.where(about.present, values, np.nan)
        dims[about.name] = about.dims
    chains = draws.num_chains
    by_chain = {
        group: {name: value.reshape(chains, -1, *value.shape[1:]) for name, value in of_group.items()}
        for group, of_group in found.items()
    }
    if "prior" in groups:
        number = draws.num_draws
        start, nothing = np.full(number, approx.best), dict[str, Array]()
        try:
            prior = _followed(approx, True, {}).all(
                approx.starts, split(keys["prior"], number), start, nothing, progress=progress("prior")
            )
        except NotImplementedError as error:  # the posterior must not be lost with it
            improper = [name for name, site in approx.latents().items() if not can(site["fn"].sample, random.key(0))]
            warn(
                f"The groups of the prior are left out, as it cannot be sampled: {', '.join(map(repr, improper))} "
                f"{'has' if len(improper) == 1 else 'have'} no sampler (an improper prior, for example). {error}",
            )
            return by_chain, dims
        prior = jax.tree.map(lambda value: value[None], prior)
        by_chain |= {"prior": prior["posterior"], "prior_predictive": prior["posterior_predictive"]}
    return by_chain, dims


def _followed(approx: Approximation, predict: bool, likelihoods: Mapping[str, frozenset[str]]) -> Chunked:
    name = "followed", predict, *likelihoods.items()
    return approx.kept(name, lambda: Chunked(_follow(approx, predict, likelihoods), approx.chunk_size()))


def _follow(approx: Approximation, predict: bool, likelihoods: Mapping[str, Collection[str]]) -> Callable:
    """What follows from the latents of one draw: the posterior with deterministic sites, new data, log-likelihoods.

    Latents that are not given are drawn from the prior.

    :param likelihoods: by group, the observed sites whose log-likelihoods given the latents it has.
    """
    shown = [
        name
        for name, site in approx.model_trace.items()
        if site["type"] == "deterministic" or (is_latent_site(site) and not imputed_name(name, approx.model_trace))
    ]

    def log_likelihood(site: dict) -> Array:
        about = approx.observed[site["name"]]
        log_prob = log_prob_at_value(site)
        return log_prob if about.present.all() else jnp.where(about.elements, log_prob, jnp.nan)

    def follow(starts: Any, rng_key: Array, start: Array, latents: dict[str, Array]) -> dict[str, dict[str, Array]]:
        model_key, predictive_key = split(rng_key)
        params = one_start(starts, start)
        model = Given(substitute(seed(approx.svi.model, model_key), data=params), latents)
        model_trace = trace(model).get_trace(*approx.args, **approx.kwargs)
        observed = observed_sites(model_trace)
        given_names = {name: approx.observed[name].name for name in observed}
        found = {"posterior": {name: model_trace[name]["value"] for name in shown}}
        if predict:
            keys = split_by_name(predictive_key, observed)
            new = {given_names[name]: _new_data(site, keys[name]) for name, site in observed.items()}
            found["posterior_predictive"] = {name: value for name, value in new.items() if value is not None}
        for group, names in likelihoods.items():
            found[group] = {given_names[name]: log_likelihood(observed[name]) for name in observed if name in names}
        return found

    return follow


def _new_data(site: dict, rng_key: Array) -> Array | None:
    try:
        return whole(site).sample(rng_key)
    except Exception as error:  # Whatever it is, the posterior must not be lost with it.
        name, reason = site["name"], f"{type(error).__name__}: {error}".splitlines()[0]
        warn(
            f"The predictive groups are without site '{name}', as its distribution cannot be sampled: {reason}",
        )
        return None


# Laying out.


def _dims(approx: Approximation) -> dict[str, list[str]]:
    """Names of the dimensions of each site: its plates, then its ``event_dims``."""
    named = {}
    for name, site in approx.model_trace.items():
        if site["type"] not in ("sample", "deterministic"):
            continue
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
        shape = whole(site).batch_shape if site["type"] == "sample" else np.shape(site["value"])
        batch = range(-len(shape), 0)
        sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"]}
        if site["type"] == "deterministic" and any(shape[dim] != sizes.get(dim) for dim in batch):
            continue  # it has dimensions of its own, or not those of its plates
        event = list(site["infer"].get("event_dims", [])) if site["type"] == "sample" else []
        dims = [plates.get(dim, f"{name}_dim_{i}") for i, dim in enumerate(batch)] + event
        if site["type"] == "sample":
            # By position, as ArviZ 0.x names them; ArviZ 1.x would begin with 0 again.
            dims += [f"{name}_dim_{i}" for i in range(len(dims), len(shape) + site["fn"].event_dim)]
        if dims:
            named[approx.observed[name].name if name in approx.observed else name] = dims
    return named


def _from_dict(data: dict, coords, dims):
    import arviz as az  # it takes seconds, as it brings Matplotlib and pandas

    if not az.__version__.startswith("0."):
        return az.from_dict(data, coords=coords, dims=dims)
    # ArviZ 0.x takes groups that it does not know as datasets only.
    own = {group: data.pop(group) for group in ("log_likelihood_given_latents",) if group in data}
    tree = az.from_dict(**data, coords=coords, dims=dims)
    for group, values in own.items():
        tree.add_groups({group: az.dict_to_dataset(values, coords=coords, dims=dims)})
    return tree
