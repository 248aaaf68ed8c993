"""Cost of one SVI step: beside NumPyro's own objectives, and of doubly reparameterised gradients and local particles.

    python benchmarks/step_time.py

The steps are timed interleaved, so that a drift of the machine's speed cancels in the ratios: each round times one
step of every objective, and a ratio is the median over rounds of its time over that of the first row's step. Memory
is XLA's temporary memory of the compiled step.

1. A sigmoid belief network, 64 visible and 32 hidden units, batch 256: discrete latents in a common plate.
2. Spike-and-slab regression, 1,000 observations of 50 predictors: discrete and continuous global latents.
3. A mixture of 1,000 points with 5 clusters: N × M local particles against as many joint ones.
"""

import argparse
import os
import time
import warnings

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO

from numpyro_vimco import REINFORCE, VIMCO, ReweightedWakeSleep, VIMCOStar

VISIBLE, HIDDEN, BATCH = 64, 32, 256


def belief_network(x):
    prior = numpyro.param("prior", jnp.zeros(HIDDEN))
    weights = numpyro.param("weights", 0.1 * random.normal(random.key(0), (HIDDEN, VISIBLE)))
    bias = numpyro.param("bias", jnp.zeros(VISIBLE))
    with numpyro.plate("batch", BATCH):
        h = numpyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=h @ weights + bias).to_event(1), obs=x)


def recognition_network(x):
    weights = numpyro.param("q_weights", 0.1 * random.normal(random.key(1), (VISIBLE, HIDDEN)))
    bias = numpyro.param("q_bias", jnp.zeros(HIDDEN))
    with numpyro.plate("batch", BATCH):
        numpyro.sample("h", dist.Bernoulli(logits=x @ weights + bias).to_event(1))


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


def mixture(x):
    with numpyro.plate("cluster", 5):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
    with numpyro.plate("data", len(x)):
        cluster = numpyro.sample("cluster_of", dist.Categorical(logits=jnp.zeros(5)))
        numpyro.sample("x", dist.Normal(mean[cluster], 1.0), obs=x)


def mixture_guide(x):
    with numpyro.plate("cluster", 5):
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", jnp.linspace(-4.0, 4.0, 5)), 0.1))
    logits = x[:, None] * numpyro.param("slope", jnp.linspace(-1.0, 1.0, 5))
    with numpyro.plate("data", len(x)):
        numpyro.sample("cluster_of", dist.Categorical(logits=logits))


def compare(title, model, guide, data, objectives, rounds):
    """Print a table of the objectives' steps, relative to the first."""
    print(f"\n{title}\n{'':>32} {'ms / step':>10} {'time ratio':>11} {'MB temp':>8} {'memory ratio':>13}")
    steps = {}
    for name, objective in objectives.items():
        svi = SVI(model, guide, numpyro.optim.Adam(1e-3), objective)
        with warnings.catch_warnings():  # NumPyro's: its own objectives do not support discrete latents
            warnings.simplefilter("ignore")
            state = svi.init(random.key(0), *data)
        steps[name] = jax.jit(svi.update).lower(state, *data).compile(), state
    times = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, (step, state) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(state, *data))
            times[name].append(time.perf_counter() - start)
    times = {name: np.array(seconds[2:]) for name, seconds in times.items()}
    memory = {name: step.memory_analysis().temp_size_in_bytes for name, (step, _) in steps.items()}
    first = next(iter(steps))
    for name in steps:
        print(
            f"{name:>32} {1e3 * np.median(times[name]):10.2f} {np.median(times[name] / times[first]):11.3f} "
            f"{memory[name] / 1e6:8.1f} {memory[name] / memory[first]:13.3f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    print(
        f"JAX {jax.__version__}, NumPyro {numpyro.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )

    x = random.bernoulli(random.key(2), 0.4, (BATCH, VISIBLE)).astype(jnp.float32)
    for n in (32, 256):
        objectives = {
            "RenyiELBO": RenyiELBO(0, n),
            "RenyiELBO (again)": RenyiELBO(0, n),
            "VIMCOStar": VIMCOStar(num_particles=n),
            "VIMCO": VIMCO(num_particles=n),
            "REINFORCE": REINFORCE(num_particles=n),
            "ReweightedWakeSleep": ReweightedWakeSleep(n),
            "TraceGraph_ELBO": TraceGraph_ELBO(n),
        }
        title = f"Sigmoid belief network, N = {n}"
        compare(title, belief_network, recognition_network, (x,), objectives, rounds)

    x = random.normal(random.key(3), (1000, 50))
    y = x[:, 0] + random.normal(random.key(4), (1000,))
    objectives = {
        "VIMCOStar, plain pathwise": VIMCOStar(num_particles=64, doubly_reparameterized=False),
        "VIMCOStar": VIMCOStar(num_particles=64),
        "RenyiELBO": RenyiELBO(0, 64),
    }
    compare("Spike-and-slab regression, N = 64", regression, regression_guide, (x, y), objectives, rounds)

    x = 3 * random.normal(random.key(5), (1000,))
    objectives = {
        "64 joint": VIMCOStar(num_particles=64),
        "8 × 8 local": VIMCOStar(num_particles=8, plate_particles={"data": 8}),
        "8 joint": VIMCOStar(num_particles=8),
    }
    compare("Mixture of 1,000 points", mixture, mixture_guide, (x,), objectives, rounds)


if __name__ == "__main__":
    main()
