# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Observed sites of a model, and which of their data are missing: those masked by the model or by ``obs_mask``."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpyro.distributions as dist

from numpyro_vimco.sites import Trace, is_latent_site, mask_of, sample_sites, unwrapped


@dataclass(frozen=True)
class Observed:
    """An observed site.

    :ivar name: the name that users gave it: ``x`` where `obs_mask` makes ``x_observed`` and ``x_unobserved``.
    :ivar present: True where it has data, False where they are masked; of the shape of its value.
    :ivar event_dim: number of event dimensions of its value.
    :ivar is_data: whether its value is the same whatever the latents are.
    """

    name: str
    present: np.ndarray
    event_dim: int
    is_data: bool

    @property
    def elements(self) -> np.ndarray:
        """True where any part of an event has data; of the shape of the site's log-density."""
        return np.asarray(self.present.any(tuple(range(-self.event_dim, 0))))

    def only_present(self, value) -> np.ndarray:
        """The data ``value``, with NaN where they are masked."""
        value = np.broadcast_to(np.asarray(value), self.present.shape)
        return value if self.present.all() else np.where(self.present, value, np.nan)


def observed_sites(model_trace: Trace) -> Trace:
    """The observed sites of a model, without factors, which have no data."""
    return {
        site["name"]: site
        for site in sample_sites(model_trace)
        if site["is_observed"] and not isinstance(unwrapped(site["fn"]), dist.Unit)
    }


def find_observed(model_trace: Trace, moving: set[str], following: set[str]) -> dict[str, Observed]:
    """The observed sites of a model.

    :param following: names of the sites whose value is a function of latents.
    :param moving: names of the sites whose mask depends on a latent: it does not say which data are missing.
    """
    found = {}
    for name, site in observed_sites(model_trace).items():
        fn = whole(site)
        present = np.ones(fn.shape(), bool) if name in moving else np.broadcast_to(present_elements(fn), fn.shape())
        found[name] = Observed(given_name(name, model_trace), np.asarray(present), fn.event_dim, name not in following)
    return found


def given_name(name: str, model_trace: Mapping) -> str:
    """The name of a site as users know it: without the suffix that `obs_mask` gives its observed part."""
    stem = name.removesuffix("_observed")
    return stem if stem != name and imputed_name(f"{stem}_unobserved", model_trace) else name


def imputed_name(name: str, model_trace: Mapping) -> str | None:
    """For the latent part ``x_unobserved`` of a site with `obs_mask` the name ``x``, else None."""
    stem = name.removesuffix("_unobserved")
    if stem == name or not {stem, f"{stem}_observed", name} <= set(model_trace):
        return None
    whole, observed, latent = (model_trace[part] for part in (stem, f"{stem}_observed", name))
    masked = whole["type"] == "deterministic" and observed.get("is_observed") and is_latent_site(latent)
    return stem if masked else None


def whole(site: dict) -> dist.Distribution:
    """The distribution of a site, expanded to the batch shape of its value.

    :raises ValueError: for data of another shape.
    """
    fn, shape = site["fn"], np.shape(site["value"])
    try:
        return fn.expand(np.broadcast_shapes(fn.batch_shape, shape[: len(shape) - fn.event_dim]))
    except ValueError:
        raise ValueError(
            f"The data of site '{site['name']}' have shape {shape}, but its distribution has shape {fn.shape()}, with "
            "its plates. Pass one value for each element of the plates."
        ) from None


def present_elements(fn: dist.Distribution):
    """True where a distribution is not masked: an array that broadcasts to the shape of its values."""
    found = mask_of(fn)
    if found is None:
        return np.ones((1,) * len(fn.shape()), bool)
    mask, event_dims = found
    return mask.reshape(mask.shape + (1,) * (fn.event_dim - event_dims))
