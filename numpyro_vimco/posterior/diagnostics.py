# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Can a fit be trusted, and is its gradient good enough?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIRunResult
import xarray as xr

from numpyro_vimco.arguments import check_integer
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.proposals import (
    can_have_particles,
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    propose,
)
from numpyro_vimco.sites import is_latent_site, sample_sites

# Where "good" ends: weights of infinite variance, and an effective sample size relative to the draws.
HEAVY_TAIL, LOW_ESS = 0.5, 0.1


@dataclass(frozen=True)
class ImportanceDiagnostics:
    """How well the guide's draws, with their importance weights, stand for the posterior. Printed, it explains itself.

    Where plates are common to all sites, weights are per element: ``ess`` and ``pareto_k`` have their shape, and the
    evidence is a sum over them.

    :ivar log_evidence: estimate of log p(x) in nats: the logarithm of the mean weight.
    :ivar log_evidence_std_error: its standard error in nats, by the delta method.
    :ivar bounds: the importance-weighted bound (α = 0) in nats by number of particles N, from 1 (the ELBO) upwards,
        each a mean over the draws in groups of N.
    :ivar ess: effective sample size, 1 / Σ W² with Pareto-smoothed weights.
    :ivar pareto_k: shape of the weights' tail, by ArviZ; -inf where they do not vary.
    :ivar reading: of the worst element. ``"bad"``: k of min(1 - 1 / log10(draws), 0.7) or more (Vehtari et al. 2024),
        or an ESS below 100; ``"good"``: k < 0.5 (finite variance) and an ESS of a tenth of the draws or more;
        ``"usable"`` between. A part of the posterior that was never proposed shows in none of these.
    :ivar advice: what to make of it, or what to do.
    :ivar log_weight: log-weights, of shape ``(num_samples, *plates)``, in nats.
    """

    log_evidence: float
    log_evidence_std_error: float
    bounds: dict[int, float]
    ess: np.ndarray
    pareto_k: np.ndarray
    reading: str
    advice: str
    log_weight: np.ndarray = field(repr=False)

    def __str__(self) -> str:
        worst = "" if self.pareto_k.size == 1 else f" (worst of {self.pareto_k.size} elements)"
        bounds = ", ".join(f"{bound:.3f} (N = {n})" for n, bound in self.bounds.items())
        return (
            f"log evidence  {self.log_evidence:.3f} ± {self.log_evidence_std_error:.3f} nats\n"
            f"bounds        {bounds}\n"
            f"ESS           {self.ess.min():,.1f} of {len(self.log_weight):,} draws{worst}\n"
            f"Pareto k      {self.pareto_k.max():.2f}, {self.reading}{worst}\n"
            f"{self.advice}"
        )


def importance_diagnostics(
    svi: SVI,
    svi_result: SVIRunResult,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_samples: int = 10_000,
) -> ImportanceDiagnostics:
    """
    Draw from the fitted guide, and see what its importance weights say.

    :param SVI svi: the inference object of the fit; with any objective.
    :param SVIRunResult svi_result: what ``svi.run`` returned.
    :param tuple model_args: the model's arguments, as in the fit; with all data, not a subsample.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_samples: number of draws, at least 100. Defaults to 10,000: a tail is fitted to them.
    :raises ValueError: as :func:`~numpyro_vimco.to_arviz`.
    """
    num_samples = check_integer("num_samples", num_samples, 100, "the tail of the weights is fitted to them")
    fit = Fitted.of(svi, svi_result.params, model_args, model_kwargs)
    log_weight = propose(fit, rng_key, num_samples).log_weight
    smoothed, k = pareto_smooth(log_weight)
    ess = effective_sample_size(smoothed)
    relative = np.exp(log_weight - log_weight.max(0))
    std_error = np.sqrt(np.sum(relative.var(0, ddof=1) / num_samples / relative.mean(0) ** 2))
    sizes = [4**i for i in range(10) if 4**i <= num_samples // 10]
    reading = _reading(float(k.max()), float(ess.min()), num_samples)
    return ImportanceDiagnostics(
        log_evidence=float(log_evidence(log_weight).sum()),
        log_evidence_std_error=float(std_error),
        bounds={n: _bound(log_weight, n) for n in sizes},
        ess=ess,
        pareto_k=k,
        reading=reading,
        advice=_advice(fit, reading, float(k.max()), float(ess.min()) / num_samples),
        log_weight=log_weight,
    )


def _bound(log_weight: np.ndarray, num_particles: int) -> float:
    groups = len(log_weight) // num_particles
    grouped = log_weight[: groups * num_particles].reshape(groups, num_particles, *log_weight.shape[1:])
    return float(log_evidence(grouped.swapaxes(0, 1)).mean(0).sum())


def _reading(k: float, ess: float, num_samples: int) -> str:
    if k >= min(1 - 1 / np.log10(num_samples), 0.7) or ess < 100:
        return "bad"
    return "good" if k < HEAVY_TAIL and ess >= num_samples * LOW_ESS else "usable"


def _advice(fit: Fitted, reading: str, k: float, relative_ess: float) -> str:
    if reading == "good":
        return "Importance-weighted estimates can be trusted."
    if reading == "usable":
        why = []
        if relative_ess < LOW_ESS:
            why.append("Few draws hold most of the weight: the guide spends the others where the posterior has little.")
        if k >= HEAVY_TAIL:
            why.append(
                "The weights have a heavy tail: the guide proposes a part of the posterior too rarely, and one such "
                "draw can move an estimate by more than its standard error."
            )
        why.append("Compare with a second key and more draws; docs/checking_a_fit.md says what makes a guide better.")
        return " ".join(why)
    plate = _joint_plate(fit)
    if plate:
        return (
            f"One weight is a product over all elements of the plate '{plate}', and hardly a draw holds all of it: "
            f"give its elements particles of their own, VIMCOStar(plate_particles={{'{plate}': 8}})."
        )
    return (
        "The guide misses a part of the posterior, so that estimates may be far off: train for longer or with more "
        "particles, or use a richer guide (AutoMixed(model, structure='autoregressive'), or one by hand)."
    )


def _joint_plate(fit: Fitted) -> str | None:
    """A plate with latents of its own beside others, whose elements share a weight."""
    sites = sample_sites(fit.model_trace)
    for site in filter(is_latent_site, sites):
        names = [frame.name for frame in site["cond_indep_stack"]]
        if any(name in fit.plate_particles for name in names):
            continue
        for frame in sorted(site["cond_indep_stack"], key=lambda frame: frame.dim):
            common = all(frame in other["cond_indep_stack"] for other in sites)
            if frame.size > 1 and not common and can_have_particles(fit, frame.name):
                return frame.name
    return None


class GradientStatistics(NamedTuple):
    """Of the gradient of one parameter over repeated draws; arrays of its shape.

    :ivar mean: of the gradient of the loss.
    :ivar std: its standard deviation.
    :ivar snr: size of the mean over the standard deviation, elementwise; the same in
        unconstrained space wherever the constraint is elementwise.
    """

    mean: np.ndarray
    std: np.ndarray
    snr: np.ndarray


def gradient_snr(
    svi: SVI,
    params: dict[str, Any],
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_draws: int = 1000,
) -> dict[str, GradientStatistics]:
    """
    Signal-to-noise ratio of the gradient that ``svi`` takes, at given parameters.

    :param SVI svi: the inference object, with any objective.
    :param dict params: parameters (``svi.get_params(state)``, or ``svi_result.params``).
    :param tuple model_args: the model's arguments.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_draws: number of gradients, at least 2. Defaults to 1,000: the ratio is then known to about 3% of
        its noise.
    :return: for each parameter its statistics. A parameter that is a pytree (of a neural network) has one of them.
    :raises ValueError: for too few draws, arguments that do not fit the model, parameters that do not fit model and
        guide, or a model without latents.
    """
    num_draws = check_integer("num_draws", num_draws, 2, "a standard deviation needs as many")
    gradient = _gradient(svi, svi.loss, params, model_args, model_kwargs)
    mean, std = _moments(gradient, random.split(rng_key, num_draws), params)
    statistics = {}
    for name in params:
        snr = jax.tree.map(_ratio, mean[name], std[name])
        statistics[name] = GradientStatistics(mean[name], std[name], snr)
    return statistics


def compare_objectives(
    svi: SVI,
    params: dict[str, Any],
    objectives: Mapping[str, Callable[..., ELBO]],
    *,
    num_particles: Sequence[int] = (4, 16, 64, 256),
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_draws: int = 1000,
) -> xr.Dataset:
    """
    Gradients of several objectives at the same parameters.

    :param SVI svi: an inference object for model and guide; its own objective is not used.
    :param dict params: parameters.
    :param objectives: by name, a class, or a function of ``num_particles``: ``{"VIMCOStar": VIMCOStar, "α = 0.5":
        partial(VIMCOStar, 0.5)}``.
    :param num_particles: numbers of particles. Defaults to 4, 16, 64, 256.
    :param tuple model_args: the model's arguments.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_draws: number of gradients for each, at least 2. Defaults to 1,000.
    :return: ``snr`` and ``variance`` over dimensions ``objective``, ``num_particles`` and ``parameter`` (one for each
        element, ``loc[0]``), and ``seconds`` per gradient over the first two, the best of five once compiled.
    :raises ValueError: for too few draws.
    """
    num_draws = check_integer("num_draws", num_draws, 2, "a standard deviation needs as many")
    keys = random.split(rng_key, num_draws)
    snr, variance, seconds = [], [], []
    for make in objectives.values():
        for n in num_particles:
            gradient = _gradient(svi, make(num_particles=n), params, model_args, model_kwargs)
            mean, std = (_flat(moment) for moment in _moments(gradient, keys, params))
            snr.append(_ratio(mean, std))
            variance.append(std**2)
            seconds.append(_seconds(gradient, keys[0], params))
    shape = (len(objectives), len(num_particles))
    dims = ("objective", "num_particles", "parameter")
    return xr.Dataset(
        {
            "snr": (dims, np.reshape(snr, (*shape, -1))),
            "variance": (dims, np.reshape(variance, (*shape, -1))),
            "seconds": (dims[:2], np.reshape(seconds, shape)),
        },
        coords={"objective": list(objectives), "num_particles": list(num_particles), "parameter": _names(params)},
    )


def _gradient(svi: SVI, objective: ELBO, params, model_args, model_kwargs) -> Callable:
    fit = Fitted.of(svi, params, model_args, model_kwargs, whole=False)

    def loss(params, rng_key):
        return objective.loss(rng_key, params, svi.model, svi.guide, *fit.args, **fit.kwargs)

    return jax.jit(jax.grad(loss))


def _moments(gradient: Callable, keys: Array, params) -> tuple[Any, Any]:
    """Mean and standard deviation over keys, in one pass and double precision on the host."""
    mean = square = jax.tree.map(lambda p: np.zeros(np.shape(p)), params)
    size = min(100, len(keys))
    batched = jax.jit(lambda keys: jax.lax.map(lambda key: gradient(params, key), keys))
    for begin in range(0, len(keys), size):
        draws = jax.tree.map(lambda g: np.asarray(g, float), batched(keys[begin : begin + size]))
        count = len(keys[begin : begin + size])
        # Chan's update: no difference of large squares.
        delta = jax.tree.map(lambda g, m: g.mean(0) - m, draws, mean)
        square = jax.tree.map(
            lambda s, g, d, n=begin, k=count: s + k * g.var(0) + d**2 * n * k / (n + k), square, draws, delta
        )
        mean = jax.tree.map(lambda m, d, n=begin, k=count: m + d * k / (n + k), mean, delta)
    return mean, jax.tree.map(lambda s: np.sqrt(s / (len(keys) - 1)), square)


def _ratio(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """|mean| / std; 0 where a parameter has no gradient, infinite where it has no noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, np.abs(mean) / std)


def _seconds(gradient: Callable, key: Array, params) -> float:
    times = []
    for _ in range(6):
        begin = perf_counter()
        jax.block_until_ready(gradient(params, key))
        times.append(perf_counter() - begin)
    return min(times[1:])


def _flat(params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def _names(params) -> list[str]:
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(str(getattr(part, "key", part)) for part in path)
        names += [name + (f"[{','.join(map(str, i))}]" if i else "") for i in np.ndindex(jnp.shape(leaf))]
    return names
