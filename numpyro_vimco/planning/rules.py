# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""From what is known of a model to plans, the best first. Each rule says by what measurement it stands."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
import math
from typing import Any

import jax
from numpyro.handlers import block, seed, trace
from numpyro.infer import SVI

from numpyro_vimco.arguments import listed
from numpyro_vimco.draws.approximation import signature_misfit
from numpyro_vimco.fitting.run import Fit
from numpyro_vimco.planning.plan import Plan
from numpyro_vimco.planning.structure import Latent, Structure
from numpyro_vimco.sites import is_latent_site, sample_sites

# Particles where all latents are drawn together: `benchmarks/posteriors`. Where some have particles of their own there
# are as many evaluations of the data: 8 with 8 for each.
JOINT, SHARED, LOCAL, SAMPLES = 64, 8, 8, 16
# Elements of a plate are summed out, or have particles, where there are so many or more: fewer are drawn jointly.
LEAST_ELEMENTS = 20
# Values that a density may depend on together, of sites that are summed out. A sum of S values costs S evaluations for
# each of 64 particles, where 8 particles of 8 cost one (`benchmarks/plans.py`).
MOST_VALUES = 32
# Numbers in the arrays of all particles of a step that are alive at once, by site (`benchmarks/plans.py`).
ALIVE = 8
GIB = 2**30


def first_that_begins(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    num_steps: int,
    num_starts: int,
    given: Mapping[str, Any],
    begin: Callable[[SVI], Fit],
) -> tuple[Plan, Fit]:
    """The first plan whose fit begins without an error, and this fit.

    What a program admits is known where its densities are evaluated: whether elements of a plate are independent,
    whether a density that was written for drawn values holds where they are summed out.

    :param begin: raises where a plan is not possible.
    :raises ValueError: that of the last plan, which takes the model as it is.
    """
    if problem := signature_misfit(model, args, kwargs):
        raise ValueError(
            f"What `fit` was given for the model does not fit {problem}. Arguments of the model follow the number of "
            "steps as they are, `fit(model, rng_key, 2000, x)`."
        )
    *others, last = plans(model, args, kwargs, num_steps, num_starts, given)
    notes: list[str] = []
    for plan in others:
        try:
            return _begun(plan, notes, begin(plan.svi(model)))
        except Exception as error:  # programs that were not written for sums fail in many ways
            notes.append(f"Not {plan.what}: {str(error).partition('. ')[0]}.")
    return _begun(last, notes, begin(last.svi(model)))


def _begun(plan: Plan, notes: list[str], fitted: Fit) -> tuple[Plan, Fit]:
    found = getattr(fitted.approx.svi.loss, "score_sites", None)
    return replace(plan, notes=(*plan.notes, *notes), score_sites=found or None), fitted


def plans(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    num_steps: int,
    num_starts: int,
    given: Mapping[str, Any],
    memory: float = 2 * GIB,
) -> Iterator[Plan]:
    """Plans for a model, the best first: with sums, with particles for plates and chains, and joint.

    :param given: what the user chose, by the names of SVI's arguments.
    :param memory: in bytes, of the arrays of a step.
    """
    known = Structure.of(model, args, kwargs)
    sampled = _sampled(given.get("guide"), args, kwargs)
    marked = {name: x.num_values for name, x in known.latents.items() if x.is_marked and name not in sampled}
    first = Plan(num_steps, marked=marked, given=given, alpha=1.0 if known.subsampled else 0.5)
    sums = _sums(known, sampled, marked)
    if sums and not find_spec("funsor"):
        note = f"Not {listed(sums)} summed out: that needs the package funsor (`pip install funsor`)."
        first, sums = replace(first, notes=(note,)), {}
    if known.latents and not any(about.is_discrete for about in known.latents.values()):
        first = replace(first, notes=("All latents are continuous. If all have a reparameterised sampler, use NUTS.",))
    candidates = [_local(replace(first, summed=sums), known)] if sums else []
    candidates.append(_local(first, known))
    joint = _joint(first, known)
    common = set.intersection(*map(set, known.plates.values())) if known.plates else set()
    candidates += [joint] if joint != candidates[-1] else []
    candidates += [replace(joint, joint_plates=tuple(sorted(common)))] if common else []
    for plan in candidates:
        yield _within(plan, known, num_starts, memory)


def _sampled(guide: Callable | None, args: tuple, kwargs: dict) -> set[str]:
    """What a guide that the user gave samples."""
    if guide is None:
        return set()
    with block():
        tr = trace(seed(guide, jax.random.key(0))).get_trace(*args, **kwargs)
    return {site["name"] for site in sample_sites(tr) if is_latent_site(site)}


def _sums(known: Structure, sampled: set[str], marked: Mapping[str, int]) -> dict[str, int]:
    """Latents that a plan sums out, with their numbers of values: few for each element of a plate or step of a chain.

    All of the sums of the benchmark posteriors beat the particles of plates there. Global latents are sampled: a sum
    over 111 change points took three times as long for the same answer, and the draws of sums are not defended.
    """
    found: dict[str, int] = {}
    for name, about in sorted(known.latents.items(), key=lambda item: item[1].num_values):
        if not _can_be_summed(name, about, known) or name in sampled or about.is_settled:
            continue
        others = {**marked, **found, name: about.num_values}
        tables = [math.prod(others[x] for x in factor if x in others) for factor in known.factors.values()]
        if max(tables) <= MOST_VALUES:
            found[name] = about.num_values
    # A chain is summed out as a whole, or has samples.
    for scan in {known.latents[name].scan for name in found} - {None}:
        inside = {name for name, about in known.latents.items() if about.scan == scan}
        if not inside <= {*found, *marked}:
            found = {name: number for name, number in found.items() if name not in inside}
    is_all = known.latents.keys() <= {*found, *marked}  # a guide needs a latent
    return {} if is_all else dict(sorted(found.items()))


def _can_be_summed(name: str, about: Latent, known: Structure) -> bool:
    """Whether a latent has few values, and all that depends on it is in its plates, or in its `scan`."""
    if not 1 < about.num_values <= MOST_VALUES:
        return False
    reached = [site for site, factor in known.factors.items() if name in factor]
    if about.scan is not None:
        inside = all(known.plates[name] <= known.plates[site] for site in reached)
        return inside and about.scan in known.first_order
    return bool(about.plates) and all(known.plates[name] <= known.plates[site] for site in reached)


def _local(plan: Plan, known: Structure) -> Plan:
    """A plan in which plates and chains have particles of their own, where these are beside other latents."""
    left = {name: x for name, x in known.latents.items() if name not in {**plan.summed, **plan.marked}}
    local: dict[str, tuple[str, ...]] = {}
    chains: dict[str, int] = {}
    for scan in sorted(known.first_order):
        if latents := tuple(name for name, about in left.items() if about.scan == scan):
            chains[latents[0]] = SAMPLES
            local[latents[0]] = latents
    in_chains = {name for latents in local.values() for name in latents}
    plates = {}
    for plate, inside in _local_plates(left, known, {**plan.summed, **plan.marked}).items():
        if not inside & in_chains:
            plates[plate] = LOCAL
            local[plate] = tuple(name for name in left if name in inside)
    if not local:
        return _joint(plan, known)
    own = {name for latents in local.values() for name in latents}
    return replace(
        plan,
        plate_particles=plates,
        chain_particles=chains,
        local=local,
        joint=tuple(name for name in left if name not in own),
        num_particles=SHARED,
    )


def _local_plates(left: Mapping[str, Latent], known: Structure, summed: Mapping[str, int]) -> dict[str, set[str]]:
    """Plates whose elements share latents outside of them only, the outermost, each with its latents.

    A plate that every site is in needs none: its elements have a bound each.
    """
    sizes = {plate: size for about in left.values() for plate, size in about.plates.items()}
    found: dict[str, set[str]] = {}
    for plate, size in sizes.items():
        inside = {name for name, about in left.items() if plate in about.plates}
        others = {name for name in summed if plate not in known.plates[name]}
        reached = {site: factor for site, factor in known.factors.items() if factor & inside}
        is_local = all(plate in known.plates[site] and not factor & others for site, factor in reached.items())
        is_common = all(plate in plates for plates in known.plates.values())
        if is_local and not is_common and size >= LEAST_ELEMENTS:
            found[plate] = inside
    chosen: dict[str, set[str]] = {}
    for plate, inside in sorted(found.items(), key=lambda item: -len(item[1])):
        if not any(inside & other for other in chosen.values()):
            chosen[plate] = inside
    return chosen


def _joint(plan: Plan, known: Structure) -> Plan:
    """A plan in which a particle draws all latents together."""
    left = tuple(name for name in known.latents if name not in {**plan.summed, **plan.marked})
    return replace(plan, joint=left, num_particles=JOINT)


def _within(plan: Plan, known: Structure, num_starts: int, memory: float) -> Plan:
    """A plan whose step needs no more memory, by evaluating some of the particles at a time."""
    if "loss" in plan.given:
        return plan
    sums = {**plan.summed, **plan.marked}
    of_one = 0
    for site, factor in known.factors.items():
        own = [level for level, latents in plan.local.items() if factor & set(latents)]
        copies = math.prod(
            plan.chain_particles[level] ** 2 if level in plan.chain_particles else plan.plate_particles[level]
            for level in own
        )
        of_one += known.sizes[site] * copies * math.prod(sums[name] for name in factor if name in sums)
    at_once = memory / max(4 * ALIVE * of_one * num_starts, 1)
    if at_once >= plan.num_particles:
        return plan
    divisors = [n for n in range(1, plan.num_particles) if plan.num_particles % n == 0 and n <= max(at_once, 1)]
    return replace(plan, chunk_size=divisors[-1])
