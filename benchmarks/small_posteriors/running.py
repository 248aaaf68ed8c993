"""A small posterior at the recommended settings, and whether what comes out is right."""

from collections import Counter
from dataclasses import dataclass
import time

from jax import random
import numpy as np
from numpyro.infer import SVI
import optax

from numpyro_vimco import AutoMixed, VIMCOStar, fit

DRAWS = 4000
# A fit with fewer effective draws is not excused by their noise.
LEAST_ESS = 400
VERDICTS = ("good", "usable", "bad", "error")
HEADER = f"{'name':24}{'exact':>10}{'estimate':>10}{'error':>8}  {'of':20}{'ESS':>7}  {'verdict':8}{'right':7}seconds"


def run(problem, key, num_steps):
    """All calls of the library: the verdict, the log evidence, posterior draws by latent, and the effective number of
    the proposals that they were resampled from.
    """
    fit_key, weight_key, draw_key = random.split(key, 3)
    model, args = problem.model, problem.args
    guide = AutoMixed(model) if problem.guide is None else problem.guide(model)
    schedule = optax.warmup_cosine_decay_schedule(0.01, 0.01, num_steps // 2, num_steps)
    svi = SVI(model, guide, optax.adam(schedule), VIMCOStar(0.5, num_particles=64))
    posterior = fit(svi, fit_key, num_steps, *args, tempering=problem.tempering, progress_bar=False)
    posterior.diagnose(rng_key=weight_key)
    tree = posterior.to_arviz(rng_key=draw_key, num_samples=DRAWS, groups=())["posterior"]
    draws = {name: x.values.reshape(-1, *x.shape[2:]) for name, x in tree.data_vars.items()}
    return posterior.verdict, posterior.log_evidence, draws, float(np.min(tree.attrs["ess"]))


@dataclass(frozen=True)
class Outcome:
    """What came of one run. Printed, it is a line under `HEADER`.

    :ivar error: the worst |estimate - exact| of what is asked, in posterior standard deviations.
    :ivar worst: of which quantity; the name of the exception where a call failed.
    :ivar ess: effective number of proposals.
    :ivar verdict: of the diagnostics; "error" where a call failed.
    :ivar right: whether the error is at most 0.1 beside four standard errors of the draws, and that of the log
        evidence at most 0.1 nats.
    """

    name: str
    exact: float
    estimate: float
    error: float
    worst: str
    ess: float
    verdict: str
    right: bool
    seconds: float

    def __str__(self):
        numbers = f"{self.exact:10.3f}{self.estimate:10.3f}{self.error:8.3f}  {self.worst:20}{self.ess:7.0f}"
        return f"{self.name:24}{numbers}  {self.verdict:8}{'right' if self.right else 'WRONG':7}{self.seconds:7.1f}"


def judge(problem, seed=0, num_steps=2000):
    """Run a problem, and hold it against its exact answers."""
    log_evidence, exact = problem.exact()
    start = time.perf_counter()
    try:
        verdict, estimate, draws, ess = run(problem, random.key(seed), num_steps)
    except Exception as error:  # what fails is wrong, and the others are run
        verdict, estimate, errors, ess = "error", np.nan, {type(error).__name__[:20]: np.inf}, np.nan
    else:
        asked = {name: function(draws).astype(float).mean() for name, function in problem.asked.items()}
        errors = {name: float(abs(asked[name] - mean) / sd) for name, (mean, sd) in exact.items()}
    seconds = time.perf_counter() - start
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    noise = np.sqrt(1 / DRAWS + 1 / max(ess, LEAST_ESS))
    right = bool(errors[worst] <= 0.1 + 4 * noise and abs(estimate - log_evidence) <= 0.1)
    return Outcome(problem.name, log_evidence, estimate, errors[worst], worst, ess, verdict, right, seconds)


def table(outcomes):
    """How many are right, and right and wrong by verdict."""
    count = Counter((outcome.verdict, outcome.right) for outcome in outcomes)
    rows = [f"{verdict:12}{count[verdict, True]:8}{count[verdict, False]:8}" for verdict in VERDICTS]
    right = sum(outcome.right for outcome in outcomes)
    return "\n".join([f"\n{right} of {len(outcomes)} right", f"{'verdict':12}{'right':>8}{'wrong':>8}", *rows])
