# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the posterior: those of the guides, resampled by their weights, and of summed sites given these."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import random
from jaxtyping import Array
import numpy as np
from numpyro.infer import MCMC

from numpyro_vimco.draws import weights
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.pooling import in_pool, propose_pooled
from numpyro_vimco.draws.proposals import WeightedDraw, fixed, propose, take
from numpyro_vimco.export.summed import draw_summed
from numpyro_vimco.randomness import split_by_name, split_into

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws of the posterior, in one or several chains, one after the other.

    :ivar approx: with the starts that they are of.
    :ivar start: of each draw, whose parameters of the model are its own, of shape ``(chains * draws,)``.
    :ivar sampled: latents that the guide samples, of shape ``(chains * draws, *batch, *event)``.
    :ivar summed: latents that are summed out, likewise.
    :ivar stats: ``log_weight``, ``log_p`` and ``log_q``, of shape ``(chains * draws, *plates)``.
    :ivar log_evidence: of each element, of shape ``(chains, *plates)``, in nats.
    :ivar quality: of each chain, its evidence, and how good its weights were.
    :ivar extra: what MCMC collected beside its draws, of shape ``(chains * draws,)``.
    """

    approx: Approximation
    start: np.ndarray
    sampled: Arrays
    summed: Arrays
    stats: Arrays
    log_evidence: np.ndarray
    quality: list[dict[str, float]]
    extra: Arrays = field(default_factory=dict)

    @property
    def latents(self) -> Arrays:
        return self.sampled | self.summed

    def some(self, rng_key: Array, number: int) -> "PosteriorDraws":
        """So many of the draws, at random: each once as long as there are enough. They have no sampler statistics."""
        order = np.asarray(random.permutation(rng_key, len(self.start)))
        index = np.resize(order, number)
        sampled, summed = jax.tree.map(lambda x: x[index], (self.sampled, self.summed))
        return replace(self, start=self.start[index], sampled=sampled, summed=summed, stats={}, extra={})

    @property
    def num_chains(self) -> int:
        return len(self.log_evidence)

    @property
    def num_draws(self) -> int:
        """Number of draws of each chain."""
        return len(self.start) // self.num_chains


def draw_posterior(
    approx: Approximation,
    rng_key: Array,
    num_samples: int,
    num_proposals: int,
    resample: bool,
    pool: bool,
    progress_bar: bool,
) -> PosteriorDraws:
    """Draw from the guides, and choose among these draws.

    :param resample: whether to; else ``num_samples`` draws stay as they are.
    :param pool: whether draws of all starts are one chain; else each start is one, with so many draws.
    """
    keys = split_by_name(rng_key, ("proposals", "resampling", "summed"))
    progress = "proposals" if progress_bar else None
    approx.check_has_posterior()
    if pool:
        approx = in_pool(approx)
        proposals = [propose_pooled(approx, keys["proposals"], num_proposals, progress)]
    else:
        proposals = propose(approx, keys["proposals"], num_proposals, progress)
    is_fixed = bool(fixed(approx))
    chains = [
        weighed(drawn, approx, is_fixed, key, num_samples if resample else None)
        for drawn, key in zip(proposals, split_into(keys["resampling"], len(proposals)))
    ]
    start = np.repeat(np.arange(len(proposals)) if not pool else [0], num_samples)
    del proposals  # they are large
    # The chains as one from here on.
    sampled, stats = (jax.tree.map(_concatenate, *(chain[i] for chain in chains)) for i in (0, 1))
    summed = draw_summed(approx, keys["summed"], sampled, start, "summed sites" if progress_bar else None)
    log_evidence = np.stack([chain[2] for chain in chains])
    return PosteriorDraws(approx, start, sampled, summed, stats, log_evidence, [chain[3] for chain in chains])


def draws_of_chains(
    approx: Approximation, rng_key: Array, mcmc: MCMC, log_evidence: np.ndarray, progress_bar: bool
) -> PosteriorDraws:
    """Draws of MCMC, and of sites that are summed out given these.

    :param log_evidence: of weighted draws, of each element, of shape ``(1, *plates)``.
    """
    approx = in_pool(approx)
    samples, extra = mcmc.get_samples(), mcmc.get_extra_fields()
    sampled = {name: np.asarray(samples[name]) for name in approx.latents()}
    start = np.zeros(len(next(iter(sampled.values()))), int)
    summed = draw_summed(approx, rng_key, sampled, start, "summed sites" if progress_bar else None)
    log_evidence = np.repeat(log_evidence, mcmc.num_chains, axis=0)
    quality = [{"log_evidence": float(of_chain.sum())} for of_chain in log_evidence]
    collected = {name: np.asarray(value) for name, value in extra.items() if np.ndim(value) == 1}
    return PosteriorDraws(approx, start, sampled, summed, {}, log_evidence, quality, collected)


def _concatenate(*parts: np.ndarray) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def weighed(
    drawn: WeightedDraw, approx: Approximation, is_fixed: bool, rng_key: Array, num_samples: int | None
) -> tuple[Arrays, Arrays, np.ndarray, dict[str, float]]:
    """Latents and log-weights of draws, resampled unless ``num_samples`` is None; and what the weights say.

    :param is_fixed: whether these are point estimates, which have no evidence.
    :return: latents, log-densities and log-weights, the log evidence of each element, and how good the weights were.
    """
    shape = drawn.log_weight.shape[1:]
    flat = drawn.log_weight.reshape(len(drawn.log_weight), -1)
    smoothed, k = weights.pareto_smooth(flat)
    log_evidence = np.full(flat.shape[1], np.nan) if is_fixed else weights.of_elements(weights.log_mean, flat)
    quality = {
        "log_evidence": float(log_evidence.sum()),
        "pareto_k": float(k.max()),
        "ess": float(weights.of_elements(weights.effective_sample_size, flat).min()),
    }
    latents: dict[str, Any] = drawn.values
    stats = {"log_weight": drawn.log_weight, "log_p": drawn.log_p, "log_q": drawn.log_q}
    if num_samples is not None:
        index = weights.resample(rng_key, smoothed, num_samples).reshape(num_samples, *shape)
        dims = approx.event_dims
        latents = {name: take(value, index, dims[name]) for name, value in latents.items()}
        stats = {name: take(value, index) for name, value in stats.items()}
    return latents, stats, log_evidence.reshape(shape).astype(np.float32), quality
