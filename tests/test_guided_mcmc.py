"""MCMC that a fit guides leaves the posterior invariant, whatever the guide is; and its errors."""

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro.infer.mcmc import MCMCKernel
import optax
import pytest

from helpers import posterior_at, product_of
from numpyro_vimco import AutoMixed, VIMCOStar
from numpyro_vimco.mcmc import GuidedMCMC

if not hasattr(MCMCKernel, "refresh"):
    pytest.skip("NumPyro has had `refresh` since 0.22", allow_module_level=True)

X = np.array([0.4, -0.8])
NUMBER = 400_000


def bernoulli(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def joint():
    def model():
        z = bernoulli("z", 0.3)
        y = numpyro.sample("y", dist.Categorical(logits=jnp.array([0.2, 0.5, -0.4]) * (1 + z)))
        numpyro.sample("x", dist.Normal(z - y, 1.0), obs=X[0])

    def guide():
        z = bernoulli("z", numpyro.param("z_logits", 0.0))
        numpyro.sample("y", dist.Categorical(logits=numpyro.param("y_logits", jnp.zeros(3)) * (1 - 2 * z)))

    params = {"z_logits": [3.0, -1.0], "y_logits": [[2.0, -1.0, 0.0], [0.0, 1.0, -2.0]]}
    return model, guide, params, {}, product_of(z=[0, 1], y=[0, 1, 2])


def common_plate():
    def model():
        with numpyro.plate("data", 2):
            z = bernoulli("z", 0.3)
            y = bernoulli("y", z - 0.5)
            numpyro.sample("x", dist.Normal(z + y, 1.0), obs=X)

    def guide():
        with numpyro.plate("data", 2):
            z = bernoulli("z", numpyro.param("z_logits", jnp.zeros(2)))
            bernoulli("y", numpyro.param("slope", 0.0) * z)

    params = {"z_logits": [[2.0, -1.0], [-1.0, -2.0]], "slope": [3.0, -2.0]}
    pairs = [[0, 0], [0, 1], [1, 0], [1, 1]]
    return model, guide, params, {}, product_of(z=pairs, y=pairs)


def local_particles():
    def model():
        g = bernoulli("g", 0.2)
        with numpyro.plate("data", 2):
            e = bernoulli("e", 0.8 * g - 0.4)
            numpyro.sample("x", dist.Normal(1.1 * e + g, 1.0), obs=X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.0))
        with numpyro.plate("data", 2):
            bernoulli("e", numpyro.param("slope", 0.0) * g + numpyro.param("shift", 0.0))

    params = {"g_logits": [2.0, -1.0], "slope": [1.0, -2.0], "shift": [1.3, -2.0]}
    outcomes = product_of(g=[0, 1], e=[[0, 0], [0, 1], [1, 0], [1, 1]])
    return model, guide, params, {"plate_particles": {"data": 4}}, outcomes


def chain():
    def model():
        g = bernoulli("g", 0.2)

        def step(before, x):
            z = bernoulli("z", 1.5 * before - 0.6 * g)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return z, None

        scan(step, 0, jnp.append(X, 1.1))

    guide = AutoMixed(model, chains={"z"})
    paths = [[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    return model, guide, None, {"chain_particles": {"z": 5}}, product_of(g=[0, 1], z=paths)


def kernel_of(case, num_proposals=3, **kwargs):
    model, guide, params, particles, outcomes = case()
    objective = VIMCOStar(num_particles=2, **particles)
    if params is None:  # those where an automatic guide begins, moved
        svi = SVI(model, guide, optax.adam(0.1), objective)
        first = svi.get_params(svi.init(random.key(0)))
        keys = random.split(random.key(1), len(first))
        moved = [value + 1.5 * random.normal(key, (2, *value.shape)) for key, value in zip(keys, first.values())]
        params = dict(zip(first, moved))
    params = {name: jnp.array(value) for name, value in params.items()}
    svi = SVI(model, guide, optax.adam(0.1), objective)
    return GuidedMCMC(posterior_at(svi, params), num_proposals=num_proposals, **kwargs), model, outcomes


@pytest.mark.parametrize("case", [joint, common_plate, local_particles, chain])
def test_the_posterior_stays_what_it_is(case):
    """A global step from 400,000 exact draws, by two bad guides and their defence.

    Each outcome is as frequent as before: 5.5 standard errors are passed less than once in a million runs of 30
    outcomes. Without the weight of the present state, or with that of one guide, they are passed by more than ten.
    """
    kernel, model, outcomes = kernel_of(case)
    before, after = moved_by(kernel._global_step, model, outcomes)
    assert_same_frequencies(before, after)


@pytest.mark.parametrize("case", [joint, common_plate, local_particles])
def test_a_global_step_knows_what_the_inner_step_did(case):
    """A step of both kernels. A weight of the state before the inner step passes 5.5 standard errors by far."""
    kernel, model, outcomes = kernel_of(case)

    def step(present, key):
        begin_key, step_key = random.split(key)
        state = kernel._begin(begin_key, present, 0, (), {})
        return kernel._step(state._replace(rng_key=step_key), (), {}).z, None

    assert_same_frequencies(*moved_by(lambda present, key: step(present, key), model, outcomes))


def moved_by(step, model, outcomes):
    """The exact probabilities of outcomes, and how many of as many exact draws are at each after a step."""
    log_joint = jax.vmap(lambda values: numpyro.infer.util.log_density(model, (), {}, values)[0])(outcomes)
    probability = np.exp(np.asarray(log_joint - logsumexp(log_joint), float))
    draws = random.categorical(random.key(0), log_joint, shape=(NUMBER,))
    present = {name: values[draws] for name, values in outcomes.items()}
    run = jax.jit(lambda keys, present: jax.lax.map(lambda x: step(x[1], x[0])[0], (keys, present), batch_size=20_000))
    new = run(random.split(random.key(1), NUMBER), present)
    is_same = [new[n].reshape(NUMBER, 1, -1) == v.reshape(1, len(v), -1) for n, v in outcomes.items()]
    return probability, np.asarray(jnp.concatenate(is_same, axis=-1).all(-1).sum(0))


def assert_same_frequencies(probability, counts):
    assert counts.sum() == NUMBER
    errors = (counts - NUMBER * probability) / np.sqrt(NUMBER * probability * (1 - probability))
    assert np.abs(errors).max() < 5.5
