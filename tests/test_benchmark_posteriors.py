"""A quick form of each posterior with a known truth: the model on its data, what is asked, and what is known of it."""

from importlib import import_module
import itertools

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as enumerated_log_density
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density
import pytest
from scipy.special import gammaln, logsumexp, softmax
from scipy.stats import beta, dirichlet, gamma, lognorm, multivariate_normal, norm

from benchmarks.posteriors import PROBLEMS, binary_factors, problem, restaurant, topics, trees
from benchmarks.posteriors.measuring import Clock
from benchmarks.posteriors.report import Runs
from benchmarks.posteriors.results import Results, read
from helpers import of_two_lengths
from numpyro_vimco.sites import is_latent_site

# Those whose sums take less than a second.
RECOMPUTED = ("diabetes", "change_points")

# NumPyro says so where the prior draws what the data rule out, a population below what was counted.
prior_may_be_impossible = pytest.mark.filterwarnings("ignore:Out-of-support values")
every_problem = pytest.mark.parametrize("name", of_two_lengths(PROBLEMS, ["diabetes", "coal_mining"]))


def prior_draw(about):
    """The latent sites of a draw of the model."""
    found = trace(seed(about.model, random.key(0))).get_trace(*about.args)
    return {name: site for name, site in found.items() if is_latent_site(site)}


@every_problem
def test_asked_is_known(name):
    about = problem(name)
    values = {name: site["value"] for name, site in prior_draw(about).items()}
    asked = about.asked(values, *about.args)
    for part in (about.truth.means, about.truth.sds, about.truth.errors):
        assert part.keys() == asked.keys()
        for quantity, known in part.items():
            assert np.shape(known) == np.shape(asked[quantity]), quantity
            assert np.isfinite(known).all()
    assert all((sd >= 0).all() for sd in about.truth.sds.values())


@every_problem
def test_truth_is_known_well_enough(name):
    """To a third of what counts as right: 0.1 posterior standard deviations."""
    truth = problem(name).truth
    for quantity, error in truth.errors.items():
        assert (error <= 0.1 / 3 * truth.sds[quantity]).all(), quantity
    assert truth.log_evidence is None or truth.log_evidence_error < 0.1


@prior_may_be_impossible
@every_problem
def test_density_is_a_number(name):
    """At a draw of the prior, which the data may rule out."""
    about = problem(name)
    values = {name: site["value"] for name, site in prior_draw(about).items()}
    assert log_density(about.model, about.args, {}, values)[0] < np.inf


@prior_may_be_impossible
@every_problem
def test_enumerated_is_the_same_model(name):
    """Its density is that of the model, summed over discrete latents: no less than one term."""
    about = problem(name)
    if about.enumerated is None:
        pytest.skip("no discrete latents that NumPyro sums out")
    draw = {name: site["value"] for name, site in prior_draw(about).items()}
    marked = trace(seed(about.enumerated, random.key(0))).get_trace(*about.args)
    latents = {name: site for name, site in marked.items() if is_latent_site(site)}
    summed = {name for name, site in latents.items() if site["infer"].get("enumerate") == "parallel"}
    for site in summed:  # NumPyro 0.22 sums over 0, 1, …, whatever the support is
        values = marked[site]["fn"].enumerate_support(expand=False).ravel()
        np.testing.assert_array_equal(values, np.arange(len(values)))
    rest = {name: draw[name] for name in latents.keys() - summed}
    model = enum(config_enumerate(seed(about.enumerated, random.key(1))), first_available_dim=-5)
    total, _ = enumerated_log_density(model, about.args, {}, rest)
    term, _ = log_density(about.model, about.args, {}, draw)
    assert np.isneginf(term) or np.inf > total >= term - 1e-3 * abs(term)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_exact_truth(name):
    about = problem(name)
    found = import_module(f"benchmarks.posteriors.{name}").truth(*about.args)
    np.testing.assert_allclose(found.log_evidence, about.truth.log_evidence, rtol=1e-9)
    for quantity, known in about.truth.means.items():
        np.testing.assert_allclose(found.means[quantity], known, atol=1e-9)


def test_all_trees_once():
    """Stepwise addition gives each of the 10,395 trees of eight species, by its splits."""
    all_trees = list(itertools.product(*(range(2 * species - 3) for species in range(3, 8))))
    splits = np.asarray(jax.jit(jax.vmap(lambda places: trees.splits(trees.grown(places))))(jnp.asarray(all_trees)))
    assert (splits.sum(1) == 5).all()
    assert len(np.unique(splits, axis=0)) == len(all_trees) == trees.NUM_TREES


@pytest.mark.parametrize("places", [(0, 0, 0, 0, 0), (2, 4, 1, 8, 10), (1, 3, 6, 2, 9)])
def test_likelihood_of_a_tree(places):
    """Against the sum over the nucleotides of all inner nodes, by the tree's branches."""
    columns, counts = trees.data()
    lengths = np.random.default_rng(0).exponential(0.1, trees.BRANCHES)
    tree = order, below = [np.asarray(x) for x in trees.grown(jnp.asarray(places))]
    branches = [(0, order[0]), *((node, child) for node, pair in zip(order, below) for child in pair)]
    assert sorted(child for _, child in branches) == list(range(1, 14))
    stays = np.exp(-4 / 3 * lengths)
    operands = [
        x
        for node, child in branches
        for x in ((1 - stays[child - 1]) / 4 + stays[child - 1] * np.eye(4), [node, child])
    ]
    tips = [x for species, letters in enumerate(np.asarray(columns)) for x in (np.eye(4)[letters], [14, species])]
    probability = np.einsum(*operands, *tips, [14], optimize=True) / 4
    known = np.log(probability) @ np.asarray(counts)
    np.testing.assert_allclose(trees.log_likelihood(tree, jnp.asarray(lengths), columns, counts), known, rtol=1e-5)


def test_each_partition_is_summed_once():
    """Stirling's numbers of 5, and Bell's number of the 12 countries."""
    np.testing.assert_array_equal(restaurant.sums_over_partitions(np.ones(2**5))[-1], [0, 1, 15, 25, 10, 1])
    assert restaurant.sums_over_partitions(np.ones(2**12))[-1].sum() == 4_213_597


def test_restaurant_sums_the_model():
    """Over all tables of four countries; means are integrated out: their density given the tables divides the joint."""
    noise, concentration, names = 0.4, 0.7, [f"table_of_{name}" for name in restaurant.COUNTRIES[1:4]]
    with jax.enable_x64(True):
        x = np.asarray(restaurant.data()[0], float)[:4]
        values = {"noise": noise, "concentration": concentration, "mean": np.linspace(-1, 1, 8).reshape(4, 2)}
        terms = []
        for tables in itertools.product(range(2), range(3), range(4)):
            at_table = np.eye(4)[[0, *tables]].T
            precision = restaurant.MEAN_SCALE**-2 + at_table.sum(1, keepdims=True) / noise**2
            posterior = norm(at_table @ x / noise**2 / precision, precision**-0.5)
            draw = {**values, **dict(zip(names, tables))}
            joint, _ = log_density(restaurant.model, (x,), {}, draw)
            terms.append(float(joint) - posterior.logpdf(values["mean"]).sum())
    sums = restaurant.sums_over_partitions(restaurant.part_weights(x, np.array([noise])))[-1, :, 0]
    log_prior = gamma(2, scale=1 / 2).logpdf(concentration) + lognorm(0.5, scale=0.5).logpdf(noise)
    log_prior += gammaln(concentration) - gammaln(concentration + 4)
    known = log_prior + np.log(sums @ concentration ** np.arange(5))
    np.testing.assert_allclose(logsumexp(terms), known, rtol=1e-9)


def test_presences_of_sources_sum_the_model():
    """Over both sources in three samples; the rest is integrated out: its density given these divides the joint."""
    noise, share, terms, of_terms = 0.6, np.array([[0.3], [0.6]]), [], []
    prior_precision, coefficients = np.diag([1, 1.5**-2, 1.5**-2]), np.linspace(-1, 1, 24).reshape(3, 8)
    with jax.enable_x64(True):
        x = np.asarray(binary_factors.data()[0], float)[:3]
        for present in np.array(list(itertools.product(range(2), repeat=6))).reshape(-1, 2, 3):
            design = np.column_stack([np.ones(3), *present])
            covariance = np.linalg.inv(prior_precision + design.T @ design / noise**2)
            means, number = covariance @ design.T @ x / noise**2, present.sum(1, keepdims=True)
            draw = {"level": coefficients[0], "effect": coefficients[1:, None], "share": share, "noise": noise}
            joint, _ = log_density(binary_factors.model, (x,), {}, {**draw, "present": jnp.asarray(present)})
            given = [multivariate_normal(m, covariance).logpdf(c) for m, c in zip(means.T, coefficients.T)]
            terms.append(float(joint) - sum(given) - beta(1 + number, 4 - number).logpdf(share).sum())
            expected, variance = design @ means[:, binary_factors.ASKED], np.diag(design @ covariance @ design.T)
            differ = (present[:, [0, 0, 1]] != present[:, [1, 2, 2]]).sum(0)
            of_terms.append((differ, differ**2, expected, expected**2 + variance[:, None]))
    log_joint, moments = binary_factors.Presences(x).moments(noise)
    np.testing.assert_allclose(log_joint + lognorm(0.5, scale=0.5).logpdf(noise), logsumexp(terms))
    averages = [np.tensordot(softmax(terms), np.array(x), 1) for x in zip(*of_terms)]
    for name, mean, square in zip(("differ", "expected"), averages[::2], averages[1::2]):
        np.testing.assert_allclose(moments[name], (mean, square - mean**2))


def test_counts_of_topics_sum_the_model():
    """Over all topics of the nine words of four titles; shares are integrated out: their density divides the joint."""
    word, length = topics.NUMBERS[-9:], np.array([1, 2, 3, 3])
    shares = {"words_of_topic": np.full((2, 12), 1 / 12), "topics_of_title": np.tile([0.4, 0.6], (4, 1))}
    every_topic = np.array(list(itertools.product(range(2), repeat=9)))
    with jax.enable_x64(True):
        args, at = jax.tree.map(jnp.asarray, ((word, length), shares))
        joint_at = lambda topic: log_density(topics.model, args, {}, {**at, "topic": topic})[0]  # noqa: E731
        log_joint = np.asarray(jax.vmap(joint_at)(jnp.asarray(every_topic)))
    in_topic = np.eye(2)[every_topic]  # (512, words, topics)
    after = {
        "words_of_topic": 0.3 + np.einsum("zit,iv->ztv", in_topic, np.eye(12)[word]),
        "topics_of_title": 0.5 + np.einsum("zit,id->zdt", in_topic, np.eye(4)[np.repeat(range(4), length)]),
    }
    for name, share in shares.items():
        log_joint = log_joint - np.sum([[dirichlet(a).logpdf(x) for a, x in zip(z, share)] for z in after[name]], 1)
    joint, known = topics.joint_of_counts(word, length), np.exp(log_joint)
    np.testing.assert_allclose(joint.sum(), known.sum())
    in_first = topics.joint_of_counts(word, length, (0, 6)).sum()
    np.testing.assert_allclose(in_first, known[(every_topic[:, [0, 6]] == 0).all(1)].sum())
    of_words, of_title = (x / x.sum(-1, keepdims=True) for x in after.values())
    next_word = known @ np.einsum("zt,ztv->zv", of_title[:, -1], of_words) / known.sum()
    np.testing.assert_allclose(topics.next_word(joint / joint.sum())[0], next_word)


def test_rows_replace_older_ones(tmp_path):
    results = Results(tmp_path, "diabetes")
    results.write([{"method": "a", "seed": 0, "error": 0.2}, {"method": "b", "seed": 0, "error": 0.3}])
    results.write([{"method": "a", "seed": 0, "error": 0.05, "verdict": "good"}])
    assert [(row["method"], row["error"], row["right"]) for row in read(results.path)] == [
        ("b", "0.3", ""),
        ("a", "0.05", "True"),
    ]


@pytest.mark.parametrize(
    "error, evidence, right", [(0.05, {}, "True"), (0.2, {}, "False"), (0.05, {"evidence_error": -0.7}, "False")]
)
def test_good_is_right_about_means_and_evidence(tmp_path, error, evidence, right):
    results = Results(tmp_path, "diabetes")
    results.write([{"method": "a", "seed": 0, "error": error, "verdict": "good", **evidence}])
    assert [row["right"] for row in read(results.path)] == [right]


def test_clock_tells_compilation_apart():
    @jax.jit
    def function(x):
        return jnp.sin(x) @ jnp.cos(x).T

    clocks = [Clock(), Clock()]
    for clock in clocks:
        with clock:
            function(jnp.ones((3, 3))).block_until_ready()
    first, second = clocks
    assert first.compiling > 0.5 * first.total > 0
    assert second.compiling == 0


def test_time_until_the_error_stays_small():
    times_and_errors = [(1, 0.3), (2, 0.05), (3, 0.2), (4, 0.1), (5, 0.02), (70, 0.5)]
    rows = [{"seed": "0", "note": "", "error": str(e), "seconds": str(t)} for t, e in times_and_errors]
    runs = Runs(rows)
    assert runs.time_to_right("seconds", 60) == 4
    assert runs.error("seconds", 60) == 0.02
    assert runs.time_to_right("seconds", 100) == np.inf
