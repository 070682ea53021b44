"""The file under a greylist's shelf: a mapping of bytes to bytes that a crash cannot harm."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from .. import _dbmfile
from . import TIMEOUT, StoreUnavailable
from .sqlite import Database

log = logging.getLogger("milter.greylist")

# As dbm.sqlite3 of Python 3.13 has it.
_SCHEMA = "CREATE TABLE IF NOT EXISTS Dict (key BLOB UNIQUE NOT NULL, value BLOB NOT NULL)"
_SQLITE_MAGIC = b"SQLite format 3\0"


class ShelfFile(MutableMapping[bytes, bytes]):
    """A dbm file in SQLite's format; all access is inside ``transaction()``."""

    def __init__(self, path: str) -> None:
        _take_over(path)
        self._db = Database(path, _SCHEMA)
        self._connection: sqlite3.Connection | None = None
        self._looked_at = 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside happens at once or not at all, and to no other thread's knowledge."""
        with self._db.transaction() as connection:
            self._connection = connection
            try:
                yield
            finally:
                self._connection = None

    def next_keys(self, count: int) -> list[bytes]:
        """Some keys, with each call the next ones, round and round."""
        sql = "SELECT rowid, key FROM Dict WHERE rowid > ? ORDER BY rowid LIMIT ?"
        found = self._execute(sql, self._looked_at, count).fetchall()
        self._looked_at = found[-1][0] if len(found) == count else 0
        return [key for _, key in found]

    def _execute(self, sql: str, *args: bytes | int) -> sqlite3.Cursor:
        if self._connection is None:
            raise RuntimeError("the shelf is used outside of a transaction")
        return self._connection.execute(sql, args)

    def __getitem__(self, key: bytes) -> bytes:
        row = self._execute("SELECT value FROM Dict WHERE key = ?", key).fetchone()
        if row is None:
            raise KeyError(key)
        value: bytes = row[0]
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._execute("REPLACE INTO Dict (key, value) VALUES (?, ?)", key, value)

    def __delitem__(self, key: bytes) -> None:
        if not self._execute("DELETE FROM Dict WHERE key = ?", key).rowcount:
            raise KeyError(key)

    def __iter__(self) -> Iterator[bytes]:
        return iter([row[0] for row in self._execute("SELECT key FROM Dict").fetchall()])

    def __len__(self) -> int:
        count: int = self._execute("SELECT count(*) FROM Dict").fetchone()[0]
        return count

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _take_over(path: str) -> None:
    """Turn a dbm file of another kind into one of ours; a missing file is none of any kind."""
    if _is_ours(path):
        return
    with _locked_directory(path) as folder:
        # Another process may have been faster.
        if not _is_ours(path):
            _convert(path, folder)


def _is_ours(path: str) -> bool:
    """Whether the path names a file of ours, or an empty one."""
    try:
        with open(path, "rb") as fp:
            return fp.read(len(_SQLITE_MAGIC)) in (_SQLITE_MAGIC, b"")
    except FileNotFoundError:
        return False


def _convert(path: str, folder: int) -> None:
    """Copy the old file's records to a new one, which then takes its place in one step."""
    old_files = _dbmfile.files_of(path)
    if not old_files:
        return
    # Always the same name, so that a killed process leaves no more than one behind.
    new = os.path.join(_directory(path), f".{os.path.basename(path)}.new")
    try:
        _remove(new)
        # Others may be able to make files here, a link of this name for one: SQLite, chown and
        # chmod would follow it.  Nobody else reads the file before it has the old one's mode.
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            count = _copy(path, new)
            _copy_permissions(old_files[0], fd)
        finally:
            os.close(fd)
        for name in old_files:
            _remove(name + ".old")
            os.link(name, name + ".old")
        os.rename(new, path)
    finally:
        _remove(new)
    os.fsync(folder)
    for name in old_files:
        if name != path:
            os.unlink(name)
    log.info("%s: %d records taken over, the old shelf is kept as *.old", path, count)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _copy(path: str, target: str) -> int:
    """Copy all records; the number of them."""
    reader = _dbmfile.open_reader(path)
    connection = sqlite3.connect(target, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN")
        connection.execute(_SCHEMA)
        count = 0
        for key in reader.keys():  # noqa: SIM118 - not every kind can be iterated over
            value = reader.get(key)
            connection.execute("REPLACE INTO Dict (key, value) VALUES (?, ?)", (key, value))
            count += 1
        connection.execute("COMMIT")
        return count
    finally:
        connection.close()
        reader.close()


def _copy_permissions(source: str, target: int) -> None:
    info = os.stat(source)
    with contextlib.suppress(PermissionError):
        os.fchown(target, info.st_uid, info.st_gid)
    os.fchmod(target, stat.S_IMODE(info.st_mode))


def _directory(path: str) -> str:
    return os.path.dirname(path) or "."


@contextmanager
def _locked_directory(path: str) -> Iterator[int]:
    """The folder, open and locked against others that convert; a killed process locks nothing."""
    fd = os.open(_directory(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + 12 * TIMEOUT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > end:
                    raise StoreUnavailable(f"{path}: another process keeps its folder") from exc
            time.sleep(0.05)
        yield fd
    finally:
        os.close(fd)
