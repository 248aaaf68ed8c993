"""A quick form of each posterior with a known truth: the model on its data, what is asked, and what is known of it."""

from importlib import import_module

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as enumerated_log_density
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density
import pytest

from benchmarks.posteriors import PROBLEMS, problem
from benchmarks.posteriors.measuring import Clock
from benchmarks.posteriors.report import Runs
from benchmarks.posteriors.results import Results, read
from numpyro_vimco.sites import is_latent_site

# Those whose sums take less than a second.
RECOMPUTED = ("diabetes", "change_points")

# NumPyro says so where the prior draws what the data rule out, a population below what was counted.
prior_may_be_impossible = pytest.mark.filterwarnings("ignore:Out-of-support values")
every_problem = pytest.mark.parametrize("name", PROBLEMS)


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
    """Its density is that of the model, summed over discrete latents: no less than one term. All latents are there."""
    about = problem(name)
    if about.enumerated is None:
        pytest.skip("no discrete latents that NumPyro sums out")
    draw = {name: site["value"] for name, site in prior_draw(about).items()}
    marked = trace(seed(about.enumerated, random.key(0))).get_trace(*about.args)
    assert draw.keys() <= marked.keys()
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


def test_rows_replace_older_ones(tmp_path):
    results = Results(tmp_path, "diabetes")
    results.write([{"method": "a", "seed": 0, "error": 0.2}, {"method": "b", "seed": 0, "error": 0.3}])
    results.write([{"method": "a", "seed": 0, "error": 0.05, "reading": "good"}])
    assert [(row["method"], row["error"], row["right"]) for row in read(results.path)] == [
        ("b", "0.3", ""),
        ("a", "0.05", "True"),
    ]


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
