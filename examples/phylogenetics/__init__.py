"""Variational Bayesian phylogenetics [1] with VIMCO-⋆: `python -m examples.phylogenetics`.

Modules, from the bottom up: alignment, trees; likelihood, subsplits; model; fit, exact, report; and two programs.

1. Zhang and Matsen 2019, "Variational Bayesian phylogenetic inference", ICLR
"""

from collections.abc import Callable
import sys


class InputError(ValueError):
    """A file or an option that cannot be used. The message says which, and what to do."""


def run(main: Callable, args) -> None:
    """Run a program; what is wrong with its input is one sentence."""
    try:
        main(args)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
