# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Where the starts of a fit begin: initial states of an ``SVI`` side by side, each from a key of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
import inspect
from types import FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import substitute, trace
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState

from numpyro_vimco.control_flow import Given
from numpyro_vimco.guides.structural import StructuralGuide
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import is_latent_site


def initial_states(svi: SVI, rng_key: Array, num_starts: int, args: tuple, kwargs: dict) -> SVIState:
    """Initial states of ``svi``, each from a key of its own.

    An automatic guide chooses where it begins at its first call, and keeps it. So that starts differ, its call in each
    start is made a first one; but what the guides of this package find out about a model is the same in all, and found
    out in the first. Afterwards a guide is as it was; if it had not been called before, as after the first start.

    :param args: arguments of ``svi.init`` after the key.
    :param kwargs: keyword arguments of ``svi.init``.
    :return: a state whose arrays have a leading axis for the starts.
    """
    init = copy(svi)
    init.guide = Given(with_known_draws(svi.guide), {})  # what is drawn plays no part in where parameters begin
    first, *others = split(rng_key, num_starts)
    with _restored(svi.guide):
        for guide in automatic_guides(svi.guide):
            guide.prototype_trace = None
        of_model: dict[str, Any] = {}
        init.model = Given(_traced_into(of_model, svi.model), {})
        states = [init.init(first, *args, **kwargs)]
        if not any(site["type"] in ("param", "mutable") for site in of_model.values()):
            init.model = _nothing  # nothing of the model's own has to begin anywhere
        with _restored(svi.guide):
            for key in others:
                for guide in automatic_guides(svi.guide):
                    if not isinstance(guide, StructuralGuide):  # the parts of these are in the list too
                        guide.prototype_trace = None
                states.append(init.init(key, *args, **kwargs))
    svi.constrain_fn = init.constrain_fn
    # The optimiser begins under `vmap`, and not once for each start: states of `numpyro.optim.Minimize` do not stack.
    params = [svi.optim.get_params(state.optim_state) for state in states]
    optim_state = jax.vmap(svi.optim.init)(_stack(params))
    return SVIState(optim_state, _stack([s.mutable_state for s in states]), _stack([s.rng_key for s in states]))


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


def _stack(trees: list) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _traced_into(sites: dict[str, Any], model: Callable) -> Callable:
    """The model, which leaves its sites in a dict."""

    def traced(*args, **kwargs):
        with trace() as tr:
            result = model(*args, **kwargs)
        sites.update(tr)
        return result

    return traced


def _nothing(*args, **kwargs) -> None:
    pass


@contextmanager
def _restored(guide: Callable) -> Iterator[None]:
    """A context after which automatic guides that were called before it are as they were; after an error, all are."""
    before = [(part, part.prototype_trace is not None, _attributes(part)) for part in automatic_guides(guide)]
    is_done = False
    try:
        yield
        is_done = True
    finally:
        for part, was_called, attributes in before:
            if was_called or not is_done:
                part.__dict__.clear()
                part.__dict__.update(attributes)


def _attributes(guide: AutoGuide) -> dict[str, Any]:
    """The attributes of a guide. Its containers are copied, as a first call fills them."""
    return {k: copy(v) if isinstance(v, dict | list) else v for k, v in vars(guide).items()}


def automatic_guides(guide: Callable) -> list[AutoGuide]:
    """The automatic guides that a guide is made of: itself, and those that it refers to.

    References are followed through containers, partial functions, handlers, variables of functions, and attributes of
    objects that can be called.
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
