# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of arguments, and of a guide trace against a model trace: errors where NumPyro would warn or pass.

Every message names the argument, the site or the plate, says what is wrong, and what to do instead.
"""

from collections.abc import Callable, Collection, Mapping

import jax.numpy as jnp
from jax.sharding import AxisType, Sharding
from numpyro.primitives import Messenger
from numpyro.util import check_model_guide_match

from numpyro_vimco.arguments import check_integer, listed, warn
from numpyro_vimco.control_flow import is_in_scan, is_of_control_flow
from numpyro_vimco.randomness import CHAIN
from numpyro_vimco.sites import Trace, is_latent_site, is_marked, sample_sites


def check_particles(argument: str, number: int) -> int:
    """An argument as an ``int`` of at least 2."""
    return check_integer(argument, number, 2, "the bound and its gradient compare particles with each other")


def check_chunk_size(chunk_size: int, num_particles: int) -> int:
    """``chunk_size`` as an ``int`` that divides ``num_particles``."""
    chunk_size = check_integer("chunk_size", chunk_size, 1, "so many particles are evaluated at a time")
    if num_particles % chunk_size:
        near = min(chunk_size, num_particles)
        below = next(size for size in range(near, 0, -1) if num_particles % size == 0)
        above = next(size for size in range(near, num_particles + 1) if num_particles % size == 0)
        raise ValueError(
            f"`chunk_size` is {chunk_size}, but must be a divisor of `num_particles`, which is {num_particles}: "
            f"{_either(below, above)} would do."
        )
    return chunk_size


def check_sharding(sharding: Sharding, num_particles: int, chunk_size: int | None) -> None:
    """Raise unless ``sharding`` divides the particles that are evaluated at a time."""
    if not isinstance(sharding, Sharding):
        raise ValueError(f"`particle_sharding` is {sharding!r}, but must be a `jax.sharding.Sharding`.")
    if AxisType.Explicit in getattr(getattr(sharding, "mesh", None), "axis_types", ()):
        raise ValueError(
            "`particle_sharding` is on a mesh with axes of type Explicit, which leaves it to the model to say how "
            "each array is spread. Make the mesh with `axis_types=(jax.sharding.AxisType.Auto,)`, one for each axis."
        )
    argument, number = ("`num_particles`", num_particles) if chunk_size is None else ("`chunk_size`", chunk_size)
    devices = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    if number % devices:
        below, above = number // devices * devices, -(-number // devices) * devices
        raise ValueError(
            f"`particle_sharding` spreads particles over {devices} devices, but {argument} is {number}: "
            f"{_either(below or above, above)} would do."
        )


def _either(below: int, above: int) -> str:
    return str(below) if below == above else f"{below} or {above}"


class NotSubstituted(Messenger):
    """Raises for latents of a model that a handler around it gives a value, which the guide's would replace.

    :raises ValueError: naming the site.
    """

    def __init__(self, fn: Callable):
        super().__init__(fn)
        self.in_control_flow: set[str] = set()

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "control_flow":  # its sites are seen afterwards, with their values
            stack = msg["kwargs"].get("substitute_stack", ())
            self.in_control_flow.update(*(data for kind, data in stack if kind == "substitute" and not callable(data)))
        elif is_latent_site(msg):
            name = msg["name"]
            if name in self.in_control_flow if is_of_control_flow(msg) else msg["value"] is not None:
                raise ValueError(
                    f"Site '{name}' has a value by `substitute` or `replay` around the model, but is still latent, so "
                    "that the value would be ignored. Use a handler that makes it known: "
                    f"numpyro.handlers.condition(model, {{'{name}': value}})."
                )


def check_score_sites(names: Collection[str], latents: Collection[str]) -> None:
    """Raise for ``score_sites`` that the guide does not sample."""
    for name in sorted(set(names) - set(latents)):
        raise ValueError(f"`score_sites` names '{name}', but the latents of the guide are {listed(latents)}.")


def check_traces(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise unless the guide proposes exactly the latent sites of the model.

    :raises NotImplementedError: for a ``mutable`` site.
    :raises ValueError: for a latent model site that the guide lacks or observes, a guide site that the model
        observes, a guide site that the model lacks and that is not auxiliary, a plate of two sizes, or sites
        whose shapes disagree.
    """
    for name, site in {**guide_trace, **model_trace}.items():
        if site["type"] == "mutable":
            raise NotImplementedError(
                f"Mutable state (site '{name}') is not supported: each particle would update it differently. "
                "Pass the state as an argument of model and guide, or freeze it before the fit."
            )
    _check_sites(model_trace, guide_trace)
    check_plates(model_trace, guide_trace)
    # The remaining checks: shapes of sites. NumPyro records no plate inside of `scan`, where the model may have it.
    frames = {frame.name for site in sample_sites(model_trace) for frame in site["cond_indep_stack"]}
    matched = {name: site for name, site in guide_trace.items() if site["type"] != "plate" or name not in frames}
    check_model_guide_match(model_trace, matched)
    if not any(site["type"] == "param" for site in guide_trace.values()):
        warn(
            "The guide has no parameters, so that SVI cannot improve it. Declare them with `numpyro.param`, "
            "`numpyro.contrib.module.flax_module` or an automatic guide.",
        )


def check_plates(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise for a plate of two sizes.

    :raises ValueError: naming the plate.
    """
    for name, site in guide_trace.items():
        if site["type"] == "plate" and name in model_trace and site["args"][0] != model_trace[name]["args"][0]:
            raise ValueError(
                f"Plate '{name}' has size {site['args'][0]} in the guide and {model_trace[name]['args'][0]} in the "
                "model. Give both the same size (and the same subsample_size); after a fit, the arguments that it was "
                "fitted with."
            )


def _check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    for name, site in guide_trace.items():
        if not is_latent_site(site):
            continue
        other = model_trace.get(name)
        if other is None or other["type"] != "sample":
            if not site["infer"].get("is_auxiliary"):
                raise ValueError(
                    f"Site '{name}' is sampled in the guide, but the model has no such site. Add it to the model, "
                    "remove it from the guide, or, if latents of the model are Deltas that determine it, mark it with "
                    "infer={'is_auxiliary': True}."
                )
        elif other["is_observed"]:
            raise ValueError(
                f"Site '{name}' is sampled in the guide and observed in the model. Remove it from the guide, or "
                "remove `obs` from the model's site."
            )
    for name, site in model_trace.items():
        if not is_latent_site(site):
            continue
        other = guide_trace.get(name)
        if other is None and is_marked(site):
            continue  # it is summed out
        if other is None or other["type"] != "sample":
            raise ValueError(
                f"Latent site '{name}' of the model is missing from the guide, so that it would be sampled from "
                "its prior. Add it to the guide, observe it, or, if its support is finite, have it summed out: "
                "infer={'enumerate': 'parallel'}."
            )
        if other["is_observed"]:
            raise ValueError(
                f"Site '{name}' is latent in the model and observed in the guide. Sample it in the guide, or pass "
                "`obs` to the model's site."
            )


def check_plate_particles(plate_particles: Mapping[str, int], model_trace: Trace, guide_trace: Trace) -> None:
    """Raise unless each named plate can have local particles.

    :raises ValueError: for a plate that does not exist, one nested in another named one, one inside of `scan`, or
        one that no latent site of the guide is in.
    """
    sites = sample_sites(model_trace) + sample_sites(guide_trace)
    stacks = {site["name"]: [frame.name for frame in site["cond_indep_stack"]] for site in sites}
    latent = [name for name, site in guide_trace.items() if is_latent_site(site)]
    for plate, number in plate_particles.items():
        if not any(plate in stack for stack in stacks.values()):
            known = sorted({name for stack in stacks.values() for name in stack})
            raise ValueError(
                f"`plate_particles` names the plate '{plate}', which no site is in. Name one of these instead: "
                f"{listed(known)}."
            )
        if number == 1:  # not by a user: a plate whose latents are summed out has nothing to draw
            continue
        if not any(plate in stacks[name] for name in latent):
            raise ValueError(
                f"`plate_particles` names the plate '{plate}', which has no latents that the guide samples: "
                "there is nothing to draw more often (what is summed out is not drawn). Remove it from "
                "`plate_particles`."
            )
        for site in sites:
            others = [name for name in stacks[site["name"]] if name in plate_particles and name != plate]
            if plate in stacks[site["name"]] and others:
                raise ValueError(
                    f"`plate_particles` names the plates '{plate}' and '{others[0]}', but site '{site['name']}' is in "
                    "both: one is nested in the other. Name the outer one only."
                )
            if plate in stacks[site["name"]] and is_in_scan(site):
                raise ValueError(
                    f"`plate_particles` names the plate '{plate}', which is inside of `scan` (site '{site['name']}'). "
                    "Only plates outside of control flow can have particles of their own: move it outside, or remove "
                    "it from `plate_particles`."
                )


def dependence_error(site: str, plate: str) -> ValueError:
    """A site that depends on the latents of a named plate without being in it."""
    return ValueError(
        f"Site '{site}' is outside of the plate '{plate}', but depends on its latents. With `plate_particles` these "
        "have particles of their own, which are averaged inside of the plate. Move the site into the plate, or "
        "remove the plate from `plate_particles`."
    )


def event_mask_error(site: str) -> ValueError:
    """A mask within an event of a latent that the guide draws as a whole."""
    return ValueError(
        f"The model masks parts of an event of the latent site '{site}', and the guide has no density for each part. "
        "Mask whole events (`numpyro.handlers.mask` outside of `.to_event()`), or let the guide draw the parts "
        "independently: a distribution of the parts, then `.to_event()`."
    )


def check_joint_plates(
    joint_plates: frozenset[str], plate_particles: Mapping[str, int], model_trace: Trace, guide_trace: Trace
) -> None:
    """Raise unless the plates whose elements share one weight exist, and have no local particles.

    :raises ValueError: naming the plate.
    """
    sites = sample_sites(model_trace) + sample_sites(guide_trace)
    known = {frame.name for site in sites for frame in site["cond_indep_stack"]}
    for plate in sorted(joint_plates):
        if plate not in known:
            raise ValueError(
                f"`joint_plates` names the plate '{plate}', which no site is in. Name one of these instead: "
                f"{listed(sorted(known))}."
            )
        if plate in plate_particles:
            raise ValueError(
                f"The plate '{plate}' is named in `joint_plates` and in `plate_particles`: its elements cannot share "
                "one weight and have particles of their own. Name it in one of them."
            )


def elements_error(plate: str, site: str) -> ValueError:
    """Elements of a plate that are not independent, where each would have a weight of its own."""
    return ValueError(
        f"The elements of the plate '{plate}' are not independent: the density of site '{site}' at one element depends "
        "on the latents of others (by a sum, a shift or a sort over the plate, say). Each element would have a weight "
        f"of its own, and the result would be wrong. Name the plate as one whose elements share a weight, "
        f"joint_plates=['{plate}'], and leave it out of `plate_particles`."
    )


def masked_latent_error(site: str, latent: str) -> ValueError:
    """A site that depends on elements of a latent that the model masks."""
    return ValueError(
        f"The model masks elements of the latent site '{latent}', but the density of site '{site}' depends on them. A "
        "mask takes an element out of the program, with its density in the guide. For a flat prior use "
        "`dist.ImproperUniform`; else mask what depends on the element as well."
    )


def delta_error(site: str) -> ValueError:
    """A point estimate that reweighted wake-sleep cannot move."""
    return ValueError(
        f"ReweightedWakeSleep cannot fit the guide site '{site}', a Delta at a parameter: it takes no gradient through "
        "samples, and a Delta has no density to follow. Use another guide for this site (AutoNormal instead of "
        "AutoDelta), make it a parameter of the model, or use VIMCOStar."
    )


def second_derivative_error() -> NotImplementedError:
    """A second derivative of the loss, whose first derivative is not that of its value."""
    return NotImplementedError(
        "The loss of an importance-weighted objective has a first derivative only: an estimate of the gradient, which "
        "is not the derivative of the estimate, so that a second derivative would be wrong. For curvature, "
        "differentiate a mean of many gradients numerically, or use an optimiser that needs gradients only."
    )


def subsample_error(frame, size: int, outside: list[str]) -> ValueError:
    """A subsampled plate whose scale would be a power inside of a logarithm."""
    if not outside:
        return ValueError(
            f"Plate '{frame.name}' is subsampled ({frame.size} of {size}), and named in `joint_plates`. Elements that "
            "share one weight can be subsampled where alpha=1 only. Use alpha=1, or the full plate."
        )
    return ValueError(
        f"Plate '{frame.name}' is subsampled ({frame.size} of {size}), but site '{outside[0]}' is outside of it. A "
        "subsample can be scaled where the plate is common to all sample sites of model and guide, so that each of "
        "its elements has a bound of its own, or where alpha=1, if the plate is common to all sites with which it "
        "shares a plate of `plate_particles`. Use alpha=1, the full plate, or make the sites outside of it parameters."
    )


def check_shape(site: dict, shape: tuple[int, ...]) -> None:
    """Raise unless ``shape``, that of a site's log-density, is explained by the site's plates.

    The log-density of a site in plates has the dimensions of these plates only. Outside of plates it may have the batch
    shape of the distribution or of the value, as NumPyro allows, but not an outer product of the two.

    :raises ValueError: otherwise.
    """
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"]}
    if sizes:
        # The leading dimension of a site in `scan` is time, and so is that of a chain in a guide without a scan.
        first = 1 if is_in_scan(site) or (CHAIN in site["infer"] and len(shape) > -min(sizes)) else 0
        unexplained = [dim for dim in range(first - len(shape), 0) if shape[dim] != sizes.get(dim, 1)]
        explained = not unexplained and len(shape) >= -min(sizes)
    else:
        batch = tuple(site["fn"].batch_shape)
        value = jnp.shape(site["value"])
        value = value[: len(value) - len(site["fn"].event_shape)]
        explained = _squeeze(shape) in (_squeeze(batch), _squeeze(value))
    if not explained:
        plates = ", ".join(f"'{f.name}' (dim {f.dim}, size {f.size})" for f in site["cond_indep_stack"])
        raise ValueError(
            f"The log-density of site '{site['name']}' has shape {shape}, which its plates do not explain "
            f"({plates or 'it is in none'}): the distribution has batch shape {tuple(site['fn'].batch_shape)}, the "
            f"value has shape {jnp.shape(site['value'])}. Add the missing plate, declare event dimensions with "
            "`.to_event()`, or reshape the data; `numpyro.util.format_shapes` shows the shapes of all sites."
        )


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop leading dimensions of size 1, which broadcasting adds or removes at will."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape
