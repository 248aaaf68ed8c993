"""Posteriors in ArviZ: the right draws, with names, groups and attributes, on both generations."""

from functools import partial
from importlib import metadata
import subprocess
import sys

import arviz as az
import jax
from jax import random
from jax.nn import log_softmax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.svi import SVIRunResult
import optax
import pytest
from sklearn.datasets import load_diabetes

from helpers import arviz_psislw, load_example, of_two_lengths, pointwise_loo
from numpyro_vimco import AutoDiscrete, AutoMixed, Posterior, VIMCOStar, __version__
from numpyro_vimco.draws import proposals
from numpyro_vimco.draws.weights import pareto_smooth, resample
from numpyro_vimco.export import log_likelihoods

matplotlib.use("agg")
X = jnp.array([0.3, 2.1, 1.7, -0.2])


def hierarchical(x):
    """A plate, an integer latent, a vector, and a deterministic site."""
    count = numpyro.sample("count", dist.Poisson(2.0))
    axis = numpyro.sample("axis", dist.Normal(jnp.zeros(3), 1.0).to_event(1), infer={"event_dims": ["direction"]})
    with numpyro.plate("row", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        mean = numpyro.deterministic("mean", 2.0 * z + 0.1 * count + axis.sum())
        numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)


@pytest.fixture(
    scope="module",
    params=[{}, pytest.param({"row": 4}, marks=pytest.mark.long)],
    ids=["joint weights", "local particles"],
)
def fitted(request):
    svi = SVI(
        hierarchical,
        AutoMixed(hierarchical, structure="mean_field"),
        optax.adam(0.05),
        VIMCOStar(plate_particles=request.param),
    )
    return Posterior(svi, svi.run(random.key(0), 400, X, progress_bar=False), X)


@pytest.fixture(scope="module")
def tree(fitted):
    groups = ("posterior_predictive", "log_likelihood", "log_likelihood_given_latents", "prior")
    return fitted.to_arviz(
        rng_key=random.key(1), num_samples=4000, num_proposals=40_000, groups=groups,
        coords={"direction": ["a", "b", "c"]}, constant_data={"size": 4},
    )  # fmt: skip


def exact_means():
    """Posterior means by enumeration of the discrete latents; the rest is Gaussian."""
    z = np.array(list(np.ndindex(2, 2, 2, 2)))
    count = np.arange(15)
    residual = np.asarray(X) - 2.0 * z[:, None] - 0.1 * count[None, :, None]
    # x | z, count: Normal(·, I + 3 · ones), as three axes of variance 1 are added to every row.
    precision, log_det = np.eye(4) - 3 / 13 * np.ones((4, 4)), np.log(13.0)
    log_joint = (
        -0.5 * np.einsum("zki,ij,zkj->zk", residual, precision, residual) - 0.5 * log_det - 2 * np.log(2 * np.pi)
    )
    log_joint += (z * np.log(0.4) + (1 - z) * np.log(0.6)).sum(1)[:, None]
    log_joint += np.asarray(dist.Poisson(2.0).log_prob(count))
    log_evidence = np.logaddexp.reduce(log_joint, axis=None)
    weight = np.exp(log_joint - log_evidence)
    axis = np.einsum("zk,zki,ij->", weight, residual, precision)
    return log_evidence, {"z": weight.sum(1) @ z, "count": weight.sum(0) @ count, "axis": np.full(3, axis)}


def test_posterior_means_are_exact(tree):
    log_evidence, means = exact_means()
    posterior = tree["posterior"]
    # About 500 effective draws of a unit variance: 6 standard errors are 0.27; the guide's own means are off by more,
    # and the unweighted draws fail this.
    for name, mean in means.items():
        sd = posterior[name].std(("chain", "draw")).values
        error = np.abs(posterior[name].mean(("chain", "draw")).values - mean)
        assert np.all(error < 6 * sd / min(posterior.attrs["ess"], 4000) ** 0.5)
    assert posterior.attrs["ess"] > 300
    assert abs(posterior.attrs["log_evidence"] - log_evidence) < 0.2


def test_groups_dimensions_and_attributes(tree):
    posterior = tree["posterior"]
    assert posterior["z"].dims == posterior["mean"].dims == ("chain", "draw", "row")
    assert posterior["axis"].dims == ("chain", "draw", "direction")
    assert list(posterior["direction"].values) == ["a", "b", "c"]
    assert posterior["count"].dims == tree["sample_stats"]["log_weight"].dims == ("chain", "draw")
    for group in ("posterior_predictive", "log_likelihood_given_latents", "prior_predictive"):
        assert tree[group]["x"].dims == ("chain", "draw", "row")
    assert list(tree["log_likelihood"].data_vars) == ["row_element"]
    assert tree["log_likelihood"]["row_element"].dims == ("chain", "draw", "row")
    np.testing.assert_array_equal(tree["observed_data"]["x"], X)
    assert tree["constant_data"]["size"] == 4
    assert set(tree["prior"].data_vars) == set(posterior.data_vars) == {"count", "axis", "z", "mean"}
    attributes = posterior.attrs
    assert attributes["inference_library"] == "numpyro_vimco" and attributes["objective"] == "VIMCOStar"
    assert attributes["num_particles"] == 16 and attributes["num_steps"] == 400 and attributes["alpha"] == 0


def test_deterministic_sites_and_likelihoods_are_those_of_the_draws(tree):
    posterior = tree["posterior"]
    mean = 2.0 * posterior["z"] + 0.1 * posterior["count"] + posterior["axis"].sum("direction")
    np.testing.assert_allclose(posterior["mean"].transpose(*mean.dims), mean, atol=1e-5)
    expected = dist.Normal(posterior["mean"].values, 1.0).log_prob(X)
    np.testing.assert_allclose(tree["log_likelihood_given_latents"]["x"], expected, atol=1e-5)
    # 4,000 draws of variance at least 1 about each mean.
    new = (tree["posterior_predictive"]["x"] - posterior["mean"]).values
    assert abs(new.std() - 1) < 0.05 and np.all(np.abs(new.mean((0, 1))) < 0.1)


def test_prior_is_the_prior(tree):
    prior = tree["prior"]
    # 4,000 draws: 6 standard errors.
    assert abs(prior["count"].mean() - 2) < 6 * (2 / 4000) ** 0.5
    assert abs(prior["z"].mean() - 0.4) < 6 * (0.24 / 16_000) ** 0.5


def test_raw_draws_keep_their_weights(fitted):
    tree = fitted.to_arviz(rng_key=random.key(1), num_samples=20_000, resample=False, groups=())
    log_weight = tree["sample_stats"]["log_weight"].values[0]
    log_evidence, means = exact_means()
    weights = np.exp(log_softmax(log_weight))
    assert abs(np.logaddexp.reduce(log_weight) - np.log(20_000) - log_evidence) < 0.3
    np.testing.assert_allclose(weights @ tree["posterior"]["z"].values[0], means["z"], atol=0.25)
    if not fitted._approx.plate_particles:
        difference = tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]
        np.testing.assert_allclose(difference.values[0], log_weight, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # ArviZ's and matplotlib's own
def test_arviz_can_use_it(tree, tmp_path):
    tree.to_netcdf(str(tmp_path / "fit.nc"))
    again = az.from_netcdf(str(tmp_path / "fit.nc"))
    np.testing.assert_array_equal(again["posterior"]["z"], tree["posterior"]["z"])
    assert again["posterior"].attrs["objective"] == "VIMCOStar"
    assert az.summary(again, kind="stats").loc["count", "mean"] > 0
    loo = az.loo(again)
    assert az.compare({"a": loo, "b": loo}).shape[0] == 2
    az.plot_forest(again, var_names=["z", "axis"])
    plot_ppc = az.plot_ppc if hasattr(az, "plot_ppc") else az.plot_ppc_dist
    plot_ppc(again)
    matplotlib.pyplot.close("all")


@pytest.mark.long
def test_elements_of_common_plates_are_resampled_by_themselves():
    def model(x):
        with numpyro.plate("data", 4):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    svi = SVI(model, AutoDiscrete(model, structure="mean_field"), optax.adam(0.05), VIMCOStar())
    posterior = Posterior(svi, svi.run(random.key(0), 2, X, progress_bar=False), X)  # a bad guide
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=4000, num_proposals=40_000)
    log_joint = jnp.log(jnp.array([0.2, 0.3, 0.5])) + dist.Normal(jnp.arange(3), 0.5).log_prob(X[:, None])
    exact = jax.nn.softmax(log_joint)
    frequency = (tree["posterior"]["z"].values[0, :, :, None] == np.arange(3)).mean(0)
    # The ESS of 40,000 proposals is above 2,000: 5.5 standard errors of a frequency are below 0.062.
    np.testing.assert_allclose(frequency, exact, atol=0.062)
    assert tree["sample_stats"]["log_weight"].dims == ("chain", "draw", "data")
    assert abs(tree["posterior"].attrs["log_evidence"] - jax.nn.logsumexp(log_joint, axis=1).sum()) < 0.15


@pytest.mark.long
def test_inclusion_probabilities_of_variable_selection():
    """The guide by hand of docs/writing_a_guide.md, with the data and the exact posterior of the example."""
    example = load_example("variable_selection")
    diabetes = load_diabetes(scaled=False)
    data = [jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32) for x in (diabetes.data, diabetes.target)]

    def guide(predictors, response):
        logits, loc = numpyro.param("logits", jnp.full(10, 0.1)), numpyro.param("loc", jnp.zeros(10))
        coupling = 0.1 * numpyro.param("coupling", jnp.zeros((10, 10)))
        width = numpyro.param("width", jnp.full(10, 0.1), constraint=dist.constraints.positive)
        with numpyro.plate("predictor", 10):
            included = numpyro.sample("included", dist.Bernoulli(logits=logits))
            loc, width = jnp.where(included, loc + coupling @ included, 0), jnp.where(included, width, 0.1**0.5)
            numpyro.sample("coefficient", dist.Normal(loc, width))

    svi = SVI(example.model, guide, optax.adam(0.01), VIMCOStar(num_particles=128))
    posterior = Posterior(svi, svi.run(random.key(0), 4000, *data, progress_bar=False), *data)
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=20_000, num_proposals=400_000, groups=())
    log_evidence, inclusion = example.exact_posterior(*data)
    # An ESS of about 10,000: 5.5 standard errors of a probability are below 0.028.
    np.testing.assert_allclose(tree["posterior"]["included"].mean(("chain", "draw")), inclusion, atol=0.03)
    attributes = tree["posterior"].attrs
    assert abs(attributes["log_evidence"] - log_evidence) < 0.1
    assert attributes["ess"] > 3000 and attributes["pareto_k"] < 0.7


def heavy(x, prior=dist.StudentT(300.0, 0.0, 1.0)):  # noqa: B008
    """A model with a latent whose sampler splits its key, or does not."""
    b = numpyro.sample("b", prior)
    for name in ("x", "y", "z"):
        numpyro.sample(name, dist.Normal(b, 1.0), obs=x)


def heavy_guide(x, prior=None):
    numpyro.sample("b", dist.Normal(numpyro.param("loc", 0.0), 1.0))


@pytest.mark.parametrize("prior", [dist.StudentT(300.0, 0.0, 1.0), dist.Normal(0.0, 1.0)], ids=["split", "plain"])
def test_noise_of_latents_and_of_data_is_independent(prior):
    svi = SVI(heavy, heavy_guide, optax.adam(0.05), VIMCOStar())
    posterior = Posterior(svi, {"loc": 0.0}, 0.3, prior)
    tree = posterior.to_arviz(
        rng_key=random.key(1), num_samples=4000, groups=("posterior_predictive", "prior"), progress_bar=False
    )
    for latents, data in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        b = tree[latents]["b"].values[0]
        noise = [tree[data][name].values[0] - b for name in ("x", "y", "z")]
        # 4,000 draws: 6 standard errors of a correlation are 0.095. With shared keys it was 0.999.
        assert np.abs(np.triu(np.corrcoef([b, *noise]), 1)).max() < 0.095


@pytest.mark.long
@pytest.mark.parametrize("partitionable", [False, True])
def test_no_two_sample_statements_have_one_key(partitionable, monkeypatch):
    """All keys that one call hands to distributions, to the choice of particles and to resampling are distinct."""
    keys = []

    def spy(owner, name):
        plain = getattr(owner, name)

        def spied(*args, **kwargs):
            key = next(
                x for x in (*args, *kwargs.values()) if isinstance(x, jax.Array) and x.dtype.name.startswith("key")
            )
            jax.debug.callback(lambda data: keys.append(np.array(data).ravel()), random.key_data(key))
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)

    for name in ("normal", "bernoulli", "poisson", "categorical", "uniform", "bits"):
        spy(random, name)
    svi = SVI(
        hierarchical,
        AutoMixed(hierarchical, structure="mean_field"),
        optax.adam(0.05),
        VIMCOStar(plate_particles={"row": 3}),
    )
    # Its traces are for the structure only.
    posterior = Posterior(svi, svi.run(random.key(0), 2, X, progress_bar=False), X)
    monkeypatch.setattr(log_likelihoods, "LOCAL_PARTICLES", 4)
    monkeypatch.setattr(proposals, "value_checks", lambda *args: lambda params: None)  # the same draws at each check
    jax.effects_barrier()
    keys.clear()
    with jax.threefry_partitionable(partitionable):
        posterior.to_arviz(
            rng_key=random.key(1), num_samples=5, num_proposals=7,
            groups=("posterior_predictive", "log_likelihood", "prior"),
        )  # fmt: skip
        jax.effects_barrier()
    assert len(keys) > 50
    assert len({tuple(key) for key in keys}) == len(keys)


def far_off(x):
    """A guide whose local proposals are wrong, so that local weights decide."""
    numpyro.sample("g", dist.Normal(numpyro.param("loc", 0.2), 0.8))
    with numpyro.plate("row", 4):
        numpyro.sample("z", dist.Bernoulli(jnp.array([0.8, 0.2, 0.5, 0.7])))


def local(x):
    g = numpyro.sample("g", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", 4):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(2.0 * z + g, 1.0), obs=x)


def test_local_particles_are_chosen_by_their_weights():
    svi = SVI(local, far_off, optax.adam(0.05), VIMCOStar(plate_particles={"row": 4}))
    posterior = Posterior(svi, {"loc": jnp.array(0.2)}, X)
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=20_000, num_proposals=40_000, groups=())
    # Exact: given g the rows are independent; over g by quadrature.
    g = np.linspace(-5, 5, 2001)[:, None, None]
    log_joint = np.log([0.6, 0.4]) + np.asarray(dist.Normal(2.0 * jnp.arange(2) + g, 1.0).log_prob(X[:, None]))
    log_g = np.logaddexp.reduce(log_joint, axis=2).sum(1) - g[:, 0, 0] ** 2 / 2
    weight = np.exp(log_g - np.logaddexp.reduce(log_g))
    exact = weight @ np.exp(log_joint[..., 1] - np.logaddexp.reduce(log_joint, axis=2))
    # An ESS above 5,000: 6 standard errors of a probability are below 0.043; uniform choices are off by 0.1 and more.
    assert tree["posterior"].attrs["ess"] > 5000
    np.testing.assert_allclose(tree["posterior"]["z"].mean(("chain", "draw")), exact, atol=0.043)


def test_densities_are_those_of_the_chosen_particles():
    svi = SVI(local, far_off, optax.adam(0.05), VIMCOStar(plate_particles={"row": 3}))
    posterior = Posterior(svi, {"loc": jnp.array(0.2)}, X)
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=500, resample=False, pool=False, groups=())
    g, z = (tree["posterior"][name].values[0] for name in ("g", "z"))
    log_q = dist.Normal(0.2, 0.8).log_prob(g) + dist.Bernoulli(jnp.array([0.8, 0.2, 0.5, 0.7])).log_prob(z).sum(1)
    log_p = dist.Normal(0, 1).log_prob(g) + dist.Bernoulli(0.4).log_prob(z).sum(1)
    log_p += dist.Normal(2.0 * z + g[:, None], 1.0).log_prob(X).sum(1)
    np.testing.assert_allclose(tree["sample_stats"]["log_q"][0], log_q, atol=1e-4)
    np.testing.assert_allclose(tree["sample_stats"]["log_p"][0], log_p, atol=1e-4)


def test_results_states_and_parameters_are_all_taken():
    svi = SVI(heavy, heavy_guide, optax.adam(0.05), VIMCOStar())
    state = svi.init(random.key(0), 0.3)
    state, _ = svi.update(state, 0.3)
    params = svi.get_params(state)
    arguments = dict(rng_key=random.key(1), num_samples=np.int64(20), num_proposals=np.int32(40))
    results = state, params, SVIRunResult(params, state, jnp.zeros(0))
    trees = [Posterior(svi, result, 0.3).to_arviz(**arguments) for result in results]
    for tree in trees:
        np.testing.assert_array_equal(tree["posterior"]["b"], trees[0]["posterior"]["b"])
        assert "num_steps" not in tree["posterior"].attrs


def test_other_objectives(monkeypatch):
    def model(x):
        loc = numpyro.sample("loc", dist.Normal(0, 1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
    posterior = Posterior(svi, svi.run(random.key(0), 300, X, progress_bar=False), X)
    known = metadata.distribution
    # The package as one that was not installed, but found on the path.
    monkeypatch.setattr(metadata, "distribution", lambda name: known("not-here" if "vimco" in name else name))
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=4000)
    assert tree["posterior"].attrs["inference_library_version"] == __version__
    assert tree["observed_data"]["x"].dims == ("data",)
    # The exact posterior is Normal(sum / 5, 1 / 5): 6 standard errors of 2,000 effective draws.
    assert abs(tree["posterior"]["loc"].mean() - X.sum() / 5) < 6 * (0.2 / 2000) ** 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")  # the guide has no parameters
def test_plates_with_deterministic_sites_only_and_data_that_broadcast():
    def model(x):
        with numpyro.plate("weight", 3):
            numpyro.deterministic("weights", jnp.arange(3.0))
        with numpyro.plate("column", 4, dim=-1), numpyro.plate("row", 3, dim=-2):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = numpyro.param("logit", 0.1)
        with numpyro.plate("column", 4, dim=-1), numpyro.plate("row", 3, dim=-2):
            numpyro.sample("z", dist.Bernoulli(logits=scale * jnp.ones((3, 4))))

    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar())
    tree = Posterior(svi, svi.run(random.key(0), 2, X, progress_bar=False), X).to_arviz()
    assert tree["posterior"]["weights"].dims[2:] == ("weight",)
    assert tree["sample_stats"]["log_weight"].dims[2:] == tree["posterior"]["z"].dims[2:] == ("row", "column")
    assert tree["log_likelihood"]["row_column_element"].dims[2:] == tree["observed_data"]["x"].dims == ("row", "column")
    assert tree["posterior_predictive"]["x"].shape == (1, 1000, 3, 4)


def test_data_that_cannot_be_drawn_do_not_lose_the_posterior():
    class Hinge(dist.Distribution):
        support = dist.constraints.real

        def log_prob(self, value):
            return -jnp.abs(value)

    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        numpyro.sample("hinge", Hinge(), obs=0.0)

    def guide(x):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))

    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar())
    posterior = Posterior(svi, {"logit": 0.0}, 1.0)
    with pytest.warns(UserWarning, match="without site 'hinge', as its distribution cannot be sampled: NotImpl"):
        tree = posterior.to_arviz(num_samples=10, groups=("posterior_predictive", "prior"))
    assert tree["posterior"]["z"].shape == (1, 10)
    for group in ("posterior_predictive", "prior_predictive"):
        assert list(tree[group].data_vars) == ["x"]


def test_resampling_takes_what_the_weight_asks_for():
    log_weight = np.log(np.array([[0.1, 0.7], [0.2, 0.1], [0.7, 0.2]]))
    counts = [np.bincount(column, minlength=3) for column in resample(random.key(0), log_weight, 1000).T]
    assert np.all(np.abs(counts - 1000 * np.exp(log_weight.T)) <= 1)
    assert np.any(np.diff(resample(random.key(0), log_weight, 1000)[:, 0]) < 0)  # not in order


def test_smoothing_is_arviz_own():
    # 3 √4,900 = 210 draws of tail: ArviZ rounds up, from 1.3 on down.
    log_weight = 1.5 * np.random.default_rng(0).normal(size=(4900, 2))
    smoothed, k = pareto_smooth(log_weight)
    expected, expected_k = arviz_psislw(log_weight.T)
    np.testing.assert_allclose(smoothed.T - np.logaddexp.reduce(smoothed)[:, None], expected, atol=1e-9)
    np.testing.assert_allclose(k, expected_k)
    # Discrete latents tie: bounded weights, unless a few draws hold them all.
    ties = np.where(np.arange(1000) < 500, 0.0, -3.0)
    one = np.where(np.arange(1000) < 1, 0.0, -50.0)
    np.testing.assert_array_equal(pareto_smooth(np.stack([np.zeros(1000), ties, one], axis=1))[1][:2], -np.inf)
    assert pareto_smooth(one[:, None])[1] > 0.7
    assert pareto_smooth(np.zeros((4, 1)))[1] == np.inf


MILLION = """
from jax import random
import numpyro, optax
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro_vimco import AutoMixed, Posterior, VIMCOStar

def model():
    for i in range(5):
        numpyro.sample(f"b{i}", dist.Bernoulli(0.3))
        numpyro.sample(f"u{i}", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(0, 1), obs=0.0)

svi = SVI(model, AutoMixed(model, structure="mean_field"), optax.adam(0.1), VIMCOStar())
tree = Posterior(svi, svi.run(random.key(0), 2, progress_bar=False)).to_arviz(num_samples=10**6)
# `ru_maxrss` would be that of the process that started this one, if it was larger.
kilobytes = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(tree["posterior"]["u0"].size, kilobytes)
"""


@pytest.mark.weekly
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_million_draws_of_ten_sites_in_two_gigabytes():
    output = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, timeout=240, check=True)
    draws, kilobytes = output.stdout.split()
    assert int(draws) == 10**6 and int(kilobytes) < 2e6


# Leaving out elements that have latents.

RANDOM = np.random.default_rng(0)
SEEN = jnp.array((RANDOM.random((20, 3)) < 0.35) * (RANDOM.random(20) < 0.5)[:, None], jnp.float32)


def occupancy(y):
    """Whether an animal lives at a site, and whether it is seen at a visit."""
    occupied = numpyro.sample("occupied", dist.Beta(2.0, 2.0))
    seen = numpyro.sample("seen", dist.Beta(2.0, 2.0))
    with numpyro.plate("site", 20, dim=-2):
        z = numpyro.sample("z", dist.Bernoulli(occupied))
        with numpyro.plate("visit", 3, dim=-1):
            numpyro.sample("y", dist.Bernoulli(z * seen), obs=y)


def exact_loo(y):
    """Leave-one-site-out of the summed-out likelihood, by quadrature over the two probabilities."""
    grid = (np.arange(300) + 0.5) / 300
    occupied, seen = np.meshgrid(grid, grid)
    log_prior = np.log(occupied * (1 - occupied) * seen * (1 - seen))
    count, number = np.asarray(y.sum(1)), y.shape[1]
    log_p = np.stack([
        np.log(occupied * seen**k * (1 - seen) ** (number - k) + (k == 0) * (1 - occupied)) for k in count
    ])  # fmt: skip
    total = log_prior + log_p.sum(0)
    return np.logaddexp.reduce(total, axis=None) - np.logaddexp.reduce(total - log_p, axis=(1, 2))


@pytest.fixture(scope="module")
def occupancy_fit():
    guide = AutoMixed(occupancy, continuous=AutoMultivariateNormal)
    svi = SVI(occupancy, guide, optax.adam(0.03), VIMCOStar(0.5, 16, plate_particles={"site": 4}))
    return Posterior(svi, svi.run(random.key(0), 800, SEEN, progress_bar=False), SEEN)


def test_loo_leaves_an_element_out_with_its_latents(occupancy_fit):
    groups = ("log_likelihood", "log_likelihood_given_latents")
    tree = occupancy_fit.to_arviz(rng_key=random.key(1), num_samples=4000, groups=groups)
    assert tree["log_likelihood"]["site_element"].dims == ("chain", "draw", "site")
    assert tree["log_likelihood_given_latents"]["y"].dims == ("chain", "draw", "site", "visit")
    exact = exact_loo(SEEN)
    found = pointwise_loo(tree)
    # 2,000 effective draws or more, and a standard deviation of a site's log-likelihood over draws of 0.3 at most: 6
    # standard errors of each are 0.04, and of the sum, whose terms move together by less than 1, 0.14.
    np.testing.assert_allclose(found, exact, atol=0.05)
    assert abs(found.sum() - exact.sum()) < 0.15
    # Given the latents, a site where the animal was seen is known to be occupied whether or not it is left out.
    given = np.asarray(tree["log_likelihood_given_latents"]["y"].values[0].sum(-1), float)
    wrong = np.log(len(given)) - np.logaddexp.reduce(-given)
    assert abs(wrong.sum() - exact.sum()) > 1


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # ArviZ's k of values that do not vary
def test_element_of_a_common_plate_is_its_evidence():
    def model(x):
        with numpyro.plate("data", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", 4):
            numpyro.sample("z", dist.Bernoulli(numpyro.param("p", 0.5)))

    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar())
    tree = Posterior(svi, {"p": jnp.array(0.5)}, X).to_arviz(rng_key=random.key(1), num_samples=2500)
    values = tree["log_likelihood"]["data_element"].values[0]
    exact = jnp.logaddexp(jnp.log(0.6) + dist.Normal(0, 1).log_prob(X), jnp.log(0.4) + dist.Normal(2, 1).log_prob(X))
    # 10,000 draws of weights with a coefficient of variation below 1: 6 standard errors are 0.06.
    np.testing.assert_allclose(values[0], exact, atol=0.06)
    assert np.ptp(values, axis=0).max() == 0
    try:
        assert abs(pointwise_loo(tree).sum() - exact.sum()) < 0.2
    except ValueError as error:  # ArviZ 1.3 has no tail for values that do not vary
        assert "All tail values are the same" in str(error)


def walk(x):
    """A random walk along a plate, whose elements depend on each other."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("time", 4):
        step = numpyro.sample("step", dist.Normal(0.0, scale))
        numpyro.sample("x", dist.Normal(jnp.cumsum(step), 1.0), obs=x)


def two_latents(x):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("time", 4):
        z = numpyro.sample("z", dist.Normal(0.0, scale))
        is_high = numpyro.sample("is_high", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z + 2.0 * is_high, 1.0), obs=x)


TOGETHER = partial(AutoMixed, continuous=AutoMultivariateNormal)


@pytest.mark.parametrize(
    "model, guide", of_two_lengths([(walk, AutoNormal), (two_latents, TOGETHER)], [(walk, AutoNormal)])
)
def test_elements_that_cannot_be_left_out_are_not_given(model, guide):
    """They depend on each other, or the guide draws their latents together."""
    svi = SVI(model, guide(model), optax.adam(0.02), VIMCOStar())
    posterior = Posterior(svi, svi.run(random.key(0), 5, X, progress_bar=False), X)
    with pytest.warns(UserWarning, match=r"Plate 'time' has latents of its own, .* elements \('x'\)"):
        tree = posterior.to_arviz(num_samples=100, groups="log_likelihood")
    assert not hasattr(tree, "log_likelihood")
    tree = posterior.to_arviz(num_samples=100, groups=("log_likelihood_given_latents",))
    assert tree["log_likelihood_given_latents"]["x"].shape == (1, 100, 4)


@pytest.mark.long
def test_nested_plates_are_left_out_as_a_whole():
    def model(x):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with numpyro.plate("group", 3, dim=-2):
            u = numpyro.sample("u", dist.Normal(0.0, scale))
            with numpyro.plate("item", 4, dim=-1):
                z = numpyro.sample("z", dist.Bernoulli(0.3))
                with numpyro.handlers.mask(mask=~jnp.isnan(x)):
                    numpyro.sample("x", dist.Normal(u + 2.0 * z, 1.0), obs=x)

    # One group has no data, another lacks some.
    x = jnp.array([[0.3, 1.2, 2.0, 0.1], [jnp.nan] * 4, [jnp.nan, 0.3, -1.0, 0.2]])
    svi = SVI(model, AutoMixed(model, structure="mean_field"), optax.adam(0.02), VIMCOStar())
    tree = Posterior(svi, svi.run(random.key(0), 5, x, progress_bar=False), x).to_arviz(num_samples=20)
    assert list(tree["log_likelihood"].data_vars) == ["group_element"]
    values = tree["log_likelihood"]["group_element"]
    assert values.dims == ("chain", "draw", "group")
    np.testing.assert_array_equal(np.isnan(values.values[0]), [[False, True, False]] * 20)


# Missing data.

HOLES = jnp.array([0.3, jnp.nan, 1.2, -0.4, jnp.nan, 0.1])
THERE = ~jnp.isnan(HOLES)


def masked(x, by):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        if by == "handler":
            with numpyro.handlers.mask(mask=THERE):
                numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        elif by == "method":
            numpyro.sample("x", dist.Normal(mean, 1.0).mask(THERE), obs=jnp.where(THERE, x, 99.0))
        elif by == "obs_mask":
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x, obs_mask=THERE)
        else:
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)


@pytest.mark.parametrize("by", of_two_lengths(["handler", "method", "obs_mask"], ["method"]))
@pytest.mark.filterwarnings("ignore")  # ArviZ's and matplotlib's own
def test_missing_data_are_missing_after_the_fit(by):
    svi = SVI(masked, AutoNormal(masked), optax.adam(0.05), VIMCOStar())
    posterior = Posterior(svi, svi.run(random.key(0), 200, HOLES, by, progress_bar=False), HOLES, by)
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=2000)
    np.testing.assert_array_equal(tree["observed_data"]["x"], HOLES)
    log_likelihood = tree["log_likelihood"]["x"]
    np.testing.assert_array_equal(np.isnan(log_likelihood.values[0]), np.broadcast_to(~THERE, (2000, 6)))
    assert not np.isnan(tree["posterior_predictive"]["x"]).any()
    # The evidence is that of the four values that are there.
    values = np.asarray(HOLES[THERE])
    exact = float(dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4) + 1).log_prob(values))
    assert abs(tree["posterior"].attrs["log_evidence"] - exact) < 0.2
    plot_ppc = az.plot_ppc if hasattr(az, "plot_ppc") else az.plot_ppc_dist
    plot_ppc(tree)
    matplotlib.pyplot.close("all")
    # az.loo of what is there, in closed form: x_i given the others.
    kept = tree.isel(data=np.flatnonzero(log_likelihood.notnull().all(("chain", "draw"))))
    mean = (values.sum() - values) / 4
    expected = dist.Normal(mean, (1 + 1 / 4) ** 0.5).log_prob(values)
    np.testing.assert_allclose(pointwise_loo(kept), expected, atol=0.1)
    if by == "obs_mask":
        assert set(tree["posterior"].data_vars) == {"mean", "x"}
        imputed = tree["posterior"]["x"].values[0]
        np.testing.assert_array_equal(imputed[:, THERE], np.broadcast_to(values, (2000, 4)))
        # Normal(mean, 1) around the posterior of the mean, Normal(0.24, 0.45): 6 standard errors of 500 draws.
        assert np.all(np.abs(imputed[:, ~THERE].mean(0) - values.sum() / 5) < 6 * (1.2 / 500) ** 0.5)


def test_error_of_missing_data_that_are_not_masked():
    def guide(x, by):
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.0), 1.0))

    svi = SVI(masked, guide, optax.adam(0.05), VIMCOStar())
    with pytest.raises(ValueError, match=r"data of site 'x' are NaN in 2 of 6 places .* Missing data: mask them"):
        Posterior(svi, {"loc": jnp.array(0.0)}, HOLES, "nothing")


def test_masks_within_events_and_masks_that_latents_switch():
    mask = jnp.array([[True, False], [False, False]])

    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("event", dist.Normal(jnp.zeros((2, 2)), 1.0).mask(mask).to_event(1), obs=x)
        with numpyro.handlers.mask(mask=jnp.array([True, False]) | (z == 0)):
            numpyro.sample("switched", dist.Normal(jnp.zeros(2), 1.0), obs=x[0])

    def guide(x):
        numpyro.sample("z", dist.Bernoulli(numpyro.param("p", 0.5)))

    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar())
    x = jnp.ones((2, 2))
    tree = Posterior(svi, {"p": jnp.array(0.99)}, x).to_arviz(num_samples=50)
    np.testing.assert_array_equal(tree["observed_data"]["event"], np.where(mask, 1.0, np.nan))
    np.testing.assert_array_equal(np.isnan(tree["log_likelihood"]["event"].values[0]), [[False, True]] * 50)
    # A latent that switches a likelihood off makes no data missing.
    np.testing.assert_array_equal(tree["observed_data"]["switched"], [1.0, 1.0])
    assert not np.isnan(tree["log_likelihood"]["switched"]).any()


@pytest.mark.long
def test_after_transformed_fits():
    """`jax.vmap(svi.run)` and `jax.jit(svi.init)` leave nothing behind that fails here."""
    svi = SVI(hierarchical, AutoMixed(hierarchical, structure="mean_field"), optax.adam(0.05), VIMCOStar())
    results = jax.vmap(lambda key: svi.run(key, 3, X, progress_bar=False).params)(random.split(random.key(0), 2))
    for i in range(2):
        params = jax.tree.map(lambda x, i=i: x[i], results)
        tree = Posterior(svi, params, X).to_arviz(num_samples=10, groups=())
        assert tree["posterior"]["z"].shape == (1, 10, 4)
    svi = SVI(hierarchical, AutoMixed(hierarchical, structure="mean_field"), optax.adam(0.05), VIMCOStar())
    state = jax.jit(svi.init)(random.key(0), X)
    assert np.isfinite(Posterior(svi, state, X).diagnose(100).log_evidence)


# Errors.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "`num_samples` is 0, but must be an integer of at least 1"),
        ({"num_samples": 100, "num_proposals": 10}, "`num_proposals` is 10, but must be an integer of at least 100"),
        ({"num_proposals": 5000, "resample": False}, "`num_proposals` is given, but with `resample=False`"),
        ({"rng_key": 1}, "`rng_key` is 1, but must be one key"),
        ({"groups": ("posterior",)}, "`groups` has 'posterior'"),
    ],
)
def test_errors(fitted, options, message):
    with pytest.raises(ValueError, match=message):
        fitted.to_arviz(**options)


def test_errors_of_a_result(fitted):
    svi, params = fitted._approx.svi, fitted.params
    with pytest.raises(ValueError, match="does not fit `hierarchical`: missing a required argument: 'x'"):
        Posterior(svi, params)
    without = {name: value for name, value in params.items() if name != "z_auto_logits"}
    with pytest.raises(ValueError, match="guide has a parameter 'z_auto_logits', which the given ones lack"):
        Posterior(svi, SVIRunResult(without, fitted.state, jnp.asarray(fitted.losses[0])), X)
    wrong = {**params, "z_auto_logits": jnp.zeros(7)}
    with pytest.raises(ValueError, match=r"'z_auto_logits' has shape \(4,\), but \(7,\) was given"):
        Posterior(svi, SVIRunResult(wrong, fitted.state, jnp.asarray(fitted.losses[0])), X)
    nan = {**params, "z_auto_logits": params["z_auto_logits"].at[1].set(jnp.nan)}
    with pytest.raises(ValueError, match="guide's parameter 'z_auto_logits' is NaN: the fit broke down"):
        Posterior(svi, nan, X)


def test_error_without_latents():
    def model(x):
        numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), 1.0), obs=x)

    svi = SVI(model, lambda x: None, optax.adam(0.1), Trace_ELBO())
    posterior = Posterior(svi, svi.run(random.key(0), 2, 1.0, progress_bar=False), 1.0)
    for method in (posterior.to_arviz, posterior.diagnose):
        with pytest.raises(ValueError, match="no latent site"):
            method()


def test_error_for_a_subsampled_plate():
    def model(x):
        with numpyro.plate("data", 4, subsample_size=2):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=numpyro.subsample(x, event_dim=0))

    def guide(x):
        with numpyro.plate("data", 4, subsample_size=2):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1)))

    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar())
    posterior = Posterior(svi, svi.run(random.key(0), 2, X, progress_bar=False), X)
    with pytest.raises(ValueError, match=r"Plate 'data' is subsampled \(2 of 4\)"):
        posterior.to_arviz()
