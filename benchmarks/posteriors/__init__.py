"""Posteriors with a known truth. Each module has one: ``data``, ``model``, ``truth``."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import numpy as np
import optax


class Problem(NamedTuple):
    """A posterior that is known.

    :ivar model: as a user of NumPyro writes it.
    :ivar args: its arguments.
    :ivar log_evidence: in nats; None where it is not known.
    :ivar expected: by site, posterior means of its elements.
    :ivar num_steps: for how many steps it is fitted.
    """

    model: Callable
    args: tuple
    log_evidence: float | None
    expected: dict[str, np.ndarray]
    num_steps: int


@cache
def problem(name: str) -> Problem:
    """A problem by the name of its module. To find the truth can take a minute."""
    module = import_module(f"benchmarks.posteriors.{name}")
    args = module.data()
    return Problem(module.model, args, *module.truth(*args), getattr(module, "NUM_STEPS", 4000))


def recommended(num_steps, rate=0.01):
    """The learning rate held while the likelihood is annealed, then a cosine."""
    half = num_steps // 2
    return optax.join_schedules([optax.constant_schedule(rate), optax.cosine_decay_schedule(rate, half)], [half])
