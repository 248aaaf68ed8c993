# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Several fits of one posterior, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, trace
from numpyro.infer import SVI

from numpyro_vimco.arguments import check_integer, check_key
from numpyro_vimco.control_flow import Given
from numpyro_vimco.guides.units import units_of
from numpyro_vimco.objectives.elbo import ImportanceWeightedELBO
from numpyro_vimco.posterior.annealing import first_power, geometric
from numpyro_vimco.posterior.fitted import Fitted, check_data, check_given, misfit
from numpyro_vimco.posterior.observed import find_observed
from numpyro_vimco.posterior.proposals import each_start, program_of
from numpyro_vimco.posterior.recovery import LEAST_STEPS, recovered
from numpyro_vimco.posterior.results import FitResult, FitState
from numpyro_vimco.posterior.starts import initial_states, with_known_draws
from numpyro_vimco.posterior.steps import Steps
from numpyro_vimco.posterior.weights import log_mean, variance_of_log_mean
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import Trace, is_latent_site, sample_sites

# Draws of each start's guide that its log evidence is estimated from: as many as small models have in a chunk, so that
# the diagnostics take the same program.
EVIDENCE_DRAWS = 4096


def fit(
    svi: SVI,
    rng_key: Array,
    num_steps: int,
    *args,
    num_starts: int = 4,
    anneal: float | Sequence[float] | Callable = 0.5,
    recover: bool = True,
    progress_bar: bool = True,
    stable_update: bool = False,
    forward_mode_differentiation: bool = False,
    init_state: FitState | None = None,
    init_params: dict[str, Any] | None = None,
    vectorize_starts: bool = True,
    start_sharding: Sharding | None = None,
    **kwargs,
) -> FitResult:
    r"""
    Fit several times at once, from starts of their own, with an annealed likelihood: in place of ``svi.run``.

    One fit may lose a part of the posterior, and nothing that it proposes afterwards shows it. Another start that did
    not lose it does. Starts differ in all their keys, and so in where an automatic guide begins (``init_loc_fn``).

    **Annealing.** The target is :math:`p(z)\,p(x \mid z)^\beta` [1]: the observed sites of the model, factors among
    them, count with a power β that rises geometrically to 1, and stays there. It begins at 0.001, or at 0.1 divided by
    the spread of the log-likelihood under the prior, if that is less: there the data hardly count. So a guide is as
    wide as the prior when they begin to, and narrows around all that they allow. Where sites are summed out, the power
    is that of p(x | z) with z the sampled latents alone. The power is an argument of the compiled step. Losses at β < 1
    are those of another target.

    **Units.** A step of the optimiser moves a location of an automatic guide of this library by a share of the guide's
    own scale, and of the prior's at most (:mod:`~numpyro_vimco.guides.units`). So a program in other units has the same
    fit, and priors may be much wider than the posterior.

    **Recovery.** Starts that begin alike may lose the same part of the posterior together. After the steps, some draws
    take a latent from the model in place of the guide (:mod:`~numpyro_vimco.posterior.defence`). If these hold more
    than a fifth of the posterior, a guide is fitted to the weighted draws, and goes on from there by as many steps
    again, at power 1. The result then has the starts, old or new, whose pooled draws have the largest effective sample
    size (:mod:`~numpyro_vimco.posterior.recovery`); ``losses`` and ``state`` stay those of the starts as they were.

    **Learning rate.** It does best if it is held while β rises, and falls by a cosine afterwards::

        schedule = optax.warmup_cosine_decay_schedule(0.01, 0.01, num_steps // 2, num_steps)
        svi = SVI(model, AutoMixed(model), optax.adam(schedule), VIMCOStar(0.5, num_particles=64))
        result = fit(svi, random.key(0), num_steps, x)
        diagnostics = importance_diagnostics(svi, result, model_args=(x,), rng_key=random.key(1))
        posterior = to_arviz(svi, result, model_args=(x,), rng_key=random.key(2))

    **Going on.** ``fit(..., init_state=result.state)`` takes ``num_steps`` further steps, bit for bit those that one
    long run would have taken. The state knows the number of steps taken and over how many the power rises, which is a
    share of ``num_steps`` of the *first* call; to plan a fit in parts, pass ``anneal`` as a function. Ctrl-C ends a fit
    with what there is, which can go on in the same way.

    :param SVI svi: the inference object, with any objective, guide and optimiser.
    :param jax.random.key rng_key: random number generator key.
    :param int num_steps: number of steps of each start. 0 gives the initial state, to load
        a saved one into.
    :param args: arguments to the model / guide.
    :param int num_starts: number of starts. Defaults to 4, as many as chains in MCMC. Where a fit goes on, it is that
        of ``init_state``.
    :param anneal: share of the steps over which the power rises, in [0, 1], or one for each start; 0 for none. Or
        a function from the step (traced, from 0 on) to the power, as optax's schedules are; it may return an array of
        shape ``(num_starts,)``. Defaults to 0.5. Where a fit goes on, a share is that of ``init_state``, and a
        function must be passed again.
    :param bool recover: whether to look for a part of the posterior that all starts have lost, and to recover it
        (**Recovery**). Defaults to True; fits of less than 200 steps are not looked at.
    :param bool progress_bar: whether to show the mean bound over starts in nats, the power, and how many starts
        failed. Defaults to True.
    :param bool stable_update: as ``svi.run``: a step whose loss or gradient is not finite is skipped. Defaults to
        False.
    :param bool forward_mode_differentiation: as ``svi.run``. Defaults to False.
    :param FitState init_state: ``state`` of an earlier result, to go on from.
    :param dict init_params: as ``svi.run``: parameters to begin with, in all starts.
    :param bool vectorize_starts: True (default) for ``jax.vmap`` over starts; False takes each step for one start after
        the other, with the memory of one.
    :param jax.sharding.Sharding start_sharding: how the axis of starts is spread over devices. Defaults to None: not.
    :param kwargs: keyword arguments to the model / guide.
    :raises ValueError: for a number or a share out of range, a power that is not positive, an ``init_state`` that is
        none, a sharding that does not divide the starts, arguments that do not fit model and guide, data that are drawn
        in part or NaN; and if NaN came up in all starts.
    :warns UserWarning: for a model without observed sites, for each start that is dropped since its loss or a parameter
        became NaN, for a loss that is infinite in most steps, for a log evidence that cannot be estimated, and for an
        interruption.

    **References**

    1. *Annealed Importance Sampling*, Radford Neal, arXiv physics/9803008, for the path of targets
    """
    check_key(rng_key)
    num_steps = check_integer("num_steps", num_steps, 0, "so many steps are taken")
    if problem := misfit(svi, args, {**svi.static_kwargs, **kwargs}):
        raise ValueError(
            f"What `fit` was given for the model and the guide does not fit {problem}. Arguments of the model follow "
            "the number of steps as they are, `fit(svi, rng_key, 2000, x)`; the number of starts is `num_starts`."
        )
    init_key, evidence_key, recovery_key = split(rng_key, 3)
    if init_state is None:
        num_starts = check_integer("num_starts", num_starts, 1, "so many fits run side by side")
        anneal_steps = _anneal_steps(anneal, num_starts, num_steps)
        states = initial_states(svi, init_key, num_starts, args, {"init_params": init_params, **kwargs})
        first = jnp.ones(())
        if anneal_steps.max() > 0:
            all_kwargs = {**svi.static_kwargs, **kwargs}
            first = first_power(svi.model, args, all_kwargs, getattr(svi.loss, "joint_plates", ()))
        state = FitState(states, jnp.array(0), anneal_steps, first, jnp.zeros(num_starts, bool))
    else:
        state = _checked_state(init_state, anneal)
        if svi.constrain_fn is None:
            svi.init(init_key, *args, init_params=init_params, **kwargs)
    if isinstance(svi.loss, ImportanceWeightedELBO):
        # In the steps the power of the likelihood is traced, and values cannot be compared.
        params = svi.get_params(jax.tree.map(lambda leaf: leaf[int(np.argmin(state.failed))], state.svi))
        svi.loss.check(params, svi.model, svi.guide, *args, **svi.static_kwargs, **kwargs)
    model_trace, guide_trace = _traces(svi, args, kwargs)
    check_given(svi.model, model_trace, args, {**svi.static_kwargs, **kwargs})
    check_data(model_trace, find_observed(model_trace, set()))
    if not any(site["is_observed"] for site in [*sample_sites(model_trace), *sample_sites(guide_trace)]):
        warnings.warn(
            "The model has no observed site, so that its posterior is the prior. Pass the data: "
            "`fit(svi, rng_key, num_steps, x)`.",
            stacklevel=2,
        )
    if start_sharding is not None:
        _check_start_sharding(start_sharding, len(state.failed))
    steps = Steps(
        svi,
        args,
        {"forward_mode_differentiation": forward_mode_differentiation, **kwargs},
        units_of(guide_trace),
        _power(anneal, state, num_steps),
        stable_update,
        vectorize_starts,
        start_sharding,
    )
    state, losses, powers = steps.run(state, num_steps, progress_bar)
    failed = np.asarray(state.failed)
    infinite = np.isposinf(losses).sum(1)
    if losses.size and infinite.max() > losses.shape[1] / 2:
        warnings.warn(
            f"In {infinite.max():,} of {losses.shape[1]:,} steps of start {infinite.argmax()} the loss was infinite: "
            "the guide draws what the data rule out, and learns nothing from that. Let it begin where the data are "
            'possible: `AutoMixed(model, init_loc_fn=init_to_value(values={"count": seen + 1}))` for a count of at '
            "least what was seen. Or give such data a small probability in the model.",
            stacklevel=2,
        )
    no_evidence = np.full(len(state.failed), np.nan)
    params = jax.vmap(svi.get_params)(state.svi)
    result = FitResult(params, losses, state, powers, no_evidence, no_evidence, state.svi, failed)
    if _has_evidence(model_trace, guide_trace):
        if recover and num_steps >= LEAST_STEPS:
            result = _recovered(svi, recovery_key, result, steps, num_steps, args, kwargs, progress_bar)
        estimates, errors = _log_evidence(svi, evidence_key, result, model_trace, args, kwargs, progress_bar)
        result = result._replace(log_evidence=estimates, log_evidence_std_error=errors)
    return result


def _anneal_steps(anneal: float | Sequence[float] | Callable, num_starts: int, num_steps: int) -> Array:
    """Over how many steps the power of each start rises; -1 for a function."""
    if callable(anneal):
        return jnp.full(num_starts, -1)
    try:
        shares = np.broadcast_to(np.asarray(anneal, float), (num_starts,))
    except (TypeError, ValueError):
        shares = np.full(num_starts, np.nan)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(
            f"`anneal` is {anneal!r}, but must be a share of the steps, in [0, 1], or {num_starts} of them, one for "
            "each start, or a function from the step to the power, as optax's schedules are."
        )
    return jnp.array([round(share * num_steps) for share in shares.tolist()])


def _power(anneal: float | Sequence[float] | Callable, state: FitState, num_steps: int) -> Callable:
    """From a step and ``anneal_steps`` to the power of each start."""
    if not callable(anneal):
        return geometric
    shape = state.failed.shape

    def power(step, *_):
        return jnp.broadcast_to(jnp.asarray(anneal(step), float), shape)

    steps = int(state.step) + np.arange(num_steps)
    for step, given in zip(steps, np.asarray(jax.jit(jax.vmap(lambda step: power(step)))(steps))):
        if not (given > 0).all() or not np.isfinite(given).all():
            raise ValueError(
                f"`anneal` gives the power {given.min()} at step {step}, but it must be positive and finite: at 0 data "
                "that are impossible would be NaN. Begin at 0.001."
            )
    return power


def _checked_state(init_state: Any, anneal: Any) -> FitState:
    """``init_state``, if ``anneal`` is as it was there."""
    if not isinstance(init_state, FitState):
        raise ValueError(
            f"`init_state` is of type {type(init_state).__name__}, but must be the `state` of what `fit` returned. "
            "`svi.run` goes on from the state of a single fit."
        )
    if not callable(anneal) and (np.asarray(init_state.anneal_steps) < 0).any():
        raise ValueError(
            f"`anneal` is {anneal!r}, but `init_state` is of a fit whose power was a function of the step, which a "
            "state does not hold. Pass the function again."
        )
    return init_state


def _check_start_sharding(sharding: Any, num_starts: int) -> None:
    if not isinstance(sharding, Sharding):
        raise ValueError(f"`start_sharding` is {sharding!r}, but must be a `jax.sharding.Sharding`.")
    devices = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    if num_starts % devices:
        raise ValueError(
            f"`start_sharding` spreads starts over {devices} devices, but there are {num_starts} starts. Take a "
            f"multiple of {devices} for `num_starts`."
        )


def _log_evidence(svi: SVI, rng_key: Array, result: FitResult, model_trace: Trace, args, kwargs, show_bar: bool):
    """Estimates and standard errors, in nats; NaN for starts that failed."""
    estimates, errors = np.full((2, len(result.failed)), np.nan)
    succeeded = np.flatnonzero(~result.failed)
    # Where the model has parameters, each start has a target of its own.
    apart = any(site["type"] == "param" for site in model_trace.values())
    results = [result.start(int(i)) for i in succeeded] if apart else [result]
    progress = "log evidence" if show_bar else None
    log_weights = []
    try:
        for key, of_starts in zip(split(rng_key, len(results)), results):
            fitted = Fitted.of(svi, of_starts, args, kwargs)
            if program_of(fitted, {}).without_density(fitted.params, key):
                return estimates, errors  # a point estimate, as diagnostics say
            sampler = each_start(fitted)
            blocks = sampler.blocks(key, EVIDENCE_DRAWS, lambda draw: draw.log_weight, progress)
            log_weights += list(np.concatenate(list(blocks), axis=0).swapaxes(0, 1).astype(float))
    except (ValueError, NotImplementedError) as error:
        warnings.warn(f"The log evidence cannot be estimated. {error}", stacklevel=3)
        return estimates, errors
    for i, log_weight in zip(succeeded, log_weights):
        nan, zero = np.isnan(log_weight).sum(0).max(), np.isneginf(log_weight).sum(0).max()
        if nan or zero == EVIDENCE_DRAWS:
            warnings.warn(
                f"The log evidence of start {i} cannot be estimated: of {EVIDENCE_DRAWS:,} draws of its guide, {nan:,} "
                f"have a NaN weight, and {zero:,} the weight zero.",
                stacklevel=3,
            )
            continue
        relative = np.exp(log_weight - log_weight.max(0))
        estimates[i] = log_mean(log_weight).sum()
        variance = variance_of_log_mean(relative.sum(0), (relative**2).sum(0), EVIDENCE_DRAWS)
        errors[i] = np.sqrt(np.sum(variance))
    return estimates, errors


def _recovered(svi: SVI, rng_key: Array, result: FitResult, steps: Steps, num_steps: int, args, kwargs, show_bar: bool):
    """The result, without what all starts lost, as far as it can be recovered."""

    def go_on(state: FitState) -> FitState:
        return replace(steps, power=geometric).run(state, num_steps, show_bar)[0]

    kwargs = {**svi.static_kwargs, **kwargs}
    try:
        return recovered(svi, rng_key, result, go_on, steps.units, args, kwargs, "defence" if show_bar else None)
    except (ValueError, NotImplementedError) as error:
        warnings.warn(f"What the starts may have lost cannot be looked for. {error}", stacklevel=3)
        return result


def _traces(svi: SVI, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
    """The model and the guide at one draw of it."""
    with seed(rng_seed=0), trace() as guide_trace:
        with_known_draws(svi.guide)(*args, **svi.static_kwargs, **kwargs)
    values = {name: site["value"] for name, site in guide_trace.items() if is_latent_site(site)}
    with seed(rng_seed=0), trace() as model_trace:
        Given(svi.model, values)(*args, **svi.static_kwargs, **kwargs)
    return model_trace, guide_trace


def _has_evidence(model_trace: Trace, guide_trace: Trace) -> bool:
    """Whether there are latents, and all data."""
    sites = [*guide_trace.values(), *model_trace.values()]
    whole = all(len(site["value"]) == site["args"][0] for site in sites if site["type"] == "plate")
    return whole and any(is_latent_site(site) for site in model_trace.values())
