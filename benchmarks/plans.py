"""What the rules of `fit(model, ...)` stand on: sums against particles, and the memory of a step.

    taskset -c 0 python benchmarks/plans.py [--values 2 8 32 128] [--elements 5 10 20 100] [--steps 1000]
    taskset -c 0 python benchmarks/plans.py --starts | --tempering | --proposals

Each datum is a Normal about one of S levels, of an unknown location and scale. The forms are those of the plans: the
levels summed out, with particles of their own, or drawn with all else. ``off`` is the log evidence less that of the
sums. Memory is what XLA asks for in one step of one start, beside what a plan takes it to be.

With ``--starts``, in place of these: fits of the karate club that may have either name, by 4 and 8 starts, with eight
keys. With ``--tempering``: planned fits of a hundred counts (`benchmarks/chains.py`) and of cranes, whose likelihood
counts with a power from several values on. With ``--proposals``: chains that refine the fit of a stochastic volatility,
by several numbers of proposals of a global step.
"""

import argparse
from itertools import product
from pathlib import Path
import sys
from unittest import mock

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.chains import PROBLEMS
from benchmarks.common import temp_size
from benchmarks.posteriors import problem
from benchmarks.posteriors.measuring import Clock, forget_compiled
from numpyro_vimco import fit
from numpyro_vimco.fitting import run
from numpyro_vimco.fitting.tempering import first_inverse_temperature
from numpyro_vimco.planning import rules
from numpyro_vimco.planning.structure import Structure


def model(x, num_values):
    loc = numpyro.sample("loc", dist.Normal(0.0, 3.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("datum", len(x)):
        level = numpyro.sample("level", dist.Categorical(logits=jnp.zeros(num_values)))
        numpyro.sample("x", dist.Normal(loc + 4.0 * level / num_values, scale), obs=x)


def forms(args, num_steps):
    """The plans of the model, by what they do, whatever the number of values and elements."""
    with mock.patch.multiple(rules, MOST_VALUES=10**6, LEAST_ELEMENTS=1):
        found = rules.plans(model, args, {}, num_steps, 4, {}, memory=1e15)
    return dict(zip(("summed out", "particles", "joint"), found))


def tempering():
    """Where the tempering of chains begins: where that of other models would, and at larger powers."""
    population, cranes = PROBLEMS["population"], problem("cranes")
    series = {"population": (population.model, population.simulate(steps=100)), "cranes": (cranes.model, *cranes.args)}
    print("series        from  verdict    ESS  seconds")
    for name, (model, *args) in series.items():
        for first in (float(first_inverse_temperature(model, args, {}, ())), 0.03, 0.3):
            forget_compiled()
            clock = Clock()
            with clock, mock.patch.object(run, "OF_CHAINS", first):
                posterior = fit(model, random.key(0), 2000, *args, progress_bar=False)
                verdict = posterior.verdict
            ess = posterior.ess / posterior.diagnostics.num_draws
            print(f"{name:12} {first:5.2g}  {verdict:>7}  {ess:5.1%}  {clock.total:7.0f}", flush=True)


def proposals():
    """How many proposals a global step has where a chain has samples of its own."""
    about = problem("stochastic_volatility")
    posterior = fit(about.model, random.key(0), 2000, *about.args, progress_bar=False)
    print("proposals  verdict  moved  ESS (bulk, tail)  seconds")
    for number in (4, 12, 40):
        forget_compiled()
        clock = Clock()
        with clock:
            mcmc = posterior.refine(random.key(1), num_proposals=number, progress_bar=False)
        found = posterior.diagnose_chains(mcmc)
        bulk, tail = (min(x.min() for x in ess.values()) for ess in (found.ess_bulk, found.ess_tail))
        said = f"{found.verdict:>7}  {found.moved:5.1%}  {bulk:7.0f} {tail:8.0f}"
        print(f"{number:9}  {said}  {clock.total:7.0f}", flush=True)


def starts():
    """How often a verdict is "good" where the log evidence is wrong."""
    about = problem("karate_club_either")
    print("starts  key  log evidence, less the truth  verdict  seconds")
    for number in (4, 8):
        for seed in range(8):
            key = random.split(random.key(seed))[0]
            forget_compiled()
            clock = Clock()
            with clock:
                posterior = fit(about.model, key, 2000, *about.args, num_starts=number, progress_bar=False)
                verdict = posterior.verdict
            off = posterior.log_evidence - about.truth.log_evidence
            print(f"{number:6} {seed:4} {off:29.2f}  {verdict:7} {clock.total:8.0f}", flush=True)


def main(options):
    if chosen := [part for part in (starts, tempering, proposals) if getattr(options, part.__name__)]:
        for part in chosen:
            part()
        return
    rng = np.random.default_rng(0)
    print("elements  values  form          ms a step      off     ESS    MiB a step   planned")
    for elements, num_values in product(options.elements, options.values):
        level = rng.integers(num_values, size=elements)
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
            planned = plan.num_particles * rules.memory_of_particle(plan, Structure.of(model, args, {}))
            print(
                f"{elements:8}  {num_values:6}  {name:10} {1000 * clock.seconds / options.steps:10.1f} "
                f"{evidence - exact:10.2f} {ess:7.1%} {temp_size(step) / 2**20:12.2f} {planned / 2**20:10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--elements", type=int, nargs="+", default=[100])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--starts", action="store_true", help="only fits of several numbers of starts")
    parser.add_argument("--tempering", action="store_true", help="only fits of chains, by several powers")
    parser.add_argument("--proposals", action="store_true", help="only chains with several numbers of proposals")
    main(parser.parse_args())
