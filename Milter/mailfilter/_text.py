"""Values of headers: from bytes to text and back (RFC 5322 folding, RFC 2047 words)."""

from __future__ import annotations

import base64
import re
from email.utils import getaddresses, quote

import milter

from ..utils import parse_header

#: Columns that a line should not go past (RFC 5322, section 2.1.1).
WIDTH = 78

_FOLD = re.compile(r"\r?\n[ \t]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORD = re.compile(r"=\?[^?\s]+\?[bBqQ]\?[^?\s]*\?=")
_Q_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")
_MAX_WORD = 75  # RFC 2047, section 2, as are the 76 columns of a line
_MAX_LINE = 76
_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]*")

#: Headers that hold addresses, in which only display names may be encoded.
ADDRESS_HEADERS = frozenset(
    {
        "bcc",
        "cc",
        "from",
        "reply-to",
        "resent-bcc",
        "resent-cc",
        "resent-from",
        "resent-sender",
        "resent-to",
        "sender",
        "to",
    }
)


def decoded(raw: bytes) -> str:
    """The text of a value: folds undone, RFC 2047 words decoded, without space around it.

    Bytes that are no UTF-8 are kept as ``surrogateescape`` keeps them.  Never raises.
    """
    text = raw.decode("utf-8", "surrogateescape")
    if "\n" in text:
        text = _FOLD.sub(" ", text)
    if "=?" in text:
        text = parse_header(text)
    return text.strip(" \t\r\n")


def encoded(call: str, name: bytes, value: str | bytes) -> bytes:
    """What stands after the colon for a value: a space, and the value with LF at its folds.

    Text is encoded where it has to be and folded where it is long.  Bytes, and text that is folded
    already, are taken as they are.

    Args:
        call: the method that was called, for errors.
        name: the header's name.
        value: text, or bytes as they shall stand in the message.

    Raises:
        milter.InvalidArgument: what could forge a header: CR and LF but in a fold, NUL.
        TypeError: it is neither.
    """
    wire = milter._header_value(call, value)
    if isinstance(value, str) and "\n" not in value and "\r" not in value:
        if len(wire) + len(name) + 2 <= WIDTH and value.isascii() and "=?" not in value:
            return b" " + wire
        text = _for_mail(name.decode("ascii", "replace").lower(), value)
        return _folded(text, len(name) + 1)
    return b" " + wire


def _is_raw(text: str) -> bool:
    """Whether it has bytes that were no UTF-8, which go out as they came."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def _for_mail(name: str, text: str) -> str:
    """Text in ASCII, by RFC 2047, where it can be."""
    # Each word fits on the line of the header's name.
    room = min(_MAX_WORD, max(_MAX_LINE - len(name) - 2, _MAX_LINE // 2))
    if text.isascii() and "=?" not in text:
        return text
    if name in ADDRESS_HEADERS and not text.isascii():
        mailboxes = _mailboxes(text, room)
        if mailboxes is not None:
            return mailboxes
    words: list[str] = []
    pending: list[str] = []  # words to be encoded in one, with the spaces between them
    for word in text.split(" "):
        # Space between two encoded words is lost to readers, so that it has to be within one.
        if _needs_encoding(word) or (pending and not word):
            pending.append(word)
        else:
            words += [*_run(pending, room), word]
            pending = []
    return " ".join([*words, *_run(pending, room)])


def _run(words: list[str], room: int) -> list[str]:
    """Words that are to be encoded in one, and the empty ones after them."""
    last = len(words)
    while last and not words[last - 1]:
        last -= 1
    return [_encoded_words(" ".join(words[:last]), room), *words[last:]] if last else words


def _needs_encoding(word: str) -> bool:
    if _is_raw(word):
        return False
    return not word.isascii() or _WORD.search(word) is not None


def _mailboxes(text: str, room: int) -> str | None:
    """A list of addresses with its display names encoded; None where it is none."""
    found = getaddresses([text])
    if not found or ";" in text or _is_raw(text):
        return None
    out = []
    for display, address in found:
        if "@" not in address:
            return None
        if not display:
            out.append(address)
        elif not display.isascii():
            out.append(f"{_encoded_words(display, room)} <{address}>")
        elif _ATOMS.fullmatch(display):
            out.append(f"{display} <{address}>")
        else:
            out.append(f'"{quote(display)}" <{address}>')
    return ", ".join(out)


def _encoded_words(text: str, room: int) -> str:
    """Text as RFC 2047 words of at most so many characters, each of whole characters."""
    data = text.encode("utf-8")
    as_q = sum(1 if byte in _Q_PLAIN or byte == 0x20 else 3 for byte in data)
    encode = _q if as_q <= len(data) * 4 // 3 else _b
    room -= len("=?utf-8?q??=")
    words, piece = [], ""
    for char in text:
        if piece and len(encode(piece + char)) > room:
            words.append(piece)
            piece = ""
        piece += char
    kind = "q" if encode is _q else "b"
    return " ".join(f"=?utf-8?{kind}?{encode(word)}?=" for word in (*words, piece))


def _b(text: str) -> str:
    return base64.b64encode(text.encode("utf-8")).decode("ascii")


def _q(text: str) -> str:
    return "".join(
        "_" if byte == 0x20 else chr(byte) if byte in _Q_PLAIN else f"={byte:02X}"
        for byte in text.encode("utf-8")
    )


def _folded(text: str, column: int) -> bytes:
    """A space and the text, with a line feed before spaces where lines would be too long."""
    lines: list[str] = []
    line = ""
    # A space goes with the word after it; where there are more, all of them do.
    for piece in re.findall(r"[ \t]*[^ \t]+|[ \t]+$", " " + text):
        too_long = column + _width(line) + _width(piece) > WIDTH
        if too_long and line.strip(" \t") and piece.strip(" \t") and piece.startswith(" "):
            lines.append(line)
            line, column = piece, 0
        else:
            line += piece
    lines.append(line)
    return "\n".join(lines).encode("utf-8", "surrogateescape") or b" "


def _width(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))
