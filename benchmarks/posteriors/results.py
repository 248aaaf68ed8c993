"""Rows of the benchmark as CSV files, one for each problem, which several processes may write."""

import csv
import fcntl
import os
from pathlib import Path
import traceback

import arviz
import jax
import numpyro

COLUMNS = (
    "problem",
    "method",  # as it is called in the docs
    "seed",
    "size",  # steps of a fit, draws of all chains
    "seconds_with_compilation",
    "seconds",  # without compilation
    "error",  # worst over what is asked, |mean - truth| / posterior standard deviation
    "worst",  # the quantity where it is
    "evidence_error",  # in nats, with its sign
    "bound_gap",  # log evidence less the ELBO, in nats; less the estimate of the evidence where that is not known
    "relative_ess",  # of importance weights, of all draws; of MCMC: worst bulk ESS of what is asked, of all draws
    "ess_per_second",  # without compilation
    "pareto_k",
    "rhat",  # worst
    "verdict",  # good, usable or bad: what the method's own diagnostics say
    "right",  # where they say "good": whether the error is at most 0.1, and that of the evidence, where there is one
    "note",
    "numpyro",
    "jax",
    "arviz",
    "cores",
)
RIGHT = 0.1  # posterior standard deviations, or nats


def environment():
    """Versions, and on how many cores this process may run."""
    return {
        "numpyro": numpyro.__version__,
        "jax": jax.__version__,
        "arviz": arviz.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }


def read(path):
    """Rows of a CSV, as dicts of strings; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Results:
    """The rows of one problem.

    :param folder: where its CSV is.
    :param problem: its name.
    """

    def __init__(self, folder, problem):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.problem = folder / f"{problem}.csv", problem

    def write(self, rows):
        """Write rows in place of older ones of the same methods and seeds."""
        rows = [self._completed(row) for row in rows]
        new = {(row["method"], str(row["seed"])) for row in rows}
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            old = [row for row in read(self.path) if (row["method"], row["seed"]) not in new]
            whole = self.path.with_suffix(".new")
            with open(whole, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="")
                writer.writeheader()
                writer.writerows([*old, *rows])
            whole.replace(self.path)
        finally:
            os.close(folder)  # which also unlocks it

    def _completed(self, row):
        if row.get("verdict") == "good":
            row = {**row, "right": max(row["error"], abs(row.get("evidence_error", 0.0))) <= RIGHT}
        numbers = {key: f"{value:.5g}" for key, value in row.items() if isinstance(value, float)}
        return {"problem": self.problem, **row, **numbers, **environment()}


def in_one_sentence(error):
    """An exception as a note."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or f'in {where.name}'}"
