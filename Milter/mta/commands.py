"""What an MTA says to a filter, each command as its packet's data.  No I/O.

:meth:`Milter.mta.session.Session.send` makes bytes of a :class:`Command`.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .vocabulary import (
    Family,
    MacroValues,
    Reply,
    SmtpReply,
    Stage,
    Text,
    Verdict,
    to_str,
)
from .wire import CHUNK_SIZE, c_string


@dataclass(frozen=True)
class Command:
    """One command.

    :ivar stage: the command.
    :ivar payload: the packet's data.
    :ivar macros: those that go with this command alone.
    :ivar refused: for a recipient whom the MTA itself has refused.
    """

    stage: Stage
    payload: bytes = b""
    macros: MacroValues = field(default_factory=dict)
    refused: bool = False


T = TypeVar("T")

#: Commands one after the other; each gets its answer sent before it gives the next.
Dialogue = Generator[Command, Reply, T]


def connect_info(
    hostname: Text,
    address: Text | None,
    port: int,
    family: Family | None = None,
    macros: MacroValues | None = None,
) -> Command:
    """SMFIC_CONNECT; *family* skips the check of *address*."""
    if family is None:
        family, address = _client_family(address)
    payload = c_string("hostname", hostname) + family.value
    if family is not Family.UNKNOWN:
        if not 0 <= port < 65536:
            raise ValueError(f"port {port} is not between 0 and 65535")
        payload += struct.pack("!H", port) + c_string("address", address or "")
    return Command(Stage.CONNECT, payload, macros or {})


def helo(hostname: Text, macros: MacroValues | None = None) -> Command:
    """SMFIC_HELO."""
    return Command(Stage.HELO, c_string("hostname", hostname), macros or {})


def mail(sender: Text, params: Sequence[Text], macros: MacroValues | None = None) -> Command:
    """SMFIC_MAIL."""
    return Command(Stage.MAIL, _envelope("sender", sender, params), macros or {})


def rcpt(
    recipient: Text,
    params: Sequence[Text],
    rejected: str | None = None,
    macros: MacroValues | None = None,
) -> Command:
    """SMFIC_RCPT; *rejected* is the reply with which the MTA itself refused the recipient."""
    payload = _envelope("recipient", recipient, params)
    if rejected is None:
        return Command(Stage.RCPT, payload, macros or {})
    return Command(Stage.RCPT, payload, {**_rejection_macros(rejected), **(macros or {})}, True)


def header(name: Text, value: Text) -> Command:
    """SMFIC_HEADER."""
    return Command(Stage.HEADER, c_string("header name", name) + c_string("header value", value))


def body(data: bytes) -> Dialogue[Reply]:
    """SMFIC_BODY, as often as it takes, or until an answer ends it; gives the last answer."""
    reply = Reply(Stage.BODY, Verdict.NOT_SENT)
    for start in range(0, len(data), CHUNK_SIZE):
        reply = yield Command(Stage.BODY, data[start : start + CHUNK_SIZE])
        if reply.verdict not in (Verdict.CONTINUE, Verdict.NO_REPLY):
            break
    return reply


def unknown(command: Text) -> Command:
    """SMFIC_UNKNOWN."""
    return Command(Stage.UNKNOWN, c_string("command", command))


# --- details -------------------------------------------------------------------------------------


def _envelope(what: str, address: Text, params: Sequence[Text]) -> bytes:
    return c_string(what, address) + b"".join(c_string("parameter", param) for param in params)


def parse_rejection(reply: str) -> SmtpReply:
    """Read the SMTP reply with which the MTA itself refuses a recipient."""
    found = re.fullmatch(r"([45]\d\d) (?:([45]\.\d{1,3}\.\d{1,3}) )?(.*)", reply)
    if not found:
        raise ValueError(f"rejected {reply!r}: give an SMTP reply such as '550 5.1.1 User unknown'")
    code, xcode, text = found.groups()
    return SmtpReply(int(code), xcode, (text,))


def _rejection_macros(reply: str) -> dict[str, Text]:
    smtp = parse_rejection(reply)
    return {
        "{rcpt_mailer}": "error",
        "{rcpt_host}": smtp.xcode or f"{smtp.code // 100}.0.0",
        "{rcpt_addr}": smtp.text,
    }


def _client_family(address: Text | None) -> tuple[Family, Text | None]:
    if address is None:
        return Family.UNKNOWN, None
    text = to_str(address)
    if text.startswith("/"):
        return Family.UNIX, text
    # sendmail writes this prefix before an IPv6 address.
    plain = text[5:] if text.lower().startswith("ipv6:") else text
    try:
        found = ipaddress.ip_address(plain)
    except ValueError:
        raise ValueError(
            f"client address {text!r} is neither an IP address nor a path nor None"
        ) from None
    return (Family.INET if found.version == 4 else Family.INET6), text
