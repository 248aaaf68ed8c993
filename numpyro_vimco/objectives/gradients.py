# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Particles in, a bound with its gradient attached out.

:func:`estimate` has the bound and its gradient from :class:`Particles`. These come from one of two functions:
:func:`one_pass` differentiates the log-densities of the particles, :func:`doubly_reparameterized` their log-weights and
their samples. In both, the weights of :func:`weigh` multiply the derivatives.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_vimco.checks.supports_and_plates import second_derivative_error
from numpyro_vimco.densities.densities import Draws
from numpyro_vimco.densities.levels import Levels, map_levels
from numpyro_vimco.densities.plates import Structure, aligned_shape
from numpyro_vimco.densities.program import Program
from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.objectives.paths import path_shares


class Weights(NamedTuple):
    """What multiplies the derivatives of one level; arrays of shape (N, *plates), or (N, M, *plates) for a named plate.

    Those of a chain have the shape (N, K, T, L, *plates), with L of size 1 where it is not a share: V_jtk, the share of
    the paths through sample k of step t, is in the place of V_jim.

    :ivar share: W_j, or u_jim = W_j V_jim; of a chain, W_j times the share of the paths through both samples.
    :ivar signal: s_j, or s_jim.
    :ivar path_factor: r_j = α + (1-α) W_j, or r_jim = V_jim r_j.
    """

    share: Array
    signal: Array
    path_factor: Array


def weigh(
    log_weights: Levels[Array], structure: Structure, alpha: float, score_signal: Callable
) -> tuple[Float[Array, ""], Levels[Weights]]:
    """The bound in nats, and the weights of each level. Scales of subsampled plates are in shares and signals.

    :param log_weights: in nats, of shape (N, *plates), (N, M, *plates) for a named plate, and (N, K, T, L, *plates) for
        a chain.
    :param structure: how the plates combine log-densities.
    :param score_signal: from the log-weights of whole particles to their signals, of the same shape.
    """
    total = log_weights.shared  # becomes log Ẑ_j, the log-weight of particle j with all its local particles
    chains, shares_of_paths = dict(structure.chains), {}
    for name, local in log_weights.local.items():
        if name in chains:
            elements, shares_of_paths[name] = jax.vmap(partial(path_shares, reverse=chains[name]))(local)
        else:
            elements = jax.vmap(cv.log_mean_weight)(local)
        total = total + structure.local_scale(name) * structure.sum_to_shared(elements)
    all_zero = jnp.all(jnp.isneginf(total), axis=0)

    def scaled(weight: Array, scale: float = structure.scale) -> Array:
        # Where all weights are zero, no direction is better than another: the gradient is 0.
        lead = (1,) * (weight.ndim - all_zero.ndim)
        return jnp.where(all_zero.reshape(lead + all_zero.shape), 0, scale * weight)

    share, path_factor = cv.normalized_weights(total, alpha), cv.path_factor(total, alpha)
    weights = Levels(Weights(scaled(share), scaled(score_signal(total)), path_factor), {})
    log_others = cv.log_one_minus_share(total, alpha)
    for name, local in log_weights.local.items():
        of_paths = shares_of_paths.get(name)
        local_share = (
            jax.vmap(partial(cv.normalized_weights, alpha=0.0))(local) if of_paths is None else of_paths.sum(3)
        )
        signal = jax.vmap(partial(cv.local_vimco_star_signal, alpha=alpha))
        local_scale = structure.level_scale(name)
        of_level = Weights(
            share=scaled(_over(share, local_share) * local_share, local_scale),
            # Weights of samples in proportion to the paths through them: 1 - V is then a sum over the other samples.
            signal=scaled(signal(log_others, share, local if of_paths is None else jnp.log(local_share)), local_scale),
            path_factor=_over(path_factor, local_share) * local_share,
        )
        if of_paths is not None:
            share_of_pairs = scaled(_over(share, of_paths) * of_paths, local_scale)
            of_level = Weights(share_of_pairs, of_level.signal[:, :, :, None], of_level.path_factor[:, :, :, None])
        weights.local[name] = of_level
    return structure.scale * jnp.sum(cv.vr_iwae_bound(total, alpha)), weights


def _over(weight: Array, like: Array) -> Array:
    """A weight of shape (N, *plates), to be multiplied with one that has axes of local particles before the plates."""
    return weight.reshape(weight.shape[:1] + (1,) * (like.ndim - weight.ndim) + weight.shape[1:])


class Particles(NamedTuple):
    """Some particles, evaluated.

    :ivar log_weights: in nats, of shape (n, *plates), or (n, M, *plates) for a named plate; without gradients.
    :ivar structure: how the plates combine log-densities.
    :ivar weighted: from weights of the same shape to tensors and their cotangents: see :func:`with_gradient`. The sum
        of the cotangents times the derivatives of the tensors is these particles' part of the bound's derivative.
    """

    log_weights: Levels[Array]
    structure: Structure
    weighted: Callable[[Levels[Weights]], tuple[Any, Any]]


def estimate(
    evaluate: Callable, params: dict[str, Any], keys: Array, weigh: Callable, chunk_size: int | None, shard: Callable
) -> Float[Array, ""]:
    """The bound in nats, with its gradient.

    In chunks, a first pass computes log-weights only. The second evaluates each chunk once more, for its gradient. Its
    value is a sum of zeros, so that the compiler drops it where nothing is differentiated.

    :param evaluate: from parameters and the keys of some particles to :class:`Particles`.
    :param weigh: :func:`weigh` of the objective: from log-weights and the structure of plates to the bound and weights.
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
    """Plain pathwise gradients: each log-density of :class:`Densities` takes a cotangent of its own.

    :param vectorize: maps a function over particles.
    :param cotangents: from the weights of a level to the cotangents of its densities.
    """
    densities, structure = vectorize(partial(program.evaluate, params), keys)
    for name in program.chains:
        # The density of a sample is the same for all samples of the step before.
        of_samples = jax.tree.map(lambda x: x[:, :, :, :1], densities.local[name])
        densities.local[name] = of_samples._replace(model=densities.local[name].model)
    log_weights = map_levels(lambda level: stop_gradient(level.log_weight), densities)
    return Particles(log_weights, structure, lambda weights: (densities, map_levels(cotangents, weights)))


class _Samples(NamedTuple):
    """Draws of all particles, in two stages: the shared sites, then the local ones given them.

    :ivar shared: of the sites outside of named plates.
    :ivar local: for each named plate, of its sites.
    :ivar local_differentiable: :func:`_differentiable` of ``local``, functions of the parameters and of the shared
        path samples.
    :ivar into_shared: from cotangents of ``local_differentiable`` to cotangents of the shared path samples.
    """

    shared: Draws
    local: dict[str, Draws]
    local_differentiable: dict[str, dict[str, Array]]
    into_shared: Callable[[dict[str, dict[str, Array]]], dict[str, Array]]


def _sample(program: Program, vectorize: Callable, params: dict[str, Any], keys: Array, has_masks: bool) -> _Samples:
    """Draw all particles, differentiable with respect to ``params``."""
    shared = vectorize(lambda key: program.draw(params, key, has_masks).shared, keys)
    values = {name: stop_gradient(draw.value) for name, draw in shared.items()}

    def draw_local(shared_path):
        if not program.local:
            return {}, {}
        given = {**values, **shared_path}
        local = vectorize(lambda pair: program.draw_local(params, pair[0], pair[1], has_masks), (keys, given))
        return {plate: _differentiable(draws) for plate, draws in local.items()}, local

    shared_path = {name: values[name] for name, draw in shared.items() if draw.is_path}
    local_differentiable, pull, local = jax.vjp(draw_local, shared_path, has_aux=True)
    return _Samples(shared, local, local_differentiable, lambda cotangents: pull(cotangents)[0])


def doubly_reparameterized(
    program: Program, vectorize: Callable, has_masks: bool, params: dict[str, Any], keys: Array
) -> Particles:
    """Doubly reparameterised gradients of path sites [1], for local particles derived in this project.

    Log-weights are functions of the parameters and of the samples; samples are drawn at fixed noise, as functions of
    the parameters, local ones also of the shared path samples. Their derivatives, and those of the log-density log q
    that a score-function sample is drawn from, take the weights of this table. W is the share of the log-weight that is
    differentiated, W_j or u_jim; r and s are path factor and signal as in :class:`Weights`.

    ======================================================= ================= ===============================
    derivative with respect to                              of log-weights    of log q (score-function sites)
    ======================================================= ================= ===============================
    parameters, at given samples                            W
    parameters, through the draw of a shared sample         r_j W             s_j
    parameters, through the draw of a local sample          r_jim W           s_jim
    shared path samples, through the draw of a local sample r_j W             s_j
    ======================================================= ================= ===============================

    The last row goes on to the parameters through the draw of the shared sample. It takes r_j and s_j, those of the
    sample that the derivative reaches: r_jim and s_jim would be biased there. ``docs/mathematics.md`` has the
    derivation.

    :param has_masks: of :meth:`Program.kinds`.

    1. Tucker et al. 2019, arXiv 1810.04152
    """
    samples = _sample(program, vectorize, params, keys, has_masks)
    draws = stop_gradient(Levels(samples.shared, samples.local))
    values = map_levels(lambda level: {name: draw.value for name, draw in level.items()}, draws)
    path_values = map_levels(lambda level: {name: draw.value for name, draw in level.items() if draw.is_path}, draws)

    def log_weights(params, path_values):
        given = map_levels(lambda values, path_values: {**values, **path_values}, values, path_values)
        return vectorize(lambda particle: program.log_weights(params, *particle), (keys, given))

    log_weight, pull, structure = jax.vjp(log_weights, stop_gradient(params), path_values, has_aux=True)

    def weighted(weights: Levels[Weights]) -> tuple[Any, Any]:
        # Row by row of the table. W is in the cotangents of path samples already.
        into_params, into_path = pull(map_levels(lambda level: level.share, weights))
        into_shared = _cotangents(samples.shared, into_path.shared, weights.shared, lead=1)
        into_local, local_into_shared = {}, {}
        for plate, local in samples.local.items():
            own, lead = weights.local[plate], 2
            if plate in program.chains:
                own, lead = Weights(own.share.sum(3), own.signal[:, :, :, 0], own.path_factor[:, :, :, 0]), 3
            signal, path_factor = (
                jnp.expand_dims(x, tuple(range(1, lead))) for x in (weights.shared.signal, weights.shared.path_factor)
            )
            of_shared = own._replace(signal=signal, path_factor=path_factor)
            into_local[plate] = _cotangents(local, into_path.local[plate], own, lead)
            local_into_shared[plate] = _cotangents(local, into_path.local[plate], of_shared, lead)
        for name, cotangent in samples.into_shared(local_into_shared).items():
            into_shared[name] += cotangent
        tensors = params, _differentiable(samples.shared), samples.local_differentiable
        return tensors, (into_params, into_shared, into_local)

    return Particles(log_weight, structure, weighted)


def _differentiable(draws: Draws) -> dict[str, Array]:
    """The value of each path sample, and the log-density log q of each score-function sample."""
    return {name: draw.differentiable for name, draw in draws.items()}


def _cotangents(draws: Draws, path_cotangents: dict[str, Array], weights: Weights, lead: int) -> dict[str, Array]:
    """Cotangents of :func:`_differentiable`: of a path sample, r times its cotangent; of a log-density log q, s.

    :param path_cotangents: the derivatives of the log-weights with respect to path samples, W included.
    :param lead: number of leading axes: 1 for shared samples, 2 for those of a named plate, 3 for those of a chain.
    """

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
            # At a sample of weight zero the derivative may be infinite, and its product with the weight NaN.
            cotangents[name] = jnp.where(share == 0, 0, factor * cotangent)
        else:
            cotangents[name] = aligned(weights.signal, draw.differentiable, 0)
    return cotangents


@jax.custom_jvp
def with_gradient(value: Array, tensors: Any, cotangents: Any) -> Array:
    """``value``, with the derivative Σ cotangents · d tensors.

    The cotangents multiply the derivatives of the tensors, and never the tensors themselves: for a particle of weight
    zero that would be 0 · -inf. A rule for the JVP serves both reverse and forward mode.
    """
    return value


@with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    value, tensors, cotangents = primals
    _, dots, _ = tangents
    value, cotangents = _first_derivative_only((value, cotangents), tensors)
    products = jax.tree.map(lambda cotangent, dot: jnp.sum(cotangent * dot), cotangents, dots)
    return value, jnp.asarray(sum(jax.tree.leaves(products)), value.dtype)


@jax.custom_jvp
def _first_derivative_only(x: Any, tensors: Any) -> Any:
    """``x``, which raises where it is differentiated, be it with respect to ``x`` or to ``tensors``."""
    return x


@_first_derivative_only.defjvp
def _first_derivative_only_jvp(primals, tangents):
    raise second_derivative_error()
