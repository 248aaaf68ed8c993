# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""From what is known of a model to plans, the best first. Each rule says by what measurement it stands."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
import math
from typing import Any

import jax
from numpyro.handlers import block, seed, trace
from numpyro.infer import SVI, TraceEnum_ELBO

from numpyro_vimco.arguments import listed
from numpyro_vimco.draws.approximation import signature_misfit
from numpyro_vimco.fitting.run import Fit
from numpyro_vimco.guides.automatic import Call, recorded_calls
from numpyro_vimco.objectives import ImportanceWeightedELBO
from numpyro_vimco.planning.plan import STARTS, Plan
from numpyro_vimco.planning.structure import Latent, Structure, first_sentence
from numpyro_vimco.sites import is_latent_site, sample_sites

# Particles where all latents are drawn together: `benchmarks/posteriors`. If some have particles of their own, 8 × 8
# give as many evaluations of the data.
JOINT, SHARED, LOCAL, SAMPLES = 64, 8, 8, 16
# Starts where so many discrete elements or more are drawn together, which may have several modes. On the karate
# club that may have either name, a start loses the larger mode with probability 0.6: of 8 fits of 4 starts, 3 were
# wrong and called "good"; of 8 fits of 8 starts, none (`benchmarks/plans.py --starts`).
MANY_STARTS, MANY_SWITCHES = 8, 10
# Plates of fewer elements have no particles of their own: their latents are drawn with all others. With 5 to 40
# elements particles of the plate have 40 times the ESS of joint ones, at the same time a step; fewer were not measured
# (`benchmarks/plans.py --values 4 --elements 5 10 20 40`).
LEAST_ELEMENTS = 5
# Combinations of values of the summed latents that one density depends on. A sum of S values costs S evaluations for
# each of 64 particles, where 8 particles of 8 cost one (`benchmarks/plans.py`).
MOST_VALUES = 32
# Numbers in the arrays of all particles of a step that are alive at once, by site (`benchmarks/plans.py`).
ALIVE = 8
# Objectives that sum out marked latents; others of NumPyro draw them from the model.
OF_SUMS = (ImportanceWeightedELBO, TraceEnum_ELBO)
GIB = 2**30


def first_possible(candidates: list[Plan], model: Callable, begin: Callable[[SVI, int], Fit]) -> tuple[Plan, Fit]:
    """The first plan whose fit begins without an error, and this fit.

    Only evaluating the densities shows what a program admits: whether elements of a plate are independent, whether a
    density that was written for drawn values holds where they are summed out.

    :param begin: from an `SVI` and a number of starts; raises where a plan is not possible.
    :raises ValueError: that of the last plan, which takes the model as it is.
    """
    *others, last = candidates
    notes: list[str] = []
    for plan in others:
        try:
            return _begun(plan, notes, begin(plan.svi(model), plan.num_starts))
        except Exception as error:  # programs that were not written for sums fail in many ways
            notes.append(f"Not {plan.what}: {first_sentence(error)}.")
    return _begun(last, notes, begin(last.svi(model), last.num_starts))


def _begun(plan: Plan, notes: list[str], fitted: Fit) -> tuple[Plan, Fit]:
    found = getattr(fitted.approx.svi.loss, "score_sites", None)
    return replace(plan, notes=(*plan.notes, *notes), score_sites=found or None), fitted


def plans(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    num_steps: int,
    num_starts: int | None,
    given: Mapping[str, Any],
    memory: float = 2 * GIB,
) -> list[Plan]:
    """Plans for a model, the best first: with sums, with particles for plates and chains, and joint.

    :param given: what the user chose, by the names of SVI's arguments.
    :param num_starts: how many the user asks for; None if that is the plan's choice.
    :param memory: in bytes, of the arrays of a step.
    :raises ValueError: for arguments that do not fit the model.
    """
    if problem := signature_misfit(model, args, kwargs):
        raise ValueError(
            f"What `fit` was given for the model does not fit {problem}. Arguments of the model follow the number of "
            "steps as they are, `fit(model, rng_key, 2000, x)`."
        )
    known = Structure.of(model, args, kwargs)
    sampled = _sampled(given.get("guide"), args, kwargs)
    marked = {name: x.num_values for name, x in known.latents.items() if x.is_marked and name not in sampled}
    arguments = ", ".join(["*args"] * bool(args) + ["**kwargs"] * bool(kwargs)) or "*args"
    alpha = 1.0 if known.subsampled else 0.5
    first = Plan(num_steps, marked=marked, given=given, alpha=alpha, arguments=arguments)
    loss = given.get("loss")
    sums, notes = {}, []
    if loss is None or isinstance(loss, OF_SUMS):
        sums = _sums(known, sampled, marked)
        if kept := sorted(_sums(known, set(), marked).keys() & sampled):
            notes.append(
                f"Not {listed(kept)} summed out: your guide samples it. A guide of `sum_out(model, {kept})` does not."
            )
    if sums and not find_spec("funsor"):
        notes.append(f"Not {listed(sums)} summed out: that needs the package funsor (`pip install funsor`).")
        sums = {}
    if known.latents and not any(about.is_discrete for about in known.latents.values()):
        notes.append("All latents are continuous. If all have a reparameterised sampler, use NUTS.")
    notes += [f"Not {SAMPLES} samples of each step of '{name}': {why}." for name, why in known.no_chains.items()]
    first = replace(first, notes=tuple(notes))
    kinds = [replace(first, summed=sums), first] if sums else [first]
    if loss is not None:
        return [_with_starts(_of_loss(plan, known, loss), known, num_starts) for plan in kinds]
    candidates = [_local(plan, known) for plan in kinds]
    joint = _joint(first, known)
    common = set.intersection(*map(set, known.plates.values())) if known.plates else set()
    candidates += [joint] if joint != candidates[-1] else []
    candidates += [replace(joint, joint_plates=tuple(sorted(common)))] if common else []
    return [_within(_with_starts(plan, known, num_starts), known, memory) for plan in candidates]


def _with_starts(plan: Plan, known: Structure, num_starts: int | None) -> Plan:
    """A plan with as many starts as the user asks for, or more than usual where modes are many."""
    if num_starts is None:
        switches = sum(known.latents[name].size for name in plan.joint if known.latents[name].is_discrete)
        num_starts = MANY_STARTS if switches >= MANY_SWITCHES else STARTS
    return replace(plan, num_starts=num_starts)


def _sampled(guide: Callable | None, args: tuple, kwargs: dict) -> set[str]:
    """What a guide that the user gave samples."""
    if guide is None:
        return set()
    calls: list[Call] = []
    with recorded_calls(calls), block():
        tr = trace(seed(guide, jax.random.key(0))).get_trace(*args, **kwargs)
    for call in calls:
        if not call.was_called:
            call.undo()  # where it begins depends on the key of the fit
    return {site["name"] for site in sample_sites(tr) if is_latent_site(site)}


def _of_loss(plan: Plan, known: Structure, loss: Any) -> Plan:
    """A plan with the objective that the user gave."""
    left = _left(plan, known)
    plates = dict(getattr(loss, "plate_particles", {}))
    chains = {name: x for name, x in getattr(loss, "chain_particles", {}).items() if name in left}
    local = {plate: tuple(name for name, about in left.items() if plate in about.plates) for plate in plates}
    local |= {chain: tuple(name for name, x in left.items() if x.scan == left[chain].scan) for chain in chains}
    own = {name for latents in local.values() for name in latents}
    joint = tuple(name for name in left if name not in own)
    number = getattr(loss, "num_particles", 1)
    return replace(plan, plate_particles=plates, chain_particles=chains, local=local, joint=joint, num_particles=number)


def _left(plan: Plan, known: Structure) -> dict[str, Latent]:
    """Latents that are sampled."""
    return {name: about for name, about in known.latents.items() if name not in {**plan.summed, **plan.marked}}


def _sums(known: Structure, sampled: set[str], marked: Mapping[str, int]) -> dict[str, int]:
    """Latents that a plan sums out, with their numbers of values: few for each element of a plate or step of a chain.

    All of the sums of the benchmark posteriors beat the particles of plates there. Global latents are sampled: a sum
    over 111 change points took three times as long for the same answer, and the draws of sums are not defended.
    """
    found: dict[str, int] = {}
    for name, about in sorted(known.latents.items(), key=lambda item: item[1].num_values):
        if not _can_be_summed(name, about, known) or name in sampled or about.has_mark:
            continue
        others = {**marked, **found, name: about.num_values}
        together = [[x for x in factor if x in others] for factor in known.factors.values() if name in factor]
        tables = [math.prod(others[x] for x in table) for table in together]
        is_crossed = any(_are_crossed(known.plates[name], known.plates[x]) for table in together for x in table)
        if max(tables) <= MOST_VALUES and not is_crossed:
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


def _are_crossed(one: frozenset[str], other: frozenset[str]) -> bool:
    return not (one <= other or other <= one)


def _local(plan: Plan, known: Structure) -> Plan:
    """A plan in which plates and chains have particles of their own, where these are beside other latents."""
    left = _left(plan, known)
    local: dict[str, tuple[str, ...]] = {}
    chains: dict[str, int] = {}
    for scan in sorted(known.first_order):
        if latents := tuple(name for name, about in left.items() if about.scan == scan):
            chains[latents[0]] = SAMPLES
            local[latents[0]] = latents
    in_chains = {name for latents in local.values() for name in latents}
    plates = {}
    for plate, inside in _local_plates(left, known, {**plan.summed, **plan.marked}).items():
        if not inside & in_chains and plate not in known.plates_in_scan:
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
    """Plates whose elements are independent given the latents outside of them, each with its latents.

    No site is in two of them: of nested or crossed plates it is the one with more elements of latents. A plate that
    contains every site needs no particles: each of its elements has a bound of its own.
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
    for plate, inside in sorted(found.items(), key=lambda item: -sum(left[name].size for name in item[1])):
        if not any({plate, other} <= plates for other in chosen for plates in known.plates.values()):
            chosen[plate] = inside
    return chosen


def _joint(plan: Plan, known: Structure) -> Plan:
    """A plan in which a particle draws all latents together."""
    return replace(plan, joint=tuple(_left(plan, known)), num_particles=JOINT)


def memory_of_particle(plan: Plan, known: Structure) -> float:
    """Bytes that the arrays of one particle of one start take in a step, about."""
    sums = {**plan.summed, **plan.marked}
    numbers = 0
    for site, factor in known.factors.items():
        own = [level for level, latents in plan.local.items() if factor & set(latents)]
        copies = math.prod(
            plan.chain_particles[level] ** 2 if level in plan.chain_particles else plan.plate_particles[level]
            for level in own
        )
        numbers += known.sizes[site] * copies * math.prod(sums[name] for name in factor if name in sums)
    return 4.0 * ALIVE * numbers


def _within(plan: Plan, known: Structure, memory: float) -> Plan:
    """A plan whose step needs no more memory, by evaluating some of the particles at a time."""
    of_one = max(memory_of_particle(plan, known) * plan.num_starts, 1.0)
    if plan.num_particles * of_one <= memory:
        return plan
    divisors = [n for n in range(1, plan.num_particles) if plan.num_particles % n == 0 and n * of_one <= memory]
    plan = replace(plan, chunk_size=max(divisors, default=1))
    if of_one <= memory:
        return plan
    note = f"One particle of each start takes {of_one / GIB:,.0f} GiB in a step. Subsample the data."
    return replace(plan, notes=(*plan.notes, note))
