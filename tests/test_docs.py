"""Every Python block of the README and the docs runs, page by page, from top to bottom; and pages have their form."""

import inspect
from pathlib import Path
import re
import textwrap

import jax
import jax.numpy as jnp
import numpyro
from numpyro.infer import MCMC, SVI
import optax
import pytest

import numpyro_vimco
from numpyro_vimco import control_variates

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ("own_estimator.md",)
# Those that `make docs` runs as notebooks, and those that take minutes.
WEEKLY = ("quick_start", "occupancy", "bad_to_good", "checking_a_fit", "refining", "which_objective", "writing_a_guide")
MARKS = {page: () for page in SHORT} | {f"{page}.md": (pytest.mark.long, pytest.mark.weekly) for page in WEEKLY}
COLUMNS = 88  # of the site's column


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ's own
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=MARKS.get(page.name, pytest.mark.long)) for page in PAGES if blocks(page)],
)
def test_code_of_page_runs(page):
    namespace = {}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def test_blocks_are_no_wider_than_the_column():
    for page in PAGES:
        for block in blocks(page, "(?:python|text)"):
            for line in block.splitlines():
                assert len(line) <= COLUMNS, f"{page.name}: {line}"


def test_text_blocks_are_not_empty():
    for page in PAGES:
        assert all(map(str.strip, blocks(page, "text"))), f"{page.name}: `python docs/outputs.py` fills them"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_each_example_has_a_page_in_the_gallery():
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        page = ROOT / "docs" / "examples" / f"{example.stem}.md"
        assert f"../../examples/{example.name}" in page.read_text()
        assert f":link: examples/{example.stem}\n" in gallery


@pytest.mark.long
@pytest.mark.weekly
@pytest.mark.filterwarnings("ignore")
def test_each_public_name_has_an_example_that_runs():
    """Those of objectives have model and guide of `VIMCOStar`, and others the model, data and posterior of `fit`."""
    of_objectives, of_others = imported(), imported()
    exec(example_of("VIMCOStar"), of_objectives)
    exec(example_of("fit"), of_others)
    for name in numpyro_vimco.__all__:
        value = getattr(numpyro_vimco, name)
        is_objective = isinstance(value, type) and issubclass(value, numpyro_vimco.ImportanceWeightedELBO)
        exec(example_of(name), dict(of_objectives if is_objective else of_others))


def imported():
    """What the examples of docstrings take as known."""
    names = {"random": jax.random, "jnp": jnp, "numpyro": numpyro, "dist": numpyro.distributions, "optax": optax}
    names |= {"SVI": SVI, "MCMC": MCMC, "control_variates": control_variates}
    return names | {name: getattr(numpyro_vimco, name) for name in numpyro_vimco.__all__}


def example_of(name):
    """The code behind "Example::" in the docstring of a public name."""
    doc = inspect.getdoc(getattr(numpyro_vimco, name)) + "\n"
    found = re.search(r"^Example[^\n]*::\n\n((?: {4}[^\n]*\n|\n)+)", doc, flags=re.MULTILINE)
    assert found, f"the docstring of `{name}` has no example"
    return textwrap.dedent(found[1])
