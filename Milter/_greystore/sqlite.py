"""Greylist records in a SQLite file, which any number of threads and processes may share."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from . import (
    SWEEP,
    TIMEOUT,
    Limits,
    Row,
    State,
    Store,
    StoreUnavailable,
    Triple,
    advance,
    is_litter,
)

log = logging.getLogger("milter.greylist")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS greylist(
    ip text, sender text, recipient text,
    firstseen timestamp, lastseen timestamp, cnt integer, umis text,
    PRIMARY KEY (ip, sender, recipient))
"""
_SELECT = "SELECT firstseen, lastseen, cnt FROM greylist WHERE ip=? AND sender=? AND recipient=?"
_NEXT = (
    "SELECT rowid, firstseen, lastseen, cnt FROM greylist WHERE rowid > ? ORDER BY rowid LIMIT ?"
)
# Replaces records that other programs spoilt, too.
_INSERT = (
    "INSERT OR REPLACE INTO greylist (ip, sender, recipient, firstseen, lastseen, cnt, umis)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_UPDATE = (
    "UPDATE greylist SET firstseen=?, lastseen=?, cnt=? WHERE ip=? AND sender=? AND recipient=?"
)


class SQLiteUnavailable(StoreUnavailable, sqlite3.OperationalError):
    """The file was in use by somebody else for too long, or cannot be read or written."""


class Database:
    """One connection to a SQLite file in WAL mode, shared by the threads of a process.

    A transaction that has returned survives the death of the process at any moment, and is
    all there or not at all after a power cut.
    """

    # Connections taken over in a fork: SQLite forbids to use them, and even to close them.
    _inherited: list[sqlite3.Connection] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, path: str, schema: str) -> None:
        self.path = path
        self._schema = schema
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = self._open()
        self._closed = False

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(self._schema)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection inside a transaction of its own, committed at the end.

        Raises SQLiteUnavailable where the file is not to be had in time, ValueError once closed.
        """
        if self._pid != os.getpid():
            self._start_anew()
        if not self._lock.acquire(timeout=TIMEOUT):
            raise SQLiteUnavailable(
                f"{self.path}: other threads kept it for more than {TIMEOUT:g} s"
            )
        try:
            connection = self._current()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as exc:
            raise SQLiteUnavailable(f"{self.path}: {exc}") from exc
        finally:
            self._lock.release()

    def _current(self) -> sqlite3.Connection:
        if self._closed:
            raise ValueError(f"the greylist {self.path!r} is closed")
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def _start_anew(self) -> None:
        """Forget what a fork took over: the connection, and a lock that nobody may ever release."""
        if self._connection is not None:
            self._inherited.append(self._connection)
        self._connection = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._pid != os.getpid():
            self._start_anew()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._closed = True


class SQLiteStore(Store):
    """The table ``greylist``, as in the files of earlier versions."""

    def __init__(self, path: str) -> None:
        self._db = Database(path, _SCHEMA)
        self._swept = 0

    def check(self, triple: Triple, limits: Limits, timeinc: float) -> int:
        with self._db.transaction() as connection:
            old = _state(connection.execute(_SELECT, triple).fetchone())
            new = advance(old, time.time() + timeinc, limits)
            _write(connection, triple, old, new)
            if old is None:
                self._sweep(connection, limits)
            return new.cnt

    def _sweep(self, connection: sqlite3.Connection, limits: Limits) -> None:
        """Look at the next few records, round and round."""
        found = connection.execute(_NEXT, (self._swept, SWEEP)).fetchall()
        for rowid, *record in found:
            state = _state(tuple(record))
            if state is not None and is_litter(state, limits):
                connection.execute("DELETE FROM greylist WHERE rowid = ?", (rowid,))
        self._swept = found[-1][0] if len(found) == SWEEP else 0

    def clean(self, retain: float, timeinc: float) -> int:
        oldest = time.time() + timeinc - retain
        with self._db.transaction() as connection:
            # A text in that column compares as later than any number.
            where = "lastseen < ? OR typeof(lastseen) NOT IN ('real', 'integer')"
            return connection.execute(f"DELETE FROM greylist WHERE {where}", (oldest,)).rowcount

    def merge(self, rows: list[Row]) -> None:
        with self._db.transaction() as connection:
            for triple, state, umis in rows:
                old = _state(connection.execute(_SELECT, triple).fetchone())
                if old is None or old.lastseen < state.lastseen:
                    connection.execute(_INSERT, (*triple, *state, umis))

    def rows(self) -> Iterable[Row]:
        with self._db.transaction() as connection:
            found = connection.execute(
                "SELECT firstseen, lastseen, cnt, ip, sender, recipient, umis FROM greylist"
            ).fetchall()
        for record in found:
            state = _state(record[:3])
            if state is not None:
                yield Row(Triple(*(text or "" for text in record[3:6])), state, record[6])

    def close(self) -> None:
        self._db.close()


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL mode; where its file system cannot do that it stays as it is.

    SQLite does not wait where two processes do so at once, so this waits.
    """
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _state(record: tuple[object, ...] | None) -> State | None:
    """The state in a record; None for no record, or one that other programs spoilt."""
    if record is None:
        return None
    firstseen, lastseen, cnt = record
    if isinstance(firstseen, (int, float)) and isinstance(lastseen, (int, float)):
        return State(firstseen, lastseen, cnt if isinstance(cnt, int) else 0)
    return None


def _write(connection: sqlite3.Connection, triple: Triple, old: State | None, new: State) -> None:
    if old is None:
        connection.execute(_INSERT, (*triple, *new, None))
    else:
        connection.execute(_UPDATE, (*new, *triple))
