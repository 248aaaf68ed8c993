# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What to do about a fit whose weights are not good: only what can help the model and the guide at hand."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from numpyro_vimco.guides.auto_mixed import AutoMixed
from numpyro_vimco.posterior.agreement import LEAST_ESS, differences, is_evidence, pooled_evidence
from numpyro_vimco.posterior.exchange import LostOrder
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.past import Stretch
from numpyro_vimco.posterior.proposals import can_have_particles
from numpyro_vimco.posterior.recovery import LOST
from numpyro_vimco.posterior.weighing import Weighed
from numpyro_vimco.sites import is_discrete, is_latent_site, sample_sites, states

if TYPE_CHECKING:
    import xarray as xr

# Where "good" ends: an effective sample size relative to the draws, and the same for weights of infinite variance, of
# a k of 0.5 or more. benchmarks/agreement.py sets the last two.
HEAVY_TAIL, LOW_ESS, HEAVY_ESS = 0.5, 0.1, 0.25
# "Bad" begins here where each start is off: then the pool alone is to be believed.
LEAST_SHARE = 0.03
# The largest standard error of a log evidence that is good, in nats.
MOST_ERROR = 0.1
FEW_STATES = 8  # of a site that can be summed out
# A correlation that the guide lacks is told from this size on: it lowers the ESS of a pair to √(1 - 0.3²) at most.
CORRELATED = 0.3
SECOND_START = (
    "Only a second start can show what a first one missed: `fit(svi, ...)` takes four, and they are compared here."
)


def advise(
    fit: Fitted,
    weighed: Weighed,
    reading: str,
    agreement: "xr.Dataset | None",
    past: Mapping[int, Stretch],
    annealed: bool,
    lost_order: LostOrder | None,
    doubts: list[str],
    humps: str,
) -> str:
    """What to make of the weights, or what to do.

    :param agreement: of several starts; None for a single fit.
    :param past: starts that lost something for certain.
    :param annealed: whether the fit was.
    :param lost_order: of two elements.
    :param doubts: of :func:`find_doubts`.
    :param humps: of :func:`about_lost_humps`.
    """
    if lost_order:
        return _of_order(lost_order)
    if reading == "good":
        assert agreement is not None
        return _trusted(agreement)
    summary = weighed.summary
    parts = [*doubts, humps] if humps else list(doubts)
    if past:
        start, stretch = next(iter(past.items()))
        parts.append(
            f"A part of the posterior is lost: in steps {stretch.begin:,} to {stretch.end - 1:,} of start {start} the "
            f"bound was {stretch.bound:.2f} ± {stretch.std_error:.2f} nats, and no bound can be above the log evidence."
        )
    disagree = False
    if agreement is not None and agreement["differs"].any():
        disagree = True
        parts.append(f"The starts disagree: {differences(agreement)}.")
        if reading == "usable":
            parts.append("The pooled draws have what any of them found.")
    few = summary.ess.min() / len(weighed.continuous) < LOW_ESS
    heavy = summary.pareto_k.max() >= HEAVY_TAIL
    plate = _joint_plate(fit) if reading == "bad" or disagree or few or heavy else None
    if (past or disagree) and not humps:
        impossible = agreement is not None and bool(np.isneginf(agreement["log_evidence"]).any())
        parts.append(f"What helps, in this order: {_remedies(fit, annealed, plate, impossible)}.")
    if past:
        return " ".join(parts)
    if reading == "usable" and summary.ess.min() < LEAST_ESS:
        parts.append("So few draws tell little: take 10,000 (`num_samples`).")
        return " ".join(parts)
    if reading == "usable":
        if not (few or heavy):
            parts += [] if disagree else ["The weights are good."]
            return " ".join(parts if disagree else [*parts, SECOND_START])
        if few:
            parts.append(
                "Few draws hold most of the weight: the guide spends the others where the posterior has little."
            )
        if heavy:
            parts.append(
                "The weights have a heavy tail: the guide proposes a part of the posterior too rarely, and one such "
                "draw can move an estimate by more than its standard error."
            )
        parts.append("Compare with a second key and more draws.")
        if agreement is None or agreement.sizes["start"] == 1:
            parts.append(SECOND_START)
    if plate:
        parts.append(
            f"One weight is a product over all elements of the plate '{plate}', and hardly a draw holds all of it"
            + ("." if disagree else f": {_for_plate(fit, plate)}.")
        )
        return " ".join(parts)
    pair = _missing_correlation(weighed)
    if pair:
        parts.append(
            f"The guide lacks a correlation of continuous latents ('{pair[0]}' and '{pair[1]}'): {pair[2]:.2f} under "
            f"the weighted draws, {pair[3]:.2f} in the guide. {_correlated_guide(fit)}"
        )
    elif reading == "bad":
        parts.append(
            "The guide misses a part of the posterior, so that estimates may be far off: train for longer or with more "
            f"particles, or use a richer guide ({_richer_guide(fit)})."
        )
    else:
        parts.append("docs/checking_a_fit.md says what makes a guide better.")
    return " ".join(parts)


def find_doubts(weighed: Weighed, std_error: float, ahead: bool, above_all: bool) -> list[str]:
    """What speaks against "good", whatever starts and weights say: sentences.

    :param std_error: of the log evidence, in nats.
    :param ahead: whether a start has more evidence than the pool, for certain.
    :param above_all: whether the pool has more than each start, for certain.
    """
    found = []
    if ahead:
        found.append(
            "A start has more evidence than the pooled draws, by more than their errors explain: the pooled draws lack "
            "what it found, and the weights do not show it."
        )
    if above_all:
        found.append(
            "The pooled draws have more evidence than each start, by more than their errors explain: all guides lack a "
            "part of the posterior, which defensive draws found, or draw otherwise than by the density that they state."
        )
    if weighed.lost > LOST:
        found.append(
            f"Defensive draws hold {weighed.lost:.0%} of the posterior, which the guides do not propose. The pooled "
            "draws have it."
        )
    if weighed.undefended:
        names = ", ".join(map(repr, weighed.undefended))
        found.append(
            f"No draw takes {names} from the model alone (an improper prior, a point mass, a site in `scan`, or one "
            "whose prior depends on a summed site), so that nothing can show what the guide has lost there."
        )
    if std_error > MOST_ERROR:
        found.append(f"The log evidence has a standard error of {std_error:.2f} nats: take more draws (`num_samples`).")
    return found


def about_lost_humps(fit: Fitted, agreement: "xr.Dataset", recovered: bool) -> str:
    """Which latent has a part that guides cannot hold with the rest, and a guide that can; empty if none differs.

    :param recovered: whether starts were replaced by recovered ones.
    """
    latents = agreement.isel(quantity=~is_evidence(agreement))
    amount = np.where(latents["differs"], np.abs(latents["difference"]), 0).max(0, initial=0)
    if not amount.any():
        return ""
    quantity = str(latents["quantity"].values[int(np.argmax(amount))])
    name = quantity.partition("[")[0]
    if name not in fit.latents() or len(states(fit.model_trace[name]["fn"])):
        return ""
    found = (
        "All starts had lost a part of the posterior. Some were recovered, and have what others lack. "
        if recovered
        else ""
    )
    return (
        f"{found}The guide of '{quantity}' holds one hump, and the posterior may have several. A guide that can hold "
        f"them: `AutoMixed(model, num_components={{'{name}': 2}})`."
    )


def _trusted(agreement: "xr.Dataset") -> str:
    """What "good" means; starts that are stuck are named."""
    off = agreement["differs"].any("quantity").values
    number = f"{(~off).sum()} of {len(off)}" if off.any() else f"{len(off)}"
    parts = [
        f"{number} starts agree, and the weights of defended draws are good: importance-weighted estimates can be "
        "trusted, unless a part of the posterior was lost that differs from all draws in several latents at once."
    ]
    pooled = pooled_evidence(agreement)
    for start, evidence in zip(agreement["start"].values[off], agreement["log_evidence"].values[off]):
        parts.append(f"Start {start} is stuck: its evidence is {pooled - evidence:.2f} nats lower.")
    return " ".join(parts)


def _of_order(lost: LostOrder) -> str:
    """What it means that draws lack an order of two elements, and what to do."""
    first, second = lost.pair
    together = ", ".join(f"'{name}'" for name in lost.names)
    return (
        f"The posterior has elements {first} and {second} in both orders, as they can change places (in {together}), "
        f"but the draws lack one, by '{lost.latent}'. The log evidence is too low by {lost.lost:.2f} nats at least, "
        "and what depends on the order is mostly of the other. For the rest starts agree, and the weights are good. "
        "Say in the model which element is which, by a prior or an ordered vector, or take more starts."
    )


def _for_plate(fit: Fitted, plate: str) -> str:
    """What helps where the elements of a plate share a weight: to sum out its latents of few states, or particles."""
    few = [
        f"'{name}' has {number}"
        for name, site in fit.latents(plate).items()
        if 0 < (number := len(states(site["fn"]))) <= FEW_STATES
    ]
    particles = f"give its elements particles of their own, VIMCOStar(plate_particles={{'{plate}': 8}})"
    if not few:
        return particles
    return f"sum out sites of few states ({', '.join(few)}), by infer={{'enumerate': 'parallel'}}, or {particles}"


def _remedies(fit: Fitted, annealed: bool, plate: str | None, impossible: bool) -> str:
    """What helps starts to agree, as far as it is not there yet, in the order of docs/checking_a_fit.md.

    :param impossible: whether all draws of a start are ruled out by the data.
    """
    found = ["a guide that begins where the data are possible (`init_loc_fn`)"] if impossible else []
    found += [_for_plate(fit, plate)] if plate else []
    if _has(fit, discrete=True) and _richer_guide(fit) != "one by hand":
        found.append('a structured guide (`AutoMixed(model, structure="autoregressive")`)')
    found.append("a smaller learning rate")
    if not 0 < getattr(fit.svi.loss, "alpha", 0) < 1:
        found.append("0 < α < 1 (`VIMCOStar(0.5)`)")
    if not annealed:
        found.append("annealing (`anneal=0.5`)")
    return ", ".join([*found, "more steps"])


def _has(fit: Fitted, discrete: bool) -> bool:
    return any(is_discrete(site) == discrete for site in fit.latents().values())


def _correlated_guide(fit: Fitted) -> str:
    """A sentence on what has the correlation that the guide lacks."""
    if not _has(fit, discrete=True):
        return "AutoMultivariateNormal(model) has it."
    if isinstance(fit.svi.guide, AutoMixed) and fit.svi.guide.structure == "autoregressive":
        return "Its couplings can learn it, with more steps or a larger `coupling_speed`."
    return "AutoMixed(model, continuous=AutoMultivariateNormal) has it."


def _richer_guide(fit: Fitted) -> str:
    if not _has(fit, discrete=True):
        return "AutoMultivariateNormal(model), a flow, or one by hand"
    if isinstance(fit.svi.guide, AutoMixed) and getattr(fit.svi.guide, "structure", None) == "autoregressive":
        return "one by hand"
    return 'AutoMixed(model, structure="autoregressive"), or one by hand'


def _missing_correlation(weighed: Weighed) -> tuple[str, str, float, float] | None:
    """Two continuous latents whose correlation the guide lacks most: their names, and correlations without and with it.

    The guide's are those of its draws, the posterior's those of its weighted draws, if these are enough to tell.
    """
    values = weighed.continuous
    if values.shape[1] < 2 or weighed.log_weight is None or weighed.guide_share is None:
        return None
    weight = np.exp(weighed.log_weight - weighed.log_weight.max())
    posterior = _correlation(values, weight / weight.sum())
    guide = _correlation(values, weighed.guide_share / weighed.guide_share.sum())
    difference = np.abs(np.triu(posterior - guide, 1))
    # Four standard errors of a correlation of as many draws.
    if difference.max() < max(CORRELATED, 4 / weighed.summary.ess[0] ** 0.5):
        return None
    i, j = np.unravel_index(np.argmax(difference), difference.shape)
    return weighed.coordinates[i], weighed.coordinates[j], posterior[i, j], guide[i, j]


def _correlation(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    centred = values - weight @ values
    covariance = (centred * weight[:, None]).T @ centred
    scale = np.sqrt(np.maximum(np.diag(covariance), np.finfo(float).tiny))
    return covariance / scale / scale[:, None]


def _joint_plate(fit: Fitted) -> str | None:
    """A plate with latents of its own beside others, whose elements share a weight."""
    sites = sample_sites(fit.model_trace)
    for site in filter(is_latent_site, sites):
        names = [frame.name for frame in site["cond_indep_stack"]]
        if any(name in fit.plate_particles for name in names):
            continue
        for frame in sorted(site["cond_indep_stack"], key=lambda frame: frame.dim):
            common = all(frame in other["cond_indep_stack"] for other in sites)
            if frame.size > 1 and not common and can_have_particles(fit, {**fit.plate_particles, frame.name: 2}):
                return frame.name
    return None
