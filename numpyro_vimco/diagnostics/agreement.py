# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Do several starts agree?

Each start is held against the pooled draws: its log evidence, and its weighted mean of every latent in units of the
posterior standard deviation, each estimated from draws of its own guide with their own weights. A start that lost a
part of the posterior has an evidence that is too low, and means that are off; the pool has what any of them found. The
draws are others than the pool's, so that Monte Carlo errors are independent, and add up.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.moments import Moments
from numpyro_vimco.draws.observed import imputed_name
from numpyro_vimco.sites import element_names

if TYPE_CHECKING:
    import xarray as xr

# A start differs where it is off by more than this, in nats or posterior standard deviations, and four standard errors:
# one quantity in 16,000 is off by four by chance alone, and the tolerance makes that rarer where errors are small.
TOLERANCE, ERRORS = 0.1, 4.0
# A start that differs is stuck where it has less than a hundredth of the evidence: its draws count next to nothing.
STUCK = float(np.log(100))
# A start's evidence is sure from so many effective draws on. The pool is above all starts where it is by more than so
# many standard errors and so many nats above the best of them.
LEAST_ESS, CERTAIN, ROUNDING = 100, 5.0, 0.02
# So many starts are named, with what differs most in each.
NAMED = 3
# The name of the quantity that is in nats.
EVIDENCE = "log evidence"


def compare(approx: Approximation, indices: list[int], pooled: Moments, starts: Sequence[Moments]) -> "xr.Dataset":
    """The table of `Diagnostics.agreement`, without bounds of the past.

    :param indices: of the starts.
    """
    import xarray as xr  # it takes a second, and only those who look at starts need it

    evidence_only = bool(approx.params_of_model)  # each start has another posterior
    names = _names(approx, pooled, evidence_only)
    pool_mean, pool_error, pool_std = _quantities(pooled, evidence_only)
    unit = np.where(pool_std > 0, pool_std, 1.0)
    mean, error, _ = (np.stack(arrays) for arrays in zip(*(_quantities(each, evidence_only) for each in starts)))
    with np.errstate(invalid="ignore"):  # -inf of a start whose draws all have the weight zero
        difference = (mean - pool_mean) / unit
        difference_error = np.hypot(error, pool_error) / unit
        differs = np.abs(difference) > TOLERANCE + ERRORS * np.nan_to_num(difference_error)
    evidence, evidence_error = zip(*(start.log_evidence() for start in starts))
    by_start, by_both = ("start",), ("start", "quantity")
    return xr.Dataset(
        {
            "estimate": (by_both, mean),
            "std_error": (by_both, error),
            "pooled": (("quantity",), pool_mean),
            "pooled_std_error": (("quantity",), pool_error),
            "unit": (("quantity",), unit),
            "difference": (by_both, difference),
            "difference_std_error": (by_both, difference_error),
            "differs": (by_both, differs),
            "log_evidence": (by_start, np.sum(evidence, axis=1)),
            "log_evidence_std_error": (by_start, np.sqrt(np.sum(np.square(evidence_error), axis=1))),
            "ess": (by_start, [start.ess().min() for start in starts]),
        },
        coords={"start": indices, "quantity": names},
    )


def _quantities(moments: Moments, evidence_only: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates, standard errors and units: of the log evidence of each element, then of all latents."""
    evidence, error = moments.log_evidence()
    parts = [(evidence, error, np.ones_like(evidence)), *({} if evidence_only else moments.estimates()).values()]
    mean, error, unit = (np.concatenate([np.ravel(array) for array in arrays]) for arrays in zip(*parts))
    return mean, error, unit


def _names(approx: Approximation, moments: Moments, evidence_only: bool) -> list[str]:
    elements = len(moments.log_evidence()[0])
    names = element_names(EVIDENCE, () if elements == 1 else (elements,))
    for site, estimate in ({} if evidence_only else moments.estimates()).items():
        name = imputed_name(site, approx.model_trace) or site
        names += element_names(name, estimate.mean.shape)
    return names


def is_evidence(agreement: "xr.Dataset") -> np.ndarray:
    """Whether each quantity is a log evidence, not a latent."""
    return np.array([name.startswith(EVIDENCE) for name in agreement["quantity"].values])


def pooled_evidence(agreement: "xr.Dataset") -> float:
    """The log evidence of the pool, of all elements, in nats."""
    return float(agreement["pooled"].values[is_evidence(agreement)].sum())


def share_that_agrees(agreement: "xr.Dataset") -> float:
    """The share of starts that agree with the pool: 0 if these are less than two, or if another is not stuck."""
    off = agreement["differs"].any("quantity").values
    evidence, error = (agreement[name].values[off] for name in ("log_evidence", "log_evidence_std_error"))
    stuck = evidence + ERRORS * np.nan_to_num(error) < pooled_evidence(agreement) - STUCK
    return float(np.mean(~off)) if np.sum(~off) > 1 and stuck.all() else 0.0


def contradictions(agreement: "xr.Dataset", log_shares: Mapping[int, tuple[float, float]]) -> tuple[bool, bool]:
    """Whether a start has more evidence than the pool, and whether the pool has more than each start, for certain.

    The pool proposes what each start does, and its estimates are as good. So where a start has more, the pool's error
    is not what it seems. Where the pool has more than each start, either all starts lack what the defence found, or
    the densities of the pool's draws are wrong.

    :param log_shares: by start, the logarithm of the share of the posterior that it can have, and its standard error,
        where that is not all of it.
    """
    pool = pooled_evidence(agreement)
    pool_error = float(np.hypot.reduce(agreement["pooled_std_error"].values[is_evidence(agreement)]))
    share, share_error = np.array([log_shares.get(i, (0.0, 0.0)) for i in agreement["start"].values.tolist()]).T
    evidence = agreement["log_evidence"].values - share
    error = np.hypot(agreement["log_evidence_std_error"].values, share_error)
    sure = (agreement["ess"].values >= LEAST_ESS) & np.isfinite(evidence)
    if not sure.any():
        return False, False
    excess, noise = (evidence - pool)[sure], np.hypot(error, pool_error)[sure]
    ahead = bool((excess > TOLERANCE + ERRORS * noise).any())
    best = int(np.argmax(excess))
    return ahead, bool(-excess[best] > ROUNDING + CERTAIN * noise[best])


def differences(agreement: "xr.Dataset") -> str:
    """What differs, and by how much: of each start its evidence, and the latent that is farthest off."""
    sentences = []
    evidence = is_evidence(agreement)
    amount = np.where(agreement["differs"], np.abs(agreement["difference"]), 0)
    worst_first = np.argsort(-amount.max(1), kind="stable")
    named = [i for i in worst_first if amount[i].any()]
    for i in named[:NAMED]:
        parts = []
        for kind, unit in ((evidence, "nats"), (~evidence, "posterior standard deviations")):
            of_kind = np.where(kind, amount[i], 0)
            if of_kind.any():
                found = agreement.isel(start=i, quantity=int(np.argmax(of_kind)))
                by, error = float(found["difference"]), float(found["difference_std_error"])
                off_by = f"{by:.2f} ± {error:.2f}" if np.isfinite(by) else f"{by}"
                if unit != "nats" and abs(by) > 100:  # a pool of nearly one value has next to no deviation
                    off_by = "more than 100" if by > 0 else "less than -100"
                parts.append(f"'{found['quantity'].item()}' by {off_by} {unit}")
        sentences.append(f"start {agreement['start'].values[i]} is off in {' and '.join(parts)}")
    if len(named) > NAMED:
        sentences.append(f"and {len(named) - NAMED} more")
    return "; ".join(sentences)
