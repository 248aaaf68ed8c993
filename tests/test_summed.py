"""After a fit, and in automatic guides: sites that are summed out."""

from functools import partial
import itertools

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro.infer.util import log_density
import optax
import pytest

from helpers import of_two_lengths
from numpyro_vimco import AutoDiscrete, AutoMixed, Posterior, VIMCOStar
from numpyro_vimco.export.summed import draw_at
from test_enumeration import CASES, LENGTHS, MARK, SEQUENCES, X, bernoulli, forward, initial, normal

MEANS, LEVEL = {"means": jnp.array([-0.4, 1.3])}, {"level": jnp.array(0.7)}


def exact(model, params, sampled, shapes):
    """All values of the summed sites, one joint outcome a row, and their probabilities given the sampled sites."""
    sizes = [(number, *shape) for shape, number in shapes.values()]
    supports = [range(size[0]) for size in sizes for _ in range(int(np.prod(size[1:])))]
    outcomes = np.array(list(itertools.product(*supports)))
    ends = np.cumsum([int(np.prod(size[1:])) for size in sizes])[:-1]
    parts = np.split(outcomes, ends, axis=1)
    values = {
        name: jnp.asarray(part.reshape(-1, *size[1:])) for name, part, size in zip(shapes, parts, sizes, strict=True)
    }
    log_joint = jax.vmap(lambda values: log_density(model, (), {}, {**params, **sampled, **values})[0])(values)
    return outcomes, np.exp(log_joint - logsumexp(log_joint))


DRAWN = {
    "global switch": (MEANS, {"k": ((), 3), "z": ((5,), 2)}),
    "nested plates": (MEANS, {"z": ((3, 1), 2), "outlier": ((3, 2), 2)}),
    "hmm in a loop": (LEVEL, {f"state_{t}": ((), 3) for t in range(4)}),
    "hmm in scan": (LEVEL, {"state": ((5,), 3)}),
}


@pytest.mark.parametrize("name", of_two_lengths(DRAWN, ["hmm in scan"]))
def test_exact_draws(name):
    """Probabilities of all joint outcomes: the distance of 20,000 draws from them is that of independent draws."""
    (model, _, guide, _), (sampled, shapes) = CASES[name](), DRAWN[name]
    params = initial(model, guide)
    outcomes, probabilities = exact(model, params, sampled, shapes)
    program = VIMCOStar().program(model, guide, (), {}, random.key(0))

    @jax.jit
    @jax.vmap
    def draw(rng_key):
        return draw_at(program.at(params, random.key(0), sampled), rng_key)

    number = 20_000
    draws = draw(random.split(random.key(1), number))
    assert {key: value.shape[1:] for key, value in draws.items()} == {key: shape for key, (shape, _) in shapes.items()}
    drawn = np.concatenate([np.asarray(draws[key]).reshape(number, -1) for key in shapes], axis=1)
    index = {tuple(outcome): i for i, outcome in enumerate(outcomes)}
    counts = np.bincount([index[tuple(row)] for row in drawn], minlength=len(outcomes))
    # Pearson's statistic over the likely outcomes, and one for all others: mean and variance are known.
    likely = probabilities * number > 20
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = number * np.append(probabilities[likely], probabilities[~likely].sum())
    kept = expected > 5
    statistic = np.sum((observed[kept] - expected[kept]) ** 2 / expected[kept])
    freedom = kept.sum() - 1
    assert statistic < freedom + 5.5 * np.sqrt(2 * freedom) + 10
    assert abs(observed.sum() - number) == 0 and freedom > 10


def test_draws_of_a_scan_from_the_end_are_those_of_flipped_data():
    draws = []
    for name in ("hmm in scan", "hmm in scan from the end"):
        model, _, guide, _ = CASES[name]()
        sites = VIMCOStar().program(model, guide, (), {}, random.key(0)).at(initial(model, guide), random.key(0), LEVEL)
        draws.append(jax.vmap(partial(draw_at, sites))(random.split(random.key(1), 50))["state"])
    forward, from_the_end = draws
    np.testing.assert_array_equal(from_the_end[:, ::-1], forward)
    assert (from_the_end != forward).any()


def fitted(model, guide=None, num_steps=100, objective=None):
    svi = SVI(model, guide or AutoMixed(model), optax.adam(0.02), objective or VIMCOStar(0.5, 8))
    return Posterior(svi, svi.run(random.key(0), num_steps, progress_bar=False))


def test_posterior_and_log_likelihood_of_a_mixture():
    model, _, guide, _ = CASES["mixture"]()
    posterior = fitted(model, guide, 20)
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=50)
    draws, found = tree["posterior"], tree["log_likelihood"]["data_element"]
    assert draws["z"].dims == ("chain", "draw", "data") and set(np.unique(draws["z"])) == {0, 1}
    # Summed over the assignments, given the draw of the means.
    means = draws["means"].values[0]
    table = bernoulli(posterior.params["weight"])[:, None] + normal(X, means[..., None])
    np.testing.assert_allclose(found.values[0], logsumexp(table, axis=1), rtol=1e-4, atol=1e-4)
    assert list(tree["log_likelihood"].data_vars) == ["data_element"]
    assert np.isfinite(posterior.diagnose(200).log_evidence)


@pytest.mark.long
def test_log_likelihood_of_sequences():
    model, _, guide, _ = CASES["hmm of sequences"]()
    posterior = fitted(model, guide, 5)
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=20)
    assert tree["posterior"]["state"].dims == ("chain", "draw", "state_dim_0", "sequence")
    step = jax.nn.softmax(posterior.params["transition"])
    for draw in (0, 7):
        a = tree["posterior"]["level"].values[0, draw]
        for i, length in enumerate(LENGTHS):
            emissions = normal(jnp.asarray(SEQUENCES[i, :length, None]), a * jnp.arange(3))
            exact = forward(np.array([0.5, 0.2, 0.3]), step, emissions)
            np.testing.assert_allclose(tree["log_likelihood"]["sequence_element"].values[0, draw, i], exact, rtol=1e-4)


@pytest.mark.long
def test_a_chain_has_no_log_likelihood_of_a_datum():
    model, _, guide, _ = CASES["hmm in scan"]()
    posterior = fitted(model, guide, 5)
    with pytest.warns(UserWarning, match="The data of 'x' depend on summed latents that are in no plate with them"):
        tree = posterior.to_arviz(rng_key=random.key(1), num_samples=20)
    assert "x" in tree["posterior_predictive"] and "x" not in getattr(tree, "log_likelihood", {})


@pytest.mark.parametrize("name", of_two_lengths(["mixture", "hmm in scan"], ["mixture"]))
def test_automatic_guide_is_that_of_the_sampled_sites(name):
    """But for the location that it begins at, a random one with either program."""
    model, by_hand, _, _ = CASES[name]()
    loc = "means_auto_loc" if name == "mixture" else "level_auto_loc"
    params, draws = [], []
    for program in (model, by_hand):
        guide = AutoMixed(program)
        svi = SVI(program, guide, optax.adam(0.02), VIMCOStar(0.5, 4))
        begun = svi.get_params(svi.init(random.key(0)))
        params.append({**begun, loc: jnp.full(jnp.shape(begun[loc]), 0.3)})
        draws.append(guide.sample_posterior(random.key(1), params[-1], sample_shape=(5,)))
    jax.tree.map(np.testing.assert_array_equal, *params)
    jax.tree.map(np.testing.assert_array_equal, *draws)


@pytest.mark.parametrize("structure", ["mean_field", "autoregressive"])
def test_automatic_guide_where_a_drawn_value_is_impossible(structure):
    """At the draw of the summed sites that NumPyro's guides would be initialized at, counts may have no rate."""

    def model():
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.1), infer=MARK)
            numpyro.sample("x", dist.Poisson(rate * z), obs=np.array([0, 2, 3, 1]))

    svi = SVI(model, AutoMixed(model, structure=structure), optax.adam(0.02), VIMCOStar(0.5, 4))
    state, loss = svi.update(svi.init(random.key(0)))
    gradients_are_finite = [np.isfinite(leaf).all() for leaf in jax.tree.leaves(svi.get_params(state))]
    assert np.isfinite(loss) and all(gradients_are_finite)


@pytest.mark.long
def test_automatic_guide_samples_what_is_not_marked():
    def model():
        means = numpyro.sample("means", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        on = numpyro.sample("on", dist.Bernoulli(0.4))
        with numpyro.plate("data", 5):
            z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
            numpyro.deterministic("mean", means[z] * on)
            numpyro.sample("x", dist.Normal(means[z] * on, 1.0), obs=X)

    guide = AutoMixed(model)
    posterior = fitted(model, guide, 5)
    # "mean" depends on "z", of which the guide has no draw.
    assert set(guide.sample_posterior(random.key(1), posterior.params)) == {"means", "on"}
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=20)
    draws = tree["posterior"]
    assert set(draws.data_vars) == {"means", "on", "z", "mean"}
    z, means = draws["z"].values[0], draws["means"].values[0]
    expected = np.take_along_axis(means, z, 1) * draws["on"].values[0][:, None]
    np.testing.assert_allclose(draws["mean"].values[0], expected, rtol=1e-5)
    alone = AutoDiscrete(model)
    with numpyro.handlers.seed(rng_seed=0):
        assert set(alone()) == {"on"}
