"""The examples run, in a quick mode, and what they print holds."""

import arviz as az
import pytest

from helpers import load_example


def run(name, *argv):
    module = load_example(name)
    return module.main(module.parse(argv))


@pytest.mark.filterwarnings("ignore")  # matplotlib's, scikit-learn's and ArviZ's own
def test_variable_selection(tmp_path):
    gaps, error = run("variable_selection", "--num-steps=1500", "--num-proposals=80000", f"--output={tmp_path}")
    assert -0.1 < gaps["VIMCOStar"] < 1 < gaps["TraceGraph_ELBO"] - 5
    assert error < 0.25  # the guide proposes some models too rarely, and the diagnostics say so
    assert (tmp_path / "variable_selection.png").stat().st_size > 10_000
    posterior = az.from_netcdf(str(tmp_path / "variable_selection.nc"))["posterior"]
    assert posterior["included"].shape == (1, 4000, 10)


def test_coal_mining():
    variation, error = run("coal_mining", "--num-steps=500", "--num-draws=20000")
    assert variation < 0.05 and abs(error) < 0.05


def test_gaussian_mixture():
    joint, local, truth = run("gaussian_mixture", "--num-steps=200")
    assert joint + 10 < local < truth


def test_n_mixture():
    log_evidence, ((joint, *_), (local, *_)) = run("n_mixture", "--num-steps=400", "--grid=40")
    assert joint < local < log_evidence
