"""Automatic guides: every discrete prior has one or an error, and they are NumPyro's own in all other respects."""

from functools import partial
import inspect
import pickle

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import SVI, Predictive, init_to_value
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
import optax
import pytest
from sklearn.datasets import load_iris

from helpers import of_two_lengths
from numpyro_vimco import AutoDiscrete, AutoMixed, VIMCOStar

# Every discrete distribution of NumPyro as a prior.

POISSONS = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), dist.Poisson(jnp.array([1.0, 9.0])))
GUIDED = {
    "BernoulliLogits": dist.BernoulliLogits(-1.0),
    "BernoulliProbs": dist.BernoulliProbs(jnp.array([0.2, 0.9])),
    "BetaBinomial": dist.BetaBinomial(2.0, 3.0, 6),
    "BetaNegativeBinomial": ("BetaNegativeBinomial", (3.0, 2.0, 4.0)),
    "BinomialLogits": dist.BinomialLogits(0.3, 5),
    "BinomialProbs": dist.BinomialProbs(0.3, jnp.array([2, 7])),
    "CategoricalLogits": dist.CategoricalLogits(jnp.array([0.0, 1.0, 2.0])),
    "CategoricalProbs": dist.CategoricalProbs(jnp.array([[0.2, 0.8], [0.5, 0.5]])),
    "DiscreteUniform": dist.DiscreteUniform(-3, 4),
    "GammaPoisson": dist.GammaPoisson(2.0, 0.5),
    "GeometricLogits": dist.GeometricLogits(-1.0),
    "GeometricProbs": dist.GeometricProbs(0.3),
    "HurdlePoisson": ("HurdlePoisson", (0.3, 4.0)),
    "HurdleProbs": ("HurdleProbs", (dist.Poisson(4.0), 0.3)),
    "HurdleLogits": ("HurdleLogits", (dist.Poisson(4.0), 0.3)),
    "MixtureSameFamily": POISSONS,
    "MixtureGeneral": dist.MixtureGeneral(
        dist.Categorical(jnp.array([0.5, 0.5])), [dist.Poisson(1.0), dist.Poisson(9.0)]
    ),
    "NegativeBinomial2": dist.NegativeBinomial2(20.0, 3.0),
    "NegativeBinomialLogits": dist.NegativeBinomialLogits(3.0, 0.5),
    "NegativeBinomialProbs": dist.NegativeBinomialProbs(3.0, 0.5),
    "OrderedLogistic": dist.OrderedLogistic(0.5, jnp.array([-1.0, 1.0])),
    "Poisson": dist.Poisson(jnp.array([0.3, 4.0, 1000.0])),
    "ZeroInflatedLogits": dist.ZeroInflatedDistribution(dist.Poisson(4.0), gate_logits=0.0),
    "ZeroInflatedPoisson": dist.ZeroInflatedPoisson(0.3, 4.0),
    "ZeroInflatedProbs": dist.ZeroInflatedDistribution(dist.Binomial(4, 0.5), gate=0.3),
    "Independent": dist.Poisson(jnp.ones((3, 2))).to_event(1),
    "ExpandedDistribution": dist.Bernoulli(0.3).expand([4]),
    "MaskedDistribution": dist.Bernoulli(jnp.full(3, 0.3)).mask(jnp.array([True, False, True])),
}
# One prior for each family of the guide, and for each way in which a distribution can wrap another.
EACH_FAMILY = (
    "BernoulliLogits",
    "CategoricalLogits",
    "DiscreteUniform",
    "Poisson",
    "Independent",
    "MaskedDistribution",
)
# Counts with a sum, one after the other: tests/test_bounds.py has their densities.
TOTALS = {
    "DirichletMultinomial": dist.DirichletMultinomial(jnp.ones(3), 5),
    "MultinomialLogits": dist.MultinomialLogits(jnp.zeros(3), 5),
    "MultinomialProbs": dist.MultinomialProbs(jnp.ones(3) / 3, 5),
}
# Discrete in some forms, but no prior of a latent by themselves, or refused by NumPyro.
BASES = {"Delta", "Distribution", "ImproperUniform", "TransformedDistribution"}


def make(case):
    """A distribution of the table, or skip what an older NumPyro lacks."""
    if isinstance(case, dist.Distribution):
        return case
    name, args = case
    if not hasattr(dist, name):
        pytest.skip(f"this NumPyro has no {name}")
    return getattr(dist, name)(*args)


def test_the_table_has_every_discrete_distribution():
    def may_be_discrete(cls):
        try:
            return getattr(inspect.getattr_static(cls, "support", None), "is_discrete", None) is not False
        except NotImplementedError:
            return True

    classes = {cls for _, cls in inspect.getmembers(dist, inspect.isclass) if issubclass(cls, dist.Distribution)}
    found = {cls.__name__ for cls in classes if may_be_discrete(cls)}
    assert found - set(GUIDED) - set(TOTALS) - BASES == set()


@pytest.mark.parametrize("name", of_two_lengths(GUIDED, EACH_FAMILY))
def test_guide_of_every_discrete_prior(name):
    prior = make(GUIDED[name])

    def model():
        z = numpyro.sample("z", prior)
        seen = jnp.where(getattr(prior, "_mask", True), z, 0)  # nothing may depend on what is masked
        numpyro.sample("x", dist.Normal(jnp.asarray(seen, float), 1.0).to_event(), obs=jnp.ones(jnp.shape(z)))

    # One component, of mixtures too: several have no closed quantiles.
    guide = AutoDiscrete(model, structure="mean_field", num_components={"z": 1})
    params = start(guide)
    assert set(params) in ({"z_auto_logits"}, {"z_auto_loc", "z_auto_scale"})

    @jax.jit
    def evaluate(params):
        loss, gradients = jax.value_and_grad(VIMCOStar(num_particles=4).loss, 1)(random.key(1), params, model, guide)
        draws = guide.sample_posterior(random.key(2), params, sample_shape=(500,))["z"]
        return loss, gradients, draws, guide.median(params)["z"], guide.quantiles(params, [0.25, 0.5, 0.75])["z"]

    loss, gradients, draws, median, quantiles = jax.tree.map(np.asarray, evaluate(params))
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() and g.any() for g in gradients.values())
    assert draws.shape == (500, *prior.batch_shape, *prior.event_shape)
    assert draws.dtype == np.int32 and np.all(prior.support(draws)) and np.all(prior.support(median))
    np.testing.assert_array_equal(median, quantiles[1])
    # Of 500 draws, at least 130 are at or below the median: fails less than once in 10^20 runs.
    assert np.all((draws <= median).mean(0) > 0.26) and np.all((draws >= median).mean(0) > 0.26)
    assert np.all(quantiles[0] <= quantiles[2])


@pytest.mark.parametrize("name", of_two_lengths(TOTALS, ["MultinomialProbs"]))
@pytest.mark.parametrize("structure", ["mean_field", "autoregressive"])
def test_counts_with_a_sum(name, structure):
    def model():
        z = numpyro.sample("z", TOTALS[name])
        numpyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=2.0)

    guide = AutoDiscrete(model, structure=structure)
    params = start(guide)
    loss, gradients = jax.value_and_grad(VIMCOStar(num_particles=4).loss, 1)(random.key(1), params, model, guide)
    assert jnp.isfinite(loss) and all(jnp.isfinite(g).all() for g in gradients.values())
    draws = guide.sample_posterior(random.key(2), params, sample_shape=(500,))["z"]
    assert (draws.sum(-1) == 5).all() and (draws >= 0).all()
    assert (draws.max(0) >= 4).all()


def test_counts_with_one_sum_for_all_elements_of_a_plate():
    def model():
        with numpyro.plate("pool", 3):
            z = numpyro.sample("z", dist.Multinomial(5, jnp.ones(2) / 2))
            numpyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=2.0)

    assert (seed(AutoDiscrete(model), 0)()["z"].sum(-1) == 5).all()


class Switches(dist.constraints.Constraint):
    is_discrete, event_dim = True, 1

    def __call__(self, x):
        return ((x == 0) | (x == 1)).all(-1)


class Pair(dist.Distribution):
    """A user's distribution of two switches, with a support of the user's."""

    support = Switches()

    def __init__(self):
        super().__init__(event_shape=(2,))

    def sample(self, key, sample_shape=()):
        return random.bernoulli(key, 0.5, (*sample_shape, 2)).astype(int)

    def log_prob(self, value):
        return jnp.full(jnp.shape(value)[:-1], np.log(0.25))


def test_error_of_a_support_without_a_family_has_a_guide_that_works():
    def model():
        numpyro.sample("p", dist.Beta(1, 1))
        numpyro.sample("z", Pair())

    with pytest.raises(NotImplementedError, match=r"no automatic guide for site 'z', a Pair of shape") as error:
        AutoMixed(model)
        seed(AutoDiscrete(model), 0)()
    namespace = {"AutoMixed": AutoMixed, "numpyro": numpyro, "jnp": jnp, "dist": dist, "model": model}
    exec(inspect.cleandoc("    " + str(error.value).split("\n\n", 1)[1]), namespace)
    svi = SVI(model, namespace["guide"], optax.adam(0.1), VIMCOStar())
    assert jnp.isfinite(svi.run(random.key(0), 3, progress_bar=False).losses).all()


# Where a fit begins.


def start(guide, *args):
    """Parameters that a guide begins with."""
    sites = trace(seed(guide, 0)).get_trace(*args)
    return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}


def test_begins_near_the_prior_and_off_it():
    probs, rates = jnp.full(200, 0.3), jnp.full(200, 50.0)

    def model():
        numpyro.sample("boolean", dist.Bernoulli(probs))
        numpyro.sample("category", dist.Categorical(jnp.array([0.7, 0.2, 0.1])))
        numpyro.sample("count", dist.Poisson(rates))

    params = start(AutoDiscrete(model, structure="mean_field"))
    logits = params["boolean_auto_logits"]
    assert abs(logits.mean() - jnp.log(0.3 / 0.7)) < 0.1 and 0.05 < logits.std() < 0.2  # 0.1 standard normals
    np.testing.assert_allclose(jax.nn.softmax(params["category_auto_logits"]), [0.7, 0.2, 0.1], atol=0.15)
    # 200 draws a site: the median's error is about 0.6, of a standard deviation of 7.
    assert abs(params["count_auto_loc"].mean() - 50) < 2
    assert abs(params["count_auto_scale"].mean() * np.pi / np.sqrt(3) - 50**0.5) < 1


def test_begins_at_given_values():
    def model():
        numpyro.sample("z", dist.Categorical(jnp.ones(5) / 5))
        numpyro.sample("k", dist.Poisson(jnp.array([3.0, 3.0])))

    values = {"z": 3, "k": jnp.array([40, 2])}
    params = start(AutoDiscrete(model, init_loc_fn=init_to_value(values=values), structure="mean_field"))
    assert jax.nn.softmax(params["z_auto_logits"])[3] > 0.8
    np.testing.assert_allclose(params["k_auto_loc"], [40, 2], rtol=0.6)  # 6 of the moves by 0.1


def test_a_given_value_is_for_each_element():
    guide = AutoDiscrete(discrete_model, init_loc_fn=init_to_value(values={"z": 1}), structure="mean_field")
    assert start(guide, X)["z_auto_logits"].shape == (3, 3)


# NumPyro's automatic guides.


def visits_by_sites(seen):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("site", seen.shape[1]):
        count = numpyro.sample("count", dist.Poisson(rate))
        with numpyro.plate("visit", seen.shape[0]):
            numpyro.sample("seen", dist.Binomial(count, 0.5), obs=seen)


def rows(seen):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    site = np.tile(np.arange(seen.shape[1]), seen.shape[0])
    count = numpyro.sample("count", dist.Poisson(rate).expand([seen.shape[1]]).to_event(1))
    with numpyro.plate("row", site.size):
        numpyro.sample("seen", dist.Binomial(count[site], 0.5), obs=seen.ravel())


def of_two_counts(seen):
    with numpyro.plate("site", seen.shape[1]):
        count = numpyro.sample("count", dist.Poisson(1.0))
        others = numpyro.sample("others", dist.Poisson(1.0))
        numpyro.sample("seen", dist.Binomial(count + others, 0.5), obs=seen[0])


def neighbours(seen):
    """A datum depends on two elements: none has a bound of its own."""
    with numpyro.plate("site", seen.shape[1]):
        count = numpyro.sample("count", dist.Poisson(1.0))
    numpyro.sample("seen", dist.Binomial(count[1:] * count[:-1], 0.5), obs=seen[0, 1:])


@pytest.mark.parametrize(
    ("model", "first"),
    [(visits_by_sites, [13, 0, 8]), (rows, [13, 0, 8]), (of_two_counts, None), (neighbours, None)],
)
def test_counts_begin_above_the_least_that_the_data_admit(model, first):
    """Sites by visits, and rows that say their site: the prior's median is 1, and twelve were seen at one visit."""
    seen = np.array([[3, 0, 7], [12, 0, 1]])
    guide = AutoMixed(model)
    loc = start(guide, seen)["count_auto_loc"]
    # A tenth of a unit off on average; without data from 0.5 to 1.
    np.testing.assert_allclose(loc, 1.0 if first is None else np.maximum(first, 0.7), rtol=0.6)


def test_where_counts_begin_can_be_given():
    seen = np.array([[3, 0, 7], [12, 0, 1]])
    guide = AutoMixed(visits_by_sites, init_loc_fn=init_to_value(values={"count": 20}))
    np.testing.assert_allclose(start(guide, seen)["count_auto_loc"], 20.0, rtol=0.6)


def mixed_model(x=None):
    rate = numpyro.sample("rate", dist.LogNormal(1.0, 0.5))
    count = numpyro.sample("count", dist.Poisson(rate))
    score = numpyro.sample("score", dist.DiscreteUniform(0, jnp.array([2, 5, 3])).to_event(1))
    with numpyro.plate("row", 3):
        shift = numpyro.sample("shift", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        active = numpyro.sample("active", dist.Bernoulli(0.4))
        kind = numpyro.sample("kind", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        mean = numpyro.deterministic("mean", active * shift.sum(-1) + kind + 0.1 * (count + score.sum()))
        numpyro.sample("x", dist.Normal(mean, 0.5), obs=x)


X = jnp.array([0.3, 1.0, 2.5])


@pytest.fixture(
    scope="module",
    params=of_two_lengths(["mean_field", "conditional", "autoregressive"], ["autoregressive"]),
)
def fitted(request):
    """A guide of all kinds of sites, and its parameters after some steps."""
    guide = AutoMixed(mixed_model, structure=request.param)
    svi = SVI(mixed_model, guide, optax.adam(0.05), VIMCOStar(num_particles=8))
    return guide, svi.run(random.key(0), 200, X, progress_bar=False).params


def test_parameter_names(fitted):
    guide, params = fitted
    mean_field = {
        f"{site}_auto_{name}"
        for site in ("rate", "shift", "count")
        for name in ("loc", "scale")
    } | {f"{site}_auto_logits" for site in ("score", "active", "kind")}  # fmt: skip
    assert mean_field <= set(params)
    # The rate is in no plate, and depends on nothing that is in one.
    coupled = {"rate": ("count", "score"), "shift": ("count", "score", "active", "kind")}
    own = {f"{a}_auto_{k}_{b}" for a, bs in coupled.items() for b in bs for k in ("loc", "log_scale")}
    # Given the count, the rate does not depend on the scores; what is in the row's own plate it knows.
    autoregressive = {name for name in own if not (name.startswith("rate") and name.endswith("score"))}
    autoregressive |= {"shift_auto_couplings"} | {f"{a}_auto_weights" for a in ("score", "active", "kind")}
    expected = {"mean_field": set(), "conditional": own, "autoregressive": autoregressive}
    assert set(params) - mean_field == expected[guide.structure]


def test_sample_posterior_draws_what_the_guide_draws(fitted):
    guide, params = fitted
    draws = guide.sample_posterior(random.key(1), params, sample_shape=(20, 200))
    assert {name: value.shape for name, value in draws.items()} == {
        "rate": (20, 200), "count": (20, 200), "score": (20, 200, 3), "shift": (20, 200, 3, 2),
        "active": (20, 200, 3), "kind": (20, 200, 3), "mean": (20, 200, 3),
    }  # fmt: skip
    mean = draws["active"] * draws["shift"].sum(-1) + draws["kind"]
    mean = mean + 0.1 * (draws["count"] + draws["score"].sum(-1))[..., None]
    np.testing.assert_allclose(draws["mean"], mean, rtol=1e-5)
    by_guide = Predictive(guide, params=params, num_samples=4_000, parallel=True)(random.key(2), X)

    def moments(draws):
        flat = [jnp.asarray(value, float).reshape(4_000, -1) for name, value in sorted(draws.items()) if name != "mean"]
        flat = jnp.concatenate(flat, axis=1)
        products = (flat[:, :, None] * flat[:, None]).reshape(4_000, -1)
        both = jnp.concatenate([flat, products], axis=1)
        return both.mean(0), both.var(0) / 4_000

    (a, a_error), (b, b_error) = moments(draws), moments(by_guide)
    # About 300 first and second moments; 6.5 standard errors: fails less than once in 10^7 runs if they were normal;
    # the heaviest here are products of log-normal variables.
    assert jnp.all(jnp.abs(a - b) < 6.5 * jnp.sqrt(a_error + b_error) + 1e-6)


def test_deterministic_sites_without_arguments_are_those_of_the_fit(fitted):
    guide, params = fitted
    draws = guide.sample_posterior(random.key(1), params)
    assert draws["mean"].shape == (3,)


def test_median_and_quantiles(fitted):
    guide, params = fitted
    if guide.structure != "mean_field":
        with pytest.raises(NotImplementedError, match="is a mixture, and has no closed quantiles"):
            guide.median(params)
        return
    draws = guide.sample_posterior(random.key(1), params, sample_shape=(20_000,))
    quantiles = guide.quantiles(params, [0.1, 0.9])
    for name, value in quantiles.items():
        below = (draws[name] <= value[:, None] + 1e-6).mean(1)
        # 0.1 and 0.9 with 20,000 draws, about 20 elements: 6 standard errors are 0.0127.
        assert jnp.all(below[0] > 0.0873) and jnp.all(below[1] > 0.8873)
        if jnp.issubdtype(value.dtype, jnp.floating):
            assert jnp.all(below[0] < 0.1127)
    np.testing.assert_array_equal(guide.median(params)["kind"], guide.quantiles(params, [0.5])["kind"][0])


def test_pickle(fitted):
    try:
        pickle.dumps(random.key(0))
    except TypeError:
        pytest.skip("this version of JAX cannot pickle keys, which guides keep, those of NumPyro too")
    guide, params = fitted
    again = pickle.loads(pickle.dumps(guide))
    expected = guide.sample_posterior(random.key(3), params)
    jax.tree.map(np.testing.assert_array_equal, again.sample_posterior(random.key(3), params), expected)


def test_a_new_guide_samples_from_parameters_alone(fitted):
    guide, params = fitted
    new = AutoMixed(mixed_model, structure=guide.structure)
    draws = Predictive(mixed_model, guide=new, params=params, num_samples=50, parallel=True)(random.key(4), X)
    assert draws["mean"].shape == (50, 3)


def test_elements_of_a_shared_plate_are_coupled_one_by_one(fitted):
    guide, params = fitted
    if guide.structure != "conditional":
        pytest.skip("others have more couplings, or none")
    given = {"active": jnp.array([0, 1, 0]), "kind": jnp.array([0, 2, 1]), "count": 3, "score": jnp.array([1, 4, 0])}
    model = substitute(seed(guide, 0), data={**params, **{k: jnp.asarray(v) for k, v in given.items()}})
    base = trace(model).get_trace(X)["shift"]["fn"].base_dist.base_dist
    log_scale = jnp.log(params["shift_auto_scale"])
    loc, shift = params["shift_auto_loc"], 0.0
    families = guide._parts[0].families
    count = families["count"]
    features = {
        "active": given["active"][:, None, None],
        "kind": jnp.eye(3)[given["kind"]][:, None],
        "count": count.features(jnp.array(given["count"])).reshape(1, 1, 4),
        "score": jnp.eye(6)[given["score"]].reshape(1, 1, 18),
    }
    for name, value in features.items():
        loc = loc + (params[f"shift_auto_loc_{name}"] * value).sum(-1)
        shift = shift + (params[f"shift_auto_log_scale_{name}"] * value).sum(-1)
    log_scale = log_scale + 3 * jnp.tanh(shift / 3)  # what more than two sites shift together ends at 3
    np.testing.assert_allclose(base.loc, loc, rtol=1e-5)
    np.testing.assert_allclose(base.scale, jnp.exp(log_scale), rtol=1e-5)


def test_an_element_depends_on_what_its_own_plate_element_has():
    """Where the discrete site has a batch dimension to the left of the plate, too."""

    def model():
        with numpyro.plate("row", 3):
            z = numpyro.sample("z", dist.Bernoulli(jnp.full((2, 3), 0.5)))
            numpyro.sample("u", dist.Normal(z.sum(0), 1))

    guide = AutoMixed(model, structure="conditional")
    z = jnp.array([[1, 0, 0], [1, 1, 0]])
    weights = jnp.arange(6.0).reshape(3, 2) + 1
    fixed = {**start(guide), "z": z, "u_auto_loc": jnp.zeros(3), "u_auto_loc_z": weights}
    u = trace(substitute(seed(guide, 0), data=fixed)).get_trace()["u"]["fn"].base_dist
    np.testing.assert_allclose(u.loc, (weights * z.T).sum(1), rtol=1e-6)


def continuous_model(x):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    numpyro.deterministic("ratio", loc / scale)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, scale), obs=x)


def discrete_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    "continuous",
    of_two_lengths([AutoMultivariateNormal, AutoDelta, AutoLaplaceApproximation], [AutoMultivariateNormal]),
)
def test_without_discrete_sites_it_is_the_continuous_guide(continuous):
    def fit(guide):
        svi = SVI(continuous_model, guide, optax.adam(0.1), VIMCOStar(num_particles=4))
        params = svi.run(random.key(0), 20, X, progress_bar=False).params
        return params, guide.sample_posterior(random.key(1), params, X), guide.median(params)

    mixed = AutoMixed(continuous_model, continuous=continuous, structure="mean_field")
    jax.tree.map(np.testing.assert_array_equal, fit(mixed), fit(continuous(continuous_model)))


def test_without_continuous_sites_it_is_the_discrete_guide():
    def fit(guide):
        svi = SVI(discrete_model, guide, optax.adam(0.1), VIMCOStar(num_particles=4))
        params = svi.run(random.key(0), 20, X, progress_bar=False).params
        return params, guide.sample_posterior(random.key(1), params, X), guide.quantiles(params, [0.2, 0.6])

    mixed = AutoMixed(discrete_model, structure="mean_field")
    jax.tree.map(np.testing.assert_array_equal, fit(mixed), fit(AutoDiscrete(discrete_model, structure="mean_field")))


@pytest.mark.parametrize(
    "continuous",
    of_two_lengths(
        [AutoDelta, AutoLowRankMultivariateNormal, partial(AutoNormal, init_scale=0.01), lambda m: AutoNormal(m)],
        [AutoDelta],
    ),
)
def test_continuous_guides(continuous):
    guide = AutoMixed(mixed_model, continuous=continuous, structure="mean_field")
    svi = SVI(mixed_model, guide, optax.adam(0.05), VIMCOStar(num_particles=4))
    result = svi.run(random.key(0), 20, X, progress_bar=False)
    assert jnp.isfinite(result.losses).all()
    draws = guide.sample_posterior(random.key(1), result.params, sample_shape=(4,))
    assert draws["shift"].shape == (4, 3, 2) and draws["mean"].shape == (4, 3)


def test_in_an_auto_guide_list():
    guide = AutoGuideList(block(mixed_model, hide=["count", "score", "active", "kind"]))
    guide.append(AutoDelta(block(mixed_model, expose=["rate"])))
    guide.append(AutoMixed(block(mixed_model, hide=["rate", "mean"]), structure="conditional"))
    svi = SVI(mixed_model, guide, optax.adam(0.05), VIMCOStar(num_particles=4))
    result = svi.run(random.key(0), 10, X, progress_bar=False)
    assert jnp.isfinite(result.losses).all()
    assert set(guide.sample_posterior(random.key(1), result.params)) == {
        "rate", "count", "score", "active", "kind", "shift"
    }  # fmt: skip


@pytest.mark.parametrize(
    "structure", of_two_lengths(["mean_field", "conditional", "autoregressive"], ["autoregressive"])
)
def test_subsampling_with_create_plates(structure):
    x = jnp.repeat(jnp.array([-2.0, 2.0]), 10)

    def create_plates(x):
        return numpyro.plate("data", len(x), subsample_size=4)

    def model(x):
        with create_plates(x):
            shift = numpyro.sample("shift", dist.Normal(0, 0.1))
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            batch = numpyro.subsample(x, event_dim=0)
            numpyro.sample("x", dist.Normal(4.0 * z - 2.0 + shift, 1.0), obs=batch)

    guide = AutoMixed(model, structure=structure, create_plates=create_plates)
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(num_particles=8))
    params = svi.run(random.key(0), 600, x, progress_bar=False).params
    assert params["z_auto_logits"].shape == params["shift_auto_loc"].shape == (20,)
    assert params["z_auto_logits"].std() > 1
    assert jnp.all(params["z_auto_logits"][:10] < 0) and jnp.all(params["z_auto_logits"][10:] > 0)
    assert guide.sample_posterior(random.key(1), params, x)["z"].shape == (20,)


def test_without_continuous_sites_create_plates_still_counts():
    """With one part only, the plates are still the caller's."""

    def create_plates(x):
        return numpyro.plate("data", len(x), subsample_size=2)

    def model(x):
        with create_plates(x):
            numpyro.sample("z", dist.Bernoulli(0.5))

    guide = AutoMixed(model, create_plates=create_plates, structure="mean_field")
    seed(guide, 0)(jnp.zeros(6))
    called = []
    guide.create_plates = lambda x, make=guide.create_plates: called.append(make(x)) or called[-1]
    assert seed(guide, 0)(jnp.zeros(6))["z"].shape == (2,)
    assert called[0].name == "data"


def test_sites_in_scan():
    def model(x):
        def step(previous, x_t):
            state = numpyro.sample("state", dist.Bernoulli(jnp.where(previous == 1, 0.9, 0.2)))
            numpyro.sample("x", dist.Normal(2.0 * state, 1.0), obs=x_t)
            return state, None

        scan(step, 0, x)

    x = jnp.array([0.0, 0.0, 3.0, 3.0, 3.0])
    guide = AutoDiscrete(model, structure="mean_field")
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(num_particles=16))
    logits = svi.run(random.key(0), 200, x, progress_bar=False).params["state_auto_logits"]
    assert logits.shape == (5,) and jnp.all((logits > 0) == (x > 1))


# Fits.


def test_discrete_guide_reaches_the_exact_posterior():
    """In a mean-field model the guide can be exact."""
    guide = AutoDiscrete(discrete_model, structure="mean_field")
    svi = SVI(discrete_model, guide, optax.adam(optax.cosine_decay_schedule(0.1, 1500)), VIMCOStar(num_particles=8))
    params = svi.run(random.key(0), 1500, X, progress_bar=False).params
    log_joint = jnp.log(jnp.array([0.2, 0.3, 0.5])) + dist.Normal(jnp.arange(3), 1.0).log_prob(X[:, None])
    # At the start the largest error is above 0.3.
    np.testing.assert_allclose(jax.nn.softmax(params["z_auto_logits"]), jax.nn.softmax(log_joint), atol=0.1)


@pytest.mark.weekly
@pytest.mark.long
def test_mixture_of_iris_with_local_particles():
    """Petal lengths of 150 irises in two clusters, against the same model with the assignments summed out."""
    x = jnp.asarray(load_iris().data[:, 2], jnp.float32)
    weights, scales = jnp.array([0.35, 0.65]), jnp.array([0.3, 0.8])

    def model(x, summed_out=False):
        with numpyro.plate("cluster", 2):
            mean = numpyro.sample("mean", dist.Normal(4.0, 2.0))
        with numpyro.plate("data", len(x)):
            if summed_out:
                parts = dist.Normal(mean, scales)
                numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)
            else:
                z = numpyro.sample("z", dist.Categorical(weights))
                numpyro.sample("x", dist.Normal(mean[z], scales[z]), obs=x)

    def fit(objective, *args):
        start = init_to_value(values={"mean": jnp.array([2.0, 4.0])})
        guide = AutoMixed(model, structure="mean_field", init_loc_fn=start, init_scale=0.05)  # its locations are means
        svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(0.05, 1000)), objective)
        params = svi.run(random.key(0), 1000, *args, progress_bar=False).params
        loss = jax.jit(jax.vmap(lambda key: objective.loss(key, params, model, guide, *args)))
        return params, -loss(random.split(random.key(1), 200)).mean()

    local, bound = fit(VIMCOStar(num_particles=8, plate_particles={"data": 8}), x)
    summed_out, exact = fit(VIMCOStar(num_particles=64), x, True)
    np.testing.assert_allclose(local["mean_auto_loc"], summed_out["mean_auto_loc"], atol=0.05)
    np.testing.assert_allclose(jnp.sort(local["mean_auto_loc"]), [1.46, 4.9], atol=0.2)  # setosa, and the others
    assert exact - 1.5 < bound < exact + 0.1


# Errors.


@pytest.mark.parametrize(
    "guide, message",
    [
        (AutoDiscrete(continuous_model), "no discrete latent site.*AutoMixed"),
        (AutoMixed(lambda x: numpyro.sample("x", dist.Normal(0, 1), obs=x)), "no latent site"),
        (AutoMixed(mixed_model, continuous=AutoDAIS), "AutoDAIS, which needs the model's density"),
        (
            AutoMixed(mixed_model, continuous=AutoMultivariateNormal, structure="conditional"),
            "must be AutoNormal, but it is AutoM",
        ),
    ],
)
def test_errors(guide, message):
    with pytest.raises(ValueError, match=message):
        seed(guide, 0)(X)


def test_continuous_support_that_a_guide_does_not_see_is_refused():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("u", dist.Uniform(0, 1 + 9 * z))

    with pytest.raises(ValueError, match="continuous site 'u' depends on other latents, and structure='conditional'"):
        seed(AutoMixed(model, structure="conditional"), 0)()


@pytest.mark.parametrize("rate", [1e9, 2e9])
def test_counts_too_large_for_single_precision_are_refused(rate):
    def model():
        numpyro.sample("n", dist.GammaPoisson(2.0, 2.0 / rate))

    with pytest.raises(ValueError, match="counts of site 'n' reach about"):
        seed(AutoDiscrete(model), 0)()


def without_discrete():
    numpyro.sample("u", dist.Normal(0, 1))


def without_continuous():
    numpyro.sample("z", dist.Bernoulli(0.5))


def without_dependence():
    numpyro.sample("u", dist.Normal(0, 1))
    with numpyro.plate("data", 3):
        numpyro.sample("z", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    "model, why",
    [
        (without_discrete, "the model has no discrete latent"),
        (without_continuous, "the model has no continuous latent"),
        (without_dependence, "each discrete site is in a plate that no continuous site is in"),
    ],
)
def test_conditional_that_changes_nothing_is_said(model, why):
    with pytest.warns(UserWarning, match=f"changes nothing: {why}"):
        seed(AutoMixed(model, structure="conditional"), 0)()


def test_plates_inside_of_scan_are_drawn_as_a_whole():
    def model():
        def step(carry, _):
            with numpyro.plate("inner", 3):
                numpyro.sample("z", dist.Bernoulli(0.5))
            return carry, None

        scan(step, 0, None, length=4)

    site = trace(seed(AutoDiscrete(model), 0)).get_trace()["z"]
    assert site["value"].shape == (4, 3) and not site["cond_indep_stack"]


def test_bounds_that_differ_within_a_subsample_are_refused():
    def model(trials):
        with numpyro.plate("data", 6, subsample_size=3):
            numpyro.sample("z", dist.Binomial(numpyro.subsample(trials, event_dim=0), 0.5))

    with pytest.raises(ValueError, match="'z' differ between elements of the plate 'data', a subsample"):
        seed(AutoDiscrete(model), 0)(jnp.arange(1, 7))
    seed(AutoDiscrete(model), 0)(jnp.full(6, 4))


def test_bounds_that_are_traced_are_refused():
    def model(trials):
        numpyro.sample("z", dist.Binomial(trials, 0.5))

    with pytest.raises(ValueError, match="'z' are traced by JAX when the guide is first called"):
        jax.jit(lambda trials: seed(AutoDiscrete(model), 0)(trials)["z"])(3)
