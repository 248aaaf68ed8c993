"""How Sphinx builds these pages: `make docs`. Nothing is fetched at build time, and the pages need no network."""

from importlib.metadata import version as version_of

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

project = "numpyro_vimco"
copyright = "Contributors to the numpyro_vimco project"
release = version = version_of("numpyro_vimco")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "literal"  # `name` in a docstring
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!numpyro_vimco).*")]  # other libraries: their pages would have to be fetched

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types, shapes and units

html_theme = "sphinx_book_theme"  # the theme of JAX, Optax and ArviZ: their readers find their way
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False}
html_title = f"numpyro_vimco {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False


def visit_math(self, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, by Docutils: browsers show it without a script, a font or a network.

    MathJax would be fetched from elsewhere when a page is read, and the packages that bring it along are large. What
    Docutils does not know is a warning, and so an error of the build, where MathJax would show it in the page.
    """
    block = isinstance(node, nodes.math_block)
    try:
        mathml = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s: %s", error, node.astext(), location=node)
        mathml = ""
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))


html_math_renderer = "mathml"
