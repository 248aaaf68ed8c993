# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What the weights of many draws say, without the draws."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import biject_to

from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.moments import Moments
from numpyro_vimco.draws.pooling import by_start, in_pool, pooled
from numpyro_vimco.draws.proposals import WeightedDraw, check_weights, merged, plate_names, plate_sizes
from numpyro_vimco.draws.weights import WeightStream, WeightSummary
from numpyro_vimco.sites import element_names, is_discrete, is_latent_site

# Correlations are looked for among so many continuous coordinates: these draws are kept.
CORRELATED_SIZE = 64
# Of all latents, the first draws are kept until there are so many of them, or of their elements.
KEPT_DRAWS, KEPT_SIZE = 1000, 2**22


@dataclass(frozen=True)
class Weighed:
    """What the weights of a guide's draws say, or those of the pooled draws of several starts.

    :ivar summary: of the weights.
    :ivar shape: of the plates that are common to all sites, whose elements have weights of their own.
    :ivar log_weight: the log-weights themselves, of shape ``(draws,)``, where they are joint; else None.
    :ivar guide_share: the share of the mixture's density that guides have without their defence, of each draw, where
        weights are joint: draws weighted by it are draws of the guides.
    :ivar continuous: draws of the first continuous latents that are in no plate, in unconstrained space, of shape
        ``(draws, coordinates)``, where weights are joint.
    :ivar coordinates: their names.
    :ivar moments: weighted means of all latents.
    :ivar lost: the share of the posterior that the defence proposes and guides do not, of the worst element.
    :ivar undefended: names of the latents that no defensive component draws by itself or with their parents.
    :ivar draws: the first draws of these, of shape ``(draws, *batch, *event)``, where weights are joint; else empty.
    """

    summary: WeightSummary
    shape: tuple[int, ...]
    log_weight: np.ndarray | None
    guide_share: np.ndarray | None
    continuous: np.ndarray
    coordinates: list[str]
    moments: Moments
    lost: float
    undefended: tuple[str, ...]
    draws: Mapping[str, np.ndarray]

    @property
    def log_weight_of_draws(self) -> np.ndarray:
        """The log-weights of ``draws``, where there are any."""
        assert self.log_weight is not None
        return self.log_weight[: len(next(iter(self.draws.values())))]


def weigh_pool(approx: Approximation, rng_key: Array, num_draws: int, progress: str | None = None) -> Weighed:
    """Draw from the guide, or from the mixture of those of all starts, and keep only what the weights say.

    :raises ValueError: for NaN weights, and where all are zero.
    """
    approx = in_pool(approx)
    sampler, sizes = pooled(approx), plate_sizes(approx)
    shape = tuple(sizes[name] for name in plate_names(approx, sampler.structure.dims))
    coordinates = _coordinates(approx) if not shape else {}

    def weight(draw: WeightedDraw) -> tuple[Array, Array, Array, Mapping[str, Array]]:
        supports = {name: approx.model_trace[name]["fn"].support for name in coordinates}
        unconstrained = [biject_to(support).inv(draw.values[name]) for name, support in supports.items()]
        continuous = jnp.concatenate([jnp.zeros(0), *map(jnp.ravel, unconstrained)])
        return draw.log_weight, jnp.exp(draw.log_guide_share), continuous, draw.values

    stream, moments, shares = WeightStream(num_draws, int(np.prod(shape))), Moments(approx.event_dims), Moments({"": 0})
    kept: list[tuple[np.ndarray, ...]] = []
    first: list[Mapping[str, np.ndarray]] = []
    taken = nan = 0
    size = sum(np.size(site["value"]) for site in approx.latents().values())
    missing = min(KEPT_DRAWS, KEPT_SIZE // max(size, 1))
    for block in sampler.blocks(approx.starts, rng_key, -(-num_draws // sampler.size), weight, progress):
        log_weight, share, continuous, values = merged(block, num_draws - taken)
        flat = log_weight.reshape(len(log_weight), -1).astype(log_weight.dtype if shape else float)
        taken, nan = taken + len(flat), nan + int(np.isnan(flat).any(1).sum())
        if nan:
            continue
        stream.add(flat)
        moments.add(log_weight, values)
        shares.add(log_weight, {"": share})
        if not shape:
            kept.append((flat[:, 0], share.reshape(-1).astype(float), continuous))
            first.append({name: value[:missing] for name, value in values.items()})
            missing -= min(missing, len(flat))
    check_weights(nan, not nan and stream.has_zero(), num_draws)
    log_weight, guide_share, continuous = (
        (None, None, np.zeros((num_draws, 0))) if shape else (np.concatenate(parts) for parts in zip(*kept))
    )
    draws = {name: np.concatenate([block[name] for block in first]) for name in (first[0] if first else ())}
    names = [name for names in coordinates.values() for name in names]
    lost = 1 - float(shares.estimates()[""].mean.min())
    return Weighed(
        stream.summary(), shape, log_weight, guide_share, continuous, names, moments, lost, sampler.undefended, draws
    )


def moments_of_starts(
    approx: Approximation, rng_key: Array, num_draws: int, progress: str | None = None
) -> list[Moments]:
    """Of each start by itself: weighted means of all latents, from so many draws of its guide with their own weights.

    :raises ValueError: for NaN weights.
    """
    sampler = by_start(approx)
    found = [Moments(approx.event_dims) for _ in range(sampler.size)]
    nan = 0
    blocks = sampler.blocks(approx.starts, rng_key, num_draws, lambda draw: (draw.log_weight, draw.values), progress)
    for log_weight, values in blocks:
        nan += int(np.isnan(log_weight).reshape(len(log_weight) * sampler.size, -1).any(1).sum())
        for i, moments in enumerate(found):
            moments.add(log_weight[:, i], {name: value[:, i] for name, value in values.items()})
    check_weights(nan, False, num_draws * sampler.size)
    return found


def _coordinates(approx: Approximation) -> dict[str, list[str]]:
    """Names of the coordinates of continuous latents that are in no plate, by site, as long as they are few."""
    found: dict[str, list[str]] = {}
    size = 0
    for name, site in approx.model_trace.items():
        if not is_latent_site(site) or is_discrete(site) or site["cond_indep_stack"]:
            continue
        shape = jax.eval_shape(biject_to(site["fn"].support).inv, site["value"]).shape
        size += int(np.prod(shape))
        if size <= CORRELATED_SIZE:
            found[name] = element_names(name, shape)
    return found
