# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A function of many draws, so many at a time, with its results on the host and a progress bar.

What is compiled for it, and for the steps of a fit, is kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
import hashlib
from typing import Any

import jax
from jax.interpreters import partial_eval
import numpy as np
from tqdm.auto import tqdm

# So many compiled programs are kept.
PROGRAMS = 32
_programs: OrderedDict[Any, Any] = OrderedDict()
# A progress bar appears where more than this is to be waited for, in seconds.
PATIENCE = 3


def patient_bar(total: int, description: str | None) -> tqdm:
    """A progress bar that appears once ``PATIENCE`` seconds have passed; none without a description."""
    return tqdm(total=total, desc=description, delay=PATIENCE, disable=description is None, leave=False)


def compiled(fn: Callable, *inputs: Any) -> Callable:
    """``fn``, compiled for inputs such as these: on CPUs with less optimisation, which compiles sooner.

    Arrays that it holds, data above all, are arguments of the program: as constants they would be part of it, and those
    that are spread over devices would be gathered. So a program that another call of this package has compiled is used
    again: that of a longer fit, say, or of draws that were diagnosed before.
    """
    closed, outputs = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(outputs)
    if hasattr(jaxpr, "consts"):  # since JAX 0.12 it holds its arrays, which a program that is kept must not
        jaxpr = vars(partial_eval)["convert_constvars_jaxpr"](jaxpr)
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

    def run(held: list, *inputs: Any) -> Any:
        variables = len(jaxpr.constvars)
        flat = jax.core.eval_jaxpr(jaxpr, held[:variables], *held[variables:], *jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, flat)

    program = jax.jit(run, compiler_options=options, keep_unused=True)
    text = program.lower(closed.consts, *inputs).as_text()
    if _says_all(text, len(jax.tree.leaves((closed.consts, inputs)))):
        key = hashlib.sha256(text.encode()).digest(), jax.tree.structure(inputs), structure, jax.default_backend()
        program = _programs.setdefault(key, program)
        _programs.move_to_end(key)
        while len(_programs) > PROGRAMS:
            _programs.popitem(last=False)
    return partial(program, closed.consts)


def _says_all(text: str, num_arguments: int) -> bool:
    """Whether programs of this text are one: it has no function of Python, one device, and no hidden arguments."""
    is_alone = "mhlo.num_partitions = 1 " in text and "mhlo.num_replicas = 1 " in text
    signature = text[text.index("@main(") : text.index("->", text.index("@main("))]
    return is_alone and "callback" not in text and signature.count("%arg") == num_arguments


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
