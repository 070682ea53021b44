"""Where a filter listens."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import milter


@dataclass(frozen=True)
class SocketAddress:
    """Where a filter listens.

    :ivar family: ``AF_UNIX``, ``AF_INET`` or ``AF_INET6``.
    :ivar address: a path, or a host and a port.
    """

    family: socket.AddressFamily
    address: str | tuple[str, int]

    def __str__(self) -> str:
        if isinstance(self.address, str):
            return f"unix:{self.address}"
        host, port = self.address
        if self.family == socket.AF_INET6:
            return f"inet6:{port}@[{host}]"
        return f"inet:{port}@{host}"


def parse_socket(spec: str, *, postfix: bool = False) -> SocketAddress:
    """Read the address of a filter as libmilter's ``smfi_setconn`` writes it.

    ``unix:/path``, ``local:/path``, ``/path``, ``inet:port@host``, ``inet:port``
    (the local host), ``inet6:port@[address]``; a port is a number or a service name.

    :param postfix: also take Postfix's order ``inet:host:port``, and
        ``inet:[address]:port`` for IPv6.
    :raises ValueError: *spec* is none of these, the path is too long for a socket, or it
        is a name that only a filter can use: port 0, or ``fd:`` and a number.
    """
    kind, where, number = take_apart(spec, postfix=postfix)
    return address_of(spec, kind, where, number)


def take_apart(spec: str, *, postfix: bool) -> tuple[str, str, int]:
    """Read the name of a socket, to listen on or to connect to; the extension has the grammar.

    :returns: ``unix`` and the path; ``inet`` or ``inet6`` with the host, empty for every
        address of the machine, and the port; or ``fd`` and, instead of the port, the descriptor.
    :raises ValueError: *spec* is no name of a socket.
    """
    try:
        kind, where, port = milter._parse_socket(spec, postfix)
        if kind == "unix" and len(os.fsencode(str(where))) > milter._MAX_SOCKET_PATH:
            raise ValueError(f"the path must not be longer than {milter._MAX_SOCKET_PATH} bytes")
        if isinstance(where, int):
            return kind, "", where
        return kind, where or "", 0 if port is None else _port_number(port)
    except ValueError as exc:
        raise ValueError(f"socket {spec!r}: {exc}") from None


def address_of(spec: str, kind: str, where: str, number: int) -> SocketAddress:
    """Where to connect to, for a name that was taken apart.

    :raises ValueError: nobody can connect to it.
    """
    if kind == "unix":
        return SocketAddress(socket.AF_UNIX, where)
    if kind == "fd":
        raise ValueError(f"socket {spec!r}: a descriptor cannot be connected to")
    if number == 0:
        raise ValueError(f"socket {spec!r}: port 0 cannot be connected to")
    if kind == "inet6":
        return SocketAddress(socket.AF_INET6, (where or "::1", number))
    return SocketAddress(socket.AF_INET, (where or "127.0.0.1", number))


def _port_number(port: str) -> int:
    if port[0] in "0123456789":
        return int(port)
    try:
        return socket.getservbyname(port, "tcp")
    except (OSError, UnicodeError):
        raise ValueError("there is no TCP service of that name") from None
