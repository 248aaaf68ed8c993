"""Plates with particles of their own: unbiased by enumeration, sound numerics, clear errors, no wasted evaluations."""

from functools import partial
import itertools

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import mpmath
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import seed, trace
from numpyro.infer import SVI
import optax
import pytest

from helpers import ScoreNormal, assert_unbiased_over_outcomes, initial_params, of_two_lengths
from numpyro_vimco import AutoMixed, VIMCOStar
from numpyro_vimco.control_variates import local_vimco_star_signal, log_one_minus_share, normalized_weights
from numpyro_vimco.densities.plates import plate_structure

X = np.array([0.7, -1.2])
Y = np.array([0.4, -0.3])


def bernoulli(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def log_bernoulli(logits, value):
    return value * logits - jnp.logaddexp(0.0, logits)


def log_normal(loc, x):
    return -0.5 * (x - loc) ** 2 - 0.5 * np.log(2 * np.pi)


# Each case: model, guide, particles by plate, values by (plate or None, site), and the log-weight of one global
# particle and log-probability of drawing it, written down by hand.


def one_plate():
    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        with numpyro.plate("data", 2):
            z = bernoulli("z", 0.8 * g - 0.4)
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.1) * z, 1.0), obs=X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("data", 2):
            bernoulli("z", numpyro.param("z_logits", np.array([0.3, -0.3])) + numpyro.param("coupling", 0.5) * g)

    def log_weight(params, g, z):  # z: (M, 2)
        logits = params["z_logits"] + params["coupling"] * g
        local = log_bernoulli(0.8 * g - 0.4, z) + log_normal(params["effect"] * z, X) - log_bernoulli(logits, z)
        top = log_bernoulli(params["prior"], g) - log_bernoulli(params["g_logits"], g)
        log_q = log_bernoulli(params["g_logits"], g) + log_bernoulli(logits, z).sum()
        return top + jnp.sum(logsumexp(local, axis=0) - np.log(2)), log_q

    return model, guide, {"data": 2}, {"g": (None, ()), "z": ("data", (2,))}, log_weight


def two_plates():
    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        with numpyro.plate("a", 2):
            z = bernoulli("z", g - 0.4)
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.1) * z, 1.0), obs=X)
        with numpyro.plate("b", 1):
            y = bernoulli("y", 0.3 - g)
            numpyro.sample("seen", dist.Normal(numpyro.param("effect", 1.1) - y, 1.0), obs=Y[:1])

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("a", 2):
            bernoulli("z", numpyro.param("z_logits", 0.3) - 0.2 * g)
        with numpyro.plate("b", 1):
            bernoulli("y", numpyro.param("y_logits", 0.6) * g)

    def log_weight(params, g, z, y):
        z_logits, y_logits = params["z_logits"] - 0.2 * g, params["y_logits"] * g
        a = log_bernoulli(g - 0.4, z) + log_normal(params["effect"] * z, X) - log_bernoulli(z_logits, z)
        b = log_bernoulli(0.3 - g, y) + log_normal(params["effect"] - y, Y[:1]) - log_bernoulli(y_logits, y)
        top = log_bernoulli(params["prior"], g) - log_bernoulli(params["g_logits"], g)
        log_q = log_bernoulli(params["g_logits"], g) + log_bernoulli(z_logits, z).sum()
        log_q += log_bernoulli(y_logits, y).sum()
        return top + sum(jnp.sum(logsumexp(v, axis=0) - np.log(2)) for v in (a, b)), log_q

    return model, guide, {"a": 2, "b": 2}, {"g": (None, ()), "z": ("a", (2,)), "y": ("b", (1,))}, log_weight


def plate_inside_a_named_plate():
    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        with numpyro.plate("group", 1, dim=-2):
            z = bernoulli("z", 0.8 * g)
            with numpyro.plate("member", 2, dim=-1):
                y = bernoulli("y", numpyro.param("effect", 1.1) * z - 0.3)
                numpyro.sample("x", dist.Normal(y, 1.0), obs=X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("group", 1, dim=-2):
            z = bernoulli("z", numpyro.param("z_logits", 0.3) - 0.2 * g)
            with numpyro.plate("member", 2, dim=-1):
                bernoulli("y", numpyro.param("y_logits", np.array([0.6, 0.1])) * z + 0.1)

    def log_weight(params, g, z, y):  # z: (M, 1, 1), y: (M, 1, 2)
        z_logits, y_logits = params["z_logits"] - 0.2 * g, params["y_logits"] * z + 0.1
        inner = log_bernoulli(params["effect"] * z - 0.3, y) + log_normal(y, X) - log_bernoulli(y_logits, y)
        local = log_bernoulli(0.8 * g, z) - log_bernoulli(z_logits, z) + inner.sum(-1, keepdims=True)
        top = log_bernoulli(params["prior"], g) - log_bernoulli(params["g_logits"], g)
        log_q = log_bernoulli(params["g_logits"], g) + log_bernoulli(z_logits, z).sum()
        log_q += log_bernoulli(y_logits, y).sum()
        return top + jnp.sum(logsumexp(local, axis=0) - np.log(2)), log_q

    return model, guide, {"group": 2}, {"g": (None, ()), "z": ("group", (1, 1)), "y": ("group", (1, 2))}, log_weight


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", [one_plate, two_plates, plate_inside_a_named_plate], ids=lambda case: case.__name__)
def test_expected_gradient_is_that_of_the_exact_bound(case, alpha, x64):
    """Every outcome of 2 global particles with 2 local ones in each element, all sites binary."""
    model, guide, plate_particles, sites, log_weight = case()
    assert_unbiased_over_outcomes(model, guide, sites, log_weight, alpha, plate_particles=plate_particles)


# Numerics.


def reference_signals(log_w, log_v, alpha):
    """Local signals of global particle 0 by the design's formula, with 80 digits."""
    with mpmath.workdps(80):
        power = 1 - mpmath.mpf(alpha) if alpha < 1 else mpmath.mpf(10) ** -30
        w = [mpmath.exp(power * mpmath.mpf(float(x))) for x in log_w]
        v = [mpmath.exp(mpmath.mpf(float(x))) for x in log_v]
        share = w[0] / mpmath.fsum(w)
        signals = []
        for m, weight in enumerate(v):
            local = weight / mpmath.fsum(v)
            rest = mpmath.fsum(x for i, x in enumerate(v) if i != m) / mpmath.fsum(v)
            others = mpmath.fsum(w[1:]) / mpmath.fsum(w)
            signals.append(float(-mpmath.log(others + share * rest**power) / power - share * local))
        return np.array(signals)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("global_gap", [0.0, 1.0, 50.0, 1e4])
@pytest.mark.parametrize("local_gap", [0.0, 1.0, 50.0, 1e4])
def test_local_signals_in_float32_agree_with_mpmath(local_gap, global_gap, alpha):
    rng = np.random.default_rng(0)
    log_w, log_v = (rng.normal(size=size).astype(np.float32) - 100 for size in (4, 5))
    log_w[0] = log_w[1:].max() + global_gap
    log_v[0] = log_v[1:].max() + local_gap

    @jax.jit
    def signals(log_w, log_v):
        rest = log_one_minus_share(log_w, alpha)[0]
        return local_vimco_star_signal(rest, normalized_weights(log_w, alpha)[0], log_v, alpha)

    expected = reference_signals(log_w, log_v, alpha)
    actual = np.asarray(signals(log_w, log_v))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max() + 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_small_local_signals_keep_their_precision(alpha):
    log_w, log_v = (random.normal(random.key(i), (500,)) for i in (1, 2))
    signals = local_vimco_star_signal(
        log_one_minus_share(log_w, alpha)[0], normalized_weights(log_w, alpha)[0], log_v, alpha
    )
    np.testing.assert_allclose(signals, reference_signals(log_w, log_v, alpha), rtol=1e-3)


@pytest.mark.parametrize("alpha", of_two_lengths([0.0, 0.3, 1.0], [0.3]))
def test_zero_local_weights_do_not_poison_the_gradient(alpha):
    """Element 0 is impossible for half of the local particles; with 8 of them, some are possible."""

    def model():
        g = bernoulli("g", 0.0)
        with numpyro.plate("data", 2):
            z = bernoulli("z", g - 0.5)
            numpyro.factor("support", jnp.where((z == 0) & (jnp.arange(2) == 0), -jnp.inf, 0.0))

    def guide():
        bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("data", 2):
            bernoulli("z", numpyro.param("z_logits", jnp.zeros(2)))

    objective = VIMCOStar(alpha, 4, plate_particles={"data": 8})
    params = initial_params(model, guide)
    loss, gradient = jax.value_and_grad(lambda params: objective.loss(random.key(2), params, model, guide))(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert gradient["z_logits"][0] < 0


# Subsampling.


def minibatch(subsample_size, path_sites):
    normal = dist.Normal if path_sites else ScoreNormal

    def model():
        g = numpyro.sample("g", normal(0.0, 1.0))
        with numpyro.plate("data", 4, subsample_size=subsample_size) as index:
            z = bernoulli("z", g - 0.4)
            c = numpyro.sample("c", normal(z + 0.5 * g, 1.0))
            numpyro.sample("x", dist.Normal(c, 1.0), obs=jnp.array([0.7, -1.2, 0.1, 2.0])[index])

    def guide():
        g = numpyro.sample("g", normal(numpyro.param("g_loc", 0.3), 0.8))
        with numpyro.plate("data", 4, subsample_size=subsample_size) as index:
            logits = numpyro.param("z_logits", jnp.array([0.1, -0.4, 0.3, 0.0]))[index]
            z = bernoulli("z", logits + 0.5 * g)
            numpyro.sample("c", normal(numpyro.param("slope", 0.6) * z + 0.2 * g, 0.9))

    return model, guide


@pytest.mark.parametrize("path_sites", [False, True])
@pytest.mark.long
def test_mean_of_the_subsampled_gradient_is_the_full_one_at_alpha_one(path_sites):
    """100,000 draws each, 5 standard errors of each of 6 means: fails less than once in 300,000 seeds."""

    def gradients(subsample_size):
        model, guide = minibatch(subsample_size, path_sites)
        params = initial_params(*minibatch(4, path_sites))
        objective = VIMCOStar(1.0, 2, plate_particles={"data": 2})
        grad = jax.grad(lambda params, key: objective.loss(key, params, model, guide))
        keys = random.split(random.key(subsample_size), 100_000)
        draws = jax.jit(lambda keys: jax.lax.map(lambda key: grad(params, key), keys, batch_size=10_000))(keys)
        return np.concatenate([np.asarray(leaf).reshape(100_000, -1) for leaf in jax.tree.leaves(draws)], axis=1)

    full, part = gradients(4), gradients(2)
    error = np.sqrt((full.var(0) + part.var(0)) / 100_000)
    assert (np.abs(full.mean(0) - part.mean(0)) < 5 * error).all()
    assert (np.abs(full.mean(0)) > 10 * error).sum() >= 4


def test_subsampled_plate_needs_alpha_one():
    model, guide = minibatch(2, False)
    for plate_particles in (None, {"data": 2}):
        with pytest.raises(ValueError, match=r"Plate 'data' is subsampled \(2 of 4\).*Use alpha=1"):
            VIMCOStar(0.5, 2, plate_particles=plate_particles).loss(random.key(0), {}, model, guide)


def test_subsampled_plate_inside_of_a_named_plate_is_refused():
    def program(sample):
        with numpyro.plate("group", 2, dim=-2):
            sample("z")
            with numpyro.plate("member", 4, subsample_size=2, dim=-1):
                sample("y")

    guide = partial(program, lambda name: bernoulli(name, numpyro.param(f"{name}_logits", 0.1)))
    with pytest.raises(ValueError, match=r"Plate 'member' is subsampled \(2 of 4\), but site 'z' is outside"):
        VIMCOStar(1.0, 2, plate_particles={"group": 2}).loss(
            random.key(0), {}, partial(program, lambda name: bernoulli(name, 0.0)), guide
        )


def test_subsampled_likelihood_of_global_latents_is_allowed_at_alpha_one():
    """The objective is then linear in the log-weights: the mean over subsets is the full one."""

    def model(index=tuple(range(4))):
        g = bernoulli("g", 0.0)
        with numpyro.plate("data", 4, subsample_size=len(index)):
            numpyro.sample("x", dist.Normal(g, 1.0), obs=jnp.array([0.7, -1.2, 0.1, 2.0])[np.array(index)])

    def guide(index=None):
        bernoulli("g", numpyro.param("logits", 0.3))

    objective = VIMCOStar(1.0, 4)
    loss = partial(objective.loss, random.key(0), {}, model, guide)
    subsets = list(itertools.combinations(range(4), 2))
    np.testing.assert_allclose(np.mean([loss(subset) for subset in subsets]), loss(), rtol=1e-5)


# Errors.


def simple():
    model, guide, *_ = one_plate()
    return model, guide


def loss(plate_particles, model, guide):
    return VIMCOStar(num_particles=2, plate_particles=plate_particles).loss(random.key(0), {}, model, guide)


@pytest.mark.parametrize("number", [1, 0, 2.5])
def test_fewer_than_two_local_particles(number):
    with pytest.raises(ValueError, match=r"`plate_particles\['data'\]`"):
        VIMCOStar(plate_particles={"data": number})


def test_plate_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"names the plate 'dta', which no site is in\. Name one of these instead: 'data'"
    ):
        loss({"dta": 2}, *simple())


def test_named_plate_without_latents_of_its_own():
    def model():
        z = bernoulli("z", 0.0)
        with numpyro.plate("data", 2):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=X)

    with pytest.raises(ValueError, match="plate 'data', which has no latents that the guide samples"):
        loss({"data": 2}, model, lambda: bernoulli("z", numpyro.param("logits", 0.1)))


def test_named_plate_inside_of_scan():
    def steps(logits):
        def step(carry, _):
            with numpyro.plate("inner", 3):
                bernoulli("z", logits)
            return carry, None

        scan(step, 0, None, length=2)

    with pytest.raises(ValueError, match=r"the plate 'inner', which is inside of `scan` \(site 'z'\)"):
        loss({"inner": 2}, lambda: steps(0.0), lambda: steps(numpyro.param("logits", 0.1)))


def test_named_plate_nested_in_another_named_one():
    model, guide, *_ = plate_inside_a_named_plate()
    with pytest.raises(ValueError, match=r"'group' and 'member', but site '[xy]' is in both"):
        loss({"group": 2, "member": 2}, model, guide)


@pytest.mark.parametrize("path_sites", [False, True])
def test_site_outside_of_a_named_plate_that_depends_on_its_latents(path_sites):
    local = dist.Normal if path_sites else ScoreNormal

    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", local(0.0, 1.0))
        numpyro.sample("total", dist.Normal(z.sum(), 1.0), obs=0.5)

    def guide():
        with numpyro.plate("data", 2):
            numpyro.sample("z", local(numpyro.param("loc", 0.1), 1.0))

    with pytest.raises(ValueError, match="Site 'total' is outside of the plate 'data', but depends on its latents"):
        loss({"data": 2}, model, guide)


def test_site_of_another_named_plate_that_depends_on_its_latents():
    def program(sample, coupling):
        with numpyro.plate("a", 2):
            z = sample("z", 0.0)
        with numpyro.plate("b", 3):
            sample("y", coupling * z.sum())

    model = partial(program, lambda name, logits: bernoulli(name, logits), 0.0)
    guide = partial(program, lambda name, logits: bernoulli(name, logits + numpyro.param(name + "_p", 0.1)), 1.0)
    with pytest.raises(ValueError, match="Site 'y' is outside of the plate 'a', but depends on its latents"):
        loss({"a": 2, "b": 2}, model, guide)


# Cost.


def test_global_sites_are_not_evaluated_once_per_local_particle():
    """Floating-point operations: a heavy global site costs the same with 2 and with 64 local particles."""
    matrix = jnp.ones((200, 200))

    def model():
        g = bernoulli("g", 0.0)
        heavy = jnp.sum(jnp.tanh(matrix @ (matrix * (g + 1.0))))
        numpyro.factor("heavy", 1e-6 * heavy)
        with numpyro.plate("data", 2):
            z = bernoulli("z", g - 0.4)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("data", 2):
            bernoulli("z", numpyro.param("z_logits", 0.3))

    def flops(local_particles):
        objective = VIMCOStar(num_particles=4, plate_particles={"data": local_particles})
        grad = jax.grad(lambda params: objective.loss(random.key(0), params, model, guide))
        return jax.jit(grad).lower(initial_params(model, guide)).compile().cost_analysis()["flops"]

    assert flops(64) < 1.1 * flops(2)


def test_subsampling_of_two_plates_of_a_named_one_multiplies():
    """Both plates are common to all sites of the level: its sum is scaled by (4 / 2) (6 / 2)."""

    def program(sample):
        sample("g")
        with numpyro.plate("group", 4, subsample_size=2, dim=-2), numpyro.plate("member", 6, subsample_size=2, dim=-1):
            sample("z")

    def model():
        program(lambda name: bernoulli(name, 0.3))

    def guide():
        program(lambda name: bernoulli(name, numpyro.param(f"{name}_logits", 0.1)))

    traces = [trace(seed(program, 0)).get_trace() for program in (model, guide)]
    structure = plate_structure(*traces, {"group": 2}, frozenset(), linear=True)
    assert structure.local_scale("group") == structure.level_scale("group") == 6
    assert structure.scale == 1


@pytest.mark.long
def test_elements_that_a_guide_draws_one_after_another_given_a_path_latent():
    """Their loop closes over two derivatives, in which JAX 0.10 fails."""

    def model(x):
        effect = numpyro.sample("effect", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("data", 3, dim=-1):
            with numpyro.plate("source", 2, dim=-2):
                present = bernoulli("present", 0.0)
            numpyro.sample("x", dist.Normal(effect @ present, 1.0), obs=x)

    svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(num_particles=2, plate_particles={"data": 2}))
    result = svi.run(random.key(0), 2, jnp.array([0.7, -1.2, 1.9]), progress_bar=False)
    assert np.isfinite(result.losses).all()
