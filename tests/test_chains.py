"""Chains with K samples of each step: unbiased by enumeration of all outcomes, and of draws; clear errors."""

from functools import partial
import itertools

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import condition, mask, substitute
import pytest

from helpers import initial_params, of_two_lengths
from numpyro_vimco import VIMCO, VIMCOStar

K = 2
X = np.array([0.7, -1.2])
SITES = 2
W = np.array([[0.7, -1.2], [np.nan, 0.1]])


def bernoulli(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def log_bernoulli(logits, value):
    return value * logits - jnp.logaddexp(0.0, logits)


def log_normal(loc, x):
    return -0.5 * (x - loc) ** 2 - 0.5 * np.log(2 * np.pi)


def over_paths(log_v):
    """Log of the mean over all paths. ``log_v``: a list, of shape (K,) for the first step, then (K, K before)."""
    steps = range(len(log_v))
    paths = list(itertools.product(range(len(log_v[0])), repeat=len(log_v)))
    terms = [log_v[0][p[0]] + sum(log_v[t][p[t], p[t - 1]] for t in steps[1:]) for p in paths]
    return logsumexp(jnp.stack(terms), axis=0) - np.log(len(paths))


# Each case: model, guide, values by (chain or None, site), and the log-weight of one global particle with the
# log-probability of drawing it, by hand.


def counter_in_the_carry():
    """A chain with a global latent, a counter in the carry, data as `xs`."""

    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        stay, effect = numpyro.param("stay", 0.9), numpyro.param("effect", 1.1)

        def step(carry, x):
            before, t = carry
            z = bernoulli("z", stay * before - 0.4 * g + 0.1 * t)
            numpyro.sample("x", dist.Normal(effect * z, 1.0), obs=x)
            return (z, t + 1), None

        scan(step, (0, 0), X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        bernoulli("z", numpyro.param("z_logits", np.array([0.3, -0.3])) + numpyro.param("coupling", 0.5) * g)

    def log_weight(params, g, z):  # z: (K, 2)
        q = log_bernoulli(params["z_logits"] + params["coupling"] * g, z)
        local = log_normal(params["effect"] * z, X) - q
        first = log_bernoulli(-0.4 * g, z[:, 0]) + local[:, 0]
        logits = params["stay"] * z[:, 0] - 0.4 * g + 0.1
        second = log_bernoulli(logits[None, :], z[:, 1, None]) + local[:, 1, None]
        top = log_bernoulli(params["prior"], g) - log_bernoulli(params["g_logits"], g)
        log_q = log_bernoulli(params["g_logits"], g) + q.sum()
        return top + over_paths([first, second]), log_q

    return model, guide, {"g": (None, ()), "z": ("z", (2,))}, log_weight


def from_the_end_in_a_plate():
    """A scan from the end, of two elements with a chain each, of which one has a value missing; a global latent."""

    def model():
        g = bernoulli("g", 0.3)
        stay, effect = numpyro.param("stay", 0.9), numpyro.param("effect", 1.1)

        def step(before, x):
            with numpyro.plate("site", SITES):
                z = bernoulli("z", stay * before - 0.4 + 0.5 * g)
                with mask(mask=~jnp.isnan(x)):
                    numpyro.sample("x", dist.Normal(effect * z, 1.0), obs=jnp.nan_to_num(x))
            return z, z

        scan(step, jnp.zeros(SITES, int), W, reverse=True)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("site", SITES):
            bernoulli("z", numpyro.param("z_logits", np.array([[0.3], [0.6]])) - 0.2 * g)

    def log_weight(params, g, z):  # z: (K, 2 times, sites)
        q = log_bernoulli(params["z_logits"] - 0.2 * g, z)
        local = jnp.where(np.isnan(W), 0.0, log_normal(params["effect"] * z, np.nan_to_num(W))) - q
        first = log_bernoulli(0.5 * g - 0.4, z[:, 1]) + local[:, 1]
        logits = params["stay"] * z[None, :, 1] - 0.4 + 0.5 * g
        second = log_bernoulli(logits, z[:, None, 0]) + local[:, None, 0]
        top = log_bernoulli(0.3, g) - log_bernoulli(params["g_logits"], g)
        return top + over_paths([first, second]).sum(), log_bernoulli(params["g_logits"], g) + q.sum()

    return model, guide, {"g": (None, ()), "z": ("z", (2, SITES))}, log_weight


def summed_in_the_step():
    """Two latents of one step, one of which is summed out, and a guide with a `scan` of its own."""

    def model():
        effect = numpyro.param("effect", 1.1)

        def step(before, x):
            z = bernoulli("z", 0.9 * before - 0.4)
            e = numpyro.sample("e", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(effect * z + 1.5 * e, 1.0), obs=x)
            return z, None

        scan(step, 0, X)

    def guide():
        logits = numpyro.param("z_logits", np.array([0.3, -0.3]))

        def step(carry, logits):
            bernoulli("z", logits)
            return carry, None

        scan(step, None, logits)

    def log_weight(params, z):  # z: (K, 2)
        q = log_bernoulli(params["z_logits"], z)
        off, on = (log_normal(params["effect"] * z + 1.5 * e, X) for e in (0, 1))
        local = jnp.logaddexp(off + np.log(0.7), on + np.log(0.3)) - q
        first = log_bernoulli(-0.4, z[:, 0]) + local[:, 0]
        second = log_bernoulli(0.9 * z[None, :, 0] - 0.4, z[:, 1, None]) + local[:, 1, None]
        return over_paths([first, second]), q.sum()

    return model, guide, {"z": ("z", (2,))}, log_weight


CASES = [counter_in_the_carry, from_the_end_in_a_plate, summed_in_the_step]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_expected_gradient_is_that_of_the_exact_bound(case, alpha, x64):
    """Every outcome of 2 particles with 2 samples of 2 steps, all sites binary."""
    model, guide, sites, log_weight = case()
    shapes = {name: shape if chain is None else (K, *shape) for name, (chain, shape) in sites.items()}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    outcomes = jnp.array(list(itertools.product([0, 1], repeat=sum(sizes))))
    parts = jnp.split(outcomes, np.cumsum(sizes)[:-1], axis=1)
    outcomes = {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts)}
    params = initial_params(model, guide)
    pairs = jnp.array(list(itertools.product(range(len(parts[0])), repeat=2)))

    def exact(params):
        log_w, log_q = jax.vmap(lambda outcome: log_weight(params, **outcome))(outcomes)
        log_w, probability = log_w[pairs], jnp.exp(log_q[pairs].sum(1))
        if alpha == 1:
            return probability @ log_w.mean(1)
        return probability @ (logsumexp((1 - alpha) * log_w, axis=1) - np.log(2)) / (1 - alpha)

    def estimate(params, pair):
        def vectorize(fn, keys):
            def run(key, outcome):
                def choose(site):
                    if site["type"] != "sample" or site["name"] not in outcome:
                        return None
                    chain, value = sites[site["name"]][0], outcome[site["name"]]
                    if chain is None:
                        return value
                    try:
                        return value[jax.lax.axis_index(chain)]
                    except NameError:  # where samples are not drawn
                        return None

                with substitute(substitute_fn=choose):
                    return fn(key)

            return jax.vmap(run)(keys, {name: values[pair] for name, values in outcomes.items()})

        objective = VIMCOStar(alpha, 2, vectorize, doubly_reparameterized=False, chain_particles={"z": K})
        return jax.value_and_grad(lambda params: -objective.loss(random.key(0), params, model, guide))(params)

    @jax.jit
    def expected(params):
        _, log_q = jax.vmap(lambda outcome: log_weight(params, **outcome))(outcomes)
        probability = jnp.exp(log_q[pairs].sum(1))
        estimates = jax.lax.map(lambda pair: estimate(params, pair), pairs, batch_size=2048)
        return jax.tree.map(lambda x: jnp.tensordot(probability, x, axes=1), estimates)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=1e-10),
        expected(params),
        jax.jit(jax.value_and_grad(exact))(params),
    )


def normal(name, loc, width=0.8):
    return numpyro.sample(name, dist.Normal(loc, width))
