"""Greylisting with the records in a database: SQLite, or a server that several hosts share.

===================================  ==========================================================
*dbname*                             where the records are
===================================  ==========================================================
a path                               a SQLite file in WAL mode (also one of an earlier version)
``postgresql://user@host/database``  the table ``greylist`` of a PostgreSQL database; needs the
                                     extra ``pymilter[postgresql]``
``redis://host:port/number``         keys ``milter:greylist:…`` of a Redis server; also
                                     ``rediss://`` and ``unix://``; needs ``pymilter[redis]``
===================================  ==========================================================

The semantics are the same everywhere.  On a server each check is one atomic step and the clock is
the server's, so that hosts which check the same triple at the same moment agree.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Iterable
from typing import TextIO

from ._greystore import Limits, Store, StoreUnavailable, Triple, read_csv, write_csv
from ._greystore.sqlite import SQLiteStore

__all__ = ["Greylist", "StoreUnavailable"]

log = logging.getLogger("milter.greylist")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# The module with the store for each scheme; what it needs is imported with it.
_STORES = {
    "postgresql": "postgresql",
    "postgres": "postgresql",
    "redis": "redis",
    "rediss": "redis",
    "unix": "redis",
}


class Greylist:
    """A greylist whose records are in a database.

    Strangers choose the triples, as many as they like. Each new one has a few other records looked
    at, and those removed that no longer matter (an hour after the times above; Redis forgets them
    by itself), so that there are never many more than do; ``clean`` need not be called. How many
    triples come within *grey_expire* hours is for the MTA's limits to bound (Postfix: ``anvil``).

    Objects may be used by many threads and survive a fork; they are context managers, closed at
    the end.  A server is asked at once whether it is there.  ``greylist_time``,
    ``greylist_expire`` and ``greylist_retain`` hold the times in seconds.

    Args:
        dbname: a path, or the URL of a server.
        grey_time: for how many minutes a new triple is greylisted; 5 seconds of grace are added.
        grey_expire: until how many hours after it was first seen it may pass.
        grey_retain: for how many days without being seen it is remembered once it has passed.

    Raises:
        TypeError: a time is no number.
        ValueError: a time makes no sense, or the URL is none.
        sqlite3.Error: the file cannot be opened.
        StoreUnavailable: the server does not answer (an OSError).
        ImportError: a module is missing; the message names the extra to install.
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
        self._store = _open_store(os.fspath(dbname))

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
            StoreUnavailable: the database does not answer within seconds (an OSError); later calls
                try again.
        """
        triple = Triple.parse(ip, sender, recipient)
        cnt = self._store.check(triple, self._limits(), timeinc)
        log.debug("%s cnt=%d", triple, cnt)
        return cnt

    def clean(self, timeinc: float = 0) -> int:
        """Remove at once the records not seen for *grey_retain* days.

        Args:
            timeinc: by how many seconds the clock is moved.

        Returns:
            The number of them.
        """
        return self._store.clean(self.greylist_retain, timeinc)

    def import_csv(self, fp: Iterable[str]) -> int:
        """Add records from CSV, as ``export_csv`` writes it.

        A record that the database has already is replaced where the line was seen later, so that
        importing twice does no harm.

        Args:
            fp: the lines, a text file for example.

        Returns:
            The number of lines read.

        Raises:
            ValueError: a line is none; its number is in the message, and nothing was imported.
        """
        rows = list(read_csv(fp))
        self._store.merge(rows)
        return len(rows)

    def export_csv(self, fp: TextIO) -> None:
        """Write all records as lines ``ip,sender,recipient,firstseen,lastseen,cnt,umis``.

        Addresses are quoted as by ``Milter.greylist.quoteAddress``; there is no header line.

        Args:
            fp: a text file to write to.
        """
        write_csv(fp, self._store.rows())

    def close(self) -> None:
        """Close the database; a second call does nothing."""
        self._store.close()

    def _limits(self) -> Limits:
        return Limits(self.greylist_time, self.greylist_expire, self.greylist_retain)


def _open_store(dbname: str) -> Store:
    scheme = _SCHEME.match(dbname)
    if scheme is None:
        return SQLiteStore(dbname)
    name = _STORES.get(scheme[1].lower())
    if name is None:
        raise ValueError(
            f"dbname must be a path or a URL of {', '.join(_STORES)}, not {scheme[0]!r}…"
        )
    store: Store = importlib.import_module(f"{__package__}._greystore.{name}").open_store(dbname)
    return store
