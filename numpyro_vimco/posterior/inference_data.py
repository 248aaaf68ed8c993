# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""From a fitted guide to ArviZ: draws first, then groups with names."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI

import numpyro_vimco
from numpyro_vimco.arguments import check_integer, check_key
from numpyro_vimco.control_flow import Given
from numpyro_vimco.posterior import weights
from numpyro_vimco.posterior.chunks import in_chunks
from numpyro_vimco.posterior.fitted import Fitted, Result
from numpyro_vimco.posterior.log_likelihoods import find_elements, local_evidence
from numpyro_vimco.posterior.observed import imputed_name, observed_sites, whole
from numpyro_vimco.posterior.pooling import pooled, propose_pooled
from numpyro_vimco.posterior.proposals import Draw, each_start, plate_names, program_of, propose, squeezed, take
from numpyro_vimco.posterior.results import FitResult
from numpyro_vimco.posterior.summed import draw_summed
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import is_latent_site, log_prob_at_value

GROUPS = ("posterior_predictive", "log_likelihood", "log_likelihood_given_latents", "prior")


def to_arviz(
    svi: SVI,
    svi_result: Result,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_samples: int = 1000,
    num_proposals: int | None = None,
    resample: bool = True,
    pool: bool = True,
    groups: Collection[str] | str = ("posterior_predictive", "log_likelihood"),
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    progress_bar: bool = True,
):
    """
    The posterior as ArviZ knows it, from draws of the guide that are resampled by their importance weights. Named and
    ordered after ``arviz.from_numpyro_svi``, which takes draws of the guide as they are.

    Some draws take a latent from the model in place of the guide, and all have the density of that mixture
    (:mod:`~numpyro_vimco.posterior.defence`). A result of ``fit`` has several starts, and their draws are pooled in the
    same way. So a part of the posterior that some starts lost is there if one has it. ``pool=False`` shows the starts
    apart, as chains: each has draws of its own guide with its own weights, and ``az.rhat``, ``az.plot_forest`` and
    ``az.plot_trace`` compare them as those of MCMC. Starts that failed are left out. Parameters of the model are those
    of the best start for all.

    Sites that the objective sums out (``infer={"enumerate": "parallel"}``) are drawn from their exact distribution
    given each draw of the others, along chains too.

    Weights are Pareto-smoothed. Where plates are common to all sites, each of their elements has its own, and
    is resampled by itself; elements of a plate of ``plate_particles`` choose among their local particles first.
    Resampled draws repeat: their ESS as a chain means nothing, what counts is the attribute ``ess``.

    All latents of ``num_proposals`` draws are held in memory with three densities for each element of plates that are
    common to all sites, and one value for each datum and draw for each of the groups posterior predictive and
    log-likelihood: 4 GB each for 1,000 draws of a million data.

    :param SVI svi: the inference object of the fit; with any objective.
    :param svi_result: what ``fit`` or ``svi.run`` returned, a state of ``svi.update``, or a dict of parameters.
    :param tuple model_args: the model's arguments, as in the fit; with all data, not a subsample.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_samples: number of posterior draws. Defaults to 1,000.
    :param int num_proposals: number of draws of the guide to resample from. Defaults to four times ``num_samples``.
    :param bool resample: False keeps ``num_samples`` draws of the guide as they are; their weights are
        ``sample_stats.log_weight``. There are no other proposals then.
    :param bool pool: of a result of ``fit``: True (default) pools the draws of all starts into one chain, False makes
        each start a chain, with ``num_samples`` draws of as many proposals each.
    :param groups: optional groups to compute, by default the first two:

        - ``"posterior_predictive"``: observed sites drawn anew, given the latents and, where a site depends on them,
          other data. Also where data are missing.
        - ``"log_likelihood"``, for ``az.loo`` and ``az.compare``. Of data in no plate with latents of its own, one
          value for each, under the name of their site. Of a plate that has latents of its own, say ``"site"``, one
          value for each element, under ``"site_element"``: of all data in the element, with its latents averaged out by
          256 local particles for each draw (as many evaluations of the plate), so that an element is left out with
          its latents. Where a plate is common to all sites it is the element's evidence, the same for all draws.
          Latents that are summed out are summed over, not given a draw.
        - ``"log_likelihood_given_latents"``: a value for each datum given all latents of the draw.
        - ``"prior"``: draws of the prior, with the group ``prior_predictive``.

        Log-likelihoods and observed data are NaN where data are masked. A site ``x`` with ``obs_mask`` keeps its name
        in all groups; imputed values are in ``posterior["x"]``.
    :param dict constant_data: data to keep, by name.
    :param dict coords: coordinates by dimension.
    :param dict dims: names of dimensions by site. Others are named by their plates, and by
        ``infer={"event_dims": [...]}`` of their site.
    :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to True.
    :return: an ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups posterior (with deterministic
        sites), sample_stats (``log_weight``, ``log_p``, ``log_q`` in nats; by element of common plates), observed_data,
        and those asked for. Attributes of the posterior: the library and its version, objective, its alpha and number
        of particles, number of steps if losses are known, number of proposals, ``log_evidence`` (nats), ``pareto_k``
        and ``ess`` (of the worst element). Where the guide fixes a continuous latent by a Delta, the evidence is NaN.
    :raises ValueError: for parameters that do not fit the guide, arguments that do not fit the model, a
        subsampled plate, a model without latents, data that are NaN, no draws, fewer proposals than draws, proposals
        beside ``resample=False``, an unknown group, or ``rng_key`` that is no key.
    :raises NotImplementedError: for starts whose draws cannot be pooled: a Delta site at a parameter.
    :warns UserWarning: for a plate with latents of its own that cannot be averaged out of its log-likelihood, and for
        an observed site whose distribution cannot be sampled.
    """
    check_key(rng_key)
    num_samples = check_integer("num_samples", num_samples, 1, "it is the number of posterior draws")
    if num_proposals is not None and not resample:
        raise ValueError(
            "`num_proposals` is given, but with `resample=False` draws are not chosen among proposals: `num_samples` "
            "draws of the guide are kept as they are. Leave `num_proposals` out."
        )
    if num_proposals is None:
        num_proposals = 4 * num_samples if resample else num_samples
    num_proposals = check_integer(
        "num_proposals", num_proposals, num_samples, "draws are chosen among them, and each should be there once"
    )
    groups = (groups,) if isinstance(groups, str) else groups
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"`groups` has {', '.join(map(repr, sorted(unknown)))}, but must be some of {GROUPS}.")
    fit = Fitted.of(svi, svi_result, model_args, model_kwargs)
    draws = _draw(fit, rng_key, num_samples, num_proposals, resample, pool, groups, progress_bar)
    observed = {about.name: about.only_present(fit.model_trace[name]["value"]) for name, about in fit.observed.items()}
    data: dict[str, Any] = dict(draws.groups)
    data |= {
        "observed_data": observed,
        "constant_data": {name: np.asarray(value) for name, value in (constant_data or {}).items()},
    }
    data = {group: values for group, values in data.items() if values}
    tree = _from_dict(data, coords, {**_dims(fit), **draws.dims, **(dims or {})})
    losses = getattr(svi_result, "losses", None)
    tree["posterior"].attrs.update(
        {
            "inference_library": "numpyro_vimco",
            "inference_library_version": numpyro_vimco.__version__,
            "objective": type(svi.loss).__name__,
            **{k: getattr(svi.loss, k) for k in ("alpha", "num_particles") if hasattr(svi.loss, k)},
            **({} if losses is None else {"num_steps": np.shape(losses)[-1]}),
            **({"starts": np.flatnonzero(~svi_result.failed)} if isinstance(svi_result, FitResult) else {}),
            "num_proposals": num_proposals,
            **draws.attributes,
        }
    )
    return tree


# Drawing.


@dataclass(frozen=True)
class Draws:
    """What was drawn.

    :ivar groups: by group and variable, arrays of shape ``(chains, draws, ...)``.
    :ivar dims: names of the other dimensions, of variables that are no sites.
    :ivar attributes: how good the weights were.
    """

    groups: dict[str, dict[str, np.ndarray]]
    dims: dict[str, list[str]]
    attributes: dict[str, Any]


def _draw(
    fit: Fitted,
    rng_key: Array,
    num_samples: int,
    num_proposals: int,
    resample: bool,
    pool: bool,
    groups: Collection[str],
    progress_bar: bool,
) -> Draws:
    def progress(what: str) -> str | None:
        return what if progress_bar else None

    keys = split_by_name(rng_key, ("proposals", "resampling", "posterior", "elements", "prior", "summed"))
    proposal_args = keys["proposals"], num_proposals, progress("proposals")
    if pool:
        sampler = pooled(fit)
        proposals = [propose_pooled(sampler, *proposal_args)]
    else:
        sampler = each_start(fit)
        proposals = propose(sampler, *proposal_args)
    structure, num_chains = sampler.structure, len(proposals)
    chains = [
        _weighed(drawn, fit, key, num_samples if resample else None)
        for drawn, key in zip(proposals, split(keys["resampling"], num_chains))
    ]
    del proposals  # they are large
    # The chains as one from here on.
    latents, stats = (jax.tree.map(_concatenate, *(chain[i] for chain in chains)) for i in (0, 1))

    stats = {name: squeezed(value, structure.dims, structure) for name, value in stats.items()}
    dims = dict.fromkeys(stats, plate_names(fit, structure.dims))

    elements, averaged = find_elements(fit, structure) if "log_likelihood" in groups else ([], set())
    given_latents = {
        "log_likelihood": set(fit.observed) - averaged if "log_likelihood" in groups else set(),
        "log_likelihood_given_latents": set(fit.observed) if "log_likelihood_given_latents" in groups else set(),
    }
    follow = _follow(fit, "posterior_predictive" in groups, given_latents)
    samples = split(keys["posterior"], num_chains * num_samples)
    all_latents = latents | draw_summed(fit, keys["summed"], latents, progress("summed sites"))
    found = in_chunks(follow, fit.chunk_size(), samples, all_latents, progress=progress("posterior"))
    found["sample_stats"] = stats
    for about, key in zip(elements, split(keys["elements"], max(len(elements), 1))):
        if about.plate is None:
            values = np.stack([squeezed(chain[2], structure.dims, structure) for chain in chains])
            values = np.repeat(values, num_samples, axis=0)
        else:
            values = local_evidence(about.plate, fit, key, latents, progress(f"log-likelihood of {about.name}"))
        found["log_likelihood"][about.name] = np.where(about.present, values, np.nan)
        dims[about.name] = about.dims
    found = {group: {name: _by_chain(value, num_chains) for name, value in of.items()} for group, of in found.items()}
    if "prior" in groups:
        samples = split(keys["prior"], num_samples)
        prior = in_chunks(_follow(fit, True, {}), fit.chunk_size(), samples, {}, progress=progress("prior"))
        prior = jax.tree.map(lambda value: value[None], prior)
        found |= {"prior": prior["posterior"], "prior_predictive": prior["posterior_predictive"]}
    attributes: dict[str, Any] = chains[0][3]
    if num_chains > 1:
        attributes = {name: [chain[3][name] for chain in chains] for name in attributes}
    return Draws(found, dims, attributes)


def _concatenate(*parts: np.ndarray) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _by_chain(value: np.ndarray, num_chains: int) -> np.ndarray:
    return value.reshape(num_chains, -1, *value.shape[1:])


def _weighed(
    drawn: Draw, fit: Fitted, rng_key: Array, num_samples: int | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, dict[str, float]]:
    """Latents and log-weights of draws, resampled unless ``num_samples`` is None; and what the weights say.

    :return: latents, log-densities and log-weights, the log evidence of each element, and how good the weights were.
    """
    shape = drawn.log_weight.shape[1:]
    flat = drawn.log_weight.reshape(len(drawn.log_weight), -1)
    smoothed, k = weights.pareto_smooth(flat)
    log_evidence = weights.of_elements(weights.log_mean, flat)
    if program_of(fit, {}).without_density(fit.params, rng_key):
        log_evidence = np.full_like(log_evidence, np.nan)  # of point estimates there is none
    attributes = {
        "log_evidence": float(log_evidence.sum()),
        "pareto_k": float(k.max()),
        "ess": float(weights.of_elements(weights.effective_sample_size, flat).min()),
    }
    latents, stats = drawn.values, {"log_weight": drawn.log_weight, "log_p": drawn.log_p, "log_q": drawn.log_q}
    if num_samples is not None:
        index = weights.resample(rng_key, smoothed, num_samples).reshape(num_samples, *shape)
        latents = {name: take(value, index, fit.model_trace[name]["fn"].event_dim) for name, value in latents.items()}
        stats = {name: take(value, index) for name, value in stats.items()}
    return latents, stats, log_evidence.reshape(shape).astype(np.float32), attributes


def _follow(fit: Fitted, predict: bool, likelihoods: Mapping[str, Collection[str]]) -> Callable:
    """What follows from the latents of one draw: the posterior with deterministic sites, new data, log-likelihoods.

    Latents that are not given are drawn from the prior.

    :param likelihoods: by group, the observed sites whose log-likelihoods given the latents it has.
    """
    shown = [
        name
        for name, site in fit.model_trace.items()
        if site["type"] == "deterministic" or (is_latent_site(site) and not imputed_name(name, fit.model_trace))
    ]

    def log_likelihood(site: dict) -> Array:
        about = fit.observed[site["name"]]
        log_prob = log_prob_at_value(site)
        return log_prob if about.present.all() else jnp.where(about.elements, log_prob, jnp.nan)

    def follow(rng_key: Array, latents: dict[str, Array]) -> dict[str, dict[str, Array]]:
        model_key, predictive_key = split(rng_key)
        model = Given(substitute(seed(fit.svi.model, model_key), data=fit.params), latents)
        model_trace = trace(model).get_trace(*fit.args, **fit.kwargs)
        observed = observed_sites(model_trace)
        given_names = {name: fit.observed[name].name for name in observed}
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
        warnings.warn(
            f"The predictive groups are without site '{name}', as its distribution cannot be sampled: {reason}",
            stacklevel=2,
        )
        return None


# Laying out.


def _dims(fit: Fitted) -> dict[str, list[str]]:
    """Names of the dimensions of each site: its plates, then its ``event_dims``."""
    named = {}
    for name, site in fit.model_trace.items():
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
            named[fit.observed[name].name if name in fit.observed else name] = dims
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
