# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Levels: sets of sites that are drawn together.

The sites in a plate that ``plate_particles`` names, a *named plate*, are one level: they are drawn as *local particles*
of that plate. So are the sites of a chain, of which there are samples at each step (:mod:`.chains`). All other sites
are the *shared* level. The arrays of a named plate have an axis for its local particles, before the axes of the plates;
those of a chain have three, for the sample of a step, the step, and the sample of the step before it.
"""

from collections.abc import Callable, Collection
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jaxtyping import Array

from numpyro_vimco.checks.chains import outside_error
from numpyro_vimco.checks.supports_and_plates import dependence_error
from numpyro_vimco.dependence import dependence
from numpyro_vimco.randomness import CHAIN

T = TypeVar("T")

Values = dict[str, Array]


class Step(NamedTuple):
    """One entry of a chain's table, or all of them with axes for sample k, step t and sample l.

    :ivar own: values of step t at sample k.
    :ivar before: values of step t - 1 at sample l.
    :ivar log_q: log-densities of these latents under the guide at sample k of step t, by latent; several such dicts.
    :ivar time: t, in the order of the trace.
    :ivar path: values of one sample at all steps, for programs that need some.
    """

    own: Values
    before: Values
    log_q: tuple[Values, ...]
    time: Array
    path: Values

    @classmethod
    def axes(cls) -> tuple["Step", ...]:
        """The axes of l, of t and of k, where each is mapped before the next."""
        return (
            cls(None, 0, None, None, None),  # type: ignore[arg-type]
            cls(0, 1, 0, 0, None),  # type: ignore[arg-type]
            cls(0, None, 0, None, None),  # type: ignore[arg-type]
        )

    def first(self) -> "Step":
        """The first entry."""
        own, log_q = jax.tree.map(lambda x: x[0, 0], (self.own, self.log_q))
        return Step(own, jax.tree.map(lambda x: x[0, 0], self.before), log_q, self.time[0], self.path)


class Levels(NamedTuple, Generic[T]):
    """A pair: the value for the shared sites, and a dict from each named plate and chain to its value."""

    shared: T
    local: dict[str, T]

    def at(self, level: str | None) -> T:
        """The value of a named plate or a chain, or the shared one for None: see :func:`level_of`."""
        return self.shared if level is None else self.local[level]


def map_levels(fn: Callable, *levels: Levels) -> Levels:
    """Apply a function to each level."""
    shared = fn(*(level.shared for level in levels))
    return Levels(shared, {name: fn(*(level.local[name] for level in levels)) for name in levels[0].local})


def level_of(site: dict, names: Collection[str]) -> str | None:
    """The named plate or the chain that a site is in, or None."""
    if (chain := site["infer"].get(CHAIN)) in names:
        return chain
    return next((frame.name for frame in site["cond_indep_stack"] if frame.name in names), None)


def map_local(program: Callable, by_site: Callable, local: dict[str, Any]) -> tuple[Levels, Any]:
    """Map a program over the local particles of each level in turn; shared values are computed once.

    :param program: from the inputs of one local particle of each level, to levels and a static value. Of a chain the
        input is a :class:`Step`.
    :param by_site: from the same inputs to the log-densities of all sites, by name, and each site's level by name.
        Traced only after an error, to name the site and the plate.
    :param local: inputs of each level, with axes for its particles.
    :raises ValueError: for a site outside of a level that depends on the level's latents.
    """
    mapped = program
    for name, inputs in local.items():
        out_axes = Levels(None, {other: 0 if other == name else None for other in local})
        for axis in inputs.axes() if isinstance(inputs, Step) else (0,):
            in_axes = {other: axis if other == name else None for other in local}
            # The axis is named, so that a handler around the program can tell the particles apart.
            named: dict[str, Any] = {} if isinstance(inputs, Step) else {"axis_name": name}
            mapped = jax.vmap(mapped, in_axes=(in_axes,), out_axes=(out_axes, None), **named)
    try:
        return mapped(local)
    except ValueError:  # of `vmap`, where an output without the axis of a plate depends on it; or of the program itself
        _check_dependence(by_site, local)
        raise


def _check_dependence(by_site: Callable, local: dict[str, Any]) -> None:
    """Raise for a site outside of a named plate that depends on the plate's latents."""
    levels: dict[str, str | None] = {}

    def densities(first):
        found, level_of_site = by_site(first)
        levels.update(level_of_site)
        return found

    first = {name: x.first() if isinstance(x, Step) else jax.tree.map(lambda x: x[0], x) for name, x in local.items()}
    for site, found in dependence(densities, first).items():
        for level in sorted(found - {levels[site]}):
            if isinstance(local[level], Step):
                raise outside_error(site, level)
            raise dependence_error(site, level)
