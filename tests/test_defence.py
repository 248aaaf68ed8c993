"""Defended draws: their density is that of the formula, and they are drawn from it, for every structure of guides."""

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import mask, seed, trace
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoBNAFNormal, AutoMultivariateNormal
import optax
import pytest
from scipy.stats import norm

from helpers import said
from numpyro_vimco import AutoMixed, Posterior, VIMCOStar
from numpyro_vimco.densities.levels import Levels
from numpyro_vimco.draws import defence
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.defence import SHARE, find_defence
from numpyro_vimco.draws.pooling import Mixture, by_start, propose_pooled
from numpyro_vimco.draws.proposals import structure_of

DRAWS = 40_000


def fitted(model, guide, params, objective=None):
    """One start for each element of the leading axis of parameters."""
    svi = SVI(model, guide, optax.adam(0.1), objective or VIMCOStar())
    return Approximation.of(svi, params, len(jax.tree.leaves(params)[0]), (), {})


def bernoulli(logits, value):
    return np.exp(value * logits - np.logaddexp(0.0, logits))


def chain_model():
    z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
    y = numpyro.sample("y", dist.Bernoulli(logits=2.0 * z - 1.0))
    numpyro.sample("x", dist.Normal(z + 2.0 * y, 1.0), obs=1.4)


def guide_in_order():
    z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.0)))
    numpyro.sample("y", dist.Bernoulli(logits=numpyro.param("b", 0.0) * (z - 0.5)))


def guide_against_order():
    y = numpyro.sample("y", dist.Bernoulli(logits=numpyro.param("a", 0.0)))
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("b", 0.0) * (y - 0.5)))


@pytest.mark.parametrize("guide", [guide_in_order, guide_against_order])
def test_density_is_the_formula(guide, x64):
    """Where the guide draws y before its parent z, the set of y has both."""
    params = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([3.0, 0.5])}
    approx = fitted(chain_model, guide, params)
    mixture = Mixture(approx, find_defence(approx, structure_of(approx, {})), 2)
    z, y = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]).T
    evaluate = jax.vmap(lambda z, y: mixture.densities(approx.starts, Levels({"z": z, "y": y}, {}))[0].shared)
    _, log_q = jax.jit(evaluate)(jnp.array(z), jnp.array(y))
    p_z, p_y = bernoulli(0.3, z), bernoulli(2.0 * z - 1.0, y)
    expected = np.zeros(4)
    for a, b in zip(params["a"], params["b"]):
        if guide is guide_in_order:
            q_z, q_y = bernoulli(a, z), bernoulli(b * (z - 0.5), y)
            sets = [p_z * q_y, q_z * p_y, p_z * p_y]
        else:
            q_y, q_z = bernoulli(a, y), bernoulli(b * (y - 0.5), z)
            sets = [p_z * q_y, p_z * p_y]
        expected += ((1 - SHARE) * q_z * q_y + SHARE * np.mean(sets, 0)) / 2
    np.testing.assert_allclose(np.exp(log_q), expected, rtol=1e-12)


def test_draws_of_each_start_have_the_weights_of_its_guide(x64):
    """The program of the pool, which defends its draws, draws from guides alone as well."""
    params = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([3.0, 0.5])}
    draws = by_start(fitted(chain_model, guide_in_order, params)).all(params, random.key(0), 20_000, None)
    z, y = draws.values["z"], draws.values["y"]
    q_z, q_y = bernoulli(params["a"], z), bernoulli(params["b"] * (z - 0.5), y)
    np.testing.assert_allclose(draws.log_q, np.log(q_z * q_y), rtol=1e-10)
    p = bernoulli(0.3, z) * bernoulli(2.0 * z - 1.0, y) * norm.pdf(1.4, z + 2 * y)
    np.testing.assert_allclose(draws.log_weight, np.log(p) - np.log(q_z * q_y), rtol=1e-10)
    np.testing.assert_array_equal(draws.component, np.tile([0, 1], (20_000, 1)))
    # 20,000 draws of each: 5 standard errors, less than once in a million runs; a defended draw has z = 1 more often.
    share = 1 / (1 + np.exp(-np.asarray(params["a"])))
    assert (np.abs(z.mean(0) - share) < 5 * np.sqrt(share * (1 - share) / 20_000)).all()


def plate_model():
    g = numpyro.sample("g", dist.Bernoulli(0.4))
    with numpyro.plate("data", 3):
        z = numpyro.sample("z", dist.Bernoulli(logits=jnp.array([-1.0, 0.0, 2.0]) * g))
    numpyro.sample("x", dist.Normal(z.sum() + g, 1.0), obs=2.0)


def plate_guide():
    g = numpyro.sample("g", dist.Bernoulli(0.7))
    with numpyro.plate("data", 3):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(3)) - g))


def switches_model():
    with numpyro.plate("predictor", 3):
        z = numpyro.sample("z", dist.Bernoulli(jnp.array([0.2, 0.5, 0.7])))
    numpyro.sample("x", dist.Normal(z @ jnp.array([1.0, 2.0, -1.0]), 1.0), obs=0.5)


def moved(model, guide):
    """Parameters of two starts of a guide, away from where it begins."""
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar())
    params = svi.optim.get_params(svi.init(random.key(0)).optim_state)
    noise = np.random.default_rng(0)
    starts = [{name: x + noise.normal(0, 0.5, x.shape) for name, x in params.items()} for _ in range(2)]
    return jax.tree.map(lambda *x: jnp.stack(x), *map(svi.constrain_fn, starts))


def nested_model():
    with numpyro.plate("outer", 2, dim=-2):
        with numpyro.plate("inner", 2, dim=-1):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=jnp.ones((2, 2)))


def nested_guide():
    with numpyro.plate("outer", 2, dim=-2):
        with numpyro.plate("inner", 2, dim=-1):
            numpyro.sample("z", dist.Categorical(logits=numpyro.param("a", jnp.zeros((2, 2, 3)))))


def masked_model():
    with numpyro.plate("data", 2), mask(mask=jnp.array([True, False])):
        z = numpyro.sample("z", dist.Bernoulli(0.2))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.ones(2))
    numpyro.sample("y", dist.Bernoulli(0.5))


def masked_guide():
    with numpyro.plate("data", 2):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(2))))
    numpyro.sample("y", dist.Bernoulli(0.9))


def series_model():
    g = numpyro.sample("g", dist.Bernoulli(0.4))

    def step(carry, x):
        z = numpyro.sample("z", dist.Bernoulli(logits=2.0 * carry - 1.0 + g))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return z, None

    scan(step, jnp.array(0), jnp.array([0.3, 1.2]))


def series_guide():
    g = numpyro.sample("g", dist.Bernoulli(0.7))
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(2)) - g).to_event(1))


def series_guide_in_scan():
    g = numpyro.sample("g", dist.Bernoulli(0.7))
    a = numpyro.param("a", jnp.zeros(2))
    scan(lambda z, a: (numpyro.sample("z", dist.Bernoulli(logits=a - g + z)), None), jnp.array(0), a)


ONE = {"a": jnp.array([[0.5, -1.0, 2.0]])}
CASES = {
    "in order": (chain_model, guide_in_order, {"a": jnp.array([2.0, -1.0]), "b": jnp.array([3.0, 0.5])}),
    "against order": (chain_model, guide_against_order, {"a": jnp.array([2.0, -1.0]), "b": jnp.array([3.0, 0.5])}),
    "elements of a plate": (plate_model, plate_guide, ONE),
    "common plates": (nested_model, nested_guide, {"a": jnp.linspace(-1, 1, 12).reshape(1, 2, 2, 3)}),
    "masked element": (masked_model, masked_guide, {"a": jnp.array([[1.5, 0.5]])}),
    "in scan": (series_model, series_guide_in_scan, {"a": jnp.array([[0.5, -1.0]])}),
}


CASES["coupled elements"] = (
    switches_model,
    AutoMixed(switches_model),
    {"z_auto_logits": jnp.array([[0.0, -2.0, -2.0]]), "z_auto_weights": jnp.full((1, 3, 1, 3), 15.0)},
)


@pytest.fixture
def mostly_defensive(monkeypatch):
    """Nine of ten draws are defensive, so that a fault in these shows."""
    monkeypatch.setattr(defence, "SHARE", 0.9)


def outcomes_of(draws):
    """Each draw as one row of integers."""
    return np.concatenate([np.reshape(draws.values[name], (len(draws.log_p), -1)) for name in sorted(draws.values)], 1)


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_density_that_is_computed(case, mostly_defensive):
    """Frequencies of all outcomes of 40,000 draws are within 6 standard errors of the density, each."""
    draws = propose_pooled(fitted(*CASES[case]), random.key(1), DRAWS)
    log_q = draws.log_q.reshape(len(draws.log_q), -1)
    rows = outcomes_of(draws)
    if log_q.shape[1] > 1:  # each element of common plates by itself
        rows, log_q = rows.reshape(-1, 1), log_q.reshape(-1)
        element = np.tile(np.arange(draws.log_q[0].size), DRAWS)
        rows = np.concatenate([rows, element[:, None]], 1)
    total = 0.0
    for outcome in np.unique(rows, axis=0):
        is_it = (rows == outcome).all(1)
        density = np.exp(log_q.reshape(-1)[is_it])
        np.testing.assert_allclose(density, density[0], rtol=1e-4)
        if case == "masked element":
            continue  # the density is without the masked element
        number = DRAWS
        assert abs(is_it.sum() - number * density[0]) < 6 * np.sqrt(number * density[0]) + 1, outcome
        total += density[0]
    if case not in ("masked element", "common plates"):
        np.testing.assert_allclose(total, 1, rtol=1e-3)


def slopes_model():
    with numpyro.plate("predictor", 3):
        slope = numpyro.sample("slope", dist.Normal(jnp.array([0.0, 1.0, -2.0]), jnp.array([1.0, 0.5, 2.0])))
    scale = numpyro.sample("scale", dist.LogNormal(0.2 * slope[0], 0.5))
    numpyro.sample("x", dist.Normal(slope @ jnp.ones(3), scale).mask(False), obs=0.5)


def simplex_model():
    with numpyro.plate("group", 2):
        numpyro.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    numpyro.sample("x", dist.Normal(0.0, 1.0).mask(False), obs=0.5)


@pytest.mark.parametrize("model", [slopes_model, simplex_model])
@pytest.mark.parametrize("make", [AutoMixed, AutoMultivariateNormal])
def test_continuous_draws_have_the_density_that_is_computed(model, make, mostly_defensive):
    """Weighted means are those of the prior, as there are no data: within 6 standard errors of 40,000 draws."""
    guide = make(model)
    draws = propose_pooled(fitted(model, guide, moved(model, guide)), random.key(1), DRAWS)
    weight = np.exp(draws.log_weight.reshape(-1).astype(float))

    @jax.jit
    @jax.vmap
    def prior_of(key):
        return {
            name: site["value"]
            for name, site in trace(seed(model, key)).get_trace().items()
            if site["type"] == "sample"
        }

    prior = prior_of(random.split(random.key(2), DRAWS))
    error = weight.std() / DRAWS**0.5
    assert abs(weight.mean() - 1) < 6 * error < 0.1
    for name in draws.values:
        for function in (lambda x: x, np.square, lambda x: x * np.roll(x, 1, -1), lambda x: x < 0.3):
            of_draws, of_prior = (
                function(np.reshape(x[name], (DRAWS, -1)).astype(float)) for x in (draws.values, prior)
            )
            of_draws = of_draws * weight[:, None]
            error = np.sqrt((of_draws.var(0) + of_prior.var(0)) / DRAWS)
            assert (abs(of_draws.mean(0) - of_prior.mean(0)) < 6 * error).all(), name


def test_a_flow_without_an_inverse_is_not_defended():
    """Its weights need no density at other draws than its own; a finding says that it is not defended."""

    def model():
        c = numpyro.sample("c", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(c.sum(), 1.0), obs=0.5)

    guide = AutoBNAFNormal(model)
    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar(doubly_reparameterized=False))
    posterior = Posterior(svi, svi.run(random.key(0), 2, progress_bar=False))
    posterior.diagnose(100, random.key(1))
    assert "No draw takes 'c' from the model alone" in said(posterior)
