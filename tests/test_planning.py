"""`fit(model, ...)`: what is planned for a model, that the plan is what its code says, and what `improve` does."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
import optax
import pytest

from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit, sum_out
from numpyro_vimco.diagnostics.findings import Finding
from numpyro_vimco.planning.rules import LOCAL, SAMPLES, plans
from numpyro_vimco.posterior.improving import Ways, improve

FEW = jnp.array([0.3, 2.1, 1.7, -0.2, 2.4])
MANY = jnp.concatenate([FEW, FEW + 0.1, FEW - 0.1, FEW, FEW, FEW])


def mixture(x, **infer):
    means = numpyro.sample("means", dist.Normal(jnp.array([-1.0, 1.0]), 1.0).to_event(1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.5), infer=dict(infer))
        numpyro.sample("x", dist.Normal(means[z], 1.0), obs=x)


def counted(x):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    with numpyro.plate("site", len(x)):
        count = numpyro.sample("count", dist.Poisson(3.0 * rate))
        with numpyro.plate("visit", 2, dim=-2):
            numpyro.sample("x", dist.Normal(count, 1.0), obs=jnp.stack([x, x]))


def both(x):
    """A switch and a size for each datum."""
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.1))
        size = numpyro.sample("size", dist.HalfNormal(3.0))
        numpyro.sample("x", dist.Normal(loc, 1.0 + size * z), obs=x)


def of_all(x):
    means = numpyro.param("means", jnp.array([-1.0, 1.0]))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(means[z], 1.0), obs=x)


def selection(x):
    with numpyro.plate("predictor", 3):
        included = numpyro.sample("included", dist.Bernoulli(0.3))
        slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(jnp.sum(included * slope), 1.0).expand([len(x)]).to_event(1), obs=x)


def regimes(x, **infer):
    means = numpyro.sample("means", dist.Normal(jnp.array([0.0, 2.0]), 0.5).to_event(1))

    def step(z, x):
        z = numpyro.sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.3)), infer=dict(infer))
        numpyro.sample("x", dist.Normal(means[z], 1.0), obs=x)
        return z, None

    scan(step, 0, x)


def population(x):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.2))

    def year(expected, x):
        count = numpyro.sample("count", dist.Poisson(expected))
        numpyro.sample("x", dist.Normal(count, 1.0), obs=x)
        return growth * count + 1.0, None

    scan(year, 2.0, x)


def second_order(x):
    share = numpyro.sample("share", dist.Beta(2, 2))

    def step(total, x):
        total = total + numpyro.sample("z", dist.Bernoulli(share))
        numpyro.sample("x", dist.Normal(0.3 * total, 1.0), obs=x)
        return total, None

    scan(step, 0, x)


def walk(x):
    with numpyro.plate("time", len(x)):
        step = numpyro.sample("step", dist.Normal(0.0, 0.7))
        numpyro.sample("x", dist.StudentT(3, jnp.cumsum(step), 0.5), obs=x)


def shifted(x):
    """The sum over each switch by itself would be another density."""
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(loc + 2.0 * jnp.roll(z, 1), 1.0), obs=x)


def crossed(x):
    """Items and persons: the items are independent given the classes, which are summed out."""
    with numpyro.plate("item", 25, dim=-2):
        guess = numpyro.sample("guess", dist.Beta(2, 2))
    with numpyro.plate("person", len(x), dim=-1):
        able = numpyro.sample("able", dist.Bernoulli(0.5))
        with numpyro.plate("item", 25, dim=-2):
            right = (x > 1) * jnp.ones((25, 1))
            numpyro.sample("right", dist.Bernoulli(jnp.where(able == 1, 0.9, guess)), obs=right)


def abilities(x):
    """Either plate could have particles, and not both: the answers are in both. There are more persons."""
    with numpyro.plate("item", 25, dim=-2):
        difficulty = numpyro.sample("difficulty", dist.Normal(0, 1))
    with numpyro.plate("person", len(x), dim=-1):
        ability = numpyro.sample("ability", dist.Normal(0, 1))
        with numpyro.plate("item", 25, dim=-2):
            right = (x > 1) * jnp.ones((25, 1))
            numpyro.sample("right", dist.Bernoulli(logits=ability - difficulty), obs=right)


def blocks(x):
    """Rows and columns have classes: only one of the two can be summed out."""
    loc = numpyro.sample("loc", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    with numpyro.plate("row", 20, dim=-2):
        row = numpyro.sample("row_class", dist.Bernoulli(0.5))
    with numpyro.plate("column", len(x), dim=-1):
        column = numpyro.sample("column_class", dist.Bernoulli(0.5))
        with numpyro.plate("row", 20, dim=-2):
            numpyro.sample("x", dist.Normal(loc[row, column], 1.0), obs=x * jnp.ones((20, 1)))


def by_factor(x):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        numpyro.factor("x", -0.5 * (x - loc) ** 2)


def subsampled(x):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(x), subsample_size=5):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=numpyro.subsample(x, event_dim=0))


def many_values(x):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(logits=jnp.zeros(40)))
        numpyro.sample("x", dist.Normal(loc + 0.1 * z, 1.0), obs=x)


def from_one(x):
    """NumPyro enumerates values from 0 on."""
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.DiscreteUniform(1, 3))
        numpyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)


def first(model, x=MANY, **given):
    return plans(model, (x,), {}, 2000, 4, given)[0]


@pytest.mark.parametrize(
    ("model", "summed", "plates", "chains", "joint"),
    [
        (mixture, {"z": 2}, {}, {}, ("means",)),
        (counted, {}, {"site": LOCAL}, {}, ("rate",)),
        (both, {"z": 2}, {"data": LOCAL}, {}, ("loc",)),
        (of_all, {}, {}, {}, ("z",)),
        (selection, {}, {}, {}, ("included", "slope")),
        (regimes, {"z": 2}, {}, {}, ("means",)),
        (population, {}, {}, {"count": SAMPLES}, ("growth",)),
        (second_order, {}, {}, {}, ("share", "z")),
        (shifted, {"z": 2}, {}, {}, ("loc",)),  # until its density was evaluated
        (crossed, {"able": 2}, {}, {}, ("guess",)),
        (abilities, {}, {"person": LOCAL}, {}, ("difficulty",)),
        (blocks, {"row_class": 2}, {}, {}, ("loc", "column_class")),
        (many_values, {}, {"data": LOCAL}, {}, ("loc",)),
        (from_one, {}, {"data": LOCAL}, {}, ("loc",)),
    ],
)
def test_first_plan(model, summed, plates, chains, joint):
    plan = first(model)
    assert dict(plan.summed) == summed
    assert (plan.plate_particles, plan.chain_particles, plan.joint) == (plates, chains, joint)
    assert plan.num_particles == (8 if plates or chains else 64)
    assert plan.alpha == 0.5


@pytest.mark.parametrize(("model", "given", "number"), [(selection, None, 4), (walk, 2, 2), (shifted, None, 8)])
def test_many_discrete_elements_that_are_drawn_together_have_more_starts(model, given, number):
    plan = plans(model, (MANY,), {}, 2000, given, {})[-1]
    assert plan.num_starts == number
    assert ("num_starts=" in plan.code()) == (number != 4)


def test_a_guide_that_undoes_a_sum_is_said():
    (plan, *_) = plans(mixture, (MANY,), {}, 2000, 4, {"guide": AutoMixed(mixture)}, memory=1e9)
    assert not plan.summed
    assert "Not 'z' summed out: your guide samples it. A guide of `sum_out(model, ['z'])` does not." in plan.notes
    (plan, *_) = plans(mixture, (MANY,), {}, 2000, 4, {"guide": AutoMixed(sum_out(mixture, ["z"]))}, memory=1e9)
    assert plan.summed == {"z": 2} and not plan.notes


def test_a_few_elements_are_drawn_together():
    assert not first(counted, FEW[:4]).plate_particles


def test_subsampled_data_take_the_elbo():
    assert first(subsampled).alpha == 1.0


def test_what_the_model_says_of_sums_is_kept():
    kept = first(partial(mixture, enumerate="parallel"))
    assert (kept.summed, kept.marked) == ({}, {"z": 2})
    sampled = first(partial(mixture, enumerate=None))
    assert (sampled.summed, sampled.marked, sampled.plate_particles) == ({}, {}, {"data": LOCAL})


def test_a_guide_says_what_is_sampled():
    def guide(x):
        numpyro.sample("means", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Bernoulli(0.5))

    plan = first(mixture, guide=guide)
    assert not plan.summed
    svi = plan.svi(mixture)
    assert svi.guide is guide
    assert svi.loss.plate_particles == {"data": LOCAL}


def test_a_guide_stays_as_it_was():
    """Where it begins depends on the key of the fit."""
    guide = AutoMixed(mixture)
    assert not first(mixture, guide=guide).summed
    assert guide.prototype_trace is None


@pytest.mark.parametrize(
    ("model", "loss", "summed", "plates", "chains", "joint"),
    [
        (mixture, Trace_ELBO(), {}, {}, {}, ("means", "z")),
        (mixture, TraceEnum_ELBO(), {"z": 2}, {}, {}, ("means",)),
        (mixture, VIMCOStar(0.5, 64), {"z": 2}, {}, {}, ("means",)),
        (counted, VIMCOStar(0.5, 64), {}, {}, {}, ("rate", "count")),
        (counted, VIMCOStar(0.5, 4, plate_particles={"site": 3}), {}, {"site": 3}, {}, ("rate",)),
        (population, VIMCOStar(0.5, 64), {}, {}, {}, ("growth", "count")),
        (population, VIMCOStar(0.5, 4, chain_particles={"count": 5}), {}, {}, {"count": 5}, ("growth",)),
    ],
)
def test_an_objective_says_what_has_particles(model, loss, summed, plates, chains, joint):
    """And only some sum out what is marked: others of NumPyro draw it from the model."""
    plan = first(model, loss=loss)
    assert dict(plan.summed) == summed
    assert (plan.plate_particles, plan.chain_particles, plan.joint) == (plates, chains, joint)
    svi = plan.svi(model)
    assert svi.loss is loss
    assert svi.guide.chains == chains.keys()


def test_code_has_the_arguments_as_they_were_given():
    assert plans(mixture, (), {"x": FEW}, 10, 4, {})[0].code().endswith("fit(svi, jax.random.key(0), 10, **kwargs)")
    assert first(mixture).code().endswith("fit(svi, jax.random.key(0), 2000, *args)")


def test_a_fit_that_goes_on_has_a_rate_for_it():
    """Behind the plan's end, that is: one that was interrupted goes on with what was planned."""
    plan = replace(first(mixture), num_steps=100)
    for taken, number in ((100, 50), (150, 50), (30, 20), (30, 120)):
        optim = plan.optim_after(taken, number)
        state = optim.init({"x": jnp.zeros(())})
        steps = [float(optim.get_params(state)["x"])]
        for _ in range(taken + number):  # Adam's steps along a constant gradient are the rate
            state = optim.update({"x": jnp.ones(())}, state, 0.0)
            steps.append(float(optim.get_params(state)["x"]))
        rates = -np.diff(steps)
        planned = np.array([plan.schedule()(i) for i in range(min(100, taken + number))])
        np.testing.assert_allclose(rates[: len(planned)], planned, atol=1e-5)
        end = max(taken, 100)
        if taken + number > end:
            assert rates[end] > 0.0099
            assert rates[-1] < 0.001


def test_without_funsor_nothing_is_summed_out(monkeypatch):
    monkeypatch.setattr("numpyro_vimco.planning.rules.find_spec", lambda name: None)
    plan = first(mixture)
    assert plan.plate_particles == {"data": LOCAL}
    assert plan.notes == ("Not 'z' summed out: that needs the package funsor (`pip install funsor`).",)


def test_memory_is_bounded_by_chunks():
    x = jnp.zeros(10**6)
    whole = 64 * 4 * 4 * 8 * 4 * 10**6  # particles, starts, bytes, arrays; two values of each of two densities
    plan = plans(mixture, (x,), {}, 2000, 4, {}, memory=whole / 3)[0]
    assert 64 % plan.chunk_size == 0
    assert 64 / 6 < plan.chunk_size <= 64 / 3
    assert plans(mixture, (x,), {}, 2000, 4, {}, memory=whole * 1.1)[0].chunk_size is None
    assert plan.svi(mixture).loss.chunk_size == plan.chunk_size
    # A factor has no value, and a distribution may be larger than its values.
    tight = plans(by_factor, (x,), {}, 2000, 4, {}, memory=64 * 4 * 4 * 8 * 10**6 / 3)[0]
    assert tight.chunk_size == plan.chunk_size
    least = plans(by_factor, (x,), {}, 2000, 4, {}, memory=1e6)[0]
    assert least.chunk_size == 1
    assert "One particle of each start takes 0 GiB in a step. Subsample the data." in least.notes


@pytest.mark.parametrize("model", [regimes, mixture])
def test_sum_out_is_the_mark(model):
    """In a plate and inside of `scan`, where `config_enumerate` does not reach."""
    marked, by_hand = sum_out(model, {"z"}), partial(model, enumerate="parallel")
    losses = []
    for program in (marked, by_hand):
        svi = SVI(program, AutoMixed(by_hand), optax.adam(0.01), VIMCOStar(0.5, 8))
        losses.append(svi.evaluate(svi.init(random.key(0), FEW), FEW))
    assert losses[0] == losses[1]
    tr = handlers.trace(handlers.seed(model, 0)).get_trace(FEW)
    assert "enumerate" not in tr["z"]["infer"]


def test_sum_out_of_a_name_that_is_not_there():
    with pytest.raises(ValueError, match="`sum_out` names 'y', but"):
        handlers.trace(handlers.seed(sum_out(mixture, "y"), 0)).get_trace(FEW)


def test_a_user_reads_the_plan():
    plan = replace(first(both), score_sites=frozenset({"loc"}))
    assert str(plan).splitlines() == [
        "'z' (2 values): summed out",
        "'size': 8 particles of each element of 'data'",
        "'loc': 8 particles with all of these",
        "'loc': score function, as the density jumps there",
        "AutoMixed, VIMCOStar(0.5), Adam at 0.01, 2,000 steps",
    ]
    assert "score_sites={'loc'}" in plan.code()


@pytest.mark.long
@pytest.mark.parametrize("model", [shifted, walk, population, mixture])
def test_code_is_the_plan(model):
    """Also where the first plans are not possible: elements of a plate that are not independent."""
    posterior = fit(model, random.key(0), 40, MANY, progress_bar=False)
    known = {"model": model, "args": (MANY,)}
    exec(posterior.plan.code(), known)
    np.testing.assert_array_equal(posterior.losses, known["posterior"].losses)
    if model is walk:
        assert posterior.plan.joint_plates == ("time",)
        assert "The elements of the plate 'time' are not independent" in str(posterior.plan)
    if model is shifted:
        assert not posterior.plan.summed
        assert "Not 'z' summed out: Site 'x' has another density" in str(posterior.plan)


@pytest.mark.long
def test_a_planned_fit():
    """The number of steps may be left out, data may come by name, and more steps have a learning rate of their own.

    Exact evidence by the sum over both states of each datum, on a grid over both means.
    """
    x = MANY[:12]
    posterior = fit(mixture, random.key(0), x=x, progress_bar=False)
    assert posterior.losses.shape == (4, 2000)
    assert str(posterior).startswith("plan          'z' (2 values): summed out;")
    grid = np.linspace(-6, 6, 400)
    density = np.exp(dist.Normal(grid[:, None, None], 1.0).log_prob(np.asarray(x)))
    log_joint = np.log(0.5 * density + 0.5 * density.swapaxes(0, 1)).sum(-1)
    log_joint += dist.Normal(-1, 1).log_prob(grid)[:, None] + dist.Normal(1, 1).log_prob(grid)
    exact = jax.nn.logsumexp(log_joint) + 2 * np.log(grid[1] - grid[0])
    assert posterior.verdict == "good"
    assert abs(posterior.log_evidence - exact) < 5 * posterior.diagnostics.log_evidence_std_error + 0.01
    assert posterior.svi.loss.num_particles == 64
    assert fit(mixture, random.key(0), 0, x, progress_bar=False).losses.shape == (4, 0)
    more = posterior.resume(100)
    assert any(np.abs(more.params[name] - value).max() > 1e-3 for name, value in posterior.params.items())
    assert posterior.improve(random.key(1)).improvements == ()  # there is nothing to do
    with pytest.raises(ValueError, match="`seconds` is 0, but must be a positive number"):
        posterior.improve(random.key(1), 0)


def an_svi(model=mixture):
    return SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(an_svi(), random.key(0), None, FEW), "`num_steps` is None, but an `SVI` has its own schedule"),
        (lambda: fit(an_svi(), random.key(0), 9, FEW, loss=VIMCOStar()), "`loss` is given beside an `SVI`"),
        (lambda: fit(3, random.key(0), 9, FEW), "`fit` was given int, but takes a NumPyro model"),
        (lambda: fit(mixture, random.key(0), 9, FEW, init_state=1), "`init_state` is given beside a model"),
        (lambda: fit(mixture, random.key(0), 9, FEW, FEW), "does not fit `mixture`: too many positional arguments"),
        (
            lambda: fit(mixture, random.key(0), FEW),
            "`num_steps` is .* but must be an integer of at least 0: so many steps are taken; the model's",
        ),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@dataclass
class Tried:
    """A posterior of a plain verdict, for what `improve` does without computing anything.

    :ivar after: verdict after each kind of step, and the seconds that it takes.
    """

    verdict: str
    after: dict[Any, tuple[str, float]]
    clock: list[float]
    codes: tuple[str, ...] = ("poor-guide",)
    improvements: tuple[str, ...] = ()
    seconds: float = 50.0
    given: tuple[str, ...] = ()
    losses = np.zeros((4, 2000))
    diagnostics = SimpleNamespace(num_draws=10_000)
    mcmc: str | None = None

    @property
    def plan(self):
        return None if "joint-weight" in self.codes else SimpleNamespace(given=self.given)

    @property
    def findings(self):
        return [Finding(code, "") for code in self.codes]

    def to(self, step, codes=("poor-guide",), mcmc=None):
        verdict, seconds = self.after[step]
        self.clock[0] += seconds
        if isinstance(verdict, BaseException):
            raise verdict
        return replace(self, verdict=verdict, codes=codes, mcmc=mcmc)


KEYS = []


def noted(key):
    """Each key is taken once."""
    KEYS.append(tuple(random.key_data(key).tolist()))
    assert len(set(KEYS)) == len(KEYS)


WAYS = Ways(
    lambda posterior, number: posterior.to("draws"),
    lambda posterior, key: noted(key) or posterior.to("plan"),
    lambda posterior, key, number: noted(key) or posterior.to(number, ("chains-disagree",), "chains"),
    lambda posterior, number: posterior.to("steps"),
    lambda posterior, key: noted(key) or posterior.to("particles"),
)


@pytest.mark.parametrize(
    ("after", "options", "done", "verdict"),
    [
        ({1000: ("good", 60)}, {}, ["chains (refine): good, 60 s"], "good"),
        (
            {1000: ("usable", 30), 5000: ("good", 90)},
            {},
            ["chains (refine): usable, 30 s", "chains of 5,000 draws: good, 90 s"],
            "good",
        ),
        # 70 s leave 110: too little for chains of twice the length, but not for more steps; then the time is used.
        (
            {1000: ("bad", 70), "steps": ("usable", 120)},
            {},
            ["chains (refine): bad, 70 s", "2,000 steps more: usable, 120 s"],
            "usable",
        ),
        # What is worse is not kept, and no chains begin there.
        ({1000: ("bad", 170)}, {"verdict": "usable"}, ["chains (refine): bad, 170 s"], "usable"),
        (
            {1000: ("usable", 65), "steps": ("bad", 50)},
            {"verdict": "usable"},
            ["chains (refine): usable, 65 s", "2,000 steps more: bad, 50 s"],
            "usable",
        ),
        (
            {1000: (ValueError("It is a Delta."), 1), "steps": ("good", 40)},
            {},
            ["chains (refine): not possible, ValueError: It is a Delta.", "2,000 steps more: good, 40 s"],
            "good",
        ),
        (
            {1000: (RuntimeError("RESOURCE_EXHAUSTED"), 1), "particles": ("good", 40)},
            {"given": ("optim",)},
            ["chains (refine): not possible, RuntimeError: RESOURCE_EXHAUSTED", "four times the particles: good, 40 s"],
            "good",
        ),
        ({1000: (KeyboardInterrupt(), 20)}, {}, ["chains (refine): interrupted"], "bad"),
        ({"draws": ("good", 5)}, {"codes": ("uncertain-evidence",)}, ["40,000 draws: good, 5 s"], "good"),
        ({"plan": ("good", 90)}, {"codes": ("joint-weight",)}, ["another plan: good, 90 s"], "good"),
        ({1000: ("bad", 60)}, {"given": ("optim", "loss")}, ["chains (refine): bad, 60 s"], "bad"),
        ({1000: ("bad", 200)}, {}, ["chains (refine): bad, 200 s"], "bad"),
        ({}, {"verdict": "good"}, [], "good"),
    ],
)
def test_steps_of_improve(monkeypatch, after, options, done, verdict):
    clock = [0.0]
    KEYS.clear()
    monkeypatch.setattr("numpyro_vimco.posterior.improving.perf_counter", lambda: clock[0])
    begun = Tried(**{"verdict": "bad", "after": after, "clock": clock, **options})
    best, improvements = improve(begun, random.key(0), 180.0, WAYS, False)
    if verdict != "good" and "interrupted" not in done[-1]:
        *improvements, why = improvements
        left = 180 - clock[0]
        assert why == (
            f"stopped: no other step fits into the {left:.0f} s that are left"
            if left > 0
            else "stopped: the time is over"
        )
    assert list(improvements) == done
    assert best.verdict == verdict


@pytest.mark.parametrize(
    ("chains", "steps", "again", "kept"),
    [
        # Of the same verdict chains are kept before weights, and of chains the latest.
        ("usable", "usable", None, "chains"),
        ("usable", "good", None, None),
        ("bad", "usable", None, None),
        ("bad", "bad", "bad", "chains"),
    ],
)
def test_improve_keeps_chains_of_the_same_verdict(monkeypatch, chains, steps, again, kept):
    clock = [0.0]
    KEYS.clear()
    monkeypatch.setattr("numpyro_vimco.posterior.improving.perf_counter", lambda: clock[0])
    begun = Tried("bad", {1000: (chains, 65), "steps": (steps, 49 if again else 60), "particles": ("bad", 500)}, clock)
    best, _ = improve(begun, random.key(0), 180.0, WAYS, False)
    assert best.mcmc == kept


@pytest.mark.long
def test_chains_stand_for_an_improved_posterior():
    """A guide of independent latents on a ridge: chains mend it, and what is drawn and exported is theirs.

    Truth by the linear model. The bound is 5 standard errors of the chains' effective draws.
    """

    def ridge(x):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(a + b + k, 0.05), obs=x)

    guide = AutoMixed(ridge, structure="mean_field")
    posterior = fit(ridge, random.key(0), 300, 1.0, guide=guide, progress_bar=False)
    assert posterior.verdict != "good"
    assert posterior.findings[-1].remedy == "posterior = posterior.improve(random.key(2))"
    better = posterior.improve(random.key(2), 120.0)
    assert better.verdict == "good"
    assert better.mcmc is not None
    assert posterior.mcmc is None
    assert str(better).splitlines()[2].startswith("improved      chains (refine): good")
    tree = better.to_arviz(groups=())
    a = np.asarray(tree["posterior"]["a"])
    assert a.shape == (4, 1000)
    # Given k, a + b is Normal(0, 2) a priori; evidence of k by the two densities of x.
    scale = np.sqrt(2 + 0.05**2)
    odds = np.exp(dist.Normal(1, scale).log_prob(1.0) - dist.Normal(0, scale).log_prob(1.0))
    share = float(odds / (1 + odds))
    mean = (1 - share) * 0.5 * 2 / scale**2
    ess = float(tree["posterior"].attrs["ess_bulk"])
    assert abs(a.mean() - mean) < 5 * a.std() / np.sqrt(ess)
    assert better.starts.agreement is better.diagnostics.agreement
    draws = better.sample(random.key(3), (500,))
    known = np.asarray(better.mcmc.get_samples()["a"])
    assert np.isin(np.asarray(draws["a"]), known).all()
    assert len(np.unique(draws["a"])) > 200
    predicted = better.predict(random.key(4), None)
    assert predicted["x"].shape == (4000,)
    assert isinstance(better, Posterior)
