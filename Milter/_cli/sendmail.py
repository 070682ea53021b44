"""``config sendmail``: a filter beside those that a ``sendmail.mc`` has already."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .asked import asked_for, missing_macros
from .common import EXIT_ERROR, CommandError, FilterSocket

if TYPE_CHECKING:
    from Milter import Base

#: The macros that sendmail sends by default (m4/cfhead.m4); no list is defined for two stages.
_MACROS = {
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

#: Letters of ``F=``; without any the message passes as if there were no filter.
_FLAGS = {"accept": "", "reject": "F=R, ", "tempfail": "F=T, "}

DEFAULT_MC = "/etc/mail/sendmail.mc"

#: An active line: not one that dnl makes a comment of.
_FILTER = re.compile(r"^(?!dnl\b|#)[^\n]*?INPUT_MAIL_FILTER\(\s*`?([\w-]+)", re.MULTILINE)
_LIST = re.compile(r"^(?!dnl\b|#)[^\n]*?define\(\s*`?confINPUT_MAIL_FILTERS\b", re.MULTILINE)
_MAILERS = re.compile(r"^(?:MAILER_DEFINITIONS|MAILER\()", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that are for sendmail."""
    group = parser.add_argument_group("sendmail")
    group.add_argument(
        "--mc",
        metavar="FILE",
        help=f"the file to compare with, and for --apply to change ({DEFAULT_MC} for --apply)",
    )


def lines(args: argparse.Namespace, where: FilterSocket, klass: type[Base] | None) -> Iterator[str]:
    """The lines for ``sendmail.mc``, with comments."""
    yield f"dnl # {args.name}: for sendmail.mc, before the MAILER lines; then make sendmail.cf"
    yield "dnl # anew and restart sendmail."
    yield from asked_for("dnl #", klass)
    if args.mc:
        others = [name for name in filters(_read(args.mc)) if name != args.name]
        if others:
            yield f"dnl # Filters that {args.mc} has, and that stay: {' '.join(others)}"
    if where.kind == "inet6" and ":" in where.client_host:
        # Seen with 8.17.1: "milter_open(): connect failed: Invalid argument".
        yield "dnl # sendmail 8.17 fails to connect to a literal IPv6 address; where it logs"
        yield 'dnl # "Invalid argument", write a name of that address from /etc/hosts instead.'
    times = f"C:{args.connect_timeout}s;S:{args.command_timeout}s;R:{args.command_timeout}s"
    flags = _FLAGS[args.default_action]
    yield (
        f"INPUT_MAIL_FILTER(`{args.name}', "
        f"`S={where.sendmail}, {flags}T={times};E:{args.content_timeout}s')dnl"
    )
    for callback, (parameter, default) in _MACROS.items():
        missing = ", ".join(missing_macros(klass, callback, default))
        if not missing:
            continue
        # defn() keeps the commas of the list together, however often it is added to.
        if default:
            yield f"define(`{parameter}', defn(`{parameter}')``, {missing}'')dnl"
        else:
            before = f"ifdef(`{parameter}', `defn(`{parameter}')``, ''')"
            yield f"define(`{parameter}', {before}``{missing}'')dnl"


def filters(text: str) -> list[str]:
    """The names of the filters in a ``sendmail.mc``, in their order."""
    return _FILTER.findall(text)


def merged(text: str, name: str, block: str, path: str) -> str:
    """A ``sendmail.mc`` with a filter in it, after those that are there.

    :param text: the file.
    :param name: the filter's.
    :param block: its lines. They replace those that an earlier call put there.
    :param path: the file's, for errors.
    :raises CommandError: the filter is there by lines that are not ours, or would be switched off,
        or the file has no place for it.
    """
    begin, end = f"dnl # begin of milter {name}\n", f"dnl # end of milter {name}\n"
    mine = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    block = f"{begin}{block}\n{end}"
    rest = mine.sub("", text)
    if name in filters(rest):
        raise CommandError(
            f"{path} has a filter {name!r} already: change that line, or use another --name",
            EXIT_ERROR,
        )
    mailers = _MAILERS.search(rest)
    if mailers is None:
        raise CommandError(
            f"{path} has no MAILER lines, before which the filter has to stand", EXIT_ERROR
        )
    for found in _LIST.finditer(rest):
        if found.start() > mailers.start():
            raise CommandError(
                f"{path} defines confINPUT_MAIL_FILTERS after the MAILER lines, which would switch "
                f"the filter off: add {name} to that list by hand",
                EXIT_ERROR,
            )
    there = mine.search(text)
    if there is not None and not any(
        found.start() > there.start() for found in _LIST.finditer(text)
    ):
        return text[: there.start()] + block + text[there.end() :]
    return rest[: mailers.start()] + block + rest[mailers.start() :]


def difference(path: str, name: str, block: str) -> tuple[str, Iterator[str]]:
    """What the file becomes, and what that changes in it, as ``diff -u`` shows it."""
    before = _read(path)
    after = merged(before, name, block, path)
    changed = difflib.unified_diff(before.splitlines(), after.splitlines(), path, path, lineterm="")
    return after, changed


def write(path: str, text: str) -> None:
    """Exchange the file at once, with the owner and mode of the one that is there.

    :raises CommandError: it cannot be written.
    """
    target = os.path.realpath(path)
    temporary = ""
    try:
        status = os.stat(target)
        descriptor, temporary = tempfile.mkstemp(prefix=".milter-", dir=os.path.dirname(target))
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            if os.geteuid() == 0:
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), status.st_mode & 0o7777)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise CommandError(f"cannot write {path}: {exc.strerror}", EXIT_ERROR) from None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except OSError as exc:
        raise CommandError(f"cannot read {path}: {exc.strerror}", EXIT_ERROR) from None
