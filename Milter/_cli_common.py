"""What the commands of ``python -m Milter`` share."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import socket
import sys
from typing import TYPE_CHECKING, Any

import Milter
from Milter import mta as _mta

if TYPE_CHECKING:
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
    print(f"python -m Milter {command}: error: {printable(str(error))}", file=sys.stderr)


def seconds(text: str) -> float:
    """A number of seconds on the command line, up to a day."""
    value = float(text)
    if not 0 <= value <= 86400:
        raise ValueError(text)
    return value


# argparse names the type in its complaint.
seconds.__name__ = "number of seconds"


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
    :ivar number: the port, or the descriptor.
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
        scheme, _, rest = spec.partition(":")
        if scheme.lower() == "fd":
            if not (rest.isascii() and rest.isdigit()):
                raise ValueError(f"socket {text!r}: fd: needs the number of a descriptor")
            return cls("fd", number=int(rest))
        found = _mta.parse_socket(spec, postfix=True)
        if isinstance(found.address, str):
            return cls("unix", found.address)
        host, port = found.address
        kind = "inet6" if found.family == socket.AF_INET6 else "inet"
        return cls(kind, host=host if "@" in rest or ":" in rest else "", number=port)

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


# --- filter classes ------------------------------------------------------------------------------


def load_filter(spec: str) -> type[Base]:
    """Import the filter class that ``module:Class`` names.

    :raises CommandError: there is none, or it is not one that can serve.
    """
    name, colon, attribute = spec.partition(":")
    if not (colon and name and attribute):
        raise CommandError(f"{spec!r}: write module:Class, such as hello:Hello")
    found: Any = _import(name)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise CommandError(f"module {name!r} has no class {attribute!r}") from None
    if not (isinstance(found, type) and issubclass(found, Milter.Base)):
        raise CommandError(f"{spec} is no filter class: it must be derived from Milter.Base")
    try:
        inspect.signature(found).bind()
    except TypeError as exc:
        raise CommandError(f"{spec} must be callable without arguments: {exc}") from None
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
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
    traceback = exc.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith("<frozen"):
            where = f" ({file}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    if isinstance(exc, SyntaxError):
        where = ""
    return f"cannot import {name!r}: {type(exc).__name__}: {exc}{where}"
