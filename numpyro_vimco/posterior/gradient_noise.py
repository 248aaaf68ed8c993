# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Was the gradient good enough? Its signal-to-noise ratio, of one objective or of several."""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from tqdm.auto import tqdm

from numpyro_vimco.arguments import check_integer, check_key
from numpyro_vimco.posterior.chunks import patient_bar
from numpyro_vimco.posterior.fitted import Fitted, Result
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import element_names

if TYPE_CHECKING:
    import xarray as xr


class GradientStatistics(NamedTuple):
    """Statistics of the gradient of one parameter over repeated draws; arrays of the parameter's shape.

    :ivar mean: mean of the gradient of the loss.
    :ivar std: standard deviation of the gradient.
    :ivar snr: absolute value of the mean over the standard deviation, elementwise. It is the same in unconstrained
        space if the constraint is elementwise.
    """

    mean: np.ndarray
    std: np.ndarray
    snr: np.ndarray


def gradient_snr(
    svi: SVI,
    params: Result,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_draws: int = 1000,
    progress_bar: bool = True,
) -> dict[str, GradientStatistics]:
    """
    Signal-to-noise ratio of the gradient that ``svi`` takes, at given parameters.

    :param SVI svi: the inference object, with any objective.
    :param params: parameters: a dict, what ``fit`` (its best start counts) or ``svi.run`` returned, or a state of
        ``svi.update``.
    :param tuple model_args: the model's arguments.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_draws: number of gradients, at least 2. Defaults to 1,000: the ratio is then known to about 3% of
        its noise.
    :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to True.
    :return: the statistics of each parameter; their fields are pytrees where the parameter is one (a neural network's).
    :raises ValueError: for too few draws, arguments that do not fit the model, parameters that do not fit model and
        guide, a model without latents, data that are NaN, or ``rng_key`` that is no key.
    """
    check_key(rng_key)
    num_draws = check_integer("num_draws", num_draws, 2, "a standard deviation needs as many")
    fit = Fitted.of(svi, params, model_args, model_kwargs, whole=False)
    with patient_bar(num_draws, "gradients" if progress_bar else None) as bar:
        mean, std = _moments(_gradient(fit, svi.loss), split(rng_key, num_draws), fit.params, bar)
    statistics = {}
    for name in fit.params:
        snr = jax.tree.map(_ratio, mean[name], std[name])
        statistics[name] = GradientStatistics(mean[name], std[name], snr)
    return statistics


def compare_objectives(
    svi: SVI,
    params: Result,
    objectives: Mapping[str, Callable[..., ELBO]],
    *,
    num_particles: Sequence[int] = (4, 16, 64, 256),
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    rng_key: Array,
    num_draws: int = 1000,
    progress_bar: bool = True,
) -> "xr.Dataset":
    """
    Gradients of several objectives at the same parameters.

    :param SVI svi: an inference object for model and guide; its own objective is not used.
    :param params: parameters, as in :func:`gradient_snr`.
    :param objectives: by name, a class, or a function of ``num_particles``: ``{"VIMCOStar": VIMCOStar, "α = 0.5":
        partial(VIMCOStar, 0.5)}``.
    :param num_particles: numbers of particles. Defaults to 4, 16, 64, 256.
    :param tuple model_args: the model's arguments.
    :param dict model_kwargs: the model's keyword arguments.
    :param jax.random.key rng_key: random number generator key.
    :param int num_draws: number of gradients for each, at least 2. Defaults to 1,000.
    :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to True.
    :return: ``snr`` and ``variance`` over dimensions ``objective``, ``num_particles`` and ``parameter`` (one for each
        element, ``loc[0]``), and ``seconds`` per gradient over the first two, the best of five once compiled.
    :raises ValueError: as :func:`gradient_snr`.
    """
    import xarray as xr  # it takes a second

    check_key(rng_key)
    num_draws = check_integer("num_draws", num_draws, 2, "a standard deviation needs as many")
    fit = Fitted.of(svi, params, model_args, model_kwargs, whole=False)
    keys = split(rng_key, num_draws)
    snr, variance, seconds = [], [], []
    total = len(objectives) * len(num_particles) * num_draws
    with patient_bar(total, "gradients" if progress_bar else None) as bar:
        for name, make in objectives.items():
            for n in num_particles:
                bar.set_postfix_str(f"{name}, N = {n}")
                gradient = _gradient(fit, make(num_particles=n))
                mean, std = (_flat(moment) for moment in _moments(gradient, keys, fit.params, bar))
                snr.append(_ratio(mean, std))
                variance.append(std**2)
                seconds.append(_seconds(gradient, keys[0], fit.params))
    shape = (len(objectives), len(num_particles))
    dims = ("objective", "num_particles", "parameter")
    return xr.Dataset(
        {
            "snr": (dims, np.reshape(snr, (*shape, -1))),
            "variance": (dims, np.reshape(variance, (*shape, -1))),
            "seconds": (dims[:2], np.reshape(seconds, shape)),
        },
        coords={"objective": list(objectives), "num_particles": list(num_particles), "parameter": _names(fit.params)},
    )


def _gradient(fit: Fitted, objective: ELBO) -> Callable:
    def loss(params, rng_key):
        return objective.loss(rng_key, params, fit.svi.model, fit.svi.guide, *fit.args, **fit.kwargs)

    return jax.jit(jax.grad(loss))


def _moments(gradient: Callable, keys: Array, params, bar: tqdm) -> tuple[Any, Any]:
    """Mean and standard deviation over keys, in one pass and double precision on the host.

    :param bar: told of each key.
    """
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
        bar.update(count)
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
        names += element_names(name, jnp.shape(leaf))
    return names
