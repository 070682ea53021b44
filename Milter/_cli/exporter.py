"""``run --metrics``: the exporter of ``Milter.metrics``, through workers and reloads.

The socket is opened once root was given up, by the process that was started, so that what is wrong
is said at the start; the workers inherit it. Nobody comes to it before the filter serves: it does
not listen on a port, and has another name in its directory. So a reload that fails takes nothing
from who serves. One that succeeds has both generations listen for a moment, and who gave way
answers those who had come to it: on a port the system lets several processes of a user listen, in
a directory the new socket takes the place of the old one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import stat
from collections.abc import Iterator

from .. import metrics
from .._logging import logger
from .._metrics_http import MAX_CONNECTIONS, Server, bind, listen
from .common import EXIT_ERROR, CommandError

_log = logger("milter.metrics")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where it listens.

    :ivar path: of a unix socket, or empty.
    :ivar host: name or address.
    :ivar port: 0 for any that is free.
    """

    path: str = ""
    host: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read ``[HOST:]PORT`` or ``unix:PATH``.

        :raises ValueError: *text* is none of it.
        """
        if text.startswith("unix:") and len(text) > len("unix:"):
            return cls(path=text[len("unix:") :])
        host, colon, port = text.rpartition(":")
        host = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
        if not (port.isascii() and port.isdigit() and int(port) < 65536) or (colon and not host):
            raise ValueError(
                f"{text!r}: write PORT, HOST:PORT or unix:PATH, with a port from 0 to 65535 and an "
                "IPv6 address in brackets"
            )
        return cls(host=host or cls.host, port=int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Exporter:
    """Answers Prometheus, by a thread of this process or of each worker.

    :param text: what the option says.
    :param is_reload: an exporter of this filter may listen there still.
    :raises CommandError: it is no place, or what it takes is not installed.
    """

    def __init__(self, text: str, is_reload: bool) -> None:
        try:
            self._place = Place.parse(text)
            self._app = metrics._application()
        except (ValueError, ImportError) as exc:
            raise CommandError(f"--metrics: {exc}") from None
        self._path = os.path.abspath(self._place.path) if self._place.path else ""
        self._is_reload = is_reload
        self._listener: socket.socket | None = None
        self._inode = (-1, -1)
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def open(self) -> None:
        """Begin to count, and open the socket; nobody comes to it yet.

        :raises CommandError: it cannot listen there.
        """
        with self._explained():
            if self._place.path:
                self._listener = self._bind_path()
            else:
                self._listener = self._bind_port()
                port = self._listener.getsockname()[1]
                self._place = dataclasses.replace(self._place, port=port)
            self._ends = socket.socketpair()
        metrics.enable()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            why = f"cannot listen on {self._place}: {exc.strerror or exc}"
            raise CommandError(f"--metrics: {why}", EXIT_ERROR) from exc

    def _bind_port(self) -> socket.socket:
        host, port = self._place.host, self._place.port
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        if port == 0:
            return bind(address, family, share=False)  # type: ignore[arg-type]
        if not self._is_reload:
            # Another filter of this user, whose port may be shared as well, is found by this.
            listen(address, family, share=False).close()  # type: ignore[arg-type]
        return bind(address, family, share=True)  # type: ignore[arg-type]

    def _bind_path(self) -> socket.socket:
        path = self._path
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise OSError(0, "there is something that is no socket")
            if not self._is_reload and _is_served(path):
                raise OSError(0, "another process listens there")
        _remove_if_left(self._new_path)  # of a generation that was killed
        listener = listen(self._new_path, socket.AF_UNIX, share=False)
        self._inode = _inode_of(self._new_path)
        return listener

    @property
    def _new_path(self) -> str:
        return f"{self._path}.new"

    def serve(self) -> None:
        """Answer from now on, by a thread of this process."""
        assert self._listener is not None and self._ends is not None
        if not self._place.path:
            with self._explained():
                self._listener.listen(MAX_CONNECTIONS)
        metrics.PrometheusServer(Server(self._listener, self._app, self._ends[0]))
        self._listener = None  # the thread's

    def serve_in_worker(self) -> None:
        """The same in a process that the one that called ``open`` has forked."""
        assert self._ends is not None
        self._ends[1].close()
        self.serve()

    def take_place(self) -> None:
        """Have clients come here; to be called once the filter serves, before it says so.

        :raises CommandError: that cannot be.
        """
        if self._place.path:
            with self._explained():
                os.rename(self._new_path, self._path)
            _log.info("metrics are on %s", self._place)
        else:
            _log.info("metrics are on http://%s/metrics", self._place)

    def leave(self) -> None:
        """Others answer from now on: take nobody any more, here and in the workers."""
        if self._ends is not None:
            self._ends[1].close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """The filter has ended: leave nothing behind, not of generations that were killed either.

        May be called again: what another generation has is left to it.
        """
        self.leave()
        if not self._path:
            return
        for path in (self._path, self._new_path):
            with contextlib.suppress(OSError):
                if _inode_of(path) == self._inode:
                    os.unlink(path)
                else:
                    _remove_if_left(path)


def _inode_of(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _remove_if_left(path: str) -> None:
    """Remove a socket on which nobody listens any more, where there is one."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and _knock(path) == errno.ECONNREFUSED:
            os.unlink(path)


def _is_served(path: str) -> bool:
    return _knock(path) in (0, errno.EAGAIN, errno.EINPROGRESS)


def _knock(path: str) -> int:
    """The error of a connection, or 0."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path)
