"""Sphinx: `make docs`. Nothing is fetched from the network; external links are checked by `make docs-links` alone."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from gtsa import __version__

project, author, copyright = "gtsa", "the gtsa authors", "the gtsa authors, Apache-2.0"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "settings_reference",
    "benchmark_plots",
]
exclude_patterns = ["_build", "notebooks"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
root_doc = "index"
smartquotes = False  # --init is a flag, no dash

autodoc_typehints = "none"  # shapes and units are in the docstrings; the source is one click away
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
nitpick_ignore_regex = [("py:class", ".*")]  # shapes in docstrings, and classes of torch

html_theme = "pydata_sphinx_theme"
html_title = "gtsa"
html_static_path = ["_static"]
html_css_files = ["colours.css", "look.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": []}
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "back_to_top_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
linkcheck_timeout = 20

# Files of the repository that the pages link to on GitHub, and the pages that show them here
SHOWN = {"../LOG.md": "log.md", "../CONTRIBUTING.md": "contributing.md", "../CHANGELOG.md": "changelog.md"}


def show_root_files(app, docname, source):
    for file, page in SHOWN.items():
        up = "../" * docname.count("/")
        source[0] = re.sub(rf"\]\({re.escape(up + file)}(#[^)]*)?\)", rf"]({up}{page}\1)", source[0])


def write_colours(app, error):
    """The colours of all our pages (core/page.css), under the names by which the theme chooses light and dark."""
    if error is None and app.builder.format == "html":
        css = (HERE.parent / "src/gtsa/core/page.css").read_text()
        light, dark = re.findall(r":root \{([^}]*)\}", css)[:2]
        rules = f'html[data-theme="light"] {{{light}}}\nhtml[data-theme="dark"] {{{dark}}}\n'
        (Path(app.outdir) / "_static" / "colours.css").write_text(re.sub(r"color-scheme:[^;]*;", "", rules))


def setup(app):
    app.connect("source-read", show_root_files)
    app.connect("build-finished", write_colours)
