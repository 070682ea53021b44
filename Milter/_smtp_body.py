"""A message in the form that an SMTP server takes after DATA.

Lines end in CRLF and have at most 998 bytes (RFC 5321 section 4.5.3.1.6); a server without 8BITMIME
gets nothing but ASCII (RFC 6152 section 3). What breaks these rules is put into a transfer
encoding, part by part, with the bytes that it has: which characters they are is for the reader to
know. Everything else stays as it is, byte for byte, which is why no parser of :mod:`email` is used:
writing back what it has read changes more than that.
"""

from __future__ import annotations

import base64
import binascii
import copy
import email.message
import re
import urllib.parse

from . import _charsets, _domains

__all__ = ["Unsendable", "for_data"]

#: The longest line in bytes, without its CRLF.
LONGEST_LINE = 998
#: How deep messages and multiparts may be nested where one of them needs a change.
_DEEPEST = 50

#: A header field with its folds.
_FIELD = re.compile(rb"(?:From |[!-9;-~]*[ \t]*:)[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*")
#: A quoted string; one without an end reaches to the end, so that it is looked for but once.
_QUOTED = rb'"((?:[^"\\]|\\[\s\S])*)(?:"|\\?\Z)'

_ADDRESSES = re.compile(
    rb"(?:resent-)?(?:from|sender|to|cc|bcc|reply-to)|errors-to|return-path"
    rb"|disposition-notification-to"
)
_PARAMETER = re.compile(
    rb";(\s*)([A-Za-z0-9!#$%&+^_`{}~.-]+)\s*=\s*(?:" + _QUOTED + rb'|([^\s;"]+))'
)
#: White space, a quoted string, a special, an atom.
_TOKEN = re.compile(rb"\s+|" + _QUOTED + rb'|[()<>@,;:"\[\]]|[^\s()<>@,;:"\[\]]+')


class Unsendable(Exception):
    """The message cannot be brought into a form that the server takes; the text says why."""


def for_data(msg: email.message.Message | str | bytes, eight_bit: bool) -> bytes:
    """Write a message as DATA wants it, but for the dots.

    Args:
        msg: the message; text is sent as UTF-8, lone surrogates as the bytes that they stand for
        eight_bit: whether the server takes bytes other than ASCII

    Raises:
        Unsendable: the message cannot be sent in such a form
    """
    # A lone CR or LF might end the message early in the eyes of some servers.
    data = _as_bytes(msg).replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return _converted(data, eight_bit) if _needs_change(data, eight_bit) else data


def _needs_change(data: bytes, eight_bit: bool) -> bool:
    return not (eight_bit or data.isascii()) or _has_long_line(data)


def _has_long_line(data: bytes) -> bool:
    start = 0
    while len(data) - start > LONGEST_LINE:
        # As far on as possible: whatever ends there is short enough.
        end = data.rfind(b"\r\n", start, start + LONGEST_LINE + 2)
        if end < 0:
            return True
        start = end + 2
    return False


# --- bytes of a message --------------------------------------------------------------------


def _as_bytes(msg: email.message.Message | str | bytes) -> bytes:
    if isinstance(msg, bytes):
        return msg
    if isinstance(msg, str):
        return _text_bytes(msg)
    policy = msg.policy.clone(linesep="\r\n", cte_type="8bit")
    try:
        return msg.as_bytes(policy=policy)
    except UnicodeError:
        return _with_bytes(msg).as_bytes(policy=policy)


def _text_bytes(text: str, codec: str = "utf-8") -> bytes:
    """Encode text; a surrogate that stands for no byte becomes a question mark."""
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", text).encode(codec, "surrogateescape")


def _with_bytes(msg: email.message.Message) -> email.message.Message:
    """Copy a message that was given text where the bytes of a charset belong."""
    msg = copy.deepcopy(msg)
    for part in msg.walk():
        for name, value in part.raw_items():
            if isinstance(value, str) and re.search("[\ud800-\udc7f\udd00-\udfff]", value):
                part.replace_header(name, re.sub("[\ud800-\udfff]", "?", value))
        # get_payload() would decode the bytes that are there already.
        text = getattr(part, "_payload", None)
        if isinstance(text, str) and not text.isascii():
            try:
                charset = part.get_content_charset("us-ascii")
                data = _text_bytes(text, _charsets.codec_for(charset) or "us-ascii")
            except UnicodeError:
                data = _text_bytes(text)
                part.set_param("charset", "utf-8")
            part.set_payload(data.decode("ascii", "surrogateescape"))
    return msg


# --- transfer encodings --------------------------------------------------------------------


def _converted(data: bytes, eight_bit: bool, depth: int = 0, kind: str = "text/plain") -> bytes:
    """Convert an entity: header, empty line and body, as one of a multipart or all of a message.

    Args:
        data: the entity, all its line ends CRLF
        eight_bit: whether bytes other than ASCII may stay
        depth: in how many others it is
        kind: the content type of one that names none
    """
    if depth > _DEEPEST:
        raise Unsendable(f"parts are nested more than {_DEEPEST} deep")
    entity = _Entity(data, kind)
    if _needs_change(entity.body, eight_bit):
        if entity.boundary is None and not entity.holds_message:
            _encode(entity, top=depth == 0)
        else:
            if entity.boundary is not None:
                entity.body = _converted_parts(entity, entity.boundary, eight_bit, depth)
            else:
                entity.body = _converted(entity.body, eight_bit, depth + 1)
            if entity.body.isascii() and entity.encoding in ("8bit", "binary"):
                entity.set(b"Content-Transfer-Encoding", b"7bit")
    entity.fields = [_sendable_field(field, eight_bit) for field in entity.fields]
    return bytes(entity)


class _Entity:
    """A header, field by field, and the body after it."""

    def __init__(self, data: bytes, kind: str) -> None:
        if not data.endswith(b"\r\n"):
            # The last line may be a field.
            data, self._tail = data + b"\r\n", b"\r\n"
        else:
            self._tail = b""
        self.fields: list[bytes] = []
        end = 0
        while field := _FIELD.match(data, end):
            self.fields.append(field[0])
            end = field.end()
        self._gap = b"\r\n" if data.startswith(b"\r\n", end) else b""
        self.body = data[end + len(self._gap) :]
        if self._tail and self.body:
            self.body, self._tail = self.body[:-2], b""
        content_type = self.get(b"content-type")
        given = re.match(rb"\s*([^\s;/]+/[^\s;]+)", content_type)
        self.kind = given[1].decode("latin-1").lower() if given else kind
        self.encoding = self.get(b"content-transfer-encoding").decode("latin-1").strip().lower()
        self.boundary = _boundary(content_type) if self.kind.startswith("multipart/") else None

    @property
    def holds_message(self) -> bool:
        """Whether the body is a message of its own, which has no transfer encoding."""
        return self.kind in ("message/rfc822", "message/global", "message/news") and (
            self.encoding in ("", "7bit", "8bit", "binary")
        )

    def get(self, name: bytes) -> bytes:
        """Return a field's value, without the line ends of folds; empty where there is none."""
        for field in self.fields:
            key, colon, value = field.partition(b":")
            if colon and key.strip().lower() == name.lower():
                return value.replace(b"\r\n", b"")
        return b""

    def set(self, name: bytes, value: bytes) -> None:
        """Set a field, in its place where there is one."""
        new = name + b": " + value + b"\r\n"
        for i, field in enumerate(self.fields):
            if field.partition(b":")[0].strip().lower() == name.lower():
                self.fields[i] = new
                return
        self.fields.append(new)
        self._gap = b"\r\n"

    def __bytes__(self) -> bytes:
        data = b"".join(self.fields) + self._gap + self.body
        return data[:-2] if self._tail and data.endswith(b"\r\n") else data


def _boundary(content_type: bytes) -> bytes | None:
    found = re.search(rb";\s*boundary\s*=\s*(?:" + _QUOTED + rb"|([^\s;]+))", content_type, re.I)
    if not found:
        return None
    boundary = found[2] if found[1] is None else _unquoted(found[1])
    return boundary.rstrip() or None


def _converted_parts(entity: _Entity, boundary: bytes, eight_bit: bool, depth: int) -> bytes:
    """Convert the parts of a multipart, each by itself."""
    kind = "message/rfc822" if entity.kind == "multipart/digest" else "text/plain"
    delimiter = re.compile(rb"(?:\A|\r\n)--" + re.escape(boundary) + rb"(--)?[ \t]*(?=\r\n|\Z)")
    out: list[bytes] = []
    start, last = 0, None
    for found in delimiter.finditer(entity.body):
        piece = entity.body[start : found.start()]
        out += [_part(piece, eight_bit, depth, kind) if out else _shown(piece, eight_bit), found[0]]
        start, last = found.end(), found
        if found[1]:
            break
    if last is None:
        raise Unsendable("a multipart has no parts")
    piece = entity.body[start:]
    out.append(_shown(piece, eight_bit) if last[1] else _part(piece, eight_bit, depth, kind))
    return b"".join(out)


def _part(piece: bytes, eight_bit: bool, depth: int, kind: str) -> bytes:
    """Convert what stands after a delimiter, the delimiter's own line end first."""
    if not _needs_change(piece, eight_bit):
        return piece
    return piece[:2] + _converted(piece[2:], eight_bit, depth + 1, kind)


def _shown(text: bytes, eight_bit: bool) -> bytes:
    """Make text before the first part or after the last sendable, its bytes still to be seen."""
    if not eight_bit:
        text = re.sub(rb"[\x80-\xff]", lambda m: b"=%02X" % ord(m[0]), text)
    return re.sub(rb"([^\r\n]{%d})(?=[^\r\n])" % LONGEST_LINE, rb"\1\r\n", text)


def _encode(entity: _Entity, top: bool) -> None:
    """Put a body into a transfer encoding."""
    if entity.encoding == "base64":
        entity.body = _wrapped(re.sub(rb"[^A-Za-z0-9+/=]+", b"", entity.body))
        return
    if entity.encoding == "quoted-printable":
        data = binascii.a2b_qp(entity.body)
    elif entity.encoding in ("", "7bit", "8bit", "binary"):
        data = entity.body
    else:
        raise Unsendable(f"a part is in the unknown encoding {entity.encoding!r}")
    if entity.kind.startswith("multipart/") or entity.kind == "message/partial":
        # RFC 2045 section 6.4: they have no encoding of their own.
        raise Unsendable(f"a part of type {entity.kind} cannot be encoded")
    if top and not entity.get(b"mime-version"):
        entity.set(b"MIME-Version", b"1.0")
    if not entity.get(b"content-type").strip() and not data.isascii():
        entity.set(b"Content-Type", b"text/plain; charset=" + _charset_of(data))
    if entity.kind.startswith(("text/", "message/")) or entity.encoding == "quoted-printable":
        entity.set(b"Content-Transfer-Encoding", b"quoted-printable")
        entity.body = re.sub(rb"\r?\n", b"\r\n", binascii.b2a_qp(data, istext=True))
    else:
        entity.set(b"Content-Transfer-Encoding", b"base64")
        entity.body = _wrapped(base64.b64encode(data))


def _wrapped(text: bytes) -> bytes:
    return b"\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + b"\r\n"


def _charset_of(data: bytes) -> bytes:
    """Name the charset of bytes that say nothing of it (RFC 1428 section 3)."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return b"unknown-8bit"
    return b"utf-8"


# --- header fields -------------------------------------------------------------------------


def _sendable_field(field: bytes, eight_bit: bool) -> bytes:
    """Encode what a field has beside ASCII, and fold lines that are too long."""
    if not eight_bit and not field.isascii():
        name, colon, value = field.partition(b":")
        field = name + colon + _ascii_value(name.strip().lower(), value)
        if not field.isascii():
            shown = name.decode("ascii", "backslashreplace")
            raise Unsendable(f"the header field {shown[:80]} cannot be written in ASCII")
    return _folded(field) if _has_long_line(field) else field


def _ascii_value(name: bytes, value: bytes) -> bytes:
    if name in (b"content-type", b"content-disposition"):
        return _PARAMETER.sub(_encoded_parameter, value)
    if _ADDRESSES.fullmatch(name):
        return _encoded_tokens(_ascii_domains([m[0] for m in _TOKEN.finditer(value)]))
    return _encoded_tokens(re.findall(rb"\s+|\S+", value))


def _ascii_domains(tokens: list[bytes]) -> list[bytes]:
    """Write the domains of addresses in ASCII, and the quoted strings as what they quote."""
    out = []
    for i, token in enumerate(tokens):
        if i and tokens[i - 1] == b"@":
            domain = _domains.canonical(token.decode("utf-8", "surrogateescape"))
            token = domain.encode("utf-8", "surrogateescape")
            local = token
        else:
            local = token if tokens[i + 1 : i + 2] == [b"@"] else b""
        if not local.isascii():
            raise Unsendable("an address in the header cannot be written in ASCII")
        if token.startswith(b'"') and not token.isascii():
            token = _unquoted(re.sub(_QUOTED, rb"\1", token))
        out.append(token)
    return out


def _encoded_tokens(tokens: list[bytes]) -> bytes:
    """Encode the tokens that are not ASCII; those in a row with the white space between them."""
    out: list[bytes] = []
    row: list[bytes] = []
    for token in [*tokens, b""]:
        if not token.isascii() or (row and token.isspace()):
            row.append(token)
            continue
        if row:
            space = row.pop() if row[-1].isspace() else b""
            out += [_encoded_words(b"".join(row)), space]
            row = []
        out.append(token)
    return b"".join(out)


def _encoded_words(data: bytes) -> bytes:
    """Write bytes as encoded words, each at most 75 characters long (RFC 2047 section 2)."""
    data = re.sub(rb"\s+", b" ", data)
    charset = _charset_of(data)
    pieces = []
    start = 0
    while start < len(data):
        end = start + 39
        # A character is in one word (section 5).
        while charset == b"utf-8" and end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(b"=?%s?b?%s?=" % (charset, base64.b64encode(data[start:end])))
        start = end
    return b"\r\n ".join(pieces)


def _unquoted(inner: bytes) -> bytes:
    return re.sub(rb"\\([\s\S])", rb"\1", inner)


def _encoded_parameter(found: re.Match[bytes]) -> bytes:
    """Write a parameter as RFC 2231 section 4 has it, where it needs to be."""
    if found[0].isascii():
        return found[0]
    data = found[4] if found[3] is None else _unquoted(found[3])
    data = data.replace(b"\r\n", b"")
    quoted = urllib.parse.quote_from_bytes(data, safe="").encode()
    return b";%s%s*=%s''%s" % (found[1], found[2], _charset_of(data), quoted)


def _folded(field: bytes) -> bytes:
    """Fold lines at white space; where there is none a fold adds some, as MTAs do it."""
    out: list[bytes] = []
    least = field.find(b":") + 1  # the name does not stand alone
    for line in field[:-2].split(b"\r\n"):
        start, lead = 0, b""
        while len(line) - start + len(lead) > LONGEST_LINE:
            end = start + LONGEST_LINE - len(lead)
            at = max(line.rfind(white, start, end + 1) for white in (b" ", b"\t"))
            folds = at > start and line[max(start, least) : at].strip()
            end = at if folds else end
            out.append(lead + line[start:end])
            start, lead, least = end, b"" if folds else b" ", 0
        out.append(lead + line[start:])
        least = 0
    # A line of nothing but white space may end the header.
    return b"".join(line + b"\r\n" for line in out if line.strip())
