"""The shell scripts, as far as they can be tried without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").iterdir()
    if path.is_file() and path.suffix != ".sh" and path.read_text().startswith("#!")
)
SHELL = [path for path in SCRIPTS if "bash" in path.read_text().partition("\n")[0]]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", ".ci/run"]
SECONDS = 60.0

Bash = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for stand-ins of programs, in front of the others."""
    directory = tmp_path / "programs"
    directory.mkdir()
    return directory


def stand_in(programs: Path, name: str, script: str) -> None:
    """Put a shell script in the place of a program."""
    path = programs / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def bash(programs: Path) -> Bash:
    """Run commands with scripts/lib.sh, with the stand-ins in front of PATH."""

    def run(
        commands: str, only_stand_ins: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = str(programs)
        if not only_stand_ins:
            path += os.pathsep + os.environ.get("PATH", os.defpath)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LIBMILT"))}
        return subprocess.run(
            ["/bin/bash", "-c", f". {ROOT}/scripts/lib.sh\nPATH={path}\n{commands}"],
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    return run


@pytest.mark.parametrize("script", [*SHELL, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_each_script_is_strict_valid_and_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=SECONDS)
    text = script.read_text()
    assert 'lib.sh"' in text or "set -euo pipefail" in text


@pytest.mark.parametrize(
    "script",
    [
        path
        for directory in (".ci", "scripts", "debian/tests")
        for path in sorted((ROOT / directory).iterdir())
        if path.is_file() and (path.suffix == ".sh" or path.read_text().startswith("#!"))
    ],
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_no_failure_is_a_bare_negation(script: Path) -> None:
    """The shell goes on after ``! command`` where the command succeeds, ``set -e`` or not."""
    text = script.read_text().replace("\\\n", " ")
    bare = re.findall(r"^\s*! .*$", text, re.MULTILINE)
    assert [line for line in bare if "||" not in line and "&&" not in line] == []


@pytest.mark.parametrize(
    ("tag", "date", "status"),
    [
        ("v1.1.0", "2026-12-01", 0),
        ("v1.1.0", "unreleased", 1),
        ("v1.1.1", "2026-12-01", 1),
        ("1.1.0", "2026-12-01", 1),
    ],
)
def test_a_release_has_its_tag_and_its_date(
    tag: str, date: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("check-release", "lib.sh", "packaging.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text('version = "1.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [1.1.0] - {date}\n")
    done = subprocess.run(
        [str(tmp_path / "scripts" / "check-release"), tag],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ") == (status == 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_says_what_it_does(script: Path) -> None:
    done = subprocess.run(
        [str(script), "--help"], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert f"scripts/{script.name}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_scripts_that_documents_name_exist(document: str) -> None:
    named = set(re.findall(r"\bscripts/[\w-]+", (ROOT / document).read_text()))
    assert named
    assert named <= {f"scripts/{path.name}" for path in (ROOT / "scripts").iterdir()}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_inside_the_project_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text())
    inside = [link for link in links if "://" not in link]
    assert [link for link in inside if not (ROOT / link).exists()] == []


def test_the_changelog_is_one_of_this_version() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *others = re.findall(r"^## (.*)$", text, re.MULTILINE)
    released = re.compile(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d")
    if first == "[Unreleased]":
        assert f"Becomes {version[1]}." in text
    else:
        assert first.startswith(f"[{version[1]}] - ") and released.fullmatch(first)
    assert [other for other in others if not released.fullmatch(other)] == []
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        given = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert given == [kind for kind in kinds if kind in given]


@pytest.mark.parametrize(
    "arguments",
    [
        ["setup", "nonsense"],
        ["lint", "--nonsense"],
        ["demo", "nonsense"],
        ["test-sanitizers", "nonsense"],
        ["build-free-threaded", "nonsense"],
        ["build-free-threaded", "--version", "3.12"],
        ["test-suites", "forky", "3.14"],
        ["test-suites", "--nonsense"],
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_done(arguments: list[str]) -> None:
    script = ROOT / "scripts" / arguments[0]
    done = subprocess.run(
        [str(script), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert arguments[-1] in done.stderr


def test_nothing_is_installed_where_nothing_is_missing(bash: Bash, programs: Path) -> None:
    stand_in(programs, "apt-get", "echo apt-get was called; exit 1")
    done = bash("choose_python\nensure_build_packages", PYTHON=sys.executable)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_root_installs_what_is_missing_and_says_so_first(
    bash: Bash, programs: Path, tmp_path: Path
) -> None:
    stand_in(programs, "id", "echo 0")
    stand_in(programs, "apt-get", f'echo "$DEBIAN_FRONTEND $*" >>{tmp_path}/calls')
    done = bash("ensure_command no-such-program some-package\ninstall_missing\necho after")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "==> Installing with apt: some-package\nafter\n"
    update, install = (tmp_path / "calls").read_text().splitlines()
    assert update.startswith("noninteractive ") and update.endswith(" update")
    assert install.endswith(" install -y --no-install-recommends some-package")


def test_others_install_through_sudo(bash: Bash, programs: Path, tmp_path: Path) -> None:
    stand_in(programs, "id", "echo 1000")
    stand_in(programs, "sudo", f'echo "$*" >>{tmp_path}/calls')
    stand_in(programs, "apt-get", "exit 1")
    done = bash("apt_install some-package")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_a_failing_apt_shows_its_words(bash: Bash, programs: Path) -> None:
    stand_in(programs, "id", "echo 0")
    stand_in(programs, "apt-get", "echo no such package >&2; exit 100")
    done = bash("apt_install some-package\necho not reached")
    assert done.returncode == 1
    assert "not reached" not in done.stdout
    assert done.stderr == "no such package\nerror: apt-get could not install: some-package\n"


@pytest.mark.parametrize("name", ["id", "apt-get"])
def test_without_sudo_or_apt_it_says_what_to_install(bash: Bash, programs: Path, name: str) -> None:
    if name == "id":
        stand_in(programs, "id", "echo 1000")
        stand_in(programs, "apt-get", "")
    done = bash("apt_install some-package", only_stand_ins=True)
    assert done.returncode == 1
    assert "some-package" in done.stderr
    assert ("sudo" if name == "id" else "no apt-get") in done.stderr


def test_an_old_interpreter_is_refused(bash: Bash, programs: Path) -> None:
    stand_in(
        programs,
        "python-old",
        'case "$*" in\n'
        '*sys.executable*) echo "$0" ;;\n'
        "*'version_info < (3, 9)'*) exit 1 ;;\n"
        "-V) echo Python 3.8.18 ;;\n"
        "esac",
    )
    done = bash("choose_python", PYTHON="python-old")
    assert done.returncode == 1
    assert "Python 3.8.18" in done.stderr
    assert "3.9 or later" in done.stderr


def test_an_unknown_interpreter_is_named(bash: Bash) -> None:
    done = bash("choose_python", PYTHON="no-such-python")
    assert done.returncode == 1
    assert done.stderr == "error: PYTHON=no-such-python: no such interpreter\n"


def test_each_interpreter_has_a_directory_of_its_own(bash: Bash) -> None:
    tag = f"python{sys.version_info[0]}.{sys.version_info[1]}{sys.abiflags}"
    done = bash('choose_python; echo "$venv"', PYTHON=sys.executable)
    assert done.stdout == f"{ROOT}/.venvs/{tag}\n"


def test_what_changes_the_build_changes_the_fingerprint(bash: Bash, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("a = 1\n")
    show = f"fingerprint {source} {tmp_path}/not-there"
    first = bash(show).stdout
    assert re.fullmatch(r"[0-9a-f]{64}\n", first)
    (source / "a.pyc").write_text("compiled")
    assert bash(show).stdout == first
    seen = {first, bash(show, CFLAGS="-O3").stdout, bash(show, LIBMILTER_STATIC="1").stdout}
    (source / "a.py").write_text("a = 2\n")
    seen.add(bash(show).stdout)
    assert len(seen) == 4


def test_files_that_a_mirror_does_not_serve_are_named_without_its_host(
    bash: Bash, tmp_path: Path
) -> None:
    pool = "http://mirror.example.org/debian/pool/main/p"
    (tmp_path / "said").write_text(
        f"E: Failed to fetch {pool}/python3.15/python3.15_3.15.2-1_amd64.deb  404  Not Found "
        "[IP: 192.0.2.1 80]\n"
        f"W: Couldn't download package perl (ver 5.40 at {pool}/perl/perl_5.40_amd64.deb)\n"
        "E: Failed getting release file http://mirror.example.org/debian/dists/forky/Release\n"
        "E: Unable to fetch some archives, maybe run apt-get update\n"
    )
    failing = f'logged {tmp_path}/log sh -c "cat {tmp_path}/said; exit 100"'
    done = bash(f". {ROOT}/scripts/packaging.sh\n{failing}")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "\nthe mirror did not serve:\n"
        "/debian/dists/forky/Release\n"
        "/debian/pool/main/p/perl/perl_5.40_amd64.deb\n"
        "/debian/pool/main/p/python3.15/python3.15_3.15.2-1_amd64.deb\n"
    )
    done = bash(f". {ROOT}/scripts/packaging.sh\nlogged {tmp_path}/log sh -c 'echo no; exit 1'")
    assert done.stderr.startswith("no\n")
    assert "did not serve" not in done.stderr


FLAKY = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_flaky(number):
    seen = Path(__file__).with_name(f"seen-{{number}}")
    times = len(seen.read_text()) if seen.exists() else 0
    seen.write_text("x" * (times + 1))
    assert times >= {passes_after}, "it failed"

def test_sound():
    Path(__file__).with_name("sound").open("a").write("x")
"""


@pytest.mark.parametrize(
    ("count", "passes_after", "asked", "status", "runs"),
    [
        pytest.param(2, 1, "1", 0, 2, id="passes-the-second-time"),
        pytest.param(2, 2, "1", 1, 2, id="fails-again"),
        pytest.param(6, 1, "1", 1, 1, id="too-many"),
        pytest.param(2, 1, "", 1, 1, id="not-asked-for"),
    ],
)
def test_what_failed_runs_once_more_where_that_is_asked_for(
    count: int, passes_after: int, asked: str, status: int, runs: int, tmp_path: Path
) -> None:
    tests = tmp_path / "test_flaky.py"
    tests.write_text(FLAKY.format(count=count, passes_after=passes_after))
    command = [ROOT / "scripts/pytest-twice", Path(sys.executable).with_name("pytest")]
    done = subprocess.run(
        [*command, "-p", "xdist", "--rootdir", tmp_path, "-c", os.devnull, "-n", "0", tests],
        env={**os.environ, "RERUN_FAILED": asked, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert {len(path.read_text()) for path in tmp_path.glob("seen-*")} == {runs}
    assert (tmp_path / "sound").read_text() == "x"  # it runs once
    names = re.findall(r"^      .*test_flaky\.py::test_flaky\[(\d)\]$", done.stdout, re.MULTILINE)
    assert names == (["0", "1"] if runs == 2 else [])
