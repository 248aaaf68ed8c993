# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Importance weights of many draws: evidence, bounds, effective sample size, tails, and resampling. Pure NumPy.

Log-weights are in nats, of shape ``(draws, elements)``. An element is one of the plates that are common to all sites;
without such plates there is one. :class:`WeightStream` takes the weights in blocks, and keeps the largest weights of
each element and sums of the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array
import numpy as np
from scipy.special import logsumexp

from numpyro_vimco.randomness import generator

# Weights whose logarithms differ by less than this are tied: discrete latents give a few distinct weights.
TIE = 1e-3
# Number of elements whose weights are sorted at a time.
ELEMENTS = 4096
# Size of the largest array when tails are fitted: small enough for a processor's cache.
FIT_SIZE = 2**20


def tail_length(num_draws: int) -> int:
    """The number of weights that a tail is fitted to, as in ArviZ: a fifth of the draws, at most 3 √draws."""
    return int(np.ceil(min(num_draws / 5, 3 * num_draws**0.5)))


@dataclass(frozen=True)
class WeightSummary:
    """A summary of the weights of each element, in arrays of shape ``(elements,)``, and of all.

    :ivar log_evidence: logarithm of the mean weight, in nats.
    :ivar variance: variance of ``log_evidence``, by the delta method: of the weights that were seen.
    :ivar ess: effective sample size, 1 / Σ W² of the normalized weights as they are: smoothing would hide a heavy one.
    :ivar pareto_k: shape of the tail.
    :ivar bounds: by number of particles N, the mean over groups of N draws of log (1/N) Σ w in nats, summed over
        elements.
    :ivar heaviest: of the element with the largest k, the shares of its total weight that its heaviest draws hold, from
        the largest down, of shape ``(tail,)``.
    :ivar num_draws: number of draws.
    """

    log_evidence: np.ndarray
    variance: np.ndarray
    ess: np.ndarray
    pareto_k: np.ndarray
    bounds: dict[int, float]
    heaviest: np.ndarray
    num_draws: int

    @property
    def std_error(self) -> float:
        """Standard error of the sum of ``log_evidence`` over elements, in nats; infinite where none can be told."""
        return float(np.sqrt((self.variance * unseen_factor(self.pareto_k, self.ess / self.num_draws) ** 2).sum()))


class WeightStream:
    """Takes log-weights block by block, and keeps for each element the largest of them and sums of the others.

    :param num_draws: total number of draws.
    :param num_elements: number of elements of each draw.
    """

    def __init__(self, num_draws: int, num_elements: int):
        self.num_draws, self.num_elements = num_draws, num_elements
        self._bounds = _Bounds([4**i for i in range(10) if 4**i <= num_draws // 10] or [1], num_elements)
        # The largest `_kept` weights so far are among the first `_filled` of each row, and none is below the cutoff.
        self._kept = min(tail_length(num_draws) + 1, num_draws)
        self._top = np.empty((num_elements, 0), np.float32)
        self._filled = np.zeros(num_elements, int)
        self._cutoff = np.full(num_elements, -np.inf, np.float32)
        # Σ w and Σ w² of the others, relative to the largest of them and its square.
        self._largest = np.full(num_elements, -np.inf)
        self._sums = np.zeros((2, num_elements))

    def add(self, log_weight: np.ndarray) -> None:
        """Take a block of shape ``(draws, elements)``, without NaN."""
        self._bounds.add(log_weight)
        if not self._top.size:
            self._top = np.full((self.num_elements, 2 * self._kept), -np.inf, log_weight.dtype)
            self._cutoff = self._cutoff.astype(log_weight.dtype)
        for begin in range(0, len(log_weight), self._kept):
            block = log_weight[begin : begin + self._kept]
            if np.any(self._filled + len(block) > self._top.shape[1]):
                self._shrink(np.flatnonzero(self._filled > self._kept))
            above = block > self._cutoff
            for i in np.flatnonzero(above.any(1)):
                elements = np.flatnonzero(above[i])
                self._top[elements, self._filled[elements]] = block[i, elements]
                self._filled[elements] += 1
            self._sum(np.where(above, -np.inf, block), slice(None))

    def _shrink(self, elements: np.ndarray) -> None:
        """Keep the largest weights of some elements, and add their others to the sums."""
        for some in np.split(elements, range(ELEMENTS, len(elements), ELEMENTS)):
            weights = self._top[some]
            weights.partition(weights.shape[1] - self._kept, axis=1)
            self._sum(weights[:, : -self._kept].T, some)
            self._top[some, : self._kept] = weights[:, -self._kept :]
            self._top[some, self._kept :] = -np.inf
            self._filled[some] = self._kept
            self._cutoff[some] = weights[:, -self._kept :].min(1)

    def _sum(self, log_weight: np.ndarray, elements: slice | np.ndarray) -> None:
        """Add weights of some elements to their sums."""
        old = self._largest[elements]
        new = np.maximum(old, log_weight.max(0))
        shift = np.where(np.isneginf(new), 0, new)
        change = np.where(np.isneginf(old), 0, np.exp(np.where(np.isneginf(old), shift, old) - shift))
        relative = np.exp(log_weight - shift.astype(log_weight.dtype))
        added = relative.sum(0), np.einsum("ij,ij->j", relative, relative)
        self._sums[:, elements] = self._sums[:, elements] * (change, change**2) + added
        self._largest[elements] = new

    def has_zero(self) -> bool:
        """Whether an element has no draw of positive weight."""
        return bool(np.isneginf(self._top.max(1)).any())

    def summary(self) -> WeightSummary:
        """The summary of all weights, after all draws were added; each element must have a positive weight."""
        self._shrink(np.flatnonzero(self._filled > self._kept))
        log_evidence, variance, ess, k = np.empty((4, self.num_elements))
        heaviest, worst = np.empty(0), -np.inf
        for begin in range(0, self.num_elements, ELEMENTS):
            part = slice(begin, begin + ELEMENTS)
            tail = np.sort(self._top[part, : self._kept].astype(float), axis=1)
            maximum = tail[:, -1].copy()
            tail -= maximum[:, None]
            raw, factor = np.exp(tail), np.exp(self._largest[part] - maximum)
            rest, rest_square = self._sums[:, part] * (factor, factor**2)
            total, square = rest + raw.sum(1), rest_square + (raw**2).sum(1)
            log_evidence[part] = np.log(total) + maximum - np.log(self.num_draws)
            variance[part] = variance_of_log_mean(total, square, self.num_draws)
            ess[part] = total**2 / square
            _, k[part] = smooth_tail(tail, rest, self.num_draws)
            i = int(np.argmax(k[part]))
            if k[part][i] > worst or not len(heaviest):
                worst, heaviest = k[part][i], raw[i, ::-1] / total[i]
        return WeightSummary(log_evidence, variance, ess, k, self._bounds.means(), heaviest, self.num_draws)


class _Bounds:
    """Means of importance-weighted bounds over groups of N = 1, 4, 16, … consecutive draws."""

    def __init__(self, sizes: list[int], num_elements: int):
        self._sizes = sizes
        # For each N, log-sums of the groups that are not part of a group of 4 N yet: three at most.
        self._rest = [np.empty((0, num_elements))] * len(sizes)
        self._total, self._count = np.zeros(len(sizes)), np.zeros(len(sizes), int)

    def add(self, log_weight: np.ndarray) -> None:
        sums = log_weight
        for i, size in enumerate(self._sizes):
            if not len(sums):
                return
            self._total[i] += sums.sum(dtype=float) - sums.size * np.log(size)
            self._count[i] += len(sums)
            sums = np.concatenate([self._rest[i].astype(sums.dtype), sums])
            whole = len(sums) // 4 * 4
            self._rest[i] = sums[whole:].copy()
            sums = _log_sums_of_four(sums[:whole]) if i + 1 < len(self._sizes) else sums[:0]

    def means(self) -> dict[int, float]:
        return {n: float(total / count) for n, total, count in zip(self._sizes, self._total, self._count) if count}


def _log_sums_of_four(log_weight: np.ndarray) -> np.ndarray:
    groups = log_weight.reshape(-1, 4, log_weight.shape[1])
    maximum = groups.max(1)
    finite = np.where(np.isneginf(maximum), 0, maximum)
    with np.errstate(divide="ignore"):
        return finite + np.log(np.exp(groups - finite[:, None]).sum(1))


def smooth_tail(tail: np.ndarray, rest: np.ndarray, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Pareto-smooth the largest weights of each element, and find the shape k of their tail [1, 2], as ArviZ does.

    The smallest of the given weights is the cutoff; the tail are the weights above it. k is -inf, and the weights stay
    as they are, in two cases where the tail does no harm:

    - All its weights are equal, as a few values of discrete latents give them: weights are bounded.
    - Its excess over the cutoff, :math:`\sum_{tail} (w - w_{cutoff})`, is less than :math:`0.1 / \sqrt S` of the weight
      of all S draws. Without it, an expectation of a function with values in [0, 1] changes by less than that. If the
      tail held ten times the weight that was seen, it would change by no more than the Monte Carlo error of S draws of
      the posterior. (Derived here.)

    Otherwise k is inf where fewer than five weights lie above the cutoff, or fewer than 25 draws were made: these are
    too few for a fit.

    1. Zhang and Stephens 2009, *A New and Efficient Estimation Method for the Generalized Pareto Distribution*,
       Technometrics 51(3)
    2. Vehtari et al. 2024, *Pareto Smoothed Importance Sampling*, JMLR 25(72)

    :param tail: the largest log-weights, in ascending order, relative to the largest: of shape ``(elements, tail)``.
    :param rest: sum of the other weights, relative to the same, of shape ``(elements,)``.
    :param num_draws: number S of draws.
    :return: the tail with smoothed weights, and k of shape ``(elements,)``.
    """
    smoothed, k = tail.copy(), np.full(len(tail), np.inf)
    if num_draws < 25:
        return smoothed, k
    cutoff = np.maximum(tail[:, 0], np.log(np.finfo(float).tiny))
    weights, cut = np.exp(tail), np.exp(cutoff)
    excess = np.maximum(weights - cut[:, None], 0).sum(1)
    above = (tail > cutoff[:, None] + TIE).sum(1)
    lowest = np.take_along_axis(tail, np.maximum(tail.shape[1] - above, 0).clip(max=tail.shape[1] - 1)[:, None], 1)
    tied = (above >= 5) & (tail[:, -1] - lowest[:, 0] < TIE)
    harmless = tied | (excess < 0.1 / num_draws**0.5 * (rest + weights.sum(1)))
    k[harmless] = -np.inf
    lengths = (tail > cutoff[:, None]).sum(1)
    for length in np.unique(lengths[~harmless & (above >= 5)]):
        elements = np.flatnonzero(~harmless & (above >= 5) & (lengths == length))
        batch = max(FIT_SIZE // (length * _grid_size(length)), 1)
        for some in np.split(elements, range(batch, len(elements), batch)):
            shape, scale = _fit_pareto(weights[some, -length:] - cut[some, None])
            fitted = _pareto_quantiles(length, shape, scale) + cut[some, None]
            finite = np.isfinite(shape) & np.isfinite(fitted).all(1)
            smoothed[some[finite], -length:] = np.minimum(np.log(fitted[finite]), 0)
            k[some[finite]] = shape[finite]
    return smoothed, k


def _grid_size(length: int) -> int:
    return 30 + int(length**0.5)


def _fit_pareto(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale of a generalized Pareto distribution for each row, ascending, of shape ``(elements, tail)``.

    The posterior mean over a grid by Zhang and Stephens, with the weak prior of Vehtari et al. on the shape.
    """
    n = excess.shape[1]
    grid = _grid_size(n)
    with np.errstate(all="ignore"):  # a fit that fails has a shape that is not finite
        b = (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * excess[:, [int(n / 4 + 0.5) - 1]])
        b = b + 1 / excess[:, [-1]]
        shape = np.log1p(-b[:, :, None] * excess[:, None, :]).mean(2)
        profile = n * (np.log(-b / shape) - shape - 1)
        weight = np.exp(profile - logsumexp(profile, axis=1, keepdims=True))
        weight = np.where(weight >= 10 * np.finfo(float).eps, weight, 0)
        mean = (b * weight).sum(1) / weight.sum(1)
        shape = np.log1p(-mean[:, None] * excess).mean(1)
        return (n * shape + 5) / (n + 10), -shape / mean


def _pareto_quantiles(length: int, shape: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Expected order statistics of a generalized Pareto distribution, of shape ``(elements, length)``."""
    log_survival = np.log1p(-np.arange(0.5, length) / length)
    shape = np.where(np.abs(shape) < np.finfo(float).eps, np.finfo(float).eps, shape)[:, None]
    with np.errstate(all="ignore"):
        return np.where(scale[:, None] > 0, scale[:, None] * np.expm1(-shape * log_survival) / shape, np.nan)


def log_mean(log_weight: np.ndarray) -> np.ndarray:
    """Logarithm of the mean weight of each element, in nats, without the leading axis of draws."""
    return logsumexp(log_weight, axis=0) - np.log(len(log_weight))


def variance_of_log_mean(total: np.ndarray, square: np.ndarray, num_draws: int) -> np.ndarray:
    """The variance of :func:`log_mean` by the delta method.

    :param total: Σ w of the draws, relative to any weight.
    :param square: Σ w², relative to its square.
    """
    return np.maximum(square / total**2 - 1 / num_draws, 0) * num_draws / (num_draws - 1)


def unseen_factor(pareto_k: np.ndarray, share: np.ndarray) -> np.ndarray:
    r"""The factor by which a heavy tail makes a standard error of :func:`log_mean` larger than the delta method says.

    The delta method knows the weights that were seen. Let v be the weight that one of S draws is expected to exceed. In
    a Pareto tail of shape k, weights above v have the mean :math:`v / (1 - k)`, so that this is also the sum of the
    weights above v that S draws are expected to have. With probability 1 / e they have none, and their sum is too low
    by that much. The error by the delta method is of the order of the heaviest weights that were seen, of v. So the
    factor is :math:`1 / (1 - \max(k, 0))`, and infinite from k = 1 on.

    Where the ESS is a quarter of the draws or more, as right fits have it, a k above 0.9 counts as 0.9: the tail then
    holds little of the weight that was seen.

    Derived here, an order of magnitude. ``benchmarks/evidence_coverage.py --simulated`` prints how often intervals then
    hold the mean: 95% of them or more up to a k of 0.7, nine of ten at 0.9.

    :param pareto_k: shape of the tail, of any shape.
    :param share: the ESS as a share of the draws, of the same shape.
    """
    with np.errstate(divide="ignore"):
        return 1 / (1 - np.clip(pareto_k, 0, np.where(share >= 0.25, 0.9, 1)))


def pareto_smooth(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-weights with smoothed tails, and the shape k of the tail of each element: see :func:`smooth_tail`.

    :param log_weight: of shape ``(draws, elements)``.
    :return: smoothed log-weights of the same shape, not normalized; and k of shape ``(elements,)``.
    """
    num_draws, num_elements = log_weight.shape
    kept = min(tail_length(num_draws) + 1, num_draws)
    smoothed, k = log_weight.astype(log_weight.dtype), np.empty(num_elements)
    for begin in range(0, num_elements, ELEMENTS):
        part = slice(begin, begin + ELEMENTS)
        weights = np.ascontiguousarray(log_weight[:, part].T).astype(float)
        top = np.argpartition(weights, num_draws - kept, axis=1)[:, num_draws - kept :]
        tail = np.take_along_axis(weights, top, axis=1)
        order = np.argsort(tail, axis=1)
        top, tail = np.take_along_axis(top, order, axis=1), np.take_along_axis(tail, order, axis=1)
        largest = tail[:, -1:].copy()
        rest = np.exp(weights - largest).sum(1) - np.exp(tail - largest).sum(1)
        tail, k[part] = smooth_tail(tail - largest, np.maximum(rest, 0), num_draws)
        np.put_along_axis(weights, top, tail + largest, axis=1)
        smoothed[:, part] = weights.T
    return smoothed, k


def effective_sample_size(log_weight: np.ndarray) -> np.ndarray:
    """1 / Σ W² of each element, with W the normalized weights, without the leading axis of draws."""
    return np.exp(2 * logsumexp(log_weight, axis=0) - logsumexp(2 * log_weight, axis=0))


def of_elements(fn: Callable[[np.ndarray], np.ndarray], log_weight: np.ndarray) -> np.ndarray:
    """A function of log-weights of shape ``(draws, elements)``, in double precision, some elements at a time."""
    begins = range(0, log_weight.shape[1], ELEMENTS)
    return np.concatenate([fn(log_weight[:, begin : begin + ELEMENTS].astype(float)) for begin in begins])


def resample(rng_key: Array, log_weight: np.ndarray, num_samples: int) -> np.ndarray:
    """Indices of draws, chosen in proportion to their weights, for each element separately.

    This is systematic resampling, in random order: the number of times that a draw is chosen differs from its expected
    number by less than one.

    :param log_weight: of shape ``(draws, elements)``.
    :return: integers of shape ``(num_samples, elements)``.
    """
    num_draws, num_elements = log_weight.shape
    random = generator(rng_key)
    offsets = random.uniform(size=(num_elements, 1))
    indices = np.empty((num_samples, num_elements), np.int32)
    for begin in range(0, num_elements, ELEMENTS):
        part = slice(begin, begin + ELEMENTS)
        weights = np.ascontiguousarray(log_weight[:, part].T).astype(float)
        cumulative = np.exp(weights - weights.max(1, keepdims=True)).cumsum(1)
        # Points (i + offset) / num_samples for i = 0, 1, …: how many lie below each cumulative weight.
        below = np.floor(cumulative / cumulative[:, -1:] * num_samples - offsets[part]).astype(np.int32) + 1
        below[:, -1] = num_samples
        times = np.diff(below, axis=1, prepend=0)
        every = np.broadcast_to(np.arange(num_draws), times.shape)
        chosen = np.repeat(every.ravel(), times.ravel()).reshape(-1, num_samples)
        indices[:, part] = random.permuted(chosen, axis=1).T
    return indices
