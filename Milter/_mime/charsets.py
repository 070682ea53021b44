"""The charsets in which readers might see HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator

from Milter._mime.codings import codec as _charset
from Milter._mime.limits import Budget, LimitExceeded

_STATEFUL = re.compile(r"iso-?2022|hz|utf-?7|utf-?16|utf-?32|ucs", re.IGNORECASE)
_BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "latin-1"),  # UTF-8; and see _html_charset
)
MARKS = tuple(mark for mark, _ in _BOMS)
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


def html_charset(data: bytes, declared: str | None) -> str:
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


def html_views(data: bytes, charset: str, declared: list[str], budget: Budget) -> Iterator[str]:
    """How readers might see HTML that was filtered in one charset, where they take another."""
    codecs = dict.fromkeys(codec for name in declared for codec in _codecs_in(name))
    others = [codec for codec in codecs if codec != charset and not _like_ascii(codec)]
    if charset in ("utf-16", "utf-32") and not data.startswith(MARKS):
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


def _jis_view(data: bytes, more: bool, budget: Budget) -> str:
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
