"""A parser for SGML as it is found in HTML, with the interface of Python 2's ``sgmllib``.

`SGMLParser` splits text into tags, references, comments, declarations and data, and calls a
method for each.  For a tag ``foo`` these are ``start_foo(attrs)`` and ``end_foo()``, or
``do_foo(attrs)`` for a tag without an end; other tags go to `SGMLParser.unknown_starttag` and
`SGMLParser.unknown_endtag`.

>>> class Links(SGMLParser):
...     def start_a(self, attrs):
...         print(dict(attrs).get('href'))
>>> parser = Links()
>>> parser.feed('<p>See <A HREF="x.html?a=1&amp;b=2">thi')
x.html?a=1&b=2
>>> parser.feed('s</a>')
>>> parser.close()

Differences from Python 2, all for the sake of hostile input:

* Every construct is found by a state machine that remembers where it stopped, so that the time
  is linear in the input, however the input is cut into calls of `SGMLParser.feed`.
* A ``>`` inside a quoted attribute value does not end the tag, and ``<br/>`` is a tag of its own
  rather than the start of a short tag that runs to the next slash.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from ._sgml_machines import (
    ANGLE,
    CHARREF_END,
    COMMENT,
    COMMENT_HTML,
    DECLARATION,
    ENTITY_END,
    GREATER,
    MARKED,
    MARKED_HEAD,
    MARKED_MS,
    SHORT,
    TAG,
    TAG_HTML,
    WS,
    Machine,
    RawEnd,
)

__all__ = ["SGMLParseError", "SGMLParser"]

_NAME = re.compile(r"[a-zA-Z][-_.a-zA-Z0-9]*")
_NAME_HTML = re.compile(rf"[^{WS}/>]+")
_ATTRIBUTE = re.compile(r"[a-zA-Z_][-.:a-zA-Z_0-9]*\Z")
_SHORTTAG = re.compile(r"<([a-zA-Z][-.a-zA-Z0-9]*)/([^/<>]*)(/?)")
_SKIP = re.compile(rf"[{WS}/]*")
_RAW_NAME = re.compile(rf"=?[^{WS}/>=]*")
_EQUALS = re.compile(rf"[{WS}]*=[{WS}]*")
_UNQUOTED = re.compile(rf"[^{WS}>]*")
_CHARREF = re.compile(r"&#([0-9]+)")
_ENTITYREF = re.compile(r"&([a-zA-Z][-.a-zA-Z0-9]*)")
_DECL_TOKEN = re.compile(
    r"""\s+|[a-zA-Z0-9%#][-_.:a-zA-Z0-9]*|"[^"]*"|'[^']*'|--[\s\S]*?--|\[[\s\S]*\]|(.)""", re.DOTALL
)
_MARKED_KEYWORD = re.compile(r"\s*([a-zA-Z]*)\s*")
_MS_KEYWORDS = frozenset(("if", "else", "endif"))
_SGML_KEYWORDS = frozenset(("temp", "cdata", "ignore", "include", "rcdata"))


def iter_attributes(text: str, pos: int) -> Iterator[tuple[int, int, str, str | None]]:
    """The attributes of a start tag, as they stand: (start, end, name, value or None).

    `text` is the whole tag and `pos` the index after its name.  Attributes are cut where HTML's
    tokenizer cuts them; the value has lost its quotes, and nothing is decoded.
    """
    size = len(text)
    while True:
        pos = _SKIP.match(text, pos).end()  # type: ignore[union-attr]  # matches always
        if pos >= size or text[pos] == ">":
            return
        start = pos
        pos = _RAW_NAME.match(text, pos).end()  # type: ignore[union-attr]
        name = text[start:pos]
        value = None
        equals = _EQUALS.match(text, pos)
        if equals:
            pos = equals.end()
            quote = text[pos : pos + 1]
            if quote and quote in "\"'":
                close = text.find(quote, pos + 1)
                close = size if close < 0 else close
                value, pos = text[pos + 1 : close], close + 1
            else:
                begin, pos = pos, _UNQUOTED.match(text, pos).end()  # type: ignore[union-attr]
                value = text[begin:pos]
        yield start, min(pos, size), name, value


class SGMLParseError(RuntimeError):
    """A declaration that breaks the rules of SGML; raised by `SGMLParser.error`."""


class SGMLParser:
    """Cuts SGML into events and calls the method for each.

    `verbose`: print unbalanced end tags.

    Fed text is handled as far as its constructs are complete; `close` handles the rest, and an
    incomplete construct at the end comes out as data, in one piece.
    """

    entity_or_charref = re.compile("&(?:([a-zA-Z][-.a-zA-Z0-9]*)|#([0-9]+))(;?)")
    """What is replaced inside attribute values; group 1 an entity, 2 a number, 3 the ``;``."""

    entitydefs: ClassVar[dict[str, str]] = {
        "lt": "<",
        "gt": ">",
        "amp": "&",
        "quot": '"',
        "apos": "'",
    }
    """The replacement text of each known entity."""

    _decl_otherchars = "="
    """Characters that a declaration may hold beside names, quoted text and comments."""

    # Tokenize as HTML browsers do rather than as SGML says: no short or empty tags, a "<" does
    # not end a tag, comments end at "-->" or "--!>", declarations at the first ">".
    _html = False
    _interesting = re.compile(r"<(?=[a-zA-Z/!?>])|<\Z|&(?=[a-zA-Z#])|&\Z")
    _interesting_html = re.compile(r"<(?=[a-zA-Z/!?])|<\Z|&(?=[a-zA-Z#])|&\Z")
    _interesting_literal = re.compile(r"<(?=/)|<\Z")

    def __init__(self, verbose: int = 0) -> None:
        self.verbose = verbose
        self.reset()

    def reset(self) -> None:
        """Forget everything that was fed and start anew."""
        self.rawdata = ""
        self.stack: list[str] = []
        self.lasttag = "???"
        self.nomoretags = 0
        self.literal = 0
        self._open: dict[str, int] = {}
        self._starttag_text: str | None = None
        self._source: str | None = None
        self._waiting: Machine | RawEnd | None = None
        self._pending: list[str] = []
        self._raw_end: re.Pattern[str] | None = None
        self._raw_overlap = 0

    def setnomoretags(self) -> None:
        """Take all that follows as data, up to the end."""
        self.nomoretags = self.literal = 1

    def setliteral(self, *args: Any) -> None:
        """Take all that follows as data, up to the next end tag (CDATA mode)."""
        self.literal = 1

    def feed(self, data: str) -> None:
        """Parse `data`, which may stop anywhere; an incomplete construct waits for more."""
        if self._waiting is not None:
            self._pending.append(data)
            if self._waiting.scan(data) < 0:
                return
        self._join(data)
        self.goahead(0)

    def close(self) -> None:
        """Parse what still waits, as if the end of the document had come."""
        self._join("")
        self.goahead(1)

    def _join(self, data: str) -> None:
        if self._waiting is not None:
            data = "".join(self._pending)
            self._pending = []
            self._waiting = None
        self.rawdata += data

    def getpos(self) -> tuple[int, int]:
        """Always ``(1, 0)``: Python 2's parser kept no positions either, but had the method."""
        return 1, 0

    def error(self, message: str) -> None:
        """Raise `SGMLParseError`."""
        raise SGMLParseError(message)

    # -- the main loop

    def goahead(self, end: int) -> None:
        """Handle as much of `rawdata` as is complete; with `end` all of it."""
        rawdata = self.rawdata
        i, n = 0, len(rawdata)
        while i < n:
            k = self._step(rawdata, i, n, bool(end))
            if k < 0:
                i += -1 - k
                break
            i = k
        if end:
            if i < n:
                self._source = None
                self.handle_unclosed(rawdata[i:])
                i = n
        elif i < n:
            self._waiting = self._machine_for(rawdata, i)
            if self._waiting is not None:
                self._waiting.scan(rawdata, i)
        self.rawdata = rawdata[i:]

    def _step(self, rawdata: str, i: int, n: int, end: bool) -> int:
        """Handle data or one construct at `i`.

        Returns the next index, or -1 less the number of characters handled where the rest is
        incomplete.
        """
        if self.nomoretags:
            self.handle_data(rawdata[i:])
            return n
        if self._raw_end is not None:
            return self._raw_step(rawdata, i, n, end)
        if self._html:
            interesting = self._interesting_html
        elif self.literal:
            interesting = self._interesting_literal
        else:
            interesting = self._interesting
        found = interesting.search(rawdata, i)
        j = found.start() if found else n
        if i < j:
            self.handle_data(rawdata[i:j])
            return j
        k = self._construct(rawdata, i)
        self._source = None
        return k if k >= 0 else -1

    def _construct(self, rawdata: str, i: int) -> int:
        """Handle the construct at `i`: the index after it, or -1 where it is incomplete."""
        if rawdata[i] == "&":
            return self._parse_reference(i)
        kind = rawdata[i + 1 : i + 2]
        if not kind:
            return -1
        if kind == "/":
            k = self.parse_endtag(i)
            if k >= 0:
                self.literal = 0
            return k
        if kind == "!":
            if rawdata.startswith("<!--", i):
                return self.parse_comment(i)
            if len(rawdata) - i < 4 and "<!--".startswith(rawdata[i:]):
                return -1
            return self.parse_declaration(i)
        if kind == "?":
            return self.parse_pi(i)
        return self.parse_starttag(i)

    def _raw_step(self, rawdata: str, i: int, n: int, end: bool) -> int:
        """Handle the content of an element that is no markup, up to its end tag."""
        assert self._raw_end is not None
        found = self._raw_end.search(rawdata, i)
        if found is None and not end:
            return -1
        stop = found.start() if found else n
        self._raw_end = None
        self.handle_rawtext(rawdata[i:stop], found is not None)
        return stop if stop > i else (stop if found else n)

    def set_rawtext(self, pattern: re.Pattern[str], overlap: int) -> None:
        """Take what follows as raw text, up to what `pattern` matches.

        `overlap` is the greatest number of characters that a match can have.
        """
        self._raw_end = pattern
        self._raw_overlap = overlap

    def _machine_for(self, rawdata: str, i: int) -> Machine | RawEnd | None:
        """What finds the end of the incomplete construct at `i` in the text still to come."""
        if self._raw_end is not None:
            return RawEnd(self._raw_end, self._raw_overlap)
        head = rawdata[i : i + 4]
        if head == "<!--":
            return self._comment_machine()
        if len(head) < 2 or head in ("<!", "<!-", "&#"):
            return None
        if head[0] == "&":
            return Machine(CHARREF_END if head[1] == "#" else ENTITY_END)
        if head[1] == "!":
            return self._declaration_machine(rawdata, i)
        if head[1] == "?":
            return Machine(GREATER)
        if self._html:
            return Machine(TAG_HTML)
        if head[1] == "/":
            return Machine(ANGLE)
        short = _SHORTTAG.match(rawdata, i)
        if short and short.end() == len(rawdata):
            return Machine(SHORT)
        return Machine(TAG)

    def _comment_machine(self) -> Machine:
        return Machine(COMMENT_HTML, 4) if self._html else Machine(COMMENT)

    def _declaration_machine(self, rawdata: str, i: int) -> Machine:
        if self._html:
            return Machine(GREATER)
        if not rawdata.startswith("<![", i):
            return Machine(DECLARATION)
        keyword = _MARKED_KEYWORD.match(rawdata, i + 3)
        assert keyword is not None
        if keyword.end() == len(rawdata):
            return Machine(MARKED_HEAD)
        return Machine(MARKED_MS if keyword.group(1).lower() in _MS_KEYWORDS else MARKED)

    # -- constructs

    def _parse_reference(self, i: int) -> int:
        rawdata = self.rawdata
        found = _CHARREF.match(rawdata, i)
        handler: Callable[[str], None] = self.handle_charref
        if found is None:
            found = _ENTITYREF.match(rawdata, i)
            handler = self.handle_entityref
        if found is None:
            if len(rawdata) - i < 3 and "&#".startswith(rawdata[i:]):
                return -1
            self.handle_data("&")
            return i + 1
        k = found.end()
        if k == len(rawdata):
            return -1
        if rawdata[k] == ";":
            k += 1
        self._source = rawdata[i:k]
        handler(found.group(1))
        return k

    def parse_comment(self, i: int, report: int = 1) -> int:
        """Handle the comment at index `i` of `rawdata`; the index after it, -1 if incomplete."""
        rawdata = self.rawdata
        k = self._comment_machine().scan(rawdata, i + 4)
        if k < 0:
            return -1
        if report:
            self._source = rawdata[i:k]
            text = rawdata[i + 4 : k - 1]
            text = text[:-1] if self._html and text.endswith("--!") else text
            text = text.rstrip() if not self._html else text
            self.handle_comment(text[:-2])
        return k

    def parse_declaration(self, i: int) -> int:
        """Handle the declaration at index `i`; the index after it, -1 if incomplete."""
        rawdata = self.rawdata
        if rawdata.startswith("<![", i):
            return self.parse_marked_section(i)
        k = Machine(DECLARATION).scan(rawdata, i + 2)
        if k < 0:
            return -1
        text = rawdata[i + 2 : k - 1]
        if text == "" or text == "-":
            return k
        for token in _DECL_TOKEN.finditer(text):
            if token.group(1) and token.group(1) not in self._decl_otherchars:
                self.error(f"unexpected {token.group(1)!r} char in declaration")
        self._source = rawdata[i:k]
        name = _NAME.match(text)
        keyword = name.group().lower() if name else ""
        if keyword == "doctype":
            self.handle_decl(text)
        else:
            self.unknown_decl(text)
        return k

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """Handle ``<![name[...]]>`` or ``<![name...]>`` at index `i`, as `parse_declaration`."""
        rawdata = self.rawdata
        found = _MARKED_KEYWORD.match(rawdata, i + 3)
        assert found is not None
        if found.end() == len(rawdata):
            return -1
        keyword = found.group(1).lower()
        if keyword not in _MS_KEYWORDS and keyword not in _SGML_KEYWORDS:
            self.error(f"unknown status keyword {rawdata[i + 3 : found.end()]!r} in marked section")
        k = self._declaration_machine(rawdata, i).scan(rawdata, i + 3)
        if k < 0:
            return -1
        if report:
            self._source = rawdata[i:k]
            text = rawdata[i + 3 : k - 1].rstrip()[:-1]
            self.unknown_decl(text if keyword in _MS_KEYWORDS else text.rstrip()[:-1])
        return k

    def parse_pi(self, i: int) -> int:
        """Handle the processing instruction at index `i`, as `parse_declaration`."""
        k = self.rawdata.find(">", i + 2)
        if k < 0:
            return -1
        self._source = self.rawdata[i : k + 1]
        self.handle_pi(self.rawdata[i + 2 : k])
        return k + 1

    def get_starttag_text(self) -> str | None:
        """The text of the start tag met last, exactly as it stands."""
        return self._starttag_text

    def parse_starttag(self, i: int) -> int:
        """Handle the start tag at index `i`, as `parse_declaration`."""
        rawdata = self.rawdata
        if not self._html:
            if rawdata.startswith("<>", i):  # SGML's empty tag repeats the last one
                return self._start(i, i + 2, self.lasttag, [])
            short = _SHORTTAG.match(rawdata, i)
            if short and short.group(3):
                self._starttag_text = short.group()[: -1 - len(short.group(2))]
                self.lasttag = short.group(1).lower()
                self.finish_shorttag(self.lasttag, short.group(2))
                return short.end()
            if short and short.end() == len(rawdata):
                return -1
        k = Machine(TAG_HTML if self._html else TAG).scan(rawdata, i + 1)
        if k < 0:
            return -1
        text = rawdata[i:k]
        name = (_NAME_HTML if self._html else _NAME).match(text, 1)
        assert name is not None
        return self._start(i, k, name.group().lower(), self._attributes(text, name.end()))

    def _start(self, i: int, k: int, tag: str, attrs: list[tuple[str, str]]) -> int:
        self._starttag_text = self._source = self.rawdata[i:k]
        self.lasttag = tag
        self.finish_starttag(tag, attrs)
        return k

    def _attributes(self, text: str, pos: int) -> list[tuple[str, str]]:
        """The well-named attributes of a tag, references in their values replaced."""
        attrs = []
        for _, _, name, value in iter_attributes(text, pos):
            if not _ATTRIBUTE.match(name):
                continue
            if value is None:
                value = name
            elif "&" in value:
                value = self.entity_or_charref.sub(self._convert_ref, value)
            attrs.append((name.lower(), value))
        return attrs

    def _convert_ref(self, match: re.Match[str]) -> str:
        """The text for one reference in an attribute value, unchanged where it is unknown."""
        if not match.group(3):
            return match.group()
        if match.group(2):
            text = self.convert_charref(match.group(2))
        else:
            text = self.convert_entityref(match.group(1))
        return match.group() if text is None else text

    def parse_endtag(self, i: int) -> int:
        """Handle the end tag at index `i`, as `parse_declaration`."""
        rawdata = self.rawdata
        k = Machine(TAG_HTML if self._html else ANGLE).scan(rawdata, i + 2)
        if k < 0:
            return -1
        text = rawdata[i + 2 : k].rstrip(">")
        self._source = rawdata[i:k]
        if self._html:
            name = _NAME_HTML.match(text)
            text = name.group() if name else ""
        self.finish_endtag(text.strip().lower())
        return k

    # -- what tags lead to

    def finish_shorttag(self, tag: str, data: str) -> None:
        """Handle ``<tag/data/``: start, data and end at once."""
        self.finish_starttag(tag, [])
        self._source = None
        self.handle_data(data)
        self.finish_endtag(tag)

    def finish_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> int:
        """Call a start tag's method: 1 for ``start_``, 0 for ``do_``, -1 where there is none."""
        method = getattr(self, "start_" + tag, None)
        if method is not None:
            self.stack.append(tag)
            self._open[tag] = self._open.get(tag, 0) + 1
            self.handle_starttag(tag, method, attrs)
            return 1
        method = getattr(self, "do_" + tag, None)
        if method is not None:
            self.handle_starttag(tag, method, attrs)
            return 0
        self.unknown_starttag(tag, attrs)
        return -1

    def finish_endtag(self, tag: str) -> None:
        """Close the innermost open `tag` and everything inside it; '' closes the innermost."""
        if not tag:
            if self.stack:
                self._pop()
            else:
                self.unknown_endtag(tag)
            return
        if not self._open.get(tag):
            if hasattr(self, "end_" + tag):
                self.report_unbalanced(tag)
            else:
                self.unknown_endtag(tag)
            return
        while self.stack and self._pop() != tag:
            pass

    def _pop(self) -> str:
        tag = self.stack[-1]
        method = getattr(self, "end_" + tag, None)
        if method is not None:
            self.handle_endtag(tag, method)
        else:
            self.unknown_endtag(tag)
        del self.stack[-1]
        self._open[tag] = self._open.get(tag, 1) - 1
        return tag

    def handle_starttag(self, tag: str, method: Callable[..., Any], attrs: Any) -> None:
        """Call `method`, which is ``start_tag`` or ``do_tag``; override to see all of them."""
        method(attrs)

    def handle_endtag(self, tag: str, method: Callable[[], Any]) -> None:
        """Call `method`, which is ``end_tag``; override to see all of them."""
        method()

    def report_unbalanced(self, tag: str) -> None:
        """An end tag without a start; prints it where the parser is verbose."""
        if self.verbose:
            print("*** Unbalanced </" + tag + ">")
            print("*** Stack:", self.stack)

    # -- references

    def convert_charref(self, name: str) -> str | None:
        """The character that the decimal number `name` stands for, None if it is not ASCII."""
        try:
            number = int(name) if len(name) < 100 else -1
        except ValueError:
            return None
        return self.convert_codepoint(number) if 0 <= number <= 127 else None

    def convert_codepoint(self, codepoint: int) -> str:
        """The text for one code point."""
        return chr(codepoint)

    def handle_charref(self, name: str) -> None:
        """A reference ``&#name;``: its character as data, or `unknown_charref`."""
        text = self.convert_charref(name)
        if text is None:
            self.unknown_charref(name)
        else:
            self.handle_data(text)

    def convert_entityref(self, name: str) -> str | None:
        """The text that the entity `name` stands for, None if `entitydefs` lacks it."""
        return self.entitydefs.get(name)

    def handle_entityref(self, name: str) -> None:
        """A reference ``&name;``: its text as data, or `unknown_entityref`."""
        text = self.convert_entityref(name)
        if text is None:
            self.unknown_entityref(name)
        else:
            self.handle_data(text)

    # -- to be overridden

    def handle_data(self, data: str) -> None:
        """Text between the markup; one stretch may come in several pieces."""

    def handle_rawtext(self, data: str, closed: bool) -> None:
        """The content of an element after `set_rawtext`; not `closed`: the end came first."""
        self.handle_data(data)

    def handle_unclosed(self, data: str) -> None:
        """The rest of the document from a construct on that never ends; data by default."""
        self.handle_data(data)

    def handle_comment(self, data: str) -> None:
        """A comment, without ``<!--`` and ``-->``."""

    def handle_decl(self, decl: str) -> None:
        """A DOCTYPE declaration, without ``<!`` and ``>``."""

    def unknown_decl(self, data: str) -> None:
        """A marked section, or any declaration that is no DOCTYPE."""

    def handle_pi(self, data: str) -> None:
        """A processing instruction, without ``<?`` and ``>``."""

    def unknown_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        """A start tag without a method of its own."""

    def unknown_endtag(self, tag: str) -> None:
        """An end tag without a method of its own."""

    def unknown_charref(self, ref: str) -> None:
        """A character reference that `convert_charref` does not know."""

    def unknown_entityref(self, ref: str) -> None:
        """An entity reference that `convert_entityref` does not know."""


class TestSGMLParser(SGMLParser):
    """Prints every event, for a look at how a document is parsed."""

    __test__ = False  # not a test case of pytest's

    def __init__(self, verbose: int = 0) -> None:
        self.testdata = ""
        super().__init__(verbose)

    def handle_data(self, data: str) -> None:
        """Gather data, so that one stretch prints as one line."""
        self.testdata += data
        if len(self.testdata) >= 70:
            self.flush()

    def flush(self) -> None:
        """Print the data gathered so far."""
        data, self.testdata = self.testdata, ""
        if data:
            print("data:", repr(data))

    def _print(self, *words: str) -> None:
        self.flush()
        print(*words)

    def handle_comment(self, data: str) -> None:
        """Print a comment, the middle of a long one left out."""
        text = repr(data)
        self._print("comment:", text if len(text) <= 68 else text[:32] + "..." + text[-32:])

    def handle_decl(self, decl: str) -> None:
        """Print a declaration."""
        self._print("decl:", repr(decl))

    def handle_pi(self, data: str) -> None:
        """Print a processing instruction."""
        self._print("pi:", repr(data))

    def unknown_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        """Print a start tag."""
        self._print("start tag: <" + tag + "".join(f' {n}="{v}"' for n, v in attrs) + ">")

    def unknown_endtag(self, tag: str) -> None:
        """Print an end tag."""
        self._print("end tag: </" + tag + ">")

    def unknown_entityref(self, ref: str) -> None:
        """Print an entity reference."""
        self._print("*** unknown entity ref: &" + ref + ";")

    def unknown_charref(self, ref: str) -> None:
        """Print a character reference."""
        self._print("*** unknown char ref: &#" + ref + ";")

    def unknown_decl(self, data: str) -> None:
        """Print a marked section."""
        self._print("*** unknown decl: [" + data + "]")

    def close(self) -> None:
        """Parse the rest and print what it holds."""
        super().close()
        self.flush()


def test(args: Sequence[str] | None = None) -> None:
    """Parse a file and print its events: ``[-s] [FILE]``, '-' for standard input.

    With ``-s`` nothing is printed.  `args` defaults to the command line's; FILE to test.html.
    An unreadable file is an OSError.
    """
    words = list(sys.argv[1:] if args is None else args)
    parser_class: type[SGMLParser] = TestSGMLParser
    if words and words[0] == "-s":
        parser_class = SGMLParser
        del words[0]
    name = words[0] if words else "test.html"
    if name == "-":
        data = sys.stdin.read()
    else:
        with open(name, encoding="latin-1", newline="") as source:
            data = source.read()
    parser = parser_class()
    parser.feed(data)
    parser.close()


if __name__ == "__main__":
    test()
