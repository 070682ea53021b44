"""Bytes as text that a terminal, a mail and a person can take, and back.  No I/O."""

from __future__ import annotations

import re

_SHORT = {"\0": "\\0", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_MEANT = {"0": b"\0", "n": b"\n", "r": b"\r", "t": b"\t", "\\": b"\\"}
_NOT_PLAIN = re.compile(r"[^ -\[\]-~]")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|(.?))", re.DOTALL)


def escape(data: bytes) -> str:
    r"""*data* as UTF-8, in which each byte of what cannot be printed is ``\xNN``.

    NUL, line ends, tabs and the backslash itself have their short forms (``\0 \n \r \t \\``).  A
    blank at the end is ``\x20``, as editors and mail programs take those away.
    """
    text = _NOT_PLAIN.sub(_escaped, data.decode("utf-8", "surrogateescape"))
    return text[:-1] + "\\x20" if text.endswith(" ") else text


def _escaped(found: re.Match[str]) -> str:
    char = found[0]
    if char.isprintable() and char != "\\":
        return char
    short = _SHORT.get(char)
    if short is not None:
        return short
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))


def unescape(text: str) -> bytes:
    r"""The bytes that :func:`escape` has written.

    Raises:
        ValueError: a backslash begins nothing that is known.
    """
    data = bytearray()
    start = 0
    for found in _ESCAPE.finditer(text):
        data += text[start : found.start()].encode("utf-8", "surrogateescape")
        number, letter = found.groups()
        if number is not None:
            data.append(int(number, 16))
        elif letter in _MEANT:
            data += _MEANT[letter]
        else:
            raise ValueError(f"the escape {found[0]!r} is none of \\0 \\n \\r \\t \\\\ \\xNN")
        start = found.end()
    return bytes(data + text[start:].encode("utf-8", "surrogateescape"))


def shortened(data: bytes, most: int = 72) -> str:
    """The beginning of *data* in quotes, and how long all of it is where that was cut."""
    if len(data) <= most:
        return f'"{escape(data)}"'
    # What is cut within a character would be escaped.
    start = data[:most].decode("utf-8", "ignore").encode() or data[:most]
    return f'"{escape(start)}"… ({len(data)} bytes)'
