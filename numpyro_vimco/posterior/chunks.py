# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A function of many draws, so many at a time, with its results on the host and a progress bar."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from numpyro_vimco.programs import compiled

# A progress bar appears where more than this is to be waited for, in seconds.
PATIENCE = 3


def patient_bar(total: int, description: str | None) -> tqdm:
    """A progress bar that appears once ``PATIENCE`` seconds have passed; none without a description."""
    return tqdm(total=total, desc=description, delay=PATIENCE, disable=description is None, leave=False)


def chunks(
    fn: Callable, chunk_size: int, *inputs: Any, progress: str | None, then: Callable = lambda outputs: outputs
) -> Iterator[tuple[slice, Any]]:
    """``jax.vmap(fn)(*inputs)``, so many elements at a time.

    :param progress: what the progress bar calls it; None for no bar.
    :param then: what is computed from a chunk, outside of its program, so that calls that want other things of the
        same draws have one program for them. Defaults to what the function returns.
    :return: for each chunk, where it belongs, and NumPy arrays.
    """
    length = len(jax.tree.leaves(inputs)[0])
    chunk_size = min(chunk_size, length)
    # All chunks have one shape: the last begins earlier, and what it repeats is dropped.
    begins = range(0, length, chunk_size)
    starts = [min(begin, length - chunk_size) for begin in begins]

    def part(start):
        return jax.tree.map(lambda x: x[start : start + chunk_size], inputs)

    run = compiled(jax.vmap(fn), *part(0))

    def compute(start):
        return then(run(*part(start)))

    with patient_bar(length, progress) as bar:
        outputs = compute(starts[0])
        for begin, start, after in zip(begins, starts, [*starts[1:], None]):
            # JAX computes the next chunk while the caller takes this one. Not two at a time: on a CPU, XLA's threads
            # may then wait for each other without end.
            jax.block_until_ready(outputs)
            following = None if after is None else compute(after)
            kept = slice(begin, start + chunk_size)
            yield kept, jax.tree.map(lambda x, skip=begin - start: np.asarray(x)[skip:], outputs)
            outputs = following
            bar.update(kept.stop - kept.start)


def in_chunks(fn: Callable, chunk_size: int, *inputs: Any, progress: str | None = None) -> Any:
    """``jax.vmap(fn)(*inputs)`` as NumPy arrays, computed so many elements at a time: see :func:`chunks`."""
    length = len(jax.tree.leaves(inputs)[0])
    whole = None
    for kept, part in chunks(fn, chunk_size, *inputs, progress=progress):
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((length, *x.shape[1:]), x.dtype), part)
        for target, source in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
            target[kept] = source
    return whole
