"""The body: what is seen of it, and its replacement."""

from __future__ import annotations

import time
from typing import Any

from integration.case import Case, Filter, Mail, mail, message, session

import Milter

TOPIC = "Body"

START = ["connect", "hello", "envfrom", "envrcpt", "data", *["header"] * 5, "eoh"]
LINE = b"A line of sixty-four bytes, that is with its line end, of text.\r\n"
assert len(LINE) == 65
MEGABYTE = LINE * (1_000_000 // len(LINE))
TWENTY_MB = LINE * (20_000_000 // len(LINE))


def with_body(body: bytes) -> bytes:
    return message(body=body)


def replaces(*chunks: Any) -> Filter:
    return Filter(on={"eom": lambda f: tuple(f.replacebody(chunk) for chunk in chunks)})


def slowly(f: Any) -> None:
    """Take three seconds, with a word to the MTA in each half."""
    for _ in range(6):
        time.sleep(0.5)
        f.progress()
    f.addheader("X-Slow", "yes")


def big_body(size: int) -> Any:
    return lambda f: f.replacebody(LINE * (size // len(LINE)))


def count_body(f: Any) -> None:
    f.size = getattr(f, "size", 0) + len(f.args[0])


CASES = (
    Case(
        "the body is seen as it came",
        session(
            mail(
                content=with_body(b"One.\r\n\r\n.dot\r\n8 bits: \xe9\r\n"),
                sender="<alice@example.com> BODY=8BITMIME",
            )
        ),
        seen=[*START, ("body", "One.\r\n\r\n.dot\r\n8 bits: \xe9\r\n"), "eom", "close"],
        delivered=(Mail(body=b"One.\r\n\r\n.dot\r\n8 bits: \xe9\r\n"),),
        topic=TOPIC,
    ),
    Case(
        "an empty body is not seen",
        session(mail(content=with_body(b""))),
        seen=[*START, "eom", "close"],
        delivered=(Mail(body=b""),),
        topic=TOPIC,
    ),
    Case(
        "a body of a megabyte comes in chunks, and whole",
        session(mail(content=with_body(MEGABYTE))),
        Filter(
            on={
                "body": count_body,
                "eom": lambda f: f.addheader("X-Size", str(f.size)),
            }
        ),
        delivered=(Mail(headers=(*Mail().headers, f"X-Size: {len(MEGABYTE)}"), body=MEGABYTE),),
        topic=TOPIC,
    ),
    Case(
        "replacebody",
        filter=replaces(b"New.\r\n"),
        delivered=(Mail(body=b"New.\r\n"),),
        topic=TOPIC,
    ),
    Case(
        "replacebody with a text",
        filter=replaces("Grüße\r\n"),
        delivered=(Mail(body="Grüße\r\n".encode()),),
        topic=TOPIC,
    ),
    Case(
        "replacebody in many chunks",
        filter=replaces(*(b"Line %d\r\n" % number for number in range(100))),
        delivered=(Mail(body=b"".join(b"Line %d\r\n" % number for number in range(100))),),
        topic=TOPIC,
    ),
    Case(
        "replacebody with chunks that end within a line and within a CRLF",
        filter=replaces(b"One\r\nTw", b"o\r", b"\nThree\r\n"),
        delivered=(Mail(body=b"One\r\nTwo\r\nThree\r\n"),),
        topic=TOPIC,
    ),
    Case(
        "replacebody with lines that begin with a dot",
        filter=replaces(b".\r\n..two\r\n.three\r\n"),
        delivered=(Mail(body=b".\r\n..two\r\n.three\r\n"),),
        topic=TOPIC,
    ),
    Case(
        "replacebody with LF alone",
        filter=replaces(b"One\nTwo\n"),
        delivered=(Mail(body=b"One\r\nTwo\r\n"),),
        topic=TOPIC,
    ),
    Case(
        "replacebody without a final line end",
        filter=replaces(b"One\r\nTwo"),
        delivered=(Mail(body=b"One\r\nTwo\r\n"),),
        topic=TOPIC,
    ),
    Case(
        "replacebody with nothing",
        filter=replaces(b""),
        delivered=(Mail(body=b""),),
        topic=TOPIC,
    ),
    Case(
        "replacebody of 20 MB",
        filter=Filter(on={"eom": big_body(20_000_000)}),
        delivered=(Mail(body=TWENTY_MB),),
        topic=TOPIC,
    ),
    Case(
        "replacebody with headers that change too",
        filter=Filter(
            on={
                "eom": lambda f: (
                    f.addheader("X-First", "1"),
                    f.replacebody(b"New.\r\n"),
                    f.chgheader("Subject", 1, "new"),
                )
            }
        ),
        delivered=(
            Mail(
                headers=(*Mail().headers[:2], "Subject: new", *Mail().headers[3:], "X-First: 1"),
                body=b"New.\r\n",
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "SKIP at body: no more of it comes",
        session(mail(content=with_body(MEGABYTE))),
        Filter(on={"body": lambda f: Milter.SKIP}),
        seen=[*START, "body", "eom", "close"],
        delivered=(Mail(body=MEGABYTE),),
        topic=TOPIC,
    ),
    Case(
        "@nocallback on body: nothing of it comes",
        session(mail(content=with_body(MEGABYTE))),
        Filter(off=("body",)),
        seen=[*START, "eom", "close"],
        delivered=(Mail(body=MEGABYTE),),
        topic=TOPIC,
    ),
    Case(
        "progress keeps an end of message alive that takes longer than the MTA waits",
        filter=Filter(on={"eom": slowly}),
        delivered=(Mail(headers=(*Mail().headers, "X-Slow: yes")),),
        port="impatient",
        topic=TOPIC,
    ),
    Case(
        "without progress a slow end of message is tempfailed",
        session(mail(end="451 4.")),
        Filter(on={"eom": lambda f: time.sleep(3)}),
        delivered=(),
        port="impatient",
        topic=TOPIC,
    ),
)
