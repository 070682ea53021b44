"""Bytes between an MTA and a filter, as they are and in order, to the end of each direction."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Protocol

from ..mta.recording import CLOSES, RESETS
from ..mta.words import Side

_AT_ONCE = 256 * 1024


class Listener(Protocol):
    """Who is told of what goes through, before it goes on."""

    def said(self, side: Side, data: bytes) -> None:
        """*side* has said *data*."""

    def ended(self, side: Side, how: str) -> None:
        """*side* says nothing more: it ``closes`` or ``resets`` the connection."""


class Relay:
    """Carries what two sockets say to each other.

    Each direction ends by itself, as it would without a relay: who has closed its side may still
    be told the rest.

    Args:
        mta: a connected socket, which belongs to this object from now on.
        filter: likewise.
        listener: called from two threads.
    """

    def __init__(self, mta: socket.socket, filter: socket.socket, listener: Listener) -> None:
        self._sockets = {Side.MTA: mta, Side.FILTER: filter}
        self._listener = listener
        for sock in self._sockets.values():
            sock.setblocking(True)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        """Carry until both directions have ended.

        :raises RuntimeError: there can be no more threads; nothing was carried.
        """
        other = threading.Thread(target=self._carry, args=(Side.FILTER,), daemon=True)
        try:
            other.start()
            self._carry(Side.MTA)
            other.join()
        finally:
            for sock in self._sockets.values():
                sock.close()

    def stop(self) -> None:
        """Have both directions end now; from another thread."""
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _carry(self, side: Side) -> None:
        source, target = self._sockets[side], self._sockets[side.other]
        while True:
            try:
                data = source.recv(_AT_ONCE)
            except OSError:
                self._listener.ended(side, RESETS)
                break
            if not data:
                self._listener.ended(side, CLOSES)
                break
            self._listener.said(side, data)
            try:
                target.sendall(data)
            except OSError:
                # Nobody reads any more.  Without a relay, the sender's next write would say so.
                with contextlib.suppress(OSError):
                    source.shutdown(socket.SHUT_RD)
                break
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
