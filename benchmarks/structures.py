"""Structures of the automatic guide on posteriors with a known truth: how near, how efficient, how long.

    python benchmarks/structures.py [--seeds 5] [--problems diabetes …]

Each fit: 4,000 steps of Adam (8,000 for change points), the rate 0.01 held while the likelihood is tempered over half
of the steps, then a cosine; VIMCOStar(0.5, num_particles=64). Printed for each problem and structure, over the seeds:
the worst error of a posterior probability and the median, median relative ESS of 40,000 draws, median gap of the ELBO
to the log evidence in nats, seconds of the steps, and of a first fit of few steps: compilation, and the evidence.
Before that, a step with many latents.
"""

import argparse
from pathlib import Path
import sys
import time
import warnings

from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import compile_step, elbo, interleaved, median_ratio, print_machine
from benchmarks.posteriors import problem, recommended
from numpyro_vimco import AutoDiscrete, AutoMixed, VIMCOStar, fit

PROBLEMS = ("diabetes", "correlated_design", "strongly_correlated_design", "change_points", "karate_club")
STRUCTURES = ("mean_field", "conditional", "autoregressive")


def measure(name, structure, seeds, **options):
    """For each seed: error, relative ESS, gap of the ELBO, error of the log evidence, seconds of steps, of the rest."""
    about = problem(name)
    model, args, num_steps = about.model, about.args, about.num_steps
    guide = AutoMixed(model, structure=structure, **options)
    svi = SVI(model, guide, optax.adam(recommended(num_steps)), VIMCOStar(0.5, num_particles=64))
    for seed in seeds:
        seconds = []
        # Both compile as much; the second takes steps that the first does not.
        for steps in (num_steps // 20, num_steps):
            start = time.perf_counter()
            posterior = fit(svi, random.key(seed), steps, *args, num_starts=1, progress_bar=False)
            seconds.append(time.perf_counter() - start)
        of_steps = (seconds[1] - seconds[0]) * 20 / 19
        diagnostics = posterior.diagnose(40_000, random.key(seed))
        draws = posterior.to_arviz(rng_key=random.key(seed), num_samples=40_000, num_proposals=40_000, groups=())
        error = max(np.abs(draws["posterior"][k].values[0].mean(0) - v).max() for k, v in about.truth.means.items())
        known = np.nan if about.truth.log_evidence is None else about.truth.log_evidence
        yield (
            error, diagnostics.ess / 40_000, known - elbo(posterior, 40_000), diagnostics.log_evidence - known,
            of_steps, seconds[0],
        )  # fmt: skip


def many_latents(x):
    """1,000 binary latents that the data couple."""
    with numpyro.plate("switch", 1000):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(z.reshape(100, 10).sum(1), 1.0).to_event(1), obs=x)


def print_step():
    """A step with N = 16 on 1,000 binary latents, by structure."""
    data = (jnp.full(100, 5.0),)
    steps = {}
    for structure in ("mean_field", "autoregressive"):
        guide = AutoDiscrete(many_latents, structure=structure)
        step, arguments = compile_step(VIMCOStar(num_particles=16), many_latents, guide, data)
        steps[structure] = step, list(arguments)
    for num_steps in (0, 2000):  # strong couplings take more passes to draw
        for step, arguments in steps.values():
            for _ in range(num_steps):
                arguments[0] = step(*arguments)[0]
        seconds = interleaved(steps, 100)
        ratio = median_ratio(seconds["autoregressive"], seconds["mean_field"])
        times = ", ".join(f"{name} {1e3 * np.median(taken):.2f} ms" for name, taken in seconds.items())
        print(f"1,000 binary latents, N = 16, a step after {num_steps:,}: {times}, ratio {ratio:.2f}", flush=True)


def main(args):
    print_machine()
    print_step()
    print(f"{'problem':>27} {'structure':>15} {'worst error':>12} {'median':>7} {'ESS':>6} {'ELBO gap':>9} "
          f"{'evidence':>9} {'steps (s)':>10} {'first (s)':>10}")  # fmt: skip
    for name in args.problems:
        for structure in args.structures:
            found = np.array(list(measure(name, structure, range(args.seeds))))
            error, ess, gap, evidence, seconds, rest = np.median(found, axis=0)
            evidence = found[np.argmax(np.abs(found[:, 3])), 3]
            print(f"{name:>27} {structure:>15} {found[:, 0].max():12.3f} {error:7.3f} {ess:6.1%} {gap:9.2f} "
                  f"{evidence:9.3f} {seconds:10.1f} {rest:10.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    parser.add_argument("--structures", nargs="+", default=STRUCTURES, choices=STRUCTURES)
    warnings.simplefilter("ignore")
    main(parser.parse_args())
