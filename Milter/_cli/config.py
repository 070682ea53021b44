"""``python -m Milter config``: have an MTA ask a filter, beside those that it asks already."""

from __future__ import annotations

import argparse
import errno
import re
from collections.abc import Iterable

from . import postfix, sendmail, streams
from .common import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_USAGE,
    SOCKET_HELP,
    CommandError,
    FilterSocket,
    complain,
    load_filter,
)

_EPILOG = f"""\
{SOCKET_HELP}
With MODULE:CLASS the comments say which callbacks and macros (@symlist) the
filter asks for, and lines are added for macros that the MTA does not send by
default.

For Postfix it prints commands (postconf -e) that add the filter to those that
are there; for sendmail, lines for sendmail.mc.  With --apply it shows what
changes and does it; that the MTA reads it is left to you.

exit status:
  0  the lines are printed, and with --apply the filter is in the configuration
  1  they could not be written, or the configuration not be read or changed
  2  wrong arguments, or the module or class is none that can serve
"""

#: Why there is nothing to configure, and what to do instead.
_NO_CLIENT = {
    "exim": "Exim has no milter client: let Postfix or sendmail take the mail, with the filter, "
    "and pass it on to Exim by SMTP (relayhost in Postfix, SMART_HOST in sendmail)",
    "opensmtpd": "OpenSMTPD has no milter client, only filters of its own kind (smtpd-filters(7)): "
    "let Postfix or sendmail take the mail, with the filter, and pass it on to OpenSMTPD by SMTP",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``python -m Milter``."""
    parser = commands.add_parser(
        "config",
        help="print what makes Postfix or sendmail use a filter, or do it",
        description="Print what makes an MTA use a filter beside those that it has, or do it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=config)
    parser.add_argument("mta", choices=("postfix", "sendmail", *_NO_CLIENT))
    parser.add_argument(
        "filter", metavar="MODULE:CLASS", nargs="?", help="the filter class, or a function"
    )
    parser.add_argument("--name", help="the filter's name; needed")
    parser.add_argument("--socket", help="where the filter listens; needed")
    parser.add_argument(
        "--apply", action="store_true", help="show what changes in the configuration, and do it"
    )
    parser.add_argument(
        "--default-action",
        choices=("accept", "reject", "tempfail", "quarantine"),
        default="tempfail",
        help="what becomes of mail while the filter does not answer (%(default)s); "
        "sendmail has no quarantine",
    )
    parser.add_argument("--connect-timeout", metavar="SECONDS", type=_whole, default=10)
    parser.add_argument("--command-timeout", metavar="SECONDS", type=_whole, default=30)
    parser.add_argument(
        "--content-timeout",
        metavar="SECONDS",
        type=_whole,
        default=300,
        help="for the answer to the end of a message (%(default)s)",
    )
    postfix.add_arguments(parser)
    sendmail.add_arguments(parser)


def take_class(args: argparse.Namespace, rest: list[str]) -> bool:
    """Take MODULE:CLASS where it stands after the options, which argparse leaves over."""
    if args.filter is not None or len(rest) != 1 or rest[0].startswith("-"):
        return False
    args.filter = rest[0]
    return True


def _whole(text: str) -> int:
    value = int(text)
    if not 0 < value <= 86400:
        raise ValueError(text)
    return value


_whole.__name__ = "number of whole seconds from 1 to 86400"


def config(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    try:
        where = _check(args)
        klass = load_filter(args.filter) if args.filter else None
        if args.mta == "postfix":
            change = postfix.Change(args, where, klass)
            return _apply_to_postfix(change) if args.apply else _show(change.lines())
        lines = list(sendmail.lines(args, where, klass))
        return _apply_to_sendmail(args, lines) if args.apply else _show(lines)
    except (CommandError, ValueError) as exc:
        complain("config", exc)
        return getattr(exc, "status", EXIT_USAGE)


def _apply_to_postfix(change: postfix.Change) -> int:
    if not change.postconf.is_there:
        raise CommandError("--apply: Postfix is not on this machine (no postconf)", EXIT_ERROR)
    if not change.settings:
        return _show(["# Postfix has all this already: there is nothing to change."])
    # What cannot be shown is not done.
    status = _show(change.difference())
    if status == EXIT_OK:
        change.apply()
        status = _show(["# Done. For Postfix to read it: postfix reload"])
    return status


def _apply_to_sendmail(args: argparse.Namespace, lines: list[str]) -> int:
    path = args.mc or sendmail.DEFAULT_MC
    after, changed = sendmail.difference(path, args.name, "\n".join(lines))
    changes = list(changed)
    if not changes:
        return _show([f"# {path} has all this already: there is nothing to change."])
    status = _show(changes)
    if status == EXIT_OK:
        sendmail.write(path, after)
        status = _show(["# Done. Now make sendmail.cf of it, and restart sendmail."])
    return status


def _show(lines: Iterable[str]) -> int:
    failed = streams.show("\n".join(lines))
    if failed is None:
        return EXIT_OK
    # The lines are all that there is: without them nothing was done.
    if failed.errno != errno.EPIPE:
        complain("config", f"standard output: {failed.strerror}")
    return EXIT_ERROR


def _check(args: argparse.Namespace) -> FilterSocket:
    if args.mta in _NO_CLIENT:
        raise CommandError(_NO_CLIENT[args.mta])
    missing = [f"--{name}" for name in ("name", "socket") if getattr(args, name) is None]
    if missing:
        raise CommandError(f"the following arguments are required: {', '.join(missing)}")
    # What m4 takes as one word, and Postfix in a comment.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", args.name):
        raise CommandError(f"--name {args.name!r}: use letters, digits, - and _")
    where = FilterSocket.parse(args.socket)
    if where.kind != "unix" and (where.kind == "fd" or where.number == 0):
        raise CommandError(f"socket {args.socket!r}: an MTA needs a path or a port")
    if where.kind == "unix" and not where.path.startswith("/"):
        raise CommandError(f"socket {args.socket!r}: write the whole path, from /")
    if not re.fullmatch(r"[A-Za-z0-9_./:%+@\[\]-]+", where.path or where.host or "-"):
        raise CommandError(
            f"socket {args.socket!r}: the MTAs' files take letters, digits and ._/+@- only"
        )
    if args.mta == "sendmail" and args.default_action == "quarantine":
        raise CommandError("--default-action quarantine: sendmail cannot do that")
    return where
