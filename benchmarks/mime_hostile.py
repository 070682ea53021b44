#!/usr/bin/env python3
"""How long `mime` takes, and how much memory, to read, check and write hostile messages.

usage: mime_hostile.py [--size MB] [KIND...]

Each kind is measured in a process of its own: seconds of CPU time to read, to check with `defang`
(zips looked into) and to write, and by how many times the size of the message the process grew.
The last column says what became of the message: ``clean``, ``replaced`` (as a whole) or
``changed``.  The exit status is 1 where a kind takes more than 1 s for each megabyte, or more than
20 times its size.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable

MULTI = b'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="b"\n\n'
HTML = b"MIME-Version: 1.0\nContent-Type: text/html\n\n"
CODED = b"MIME-Version: 1.0\nContent-Type: %s\nContent-Transfer-Encoding: %s\n\n"


def fill(head: bytes, unit: bytes) -> Callable[[int], bytes]:
    """A message of `head` and as many `unit` as fit."""
    return lambda size: head + unit * ((size - len(head)) // len(unit))


def numbered(head: bytes, unit: bytes, tail: bytes = b"\n\nx\n") -> Callable[[int], bytes]:
    """As `fill`, with a number in each unit."""

    def make(size: int) -> bytes:
        count = (size - len(head)) // (len(unit) + 4)
        return head + b"".join(unit % i for i in range(count)) + tail

    return make


def random_base64(kind: bytes) -> Callable[[int], bytes]:
    """Random bytes in base64, as a compressed file would be."""

    def make(size: int) -> bytes:
        data = random.Random(1).randbytes(size * 3 // 4 * 76 // 77)
        return CODED % (kind, b"base64") + base64.encodebytes(data)

    return make


def nested(unit: bytes) -> Callable[[int], bytes]:
    """Multiparts within each other, as deep as is looked at, and the rest in the innermost."""

    def make(size: int) -> bytes:
        head = b"MIME-Version: 1.0\n"
        for level in range(48):
            head += b"Content-Type: multipart/mixed; boundary=l%d\n\n--l%d\n" % (level, level)
        return head + b"\n" + unit * ((size - len(head)) // len(unit))

    return make


KINDS: dict[str, Callable[[int], bytes]] = {
    "empty lines": fill(b"\n", b"\n"),
    "empty lines, CRLF": fill(b"\r\n", b"\r\n"),
    "lone CRs": fill(b"\n", b"\r"),
    "lines of one character": fill(b"\n", b"a\n"),
    "lines of one character, 8-bit": fill(b"\n", b"\xff\n"),
    "lines of a dash": fill(MULTI, b"-\n"),
    "lines of two dashes": fill(MULTI, b"--\n"),
    "lines like a boundary": fill(MULTI, b"--bx\n"),
    "one line": fill(b"\n", b"a"),
    "one-byte lines in an HTML part": fill(HTML, b"a\n"),
    "tags": fill(HTML, b"<a>"),
    "tags with an attribute": fill(HTML, b"<a b>"),
    "tags with a style": fill(HTML, b"<a style=b:c>"),
    "tags with a quote": fill(HTML, b"<a'>"),
    "tags with a script": fill(HTML, b"<a onb>"),
    "end tags with a quote": fill(HTML, b"</a'>"),
    "one tag's attributes": fill(HTML + b"<a", b" b"),
    "one tag's odd attributes": fill(HTML + b"<a", b" b:"),
    "instructions": fill(HTML, b"<?a<?>"),
    "declarations": fill(HTML, b"<!a<!>"),
    "comments with a sign": fill(HTML, b"<!--<-->"),
    "conditional comments": fill(HTML, b"<!--[if a]><a><![endif]-->"),
    "entities": fill(HTML, b"<!ENTITY a>"),
    "titles": fill(HTML, b"<title></title>"),
    "scripts": fill(HTML, b"<script></script>"),
    "frames": fill(HTML, b"<iframe><a b:></iframe>"),
    "drawings": fill(CODED % (b"image/svg+xml", b"8bit") + b"<svg>", b"<a b='c'/>"),
    "signs of a tag": fill(HTML, b"<"),
    "NULs in HTML": fill(HTML, b"\0a"),
    "base64 of single bytes": fill(CODED % (b"application/zip", b"base64"), b"QQ==\n"),
    "base64 of single bytes, HTML": fill(CODED % (b"text/html", b"base64"), b"QQ==\n"),
    "base64 of single characters": fill(CODED % (b"application/zip", b"base64"), b"Q\n"),
    "base64 of random bytes": random_base64(b"application/octet-stream"),
    "base64 of random bytes, text": random_base64(b"text/plain"),
    "quoted-printable": fill(CODED % (b"text/html", b"quoted-printable"), b"=3D"),
    "quoted-printable, soft breaks": fill(CODED % (b"text/html", b"quoted-printable"), b"=\n"),
    "uuencode, empty lines": fill(CODED % (b"text/html", b"x-uuencode") + b"begin 644 a\n", b"`\n"),
    "uuencode, many files": fill(CODED % (b"text/html", b"x-uuencode"), b"begin 644 a\n#0V%T\n"),
    "begin lines": fill(b"\n", b"begin 644 a\n"),
    "empty parts": fill(MULTI, b"--b\n\n"),
    "ends of parts": fill(MULTI, b"--b--\n"),
    "headers": fill(b"", b"A:\n"),
    "headers, numbered": numbered(b"", b"X-%d: y\n"),
    "Content-Types": fill(b"", b"Content-Type: a/b; name=c\n"),
    "transfer encodings": numbered(b"", b"Content-Transfer-Encoding: x%d\n"),
    "folded": fill(b"Subject: a\n", b" b\n"),
    "folded, blank": fill(b"Subject: a\n", b" \n"),
    "a header's lone CRs": fill(b"Subject: a", b" \r"),
    "parameters": numbered(b"Content-Type: a/b", b"; c%d=d"),
    "semicolons": fill(b"Content-Type: a/b", b";"),
    "no semicolons": fill(b"Content-Type: a/b", b" a=b"),
    "quotes": fill(b"Content-Type: a/b; name=c", b'"'),
    "comments": fill(b"Content-Type: a/b", b"("),
    "pieces of names": numbered(b"Content-Disposition: a", b"; filename*%d=d"),
    "encoded words": fill(b"Content-Disposition: a; filename=", b"=?a?q?b?= "),
    "descriptions": fill(b"", b"Content-Description: a b.c\n"),
    "no header": fill(b"", b"x y\n"),
    "nested, lines": nested(b"a\n"),
    "nested, dashes": nested(b"-\n"),
    "nested, boundaries": nested(b"--l47\n\n"),
    "messages": fill(b"", b"Content-Type: message/rfc822\n\n"),
    "digests": fill(b"Content-Type: multipart/digest; boundary=b\n\n", b"--b\n\n\n"),
    "reports": fill(b"Content-Type: message/delivery-status\n\n", b"A: b\n\n"),
}
INNOCENT: dict[str, Callable[[int], bytes]] = {
    "text": fill(b"Subject: a\n\n", b"It is a truth universally acknowledged, that a single man\n"),
    "HTML": fill(HTML, b"<p>It is a truth <b>universally</b> acknowledged, that a man</p>\n"),
}


def measure(make: Callable[[int], bytes], size: int) -> str:
    """One kind: figures as text."""
    import mime

    raw = make(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks = [time.process_time()]
    msg = mime.message_from_file(io.BytesIO(raw))
    marks.append(time.process_time())
    changed = mime.defang(msg, scan_zip=True)
    marks.append(time.process_time())
    written = msg.as_bytes()
    marks.append(time.process_time())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(raw)
    what = "changed" if changed else "clean"
    if changed and len(written) < 3000:
        what = "replaced"
    times = [b - a for a, b in zip(marks, marks[1:])]
    return " ".join([*(f"{t:9.2f}" for t in (*times, sum(times))), f"{grown:8.1f}  {what}"])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=10.0, help="megabytes of each message")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("kinds", nargs="*", help="kinds to measure; default: all")
    options = parser.parse_args()
    size = int(options.size * 1e6)
    if options.one:
        print(measure((KINDS | INNOCENT)[options.one], size))
        return 0
    print(f"{'message':34}{'read':>9} {'check':>9} {'write':>9} {'all, s':>9} {'memory':>8}")
    over = False
    for kind in options.kinds or [*KINDS, *INNOCENT]:
        command = [sys.executable, __file__, "--size", str(options.size), "--one", kind]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip()
        total, memory = line.split()[3:5]
        over = over or float(total) > options.size or float(memory) > 20
        print(f"{kind:34}{line}", flush=True)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
