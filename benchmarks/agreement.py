"""Is "good" true? Fits of one and of four starts on posteriors with a known truth, and their verdicts.

    python benchmarks/agreement.py [--settings one-at-a-time] [--part 1/6] [--output agreement.csv]

60 settings: for each of four posteriors the recommended one with three seeds, and twelve drawn from the grid of
learning rates 0.002, 0.01, 0.05; α 0, 0.1, 0.5, 1, or reweighted wake-sleep; tempered or not; coupling speeds κ 0.1,
0.3, 1. Each is a fit of four starts of 4,000 steps (8,000 for change points), the rate held for half of them, then
a cosine, 64 particles; its first start stands for a single fit. Wrong is a probability that is off by more than 0.05,
or a log evidence by more than 0.2 nats, of 40,000 draws. A line for each fit is printed, and written to a CSV.
One at a time: the recommended setting with one thing changed. In the end, or of CSVs by ``--read``, how many fits are
right and wrong, by what is said of them.
"""

import argparse
from collections import Counter
import csv
from dataclasses import replace
from pathlib import Path
import sys
import time
import warnings

import jax
from jax import random
import numpy as np
from numpyro.infer import SVI
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import print_machine
from benchmarks.posteriors import problem, recommended
from numpyro_vimco import AutoMixed, ReweightedWakeSleep, VIMCOStar, fit
from numpyro_vimco.diagnostics.verdict import diagnose

PROBLEMS = ("diabetes", "strongly_correlated_design", "change_points", "karate_club_either")
RATES, ALPHAS, KAPPAS = (0.002, 0.01, 0.05), (0.0, 0.1, 0.5, 1.0, "wake-sleep"), (0.1, 0.3, 1.0)
DRAWS = 40_000
VERDICTS = ("good", "usable", "bad")


def settings():
    """Problem, seed, rate, α, share of tempering and κ of each fit."""
    rng = np.random.default_rng(0)
    grid = [(r, a, n, k) for r in RATES for a in ALPHAS for n in (0.0, 0.5) for k in KAPPAS]
    for name in PROBLEMS:
        for seed in range(3):
            yield name, seed, 0.01, 0.5, 0.5, 0.3
        for seed, index in enumerate(rng.choice(len(grid), 12, replace=False)):
            yield (name, seed, *grid[index])


def one_at_a_time():
    """The recommended setting of each problem, with one thing changed; the structure of the guide last."""
    usual = {"rate": 0.01, "alpha": 0.5, "tempering": 0.5, "kappa": 0.3, "structure": "autoregressive"}
    changes = {
        "rate": (0.002, 0.05),
        "alpha": (0.0, 1.0, "wake-sleep"),
        "tempering": (0.0,),
        "kappa": (0.1, 1.0),
        "structure": ("mean_field", "conditional"),
    }
    for name in PROBLEMS:
        for what, value in ((what, value) for what, values in changes.items() for value in values):
            yield (name, 0, *{**usual, what: value}.values())


def first_start(posterior):
    """The approximation and the starts of a fit of the first start alone."""
    starts, first = posterior.starts, posterior.starts.kept[:1]
    names = "params", "losses", "inverse_temperature", "failed", "log_evidence", "log_evidence_std_error"
    of_first = {name: jax.tree.map(lambda leaf: leaf[first], getattr(starts, name)) for name in names}
    return posterior._approx.only(0), replace(starts, **of_first)


def measure(name, seed, rate, alpha, tempering, kappa, structure="autoregressive", num_steps=None, draws=DRAWS):
    """A row for one start, and one for four."""
    about = problem(name)
    args, num_steps = about.args, num_steps or about.num_steps
    guide = AutoMixed(about.model, structure=structure, coupling_speed=kappa)
    objective = ReweightedWakeSleep(64) if alpha == "wake-sleep" else VIMCOStar(alpha, 64)
    svi = SVI(about.model, guide, optax.adam(recommended(num_steps, rate)), objective)
    start = time.perf_counter()
    four = fit(svi, random.key(seed), num_steps, *args, num_starts=4, tempering=tempering, progress_bar=False)
    for approx, starts in (first_start(four), (four._approx, four.starts)):
        found = diagnose(approx, starts, True, True, random.key(seed), draws, False)
        table = found.agreement
        estimates = dict(zip(table["quantity"].values, table["pooled"].values))
        error = max(
            abs(estimates[f"{site}[{i}]"] - p) for site, ps in about.truth.means.items() for i, p in enumerate(ps)
        )
        evidence_error = found.log_evidence - about.truth.log_evidence
        apart = np.abs(table["difference"].values).max(0)
        row = {
            "problem": name, "seed": seed, "rate": rate, "alpha": alpha, "tempered": tempering > 0, "kappa": kappa,
            "structure": structure,
            "starts": table.sizes["start"], "wrong": error > 0.05 or abs(evidence_error) > 0.2,
            "verdict": found.verdict, "error": f"{error:.4f}", "evidence error": f"{evidence_error:.3f}",
            "ESS": f"{found.ess / draws:.3f}", "k": f"{found.pareto_k:.2f}",
            "off": int(table["differs"].any("quantity").sum()), "evidence apart": f"{apart[0]:.3f}",
            "means apart": f"{apart[1:].max():.3g}", "proof": bool(np.isfinite(table["earlier_bound"]).any()),
            "seconds": round(time.perf_counter() - start),
        }  # fmt: skip
        yield row


def is_recommended(row):
    """Whether a row of a CSV is of the recommended setting."""
    setting = [row[what] for what in ("rate", "alpha", "tempered", "kappa", "structure")]
    return setting == ["0.01", "0.5", "True", "0.3", "autoregressive"]


def print_summary(rows):
    """How many fits are right or wrong, by what is said of them.

    :param rows: of CSVs.
    """
    line = "{:>22} {:>5} {:>12} {:>7} {:>4} {:>12} {:>7} {:>4}"
    print(line.format("", "fits", "right: good", "usable", "bad", "wrong: good", "usable", "bad"))
    for recommended_only, name in ((True, "recommended"), (False, "others")):
        for starts in ("1", "4"):
            of = [row for row in rows if row["starts"] == starts and is_recommended(row) == recommended_only]
            counts = Counter((row["wrong"], row["verdict"]) for row in of)
            right, wrong = ([counts[w, verdict] for verdict in VERDICTS] for w in ("False", "True"))
            print(line.format(f"{name}, {starts} start(s)", len(of), *right, *wrong))
    right = [row for row in rows if row["starts"] == "4" and float(row["error"]) < 0.02 and row["wrong"] == "False"]
    print(
        f"of {len(right)} of four starts that are right to 0.02, {sum(r['verdict'] == 'good' for r in right)} are good"
    )


def main(args):
    """Print and write the rows of a part; then print the summary, of these or of what is read."""
    if not args.read:
        print_machine()
        part, parts = map(int, args.part.split("/"))
        with open(args.output, "w", newline="") as file:
            writer = None
            for setting in list(settings() if args.settings == "grid" else one_at_a_time())[part - 1 :: parts]:
                for row in measure(*setting, num_steps=args.num_steps):
                    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                    if writer is None:
                        writer = csv.DictWriter(file, row)
                        writer.writeheader()
                    writer.writerow(row)
                    file.flush()
    rows = []
    for path in args.read or [args.output]:
        with open(path, newline="") as file:
            rows += csv.DictReader(file)
    print_summary(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", choices=["grid", "one-at-a-time"], default="grid")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th setting, from the i-th on")
    parser.add_argument("--num-steps", type=int, help="in place of 4,000 and 8,000")
    parser.add_argument("--read", nargs="+", type=Path, help="only the summary of these CSVs, of all parts, say")
    parser.add_argument("--output", type=Path, default=Path("agreement.csv"))
    warnings.simplefilter("ignore")
    main(parser.parse_args())
