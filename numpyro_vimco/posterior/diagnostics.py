# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Can a fit be trusted?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array
import numpy as np
from numpyro.infer import SVI

from numpyro_vimco.arguments import check_integer, check_key
from numpyro_vimco.posterior.advice import HEAVY_TAIL, LOW_ESS, advise
from numpyro_vimco.posterior.fitted import Fitted, Result
from numpyro_vimco.posterior.weighing import weigh


@dataclass(frozen=True)
class ImportanceDiagnostics:
    """How well the guide's draws, with their importance weights, stand for the posterior. Printed, it explains itself.

    Where plates are common to all sites, each of their elements has weights of its own: ``ess`` and ``pareto_k`` are
    arrays of the shape of these plates, and the evidence is a sum over elements. Else they are numbers.

    :ivar log_evidence: estimate of log p(x) in nats: the logarithm of the mean weight.
    :ivar log_evidence_std_error: its standard error in nats, by the delta method.
    :ivar bounds: the importance-weighted bound (α = 0) in nats by number of particles N, from 1 (the ELBO) upwards,
        each a mean over the draws in groups of N.
    :ivar ess: effective sample size, 1 / Σ W² with Pareto-smoothed weights.
    :ivar pareto_k: shape of the weights' tail, as in ArviZ; -inf where the tail is tied, or where what lies above its
        beginning is less than 0.1 / √draws of the weight, so that it can do no harm
        (``weights.smooth_tail``).
    :ivar reading: of the worst element. ``"bad"``: k of min(1 - 1 / log10(draws), 0.7) or more (Vehtari et al. 2024),
        or an ESS below 100; ``"good"``: k < 0.5 (finite variance) and an ESS of a tenth of the draws or more;
        ``"usable"`` between. A part of the posterior that was never proposed shows in none of these.
    :ivar advice: what to make of it, or what to do.
    :ivar num_samples: number of draws.
    :ivar heaviest: shares of the total weight that the heaviest draws hold, from the largest, of the element with the
        largest k: of all draws where weights are joint, else of the 3 √draws heaviest.
    :ivar log_weight: log-weights, of shape ``(num_samples,)``, in nats, where they are joint. None where each element
        has its own: these are not kept.
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

    def __str__(self) -> str:
        size = np.size(self.pareto_k)
        worst = f" (worst of {size} elements)" if np.ndim(self.pareto_k) else ""
        bounds = ", ".join(f"{bound:.3f} (N = {n})" for n, bound in self.bounds.items())
        return (
            f"log evidence  {self.log_evidence:.3f} ± {self.log_evidence_std_error:.3f} nats\n"
            f"bounds        {bounds}\n"
            f"ESS           {np.min(self.ess):,.1f} of {self.num_samples:,} draws{worst}\n"
            f"Pareto k      {np.max(self.pareto_k):.2f}, {self.reading}{worst}\n"
            f"{self.advice}"
        )


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

    Draws are not kept: memory is that of ``3 √num_samples`` weights for each element of plates that are common to all
    sites, beside that of a few draws of the model.

    :param SVI svi: the inference object of the fit; with any objective.
    :param svi_result: what ``fit`` or ``svi.run`` returned, a state of ``svi.update``, or a dict of parameters.
    :param tuple model_args: the model's arguments, as in the fit; with all data, not a subsample.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_samples: number of draws, at least 100. Defaults to 10,000: a tail is fitted to them.
    :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to True.
    :raises ValueError: for parameters that do not fit the guide, arguments that do not fit the model, a subsampled
        plate, a model without latents, data that are NaN, too few draws, or ``rng_key`` that is no key.
    """
    check_key(rng_key)
    num_samples = check_integer("num_samples", num_samples, 100, "the tail of the weights is fitted to them")
    fit = Fitted.of(svi, svi_result, model_args, model_kwargs)
    weighed = weigh(fit, rng_key, num_samples, "diagnostics" if progress_bar else None)
    summary = weighed.summary
    reading = _reading(float(summary.pareto_k.max()), float(summary.ess.min()), num_samples)
    if weighed.log_weight is None:
        heaviest = summary.heaviest
    else:
        relative = np.sort(np.exp(weighed.log_weight - weighed.log_weight.max()))[::-1]
        heaviest = relative / relative.sum()
    return ImportanceDiagnostics(
        log_evidence=float(summary.log_evidence.sum()),
        log_evidence_std_error=float(np.sqrt(summary.variance.sum())),
        bounds=summary.bounds,
        ess=summary.ess.reshape(weighed.shape)[()],
        pareto_k=summary.pareto_k.reshape(weighed.shape)[()],
        reading=reading,
        advice=advise(fit, weighed, reading),
        num_samples=num_samples,
        heaviest=heaviest,
        log_weight=weighed.log_weight,
    )


def _reading(k: float, ess: float, num_samples: int) -> str:
    if k >= min(1 - 1 / np.log10(num_samples), 0.7) or ess < 100:
        return "bad"
    return "good" if k < HEAVY_TAIL and ess >= num_samples * LOW_ESS else "usable"
