# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Draws from a fitted guide with their importance weights: what is known of the posterior after a fit.

Weights are as in the objective of the fit: one for each element of the plates that are common to all sites. Where a
plate has particles of its own, one of them is drawn for each element by its local weight, and the weight left to the
whole is the design's Ẑ: together they are properly weighted. Arrays are NumPy's, in double precision where they are
weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import arviz as az
import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from scipy.special import logsumexp

from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.objectives.plates import Structure, aligned_shape
from numpyro_vimco.objectives.program import Program
from numpyro_vimco.posterior.fitted import Fitted


@dataclass(frozen=True)
class Proposals:
    """Draws from a guide.

    :ivar values: of each latent, of shape ``(N, *batch, *event)``.
    :ivar log_p: log p(x, z), of shape ``(N, *plates)``, in nats.
    :ivar log_q: log q(z), likewise.
    :ivar log_weight: log-weight, likewise; log_p - log_q but for local particles.
    :ivar structure: what plates those are.
    """

    values: dict[str, np.ndarray]
    log_p: np.ndarray
    log_q: np.ndarray
    log_weight: np.ndarray
    structure: Structure


def propose(fit: Fitted, rng_key: Array, num_proposals: int) -> Proposals:
    """Draw from the guide, chunk by chunk.

    :raises ValueError: for NaN weights, and where all are zero.
    """
    program = _program(fit, fit.plate_particles)
    structures: list[Structure] = []

    def particle(rng_key):
        rng_key, choice_key = random.split(rng_key)
        levels, structure = program.propose(fit.params, rng_key)
        structures.append(structure)
        values, densities = levels.shared
        log_p, log_q, log_weight = densities.model, densities.log_guide, densities.log_weight
        for i, (local_values, local) in enumerate(levels.local.values()):
            log_weight = log_weight + structure.sum_to_shared(cv.log_mean_weight(local.log_weight))
            chosen = random.categorical(random.fold_in(choice_key, i), local.log_weight, axis=0)[None]
            for name, value in local_values.items():
                values[name] = take(value, chosen, fit.model_trace[name]["fn"].event_dim)[0]
            log_p = log_p + structure.sum_to_shared(take(local.model, chosen)[0])
            log_q = log_q + structure.sum_to_shared(take(local.log_guide, chosen)[0])
        return values, log_p, log_q, log_weight

    keys = random.split(rng_key, num_proposals)
    values, log_p, log_q, log_weight = in_chunks(particle, fit.chunk_size(), keys)
    _check_weights(log_weight)
    return Proposals(values, log_p.astype(float), log_q.astype(float), log_weight.astype(float), structures[0])


def _check_weights(log_weight: np.ndarray) -> None:
    """Raise unless there are importance weights to work with; of shape ``(N, *plates)``.

    :raises ValueError: for NaN weights, and where all are zero.
    """
    nan = int(np.isnan(log_weight).reshape(len(log_weight), -1).any(1).sum())
    if nan:
        raise ValueError(
            f"{nan:,} of {len(log_weight):,} draws of the guide have a NaN weight: model or guide has a NaN "
            "log-density there. `jax.config.update('jax_debug_nans', True)` finds where."
        )
    if bool(np.isneginf(log_weight).all(0).any()):
        raise ValueError(
            f"None of {len(log_weight):,} draws of the guide has a density under the model: the guide proposes nothing "
            "that the posterior holds. Look at the supports of both, and at what the data rule out."
        )


def can_have_particles(fit: Fitted, plate: str) -> bool:
    """Whether a plate can be named in ``plate_particles``."""
    program = _program(fit, {**fit.plate_particles, plate: 2})
    try:
        jax.eval_shape(lambda key: program.propose(fit.params, key)[0], random.key(0))
    except ValueError:
        return False
    return True


def _program(fit: Fitted, plate_particles: Mapping[str, int]) -> Program:
    return Program(
        model=fit.svi.model,
        guide=fit.svi.guide,
        args=fit.args,
        kwargs=fit.kwargs,
        by_score=lambda site: False,
        plate_particles=plate_particles,
        joint_plates=getattr(fit.svi.loss, "joint_plates", frozenset()),
        linear=False,
    )


def in_chunks(fn: Callable, chunk_size: int, *inputs: Any) -> Any:
    """``jax.vmap(fn)(*inputs)``, so many elements at a time, with the results on the host."""
    length = len(jax.tree.leaves(inputs)[0])
    chunk_size = min(chunk_size, length)
    compiled = jax.jit(jax.vmap(fn))
    outputs = []
    for begin in range(0, length, chunk_size):
        # All chunks have one shape: the last begins earlier, and what it repeats is dropped.
        start = min(begin, length - chunk_size)
        chunk = compiled(*jax.tree.map(lambda x, start=start: x[start : start + chunk_size], inputs))
        outputs.append(jax.tree.map(lambda x, skip=begin - start: np.asarray(x)[skip:], chunk))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def take(values: Any, index: Any, event_dim: int = 0) -> Any:
    """For each element of plates, the value at its own index.

    :param values: of shape ``(N, *batch, *event)``, JAX's or NumPy's.
    :param index: of shape ``(S, *plates)``, aligned with batch on the right; of size 1 where a plate is summed over.
    :return: of shape ``(S, *batch, *event)``.
    """
    shape = aligned_shape(index.shape[1:], values.ndim - 1 - event_dim, event_dim)
    index = index.reshape(index.shape[0], *shape)
    if all(size == 1 for size in shape):
        return values[index.reshape(-1)]
    xp = np if isinstance(values, np.ndarray) else jnp
    return xp.take_along_axis(values, index, axis=0)


def log_evidence(log_weight: np.ndarray) -> np.ndarray:
    """Estimate of the log evidence of each element, in nats: the logarithm of the mean weight.

    :param log_weight: of shape ``(N, *plates)``, as everywhere here.
    """
    return logsumexp(log_weight, axis=0) - np.log(len(log_weight))


def effective_sample_size(smoothed: np.ndarray) -> np.ndarray:
    """1 / Σ W² of each element, from normalized log-weights."""
    return 1 / np.exp(2 * smoothed).sum(0)


def pareto_smooth(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed normalized log-weights, and the shape k of their tail, by ArviZ, for each element [1].

    Weights whose tail does not vary are left as they are, with k = -inf; so are fewer than 25, with k = inf.

    1. Vehtari et al. 2024, *Pareto Smoothed Importance Sampling*, JMLR 25(72)
    """
    flat = log_weight.reshape(len(log_weight), -1)
    smoothed, k = flat - logsumexp(flat, axis=0), np.full(flat.shape[1], np.inf)
    if len(flat) >= 25:
        # The tail that ArviZ fits: a fifth of the draws, or 3 √N if that is less. Few discrete values tie there.
        tail = int(np.ceil(min(len(flat) / 5, 3 * len(flat) ** 0.5)))
        cutoffs = np.partition(flat, -tail - 1, axis=0)[-tail - 1]
        for i, cutoff in enumerate(cutoffs):
            above = flat[flat[:, i] > cutoff + 1e-3, i]
            if len(above) == 0 or (len(above) >= 5 and np.ptp(above) < 1e-3):
                k[i] = -np.inf
            elif len(above) >= 5:
                smoothed[:, i], k[i] = _psislw(smoothed[:, i])
    return smoothed.reshape(log_weight.shape), k.reshape(log_weight.shape[1:])


def _psislw(log_weight: np.ndarray) -> tuple[np.ndarray, float]:
    with np.errstate(over="ignore"):  # in ArviZ's fit of the tail, where 1 / inf is meant to be 0
        if az.__version__.startswith("0."):
            smoothed, k = az.psislw(log_weight)
        else:
            from arviz_stats.base import array_stats

            smoothed, k = array_stats.psislw(-log_weight)  # as of log-likelihoods
    if not np.isfinite(k):  # too few draws hold the weight for a tail to be fitted
        return log_weight, np.inf
    return smoothed - logsumexp(smoothed), float(k)


def resample(rng_key: Array, log_weight: np.ndarray, num_samples: int) -> np.ndarray:
    """Indices of draws, each in proportion to its weight, for each element of plates by itself.

    Systematic resampling, in random order: how often a draw is taken differs from what its weight asks for by less than
    one.

    :return: integers of shape ``(num_samples, *plates)``.
    """
    flat = log_weight.reshape(len(log_weight), -1)
    offset_key, order_key = random.split(rng_key)
    offsets = np.asarray(random.uniform(offset_key, (flat.shape[1],)), float)
    indices = np.empty((num_samples, flat.shape[1]), int)
    for i in range(flat.shape[1]):
        cumulative = np.cumsum(np.exp(flat[:, i] - flat[:, i].max()))
        points = (np.arange(num_samples) + offsets[i]) / num_samples * cumulative[-1]
        order = np.asarray(random.permutation(random.fold_in(order_key, i), num_samples))
        indices[:, i] = np.minimum(np.searchsorted(cumulative, points), len(flat) - 1)[order]
    return indices.reshape(num_samples, *log_weight.shape[1:])
