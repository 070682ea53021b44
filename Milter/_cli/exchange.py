"""One message on its way through ``python -m Milter send``: what is sent, and what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import socket
import time
from collections.abc import Mapping

from ..mta import (
    MTA,
    Address,
    Client,
    Dialect,
    Message,
    MTAError,
    Offer,
    SocketAddress,
    Stage,
    commands,
)
from ..mta.macros import Macros
from .common import EXIT_ERROR, EXIT_USAGE, FilterSocket, error_kind, naming
from .envelope import parse_address
from .report import Outcome
from .tracing import tracer


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why nothing came of a message.

    :ivar kind: ``arguments``, ``message`` (it cannot be read, or not be said), ``unreachable``,
        ``timeout``, ``closed`` or ``protocol``.
    :ivar text: for people.
    """

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What an error says."""
        return cls(error_kind(error), str(error))

    @property
    def status(self) -> int:
        """The exit status."""
        return EXIT_USAGE if self.kind in ("arguments", "message") else EXIT_ERROR


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What came of a message, and of the end of the connection after it."""

    outcome: Outcome
    milliseconds: float
    late: Failure | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to bring messages before a filter, as the arguments say."""

    name: str
    address: SocketAddress
    offer: Offer
    timeout: float
    wait: float
    dialect: Dialect
    sender: Address
    recipients: list[Address]
    client: Client
    helo: str | None
    macros: Mapping[str, str]
    body_in_eom: bool
    trace: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """Read the arguments.

        :raises ValueError: one of them cannot be.
        """
        recipients = [parse_address(text) for text in args.recipients or ["recipient@example.com"]]
        recipients += [
            dataclasses.replace(parse_address(text), rejected=reply)
            for text, reply in args.rejected
        ]
        with naming("--protocol-version"):
            offer = Offer.for_version(args.protocol_version)
        address = None if args.client_addr == "unknown" else args.client_addr
        plan = cls(
            name=args.socket,
            address=_filter_of(args.socket),
            offer=offer,
            timeout=args.timeout,
            wait=args.wait,
            dialect=Dialect(args.dialect),
            sender=parse_address(args.sender),
            recipients=recipients,
            client=Client(args.client_name, address, args.client_port),
            helo=args.helo,
            macros={
                "j": socket.gethostname(),
                "_": f"{args.client_name} [{args.client_addr}]",
                "{daemon_name}": "pymilter-send",
                **dict(_macro(text) for text in args.macros),
            },
            body_in_eom=args.body_in_eom,
            trace=args.trace,
        )
        plan._check()
        return plan

    def _check(self) -> None:
        """Find out now what could not be said of any message.

        :raises ValueError: an argument cannot be.
        """
        with naming("--client-name"):
            commands.connect_info(self.client.name, None, 0)
        try:
            commands.connect_info(self.client.name, self.client.address, self.client.port)
        except ValueError:
            raise ValueError(
                f"--client-addr {self.client.address!r}: write an IPv4 or IPv6 address, a /path, "
                "or unknown"
            ) from None
        with naming("--helo"):
            commands.helo(self.client.name if self.helo is None else self.helo)
        with naming("--from"):
            commands.mail(self.sender.address, self.sender.params)
        for one in self.recipients:
            with naming("--rcpt" if one.rejected is None else "--rejected-rcpt"):
                commands.rcpt(one.address, one.params, one.rejected)
        with naming("--macro"):
            Macros().define(self.macros, Stage.CONNECT)

    def connect(self, offer: Offer | None, prefix: str = "") -> MTA:
        """A connection to the filter; *prefix* stands before each line of the trace."""
        return MTA.connect(
            self.address,
            offer=offer,
            timeout=self.timeout,
            wait_for=self.wait,
            dialect=self.dialect,
            trace=tracer(self.trace, prefix),
        )

    def bring(self, data: bytes, prefix: str = "") -> Exchange:
        """Bring a message before the filter, in a session of its own.

        :raises ValueError: the message cannot be said in the protocol.
        :raises MTAError: the filter cannot be spoken to, or breaks the protocol.
        """
        message = Message.parse(data)
        message.body = _ended(message.body)
        start = time.monotonic()
        mta = self.connect(self.offer, prefix)
        try:
            result = mta.send(
                message,
                sender=self.sender,
                recipients=self.recipients,
                client=self.client,
                helo=self.helo,
                macros={"i": secrets.token_hex(5).upper(), **self.macros},
                body_in_eom=self.body_in_eom,
            )
            late = _quit(mta)
        finally:
            mta.close()
        took = (time.monotonic() - start) * 1000
        result.message.body = _ended(result.message.body)
        outcome = Outcome(self.name, mta.negotiated, self.sender, self.recipients, message, result)
        return Exchange(outcome, took, late)


def _quit(mta: MTA) -> Failure | None:
    """End the connection; what goes wrong now must not hide the result."""
    try:
        mta.quit()
    except MTAError as exc:
        return Failure.of(exc)
    return None


def _ended(body: bytes) -> bytes:
    """The body as it is after its way through an MTA: the last line has an end, too."""
    if not body or body.endswith(b"\r\n"):
        return body
    return body + (b"\n" if body.endswith(b"\r") else b"\r\n")


def _filter_of(text: str) -> SocketAddress:
    where = FilterSocket.parse(text)
    if where.kind == "unix" and os.path.isfile(where.path):
        raise ValueError(f"{text!r} is a file and no socket: SOCKET comes first, then MESSAGE")
    return where.address


def _macro(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.rpartition(":")[2]:
        raise ValueError(f"--macro {text!r}: write NAME=VALUE or STAGE:NAME=VALUE")
    return name, value
