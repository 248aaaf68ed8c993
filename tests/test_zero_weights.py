"""Particles of weight zero whose densities have infinite derivatives; what cannot be differentiated says so."""

from contextlib import nullcontext
from functools import partial

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
import optax
import pytest

from helpers import of_two_lengths
from numpyro_vimco import ReweightedWakeSleep, VIMCOStar

X = jnp.array([1, 3, 2])


def safe(z, x):
    """Where z is 0, a value at which the derivative is finite; the density is -inf by a factor."""
    return jnp.where(z == 0, 1.0, x)


# Each case: a distribution of an observation given a switch and a parameter, and data that are impossible at z = 0.
LIKELIHOODS = {
    "Poisson": (lambda z, rate: dist.Poisson(z * rate), X),
    "Binomial": (lambda z, rate: dist.Binomial(5, z * rate / 10), X),
    "Categorical": (lambda z, rate: dist.Categorical(jnp.stack([1 - z * rate / 10, z * rate / 10], -1)), X[:1]),
    "Exponential": (lambda z, rate: dist.Exponential(z * rate), X),
    "Gamma": (lambda z, rate: dist.Gamma(2.0, z * rate), X),
    "to_event": (lambda z, rate: dist.Poisson(z * rate * jnp.ones(3)).to_event(1), X),
}


def programs(fn, x, safely, plate):
    """A switch for all data, or (``plate``) one for each; ``safely`` is the same program with finite derivatives."""

    def where(z, rate):
        return fn(safe(z, z), rate) if safely else fn(z, rate)

    def model():
        rate = numpyro.param("rate", 2.5)
        with numpyro.plate("data", len(x)) if plate else nullcontext():
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", where(z, rate), obs=x)
            if safely:
                numpyro.factor("impossible", jnp.where(z == 0, -jnp.inf, 0.0))

    def guide():
        with numpyro.plate("data", len(x)) if plate else nullcontext():
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1)))

    return model, guide


def value_and_grad(objective, model, guide, params, derivative=jax.value_and_grad):
    return jax.jit(derivative(lambda params: objective.loss(random.key(1), params, model, guide)))(params)


@pytest.mark.parametrize("alpha", of_two_lengths([0.0, 0.5], [0.5]))
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradient_is_that_of_the_particles_that_have_weight(name, alpha):
    params = {"rate": 2.5, "logits": 0.1}
    unsafe, expected = (
        value_and_grad(VIMCOStar(alpha, 8), *programs(*LIKELIHOODS[name], safely, False), params)
        for safely in (False, True)
    )
    assert np.isfinite(expected[0]) and abs(expected[1]["rate"]) > 1e-3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), unsafe, expected)


@pytest.mark.parametrize("rate", [2.5, jnp.array([2.5, 1.5, 1.7])], ids=["shared", "per element"])
def test_elements_with_weights_of_their_own(rate):
    params = {"rate": rate, "logits": 0.1}
    unsafe, expected = (
        value_and_grad(VIMCOStar(0.5, 8), *programs(*LIKELIHOODS["Poisson"], safely, True), params)
        for safely in (False, True)
    )
    assert np.all(np.abs(expected[1]["rate"]) > 1e-3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), unsafe, expected)


@pytest.mark.parametrize(
    "name, plate",
    [("Poisson", True), ("Poisson", False), ("Binomial", True), ("Categorical", True), ("to_event", False)],
)
def test_zeros_are_possible_at_rate_zero(name, plate):
    """A count of 0 has probability 1 at z = 0, where the derivative of 0 log(z rate) would be NaN."""
    fn, zeros = LIKELIHOODS[name][0], np.zeros(3, int)

    def model(by_hand):
        rate = numpyro.param("rate", 2.5)
        with numpyro.plate("data", 3) if plate else nullcontext():
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            if by_hand:
                numpyro.factor("x", jnp.where(z == 0, 0.0, fn(1.0, rate).log_prob(zeros)))
            else:
                numpyro.sample("x", fn(z, rate), obs=zeros)

    def guide():
        with numpyro.plate("data", 3) if plate else nullcontext():
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1)))

    params = {"rate": 2.5, "logits": 0.1}
    found, expected = (
        value_and_grad(VIMCOStar(0.5, 8), partial(model, by_hand), guide, params) for by_hand in (False, True)
    )
    assert abs(expected[1]["rate"]) > 1e-3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_forward_mode():
    params = {"rate": 2.5, "logits": 0.1}
    gradients = [
        value_and_grad(VIMCOStar(0.5, 8), *programs(*LIKELIHOODS["Poisson"], False, False), params, derivative)
        for derivative in (jax.jacfwd, jax.grad)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), *gradients)


@pytest.mark.parametrize("doubly_reparameterized", [True, False])
def test_path_sites_beside_local_particles(doubly_reparameterized):
    """Local particles with z = 0 give the global rate an infinite derivative of weight zero."""

    def model(safely):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Poisson(rate * (safe(z, z) if safely else z)), obs=X)
            if safely:
                numpyro.factor("impossible", jnp.where(z == 0, -jnp.inf, 0.0))

    def guide():
        numpyro.sample("rate", dist.LogNormal(numpyro.param("loc", 0.5), 0.3))
        with numpyro.plate("data", 3):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1)))

    objective = VIMCOStar(0.5, 4, plate_particles={"data": 8}, doubly_reparameterized=doubly_reparameterized)
    params = {"loc": 0.5, "logits": 0.1}
    unsafe, expected = (value_and_grad(objective, partial(model, safely), guide, params) for safely in (False, True))
    assert np.isfinite(expected[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), unsafe, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_all_weights_zero_have_gradient_zero(alpha):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Poisson(0 * z * numpyro.param("rate", 2.5)), obs=X)

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1)))

    value, gradient = value_and_grad(VIMCOStar(alpha, 4), model, guide, {"rate": 2.5, "logits": 0.1})
    assert value == np.inf and all(leaf == 0 for leaf in jax.tree.leaves(gradient))


# Second derivatives.


@pytest.mark.parametrize("doubly_reparameterized", [True, False])
@pytest.mark.parametrize("second", [jax.hessian, lambda fn: jax.grad(lambda x: jax.grad(fn)(x) ** 2)])
def test_second_derivatives_are_refused(doubly_reparameterized, second):
    def model():
        numpyro.sample("z", dist.Normal(0, 1))

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.5), 1.0))

    objective = VIMCOStar(0.5, 4, doubly_reparameterized=doubly_reparameterized)
    loss = lambda loc: objective.loss(random.key(0), {"loc": loc}, model, guide)  # noqa: E731
    with pytest.raises(NotImplementedError, match="has a first derivative only"):
        second(loss)(0.5)
    np.testing.assert_allclose(jax.jacfwd(loss)(0.5), jax.grad(loss)(0.5), rtol=1e-5)


# Reweighted wake-sleep and point estimates.


def mixed():
    numpyro.sample("loc", dist.Normal(1, 1))
    numpyro.sample("scale", dist.LogNormal(0, 1))


def test_wake_sleep_refuses_delta_sites_that_it_cannot_move():
    svi = SVI(mixed, AutoDelta(mixed), optax.adam(0.1), ReweightedWakeSleep(4))
    with pytest.raises(ValueError, match=r"cannot fit the guide site '(loc|scale)', a Delta at a parameter"):
        svi.run(random.key(0), 2, progress_bar=False)


@pytest.mark.parametrize("guide", [AutoMultivariateNormal, AutoNormal])
def test_wake_sleep_takes_delta_sites_of_other_latents(guide):
    """AutoMultivariateNormal draws one auxiliary site, and hands its parts out as Delta sites."""
    svi = SVI(mixed, guide(mixed), optax.adam(0.1), ReweightedWakeSleep(4))
    assert np.isfinite(svi.run(random.key(0), 2, progress_bar=False).losses).all()
