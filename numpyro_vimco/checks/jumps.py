# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Densities that jump: where a latent passes a threshold, is rounded, or becomes an index.

A pathwise gradient is the mean of derivatives, and a jump has none: it is biased, and no error says so. A latent can
only make a density jump if it flows into a comparison, a rounding or an index, which the jaxpr of the density shows
(:func:`candidates`). Most of these do no harm: a spline written with ``where`` has kinks, and functions such as
``ndtr`` change from one formula to another where both have the same value. So the density is then followed along lines
between draws, and its steepest part is bisected: the difference over a continuous part vanishes as the part shrinks,
that over a jump does not (:func:`jumps`). A jump that no line crosses, or one that is lost beside a steeper part, is
missed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpyro.distributions as dist

from numpyro_vimco.private.of_jax import file_of

Values = dict[str, Array]

# Parts of a line between two draws that are bisected, how often, and how many lines.
PARTS, BISECTIONS, LINES = 64, 18, 8
# Of a difference over a part: the least that is a jump, in nats, and its rounding error as a share of the density; and
# how much of it is left after the last bisections, of which a continuous density keeps 2^-6.
LEAST, ROUNDING, LAST, KEPT = 1e-3, 2e-5, 6, 0.5
# Log-densities count down to so many nats below the largest: zero beside what is possible is a jump.
RANGE = 1e4

# Code that computes densities: NumPyro's, and our own, which keeps those that are zero and sums them; and NumPyro's of
# supports.
OWN = [Path(__file__).parents[1] / "densities" / name for name in ("zero_weights.py", "enumeration.py")]
DENSITIES, SUPPORTS = (str(Path(dist.__file__).parent), *map(str, OWN)), dist.constraints.__file__

COMPARISONS = {"lt", "le", "gt", "ge", "lt_to", "le_to"}
ROUNDINGS = {"floor", "ceil", "round", "sign", "argmax", "argmin", "rem", "nextafter", "top_k"}


def candidates(fn: Callable[[Values], Any], values: dict[str, Any]) -> dict[str, str]:
    """The inputs that flow into a comparison, a rounding or an index on which the outputs of a function depend.

    NumPyro's own densities are taken to be continuous inside of their supports.

    :return: by name, the first such operation that was found.
    """
    closed = jax.make_jaxpr(fn)(values)
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(values)]
    found: dict[str, str] = {}
    for _, jumping in _flow(closed, [({name}, {}) for name in names], True):
        found = {**jumping, **found}
    return found


# Of a variable: the inputs that it depends on smoothly, and those that it jumps at, with the operation.
_Flow = tuple[set[str], dict[str, str]]


def _union(flows: Sequence[_Flow]) -> _Flow:
    smooth: set[str] = set()
    jumping: dict[str, str] = {}
    for of_smooth, of_jumping in flows:
        smooth |= of_smooth
        jumping = {**of_jumping, **jumping}
    return smooth, jumping


def _flow(closed: ClosedJaxpr, inputs: Sequence[_Flow], is_traced: bool) -> list[_Flow]:
    """From the flows of the inputs of a jaxpr to those of its outputs.

    :param is_traced: whether it was traced for this call, so that its equations tell who made them.
    """
    known: dict[Any, _Flow] = dict(zip(closed.jaxpr.invars, inputs))

    def of(var: Any) -> _Flow:
        return (set(), {}) if isinstance(var, Literal) else known.get(var, (set(), {}))

    for eqn in closed.jaxpr.eqns:
        known |= zip(eqn.outvars, _of_equation(eqn, [of(var) for var in eqn.invars], is_traced))
    return [of(var) for var in closed.jaxpr.outvars]


def _of_equation(eqn: Any, flows: list[_Flow], is_traced: bool) -> list[_Flow]:
    name, params = eqn.primitive.name, eqn.params
    both = _union(flows)
    if is_traced and (file := file_of(eqn)).startswith(DENSITIES) and file != SUPPORTS:
        return [both] * len(eqn.outvars)
    if name == "scan":
        return _fixed_point(params["jaxpr"], flows, params["num_consts"], params["num_carry"], is_traced)
    if name == "while":
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        of_body = flows[split[0] :], params["body_nconsts"], len(eqn.outvars)
        body = _fixed_point(params["body_jaxpr"], *of_body, is_traced)
        ends = _flow(params["cond_jaxpr"], [*flows[: split[0]], *body], is_traced)
        return [_union([flow, _jump(_union(ends), name)]) for flow in body]
    if name == "cond":
        chosen = _jump(flows[0], name)
        branches = [_flow(branch, flows[1:], is_traced) for branch in params["branches"]]
        return [_union([chosen, *parts]) for parts in zip(*branches)]
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    if inner is not None:
        closed = inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ())
        return _flow(closed, flows, False)
    if name in COMPARISONS | ROUNDINGS:
        smooth = both[0] if name == "rem" else set()
        return [(smooth, _jump(both, name)[1])] * len(eqn.outvars)
    if name in ("eq", "ne", "is_finite"):  # true or false but at single values
        return [(set(), both[1])]
    if name == "sort":
        keys = _jump(_union(flows[: params["num_keys"]]), name)
        return [flow if i < params["num_keys"] else _union([flow, keys]) for i, flow in enumerate(flows)]
    if name == "select_n":
        return [_union([(set(), flows[0][1]), *flows[1:]])]
    if all(jnp.issubdtype(var.aval.dtype, jnp.integer) for var in eqn.outvars) and both[0]:
        return [_jump(both, name)] * len(eqn.outvars)
    return [both] * len(eqn.outvars)


def _jump(flow: _Flow, name: str) -> _Flow:
    """What an operation that jumps makes of its input."""
    return set(), {**dict.fromkeys(flow[0], name), **flow[1]}


def _fixed_point(
    closed: ClosedJaxpr, flows: list[_Flow], num_consts: int, num_carry: int, is_traced: bool
) -> list[_Flow]:
    """The flows out of a loop, whose carry is among its own inputs."""
    end = num_consts + num_carry
    consts, carry, rest = flows[:num_consts], flows[num_consts:end], flows[end:]
    while True:
        found = _flow(closed, [*consts, *carry, *rest], is_traced)
        new = [_union(pair) for pair in zip(carry, found)]
        if [(len(a), len(b)) for a, b in new] == [(len(a), len(b)) for a, b in carry]:
            return [*new, *found[num_carry:]]
        carry = new


def jumps(log_density: Callable[[Array], Float[Array, ""]], first: Array, second: Array) -> Bool[Array, ""]:
    """Whether a log-density jumps on the line between two values of a latent.

    The parts of the line are bisected side by side; each keeps the half over which the density differs more.
    """

    def at(t: Array) -> Array:
        return log_density(first + t * (second - first))

    on_line: Callable[[Array], Array] = jax.vmap(at)
    ends = jnp.linspace(0.0, 1.0, PARTS + 1)
    values = on_line(ends)
    floor = jnp.nanmax(jnp.where(jnp.isfinite(values), values, -jnp.inf)) - RANGE

    def evaluate(t: Array) -> Array:
        found = on_line(t)
        return jnp.where(found > floor, found, floor)

    values = jnp.where(values > floor, values, floor)
    begin = jnp.stack([ends[:-1], values[:-1], ends[1:], values[1:]])

    def bisect(part: Array, _: None) -> tuple[Array, Array]:
        low, of_low, high, of_high = part
        middle = (low + high) / 2
        of_middle = evaluate(middle)
        is_left = jnp.abs(of_middle - of_low) > jnp.abs(of_high - of_middle)
        # One selection: XLA may compute what several of them share once for each, with other roundings and, near a tie,
        # with other answers. A point would then have the value of another one.
        left, right = jnp.stack([low, of_low, middle, of_middle]), jnp.stack([middle, of_middle, high, of_high])
        part = jnp.where(is_left, left, right)
        return part, jnp.abs(part[3] - part[1])

    (_, of_low, _, of_high), differences = jax.lax.scan(bisect, begin, length=BISECTIONS)
    size = LEAST + ROUNDING * (jnp.abs(of_low) + jnp.abs(of_high))
    return jnp.any((differences[-1] > size) & (differences[-1] > KEPT * differences[-1 - LAST]))
