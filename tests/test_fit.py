"""`fit`: starts side by side, tempering, progress, NaN, stopping and going on."""

from functools import partial
import itertools
import os
from pathlib import Path
import subprocess
import sys
from unittest import mock
import warnings

import jax
from jax import random
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.handlers import block, mask, scale, substitute
from numpyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    init_to_uniform,
    init_to_value,
)
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
import optax
import orbax.checkpoint
import pytest

from helpers import Program, exact_bound, expected_estimate, initial_params, of_two_lengths, product_of
from numpyro_vimco import AutoDiscrete, AutoMixed, Posterior, ReweightedWakeSleep, VIMCOStar, fit
from numpyro_vimco.fitting import starts, steps
from numpyro_vimco.fitting.starts import initial_states
from numpyro_vimco.fitting.state import FitState
from numpyro_vimco.fitting.tempering import FIRST, TemperedModel
from numpyro_vimco.guides.automatic import automatic_guides

HERE = Path(__file__).parent
quietly = partial(fit, progress_bar=False)
X = np.array([0.7, -1.2, 0.4])
BETA = 0.3


# The tempered target.


def observe(name, fn, value, beta=None):
    """An observed site, or its tempered density written down by hand."""
    if beta is None:
        numpyro.sample(name, fn, obs=value)
    else:
        numpyro.factor(name, beta * fn.log_prob(value))


def programs(beta=None, subsample_size=3):
    """Discrete and continuous latents; data under a plate, a scale, a mask, in `scan`, and a factor.

    :param beta: of the observed sites, written down by hand; None for a model to be tempered.
    """

    def model():
        prior = numpyro.param("prior", 0.2)
        with numpyro.plate("data", 3, subsample_size=subsample_size) as i:
            z = numpyro.sample("z", dist.Bernoulli(logits=prior))
            c = numpyro.sample("c", dist.Normal(z, 1.0))
            observe("x", dist.Normal(c, 1.0), jnp.asarray(X)[i], beta)
            with scale(scale=0.6), mask(mask=jnp.asarray(X)[i] > 0):
                observe("y", dist.Poisson(jnp.exp(c)), np.array(2), beta)

    def guide():
        slope, width = numpyro.param("slope", 0.6), numpyro.param("width", 0.8, constraint=constraints.positive)
        with numpyro.plate("data", 3, subsample_size=subsample_size) as i:
            z = numpyro.sample("z", dist.Bernoulli(logits=slope * jnp.asarray(X)[i]))
            numpyro.sample("c", dist.Normal(0.2 * z, width))

    return model, guide


def global_programs(beta=None, discrete=True):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(logits=0.2)) if discrete else 0.5
        c = numpyro.sample("c", dist.Normal(numpyro.param("prior", 0.3) * z, 1.0))
        numpyro.factor("tilt", -0.4 * c**2 * (1 if beta is None else beta))
        if beta is None:
            scan(lambda _, x: (0, numpyro.sample("x", dist.Normal(c, 1.0), obs=x)), 0, X)
        else:
            numpyro.factor("x", beta * dist.Normal(c, 1.0).log_prob(X).sum())

    def guide():
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1))) if discrete else 0.5
        numpyro.sample("c", dist.Normal(numpyro.param("loc", 0.2) * z, 0.9))
        numpyro.factor("of_guide", 0.3 * numpyro.param("loc", 0.2))  # no site of the model: it counts in full

    return model, guide


continuous_programs = partial(global_programs, discrete=False)
CASES = {
    "VIMCOStar, subsampled": (VIMCOStar(0.5, 3), partial(programs, subsample_size=2)),
    "VIMCOStar, scan and factor": (VIMCOStar(0.5, 3), global_programs),
    "ReweightedWakeSleep": (ReweightedWakeSleep(3), programs),
    "RenyiELBO, subsampled": (RenyiELBO(0.0, 3), partial(programs, subsample_size=2)),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO(3), continuous_programs),
    "TraceGraph_ELBO": (TraceGraph_ELBO(3), programs),
}


@pytest.mark.parametrize("case", of_two_lengths(CASES, ["VIMCOStar, subsampled", "TraceGraph_ELBO"]))
def test_objective_of_a_tempered_model_is_that_of_its_densities_by_hand(case, x64):
    """Loss and gradient are those of a model that has its tempered densities written down; same keys."""
    objective, make = CASES[case]
    model, guide = make()
    params = {**initial_params(model), **initial_params(guide)}

    @partial(jax.jit, static_argnums=0)
    @partial(jax.value_and_grad, argnums=1)
    def loss(make_model, params, beta):
        return objective.loss(random.key(1), params, make_model(beta), guide)

    def tempered(beta):
        return TemperedModel(model, beta)

    expected = loss(lambda beta: make(beta)[0], params, BETA)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), loss(tempered, params, BETA), expected)
    assert abs(loss(tempered, params, 1.0)[0] - expected[0]) > 0.1


def test_inverse_temperature_is_inside_of_the_sum_over_an_enumerated_latent(x64):
    def model():
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(2.0 * z + c, 1.0), obs=X)

    def summed():
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        likelihood = BETA * dist.Normal(2.0 * np.array([[0], [1]]) + c, 1.0).log_prob(X)
        numpyro.factor("x", logsumexp(jnp.log(np.array([[0.7], [0.3]])) + likelihood, axis=0).sum())

    def guide():
        numpyro.sample("c", dist.Normal(numpyro.param("loc", 0.3), 1.0))

    def loss(objective, model):
        return objective.loss(random.key(0), {"loc": 0.1}, model, guide)

    tempered = jax.jit(lambda beta: loss(TraceEnum_ELBO(), TemperedModel(model, beta)))(BETA)
    np.testing.assert_allclose(tempered, loss(Trace_ELBO(), summed), rtol=1e-9)


def log_bernoulli(logits, value):
    return value * logits - jnp.logaddexp(0.0, logits)


def log_normal(loc, x):
    return -0.5 * (x - loc) ** 2 - 0.5 * np.log(2 * np.pi)


def test_tempered_bound_by_enumeration(x64):
    """All outcomes of two particles: mean loss and gradient are exactly those of the tempered target's bound."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("prior", 0.2)))
            numpyro.sample("x", dist.Normal(1.1 * z, 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("slope", 0.6) * x))

    params = {"prior": 0.2, "slope": 0.6}
    outcomes = {"z": jnp.array(list(itertools.product([0, 1], repeat=2)))}
    tempered = Program(TemperedModel(partial(model, X[:2]), BETA), partial(guide, X[:2]), outcomes)
    make = lambda vectorize: VIMCOStar(0.5, 2, vectorize)  # noqa: E731
    found = jax.jit(lambda params: expected_estimate(make, tempered, params, 2))(params)

    def bound_of_element(params, x):
        def model():
            z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("prior", 0.2)))
            numpyro.factor("x", BETA * log_normal(1.1 * z, x))

        def guide():
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("slope", 0.6) * x))

        return exact_bound(Program(model, guide, product_of(z=[0, 1])), params, 0.5, 2)

    expected = jax.jit(jax.value_and_grad(lambda params: sum(bound_of_element(params, x) for x in X[:2])))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)


def test_tempered_bound_of_joint_latents_by_enumeration(x64):
    def model(beta=None):
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("prior", 0.2)))
        y = numpyro.sample("y", dist.Bernoulli(logits=z - 0.5))
        observe("x", dist.Normal(z + 0.5 * y, 1.0), 1.3, beta)

    def guide():
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("z_logits", 0.1)))
        numpyro.sample("y", dist.Bernoulli(logits=numpyro.param("y_logits", 0.2) * z))

    params, outcomes = {"prior": 0.2, "z_logits": 0.1, "y_logits": 0.2}, product_of(z=[0, 1], y=[0, 1])
    tempered = Program(TemperedModel(model, BETA), guide, outcomes)
    make = lambda vectorize: VIMCOStar(0.5, 2, vectorize)  # noqa: E731
    found = jax.jit(lambda params: expected_estimate(make, tempered, params, 2))(params)
    by_hand = Program(partial(model, BETA), guide, outcomes)
    expected = jax.jit(jax.value_and_grad(lambda params: exact_bound(by_hand, params, 0.5, 2)))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)


def test_tempered_bound_with_local_particles_by_enumeration(x64):
    """All outcomes of 2 global particles with 2 local ones in each of 2 elements."""

    def model():
        g = numpyro.sample("g", dist.Bernoulli(logits=0.2))
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.8 * g - 0.4))
            numpyro.sample("x", dist.Normal(1.1 * z, 1.0), obs=X[:2])

    def guide():
        g = numpyro.sample("g", dist.Bernoulli(logits=numpyro.param("g_logits", 0.1)))
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("z_logits", 0.3) + 0.5 * g))

    values = jnp.array(list(itertools.product([0, 1], repeat=5)))
    outcomes = {"g": values[:, 0], "z": values[:, 1:].reshape(-1, 2, 2)}
    pairs = jnp.array(list(itertools.product(range(len(values)), repeat=2)))
    params = {"g_logits": 0.1, "z_logits": 0.3}

    def log_weight(g, z):  # z: (particles, elements)
        logits = params["z_logits"] + 0.5 * g
        local = log_bernoulli(0.8 * g - 0.4, z) + BETA * log_normal(1.1 * z, X[:2]) - log_bernoulli(logits, z)
        log_q = log_bernoulli(params["g_logits"], g)
        total = log_bernoulli(0.2, g) - log_q + jnp.sum(logsumexp(local, axis=0) - np.log(2))
        return total, log_q + log_bernoulli(logits, z).sum()

    def estimate(pair):
        def vectorize(fn, keys):
            def run(key, outcome):
                def choose(site):
                    if site["name"] == "g":
                        return outcome["g"]
                    if site["name"] == "z":
                        return outcome["z"][jax.lax.axis_index("data")]

                with substitute(substitute_fn=choose):
                    return fn(key)

            return jax.vmap(run)(keys, {name: value[pair] for name, value in outcomes.items()})

        objective = VIMCOStar(0.5, 2, vectorize, plate_particles={"data": 2})
        return -objective.loss(random.key(0), params, TemperedModel(model, BETA), guide)

    log_w, log_q = jax.jit(jax.vmap(lambda outcome: log_weight(**outcome)))(outcomes)
    probability = jnp.exp(log_q[pairs].sum(1))
    found = probability @ jax.jit(jax.vmap(estimate))(pairs)
    np.testing.assert_allclose(
        found, probability @ (2 * (logsumexp(0.5 * log_w[pairs], axis=1) - np.log(2))), rtol=1e-9
    )


# Steps.


def switch_model(x, noise=1.0):
    """Two switches: evidence and posterior are sums over four outcomes."""
    with numpyro.plate("switch", 2):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(z.sum(), noise), obs=x)


def switch_guide(x, noise=1.0):
    """Each start begins somewhere else."""
    logits = numpyro.param("logits", lambda key: random.normal(key, (2,)))
    with numpyro.plate("switch", 2):
        numpyro.sample("z", dist.Bernoulli(logits=logits))


def switches(optimiser=None, guide=switch_guide, objective=None, **kwargs):
    objective = VIMCOStar(0.5, 4) if objective is None else objective
    return SVI(switch_model, guide, optimiser or optax.adam(0.05), objective, **kwargs)


def run(svi, num_steps=30, key=0, **options):
    return fit(svi, random.key(key), num_steps, X, **{"num_starts": 2, "progress_bar": False, **options})


@pytest.fixture(scope="module")
def posterior():
    return run(switches(), 150, num_starts=3)


def exact_log_evidence():
    z = np.array(list(itertools.product([0, 1], repeat=2)))
    log_p = np.where(z, np.log(0.3), np.log(0.7)).sum(1) + log_normal(z.sum(1)[:, None], X).sum(1)
    return float(logsumexp(log_p))


def test_starts(posterior):
    starts = posterior.starts
    assert starts.losses.shape == starts.inverse_temperature.shape == (3, 150) and not starts.failed.any()
    assert starts.params["logits"].shape == (3, 2) and len(np.unique(starts.params["logits"])) == 6
    assert len(starts) == 3 and not starts.recovered
    assert len(np.unique(starts.losses[:, 0])) == 3  # keys of their own
    # Five standard errors: less than once in a million; each is of 4,096 draws.
    assert (abs(starts.log_evidence - exact_log_evidence()) < 5 * starts.log_evidence_std_error + 1e-6).all()
    assert (starts.log_evidence_std_error < 0.05).all()
    assert (abs(-starts.losses[:, -50:].mean(1) - exact_log_evidence()) < 0.2).all()


def test_best_start(posterior):
    starts = posterior.starts
    assert starts.best == int(np.argmax(starts.log_evidence))
    np.testing.assert_array_equal(posterior.params["logits"], starts.params["logits"][starts.best])
    svi = switches()
    svi.init(random.key(5), X)
    # Its state is one of `svi.run`, and of `svi.update`.
    state = jax.tree.map(lambda leaf: leaf[starts.best], starts.svi_states)
    alone = Posterior(svi, svi.run(random.key(0), 1, X, init_state=state, progress_bar=False), X)
    assert alone.losses.shape == (1, 1)
    alone.diagnose(400, random.key(1))
    assert alone.log_evidence > exact_log_evidence() - 0.1


def test_inverse_temperature_rises_geometrically_over_half_of_the_steps(posterior):
    beta = posterior.starts.inverse_temperature
    np.testing.assert_allclose(beta[:, 0], FIRST, rtol=1e-5)
    np.testing.assert_allclose(beta[:, 1:75] / beta[:, :74], FIRST ** (-1 / 75), rtol=1e-3)
    assert (beta[:, 75:] == 1).all() and (beta[:, 74] < 1).all()


def test_starts_may_differ_in_their_inverse_temperature():
    beta = run(switches(), 20, tempering=(0, 0.5, 1), num_starts=3).starts.inverse_temperature
    assert (beta[0] == 1).all()
    assert (beta[1] < 1).sum() == 10 and (beta[2] < 1).all()
    schedule = run(switches(), 20, tempering=lambda step: jnp.array([1e-6, 1.0]) * (1 + step)).starts
    expected = np.array([[1e-6], [1.0]]) * (1 + np.arange(20))
    np.testing.assert_allclose(schedule.inverse_temperature, expected, rtol=1e-6)
    assert (abs(schedule.losses[0]) < 3).all() and (schedule.losses[1] > 3).all()  # the second's data count


def test_inverse_temperature_is_an_argument_of_one_compiled_program():
    traces = []

    def model(x):
        traces.append(None)
        switch_model(x)

    def count(num_steps, tempering):
        traces.clear()
        svi = SVI(model, switch_guide, optax.adam(0.05), VIMCOStar(0.5, 4))
        quietly(svi, random.key(0), num_steps, X, tempering=tempering, num_starts=1, recover=False)
        return len(traces)

    # The first inverse temperature is found by one more trace.
    assert count(250, 0.5) - 1 == count(1, 0) == count(250, optax.linear_schedule(0.1, 1.0, 100))


def test_steps_are_those_of_svi_without_tempering():
    """From the same state, with the same keys."""
    starts = run(switches(), 12, tempering=0).starts
    svi = switches()
    state = run(svi, 0).state.svi
    for i in range(2):
        alone = svi.run(
            random.key(9), 12, X, init_state=jax.tree.map(lambda leaf, i=i: leaf[i], state), progress_bar=False
        )
        np.testing.assert_allclose(alone.losses, starts.losses[i], rtol=1e-5)
        np.testing.assert_allclose(alone.params["logits"], starts.params["logits"][i], rtol=1e-4, atol=1e-6)


def test_one_start_after_the_other_gives_the_same(posterior):
    in_turn, starts = run(switches(), 150, num_starts=3, vectorize_starts=False).starts, posterior.starts
    np.testing.assert_allclose(in_turn.losses[:, :20], starts.losses[:, :20], rtol=1e-4)
    np.testing.assert_allclose(in_turn.params["logits"], starts.params["logits"], rtol=0.02)


def temp_size(vectorize_starts):
    svi = SVI(switch_model, switch_guide, optax.adam(0.05), VIMCOStar(num_particles=512))
    states = initial_states(svi, random.key(0), 16, (X,), {})
    state = FitState(states, jnp.array(0), jnp.zeros(16, int), jnp.ones(()), jnp.zeros(16, bool))
    beta = lambda *_: jnp.ones(16)  # noqa: E731
    chunk = steps.Steps(svi, (X,), {}, {}, beta, False, vectorize_starts, None)._chunk
    return jax.jit(chunk).lower(state, 1).compile().memory_analysis().temp_size_in_bytes


def test_one_start_after_the_other_takes_the_memory_of_one():
    assert temp_size(False) < temp_size(True) / 4


@pytest.mark.long
def test_two_devices_give_what_one_gives():
    program = [sys.executable, "tests/devices_of_fit.py"]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(program, cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "held", done.stderr


def test_other_optimisers_and_options_of_svi():
    begin = {"tempering": 0, "init_params": {"logits": jnp.zeros(2)}, "num_starts": 1}
    given = run(switches(numpyro.optim.Adam(0.05), noise=2.0), 1, **begin)
    np.testing.assert_allclose(abs(given.params["logits"]), 0.05, rtol=1e-3)  # Adam's first step
    passed = run(switches(numpyro.optim.Adam(0.05)), 1, noise=2.0, **begin)
    np.testing.assert_array_equal(passed.losses, given.losses)
    objective = VIMCOStar(0.5, 4, lambda fn, xs: jax.vmap(fn)(xs), doubly_reparameterized=False)
    forward = run(switches(objective=objective), 1, forward_mode_differentiation=True, **begin)
    backward = run(switches(objective=objective), 1, **begin)
    np.testing.assert_allclose(forward.params["logits"], backward.params["logits"], rtol=1e-4)


def test_minimize():
    def model():
        numpyro.sample("x", dist.Normal(numpyro.param("loc", lambda key: random.normal(key)), 1.0), obs=1.5)

    svi = SVI(model, lambda: None, numpyro.optim.Minimize(), Trace_ELBO())
    posterior = fit(svi, random.key(0), 1, num_starts=2, tempering=0, progress_bar=False)
    np.testing.assert_allclose(posterior.starts.params["loc"], 1.5, atol=1e-3)
    np.testing.assert_allclose(posterior.params["loc"], 1.5, atol=1e-3)


# Where starts begin.


def with_closure(model):
    inner = AutoNormal(model)
    return lambda *args: inner(*args)


def with_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, hide=["c"])))
    guide.append(AutoDelta(block(model, expose=["c"])))
    return guide


class Holder:
    def __init__(self, model):
        self.inner = {"guides": [AutoNormal(model)]}

    def __call__(self, *args):
        return self.inner["guides"][0](*args)


GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "in a closure": with_closure,
    "AutoGuideList": with_list,
    "in a handler": lambda model: scale(AutoNormal(model), scale=1.0),
    "in a partial": lambda model: partial(with_closure(model)),
    "in an object": Holder,
}


def two_continuous():
    c = numpyro.sample("c", dist.Normal(0, 1))
    d = numpyro.sample("d", dist.Normal(c, 1).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(d, 1).to_event(1), obs=X[:2])


def locations(params):
    return np.concatenate([np.reshape(v, (len(v), -1)) for k, v in sorted(params.items()) if k.endswith("loc")], axis=1)


@pytest.mark.parametrize("case", GUIDES)
def test_automatic_guides_begin_where_each_start_does(case):
    guide = GUIDES[case](two_continuous)
    svi = SVI(two_continuous, guide, optax.adam(0.05), Trace_ELBO())

    first = locations(jax.vmap(svi.get_params)(initial_states(svi, random.key(0), 3, (), {})))
    second = locations(jax.vmap(svi.get_params)(initial_states(svi, random.key(1), 3, (), {})))
    assert first.shape == (3, 3) and len(np.unique(np.concatenate([first, second]))) == 18
    # The guide itself is as the first of all starts made it.
    kept = locations(jax.tree.map(lambda leaf: leaf[None], svi.get_params(svi.init(random.key(7)))))
    np.testing.assert_allclose(kept[0], first[0], rtol=1e-5)


def tracers(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.core.Tracer)]


@pytest.mark.parametrize("structure", ["mean_field", "conditional", "autoregressive"])
def test_mixed_guides_begin_where_each_start_does(structure, monkeypatch):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        c = numpyro.sample("c", dist.Normal(z, 1.0))
        numpyro.sample("x", dist.Normal(c, 1.0), obs=1.0)

    def begin(keys):
        new = SVI(
            model, AutoMixed(model, structure=structure, init_loc_fn=init_to_uniform), optax.adam(0.05), VIMCOStar()
        )
        with monkeypatch.context() as patch:
            patch.setattr(starts, "split", lambda key, number: keys)
            return jax.vmap(new.get_params)(initial_states(new, random.key(0), len(keys), (), {}))

    # Each start is that of a guide of its own, although the structure of the model is found out in the first alone.
    keys = random.split(random.key(0), 3)
    trace_structure = AutoMixed._trace_structure
    with mock.patch.object(AutoMixed, "_trace_structure", autospec=True, side_effect=trace_structure) as traced:
        together = begin(keys)
    assert traced.call_count == 1
    jax.tree.map(
        np.testing.assert_array_equal, together, jax.tree.map(lambda *x: jnp.concatenate(x), *map(begin, keys[:, None]))
    )

    guide = AutoMixed(model, structure=structure, init_loc_fn=init_to_uniform)
    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar(0.5, 4))
    params = fit(svi, random.key(0), 0, num_starts=3, progress_bar=False).starts.params
    posterior = fit(svi, random.key(0), 3, num_starts=3, progress_bar=False)
    for name in ("c_auto_loc", "z_auto_logits"):
        assert len(np.unique(params[name])) == 3
    for part in automatic_guides(guide):
        assert part.prototype_trace is not None and not tracers({k: v for k, v in vars(part).items() if k != "_parts"})
    guide.sample_posterior(random.key(1), posterior.params)
    assert len(automatic_guides(guide)) == 3


def test_guide_is_as_before_if_a_start_cannot_begin():
    guide = AutoDiscrete(two_continuous)
    svi = SVI(two_continuous, guide, optax.adam(0.05), VIMCOStar())
    with pytest.raises(ValueError, match="no discrete latent"):
        fit(svi, random.key(0), 3)
    assert guide.prototype_trace is None and not guide.families


# NaN.


def edge_model(cliff):
    numpyro.sample("z", dist.Normal(0.0, 1.0))


def edge_guide(cliff):
    """The density is NaN at a location below the cliff, and falls towards it by one in each step."""
    loc = numpyro.param("loc", lambda key: random.uniform(key) * 6)
    fine = numpyro.param("fine", 0.5)
    numpyro.factor("slope", loc + 0.0 * jnp.sqrt(loc - cliff))
    numpyro.sample("z", dist.Normal(fine, 1.0))


def edge(**options):
    svi = SVI(edge_model, edge_guide, optax.sgd(1.0), Trace_ELBO())
    return lambda cliff: fit(svi, random.key(0), 8, cliff, num_starts=3, tempering=0, progress_bar=False, **options)


def test_start_with_nan_is_dropped_with_a_warning():
    locations = np.sort(np.asarray(edge(stable_update=True)(-100.0).starts.params["loc"]))
    cliff = float(locations[:2].mean())  # one start of three gets below it
    with pytest.warns(
        UserWarning, match="Start . of 3 is dropped: in step . NaN came up in the loss, .*'loc'"
    ) as caught:
        posterior = edge()(cliff)
    starts, failed = posterior.starts, posterior.starts.failed
    assert "'fine'" not in str(caught[0].message)
    assert len(caught) == 1 and failed.sum() == 1
    assert np.isnan(starts.losses[failed]).any() and np.isfinite(starts.losses[~failed]).all()
    assert np.isnan(starts.log_evidence[failed]).all() and np.isfinite(starts.log_evidence[~failed]).all()
    assert np.isfinite(starts.params["loc"]).all()
    assert posterior.params["loc"] in starts.params["loc"][~failed]


def test_all_starts_with_nan_are_an_error():
    with pytest.raises(ValueError, match=r"All 3 starts failed, the last of them in step .: NaN came up in .*loc"):
        edge()(7.0)


def test_stable_update_skips_steps_with_nan():
    with pytest.warns(
        UserWarning,
        match="start . cannot be estimated: of 4,096 draws of its guide, 4,096 have a NaN",
    ):
        starts = edge(stable_update=True)(-2.0).starts
    assert not starts.failed.any() and np.isnan(starts.losses).any() and np.isfinite(starts.params["loc"]).all()


def test_infinite_loss_is_no_nan():
    """All particles have weight zero until a start finds what the data allow."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5).expand([6]).to_event(1))
        numpyro.factor("all", jnp.where(z.sum() == 6, 0.0, -jnp.inf))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(6))).to_event(1))

    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(0, 4))
    starts = fit(svi, random.key(0), 60, num_starts=2, progress_bar=False).starts
    assert np.isinf(starts.losses).any() and not starts.failed.any()
    assert starts.params["logits"].max() > 0.1


# Stopping, and going on.


class Interrupting(steps.tqdm.tqdm):
    """Ctrl-C while a chunk of steps is shown."""

    looks = 0

    def update(self, n=1):
        Interrupting.looks += 1
        if Interrupting.looks == 4:
            raise KeyboardInterrupt
        return super().update(n)


def assert_same(one, other):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_interrupted_fit_keeps_what_there_is_and_goes_on(monkeypatch, tmp_path):
    """Saved and loaded by Orbax on the way; all that follows is bit for bit that of a fit in one piece."""
    whole = run(switches(), 60)
    monkeypatch.setattr(steps.tqdm, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match=r"Interrupted after \d+ of 60 steps.* go on with `posterior.resume\(\d+\)`"):
        part = run(switches(), 60)
    taken = part.losses.shape[1]
    assert 4 <= taken < 30 and part.state.step == taken and np.isfinite(part.starts.log_evidence).all()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", part.state)
    jax.clear_caches()
    svi = switches()
    target = run(svi, 0, key=5).state
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "state", target)
    rest = run(svi, 60 - taken, init_state=state, num_starts=7)
    for name in ("losses", "inverse_temperature"):
        both = [getattr(posterior.starts, name) for posterior in (part, rest)]
        np.testing.assert_array_equal(np.concatenate(both, 1), getattr(whole.starts, name))
    assert_same(whole.starts.params, rest.starts.params)
    assert rest.state.step == 60 and (rest.starts.log_evidence == whole.starts.log_evidence).all()
    assert (random.key_data(rest.state.svi.rng_key) == random.key_data(whole.state.svi.rng_key)).all()
    resumed = part.resume(60 - taken)
    for name in ("losses", "inverse_temperature", "params", "log_evidence"):
        assert_same(getattr(resumed.starts, name), getattr(whole.starts, name))


def test_schedule_of_your_own_goes_on_by_the_step():
    schedule = optax.linear_schedule(0.1, 1.0, 20)
    whole = run(switches(), 30, tempering=schedule)
    part = run(switches(), 12, tempering=schedule)
    rest = run(switches(), 18, tempering=schedule, init_state=part.state)  # this SVI has not been initialised
    np.testing.assert_array_equal(np.concatenate([part.losses, rest.losses], 1), whole.losses)
    np.testing.assert_array_equal(part.resume(18).losses, whole.losses)
    with pytest.raises(
        ValueError, match=r"`tempering` is 0.5, but `init_state` is of a fit whose inverse temperature was a function"
    ):
        run(switches(), 18, init_state=part.state)


def test_interruption_before_the_first_step_is_one(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps.Steps, "_chunk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(switches())


def test_progress_bar_shows_bound_inverse_temperature_and_failures(capsys):
    with pytest.warns(UserWarning, match="is dropped"):
        edge_svi = SVI(edge_model, edge_guide, optax.sgd(1.0), Trace_ELBO())
        fit(edge_svi, random.key(0), 8, -5.0, num_starts=3, tempering=0)
    shown = capsys.readouterr().err
    assert "8/8" in shown and "bound: " in shown and "inverse temperature: 1" in shown and "of 3 starts failed" in shown
    run(switches(), 5)
    assert capsys.readouterr().err == ""


# What there is to know, and errors.


def test_log_evidence_of_a_subsample_is_unknown():
    model, guide = programs(subsample_size=2)
    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar(1.0, 4))
    posterior = fit(svi, random.key(0), 20, num_starts=2, progress_bar=False)
    starts = posterior.starts
    assert np.isnan(starts.log_evidence).all() and starts.best == int(np.argmin(starts.losses[:, -2:].mean(1)))
    jax.tree.map(
        lambda one, of_all: np.testing.assert_array_equal(one, of_all[starts.best]), posterior.params, starts.params
    )


def test_mutable_state_of_numpyros_objectives():
    def model(x):
        count = numpyro.primitives.mutable("count", {"steps": jnp.zeros(())})
        count["steps"] = count["steps"] + 1
        c = numpyro.sample("c", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(c, 1).expand([len(x)]).to_event(1), obs=x)

    def guide(x):
        numpyro.sample("c", dist.Normal(numpyro.param("loc", 0.0), 1.0))

    svi = SVI(model, guide, optax.adam(0.05), Trace_ELBO())
    with pytest.warns(UserWarning, match="The log evidence cannot be estimated. Mutable state"):
        posterior = fit(svi, random.key(0), 5, X, num_starts=1, progress_bar=False)
    steps = posterior.state.svi.mutable_state["count"]["steps"]
    assert steps.shape == (1,) and steps[0] >= 5


def forgetful(x=None):
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(1.0 * z, 1), obs=x)


@pytest.mark.filterwarnings("ignore:Out-of-support values")  # NumPyro's, which names no site
def test_what_is_wrong_with_the_data_is_said_before_the_fit():
    svi = SVI(forgetful, AutoDiscrete(forgetful), optax.adam(0.1), VIMCOStar(0, 4))
    with pytest.raises(ValueError, match="The data of site 'x' are NaN"):
        fit(svi, random.key(0), 10**9, jnp.nan, num_starts=1, progress_bar=False)
    with pytest.raises(ValueError, match="does not fit `forgetful`: got an unexpected keyword argument 'num_chains'"):
        fit(svi, random.key(0), 10**9, 1.0, num_chains=4)

    def prior():
        numpyro.sample("z", dist.Bernoulli(0.5))

    svi = SVI(prior, AutoDiscrete(prior), optax.adam(0.1), VIMCOStar(0, 4))
    for either in (svi, prior):
        with pytest.warns(UserWarning, match="no observed site, so that its posterior is the prior") as caught:
            fit(either, random.key(0), 1, num_starts=1)
        assert {warning.filename for warning in caught} == {__file__}  # the user's line, not ours


@pytest.mark.filterwarnings("ignore:In 2 of 2 steps of start 0 the loss was infinite")
def test_start_without_a_log_evidence():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.factor("never", -jnp.inf * (1 + z))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1)))

    with pytest.warns(
        UserWarning,
        match="of 4,096 draws of its guide, 0 have a NaN weight, and 4,096 the weight zero",
    ):
        svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(0, 4))
        posterior = fit(svi, random.key(0), 2, num_starts=1, progress_bar=False)
    assert np.isnan(posterior.starts.log_evidence).all() and posterior.losses.shape == (1, 2)


class Spread(NamedSharding):
    """Over 4 devices that are not there: only the arithmetic of shapes."""

    num_devices = 4

    def shard_shape(self, shape):
        return (shape[0] // 4,)


SPREAD = Spread(Mesh(np.array(jax.devices()[:1]), ("starts",)), PartitionSpec("starts"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": -1}, "`num_steps` is -1, but must be an integer of at least 0: so many steps are taken"),
        ({"num_starts": 0}, "`num_starts` is 0, but must be an integer of at least 1: so many fits run side by side"),
        ({"key": 1}, "`rng_key` is 1"),
        ({"tempering": 1.2}, r"`tempering` is 1.2, but must be a share of the steps, in \[0, 1\], or 2 of them"),
        ({"tempering": (0.5, 0.5, 0)}, "`tempering` is .*, or 2 of them"),
        ({"tempering": "slow"}, "`tempering` is 'slow'"),
        ({"tempering": lambda step: step / 10}, "`tempering` gives the inverse temperature 0.0 at step 0"),
        ({"tempering": lambda step: 1 / (4.0 - step)}, "`tempering` gives the inverse temperature inf at step 4"),
        ({"init_state": (1, 2)}, "`init_state` is of type tuple, but must be the `state` of a posterior that `fit`"),
        ({"start_sharding": "starts"}, "`start_sharding` is 'starts', but must be a `jax.sharding.Sharding`"),
        ({"start_sharding": SPREAD}, "`start_sharding` spreads starts over 4 devices, but there are 2 starts"),
    ],
)
def test_errors(options, message):
    options = dict(options)
    key, num_steps = options.pop("key", random.key(0)), options.pop("num_steps", 30)
    with pytest.raises(ValueError, match=message):
        fit(switches(), key, num_steps, X, **{"num_starts": 2, "progress_bar": False, **options})


def counted(seen):
    """Animals at each site, of which not all are seen: a count below what was seen is impossible."""
    rate = numpyro.sample("rate", dist.LogNormal(1.0, 0.5))
    with numpyro.plate("site", len(seen)):
        count = numpyro.sample("count", dist.Poisson(rate))
        numpyro.sample("seen", dist.Binomial(count, 0.9), obs=seen)


@pytest.mark.filterwarnings("ignore:Out-of-support|The log evidence of start")
def test_a_guide_that_draws_what_data_rule_out_is_named():
    seen = jnp.array([30.0, 28.0, 33.0, 31.0])

    def fitted(**kwargs):
        svi = SVI(counted, AutoMixed(counted, **kwargs), optax.adam(0.01), VIMCOStar(0.5, num_particles=8))
        return fit(svi, random.key(0), 40, seen, num_starts=2, progress_bar=False)

    with pytest.warns(
        UserWarning, match=r"In 40 of 40 steps of start 0 the loss was infinite: the guide draws what the"
    ):
        posterior = fitted(init_loc_fn=init_to_value(values={"count": 3}))
    with pytest.raises(ValueError, match=r"None of .* draws of the guide has a density under the model"):
        posterior.diagnose(100, random.key(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="In .* steps")
        # As the message says.
        assert np.isfinite(fitted(init_loc_fn=init_to_value(values={"count": seen + 1})).losses).mean() > 0.9


@pytest.mark.long
def test_a_nan_density_at_all_starts_names_the_site():
    """Of draws that are impossible, after which a number of trials is negative."""

    def model(seen):
        def step(susceptible, seen):
            new = numpyro.sample("new", dist.Binomial(susceptible, 0.5))
            numpyro.sample("seen", dist.Normal(new, 1.0), obs=seen)
            return susceptible - new, None

        scan(step, 3, seen)

    with pytest.raises(
        ValueError, match=r"log-density of the site 'new' of the model is NaN in .*% of draws"
    ) as caught:
        fit(model, random.key(0), 5, jnp.array([2.0, 1.0, 0.0]), progress_bar=False)
    assert "Not 16 samples of each step" in caught.value.__notes__[0]  # why the better plan was not possible
