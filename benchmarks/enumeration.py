"""Cost of sums inside of the bound: beside TraceEnum_ELBO, and beside the same sums written by hand.

    python benchmarks/enumeration.py

Steps with 64 particles, timed interleaved; a ratio is the median over rounds of a step's time over that of
TraceEnum_ELBO in the same round. Then the time to trace and compile a step, without caches.

1. A mixture of 1,000 points with 5 clusters: assignments are summed out, means sampled.
2. A hidden Markov model of 100 steps and 8 states: states are summed out, levels sampled. In a loop over `markov`,
   which is all that TraceEnum_ELBO knows, and in `scan`.
"""

import argparse
from functools import partial
import time

from common import compile_step, interleaved, median_ratio, print_machine, svi_of
import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import markov
import numpyro.distributions as dist
from numpyro.infer import TraceEnum_ELBO

from numpyro_vimco import VIMCOStar

MARK, N, STATES = "parallel", 64, 8


def mixture(x, by_hand=False):
    with numpyro.plate("cluster", 5):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
    with numpyro.plate("data", len(x)):
        if by_hand:
            densities = dist.Normal(mean, 1.0).log_prob(x[:, None])
            numpyro.factor("x", logsumexp(densities + jax.nn.log_softmax(jnp.zeros(5)), axis=-1))
        else:
            of = numpyro.sample("cluster_of", dist.Categorical(logits=jnp.zeros(5)), infer={"enumerate": MARK})
            numpyro.sample("x", dist.Normal(mean[of], 1.0), obs=x)


def mixture_guide(x):
    with numpyro.plate("cluster", 5):
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", jnp.linspace(-4.0, 4.0, 5)), 0.1))


def levels():
    with numpyro.plate("state", STATES):
        level = numpyro.sample("level", dist.Normal(0, 5))
    return level, 0.1 / STATES + 0.9 * jnp.eye(STATES)


def chain_guide(x):
    with numpyro.plate("state", STATES):
        numpyro.sample("level", dist.Normal(numpyro.param("loc", jnp.linspace(-4.0, 4.0, STATES)), 0.1))


def chain_in_loop(x):
    level, transition = levels()
    state = 0
    for t in markov(range(len(x))):
        state = numpyro.sample(f"state_{t}", dist.Categorical(transition[state]), infer={"enumerate": MARK})
        numpyro.sample(f"x_{t}", dist.Normal(level[state], 1.0), obs=x[t])


def chain_in_scan(x):
    level, transition = levels()

    def move(state, x):
        state = numpyro.sample("state", dist.Categorical(transition[state]), infer={"enumerate": MARK})
        numpyro.sample("x", dist.Normal(level[state], 1.0), obs=x)
        return state, None

    scan(move, 0, x)


def chain_by_hand(x):
    level, transition = levels()
    emissions = dist.Normal(level, 1.0).log_prob(x[:, None])
    first = jnp.log(transition[0]) + emissions[0]

    def move(alpha, emission):
        return logsumexp(alpha[:, None] + jnp.log(transition), 0) + emission, None

    numpyro.factor("x", logsumexp(jax.lax.scan(move, first, emissions[1:])[0]))


def compile_time(objective, model, guide, data):
    svi, state = svi_of(objective, model, guide, data)
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(svi.update).lower(state, *data).compile()
    return time.perf_counter() - start


def compare(title, programs, data, rounds, compilations):
    """Print time per step and time to compile, relative to the first."""
    print(f"\n{title}\n{'':>44} {'ms / step':>10} {'ratio':>7} {'s to compile':>13} {'ratio':>7}")
    programs = {name: (*program, data) for name, program in programs.items()}
    times = interleaved({name: compile_step(*program) for name, program in programs.items()}, rounds)
    compiled = {name: [] for name in programs}
    for _ in range(compilations):
        for name, program in programs.items():
            compiled[name].append(compile_time(*program))
    first = next(iter(programs))
    for name in programs:
        step, compilation = times[name], np.array(compiled[name])
        print(
            f"{name:>44} {1e3 * np.median(step):10.2f} {median_ratio(step, times[first]):7.3f} "
            f"{np.median(compilation):13.2f} {median_ratio(compilation, np.array(compiled[first])):7.3f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--compilations", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of the hidden Markov model")
    parser.add_argument("--points", type=int, default=1000, help="of the mixture")
    args = parser.parse_args()
    print_machine()
    plain, ours = VIMCOStar(num_particles=N, doubly_reparameterized=False), VIMCOStar(num_particles=N)

    programs = {
        "TraceEnum_ELBO": (TraceEnum_ELBO(N), mixture, mixture_guide),
        "VIMCOStar, plain pathwise": (plain, mixture, mixture_guide),
        "the same, sum by hand": (plain, partial(mixture, by_hand=True), mixture_guide),
        "VIMCOStar": (ours, mixture, mixture_guide),
        "VIMCOStar, sum by hand": (ours, partial(mixture, by_hand=True), mixture_guide),
    }
    data = (3 * random.normal(random.key(0), (args.points,)),)
    compare(f"Mixture of {args.points:,} points, N = {N}", programs, data, args.rounds, args.compilations)

    programs = {
        "TraceEnum_ELBO, loop": (TraceEnum_ELBO(N), chain_in_loop, chain_guide),
        "VIMCOStar, plain pathwise, loop": (plain, chain_in_loop, chain_guide),
        "VIMCOStar, plain pathwise, scan": (plain, chain_in_scan, chain_guide),
        "VIMCOStar, scan": (ours, chain_in_scan, chain_guide),
        "VIMCOStar, scan, sum by hand": (ours, chain_by_hand, chain_guide),
    }
    data = (jnp.round(2 * random.normal(random.key(0), (args.steps,))),)
    title = f"Hidden Markov model of {args.steps} steps and {STATES} states, N = {N}"
    compare(title, programs, data, args.rounds, args.compilations)


if __name__ == "__main__":
    main()
