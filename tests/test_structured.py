"""Structured guides: density and sampler agree, couplings come from the model, gradients stay exact."""

from functools import partial
import itertools

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.transforms import StickBreakingTransform
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI
from numpyro.infer.util import log_density
import optax
import pytest
from scipy.special import gammaln, logsumexp
from scipy.stats import poisson

from helpers import of_two_lengths
from numpyro_vimco import AutoDiscrete, AutoMixed, VIMCOStar, fit
from numpyro_vimco.families.distributions import InsideSimplex

STRUCTURED = partial(AutoMixed, structure="autoregressive")
DISCRETE = partial(AutoDiscrete, structure="autoregressive")
RANKS = [None, 2]


def start(guide, *args, rng_key=None, scale=0.0):
    """Parameters that a guide begins with; those that begin at zero are drawn with a scale."""
    sites = trace(seed(guide, 0)).get_trace(*args)
    params = {name: jnp.asarray(site["value"]) for name, site in sites.items() if site["type"] == "param"}
    if scale:
        keys = dict(zip(params, random.split(rng_key, len(params))))
        params = {
            name: value if value.any() else scale * random.normal(keys[name], value.shape)
            for name, value in params.items()
        }
    return params


def log_prob(guide, params, values, *args):
    """Log-density of a guide at values of all of its sites."""
    return log_density(guide, args, {}, {**params, **values})[0]


# Discrete sites, by enumeration.


def competing(x):
    """Discrete sites of several kinds, all coupled through one observation."""
    with numpyro.plate("row", 2):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
    k = numpyro.sample("k", dist.DiscreteUniform(1, jnp.array([2, 3])).to_event(1))
    c = numpyro.sample("c", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    numpyro.sample("x", dist.Normal(z.sum() + k.sum() * c, 1), obs=x)


OUTCOMES = [
    {"z": jnp.array([a, b]), "k": jnp.array([i, j]), "c": jnp.array(c)}
    for a, b, i, j, c in itertools.product([0, 1], [0, 1], [1, 2], [1, 2, 3], [0, 1, 2])
]
OUTCOMES = {name: jnp.stack([outcome[name] for outcome in OUTCOMES]) for name in OUTCOMES[0]}


@pytest.mark.parametrize("rank", of_two_lengths(RANKS, [2]))
def test_discrete_density_and_sampler_agree(rank):
    guide = DISCRETE(competing, rank=rank)
    params = start(guide, 1.0, rng_key=random.key(1), scale=8.0)
    probability = jnp.exp(jax.vmap(lambda outcome: log_prob(guide, params, outcome, 1.0))(OUTCOMES))
    assert len(probability) == 72
    np.testing.assert_allclose(probability.sum(), 1, atol=1e-5)
    independent = jnp.exp(jax.vmap(lambda outcome: log_prob(guide, start(guide, 1.0), outcome, 1.0))(OUTCOMES))
    assert jnp.abs(probability - independent).max() > 0.05  # the couplings count
    number = 50_000
    for draws in (
        guide.sample_posterior(random.key(2), params, sample_shape=(number,)),
        jax.vmap(lambda key: seed(substitute(guide, params), key)(1.0))(random.split(random.key(3), number)),
    ):
        same = [jnp.all((draws[n][:, None] == OUTCOMES[n]).reshape(number, 72, -1), -1) for n in ("z", "k", "c")]
        frequency = (same[0] & same[1] & same[2]).mean(0)
        # 72 frequencies of 50,000 draws within 6 standard errors and one draw: fails less than once in 10^6 runs.
        error = 6 * jnp.sqrt(probability * (1 - probability) / number) + 2 / number
        assert jnp.all(jnp.abs(frequency - probability) < error)


def test_couplings_begin_at_zero():
    guide = DISCRETE(competing)
    params = start(guide, 1.0)
    plain = AutoDiscrete(competing, structure="mean_field")
    shared = {name: value for name, value in params.items() if name in start(plain, 1.0)}
    for outcome in (0, 30, 71):
        values = {name: value[outcome] for name, value in OUTCOMES.items()}
        np.testing.assert_allclose(
            log_prob(guide, params, values, 1.0), log_prob(plain, shared, values, 1.0), rtol=1e-5
        )


# Continuous sites.


def linear(x):
    z = numpyro.sample("z", dist.Bernoulli(0.4))
    a = numpyro.sample("a", dist.Normal(jnp.zeros(3), 1).to_event(1))
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("x", dist.Normal(z + a.sum() * p[0], s), obs=x)


@pytest.mark.long
@pytest.mark.parametrize("rank", RANKS)
def test_continuous_density_and_sampler_agree(rank, x64):
    """The joint density of the continuous sites given z is that of a Normal with the moments of the draws."""
    guide = STRUCTURED(linear, rank=rank)
    params = start(guide, 1.0, rng_key=random.key(1), scale=0.8)
    transforms = {"a": None, "p": dist.biject_to(dist.constraints.simplex), "s": dist.transforms.ExpTransform()}

    def unconstrained(draws):
        parts = [draws[n] if t is None else t.inv(draws[n]) for n, t in transforms.items()]
        return jnp.concatenate([part.reshape(len(draws["z"]), -1) for part in parts], 1)

    draws = guide.sample_posterior(random.key(2), params, sample_shape=(200_000,))
    for z in (0, 1):
        u = unconstrained(draws)[draws["z"] == z]
        fitted = dist.MultivariateNormal(u.mean(0), jnp.cov(u.T))
        correlation = np.corrcoef(u.T) - np.eye(6)
        assert np.abs(correlation).max() > 0.1
        some = jax.tree.map(lambda x: x[draws["z"] == z][:50], draws)  # noqa: B023
        found = jax.vmap(lambda values: log_prob(guide, params, values, 1.0))(some)
        jacobian = sum(t.log_abs_det_jacobian(t.inv(some[n]), some[n]) for n, t in transforms.items() if t is not None)
        of_z = jnp.log((draws["z"] == z).mean())
        # Moments of about 100,000 draws have errors of about 0.01 each, and the density of 6 dimensions some more.
        np.testing.assert_allclose(found, fitted.log_prob(unconstrained(some)) - jacobian + of_z, atol=0.1)


def test_continuous_draw_solves_what_its_density_says():
    """Noise that a draw is made of is what the density sees again."""
    from numpyro_vimco.families.autoregressive import AutoregressiveNormal, Elements, FullCoupling, LowRankCoupling

    loc, scale, gate, shift, unit = (random.normal(random.key(i), (3, 5)) for i in (0, 1, 2, 7, 8))
    scale, unit, gate = jnp.exp(scale), jnp.exp(unit), (gate > 0).astype(float)
    couplings = [
        FullCoupling(random.normal(random.key(4), (3, 5, 1, 5, 1))),
        LowRankCoupling(random.normal(random.key(4), (3, 5, 1, 2)), random.normal(random.key(5), (5, 1, 2))),
    ]
    elements = Elements(batch_ndim=2, event_dim=0, local_dims=(-1,))
    for coupling in couplings:
        fn = AutoregressiveNormal(loc, unit, shift, scale, gate, coupling, elements, (5, 3))
        u = fn.sample(random.key(6))
        noise = elements.gather(random.normal(random.key(6), (5, 3)))
        expected = dist.Normal().log_prob(noise) - jnp.log(scale * unit)
        np.testing.assert_allclose(elements.gather(fn.log_prob(u)), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(elements.scatter(elements.gather(u), u.shape), u)


# Gradients.


@pytest.mark.long
def test_doubly_reparameterized_gradient_is_exact():
    """Its mean is that of the plain gradient, for all parameters, couplings away from zero."""
    guide = STRUCTURED(linear)
    params = start(guide, 1.0, rng_key=random.key(1), scale=0.3)

    def gradients(is_doubly, rng_key):
        objective = VIMCOStar(0.3, num_particles=3, doubly_reparameterized=is_doubly)
        grad = jax.grad(lambda params, key: objective.loss(key, params, linear, guide, 1.0))
        return jax.vmap(partial(grad, params))(random.split(rng_key, 40_000))

    ours, plain = jax.jit(partial(gradients, True))(random.key(2)), jax.jit(partial(gradients, False))(random.key(3))
    for name in params:
        a, b = (x[name].reshape(40_000, -1) for x in (ours, plain))
        error = jnp.sqrt((a.var(0) + b.var(0)) / 40_000)
        # About 60 numbers within 6 standard errors: fails once in 10^7 runs if the means were normal.
        assert jnp.all(jnp.abs(a.mean(0) - b.mean(0)) < 6 * error + 1e-5), name


# What is coupled.


def sites_of(model, *args, make=STRUCTURED):
    guide = make(model)
    seed(guide, 0)(*args)
    return {site.name: site for site in (guide._sites if make is STRUCTURED else guide.sites)}


def parents(site):
    """The sites that one depends on, by couplings or as its own."""
    return tuple(sorted({*site.coupled, *getattr(site, "own", ())}))


def test_what_is_independent_given_the_data_stays_so():
    def model():
        a = numpyro.sample("a", dist.Bernoulli(0.3))
        b = numpyro.sample("b", dist.Bernoulli(0.3))
        u = numpyro.sample("u", dist.Normal(a, 1))
        v = numpyro.sample("v", dist.Normal(b, 1))
        numpyro.sample("x", dist.Normal(u, 1), obs=0.5)
        numpyro.sample("y", dist.Normal(v, 1), obs=0.5)

    sites = sites_of(model)
    assert {name: parents(site) for name, site in sites.items()} == {"a": (), "b": (), "u": ("a",), "v": ("b",)}


def test_what_is_drawn_before_separates_and_what_comes_later_couples():
    def chain():
        a = numpyro.sample("a", dist.Bernoulli(0.3))
        b = numpyro.sample("b", dist.Bernoulli(0.1 + 0.8 * a))
        c = numpyro.sample("c", dist.Bernoulli(0.1 + 0.8 * b))
        u = numpyro.sample("u", dist.Normal(0.0, 1))
        numpyro.sample("x", dist.Normal(u + c, 1), obs=0.5)

    def collider():
        a = numpyro.sample("a", dist.Bernoulli(0.3))
        b = numpyro.sample("b", dist.Bernoulli(0.3))
        u = numpyro.sample("u", dist.Normal(a + b, 1))
        numpyro.sample("x", dist.Normal(u, 1), obs=0.5)

    assert {n: parents(s) for n, s in sites_of(chain).items()} == {"a": (), "b": ("a",), "c": ("b",), "u": ("c",)}
    assert {n: parents(s) for n, s in sites_of(collider).items()} == {"a": (), "b": ("a",), "u": ("a", "b")}


def mixture(x, is_cumulative=False):
    mean = numpyro.sample("mean", dist.Normal(0, 3).expand([2]).to_event(1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        shift = numpyro.sample("shift", dist.Normal(0, 1))
        level = jnp.cumsum(shift) if is_cumulative else shift
        numpyro.sample("x", dist.Normal(jnp.where(z, mean[0], mean[1]) + level, 1), obs=x)


def test_elements_of_a_plate_are_coupled_only_if_they_share_something():
    sites = sites_of(mixture, jnp.ones(7))
    assert [name for name in sites] == ["mean", "z", "shift"]
    assert sites["z"].elements.local_dims == sites["shift"].elements.local_dims == (-1,)
    params = start(STRUCTURED(mixture), jnp.ones(7))
    assert params["z_auto_weights"].shape == (7, 1, 2)  # of each element, by the two means
    assert params["shift_auto_couplings"].shape == (7, 1, 2)
    assert params["shift_auto_loc_z"].shape == (7, 1)
    assert "shift_auto_loc_weights" not in params  # its own z is all that it reaches
    params = start(STRUCTURED(partial(mixture, is_cumulative=True)), jnp.ones(7))
    assert params["z_auto_weights"].shape == (7, 1, 7)


def test_nothing_in_common_costs_nothing():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(z, 1), obs=x)

    guide, plain = DISCRETE(model), AutoDiscrete(model, structure="mean_field")
    assert set(start(guide, jnp.ones(7))) == set(start(plain, jnp.ones(7)))


def test_a_switch_frees_what_it_switches_off():
    def model(x):
        with numpyro.plate("predictor", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
            u = numpyro.sample("u", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal((u * z * (kind != 1)).sum() + kind.sum(), 1), obs=x)

    gates = sites_of(model, 1.0)["u"].gates
    np.testing.assert_array_equal(gates["z"], [0, 1])
    np.testing.assert_array_equal(gates["kind"], [1, 0, 1])
    guide = STRUCTURED(model)
    params = start(guide, 1.0, rng_key=random.key(0), scale=1.0)

    def loc(z, u):
        data = {**params, "z": z, "kind": jnp.zeros(3, int), "u": u}
        fn = trace(substitute(seed(guide, 0), data=data)).get_trace(1.0)["u"]["fn"]
        return fn.log_prob(u)

    off, on = jnp.array([1, 0, 1]), jnp.array([1, 1, 1])
    moved = jnp.array([1.0, 0.0, 0.0])
    assert loc(off, moved)[1] == loc(off, 0 * moved)[1]  # the second is off: it follows no other
    assert loc(on, moved)[1] != loc(on, 0 * moved)[1]


@pytest.mark.parametrize("plate_particles", of_two_lengths([{}, {"data": 3}], [{"data": 3}]))
def test_local_plates_with_particles_of_their_own(plate_particles):
    x = jnp.array([-2.0, -2.2, 2.1, 1.9, 2.0])
    guide = STRUCTURED(mixture)
    svi = SVI(mixture, guide, optax.adam(0.05), VIMCOStar(num_particles=4, plate_particles=plate_particles))
    result = svi.run(random.key(0), 100, x, progress_bar=False)
    assert jnp.isfinite(result.losses).all() and result.losses[-5:].mean() < result.losses[:5].mean()
    draws = guide.sample_posterior(random.key(1), result.params, sample_shape=(3, 2))
    assert draws["z"].shape == draws["shift"].shape == (3, 2, 5) and draws["mean"].shape == (3, 2, 2)


# Any support, and size.

CONTINUOUS = {
    "real": dist.Normal(0, 1),
    "vector": dist.Normal(jnp.zeros(3), 1).to_event(1),
    "positive": dist.LogNormal(0, 1),
    "bounded": dist.Beta(2.0, 2.0),
    "simplex": dist.Dirichlet(jnp.ones(3)),
    "cholesky": dist.LKJCholesky(3, 1.0),
    "ordered": dist.TransformedDistribution(
        dist.Normal(jnp.zeros(3), 1).to_event(1), dist.transforms.OrderedTransform()
    ),
    "batch": dist.Normal(jnp.zeros((2, 3)), 1),
}
COUNTS = {
    "boolean": dist.Bernoulli(0.4),
    "booleans": dist.Bernoulli(jnp.full((2, 2), 0.4)).to_event(2),
    "category": dist.Categorical(jnp.array([0.2, 0.3, 0.5])),
    "interval": dist.DiscreteUniform(-1, 2),
    "count": dist.Poisson(jnp.array([3.0, 2.0])),
}


@pytest.mark.weekly
@pytest.mark.long
def test_every_support_beside_every_other():
    def model(x):
        values = [numpyro.sample(name, fn) for name, fn in {**COUNTS, **CONTINUOUS}.items()]
        numpyro.sample("x", dist.Normal(sum(jnp.sum(value) for value in values), 1), obs=x)

    guide = STRUCTURED(model)
    params = start(guide, 1.0, rng_key=random.key(0), scale=0.1)
    objective = VIMCOStar(num_particles=2)

    @jax.jit
    def evaluate(params):
        loss = lambda params: objective.loss(random.key(1), params, model, guide, 1.0)  # noqa: E731
        return jax.value_and_grad(loss)(params), guide.sample_posterior(random.key(2), params, sample_shape=(4,))

    (loss, gradient), draws = evaluate(params)
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(value).all() for value in gradient.values())
    for name, fn in {**COUNTS, **CONTINUOUS}.items():
        assert draws[name].shape == (4, *fn.shape()) and jnp.all(fn.support(draws[name]))


@pytest.mark.long
def test_program_has_no_loop_over_elements():
    def equations(size):
        def model(x):
            with numpyro.plate("predictor", size):
                z = numpyro.sample("z", dist.Bernoulli(0.4))
                u = numpyro.sample("u", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal((u * z).sum(), 1), obs=x)

        guide = STRUCTURED(model)
        params = start(guide, 1.0)
        loss = lambda params: VIMCOStar(num_particles=2).loss(random.key(1), params, model, guide, 1.0)  # noqa: E731
        return len(jax.make_jaxpr(jax.grad(loss))(params).eqns)

    assert equations(4) == equations(12)


@pytest.mark.long
def test_rank_is_chosen_by_size():
    def model(size):
        with numpyro.plate("predictor", size):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(z.sum(), 1), obs=1.0)

    assert start(DISCRETE(model), 360)["z_auto_weights"].shape == (360, 1, 360)
    params = start(DISCRETE(model), 400)
    assert params["z_auto_weights_left"].shape == (400, 1, 8) and params["z_auto_weights_right"].shape == (400, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"structure": "full"}, "`structure` is 'full', but must be one of"),
        ({"coupling_speed": 0.0}, "`coupling_speed` is 0.0, but must be a positive number"),
        ({"rank": 0}, "`rank` is 0, but must be an integer of at least 1"),
    ],
)
def test_arguments(arguments, message):
    for make in (AutoMixed, AutoDiscrete):
        with pytest.raises(ValueError, match=message):
            make(mixture, **arguments)


# Scales that depend on a count, and simplices.


def counted_shares(counts):
    """Counts of six kinds; their expected total is a count itself."""
    total = numpyro.sample("total", dist.Poisson(160.0))
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(6)))
    numpyro.sample("counts", dist.Poisson(total * shares).to_event(1), obs=counts)


KINDS = jnp.array([18.0, 19.0, 22.0, 19.0, 20.0, 22.0])


@pytest.mark.long
def test_a_scale_does_not_grow_without_bound_with_a_count():
    """At a count of 400, 34 scales of the prior above its median, it was e^34 times as large; shares were 0 or NaN."""
    guide = AutoMixed(counted_shares)
    svi = SVI(counted_shares, guide, optax.adam(0.01), VIMCOStar(0.5, num_particles=4))
    state = svi.init(random.key(0), KINDS)
    params = svi.get_params(state)
    params |= {
        "total_auto_loc": jnp.array(400.0),
        "shares_auto_scale": jnp.full_like(params["shares_auto_scale"], 0.1),
        "shares_auto_log_scale_total": params["shares_auto_log_scale_total"].at[:, 0].set(1.0),
    }
    draws = guide.sample_posterior(random.key(1), params, sample_shape=(2000,))
    width = jnp.std(InsideSimplex()._inverse(draws["shares"]), axis=0)
    assert (abs(width / (0.1 * jnp.exp(3.0)) - 1) < 0.1).all()  # six standard errors of a standard deviation
    loss = VIMCOStar(0.5, num_particles=256).loss(random.key(2), params, counted_shares, guide, KINDS)
    assert jnp.isfinite(loss)


def test_a_count_does_not_grow_without_bound_with_another():
    def model(total):
        first = numpyro.sample("first", dist.Poisson(160.0))
        second = numpyro.sample("second", dist.Poisson(100.0))
        numpyro.sample("total", dist.Poisson(1.0 * first + second), obs=total)

    guide = AutoMixed(model)
    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar(0.5, num_particles=4))
    params = svi.get_params(svi.init(random.key(0), 250.0))
    weights = params["second_auto_weights"]  # of shape (2, 4): logarithms of location and scale, features of the first
    params |= {"first_auto_loc": jnp.array(400.0), "second_auto_weights": weights.at[0, 0].set(1.0)}
    second = guide.sample_posterior(random.key(1), params, sample_shape=(1000,))["second"]
    relative = params["second_auto_scale"] / params["second_auto_loc"]  # the unit of its logarithm
    expected = params["second_auto_loc"] * jnp.exp(relative * guide.coupling_speed * 3.0)
    # The median of 1,000 draws has a standard error of 2 scales / √1000; it was 20,000 times as large.
    assert abs(jnp.median(second) - expected) < 12 * params["second_auto_scale"] / 1000**0.5


def test_shares_stay_inside_of_the_simplex():
    transform, ours = StickBreakingTransform(), InsideSimplex()
    x = 60 * random.normal(random.key(0), (1000, 5))
    assert (transform(x) == 0).any() and (ours(x) > 0).all()
    assert jnp.isfinite(ours.log_abs_det_jacobian(x, ours(x))).all() and jnp.isfinite(ours._inverse(ours(x))).all()
    x = 3 * random.normal(random.key(0), (20_000, 5))
    np.testing.assert_array_equal(transform(x), ours(x))
    assert abs(transform._inverse(transform(x)) - x).max() > 1  # NumPyro's has no digits left
    np.testing.assert_allclose(ours._inverse(ours(x)), x, atol=0.05)


@pytest.mark.long
def test_a_count_times_shares():
    """numpyro#1239. All starts ended in NaN."""
    rate = optax.warmup_cosine_decay_schedule(0.01, 0.01, 1000, 2000)
    svi = SVI(counted_shares, AutoMixed(counted_shares), optax.adam(rate), VIMCOStar(0.5, num_particles=64))
    posterior = fit(svi, random.key(0), 2000, KINDS, progress_bar=False)
    posterior.diagnose(rng_key=random.key(1))
    # Shares are uniform, so that given the total n all splits of the counts are as probable.
    n, counts = np.arange(1, 500), np.asarray(KINDS, float)
    log_joint = poisson(160).logpmf(n) + poisson(n).logpmf(counts.sum())
    exact = logsumexp(log_joint) + gammaln(counts.sum() + 1) + gammaln(6) - gammaln(counts.sum() + 6)
    assert posterior.verdict == "good" and abs(posterior.log_evidence - exact) < 0.02


def test_many_elements_do_not_shift_a_scale_without_end():
    def model(x):
        with numpyro.plate("switch", 100, dim=-1):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
        noise = numpyro.sample("noise", dist.LogNormal(0, 1))
        numpyro.sample("x", dist.Normal(z.sum(), noise), obs=x)

    def sequence(x):
        z = numpyro.sample("z", dist.Bernoulli(jnp.full(100, 0.5)).to_event(1))
        noise = numpyro.sample("noise", dist.LogNormal(0, 1))
        numpyro.sample("x", dist.Normal(z.sum(), noise), obs=x)

    for program, name in ((sequence, "noise_auto_log_scale_z"), (model, "noise_auto_log_scale_weights")):
        guide = STRUCTURED(program)
        params = start(guide, 50.0)
        # All 100 are on, and each of them doubles the scale or more.
        params = {**params, "z_auto_logits": jnp.full(100, 20.0), name: jnp.full_like(params[name], 3.0)}
        draws = guide.sample_posterior(random.key(0), params, 50.0, sample_shape=(1000,))["noise"]
        assert jnp.isfinite(draws).all() and (draws > 0).all()
        # The standard deviation of its logarithm, of 1,000 draws, to five standard errors.
        scale = jnp.log(draws).std()
        np.testing.assert_allclose(scale, params["noise_auto_scale"] * np.exp(3), rtol=5 / np.sqrt(2000))
