"""Cost of one SVI step: beside a step without NumPyro, NumPyro's own objectives, and of what can be switched on.

    python benchmarks/step_time.py

The steps are timed interleaved, so that a drift of the machine's speed cancels in the ratios: each round times one
step of every objective, and a ratio is the median over rounds of its time over that of the first row's step. Memory
is XLA's temporary memory of the compiled step.

1. A sigmoid belief network, 64 visible and 32 hidden units, 128 digits: discrete latents in a common plate. The first
   row is VIMCO-⋆ written by hand in JAX alone.
2. Spike-and-slab regression, 1,000 observations of 50 predictors: discrete and continuous global latents.
3. A mixture of 1,000 points with 5 clusters: N × M local particles against as many joint ones.
4. Time to trace and compile a step, without caches.
"""

import argparse
from functools import partial
import time

from common import (
    HIDDEN,
    belief_network,
    compile_step,
    digits,
    interleaved,
    median_ratio,
    print_machine,
    recognition_network,
    svi_of,
    temp_size,
)
import jax
from jax import random
from jax.lax import stop_gradient
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import RenyiELBO, TraceGraph_ELBO
import optax

from numpyro_vimco import REINFORCE, VIMCO, ReweightedWakeSleep, VIMCOStar


def by_hand(num_particles, x):
    """A compiled step of VIMCO-⋆ at α = 0 for the belief network, and its arguments: the floor."""
    adam = optax.adam(1e-3)

    def log_prob(logits, value):
        softplus = jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))  # faster than `jax.nn.softplus`
        return jnp.sum(value * logits - softplus, axis=-1)

    def loss(params, key):
        q_logits = x @ params["q_weights"] + params["q_bias"]
        shape = (num_particles, len(x), HIDDEN)
        h = random.bernoulli(key, jax.nn.sigmoid(q_logits), shape).astype(jnp.float32)
        log_p = log_prob(params["prior"], h) + log_prob(h @ params["weights"] + params["bias"], x)
        log_q = log_prob(q_logits, h)
        log_weights = stop_gradient(log_p - log_q)
        share = jax.nn.softmax(log_weights, axis=0)
        signal = -jnp.log1p(-jnp.minimum(share, 1 - 1e-6)) - share  # simpler than the library's, and biased
        surrogate = jnp.sum(share * log_p + signal * log_q)
        bound = jnp.sum(jax.nn.logsumexp(log_weights, axis=0) - np.log(num_particles))
        return -(bound + surrogate - stop_gradient(surrogate))

    def step(state, x):
        params, adam_state, key = state
        key, draw = random.split(key)
        value, gradient = jax.value_and_grad(loss)(params, draw)
        updates, adam_state = adam.update(gradient, adam_state)
        return (optax.apply_updates(params, updates), adam_state, key), value

    svi, state = svi_of(VIMCOStar(), data=(x,))
    params = svi.get_params(state)
    args = (params, adam.init(params), random.key(0)), x
    return jax.jit(step).lower(*args).compile(), args


def regression(x, y):
    with numpyro.plate("predictor", x.shape[1]):
        included = numpyro.sample("included", dist.Bernoulli(0.3))
        coefficient = numpyro.sample("coefficient", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ (included * coefficient), 1.0), obs=y)


def regression_guide(x, y):
    size = x.shape[1]
    with numpyro.plate("predictor", size):
        included = numpyro.sample("included", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(size))))
        loc = numpyro.param("loc", jnp.zeros(size)) * included
        numpyro.sample("coefficient", dist.Normal(loc, jnp.exp(numpyro.param("log_width", jnp.zeros(size)))))


def mixture(x, is_indexed=True):
    with numpyro.plate("cluster", 5):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
    with numpyro.plate("data", len(x)):
        cluster = numpyro.sample("cluster_of", dist.Categorical(logits=jnp.zeros(5)))
        loc = mean[cluster] if is_indexed else jax.nn.one_hot(cluster, 5) @ mean
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def mixture_guide(x):
    with numpyro.plate("cluster", 5):
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", jnp.linspace(-4.0, 4.0, 5)), 0.1))
    logits = x[:, None] * numpyro.param("slope", jnp.linspace(-1.0, 1.0, 5))
    with numpyro.plate("data", len(x)):
        numpyro.sample("cluster_of", dist.Categorical(logits=logits))


def compare(title, steps, rounds):
    """Print a table of steps, relative to the first."""
    print(f"\n{title}\n{'':>32} {'ms / step':>10} {'time ratio':>11} {'MB temp':>8} {'memory ratio':>13}")
    times = interleaved(steps, rounds)
    first = next(iter(steps))
    base = temp_size(steps[first][0])
    for name, (step, _) in steps.items():
        print(
            f"{name:>32} {1e3 * np.median(times[name]):10.2f} {median_ratio(times[name], times[first]):11.3f} "
            f"{temp_size(step) / 1e6:8.1f} {temp_size(step) / base:13.3f}",
            flush=True,
        )


def compare_compilation(problems, rounds):
    """Print how long a step takes to trace and compile, relative to RenyiELBO."""
    objectives = {
        "RenyiELBO": RenyiELBO(0, 64),
        "VIMCOStar": VIMCOStar(num_particles=64),
        "VIMCOStar, chunk_size = 16": VIMCOStar(num_particles=64, chunk_size=16),
    }
    print(f"\nCompilation, N = 64\n{'':>58} {'s':>6} {'time ratio':>11}")
    for title, (model, guide, data) in problems.items():
        times = {name: [] for name in objectives}
        for _ in range(rounds):
            for name, objective in objectives.items():
                svi, state = svi_of(objective, model, guide, data)
                jax.clear_caches()
                start = time.perf_counter()
                jax.jit(svi.update).lower(state, *data).compile()
                times[name].append(time.perf_counter() - start)
        times = {name: np.array(seconds) for name, seconds in times.items()}
        for name, seconds in times.items():
            ratio = median_ratio(seconds, times["RenyiELBO"])
            print(f"{title:>31}{name:>27} {np.median(seconds):6.2f} {ratio:11.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    print_machine()

    x = digits()[:128]
    belief = belief_network, recognition_network, (x,)
    for n in (16, 64, 256, 1024):
        objectives = {
            "VIMCOStar": VIMCOStar(num_particles=n),
            "VIMCO": VIMCO(num_particles=n),
            "REINFORCE": REINFORCE(num_particles=n),
            "ReweightedWakeSleep": ReweightedWakeSleep(n),
            "RenyiELBO": RenyiELBO(0, n),
            "TraceGraph_ELBO": TraceGraph_ELBO(n),
        }
        steps = {"VIMCO-⋆ by hand in JAX": by_hand(n, x), "by hand (again)": by_hand(n, x)}
        steps |= {name: compile_step(objective, *belief) for name, objective in objectives.items()}
        compare(f"Sigmoid belief network, N = {n}", steps, rounds * 64 // max(n, 64) + 10)

    x = random.normal(random.key(3), (1000, 50))
    y = x[:, 0] + random.normal(random.key(4), (1000,))
    slab = regression, regression_guide, (x, y)
    steps = {
        "VIMCOStar, plain pathwise": compile_step(VIMCOStar(num_particles=64, doubly_reparameterized=False), *slab),
        "VIMCOStar": compile_step(VIMCOStar(num_particles=64), *slab),
        "RenyiELBO": compile_step(RenyiELBO(0, 64), *slab),
    }
    compare("Spike-and-slab regression, N = 64", steps, rounds)

    points = mixture, mixture_guide, (3 * random.normal(random.key(5), (1000,)),)
    one_hot = partial(mixture, is_indexed=False), *points[1:]
    joint, local = VIMCOStar(num_particles=64), VIMCOStar(num_particles=8, plate_particles={"data": 8})
    steps = {
        "64 joint": compile_step(joint, *points),
        "8 × 8 local": compile_step(local, *points),
        "8 joint": compile_step(VIMCOStar(num_particles=8), *points),
        "64 joint, one-hot": compile_step(joint, *one_hot),
        "8 × 8 local, one-hot": compile_step(local, *one_hot),
    }
    compare("Mixture of 1,000 points", steps, rounds)

    problems = {"belief network": belief, "spike-and-slab regression": slab, "mixture": points}
    compare_compilation(problems, rounds=5)


if __name__ == "__main__":
    main()
