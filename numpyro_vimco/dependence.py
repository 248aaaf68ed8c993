# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What depends on what in a program, found from its computation graph without computing anything."""

from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

# Primitives that act on each element of their operands separately, or only add or drop dimensions of size 1.
ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igamma_grad_a igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
    nextafter not or polygamma pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    xor zeta broadcast_in_dim expand_dims squeeze
    """.split()
)
CALLS = frozenset("jit pjit closed_call core_call remat checkpoint custom_jvp_call custom_vjp_call".split())


def dependence(fn: Callable[[dict[str, Any]], dict[str, Any]], inputs: dict[str, Any]) -> dict[str, set[str]]:
    """The names of the inputs that each output of a function depends on.

    For each output, dead code is eliminated from the function's jaxpr; the inputs that are still used are those that
    the output depends on. This sees through loops and branches. An input whose effect cancels numerically counts too.

    :param fn: from a dict of arrays, or pytrees of arrays, to another.
    :param inputs: arrays, or ``jax.ShapeDtypeStruct``.
    """
    closed, outputs = jax.make_jaxpr(fn, return_shape=True)(inputs)
    sources = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(inputs)]
    targets = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(outputs)]
    found: dict[str, set[str]] = {}
    for name in outputs:
        _, used = dce_jaxpr(closed.jaxpr, [target == name for target in targets])
        found[name] = {source for source, is_used in zip(sources, used) if is_used}
    return found


def may_mix(fn: Callable[[Any], Any], inputs: Any, sizes: Collection[int]) -> bool:
    """Whether a function may combine different elements of its inputs along an axis of one of the given sizes.

    False is certain. True may be wrong: it is the answer for every primitive that is not known to act on each element
    separately.
    """
    jaxpr = jax.make_jaxpr(fn)(inputs).jaxpr
    jaxpr, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _may_mix(jaxpr, [True] * sum(used), frozenset(sizes))[0]


def _may_mix(jaxpr: Any, depends: list[bool], sizes: frozenset[int]) -> tuple[bool, list[bool]]:
    """Whether a jaxpr may mix elements of the inputs that it ``depends`` on, and which outputs depend on them."""
    known = {var for var, is_dependent in zip(jaxpr.invars, depends) if is_dependent}

    def of(atoms) -> list[bool]:
        return [not hasattr(atom, "val") and atom in known for atom in atoms]

    for eqn in jaxpr.eqns:
        dependent = of(eqn.invars)
        if not any(dependent):
            continue
        results = [True] * len(eqn.outvars)
        name, params = eqn.primitive.name, eqn.params
        shapes = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
        if name in CALLS:
            inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
            mixes, results = _may_mix(getattr(inner, "jaxpr", inner), dependent, sizes)
        elif name == "reshape":
            mixes = _without_ones(shapes[0]) != _without_ones(eqn.outvars[0].aval.shape)
        elif name.startswith("reduce_") and "axes" in params:
            mixes = any(shapes[0][axis] in sizes for axis in params["axes"])
        elif name == "dot_general":
            mixes = any(
                shape[axis] in sizes for shape, axes in zip(shapes, params["dimension_numbers"][0]) for axis in axes
            )
        elif name == "gather":  # to look up a table at indices that depend on the inputs mixes no elements
            mixes = dependent[0]
        else:
            mixes = name not in ELEMENTWISE
        if mixes:
            return True, results
        known.update(var for var, is_dependent in zip(eqn.outvars, results) if is_dependent)
    return False, of(jaxpr.outvars)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
