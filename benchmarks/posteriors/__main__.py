"""Posteriors with a known truth: who finds them, how fast, and who says so.

    python benchmarks/posteriors [--problem diabetes …] [--method recommended …] [--seeds 2] [--seconds 60]
    python benchmarks/posteriors --report                 # tables and picture of docs/posteriors.md, from the results
    python benchmarks/posteriors --truth diabetes …       # compute and store what is known; ``all`` takes an hour

Rows are written to a CSV for each problem, ``results/PROBLEM.csv``, in place of older ones of the same method and seed.
Several processes may write at a time; time what is to be compared on cores of its own (``taskset -c 0 python …``).
"""

import argparse
from importlib import import_module
from pathlib import Path
import sys
import time
import warnings

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.posteriors import PROBLEMS, TRUTHS, problem
from benchmarks.posteriors.methods import METHODS
from benchmarks.posteriors.results import Results, in_one_sentence

FOLDER = Path(__file__).parent


def store_truth(name):
    """Compute what is known of a problem, and write it."""
    module = import_module(f"benchmarks.posteriors.{name}")
    start = time.perf_counter()
    found = module.truth(*module.data())
    TRUTHS.mkdir(exist_ok=True)
    found.save(TRUTHS / f"{name}.json")
    print(f"{name}: {found.source}, {time.perf_counter() - start:.1f} s", flush=True)


def measure(name, method, args):
    """Rows of one method on one problem, written as they come; a method that fails gives a row that says why."""
    results = Results(args.output, name)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        start = time.perf_counter()
        rows = []
        try:
            for row in METHODS[method](problem(name), seed, args.seconds):
                if rows and (row["method"], row["seed"]) != (rows[-1]["method"], rows[-1]["seed"]):
                    results.write(rows)
                    rows = []
                rows.append(row)  # what there is before an error stays
        except Exception as error:  # whatever a library raises for a model that it cannot treat
            if args.debug:
                raise
            rows.append({"method": method, "seed": seed, "note": in_one_sentence(error)})
        if not rows:
            continue
        results.write(rows)
        last = ", ".join(f"{key} {value}" for key, value in rows[-1].items() if value != "")
        print(f"{name}, {time.perf_counter() - start:.0f} s in all: {last}", flush=True)


def main(args):
    if args.truth:
        for name in PROBLEMS if args.truth == ["all"] else args.truth:
            store_truth(name)
    elif args.report:
        from benchmarks.posteriors.report import write_report

        write_report(args.output)
    else:
        for name in args.problem:
            for method in args.method:
                measure(name, method, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", default=PROBLEMS, choices=PROBLEMS, metavar="NAME")
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="for each method, problem and seed")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    parser.add_argument("--report", action="store_true", help="only write the docs from the results")
    parser.add_argument("--truth", nargs="+", metavar="NAME", help="only compute and store what is known")
    parser.add_argument("--debug", action="store_true", help="end at the first error")
    warnings.simplefilter("ignore")
    main(parser.parse_args())
