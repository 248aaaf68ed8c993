"""Cost of one SVI step beside NumPyro's own objectives, on a sigmoid belief network.

    python benchmarks/step_time.py

64 visible and 32 hidden units, batch 256. The steps are timed interleaved, so that a drift of the machine's speed
cancels in the ratios: each round times one step of every objective, and a ratio is the median over rounds of
step / step of RenyiELBO. Memory is XLA's temporary memory of the compiled step.
"""

import argparse
import time

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO

from numpyro_vimco import REINFORCE, VIMCO, ReweightedWakeSleep, VIMCOStar

VISIBLE, HIDDEN, BATCH = 64, 32, 256


def model(x):
    prior = numpyro.param("prior", jnp.zeros(HIDDEN))
    weights = numpyro.param("weights", 0.1 * random.normal(random.key(0), (HIDDEN, VISIBLE)))
    bias = numpyro.param("bias", jnp.zeros(VISIBLE))
    with numpyro.plate("batch", BATCH):
        h = numpyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=h @ weights + bias).to_event(1), obs=x)


def guide(x):
    weights = numpyro.param("q_weights", 0.1 * random.normal(random.key(1), (VISIBLE, HIDDEN)))
    bias = numpyro.param("q_bias", jnp.zeros(HIDDEN))
    with numpyro.plate("batch", BATCH):
        numpyro.sample("h", dist.Bernoulli(logits=x @ weights + bias).to_event(1))


def compiled_step(objective, x):
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), objective)
    state = svi.init(random.key(0), x)
    return jax.jit(svi.update).lower(state, x).compile(), state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-particles", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    x = random.bernoulli(random.key(2), 0.4, (BATCH, VISIBLE)).astype(jnp.float32)

    print(f"JAX {jax.__version__}, NumPyro {numpyro.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'N':>5} {'objective':>20} {'ms / step':>10} {'time ratio':>11} {'MB temp':>8} {'memory ratio':>13}")
    for num_particles in args.num_particles:
        objectives = {
            "RenyiELBO": RenyiELBO(0, num_particles),
            "RenyiELBO (again)": RenyiELBO(0, num_particles),
            "VIMCOStar": VIMCOStar(num_particles=num_particles),
            "VIMCO": VIMCO(num_particles=num_particles),
            "REINFORCE": REINFORCE(num_particles=num_particles),
            "ReweightedWakeSleep": ReweightedWakeSleep(num_particles),
            "TraceGraph_ELBO": TraceGraph_ELBO(num_particles),
        }
        steps = {name: compiled_step(objective, x) for name, objective in objectives.items()}
        times = {name: [] for name in steps}
        for _ in range(args.rounds + 2):
            for name, (step, state) in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(state, x))
                times[name].append(time.perf_counter() - start)
        times = {name: np.array(seconds[2:]) for name, seconds in times.items()}
        memory = {name: step.memory_analysis().temp_size_in_bytes for name, (step, _) in steps.items()}
        for name in steps:
            print(
                f"{num_particles:5d} {name:>20} {1e3 * np.median(times[name]):10.2f} "
                f"{np.median(times[name] / times['RenyiELBO']):11.3f} {memory[name] / 1e6:8.1f} "
                f"{memory[name] / memory['RenyiELBO']:13.3f}"
            )


if __name__ == "__main__":
    main()
