"""Label switching: a fit with one of two orders has lost a half of the evidence, and is told so.

Data are of the ordered means, so that with a wide prior the posterior is known in each order: a Normal for each mean.
"""

from functools import partial

from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
import pytest
from scipy.stats import norm

from helpers import codes, posterior_at, said
from numpyro_vimco import VIMCOStar
from numpyro_vimco.diagnostics.label_switching import find_lost_labels
from numpyro_vimco.draws import defence
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.moments import Moments

PRIOR, NOISE = 10.0, 0.5
DATA = jnp.array([-3.0, 1.0, 4.0])


@pytest.fixture(autouse=True, scope="module")
def hardly_defended():
    """Next to no defensive draws: these would find the other order, which is then no longer lost without a sign."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defence, "SHARE", 1e-6)
        yield


def posterior(data):
    """Mean and standard deviation of each mean, in order."""
    share = PRIOR**2 / (PRIOR**2 + NOISE**2)
    return data * share, NOISE * share**0.5


def log_evidence(data):
    """Of K means: each order of K! has the evidence of known labels, but for a chance of 1e-5 that they overlap."""
    return norm(0, np.hypot(PRIOR, NOISE)).logpdf(data).sum() + np.log(np.arange(1, len(data) + 1)).sum()


def observed(mean, data):
    numpyro.sample("y", dist.Normal(jnp.sort(mean), NOISE).to_event(1), obs=data)


def in_plate(data):
    with numpyro.plate("component", len(data)):
        mean = numpyro.sample("mean", dist.Normal(0, PRIOR))
    observed(mean, data)


def in_event(data):
    observed(numpyro.sample("mean", dist.Normal(0, PRIOR).expand([len(data)]).to_event(1)), data)


def with_label(data):
    """Which mean a further observation is of; here it is that of the smallest."""
    with numpyro.plate("component", len(data)):
        mean = numpyro.sample("mean", dist.Normal(0, PRIOR))
    observed(mean, data)
    label = numpyro.sample("label", dist.Categorical(jnp.ones(len(data)) / len(data)))
    numpyro.sample("of_smallest", dist.Normal(mean[label] - jnp.min(mean), 1e-3), obs=0.0)


def with_share(data):
    """The share of the first of two: 0.7 of the smaller one."""
    with numpyro.plate("component", 2):
        mean = numpyro.sample("mean", dist.Normal(0, PRIOR))
    observed(mean, data)
    share = numpyro.sample("share", dist.Beta(2, 2))
    numpyro.sample("of_smaller", dist.Normal(jnp.where(mean[0] < mean[1], share, 1 - share), 0.01), obs=0.7)


def with_shares(data):
    """The same as a vector."""
    with numpyro.plate("component", 2):
        mean = numpyro.sample("mean", dist.Normal(0, PRIOR))
    observed(mean, data)
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.full(2, 2.0)))
    numpyro.sample("of_smaller", dist.Normal(shares[jnp.argmin(mean)], 0.01), obs=0.7)


def tilted(data, ratio):
    """The other order of the first two is so many times as probable."""
    mean = numpyro.sample("mean", dist.Normal(0, PRIOR).expand([len(data)]).to_event(1))
    observed(mean, data)
    numpyro.factor("tilt", jnp.where(mean[0] < mean[1], 0.0, jnp.log(ratio)))


def known_by_data(data):
    with numpyro.plate("component", len(data)):
        mean = numpyro.sample("mean", dist.Normal(0, PRIOR))
        numpyro.sample("y", dist.Normal(mean, NOISE), obs=data)


def guide(data, *, means, other=None):
    """In the order of its parameter: exact, but for the shares.

    :param means: ``"plate"`` or ``"event"``.
    :param other: a further latent.
    """
    locs, scale = posterior(numpyro.param("order", data))
    if means == "plate":
        with numpyro.plate("component", len(data)):
            mean = numpyro.sample("mean", dist.Normal(locs, scale))
    else:
        mean = numpyro.sample("mean", dist.Normal(locs, scale).to_event(1))
    smallest = jnp.argmin(mean)
    of_first = jnp.where(smallest == 0, 0.7, 0.3)
    if other == "label":
        numpyro.sample("label", dist.Categorical(logits=jnp.where(jnp.arange(len(data)) == smallest, 0.0, -20.0)))
    elif other == "share":
        numpyro.sample("share", dist.Beta(2000 * of_first, 2000 * (1 - of_first)))
    elif other == "shares":
        numpyro.sample("shares", dist.Dirichlet(2000 * jnp.stack([of_first, 1 - of_first])))


def at(model, guide, starts, *args):
    """The posterior of two starts or more, whose losses prove nothing."""
    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar(num_particles=8))
    posterior = posterior_at(svi, {"order": starts}, *args, losses=np.full((len(starts), 1), 1e4))
    posterior.diagnose(2000, random.key(1))
    return posterior


def in_orders(model, data, orders, **latents):
    """Of starts whose means are in these orders."""
    return at(model, partial(guide, **latents), jnp.stack([data[jnp.array(order)] for order in orders]), data)


PLATE, EVENT = {"means": "plate"}, {"means": "event"}
CASES = [
    (in_plate, PLATE, 2, "'component'"),
    (in_event, EVENT, 2, "'mean'"),
    (with_label, {**PLATE, "other": "label"}, 2, "'component', 'label'"),
    (with_share, {**PLATE, "other": "share"}, 2, "'component', 'share'"),
    pytest.param(with_shares, {**PLATE, "other": "shares"}, 2, "'component', 'shares'", marks=pytest.mark.long),
    (in_plate, PLATE, 3, "'component'"),
    pytest.param(with_label, {**PLATE, "other": "label"}, 3, "'component', 'label'", marks=pytest.mark.long),
]


@pytest.mark.parametrize("model, latents, size, together", CASES)
def test_one_order_is_not_good(model, latents, size, together):
    data = DATA[:size]
    found = in_orders(model, data, [range(size)] * 2, **latents)
    assert not found.starts.agreement["differs"].any() and found.ess > 200
    assert found.verdict == "usable" and codes(found) == ["label-switching"]
    assert f"change places (in {together})" in said(found)


@pytest.mark.parametrize("model, latents, size", [(in_plate, PLATE, 2), (in_event, EVENT, 3)])
def test_evidence_that_is_lost(model, latents, size):
    """As much as the text says for each pair: log K! of K."""
    data = DATA[:size]
    found = in_orders(model, data, [range(size)] * 2, **latents)
    lost = np.log(np.arange(1, size + 1)).sum()
    # Weights vary by widened copies only: a standard error of 0.02 nats at most.
    assert abs(found.log_evidence + lost - log_evidence(np.asarray(data))) < 0.1


@pytest.mark.parametrize("ratio, verdict", [(0.5, "usable"), (0.04, "good")])
def test_order_that_is_less_probable(ratio, verdict):
    found = in_orders(partial(tilted, ratio=ratio), DATA[:2], [range(2)] * 2, **EVENT)
    assert found.verdict == verdict
    assert (f"too low by {np.log1p(ratio):.2f} nats" in said(found)) == (verdict == "usable")


def test_order_that_data_tell():
    assert in_orders(known_by_data, DATA, [range(3)] * 2, **PLATE).verdict == "good"


# Posteriors that have one order only, with exact guides; each was once said to lack another.


def chain():
    """Transitions of a chain of known states: to exchange rows and columns exchanges what has been seen."""
    rows = numpyro.sample("rows", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    numpyro.factor("transitions", (TRANSITIONS * jnp.log(rows)).sum())


TRANSITIONS = jnp.array([[10.0, 2.0], [3.0, 12.0]])


def chain_guide():
    numpyro.param("order", 0.0)
    numpyro.sample("rows", dist.Dirichlet(1 + TRANSITIONS).to_event(1))


def coins():
    """Two coins, with 2 and 8 heads of 10: the other coin with heads and tails exchanged is the same again."""
    with numpyro.plate("coin", 2):
        p = numpyro.sample("p", dist.Beta(1.0, 1.0))
    numpyro.factor("heads", (jnp.log(p) * HEADS + jnp.log1p(-p) * (10 - HEADS)).sum())


HEADS = jnp.array([2.0, 8.0])


def coins_guide():
    numpyro.param("order", 0.0)
    with numpyro.plate("coin", 2):
        numpyro.sample("p", dist.Beta(1 + HEADS, 11 - HEADS))


def imputed():
    """Observed places have dummies in the guide, which are in no order."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with numpyro.plate("time", 5):
        numpyro.sample("x", dist.Normal(slope * TIMES, 0.5), obs=jnp.nan_to_num(SEEN), obs_mask=~jnp.isnan(SEEN))


TIMES, SEEN = jnp.arange(5.0), jnp.array([0.1, 1.0, jnp.nan, 2.9, 4.1])


def imputed_guide():
    times, seen = (np.asarray(x)[~np.isnan(SEEN)] for x in (TIMES, SEEN))
    precision = 1 + (times**2).sum() / 0.25
    slope = numpyro.sample("slope", dist.Normal((times * seen).sum() / 0.25 / precision, precision**-0.5))
    numpyro.param("order", 0.0)
    with numpyro.plate("time", 5):
        numpyro.sample("x_unobserved", dist.Normal(slope * TIMES, 0.5))


@pytest.mark.parametrize("model, guide", [(chain, chain_guide), (coins, coins_guide), (imputed, imputed_guide)])
def test_one_order_of_the_posterior_is_good(model, guide):
    found = at(model, guide, jnp.zeros(2))
    assert found.verdict == "good", said(found)


def beside_others(data):
    """Beside effects that are known far better, and may not change places."""
    in_plate(data)
    with numpyro.plate("year", len(data)):
        effect = numpyro.sample("effect", dist.Normal(0, 100))
    numpyro.sample("of_years", dist.Normal(effect, 0.1).to_event(1), obs=50 * data)


def beside_others_guide(data):
    guide(data, means="plate")
    with numpyro.plate("year", len(data)):
        numpyro.sample("effect", dist.Normal(50 * data, 0.1))


def test_elements_that_are_known_better_do_not_hide_others():
    found = at(beside_others, beside_others_guide, jnp.stack([DATA, DATA]), DATA)
    assert found.verdict == "usable" and "change places (in 'component')" in said(found)


def test_a_guide_without_latents():
    def model():
        on = numpyro.sample("on", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(on, 1.0), obs=1.0)

    assert at(model, lambda: numpyro.param("order", 0.0), jnp.zeros(2)).verdict == "good"


class OfUnknownSupport(dist.Normal):
    """Its support cannot be asked whether it has a value."""

    support = dist.constraints.dependent(is_discrete=False, event_dim=0)

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)


def test_a_support_that_cannot_be_asked():
    def model():
        with numpyro.plate("component", 2):
            mean = numpyro.sample("mean", OfUnknownSupport(0.0, PRIOR))
        observed(mean, DATA[:2])

    def guide():
        locs, scale = posterior(numpyro.param("order", DATA[:2]))
        with numpyro.plate("component", 2):
            numpyro.sample("mean", OfUnknownSupport(locs, scale))

    found = at(model, guide, jnp.stack([DATA[:2]] * 2))
    assert found.verdict == "usable" and "change places" in said(found)


def with_event_of_labels(data):
    """Which mean some further observations are of, as a vector."""
    with numpyro.plate("component", 2):
        mean = numpyro.sample("mean", dist.Normal(0, PRIOR))
    observed(mean, data)
    label = numpyro.sample("label", dist.Categorical(jnp.ones((3, 2)) / 2).to_event(1))
    numpyro.sample("of_smallest", dist.Normal(mean[label] - jnp.min(mean), 1e-3).to_event(1), obs=jnp.zeros(3))


def event_of_labels_guide(data):
    guide(data, means="plate")
    numpyro.sample("label", dist.Categorical(logits=jnp.tile(jnp.array([0.0, -20.0]), (3, 1))).to_event(1))


def test_labels_of_an_event():
    found = at(with_event_of_labels, event_of_labels_guide, jnp.stack([DATA[:2]] * 2), DATA[:2])
    assert "change places (in 'component', 'label')" in said(found)


def both_orders(data):
    """The guide of `in_event` that has both."""
    locs, scale = posterior(jnp.stack([data, data[::-1]]))
    numpyro.param("order", data)
    numpyro.sample(
        "mean", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(locs, scale).to_event(1))
    )


def test_both_orders_are_good():
    data = DATA[:2]
    found = at(in_event, both_orders, jnp.stack([data, data]), data)
    assert found.verdict == "good"
    assert abs(found.log_evidence - log_evidence(np.asarray(data))) < 0.1


def test_shares_of_both_orders_have_errors():
    """Draws of both orders that are right up to their weights: nothing is lost, however few they are."""
    data, ratio, rng = DATA[:2], 0.5, np.random.default_rng(0)
    svi = SVI(partial(tilted, ratio=ratio), partial(guide, **EVENT), optax.adam(0.01), VIMCOStar(num_particles=8))
    approx = Approximation.of(svi, {"order": data[None]}, 1, (data,), {})
    locs, scale = posterior(np.asarray(data))
    for _ in range(30):
        # One draw in ten is of the other order, which has a third of the posterior: 1000 draws know that to 0.03.
        other = rng.random(1000) < 0.1
        mean = np.where(other[:, None], locs[::-1], locs) + scale * rng.normal(size=(1000, 2))
        log_weight = np.where(other, np.log(1 / 3 / 0.1), np.log(2 / 3 / 0.9))
        moments = Moments({"mean": 1})
        moments.add(log_weight, {"mean": mean})
        draws = {"mean": mean.astype(np.float32)}
        assert find_lost_labels(approx, moments.estimates(), draws, log_weight) is None
