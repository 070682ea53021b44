"""The files within a content that carry a name of their own, zips aside.

Mail from before MIME has them in its text: uuencoded (POSIX, ``uuencode``), as yEnc or as BinHex
4.0 (RFC 1741).  BinHex and the formats that keep the two forks of a Macintosh file, MacBinary and
AppleSingle or AppleDouble (RFC 1740), tell the name under which their reader writes the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from Milter._mime.codings import to_text

ENCODED_HEAD = 16_384
"""How much of a part, in its transfer encoding, `names_in_head` needs to see."""

_UUENCODED = re.compile(
    # any number of octal digits, and blanks, are what sscanf("begin %o %s") takes
    rb"(?:\A|[\r\n])begin(-base64)?[ \t]+[0-7]{1,20}[ \t]+([^ \t\r\n][^\r\n]*)(?:\r\n|\r|\n)"
    # the first line of data: blanks stand for zeros as ` does
    rb"(?(1)[A-Za-z0-9+/=]{4,100}[ \t]*|[ -`]{1,86})(?=[\r\n]|\Z)"
)
# Outlook Express took two blanks for enough.  Prose may have them, but no line of data after it.
_UUENCODED_WITHOUT_MODE = re.compile(
    rb"(?:\A|[\r\n])begin  ([^ \t\r\n][^\r\n]*)(?:\r\n|\r|\n)([!-`][ -`]{1,86})(?=[\r\n]|\Z)"
)
_YENC = re.compile(rb"(?:\A|[\r\n])=ybegin [^\r\n]*?\bname=([^\r\n]+)")
_BINHEX = re.compile(rb"(?:\A|[\r\n])[ \t]*:([!-,\-0-689@A-NP-VX-Z\[`a-fh-mp-r\r\n]{20,200})")
_BINHEX_LETTERS = b"!\"#$%&'()*+,-012345689@ABCDEFGHIJKLMNPQRSTUVXYZ[`abcdefhijklmpqr"
_BINHEX_VALUES = {letter: value for value, letter in enumerate(_BINHEX_LETTERS)}
_APPLE_FORKS = (b"\x00\x05\x16\x00", b"\x00\x05\x16\x07")
_APPLE_REAL_NAME = 3
_MOST_ENTRIES = 100  # of an AppleSingle file, which has a dozen kinds of them


def names_in_text(text: bytes) -> Iterator[tuple[str, str]]:
    """(form, name) of each file that a reader takes out of a text."""
    if b"begin" in text:
        # hostile mail has one name many times
        for name in {found[2] for found in _UUENCODED.finditer(text)}:
            yield "uuname", name.decode("latin-1").strip()
        for found in _UUENCODED_WITHOUT_MODE.finditer(text):
            if _is_uu_line(found[2]):
                yield "uuname", found[1].decode("latin-1").strip()
        for name in {found[1] for found in _YENC.finditer(text)}:
            yield "yencname", to_text(name).strip()
    if b"BinHex" in text:
        yield from _binhex_names(text)


def _is_uu_line(line: bytes) -> bool:
    """Whether a line has as many characters as its first one says."""
    expected = 1 + -(-((line[0] - 32) & 63) // 3) * 4
    return expected <= len(line) <= expected + 2


def _binhex_names(text: bytes) -> Iterator[tuple[str, str]]:
    """The names in what follows BinHex's line ("must be converted with BinHex")."""
    for found in re.finditer(rb"BinHex[^\r\n]{0,40}", text):
        data = _BINHEX.search(text, found.end(), found.end() + 400)
        name = _counted_name(_decode_binhex(data[1])) if data else None
        if name:
            yield "binhexname", name


def _decode_binhex(text: bytes) -> bytes:
    """The bytes of the beginning of BinHex data, its repetitions undone."""
    values = [_BINHEX_VALUES[letter] for letter in text if letter in _BINHEX_VALUES]
    bits = "".join(f"{value:06b}" for value in values)
    packed = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits) - 7, 8))
    # 0x90 repeats the byte before it; before a zero it is itself
    return re.sub(rb"(?s)(.)\x90(.)", _repeated, packed)


def _repeated(match: re.Match[bytes]) -> bytes:
    count = match[2][0]
    return match[1] * count if count else match[1] + b"\x90"


def _counted_name(data: bytes) -> str | None:
    """A name of 1 to 63 bytes behind its length."""
    size = data[0] if data else 0
    return to_text(data[1 : 1 + size], "mac-roman") if 0 < size < 64 else None


def names_in_head(data: bytes) -> Iterator[tuple[str, str]]:
    """(form, name) that the beginning of a file in a Macintosh format tells."""
    if data.startswith(_APPLE_FORKS):
        yield from _apple_names(data)
    elif len(data) >= 128 and not (data[0] or data[74] or data[82]):
        name = _counted_name(data[1:65])
        if name and name.isprintable():
            yield "macbinaryname", name
    if b"BinHex" in data[:8192]:
        yield from _binhex_names(data[:8192])


def _apple_names(data: bytes) -> Iterator[tuple[str, str]]:
    """The real name of an AppleSingle or AppleDouble file: entry 3 (RFC 1740, appendix A)."""
    count = min(int.from_bytes(data[24:26], "big"), _MOST_ENTRIES)
    for at in range(26, 26 + 12 * count, 12):
        kind, offset, size = (int.from_bytes(data[n : n + 4], "big") for n in (at, at + 4, at + 8))
        if kind == _APPLE_REAL_NAME and size:
            yield "applename", to_text(data[offset : offset + min(size, 1024)])
