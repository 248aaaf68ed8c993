"""The fitted posterior as an object: what it is made from, what it gives, and that it goes on as one long run."""

from functools import partial

import jax
from jax import random
import jax.numpy as jnp
from jax.scipy.special import logsumexp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
import optax
import pytest
from scipy import stats

from helpers import codes, said
from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit

quietly = partial(fit, progress_bar=False)
X = np.array([1.5, 2.5, 1.9, 0.4], np.float32)


def switch(x):
    """A switch and a level, with a deterministic site: evidence and posterior are sums of two terms."""
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    numpyro.deterministic("mean", 2.0 * z + level)
    with numpyro.plate("row", 4 if x is None else len(x)):
        numpyro.sample("x", dist.Normal(2.0 * z + level, 1.0), obs=x)


def exact(x):
    """The log evidence, the mean of z, the mean of the level, and that of new data."""
    n = len(x)
    residual = np.asarray(x, float) - 2.0 * np.arange(2)[:, None]
    log_joint = stats.multivariate_normal(np.zeros(n), np.eye(n) + 1).logpdf(residual) + np.log([0.7, 0.3])
    share = np.exp(log_joint - np.logaddexp.reduce(log_joint))
    level = share @ (residual.sum(1) / (n + 1))
    return np.logaddexp.reduce(log_joint), share[1], level, 2 * share[1] + level


def new_svi(model=switch, **kwargs):
    return SVI(model, AutoMixed(model), optax.adam(0.02), VIMCOStar(0.5, 8), **kwargs)


@pytest.fixture(scope="module")
def posterior():
    return quietly(new_svi(), random.key(0), 400, X, num_starts=2)


@pytest.fixture(scope="module")
def single():
    """Of `svi.run`, with its `svi` and its result."""
    svi = new_svi()
    result = svi.run(random.key(0), 300, X, progress_bar=False)
    return svi, result, Posterior(svi, result, X)


def assert_same(one, other):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


# What it is made from.


def test_a_result_a_state_and_parameters_are_one_posterior(single):
    svi, result, posterior = single
    for form in (result.state, result.params):
        other = Posterior(svi, form, X)
        assert_same(other.params, posterior.params)
        assert other.losses.shape == (1, 0) and len(other.starts) == 1
        assert other.diagnose(200, random.key(1)).log_evidence == posterior.diagnose(200, random.key(1)).log_evidence
    np.testing.assert_array_equal(posterior.losses, result.losses[None])
    assert posterior.state is result.state and np.isnan(posterior.starts.log_evidence).all()
    assert posterior.starts.agreement is None and posterior.verdict != "good"


def test_a_state_of_a_fit_has_all_its_starts(posterior):
    svi = posterior._approx.svi
    other = Posterior(svi, posterior.state, X)
    assert_same(other.starts.params, posterior.starts.params)
    assert len(other.starts) == 2 and other.starts.agreement is not None
    # Other draws of the same guides.
    error = np.hypot(other.starts.log_evidence_std_error, posterior.starts.log_evidence_std_error)
    assert (abs(other.starts.log_evidence - posterior.starts.log_evidence) < 6 * error + 1e-5).all()


@pytest.mark.parametrize("form", [lambda p: p, lambda p: p.state], ids=["posterior", "state"])
def test_other_arguments(posterior, form):
    """More data of the same latents: the evidence is theirs, under the starts of the fit."""
    more = np.append(X, np.float32(1.2))
    other = Posterior(posterior._approx.svi, form(posterior), more)
    found = other.diagnose(20_000, random.key(1))
    assert abs(found.log_evidence - exact(more)[0]) < 6 * found.log_evidence_std_error < 0.1
    assert np.isfinite(other.starts.log_evidence).all() and other.starts.agreement.sizes["start"] == 2


def test_all_data_in_place_of_a_subsample():
    def model(x, size):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", len(x), subsample_size=size):
            numpyro.sample("x", dist.Normal(level, 1.0), obs=numpyro.subsample(x, event_dim=0))

    def guide(x, size):
        scale = numpyro.param("scale", 0.5, constraint=dist.constraints.positive)
        numpyro.sample("level", dist.Normal(numpyro.param("loc", 0.0), scale))

    svi = SVI(model, guide, optax.adam(0.02), VIMCOStar(1.0, 4))
    of_part = quietly(svi, random.key(0), 50, X, 2, num_starts=2)
    with pytest.raises(
        ValueError, match=r"Plate 'row' is subsampled \(2 of 4\).*`Posterior\(posterior.svi, posterior, ...\)`"
    ):
        of_part.diagnose()
    assert "verdict       none" in str(of_part) and "subsampled" in str(of_part)
    whole = Posterior(svi, of_part, X, 4)
    found = whole.diagnose(20_000)
    truth = stats.multivariate_normal(np.zeros(4), np.eye(4) + 1).logpdf(X)
    assert abs(found.log_evidence - truth) < 6 * found.log_evidence_std_error < 0.1


def test_static_and_keyword_arguments():
    def model(x, noise=1.0, shift=0.0):
        level = numpyro.sample("level", dist.Normal(shift, 1.0))
        numpyro.sample("x", dist.Normal(level, noise), obs=x)

    svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO(), shift=1.0)
    posterior = Posterior(svi, svi.run(random.key(0), 200, 0.5, noise=2.0, progress_bar=False), 0.5, noise=2.0)
    assert abs(posterior.diagnose(20_000).log_evidence - stats.norm(1, 5**0.5).logpdf(0.5)) < 0.02
    assert posterior.resume(3).losses.shape == (1, 203)


# What it gives.


def test_parameters_are_those_that_numpyro_takes(posterior):
    svi, guide = posterior._approx.svi, posterior._approx.svi.guide
    assert_same(posterior.params, jax.tree.map(lambda leaf: leaf[posterior.starts.best], posterior.starts.params))
    draws = guide.sample_posterior(random.key(1), posterior.params, X, sample_shape=(50,))
    assert draws["level"].shape == draws["z"].shape == (50,)
    predictive = Predictive(guide, params=posterior.params, num_samples=20)
    assert predictive(random.key(1), X)["level"].shape == (20,)
    predictive = Predictive(svi.model, guide=guide, params=posterior.params, num_samples=20)
    assert predictive(random.key(1), None)["x"].shape == (20, 4)


def test_what_is_known_is_that_of_the_diagnostics(posterior):
    found = posterior.diagnose(20_000, random.key(1))
    assert found is posterior.diagnostics and found.num_draws == 20_000
    names = "verdict", "findings", "log_evidence", "log_evidence_std_error", "bounds", "ess", "pareto_k"
    assert all(getattr(posterior, name) is getattr(found, name) for name in names)
    assert posterior.starts.agreement is found.agreement
    assert abs(found.log_evidence - exact(X)[0]) < 6 * found.log_evidence_std_error < 0.05
    assert posterior.verdict == "good" and codes(posterior) == ["starts-agree"]
    (finding,) = posterior.findings
    assert finding.numbers == {"agree": 2, "starts": 2} and "2 starts agree" in said(posterior)
    assert len(posterior.starts) == 2 and len(posterior.gradient_snr(num_draws=2)) == len(posterior.params)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes_of_draws(posterior, shape):
    draws = posterior.sample(random.key(1), shape)
    assert {name: value.shape for name, value in draws.items()} == {"z": shape, "level": shape}
    assert all(isinstance(value, jax.Array) for value in draws.values())


def test_draws_are_of_the_posterior(posterior):
    _, z, level, _ = exact(X)
    draws = posterior.sample(random.key(1), (10_000,))
    # 10,000 of 40,000 draws, of an ESS of a quarter of them or more: 6 standard errors of 5,000 are 0.043 and less.
    assert posterior.ess / posterior.diagnostics.num_draws > 0.25
    assert abs(draws["z"].mean() - z) < 6 * (z * (1 - z) / 5000) ** 0.5
    assert abs(draws["level"].mean() - level) < 6 * draws["level"].std() / 5000**0.5
    # One draw for each of many keys is one of the posterior too: 100 of them, and 6 standard errors.
    one_each = np.array([posterior.sample(key)["z"] for key in random.split(random.key(2), 100)])
    assert abs(one_each.mean() - z) < 6 * (z * (1 - z) / 100) ** 0.5


def test_a_bad_guide_has_right_draws():
    """Of a guide that has not been fitted; its own draws of z have a mean of about a half."""
    x, svi = X[:2] + np.float32(0.5), new_svi()
    posterior = Posterior(svi, svi.init(random.key(3), x), x)
    _, z, level, _ = exact(x)
    assert z > 0.6
    draws = posterior.sample(random.key(1), (10_000,))
    ess = posterior.to_arviz(num_samples=10_000, groups=())["posterior"].attrs["ess"]
    assert ess > 1000
    # The noise of the weighted proposals and that of the draws.
    number = 1 / (1 / ess + 1 / 10_000)
    assert abs(draws["z"].mean() - z) < 6 * (z * (1 - z) / number) ** 0.5
    assert abs(draws["level"].mean() - level) < 6 * draws["level"].std() / number**0.5


def test_two_calls_without_a_key_agree(single):
    svi, result, posterior = single
    one, other = posterior.diagnose(300), posterior.diagnose(300)
    assert (
        one.log_evidence == other.log_evidence
        and one.log_evidence != posterior.diagnose(300, random.key(5)).log_evidence
    )
    trees = [posterior.to_arviz(num_samples=50), posterior.to_arviz(num_samples=50)]
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        assert_same(dict(trees[0][group].data_vars), dict(trees[1][group].data_vars))
    assert_same(posterior.gradient_snr(num_draws=5), posterior.gradient_snr(num_draws=5))
    again = Posterior(svi, result, X)
    assert again.diagnose(300).log_evidence == one.log_evidence
    assert_same(dict(again.to_arviz(num_samples=50)["posterior"].data_vars), dict(trees[0]["posterior"].data_vars))
    assert_same(again.predict(random.key(1), None), posterior.predict(random.key(1), None))


def test_what_is_expensive_is_kept(single, monkeypatch):
    posterior = Posterior(*single[:2], X)
    found = posterior.diagnostics
    monkeypatch.setattr("numpyro_vimco.diagnostics.verdict.diagnose", None)
    assert posterior.diagnostics is found and posterior.verdict and str(posterior) and posterior._repr_html_()
    posterior.to_arviz(groups=())
    monkeypatch.setattr("numpyro_vimco.posterior.posterior.draw_posterior", None)
    posterior.to_arviz()
    posterior.predict(random.key(0), None)


def test_printing(posterior):
    other = Posterior(posterior._approx.svi, posterior.params, X)
    assert repr(other) == "<Posterior: 1 start of 0 steps, not diagnosed yet>"
    posterior.diagnose(20_000, random.key(1))
    assert repr(posterior) == "<Posterior: 2 starts of 400 steps, verdict 'good'>"
    text = str(posterior)
    rows = [line.split()[0] for line in text.splitlines() if line[0] not in " -"]
    assert rows == ["verdict", "log", "bounds", "ESS", "Pareto", "starts"]
    assert "verdict       good" in text and f"{posterior.log_evidence:.3f} ± " in text and "2, which agree" in text
    assert "\n- 2 starts agree" in text and max(map(len, text.splitlines())) <= 88 and "\xa0" not in text
    html = posterior._repr_html_()
    assert html.startswith("<table><tr><th>verdict</th><td>good</td></tr>") and html.endswith("</li></ul>")
    # A remedy is code, and what is no HTML is escaped.
    single_html = other._repr_html_()
    assert "<code>fit(svi, rng_key, num_steps, ...)</code>" in single_html
    assert "Try `fit(svi, rng_key, num_steps, ...)`" in " ".join(str(other).split())


# Predictions.


def test_predictions_of_new_data(posterior):
    drawn = posterior.predict(random.key(1), None)
    assert set(drawn) == {"x", "mean"} and drawn["x"].shape == (1000, 4) and drawn["mean"].shape == (1000,)
    _, z, _, mean = exact(X)
    # The level given z has variance 1 / 5; 6 standard errors of 500 effective draws.
    sd = (1 / 5 + 4 * z * (1 - z)) ** 0.5 + 0.5
    assert abs(drawn["mean"].mean() - mean) < 6 * sd / 500**0.5
    assert abs(drawn["x"].mean() - mean) < 6 * sd / 500**0.5
    noise = drawn["x"] - drawn["mean"][:, None]
    assert abs(noise.std() - 1) < 6 / (2 * 4000) ** 0.5 and abs(noise.mean()) < 6 / 4000**0.5
    # They are those of `to_arviz` without a key, draw for draw.
    tree = posterior.to_arviz(predictions=drawn, groups=())
    np.testing.assert_allclose(tree["posterior"]["mean"].values[0], drawn["mean"], rtol=1e-6)
    assert tree["predictions"]["x"].shape == (1, 1000, 4)


def test_predictions_for_another_number_of_data(posterior):
    """No latent is in the plate, so that any number may be asked of."""
    drawn = posterior.predict(random.key(1), np.zeros(7, np.float32))
    assert set(drawn) == {"mean"}

    def model(x, size=4):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", size):
            local = numpyro.sample("local", dist.Normal(level, 0.5))
            numpyro.sample("x", dist.Normal(local, 0.5), obs=x)

    svi = SVI(model, AutoNormal(model), optax.adam(0.02), VIMCOStar(0.0, 8))
    posterior = Posterior(svi, svi.run(random.key(0), 1000, X, progress_bar=False), X)
    drawn = posterior.predict(random.key(1), None, size=6)
    # Elements of a plate of another size are others: drawn anew, around the level of the fit.
    assert set(drawn) == {"local", "x"} and drawn["local"].shape == (1000, 6)
    precision = 1 + 4 / 0.5
    level, variance = X.sum() / 0.5 / precision, 1 / precision
    assert abs(drawn["local"].mean() - level) < 6 * ((variance + 0.25 / 6) / 250) ** 0.5
    assert abs(drawn["local"].var() - (variance + 0.25)) < 0.1
    # Of the same size they are the fit's, and the data alone are new.
    assert set(posterior.predict(random.key(1), None)) == {"x"}


def ar1(y, length):
    """A state with a known decay, which is seen with noise."""

    def step(before, y):
        state = numpyro.sample("state", dist.Normal(0.8 * before, 0.5))
        numpyro.sample("y", dist.Normal(state, 0.3), obs=y)
        return state, None

    scan(step, 0.0, y, length=length)


def filtered(y):
    """Means and covariance of the states, all at once: they are Gaussian."""
    n = len(y)
    decay = np.eye(n) - 0.8 * np.eye(n, k=-1)
    precision = decay.T @ decay / 0.25 + np.eye(n) / 0.09
    covariance = np.linalg.inv(precision)
    return covariance @ (np.asarray(y) / 0.09), covariance


def test_forecast_of_a_series_in_scan():
    y = jnp.array([0.3, 0.9, 1.4, 1.1, 1.6])

    def guide(y, length):
        loc = numpyro.param("loc", jnp.zeros(5))
        scale = numpyro.param("scale", jnp.full(5, 0.3), constraint=dist.constraints.positive)
        scan(lambda carry, at: (carry, numpyro.sample("state", dist.Normal(*at))), 0.0, (loc, scale))

    svi = SVI(ar1, guide, optax.adam(0.02), VIMCOStar(0.0, 16))
    posterior = quietly(svi, random.key(0), 600, y, 5, num_starts=2)
    mean, covariance = filtered(y)
    drawn = posterior.predict(random.key(1), None, 8)
    assert set(drawn) == {"state", "y"} and drawn["state"].shape == (1000, 8)
    # The states of the fit stay as they are.
    draws = posterior.to_arviz(groups=())["posterior"]["state"].values[0]
    np.testing.assert_array_equal(drawn["state"][:, :5], draws)
    # The forecast decays from the last of them, and spreads; 500 effective draws.
    expected, variance = mean[-1], covariance[-1, -1]
    for t in range(5, 8):
        expected, variance = 0.8 * expected, 0.64 * variance + 0.25
        assert abs(drawn["state"][:, t].mean() - expected) < 6 * (variance / 500) ** 0.5
        assert abs(drawn["state"][:, t].var() / variance - 1) < 6 * (2 / 500) ** 0.5
        assert abs(drawn["y"][:, t].var() / (variance + 0.09) - 1) < 6 * (2 / 500) ** 0.5
    with pytest.raises(ValueError, match=r"Latent 'state' has shape \(5,\) in the fit and \(3,\) here. A forecast"):
        posterior.predict(random.key(1), None, 3)


def test_errors_of_predictions(posterior):
    with pytest.raises(ValueError, match="`predict` was given after the key does not fit `switch`: too many"):
        posterior.predict(random.key(0), None, 3)
    with pytest.raises(ValueError, match="`rng_key` is 0, but must be one key"):
        posterior.predict(0, None)

    def model(x, size=2):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(size), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    svi = SVI(model, AutoNormal(model), optax.adam(0.02), VIMCOStar())
    other = Posterior(svi, svi.get_params(svi.init(random.key(0), 1.0)), 1.0)
    with pytest.raises(ValueError, match="There is nothing to predict: all sites of the model are observed or of"):
        other.predict(random.key(0), 2.0)
    with pytest.raises(ValueError, match=r"Latent 'z' has shape \(2,\) in the fit and \(3,\) here, in a dimension"):
        other.predict(random.key(0), None, size=3)


# Going on.


def test_resumed_fit_is_one_long_run():
    """Bit for bit, with steps that look for what was lost, and the draws after them."""
    whole = quietly(
        new_svi(), random.key(2), 260, X, num_starts=2, tempering=lambda step: jnp.minimum(1, 0.02 + step / 80)
    )
    schedule = whole._fit.settings.tempering
    part = quietly(new_svi(), random.key(2), 90, X, num_starts=2, tempering=schedule)
    before = part.losses.copy()
    resumed = part.resume(150).resume(20)
    for name in ("losses", "inverse_temperature", "params", "log_evidence", "log_evidence_std_error", "failed"):
        assert_same(getattr(resumed.starts, name), getattr(whole.starts, name))
    assert_same(resumed.params, whole.params)
    assert_same(jax.tree.map(_data, resumed.state), jax.tree.map(_data, whole.state))
    one, other = resumed.diagnose(1000), whole.diagnose(1000)
    np.testing.assert_array_equal(one.log_weight, other.log_weight)
    assert (one.verdict, one.findings, one.bounds) == (other.verdict, other.findings, other.bounds)
    assert_same(resumed.sample(random.key(1), (10,)), whole.sample(random.key(1), (10,)))
    # The first one stays as it is.
    assert_same(part.losses, before)


def _data(leaf):
    return random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_a_single_fit_goes_on(single):
    svi, result, posterior = single
    resumed = posterior.resume(20, progress_bar=False)
    state = svi.run(random.key(9), 20, X, init_state=result.state, progress_bar=False)
    assert_same(resumed.params, state.params)
    np.testing.assert_array_equal(resumed.losses[0], np.concatenate([result.losses, state.losses]))


def test_parameters_alone_cannot_go_on(single, posterior):
    for result in (single[1].params, posterior.state):
        svi = single[0] if isinstance(result, dict) else posterior._approx.svi
        with pytest.raises(ValueError, match=r"does not know the optimiser's state or the schedule\. Go on by"):
            Posterior(svi, result, X).resume(2)
    with pytest.raises(ValueError, match=r"`num_steps` is 2\.5, but must be an integer of at least 0"):
        posterior.resume(2.5)


# Wrong use.


def test_errors_of_a_result(single, posterior):
    svi, result, _ = single
    with pytest.raises(
        ValueError, match=r"`Posterior` was given .* does not fit `switch`: missing a required argument"
    ):
        Posterior(svi, result)
    with pytest.raises(ValueError, match="does not fit `switch`: got an unexpected keyword argument 'num_samples'"):
        Posterior(svi, result, X, num_samples=10)
    with pytest.raises(ValueError, match=r"A posterior cannot be made from tuple: pass what `svi\.run` returned"):
        Posterior(svi, (1, 2), X)
    with pytest.raises(ValueError, match="The guide has a parameter 'z_auto_logits', which the given ones lack: 'loc'"):
        Posterior(svi, {"loc": jnp.zeros(())}, X)
    for state in (result.state, posterior.state):
        with pytest.raises(ValueError, match="this `svi` was never initialised"):
            Posterior(new_svi(), state, X)

    def other(x):
        numpyro.sample("level", dist.Normal(numpyro.param("loc", 0.0), 1.0))
        numpyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="The guide has a parameter 'loc', which the given ones lack"):
        Posterior(SVI(switch, other, optax.adam(0.1), VIMCOStar()), result, X)


@pytest.mark.parametrize("shape", [1000, [10], (0,), (2.0,), np.array([3])])
def test_sample_shape_is_a_tuple(posterior, shape):
    with pytest.raises(ValueError, match=r"`sample_shape` is .*, but must be a tuple of positive integers, such as"):
        posterior.sample(random.key(0), shape)


def test_errors_of_numbers_and_keys(posterior):
    with pytest.raises(ValueError, match="`num_draws` is 99, but must be an integer of at least 100"):
        posterior.diagnose(99)
    with pytest.raises(ValueError, match="`num_draws` is 1, but must be an integer of at least 2"):
        posterior.gradient_snr(num_draws=1)
    for call in (posterior.diagnose, posterior.gradient_snr, posterior.to_arviz):
        with pytest.raises(ValueError, match="`rng_key` is 3, but must be one key"):
            call(rng_key=3)
    with pytest.raises(ValueError, match="`rng_key` is 3, but must be one key"):
        posterior.sample(3)


# A model with parameters of its own.

NOISE = np.random.default_rng(0)
POINTS = (np.where(NOISE.random(40) < 0.4, -2.0, 2.0) + NOISE.normal(size=40)).astype(np.float32)


def mixture(x):
    m = numpyro.param("m", lambda key: random.normal(key, (2,)))
    weight = numpyro.param("w", 0.5, constraint=dist.constraints.unit_interval)
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Bernoulli(weight))
        numpyro.sample("x", dist.Normal(m[k], 1.0), obs=x)


def mixture_guide(x):
    slope, offset = numpyro.param("slope", 0.0), numpyro.param("offset", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("k", dist.Bernoulli(logits=offset + slope * x))


def log_evidence_at(params):
    w = np.asarray(params["w"])
    log_p = np.log([1 - w, w])[:, None] + stats.norm.logpdf(POINTS, np.asarray(params["m"], float)[:, None])
    return float(logsumexp(log_p, axis=0).sum())


@pytest.fixture(scope="module")
def of_mixture():
    svi = SVI(mixture, mixture_guide, optax.adam(0.05), VIMCOStar(0.5, 8))
    return quietly(svi, random.key(1), 600, POINTS)


def test_each_start_has_the_evidence_of_its_own_parameters(of_mixture):
    starts = of_mixture.starts
    own = [log_evidence_at(jax.tree.map(lambda leaf, i=i: leaf[i], starts.params)) for i in range(4)]
    assert np.isfinite(starts.log_evidence).all()
    assert (abs(starts.log_evidence - own) < 6 * starts.log_evidence_std_error + 0.01).all()
    agreement = starts.agreement
    assert (abs(agreement["log_evidence"] - own) < 6 * agreement["log_evidence_std_error"] + 0.01).all()
    assert agreement["quantity"].size and all("log evidence" in str(name) for name in agreement["quantity"].values)
    assert starts.best == int(np.argmax(starts.log_evidence))
    assert abs(of_mixture.log_evidence - own[starts.best]) < 6 * of_mixture.log_evidence_std_error + 0.01


def test_a_start_that_is_relabelled_is_not_stuck(of_mixture):
    m = np.asarray(of_mixture.starts.params["m"])
    # Some have the low mean first, some the high one.
    assert len(set((m[:, 0] < m[:, 1]).tolist())) == 2 and (abs(np.sort(m, 1) - [-2, 2]) < 0.7).all()
    assert "start-stuck" not in codes(of_mixture) and "stuck" not in said(of_mixture)
    assert of_mixture.verdict == "good", str(of_mixture)


def test_draws_are_those_of_the_best_start(of_mixture):
    params = of_mixture.params
    w, m = np.asarray(params["w"]), np.asarray(params["m"])
    log_p = np.log([1 - w, w])[:, None] + stats.norm.logpdf(POINTS, m[:, None])
    k = np.exp(log_p[1] - np.logaddexp(*log_p))
    draws = of_mixture.sample(random.key(1), (4000,))["k"]
    # 16,000 proposals; 6 standard errors of 2,000 draws.
    np.testing.assert_array_less(abs(np.asarray(draws).mean(0) - k), 6 * (k * (1 - k) / 2000) ** 0.5 + 1e-3)
