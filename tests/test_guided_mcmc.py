"""MCMC that a fit guides leaves the posterior invariant, whatever the guide is; and its errors."""

from types import SimpleNamespace

import arviz as az
import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, SVI, BarkerMH
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.mcmc import MCMCKernel
import optax
import pytest
from scipy import stats

from helpers import posterior_at, product_of
from numpyro_vimco import AutoMixed, GuidedMCMC, VIMCOStar, fit
from numpyro_vimco.draws.moments import Estimate
from numpyro_vimco.posterior.chains import diagnose_chains

if not hasattr(MCMCKernel, "refresh"):
    pytest.skip("NumPyro has had `refresh` since 0.22", allow_module_level=True)

X = np.array([0.4, -0.8])
NUMBER = 200_000


def bernoulli(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def joint():
    def model():
        z = bernoulli("z", 0.3)
        y = numpyro.sample("y", dist.Categorical(logits=jnp.array([0.2, 0.5, -0.4]) * (1 + z)))
        numpyro.sample("x", dist.Normal(z - y, 1.0), obs=X[0])

    def guide():
        z = bernoulli("z", numpyro.param("z_logits", 0.0))
        numpyro.sample("y", dist.Categorical(logits=numpyro.param("y_logits", jnp.zeros(3)) * (1 - 2 * z)))

    params = {"z_logits": [3.0, -1.0], "y_logits": [[2.0, -1.0, 0.0], [0.0, 1.0, -2.0]]}
    return model, guide, params, {}, product_of(z=[0, 1], y=[0, 1, 2])


def common_plate():
    def model():
        with numpyro.plate("data", 2):
            z = bernoulli("z", 0.3)
            y = bernoulli("y", z - 0.5)
            numpyro.sample("x", dist.Normal(z + y, 1.0), obs=X)

    def guide():
        with numpyro.plate("data", 2):
            z = bernoulli("z", numpyro.param("z_logits", jnp.zeros(2)))
            bernoulli("y", numpyro.param("slope", 0.0) * z)

    params = {"z_logits": [[2.0, -1.0], [-1.0, -2.0]], "slope": [3.0, -2.0]}
    pairs = [[0, 0], [0, 1], [1, 0], [1, 1]]
    return model, guide, params, {}, product_of(z=pairs, y=pairs)


def local_particles():
    def model():
        g = bernoulli("g", 0.2)
        with numpyro.plate("data", 2):
            e = bernoulli("e", 0.8 * g - 0.4)
            numpyro.sample("x", dist.Normal(1.1 * e + g, 1.0), obs=X)

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.0))
        with numpyro.plate("data", 2):
            bernoulli("e", numpyro.param("slope", 0.0) * g + numpyro.param("shift", 0.0))

    params = {"g_logits": [2.0, -1.0], "slope": [1.0, -2.0], "shift": [1.3, -2.0]}
    outcomes = product_of(g=[0, 1], e=[[0, 0], [0, 1], [1, 0], [1, 1]])
    return model, guide, params, {"plate_particles": {"data": 4}}, outcomes


def chain():
    def model():
        g = bernoulli("g", 0.2)

        def step(before, x):
            z = bernoulli("z", 1.5 * before - 0.6 * g)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return z, None

        scan(step, 0, jnp.append(X, 1.1))

    guide = AutoMixed(model, chains={"z"})
    paths = [[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    return model, guide, None, {"chain_particles": {"z": 5}}, product_of(g=[0, 1], z=paths)


def posterior_of(case):
    model, guide, params, particles, outcomes = case()
    objective = VIMCOStar(num_particles=2, **particles)
    if params is None:  # those where an automatic guide begins, moved
        svi = SVI(model, guide, optax.adam(0.1), objective)
        first = svi.get_params(svi.init(random.key(0)))
        keys = random.split(random.key(1), len(first))
        moved = [value + 1.5 * random.normal(key, (2, *value.shape)) for key, value in zip(keys, first.values())]
        params = dict(zip(first, moved))
    params = {name: jnp.array(value) for name, value in params.items()}
    svi = SVI(model, guide, optax.adam(0.1), objective)
    return posterior_at(svi, params), model, outcomes


def kernel_of(case, num_proposals=3, **kwargs):
    posterior, model, outcomes = posterior_of(case)
    return GuidedMCMC(posterior, num_proposals=num_proposals, **kwargs), model, outcomes


def test_default_number_of_proposals():
    """Fewer where each proposal draws local particles anew."""
    numbers = [kernel_of(case, None)[0].num_proposals for case in (joint, common_plate, local_particles, chain)]
    assert numbers == [40, 40, 4, 4]


@pytest.mark.long
@pytest.mark.parametrize("case", [joint, common_plate, local_particles, chain])
def test_the_posterior_stays_what_it_is(case):
    """A global step from 200,000 exact draws, by two bad guides and their defence.

    Each outcome is as frequent as before: 5.5 standard errors are passed less than once in a million runs of 30
    outcomes. Without the weight of the present state, or with that of one guide, they are passed by more than ten.
    """
    kernel, model, outcomes = kernel_of(case)
    before, after = moved_by(kernel._global_step, model, outcomes)
    assert_same_frequencies(before, after)


def one_guide():
    """One start whose latents are all local: it has no defence but the local particles of the model."""

    def model():
        with numpyro.plate("data", 2):
            e = bernoulli("e", -0.4)
            numpyro.sample("x", dist.Normal(1.1 * e, 1.0), obs=X)
        numpyro.factor("all", 0.3)

    def guide():
        with numpyro.plate("data", 2):
            bernoulli("e", numpyro.param("shift", 0.0))

    outcomes = product_of(e=[[0, 0], [0, 1], [1, 0], [1, 1]])
    return model, guide, {"shift": [-2.0]}, {"plate_particles": {"data": 4}}, outcomes


@pytest.mark.long
@pytest.mark.parametrize("case", [joint, local_particles, chain, one_guide])
def test_proposals_that_are_made_before_the_run(case):
    """As above. The sampler of one guide without defence has no local particles of the model, as its present has."""
    kernel, model, outcomes = kernel_of(case)
    kernel.prepare(random.key(2), NUMBER, 1)
    assert (kernel._made is None) == (case is one_guide)

    def step(present, key, made=None):
        return kernel._global_step(present, key, jax.tree.map(lambda x: x[0], made))

    assert_same_frequencies(*moved_by(step, model, outcomes, *(() if kernel._made is None else (kernel._made,))))


@pytest.mark.long
@pytest.mark.parametrize("case", [joint, common_plate])
def test_a_global_step_knows_what_the_inner_step_did(case):
    """A step of both kernels. A weight of the state before the inner step passes 5.5 standard errors by far."""
    kernel, model, outcomes = kernel_of(case)

    def step(present, key):
        begin_key, step_key = random.split(key)
        state = kernel._begin(begin_key, present, 0, (), {})
        return kernel._step(state._replace(rng_key=step_key), (), {}).z, None

    assert_same_frequencies(*moved_by(lambda present, key: step(present, key), model, outcomes))


def moved_by(step, model, outcomes, *more):
    """The exact probabilities of outcomes, and how many of as many exact draws are at each after a step."""
    log_joint = jax.vmap(lambda values: numpyro.infer.util.log_density(model, (), {}, values)[0])(outcomes)
    probability = np.exp(np.asarray(log_joint - logsumexp(log_joint), float))
    draws = random.categorical(random.key(0), log_joint, shape=(NUMBER,))
    present = {name: values[draws] for name, values in outcomes.items()}
    run = jax.jit(lambda *inputs: jax.lax.map(lambda each: step(*each)[0], inputs, batch_size=20_000))
    new = run(present, random.split(random.key(1), NUMBER), *more)
    is_same = [new[n].reshape(NUMBER, 1, -1) == v.reshape(1, len(v), -1) for n, v in outcomes.items()]
    return probability, np.asarray(jnp.concatenate(is_same, axis=-1).all(-1).sum(0))


def assert_same_frequencies(probability, counts):
    assert counts.sum() == NUMBER
    errors = (counts - NUMBER * probability) / np.sqrt(NUMBER * probability * (1 - probability))
    assert np.abs(errors).max() < 5.5


@pytest.mark.long
def test_a_guide_that_draws_jointly():
    """Exact draws of two Normal latents keep mean and covariance: 5.5 standard errors of 200,000."""

    def model():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        b = numpyro.sample("b", dist.Normal(a, 1.0))
        numpyro.sample("x", dist.Normal(a + b, 1.0), obs=X[0])

    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(num_particles=2))
    first = svi.get_params(svi.init(random.key(0)))
    starts = {
        "auto_loc": jnp.array([[1.0, -0.5], [-0.4, 0.3]]),
        "auto_scale_tril": jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]),
    }
    assert first.keys() == starts.keys()
    kernel = GuidedMCMC(posterior_at(svi, starts), num_proposals=3)
    precision = np.array([[2.0, -1.0], [-1.0, 1.0]]) + np.ones((2, 2))
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.full(2, X[0])
    draws = random.multivariate_normal(random.key(0), mean, covariance, (NUMBER,))
    run = jax.jit(lambda keys, draws: jax.lax.map(step_of(kernel), (keys, draws), batch_size=20_000))
    new = np.asarray(run(random.split(random.key(1), NUMBER), draws), float)
    errors = (new.mean(0) - mean) / np.sqrt(np.diag(covariance) / NUMBER)
    assert np.abs(errors).max() < 5.5
    centred = new - mean
    for i, j in ((0, 0), (0, 1), (1, 1)):
        product = centred[:, i] * centred[:, j]
        assert abs(product.mean() - covariance[i, j]) < 5.5 * product.std() / np.sqrt(NUMBER)


@pytest.mark.long
def test_a_support_that_moves():
    """Exact draws of a prior whose second latent is below the first: 5.5 standard errors of 200,000."""

    def model():
        a = numpyro.sample("a", dist.Gamma(3.0, 1.0))
        numpyro.sample("b", dist.Uniform(0.0, a))

    svi = SVI(model, AutoMixed(model), optax.adam(0.1), VIMCOStar(num_particles=2))
    params = svi.get_params(svi.init(random.key(0)))
    kernel = GuidedMCMC(posterior_at(svi, jax.tree.map(lambda x: jnp.stack([x, x + 0.3]), params)), num_proposals=3)
    assert kernel._supports.keys() == {"a"}
    a_key, b_key = random.split(random.key(0))
    a = random.gamma(a_key, 3.0, (NUMBER,))
    draws = jnp.stack([a, a * random.uniform(b_key, (NUMBER,))], axis=1)
    run = jax.jit(lambda keys, draws: jax.lax.map(step_of(kernel), (keys, draws), batch_size=20_000))
    new = np.asarray(run(random.split(random.key(1), NUMBER), draws), float)
    for values, mean, sd in ((new[:, 0], 3, np.sqrt(3)), (new[:, 1] / new[:, 0], 0.5, np.sqrt(1 / 12))):
        assert abs(values.mean() - mean) < 5.5 * sd / np.sqrt(NUMBER)


def step_of(kernel):
    def step(both):
        new, _ = kernel._global_step({"a": both[1][0], "b": both[1][1]}, both[0])
        return jnp.stack([new["a"], new["b"]])

    return step


def mixed(y):
    """A continuous latent, a finite one, one that is summed out, and a count."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    z = numpyro.sample("z", dist.Bernoulli(0.4))
    count = numpyro.sample("count", dist.Poisson(1.5))
    with numpyro.plate("data", 3):
        on = numpyro.sample("on", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(mu + 2 * z + count + on, 1.0), obs=y)
    numpyro.deterministic("twice", 2 * mu)


Y = jnp.array([1.0, 2.0, 0.5])


@pytest.fixture(scope="module")
def refined():
    svi = SVI(mixed, AutoMixed(mixed), optax.adam(0.05), VIMCOStar(0.5, 8))
    posterior = fit(svi, random.key(0), 150, Y, num_starts=2, progress_bar=False)
    return posterior, posterior.refine(random.key(1), 200, 1500, progress_bar=False)


def exact_means():
    """Of mu, z, count and the elements of `on`, by a grid and sums."""
    mu = np.linspace(-10, 10, 2001)[:, None, None]
    z, count = np.arange(2)[:, None], np.arange(25)
    log_p = stats.norm.logpdf(mu, 0, 2) + np.log([0.6, 0.4])[:, None] + stats.poisson.logpmf(count, 1.5)
    shares = []
    for y in np.asarray(Y):
        off, on = (np.log(p) + stats.norm.logpdf(y, mu + 2 * z + count + k) for k, p in enumerate((0.7, 0.3)))
        both = np.logaddexp(off, on)
        log_p, shares = log_p + both, [*shares, np.exp(on - both)]
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    return {
        "mu": (weight * mu).sum(),
        "z": (weight * z).sum(),
        "count": (weight * count).sum(),
        "on": np.array([(weight * share).sum() for share in shares]),
    }


@pytest.mark.long
def test_refined_draws_are_of_the_posterior(refined):
    """6,000 draws with an ESS of at least 1,000 for each mean: 5.5 standard errors of these."""
    posterior, mcmc = refined
    found = posterior.diagnose_chains(mcmc)
    assert found.verdict == "good" and found.moved > 0.3, str(found)
    tree = posterior.to_arviz(mcmc)
    for name, mean in exact_means().items():
        draws = tree["posterior"][name].values.reshape(6000, -1)
        assert np.min(found.ess_bulk.get(name, 6000)) > 1000
        assert np.all(np.abs(draws.mean(0) - mean) < 5.5 * draws.std(0) / np.sqrt(1000)), name


@pytest.mark.long
def test_refined_draws_in_arviz(refined):
    posterior, mcmc = refined
    tree = posterior.to_arviz(mcmc)
    for group in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert group in tree
    assert dict(tree["posterior"].sizes) == {"chain": 4, "draw": 1500, "data": 3}
    np.testing.assert_allclose(tree["posterior"]["twice"], 2 * tree["posterior"]["mu"], rtol=1e-6)
    assert set(tree["sample_stats"].data_vars) == {"moved"}
    assert tree["posterior"].attrs["verdict"] == "good" and tree["posterior"].attrs["r_hat"] < 1.01
    again = az.from_numpyro(mcmc, log_likelihood=False)  # NumPyro has none where sites are summed out
    np.testing.assert_array_equal(again["posterior"]["mu"], tree["posterior"]["mu"])
    assert "moved" in again["sample_stats"]


@pytest.mark.long
@pytest.mark.parametrize("chain_method", ["sequential", "vectorized"])
def test_the_kernel_in_mcmc(refined, chain_method):
    posterior, _ = refined
    kernel = GuidedMCMC(posterior, num_proposals=5)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=30, num_chains=2, chain_method=chain_method, progress_bar=False)
    mcmc.run(random.key(0), Y)
    assert mcmc.get_samples(group_by_chain=True)["mu"].shape == (2, 30)
    assert mcmc.get_extra_fields()["moved"].shape == (60,)
    with pytest.raises(ValueError, match="The arguments of the model are not those of the fit"):
        mcmc.run(random.key(0), Y + 1)


@pytest.mark.long
def test_bounds_that_jax_computes():
    """NumPyro's kernels keep them from `init`, which is traced here."""

    def model():
        low = jnp.sqrt(jnp.full(2, 0.25))
        numpyro.sample("a", dist.Uniform(low, 2.0).to_event(1))
        numpyro.sample("z", dist.Bernoulli(0.5))

    svi = SVI(model, AutoMixed(model), optax.adam(0.1), VIMCOStar(num_particles=2))
    params = svi.get_params(svi.init(random.key(0)))
    posterior = posterior_at(svi, jax.tree.map(lambda x: x[None], params))
    draws = posterior.refine(random.key(0), 50, 500, num_chains=2, progress_bar=False).get_samples()
    assert draws["a"].min() > 0.5 and draws["a"].max() < 2 and abs(draws["a"].mean() - 1.25) < 0.1


@pytest.mark.long
def test_default_kernels():
    def of(model):
        svi = SVI(model, AutoMixed(model), optax.adam(0.1), VIMCOStar(num_particles=2))
        params = svi.get_params(svi.init(random.key(0)))
        return GuidedMCMC(posterior_at(svi, jax.tree.map(lambda x: x[None], params))).inner_kernel

    def continuous():
        numpyro.sample("a", dist.Normal(0.0, 1.0))

    def counts():
        numpyro.sample("die", dist.DiscreteUniform(1, 6))  # NumPyro's Gibbs steps would take it to be 0 to 5
        numpyro.sample("c", dist.Poisson(2.0))
        numpyro.sample("z", dist.Bernoulli(0.5))

    assert isinstance(of(continuous), NUTS)
    names = [spec for _, spec in of(counts).blocks]
    assert names == [("die", "c"), ("z",), None]


class TestErrors:
    def test_a_key_in_place_of_chains(self):
        posterior = posterior_of(joint)[0]
        for call in posterior.to_arviz, posterior.diagnose_chains:
            with pytest.raises(ValueError, match="`mcmc` is PRNGKeyArray, but must be what"):
                call(random.key(0))

    def test_a_kernel_without_refresh(self):
        with pytest.raises(NotImplementedError, match=r"`inner_kernel` is BarkerMH, but must be a kernel .* `refresh`"):
            kernel_of(joint, inner_kernel=BarkerMH(joint()[0]))

    def test_a_potential_function(self):
        with pytest.raises(ValueError, match="`inner_kernel` is built from a potential function"):
            kernel_of(joint, inner_kernel=NUTS(potential_fn=lambda z: 0.0))

    def test_other_latents(self):
        def other():
            numpyro.sample("a", dist.Normal(0.0, 1.0))

        kernel, _, _ = kernel_of(joint, inner_kernel=NUTS(other))
        with pytest.raises(ValueError, match="The inner kernel draws 'a', but the latents of the guide are 'z', 'y'"):
            kernel.init(random.key(0), 10, {"a": jnp.array(0.0)}, (), {})

    def test_starts_with_parameters_of_the_model(self):
        def model():
            z = bernoulli("z", numpyro.param("prior", 0.3))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=0.2)

        def guide():
            bernoulli("z", numpyro.param("logits", 0.0))

        svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(num_particles=2))
        starts = {"prior": jnp.array([0.1, 0.2]), "logits": jnp.zeros(2)}
        with pytest.raises(ValueError, match=r"The model has parameters \('prior'\), so that each of the 2 starts"):
            GuidedMCMC(posterior_at(svi, starts))

    def test_a_delta_site(self):
        def model():
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            bernoulli("z", a)
            numpyro.sample("x", dist.Normal(a, 1.0), obs=0.2)

        def guide():
            numpyro.sample("a", dist.Delta(numpyro.param("at", 0.0)))
            bernoulli("z", numpyro.param("logits", 0.0))

        svi = SVI(model, guide, optax.adam(0.1), VIMCOStar(num_particles=2))
        with pytest.raises(ValueError, match="Site 'a' of the guide is a Delta"):
            GuidedMCMC(posterior_at(svi, {"at": jnp.zeros(1), "logits": jnp.zeros(1)}))

    def test_a_number_of_proposals(self):
        with pytest.raises(ValueError, match="num_proposals"):
            kernel_of(joint, num_proposals=0)


def test_what_the_verdict_of_chains_is_made_of():
    """Chains at two values that they do not leave; few draws; means other than those of the weights."""

    def found(values, mean=0.0, known=True, moved=1.0):
        mcmc = SimpleNamespace(
            get_samples=lambda group_by_chain: {"a": values},
            get_extra_fields=lambda: {"moved": np.full(values.size, moved)},
        )
        return diagnose_chains({"a": {}}, {"a": Estimate(np.array(mean), np.array(0.01), np.array(1.0))}, mcmc, known)

    noise = np.random.default_rng(0).normal(size=(4, 1000))
    assert (found(noise).verdict, found(noise).findings) == ("good", [])
    apart = found(np.arange(4.0)[:, None] + 0 * noise)
    assert apart.verdict == "bad" and apart.r_hat["a"] == np.inf
    assert [f.code for f in apart.findings][:1] == ["chains-disagree"]
    assert found(np.ones((4, 1000)), 1.0).r_hat["a"] == 1
    assert found(noise[:, :50]).verdict == "usable"
    assert found(noise[:, :20]).verdict == "bad"
    differs = found(noise, 0.5)
    assert differs.verdict == "usable" and [f.code for f in differs.findings] == ["weights-differ"]
    corrected = found(noise, 0.5, known=False)
    assert corrected.verdict == "good" and [f.code for f in corrected.findings] == ["weights-corrected"]
    assert [f.code for f in found(noise, moved=0.001).findings] == ["no-global-moves"]
