"""Bad input is met with a sentence that names the culprit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import condition
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDAIS, AutoMultivariateNormal
import optax
import pytest
from scipy.stats import norm

from numpyro_vimco import (
    REINFORCE,
    VIMCO,
    AutoMixed,
    ImportanceWeightedELBO,
    Posterior,
    ReweightedWakeSleep,
    VIMCOStar,
    fit,
)

X = np.arange(4.0)


def latent(name="z", **kwargs):
    return numpyro.sample(name, dist.Bernoulli(0.5), **kwargs)


def proposal(name="z", **kwargs):
    return numpyro.sample(name, dist.Bernoulli(logits=numpyro.param(f"{name}_logits", 0.1)), **kwargs)


def loss(model, guide, *args):
    return VIMCOStar(num_particles=2).loss(jax.random.key(0), {}, model, guide, *args)


@pytest.mark.parametrize("objective", [VIMCOStar, VIMCO, REINFORCE, ReweightedWakeSleep])
@pytest.mark.parametrize("num_particles", [1, 0, -3, 2.5, "many"])
def test_fewer_than_two_particles(objective, num_particles):
    with pytest.raises(ValueError, match="num_particles"):
        objective(num_particles=num_particles)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0", None])
def test_alpha_outside_of_its_range(alpha):
    with pytest.raises(ValueError, match=r"`alpha` .* \[0, 1\]"):
        VIMCOStar(alpha)


def test_unknown_baseline():
    with pytest.raises(ValueError, match="`baseline` is 'harmonic', but must be one of 'geometric', 'arithmetic'"):
        VIMCO(baseline="harmonic")


def test_vectorize_particles_of_the_wrong_type():
    with pytest.raises(ValueError, match="vectorize_particles"):
        VIMCOStar(vectorize_particles="vmap")


def test_base_class_has_no_signal():
    with pytest.raises(NotImplementedError, match="score_signal"):
        ImportanceWeightedELBO().loss(jax.random.key(0), {}, latent, proposal)


def test_latent_site_that_the_guide_lacks():
    def model():
        latent("z"), latent("y")

    with pytest.raises(ValueError, match="Latent site 'y' of the model is missing from the guide"):
        loss(model, proposal)


def test_guide_site_that_the_model_lacks():
    def guide():
        proposal("z"), proposal("u")

    with pytest.raises(
        ValueError, match=r"Site 'u' is sampled in the guide, but the model has no such site.*auxiliary"
    ):
        loss(latent, guide)


def auxiliary(fn, name="u"):
    return numpyro.sample(name, fn, infer={"is_auxiliary": True})


def not_determined(case):
    u = auxiliary(dist.Bernoulli(0.5) if case == "discrete" else dist.Normal(0, 1).mask(case != "masked"))
    loc = numpyro.param("loc", 0.1)
    numpyro.sample("a", dist.Normal(loc + u, 1.0) if case in ("discrete", "mixed over") else dist.Delta(loc + u))
    numpyro.sample("b", dist.Delta(2.0 * u) if case == "one for two" else dist.Normal(0.0, 1.0))
    if case == "one of two":
        auxiliary(dist.Normal(0, 1), "v")


@pytest.mark.parametrize("case", ["discrete", "mixed over", "one for two", "masked", "one of two"])
def test_auxiliary_site_that_latents_do_not_determine(case):
    """Its density would not be cancelled: log 2 too much for a fair coin."""

    def model():
        a, b = (numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        numpyro.sample("x", dist.Normal(a + b, 1.0), obs=0.4)

    with pytest.raises(ValueError, match=f"the auxiliary site '{'v' if case == 'one of two' else 'u'}', which"):
        loss(model, lambda: not_determined(case))


def given_a_coin():
    u = latent("u")
    numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.3) + u, 0.8))


PRIORS = {True: dist.Normal(0.0, 1.0), False: dist.HalfNormal(1.0)}


def model_of(coin):
    z = numpyro.sample("z", PRIORS[coin])
    numpyro.sample("x", dist.Normal(z, 1.0), obs=0.4)
    if coin:
        numpyro.sample("u", dist.Bernoulli(logits=z))


AUXILIARY = {
    "in the model too": (given_a_coin, True),
    "AutoMultivariateNormal": (AutoMultivariateNormal(partial(model_of, False), init_scale=1.0), False),
    "AutoDAIS": (AutoDAIS(partial(model_of, False), init_scale=1.0), False),
}


@pytest.mark.parametrize("name", AUXILIARY)
def test_weights_beside_auxiliary_sites_have_the_evidence_for_their_mean(name):
    """Of 20 means of 1,000 weights each; six standard errors fail less than once in a million runs."""
    guide, coin = AUXILIARY[name]
    model = partial(model_of, coin)
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar())
    params = svi.get_params(svi.init(jax.random.key(0)))
    estimate = jax.jit(lambda key: jnp.exp(-VIMCOStar(0.0, 1000).loss(key, params, model, guide)))
    means = np.array([estimate(key) for key in jax.random.split(jax.random.key(1), 20)])
    grid = np.arange(-7995 if coin else 5, 8000, 10) / 1000
    exact = np.exp(PRIORS[coin].log_prob(grid) + dist.Normal(grid, 1.0).log_prob(0.4)).sum() / 100
    error = means.std(ddof=1) / 20**0.5
    assert abs(means.mean() - exact) < 6 * error < 0.2 * exact


def test_site_observed_in_the_model_and_sampled_in_the_guide():
    with pytest.raises(ValueError, match="Site 'z' is sampled in the guide and observed in the model"):
        loss(lambda: latent("z", obs=1), proposal)


def test_site_latent_in_the_model_and_observed_in_the_guide():
    with pytest.raises(ValueError, match="Site 'z' is latent in the model and observed in the guide"):
        loss(latent, lambda: proposal("z", obs=1))


def test_sites_of_different_shapes():
    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(3))))

    with pytest.raises(ValueError, match="shapes disagree at site 'z'"):
        loss(latent, guide)


@pytest.mark.parametrize("where", ["model", "guide"])
def test_subsampled_plate_that_is_not_common_to_all_sites(where):
    def model():
        latent("g")
        with numpyro.plate("data", 4, subsample_size=2):
            latent("z")

    def everything_in_plate():
        with numpyro.plate("data", 4, subsample_size=2):
            latent("z")

    def guide():
        if where == "model":
            proposal("g")
        else:
            numpyro.factor("g", 0.0)
        with numpyro.plate("data", 4, subsample_size=2):
            proposal("z")

    with pytest.raises(ValueError, match=r"Plate 'data' is subsampled \(2 of 4\), but site 'g' is outside of it"):
        loss(model if where == "model" else everything_in_plate, guide)


def test_plate_of_two_sizes():
    def program(size, sample):
        with numpyro.plate("data", size):
            sample("z")

    with pytest.raises(ValueError, match="Plate 'data' has size 3 in the guide and 4 in the model"):
        loss(lambda: program(4, latent), lambda: program(3, proposal))


def test_density_with_a_dimension_that_no_plate_explains():
    def model():
        z = latent()
        with numpyro.plate("data", 4):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=X[:, None])

    with pytest.raises(ValueError, match=r"site 'x' has shape \(4, 4\), which its plates do not explain \('data'"):
        loss(model, proposal)


def test_density_that_is_an_outer_product_outside_of_plates():
    def model():
        latent()
        numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0), obs=X[:, None])

    with pytest.raises(ValueError, match=r"site 'x' has shape \(4, 3\), which its plates do not explain"):
        loss(model, proposal)


def test_batch_outside_of_plates_is_summed_as_numpyro_does():
    def model():
        z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0))
        numpyro.sample("x", dist.Normal(z.sum(), 1.0), obs=X)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(3)), 1.0))

    key = jax.random.key(0)
    expected = numpyro.infer.RenyiELBO(0, 2).loss(key, {}, model, guide)
    np.testing.assert_allclose(VIMCOStar(num_particles=2).loss(key, {}, model, guide), expected, rtol=1e-6)


def test_guide_without_parameters_is_a_warning():
    with pytest.warns(UserWarning, match="guide has no parameters"):
        loss(latent, latent)


def test_mutable_state_is_not_supported():
    def model():
        latent()
        numpyro.primitives.mutable("state", {"count": 0.0})

    svi = numpyro.infer.SVI(model, proposal, optax.sgd(0.1), VIMCOStar(num_particles=2))
    state = svi.init(jax.random.key(0))
    for call in (svi.update, svi.evaluate):
        with pytest.raises(NotImplementedError, match="site 'state'"):
            call(state)


# Arguments of another length than in the fit.

SERIES = jnp.array([0.3, -0.2, 0.5])


def forecasting(y, future=0):
    s = numpyro.sample("s", dist.HalfNormal(1.0))

    def step(before, _):
        value = numpyro.sample("y", dist.Normal(0.5 * before, s))
        return value, None

    with condition(data={"y": y}):
        scan(step, 0.0, None, length=len(y) + future)


def guide_of_s(y, future=0):
    numpyro.sample("s", dist.LogNormal(numpyro.param("loc", -0.9), numpyro.param("scale", 0.4)))


OF_S = {"loc": jnp.array(-0.9), "scale": jnp.array(0.4)}


def test_times_that_a_conditioned_series_does_not_reach_are_no_data_after_the_fit():
    svi = SVI(forecasting, guide_of_s, optax.adam(0.01), VIMCOStar())
    with pytest.raises(ValueError, match="Site 'y' is observed, but its value is drawn, in part at least"):
        Posterior(svi, OF_S, SERIES, future=10)


def test_a_whole_series_that_is_conditioned_is_data():
    svi = SVI(forecasting, guide_of_s, optax.adam(0.01), VIMCOStar())
    fit(svi, jax.random.key(0), 1, SERIES, num_starts=1, progress_bar=False)
    posterior = Posterior(svi, OF_S, SERIES)
    found = posterior.diagnose(40_000, jax.random.key(0))
    s = np.linspace(1e-3, 8, 100_000)[:, None]
    means = 0.5 * np.array([0, 0.3, -0.2])
    density = 2 * norm.pdf(s[:, 0]) * norm.pdf(np.asarray(SERIES), means, s).prod(1)
    exact = np.log(np.trapezoid(density, s[:, 0]))
    assert abs(found.log_evidence - exact) < 6 * found.log_evidence_std_error < 0.05
    np.testing.assert_array_equal(posterior.to_arviz()["observed_data"]["y"], SERIES)


def of_five_times(step, **data):
    """A `scan` of five times."""

    def model():
        numpyro.sample("s", dist.HalfNormal(1.0))
        with condition(data=data):
            scan(lambda carry, _: (step(carry), None), 0.0, None, length=5)

    return model


def noisy():
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    noise = jax.random.normal(numpyro.prng_key(), (3,))
    with numpyro.plate("times", 3):
        numpyro.sample("y", dist.Normal(0.0, s), obs=SERIES + noise)


def rarely(carry):  # two draws of it are the same
    return carry + numpyro.sample("y", dist.Poisson(1e-9))


def latent_and_data(carry):
    state = numpyro.sample("state", dist.Normal(carry, 1.0))
    numpyro.sample("y", dist.Normal(state, 1.0), obs=0.5)
    return state


PARTLY_DRAWN = {
    "forecast": (lambda: forecasting(SERIES, 2), "y"),
    "equal draws": (of_five_times(rarely, y=jnp.zeros(3, int)), "y"),
    "around the model": (condition(of_five_times(rarely), data={"y": jnp.zeros(3, int)}), "y"),
    "latent": (of_five_times(latent_and_data, state=SERIES), "state"),
    "noise": (noisy, "y"),
}


@pytest.mark.parametrize("case", PARTLY_DRAWN)
def test_data_that_are_drawn_in_part_cannot_be_fitted(case):
    model, name = PARTLY_DRAWN[case]
    svi = SVI(model, lambda: guide_of_s(SERIES), optax.adam(0.01), VIMCOStar())
    with pytest.raises(ValueError, match=f"Site '{name}' is observed, but its value is drawn"):
        fit(svi, jax.random.key(0), 1, progress_bar=False)


def test_data_of_a_subsample_are_no_drawn_ones():
    def model():
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        with numpyro.plate("times", 3, subsample_size=2) as index:
            numpyro.sample("y", dist.Normal(0.0, s), obs=SERIES[index])

    svi = SVI(model, lambda: guide_of_s(SERIES), optax.adam(0.01), VIMCOStar(1.0))
    assert not fit(svi, jax.random.key(0), 1, num_starts=1, progress_bar=False).starts.failed.any()


def in_a_plate(y):
    with numpyro.plate("times", len(y)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def with_gaps(y):
    numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("times", len(y)):
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=jnp.arange(len(y)) > 0)


def in_scan(y):
    def step(before, value):
        z = numpyro.sample("z", dist.Normal(before, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=value)
        return z, None

    scan(step, 0.0, y)


OTHER_LENGTHS = {
    "longer": (in_a_plate, 3, 5, r"shapes disagree at site 'z': \(5,\) vs \(3,\).*that it was fitted with"),
    "shorter": (in_a_plate, 3, 2, r"shapes disagree at site 'z': \(2,\) vs \(3,\)"),
    "longer than one": (in_a_plate, 1, 5, "Plate 'times' has size 1 in the guide and 5 in the model.*was fitted with"),
    "one": (in_a_plate, 3, 1, "Plate 'times' has size 3 in the guide and 1 in the model"),
    "obs_mask": (with_gaps, 3, 5, r"shapes disagree at site 'y_unobserved': \(5,\) vs \(3,\)"),
    "scan": (in_scan, 3, 5, r"draws 'z' inside of `scan`, at 5 times, .* shape \(3,\).*that it was fitted with"),
}


@pytest.mark.parametrize("case", OTHER_LENGTHS)
def test_latents_of_another_length_than_in_the_fit(case):
    model, length, other, message = OTHER_LENGTHS[case]
    svi = SVI(model, AutoMixed(model), optax.adam(0.01), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), jnp.zeros(length)))
    with pytest.raises(ValueError, match=message):
        Posterior(svi, params, jnp.zeros(other))


def test_latents_in_a_plate_of_scan_of_another_length_than_in_the_fit():
    def model(y):
        scan(lambda carry, _: (carry, in_a_plate(y)), None, None, length=2)

    def guide(y):
        numpyro.sample("z", dist.Normal(numpyro.param("z_loc", jnp.zeros((2, 3))), 1.0))

    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar())
    with pytest.raises(ValueError, match=r"shapes disagree at site 'z': \(5,\) vs \(3,\)"):
        Posterior(svi, {"z_loc": jnp.zeros((2, 3))}, jnp.zeros(5))


def common(y, size=None):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with condition(data={"y": y}), numpyro.plate("times", size or len(y)):
        numpyro.sample("y", dist.Normal(m, 1.0))


def guide_of_m(y, size=None):
    numpyro.sample("m", dist.Normal(numpyro.param("m_loc", 0.1), numpyro.param("m_scale", 0.6)))


OF_M = {"m_loc": jnp.array(0.1), "m_scale": jnp.array(0.6)}


def test_data_that_are_shorter_than_their_plate():
    svi = SVI(common, guide_of_m, optax.adam(0.01), VIMCOStar())
    with pytest.raises(ValueError, match=r"data of site 'y' have shape \(3,\), but its distribution has shape \(5,\)"):
        Posterior(svi, OF_M, SERIES, 5)


@pytest.mark.parametrize("length", [2, 5])
def test_a_guide_without_latents_of_elements_proposes_for_data_of_any_length(length):
    svi = SVI(common, guide_of_m, optax.adam(0.01), VIMCOStar())
    y = jnp.linspace(-0.5, 1.0, length)
    found = Posterior(svi, OF_M, y).diagnose(40_000, jax.random.key(0))
    exact = dist.MultivariateNormal(jnp.zeros(length), jnp.eye(length) + 1).log_prob(y)
    assert abs(found.log_evidence - exact) < 6 * found.log_evidence_std_error < 0.05


def test_invalid_arguments_of_a_distribution_that_are_computed():
    """The set-up runs in programs, where NumPyro's own validation sees nothing."""

    def model(x):
        z = latent()
        numpyro.sample("x", dist.Normal(z, jnp.min(x) - 5.0), obs=x)

    svi = SVI(model, AutoMixed(model), optax.adam(0.1), VIMCOStar())
    with pytest.raises(ValueError, match=r"Site 'x' is wrong\. NumPyro says: Normal .* invalid scale"):
        fit(svi, jax.random.key(0), 3, X)
