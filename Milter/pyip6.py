"""IPv6 addresses between text and 16 bytes, in pure Python (RFC 4291, RFC 5952).

For platforms whose socket library does not know IPv6, and for programs that want the
spelling of embedded IPv4 addresses described at :func:`inet_ntop`.
"""

from __future__ import annotations

import re
import struct

__all__ = ["inet_ntop", "inet_pton"]

_WORDS = struct.Struct("!8H")
_MAPPED = bytes(10) + b"\xff\xff"
_hex_word = re.compile(r"[0-9A-Fa-f]{1,4}\Z").match
_octet = re.compile(r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\Z").match


def inet_ntop(s: bytes) -> str:
    """Write a 16-byte IPv6 address as text.

    The longest run of two or more zero words is shortened to ``::``, the first of them where
    two are equally long; a single zero word is written out (RFC 5952 section 4.2.2).
    IPv4-mapped addresses are written ``::FFFF:1.2.3.4`` and IPv4-compatible ones ``::1.2.3.4``;
    ``::1`` and others with fewer than 17 significant bits stay hexadecimal, as in every
    resolver library.

    Args:
        s: the address, 16 bytes in network order.

    Raises:
        ValueError: *s* is not 16 bytes long.

    >>> inet_ntop(bytes.fromhex("20010db8000000000000000000000001"))
    '2001:db8::1'
    >>> inet_ntop(bytes.fromhex("00000000000000000000ffff01020304"))
    '::FFFF:1.2.3.4'
    """
    if len(s) != 16:
        raise ValueError(f"s must be the 16 bytes of an IPv6 address, not {len(s)}: {s!r}")
    words = _WORDS.unpack(s)
    if not any(words[:5]):
        dotted = ".".join(map(str, s[12:]))
        if words[5] == 0xFFFF:
            return "::FFFF:" + dotted
        if not words[5] and words[6]:
            return "::" + dotted
    start, length = _longest_zero_run(words)
    if length < 2:
        return ":".join(f"{w:x}" for w in words)
    head = ":".join(f"{w:x}" for w in words[:start])
    tail = ":".join(f"{w:x}" for w in words[start + length :])
    return f"{head}::{tail}"


def inet_pton(p: str) -> bytes:
    """Read an IPv6 address, or an IPv4 one as its IPv4-mapped form, into 16 bytes.

    Args:
        p: the address as text, without brackets, scope or prefix length.

    Raises:
        ValueError: *p* is no address; its argument is *p*.

    >>> inet_pton("::1").hex()
    '00000000000000000000000000000001'
    >>> inet_pton("1.2.3.4") == inet_pton("::ffff:1.2.3.4")
    True
    """
    if ":" not in p:
        return _MAPPED + _ipv4(p, p)
    head, gap, tail = p.partition("::")
    front = _words(head, p, last=not gap)
    back = _words(tail, p, last=True)
    missing = 8 - len(front) - len(back)
    if missing < 1 if gap else missing:
        raise ValueError(p)
    return _WORDS.pack(*front, *[0] * missing, *back)


def _longest_zero_run(words: tuple[int, ...]) -> tuple[int, int]:
    """Return where the first of the longest runs of zeros begins, and its length."""
    best = start = length = longest = 0
    for i, word in enumerate(words):
        if word:
            length = 0
            continue
        if not length:
            start = i
        length += 1
        if length > longest:
            best, longest = start, length
    return best, longest


def _words(text: str, whole: str, *, last: bool) -> list[int]:
    """Read colon-separated words; dotted decimal may end those that end the address."""
    if not text:
        return []
    parts = text.split(":")
    dotted = b""
    if last and "." in parts[-1]:
        dotted = _ipv4(parts.pop(), whole)
    if not all(map(_hex_word, parts)):
        raise ValueError(whole)
    return [int(part, 16) for part in parts] + list(struct.unpack(f"!{len(dotted) // 2}H", dotted))


def _ipv4(text: str, whole: str) -> bytes:
    """Read dotted decimal without leading zeros."""
    parts = text.split(".")
    if len(parts) != 4 or not all(map(_octet, parts)):
        raise ValueError(whole)
    return bytes(map(int, parts))
