"""Structured guides find posteriors whose truth is known. Long: each fit takes thousands of steps."""

import itertools

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
import pytest
from scipy.special import softmax
from scipy.stats import norm, poisson

from benchmarks.agreement import measure
from benchmarks.posteriors import problem, recommended
from numpyro_vimco import AutoMixed, VIMCOStar, fit


def fits(model, args, num_steps, site, num_starts=5, num_draws=40_000):
    """For each start by itself: the weighted mean of a site, the ELBO, and what the weights say."""
    guide = AutoMixed(model, structure="autoregressive")
    svi = SVI(model, guide, optax.adam(recommended(num_steps)), VIMCOStar(0.5, num_particles=64))
    posterior = fit(svi, random.key(0), num_steps, *args, num_starts=num_starts, progress_bar=False)
    draws = posterior.to_arviz(rng_key=random.key(1), num_samples=num_draws, resample=False, pool=False, groups=())
    log_weights, found = draws["sample_stats"]["log_weight"].values.astype(float), draws["posterior"]
    for i, (log_weight, values) in enumerate(zip(log_weights, found[site].values)):
        estimate = np.tensordot(softmax(log_weight), values, 1)
        yield estimate, log_weight.mean(), {name: found.attrs[name][i] for name in ("log_evidence", "ess", "pareto_k")}


@pytest.mark.long
@pytest.mark.parametrize(
    "name, relative_ess", [("diabetes", 0.25), ("correlated_design", 0.4), ("strongly_correlated_design", 0.4)]
)
def test_variable_selection(name, relative_ess):
    about = problem(name)
    log_evidence = about.truth.log_evidence
    for estimate, elbo, of_weights in fits(about.model, about.args, about.num_steps, "included"):
        assert np.abs(estimate - about.truth.means["included"]).max() < 0.02
        # Rare defensive draws make k larger than the guides' own, which is no danger at such an ESS.
        assert of_weights["ess"] > relative_ess * 40_000
        assert log_evidence - 1 < elbo
        assert abs(of_weights["log_evidence"] - log_evidence) < 0.03


@pytest.mark.weekly
@pytest.mark.long
def test_change_points():
    about = problem("change_points")
    for estimate, _, of_weights in fits(about.model, about.args, about.num_steps, "switch", num_starts=3):
        assert np.abs(estimate - about.truth.means["switch"]).max() < 0.03
        assert abs(of_weights["log_evidence"] - about.truth.log_evidence) < 0.1


@pytest.mark.weekly
@pytest.mark.long
def test_karate_club():
    about = problem("karate_club")
    for estimate, _, _ in fits(about.model, about.args, about.num_steps, "group"):
        assert np.abs(estimate - about.truth.means["group"]).max() < 0.02


# A part of benchmarks/agreement.py: rate, α, tempering and κ of fits of four starts.


@pytest.mark.weekly
@pytest.mark.long
@pytest.mark.parametrize("name", ["diabetes", "strongly_correlated_design"])
def test_right_fits_are_called_good(name):
    one, four = measure(name, 0, 0.01, 0.5, 0.5, 0.3)
    assert one["verdict"] == "usable" and four["verdict"] == "good"
    assert float(four["error"]) < 0.02 and not four["wrong"]


@pytest.mark.weekly
@pytest.mark.long
@pytest.mark.parametrize(
    "setting",
    [("diabetes", 2, 0.1, 0.1, 0, 1.0), ("strongly_correlated_design", 5, 0.05, 0.5, 0.5, 0.3)],
    ids=["couplings too fast", "rate too large"],
)
def test_wrong_fits_are_not_called_good(setting):
    """The fit of diabetes is off by 11 nats."""
    for row in measure(*setting):
        assert row["wrong"] and row["verdict"] != "good"


# Small models of other kinds.


def switches(y):
    on = [numpyro.sample(f"switch_{i}", dist.Bernoulli(0.5)) for i in range(3)]
    numpyro.sample("y", dist.Normal(sum(on), 0.3), obs=y)  # exactly one is on, no matter which


@pytest.mark.long
def test_competing_switches():
    guide = AutoMixed(switches, structure="autoregressive")
    svi = SVI(switches, guide, optax.adam(optax.cosine_decay_schedule(0.02, 2000)), VIMCOStar(0.5, num_particles=16))
    starts = fit(svi, random.key(0), 2000, 1.0, num_starts=5, progress_bar=False).starts
    for i in range(5):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], starts.params)
        draws = guide.sample_posterior(random.key(1), params, sample_shape=(40_000,))
        for name in ("switch_0", "switch_1", "switch_2"):
            assert abs(draws[name].mean() - 1 / 3) < 0.02


def components(predictors, y):
    """The number of components decides which of six weights matter."""
    number = numpyro.sample("number", dist.DiscreteUniform(1, 6))
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(6), 1).to_event(1))
    mean = predictors @ (weights * (jnp.arange(6) < number))
    numpyro.sample("y", dist.Normal(mean, 1).to_event(1), obs=y)


def scaled(y):
    """A count that scales a vector."""
    number = numpyro.sample("number", dist.Poisson(3.0))
    direction = numpyro.sample("direction", dist.Normal(jnp.zeros(4), 1).to_event(1))
    numpyro.sample("y", dist.Normal(number * direction, 0.5).to_event(1), obs=y)


TABLE = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0], [0.5, 2.5, 1.5]])
ROWS, COLUMNS = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])


def interaction(y):
    """Two categories with an interaction."""
    row = numpyro.sample("row", dist.Categorical(jnp.asarray(ROWS)))
    column = numpyro.sample("column", dist.Categorical(jnp.asarray(COLUMNS)))
    numpyro.sample("y", dist.Normal(jnp.asarray(TABLE)[row, column], 0.3), obs=y)


def small_cases():
    rng = np.random.default_rng(0)
    predictors = rng.normal(size=(20, 6))
    y = predictors[:, :3] @ np.array([0.8, -0.6, 0.5]) + rng.normal(size=20)
    covariances = [predictors[:, :k] @ predictors[:, :k].T + np.eye(20) for k in range(1, 7)]
    log_joint = [
        -0.5 * (20 * np.log(2 * np.pi) + np.linalg.slogdet(c)[1] + y @ np.linalg.solve(c, y)) - np.log(6)
        for c in covariances
    ]
    to_float = lambda *x: tuple(jnp.asarray(value, jnp.float32) for value in x)  # noqa: E731
    yield components, to_float(predictors, y), np.logaddexp.reduce(log_joint), "number"
    y, number = np.array([2.0, -1.5, 3.0, 0.5]), np.arange(80)
    log_likelihood = norm(0, np.sqrt(number[:, None] ** 2 + 0.25)).logpdf(y).sum(1)
    yield scaled, to_float(y), np.logaddexp.reduce(poisson(3.0).logpmf(number) + log_likelihood), "number"
    log_joint = np.log(np.outer(ROWS, COLUMNS)) + norm(TABLE, 0.3).logpdf(2.2)
    yield interaction, (2.2,), np.logaddexp.reduce(log_joint.ravel()), "row"


@pytest.mark.long
@pytest.mark.parametrize("case", range(3), ids=["components", "scaled by a count", "interaction"])
def test_small_models(case):
    model, args, log_evidence, site = next(itertools.islice(small_cases(), case, None))
    for _, _, of_weights in fits(model, args, 4000, site, num_starts=3):
        assert abs(of_weights["log_evidence"] - log_evidence) < 0.05
