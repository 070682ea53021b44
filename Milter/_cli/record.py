"""``python -m Milter record``: stand between an MTA and a filter, and write down what they say."""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone

import milter

from .._socket_setup import UnsafeError
from .._systemd import Notifier
from ..mta import FilterUnreachable, SocketAddress
from ..mta.client import open_socket
from . import streams
from .common import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_UNSAFE,
    EXIT_USAGE,
    SOCKET_HELP,
    FilterSocket,
    complain,
    naming,
    octal_mode,
    printable,
    show_report,
)
from .listening import Place, listen
from .relay import Relay
from .session_file import SUFFIX, SessionFile

_DRAIN = 30.0  # seconds that sessions may go on after a stop
_CONNECT = 30.0  # seconds for a connection to the filter
_BREATH = 0.1  # seconds, where there are no descriptors left

_EPILOG = f"""\
{SOCKET_HELP}
Have the MTA connect to where --listen is.  Every byte goes on as it came, in both
directions.  Each session becomes a file in the directory, TIME-PROCESS-NUMBER{SUFFIX}
({SUFFIX}.part while it lasts), whose name is printed when it is over; the command
"send" can play it again.  Files hold addresses, headers and bodies of mail: private data, for
the eyes of their owner only (mode 0600).

Where the filter does not answer, the MTA's connection is closed.  Where a file
cannot be written, that is logged and the session goes on.

The directory of a unix socket to listen on must exist, and nobody but root and
who starts this may be able to replace what is in it, as for "run".

SIGTERM, SIGINT and SIGHUP stop it: sessions may go on for {_DRAIN:g} s, or to the second signal.
Where systemd set NOTIFY_SOCKET it is told READY=1 and STOPPING=1, and WATCHDOG=1
at half the interval of WATCHDOG_USEC.

exit status:
  0  it was stopped
  1  it could not listen, or there is no such directory
  2  wrong arguments
  3  refused as unsafe: the socket's directory
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``python -m Milter``."""
    parser = commands.add_parser(
        "record",
        help="stand between an MTA and a filter, and write each session to a file",
        description="Stand between an MTA and a filter, and write each session to a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=record)
    parser.add_argument("--listen", metavar="SOCKET", required=True, help="where the MTA connects")
    parser.add_argument(
        "--filter", metavar="SOCKET", required=True, help="where the filter listens"
    )
    parser.add_argument(
        "--to", metavar="DIR", required=True, help="where the files go; made if it is not there"
    )
    parser.add_argument(
        "--max-size",
        metavar="BYTES",
        type=_size,
        default=16 << 20,
        help="of a file: what would be more is left out (%(default)s)",
    )
    parser.add_argument(
        "--mode",
        metavar="MODE",
        type=octal_mode,
        help="of a unix socket to listen on, octal (0660)",
    )
    parser.add_argument(
        "--group", metavar="GROUP", help="of a unix socket to listen on: one that the MTA is in"
    )


def _size(text: str) -> int:
    value = int(text)
    if value < 1000:
        raise ValueError(text)
    return value


# argparse names the type in its complaint.
_size.__name__ = "size of at least 1000 bytes"


def record(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    try:
        with naming("--listen"):
            where = FilterSocket.parse(args.listen)
        with naming("--filter"):
            target = FilterSocket.parse(args.filter)
            filter = target.address
        if where == target:
            raise ValueError(f"--listen and --filter are the same: {args.listen}")
        place = Place.of(where, args.mode, args.group)
    except ValueError as exc:
        complain("record", exc)
        return EXIT_USAGE
    try:
        os.makedirs(args.to, 0o700, exist_ok=True)
        if not os.access(args.to, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as exc:
        reason = os.strerror(errno.ENOTDIR) if exc.errno == errno.EEXIST else exc.strerror
        complain("record", f"--to {args.to!r}: {reason}")
        return EXIT_ERROR
    notifier = Notifier()
    with _signals() as stopped, contextlib.closing(notifier):
        try:
            with listen(place) as listener:
                _say(
                    f"listens on {args.listen} for the filter on {args.filter}; what it writes to "
                    f"{args.to} is private data: addresses, headers and bodies of mail"
                )
                notifier.ready(f"recording on {args.listen} for the filter on {args.filter}")
                recorder = _Recorder(filter, args.to, args.max_size)
                recorder.serve(listener, stopped)
                notifier.stopping()
        except UnsafeError as exc:
            complain("record", exc)
            return EXIT_UNSAFE
        except (OSError, milter.error) as exc:
            why = getattr(exc, "strerror", None) or exc
            complain("record", f"cannot listen on {args.listen}: {why}")
            return EXIT_ERROR
        recorder.drain(stopped)
    return EXIT_OK


def _say(text: str) -> None:
    streams.note(f"python -m Milter record: {printable(text)}")


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket on which a byte comes in with each signal that stops."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {}
    with ours, theirs:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before[number] = signal.signal(number, lambda *_: None)
        wakeup = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield ours
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


class _Recorder:
    """Has a relay, a file and a thread for each session."""

    def __init__(self, filter: SocketAddress, directory: str, limit: int) -> None:
        self._filter = filter
        self._directory = directory
        self._limit = limit
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._sessions: dict[threading.Thread, Relay | None] = {}

    def serve(self, listener: socket.socket, stopped: socket.socket) -> None:
        """Take connections until a signal comes."""
        while True:
            ready, _, _ = select.select([listener, stopped], [], [])
            if stopped in ready:
                stopped.recv(1)
                return
            try:
                connection, _ = listener.accept()
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    _say(f"cannot take a connection: {exc.strerror}")
                    time.sleep(_BREATH)
                continue
            thread = threading.Thread(target=self._session, args=(connection,), daemon=True)
            with self._lock:
                self._sessions[thread] = None
            try:
                thread.start()
            except RuntimeError as exc:
                self._forget(thread)
                connection.close()
                _say(f"cannot take a connection: {exc}")

    def drain(self, stopped: socket.socket) -> None:
        """Wait for sessions to end, not for long and not after another signal."""
        deadline = time.monotonic() + _DRAIN
        stopped.settimeout(_BREATH)
        while self._threads() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError, socket.timeout):
                stopped.recv(1)
                break
        with self._lock:
            relays = [relay for relay in self._sessions.values() if relay is not None]
        for relay in relays:
            relay.stop()
        for thread in self._threads():
            thread.join(max(deadline - time.monotonic(), 1.0))

    def _threads(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._sessions)

    def _forget(self, thread: threading.Thread) -> None:
        with self._lock:
            self._sessions.pop(thread, None)

    def _session(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._relay(connection)
        finally:
            self._forget(threading.current_thread())

    def _relay(self, connection: socket.socket) -> None:
        try:
            filter = open_socket(self._filter, _CONNECT)
        except FilterUnreachable as exc:
            _say(f"{exc}; the MTA's connection is closed")
            return
        now = datetime.now(timezone.utc)
        name = f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}-{next(self._numbers):06}{SUFFIX}"
        file = SessionFile(
            os.path.join(self._directory, name),
            f"{now:%Y-%m-%d %H:%M:%S} UTC, filter {printable(str(self._filter))}",
            self._limit,
            _say,
        )
        relay = Relay(connection, filter, file)
        with self._lock:
            self._sessions[threading.current_thread()] = relay
        try:
            relay.run()
        except RuntimeError as exc:
            _say(f"cannot carry a session: {exc}")
        finally:
            if file.close():
                with self._lock:
                    show_report("record", printable(file.path))
