# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Are the elements of a plate independent, as a bound for each of them supposes?

Two particles are drawn, and the latents of some elements exchanged between them. If elements are independent, the
densities of the other elements stay what they are. Nor may any density depend on latents that the model masks, be they
sampled or summed out.

The check misses a dependence that shows at rare values only, or at other parameters (a coupling that is zero at the
start of a fit). Diagnostics therefore check again, at the fitted parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from numpyro_vimco.dependence import may_mix
from numpyro_vimco.objectives.checks import elements_error, masked_latent_error
from numpyro_vimco.objectives.densities import SiteDensities, log_prob_of
from numpyro_vimco.objectives.enumeration_checks import masked_sum_error, table_error
from numpyro_vimco.objectives.levels import level_of
from numpyro_vimco.objectives.plates import Structure, aligned_shape
from numpyro_vimco.objectives.program import Kinds, Program, Values
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import is_drawn, mask_of, sample_sites, states

# Number of pairs of particles; and how far values may differ by rounding, relative to the sum of their terms' sizes.
PAIRS, ROUNDING = 4, 1e-4


def may_be_dependent(program: Program, kinds: Kinds, params: dict[str, Any], rng_key: Array) -> bool:
    """Whether :func:`check_elements` may find a dependence, by how densities are computed; no value is computed.

    False is certain. In most fits it spares :func:`check_elements`, which has to be compiled.

    :param kinds: of the program.
    """
    if kinds.masked_sums:
        return True
    if not (kinds.elements or kinds.masks):
        return False
    sizes: set[int] = set()
    masked: list[str] = []

    def draw(rng_key: Array) -> Values:
        sites = program.sites(params, rng_key)
        everywhere = sample_sites(sites.model_trace) + sample_sites(sites.guide_trace)
        sizes.update(frame.size for site in everywhere for frame in site["cond_indep_stack"])
        masked.extend(name for name, mask in sites.masks.items() if mask is not None)
        return {site["name"]: site["value"] for site in sample_sites(sites.guide_trace) if is_drawn(site)}

    def densities(values: Values) -> dict[str, Array]:
        sites = program.sites(params, rng_key, values)
        found = {site["name"]: log_prob_of(site) for site in sample_sites(sites.model_trace)}
        return found | {f"{s['name']} of the guide": sites.of_guide_site(s) for s in sample_sites(sites.guide_trace)}

    drawn = jax.eval_shape(draw, rng_key)
    return bool(masked) or may_mix(densities, drawn, sizes - {1})


def check_elements(program: Program, params: dict[str, Any]) -> None:
    """Raise for elements that have weights of their own and are not independent; at concrete values.

    Where the model holds traced values (an annealed likelihood), nothing can be compared, and the check passes.

    :raises ValueError: naming the plate, or the masked latent, and a site.
    """
    draw_key, evaluation_key = split(jax.random.key(0))
    drawn_sites: dict[str, _Site] = {}
    structures: list[Structure] = []

    def draw(rng_key: Array) -> tuple[Values, dict[str, Array]]:
        sites = program.sites(params, rng_key)
        structures.append(sites.structure)
        drawn = [site for site in sample_sites(sites.guide_trace) if is_drawn(site)]
        drawn_sites.update({site["name"]: _Site.of(site, program) for site in drawn})
        masks = {name: mask[0] for name, mask in sites.masks.items() if mask is not None and name in drawn_sites}
        return {site["name"]: site["value"] for site in drawn}, masks

    found = _quick(jax.vmap(draw), split(draw_key, 2 * PAIRS))
    if found is None:
        return
    drawn, masks = found
    first, second = ({name: value[i::2] for name, value in drawn.items()} for i in (0, 1))

    def densities(level: str | None, *particles: Values) -> list[Sums]:
        fn = jax.vmap(lambda values: _densities(program.sites(params, evaluation_key, values), level, program))
        found: Sums = _quick(fn, jax.tree.map(lambda *parts: jnp.concatenate(parts), *particles)) or {}
        return [{k: found[k].part(slice(i * PAIRS, (i + 1) * PAIRS)) for k in found} for i in range(len(particles))]

    for level in (None, *program.plate_particles):
        members = {name: site for name, site in drawn_sites.items() if level in (None, site.level)}
        plates = {frame for site in members.values() for frame in site.frames if frame.dim in structures[0].kept(level)}
        for plate in plates:
            choice = np.random.default_rng(0).permutation(plate.size) % 2 == 0
            choice = choice.reshape(-1, *(1,) * (-1 - plate.dim))
            all_second = {**first, **{name: second[name] for name in members}}
            exchanged = {name: site.where(choice, second[name], first[name]) for name, site in members.items()}
            of_first, of_second, of_mixed = densities(level, first, all_second, {**first, **exchanged})
            for name, mixed in of_mixed.items():
                if mixed.differs_from(jnp.where(choice, of_second[name].value, of_first[name].value)):
                    raise elements_error(plate.name, name)
    for latent, mask in masks.items():
        kept = mask[::2].reshape(PAIRS, *mask.shape[1:], *(1,) * (first[latent].ndim - mask.ndim))
        moved = {**first, latent: jnp.where(kept, first[latent], second[latent])}
        before, after = densities(None, first, moved)
        for name in after:
            if after[name].differs_from(before[name].value):
                raise masked_latent_error(name, latent)
    _check_masked_sums(program, params)


def check_tables(program: Program, params: dict[str, Any]) -> None:
    """Raise for a site whose density where others are summed out is not that at the same values drawn.

    Four particles are drawn with values of the summed sites. The check passes where the model holds traced values.

    :raises ValueError: naming the sites.
    """
    parents: dict[str, set[str]] = {}

    def densities(rng_key: Array) -> dict[str, tuple[Array, Array]]:
        sites = program.at(params, rng_key, {})
        parents.update(sites.parents())
        return sites.drawn_and_tabled()

    for name, (drawn, tabled) in (_quick(jax.vmap(densities), split(jax.random.key(0), PAIRS)) or {}).items():
        if drawn.shape != tabled.shape or _Sum(drawn, jnp.abs(drawn)).differs_from(tabled):
            raise table_error(name, parents[name])


def _check_masked_sums(program: Program, params: dict[str, Any]) -> None:
    """Raise for a density that depends on elements of a summed site that are masked: these take other values.

    :raises ValueError: naming the summed site and the other one.
    """
    num_states: dict[str, int] = {}

    def moved(rng_key: Array) -> dict[str, list[tuple[dict[str, Array], dict[str, Array]]]]:
        summed, densities = program.of_summed(params, rng_key)
        values = {name: site["value"] for name, site in summed.items()}
        before, found = densities(values), {}
        for name, site in summed.items():
            if (mask := mask_of(site["fn"])) is not None:
                num_states[name] = size = states(site["fn"]).size
                others = [(values[name] + shift) % size for shift in range(1, min(size, PAIRS + 1))]
                after = [densities({**values, name: jnp.where(mask[0], values[name], other)}) for other in others]
                found[name] = [(before, densities) for densities in after]
        return found

    for latent, pairs in (_quick(jax.vmap(moved), split(jax.random.key(0), PAIRS)) or {}).items():
        for before, after in pairs:
            for name, log_prob in before.items():
                if _Sum(log_prob, jnp.abs(log_prob)).differs_from(after[name]):
                    raise masked_sum_error(name, latent, num_states[latent])


def _quick(fn: Callable, argument: Any) -> Any:
    """``fn(argument)``, compiled with little optimization, as it runs once; None if ``fn`` holds traced values."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(argument)
    if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
        return None
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(partial(jax.core.eval_jaxpr, closed.jaxpr, closed.consts), compiler_options=options)
    return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves(argument)))


class _Site(NamedTuple):
    """The plates of a site that the guide draws.

    :ivar level: the named plate that it is in, or None.
    :ivar frames: all plates that it is in.
    """

    level: str | None
    frames: list
    event_dim: int

    @classmethod
    def of(cls, site: dict, program: Program) -> "_Site":
        return cls(level_of(site, program.plate_particles), site["cond_indep_stack"], site["fn"].event_dim)

    def where(self, choice: np.ndarray, x: Array, y: Array) -> Array:
        """Elements of ``x`` where ``choice`` is true, and of ``y`` elsewhere; both have a leading axis."""
        shape = aligned_shape(choice.shape, x.ndim - 1 - self.event_dim, self.event_dim)
        return jnp.where(choice.reshape(1, *shape), x, y)


class _Sum(NamedTuple):
    """Log-densities in nats, summed over the elements that share a weight.

    :ivar size: the same sum of their absolute values: rounding is relative to it.
    """

    value: Array
    size: Array

    def part(self, index: slice) -> "_Sum":
        return _Sum(self.value[index], self.size[index])

    def differs_from(self, other: Array) -> bool:
        """Whether any value differs by more than rounding. NaN does not count: other checks find it."""
        same = (self.value == other) | (jnp.abs(self.value - other) <= ROUNDING * (1 + self.size))
        return not bool(jnp.all(same | jnp.isnan(self.value) | jnp.isnan(other)))


Sums = dict[str, _Sum]


def _densities(sites: SiteDensities, level: str | None, program: Program) -> Sums:
    """The log-density of each site of a level, guide and model together.

    For the shared level these are all sites, as all are in the plates common to all sites.
    """
    found: Sums = {}
    for tr, log_prob_of_site in ((sites.guide_trace, sites.of_guide_site), (sites.model_trace, log_prob_of)):
        for site in sample_sites(tr):
            if level in (None, level_of(site, program.plate_particles)):
                log_prob = log_prob_of_site(site)
                size = jnp.where(jnp.isfinite(log_prob), jnp.abs(log_prob), 0)
                value, size = (sites.structure.sum_to_level(x, level) for x in (log_prob, size))
                before = found.get(site["name"], _Sum(jnp.zeros(()), jnp.zeros(())))
                found[site["name"]] = _Sum(before.value + value, before.size + size)
    return found
