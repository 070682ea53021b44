"""Messages, envelopes and SMTP clients, as an MTA knows them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Union

from .vocabulary import Text, to_bytes, to_str


@dataclass(frozen=True)
class Header:
    """One header field.

    :ivar name: the field name.
    :ivar value: what follows the colon and one space, with LF alone at each fold.
    :ivar separator: the bytes between them, normally ``b": "``.
    """

    name: bytes
    value: bytes
    separator: bytes = b": "

    def __bytes__(self) -> bytes:
        return self.name + self.separator + self.value

    def wire_value(self, leading_space: bool) -> bytes:
        """The value as an MTA sends it, with its leading space only under ``SMFIP_HDR_LEADSPC``."""
        if not leading_space:
            return self.value
        return self.separator[self.separator.index(b":") + 1 :] + self.value

    @classmethod
    def from_wire(cls, name: Text, value: Text, leading_space: bool) -> Header:
        """The header that an MTA makes of a name and a value from the wire."""
        data = to_bytes(value).replace(b"\r\n", b"\n")
        if not leading_space:
            return cls(to_bytes(name), data)
        if data.startswith(b" "):
            return cls(to_bytes(name), data[1:])
        return cls(to_bytes(name), data, b":")


_HEADER_LINE = re.compile(rb"([!-9;-~\x80-\xff]+)([ \t]*:)( ?)(.*)", re.DOTALL)


@dataclass
class Message:
    """A message: *headers* in order, and *body* with the line ends that go over the wire."""

    headers: list[Header] = field(default_factory=list)
    body: bytes = b""

    @classmethod
    def parse(cls, data: bytes) -> Message:
        """Read a message as an MTA does.

        Lines may end in CRLF or LF; the body gets CRLF, headers get LF at their
        folds.  The first line that is neither a header nor a fold begins the body,
        as does an empty one.  An mbox ``From`` line at the very top is dropped.
        """
        # The lines of each header, joined once: there may be any number of folds.
        headers: list[list[bytes]] = []
        start = 0
        for line, end in _lines(data):
            text = line.rstrip(b"\n").rstrip(b"\r")
            if start == 0 and text.startswith(b"From ") and not headers:
                start = end
                continue
            if text[:1] in (b" ", b"\t") and headers:
                headers[-1].append(text)
            elif _HEADER_LINE.fullmatch(text):
                headers.append([text])
            else:
                if not text:
                    start = end
                break
            start = end
        fields = [_split_header(b"\n".join(lines)) for lines in headers]
        return cls(fields, _crlf(data[start:]))

    def as_bytes(self, eol: bytes = b"\r\n") -> bytes:
        """The whole message with *eol* at each line's end (folds and body included)."""
        head = b"".join(bytes(header) + b"\n" for header in self.headers) + b"\n"
        body = self.body if eol == b"\r\n" else self.body.replace(b"\r\n", eol)
        return head.replace(b"\n", eol) + body

    def get_all(self, name: str) -> list[str]:
        """The values of all headers called *name*, in any case, top to bottom."""
        wanted = to_bytes(name).lower()
        return [to_str(header.value) for header in self.headers if header.name.lower() == wanted]

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of the first header called *name*, or *default*."""
        values = self.get_all(name)
        return values[0] if values else default

    def __getitem__(self, name: str) -> str:
        """The value of the first header called *name*; KeyError where there is none."""
        values = self.get_all(name)
        if not values:
            raise KeyError(name)
        return values[0]

    def __contains__(self, name: str) -> bool:
        return bool(self.get_all(name))


def _lines(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each line of *data* with its LF, and the offset of its end."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end], end
        start = end


def _crlf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _split_header(line: bytes) -> Header:
    found = _HEADER_LINE.fullmatch(line)
    assert found is not None
    name, colon, space, value = found.groups()
    return Header(name, value, colon + space)


@dataclass(frozen=True)
class Address:
    """An envelope address and its ESMTP parameters.

    :ivar address: without its angle brackets.
    :ivar params: the parameters, each ``NAME`` or ``NAME=VALUE``.
    :ivar rejected: for a recipient that the MTA itself has refused: its SMTP reply,
        such as ``"550 5.1.1 User unknown"``.  A filter hears of it only under
        ``SMFIP_RCPT_REJ``.
    """

    address: str
    params: tuple[str, ...] = ()
    rejected: str | None = None

    @classmethod
    def make(cls, value: AddressLike) -> Address:
        """An address from a text, or from a sequence of the address and its parameters."""
        if isinstance(value, Address):
            return value
        if isinstance(value, (str, bytes)):
            return cls(strip_brackets(to_str(value)))
        address, *params = value
        return cls(strip_brackets(to_str(address)), tuple(to_str(param) for param in params))

    def __str__(self) -> str:
        return " ".join((f"<{self.address}>", *self.params))


AddressLike = Union[Address, str, bytes, Sequence[Text]]


@dataclass(frozen=True)
class Client:
    """The SMTP client that the MTA tells the filter about.

    :ivar name: its host name, ``[address]`` where it has none.
    :ivar address: an IPv4 or IPv6 address, a socket path, or None where it is not known.
    :ivar port: its TCP port, 0 where it is not known.
    """

    name: Text = "localhost"
    address: Text | None = "127.0.0.1"
    port: int = 0


def strip_brackets(address: str) -> str:
    return address[1:-1] if address.startswith("<") and address.endswith(">") else address
