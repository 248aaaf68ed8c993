# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Functions that are compiled for many draws, the steps of a fit, and checks of values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_vimco.private.of_jax import eval_jaxpr, with_constvars


def compiled(fn: Callable) -> Callable:
    """``fn``, compiled for each shape of its inputs at the first call: on CPUs with less optimisation, which is sooner.

    Arrays that it holds, data above all, are arguments of the program: as constants they would be part of it, and those
    that are spread over devices would be gathered.
    """
    programs: dict[Any, Callable] = {}

    def call(*inputs: Any) -> Any:
        leaves, structure = jax.tree.flatten(inputs)
        shapes = structure, *((jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        if shapes not in programs:
            programs[shapes] = _compile(fn, *inputs)
        return programs[shapes](*inputs)

    return call


def _compile(fn: Callable, *inputs: Any) -> Callable:
    closed, outputs = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    jaxpr, structure = with_constvars(closed.jaxpr), jax.tree.structure(outputs)
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    variables = len(jaxpr.constvars)

    def run(held: list, *inputs: Any) -> Any:
        flat = eval_jaxpr(jaxpr, held[:variables], *held[variables:], *jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, flat)

    program = jax.jit(run, compiler_options=options, keep_unused=True)
    return lambda *inputs: program(closed.consts, *inputs)
