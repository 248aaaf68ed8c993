# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Levels: sets of sites that are drawn together.

The sites in a plate that ``plate_particles`` names, a *named plate*, are one level: they are drawn as *local particles*
of that plate. The sites outside of all named plates are the *shared* level; without named plates these are all sites.
The arrays of a named plate have an axis for its local particles, before the axes of the plates.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from numpyro_vimco.checks.supports_and_plates import dependence_error
from numpyro_vimco.dependence import dependence

T = TypeVar("T")


class Levels(NamedTuple, Generic[T]):
    """A pair: the value for the sites outside of all named plates, and a dict from each named plate to its value."""

    shared: T
    local: dict[str, T]

    def at(self, level: str | None) -> T:
        """The value of a named plate, or the shared one for None: see :func:`level_of`."""
        return self.shared if level is None else self.local[level]


def map_levels(fn: Callable, *levels: Levels) -> Levels:
    """Apply a function to each level."""
    shared = fn(*(level.shared for level in levels))
    return Levels(shared, {name: fn(*(level.local[name] for level in levels)) for name in levels[0].local})


def level_of(site: dict, plate_particles: Iterable[str]) -> str | None:
    """The named plate that a site is in, or None."""
    return next((frame.name for frame in site["cond_indep_stack"] if frame.name in plate_particles), None)


def map_local(program: Callable, by_site: Callable, local: dict[str, Any]) -> tuple[Levels, Any]:
    """Map a program over the local particles of each named plate in turn; shared values are computed once.

    :param program: from the inputs of one local particle of each named plate, to levels and a static value.
    :param by_site: from the same inputs to the log-densities of all sites, by name, and each site's level by name.
        Traced only after an error, to name the site and the plate.
    :param local: inputs of each named plate, with a leading axis for its particles.
    :raises ValueError: for a site outside of a named plate that depends on the plate's latents.
    """
    mapped = program
    for name in local:
        axes = {other: 0 if other == name else None for other in local}
        # The axis is named, so that a handler around the program can tell the particles apart.
        mapped = jax.vmap(mapped, in_axes=(axes,), out_axes=(Levels(None, axes), None), axis_name=name)
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

    for site, plates in dependence(densities, jax.tree.map(lambda x: x[0], local)).items():
        for plate in plates - {levels[site]}:
            raise dependence_error(site, plate)
