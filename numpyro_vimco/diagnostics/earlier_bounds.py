# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""What the losses of a fit prove: a bound that was reached earlier, and lies above the log evidence of today's draws.

Every loss at inverse temperature 1 is minus the logarithm of an estimate :math:`\hat w_t` with :math:`E[\hat w_t] \le
p(x)`: the mean weight, or for α > 0 a power mean or geometric mean, which is smaller; what NumPyro's ELBOs sum out or
integrate makes it smaller in expectation too (Jensen). Given the parameters of its step it is independent of the steps
before, so that from any step a on :math:`\prod_{t=a}^b \hat w_t / p(x)` is a supermartingale in b, and by Ville's
inequality [1]

.. math:: P\Big( \sup_b \sum_{t=a}^b (\log \hat w_t - \log p(x)) \ge \log \tfrac1\delta \Big) \le \delta

for weights of any distribution. To take the best of all a is to look :math:`steps \times starts` times, for which δ is
divided. So the largest sum over any stretch of steps needs no window and no normal distribution, and what is due to
choosing the stretch is accounted for in full. (Derived here.)

1. Jean Ville 1939, *Étude critique de la notion de collectif*; Ramdas et al. 2023, *Game-theoretic statistics and safe
   anytime-valid inference*, Statistical Science 38(4), for tests of this kind
"""

from typing import NamedTuple

import numpy as np
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.fitting.state import Starts
from numpyro_vimco.objectives.elbo import ImportanceWeightedELBO

# How often all starts of a fit together are wrongly said to have lost something, if log p(x) were known.
FALSE_ALARMS = 1e-6
# The evidence is known to so many standard errors, and to this in nats and relative to its size, for rounding.
ERRORS, NATS, ROUNDING = 5, 0.05, 1e-6
BOUNDS = ImportanceWeightedELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO


class Stretch(NamedTuple):
    """Steps ``begin`` to ``end - 1`` of a start, and the mean of its bound there with its standard error, in nats."""

    begin: int
    end: int
    bound: float
    std_error: float


def earlier_bounds(approx: Approximation, starts: Starts, log_evidence: float, std_error: float) -> dict[int, Stretch]:
    """The starts that lost a part of the posterior, each with the steps that prove it.

    Nothing is proven where losses are no lower bounds of this evidence: of an objective that is not known to have such,
    of a model with parameters, whose evidence moved with them, and of data that were subsampled.

    :param log_evidence: of the draws of today, in nats.
    """
    bounds = isinstance(approx.svi.loss, BOUNDS) and getattr(approx.svi.loss, "alpha", 0) >= 0
    known = ~np.isnan(starts.log_evidence)  # not where a plate is subsampled
    if not bounds or approx.params_of_model:
        return {}
    certain = log_evidence + ERRORS * std_error + NATS + ROUNDING * abs(log_evidence)
    needed = np.log(max(starts.losses.size, 1) / FALSE_ALARMS)
    found = {}
    for start in np.flatnonzero(known & ~starts.failed):
        bound = np.where(starts.inverse_temperature[start] == 1, -np.asarray(starts.losses[start], float), -np.inf)
        excess, begin, end = _largest_sum(np.where(np.isnan(bound), -np.inf, bound) - certain)
        if excess >= needed:
            part = bound[begin:end]
            error = part.std(ddof=1) / len(part) ** 0.5 if len(part) > 1 else np.nan
            found[int(start)] = Stretch(begin, end, float(part.mean()), float(error))
    return found


def _largest_sum(values: np.ndarray) -> tuple[float, int, int]:
    """The largest sum of consecutive values, and where it begins and ends (Kadane's algorithm)."""
    best, total, begin = (0.0, 0, 0), 0.0, 0
    for i, value in enumerate(values.tolist()):
        if total <= 0:
            total, begin = 0.0, i
        total += value
        if total > best[0]:
            best = total, begin, i + 1
    return best
