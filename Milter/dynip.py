"""Whether a host name looks like one that a provider gives to its customers' lines.

Mail from such hosts usually comes from an infected machine; legitimate servers have a name of
their own.  The rules of :func:`is_dynip` read nothing but the name and the address.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

__all__ = ["is_dynip"]

#: Words that name a kind of access line or address pool.  A number may follow: ``ppp42``.
_LINE = re.compile(
    r"(?:dyn(?:amic|ip|dns|addr|pool)?(?:ip)?|dhcp|dip"
    r"|dial(?:up|in|pool)?|modem|isdn|ppp(?:oe|oa)?|slip"
    r"|i?pools?|ippool"
    r"|[avhsxi]?dsl(?:pool|dyn|am)?|dyndsl|dynadsl|[av]dslpool"
    r"|cable(?:modem)?|catv|docsis|hfc|hsd|cpe"
    r"|ft+[hxbc]|broadband|wimax|wifi|gprs|umts|lte|cgn(?:at)?)[0-9]*\Z"
).match

#: Words that say the contrary: an address set apart for one customer, or a mail server.
_STATIC = re.compile(r"(?:static|fixed|fix|sta|dedicated|business)(?:ip)?[0-9]*\Z").match
_MAIL = re.compile(
    r"(?:mail|e?smtps?|mx|mta|relay|out|outbound|mout|mailout|mailgw|mailer|mailhost|post"
    r"|webmail|newsletter)[a-z]?[0-9]*\Z"
).match

#: The name of a domain that offers to send mail: ``mailgun``, ``sparkpostmail``.
_MAIL_DOMAIN = re.compile(r"(?:e?mail|smtp)[a-z0-9-]+\Z|[a-z0-9-]+(?:mail|smtp)\Z").match

#: Second levels under which registries of country domains let people register names.
_PUBLIC_SECOND = frozenset(
    {"ac", "co", "com", "edu", "gob", "gov", "go", "gv", "ltd", "mil", "ne", "net", "org", "plc"}
)

_NO_PTR = frozenset(["", "unknown", "none"])


def is_dynip(host: str | None, addr: str | None) -> bool:
    """Tell whether a PTR name looks like a dynamically assigned address.

    True where

    - there is no name: None, an empty one, ``unknown``, or the address itself, in brackets
      or not;
    - the name contains the address: its four octets in any order; the last three or the last
      two next to each other, forwards or backwards; all of them run together with
      or without leading zeros; as one decimal number; in hexadecimal. For IPv6 the words or
      the nibbles, forwards or backwards, whole or the interface part (last 64 bits);
    - left of the registered domain a word names an access line or pool: ``pool``, ``dsl``
      and its kinds, ``cable``, ``ppp``, ``dhcp``, ``dyn``, ``dialup``, ``cpe``…

    The rules that could hit a server's own name know exceptions: two octets or a line word do not
    count where the name begins as a mail server's does (``mx3-4``, ``smtp.cable``), nor do
    two octets in the name of one of a mail service's many hosts (``a11-22.smtp-out``,
    ``m43-7.mailgun``), and
    a line word does not where another says ``static``.

    Args:
        host: the client's name as the MTA found it.
        addr: its address; without a valid one only the name is judged.

    >>> is_dynip("adsl-69-208-201-177.dsl.example.net", "69.208.201.177")
    True
    >>> is_dynip("mail.example.com", "69.208.201.177")
    False
    """
    name = (host or "").strip().lower().rstrip(".")
    if name in _NO_PTR or _is_literal(name):
        return True
    ip = _parse(addr)
    labels = name.split(".")
    mail_server = bool(_MAIL(re.split("[-_]", labels[0])[0]))
    if isinstance(ip, ipaddress.IPv4Address):
        if _names_ipv4(name, ip, mail_server or _is_mail_service(labels)):
            return True
    elif ip is not None and _names_ipv6(name, ip):
        return True
    return not mail_server and _names_line(labels)


def _is_mail_service(labels: list[str]) -> bool:
    """Whether the name lies in a domain of mail servers, or one that is named after mail."""
    own = len(labels) - _registered(labels)
    if own < 1:
        return False
    above = (re.split("[-_]", label)[0] for label in labels[1:own])
    return any(map(_MAIL, above)) or bool(_MAIL_DOMAIN(labels[own]))


def _registered(labels: list[str]) -> int:
    """How many labels the registered domain has."""
    country = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _PUBLIC_SECOND
    return 3 if country else 2


def _parse(addr: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address; an IPv4-mapped one is judged as the IPv4 address it is."""
    try:
        ip = ipaddress.ip_address((addr or "").partition("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        return ip.ipv4_mapped
    return ip


def _is_literal(name: str) -> bool:
    """Whether the name is an address, as MTAs put it where there is no PTR record."""
    if name.startswith("[") and name.endswith("]"):
        return True
    return _parse(name.replace("ipv6:", "", 1)) is not None


def _names_ipv4(name: str, ip: ipaddress.IPv4Address, mail_server: bool) -> bool:
    """Whether an IPv4 address can be read in the name."""
    octets = list(ip.packed)
    runs = _number_runs(name)
    if not Counter(octets) - Counter(n for run in runs for n in run):
        return True
    if _has_run(runs, octets[1:]) or (not mail_server and _has_run(runs, octets[2:])):
        return True
    return any(written in name for written in _hexadecimal(ip)) or any(
        re.search(f"(?<![0-9]){written}(?![0-9])", name) for written in _run_together(octets, ip)
    )


def _number_runs(name: str) -> list[list[int]]:
    """Return the decimal numbers of a name; those one separator apart are in one list."""
    runs: list[list[int]] = []
    end = -2
    for found in re.finditer("[0-9]+", name):
        if found.start() - end != 1 or name[end] not in ".-_x":
            runs.append([])
        end = found.end()
        # More than three digits are no octet: 1000 stands for any number that is too large.
        runs[-1].append(int(found[0]) if end - found.start() <= 3 else 1000)
    return runs


def _has_run(runs: list[list[int]], wanted: list[int]) -> bool:
    """Whether the numbers stand next to each other, forwards or backwards."""
    size = len(wanted)
    return any(
        run[i : i + size] in (wanted, wanted[::-1])
        for run in runs
        for i in range(len(run) - size + 1)
    )


def _run_together(octets: list[int], ip: ipaddress.IPv4Address) -> list[str]:
    """Return the ways to write an address as one decimal number, long enough to be no accident."""
    written = [str(int(ip))]
    for order in (octets, octets[::-1]):
        written += ["".join(f"{n:03}" for n in order), "".join(map(str, order))]
    return [digits for digits in written if len(digits) >= 8]


def _hexadecimal(ip: ipaddress.IPv4Address) -> list[str]:
    """Return the ways to write an address in hexadecimal."""
    pairs = [f"{n:02x}" for n in ip.packed]
    return [sep.join(order) for sep in ("", "-", ".") for order in (pairs, pairs[::-1])]


def _names_ipv6(name: str, ip: ipaddress.IPv6Address) -> bool:
    """Whether an IPv6 address, or its interface part, can be read in the name."""
    words = ip.exploded.split(":")
    nibbles = list("".join(words))
    forms = [ip.compressed.split(":"), [w.lstrip("0") or "0" for w in words]]
    if words[4:7] != ["0000"] * 3:
        forms.append(words[4:])
    written = [sep.join(form) for sep in ("-", ".", "") for form in forms]
    written += [sep.join(order) for sep in ("", ".", "-") for order in (nibbles, nibbles[::-1])]
    written.append("-".join(words))
    return any(text in name for text in written if len(text) >= 8)


def _names_line(labels: list[str]) -> bool:
    """Whether a word left of the registered domain names a kind of line or pool."""
    words = [word for label in labels[: -_registered(labels)] for word in re.split("[-_]", label)]
    return not any(map(_STATIC, words)) and any(map(_LINE, words))
