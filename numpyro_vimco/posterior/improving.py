# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What is done about a posterior that is not "good": one step after the other, until it is, or the time is used."""

from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import Any, NamedTuple

from jaxtyping import Array

from numpyro_vimco.randomness import split

RANK = {"bad": 0, "usable": 1, "good": 2}
# Longer chains have so many times as many draws at most.
LONGEST = 8
DRAWS = 1000  # of each chain, as `refine` has them
# Findings that more draws of the guides mend, and those that may stand beside them; findings that other weights mend,
# and that longer chains do.
OF_FEW_DRAWS, BESIDE = {"few-draws", "uncertain-evidence"}, {"not-good-yet", "heavy-tail"}
OF_JOINT_WEIGHTS = {"joint-weight", "joint-path"}
OF_SHORT_CHAINS = {"chains-disagree", "few-effective-draws"}


class Ways(NamedTuple):
    """What can be done, each from a posterior to another.

    :ivar more_draws: of the guides, so many.
    :ivar planned: with a key, a new fit by the plan of :func:`.fit`.
    :ivar refined: with a key and a number of draws, by chains.
    :ivar more_steps: so many.
    :ivar more_particles: with a key, a new fit.
    """

    more_draws: Callable[[Any, int], Any]
    planned: Callable[[Any, Array], Any]
    refined: Callable[[Any, Array, int], Any]
    more_steps: Callable[[Any, int], Any]
    more_particles: Callable[[Any, Array], Any]


class Tries:
    """Steps that are tried, and the best posterior so far.

    :ivar done: what was done, in words.
    :ivar was_interrupted: whether the user ended it.
    """

    def __init__(self, posterior: Any, seconds: float, progress_bar: bool):
        self.best, self.done = posterior, list(posterior.improvements)
        self.was_interrupted = False
        self._began, self._seconds, self._progress_bar = perf_counter(), seconds, progress_bar

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - (perf_counter() - self._began)

    @property
    def is_over(self) -> bool:
        return self.best.verdict == "good" or self.left <= 0 or self.was_interrupted

    def take(self, what: str, step: Callable[[], Any]) -> tuple[Any, float]:
        """Take a step, and keep what it makes if that is no worse; return it, and how many seconds it took.

        Of the same verdict chains are better than weights, which they correct: in 11 of 42 runs of the benchmark only
        they were within 0.1, and in none only weights were (``planned`` and ``refined`` in its result files).
        A step that is not possible is noted, makes None and takes infinitely long.
        """
        began = perf_counter()
        try:
            found = step()
            verdict = found.verdict
        except KeyboardInterrupt:
            self.done.append(f"{what}: interrupted")
            self.was_interrupted = True
            return None, inf
        except Exception as error:  # of memory too: what there is must not be lost
            self.done.append(f"{what}: not possible, {type(error).__name__}: {error}")
            return None, inf
        finally:
            took = perf_counter() - began
        self.done.append(f"{what}: {verdict}, {took:.0f} s")
        if self._progress_bar:
            print(f"improve: {self.done[-1]}")
        if _rank(found) >= _rank(self.best):
            self.best = found
        return found, took


def _rank(posterior: Any) -> tuple[int, bool]:
    return RANK[posterior.verdict], posterior.mcmc is not None


def improve(
    posterior: Any, rng_key: Array, seconds: float, ways: Ways, progress_bar: bool
) -> tuple[Any, tuple[str, ...]]:
    """The best posterior that some steps lead to, and what was done. See :meth:`.Posterior.improve`."""
    tries = Tries(posterior, seconds, progress_bar)
    plan_key, particle_key, *keys = split(rng_key, 5)
    codes = {finding.code for finding in posterior.findings}
    if not tries.is_over and codes & OF_FEW_DRAWS and codes <= OF_FEW_DRAWS | BESIDE:
        number = 4 * posterior.diagnostics.num_draws
        tries.take(f"{number:,} draws", lambda: ways.more_draws(posterior, number))
    if not tries.is_over and posterior.plan is None and codes & OF_JOINT_WEIGHTS:
        tries.take("another plan", lambda: ways.planned(posterior, plan_key))
    fitted, took = tries.best, inf
    if not tries.is_over:
        _, took = tries.take("chains (refine)", lambda: ways.refined(fitted, keys[0], DRAWS))
    is_mixed = not {finding.code for finding in tries.best.findings} & OF_SHORT_CHAINS
    if not tries.is_over and not is_mixed and tries.left > 2 * took:
        number = DRAWS * int(min(LONGEST, tries.left / took))
        tries.take(f"chains of {number:,} draws", lambda: ways.refined(fitted, keys[1], number))
    given = {"optim", "loss"} if fitted.plan is None else fitted.plan.given
    taken = fitted.losses.shape[1]
    if not tries.is_over and taken and "optim" not in given and tries.left > fitted.seconds:
        more, _ = tries.take(f"{taken:,} steps more", lambda: ways.more_steps(fitted, taken))
        # Chains of a worse fit would be held against weights that say less.
        if more and RANK[more.verdict] >= RANK[fitted.verdict] and not tries.is_over and took < tries.left:
            tries.take("chains (refine)", lambda: ways.refined(more, keys[2], DRAWS))
    if not tries.is_over and "loss" not in given and tries.left > 2 * fitted.seconds:
        tries.take("four times the particles", lambda: ways.more_particles(fitted, particle_key))
    if tries.best.verdict != "good" and not tries.was_interrupted:
        left = f"no other step fits into the {tries.left:.0f} s that are left" if tries.left > 0 else "the time is over"
        tries.done.append(f"stopped: {left}")
    return tries.best, tuple(tries.done)
