"""Addresses as the user writes them: ``send``'s ``--from`` and ``--rcpt``."""

from __future__ import annotations

import re

from ..mta import Address

_BLANKS = " \t\r\n"
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"(?=[@.>\s]|$)', re.DOTALL)


def parse_address(text: str) -> Address:
    """Read an address, in angle brackets or not, and the ESMTP parameters after it.

    A quoted local part (RFC 5321 4.1.2) may hold blanks and angle brackets.
    """
    text = text.strip(_BLANKS)
    if text.startswith("<"):
        end = _end_of_address(text, ">")
        if end < len(text):
            return Address(text[1:end], _params(text[end + 1 :]))
    end = _end_of_address(text, _BLANKS)
    return Address(text[:end], _params(text[end:]))


def _params(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(f"[{_BLANKS}]+", text) if word)


def _end_of_address(text: str, marks: str) -> int:
    """Where the first of *marks* stands that is not within quotes, else the end of *text*."""
    position = 0
    while position < len(text) and text[position] not in marks:
        quoted = None
        if position == 0 or text[position - 1] in "<.:":
            quoted = _QUOTED.match(text, position)
        position = quoted.end() if quoted else position + 1
    return position
