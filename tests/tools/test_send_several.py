"""``python -m Milter send`` with several messages: files, mboxes, directories, Maildirs."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.process import WAIT, python_command

from Milter._cli.sources import find, is_one, split_mbox
from Milter._cli.summary import percentile

JUDGE = """
import sys, time, Milter
class Judge(Milter.Base):
    def header(self, name, value):
        self.said = value
        return Milter.CONTINUE
    def eom(self):
        if self.said == "slow":
            time.sleep(1)
        if self.said == "die":
            import os; os._exit(9)
        if self.said == "no":
            self.setreply("550", "5.7.1", "not this one")
            return Milter.REJECT
        if self.said == "later":
            return Milter.TEMPFAIL
        if self.said == "keep":
            self.quarantine("odd")
        self.addheader("X-Seen", self.said)
        return Milter.CONTINUE
Milter.factory = Judge
Milter.set_flags(Milter.ADDHDRS | Milter.QUARANTINE)
Milter.runmilter("judge", sys.argv[1])
"""


@pytest.fixture
def judge(run_filter: Any) -> str:
    """The address of a filter that judges by the subject."""
    filter_ = run_filter(source=JUDGE)
    filter_.mta().quit()
    address: str = filter_.socket
    return address


def write(path: Path, subject: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"Subject: {subject}\n\nbody\n")
    return path


def send(address: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python_command(), "-m", "Milter", "send", address, *map(str, arguments)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=WAIT * 3,
        check=False,
        **options,
    )


def shown(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The report with numbers of time taken out, and runs of blanks as one."""
    text = re.sub(r" +", " ", done.stdout)
    return re.sub(r"\d+\.\d m?s|\d+ a second", "#", text).splitlines()


# --- what is brought -----------------------------------------------------------------------------


def test_files_and_a_summary(judge: str, tmp_path: Path) -> None:
    yes, no = write(tmp_path / "yes", "yes"), write(tmp_path / "no", "no")
    keep = write(tmp_path / "keep", "keep")
    done = send(judge, yes, no, yes, keep)
    assert (done.returncode, done.stderr) == (3, "")
    assert shown(done) == [
        f"continue # {yes}: 1 modification",
        f"reject # {no}: 550 5.7.1 not this one",
        f"continue # {yes}: 1 modification",
        f"quarantine # {keep}: 2 modifications",
        "",
        "Messages 4 in #, #",
        "Verdicts 2 continue, 1 reject, 1 quarantine",
        "Time p50 #, p99 #, longest #",
    ]


def test_json_is_an_object_a_message(judge: str, tmp_path: Path) -> None:
    yes, no = write(tmp_path / "yes", "yes"), write(tmp_path / "no", "no")
    done = send(judge, "--json", yes, tmp_path / "gone", no)
    assert (done.returncode, done.stderr) == (2, "")
    first, second, third, last = map(json.loads, done.stdout.splitlines())
    assert (first["file"], first["verdict"]) == (str(yes), "continue")
    assert first["message"]["headers"][-1] == ["X-Seen", "yes"]
    assert first["milliseconds"] > 0
    assert second == {
        "socket": judge,
        "file": str(tmp_path / "gone"),
        "error": f"cannot read the message '{tmp_path}/gone': No such file or directory",
        "kind": "message",
        "status": 2,
    }
    assert (third["file"], third["reply"]["code"]) == (str(no), 550)
    summary = last["summary"]
    assert summary["messages"] == 3
    assert summary["verdicts"] == {"continue": 1, "error": 1, "reject": 1}
    times = summary["milliseconds"]
    assert 0 < times["p50"] <= times["p99"] <= times["max"]


@pytest.mark.parametrize(
    ("subjects", "status"),
    [(["yes", "yes"], 0), (["later", "no"], 3), (["yes", "later"], 4)],
)
def test_the_status_is_the_lowest(
    judge: str, tmp_path: Path, subjects: list[str], status: int
) -> None:
    files = [write(tmp_path / str(n), subject) for n, subject in enumerate(subjects)]
    assert send(judge, *files).returncode == status


def test_a_directory_goes_down_and_is_sorted(tmp_path: Path) -> None:
    for name in ("b", "a/2", "a/1", "c/deep/er", ".hidden", ".git/x", "mail/new/9", "mail/cur/8"):
        write(tmp_path / "in" / name, name)
    write(tmp_path / "in/mail/tmp/7", "unfinished")
    os.mkfifo(tmp_path / "in/pipe")
    names = [os.path.relpath(one.name, tmp_path / "in") for one in find([str(tmp_path / "in")])]
    assert names == ["a/1", "a/2", "b", "c/deep/er", "mail/cur/8", "mail/new/9"]


def test_a_maildir(judge: str, tmp_path: Path) -> None:
    box = tmp_path / "Maildir"
    write(box / "new/2.a", "two"), write(box / "cur/1.a:2,S", "one"), write(box / "tmp/3", "no")
    write(box / ".Sent/cur/4", "no")
    done = send(judge, box)
    assert done.returncode == 0
    assert shown(done)[:2] == [
        f"continue # {box}/cur/1.a:2,S: 1 modification",
        f"continue # {box}/new/2.a: 1 modification",
    ]


MBOX = (
    "From a@x Mon Jan  5 10:00:00 2026\n"
    "Subject: one\n\n>From here\n>>From there\nFrom now on, 2026\n\nFrom me\n\n"
    "From b@x Mon Jan  5 10:00:01 2026 +0000 2026\n"
    "Subject: no\n\nlast\n"
)


def test_an_mbox(judge: str, tmp_path: Path) -> None:
    path = tmp_path / "inbox"
    path.write_text(MBOX)
    done = send(judge, path, "--json")
    assert done.returncode == 3
    first, second, _ = map(json.loads, done.stdout.splitlines())
    assert first["message"]["body"] == (
        "From here\r\n>From there\r\nFrom now on, 2026\r\n\r\nFrom me\r\n"
    )
    assert [one["file"] for one in (first, second)] == [f"{path}#1", f"{path}#2"]
    assert (second["verdict"], second["message"]) == ("reject", None)


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (b"", []),
        (b"Subject: no mbox\n", []),
        (b"From a 2026\nA: 1\n\nb\n", [b"A: 1\n\nb\n"]),
        (b"From a 2026\nA: 1\n\nb\n\n", [b"A: 1\n\nb\n"]),
        (b"From a 2026\r\nA: 1\r\n\r\nb\r\n\r\nFrom b 2026\r\nB: 1\r\n", None),
        (b"From a 2026\nFrom b 2026\nA: 1\n", [b"", b"A: 1\n"]),
        (b"From a 2026\nA: 1\n\nb\n\n\nFrom b 2026\n", [b"A: 1\n\nb\n\n", b""]),
        (b"From a 2026\nA: 1\n\nb\nFrom b 2026\n", [b"A: 1\n\nb\nFrom b 2026\n"]),
    ],
)
def test_the_messages_of_an_mbox(data: bytes, messages: list[bytes] | None) -> None:
    expected = [b"A: 1\r\n\r\nb\r\n", b"B: 1\r\n"] if messages is None else messages
    assert list(split_mbox(io.BytesIO(data))) == expected


def test_what_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("From a@x Mon Jan  5 10:00:00 2026\nSubject: a\n")
    (tmp_path / "two").write_text(MBOX)
    assert is_one(["-"])
    assert is_one([str(tmp_path / "gone")])
    assert is_one([str(tmp_path / "one")])
    assert not is_one([str(tmp_path / "two")])
    assert not is_one([str(tmp_path)])
    assert not is_one([str(tmp_path / "one"), str(tmp_path / "one")])


def test_an_empty_directory(judge: str, tmp_path: Path) -> None:
    done = send(judge, tmp_path)
    assert done.returncode == 2
    assert f"there is no message in the directory '{tmp_path}'" in done.stdout


def test_output_takes_one_message(judge: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a", "yes")
    done = send(judge, path, path, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "--output takes one message, not several" in done.stderr
    assert not (tmp_path / "out").exists()


# --- how it is brought ---------------------------------------------------------------------------


def test_several_connections(judge: str, tmp_path: Path) -> None:
    """They come back in order, whichever is done first."""
    subjects = ["slow", *(str(number) for number in range(20)), "slow", "no"]
    for number, subject in enumerate(subjects):
        write(tmp_path / "in" / f"{number:02}", subject)
    start = time.monotonic()
    done = send(judge, tmp_path / "in", "--connections", "4", "--json")
    took = time.monotonic() - start
    *found, summary = map(json.loads, done.stdout.splitlines())
    assert [one["file"][-2:] for one in found] == [f"{n:02}" for n in range(len(subjects))]
    headers = [one["message"] and one["message"]["headers"][0][1] for one in found]
    assert headers == [*subjects[:-1], None]
    assert summary["summary"]["messages"] == len(subjects)
    assert done.returncode == 3
    assert took < WAIT


@pytest.mark.parametrize("number", ["0", "1001", "many"])
def test_how_many_connections(number: str) -> None:
    done = send("unix:/a", "-", "--connections", number)
    assert done.returncode == 2
    assert f"invalid number of connections (1 to 1000) value: '{number}'" in done.stderr


def test_each_message_has_its_trace(judge: str, tmp_path: Path) -> None:
    yes, no = write(tmp_path / "yes", "yes"), write(tmp_path / "no", "no")
    done = send(judge, yes, no, "--trace")
    assert re.search(
        r"^\[1\] < +\d+\.\d ms  end of message: add header: X-Seen: yes$", done.stderr, re.M
    )
    assert re.search(
        r"^\[2\] < +\d+\.\d ms  end of message: reply: 550 5\.7\.1 not", done.stderr, re.M
    )


def test_a_filter_that_is_away_is_not_tried_again_and_again(tmp_path: Path) -> None:
    files = [write(tmp_path / str(number), "yes") for number in range(3)]
    done = send(f"unix:{tmp_path}/gone", *files)
    assert done.returncode == 1
    assert f"the messages after {files[0]} were not sent" in done.stderr
    assert shown(done)[-2:] == ["Messages 1 in #, #", "Verdicts 1 error"]


def test_a_message_that_kills_the_filter(judge: str, tmp_path: Path) -> None:
    files = [write(tmp_path / name, name) for name in ("yes", "die", "no")]
    done = send(judge, *files, "--json")
    assert done.returncode == 1
    first, second, third, _ = map(json.loads, done.stdout.splitlines())
    assert first["verdict"] == "continue"
    assert second["kind"] == "closed"
    assert second["error"].startswith("at end of message: the filter closed the connection")
    # While it dies its socket may still take a connection.
    assert third["kind"] in ("unreachable", "closed")


def test_a_message_that_the_protocol_cannot_say(judge: str, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"Subject: a\0b\n\nbody\n")
    done = send(judge, odd, write(tmp_path / "yes", "yes"), "--json")
    assert done.returncode == 2
    first, second, _ = map(json.loads, done.stdout.splitlines())
    assert (first["kind"], first["status"]) == ("message", 2)
    assert first["error"].endswith("a NUL would end it on the wire")
    assert second["verdict"] == "continue"


def test_progress_is_for_terminals(judge: str, tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "in" / str(number), "slow")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*python_command(), "-m", "Milter", "send", judge, str(tmp_path / "in")],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        said = b""
        while select.select([ours], [], [], WAIT)[0]:
            try:
                said += os.read(ours, 4096)
            except OSError:
                break  # the other end is closed
        os.close(ours)
        assert process.wait(WAIT) == 0
    assert re.search(rb"\r\x1b\[K\d done, \d+ a second", said)
    assert said.endswith(b"\r\x1b[K")
    # Where it is none, nothing is said: see the other tests.


def test_percentiles_are_nearest_ranks() -> None:
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0], 50) == 1.0
    values = [float(number) for number in range(1, 201)]
    assert percentile(values, 50) == 100.0
    assert percentile(values, 99) == 198.0


# --- errors for programs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["unix:/a", "-", "--bogus"], "arguments", "unrecognized arguments: --bogus"),
        (["unix:/a"], "arguments", "the following arguments are required: MESSAGE"),
        (["8891", "-"], "arguments", "socket '8891': write inet:8891"),
        (
            ["unix:/a", "-", "--timeout", "soon"],
            "arguments",
            "invalid number of seconds from 0 to 86400 value",
        ),
        (["unix:/a", "-", "--macro", "x"], "arguments", "macro 'x': write NAME=VALUE"),
        (["unix:/a", "-", "--macro", "NO:x=1"], "arguments", "macro stage 'NO' is none of"),
        (["unix:/a", "-", "--client-addr", "here"], "arguments", "--client-addr 'here'"),
        (["unix:/a", "-", "--rejected-rcpt", "a@x", "no"], "arguments", "rejected 'no': give an"),
        (["unix:/a", "/no/such"], "message", "cannot read the message '/no/such'"),
    ],
)
def test_errors_are_json(arguments: list[str], kind: str, said: str) -> None:
    done = send(*arguments, "--json", input="")
    found = json.loads(done.stdout)
    assert (found["kind"], found["status"], done.returncode) == (kind, 2, 2)
    assert said in found["error"]
    assert said in done.stderr


def test_nobody_there_is_json(tmp_path: Path) -> None:
    done = send(f"unix:{tmp_path}/gone", "-", "--json", input="\n")
    found = json.loads(done.stdout)
    assert (found["kind"], found["status"], done.returncode) == ("unreachable", 1, 1)
    assert "cannot connect to the filter" in found["error"]
