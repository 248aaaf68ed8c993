# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Recover what all starts have lost, where defensive draws found it.

The weighted pooled draws stand for the posterior with what the guides lack. So a guide is fitted to them (*wake* steps
[1]: ascend :math:`\sum_i \log q(z_i)` over resampled draws), and goes on from there by ordinary steps at power 1, from
as many keys as there are starts. The starts are then replaced by those of these sets whose pooled draws have the
largest effective sample size: the starts as they were, the new ones, and halves of two of starts, new ones, and guides
after wake steps alone, which are the widest.

1. Bornschein and Bengio 2015, *Reweighted Wake-Sleep*, ICLR, arXiv 1406.2751, for steps of this kind
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.optim import Adam

from numpyro_vimco.control_flow import Given
from numpyro_vimco.guides.units import RealInUnits
from numpyro_vimco.posterior import weights
from numpyro_vimco.posterior.chunks import compiled
from numpyro_vimco.posterior.defence import blocks_of
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.pooling import pooled, propose_pooled
from numpyro_vimco.posterior.proposals import Draw, take
from numpyro_vimco.posterior.renewing import RenewedUnits
from numpyro_vimco.posterior.results import FitResult, FitState
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
    svi: SVI,
    rng_key: Array,
    result: FitResult,
    go_on: Callable[[FitState], FitState],
    units: dict[str, RealInUnits],
    args: tuple,
    kwargs: dict,
    progress: str | None,
) -> FitResult:
    """A fit without what its starts lost, as far as defensive draws found it; the same fit where they found nothing.

    :param go_on: from the first state of some starts to that after ordinary steps.
    :param progress: name of the progress bar; None for no bar.
    """
    keys = split_by_name(rng_key, ("draws", "resampling", "steps", "choice"))
    fit = Fitted.of(svi, result, args, kwargs)
    if fit.of_model:  # each start has a posterior of its own
        return result
    draws = _draws(fit, keys["draws"], progress)
    if lost_share(draws) <= LOST:
        return result
    num_starts = len(result.failed)
    params = jax.jit(lambda state: svi.optim.get_params(state))(result.best.state.optim_state)
    woken = _wake(svi, fit, params, _resampled(fit, keys["resampling"], draws), units)
    new_keys = split(keys["steps"], num_starts)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_starts), woken)
    wide = SVIState(jax.vmap(svi.optim.init)(many), result.svi_states.mutable_state, new_keys)
    state = result.state._replace(
        svi=wide, step=jnp.array(0), anneal_steps=jnp.zeros(num_starts, int), failed=jnp.zeros(num_starts, bool)
    )
    state = go_on(state)
    new = jax.tree.map(lambda x, y: jnp.where(_like(state.failed, x), y, x), state.svi, wide)
    old, best, largest = result.svi_states, result, _ess(draws)
    for states in (new, _halves(old, new), _halves(new, wide), _halves(old, wide)):
        params = jax.vmap(svi.get_params)(states)
        other = result._replace(svi_states=states, params=params, failed=np.zeros(num_starts, bool), recovered=True)
        if (ess := _ess(_draws(Fitted.of(svi, other, args, kwargs), keys["choice"], progress))) > largest:
            best, largest = other, ess
    return best


def lost_share(draws: Draw) -> float:
    """The share of the posterior that the defence proposes, beyond the guides; of the worst element."""
    weight = np.exp(draws.log_weight.astype(float) - draws.log_weight.max(0))
    return float(np.max(1 - (weight * np.exp(draws.log_guide_share)).sum(0) / weight.sum(0)))


def _draws(fit: Fitted, rng_key: Array, progress: str | None) -> Draw:
    return propose_pooled(pooled(fit), rng_key, POOLED, progress)


def _ess(draws: Draw) -> float:
    """Of the worst element."""
    return float(weights.effective_sample_size(draws.log_weight.reshape(len(draws.log_weight), -1).astype(float)).min())


def _resampled(fit: Fitted, rng_key: Array, draws: Draw) -> Params:
    """Draws of the posterior, by latent."""
    shape = draws.log_weight.shape[1:]
    flat = draws.log_weight.reshape(len(draws.log_weight), -1)
    index = weights.resample(rng_key, flat, RESAMPLED).reshape(RESAMPLED, *shape)
    return {name: take(value, index, fit.event_dims[name]) for name, value in draws.values.items()}


def _wake(svi: SVI, fit: Fitted, params: Params, latents: Params, units: dict[str, RealInUnits]) -> Params:
    """Unconstrained parameters of the guide that is nearest to draws of the posterior, from others."""
    blocks = blocks_of(fit)
    values = {}
    for name, block in blocks.items():
        values[name] = jax.vmap(block.pack)(latents) if block.pack else latents[name]
    masks = {name: mask_of(site["fn"]) for name, site in fit.latents().items()}

    def log_density(params: Params, values: Params) -> Array:
        guide = substitute(Given(seed(svi.guide, jax.random.key(0)), values), data=params)
        guide_trace = trace(guide).get_trace(*fit.args, **fit.kwargs)
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

    return compiled(steps, params)(params)


def _halves(first: SVIState, second: SVIState) -> SVIState:
    """Every other start from the second."""
    return jax.tree.map(lambda x, y: jnp.where(_like(jnp.arange(len(x)) % 2 == 0, x), x, y), first, second)


def _like(condition: Array, x: Array) -> Array:
    return condition.reshape(-1, *(1,) * (x.ndim - 1))
