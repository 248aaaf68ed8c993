# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of an optimiser in units that are renewed: those of the guide's own scale."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import jax
from numpyro.infer import SVI

from numpyro_vimco.families.units import RealInUnits
from numpyro_vimco.private.of_numpyro import Optimizer

Params = dict[str, Any]


class RenewedUnits:
    """An optimiser whose steps of a location are in units of the guide's scale (:class:`.RealInUnits`).

    With r the guide's scale in units of the prior's, the inner optimiser sees the gradient times r, and its step is
    multiplied by r. So it is the inner optimiser in a unit that is renewed at each step; its moments stay as they are,
    since the gradient in the guide's own unit keeps its size while the guide narrows.

    :param inner: an optimiser whose state holds the parameters themselves, so that they can be replaced there.
    :param units: of the locations.
    :param constrain: from unconstrained to constrained parameters.
    """

    def __init__(self, inner: Optimizer, units: Mapping[str, RealInUnits], constrain: Callable[[Params], Params]):
        self.inner, self.units, self.constrain = inner, units, constrain
        self.get_params = inner.get_params

    def _shrinkage(self, params: Params) -> Params:
        constrained = jax.lax.stop_gradient(self.constrain(params))
        return {name: constraint.shrinkage(name, constrained) for name, constraint in self.units.items()}

    def _update(self, name: str, fn: Callable, state: Any, **kwargs) -> Any:
        before = self.inner.get_params(state)
        shrinkage = self._shrinkage(before)

        def moved(params: Params) -> Params:
            return params | {k: before[k] + r * (params[k] - before[k]) for k, r in shrinkage.items()}

        out, state = getattr(self.inner, name)(lambda params: fn(moved(params)), state, **kwargs)
        return out, with_params(self.inner, state, moved(self.inner.get_params(state)))

    def eval_and_update(self, fn: Callable, state: Any, **kwargs) -> Any:
        """A step: as of the inner optimiser."""
        return self._update("eval_and_update", fn, state, **kwargs)

    def eval_and_stable_update(self, fn: Callable, state: Any, **kwargs) -> Any:
        """A step that is skipped where it is not finite: as of the inner optimiser."""
        return self._update("eval_and_stable_update", fn, state, **kwargs)


def in_renewed_units(svi: SVI, units: Mapping[str, RealInUnits], state: Any) -> SVI:
    """A copy of ``svi`` whose optimiser renews units, where there are such and its state holds the parameters.

    :param state: of its optimiser.
    """
    svi = copy(svi)
    if units and _places(svi.optim, state) is not None:
        svi.optim = RenewedUnits(svi.optim, units, svi.constrain_fn)
    return svi


def with_params(optim: Optimizer, state: Any, params: Params) -> Any:
    """A state of an optimiser with other parameters."""
    leaves, structure = jax.tree.flatten(state)
    places = _places(optim, state)
    assert places is not None
    for place, leaf in zip(places, jax.tree.leaves(params)):
        leaves[place] = leaf
    return jax.tree.unflatten(structure, leaves)


def _places(optim: Optimizer, state: Any) -> list[int] | None:
    """Which leaves of a state are the parameters; None if ``get_params`` computes anything from it."""
    jaxpr = jax.make_jaxpr(optim.get_params)(state).jaxpr
    places = {var: i for i, var in enumerate(jaxpr.invars)}
    found = [places[var] for var in jaxpr.outvars if not hasattr(var, "val") and var in places]
    return found if len(found) == len(jaxpr.outvars) else None
