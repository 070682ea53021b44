"""A map of mail addresses to results that forgets them after some days.

Results of callback validation and the like are kept in memory; those that are None (by
convention: blacklisted) are also written to a text file, one ``address time-stamp`` a line, and
survive a restart.
"""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import _domains
from .plock import PLock

__all__ = ["AddrCache"]

log = logging.getLogger("milter.cache")

_DAY = 86400.0
_PRUNE_FROM = 1024
#: Strangers choose the addresses, so there has to be an end to them.
MAX_ENTRIES = 100_000


# Names of time zones that mean one thing, after the hours that they are ahead of UTC.
_ZONE_NAMES = """
    -10 HST; -9 AKST; -8 AKDT PST; -7 PDT MST; -6 MDT; -5 CDT EST; -4 EDT AST; -3.5 NST; -3 ADT;
    -2.5 NDT; 1 BST WEST CET; 2 CEST EET SAST; 3 EEST MSK EAT; 5 PKT; 7 WIB; 8 AWST HKT; 9 JST KST;
    9.5 ACST; 10 AEST; 10.5 ACDT; 11 AEDT; 12 NZST; 13 NZDT
"""
_ZONES = {
    zone: float(hours) for hours, *zones in map(str.split, _ZONE_NAMES.split(";")) for zone in zones
}


class _Entry(NamedTuple):
    """When the result was stored (seconds since 1970, None for good) and the result."""

    stored: float | None
    result: Any


class AddrCache:
    """Addresses with a result each, which expires after some days.

    Keys are addresses, or domains that stand for every address in them.  They compare without
    regard to case, and domains as domains: with a final dot or not, in Unicode or in ASCII
    (IDNA).  Objects may be used by many threads, and one file by many processes.

    A key without ``@`` is a domain, whoever chose it: after ``MAIL FROM:<example.com>``, which some
    MTAs pass on, ``cache[sender] = None`` would blacklist all of example.com, in the file too.  So
    store the results of senders only for those that are addresses, ``if "@" in sender:``.

    Args:
        renew: after how many days an entry expires.
        fname: the file that keeps the entries whose result is None; it is appended to, and read by
            ``load`` only. None for none.
        max_entries: at so many in memory a quarter of them is forgotten, the oldest first; entries
            that are there for good do not count, and lines of the file stay.

    Raises:
        ValueError: *max_entries* is not positive.

    >>> cache = AddrCache(renew=7)
    >>> cache["Spammer@Example.com"] = "550"
    >>> cache["spammer@example.com"], "other@example.com" in cache
    ('550', False)
    >>> cache["example.com"] = "450"
    >>> cache["other@example.com"]
    '450'
    """

    #: Of the time stamps in the file, as of ``strftime``.  One that ends in ``%Z`` has them written
    #: in UTC, and those of any time zone read; any other is in local time.
    time_format = "%Y%b%d %H:%M:%S %Z"

    def __init__(
        self,
        renew: float = 7,
        fname: str | os.PathLike[str] | None = None,
        *,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries must be positive, not {max_entries!r}")
        self.age = renew
        self.max_entries = max_entries
        self.cache: dict[str, _Entry] = {}
        self.fname = fname
        self._lock = threading.RLock()
        self._prune_at = min(_PRUNE_FROM, max_entries)

    def load(self, fname: str | os.PathLike[str], age: float = 0) -> None:
        """Read the entries of a file in place of those in memory and keep it as the cache's file.

        Lines that are too old or have a time stamp that cannot be read are dropped from the file,
        which is then rewritten under a ``PLock``, the old one kept as ``fname.old``.  A line
        without time stamp is a manual entry and stays for good; one that begins with ``#`` is left
        alone.  While another process holds the lock (or left it behind) the file is read and not
        rewritten.

        Args:
            fname: the file; a missing one counts as empty.
            age: from how many days on a line is too old; 0 is the cache's own number.

        Raises:
            OSError: the file cannot be read or rewritten.
        """
        with self._lock:
            self.fname = fname
            name = os.fspath(fname)
            lines, entries, dropped = self._read(name, age or self.age)
            if dropped:
                with _exclusive(name, os.O_RDWR):
                    # Other processes may have added lines before the lock was ours.
                    lines, entries, dropped = self._read(name, age or self.age)
                    self._rewrite(name, lines)
            self.cache = entries
            self._prune()

    def _read(self, fname: str, age: float) -> tuple[list[str], dict[str, _Entry], int]:
        """The lines of the file to keep, their entries, and how many lines are to go."""
        kept: list[str] = []
        entries: dict[str, _Entry] = {}
        dropped = 0
        oldest = time.time() - age * _DAY
        for line in _lines(fname):
            sender, *stamp = line.split(None, 1)
            if not sender.startswith("#"):
                stored = _parse_time(stamp[0], self.time_format) if stamp else None
                if stamp and (stored is None or stored < oldest):
                    dropped += 1
                    continue
                entries[_key(sender)] = _Entry(stored, None)
            kept.append(line + "\n")
        return kept, entries, dropped

    def _rewrite(self, fname: str, lines: list[str]) -> None:
        lock = PLock(fname)
        try:
            fp = lock.lock()
        except FileExistsError:
            log.warning("%s: expired entries stay in it, since %s exists", fname, lock.lockname)
            return
        try:
            fp.writelines(lines)
        except BaseException:
            lock.unlock()
            raise
        lock.commit(fname + ".old")

    def has_precise_key(self, sender: str) -> bool:
        """Whether there is an entry for an address itself that has not expired.

        Args:
            sender: the address.
        """
        return self._find(sender) is not None

    def has_key(self, sender: str) -> bool:
        """Whether there is an entry for an address or for its domain that has not expired.

        Args:
            sender: the address.
        """
        return self._lookup(sender) is not None

    __contains__ = has_key

    def __getitem__(self, sender: str) -> Any:
        """The result for an address, or else for its domain.

        Raises:
            KeyError: neither has one.
        """
        entry = self._lookup(sender)
        if entry is None:
            raise KeyError(sender)
        return entry.result

    def __setitem__(self, sender: str, res: Any) -> None:
        """Store a result for the cache's number of days; None is also appended to the file.

        Raises:
            TypeError: *sender* is no str.
            OSError: the file cannot be written.
        """
        now = time.time()
        self._store(sender, _Entry(now, res))
        if res is None:
            self._append(sender, _format_time(now, self.time_format))

    def addperm(self, sender: str, res: Any = None) -> None:
        """Store a result for good.

        Args:
            sender: the address, or a domain.
            res: the result; None is also appended to the file, without a time stamp.

        Raises:
            TypeError: *sender* is no str.
            OSError: the file cannot be written.
        """
        self._store(sender, _Entry(None, res))
        if res is None:
            self._append(sender)

    def __len__(self) -> int:
        """How many entries are in memory; those that expired may be counted until looked up."""
        return len(self.cache)

    # Without it, iter() would try the integers as addresses.
    __iter__ = None

    def _lookup(self, sender: str) -> _Entry | None:
        entry = self._find(sender)
        if entry is None and sender and "@" in sender:
            entry = self._find(sender.rpartition("@")[2])
        return entry

    def _find(self, key: str) -> _Entry | None:
        if not key:
            return None
        key = _key(key)
        with self._lock:
            entry = self.cache.get(key)
            if entry is not None and self._expired(entry, time.time()):
                del self.cache[key]
                return None
            return entry

    def _expired(self, entry: _Entry, now: float) -> bool:
        return entry.stored is not None and entry.stored + self.age * _DAY <= now

    def _store(self, sender: str, entry: _Entry) -> None:
        if not isinstance(sender, str):
            raise TypeError(f"sender must be a str, not {sender!r}")
        with self._lock:
            self.cache[_key(sender)] = entry
            if len(self.cache) >= self._prune_at:
                self._prune()

    def _prune(self) -> None:
        """Forget what expired, so that senders made up once and never again do not pile up."""
        now = time.time()
        kept = {key: e for key, e in self.cache.items() if not self._expired(e, now)}
        dated = sorted((e.stored, key) for key, e in kept.items() if e.stored is not None)
        full = len(kept) - len(dated) + self.max_entries
        if len(dated) >= self.max_entries:
            for _, key in dated[: len(dated) - 3 * self.max_entries // 4]:
                del kept[key]
        self.cache = kept
        self._prune_at = min(max(_PRUNE_FROM, 2 * len(kept)), full)

    def _append(self, *fields: str) -> None:
        """Add a line to the file, unless the address in it would read back as something else."""
        if self.fname is None:
            return
        line = _as_line(*fields)
        if line is None:
            log.warning("%r is kept in memory, %s cannot hold it", fields[0], self.fname)
            return
        with _exclusive(os.fspath(self.fname), os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
            size = os.fstat(fd).st_size
            unfinished = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            _write_all(fd, size, b"\n" * unfinished + line)


def _format_time(seconds: float, form: str) -> str:
    """The time stamp for the file: in UTC where it names its zone, as any host can read that."""
    fields = time.gmtime(seconds) if form.endswith("%Z") else time.localtime(seconds)
    return time.strftime(form, fields)


def _parse_time(text: str, form: str) -> float | None:
    """The seconds since 1970 of a time stamp; None where it cannot be read."""
    text = " ".join(text.split())
    try:
        # Knows UTC and the names of this host's zone, and then whether it is summer time.
        fields = time.strptime(text, form)
        # What the C library cannot express is no time either.
        return float(calendar.timegm(fields)) if _is_utc(fields.tm_zone) else time.mktime(fields)
    except (ValueError, OverflowError):
        pass
    stamp, _, zone = text.rpartition(" ")
    offset = _offset(zone)
    if not form.endswith("%Z") or offset is None:
        return None
    try:
        return calendar.timegm(time.strptime(stamp, form[: -len("%Z")].rstrip())) - offset
    except (ValueError, OverflowError):
        return None


def _is_utc(zone: str | None) -> bool:
    return zone is not None and zone.upper() in ("UTC", "GMT")


def _offset(zone: str) -> float | None:
    """The seconds that a time zone is ahead of UTC; None for what is no zone.

    A name that has several meanings, or none that is known, counts as UTC: half a day more or less
    matters little to an entry that is kept for days.
    """
    number = re.fullmatch("([+-])([0-9]{2}):?([0-9]{2})?", zone)
    if number:
        seconds = int(number[2]) * 3600 + int(number[3] or 0) * 60
        return -seconds if number[1] == "-" else seconds
    if not re.fullmatch("[A-Za-z]{3,5}", zone):
        return None
    return _ZONES.get(zone.upper(), 0) * 3600


def _key(sender: str) -> str:
    """The form in which an address, or a domain, is looked for, however its sender wrote it."""
    local, at, domain = sender.rpartition("@")
    return local.lower() + at + _domains.canonical(domain)


def _write_all(fd: int, size: int, data: bytes) -> None:
    """Append *data* to the file of *size* bytes, or nothing of it.

    A part, as a full disk takes it, would be read as another address, and one that stays for good.
    """
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        os.ftruncate(fd, size)
        raise


def _lines(fname: str) -> list[str]:
    """The lines of the file that are not empty, bytes that are no UTF-8 as surrogate escapes."""
    try:
        # An editor may have put a byte order mark before the first.
        with open(fname, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as fp:
            return [line.rstrip("\n") for line in fp if line.strip()]
    except FileNotFoundError:
        return []


def _as_line(sender: str, *fields: str) -> bytes | None:
    """The line for the file; None where an address from hostile mail would make it another one."""
    if sender.split() != [sender] or sender.startswith(("#", "\ufeff")):
        return None
    try:
        return (" ".join((sender, *fields)) + "\n").encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None


@contextlib.contextmanager
def _exclusive(fname: str, flags: int) -> Iterator[int]:
    """The file open and locked, and certain to be the one that bears the name at that moment.

    Without it a line appended between the reading and the renaming of a rewrite would be lost.
    """
    while True:
        fd = os.open(fname, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _bears_name(fd, fname):
                yield fd
                return
        finally:
            os.close(fd)


def _bears_name(fd: int, fname: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(fname))
    except FileNotFoundError:
        return False
