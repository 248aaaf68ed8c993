# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A function of many draws, computed chunk by chunk, with its results on the host and a progress bar."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

# A progress bar appears after so many seconds.
PATIENCE = 3


def chunks(fn: Callable, chunk_size: int, *inputs: Any, progress: str | None) -> Iterator[tuple[slice, Any]]:
    """``jax.vmap(fn)(*inputs)``, in chunks of ``chunk_size`` elements.

    :param progress: name of the progress bar; None for no bar.
    :return: for each chunk, the slice of elements that it has, and its outputs as NumPy arrays.
    """
    length = len(jax.tree.leaves(inputs)[0])
    chunk_size = min(chunk_size, length)
    compiled = jax.jit(jax.vmap(fn))
    # All chunks have one shape. The last one begins earlier, and the elements that it repeats are dropped.
    begins = range(0, length, chunk_size)
    starts = [min(begin, length - chunk_size) for begin in begins]

    def compute(start):
        return compiled(*jax.tree.map(lambda x: x[start : start + chunk_size], inputs))

    with tqdm(total=length, desc=progress, delay=PATIENCE, disable=progress is None, leave=False) as bar:
        outputs = compute(starts[0])
        for begin, start, after in zip(begins, starts, [*starts[1:], None]):
            # JAX computes the next chunk while the caller takes this one.
            following = None if after is None else compute(after)
            kept = slice(begin, start + chunk_size)
            yield kept, jax.tree.map(lambda x, skip=begin - start: np.asarray(x)[skip:], outputs)
            outputs = following
            bar.update(kept.stop - kept.start)


def in_chunks(fn: Callable, chunk_size: int, *inputs: Any, progress: str | None = None) -> Any:
    """``jax.vmap(fn)(*inputs)`` as NumPy arrays, computed in chunks: see :func:`chunks`."""
    length = len(jax.tree.leaves(inputs)[0])
    whole = None
    for kept, part in chunks(fn, chunk_size, *inputs, progress=progress):
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((length, *x.shape[1:]), x.dtype), part)
        for target, source in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
            target[kept] = source
    return whole
