"""Doubly reparameterised gradients: the mean of the plain ones, and a signal that does not vanish."""

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.handlers import mask, scale
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal
import optax
import pytest

from helpers import initial_params, of_two_lengths
from numpyro_vimco import VIMCOStar

DRAWS = 100_000
X = np.array([0.7, -1.2])


def bernoulli(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def normal(name, loc, width=0.8):
    return numpyro.sample(name, dist.Normal(loc, width))


def observe(loc):
    with numpyro.plate("data", 2):
        numpyro.sample("x", dist.Normal(loc * numpyro.param("effect", 0.9), 1.0), obs=X)


def two_latents():
    b = bernoulli("b", numpyro.param("prior", -0.3))
    c = normal("c", 1.5 * b, 1.0)
    observe(c + 0.5 * b)


def discrete_on_continuous():
    c = normal("c", numpyro.param("loc", 0.4), numpyro.param("width", 0.7))
    bernoulli("b", numpyro.param("logits", 0.2) + numpyro.param("coupling", 0.6) * c)


def continuous_on_discrete():
    b = bernoulli("b", numpyro.param("logits", 0.2))
    normal("c", numpyro.param("loc", 0.4) + numpyro.param("coupling", 0.6) * b, numpyro.param("width", 0.7))


def two_continuous():
    c = normal("c", numpyro.param("prior", 0.2), 1.0)
    d = normal("d", c, 1.0)
    observe(d + 0.3 * c)


def continuous_on_continuous():
    c = normal("c", numpyro.param("loc", 0.4), numpyro.param("width", 0.7))
    normal("d", numpyro.param("d_loc", 0.1) + numpyro.param("coupling", 0.6) * c)


def positive_latent():
    b = bernoulli("b", numpyro.param("prior", -0.3))
    observe(numpyro.sample("c", dist.Gamma(2.0, 1.5)) - b)


def transformed():
    b = bernoulli("b", numpyro.param("logits", 0.2))
    base = dist.Normal(numpyro.param("loc", 0.1) + numpyro.param("coupling", 0.3) * b, numpyro.param("width", 0.6))
    numpyro.sample("c", dist.TransformedDistribution(base, dist.transforms.ExpTransform()))


def delta_with_jacobian():
    """A path sample pushed through a Delta whose map and log-density depend on parameters."""
    b = bernoulli("b", numpyro.param("logits", 0.2))
    u = numpyro.sample("u", dist.Normal(numpyro.param("loc", 0.1), 0.9), infer={"is_auxiliary": True})
    width = numpyro.param("width", 0.6)
    numpyro.sample("c", dist.Delta(numpyro.param("shift", 0.2) + width * u + 0.3 * b, -jnp.log(width)))


def scaled_model():
    b = bernoulli("b", numpyro.param("prior", -0.3))
    with scale(scale=0.5):
        c = normal("c", 1.5 * b, 1.0)
    observe(c + 0.5 * b)


def scaled_guide():
    b = bernoulli("b", numpyro.param("logits", 0.2))
    with scale(scale=0.5):
        normal("c", numpyro.param("loc", 0.4) + numpyro.param("coupling", 0.6) * b, numpyro.param("width", 0.7))
    numpyro.factor("tilt_site", 0.1 * numpyro.param("tilt", 0.5) * b)


def moving_support():
    """Two sites whose support moves with a parameter, one of them only by its transform."""
    b = bernoulli("b", numpyro.param("logits", 0.2))
    u = numpyro.sample("u", dist.Uniform(-1.5, numpyro.param("high", 2.0)))
    base = dist.Beta(numpyro.param("a", 1.3), 1.0)
    shift = dist.transforms.AffineTransform(0.2 * u - 1.0 + 0.3 * b, numpyro.param("range", 3.0))
    numpyro.sample("c", dist.TransformedDistribution(base, shift))


def bounded_latents():
    b = bernoulli("b", numpyro.param("prior", -0.3))
    c = normal("c", 1.5 * b, 1.0)
    observe(c + 0.5 * b)
    normal("u", 0.3 * c, 1.0)  # the guide draws it before c


def masked_model():
    mu = normal("mu", 0.3, 1.0)
    with numpyro.plate("data", 2):
        with mask(mask=X > 0):
            z = normal("z", mu, 1.0)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=X)


def masked_guide():
    mu = normal("mu", numpyro.param("mu_loc", 0.1), 1.0)
    with numpyro.plate("data", 2), mask(mask=X > 0):
        normal("z", mu * numpyro.param("slope", 0.8), numpyro.param("width", 1.1))


def events_in_plates():
    g = numpyro.sample("g", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    with numpyro.plate("data", 2):
        b = bernoulli("b", g[0])
        e = numpyro.sample("e", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(g.sum() + b + e.sum(-1), 1.0), obs=X)


def events_in_plates_guide():
    g = numpyro.sample("g", dist.Normal(numpyro.param("g_loc", jnp.array([0.1, 0.3, -0.2])), 0.8).to_event(1))
    with numpyro.plate("data", 2):
        b = bernoulli("b", numpyro.param("logits", jnp.array([0.2, -0.3])) + 0.5 * g[1])
        loc = numpyro.param("e_loc", jnp.array([0.3, -0.1])) + (b + 0.4 * g[0])[:, None]
        numpyro.sample("e", dist.Normal(loc, numpyro.param("e_width", 0.7)).to_event(1))


def both_levels():
    c = normal("c", 0.0, 1.0)
    b = bernoulli("b", 0.4 * c)
    with numpyro.plate("data", 2):
        k = bernoulli("k", c + numpyro.param("prior", 0.2))
        e = normal("e", 0.7 * k + b + c, 1.0)
        numpyro.sample("x", dist.Normal(numpyro.param("effect", 0.9) * e, 1.0), obs=X)


def both_levels_guide():
    """Path and score-function sites on both levels, the local ones depending on the global ones."""
    c = normal("c", numpyro.param("c_loc", 0.4), numpyro.param("c_width", 0.7))
    b = bernoulli("b", numpyro.param("b_logits", 0.2) + 0.5 * c)
    with numpyro.plate("data", 2):
        k = bernoulli("k", numpyro.param("k_logits", jnp.array([0.3, -0.4])) + 0.8 * c)
        loc = numpyro.param("e_loc", jnp.array([0.2, -0.5])) + 0.6 * c + 0.3 * b - 0.4 * k
        normal("e", loc, numpyro.param("e_width", 0.6))


def chain():
    """Path and score-function sites at each step, of two elements, the second of which has no value at one step."""
    c = normal("c", numpyro.param("prior", 0.2), 1.0)
    stay = numpyro.param("stay", 0.8)

    def step(before, x):
        with numpyro.plate("data", 2):
            k = bernoulli("k", before + 0.3 * c)
            with mask(mask=jnp.isfinite(x)):
                e = normal("e", stay * before + c + k, 0.9)
                numpyro.sample("x", dist.Normal(e + 0.5 * k, 1.0), obs=jnp.nan_to_num(x))
        return jnp.where(jnp.isfinite(x), e, 0.4 * k), None

    scan(step, jnp.zeros(2), jnp.array([[0.7, -1.2], [0.4, jnp.nan], [-0.3, 0.9]]))


def chain_guide():
    c = normal("c", numpyro.param("c_loc", 0.4), numpyro.param("c_width", 0.7))
    with numpyro.plate("data", 2):
        k = bernoulli("k", numpyro.param("k_logits", jnp.array([[0.3, -0.4], [0.1, 0.2], [0.0, -0.2]])) + 0.8 * c)
        loc = numpyro.param("e_loc", jnp.array([[0.2, -0.5], [0.3, 0.0], [0.1, 0.4]])) + 0.6 * c - 0.4 * k
        normal("e", loc, numpyro.param("e_width", 0.6))


CASES = {
    "discrete on continuous": (two_latents, discrete_on_continuous, None),
    "continuous on discrete": (two_latents, continuous_on_discrete, None),
    "continuous on continuous": (two_continuous, continuous_on_continuous, None),
    "TransformedDistribution": (positive_latent, transformed, None),
    "Delta": (two_latents, delta_with_jacobian, None),
    "scale and factor": (scaled_model, scaled_guide, None),
    "moving support": (bounded_latents, moving_support, None),
    "mask": (masked_model, masked_guide, None),
    "local, mask": (masked_model, masked_guide, {"plate_particles": {"data": 2}}),
    "event dimensions in plates": (events_in_plates, events_in_plates_guide, None),
    "local, event dimensions": (events_in_plates, events_in_plates_guide, {"plate_particles": {"data": 2}}),
    "local, path and score on both levels": (both_levels, both_levels_guide, {"plate_particles": {"data": 2}}),
    "chain": (chain, chain_guide, {"chain_particles": {"e": 2}}),
}

# One has all terms of the formulas, one no local particles. What the others add does not depend on α.
EACH_ALPHA = ("continuous on discrete", "local, path and score on both levels", "chain")


def mean_and_error(model, guide, alpha, doubly_reparameterized, arguments, num_particles=2):
    """Mean gradient over DRAWS draws, and its standard error, for all parameters in one vector."""
    params = initial_params(model, guide)
    objective = VIMCOStar(alpha, num_particles, doubly_reparameterized=doubly_reparameterized, **(arguments or {}))

    def gradient(key):
        return jax.grad(lambda params: objective.loss(key, params, model, guide))(params)

    @jax.jit
    def moments(keys):
        draws = jax.lax.map(lambda keys: moments_of(jax.vmap(gradient)(keys)), keys.reshape(20, -1))
        return jax.tree.map(lambda x: x.mean(0), draws)

    def moments_of(draws):
        flat = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(draws)], axis=1)
        return flat.mean(0), (flat**2).mean(0)

    mean, square = moments(random.split(random.key(int(doubly_reparameterized)), DRAWS))
    return mean, np.sqrt((square - mean**2) / DRAWS)


# 100,000 draws of each estimator, with different keys. With the fixed keys the outcome is fixed; over keys, 4 standard
# errors are passed once in 16,000 means. Weights of the wrong level or factor are seen at 10 to 100 standard errors.
@pytest.mark.parametrize(
    ("name", "alpha"),
    of_two_lengths(
        [(name, alpha) for name in CASES for alpha in (0.0, 0.5, 1.0) if name in EACH_ALPHA or alpha == 0.5],
        [(name, 0.5) for name in (*EACH_ALPHA, "Delta", "local, mask")],
    ),
)
def test_mean_is_that_of_the_plain_estimator(name, alpha):
    model, guide, arguments = CASES[name]
    plain, plain_error = mean_and_error(model, guide, alpha, False, arguments)
    doubly, doubly_error = mean_and_error(model, guide, alpha, True, arguments)
    assert (np.abs(plain - doubly) < 4 * np.hypot(plain_error, doubly_error) + 1e-6).all()
    assert (np.abs(plain) > 10 * plain_error).sum() >= len(plain) // 2


# 4,000 draws: the standard error of an SNR s is sqrt((1 + s²/2) / 4,000), at most 2 % of it where s > 0.7, and that of
# a slope below 0.02. A plain pathwise gradient falls to the floor of 0.8 / sqrt(4,000).
@pytest.mark.long
def test_snr_grows_for_every_parameter_and_falls_for_the_continuous_ones_without_it():
    def model():
        b = bernoulli("b", numpyro.param("prior", -0.3))
        c = normal("c", 1.2 * b, 1.0)
        numpyro.sample("x", dist.Normal(c * numpyro.param("effect", 0.9), 1.0), obs=0.7)

    def guide():
        b = bernoulli("b", numpyro.param("logits", 0.4))
        width = numpyro.param("width", 1.1, constraint=constraints.positive)
        normal("c", numpyro.param("loc", 0.3) + numpyro.param("coupling", 0.3) * b, width)

    params = initial_params(model, guide)
    num_particles = np.array([32, 102, 323, 1024])

    def slopes(doubly_reparameterized):
        snr = []
        for n in num_particles:
            objective = VIMCOStar(0.0, int(n), doubly_reparameterized=doubly_reparameterized)

            def gradient(key, objective=objective):
                return jax.grad(lambda params: objective.loss(key, params, model, guide))(params)

            keys = random.split(random.key(3), 4000)
            draws = jax.jit(lambda keys, gradient=gradient: jax.lax.map(gradient, keys, batch_size=200))(keys)
            snr.append([abs(draws[name].mean()) / draws[name].std() for name in params])
        return dict(zip(params, np.polyfit(np.log(num_particles), np.log(snr), 1)[0]))

    doubly, plain = slopes(True), slopes(False)
    assert all(slope > 0.35 for slope in doubly.values()), doubly
    assert all(plain[name] < 0 for name in ("loc", "width", "coupling")), plain


def test_model_is_traced_three_times_and_evaluated_forward_and_backward_once():
    calls = []

    def model():
        calls.append(1)
        c = normal("c", 0.0, 1.0)
        with numpyro.plate("data", 2):
            numpyro.sample("x", dist.Normal(jnp.sin(c), 1.0), obs=X)

    def guide():
        normal("c", numpyro.param("loc", 0.4))

    loss = VIMCOStar(num_particles=4).loss
    gradient = jax.grad(lambda loc, key: loss(key, {"loc": loc}, model, guide))
    text = str(jax.make_jaxpr(gradient)(0.4, random.key(0)))
    assert len(calls) == 3  # once to see what there is, once whether it jumps, without a computation
    assert text.count(" = sin ") == 1 and text.count(" = cos ") == 1


@pytest.mark.parametrize("make_guide", [AutoMultivariateNormal, lambda model: AutoIAFNormal(model, num_flows=1)])
def test_automatic_guides_with_delta_sites_fit(make_guide):
    def model():
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        d = numpyro.sample("d", dist.LogNormal(c, 1.0))
        numpyro.sample("x", dist.Normal(d, 1.0), obs=2.0)

    svi = SVI(model, make_guide(model), optax.adam(0.02), VIMCOStar(num_particles=8))
    losses = svi.run(random.key(0), 400, progress_bar=False).losses
    assert np.isfinite(losses).all() and losses[-50:].mean() < losses[0] - 0.1


def test_vectorizations_agree_with_local_particles():
    params = initial_params(both_levels, both_levels_guide)
    gradients = []
    for vectorize_particles in (True, False, lambda fn, keys: jax.lax.map(fn, keys, batch_size=2)):
        objective = VIMCOStar(0.3, 4, vectorize_particles, plate_particles={"data": 3})
        gradient = jax.grad(
            lambda params, loss=objective.loss: loss(random.key(0), params, both_levels, both_levels_guide)
        )
        gradients.append(jax.jit(gradient)(params))
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, gradients[0])


def test_forward_mode_agrees_with_reverse_mode():
    params = initial_params(both_levels, both_levels_guide)
    loss = VIMCOStar(0.3, 4, plate_particles={"data": 3}).loss
    derivatives = [
        jax.jit(derivative(lambda params: loss(random.key(0), params, both_levels, both_levels_guide)))(params)
        for derivative in (jax.grad, jax.jacfwd)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *derivatives)


def test_sample_of_weight_zero_does_not_poison_the_gradient():
    """The derivative of the density is infinite at samples outside of the support."""

    def model():
        c = normal("c", 0.0, 1.0)
        numpyro.factor("support", jnp.where(c > 0, jnp.sqrt(jnp.maximum(c, 0.0)), -jnp.inf))

    def guide():
        normal("c", numpyro.param("loc", 0.1), 1.0)

    loss = VIMCOStar(num_particles=64, score_sites=()).loss
    assert np.isfinite(jax.grad(lambda loc: loss(random.key(0), {"loc": loc}, model, guide))(0.1))
