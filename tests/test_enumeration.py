"""Sites that are summed out: values and gradients are those of the same model summed out by hand, key by key."""

from functools import partial
from itertools import product
import sys

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, markov
import numpyro.distributions as dist
from numpyro.handlers import mask, scale
from numpyro.infer import SVI, TraceEnum_ELBO
import optax
import pytest

from helpers import UNBIASED, Program, exact_bound, expected_estimate, of_two_lengths, product_of
from numpyro_vimco import REINFORCE, VIMCO, ReweightedWakeSleep, VIMCOStar, fit
from numpyro_vimco.fitting.tempering import TemperedModel

MARK = {"enumerate": "parallel"}
X = np.array([0.3, 2.1, -0.7, -0.2, 1.4])
PAIRS = np.array([[0.3, 2.1], [-0.7, -0.2], [1.4, 0.6]])
SEQUENCES = np.array([[0.3, 2.1, 1.7, 0.4], [-0.7, -0.2, 0.1, 1.9], [1.4, 0.6, 0.2, -0.3]])  # by sequence and time
LENGTHS = np.array([4, 2, 3])
COUNTS = np.array([0, 2, 1])


def normal(x, loc, width=1.0):
    return dist.Normal(loc, width).log_prob(x)


def bernoulli(probability):
    return jnp.log(jnp.stack([1 - probability, probability]))


def means_guide():
    with numpyro.plate("cluster", 2):
        numpyro.sample("means", dist.Normal(numpyro.param("loc", np.array([-0.2, 1.5])), 0.3))


def draw_means():
    with numpyro.plate("cluster", 2):
        return numpyro.sample("means", dist.Normal(0.0, 3.0))


def weight():
    return numpyro.param("weight", 0.3)


# Each case: the model, the same model with sums by hand, the guide, and arguments of the objective.


def mixture():
    def model():
        means = draw_means()
        with numpyro.plate("data", 5):
            z = numpyro.sample("z", dist.Bernoulli(weight()), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(means[z], 1.0), obs=X)

    def by_hand():
        means = draw_means()
        with numpyro.plate("data", 5):
            table = bernoulli(weight())[:, None] + normal(X, means[:, None])
            numpyro.factor("x", logsumexp(table, 0))

    return model, by_hand, means_guide, {}


def mixture_with_config():
    """All finite sites are marked, but one is sampled by the guide."""

    @config_enumerate
    def model():
        means = draw_means()
        shift = numpyro.sample("shift", dist.Bernoulli(0.4))
        with numpyro.plate("data", 5):
            z = numpyro.sample("z", dist.Categorical(jnp.stack([1 - weight(), weight()])))
            numpyro.sample("x", dist.Normal(means[z] + shift, 1.0), obs=X)

    def by_hand():
        means = draw_means()
        shift = numpyro.sample("shift", dist.Bernoulli(0.4))
        with numpyro.plate("data", 5):
            table = bernoulli(weight())[:, None] + normal(X, means[:, None] + shift)
            numpyro.factor("x", logsumexp(table, 0))

    def guide():
        means_guide()
        numpyro.sample("shift", dist.Bernoulli(logits=numpyro.param("logit", 0.2)))

    return model, by_hand, guide, {}


def global_switch():
    """A summed site outside of a plate, on which sites inside depend, and a factor."""

    def model():
        means = draw_means()
        k = numpyro.sample("k", dist.Categorical(jnp.array([0.2, 0.5, 0.3])), infer=dict(MARK))
        numpyro.factor("f", 0.3 * k * means[0])
        with numpyro.plate("data", 5):
            z = numpyro.sample("z", dist.Bernoulli(weight()), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(means[z] + 0.5 * k, 1.0), obs=X)

    def by_hand():
        means = draw_means()
        k = jnp.arange(3)
        table = bernoulli(weight())[:, None, None] + normal(X, means[:, None, None] + 0.5 * k[:, None])
        joint = jnp.log(jnp.array([0.2, 0.5, 0.3])) + 0.3 * k * means[0] + logsumexp(table, 0).sum(1)
        numpyro.factor("x", logsumexp(joint))

    return model, by_hand, means_guide, {}


def factorial():
    """Two summed sites, on both of which the data depend."""

    def model():
        means = draw_means()
        with numpyro.plate("data", 5):
            a = numpyro.sample("a", dist.Bernoulli(weight()), infer=dict(MARK))
            b = numpyro.sample("b", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(means[0] * a + means[1] * b, 1.0), obs=X)

    def by_hand():
        means = draw_means()
        prior = bernoulli(weight())[:, None] + jnp.log(jnp.array([0.2, 0.3, 0.5]))
        locs = means[0] * jnp.arange(2)[:, None] + means[1] * jnp.arange(3)
        with numpyro.plate("data", 5):
            numpyro.factor("x", logsumexp(prior[..., None] + normal(X, locs[..., None]), (0, 1)))

    return model, by_hand, means_guide, {}


def nested_plates():
    """A class of each group, with the data of the group in a plate inside."""

    def model():
        means = draw_means()
        with numpyro.plate("group", 3, dim=-2):
            z = numpyro.sample("z", dist.Bernoulli(weight()), infer=dict(MARK))
            with numpyro.plate("member", 2):
                outlier = numpyro.sample("outlier", dist.Bernoulli(0.1), infer=dict(MARK))
                numpyro.sample("x", dist.Normal(means[z], 1.0 + 4 * outlier), obs=PAIRS)

    def by_hand():
        means = draw_means()
        outlier = bernoulli(0.1)[:, None, None, None] + normal(
            PAIRS, means[:, None, None], 1.0 + 4 * jnp.arange(2)[:, None, None, None]
        )
        with numpyro.plate("group", 3):
            numpyro.factor("x", logsumexp(bernoulli(weight())[:, None] + logsumexp(outlier, 0).sum(-1), 0))

    return model, by_hand, means_guide, {}


def local_guide():
    with numpyro.plate("data", 5):
        numpyro.sample("u", dist.Normal(numpyro.param("slope", 0.4) * X, jnp.exp(numpyro.param("log_width", -0.3))))
        numpyro.sample("s", dist.Bernoulli(logits=numpyro.param("switch", 0.4) + X))


def local_sites():
    u = numpyro.sample("u", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.Bernoulli(0.3))
    return numpyro.param("effect", 0.7) * u + s


def local(shared, **arguments):
    """Sampled and summed sites in one plate; ``shared`` has a global latent beside it."""

    def location():
        return numpyro.sample("g", dist.Normal(0.0, 1.0)) if shared else 0.2

    def model():
        g = location()
        with numpyro.plate("data", 5):
            loc = local_sites() + g
            z = numpyro.sample("z", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(loc + z, 1.0), obs=X)

    def by_hand():
        g = location()
        with numpyro.plate("data", 5):
            loc = local_sites() + g
            table = jnp.log(jnp.array([0.2, 0.3, 0.5]))[:, None] + normal(X, loc + jnp.arange(3)[:, None])
            numpyro.factor("x", logsumexp(table, 0))

    def guide():
        if shared:
            numpyro.sample("g", dist.Normal(numpyro.param("g_loc", 0.1), 0.5))
        local_guide()

    return model, by_hand, guide, arguments


def subsampled():
    """A subsampled plate that is common to all sites, and `handlers.scale` around all that are connected."""

    def plated(inside):
        def program():
            with numpyro.plate("data", 5, subsample_size=2) as index:
                u = numpyro.sample("u", dist.Normal(0.0, 1.0))
                with scale(scale=0.6):
                    inside(u, jnp.asarray(X)[index])

        return program

    @plated
    def model(u, x):
        z = numpyro.sample("z", dist.Bernoulli(weight()), infer=dict(MARK))
        numpyro.sample("x", dist.Normal(u + z, 1.0), obs=x)

    @plated
    def by_hand(u, x):
        numpyro.factor("x", logsumexp(bernoulli(weight())[:, None] + normal(x, u + jnp.arange(2)[:, None]), 0))

    def guide():
        with numpyro.plate("data", 5, subsample_size=2) as index:
            numpyro.sample("u", dist.Normal(numpyro.param("slope", 0.4) * jnp.asarray(X)[index], 0.7))

    return model, by_hand, guide, {}


def masked():
    """Data that are masked, and all of an element, with its summed site."""
    there, both = np.array([True, True, False, True, False]), np.array([True, True, True, True, False])

    def model():
        means = draw_means()
        with numpyro.plate("data", 5), mask(mask=both):
            z = numpyro.sample("z", dist.Bernoulli(weight()), infer=dict(MARK))
            with mask(mask=there):
                numpyro.sample("x", dist.Normal(means[z], 1.0), obs=X)

    def by_hand():
        means = draw_means()
        with numpyro.plate("data", 5), mask(mask=there):
            numpyro.factor("x", logsumexp(bernoulli(weight())[:, None] + normal(X, means[:, None]), 0))

    return model, by_hand, means_guide, {}


def impossible():
    """A value of a summed site that the data rule out, with an infinite derivative there."""

    def rate():
        return jnp.exp(draw_means()[0])

    def model():
        r = rate()
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", dist.Bernoulli(weight()), infer=dict(MARK))
            numpyro.sample("x", dist.Poisson(r * z), obs=COUNTS)

    def by_hand():
        r = rate()
        with numpyro.plate("data", 3):
            present = jnp.log(weight()) + dist.Poisson(r).log_prob(COUNTS)
            zero = jnp.where(COUNTS == 0, jnp.log1p(-weight()), -1e30)
            numpyro.factor("x", jnp.logaddexp(present, zero))

    return model, by_hand, means_guide, {}


# Chains: a state of three values, and what is seen of it.

INITIAL = np.array([0.5, 0.2, 0.3])


def transition():
    return jax.nn.softmax(numpyro.param("transition", np.array([[1.0, 0.2, -0.3], [0.1, 0.8, 0.5], [-0.2, 0.0, 1.1]])))


def forward(initial, step, emissions):
    """The log-evidence of a chain, by the forward algorithm; emissions by time and state."""
    alpha = jnp.log(initial) + emissions[0]
    for emission in emissions[1:]:
        alpha = logsumexp(alpha[:, None] + jnp.log(step), 0) + emission
    return logsumexp(alpha)


def level():
    return numpyro.sample("level", dist.Normal(0.0, 1.0))


def level_guide():
    numpyro.sample("level", dist.Normal(numpyro.param("loc", 0.3), 0.4))


def chain_by_hand(xs):
    a = level()
    return forward(INITIAL, transition(), normal(jnp.asarray(xs)[:, None], a * jnp.arange(3)))


def hmm_in_loop():
    def model():
        a, step = level(), transition()
        state = None
        for t in markov(range(4)):
            probs = jnp.asarray(INITIAL) if state is None else step[state]
            state = numpyro.sample(f"state_{t}", dist.Categorical(probs), infer=dict(MARK))
            numpyro.sample(f"x_{t}", dist.Normal(a * state, 1.0), obs=X[t])

    def by_hand():
        numpyro.factor("x", chain_by_hand(X[:4]))

    return model, by_hand, level_guide, {}


def hmm_in_scan(reverse=False):
    def model():
        a, step = level(), transition()

        def move(carry, x):
            state, t = carry
            probs = jnp.where(t == 0, jnp.asarray(INITIAL), step[state])
            state = numpyro.sample("state", dist.Categorical(probs), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(a * state, 1.0), obs=x)
            return (state, t + 1), None

        scan(move, (0, 0), jnp.asarray(X[::-1] if reverse else X), reverse=reverse)

    def by_hand():
        numpyro.factor("x", chain_by_hand(X))

    return model, by_hand, level_guide, {}


def hmm_of_sequences(arguments=None, in_plate=False):
    """Sequences of different lengths, as in NumPyro's examples; ``in_plate`` has a latent of each sequence."""

    def shifts():
        if not in_plate:
            return level()
        with numpyro.plate("sequence", 3):
            return numpyro.sample("shift", dist.Normal(0.0, 1.0))

    def model():
        a, step = shifts(), transition()

        def move(carry, x):
            state, t = carry
            with numpyro.plate("sequence", 3), mask(mask=t < LENGTHS):
                probs = jnp.where(t == 0, jnp.asarray(INITIAL), step[state])
                state = numpyro.sample("state", dist.Categorical(probs), infer=dict(MARK))
                numpyro.sample("x", dist.Normal(a * state, 1.0), obs=x)
            return (state, t + 1), None

        scan(move, (jnp.zeros(3, int), 0), jnp.asarray(SEQUENCES.T))

    def by_hand():
        a, step = jnp.broadcast_to(shifts(), 3), transition()
        found = [
            forward(INITIAL, step, normal(jnp.asarray(SEQUENCES[i, :length, None]), a[i] * jnp.arange(3)))
            for i, length in enumerate(LENGTHS)
        ]
        with numpyro.plate("sequence", 3):
            numpyro.factor("x", jnp.stack(found))

    def guide():
        if not in_plate:
            return level_guide()
        with numpyro.plate("sequence", 3):
            numpyro.sample("shift", dist.Normal(numpyro.param("loc", 0.3), 0.4))

    return model, by_hand, guide, arguments or {}


def hmm_of_second_order():
    """A state depends on the two before it: `history=2`."""

    def kernel():
        return jax.nn.softmax(numpyro.param("kernel", np.linspace(-1.0, 1.0, 8).reshape(2, 2, 2) ** 2))

    def model():
        a, step = level(), kernel()

        def move(carry, x):
            before, last = carry
            state = numpyro.sample("state", dist.Categorical(step[before, last]), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(a * state - 0.4 * last, 1.0), obs=x)
            return (last, state), None

        scan(move, (0, 0), jnp.asarray(X), history=2)

    def by_hand():
        a, step = level(), jnp.log(kernel())
        emissions = normal(X[:, None, None], a * jnp.arange(2) - 0.4 * jnp.arange(2)[:, None])  # time, last, state
        alpha = (step[0, 0] + emissions[0, 0])[:, None] + step[0] + emissions[1]
        for emission in emissions[2:]:
            alpha = logsumexp(alpha[..., None] + step, 0) + emission
        numpyro.factor("x", logsumexp(alpha))

    return model, by_hand, level_guide, {}


def switching():
    """In one `scan`, a sampled switch and a summed state, which the data of the next time depend on."""

    def scanned(visit):
        def program():
            a, step = level(), transition()

            def move(state, x):
                jump = numpyro.sample("jump", dist.Bernoulli(0.3))
                return visit(a, step, jump, state, x), jump

            return a, step, scan(move, 1, jnp.asarray(X))[1]

        return program

    @scanned
    def model(a, step, jump, state, x):
        present = numpyro.sample("state", dist.Categorical(step[state]), infer=dict(MARK))
        numpyro.sample("x", dist.Normal(a * state + jump, 1.0), obs=x)
        return present

    draw = scanned(lambda a, step, jump, state, x: state)

    def by_hand():
        a, step, jump = draw()
        emissions = normal(X[:, None], a * jnp.arange(3) + jump[:, None])
        first, last = step[1], jnp.zeros(3)  # the data of a time depend on the state before it
        numpyro.factor("x", emissions[0, 1] + forward(first, step, jnp.concatenate([emissions[1:], last[None]])))

    def guide():
        level_guide()

        def move(carry, logit):
            numpyro.sample("jump", dist.Bernoulli(logits=logit))
            return carry, None

        scan(move, 0, numpyro.param("logits", 0.3 * X))

    return model, by_hand, guide, {}


CASES = {
    "mixture": mixture,
    "config_enumerate": mixture_with_config,
    "global switch": global_switch,
    "factorial": factorial,
    "nested plates": nested_plates,
    "bound per element": partial(local, False),
    "beside a global latent": partial(local, True),
    "plate_particles": partial(local, True, plate_particles={"data": 3}),
    "subsampled": subsampled,
    "masked": masked,
    "impossible": impossible,
    "hmm in a loop": hmm_in_loop,
    "hmm in scan": hmm_in_scan,
    "hmm in scan from the end": partial(hmm_in_scan, reverse=True),
    "hmm of sequences": hmm_of_sequences,
    "hmm, bound per element": partial(hmm_of_sequences, in_plate=True),
    "hmm of second order": hmm_of_second_order,
    "switching": switching,
}


def initial(*programs):
    params = {}
    for program in programs:
        found = numpyro.handlers.trace(numpyro.handlers.seed(program, 0)).get_trace()
        params |= {name: jnp.asarray(s["value"], float) for name, s in found.items() if s["type"] == "param"}
    return params


def value_and_grad(objective, model, guide, params, key=1):
    fn = jax.value_and_grad(lambda params: objective.loss(random.key(key), params, model, guide))
    return jax.jit(fn)(params)


def assert_close(found, expected, tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), found, expected)


def check(name, objective, tolerance):
    model, by_hand, guide, arguments = CASES[name]()
    params = initial(model, guide)
    found = value_and_grad(objective(**arguments), model, guide, params)
    expected = value_and_grad(objective(**arguments), by_hand, guide, params)
    assert_close(found, expected, tolerance)


SHORT = ["mixture", "nested plates", "plate_particles", "hmm in scan from the end"]
# One of each kind of weight; what sums change is the density, the same for all α.
EACH_ALPHA = ["mixture", "bound per element", "plate_particles", "subsampled", "switching"]


@pytest.mark.parametrize(
    "name, alpha",
    of_two_lengths(
        [(name, alpha) for name, alpha in product(CASES, [0.0, 0.3, 1.0]) if alpha == 0.3 or name in EACH_ALPHA],
        [(name, 0.3) for name in SHORT],
    ),
)
@pytest.mark.usefixtures("x64")
def test_sums_by_hand(name, alpha):
    check(name, partial(VIMCOStar, alpha, 4), 1e-10)


IN_SINGLE_PRECISION = ["nested plates", "plate_particles", "impossible", "hmm in a loop", "hmm of sequences", "masked"]


@pytest.mark.long
@pytest.mark.parametrize("name", IN_SINGLE_PRECISION)
def test_sums_by_hand_in_single_precision(name):
    check(name, partial(VIMCOStar, 0.3, 4), 1e-5)


def check_tempered(model, by_hand, guide, arguments, params):
    """Values and gradients where the likelihood counts with an inverse temperature."""
    objective = VIMCOStar(0.3, 4, **arguments)
    found = value_and_grad(objective, TemperedModel(model, jnp.array(0.2)), guide, params)
    assert_close(found, value_and_grad(objective, by_hand, guide, params), 1e-10)


@pytest.mark.parametrize("name", of_two_lengths(CASES, ["mixture"]))
@pytest.mark.usefixtures("x64")
def test_inverse_temperature_of_a_sum(name):
    model, by_hand, guide, arguments = CASES[name]()
    check_tempered(model, TemperedModel(by_hand, jnp.array(0.2)), guide, arguments, initial(model, guide))


@pytest.mark.usefixtures("x64")
def test_inverse_temperature_beside_a_sampled_site_that_depends_on_a_summed_one():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer=dict(MARK))
        u = numpyro.sample("u", dist.Normal(2.0 * z, 1.0))
        numpyro.sample("x", dist.Normal(u - z, 1.0), obs=0.7)

    def by_hand():
        z = jnp.arange(2)
        prior_of_z = dist.Categorical(jnp.array([0.7, 0.3]))
        u = numpyro.sample("u", dist.MixtureSameFamily(prior_of_z, dist.Normal(2.0 * z, 1.0)))
        prior = bernoulli(0.3) + normal(u, 2.0 * z)
        likelihood = logsumexp(prior + normal(0.7, u - z)) - logsumexp(prior)
        numpyro.factor("x", 0.2 * likelihood)

    def guide():
        numpyro.sample("u", dist.Normal(numpyro.param("loc", 0.4), 0.8))

    check_tempered(model, by_hand, guide, {}, {"loc": jnp.array(0.4)})


@pytest.mark.parametrize(
    "make", of_two_lengths([VIMCO, REINFORCE, ReweightedWakeSleep, partial(VIMCOStar, chunk_size=2)], [VIMCO])
)
def test_every_objective(make):
    if make is not ReweightedWakeSleep:
        make = partial(make, 0.3)
    check("beside a global latent", partial(make, num_particles=4), 1e-5)


# TraceEnum_ELBO has no `scan`, and takes the log-density of no joint sample of a scaled site.
@pytest.mark.parametrize(
    "name",
    of_two_lengths(["mixture", "global switch", "factorial", "nested plates", "masked", "hmm in a loop"], ["mixture"]),
)
@pytest.mark.usefixtures("x64")
def test_value_is_that_of_trace_enum_elbo(name):
    model, _, guide, _ = CASES[name]()
    params = initial(model, guide)
    keys = random.split(random.key(3), 4)

    def same_keys(fn, _):
        return jax.vmap(fn)(keys)

    ours = VIMCOStar(1.0, 4, same_keys, doubly_reparameterized=False).loss(random.key(0), params, model, guide)
    theirs = TraceEnum_ELBO(4, vectorize_particles=same_keys).loss(random.key(0), params, model, guide)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def switches():
    def model():
        on = numpyro.sample("on", dist.Bernoulli(logits=numpyro.param("prior", 0.3)))
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(numpyro.param("weight", 0.4)), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.5) * on * z, 1.0), obs=X[:2])

    def by_hand():
        on = numpyro.sample("on", dist.Bernoulli(logits=numpyro.param("prior", 0.3)))
        with numpyro.plate("data", 2):
            loc = numpyro.param("effect", 1.5) * on * jnp.arange(2)[:, None]
            table = bernoulli(numpyro.param("weight", 0.4))[:, None] + normal(X[:2], loc)
            numpyro.factor("x", logsumexp(table, 0))

    def guide():
        numpyro.sample("on", dist.Bernoulli(logits=numpyro.param("logits", -0.4)))

    return Program(model, guide, product_of(on=[0, 1])), by_hand


@pytest.mark.long
@pytest.mark.parametrize("estimator, alpha", list(product(UNBIASED, [0.0, 0.3, 1.0])))
@pytest.mark.usefixtures("x64")
def test_unbiased_beside_a_sampled_site(estimator, alpha):
    program, by_hand = switches()
    params = initial(program.model, program.guide)
    bound, gradient = expected_estimate(lambda vectorize: UNBIASED[estimator](alpha, 3, vectorize), program, params, 3)
    exact = jax.value_and_grad(lambda params: exact_bound(program._replace(model=by_hand), params, alpha, 3))(params)
    assert_close((bound, gradient), exact, 1e-10)


def test_all_sites_summed_out():
    """Without a sampled site the bound is the evidence, whatever the number of particles."""

    def model():
        with numpyro.plate("data", 5):
            z = numpyro.sample("z", dist.Bernoulli(weight()), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=X)

    def guide():
        numpyro.param("unused", 0.0)

    loss = VIMCOStar(0.0, 3).loss(random.key(0), {"weight": 0.3}, model, guide)
    exact = logsumexp(bernoulli(0.3)[:, None] + normal(X, 2.0 * jnp.arange(2)[:, None]), 0).sum()
    np.testing.assert_allclose(loss, -exact, rtol=1e-5)


def test_nothing_is_imported_without_marks(monkeypatch):
    monkeypatch.setitem(sys.modules, "funsor", None)
    monkeypatch.setitem(sys.modules, "numpyro.contrib.funsor", None)
    program, by_hand = switches()
    params = initial(program.model, program.guide)
    assert np.isfinite(VIMCOStar(0.0, 3).loss(random.key(0), params, by_hand, program.guide))
    with pytest.raises(ImportError, match="pip install funsor"):
        VIMCOStar(0.0, 3).loss(random.key(0), params, program.model, program.guide)


def test_sites_may_share_a_dict():
    """NumPyro writes into the dict `infer` of a site, and its own objectives fail where sites share one."""

    def model():
        with numpyro.plate("data", 5):
            a = numpyro.sample("a", dist.Bernoulli(0.4), infer=MARK)
            b = numpyro.sample("b", dist.Bernoulli(0.2), infer=MARK)
            numpyro.sample("x", dist.Normal(2.0 * a + b, 1.0), obs=X)

    loss = VIMCOStar(0.0, 2).loss(random.key(0), {}, model, lambda: numpyro.param("unused", 0.0))
    table = bernoulli(0.4)[:, None] + bernoulli(0.2)
    locs = 2.0 * jnp.arange(2)[:, None] + jnp.arange(2)
    exact = logsumexp(table[..., None] + normal(X, locs[..., None]), (0, 1)).sum()
    np.testing.assert_allclose(loss, -exact, rtol=1e-5)


def test_observations_that_contradict_each_other():
    """Each favours another value by more than 100 nats; a product of exponentials would be 0, and the loss infinite."""

    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.5), infer=dict(MARK))
            numpyro.sample("a", dist.Normal(15.0 * z, 1.0), obs=np.array([0.0, 1.0]))
            numpyro.sample("b", dist.Normal(15.0 * z, 1.0), obs=np.array([15.0, 14.0]))

    loss = VIMCOStar(0.0, 2).loss(random.key(0), {}, model, lambda: numpyro.param("unused", 0.0))
    locs = 15.0 * jnp.arange(2)[:, None]
    table = normal(np.array([0.0, 1.0]), locs) + normal(np.array([15.0, 14.0]), locs) + np.log(0.5)
    np.testing.assert_allclose(loss, -logsumexp(table, 0).sum(), rtol=1e-5)


# Errors.


def outside_of_plate():
    with numpyro.plate("data", 5):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
    numpyro.sample("x", dist.Normal(jnp.sum(z), 1.0), obs=1.0)


def indexed():
    with numpyro.plate("group", 2):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
    with numpyro.plate("data", 5):
        numpyro.sample("x", dist.Normal(1.0 * z[np.array([0, 1, 1, 0, 1])], 1.0), obs=X)


def outside_of_scan():
    def move(state, x):
        return numpyro.sample("z", dist.Bernoulli(0.3 + 0.4 * state), infer=MARK), None

    last, _ = scan(move, 0, jnp.arange(4.0))
    numpyro.sample("x", dist.Normal(1.0 * last, 1.0), obs=1.0)


def neighbours():
    with numpyro.plate("data", 5):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
        numpyro.sample("x", dist.Normal(1.0 * jnp.cumsum(z, -1), 1.0), obs=X)


def no_plate():
    z = numpyro.sample("z", dist.Bernoulli(0.3 * jnp.ones(5)), infer=MARK)
    numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=X)


def data_without_plate():
    z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
    numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=X)


def not_from_zero():
    z = numpyro.sample("z", dist.DiscreteUniform(2, 4), infer=MARK)
    numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=1.0)


def too_large():
    zs = [numpyro.sample(f"z_{i}", dist.Categorical(jnp.ones(100) / 100), infer=MARK) for i in range(5)]
    numpyro.sample("x", dist.Normal(1.0 * sum(zs), 1.0), obs=1.0)


def two_scales():
    z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
    with numpyro.plate("data", 5, subsample_size=2) as index:
        numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=jnp.asarray(X)[index])


def array_scale():
    with numpyro.plate("data", 5), scale(scale=jnp.arange(1.0, 6.0)):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
        numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=X)


def two_levels():
    z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
    with numpyro.plate("data", 5):
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(1.0 * z + u, 1.0), obs=X)


def second_order():
    states = [0, 0]
    for t in markov(range(4)):
        logits = 0.8 * states[-2] - 0.3 * states[-1]
        states.append(numpyro.sample(f"z_{t}", dist.Bernoulli(logits=logits), infer=dict(MARK)))
        numpyro.sample(f"x_{t}", dist.Normal(1.0 * states[-1], 1.0), obs=X[t])


def no_history():
    def move(carry, x):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer=MARK)
        numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)
        return carry, None

    scan(move, 0, jnp.asarray(X), history=0)


def parameter_in_scan():
    def move(state, x):
        effect = numpyro.param("effect", 0.3)
        state = numpyro.sample("z", dist.Bernoulli(0.3 + 0.4 * state), infer=MARK)
        numpyro.sample("x", dist.Normal(effect * state, 1.0), obs=x)
        return state, None

    scan(move, 0, jnp.asarray(X))


def counted_twice():
    with numpyro.plate("data", 5):
        z = numpyro.sample("z", dist.Bernoulli(0.3).mask(False), infer=MARK)
        numpyro.factor("prior", dist.Bernoulli(0.3).log_prob(z))
        numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=X)


def masked_at_one_element():
    with numpyro.plate("data", 5):
        with mask(mask=X > -0.5):  # x[2] alone is masked, and its datum is not
            z = numpyro.sample("z", dist.Categorical(jnp.ones(3) / 3), infer=MARK)
        numpyro.sample("x", dist.Normal(1.0 * (z == 2), 1.0), obs=X)


def masked_within_a_chain():
    """As in NumPyro's example of capture-recapture: a state after the mask depends on one under it."""

    def move(state, inputs):
        x, seen = inputs
        with mask(mask=seen):
            state = numpyro.sample("z", dist.Bernoulli(0.3 + 0.4 * state), infer=MARK)
            numpyro.sample("x", dist.Normal(1.0 * state, 1.0), obs=x)
        return state, None

    scan(move, 0, (jnp.asarray(X), jnp.array([True, True, False, False, True])))


ERRORS = {
    "counted twice": (counted_twice, {}, "'z' is summed out, and masked where .* site 'prior' depends on it"),
    "masked at one element": (masked_at_one_element, {}, r"'z' is summed out, .* site 'x' .*jnp.zeros\(3\)"),
    "masked within a chain": (masked_within_a_chain, {}, "'z' is summed out, and masked where .* site 'z' depends"),
    "outside of a plate": (outside_of_plate, {}, "'x' depends on 'z', which is summed out, .* the plate 'data'"),
    "indexed": (indexed, {}, "'x' depends on 'z', which is summed out, .* the plate 'group'"),
    "outside of scan": (outside_of_scan, {}, "'x' depends on 'z', which is summed out, .* outside of `scan`"),
    "neighbours": (neighbours, {}, "'x' has another density where 'z' is summed out"),
    "no plate": (no_plate, {}, r"'z' is marked .* batch dimensions of sizes \[5\]"),
    "data without a plate": (data_without_plate, {}, r"'x' has batch dimensions of sizes \[5\] .* depends on 'z'"),
    "not from zero": (not_from_zero, {}, "'z' is marked .* not known to be 0, 1"),
    "too large": (too_large, {}, "'x' at all values .* a table of 10,000,000,000 numbers"),
    "two scales": (two_scales, {"alpha": 1.0}, r"different scales \(1 of 'z', 2.5 of 'x'\)"),
    "array of scales": (array_scale, {}, r"summed ones \('z'\) have a scale that is an array"),
    "two levels": (two_levels, {"plate_particles": {"data": 2}}, "inside and outside of the plate 'data'"),
    "second order": (second_order, {}, "'z_2' has another density where 'z_0' is summed out"),
    "parameter in scan": (parameter_in_scan, {}, "Parameter 'effect' is declared inside of `scan`"),
    "no history": (no_history, {}, "'z' is marked .* NumPyro cannot enumerate it"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    model, arguments, message = ERRORS[name]

    def guide():
        loc = numpyro.param("loc", 0.0)
        if model is two_levels:
            with numpyro.plate("data", 5):
                numpyro.sample("u", dist.Normal(loc, 1.0))
        if model is two_scales:
            numpyro.plate("data", 5, subsample_size=2)

    with pytest.raises((ValueError, NotImplementedError), match=message):
        VIMCOStar(num_particles=2, **arguments).loss(random.key(0), {"loc": 0.0}, model, guide)


def test_a_tempered_fit_begins_with_the_same_check():
    svi = SVI(counted_twice, lambda: numpyro.param("loc", 0.0), optax.adam(0.01), VIMCOStar())
    with pytest.raises(ValueError, match="'z' is summed out, and masked"):
        fit(svi, random.key(0), 1, progress_bar=False)


def test_masks_without_effect_are_no_error():
    """A mask that hides nothing, one over latents that nothing depends on, and one that hides the data too."""

    def model():
        with numpyro.plate("data", 5):
            with mask(mask=X > -9.0):
                z = numpyro.sample("z", dist.Bernoulli(0.3), infer=dict(MARK))
            numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=X)
            with mask(mask=X > -0.5):
                u = numpyro.sample("u", dist.Bernoulli(0.4), infer=dict(MARK))
                numpyro.sample("y", dist.Normal(1.0 * u, 1.0), obs=X)
            numpyro.sample("unused", dist.Bernoulli(0.4).mask(False), infer=dict(MARK))

    loss = VIMCOStar(0.0, 2).loss(random.key(0), {}, model, lambda: numpyro.param("loc", 0.0))
    x, y = (logsumexp(bernoulli(p)[:, None] + normal(X, jnp.arange(2.0)[:, None]), 0) for p in (0.3, 0.4))
    np.testing.assert_allclose(loss, -(x.sum() + y[X > -0.5].sum()), rtol=1e-5)


def test_a_covariate_that_is_known_in_part():
    known, values = np.array([True, False, True, True, False]), np.array([1, 0, 0, 1, 0])

    def model():
        with numpyro.plate("data", 5):
            z = numpyro.sample("z", dist.Bernoulli(0.3), obs=values, obs_mask=known, infer=dict(MARK))
            numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=X)

    loss = VIMCOStar(0.0, 2).loss(random.key(0), {}, model, lambda: numpyro.param("loc", 0.0))
    table = bernoulli(0.3)[:, None] + normal(X, jnp.arange(2.0)[:, None])
    exact = jnp.where(known, table[values, jnp.arange(5)], logsumexp(table, 0)).sum()
    np.testing.assert_allclose(loss, -exact, rtol=1e-5)
