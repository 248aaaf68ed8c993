# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The enumerated trace of a model at values of its other sites, and which sites can be summed out."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from jaxtyping import Array
from numpyro.handlers import block, replay, substitute, trace

from numpyro_vimco.checks.enumeration_checks import (
    check_enumerated,
    check_parents,
    check_summed,
    num_batch_dims,
    unexplained_dims,
)
from numpyro_vimco.control_flow import Given, is_in_scan
from numpyro_vimco.densities.densities import log_prob_of
from numpyro_vimco.densities.enumeration import enumerated_trace, parents_of
from numpyro_vimco.dependence import dependence
from numpyro_vimco.sites import Trace, is_latent_site, mask_of, sample_sites


def at_values(
    model: Callable,
    params: Mapping[str, Any],
    subsampled: Trace,
    guide_trace: Trace,
    more: Mapping[str, Array] = MappingProxyType({}),
) -> Given:
    """A model at parameters and at the values of a guide, with the subsamples of a trace.

    :param more: values of latents that the guide lacks.
    """
    drawn = {site["name"]: site["value"] for site in sample_sites(guide_trace) if is_latent_site(site)}
    values = {**more, **drawn}
    plates = {name: site for name, site in subsampled.items() if site["type"] == "plate"}
    return Given(substitute(replay(model, plates), data=params), values)


def enumerate_model(model: Callable, model_trace: Trace, args: tuple, kwargs: dict) -> Trace:
    """The enumerated trace of a model.

    :param model: seeded, of :func:`at_values`, and without marks of sites that have values.
    :param model_trace: a trace of it as it is.
    """
    # Sites of such dimensions do not depend on summed ones, and NumPyro would take the dimensions for values.
    own = [site["name"] for site in sample_sites(model_trace) if unexplained_dims(site)]
    return enumerated_trace(block(model, hide=own), args, kwargs, num_batch_dims(model_trace))


def densities_at(model: Callable, values: Mapping[str, Array], args: tuple, kwargs: dict) -> dict[str, Array]:
    """The log-density of each site of a model, with its mask, at values of some sites.

    :param model: as of :func:`enumerate_model`.
    """
    found = trace(Given(model, values)).get_trace(*args, **kwargs)
    return {site["name"]: log_prob_of(site) for site in sample_sites(found)}


def check_sums(model: Callable, model_trace: Trace, summed: Iterable[str], args: tuple, kwargs: dict) -> bool:
    """Raise for sites that cannot be summed out; nothing is computed.

    :param model: as of :func:`enumerate_model`.
    :param summed: names of the sites.
    :return: whether a density may depend on masked elements of these.
    """

    def densities(values: dict[str, Array]) -> dict[str, Array]:
        return densities_at(model, values, args, kwargs)

    values = {name: model_trace[name]["value"] for name in summed}
    parents = dependence(densities, values)
    check_summed(model_trace, values.keys(), parents)
    enumerated = enumerate_model(model, model_trace, args, kwargs)
    check_enumerated(enumerated, values)
    check_parents(parents, parents_of(enumerated.values(), values))
    chains = {name for name in values if is_in_scan(model_trace[name])}
    masked = {name for name in values if mask_of(model_trace[name]["fn"])}
    used = chains.union(*(depends - {name} for name, depends in parents.items()))
    return bool(masked & used)
