"""What is compiled: once for each posterior and each thing that is asked of it, and no more where a fit goes on."""

import gc
import weakref

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
import pytest

from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit
from numpyro_vimco.compilation import Compiled
from numpyro_vimco.draws.chunks import Chunked


@pytest.fixture
def compilations():
    """The names of what JAX compiles."""
    names, is_on = [], [True]

    def listen(event, duration, fun_name=None, **kwargs):
        if is_on[0] and event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    is_on[0] = False


def model(x):
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    rate = numpyro.sample("rate", dist.Normal(0, 1))
    with numpyro.plate("row", len(x)):
        numpyro.sample("x", dist.Normal(2 * z + rate, 1), obs=x)


def fitted(x, num_steps=5):
    svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5, 4))
    return fit(svi, random.key(0), num_steps, x, num_starts=2, progress_bar=False)


DATA = jnp.arange(3.0)
X = np.array([1.5, 2.5, 1.9], np.float32)


def asked(posterior):
    """What has a program of its own: diagnostics, draws, log-likelihoods, predictions, and gradients."""
    posterior.diagnose(40_000, random.key(1))
    posterior.to_arviz(rng_key=random.key(2), num_samples=100, num_proposals=40_000)
    posterior.sample(random.key(3), (10_000,))
    posterior.gradient_snr(random.key(4), 100)


def test_a_posterior_compiles_each_program_once(compilations):
    posterior = fitted(X)
    assert "jit(run)" in compilations
    asked(posterior)
    compilations.clear()
    asked(posterior)
    # Not these, which are small and hold the parameters: the gradients of a hundred keys at a time.
    assert "jit(run)" not in compilations


def test_a_fit_that_goes_on_compiles_nothing(compilations):
    posterior = fitted(X)
    asked(posterior)
    compilations.clear()
    resumed = posterior.resume(8)
    asked(resumed)
    assert "jit(run)" not in compilations
    # Other parameters are other arguments of the same programs.
    assert resumed.losses.shape == (2, 13) and resumed.log_evidence != posterior.log_evidence


def test_data_are_arguments():
    """Far from the prior they cost more than 3 nats."""
    assert (fitted(X + 3).starts.log_evidence < fitted(X).starts.log_evidence - 3).all()


def test_a_posterior_does_not_outlive_its_name():
    """Nor do its data: no cache has them."""
    x = jnp.array(X)
    svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5, 4))
    posterior = Posterior(svi, svi.get_params(svi.init(random.key(0), X)), x)
    posterior.diagnose(100)
    posterior.sample(random.key(0))
    kept = weakref.ref(posterior), weakref.ref(x)
    del posterior, x
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def times(factor):
    return lambda x: factor * jnp.sin(x) + DATA


def test_results_are_those_of_the_function_at_hand():
    for factor in (2.0, 3.0):
        np.testing.assert_allclose(Compiled(times(factor))(X), factor * np.sin(X) + DATA, rtol=1e-6)
    for data in (DATA, 2 * DATA):
        np.testing.assert_allclose(Compiled(lambda x, data=data: x + data)(X), X + data, rtol=1e-6)
    # Constants inside of a nested `jit` are not arguments of the program.
    for data in (DATA, 2 * DATA):
        nested = jax.jit(lambda x, data=data: x * data)
        np.testing.assert_allclose(Compiled(nested)(X), X * data, rtol=1e-6)


def test_other_shapes_types_and_structures_are_other_programs():
    traced = []

    def double(tree):
        traced.append(None)
        return jax.tree.map(lambda x: 2 * x, tree)

    run = Compiled(double)
    for tree in (X, X[:2], X.astype(int), {"a": X}, {"b": X}):
        for _ in range(2):
            jax.tree.map(np.testing.assert_array_equal, run(tree), jax.tree.map(lambda x: 2 * x, tree))
    assert len(traced) == 5


def test_functions_of_python_are_not_shared():
    def called(factor):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return lambda held, x: (
            held + jax.pure_callback(lambda x: np.float32(factor) * x, shape, x, vmap_method="sequential")
        )

    for factor in (2.0, 3.0):
        chunked = Chunked(called(factor), 2)
        for held in (0.0, 1.0):
            np.testing.assert_allclose(chunked.all(jnp.array(held), X), factor * X + held, rtol=1e-6)


def test_programs_do_not_keep_data():
    data = jnp.arange(1000.0) + 7
    kept = weakref.ref(data)
    Compiled(lambda x, data=data: x.sum() + data)(X)
    del data
    gc.collect()
    assert kept() is None
