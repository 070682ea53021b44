"""Sphinx's configuration; scripts/docs builds."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer

project = "pymilter"
author = "The pymilter developers"
project_copyright = "The pymilter developers, GPL-2.0-or-later"
release = version = metadata.version("pymilter")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"pymilter {release}"
html_static_path = ["_static"]
html_css_files = ["pymilter.css"]
html_js_files = ["page.js"]
html_favicon = "_static/favicon.svg"

# The part of Python's inventory that is used here, as a file of text: a build asks no network.
# A line has a name, its type and its page; a name that is not there is no link, and no error.
PYTHON = Path(__file__).with_name("python.txt")
intersphinx_mapping = {"python": ("https://docs.python.org/3", str(PYTHON))}

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


# Packages whose public names are defined in modules within and say that they are found in the
# package: in the order in which the reference has them.
_FACADES = {
    "Milter.mta": (
        *("vocabulary", "errors", "address", "wire", "messages", "edits", "transaction", "client"),
    ),
    "Milter.mailfilter": (
        *("_errors", "_decisions", "_addresses", "_headers", "_body", "_mail", "_calls", "_filter"),
    ),
}


# What two of them have, and other modules mean by it.
_SAME_NAMES = {"Address": "Milter.Address", "Result": "Milter.mta.Result"}


def _say_which(app, doctree):
    """Have annotations of other modules say which of two types of one name they mean."""
    for node in doctree.findall(addnodes.pending_xref):
        if node.get("py:module") not in _FACADES and node["reftarget"] in _SAME_NAMES:
            node["reftarget"] = _SAME_NAMES[node["reftarget"]]


# What code in the text means by a name that stands without its module.
_HEADS = {
    "mailfilter": "Milter.mailfilter",
    "mail": "Milter.mailfilter.Mail",
    "mta": "Milter.mta.MTA",
    "self": "Milter.Base",
}
_SHORT = {
    **{name: f"Milter.{name}" for name in ("runmilter", "Base", "uniqueID")},
    **{
        name: f"Milter.Base.{name}"
        for name in (
            *("envfrom", "envrcpt", "eoh", "eom", "negotiate", "addheader", "chgheader"),
            *("addrcpt", "delrcpt", "chgfrom", "replacebody", "quarantine", "setreply"),
            *("getsymval", "setsymlist"),
        )
    },
    **{name: f"Milter.portable.{name}" for name in ("set_reply", "delete_headers", "queue_id")},
    **{name: f"Milter.pytest_plugin.{name}" for name in ("changes", "MilterApp")},
    "serve_prometheus": "Milter.metrics.serve_prometheus",
}


def _python_names():
    lines = PYTHON.read_text("utf-8").splitlines()[3:]
    return {name for name, kind, _ in map(str.split, lines) if "." in name or kind == "mod"}


_PYTHON_NAMES = _python_names()


def _meant(text):
    """The full name that code in the text may stand for, or None."""
    found = re.fullmatch(r"@?([A-Za-z_]\w*)((?:\.\w+)*)(?:\(.*\))?", text)
    if found is None:
        return None
    head, rest = found.groups()
    if not rest:
        return _SHORT.get(head) or (head if head in _PYTHON_NAMES else None)
    full = _HEADS.get(head, head) + rest
    return (
        full if full in _PYTHON_NAMES or full.startswith(("Milter.", "milter.", "mime.")) else None
    )


# What is a link already, or a heading.
_NOT_IN = (nodes.reference, addnodes.pending_xref, nodes.title)


def _link_code(app, doctree):
    """Have code in the text that is the name of something lead to what is said about it."""
    for node in list(doctree.findall(nodes.literal)):
        target = _meant(node.astext())
        above = node.parent
        if target is None or isinstance(above, _NOT_IN):
            continue
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=target, refdoc=app.env.docname
        )
        above.replace(node, link)
        link += node


def _analyzers(facade):
    names = [facade, *(f"{facade}.{part}" for part in _FACADES[facade])]
    analyzers = [ModuleAnalyzer.for_module(name) for name in names]
    for analyzer in analyzers:
        analyzer.analyze()
    return analyzers


def _find_comments(app):
    """Have comments on attributes, and the order of what is defined, be those of the modules."""
    for facade in _FACADES:
        outer, *inner = _analyzers(facade)
        for analyzer in inner:
            outer.attr_docs.update(analyzer.attr_docs)
            before = len(outer.tagorder)
            outer.tagorder.update({tag: before + place for tag, place in analyzer.tagorder.items()})


def _find_source(app, modname):
    """The source that a page shows, which is that of all the modules one after the other."""
    if modname not in _FACADES:
        return None
    code, tags = "", {}
    for analyzer in _analyzers(modname):
        before = code.count("\n")
        for tag, (kind, start, end) in analyzer.tags.items():
            tags[tag] = (kind, before + start, before + end)
        code += analyzer.code.rstrip("\n") + "\n"
    return code, tags


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", _find_comments)
    app.connect("doctree-read", _say_which)
    app.connect("doctree-read", _link_code)
    app.connect("viewcode-find-source", _find_source)
    app.connect("autodoc-process-docstring", _escape, priority=900)
