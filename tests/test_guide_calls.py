"""Automatic guides under transformations of JAX, and at priors that need a word: improper ones, point masses."""

from functools import partial
import inspect

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import seed, trace
from numpyro.infer import (
    SVI,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.util import log_density
import optax
import pytest

from numpyro_vimco import AutoMixed, Posterior, VIMCOStar


def make(case):
    """A distribution, or skip what an older NumPyro lacks."""
    if isinstance(case, dist.Distribution):
        return case
    name, args = case
    if not hasattr(dist, name):
        pytest.skip(f"this NumPyro has no {name}")
    try:
        return getattr(dist, name)(*args)
    except AssertionError:
        pytest.skip(f"this NumPyro admits no such {name}")


# Transformations of JAX: what a guide keeps from its first call is no tracer.


def small_model(x):
    count = numpyro.sample("count", dist.Poisson(3.0))
    with numpyro.plate("row", 2):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        u = numpyro.sample("u", dist.Uniform(jnp.zeros((2, 3)), 1).to_event(1))
    mean = numpyro.deterministic("mean", z @ u.sum(-1) + count)
    numpyro.sample("x", dist.Normal(mean, 1), obs=x)


def continuous_uniform(x):
    u = numpyro.sample("u", dist.Uniform(jnp.zeros(3), 1).to_event(1))
    numpyro.sample("x", dist.Normal(u.sum(), 1), obs=x)


def keep_key_traced(svi):
    return svi.get_params(jax.jit(lambda key: svi.init(key, 1.0))(random.key(0)))


def keep_nothing(svi):
    return svi.get_params(jax.jit(svi.init)(random.key(0), 1.0))


def run_mapped(svi):
    params = jax.vmap(lambda key: svi.run(key, 2, 1.0, progress_bar=False).params)(random.split(random.key(0)))
    return jax.tree.map(lambda x: x[0], params)


CONDITIONAL = partial(AutoMixed, structure="conditional")


@pytest.mark.parametrize(
    "model, make, first_call",
    [
        pytest.param(small_model, CONDITIONAL, keep_key_traced, marks=pytest.mark.long),
        pytest.param(small_model, CONDITIONAL, keep_nothing, marks=pytest.mark.long),
        pytest.param(small_model, CONDITIONAL, run_mapped, marks=pytest.mark.long),
        pytest.param(small_model, partial(AutoMixed, structure="autoregressive"), run_mapped, marks=pytest.mark.long),
        pytest.param(
            small_model, partial(AutoMixed, continuous=AutoMultivariateNormal), keep_key_traced, marks=pytest.mark.long
        ),
        (continuous_uniform, AutoMixed, keep_nothing),
        pytest.param(continuous_uniform, AutoMixed, run_mapped, marks=pytest.mark.long),
    ],
)
def test_no_tracer_survives(model, make, first_call):
    guide = make(model)
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(num_particles=2))
    with jax.check_tracer_leaks():
        params = first_call(svi)
    if first_call is keep_nothing:
        with pytest.raises(ValueError, match="keeps nothing that depends on them"):
            guide.sample_posterior(random.key(1), params)
    draws = guide.sample_posterior(random.key(1), params, *([1.0] if first_call is keep_nothing else []))
    assert draws["u"].shape[-1] == 3
    again = svi.init(random.key(0), 1.0)
    assert jnp.isfinite(svi.evaluate(again, 1.0))


def test_each_key_has_a_start_of_its_own():
    svi = SVI(small_model, AutoMixed(small_model, structure="mean_field"), optax.adam(0.1), VIMCOStar(num_particles=2))
    starts = jax.vmap(lambda key: svi.get_params(svi.init(key, 1.0)))(random.split(random.key(0)))
    assert np.all(starts["z_auto_logits"][0] != starts["z_auto_logits"][1])


@pytest.mark.parametrize("structure", ["mean_field", "conditional", "autoregressive"])
def test_no_rank_is_promoted(structure):
    """Where the model promotes none."""

    def model(x):
        with numpyro.plate("row", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            k = numpyro.sample("k", dist.DiscreteUniform(0, jnp.array([2, 3])))
            n = numpyro.sample("n", dist.Poisson(2.0))
            u = numpyro.sample("u", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal((z + k + n) * u, 1), obs=x)

    guide = AutoMixed(model, structure=structure)
    with jax.numpy_rank_promotion("raise"):
        _, tr = log_density(seed(guide, 0), (jnp.ones(2),), {}, {})
        params = {name: site["value"] for name, site in tr.items() if site["type"] == "param"}
        guide.sample_posterior(random.key(0), params)


# Improper priors.

INITS = {
    "median": init_to_median,
    "mean": init_to_mean,
    "sample": init_to_sample,
    "uniform": init_to_uniform,
    "feasible": init_to_feasible,
    "value": init_to_value(values={"a": jnp.array([1.0, 2.0])}),
}


@pytest.mark.parametrize("with_discrete", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_improper_prior(init, with_discrete):
    def model(x):
        a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
        z = numpyro.sample("z", dist.Bernoulli(0.4)) if with_discrete else 1
        numpyro.sample("x", dist.Normal(a.sum() * z, 1), obs=x)

    guide = AutoMixed(model, init_loc_fn=INITS[init], structure="mean_field")
    sites = trace(seed(guide, 0)).get_trace(1.0)
    if init == "value":
        np.testing.assert_allclose(
            sites["a_auto_loc"]["value"], jnp.log(INITS[init].keywords["values"]["a"]), rtol=1e-6
        )
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(num_particles=2))
    assert jnp.isfinite(svi.run(random.key(0), 2, 1.0, progress_bar=False).losses).all()


# Point masses in priors.

HALVES = dist.Categorical(jnp.array([0.5, 0.5]))
SPIKE_AND_SLAB = dist.MixtureGeneral(HALVES, [dist.Delta(0.0), dist.Normal(0, 1)], support=dist.constraints.real)
MASSES = {
    "mixture": SPIKE_AND_SLAB,
    "of one family": ("MixtureSameFamily", (HALVES, dist.Delta(jnp.array([0.0, 1.0])))),
    "in a mixture": dist.MixtureGeneral(HALVES, [SPIKE_AND_SLAB, dist.Normal(0, 1)]),
    "expanded": SPIKE_AND_SLAB.expand([3]),
    "independent": SPIKE_AND_SLAB.expand([3]).to_event(1),
    "masked": SPIKE_AND_SLAB.mask(True),
    "transformed": dist.TransformedDistribution(SPIKE_AND_SLAB, dist.transforms.ExpTransform()),
    "delta": dist.Delta(1.0),
    "hurdle": ("HurdleProbs", (dist.LogNormal(0, 1), 0.3)),
}


@pytest.mark.parametrize("kind", MASSES)
@pytest.mark.parametrize("with_discrete", [False, True])
def test_point_mass_in_a_prior(kind, with_discrete):
    prior = make(MASSES[kind])

    def model():
        if with_discrete:
            numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("b", prior)

    with pytest.raises(ValueError, match="continuous site 'b' has a point mass") as error:
        seed(AutoMixed(model), 0)()

    def written_instead(y):
        namespace = {"numpyro": numpyro, "dist": dist}
        exec(inspect.cleandoc("    " + str(error.value).split("\n\n")[1]), namespace)
        numpyro.sample("y", dist.Normal(namespace["b"], 1), obs=y)

    if kind == "mixture" and with_discrete:
        svi = SVI(written_instead, AutoMixed(written_instead, structure="conditional"), optax.adam(0.05), VIMCOStar())
        posterior = Posterior(svi, svi.run(random.key(0), 300, 0.4, progress_bar=False), 0.4)
        posterior.diagnose(10_000, random.key(2))
        # A good guide's error with 10,000 draws is about 0.002; without the mass the evidence is -1.999.
        assert abs(posterior.log_evidence + 1.141) < 0.02


def test_masses_of_counts_are_none():
    def model():
        numpyro.sample("k", dist.ZeroInflatedPoisson(0.3, 4.0))
        numpyro.sample("u", dist.MixtureGeneral(HALVES, [dist.Normal(0, 0.1), dist.Normal(0, 1)]))

    assert set(seed(AutoMixed(model), 0)()) == {"k", "u"}


# Priors of users whose support is not what they declare.


class Coin(dist.Distribution):
    """A coin whose support a subclass declares."""

    pytree_data_fields = ("shift",)

    def __init__(self, shift=0.0, batch_shape=()):
        self.shift = jnp.asarray(shift)
        super().__init__(batch_shape, validate_args=False)

    def sample(self, key, sample_shape=()):
        return random.bernoulli(key, 0.3, sample_shape + self.batch_shape) + self.shift

    def log_prob(self, value):
        return jnp.where(value > 0.5 + self.shift, jnp.log(0.3), jnp.log(0.7))


class RealCoin(Coin):
    support = dist.constraints.real


class RightCoin(Coin):
    support = dist.constraints.boolean

    def sample(self, key, sample_shape=()):
        return super().sample(key, sample_shape).astype(int)


class LowCoin(Coin):
    support = dist.constraints.integer_interval(1, 3)


class UnknownCoin(Coin):
    @property
    def support(self):
        raise NotImplementedError


class RealLaplace(Coin):
    support = dist.constraints.real

    def sample(self, key, sample_shape=()):
        return random.laplace(key, sample_shape + self.batch_shape)

    def log_prob(self, value):
        return -jnp.abs(value) - jnp.log(2.0)


WRONG = "are integers. An automatic guide would propose"
SUPPORTS = {
    "integers": (lambda: RealCoin(), WRONG),
    "two numbers": (lambda: RealCoin(0.25), WRONG),
    "right and a vector": (lambda: RealLaplace(batch_shape=(2,)).to_event(1), None),
    "elements of an event": (lambda: RealCoin(batch_shape=(2,)).to_event(1), WRONG),
    "of NumPyro": (
        lambda: dist.TransformedDistribution(dist.BernoulliProbs(0.3), dist.transforms.AffineTransform(0.25, 2.0)),
        WRONG,
    ),
    "outside": (lambda: LowCoin(), "of 100 draws are outside of its support"),
    "none": (lambda: Coin(), "'z', Coin, has no support"),
    "unknown": (lambda: UnknownCoin().expand([2]).to_event(1), "'z', UnknownCoin, has no support"),
    "right and discrete": (lambda: RightCoin(), None),
    "right and continuous": (lambda: RealLaplace(), None),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_priors_have_the_support_that_they_declare(name):
    make_prior, message = SUPPORTS[name]

    def model():
        z = numpyro.sample("z", make_prior())
        numpyro.sample("x", dist.Normal(jnp.sum(z), 1.0), obs=0.4)

    svi = SVI(model, AutoMixed(model), optax.adam(0.1), VIMCOStar(num_particles=2))
    if message is None:
        assert np.isfinite(svi.run(random.key(0), 2, progress_bar=False).losses).all()
    else:
        with pytest.raises(ValueError, match=message):
            svi.run(random.key(0), 2, progress_bar=False)
