"""The documentation's pages, and the examples in them and in docstrings."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path

import milter
import pytest

import Milter
import mime

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SECONDS = 60

ALL_MODULES = [
    milter,
    Milter,
    mime,
    *(
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(Milter.__path__, "Milter.")
        if found.name != "Milter.__main__"
    ),
]


def blocks(page: Path, language: str = "python") -> list[str]:
    """The examples of a page in one language, '' for those without."""
    text = re.findall(r"^```(\S*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [block for kind, block in text if kind == language]


def commands(block: str) -> list[list[str]]:
    """The commands of ``python -m Milter`` in a block, each as its arguments."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    found = (re.search(r"python3? -m Milter (.*?)(?: &$|>|$)", line) for line in lines)
    return [shlex.split(one[1], comments=True) for one in found if one]


def docstring_examples() -> list:
    """Each literal block in a docstring of a module or of what is in it."""
    found = []
    for module in ALL_MODULES[1:]:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                for block in re.findall(r"::\n\n((?: {4}.*\n|\n)+)", text + "\n"):
                    found.append(pytest.param(module.__name__, textwrap.dedent(block)))
    return found
