"""Chains with K samples of each step: unbiased by enumeration of all outcomes, and of draws; clear errors."""

from functools import partial
import itertools

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import condition, mask, seed
from numpyro.infer import SVI
import optax
import pytest
from scipy import stats

from helpers import assert_unbiased_over_outcomes, codes, initial_params
from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit
from numpyro_vimco.control_variates import vimco_star_signal
from numpyro_vimco.densities.levels import Levels
from numpyro_vimco.densities.plates import Structure
from numpyro_vimco.draws.approximation import Approximation, taken
from numpyro_vimco.draws.pooling import propose_pooled
from numpyro_vimco.fitting.tempering import OF_CHAINS
from numpyro_vimco.objectives.gradients import weigh
from numpyro_vimco.objectives.paths import draw_path, path_shares

X = np.array([0.7, -1.2])
SITES = 2
W = np.array([[0.7, -1.2], [np.nan, 0.1]])


def bernoulli(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def log_bernoulli(logits, value):
    return value * logits - jnp.logaddexp(0.0, logits)


def log_normal(loc, x):
    return -0.5 * (x - loc) ** 2 - 0.5 * np.log(2 * np.pi)


def over_paths(log_v):
    """Log of the mean over all paths. ``log_v``: a list, of shape (K,) for the first step, then (K, K before)."""
    steps = range(len(log_v))
    paths = list(itertools.product(range(len(log_v[0])), repeat=len(log_v)))
    terms = [log_v[0][p[0]] + sum(log_v[t][p[t], p[t - 1]] for t in steps[1:]) for p in paths]
    return logsumexp(jnp.stack(terms), axis=0) - np.log(len(paths))


# Each case: model, guide, values by (chain or None, site), and the log-weight of one global particle with the
# log-probability of drawing it, by hand.


def counter_in_the_carry():
    """A chain with a global latent, a counter in the carry, data as `xs`."""

    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        stay, effect = numpyro.param("stay", 0.9), numpyro.param("effect", 1.1)

        def step(carry, x):
            before, t = carry
            z = bernoulli("z", stay * before - 0.4 * g + 0.1 * t)
            numpyro.sample("x", dist.Normal(effect * z, 1.0), obs=x)
            return (z, t + 1), None

        scan(step, (0, 0), X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        bernoulli("z", numpyro.param("z_logits", np.array([0.3, -0.3])) + numpyro.param("coupling", 0.5) * g)

    def log_weight(params, g, z):  # z: (K, 2)
        q = log_bernoulli(params["z_logits"] + params["coupling"] * g, z)
        local = log_normal(params["effect"] * z, X) - q
        first = log_bernoulli(-0.4 * g, z[:, 0]) + local[:, 0]
        logits = params["stay"] * z[:, 0] - 0.4 * g + 0.1
        second = log_bernoulli(logits[None, :], z[:, 1, None]) + local[:, 1, None]
        top = log_bernoulli(params["prior"], g) - log_bernoulli(params["g_logits"], g)
        log_q = log_bernoulli(params["g_logits"], g) + q.sum()
        return top + over_paths([first, second]), log_q

    return model, guide, {"g": (None, ()), "z": ("z", (2,))}, log_weight


def from_the_end_in_a_plate():
    """A scan from the end, of two elements with a chain each, of which one has a value missing; a global latent."""

    def model():
        g = bernoulli("g", 0.3)
        stay, effect = numpyro.param("stay", 0.9), numpyro.param("effect", 1.1)

        def step(before, x):
            with numpyro.plate("site", SITES):
                z = bernoulli("z", stay * before - 0.4 + 0.5 * g)
                with mask(mask=~jnp.isnan(x)):
                    numpyro.sample("x", dist.Normal(effect * z, 1.0), obs=jnp.nan_to_num(x))
            return z, z

        scan(step, jnp.zeros(SITES, int), W, reverse=True)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        with numpyro.plate("site", SITES):
            bernoulli("z", numpyro.param("z_logits", np.array([[0.3], [0.6]])) - 0.2 * g)

    def log_weight(params, g, z):  # z: (K, 2 times, sites)
        q = log_bernoulli(params["z_logits"] - 0.2 * g, z)
        local = jnp.where(np.isnan(W), 0.0, log_normal(params["effect"] * z, np.nan_to_num(W))) - q
        first = log_bernoulli(0.5 * g - 0.4, z[:, 1]) + local[:, 1]
        logits = params["stay"] * z[None, :, 1] - 0.4 + 0.5 * g
        second = log_bernoulli(logits, z[:, None, 0]) + local[:, None, 0]
        top = log_bernoulli(0.3, g) - log_bernoulli(params["g_logits"], g)
        return top + over_paths([first, second]).sum(), log_bernoulli(params["g_logits"], g) + q.sum()

    return model, guide, {"g": (None, ()), "z": ("z", (2, SITES))}, log_weight


def summed_in_the_step():
    """Two latents of one step, one of which is summed out, and a guide with a `scan` of its own."""

    def model():
        effect = numpyro.param("effect", 1.1)

        def step(before, x):
            z = bernoulli("z", 0.9 * before - 0.4)
            e = numpyro.sample("e", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(effect * z + 1.5 * e, 1.0), obs=x)
            return z, None

        scan(step, 0, X)

    def guide():
        logits = numpyro.param("z_logits", np.array([0.3, -0.3]))

        def step(carry, logits):
            bernoulli("z", logits)
            return carry, None

        scan(step, None, logits)

    def log_weight(params, z):  # z: (K, 2)
        q = log_bernoulli(params["z_logits"], z)
        off, on = (log_normal(params["effect"] * z + 1.5 * e, X) for e in (0, 1))
        local = jnp.logaddexp(off + np.log(0.7), on + np.log(0.3)) - q
        first = log_bernoulli(-0.4, z[:, 0]) + local[:, 0]
        second = log_bernoulli(0.9 * z[None, :, 0] - 0.4, z[:, 1, None]) + local[:, 1, None]
        return over_paths([first, second]), q.sum()

    return model, guide, {"z": ("z", (2,))}, log_weight


CASES = [counter_in_the_carry, from_the_end_in_a_plate, summed_in_the_step]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_expected_gradient_is_that_of_the_exact_bound(case, alpha, x64):
    """Every outcome of 2 particles with 2 samples of 2 steps, all sites binary."""
    model, guide, sites, log_weight = case()
    assert_unbiased_over_outcomes(model, guide, sites, log_weight, alpha, chain_particles={"z": 2})


# Paths.


def tables(steps, samples=3, elements=2, impossible=0.2):
    rng = np.random.default_rng(steps)
    log_v = rng.normal(size=(samples, steps, samples, elements))
    log_v[rng.random(log_v.shape) < impossible] = -np.inf
    return log_v


def all_paths(log_v, reverse):
    """All paths, and the log-weight of each, with the first step's sample l = 0."""
    order = range(log_v.shape[1])[:: -1 if reverse else 1]
    paths = np.array(list(itertools.product(range(len(log_v)), repeat=log_v.shape[1])))
    total = 0
    for i, t in enumerate(order):
        total = total + log_v[paths[:, t], t, paths[:, order[i - 1]] if i else 0]
    return paths, total


@pytest.mark.parametrize("reverse", [False, True])
def test_shares_of_paths(reverse, x64):
    log_v = tables(4)
    first = -1 if reverse else 0
    log_v[:, first] = log_v[:, first, :1]
    paths, total = all_paths(log_v, reverse)
    log_mean, shares = path_shares(jnp.asarray(log_v), reverse)
    np.testing.assert_allclose(log_mean, np.log(np.exp(total).mean(0)), rtol=1e-12)
    weight = np.exp(total) / np.exp(total).sum(0)
    for t in range(4):
        through = np.stack([weight[paths[:, t] == k].sum(0) for k in range(3)])
        np.testing.assert_allclose(shares[:, t].sum(1), through, atol=1e-12)


def test_no_possible_path_has_no_share():
    log_v = tables(4)
    log_v[:, 2, :, 1] = -np.inf
    log_mean, shares = path_shares(jnp.asarray(log_v), False)
    assert np.isneginf(log_mean[1]) and np.isfinite(log_mean[0])
    assert np.isfinite(shares).all() and (shares[..., 1] == 0).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_paths_are_drawn_in_proportion_to_their_weight(reverse):
    """400,000 draws of 27 paths: 5.5 standard errors of each, passed once in 400,000 seeds."""
    log_v = tables(3)
    first = -1 if reverse else 0
    log_v[:, first] = log_v[:, first, :1]
    _, total = all_paths(log_v, reverse)
    table = jnp.asarray(log_v, jnp.float32)
    drawn = jax.jit(jax.vmap(lambda key: draw_path(key, table, reverse)))(random.split(random.key(0), 400_000))
    np.testing.assert_allclose(drawn.log_mean[0], np.log(np.exp(total).mean(0)), rtol=1e-5)
    for element in range(2):
        weight = np.exp(total[:, element]) / np.exp(total[:, element]).sum()
        index = np.asarray(drawn.samples[..., element]) @ [9, 3, 1]
        found = np.bincount(index, minlength=27) / 400_000
        assert (np.abs(found - weight) <= 5.5 * np.sqrt(weight * (1 - weight) / 400_000)).all()
        np.testing.assert_allclose(drawn.log_v[:, element], total[index, element], rtol=1e-4, atol=1e-4)


# Programs that are no chains.


def walk(y=X, **options):
    """A model; what its `scan` carries is given by ``carry``."""

    def model():
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def step(before, x):
            z = bernoulli("z", 0.5 * jnp.sum(before) + g)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return options.get("carry", lambda before, z: z * 1.0)(before, z), None

        last, _ = scan(step, options.get("init", 0.0), y)
        if options.get("after"):
            numpyro.sample("after", dist.Normal(last, 1.0), obs=0.3)

    return model


def independent():
    g = numpyro.sample("g", dist.Normal(numpyro.param("loc", 0.1), 0.8))
    bernoulli("z", numpyro.param("z_logits", jnp.array([0.3, -0.2])) + 0.3 * g)


def loss_of(model, guide, **arguments):
    objective = VIMCOStar(0.0, 4, **({"chain_particles": {"z": 3}} | arguments))
    return objective.loss(random.key(0), initial_params(model, guide), model, guide)


def markov_guide():
    numpyro.sample("g", dist.Normal(numpyro.param("loc", 0.1), 0.8))

    def step(before, logits):
        z = bernoulli("z", logits + before)
        return z * 1.0, None

    scan(step, 0.0, numpyro.param("z_logits", jnp.array([0.3, -0.2])))


def shared_after_chain():
    z = bernoulli("z", numpyro.param("z_logits", jnp.array([0.3, -0.2])))
    numpyro.sample("g", dist.Normal(numpyro.param("loc", 0.1) + z.sum(), 0.8))


@pytest.mark.parametrize(
    ("model", "guide", "arguments", "message"),
    [
        (walk(carry=lambda before, z: before + z), independent, {}, "of first order"),
        (walk(init=jnp.zeros(2), carry=lambda b, z: jnp.stack([b[1], z * 1.0])), independent, {}, "of first order"),
        (walk(after=True), independent, {}, "Site 'after' is not in the `scan`"),
        (walk(), independent, {"chain_particles": {"w": 3}}, "latents that the guide samples inside of `scan` are 'z'"),
        (walk(), independent, {"chain_particles": {"g": 3}}, "a latent outside of `scan`"),
        (walk(), markov_guide, {}, "The guide's steps depend on each other"),
        (walk(), shared_after_chain, {}, "The guide's site 'g' depends on 'z'"),
    ],
)
def test_programs_that_are_no_chains(model, guide, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss_of(model, guide, **arguments)


def test_automixed_without_chains_is_named():
    """Its couplings over time are zero at the start."""

    def no_global():
        def step(before, x):
            z = bernoulli("z", 0.5 * before)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return z, None

        scan(step, 0, jnp.asarray(X))

    for model in (walk(), no_global):
        with pytest.raises(ValueError, match=r"AutoMixed\(model, chains=\{'z'\}\)"):
            SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(chain_particles={"z": 3})).run(random.key(0), 1)


def test_unknown_chains_of_a_guide():
    with pytest.raises(ValueError, match=r"`chains` names 'g', but .* inside of `scan` are 'z'"):
        SVI(walk(), AutoMixed(walk(), chains={"g"}), optax.adam(0.01), VIMCOStar()).init(random.key(0))


# What users write.


def data_by_condition():
    def model():
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def step(before, _):
            z = bernoulli("z", 0.5 * before + g)
            numpyro.sample("x", dist.Normal(z, 1.0))
            return z, None

        scan(step, 0, None, length=2)

    return condition(model, {"x": jnp.asarray(X)})


def dicts_and_counters():
    def model():
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def step(carry, x):
            z = bernoulli("z", 0.5 * carry["state"] * (carry["time"] >= 0) + g)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x["data"] * x["one"])
            return {"state": z, "time": carry["time"] + 1}, {"z": z, "time": carry["time"]}

        last, found = scan(step, {"state": 0, "time": 0}, {"data": X, "one": np.ones(2)})
        numpyro.deterministic("path", found["z"])
        numpyro.deterministic("number", last["time"])

    return model


def scan_inside_of_a_step():
    def model():
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def step(before, x):
            z = bernoulli("z", 0.5 * before + g)

            def observe(_, x):
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
                return None, None

            scan(observe, None, x[None])
            return z, None

        scan(step, 0, X)

    return model


@pytest.mark.parametrize("make", [data_by_condition, dicts_and_counters, scan_inside_of_a_step])
def test_scan_as_users_write_it(make):
    """The loss is that of the plainest form, draw by draw."""
    plain = walk()
    other = make()
    np.testing.assert_allclose(loss_of(other, independent), loss_of(plain, independent), rtol=1e-5)


def test_chunks_have_the_same_loss_and_gradient():
    model, params = walk(), initial_params(walk(), independent)
    found = []
    for chunk_size in (None, 2):
        objective = VIMCOStar(0.3, 4, chain_particles={"z": 3}, chunk_size=chunk_size)
        found.append(jax.value_and_grad(lambda p, o=objective: o.loss(random.key(0), p, model, independent))(params))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found)


def test_programs_without_a_scan_have_no_chains():
    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for guide, message in (
        (AutoMixed(model, chains={"z"}), "`chains` names 'z', but the model draws no latent inside of `scan`"),
        (AutoMixed(model), "`chain_particles` names 'w', but the guide samples no latent inside of `scan`"),
    ):
        with pytest.raises(ValueError, match=message):
            SVI(model, guide, optax.adam(0.01), VIMCOStar(chain_particles={"w": 3})).run(random.key(0), 1, 1.0)


def test_least_values_of_counts():
    """What was seen is the least that there was; other latents and the last step, which has no data, have no bound."""
    seen = np.array([3, 0, 12, 7])

    def model():
        p = numpyro.sample("p", dist.Beta(2, 2))

        def step(before, x):
            count = numpyro.sample("count", dist.Poisson(before + 1.0))
            with mask(mask=x["is_seen"]):
                numpyro.sample("seen", dist.Binomial(count, p), obs=x["seen"])
            return count, None

        scan(step, 10, {"seen": seen, "is_seen": np.array([True, True, True, False])})

    guide = AutoMixed(model, chains={"count"})
    SVI(model, guide, optax.adam(0.01), VIMCOStar(chain_particles={"count": 3})).init(random.key(0))
    np.testing.assert_array_equal(guide.least["count"], [3, 0, 12, 0])


def explosive(seen):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.3))

    def year(expected, seen):
        count = numpyro.sample("count", dist.Poisson(expected))
        numpyro.sample("seen", dist.Binomial(count, 0.5), obs=seen)
        return growth * count + 1.0, None

    scan(year, 20.0, seen)


def test_a_guide_of_counts_begins_near_the_data_of_each_step():
    """After sixty years the prior reaches e^20; its draws that count beside the data of a step are of their size."""
    seen = 10 + np.arange(60) % 7
    guide = AutoMixed(explosive, chains={"count"})
    svi = SVI(explosive, guide, optax.adam(0.01), VIMCOStar(num_particles=4, chain_particles={"count": 8}))
    state = svi.init(random.key(0), seen)
    loc = guide.least["count"] + svi.get_params(state)["count_auto_loc"]
    scale = svi.get_params(state)["count_auto_scale"]
    assert (loc >= seen).all() and np.median(loc / seen) < 4 and (loc < 20 * seen).all()
    assert np.median(scale / seen) < 2 and (scale < 20 * seen).all()


def test_draws_of_the_prior_are_weighted_by_the_data_of_their_step():
    """A count of mean 10, half of which is seen: what is not seen is Poisson of mean 5, by 200 weighted draws."""
    seen = np.array([2, 5, 9])

    def model():
        def step(carry, seen):
            count = numpyro.sample("count", dist.Poisson(10.0))
            numpyro.sample("seen", dist.Binomial(count, 0.5), obs=seen)
            return count, None

        scan(step, 0, seen)

    guide = AutoMixed(model, chains={"count"})
    SVI(model, guide, optax.adam(0.01), VIMCOStar(chain_particles={"count": 3})).init(random.key(0))
    draws = np.asarray(guide.prior_draws["count"])
    assert (draws >= seen).all()
    # At least 25 draws count: 5.5 standard errors of their mean are 5.5 sqrt(5 / 25) = 2.5; those of 10 are 3 to 8 off.
    assert (np.abs(draws.mean(0) - seen - 5) < 2.5).all()


@pytest.mark.weekly
def test_a_pool_of_fewer_starts_is_another_program():
    """A start may fail after draws of all were compiled: what is kept of their trace must not be traced."""
    x = np.array([3, 5, 4])
    guide = AutoMixed(explosive, chains={"count"})
    svi = SVI(explosive, guide, optax.adam(0.01), VIMCOStar(0.5, 4, chain_particles={"count": 4}))
    fitted = fit(svi, random.key(0), 2, x, num_starts=3, recover=False, progress_bar=False)
    params = fitted.starts.params
    approx = Approximation.of(svi, params, 3, (x,), {})
    for number in (3, 2):
        some = approx.at(taken(params, np.arange(number)), number, 0)
        assert np.isfinite(propose_pooled(some, random.key(1), 8).log_weight).any()


def test_other_data_need_another_guide():
    def model(seen):
        def step(before, seen):
            count = numpyro.sample("count", dist.Poisson(before + 1.0))
            numpyro.sample("seen", dist.Binomial(count, 0.5), obs=seen)
            return count, None

        scan(step, 10, seen)

    guide = AutoMixed(model, chains={"count"})
    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar(chain_particles={"count": 3}))
    params = svi.get_params(svi.init(random.key(0), np.array([3, 5, 4])))
    Posterior(svi, params, np.array([3, 5, 5]))
    with pytest.raises(ValueError, match=r"first called with other data, which rule out values of 'count'"):
        Posterior(svi, params, np.array([3, 2, 4]))


def test_one_dict_marks_sites_in_a_scan_and_outside():
    """NumPyro writes a traced index into the dict."""
    marked = {"enumerate": "parallel"}

    def model(x):
        e = numpyro.sample("e", dist.Bernoulli(0.3), infer=marked)
        numpyro.sample("w", dist.Normal(e, 1.0), obs=0.5)

        def step(before, x):
            z = bernoulli("z", 0.5 * before)
            u = numpyro.sample("u", dist.Bernoulli(0.3), infer=marked)
            numpyro.sample("x", dist.Normal(z + u, 1.0), obs=x)
            return z, None

        scan(step, 0, x)

    svi = SVI(model, AutoMixed(model, chains={"z"}), optax.adam(0.01), VIMCOStar(chain_particles={"z": 3}))
    svi.run(random.key(0), 2, X, progress_bar=False)
    assert np.isfinite(fit(svi, random.key(0), 2, X, num_starts=1, progress_bar=False).losses).all()


# A posterior.


def exact_regimes(x):
    """Log evidence, mean of g and probability of each state, by sums over paths and a grid."""
    grid = np.linspace(-5, 5, 401)
    paths = np.array(list(itertools.product([0, 1], repeat=len(x))))
    before = np.concatenate([np.zeros((len(paths), 1)), paths[:, :-1]], axis=1)
    logits = 2.0 * before[None] - 1 + grid[:, None, None]
    log_p = (paths * logits - np.logaddexp(0, logits)).sum(-1) + log_normal(2.0 * paths, x).sum(-1)
    weight = np.exp(np.asarray(log_p) + log_normal(grid, 0.0)[:, None])
    total = weight.sum()
    states = np.einsum("gp,pt->t", weight, paths) / total
    return np.log(total * (grid[1] - grid[0])), (weight.sum(1) @ grid) / total, states


def test_posterior_of_a_chain():
    """Within 5 standard errors of the exact one, for 10,000 draws."""
    x = np.random.default_rng(0).normal(size=6) + np.array([0, 0, 2, 2, 0, 2])

    def model(x):
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def step(before, x):
            z = bernoulli("z", 2.0 * before - 1 + g)
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
            return z, None

        scan(step, 0, x)

    guide = AutoMixed(model, chains={"z"})
    svi = SVI(model, guide, optax.adam(0.03), VIMCOStar(0.5, 8, chain_particles={"z": 8}))
    posterior = fit(svi, random.key(0), 300, x, num_starts=2, progress_bar=False)
    # At a lower power the steps of the chain would depend on each other as they do in the prior.
    np.testing.assert_allclose(posterior.starts.inverse_temperature[0, [0, 150]], [OF_CHAINS, 1.0], rtol=1e-5)
    log_evidence, mean, states = exact_regimes(x)
    found = posterior.to_arviz(num_samples=4000, progress_bar=False)
    assert abs(posterior.log_evidence - log_evidence) < 5 * posterior.log_evidence_std_error + 1e-3
    assert posterior.log_evidence_std_error < 0.05
    assert found.posterior["z"].shape == (1, 4000, 6)
    ess = posterior.ess / 10_000 * 4000
    assert abs(float(found.posterior["g"].mean()) - mean) < 5 / np.sqrt(ess)
    error = np.sqrt(states * (1 - states) / ess)
    assert (np.abs(found.posterior["z"].mean(("chain", "draw")).values - states) < 5 * error + 1e-3).all()


@pytest.mark.weekly
def test_two_chains_one_of_which_draws_two_latents_at_a_step():
    """Its evidence is the exact one, by a grid of g and all paths, within 5 standard errors."""
    x, w = np.array([0.4, 2.1, -0.3]), np.array([[1.1, 0.2], [2.3, -0.5]])

    def model(x, w):
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def first(before, x):
            z = bernoulli("z", 2.0 * before - 1 + g)
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
            return z, None

        def second(before, w):
            with numpyro.plate("pair", 2):
                u = bernoulli("u", 1.0 * before - 0.5 - g)
                v = numpyro.sample("v", dist.Normal(u + 0.5 * before, 0.7))
                numpyro.sample("w", dist.Normal(v, 1.0), obs=w)
            return u, None

        scan(first, 0, x)
        scan(second, jnp.zeros(2, int), w, reverse=True)

    grid = np.linspace(-5, 5, 401)
    total = log_normal(grid, 0.0)
    for paths, log_p in (of_z(x, grid), of_u(w[:, 0], grid), of_u(w[:, 1], grid)):
        assert len(paths) == log_p.shape[1]
        total = total + logsumexp(log_p, axis=1)
    log_evidence = logsumexp(total) + np.log(grid[1] - grid[0])
    guide = AutoMixed(model, chains={"z", "u"})
    objective = VIMCOStar(0.5, 8, chain_particles={"z": 8, "v": 8})
    posterior = fit(SVI(model, guide, optax.adam(0.03), objective), random.key(0), 300, x, w, progress_bar=False)
    assert posterior.log_evidence_std_error < 0.03
    assert abs(posterior.log_evidence - log_evidence) < 5 * posterior.log_evidence_std_error


@pytest.mark.weekly
def test_a_path_that_is_one_value_is_advised_to_be_a_chain():
    seen = np.array([12, 15, 9, 14, 11, 8, 13, 10])

    def model(seen):
        def step(rate, seen):
            count = numpyro.sample("count", dist.Poisson(rate))
            numpyro.sample("seen", dist.Poisson(0.5 * count + 0.1), obs=seen)
            return 0.9 * count + 2.0, None

        scan(step, 20.0, seen)

    svi = SVI(model, AutoMixed(model, structure="mean_field"), optax.adam(0.01), VIMCOStar())
    posterior = fit(svi, random.key(0), 5, seen, num_starts=2, progress_bar=False)
    finding = next(finding for finding in posterior.findings if finding.code == "joint-path")
    assert finding.numbers == {"chain": "count"}
    chains = AutoMixed(model, chains={"count"})
    posterior = fit(
        SVI(model, chains, optax.adam(0.01), eval(finding.remedy)), random.key(0), 5, seen, progress_bar=False
    )
    assert "joint-path" not in codes(posterior)


def of_z(x, grid):
    """All paths of the first chain, and the log-density of each at each g."""
    paths = np.array(list(itertools.product([0, 1], repeat=len(x))))
    before = np.concatenate([np.zeros((len(paths), 1)), paths[:, :-1]], axis=1)
    logits = 2.0 * before - 1 + grid[:, None, None]
    return paths, (log_bernoulli(logits, paths) + log_normal(2.0 * paths, x)).sum(-1)


def of_u(w, grid):
    """The same of one element of the second chain, which begins at the end, with v integrated out."""
    paths = np.array(list(itertools.product([0, 1], repeat=len(w))))
    before = np.concatenate([paths[:, 1:], np.zeros((len(paths), 1))], axis=1)
    logits = before - 0.5 - grid[:, None, None]
    variance = 1 + 0.7**2
    of_data = -0.5 * (w - paths - 0.5 * before) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)
    return paths, (log_bernoulli(logits, paths) + of_data).sum(-1)


def test_linear_gaussian_states():
    """Log evidence and means are those of the multivariate normal, within 5 standard errors."""
    y = np.random.default_rng(1).normal(size=12).cumsum() * 0.5 + 0.8

    def model(y):
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def step(before, y):
            z = numpyro.sample("z", dist.Normal(0.9 * before, 0.5))
            numpyro.sample("y", dist.Normal(z + g, 0.7), obs=y)
            return z, None

        scan(step, 0.0, y)

    ar = np.linalg.inv(np.eye(12) - 0.9 * np.eye(12, k=-1))
    states = 0.25 * ar @ ar.T
    covariance = states + 1 + 0.49 * np.eye(12)
    log_evidence = stats.multivariate_normal(np.zeros(12), covariance).logpdf(y)
    means = states @ np.linalg.solve(covariance, y)
    deviations = np.sqrt(np.diag(states - states @ np.linalg.solve(covariance, states)))
    objective = VIMCOStar(0.5, 8, chain_particles={"z": 16})
    svi = SVI(model, AutoMixed(model, chains={"z"}), optax.adam(0.03), objective)
    posterior = fit(svi, random.key(0), 500, y, num_starts=2, progress_bar=False)
    assert posterior.log_evidence_std_error < 0.05
    assert abs(posterior.log_evidence - log_evidence) < 5 * posterior.log_evidence_std_error
    found = posterior.to_arviz(num_samples=4000, groups=(), progress_bar=False).posterior["z"].values[0]
    error = deviations / np.sqrt(posterior.ess * 0.4)
    assert (np.abs(found.mean(0) - means) < 5 * error).all()
    assert (np.abs(found.std(0) / deviations - 1) < 5 / np.sqrt(posterior.ess * 0.4)).all()


@pytest.mark.parametrize("gap", [1.0, 20.0, 60.0])
def test_signals_of_a_sample_that_has_nearly_all_weight(gap):
    """In float32, against the formula in float64: 1 - V is the sum of what the other samples have."""
    log_v = np.zeros((2, 2, 2, 2), np.float32)  # particles, samples, steps, samples before
    log_v[0, 0, 0] = gap
    shared = np.array([0.0, -80.0], np.float32)
    structure = Structure(0, frozenset(), 1.0, (("z", frozenset(), 1.0),), (("z", False),))
    _, weights = weigh(Levels(shared, {"z": log_v}), structure, 0.0, partial(vimco_star_signal, alpha=0.0))
    of_other = np.logaddexp(gap, 0.0) - np.log(2)  # log Ẑ of particle 0; that of the other is -80
    log_rest = np.logaddexp(-np.logaddexp(gap, 0.0), -80 - of_other)  # log(1 - W V) of the heavy sample
    share = np.exp(-np.logaddexp(-gap, 0.0)) / (1 + np.exp(-80 - of_other))
    np.testing.assert_allclose(weights.local["z"].signal[0, 0, 0, 0], -log_rest - share, rtol=1e-5)


# Plates inside of `scan`.


def sums_of_all_steps_before(x):
    """A series in each of two elements, and one latent of both; the carry is no chain of first order. Log evidence."""
    elements = numpyro.plate("element", 2)

    def model(x):
        g = bernoulli("g", 0.2)
        with elements:
            first = bernoulli("first", g - 0.3)

        def step(total, x):
            with elements:
                z = bernoulli("z", 0.8 * total - 1)
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return total + z, None

        scan(step, first, x)

    def of_element(g, seen):
        terms = []
        for first, *z in itertools.product((0.0, 1.0), repeat=1 + len(seen)):
            total = first + np.cumsum([0.0, *z[:-1]])
            log_p = log_bernoulli(g - 0.3, first) + log_bernoulli(0.8 * total - 1, np.array(z)).sum()
            terms.append(log_p + log_normal(np.array(z), seen).sum())
        return logsumexp(jnp.array(terms))

    of_both = [log_bernoulli(0.2, g) + of_element(g, x[:, 0]) + of_element(g, x[:, 1]) for g in (0.0, 1.0)]
    return model, logsumexp(jnp.array(of_both))


def normal_steps(x):
    """The same with Normal steps: what is seen is Normal."""

    def model(x):
        def step(before, x):
            with numpyro.plate("element", 2):
                u = numpyro.sample("u", dist.Normal(0.5 * before, 1.0))
                numpyro.sample("x", dist.Normal(u, 1.0), obs=x)
            return u, None

        scan(step, jnp.zeros(2), x)

    steps = np.tril(0.5 ** (np.arange(len(x))[:, None] - np.arange(len(x))))
    covariance = steps @ steps.T + np.eye(len(x))
    return model, stats.multivariate_normal(np.zeros(len(x)), covariance).logpdf(x.T).sum()


@pytest.mark.long
@pytest.mark.parametrize(
    "make, chains", [(sums_of_all_steps_before, ()), (sums_of_all_steps_before, "z"), (normal_steps, ())]
)
def test_a_plate_inside_of_scan_is_drawn_as_a_whole(make, chains):
    """Log evidence of the plain objective within 5 standard errors, which are 0.03 nats at most."""
    x = np.array([[0.7, -1.2], [1.3, 0.4], [0.2, 1.9]])
    model, log_evidence = make(x)
    svi = SVI(model, AutoMixed(model, chains=chains), optax.adam(0.03), VIMCOStar(0.5, 8))
    posterior = fit(svi, random.key(0), 200, x, num_starts=2, progress_bar=False)
    assert posterior.log_evidence_std_error < 0.03
    assert abs(posterior.log_evidence - log_evidence) < 5 * posterior.log_evidence_std_error


def test_a_subsampled_plate_inside_of_scan():
    def model():
        elements = numpyro.plate("element", 4, subsample_size=2)
        with elements:
            numpyro.sample("first", dist.Normal(0.0, 1.0))

        def step(_, x):
            with elements:
                numpyro.sample("x", dist.Normal(bernoulli("z", 0.0), 1.0), obs=x)
            return None, None

        scan(step, None, X)

    with pytest.raises(ValueError, match="latent site 'z' is inside of `scan` in the plate 'element'"):
        seed(AutoMixed(model), 0)()


@pytest.mark.long
def test_elements_of_a_chain_are_not_coupled():
    """A guide that couples elements which data hold apart fails the check of the pool, once parameters have moved."""

    def model(x):
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))

        def step(before, x):
            with numpyro.plate("element", 2):
                z = bernoulli("z", before + g)
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return 1.0 * z, None

        scan(step, jnp.zeros(2), x)

    objective = VIMCOStar(0.5, 2, chain_particles={"z": 2})
    svi = SVI(model, AutoMixed(model, chains={"z"}), optax.adam(0.05), objective)
    posterior = fit(svi, random.key(0), 20, np.array([[0.7, -1.2], [1.3, 0.4]]), num_starts=2, progress_bar=False)
    assert np.isfinite(posterior.log_evidence)
