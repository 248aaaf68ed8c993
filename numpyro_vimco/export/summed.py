# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of summed sites from their exact distribution, given the sites that were sampled.

The derivative of log Σ_e p(x, z, e) with respect to what is added to log p(e_i | …) is the probability of each value of
e_i given x and z. So sites are drawn one after the other, as the model draws them: each from these probabilities, with
all values but the drawn one excluded from then on. Along a chain that is what forward filtering and backward sampling
computes; elements of a plate are independent given the sites before, and are drawn together. (Derived here;
`numpyro.contrib.funsor.infer_discrete` has no chains in `scan`.)
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from numpyro_vimco.control_flow import in_turn
from numpyro_vimco.densities.densities import SiteDensities
from numpyro_vimco.densities.enumeration import Axes, Group, axes_of, root
from numpyro_vimco.densities.zero_weights import FLOOR
from numpyro_vimco.draws.approximation import Approximation, one_start
from numpyro_vimco.draws.chunks import Chunked
from numpyro_vimco.draws.proposals import program_of
from numpyro_vimco.randomness import split, split_by_name

Values = dict[str, Array]


def draw_summed(
    approx: Approximation, rng_key: Array, latents: Mapping[str, np.ndarray], start: np.ndarray, progress: str | None
) -> dict:
    """A draw of all summed sites for each draw of the other latents.

    :param latents: of shape ``(draws, *batch, *event)``.
    :param start: of each draw.
    :param progress: name of the progress bar; None for no bar.
    :return: of the same form; empty where no site is summed out.
    """
    if not approx.summed:
        return {}
    program = program_of(approx, {})

    def draw(starts: Any, rng_key: Array, start: Array, values: Values) -> Values:
        program_key, draw_key = split(rng_key)
        params = one_start(starts, start)
        return draw_at(program.at(params, program_key, values), draw_key)

    chunked = approx.kept("summed", lambda: Chunked(draw, approx.chunk_size()))
    return chunked.all(approx.starts, split(rng_key, len(start)), start, latents, progress=progress)


def draw_at(sites: SiteDensities, rng_key: Array) -> Values:
    """A draw of all summed sites given the others, of the shapes that they have in the model."""
    found: Values = {}
    for group, key in zip(sites.groups, split(rng_key, max(len(sites.groups), 1))):
        found |= _draw_group(sites, group, key)
    return {name: value.astype(sites.model_trace[name]["value"].dtype) for name, value in found.items()}


def _draw_group(sites: SiteDensities, group: Group, rng_key: Array) -> Values:
    axes = {site["name"]: axes_of(site) for site in group if root(site["name"]) in sites.summed}
    turns, num_turns = _turns(axes)

    def total(added: Values) -> Array:
        return jnp.sum(sites.of_group(group, added)[1])

    def draw_next(added: Values, turn_and_key) -> tuple[Values, None]:
        turn, turn_key = turn_and_key
        probabilities = jax.grad(total)(added)
        for name, key in split_by_name(turn_key, axes).items():
            dim = axes[name].values
            drawn = random.categorical(key, jnp.log(probabilities[name]), axis=dim)
            excluded = jnp.where(jax.nn.one_hot(drawn, axes[name].shape[dim], axis=dim) > 0, 0.0, FLOOR)
            added = {**added, name: jnp.where(turns[name] == turn, excluded, added[name])}
        return added, None

    nothing = {name: jnp.zeros(about.shape) for name, about in axes.items()}
    added, _ = jax.lax.scan(draw_next, nothing, (jnp.arange(num_turns), split(rng_key, num_turns)))
    values = {name: jnp.argmax(added[name], axis=about.values) for name, about in axes.items()}
    return {name: _joined(sites.model_trace[name], values) for name in {*map(root, axes)}}


def _turns(axes: dict[str, Axes]) -> tuple[dict[str, np.ndarray], int]:
    """When each site is drawn, by an array that broadcasts to its values, and how many turns there are.

    Sites of one `scan` take turns, time by time.
    """
    turns: dict[str, np.ndarray] = {}
    turn = 0
    for times, names in groupby(axes, key=lambda name: axes[name].times):
        together = list(names)
        for i, name in enumerate(together):
            own = turn + i if times is None else turn + i + len(together) * np.arange(times)
            turns[name] = np.reshape(own, (-1, *(1,) * (len(axes[name].shape) - 1)))
        turn += len(together) * (times or 1)
    return turns, turn


def _joined(site: dict, values: Values) -> Array:
    """The values of a site, of its shape in the model, from those of its parts in `scan`, which are in turn."""
    name, shape = site["name"], jnp.shape(site["value"])
    parts = [value for part, value in values.items() if root(part) == name]
    if len(parts) == 1 and name in values:
        return parts[0].reshape(shape)
    return in_turn(site, jnp.concatenate([part.reshape(-1, *shape[1:]) for part in parts]))
