"""A socket to listen on for an MTA, where it is not libmilter that listens."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import grp
import os
import socket
import stat
from collections.abc import Iterator

from .common import FilterSocket

_BACKLOG = 100


@dataclasses.dataclass(frozen=True)
class Place:
    """Where to listen, and who may connect to it.

    :ivar mode: of a unix socket.
    :ivar group: its number, -1 for that of the process.
    """

    socket: FilterSocket
    mode: int
    group: int

    @classmethod
    def of(cls, where: FilterSocket, mode: int, group: str | None) -> Place:
        """Read the arguments.

        :raises ValueError: one cannot be.
        """
        if where.kind == "fd":
            raise ValueError("fd: is for run alone")
        if where.is_tcp and group is not None:
            raise ValueError("--group is for unix sockets")
        if group is None:
            return cls(where, mode, -1)
        try:
            return cls(where, mode, grp.getgrnam(group).gr_gid)
        except KeyError:
            raise ValueError(f"--group {group!r}: there is no such group") from None


@contextlib.contextmanager
def listen(place: Place) -> Iterator[socket.socket]:
    """A listening socket; what it leaves in the file system goes with it.

    :raises OSError: it cannot be.
    """
    where = place.socket
    if where.kind == "unix":
        with _unix(place) as listener:
            yield listener
        return
    family = socket.AF_INET6 if where.kind == "inet6" else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((where.host, where.number))
        listener.listen(_BACKLOG)
        yield listener


@contextlib.contextmanager
def _unix(place: Place) -> Iterator[socket.socket]:
    path = place.socket.path
    _remove_what_is_left(path)
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        try:
            os.chown(path, -1, place.group)
            os.chmod(path, place.mode)
            listener.listen(_BACKLOG)
            yield listener
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _remove_what_is_left(path: str) -> None:
    """Remove a socket on which nobody listens any more.

    :raises OSError: somebody does, or it is something else.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "what is there is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
