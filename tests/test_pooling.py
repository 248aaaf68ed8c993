"""Draws from the guides of several starts: properly weighted by enumeration, and better than any start alone."""

from dataclasses import replace
from functools import partial
import itertools

import jax
from jax import random
import jax.numpy as jnp
from jax.scipy.special import logsumexp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO, init_to_uniform
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
import optax
import pytest

from numpyro_vimco import AutoMixed, VIMCOStar
from numpyro_vimco.densities.levels import Levels
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.defence import find_defence
from numpyro_vimco.draws.pooling import Mixture, in_pool, log_ratio, pooled, propose_pooled
from numpyro_vimco.draws.proposals import structure_of
from numpyro_vimco.fitting.starts import initial_states

X = np.array([0.7, -1.2])


def fitted(model, guide, params, objective=None):
    """Several starts, of which the first is the best; parameters have a leading axis for them."""
    svi = SVI(model, guide, optax.adam(0.1), objective or VIMCOStar())
    return Approximation.of(svi, params, len(jax.tree.leaves(params)[0]), (), {})


def log_bernoulli(logits, value):
    return value * logits - jnp.logaddexp(0.0, logits)


def log_normal(loc, x):
    return -0.5 * (x - loc) ** 2 - 0.5 * np.log(2 * np.pi)


def binary(size):
    return np.array(list(itertools.product([0, 1], repeat=size)))


def densities_of(approx):
    """Densities of the mixture of guides, without their defence: exact."""
    defence = find_defence(approx, structure_of(approx, approx.plate_particles))
    mixture = Mixture(approx, replace(defence, components=()), approx.num_starts)
    return partial(mixture.densities, approx.starts)


def test_joint_draws_are_properly_weighted(x64):
    """For each outcome, the expected weight of draws there is p(x, z), exactly."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
        y = numpyro.sample("y", dist.Bernoulli(logits=0.5 * z))
        numpyro.sample("x", dist.Normal(z + 2.0 * y, 1.0), obs=1.4)

    def guide():
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("z_logits", 0.0)))
        numpyro.sample("y", dist.Bernoulli(logits=numpyro.param("slope", 0.0) * z))

    starts = {"z_logits": [2.0, -3.0], "slope": [1.0, -4.0]}
    params = {name: jnp.array(values) for name, values in starts.items()}
    densities = densities_of(fitted(model, guide, params))
    z, y = binary(2).T
    evaluate = jax.vmap(lambda z, y: densities(Levels({"z": z, "y": y}, {}))[0].shared)
    found_p, found_q = jax.jit(evaluate)(jnp.array(z), jnp.array(y))
    log_p = log_bernoulli(0.3, z) + log_bernoulli(0.5 * z, y) + log_normal(z + 2.0 * y, 1.4)
    z_logits, slope = np.asarray(params["z_logits"])[:, None], np.asarray(params["slope"])[:, None]
    log_q = log_bernoulli(z_logits, z) + log_bernoulli(slope * z, y)
    np.testing.assert_allclose(np.exp(found_p), np.exp(log_p), rtol=1e-12)
    np.testing.assert_allclose(np.exp(found_q), np.exp(log_q).mean(0), rtol=1e-12)


def test_elements_of_a_common_plate_have_weights_of_their_own(x64):
    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=X)

    def guide():
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(2))))

    params = {"logits": jnp.array([[2.0, 1.0], [-3.0, 4.0]])}
    densities = densities_of(fitted(model, guide, params))
    weigh = jax.vmap(lambda z: log_ratio(*densities(Levels({"z": z}, {}))[0].shared))
    z = binary(1) * np.ones((2, 2), int)  # outcomes of each element
    log_weight = jax.jit(weigh)(jnp.array(z))
    assert log_weight.shape == (2, 2)
    log_q = log_bernoulli(np.asarray(params["logits"])[:, None], z)
    expected = np.exp(log_weight) * np.exp(log_q).mean(0)
    np.testing.assert_allclose(expected, np.exp(log_bernoulli(0.3, z) + log_normal(2.0 * z, X)), rtol=1e-12)


def test_local_particles_are_properly_weighted(x64):
    """Every outcome of g and of three local particles (of two guides and the model) in each of two elements.

    The expectation of Ẑ times the probability that these local values are chosen is p(x, g, e), for all g and e.
    """

    def model():
        g = numpyro.sample("g", dist.Bernoulli(logits=0.2))
        with numpyro.plate("data", 2):
            e = numpyro.sample("e", dist.Bernoulli(logits=0.8 * g - 0.4))
            numpyro.sample("x", dist.Normal(1.1 * e + g, 1.0), obs=X)

    def guide():
        g = numpyro.sample("g", dist.Bernoulli(logits=numpyro.param("g_logits", 0.0)))
        with numpyro.plate("data", 2):
            numpyro.sample("e", dist.Bernoulli(logits=numpyro.param("slope", 0.0) * g + numpyro.param("shift", 0.0)))

    starts = {"g_logits": [2.0, -1.0], "slope": [1.0, -2.0], "shift": [0.3, -3.0]}
    params = {name: jnp.array(values) for name, values in starts.items()}
    densities = densities_of(fitted(model, guide, params, VIMCOStar(plate_particles={"data": 2})))
    outcomes = binary(7)
    g, e = jnp.array(outcomes[:, 0]), jnp.array(outcomes[:, 1:].reshape(-1, 3, 2))

    @jax.jit
    @jax.vmap
    def weigh(g, e):
        levels, _, structure = densities(Levels({"g": g}, {"data": {"e": e}}))
        log_p, of_parts = levels.local["data"]
        local = log_ratio(log_p, logsumexp(of_parts, axis=0))
        total = log_ratio(*levels.shared) + structure.sum_to_shared(logsumexp(local, axis=0) - np.log(3))
        return jnp.exp(total).squeeze(), jnp.exp(local - logsumexp(local, axis=0))

    weight, choice = weigh(g, e)
    parameters = {name: np.asarray(value)[:, None] for name, value in params.items()}
    q_g = np.exp(log_bernoulli(parameters["g_logits"], outcomes[:, 0])).mean(0)
    logits = parameters["slope"] * outcomes[:, 0] + parameters["shift"]  # (starts, outcomes): a particle of each
    logits = np.concatenate([logits, 0.8 * outcomes[:, 0][None] - 0.4])  # and one of the model
    q_e = np.exp(log_bernoulli(logits.T[..., None], np.asarray(e))).prod((1, 2))
    for target_g, *target in binary(3):
        chosen = np.where(np.asarray(e) == target, choice, 0).sum(1).prod(1) * (outcomes[:, 0] == target_g)
        target = np.array(target)
        log_p = log_bernoulli(0.2, target_g) + log_bernoulli(0.8 * target_g - 0.4, target).sum()
        log_p += log_normal(1.1 * target + target_g, X).sum()
        np.testing.assert_allclose(np.sum(q_g * q_e * weight * chosen), np.exp(log_p), rtol=1e-12)


def test_values_that_the_model_rules_out():
    """Possible; not by the model; neither by the model nor by a guide (0 / 0)."""
    weight = np.exp(log_ratio(jnp.log(jnp.array([3.0, 0.0, 0.0])), jnp.log(jnp.array([1.5, 1.0, 0.0]))))
    np.testing.assert_allclose(weight, [2, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("local", [False, True])
def test_pool_has_what_a_start_lost(local):
    """Each start proposes one of two values; both are posterior with 0.5. A mean of 8,000 draws, within five errors."""

    def model():
        g = numpyro.sample("g", dist.Bernoulli(0.5))
        with numpyro.plate("data", 2):
            e = numpyro.sample("e", dist.Normal(2.0 * g - 1.0, 1.0))
            numpyro.sample("x", dist.Normal(e, 1.0), obs=jnp.zeros(2))
        numpyro.deterministic("sum", e.sum())

    def guide():
        g = numpyro.sample("g", dist.Bernoulli(logits=numpyro.param("g_logits", 0.0)))
        with numpyro.plate("data", 2):
            numpyro.sample("e", dist.Normal(g - 0.5 + numpyro.param("shift", 0.0), 0.8))

    params = {"g_logits": jnp.array([-12.0, 12.0]), "shift": jnp.array([0.0, 0.2])}
    approx = fitted(model, guide, params, VIMCOStar(plate_particles={"data": 4} if local else {}))
    draws = propose_pooled(approx, random.key(0), 8000)
    weight = np.exp(draws.log_weight.ravel() - draws.log_weight.max())
    weight /= weight.sum()
    assert draws.values["g"].shape == (8000,) and draws.values["e"].shape == (8000, 2)
    assert (abs(np.bincount(draws.component) - 4000) < 6 * 2000**0.5).all()
    e = draws.values["e"]
    for value, exact in ((draws.values["g"], 0.5), (e[:, 0], 0.0), (e[:, 1] ** 2, 0.75)):
        mean = weight @ value
        assert abs(mean - exact) < 5 * np.sqrt(np.sum(weight**2 * (value - mean) ** 2))
    assert np.sum(weight[draws.values["g"] == 0]) > 0.4 and np.sum(weight[draws.values["g"] == 1]) > 0.4
    exact = float(dist.Normal(1.0, 2**0.5).log_prob(0.0)) * 2
    relative = np.exp(draws.log_weight.ravel() - exact)
    assert abs(relative.mean() - 1) < 5 * relative.std() / 8000**0.5


def mixed_model():
    with numpyro.plate("predictor", 2):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        c = numpyro.sample("c", dist.Normal(z, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("x", dist.Normal(c, scale).to_event(1), obs=X)


def continuous_model():
    c = numpyro.sample("c", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(c, 0.5))
    numpyro.sample("x", dist.Normal(c, scale).expand([2]).to_event(1), obs=X)


CASES = {
    "AutoMixed": (mixed_model, AutoMixed),
    "AutoMixed, conditional": (mixed_model, partial(AutoMixed, structure="conditional")),
    "AutoMultivariateNormal": (continuous_model, partial(AutoMultivariateNormal, init_scale=0.8)),
}


@pytest.mark.parametrize("case", CASES)
def test_automatic_guides_have_densities_at_the_draws_of_other_starts(case):
    """The evidence from a pool of guides as they begin is that from the prior, within five errors."""
    model, make = CASES[case]
    guide = make(model, init_loc_fn=init_to_uniform(radius=0.5))
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar())
    params = jax.vmap(svi.get_params)(initial_states(svi, random.key(0), 2, (), {}))
    draws = propose_pooled(fitted(model, guide, params), random.key(1), 8000)
    assert set(draws.values) == ({"z", "c", "scale"} if model is mixed_model else {"c", "scale"})
    for name, value in draws.values.items():
        assert len(np.unique(value, axis=0)) > 2, name

    def prior(key):
        with numpyro.handlers.seed(rng_seed=key), numpyro.handlers.trace() as tr:
            model()
        return tr["x"]["fn"].log_prob(tr["x"]["value"]).sum()

    likelihood = np.exp(jax.jit(jax.vmap(prior))(random.split(random.key(2), 20_000)), dtype=float)
    weight = np.exp(draws.log_weight.ravel())
    error = np.hypot(likelihood.std() / 20_000**0.5, weight.std() / 8000**0.5)
    assert error < 0.1 * likelihood.mean() and abs(weight.mean() - likelihood.mean()) < 5 * error


def test_delta_at_a_parameter_cannot_be_pooled():
    guide = AutoDelta(continuous_model)
    svi = SVI(continuous_model, guide, optax.adam(0.1), Trace_ELBO())
    params = jax.vmap(svi.get_params)(initial_states(svi, random.key(0), 2, (), {}))
    with pytest.raises(NotImplementedError, match=r"Site 'c' of the guide is a Delta .* parameter 'c_auto_loc'"):
        pooled(fitted(continuous_model, guide, params))


def test_starts_of_a_model_with_parameters_are_not_pooled():
    """Each has a posterior of its own: draws are those of the best one."""

    def model():
        z = numpyro.sample("z", dist.Normal(numpyro.param("prior", 0.0), 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=1.0)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.5), 0.8))

    approx = fitted(model, guide, {"prior": jnp.array([5.0, 1.0, 9.0]), "loc": jnp.array([3.0, 1.0, 5.0])})
    approx = approx.at(approx.starts, 3, best=1)
    assert in_pool(approx).num_starts == 1 and in_pool(approx).params == {"prior": 1.0, "loc": 1.0}
    # The posterior is Normal(1, 1 / √2), of 8,000 draws whose ESS is far above 1,000: 6 standard errors.
    draws = propose_pooled(approx, random.key(0), 8000)
    weight = np.exp(draws.log_weight.ravel().astype(float))
    assert abs(weight @ draws.values["z"] / weight.sum() - 1) < 6 * 0.71 / 1000**0.5
    np.testing.assert_allclose(weight.mean(), np.exp(dist.Normal(1.0, 2**0.5).log_prob(1.0)), rtol=0.05)
