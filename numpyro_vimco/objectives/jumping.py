# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Latents of a program at which its density jumps: see :mod:`numpyro_vimco.checks.jumps`."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import IdentityTransform, Transform

from numpyro_vimco.arguments import warn
from numpyro_vimco.checks.jumps import LINES, candidates, jumps
from numpyro_vimco.compilation import ONCE, Compiled, untraced
from numpyro_vimco.densities.levels import Values
from numpyro_vimco.densities.program import Program
from numpyro_vimco.objectives.elements import NUM_SOURCES, draw_anywhere
from numpyro_vimco.private.of_numpyro import without_validation
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import bounds_of, is_latent_site, sample_sites, support_of


def jumping_sites(make_program: Callable[[], Program], params: dict[str, Any], is_traced: bool) -> list[str]:
    """The path sites of a guide at which the model's log-density jumps. A warning names them.

    :param make_program: makes the program anew, as it may hold keys that JAX traces.
    :param is_traced: whether the arguments of model and guide hold values that JAX traces, so that nothing can be
        compared; a warning then names those at which it may jump.
    """
    program, key = make_program(), jax.random.key(0)
    samples, others = program.samples(params, key)
    if not samples:
        return []
    flows = candidates(partial(_log_density, program, params, key), {**samples, **others})
    found = {name: operation for name, operation in flows.items() if name in samples}
    if not found:
        return []
    if is_traced:
        some = next(iter(found))
        warn(
            f"The latent '{some}' flows into `{found[some]}`, where the density may jump. JAX traces the arguments, so "
            "that this cannot be tried. If it jumps, pathwise gradients are biased: pass "
            f"`score_sites={{'{some}'}}`. If it does not, pass `score_sites=()`.",
        )
        return []
    with untraced():
        are_jumps = _are_jumps(make_program(), params, list(found))
    jumping = [name for name, is_jump in zip(found, are_jumps) if is_jump]
    for name in jumping:
        warn(
            f"The density jumps where the latent '{name}' flows into `{found[name]}`. No pathwise gradient sees that, "
            "so that this latent uses the score function. "
            f"Pass `score_sites={{{', '.join(map(repr, jumping))}}}` to leave out the search and this warning.",
        )
    return jumping


def _are_jumps(program: Program, params: dict[str, Any], names: list[str]) -> list[Array]:
    """Whether the log-density jumps at each of some latents, along lines between draws in unconstrained space."""

    def look(params: dict[str, Any], rng_key: Array) -> list[Array]:
        def on_line(inputs: tuple[Array, Array]) -> list[Array]:
            keys = split(inputs[0])
            first, second = (draw_anywhere(program, params, key, inputs[1]) for key in keys)
            log_density = partial(_log_density, program, params, jax.random.key(0))
            model_trace = program.sites(params, jax.random.key(0), first).model_trace

            def of(name: str) -> Array:
                transform = _transform(model_trace.get(name))
                ends = transform.inv(first[name]), transform.inv(second[name])
                return jumps(lambda value: log_density({**first, name: transform(value)}), *ends)

            return [of(name) for name in names]

        lines = split(rng_key, LINES), jnp.arange(LINES) % NUM_SOURCES
        return [x.any() for x in jax.lax.map(on_line, lines)]

    return Compiled(look, ONCE)(params, jax.random.key(0))


def _transform(site: dict | None) -> Transform:
    """From unconstrained space to the support of a latent; the identity for auxiliary sites, which are real vectors."""
    try:
        return biject_to(site["fn"].support) if site else IdentityTransform()
    except NotImplementedError:
        return IdentityTransform()


def _log_density(program: Program, params: dict[str, Any], rng_key: Array, values: Values) -> Array:
    """The log-density of the model at values of some latents, all of one particle, with all that it sums out.

    No value is compared with a support that does not move, as no draw is outside of it.
    """
    sites = program.at(params, rng_key, values)
    for site in chain(sample_sites(sites.model_trace), *sites.groups):
        if is_latent_site(site) and not _moves(support_of(site["fn"])):
            site["fn"] = without_validation(site["fn"])
    return sum(jnp.sum(of_level) for of_level in jax.tree.leaves(sites.of_model()))  # type: ignore[return-value]


def _moves(support: Constraint | None) -> bool:
    """Whether JAX traces bounds of a support, so that they may depend on latents."""
    return any(isinstance(bound, jax.core.Tracer) for bound in bounds_of(support))
