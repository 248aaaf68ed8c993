# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Log-likelihoods of the elements of plates that have latents of their own, with these averaged out.

Leave-one-out cross-validation needs the density of an element's data without their effect on the element's latents.
Log-likelihoods given the latents, at draws of the posterior with all data, do not have it: at a place where an animal
was seen, there is no draw in which it is absent. So for an element i with data x_i and latents z_i, and a draw g of
the latents outside of the plate,

    p(x_i | g) = E [ p(x_i, z_i | g) / q(z_i) ],    z_i ~ q,

is estimated by the mean weight of fresh local particles. Where the plate is common to all sites there is no g, and
p(x_i) is the mean weight of the draws of the guide. Latents that are summed out are summed over here too, so that a
plate whose latents all are has the exact p(x_i | g). Data that depend on a summed latent which is theirs alone, but in
no plate with it (those of one chain in time), have no such value.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax import random
from jaxtyping import Array
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import seed, substitute, trace

from numpyro_vimco.arguments import warn
from numpyro_vimco.control_flow import Given, is_in_scan
from numpyro_vimco.densities.plates import Structure
from numpyro_vimco.dependence import dependence
from numpyro_vimco.draws.approximation import Approximation, one_start
from numpyro_vimco.draws.chunks import Chunked
from numpyro_vimco.draws.observed import imputed_name
from numpyro_vimco.draws.proposals import (
    can_have_particles,
    plate_names,
    program_of,
    squeezed,
    structure_of,
)
from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.randomness import SeedLevels, split
from numpyro_vimco.sites import is_latent_site, log_prob_at_value, sample_sites, unwrapped

# Local particles for each draw of the posterior. Their noise makes the value of az.loo too small by about c² / 512 nats
# for each element, with c the coefficient of variation of its local weights.
LOCAL_PARTICLES = 256


@dataclass(frozen=True)
class Elements:
    """Elements of plates that have a log-likelihood each.

    :ivar plate: a plate with latents of its own; None where plates are common to all sites.
    :ivar dims: names of the plates whose elements these are: ``plate``, and other plates that all of its sites are in.
    :ivar present: whether each element has data, of the shape of these plates.
    """

    plate: str | None
    dims: list[str]
    present: np.ndarray

    @property
    def name(self) -> str:
        """Name of the variable. It differs from the names of plates, which are those of dimensions."""
        return "_".join(self.dims) + "_element"


def find_elements(approx: Approximation, structure: Structure) -> tuple[list[Elements], set[str]]:
    """The elements of plates with latents of their own, and the names of the observed sites in these plates.

    :param structure: of the fit's program: which plates are common to all sites.
    :warns UserWarning: naming a plate whose latents cannot be averaged out, or a factor; these are left out.
    """
    found: list[Elements] = []
    inside: set[str] = set()
    common = plate_names(approx, structure.dims)
    for plate in _plates_with_latents(approx):
        sites = {name for name in approx.observed if plate in _stack(approx.model_trace[name])}
        inside |= sites
        if plate in common:
            elements = Elements(None, common, _present(approx, sites, structure.dims))
            found += [elements] if elements.name not in [other.name for other in found] else []
        elif can_have_particles(approx, of_plate := _particles(approx, plate, 2)) and _draws_its_latents(approx, plate):
            dims = structure_of(approx, of_plate).kept(plate)
            found.append(Elements(plate, plate_names(approx, dims, plate), _present(approx, sites, dims)))
        else:
            names = ", ".join(f"'{approx.observed[name].name}'" for name in sorted(sites))
            warn(
                f"Plate '{plate}' has latents of its own, which cannot be averaged out of the log-likelihood of its "
                f"elements ({names}): its elements are not independent, the guide does not draw these latents inside "
                "of the plate, or a summed site outside of it connects them. Values given the latents do not tell what "
                "leaving an element out does; the group 'log_likelihood' is without them, and "
                "'log_likelihood_given_latents' has them.",
            )
    alone = {name for name in _with_summed_latents_of_their_own(approx) if name not in inside}
    if alone:
        names = ", ".join(repr(approx.observed[name].name) for name in sorted(alone))
        warn(
            f"The data of {names} depend on summed latents that are in no plate with them, as those of a chain in time "
            "do: there is no log-likelihood of a datum with its latent summed out. The group 'log_likelihood' is "
            "without them; 'log_likelihood_given_latents' has them given a draw. If there are several chains, put "
            "them into a plate: each then is an element.",
        )
    plates = {plate for elements in found for plate in ([elements.plate] if elements.plate else elements.dims)}
    if factors := [name for name in _factors(approx) if not plates.intersection(_stack(approx.model_trace[name]))]:
        warn(
            f"The log-likelihood is without {', '.join(map(repr, factors))}, and so is `az.loo`: a factor has no data "
            "to leave out. If it is the density of data, write these as an observed site, "
            f"numpyro.sample('{factors[0]}', dist.Normal(…), obs=data); for a log-density of your own, with the class "
            "LogDensity of 'Leaving out, and comparing models' in the documentation. If it is a part of the prior, "
            "nothing is missing.",
        )
    return found, inside | alone


def _factors(approx: Approximation) -> list[str]:
    """Names of the factors that depend on latents."""
    latents = {name: site["value"] for name, site in approx.model_trace.items() if is_latent_site(site)}

    def look(latents):
        model = Given(substitute(seed(approx.svi.model, random.key(1)), data=approx.params), latents)
        sites = sample_sites(trace(model).get_trace(*approx.args, **approx.kwargs))
        return {site["name"]: log_prob_at_value(site) for site in sites if isinstance(unwrapped(site["fn"]), dist.Unit)}

    return [name for name, sources in dependence(look, latents).items() if sources]


def _with_summed_latents_of_their_own(approx: Approximation) -> set[str]:
    """The observed sites that depend on a summed site in `scan`, or in the same plates."""
    parents: dict[str, set[str]] = {}

    def look(rng_key):
        parents.update(program_of(approx, {}).at(approx.params, rng_key, {}).parents())

    jax.eval_shape(look, random.key(0))
    sites = approx.model_trace
    return {
        name
        for name in parents.keys() & approx.observed.keys()
        if any(is_in_scan(sites[p]) or _stack(sites[p]) == _stack(sites[name]) for p in parents[name])
    }


def _particles(approx: Approximation, plate: str, number: int) -> dict[str, int]:
    """So many local particles of a plate; 1 where the guide samples nothing in it."""
    return {plate: number if approx.latents(plate) else 1}


def _stack(site: dict) -> list[str]:
    return [frame.name for frame in site["cond_indep_stack"]]


def _plates_with_latents(approx: Approximation) -> list[str]:
    """Plates with latents and data of their own; of nested ones, the outermost."""
    sites = {site["name"]: site for site in sample_sites(approx.model_trace)}
    inside = {
        plate: {name for name in sites if plate in _stack(sites[name])} for s in sites.values() for plate in _stack(s)
    }
    found = []
    for plate, names in inside.items():
        data = {approx.observed[name].name for name in names if name in approx.observed}
        latents = {name for name in names if is_latent_site(sites[name])}
        # Imputed values of the plate's only data have no likelihood.
        imputed = {imputed_name(name, approx.model_trace) for name in latents}
        if data and latents and not data == imputed:
            found.append(plate)
    dim = {frame.name: frame.dim for site in sites.values() for frame in site["cond_indep_stack"]}
    found.sort(key=lambda plate: (-len(inside[plate]), dim[plate]))
    return [plate for i, plate in enumerate(found) if not any(inside[plate] <= inside[outer] for outer in found[:i])]


def _present(approx: Approximation, sites: set[str], dims: frozenset[int]) -> np.ndarray:
    """Whether each element of the plates at ``dims`` has data in any of the sites."""
    total = np.zeros((), bool)
    for name in sites:
        elements = approx.observed[name].elements
        summed = tuple(dim for dim in range(-elements.ndim, 0) if dim not in dims)
        total = total | elements.any(summed, keepdims=True)
    return total.squeeze(tuple(dim for dim in range(-total.ndim, 0) if dim not in dims))


def _draws_its_latents(approx: Approximation, plate: str) -> bool:
    """Whether the guide draws the latents of a plate inside of it, not as functions of draws outside of it."""
    latents = list(approx.latents(plate))

    def values(keys):
        guide = substitute(SeedLevels(approx.svi.guide, keys["outside"], {plate: keys["inside"]}), data=approx.params)
        guide_trace = trace(guide).get_trace(*approx.args, **approx.kwargs)
        return {name: guide_trace[name]["value"] for name in latents}

    keys = dict(zip(("outside", "inside"), split(random.key(0))))
    return all("inside" in sources for sources in dependence(values, keys).values())


def local_evidence(
    plate: str,
    approx: Approximation,
    rng_key: Array,
    latents: dict[str, np.ndarray],
    start: np.ndarray,
    progress: str | None,
) -> np.ndarray:
    """Log-evidence of each element of a plate given the latents outside of it, in nats.

    :param latents: draws of the posterior, by latent, of shape ``(draws, *batch, *event)``.
    :param start: of each draw.
    :param progress: name of the progress bar; None for no bar.
    :return: of shape ``(draws, *plates)``, with the plates of :func:`find_elements`.
    """
    at_once = _particles(approx, plate, int(np.clip(approx.num_at_a_time(), 2, LOCAL_PARTICLES)))[plate]
    outside = {name: value for name, value in latents.items() if plate not in _stack(approx.model_trace[name])}
    chunked = approx.kept(
        ("evidence of", plate), lambda: Chunked(_local_evidence(plate, approx, at_once), approx.num_at_a_time(at_once))
    )
    return chunked.all(approx.starts, split(rng_key, len(start)), start, outside, progress=progress)


def _local_evidence(plate: str, approx: Approximation, at_once: int):
    """A function from a key and the latents outside of a plate to the log-evidence of each of its elements.

    :param at_once: number of local particles that are evaluated at a time.
    """
    rounds = -(-LOCAL_PARTICLES // at_once) if at_once > 1 else 1

    def evidence(starts: Any, rng_key: Array, start: Array, outside: dict[str, Array]) -> Array:
        program = program_of(approx, {plate: at_once}, outside)
        params = one_start(starts, start)

        def round_(rng_key):
            levels, structure = program.evaluate(params, rng_key)
            mean = cv.log_mean_weight(levels.local[plate].log_weight)
            return squeezed(mean, structure.kept(plate), structure)

        return cv.log_mean_weight(jax.lax.map(round_, split(rng_key, rounds)))

    return evidence
