"""What surrounds the code: types that reach a user, layers, one version."""

import ast
import importlib
from pathlib import Path
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import numpyro_vimco

ROOT = Path(__file__).parent.parent

SCRIPT = """\
from jax import random
from numpyro.infer import SVI
import numpyro_vimco
from numpyro_vimco import AutoMixed, VIMCOStar, compare_objectives, gradient_snr, importance_diagnostics

def fit(svi: SVI, result) -> None:
    diagnostics = importance_diagnostics(svi, result, rng_key=random.key(0))
    reveal_type(diagnostics.log_evidence)
    reveal_type(diagnostics.bounds)
    reveal_type(diagnostics.pareto_k)
    reveal_type(gradient_snr(svi, result.params, rng_key=random.key(0))["loc"])
    reveal_type(compare_objectives(svi, {}, {"VIMCOStar": VIMCOStar}, rng_key=random.key(0)))

reveal_type(numpyro_vimco.__version__)
reveal_type(VIMCOStar(alpha=0.5, num_particles=8, plate_particles={"data": 4}))
reveal_type(VIMCOStar().chunk_size)
reveal_type(AutoMixed(print, structure="conditional"))
VIMCOStar(num_particles="8")
VIMCOStar(aplha=0.5)
VIMCOStar(plate_particles={"data": "4"})
AutoMixed(print, rank="8")
importance_diagnostics(None, None)
"""

EXPECTED = [
    'note: Revealed type is "float"',
    'note: Revealed type is "dict[int, float]"',
    'note: Revealed type is "float | numpy.ndarray[',
    "numpyro_vimco.diagnostics.gradient_noise.GradientStatistics",
    'note: Revealed type is "xarray.core.dataset.Dataset"',
    'note: Revealed type is "str"',
    'note: Revealed type is "numpyro_vimco.objectives.elbo.VIMCOStar"',
    'note: Revealed type is "int | None"',
    'note: Revealed type is "numpyro_vimco.guides.auto_mixed.AutoMixed"',
    'Argument "num_particles" to "VIMCOStar" has incompatible type "str"; expected "int"',
    'Unexpected keyword argument "aplha" for "VIMCOStar"',
    'Dict entry 0 has incompatible type "str": "str"; expected "str": "int"',
    'Argument "rank" to "AutoMixed" has incompatible type "str"; expected "int | None"',
    'Missing named argument "rng_key" for "importance_diagnostics"',
]

# NumPyro has no annotations for its users, and to follow JAX's takes longer than the rest.
CONFIG = """\
[mypy]
[mypy-numpyro.*]
ignore_missing_imports = true
[mypy-jax.*]
follow_imports = skip
"""


def test_mypy_of_a_user(tmp_path):
    pytest.importorskip("mypy")
    script, config = tmp_path / "script.py", tmp_path / "mypy.ini"
    script.write_text(SCRIPT)
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", tmp_path / "cache", script]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    found = [line for line in output.splitlines() if re.search("Revealed|error:", line)]
    assert len(found) == len(EXPECTED), output
    for line, expected in zip(found, EXPECTED):
        assert line.startswith("script.py") and expected in line, output


PACKAGE = Path(numpyro_vimco.__file__).parent
PUBLIC_NAMES = {"control_variates", "distributions"}  # modules that only give a room's file its public name


def imports_of(module):
    """Modules of the package that a module imports, as paths within it."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numpyro_vimco"):
            path = node.module.replace(".", "/").removeprefix("numpyro_vimco").removeprefix("/")
            for alias in node.names:
                inner = f"{path}/{alias.name}".removeprefix("/")
                yield inner if (PACKAGE / f"{inner}.py").exists() else path


def test_modules_import_only_from_those_below():
    layers = re.findall(r"^ *- `([\w/]+)`: ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    files = {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")}
    assert set(layers) == {name for name in files if not name.endswith("__init__")} - PUBLIC_NAMES
    for i, module in enumerate(layers):
        assert set(imports_of(module)) <= set(layers[i + 1 :]), module


def test_import_waits_for_what_is_seldom_needed():
    """Matplotlib, pandas and funsor, and what brings them, would take longer than all the rest."""
    script = "import sys, numpyro; before = set(sys.modules); import numpyro_vimco; print(*set(sys.modules) - before)"
    new = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"matplotlib", "pandas", "funsor", "xarray", "arviz", "scipy.stats"} & set(new.split())


def test_one_version():
    assert f"\nversion: {numpyro_vimco.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_compiler_sums_right():
    a, x = np.random.default_rng(0).normal(size=(2, 20_000, 6)).astype(np.float32)
    found = jax.jit(lambda x: jnp.exp(jnp.sum(a[:6] * x[:, None, :], -1)))(x)
    np.testing.assert_allclose(found, np.exp(x @ a[:6].T), rtol=1e-4)


def test_warning_of_a_compiler_that_does_not(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")
    with pytest.warns(UserWarning, match="computes wrong sums"):
        importlib.reload(numpyro_vimco)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(numpyro_vimco)
