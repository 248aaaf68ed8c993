"""What stood in the way of users of the first release: crashes, silent faults, wrong advice; with the right values."""

from contextlib import contextmanager
from pathlib import Path
import re
import textwrap

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import block, seed
from numpyro.infer import SVI, init_to_uniform, init_to_value
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
import optax
import pytest
from scipy.special import logsumexp
from scipy.stats import binom, norm, poisson

from helpers import codes
from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit
from numpyro_vimco.diagnostics.findings import Facts, find_all
from numpyro_vimco.families.autoregressive import FullCoupling
from numpyro_vimco.families.distributions import InsideSimplex
from numpyro_vimco.fitting.breakdowns import ruled_out, sites_with_nan_gradients


def quick_fit(model, guide, *args, num_steps=300, num_starts=4, **kwargs):
    svi = SVI(model, guide, optax.adam(0.02), VIMCOStar(0.5, num_particles=16))
    return fit(svi, random.key(0), num_steps, *args, num_starts=num_starts, progress_bar=False, **kwargs)


# Steps that break down.


def root_model(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    root = jnp.where(a > 0, jnp.sqrt(jnp.maximum(a, 0)), 0.0)
    numpyro.sample("y", dist.Normal(root + z, 1), obs=y)


def test_the_site_of_a_nan_gradient_is_named():
    with pytest.raises(ValueError, match=r"gradient is NaN at 'y': .*`jnp.where`.*stable_update=True"):
        quick_fit(root_model, AutoMixed(root_model), jnp.array(1.0))


def test_a_healthy_fit_passes_with_jax_debug_nans():
    def model(y):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    with jax.debug_nans(True):
        posterior = quick_fit(model, AutoMixed(model), jnp.array(1.0), num_steps=5)
    assert np.isfinite(posterior.losses).all()


def test_data_that_rule_out_all_draws_end_a_fit_and_are_named():
    def model(y):
        n = numpyro.sample("n", dist.Poisson(3.0))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Binomial(n.astype(int), 0.5), obs=y)

    with pytest.raises(
        ValueError, match=r"first 1\d\d steps .* site 'y' are impossible in 100% of draws .* at \[2\]\."
    ):
        too_low = AutoMixed(model, init_loc_fn=init_to_value(values={"n": 3}))
        quick_fit(model, too_low, jnp.array([1, 2, 90]), num_steps=10_000)


# Guides.


@pytest.mark.filterwarnings("ignore:.*Out-of-support values")  # NumPyro's, of a first draw
def test_a_hidden_latent_may_make_first_draws_impossible():
    # With rho ~ Beta(4, 2), n ~ Multinomial(3, (1/2, 1/2)), p(y = 2) = Σ_n p(n) E[Binomial(2; n, rho)].
    def model(y):
        rho = numpyro.sample("rho", dist.Beta(4, 2))
        n = numpyro.sample("n", dist.Multinomial(3, jnp.ones(2) / 2))
        numpyro.sample("y", dist.Binomial(n[0], rho), obs=y)

    of_rho = AutoMixed(block(model, hide=["n"]))

    def guide(y):
        of_rho(y)
        probs = numpyro.param("probs", jnp.array([0.8, 0.2]), constraint=dist.constraints.simplex)
        numpyro.sample("n", dist.Multinomial(3, probs))

    def moment(a, b):
        return (
            np.prod([(4 + i) for i in range(a)])
            * np.prod([(2 + i) for i in range(b)])
            / np.prod([(6 + i) for i in range(a + b)])
        )

    exact = 3 / 8 * moment(2, 0) + 1 / 8 * 3 * moment(2, 1)
    posterior = quick_fit(model, guide, 2, num_steps=500)
    # 10,000 draws with an ESS of about a half: a standard error of 0.01; ten of them.
    assert abs(posterior.log_evidence - np.log(exact)) < 0.1


def test_an_impossible_model_is_still_an_error():
    def model(y):
        numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("never", -jnp.inf)

    with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
        quick_fit(model, AutoMixed(model), 1.0)


def test_a_partial_of_auto_normal_is_no_silent_mean_field():
    from functools import partial

    with pytest.raises(ValueError, match=r"AutoMixed\(model, init_scale=0.2\)"):
        AutoMixed(root_model, continuous=partial(AutoNormal, init_scale=0.2))
    guide = AutoMixed(root_model, continuous=partial(AutoNormal, init_scale=0.2), structure="mean_field")
    assert guide.structure == "mean_field"


def normal_model(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a, 1), obs=y)


HIDDEN = {}


def nested(y):
    def inner():
        return HIDDEN["guide"](y)

    return inner()


class Calling:
    def __call__(self, y):
        return nested(y)


@pytest.mark.parametrize("guide", [nested, Calling()])
@pytest.mark.parametrize("called_before", [False, True])
def test_guides_are_found_where_they_are_called(guide, called_before):
    HIDDEN["guide"] = inner = AutoNormal(normal_model, init_loc_fn=init_to_uniform)
    if called_before:
        seed(inner, random.key(7))(1.0)
    before = inner._init_locs if called_before else None
    posterior = quick_fit(normal_model, guide, 1.0, num_steps=0)
    assert len(set(np.asarray(posterior.starts.params["a_auto_loc"]).tolist())) == 4
    assert not posterior.starts.alike
    assert before is None or inner._init_locs == before
    assert AutoNormal.__call__.__qualname__ == "AutoNormal.__call__"  # as it was


def test_starts_that_begin_alike_are_no_agreement():
    def guide(begin, y):
        loc = numpyro.param("loc", begin)
        numpyro.sample("a", dist.Normal(loc, 0.7))

    for begin, verdict in ((0.0, "usable"), (lambda key: random.normal(key), "good")):
        posterior = quick_fit(normal_model, lambda y, begin=begin: guide(begin, y), 1.0)
        assert posterior.verdict == verdict
        assert ("starts-alike" in codes(posterior)) == (verdict == "usable")
        assert posterior.resume(10).starts.alike == (verdict == "usable")


def test_couplings_are_solved_without_solve_triangular():
    # Four of them at a time wait for each other without end in JAX 0.10.1, on two cores.
    right, matrix = jnp.arange(40.0) / 40, jnp.tril(random.normal(random.key(0), (40, 40)) / 10, -1)

    def solve(matrix):
        return FullCoupling(matrix[:, None, :, None]).solve(right, jnp.ones(40))

    assert "triangular_solve" not in str(jax.make_jaxpr(jax.grad(lambda matrix: solve(matrix).sum()))(matrix))
    np.testing.assert_allclose(solve(matrix), np.linalg.solve(np.eye(40) - matrix, right), rtol=1e-5)
    gradient = jax.grad(lambda matrix: jnp.sum(solve(matrix) ** 2))(matrix)
    inverse = np.linalg.inv(np.eye(40) - np.asarray(matrix, float))
    u = inverse @ np.asarray(right, float)
    np.testing.assert_allclose(gradient, np.tril(np.outer(2 * inverse.T @ u, u), -1), rtol=1e-4, atol=1e-5)


def counts_in_time(y, reverse=False):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.1))

    def step(n, y):
        n = numpyro.sample("count", dist.Poisson(n * growth + 1))
        effort = numpyro.sample("effort", dist.Normal(jnp.zeros(2), 1).to_event(1))
        numpyro.sample("y", dist.Binomial(n, jax.nn.sigmoid(effort.sum())), obs=y)
        return n, None

    scan(step, jnp.array(20), y, reverse=reverse)


def about_sites(guide, *args):
    seed(guide, 0)(*args)
    return {
        site.name: (site.coupled, getattr(site, "own", ()), site.depends, jax.tree.map(jnp.shape, site.start))
        for site in guide._sites
    }


SEEN = jnp.array([11, 14, 9, 16, 30, 21, 35])


@pytest.mark.parametrize(
    "count, effort, reverse",
    [
        (90, 0.5, False),
        (2 * SEEN + 1, jnp.arange(14.0).reshape(7, 2), True),
        (2 * np.array(SEEN, np.int64) + 1, np.arange(14.0).reshape(7, 2), False),  # conversion makes another array
    ],
)
def test_a_guide_begins_at_given_values_inside_of_scan(count, effort, reverse):
    guide = AutoMixed(counts_in_time, init_loc_fn=init_to_value(values={"count": count, "effort": effort}))
    assert about_sites(guide, SEEN, reverse) == about_sites(AutoMixed(counts_in_time), SEEN, reverse)
    start = {site.name: site.start["loc"] for site in guide._sites}
    np.testing.assert_allclose(start["count"], np.broadcast_to(count, 7))
    np.testing.assert_allclose(start["effort"], np.broadcast_to(effort, (7, 2)))


def test_one_value_is_for_all_elements_and_leaves_their_couplings():
    def model():
        with numpyro.plate("row", 3):
            z = numpyro.sample("z", dist.Poisson(3.0))
            a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal((z + a).sum(), 1), obs=2.0)

    guide = AutoMixed(model, init_loc_fn=init_to_value(values={"z": 2, "a": 0.5}))
    assert about_sites(guide) == about_sites(AutoMixed(model))
    for site, value in zip(guide._sites, (2, 0.5)):
        np.testing.assert_allclose(site.start["loc"], jnp.full(3, value))
    with pytest.raises(ValueError, match=r"'z' a value of shape \(4,\), but its shape is \(3,\)"):
        seed(AutoMixed(model, init_loc_fn=init_to_value(values={"z": jnp.ones(4)})), 0)()


def test_a_fit_that_begins_at_given_counts_of_scan_has_finite_losses():
    seen = jnp.full(30, 60)

    def model(y):
        def step(n, y):
            n = numpyro.sample("count", dist.Poisson(n + 1))
            numpyro.sample("y", dist.Binomial(n, 0.5), obs=y)
            return n, None

        scan(step, jnp.array(20), y)

    def first_loss(**kwargs):
        svi = SVI(model, AutoMixed(model, **kwargs), optax.adam(0.01), VIMCOStar(num_particles=16))
        return svi.run(random.key(0), 1, seen, progress_bar=False).losses[0]

    assert np.isinf(first_loss())
    assert np.isfinite(first_loss(init_loc_fn=init_to_value(values={"count": 2 * seen})))


def levels(time, first, second):
    return 2.0 * (time >= first) - 3.0 * (time >= second)


def two_changes(y):
    first = numpyro.sample("t1", dist.DiscreteUniform(0, 12))
    second = numpyro.sample("t2", dist.DiscreteUniform(first, 12))
    numpyro.sample("y", dist.Normal(levels(jnp.arange(13), first, second), 1.0).to_event(1), obs=y)


def evidence_of_two_changes(y):
    pairs = [(first, second) for first in range(13) for second in range(first, 13)]
    of_data = [norm.logpdf(y, levels(np.arange(13), *pair)).sum() for pair in pairs]
    return logsumexp(np.array(of_data) - [np.log(13 * (13 - first)) for first, _ in pairs])


def survivors(y):
    n = numpyro.sample("n", dist.Poisson(6.0))
    with numpyro.plate("row", len(y)):
        s = numpyro.sample("s", dist.Binomial(n, 0.7))
        numpyro.sample("y", dist.Normal(s, 1.0), obs=y)


def evidence_of_survivors(y):
    n, s = np.arange(40), np.arange(40)[:, None]
    of_data = np.prod([(binom.pmf(s, n, 0.7) * norm.pdf(datum, s)).sum(0) for datum in y], axis=0)
    return np.log(np.sum(poisson.pmf(n, 6) * of_data))


def window(y):
    first = numpyro.sample("t1", dist.Poisson(4.0))
    second = numpyro.sample("t2", dist.DiscreteUniform(first, first + 5))
    numpyro.sample("y", dist.Normal(second, 1.0), obs=y)


def evidence_of_window(y):
    first = np.arange(40)
    of_data = np.mean([norm.pdf(y, first + i) for i in range(6)], axis=0)
    return np.log(np.sum(poisson.pmf(first, 4) * of_data))


def assert_fits(model, guide, y, log_evidence):
    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar(0.5, num_particles=16))
    params = svi.run(random.key(0), 200, y, progress_bar=False).params
    # A bound with 10,000 particles; with an ESS of a twentieth its standard error is 0.05 nats.
    estimate = -VIMCOStar(num_particles=10_000).loss(random.key(1), params, model, guide, y)
    assert abs(estimate - log_evidence) < 0.25


of_two_changes = np.array([0, 0.2, -0.3, 2, 2.4, 1.8, 2.2, -1, -1.2, -0.8, -1, -1.1, -0.9])


@pytest.mark.parametrize(
    "model, y, exact",
    [
        (two_changes, of_two_changes, evidence_of_two_changes),
        pytest.param(survivors, np.array([5.0, 2.0]), evidence_of_survivors, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("structure", ["autoregressive", pytest.param("mean_field", marks=pytest.mark.long)])
def test_bounds_that_other_latents_move(model, y, exact, structure):
    assert_fits(model, AutoMixed(model, structure=structure), y, exact(y))


def test_following_the_advice_on_bounds_that_a_guide_does_not_see_works():
    with pytest.raises(ValueError, match="structure='mean_field' draws it independently") as error:
        seed(AutoMixed(window, structure="mean_field"), 0)(6.0)
    code = str(error.value).partition("\n\n")[2].replace("low, high = ...", "low = latents['t1']; high = low + 5")
    namespace = {**globals(), "model": window}
    exec(textwrap.dedent(code), namespace)
    assert_fits(window, namespace["guide"], 6.0, evidence_of_window(6.0))


# After the fit.


def test_starts_with_other_orders_of_labels_agree():
    y = np.concatenate([np.linspace(-2.5, -1.5, 8), np.linspace(1.5, 2.5, 8)]).astype(np.float32)

    def model(y):
        with numpyro.plate("component", 2):
            mu = numpyro.sample("mu", dist.Normal(0, 3))
        with numpyro.plate("row", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(mu[z], 0.7), obs=y)

    def guide(y):
        loc = numpyro.param("loc", lambda key: 2 * jnp.array([1.0, -1.0]) * jnp.sign(random.normal(key)))
        scale = numpyro.param("scale", jnp.full(2, 0.25), constraint=dist.constraints.positive)
        with numpyro.plate("component", 2):
            numpyro.sample("mu", dist.Normal(loc, scale))

    svi = SVI(model, guide, optax.adam(0.005), VIMCOStar(0.5, num_particles=16))
    posterior = fit(svi, random.key(1), 300, y, progress_bar=False, tempering=0, recover=False)
    orders = np.sign(np.asarray(posterior.starts.params["loc"]))[:, 0]
    assert set(orders) == {-1, 1}  # both are there
    assert posterior.verdict == "good"
    assert codes(posterior) == ["starts-agree", "labels-switched"]
    # Each start has the evidence of one order: less by log 2.
    np.testing.assert_allclose(posterior.starts.log_evidence, posterior.log_evidence - np.log(2), atol=0.1)


def test_groups_of_an_improper_prior_are_left_out_with_a_warning():
    def model(y):
        a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(a + z, 1), obs=y)

    posterior = quick_fit(model, AutoMixed(model), jnp.array(1.0))
    with pytest.warns(UserWarning, match="prior are left out, .*'a' has no sampler"):
        tree = posterior.to_arviz(groups=("prior",))
    assert "posterior" in tree.groups() or "/posterior" in tree.groups
    # p(y) = ∫ p(y | a) da = 1: exact, by the flat prior.
    assert abs(posterior.log_evidence) < 0.05


@contextmanager
def larger_constants_are_warned_of(size):
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", size)
    try:
        yield
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", before)


def test_data_are_no_constants_of_compiled_programs():
    # XLA computes with constants while it compiles: for seconds, where they are as large as data.
    pytest.importorskip("funsor")
    x, y = random.normal(random.key(0), (2, 2000))

    def model(x, y):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        with numpyro.plate("row", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(slope * x + z, 1), obs=y)

    with larger_constants_are_warned_of(4 * len(y)):
        svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5, 4))
        posterior = fit(svi, random.key(0), 2, x, y, num_starts=2, recover=False, progress_bar=False)
        posterior.to_arviz(num_samples=10, groups=("posterior_predictive", "log_likelihood_given_latents"))
        posterior.gradient_snr(num_draws=2)
        params = posterior.params
        assert ruled_out(svi, params, random.key(1), (x, y), {}).startswith("No observed site")
        assert sites_with_nan_gradients(svi, params, random.key(1), (x, y), {}) == []


def test_a_simplex_is_not_checked_while_a_program_compiles():
    # Else XLA folds a reduction over all elements, one by one: 2 s for a million.
    values = jnp.array([[0.5, -300.0], [0.0, jnp.nan]])
    program = jax.jit(lambda x: dist.constraints.simplex(InsideSimplex()(x))).lower(values).compile()
    assert "direction=GE" in program.as_text()
    assert program(values).tolist() == [True, False]
    assert InsideSimplex()(values[0])[1] == jnp.finfo(values.dtype).tiny


def test_a_factor_is_in_no_log_likelihood_and_the_advice_gives_it_one():
    page = (Path(__file__).parent.parent / "docs" / "checking_a_fit.md").read_text()
    namespace = {"dist": dist, "jnp": jnp}
    exec(re.search(r"^class LogDensity.*?(?=^def )", page, flags=re.DOTALL | re.MULTILINE).group(), namespace)
    y = jnp.array([0.3, -0.5, 1.1, 2.0])

    def model(y, kind):
        a = numpyro.sample("a", dist.Normal(0, 3))
        fn = dist.Normal(a, 1)
        numpyro.factor("constant", 1.0)
        with numpyro.plate("row", len(y)):
            if kind == "factor":
                numpyro.factor("y", fn.log_prob(y))
            else:
                numpyro.sample("y", fn if kind == "site" else namespace["LogDensity"](fn.log_prob(y)), obs=y)

    def tree(kind):
        svi = SVI(model, AutoNormal(model), optax.adam(0.02), VIMCOStar())
        params = {"a_auto_loc": jnp.array(0.7), "a_auto_scale": jnp.array(0.5)}
        return Posterior(svi, params, y, kind).to_arviz(num_samples=100, groups="log_likelihood")

    with pytest.warns(UserWarning, match="log-likelihood is without 'y', .* If it is the density of data"):
        assert not hasattr(tree("factor"), "log_likelihood")
    values, expected = (tree(kind)["log_likelihood"]["y"].values for kind in ("class", "site"))
    assert values.shape == (1, 100, 4)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_a_factor_of_elements_that_are_left_out_with_their_latents_is_not_missing():
    def model():
        with numpyro.plate("row", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.factor("tilt", 0.5 * z)
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.arange(3.0))

    svi = SVI(model, AutoMixed(model), optax.adam(0.02), VIMCOStar())
    result = svi.run(random.key(0), 1, progress_bar=False)
    tree = Posterior(svi, result).to_arviz(num_samples=10, groups="log_likelihood")
    assert list(tree["log_likelihood"].data_vars) == ["row_element"]


def test_an_observed_function_of_latents_is_no_data():
    def model(y):
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("twice", dist.Normal(0, 1), obs=2 * a)
        numpyro.sample("y", dist.Normal(a, 1), obs=y)

    tree = quick_fit(model, AutoNormal(model), jnp.array(1.0), num_steps=50).to_arviz()
    assert list(tree["observed_data"].data_vars) == ["y"]


def test_tables_of_probabilities_count_in_the_size_of_chunks():
    def model(y, size):
        n = numpyro.sample("n", dist.Categorical(jnp.ones(size) / size))
        numpyro.sample("y", dist.Normal(n, 3.0), obs=y)

    def guide(y, size):
        numpyro.sample("n", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(size))))

    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar())
    sizes = [Posterior(svi, {"logits": jnp.zeros(size)}, 1.0, size)._approx.chunk_size() for size in (10, 30_000)]
    assert sizes == [2**14, 2**20 // 30_000]


def correlated(y):
    a = numpyro.sample("a", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(a.sum(), 0.2), obs=y)


def test_a_joint_guide_is_not_advised_to_be_one():
    svi = SVI(correlated, AutoMultivariateNormal(correlated), optax.adam(0.02), VIMCOStar())
    posterior = Posterior(svi, svi.run(random.key(0), 5, 1.0, progress_bar=False), 1.0)
    found = [str(finding) for finding in posterior.findings]
    assert "missing-correlation" in codes(posterior)
    assert not any("AutoMultivariateNormal" in text for text in found)


def test_too_much_correlation_is_not_called_a_lack():
    def model(y):
        a = numpyro.sample("a", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(a, 1).to_event(1), obs=y)

    def guide(y):
        scale = jnp.array([[1.0, 0.0], [0.8, 0.6]])
        numpyro.sample("a", dist.MultivariateNormal(numpyro.param("loc", jnp.zeros(2)), scale_tril=scale))

    svi = SVI(model, guide, optax.adam(0.02), VIMCOStar())
    posterior = Posterior(svi, {"loc": jnp.zeros(2)}, jnp.zeros(2))
    facts = Facts(posterior._approx, *found_of(posterior))
    assert [f.code for f in find_all(facts, "bad", None) if "correlation" in f.code] == ["wrong-correlation"]


def found_of(posterior):
    from numpyro_vimco.draws.weighing import weigh_pool

    return weigh_pool(posterior._approx, random.key(0), 10_000), 10_000, 0.01, None, {}, False, False


def test_following_the_advice_on_a_correlation_helps():
    svi = SVI(correlated, AutoNormal(correlated), optax.adam(0.02), VIMCOStar())
    posterior = Posterior(svi, svi.run(random.key(0), 1000, 1.0, progress_bar=False), 1.0)
    (advice,) = [f for f in posterior.findings if f.code == "missing-correlation"]
    guide = eval(advice.remedy, {"AutoMultivariateNormal": AutoMultivariateNormal, "model": correlated})
    better = SVI(correlated, guide, optax.adam(0.02), VIMCOStar())
    advised = Posterior(better, better.run(random.key(0), 1000, 1.0, progress_bar=False), 1.0)
    assert advised.ess > 2 * posterior.ess


def test_the_page_lists_the_codes_of_all_findings():
    root = Path(__file__).parent.parent
    source = (root / "numpyro_vimco" / "diagnostics" / "findings.py").read_text()
    known = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source))
    assert len(known) > 20
    page = (root / "docs" / "checking_a_fit.md").read_text()
    assert known <= set(re.findall(r"^\| `([a-z-]+)`", page, flags=re.MULTILINE))


def test_summed_sites_in_crossed_plates_are_named():
    pytest.importorskip("funsor")

    def model(y):
        numpyro.sample("q", dist.Normal(0, 1))
        with numpyro.plate("row", 2, dim=-2):
            u = numpyro.sample("u", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with numpyro.plate("column", 3, dim=-1):
            v = numpyro.sample("v", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with numpyro.plate("row", 2, dim=-2), numpyro.plate("column", 3, dim=-1):
            numpyro.sample("y", dist.Normal(u + v, 1.0), obs=y)

    def guide(y):
        numpyro.sample("q", dist.Normal(numpyro.param("loc", 0.0), 1))

    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar())
    with pytest.raises(ValueError, match="sites 'u', 'v' cannot be summed out together"):
        svi.run(random.key(0), 1, jnp.ones((2, 3)), progress_bar=False)
