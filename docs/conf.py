"""How Sphinx builds these pages: `make docs`. Nothing is fetched at build time, and the pages need no network."""

import os
from pathlib import Path
import sys
from xml.etree.ElementTree import tostring

from docutils import nodes
from sphinx.util import logging
import ziamath
from ziamath.tex import tex2mml

import numpyro_vimco

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "numpyro_vimco"
author = "the contributors to numpyro_vimco"
release = version = numpyro_vimco.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "links",
    "notebooks",
]
# The page of the posteriors has no results yet: `make posteriors` writes them.
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
default_role = "literal"  # `name` in a docstring
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!numpyro_vimco).*")
]  # other libraries: their pages would have to be fetched

# Pages that are notebooks as well. They run when they have changed; what they print goes into the site.
notebook_pages = ["quick_start", "occupancy"]
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / ".jupyter_cache")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # tqdm's, on widgets that are not installed
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings give types, shapes and units

html_theme = "sphinx_book_theme"  # the theme of JAX, Optax and ArviZ: their readers find their way
# Pages of pictures and of long lines have no list of headings beside them, and take its room.
EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.md"))
WIDE = ["index", "gallery", *(f"examples/{page.stem}" for page in EXAMPLES)]
html_theme_options = {
    "use_fullscreen_button": False,
    "secondary_sidebar_items": {"**": ["page-toc"], **{page: [] for page in WIDE}},
}
html_title = f"numpyro_vimco {os.getenv('DOCS_VERSION', release)}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_use_index = html_domain_indices = False  # the API is one page


# ziamath 0.13 draws a hat as a wide one, beside its letter, and a relation without room around it.
REPLACED = {
    "<mo>&#x00302;": '<mo stretchy="false">&#x002C6;',
    "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>",
}


def visit_math(self, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as SVG, drawn here: it looks the same in every browser, without a script, a font or a network.

    MathJax and KaTeX would be fetched from elsewhere when a page is read, or be megabytes in this repository, and
    browsers draw MathML as well as the fonts that they find. What cannot be drawn is an error of the build.
    """
    latex, block = node.astext(), isinstance(node, nodes.math_block)
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    try:
        mathml = tex2mml(latex, inline=not block)
        for drawn_badly, drawn_well in REPLACED.items():
            mathml = mathml.replace(drawn_badly, drawn_well)
        formula = ziamath.Math(mathml, size=18 if block else 16)
        unknown = [
            element.text
            for element in formula.mathml.iter()
            if "\\" in (element.text or "")
        ]
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}")
        svg = formula.svgxml()
    except Exception as error:
        logging.getLogger(__name__).warning(
            "formula %s: %r", latex, error, location=node
        )
        raise nodes.SkipNode from error
    svg.attrib |= {"role": "img", "aria-label": latex, "class": "formula"}
    svg.attrib["style"] = f"vertical-align: {formula.getyofst():.1f}px"
    drawn = tostring(svg, encoding="unicode")
    self.body.append(f'<div class="math">{drawn}</div>' if block else drawn)
    raise nodes.SkipNode


def setup(app) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("svg", (visit_math, None), (visit_math, None))


html_math_renderer = "svg"
ziamath.config.math.color = "currentColor"
ziamath.config.svg2 = False  # glyphs as paths: symbols of one name would meet in a page
ziamath.config.precision = 2
