"""HTML, passed through unchanged but for its scripts."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Protocol

from Milter._mime.charsets import MARKS, html_charset, html_views
from Milter._mime.css import bad_css
from Milter._mime.limits import Budget, LimitExceeded
from Milter._mime.markup import (
    ODD_NAME,
    ODD_SPACE,
    TELLING_ATTRIBUTES,
    harmful,
    harmful_declaration,
    harmful_pi,
    local_name,
    loosely_runs,
    plain_value,
    runs,
)
from Milter._mime.xml import declared_charsets, inflate, xml_runs
from Milter.sgmllib import SGMLParser, iter_attributes


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


_TAG_LIKE = re.compile(r"<[/!?]|<[A-Za-z][^<]*>|--!?\s{0,100}>")
_LOOSE_END = re.compile(r"--\s{1,100}>")
_PLAIN_ENDTAG = re.compile(r"</[^<>\"'`=]*>\Z")
_CONDITIONAL = re.compile(r"\s*\[\s*if\b", re.IGNORECASE)
_CONDITION = re.compile(r"[^<>]*<[^>]*>")  # that has a "<"; no honest one does
# Raw text to some readers; to others, without frames or without scripts, it is HTML.
_FALLBACK_ELEMENTS = frozenset(["iframe", "noembed", "noframes", "noscript"])
_RAW_ELEMENTS = _FALLBACK_ELEMENTS | {"style", "xmp", "textarea", "title", "plaintext"}
_SPACE = " \t\n\r\f"  # between attributes, by the HTML standard
_PLAIN_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:.-]*\Z")
_NO_VALUE = re.compile(rf"=[{_SPACE}]*[{ODD_SPACE}]+\Z")  # where odd space is space
# Text, references, and markup that changes nothing of how a document is read and can only say what
# it looks like: each reader cuts it alike. The number of pieces is limited as `re` remembers each.
_RAW_NAME = f"(?:{'|'.join(sorted(_RAW_ELEMENTS))})[{_SPACE}/>]"
_OTHER_NAME = f"(?:[a-z][a-z0-9]*:)?(?!script|{_RAW_NAME})[a-z][a-z0-9]*"
_VALUE = r"""(?:"(?:https?://)?[^<>"'`&:\x00-\x1f\x7f]*"|[a-z0-9#%._-]+(?=[ \t\n\r\f>]))"""
_STYLE = (
    rf"[{_SPACE}]*(?![a-z-]*(?:script|mocha))[a-z][a-z-]*"
    r""" ?:[a-z0-9#%.,! -]*(?:;|(?="))"""
)
_PLAIN_ATTRIBUTE = (
    rf"(?:style=(?:\"(?:{_STYLE}){{0,50}} ?\"|[a-z0-9#%._-]+(?=[{_SPACE}>]))"
    rf"|(?!on|(?:{'|'.join(sorted(TELLING_ATTRIBUTES))})[{_SPACE}/>=])"
    rf"[a-z][a-z0-9_-]*(?:={_VALUE})?)"
)
_NOTHING_TO_JUDGE = re.compile(
    r"(?:[^<]+|<(?=[^a-z/!?])|<!--[^<>\[-]*-->|</?>|<!>|<\?>|<!doctype[a-z0-9 ]*>"
    rf"|<{_OTHER_NAME}(?:[{_SPACE}/]+{_PLAIN_ATTRIBUTE}){{0,100}}[{_SPACE}/]*>"
    rf"|</{_OTHER_NAME}(?:[{_SPACE}/][^<>\"'`=]*)?>"
    r"){1,500}",
    re.ASCII | re.IGNORECASE,
)
# What a tag leaves that is taken out: without it, "<" before and a name after would become a tag.
_GAP = " "


def _without_markup(value: str) -> str:
    return value.replace("<", "&lt;").replace(">", "&gt;")


def _rebuilt(text: str, tag: str, attributes: list[tuple[str, str | None]]) -> str:
    """A start tag with those of its attributes that have a plain name, in quotes."""
    parts = [text[: 1 + len(tag)]]
    for name, value in attributes:
        if _PLAIN_NAME.match(name):
            quoted = "" if value is None else '="' + value.replace('"', "&quot;") + '"'
            parts.append(f" {name}{quoted}")
    return "".join(parts) + (" />" if text.endswith("/>") else ">")


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
        self._inner = _inner  # the text is what an element of the document holds
        self._raw_name = ""
        self._next_greater = ("", -1)
        self._budget: Budget | None = None
        self.modified = False
        super().__init__(out)

    def _in_doubt(self) -> bool:
        """Whether what some readers might cut differently has to go; see `_Judge`."""
        return True

    def feed(self, data: str) -> None:
        """Filter `data`; NULs, which some readers skip inside of tags, are left out."""
        if "\0" in data:
            self.modified = True
            data = data.replace("\0", "")
        super().feed(data)

    def _put(self, text: str, instead: str) -> None:
        """Write `instead`, which takes the place of `text`."""
        self.modified = self.modified or text != instead
        self.write(instead)

    def _drop(self, instead: str) -> None:
        """Write `instead` for something that goes."""
        self.modified = True
        self.write(instead)

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

    def _step(self, rawdata: str, i: int, n: int, end: bool) -> int:
        # Most of a document, and for `defang` all that somebody can make of ten megabytes of "<a>".
        if self._budget is not None and self._raw_end is None and not self.nomoretags:
            run = _NOTHING_TO_JUDGE.match(rawdata, i)
            if run is not None:
                self.write(run.group())
                return run.end()
        if self._budget is not None:
            self._budget.count()
        return super()._step(rawdata, i, n, end)

    # -- elements

    def report_unbalanced(self, tag: str) -> None:
        """An end tag without its start goes."""
        if self._in_doubt():
            self._drop(_GAP)
        else:
            self._pass(f"</{tag}>")

    def finish_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> int:
        """Start a script, raw text or any other element."""
        local = local_name(tag)
        if local.startswith("script"):
            self._raw_name = tag
            return super().finish_starttag("script", attrs)
        if local not in _RAW_ELEMENTS:
            return super().finish_starttag(tag, attrs)
        if tag != local or (self._inner and local in _FALLBACK_ELEMENTS):
            if not self._in_doubt():
                return super().finish_starttag(tag, attrs)
            self._drop(self.msg)  # readers would differ on where it ends
            return -1
        result = super().finish_starttag(tag, attrs)
        self._raw_name = local
        self.set_rawtext(*_end_pattern(local))
        return result

    def start_script(self, unused: object) -> None:
        """A script begins: write `msg` for it and drop all up to its end."""
        self._drop(self.msg or _GAP)
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
                self._put(data, self._vet(data))
        elif self._raw_name in _FALLBACK_ELEMENTS:
            gone = _left_open(data) and self._in_doubt()
            self._put(data, self.msg if gone else self._vet(data))
        elif self._raw_name == "style" and _bad_style(data):
            self._drop(self.msg)
        elif "<" in data and (runs(data, self._budget) or (_left_open(data) and self._in_doubt())):
            self._drop(self.msg)  # as within <svg> it is markup
        else:
            self.write(data)

    def finish_endtag(self, tag: str) -> None:
        """End a script or any other element."""
        local = local_name(tag)
        if local.startswith("script"):
            super().finish_endtag("script")
        elif self._inner and local in _FALLBACK_ELEMENTS and self._in_doubt():
            self._drop(_GAP)
        else:
            super().finish_endtag(tag)

    def unknown_endtag(self, tag: str) -> None:
        """Pass an end tag on, without the attributes that it should not have."""
        odd = self._source is not None and not _PLAIN_ENDTAG.match(self._source)
        if odd and self._in_doubt():
            plain = re.match(r"[a-z][a-z0-9:._-]*\Z", tag)
            self._source = f"</{tag}>" if plain else _GAP
            self.modified = True
        super().unknown_endtag(tag)

    def unknown_starttag(self, tag: str, attr: list[tuple[str, str]]) -> None:
        """Pass a start tag on, without the attributes that run scripts."""
        if self._source is not None:
            safe = self._safe_tag(tag, self._source)
            self.modified = self.modified or safe != self._source
            self._source = safe
        super().unknown_starttag(tag, attr)

    def _safe_tag(self, tag: str, text: str) -> str:
        """A start tag without the attributes that run scripts; a gap where its name is in doubt."""
        if ODD_NAME.search(tag):
            return _GAP
        if len(text) == len(tag) + len("<>"):
            return text
        refreshes = "http-equiv" in text.lower()
        out, kept, pos = [], [], 0
        before = -1  # where attributes begin whose values may be none; the next is their value then
        found = iter_attributes(text, 1 + len(tag))
        for start, end, name, value in self._budget.attributes(found) if self._budget else found:
            source = text[start:end]
            if ODD_NAME.search(name) or _attribute_runs(tag, name, value, source, refreshes):
                out.append(text[pos : start if before < 0 else before].rstrip(_SPACE))
                if text[end : end + 1] not in tuple(_SPACE + "/>"):
                    out.append(" ")
                pos, before = end, -1
                continue
            if value is not None and _like_markup(value, self._budget):
                out.append(text[pos:start])
                out.append(_without_markup(source))
                value = _without_markup(value)
                pos = end
            if not _NO_VALUE.search(source):
                before = -1
            elif before < 0:
                before = start
            kept.append((name, value))
        if pos == 0:
            return text
        safe = "".join([*out, text[pos:]])
        # Without what stood between them, two attributes may have become one.
        if set(kept).issuperset(attribute[2:] for attribute in iter_attributes(safe, 1 + len(tag))):
            return safe
        return _rebuilt(text, tag, kept)

    # -- the rest

    def handle_data(self, data: str) -> None:
        """Pass text on; that of scripts does not come here."""
        super().handle_data(data)

    def handle_comment(self, comment: str) -> None:
        """Pass a comment on, unless it holds a script for a reader that takes it as HTML.

        What is a comment, and where it ends, is what the HTML standard says (section 13.2.5.42
        and those after it).  The content of a conditional comment (``<!--[if mso]>``) is HTML for
        Internet Explorer up to version 9 and for Outlook, which then has to leave them where it
        leaves all others: a quote that stays open would hide one tag and show another.  SGML, and
        readers of its time, end a comment at ``-- >`` too.  What others end at ``--!>`` and
        ``<!-->`` the text after it is filtered for; to those who do not it is hidden.
        """
        if "<" in comment and self._comment_runs(comment):
            self._drop(self.msg)
        else:
            super().handle_comment(comment)

    def _comment_runs(self, comment: str) -> bool:
        loose = _LOOSE_END.search(comment)
        if loose and "<" in comment[loose.end() :] and self._in_doubt():
            return True
        if not _CONDITIONAL.match(comment):
            return runs(comment, self._budget)
        # A condition ends at ">", or, where it holds markup, that may have begun before.
        condition = _CONDITION.match(comment)
        contents = [comment, comment[condition.end() :]] if condition else [comment]
        # Where nothing ends what it is the condition of, a reader may take "-->" for text, or for
        # the end.
        if self._in_doubt() and any(
            _left_open(content + end) for content in contents for end in ("", "-->")
        ):
            return True
        return any(runs(content, self._budget) for content in contents)

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
            if (
                self.rawdata.find("<", i + 1, k) >= 0 or self.rawdata[k - 2 : k] != "]]"
            ) and self._in_doubt():
                self._drop((self._inner and self.msg) or _GAP)
                return i + 9
        return super().parse_declaration(i)

    def handle_special(self, data: str) -> None:
        """Pass a declaration on, unless it might hold a script."""
        if harmful_declaration(data):
            self._drop(self.msg)
        else:
            super().handle_special(data)

    def handle_pi(self, data: str) -> None:
        """Pass a processing instruction on, unless it may run a script."""
        if harmful_pi(data) or ("<" in data and (runs(data, self._budget) or self._in_doubt())):
            self._drop(self.msg)
        else:
            super().handle_pi(data)

    def handle_unclosed(self, data: str) -> None:
        """Pass an unfinished construct on, unless it might become a script."""
        if not loosely_runs(data, self._budget):
            self.write(data)
            return
        end = re.match(r"</([a-z]+)(?=[ \t\n\r\f/>])", data, re.ASCII | re.IGNORECASE)
        if end and not self._inner and end[1].lower() in _RAW_ELEMENTS:
            self.write(end[0] + ">")  # else raw text that was checked would have another end
        self._drop(self.msg)


_TAG_BEGINS = re.compile("</?[A-Za-z]")


class _Ending(SGMLFilter):
    """Finds out where a reader is at the end of a text that it takes for HTML."""

    class _Nowhere:
        def write(self, text: str) -> None:
            pass

    def __init__(self) -> None:
        self.open = False
        super().__init__(self._Nowhere())

    def _attributes(self, text: str, pos: int) -> list[tuple[str, str]]:
        return []

    def finish_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> int:
        local = local_name(tag)
        if local.startswith("script") or (local in _RAW_ELEMENTS and local != "noscript"):
            self.set_rawtext(*_end_pattern("script" if local.startswith("script") else local))
        return -1

    def handle_rawtext(self, data: str, closed: bool) -> None:
        self.open = self.open or not closed

    def handle_unclosed(self, data: str) -> None:
        self.open = self.open or _TAG_BEGINS.match(data) is not None


def _left_open(text: str) -> bool:
    """Whether a reader that takes a text for HTML is still within something at its end.

    That is a tag, perhaps in an attribute's quotes, raw text or a CDATA section; what follows
    would be another thing to this reader than to the others.
    """
    if "<" not in text:
        return False
    parser = _Ending()
    parser.feed(text)
    parser.close()
    if parser.open or parser._raw_end is not None:
        return True
    return text.upper().rfind("<![CDATA[") > text.rfind("]]>")


_MARKUP = re.compile(r"<!\[CDATA\[|\]\]>|<!--.*?(?:-->|\Z)|<[^<>]*>", re.DOTALL | re.IGNORECASE)


def _bad_style(data: str) -> bool:
    """Whether a style sheet runs a script: as it stands, or as what markup in it leaves."""
    return bad_css(data) or ("<" in data and bad_css(_MARKUP.sub("", data)))


def _end_pattern(name: str) -> tuple[re.Pattern[str], int]:
    """What ends a raw element, and how long it can be (with one character after it)."""
    prefix = r"(?:[A-Za-z0-9]{1,20}:)?" if name == "script" else ""
    pattern = re.compile(rf"</{prefix}{name}(?=[ \t\n\r\f/>])", re.ASCII | re.IGNORECASE)
    return pattern, len(name) + 24


def _like_markup(value: str, budget: Budget | None) -> bool:
    """Whether a value would be markup, or end some, for a reader that found another quote."""
    return bool(_TAG_LIKE.search(value)) or runs(value, budget)


class _Guilty(Exception):
    """HTML has to be altered."""


class _Judge(HTMLScriptFilter):
    """Finds out whether HTML may stay as it is, byte for byte: raises `_Guilty` where it may not.

    People write ``<td width"50%">``, ``<td align="center" ">`` and ``<b</b>``.  Readers might
    cut this in different ways, so that what is text to one is an attribute to another; where a
    script is taken out of such HTML, all of that goes too.  But where nothing is that *any*
    reader could take for a script, however it cuts (`loosely_runs` of the whole), it may stay.
    """

    def __init__(self, budget: Budget, _inner: bool = False) -> None:
        super().__init__(_Ending._Nowhere(), _inner)
        self._budget = budget
        self.doubtful = False

    def _in_doubt(self) -> bool:
        self.doubtful = True
        return False

    def _vet(self, text: str) -> str:
        assert self._budget is not None
        inner = _Judge(self._budget, _inner=True)
        inner.feed(text)
        inner.close()
        self.doubtful = self.doubtful or inner.doubtful
        return text

    def _drop(self, instead: str) -> None:
        raise _Guilty

    def _safe_tag(self, tag: str, text: str) -> str:
        assert self._budget is not None
        self.doubtful = self.doubtful or bool(ODD_NAME.search(tag))
        if len(text) == len(tag) + len("<>"):
            return text
        refreshes = "http-equiv" in text.lower()
        for start, end, name, value in self._budget.attributes(iter_attributes(text, 1 + len(tag))):
            if _attribute_runs(tag, name, value, text[start:end], refreshes):
                raise _Guilty
            odd = ODD_NAME.search(name) or (value is not None and _TAG_LIKE.search(value))
            self.doubtful = self.doubtful or bool(odd)
            if value is not None and runs(value, self._budget):
                raise _Guilty
        return text


def _attribute_runs(tag: str, name: str, value: str | None, source: str, refreshes: bool) -> bool:
    return harmful(tag, name.lower(), value, refreshes) or not plain_value(value, source)


def _innocent(text: str, budget: Budget) -> bool:
    """Whether HTML holds nothing that has to go."""
    judge = _Judge(budget)
    try:
        _feed(judge, text, budget)
    except _Guilty:
        return False
    return not (judge.doubtful and loosely_runs(text, budget))


def clean_html(data: bytes, declared: list[str], budget: Budget) -> bytes | None:
    """HTML without scripts, None where there are none; `declared` are all charsets it claims."""
    return _clean(data, declared, budget, _filter_html)


def clean_xml(data: bytes, declared: list[str], budget: Budget) -> bytes | None:
    """XML without what a browser would run of it, None where it is mere data.

    A reader that knows no charset of the message's goes by what the document says itself, or by
    its bytes.
    """
    within = declared_charsets(data)
    clean = _clean(data, [*(declared or ["us-ascii"]), *within], budget, _filter_xml)
    if clean is None and xml_runs(data.decode("latin-1"), budget):
        raise LimitExceeded("XML with a script in another charset")
    return clean


def _clean(
    data: bytes, declared: list[str], budget: Budget, without_scripts: Callable[[str, Budget], str]
) -> bytes | None:
    charset = html_charset(data, declared[0] if declared else None)
    text = data.decode(charset, "replace")
    cleaned = without_scripts(text, budget)
    after = data if cleaned == text else cleaned.encode(charset, "xmlcharrefreplace")
    if (
        after.startswith(MARKS)
        and not data.startswith(MARKS)
        and charset not in ("utf-16", "utf-32")  # which have it written
    ):
        raise LimitExceeded("HTML with NULs before a byte order mark")
    for view in html_views(after, charset, declared, budget):
        if without_scripts(view, budget) not in (view, view.replace("\0", "")):
            raise LimitExceeded("HTML with a script in another charset")
    return None if after is data else after


def _filter_html(text: str, budget: Budget) -> str:
    if "\0" not in text and _innocent(text, budget):
        return text
    out = io.StringIO()
    parser = HTMLScriptFilter(out)
    parser._budget = budget
    _feed(parser, text, budget)
    return out.getvalue()


def _feed(parser: HTMLScriptFilter, text: str, budget: Budget) -> None:
    for start in range(0, len(text), 65536):
        budget.check_time()
        parser.feed(text[start : start + 65536])
    parser.close()


def _filter_xml(text: str, budget: Budget) -> str:
    if not xml_runs(text, budget):
        return text
    cleaned = _filter_html(text, budget)
    if xml_runs(cleaned, budget):
        raise LimitExceeded("XML with a script")
    return cleaned


def check_packed(data: bytes, budget: Budget) -> None:
    """Raise LimitExceeded where gzip packs XML, a drawing as a rule, that runs scripts."""
    if clean_xml(inflate(data, budget), [], budget) is not None:
        raise LimitExceeded("a compressed drawing with a script")
