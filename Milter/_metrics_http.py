"""The HTTP server of ``Milter.metrics``.

It is one thread and a bounded number of descriptors whatever clients do, since the rest of the
process' descriptors and threads are for mail. Nothing that a client sends is logged.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from ._logging import logger

#: How many clients are served at once. One more takes the place of the one that has kept us
#: waiting for its request longest.
MAX_CONNECTIONS = 16
#: How long a client has, from connecting to the end of the answer, in seconds: what Prometheus
#: gives a scrape.
SECONDS = 10.0
#: How large a request may be, in bytes.
MAX_REQUEST = 16384
#: How long accepting pauses where no descriptor is left, in seconds.
_PAUSE = 1.0
#: How long a client that was answered has to close, in seconds.
_LINGER = 1.0

_CHUNK = 65536
#: What wakes it.
_STOP, _LEAVE = b"!", b"."
_REQUEST_LINE = re.compile(rb"([!-~]+) ([!-~]+) HTTP/1\.[0-9]")
_END = re.compile(rb"\r?\n\r?\n")

_log = logger("milter.metrics")

#: A WSGI application (PEP 3333), as prometheus_client makes one.
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Client:
    """A connection: what came of its request, and what is left of the answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.deadline = time.monotonic() + SECONDS
        self.request = bytearray()
        self.answer: memoryview | None = None  # none yet
        self.answered = False


def bind(address: tuple[str, int] | str, family: int, share: bool) -> socket.socket:
    """A socket for ``Server``; nobody is sent there as long as it does not listen.

    Args:
        address: host and port, or the path of a unix socket.
        family: of the address, such as ``socket.AF_INET``.
        share: whether other processes of this user may listen on that port too.

    Raises:
        OSError: it cannot be.
    """
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if share:
            # Of several processes the system picks one for each request.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def listen(address: tuple[str, int] | str, family: int, share: bool) -> socket.socket:
    """The same, and it listens.

    Raises:
        OSError: it cannot listen there.
    """
    listener = bind(address, family, share)
    try:
        listener.listen(MAX_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    return listener


class Server:
    """A server on a listening socket, which several processes may have.

    Args:
        listener: from ``listen``; the server closes it.
        app: what answers requests.
        wake: the other end of a pair of sockets; its end means ``leave``. None for one of its own.

    Attributes:
        port: where it listens; 0 on a unix socket.
    """

    def __init__(
        self, listener: socket.socket, app: App, wake: socket.socket | None = None
    ) -> None:
        self._app = app
        self._clients: set[_Client] = set()
        self._accept_after = 0.0
        self._listener = listener
        self._leaves = False
        self._waker: socket.socket | None = None
        try:
            if wake is None:
                wake, self._waker = socket.socketpair()
        except BaseException:
            self._listener.close()
            raise
        self._wake = wake
        self.port = 0 if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])
        # One without a descriptor of its own.
        self._selector = getattr(selectors, "PollSelector", selectors.SelectSelector)()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until ``stop`` is called, and close everything."""
        try:
            while self._turn():
                pass
        finally:
            for client in list(self._clients):
                self._drop(client)
            self._selector.close()
            for each in (self._listener, self._wake, self._waker):
                if each is not None:
                    each.close()

    def stop(self) -> None:
        """Have ``serve``, in another thread, return."""
        self._tell(_STOP)

    def leave(self) -> None:
        """The same, once those who are connected have their answers; no others are taken."""
        self._tell(_LEAVE)

    def _tell(self, what: bytes) -> None:
        if self._waker is not None:
            with contextlib.suppress(OSError):
                self._waker.send(what)

    # --- the loop ----------------------------------------------------------------------------

    def _turn(self) -> bool:
        """Wait for news and deal with them; false where there is no more to do."""
        ready = self._selector.select(self._timeout())
        found = [key.fileobj for key, _ in ready]
        if self._wake in found:
            if self._wake.recv(1) == _STOP:
                return False
            self._take_the_last()
            found = []
        # Those who are here come before those who want in, and might take their places.
        for key, _ in ready:
            if key.data in self._clients:
                self._serve_client(key.data)
        if self._listener in found:
            self._accept()
        self._look_at_the_clock()
        return not self._leaves or bool(self._clients)

    def _take_the_last(self) -> None:
        """Close the listening socket: who waits there for an answer has not been refused."""
        if self._leaves:
            return
        self._leaves = True
        self._selector.unregister(self._wake)
        if self._accept_after == 0.0:
            for _ in range(MAX_CONNECTIONS):
                self._accept()
        if self._accept_after == 0.0:
            self._selector.unregister(self._listener)
        self._accept_after = 0.0
        self._listener.close()

    def _timeout(self) -> float | None:
        times = [client.deadline for client in self._clients]
        if self._accept_after:
            times.append(self._accept_after)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for client in [each for each in self._clients if each.deadline <= now]:
            self._drop(client)
        if self._accept_after and self._accept_after <= now:
            self._accept_after = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return
        except OSError:
            # Out of descriptors: as long as there are none, asking again only takes time.
            self._selector.unregister(self._listener)
            self._accept_after = time.monotonic() + _PAUSE
            return
        connection.setblocking(False)
        if len(self._clients) >= MAX_CONNECTIONS:
            # Who has not asked for anything goes first.
            self._drop(min(self._clients, key=lambda each: (bool(each.answer), each.deadline)))
        client = _Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)
        self._serve_client(client)  # the request is mostly there already

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.socket)
        client.socket.close()

    # --- a client ----------------------------------------------------------------------------

    def _serve_client(self, client: _Client) -> None:
        """Go on with a client as far as it goes without waiting."""
        try:
            if client.answer is None and not self._read(client):
                return
            if not client.answered:
                self._write(client)
            elif not client.socket.recv(_CHUNK):
                self._drop(client)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(client)

    def _read(self, client: _Client) -> bool:
        """Take what there is of the request; true when there is an answer to give."""
        data = client.socket.recv(_CHUNK)
        if not data:
            self._drop(client)
            return False
        seen = len(client.request)
        client.request += data if seen else data.lstrip(b"\r\n")
        end = _END.search(client.request, max(0, seen - 3))
        if (end.start() if end else len(client.request)) > MAX_REQUEST:
            answer = _response("431 Request Header Fields Too Large")
        elif end:
            before = time.monotonic()
            answer = self._answer(bytes(client.request[: end.start()]))
            took = time.monotonic() - before
            for each in self._clients:
                each.deadline += took  # they are not to blame for it
        else:
            return False
        client.answer = memoryview(answer)
        return True

    def _write(self, client: _Client) -> None:
        assert client.answer is not None
        with contextlib.suppress(BlockingIOError, InterruptedError):
            client.answer = client.answer[client.socket.send(client.answer) :]
        if client.answer:
            self._selector.modify(client.socket, selectors.EVENT_WRITE, client)
            return
        # To close while something of the client's is unread would take the answer from it.
        client.answered = True
        client.deadline = min(client.deadline, time.monotonic() + _LINGER)
        client.socket.shutdown(socket.SHUT_WR)
        self._selector.modify(client.socket, selectors.EVENT_READ, client)

    # --- requests ----------------------------------------------------------------------------

    def _answer(self, head: bytes) -> bytes:
        """The response to a request, whatever that holds."""
        first, *lines = head.split(b"\n")
        found = _REQUEST_LINE.fullmatch(first.rstrip(b"\r"))
        if found is None:
            return _response("400 Bad Request")
        if found[1] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", [("Allow", "GET, HEAD")])
        path, _, query = found[2].decode("ascii").partition("?")
        environment = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query}
        for line in lines:
            name, _, value = line.decode("latin-1").partition(":")
            if name.lower() in ("accept", "accept-encoding"):
                environment[f"HTTP_{name.upper().replace('-', '_')}"] = value.strip()
        try:
            answer = self._ask(environment)
        except Exception:  # noqa: BLE001 - of a request that is too odd, or of a collector
            answer = self._ask_plainly(path)
        return answer if found[1] == b"GET" else answer[: answer.index(b"\r\n\r\n") + 4]

    def _ask(self, environment: dict[str, str]) -> bytes:
        given: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            given[:] = status, headers

        body = b"".join(self._app(environment, start_response))
        return _response(given[0], given[1], body)

    def _ask_plainly(self, path: str) -> bytes:
        """The same without the client's wishes: what fails now is a matter for the log."""
        try:
            return self._ask({"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": ""})
        except Exception:  # noqa: BLE001 - whatever an application's collector raises
            _log.exception("the counters cannot be shown:")
            return _response("500 Internal Server Error")


def _response(
    status: str, headers: Iterable[tuple[str, str]] = (), body: bytes | None = None
) -> bytes:
    if body is None:
        headers = [*headers, ("Content-Type", "text/plain; charset=utf-8")]
        body = f"{status[4:]}\n".encode()
    length = ("Content-Length", str(len(body)))
    every = (*headers, length, ("Connection", "close"))
    lines = [f"{name}: {value}" for name, value in every if name]
    return "\r\n".join([f"HTTP/1.0 {status}", *lines, "", ""]).encode("latin-1") + body
