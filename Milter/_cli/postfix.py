"""``config postfix``: a filter beside those that Postfix has already."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .asked import asked_for, missing_macros
from .common import EXIT_ERROR, CommandError, FilterSocket

if TYPE_CHECKING:
    from Milter import Base

#: The macros that Postfix sends by default (postconf -d), and the parameter of each stage.
_MACROS = {
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

_SMTP, _OTHERS = "smtpd_milters", "non_smtpd_milters"
_DEFAULT_QUEUE = "/var/spool/postfix"
#: The value of one parameter that stands for all of the other.
_ALL_OF_SMTP = re.compile(r"\$(?:smtpd_milters\b|[{(]smtpd_milters[})])")
#: Where postconf is, for users whose PATH has no directories of administration.
_PLACES = os.pathsep.join([os.defpath, "/usr/sbin", "/usr/local/sbin"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that are for Postfix."""
    group = parser.add_argument_group("Postfix")
    group.add_argument(
        "--queue-directory",
        metavar="DIRECTORY",
        help=f"Postfix's (what postconf says, or {_DEFAULT_QUEUE})",
    )
    group.add_argument(
        "--config-directory", metavar="DIRECTORY", help="where main.cf is (Postfix's own place)"
    )
    group.add_argument(
        "--place",
        metavar="PLACE",
        default="last",
        help="where in the list of filters: first, last, before:SOCKET or after:SOCKET of another "
        "filter (%(default)s)",
    )
    group.add_argument(
        "--smtp-only",
        action="store_true",
        help="leave non_smtpd_milters alone, for mail that does not come by SMTP",
    )


# --- lists of filters ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A filter in the value of a parameter.

    :ivar start: where its text begins in the value.
    :ivar end: where it ends.
    :ivar text: with the braces and the settings in them.
    """

    start: int
    end: int
    text: str

    @property
    def socket(self) -> str:
        """Where the filter listens, as it is written."""
        words = re.split(r"[\s,]+", self.text.strip("{}").strip(), maxsplit=1)
        return words[0]


def entries(value: str) -> list[_Entry]:
    """The filters in the value of ``smtpd_milters``: words between blanks or commas, or braces."""
    found, start, depth = [], -1, 0
    for at, char in enumerate(f"{value} "):
        if char in " \t\r\n," and depth == 0:
            if start >= 0:
                found.append(_Entry(start, at, value[start:at]))
            start = -1
            continue
        start = at if start < 0 else start
        depth += {"{": 1, "}": -1}.get(char, 0)
    if depth != 0 or start >= 0:
        raise CommandError(f"Postfix's list {value!r} has braces that are not closed", EXIT_ERROR)
    return found


def merged(value: str, entry: str, place: str, queue: str) -> str:
    """*value* with a filter in it, which takes the place of an entry with the same socket.

    :param value: the parameter, not expanded.
    :param entry: the filter, with braces and settings.
    :param place: ``first``, ``last``, ``before:SOCKET`` or ``after:SOCKET``.
    :param queue: what relative paths are relative to.
    :raises CommandError: there is no filter with that socket.
    """
    there = entries(value)
    name = _normal(_Entry(0, 0, entry).socket, queue)
    for each in there:
        if _normal(each.socket, queue) == name:
            return value[: each.start] + entry + value[each.end :]
    if not there:
        return entry
    where, _, other = place.partition(":")
    if where in ("first", "last"):
        found = there[0 if where == "first" else -1]
    else:
        wanted = [each for each in there if _normal(each.socket, queue) == _normal(other, queue)]
        if not wanted:
            raise CommandError(
                f"--place {place}: Postfix has no such filter, but "
                + ", ".join(each.socket for each in there)
            )
        found = wanted[0]
    if where in ("first", "before"):
        return f"{value[: found.start]}{entry}, {value[found.start :]}"
    return f"{value[: found.end]}, {entry}{value[found.end :]}"


def _normal(socket: str, queue: str) -> str:
    """One spelling for the sockets that are the same."""
    kind, colon, rest = socket.partition(":")
    if kind in ("unix", "local") and colon:
        return f"unix:{os.path.normpath(os.path.join(queue, rest))}"
    try:
        return FilterSocket.parse(socket).postfix
    except ValueError:  # such as a name of inline: or $variable
        return socket


# --- what Postfix has -----------------------------------------------------------------------------


class Postconf:
    """Asks and tells Postfix by ``postconf``.

    :param directory: of main.cf; None for Postfix's own place.
    """

    def __init__(self, directory: str | None) -> None:
        self._program = shutil.which("postconf") or shutil.which("postconf", path=_PLACES)
        self._options = ["-c", directory] if directory else []
        self.is_there = self._program is not None

    def words(self, *arguments: str) -> list[str]:
        """The command as an operator writes it."""
        return ["postconf", *self._options, *arguments]

    def run(self, *arguments: str) -> str:
        """Run it and return what it prints.

        :raises CommandError: it failed; with its own words.
        """
        assert self._program is not None
        try:
            done = subprocess.run(
                [self._program, *self._options, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise CommandError(f"postconf: {exc}", EXIT_ERROR) from None
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise CommandError(f"postconf: {said[-1]}", EXIT_ERROR)
        return done.stdout

    def value(self, parameter: str, expanded: bool = False) -> str:
        """The value of a parameter, on one line."""
        return " ".join(self.run("-hx" if expanded else "-h", parameter).split())

    def overrides(self) -> list[str]:
        """Services of master.cf that have a list of their own, as ``postconf -P`` shows them."""
        return self.run("-P", f"*/*/{_SMTP}", f"*/*/{_OTHERS}").splitlines()


# --- the change -----------------------------------------------------------------------------------


class Change:
    """What is to be set so that Postfix asks a filter as well as those that it has.

    :param args: of the command.
    :param where: where the filter listens.
    :param klass: its class, where it was named.
    """

    def __init__(
        self, args: argparse.Namespace, where: FilterSocket, klass: type[Base] | None
    ) -> None:
        place, colon, other = args.place.partition(":")
        if bool(colon and other) != (place in ("before", "after")) or (
            place not in ("first", "last", "before", "after")
        ):
            raise CommandError(
                f"--place {args.place!r}: write first, last, before:SOCKET or after:SOCKET"
            )
        self.args, self._where, self._klass = args, where, klass
        self.postconf = Postconf(args.config_directory)
        queue = args.queue_directory
        if queue is None and self.postconf.is_there:
            queue = self.postconf.value("queue_directory", expanded=True)
        self._queue = (queue or _DEFAULT_QUEUE).rstrip("/") + "/"
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}
        if self.postconf.is_there:
            self._compare()

    @property
    def _name(self) -> str:
        if self._where.kind == "unix" and self._where.path.startswith(self._queue):
            return f"unix:{self._where.path[len(self._queue) :]}"
        return self._where.postfix

    @property
    def _entry(self) -> str:
        args = self.args
        return (
            f"{{ {self._name}, connect_timeout={args.connect_timeout}s, "
            f"command_timeout={args.command_timeout}s, content_timeout={args.content_timeout}s, "
            f"default_action={args.default_action} }}"
        )

    def _compare(self) -> None:
        value = self.postconf.value
        lists = (_SMTP,) if self.args.smtp_only else (_SMTP, _OTHERS)
        self.before = {name: value(name) for name in lists}
        for parameter, default in self._wanted_macros():
            self.before[parameter] = value(parameter) or default
        self.after = dict(self.before)
        for name in lists:
            self.after[name] = self._list(name)
        for callback, (parameter, _) in _MACROS.items():
            have = self.before.get(parameter)
            if have is not None:
                more = missing_macros(self._klass, callback, have.replace(",", " "))
                self.after[parameter] = " ".join([have, *more])

    def _list(self, name: str) -> str:
        """The list of filters as it has to be."""
        before = self.before[name]
        if name == _OTHERS and _ALL_OF_SMTP.search(before):
            return before
        if name == _OTHERS and not before and not self.before[_SMTP]:
            return f"${_SMTP}"
        # Where it comes by another parameter, that one has it.
        expanded = self.postconf.value(name, expanded=True)
        if not self._has(before, self._name) and self._has(expanded, self._name):
            return before
        place = self.args.place
        # The neighbour may be in one of the two lists only.
        if ":" in place and name == _OTHERS and not self._has(before, place.partition(":")[2]):
            place = "last"
        return merged(before, self._entry, place, self._queue)

    def _has(self, value: str, socket: str) -> bool:
        wanted = _normal(socket, self._queue)
        return any(_normal(each.socket, self._queue) == wanted for each in entries(value))

    def _wanted_macros(self) -> Iterator[tuple[str, str]]:
        for callback, (parameter, default) in _MACROS.items():
            if missing_macros(self._klass, callback, default):
                yield parameter, default

    @property
    def settings(self) -> list[str]:
        """What is to be changed, as ``name = value``."""
        return [f"{name} = {value}" for name, value in self.after.items() if self._differs(name)]

    def _differs(self, name: str) -> bool:
        return self.after[name].split() != self.before[name].split()

    # --- as text --------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        """Commands for a shell, with comments."""
        yield f"# {self.args.name}: for Postfix 3.0 or later, as commands for root"
        yield from asked_for("#", self._klass)
        if self._where.kind == "unix" and self._name == self._where.postfix:
            queue = self._queue.rstrip("/")
            yield f"# A daemon in a chroot (master.cf) looks for this path below {queue}."
        if not self.postconf.is_there:
            yield "# Postfix is not on this machine. On that where it is, this keeps its filters:"
            yield from self._blind_lines()
        else:
            yield from self._own_lists()
            if not self.settings:
                yield "# Postfix has all this already: there is nothing to change."
                return
            for name in self.after:
                if self._differs(name) and self.before[name]:
                    yield f"# {name} was: {self.before[name]}"
            for setting in self.settings:
                yield shlex.join(self.postconf.words("-e", setting))
        yield "postfix reload"

    def _own_lists(self) -> Iterator[str]:
        for line in self.postconf.overrides():
            yield f"# master.cf has a list of its own, which this does not change: {line}"

    def _blind_lines(self) -> Iterator[str]:
        lists = _SMTP if self.args.smtp_only else f"{_SMTP} {_OTHERS}"
        yield f"for list in {lists}; do"
        yield "    case $(postconf -hx $list) in"
        yield f"        *{shlex.quote(self._name)}*) ;;"
        yield f'        *) postconf -e "$list = $(postconf -h $list) {self._entry}" ;;'
        yield "    esac"
        yield "done"
        for callback, (parameter, default) in _MACROS.items():
            more = " ".join(missing_macros(self._klass, callback, default))
            if more:
                yield f'postconf -e "{parameter} = $(postconf -h {parameter}) {more}"'

    def difference(self) -> Iterator[str]:
        """What ``--apply`` changes, before and after."""
        yield from self._own_lists()
        for name in self.after:
            if self._differs(name):
                yield f"-{name} = {self.before[name]}"
                yield f"+{name} = {self.after[name]}"

    def apply(self) -> None:
        """Have Postfix keep it, and look whether every filter that was there is there still.

        :raises CommandError: it could not be written, or a filter is gone.
        """
        self.postconf.run("-e", *self.settings)
        for name in (_SMTP, _OTHERS):
            if name not in self.after:
                continue
            now = self.postconf.value(name)
            lost = [e.socket for e in entries(self.before[name]) if not self._has(now, e.socket)]
            if lost or now != " ".join(self.after[name].split()):
                raise CommandError(f"{name} is not as it was to be set: {now!r}", EXIT_ERROR)
