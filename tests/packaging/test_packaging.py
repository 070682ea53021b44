"""What the files that make packages say of the project: that they agree."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("debian/changelog", r"^ -- (.*)  "),
        ("debian/copyright", r"^Upstream-Contact: (.*)$"),
        ("pymilter.spec", r"^%changelog\n\* \w+ \w+ \d+ \d+ (.*) - "),
    ],
)
def test_the_maintainer_is_the_same_everywhere(path: str, pattern: str) -> None:
    maintainer = found("debian/control", "^Maintainer: (.*)$")
    assert found(path, pattern) == maintainer
    author = found("pyproject.toml", r'^authors = \[\{ name = "(.*)" \}\]$')
    assert maintainer.startswith(f"{author} <")


@pytest.mark.parametrize("script", ["debian/tests/wire", "scripts/test-installed"])
def test_the_suites_of_packages_name_files_that_are_there(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8").replace("\\\n", " ")
    lists = re.findall(r"^ *for name in (.*); do$", text, re.MULTILINE)
    names = [name for words in lists for name in words.split()]
    assert len(names) > 20
    files = [ROOT / "tests" / re.sub("([^/]+)$", r"test_\1.py", name) for name in names]
    assert [str(path) for path in files if not path.is_file()] == []


def test_the_interpreters_are_those_of_the_classifiers() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    classified = set(re.findall(r"Python :: 3\.(\d+)", text))
    build = found("pyproject.toml", r"(?s)^\[tool\.cibuildwheel\]\nbuild = \[(.*?)\]")
    assert set(re.findall(r'"cp3(\d+)-\*"', build)) == classified
    assert "Python :: Free Threading :: " in text
    assert re.findall(r'"cp3(\d+)t-\*"', build) == ["14", "15"]


def test_macos_wheels_are_for_the_macos_that_builds_them() -> None:
    target = found("pyproject.toml", r'MACOSX_DEPLOYMENT_TARGET = "(\d+)\.0"')
    runners = found(".github/workflows/wheels.yml", r"^ +os: \[(.*)\]$")
    assert set(re.findall(r"macos-(\d+)", runners)) == {target}


def test_actions_are_commits_and_each_job_ends() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        used = re.findall(r"uses: (.*)", text)
        assert used
        assert [
            each for each in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", each)
        ] == []
        assert text.count("runs-on: ") == len(re.findall(r"^    timeout-minutes: \d+$", text, re.M))


def test_the_plugin_asks_for_pytest_alone() -> None:
    assert found("pyproject.toml", r"^test = \[(.*)\]$") == '"pytest>=8"'


def test_every_extra_is_on_the_page_of_installation() -> None:
    table = found("pyproject.toml", r"(?s)^\[project\.optional-dependencies\]\n(.*?)^\[")
    extras = re.findall(r"^(\w+) = ", table, re.MULTILINE)
    page = found("docs/installation.md", r"(?s)^## Extras\n(.*?)^## ")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == sorted(extras)


def test_a_package_index_gets_no_links_into_the_repository() -> None:
    about = metadata.metadata("pymilter")
    text = about.get_payload() or about["Description"]
    assert "# pymilter" in text
    assert "[`" not in text and "`stamp_header.py`" in text
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link] == []


def script(path: str) -> ModuleType:
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


WHEEL = {
    "libmilter": "pymilter.libs/libmilter-8f1b2c3d.so.1.0.1",
    "its licence": "pymilter-1.1.0.dist-info/licenses/LICENSE.libmilter",
    "the licence": "pymilter-1.1.0.dist-info/licenses/COPYING",
    "the module": "milter.cpython-311-x86_64-linux-gnu.so",
    "the MTA's side": "Milter/mta/__init__.py",
    "the commands": "Milter/_cli/__init__.py",
}
ABOUT = "Name: pymilter\nLicense-Expression: GPL-2.0-or-later AND Sendmail-8.23\n"


@pytest.mark.parametrize("without", [None, *WHEEL, "the expression"])
def test_a_wheel_without_one_of_these_is_refused(
    without: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pymilter.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        about = "Name: pymilter\n" if without == "the expression" else ABOUT
        wheel.writestr("pymilter-1.1.0.dist-info/METADATA", about)
        for what, name in WHEEL.items():
            if what != without:
                wheel.writestr(name, "")
    status = script("scripts/wheel_contents.py").main([str(path)])
    said = capsys.readouterr()
    if without is None:
        assert (status, said.err) == (0, "")
    else:
        assert status == 1
        assert len(said.err.splitlines()) == 1
        assert (without if without in WHEEL else "License-Expression") in said.err


def result(version: str) -> dict[str, Any]:
    """What tests/integration/applications/run.py writes."""
    case = {
        "said": ["MAIL: 250 2.1.0 Ok", ".: 250 2.0.0 Ok: queued as 4F1A2B"],
        "arrived": ["Received: x\r\n\tby mx.test (Postfix) with ESMTP id 4F1A2B\r\n\r\ntext\r\n"],
        "signatures": [[]],
    }
    cases = {f"case {number}": case for number in range(40)}
    return {"versions": {"pymilter": version}, "cases": copy.deepcopy({"a": cases, "b": cases})}


def compared(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> int:
    (tmp_path / "before.json").write_text(json.dumps(before))
    (tmp_path / "after.json").write_text(json.dumps(after))
    page = ["--update-docs", str(tmp_path / "page.md")]
    return int(script("tests/integration/applications/compare.py").main([*page, str(tmp_path)]))


def test_what_changes_by_nature_makes_no_difference(tmp_path: Path) -> None:
    before, after = result("1.0.5"), json.loads(json.dumps(result("1.1.0")).replace("4F1A2B", "9C"))
    assert compared(tmp_path, before, after) == 0
    page = (tmp_path / "page.md").read_text()
    assert "80 cases, no difference" in page
    assert page.count("the same |") == 80
    assert "| pymilter, Debian's own | 1.0.5 |" in page


def other_body(after: dict[str, Any]) -> None:
    (message,) = after["cases"]["b"]["case 3"]["arrived"]
    after["cases"]["b"]["case 3"]["arrived"] = [message.replace("text", "test")]


def one_more(after: dict[str, Any]) -> None:
    after["cases"]["b"]["more"] = after["cases"]["b"]["case 3"]


def one_less(after: dict[str, Any]) -> None:
    del after["cases"]["b"]["case 3"]


def itself(after: dict[str, Any]) -> None:
    after["versions"]["pymilter"] = "1.0.5"


@pytest.mark.parametrize("change", [other_body, one_more, one_less, itself])
def test_any_other_difference_fails(change: Any, tmp_path: Path) -> None:
    before, after = result("1.0.5"), result("1.1.0")
    change(after)
    assert compared(tmp_path, before, after) == 1
    assert not (tmp_path / "page.md").exists()


def test_a_comparison_of_too_little_fails(tmp_path: Path) -> None:
    before, after = result("1.0.5"), result("1.1.0")
    for each in (before, after):
        each["cases"]["b"] = {"case 1": each["cases"]["b"]["case 1"]}
    assert compared(tmp_path, before, after) == 1
    for each in (before, after):
        del each["cases"]["b"]
    assert compared(tmp_path, before, after) == 1


def test_the_page_of_applications_is_of_this_version() -> None:
    columns = found("docs/applications.md", r"^\| pymilter, this one \| (.*) \|$").split(" | ")
    assert [column.partition("-")[0] for column in columns] == [VERSION] * 3
    runs = found("docs/applications.md", r"^\|  \| (.*) \|$").split(" | ")
    assert runs == ["bookworm", "bookworm-pip", "trixie"]
    text = (ROOT / "docs" / "applications.md").read_text(encoding="utf-8")
    assert text.count("| the same") > 150
    assert "DIFFERENT" not in text


def test_every_command_is_in_the_manual_page() -> None:
    page = (ROOT / "docs" / "pymilter.1").read_text(encoding="utf-8")
    commands = re.findall(r"^\.SS (\w+)$", page, re.MULTILINE)
    assert commands == ["run", "config", "check", "send", "record"]


@pytest.mark.parametrize("command", ["run", "config", "check"])
def test_every_option_is_in_the_manual_page_and_no_other(command: str) -> None:
    page = (ROOT / "docs" / "pymilter.1").read_text(encoding="utf-8")
    section = page.replace(r"\-", "-").partition(f"\n.SS {command}\n")[2].partition("\n.S")[0]
    # The entries' heads: a line after .TP.
    documented = re.findall(
        r"--[a-z-]+", "".join(re.findall(r"^\.TP\n(.*)$", section, re.MULTILINE))
    )
    said = subprocess.run(
        [sys.executable, "-m", "Milter", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    heads = re.findall(r"^  (-[^\s,]+(?:, -[^\s,]+)*)", said, re.MULTILINE)
    options = re.findall(r"--[a-z-]+", " ".join(heads))
    assert sorted(documented) == sorted({*options} - {"--help"})


DEBIAN_TESTS = [
    name
    for line in re.findall(
        r"^Tests: (.*)$", (ROOT / "debian/tests/control").read_text("utf-8"), re.M
    )
    for name in re.split(r"[, ]+", line)
]


def test_the_tests_of_the_packages_are_listed() -> None:
    files = [path for path in (ROOT / "debian" / "tests").iterdir() if path.is_file()]
    assert {path.name for path in files if path.stat().st_mode & 0o111} == {*DEBIAN_TESTS}


@pytest.mark.parametrize(
    "path", ["debian/rules", *(f"debian/tests/{name}" for name in DEBIAN_TESTS)]
)
def test_what_is_run_is_executable(path: str) -> None:
    assert (ROOT / path).stat().st_mode & 0o111


@pytest.mark.parametrize("name", DEBIAN_TESTS)
def test_the_shell_takes_the_scripts(name: str) -> None:
    subprocess.run(["sh", "-n", str(ROOT / "debian/tests" / name)], check=True, timeout=60)


def test_every_module_is_installed() -> None:
    # Whatever folder a module is in: a package that is not listed would be left out in silence.
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "Milter").rglob("*.py")}
    installed = {str(file) for file in metadata.files("pymilter") or []}
    assert sources - installed == set()
    assert {name for name in installed if re.match(r"Milter/.*\.py$", name)} <= sources
    folders = {path.parent for path in (ROOT / "Milter").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_folder_collides_with_the_package() -> None:
    # Where upper and lower case are one, milter/ would be Milter/.
    assert [path.name for path in ROOT.iterdir() if path.name.lower() == "milter"] == ["Milter"]
