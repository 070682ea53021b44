"""A socket to listen on for an MTA, where it is not libmilter that listens."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import stat
from collections.abc import Iterator

import milter

from .._socket_setup import Access
from .common import FilterSocket, group_or_user

_BACKLOG = 100


@dataclasses.dataclass(frozen=True)
class Place:
    """Where to listen, and who may connect to it."""

    socket: FilterSocket
    access: Access

    @classmethod
    def of(cls, where: FilterSocket, mode: int | None, group: str | None) -> Place:
        """Read the arguments.

        :raises ValueError: one cannot be.
        """
        if where.kind == "fd":
            raise ValueError("--listen fd: is for run alone")
        for option, value in (("mode", mode), ("group", group)):
            if value is not None and where.kind != "unix":
                raise ValueError(f"--{option} is for unix sockets, not for {where.libmilter}")
        try:
            return cls(where, Access(where.libmilter, mode, group_or_user(group)))
        except milter.InvalidArgument as exc:
            raise ValueError(str(exc).replace("socket_group ", "--group ")) from None


@contextlib.contextmanager
def listen(place: Place) -> Iterator[socket.socket]:
    """A listening socket; what it leaves in the file system goes with it.

    :raises OSError: it cannot be.
    :raises milter.error: it cannot be given to those who are to connect, or that would be unsafe.
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
    inode = (-1, -1)

    def make() -> None:
        nonlocal inode
        _remove_what_is_left(path)
        listener.bind(path)
        inode = _inode_of(path)

    def remove() -> None:
        # Never what somebody else has put there meanwhile.
        with contextlib.suppress(OSError):
            if _inode_of(path) == inode:
                os.unlink(path)

    with socket.socket(socket.AF_UNIX) as listener:
        place.access.bind(make, remove)
        try:
            listener.listen(_BACKLOG)
            yield listener
        finally:
            remove()


def _inode_of(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


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
        probe.setblocking(False)  # where its backlog is full somebody listens, and is busy
        try:
            probe.connect(path)
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
