"""What in a piece of markup runs a script, wherever a reader begins to read it.

HTML, SVG and XHTML are judged alike.  Readers differ in what they take for markup at all: the
content of a comment is HTML for Internet Explorer and Outlook (``<!--[if mso]>``), that of a style
sheet is for whoever reads it within ``<svg>``, and the value of an attribute is for a reader that
found another quote.  `runs` judges such text by every tag that might begin in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from Milter._mime.css import SCRIPT_SCHEME, bad_css, loose_views, squeeze, unescape
from Milter._mime.limits import Budget
from Milter.sgmllib import iter_attributes

_Attributes = Iterable[tuple[str, "str | None"]]

# What some readers take for white space, and the HTML standard does not: no attribute ends there.
ODD_SPACE = (
    r"\x00-\x08\x0b\x0e-\x1f\x7f-\xa0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff"
)
ODD_NAME = re.compile(rf"[\"'<`{ODD_SPACE}]")

# An event handler is "on" and an event; which events there are, each reader has its own mind.
# These words begin so by chance: no reader has an event "ce", "ly" or "tology".
_NO_EVENT = (
    r"(?!(?:one|once|only|online|onto|ontology|ongoing|onwards?|onset|onsite|onion|onyx|onus)"
    r"(?![a-z0-9_-]))"
)
_EVENT = re.compile(rf"(?:^|[^a-z0-9_-]){_NO_EVENT}on[a-z]")
_HIDDEN_EVENT = re.compile(rf"[/{ODD_SPACE}]{_NO_EVENT}on[a-z]{{1,40}}\s{{0,20}}=", re.IGNORECASE)
_HIDDEN_QUOTE = re.compile(rf"[{ODD_SPACE}]+[\"']")
_LOOSE_EVENT = re.compile(rf"(?<![a-z0-9_-]){_NO_EVENT}on[a-z]{{1,40}}\s{{0,20}}=", re.IGNORECASE)

_SCHEMES = r"(?:[a-z][a-z0-9+.-]*:){0,5}"
_SCRIPT_URL = re.compile(rf"{_SCHEMES}(?:url:)?{SCRIPT_SCHEME}")
_DATA_URL = re.compile(rf"{_SCHEMES}data:([^,]*),")
_RUNNING_TYPE = re.compile("html|xml|script")
_SVG_IMAGE = re.compile(r"data:image/svg\+xml[;,]")
_REFRESH = re.compile(r"[0-9.]*[;,]?(?:url=)?[\"']?")
_UTF_7 = re.compile("utf-?7")
_UTF_7_CHARSET = re.compile(r"(?:charset|encoding)=[^;,]{0,80}?utf-?7")
_NETSCAPE_ENTITY = re.compile(r"&\{(?!\{)[^{}]*\};")

_TEXT_ATTRIBUTES = frozenset(("alt", "title", "summary", "label", "placeholder", "abbr"))
_LIST_ATTRIBUTES = frozenset(("srcset", "archive"))
_ANIMATED = frozenset(("values", "from", "to", "by"))
_MORE_THAN_URLS = _ANIMATED | {"type", "content", "charset"}
TELLING_ATTRIBUTES = _MORE_THAN_URLS | {"srcdoc", "style", "attributename"}
"""Those whose value may run a script, or say that one does, without being a URL."""
_IMAGE_TAGS = frozenset(("img", "image", "input", "td", "body", "table"))


def local_name(tag: str) -> str:
    """The name of a tag without its namespace and whatever else does not belong."""
    if tag.isalnum():
        return tag
    return re.sub(r"[^a-z0-9:]", "", tag).rpartition(":")[2]


def plain_value(value: str | None, source: str) -> bool:
    """Whether all readers find the same end of an attribute, `source` as it stands.

    Without quotes, some take a slash or odd spaces for it.
    """
    if value is None or source.endswith((f'"{value}"', f"'{value}'")):
        return True
    return not (_HIDDEN_EVENT.search(value) or _HIDDEN_QUOTE.match(value))


def harmful(tag: str, name: str, value: str | None, refreshes: bool = True) -> bool:
    """Whether an attribute runs a script; `refreshes`: its tag has an attribute http-equiv."""
    if _EVENT.search(name) or name == "srcdoc":
        return True
    if value is None:
        return False
    if name == "attributename" and _EVENT.search(squeeze(value)):
        return True  # SVG sets it
    if value.startswith("`") or ("&{" in value and _NETSCAPE_ENTITY.search(value)):
        return True
    if name in _TEXT_ATTRIBUTES:
        return False
    if name == "style":
        return bad_css(unescape(value))
    if ":" not in value and "&" not in value and name not in _MORE_THAN_URLS:
        return False
    squeezed = squeeze(value)
    if name == "charset" and _UTF_7.search(squeezed):
        return True
    if name == "type" and "scriptlet" in squeezed:
        return True
    if name == "content":  # a URL only where it takes the place of a header
        if _UTF_7_CHARSET.search(squeezed):
            return True
        start = _REFRESH.match(squeezed)
        assert start is not None
        return refreshes and (_runs_url(squeezed[start.end() :]) or _runs_url(squeezed))
    if name in _LIST_ATTRIBUTES:
        return any(map(_runs_url, re.split(r"[\s,]+", unescape(value).lower())))
    if name in _ANIMATED and (local_name(tag) == "set" or local_name(tag).startswith("animat")):
        return any(map(_runs_url, squeezed.split(";"))) or "<" in squeezed
    if _SVG_IMAGE.match(squeezed) and tag in _IMAGE_TAGS:
        return False  # an image may not run scripts
    return _runs_url(squeezed)


def _runs_url(squeezed: str) -> bool:
    """Whether a URL runs a script, or is a document that may hold one."""
    if _SCRIPT_URL.match(squeezed):
        return True
    data = _DATA_URL.match(squeezed)
    return bool(data and _RUNNING_TYPE.search(data[1]))


# -- what is no tag

_TARGET = re.compile(r"[^\s?>]*")
_ENTITY = re.compile(
    r"(?:doctype[^<>\[]*\[\s*<!)?entity\s+[\w.:-]+\s+"
    r"(?:\"(?P<double>[^\"<>]*)\"|'(?P<single>[^'<>]*)')\s*\Z",
    re.IGNORECASE,
)
_PLAIN_ENTITY = re.compile(r"https?://[^&%]*|&#(?:1[3-9][0-9]|[2-9][0-9]{2}|[0-9]{4,6});")
_LOOSE_NAME = re.compile(r"<!entity\s*%|(?<![a-z0-9_-])on[a-z]", re.IGNORECASE)
_SUBSET = re.compile(r"\[|\A(?:entity|attlist)\b", re.IGNORECASE)
_CONDITION = re.compile(r"\s*\[\s*(?:if|else|endif)\b", re.IGNORECASE)


def harmful_pi(data: str) -> bool:
    """Whether a processing instruction, `data` without ``<?`` and ``>``, may run a script."""
    target = _TARGET.match(data)
    assert target is not None
    name = squeeze(target.group())
    return (
        name.startswith("import")
        or _pairs_run(data, target.end())
        or bool(_UTF_7_CHARSET.search(squeeze(data)))
    )


def harmful_declaration(data: str) -> bool:
    """Whether a declaration, `data` without ``<!`` and ``>``, may run a script.

    Readers of XML take entities from it, of which URLs and markup might be made, and attributes
    that elements have without saying.  Drawing programs name namespaces and characters so.
    """
    entity = _ENTITY.match(data)
    if entity:
        value = entity["double"] if entity["single"] is None else entity["single"]
        return not _PLAIN_ENTITY.fullmatch(value)
    if "<" in data:
        return True
    if data[:7].upper() == "[CDATA[":
        return False
    if _SUBSET.search(data) and not _CONDITION.match(data):
        if data[:6].lower() == "entity" or _LOOSE_NAME.search(unescape(data)):
            return True
        return bool(re.search(SCRIPT_SCHEME, squeeze(data)))
    return _pairs_run(data, 0)


def _pairs_run(data: str, pos: int) -> bool:
    """Whether a piece ``name=value`` of what is no tag would run a script in one."""
    return any(
        value is not None and harmful("?", name.lower(), value)
        for _, _, name, value in iter_attributes(data, pos)
    )


# -- markup that only some readers see

_BEGIN = re.compile(r"<([A-Za-z][^\s/>]{0,80}|[!?][^<>]*)")
_STYLE = re.compile(
    r"<(?:[a-z0-9]{1,20}:)?style\b[^<>]*>(.*?)(?:</(?:[a-z0-9]{1,20}:)?style|\Z)",
    re.DOTALL | re.IGNORECASE,
)


class _Seen(set[int]):
    """Where attributes began that were looked at, and how much may still be looked at.

    Tags that begin within each other's attributes share them, but for what they see between
    their own quotes; nobody writes mail in which that is more than a few times the text.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left = 16 * size + 4096


def runs(text: str, budget: Budget | None = None) -> bool:
    """Whether some tag runs a script that might begin in a text, whatever stands around it."""
    if "<" not in text:
        return False
    seen = _Seen(len(text))
    found: Iterable[re.Match[str]] = _BEGIN.finditer(text)
    for begin in budget.tags(found) if budget else found:
        name = begin[1].lower()
        if name[0] == "?":
            if harmful_pi(name[1:]):
                return True
        elif name[0] == "!":
            if not name.startswith("!--") and harmful_declaration(begin[1][1:]):
                return True
        elif local_name(name).startswith("script") or _tag_runs(
            name, text, begin.end(), seen, budget
        ):
            return True
    styles: Iterable[re.Match[str]] = _STYLE.finditer(text)
    return any(bad_css(style[1]) for style in (budget.tags(styles) if budget else styles))


def _tag_runs(tag: str, text: str, pos: int, seen: _Seen, budget: Budget | None) -> bool:
    pairs: list[tuple[str, str | None]] = []
    found = iter_attributes(text, pos)
    for start, end, name, value in budget.attributes(found) if budget else found:
        if start in seen:
            break
        seen.add(start)
        seen.left -= end - start
        if seen.left < 0 or not plain_value(value, text[start:end]):
            return True
        pairs.append((name.lower(), value))
    refreshes = not pairs or any(name == "http-equiv" for name, _ in pairs)
    return any(harmful(tag, name, value, refreshes) for name, value in pairs)


_LOOSE = re.compile(
    rf"<[a-z0-9:]{{0,40}}script|{SCRIPT_SCHEME}|srcdoc|scriptlet|utf-?7|<\?import|<!entity|<!attlist"
    r"|data:[^,]{0,300}?(?:html|xml|script)|expression\(|-moz-binding"
    r"|behaviou?r:(?!none|inherit|url\([\"']?#default#(?!time))"
)


def loosely_runs(text: str, budget: Budget | None = None) -> bool:
    """Whether any reader, however it cuts a text, might find a script in it."""
    if _LOOSE_EVENT.search(text) or runs(text, budget):
        return True
    return any(map(_LOOSE.search, loose_views(text)))
