"""Elements of a plate that are not independent are found, and can be given one weight."""

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, TraceEnum_ELBO
import optax
import pytest

from numpyro_vimco import VIMCO, AutoMixed, Posterior, ReweightedWakeSleep, VIMCOStar, fit
from numpyro_vimco.checks.independence import splits
from numpyro_vimco.fitting import steps

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


def test_a_tempered_fit_looks_before_its_steps():
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


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 65])
def test_any_two_elements_are_apart_in_a_split(size):
    rows = splits(size)
    assert rows.shape == (int(np.ceil(np.log2(size))), size)
    assert (rows[:, :, None] != rows[:, None, :]).any(0)[~np.eye(size, dtype=bool)].all()


def of_indicators(link, size=4, prob=0.4):
    """Observations of indicators that a link combines."""

    def model():
        with numpyro.plate("place", size):
            z = numpyro.sample("z", dist.Bernoulli(prob))
            numpyro.sample("x", dist.Normal(link(z), 1.0), obs=jnp.linspace(0.2, 3.1, size))

    return model


def indicators_guide(size=4, logit=0.1):
    def guide():
        with numpyro.plate("place", size):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.full(size, logit))))

    return guide


COUPLES = {
    "all": of_indicators(lambda z: 2 * z + 1.5 * z[jnp.array([1, 0, 3, 2])]),
    "one": of_indicators(lambda z: 2 * z + 1.5 * z[jnp.array([0, 2, 1, 3])]),
}


@pytest.mark.parametrize("couples", COUPLES)
@pytest.mark.parametrize("objective", [VIMCOStar(), VIMCOStar(plate_particles={"place": 4})], ids=["common", "local"])
def test_couples_are_found(couples, objective):
    with pytest.raises(ValueError, match="the plate 'place' are not independent: the density of site 'x'"):
        objective.loss(random.key(0), {}, COUPLES[couples], indicators_guide())


def test_couples_have_no_log_likelihood_of_elements():
    def model():
        numpyro.sample("u", dist.Normal(0, 1))
        COUPLES["all"]()

    def guide():
        numpyro.sample("u", dist.Normal(numpyro.param("loc", 0.1), 1.0))
        indicators_guide()()

    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar())
    posterior = Posterior(svi, svi.run(random.key(0), 2, progress_bar=False))
    with pytest.warns(UserWarning, match="'place' has latents of its own, which cannot be averaged out"):
        tree = posterior.to_arviz(num_samples=50)
    assert "log_likelihood" not in tree


def test_sum_that_moves_an_axis_is_found():
    def model():
        with numpyro.plate("row", 3, dim=-1):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            with numpyro.plate("column", 3, dim=-2):
                numpyro.sample("x", dist.Normal(z[:, None] + z[None, :], 1.0), obs=jnp.ones((3, 3)))

    with pytest.raises(ValueError, match="the plate 'row' are not independent: the density of site 'x'"):
        guide = AutoMixed(model, structure="mean_field")
        SVI(model, guide, optax.adam(0.05), VIMCOStar()).run(random.key(0), 2, progress_bar=False)


RARE = {
    "product": lambda z: z * jnp.roll(z, 1),
    "two of many": lambda z: z + z[0] * z[1] * (jnp.arange(len(z)) == 1),
    "softmax": lambda z: jax.nn.softmax(5.0 * z),
    "alone": lambda z: 1.0 * z * (z.sum() == 1),
    "centred": lambda z: z - z.mean(),
    "last": lambda z: z + z[-1],
}


@pytest.mark.parametrize("link", RARE)
def test_dependence_of_rare_indicators_is_found(link):
    model, guide = of_indicators(RARE[link], 40, 0.02), indicators_guide(40, -4.0)
    with pytest.raises(ValueError, match="the plate 'place' are not independent"):
        VIMCOStar().loss(random.key(0), {}, model, guide)


def test_dependence_of_rare_counts_is_found():
    def model():
        with numpyro.plate("place", 6):
            n = numpyro.sample("n", dist.Poisson(0.02))
            numpyro.sample("x", dist.Normal(jnp.minimum(n, jnp.roll(n, 1)), 1.0), obs=jnp.zeros(6))

    def guide():
        with numpyro.plate("place", 6):
            numpyro.sample("n", dist.Poisson(numpyro.param("rate", jnp.full(6, 0.02))))

    with pytest.raises(ValueError, match="the plate 'place' are not independent"):
        VIMCOStar().loss(random.key(0), {}, model, guide)


def test_dependence_where_the_guide_has_a_bound_that_is_a_parameter():
    """Its draws have plain gradients, and are exchanged like all others."""

    def model():
        with numpyro.plate("place", 3):
            z = numpyro.sample("z", dist.Uniform(0, 3))
            numpyro.sample("x", dist.Normal(jnp.cumsum(z), 1.0), obs=jnp.ones(3))

    def guide():
        with numpyro.plate("place", 3):
            numpyro.sample("z", dist.Uniform(0, numpyro.param("high", jnp.ones(3))))

    with pytest.raises(ValueError, match="the plate 'place' are not independent: the density of site 'x'"):
        VIMCOStar().loss(random.key(0), {}, model, guide)


def shifted_by_the_largest(z):
    """A sum of exponentials that is computed with the largest of all elements, which cancels."""
    top = z.max()
    numpyro.sample("x", dist.Normal(top + jnp.log(jnp.exp(z - top) + jnp.exp(-z - top)), 0.01), obs=jnp.ones(4))


def large_densities(z):
    """Those of many precise data, of a location that has the rounding of all elements."""
    shift = 30 * z.sum()
    loc = (z + shift) - shift
    numpyro.sample("x", dist.Normal(loc[:, None], 1e-3).expand([4, 1000]).to_event(1), obs=jnp.full((4, 1000), 30.0))


@pytest.mark.parametrize("data", [shifted_by_the_largest, large_densities])
def test_rounding_is_no_dependence(data):
    def model():
        with numpyro.plate("place", 4):
            data(numpyro.sample("z", dist.Normal(0, 3)))

    def guide():
        with numpyro.plate("place", 4):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(4)), 1.0))

    VIMCOStar().check({}, model, guide)


def test_improper_prior_is_drawn_by_the_guide_and_elsewhere():
    def model(link):
        with numpyro.plate("place", 4):
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            numpyro.sample("x", dist.Normal(link(z), 1.0), obs=jnp.ones(4))

    def guide(link):
        with numpyro.plate("place", 4):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(4)), 1.0))

    VIMCOStar().check({}, model, guide, jnp.sin)
    with pytest.raises(ValueError, match="the plate 'place' are not independent"):
        VIMCOStar().check({}, model, guide, jnp.cumsum)


@pytest.mark.parametrize("tempering", [0, 0.5, lambda step: 1.0], ids=["none", "share", "function"])
def test_fit_checks_before_its_first_step(tempering, monkeypatch):
    monkeypatch.setattr(steps.Steps, "run", None)
    svi = SVI(walk(jnp.cumsum), walk_guide, optax.adam(0.05), VIMCOStar())
    with pytest.raises(ValueError, match="the plate 'time' are not independent: the density of site 'y'"):
        fit(svi, random.key(0), 2, Y, tempering=tempering, progress_bar=False)


def test_fit_of_a_joint_plate_goes_on():
    svi = SVI(walk(jnp.cumsum), walk_guide, optax.adam(0.05), VIMCOStar(joint_plates=["time"]))
    assert np.isfinite(fit(svi, random.key(0), 2, Y, num_starts=2, progress_bar=False).losses).all()


def test_fit_checks_sums_and_masked_latents_too():
    with pytest.raises(ValueError, match="'x' has another density where 'z' is summed out"):
        fit(SVI(*rare_sums(), optax.adam(0.05), VIMCOStar()), random.key(0), 2, progress_bar=False)

    def model():
        with numpyro.plate("place", 4):
            with numpyro.handlers.mask(mask=jnp.arange(4) > 1):
                z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.ones(4))

    def guide():
        with numpyro.plate("place", 4):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(4)), 1.0))

    with pytest.raises(ValueError, match="masks elements of the latent site 'z', but the density of site 'x'"):
        fit(SVI(model, guide, optax.adam(0.05), VIMCOStar()), random.key(0), 2, progress_bar=False)


def test_a_fit_that_goes_on_is_checked_at_its_parameters():
    def model():
        rho = numpyro.param("rho", 0.0)
        with numpyro.plate("place", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(z + rho * jnp.roll(z, 1), 1.0), obs=jnp.arange(4.0))

    svi = SVI(model, indicators_guide(), optax.adam(0.2), VIMCOStar())
    with pytest.warns(UserWarning, match="log evidence cannot be estimated"):  # for the same reason
        posterior = fit(svi, random.key(0), 3, num_starts=1, progress_bar=False)
    with pytest.raises(ValueError, match="the plate 'place' are not independent"):
        fit(svi, random.key(0), 3, init_state=posterior.state, progress_bar=False)


def rare_sums():
    """A model with rare indicators that are summed out, and which it combines, and its guide."""

    def model():
        u = numpyro.sample("u", dist.Normal(0, 1))
        with numpyro.plate("place", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.01), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(u + z * jnp.roll(z, 1, axis=-1), 1.0), obs=jnp.arange(4.0))

    def guide():
        numpyro.sample("u", dist.Normal(numpyro.param("loc", 0.1), 1.0))

    return model, guide


@pytest.mark.parametrize("objective", [VIMCOStar(), TraceEnum_ELBO()], ids=["VIMCOStar", "TraceEnum_ELBO"])
def test_diagnostics_check_sums(objective):
    svi = SVI(*rare_sums(), optax.adam(0.05), objective)
    params = {"loc": jnp.array(0.1)}
    with pytest.raises(ValueError, match="'x' has another density where 'z' is summed out"):
        Posterior(svi, params).to_arviz(num_samples=50)


def test_a_large_plate_is_checked():
    model, guide = of_indicators(lambda z: z + jnp.roll(z, 1), 100_000), indicators_guide(100_000)
    with pytest.raises(ValueError, match="the plate 'place' are not independent"):
        VIMCOStar().check({}, model, guide)


def test_automatic_guide_couples_elements_that_the_model_couples():
    def local_dims(link):
        guide = AutoMixed(of_indicators(link))
        numpyro.handlers.seed(guide, 0)()
        return guide._sites[0].elements.local_dims

    assert local_dims(lambda z: 2 * z) == (-1,)
    assert local_dims(lambda z: 2 * z + 1.5 * z[jnp.array([0, 2, 1, 3])]) == ()
    assert local_dims(lambda z: z * jnp.roll(z, 1)) == ()
