# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Of JAX: jaxprs, taken apart, and whether it traces now. Seen in 0.9, the oldest that is admitted, to 0.12."""

from typing import Any

from jax._src.core import trace_state_clean
from jax.core import eval_jaxpr
from jax.interpreters import partial_eval
from jax.interpreters.partial_eval import dce_jaxpr

PARTS = (
    "jax._src.core.trace_state_clean",
    "jax.core.eval_jaxpr",
    "jax.interpreters.partial_eval.dce_jaxpr",
)
__all__ = ["dce_jaxpr", "eval_jaxpr", "trace_state_clean", "with_constvars"]


def with_constvars(jaxpr: Any) -> Any:
    """A jaxpr whose arrays are variables: since JAX 0.12 it holds them."""
    return vars(partial_eval)["convert_constvars_jaxpr"](jaxpr) if hasattr(jaxpr, "consts") else jaxpr
