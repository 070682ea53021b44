"""Style sheets and URLs: what in them runs a script."""

from __future__ import annotations

import html
import re

from Milter._mime.names import compatible_forms

_INVISIBLE: dict[int, None] = dict.fromkeys(
    code
    for first, last in (
        *((0x00, 0x20), (0x7F, 0xA0), (0xAD, 0xAD), (0x200B, 0x200F), (0x2028, 0x202E)),
        *((0x2060, 0x206F), (0xFEFF, 0xFEFF)),
    )
    for code in range(first, last + 1)
)
_INVISIBLE_BUT_BLANKS = {code: None for code in _INVISIBLE if chr(code) not in "\t\n\r\f \xa0"}
_LATIN = {0xDC00 + byte: byte for byte in range(0x80, 0x100)}
SCRIPT_SCHEME = r"(?:javascript|vbscript|livescript|jscript|mocha):"

# What a style sheet is made of as far as it hides something (CSS Syntax, section 4.3): a comment,
# a string, a URL without quotes, an escape, and all else.  What does not end in time is "open".
_TOKEN = re.compile(
    r"/\*(?P<comment>.*?)(?P<closed>\*/|\Z)"
    r"|\"(?P<double>(?:[^\"\\\n\r\f]|\\.)*)(?P<ended>\"?)"
    r"|'(?P<single>(?:[^'\\\n\r\f]|\\.)*)(?P<over>'?)"
    r"|url\((?P<url>[ \t\n\r\f]*(?![\"' \t\n\r\f])(?:[^)\\]|\\.)*)"
    r"|(?P<escape>\\.)"
    r"|(?P<rest>[^\"'/\\u]+|.)",
    re.DOTALL | re.IGNORECASE,
)
_ESCAPE = re.compile(r"\\(?:([0-9a-fA-F]{1,6})(?:\r\n|[ \t\n\r\f])?|([\s\S])|\Z)")
_BLANK = r"[\s\xa0]*"
# Internet Explorer's and Firefox's properties that load code; IE reads a property whatever
# punctuation stands before it.  The value is what is up to the next declaration or block.
_CODE_PROPERTY = re.compile(rf"(?:behaviou?r|moz-binding){_BLANK}:([^;{{}}]*)([;{{}}]?)")
_WORD_END = re.compile(r"[a-z0-9\x80-\U0010ffff]\Z")
_EXPRESSION = re.compile(rf"(?<![a-z0-9_\x80-\U0010ffff-])expression{_BLANK}\(")
_OWN_BEHAVIOR = re.compile(r"url\([\"']?#default#(?!time)[a-z]*[\"']?\)")
_SCRIPT_TARGET = re.compile(rf"(?:url\(|@import|^)[\"']?(?:url:)?{SCRIPT_SCHEME}")
_LOADED_SHEET = re.compile(r"@import(?:url\()?[\"']?data:")
_LOOSE = re.compile(
    r"expression\(|-moz-binding|behaviou?r:(?!none|inherit|url\([\"']?#default#(?!time))|"
    + SCRIPT_SCHEME
)


def unescape(text: str) -> str:
    """Character references decoded; numbers of any length, unlike html.unescape alone."""
    if "&" not in text:
        return text
    text = re.sub(r"&#0+(?=[0-9])", "&#", text)
    text = re.sub(r"&#[xX]0+(?=[0-9a-fA-F])", "&#x", text)
    text = re.sub(r"&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{8,});?", "\ufffd", text)
    return html.unescape(text)


def _characters(text: str) -> str:
    """The characters of UTF-8 that was read as Latin-1, as HTML is where ASCII is all markup."""
    if text.isascii():
        return text
    try:
        data = text.encode("latin-1")
    except UnicodeEncodeError:
        return text
    return data.decode("utf-8", "surrogateescape").translate(_LATIN)


def squeeze(text: str) -> str:
    """Text as a lenient reader of URLs sees it: decoded, in lower case, nothing invisible."""
    return unescape(_characters(text)).translate(_INVISIBLE).lower()


class _Sheet:
    """A style sheet as browsers cut it: comments are gone, strings stand aside.

    `doubtful`: old readers might cut it otherwise, as a string or a comment does not end, or as
    one begins within the other or after a backslash.  Then what it hides counts as well.
    """

    def __init__(self, text: str) -> None:
        self.strings: list[str] = []
        self.doubtful = False
        pieces: list[str] = []
        for token in _TOKEN.finditer(text):
            pieces.append(self._piece(token, pieces))
        self.text = "".join(pieces)

    def _piece(self, token: re.Match[str], before: list[str]) -> str:
        kind = token.lastgroup
        if kind == "closed":
            self.doubtful |= not token["closed"]
            return ""
        if kind in ("ended", "over"):
            value = token["double"] if kind == "ended" else token["single"]
            self.doubtful |= not token[kind] or "/*" in value or "\n" in value
            # A URL or the name of a style sheet is one, and no text that happens to be quoted.
            if re.search(r"url\(\s*\Z|@import\s*\Z", "".join(before[-2:])[-40:], re.IGNORECASE):
                return token.group()
            self.strings.append(value)
            return '""'
        if kind == "url":
            value = token["url"]
            self.doubtful |= any(mark in value for mark in ("/*", '"', "'", "{", ";"))
        elif kind == "escape":
            self.doubtful |= token["escape"][1] in "\"'/*"
        return token.group()


def bad_css(text: str) -> bool:
    """Whether a style sheet may run a script.

    That is one that has `expression()` for a value, `behavior` or `-moz-binding` with a URL, or
    a URL of a script.  Selectors (``.behavior:hover``), other properties (``scroll-behavior``),
    comments and strings are none of these.
    """
    if "&" in text and _bad_sheet(unescape(text)):  # as in XHTML
        return True
    return _bad_sheet(text)


def _bad_sheet(text: str) -> bool:
    text = _characters(text).translate(_INVISIBLE_BUT_BLANKS)
    sheet = _Sheet(text)
    if any(_SCRIPT_TARGET.match(squeeze(_decoded(string))) for string in sheet.strings):
        return True
    if sheet.doubtful and any(map(_LOOSE.search, loose_views(text))):
        return True
    plain = _decoded(sheet.text).translate(_INVISIBLE_BUT_BLANKS).lower()
    if _EXPRESSION.search(plain) or any(map(_loads_code, _CODE_PROPERTY.finditer(plain))):
        return True
    squeezed = plain.translate(_INVISIBLE)
    return bool(_SCRIPT_TARGET.search(squeezed) or _LOADED_SHEET.search(squeezed))


def loose_views(text: str) -> tuple[str, ...]:
    """A text with all of its escapes and blanks gone, as it stands and without comments."""
    return tuple(squeeze(_decoded(view)) for view in (text, _without_comments(text)))


def _loads_code(found: re.Match[str]) -> bool:
    """Whether a property, or what looks like one, has a URL for a value, not only IE's own."""
    before = found.string[max(0, found.start() - 20) : found.start()].rstrip("-_")
    if _WORD_END.search(before):
        return False  # scroll-behavior
    value = _OWN_BEHAVIOR.sub("", found[1].translate(_INVISIBLE))
    return "url" in value or (found[2] != "{" and ('"' in value or "'" in value))


def _decoded(text: str) -> str:
    """Text without its escapes and, as IE reads it, with ASCII for what is compatible."""
    if "\\" in text:
        text = _ESCAPE.sub(_css_character, text)
    return text if text.isascii() else compatible_forms(text)


def _without_comments(text: str) -> str:
    """As a reader sees it that looks for comments before anything else."""
    pieces, pos = [], 0
    while True:
        start = text.find("/*", pos)
        end = text.find("*/", start + 2) if start >= 0 else -1
        if end < 0:
            pieces.append(text[pos:])
            return "".join(pieces)
        pieces.append(text[pos:start])
        pos = end + 2


def _css_character(match: re.Match[str]) -> str:
    if match[1] is None:
        return "" if match[2] is None or match[2] in "\n\r\f" else match[2]
    number = int(match[1], 16)
    return chr(number) if 0 < number < 0x110000 else "\ufffd"
