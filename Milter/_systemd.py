"""Notify systemd, where it started the process (sd_notify(3), without its library)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping

from ._logging import logger

_log = logger(__name__)


class Notifier:
    """Tells the service manager about this process; does nothing where there is none.

    Args:
        environment: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are looked up.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._socket: socket.socket | None = None
        self._told_of_stop = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._interval = _watchdog_interval(environment)
        address = environment.get("NOTIFY_SOCKET", "")
        if address[:1] == "@":
            address = "\0" + address[1:]
        if address[:1] not in ("/", "\0"):
            return
        # Connected now: a filter may lose the right to reach the path.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(address)
        except OSError as exc:
            _log.warning("cannot reach systemd at NOTIFY_SOCKET: %s", exc.strerror)
            self._socket.close()
            self._socket = None

    def notify(self, state: str) -> None:
        """Send one assignment such as ``READY=1``; a failure is logged."""
        if self._socket is None:
            return
        try:
            self._socket.send(state.encode())
        except OSError as exc:
            _log.warning("cannot notify systemd (%s): %s", state, exc.strerror)

    @property
    def interval(self) -> float | None:
        """How often :meth:`alive` is to be called, in seconds, or None where nobody asks."""
        return self._interval if self._socket is not None else None

    def alive(self) -> None:
        """Feed the watchdog."""
        self.notify("WATCHDOG=1")

    def ready(self, status: str, feed: bool = True) -> None:
        """The service serves from now on; the watchdog is fed where one is asked for.

        Args:
            feed: by a thread; without it the caller does so, with :meth:`alive`.
        """
        self.notify(f"READY=1\nSTATUS={status}")
        if feed and self.interval is not None:
            # A thread that needs the interpreter: when callbacks keep hold of that, no sign of
            # life goes out.
            self._thread = threading.Thread(target=self._feed, name="watchdog", daemon=True)
            self._thread.start()

    def _feed(self) -> None:
        assert self._interval is not None
        while True:
            self.alive()
            if self._end.wait(self._interval):
                return

    def feed_no_more(self) -> None:
        """Another process gives the signs of life from now on."""
        self._end.set()

    def stopping(self) -> None:
        """The service begins to stop.  The watchdog is still fed, as that may take a while."""
        if not self._told_of_stop:
            self._told_of_stop = True
            self.notify("STOPPING=1")

    def close(self) -> None:
        """The service has stopped."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _watchdog_interval(environment: Mapping[str, str]) -> float | None:
    """Half of what systemd allows between two signs of life, in seconds."""
    pid = environment.get("WATCHDOG_PID")
    if pid is not None and pid != str(os.getpid()):
        return None
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 else None


def in_journal(environment: Mapping[str, str] = os.environ, descriptor: int = 2) -> bool:
    """Whether *descriptor* leads to the journal (JOURNAL_STREAM of systemd.exec(5))."""
    stream = environment.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
