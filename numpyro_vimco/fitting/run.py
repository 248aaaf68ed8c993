# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Several fits of one posterior, side by side: :func:`run` takes the steps, recovers, and estimates evidences."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array
import numpy as np
from numpyro.infer import SVI

from numpyro_vimco.arguments import check_integer, warn
from numpyro_vimco.compilation import ONCE, Compiled
from numpyro_vimco.draws.approximation import Approximation, taken
from numpyro_vimco.draws.pooling import by_start, in_pool, pooled
from numpyro_vimco.draws.proposals import check_independent, fixed, program_of
from numpyro_vimco.draws.weights import log_mean, variance_of_log_mean
from numpyro_vimco.families.units import units_of
from numpyro_vimco.fitting.recovery import LEAST_STEPS, recovered
from numpyro_vimco.fitting.starts import initial_states
from numpyro_vimco.fitting.state import FitState, Starts
from numpyro_vimco.fitting.steps import Steps
from numpyro_vimco.fitting.tempering import OF_CHAINS, first_inverse_temperature, geometric
from numpyro_vimco.objectives.elbo import ImportanceWeightedELBO
from numpyro_vimco.randomness import split_into
from numpyro_vimco.sites import sample_sites

# Draws of each start's guide that its log evidence is estimated from: as many as small models have in a chunk, so that
# the diagnostics take the same program.
EVIDENCE_DRAWS = 4096

# Steps of less work than this are compiled by the older way of XLA, where it knows both: number of steps times elements
# of the largest arrays. `benchmarks/first_call.py` prints both ways on four posteriors, of 0.6 to 3 · 10⁸.
QUICK = 2**29

Tempering: TypeAlias = float | Sequence[float] | Callable


class Keys(NamedTuple):
    """Keys of the initial states, of evidences, of recovery, and of what the posterior draws."""

    init: Array
    evidence: Array
    recovery: Array
    posterior: Array


def keys_of(rng_key: Array) -> Keys:
    """What the key of a fit is split into."""
    return Keys(*split_into(rng_key, 4))


@dataclass(frozen=True)
class Settings:
    """How a fit goes: the arguments of :func:`~numpyro_vimco.fit`.

    :ivar num_steps: of which ``tempering`` is a share.
    """

    tempering: Tempering
    recover: bool
    stable_update: bool
    forward_mode_differentiation: bool
    vectorize_starts: bool
    start_sharding: Sharding | None
    num_steps: int


@dataclass(frozen=True)
class Fit:
    """A fit after some steps.

    :ivar approx: with the parameters of the starts that did not fail.
    :ivar state: to go on from.
    :ivar steps: of all starts, compiled.
    """

    approx: Approximation
    starts: Starts
    state: FitState
    steps: Steps
    settings: Settings
    rng_key: Array


def begin(
    svi: SVI, rng_key: Array, args: tuple, kwargs: dict, settings: Settings, num_starts: int, init_params: Any
) -> Fit:
    """A fit before its first step.

    :raises ValueError: as :func:`~numpyro_vimco.fit`.
    """
    num_starts = check_integer("num_starts", num_starts, 1, "so many fits run side by side")
    tempering_steps = _tempering_steps(settings.tempering, num_starts, settings.num_steps)
    states = initial_states(svi, keys_of(rng_key).init, num_starts, args, {"init_params": init_params, **kwargs})
    first = jax.device_put(np.float32(1))
    if tempering_steps.max() > 0:
        if getattr(svi.loss, "chain_particles", {}):
            first = jax.device_put(np.float32(OF_CHAINS))
        else:
            all_kwargs = {**svi.static_kwargs, **kwargs}
            first = first_inverse_temperature(svi.model, args, all_kwargs, getattr(svi.loss, "joint_plates", ()))
    step = np.zeros((), tempering_steps.dtype)
    counts = jax.device_put((step, tempering_steps, first, np.zeros(num_starts, bool)))
    state = FitState(states, *counts)
    return _checked(svi, rng_key, args, kwargs, settings, state)


def go_on_from(svi: SVI, rng_key: Array, args: tuple, kwargs: dict, settings: Settings, state: Any) -> Fit:
    """A fit at the state of an earlier one.

    :raises ValueError: as :func:`~numpyro_vimco.fit`.
    """
    if not isinstance(state, FitState):
        raise ValueError(
            f"`init_state` is of type {type(state).__name__}, but must be the `state` of a posterior that `fit` "
            "returned. `svi.run` goes on from the state of a single fit."
        )
    if not callable(settings.tempering) and (np.asarray(state.tempering_steps) < 0).any():
        raise ValueError(
            f"`tempering` is {settings.tempering!r}, but `init_state` is of a fit whose inverse temperature was a "
            "function of the step, which a state does not hold. Pass the function again."
        )
    if svi.constrain_fn is None:
        svi.init(keys_of(rng_key).init, *args, **kwargs)
    return _checked(svi, rng_key, args, kwargs, settings, state)


def _checked(svi: SVI, rng_key: Array, args: tuple, kwargs: dict, settings: Settings, state: FitState) -> Fit:
    num_starts = len(state.failed)
    params_of = _params_of(svi)
    params = params_of(state.svi)
    kept = np.flatnonzero(~np.asarray(state.failed))
    approx = Approximation.of(svi, taken(params, kept), len(kept), args, kwargs)
    approx.kept(_params_of, lambda: params_of)
    if isinstance(svi.loss, ImportanceWeightedELBO):
        found = svi.loss.with_score_sites(approx.params, svi.model, svi.guide, *args, **approx.kwargs)
        if found is not svi.loss:
            svi = copy(svi)
            svi.loss = found
            approx = replace(approx, svi=svi)
        # In the steps the inverse temperature is traced, and values cannot be compared.
        if approx.subsampled:
            svi.loss.check(approx.params, svi.model, svi.guide, *args, **approx.kwargs)
        else:
            check_independent(approx, approx.local)
            svi.loss.check_program(program_of(approx, approx.local), approx.params, jax.random.key(0))
    sites = [*sample_sites(approx.model_trace), *sample_sites(approx.guide_trace)]
    if not any(site["is_observed"] for site in sites):
        warn(
            "The model has no observed site, so that its posterior is the prior. Pass the data behind the number of "
            "steps: `fit(model, rng_key, 2000, x)`.",
        )
    if settings.start_sharding is not None:
        _check_start_sharding(settings.start_sharding, num_starts)
    steps = Steps(
        svi,
        args,
        {"forward_mode_differentiation": settings.forward_mode_differentiation, **kwargs},
        units_of(approx.guide_trace),
        _inverse_temperature(settings.tempering, num_starts),
        settings.stable_update,
        settings.vectorize_starts,
        settings.start_sharding,
        older_loops=settings.num_steps * num_starts * approx.num_particles * approx.size < QUICK,
    )
    none = np.zeros((num_starts, 0), np.float32)
    alike = int(state.step) == 0 and _are_alike(params, num_starts)
    starts = Starts.without_evidence(params, none, none, state.svi, np.asarray(state.failed), alike)
    return Fit(approx, starts, state, steps, settings, rng_key)


def _params_of(svi: SVI) -> Compiled:
    """From states of all starts to their parameters."""
    return Compiled(jax.vmap(svi.get_params), ONCE)


def _are_alike(params: dict[str, Any], num_starts: int) -> bool:
    return num_starts > 1 and all((leaf == leaf[:1]).all() for leaf in jax.tree.leaves(jax.device_get(params)))


def run(fit: Fit, num_steps: int, progress_bar: bool) -> Fit:
    """So many steps more.

    :raises ValueError: if NaN came up in all starts.
    """
    approx, svi = fit.approx, fit.approx.svi
    if callable(fit.settings.tempering):
        _check_temperatures(fit.steps.inverse_temperature, int(fit.state.step) + np.arange(num_steps))
    if approx.has_posterior() and fit.settings.start_sharding is None:
        _compile_ahead(approx)
    state, losses, temperatures = fit.steps.run(fit.state, num_steps, progress_bar)
    failed = np.asarray(state.failed)
    losses = np.concatenate([fit.starts.losses, losses], axis=1)
    infinite = np.isposinf(losses).sum(1)
    if losses.size and infinite.max() > losses.shape[1] / 2:
        warn(
            f"In {infinite.max():,} of {losses.shape[1]:,} steps of start {infinite.argmax()} the loss was infinite: "
            "the guide draws what the data rule out, and learns nothing from that. Let it begin where the data are "
            'possible: `AutoMixed(model, init_loc_fn=init_to_value(values={"count": seen + 1}))` for a count of at '
            "least what was seen. Or give such data a small probability in the model.",
        )
    temperatures = np.concatenate([fit.starts.inverse_temperature, temperatures], axis=1)
    params = approx.kept(_params_of, lambda: _params_of(svi))(state.svi)
    starts = Starts.without_evidence(params, losses, temperatures, state.svi, failed, fit.starts.alike)
    keys = keys_of(fit.rng_key)
    approx = with_starts(approx, starts)
    if approx.has_posterior():
        if fit.settings.recover and losses.shape[1] >= LEAST_STEPS:
            starts = _recovered(approx, keys.recovery, starts, state, fit.steps, losses.shape[1], progress_bar)
        starts = with_log_evidence(with_starts(approx, starts), keys.evidence, starts, progress_bar)
        approx = with_starts(approx, starts)
    return replace(fit, approx=approx, starts=starts, state=state)


def _compile_ahead(approx: Approximation) -> None:
    """Compile in a thread what draws and weighs, while steps are compiled and taken."""
    for sampler_of, chosen in ((by_start, approx), (pooled, in_pool(approx))):
        try:
            sampler_of(chosen).ahead(chosen.starts)
        except (ValueError, NotImplementedError):
            pass  # said where it is called


def with_starts(approx: Approximation, starts: Starts) -> Approximation:
    """An approximation with the starts that did not fail, and the best of them."""
    kept = starts.kept
    return approx.at(taken(starts.params, kept), len(kept), int(np.searchsorted(kept, starts.best)))


def _tempering_steps(tempering: Tempering, num_starts: int, num_steps: int) -> np.ndarray:
    """Over how many steps the inverse temperature of each start rises; -1 for a function."""
    if callable(tempering):
        return np.full(num_starts, -1)
    try:
        shares = np.broadcast_to(np.asarray(tempering, float), (num_starts,))
    except (TypeError, ValueError):
        shares = np.full(num_starts, np.nan)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(
            f"`tempering` is {tempering!r}, but must be a share of the steps, in [0, 1], or {num_starts} of them, one "
            "for each start, or a function from the step to the inverse temperature, as optax's schedules are."
        )
    return np.array([round(share * num_steps) for share in shares.tolist()])


def _inverse_temperature(tempering: Tempering, num_starts: int) -> Callable:
    """From a step, ``tempering_steps`` and ``first_inverse_temperature`` to the inverse temperature of each start."""
    if not callable(tempering):
        return geometric
    return lambda step, *_: jnp.broadcast_to(jnp.asarray(tempering(step), float), (num_starts,))


def _check_temperatures(inverse_temperature: Callable, steps: np.ndarray) -> None:
    for step, given in zip(steps, np.asarray(jax.jit(jax.vmap(lambda step: inverse_temperature(step)))(steps))):
        if not (given > 0).all() or not np.isfinite(given).all():
            raise ValueError(
                f"`tempering` gives the inverse temperature {given.min()} at step {step}, but it must be positive and "
                "finite: at 0 data that are impossible would be NaN. Begin at 0.001."
            )


def _check_start_sharding(sharding: Any, num_starts: int) -> None:
    if not isinstance(sharding, Sharding):
        raise ValueError(f"`start_sharding` is {sharding!r}, but must be a `jax.sharding.Sharding`.")
    devices = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    if num_starts % devices:
        raise ValueError(
            f"`start_sharding` spreads starts over {devices} devices, but there are {num_starts} starts. Take a "
            f"multiple of {devices} for `num_starts`."
        )


def with_log_evidence(approx: Approximation, rng_key: Array, starts: Starts, show_bar: bool) -> Starts:
    """The starts with their log evidence and its standard error, in nats."""
    estimates, errors = np.full((2, len(starts)), np.nan)
    if fixed(approx):
        return starts  # a point estimate, as diagnostics say
    try:
        progress = "log evidence" if show_bar else None
        blocks = by_start(approx).blocks(approx.starts, rng_key, EVIDENCE_DRAWS, lambda draw: draw.log_weight, progress)
        log_weights = np.concatenate(list(blocks), axis=0).swapaxes(0, 1).astype(float)
    except (ValueError, NotImplementedError) as error:
        warn(f"The log evidence cannot be estimated. {error}")
        return starts
    for i, log_weight in zip(starts.kept, log_weights):
        nan, zero = np.isnan(log_weight).sum(0).max(), np.isneginf(log_weight).sum(0).max()
        if nan or zero == EVIDENCE_DRAWS:
            warn(
                f"The log evidence of start {i} cannot be estimated: of {EVIDENCE_DRAWS:,} draws of its guide, {nan:,} "
                f"have a NaN weight, and {zero:,} the weight zero.",
            )
            continue
        relative = np.exp(log_weight - log_weight.max(0))
        estimates[i] = log_mean(log_weight).sum()
        errors[i] = np.sqrt(np.sum(variance_of_log_mean(relative.sum(0), (relative**2).sum(0), EVIDENCE_DRAWS)))
    return replace(starts, log_evidence=estimates, log_evidence_std_error=errors)


def _recovered(
    approx: Approximation, rng_key: Array, starts: Starts, state: FitState, steps: Steps, num_steps: int, show_bar: bool
) -> Starts:
    """Starts without what all of them lost, as far as it can be recovered."""
    if steps.inverse_temperature is not geometric:
        steps = replace(steps, inverse_temperature=geometric)

    def go_on(state: FitState) -> FitState:
        return steps.run(state, num_steps, show_bar)[0]

    try:
        return recovered(approx, rng_key, starts, state, go_on, steps.units, "defence" if show_bar else None)
    except (ValueError, NotImplementedError) as error:
        warn(f"What the starts may have lost cannot be looked for. {error}")
        return starts
