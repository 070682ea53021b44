"""A package ``Milter`` and an extension module that are not of one installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import milter
import pytest
from support.process import WAIT, python_command

import Milter

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(Milter.__file__).parent
EXTENSION = Path(milter.__file__)
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
INSTALL = f"{sys.executable} -m pip install"


def said(*path: Path, before: str = "pass") -> str:
    """The last line of what an import says with these directories alone, before Python's own."""
    code = f"import sys; sys.path[:0] = {[str(each) for each in path]}; {before}; import Milter"
    done = subprocess.run(
        [*python_command(), "-S", "-c", code],
        cwd=path[0],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    return done.stderr.splitlines()[-1] if done.returncode else ""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree, in which nothing was built, with a version of its own."""
    tree = tmp_path / "tree"
    shutil.copytree(PACKAGE, tree / "Milter", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "pyproject.toml").write_text('[project]\nname = "pymilter"\nversion = "9.9"\n')
    return tree


def install(place: Path, version: str | None) -> Path:
    """An installation of the extension module alone; returns its file."""
    place.mkdir()
    if version:
        about = place / f"pymilter-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: pymilter\nVersion: {version}\n")
    file = place / f"milter{SUFFIX}"
    shutil.copyfile(EXTENSION, file)
    return file


def test_a_source_tree_without_an_installation(tree: Path) -> None:
    python = f"Python {'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    assert said(tree) == (
        f"ImportError: Milter 9.9 ({tree}/Milter) needs the extension module milter, which "
        f"{python} does not have: this is the source tree; install it: {INSTALL} {tree}"
    )


def test_a_python_of_a_distribution_is_left_alone(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    python = tmp_path / "usr" / "bin" / "python3"
    before = (
        f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}; "
        f"sys.executable = {str(python)!r}"
    )
    text = said(tree, before=before)
    filters = "/opt/filters"
    assert text.endswith(
        f": this is the source tree; install it: {python} -m venv {filters} && "
        f"{filters}/bin/pip install {tree}"
    )
    # In a virtual environment pip installs.
    python.parent.mkdir(parents=True)
    (tmp_path / "usr" / "pyvenv.cfg").touch()
    text = said(tree, before=before)
    assert text.endswith(f"install it: {python} -m pip install {tree}")


def test_a_module_that_was_built_for_another_python(tree: Path) -> None:
    (tree / "pyproject.toml").unlink()
    about = tree / "pymilter-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: pymilter\nVersion: 1.2\n")
    (tree / "milter.cpython-12-other.so").touch()
    text = said(tree)
    assert text.startswith(f"ImportError: Milter 1.2 ({tree}/Milter) needs the extension module")
    assert text.endswith(
        " cannot load the one beside it, milter.cpython-12-other.so: install pymilter with this "
        "Python"
    )


@pytest.mark.parametrize(
    ("version", "name"), [("1.0.5", "1.0.5"), (None, "of an unknown version")], ids=["old", "none"]
)
def test_a_source_tree_beside_an_installation(
    tree: Path, tmp_path: Path, version: str | None, name: str
) -> None:
    file = install(tmp_path / "site", version)
    assert said(tree, tmp_path / "site") == (
        f"ImportError: Milter 9.9 ({tree}/Milter) and the extension module milter {name} ({file}) "
        "do not belong together: this is the source tree; run Python in another directory for what "
        f"is installed, or install this one: {INSTALL} {tree}"
    )


def test_the_same_version_is_taken(tree: Path, tmp_path: Path) -> None:
    install(tmp_path / "site", "9.9")
    assert said(tree, tmp_path / "site") == ""


def test_two_installations(tree: Path, tmp_path: Path) -> None:
    (tree / "pyproject.toml").unlink()
    about = tree / "pymilter-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: pymilter\nVersion: 1.2\n")
    file = install(tmp_path / "site", "1.1")
    assert said(tree, tmp_path / "site") == (
        f"ImportError: Milter 1.2 ({tree}/Milter) and the extension module milter 1.1 ({file}) do "
        f"not belong together: remove one of the two, or put {tree} first on sys.path"
    )
