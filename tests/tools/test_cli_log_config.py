"""``python -m Milter run --log-config``: the log as a file for ``logging.config`` says."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import MESSAGE, Runner
from support.lifecycle import wait_until
from support.process import WAIT

MODULE = """
import logging

import Milter

class Hello(Milter.Base):
    def eom(self):
        logging.getLogger("hello.sub").info("seen")
        logging.getLogger("quiet").info("unseen")
        return Milter.CONTINUE

logging.getLogger("hello.sub")  # there before the log is set up, where it is so late
"""

TOML = """
version = 1

[formatters.short]
format = "%(levelname)s|%(name)s|%(message)s"

[handlers.file]
class = "logging.FileHandler"
filename = "log"
formatter = "short"

[root]
level = "INFO"
handlers = ["file"]

[loggers.quiet]
level = "ERROR"
"""

INI = """
[loggers]
keys = root, quiet

[handlers]
keys = file

[formatters]
keys = short

[formatter_short]
format = %(levelname)s|%(name)s|%(message)s

[handler_file]
class = FileHandler
args = ("log",)
formatter = short

[logger_root]
level = INFO
handlers = file

[logger_quiet]
level = ERROR
handlers =
qualname = quiet
"""

JSON = json.dumps(
    {
        "version": 1,
        "formatters": {"short": {"format": "%(levelname)s|%(name)s|%(message)s"}},
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": "log", "formatter": "short"}
        },
        "root": {"level": "INFO", "handlers": ["file"]},
        "loggers": {"quiet": {"level": "ERROR"}},
    }
)

has_toml = pytest.mark.skipif(
    sys.version_info < (3, 11) and not importlib.util.find_spec("tomli"),
    reason="there is no library for TOML",
)


@pytest.fixture(autouse=True)
def module(runner: Runner) -> None:
    (runner.place / "hello.py").write_text(MODULE)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("log.toml", TOML, marks=has_toml),
        ("log.json", JSON),
        ("log.ini", INI),
        # Told by what is in them.
        pytest.param("toml.conf", TOML, marks=has_toml),
        ("json.conf", JSON),
        ("ini.conf", INI),
    ],
)
def test_forms(runner: Runner, name: str, text: str, workers: str) -> None:
    (runner.place / name).write_text(text)
    filter_ = runner.start("hello:Hello", "--log-config", name, "--workers", workers)
    with filter_.mta() as mta:
        mta.send(MESSAGE, recipients=["r@example.com"])
    assert filter_.stop() == 0
    lines = (runner.place / "log").read_text().splitlines()
    assert "INFO|hello.sub|seen" in lines
    assert "INFO|milter.run|hello has stopped" in lines
    assert not any("unseen" in line for line in lines)
    assert filter_.output.strip() == ""


def test_a_reload_opens_the_files_anew(runner: Runner) -> None:
    (runner.place / "log.json").write_text(JSON)
    filter_ = runner.start("hello:Hello", "--log-config", "log.json")
    with filter_.mta():
        pass
    log, old = runner.place / "log", runner.place / "log.1"
    log.rename(old)
    filter_.process.send_signal(signal.SIGHUP)
    with filter_.mta() as mta:
        while not log.exists() or "serves on" not in log.read_text():
            mta.send(MESSAGE, recipients=["r@example.com"])

    def the_new_one_has_seen_a_message() -> bool:  # the old one may take a last connection
        with filter_.mta() as mta:
            mta.send(MESSAGE, recipients=["r@example.com"])
        return "INFO|hello.sub|seen" in log.read_text()

    wait_until(the_new_one_has_seen_a_message, "the new one takes no message")
    assert filter_.stop() == 0
    assert "reloading: generation 2 is started" in old.read_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log.json", JSON.replace('"filename"', '"mode": "w", "filename"')),
        ("log.ini", INI.replace('("log",)', '("log", "w")')),
        ("named.ini", INI.replace('("log",)', '("log",)\nkwargs = {"mode": "w"}')),
    ],
)
def test_a_reload_takes_no_lines_from_who_serves(runner: Runner, name: str, text: str) -> None:
    (runner.place / name).write_text(text)
    (runner.place / "log").write_text("of the last time\n")
    filter_ = runner.start("hello:Hello", "--log-config", name)
    with filter_.mta() as mta:
        mta.send(MESSAGE, recipients=["r@example.com"])
        (runner.place / "hello.py").write_text("1 / 0")
        filter_.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "not reloaded" in (runner.place / "log").read_text(), "it reloads")
    assert filter_.stop() == 0
    lines = (runner.place / "log").read_text().splitlines()
    assert "of the last time" not in lines
    assert f"INFO|milter.run|hello serves on {filter_.socket}" in lines
    assert "INFO|hello.sub|seen" in lines
    assert lines[-1] == "INFO|milter.run|hello has stopped"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_files_belong_to_who_serves(runner: Runner) -> None:
    logs = runner.place / "logs"
    logs.mkdir()
    shutil.chown(logs, "nobody")
    (runner.place / "log.json").write_text(JSON.replace('"log"', '"logs/log"'))
    filter_ = runner.start("hello:Hello", "--log-config", "log.json", "--user", "nobody")
    with filter_.mta():
        pass
    filter_.process.send_signal(signal.SIGHUP)  # who is started by that has never been root
    with filter_.mta() as mta:
        while "reloaded" not in (logs / "log").read_text():
            mta.send(MESSAGE, recipients=["r@example.com"])
    assert (logs / "log").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    assert filter_.stop() == 0


def refused(runner: Runner, name: str, text: str, *options: str) -> tuple[int, str]:
    """The exit status of ``--check`` and the error."""
    (runner.place / name).write_text(text)
    done = subprocess.run(
        runner.words("hello:Hello", "--check", "--log-config", name, *options),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.stdout == ""
    before = "python -m Milter run: error: "
    assert done.stderr.startswith(before) and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr[len(before) : -1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version: must be 1, the only form that logging.config knows"),
        ({"handler": {}}, "unknown key 'handler': did you mean 'handlers'?"),
        ({"handlers": []}, "handlers: must be a table, not a list"),
        ({"handlers": {"file": 1}}, "handlers.file: must be a table, not an integer"),
        (
            {"handlers": {"file": {}}},
            "handlers.file: has no class, such as 'logging.StreamHandler'",
        ),
        (
            {"root": {"handlers": ["flie"]}},
            "root.handlers: 'flie' is not among the handlers: there are file",
        ),
        ({"root": {"handlers": "file"}}, "root.handlers: must be a list of names"),
        (
            {"loggers": {"a": {"level": "LOUD"}}},
            ("loggers.a.level: 'LOUD' is no level: write DEBUG, INFO, WARNING, ERROR or CRITICAL"),
        ),
        (
            {"formatters": {}},
            "handlers.file.formatter: 'short' is not among the formatters: there are none",
        ),
    ],
)
def test_what_is_refused(runner: Runner, change: dict[str, object], said: str) -> None:
    text = json.dumps({**json.loads(JSON), **change})
    assert refused(runner, "log.json", text) == (2, f"--log-config log.json: {said}")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("log.json", "{", "not JSON: Expecting property name enclosed in double quotes"),
        ("log.json", "[]", "must be an object with sections"),
        pytest.param("log.toml", "version", "not TOML: Expected '='", marks=has_toml),
        ("log.ini", "[loggers]\nkeys=a\n", "[loggers] keys: there is no section [logger_a]"),
        ("log.ini", "[logger]\n", "[loggers]: must be there with keys=, the names of what follows"),
        ("log.ini", "keys=a\n", "not INI: File contains no section headers."),
        (
            "log.ini",
            INI.replace("[logger_root]", "[logger_r]").replace("root", "r"),
            "[loggers] keys: must have root among them",
        ),
    ],
)
def test_files_that_are_none(runner: Runner, name: str, text: str, said: str) -> None:
    status, error = refused(runner, name, text)
    assert status == 2
    assert error.startswith(f"--log-config {name}: {said}"), error


def test_a_level_of_standard_error_has_no_meaning_beside_it(runner: Runner) -> None:
    status, error = refused(runner, "log.json", JSON, "--log-level", "info")
    assert status == 2
    assert error == "--log-level is for standard error, not for what --log-config says"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            JSON.replace('"log"', '"gone/log"'),
            "handlers.file: FileNotFoundError: [Errno 2] No such file or directory: '",
        ),
        (
            JSON.replace("logging.FileHandler", "nosuch.Handler"),
            "handlers.file: ModuleNotFoundError: No module named 'nosuch'",
        ),
        (INI.replace('"log"', '"gone/log"'), "FileNotFoundError: [Errno 2] No such file or "),
    ],
)
def test_what_cannot_be_opened(runner: Runner, text: str, said: str) -> None:
    (runner.place / "log.conf").write_text(text)
    filter_ = runner.start("hello:Hello", "--log-config", "log.conf")
    assert filter_.wait() == 1
    assert f"python -m Milter run: error: --log-config log.conf: {said}" in filter_.output
    assert not (Path(runner.place) / "run" / "s").exists()
