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
import warnings

import jax
from jax import random
from jaxtyping import Array
import numpy as np
from numpyro.handlers import substitute, trace

from numpyro_vimco.control_flow import is_in_scan
from numpyro_vimco.dependence import dependence
from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.objectives.plates import Structure
from numpyro_vimco.posterior.chunks import in_chunks
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.observed import imputed_name
from numpyro_vimco.posterior.proposals import (
    can_have_particles,
    plate_names,
    program_of,
    squeezed,
    structure_of,
)
from numpyro_vimco.randomness import SeedLevels, split
from numpyro_vimco.sites import is_latent_site, sample_sites

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


def find_elements(fit: Fitted, structure: Structure) -> tuple[list[Elements], set[str]]:
    """The elements of plates with latents of their own, and the names of the observed sites in these plates.

    :param structure: of the fit's program: which plates are common to all sites.
    :warns UserWarning: naming a plate whose latents cannot be averaged out; its elements are left out.
    """
    found: list[Elements] = []
    inside: set[str] = set()
    common = plate_names(fit, structure.dims)
    for plate in _plates_with_latents(fit):
        sites = {name for name in fit.observed if plate in _stack(fit.model_trace[name])}
        inside |= sites
        if plate in common:
            elements = Elements(None, common, _present(fit, sites, structure.dims))
            found += [elements] if elements.name not in [other.name for other in found] else []
        elif can_have_particles(fit, of_plate := _particles(fit, plate, 2)) and _draws_its_latents(fit, plate):
            dims = structure_of(program_of(fit, of_plate), fit).kept(plate)
            found.append(Elements(plate, plate_names(fit, dims, plate), _present(fit, sites, dims)))
        else:
            names = ", ".join(f"'{fit.observed[name].name}'" for name in sorted(sites))
            warnings.warn(
                f"Plate '{plate}' has latents of its own, which cannot be averaged out of the log-likelihood of its "
                f"elements ({names}): its elements are not independent, the guide does not draw these latents inside "
                "of the plate, or a summed site outside of it connects them. Values given the latents do not tell what "
                "leaving an element out does; the group 'log_likelihood' is without them, and "
                "'log_likelihood_given_latents' has them.",
                stacklevel=3,
            )
    alone = {name for name in _with_summed_latents_of_their_own(fit) if name not in inside}
    if alone:
        names = ", ".join(repr(fit.observed[name].name) for name in sorted(alone))
        warnings.warn(
            f"The data of {names} depend on summed latents that are in no plate with them, as those of a chain in time "
            "do: there is no log-likelihood of a datum with its latent summed out. The group 'log_likelihood' is "
            "without them; 'log_likelihood_given_latents' has them given a draw. If there are several chains, put "
            "them into a plate: each then is an element.",
            stacklevel=3,
        )
    return found, inside | alone


def _with_summed_latents_of_their_own(fit: Fitted) -> set[str]:
    """The observed sites that depend on a summed site in `scan`, or in the same plates."""
    parents: dict[str, set[str]] = {}

    def look(rng_key):
        parents.update(program_of(fit, {}).at(fit.params, rng_key, {}).parents())

    jax.eval_shape(look, random.key(0))
    sites = fit.model_trace
    return {
        name
        for name in parents.keys() & fit.observed.keys()
        if any(is_in_scan(sites[p]) or _stack(sites[p]) == _stack(sites[name]) for p in parents[name])
    }


def _particles(fit: Fitted, plate: str, number: int) -> dict[str, int]:
    """So many local particles of a plate; 1 where the guide samples nothing in it."""
    return {plate: number if fit.latents(plate) else 1}


def _stack(site: dict) -> list[str]:
    return [frame.name for frame in site["cond_indep_stack"]]


def _plates_with_latents(fit: Fitted) -> list[str]:
    """Plates with latents and data of their own; of nested ones, the outermost."""
    sites = {site["name"]: site for site in sample_sites(fit.model_trace)}
    inside = {
        plate: {name for name in sites if plate in _stack(sites[name])} for s in sites.values() for plate in _stack(s)
    }
    found = []
    for plate, names in inside.items():
        data = {fit.observed[name].name for name in names if name in fit.observed}
        latents = {name for name in names if is_latent_site(sites[name])}
        # Imputed values of the plate's only data have no likelihood.
        imputed = {imputed_name(name, fit.model_trace) for name in latents}
        if data and latents and not data == imputed:
            found.append(plate)
    dim = {frame.name: frame.dim for site in sites.values() for frame in site["cond_indep_stack"]}
    found.sort(key=lambda plate: (-len(inside[plate]), dim[plate]))
    return [plate for i, plate in enumerate(found) if not any(inside[plate] <= inside[outer] for outer in found[:i])]


def _present(fit: Fitted, sites: set[str], dims: frozenset[int]) -> np.ndarray:
    """Whether each element of the plates at ``dims`` has data in any of the sites."""
    total = np.zeros((), bool)
    for name in sites:
        elements = fit.observed[name].elements
        summed = tuple(dim for dim in range(-elements.ndim, 0) if dim not in dims)
        total = total | elements.any(summed, keepdims=True)
    return total.squeeze(tuple(dim for dim in range(-total.ndim, 0) if dim not in dims))


def _draws_its_latents(fit: Fitted, plate: str) -> bool:
    """Whether the guide draws the latents of a plate inside of it, not as functions of draws outside of it."""
    latents = list(fit.latents(plate))

    def values(keys):
        guide = substitute(SeedLevels(fit.svi.guide, keys["outside"], {plate: keys["inside"]}), data=fit.params)
        guide_trace = trace(guide).get_trace(*fit.args, **fit.kwargs)
        return {name: guide_trace[name]["value"] for name in latents}

    keys = dict(zip(("outside", "inside"), split(random.key(0))))
    return all("inside" in sources for sources in dependence(values, keys).values())


def local_evidence(
    plate: str, fit: Fitted, rng_key: Array, latents: dict[str, np.ndarray], progress: str | None
) -> np.ndarray:
    """Log-evidence of each element of a plate given the latents outside of it, in nats.

    :param latents: draws of the posterior, by latent, of shape ``(draws, *batch, *event)``.
    :param progress: name of the progress bar; None for no bar.
    :return: of shape ``(draws, *plates)``, with the plates of :func:`find_elements`.
    """
    num_samples = len(next(iter(latents.values())))
    at_once = _particles(fit, plate, int(np.clip(fit.num_at_a_time(), 2, LOCAL_PARTICLES)))[plate]
    outside = {name: value for name, value in latents.items() if plate not in _stack(fit.model_trace[name])}
    evidence = _local_evidence(plate, fit, at_once)
    keys = split(rng_key, num_samples)
    return in_chunks(evidence, fit.num_at_a_time(at_once), keys, outside, progress=progress)


def _local_evidence(plate: str, fit: Fitted, at_once: int):
    """A function from a key and the latents outside of a plate to the log-evidence of each of its elements.

    :param at_once: number of local particles that are evaluated at a time.
    """
    rounds = -(-LOCAL_PARTICLES // at_once) if at_once > 1 else 1

    def evidence(rng_key: Array, outside: dict[str, Array]) -> Array:
        program = program_of(fit, {plate: at_once}, outside)

        def round_(rng_key):
            levels, structure = program.evaluate(fit.params, rng_key)
            mean = cv.log_mean_weight(levels.local[plate].log_weight)
            return squeezed(mean, structure.kept(plate), structure)

        return cv.log_mean_weight(jax.lax.map(round_, split(rng_key, rounds)))

    return evidence
