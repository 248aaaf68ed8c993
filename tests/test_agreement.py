"""Several starts after a fit: pooled draws, starts as chains, what they agree on, and what earlier bounds prove."""

from dataclasses import replace
import re
from types import SimpleNamespace

import arviz as az
import jax
from jax import random
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
import optax
import pytest
from scipy.stats import norm
import xarray as xr

from helpers import codes, posterior_at, said
from numpyro_vimco import Posterior, ReweightedWakeSleep, VIMCOStar, fit, plots
from numpyro_vimco.diagnostics.agreement import compare, share_that_agrees
from numpyro_vimco.diagnostics.earlier_bounds import Stretch, _largest_sum, earlier_bounds
from numpyro_vimco.diagnostics.findings import Facts
from numpyro_vimco.diagnostics.verdict import _verdict
from numpyro_vimco.draws.moments import Moments

matplotlib.use("agg")


def two_modes():
    """Z is near 3 or near -3, with equal probability."""
    m = numpyro.sample("m", dist.Bernoulli(0.5))
    z = numpyro.sample("z", dist.Normal(6.0 * m - 3.0, 1.0))
    numpyro.sample("x", dist.Normal(jnp.abs(z), 1.0), obs=3.0)


def two_modes_guide():
    logits = numpyro.param("logits", lambda key: 0.1 * random.normal(key))  # each start begins elsewhere
    m = numpyro.sample("m", dist.Bernoulli(logits=logits))
    numpyro.sample("z", dist.Normal(6.0 * m - 3.0 + numpyro.param("loc", 0.0), 0.8))


# |z| is z or -z but for a chance of 1e-3 in 10^2.
LOG_EVIDENCE = norm(0, 2**0.5).logpdf(0)
SVI_TWO_MODES = SVI(two_modes, two_modes_guide, optax.adam(0.01), VIMCOStar(num_particles=8))
KEY = random.key(1)


def starts(logits, svi=SVI_TWO_MODES, loc=0.0, **options):
    params = {"logits": jnp.array(logits), "loc": jnp.broadcast_to(jnp.asarray(loc), len(logits))}
    return posterior_at(svi, params, **options)


def diagnosed(posterior, num_draws):
    posterior.diagnose(num_draws, KEY)
    return posterior


@pytest.fixture(scope="module")
def lost():
    return diagnosed(starts([-14.0, 14.0, 0.0]), 4000)


@pytest.fixture(scope="module")
def agreeing():
    return diagnosed(starts([-0.1, 0.2, 0.0]), 4000)


# Agreement.


def test_starts_that_lost_different_modes_are_named(lost):
    """Each lost half of the evidence, log 2 = 0.69 nats, and its m is off by half: one standard deviation."""
    assert lost.verdict == "usable"
    assert "The starts disagree: start" in said(lost)
    agreement = lost.starts.agreement
    for start, sign in ((0, "-"), (1, "")):
        assert f"start {start} is off in 'log evidence' by -0." in said(lost)
        found = agreement.sel(start=start)
        assert found["differs"].sel(quantity=["log evidence", "m", "z"]).all()
        assert abs(found["difference"].sel(quantity="log evidence") + np.log(2)) < 0.05
        assert abs(abs(found["difference"].sel(quantity="m")) - 1) < 0.1
        assert f"by {sign}0.9" in said(lost) or f"by {sign}1.0" in said(lost)
    assert not agreement.sel(start=2)["differs"].any() and "start 2" not in said(lost)
    numbers = next(finding.numbers for finding in lost.findings if finding.code == "starts-disagree")
    assert numbers == {"off": 2, "starts": 3}
    # Not what is there already: no plate, α = 0, not tempered.
    assert "in this order: a structured guide" in said(lost)
    assert "a smaller learning rate, 0 < α < 1 (`VIMCOStar(0.5)`), tempering (`tempering=0.5`), more steps" in said(
        lost
    )
    assert "starts        3, 2 off; log evidence of each: -1.9" in str(lost)


def test_pool_repairs_what_starts_lost(lost):
    # 4,000 draws of a mixture whose weights vary by little: 6 standard errors of the evidence are 0.03.
    assert abs(lost.log_evidence - LOG_EVIDENCE) < 0.03 and lost.diagnostics.log_weight.shape == (4000,)
    of_m = lost.starts.agreement.sel(quantity="m")
    assert abs(of_m["pooled"] - 0.5) < 6 * of_m["pooled_std_error"] < 0.06


def test_bounds_are_those_of_draws_in_random_order():
    """Half of the draws have next to no weight: groups of four of one start would have a bound of their own."""
    found = starts([0.0, 0.0], loc=[0.0, 4.0]).diagnose(8000, KEY)
    shuffled = np.random.default_rng(0).permutation(found.log_weight).reshape(-1, 4)
    groups = np.log(np.exp(shuffled).mean(1))
    assert abs(found.bounds[4] - groups.mean()) < 6 * groups.std() / 1000**0.5


def test_small_differences_are_none(agreeing):
    """0.09 standard deviations that are certain, and 0.15; 0.45 of an error of 0.1, and 0.55."""
    approx = agreeing._approx
    rng = np.random.default_rng(0)

    def moments(shift, number, log_weight=0.0):
        value = rng.normal(size=number)
        found = Moments({"z": 0})
        found.add(np.full(number, log_weight), {"z": (value - value.mean()) / value.std() + shift})
        return found

    pool = moments(0.0, 10**6)
    certain = [moments(shift, 10**6) for shift in (0.0, 0.09, 0.15)]
    uncertain = [moments(shift, 100) for shift in (0.45, 0.55)]
    table = compare(approx, [0, 1, 2, 3, 4], pool, certain + uncertain)
    assert list(table["differs"].sel(quantity="z").values) == [False, False, True, False, True]
    # Two that differ, and have all of the evidence; none that differs; one alone.
    for chosen, share in (([0, 1, 2, 3, 4], 0), ([0, 1, 3], 1), ([0], 0)):
        assert share_that_agrees(table.isel(start=chosen)) == share
    # One of three with a 90th of the evidence, and a 110th.
    for part, share in ((90, 0), (110, 2 / 3)):
        table = compare(approx, [0, 1, 2], pool, [*certain[:2], moments(9.0, 100, -np.log(part))])
        assert share_that_agrees(table) == share
    # A single one beside one that is stuck.
    assert share_that_agrees(compare(approx, [0, 1], pool, [certain[0], moments(9.0, 100, -9.0)])) == 0


def test_starts_that_agree_are_good(agreeing):
    assert agreeing.verdict == "good" and codes(agreeing) == ["starts-agree"]
    assert "3 starts agree" in said(agreeing) and "unless a part of the posterior was lost" in said(agreeing)
    assert "starts        3, which agree" in str(agreeing) and "verdict       good" in str(agreeing)
    assert not agreeing.starts.agreement["differs"].any()


@pytest.mark.parametrize("num_stuck", [1, 2])
def test_one_of_four_starts_may_be_stuck(num_stuck):
    # 1.5 off in one direction for both modes: the stuck ones find e^-17 of the evidence, or less.
    found = diagnosed(starts([0.0] * 4, loc=np.where(np.arange(4) < num_stuck, 10.0, 0.0)), 4000)
    assert abs(found.log_evidence - LOG_EVIDENCE) < 0.05
    assert f"starts        4, {num_stuck} off" in str(found)
    if num_stuck == 1:
        assert found.verdict == "good" and "3 of 4 starts agree" in said(found)
        assert "Start 0 is stuck: its evidence is" in said(found)
    else:
        assert found.verdict == "usable" and "The starts disagree" in said(found)


def test_errors_of_differences_are_honest():
    """Twelve starts, all alike: differences in units of their standard errors are standard normal."""
    found = starts([0.3] * 12).diagnose(1000, KEY).agreement
    score = (found["estimate"] - found["pooled"]) / np.hypot(found["std_error"], found["pooled_std_error"])
    # 36 scores, those of a start and of the pool correlated: the standard deviation is far from 1 if an error is not.
    assert 0.6 < float(score.std()) < 1.5 and np.abs(score).max() < 4
    # The standard error of m is that of 1,000 draws of its guide, to 10%; its unit is its standard deviation.
    np.testing.assert_allclose(found["unit"], [1, 0.5, 10**0.5 * 0.98], rtol=0.05)
    ess = found["ess"].values
    np.testing.assert_allclose(found["std_error"].sel(quantity="m"), 0.5 / ess**0.5, rtol=0.2)


def test_one_start_alone_is_never_good():
    found = diagnosed(starts([0.0]), 1000)
    assert found.verdict == "usable" and "Only a second start can show what a first one missed" in said(found)


def test_starts_that_failed_are_left_out():
    # Its parameters are NaN, which would be an error anywhere.
    failed = starts([0.1, np.nan, 0.2], failed=[False, True, False], log_evidence=[-3.0, np.nan, -2.0])
    assert failed.starts.best == 2 and failed.params["logits"] == np.float32(0.2)
    assert list(failed.diagnose(400, KEY).agreement["start"].values) == [0, 2]
    tree = failed.to_arviz(rng_key=KEY, num_samples=50, pool=False)
    assert tree["posterior"]["z"].shape == (2, 50) and list(tree["posterior"].attrs["starts"]) == [0, 2]
    assert failed.to_arviz(rng_key=KEY, num_samples=50)["posterior"]["z"].shape == (1, 50)


def with_parameter():
    z = numpyro.sample("z", dist.Normal(numpyro.param("prior", 0.0), 1.0))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=1.0)


def with_parameter_guide():
    numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.5), 0.8))


def test_each_start_has_a_posterior_at_its_own_parameters_of_the_model():
    """Draws are those of the best start; evidences of starts are compared, and nothing else."""
    svi = SVI(with_parameter, with_parameter_guide, optax.adam(0.1), VIMCOStar())
    params = {"prior": jnp.array([5.0, 0.0]), "loc": jnp.array([2.9, 0.6])}
    posterior = diagnosed(posterior_at(svi, params, log_evidence=[-9.0, -1.0]), 4000)
    exact = norm([5, 0], 2**0.5).logpdf(1)
    assert abs(posterior.log_evidence - exact[1]) < 0.02
    agreement = posterior.starts.agreement
    assert list(agreement["quantity"].values) == ["log evidence"]
    np.testing.assert_allclose(agreement["log_evidence"], exact, atol=0.05)
    assert list(agreement["differs"].values[:, 0]) == [True, False]
    assert "The pooled draws" not in said(posterior)
    for pool, mean in ((True, [0.5]), (False, [3.0, 0.5])):
        draws = posterior.to_arviz(rng_key=KEY, num_samples=2000, pool=pool)["posterior"]["z"]
        assert np.abs(draws.mean("draw") - mean).max() < 6 * 0.71 / 1000**0.5


@pytest.mark.filterwarnings("ignore:The guide has no parameters")
def test_starts_of_a_guide_without_parameters_count():
    """What differs between starts is then in the model only."""
    svi = SVI(with_parameter, lambda: numpyro.sample("z", dist.Normal(0.5, 0.8)), optax.adam(0.1), VIMCOStar())
    posterior = posterior_at(svi, {"prior": jnp.array([0.0, 0.1, 5.0])})
    assert list(posterior.diagnose(1000, KEY).agreement["start"]) == [0, 1, 2]
    for pool, num_chains in ((True, 1), (False, 3)):
        tree = posterior.to_arviz(rng_key=KEY, num_samples=50, pool=pool)
        assert tree["posterior"].sizes["chain"] == num_chains


DATA = np.array([0.0, 1.2, 2.0])


def elements():
    with numpyro.plate("data", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=DATA)


def elements_guide():
    with numpyro.plate("data", 3):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(3))))


def test_elements_of_common_plates_are_compared_and_pooled_by_themselves():
    svi = SVI(elements, elements_guide, optax.adam(0.1), VIMCOStar())
    exact = 1 / (1 + np.exp(2 - 2 * DATA))
    logits = np.log(exact / (1 - exact))
    found = posterior_at(svi, {"logits": jnp.array([logits, logits - np.array([0, 12, 0]), logits])})
    agreement = found.diagnose(4000, KEY).agreement
    assert found.ess.shape == (3,) and "'log evidence[1]' by -0.9" in said(found) and "'z[1]'" in said(found)
    differs = agreement["differs"]
    assert list(differs["quantity"][differs.any("start")].values) == ["log evidence[1]", "z[1]"]
    assert list(differs["start"][differs.any("quantity")].values) == [1]
    log_evidence = np.logaddexp(norm(0).logpdf(DATA), norm(2).logpdf(DATA)) - np.log(2)
    np.testing.assert_allclose(agreement["log_evidence"][[0, 2]], log_evidence.sum(), atol=0.1)
    assert abs(found.log_evidence - log_evidence.sum()) < 6 * found.log_evidence_std_error
    tree = found.to_arviz(rng_key=KEY, num_samples=4000, num_proposals=8000)
    # 8,000 proposals: 6 standard errors, with the noise of resampling, are below 0.05.
    assert np.abs(tree["posterior"]["z"].mean(("chain", "draw")) - exact).max() < 0.05
    np.testing.assert_allclose(tree["log_likelihood"]["data_element"].values[0, 0], log_evidence, atol=0.05)
    apart = found.to_arviz(rng_key=KEY, num_samples=500, pool=False)
    np.testing.assert_allclose(apart["log_likelihood"]["data_element"].values[[0, 2], 0], [log_evidence] * 2, atol=0.1)
    assert apart["log_likelihood"]["data_element"].values[1, 0, 1] < log_evidence[1] - 0.5


def local():
    g = numpyro.sample("g", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(g + 2.0 * z, 1.0), obs=DATA)
    numpyro.deterministic("total", z.sum())


def local_guide():
    g = numpyro.sample("g", dist.Normal(numpyro.param("loc", 0.0), 0.7))
    with numpyro.plate("row", 3):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("slope", 1.0) * (DATA - g - 1)))


def test_local_particles():
    svi = SVI(local, local_guide, optax.adam(0.1), VIMCOStar(num_particles=8, plate_particles={"row": 8}))
    found = posterior_at(svi, {"loc": jnp.array([0.1, 0.3]), "slope": jnp.array([1.0, 0.5])})
    grid = np.linspace(-6, 6, 2001)
    pair = 0.5 * np.stack([norm(grid + 2 * z).pdf(DATA[:, None]) for z in (0, 1)])
    joint = norm.pdf(grid) * pair.sum(0).prod(0)
    evidence = joint.sum() * (grid[1] - grid[0])
    mean_g, mean_z = grid @ joint / joint.sum(), (pair[1] / pair.sum(0)) @ joint / joint.sum()
    found.diagnose(4000, KEY)
    assert found.verdict == "good" and abs(found.log_evidence - np.log(evidence)) < 0.05
    for pool in (True, False):
        tree = found.to_arviz(rng_key=KEY, num_samples=2000, num_proposals=8000, pool=pool)
        posterior = tree["posterior"]
        # 2,000 draws for each chain: 6 standard errors, with those of 8,000 proposals.
        assert np.abs(posterior["g"].mean("draw") - mean_g).max() < 0.12
        assert np.abs(posterior["z"].mean("draw") - mean_z).max() < 0.08
        np.testing.assert_array_equal(posterior["total"], posterior["z"].sum("row"))
        assert tree["log_likelihood"]["row_element"].shape == (1 if pool else 2, 2000, 3)


# For ArviZ.


def test_starts_are_chains(lost, agreeing):
    tree = lost.to_arviz(rng_key=KEY, num_samples=500, pool=False)
    posterior = tree["posterior"]
    assert posterior["m"].shape == tree["sample_stats"]["log_weight"].shape == (3, 500)
    np.testing.assert_allclose(posterior["m"].mean("draw"), [0, 1, 0.5], atol=0.1)
    assert az.rhat(tree, var_names=["z"])["z"] > 1.3  # as of chains in different modes
    together = agreeing.to_arviz(rng_key=KEY, num_samples=500, pool=False)
    assert az.rhat(together, var_names=["z"])["z"] < 1.05
    np.testing.assert_allclose(posterior.attrs["log_evidence"], LOG_EVIDENCE + np.array([-0.69, -0.69, 0]), atol=0.1)
    assert len(posterior.attrs["ess"]) == len(posterior.attrs["pareto_k"]) == 3
    assert tree["log_likelihood"]["x"].shape == tree["posterior_predictive"]["x"].shape == (3, 500)


def test_pooled_draws_have_the_density_of_the_mixture(lost, tmp_path):
    tree = lost.to_arviz(rng_key=KEY, num_samples=500, resample=False, groups=("prior",))
    assert tree["posterior"]["m"].shape == (1, 500) and tree["prior"]["m"].shape == (1, 500)
    m, z = (tree["posterior"][name].values[0] for name in "mz")
    logits = np.array([-14, 14, 0])[:, None]
    q_m, q_z = 1 / (1 + np.exp(-np.where(m == 1, logits, -logits))), norm(6 * m - 3, 0.8).pdf(z)
    p_m, p_z = 0.5, norm(6 * m - 3).pdf(z)
    q = 0.9 * q_m * q_z + 0.1 * (p_m * q_z + q_m * p_z + p_m * p_z) / 3  # defended in m, in z, and in both
    stats = {name: value.values[0] for name, value in tree["sample_stats"].items()}
    np.testing.assert_allclose(stats["log_q"], np.log(q.mean(0)), atol=1e-4)
    p = 0.5 * norm(6 * m - 3).pdf(z) * norm(np.abs(z)).pdf(3.0)
    np.testing.assert_allclose(stats["log_p"], np.log(p), atol=1e-4)
    np.testing.assert_allclose(stats["log_weight"], stats["log_p"] - stats["log_q"], atol=1e-4)
    tree.to_netcdf(str(tmp_path / "pooled.nc"))
    assert list(az.from_netcdf(str(tmp_path / "pooled.nc"))["posterior"].attrs["starts"]) == [0, 1, 2]


def test_number_of_steps_is_that_of_a_start():
    posterior = starts([0.0, 0.1], losses=np.zeros((2, 70)))
    assert posterior.to_arviz(rng_key=KEY, num_samples=50)["posterior"].attrs["num_steps"] == 70


def test_point_estimates_can_be_looked_at_apart():
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=1.0)

    svi = SVI(model, AutoDelta(model), optax.adam(0.1), TraceGraph_ELBO())
    posterior = fit(svi, random.key(0), 2, num_starts=2, progress_bar=False)
    with pytest.raises(NotImplementedError, match=r"cannot be pooled. .*pool=False"):
        posterior.to_arviz()
    draws = posterior.to_arviz(num_samples=5, pool=False)["posterior"]
    assert draws["z"].shape == (2, 5) and np.isnan(draws.attrs["log_evidence"]).all()


@pytest.mark.parametrize("fixed", [dist.Delta(0.3), None], ids=["a constant", "AutoDelta"])
def test_a_latent_that_is_fixed_has_no_evidence(fixed):
    """A Delta would count as a density of 1, and all weights be equal: +0.679 nats for -1.255."""

    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 0.1))
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(mu + z, 1.0), obs=0.4)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(numpyro.handlers.block(model, hide=["mu"])))
    guide.append(
        AutoDelta(numpyro.handlers.block(model, hide=["z"]))
        if fixed is None
        else lambda: {"mu": numpyro.sample("mu", fixed)}
    )
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar())
    posterior = fit(svi, random.key(0), 20, num_starts=2, progress_bar=False)
    assert np.isfinite(posterior.losses).all() and np.isnan(posterior.starts.log_evidence).all()
    for each in (posterior, Posterior(svi, posterior.params)):
        with pytest.raises(ValueError, match="latent 'mu' is a Delta in the guide: it is fixed at one value"):
            each.diagnose()
    assert str(posterior).startswith("verdict       none\n- ") and "'mu' is a Delta" in str(posterior)


def test_gradients_are_those_of_the_best_start():
    posterior = starts([0.4, -3.0], log_evidence=[-2.0, -1.0])

    def gradient(posterior):
        return posterior.gradient_snr(random.key(0), 10)["logits"].mean

    other, best = (
        Posterior(SVI_TWO_MODES, jax.tree.map(lambda leaf, i=i: leaf[i], posterior.starts.params)) for i in (0, 1)
    )
    np.testing.assert_array_equal(gradient(posterior), gradient(best))
    assert np.any(gradient(posterior) != gradient(other))


def test_whole_way_from_a_fit():
    posterior = diagnosed(fit(SVI_TWO_MODES, random.key(0), 50, num_starts=3, progress_bar=False), 4000)
    assert abs(posterior.log_evidence - LOG_EVIDENCE) < 0.05 and posterior.verdict == "good", str(posterior)
    evidence = posterior.starts.agreement["log_evidence"]
    np.testing.assert_allclose(evidence, posterior.starts.log_evidence, atol=0.1)


# Bounds that were reached earlier.


def svi_with(objective):
    return SVI(two_modes, two_modes_guide, optax.adam(0.01), objective)


def with_past(bound, steps=200, tempered=0, **options):
    """A posterior whose start 1 had a bound at some time, in nats above the log evidence; noise of 0.3 nats."""
    losses = 0.5 - LOG_EVIDENCE + 0.3 * np.random.default_rng(0).normal(size=(2, 2000))
    losses[1, 300 : 300 + steps] -= 0.5 + bound
    inverse_temperature = np.ones_like(losses)
    inverse_temperature[:, :tempered] = 0.9
    return starts([0.0, 0.1], losses=losses, inverse_temperature=inverse_temperature, **options)


def test_bound_above_the_evidence_proves_a_loss():
    found = diagnosed(with_past(0.4), 2000)
    assert found.verdict == "bad" and "lost-part" in codes(found)
    assert re.search(r"A part of the posterior is lost: in steps 30\d to \d\d\d of start 1 the bound", said(found))
    agreement = found.starts.agreement
    bound, error = agreement["earlier_bound"].values, agreement["earlier_bound_std_error"].values
    assert np.isnan(bound[0]) and abs(bound[1] - LOG_EVIDENCE - 0.4) < 6 * error[1]
    assert abs(error[1] / (0.3 / 200**0.5) - 1) < 0.3
    assert "smaller learning rate" in said(found) and "tempering" in said(found)


def test_findings_leave_out_what_is_there_already():
    found = diagnosed(with_past(0.4, svi=svi_with(VIMCOStar(0.5)), tempered=100), 100)
    assert "What helps, in this order: a structured guide" in said(found)
    assert "0 < α" not in said(found) and "tempering" not in said(found)


@pytest.mark.parametrize(
    "bound, options, objective",
    [
        (-0.01, {}, VIMCOStar()),  # below
        (0.4, {"steps": 20}, VIMCOStar()),  # too short to tell from luck
        (0.4, {"tempered": 600}, VIMCOStar()),  # of another target
        (0.4, {"log_evidence": [np.nan, np.nan]}, VIMCOStar()),  # of a subsample
        (0.4, {}, RenyiELBO(alpha=-1.0)),  # an upper bound
        (0.4, {"failed": [False, True]}, VIMCOStar()),
    ],
)
def test_what_proves_nothing(bound, options, objective):
    posterior = with_past(bound, svi=svi_with(objective), **options)
    assert earlier_bounds(posterior._approx, posterior.starts, LOG_EVIDENCE, 0.001) == {}


@pytest.mark.parametrize("objective", [ReweightedWakeSleep(), RenyiELBO(alpha=0.0), TraceGraph_ELBO(), VIMCOStar(1.0)])
def test_all_lower_bounds_prove(objective):
    posterior = with_past(0.4, svi=svi_with(objective))
    found = earlier_bounds(posterior._approx, posterior.starts, LOG_EVIDENCE, 0.001)
    assert list(found) == [1] and abs(found[1].begin - 300) < 10 and abs(found[1].end - 500) < 10
    # The error of the evidence counts five times: 5 x 0.07 leaves too little.
    assert not earlier_bounds(posterior._approx, posterior.starts, LOG_EVIDENCE, 0.07)


def test_evidence_that_moved_with_parameters_proves_nothing():
    svi = SVI(with_parameter, with_parameter_guide, optax.adam(0.1), VIMCOStar())
    losses = np.full((1, 500), -9.0)
    posterior = posterior_at(svi, {"prior": jnp.zeros(1), "loc": jnp.zeros(1)}, losses=losses)
    assert earlier_bounds(posterior._approx, posterior.starts, -1.5, 0.001) == {}


def test_bounds_of_a_subsample_prove_nothing_of_all_data():
    """They are far above the log evidence here, as scaled likelihoods of a subsample may be."""
    x = jnp.zeros(20)

    def model(size):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 20, subsample_size=size) as chosen:
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x[chosen])

    def guide(size):
        with numpyro.plate("data", 20, subsample_size=size):
            pass
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 21**-0.5))

    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(1.0))
    unknown, losses = np.full(2, np.nan), np.zeros((2, 500))
    posterior = posterior_at(svi, {"loc": jnp.zeros(2)}, 5, losses=losses, log_evidence=unknown)
    whole = diagnosed(Posterior(svi, posterior, 20), 1000)
    assert np.isnan(whole.starts.agreement["earlier_bound"]).all() and whole.verdict == "good"


@pytest.mark.parametrize("draw", ["wide", "narrow", "rare"])
def test_luck_alone_proves_nothing(draw):
    """Estimates whose mean is the evidence exactly: 400 fits of 4 x 1,000 steps, with a false alarm in a million."""
    rng, posterior = np.random.default_rng(0), with_past(0.0)
    for _ in range(400):
        if draw == "rare":  # one weight in a thousand holds half of the evidence
            log_weight = np.log(np.where(rng.random((2, 2000)) < 1e-3, 500.5, 0.5))
        else:
            scale = {"wide": 3.0, "narrow": 0.1}[draw]
            log_weight = scale * rng.normal(size=(2, 2000)) - scale**2 / 2
        lucky = replace(posterior.starts, losses=-LOG_EVIDENCE - log_weight)
        assert earlier_bounds(posterior._approx, lucky, LOG_EVIDENCE, 0.0) == {}


def test_largest_sum_of_a_stretch():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=30) - 0.2
        values[rng.integers(30)] = -np.inf
        sums = {(i, j): values[i:j].sum() for i in range(30) for j in range(i + 1, 31)}
        best = max(sums, key=sums.get)
        total, *found = _largest_sum(values)
        assert tuple(found) == best and abs(total - sums[best]) < 1e-12
    assert _largest_sum(-np.ones(5)) == (0.0, 0, 0)


# Verdicts.


def facts_of(k, ess, num_draws, *, agreement=None, proof=False, doubtful=False):
    """Facts that a verdict is made from.

    :param doubtful: whether the log evidence has a large standard error.
    """
    summary = SimpleNamespace(pareto_k=np.array([k]), ess=np.array([ess]))
    weighed = SimpleNamespace(summary=summary, lost=0.0, undefended=())
    past = {0: Stretch(0, 9, 0.0, 0.0)} if proof else {}
    return Facts(None, weighed, num_draws, 0.2 if doubtful else 0.01, agreement, past, False, False)


def agreement_of(num_off, num_stuck=0):
    """Four starts, of which so many are off, and of these so many are stuck, in e^-9 of the evidence."""
    of_starts = {
        "log_evidence": np.where(np.arange(4) < num_stuck, -9.0, 0.0),
        "log_evidence_std_error": np.full(4, 0.01),
        "ess": np.full(4, 1000.0),
    }
    variables = {name: ("start", value) for name, value in of_starts.items()}
    variables |= {"pooled": ("quantity", [0.0]), "pooled_std_error": ("quantity", [0.01])}
    variables["differs"] = ("start", "quantity"), (np.arange(4) < num_off)[:, None]
    return xr.Dataset(variables, coords={"start": np.arange(4), "quantity": ["log evidence"]})


@pytest.mark.parametrize(
    "k, ess, agreeing, proof, expected",
    [
        (0.3, 0.2, 1, False, "good"),
        (0.3, 0.2, 0.75, False, "good"),
        (0.3, 0.2, 0.5, False, "usable"),
        (0.3, 0.2, 0, False, "usable"),  # one start, or starts that differ
        (0.3, 0.2, 1, True, "bad"),
        (0.3, 0.05, 1, False, "usable"),
        (0.3, 0.005, 1, False, "bad"),
        # A quarter of the draws counts for more than a tail that is extrapolated, if all starts agree.
        (0.9, 0.5, 0.75, False, "usable"),
        (0.9, 0.5, 0, False, "usable"),
        (0.9, 0.25, 1, False, "good"),
        (0.9, 0.24, 1, False, "bad"),
        (0.49, 0.1, 1, False, "good"),
        (0.51, 0.24, 1, False, "usable"),
        (0.69, 0.25, 1, False, "good"),
        (0.69, 0.25, 0, False, "usable"),
    ],
)
def test_verdict(k, ess, agreeing, proof, expected):
    num_stuck = round(4 * (1 - agreeing)) if agreeing else 0
    about = {"agreement": agreement_of(num_stuck if agreeing else 1, num_stuck), "proof": proof}
    assert share_that_agrees(about["agreement"]) == agreeing
    assert _verdict(facts_of(k, ess * 10_000, 10_000, **about)) == expected
    doubtful = facts_of(k, ess * 10_000, 10_000, **about, doubtful=True)
    assert _verdict(doubtful) == expected.replace("good", "usable")


def test_verdict_where_each_start_is_off():
    """Then the pool is right only by luck, unless it has enough draws of the posterior."""
    assert _verdict(facts_of(0.1, 200, 10_000, agreement=agreement_of(4))) == "bad"
    assert _verdict(facts_of(0.1, 400, 10_000, agreement=agreement_of(4))) == "usable"


def test_verdict_of_few_draws():
    """An ESS of 87 of 100 draws is no sign of a bad guide."""
    assert _verdict(facts_of(-0.01, 87, 100, agreement=agreement_of(0))) == "usable"
    assert _verdict(facts_of(-0.01, 20, 100, agreement=agreement_of(0))) == "bad"


@pytest.mark.parametrize(
    "k, num_draws, expected", [(0.69, 10_000, "usable"), (0.69, 1000, "bad"), (0.71, 10**6, "bad")]
)
def test_bound_of_bad_is_that_of_the_number_of_draws(k, num_draws, expected):
    """1 - 1 / log10(draws), at most 0.7: 0.667 for 1,000 draws."""
    assert _verdict(facts_of(k, 0.2 * num_draws, num_draws)) == expected


def test_two_fits_that_agree_make_a_heavy_tail_good():
    """Of a guide with heavy tails."""

    def model():
        numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=0.0)

    def guide():
        numpyro.sample("z", dist.StudentT(2.2, jnp.zeros(2), numpyro.param("scale", 1.0)).to_event(1))

    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar())
    assert diagnosed(posterior_at(svi, {"scale": jnp.ones(2)}), 2000).verdict == "good"


# Moments.


def test_moments_are_those_of_all_draws():
    rng = np.random.default_rng(0)
    log_weight = rng.normal(size=(600, 1, 4)) * [1, 2, 0.1, 1] + [0, 900, -900, 0]
    log_weight[:100, 0, 3] = -np.inf
    values = {"by_element": rng.normal(3.0, 2.0, size=(600, 5, 4, 2)), "flag": rng.random((600, 4)) < 0.3}
    moments = Moments({"by_element": 1, "flag": 0})
    for block in (slice(0, 50), slice(50, 51), slice(51, 600)):
        moments.add(log_weight[block], {name: value[block] for name, value in values.items()})
    weight = np.exp(log_weight - log_weight.max(0))
    share = weight / weight.sum(0)
    evidence, error = moments.log_evidence()
    np.testing.assert_allclose(evidence, (np.log(weight.mean(0)) + log_weight.max(0)).ravel())
    np.testing.assert_allclose(error, (weight.std(0, ddof=1) / 600**0.5 / weight.mean(0)).ravel())
    np.testing.assert_allclose(moments.ess(), 1 / (share**2).sum(0).ravel())
    for name, aligned in (("by_element", share[:, :, :, None]), ("flag", share[:, 0])):
        found, value = moments.estimates()[name], values[name]
        mean = (aligned * value).sum(0)
        np.testing.assert_allclose(found.mean, mean)
        np.testing.assert_allclose(found.std, (aligned * (value - mean) ** 2).sum(0) ** 0.5)
        np.testing.assert_allclose(found.std_error, (aligned**2 * (value - mean) ** 2).sum(0) ** 0.5)


def test_moments_of_joint_weights_and_values_out_of_range():
    moments = Moments({"z": 0})
    moments.add(np.array([0.0, -np.inf]), {"z": np.array([2.0, np.inf])})
    moments.add(np.array([np.log(3.0)]), {"z": np.array([6.0])})
    assert moments.estimates()["z"].mean == 5.0
    nothing = Moments({"z": 0})
    nothing.add(np.full(3, -np.inf), {"z": np.ones(3)})
    assert nothing.log_evidence()[0] == -np.inf


# Pictures.


def test_plots_of_starts(lost):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2)
    assert plots.plot_agreement(lost, num_latents=1, ax=axes[0]) is axes[0]
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels[0] == "log evidence" and len(labels) == 2
    assert len(axes[0].containers) == 3  # a start each
    difference = lost.starts.agreement["difference"].sel(start=1)[0]
    np.testing.assert_allclose(axes[0].containers[1].lines[0].get_xdata()[0], difference)
    plots.plot_bound(with_past(0.4, tempered=100), ax=axes[1])
    assert [line.get_label() for line in axes[1].lines] == [f"start {i}, mean of 40 steps" for i in (0, 1)]
    smooth = axes[1].lines[1].get_ydata()
    assert np.isnan(smooth[:100]).all() and abs(smooth[380] - LOG_EVIDENCE - 0.4) < 0.3
    plt.close(figure)
    with pytest.raises(ValueError, match="the posterior of a single fit"):
        plots.plot_agreement(diagnosed(Posterior(SVI_TWO_MODES, lost.params), 100))


def test_keys_of_pooled_draws_and_of_starts_differ(lost):
    """The pool's draws are others than a start's: their estimates would be correlated otherwise."""
    tree = lost.to_arviz(rng_key=KEY, num_samples=900, resample=False, groups=())
    apart = lost.to_arviz(rng_key=KEY, num_samples=900, resample=False, groups=(), pool=False)
    values = np.concatenate([tree["posterior"]["z"].values.ravel(), apart["posterior"]["z"].values.ravel()])
    assert len(np.unique(values)) > 0.999 * len(values)
    # And those for ArviZ are others than those of the diagnostics.
    log_weight = tree["sample_stats"]["log_weight"].values.ravel()
    assert np.isin(log_weight, lost.diagnose(4000, KEY).log_weight).mean() < 0.05
    jax.clear_caches()
