"""Elements of a plate that are not independent are found, and can be given one weight."""

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
import pytest

from numpyro_vimco import VIMCO, AutoMixed, ReweightedWakeSleep, VIMCOStar, fit

Y = jnp.array([0.2, 0.9, 6.0, 1.8, 2.5])


def walk(link, joint_site=False):
    """A random walk with outliers, written in one plate."""

    def model(y):
        if joint_site:
            numpyro.factor("joint", 0.0)
        with numpyro.plate("time", 5):
            eps = numpyro.sample("eps", dist.Normal(0, 0.7))
            out = numpyro.sample("out", dist.Bernoulli(0.2))
            numpyro.sample("y", dist.Normal(link(eps), jnp.where(out == 1, 5, 0.5)), obs=y)

    return model


def walk_guide(y):
    with numpyro.plate("time", 5):
        numpyro.sample("eps", dist.Normal(numpyro.param("loc", jnp.zeros(5)), 0.5))
        numpyro.sample("out", dist.Bernoulli(logits=numpyro.param("logits", jnp.full(5, -1.0))))


LINKS = {
    "cumsum": jnp.cumsum,
    "centred": lambda x: x - x.mean(),
    "previous": lambda x: jnp.concatenate([jnp.zeros(1), x[:-1]]),
    "sorted": jnp.sort,
    "reversed": lambda x: x[::-1],
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("objective", [VIMCOStar(), VIMCO(0.5), ReweightedWakeSleep(4)], ids=lambda o: type(o).__name__)
def test_dependent_elements_are_found_in_a_fit(link, objective):
    svi = SVI(walk(LINKS[link]), walk_guide, optax.adam(0.05), objective)
    with pytest.raises(ValueError, match=r"elements of the plate 'time' are not independent: the density of site 'y'"):
        svi.run(random.key(0), 2, Y, progress_bar=False)


def test_independent_elements_pass():
    svi = SVI(walk(jnp.tanh), walk_guide, optax.adam(0.05), VIMCOStar())
    assert np.isfinite(svi.run(random.key(0), 2, Y, progress_bar=False).losses).all()


def test_one_of_two_plates_is_named():
    def model():
        with numpyro.plate("row", 3, dim=-2), numpyro.plate("column", 4, dim=-1):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(jnp.cumsum(z, axis=-2), 1.0), obs=jnp.ones((3, 4)))

    def guide():
        with numpyro.plate("row", 3, dim=-2), numpyro.plate("column", 4, dim=-1):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.1), 1.0))

    with pytest.raises(ValueError, match="the plate 'row' are not"):
        VIMCOStar().loss(random.key(0), {}, model, guide)
    assert np.isfinite(VIMCOStar(joint_plates=["row"]).loss(random.key(0), {}, model, guide))


def test_guide_may_be_what_depends():
    def model():
        with numpyro.plate("data", 4):
            numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("u", dist.Normal(0.0, 1.0))

    def guide():
        with numpyro.plate("data", 4):
            u = numpyro.sample("u", dist.Normal(numpyro.param("loc", 0.1), 1.0))
            numpyro.sample("z", dist.Bernoulli(logits=jnp.cumsum(u)))

    with pytest.raises(ValueError, match="the plate 'data' are not independent: the density of site 'z'"):
        VIMCOStar().loss(random.key(0), {}, model, guide)


def test_dependence_inside_of_a_plate_with_particles_of_its_own():
    def program(sample):
        g = sample("g")
        with numpyro.plate("time", 5):
            return g, sample("eps")

    def model(link=jnp.cumsum):
        g, eps = program(lambda name: numpyro.sample(name, dist.Normal(0, 1)))
        with numpyro.plate("time", 5):
            numpyro.sample("y", dist.Normal(g + link(eps), 0.5), obs=Y)

    def guide(link=None):
        program(lambda name: numpyro.sample(name, dist.Normal(numpyro.param(f"{name}_loc", 0.1), 1.0)))

    objective = VIMCOStar(plate_particles={"time": 4})
    with pytest.raises(ValueError, match="the plate 'time' are not independent: the density of site 'y'"):
        objective.loss(random.key(0), {}, model, guide)
    assert np.isfinite(objective.loss(random.key(0), {}, model, guide, link=jnp.sin))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_joint_plates_share_one_weight(alpha):
    """The numbers of the same program with a site outside of the plate, key by key."""

    def value_and_grad(objective, model):
        loss = jax.value_and_grad(lambda params: objective.loss(random.key(3), params, model, walk_guide, Y))
        return jax.jit(loss)({"loc": jnp.full(5, 0.2), "logits": jnp.full(5, -0.5)})

    joint = value_and_grad(VIMCOStar(alpha, 8, joint_plates=["time"]), walk(jnp.cumsum))
    expected = value_and_grad(VIMCOStar(alpha, 8), walk(jnp.cumsum, joint_site=True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), joint, expected)


def test_a_fit_that_is_annealed_looks_before_its_steps():
    model = walk(jnp.cumsum)
    with pytest.raises(ValueError, match="the plate 'time' are not independent"):
        fit(SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar()), random.key(0), 1, Y, progress_bar=False)


def test_traced_data_are_not_looked_at():
    svi = SVI(walk(jnp.cumsum), walk_guide, optax.adam(0.05), VIMCOStar())
    state = svi.init(random.key(0), Y)
    assert np.isfinite(jax.jit(svi.update)(state, Y)[1])


def test_errors_of_joint_plates():
    loss = lambda objective: objective.loss(random.key(0), {}, walk(jnp.tanh), walk_guide, Y)  # noqa: E731
    with pytest.raises(ValueError, match=r"`joint_plates` names the plate 'tim', which no site is in.*'time'"):
        loss(VIMCOStar(joint_plates="tim"))
    with pytest.raises(ValueError, match="'time' is named in `joint_plates` and in `plate_particles`"):
        loss(VIMCOStar(joint_plates=["time"], plate_particles={"time": 2}))


def test_joint_plate_cannot_be_subsampled_below_alpha_one():
    def program(sample):
        with numpyro.plate("data", 4, subsample_size=2):
            sample("z")

    def model():
        program(lambda name: numpyro.sample(name, dist.Bernoulli(0.3)))

    def guide():
        program(lambda name: numpyro.sample(name, dist.Bernoulli(logits=numpyro.param("logits", 0.1))))

    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\), and named in `joint_plates`"):
        VIMCOStar(0.5, joint_plates=["data"]).loss(random.key(0), {}, model, guide)
    assert np.isfinite(VIMCOStar(1.0, joint_plates=["data"]).loss(random.key(0), {}, model, guide))


def test_automatic_guides_pass():
    model = walk(jnp.tanh)
    svi = SVI(model, AutoMixed(model, structure="mean_field"), optax.adam(0.05), VIMCOStar())
    assert np.isfinite(svi.run(random.key(0), 2, Y, progress_bar=False).losses).all()


def test_model_that_holds_a_traced_value_is_not_looked_at():
    def loss(power):
        def model():
            with numpyro.plate("time", 5):
                eps = numpyro.sample("eps", dist.Normal(0, 0.7))
                with numpyro.handlers.scale(scale=power):
                    numpyro.sample("y", dist.Normal(jnp.cumsum(eps) * power, 0.5), obs=Y)

        def guide():
            with numpyro.plate("time", 5):
                numpyro.sample("eps", dist.Normal(numpyro.param("loc", jnp.zeros(5)), 0.5))

        return VIMCOStar(num_particles=4).loss(random.key(0), {}, model, guide)

    assert np.isfinite(jax.jit(loss)(0.5))
