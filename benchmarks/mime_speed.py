#!/usr/bin/env python3
"""How long `mime` takes to read and to write messages, compared to the standard library.

usage: mime_speed.py [ROUNDS]

Each message is read from a file and written back by both, in turns; printed are the medians and
their ratio.  With the raw bytes kept, `mime` writes an unmodified message without a generator, so
the last columns show the same with one header added.
"""

from __future__ import annotations

import base64
import email
import io
import statistics
import sys
import time
from collections.abc import Callable
from email.message import Message

import mime

HEADER = b"".join(
    b"Received: from mx%d.example.com (mx%d.example.com [192.0.2.%d])\n"
    b"\tby mail.example.org with ESMTPS id 4F%d; Thu, 1 Jan 2026 00:00:00 +0000\n" % (i, i, i, i)
    for i in range(8)
) + (
    b"From: A <a@example.com>\nTo: b@example.org\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\n"
    b"Message-ID: <1@example.com>\nDate: Thu, 1 Jan 2026 00:00:00 +0000\nMIME-Version: 1.0\n"
)
TEXT = b"It is a truth universally acknowledged, that a single man in possession\n"


def text(size: int) -> bytes:
    """A plain message."""
    return HEADER + b"Content-Type: text/plain; charset=utf-8\n\n" + TEXT * (size // len(TEXT))


def multipart(parts: int, size: int) -> bytes:
    """A message with attachments in base64, each of `size` bytes."""
    body = base64.encodebytes(b"\0" * size)
    part = (
        b"--bound\nContent-Type: application/pdf; name=a.pdf\n"
        b"Content-Disposition: attachment; filename=a.pdf\n"
        b"Content-Transfer-Encoding: base64\n\n" + body
    )
    head = b'Content-Type: multipart/mixed; boundary="bound"\n\n'
    return HEADER + head + part * parts + b"--bound--\n"


def nested(depth: int) -> bytes:
    """Messages within each other, each with an alternative."""
    inner = b"Content-Type: text/plain\n\n" + TEXT * 10
    for level in range(depth):
        mark = b"--level%d" % level
        inner = (
            HEADER
            + b"Content-Type: multipart/alternative; boundary=level%d\n\n" % level
            + b"\n".join((mark, b"Content-Type: text/html\n", b"<p>x</p>", mark))
            + b"\nContent-Type: message/rfc822\n\n"
            + inner
            + mark
            + b"--\n"
        )
    return inner


MESSAGES = {
    "empty": b"Subject: x\n\n",
    "text, 2 kB": text(2_000),
    "text, 1 MB": text(1_000_000),
    "CRLF, 100 kB": text(100_000).replace(b"\n", b"\r\n"),
    "3 attachments, 1 MB": multipart(3, 340_000),
    "1,000 small parts": multipart(1_000, 30),
    "10 levels": nested(10),
    "many headers": HEADER * 20 + b"\nx\n",
}


def standard(raw: bytes) -> Message:
    """Read as `mime` reads: from an open binary file."""
    return email.message_from_bytes(io.BytesIO(raw).read())


def ours(raw: bytes) -> Message:
    """Read with `mime`."""
    return mime.message_from_file(io.BytesIO(raw))


def measure(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median time of each call in seconds; the calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in times]


def main() -> int:
    """Print the table; the exit status is 1 where a ratio is above 1.3."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 51
    print(f"{'message':22}{'read: email':>13}{'mime':>10}{'ratio':>7}", end="")
    print(f"{'write: email':>14}{'mime':>10}{'ratio':>7}{'modified':>10}{'ratio':>7}   (ms)")
    slow = False
    for name, raw in MESSAGES.items():
        count = max(5, rounds if len(raw) < 200_000 else rounds // 3)
        reading = measure([lambda: standard(raw), lambda: ours(raw)], count)  # noqa: B023
        theirs, mine, changed = standard(raw), ours(raw), ours(raw)
        changed["X-Checked"] = "yes"
        writing = measure([theirs.as_bytes, mine.as_bytes, changed.as_bytes], count)
        ratios = [reading[1] / reading[0], writing[1] / writing[0], writing[2] / writing[0]]
        slow = slow or max(ratios) > 1.3
        cells = [f"{t * 1e3:.3f}" for t in (*reading, *writing)]
        shown = [f"{r:.2f}" for r in ratios]
        print(f"{name:22}{cells[0]:>13}{cells[1]:>10}{shown[0]:>7}", end="")
        print(f"{cells[2]:>14}{cells[3]:>10}{shown[1]:>7}{cells[4]:>10}{shown[2]:>7}")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
