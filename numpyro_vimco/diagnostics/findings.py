# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What speaks for and against a fitted posterior, and what to do: only what can help the model and the guide at hand.

Each rule looks at the facts, and says one thing or nothing. Rules of :data:`DOUBTS` keep a verdict from "good".
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_vimco.diagnostics.agreement import LEAST_ESS, contradictions, differences, is_evidence, pooled_evidence
from numpyro_vimco.diagnostics.earlier_bounds import Stretch
from numpyro_vimco.diagnostics.label_switching import LostLabels, Relabelled
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.proposals import can_have_particles
from numpyro_vimco.draws.weighing import Weighed
from numpyro_vimco.fitting.recovery import LOST
from numpyro_vimco.guides.auto_mixed import AutoMixed
from numpyro_vimco.guides.automatic import automatic_guides
from numpyro_vimco.sites import is_discrete, is_latent_site, sample_sites, states

if TYPE_CHECKING:
    import xarray as xr

# Where "good" ends: an effective sample size relative to the draws, and the same for weights of infinite variance, of
# a k of 0.5 or more. benchmarks/agreement.py sets the last two.
HEAVY_TAIL, LOW_ESS, HEAVY_ESS = 0.5, 0.1, 0.25
# The largest standard error of a log evidence that is good, in nats.
MOST_ERROR = 0.1
FEW_STATES = 8  # of a site that can be summed out
# A correlation that the guide lacks is told from this size on: it lowers the ESS of a pair to √(1 - 0.3²) at most.
CORRELATED = 0.3


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    :ivar code: its name, which stays the same between versions, such as ``"starts-disagree"``.
    :ivar sentence: what it is.
    :ivar numbers: those behind it, by name.
    :ivar remedy: code that helps, where there is one; else None.
    """

    code: str
    sentence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    remedy: str | None = None

    def __str__(self) -> str:
        return self.sentence if self.remedy is None else f"{self.sentence} Try `{self.remedy}`."


@dataclass(frozen=True)
class Facts:
    """What is known of a fitted posterior.

    :ivar std_error: of the log evidence, in nats.
    :ivar agreement: of several starts; None for a single fit.
    :ivar past: starts that lost something for certain.
    :ivar tempered: whether the fit was.
    :ivar recovered: whether starts were replaced by recovered ones.
    :ivar alike: whether all starts began at the same parameters.
    :ivar relabelled: starts that hold elements in one of the orders of the pooled draws.
    """

    approx: Approximation
    weighed: Weighed
    num_draws: int
    std_error: float
    agreement: "xr.Dataset | None"
    past: Mapping[int, Stretch]
    tempered: bool
    recovered: bool
    alike: bool = False
    relabelled: Mapping[int, Relabelled] = field(default_factory=dict)

    @cached_property
    def ess(self) -> float:
        return float(self.weighed.summary.ess.min())

    @cached_property
    def pareto_k(self) -> float:
        return float(self.weighed.summary.pareto_k.max())

    @property
    def few(self) -> bool:
        return self.ess / self.num_draws < LOW_ESS

    @property
    def heavy(self) -> bool:
        return self.pareto_k >= HEAVY_TAIL

    @property
    def single(self) -> bool:
        return self.agreement is None or self.agreement.sizes["start"] == 1

    @property
    def disagree(self) -> bool:
        return self.agreement is not None and bool(self.agreement["differs"].any())

    @cached_property
    def contradictions(self) -> tuple[bool, bool]:
        if self.agreement is None:
            return False, False
        return contradictions(self.agreement, {start: about.log_share for start, about in self.relabelled.items()})

    @cached_property
    def joint_plate(self) -> str | None:
        return _joint_plate(self.approx)

    @cached_property
    def humps(self) -> str | None:
        """A latent of which starts hold different parts, and which the guide cannot hold together."""
        if self.agreement is None or not (self.weighed.lost > LOST or self.recovered):
            return None
        latents = self.agreement.isel(quantity=~is_evidence(self.agreement))
        amount = np.where(latents["differs"], np.abs(latents["difference"]), 0).max(0, initial=0)
        if not amount.any():
            return None
        quantity = str(latents["quantity"].values[int(np.argmax(amount))])
        name = quantity.partition("[")[0]
        is_held = name not in self.approx.latents() or len(states(self.approx.model_trace[name]["fn"]))
        return None if is_held else quantity


Rule = Callable[[Facts], Finding | None]


def find_doubts(facts: Facts) -> list[Finding]:
    """What keeps a verdict from "good", whatever starts and weights say."""
    return [found for rule in DOUBTS if (found := rule(facts))]


def find_all(facts: Facts, verdict: str, lost_labels: LostLabels | None) -> list[Finding]:
    """All findings, the gravest first.

    :param lost_labels: whose finding is made of it alone, where the verdict would be "good" without.
    """
    if lost_labels:
        return [_label_switching(lost_labels)]
    if verdict == "good":
        return [*_trusted(facts), *_relabelled(facts)]
    rules = PROOFS if facts.past else SMALL if verdict == "usable" and facts.ess < LEAST_ESS else RULES
    return [*(found for rule in rules if (found := rule(facts))), *_relabelled(facts)]


# Doubts.


def _start_above_pool(facts: Facts) -> Finding | None:
    if not facts.contradictions[0]:
        return None
    return Finding(
        "start-above-pool",
        "A start has more evidence than the pooled draws, by more than their errors explain: the pooled draws lack "
        "what it found, and the weights do not show it.",
    )


def _pool_above_starts(facts: Facts) -> Finding | None:
    if not facts.contradictions[1]:
        return None
    return Finding(
        "pool-above-starts",
        "The pooled draws have more evidence than each start, by more than their errors explain: all guides lack a "
        "part of the posterior, which defensive draws found, or draw otherwise than by the density that they state.",
    )


def _lost_by_guides(facts: Facts) -> Finding | None:
    lost = facts.weighed.lost
    if lost <= LOST:
        return None
    return Finding(
        "lost-by-guides",
        f"Defensive draws hold {lost:.0%} of the posterior, which the guides do not propose. The pooled draws have it.",
        {"lost": lost},
    )


def _undefended(facts: Facts) -> Finding | None:
    if not facts.weighed.undefended:
        return None
    names = ", ".join(map(repr, facts.weighed.undefended))
    return Finding(
        "undefended",
        f"No draw takes {names} from the model alone (an improper prior, a point mass, a site in `scan`, or one "
        "whose prior depends on a summed site), so that nothing can show what the guide has lost there.",
        {"latents": facts.weighed.undefended},
    )


def _uncertain_evidence(facts: Facts) -> Finding | None:
    if facts.std_error <= MOST_ERROR:
        return None
    if not np.isfinite(facts.std_error):
        return Finding(
            "uncertain-evidence",
            "The log evidence may be higher by any amount: the weights have so heavy a tail (k of 1 or more) that "
            "their mean cannot be told from the draws.",
            {"std_error": facts.std_error},
        )
    more = facts.num_draws * int(np.ceil((facts.std_error / MOST_ERROR) ** 2))
    remedy = f"posterior.diagnose({more})" if more <= 10**6 and facts.ess >= LEAST_ESS else None
    return Finding(
        "uncertain-evidence",
        f"The log evidence has a standard error of {facts.std_error:.2f} nats"
        + (": take more draws." if remedy else ", as the guide is far from the posterior."),
        {"std_error": facts.std_error},
        remedy,
    )


def _starts_alike(facts: Facts) -> Finding | None:
    if not facts.alike:
        return None
    return Finding(
        "starts-alike",
        "All starts began at the same parameters, so that their agreement shows little. Let the guide begin elsewhere "
        "in each: a parameter takes a function of a key.",
        {},
        'numpyro.param("loc", lambda key: random.normal(key))',
    )


DOUBTS: list[Rule] = [
    _start_above_pool,
    _pool_above_starts,
    _lost_by_guides,
    _undefended,
    _uncertain_evidence,
    _starts_alike,
]


# Other rules.


def _several_humps(facts: Facts) -> Finding | None:
    if facts.humps is None:
        return None
    found = (
        "All starts had lost a part of the posterior. Some were recovered, and have what others lack. "
        if facts.recovered
        else ""
    )
    return Finding(
        "several-humps",
        f"{found}The guide of '{facts.humps}' holds one hump, and the posterior may have several.",
        {"latent": facts.humps},
        f"AutoMixed(posterior.svi.model, num_components={{'{facts.humps.partition('[')[0]}': 2}})",
    )


def _lost_part(facts: Facts) -> Finding | None:
    if not facts.past:
        return None
    start, stretch = next(iter(facts.past.items()))
    return Finding(
        "lost-part",
        f"A part of the posterior is lost: in steps {stretch.begin:,} to {stretch.end - 1:,} of start {start} the "
        f"bound was {stretch.bound:.2f} ± {stretch.std_error:.2f} nats, and no bound can be above the log evidence.",
        {"start": start, **stretch._asdict()},
    )


def _starts_disagree(facts: Facts) -> Finding | None:
    agreement = facts.agreement
    if agreement is None or not facts.disagree:
        return None
    pool = "" if facts.approx.params_of_model else " The pooled draws have what any of them found."
    return Finding(
        "starts-disagree",
        f"The starts disagree: {differences(agreement)}.{pool}",
        {"off": int(agreement["differs"].any("quantity").sum()), "starts": agreement.sizes["start"]},
    )


def _what_helps(facts: Facts) -> Finding | None:
    """What helps starts to agree, as far as it is not there yet, in the order of docs/checking_a_fit.md."""
    if not (facts.past or facts.disagree) or facts.humps:
        return None
    impossible = facts.agreement is not None and bool(np.isneginf(facts.agreement["log_evidence"]).any())
    approx, plate = facts.approx, facts.joint_plate
    found = ["a guide that begins where the data are possible (`init_loc_fn`)"] if impossible else []
    found += [_for_plate(approx, plate)] if plate else []
    structured = 'AutoMixed(posterior.svi.model, structure="autoregressive")'
    remedy = _particles(plate) if plate else None
    if _has(approx, discrete=True) and _richer_guide(approx) != "one by hand":
        found.append(f"a structured guide (`{structured}`)")
        remedy = remedy or structured
    found.append("a smaller learning rate")
    if not 0 < getattr(approx.svi.loss, "alpha", 0) < 1:
        found.append("0 < α < 1 (`VIMCOStar(0.5)`)")
        remedy = remedy or "VIMCOStar(0.5)"
    if not facts.tempered:
        found.append("tempering (`tempering=0.5`)")
    helps = ", ".join([*found, "more steps"])
    return Finding("what-helps", f"What helps, in this order: {helps}.", {}, remedy)


def _few_draws(facts: Facts) -> Finding | None:
    return Finding(
        "few-draws",
        f"An ESS of {facts.ess:.0f} tells little.",
        {"ess": facts.ess, "draws": facts.num_draws},
        f"posterior.diagnose({max(10_000, 10 * facts.num_draws)})",
    )


def _low_ess(facts: Facts) -> Finding | None:
    if not facts.few:
        return None
    return Finding(
        "low-ess",
        "Few draws hold most of the weight: the guide spends the others where the posterior has little.",
        {"ess": facts.ess, "draws": facts.num_draws},
    )


def _heavy_tail(facts: Facts) -> Finding | None:
    if not facts.heavy:
        return None
    return Finding(
        "heavy-tail",
        "The weights have a heavy tail: the guide proposes a part of the posterior too rarely, and one such "
        "draw can move an estimate by more than its standard error.",
        {"pareto_k": facts.pareto_k},
        f"posterior.diagnose({4 * facts.num_draws}, random.key(2))",
    )


def _joint_weight(facts: Facts) -> Finding | None:
    plate = facts.joint_plate if facts.few or facts.heavy or facts.disagree else None
    if plate is None:
        return None
    sentence = f"One weight is a product over all elements of the plate '{plate}', and hardly a draw holds all of it"
    sentence += "." if facts.disagree else f": {_for_plate(facts.approx, plate)}."
    return Finding("joint-weight", sentence, {"plate": plate}, _particles(plate))


def _joint_path(facts: Facts) -> Finding | None:
    chain = facts.approx.joint_chain if facts.few or facts.heavy or facts.disagree else None
    if chain is None:
        return None
    return Finding(
        "joint-path",
        f"One weight is a product over all steps of '{chain}' in its `scan`, and hardly a draw holds all of it: give "
        f"each step samples of its own, with the guide AutoMixed(posterior.svi.model, chains={{'{chain}'}}).",
        {"chain": chain},
        f"VIMCOStar(0.5, num_particles=8, chain_particles={{'{chain}': 16}})",
    )


def _missing_correlation(facts: Facts) -> Finding | None:
    """Two continuous latents whose correlation the guide lacks most, or has too much of.

    The guide's are those of its draws, the posterior's those of its weighted draws, if these are enough to tell.
    """
    weighed = facts.weighed
    values = weighed.continuous
    is_joint = facts.joint_plate is not None and (facts.few or facts.heavy or facts.disagree)
    if is_joint or values.shape[1] < 2 or weighed.log_weight is None or weighed.guide_share is None:
        return None
    finite = np.isfinite(values).all(1)  # others are at the edge of a support
    values, share = values[finite], weighed.guide_share[finite]
    weight = np.exp(weighed.log_weight - weighed.log_weight.max())[finite]
    if not weight.any() or not share.any():
        return None
    posterior, guide = _correlation(values, weight / weight.sum()), _correlation(values, share / share.sum())
    difference = np.abs(np.triu(posterior - guide, 1))
    # Four standard errors of a correlation of as many draws.
    if difference.max() < max(CORRELATED, 4 / weighed.summary.ess[0] ** 0.5):
        return None
    i, j = np.unravel_index(np.argmax(difference), difference.shape)
    of_posterior, of_guide = float(posterior[i, j]), float(guide[i, j])
    names = weighed.coordinates[i], weighed.coordinates[j]
    numbers = {"latents": names, "posterior": of_posterior, "guide": of_guide}
    about = f"'{names[0]}' and '{names[1]}': {of_posterior:.2f} under the weighted draws, {of_guide:.2f} in the guide"
    if abs(of_guide) > abs(of_posterior):
        return Finding(
            "wrong-correlation", f"The guide has too much correlation of continuous latents ({about}).", numbers
        )
    remedy = _correlated_guide(facts.approx)
    more = ""
    if remedy is None:
        faster = ", or a larger `coupling_speed`," if _is_autoregressive(facts.approx) else ""
        more = f" It can learn this: more steps{faster} may help."
    sentence = f"The guide lacks a correlation of continuous latents ({about}).{more}"
    return Finding("missing-correlation", sentence, numbers, remedy)


def _missed_part(facts: Facts) -> Finding | None:
    scarce = facts.ess < (HEAVY_ESS if facts.heavy else LOW_ESS) * facts.num_draws
    if not scarce or _joint_weight(facts) or _missing_correlation(facts):
        return None
    return Finding(
        "poor-guide",
        "The guide misses a part of the posterior, and estimates may be off: train for longer or with more particles, "
        f"use a richer guide ({_richer_guide(facts.approx)}), or let it guide chains of MCMC, which need "
        "no better one.",
        {"ess": facts.ess, "pareto_k": facts.pareto_k},
        "posterior.refine(random.key(2))",
    )


def _single_start(facts: Facts) -> Finding | None:
    if not facts.single:
        return None
    weights = "" if facts.few or facts.heavy else "The weights are good. "
    return Finding(
        "single-start",
        f"{weights}Only a second start can show what a first one missed: `fit` takes four, and compares them.",
        {},
        "fit(svi, rng_key, num_steps, ...)",
    )


PROOFS: list[Rule] = [*DOUBTS, _several_humps, _lost_part, _starts_disagree, _what_helps]
SMALL: list[Rule] = [*DOUBTS, _several_humps, _starts_disagree, _what_helps, _few_draws]
RULES: list[Rule] = [
    *DOUBTS,
    _several_humps,
    _starts_disagree,
    _what_helps,
    _low_ess,
    _heavy_tail,
    _joint_weight,
    _joint_path,
    _missing_correlation,
    _missed_part,
    _single_start,
]


def _trusted(facts: Facts) -> Iterator[Finding]:
    """What "good" means; starts that are stuck are named."""
    agreement = facts.agreement
    assert agreement is not None
    off = agreement["differs"].any("quantity").values
    number = f"{(~off).sum()} of {len(off)}" if off.any() else f"{len(off)}"
    yield Finding(
        "starts-agree",
        f"{number} starts agree, and the weights of defended draws are good: importance-weighted estimates can be "
        "trusted, unless a part of the posterior was lost that differs from all draws in several latents at once.",
        {"agree": int((~off).sum()), "starts": len(off)},
    )
    pooled = pooled_evidence(agreement)
    for start, evidence in zip(agreement["start"].values[off].tolist(), agreement["log_evidence"].values[off]):
        below = float(pooled - evidence)
        sentence = f"Start {start} is stuck: its evidence is {below:.2f} nats lower."
        yield Finding("start-stuck", sentence, {"start": start, "below": below})


def _relabelled(facts: Facts) -> Iterator[Finding]:
    """Starts whose elements are in different orders, which the pooled draws all have."""
    if not facts.relabelled:
        return
    start, about = next(iter(facts.relabelled.items()))
    together = ", ".join(f"'{name}'" for name in about.names)
    first, second = about.pair
    yield Finding(
        "labels-switched",
        f"Label switching: elements {first} and {second} can change places (in {together}). Start {start} has them in "
        f"one order, which holds {about.share:.0%} of the posterior, and the pooled draws have both. What does not "
        "depend on the order is not touched by this; for the rest, say in the model which element is which, by a prior "
        "or an ordered vector.",
        {"starts": list(facts.relabelled), "share": about.share},
    )


def _label_switching(lost: LostLabels) -> Finding:
    """What it means that draws lack an order of two elements, and what to do."""
    first, second = lost.pair
    together = ", ".join(f"'{name}'" for name in lost.names)
    return Finding(
        "label-switching",
        f"Label switching: the posterior has elements {first} and {second} in both orders, as they can change places "
        f"(in {together}), but the draws lack one, by '{lost.latent}'. The log evidence is too low by {lost.lost:.2f} "
        "nats at least, and what depends on the order is mostly of the other. For the rest starts agree, and the "
        "weights are good. Say in the model which element is which, by a prior or an ordered vector, or take more "
        "starts.",
        lost._asdict(),
    )


# Remedies.


def _particles(plate: str) -> str:
    return f"VIMCOStar(plate_particles={{'{plate}': 8}})"


def _for_plate(approx: Approximation, plate: str) -> str:
    """What helps where the elements of a plate share a weight: to sum out its latents of few states, or particles."""
    few = [
        f"'{name}' has {number}"
        for name, site in approx.latents(plate).items()
        if 0 < (number := len(states(site["fn"]))) <= FEW_STATES
    ]
    particles = f"give its elements particles of their own, {_particles(plate)}"
    if not few:
        return particles
    return f"sum out sites of few states ({', '.join(few)}), by infer={{'enumerate': 'parallel'}}, or {particles}"


def _has(approx: Approximation, discrete: bool) -> bool:
    return any(is_discrete(site) == discrete for site in approx.latents().values())


def _is_autoregressive(approx: Approximation) -> bool:
    guide = approx.svi.guide
    return isinstance(guide, AutoMixed) and guide.structure == "autoregressive"


def _correlated_guide(approx: Approximation) -> str | None:
    """A guide that has the correlation which this one lacks; None where it is there, and may learn it."""
    if any(isinstance(part, AutoMultivariateNormal) for part in automatic_guides(approx.svi.guide)):
        return None
    if not _has(approx, discrete=True) and not approx.summed:
        return "AutoMultivariateNormal(model)"
    return None if _is_autoregressive(approx) else "AutoMixed(posterior.svi.model, continuous=AutoMultivariateNormal)"


def _richer_guide(approx: Approximation) -> str:
    if not _has(approx, discrete=True) and not approx.summed:
        guides = automatic_guides(approx.svi.guide)
        joint = any(isinstance(part, AutoMultivariateNormal) for part in guides)
        return "a flow, or one by hand" if joint else "AutoMultivariateNormal(model), a flow, or one by hand"
    if _is_autoregressive(approx):
        return "one by hand"
    return 'AutoMixed(posterior.svi.model, structure="autoregressive"), or one by hand'


def _correlation(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    centred = values - weight @ values
    covariance = (centred * weight[:, None]).T @ centred
    scale = np.sqrt(np.maximum(np.diag(covariance), np.finfo(float).tiny))
    return covariance / scale / scale[:, None]


def _joint_plate(approx: Approximation) -> str | None:
    """A plate with latents of its own beside others, whose elements share a weight."""
    sites = sample_sites(approx.model_trace)
    for site in filter(is_latent_site, sites):
        names = [frame.name for frame in site["cond_indep_stack"]]
        if any(name in approx.plate_particles for name in names):
            continue
        for frame in sorted(site["cond_indep_stack"], key=lambda frame: frame.dim):
            common = all(frame in other["cond_indep_stack"] for other in sites)
            if frame.size > 1 and not common and can_have_particles(approx, {**approx.local, frame.name: 2}):
                return frame.name
    return None
