# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit leaves behind: the state to go on from, and the result of all starts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
from numpyro.infer.svi import SVIRunResult, SVIState


class FitState(NamedTuple):
    """All that a fit needs to go on: a pytree of arrays.

    :ivar svi: the :data:`~numpyro.infer.svi.SVIState` of all starts; its arrays have a leading axis for them.
    :ivar step: number of steps taken.
    :ivar anneal_steps: number of steps over which the power of each start rises, of shape ``(starts,)``; -1 where
        ``anneal`` is a function.
    :ivar first_power: the power at step 0; 1 where ``anneal`` is a function.
    :ivar failed: whether each start was dropped, of shape ``(starts,)``.
    """

    svi: SVIState
    step: Int[Array, ""]
    anneal_steps: Int[Array, " starts"]
    first_power: Float[Array, ""]
    failed: Bool[Array, " starts"]


class FitResult(NamedTuple):
    """What :func:`~numpyro_vimco.fit` returns.

    :ivar params: parameters of all starts, with a leading axis for them. Those of a start that was dropped are the
        last ones before it failed.
    :ivar losses: of shape ``(starts, steps)``, in nats, at the power of each step; NaN once a start was dropped.
    :ivar state: to go on with: ``fit(..., init_state=result.state)``.
    :ivar power: β of each step, of shape ``(starts, steps)``.
    :ivar log_evidence: each start's estimate of log p(x) in nats, of shape ``(starts,)``: the logarithm of the mean
        importance weight of 4,096 draws of its guide, at power 1. NaN where a start was dropped, and where there is
        none: a plate is subsampled, the model has no latents, or the guide fixes a continuous one by a Delta.
    :ivar log_evidence_std_error: its standard error in nats, by the delta method, of shape ``(starts,)``.
    :ivar svi_states: of all starts, with a leading axis. They are those of ``state``, unless all starts had lost a part
        of the posterior and it was recovered (:func:`~numpyro_vimco.fit`).
    :ivar failed: whether each start was dropped, of shape ``(starts,)``.
    :ivar recovered: whether starts were replaced, as all had lost a part of the posterior that defensive draws found.
    """

    params: dict[str, Any]
    losses: np.ndarray
    state: FitState
    power: np.ndarray
    log_evidence: np.ndarray
    log_evidence_std_error: np.ndarray
    svi_states: SVIState
    failed: np.ndarray
    recovered: bool = False

    def start(self, index: int) -> SVIRunResult:
        """One start, as ``svi.run`` would return it."""
        params, state = jax.tree.map(lambda leaf: leaf[index], (self.params, self.svi_states))
        return SVIRunResult(params, state, jnp.asarray(self.losses[index]))

    @property
    def best_start(self) -> int:
        """The start of the highest log evidence; if there is none, of the lowest loss in the last tenth of steps."""
        score = self.log_evidence
        if np.isnan(score).all():
            last = self.losses[:, -max(self.losses.shape[1] // 10, 1) :]
            seen = ~np.isnan(last)  # a step that `stable_update` skipped has none
            score = np.where(seen.any(1), -np.where(seen, last, 0).sum(1) / np.maximum(seen.sum(1), 1), np.nan)
        return int(np.argmax(np.where(self.failed | np.isnan(score), -np.inf, score)))

    @property
    def best(self) -> SVIRunResult:
        """The start ``best_start``, as ``svi.run`` would return it."""
        return self.start(self.best_start)
