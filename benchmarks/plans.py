"""What the rules of `fit(model, ...)` stand on: sums against particles, and the memory of a step.

    taskset -c 0 python benchmarks/plans.py [--values 2 8 32 128] [--elements 100] [--steps 1000] [--starts]

Each datum is a Normal about one of S levels, of an unknown location and scale. The forms are those of the plans: the
levels summed out, with particles of their own, or drawn with all else. ``off`` is the log evidence less that of the
sums. Memory is what XLA asks for in one step of one start, beside what a plan takes it to be.

With ``--starts``, in place of these: fits of the karate club that may have either name, by 4 and 8 starts, with eight
keys.
"""

import argparse
from dataclasses import replace
from pathlib import Path
import sys

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import temp_size
from benchmarks.posteriors import problem
from benchmarks.posteriors.measuring import Clock, forget_compiled
from numpyro_vimco import fit
from numpyro_vimco.planning import rules
from numpyro_vimco.planning.structure import Structure


def model(x, num_values):
    loc = numpyro.sample("loc", dist.Normal(0.0, 3.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("datum", len(x)):
        level = numpyro.sample("level", dist.Categorical(logits=jnp.zeros(num_values)))
        numpyro.sample("x", dist.Normal(loc + 4.0 * level / num_values, scale), obs=x)


def forms(args, num_steps):
    """The plans of the model, by what they do."""
    before = replace_limit(10**6)
    try:
        found = rules.plans(model, args, {}, num_steps, 4, {}, memory=1e15)
    finally:
        replace_limit(before)
    return dict(zip(("summed out", "particles", "joint"), found))


def replace_limit(number):
    """Let the rules sum out latents of so many values; the limit that was there."""
    before, rules.MOST_VALUES = rules.MOST_VALUES, number
    return before


def planned_memory(plan, args):
    """Bytes of one step of one start, as a plan takes them."""
    known = Structure.of(model, args, {})
    low, high = 1.0, 1e15  # the least memory for which particles need no chunks
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        fits = rules._within(replace(plan, chunk_size=None, num_starts=1), known, middle).chunk_size is None
        low, high = (low, middle) if fits else (middle, high)
    return high


def starts():
    """How often a verdict is "good" where the log evidence is wrong."""
    about = problem("karate_club_either")
    print("starts   log evidence, less the truth, and verdict")
    for number in (4, 8):
        for seed in range(8):
            key = random.split(random.key(seed))[0]
            posterior = fit(about.model, key, 2000, *about.args, num_starts=number, progress_bar=False)
            off = posterior.log_evidence - about.truth.log_evidence
            print(f"{number:6} {off:10.2f}  {posterior.verdict}", flush=True)


def main(options):
    if options.starts:
        starts()
        return
    rng = np.random.default_rng(0)
    print("values  form          ms a step      off     ESS    MiB a step   planned")
    for num_values in options.values:
        level = rng.integers(num_values, size=options.elements)
        x = jnp.asarray(rng.normal(1 + 4.0 * level / num_values, 0.5), jnp.float32)
        args, exact = (x, num_values), None
        for name, plan in forms(args, options.steps).items():
            svi = plan.svi(model)
            forget_compiled()
            clock = Clock()
            with clock:
                posterior = fit(svi, random.key(0), options.steps, *args, recover=False, progress_bar=False)
            evidence = posterior.log_evidence
            exact = evidence if exact is None else exact
            ess = np.min(posterior.ess) / posterior.diagnostics.num_draws
            state = jax.tree.map(lambda leaf: leaf[0], posterior.state.svi)
            step = jax.jit(lambda state, svi=svi, args=args: svi.update(state, *args)).lower(state).compile()
            print(
                f"{num_values:6}  {name:10} {1000 * clock.seconds / options.steps:10.1f} {evidence - exact:10.2f} "
                f"{ess:7.1%} {temp_size(step) / 2**20:12.2f} {planned_memory(plan, args) / 2**20:10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--elements", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--starts", action="store_true", help="only fits of several numbers of starts")
    main(parser.parse_args())
