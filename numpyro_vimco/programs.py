# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Compiled programs, which are kept: what many draws, the steps of a fit and checks of values are computed with."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
import hashlib
from typing import Any

import jax
from jax.interpreters import partial_eval

# So many compiled programs are kept.
PROGRAMS = 32
_programs: OrderedDict[Any, Any] = OrderedDict()


def compiled(fn: Callable, *inputs: Any) -> Callable:
    """``fn``, compiled for inputs such as these: on CPUs with less optimisation, which compiles sooner.

    Arrays that it holds, data above all, are arguments of the program: as constants they would be part of it, and those
    that are spread over devices would be gathered. So a program that another call of this package has compiled is used
    again: that of a longer fit, say, or of draws that were diagnosed before.
    """
    closed, outputs = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(outputs)
    if hasattr(jaxpr, "consts"):  # since JAX 0.12 it holds its arrays, which a program that is kept must not
        jaxpr = vars(partial_eval)["convert_constvars_jaxpr"](jaxpr)
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

    def run(held: list, *inputs: Any) -> Any:
        variables = len(jaxpr.constvars)
        flat = jax.core.eval_jaxpr(jaxpr, held[:variables], *held[variables:], *jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, flat)

    program = jax.jit(run, compiler_options=options, keep_unused=True)
    text = program.lower(closed.consts, *inputs).as_text()
    if _says_all(text, len(jax.tree.leaves((closed.consts, inputs)))):
        key = hashlib.sha256(text.encode()).digest(), jax.tree.structure(inputs), structure, jax.default_backend()
        program = _programs.setdefault(key, program)
        _programs.move_to_end(key)
        while len(_programs) > PROGRAMS:
            _programs.popitem(last=False)
    return partial(program, closed.consts)


def _says_all(text: str, num_arguments: int) -> bool:
    """Whether programs of this text are one: it has no function of Python, one device, and no hidden arguments."""
    is_alone = "mhlo.num_partitions = 1 " in text and "mhlo.num_replicas = 1 " in text
    signature = text[text.index("@main(") : text.index("->", text.index("@main("))]
    return is_alone and "callback" not in text and signature.count("%arg") == num_arguments
