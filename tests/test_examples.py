"""The examples run, in a quick mode, and what they print holds."""

import importlib.util
from pathlib import Path

import arviz as az
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *argv):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(module.parse(argv))


@pytest.mark.filterwarnings("ignore")  # matplotlib's, scikit-learn's and ArviZ's own
def test_variable_selection(tmp_path):
    gaps, error = run("variable_selection", "--num-steps=1500", f"--output={tmp_path}")
    assert -0.1 < gaps["VIMCOStar"] < 0.5 < gaps["TraceGraph_ELBO"] - 5
    assert error < 0.1  # the full run: below 0.05
    assert (tmp_path / "variable_selection.png").stat().st_size > 10_000
    posterior = az.from_netcdf(str(tmp_path / "variable_selection.nc"))["posterior"]
    assert posterior["included"].shape == (1, 4000, 10)


def test_gaussian_mixture():
    joint, local, truth = run("gaussian_mixture", "--num-steps=200")
    assert joint + 10 < local < truth


def test_n_mixture():
    log_evidence, ((joint, *_), (local, *_)) = run("n_mixture", "--num-steps=400", "--grid=40")
    assert joint < local < log_evidence


# Standard deviations are of 800 draws of 5 coordinates each: their error is about 2 %, that of a slope from N = 64 to
# 512 about 0.01 (0.03 for the variance), and corrections to the leading order in N are of that size.
def test_gaussian_snr(tmp_path):
    table, slopes = run("gaussian_snr", "--quick", f"--output={tmp_path}")
    snr, variance = (slopes[quantity]["near", 5][0.0] for quantity in ("SNR", "variance"))
    for name in ("VIMCO-⋆", "doubly reparam."):
        assert abs(snr[name] - 0.5) < 0.1
        assert abs(variance[name] + 3) < 0.2
    for name in ("VIMCO geometric", "VIMCO arithmetic", "plain pathwise"):
        assert abs(snr[name] + 0.5) < 0.1
        assert abs(variance[name] + 1) < 0.2
    assert table["bias in errors"].abs().max() < 6
    variance = table[(table["guide"] == "near") & (table["α"] == 0.5)].groupby("estimator")["variance"].mean()
    assert variance["VIMCO-⋆, best constant"] < variance["VIMCO-⋆"]
    assert (tmp_path / "gaussian_snr.png").stat().st_size > 10_000
    assert (tmp_path / "gaussian_snr.csv").read_text().count("\n") == len(table) + 1
