"""The standard library's parser of messages, and all that is used of its private members.

`email.feedparser.FeedParser` decides what the parts of a message are, as it does for every other
program in Python.  What it offers in public gives no places, no bounds, and a list of all lines;
so these members are overridden or called, in this module and nowhere else:

    _input                  the buffer it reads from: push_eof_matcher, pop_eof_matcher, close,
                            readline, unreadline, iteration
    _new_message()          begins a part;  _cur is that part,  _msgstack those it is in
    _pop_message()          ends it
    _parsegen()             parses one part, the parts within it included
    _parse_headers(lines)   takes the lines of its header, once they are all read
    _set_headersonly()      has it stop after the first header

Read in CPython 3.9.18, 3.10.13, 3.11.7, 3.12.1 and 3.13.0.  Their `_parsegen` differ in two things,
neither of which matters here: since 3.11 a multipart without parts is no defect where only headers
are wanted, and 3.13 looks for a separator with `str.startswith` in place of an expression.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from email.feedparser import FeedParser
from typing import Any

from Milter._mime.limits import LimitExceeded, settings

# A `MimeMessage`, which is built on this module.
Part = Any

_LINE_END = re.compile(r"\r\n|\r|\n")
_DASHES = re.compile(r"--[^\r\n]*(?:\r\n|\r|\n)?")


def dashed_lines(text: str, start: int = 0) -> Iterator[re.Match[str]]:
    """The lines that begin with two dashes."""
    for found in _DASHES.finditer(text, start):  # much faster than to look for lines
        at = found.start()
        if not at or text[at - 1] in "\r\n":
            yield found


class Lines:
    """The lines of a message, in the shape of the buffer that FeedParser reads from.

    The parser looks for boundaries in bodies, and joins all other lines of one.  So what lies
    between two lines that might be boundaries is given as if it were one line: a line of its own
    would take 50 bytes, whatever it holds.
    """

    def __init__(self, text: str, deadline: float, headers_only: bool) -> None:
        self._text = text
        self.pos = 0
        """Where the next line begins."""
        self.in_header = True
        self._headers_only = headers_only
        self._header_lines = 0
        self._last: tuple[str, int] = ("", 0)
        self._again = ""
        self._single = 0  # how many lines are to be given one by one
        self._deadline = deadline
        self._matchers: list[tuple[Callable[[str], object], bool]] = []
        self._blank_matchers = 0
        self._boundaries: set[str] = set()
        self._marks: dict[str, int] | None = None
        self._looks = 0

    # -- what the parser calls

    def push_eof_matcher(self, matcher: Callable[[str], object]) -> None:
        """Let the input end before the lines that `matcher` accepts."""
        blank = bool(matcher("\n"))
        self._blank_matchers += blank
        self._matchers.append((matcher, blank))

    def pop_eof_matcher(self) -> None:
        """Forget the matcher pushed last."""
        if self._matchers:
            blank = self._matchers.pop()[1]
            self._blank_matchers -= blank
            if blank:  # the empty line is thrown away, and the one after it looked at
                self._single = 2

    def close(self) -> None:
        """There is no more input to come; there never is."""

    def readline(self) -> str:
        """The next line, in a body also several, '' at the end."""
        if self._again:
            line, self._again = self._again, ""
            return line
        start = self.pos
        text = self._text
        if start >= len(text):
            return ""
        self._look()
        if self.in_header and not self._count_header_line():
            return ""
        one = self.in_header or self._single or self._blank_matchers
        boundary = text[start] == "-" and self._may_be_boundary(start)
        if boundary or self._blank_matchers:
            line = text[start : self._line_end(start)]
            if any(matcher(line) for matcher, _ in self._matchers):
                return ""
        self.pos = self._line_end(start) if one or boundary else self._lines_end(start)
        self._single = 1 if boundary else max(0, self._single - 1)  # it looks at the next one
        line = text[start : self.pos]
        self._last = (line, start)
        return line

    def unreadline(self, line: str) -> None:
        """Let `line` be read next: that of before, or a "From " line at the end of a header."""
        last, start = self._last
        if line is last:
            self.pos = start
        elif self._text.startswith(line, self.pos - len(line)):
            self.pos -= len(line)
        else:  # which the parser takes for the body's first, in place of the empty line
            self._again = line

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")

    # -- what else there is to it

    def drop_eof_matchers(self) -> None:
        """Let the input run to its real end."""
        self._matchers.clear()
        self._blank_matchers = 0
        self._boundaries.clear()

    def expect(self, boundary: str) -> None:
        """A multipart is cut by `boundary`: its lines are given one by one."""
        self._boundaries.add(boundary.rstrip())

    def marks_to_come(self, claimed: list[str]) -> list[str]:
        """Those of the claimed boundaries that begin a part further down."""
        if self._marks is None:
            self._marks = {}
            for found in dashed_lines(self._text):
                if len(found[0]) <= settings.MAX_BOUNDARY + 4:
                    self._marks[found[0][2:].rstrip()] = found.start()
        return [b for b in claimed if self._marks.get(b.rstrip(), -1) >= self.pos]

    def _look(self) -> None:
        self._looks += 1
        if self._headers_only or self._looks & 1023:
            return
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"takes more than {settings.MAX_SECONDS} s to read")

    def _count_header_line(self) -> bool:
        """Whether one more line of a header may be read."""
        self._header_lines += 1
        if self._header_lines <= settings.MAX_HEADER_LINES:
            return True
        if self._headers_only:
            return False
        raise LimitExceeded(f"more than {settings.MAX_HEADER_LINES} lines of headers")

    def _may_be_boundary(self, start: int) -> bool:
        if not self._text.startswith("--", start):
            return False
        return self._is_mark(self._text[start + 2 : self._line_end(start)].rstrip())

    def _is_mark(self, mark: str) -> bool:
        return mark in self._boundaries or (
            mark[-2:] == "--" and mark[:-2].rstrip() in self._boundaries
        )

    def _line_end(self, start: int) -> int:
        found = _LINE_END.search(self._text, start)
        return found.end() if found else len(self._text)

    def _lines_end(self, start: int) -> int:
        """Where the lines end in which no boundary can be; at least one line further."""
        text = self._text
        for found in _DASHES.finditer(text, self._line_end(start)):
            self._look()
            if self._is_mark(found[0][2:].rstrip()) and text[found.start() - 1] in "\r\n":
                return found.start()
        return len(text)


class Parser(FeedParser):
    """The standard parser, which here notes places, counts parts and stops at the bounds."""

    _cur: Any
    _msgstack: list[Any]

    def __init__(self, text: str, root: Part, headers_only: bool = False) -> None:
        self._parts = 0
        self._root = root
        factory: Any = self._make  # called with the policy, which typeshed does not know
        super().__init__(_factory=factory)
        self._lines = Lines(text, time.monotonic() + settings.MAX_SECONDS, headers_only)
        self._input: Any = self._lines
        if headers_only:
            self._set_headersonly()  # type: ignore[attr-defined]

    def _make(self, policy: object) -> Part:
        return self._root._blank() if self._parts > 1 else self._root

    def _new_message(self) -> None:
        self._parts += 1
        super()._new_message()  # type: ignore[misc]
        self._cur._first = self._lines.pos
        self._cur._reading = self._lines
        self._lines.in_header = True

    def _parse_headers(self, lines: list[str]) -> None:
        self._lines.in_header = False
        super()._parse_headers(lines)  # type: ignore[misc]

    def _pop_message(self) -> Any:
        message = super()._pop_message()  # type: ignore[misc]
        message._last = self._lines.pos
        return message

    def _parsegen(self) -> Iterator[Any]:
        if self._parts >= settings.MAX_PARTS:
            return self._opaque(f"more than {settings.MAX_PARTS} parts", to_the_end=True)
        if len(self._msgstack) >= settings.MAX_DEPTH:
            return self._opaque(
                f"more than {settings.MAX_DEPTH} levels of nesting", to_the_end=False
            )
        parse: Iterator[Any] = super()._parsegen()  # type: ignore[misc]
        return parse

    def _opaque(self, limit: str, to_the_end: bool) -> Iterator[Any]:
        """Take what comes as one part that nobody looks into."""
        self._new_message()
        self._lines.in_header = False
        if to_the_end:
            self._lines.drop_eof_matchers()
        self._cur._payload = "".join(self._lines)
        self._cur.limit = limit
        yield from ()
