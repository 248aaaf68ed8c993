# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A function of many draws, so many at a time, with its results on the host and a progress bar."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from numpyro_vimco.compilation import Compiled

# A progress bar appears where more than this is to be waited for, in seconds.
PATIENCE = 3


def patient_bar(total: int, description: str | None) -> tqdm:
    """A progress bar that appears once ``PATIENCE`` seconds have passed; none without a description."""
    return tqdm(total=total, desc=description, delay=PATIENCE, disable=description is None, leave=False)


class Chunked:
    """A function of many draws, so many at a time.

    :param fn: from what is held, and one element of the inputs, to arrays.
    :param chunk_size: how many elements are computed at a time.
    """

    def __init__(self, fn: Callable, chunk_size: int):
        self.chunk_size = chunk_size
        self._run = Compiled(lambda held, inputs: jax.vmap(partial(fn, held))(*inputs))

    def ahead(self, held: Any, *inputs: Any) -> None:
        """Compile in a thread, for many elements.

        :param inputs: of one element.
        """

        def many(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.chunk_size, *x.shape), x.dtype)

        self._run.ahead(held, jax.tree.map(many, inputs))

    def blocks(
        self, held: Any, *inputs: Any, progress: str | None = None, then: Callable = lambda outputs: outputs
    ) -> Iterator[tuple[slice, Any]]:
        """The results of each chunk.

        :param held: the same for all elements, parameters mostly.
        :param progress: what the progress bar calls it; None for no bar.
        :param then: what is computed from a chunk, outside of its program, so that calls that want other things of the
            same draws have one program for them. Defaults to what the function returns.
        :return: for each chunk, where it belongs, and NumPy arrays.
        """
        length = len(jax.tree.leaves(inputs)[0])
        chunk_size = min(self.chunk_size, length)
        # All chunks have one shape: the last begins earlier, and what it repeats is dropped.
        begins = range(0, length, chunk_size)
        starts = [min(begin, length - chunk_size) for begin in begins]

        def compute(start: int) -> Any:
            return then(self._run(held, jax.tree.map(lambda x: x[start : start + chunk_size], inputs)))

        with patient_bar(length, progress) as bar:
            outputs = compute(starts[0])
            for begin, start, after in zip(begins, starts, [*starts[1:], None]):
                # JAX computes the next chunk while the caller takes this one. Not two at a time: on a CPU, XLA's
                # threads may then wait for each other without end.
                jax.block_until_ready(outputs)
                following = None if after is None else compute(after)
                kept = slice(begin, start + chunk_size)
                yield kept, jax.tree.map(lambda x, skip=begin - start: np.asarray(x)[skip:], outputs)
                outputs = following
                bar.update(kept.stop - kept.start)

    def all(self, held: Any, *inputs: Any, progress: str | None = None) -> Any:
        """All results, as NumPy arrays."""
        length = len(jax.tree.leaves(inputs)[0])
        whole = None
        for kept, part in self.blocks(held, *inputs, progress=progress):
            if whole is None:
                whole = jax.tree.map(lambda x: np.empty((length, *x.shape[1:]), x.dtype), part)
            for target, source in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
                target[kept] = source
        return whole
