# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Recover what all starts have lost, where defensive draws found it.

The weighted pooled draws stand for the posterior with what the guides lack. So a guide is fitted to them (*wake* steps
[1]: ascend :math:`\sum_i \log q(z_i)` over resampled draws), and goes on from there by ordinary steps at β = 1, from
as many keys as there are starts. The starts are then replaced by those of these sets whose pooled draws have the
largest effective sample size: the starts as they were, the new ones, and halves of two of starts, new ones, and guides
after wake steps alone, which are the widest.

1. Bornschein and Bengio 2015, *Reweighted Wake-Sleep*, ICLR, arXiv 1406.2751, for steps of this kind
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.svi import SVIState
from numpyro.optim import Adam

from numpyro_vimco.compilation import Compiled
from numpyro_vimco.control_flow import Given
from numpyro_vimco.draws import weights
from numpyro_vimco.draws.approximation import Approximation, one_start
from numpyro_vimco.draws.defence import blocks_of
from numpyro_vimco.draws.pooling import propose_pooled
from numpyro_vimco.draws.proposals import WeightedDraw, take
from numpyro_vimco.families.units import RealInUnits
from numpyro_vimco.fitting.renewing import RenewedUnits
from numpyro_vimco.fitting.state import FitState, Starts
from numpyro_vimco.fitting.steps import where_start
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import log_prob_at_value, mask_of

# Guides have lost something where more than this share of the posterior is proposed by their defence.
LOST = 0.2
# Guides of fewer steps have not found what they can hold.
LEAST_STEPS = 200
# Pooled draws that this is judged by, and draws of the posterior that wake steps see.
POOLED, RESAMPLED = 4096, 1024
# Wake steps of Adam, and its learning rate, which falls to 0 by a cosine.
WAKE_STEPS, RATE = 400, 0.03

Params = dict[str, Any]


def recovered(
    approx: Approximation,
    rng_key: Array,
    starts: Starts,
    state: FitState,
    go_on: Callable[[FitState], FitState],
    units: dict[str, RealInUnits],
    progress: str | None,
) -> Starts:
    """Starts without what they lost, as far as defensive draws found it; the same ones where they found nothing.

    :param approx: of the starts that did not fail.
    :param state: of the fit.
    :param go_on: from the first state of some starts to that after ordinary steps.
    :param progress: name of the progress bar; None for no bar.
    """
    if approx.params_of_model:  # each start has a posterior of its own
        return starts
    svi, num_starts = approx.svi, len(starts)
    keys = split_by_name(rng_key, ("draws", "resampling", "steps", "choice"))
    draws = propose_pooled(approx, keys["draws"], POOLED, progress)
    if lost_share(draws) <= LOST:
        return starts
    old = starts.svi_states
    assert old is not None
    best = one_start(old, starts.best)
    params = jax.jit(lambda state: svi.optim.get_params(state))(best.optim_state)
    woken = _wake(approx, params, _resampled(approx, keys["resampling"], draws), units)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_starts), woken)
    wide = SVIState(jax.vmap(svi.optim.init)(many), old.mutable_state, split(keys["steps"], num_starts))
    none = jnp.zeros(num_starts, int)
    state = go_on(state._replace(svi=wide, step=jnp.array(0), tempering_steps=none, failed=jnp.zeros(num_starts, bool)))
    new = jax.tree.map(partial(where_start, state.failed), wide, state.svi)
    found, largest = starts, _ess(draws)
    for states in (new, _halves(old, new), _halves(new, wide), _halves(old, wide)):
        params = jax.vmap(svi.get_params)(states)
        draws = propose_pooled(approx.at(params, num_starts), keys["choice"], POOLED, progress)
        if (ess := _ess(draws)) > largest:
            failed = np.zeros(num_starts, bool)
            found, largest = replace(starts, svi_states=states, params=params, failed=failed, recovered=True), ess
    return found


def lost_share(draws: WeightedDraw) -> float:
    """The share of the posterior that the defence proposes, beyond the guides; of the worst element."""
    weight = np.exp(draws.log_weight.astype(float) - draws.log_weight.max(0))
    return float(np.max(1 - (weight * np.exp(draws.log_guide_share)).sum(0) / weight.sum(0)))


def _ess(draws: WeightedDraw) -> float:
    """Of the worst element."""
    return float(weights.effective_sample_size(draws.log_weight.reshape(len(draws.log_weight), -1).astype(float)).min())


def _resampled(approx: Approximation, rng_key: Array, draws: WeightedDraw) -> Params:
    """Draws of the posterior, by latent."""
    shape = draws.log_weight.shape[1:]
    flat = draws.log_weight.reshape(len(draws.log_weight), -1)
    index = weights.resample(rng_key, flat, RESAMPLED).reshape(RESAMPLED, *shape)
    return {name: take(value, index, approx.event_dims[name]) for name, value in draws.values.items()}


def _wake(approx: Approximation, params: Params, latents: Params, units: dict[str, RealInUnits]) -> Params:
    """Unconstrained parameters of the guide that is nearest to draws of the posterior, from others."""
    svi, blocks = approx.svi, blocks_of(approx)
    values = {}
    for name, block in blocks.items():
        values[name] = jax.vmap(block.pack)(latents) if block.pack else jnp.asarray(latents[name])
    masks = {name: mask_of(site["fn"]) for name, site in approx.latents().items()}

    def log_density(params: Params, values: Params) -> Array:
        guide = substitute(Given(seed(svi.guide, jax.random.key(0)), values), data=params)
        guide_trace = trace(guide).get_trace(*approx.args, **approx.kwargs)
        unmasked = [guide_trace[name] for name in blocks if masks.get(name) is None]
        return jnp.sum(jnp.stack([jnp.sum(log_prob_at_value(site)) for site in unmasked]))

    def loss(params: Params) -> tuple[Array, None]:
        constrained = svi.constrain_fn(params)
        return -jnp.mean(jax.vmap(lambda x: log_density(constrained, x))(values)), None

    optim = RenewedUnits(Adam(lambda i: RATE * 0.5 * (1 + jnp.cos(jnp.pi * i / WAKE_STEPS))), units, svi.constrain_fn)

    def steps(params: Params) -> Params:
        state = optim.inner.init(params)
        return optim.get_params(
            jax.lax.fori_loop(0, WAKE_STEPS, lambda _, state: optim.eval_and_stable_update(loss, state)[1], state)
        )

    return Compiled(steps)(params)


def _halves(first: SVIState, second: SVIState) -> SVIState:
    """Every other start from the second."""
    return jax.tree.map(lambda x, y: where_start(jnp.arange(len(x)) % 2 == 0, x, y), first, second)
