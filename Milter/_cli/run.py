"""``python -m Milter run``: serve with a filter class, without a program around it."""

from __future__ import annotations

import argparse
import errno
import math
import os
import socket
import sys
from typing import TYPE_CHECKING

import milter

import Milter

from .. import _runner, _socket_setup, _workers
from .._later import set_loop_factory
from .._logging import logger
from . import logs, settings
from .common import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_UNSAFE,
    SOCKET_HELP,
    CommandError,
    FilterSocket,
    complain,
    group_or_user,
    load_filter,
    load_loop_factory,
    octal_mode,
    printable,
    seconds,
    show_report,
)
from .inspection import inspect_filter
from .life import Life
from .reload import Generation

if TYPE_CHECKING:
    from .access_log import AccessLog
    from .exporter import Exporter

_log = logger("milter.run")

_EPILOG = f"""\
The module is imported as "python -m" would: from the current directory, then
from where Python finds modules.  It needs no code beyond the class.

{SOCKET_HELP}\
and fd:number is a listening socket that was inherited, where libmilter knows
that (Debian).  inet:port without a host listens on all addresses.

The directory of a unix socket must exist, and nobody but root, the user who
starts this and --user may be able to replace what is in it, by mode or by an
access control list (POSIX, on Linux).  If --user may not write to it, the socket
stays behind at the end, which is said at the start.

SIGTERM and SIGINT stop the filter: no new messages are taken, those in progress
may end.  Where systemd set NOTIFY_SOCKET it is told READY=1, RELOADING=1 and
STOPPING=1, and WATCHDOG=1 at half the interval of WATCHDOG_USEC.

SIGHUP reloads: the same command is run anew, by a fresh interpreter and as the
user that this process has become.  Once that serves, what served before takes no
new connections and goes on with those that it has, for an hour at most.  Where the
new code cannot serve, the old does.  The process that was started stays, and its
signals stay for it.

With --workers the processes are forked once the socket is open and root was given
up.  The first one supervises: it starts anew those that die, and tells systemd.

exit status:
  0  it was stopped; with --check, there is nothing to say
  1  it could not start, or could not go on; --check found something
  2  wrong arguments, or the module or class is none that can serve
  3  refused as unsafe: the socket's directory, or root was not given up
"""

#: What an option says that neither the command line nor --config names, where that is not None.
_DEFAULTS = {
    "timeout": 0.0,
    "workers": 1,
    "pin_workers": False,
    "log_level": "info",
    "log_format": "text",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``python -m Milter``."""
    parser = commands.add_parser(
        "run",
        help="serve an MTA with a filter",
        description="Serve an MTA with a filter, a class or a function of Milter.mailfilter.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda args: run(args, parser))
    parser.add_argument(
        "filter", metavar="MODULE:CLASS", nargs="?", help="the class, a Milter.Base, or a function"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file with further options, by their names; those given here go before it",
    )
    parser.add_argument("--socket", help="where to listen; needed but for --check")
    parser.add_argument(
        "--check",
        action="store_true",
        help="say what is wrong with the class, or looks so, and do not serve",
    )
    parser.add_argument(
        "--chdir", metavar="DIRECTORY", help="where to go first; modules are imported from there"
    )
    parser.add_argument("--name", help="the filter's name in logs and replies (the module's)")
    _add_access_options(parser)
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        help="how long to wait for the MTA to read or write (7210)",
    )
    parser.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=seconds,
        help="how long messages in progress may take after a stop (30)",
    )
    _add_serving_options(parser)
    _add_log_options(parser)


def _add_serving_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_workers_argument,
        help="how many processes serve; 0 is one per core (1)",
    )
    parser.add_argument(
        "--pin-workers",
        action=argparse.BooleanOptionalAction,
        help="each of them keeps to one core, faster under load",
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="who speaks to the MTA: libmilter (the default) or native, which is faster",
    )
    parser.add_argument(
        "--loop-factory",
        metavar="MODULE:FUNCTION",
        help="makes the event loop of coroutines, such as uvloop:new_event_loop (asyncio's)",
    )


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        type=octal_mode,
        help=f"of a unix socket, octal ({_socket_setup.DEFAULT_MODE:04o})",
        default=None,
    )
    parser.add_argument("--group", help="of a unix socket: a group the MTA is in")
    parser.add_argument(
        "--user",
        metavar="USER[:GROUP]",
        help="who to become once the socket is open, when root",
    )


def _add_log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=logs.LEVELS, help="on standard error (info)")
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        help="lines for people, or an object to a line for programs (text)",
    )
    parser.add_argument(
        "--log-config",
        metavar="FILE",
        help="log as this file for logging.config says: TOML, JSON or INI",
    )
    parser.add_argument(
        "--access-log",
        metavar="FILE",
        help="write a line for each message to this file; - is standard output",
    )
    parser.add_argument(
        "--metrics",
        metavar="[HOST:]PORT|unix:PATH",
        type=_place_argument,
        help="answer Prometheus there; needs prometheus-client",
    )


def _place_argument(text: str) -> str:
    return text


_place_argument.__name__ = "port or a string"
_place_argument.kinds = (int, str)  # type: ignore[attr-defined]


def _workers_argument(text: str) -> int:
    return _workers.worker_count(int(text))


_workers_argument.__name__ = f"number from 0 to {_workers.MAX_WORKERS}"
_workers_argument.kinds = (int,)  # type: ignore[attr-defined]


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Do what the arguments say; returns the exit status."""
    args.directory = os.getcwd()
    generation = None if args.check else Generation.take()
    try:
        _complete(args, parser)
        if args.check:
            return _check(args)
        output = _Output(args, is_reload=generation is not None)
        output.begin()
        _serve(args, generation, output)
    except (CommandError, Milter.error, OSError) as exc:
        if generation is not None:
            generation.failed(exc)
        return _failed(exc)
    return EXIT_OK


def _failed(exc: Exception) -> int:
    """Say why it fails; returns the exit status."""
    complain("run", exc)
    if isinstance(exc, CommandError):
        _log.debug("the cause:", exc_info=exc)
        return exc.status
    return EXIT_UNSAFE if isinstance(exc, _socket_setup.UnsafeError) else EXIT_ERROR


def _complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Find out what the command line leaves to a file and to habit."""
    if args.config is not None:
        settings.apply_file(parser, args)
    if args.log_config is not None and args.log_level is not None:
        raise CommandError("--log-level is for standard error, not for what --log-config says")
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    missing = [] if args.filter is not None else ["MODULE:CLASS"]
    if args.socket is None and not args.check:
        missing.append("--socket")
    if missing:
        raise CommandError(f"the following arguments are required: {', '.join(missing)}")
    if args.chdir is not None:
        try:
            _change_directory(args.chdir)
        except OSError as exc:
            raise CommandError(f"--chdir {args.chdir!r}: {exc.strerror}") from None


def _change_directory(path: str) -> None:
    before = os.getcwd()
    os.chdir(path)
    if sys.path[:1] in ([before], [""]):  # as "python -m" does, but with -I and the like
        sys.path[0] = os.getcwd()


def _check(args: argparse.Namespace) -> int:
    _Output(args, is_reload=False)
    _set_engine(args)
    if args.socket is not None:
        _parse_socket(args)
    _check_names(args)
    findings = inspect_filter(load_filter(args.filter))
    if args.loop_factory is not None:
        load_loop_factory(args.loop_factory)
    if not findings:
        show_report("run", f"{args.filter} can serve.")
        return EXIT_OK
    show_report("run", "\n".join(printable(str(each)) for each in findings))
    return EXIT_ERROR


class _Output:
    """What the filter tells beside mail: its log, the access log, and the counters.

    :param is_reload: a generation of the filter serves already.
    :raises CommandError: an argument is wrong, or a library is missing.
    """

    def __init__(self, args: argparse.Namespace, is_reload: bool) -> None:
        self._args = args
        self._is_reload = is_reload
        self._log_config: logs.LogConfig | None = None
        self.access_log: AccessLog | None = None
        self.exporter: Exporter | None = None
        # Each is imported where it is wanted: what it takes is no burden for other filters.
        if args.log_config is not None:
            self._log_config = logs.LogConfig(args.log_config)
        if args.access_log is not None:
            from .access_log import AccessLog

            self.access_log = AccessLog(args.access_log, args.log_format)
        if args.metrics is not None:
            from .exporter import Exporter

            self.exporter = Exporter(args.metrics, is_reload)

    def begin(self) -> None:
        """Set the log up: files are opened by who writes them, which is not root for long."""
        if self._log_config is None or self._gives_up_root:
            args = self._args
            logs.set_up(args.log_level, args.log_format, several=args.workers > 1)
        if self._log_config is not None and not self._gives_up_root:
            self._log_config.apply(self._is_reload)

    @property
    def _gives_up_root(self) -> bool:
        return self._args.user is not None and os.geteuid() == 0

    def open(self, was_root: bool) -> None:
        """The socket is open, and root was given up.

        :param was_root: until then.
        :raises CommandError: a file or a port cannot be opened.
        """
        if was_root and self._log_config is not None:
            self._log_config.apply(self._is_reload)
        if self.access_log is not None:
            try:
                self.access_log.open()
            except OSError as exc:
                raise CommandError(
                    f"--access-log {self._args.access_log}: {exc.strerror}", EXIT_ERROR
                ) from exc
        if self.exporter is not None:
            self.exporter.open()

    def leave(self) -> None:
        """Another generation serves."""
        if self.exporter is not None:
            self.exporter.leave()

    def close(self) -> None:
        """The filter has ended."""
        if self.exporter is not None:
            self.exporter.close()


def _serve(args: argparse.Namespace, generation: Generation | None, output: _Output) -> None:
    where = _parse_socket(args)
    life = Life(args, where, generation, output.leave)
    with life.hangups():
        _serve_filter(args, where, generation, output, life)


def _serve_filter(
    args: argparse.Namespace,
    where: FilterSocket,
    generation: Generation | None,
    output: _Output,
    life: Life,
) -> None:
    access = _access(where, args, generation)
    name = args.name or _module_name(args.filter)
    klass = Milter.factory = _load(args, generation)
    if where.kind == "unix" and generation is None:
        access.check_directory()
        _check_nobody_listens(where)
    _prepare(name, access.conn, args)
    if output.access_log is not None:
        output.access_log.attach(klass)
    several = args.workers > 1
    with life.signals(several):
        try:
            serve = _serve_with_workers if several else _serve_alone
            serve(name, where, args, access, life, output)
        except BaseException as exc:
            if not life.goes_on_after(exc):
                life.end_generations()
                raise
            _log.error("%s, which a reload replaced, ended with %r", name, exc)
        finally:
            if life.is_own_process():
                output.close()
        if not life.is_own_process():
            return  # a handler forked, and the child goes on
        try:
            life.wait_for_generations()
        finally:
            output.close()
    life.notifier.stopping()  # where it was stopped by other means than a signal
    _log.info("%s has stopped", name)
    life.notifier.close()


def _open(access: _socket_setup.Access, output: _Output) -> None:
    """Open all that is to be open; where that cannot be, nothing is."""
    was_root = output._gives_up_root
    access.open(True)
    try:
        output.open(was_root)
    except BaseException:
        _socket_setup.shut()
        raise


def _load(args: argparse.Namespace, generation: Generation | None) -> type[Milter.Base]:
    """The filter class, and what is to be said of it; after a reload, errors are refused."""
    klass = load_filter(args.filter)
    set_loop_factory(None if args.loop_factory is None else load_loop_factory(args.loop_factory))
    for finding in inspect_filter(klass):
        if finding.is_error and generation is not None:
            raise CommandError(str(finding))
        _log.warning("%s:%d: %s", finding.file, finding.line, finding.text)
    return klass


def _serve_alone(
    name: str,
    where: FilterSocket,
    args: argparse.Namespace,
    access: _socket_setup.Access,
    life: Life,
    output: _Output,
) -> None:
    def tell_that_it_serves() -> None:
        _log.info("%s serves on %s", name, where.libmilter)
        life.serves(f"serving on {where.libmilter}", workers=False)

    _open(access, output)
    try:
        if output.exporter is not None:
            output.exporter.serve()
            output.exporter.take_place()
        life.socket_is_open()
    except BaseException:
        _socket_setup.shut()
        raise
    milter._when_serving(tell_that_it_serves)
    Milter.main()


def _module_name(spec: str) -> str:
    """What a filter is called after its module; that of a package too goes by its last name."""
    module = spec.rpartition(":")[0]
    if module.endswith(".py"):
        return os.path.basename(module)[: -len(".py")]
    return module.rpartition(".")[2]


def _serve_with_workers(
    name: str,
    where: FilterSocket,
    args: argparse.Namespace,
    access: _socket_setup.Access,
    life: Life,
    output: _Output,
) -> None:
    def tell_that_all_serve() -> None:
        if output.exporter is not None:
            output.exporter.take_place()
        _log.info("%s serves on %s with %d workers", name, where.libmilter, args.workers)
        life.serves(f"serving on {where.libmilter} with {args.workers} workers", workers=True)

    _workers.check_pinning(args.pin_workers)
    _workers.check_threads()
    _open(access, output)
    life.socket_is_open()
    _workers.supervise(
        args.workers,
        None if output.exporter is None else output.exporter.serve_in_worker,
        pin=args.pin_workers,
        on_ready=tell_that_all_serve,
        on_stop=life.on_stop,
        on_beat=life.on_beat,
        beat=life.beat,
        on_signal=life.on_signal,
        news=life.news,
        on_news=life.on_news,
    )


def _prepare(name: str, conn: str, args: argparse.Namespace) -> None:
    """All that ``runmilter`` does before it opens the socket."""
    _set_engine(args)
    Milter.setconn(conn)
    if args.timeout:
        Milter.settimeout(math.ceil(args.timeout))
    if args.drain_timeout is not None:
        Milter.set_drain_timeout(args.drain_timeout)
    _runner.register_callbacks(name)


def _set_engine(args: argparse.Namespace) -> None:
    if args.engine is not None:
        try:
            Milter.set_engine(args.engine)
        except Milter.InvalidArgument as exc:
            raise CommandError(str(exc).replace("set_engine: name:", "--engine:")) from None


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


def _access(
    where: FilterSocket, args: argparse.Namespace, generation: Generation | None
) -> _socket_setup.Access:
    _check_names(args)
    user, _, group = (args.user or "").partition(":")
    if generation is not None:
        # Opened and given away by the process that was started, which has become that user.
        return _socket_setup.Access(f"fd:{generation.listener}", is_known=True)
    mode = args.mode
    if mode is None and where.kind == "unix":
        mode = _socket_setup.DEFAULT_MODE
    try:
        return _socket_setup.Access(
            where.libmilter,
            mode,
            group_or_user(args.group),
            group_or_user(user),
            group_or_user(group),
        )
    except ValueError as exc:
        raise CommandError(_named_option(str(exc), args)) from None


def _check_names(args: argparse.Namespace) -> None:
    """An empty name, such as that of a variable that is not set, must not mean root."""
    if args.group == "":
        raise CommandError("--group '': the name is missing")
    if args.user is not None and not all(args.user.split(":")):
        raise CommandError(f"--user {args.user!r}: write USER or USER:GROUP")


def _named_option(text: str, args: argparse.Namespace) -> str:
    """What ``Access`` says of a parameter, said of the option that it comes from."""
    if text.startswith("socket_"):
        return f"--{text[len('socket_') :]}"
    if ":" in (args.user or ""):
        return f"--user {args.user!r}: {text}"
    return f"--{text}" if text.startswith("user ") else text


def _check_nobody_listens(where: FilterSocket) -> None:
    """A socket that is left over may be removed, one that is served may not."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(where.path)
    if code in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise CommandError(
            f"another filter serves on {where.path}: stop it first, or use another path", EXIT_ERROR
        )
