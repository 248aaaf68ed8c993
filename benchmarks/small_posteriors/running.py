"""A small posterior at the recommended settings, and whether what comes out is right."""

from collections import Counter
from dataclasses import dataclass
import time

from jax import random
import numpy as np
from numpyro.infer import SVI
import optax

from numpyro_vimco import AutoMixed, VIMCOStar, fit, importance_diagnostics, to_arviz

DRAWS = 4000
# A fit with fewer effective draws is not excused by their noise.
LEAST_ESS = 400
READINGS = ("good", "usable", "bad", "error")
HEADER = f"{'name':24}{'exact':>10}{'estimate':>10}{'error':>8}  {'of':20}{'ESS':>7}  {'reading':8}{'right':7}seconds"


def run(problem, key, num_steps):
    """All calls of the library: the reading, the log evidence, posterior draws by latent, and the effective number of
    the proposals that they were resampled from.
    """
    fit_key, weight_key, draw_key = random.split(key, 3)
    model, args = problem.model, problem.args
    guide = AutoMixed(model) if problem.guide is None else problem.guide(model)
    schedule = optax.warmup_cosine_decay_schedule(0.01, 0.01, num_steps // 2, num_steps)
    svi = SVI(model, guide, optax.adam(schedule), VIMCOStar(0.5, num_particles=64))
    result = fit(svi, fit_key, num_steps, *args, anneal=problem.anneal, progress_bar=False)
    after = {"model_args": args, "progress_bar": False}
    diagnostics = importance_diagnostics(svi, result, rng_key=weight_key, **after)
    posterior = to_arviz(svi, result, rng_key=draw_key, num_samples=DRAWS, groups=(), **after)["posterior"]
    draws = {name: x.values.reshape(-1, *x.shape[2:]) for name, x in posterior.data_vars.items()}
    return diagnostics.reading, diagnostics.log_evidence, draws, float(np.min(posterior.attrs["ess"]))


@dataclass(frozen=True)
class Verdict:
    """What came of one run. Printed, it is a line under `HEADER`.

    :ivar error: the worst |estimate - exact| of what is asked, in posterior standard deviations.
    :ivar worst: of which quantity; the name of the exception where a call failed.
    :ivar ess: effective number of proposals.
    :ivar reading: of the diagnostics; "error" where a call failed.
    :ivar right: whether the error is at most 0.1 beside four standard errors of the draws, and that of the log
        evidence at most 0.1 nats.
    """

    name: str
    exact: float
    estimate: float
    error: float
    worst: str
    ess: float
    reading: str
    right: bool
    seconds: float

    def __str__(self):
        numbers = f"{self.exact:10.3f}{self.estimate:10.3f}{self.error:8.3f}  {self.worst:20}{self.ess:7.0f}"
        return f"{self.name:24}{numbers}  {self.reading:8}{'right' if self.right else 'WRONG':7}{self.seconds:7.1f}"


def judge(problem, seed=0, num_steps=2000):
    """Run a problem, and hold it against its exact answers."""
    log_evidence, exact = problem.exact()
    start = time.perf_counter()
    try:
        reading, estimate, draws, ess = run(problem, random.key(seed), num_steps)
    except Exception as error:  # what fails is wrong, and the others are run
        reading, estimate, errors, ess = "error", np.nan, {type(error).__name__[:20]: np.inf}, np.nan
    else:
        asked = {name: function(draws).astype(float).mean() for name, function in problem.asked.items()}
        errors = {name: float(abs(asked[name] - mean) / sd) for name, (mean, sd) in exact.items()}
    seconds = time.perf_counter() - start
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    noise = np.sqrt(1 / DRAWS + 1 / max(ess, LEAST_ESS))
    right = bool(errors[worst] <= 0.1 + 4 * noise and abs(estimate - log_evidence) <= 0.1)
    return Verdict(problem.name, log_evidence, estimate, errors[worst], worst, ess, reading, right, seconds)


def table(verdicts):
    """How many are right, and right and wrong by reading."""
    count = Counter((verdict.reading, verdict.right) for verdict in verdicts)
    rows = [f"{reading:12}{count[reading, True]:8}{count[reading, False]:8}" for reading in READINGS]
    right = sum(verdict.right for verdict in verdicts)
    return "\n".join([f"\n{right} of {len(verdicts)} right", f"{'reading':12}{'right':>8}{'wrong':>8}", *rows])
