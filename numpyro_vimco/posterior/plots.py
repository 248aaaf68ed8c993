# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a fit, in Matplotlib. Each takes an axes and returns it; lines differ in style as well as in colour.

Pictures of the posterior are ArviZ's.
"""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from numpyro_vimco.posterior.diagnostics import ImportanceDiagnostics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--")]


def plot_bound(
    losses, *, log_evidence: float | None = None, window: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    """
    The bound over the steps of a fit: each estimate, and a running mean.

    :param losses: ``svi_result.losses``, in nats.
    :param float log_evidence: drawn as a line, if given: ``importance_diagnostics(...).log_evidence``, or the truth.
    :param int window: number of steps that the running mean is over. Defaults to 2% of them.
    :param Axes ax: where to draw; a new figure by default.
    """
    ax = _axes(ax)
    bound = -np.asarray(losses, float)
    finite = bound[np.isfinite(bound)]
    window = min(max(len(bound) // 50, 1) if window is None else window, len(bound))
    smooth = np.convolve(bound, np.ones(window) / window, "valid")
    ax.plot(bound, color="0.75", lw=0.5, label="estimates")
    ax.plot(np.arange(len(smooth)) + window // 2, smooth, color="C0", lw=1.8, label=f"mean of {window} steps")
    if log_evidence is not None:
        ax.axhline(log_evidence, color="black", ls="--", lw=1.2, label="log evidence")
    # The first steps of a fit are often far off: show what came after a tenth of it, and where it ended.
    if len(finite):
        top = max(np.quantile(finite, 0.999), log_evidence if log_evidence is not None else -np.inf)
        bottom = np.quantile(finite[len(finite) // 10 :], 0.01)
        margin = 0.1 * (top - bottom) + 1e-3
        ax.set_ylim(bottom - margin, top + margin)
    if len(finite) < len(bound):
        ax.set_title(f"{len(bound) - len(finite):,} estimates are not finite")
    ax.set(xlabel="step", ylabel="bound (nats)")
    ax.legend(loc="lower right")
    return ax


def plot_gradient_snr(dataset: xr.Dataset, *, ax: "Axes | None" = None) -> "Axes":
    """
    Signal-to-noise ratio against the number of particles, one line for each objective, on logarithmic axes.

    :param Dataset dataset: of :func:`~numpyro_vimco.compare_objectives`. Shown is the median over parameters.
    :param Axes ax: where to draw; a new figure by default.
    """
    ax = _axes(ax)
    median = dataset["snr"].median("parameter")
    for (marker, line), name in zip(STYLES * len(median.objective), median.objective.values):
        ax.plot(median.num_particles, median.sel(objective=name), marker=marker, ls=line, label=str(name))
    ax.set(xscale="log", yscale="log", xlabel="number of particles N", ylabel="gradient SNR (median over parameters)")
    ax.set_xticks(median.num_particles.values, [str(n) for n in median.num_particles.values], minor=False)
    ax.minorticks_off()
    ax.legend()
    return ax


def plot_weights(diagnostics: ImportanceDiagnostics, *, ax: "Axes | None" = None) -> "Axes":
    """
    The share of the total weight that the heaviest draws hold, against how many they are.

    With equal weights this is the dotted line; a curve that is high at its left end says that few draws decide.

    :param ImportanceDiagnostics diagnostics: of :func:`~numpyro_vimco.importance_diagnostics`. Where weights are
        per element, the element with the largest k is shown, as far as its heaviest draws.
    :param Axes ax: where to draw; a new figure by default.
    """
    ax = _axes(ax)
    rank = np.arange(1, len(diagnostics.heaviest) + 1)
    equal = np.arange(1, diagnostics.num_samples + 1)
    worst = np.argmax(diagnostics.pareto_k)
    ess, k = np.ravel(diagnostics.ess)[worst], np.ravel(diagnostics.pareto_k)[worst]
    ax.plot(rank, np.cumsum(diagnostics.heaviest), color="C0", lw=1.8, label="weights of the draws")
    ax.plot(equal, equal / len(equal), color="black", ls=":", lw=1.2, label="equal weights")
    ax.axvline(ess, color="C3", ls="--", lw=1.2, label=f"ESS {ess:,.0f} of {len(equal):,}")
    ax.set(xscale="log", xlabel="number of heaviest draws", ylabel="share of the weight", ylim=(0, 1.05))
    ax.set_title(f"Pareto k {k:.2f} ({diagnostics.reading})")
    ax.legend(loc="upper left")
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]
