"""Forty small posteriors at the recommended settings: how many are right, and what is said of them.

python benchmarks/small_posteriors [NAME ...] [--steps 2000] [--seed 0]
"""

import argparse
from pathlib import Path
import sys
import warnings

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.small_posteriors import PROBLEMS
from benchmarks.small_posteriors.running import HEADER, judge, table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of problems; all if there is none")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes = []
    print(HEADER, flush=True)
    for name in args.names or PROBLEMS:
        outcomes.append(judge(PROBLEMS[name], args.seed, args.steps))
        print(outcomes[-1], flush=True)
    print(table(outcomes))
