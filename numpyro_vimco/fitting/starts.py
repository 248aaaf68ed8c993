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
from numpyro.handlers import trace
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_vimco.control_flow import Given
from numpyro_vimco.guides.automatic import Call, automatic_guides, recorded_calls, with_known_draws
from numpyro_vimco.guides.structural import StructuralGuide
from numpyro_vimco.randomness import split


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
    calls = [Call.now(guide) for guide in automatic_guides(svi.guide)]
    with recorded_calls(calls), _undone(calls, lambda call: call.was_called):
        for call in calls:
            call.guide.prototype_trace = None
        of_model: dict[str, Any] = {}
        init.model = Given(_traced_into(of_model, svi.model), {})
        states = [init.init(first, *args, **kwargs)]
        if not any(site["type"] in ("param", "mutable") for site in of_model.values()):
            init.model = _nothing  # nothing of the model's own has to begin anywhere
        # With the parts that guides were given at their first call.
        guides = {id(part): part for call in calls for part in automatic_guides(call.guide)}
        after_first = [Call.now(guide) for guide in guides.values()]
        with _undone(after_first, lambda _: True):
            for key in others:
                for guide in guides.values():
                    if not isinstance(guide, StructuralGuide):  # the parts of these are in the list too
                        guide.prototype_trace = None
                states.append(init.init(key, *args, **kwargs))
    svi.constrain_fn = init.constrain_fn
    # The optimiser begins under `vmap`, and not once for each start: states of `numpyro.optim.Minimize` do not stack.
    params = [svi.optim.get_params(state.optim_state) for state in states]
    optim_state = jax.vmap(svi.optim.init)(_stack(params))
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
