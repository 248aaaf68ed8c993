"""What is compiled: once for each posterior and each thing that is asked of it, and no more where a fit goes on."""

import gc
import weakref

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import seed, trace
from numpyro.infer import SVI
import optax
import pytest

from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit
from numpyro_vimco.compilation import Compiled, at_once, tracers
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


def test_a_program_that_is_compiled_ahead_is_the_one_that_runs(compilations):
    chunked = Chunked(lambda held, x: held * x + 0.25, 3)
    chunked.ahead(jnp.array(2.0), X[0])
    list(chunked.blocks(jnp.array(2.0), X))  # operations of the loop over chunks
    compilations.clear()
    np.testing.assert_allclose(chunked.all(jnp.array(5.0), X), 5 * X + 0.25, rtol=1e-6)
    assert not compilations


class Undeclared(dist.Distribution):
    """As users write one: JAX does not know of its attribute."""

    arg_constraints = {}
    support = dist.constraints.real

    def __init__(self, shift):
        self.shift = shift
        super().__init__(jnp.shape(shift))

    def sample(self, key, sample_shape=()):
        return self.shift + random.normal(key, sample_shape + self.batch_shape)

    def log_prob(self, value):
        return -((value - self.shift) ** 2) / 2


def test_a_trace_at_once_is_the_trace(compilations):
    def model():
        scale = numpyro.param("scale", jnp.exp(DATA), constraint=dist.constraints.positive)
        with numpyro.plate("data", len(DATA)):
            z = numpyro.sample("z", Undeclared(jnp.sin(DATA)))
            numpyro.sample("x", dist.Normal(2 * z, scale).mask(DATA > 1), obs=DATA)

    expected = trace(seed(model, 0)).get_trace()
    compilations.clear()
    found = at_once(lambda: trace(seed(model, 0)).get_trace())
    assert len(compilations) == 1
    assert list(found) == list(expected)
    assert not tracers(found)
    for name, site in expected.items():
        np.testing.assert_allclose(found[name]["value"], site["value"], rtol=1e-6)
        if site["type"] == "sample":
            assert found[name]["cond_indep_stack"] == site["cond_indep_stack"]
            np.testing.assert_allclose(
                found[name]["fn"].log_prob(site["value"]), site["fn"].log_prob(site["value"]), rtol=1e-5
            )


def test_what_jax_traces_around_is_not_computed_at_once():
    grad = jax.jit(jax.grad(lambda x: at_once(lambda: {"fn": dist.Normal(x, 1.0), "value": x**2})["value"]))(3.0)
    assert grad == 6


def test_a_fit_compiles_few_programs(compilations):
    """It was 188 on the benchmark, nearly all of them single operations of the set-up."""
    jax.clear_caches()
    compilations.clear()
    svi = SVI(switches, AutoMixed(switches), optax.adam(0.01), VIMCOStar(0.5, 8))
    posterior = fit(svi, random.key(0), 3, X[:4], progress_bar=False)
    posterior.diagnose(100)
    posterior.to_arviz(groups=(), progress_bar=False)
    assert len(compilations) <= 60, compilations


def switches(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        w = numpyro.sample("w", dist.Normal(0, 2))
    numpyro.sample("x", dist.Normal((z * w).sum(), 1.0), obs=x.sum())
