"""Supports that depend on other latents: guides propose all of them, and nothing outside, with the right density."""

import itertools

import jax
from jax import random
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from moving_supports import exact_parts, parts
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI
from numpyro.infer.util import log_density
import optax
import pytest
from scipy import stats

from helpers import initial_params
from numpyro_vimco import AutoDiscrete, AutoMixed, VIMCOStar, fit


def two_switches():
    first = numpyro.sample("first", dist.DiscreteUniform(0, 2))
    second = numpyro.sample("second", dist.DiscreteUniform(first, 3))
    third = numpyro.sample("third", dist.DiscreteUniform(second, second + first))
    numpyro.sample("y", dist.Normal(first + second - third, 1.0), obs=0.3)


def counts():
    with numpyro.plate("row", 2):
        number = numpyro.sample("number", dist.Poisson(2.0))
        left = numpyro.sample("left", dist.BetaBinomial(2.0, 1.0, number))
        numpyro.sample("y", dist.Normal(left, 1.0), obs=jnp.array([1.0, 2.0]))


def parts_of_one_event():
    number = numpyro.sample("number", dist.Poisson(2.0))
    left = numpyro.sample("left", dist.Binomial(number, jnp.array([0.3, 0.6])).to_event(1))
    numpyro.sample("y", dist.Normal(left.sum(), 1.0), obs=2.0)


def truncated_counts():
    low = numpyro.sample("low", dist.Poisson(1.0))
    kind = dist.Poisson(4.0)
    numpyro.sample("number", AtLeast(kind, low))


def parts_of_a_total():
    total = numpyro.sample("total", dist.Poisson(2.0))
    parts = numpyro.sample("parts", dist.Multinomial(total, jnp.array([0.2, 0.3, 0.5]), total_count_max=30))
    numpyro.sample("y", dist.Normal(parts[0] - parts[2], 1.0), obs=0.3)


def parts_of_known_totals():
    with numpyro.plate("row", 2):
        parts = numpyro.sample("parts", dist.DirichletMultinomial(jnp.ones(3), jnp.array([3, 2]), total_count_max=3))
        numpyro.sample("y", dist.Normal(parts[:, 1], 1.0), obs=jnp.array([1.0, 0.0]))


class AtLeast(dist.Distribution):
    """A user's distribution: a count of at least ``low``."""

    pytree_data_fields = ("base", "low")

    def __init__(self, base, low):
        self.base, self.low = base, low
        super().__init__(batch_shape=jnp.shape(low))

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return constraints.integer_greater_than(self.low)

    def sample(self, key, sample_shape=()):
        return self.low + self.base.sample(key, sample_shape + self.batch_shape)

    def log_prob(self, value):
        return self.base.log_prob(value - self.low)


def moved(guide, rng_key):
    """The guide's parameters, moved at random."""
    params = initial_params(guide, guide)
    leaves, structure = jax.tree.flatten(params)
    keys = random.split(rng_key, len(leaves))
    return structure.unflatten([x * jnp.exp(0.5 * random.normal(k, x.shape)) + 0.1 for k, x in zip(keys, leaves)])


@pytest.mark.parametrize(
    "model, shapes, largest",
    [
        (two_switches, {"first": (), "second": (), "third": ()}, 5),
        (counts, {"number": (2,), "left": (2,)}, 5),
        (parts_of_one_event, {"number": (), "left": (2,)}, 5),
        (truncated_counts, {"low": (), "number": ()}, 5),
        (parts_of_a_total, {"total": (), "parts": (3,)}, 4),
        (parts_of_known_totals, {"parts": (2, 3)}, 3),
    ],
)
@pytest.mark.parametrize("kind", [AutoMixed, AutoDiscrete])
def test_a_guide_draws_what_is_possible_with_the_density_that_it_says(model, shapes, largest, kind, x64):
    """All that is possible has a density, nothing else has, and draws have these densities."""
    guide = kind(model)
    params = moved(guide, random.key(1))
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    values = jnp.array(list(itertools.product(range(largest + 1), repeat=sum(sizes))))
    parts = jnp.split(values, np.cumsum(sizes)[:-1], axis=1)
    outcomes = {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts)}

    def densities(outcome):
        log_q = log_density(substitute(guide, outcome), (), {}, params)[0]
        log_p = log_density(substitute(model, outcome), (), {}, {})[0]
        return log_q, log_p

    log_q, log_p = jax.jit(jax.vmap(densities))(outcomes)
    possible = np.isfinite(log_p)
    assert np.isfinite(log_q[possible]).all()
    np.testing.assert_array_less(log_q[~possible], -1e30)
    draws = guide.sample_posterior(random.key(2), params, sample_shape=(20_000,))
    found = np.concatenate([np.asarray(draws[name]).reshape(20_000, -1) for name in shapes], axis=1)
    impossible = {tuple(row) for row in np.asarray(values)[~possible].tolist()}
    assert not impossible & {tuple(row) for row in found.tolist()}
    # Draws have these densities: outcomes in cells of at least 40 expected draws; one test in a million is beyond.
    expected = 20_000 * np.exp(np.asarray(log_q)[possible])
    rows = [tuple(row) for row in np.asarray(values)[possible].tolist()]
    unique, counted = np.unique(found, axis=0, return_counts=True)
    numbers = {tuple(row): number for row, number in zip(unique.tolist(), counted)}
    seen = np.array([numbers.get(row, 0) for row in rows])
    large = expected > 40
    rest = 20_000 - expected[large].sum()
    chi2 = ((seen[large] - expected[large]) ** 2 / expected[large]).sum()
    if rest > 40:
        chi2 += (20_000 - seen[large].sum() - rest) ** 2 / rest
    assert large.sum() > 3
    assert stats.chi2.sf(chi2, large.sum()) > 1e-7


def test_expected_gradient_is_that_of_the_exact_bound(x64):
    """Two particles of a switch in {0, 1} and one above it, by all outcomes; α = 0.3."""

    def model():
        a = numpyro.sample("a", dist.DiscreteUniform(0, 1))
        b = numpyro.sample("b", dist.DiscreteUniform(a, 1))
        numpyro.sample("y", dist.Normal(a + 2.0 * b, 1.0), obs=1.3)

    guide, alpha = AutoDiscrete(model, coupling_speed=1.0), 0.3
    params = moved(guide, random.key(3))
    possible = jnp.array([[0, 0], [0, 1], [1, 1]])

    def log_q(params, a, b):
        logits = params["b_auto_logits"] + params["b_auto_weights"] @ jax.nn.one_hot(a, 2)
        of_b = jnp.where(a == 1, 0.0, jax.nn.log_softmax(logits)[b])
        return jax.nn.log_softmax(params["a_auto_logits"])[a] + of_b

    def log_p(a, b):
        return jnp.log(0.5) - jnp.log(2.0 - a) + dist.Normal(a + 2.0 * b, 1.0).log_prob(1.3)

    pairs = jnp.array(list(itertools.product(range(3), repeat=2)))

    def exact(params):
        q = jax.vmap(lambda row: log_q(params, *row))(possible)
        w = jax.vmap(lambda row: log_p(*row))(possible) - q
        bound = (logsumexp((1 - alpha) * w[pairs], axis=1) - np.log(2)) / (1 - alpha)
        return jnp.exp(q[pairs].sum(1)) @ bound

    def estimate(params, pair):
        def vectorize(fn, keys):
            def run(key, row):
                with substitute(data={"a": row[0], "b": row[1]}):
                    return fn(key)

            return jax.vmap(run)(keys, possible[pair])

        objective = VIMCOStar(alpha, 2, vectorize)
        return jax.value_and_grad(lambda params: -objective.loss(random.key(0), params, model, guide))(params)

    q = jax.vmap(lambda row: log_q(params, *row))(possible)
    probability = jnp.exp(q[pairs].sum(1))
    np.testing.assert_allclose(probability.sum(), 1)
    estimates = jax.vmap(lambda pair: estimate(params, pair))(pairs)
    found = jax.tree.map(lambda x: jnp.tensordot(probability, x, axes=1), estimates)
    wanted = jax.value_and_grad(exact)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, wanted)


def bounded_by_a_later_name():
    # The continuous latents that bound a count come before it, although discrete sites are drawn first.
    share = numpyro.sample("share", dist.Uniform(0.0, 1.0))
    most = jnp.floor(5 * share).astype(int)
    numpyro.sample("number", dist.DiscreteUniform(0, most))


def test_a_count_comes_after_the_continuous_latent_that_bounds_it():
    guide = AutoMixed(bounded_by_a_later_name)
    draws = guide.sample_posterior(random.key(0), moved(guide, random.key(1)), sample_shape=(2_000,))
    assert (draws["number"] <= np.floor(5 * draws["share"])).all()
    assert draws["number"].max() == 4


def intervals():
    low = numpyro.sample("low", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", 2):
        inside = numpyro.sample("inside", dist.Uniform(low, low + jnp.array([1.0, 3.0])))
        above = numpyro.sample("above", dist.TruncatedNormal(0.0, 1.0, low=inside))
        numpyro.sample("y", dist.Normal(above, 1.0), obs=jnp.array([1.0, 2.0]))


def test_continuous_latents_with_latent_bounds_have_the_density_of_their_draws(x64):
    """A mean under the guide by its own draws, and by importance sampling from other parameters."""
    guide = AutoMixed(intervals)
    one, far = moved(guide, random.key(1)), moved(guide, random.key(2))
    other = jax.tree.map(lambda x, y: x + 0.1 * (y - x), one, far)
    draws = guide.sample_posterior(random.key(3), one, sample_shape=(100_000,))
    assert (draws["inside"] > draws["low"][:, None]).all()
    assert (draws["inside"] < draws["low"][:, None] + np.array([1.0, 3.0])).all()
    assert (draws["above"] > draws["inside"]).all()

    def log_q(params, values):
        return log_density(substitute(guide, values), (), {}, params)[0]

    latents = {name: draws[name] for name in ("low", "inside", "above")}
    log_ratio = jax.jit(jax.vmap(lambda values: log_q(other, values) - log_q(one, values)))(latents)
    ratio = np.exp(log_ratio)
    # Their mean is 1: 5.5 standard errors are passed less than once in ten million runs.
    assert abs(ratio.mean() - 1) < 5.5 * ratio.std() / np.sqrt(len(ratio))
    assert ratio.std() / np.sqrt(len(ratio)) < 0.05


def test_independent_guides_and_chains_cover_all_values():
    covers = AutoMixed(two_switches, structure="mean_field")
    seed(covers, 0)()
    assert {name: (int(s.lower_bound), int(s.upper_bound)) for name, s in covers.covers.items()} == {
        "first": (0, 2),
        "second": (0, 3),
        "third": (0, 5),
    }
    covers = AutoMixed(counts, structure="mean_field")
    seed(covers, 0)()
    assert covers.covers["left"].lower_bound == 0 and not hasattr(covers.covers["left"], "upper_bound")

    def survivors(seen):
        def year(alive, seen):
            alive = numpyro.sample("alive", dist.Binomial(alive, 0.9))
            numpyro.sample("seen", dist.Binomial(alive, 0.5), obs=seen)
            return alive, None

        scan(year, 20, seen)

    for chains in ((), {"alive"}):
        guide = AutoMixed(survivors, chains=chains)
        tr = trace(seed(guide, 0)).get_trace(jnp.array([10, 7]))
        assert isinstance(guide.covers["alive"], constraints.integer_greater_than)
        assert tr["alive"]["value"].shape == (2,)


@pytest.mark.long
def test_evidence_of_parts_of_a_total():
    """Parts of a Poisson total are independent Poisson counts. NumPyro's own draws do not add up to the total."""
    svi = SVI(parts, AutoMixed(parts), optax.adam(0.02), VIMCOStar(0.5, 64))
    posterior = fit(svi, random.key(0), 1000, progress_bar=False)
    log_evidence, _ = exact_parts()
    assert abs(posterior.log_evidence - log_evidence) < 5.5 * posterior.log_evidence_std_error
    assert posterior.log_evidence_std_error < 0.03


def test_a_subsampled_plate_is_not_looked_into():
    def model(x):
        with numpyro.plate("row", 4, subsample_size=2):
            first = numpyro.sample("first", dist.Poisson(3.0))
            numpyro.sample("second", dist.DiscreteUniform(first, first + 5))

    with pytest.raises(ValueError, match="'second' depend on other latents, and the plate 'row' is subsampled"):
        seed(AutoMixed(model), 0)(1.0)
