"""What hostile mail costs: memory in proportion to its size.  See benchmarks/mime_hostile.py."""

from __future__ import annotations

import io
import tracemalloc

import pytest

import mime

MULTI = b"Content-Type: multipart/mixed; boundary=b\n\n"
SIZE = 100_000


def nested(unit):
    head = b""
    for level in range(48):
        head += b"Content-Type: multipart/mixed; boundary=l%d\n\n--l%d\n" % (level, level)
    return head + b"\n" + unit


@pytest.mark.parametrize(
    ("head", "unit"),
    [
        (b"\n", b"a\n"),
        (b"\n", b"\xff\n"),
        (b"\n", b"\r\n"),
        (b"\n", b"\r"),
        (MULTI, b"-\n"),
        (MULTI, b"--\n"),
        (MULTI, b"--bx\n"),
        (MULTI, b"--b--\n"),
        (nested(b""), b"a\n"),
        (nested(b""), b"--\n"),
        (b"", b"Content-Type: message/rfc822\n\n"),
        (b"Content-Type: a/b", b";"),
        (b"Content-Type: a/b", b"; c=d"),
        (b"Content-Type: a/b", b" c=d"),
        (b"Content-Transfer-Encoding: base64\nContent-Type: application/zip\n\n", b"Q\n"),
        (b"Content-Type: multipart/mixed; boundary=a b\n\n", b"--c\n"),
    ],
    ids=range(16),
)
def test_memory(head, unit):
    raw = head + unit * (SIZE // len(unit))
    mime.defang(mime.message_from_file(io.BytesIO(MULTI)))  # what is loaded only once
    tracemalloc.start()
    try:
        msg = mime.message_from_file(io.BytesIO(raw))
        mime.defang(msg, scan_zip=True)
        msg.as_bytes()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(raw)


@pytest.mark.parametrize("line", [b"A: b\n", b" b\n", b"Content-Type: a/b\n"])
def test_lines_of_headers_are_bounded(monkeypatch, line):
    monkeypatch.setattr(mime, "MAX_HEADER_LINES", 100)
    fine = b"Subject: x\n" + line * 98 + b"\nbody\n"
    msg = mime.message_from_file(io.BytesIO(fine))
    assert not mime.defang(msg) and msg.as_bytes() == fine
    raw = b"Subject: x\n" + line * 100 + b"\nbody\n"
    msg = mime.message_from_file(io.BytesIO(raw))
    assert msg.as_bytes() == raw and msg["Subject"].startswith("x")
    assert mime.defang(msg)
    assert b"more than 100 lines of headers" in msg.as_bytes()
    assert msg.as_bytes().startswith(b"Subject: x")


def test_lines_of_headers_count_for_the_whole_message(monkeypatch):
    monkeypatch.setattr(mime, "MAX_HEADER_LINES", 100)
    raw = MULTI + b"--b\nContent-Type: text/plain\nX: y\n\nz\n" * 60
    assert mime.defang(mime.message_from_file(io.BytesIO(raw)))
