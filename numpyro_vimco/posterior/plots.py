# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a :class:`~numpyro_vimco.Posterior`, in Matplotlib. Each takes an axes and returns it.

Lines differ in style as well as in colour. Pictures of the latents are ArviZ's.

Example, of a posterior of :func:`~numpyro_vimco.fit`::

    plots.plot_bound(posterior)
    plots.plot_agreement(posterior)
"""

from typing import TYPE_CHECKING

import numpy as np

from numpyro_vimco.diagnostics.agreement import TOLERANCE, is_evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from numpyro_vimco.posterior.posterior import Posterior

STYLES = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--")]


def plot_bound(
    posterior: "Posterior", *, log_evidence: float | None = None, window: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    """
    The bound over the steps of a fit, as a running mean for each start; of a single fit, with each estimate.

    Steps at an inverse temperature below 1 are left out, as they have another target.

    :param Posterior posterior: with known losses, of ``fit`` or of a result of ``svi.run``.
    :param float log_evidence: drawn as a line, if given: ``posterior.log_evidence``, or the truth.
    :param int window: number of steps that the running mean is over. Defaults to 2% of them.
    :param Axes ax: where to draw; a new figure by default.
    :raises ValueError: for a posterior without losses.
    """
    starts = posterior.starts
    steps, several = starts.losses.shape[1], len(starts) > 1
    if not steps:
        raise ValueError("This posterior was made from a state or from parameters, and its losses are not known.")
    ax = _axes(ax)
    bound = -np.where(starts.inverse_temperature == 1, np.asarray(starts.losses, float), np.nan)
    shown = bound[np.isfinite(bound)]
    window = min(max(steps // 50, 1) if window is None else window, steps)
    for i, of_start in enumerate(bound):
        smooth = np.convolve(of_start, np.ones(window) / window, "valid")
        label = f"start {i}, mean of {window} steps" if several else f"mean of {window} steps"
        if not several:
            ax.plot(of_start, color="0.75", lw=0.5, label="estimates")
        style = STYLES[i % len(STYLES)][1]
        ax.plot(np.arange(len(smooth)) + window // 2, smooth, style, color=f"C{i}", lw=1.8, label=label)
    if log_evidence is not None:
        ax.axhline(log_evidence, color="black", ls="--", lw=1.2, label="log evidence")
    # The first steps of a fit are often far off: show what came after a tenth of it, and where it ended.
    if len(shown):
        top = max(np.quantile(shown, 0.999), log_evidence if log_evidence is not None else -np.inf)
        last = bound[:, steps // 10 :]
        last = last[np.isfinite(last)]
        bottom = np.quantile(last if len(last) else shown, 0.01)
        margin = 0.1 * (top - bottom) + 1e-3
        ax.set_ylim(bottom - margin, top + margin)
    not_finite = ~np.isfinite(starts.losses) & (starts.inverse_temperature == 1)
    if not several and not_finite.any():
        ax.set_title(f"{not_finite.sum():,} estimates are not finite")
    ax.set(xlabel="step", ylabel="bound (nats)")
    ax.legend(loc="lower right")
    return ax


def plot_bound_by_particles(posterior: "Posterior", *, ax: "Axes | None" = None) -> "Axes":
    """
    The importance-weighted bound of the fitted guide against the number of particles N, from the ELBO (N = 1) upwards.

    It rises to the log evidence: at once for a guide that is the posterior, slowly for one that proposes it rarely.

    :param Posterior posterior: it is diagnosed, if it was not.
    :param Axes ax: where to draw; a new figure by default.
    """
    ax, found = _axes(ax), posterior.diagnostics
    evidence, error = found.log_evidence, 2 * found.log_evidence_std_error
    known = np.isfinite(error)
    label = "log evidence ± 2 standard errors" if known else "log evidence or more"
    numbers = list(found.bounds)
    ax.plot(numbers, list(found.bounds.values()), "o-", color="C0", lw=1.8, label="bound")
    ax.axhline(evidence, color="black", ls="--", lw=1.2, label=label)
    if known:
        ax.axhspan(evidence - error, evidence + error, color="black", alpha=0.15, lw=0)
    ax.set(xscale="log", xlabel="number of particles N", ylabel="bound (nats)")
    ax.set_xticks(numbers, [str(n) for n in numbers], minor=False)
    ax.minorticks_off()
    ax.legend(loc="lower right")
    return ax


def plot_weights(posterior: "Posterior", *, ax: "Axes | None" = None) -> "Axes":
    """
    The sum of the normalized weights of the heaviest draws, against how many they are.

    With equal weights this is the dotted line; a curve that is high at its left end says that few draws decide.

    :param Posterior posterior: it is diagnosed, if it was not. Where weights are per element, the element with the
        largest k is shown, as far as its heaviest draws.
    :param Axes ax: where to draw; a new figure by default.
    """
    ax, found = _axes(ax), posterior.diagnostics
    rank = np.arange(1, len(found.heaviest) + 1)
    equal = np.arange(1, found.num_draws + 1)
    worst = np.argmax(found.pareto_k)
    ess, k = np.ravel(found.ess)[worst], np.ravel(found.pareto_k)[worst]
    ax.plot(rank, np.cumsum(found.heaviest), color="C0", lw=1.8, label="weights of the draws")
    ax.plot(equal, equal / len(equal), color="black", ls=":", lw=1.2, label="equal weights")
    ax.axvline(ess, color="C3", ls="--", lw=1.2, label=f"ESS {ess:,.0f} of {len(equal):,}")
    ax.set(xscale="log", xlabel="number of heaviest draws", ylabel="sum of normalized weights", ylim=(0, 1.05))
    ax.set_title(f"Pareto k {k:.2f} ({found.verdict})")
    ax.legend(loc="upper left")
    return ax


def plot_agreement(posterior: "Posterior", *, num_latents: int = 10, ax: "Axes | None" = None) -> "Axes":
    """
    Each start against the pooled draws: its log evidence, and its means of the latents that differ most.

    Bars are two standard errors. Starts that agree have all their marks near zero, most of them within their bars.

    :param Posterior posterior: of several starts; it is diagnosed, if it was not.
    :param int num_latents: number of latents. Defaults to 10.
    :param Axes ax: where to draw; a new figure by default.
    :raises ValueError: for a single fit.
    """
    agreement = posterior.diagnostics.agreement
    if agreement is None:
        raise ValueError(
            "This is the posterior of a single fit, and a picture of agreement needs several starts: `fit(svi, ...)` "
            "takes four."
        )
    ax = _axes(ax)
    largest = abs(agreement["difference"]).max("start").fillna(0).values
    evidence = is_evidence(agreement)
    rows = [np.flatnonzero(evidence)[np.argmax(largest[evidence])]]
    latents = np.flatnonzero(~evidence)
    rows += list(latents[np.argsort(-largest[latents], kind="stable")[:num_latents]])
    shown = agreement.isel(quantity=rows)
    position = np.arange(len(rows))
    for i, (start, (marker, _)) in enumerate(zip(shown["start"].values, STYLES * agreement.sizes["start"])):
        offset = 0.5 * ((i + 0.5) / agreement.sizes["start"] - 0.5)
        of_start = shown.sel(start=start)
        ax.errorbar(
            of_start["difference"],
            position + offset,
            xerr=2 * of_start["difference_std_error"],
            fmt=marker,
            color=f"C{i}",
            label=f"start {start}",
        )
    ax.axvline(0, color="black", lw=1)
    ax.axvspan(-TOLERANCE, TOLERANCE, color="0.9", zorder=0)
    ax.set_yticks(position, shown["quantity"].values)
    ax.invert_yaxis()
    low, high = ax.get_xlim()
    ax.set(xlim=(min(low, -3 * TOLERANCE), max(high, 3 * TOLERANCE)), xlabel="off the pool by (nats; posterior SD)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]
