# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions: the model with other arguments, at draws of the posterior."""

from collections.abc import Callable, Mapping
from typing import Any

from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import seed, substitute, trace

from numpyro_vimco.control_flow import Given, in_turn, is_in_scan
from numpyro_vimco.draws.approximation import drawn_sites, one_start, signature_misfit
from numpyro_vimco.draws.chunks import Chunked
from numpyro_vimco.export.posterior_draws import PosteriorDraws
from numpyro_vimco.randomness import split


def predict(
    draws: PosteriorDraws, rng_key: Array, args: tuple, kwargs: Mapping[str, Any], progress: str | None
) -> dict[str, np.ndarray]:
    """What the model says of other arguments: its sites that are neither observed nor of the posterior, and functions.

    Of a series that `condition` observes at first times only, all is there: what was observed, and what is drawn.

    :param progress: name of the progress bar; None for no bar.
    :return: arrays of shape ``(draws, ...)``.
    :raises ValueError: as :meth:`.Posterior.predict`.
    """
    approx = draws.approx
    kwargs = {**approx.svi.static_kwargs, **kwargs}
    if problem := signature_misfit(approx.svi.model, args, kwargs):
        raise ValueError(
            f"What `predict` was given after the key does not fit {problem}. Pass the model's arguments, with None for "
            "what is to be predicted."
        )
    model = substitute(seed(approx.svi.model, random.key(0)), data=approx.params)
    new_trace = trace(Given(model, {})).get_trace(*args, **kwargs)
    given, longer = {}, {}
    for name, value in draws.latents.items():
        site = new_trace.get(name)
        if site is None or site["type"] != "sample" or site["is_observed"]:
            continue
        old = value.shape[1:]
        if old == jnp.shape(site["value"]):
            given[name] = value
        elif is_in_scan(site):
            _check_continues(site, approx.model_trace[name], old)
            longer[name] = value
        else:
            _check_is_new(site, old)
    drawn = drawn_sites(approx.svi.model, new_trace, args, kwargs)
    shown = [
        name
        for name, site in new_trace.items()
        if site["type"] == "deterministic"
        or (site["type"] == "sample" and name not in given and (not site["is_observed"] or name in drawn))
    ]
    if not shown:
        raise ValueError(
            "There is nothing to predict: all sites of the model are observed or of the posterior. Pass None for the "
            "data that are to be predicted, and let the model take it: `numpyro.sample('y', ..., obs=y)`."
        )

    def one(starts: Any, key: Array, start: Array, given: dict, longer: dict) -> dict[str, Array]:
        params = one_start(starts, start)
        model: Callable = substitute(seed(approx.svi.model, key), data=params)
        # Times that a `scan` had in the fit; NumPyro draws the others.
        model = Given(substitute(model, data=longer), given)
        found = trace(model).get_trace(*args, **kwargs)
        return {name: found[name]["value"] for name in shown}

    inputs = split(rng_key, len(draws.start)), draws.start, given, longer
    size = max((np.size(site["value"]) for site in new_trace.values() if site["type"] == "sample"), default=1)
    return Chunked(one, approx.num_at_a_time(largest=size)).all(approx.starts, *inputs, progress=progress)


def _check_continues(site: dict, old_site: dict, old: tuple[int, ...]) -> None:
    """Raise unless a latent in `scan` goes on from its times in the fit."""
    new = jnp.shape(site["value"])
    forward = in_turn(site, jnp.arange(2))[0] == 0 and is_in_scan(old_site)
    if not forward or old[1:] != new[1:] or old[0] > new[0]:
        raise ValueError(
            f"Latent '{site['name']}' has shape {old} in the fit and {new} here. A forecast goes on where the series "
            "of the fit ends: `scan` forward, over all times of the fit and those after them, with the data of the fit "
            "by `condition`, or without data."
        )


def _check_is_new(site: dict, old: tuple[int, ...]) -> None:
    """Raise unless a latent of another shape is one of a plate of another size, whose elements are others."""
    new, event_dim = jnp.shape(site["value"]), site["fn"].event_dim
    batch = len(new) - event_dim
    plates = {frame.dim + batch for frame in site["cond_indep_stack"]}
    same_rank = len(old) == len(new)
    if not same_rank or any(old[i] != new[i] for i in range(len(new)) if i not in plates):
        raise ValueError(
            f"Latent '{site['name']}' has shape {old} in the fit and {new} here, in a dimension that is no plate's: "
            "what of it is the same cannot be known. Pass arguments for which it has the same shape; write new parts "
            "as a site of their own, or the series by `scan`."
        )
