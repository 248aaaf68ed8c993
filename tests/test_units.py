"""A fit does not depend on units: locations are in units of the prior, and steps in units of the guide's own scale."""

from functools import partial

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to
from numpyro.handlers import seed, trace
from numpyro.infer import SVI
import numpyro.optim
import optax
import pytest

from numpyro_vimco import AutoDiscrete, AutoMixed, VIMCOStar, fit
from numpyro_vimco.families.units import PositiveInUnits, RealInUnits, location_and_scale, prior_draws
from numpyro_vimco.fitting.renewing import RenewedUnits, with_params
from numpyro_vimco.fitting.tempering import FIRST, LOWEST, first_inverse_temperature


def switch(x, unit):
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 10 * unit).to_event(1))
    z = numpyro.sample("z", dist.Bernoulli(0.4))
    y = numpyro.sample("y", dist.Normal(mu[0] + 3 * unit * z, unit))
    numpyro.sample("x", dist.Normal(y + mu[1], 3 * unit), obs=x * unit)


@pytest.mark.parametrize("structure", ["autoregressive", "conditional", "mean_field"])
def test_a_program_in_other_units_has_the_same_fit(structure):
    """The unit is a power of two, by which floating point scales exactly; what is left is rounding of sums."""
    found = {}
    for unit in (1.0, 2.0**20):
        svi = SVI(switch, AutoMixed(switch, structure=structure), optax.adam(0.1), VIMCOStar(0.5))
        found[unit] = fit(svi, random.key(0), 10, 20.0, unit, num_starts=2, progress_bar=False).starts
    one, other = found.values()
    for name, value in one.params.items():
        is_length = name in (
            "mu_auto_loc",
            "mu_auto_scale",
            "y_auto_loc",
            "y_auto_scale",
            "y_auto_loc_z",
            "mu_auto_loc_z",
        )
        np.testing.assert_allclose(
            other.params[name],
            value * (2.0**20 if is_length else 1),
            rtol=2e-3,
            atol=1e-3 * np.abs(value).max() * (2.0**20 if is_length else 1),
        )
        assert np.abs(value).max() > 0
    np.testing.assert_allclose(other.log_evidence, one.log_evidence - 20 * np.log(2), atol=1e-2)


def test_a_guide_begins_as_wide_as_the_prior():
    def model():
        numpyro.sample("a", dist.Normal(5.0, jnp.array([0.01, 1000.0])).to_event(1))
        numpyro.sample("b", dist.LogNormal(3.0, 2.0))

    params = {site["name"]: site["value"] for site in trace(seed(AutoMixed(model), 0)).get_trace().values()}
    np.testing.assert_allclose(params["a_auto_scale"], [0.01, 1000.0], rtol=0.4)  # of 200 draws
    np.testing.assert_allclose(params["b_auto_scale"], 2.0, rtol=0.4)
    half = {s["name"]: s["value"] for s in trace(seed(AutoMixed(model, init_scale=0.5), 0)).get_trace().values()}
    np.testing.assert_allclose(half["a_auto_scale"], params["a_auto_scale"] / 2)


def test_a_large_count_moves_by_a_share_of_its_scale():
    """Of Poisson(1e6), a step of 0.01 is 0.01 of the scale of 550, not 1% of a million."""

    def model():
        numpyro.sample("n", dist.Poisson(1e6))
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=0.0)

    svi = SVI(model, AutoDiscrete(model), numpyro.optim.Adam(0.01), VIMCOStar())
    state = svi.init(random.key(0))
    before = svi.get_params(state)
    after = svi.get_params(svi.update(state)[0])
    step = abs(after["n_auto_loc"] - before["n_auto_loc"]) / before["n_auto_scale"]
    assert 0.005 < step < 0.02


def test_steps_are_in_units_of_the_guides_own_scale():
    constraint = RealInUnits(jnp.array(2.0), jnp.array(10.0), "scale")
    constrain = lambda params: {"loc": biject_to(constraint)(params["loc"]), "scale": jnp.exp(params["scale"])}  # noqa: E731
    params = {"loc": jnp.array(0.3), "scale": jnp.log(0.05)}
    for inner in (numpyro.optim.Adam(0.01), numpyro.optim.optax_to_numpyro(optax.adam(0.01))):
        optim = RenewedUnits(inner, {"loc": constraint}, constrain)
        loss = lambda params: (3.0 * constrain(params)["loc"], None)  # noqa: E731
        _, state = optim.eval_and_update(loss, inner.init(params))
        after = constrain(inner.get_params(state))["loc"]
        np.testing.assert_allclose(after, 5.0 - 0.01 * 0.05, rtol=1e-6)


def test_a_wide_guide_moves_by_the_prior_at_most():
    constraint = RealInUnits(0.0, jnp.array(2.0), "scale", "log_scale")
    params = {"scale": jnp.array([5.0, 0.2]), "log_scale": jnp.log(jnp.array([[1.0, 0.5], [1.0, 0.5]]))}
    np.testing.assert_allclose(constraint.shrinkage("loc", params), [[1, 1], [0.1, 0.05]], rtol=1e-6)
    relative = PositiveInUnits(jnp.log(100.0), jnp.array(0.1), "scale")
    params = {"loc": jnp.array([200.0, 1.0]), "scale": jnp.array([2.0, 3.0])}
    np.testing.assert_allclose(relative.shrinkage("loc", params), [0.1, 1], rtol=1e-6)
    np.testing.assert_allclose(biject_to(relative)(2.0), 100 * np.exp(0.2), rtol=1e-6)


@pytest.mark.parametrize(
    "optim", [numpyro.optim.Adam(0.1), numpyro.optim.optax_to_numpyro(optax.chain(optax.clip(1.0), optax.adam(0.1)))]
)
def test_parameters_of_a_state_are_replaced(optim):
    params = {"b": jnp.ones(2), "a": jnp.zeros(())}
    state = with_params(optim, optim.init(params), {"b": jnp.full(2, 3.0), "a": jnp.array(4.0)})
    assert jax.tree.map(float, optim.get_params(state)["a"]) == 4 and optim.get_params(state)["b"][0] == 3
    assert jax.tree.structure(state) == jax.tree.structure(optim.init(params))


def test_draws_of_the_prior_without_a_sampler():
    def model():
        a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("b", dist.Normal(a, 1.0))

    draws = prior_draws(model, (), {}, ["a", "b"])
    assert draws["a"].shape == (200,) and np.isfinite(draws["b"]).all()


def test_location_and_scale_of_draws_that_are_not_finite():
    draws = jnp.concatenate([jnp.linspace(-3, 3, 101), jnp.full(9, jnp.inf), jnp.full(3, jnp.nan)])
    location, scale = location_and_scale(draws)
    np.testing.assert_allclose([location, scale], [0, 3 * 0.6826], atol=0.01)
    assert [float(x) for x in location_and_scale(jnp.full(5, jnp.nan))] == [0, 1]
    assert float(location_and_scale(jnp.full(5, 2.0))[1]) == 1


def narrow(x, width):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(mu, width), obs=x)


def in_plate(x, width):
    with numpyro.plate("data", 1000):
        narrow(jnp.full(1000, x), width)


def test_the_first_inverse_temperature_is_where_data_hardly_count():
    first = partial(first_inverse_temperature, args=(0.5, 0.1), kwargs={}, joint_plates=())
    assert float(first(narrow)) == np.float32(FIRST)
    narrowest = first_inverse_temperature(narrow, (0.5, 1e-3), {}, ())
    # The log-likelihood spreads by about half a million nats.
    assert 1e-8 < narrowest < 1e-6
    assert float(first_inverse_temperature(narrow, (0.5, 1e-6), {}, ())) == np.float32(LOWEST)
    # Each element has a bound of its own, unless they share one.
    assert float(first(in_plate)) == np.float32(FIRST)
    assert float(first(in_plate, joint_plates=("data",))) < FIRST / 2
