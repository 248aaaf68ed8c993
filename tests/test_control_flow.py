"""Sites inside of `scan` and `cond`: each handler of this package, against the same program in loops of Python.

A program takes its control flow as arguments. Run with :func:`loop` and :func:`branch`, all of its sites are ordinary
ones, whose names begin with their times ("1/0/z").
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import cond, scan
from numpyro.contrib.funsor import markov
import numpyro.distributions as dist
from numpyro.handlers import mask, scale, scope, seed, substitute, trace
from numpyro.infer import SVI
import optax
import pytest
from scipy.stats import binom, norm, poisson

from helpers import of_two_lengths
from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit
from numpyro_vimco.densities.levels import Levels
from numpyro_vimco.fitting.tempering import TemperedModel

X = jnp.array([0.5, -1.0, 2.0])
XX = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.0, -0.5]])


def loop(f, init, xs, length=None, reverse=False, history=1):
    """`scan` in Python."""
    length = length or len(jax.tree.leaves(xs)[0])
    carry, ys = init, [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        with scope(prefix=str(t)):
            carry, ys[t] = f(carry, jax.tree.map(lambda x, t=t: x[t], xs))
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def branch(pred, true_fun, false_fun, operand):
    """`cond` in Python."""
    return true_fun(operand) if pred else false_fun(operand)


class Case(NamedTuple):
    model: object
    guide: object


def chain(**options):
    """A discrete and a continuous latent at each time, and data with a mask and a scale."""

    def model(scan, cond):
        def step(carry, x):
            a = numpyro.sample("a", dist.Bernoulli(0.3 + 0.4 * carry))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            with mask(mask=x < 1), scale(scale=2.0):
                numpyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
            return a, numpyro.deterministic("sum", a + 10 * b)

        numpyro.sample("first", dist.Normal(0.0, 1.0))
        scan(step, 1, X, **options)

    def guide(scan, cond):
        loc = numpyro.param("loc", jnp.arange(3.0))

        def step(carry, loc):
            a = numpyro.sample("a", dist.Bernoulli(logits=loc - 1 + 0.3 * carry))
            b = numpyro.sample("b", dist.Normal(0.3 * loc + a, 1.2))
            return b, None

        first = numpyro.sample("first", dist.Normal(0.0, 1.2))
        scan(step, first, loc, **options)

    return Case(model, guide)


def moving_support():
    """Beside a latent whose value is given to a doubly reparameterised gradient, one that is drawn again."""

    def model(scan, cond):
        def step(carry, x):
            a = numpyro.sample("a", dist.Normal(0.1 * carry, 1.0))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
            return b, None

        scan(step, 0.0, X)

    def guide(scan, cond):
        loc = numpyro.param("loc", jnp.arange(3.0))

        def step(carry, loc):
            a = numpyro.sample("a", dist.Normal(0.2 * loc, 1.2))
            b = numpyro.sample("b", dist.Uniform(a - 4 - 0.1 * loc, a + 4 + 0.1 * loc))
            return b, None

        scan(step, 0.0, loc)

    return Case(model, guide)


def plate_inside():
    """A plate, a masked latent and a factor inside of `scan`; data of one dimension more than the latents."""

    def model(scan, cond):
        def step(carry, x):
            with numpyro.plate("rows", 3):
                with mask(mask=jnp.array([True, True, False])):
                    a = numpyro.sample("a", dist.Bernoulli(0.3 + 0.4 * carry))
                b = jnp.where(jnp.array([True, True, False]), a, 0)
                numpyro.sample("x", dist.Normal(1.0 * b, 1.0).expand([3]), obs=x)
            numpyro.factor("together", 0.1 * b.sum())
            return 1.0 * b, None

        scan(step, jnp.zeros(3), XX)

    def guide(scan, cond):
        def step(carry, logits):
            with numpyro.plate("rows", 3):
                return carry, numpyro.sample("a", dist.Bernoulli(logits=logits))

        scan(step, 0, numpyro.param("logits", 0.3 * XX))

    return Case(model, guide)


def nested():
    def model(scan, cond):
        def row(carry, x):
            def step(carry, x):
                z = 1.0 * numpyro.sample("z", dist.Binomial(4, 0.2 + 0.1 * carry))
                u = numpyro.sample("u", dist.Normal(z, 1.0))
                numpyro.sample("x", dist.Normal(u, 1.0), obs=x)
                return z, None

            return scan(step, carry, x, reverse=True)

        scan(row, 0.0, XX)

    def guide(scan, cond):
        def row(carry, prob):
            def step(carry, prob):
                z = numpyro.sample("z", dist.Binomial(4, prob))
                return carry, numpyro.sample("u", dist.Normal(z + 0.1 * prob, 1.1))

            return scan(step, carry, prob)

        scan(row, 0, numpyro.param("prob", 0.4 + 0.1 * XX))

    return Case(model, guide)


def in_branches():
    """In branches of `cond`: latents, data, a deterministic site, a factor, a mask, a scale; of model and guide."""

    def model(scan, cond):
        z = numpyro.sample("z", dist.Bernoulli(0.3))

        def of(loc):
            def draw(operand):
                mu = numpyro.sample("mu", dist.Normal(loc + operand, 1.0))
                with numpyro.plate("data", 3), mask(mask=X < 1), scale(scale=0.5):
                    numpyro.sample("y", dist.Normal(loc + mu, 1.0), obs=X)
                numpyro.factor("factor", -0.1 * mu * loc)
                return numpyro.deterministic("double", (2 + loc) * mu)

            return draw

        double = cond(z == 1, of(3.0), of(0.0), 0.1)
        numpyro.sample("x", dist.Normal(double, 1.0), obs=1.0)

    def guide(scan, cond):
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.3)))
        loc = numpyro.param("loc", jnp.array([0.5, 1.0]))
        cond(
            z == 1,
            lambda scale: numpyro.sample("mu", dist.Normal(loc[1], scale)),
            lambda scale: numpyro.sample("mu", dist.Normal(loc[0], scale)),
            1.5,
        )

    return Case(model, guide)


def each_in_the_other():
    """A `cond` at each time of `scan`, and a `scan` in branches of `cond`."""

    def model(scan, cond):
        def step(carry, x):
            n = cond(
                x > 0,
                lambda carry: numpyro.sample("n", dist.Binomial(4, 0.3 + 0.03 * carry)),
                lambda carry: numpyro.sample("n", dist.Binomial(4, 0.5)),
                carry,
            )
            numpyro.sample("x", dist.Normal(n, 1.0), obs=x)
            return 1.0 * n, None

        def last(total):
            def step(carry, x):
                m = numpyro.sample("m", dist.Binomial(4, 0.3 + 0.03 * total))
                numpyro.sample("xx", dist.Normal(m, 1.0), obs=x)
                return carry, None

            return scan(step, total, X, reverse=True)[0]

        total, _ = scan(step, 0.0, X, reverse=True)
        cond(total > 2, last, lambda total: last(0.5 * total), total)

    def guide(scan, cond):
        probs = numpyro.param("probs", 0.4 + 0.1 * X)
        scan(lambda carry, prob: (carry, numpyro.sample("n", dist.Binomial(4, prob))), 0, probs)
        scan(lambda carry, prob: (carry, numpyro.sample("m", dist.Binomial(4, prob))), 0, probs[::-1])

    return Case(model, guide)


def outside_in_guide():
    """A guide without control flow for a model with it: an array for all times."""

    def guide(scan, cond):
        loc = numpyro.param("loc", jnp.arange(3.0))
        numpyro.sample("first", dist.Normal(0.0, 1.2))
        numpyro.sample("a", dist.Bernoulli(logits=loc - 1))
        numpyro.sample("b", dist.Normal(loc, 1.2))

    return Case(chain(reverse=True).model, guide)


def markov_loop():
    """A loop of Python over `markov`, whose sites have names of their own."""

    def model(scan, cond):
        z = 0
        for t in markov(range(3)):
            z = numpyro.sample(f"z_{t}", dist.Poisson(1.0 + z))
            numpyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=X[t])

    def guide(scan, cond):
        rates = numpyro.param("rates", 1 + X**2)
        for t in markov(range(3)):
            numpyro.sample(f"z_{t}", dist.Poisson(rates[t]))

    return Case(model, guide)


CASES = {
    "scan": chain(),
    "reverse": chain(reverse=True),
    "history": chain(history=2),
    "reverse with history": chain(reverse=True, history=2),
    "no history": chain(history=0),
    "moving support": moving_support(),
    "plate in scan": plate_inside(),
    "nested scan": nested(),
    "cond": in_branches(),
    "cond in scan and scan in cond": each_in_the_other(),
    "scan in the model only": outside_in_guide(),
    "markov": markov_loop(),
}
PARAMS_OF = {
    name: {
        site["name"]: site["value"]
        for site in trace(seed(case.guide, 0)).get_trace(loop, branch).values()
        if site["type"] == "param"
    }
    for name, case in CASES.items()
}


def program_of(name, power=None):
    model, guide = CASES[name]
    model = model if power is None else TemperedModel(model, power)
    return VIMCOStar(num_particles=4).program(model, guide, (scan, cond), {}, jax.random.key(0))


def propose(name, key, power=None):
    """The latents of one particle, its log-density in the model and that in the guide."""
    levels, _ = program_of(name, power).propose(PARAMS_OF[name], key)
    values, densities = levels.shared
    return values, densities.model.sum(), densities.log_guide.sum()


def in_loops(program, params, values):
    """The trace of a program in loops of Python, at values with leading dimensions for time."""

    def value_of(site):
        *times, name = site["name"].split("/")
        if site["type"] == "param":
            return params.get(name)
        if site["type"] == "sample" and not site["is_observed"] and name in values:
            value = values[name]
            for time in times:
                value = value[int(time)]
            return value
        return None

    return trace(substitute(seed(program, 0), substitute_fn=value_of)).get_trace(loop, branch)


def log_density_in_loops(program, params, values, is_in):
    total = 0.0
    for site in in_loops(program, params, values).values():
        if site["type"] == "sample" and is_in(site):
            total += site["fn"].log_prob(site["value"]).sum() * (1.0 if site["scale"] is None else site["scale"])
    return total


@pytest.mark.parametrize("power", [None, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_densities_are_those_of_loops_in_python(name, power):
    for key in jax.random.split(jax.random.key(1), 4):
        values, log_p, log_q = propose(name, key, power)
        prior, data = (
            log_density_in_loops(CASES[name].model, {}, values, lambda site, d=d: site["is_observed"] is d)
            for d in (False, True)
        )
        np.testing.assert_allclose(log_p, prior + (1 if power is None else power) * data, rtol=1e-4, atol=1e-4)
        if name != "plate in scan":  # there the model masks elements of the guide's latents
            expected = log_density_in_loops(CASES[name].guide, PARAMS_OF[name], values, lambda site: True)
            np.testing.assert_allclose(log_q, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_draws_come_from_the_density_that_is_computed_for_them(name):
    keys = jax.random.split(jax.random.key(2), 20_000)
    # Without the data the evidence is 1, so that this is the mean of weights.
    _, log_p, log_q = jax.jit(jax.vmap(lambda key: propose(name, key, 0.0)))(keys)
    weight = np.exp(np.asarray(log_p - log_q, float))
    error = weight.std() / len(keys) ** 0.5
    # Five standard errors: fails less than once in 1.7 million runs.
    assert error < 0.05 and abs(weight.mean() - 1) < 5 * error


@pytest.mark.parametrize("name", CASES)
def test_given_values_have_the_same_densities(name):
    key = jax.random.key(3)
    values, log_p, log_q = propose(name, key)
    levels, _ = program_of(name).densities(PARAMS_OF[name], jax.random.key(4), Levels(values, {}))
    np.testing.assert_allclose(levels.shared.model.sum(), log_p, rtol=1e-5)
    np.testing.assert_allclose(levels.shared.log_guide.sum(), log_q, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_both_gradients_have_the_same_loss(name):
    losses = [
        VIMCOStar(num_particles=4, doubly_reparameterized=doubly).loss(
            jax.random.key(5), PARAMS_OF[name], *CASES[name], scan, cond
        )
        for doubly in (True, False)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


DETERMINISTIC = {
    "reverse": ("sum", lambda a, b, **_: a + 10 * b),
    "cond": ("double", lambda z, mu, **_: (2 + 3 * z) * mu),
}


@pytest.mark.parametrize("name", of_two_lengths(DETERMINISTIC, ["reverse"]))
def test_draws_after_the_fit(name):
    site, expected = DETERMINISTIC[name]
    model, guide = (partial(program, scan, cond) for program in CASES[name])
    posterior = Posterior(SVI(model, guide, optax.adam(0.01), VIMCOStar()), PARAMS_OF[name])
    factor = pytest.warns(UserWarning, match="log-likelihood is without 'factor'") if name == "cond" else nullcontext()
    with factor:
        tree = posterior.to_arviz(rng_key=jax.random.key(0), num_samples=20, progress_bar=False)
    found = {variable: tree["posterior"][variable].values for variable in tree["posterior"].data_vars}
    np.testing.assert_allclose(found[site], expected(**found), rtol=1e-5)
    # The log-densities beside the draws are those of these values, not of others in another order.
    for draw in range(3):
        values = {variable: value[0, draw] for variable, value in found.items()}
        log_p = log_density_in_loops(CASES[name].model, {}, values, lambda site: True)
        np.testing.assert_allclose(tree["sample_stats"]["log_p"].values[0, draw], log_p, rtol=1e-4)


@pytest.mark.parametrize("name", of_two_lengths(DETERMINISTIC, ["reverse"]))
def test_deterministic_sites_of_an_automatic_guide(name):
    site, expected = DETERMINISTIC[name]
    model = partial(CASES[name].model, scan, cond)
    guide = AutoMixed(model)
    params = SVI(model, guide, optax.adam(0.01), VIMCOStar()).run(jax.random.key(0), 1, progress_bar=False).params
    draws = guide.sample_posterior(jax.random.key(1), params, sample_shape=(4, 5))
    np.testing.assert_allclose(draws[site], expected(**draws), rtol=1e-5)
    assert draws[site].shape[:2] == (4, 5)


def counts(in_scan):
    """Counts at a rate that may be zero, in `scan` or in a plate whose elements share a weight."""

    def model():
        rate = numpyro.param("rate", 1.5)

        def step(carry, x):
            z = numpyro.sample("z", dist.Poisson(1.0))
            numpyro.sample("x", dist.Poisson(rate * z), obs=x)
            return carry, None

        if in_scan:
            scan(step, 0, jnp.array([3, 0, 1]))
        else:
            with numpyro.plate("times", 3):
                step(0, jnp.array([3, 0, 1]))

    def guide():
        with numpyro.plate("times", 3) if not in_scan else nullcontext():
            numpyro.sample("z", dist.Poisson(numpyro.param("rates", jnp.ones(3))))

    return model, guide


@pytest.mark.parametrize("z", [[2, 0, 1], [0, 1, 1]], ids=["possible", "impossible"])
def test_zero_weights_have_the_gradient_that_they_have_in_a_plate(z):
    gradients = []
    for in_scan in (True, False):
        program = VIMCOStar(joint_plates=() if in_scan else ["times"]).program(
            *counts(in_scan), (), {}, jax.random.key(0)
        )

        def log_joint(rate, program=program):
            params, values = {"rate": rate, "rates": jnp.ones(3)}, Levels({"z": jnp.array(z)}, {})
            return program.densities(params, jax.random.key(0), values)[0].shared.model.sum()

        gradients.append(jax.value_and_grad(log_joint)(1.5))
    np.testing.assert_allclose(*gradients, rtol=1e-6)
    assert np.isfinite(gradients[0][1]) and np.isfinite(gradients[0][0]) == (z[0] > 0)


def test_a_plate_inside_of_cond_beside_a_summed_site():
    """Two rows and two values, so that an exchange of their dimensions would show in the result only."""
    rows = jnp.array([0.3, 2.0])

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))

        def data(c):
            with numpyro.plate("rows", 2):
                numpyro.sample("x", dist.Normal(c + 2.0 * z, 1.0), obs=rows)

        cond(c > 0, data, lambda c: data(2 * c), c)

    def guide():
        numpyro.sample("c", dist.Normal(numpyro.param("loc", 0.0), 1.0))

    def log_joint(rng_key):
        levels, _ = VIMCOStar().program(model, guide, (), {}, rng_key).propose({"loc": 0.0}, rng_key)
        return levels.shared[0]["c"], levels.shared[1].model.sum()

    for seed_ in range(3):
        c, found = log_joint(jax.random.key(seed_))
        mean = np.where(c > 0, c, 2 * c)
        terms = [np.log(0.7) + norm.logpdf(rows, mean).sum(), np.log(0.3) + norm.logpdf(rows, mean + 2).sum()]
        np.testing.assert_allclose(found, norm.logpdf(c) + np.logaddexp(*terms), rtol=1e-5)


def scanned(body):
    return lambda: scan(lambda carry, x: (carry, body(x)), 0, X)


def in_cond(body):
    return lambda: cond(X[0] > 0, body, body, X[0])


def parameter(x):
    numpyro.sample("z", dist.Normal(numpyro.param("effect", 0.5), 1.0))


def subsample(x):
    numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3, subsample_size=2):
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def latent(x):
    numpyro.sample("z", dist.Normal(0.0, 1.0))


ERRORS = {
    "parameter in scan": (scanned(parameter), [3], "Parameter 'effect' is declared inside of `scan` or `cond`"),
    "parameter in cond": (in_cond(parameter), [], "Parameter 'effect' is declared inside of `scan` or `cond`"),
    "subsample in scan": (scanned(subsample), [3], "Plate 'rows' is subsampled inside of `scan` or `cond`"),
    "subsample in cond": (in_cond(subsample), [], "Plate 'rows' is subsampled inside of `scan` or `cond`"),
    "one value for all times": (scanned(latent), [], r"'z' inside of `scan`, at 3 times, but .* shape \(\)"),
    "too many dimensions": (scanned(latent), [1, 3], r"'z' inside of `scan`, at 3 times, but .* shape \(1, 3\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    model, shape, message = ERRORS[name]

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 1.0).expand(shape))

    with pytest.raises(ValueError, match=message):
        VIMCOStar().loss(jax.random.key(0), {"loc": 0.0}, model, guide)
    with pytest.raises(ValueError, match=message):
        fit(SVI(model, guide, optax.adam(0.01), VIMCOStar()), jax.random.key(0), 1, progress_bar=False)


def fitted(model, guide, num_steps):
    """The posterior of four starts, with what 40,000 pooled draws say."""
    svi = SVI(model, guide, optax.adam(0.03), VIMCOStar(num_particles=16))
    posterior = fit(svi, jax.random.key(0), num_steps, progress_bar=False)
    posterior.diagnose(40_000, jax.random.key(1))
    return posterior


def test_fit_of_latents_in_cond():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        mu = cond(z == 1, lambda _: normal_at(3.0), lambda _: normal_at(0.0), None)
        numpyro.sample("x", dist.Normal(mu, 1.0), obs=2.2)

    def normal_at(loc, scale=1.0):
        return numpyro.sample("mu", dist.Normal(loc, scale))

    def guide():
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.0)))
        locs, scales = numpyro.param("locs", jnp.zeros(2)), jnp.exp(numpyro.param("log_scales", jnp.zeros(2)))
        cond(z == 1, lambda _: normal_at(locs[1], scales[1]), lambda _: normal_at(locs[0], scales[0]), None)

    posterior = fitted(model, guide, 500)
    joint = np.array([0.7 * norm.pdf(2.2, 0, 2**0.5), 0.3 * norm.pdf(2.2, 3, 2**0.5)])
    assert posterior.log_evidence_std_error < 0.01
    # Five standard errors: fails less than once in 1.7 million runs.
    assert abs(posterior.log_evidence - np.log(joint.sum())) < 5 * posterior.log_evidence_std_error
    tree = posterior.to_arviz(rng_key=jax.random.key(2), num_samples=4000, num_proposals=64_000)
    # 4,000 of 64,000 draws: the standard error is 0.009.
    assert abs(tree["posterior"]["z"].values.mean() - joint[1] / joint.sum()) < 5 * 0.009


@pytest.mark.long
def test_pooled_evidence_of_a_guide_in_scan():
    """What draws inside of `scan` are weighted with is the density that they were drawn from."""
    ys = np.array([3, 4, 2, 5, 6, 3])

    def model():
        def step(before, y):
            n = numpyro.sample("n", dist.Poisson(before + 1.0))
            numpyro.sample("y", dist.Binomial(n, 0.5), obs=y)
            return 1.0 * n, None

        scan(step, 8.0, jnp.asarray(ys))

    def guide():
        loc, scale = numpyro.param("loc", 2.0 * ys), jnp.exp(numpyro.param("log_scale", np.full(6, np.log(3.0))))

        def step(before, at_time):
            m, w = at_time
            logits = -0.5 * ((jnp.arange(41) - m - 0.5 * (before - 8)) / w) ** 2
            return 1.0 * numpyro.sample("n", dist.Categorical(logits=logits)), None

        scan(step, 8.0, (loc, scale))

    # The exact evidence, by the forward recursion; counts above 150 have no part in it.
    counts = np.arange(151)
    alpha = np.where(counts == 8, 1.0, 0.0)
    for y in ys:
        alpha = (alpha @ poisson.pmf(counts, counts[:, None] + 1)) * binom.pmf(y, counts, 0.5)
    exact = np.log(alpha.sum())
    assert abs(exact + 12.1915) < 1e-4
    posterior = fitted(model, guide, 300)
    assert posterior.log_evidence_std_error < 0.01
    # Five standard errors: fails less than once in 1.7 million runs.
    assert abs(posterior.log_evidence - exact) < 5 * posterior.log_evidence_std_error
