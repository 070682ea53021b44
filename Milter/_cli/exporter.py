"""``run --metrics``: the exporter of ``Milter.metrics``, through workers and reloads.

The listening socket is opened once root was given up, by the process that was started, so that what
is wrong is said at the start; the workers inherit it. After a reload both generations listen for a
moment, and who gave way answers those who had come to it: on a port the system lets several
processes of a user listen, in a directory the new socket takes the place of the old one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import stat

from .. import metrics
from .._logging import logger
from .._metrics_http import Server, listen
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
        self._is_reload = is_reload
        self._listener: socket.socket | None = None
        self._inode = (-1, -1)
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def open(self) -> None:
        """Begin to count, and listen; nobody is answered yet.

        :raises CommandError: it cannot listen there.
        """
        try:
            self._listener = self._listen_on_path() if self._place.path else self._listen_on_port()
            self._ends = socket.socketpair()
        except OSError as exc:
            why = f"cannot listen on {self._place}: {exc.strerror or exc}"
            raise CommandError(f"--metrics: {why}", EXIT_ERROR) from exc
        metrics.enable()
        if self._place.path:
            _log.info("metrics are on %s", self._place)
        else:
            port = self._listener.getsockname()[1]
            place = dataclasses.replace(self._place, port=port)
            _log.info("metrics are on http://%s/metrics", place)

    def _listen_on_port(self) -> socket.socket:
        host, port = self._place.host, self._place.port
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        if port == 0:
            return listen(address, family, share=False)  # type: ignore[arg-type]
        if not self._is_reload:
            # Another filter of this user, whose port may be shared as well, is found by this.
            listen(address, family, share=False).close()  # type: ignore[arg-type]
        return listen(address, family, share=True)  # type: ignore[arg-type]

    def _listen_on_path(self) -> socket.socket:
        path = self._place.path
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise OSError(0, "there is something that is no socket")
            if not self._is_reload and _is_served(path):
                raise OSError(0, "another process listens there")
        new = f"{path}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        listener = listen(new, socket.AF_UNIX, share=False)
        try:
            status = os.lstat(new)
            os.rename(new, path)
        except OSError:
            listener.close()
            os.unlink(new)
            raise
        self._inode = (status.st_dev, status.st_ino)
        return listener

    def serve(self) -> None:
        """Answer from now on, by a thread of this process."""
        assert self._listener is not None and self._ends is not None
        metrics.PrometheusServer(Server(self._listener, self._app, self._ends[0]))
        self._listener = None  # the thread's

    def serve_in_worker(self) -> None:
        """The same in a process that the one that called ``open`` has forked."""
        assert self._ends is not None
        self._ends[1].close()
        self.serve()

    def leave(self) -> None:
        """Others answer from now on: take nobody any more, here and in the workers."""
        if self._ends is not None:
            self._ends[1].close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """The filter has ended: leave nothing behind."""
        self.leave()
        with contextlib.suppress(OSError):
            status = os.lstat(self._place.path)
            if (status.st_dev, status.st_ino) == self._inode:
                os.unlink(self._place.path)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN, errno.EINPROGRESS)
