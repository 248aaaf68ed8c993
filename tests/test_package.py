"""What surrounds the code: types that reach a user, rooms, one version."""

import ast
from graphlib import TopologicalSorter
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
from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit

def use(svi: SVI, x) -> None:
    posterior = fit(svi, random.key(0), 1000, x, tempering=0.3)
    reveal_type(posterior)
    reveal_type(Posterior(svi, posterior.params, x).resume(10))
    reveal_type(posterior.verdict)
    reveal_type(posterior.log_evidence)
    reveal_type(posterior.bounds)
    reveal_type(posterior.pareto_k)
    reveal_type(posterior.findings[0].remedy)
    reveal_type(posterior.diagnose(1000, random.key(0)))
    reveal_type(posterior.gradient_snr(random.key(0))["loc"])
    reveal_type(posterior.starts.agreement)
    posterior.diagnose(num_samples=1000)
    fit(svi, random.key(0), "1000", x)
    Posterior(svi)

reveal_type(numpyro_vimco.__version__)
reveal_type(VIMCOStar(alpha=0.5, num_particles=8, plate_particles={"data": 4}))
reveal_type(VIMCOStar().chunk_size)
reveal_type(AutoMixed(print, structure="conditional"))
VIMCOStar(num_particles="8")
VIMCOStar(aplha=0.5)
VIMCOStar(plate_particles={"data": "4"})
AutoMixed(print, rank="8")
"""

EXPECTED = [
    'note: Revealed type is "numpyro_vimco.posterior.posterior.Posterior"',
    'note: Revealed type is "numpyro_vimco.posterior.posterior.Posterior"',
    'note: Revealed type is "str"',
    'note: Revealed type is "float"',
    'note: Revealed type is "dict[int, float]"',
    'note: Revealed type is "float | numpy.ndarray[',
    'note: Revealed type is "str | None"',
    'note: Revealed type is "numpyro_vimco.diagnostics.verdict.Diagnostics"',
    "numpyro_vimco.diagnostics.gradient_noise.GradientStatistics",
    'note: Revealed type is "xarray.core.dataset.Dataset | None"',
    'Unexpected keyword argument "num_samples" for "diagnose" of "Posterior"',
    'Argument 3 to "fit" has incompatible type "str"; expected "int | None"',
    'Missing positional argument "result" in call to "Posterior"',
    'note: Revealed type is "str"',
    'note: Revealed type is "numpyro_vimco.objectives.elbo.VIMCOStar"',
    'note: Revealed type is "int | None"',
    'note: Revealed type is "numpyro_vimco.guides.auto_mixed.AutoMixed"',
    'Argument "num_particles" to "VIMCOStar" has incompatible type "str"; expected "int"',
    'Unexpected keyword argument "aplha" for "VIMCOStar"',
    'Dict entry 0 has incompatible type "str": "str"; expected "str": "int"',
    'Argument "rank" to "AutoMixed" has incompatible type "str"; expected "int | None"',
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


def room_of(module):
    return module.partition("/")[0]


def imports_of(file):
    """Modules of the package that a file imports, as paths within it; a room where a name comes from its `__init__`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numpyro_vimco."):
            path = node.module.replace(".", "/").removeprefix("numpyro_vimco/")
            for alias in node.names:
                yield f"{path}/{alias.name}" if (PACKAGE / path / f"{alias.name}.py").exists() else path
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module != "numpyro_vimco", f"{file}: import from the module itself"


@pytest.fixture(scope="module")
def imports():
    """From each module to those that it imports; the `__init__` of a room has the room's name."""
    files = {str(file.relative_to(PACKAGE).with_suffix("")): file for file in PACKAGE.rglob("*.py")}
    return {name.removesuffix("/__init__"): set(imports_of(file)) for name, file in files.items() if name != "__init__"}


@pytest.fixture(scope="module")
def rooms(imports):
    """From each room to those that it imports from."""
    found = {room_of(module): set() for module in imports}
    for module, imported in imports.items():
        found[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}
    return found


def test_rooms_import_only_from_those_in_the_table(rooms):
    rows = re.findall(r"^\| `(\w+)(/?)` \|.*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    table = {room: set(re.findall(r"`(\w+)`", others)) for room, _, others in rows}
    assert table.keys() == rooms.keys()
    for room, is_folder, _ in rows:
        assert bool(is_folder) == (PACKAGE / room).is_dir(), room
    common = {room for room, is_folder, _ in rows if not is_folder and table[room] <= {"compilation", "private"}}
    for room, others in rooms.items():
        assert others <= table[room] | common, room
        assert table[room] <= others, f"{room} may import from more rooms than it does"
    for room in common:
        assert rooms[room] <= {"compilation", "private"}, room


def test_there_is_no_circle(imports, rooms):
    TopologicalSorter(rooms).prepare()  # raises an error that names the circle
    for room in rooms:
        inside = {module: imported for module, imported in imports.items() if room_of(module) == room}
        TopologicalSorter({m: {x for x in imported if x in inside} for m, imported in inside.items()}).prepare()


def test_rooms_are_small(imports):
    for room in map(room_of, imports):
        assert len([module for module in imports if module.startswith(f"{room}/")]) < 10, room


def test_import_waits_for_what_is_seldom_needed():
    """Matplotlib, pandas and funsor, and what brings them, would take longer than all the rest."""
    script = "import sys, numpyro; before = set(sys.modules); import numpyro_vimco; print(*set(sys.modules) - before)"
    new = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"matplotlib", "pandas", "funsor", "xarray", "arviz", "scipy.stats"} & set(new.split())


def test_modules_that_public_docstrings_name_have_a_place_in_the_reference():
    """`make docs` fails otherwise, after minutes."""
    documented = set(re.findall(r"automodule:: ([\w.]+)", (ROOT / "docs" / "api.md").read_text()))
    for name in numpyro_vimco.__all__:
        public = getattr(numpyro_vimco, name)
        texts = [public.__doc__ or "", *(getattr(member, "__doc__", "") or "" for member in vars(public).values())]
        named = {module for text in texts for module in re.findall(r":mod:`~?([\w.]+)`", text)}
        assert named <= documented, name


def test_one_version():
    assert f"\nversion: {numpyro_vimco.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_compiler_sums_right():
    a, x = np.random.default_rng(0).normal(size=(2, 20_000, 6)).astype(np.float32)
    found = jax.jit(lambda x: jnp.exp(jnp.sum(a[:6] * x[:, None, :], -1)))(x)
    np.testing.assert_allclose(found, np.exp(x @ a[:6].T), rtol=1e-4)


def test_warning_of_a_compiler_that_does_not(monkeypatch):
    monkeypatch.setattr(jaxlib.version, "__version__", "0.10.2")
    with pytest.warns(UserWarning, match="computes wrong sums"):
        importlib.reload(numpyro_vimco)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(numpyro_vimco)
