"""``Milter.portable``: what evens out the differences between MTAs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import Milter
from Milter.mta import MTA, Dialect, Verdict
from Milter.portable import delete_headers, queue_id, reply_lines, set_reply
from Milter.pytest_plugin import MilterApp


class Filter(Milter.Base):
    """Uses each function where it belongs."""

    def envfrom(self, sender: str, *params: str) -> int:
        self.before = queue_id(self)
        return Milter.CONTINUE

    def envrcpt(self, to: str, *params: str) -> int:
        if "full" in to:
            set_reply(self, "550", "5.2.2", "100% full\n" + "word " * 300 + "end")
            return Milter.REJECT
        return Milter.CONTINUE

    def eom(self) -> int:
        delete_headers(self, "x-spam", 3)
        delete_headers(self, "X-Other", [1, 3, 3])
        self.addheader("X-Id", f"{self.before} {queue_id(self)}")
        return Milter.CONTINUE


MESSAGE = b"".join(
    f"{name}: {number}\r\n".encode()
    for number in range(1, 4)
    for name in ("X-Spam", "Subject", "X-Other")
)


class Recorder:
    """Stands in for a filter object: notes what is called."""

    def __init__(self, **macros: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.macros = macros

    def getsymval(self, sym: str) -> str | None:
        return self.macros.get(sym)

    def setreply(self, *args: Any) -> None:
        self.calls.append(args)

    def chgheader(self, *args: Any) -> None:
        self.calls.append(args)


@pytest.mark.parametrize("dialect", list(Dialect))
def test_headers_are_deleted_whoever_counts(
    dialect: Dialect, milter_app: Callable[..., MilterApp]
) -> None:
    with milter_app(Filter).mta(dialect=dialect) as mta:
        result = mta.send(
            MESSAGE + b"\r\nbody\r\n",
            recipients=["r@example.com"],
            macros={"EOM:i": "4XyZ"},
        )
    left = [(h.name, h.value) for h in result.message.headers]
    assert left == [
        (b"Subject", b"1"),
        (b"Subject", b"2"),
        (b"X-Other", b"2"),
        (b"Subject", b"3"),
        (b"X-Id", b"None 4XyZ"),
    ]


@pytest.mark.milter_app(filter=Filter)
def test_a_plain_text_becomes_a_reply(mta: MTA) -> None:
    mta.mail("<a@example.com>")
    reply = mta.rcpt("<full@example.com>")
    assert reply.verdict is Verdict.REJECT
    assert reply.smtp is not None
    assert (reply.smtp.code, reply.smtp.xcode) == (550, "5.2.2")
    first, *rest = reply.smtp.lines
    assert first == "100% full"
    assert len(rest) == 2
    assert " ".join(rest) == "word " * 300 + "end"


@pytest.mark.parametrize("which", [-1, [0], [2, -1]])
def test_a_wrong_number_is_refused_before_anything_is_deleted(which: Any) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="which: "):
        delete_headers(recorder, "X", which)
    assert recorder.calls == []


def test_no_headers_are_no_calls() -> None:
    recorder = Recorder()
    delete_headers(recorder, "X", 0)
    delete_headers(recorder, "X", [])
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("50%", ["50%%"]),
        ("a\nb", ["a", "b"]),
        ("a\r\n\r\nb\r\n", ["a", "", "b"]),
        ("a\tb\x00\x1b[31m\udcff\x85", ["a b??[31m??"]),
        ("x" * 980, ["x" * 980]),
        ("x" * 981, ["x" * 980, "x"]),
        ("x" * 979 + "%", ["x" * 979, "%%"]),
        ("x" * 978 + "%y", ["x" * 978 + "%%", "y"]),
        ("x" * 979 + "é", ["x" * 979, "é"]),
        ("x" * 980 + " y", ["x" * 980, "y"]),
        ("x" * 900 + " " + "y" * 900, ["x" * 900, "y" * 900]),
    ],
)
def test_lines(text: str, lines: list[str]) -> None:
    assert reply_lines(text) == lines


def test_what_is_beyond_32_lines_is_marked() -> None:
    lines = reply_lines("\n".join(["%" * 490] * 32))
    assert len(lines) == 32
    assert lines[-1] == "%" * 980
    lines = reply_lines("\n".join(["%" * 490] * 40))
    assert len(lines) == 32
    assert lines[-1].endswith("% [...]")
    assert lines[-1].count("%") % 2 == 0
    assert max(len(line.encode()) for line in lines) <= 980


def test_codes_go_through_unchanged() -> None:
    recorder = Recorder()
    set_reply(recorder, "451", None, "later")
    assert recorder.calls == [("451", None, "later")]


def test_queue_id() -> None:
    assert queue_id(Recorder()) is None
    assert queue_id(Recorder(i="")) is None
    assert queue_id(Recorder(i="4XyZ")) == "4XyZ"
