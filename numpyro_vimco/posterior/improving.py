# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What is done about a posterior that is not "good": one step after the other, until it is, or the time is used."""

from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import Any, NamedTuple

from jaxtyping import Array

from numpyro_vimco.posterior.chains import ChainDiagnostics
from numpyro_vimco.randomness import split

RANK = {"bad": 0, "usable": 1, "good": 2}
# Longer chains have so many times as many draws at most.
LONGEST = 8
DRAWS = 1000  # of each chain, as `refine` has them
# Findings that more draws of the guides mend, and that other weights do.
MORE_DRAWS = {"few-draws", "uncertain-evidence"}
SAID_WITH = {"not-good-yet", "heavy-tail"}
OTHER_PLAN = {"joint-weight", "joint-path"}
LONGER_CHAINS = {"chains-disagree", "few-effective-draws"}


class Ways(NamedTuple):
    """What can be done, each from a posterior to another.

    :ivar more_draws: of the guides, so many.
    :ivar replanned: with a key, by the plan of :func:`.fit`; None where it is planned.
    :ivar refined: with a key and a number of draws, by chains.
    :ivar more_steps: so many; None where there is no learning rate for them.
    """

    more_draws: Callable[[Any, int], Any]
    replanned: Callable[[Any, Array], Any] | None
    refined: Callable[[Any, Array, int], Any]
    more_steps: Callable[[Any, int], Any] | None


class Steps:
    """Steps that are tried, and the best posterior so far.

    :ivar done: what was done, in words.
    """

    def __init__(self, posterior: Any, seconds: float):
        self.best, self.done = posterior, list(posterior.improvements)
        self._began, self._seconds = perf_counter(), seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - (perf_counter() - self._began)

    @property
    def is_over(self) -> bool:
        return self.best.verdict == "good" or self.left <= 0

    def take(self, what: str, step: Callable[[], Any]) -> float:
        """Take a step, and keep what it makes if that is no worse; return how many seconds it took.

        A step that is not possible is noted, and takes infinitely long.
        """
        began = perf_counter()
        try:
            found = step()
            verdict = found.verdict
        except (ValueError, NotImplementedError) as error:
            self.done.append(f"{what}: not possible. {error}")
            return inf
        took = perf_counter() - began
        self.done.append(f"{what}: {verdict}, {took:.0f} s")
        if RANK[verdict] >= RANK[self.best.verdict]:
            self.best = found
        return took


def improve(posterior: Any, rng_key: Array, seconds: float, ways: Ways) -> tuple[Any, tuple[str, ...]]:
    """The best posterior that some steps lead to, and what was done. See :meth:`.Posterior.improve`."""
    steps = Steps(posterior, seconds)
    plan_key, *keys = split(rng_key, 4)
    codes = {finding.code for finding in posterior.findings}
    if not steps.is_over and codes & MORE_DRAWS and codes <= MORE_DRAWS | SAID_WITH:
        number = 4 * posterior.diagnostics.num_draws
        steps.take(f"{number:,} draws", lambda: ways.more_draws(posterior, number))
    if not steps.is_over and ways.replanned and codes & OTHER_PLAN:
        replanned = ways.replanned
        steps.take("another plan", lambda: replanned(posterior, plan_key))
    fitted, took = steps.best, inf
    if not steps.is_over:
        took = steps.take("chains (refine)", lambda: ways.refined(fitted, keys[0], DRAWS))
    is_mixed = not {finding.code for finding in steps.best.findings} & LONGER_CHAINS
    if not steps.is_over and not is_mixed and steps.left > 2 * took:
        number = DRAWS * int(min(LONGEST, steps.left / took))
        steps.take(f"chains of {number:,} draws", lambda: ways.refined(fitted, keys[1], number))
    taken = posterior.losses.shape[1]
    more: list[Any] = []
    if not steps.is_over and taken and ways.more_steps and steps.left > posterior.seconds:
        more_steps = ways.more_steps

        def go_on() -> Any:
            more.append(more_steps(fitted, taken))
            return more[0]

        steps.take(f"{taken:,} steps more", go_on)
    if more and not steps.is_over and took < steps.left:
        steps.take("chains (refine)", lambda: ways.refined(more[0], keys[2], DRAWS))
    return steps.best, tuple(steps.done)


def rows(found: ChainDiagnostics, log_evidence: str, verdict: str) -> dict[str, str]:
    """What is printed of a posterior that chains stand for.

    :param verdict: of the weighted draws, which the log evidence is of.
    """
    about, of_weights = found.rows(), f'{log_evidence}, of weighted draws, whose verdict is "{verdict}"'
    return {"verdict": about.pop("verdict"), "log evidence": of_weights, **about}
