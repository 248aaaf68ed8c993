"""Compiled programs that are kept: used again for the same computation, never for another one."""

from collections import OrderedDict
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

from numpyro_vimco import AutoMixed, VIMCOStar, fit, importance_diagnostics, programs, to_arviz
from numpyro_vimco.draws.chunks import in_chunks
from numpyro_vimco.compilation import compiled


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


def times(factor):
    return lambda x: factor * jnp.sin(x) + DATA


DATA = jnp.arange(3.0)
X = np.array([1.5, 2.5, 1.9], np.float32)


def test_what_was_compiled_is_used_again(compilations, monkeypatch):
    monkeypatch.setattr(programs, "_programs", OrderedDict())  # whatever other tests have compiled
    svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5, 4))
    result = fit(svi, random.key(0), 5, X, num_starts=2, progress_bar=False)
    assert "jit(run)" in compilations
    about = {"model_args": (X,), "progress_bar": False}
    importance_diagnostics(svi, result, rng_key=random.key(1), num_samples=40_000, **about)
    compilations.clear()
    # Other keys, steps and data of the same shapes.
    result = fit(svi, random.key(3), 8, X, num_starts=2, init_state=result.state, progress_bar=False)
    other = fit(svi, random.key(4), 7, X + 3, num_starts=2, anneal=0, progress_bar=False)
    importance_diagnostics(svi, result, rng_key=random.key(5), num_samples=40_000, **about)
    to_arviz(svi, result, rng_key=random.key(6), num_proposals=40_000, groups=(), **about)
    # One is new: deterministic sites and others, by `to_arviz`.
    assert compilations.count("jit(run)") == 1
    # Data are arguments: those of the last fit are its own. Far from the prior they cost more than 3 nats.
    assert (other.log_evidence < result.log_evidence - 3).all()


def test_results_are_those_of_the_function_at_hand():
    for factor in (2.0, 3.0):
        np.testing.assert_allclose(compiled(times(factor), X)(X), factor * np.sin(X) + DATA, rtol=1e-6)
    for data in (DATA, 2 * DATA):
        np.testing.assert_allclose(compiled(lambda x, data=data: x + data, X)(X), X + data, rtol=1e-6)
    # Of another structure, with the same arrays.
    assert set(compiled(lambda x: {"a": x}, X)(X)) == {"a"} and set(compiled(lambda x: {"b": x}, X)(X)) == {"b"}
    # Constants inside of a nested `jit` are not arguments of the program.
    for data in (DATA, 2 * DATA):
        nested = jax.jit(lambda x, data=data: x * data)
        np.testing.assert_allclose(compiled(nested, X)(X), X * data, rtol=1e-6)


def test_functions_of_python_are_not_shared():
    def called(factor):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return lambda x: jax.pure_callback(lambda x: np.float32(factor) * x, shape, x, vmap_method="sequential")

    for factor in (2.0, 3.0):
        np.testing.assert_allclose(in_chunks(called(factor), 2, X), factor * X, rtol=1e-6)


def test_programs_do_not_keep_data():
    data = jnp.arange(1000.0) + 7
    kept = weakref.ref(data)
    compiled(lambda x, data=data: x.sum() + data, X)(X)
    del data
    gc.collect()
    assert kept() is None


def test_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(programs, "PROGRAMS", 3)
    for n in range(1, 6):
        compiled(lambda x: 2 * x, jnp.zeros(n))
    assert len(programs._programs) <= 3
