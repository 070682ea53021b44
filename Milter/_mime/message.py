"""`MimeMessage`: a message that is written back as it was read where nobody changed it."""

from __future__ import annotations

import email.utils
import itertools
import re
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from email.generator import BytesGenerator
from email.message import Message
from typing import Any, BinaryIO

from Milter._charsets import codec_for
from Milter._mime.boundaries import DASHED_LINE
from Milter._mime.codings import CODINGS, as_bytes, as_str, codec, is_riddled, undo
from Milter._mime.codings import readings as readings_of
from Milter._mime.containers import ENCODED_HEAD, names_in_head, names_in_text
from Milter._mime.feedparser import Lines
from Milter._mime.fields import (
    RFC2231_NAME,
    collapse,
    described_names,
    header_names,
    loose_parameters,
    name_variants,
    own_value,
    parseparam,
    readable,
    readings,
    split_parameters,
    unfold,
    unquote,
    value_beginnings,
    without_comments,
)
from Milter._mime.limits import Budget, ZipLimit, settings
from Milter._mime.parsing import Source, parse
from Milter._mime.zips import ZIP_MAGIC, ZIP_TYPES, is_zip_name, names_in_zip


def message_from_file(fp: BinaryIO) -> MimeMessage:
    """Read a message, up to the end of the file.

    It never fails on what the message holds: what cannot be parsed is one opaque part.

    Args:
        fp: a binary file.
    """
    return MimeMessage(fp)


_HEADER_LINE = re.compile(rb"(From |[\041-\071\073-\176]*:|[\t ])[^\r\n]*(?:\r\n|\r|\n|\Z)")
_EMPTY_LINE = re.compile(rb"\r\n|\r|\n")
_HIDDEN_PARTS = re.compile(
    r"(?:\A|[\r\n])content-(?:type|disposition|transfer-encoding)[ \t]*:", re.IGNORECASE
)
_NAMING = re.compile(r"(?:.*\s)?(?:file)?name", re.IGNORECASE | re.DOTALL)
_CONTAINERS = ("message/", "multipart/")
_NAMED_BY = ("content-name", "x-sun-data-name", "content-description", "content-location")
_NAME_HEADERS = ("content-type", "content-disposition", *_NAMED_BY)
_MEDIA_TYPE = re.compile(r"[\s\"'<]*([^\s\"'<>;,/()]+)\s*/\s*([^\s\"'<>;,/()]+)")


class MimeMessage(Message):
    """A message, or a part of one, that knows whether it was modified.

    Args:
        fp: a binary file to read the message from; without one the message is empty.
        seekable: accepted for compatibility; changes nothing.

    Attributes beside those of `email.message.Message`:

    ``headerchange``
        None, or a function that is called as ``headerchange(msg, name, value)``: with None as the
        value before all headers of that name are deleted (there may be none), and with the text
        after one was added.  `replace_header` and `set_boundary` do not call it.
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
        self._submsg: Any = None
        self._misread: str | None = None
        # the headers that only those see for whom a lone CR ends no line: (lower name, value)
        self._other_fields: list[tuple[str, str]] = []
        self._reading: Lines | None = None  # while it is read
        self._chosen: tuple[list[str], str] | None = None
        self._parts_after_end = False
        self._source: Source | None = None
        self._root: MimeMessage = self
        self._first = self._last = 0  # where it was read, in characters
        self._span = (0, 0)
        self._remember()
        if fp is not None:
            data: Any = fp.read()
            parse(as_bytes(data) if isinstance(data, str) else bytes(data), self)

    @staticmethod
    def _blank() -> MimeMessage:
        """An empty message, for the parser to fill."""
        return MimeMessage()

    # -- what was modified

    def _settle(self, source: Source, root: MimeMessage) -> None:
        """The part is read: what it is like now is unmodified."""
        self._source = source
        self._root = root
        self._reading = None
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
        self._tell(name, str(value))

    def __delitem__(self, name: str) -> None:
        """Delete all headers of that name; no error where there are none."""
        # Before they go: applications count the values to delete as many from the message.
        self._tell(name, None)
        super().__delitem__(name)
        if self._other_fields:
            self._other_fields = [f for f in self._other_fields if f[0] != name.lower()]

    @property
    def submsg(self) -> Any:
        """The list of the parts, None for a part without; assigning to it changes nothing else."""
        if self._submsg is not None:
            return self._submsg
        return self._payload if isinstance(self._payload, list) else None

    @submsg.setter
    def submsg(self, value: Any) -> None:
        self._submsg = value

    # -- reading headers and content

    def _get_params_preserve(self, failobj: Any, header: str) -> Any:
        """The standard method, without its quadratic time and its failures on odd values."""
        value = self.get(header)
        if value is None:
            return failobj
        params = []
        for piece in parseparam(value, settings.MAX_PARAMETERS + 1):
            name, _, text = piece.partition("=")
            match = RFC2231_NAME.match(name)
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
                return unquote_value(value) if unquote else value
        return failobj

    def _plain_parameter(self, param: str, header: str) -> str | None:
        """A parameter as it stands, where it is not in RFC 2231's form."""
        for piece in parseparam(self.get(header, ""), settings.MAX_PARAMETERS + 1):
            name, equals, value = piece.partition("=")
            if equals and name == param:
                return value
        return None

    def _parameter(self, param: str, header: str) -> str | None:
        """A parameter's value as text, also where semicolons are missing around it."""
        plain = self._plain_parameter(param, header)
        if plain is not None:
            short = len(plain) <= settings.MAX_NAME_TEXT
            return email.utils.unquote(own_value(plain) if short else plain)
        value = self.get_param(param, None, header)
        if value is not None:
            return collapse(value)
        text = str(self.get(header, ""))[: settings.MAX_NAME_TEXT]
        if param in text.lower():
            for name, loose in loose_parameters(text):
                if name == param:
                    return email.utils.unquote(loose)
        return None

    def _claimed_boundaries(self) -> list[str]:
        """What readers might take for the boundary, the likeliest first."""
        found = [self._parameter("boundary", "content-type")]
        plain = self._plain_parameter("boundary", "content-type")
        if plain is not None:
            found.append(email.utils.unquote(plain))
            found.extend(value_beginnings(plain))
        texts = [text.rstrip() for text in found if text is not None]
        return list(dict.fromkeys(text.strip('"') or text for text in texts))

    def get_boundary(self, failobj: Any = None) -> Any:
        """The boundary of a multipart, also where it was quoted twice.

        Where it can be read in several ways, the first that begins a part.  One longer than
        `MAX_BOUNDARY` is none.
        """
        claimed = self._claimed_boundaries()
        if not claimed:
            return failobj
        boundary = claimed[0]
        if len(claimed) > 1:
            if self._reading is not None:
                boundary = next(iter(self._reading.marks_to_come(claimed)), boundary)
                self._chosen = claimed, boundary
            elif self._chosen and self._chosen[0] == claimed:
                boundary = self._chosen[1]
        if len(boundary) > settings.MAX_BOUNDARY or not boundary:
            return failobj
        if self._reading is not None:
            self._reading.expect(boundary)
        return boundary

    def get_filename(self, failobj: Any = None) -> Any:
        """The file's name: Content-Disposition's filename, or else Content-Type's name."""
        for param, header in (("filename", "content-disposition"), ("name", "content-type")):
            value = self._parameter(param, header)
            if value is not None:
                return unfold(value).strip()
        return failobj

    def get_content_charset(self, failobj: Any = None) -> Any:
        """The charset parameter in lower case, `failobj` where there is none of use."""
        value = self._parameter("charset", "content-type")
        if value is None:
            return failobj
        charset = without_comments(value).strip().lower()
        charset = next(value_beginnings(charset), unquote(charset))
        return charset if charset.isascii() else failobj

    def get_payload(self, i: int | None = None, decode: bool = False) -> Any:
        """The payload, as in the standard library, also under charsets that do not exist."""
        payload = self._payload
        if i is None and not decode and isinstance(payload, str) and not payload.isascii():
            data = as_bytes(payload)
            try:
                return data.decode(codec(self.get_content_charset("ascii")), "replace")
            except (LookupError, ValueError):
                return data.decode("ascii", "replace")
        return super().get_payload(i, decode)  # type: ignore[call-overload]

    def get_payload_decoded(self) -> bytes:
        """The content as bytes, the transfer encoding undone; empty for a multipart."""
        if self.is_multipart() or self._payload is None:
            return b""
        return undo(as_bytes(str(self._payload)), self._encodings()[0])

    def _encodings(self) -> list[str]:
        """The transfer encodings that a reader might apply; more than one only by foul play.

        Of the names that `undo` treats alike only the first, so they are few.
        """
        found: dict[str, str] = {}
        values = map(readings, self._raw_values("content-transfer-encoding"))
        for value in itertools.chain.from_iterable(values):
            match = re.match(r"[^A-Za-z0-9]*([A-Za-z0-9-]*)", value)
            name = match.group(1).lower() if match else ""
            found.setdefault(CODINGS.get(name, ""), name)
        return list(found.values()) or [""]

    def _charsets(self) -> list[str]:
        """The charsets that a reader might take; the first is that of `get_content_charset`."""
        found = [self.get_content_charset("")]
        values = (readings(v[: settings.MAX_NAME_TEXT]) for v in self._raw_values("content-type"))
        for value in itertools.chain.from_iterable(values):
            for piece in list(split_parameters(value))[: settings.MAX_PARAMETERS + 1]:
                label, equals, text = piece.partition("=")
                if equals and label.strip().lower().startswith("charset"):
                    found.extend(name_variants(text.strip(), "*" in label))
                elif "charset" in piece.lower():
                    for label, text in loose_parameters(piece):
                        if label.startswith("charset"):
                            found.extend(name_variants(text, "*" in label))
        return list(dict.fromkeys(found))

    def _media_types(self) -> list[str]:
        """The media types that a reader might see, the one that the parser went by first."""
        found = [self.get_content_type()]
        for value in self._raw_values("content-type"):
            for match in map(_MEDIA_TYPE.match, readings(value)):
                if match:
                    found.append(f"{match.group(1)}/{match.group(2)}".lower())
        return found

    def _raw_values(self, name: str) -> list[str]:
        """All values of a header, as text, in the readings of a lone CR."""
        values = [*self.raw_items(), *self._other_fields]
        return [readable(v) for k, v in values if k.lower() == name]

    def getencoding(self) -> str | None:
        """The transfer encoding as the header has it, None where there is no header."""
        value = self.get("content-transfer-encoding")
        return None if value is None else str(value)

    def getname(self) -> str | None:
        """The name parameter of the Content-Type, None where there is none."""
        value = self._parameter("name", "content-type")
        return None if value is None else unfold(value)

    def getparams(self) -> list[tuple[str, Any]]:
        """The Content-Type's parameters; the first is the type itself, with an empty value."""
        return list(self.get_params([]))

    def decode(self, filt: Any) -> str | None:
        """Write the decoded content to a file.

        Args:
            filt: a binary file.

        Returns:
            What `getencoding` does.
        """
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
        be read (RFC 2231, RFC 2047, broken quotes); where these give none, from Content-Name,
        X-Sun-Data-Name, Content-Description and Content-Location; from files that stand in the
        text (uuencode, yEnc, BinHex) or tell their name themselves (MacBinary, AppleSingle).

        Args:
            scan_zip: those inside of zips too.

        Raises:
            zipfile.BadZipFile: a zip cannot be read or exceeds a bound.
        """
        return self._getnames(scan_zip, Budget())

    def _getnames(self, scan_zip: bool, budget: Budget) -> list[tuple[str, str]]:
        names: dict[tuple[str, str], None] = {}
        room = settings.MAX_NAME_TEXT
        for header in ("content-type", "content-disposition"):
            for text in self._raw_values(header):
                names.update(dict.fromkeys(header_names(text[:room])))
                room = max(0, room - len(text))
        filename = self.get_filename()
        if filename:
            names["filename", filename] = None
        if not any(name for attribute, name in names if _NAMING.fullmatch(attribute)):
            names.update(dict.fromkeys(self._names_elsewhere()))
        for name in self._inner_names():
            names[name] = None
        if scan_zip and not self.is_multipart():
            for inner in self._zip_names([name for _, name in names], budget):
                names[inner] = None
        return list(names)

    def _names_elsewhere(self) -> Iterator[tuple[str, str]]:
        """The names that readers give to a part that Content-Type and -Disposition do not name."""
        kinds = self._media_types()
        if self.is_multipart() or any(kind.startswith(_CONTAINERS) for kind in kinds):
            return
        file = any("attach" in v.lower() for v in self._raw_values("content-disposition"))
        file = file or any(kind.startswith("application/") for kind in kinds)
        text = not file and all(kind.startswith("text/") for kind in kinds)
        for header in _NAMED_BY:
            for value in self._raw_values(header):
                for name in described_names(header, value, file, text):
                    yield header, name

    def _inner_names(self) -> Iterator[tuple[str, str]]:
        """(form, name) of the files that a reader finds within the content, zips aside."""
        for text in filter(None, (self.preamble, self.epilogue)):
            yield from names_in_text(as_bytes(text))
        if not isinstance(self._payload, str):
            return
        payload = as_bytes(self._payload)
        yield from names_in_text(payload)
        texts = any(kind.startswith("text/") for kind in self._media_types())
        if not texts:
            payload = payload[:ENCODED_HEAD]
        for _, data in self._decoded(payload):
            yield from names_in_head(data)
            if texts and data != payload:
                yield from names_in_text(data)

    def _decoded(self, body: bytes) -> Iterator[tuple[str, bytes]]:
        """(transfer encoding, content) for all that readers might make of the body."""
        for encoding in self._encodings():
            for data in readings_of(body, encoding):
                yield encoding, data

    def _zip_names(self, names: list[str], budget: Budget) -> list[tuple[str, str]]:
        """The names inside of this part, a zip; BadZipFile where it is none but claims so."""
        claims = self.get_content_type() in ZIP_TYPES or any(map(is_zip_name, names))
        payload = as_bytes(str(self._payload or ""))
        found: list[tuple[str, str]] = []
        for encoding in self._encodings():
            for number, data in enumerate(readings_of(payload, encoding)):
                if not data.strip():
                    continue
                # only the first reading has to make sense: the others are guesses
                found += self._names_as_zip(data, claims and not number, budget)
        return found

    @staticmethod
    def _names_as_zip(data: bytes, claims: bool, budget: Budget) -> list[tuple[str, str]]:
        """The names in a zip; BadZipFile where it `claims` to be one and cannot be read."""
        if not claims and not data.startswith(ZIP_MAGIC):
            return []
        try:
            return names_in_zip(data, budget)
        except ZipLimit:
            raise
        except zipfile.BadZipFile:
            if claims:
                raise
            return []  # neither in name nor in fact

    def suspicion(self) -> str | None:
        """Why this part cannot be judged by its names, None where it can.

        A bound that was exceeded, or a structure that readers might take differently.
        """
        if self.limit or self._misread:
            return self.limit or self._misread
        if self._name_text_size() > settings.MAX_NAME_TEXT:
            return f"more than {settings.MAX_NAME_TEXT} characters of names"
        for header in ("content-type", "content-disposition"):
            for text in self._raw_values(header):
                if text.count(";") > settings.MAX_PARAMETERS and (
                    sum(1 for _ in split_parameters(text)) > settings.MAX_PARAMETERS
                ):
                    return f"more than {settings.MAX_PARAMETERS} parameters"
        payload = self._payload
        if isinstance(payload, str) and any(is_riddled(payload, e) for e in self._encodings()):
            return "transfer encoding that is hardly one"
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
        values = [*self.raw_items(), *self._other_fields]
        return sum(len(str(v)) for k, v in values if k.lower() in _NAME_HEADERS)

    def _second_boundary(self) -> bool:
        """Whether some other boundary than the one in use would cut the body too."""
        types = self._raw_values("content-type")
        if not any("multipart" in value.lower() for value in types):
            return False
        candidates: set[str] = set()
        for value in types:
            names = header_names(value, internal=True)
            candidates.update(text.strip() for name, text in names if "boundary" in name)
        used = self.get_boundary() if self._seen_multipart else None
        others = {as_bytes(c) for c in candidates if c and c != used}
        if not others:
            return False
        return any(line[1].rstrip() in others for line in DASHED_LINE.finditer(self._body_bytes()))

    def _body_bytes(self) -> bytes:
        """The body as it would be written."""
        return self._body(_newline(self))

    # -- modifying and writing

    def set_payload(self, val: Any, charset: Any = None) -> None:
        """Set the payload.

        Args:
            val: text, bytes, or a list of messages. Text beyond ASCII is encoded in the declared
                charset, UTF-8 where there is none.
            charset: as in the standard library.
        """
        self._forced = True
        if isinstance(val, (bytes, bytearray)):
            val = as_str(bytes(val))
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
        exact = codec_for(declared, widest=False) if declared else None
        if exact:
            try:
                return as_str(text.encode(exact))
            except (LookupError, ValueError):
                pass
        self.set_param("charset", "utf-8")
        return as_str(text.encode("utf-8", "surrogateescape"))

    def as_bytes(self, unixfrom: bool = False, policy: Any = None) -> bytes:
        """The whole message as bytes; what was not modified exactly as it was read.

        Args:
            unixfrom: begin with a ``From`` line where there is none.
            policy: has the standard generator write everything anew.
        """
        if policy is not None:
            return super().as_bytes(unixfrom, policy)
        data = self._flatten(_newline(self))
        if unixfrom and not data.startswith(b"From "):
            line = self.get_unixfrom() or "From nobody " + time.ctime()
            data = as_bytes(line) + _newline(self) + data
        return data

    def dump(self, file: BinaryIO, unixfrom: bool = False) -> None:
        """Write the message, as `as_bytes` gives it.

        Args:
            file: a binary file.
            unixfrom: as for `as_bytes`.
        """
        file.write(self.as_bytes(unixfrom))

    def _extent(self) -> tuple[bytes, int, int]:
        """The bytes that the message was read from, and where this part begins and ends in them.

        Not a copy of the part: within each other there may be many of nearly that size.
        """
        if self._source is None:
            return b"", 0, 0
        raw = self._source.raw
        if self._root is self:
            return raw, 0, len(raw)
        self._source.place(self._root)
        return raw, *self._span

    def _raw(self) -> bytes:
        """The bytes that this part was read from."""
        raw, start, end = self._extent()
        return raw[start:end]

    def _flatten(self, newline: bytes) -> bytes:
        if self._source is not None and not self.ismodified():
            return self._raw()
        body = self._body(newline)  # first: it may have to change the boundary
        return self._head(newline) + body

    def _original_head(self) -> tuple[list[bytes], int]:
        """The header fields that were read, as they stand, and where the body begins.

        The list does not match the headers where the parser had to mend them, or stopped.
        """
        starts: list[int] = []
        most = settings.MAX_HEADER_LINES
        raw, at, stop = self._extent()
        line = _HEADER_LINE.match(raw, at, stop)
        while line:
            if (line[1] not in (b" ", b"\t") or not starts) and len(starts) <= most:
                starts.append(at)
            at = line.end()
            line = _HEADER_LINE.match(raw, at, stop)
        empty = _EMPTY_LINE.match(raw, at, stop)
        fields = [raw[slice(*ends)] for ends in zip(starts, [*starts[1:], at])]
        return fields, empty.end() if empty else at

    def _head(self, newline: bytes) -> bytes:
        """The header and the empty line after it."""
        fields, body = self._original_head()
        if self._source is not None and self._headers == self._seen_headers and fields:
            raw, start, _ = self._extent()
            head = raw[start:body]
            if len(head) > sum(map(len, fields)) and head.endswith((b"\n\n", b"\n\r\n")):
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
            lines = [as_bytes(f"{name}: {value}")]
        return newline.join(lines) + newline

    def _body(self, newline: bytes) -> bytes:
        payload = self._payload
        if self._source is not None and self._same_body() and not self._forced:
            raw, _, end = self._extent()
            _, start = self._original_head()
            if not isinstance(payload, list):
                return raw[start:end]
            if self._boundary_kept():
                return self._patched(raw, start, end, newline)
        if isinstance(payload, list):
            return self._rebuilt(payload, newline)
        body = as_bytes(str(payload)) if payload is not None else b""
        return re.sub(rb"(?<!\r)\n", b"\r\n", body) if newline == b"\r\n" else body

    def _boundary_kept(self) -> bool:
        """Whether the Content-Type is the one that was read."""
        now, seen = (
            [value for name, value in headers if name.lower() == "content-type"]
            for headers in (self._headers, self._seen_headers)
        )
        return now == seen

    def _patched(self, raw: bytes, pos: int, end: int, newline: bytes) -> bytes:
        """The body as it was read, except for the parts within that were modified."""
        pieces = []
        for child in self._payload:
            _, first, last = child._extent()
            pieces.append(raw[pos:first])
            data = child._flatten(newline)
            if self.get_content_type() == "message/delivery-status" and child.ismodified():
                data = data[: -len(newline)]  # the empty line stands between the blocks
            pieces.append(data)
            pos = last
        pieces.append(raw[pos:end])
        return b"".join(pieces)

    def _rebuilt(self, parts: list[Any], newline: bytes) -> bytes:
        """The body made anew from `parts`."""
        pieces = [_flatten_any(part, newline) for part in parts]
        if self.get_content_maintype() == "message":
            return newline.join(pieces)
        if self.get_content_maintype() != "multipart":
            self.set_type("multipart/mixed")
        boundary = self.get_boundary()
        if boundary is None or any(b"--" + as_bytes(boundary) in piece for piece in pieces):
            boundary = "=" + uuid.uuid4().hex + "="
            self.set_boundary(boundary)
        mark = b"--" + as_bytes(boundary)
        out = [as_bytes(self.preamble) + newline] if self.preamble else []
        for piece in pieces:
            out += [mark, newline, piece, newline]
        out += [mark, b"--", newline, as_bytes(self.epilogue or "")]
        return b"".join(out)

    # Old spellings of what the standard library has under another name today.
    getfilename = get_filename
    ismultipart = Message.is_multipart
    getheaders = Message.get_all
    gettype = Message.get_content_type
    getparam = get_param


def unquote_value(value: Any) -> Any:
    """A parameter's value without its quotes, also where it is (charset, language, text)."""
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
