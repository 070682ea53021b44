"""``python -m Milter config``: the lines that make an MTA use a filter."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import _base
from ._cli_common import (
    EXIT_OK,
    EXIT_USAGE,
    SOCKET_HELP,
    CommandError,
    FilterSocket,
    complain,
    load_filter,
)
from ._decorators import MACROS_MARK
from ._protocol import MACRO_CALLBACKS, OPTIONAL_CALLBACKS

if TYPE_CHECKING:
    from Milter import Base

_EPILOG = f"""\
{SOCKET_HELP}
With MODULE:CLASS the comments say which callbacks and macros (@symlist) the
filter asks for, and lines are added for macros that the MTA does not send by
default.

exit status:
  0  the lines are printed
  2  wrong arguments, or the module or class is none that can serve
"""

#: The macros that Postfix sends by default (postconf -d), and the parameter of each stage.
_POSTFIX_MACROS = {
    "connect": ("milter_connect_macros", "j {daemon_name} {daemon_addr} v _"),
    "hello": (
        "milter_helo_macros",
        "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}",
    ),
    "envfrom": (
        "milter_mail_macros",
        "i {auth_type} {auth_authen} {auth_author} {mail_addr} {mail_host} {mail_mailer}",
    ),
    "envrcpt": ("milter_rcpt_macros", "i {rcpt_addr} {rcpt_host} {rcpt_mailer}"),
    "data": ("milter_data_macros", "i"),
    "eoh": ("milter_end_of_header_macros", "i"),
    "eom": ("milter_end_of_data_macros", "i"),
}

#: The same for sendmail (m4/cfhead.m4); no list is defined for two of the stages.
_SENDMAIL_MACROS = {
    "connect": ("confMILTER_MACROS_CONNECT", "j _ {daemon_name} {if_name} {if_addr}"),
    "hello": (
        "confMILTER_MACROS_HELO",
        "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}",
    ),
    "envfrom": (
        "confMILTER_MACROS_ENVFROM",
        (
            "i {auth_type} {auth_authen} {auth_ssf} {auth_author} "
            "{mail_mailer} {mail_host} {mail_addr}"
        ),
    ),
    "envrcpt": ("confMILTER_MACROS_ENVRCPT", "{rcpt_mailer} {rcpt_host} {rcpt_addr}"),
    "data": ("confMILTER_MACROS_DATA", ""),
    "eoh": ("confMILTER_MACROS_EOH", ""),
    "eom": ("confMILTER_MACROS_EOM", "{msg_id}"),
}

#: Letters of ``F=`` in sendmail; without any the message passes as if there were no filter.
_SENDMAIL_FLAGS = {"accept": "", "reject": "F=R, ", "tempfail": "F=T, "}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``python -m Milter``."""
    parser = commands.add_parser(
        "config",
        help="print the lines for main.cf or sendmail.mc",
        description="Print the lines that make an MTA use a filter.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=config)
    parser.add_argument("mta", choices=("postfix", "sendmail"))
    parser.add_argument("filter", metavar="MODULE:CLASS", nargs="?", help="the filter class")
    parser.add_argument("--name", required=True, help="the filter's name")
    parser.add_argument("--socket", required=True, help="where the filter listens")
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
    parser.add_argument(
        "--queue-directory",
        metavar="DIRECTORY",
        default="/var/spool/postfix",
        help="Postfix's (%(default)s)",
    )


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


_whole.__name__ = "number of whole seconds from 1"


def config(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    try:
        where = _check(args)
        klass = load_filter(args.filter) if args.filter else None
        lines = (_postfix if args.mta == "postfix" else _sendmail)(args, where, klass)
        print("\n".join(lines))
    except (CommandError, ValueError) as exc:
        complain("config", exc)
        return getattr(exc, "status", EXIT_USAGE)
    return EXIT_OK


def _check(args: argparse.Namespace) -> FilterSocket:
    # What m4 takes as one word, and Postfix in a comment.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", args.name):
        raise CommandError(f"--name {args.name!r}: use letters, digits, - and _")
    where = FilterSocket.parse(args.socket)
    if where.kind == "fd":
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


# --- Postfix -------------------------------------------------------------------------------------


def _postfix(
    args: argparse.Namespace, where: FilterSocket, klass: type[Base] | None
) -> Iterator[str]:
    yield f"# {args.name}: for main.cf of Postfix 3.0 or later, then: postfix reload"
    yield from _asked_for("#", klass)
    yield "# Other filters in smtpd_milters stay there, separated by commas."
    name = where.postfix
    queue = args.queue_directory.rstrip("/") + "/"
    if where.kind == "unix" and where.path.startswith(queue):
        yield "# The path is relative to the queue directory, for daemons in a chroot and others."
        name = f"unix:{where.path[len(queue) :]}"
    elif where.kind == "unix":
        yield f"# A daemon in a chroot (master.cf) looks for this path below {queue[:-1]}."
    yield "smtpd_milters ="
    yield f"    {{ {name},"
    yield f"      connect_timeout={args.connect_timeout}s, command_timeout={args.command_timeout}s,"
    yield f"      content_timeout={args.content_timeout}s, default_action={args.default_action} }}"
    yield "# Mail that does not come by SMTP, such as from the sendmail command."
    yield "non_smtpd_milters = $smtpd_milters"
    for callback, (parameter, default) in _POSTFIX_MACROS.items():
        missing = _missing(klass, callback, default)
        if missing:
            yield f"# The default, and what {args.name} asks for."
            yield f"{parameter} = {' '.join([*default.split(), *missing])}"


# --- sendmail ------------------------------------------------------------------------------------


def _sendmail(
    args: argparse.Namespace, where: FilterSocket, klass: type[Base] | None
) -> Iterator[str]:
    yield f"dnl # {args.name}: for sendmail.mc, before the MAILER lines; then make sendmail.cf"
    yield "dnl # anew and restart sendmail."
    yield from _asked_for("dnl #", klass)
    if where.kind == "inet6" and ":" in where.client_host:
        # Seen with 8.17.1: "milter_open(): connect failed: Invalid argument".
        yield "dnl # sendmail 8.17 fails to connect to a literal IPv6 address; where it logs"
        yield 'dnl # "Invalid argument", write a name of that address from /etc/hosts instead.'
    times = f"C:{args.connect_timeout}s;S:{args.command_timeout}s;R:{args.command_timeout}s"
    flags = _SENDMAIL_FLAGS[args.default_action]
    yield (
        f"INPUT_MAIL_FILTER(`{args.name}', "
        f"`S={where.sendmail}, {flags}T={times};E:{args.content_timeout}s')dnl"
    )
    for callback, (parameter, default) in _SENDMAIL_MACROS.items():
        missing = ", ".join(_missing(klass, callback, default))
        if not missing:
            continue
        # defn() keeps the commas of the list together, however often it is added to.
        if default:
            yield f"define(`{parameter}', defn(`{parameter}')``, {missing}'')dnl"
        else:
            before = f"ifdef(`{parameter}', `defn(`{parameter}')``, ''')"
            yield f"define(`{parameter}', {before}``{missing}'')dnl"


# --- what a class asks for -----------------------------------------------------------------------


def _asked_for(mark: str, klass: type[Base] | None) -> Iterator[str]:
    if klass is None:
        return
    steps = _base.callback_steps(klass)
    used = [name for name, (_, off) in OPTIONAL_CALLBACKS.items() if not steps & off]
    yield f"{mark} Callbacks: {' '.join([*used, 'eom'])}"
    for callback in MACRO_CALLBACKS:
        macros = wanted_macros(klass, callback)
        if macros is not None:
            yield f"{mark} Macros for {callback}: {' '.join(macros) or 'none'}"


def wanted_macros(klass: type[Base], callback: str) -> tuple[str, ...] | None:
    """What ``@symlist`` names for a callback of a class; None where it has none."""
    found: tuple[str, ...] | None = None
    for name in (callback, f"{callback}_bytes"):
        marked = getattr(getattr(klass, name, None), MACROS_MARK, None)
        found = found if marked is None else marked
    return found


def _missing(klass: type[Base] | None, callback: str, default: str) -> list[str]:
    """The macros that the MTA does not send by default, in its notation."""
    wanted = wanted_macros(klass, callback) if klass is not None else None
    names = [name if len(name) == 1 else f"{{{name.strip('{}')}}}" for name in wanted or ()]
    return [name for name in dict.fromkeys(names) if name not in default.split()]
