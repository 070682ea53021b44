"""XML that a browser runs: elements of XHTML and SVG in whatever document, compressed or not.

XML is data, mostly, and stays as it is.  What runs is told by the namespaces, wherever in the
document they stand: so it is read as browsers read it, by an XML parser.
"""

from __future__ import annotations

import re
import zlib
from typing import Any
from xml.parsers import expat

from Milter._mime.css import bad_css, squeeze, unescape
from Milter._mime.limits import Budget
from Milter._mime.markup import harmful

GZIP_MAGIC = b"\x1f\x8b"

_XSLT = "http://www.w3.org/1999/XSL/Transform"
_XLINK = "http://www.w3.org/1999/xlink"
# The vocabularies whose elements browsers show, and whose attributes handle events.
_SHOWN = frozenset(
    (
        "http://www.w3.org/1999/xhtml",
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1998/Math/MathML",
        "http://www.w3.org/TR/REC-html40",  # Internet Explorer's
        "http://www.mozilla.org/keymaster/gatekeeper/there.is.only.xul",
        "http://www.mozilla.org/xbl",
    )
)
_RUNNING = _SHOWN | {"urn:schemas-microsoft-com:xslt"}  # MSXML's scripts within style sheets
_SCRIPT_ELEMENTS = frozenset(("script", "handler"))  # that of SVG Tiny 1.2
# Without any of these no element means anything to a browser.  A document that declares entities
# can spell them otherwise.
_MARKS = (*_RUNNING, _XSLT, _XLINK, "<!entity", "<?xml-stylesheet")
_LOWER_MARKS = tuple(mark.lower() for mark in _MARKS)
# The byte order mark also as Latin-1 has it.
_BEFORE = re.compile(r"(?:\s|\ufeff|\xef\xbb\xbf)*(?:<\?xml\s[^>]*\?>\s*)?")
_HREF = re.compile(r"href\s*=\s*[\"']([^\"']*)")
_MAX_ENTITIES = 256
_PIECE = 1 << 16


class _Runs(Exception):
    """Something in the document runs."""


class _Judge:
    """Looks at every element of a document, as expat reads it."""

    def __init__(self, text: str, budget: Budget) -> None:
        self.text = text
        self.budget = budget
        self.entities = 0
        self.count = 0
        self.sheet: list[str] | None = None
        self.styled_by_itself = False

    def run(self) -> None:
        """Raise `_Runs` where something runs; what is no XML ends where it stops to be that."""
        parser = expat.ParserCreate("utf-8", " ")
        parser.buffer_text = True
        parser.UseForeignDTD(True)  # of which browsers know the entities
        parser.StartElementHandler = self.start
        parser.EndElementHandler = self.end
        parser.CharacterDataHandler = self.data
        parser.ProcessingInstructionHandler = self.instruction
        parser.EntityDeclHandler = self.entity
        try:
            parser.Parse(self.text.encode("utf-8", "replace"), True)
        except expat.ExpatError:
            return

    def tick(self) -> None:
        self.count += 1
        if not self.count % 64:
            self.budget.check_time()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.tick()
        space, _, name = tag.rpartition(" ")
        if space == _XSLT and self.styled_by_itself:
            raise _Runs  # its own program
        if space in _RUNNING and name.lower() in _SCRIPT_ELEMENTS:
            raise _Runs
        shown = space in _SHOWN
        for key, value in attributes.items():
            prefix, _, attribute = key.rpartition(" ")
            if shown and harmful(name.lower(), attribute.lower(), value):
                raise _Runs
            if prefix == _XLINK and harmful(name.lower(), "href", value):
                raise _Runs
        self.sheet = [] if shown and name.lower() == "style" else self.sheet

    def end(self, tag: str) -> None:
        if self.sheet is not None and tag.lower().endswith(" style"):
            if bad_css("".join(self.sheet)):
                raise _Runs
            self.sheet = None

    def data(self, text: str) -> None:
        self.tick()
        if self.sheet is not None:
            self.sheet.append(text)

    def instruction(self, target: str, data: str) -> None:
        if target != "xml-stylesheet":
            return
        href = _HREF.search(unescape(data))
        where = squeeze(href[1]) if href else ""
        if where.startswith("data:") or harmful("?", "href", where):
            raise _Runs
        self.styled_by_itself = self.styled_by_itself or where in ("", ".") or "#" in where

    def entity(self, name: str, is_parameter: bool, value: str | None, *rest: Any) -> None:
        """Refuse entities that would be markup, or that grow; drawing programs write no such."""
        if value is None:
            return  # external: no browser loads it
        self.entities += 1
        times = self.text.count(f"&{name};") if len(value) > 16 else 0
        if is_parameter or "<" in value or "&" in value or self.entities > _MAX_ENTITIES:
            raise _Runs
        if len(value) * times > 1_000_000 + len(self.text):
            raise _Runs


def xml_runs(text: str, budget: Budget) -> bool:
    """Whether a browser would run something of an XML document."""
    text = text.replace("\0", "")  # UTF-16 that nothing declares
    lowered = unescape(text).lower() if "&" in text else text.lower()
    if not any(mark in lowered for mark in _LOWER_MARKS):
        return False
    budget.check_time()
    try:
        _Judge(_BEFORE.sub("", text, count=1), budget).run()
    except _Runs:
        return True
    return False


def declared_charsets(data: bytes) -> list[str]:
    """The charset that the XML declaration names, or that its first bytes tell."""
    if data.startswith(b"\x4c\x6f\xa7\x94"):  # "<?xm"
        return ["cp037"]
    found = re.match(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._:-]{1,60})", data)
    return [found[1].decode("ascii")] if found else []


def inflate(data: bytes, budget: Budget) -> bytes:
    """What gzip packed, as far as it can be read, all of its members; no checksum counts."""
    out: list[bytes] = []
    while data.startswith(GZIP_MAGIC):
        start = _after_gzip_header(data)
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        data = data[start:]
        while data and not unpacker.eof:
            before = unpacker.copy()
            try:
                out.append(unpacker.decompress(data, _PIECE))
            except zlib.error:
                out.append(_before_the_fault(before, data[: 2 * _PIECE]))
                return b"".join(out)
            budget.unpack(len(out[-1]))
            data = unpacker.unconsumed_tail
        data = unpacker.unused_data[8:]
    return b"".join(out)


def _after_gzip_header(data: bytes) -> int:
    """Where the packed data begins (RFC 1952, section 2.3)."""
    flags, pos = data[3] if len(data) > 3 else 0, 10
    if flags & 4:
        pos += 2 + int.from_bytes(data[pos : pos + 2], "little")
    for flag in (8, 16):  # a name, a comment
        if flags & flag:
            pos = data.find(b"\0", pos) + 1 or len(data)
    return pos + (2 if flags & 2 else 0)


def _before_the_fault(unpacker: Any, data: bytes) -> bytes:
    """What can be unpacked before the data is no more what it should be."""
    out = []
    try:
        for pos in range(len(data)):
            out.append(unpacker.decompress(data[pos : pos + 1]))
    except zlib.error:
        pass
    return b"".join(out)
