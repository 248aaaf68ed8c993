# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Draws from a fitted guide with their importance weights.

Weights are as in the objective of the fit: one for each element of the plates that are common to all sites. Where a
plate has local particles, one of them is drawn for each element in proportion to its local weight. The draw with the
chosen particles is then properly weighted by Ẑ, the weight of the shared sites times the mean local weight of each
element (``docs/mathematics.md``).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import biject_to
from numpyro.handlers import substitute

from numpyro_vimco.objectives import control_variates as cv
from numpyro_vimco.objectives.elements import check_elements, may_be_dependent
from numpyro_vimco.objectives.plates import Structure, aligned_shape
from numpyro_vimco.objectives.program import Program
from numpyro_vimco.posterior.chunks import chunks, in_chunks
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.weights import WeightStream, WeightSummary
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import is_discrete, is_latent_site, sample_sites

# Draws of at most this number of continuous coordinates are kept, to look for correlations among them.
CORRELATED_SIZE = 64


@dataclass(frozen=True)
class Proposals:
    """N draws from a guide.

    :ivar values: values of each latent, of shape ``(N, *batch, *event)``.
    :ivar log_p: log p(x, z) in nats, of shape ``(N, *plates)``, of size 1 where a plate is not common to all sites.
    :ivar log_q: log q(z) in nats, of the same shape.
    :ivar log_weight: log-weights in nats, of the same shape: log_p - log_q without local particles, else log Ẑ.
    :ivar structure: which plates are common to all sites.
    """

    values: dict[str, np.ndarray]
    log_p: np.ndarray
    log_q: np.ndarray
    log_weight: np.ndarray
    structure: Structure


@dataclass(frozen=True)
class Weighed:
    """The weights of a guide's draws, without most of the draws.

    :ivar summary: summary of the weights of each element.
    :ivar shape: sizes of the plates that are common to all sites, whose elements have weights of their own; () where
        weights are joint.
    :ivar log_weight: the log-weights in nats, of shape ``(draws,)``, where they are joint; else None.
    :ivar continuous: draws of the first continuous latents that are in no plate, in unconstrained space, of shape
        ``(draws, coordinates)``; without coordinates where weights are not joint.
    :ivar coordinates: names of these coordinates.
    """

    summary: WeightSummary
    shape: tuple[int, ...]
    log_weight: np.ndarray | None
    continuous: np.ndarray
    coordinates: list[str]


def propose(fit: Fitted, rng_key: Array, num_proposals: int, progress: str | None = None) -> Proposals:
    """Draw from the guide.

    :param progress: name of the progress bar; None for no bar.
    :raises ValueError: for NaN weights, and where all are zero.
    """
    particle, structure = _particle(fit)
    keys = split(rng_key, num_proposals)
    values, log_p, log_q, log_weight = in_chunks(particle, fit.chunk_size(), keys, progress=progress)
    nan = np.isnan(log_weight).reshape(num_proposals, -1).any(1).sum()
    _check_weights(int(nan), bool(np.isneginf(log_weight).all(0).any()), num_proposals)
    return Proposals(values, log_p, log_q, log_weight, structure)


def weigh(fit: Fitted, rng_key: Array, num_draws: int, progress: str | None = None) -> Weighed:
    """Draw from the guide, and keep only a summary of the weights.

    :param progress: name of the progress bar; None for no bar.
    :raises ValueError: as :func:`propose`.
    """
    particle, structure = _particle(fit)
    sizes = _plate_sizes(fit)
    shape = tuple(sizes[name] for name in plate_names(fit, structure.dims))
    coordinates = _coordinates(fit) if not shape else {}

    def weight(rng_key):
        values, _, _, log_weight = particle(rng_key)
        unconstrained = [biject_to(fit.model_trace[name]["fn"].support).inv(values[name]) for name in coordinates]
        return log_weight, jnp.concatenate([jnp.zeros(0), *map(jnp.ravel, unconstrained)])

    stream = WeightStream(num_draws, int(np.prod(shape)))
    kept: list[np.ndarray] = []
    continuous, nan = [], 0
    for _, (log_weight, values) in chunks(weight, fit.chunk_size(), split(rng_key, num_draws), progress=progress):
        log_weight = log_weight.reshape(len(log_weight), -1)
        if not shape:
            log_weight = log_weight.astype(float)
        nan += int(np.isnan(log_weight).any(1).sum())
        if nan:
            continue
        stream.add(log_weight)
        continuous.append(values)
        if not shape:
            kept.append(log_weight[:, 0])
    _check_weights(nan, not nan and stream.has_zero(), num_draws)
    return Weighed(
        stream.summary(),
        shape,
        np.concatenate(kept) if not shape else None,
        np.concatenate(continuous),
        [name for names in coordinates.values() for name in names],
    )


def _particle(fit: Fitted) -> tuple[Callable[[Array], tuple], Structure]:
    """A function from a key to one draw of the guide, with local particles chosen: the first four of `Proposals`."""
    program = program_of(fit, fit.plate_particles)
    structure = structure_of(program, fit)
    _check_independent(program, fit)

    def particle(rng_key: Array) -> tuple[dict[str, Array], Array, Array, Array]:
        program_key, choice_key = split(rng_key)
        levels, structure = program.propose(fit.params, program_key)
        choice_keys = split_by_name(choice_key, levels.local)
        values, densities = levels.shared
        log_p, log_q, log_weight = densities.model, densities.log_guide, densities.log_weight
        for plate, (local_values, local) in levels.local.items():
            log_weight = log_weight + structure.sum_to_shared(cv.log_mean_weight(local.log_weight))
            chosen = random.categorical(choice_keys[plate], local.log_weight, axis=0)[None]
            for name, value in local_values.items():
                values[name] = take(value, chosen, fit.model_trace[name]["fn"].event_dim)[0]
            log_p = log_p + structure.sum_to_shared(take(local.model, chosen)[0])
            log_q = log_q + structure.sum_to_shared(take(local.log_guide, chosen)[0])
        return values, log_p, log_q, log_weight

    return particle, structure


def squeezed(log_prob, kept: Collection[int], structure: Structure):
    """Log-densities of shape ``(…, *plates)`` without the dimensions of plates that are summed over.

    :param kept: the dimensions that are not summed over, negative.
    """
    return log_prob.squeeze(tuple(dim for dim in range(-structure.ndim, 0) if dim not in kept))


def plate_names(fit: Fitted, dims: Iterable[int], inside: str | None = None) -> list[str]:
    """Names of the plates at some dimensions, from left to right.

    :param inside: a plate; only plates of sites that are in it are named. Defaults to None: those of all sites.
    """
    stacks = [site["cond_indep_stack"] for site in sample_sites(fit.model_trace)]
    stacks = [stack for stack in stacks if inside is None or any(frame.name == inside for frame in stack)]
    names = {frame.dim: frame.name for stack in stacks for frame in stack if frame.dim in set(dims)}
    return [names[dim] for dim in sorted(names)]


def _plate_sizes(fit: Fitted) -> dict[str, int]:
    return {frame.name: frame.size for site in sample_sites(fit.model_trace) for frame in site["cond_indep_stack"]}


def _coordinates(fit: Fitted) -> dict[str, list[str]]:
    """Names of the coordinates of continuous latents that are in no plate, by site, as long as they are few."""
    found: dict[str, list[str]] = {}
    size = 0
    for name, site in fit.model_trace.items():
        if not is_latent_site(site) or is_discrete(site) or site["cond_indep_stack"]:
            continue
        shape = jax.eval_shape(biject_to(site["fn"].support).inv, site["value"]).shape
        size += int(np.prod(shape))
        if size <= CORRELATED_SIZE:
            found[name] = [name + (f"[{','.join(map(str, i))}]" if i else "") for i in np.ndindex(*shape)]
    return found


def _check_weights(nan: int, zero: bool, num_draws: int) -> None:
    """Raise unless there are importance weights to work with.

    :param nan: number of draws with a NaN weight.
    :param zero: whether all weights of an element are zero.
    :raises ValueError: for NaN weights, and where all are zero.
    """
    if nan:
        raise ValueError(
            f"{nan:,} of {num_draws:,} draws of the guide have a NaN weight: model or guide has a NaN "
            "log-density there. `jax.config.update('jax_debug_nans', True)` finds where."
        )
    if zero:
        raise ValueError(
            f"None of {num_draws:,} draws of the guide has a density under the model: the guide proposes nothing "
            "that the posterior holds. Look at the supports of both, and at what the data rule out."
        )


def can_have_particles(fit: Fitted, plate_particles: Mapping[str, int]) -> bool:
    """Whether plates can be named together in ``plate_particles``, at these parameters."""
    program = program_of(fit, plate_particles)
    try:
        structure_of(program, fit)
        _check_independent(program, fit)
    except ValueError:
        return False
    return True


def _check_independent(program: Program, fit: Fitted) -> None:
    """Raise for elements that have weights of their own and are not independent at the fitted parameters.

    :raises ValueError: naming the plate, or the masked latent, and a site.
    """
    kinds = program.kinds(fit.params, random.key(0))
    if (kinds.elements or kinds.masks) and may_be_dependent(program, fit.params, random.key(0)):
        check_elements(program, fit.params)


def structure_of(program: Program, fit: Fitted) -> Structure:
    """How the plates of a program combine densities, found without computing anything."""
    return jax.eval_shape(program.evaluate, fit.params, random.key(0))[1]


def program_of(fit: Fitted, plate_particles: Mapping[str, int], given: Mapping[str, Array] | None = None) -> Program:
    """A fit's model and guide as a program.

    :param given: values of latents, in place of those that the guide draws.
    """
    return Program(
        model=fit.svi.model,
        guide=substitute(fit.svi.guide, data=given) if given else fit.svi.guide,
        args=fit.args,
        kwargs=fit.kwargs,
        by_score=lambda site: False,
        plate_particles=plate_particles,
        joint_plates=getattr(fit.svi.loss, "joint_plates", frozenset()),
        linear=False,
    )


def take(values, index, event_dim: int = 0):
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
