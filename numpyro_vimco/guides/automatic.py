# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The automatic guides that a guide is made of, their first calls, and what they know of its latents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
import inspect
from types import FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro
from numpyro.distributions import biject_to
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import AutoGuide, AutoNormal
from numpyro.infer.util import transform_fn
from numpyro.primitives import Messenger

from numpyro_vimco.compilation import at_once
from numpyro_vimco.control_flow import Given, Scans
from numpyro_vimco.private.of_jax import trace_state_clean
from numpyro_vimco.private.of_numpyro import PrototypeGuide, setup_prototype, without_tracers
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import is_latent_site, without_plates


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


def with_first_calls(fn: Callable[[], Any]) -> Any:
    """``fn()`` as one program; or as it is, where an automatic guide is called first in it, and would keep tracers."""
    calls: list[Call] = []
    with recorded_calls(calls):
        found = at_once(fn)
    first = [call for call in calls if not call.was_called]
    for call in first:
        call.undo()
    return fn() if first else found


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


def set_up(guide: AutoGuide, *args, **kwargs) -> None:
    """Set up a guide, as its first call does before it samples.

    What a guide keeps outlives a transformation of JAX, and must not hold its tracers. So values are computed at once
    as far as the arguments allow, and a key that is traced is replaced.
    """
    if guide.prototype_trace is None:
        traced = not trace_state_clean()
        # What is of NumPyro runs models in loops, in which draws of hidden latents would be traced.
        is_of_numpyro = not isinstance(guide, PrototypeGuide | AutoNormalFromPrior)
        with _ConcreteKeys(traced), jax.ensure_compile_time_eval() if traced or is_of_numpyro else nullcontext():
            setup_prototype(guide, *args, **kwargs)
            if traced:
                without_tracers(guide)


class _ConcreteKeys(Messenger):
    """Replace keys that no handler gives, and, where JAX traces what is around, those that it traces."""

    key = None

    def __init__(self, traced: bool):
        super().__init__()
        self.traced = traced

    def postprocess_message(self, msg: dict) -> None:
        is_traced = self.traced and isinstance(msg["value"], jax.core.Tracer)
        if msg["type"] == "prng_key" and (msg["value"] is None or is_traced):
            self.key, msg["value"] = split(jax.random.key(0) if self.key is None else self.key)


def values_of(init_loc_fn: Callable) -> dict[str, Any]:
    """The values of NumPyro's ``init_to_value``; none of another function for where to begin."""
    if isinstance(init_loc_fn, partial) and init_loc_fn.func is init_to_value:
        return init_loc_fn.keywords["values"]
    return {}


class _FromPrior(AutoGuide):
    """What stands between ``AutoNormal`` and ``AutoGuide``: its set-up without the density."""

    def _setup_prototype(self, *args, **kwargs) -> None:
        init, given = self.init_loc_fn, values_of(self.init_loc_fn)
        # Values inside of `scan` go by `Given`: `substitute` would take those of a reverse one from the wrong end.
        model = Given(seed(self.model, numpyro.prng_key()), given)
        model = substitute(model, substitute_fn=lambda site: None if site["name"] in given else init(site))
        scans = Scans(model)
        with block():
            tr = at_once(lambda: trace(scans).get_trace(*args, **kwargs))
        self.prototype_trace = without_plates(tr, scans.found)
        latents = {name: site for name, site in self.prototype_trace.items() if is_latent_site(site)}
        transforms = {name: biject_to(site["fn"].support) for name, site in latents.items()}
        self._init_locs = at_once(lambda: {name: transforms[name].inv(site["value"]) for name, site in latents.items()})
        self._postprocess_fn = partial(transform_fn, transforms)
        for name, site in self.prototype_trace.items():
            if name in latents:
                frames = {frame.name: frame for frame in site["cond_indep_stack"]}
                self._prototype_frames.update(frames)
            elif site["type"] == "plate":
                self._prototype_frame_full_sizes[name] = site["args"][0]


class AutoNormalFromPrior(AutoNormal, _FromPrior):
    """An ``AutoNormal`` that begins where ``init_loc_fn`` says, whatever the density is there.

    The other computes the density, at which it begins elsewhere where that is 0, in dozens of programs.
    """


def is_normal(guide: AutoGuide) -> bool:
    """Whether a guide is an ``AutoNormal``, and no class that a user made of it."""
    return type(guide) in (AutoNormal, AutoNormalFromPrior)
