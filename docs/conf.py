"""Sphinx's configuration; scripts/docs builds."""

from __future__ import annotations

from importlib import metadata

project = "pymilter"
author = "The pymilter developers"
project_copyright = "The pymilter developers, GPL-2.0-or-later"
release = version = metadata.version("pymilter")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"pymilter {release}"
html_static_path = ["_static"]
html_css_files = ["pymilter.css"]

# Headings can be linked to.
myst_heading_anchors = 3
if metadata.version("myst-parser").startswith("0.18."):
    suppress_warnings = ["ref.myst"]  # Debian 12's knows no links to files that are no pages

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
# The annotations name types that only type checkers import.
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _escape(app, what, name, obj, options, lines):
    """Docstrings that are plain text: what looks like markup in them is none."""
    if name.startswith("milter.") or name == "mime.MimeMessage.gettype":
        lines[:] = [line.replace("*", r"\*").replace("`", "'") for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _escape, priority=900)
