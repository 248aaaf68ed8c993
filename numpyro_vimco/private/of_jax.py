# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Of JAX: jaxprs, taken apart, and whether it traces now. Seen in 0.9, the oldest that is admitted, to 0.12."""

from pathlib import Path
from typing import Any

import jax
from jax._src.core import trace_state_clean
from jax.core import eval_jaxpr
from jax.interpreters import partial_eval
from jax.interpreters.partial_eval import dce_jaxpr

PARTS = (
    "jax._src.core.trace_state_clean",
    "jax.core.eval_jaxpr",
    "jax.interpreters.partial_eval.dce_jaxpr",
)
__all__ = ["dce_jaxpr", "eval_jaxpr", "file_of", "trace_state_clean", "with_constvars"]

_JAX = str(Path(jax.__file__).parent)


def file_of(eqn: Any) -> str:
    """The file whose code made an equation of a jaxpr, JAX's own left out; empty where JAX does not know.

    JAX keeps the jaxpr of what it jits: inside of one, the file is that of the first who called it.
    """
    traceback = eqn.source_info.traceback
    files = [frame.file_name for frame in traceback.frames] if traceback else []
    return next((file for file in files if not file.startswith((_JAX, "<"))), "")


def with_constvars(jaxpr: Any) -> Any:
    """A jaxpr whose arrays are variables: since JAX 0.12 it holds them."""
    return vars(partial_eval)["convert_constvars_jaxpr"](jaxpr) if hasattr(jaxpr, "consts") else jaxpr
