"""Greylist records in a PostgreSQL database, which several hosts may share.

libpq bounds the time to connect but not the time to answer, and a server that hangs must not hang
the filter.  So statements are sent through psycopg's layer over libpq, each wait with a deadline.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .._extras import unusable
from . import (
    GRACE,
    MARGIN,
    SWEEP,
    TIMEOUT,
    Limits,
    Row,
    State,
    Store,
    StoreUnavailable,
    Triple,
)

try:
    import psycopg
    from psycopg import pq
except ImportError as exc:
    raise unusable(
        "a greylist on PostgreSQL",
        "psycopg",
        "psycopg",
        exc,
        "it needs libpq: libpq5 (Debian, Ubuntu), libpq (Fedora, RHEL), or psycopg[binary]",
    ) from exc

log = logging.getLogger("milter.greylist")

_T = TypeVar("_T")

# Threads wait for one another beyond this many connections.
_MOST_CONNECTIONS = 8
# After so many new records it looks at all that these pay for, in one statement.
_SWEEP_AFTER = 16
# Statements over the whole table may take longer.
_LONG_TIMEOUT = 120.0

_EXISTS = "SELECT 1 WHERE to_regclass('greylist') IS NOT NULL"
# CREATE TABLE IF NOT EXISTS fails when two hosts do it at once, hence the lock.
_CREATE = """
BEGIN;
SELECT pg_advisory_xact_lock(hashtext('pymilter greylist'));
CREATE TABLE IF NOT EXISTS greylist (
    ip text NOT NULL, sender text NOT NULL, recipient text NOT NULL,
    firstseen double precision NOT NULL, lastseen double precision NOT NULL,
    cnt bigint NOT NULL, umis text,
    PRIMARY KEY (ip, sender, recipient));
COMMIT
"""
_NOW = "extract(epoch FROM clock_timestamp())::double precision"
# The rule of _greystore.advance as one statement, which holds the row locked while it decides.
_CHECK = f"""
INSERT INTO greylist AS g (ip, sender, recipient, firstseen, lastseen, cnt)
SELECT $1, $2, $3, now, now, 0 FROM (SELECT {_NOW} + $4::double precision AS now) AS clock
ON CONFLICT (ip, sender, recipient) DO UPDATE SET
    lastseen = excluded.lastseen,
    firstseen = CASE
        WHEN g.cnt > 0 AND excluded.lastseen > g.lastseen + $7::double precision
          OR g.cnt = 0 AND (excluded.lastseen > g.firstseen + $6::double precision
                            OR excluded.lastseen < g.firstseen)
        THEN excluded.lastseen ELSE g.firstseen END,
    cnt = CASE
        WHEN g.cnt > 0 AND excluded.lastseen <= g.lastseen + $7::double precision
        THEN g.cnt + 1
        WHEN g.cnt = 0 AND excluded.lastseen <= g.firstseen + $6::double precision
          AND excluded.lastseen >= g.firstseen + $5::double precision
        THEN 1 ELSE 0 END
RETURNING cnt, xmax = 0
"""
# The next few records by their triples, without those that no longer matter; one process at a time.
_NEXT = f"""
WITH looked_at AS (
    SELECT ip, sender, recipient FROM greylist
    WHERE (ip, sender, recipient) > ($1, $2, $3)
      AND (SELECT pg_try_advisory_xact_lock(hashtext('pymilter greylist'), {SWEEP}))
    ORDER BY ip, sender, recipient LIMIT $6::bigint),
gone AS (
    DELETE FROM greylist AS g USING looked_at AS l
    WHERE g.ip = l.ip AND g.sender = l.sender AND g.recipient = l.recipient
      AND CASE WHEN g.cnt > 0 THEN g.lastseen + $5::double precision
               ELSE g.firstseen + $4::double precision END < {_NOW} - {MARGIN})
SELECT ip, sender, recipient FROM looked_at ORDER BY ip, sender, recipient
"""
_BEFORE_ALL = ("", "", "")
_CLEAN = f"""
WITH gone AS (DELETE FROM greylist
    WHERE lastseen < {_NOW} + $1::double precision - $2::double precision RETURNING 1)
SELECT count(*) FROM gone
"""
_MERGE = """
INSERT INTO greylist AS g (ip, sender, recipient, firstseen, lastseen, cnt, umis)
VALUES ($1, $2, $3, $4::double precision, $5::double precision, $6::bigint, $7)
ON CONFLICT (ip, sender, recipient) DO UPDATE SET
    firstseen = excluded.firstseen, lastseen = excluded.lastseen, cnt = excluded.cnt,
    umis = excluded.umis
WHERE g.lastseen < excluded.lastseen
"""
_ROWS = """
SELECT ip, sender, recipient, firstseen, lastseen, cnt, umis FROM greylist
"""


def open_store(url: str) -> PostgreSQLStore:
    """The store behind a ``postgresql://`` URL, its table made where it is missing."""
    return PostgreSQLStore(url)


class PostgreSQLStore(Store):
    """The table ``greylist`` in the first schema of the search path."""

    def __init__(self, url: str) -> None:
        try:
            psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.Error as exc:
            # The URL itself may hold a password.
            raise ValueError(f"dbname is no URL that libpq understands: {exc}") from None
        self._pool = _Pool(url)
        self._pool.run(_prepare)
        self._fresh = 0
        self._swept: Sequence[str | None] = _BEFORE_ALL

    def check(self, triple: Triple, limits: Limits, timeinc: float) -> int:
        grey, expire, retain = limits
        params = (*triple, float(timeinc), grey + GRACE, expire, retain)
        ((cnt, fresh),) = self._pool.run(lambda connection: connection.execute(_CHECK, params))
        if fresh == "t":
            self._fresh += 1
            if self._fresh % _SWEEP_AFTER == 0:
                self._sweep(limits)
        return int(cnt or 0)

    def _sweep(self, limits: Limits) -> None:
        """Look at the next few records, round and round; no check fails because of it."""
        count = _SWEEP_AFTER * SWEEP
        params = (*self._swept, limits.expire, limits.retain, count)
        try:
            found = self._pool.run(lambda connection: connection.execute(_NEXT, params))
        except StoreUnavailable as exc:
            log.warning("old records are kept for now: %s", exc)
            return
        self._swept = found[-1] if len(found) == count else _BEFORE_ALL

    def clean(self, retain: float, timeinc: float) -> int:
        params = (float(timeinc), retain)
        rows = self._pool.run(lambda connection: connection.execute(_CLEAN, params), _LONG_TIMEOUT)
        return int(rows[0][0] or 0)

    def merge(self, rows: list[Row]) -> None:
        def insert(connection: _Connection) -> None:
            connection.execute("BEGIN")
            for triple, state, umis in rows:
                connection.execute(_MERGE, (*triple, *state, umis))
            connection.execute("COMMIT")

        self._pool.run(insert, _LONG_TIMEOUT)

    def rows(self) -> Iterable[Row]:
        found = self._pool.run(lambda connection: connection.execute(_ROWS), _LONG_TIMEOUT)
        for ip, sender, recipient, firstseen, lastseen, cnt, umis in found:
            triple = Triple(ip or "", sender or "", recipient or "")
            yield Row(
                triple, State(float(firstseen or 0), float(lastseen or 0), int(cnt or 0)), umis
            )

    def close(self) -> None:
        self._pool.close()


def _prepare(connection: _Connection) -> None:
    """See that the database can hold any address, and make the table where it is missing."""
    ((encoding,),) = connection.execute("SHOW server_encoding")
    if encoding not in ("UTF8", "SQL_ASCII"):
        raise ValueError(f"the database's encoding must be UTF8, not {encoding}")
    if not connection.execute(_EXISTS):
        connection.execute_script(_CREATE)


class _Pool:
    """A few connections for the threads of one process, each used by one thread at a time."""

    # Those taken over in a fork belong to the parent: closing them would end its sessions.
    _inherited: list[_Connection] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, url: str) -> None:
        self._url = url
        self._pid = os.getpid()
        self._idle: list[_Connection] = []
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._closed = False

    def run(self, work: Callable[[_Connection], _T], timeout: float = TIMEOUT) -> _T:
        """Do some work on a connection; StoreUnavailable where that fails or takes too long.

        A connection that was lying idle may have been lost since, with the server's restart for
        one; the work is then done again on a new one.  Where the server had done it already and
        only its answer was lost, a message is counted twice, which harms nobody.
        """
        if self._closed:
            raise ValueError("the greylist is closed")
        self._check_fork()
        if not self._free.acquire(timeout=TIMEOUT):
            raise StoreUnavailable(f"all {_MOST_CONNECTIONS} connections are in use")
        try:
            end = time.monotonic() + timeout
            try:
                old = self._idle.pop()
            except IndexError:
                return self._run_on(_Connection(self._url), work, end)
            try:
                return self._run_on(old, work, end)
            except StoreUnavailable:
                if time.monotonic() >= end:
                    raise
                self._drop_idle()
                return self._run_on(_Connection(self._url), work, end)
        finally:
            self._free.release()

    def _run_on(self, connection: _Connection, work: Callable[[_Connection], _T], end: float) -> _T:
        connection.deadline = end
        try:
            result = work(connection)
        except BaseException:
            # Whatever state it is in, a new one is in a better one.
            connection.close()
            raise
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)
        return result

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            self._inherited += self._idle
            self._idle = []
            self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
            self._pid = os.getpid()

    def _drop_idle(self) -> None:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            connection.close()

    def close(self) -> None:
        """Close the connections; those at work are closed when they are done."""
        self._closed = True
        self._check_fork()
        self._drop_idle()


class _Connection:
    """One session, on which no wait outlasts ``deadline`` (seconds of ``time.monotonic``)."""

    def __init__(self, url: str) -> None:
        self.deadline = 0.0
        try:
            self._session = psycopg.connect(
                url, autocommit=True, connect_timeout=int(TIMEOUT), client_encoding="UTF8"
            )
        except psycopg.Error as exc:
            raise StoreUnavailable(f"PostgreSQL: {exc}") from exc
        self._pg = self._session.pgconn

    def execute(
        self, sql: str, params: Sequence[str | float | None] = ()
    ) -> list[tuple[str | None, ...]]:
        """Execute one statement with parameters; its rows, each value as text."""
        raw = [None if value is None else str(value).encode() for value in params]
        return self._finish(lambda: self._pg.send_query_params(sql.encode(), raw))

    def execute_script(self, sql: str) -> None:
        """Execute several statements without parameters."""
        self._finish(lambda: self._pg.send_query(sql.encode()))

    def _finish(self, send: Callable[[], None]) -> list[tuple[str | None, ...]]:
        try:
            send()
            while self._pg.flush():
                self._wait(select.POLLIN | select.POLLOUT)
                self._pg.consume_input()
            rows: list[tuple[str | None, ...]] = []
            while (result := self._next_result()) is not None:
                rows += _rows(result)
            return rows
        except psycopg.Error as exc:
            raise StoreUnavailable(f"PostgreSQL: {exc}") from exc

    def _next_result(self) -> pq.abc.PGresult | None:
        while self._pg.is_busy():
            self._wait(select.POLLIN)
            self._pg.consume_input()
        return self._pg.get_result()

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._pg.socket, events)
        left = self.deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise StoreUnavailable("PostgreSQL: no answer in time")

    def close(self) -> None:
        """End the session without waiting for the server."""
        self._session.close()


def _rows(result: pq.abc.PGresult) -> list[tuple[str | None, ...]]:
    """The rows of a result; StoreUnavailable where it is the server's refusal."""
    if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
        raise StoreUnavailable(
            f"PostgreSQL: {result.error_message.decode(errors='replace').strip()}"
        )
    columns = range(result.nfields)
    return [
        tuple(_text(result.get_value(row, column)) for column in columns)
        for row in range(result.ntuples)
    ]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
