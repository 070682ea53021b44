"""``python -m Milter run``: serve with a filter class, without a program around it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import math
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import Milter

from . import _runner, _socket_setup, _workers
from ._cli_common import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_UNSAFE,
    SOCKET_HELP,
    CommandError,
    FilterSocket,
    complain,
    load_filter,
    seconds,
)
from ._systemd import Notifier, in_journal

_log = logging.getLogger("milter.run")

_EPILOG = f"""\
The module is imported as "python -m" would: from the current directory, then
from where Python finds modules.  It needs no code beyond the class.

{SOCKET_HELP}\
and fd:number is a listening socket that was inherited, where libmilter knows
that (Debian).  inet:port without a host listens on all addresses.

The directory of a unix socket must exist, and nobody but root, the user who
starts this and --user may be able to replace what is in it.

SIGTERM, SIGINT and SIGHUP stop the filter: no new messages are taken, those in
progress may end.  Where systemd set NOTIFY_SOCKET it is told READY=1 and
STOPPING=1, and WATCHDOG=1 at half the interval of WATCHDOG_USEC.

With --workers the processes are forked once the socket is open and root was given
up.  The first one supervises: it starts anew those that die, and tells systemd.

exit status:
  0  it was stopped
  1  it could not start, or could not go on
  2  wrong arguments, or the module or class is none that can serve
  3  refused as unsafe: the socket's directory, or root was not given up
"""

_LEVELS = ("debug", "info", "warning", "error")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``python -m Milter``."""
    parser = commands.add_parser(
        "run",
        help="serve an MTA with a filter class",
        description="Serve an MTA with a filter class.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("filter", metavar="MODULE:CLASS", help="the class, a Milter.Base")
    parser.add_argument("--socket", required=True, help="where to listen")
    parser.add_argument("--name", help="the filter's name in logs and replies (the module's)")
    parser.add_argument(
        "--mode",
        type=_mode,
        help=f"of a unix socket, octal ({_socket_setup.DEFAULT_MODE:04o})",
        default=None,
    )
    parser.add_argument("--group", help="of a unix socket: a group the MTA is in")
    parser.add_argument(
        "--user",
        metavar="USER[:GROUP]",
        help="who to become once the socket is open, when root",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=0.0,
        help="how long to wait for the MTA to read or write (7210)",
    )
    parser.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=seconds,
        help="how long messages in progress may take after a stop (30)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_workers_argument,
        default=1,
        help="how many processes serve; 0 is one per core (%(default)s)",
    )
    parser.add_argument(
        "--pin-workers",
        action="store_true",
        help="each of them keeps to one core, faster under load",
    )
    parser.add_argument(
        "--log-level", choices=_LEVELS, default="info", help="on standard error (%(default)s)"
    )


def _mode(text: str) -> int:
    value = int(text, 8)
    if not 0 <= value <= 0o777 or not text.isdigit():
        raise ValueError(text)
    return value


_mode.__name__ = "octal mode between 0 and 0777"


def _workers_argument(text: str) -> int:
    return _workers.worker_count(int(text))


_workers_argument.__name__ = f"number from 0 to {_workers.MAX_WORKERS}"


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    _set_up_logging(args.log_level, several=args.workers > 1)
    try:
        _serve(args)
    except CommandError as exc:
        _log.debug("the cause:", exc_info=exc)
        complain("run", exc)
        return exc.status
    except _socket_setup.UnsafeError as exc:
        complain("run", exc)
        return EXIT_UNSAFE
    except (Milter.error, OSError) as exc:
        complain("run", exc)
        return EXIT_ERROR
    return EXIT_OK


def _serve(args: argparse.Namespace) -> None:
    where = _parse_socket(args)
    access = _access(where, args)
    # The module of a package too goes by its last name.
    name = args.name or args.filter.partition(":")[0].rpartition(".")[2]
    Milter.factory = load_filter(args.filter)
    if where.kind == "unix":
        access.check_directory()
        _check_nobody_listens(where)
    notifier = Notifier()
    _prepare(name, where, args)
    if args.workers > 1:
        _serve_with_workers(name, where, args, access, notifier)
    else:
        with _stopping_on_signals(notifier):
            access.open(True)
            try:
                _log.info("%s serves on %s", name, where.libmilter)
                notifier.ready(f"serving on {where.libmilter}")
            except BaseException:
                _socket_setup.shut()
                raise
            Milter.main()
    notifier.stopping()  # where it was stopped by other means than a signal
    _log.info("%s has stopped", name)
    notifier.close()


def _serve_with_workers(
    name: str,
    where: FilterSocket,
    args: argparse.Namespace,
    access: _socket_setup.Access,
    notifier: Notifier,
) -> None:
    def tell_that_all_serve() -> None:
        _log.info("%s serves on %s with %d workers", name, where.libmilter, args.workers)
        notifier.ready(f"serving on {where.libmilter} with {args.workers} workers", feed=False)

    _workers.check_pinning(args.pin_workers)
    _workers.check_threads()
    access.open(True)
    _workers.supervise(
        args.workers,
        pin=args.pin_workers,
        on_ready=tell_that_all_serve,
        on_stop=notifier.stopping,
        on_beat=notifier.alive,
        beat=notifier.interval,
    )


def _prepare(name: str, where: FilterSocket, args: argparse.Namespace) -> None:
    """All that ``runmilter`` does before it opens the socket."""
    Milter.setconn(_conn(where))
    if args.timeout:
        Milter.settimeout(math.ceil(args.timeout))
    if args.drain_timeout is not None:
        Milter.set_drain_timeout(args.drain_timeout)
    _runner.register_callbacks(name)


@contextlib.contextmanager
def _stopping_on_signals(notifier: Notifier) -> Iterator[None]:
    """Stop, and tell systemd so, on the signals for which the module has no handler."""

    def stop(number: int, _frame: FrameType | None) -> None:
        notifier.stopping()
        Milter.stop()

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            previous[number] = handler
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- logging -------------------------------------------------------------------------------------


class _JournalFormatter(logging.Formatter):
    """Lines with the priority that the journal reads at their start (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4
        if record.levelno < logging.WARNING:
            priority = 6 if record.levelno >= logging.INFO else 7
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


def _set_up_logging(level: str, several: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if in_journal():
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        process = "[%(process)d] " if several else ""
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s {process}%(levelname)s %(name)s: %(message)s")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler])


# --- the socket ----------------------------------------------------------------------------------


def _parse_socket(args: argparse.Namespace) -> FilterSocket:
    try:
        where = FilterSocket.parse(args.socket)
    except ValueError as exc:
        raise CommandError(str(exc)) from None
    for option in ("mode", "group"):
        if where.kind != "unix" and getattr(args, option) is not None:
            raise CommandError(f"--{option} is for unix sockets, not for {args.socket}")
    return where


def _conn(where: FilterSocket) -> str:
    return f"fd:{where.number}" if where.kind == "fd" else where.libmilter


def _access(where: FilterSocket, args: argparse.Namespace) -> _socket_setup.Access:
    user, _, group = (args.user or "").partition(":")
    mode = args.mode
    if mode is None and where.kind == "unix":
        mode = _socket_setup.DEFAULT_MODE
    try:
        return _socket_setup.Access(
            _conn(where), mode, _number(args.group), _number(user), _number(group)
        )
    except ValueError as exc:
        raise CommandError(str(exc).removeprefix("socket_")) from None


def _number(text: str | None) -> str | int | None:
    """A name, or the number of a user or group that is written in digits."""
    return int(text) if text and text.isascii() and text.isdigit() else text or None


def _check_nobody_listens(where: FilterSocket) -> None:
    """A socket that is left over may be removed, one that is served may not."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(where.path)
    if code in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise CommandError(
            f"another filter serves on {where.path}: stop it first, or use another path", EXIT_ERROR
        )
