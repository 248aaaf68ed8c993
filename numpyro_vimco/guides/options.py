# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments that automatic guides share."""

from collections.abc import Mapping, Sequence
import math

from numpyro_vimco.arguments import check_integer


def check_structure(structure: str, known: Sequence[str]) -> str:
    """``structure``, if there is such a one.

    :raises ValueError: otherwise.
    """
    if structure not in known:
        raise ValueError(f"`structure` is {structure!r}, but must be one of {', '.join(map(repr, known))}.")
    return structure


def check_init_scale(init_scale: float) -> float:
    """``init_scale`` as a number.

    :raises ValueError: unless it is positive.
    """
    if not isinstance(init_scale, int | float) or not 0 < init_scale < math.inf:
        raise ValueError(
            f"`init_scale` is {init_scale!r}, but must be a positive number, in units of the prior's scale."
        )
    return float(init_scale)


def check_num_components(num_components: Mapping[str, int]) -> dict[str, int]:
    """Numbers of mixture components by site.

    :raises ValueError: unless these are positive integers by name.
    """
    if not isinstance(num_components, Mapping):
        raise ValueError(
            f"`num_components` is {num_components!r}, but must be a dict from names of latents to numbers of mixture "
            'components, {"mu": 2}.'
        )
    of_site = "so many mixture components has the site in the guide"
    return {name: check_integer(f"num_components['{name}']", n, 1, of_site) for name, n in num_components.items()}


def check_couplings(coupling_speed: float, rank: int | None) -> tuple[float, int | None]:
    """``coupling_speed`` and ``rank``, as numbers.

    :raises ValueError: for a speed that is not positive, or a rank that is no positive integer.
    """
    if not isinstance(coupling_speed, int | float) or not 0 < coupling_speed < math.inf:
        raise ValueError(
            f"`coupling_speed` is {coupling_speed!r}, but must be a positive number: couplings learn by so much more "
            "slowly than other parameters."
        )
    if rank is not None:
        rank = check_integer("rank", rank, 1, "couplings are a product of two matrices of that rank")
    return float(coupling_speed), rank
