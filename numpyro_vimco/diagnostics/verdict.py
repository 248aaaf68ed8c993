# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Can a fitted posterior be trusted?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Array
import numpy as np

from numpyro_vimco.arguments import check_integer
from numpyro_vimco.diagnostics.agreement import ERRORS, LEAST_ESS, TOLERANCE, compare, is_evidence, share_that_agrees
from numpyro_vimco.diagnostics.earlier_bounds import earlier_bounds
from numpyro_vimco.diagnostics.findings import HEAVY_ESS, HEAVY_TAIL, LOW_ESS, Facts, Finding, find_all, find_doubts
from numpyro_vimco.diagnostics.label_switching import LostLabels, Relabelled, find_lost_labels, find_relabelled
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.moments import Estimate, Moments
from numpyro_vimco.draws.proposals import check_has_density
from numpyro_vimco.draws.weighing import Weighed, moments_of_starts, weigh_pool
from numpyro_vimco.fitting.state import Starts
from numpyro_vimco.randomness import split

if TYPE_CHECKING:
    import xarray as xr

# So many of the starts agree where a fit is "good": three of four. Set by benchmarks/agreement.py.
MOST = 0.75
# "Bad" begins here where each start is off: then the pool alone is to be believed.
LEAST_SHARE = 0.03


@dataclass(frozen=True)
class Diagnostics:
    """How well the guide's draws, with their importance weights, stand for the posterior.

    Where plates are common to all sites, each of their elements has weights of its own: ``ess`` and ``pareto_k`` are
    arrays of the shape of these plates, and the evidence is a sum over elements. Else they are numbers.

    :ivar log_evidence: estimate of log p(x) in nats: the logarithm of the mean weight.
    :ivar log_evidence_std_error: its standard error in nats: that of the delta method, divided by 1 - k for the tail
        that was not seen (``weights.unseen_factor``). Infinite where k is 1 or more and the ESS less than a quarter of
        the draws: the log evidence may then be higher by any amount. It knows nothing of a part of the posterior that
        no draw comes near.
    :ivar bounds: the importance-weighted bound (α = 0) of the defended draws in nats, by number of particles N, each a
        mean over the draws in groups of N. At N = 1 defensive draws make it low.
    :ivar ess: effective sample size, 1 / Σ W², of the normalized weights as they are.
    :ivar pareto_k: shape of the weights' tail, as in ArviZ; -inf where the tail is tied, or where what lies above its
        beginning is less than 0.1 / √draws of the weight, so that it can do no harm
        (``weights.smooth_tail``).
    :ivar verdict: of the worst element.

        - ``"bad"``: a proof of a loss; a start with more evidence than the pool, for certain; an ESS of less than a
          quarter of the draws where it is below 100, or where k is min(1 - 1 / log10(draws), 0.7) or more (Vehtari et
          al. 2024); or an ESS of less than 3% of the draws where each start is off.
        - ``"good"``, if not bad, and the ESS is 100 or more: there are two starts or more, three quarters of them
          agree, the others are stuck in less than a hundredth of the evidence, and the ESS is a tenth of the draws or
          more. From a k of 0.5 on the ESS is a quarter of the draws, and from 0.7 on all starts agree. The standard
          error of the log evidence is at most 0.1 nats. Every latent is defended, and the guides propose four fifths of
          what the defended draws found. The pool has no more evidence than each start, beyond errors. And no label
          switching was found (``diagnostics/label_switching`` says what is tried).
        - ``"usable"``: neither of these. It is the best verdict for a single fit, or for starts that disagree.

    :ivar findings: what to make of it, or what to do, the gravest first.
    :ivar num_draws: number of draws.
    :ivar heaviest: normalized weights of the heaviest draws, from the largest, of the element with the largest k: of
        all draws where weights are joint, else of the 3 √draws heaviest.
    :ivar log_weight: log-weights, of shape ``(num_draws,)``, in nats, where they are joint. None where each element
        has its own: these are not kept.
    :ivar estimates: of each latent the weighted ``mean``, its ``std_error``, and the ``std`` of the posterior.
    :ivar agreement: of a fit of several starts, else None: each start against the pooled draws, by dimensions ``start``
        and ``quantity`` (``log evidence``, by element where each has its own, and the mean of each latent). Where the
        model has parameters of its own, each start has another posterior: the pool is then the best start, and
        evidences alone are compared, each under the start's own parameters.

        - ``estimate`` and ``std_error`` of each start, ``pooled`` and ``pooled_std_error``;
        - ``difference`` from the pool and ``difference_std_error``, in ``unit``: 1 nat, or the posterior standard
          deviation; ``differs``: by more than 0.1 and four standard errors, and not by the order of two labels alone;
        - by start: ``log_evidence`` and ``log_evidence_std_error`` in nats (by the delta method, without regard to k),
          ``ess``, and ``earlier_bound`` with ``earlier_bound_std_error`` in nats, where it proves a loss, else NaN.
    """

    log_evidence: float
    log_evidence_std_error: float
    bounds: dict[int, float]
    ess: float | np.ndarray
    pareto_k: float | np.ndarray
    verdict: str
    findings: list[Finding]
    num_draws: int
    heaviest: np.ndarray = field(repr=False)
    log_weight: np.ndarray | None = field(repr=False)
    agreement: "xr.Dataset | None" = field(repr=False)
    estimates: dict[str, Estimate] = field(repr=False)


def diagnose(
    approx: Approximation,
    starts: Starts,
    several: bool,
    with_losses: bool,
    rng_key: Array,
    num_draws: int,
    progress_bar: bool,
) -> Diagnostics:
    """Draw from the fitted guides, and see what the importance weights say.

    :param several: whether starts are compared.
    :param with_losses: whether their losses are those of this posterior.
    """
    num_draws = check_integer("num_draws", num_draws, 100, "the tail of the weights is fitted to them")
    approx.check_has_posterior()
    check_has_density(approx)
    pool_key, start_key = split(rng_key)
    weighed = weigh_pool(approx, pool_key, num_draws, "diagnostics" if progress_bar else None)
    summary = weighed.summary
    log_evidence, std_error = float(summary.log_evidence.sum()), summary.std_error
    agreement, past, relabelled = None, {}, {}
    if several:
        of_starts = moments_of_starts(approx, start_key, num_draws, "starts" if progress_bar else None)
        indices = starts.kept.tolist()
        # What these draws did not see is lost, whatever their tail says of it.
        of_seen = float(np.sqrt(summary.variance.sum()))
        past = earlier_bounds(approx, starts, log_evidence, of_seen) if with_losses else {}
        agreement = compare(approx, indices, weighed.moments, of_starts).assign(
            earlier_bound=("start", [past[i].bound if i in past else np.nan for i in indices]),
            earlier_bound_std_error=("start", [past[i].std_error if i in past else np.nan for i in indices]),
        )
        relabelled = _relabelled(approx, weighed, agreement, of_starts)
        agreement["differs"] = agreement["differs"] & ~_explained(agreement, relabelled)
    tempered = bool((starts.inverse_temperature < 1).any())
    facts = Facts(
        approx, weighed, num_draws, std_error, agreement, past, tempered, starts.recovered, starts.alike, relabelled
    )
    verdict, lost_labels = _verdict(facts), None
    if verdict == "good":
        lost_labels = _lost_labels(approx, weighed)
        verdict = "usable" if lost_labels else "good"
    if weighed.log_weight is None:
        heaviest = summary.heaviest
    else:
        relative = np.sort(np.exp(weighed.log_weight - weighed.log_weight.max()))[::-1]
        heaviest = relative / relative.sum()
    return Diagnostics(
        log_evidence=log_evidence,
        log_evidence_std_error=std_error,
        bounds=summary.bounds,
        ess=summary.ess.reshape(weighed.shape)[()],
        pareto_k=summary.pareto_k.reshape(weighed.shape)[()],
        verdict=verdict,
        findings=find_all(facts, verdict, lost_labels),
        num_draws=num_draws,
        heaviest=heaviest,
        log_weight=weighed.log_weight,
        agreement=agreement,
        estimates=weighed.moments.estimates(),
    )


def _relabelled(
    approx: Approximation, weighed: Weighed, agreement: "xr.Dataset", of_starts: Sequence[Moments]
) -> dict[int, Relabelled]:
    """The starts that differ from the pool and hold elements in one of its orders."""
    found = {}
    off = agreement["differs"].any("quantity").values
    if not weighed.draws or approx.params_of_model:
        return {}
    for start, is_off, moments in zip(agreement["start"].values.tolist(), off, of_starts):
        if is_off and (
            about := find_relabelled(approx, moments.estimates(), weighed.draws, weighed.log_weight_of_draws)
        ):
            found[start] = about
    return found


def _explained(agreement: "xr.Dataset", relabelled: Mapping[int, Relabelled]) -> np.ndarray:
    """Which differences an order of elements explains: of means of the latents, and of the share of the evidence."""
    found = np.zeros(agreement["differs"].shape, bool)
    evidence, quantities = is_evidence(agreement), agreement["quantity"].values
    for i, start in enumerate(agreement["start"].values.tolist()):
        if start not in relabelled:
            continue
        about = relabelled[start]
        found[i] = [name.partition("[")[0] in about.latents for name in quantities]
        of_start = agreement.isel(start=i)
        log_share, error = about.log_share
        rest = np.abs(of_start["difference"].values - log_share)
        found[i] |= evidence & (rest <= TOLERANCE + ERRORS * np.hypot(of_start["difference_std_error"].values, error))
    return found


def _lost_labels(approx: Approximation, weighed: Weighed) -> LostLabels | None:
    if not weighed.draws:
        return None
    return find_lost_labels(approx, weighed.moments.estimates(), weighed.draws, weighed.log_weight_of_draws)


def _verdict(facts: Facts) -> str:
    # The heavier the tail, the more the seen draws must hold: see `Posterior.diagnose`.
    k, share, scarce = facts.pareto_k, facts.ess / facts.num_draws, facts.ess < LEAST_ESS
    agreement = facts.agreement
    agreeing = 0.0 if agreement is None else share_that_agrees(agreement)
    all_off = agreement is not None and bool(agreement["differs"].any("quantity").all())
    heavy = k >= min(1 - 1 / np.log10(facts.num_draws), 0.7)
    few = share < (HEAVY_ESS if heavy or scarce else LEAST_SHARE if all_off else 0)
    if facts.past or facts.contradictions[0] or few:
        return "bad"
    needed = HEAVY_ESS if k >= HEAVY_TAIL else LOW_ESS
    agree = agreeing >= (1 if heavy else MOST)
    return "good" if agree and share >= needed and not scarce and not find_doubts(facts) else "usable"
