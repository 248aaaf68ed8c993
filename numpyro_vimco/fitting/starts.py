# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Where the starts of a fit begin: initial states of an ``SVI`` side by side, each from a key of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import seed, trace
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_vimco.compilation import at_once, tracers
from numpyro_vimco.control_flow import Given
from numpyro_vimco.guides.automatic import (
    AutoNormalFromPrior,
    Call,
    automatic_guides,
    recorded_calls,
    set_up,
    with_known_draws,
)
from numpyro_vimco.guides.structural import StructuralGuide
from numpyro_vimco.randomness import split, split_into


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
    init.model = Given(svi.model, {})
    init.guide = Given(with_known_draws(svi.guide), {})  # what is drawn plays no part in where parameters begin
    keys = split(rng_key, num_starts)
    calls = [Call.now(guide) for guide in automatic_guides(svi.guide)]
    with recorded_calls(calls), _undone(calls, lambda call: call.was_called):
        for call in calls:
            call.guide.prototype_trace = None
        states = None
        if not calls or isinstance(svi.guide, StructuralGuide):
            states = _in_one_program(init, svi.guide, split_into(rng_key, num_starts)[0], keys, args, kwargs)
        known = {id(guide) for guide in automatic_guides(svi.guide)}
        strangers = [call for call in calls if id(call.guide) not in known]
        if states is None or strangers:
            for call in strangers:
                call.undo()  # it may hold tracers
            states = _one_by_one(init, calls, keys, args, kwargs)
    svi.constrain_fn = init.constrain_fn
    return states


def _in_one_program(
    init: SVI, guide: Callable, first: Array, keys: Array, args: tuple, kwargs: dict
) -> SVIState | None:
    """The states of all starts; None where it is not known what NumPyro's functions and guides keep of tracers.

    :param first: the first of the keys.
    """
    if isinstance(guide, StructuralGuide):
        guide_key = split_into(first, 3)[2]  # as in `SVI.init`
        with seed(rng_seed=guide_key):
            set_up(guide, *args, **{**init.static_kwargs, **{k: v for k, v in kwargs.items() if k != "init_params"}})
    parts = [part for part in automatic_guides(guide) if not isinstance(part, StructuralGuide)]
    if not all(isinstance(part, AutoNormalFromPrior) for part in parts):
        return None

    def begin(rng_key: Array) -> SVIState:
        for part in parts:
            part.prototype_trace = None
        return init.init(rng_key, *args, **kwargs)

    after_first = [Call.now(part) for part in automatic_guides(guide)]
    with _undone(after_first, lambda _: True):
        states = at_once(jax.vmap(begin), keys)
    return None if tracers(init.constrain_fn.args) else states


def _one_by_one(init: SVI, calls: list[Call], keys: Array, args: tuple, kwargs: dict) -> SVIState:
    """The states of all starts, where the first calls of guides are seen as they come."""
    model, of_model = init.model, dict[str, Any]()
    init.model = _traced_into(of_model, model)
    states = [init.init(keys[0], *args, **kwargs)]
    if not any(site["type"] in ("param", "mutable") for site in of_model.values()):
        init.model = _nothing  # nothing of the model's own has to begin anywhere
    # With the parts that guides were given at their first call.
    guides = {id(part): part for call in calls for part in automatic_guides(call.guide)}
    after_first = [Call.now(guide) for guide in guides.values()]
    with _undone(after_first, lambda _: True):
        for key in keys[1:]:
            for guide in guides.values():
                if not isinstance(guide, StructuralGuide):  # the parts of these are in the list too
                    guide.prototype_trace = None
            states.append(init.init(key, *args, **kwargs))
    # The optimiser begins under `vmap`, and not once for each start: states of `numpyro.optim.Minimize` do not stack.
    params = [init.optim.get_params(state.optim_state) for state in states]
    optim_state = jax.vmap(init.optim.init)(_stack(params))
    return SVIState(optim_state, _stack([s.mutable_state for s in states]), _stack([s.rng_key for s in states]))


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
def _undone(calls: list[Call], chosen: Callable[[Call], bool]) -> Iterator[None]:
    """A context after which some guides are what they were before their call; after an error, all are."""
    is_done = False
    try:
        yield
        is_done = True
    finally:
        for call in calls:
            if not is_done or chosen(call):
                call.undo()
