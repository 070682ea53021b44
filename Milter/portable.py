"""Helpers that even out what differs between MTAs; use them or not.

They only call methods that a filter has anyway, in the way that works everywhere:

>>> import Milter
>>> from Milter.portable import delete_headers, queue_id, set_reply
>>> class Clean(Milter.Base):
...     def envfrom(self, sender, *params):
...         self.seen = 0
...         return Milter.CONTINUE
...     def header(self, field, value):
...         self.seen += field.lower() == "x-spam"
...         return Milter.CONTINUE
...     def eom(self):
...         delete_headers(self, "X-Spam", self.seen)
...         if self.seen > 100:
...             set_reply(self, "550", "5.7.1", f"100% spam, see {queue_id(self)}")
...             return Milter.REJECT
...         return Milter.CONTINUE
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

__all__ = ["delete_headers", "queue_id", "reply_lines", "set_reply"]

MAX_LINES = 32  # MAXREPLIES of libmilter
MAX_LINE = 980  # MAXREPLYLEN of libmilter, bytes
CUT = "[...]"


class _Filter(Protocol):
    """What the helpers need of a ``Milter.Base`` or a ``milter.milterContext``."""

    def getsymval(self, sym: str, /) -> str | None: ...

    def setreply(self, rcode: str, xcode: str | None, /, *lines: str) -> Any: ...

    def chgheader(self, field: str, idx: int, value: str | None, /) -> Any: ...


def delete_headers(filter: _Filter, name: str, which: int | Iterable[int]) -> None:
    """Delete several headers of one name, in ``eom`` only (smfi_chgheader).

    After a deletion Postfix counts the remaining headers of that name anew and sendmail does
    not, so that a loop from 1 upwards leaves every other one in Postfix. From the last to the
    first, the numbers mean the same to both.

    Args:
        filter: the filter object.
        name: the headers' name; upper and lower case are the same.
        which: how many of them there are, to delete them all; or their numbers, from 1, in
            any order, as counted before any change.

    Raises:
        ValueError: a number is below 1, or a count below 0; nothing is deleted then.
        DisabledAction: CHGHDRS was not negotiated.
        milter.error: not in ``eom``.
    """
    if isinstance(which, int):
        if which < 0:
            raise ValueError(f"which: a count of headers cannot be negative, not {which!r}")
        which = range(1, which + 1)
    numbers = sorted(set(which), reverse=True)
    if numbers and numbers[-1] < 1:
        raise ValueError(f"which: headers are counted from 1, not {numbers[-1]!r}")
    for number in numbers:
        filter.chgheader(name, number, None)


def set_reply(filter: _Filter, rcode: str, xcode: str | None, text: str) -> None:
    """Set the SMTP reply from plain text (smfi_setmlreply); see ``reply_lines``.

    Args:
        filter: the filter object.
        rcode: the reply code: 5yz to go with REJECT, 4yz with TEMPFAIL.
        xcode: the enhanced status code (RFC 3463), of the same class, or None.
        text: what to tell the client, with line feeds or without.

    Raises:
        ValueError: a code is refused (such an error is also a ``milter.error``).
    """
    filter.setreply(rcode, xcode, *reply_lines(text))


def reply_lines(text: str) -> list[str]:
    """Make lines that ``setreply`` takes of plain text.

    Percent signs are doubled, as libmilter wants them; MTAs send them single. Lines are broken
    at a space where they are longer than 980 bytes (of UTF-8), else within a word, but never
    within a character. Control characters and lone surrogates become ``?``. What is beyond 32
    lines is left out, and the last line then ends in ``[...]``.

    Args:
        text: any text.

    Returns:
        1 to 32 lines; for an empty text one empty line.
    """
    lines: list[str] = []
    for paragraph in text.replace("\r\n", "\n").rstrip("\n").split("\n"):
        lines.extend(_broken("".join(map(_escaped, paragraph))))
        if len(lines) > MAX_LINES:
            del lines[MAX_LINES:]
            lines[-1] = f"{_cut(lines[-1], MAX_LINE - len(CUT) - 1)[0].rstrip()} {CUT}"
            break
    return lines


def _escaped(char: str) -> str:
    if char == "%":
        return "%%"
    if char == "\t":
        return " "
    if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000:
        return "?"
    return char


def _broken(line: str) -> Iterator[str]:
    while True:
        part, rest = _cut(line, MAX_LINE)
        if not rest:
            yield part
            return
        space = len(part) if rest[0] == " " else part.rfind(" ")
        if space > 0 and part[:space].strip():
            part, rest = line[:space], line[space + 1 :]
        yield part
        line = rest


def _cut(line: str, room: int) -> tuple[str, str]:
    """*line* in two, the first of at most *room* bytes, with no doubled percent sign cut in two."""
    part = line.encode()[:room].decode(errors="ignore")
    if len(part) < len(line) and (len(part) - len(part.rstrip("%"))) % 2:
        part = part[:-1]
    return part, line[len(part) :]


def queue_id(filter: _Filter) -> str | None:
    """The MTA's name for the message (macro ``i``), once there is one.

    sendmail gives it with MAIL; Postfix with the first recipient that it accepts, so that it is
    known from ``data`` on, and earlier only by chance. A filter that wants it in its logs asks
    again where it has none yet.

    Args:
        filter: the filter object.

    Returns:
        The queue id, or None where the MTA has not given one.
    """
    return filter.getsymval("i") or None
