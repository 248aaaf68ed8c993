# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What a plan needs to know of a model: its latents, their numbers of values, their plates, chains and densities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import math
from typing import Any

import jax
import numpy as np
from numpyro.handlers import block, seed, trace

from numpyro_vimco.compilation import at_once
from numpyro_vimco.control_flow import Scans
from numpyro_vimco.densities.chains import find_chains
from numpyro_vimco.families.bounds import moving_supports, supports_of
from numpyro_vimco.families.couplings import Graph, log_densities
from numpyro_vimco.families.units import FromPrior
from numpyro_vimco.sites import Trace, is_discrete, is_latent_site, is_marked, sample_sites, states


@dataclass(frozen=True)
class Latent:
    """A latent of a model.

    :ivar plates: sizes of its plates of more than one element, by name.
    :ivar num_values: how many values an element has, if they are 0, 1, … and depend on no latent; else 0.
    :ivar size: number of its elements.
    :ivar scan: the number of the `scan` that draws it; None outside of one.
    :ivar is_discrete: whether its support is discrete.
    :ivar is_marked: whether the user has marked it to be summed out, ``infer={"enumerate": "parallel"}``.
    :ivar has_mark: whether the user has said in ``infer`` whether it is to be summed out.
    """

    plates: Mapping[str, int]
    num_values: int
    size: int
    scan: int | None
    is_discrete: bool
    is_marked: bool
    has_mark: bool


@dataclass(frozen=True)
class Structure:
    """What is known of a model.

    :ivar latents: by name, in the order of the model.
    :ivar plates: names of the plates of each sample site.
    :ivar factors: for each sample site, the latents that its log-density depends on.
    :ivar sizes: number of elements of the largest array of each sample site: its value, its log-density, or a
        parameter of its distribution.
    :ivar subsampled: whether a plate is.
    :ivar plates_in_scan: names of the plates that sites inside of `scan` are in.
    :ivar no_chains: a latent of each `scan` whose steps do not depend on the one before only, and why.
    """

    latents: Mapping[str, Latent]
    plates: Mapping[str, frozenset[str]]
    factors: Mapping[str, frozenset[str]]
    sizes: Mapping[str, int]
    plates_in_scan: frozenset[str]
    subsampled: bool
    no_chains: Mapping[str, str]

    @classmethod
    def of(cls, model: Callable, args: tuple, kwargs: dict) -> "Structure":
        """Look at one draw of the model."""
        scans = Scans(FromPrior(seed(model, jax.random.key(0))))

        def look() -> Trace:
            with block():
                return trace(scans).get_trace(*args, **kwargs)

        tr = at_once(look)
        sites = {site["name"]: site for site in sample_sites(tr)}
        values = {name: site["value"] for name, site in sites.items() if is_latent_site(site)}
        moving = moving_supports(supports_of(model, args, kwargs), values) if values else {}
        latents = {name: _latent(sites[name], scans.found.get(name), name in moving) for name in values}
        graph = Graph.of(log_densities(model, args, kwargs), values) if values else Graph({})
        return cls(
            latents,
            {name: frozenset(_plates(site)) for name, site in sites.items()},
            {name: frozenset(factor) for name, factor in graph.factors.items()},
            {name: _size(site) for name, site in sites.items()},
            frozenset(plate for name in scans.found.keys() & sites.keys() for plate in _plates(sites[name])),
            any(len(site["value"]) != site["args"][0] for site in tr.values() if site["type"] == "plate"),
            _no_chains(model, args, kwargs, latents),
        )

    @property
    def first_order(self) -> set[int]:
        """Numbers of the `scan` whose steps depend on the one before only."""
        return _scans(self.latents) - {self.latents[name].scan for name in self.no_chains}


def _latent(site: dict, scan: int | None, is_moving: bool) -> Latent:
    values = np.empty(0) if is_moving else states(site["fn"])
    counts = values.size if np.array_equal(values, np.arange(values.size)) else 0
    return Latent(
        _plates(site),
        counts,
        int(np.size(site["value"])),
        scan,
        is_discrete(site),
        is_marked(site),
        "enumerate" in site["infer"],
    )


def _size(site: dict) -> int:
    leaves = [site["value"], *jax.tree.leaves(site["fn"])]
    return max(math.prod(site["fn"].batch_shape), *map(np.size, leaves))


def _plates(site: dict) -> dict[str, int]:
    return {frame.name: frame.size for frame in site["cond_indep_stack"] if frame.size > 1}


def _scans(latents: Mapping[str, Latent]) -> set[int]:
    return {about.scan for about in latents.values() if about.scan is not None}


def _no_chains(model: Callable, args: tuple, kwargs: dict[str, Any], latents: Mapping[str, Latent]) -> dict[str, str]:
    """The first latent of each `scan` that is no chain, and why."""
    found = {}
    for scan in sorted(_scans(latents)):
        name = next(name for name, about in latents.items() if about.scan == scan)
        try:
            find_chains(model, model, args, kwargs, {name: 2})
        except ValueError as error:
            found[name] = first_sentence(error)
    return found


def first_sentence(error: Exception) -> str:
    """The first sentence of an error, without its point."""
    return str(error).partition(". ")[0].rstrip(".")
