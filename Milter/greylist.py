"""Greylisting with the records in a shelf.

The shelf is a file in the format of the standard library's ``dbm.sqlite3``: Python 3.13 and later
open it with plain ``shelve.open``, and here every version of Python does, with a guarantee that
the other kinds of dbm files lack: what ``check`` has returned survives the death of the process
at any moment.  Any number of threads and processes may share the file.

A shelf of an earlier version, whatever kind of dbm file that is, is taken over when it is opened,
its files being kept as ``*.old``.
"""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import shelve
import time
from collections.abc import Iterator
from typing import Any, TextIO

from ._greystore import (
    SWEEP,
    Limits,
    Row,
    State,
    StoreUnavailable,
    Triple,
    advance,
    is_litter,
    quote_address,
    write_csv,
)
from ._greystore.shelf import ShelfFile

__all__ = ["Greylist", "Record", "StoreUnavailable", "quoteAddress"]

log = logging.getLogger("milter.greylist")

# All that a damaged pickle may raise.
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


def quoteAddress(s: str | bytes) -> str:
    """The address as it stands in a shelf's keys and in CSV, all but harmless ASCII as ``%XX``.

    Args:
        s: an address, as the MTA gives it.

    >>> quoteAddress("foo bar@example.com"), quoteAddress('"a:b"@example.com')
    ('foo%20bar@example.com', '%22a%3Ab%22@example.com')
    """
    return quote_address(s)


class Record:
    """What a shelf remembers of a triple of client address, sender and recipient.

    ``firstseen`` and ``lastseen`` are seconds since 1970, ``cnt`` counts the messages let through;
    ``umis`` is unused.

    Args:
        timeinc: by how many seconds the clock is moved.
    """

    __slots__ = ("firstseen", "lastseen", "umis", "cnt")  # noqa: RUF023 - in order of meaning

    def __init__(self, timeinc: float = 0) -> None:
        now = time.time() + timeinc
        self.firstseen: float = now
        self.lastseen: float = now
        self.umis: str | None = None
        self.cnt: int = 0

    def __str__(self) -> str:
        """The record for people to read."""
        first, last = time.ctime(self.firstseen), time.ctime(self.lastseen)
        return f"Grey[{first}:{last}:{self.umis}:{self.cnt}]"


class _RecordUnpickler(pickle.Unpickler):
    """Makes records and nothing else, whatever somebody put into the file."""

    def find_class(self, module: str, name: str) -> type[Record]:
        if (module, name) != ("Milter.greylist", "Record"):
            raise pickle.UnpicklingError(f"{module}.{name} is no greylist record")
        return Record


class _Shelf(shelve.Shelf[Record]):
    """A shelf of records; one that is damaged counts as missing."""

    def __init__(self, file: ShelfFile) -> None:
        super().__init__(file, protocol=2)
        self._file = file

    def __getitem__(self, key: str) -> Record:
        raw = self._file[key.encode()]
        try:
            record: Any = _RecordUnpickler(io.BytesIO(raw), encoding="latin-1").load()
            if not (math.isfinite(record.firstseen) and math.isfinite(record.lastseen)):
                raise ValueError("times must be finite")
            if not isinstance(record.cnt, int):
                raise TypeError("cnt must be an int")
        except _UNREADABLE as exc:
            log.warning("damaged record of %r dropped: %s", key, exc)
            raise KeyError(key) from exc
        found: Record = record
        return found

    def find(self, key: str) -> Record | None:
        """The record, or None where it is missing or damaged."""
        try:
            return self[key]
        except KeyError:
            return None


class Greylist:
    """A greylist whose records are in a shelf.

    Strangers choose the triples, as many as they like. Each new one has a few other records looked
    at, and those removed that no longer matter (an hour after the times above), so that there are
    never many more than do; ``clean`` need not be called. How many triples come within
    *grey_expire* hours is for the MTA's limits to bound (Postfix: ``anvil``).

    Objects may be used by many threads and survive a fork; they are context managers, closed at
    the end.  ``greylist_time``, ``greylist_expire`` and ``greylist_retain`` hold the times in
    seconds, ``dbp`` the shelf.

    Args:
        dbname: the shelf's file, which is made where it is missing.
        grey_time: for how many minutes a new triple is greylisted; 5 seconds of grace are added.
        grey_expire: until how many hours after it was first seen it may pass.
        grey_retain: for how many days without being seen it is remembered once it has passed.

    Raises:
        TypeError: a time is no number.
        ValueError: a time makes no sense.
        OSError: the file cannot be opened; so does ``sqlite3.Error``.
        ImportError: the file is of an old kind whose module is missing.
    """

    def __init__(
        self,
        dbname: str | os.PathLike[str],
        grey_time: float = 10,
        grey_expire: float = 4,
        grey_retain: float = 36,
    ) -> None:
        limits = Limits.parse(grey_time, grey_expire, grey_retain)
        self.greylist_time, self.greylist_expire, self.greylist_retain = limits
        self._file = ShelfFile(os.fspath(dbname))
        self.dbp = _Shelf(self._file)

    def __enter__(self) -> Greylist:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check(
        self,
        ip: str | bytes | None,
        sender: str | bytes,
        recipient: str | bytes,
        timeinc: float = 0,
    ) -> int:
        """Take note of a triple.

        Args:
            ip: the client's address, None where the MTA gave none.
            sender: the envelope sender.
            recipient: the recipient.
            timeinc: by how many seconds the clock is moved.

        Returns:
            How many of its messages were let through. 0 means greylisted: answer with a temporary
            failure.

        Raises:
            TypeError: something is no address.
            ValueError: the greylist is closed.
            StoreUnavailable: the file is not to be had within seconds (an OSError).
        """
        key = Triple.parse(ip, sender, recipient).key
        with self._file.transaction():
            record = self.dbp.find(key)
            old = None if record is None else _state(record)
            if record is None:
                record = Record(timeinc)
            new = advance(old, time.time() + timeinc, self._limits())
            record.firstseen, record.lastseen, record.cnt = new
            self.dbp[key] = record
            if old is None:
                self._sweep()
        log.debug("%s %s", key, record)
        return new.cnt

    def _sweep(self) -> None:
        """Look at the next few records, and remove those that no longer matter."""
        for key in self._file.next_keys(SWEEP):
            # Damaged ones are for clean().
            record = self._record(key)
            if record is not None and is_litter(_state(record), self._limits()):
                del self._file[key]

    def clean(self, timeinc: float = 0) -> int:
        """Remove at once the records not seen for *grey_retain* days.

        Args:
            timeinc: by how many seconds the clock is moved.

        Returns:
            The number of them.
        """
        oldest = time.time() + timeinc - self.greylist_retain
        with self._file.transaction():
            # Damaged records have no place in it either.
            old = [
                key for key, record in self._records() if record is None or record.lastseen < oldest
            ]
            for key in old:
                del self._file[key]
        return len(old)

    def export_csv(self, fp: TextIO, timeinc: float = 0) -> None:
        """Write the records that ``clean`` would keep, for ``Milter.greysql`` to import.

        A line is ``ip,sender,recipient,firstseen,lastseen,cnt,umis``, its addresses quoted as by
        ``quoteAddress``; there is no header line.

        Args:
            fp: a text file to write to.
            timeinc: by how many seconds the clock is moved.
        """
        oldest = time.time() + timeinc - self.greylist_retain
        with self._file.transaction():
            records = list(self._records())
        rows = []
        for key, record in records:
            if record is not None and record.lastseen >= oldest:
                triple = Triple.from_key(key.decode())
                rows.append(Row(triple, _state(record), record.umis))
        write_csv(fp, rows)

    def close(self) -> None:
        """Close the shelf; a second call does nothing."""
        self._file.close()

    def _limits(self) -> Limits:
        return Limits(self.greylist_time, self.greylist_expire, self.greylist_retain)

    def _records(self) -> Iterator[tuple[bytes, Record | None]]:
        """The keys with their records, None where one is damaged."""
        for key in self._file:
            yield key, self._record(key)

    def _record(self, key: bytes) -> Record | None:
        try:
            text = key.decode()
            Triple.from_key(text)
            return self.dbp.find(text)
        except ValueError:
            return None


def _state(record: Record) -> State:
    return State(record.firstseen, record.lastseen, record.cnt)
