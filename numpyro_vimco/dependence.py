# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What depends on what in a program, found from its computation graph without computing anything."""

from collections.abc import Callable
from typing import Any

import jax

from numpyro_vimco.private.of_jax import dce_jaxpr


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
