"""``python -m Milter run``: serve with a filter class, without a program around it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import grp
import logging
import math
import os
import pwd
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import Milter

from . import _runner, _workers
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

DEFAULT_MODE = 0o660

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
        "--mode", type=_mode, help=f"of a unix socket, octal ({DEFAULT_MODE:04o})", default=None
    )
    parser.add_argument("--group", help="of a unix socket: a group the MTA is in")
    parser.add_argument("--user", help="who to become once the socket is open, when root")
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
    except (Milter.error, OSError) as exc:
        complain("run", exc)
        return EXIT_ERROR
    return EXIT_OK


def _serve(args: argparse.Namespace) -> None:
    where = _parse_socket(args)
    user = _find_user(args.user)
    group = _find_group(args.group)
    # The module of a package too goes by its last name.
    name = args.name or args.filter.partition(":")[0].rpartition(".")[2]
    Milter.factory = load_filter(args.filter)
    if where.kind == "unix":
        _check_directory(where, user, group)
        _check_nobody_listens(where)
    notifier = Notifier()
    _prepare(name, where, args)
    if args.workers > 1:
        _serve_with_workers(name, where, args, user, group, notifier)
    else:
        with _stopping_on_signals(notifier):
            _open_for(where, args.mode, user, group)
            try:
                _log.info("%s serves on %s", name, where.libmilter)
                notifier.ready(f"serving on {where.libmilter}")
            except BaseException:
                _shut()
                raise
            Milter.main()
    _log.info("%s has stopped", name)
    notifier.close()


def _serve_with_workers(
    name: str,
    where: FilterSocket,
    args: argparse.Namespace,
    user: pwd.struct_passwd | None,
    group: grp.struct_group | None,
    notifier: Notifier,
) -> None:
    def tell_that_all_serve() -> None:
        _log.info("%s serves on %s with %d workers", name, where.libmilter, args.workers)
        notifier.ready(f"serving on {where.libmilter} with {args.workers} workers", feed=False)

    _workers.check_threads()
    _open_for(where, args.mode, user, group)
    _workers.supervise(
        args.workers,
        on_ready=tell_that_all_serve,
        on_stop=notifier.stopping,
        on_beat=notifier.alive,
        beat=notifier.interval,
    )


def _open_for(
    where: FilterSocket,
    mode: int | None,
    user: pwd.struct_passwd | None,
    group: grp.struct_group | None,
) -> None:
    """Open the socket, and be root no more."""
    _open(where, mode, user, group)
    try:
        if user is not None:
            _become(user)
        _say_what_is_open(where, user)
    except BaseException:
        _shut()
        raise


def _prepare(name: str, where: FilterSocket, args: argparse.Namespace) -> None:
    """All that ``runmilter`` does before it opens the socket."""
    conn = f"fd:{where.number}" if where.kind == "fd" else where.libmilter
    Milter.setconn(conn)
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


def _check_directory(
    where: FilterSocket, user: pwd.struct_passwd | None, group: grp.struct_group | None
) -> None:
    """Refuse a directory in which somebody else could put another socket in the place of ours."""
    directory = Path(where.path).absolute().parent
    owner = (f"-o {user.pw_name} " if user else "") + (f"-g {group.gr_name} " if group else "")
    create = f"install -d {owner}-m 0750"
    try:
        directory = directory.resolve(strict=True)
        status = directory.stat()
    except (OSError, RuntimeError) as exc:
        raise CommandError(
            f"the socket's directory {directory} cannot be used: {getattr(exc, 'strerror', exc)}; "
            f"create it: {create} {directory}",
            EXIT_UNSAFE,
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise CommandError(f"{directory} is no directory; use another path", EXIT_UNSAFE)
    if status.st_mode & stat.S_IWOTH:
        raise CommandError(
            f"everybody may write to the socket's directory {directory}: use one of the filter's "
            f"own, such as: {create} {directory}/{Path(where.path).stem}",
            EXIT_UNSAFE,
        )
    trusted = {0, os.geteuid()} | ({user.pw_uid} if user is not None else set())
    for place in (directory, *directory.parents):
        status = place.stat()
        if status.st_uid not in trusted:
            raise CommandError(
                f"{place} belongs to another user ({_name_of(status.st_uid)}), who could replace "
                f"the socket: use a directory below none of theirs",
                EXIT_UNSAFE,
            )
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise CommandError(
                f"everybody may write to {place}, above the socket: chmod o-w {place}", EXIT_UNSAFE
            )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _check_nobody_listens(where: FilterSocket) -> None:
    """A socket that is left over may be removed, one that is served may not."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(where.path)
    if code in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise CommandError(
            f"another filter serves on {where.path}: stop it first, or use another path", EXIT_ERROR
        )


def _open(
    where: FilterSocket,
    mode: int | None,
    user: pwd.struct_passwd | None,
    group: grp.struct_group | None,
) -> None:
    """Open the socket so that at no time anybody but those it is meant for can connect."""
    before = os.umask(0o177)
    try:
        Milter.opensocket(True)
    finally:
        os.umask(before)
    if where.kind != "unix":
        return
    try:
        _give_access(
            where.path,
            DEFAULT_MODE if mode is None else mode,
            -1 if user is None else user.pw_uid,
            -1 if group is None else group.gr_gid,
        )
    except BaseException:
        _shut()
        raise


def _give_access(path: str, mode: int, uid: int, gid: int) -> None:
    # By descriptor where there are such: whoever owns the directory could exchange the path.
    flags = getattr(os, "O_PATH", 0) | os.O_NOFOLLOW
    descriptor = os.open(path, flags) if hasattr(os, "O_PATH") else -1
    link = f"/proc/self/fd/{descriptor}"
    target = link if descriptor >= 0 and os.path.exists(link) else path
    try:
        if not stat.S_ISSOCK(os.stat(target).st_mode):
            raise CommandError(f"{path} was replaced while it was opened", EXIT_UNSAFE)
        try:
            if (uid, gid) != (-1, -1):
                os.chown(target, uid, gid)
        except PermissionError:
            raise CommandError(
                f"cannot give the socket {path} away: only root can choose any --user and --group, "
                "others only a group that they are in",
                EXIT_ERROR,
            ) from None
        os.chmod(target, mode)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if mode & stat.S_IWOTH:
        _log.warning("mode %04o: every user of this machine can connect to %s", mode, path)


def _shut() -> None:
    """Undo opening: ``main`` after ``stop`` removes the socket and returns."""
    Milter.stop()
    Milter.main()


def _say_what_is_open(where: FilterSocket, user: pwd.struct_passwd | None) -> None:
    if where.is_tcp:
        local = where.host in ("localhost", "::1") or where.host.startswith("127.")
        _log.warning(
            "the milter protocol has no authentication and no encryption: %s can use this filter "
            "on %s%s",
            "every user of this machine" if local else "whoever reaches the port",
            where.libmilter,
            "" if local else "; let a firewall pass the MTA only",
        )
    if os.geteuid() == 0:
        _log.warning("the filter runs as root; name a user of its own with --user")


# --- users and groups ----------------------------------------------------------------------------


def _find_user(name: str | None) -> pwd.struct_passwd | None:
    if name is None:
        return None
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise CommandError(f"--user {name}: there is no such user") from None
    if os.geteuid() not in (0, user.pw_uid):
        raise CommandError(f"--user {name}: only root can become another user")
    return user


def _find_group(name: str | None) -> grp.struct_group | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name)
    except KeyError:
        raise CommandError(f"--group {name}: there is no such group") from None


def _become(user: pwd.struct_passwd) -> None:
    """Give root up for good, and make sure of it."""
    if os.geteuid() != 0:
        return
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except OSError as exc:
        raise CommandError(
            f"cannot become {user.pw_name}: {exc.strerror}; the filter does not go on as root",
            EXIT_UNSAFE,
        ) from exc
    if user.pw_uid != 0 and _can_be_root_again():
        raise CommandError(
            f"became {user.pw_name}, but the way back to root is open; refused", EXIT_UNSAFE
        )


def _can_be_root_again() -> bool:
    if 0 in (os.getuid(), os.geteuid()):
        return True
    try:
        os.setuid(0)
    except OSError:
        return False
    return True
