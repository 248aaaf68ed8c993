# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The automatic guides that a guide is made of, and what they know of its latents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
import inspect
from types import FunctionType, MethodType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import substitute
from numpyro.infer.autoguide import AutoGuide

from numpyro_vimco.sites import is_latent_site


@dataclass(frozen=True)
class Call:
    """The first call of an automatic guide.

    :ivar was_called: whether it was called before.
    :ivar attributes: those before; containers are copied, as a first call fills them.
    """

    guide: AutoGuide
    was_called: bool
    attributes: dict[str, Any]

    @classmethod
    def now(cls, guide: AutoGuide) -> "Call":
        attributes = {k: copy(v) if isinstance(v, dict | list) else v for k, v in vars(guide).items()}
        return cls(guide, guide.prototype_trace is not None, attributes)

    def undo(self) -> None:
        """Make the guide what it was."""
        self.guide.__dict__.clear()
        self.guide.__dict__.update(self.attributes)


@contextmanager
def recorded_calls(calls: list[Call]) -> Iterator[None]:
    """A context in which each first call of an automatic guide is recorded, whatever calls it."""
    classes, queue = set[type](), [AutoGuide]
    while queue:
        queue += queue[0].__subclasses__()
        classes.add(queue.pop(0))
    originals = {cls: vars(cls)["__call__"] for cls in classes if "__call__" in vars(cls)}

    def recording(original: Callable) -> Callable:
        def call(self, *args, **kwargs):
            known = {id(call.guide) for call in calls}
            calls.extend(Call.now(part) for part in automatic_guides(self) if id(part) not in known)
            return original(self, *args, **kwargs)

        return call

    for cls, original in originals.items():
        cls.__call__ = recording(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original  # type: ignore[method-assign]


def automatic_guides(guide: Callable) -> list[AutoGuide]:
    """The automatic guides that a guide is made of: itself, and those that it refers to.

    References are followed through containers, partial functions, handlers, variables of functions, and attributes of
    objects that can be called. :func:`recorded_calls` finds those that no such reference leads to.
    """
    found, seen, queue = [], set(), [guide]
    while queue:
        part = queue.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, AutoGuide):
            found.append(part)
        queue += [other for other in _parts(part) if callable(other) or isinstance(other, dict | list | tuple)]
    return found


def _parts(part: Any) -> list:
    if isinstance(part, dict):
        return list(part.values())
    if isinstance(part, list | tuple):
        return list(part)
    if isinstance(part, partial):
        return [part.func, part.args, part.keywords]
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, FunctionType):
        if (part.__module__ or "").partition(".")[0] in ("jax", "numpyro"):
            return [cell.cell_contents for cell in part.__closure__ or ()]
        variables = inspect.getclosurevars(part)
        return [*variables.nonlocals.values(), *variables.globals.values()]
    if isinstance(part, type):
        return []
    # The model of an automatic guide has no guide in it, and may hold data.
    return [value for name, value in getattr(part, "__dict__", {}).items() if name != "model"]


def with_known_draws(guide: Callable) -> Callable:
    """A guide whose latents have the values that automatic guides know from their first call, where there are such.

    To draw them is to compile many programs; for the structure of model and guide any values will do.
    """
    guides = automatic_guides(guide)

    def known(site: dict) -> Array | None:
        found = [part.prototype_trace for part in guides if site["name"] in (part.prototype_trace or {})]
        if is_latent_site(site) and found and jnp.shape(value := found[0][site["name"]]["value"]) == site["fn"].shape():
            return value
        return None

    return substitute(guide, substitute_fn=known)
