# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Weighted means of values and the mean weight, block by block, with their Monte Carlo errors. Pure NumPy."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from numpyro_vimco.densities.plates import aligned_shape
from numpyro_vimco.draws.weights import variance_of_log_mean


class Estimate(NamedTuple):
    """A weighted mean, its standard error by the delta method, and the weighted standard deviation of the values."""

    mean: np.ndarray
    std_error: np.ndarray
    std: np.ndarray


class Moments:
    """Takes weighted draws of some sites block by block, and keeps sums.

    :param event_dims: for each site, the number of dimensions of an event.
    """

    def __init__(self, event_dims: Mapping[str, int]):
        self._event_dims = event_dims
        self._count = 0
        # All sums are of weights relative to the largest one of each element.
        self._largest = np.array(-np.inf)
        self._weights = np.zeros((2, 1))  # Σ w, Σ w²
        # Of each site Σ w f, Σ w f², Σ w² f, Σ w² f², with f the distance from the centre of the first block.
        self._centres: dict[str, np.ndarray] = {}
        self._sums: dict[str, np.ndarray] = {}

    def add(self, log_weight: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Take a block.

        :param log_weight: of shape ``(draws, *plates)``, in nats; of size 1 where a plate has no weights of its own.
        :param values: by site, of shape ``(draws, *batch, *event)``; plates and batch are aligned on the right.
        """
        log_weight = log_weight.astype(float)
        largest = np.maximum(self._largest, log_weight.max(0))
        shift = np.where(np.isneginf(largest), 0, largest)
        change = np.exp(self._largest - shift)
        self._largest, self._count = largest, self._count + len(log_weight)
        weight = np.exp(log_weight - shift)
        self._weights = np.stack([old * change**i + (weight**i).sum(0) for i, old in enumerate(self._weights, 1)])
        for name in self._event_dims:
            # What is beyond single precision has no weight.
            value = np.nan_to_num(values[name].astype(float), posinf=0, neginf=0)
            centre = self._centres.setdefault(name, value.mean(0))
            value = value - centre
            sums = self._sums.get(name, np.zeros((2, 2, *centre.shape)))
            for power, old in enumerate(sums):
                old *= self._aligned(name, (change ** (power + 1) * np.ones_like(largest))[None], value.ndim)[0]
                weighted = self._aligned(name, weight ** (power + 1), value.ndim) * value
                old += weighted.sum(0), (weighted * value).sum(0)
            self._sums[name] = sums

    def _aligned(self, name: str, weight: np.ndarray, ndim: int) -> np.ndarray:
        event_dim = self._event_dims[name]
        return weight.reshape(len(weight), *aligned_shape(weight.shape[1:], ndim - 1 - event_dim, event_dim))

    def log_evidence(self) -> tuple[np.ndarray, np.ndarray]:
        """Logarithm of the mean weight of each element in nats, and its standard error, of shape ``(elements,)``."""
        total, square = (x.ravel() for x in self._weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            estimate = np.log(total / self._count) + np.ravel(self._largest)
            return estimate, np.sqrt(variance_of_log_mean(total, square, self._count))

    def ess(self) -> np.ndarray:
        """Effective sample size (Σ w)² / Σ w² of each element, of shape ``(elements,)``."""
        total, square = (x.ravel() for x in self._weights)
        with np.errstate(invalid="ignore"):
            return total**2 / square

    def estimates(self) -> dict[str, Estimate]:
        """Of each site, arrays of the shape of its value."""
        found = {}
        for name, ((first, second), (first_square, second_square)) in self._sums.items():
            ndim = first.ndim + 1
            total, square = (self._aligned(name, x[None], ndim)[0] for x in self._weights)
            with np.errstate(invalid="ignore"):  # where all weights are zero
                mean = first / total
                variance = np.maximum(second / total - mean**2, 0)
                error = np.maximum(second_square - 2 * mean * first_square + mean**2 * square, 0) ** 0.5 / total
            found[name] = Estimate(mean + self._centres[name], error, variance**0.5)
        return found
