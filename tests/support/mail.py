"""Messages made of parts, and what `mime.defang` makes of them."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any

import mime


def read(raw: bytes) -> mime.MimeMessage:
    """The message in these bytes."""
    return mime.message_from_file(io.BytesIO(raw))


def part(headers: str, body: bytes = b"body\n") -> bytes:
    """A part with these header lines."""
    return headers.encode("utf-8", "surrogateescape") + b"\n\n" + body


def mixed(*parts: bytes, kind: str = "multipart/mixed") -> bytes:
    """A message of these parts."""
    lines = [b"Subject: s\nMIME-Version: 1.0\nContent-Type: %s; boundary=bb\n\n" % kind.encode()]
    return b"".join(lines + [b"--bb\n" + p + b"\n" for p in parts] + [b"--bb--\n"])


GOOD = part("Content-Type: text/plain", b"good\n")


def defanged(raw: bytes, **options: Any) -> mime.MimeMessage:
    """The message after defang, read again from what it was written as."""
    msg = read(raw)
    assert mime.defang(msg, "saved", **options) is msg.ismodified()
    written = msg.as_bytes()
    if not msg.ismodified():
        assert written == raw
    return read(written)


def removed(raw: bytes, **options: Any) -> bool:
    """Whether the second of two parts with these bytes was replaced by a warning."""
    result = defanged(mixed(GOOD, raw, GOOD), **options)
    first, second, third = result.get_payload()
    assert first.as_bytes() == third.as_bytes() == GOOD
    warned = "has been removed" in str(second.get_payload())
    if warned:
        assert second.get_content_type() == "text/plain"
        assert second.getnames() == [("name", "WARNING.TXT"), ("filename", "WARNING.TXT")]
        assert max(map(len, second.as_bytes().splitlines())) < 998
    else:
        assert second.as_bytes() == raw
    return warned


def zipped(*names: str | tuple[str, bytes], content: bytes = b"x", **options: Any) -> bytes:
    """A zip of empty files with these names, or of (name, content)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name in names:
            name, data = name if isinstance(name, tuple) else (name, content)
            archive.writestr(name, data)
    return out.getvalue()


def attached(data: bytes, name: str = "x.zip", kind: str = "application/zip") -> bytes:
    """A part that holds a file, in base64."""
    return part(
        f"Content-Type: {kind}; name={name}\nContent-Transfer-Encoding: base64",
        base64.encodebytes(data),
    )
