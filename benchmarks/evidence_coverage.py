"""How often 95% intervals of the log evidence hold the true one, over fits of posteriors whose evidence is exact.

    python benchmarks/evidence_coverage.py --seeds 4

The recommended line, 2,000 steps, all latents sampled, on the posteriors of `benchmarks/posteriors` whose log evidence
is known to 0.002 nats. An interval is `posterior.log_evidence` ± 1.96 of its standard errors, of the default 10,000
draws. Prints one row for each fit, and the coverage of all, of finite intervals and by verdict.

    python benchmarks/evidence_coverage.py --simulated

Instead of fits, independent weights of known mean: how often the intervals hold it, by the delta method and as given.
"""

import argparse
from collections import defaultdict
import os
from pathlib import Path
import subprocess
import sys
import tempfile

from jax import random
import numpy as np
from numpyro.infer import SVI
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.posteriors import PROBLEMS, problem, recommended
from numpyro_vimco import AutoMixed, VIMCOStar, fit
from numpyro_vimco.draws.weights import WeightStream

STEPS = 2000
# Of simulated weights: repetitions, and draws of each.
REPETITIONS, DRAWS = 2000, 10_000


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


def simulated():
    """Print a row for each distribution of weights."""
    rng = np.random.default_rng(0)
    exponential, normal = (lambda: rng.standard_exponential((DRAWS, 1))), (lambda: rng.standard_normal((DRAWS, 1)))
    kinds = {f"Pareto, k = {k}": (lambda k=k: k * exponential(), -np.log1p(-k)) for k in (0.3, 0.5, 0.7, 0.8, 0.9)}
    kinds |= {f"lognormal, {s}": (lambda s=s: s * normal(), s**2 / 2) for s in (0.5, 1.0, 1.5, 2.0, 2.5)}
    print("| weights | k found | by the delta method | as given | standard error |")
    print("| --- | --- | --- | --- | --- |")
    for name, (draw, truth) in kinds.items():
        found = []
        for _ in range(REPETITIONS):
            stream = WeightStream(DRAWS, 1)
            stream.add(draw())
            found.append(stream.summary())
        off = np.array([each.log_evidence.item() for each in found]) - truth
        delta = np.array([each.variance.item() ** 0.5 for each in found])
        given = np.array([each.std_error for each in found])
        k = np.mean([each.pareto_k for each in found])
        covered = [f"{np.mean(np.abs(off) < 1.96 * error):.1%}" for error in (delta, given)]
        errors = f"{np.median(delta):.3f}, {np.median(given):.3f}"
        print(f"| {name} | {k:.2f} | {covered[0]} | {covered[1]} | {errors} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--problem", choices=PROBLEMS, help="only this one, in this process")
    parser.add_argument("--simulated", action="store_true", help="no fits: weights of known mean")
    args = parser.parse_args()
    if args.simulated:
        simulated()
        return
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
                for kind in ("all", verdict, *["finite"] * (float(error) < np.inf)):
                    covered[kind].append(abs(errors) < 1.96)
    for verdict, some in covered.items():
        print(f"{verdict}: {sum(some)} of {len(some)} intervals hold the true log evidence")


if __name__ == "__main__":
    main()
