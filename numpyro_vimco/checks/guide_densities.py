# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Which latents a guide has a density for.

A `Delta` has none of its own. Guides that draw latents jointly (`AutoMultivariateNormal`, flows) draw an *auxiliary*
site, which the model lacks, and each latent is a Delta at a function of it. The density of the auxiliary site, with the
Jacobians that the Deltas hold, is then that of the latents, as long as these determine it: the map is one to one. Else
the weights p(x, z) / q(u, z) have the mean p(x) only if the model draws u as well.

Here "parents" of a Delta are the names of the drawn sites (latent, and no Delta) that its value depends on.
"""

from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to

from numpyro_vimco.sites import (
    WRAPPERS,
    Trace,
    is_delta,
    is_discrete,
    is_latent_site,
    is_score_function_site,
    support_of,
)


def auxiliary_sites(model_trace: Trace, guide_trace: Trace) -> list[str]:
    """The latent guide sites that the model lacks, without Deltas."""
    return [
        name
        for name, site in guide_trace.items()
        if is_latent_site(site) and name not in model_trace and not is_delta(site)
    ]


def check_auxiliary(model_trace: Trace, guide_trace: Trace, parents: Mapping[str, Collection[str]]) -> None:
    """Raise for auxiliary sites whose density is not that of Deltas.

    An auxiliary site that is masked has no density to be cancelled: the momenta of `AutoDAIS`, whose density is in a
    factor.

    :raises ValueError: naming the site.
    """
    auxiliary = auxiliary_sites(model_trace, guide_trace)
    counted = [name for name in auxiliary if not _is_masked(guide_trace[name]["fn"])]
    determined = [name for name in _deltas(model_trace, guide_trace) if set(auxiliary) & set(parents[name])]
    for name in auxiliary:
        is_used = any(name in parents[delta] for delta in determined)
        if is_score_function_site(guide_trace[name]) or (name in counted and not is_used):
            raise auxiliary_error(name)
    sizes = [
        sum(_size(sites[name]["fn"], guide_trace[name]["value"]) for name in names)
        for sites, names in ((guide_trace, counted), (model_trace, determined))
    ]
    if sizes[0] != sizes[1]:
        raise auxiliary_error(auxiliary[0])


def without_density(model_trace: Trace, guide_trace: Trace, parents: Mapping[str, Collection[str]]) -> list[str]:
    """The continuous latents that are Deltas at constants, parameters, or functions of other latents of the model."""
    auxiliary = set(auxiliary_sites(model_trace, guide_trace))
    return [name for name in _deltas(model_trace, guide_trace) if not auxiliary & set(parents[name])]


def auxiliary_error(site: str) -> ValueError:
    """A guide site that the model lacks, and whose density nothing cancels."""
    return ValueError(
        f"The guide draws the auxiliary site '{site}', which the model lacks, and latents of the model do not "
        "determine it one to one (as Deltas of as many dimensions would). Its density would count in the weights, and "
        "every bound and evidence be wrong. Sum it out of the guide: a mixture, `dist.MixtureSameFamily`. Or let the "
        f"model draw it as well, last and given the latents, numpyro.sample('{site}', …): any distribution of its "
        "support is right, and one near to what the latents say about it is good."
    )


def no_density_error(site: str) -> ValueError:
    """A continuous latent that the guide fixes, where a fit is asked for its evidence."""
    return ValueError(
        f"The continuous latent '{site}' is a Delta in the guide: it is fixed at one value, so that there are no "
        "weights and no evidence. The fit is a point estimate of it, and says nothing of its posterior. Give it a "
        "distribution in the guide (AutoNormal instead of AutoDelta). To look at the other latents at that value, make "
        f"it a parameter of the model, numpyro.param('{site}', …), or fit with numpyro.handlers.condition(model, "
        f"{{'{site}': value}})."
    )


def _deltas(model_trace: Trace, guide_trace: Trace) -> list[str]:
    """The continuous latents of the model that are Deltas in the guide, and in the model are none."""
    return [
        name
        for name, site in guide_trace.items()
        if is_delta(site)
        and name in model_trace
        and not is_delta(model_trace[name])
        and not is_discrete(model_trace[name])
    ]


def _is_masked(fn: dist.Distribution) -> bool:
    """Whether a distribution is masked as a whole, by a constant."""
    while isinstance(fn, WRAPPERS):
        if getattr(fn, "_mask", None) is False:
            return True
        fn = fn.base_dist
    return False


def _size(fn: dist.Distribution, value) -> int:
    """The number of dimensions of the space that a value is in: of a simplex of three numbers, two."""
    shape = jnp.shape(value)
    try:
        shape = biject_to(support_of(fn)).inverse_shape(shape)
    except (NotImplementedError, AttributeError):
        pass  # a support that NumPyro has no transform for, or none
    return int(np.prod(shape))
