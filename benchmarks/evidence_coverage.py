"""How often 95% intervals of the log evidence hold the true one, over fits of posteriors whose evidence is exact.

    python benchmarks/evidence_coverage.py --seeds 4

The recommended line, 2,000 steps, all latents sampled, on the posteriors of `benchmarks/posteriors` whose log evidence
is known to 0.002 nats. An interval is `posterior.log_evidence` ± 1.96 of its standard errors, of the default 10,000
draws. Prints one row for each fit, and the coverage of all and by verdict.
"""

import argparse
from collections import defaultdict
import os
from pathlib import Path
import subprocess
import sys
import tempfile

from jax import random
from numpyro.infer import SVI
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.posteriors import PROBLEMS, problem, recommended
from numpyro_vimco import AutoMixed, VIMCOStar, fit

STEPS = 2000


def run(name, seeds):
    """Fit, and print the rows."""
    about = problem(name)
    for seed in range(seeds):
        guide = AutoMixed(about.model, **about.guide_options)
        svi = SVI(about.model, guide, optax.adam(recommended(STEPS)), VIMCOStar(0.5, 64))
        posterior = fit(svi, random.key(seed), STEPS, *about.args, progress_bar=False)
        found = posterior.diagnostics
        off, error = found.log_evidence - about.truth.log_evidence, found.log_evidence_std_error
        print(f"{name} {seed} {off:.4f} {error:.4f} {found.pareto_k.max():.2f} {found.verdict}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--problem", choices=PROBLEMS, help="only this one, in this process")
    args = parser.parse_args()
    if args.problem:
        run(args.problem, args.seeds)
        return
    covered = defaultdict(list)
    print(f"{'posterior':28}{'seed':>4}{'too high by':>13}{'std error':>11}{'errors':>8}{'k':>7}  verdict")
    with tempfile.TemporaryDirectory() as compiled:
        for name in PROBLEMS:
            truth = problem(name).truth
            if truth.log_evidence is None or truth.log_evidence_error > 0.002:
                continue
            command = [sys.executable, __file__, "--problem", name, "--seeds", str(args.seeds)]
            env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": compiled}
            rows = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
            for _, seed, off, error, k, verdict in map(str.split, rows.splitlines()):
                errors = float(off) / float(error)
                print(f"{name:28}{seed:>4}{off:>13}{error:>11}{errors:>8.1f}{k:>7}  {verdict}", flush=True)
                covered[verdict].append(abs(errors) < 1.96)
    covered = {"all": [x for some in covered.values() for x in some], **covered}
    for verdict, some in covered.items():
        print(f"{verdict}: {sum(some)} of {len(some)} intervals hold the true log evidence")


if __name__ == "__main__":
    main()
