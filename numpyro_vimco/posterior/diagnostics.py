# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Can a fit be trusted?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING, Any

from jaxtyping import Array
import numpy as np
from numpyro.infer import SVI

from numpyro_vimco.arguments import check_integer, check_key
from numpyro_vimco.posterior.advice import (
    HEAVY_ESS,
    HEAVY_TAIL,
    LEAST_ESS,
    LEAST_SHARE,
    LOW_ESS,
    about_lost_humps,
    advise,
    find_doubts,
)
from numpyro_vimco.posterior.agreement import compare, contradictions, share_that_agrees
from numpyro_vimco.posterior.exchange import find_lost_order
from numpyro_vimco.posterior.fitted import Fitted, Result
from numpyro_vimco.posterior.past import earlier_bounds
from numpyro_vimco.posterior.proposals import check_has_density
from numpyro_vimco.posterior.recovery import LOST
from numpyro_vimco.posterior.results import FitResult
from numpyro_vimco.posterior.weighing import moments_of_starts, weigh
from numpyro_vimco.randomness import split

if TYPE_CHECKING:
    import xarray as xr

# So many of the starts agree where a fit is "good": three of four. Set by benchmarks/agreement.py.
MOST = 0.75
WIDTH = 88  # columns of what is printed: those of a notebook, and of the pages


@dataclass(frozen=True)
class ImportanceDiagnostics:
    """How well the guide's draws, with their importance weights, stand for the posterior. Printed, it explains itself.

    Where plates are common to all sites, each of their elements has weights of its own: ``ess`` and ``pareto_k`` are
    arrays of the shape of these plates, and the evidence is a sum over elements. Else they are numbers.

    :ivar log_evidence: estimate of log p(x) in nats: the logarithm of the mean weight.
    :ivar log_evidence_std_error: its standard error in nats, by the delta method.
    :ivar bounds: the importance-weighted bound (α = 0) of the defended draws in nats, by number of particles N, each a
        mean over the draws in groups of N. At N = 1 defensive draws make it low.
    :ivar ess: effective sample size, 1 / Σ W², of the normalized weights as they are.
    :ivar pareto_k: shape of the weights' tail, as in ArviZ; -inf where the tail is tied, or where what lies above its
        beginning is less than 0.1 / √draws of the weight, so that it can do no harm
        (``weights.smooth_tail``).
    :ivar reading: of the worst element.

        - ``"bad"``: a proof of a loss; a start with more evidence than the pool, for certain; an ESS of less than a
          quarter of the draws where it is below 100, or where k is min(1 - 1 / log10(draws), 0.7) or more (Vehtari et
          al. 2024); or an ESS of less than 3% of the draws where each start is off.
        - ``"good"``, if not bad, and the ESS is 100 or more: there are two starts or more, three quarters of them
          agree, the others are stuck in less than a hundredth of the evidence, and the ESS is a tenth of the draws or
          more. From a k of 0.5 on the ESS is a quarter of the draws, and from 0.7 on all starts agree. The standard
          error of the log evidence is at most 0.1 nats. Every latent is defended, and the guides propose four fifths of
          what the defended draws found. The pool has no more evidence than each start, beyond errors. And no two
          elements of a plate or of an event were found that the posterior has in both orders, and the draws in one
          (``posterior/exchange`` says what is tried).
        - ``"usable"``: neither of these. It is the best reading for a single fit, or for starts that disagree.

    :ivar advice: what to make of it, or what to do.
    :ivar num_samples: number of draws.
    :ivar heaviest: shares of the total weight that the heaviest draws hold, from the largest, of the element with the
        largest k: of all draws where weights are joint, else of the 3 √draws heaviest.
    :ivar log_weight: log-weights, of shape ``(num_samples,)``, in nats, where they are joint. None where each element
        has its own: these are not kept.
    :ivar agreement: of a result of ``fit``, else None: each start against the pooled draws, by dimensions ``start``
        and ``quantity`` (``log evidence``, by element where each has its own, and the mean of each latent).

        - ``estimate`` and ``std_error`` of each start, ``pooled`` and ``pooled_std_error``;
        - ``difference`` from the pool and ``difference_std_error``, in ``unit``: 1 nat, or the posterior standard
          deviation; ``differs``: by more than 0.1 and four standard errors;
        - by start: ``log_evidence`` and ``log_evidence_std_error`` in nats, ``ess``, and ``earlier_bound`` with
          ``earlier_bound_std_error`` in nats, where it proves a loss, else NaN.
    """

    log_evidence: float
    log_evidence_std_error: float
    bounds: dict[int, float]
    ess: float | np.ndarray
    pareto_k: float | np.ndarray
    reading: str
    advice: str
    num_samples: int
    heaviest: np.ndarray = field(repr=False)
    log_weight: np.ndarray | None = field(repr=False)
    agreement: "xr.Dataset | None" = field(repr=False)

    def __str__(self) -> str:
        size, k = np.size(self.pareto_k), np.max(self.pareto_k)
        worst = f" (worst of {size} elements)" if np.ndim(self.pareto_k) else ""
        no_tail = " (no tail of weights that could do harm)" if np.isneginf(k) else ""
        rows = {
            "log evidence": f"{self.log_evidence:.3f} ± {self.log_evidence_std_error:.3f} nats",
            "bounds": ", ".join(f"{bound:.3f}\xa0(N\xa0=\xa0{n})" for n, bound in self.bounds.items() if n > 1),
            "ESS": f"{np.min(self.ess):,.1f} of {self.num_samples:,} draws{worst}",
            "Pareto k": f"{k:.2f}{worst}{no_tail}",
            "starts": self._starts(),
            "reading": self.reading,
        }
        lines = [fill(f"{name:14}{text}", WIDTH, subsequent_indent=" " * 14) for name, text in rows.items()]
        return "\n".join([*lines, fill(self.advice, WIDTH)]).replace("\xa0", " ")

    def _starts(self) -> str:
        """How far the starts are from each other."""
        if self.agreement is None or self.agreement.sizes["start"] == 1:
            return "1"
        evidence = self.agreement["log_evidence"].values
        off = int(self.agreement["differs"].any("quantity").sum())
        apart = f"{off} off" if off else "which agree"
        return f"{len(evidence)}, {apart}; log evidence of each {evidence.min():.3f} to {evidence.max():.3f} nats"


def importance_diagnostics(
    svi: SVI,
    svi_result: Result,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_samples: int = 10_000,
    progress_bar: bool = True,
) -> ImportanceDiagnostics:
    """
    Draw from the fitted guide, and see what its importance weights say.

    **Defended draws.** One tenth of the draws takes a latent, one of its elements, or all latents from the model in
    place of the guide, and all have the density of that mixture (``posterior/defence``). So a part of the posterior
    that the guides have lost in one latent is found. What is not found is a part that differs from all draws in several
    latents, or several elements, at once, by more than the prior can guess.

    **Several starts.** Given a result of ``fit``, the draws are pooled, as :func:`~numpyro_vimco.to_arviz` does
    it: from the guides of all starts, with the density of their mixture. Beside them each start
    is estimated from ``num_samples`` draws of its own guide, and held against the pool (``agreement``). And a bound
    that a start reached earlier, at power 1, which lies above the log evidence of the pool proves that a part of the
    posterior was lost, since no bound can be above it; that is looked for where the objective is known to be a bound
    and the model has no parameters. A start that is stuck in less than a hundredth of the evidence hardly counts in the
    pool: one such start of four leaves the reading as it is. Not two: with two of four that agree, fits that are wrong
    were called "good" (``benchmarks/agreement.py``).

    **k.** From 0.5 on the variance of the weights is infinite, but up to 0.7 smoothed estimates converge nearly as fast
    (Vehtari et al. 2024): where starts agree, it is no reason for less than "good" if the ESS is a quarter of the draws
    (a limit found by ``benchmarks/agreement.py``). Above, k tells from the largest weights of one set of draws that
    *unseen* ones may be so large that they would move its estimates. Defended weights are bounded where one latent
    alone makes them large. So an ESS of a quarter of the draws counts for more than a tail that is
    extrapolated: it is "usable", and "good" if all starts agree.

    Draws are not kept: memory is that of ``3 √num_samples`` weights for each element of plates that are common to all
    sites, beside that of a few draws of the model; with several starts, that of a few sums for each element of each
    latent, by start.

    :param SVI svi: the inference object of the fit; with any objective.
    :param svi_result: what ``fit`` or ``svi.run`` returned, a state of ``svi.update``, or a dict of parameters.
    :param tuple model_args: the model's arguments, as in the fit; with all data, not a subsample.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_samples: number of draws, at least 100; of the pool, and of each start beside it. Defaults to
        10,000: a tail is fitted to them.
    :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to True.
    :raises ValueError: for parameters that do not fit the guide, arguments that do not fit the model, a subsampled
        plate, a model without latents, a continuous latent that is a Delta in the guide, data that are NaN, too few
        draws, or ``rng_key`` that is no key.
    :raises NotImplementedError: for starts whose draws cannot be pooled: a Delta site at a parameter.
    """
    check_key(rng_key)
    num_samples = check_integer("num_samples", num_samples, 100, "the tail of the weights is fitted to them")
    fit = Fitted.of(svi, svi_result, model_args, model_kwargs)
    check_has_density(fit)
    pool_key, start_key = split(rng_key)
    weighed = weigh(fit, pool_key, num_samples, "diagnostics" if progress_bar else None)
    summary = weighed.summary
    log_evidence, std_error = float(summary.log_evidence.sum()), float(np.sqrt(summary.variance.sum()))
    agreement, past, annealed, recovered = None, {}, False, False
    if isinstance(svi_result, FitResult):
        assert weighed.moments is not None
        starts = moments_of_starts(fit, start_key, num_samples, "starts" if progress_bar else None)
        indices = np.flatnonzero(~svi_result.failed).tolist()
        past = earlier_bounds(fit, svi_result, log_evidence, std_error)
        agreement = compare(fit, indices, weighed.moments, starts).assign(
            earlier_bound=("start", [past[i].bound if i in past else np.nan for i in indices]),
            earlier_bound_std_error=("start", [past[i].std_error if i in past else np.nan for i in indices]),
        )
        annealed, recovered = bool((svi_result.power < 1).any()), svi_result.recovered
    k, ess = float(summary.pareto_k.max()), float(summary.ess.min())
    agreeing = 0.0 if agreement is None else share_that_agrees(agreement)
    all_off = agreement is not None and bool(agreement["differs"].any("quantity").all())
    ahead, above_all = (False, False) if agreement is None else contradictions(agreement)
    doubts = find_doubts(weighed, std_error, ahead, above_all)
    humps = ""
    if agreement is not None and (weighed.lost > LOST or recovered):
        humps = about_lost_humps(fit, agreement, recovered)
    reading = _reading(k, ess, num_samples, agreeing, all_off, bool(past) or ahead, bool(doubts))
    lost_order = None
    if reading == "good" and weighed.draws:
        assert weighed.moments is not None and weighed.log_weight is not None
        kept = weighed.log_weight[: len(next(iter(weighed.draws.values())))]
        lost_order = find_lost_order(fit, weighed.moments.estimates(), weighed.draws, kept)
        reading = "usable" if lost_order else "good"
    if weighed.log_weight is None:
        heaviest = summary.heaviest
    else:
        relative = np.sort(np.exp(weighed.log_weight - weighed.log_weight.max()))[::-1]
        heaviest = relative / relative.sum()
    return ImportanceDiagnostics(
        log_evidence=log_evidence,
        log_evidence_std_error=std_error,
        bounds=summary.bounds,
        ess=summary.ess.reshape(weighed.shape)[()],
        pareto_k=summary.pareto_k.reshape(weighed.shape)[()],
        reading=reading,
        advice=advise(fit, weighed, reading, agreement, past, annealed, lost_order, doubts, humps),
        num_samples=num_samples,
        heaviest=heaviest,
        log_weight=weighed.log_weight,
        agreement=agreement,
    )


def _reading(
    k: float, ess: float, num_samples: int, agreeing: float, all_off: bool, wrong_for_certain: bool, doubtful: bool
) -> str:
    # The heavier the tail, the more the seen draws must hold: see `importance_diagnostics`.
    share, scarce = ess / num_samples, ess < LEAST_ESS
    heavy = k >= min(1 - 1 / np.log10(num_samples), 0.7)
    few = share < (HEAVY_ESS if heavy or scarce else LEAST_SHARE if all_off else 0)
    if wrong_for_certain or few:
        return "bad"
    needed = HEAVY_ESS if k >= HEAVY_TAIL else LOW_ESS
    agree = agreeing >= (1 if heavy else MOST)
    return "good" if agree and share >= needed and not scarce and not doubtful else "usable"
