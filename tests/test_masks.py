"""Latents that the model masks are out of the program: exact bounds, no gradient, whoever wrote the guide."""

from functools import partial

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import mask
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
import optax
import pytest

from helpers import of_two_lengths
from numpyro_vimco import AutoDiscrete, ReweightedWakeSleep, VIMCOStar

X = jnp.array([1.0, 0.2, 0.3, -0.1, 0.8, 1.4])
SEEN = jnp.arange(6) >= 2


def posterior_logits(x):
    return jnp.log(0.3 / 0.7) + dist.Normal(1, 1).log_prob(x) - dist.Normal(0, 1).log_prob(x)


def switches():
    with numpyro.plate("data", 6), mask(mask=SEEN):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=X)


def switches_guide():
    with numpyro.plate("data", 6):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", posterior_logits(X))))


def switches_in_an_event():
    z = numpyro.sample("z", dist.Bernoulli(0.3).expand([6]).mask(SEEN).to_event(1))
    numpyro.sample("x", dist.Normal(z, 1.0).mask(SEEN).to_event(1), obs=X)


def switches_in_an_event_guide():
    logits = numpyro.param("logits", posterior_logits(X))
    numpyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def normals():
    with numpyro.plate("data", 6), mask(mask=SEEN):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=X)


def normals_guide():
    with numpyro.plate("data", 6):
        numpyro.sample("z", dist.Normal(numpyro.param("loc", X / 2), numpyro.param("scale", jnp.full(6, 0.5**0.5))))


def beside_a_global(program):
    def run():
        numpyro.sample("g", dist.Normal(0, 1))
        program()

    return run


EVIDENCE_SWITCHES = float(
    jnp.logaddexp(jnp.log(0.3) + dist.Normal(1, 1).log_prob(X), jnp.log(0.7) + dist.Normal(0, 1).log_prob(X))[2:].sum()
)
EVIDENCE_NORMALS = float(dist.Normal(0, 2**0.5).log_prob(X)[2:].sum())
PROGRAMS = {
    "score": (switches, switches_guide, EVIDENCE_SWITCHES, {}),
    "event": (switches_in_an_event, switches_in_an_event_guide, EVIDENCE_SWITCHES, {}),
    "path": (normals, normals_guide, EVIDENCE_NORMALS, {}),
    "plain path": (normals, normals_guide, EVIDENCE_NORMALS, {"doubly_reparameterized": False}),
    "local score": (
        beside_a_global(switches), beside_a_global(switches_guide), EVIDENCE_SWITCHES, {"plate_particles": {"data": 3}}
    ),
    "local path": (
        beside_a_global(normals), beside_a_global(normals_guide), EVIDENCE_NORMALS, {"plate_particles": {"data": 3}}
    ),
}  # fmt: skip


def params_of(guide):
    tr = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
    return {name: site["value"] for name, site in tr.items() if site["type"] == "param"}


@pytest.mark.parametrize("alpha", of_two_lengths([0.0, 0.5, 1.0], [0.5]))
@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_of_the_exact_posterior_are_the_evidence_and_masked_elements_have_no_gradient(name, alpha):
    """All weights are equal, whatever the guide does with masked elements: any seed gives the same numbers."""
    model, guide, evidence, options = PROGRAMS[name]
    objective = VIMCOStar(alpha, 4, **options)
    loss = jax.jit(jax.value_and_grad(lambda params, key: objective.loss(key, params, model, guide)))
    params = params_of(guide)
    moved = {name: value.at[:2].add(0.7) for name, value in params.items()}
    for key in random.split(random.key(0), 3):
        value, gradient = loss(moved, key)
        assert value == pytest.approx(-evidence, abs=1e-4)
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_array_equal(leaf[:2], 0)
        # Away from the posterior there is a gradient, of the others only.
        _, gradient = loss(jax.tree.map(lambda x: x + 0.3, params), key)
        assert all(np.all(leaf[:2] == 0) and np.abs(leaf[2:]).max() > 1e-4 for leaf in jax.tree.leaves(gradient))


def test_wake_sleep_leaves_masked_elements_alone():
    loss = partial(ReweightedWakeSleep(8).loss, model=switches, guide=switches_guide)
    gradient = jax.grad(lambda params: loss(random.key(0), params))({"logits": jnp.zeros(6) + 0.1})["logits"]
    assert np.all(gradient[:2] == 0) and np.abs(gradient[2:]).min() > 0


def categories(x):
    with numpyro.plate("data", 3):
        numpyro.sample("x", dist.Categorical(jnp.array([0.5, 0.3, 0.2])), obs=x, obs_mask=jnp.ones(3, bool))


def test_obs_mask_with_everything_seen():
    """The unobserved site is masked whole: the evidence is that of the data, 0.5 · 0.3 · 0.2."""
    svi = SVI(categories, AutoDiscrete(categories, structure="mean_field"), optax.adam(0.1), VIMCOStar())
    result = svi.run(random.key(0), 5, jnp.arange(3), progress_bar=False)
    np.testing.assert_allclose(result.losses, -np.log(0.03), rtol=1e-5)


def missing(x):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", 6):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=SEEN)


@pytest.mark.parametrize("make_guide", of_two_lengths([AutoNormal, AutoMultivariateNormal], [AutoMultivariateNormal]))
def test_evidence_of_missing_normals_by_guides_with_and_without_densities_of_elements(make_guide):
    """exp(-loss) has the evidence as its mean: 20,000 draws, 5 standard errors. Counting the guide's density of
    the four masked elements is off by a factor of 50 or more.
    """
    guide = make_guide(missing, init_scale=1.5)
    objective = VIMCOStar(0.0, 16)
    svi = SVI(missing, guide, optax.adam(0.1), objective)
    params = svi.get_params(svi.init(random.key(0), X))
    loss = jax.jit(jax.vmap(lambda key: objective.loss(key, params, missing, guide, X)))
    covariance = np.eye(4) + 1
    evidence = dist.MultivariateNormal(jnp.zeros(4), jnp.asarray(covariance)).log_prob(X[2:])
    ratio = np.exp(-np.asarray(loss(random.split(random.key(1), 20_000)), float) - float(evidence))
    error = ratio.std() / 20_000**0.5
    assert abs(ratio.mean() - 1) < 5 * error < 0.3


def test_error_for_a_mask_within_an_event_that_the_guide_draws_as_a_whole():
    def guide():
        loc = numpyro.param("loc", jnp.zeros(6))
        numpyro.sample("z", dist.MultivariateNormal(loc, jnp.eye(6)))

    def model():
        numpyro.sample("z", dist.Normal(0, 1).expand([6]).mask(SEEN).to_event(1))

    with pytest.raises(ValueError, match="masks parts of an event of the latent site 'z'"):
        VIMCOStar().loss(random.key(0), {}, model, guide)


def test_error_where_something_depends_on_masked_elements():
    def model():
        with numpyro.plate("data", 6):
            with mask(mask=SEEN):
                z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=X)

    with pytest.raises(ValueError, match=r"masks elements of the latent site 'z', but the density of site 'x'"):
        VIMCOStar().loss(random.key(0), {}, model, normals_guide)
