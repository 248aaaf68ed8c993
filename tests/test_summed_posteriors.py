"""Problems whose discrete latents the truth sums out: it sums the joint of the model that users write."""

from importlib import import_module
import warnings

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import log_density
import pytest
from scipy.special import logit
from scipy.stats import beta, halfnorm, lognorm, multivariate_normal, poisson

pytest.importorskip("funsor")
from numpyro.contrib.funsor import enum
from numpyro.contrib.funsor import log_density as enumerated_log_density

from benchmarks.posteriors import cranes, epidemic, latent_multinomial, stochastic_volatility, threshold
from helpers import of_two_lengths

# At which parameters, in the order of the grid's axes.
ON_A_GRID = {
    "n_mixture": {"intercept": 1.3, "slope": 0.4, "logit_detection": -0.2},
    "occupancy": {"occupancy": 0.5, "habitat_slope": 0.7, "detection": -0.4, "weather_slope": 0.5},
    "capture_recapture": {"survival": 0.5, "flood_survival": 0.1, "detection": 1.2},
    "hares": {"logit_real": -0.2, "logit_shy": 0.6, "detection": 0.3, "log_shyness": 0.4},
}


def in_double_precision(x):
    return x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x


def enumerated(module, args, values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # funsor's, on JAX's deprecations
        return enumerated_log_density(enum(module.enumerated, first_available_dim=-3), args, {}, values)[0]


@pytest.mark.parametrize("name", of_two_lengths(ON_A_GRID, ["hares"]))
def test_quadrature_sums_the_model(name):
    module = import_module(f"benchmarks.posteriors.{name}")
    with jax.enable_x64(True):
        args = tuple(map(in_double_precision, module.data()))
        log_joint, _ = module.on_grid([np.array([x]) for x in ON_A_GRID[name].values()], *args)
        np.testing.assert_allclose(log_joint.item(), enumerated(module, args, ON_A_GRID[name]), rtol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("name", ["lsat6", "dawid_skene", "item_response", "old_faithful", "stick_breaking"])
def test_terms_of_elements_are_those_of_the_model(name):
    module = import_module(f"benchmarks.posteriors.{name}")
    with jax.enable_x64(True):
        args = module.data()
        sites = trace(seed(module.summed, random.key(1))).get_trace(*args)
        latents = (site for site in sites.values() if site["type"] == "sample" and not site["is_observed"])
        draw = {site["name"]: site["value"] for site in latents}
        discrete = module.draw_latents(random.key(2), draw, *args)
        terms = module.log_terms(draw, *args)  # (*states of each discrete latent, elements)
        shares = np.asarray(jax.nn.log_softmax(terms, axis=tuple(range(len(discrete)))))
        chosen = shares[(*discrete.values(), np.arange(terms.shape[-1]))]
        summed = log_density(module.summed, args, {}, draw)[0]
        joint = log_density(module.model, args, {}, {**draw, **discrete})[0]
        np.testing.assert_allclose(joint, summed + chosen.sum())
        np.testing.assert_allclose(enumerated(module, args, draw), summed)


def by_force(model, args, parameters, latents):
    """Log joint of parameters and data: that of the model, summed over each row of values of the discrete latents.

    :param latents: by name, values of shape (rows, *shape).
    """
    joint = lambda latents: log_density(model, args, {}, {**parameters, **latents})[0]  # noqa: E731
    return jax.scipy.special.logsumexp(jax.jit(jax.vmap(joint))(latents)).item()


def all_values(*ranges):
    """Rows with one of each."""
    return jnp.stack(jnp.meshgrid(*map(jnp.arange, ranges), indexing="ij"), -1).reshape(-1, len(ranges))


@pytest.mark.filterwarnings("ignore:Out-of-support values")
def test_numbers_alive_are_summed():
    growth, found, first = 1.1, 0.9, 2.5
    with jax.enable_x64(True):
        seen, alive = jnp.array([2.0, 1.0, 3.0]), 1 + all_values(30, 30, 30)
        parameters = {"growth": growth, "found": found, "first": first}
        known = by_force(cranes.model, (seen,), parameters, {"alive": alive})
    log_likelihood, _ = cranes.given_growth(growth, np.array([found]), poisson.pmf(np.arange(31), first), seen)
    log_prior = lognorm(0.2).logpdf(growth) + beta(38, 2).logpdf(found) + lognorm(0.5, scale=np.e**3).logpdf(first)
    np.testing.assert_allclose(log_likelihood.item() + log_prior, known, rtol=1e-9)


@pytest.mark.parametrize("size, seen", [(3, 1), (2, 0), (5, 4)])
@pytest.mark.filterwarnings("ignore:Out-of-support values")
def test_chains_of_a_household_are_summed(size, seen):
    parameters = {"outside": 0.2, "contact": 0.3, "found": 0.7}
    with jax.enable_x64(True):
        rows = all_values(*[size + 1] * 5)
        rows = rows[rows.sum(1) <= size]
        chains = {"first": rows[:, :1], "new": rows[:, 1:, None]}
        known = by_force(epidemic.model, (jnp.array([size]), jnp.array([seen])), parameters, chains)
    log_joint, _ = epidemic.on_grid([logit([p]) for p in parameters.values()], [size], [seen])
    log_volume = sum(np.log(p * (1 - p)) for p in parameters.values())  # of a probability by its logit
    np.testing.assert_allclose(log_joint.item(), known + log_volume, rtol=1e-9)


@pytest.mark.long
def test_coefficients_of_regimes_are_integrated_out():
    """The joint over the posterior of the coefficients, at any of them, is the evidence given the rest."""
    delay, at, noise = 1, 40, np.array([0.3, 0.6])
    coefficients = np.array([[0.3, 1.0, -0.1], [0.1, 1.2, -0.7]])
    with jax.enable_x64(True):
        args = tuple(map(in_double_precision, threshold.data()))
        parameters = {"delay": delay, "threshold": at, "coefficients": jnp.array(coefficients), "noise": noise}
        joint = log_density(threshold.model, args, {}, parameters)[0].item()
        lagged, before = map(np.asarray, threshold.regressors(args[0]))
    above, now = lagged[delay] > np.asarray(args[1])[at], np.asarray(args[0])[threshold.DELAYS :]
    known = -np.log(threshold.DELAYS * len(args[1])) + halfnorm.logpdf(noise).sum()
    for i, of_regime in enumerate((~above, above)):
        found, mean, covariance = threshold.given_noise(noise[i : i + 1], before[of_regime], now[of_regime])
        known += found[0] + multivariate_normal(mean[0], covariance[0]).logpdf(coefficients[i])
    np.testing.assert_allclose(joint, known, rtol=1e-9)


@pytest.mark.long
def test_delays_and_thresholds_are_summed():
    with jax.enable_x64(True):
        args = tuple(map(in_double_precision, threshold.data()))
        parameters = {"coefficients": jnp.array([[0.3, 1.0, -0.1], [0.1, 1.2, -0.7]]), "noise": jnp.array([0.3, 0.6])}
        rows = all_values(threshold.DELAYS, len(args[1]))
        known = by_force(threshold.model, args, parameters, {"delay": rows[:, 0], "threshold": rows[:, 1]})
        np.testing.assert_allclose(enumerated(threshold, args, parameters), known, rtol=1e-9)


def test_haplotypes_of_a_pool_are_summed():
    of_m, s_with_m, s_with_n = points = 0.6, 0.5, 0.1
    frequency = np.array([of_m * s_with_m, of_m * (1 - s_with_m), (1 - of_m) * s_with_n, (1 - of_m) * (1 - s_with_n)])
    with jax.enable_x64(True):
        reads, depth = (x[:, :1] for x in latent_multinomial.data())
        counts = all_values(*[latent_multinomial.CHROMOSOMES + 1] * 3)
        rest = latent_multinomial.CHROMOSOMES - counts.sum(1, keepdims=True)
        counts = jnp.concatenate([counts, rest], 1)[rest[:, 0] >= 0, None]
        args = reads.astype(float), depth
        known = by_force(latent_multinomial.model, args, {"frequency": frequency}, {"haplotypes": counts})
    log_joint, _ = latent_multinomial.on_grid([logit([p]) for p in points], reads, depth)
    # Of the four frequencies by the three probabilities, and of these by their logits.
    log_volume = np.log(of_m * (1 - of_m)) + sum(np.log(p * (1 - p)) for p in points)
    np.testing.assert_allclose(log_joint.item(), known + log_volume, rtol=1e-9)


@pytest.mark.long
def test_jumps_are_summed():
    """Of both forms that NUTS samples, and of the particle filter's days."""
    about = stochastic_volatility
    with jax.enable_x64(True):
        (returns,) = map(in_double_precision, about.data())
        parameters = {"level": 0.2, "memory": 0.9, "noise": 0.3, "rare": 0.03, "size": 5.0}
        parameters = {name: jnp.array(x) for name, x in parameters.items()}
        innovations = random.normal(random.key(0), returns.shape)
        non_centred = substitute(about.non_centred, {**parameters, "innovations": innovations})
        draw = {**parameters, "h": trace(non_centred).get_trace(returns)["h"]["value"]}
        known = enumerated(about, (returns,), draw).item()
        of_h = log_density(about.centred, (returns,), {}, draw)[0]
        of_innovations = log_density(about.non_centred, (returns,), {}, {**parameters, "innovations": innovations})[0]
        of_innovations -= len(returns) * jnp.log(parameters["noise"])
        assert [of_h.item(), of_innovations.item()] == pytest.approx([known, known], rel=1e-9)
        days = about.log_density_of_return(*(np.asarray(x) for x in (returns, draw["h"], draw["rare"], draw["size"])))
        np.testing.assert_allclose(days.sum(), about.log_likelihood(draw, returns), rtol=1e-9)
        jump = about.given_others(random.key(1), draw, returns)["jump"]
        shares = jax.nn.log_softmax(about.log_terms(draw, returns), axis=0)
        joint = log_density(about.model, (returns,), {}, {**draw, "jump": jump})[0]
        np.testing.assert_allclose(joint, known + jnp.take_along_axis(shares, jump[None], 0).sum(), rtol=1e-9)
