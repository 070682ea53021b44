"""Structured header fields, read in every way that a mail reader might read them."""

from __future__ import annotations

import binascii
import itertools
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from Milter._mime.codings import decode_base64, to_text
from Milter._mime.limits import settings

_EOL = re.compile(r"\r\n|\r|\n")
_FOLD = re.compile(r"(?:\r\n|\r|\n)(?=[ \t])")
RFC2231_NAME = re.compile(r"([^*]*)(?:\*([0-9]*))?(\*)?\Z")
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
# of message/partial and message/external-body (RFC 2046, 5.2.2 and 5.2.3; RFC 2017)
_MESSAGE_PARAMETERS = {
    *("access-type", "directory", "expiration", "id", "mode", "number", "permission", "server"),
    *("site", "subject", "total", "url"),
}
_MESSAGE_TYPE = re.compile(r"[\s\"'<]*message\s*/", re.IGNORECASE)


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


def unfold(text: str) -> str:
    r"""A header's value, or a part of one, on one line: RFC 5322, 2.2.3, has only the breaks go.

    >>> unfold('a\r\n\tb\n c')
    'a\tb c'
    """
    return _FOLD.sub("", text)


def parseparam(s: object, limit: int | None = None) -> list[str]:
    """Cut a structured header at the semicolons outside of quotes, in linear time.

    `limit`: how many pieces at most, from the first on.

    >>> parseparam('text/plain; Name="a;b"; x = y')
    ['text/plain', 'name="a;b"', 'x=y']
    """
    params = []
    for piece in itertools.islice(split_parameters(str(s)), limit):
        name, equals, value = piece.partition("=")
        params.append(f"{name.strip().lower()}={value.strip()}" if equals else piece.strip())
    return params


def split_parameters(s: str) -> Iterator[str]:
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


# A word that may name a parameter, and its value: the word is always taken whole, so that a search
# does not begin anew at each of its characters.
_LOOSE_PARAMETER = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"?'
    r"|([^\s;=\"]+)(?:\s*=\s*(\"[^\"\\]*(?:\\.[^\"\\]*)*\"?|[^\s;\"]*))?",
    re.DOTALL,
)
_PARAMETER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(?:\*[0-9]{0,4}\*?)?\Z")
_AFTER_QUOTES = re.compile(r"\s|\(|[A-Za-z][A-Za-z0-9*_-]*\s*=")
_AFTER_VALUE = re.compile(
    # another parameter, or a header that was folded into this one
    r"(?<!\s)\s+[A-Za-z][A-Za-z0-9_-]*(?:\*[0-9]{0,4}\*?)?\s*="
    r"|(?:\r\n|\r|\n)[ \t]+[A-Za-z][A-Za-z0-9_-]*:[ \t]"
)


_ANOTHER = re.compile(
    r"\s+[A-Za-z][A-Za-z0-9_-]*(?:\*[0-9]{0,4}\*?)?\s*="
    r"|(?:\r\n|\r|\n)[ \t]+[A-Za-z][A-Za-z0-9_-]*:"
)


def loose_parameters(text: str) -> Iterator[tuple[str, str]]:
    """(name in lower case, value) of parameters, whatever parts them; in linear time.

    >>> list(loose_parameters('a/b charset="x y"boundary=z; c'))
    [('charset', '"x y"'), ('boundary', 'z')]
    """
    for found in _LOOSE_PARAMETER.finditer(text):
        name, value = found.groups()
        if value is not None and _PARAMETER_NAME.match(name):
            yield name.lower(), value


def own_value(value: str) -> str:
    """A parameter's value without what follows where a semicolon is missing.

    >>> own_value('"a b"\\n\\tX-Priority: 3'), own_value('my file.pdf size=3'), own_value('"a"b"')
    ('"a b"', 'my file.pdf', '"a"b"')
    """
    quoted = _QUOTED.match(value)
    if quoted is None:
        return _AFTER_VALUE.split(value, maxsplit=1)[0]
    rest = value[quoted.end() :]
    if quoted.group() == '""' or not _AFTER_QUOTES.match(rest):
        return value  # quoted twice, or with a quote inside that should have had a backslash
    return value if value[-1] == '"' and "=" not in rest else quoted.group()


def without_comments(text: str) -> str:
    r"""A structured header without RFC 5322's comments, which nest; in linear time.

    >>> without_comments(r'a (b (c) "d \) e) f="(g)" (h'), without_comments('(i)')
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


def readings(text: str) -> list[str]:
    """The texts that readers might take for a structured header: they disagree on comments,
    and on backslashes.
    """
    texts = [text, text.replace("\\", "")] if "\\" in text else [text]
    if "(" in text:
        texts += [without_comments(reading) for reading in texts]
    return list(dict.fromkeys(texts))


def value_beginnings(value: str) -> Iterator[str]:
    """What a reader might take for a parameter's value that stops before the end of `value`."""
    quoted = _QUOTED_TO_THE_END.search(value)
    if quoted and quoted.group() != value:
        yield unquote(quoted.group())
    token = _TOKEN.match(value)
    if token and token.group() != value:
        yield token.group()


_TOKEN = re.compile(r'[^\s()"]+')


def readable(value: object) -> str:
    """A raw header value as text: bytes that stand as surrogates are decoded."""
    text = str(value)
    try:
        text.encode("ascii")
    except UnicodeEncodeError:
        return to_text(text.encode("utf-8", "surrogateescape"))
    return text


def _decode_words(text: str, pattern: re.Pattern[str] = _WORD) -> str:
    """Decode the RFC 2047 words in `text`, wherever they stand."""

    def word(match: re.Match[str]) -> str:
        charset, kind, content = match.groups()
        data = content.encode("utf-8", "replace")
        data = decode_base64(data) if kind in "bB" else binascii.a2b_qp(data, header=True)
        return to_text(data, charset.partition("*")[0][:100].strip())

    return pattern.sub(word, _WORD_GAP.sub("?=", text))


def collapse(value: Any) -> str:
    """A parameter's value as text, RFC 2231's (charset, language, text) decoded."""
    if isinstance(value, tuple):
        charset, _, text = value
        data = str(text).encode("latin-1", "replace")
        return to_text(data, charset or "us-ascii")
    return str(value)


def name_variants(value: str, extended: bool) -> Iterator[str]:
    """The texts that a reader might make of the value of a name parameter."""
    quoted = _QUOTED.match(value)
    if quoted and quoted.group() != '""' and _ANOTHER.match(value, quoted.end()):
        value = quoted.group()  # what follows is for nobody a part of it
    yield from _value_variants(value, extended)
    for beginning in value_beginnings(value):
        yield from _value_variants(beginning, extended)


def _value_variants(value: str, extended: bool) -> Iterator[str]:
    plain = unquote(value)
    if extended:
        charset, first, rest = plain.partition("'")
        _, second, encoded = rest.partition("'")
        decoded = [to_text(urllib.parse.unquote_to_bytes(plain))]
        if first and second:
            decoded.insert(0, to_text(urllib.parse.unquote_to_bytes(encoded), charset))
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


def header_names(text: str, internal: bool = False) -> Iterator[tuple[str, str]]:
    """(parameter, value) for everything in a header that might be taken as a file's name.

    `internal`: parameters with another purpose too.
    """
    for reading in readings(text):
        yield from _reading_names(reading, internal)


def _reading_names(text: str, internal: bool) -> Iterator[tuple[str, str]]:
    segments: dict[str, list[_Segment]] = {}
    other = _INTERNAL_PARAMETERS
    if _MESSAGE_TYPE.match(text):
        other = other | _MESSAGE_PARAMETERS
    for count, (label, value) in enumerate(_parameters(text)):
        if count > settings.MAX_PARAMETERS:
            return
        match = RFC2231_NAME.match(label)
        name = match.group(1) if match else label
        if name in other and not internal:
            continue
        extended = bool(match and (match.group(3) or match.group(2) == ""))
        if match and match.group(2):  # a piece of a name is none
            digits = match.group(2)[:9]
            # one with a leading zero counts for some readers, for others it is a gap
            number = int(digits) + 0.5 * (digits[0] == "0" and digits != "0")
            segments.setdefault(name, []).append((number, value, extended))
            continue
        for variant in name_variants(value, extended):
            yield name, variant
    for name, found in segments.items():
        for order in _segment_orders(found):
            for variant in _joined_variants(order):
                yield name, variant
    if text.count('"') % 2:
        for loose in _LOOSE_NAME.finditer(text):
            yield "name", loose.group(1).strip()


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    """(name in lower case, value) for each parameter, those that lack a semicolon included."""
    for piece in split_parameters(text):
        label, equals, value = piece.partition("=")
        if not equals:
            continue
        value = value.strip()
        words = label.lower().split()
        yield words[-1] if words else "", value  # others belong to what lacks its semicolon
        if "=" in value and not _QUOTED.fullmatch(value):
            yield from loose_parameters(value)


def _piece(value: str) -> str:
    """The text of a piece of a value; where a reader might see more in it, all of it."""
    quoted = _QUOTED.match(value)
    if quoted and _ANOTHER.match(value, quoted.end()):
        return unquote(quoted.group())
    return unquote(value)


def _joined_variants(segments: list[_Segment]) -> Iterator[str]:
    """The texts that a reader might make of a value in pieces."""
    joined = "".join(_piece(value) for _, value, _ in segments)
    extended = any(segment[2] for segment in segments)
    if all(value.startswith('"') for _, value, _ in segments):
        yield from _value_variants('"' + re.sub(r'(["\\])', r"\\\1", joined) + '"', extended)
    else:
        yield from name_variants(joined, extended)


_LONGEST_FILE_NAME = 255  # of any file system in use
_URL = re.compile(
    r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://|//|(?:about|cid|data|mailto|mid|news|tel|urn|uuid):",
    re.IGNORECASE,
)
# The top-level domains that are extensions of programs too.
_HOST_IN_PROSE = re.compile(r".*\.(?:com|website|ws)\W*\Z", re.IGNORECASE)


def is_subject(name: str) -> bool:
    """Whether a name is a sentence that ends in a host, as those of attached messages may be.

    >>> is_subject("Your order at example.com"), is_subject("example.com"), is_subject("my a.exe")
    (True, False, False)
    """
    words = name.split()
    return len(words) > 1 and bool(_HOST_IN_PROSE.match(words[-1]))


def described_names(header: str, value: str, file: bool, text: bool) -> Iterator[str]:
    """The names that a reader might take from a header which is not there to name the part.

    `file`: whether it is one for every reader; `text`: whether it is shown as a text.  Mozilla
    takes Content-Name and X-Sun-Data-Name, webmailers Content-Description and Content-Location.
    A description is prose, mostly: it names the part where it may be the name of a file, and
    addresses and hosts (``.com``) within a sentence are none.
    """
    value = unfold(value).strip()
    if header == "content-location":
        if not file or _URL.match(value):
            return
        value = re.split(r"[?#]", value, maxsplit=1)[0]
    prose = header == "content-description"
    if prose and text:
        return
    for name in dict.fromkeys(_value_variants(value, False)):
        name = name.strip()
        words = name.split()
        if not words or len(name) > _LONGEST_FILE_NAME:
            continue
        if prose and len(words) > 1 and (not file or is_subject(name)):
            continue
        if prose and _URL.match(name):
            continue
        if prose and "@" in name and name.lower().rstrip(">.").endswith(".com"):
            continue
        yield name
