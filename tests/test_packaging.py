"""What the files that make packages say of the project: that they agree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def found(path: str, pattern: str) -> str:
    """The first group of ``pattern`` in a file of the project."""
    match = re.search(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, f"{path} has no {pattern}"
    return match[1]


VERSION = found("pyproject.toml", r'^version = "(.*)"$')


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("debian/changelog", r"\Apymilter \((.*)-[^-]+\) "),
        ("pymilter.spec", r"^Version: +(.*)$"),
        ("pymilter.spec", r"^%changelog\n\* .* - (.*)-1$"),
        ("docs/pymilter.1", r'^\.TH PYMILTER 1 \S+ "pymilter (.*)" '),
    ],
)
def test_the_version_is_the_same_everywhere(path: str, pattern: str) -> None:
    assert found(path, pattern) == VERSION


@pytest.mark.parametrize("script", ["debian/tests/wire", "scripts/test-installed"])
def test_the_suites_of_packages_name_files_that_are_there(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8").replace("\\\n", " ")
    lists = re.findall(r"^ *for name in (.*); do$", text, re.MULTILINE)
    names = [name for words in lists for name in words.split()]
    assert len(names) > 20
    assert [name for name in names if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []


def test_the_interpreters_are_those_of_the_classifiers() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    classified = set(re.findall(r"Python :: 3\.(\d+)", text))
    build = found("pyproject.toml", r"(?s)^\[tool\.cibuildwheel\]\nbuild = \[(.*?)\]")
    assert set(re.findall(r'"cp3(\d+)-\*"', build)) == classified


def test_every_command_is_in_the_manual_page() -> None:
    page = (ROOT / "docs" / "pymilter.1").read_text(encoding="utf-8")
    assert re.findall(r"^\.SS (\w+)$", page, re.MULTILINE) == ["run", "config", "check", "send"]


@pytest.mark.parametrize("path", ["debian/rules", "debian/tests/wire", "debian/tests/service"])
def test_what_is_run_is_executable(path: str) -> None:
    assert (ROOT / path).stat().st_mode & 0o111


@pytest.mark.parametrize("path", ["debian/tests/wire", "debian/tests/service"])
def test_the_shell_takes_the_scripts(path: str) -> None:
    subprocess.run(["sh", "-n", str(ROOT / path)], check=True, timeout=60)
