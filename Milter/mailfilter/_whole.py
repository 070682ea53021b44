"""Whole messages as objects of the ``email`` package, and what differs between two of them."""

from __future__ import annotations

import email.policy
from difflib import SequenceMatcher
from email.message import EmailMessage, Message
from email.parser import BytesParser
from typing import IO, Any, cast

from ._headers import Headers


def parsed(file: IO[bytes]) -> EmailMessage:
    """Parse a message."""
    return BytesParser(_class=EmailMessage, policy=email.policy.SMTP).parse(file)


def flattened(message: Message[Any, Any]) -> bytes:
    """A message object in bytes, with CRLF at the end of lines."""
    return message.as_bytes(policy=message.policy.clone(linesep="\r\n"))


def _like(data: bytes, message: Message[Any, Any]) -> Message[Any, Any]:
    """Bytes parsed as a message object was, to be compared with it."""
    made: Message[Any, Any] = BytesParser(_class=type(message), policy=message.policy).parsebytes(
        data
    )
    return made


def take_headers(headers: Headers, before: bytes, message: Message[Any, Any]) -> None:
    """Make the headers those of a message object; what is the same stays byte for byte.

    Args:
        headers: the headers, changed in place.
        before: the whole message that they belong to.
        message: the object.
    """
    old = _pairs(_like(before, message))
    if len(old) != len(headers):  # a parser that reads the lines in another way
        old = [(header.name, header.value) for header in headers]
    new = _pairs(message)
    items = list(headers)
    matcher = SequenceMatcher(None, [_key(*pair) for pair in old], [_key(*pair) for pair in new])
    position = 0
    for what, start, end, new_start, new_end in matcher.get_opcodes():
        if what == "equal":
            position += end - start
            continue
        for header in items[start:end]:
            headers.delete(header)
        for name, value in new[new_start:new_end]:
            headers.insert(position, name, _written(message, name, value))
            position += 1


def _pairs(message: Message[Any, Any]) -> list[tuple[str, Any]]:
    return list(cast("Any", message).raw_items())


def _key(name: str, value: Any) -> tuple[str, str]:
    return name, str(value)


def _written(message: Message[Any, Any], name: str, value: Any) -> bytes:
    """What stands after the colon and a space, as the message's policy writes it."""
    line = message.policy.fold_binary(name, value)
    text = line.partition(b":")[2].rstrip(b"\r\n").replace(b"\r\n", b"\n")
    return text[1:] if text.startswith(b" ") else text


def new_body(before: bytes, message: Message[Any, Any]) -> bytes | None:
    """The body of a message object; None where it is that of the message before."""
    old, new = _body(flattened(_like(before, message))), _body(flattened(message))
    return None if old == new else new


def _body(data: bytes) -> bytes:
    if data.startswith(b"\r\n"):
        return data[2:]
    return data.partition(b"\r\n\r\n")[2]
