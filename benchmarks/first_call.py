"""The time to a first answer, compilation counted: seconds and compiled programs by phase.

    python benchmarks/first_call.py [--older CHECKOUT] [--rounds 1]

Diabetes, coal mining, karate club and occupancy (`benchmarks/posteriors`), each in a process of its own, on one core
and on two:

- this version: `fit` with 2,000 steps, the verdict, and `to_arviz` with its defaults; without compiled programs, and
  again with JAX's persistent cache that the same call has filled;
- the same with steps that XLA compiles in its newer way, as those of long fits are;
- an older version (33d48bf), if the path of a checkout is given: the same calls;
- `DiscreteHMCGibbs` over NUTS, two chains by `vmap`, 1,000 + 1,000 steps, and `az.from_numpyro`;
- `svi.run` with `TraceGraph_ELBO` of 64 particles and the same guide, 2,000 steps.

Rounds are interleaved. Imports, and the data, are not part of the sum. Processor seconds are those of all threads.
"""

import argparse
from collections import defaultdict
from functools import partial
import os
from pathlib import Path
import re
import statistics
import subprocess
import sys
import tempfile
import time

PROBLEMS = ("diabetes", "coal_mining", "karate_club", "occupancy")
STEPS, PARTICLES = 2000, 64
NEWER_LOOPS = "this version, newer loops"
METHODS = ("this version", "this version, cached", NEWER_LOOPS, "older", "DiscreteHMCGibbs", "TraceGraph_ELBO")


class Phases:
    """Prints, as each phase ends, its wall seconds, processor seconds and number of compiled programs."""

    def __init__(self):
        import jax

        self._programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)
        self._last = 0.0, 0.0, 0

    def _count(self, event, seconds, **_):
        self._programs += event == "/jax/core/compile/backend_compile_duration"

    def end(self, name):
        """A phase has ended."""
        now = time.time() - START, time.process_time(), self._programs
        wall, processor, programs = (x - y for x, y in zip(now, self._last))
        print(f"PHASE|{name}|{wall}|{processor}|{programs}", flush=True)
        self._last = now


def run(method, name):
    """One method in this process."""
    import jax
    from numpyro.infer import MCMC, NUTS, SVI, DiscreteHMCGibbs, TraceGraph_ELBO
    import optax

    from benchmarks.posteriors import problem, recommended

    phases = Phases()
    about = problem(name)
    jax.block_until_ready(about.args)
    if method == "DiscreteHMCGibbs":
        import arviz as az

        phases.end("import")
        kernel = DiscreteHMCGibbs(NUTS(about.model), modified=True)
        mcmc = MCMC(kernel, num_warmup=1000, num_samples=1000, num_chains=2, chain_method=jax.vmap, progress_bar=False)
        mcmc.run(jax.random.key(0), *about.args)
        phases.end("steps")
        az.from_numpyro(mcmc)
        phases.end("ArviZ")
        return
    import numpyro_vimco
    from numpyro_vimco import AutoMixed, VIMCOStar, fit

    assert Path(numpyro_vimco.__file__).is_relative_to(sys.path[0])
    graph = method == "TraceGraph_ELBO"
    objective = TraceGraph_ELBO(PARTICLES) if graph else VIMCOStar(0.5, PARTICLES)
    svi = SVI(about.model, AutoMixed(about.model), optax.adam(recommended(STEPS)), objective)
    if graph:
        phases.end("import")
        svi.run(jax.random.key(0), STEPS, *about.args, progress_bar=False)
        phases.end("steps")
    elif method == "older":
        phases.end("import")
        result = fit(svi, jax.random.key(0), STEPS, *about.args, progress_bar=False)
        phases.end("fit")
        after = {"model_args": about.args, "progress_bar": False}
        numpyro_vimco.importance_diagnostics(svi, result, rng_key=jax.random.key(1), **after)
        phases.end("verdict")
        numpyro_vimco.to_arviz(svi, result, rng_key=jax.random.key(2), **after)
        phases.end("ArviZ")
    else:
        from numpyro_vimco.fitting import run as fitting
        from numpyro_vimco.fitting.steps import Steps

        if method == NEWER_LOOPS:
            fitting.QUICK = 0
        phases.end("import")
        take = Steps.run

        def noted(steps, state, num_steps, progress_bar):
            phases.end("set-up" if num_steps == STEPS else "after the steps")
            take(steps, state, 1, False)
            phases.end("compiling steps")
            taken = take(steps, state, num_steps, progress_bar)
            phases.end("steps")
            return taken

        Steps.run = noted
        posterior = fit(svi, jax.random.key(0), STEPS, *about.args, progress_bar=False)
        phases.end("after the steps")
        print(posterior.verdict)
        phases.end("verdict")
        posterior.to_arviz(progress_bar=False)
        phases.end("ArviZ")


def child(method, name, cores, checkout, cache):
    """Phases of a method in a process of its own: by name wall seconds, processor seconds, programs."""
    command = [sys.executable, __file__, "--child", method, name, str(checkout)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache:
        env |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    limit = partial(os.sched_setaffinity, 0, range(cores))
    output = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=limit).stdout
    found = defaultdict(lambda: [0.0, 0.0, 0.0])
    for phase, *numbers in re.findall(r"PHASE\|(.*)\|(.*)\|(.*)\|(.*)", output):
        for i, number in enumerate(numbers):
            found[phase][i] += float(number)
    found["all but import"] = [sum(x) for x in zip(*(x for phase, x in found.items() if phase != "import"))]
    return found


def compare(name, cores, older, rounds):
    """All methods on one problem, in turn; wall and processor seconds of each, by its name."""
    here = Path(__file__).parents[1]
    print(f"\n{name}, {cores} core{'s' * (cores > 1)}\n{'':24}{'phase':20}{'wall':>7}{'processor':>11}{'programs':>10}")
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(rounds):
            for method in METHODS:
                if method == "older" and not older:
                    continue
                of_this = cache if method == "this version, cached" else None
                if of_this and not found[method]:
                    child("this version", name, cores, here, of_this)
                checkout = older if method == "older" else here
                found[method].append(child(method, name, cores, checkout, of_this))
    for method, runs in found.items():
        for phase in runs[0]:
            wall, processor, programs = (statistics.median(x) for x in zip(*(run[phase] for run in runs)))
            print(f"{method:24}{phase:20}{wall:7.1f}{processor:11.1f}{programs:10.0f}", flush=True)
    if older:
        wall, processor = (
            {m: statistics.median(run["all but import"][i] for run in runs) for m, runs in found.items()}
            for i in (0, 1)
        )
        ratios = [x[m] / x["older"] for m in METHODS[:2] for x in (processor, wall)]
        print("this version over the older one: processor {:.2f}, wall {:.2f}; cached {:.2f}, {:.2f}".format(*ratios))


def main():
    if sys.argv[1:2] == ["--child"]:
        method, name, checkout = sys.argv[2:]
        sys.path.insert(0, checkout)
        run(method, name)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--older", type=Path, help="checkout of an older version")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS)
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    for cores in args.cores:
        for name in args.problems:
            compare(name, cores, args.older, args.rounds)


START = time.time()
if __name__ == "__main__":
    main()
