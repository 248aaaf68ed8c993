"""Enumeration in double precision: the expected estimator is the gradient of the exact bound."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import mask, scale
import pytest

from helpers import (
    UNBIASED,
    Program,
    all_particles,
    exact_bound,
    expected_estimate,
    initial_params,
    log_densities,
    of_two_lengths,
    product_of,
)
from numpyro_vimco import ReweightedWakeSleep, VIMCOStar

pytestmark = pytest.mark.usefixtures("x64")

ALPHAS = (0.0, 0.3, 1.0)
X = np.array([0.7, -1.2])


def bernoulli(name, logits, **kwargs):
    return numpyro.sample(name, dist.Bernoulli(logits=logits), **kwargs)


def one_site():
    def model():
        z = bernoulli("z", numpyro.param("prior", 0.3))
        numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.5) * z, 1.0), obs=X[0])

    def guide():
        bernoulli("z", numpyro.param("logits", -0.4))

    return Program(model, guide, product_of(z=[0, 1]))


def shared_parameter():
    def model():
        z = bernoulli("z", numpyro.param("shared", 0.8))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=X[0])

    def guide():
        bernoulli("z", 0.3 - numpyro.param("shared", 0.8) ** 2)

    return Program(model, guide, product_of(z=[0, 1]))


def dependent_sites():
    def model():
        a = numpyro.sample("a", dist.Categorical(logits=numpyro.param("prior", np.array([0.1, -0.5, 0.3]))))
        b = bernoulli("b", numpyro.param("effect", 0.9) * a - 0.5)
        numpyro.sample("x", dist.Normal(a - b, 1.0), obs=X[1])

    def guide():
        a = numpyro.sample("a", dist.Categorical(logits=numpyro.param("logits", np.array([0.5, 0.0, -0.2]))))
        bernoulli("b", numpyro.param("coupling", 0.4) * a + numpyro.param("b_logits", 0.2))

    return Program(model, guide, product_of(a=[0, 1, 2], b=[0, 1]))


def global_and_plate():
    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        with numpyro.plate("data", 2):
            z = bernoulli("z", g - 0.4)
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.1) * z, 1.0), obs=X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("data", 2):
            bernoulli("z", numpyro.param("z_logits", np.array([0.3, -0.3])) + g)

    return Program(model, guide, product_of(g=[0, 1], z=[[0, 0], [0, 1], [1, 0], [1, 1]]))


def scaled_sites():
    def model():
        with scale(scale=0.4):
            z = bernoulli("z", numpyro.param("prior", 0.3))
        numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.5) * z, 1.0), obs=X[0])

    def sampler():
        bernoulli("z", numpyro.param("logits", -0.4))

    return Program(model, scale(sampler, scale=0.4), product_of(z=[0, 1]), sampler)


def factor_in_guide():
    def model():
        z = bernoulli("z", numpyro.param("prior", 0.3))
        numpyro.factor("f", numpyro.param("effect", 0.7) * z)

    def sampler():
        return bernoulli("z", numpyro.param("logits", -0.4))

    def guide():
        numpyro.factor("guide_factor", numpyro.param("tilt", 0.6) * sampler())

    return Program(model, guide, product_of(z=[0, 1]), sampler)


def auxiliary_site():
    def model():
        z = bernoulli("z", numpyro.param("prior", 0.3))
        numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.5) * z, 1.0), obs=X[0])
        bernoulli("u", numpyro.param("reverse", 0.8) * (z - 0.3))  # what the guide draws before z, given z

    def guide():
        u = bernoulli("u", numpyro.param("u_logits", 0.5))
        bernoulli("z", numpyro.param("logits", np.array([-0.4, 0.9]))[u])

    return Program(model, guide, product_of(u=[0, 1], z=[0, 1]))


def masked_plate():
    observed = np.array([True, False])

    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        with numpyro.plate("data", 2), mask(mask=observed):
            z = bernoulli("z", g - 0.4)
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.1) * z, 1.0), obs=X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("data", 2), mask(mask=observed):
            bernoulli("z", numpyro.param("z_logits", np.array([0.3, -0.3])) + g)

    # A masked element is out of the program: one of its values stands for all.
    return Program(model, guide, product_of(g=[0, 1], z=[[0, 0], [1, 0]]))


CASES = [
    one_site,
    shared_parameter,
    dependent_sites,
    global_and_plate,
    scaled_sites,
    factor_in_guide,
    auxiliary_site,
    masked_plate,
]


def assert_close(actual, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-10), actual, expected)


@pytest.mark.parametrize(
    ("case", "num_particles"),
    of_two_lengths(
        [(case, 2) for case in CASES] + [(case, 3) for case in CASES[:4]],
        [(one_site, 3), *((case, 2) for case in CASES if case not in (auxiliary_site, masked_plate, one_site))],
    ),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_expected_gradient_is_that_of_the_exact_bound(case, num_particles):
    program = case()
    params = initial_params(program.model, program.guide)
    estimators = [(alpha, make) for alpha in ALPHAS for make in UNBIASED.values()]

    @jax.jit
    def estimates(params):
        return [
            expected_estimate(partial(make, alpha, num_particles), program, params, num_particles)
            for alpha, make in estimators
        ]

    exact = {
        alpha: jax.jit(jax.value_and_grad(partial(exact_bound, program, alpha=alpha, num_particles=num_particles)))(
            params
        )
        for alpha in ALPHAS
    }
    for (alpha, _), estimate in zip(estimators, estimates(params)):
        assert_close(estimate, exact[alpha])
    assert all(np.abs(np.asarray(leaf)).max() > 1e-3 for leaf in jax.tree.leaves(exact[0.0]))


def test_common_plates_have_one_bound_per_element():
    def model(x=X):
        with numpyro.plate("data", len(x)):
            z = bernoulli("z", numpyro.param("prior", 0.3))
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.5) * z, 1.0), obs=x)

    def guide(x=X):
        with numpyro.plate("data", len(x)):
            bernoulli("z", numpyro.param("slope", 0.7) * x)

    params = initial_params(model, guide)
    program = Program(model, guide, product_of(z=[[0, 0], [0, 1], [1, 0], [1, 1]]))

    def sum_of_bounds(params, alpha):
        elements = [Program(partial(model, x), partial(guide, x), product_of(z=[[0], [1]])) for x in (X[:1], X[1:])]
        return sum(exact_bound(element, params, alpha, 3) for element in elements)

    for alpha in ALPHAS:
        make = partial(VIMCOStar, alpha, 3)
        estimate = jax.jit(lambda params, make=make: expected_estimate(make, program, params, 3))(params)
        exact = jax.jit(jax.value_and_grad(lambda params, alpha=alpha: sum_of_bounds(params, alpha)))(params)
        assert_close(estimate, exact)
    assert sum_of_bounds(params, 0.0) > exact_bound(program, params, 0.0, 3) + 5e-4


@pytest.mark.parametrize(
    "case",
    of_two_lengths([dependent_sites, scaled_sites, factor_in_guide], [dependent_sites]),
    ids=lambda case: case.__name__,
)
def test_reweighted_wake_sleep_has_its_two_updates(case):
    program = case()
    params = initial_params(program.model, program.guide)
    _, estimate = jax.jit(lambda params: expected_estimate(partial(ReweightedWakeSleep, 3), program, params, 3))(params)

    log_w = log_densities(program.model, params, program.outcomes) - log_densities(
        program.guide, params, program.outcomes
    )
    indices, probability = all_particles(program, params, 3)
    shares = jax.nn.softmax(log_w[indices], axis=1)

    def updates(params):
        log_p = log_densities(program.model, params, program.outcomes)
        log_q = log_densities(program.guide, params, program.outcomes)
        return probability @ jnp.sum(shares * (log_p + log_q)[indices], axis=1)

    assert_close(estimate, jax.grad(updates)(params))
