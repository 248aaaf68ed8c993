# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""From a fitted guide to ArviZ."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

import arviz as az
from jax import random
from jaxtyping import Array
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult

from numpyro_vimco.arguments import check_integer
from numpyro_vimco.objectives.plates import Structure
from numpyro_vimco.posterior import proposals
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.proposals import (
    effective_sample_size,
    in_chunks,
    log_evidence,
    pareto_smooth,
    propose,
    take,
)
from numpyro_vimco.sites import Trace, is_latent_site, sample_sites, unwrapped

GROUPS = ("posterior_predictive", "log_likelihood", "prior")


def to_arviz(
    svi: SVI,
    svi_result: SVIRunResult,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_samples: int = 1000,
    num_proposals: int | None = None,
    resample: bool = True,
    groups: Collection[str] = ("posterior_predictive", "log_likelihood"),
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
):
    """
    The posterior as ArviZ knows it, from draws of the guide that are resampled by their importance weights. Named and
    ordered after ``arviz.from_numpyro_svi``, which takes draws of the guide as they are.

    Weights are Pareto-smoothed by ArviZ. Where plates are common to all sites, each of their elements has its own, and
    is resampled by itself; elements of a plate of ``plate_particles`` choose among their local particles first.
    Resampled draws repeat: their ESS as a chain means nothing, what counts is the attribute ``ess``.

    :param SVI svi: the inference object of the fit; with any objective.
    :param SVIRunResult svi_result: what ``svi.run`` returned.
    :param tuple model_args: the model's arguments, as in the fit; with all data, not a subsample.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_samples: number of posterior draws. Defaults to 1,000.
    :param int num_proposals: number of draws of the guide to resample from. Defaults to four times ``num_samples``.
    :param bool resample: False keeps ``num_samples`` draws of the guide as they are; their weights are
        ``sample_stats.log_weight``.
    :param groups: optional groups to compute: ``"posterior_predictive"`` and ``"log_likelihood"`` (the default; both
        have the size of the data for each draw), and ``"prior"``, which brings ``prior_predictive`` along. The
        posterior predictive draws observed sites anew, given the latents and, where a site depends on them, other data.
        Where data are masked, log-likelihoods are 0.
    :param dict constant_data: data to keep, by name.
    :param dict coords: coordinates by dimension.
    :param dict dims: names of dimensions by site. Others are named by their plates, and by
        ``infer={"event_dims": [...]}`` of their site.
    :return: an ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups posterior (with deterministic
        sites), sample_stats (``log_weight``, ``log_p``, ``log_q`` in nats; by element of common plates), observed_data,
        and those asked for. Attributes of the posterior: the library and its version, objective, its alpha and number
        of particles, number of steps, number of proposals, ``log_evidence`` (nats), ``pareto_k`` and ``ess`` (of the
        worst element).
    :raises ValueError: for parameters that do not fit the guide, arguments that do not fit the model, a
        subsampled plate, a model without latents, no draws, fewer proposals than draws, or an unknown group.
    """
    num_samples = check_integer("num_samples", num_samples, 1, "it is the number of posterior draws")
    if num_proposals is None or not resample:
        num_proposals = 4 * num_samples if resample else num_samples
    num_proposals = check_integer(
        "num_proposals", num_proposals, num_samples, "draws are chosen among them, and each should be there once"
    )
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"`groups` has {', '.join(map(repr, sorted(unknown)))}, but must be some of {GROUPS}.")
    fit = Fitted.of(svi, svi_result.params, model_args, model_kwargs)
    proposal_key, choice_key, follow_key, prior_key = random.split(rng_key, 4)
    drawn = propose(fit, proposal_key, num_proposals)
    smoothed, k = pareto_smooth(drawn.log_weight)
    latents, stats = drawn.values, {"log_weight": drawn.log_weight, "log_p": drawn.log_p, "log_q": drawn.log_q}
    if resample:
        index = proposals.resample(choice_key, smoothed, num_samples)
        latents = {name: take(value, index, fit.model_trace[name]["fn"].event_dim) for name, value in latents.items()}
        stats = {name: take(value, index) for name, value in stats.items()}
    summed = tuple(dim for dim in range(-drawn.structure.ndim, 0) if dim not in drawn.structure.dims)
    stats = {name: value.squeeze(summed) for name, value in stats.items()}

    parts = [group.removeprefix("posterior_") for group in groups]
    posterior = in_chunks(_follow(fit, parts), fit.chunk_size(), random.split(follow_key, num_samples), latents)
    draws = {"posterior": posterior["latent"], "sample_stats": stats}
    draws |= {group: posterior[part] for group, part in zip(groups, parts) if part in posterior}
    if "prior" in groups:
        prior = in_chunks(_follow(fit, ["predictive"]), fit.chunk_size(), random.split(prior_key, num_samples), {})
        draws |= {"prior": prior["latent"], "prior_predictive": prior["predictive"]}
    data = {group: {name: value[None] for name, value in values.items()} for group, values in draws.items() if values}
    data["observed_data"] = {
        name: np.broadcast_to(np.asarray(site["value"]), _whole(site).shape())
        for name, site in _observed(fit.model_trace).items()
    }
    data["constant_data"] = {name: np.asarray(value) for name, value in (constant_data or {}).items()}
    tree = _from_dict(
        {group: values for group, values in data.items() if values},
        coords,
        {**_dims(fit), **dict.fromkeys(stats, _common_dims(fit, drawn.structure)), **(dims or {})},
    )
    tree["posterior"].attrs.update(
        {
            "inference_library": "numpyro_vimco",
            "inference_library_version": version("numpyro_vimco"),
            "objective": type(svi.loss).__name__,
            **{k: getattr(svi.loss, k) for k in ("alpha", "num_particles") if hasattr(svi.loss, k)},
            "num_steps": len(svi_result.losses),
            "num_proposals": num_proposals,
            "log_evidence": float(log_evidence(drawn.log_weight).sum()),
            "pareto_k": float(k.max()),
            "ess": float(effective_sample_size(smoothed).min()),
        }
    )
    return tree


def _follow(fit: Fitted, parts: Collection[str]):
    """What follows from the latents of one draw: all of them, with deterministic sites, new data, log-likelihoods.

    Latents that are not given are drawn from the prior.
    """
    shown = [n for n, site in fit.model_trace.items() if is_latent_site(site) or site["type"] == "deterministic"]

    def follow(rng_key: Array, latents: dict[str, Array]) -> dict[str, dict[str, Array]]:
        model = substitute(seed(fit.svi.model, rng_key), data={**fit.params, **latents})
        model_trace = trace(model).get_trace(*fit.args, **fit.kwargs)
        observed = _observed(model_trace)
        found = {"latent": {name: model_trace[name]["value"] for name in shown}}
        if "predictive" in parts:
            keys = random.split(random.fold_in(rng_key, 1), max(len(observed), 1))
            found["predictive"] = {name: _whole(site).sample(key) for key, (name, site) in zip(keys, observed.items())}
        if "log_likelihood" in parts:
            found["log_likelihood"] = {name: site["fn"].log_prob(site["value"]) for name, site in observed.items()}
        return found

    return follow


def _observed(model_trace: Trace) -> Trace:
    """Observed sites; factors are none."""
    return {
        site["name"]: site
        for site in sample_sites(model_trace)
        if site["is_observed"] and not isinstance(unwrapped(site["fn"]), dist.Unit)
    }


def _whole(site: dict) -> dist.Distribution:
    """The distribution of a site with the batch shape that it takes with its value."""
    fn, shape = site["fn"], np.shape(site["value"])
    return fn.expand(np.broadcast_shapes(fn.batch_shape, shape[: len(shape) - fn.event_dim]))


def _dims(fit: Fitted) -> dict[str, list[str]]:
    """Names of the dimensions of each site: its plates, then its ``event_dims``."""
    named = {}
    for name, site in fit.model_trace.items():
        if site["type"] not in ("sample", "deterministic"):
            continue
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
        shape = _whole(site).batch_shape if site["type"] == "sample" else np.shape(site["value"])
        batch = range(-len(shape), 0)
        sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"]}
        if site["type"] == "deterministic" and any(shape[dim] != sizes.get(dim) for dim in batch):
            continue  # it has dimensions of its own, or not those of its plates
        event = list(site["infer"].get("event_dims", [])) if site["type"] == "sample" else []
        dims = [plates.get(dim, f"{name}_dim_{i}") for i, dim in enumerate(batch)] + event
        if dims:
            named[name] = dims
    return named


def _common_dims(fit: Fitted, structure: Structure) -> list[str]:
    frames = {frame for site in sample_sites(fit.model_trace) for frame in site["cond_indep_stack"]}
    common = sorted((frame for frame in frames if frame.dim in structure.dims), key=lambda frame: frame.dim)
    return [frame.name for frame in common]


def _from_dict(data: dict, coords, dims):
    if az.__version__.startswith("0."):
        return az.from_dict(**data, coords=coords, dims=dims)
    return az.from_dict(data, coords=coords, dims=dims)
