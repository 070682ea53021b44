"""The types: stubs are what is there, right uses pass, wrong ones are found at their line.

The type checkers come with ``scripts/lint``, which runs these tests too.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPING = Path(__file__).with_name("typing")
WRONG = TYPING / "wrong_uses.py"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

needs_mypy = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy comes with scripts/lint"
)
needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None, reason="pyright comes with scripts/lint"
)


def call(directory: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool, away from the source tree: it sees the package that is installed."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def lines_of_mypy(directory: Path, *files: Path) -> list[str]:
    options = ["--strict", "--config-file=", "--no-error-summary", "--cache-dir", str(directory)]
    done = call(directory, "mypy", *options, *map(str, files))
    assert not done.stderr, done.stderr
    found = re.findall(r"^(.*?):(\d+): error: ", done.stdout, re.MULTILINE)
    assert bool(found) == bool(done.returncode), done.stdout
    return [f"{Path(name).name}:{line}" for name, line in found]


def lines_of_pyright(directory: Path, *files: Path) -> list[str]:
    options = ["--outputjson", "--pythonpath", sys.executable]
    done = call(directory, "pyright", *options, *map(str, files))
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files)
    return [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}"
        for one in report["generalDiagnostics"]
    ]


CHECKERS = [
    pytest.param(lines_of_mypy, marks=needs_mypy, id="mypy"),
    pytest.param(lines_of_pyright, marks=needs_pyright, id="pyright"),
]


@pytest.mark.parametrize("check", CHECKERS)
def test_each_mistake_is_found_at_its_line(check, tmp_path):
    lines = WRONG.read_text(encoding="utf-8").splitlines()
    wanted = [f"{WRONG.name}:{n}" for n, line in enumerate(lines, 1) if "  # error: " in line]
    assert len(wanted) == 27
    assert check(tmp_path, WRONG) == wanted


@pytest.mark.parametrize("check", CHECKERS)
def test_the_examples_are_accepted(check, tmp_path):
    assert len(EXAMPLES) >= 6
    assert check(tmp_path, *EXAMPLES) == []


@needs_mypy
@pytest.mark.parametrize("module", ["milter", "mime", "Milter"])
def test_the_stubs_are_what_is_there(module, tmp_path):
    allowed = ["--ignore-unused-allowlist", "--allowlist", str(TYPING / "stubtest-allowlist.txt")]
    # Modules whose extras are not installed have no types to look at.
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nignore_missing_imports = true\n")
    done = call(tmp_path, "mypy.stubtest", module, "--mypy-config-file", str(config), *allowed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("check", CHECKERS)
def test_parameters_of_callbacks_may_have_any_name(check, tmp_path):
    assert check(tmp_path, TYPING / "own_names.py") == []


@pytest.mark.parametrize("check", CHECKERS)
def test_callbacks_may_be_coroutines(check, tmp_path):
    assert check(tmp_path, TYPING / "coroutines.py") == []
