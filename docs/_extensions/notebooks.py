"""Notebooks of some pages, written when the site is built: `docs/notebooks/NAME.ipynb` of `docs/NAME.md`.

The page is the only source. Its Python blocks become cells, which `myst-nb` runs, and what the page shows of their
output is left out.
"""

from pathlib import Path
import re

import jupytext

FIRST = (
    "*[This page]({page}) as a notebook, run when this site was built. The button at the top has it as a file. It "
    "needs `pip install '.[examples]'` in a clone of the library.*"
)


def notebook_of(page: Path):
    """The page as a notebook without outputs."""
    text = page.read_text()
    text = re.sub(
        r"^```text\n.*?^```\n", "", text, flags=re.DOTALL | re.MULTILINE
    )  # printed by the cell before
    text = re.sub(
        r"^!\[[^\]]*\]\([^)]*\)\n", "", text, flags=re.MULTILINE
    )  # drawn by the cell before
    text = re.sub(r"^<!--.*?-->\n", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\((?!https?://|#)", "](../", text)
    title, rest = text.split("\n", 1)
    notebook = jupytext.reads(
        f"{title}\n\n{FIRST.format(page=f'../{page.name}')}\n{rest}", fmt="md"
    )
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    return notebook


def write(app) -> None:
    """Write the notebooks of `notebook_pages`, those that changed."""
    folder = Path(app.srcdir) / "notebooks"
    folder.mkdir(exist_ok=True)
    for name in app.config.notebook_pages:
        path, text = (
            folder / f"{name}.ipynb",
            jupytext.writes(notebook_of(Path(app.srcdir) / f"{name}.md"), "ipynb"),
        )
        # Cell ids are random: compare without them.
        bare = re.compile(r'"id": "[^"]*"')
        if not path.exists() or bare.sub("", path.read_text()) != bare.sub("", text):
            path.write_text(text)


def setup(app) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_config_value("notebook_pages", [], "env")
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
