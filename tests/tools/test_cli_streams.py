"""``python -m Milter`` where the standard streams are closed, full, or read by nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.process import WAIT, python_command

from Milter.mta import MTA

FILTER = """
import Milter

class Quiet(Milter.Base):
    def eom(self):
        self.addheader("X-Seen", "yes")
        return Milter.CONTINUE

class Talks(Quiet):
    def __init__(self):
        print("a connection")  # buffered: nothing fails before the process ends

class Rejects(Milter.Base):
    def eom(self):
        return Milter.REJECT
"""

#: How a shell starts a command with standard output in these states.
CLOSED = ">&-"
ALL_CLOSED = "<&- >&- 2>&-"
FULL = ">/dev/full"
ALL_FULL = ">/dev/full 2>/dev/full"
EVERY = [CLOSED, ALL_CLOSED, FULL, ALL_FULL, "2>&-", "<&-"]

full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


@pytest.fixture
def place(directory: Path) -> Path:
    (directory / "quiet.py").write_text(FILTER)
    (directory / "m.eml").write_text("Subject: x\n\nbody\n")
    return directory


def start(
    place: Path, redirection: str, *arguments: str, unbuffered: bool = False
) -> subprocess.Popen[bytes]:
    words = [*python_command(), "-m", "Milter", *arguments]
    return subprocess.Popen(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *words],
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""},
    )


def done(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit status, and what was said on standard error, which is never a traceback."""
    _, said = process.communicate(timeout=WAIT)
    assert b"Traceback" not in said
    assert b"Exception ignored" not in said
    return process.returncode, said.decode()


@contextlib.contextmanager
def serving(
    place: Path, redirection: str = "", name: str = "quiet:Quiet", *options: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    where = f"unix:{place}/s"
    process = start(place, redirection, "run", name, "--socket", where, *options)
    try:
        with MTA.connect(where, wait_for=WAIT):
            pass
        yield where, process
    finally:
        process.kill()
        process.communicate(timeout=WAIT)


@full
@pytest.mark.parametrize("redirection", EVERY)
def test_check_says_in_its_status_whether_a_filter_answers(place: Path, redirection: str) -> None:
    with serving(place) as (where, _):
        for options in ([], ["--json"]):
            status, said = done(start(place, redirection, "check", where, *options))
            assert status == 0
            if redirection == FULL:
                assert said == (
                    "python -m Milter check: warning: cannot write the report: "
                    "No space left on device\n"
                )
            else:
                assert said == ""
    for options in ([], ["--json"]):
        nobody = start(place, redirection, "check", f"unix:{place}/none", *options)
        assert done(nobody)[0] == 1


@full
@pytest.mark.parametrize(
    ("redirection", "options"),
    [
        *((redirection, []) for redirection in EVERY),
        (ALL_FULL, ["--json"]),
        (ALL_FULL, ["--trace"]),
    ],
)
def test_send_says_in_its_status_what_became_of_the_message(
    place: Path, redirection: str, options: list[str]
) -> None:
    with serving(place) as (where, _):
        status, said = done(start(place, redirection, "send", where, "m.eml", *options))
    assert status == 0
    assert ("warning: cannot write the report" in said) == (redirection == FULL)


@full
@pytest.mark.parametrize("redirection", [CLOSED, FULL])
def test_a_rejection_is_one_whoever_reads(place: Path, redirection: str) -> None:
    with serving(place, name="quiet:Rejects") as (where, _):
        assert done(start(place, redirection, "send", where, "m.eml"))[0] == 3


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", ["check", "send"])
def test_a_reader_who_has_gone(place: Path, command: str, unbuffered: bool) -> None:
    with serving(place) as (where, _):
        arguments = [command, where, *(["m.eml"] if command == "send" else [])]
        process = start(place, "", *arguments, unbuffered=unbuffered)
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        assert done(process) == (0, "")


@full
def test_what_was_to_be_kept_and_is_not_is_a_failure(place: Path) -> None:
    with serving(place) as (where, _):
        for redirection in ("", CLOSED, FULL):
            process = start(place, redirection, "send", where, "m.eml", "--output", "/dev/full")
            status, said = done(process)
            assert status == 2
            assert "error: cannot write '/dev/full': No space left on device" in said
        process = start(place, CLOSED, "send", where, "m.eml", "--output", "out.eml")
        assert done(process)[0] == 0
        assert (place / "out.eml").read_text() == "Subject: x\nX-Seen: yes\n\nbody\n"


def test_standard_input_is_closed(place: Path) -> None:
    with serving(place) as (where, _):
        status, said = done(start(place, "<&-", "send", where, "-"))
    assert status == 2
    assert "cannot read the message '-': standard input is closed" in said


@full
@pytest.mark.parametrize("redirection", EVERY)
@pytest.mark.parametrize(
    ("name", "options"),
    [("quiet:Quiet", []), ("quiet:Talks", []), ("quiet:Talks", ["--workers", "2"])],
)
def test_a_filter_serves_and_stops(
    place: Path, redirection: str, name: str, options: list[str]
) -> None:
    with serving(place, redirection, name, *options) as (where, process):
        with MTA.connect(where) as mta:
            result = mta.send(b"Subject: x\r\n\r\nbody\r\n", recipients=["a@example.com"])
        assert result.message["X-Seen"] == "yes"
        process.send_signal(signal.SIGTERM)
        assert done(process)[0] == 0


def test_no_connection_becomes_a_standard_stream(place: Path) -> None:
    with serving(place, ALL_CLOSED) as (_, process):
        leads = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    assert leads == ["/dev/null"] * 3


@full
@pytest.mark.parametrize("redirection", [CLOSED, ALL_CLOSED, FULL, ALL_FULL])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_help_and_usage(place: Path, redirection: str, unbuffered: bool) -> None:
    for arguments, status in ([["send", "--help"], 0], [["--help"], 0], [["send"], 2], [["?"], 2]):
        process = start(place, redirection, *arguments, unbuffered=unbuffered)
        assert done(process)[0] == status, arguments


@full
@pytest.mark.parametrize(
    ("redirection", "why"), [(CLOSED, "it is closed"), (FULL, "No space left on device")]
)
def test_lines_of_configuration_that_nobody_gets(place: Path, redirection: str, why: str) -> None:
    arguments = ["config", "postfix", "--name", "quiet", "--socket", f"{place}/s"]
    assert done(start(place, redirection, *arguments)) == (
        1,
        f"python -m Milter config: error: standard output: {why}\n",
    )


def test_an_encoding_that_lacks_a_character(place: Path) -> None:
    (place / "m.eml").write_text("Subject: gr\u00fc\u00df\n\nbody\n", encoding="utf-8")
    with serving(place) as (where, _):
        done_ = subprocess.run(
            [*python_command(), "-m", "Milter", "send", where, "m.eml"],
            cwd=place,
            capture_output=True,
            timeout=WAIT,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
    assert (done_.returncode, done_.stderr) == (0, b"")
    assert b"Subject: gr\\xfc\\xdf\n" in done_.stdout
