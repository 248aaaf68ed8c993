# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What steps leave behind: the state to go on from, and all starts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int
import numpy as np
from numpyro.infer.svi import SVIState

if TYPE_CHECKING:
    import xarray as xr


class FitState(NamedTuple):
    """All that a fit needs to go on: a pytree of arrays.

    :ivar svi: the :data:`~numpyro.infer.svi.SVIState` of all starts; its arrays have a leading axis for them.
    :ivar step: number of steps taken.
    :ivar tempering_steps: number of steps over which the inverse temperature of each start rises, of shape
        ``(starts,)``; -1 where ``tempering`` is a function.
    :ivar first_inverse_temperature: that at step 0; 1 where ``tempering`` is a function.
    :ivar failed: whether each start was dropped, of shape ``(starts,)``.
    """

    svi: SVIState
    step: Int[Array, ""]
    tempering_steps: Int[Array, " starts"]
    first_inverse_temperature: Float[Array, ""]
    failed: Bool[Array, " starts"]


@dataclass(frozen=True)
class Starts:
    """The starts of a fit, side by side; of a single fit there is one.

    :ivar params: parameters, with a leading axis for starts. Those of a start that was dropped are the last ones before
        it failed.
    :ivar losses: of shape ``(starts, steps)``, in nats, at the inverse temperature of each step; NaN once a start was
        dropped.
    :ivar inverse_temperature: β of each step, of shape ``(starts, steps)``.
    :ivar svi_states: of all starts, with a leading axis; None where only parameters are known. They are those of
        ``posterior.state``, unless all starts had lost a part of the posterior and it was recovered.
    :ivar failed: whether each start was dropped, of shape ``(starts,)``.
    :ivar log_evidence: each start's estimate of log p(x) in nats, of shape ``(starts,)``: the logarithm of the mean
        importance weight of 4,096 draws of its guide, at inverse temperature 1. NaN where a start was dropped, and
        where there is none: a plate is subsampled, the model has no latents, or the guide fixes a continuous one by a
        Delta; and of a single fit, whose evidence is ``posterior.log_evidence``.
    :ivar log_evidence_std_error: its standard error in nats, by the delta method, of shape ``(starts,)``.
    :ivar recovered: whether starts were replaced, as all had lost a part of the posterior that defensive draws found.
    :ivar alike: whether all began at the same parameters, as far as that is known.
    """

    params: dict[str, Any]
    losses: np.ndarray
    inverse_temperature: np.ndarray
    svi_states: SVIState | None
    failed: np.ndarray
    log_evidence: np.ndarray
    log_evidence_std_error: np.ndarray
    recovered: bool = False
    alike: bool = False
    _agreement: Callable[[], Any] = field(default=lambda: None, repr=False, compare=False)

    @classmethod
    def without_evidence(
        cls,
        params: dict[str, Any],
        losses: np.ndarray,
        inverse_temperature: np.ndarray,
        svi_states: SVIState | None,
        failed: np.ndarray,
        alike: bool = False,
    ) -> "Starts":
        """Starts whose evidence is not known, or not yet."""
        unknown = np.full(len(failed), np.nan)
        return cls(params, losses, inverse_temperature, svi_states, failed, unknown, unknown, alike=alike)

    def __len__(self) -> int:
        return len(self.failed)

    @property
    def best(self) -> int:
        """The start of the highest log evidence; if there is none, of the lowest loss in the last tenth of steps."""
        score = self.log_evidence
        if np.isnan(score).all():
            last = self.losses[:, -max(self.losses.shape[1] // 10, 1) :]
            seen = ~np.isnan(last)  # a step that `stable_update` skipped has none
            score = np.where(seen.any(1), -np.where(seen, last, 0).sum(1) / np.maximum(seen.sum(1), 1), np.nan)
        return int(np.argmax(np.where(self.failed | np.isnan(score), -np.inf, score)))

    @property
    def kept(self) -> np.ndarray:
        """Indices of the starts that were not dropped."""
        return np.flatnonzero(~self.failed)

    @property
    def agreement(self) -> "xr.Dataset | None":
        """Each start against the pooled draws: see :class:`~numpyro_vimco.diagnostics.verdict.Diagnostics`."""
        return self._agreement()
