"""From bytes to a tree of parts, with the places where readers see another tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from Milter._mime.codings import as_str
from Milter._mime.feedparser import Parser, dashed_lines
from Milter._mime.limits import LimitExceeded, log

# A `MimeMessage`, which is built on this module.
Part = Any


class Source:
    """The bytes that a tree of messages was read from, and where each part lies in them."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._placed = False

    def place(self, root: Part) -> None:
        """Give every part that was read its place: where it begins and ends in the bytes."""
        if self._placed:
            return
        self._placed = True
        todo = [(root, len(self.raw))]
        while todo:
            part, end = todo.pop()
            part._span = (part._first, end)
            children = part._seen_payload if isinstance(part._seen_payload, tuple) else ()
            delimited = part._seen_multipart
            for child in children:
                stop = min(child._last, end)
                if delimited and stop < end:
                    # RFC 2046, 5.1.1: the line end before a boundary belongs to the boundary
                    stop -= self._eol_before(stop, child._first)
                todo.append((child, stop))

    def _eol_before(self, stop: int, start: int) -> int:
        tail = self.raw[max(start, stop - 2) : stop]
        return 2 if tail == b"\r\n" else int(tail[-1:] in (b"\r", b"\n"))


def parse(raw: bytes, root: Part) -> None:
    """Read a message into `root`, whatever it holds."""
    text = as_str(raw)
    pristine = dict(root.__dict__)
    try:
        Parser(text, root).close()
    except Exception as exc:  # noqa: BLE001  # hostile mail must not stop the filter, whatever
        # part of the standard library it trips over
        limit = str(exc) if isinstance(exc, LimitExceeded) else f"cannot be parsed: {exc!r}"
        log.warning("message: %s", limit)
        root.__dict__.clear()
        root.__dict__.update(pristine, _headers=[], defects=[])
        try:
            Parser(text, root, headers_only=True).close()
        except Exception:  # noqa: BLE001  # as above
            log.warning("headers cannot be parsed", exc_info=True)
            root._headers, root._payload = [], text
        root.limit = limit
        root._last = 0
    source = Source(raw)
    for part in root.walk():
        part._settle(source, root)
    if not root.limit:
        _note_headers(text, root)
        _note_odd_boundaries(text, root)


EARLY_END = "header that ends early"
BESIDE_CR = "boundary beside a lone CR"


def lone_cr_readings(raw: bytes) -> list[bytes]:
    """The messages that readers see for whom a lone CR is not a line end as it is for the parser.

    CRs before the end of a line belong to that for some, and elsewhere they are nothing, a blank,
    or a line end, after which not every line is a field or a boundary.  Programs write them that
    had the one in their input already.
    """
    if not _LONE_CR_BYTES.search(raw):
        return []
    ended = _CRS_AT_THE_END.sub(b"\r\n", raw)
    found = [_LONE_CR_BYTES.sub(instead, ended) for instead in (b"", b" ")]
    alike = b"\n" not in ended  # then two of them are an empty line, else perhaps none
    for lines in (ended, ended if alike else _CRS_IN_A_ROW.sub(b"\r", ended)):
        found.append(_LONE_CR_BYTES.sub(b"\n ", _CR_BEFORE_A_START.sub(b"\n", lines)))
    return list(dict.fromkeys(found))


# Readers disagree on where a line ends, on what a header may hold, and on what a boundary is.
# The functions below find where the parser may have missed a part, or the header of one, that
# others see.
_HIDDEN_HEADER = re.compile(
    r"(?:(?<=[\r\n])|\A)[ \t]*content-(?:type|disposition|transfer-encoding)"
    r"[^\S\r\n]*(?:[:\r\n]|\Z)",
    re.IGNORECASE,
)
_EMPTY_LINE = re.compile(r"\r?\n")
_EMPTY_LINE_BELOW = re.compile(r"\n\r?\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
HEADER_LINE = re.compile(r"(From |[\041-\071\073-\176]*:|[\t ])")
_HEADER_LINES = re.compile(r"(?:(?:From |[\041-\071\073-\176]*:|[\t ])[^\r\n]*(?:\r\n|\r|\n|\Z))*")
_LONE_CR = re.compile(r"\r(?!\n)")
_LONE_CR_BYTES = re.compile(rb"\r(?!\n)")
_CR_BEFORE_A_START = re.compile(rb"\r(?=--|[!-9;-~]{1,100}[ \t]{0,9}:|\r|\Z)")
_CRS_IN_A_ROW = re.compile(rb"\r+(?![\r\n])")
_CRS_AT_THE_END = re.compile(rb"(?<!\r)\r{2,}\n")
_UNFOLDED_CR = re.compile(r"\r(?![\n \t])")
_LF_FIELD = re.compile(r"(?:(?<=\n)|\A)(content-[!-9;-~]+)[ \t]*:[ \t]*", re.IGNORECASE)
_LF_FIELD_END = re.compile(r"\r*\n(?![ \t])|\r*\Z")


def _ends_for_all(text: str, at: int) -> bool:
    """Whether an empty line begins here, also where a lone CR ends no line."""
    return bool(_EMPTY_LINE.match(text, at)) and (not at or text[at - 1] == "\n")


def _end_for_all(text: str, start: int, stop: int) -> int:
    """Where the first such line begins, `stop` where there is none."""
    if start < stop and _ends_for_all(text, start):
        return start
    found = _EMPTY_LINE_BELOW.search(text, start, stop)
    return found.start() + 1 if found else stop


def _note_headers(text: str, root: Part) -> None:
    """Mark the parts of which some readers see other headers than the parser."""
    blocks: set[int] = set()  # of delivery reports, which are text for every reader
    lone_crs = _LONE_CR.search(text) is not None
    for part in root.walk():
        if part.get_content_type() == "message/delivery-status" and part.is_multipart():
            blocks.update(map(id, part._payload[1:]))
        if id(part) in blocks:
            continue
        if _header_ends_early(text, part):
            part._misread = EARLY_END
        if lone_crs:
            part._other_fields = list(_lone_cr_fields(text, part))
            if any(n == "content-transfer-encoding" for n, _ in part._other_fields):
                part._misread = EARLY_END  # with it the body begins elsewhere


def _lone_cr_fields(text: str, part: Part) -> Iterator[tuple[str, str]]:
    """(name in lower case, value) of headers of which a lone CR is a part, for some readers."""
    stop = _end_for_all(text, part._first, part._last)
    if not _LONE_CR.search(text, part._first, stop):
        return
    for found in _LF_FIELD.finditer(text, part._first, stop):
        after = _LF_FIELD_END.search(text, found.end(), stop)
        value = text[found.end() : after.start() if after else stop]
        if _UNFOLDED_CR.search(value):
            yield found[1].lower(), value


def _header_ends_early(text: str, part: Part) -> bool:
    """Whether some readers find a header that matters where the parser found none.

    Blanks before the colon, lines that are no header and lone CRs end the header for the
    parser, while others go on; and a lone CR begins a line only for the parser.
    """
    for defect in part.defects:
        line = getattr(defect, "line", None)  # a continuation of nothing
        if isinstance(line, str) and _HIDDEN_HEADER.match(line):
            return True
    first, last = part._first, part._last
    header = _HEADER_LINES.match(text, first, last)
    ended = header.end() if header else first
    for found in _HIDDEN_HEADER.finditer(text, first + 1, ended):
        if text[found.start() - 1] == "\r":
            return True
    return bool(_HIDDEN_HEADER.search(text, ended, _end_for_all(text, ended, last)))


def _note_odd_boundaries(text: str, root: Part) -> None:
    """Mark the multiparts in which some readers find other parts than the parser."""
    todo = [part for part in root.walk() if part._seen_multipart or part.limit]
    todo.reverse()
    active: list[Part] = []  # the multiparts that hold the line, from the outermost
    closed: set[int] = set()
    marks: tuple[str, ...] = ()
    for found in dashed_lines(text) if todo else ():
        at = found.start()
        while (todo and todo[-1]._first <= at) or (active and active[-1]._last <= at):
            if active and active[-1]._last <= at:
                active.pop()
                marks = marks[:-1]
            else:
                active.append(todo.pop())
                marks = (*marks, f"--{active[-1].get_boundary()}")
        if found[0].startswith(marks) and not active[-1].limit:
            _note_boundary(text, found, list(zip(active, marks)), closed)


def _note_boundary(
    text: str, at: re.Match[str], active: list[tuple[Part, str]], closed: set[int]
) -> None:
    """Mark a multipart where a line that begins as a boundary is read in two ways."""
    line = at[0]
    rests = ((part, line[len(mark) :]) for part, mark in active if line.startswith(mark))
    found = [(part, rest.rstrip(" \t\r\n")) for part, rest in rests]
    exact = [(part, rest) for part, rest in found if rest in ("", "--")]
    if not exact:
        # RFC 2046, 5.1.1, has readers compare only the beginning
        part = found[-1][0]
        if _begins_part(text, at.end(), active, part):
            part._misread = "ambiguous boundary"
        return
    part, rest = exact[0]
    if line.endswith("\r") or text[at.start() - 1 : at.start()] == "\r":
        part._misread = BESIDE_CR
    elif rest:
        closed.add(id(part))
    elif id(part) in closed and _begins_part(text, at.end(), active, part):
        part._parts_after_end = True


def _begins_part(text: str, at: int, active: list[tuple[Part, str]], multipart: Part) -> bool:
    """Whether a header that matters follows a line; text that resembles a boundary has none."""
    marks = tuple(mark for _, mark in active)
    headers = 2 if multipart.get_content_type() == "multipart/digest" else 1
    for found in _LINE.finditer(text, at, active[-1][0]._last):
        if found[0].startswith(marks):
            return False  # it will be looked at by itself
        if _HIDDEN_HEADER.match(text, found.start()):
            return True
        headers -= _ends_for_all(text, found.start())
        if not headers:
            return False
    return False
