"""The documentation: its examples run, its links lead somewhere, no public name is missing."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import milter
import pytest

import Milter
import mime

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_TESTS = ("guide.md", "testing.md", "tutorial.md")
MODULES = [
    milter,
    Milter,
    mime,
    *(
        importlib.import_module(f"Milter.{found.name}")
        for found in pkgutil.iter_modules(Milter.__path__)
        if not found.name.startswith("_")
    ),
]


def blocks(page: Path) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_examples_pass(tmp_path):
    """Each example with a test is a file of its own; the tutorial's two belong together."""
    wanted = 0
    for name in WITH_TESTS:
        for number, block in enumerate(blocks(DOCS / name)):
            file = f"test_{name[:-3]}_{number}.py"
            if name == "tutorial.md" and "def test_" not in block:
                file = "hello.py"
            (tmp_path / file).write_text(block, encoding="utf-8")
            wanted += block.count("\ndef test_")
    assert wanted > 8
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert re.search(rf"^{wanted} passed", done.stdout, re.MULTILINE), done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_is_python(page):
    for block in blocks(page):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_contents():
    listed = {
        (index.parent / line).with_suffix(".md")
        for index in (DOCS / "index.md", DOCS / "reference" / "index.md")
        for toc in re.findall(r"```{toctree}\n(.*?)```", index.read_text("utf-8"), re.DOTALL)
        for line in toc.split()
        if re.fullmatch(r"[a-z-]+(/[a-z-]+)?", line)
    }
    assert {*listed, DOCS / "index.md"} >= set(PAGES)


def public(module):
    """The public functions and classes of a module, and the methods of these."""
    for name in getattr(module, "__all__", None) or vars(module):
        value = getattr(module, name)
        owner = str(getattr(value, "__module__", "")).partition(".")[0]
        if name.startswith("_") or owner not in ("milter", "Milter", "mime"):
            continue
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        yield name, value
        for member, static in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and (
                inspect.isroutine(static) or isinstance(static, property)
            ):
                yield f"{name}.{member}", static


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module):
    assert module.__doc__
    assert [name for name, value in public(module) if not inspect.getdoc(value)] == []


def test_every_public_module_is_in_the_reference():
    text = "".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    for module in MODULES:
        assert f"automodule:: {module.__name__}\n" in text


def test_every_public_name_of_the_package_is_in_the_reference():
    text = (DOCS / "reference" / "milter-package.md").read_text("utf-8")
    own = [name for name in Milter.__all__ if not hasattr(milter, name) and name != "milter"]
    assert [name for name in own if f"Milter.{name}" not in text] == []
    listed = text.partition("Milter.Base\n")[2].partition("\n\n")[0]
    members = [name for name in vars(Milter.Base) if not name.startswith("_")]
    assert [name for name in members if not re.search(rf"\b{name}\b", listed)] == []
    constants = (DOCS / "reference" / "milter-module.md").read_text("utf-8")
    names = [name for name, value in vars(milter).items() if isinstance(value, int)]
    assert [name for name in names if f"`{name}`" not in constants] == []
