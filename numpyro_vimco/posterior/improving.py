# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What is done about a posterior that is not "good": one step after the other, until it is, or the time is used."""

from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

from jaxtyping import Array

from numpyro_vimco.posterior.chains import ChainDiagnostics
from numpyro_vimco.randomness import split

if TYPE_CHECKING:
    from numpyro_vimco.posterior.posterior import Posterior

RANK = {"bad": 0, "usable": 1, "good": 2}
# Longer chains have so many times as many draws at most.
LONGEST = 8
# Findings that more draws of the guides mend, and that other weights do.
MORE_DRAWS = {"few-draws", "uncertain-evidence"}
SAID_WITH = {"not-good-yet", "heavy-tail"}
OTHER_PLAN = {"joint-weight", "joint-path"}
LONGER_CHAINS = {"chains-disagree", "few-effective-draws"}


class Steps:
    """Steps that are tried, and the best posterior so far.

    :ivar done: what was done, in words.
    """

    def __init__(self, posterior: "Posterior", seconds: float):
        self.best, self.done = posterior, list(posterior.improvements)
        self._began, self._seconds = perf_counter(), seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - (perf_counter() - self._began)

    @property
    def is_over(self) -> bool:
        return self.best.verdict == "good" or self.left <= 0

    def take(self, what: str, step: Callable[[], "Posterior"]) -> float:
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


def improve(
    posterior: "Posterior", rng_key: Array, seconds: float, replanned: Callable[[Array], Any] | None
) -> "Posterior":
    """The best posterior that some steps lead to. See :meth:`.Posterior.improve`.

    :param replanned: fits the model as :func:`.fit` plans it, where it was fitted otherwise.
    """
    steps = Steps(posterior, seconds)
    plan_key, first_key, second_key, third_key = split(rng_key, 4)
    codes = {finding.code for finding in posterior.findings}
    if not steps.is_over and posterior.mcmc is None and codes & MORE_DRAWS and codes <= MORE_DRAWS | SAID_WITH:
        number = 4 * posterior.diagnostics.num_draws
        steps.take(f"{number:,} draws", lambda: posterior._again(number))
    if not steps.is_over and replanned is not None and codes & OTHER_PLAN:
        steps.take("another plan", lambda: replanned(plan_key))
    fitted = steps.best
    one = 0.0
    if not steps.is_over:
        one = steps.take("chains (refine)", lambda: _refined(fitted, first_key))
    if not steps.is_over and one < inf and steps.left > 2 * one:
        found = steps.best.mcmc and steps.best.findings
        if found and {finding.code for finding in found} & LONGER_CHAINS:
            times = int(min(LONGEST, steps.left / one))
            steps.take(
                f"chains of {1000 * times:,} draws", lambda: _refined(fitted, second_key, num_samples=1000 * times)
            )
    number = posterior.losses.shape[1]
    more: list[Posterior] = []
    if not steps.is_over and number and posterior.can_resume and steps.left > posterior.seconds:

        def go_on() -> "Posterior":
            more.append(fitted.resume(number))
            return more[0]

        steps.take(f"{number:,} steps more", go_on)
    if more and not steps.is_over and one < steps.left:
        steps.take("chains (refine)", lambda: _refined(more[0], third_key))
    return steps.best._improved(tuple(steps.done))


def _refined(posterior: "Posterior", rng_key: Array, **options: Any) -> "Posterior":
    return posterior._with_chains(posterior.refine(rng_key, **options))


def rows(found: ChainDiagnostics, log_evidence: str) -> dict[str, str]:
    """What is printed of a posterior that chains stand for."""
    about = found.rows()
    return {"verdict": about.pop("verdict"), "log evidence": f"{log_evidence} (weighted draws)", **about}
