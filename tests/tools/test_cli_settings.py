"""``python -m Milter run --config``: a file for the options."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Runner
from support.documents import ROOT
from support.process import WAIT

pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

MODULE = "import Milter\n\nclass Hello(Milter.Base):\n    pass\n\nclass Other(Hello):\n    pass\n"
EXAMPLE = ROOT / "examples" / "run.toml"


@pytest.fixture(autouse=True)
def module(runner: Runner) -> None:
    (runner.place / "hello.py").write_text(MODULE)


def checked(
    runner: Runner, text: str, *options: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``run --check`` with a file of that text."""
    (runner.place / "run.toml").write_text(text)
    return subprocess.run(
        runner.words("--check", "--config", "run.toml", *options),
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def keys(text: str) -> list[str]:
    """The keys that a text sets or shows, commented out."""
    return re.findall(r"^(?:# )?([a-z-]+) = .", text, re.MULTILINE)


def test_the_example_has_all_options() -> None:
    usage = subprocess.run(
        [sys.executable, "-m", "Milter", "run", "--help"],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    options = set(re.findall(r"^  (?:-h, )?--([a-z-]+)", usage, re.MULTILINE))
    assert "drain-timeout" in options
    found = keys(EXAMPLE.read_text())
    assert sorted(found) == sorted((options | {"filter"}) - {"help", "check", "config"})


@pytest.mark.parametrize("commented", [False, True])
def test_the_example_is_taken(runner: Runner, commented: bool) -> None:
    text = EXAMPLE.read_text()
    place = runner.place
    if commented:  # what is shown in comments is right as well
        pytest.importorskip("prometheus_client")
        text = re.sub(r"^# ([a-z-]+ = .)", r"\1", text, flags=re.MULTILINE)
        text = re.sub(r"^(socket) = .*", f'socket = "unix:{place}/run/s"', text, flags=re.MULTILINE)
        text = re.sub(r"^log-level = .*\n", "", text, flags=re.MULTILINE)
        text = text.replace("/srv/filters", str(place))
        (place / "logging.toml").write_text("version = 1\n")
    (place / "stamp_header.py").write_text((ROOT / "examples" / "stamp_header.py").read_text())
    done = checked(runner, text)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "stamp_header:StampHeader can serve.\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("wrokers = 2", "unknown key 'wrokers': did you mean 'workers'?"),
        ("log_level = 'info'", "unknown key 'log_level': did you mean 'log-level'?"),
        ("check = true", "check: is for the command line alone"),
        ("workers = '2'", "workers: must be a number from 0 to 512, not the string '2'"),
        ("workers = true", "workers: must be a number from 0 to 512, not a boolean"),
        ("workers = 513", "workers: must be a number from 0 to 512, not 513"),
        ("workers = 1.5", "workers: must be a number from 0 to 512, not a float"),
        ("pin-workers = 1", "pin-workers: must be true or false, not an integer"),
        ("name = ['a']", "name: must be a string, not a list"),
        ("socket = 8891", "socket: must be a string, not an integer"),
        ("timeout = -1", "timeout: must be a number of seconds from 0 to 86400, not -1"),
        ("mode = '0888'", "mode: must be an octal mode between 0 and 0777, not '0888'"),
        ("mode = 0o1777", "mode: must be an octal mode between 0 and 0777, not 1023"),
        (
            "log-level = 'loud'",
            "log-level: must be one of 'debug', 'info', 'warning', 'error', not 'loud'",
        ),
        ("[workers]", "workers: must be a number from 0 to 512, not a table"),
        ("metrics = {}", "metrics: must be a port or a string, not a table"),
    ],
)
def test_what_is_refused(runner: Runner, line: str, said: str) -> None:
    done = checked(runner, f"filter = 'hello:Hello'\n{line}\n")
    assert done.returncode == 2
    assert done.stderr == f"python -m Milter run: error: --config run.toml: {said}\n"


def test_a_key_that_nothing_is_like(runner: Runner) -> None:
    done = checked(runner, "xyzzy = 1\n")
    assert "unknown key 'xyzzy': known are access-log, chdir, drain-timeout," in done.stderr


def test_files_that_are_none(runner: Runner) -> None:
    done = checked(runner, "filter = \n")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "python -m Milter run: error: --config run.toml: not TOML: Invalid value (at line 1, "
    )
    (runner.place / "latin").write_bytes(b'name = "\xe4"\n')
    for name, said in (("gone", "No such file or directory"), ("latin", "not in UTF-8")):
        done = checked(runner, "", "--config", name)
        assert done.returncode == 2
        assert f"error: --config {name}: {said}" in done.stderr


def test_what_is_missing(runner: Runner) -> None:
    done = checked(runner, "name = 'a'\n")
    assert done.stderr == (
        "python -m Milter run: error: the following arguments are required: MODULE:CLASS\n"
    )


@pytest.mark.parametrize("mode", ["'0600'", "0o600"])
def test_the_command_line_goes_before_the_file(runner: Runner, mode: str) -> None:
    place = runner.place
    (place / "run.toml").write_text(
        f"filter = 'hello:Hello'\nname = 'of-the-file'\nworkers = 2\nmode = {mode}\n"
        f"socket = 'unix:{place}/run/s'\npin-workers = true\n"
    )
    options = ("--config", "run.toml", "--name", "of-the-line", "--no-pin-workers")
    filter_ = runner.start(*options, socket=False)
    filter_.wait_for("of-the-line serves on")
    assert "with 2 workers" in filter_.output
    assert (place / "run" / "s").stat().st_mode & 0o777 == 0o600
    assert filter_.stop() == 0, filter_.output
    done = checked(runner, "filter = 'hello:Hello'\n", "hello:Other")
    assert done.stdout == "hello:Other can serve.\n"


def test_a_reload_reads_it_again(runner: Runner) -> None:
    file = runner.place / "run.toml"
    file.write_text("filter = 'hello:Hello'\nname = 'one'\n")
    filter_ = runner.start("--config", "run.toml")
    filter_.wait_for("one serves on")
    file.write_text("filter = 'hello:Hello'\nname = 'two'\nworkers = 2\n")
    filter_.process.send_signal(signal.SIGHUP)
    filter_.wait_for("milter.run: reloaded:")
    assert "two serves on" in filter_.output
    assert "with 2 workers" in filter_.output
    file.write_text("filter = 'hello:Hello'\nnmae = 'three'\n")
    filter_.process.send_signal(signal.SIGHUP)
    line = filter_.wait_for("not reloaded, what served before still does")
    assert "--config run.toml: unknown key 'nmae': did you mean 'name'?" in line
    assert filter_.stop() == 0


def test_without_a_library_for_toml_it_is_named(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Python 3.10, where it is none of Python's own."""
    from Milter._cli import toml
    from Milter._cli.common import CommandError

    monkeypatch.setattr(toml, "_LIBRARY", "tomli_that_is_not_there")
    with pytest.raises(CommandError) as caught:
        toml.parse("--config", "run.toml", "")
    assert str(caught.value) == (
        "--config run.toml needs the Python package tomli: pip install tomli "
        "(Python reads TOML by itself from 3.11 on)"
    )


def test_checking_reads_what_else_is_named(runner: Runner, tmp_path: Path) -> None:
    done = checked(runner, "filter = 'hello:Hello'\nlog-config = 'gone.toml'\n")
    assert done.returncode == 2
    assert "--log-config gone.toml: No such file or directory" in done.stderr
    done = checked(runner, "filter = 'hello:Hello'\nsocket = '8891'\n")
    assert done.returncode == 2
    assert "inet:8891 for a port, unix:8891 for a path" in done.stderr
