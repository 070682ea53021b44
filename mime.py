"""MIME messages that can be taken apart, made harmless and written back byte for byte.

`message_from_file` reads a message into a tree of `MimeMessage`, which are the standard library's
`email.message.Message` with a memory: what nobody changed is written back exactly as it came in,
down to the last byte, and the other parts around it too.

>>> import io
>>> raw = b'Subject:  odd   spacing\\r\\n\\tkept\\nContent-type:text/plain\\n\\nHi\\r\\n'
>>> msg = message_from_file(io.BytesIO(raw))
>>> msg.as_bytes() == raw, msg.ismodified()
(True, False)

`defang` replaces attachments with dangerous names by a warning and takes the scripts out of HTML.
`check_name`, `check_html` and `check_attachments` are its steps, for filters that want their own.

The input is hostile.  Everything here takes linear time (up to the nesting depth), and these
bounds hold; a part that exceeds one counts as dangerous, is replaced by a warning that says which,
and is logged to the logger ``mime``.  Assign to the names to change them.

=================== ========= ===================================================================
`MAX_DEPTH`         50        messages and multiparts within each other
`MAX_PARTS`         10,000    parts of one message
`MAX_PARAMETERS`    1,000     parameters in the Content-Type or Content-Disposition of a part
`MAX_NAME_TEXT`     65,536    characters in all Content-Types and Content-Dispositions of a part,
                              and in one name
`MAX_BOUNDARY`      1,000     characters in a boundary (RFC 2046 allows 70)
`MAX_SECONDS`       30.0      time to read, or to check, one message
`MAX_UNPACKED`      100 MiB   bytes unpacked from the archives of one message
`MAX_ZIP_DEPTH`     5         zips within each other
`MAX_ZIP_NAMES`     10,000    names in one zip
`MAX_ZIP_NAME`      4,096     bytes, or characters, in one of these names
`MAX_ZIP_EXTRA`     4 MiB     extra fields in the directory of one zip
=================== ========= ===================================================================

Memory has no bound of its own, it goes with the size of the message: to read and check one takes 6
to 9 bytes for each byte of ordinary mail, and up to 50 for hostile mail, such as lines of one
character, or base64 of single bytes.  Have the MTA refuse what is too large for that times the
messages that come at once (Postfix: ``message_size_limit``), or count in the body callback.

Charsets are those that Python brings along and the names in ``encodings.aliases``: a codec of your
own needs an entry there.  Mail may name no other, as Python keeps every name it is asked for.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import email.utils
import html
import io
import itertools
import logging
import re
import socket
import time
import unicodedata
import urllib.parse
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from email.feedparser import FeedParser
from email.generator import BytesGenerator
from email.message import Message
from typing import Any, BinaryIO, Protocol, TypeVar

from Milter.sgmllib import SGMLParser, iter_attributes
from Milter.utils import _charset

__all__ = [
    "HTMLScriptFilter",
    "MimeGenerator",
    "MimeMessage",
    "SGMLFilter",
    "bad_extensions",
    "check_attachments",
    "check_ext",
    "check_html",
    "check_name",
    "defang",
    "message_from_file",
    "unquote",
    "virus_msg",
    "zipnames",
]

MAX_DEPTH = 50
MAX_PARTS = 10_000
MAX_PARAMETERS = 1_000
MAX_NAME_TEXT = 65_536
MAX_BOUNDARY = 1_000
MAX_SECONDS = 30.0
MAX_UNPACKED = 100 * 1024 * 1024
MAX_ZIP_DEPTH = 5
MAX_ZIP_NAMES = 10_000
MAX_ZIP_NAME = 4_096
MAX_ZIP_EXTRA = 4 * 1024 * 1024

bad_extensions = [
    *(".ade", ".adp", ".asd", ".asx", ".asp", ".bas", ".bat", ".chm", ".cmd", ".com", ".cpl"),
    *(".crt", ".dll", ".exe", ".gadget", ".hlp", ".hta", ".inf", ".ins", ".isp", ".jar", ".js"),
    *(".jse", ".lnk", ".mdb", ".mde", ".msc", ".msh", ".msi", ".msp", ".mst", ".ocx", ".pcd"),
    *(".pif", ".ps1", ".reg", ".scf", ".scr", ".sct", ".shb", ".shs", ".url", ".vb", ".vbe"),
    *(".vbs", ".vxd", ".wsc", ".wsf", ".wsh", ".xll"),
]
"""Extensions of files that a mail reader might execute, with the dot; change it in place."""

virus_msg = (
    "This message appeared to contain a virus.\n"
    "It was originally named '%s', and has been removed.\n"
    "A copy of your original message was saved as '%s:%s'.\n"
    "See your administrator.\n"
)
"""What stands in for a removed part, % (bad name, host name, name of the saved copy)."""

# SMFIS_CONTINUE of libmilter's mfapi.h, as milter.CONTINUE; written out so that reading mail
# needs no milter connection.
_CONTINUE = 0

_log = logging.getLogger("mime")
_T = TypeVar("_T")


class LimitExceeded(Exception):
    """Something in the message goes past one of the bounds; the text says which."""


class _ZipLimit(zipfile.BadZipFile, LimitExceeded):
    """An archive goes past a bound, or hides what it holds."""


class _Budget:
    """The time and the unpacked bytes that one check of one message may use."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._bytes = MAX_UNPACKED
        self._boundaries: dict[MimeMessage, _Boundaries] = {}

    def check_time(self) -> None:
        """Raise LimitExceeded where the time is up."""
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"takes more than {MAX_SECONDS} s to check")

    def timed(self, items: Iterable[_T]) -> Iterator[_T]:
        """The same items, with a look at the time now and then."""
        for count, item in enumerate(items, 1):
            yield item
            if not count % 64:
                self.check_time()

    def boundaries(self, root: MimeMessage) -> _Boundaries:
        """The boundaries of all multiparts of a message; looked for once."""
        known = self._boundaries.get(root)
        if known is None:
            found = (part.get_boundary() for part in root.walk() if part.is_multipart())
            known = _Boundaries({_as_bytes(b) for b in found if isinstance(b, str)})
            self._boundaries[root] = known
        return known

    def unpack(self, size: int) -> None:
        """Account for `size` unpacked bytes; raise where they are too many."""
        self._bytes -= size
        if self._bytes < 0:
            raise _ZipLimit(f"unpacks to more than {MAX_UNPACKED} bytes")
        self.check_time()


# -- header fields


_EOL = re.compile(r"\r\n|\r|\n")
_RFC2231_NAME = re.compile(r"([^*]*)(?:\*([0-9]*))?(\*)?\Z")
_WORD = re.compile(r"=\?([^?]*)\?([bBqQ])\?([^?]*)\?=")
# as some readers have it: with ? in the text, and also without an end
_LOOSE_WORD = re.compile(r"=\?([^?]*)\?([bBqQ])\?(.*?)(?:\?=|\Z)", re.DOTALL)
_WORD_GAP = re.compile(r"\?=\s+(?==\?)")
_LOOSE_NAME = re.compile(r'name\*?[0-9]{0,4}\*?\s*=\s*"?([^";\r\n]+)', re.IGNORECASE)
_COMMENT = re.compile(r"\([^()]*\)")
_INTERNAL_PARAMETERS = {
    *("boundary", "charset", "creation-date", "delsp", "format", "micalg", "modification-date"),
    *("protocol", "read-date", "report-type", "size", "start", "start-info", "type"),
}


def unquote(s: str) -> str:
    r"""Text without the quotes or angle brackets around it, and without its backslashes.

    >>> unquote('"a \\"b\\""'), unquote('<c@d>'), unquote('"half')
    ('a "b"', 'c@d', '"half')
    """
    if len(s) > 1:
        if s[0] == s[-1] == '"':
            return re.sub(r"\\(.)", r"\1", s[1:-1], flags=re.DOTALL)
        if s[0] == "<" and s[-1] == ">":
            return s[1:-1]
    return s


def _parseparam(s: object) -> list[str]:
    """Cut a structured header at the semicolons outside of quotes, in linear time.

    >>> _parseparam('text/plain; Name="a;b"; x = y')
    ['text/plain', 'name="a;b"', 'x=y']
    """
    params = []
    for piece in _split_parameters(str(s)):
        name, equals, value = piece.partition("=")
        params.append(f"{name.strip().lower()}={value.strip()}" if equals else piece.strip())
    return params


def _split_parameters(s: str) -> Iterator[str]:
    start = pos = 0
    size = len(s)
    token = _QUOTED_OR_SEMICOLON
    while pos < size:
        found = token.search(s, pos)
        if found is None:
            break
        pos = found.end()
        if found.group() == ";":
            yield s[start : pos - 1]
            start = pos
    yield s[start:]


_QUOTED_OR_SEMICOLON = re.compile(r';|"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_QUOTED_OR_COMMENT = re.compile(r'\(|"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_QUOTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
# always finds what it began to read, or a search would begin anew at every quote
_QUOTED_TO_THE_END = re.compile(_QUOTED.pattern + "?", re.DOTALL)
_IN_COMMENT = re.compile(r"\\.|[()]", re.DOTALL)


def _without_comments(text: str) -> str:
    r"""A structured header without RFC 5322's comments, which nest; in linear time.

    >>> _without_comments(r'a (b (c) "d \) e) f="(g)" (h'), _without_comments('(i)')
    ('a  f="(g)" ', '')
    """
    kept: list[str] = []
    pos = 0
    while True:
        found = _QUOTED_OR_COMMENT.search(text, pos)
        if found is None:
            return "".join([*kept, text[pos:]])
        if found.group() != "(":
            kept.append(text[pos : found.end()])
            pos = found.end()
            continue
        kept.append(text[pos : found.start()])
        pos = found.end()
        depth = 1
        while depth:
            token = _IN_COMMENT.search(text, pos)
            if token is None:  # never closed
                return "".join(kept)
            depth += {"(": 1, ")": -1}.get(token.group(), 0)
            pos = token.end()


def _readings(text: str) -> list[str]:
    """The texts that readers might take for a structured header: they disagree on comments,
    and on backslashes.
    """
    texts = [text, text.replace("\\", "")] if "\\" in text else [text]
    if "(" in text:
        texts += [_without_comments(reading) for reading in texts]
    return list(dict.fromkeys(texts))


def _value_beginnings(value: str) -> Iterator[str]:
    """What a reader might take for a parameter's value that stops before the end of `value`."""
    quoted = _QUOTED_TO_THE_END.search(value)
    if quoted and quoted.group() != value:
        yield unquote(quoted.group())
    token = _TOKEN.match(value)
    if token and token.group() != value:
        yield token.group()


_TOKEN = re.compile(r'[^\s()"]+')


def _to_text(data: bytes, charset: str = "utf-8") -> str:
    """Bytes as text under whatever name of a charset the mail gives; never fails."""
    for name in (charset, "utf-8"):
        try:
            return str(data, _charset(name))
        except (LookupError, ValueError):  # unknown, no text encoding, or it does not fit
            continue
    return data.decode("latin-1")


def _readable(value: object) -> str:
    """A raw header value as text: bytes that stand as surrogates are decoded."""
    text = str(value)
    try:
        text.encode("ascii")
    except UnicodeEncodeError:
        return _to_text(text.encode("utf-8", "surrogateescape"))
    return text


def _decode_words(text: str, pattern: re.Pattern[str] = _WORD) -> str:
    """Decode the RFC 2047 words in `text`, wherever they stand."""

    def word(match: re.Match[str]) -> str:
        charset, kind, content = match.groups()
        data = content.encode("utf-8", "replace")
        data = _decode_base64(data) if kind in "bB" else binascii.a2b_qp(data, header=True)
        return _to_text(data, charset.partition("*")[0][:100].strip())

    return pattern.sub(word, _WORD_GAP.sub("?=", text))


def _collapse(value: Any) -> str:
    """A parameter's value as text, RFC 2231's (charset, language, text) decoded."""
    if isinstance(value, tuple):
        charset, _, text = value
        data = str(text).encode("latin-1", "replace")
        return _to_text(data, charset or "us-ascii")
    return str(value)


def _name_variants(value: str, extended: bool) -> Iterator[str]:
    """The texts that a reader might make of the value of a name parameter."""
    yield from _value_variants(value, extended)
    for beginning in _value_beginnings(value):
        yield from _value_variants(beginning, extended)


def _value_variants(value: str, extended: bool) -> Iterator[str]:
    plain = unquote(value)
    if extended:
        charset, first, rest = plain.partition("'")
        _, second, encoded = rest.partition("'")
        decoded = [_to_text(urllib.parse.unquote_to_bytes(plain))]
        if first and second:
            decoded.insert(0, _to_text(urllib.parse.unquote_to_bytes(encoded), charset))
        for text in decoded:
            yield text
            if "=?" in text:
                yield _decode_words(_EOL.sub("", text))
    yield plain
    loose = _EOL.sub("", plain)
    if loose != plain:
        yield loose
    bare = loose.strip(" \t\"'<>")
    if bare != plain:
        yield bare
    if "=?" in loose:
        yield _decode_words(loose)
        yield _decode_words(loose, _LOOSE_WORD)
    if "(" in loose and not value.startswith('"'):
        yield _COMMENT.sub("", loose).strip()


_Segment = tuple[float, str, bool]


def _segment_orders(found: list[_Segment]) -> Iterator[list[_Segment]]:
    """The ways in which readers put RFC 2231's segments of a value together."""
    ordered = sorted(found, key=lambda segment: segment[0])
    yield ordered
    yield found
    for segments in (ordered, ordered[::-1]):  # the last of one number counts, or the first
        unique = sorted({s[0]: s for s in segments}.values(), key=lambda segment: segment[0])
        yield unique
        # many stop at the first number that is missing
        yield [s for n, s in enumerate(unique) if s[0] == unique[0][0] + n]


def _header_names(text: str, internal: bool = False) -> Iterator[tuple[str, str]]:
    """(parameter, value) for everything in a header that might be taken as a file's name.

    `internal`: parameters with another purpose too.
    """
    for reading in _readings(text):
        yield from _reading_names(reading, internal)


def _reading_names(text: str, internal: bool) -> Iterator[tuple[str, str]]:
    segments: dict[str, list[_Segment]] = {}
    for count, piece in enumerate(_split_parameters(text)):
        if count > MAX_PARAMETERS:
            return
        label, equals, value = piece.partition("=")
        if not equals:
            continue
        match = _RFC2231_NAME.match(label.strip().lower())
        name = match.group(1) if match else label.strip().lower()
        if name in _INTERNAL_PARAMETERS and not internal:
            if not _QUOTED.fullmatch(value.strip()):  # another one may follow, without semicolon
                for loose in _LOOSE_NAME.finditer(value):
                    yield "name", loose.group(1).strip()
            continue
        extended = bool(match and (match.group(3) or match.group(2) == ""))
        if match and match.group(2):
            digits = match.group(2)[:9]
            # one with a leading zero counts for some readers, for others it is a gap
            number = int(digits) + 0.5 * (digits[0] == "0" and digits != "0")
            segments.setdefault(name, []).append((number, unquote(value.strip()), extended))
        for variant in _name_variants(value.strip(), extended):
            yield name, variant
    for name, found in segments.items():
        for order in _segment_orders(found):
            joined = "".join(text for _, text, _ in order)
            for variant in _name_variants(joined, any(s[2] for s in order)):
                yield name, variant
    if text.count('"') % 2:
        for loose in _LOOSE_NAME.finditer(text):
            yield "name", loose.group(1).strip()


# -- reading


class _Source:
    """The bytes that a tree of messages was read from, and where each part lies in them."""

    def __init__(self, raw: bytes, reread: dict[int, str]) -> None:
        self.raw = raw
        self.reread = reread
        self._placed = False

    def place(self, root: MimeMessage) -> None:
        """Give every part that was read its place, from the lines the parser counted."""
        if self._placed:
            return
        self._placed = True
        offsets = [0]
        for line in io.StringIO(_as_str(self.raw), newline=""):
            offsets.append(offsets[-1] + len(line))
        todo = [(root, len(self.raw))]
        while todo:
            part, end = todo.pop()
            # a part that begins with a line read twice begins after the empty line
            first = part._first_line + (part._first_line in self.reread)
            part._span = (offsets[first], end)
            children = part._seen_payload if isinstance(part._seen_payload, tuple) else ()
            delimited = part._seen_multipart
            for child in children:
                stop = min(offsets[child._last_line], end)
                if delimited and stop < end:
                    # RFC 2046, 5.1.1: the line end before a boundary belongs to the boundary
                    stop -= self._eol_before(stop, offsets[child._first_line])
                todo.append((child, stop))

    def _eol_before(self, stop: int, start: int) -> int:
        tail = self.raw[max(start, stop - 2) : stop]
        return 2 if tail == b"\r\n" else int(tail[-1:] in (b"\r", b"\n"))


def _as_str(raw: bytes) -> str:
    return raw.decode("ascii", "surrogateescape")


def _as_bytes(text: str) -> bytes:
    try:
        return text.encode("ascii", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


class _Lines:
    """The lines of a message, in the shape of the buffer that FeedParser reads from.

    It knows which line comes next, and looks for boundaries only where one can be.
    """

    def __init__(self, text: str, deadline: float) -> None:
        self._lines = io.StringIO(text, newline="").readlines()
        self.next = 0
        self.reread: dict[int, str] = {}
        self._deadline = deadline
        self._matchers: list[tuple[Callable[[str], object], bool]] = []
        self._blank_matchers = 0
        self._looks = 0

    def push_eof_matcher(self, matcher: Callable[[str], object]) -> None:
        """Let the input end before the lines that `matcher` accepts."""
        blank = bool(matcher("\n"))
        self._blank_matchers += blank
        self._matchers.append((matcher, blank))

    def pop_eof_matcher(self) -> None:
        """Forget the matcher pushed last."""
        if self._matchers:
            self._blank_matchers -= self._matchers.pop()[1]

    def drop_eof_matchers(self) -> None:
        """Let the input run to its real end."""
        self._matchers.clear()
        self._blank_matchers = 0

    def close(self) -> None:
        """There is no more input to come; there never is."""

    def readline(self) -> str:
        """The next line, '' at the end."""
        try:
            line = self._lines[self.next]
        except IndexError:
            return ""
        if self._matchers and (line[0] == "-" or self._blank_matchers):
            self._looks += 1
            if not self._looks & 1023 and time.monotonic() > self._deadline:
                raise LimitExceeded(f"takes more than {MAX_SECONDS} s to read")
            for matcher, _ in self._matchers:
                if matcher(line):
                    return ""
        self.next += 1
        return line

    def unreadline(self, line: str) -> None:
        """Let `line` be read next: one step back, or an older line in place of the last one."""
        if self.next and self._lines[self.next - 1] is line:
            self.next -= 1
        elif line:  # a "From " line at the end of the headers, which the parser takes for body:
            # it stands where the empty line was, as the lines after it must keep their numbers
            self.next -= 1
            self.reread.setdefault(self.next, self._lines[self.next])
            self._lines[self.next] = line

    def original(self) -> list[str]:
        """All lines as they were before reading."""
        for number, line in self.reread.items():
            self._lines[number] = line
        return self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")


class _Parser(FeedParser):
    """The standard parser, which here counts lines and parts and stops at the bounds."""

    _cur: Any
    _msgstack: list[Any]

    def __init__(self, text: str, root: MimeMessage, headers_only: bool = False) -> None:
        self._parts = 0
        self._root = root
        factory: Any = self._make  # called with the policy, which typeshed does not know
        super().__init__(_factory=factory)
        self._lines = _Lines(text, time.monotonic() + MAX_SECONDS)
        self._input: Any = self._lines
        if headers_only:
            self._set_headersonly()  # type: ignore[attr-defined]

    @property
    def lines(self) -> _Lines:
        """What is read."""
        return self._lines

    def _make(self, policy: object) -> MimeMessage:
        return MimeMessage() if self._parts > 1 else self._root

    def _new_message(self) -> None:
        self._parts += 1
        super()._new_message()  # type: ignore[misc]
        self._cur._first_line = self._lines.next

    def _pop_message(self) -> Any:
        message = super()._pop_message()  # type: ignore[misc]
        message._last_line = self._lines.next
        return message

    def _parsegen(self) -> Iterator[Any]:
        if self._parts >= MAX_PARTS:
            return self._opaque(f"more than {MAX_PARTS} parts", to_the_end=True)
        if len(self._msgstack) >= MAX_DEPTH:
            return self._opaque(f"more than {MAX_DEPTH} levels of nesting", to_the_end=False)
        parse: Iterator[Any] = super()._parsegen()  # type: ignore[misc]
        return parse

    def _opaque(self, limit: str, to_the_end: bool) -> Iterator[Any]:
        """Take what comes as one part that nobody looks into."""
        self._new_message()
        if to_the_end:
            self._lines.drop_eof_matchers()
        self._cur._payload = "".join(self._lines)
        self._cur.limit = limit
        yield from ()


def message_from_file(fp: BinaryIO) -> MimeMessage:
    """Read a message from a binary file, up to its end.

    It never fails on what the message holds: what cannot be parsed is one opaque part.
    """
    return MimeMessage(fp)


def _parse(raw: bytes, root: MimeMessage) -> None:
    text = _as_str(raw)
    pristine = dict(root.__dict__)
    parser = _Parser(text, root)
    try:
        parser.close()
    except Exception as exc:  # noqa: BLE001  # hostile mail must not stop the filter, whatever
        # part of the standard library it trips over
        limit = str(exc) if isinstance(exc, LimitExceeded) else f"cannot be parsed: {exc!r}"
        _log.warning("message: %s", limit)
        root.__dict__.clear()
        root.__dict__.update(pristine, _headers=[], defects=[])
        try:
            _Parser(text, root, headers_only=True).close()
        except Exception:  # noqa: BLE001  # as above
            _log.warning("headers cannot be parsed", exc_info=True)
            root._headers, root._payload = [], text
        root.limit = limit
        root._last_line = 0
    source = _Source(raw, parser.lines.reread)
    for part in root.walk():
        part._settle(source, root)
    if not root.limit:
        lines = parser.lines.original()
        blocks: set[int] = set()  # of delivery reports, which are text for every reader
        for part in root.walk():
            if part.get_content_type() == "message/delivery-status" and part.is_multipart():
                blocks.update(map(id, part._payload[1:]))
            if id(part) not in blocks and _header_ends_early(lines, part):
                part._misread = "header that ends early"
        _note_odd_boundaries(lines, root)


# Readers disagree on where a line ends, on what a header may hold, and on what a boundary is.
# The functions below find where the parser may have missed a part, or the header of one, that
# others see.

_HIDDEN_HEADER = re.compile(
    r"[ \t]*content-(?:type|disposition|transfer-encoding)\s*(?::|\Z)", re.IGNORECASE
)


def _ends_header(lines: list[str], number: int) -> bool:
    """Whether the line is an empty one also where a lone CR ends no line."""
    before = lines[number - 1] if number else "\n"
    return lines[number] in ("\n", "\r\n") and before.endswith("\n")


def _header_ends_early(lines: list[str], part: MimeMessage) -> bool:
    """Whether some readers find a header that matters where the parser found none.

    Blanks before the colon, lines that are no header and lone CRs end the header for the
    parser, while others go on; and a lone CR begins a line only for the parser.
    """
    for defect in part.defects:
        line = getattr(defect, "line", None)  # a continuation of nothing
        if isinstance(line, str) and _HIDDEN_HEADER.match(line):
            return True
    number, last = part._first_line, part._last_line
    while number < last and _HEADER_LINE.match(lines[number]):
        number += 1
        after_cr = lines[number - 1].endswith("\r") and number < last
        if after_cr and _HIDDEN_HEADER.match(lines[number]):
            return True
    while number < last and not _ends_header(lines, number):
        if _HIDDEN_HEADER.match(lines[number]):
            return True
        number += 1
    return False


def _note_odd_boundaries(lines: list[str], root: MimeMessage) -> None:
    """Mark the multiparts in which some readers find other parts than the parser."""
    todo = [part for part in root.walk() if part._seen_multipart or part.limit]
    todo.reverse()
    active: list[MimeMessage] = []  # the multiparts that hold the line, from the outermost
    closed: set[int] = set()
    marks: tuple[str, ...] = ()
    for number, line in enumerate(lines if todo else ()):
        if not line.startswith("--"):
            continue
        while (todo and todo[-1]._first_line <= number) or (
            active and active[-1]._last_line <= number
        ):
            if active and active[-1]._last_line <= number:
                active.pop()
                marks = marks[:-1]
            else:
                active.append(todo.pop())
                marks = (*marks, f"--{active[-1].get_boundary()}")
        if line.startswith(marks) and not active[-1].limit:
            _note_boundary(lines, number, list(zip(active, marks)), closed)


def _note_boundary(
    lines: list[str], number: int, active: list[tuple[MimeMessage, str]], closed: set[int]
) -> None:
    """Mark a multipart where a line that begins as a boundary is read in two ways."""
    line = lines[number]
    rests = ((part, line[len(mark) :]) for part, mark in active if line.startswith(mark))
    found = [(part, rest.rstrip(" \t\r\n")) for part, rest in rests]
    exact = [(part, rest) for part, rest in found if rest in ("", "--")]
    if not exact:
        # RFC 2046, 5.1.1, has readers compare only the beginning
        part = found[-1][0]
        if _begins_part(lines, number, active, part):
            part._misread = "ambiguous boundary"
        return
    part, rest = exact[0]
    if line.endswith("\r") or lines[number - 1].endswith("\r"):
        part._misread = "boundary beside a lone CR"
    elif rest:
        closed.add(id(part))
    elif id(part) in closed and _begins_part(lines, number, active, part):
        part._parts_after_end = True


def _begins_part(
    lines: list[str], number: int, active: list[tuple[MimeMessage, str]], multipart: MimeMessage
) -> bool:
    """Whether a header that matters follows a line; text that resembles a boundary has none."""
    marks = tuple(mark for _, mark in active)
    headers = 2 if multipart.get_content_type() == "multipart/digest" else 1
    for following in range(number + 1, min(active[-1][0]._last_line, len(lines))):
        line = lines[following]
        if line.startswith(marks):
            return False  # it will be looked at by itself
        if _HIDDEN_HEADER.match(line):
            return True
        headers -= _ends_header(lines, following)
        if not headers:
            return False
    return False


# -- messages


_HEADER_LINE = re.compile(r"(From |[\041-\071\073-\176]*:|[\t ])")
_HIDDEN_PARTS = re.compile(
    r"(?:\A|[\r\n])content-(?:type|disposition|transfer-encoding)[ \t]*:", re.IGNORECASE
)
_MEDIA_TYPE = re.compile(r"[\s\"'<]*([^\s\"'<>;,/()]+)\s*/\s*([^\s\"'<>;,/()]+)")
_UUENCODED = re.compile(
    r"(?:\A|[\r\n])begin(-base64)? +[0-7]{3,4} +([^ \r\n][^\r\n]*)(?:\r\n|\r|\n)"
    # the first line of data: blanks stand for zeros as ` does
    r"(?(1)[A-Za-z0-9+/=]{4,100}[ \t]*|[ -`]{1,86})(?=[\r\n]|\Z)"
)


class MimeMessage(Message):
    """A message, or a part of one, that knows whether it was modified.

    `fp`: a binary file to read the message from; without one the message is empty.
    `seekable` is accepted for compatibility and changes nothing.

    Attributes beside those of `email.message.Message`:

    ``headerchange``
        called as ``headerchange(msg, name, value)`` when a header is set, and with None as the
        value when one is deleted; None where nobody wants to know.
    ``limit``
        which bound the parser met in this part (text), or None.
    """

    _headers: list[Any]
    _payload: Any

    def __init__(self, fp: BinaryIO | None = None, seekable: int = 1) -> None:
        super().__init__()
        self.headerchange: Callable[[MimeMessage, str, Any], object] | None = None
        self.limit: str | None = None
        self._forced = False
        self._misread: str | None = None
        self._parts_after_end = False
        self._source: _Source | None = None
        self._root: MimeMessage = self
        self._first_line = self._last_line = 0
        self._span = (0, 0)
        self._remember()
        if fp is not None:
            data: Any = fp.read()
            _parse(_as_bytes(data) if isinstance(data, str) else bytes(data), self)

    # -- what was modified

    def _settle(self, source: _Source, root: MimeMessage) -> None:
        """The part is read: what it is like now is unmodified."""
        self._source = source
        self._root = root
        self._remember()

    def _remember(self) -> None:
        payload = self._payload
        self._seen_headers = self._headers[:]
        self._seen_payload = tuple(payload) if isinstance(payload, list) else payload
        self._seen_rest = (self.preamble, self.epilogue, self.get_unixfrom())
        self._forced = False
        self._seen_multipart = (
            isinstance(payload, list) and self.get_content_maintype() == "multipart"
        )

    def _same_body(self) -> bool:
        """Whether the body, the parts within aside, is the one that was read."""
        payload = self._payload
        seen = self._seen_payload
        if isinstance(payload, list):
            if not isinstance(seen, tuple) or len(payload) != len(seen):
                return False
            same = all(a is b for a, b in zip(payload, seen))
        else:
            same = payload is seen
        return same and self._seen_rest == (self.preamble, self.epilogue, self.get_unixfrom())

    @property
    def modified(self) -> bool:
        """Whether this part itself was modified; set it to have it written anew."""
        return self._forced or self._headers != self._seen_headers or not self._same_body()

    @modified.setter
    def modified(self, value: bool) -> None:
        self._forced = bool(value)

    def ismodified(self) -> bool:
        """Whether this part or any part within it was modified."""
        return any(not isinstance(part, MimeMessage) or part.modified for part in self.walk())

    def _tell(self, name: str, value: Any) -> None:
        if self.headerchange is not None:
            self.headerchange(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        """Add a header; the ones of the same name stay."""
        super().__setitem__(name, value)
        self._tell(name, value)

    def __delitem__(self, name: str) -> None:
        """Delete all headers of that name; no error where there are none."""
        super().__delitem__(name)
        self._tell(name, None)

    def replace_header(self, _name: str, _value: Any) -> None:
        """Give the first header of that name another value; KeyError where there is none."""
        super().replace_header(_name, _value)
        self._tell(_name, _value)

    # -- reading headers and content

    def _get_params_preserve(self, failobj: Any, header: str) -> Any:
        """The standard method, without its quadratic time and its failures on odd values."""
        value = self.get(header)
        if value is None:
            return failobj
        params = []
        for piece in _parseparam(value)[: MAX_PARAMETERS + 1]:
            name, _, text = piece.partition("=")
            match = _RFC2231_NAME.match(name)
            if match and match.group(2) and len(match.group(2)) > 4:
                continue  # no sender writes ten thousand continuations
            params.append((name.strip(), text.strip()))
        try:
            return email.utils.decode_params(params)
        except (ValueError, LookupError, TypeError):  # what it cannot decode stays as it is
            return params

    def get_param(
        self,
        param: str,
        failobj: Any = None,
        header: str = "content-type",
        unquote: bool = True,
    ) -> Any:
        """The value of a parameter, `failobj` where there is none.

        As in the standard library: text, or (charset, language, text) for one in RFC 2231's
        form.
        """
        for name, value in self._get_params_preserve([], header):
            if name.lower() == param.lower():
                return _unquote_value(value) if unquote else value
        return failobj

    def get_boundary(self, failobj: Any = None) -> Any:
        """The boundary of a multipart, also where it was quoted twice.

        One longer than `MAX_BOUNDARY` is none.
        """
        value = self.get_param("boundary")
        if value is None:
            return failobj
        boundary = _collapse(value).rstrip()
        stripped = boundary.strip('"')
        boundary = stripped or boundary
        return failobj if len(boundary) > MAX_BOUNDARY or not boundary else boundary

    def get_filename(self, failobj: Any = None) -> Any:
        """The file's name: Content-Disposition's filename, or else Content-Type's name."""
        for param, header in (("filename", "content-disposition"), ("name", "content-type")):
            value = self.get_param(param, None, header)
            if value is not None:
                return _collapse(value).strip()
        return failobj

    def get_content_charset(self, failobj: Any = None) -> Any:
        """The charset parameter in lower case, `failobj` where there is none of use."""
        value = self.get_param("charset")
        if value is None:
            return failobj
        charset = _without_comments(_collapse(value)).strip().lower()
        charset = next(_value_beginnings(charset), unquote(charset))
        return charset if charset.isascii() else failobj

    def get_payload(self, i: int | None = None, decode: bool = False) -> Any:
        """The payload, as in the standard library, also under charsets that do not exist."""
        payload = self._payload
        if i is None and not decode and isinstance(payload, str) and not payload.isascii():
            data = _as_bytes(payload)
            try:
                return data.decode(_charset(self.get_content_charset("ascii")), "replace")
            except (LookupError, ValueError):
                return data.decode("ascii", "replace")
        return super().get_payload(i, decode)  # type: ignore[call-overload]

    def get_payload_decoded(self) -> bytes:
        """The content as bytes, the transfer encoding undone; empty for a multipart."""
        if self.is_multipart() or self._payload is None:
            return b""
        return _decode(_as_bytes(str(self._payload)), self._encodings()[0])

    def _encodings(self) -> list[str]:
        """The transfer encodings that a reader might apply; more than one only by foul play.

        Of the names that `_decode` treats alike only the first, so they are few.
        """
        found: dict[str, str] = {}
        values = map(_readings, self._raw_values("content-transfer-encoding"))
        for value in itertools.chain.from_iterable(values):
            match = re.match(r"[^A-Za-z0-9]*([A-Za-z0-9-]*)", value)
            name = match.group(1).lower() if match else ""
            found.setdefault(_CODINGS.get(name, ""), name)
        return list(found.values()) or [""]

    def _charsets(self) -> list[str]:
        """The charsets that a reader might take; the first is that of `get_content_charset`."""
        found = [self.get_content_charset("")]
        values = (_readings(v[:MAX_NAME_TEXT]) for v in self._raw_values("content-type"))
        for value in itertools.chain.from_iterable(values):
            for piece in list(_split_parameters(value))[: MAX_PARAMETERS + 1]:
                label, equals, text = piece.partition("=")
                if equals and label.strip().lower().startswith("charset"):
                    found.extend(_name_variants(text.strip(), "*" in label))
        return list(dict.fromkeys(found))

    def _media_types(self) -> list[str]:
        """The media types that a reader might see, the one that the parser went by first."""
        found = [self.get_content_type()]
        for value in self._raw_values("content-type"):
            for match in map(_MEDIA_TYPE.match, _readings(value)):
                if match:
                    found.append(f"{match.group(1)}/{match.group(2)}".lower())
        return found

    def _raw_values(self, name: str) -> list[str]:
        """All values of a header, as text."""
        return [_readable(v) for k, v in self.raw_items() if k.lower() == name]

    def getencoding(self) -> str | None:
        """The transfer encoding as the header has it, None where there is no header."""
        value = self.get("content-transfer-encoding")
        return None if value is None else str(value)

    def getname(self) -> str | None:
        """The name parameter of the Content-Type, None where there is none."""
        value = self.get_param("name")
        return None if value is None else _collapse(value)

    def getparams(self) -> list[tuple[str, Any]]:
        """The Content-Type's parameters; the first is the type itself, with an empty value."""
        return list(self.get_params([]))

    def decode(self, filt: Any) -> str | None:
        """Write the decoded content to `filt`, a binary file; returns `getencoding`'s value."""
        if hasattr(filt, "write"):
            filt.write(self.get_payload_decoded())
        return self.getencoding()

    def get_submsg(self) -> Any:
        """The message inside of a ``message/rfc822`` part, None for any other part."""
        if self.get_content_maintype() == "message" and isinstance(self._payload, list):
            return self._payload[0] if self._payload else None
        return None

    def getnames(self, scan_zip: bool = False) -> list[tuple[str, str]]:
        """Every (parameter, name) that a reader might take as the name of the file.

        From all Content-Type and Content-Disposition headers, in every way that their text can
        be read (RFC 2231, RFC 2047, broken quotes), from files uuencoded into text, and with
        `scan_zip` from inside of zips.  Raises zipfile.BadZipFile for a zip that cannot be
        read or exceeds a bound.
        """
        return self._getnames(scan_zip, _Budget())

    def _getnames(self, scan_zip: bool, budget: _Budget) -> list[tuple[str, str]]:
        names: dict[tuple[str, str], None] = {}
        room = MAX_NAME_TEXT
        for header in ("content-type", "content-disposition"):
            for text in self._raw_values(header):
                names.update(dict.fromkeys(_header_names(text[:room])))
                room = max(0, room - len(text))
        filename = self.get_filename()
        if filename:
            names["filename", filename] = None
        for text in self._plain_texts():
            if "begin" in text:
                for found in _UUENCODED.finditer(text):
                    names["uuname", found.group(2).strip()] = None
        if scan_zip and not self.is_multipart():
            for inner in self._zip_names([name for _, name in names], budget):
                names[inner] = None
        return list(names)

    def _plain_texts(self) -> Iterator[str]:
        """The texts in which a reader may look for uuencoded files."""
        yield from filter(None, (self.preamble, self.epilogue))
        if not isinstance(self._payload, str):
            return
        yield self._payload
        if any(kind.startswith("text/") for kind in self._media_types()):
            payload = _as_bytes(self._payload)
            for encoding in self._encodings():
                data = _decode(payload, encoding)
                if data != payload:
                    yield data.decode("latin-1")

    def _zip_names(self, names: list[str], budget: _Budget) -> list[tuple[str, str]]:
        """The names inside of this part, where it is a zip; BadZipFile where it only says so."""
        claims = self.get_content_type() in _ZIP_TYPES or any(map(_is_zip_name, names))
        payload = _as_bytes(str(self._payload or ""))
        found: list[tuple[str, str]] = []
        for encoding in self._encodings():
            data = _decode(payload, encoding)
            if not data.strip():
                continue
            if claims:
                found += _zipnames(data, budget)
            elif data.startswith(_ZIP_MAGIC):
                try:
                    found += _zipnames(data, budget)
                except _ZipLimit:
                    raise
                except zipfile.BadZipFile:
                    pass  # neither in name nor in fact
        return found

    def suspicion(self) -> str | None:
        """Why this part cannot be judged by its names, None where it can.

        A bound that was exceeded, or a structure that readers might take differently.
        """
        if self.limit or self._misread:
            return self.limit or self._misread
        if self._name_text_size() > MAX_NAME_TEXT:
            return f"more than {MAX_NAME_TEXT} characters of names"
        for header in ("content-type", "content-disposition"):
            for text in self._raw_values(header):
                if text.count(";") > MAX_PARAMETERS and (
                    sum(1 for _ in _split_parameters(text)) > MAX_PARAMETERS
                ):
                    return f"more than {MAX_PARAMETERS} parameters"
        payload = self._payload
        multipart = self.get_content_maintype() == "multipart"
        if multipart and isinstance(payload, str) and _HIDDEN_PARTS.search(payload):
            return "multipart without its boundary"
        if self._second_boundary():
            return "ambiguous boundary"
        kinds = self._media_types()
        if kinds[0].partition("/")[0] != "message" and any(k.startswith("message/") for k in kinds):
            return "ambiguous content type"
        if len({kind for kind in kinds[1:] if kind.startswith("message/")}) > 1:
            return "ambiguous content type"
        hidden = any(kind.startswith("multipart/") for kind in kinds)
        if hidden and isinstance(payload, str) and _HIDDEN_PARTS.search(payload):
            return "multipart without its boundary"
        return None

    def _name_text_size(self) -> int:
        """How much there is in which names are looked for."""
        headers = ("content-type", "content-disposition")
        return sum(len(str(v)) for k, v in self.raw_items() if k.lower() in headers)

    def _second_boundary(self) -> bool:
        """Whether some other boundary than the one in use would cut the body too."""
        types = self._raw_values("content-type")
        if not any("multipart" in value.lower() for value in types):
            return False
        candidates: set[str] = set()
        for value in types:
            names = _header_names(value, internal=True)
            candidates.update(text.strip() for name, text in names if "boundary" in name)
        used = self.get_boundary() if self._seen_multipart else None
        others = {_as_bytes(c) for c in candidates if c and c != used}
        if not others:
            return False
        lines = {line.rstrip() for line in re.split(rb"[\r\n]+", self._body_bytes())}
        return any(b"--" + other in lines for other in others)

    def _body_bytes(self) -> bytes:
        """The body as it would be written."""
        return self._body(_newline(self))

    # -- modifying and writing

    def set_payload(self, val: Any, charset: Any = None) -> None:
        """Set the payload: text, bytes, or a list of messages.

        Text beyond ASCII is encoded in the declared charset, UTF-8 where there is none.
        """
        self._forced = True
        if isinstance(val, (bytes, bytearray)):
            val = _as_str(bytes(val))
        elif isinstance(val, str) and charset is None and not val.isascii():
            val = self._encode_text(val)
        super().set_payload(val, charset)

    def _encode_text(self, text: str) -> str:
        try:
            text.encode("ascii", "surrogateescape")
            return text
        except UnicodeEncodeError:
            pass
        declared = self.get_content_charset()
        try:
            return _as_str(text.encode(_charset(declared or "utf-8")))
        except (LookupError, ValueError):
            declared = None
        finally:
            if declared is None:
                self.set_param("charset", "utf-8")
        return _as_str(text.encode("utf-8", "surrogateescape"))

    def as_bytes(self, unixfrom: bool = False, policy: Any = None) -> bytes:
        """The whole message as bytes; what was not modified exactly as it was read.

        `unixfrom`: begin with a ``From`` line where there is none.  A `policy` makes the
        standard generator write everything anew.
        """
        if policy is not None:
            return super().as_bytes(unixfrom, policy)
        data = self._flatten(_newline(self))
        if unixfrom and not data.startswith(b"From "):
            line = self.get_unixfrom() or "From nobody " + time.ctime()
            data = _as_bytes(line) + _newline(self) + data
        return data

    def dump(self, file: BinaryIO, unixfrom: bool = False) -> None:
        """Write the message to a binary file, as `as_bytes` gives it."""
        file.write(self.as_bytes(unixfrom))

    def _raw(self) -> bytes:
        """The bytes that this part was read from."""
        if self._source is None:
            return b""
        if self._root is self:
            return self._source.raw
        self._source.place(self._root)
        return self._source.raw[slice(*self._span)]

    def _flatten(self, newline: bytes) -> bytes:
        if self._source is not None and not self.ismodified():
            return self._raw()
        body = self._body(newline)  # first: it may have to change the boundary
        return self._head(newline) + body

    def _original_head(self) -> tuple[list[bytes], int]:
        """The header fields that were read, as they stand, and where the body begins.

        The list does not match the headers where the parser had to mend them.
        """
        starts: list[int] = []
        raw = self._raw()
        size = end = 0
        for line in io.StringIO(_as_str(raw), newline=""):
            if not _HEADER_LINE.match(line):
                if line[0] in "\r\n":
                    size += len(line)
                break
            if line[0] not in " \t" or not starts:
                starts.append(size)
            size += len(line)
            end = size
        return [raw[slice(*ends)] for ends in zip(starts, [*starts[1:], end])], size

    def _head(self, newline: bytes) -> bytes:
        """The header and the empty line after it."""
        fields, size = self._original_head()
        if self._source is not None and self._headers == self._seen_headers and fields:
            head = self._raw()[:size]
            if size > sum(map(len, fields)) and head.endswith((b"\n\n", b"\n\r\n")):
                return head
            # What ended the header, for some if lone CRs did, may not be what it was in the body.
            return _end_header(head, newline)
        unixfrom = fields[:1] if fields[:1] and fields[0].startswith(b"From ") else []
        fields = fields[len(unixfrom) :]
        known: dict[tuple[int, int], list[bytes]] = {}
        if len(fields) == len(self._seen_headers):
            # the objects are the same as long as nobody sets the header anew
            for (name, value), raw in zip(reversed(self._seen_headers), reversed(fields)):
                known.setdefault((id(name), id(value)), []).append(raw)
        lines = unixfrom
        for name, value in self._headers:
            same = known.get((id(name), id(value)))
            line = same.pop() if same else self._field(name, value, newline)
            lines.append(line if line.endswith((b"\n", b"\r")) else line + newline)
        return _end_header(b"".join(lines), newline)

    def _field(self, name: str, value: Any, newline: bytes) -> bytes:
        """A header field as a line, or as several folded ones."""
        try:
            data: bytes = self.policy.fold_binary(name, value)
        except (ValueError, LookupError, email.errors.MessageError):
            data = b""
        lines = data.splitlines()
        if not lines or any(line[:1] not in b" \t" or not line.strip() for line in lines[1:]):
            # a value that would begin another field, or end the header
            value = re.sub(r"[\r\n]+[ \t]*", " ", str(value))
            lines = [_as_bytes(f"{name}: {value}")]
        return newline.join(lines) + newline

    def _body(self, newline: bytes) -> bytes:
        payload = self._payload
        if self._source is not None and self._same_body() and not self._forced:
            raw = self._raw()
            _, start = self._original_head()
            if not isinstance(payload, list):
                return raw[start:]
            if self._boundary_kept():
                return self._patched(raw, start, newline)
        if isinstance(payload, list):
            return self._rebuilt(payload, newline)
        body = _as_bytes(str(payload)) if payload is not None else b""
        return re.sub(rb"(?<!\r)\n", b"\r\n", body) if newline == b"\r\n" else body

    def _boundary_kept(self) -> bool:
        """Whether the Content-Type is the one that was read."""
        now, seen = (
            [value for name, value in headers if name.lower() == "content-type"]
            for headers in (self._headers, self._seen_headers)
        )
        return now == seen

    def _patched(self, raw: bytes, start: int, newline: bytes) -> bytes:
        """The body as it was read, except for the parts within that were modified."""
        assert self._source is not None
        self._source.place(self._root)
        base, end = self._span if self._root is not self else (0, len(raw))
        pieces = []
        pos = base + start
        source = self._source.raw
        for child in self._payload:
            first, last = child._span
            pieces.append(source[pos:first])
            data = child._flatten(newline)
            if self.get_content_type() == "message/delivery-status" and child.ismodified():
                data = data[: -len(newline)]  # the empty line stands between the blocks
            pieces.append(data)
            pos = last
        pieces.append(source[pos:end])
        return b"".join(pieces)

    def _rebuilt(self, parts: list[Any], newline: bytes) -> bytes:
        """The body made anew from `parts`."""
        pieces = [_flatten_any(part, newline) for part in parts]
        if self.get_content_maintype() == "message":
            return newline.join(pieces)
        if self.get_content_maintype() != "multipart":
            self.set_type("multipart/mixed")
        boundary = self.get_boundary()
        if boundary is None or any(b"--" + _as_bytes(boundary) in piece for piece in pieces):
            boundary = "=" + uuid.uuid4().hex + "="
            self.set_boundary(boundary)
        mark = b"--" + _as_bytes(boundary)
        out = [_as_bytes(self.preamble) + newline] if self.preamble else []
        for piece in pieces:
            out += [mark, newline, piece, newline]
        out += [mark, b"--", newline, _as_bytes(self.epilogue or "")]
        return b"".join(out)

    # Old spellings of what the standard library has under another name today.
    getfilename = get_filename
    ismultipart = Message.is_multipart
    getheaders = Message.get_all
    gettype = Message.get_content_type
    getparam = get_param


def _unquote_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0], value[1], email.utils.unquote(value[2])
    return email.utils.unquote(value)


def _end_header(fields: bytes, newline: bytes) -> bytes:
    """Header fields with the empty line that parts them from the body."""
    # A lone CR ends no line for some, and one LF would only complete it.
    if fields and not fields.endswith(b"\n"):
        fields += newline
    return fields + newline


def _newline(msg: MimeMessage) -> bytes:
    """The line end that the message uses: that of the first line of what was read."""
    source = msg._source
    if source is None:
        return b"\n"
    first = source.raw.find(b"\n")
    return b"\r\n" if first > 0 and source.raw[first - 1 : first] == b"\r" else b"\n"


def _flatten_any(part: Any, newline: bytes) -> bytes:
    """A message of any class as bytes."""
    if isinstance(part, MimeMessage):
        return part._flatten(newline)
    data: bytes = part.as_bytes()
    return data if newline == b"\n" else re.sub(rb"(?<!\r)\n", newline, data)


class MimeGenerator(BytesGenerator):
    """The standard generator, which writes what was not modified as it was read.

    A `MimeMessage` is written as `MimeMessage.as_bytes` gives it, also within a message of
    another class.
    """

    _fp: Any

    def _write(self, msg: Any) -> None:
        if isinstance(msg, MimeMessage):
            self._fp.write(msg.as_bytes())
        else:
            super()._write(msg)  # type: ignore[misc]

    def _dispatch(self, msg: Any) -> None:
        """Write the body of a message."""
        if isinstance(msg, MimeMessage):
            self._fp.write(msg._body_bytes())
        else:
            super()._dispatch(msg)  # type: ignore[misc]


# -- transfer encodings


def _decode_base64(data: bytes) -> bytes:
    """Decode base64 as the most forgiving reader would: any junk, any padding."""
    out = []
    for run in re.split(rb"=[=\s]*", re.sub(rb"[^A-Za-z0-9+/=]+", b"", data)):
        run = run[: len(run) - (len(run) % 4 == 1)]
        out.append(binascii.a2b_base64(run + b"=" * (-len(run) % 4)))
    return b"".join(out)


def _decode_uu(data: bytes) -> bytes:
    out = []
    inside = False
    for line in data.splitlines():
        if not inside:
            inside = line.startswith(b"begin ")
        elif line.strip() in (b"end", b"`"):
            inside = False
        else:
            try:
                out.append(binascii.a2b_uu(line))
            except binascii.Error:
                length = (((line[0] - 32) & 63) * 4 + 5) // 3  # too long a line: what counts
                try:
                    out.append(binascii.a2b_uu(line[:length]))
                except binascii.Error:
                    continue
    return b"".join(out)


# What each transfer encoding is at bottom; all others leave the data as it is.
_CODINGS = {
    "base64": "base64",
    "quoted-printable": "quoted-printable",
    **dict.fromkeys(("x-uuencode", "uuencode", "uue", "x-uue"), "uuencode"),
}


def _decode(data: bytes, encoding: str) -> bytes:
    """Undo the transfer encoding (RFC 2045, section 6)."""
    coding = _CODINGS.get(encoding)
    if coding == "base64":
        return _decode_base64(data)
    if coding == "quoted-printable":
        return binascii.a2b_qp(data)
    if coding == "uuencode":
        return _decode_uu(data)
    return data


def _encode(data: bytes, encoding: str) -> bytes:
    """Apply the transfer encoding."""
    if encoding == "base64":
        return base64.encodebytes(data)
    if encoding == "quoted-printable":
        return binascii.b2a_qp(data)
    return data


# -- names


_OVERRIDES = re.compile("[\u202d\u202e\u2066-\u2068]")
_BLANKS = " \t\r\n.\"'<>;,"
_CLSID = re.compile(r"\{[0-9a-f-]+\}?\Z")


def _compatible(text: str) -> str:
    """Each character as its compatibility form (Unicode's NFKC), on its own.

    The ASCII that hides in other characters comes out just as well.  Of the whole text, NFKC
    sorts the combining marks that follow one another, in a time quadratic in their number.
    """
    forms = {ord(c): unicodedata.normalize("NFKC", c) for c in set(text) if c > "\x7f"}
    return text.translate(forms)


def _name_readings(name: str) -> Iterator[str]:
    """The names that a system might make of `name` when it writes the file."""
    yield name
    if "\0" in name or "%00" in name:
        cut = re.split("\0|%00", name, maxsplit=1)[0]
        yield cut
        yield urllib.parse.unquote(cut)
    if "%" in name:
        yield urllib.parse.unquote(name)
    if not name.isascii():
        yield _compatible(name)


def _extensions(name: str) -> Iterator[str]:
    """The extensions, with the dot and in lower case, that a system might see in `name`."""
    for reading in _name_readings(name):
        visible = "".join(c for c in reading if unicodedata.category(c) not in ("Cc", "Cf"))
        for piece in re.split(r":(?=\S)", visible):  # NTFS: name:stream
            tail = re.split(r"[/\\]", piece.rstrip(_BLANKS + "/\\\u3000\xa0"))[-1]
            _, dot, extension = tail.rstrip(_BLANKS).rpartition(".")
            if dot:
                yield "." + extension.strip().lower()


def check_ext(name: str | None) -> str | None:
    """`name` where its extension is in `bad_extensions`, else None ('' for '').

    Looks through what hides an extension: trailing dots and blanks, invisible and control
    characters, compatibility forms, alternate streams.  A name that reverses the direction of
    writing is bad in itself.

    >>> check_ext('picture.gif.EXE . ')
    'picture.gif.EXE . '
    >>> check_ext('report.pdf')
    """
    if not name:
        return name
    if _OVERRIDES.search(name):
        return name
    bad = set(bad_extensions)
    for extension in _extensions(name):
        if extension in bad or extension[1:] in bad or _CLSID.match(extension, 1):
            return name
    return None


# -- zips


_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"PK00PK\x03\x04", b"PK\x07\x08PK\x03\x04")
_ZIP_TYPES = {
    *("application/zip", "application/x-zip", "application/x-zip-compressed"),
    *("application/zip-compressed", "multipart/x-zip"),
}
_ZIP_METHODS = {bytes((method, 0)) for method in (*range(21), *range(93, 100))}  # APPNOTE 4.4.5
_UNICODE_PATH = 0x7075
_HIDDEN_DIRECTORY = 0x2000  # flag bit 13: names masked by central directory encryption


def _is_zip_name(name: str) -> bool:
    return any(extension == ".zip" for extension in _extensions(name))


def zipnames(txt: bytes) -> list[tuple[str, str]]:
    """``("zipname", name)`` for each name inside of a zip, zips in it included.

    Raises zipfile.BadZipFile where it cannot be read, or goes past a bound.
    """
    return _zipnames(txt, _Budget())


def _zipnames(data: bytes, budget: _Budget) -> list[tuple[str, str]]:
    names: list[str] = []
    try:
        _scan_zip(data, 1, names, budget)
    except zipfile.BadZipFile:
        raise
    except LimitExceeded as exc:
        raise _ZipLimit(str(exc)) from exc
    except Exception as exc:  # zipfile raises nearly anything on bad input
        raise zipfile.BadZipFile(f"zip cannot be read: {exc!r}") from exc
    return [("zipname", name) for name in dict.fromkeys(names)]


def _scan_zip(data: bytes, depth: int, names: list[str], budget: _Budget) -> None:
    if depth > MAX_ZIP_DEPTH:
        raise _ZipLimit(f"more than {MAX_ZIP_DEPTH} zips within each other")
    if not data.startswith(_ZIP_MAGIC):
        raise zipfile.BadZipFile("does not begin as a zip does")
    if data.count(b"PK\x01\x02") + len(names) > MAX_ZIP_NAMES:
        raise _ZipLimit(f"more than {MAX_ZIP_NAMES} names")
    names.extend(_local_names(data, budget))
    _check_extra(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.flag_bits & _HIDDEN_DIRECTORY:
                raise _ZipLimit("names are encrypted")
            found = [info.filename]
            if info.orig_filename != info.filename:
                found.append(info.orig_filename)
            found.extend(_unicode_paths(info.extra))
            for name in found:
                _count_name(len(name), budget)
            names.extend(found)
            member = _read_member(archive, info, budget)
            if member is not None:
                _scan_zip(member, depth + 1, names, budget)


def _check_extra(data: bytes) -> None:
    """Raise where the directory holds more of extra fields than zipfile could read in time.

    It takes time quadratic in those of one member, and reads all members at once.
    """
    total = 0
    for found in re.finditer(rb"PK\x01\x02", data):
        at = found.start() + 30
        total += int.from_bytes(data[at : at + 2], "little")
        if total > MAX_ZIP_EXTRA:
            raise _ZipLimit(f"more than {MAX_ZIP_EXTRA} bytes of extra fields")


def _count_name(size: int, budget: _Budget) -> None:
    """Account for one name in a zip; raise where it is too long, or where they are too many."""
    if size > MAX_ZIP_NAME:
        raise _ZipLimit(f"a name of more than {MAX_ZIP_NAME} bytes")
    budget.unpack(size)


def _local_names(data: bytes, budget: _Budget) -> list[str]:
    """The names in the local headers, which a reader may trust over the directory's.

    What looks like the start of a header may be any data; then its name may have any length, and
    overlap with that of the next one.
    """
    names = []
    for found in budget.timed(re.finditer(rb"PK\x03\x04", data)):
        start = found.start() + 30
        size = int.from_bytes(data[start - 4 : start - 2], "little")
        if size and start + size <= len(data):
            if size > MAX_ZIP_NAME and data[start - 22 : start - 20] not in _ZIP_METHODS:
                continue  # no header, and if it were one: nobody could unpack the file
            _count_name(size, budget)
            names.append(_to_text(data[start : start + size]))
            if len(names) > MAX_ZIP_NAMES:
                raise _ZipLimit(f"more than {MAX_ZIP_NAMES} names")
    return names


def _unicode_paths(extra: bytes) -> list[str]:
    """The names in the Unicode path fields of a member (APPNOTE 4.6.9)."""
    names = []
    pos = 0
    while pos + 4 <= len(extra):
        kind = int.from_bytes(extra[pos : pos + 2], "little")
        size = int.from_bytes(extra[pos + 2 : pos + 4], "little")
        if kind == _UNICODE_PATH and size > 5:
            names.append(_to_text(extra[pos + 9 : pos + 4 + size]))
        pos += 4 + size
    return names


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: _Budget) -> bytes | None:
    """The content of a member that is a zip itself, None for any other."""
    named = _is_zip_name(info.filename)
    if info.is_dir() or not (info.file_size or info.compress_size):
        return None
    if info.flag_bits & 1:
        if named:
            raise _ZipLimit(f"encrypted zip within: {info.filename!r}")
        return None
    # bzip2 and LZMA would let the sender choose how much memory the decoder takes
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        if named:
            raise _ZipLimit(f"unusual compression of {info.filename!r}")
        return None
    with archive.open(info) as member:
        head = member.read(4)
        if not named and head not in (b"PK\x03\x04", b"PK\x05\x06"):
            return None
        pieces = [head]
        while pieces[-1]:
            budget.unpack(len(pieces[-1]))
            pieces.append(member.read(65536))
    return b"".join(pieces)


# -- HTML


class _Writer(Protocol):
    def write(self, text: str, /) -> object: ...


class SGMLFilter(SGMLParser):
    """Passes HTML through to `out` unchanged, character for character.

    `out`: any object with ``write(text)``.  A subclass defines the methods of
    `Milter.sgmllib.SGMLParser` for what it wants to see or to change; what it does not write
    is gone.  The text is cut as HTML browsers cut it (HTML standard, section 13.2.5).

    >>> import io
    >>> out = io.StringIO()
    >>> parser = SGMLFilter(out)
    >>> parser.feed('<! no declaration ><P  CLASS = x>1 < 2 &amp&#65 <b')
    >>> parser.close()
    >>> out.getvalue()
    '<! no declaration ><P  CLASS = x>1 < 2 &amp&#65 <b'
    """

    _html = True

    def __init__(self, out: _Writer) -> None:
        self.out = out
        super().__init__()

    def write(self, buf: str) -> None:
        """Write text to the output."""
        self.out.write(buf)

    def _pass(self, text: str) -> None:
        """Write the construct at hand as it stands; `text` where there is none."""
        source, self._source = self._source, None
        self.write(text if source is None else source)

    def handle_data(self, data: str) -> None:
        """Pass text on."""
        self.write(data)

    def handle_comment(self, comment: str) -> None:
        """Pass a comment on."""
        self._pass(f"<!--{comment}-->")

    def handle_special(self, data: str) -> None:
        """Pass a declaration on, whether legal or not; `data` is what ``<!`` and ``>`` hold."""
        self._pass(f"<!{data}>")

    def handle_pi(self, data: str) -> None:
        """Pass a processing instruction on."""
        self._pass(f"<?{data}>")

    def handle_charref(self, ref: str) -> None:
        """Pass a numeric reference on."""
        self._pass(f"&#{ref};")

    def handle_entityref(self, ref: str) -> None:
        """Pass an entity reference on."""
        self._pass(f"&{ref};")

    def unknown_starttag(self, tag: str, attr: list[tuple[str, str]]) -> None:
        """Pass a start tag on."""
        shown = "".join(f' {n}="{html.escape(v)}"' for n, v in attr)
        self._pass(f"<{tag}{shown}>")

    def unknown_endtag(self, tag: str) -> None:
        """Pass an end tag on."""
        self._pass(f"</{tag}>")

    def parse_declaration(self, i: int) -> int:
        """Take ``<!`` up to the next ``>`` as one declaration."""
        k = self.rawdata.find(">", i + 2)
        if k < 0:
            return -1
        self._source = self.rawdata[i : k + 1]
        self.handle_special(self.rawdata[i + 2 : k])
        return k + 1


_INVISIBLE: dict[int, None] = dict.fromkeys(
    code
    for first, last in (
        *((0x00, 0x20), (0x7F, 0xA0), (0xAD, 0xAD), (0x200B, 0x200F), (0x2028, 0x202E)),
        *((0x2060, 0x206F), (0xFEFF, 0xFEFF)),
    )
    for code in range(first, last + 1)
)
_SCRIPT_SCHEME = r"(?:javascript|vbscript|livescript|jscript|mocha):"
_SCRIPT_URL = re.compile(rf"(?:[a-z][a-z0-9+.-]*:){{0,5}}(?:url:)?{_SCRIPT_SCHEME}")
_SCRIPT_ANYWHERE = re.compile(_SCRIPT_SCHEME)
_DATA_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*:){0,5}data:[^,]{0,300}?(?:html|xml|script)")
_DATA_ANYWHERE = re.compile(r"data:[^,]{0,300}?(?:html|xml|script)")
_SVG_IMAGE = re.compile(r"data:image/svg\+xml[;,]")
_EVENT = re.compile(r"(?:^|[^a-z0-9_-])on[a-z]")
_BAD_CSS = re.compile(
    r"expression\(|-moz-binding|behaviou?r:(?!none|inherit|url\([\"']?#default#)|" + _SCRIPT_SCHEME
)
_SUSPECT = re.compile(
    rf"script|on[a-z]{{1,40}}=|{_SCRIPT_SCHEME}|expression\(|srcdoc|"
    r"data:[^,]{0,300}(?:html|xml)"
)
_TAG_LIKE = re.compile(r"<[/!?]|<[A-Za-z][^<]*>|--!?\s{0,100}>")
# What some readers take for white space, and the HTML standard does not: no attribute ends there.
_ODD_SPACE = (
    r"\x00-\x08\x0b\x0e-\x1f\x7f-\xa0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff"
)
_HIDDEN_EVENT = re.compile(rf"[/{_ODD_SPACE}]on[a-z]{{1,40}}\s{{0,20}}=", re.IGNORECASE)
_HIDDEN_QUOTE = re.compile(rf"[{_ODD_SPACE}]+[\"']")
_ODD_NAME = re.compile(rf"[\"'<`{_ODD_SPACE}]")
_LOOSE_END = re.compile(r"--!>|--\s{1,100}>")
_PLAIN_ENDTAG = re.compile(r"</[^<>\"'`=]*>\Z")
_RAW_ELEMENTS = frozenset(
    ["style", "xmp", "iframe", "noembed", "noframes", "noscript", "textarea", "title", "plaintext"]
)
_TEXT_ATTRIBUTES = frozenset(("alt", "title", "summary", "label", "placeholder", "abbr"))
_LIST_ATTRIBUTES = frozenset(("content", "values", "from", "to", "by", "srcset", "archive"))
_IMAGE_TAGS = frozenset(("img", "image", "input", "td", "body", "table"))
# What a tag leaves that is taken out: without it, "<" before and a name after would become a tag.
_GAP = " "


def _unescape(text: str) -> str:
    """Character references decoded; numbers of any length, unlike html.unescape alone."""
    if "&" not in text:
        return text
    text = re.sub(r"&#0+(?=[0-9])", "&#", text)
    text = re.sub(r"&#[xX]0+(?=[0-9a-fA-F])", "&#x", text)
    text = re.sub(r"&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{8,});?", "\ufffd", text)
    return html.unescape(text)


def _squeeze(text: str) -> str:
    """Text as a lenient reader of URLs sees it: decoded, in lower case, nothing invisible."""
    return _unescape(text).translate(_INVISIBLE).lower()


def _bad_css(text: str) -> bool:
    """Whether a style sheet may run a script."""
    pieces, pos = [], 0
    while True:
        start = text.find("/*", pos)
        end = text.find("*/", start + 2) if start >= 0 else -1
        if end < 0:
            pieces.append(text[pos:])
            break
        pieces.append(text[pos:start])
        pos = end + 2
    for view in (text, "".join(pieces)):
        if "\\" in view:
            view = re.sub(r"\\([0-9a-fA-F]{1,6})\s?", _css_character, view).replace("\\", "")
        if not view.isascii():
            view = _compatible(view)
        if _BAD_CSS.search(_squeeze(view)):
            return True
    return False


def _css_character(match: re.Match[str]) -> str:
    number = int(match.group(1), 16)
    return chr(number) if 0 < number < 0x110000 else "\ufffd"


class HTMLScriptFilter(SGMLFilter):
    """Passes HTML through to `out` without scripts, writing `msg` in their place.

    Gone are script elements (in any namespace, closed or not), event handlers, links that run
    scripts (``javascript:``, ``vbscript:``, ``data:text/html`` however they are written),
    styles that do, comments and raw text with such content, and what readers might cut
    differently than this filter does.  Everything else passes unchanged.

    >>> import io
    >>> out = io.StringIO()
    >>> parser = HTMLScriptFilter(out)
    >>> parser.feed('<P>Hi<SCRIPT>x</SCRIPT> <a onclick="y()" href=z>there</a>')
    >>> parser.close()
    >>> out.getvalue()
    '<P>Hi<!-- WARNING: embedded script removed --> <a href=z>there</a>'
    """

    msg = "<!-- WARNING: embedded script removed -->"
    """What stands in place of a script."""

    def __init__(self, out: _Writer, _inner: bool = False) -> None:
        self._inner = _inner  # the text is what a comment or a raw element holds
        self._raw_name = ""
        self._next_greater = ("", -1)
        self._budget: _Budget | None = None
        super().__init__(out)

    def feed(self, data: str) -> None:
        """Filter `data`; NULs, which some readers skip inside of tags, are left out."""
        super().feed(data.replace("\0", ""))

    def _vet(self, text: str) -> str:
        """`text` without scripts."""
        out = io.StringIO()
        parser = HTMLScriptFilter(out, _inner=True)
        parser.msg = self.msg
        parser._budget = self._budget
        parser.feed(text)
        parser.close()
        return out.getvalue()

    def _attributes(self, text: str, pos: int) -> list[tuple[str, str]]:
        """As in the base class; not for `defang`, as no method here looks at them."""
        return [] if self._budget else super()._attributes(text, pos)

    # -- elements

    def report_unbalanced(self, tag: str) -> None:
        """An end tag without its start goes."""
        self.write(_GAP)

    def finish_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> int:
        """Start a script, raw text or any other element."""
        local = _local_name(tag)
        if local.startswith("script"):
            self._raw_name = tag
            return super().finish_starttag("script", attrs)
        if local not in _RAW_ELEMENTS:
            return super().finish_starttag(tag, attrs)
        if self._inner or tag != local:  # readers would differ on where it ends
            self.write(self.msg)
            return -1
        result = super().finish_starttag(tag, attrs)
        self._raw_name = local
        self.set_rawtext(*_end_pattern(local))
        return result

    def start_script(self, unused: object) -> None:
        """A script begins: write `msg` for it and drop all up to its end."""
        self.write(self.msg or _GAP)
        self._raw_name = "/script" if (self._starttag_text or "").endswith("/>") else "script"
        self.set_rawtext(*_end_pattern("script"))

    def end_script(self) -> None:
        """A script is over."""

    def handle_rawtext(self, data: str, closed: bool) -> None:
        """Drop a script; pass the content of other raw elements on as far as it is harmless."""
        if self._raw_name == "script" or (self._raw_name == "/script" and closed):
            return
        if self._raw_name == "/script":
            # <script/> that nothing closes: XML, where what follows is not the script
            if not self._inner:
                self.write(self._vet(data))
            return
        vetted = self._vet(data) if "<" in data else data
        # What is taken out may have parted what a lenient reader puts together.
        if self._raw_name == "style" and (_bad_css(data) or (vetted != data and _bad_css(vetted))):
            vetted = self.msg
        self.write(vetted)

    def finish_endtag(self, tag: str) -> None:
        """End a script or any other element."""
        local = _local_name(tag)
        if local.startswith("script"):
            super().finish_endtag("script")
        elif self._inner and local in _RAW_ELEMENTS:
            self.write(_GAP)
        else:
            super().finish_endtag(tag)

    def unknown_endtag(self, tag: str) -> None:
        """Pass an end tag on, without the attributes that it should not have."""
        if self._source is not None and not _PLAIN_ENDTAG.match(self._source):
            plain = re.match(r"[a-z][a-z0-9:._-]*\Z", tag)
            self._source = f"</{tag}>" if plain else _GAP
        super().unknown_endtag(tag)

    def unknown_starttag(self, tag: str, attr: list[tuple[str, str]]) -> None:
        """Pass a start tag on, without the attributes that run scripts."""
        if self._source is not None:
            self._source = _safe_tag(tag, self._source, self._budget)
        super().unknown_starttag(tag, attr)

    # -- the rest

    def handle_data(self, data: str) -> None:
        """Pass text on; that of scripts does not come here."""
        super().handle_data(data)

    def handle_comment(self, comment: str) -> None:
        """Pass a comment on, unless it holds a script or ends in doubt."""
        source = self._source if self._source is not None else f"<!--{comment}-->"
        doubtful = len(source) < 7 or _LOOSE_END.search(source, 4)
        if doubtful or ("<" in comment and self._vet(comment) != comment):
            self.write(self.msg)
        else:
            super().handle_comment(comment)

    def parse_declaration(self, i: int) -> int:
        """As in the base class; of a CDATA section only the start, where it holds markup."""
        start = self.rawdata[i : i + 9]
        if start.upper() == "<![CDATA[":
            text, k = self._next_greater
            if text is not self.rawdata or k < i:  # else it is that of the section before
                k = self.rawdata.find(">", i)
                self._next_greater = (self.rawdata, k)
            if k < 0:
                return -1
            if self.rawdata.find("<", i + 1, k) >= 0 or self.rawdata[k - 2 : k] != "]]":
                # In a style sheet a gap would not part what it parts in markup.
                self.write((self._inner and self.msg) or _GAP)
                return i + 9
        return super().parse_declaration(i)

    def handle_special(self, data: str) -> None:
        """Pass a declaration on, unless it holds markup."""
        if "<" in data or _SUSPECT.search(_squeeze(data)):
            self.write(self.msg)
        else:
            super().handle_special(data)

    def handle_pi(self, data: str) -> None:
        """Pass a processing instruction on, unless it may run a script."""
        squeezed = _squeeze(data)
        suspect = _SUSPECT.search(squeezed) or _UTF_7.search(squeezed)  # XML's encoding="..."
        if "<" in data or squeezed.startswith("import") or suspect:
            self.write(self.msg)
        else:
            super().handle_pi(data)

    def handle_unclosed(self, data: str) -> None:
        """Pass an unfinished construct on, unless it might become a script."""
        if not _SUSPECT.search(_squeeze(data)):
            self.write(data)
            return
        end = re.match(r"</([a-z]+)(?=[ \t\n\r\f/>])", data, re.ASCII | re.IGNORECASE)
        if end and not self._inner and end[1].lower() in _RAW_ELEMENTS:
            self.write(end[0] + ">")  # else raw text that was checked would have another end
        self.write(self.msg)


def _local_name(tag: str) -> str:
    """The name of a tag without its namespace and whatever else does not belong."""
    if tag.isalnum():
        return tag
    return re.sub(r"[^a-z0-9:]", "", tag).rpartition(":")[2]


def _end_pattern(name: str) -> tuple[re.Pattern[str], int]:
    """What ends a raw element, and how long it can be (with one character after it)."""
    prefix = r"(?:[A-Za-z0-9]{1,20}:)?" if name == "script" else ""
    pattern = re.compile(rf"</{prefix}{name}(?=[ \t\n\r\f/>])", re.ASCII | re.IGNORECASE)
    return pattern, len(name) + 24


def _safe_tag(tag: str, text: str, budget: _Budget | None) -> str:
    """A start tag without the attributes that run scripts; a gap where its name is in doubt."""
    if _ODD_NAME.search(tag):
        return _GAP
    out, pos = [], 0
    attributes = iter_attributes(text, 1 + len(tag))
    for start, end, name, value in budget.timed(attributes) if budget else attributes:
        if _harmful(tag, name.lower(), value) or not _plain_value(value, text[start:end]):
            out.append(text[pos:start].rstrip(" \t\n\r\f\v"))
            if text[end : end + 1] not in tuple(" \t\n\r\f\v/>"):
                out.append(" ")
            pos = end
        elif value is not None and _TAG_LIKE.search(value):
            out.append(text[pos:start])
            out.append(text[start:end].replace("<", "&lt;").replace(">", "&gt;"))
            pos = end
    out.append(text[pos:])
    return "".join(out)


def _plain_value(value: str | None, source: str) -> bool:
    """Whether all readers find the same end of an attribute, `source` as it stands.

    Without quotes, some take a slash or odd spaces for it.
    """
    if value is None or source.endswith((f'"{value}"', f"'{value}'")):
        return True
    return not (_HIDDEN_EVENT.search(value) or _HIDDEN_QUOTE.match(value))


def _harmful(tag: str, name: str, value: str | None) -> bool:
    """Whether an attribute runs a script, or might be read as one that does."""
    if _ODD_NAME.search(name) or _EVENT.search(name) or name == "srcdoc":
        return True
    if value is None:
        return False
    if "&{" in value or value.startswith("`"):
        return True
    if name in _TEXT_ATTRIBUTES:
        return False
    if name == "style":
        return _bad_css(_unescape(value))
    if ":" not in value and "&" not in value and name not in ("type", "content", "charset"):
        return False
    squeezed = _squeeze(value)
    if name == "charset" and _UTF_7.search(squeezed):
        return True
    if name in _LIST_ATTRIBUTES:
        return bool(
            _SCRIPT_ANYWHERE.search(squeezed)
            or _DATA_ANYWHERE.search(squeezed)
            or _UTF_7.search(squeezed)
        )
    if name == "type" and "scriptlet" in squeezed:
        return True
    if _SCRIPT_URL.match(squeezed):
        return True
    if _SVG_IMAGE.match(squeezed) and tag in _IMAGE_TAGS:
        return False  # an image may not run scripts
    return bool(_DATA_URL.match(squeezed))


_STATEFUL = re.compile(r"iso-?2022|hz|utf-?7|utf-?16|utf-?32|ucs", re.IGNORECASE)
_UTF_7 = re.compile("utf-?7")
_BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "latin-1"),  # UTF-8; and see _html_charset
)
_MARKS = tuple(mark for mark, _ in _BOMS)
_JIS_TOKEN = re.compile(rb"\x1b(\([BIJ]|\$[@B])|\x1b|[^\x1b]+")
_JIS_2_TOKEN = re.compile(rb"\x1b(\([BIJ]|\$[@AB]|\$\([CDOPQ])|\x1b|[^\x1b]+")
_MAX_VIEWS = 4


def _like_ascii(codec: str) -> bool:
    """Whether ASCII means itself in a charset, wherever it stands."""
    if _STATEFUL.search(codec):
        return False
    probe = "<script>=\"&;/'"
    try:
        return codec == "utf-8-sig" or probe.encode(codec) == probe.encode("ascii")
    except ValueError:
        return False


def _html_charset(data: bytes, declared: str | None) -> str:
    """The charset to filter HTML in.

    Latin-1 wherever ASCII means itself: markup is ASCII, and so each byte stays what it was.
    """
    for mark, charset in _BOMS:
        if data.startswith(mark):
            return charset
    try:
        codec = _charset(declared or "latin-1")
        if _like_ascii(codec):
            return "latin-1"
        # Mail programs write more characters into ISO-2022-JP than the codec knows.
        if not (codec.startswith("iso2022-jp") and data.isascii() and b"\x1b" in data):
            data.decode(codec)
    except (LookupError, ValueError):
        return "latin-1"
    return codec


def _html_views(data: bytes, charset: str, declared: list[str], budget: _Budget) -> Iterator[str]:
    """How readers might see HTML that was filtered in one charset, where they take another."""
    codecs = dict.fromkeys(codec for name in declared for codec in _codecs_in(name))
    others = [codec for codec in codecs if codec != charset and not _like_ascii(codec)]
    if charset in ("utf-16", "utf-32") and not data.startswith(_MARKS):
        others.append(charset + "-be")  # as RFC 2781 has it; the codec and browsers do not
    if charset == "utf-7":
        others.append("latin-1")  # browsers do not know UTF-7
    if len(others) > _MAX_VIEWS:
        raise LimitExceeded(f"HTML in more than {_MAX_VIEWS} charsets")
    for codec in others:
        yield data.decode(codec, "replace")
    japanese = charset.startswith("iso2022-jp")
    if b"\x1b" in data and (japanese or charset in ("latin-1", "utf-7")):
        # whether declared in the header, in a <meta>, or guessed
        yield _jis_view(data, charset.startswith("iso2022-jp-"), budget)


def _codecs_in(name: str) -> Iterator[str]:
    """The charsets that might be meant by a parameter: also one within comments or quotes."""
    for word in re.findall(r"[A-Za-z0-9._:-]+", name[:1000])[:10]:
        try:
            yield _charset(word)
        except (LookupError, ValueError):
            continue


def _jis_view(data: bytes, more: bool, budget: _Budget) -> str:
    """ISO-2022-JP as browsers decode it, with U+FFFD for all that is not ASCII.

    (WHATWG's Encoding standard, section 12.2.)  An escape sequence right after another one
    leaves a U+FFFD, and after one that does not exist the mode stays; Python differs in both.
    `more`: also the escape sequences of the later ISO-2022-JP-1, -2 and -3.
    """
    out = []
    mode, empty = b"(B", False
    for token in budget.timed((_JIS_2_TOKEN if more else _JIS_TOKEN).finditer(data)):
        if token[1]:
            mode = token[1]
            if empty:
                out.append("\ufffd")
            empty = True
            continue
        empty = False
        if mode in (b"(B", b"(J") and token[0] != b"\x1b":
            text = token[0].decode("ascii", "replace")
            out.append(re.sub("[\x0e\x0f]", "\ufffd", text))
        else:
            out.append("\ufffd" * len(token[0]))
    return "".join(out)


def _clean_html(data: bytes, declared: list[str], budget: _Budget) -> bytes | None:
    """HTML without scripts, None where there are none; `declared` are all charsets it claims."""
    charset = _html_charset(data, declared[0] if declared else None)
    text = data.decode(charset, "replace")
    cleaned = _filter_html(text, budget)
    after = data if cleaned == text else cleaned.encode(charset, "xmlcharrefreplace")
    if (
        after.startswith(_MARKS)
        and not data.startswith(_MARKS)
        and charset not in ("utf-16", "utf-32")  # which have it written
    ):
        raise LimitExceeded("HTML with NULs before a byte order mark")
    for view in _html_views(after, charset, declared, budget):
        if _filter_html(view, budget) != view.replace("\0", ""):
            raise LimitExceeded("HTML with a script in another charset")
    return None if after is data else after


def _filter_html(text: str, budget: _Budget) -> str:
    out = io.StringIO()
    parser = HTMLScriptFilter(out)
    parser._budget = budget
    for start in range(0, len(text), 65536):
        budget.check_time()
        parser.feed(text[start : start + 65536])
    parser.close()
    return out.getvalue()


# -- checks


_HTML_TYPES = frozenset(("text/html", "application/xhtml+xml", "image/svg+xml", "text/x-scriptlet"))
_MESSAGE_EXTENSIONS = frozenset((".eml", ".mht", ".mhtml", ".nws"))
_HTML_EXTENSIONS = frozenset((".htm", ".html", ".shtml", ".xht", ".xhtm", ".xhtml", ".svg"))


def _replace(msg: MimeMessage, badname: str, savname: object) -> None:
    """Put a warning in the place of a part."""
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+", " ", badname)
    if len(shown) > 255:  # a line of mail has at most 998 characters
        shown = shown[:255] + "..."
    text = virus_msg % (shown, socket.gethostname(), savname)
    plain = text.isascii()
    if not plain:
        text = _as_str(text.encode("utf-8", "replace"))
    msg.set_payload(text)
    msg.preamble = msg.epilogue = None
    msg.limit = msg._misread = None
    for header in ("content-type", "content-disposition", "content-transfer-encoding"):
        del msg[header]
    msg["Content-Type"] = "text/plain; name=WARNING.TXT" + ("" if plain else "; charset=utf-8")
    if not plain:
        msg["Content-Transfer-Encoding"] = "8bit"


def check_name(
    msg: MimeMessage,
    savname: object = None,
    ckname: Callable[[str], object] = check_ext,
    scan_zip: bool = False,
) -> int:
    """Replace a part by a warning where any name of it is bad.

    `savname`: where the original was saved, for the text of the warning (`virus_msg`).
    `ckname`: called with each name; what it returns is the bad name, None or '' for a good one.
    `scan_zip`: look at the names inside of zips too; a zip that cannot be read, or that exceeds
    a bound, is bad, an empty one is not.  Returns CONTINUE.
    """
    _check_name(msg, savname, ckname, scan_zip, _Budget())
    return _CONTINUE


def _check_name(
    msg: MimeMessage,
    savname: object,
    ckname: Callable[[str], object],
    scan_zip: bool,
    budget: _Budget,
) -> bool:
    """Whether the part had to be replaced."""
    bad: object = msg.suspicion()
    if bad:
        _log.warning("part removed: %s", bad)
    else:
        try:
            bad = _bad_name(msg, ckname, scan_zip, budget)
        except LimitExceeded as exc:
            _log.warning("part removed: %s", exc)
            bad = exc
    if bad:
        _replace(msg, str(bad), savname)
    return bool(bad)


def _bad_name(
    msg: MimeMessage, ckname: Callable[[str], object], scan_zip: bool, budget: _Budget
) -> object:
    names = msg._getnames(False, budget)
    for _, name in budget.timed(names):
        if len(name) > MAX_NAME_TEXT:
            raise LimitExceeded(f"a name of more than {MAX_NAME_TEXT} characters")
        bad = ckname(name)
        if bad:
            return bad
    if not scan_zip or msg.is_multipart():
        return None
    try:
        for _, name in msg._zip_names([n for _, n in names], budget):
            bad = ckname(name)
            if bad:
                _log.info("bad name in a zip: %r", name)
                return next((n for _, n in names if _is_zip_name(n)), None) or bad
            budget.check_time()
    except (zipfile.BadZipFile, LimitExceeded) as exc:
        _log.warning("zip removed: %s", exc)
        return next((n for _, n in names if n), None) or "zip"
    return None


def check_html(msg: MimeMessage, savname: object = None) -> int:
    """Remove the scripts from a part of HTML, or SVG, by its type or by its name.

    The charset and the transfer encoding stay.  `savname`: as for `check_name`, for HTML that
    takes too long to check and is replaced.  Returns CONTINUE.
    """
    _check_html(msg, savname, _Budget())
    return _CONTINUE


_FALLS_APART = "HTML that would fall apart without its scripts"


def _check_html(msg: MimeMessage, savname: object, budget: _Budget) -> bool:
    """Whether scripts were taken out; not where the part had to be replaced."""
    if msg.is_multipart() or not isinstance(msg._payload, str):
        return False
    try:
        if not _is_html(msg, budget):
            return False
        payload = _as_bytes(msg._payload)
        encodings = msg._encodings()
        charsets = msg._charsets()
        for encoding in encodings:
            decoded = _decode(payload, encoding)
            cleaned = _clean_html(decoded, charsets, budget)
            if cleaned is not None:
                after = _encode(cleaned, encoding)
                forged = bool(_uuencoded_names(cleaned) - _uuencoded_names(decoded))
                forged = forged or budget.boundaries(msg._root).forged(payload, after)
                suspicious = msg.suspicion()
                msg.set_payload(after)
                if forged or (msg.suspicion() and not suspicious):
                    raise LimitExceeded(_FALLS_APART)
                if len(encodings) > 1:
                    del msg["Content-Transfer-Encoding"]
                    msg["Content-Transfer-Encoding"] = encoding or "8bit"
                return True
    except LimitExceeded as exc:
        _log.warning("HTML removed: %s", exc)
        _replace(msg, str(exc), savname)
    return False


_DASHED_LINE = re.compile(rb"(?:(?<=[\r\n])|\A)--([^\r\n]*)")
_HEADER_IN_TEXT = re.compile(
    rb"[\r\n][ \t]*content-(?:type|disposition|transfer-encoding)[ \t\v\f\x1c-\x1f]*(?:[:\r\n]|\Z)",
    re.IGNORECASE,
)


class _Boundaries:
    """What begins and ends the parts of a message, to look for in the text of one of them."""

    def __init__(self, boundaries: set[bytes]) -> None:
        self._exact = boundaries | {boundary + b"--" for boundary in boundaries}
        # In order, and none that begins as another: at most one can be the beginning of a line.
        self._beginnings: list[bytes] = []
        for boundary in sorted(boundaries):
            if not self._beginnings or not boundary.startswith(self._beginnings[-1]):
                self._beginnings.append(boundary)

    def _resembles(self, line: bytes) -> bool:
        at = bisect.bisect_right(self._beginnings, line)
        return at > 0 and line.startswith(self._beginnings[at - 1])

    def forged(self, before: bytes, after: bytes) -> bool:
        """Whether a text that was changed has parts that nobody checked.

        They begin at a line that was no boundary, or for those who compare only the beginning of
        a line (RFC 2046, 5.1.1) where a header follows, whatever stands between the two.
        """
        if not self._exact or b"--" not in after:
            return False
        found = _DASHED_LINE.finditer(after)
        first = next((line for line in found if self._resembles(line[1])), None)
        if first is None:
            return False
        return bool(
            _HEADER_IN_TEXT.search(after, first.end()) or self._count(after) - self._count(before)
        )

    def _count(self, text: bytes) -> Counter[bytes]:
        lines = (found[1].rstrip(b" \t") for found in _DASHED_LINE.finditer(text))
        return Counter(line for line in lines if line in self._exact)


def _uuencoded_names(text: bytes) -> set[str]:
    if b"begin" not in text:
        return set()
    return {found[2] for found in _UUENCODED.finditer(text.decode("latin-1"))}


def _is_html(msg: MimeMessage, budget: _Budget) -> bool:
    if any(t in _HTML_TYPES for t in msg._media_types()):
        return True
    for _, name in budget.timed(msg._getnames(False, budget)):
        if any(extension in _HTML_EXTENSIONS for extension in _extensions(name[-MAX_NAME_TEXT:])):
            return True
    return False


def check_attachments(
    msg: MimeMessage, check: Callable[[Any], int], lev: list[int] | None = None
) -> int:
    """Call `check` with each leaf, parts of attached messages included.

    Stops at the first one for which it does not return CONTINUE, and returns what it returned.
    `lev`: where `msg` is in the tree, as a list of part numbers; not needed.
    """
    level = lev or []
    if not msg.is_multipart():
        return check(msg)
    for number, part in enumerate(list(msg._payload), 1):
        verdict = check_attachments(part, check, [*level, number])
        if verdict != _CONTINUE:
            return verdict
    return _CONTINUE


def _content_types(msg: MimeMessage) -> bytes:
    """The Content-Type headers, each on one line."""
    return b"".join(
        b"Content-Type: " + _as_bytes(re.sub(r"[\r\n]+", " ", str(value))) + b"\n"
        for name, value in msg.raw_items()
        if name.lower() == "content-type"
    )


class _Defang:
    """One run of `defang`: its arguments and what it may still use."""

    def __init__(
        self,
        savname: object,
        check: Callable[[str], object],
        scan_rfc822: bool,
        scan_zip: bool,
    ) -> None:
        self.savname = savname
        self.check = check
        self.scan_rfc822 = scan_rfc822
        self.scan_zip = scan_zip
        self.budget = _Budget()
        self._cleaned: list[MimeMessage] = []

    def message(self, msg: MimeMessage, decoded: int = 0) -> None:
        """Check a message, or a part that is judged by itself, and what it will be read as."""
        before, self._cleaned = self._cleaned, []
        self.part(msg, decoded)
        if self._cleaned and self._reads_otherwise(msg):
            for part in self._cleaned:
                _log.warning("HTML removed: %s", _FALLS_APART)
                _replace(part, _FALLS_APART, self.savname)
        self._cleaned = before

    def _reads_otherwise(self, msg: MimeMessage) -> bool:
        """Whether the message, once it is written, has parts that nobody checked.

        What was taken out of HTML may have been all that hid a boundary, a header or a file.
        Where nobody was to look, in attached messages, there may be harm as before.
        """
        cleaned = set(map(id, self._cleaned))
        parts = list(msg.walk())
        again = list(message_from_file(io.BytesIO(msg.as_bytes())).walk())
        if [p.get_content_type() for p in parts] != [p.get_content_type() for p in again]:
            return True
        try:
            return any(
                self._harm(new) and (id(old) in cleaned or not self._harm(old))
                for old, new in zip(parts, again)
            )
        except LimitExceeded:
            return True

    def _harm(self, part: Any) -> bool:
        if not isinstance(part, MimeMessage):
            return False
        return bool(part.suspicion() or _bad_name(part, self.check, False, self.budget))

    def part(self, msg: MimeMessage, decoded: int = 0) -> None:
        """Check a part and the parts within it; `decoded`: how often it was unwrapped."""
        try:
            self.budget.check_time()
            replaced = _check_name(msg, self.savname, self.check, self.scan_zip, self.budget)
            replaced = replaced or self._hidden(msg, decoded)
        except LimitExceeded as exc:
            _log.warning("part removed: %s", exc)
            _replace(msg, str(exc), self.savname)
            return
        if replaced:
            return
        if not msg.is_multipart():
            if _check_html(msg, self.savname, self.budget):
                self._cleaned.append(msg)
        elif self.scan_rfc822 or msg.get_content_maintype() != "message":
            for child in list(msg._payload):
                self.part(child, decoded)
            if msg._parts_after_end and msg.epilogue:
                self._epilogue(msg, decoded)
            if not _HTML_TYPES.isdisjoint(msg._media_types()):
                self._shown_as_html(msg)

    def _shown_as_html(self, msg: MimeMessage) -> None:
        """Replace a multipart, or a message, with scripts for a reader that takes it as HTML.

        Under two types, that is; scripts in the HTML within are gone by now.
        """
        body = msg._body_bytes()
        for encoding in msg._encodings():
            try:
                clean = _clean_html(_decode(body, encoding), msg._charsets(), self.budget)
            except LimitExceeded as exc:
                _log.warning("part removed: %s", exc)
                _replace(msg, str(exc), self.savname)
                return
            if clean is not None:
                _replace(msg, "ambiguous content type", self.savname)
                return

    def _epilogue(self, msg: MimeMessage, decoded: int) -> None:
        """Check the parts that follow the end of a multipart, which some readers show.

        Mail of which an inner multipart has the boundary of the outer one has such parts.
        """
        data = _content_types(msg) + b"\n" + _as_bytes(msg.epilogue or "")
        try:
            if decoded >= MAX_ZIP_DEPTH:
                raise LimitExceeded("multiparts after each other's end")
            self.budget.unpack(len(data))
        except LimitExceeded as exc:
            _log.warning("parts removed: %s", exc)
            msg.epilogue = ""
            return
        hidden = message_from_file(io.BytesIO(data))
        self.message(hidden, decoded + 1)
        if hidden.ismodified():
            msg.epilogue = _as_str(hidden._body_bytes())

    def _hidden(self, msg: MimeMessage, decoded: int) -> bool:
        """Replace a part whose bad content shows only to a reader that decodes more."""
        for data, shown in self._decoded_messages(msg):
            if decoded >= MAX_ZIP_DEPTH:
                raise LimitExceeded("messages encoded within each other")
            self.budget.unpack(len(data))
            hidden = message_from_file(io.BytesIO(data))
            self.part(hidden, decoded + 1)
            if hidden.ismodified():
                _replace(msg, shown, self.savname)
                return True
        return False

    def _decoded_messages(self, msg: MimeMessage) -> Iterator[tuple[bytes, str]]:
        """(bytes, name) of the messages that a reader might find by decoding a part.

        Messages and multiparts in a transfer encoding, which RFC 2045, section 6.4, forbids but
        readers decode all the same; and files that a reader opens as messages.
        """
        kind = msg.get_content_maintype()
        if kind != "multipart" and not self.scan_rfc822:
            return
        if not msg.is_multipart() and isinstance(msg._payload, str):
            for _, name in self.budget.timed(msg._getnames(False, self.budget)):
                if any(extension in _MESSAGE_EXTENSIONS for extension in _extensions(name)):
                    for encoding in msg._encodings():
                        yield _decode(_as_bytes(msg._payload), encoding), name
                    break
        if kind not in ("multipart", "message"):
            return
        types = _content_types(msg)
        body = msg._body_bytes()
        for encoding in msg._encodings():
            data = _decode(body, encoding)
            if data != body:
                yield types + b"\n" + data, f"{kind} in {encoding}"


def defang(
    msg: MimeMessage,
    savname: object = None,
    check: Callable[[str], object] = check_ext,
    scan_rfc822: bool = True,
    scan_zip: bool = False,
) -> bool:
    """Make a message harmless: replace parts with bad names, and take scripts out of HTML.

    `savname`, `check` and `scan_zip` are those of `check_name`; multiparts and attached
    messages are checked for names of their own.  `scan_rfc822`: look into attached messages.
    Returns whether anything of the message was modified, here or before.
    """
    _Defang(savname, check, scan_rfc822, scan_zip).message(msg)
    return msg.ismodified()
