# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Of funsor, and of enumeration with it, imported where there are summed sites only. Seen in NumPyro 0.20 and in 0.22.

Beside ``PARTS`` these are names: the entry ``dim_to_name`` of a site's ``infer``, ``_PREV_…`` of sites in `scan` and
``_time_…`` of its dimension.
"""

from functools import cache
from types import ModuleType

PARTS = (
    "funsor.interpretations.DispatchedInterpretation",
    "funsor.interpretations.PrioritizedInterpretation",
    "funsor.cnf.Contraction",
)


def import_funsor() -> ModuleType:
    """The package funsor, with JAX as its backend.

    :raises ImportError: if it is not installed.
    """
    try:
        import funsor
        import funsor.optimizer
        import numpyro.contrib.funsor  # noqa: F401  (sets the backend)
    except ImportError:
        raise ImportError(
            "The model has sites that are marked to be summed out, infer={'enumerate': 'parallel'}, which needs the "
            "package funsor: `pip install funsor`. Or remove the marks, and let the guide sample these sites."
        ) from None
    return funsor


@cache
def in_logs():
    """An interpretation of funsor in which two tables are added before their sum is taken.

    funsor's own takes the product of their exponentials, each divided by its largest. That is 0, and its logarithm
    -inf, where the values that two tables favour differ by more than 88 nats: two observations of one summed site,
    early in a fit.
    """
    funsor = import_funsor()
    from funsor.interpretations import DispatchedInterpretation, PrioritizedInterpretation, eager

    base = DispatchedInterpretation("in_logs")
    ops, tensor = funsor.ops, funsor.Tensor

    @base.register(funsor.cnf.Contraction, ops.LogaddexpOp, ops.AddOp, frozenset, tensor, tensor)
    def contract(red_op, bin_op, reduced_vars, lhs, rhs):
        return bin_op(lhs, rhs).reduce(red_op, reduced_vars)

    return PrioritizedInterpretation(base, eager)


def names_of_dims(site: dict) -> dict[int, str]:
    """The name of each named dimension of a site of an enumerated trace."""
    return dict(site["infer"]["dim_to_name"])
