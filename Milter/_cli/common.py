"""What the commands of ``python -m Milter`` share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import milter

import Milter
from Milter.mta import FilterClosed, FilterTimeout, FilterUnreachable, MTAError
from Milter.mta.address import SocketAddress, address_of, take_apart

from . import streams

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from Milter import Base

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_UNSAFE = 3


class CommandError(Exception):
    """What ends a command, as one line for the user.

    :param status: the exit status of the command.
    """

    def __init__(self, message: str, status: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.status = status


def printable(text: str) -> str:
    """*text* with whatever could play tricks on a terminal written as an escape."""
    return "".join(
        char
        if char == "\t" or char.isprintable()
        else f"\\x{ord(char) & 0xFF:02x}"
        if 0xDC80 <= ord(char) <= 0xDCFF or ord(char) < 0x100
        else f"\\u{ord(char):04x}"
        for char in text
    )


def complain(command: str, error: object) -> None:
    """Say on standard error why *command* fails."""
    streams.note(f"python -m Milter {command}: error: {printable(str(error))}")


def show_report(command: str, text: str) -> None:
    """Print what *command* has found out; its exit status says the same, so that this may fail."""
    failed = streams.show(text)
    if failed is not None and not streams.is_hang_up(failed):
        reason = printable(failed.strerror or str(failed))
        streams.note(f"python -m Milter {command}: warning: cannot write the report: {reason}")


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Have a ValueError name the option whose value it is about."""
    try:
        yield
    except ValueError as exc:
        raise ValueError(f"{option}: {exc}") from None


def error_as_json(text: str, kind: str, status: int, **more: object) -> str:
    """An error as a JSON object, for programs: *kind* is one word, *status* the exit status."""
    return json.dumps({**more, "error": text, "kind": kind, "status": status})


def error_kind(error: Exception) -> str:
    """What went wrong, in one word: of the connection to a filter, or else of the arguments."""
    if isinstance(error, FilterUnreachable):
        return "unreachable"
    if isinstance(error, FilterTimeout):
        return "timeout"
    if isinstance(error, (FilterClosed, OSError)):
        return "closed"
    return "protocol" if isinstance(error, MTAError) else "arguments"


def seconds(text: str) -> float:
    """A number of seconds on the command line, up to a day."""
    value = float(text)
    if not 0 <= value <= 86400:
        raise ValueError(text)
    return value


# argparse names the type in its complaint.
seconds.__name__ = "number of seconds from 0 to 86400"
seconds.kinds = (int, float)  # type: ignore[attr-defined] # what it may be in a file


def octal_mode(text: str) -> int:
    """The mode of a file on the command line."""
    value = int(text, 8)
    if not 0 <= value <= 0o777 or not text.isdigit():
        raise ValueError(text)
    return value


octal_mode.__name__ = "octal mode between 0 and 0777"
octal_mode.kinds, octal_mode.is_octal = (str, int), True  # type: ignore[attr-defined]


# --- sockets, as libmilter, Postfix and sendmail write them --------------------------------------

SOCKET_HELP = """\
SOCKET is written as libmilter, Postfix or sendmail write it:
  unix:/path  local:/path  /path
  inet:port@host  inet:host:port  inet:port
  inet6:port@[address]  inet:[address]:port
with sendmail's S= in front or not.
"""


@dataclasses.dataclass(frozen=True)
class FilterSocket:
    """Where a filter listens.

    :ivar kind: ``unix``, ``inet``, ``inet6`` or ``fd``.
    :ivar path: of a unix socket.
    :ivar host: empty for every address of this machine.
    :ivar number: the port, 0 for any that is free; or the descriptor.
    """

    kind: str
    path: str = ""
    host: str = ""
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> FilterSocket:
        """Read what ``SOCKET_HELP`` describes, or ``fd:number``.

        :raises ValueError: *text* is none of it.
        """
        spec = text
        if spec[:2] in ("S=", "s="):
            spec = spec[2:].partition(",")[0].strip()
        if spec.isascii() and spec.isdigit():
            raise ValueError(
                f"socket {text!r}: write inet:{spec} for a port, unix:{spec} for a path, "
                f"or fd:{spec} for an inherited socket"
            )
        kind, where, number = take_apart(spec, postfix=True)
        if kind == "unix":
            return cls(kind, path=where)
        return cls(kind, host=where, number=number)

    @property
    def address(self) -> SocketAddress:
        """Where an MTA on this machine connects to.

        :raises ValueError: that cannot be: it is a descriptor, or any free port.
        """
        return address_of(self.libmilter, self.kind, self.path or self.host, self.number)

    @property
    def is_tcp(self) -> bool:
        """Whether other machines could reach it."""
        return self.kind in ("inet", "inet6")

    @property
    def libmilter(self) -> str:
        """For ``smfi_setconn``."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        if not self.host:
            return f"{self.kind}:{self.number}"
        return f"{self.kind}:{self.number}@{self._bracketed if self.kind == 'inet6' else self.host}"

    @property
    def postfix(self) -> str:
        """For ``smtpd_milters``."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"inet:{self._bracketed}:{self.number}"

    @property
    def sendmail(self) -> str:
        """For ``S=`` of ``INPUT_MAIL_FILTER``."""
        if self.kind == "unix":
            return f"local:{self.path}"
        return f"{self.kind}:{self.number}@{self._bracketed}"

    @property
    def client_host(self) -> str:
        """Where an MTA on this machine finds it."""
        return self.host or ("::1" if self.kind == "inet6" else "127.0.0.1")

    @property
    def _bracketed(self) -> str:
        host = self.client_host
        return f"[{host}]" if ":" in host else host


def group_or_user(text: str | None) -> str | int | None:
    """A name, or the number of a user or group that is written in digits."""
    return int(text) if text and text.isascii() and text.isdigit() else text or None


# --- filter classes ------------------------------------------------------------------------------


def load_filter(spec: str) -> type[Base]:
    """Import the filter class that ``module:Class`` or ``file.py:Class`` names; of a function the
    class that asks it.

    :raises CommandError: there is none, or it is not one that can serve.
    """
    found = _load(spec, "module:Class or file.py:Class, such as hello:Hello", "class")
    if not isinstance(found, type) and callable(found):
        found = _class_of_function(found)
    if not (isinstance(found, type) and issubclass(found, Milter.Base)):
        raise CommandError(
            f"{spec} is no filter class, which must be derived from Milter.Base, and no function"
        )
    try:
        inspect.signature(found).bind()
    except TypeError as exc:
        raise CommandError(f"{spec} must be callable without arguments: {exc}") from None
    return found


def load_loop_factory(spec: str) -> Callable[[], AbstractEventLoop]:
    """Import what ``module:function`` names, which makes event loops.

    :raises CommandError: there is none, or it cannot be called.
    """
    try:
        found = _load(spec, "module:function, such as uvloop:new_event_loop", "function")
    except CommandError as exc:
        raise CommandError(f"--loop-factory: {exc}", exc.status) from exc
    if not callable(found):
        raise CommandError(f"--loop-factory: {spec} cannot be called")
    return found  # type: ignore[no-any-return]


def _load(spec: str, form: str, what: str) -> Any:
    """Import what a module or a file has under a name.

    :param spec: module and name.
    :param form: how that is to be written.
    :param what: is looked for, for what is said.
    :raises CommandError: there is no such thing.
    """
    name, colon, attribute = spec.rpartition(":")
    if not (colon and name and attribute):
        raise CommandError(f"{spec!r}: write {form}")
    found: Any = _import(_module_of_file(name) if name.endswith(".py") else name)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise CommandError(f"module {name!r} has no {what} {attribute!r}") from None
    return found


def _module_of_file(path: str) -> str:
    """The name by which a file can be imported from its directory, which comes first from now on.

    :raises CommandError: there is no such file, or its name is none of a module.
    """
    directory, file = os.path.split(os.path.abspath(path))
    name = file[: -len(".py")]
    if not os.path.isfile(path):
        raise CommandError(f"there is no file {path!r}")
    if not name.isidentifier():
        raise CommandError(f"{path!r}: a module's name has letters, digits and _ only")
    if sys.path[0] != directory:
        sys.path.insert(0, directory)
    return name


@contextlib.contextmanager
def _not_serving(name: str) -> Iterator[None]:
    """Refuse to have a module serve while it is imported: nothing after that would run."""
    where: list[str] = []

    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def serve(*args: Any, **kwargs: Any) -> Any:
            if is_over:
                return function(*args, **kwargs)  # one that the module has kept
            frame = sys._getframe(1)
            where.append(f"{frame.f_code.co_filename}, line {frame.f_lineno}")
            raise CommandError("it serves")

        return serve

    def complaint() -> CommandError:
        return CommandError(
            f"the module {name!r} calls runmilter when it is imported ({where[0]}): put that under "
            'if __name__ == "__main__":'
        )

    is_over = False
    places = ((Milter, "runmilter"), (Milter, "main"), (milter, "main"))
    before = [(place, attribute, getattr(place, attribute)) for place, attribute in places]
    for place, attribute, function in before:
        setattr(place, attribute, refuse(function))
    try:
        yield
    except BaseException:
        if where:
            raise complaint() from None
        raise
    finally:
        is_over = True
        for place, attribute, function in before:
            setattr(place, attribute, function)
    if where:  # the module has caught it
        raise complaint()


def _class_of_function(function: Any) -> type[Base]:
    from .. import mailfilter  # of no use to who runs a class

    try:
        return mailfilter.as_filter(function).session
    except TypeError as exc:
        raise CommandError(str(exc)) from None


def _import(name: str) -> Any:
    try:
        with _not_serving(name):
            return importlib.import_module(name)
    except CommandError:
        raise
    except ModuleNotFoundError as exc:
        if exc.name is not None and f"{name}.".startswith(f"{exc.name}."):
            raise CommandError(
                f"there is no module {exc.name!r} in {sys.path[0]!r} "
                "nor in the other places where Python looks"
            ) from exc
        raise CommandError(_import_failure(name, exc)) from exc
    except Exception as exc:
        # Whatever the code of the module raises.
        raise CommandError(_import_failure(name, exc)) from exc


def _import_failure(name: str, exc: Exception) -> str:
    where = ""
    ours = ("<frozen", os.path.join(os.path.dirname(os.path.abspath(Milter.__file__)), ""))
    traceback = exc.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(ours):  # a decorator, say, that does not like what it is put on
            where = f" ({file}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    if isinstance(exc, SyntaxError):
        where = ""
    return f"cannot import {name!r}: {type(exc).__name__}: {exc}{where}"
