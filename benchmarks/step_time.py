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
5. A population counted each year, 8 particles with K samples of each of T years, of which all paths count. The first
   row is the recursion and VIMCO-⋆ written by hand. (``--chains`` has these alone.)
"""

import argparse
from functools import partial
import time

from chain_estimators import DETECTION, GROWTH, INITIAL, series
from chains import population_data
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
from jax.nn import logsumexp
import jax.numpy as jnp
from jax.scipy.special import gammaln
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


def population(seen):
    series(seen, numpyro.param("growth", GROWTH))


def population_guide(seen):
    numpyro.sample("count", dist.Poisson(jnp.exp(numpyro.param("log_rate", jnp.full(len(seen), np.log(INITIAL))))))


def chain_by_hand(num_particles, num_samples, seen, has_keys=False):
    """A compiled step of VIMCO-⋆ at α = 0 over all paths of the population, and its arguments: the floor.

    :param has_keys: whether each sample of all years is drawn from a key of its own, as programs of NumPyro are.
    """
    adam = optax.adam(1e-3)
    poisson = lambda rate, x: x * jnp.log(rate) - rate - gammaln(x + 1)  # noqa: E731

    def log_mean_path(log_v):
        def year(log_alpha, table):
            return logsumexp(table + log_alpha, axis=1) - np.log(num_samples), None

        log_alpha, _ = jax.lax.scan(year, jnp.zeros(num_samples), log_v)
        return logsumexp(log_alpha) - np.log(num_samples)

    def loss(params, key):
        rate = jnp.exp(params["log_rate"])[:, None]
        if has_keys:
            draw = jax.vmap(jax.vmap(lambda key: random.poisson(key, rate[:, 0])))
            count = jnp.moveaxis(draw(random.split(key, (num_particles, num_samples))), 1, 2).astype(float)
        else:
            count = random.poisson(key, rate, (num_particles, len(seen), num_samples)).astype(float)
        log_q = poisson(rate, count)
        unseen = count - seen[:, None]
        log_seen = gammaln(count + 1) - gammaln(seen + 1)[:, None] - gammaln(unseen + 1)
        log_seen += seen[:, None] * np.log(DETECTION) + unseen * np.log(1 - DETECTION)
        log_seen = jnp.where(unseen >= 0, log_seen, -jnp.inf)
        expected = jnp.roll(params["growth"] * count + 1.0, 1, axis=1).at[:, 0].set(INITIAL)
        table = poisson(expected[:, :, None, :], count[..., None]) + log_seen[..., None]
        log_z, pull = jax.vjp(jax.vmap(log_mean_path), stop_gradient(table - log_q[..., None]))
        (share,) = pull(jax.nn.softmax(log_z))
        through = share.sum(-1)
        signal = -jnp.log1p(-jnp.minimum(through, 1 - 1e-6)) - through  # simpler than the library's, and biased
        surrogate = jnp.sum(share * jnp.where(jnp.isneginf(table), 0, table)) + jnp.sum(signal * log_q)
        bound = logsumexp(log_z) - np.log(num_particles)
        return -(bound + surrogate - stop_gradient(surrogate))

    def step(state):
        params, adam_state, key = state
        key, draw = random.split(key)
        value, gradient = jax.value_and_grad(loss)(params, draw)
        updates, adam_state = adam.update(gradient, adam_state)
        return (optax.apply_updates(params, updates), adam_state, key), value

    params = {"growth": jnp.array(GROWTH), "log_rate": jnp.full(len(seen), jnp.log(INITIAL))}
    args = ((params, adam.init(params), random.key(0)),)
    return jax.jit(step).lower(*args).compile(), args


def compare_chains(rounds):
    for length, number in ((30, 16), (100, 16), (100, 32), (100, 64)):
        seen = jnp.asarray(population_data(length), jnp.float32)
        objective = VIMCOStar(0.0, 8, chain_particles={"count": number})
        steps = {
            "by hand in JAX": chain_by_hand(8, number, seen),
            "by hand, a key for each sample": chain_by_hand(8, number, seen, has_keys=True),
            "VIMCOStar": compile_step(objective, population, population_guide, (seen,)),
        }
        compare(f"Population, T = {length}, K = {number}", steps, rounds)


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
    parser.add_argument("--chains", action="store_true", help="the last part only")
    args = parser.parse_args()
    rounds = args.rounds
    print_machine()
    if args.chains:
        compare_chains(rounds)
        return

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
    compare_chains(rounds)


if __name__ == "__main__":
    main()
