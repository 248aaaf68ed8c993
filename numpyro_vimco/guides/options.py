# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments that automatic guides share."""

from collections.abc import Sequence
import math

from numpyro_vimco.arguments import check_integer


def check_structure(structure: str, known: Sequence[str]) -> str:
    """``structure``, if there is such a one.

    :raises ValueError: otherwise.
    """
    if structure not in known:
        raise ValueError(f"`structure` is {structure!r}, but must be one of {', '.join(map(repr, known))}.")
    return structure


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
