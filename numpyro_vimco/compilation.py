# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Functions that are compiled: for many draws, the steps of a fit, and checks of values; or to run once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from numpyro_vimco.private.of_jax import eval_jaxpr, trace_state_clean, with_constvars

# Levels of XLA's optimisation on CPUs: for what runs once, and for what runs many times.
ONCE, MANY = 0, 1
NEWER_LOOPS = "xla_cpu_use_fusion_emitters"
THREAD = ThreadPoolExecutor(1)  # it begins with its first task


def at_once(fn: Callable, *inputs: Any) -> Any:
    """``fn(*inputs)`` as one program, with the least optimisation: for what is computed once.

    Computed by itself, each operation would be a program. The result may hold anything beside arrays, as a trace does.
    Where JAX traces what is around, ``fn`` is called as it is.
    """
    if not trace_state_clean():
        return fn(*inputs)
    found: list[Any] = []

    def arrays(*inputs: Any) -> list:
        result = fn(*inputs)
        traced = tracers(result)
        places = {key: Place(number) for number, key in enumerate(traced)}
        found.append(map_arrays(lambda x: places[id(x)] if isinstance(x, Tracer) else x, result))
        return list(traced.values())

    closed = jax.make_jaxpr(arrays)(*inputs)
    values = _program(closed, None, ONCE, True)(*inputs) if closed.out_avals else []
    return map_arrays(lambda x: values[x.number] if isinstance(x, Place) else x, found[0])


def untraced() -> AbstractContextManager[None]:
    """A context in which what does not depend on traced arrays is computed, also where JAX traces what is around."""
    return nullcontext() if trace_state_clean() else jax.ensure_compile_time_eval()


@dataclass(frozen=True)
class Place:
    """Where an array will be. Held after its trace, a traced array would be a leak by JAX's own check."""

    number: int


class Compiled:
    """A function that is compiled for each shape of its inputs at the first call: on CPUs with less optimisation.

    Arrays that it holds, data above all, are arguments of the program: as constants they would be part of it, and those
    that are spread over devices would be gathered.

    :param level: of optimisation.
    :param older_loops: whether XLA compiles loops in its older way, where it knows both. That takes half of the time.
        Draws are then as fast or faster; steps of a fit may be slower by half.
    """

    def __init__(self, fn: Callable, level: int = MANY, older_loops: bool = True):
        self._fn, self._level, self._older_loops = fn, level, older_loops
        self._programs: dict[Any, Callable] = {}

    def __call__(self, *inputs: Any) -> Any:
        key = _shapes(inputs)
        if key not in self._programs:
            self._programs[key] = self._program(inputs)
        return self._programs[key](*inputs)

    def ahead(self, *inputs: Any) -> None:
        """Compile for such inputs in a thread, while Python goes on.

        :param inputs: these, or ``jax.ShapeDtypeStruct`` of them.
        """
        key = _shapes(inputs)
        if key in self._programs:
            return
        self._programs[key] = program = self._program(inputs)
        if isinstance(program, partial):
            jitted: Any = program.func
            compiling = THREAD.submit(jitted.lower(*program.args, *inputs).compile)
            self._programs[key] = lambda *inputs: compiling.result()(*program.args, *inputs)

    def _program(self, inputs: tuple) -> Callable:
        closed, outputs = jax.make_jaxpr(self._fn, return_shape=True)(*inputs)
        if any(isinstance(const, Tracer) for const in closed.consts):
            return self._fn
        return _program(closed, jax.tree.structure(outputs), self._level, self._older_loops)


def _shapes(inputs: tuple) -> Any:
    leaves, structure = jax.tree.flatten(inputs)
    return structure, *((jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


def _program(closed: Any, structure: Any, level: int, older_loops: bool) -> partial:
    """What a jaxpr computes, compiled at its first call; a list without a structure."""
    jaxpr = with_constvars(closed.jaxpr)
    variables = len(jaxpr.constvars)

    def run(held: list, *inputs: Any) -> Any:
        flat = eval_jaxpr(jaxpr, held[:variables], *held[variables:], *jax.tree.leaves(inputs))
        return flat if structure is None else jax.tree.unflatten(structure, flat)

    options: dict[str, Any] | None = None
    if jax.default_backend() == "cpu":
        options = {"xla_backend_optimization_level": level}
        if older_loops and _knows(NEWER_LOOPS):
            options[NEWER_LOOPS] = False
    return partial(jax.jit(run, compiler_options=options, keep_unused=True), closed.consts)


@cache
def _knows(option: str) -> bool:
    """Whether XLA knows an option that can be False; versions differ."""
    try:
        jax.jit(lambda: 0, compiler_options={option: False}).lower().compile()
    except RuntimeError:  # of XLA, "No such compile option"
        return False
    return True


def tracers(part: Any) -> dict[int, Tracer]:
    """The arrays that JAX traces in what :func:`map_arrays` looks into, each once, by `id`."""
    found: dict[int, Tracer] = {}
    map_arrays(lambda x: found.setdefault(id(x), x) if isinstance(x, Tracer) else x, part)
    return found


def map_arrays(change: Callable[[Any], Any], part: Any) -> Any:
    """A copy of a distribution, of a trace, or of what they hold, with each array of JAX, or its place, changed.

    Attributes are copied one by one, as not all distributions of users declare theirs to JAX.
    """

    def changed(path: tuple, x: Any) -> Any:
        if isinstance(x, jax.Array | Place):
            # NumPyro writes the index of a step of `scan` into the user's dict `infer`, where it outlives its trace.
            return None if path and getattr(path[-1], "key", None) == "_scan_current_index" else change(x)
        if not isinstance(x, parts):
            return x
        result = copy(x)
        for name, value in vars(x).items():
            vars(result)[name] = map_arrays(change, value)
        return result

    parts = dist.Distribution | dist.transforms.Transform | constraints.Constraint
    return jax.tree_util.tree_map_with_path(changed, part, is_leaf=lambda x: isinstance(x, parts))
