# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The enumerated trace of a model at values of its other sites, and which sites can be summed out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtyping import Array
from numpyro.handlers import block, replay, substitute, trace

from numpyro_vimco.dependence import dependence
from numpyro_vimco.objectives.densities import log_prob_of
from numpyro_vimco.objectives.enumeration import Unmarked, enumerated_trace, parents_of
from numpyro_vimco.objectives.enumeration_checks import (
    check_enumerated,
    check_parents,
    check_summed,
    num_batch_dims,
    unexplained_dims,
)
from numpyro_vimco.sites import Trace, is_latent_site, sample_sites


def at_values(model: Callable, params: Mapping[str, Any], model_trace: Trace, guide_trace: Trace) -> Callable:
    """A model at parameters and at the values of a guide, with the subsamples of a trace of the model.

    By substitution: `replay` does not reach into a `scan` that is enumerated.
    """
    values = {site["name"]: site["value"] for site in sample_sites(guide_trace) if is_latent_site(site)}
    plates = {name: site for name, site in model_trace.items() if site["type"] == "plate"}
    return Unmarked(substitute(replay(model, plates), data={**params, **values}), values)


def enumerate_model(model: Callable, model_trace: Trace, args: tuple, kwargs: dict) -> Trace:
    """The enumerated trace of a model.

    :param model: seeded, and of :func:`at_values`.
    :param model_trace: a trace of it as it is.
    """
    # Sites of such dimensions do not depend on summed ones, and NumPyro would take the dimensions for values.
    own = [site["name"] for site in sample_sites(model_trace) if unexplained_dims(site)]
    return enumerated_trace(block(model, hide=own), args, kwargs, num_batch_dims(model_trace))


def check_sums(model: Callable, model_trace: Trace, summed: Iterable[str], args: tuple, kwargs: dict) -> None:
    """Raise for sites that cannot be summed out; nothing is computed.

    :param model: as of :func:`enumerate_model`.
    :param summed: names of the sites.
    """

    def densities(values: dict[str, Array]) -> dict[str, Array]:
        found = trace(substitute(model, data=values)).get_trace(*args, **kwargs)
        return {site["name"]: log_prob_of(site) for site in sample_sites(found)}

    values = {name: model_trace[name]["value"] for name in summed}
    parents = dependence(densities, values)
    check_summed(model_trace, values.keys(), parents)
    enumerated = enumerate_model(model, model_trace, args, kwargs)
    check_enumerated(enumerated, values)
    check_parents(parents, parents_of(enumerated.values(), values))
