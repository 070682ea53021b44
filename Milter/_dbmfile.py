"""Read dbm files of whatever kind: Berkeley DB's and those of the standard library."""

from __future__ import annotations

import dbm
import errno
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from struct import pack
from typing import Any, Protocol

from ._extras import unusable

# Where Berkeley DB keeps its magic number, and those of its hash and btree files.
_BDB_MAGIC_AT = 12
_BDB_MAGICS = {pack(order, number) for number in (0x061561, 0x053162) for order in (">I", "<I")}
# The kinds that do not keep to the name they are given.
_ENDINGS = {"dbm.ndbm": (".pag", ".dir"), "dbm.dumb": (".dat", ".dir", ".bak")}
_BERKELEY_DB = "it needs Berkeley DB: libdb5.3, and to be built libdb-dev (Debian, Ubuntu)"


class Reader(Protocol):
    """What all kinds of open dbm files have in common."""

    def get(self, key: bytes) -> bytes | None:
        """The value stored under the key, or None."""
        ...

    def keys(self) -> Iterable[bytes]:
        """All keys."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_reader(path: str) -> Reader:
    """Open the dbm file that *path* names, with or without its suffix, for reading.

    Raises FileNotFoundError where there is none, OSError where it cannot be read, ValueError where
    it is of no known kind, and ImportError, naming what to install, where the module for its
    kind is not there.
    """
    for name in (path, path + ".db"):
        if is_berkeley_db(name):
            return _open_berkeley_db(name)
    kind = dbm.whichdb(path)
    if kind:
        with _module_errors(path):
            reader: Reader = importlib.import_module(kind).open(path, "r")
            return reader
    # Raises the true reason, where there is one.
    with open(path, "rb"):
        raise ValueError(f"{path!r} is no database of a kind that Berkeley DB or dbm can read")


def files_of(path: str) -> list[str]:
    """The files that make up what ``open_reader`` would open; none where it is missing."""
    if os.path.exists(path):
        return [path]
    if is_berkeley_db(path + ".db"):
        return [path + ".db"]
    endings = _ENDINGS.get(dbm.whichdb(path) or "", ())
    return [path + end for end in endings if os.path.exists(path + end)]


def is_berkeley_db(path: str) -> bool:
    """Whether the file is a hash or btree file of Berkeley DB."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as fp:
        return fp.read(_BDB_MAGIC_AT + 4)[_BDB_MAGIC_AT:] in _BDB_MAGICS


def _open_berkeley_db(path: str) -> Reader:
    try:
        db = importlib.import_module("berkeleydb").db
    except ImportError as exc:
        return _open_through_ndbm(path, exc)
    handle = db.DB()
    try:
        handle.open(path, flags=db.DB_RDONLY)
    except db.DBError as exc:
        handle.close()
        raise OSError(*exc.args[:2], path) from exc
    return _BerkeleyDB(handle, db.DBError, path)


def _open_through_ndbm(path: str, missing: ImportError) -> Reader:
    """Use the standard library's ndbm where that is Berkeley DB in disguise, as on Debian."""
    stem, suffix = os.path.splitext(path)
    try:
        ndbm: Any = importlib.import_module("dbm.ndbm")
        if suffix == ".db" and ndbm.library.startswith("Berkeley DB"):
            reader: Reader = ndbm.open(stem, "r")
            return reader
    except ImportError:
        pass
    reading = f"{path}: reading Berkeley DB files"
    raise unusable(reading, "berkeleydb", "berkeleydb", missing, _BERKELEY_DB) from missing


class _BerkeleyDB:
    """An open Berkeley DB file whose errors are OSError like those of the other kinds."""

    def __init__(self, handle: Any, error: type[Exception], path: str) -> None:
        self._handle = handle
        self._error = error
        self._path = path

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._call(self._handle.get, key)
        return value

    def keys(self) -> list[bytes]:
        found: list[bytes] = self._call(self._handle.keys)
        return found

    def close(self) -> None:
        self._call(self._handle.close)

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        try:
            return method(*args)
        except self._error as exc:
            raise OSError(*exc.args[:2], self._path) from exc


@contextmanager
def _module_errors(path: str) -> Iterator[None]:
    try:
        yield
    except ImportError as exc:
        text = f"{path}: this Python was built without the module that reads it: {exc}"
        raise ImportError(text, name=exc.name) from exc
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as exc:
        # dbm.dumb reads its index as Python.
        raise OSError(errno.EINVAL, f"damaged: {exc}", path) from exc
