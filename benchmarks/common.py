"""What the benchmarks share: the digits, a belief network for them, and steps that are timed interleaved."""

import os
import statistics
import time
import warnings

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from sklearn.datasets import load_digits

from numpyro_vimco import fit

VISIBLE, HIDDEN = 64, 32


def elbo(posterior, num_draws):
    """The ELBO of the best start in nats, from draws of its guide without defence."""
    chains = posterior.to_arviz(num_samples=num_draws, resample=False, pool=False, groups=())
    return float(chains["sample_stats"]["log_weight"].mean("draw").max())


# Of the rows that :func:`row` makes.
HEADER = f"{'seed':>4} {'verdict':>8} {'evidence':>16} {'largest':>8} {'ESS':>6} {'processor':>10} {'wall':>6}"


def row(svi, seed, num_steps, data, log_evidence, moments):
    """A fit beside an exact posterior: verdict, errors, ESS and seconds, of which compilation is a part.

    :param log_evidence: the exact one in nats, or None.
    :param moments: by latent, its exact mean and standard deviation.
    """
    begin = time.process_time(), time.perf_counter()
    posterior = fit(svi, random.key(seed), num_steps, *data, progress_bar=False)
    verdict = posterior.verdict
    draws = posterior.to_arviz(num_samples=4000, groups=(), progress_bar=False)["posterior"]
    spent = time.process_time() - begin[0], time.perf_counter() - begin[1]
    largest = max(np.max(np.abs(draws[n].mean(("chain", "draw")) - mean) / sd) for n, (mean, sd) in moments.items())
    known = posterior.log_evidence if log_evidence is None else log_evidence
    error = f"{posterior.log_evidence - known:+.3f} ± {posterior.log_evidence_std_error:.3f}"
    ess = f"{posterior.ess / posterior.diagnostics.num_draws:.1%}"
    return f"{seed:>4} {verdict:>8} {error:>16} {float(largest):>8.2f} {ess:>6} {spent[0]:>9.0f}s {spent[1]:>5.0f}s"


def digits():
    """The 1,797 digits of scikit-learn, binary: (1797, 64)."""
    return jnp.array(load_digits().data > 7, jnp.float32)


def belief_network(x):
    """A sigmoid belief network with one layer of 32 hidden units, for x of shape (batch, 64)."""
    prior = numpyro.param("prior", jnp.zeros(HIDDEN))
    weights = numpyro.param("weights", 0.1 * random.normal(random.key(0), (HIDDEN, VISIBLE)))
    bias = numpyro.param("bias", jnp.zeros(VISIBLE))
    with numpyro.plate("batch", len(x)):
        h = numpyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=h @ weights + bias).to_event(1), obs=x)


def recognition_network(x):
    """Its guide."""
    weights = numpyro.param("q_weights", 0.1 * random.normal(random.key(1), (VISIBLE, HIDDEN)))
    bias = numpyro.param("q_bias", jnp.zeros(HIDDEN))
    with numpyro.plate("batch", len(x)):
        numpyro.sample("h", dist.Bernoulli(logits=x @ weights + bias).to_event(1))


def svi_of(objective, model=belief_network, guide=recognition_network, data=(), learning_rate=1e-3):
    """SVI, and its first state."""
    svi = SVI(model, guide, numpyro.optim.Adam(learning_rate), objective)
    with warnings.catch_warnings():  # NumPyro's: its own objectives do not support discrete latents
        warnings.simplefilter("ignore")
        return svi, svi.init(random.key(0), *data)


def compile_step(objective, model=belief_network, guide=recognition_network, data=()):
    """A compiled `SVI.update`, and its arguments."""
    svi, state = svi_of(objective, model, guide, data)
    return jax.jit(svi.update).lower(state, *data).compile(), (state, *data)


def temp_size(step):
    """XLA's temporary memory of a compiled function, in bytes."""
    return step.memory_analysis().temp_size_in_bytes


def interleaved(steps, rounds):
    """Seconds of each step, an array over rounds, each of which runs every step once; two rounds are not counted.

    The order changes from round to round: a step that follows a large one finds the caches cold.

    :param steps: by name, a compiled function and its arguments.
    """
    times = {name: [] for name in steps}
    order = np.random.default_rng(0)
    for _ in range(rounds + 2):
        for name in order.permutation(np.array(list(steps), object)):
            step, args = steps[name]
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds[2:]) for name, seconds in times.items()}


def median_ratio(numerator, denominator):
    """Median over rounds of the ratio within a round, in which a drift of the machine's speed cancels."""
    return statistics.median(numerator / denominator)


def print_machine():
    """Print versions and machine."""
    device = jax.devices()[0]
    print(f"JAX {jax.__version__}, NumPyro {numpyro.__version__}, {device.device_kind}, {os.cpu_count()} CPU cores")
