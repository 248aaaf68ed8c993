# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of a program's values: are the elements of plates independent, as a bound for each of them supposes?

:mod:`numpyro_vimco.checks.independence` says how that is found out. No density may depend on latents that the model
masks, and sums over latents must be what the model says.

The checks miss what shows at very rare values only, or at other parameters (a coupling that is zero at the start of a
fit). Diagnostics therefore check again, at the fitted parameters.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_vimco.checks.chains import steps_depend_error
from numpyro_vimco.checks.enumeration_checks import masked_sum_error, table_error
from numpyro_vimco.checks.independence import Sum, any_draw, are_dependent
from numpyro_vimco.checks.supports_and_plates import elements_error, masked_latent_error
from numpyro_vimco.densities.densities import SiteDensities, log_prob_of
from numpyro_vimco.densities.levels import Values, level_of
from numpyro_vimco.densities.plates import Structure
from numpyro_vimco.densities.program import Kinds, Program
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import is_delta, is_latent_site, log_prob_at_value, mask_of, sample_sites, states

# Sources of draws: the guide, the model's prior, and all of the support of each site.
GUIDE, PRIOR, SUPPORT = range(3)
NUM_SOURCES = 3
# A masked element takes so many states.
STATES = 5

Params = dict[str, Any]
Errors = list[Callable[[], ValueError]]
Found = list[tuple[Callable[[], ValueError], Array]]
# Errors, and a function of parameters to whether each is to be raised.
Check = tuple[Errors, Callable[[Params], list[Array] | None]]


class _Latent(NamedTuple):
    """The plates of a site that the guide draws.

    :ivar level: the named plate that it is in, or None.
    :ivar frames: all plates that it is in.
    """

    level: str | None
    frames: list
    event_dim: int


Latents = dict[str, _Latent]


def value_checks(program: Program, kinds: Kinds) -> Callable[[Params], None]:
    """A function of parameters that raises where a program's log-weights would be wrong. It compiles once.

    Where the program holds values that JAX traces, nothing can be compared, and the check passes.

    :param kinds: of the program.
    :return: the function; it raises ``ValueError``, naming a site, and the plate, the masked latent, or the summed
        sites.
    """
    # Nothing is differentiated. So all objectives and diagnostics have one compiled check.
    program = replace(program, by_score=lambda site: False, score_sites=frozenset())
    checks = []
    if kinds.elements > 1 or kinds.masks:
        checks.append(_elements_check(program, kinds))
    if program.chains:
        checks.append(_steps_check(program))
    if kinds.sums:
        checks.append(_tables_check(program))
    if kinds.masked_sums:
        checks.append(_masked_sums_check(program))

    def run(params: Params) -> None:
        for errors, found in checks:
            for make_error, is_found in zip(errors, found(params) or []):
                if is_found:
                    raise make_error()

    return run


def _elements_check(program: Program, kinds: Kinds) -> Check:
    """For elements that have weights of their own and are not independent, and for masked ones that count."""
    errors: Errors = []

    def check(params: Params, rng_key: Array, source: Array) -> list[Array]:
        draw_key, evaluation_key = split(rng_key)
        latents, structure, both = _two_draws(program, params, draw_key, source)

        def sites(values: Values) -> SiteDensities:
            return program.sites(params, evaluation_key, values)

        found = [_dependent(program, level, sites, latents, structure, both) for level in (None, *program.local)]
        if kinds.masks:
            found.append(_masked_that_count(program, sites, latents, both))
        errors[:] = [error for pairs in found for error, _ in pairs]
        return [is_found for pairs in found for _, is_found in pairs]

    return errors, any_draw(check, NUM_SOURCES, kinds.elements)


def _dependent(
    program: Program, level: str | None, sites: Callable, latents: Latents, structure: Structure, both: list[Values]
) -> Found:
    """For each plate of a level and each site, whether its elements depend on each other."""
    members = {name: latent for name, latent in latents.items() if level in (None, latent.level)}
    frames = {frame for latent in members.values() for frame in latent.frames}
    found: Found = []

    def sums(values: Values) -> dict[str, Sum]:
        return _sums(sites(values), level, program)

    def dim_of(site: str, dim: int) -> int:
        return dim

    for plate in sorted(frame for frame in frames if frame.dim in structure.kept(level)):
        axes = {name: plate.dim - latent.event_dim for name, latent in members.items()}
        dependent = are_dependent(sums, both[0], both[1], axes, partial(dim_of, dim=plate.dim), plate.size)
        found += [(partial(elements_error, plate.name, name), value) for name, value in dependent.items()]
    return found


def _masked_that_count(program: Program, sites: Callable, latents: Latents, both: list[Values]) -> Found:
    """For each masked latent and each site, whether its density depends on what is masked."""
    first, second = both
    masks = {name: mask[0] for name, mask in sites(first).masks.items() if mask is not None and name in latents}
    moved = [first]
    for name, mask in masks.items():
        kept = mask.reshape(*mask.shape, *(1,) * (first[name].ndim - mask.ndim))
        moved.append({**first, name: jnp.where(kept, first[name], second[name])})
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *moved)
    at_moved = jax.lax.map(lambda values: _sums(sites(values), None, program), stacked)
    return [
        (partial(masked_latent_error, name, latent), Sum(of.value[i], of.size[i]).differs_from(of.value[0]))
        for i, latent in enumerate(masks, 1)
        for name, of in at_moved.items()
    ]


def _steps_check(program: Program) -> Check:
    """For steps of a chain that depend on each other in the guide.

    Parameters are moved a little, as couplings are zero where a fit begins.
    """
    errors: Errors = []

    def check(params: Params, rng_key: Array, source: Array) -> list[Array]:
        draw_key, evaluation_key, move_key = split(rng_key, 3)
        # In a fit parameters are traced: those are taken that the guide begins with.
        params = _moved({**program.first_params(params, draw_key), **params}, move_key)
        _, _, both = _two_draws(program, params, draw_key, source)
        errors.clear()
        found: list[Array] = []
        for chain, about in program.chains.items():

            def densities(values: Values, about=about) -> dict[str, Sum]:
                guide_trace = program.sites(params, evaluation_key, values).guide_trace
                return {name: Sum.of(log_prob_at_value(guide_trace[name])) for name in about.latents}

            ndims = {name: jnp.ndim(value.value) for name, value in jax.eval_shape(densities, both[0]).items()}
            axes = {name: -jnp.ndim(both[0][name]) for name in about.latents}
            dims = {name: -ndim for name, ndim in ndims.items()}
            dependent = are_dependent(densities, both[0], both[1], axes, dims.__getitem__, about.length)
            errors.extend(partial(steps_depend_error, name, chain) for name in dependent)
            found += dependent.values()
        return found

    return errors, any_draw(check, NUM_SOURCES, max(chain.length for chain in program.chains.values()))


def _moved(params: Params, rng_key: Array) -> Params:
    """Parameters that differ by a tenth, and where they are zero by a tenth of one."""
    leaves, structure = jax.tree.flatten(params)

    def moved(leaf: Array, key: Array) -> Array:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        noise = 0.1 * random.uniform(key, jnp.shape(leaf), jnp.result_type(leaf), -1, 1)
        return jnp.where(leaf == 0, noise, leaf * (1 + noise))

    return jax.tree.unflatten(structure, map(moved, leaves, split(rng_key, max(len(leaves), 1))))


def _tables_check(program: Program) -> Check:
    """For a site whose density where others are summed out is not that at the same values drawn."""
    errors: Errors = []

    def check(params: Params, rng_key: Array, source: Array) -> list[Array]:
        draw_key, evaluation_key = split(rng_key)
        _, values = _draw(program, params, draw_key, source)
        sites = program.at(params, evaluation_key, values)
        parents = sites.parents()
        errors.clear()
        found = []
        for name, (drawn, tabled) in sites.drawn_and_tabled().items():
            errors.append(partial(table_error, name, parents[name]))
            same = drawn.shape == tabled.shape
            found.append(Sum.of(drawn).differs_from(tabled) if same else jnp.array(True))
        return found

    return errors, any_draw(check, NUM_SOURCES, 1)


def _masked_sums_check(program: Program) -> Check:
    """For a density that depends on elements of a summed site that are masked: these take other values."""
    errors: Errors = []

    def check(params: Params, rng_key: Array, source: Array) -> list[Array]:
        summed, densities = program.of_summed(params, rng_key)
        values = {name: site["value"] for name, site in summed.items()}
        before = densities(values)
        errors.clear()
        found = []
        for latent, site in summed.items():
            if (mask := mask_of(site["fn"])) is None:
                continue
            size = states(site["fn"]).size
            for shift in range(1, min(size, STATES)):
                moved = jnp.where(mask[0], values[latent], (values[latent] + shift) % size)
                for name, log_prob in densities({**values, latent: moved}).items():
                    errors.append(partial(masked_sum_error, name, latent, size))
                    found.append(Sum.of(before[name]).differs_from(log_prob))
        return found

    return errors, any_draw(check, 1, 1)


def _draw(program: Program, params: Params, rng_key: Array, source: Array) -> tuple[SiteDensities, Values]:
    """Values of all latents from a source, and the sites of a draw of the guide.

    A Delta of the guide is a function of other draws and of parameters: it has no value of its own.
    """
    guide_key, model_key = split(rng_key)
    sites = program.sites(params, guide_key)
    values = program.anywhere(params, model_key, sites, source == PRIOR)
    for site in sample_sites(sites.guide_trace):
        if is_delta(site):
            values.pop(site["name"], None)
        elif is_latent_site(site):
            drawn = jnp.asarray(site["value"])
            other = values.get(site["name"], drawn)
            values[site["name"]] = jnp.where(source == GUIDE, drawn, other.astype(drawn.dtype))
    return sites, values


def draw_anywhere(program: Program, params: Params, rng_key: Array, source: Array) -> Values:
    """Values of the guide's latents from a source."""
    sites, values = _draw(program, params, rng_key, source)
    return {name: values[name] for name in sites.guide_trace if name in values}


def _two_draws(
    program: Program, params: Params, rng_key: Array, source: Array
) -> tuple[dict[str, _Latent], Structure, list[Values]]:
    """Two draws of the guide's latents, what is known of these latents, and how plates combine densities."""
    latents: dict[str, _Latent] = {}
    structures: list[Structure] = []

    def draw(rng_key: Array) -> Values:
        sites, values = _draw(program, params, rng_key, source)
        structures.append(sites.structure)
        drawn = {name: site for name, site in sites.guide_trace.items() if name in values}
        for name, site in drawn.items():
            level = level_of(site, program.local)
            latents[name] = _Latent(level, site["cond_indep_stack"], site["fn"].event_dim)
        return {name: values[name] for name in drawn}

    both = jax.lax.map(draw, split(rng_key))
    return latents, structures[0], [{name: value[i] for name, value in both.items()} for i in range(2)]


def _sums(sites: SiteDensities, level: str | None, program: Program) -> dict[str, Sum]:
    """The log-density of each site of a level, guide and model together.

    For the shared level these are all sites, as all are in the plates common to all sites.
    """
    found: dict[str, Sum] = {}
    for tr, log_prob_of_site in ((sites.guide_trace, sites.of_guide_site), (sites.model_trace, log_prob_of)):
        for site in sample_sites(tr):
            if level in (None, level_of(site, program.local)):
                of_site = Sum.of(log_prob_of_site(site), partial(sites.structure.sum_to_level, level=level))
                before = found.get(site["name"])
                found[site["name"]] = of_site if before is None else before.plus(of_site)
    return found
