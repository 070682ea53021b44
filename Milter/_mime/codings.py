"""Transfer encodings, and bytes as text under whatever charset the mail names."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

from Milter._charsets import codec_for

# Code pages of EBCDIC that Python lacks.  They agree on all that markup and extensions are made of
# (IBM's syntactic character set, 640), so that one of them shows what is in the others.
_EBCDIC = re.compile(
    r"(?:.*ebcdic.*|(?:x-)?(?:ibm|cp|ccsid|csibm)[-_]?0*(?:2[78][0-9]|297|423|87[01]|880|905|918|924"
    r"|102[57]|1047|11[123][0-9]|11[45][0-9]|12[0-9]{3}|2027[3-9]|202[89][0-9]|20[4-9][0-9]{2}"
    r"|2102[57]))\Z",
    re.IGNORECASE,
)


def codec(label: str) -> str:
    """The codec for a charset as the mail names it; LookupError where there is none.

    For a code page of EBCDIC that Python lacks it is another one's.
    """
    known = codec_for(label, widest=False)
    if known is None:
        if len(label) > 100 or not _EBCDIC.match(label):
            raise LookupError("unknown charset")
        known = "cp037"
    return known.replace("_", "-")


def to_text(data: bytes, charset: str = "utf-8") -> str:
    """Bytes as text under whatever name of a charset the mail gives; never fails."""
    for name in (charset, "utf-8"):
        try:
            return str(data, codec(name))
        except (LookupError, ValueError):  # unknown, no text encoding, or it does not fit
            continue
    return data.decode("latin-1")


def as_str(raw: bytes) -> str:
    return raw.decode("ascii", "surrogateescape")


def as_bytes(text: str) -> bytes:
    try:
        return text.encode("ascii", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_NOT_BASE64 = bytes(set(range(256)) - set(_BASE64))
_QUADS = re.compile(rb"(?:[^=]{4})+|.{1,4}")


def decode_base64(data: bytes) -> bytes:
    """Decode base64 as the most forgiving reader would: any junk, any padding."""
    runs = data.translate(None, _NOT_BASE64).split(b"=")
    return b"".join(map(_decode_run, filter(None, runs)))


def is_riddled(text: str, encoding: str) -> bool:
    """Whether nobody can have encoded this: so many ``=`` are where they are read in several ways.

    They would take long to follow; what programs get wrong has few of them.
    """
    coding = CODINGS.get(encoding)
    count = 0
    if coding == "base64":
        count = text.count("=")
    elif coding == "quoted-printable":
        count = sum(map(text.count, ("==", "= ", "=\t", "=\r"))) - text.count("=\r\n")
    return count > 10_000 and count > len(text) // 8


def _decode_run(run: bytes) -> bytes:
    """Decode characters of base64 alone, as far as they make whole bytes."""
    run = run[: len(run) - (len(run) % 4 == 1)]
    return binascii.a2b_base64(run + b"=" * (-len(run) % 4))


def _base64_readings(data: bytes) -> list[bytes]:
    """What readers make of base64; they agree unless something follows a ``=``.

    For some a new group of four begins there, others pass over it as over any other junk (Python
    and its kin, where it cannot be padding), and for others it holds a place in its group (glib,
    Mozilla).  Those who stop there read the beginning of one of these.
    """
    readings = [decode_base64(data)]
    text = data.translate(None, _NOT_BASE64)
    padding = text.find(b"=")
    if padding >= 0 and text[padding:].strip(b"="):
        readings.append(_decode_run(text.replace(b"=", b"")))
        readings.append(b"".join(_decode_quads(text)))
    return readings


def _decode_quads(text: bytes) -> Iterator[bytes]:
    """Decode base64 in which each ``=`` stands for a byte less of its group of four."""
    for found in _QUADS.finditer(text):
        quads = found.group()
        missing = quads.count(b"=")
        decoded = _decode_run(quads.replace(b"=", b"A"))
        yield decoded[: max(0, len(decoded) - missing)]


# An "=" before something else than two digits or the end of its line: readers disagree.
_ODD_QP = re.compile(rb"=(?:[ \t=]|\r(?!\n))")
_SOFT_BREAK = re.compile(rb"=[ \t]*(?:\r\n|[\r\n]|\Z)")
_SOFT_BREAK_BY_LF = re.compile(rb"=[ \t]*(?:\r?\n|\Z)")
_BARE_EQUALS = re.compile(rb"=(?![0-9A-Fa-f]{2})")
_BARE_EQUALS_IN_LINE = re.compile(rb"=(?![0-9A-Fa-f]{2}|[ \t]*(?:[\r\n]|\Z))")
_BARE_EQUALS_IN_LINE_BY_LF = re.compile(rb"=(?![0-9A-Fa-f]{2}|[ \t]*(?:\r?\n|\Z))")


def _quoted_printable_readings(data: bytes) -> list[bytes]:
    """What readers make of quoted-printable; they agree on what is well formed.

    Python drops what follows ``=`` and a lone CR up to the next LF, and takes ``==`` for one.  For
    others the CR ends the line as LF does, or is an ordinary character; blanks may stand before the
    end of the line (RFC 2045, 6.7, rule 3); and some join lines before they decode the rest.
    """
    readings = [binascii.a2b_qp(data)]
    if _ODD_QP.search(data):
        joined = _SOFT_BREAK.sub(b"", data)
        in_order = _SOFT_BREAK.sub(b"", _BARE_EQUALS_IN_LINE.sub(b"=3D", data))
        by_lf = _SOFT_BREAK_BY_LF.sub(b"", _BARE_EQUALS_IN_LINE_BY_LF.sub(b"=3D", data))
        views = (_BARE_EQUALS.sub(b"=3D", view) for view in (joined, in_order, by_lf))
        readings.extend(map(binascii.a2b_qp, views))
    return readings


def _decode_uu(data: bytes) -> bytes:
    out = []
    inside = False
    for line in data.splitlines():
        if not inside:
            inside = line.startswith((b"begin ", b"begin\t"))
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
CODINGS = {
    "base64": "base64",
    "quoted-printable": "quoted-printable",
    **dict.fromkeys(("x-uuencode", "uuencode", "uue", "x-uue"), "uuencode"),
}


def undo(data: bytes, encoding: str) -> bytes:
    """Undo the transfer encoding (RFC 2045, section 6)."""
    coding = CODINGS.get(encoding)
    if coding == "base64":
        return decode_base64(data)
    if coding == "quoted-printable":
        return binascii.a2b_qp(data)
    if coding == "uuencode":
        return _decode_uu(data)
    return data


def readings(data: bytes, encoding: str) -> list[bytes]:
    """What readers might make of data in a transfer encoding; that of `undo` comes first."""
    coding = CODINGS.get(encoding)
    if coding == "base64":
        found = _base64_readings(data)
    elif coding == "quoted-printable":
        found = _quoted_printable_readings(data)
    else:
        return [undo(data, encoding)]
    return list(dict.fromkeys(found)) if len(found) > 1 else found


def apply(data: bytes, encoding: str) -> bytes:
    """Apply the transfer encoding."""
    coding = CODINGS.get(encoding)
    if coding == "base64":
        return base64.encodebytes(data)
    if coding == "quoted-printable":
        return binascii.b2a_qp(data)
    if coding == "uuencode":
        return _encode_uu(data)
    return data


def _encode_uu(data: bytes) -> bytes:
    lines = [binascii.b2a_uu(data[at : at + 45], backtick=True) for at in range(0, len(data), 45)]
    return b"begin 644 part\n" + b"".join(lines) + b"`\nend\n"
