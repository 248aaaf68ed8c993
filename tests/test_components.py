"""Guides with mixture components: where the prior has several humps, or where they are asked for."""

from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import seed, substitute, trace
import pytest
from scipy import stats

from numpyro_vimco import AutoDiscrete, AutoMixed
from numpyro_vimco.families.distributions import DiscretizedLogistic, DiscretizedLogisticMixture

HUMPS = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.2, 0.8])), dist.Normal(jnp.array([-5.0, 6.0]), 0.5))
GENERAL = dist.MixtureGeneral(
    dist.Categorical(jnp.array([0.2, 0.8])),
    [dist.Normal(-5.0, 0.5), dist.Normal(6.0, 0.5)],
    support=dist.constraints.real,
)


def sites_of(guide):
    return trace(seed(guide, 0)).get_trace()


@pytest.mark.parametrize("prior", [HUMPS, GENERAL, HUMPS.expand([3]).to_event(1), HUMPS.mask(True)])
def test_a_guide_has_the_humps_of_the_prior(prior):
    tr = sites_of(AutoMixed(lambda: numpyro.sample("mu", prior)))
    shape = prior.shape()
    assert tr["mu_auto_loc"]["value"].shape == (*shape, 2)
    # Each start begins elsewhere, by a tenth of the scale, and of 1 for logits: five standard deviations are added.
    loc, logits = tr["mu_auto_loc"]["value"], tr["mu_auto_logits"]["value"]
    np.testing.assert_allclose(loc, np.broadcast_to([-5.0, 6.0], (*shape, 2)), atol=0.3 + 5 * 0.05)
    np.testing.assert_allclose(tr["mu_auto_scale"]["value"], 0.5, rtol=0.4)
    np.testing.assert_allclose(logits[..., 1] - logits[..., 0], np.log(4), atol=5 * 0.1 * 2**0.5)
    other = trace(seed(AutoMixed(lambda: numpyro.sample("mu", prior)), 1)).get_trace()
    assert (other["mu_auto_loc"]["value"] != loc).all()


def test_the_density_is_that_of_the_mixture():
    def model():
        humps = dist.LogNormal(jnp.array([0.0, 4.0]), 0.3)
        numpyro.sample("s", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), humps))

    params = {"loc": [0.5, 3.0], "scale": [0.2, 0.6], "logits": [0.0, 1.0]}
    params = {f"s_auto_{name}": jnp.array(values) for name, values in params.items()}
    guide = AutoMixed(model)
    sites_of(guide)
    fn = sites_of(substitute(guide, params))["s"]["fn"]
    weights = np.exp([0, 1]) / np.exp([0, 1]).sum()
    for s in (0.5, 1.7, 30.0):
        exact = weights @ stats.lognorm.pdf(s, [0.2, 0.6], scale=np.exp([0.5, 3.0]))
        np.testing.assert_allclose(np.exp(fn.log_prob(s)), exact, rtol=1e-4)


ZERO_INFLATED = (
    dist.ZeroInflatedPoisson(0.4, 100.0),
    dist.ZeroInflatedDistribution(dist.NegativeBinomial2(100.0, 20.0), gate_logits=-0.4),
)


@pytest.mark.parametrize("prior", ZERO_INFLATED)
@pytest.mark.parametrize("make", [AutoMixed, AutoDiscrete])
def test_a_count_that_is_inflated_at_zero_has_a_component_there(prior, make):
    guide = make(lambda: numpyro.sample("k", prior))
    fn = sites_of(guide)["k"]["fn"]
    draws = fn.sample(random.key(1), (4000,))
    assert 0.3 < np.mean(draws == 0) < 0.5 and 80 < np.median(draws[draws > 0]) < 120


def test_components_that_are_asked_for():
    def model():
        mu = numpyro.sample("mu", dist.Normal(3.0, 2.0))
        numpyro.sample("n", dist.Poisson(50.0))
        numpyro.sample("x", dist.Normal(mu, 1.0), obs=0.0)

    tr = sites_of(AutoMixed(model, num_components={"mu": 2, "n": 3}))
    assert tr["mu_auto_loc"]["value"].shape == (2,) and tr["n_auto_loc"]["value"].shape == (3,)
    one = sites_of(AutoMixed(lambda: numpyro.sample("mu", HUMPS), num_components={"mu": 1}))
    assert one["mu_auto_loc"]["value"].shape == ()


def test_counts_of_a_mixture():
    """Probabilities sum to one, and 20,000 draws have them, within five standard errors."""
    fn = DiscretizedLogisticMixture(jnp.array([0.0, 1.0]), jnp.array([0.1, 30.0]), jnp.array([0.1, 2.0]))
    values = jnp.arange(100)
    probs = np.exp(fn.log_prob(values))
    parts = [np.exp(DiscretizedLogistic(loc, scale).log_prob(values)) for loc, scale in ((0.1, 0.1), (30.0, 2.0))]
    np.testing.assert_allclose(probs, (parts[0] + np.e * parts[1]) / (1 + np.e), rtol=1e-5, atol=1e-12)
    assert abs(probs.sum() - 1) < 1e-5
    count = np.bincount(fn.sample(random.key(0), (20_000,)), minlength=100)[:100]
    assert (abs(count - 20_000 * probs) < 5 * np.sqrt(20_000 * probs) + 1).all()
    batch = DiscretizedLogisticMixture(jnp.zeros((3, 2)), jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.array([0, 5, 10]))
    assert (batch.sample(random.key(0), (4,)) >= jnp.array([0, 5, 10])).all() and batch.batch_shape == (3,)


def test_errors():
    model = lambda: numpyro.sample("mu", dist.Normal(0.0, 1.0))  # noqa: E731
    with pytest.raises(ValueError, match=r"`num_components` names 'nu', but the latents are 'mu'"):
        sites_of(AutoMixed(model, num_components={"nu": 2}))
    with pytest.raises(ValueError, match=r"num_components\['mu'\]"):
        AutoMixed(model, num_components={"mu": 0})
    with pytest.raises(ValueError, match=r"`num_components` is 2, but must be a dict"):
        AutoMixed(model, num_components=2)
    with pytest.raises(ValueError, match=r"`init_scale` is 0.0, but must be a positive number"):
        AutoMixed(model, init_scale=0.0)
    guide = AutoMixed(lambda: numpyro.sample("mu", HUMPS), structure="mean_field")
    tr = sites_of(guide)
    with pytest.raises(NotImplementedError, match="'mu' is a mixture"):
        guide.median({name: site["value"] for name, site in tr.items() if site["type"] == "param"})
