# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Particles in, a bound with its gradient attached out.

:func:`estimate` weighs the particles, and then pulls the weights back through what the particles were computed from:
their log-densities (:func:`one_pass`), or their samples as well (:func:`doubly_reparameterized`). Each of these two
gives :class:`Particles`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.objectives.densities import Draws, Program
from numpyro_vimco.objectives.plates import Levels, Structure, aligned_shape, map_levels


class Weights(NamedTuple):
    """What the gradients of one level are weighted with; of shape (N, *plates), or (N, M, *plates) if local.

    :ivar share: W_j, or u_jim = W_j V_jim.
    :ivar signal: s_j, or s_jim.
    :ivar path_factor: r_j = α + (1-α) W_j, or r_jim = V_jim r_j.
    """

    share: Array
    signal: Array
    path_factor: Array


def weigh(
    log_weights: Levels[Array], structure: Structure, alpha: float, score_signal: Callable
) -> tuple[Float[Array, ""], Levels[Weights]]:
    """The bound in nats, and the weights of each level. Scales of subsampled plates are in shares and signals."""
    total = log_weights.shared  # the logarithm of the design's Ẑ_j
    for name, local in log_weights.local.items():
        elements = jax.vmap(cv.log_mean_weight)(local)
        total = total + structure.local_scale[name] * structure.sum_to_shared(elements)
    nothing = jnp.all(jnp.isneginf(total), axis=0)

    def scaled(weight: Array, scale: float = structure.scale) -> Array:
        # Where all weights are zero there is no direction to go: no gradient.
        return jnp.where(nothing, 0, scale * weight)

    share, path_factor = cv.normalized_weights(total, alpha), cv.path_factor(total, alpha)
    weights = Levels(Weights(scaled(share), scaled(score_signal(total)), path_factor), {})
    for name, local in log_weights.local.items():
        local_share = jax.vmap(partial(cv.normalized_weights, alpha=0.0))(local)
        signal = jax.vmap(partial(cv.local_vimco_star_signal, alpha=alpha))
        local_scale = structure.level_scale(name)
        weights.local[name] = Weights(
            share=scaled(share[:, None] * local_share, local_scale),
            signal=scaled(signal(cv.log_one_minus_share(total, alpha), share, local), local_scale),
            path_factor=path_factor[:, None] * local_share,
        )
    return structure.scale * jnp.sum(cv.vr_iwae_bound(total, alpha)), weights


class Particles(NamedTuple):
    """Some particles, evaluated.

    :ivar log_weights: in nats, of shape (n, *plates), or (n, M, *plates) if local; without gradients.
    :ivar structure: how their plates combine.
    :ivar weighted: from weights of the same shape to tensors and cotangents, whose products with the tensors'
        derivatives sum to the particles' part of the bound's derivative.
    """

    log_weights: Levels[Array]
    structure: Structure
    weighted: Callable[[Levels[Weights]], tuple[Any, Any]]


def estimate(
    evaluate: Callable, params: dict[str, Any], keys: Array, weigh: Callable, chunk_size: int | None, shard: Callable
) -> Float[Array, ""]:
    """The bound in nats, with its gradient.

    In chunks, a first pass computes log-weights only. The second evaluates each chunk once more, to pull its weights
    back, and is a sum of zeros with gradients: without differentiation, the compiler drops it.

    :param evaluate: from parameters and the keys of some particles to :class:`Particles`.
    :param weigh: from log-weights and plates to the bound and weights.
    :param chunk_size: number of particles evaluated at a time, or None for all.
    :param shard: spreads keys of particles over devices.
    """
    if chunk_size is None:
        particles = evaluate(params, shard(keys))
        bound, weights = weigh(particles.log_weights, particles.structure)
        return with_gradient(bound, *particles.weighted(weights))

    # A chunk takes every n-th particle, so that devices that hold neighbours hold an equal part of each chunk.
    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(chunk_size, -1, *x.shape[1:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(keys.shape[0], *x.shape[2:])

    def log_weights_of_chunk(keys):
        return evaluate(stop_gradient(params), shard(keys))[:2]

    @partial(jax.checkpoint, prevent_cse=False)  # nothing is kept from the forward pass
    def gradient_of_chunk(chunk):
        keys, weights = chunk
        return with_gradient(jnp.zeros_like(bound), *evaluate(params, shard(keys)).weighted(weights))

    chunks = split(keys)
    log_weights, structure = jax.lax.map(log_weights_of_chunk, chunks)
    bound, weights = weigh(jax.tree.map(join, log_weights), structure)
    return bound + jnp.sum(jax.lax.map(gradient_of_chunk, (chunks, jax.tree.map(split, weights))))


def one_pass(
    program: Program, vectorize: Callable, cotangents: Callable, params: dict[str, Any], keys: Array
) -> Particles:
    """Plain pathwise gradients: each log-density takes a cotangent of its own.

    :param cotangents: from the weights of a level to its densities' cotangents.
    """
    densities, structure = vectorize(partial(program.evaluate, params), keys)
    log_weights = map_levels(lambda level: stop_gradient(level.log_weight), densities)
    return Particles(log_weights, structure, lambda weights: (densities, map_levels(cotangents, weights)))


def doubly_reparameterized(program: Program, vectorize: Callable, params: dict[str, Any], keys: Array) -> Particles:
    """Doubly reparameterised gradients of path sites [1], for local particles derived in this project.

    A derivative takes the weights of the level of the sample that it flows into, not of the density that it comes
    from. So the shared samples are drawn first, and the local samples as a function of them; what flows through
    the local sampler into the shared samples is pulled back here, with the weights of these.

    1. Tucker et al. 2019, arXiv 1810.04152
    """
    shared = vectorize(lambda key: program.draw(params, key).shared, keys)
    shared_values = {name: stop_gradient(draw.value) for name, draw in shared.items()}

    def draw_local(shared_path):
        if not program.plate_particles:
            return {}, {}
        given = {**shared_values, **shared_path}
        local = vectorize(lambda particle: program.draw_local(params, *particle), (keys, given))
        return {plate: _differentiable(draws) for plate, draws in local.items()}, local

    shared_path = {name: shared_values[name] for name, draw in shared.items() if draw.is_path}
    local_differentiable, pull_into_shared, local = jax.vjp(draw_local, shared_path, has_aux=True)

    draws = stop_gradient(Levels(shared, local))
    values = map_levels(lambda level: {name: draw.value for name, draw in level.items()}, draws)
    path = map_levels(lambda level: {name: draw.value for name, draw in level.items() if draw.is_path}, draws)

    def log_weights(params, path):
        merged = map_levels(lambda values, path: {**values, **path}, values, path)
        return vectorize(lambda particle: program.log_weights(params, *particle), (keys, merged))

    level_weights, pull, structure = jax.vjp(log_weights, stop_gradient(params), path, has_aux=True)

    def weighted(weights):
        params_cotangent, path_cotangent = pull(map_levels(lambda level: level.share, weights))
        shared_cotangent = _cotangents(shared, path_cotangent.shared, weights.shared, lead=1)
        local_cotangent, into_shared = {}, {}
        for plate, draws in local.items():
            of_shared = Weights(weights.local[plate].share, *(w[:, None] for w in weights.shared[1:]))
            local_cotangent[plate] = _cotangents(draws, path_cotangent.local[plate], weights.local[plate], lead=2)
            into_shared[plate] = _cotangents(draws, path_cotangent.local[plate], of_shared, lead=2)
        for name, cotangent in pull_into_shared(into_shared)[0].items():
            shared_cotangent[name] += cotangent
        tensors = params, _differentiable(shared), local_differentiable
        return tensors, (params_cotangent, shared_cotangent, local_cotangent)

    return Particles(level_weights, structure, weighted)


def _differentiable(draws: Draws) -> dict[str, Array]:
    return {name: draw.differentiable for name, draw in draws.items()}


def _cotangents(draws: Draws, path_cotangents: dict[str, Array], weights: Weights, lead: int) -> dict[str, Array]:
    """Of each path sample, its cotangent times the path factor; of each score-function density, the signal."""

    def aligned(weight: Array, like: Array, event_dim: int) -> Array:
        # From (*lead, *plates) to (*lead, *batch, *event).
        shape = aligned_shape(weight.shape[lead:], like.ndim - lead - event_dim, event_dim)
        return jnp.broadcast_to(weight.reshape(weight.shape[:lead] + shape), like.shape)

    cotangents = {}
    for name, draw in draws.items():
        if draw.is_path:
            cotangent = path_cotangents[name]
            factor = aligned(weights.path_factor, cotangent, draw.event_dim)
            share = aligned(weights.share, cotangent, draw.event_dim)
            # The derivative at a sample of weight zero may be infinite.
            cotangents[name] = jnp.where(share == 0, 0, factor * cotangent)
        else:
            cotangents[name] = aligned(weights.signal, draw.differentiable, 0)
    return cotangents


@jax.custom_jvp
def with_gradient(value: Array, tensors: Any, cotangents: Any) -> Array:
    """``value``, with derivative Σ cotangents · d tensors.

    The cotangents are handed to the tensors' derivative and never multiplied with the tensors themselves, so that a
    particle of weight zero (0 · -inf) is harmless. A JVP serves reverse and forward mode.
    """
    return value


@with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    value, _, cotangents = primals
    _, dots, _ = tangents
    products = jax.tree.map(lambda cotangent, dot: jnp.sum(cotangent * dot), cotangents, dots)
    return value, sum(jax.tree.leaves(products)).astype(value.dtype)
