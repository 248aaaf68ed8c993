# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of arguments that are plain values, and warnings.

Each message names the argument, and says what it must be and why.
"""

from collections.abc import Iterable, Sequence
import inspect
import operator
from pathlib import Path
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

# So many parts of a list are named.
NAMED = 5
# Whose lines are not the user's.
LIBRARIES = tuple(str(Path(path).parent) for path in (__file__, numpyro.__file__, jax.__file__))


def warn(message: str) -> None:
    """A ``UserWarning`` at the line of the user that led to it."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_code.co_filename.startswith(LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(map(repr, names)) or "there are none"


def first_of(parts: Sequence[str]) -> str:
    """The first parts of a list for a message, and how many more there are."""
    more = len(parts) - NAMED
    return ", ".join(parts[:NAMED]) + (f", and {more} more" if more > 0 else "")


def check_integer(argument: str, number: Any, least: int, why: str) -> int:
    """An argument as an ``int``; integers of NumPy and JAX are integers too.

    :raises ValueError: unless it is an integer of at least ``least``.
    """
    try:
        integer = None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        integer = None
    if integer is None or integer < least:
        given = f"an array of shape {np.shape(number)}" if np.ndim(number) else repr(number)
        raise ValueError(f"`{argument}` is {given}, but must be an integer of at least {least}: {why}.")
    return integer


def check_key(rng_key: Any) -> None:
    """Raise unless ``rng_key`` is one key of :func:`jax.random.key` or :func:`jax.random.PRNGKey`.

    :raises ValueError: otherwise.
    """
    if isinstance(rng_key, jax.Array):
        typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
        if rng_key.ndim == 0 if typed else rng_key.ndim == 1 and rng_key.dtype == jnp.uint32:
            return
    raise ValueError(f"`rng_key` is {rng_key!r}, but must be one key, such as `jax.random.key(0)`.")
