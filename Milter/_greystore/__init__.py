"""What all greylists share: the rule, the form of addresses, and records as lines of CSV.

A triple (client address, sender, recipient) is greylisted until it is tried again inside a window
of time, and remembered while mail keeps coming.  RFC 6647 tells why that works.
"""

from __future__ import annotations

import csv
import hashlib
import math
import numbers
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, TextIO

from .. import _domains

# Seconds of grace, so that a client which retries on the minute is not early by its own clock.
GRACE = 5
# In bytes; more than RFC 5321 allows any address to have.  Longer ones are hostile, and shortened:
# three of this length still fit into an entry of PostgreSQL's index.
LONGEST_ADDRESS = 512
# Strangers choose the triples.  So each new one pays for a look at this many others, and those that
# no longer matter go: there are never many more records than those that do.
SWEEP = 4
# In seconds; for so long they are kept, as clocks and limits may differ a little.
MARGIN = 3600
# How long to wait for a server or for a locked file, in seconds.
TIMEOUT = 5.0

_MINUTE = 60
_HOUR = 3600
_DAY = 86400
_ESCAPE = re.compile(rb"%(?:[0-9A-F]{2}|2e)")
_TO_QUOTE = re.compile(_ESCAPE.pattern + rb"|[^!%+\-.0-9@A-Z_a-z~]")
# What is never written as an escape; "%" is, before what would look like one.
_SAFE = frozenset(bytes((n,)) for n in range(256) if not _TO_QUOTE.match(bytes((n,)))) - {b"%"}


class StoreUnavailable(ConnectionError):
    """The store of a greylist could not answer in time; the triple was not judged.

    It is an OSError.  ``__cause__`` is the error of the driver underneath.  The greylist stays
    usable: the next call tries again.
    """


class Limits(NamedTuple):
    """The three times of a greylist, in seconds, as the rule uses them."""

    grey: float
    expire: float
    retain: float

    @classmethod
    def parse(cls, grey_time: float, grey_expire: float, grey_retain: float) -> Limits:
        """From minutes, hours and days; TypeError or ValueError names the argument in error."""
        times = {"grey_time": grey_time, "grey_expire": grey_expire, "grey_retain": grey_retain}
        for name, value in times.items():
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must not be negative or infinite: {value!r}")
        limits = cls(grey_time * _MINUTE, grey_expire * _HOUR, grey_retain * _DAY)
        if limits.expire < limits.grey + GRACE:
            raise ValueError(
                f"grey_expire ({grey_expire!r} h) must be longer than grey_time "
                f"({grey_time!r} min), or no mail would ever pass"
            )
        return limits


class State(NamedTuple):
    """What is remembered of a triple: times in seconds since 1970, and messages let through."""

    firstseen: float
    lastseen: float
    cnt: int


def is_past(state: State, now: float, limits: Limits) -> bool:
    """Whether a triple seen at *now* begins anew, as if there were no record of it."""
    if state.cnt > 0:
        return now > state.lastseen + limits.retain
    return now > state.firstseen + limits.expire


def is_ahead(state: State, now: float) -> bool:
    """Whether a triple waits for a time that a wrong clock set: it begins anew, as it waits less.

    One that was let through already goes on being let through.
    """
    return state.cnt == 0 and now < state.firstseen


def is_litter(state: State, limits: Limits) -> bool:
    """Whether a record can go; by the true time, as nothing comes back that went too early."""
    return is_past(state, time.time() - MARGIN, limits)


def advance(old: State | None, now: float, limits: Limits) -> State:
    """The state of a triple after it was seen at *now*; its ``cnt`` is what ``check`` returns."""
    if old is None or is_past(old, now, limits) or is_ahead(old, now):
        return State(now, now, 0)
    if old.cnt > 0:
        return State(old.firstseen, now, old.cnt + 1)
    if now < old.firstseen + limits.grey + GRACE:
        return State(old.firstseen, now, 0)
    return State(old.firstseen, now, 1)


class Triple(NamedTuple):
    """Client address, sender and recipient as every store can hold them."""

    ip: str
    sender: str
    recipient: str

    @classmethod
    def parse(cls, ip: str | bytes | None, sender: str | bytes, recipient: str | bytes) -> Triple:
        """From a callback's arguments; *ip* is None for mail submitted locally.

        Whatever hostile mail put into an address becomes printable text of bounded length, and its
        domain the form in which domains are compared; local parts stay as they are.  Raises
        TypeError for what is neither str nor bytes.
        """
        return cls(
            _printable("ip", "" if ip is None else ip),
            _printable("sender", sender, _domains.canonical_address),
            _printable("recipient", recipient, _domains.canonical_address),
        )

    @property
    def key(self) -> str:
        """The triple as one string of ASCII."""
        return f"{self.ip}:{quote_address(self.sender)}:{quote_address(self.recipient)}"

    @classmethod
    def from_key(cls, key: str) -> Triple:
        """The triple behind a key; ValueError where it is none."""
        ip, sender, recipient = key.rsplit(":", 2)
        return cls(ip, unquote_address(sender), unquote_address(recipient))


def _printable(name: str, value: str | bytes, form: Callable[[str], str] = str) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    elif not isinstance(value, str):
        raise TypeError(f"{name} must be str or bytes, not {value!r}")
    value = form(value)
    if not value.isprintable():
        # Neither SQL text nor UTF-8 has room for lone surrogates and null bytes.
        value = "".join(c if c.isprintable() else _escape(c) for c in value)
    raw = value.encode()
    if len(raw) > LONGEST_ADDRESS:
        digest = "#" + hashlib.sha256(raw).hexdigest()
        value = raw[: LONGEST_ADDRESS - len(digest)].decode(errors="ignore") + digest
    return value


def _escape(char: str) -> str:
    code = ord(char)
    # A byte that was no UTF-8 came as one of these surrogates.
    return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"


def quote_address(address: str | bytes) -> str:
    """Percent-encode what could not stand in a key or in a line of CSV.

    Letters, digits and ``!%+-.@_~`` stay as they are, but for a leading ``.``, which becomes
    ``%2e``, and a ``%`` that would look like an escape; all else becomes the ``%XX`` of its bytes
    in UTF-8.  No two addresses become the same.
    """
    raw = address if isinstance(address, bytes) else _encode(address)
    text = _TO_QUOTE.sub(_quote, raw).decode("ascii")
    return "%2e" + text[1:] if text.startswith(".") else text


def _encode(address: str) -> bytes:
    try:
        return address.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return address.encode("utf-8", "surrogatepass")


def _quote(match: re.Match[bytes]) -> bytes:
    found = match[0]
    if found.startswith(b"%"):
        return found if _unquote(match) == found else b"%25" + found[1:]
    return b"%%%02X" % ord(found)


def unquote_address(quoted: str) -> str:
    """Undo ``quote_address``, leaving alone escapes that it does not write, such as ``%41``."""
    return _ESCAPE.sub(_unquote, _encode(quoted)).decode("utf-8", "surrogateescape")


def _unquote(match: re.Match[bytes]) -> bytes:
    escape = match[0]
    if escape == b"%2e":
        return b"." if match.start() == 0 else escape
    byte = bytes.fromhex(escape[1:].decode())
    return escape if byte in _SAFE else byte


class Row(NamedTuple):
    """A record together with its triple; *umis* is a field that older versions reserved."""

    triple: Triple
    state: State
    umis: str | None = None


class Store(Protocol):
    """Where a greylist keeps its records; every method is atomic and raises StoreUnavailable."""

    def check(self, triple: Triple, limits: Limits, timeinc: float) -> int:
        """Take note of the triple and return its count."""
        ...

    def clean(self, retain: float, timeinc: float) -> int:
        """Remove what was last seen more than *retain* seconds ago and return how many."""
        ...

    def merge(self, rows: list[Row]) -> None:
        """Add the rows, each unless there is one for its triple that was seen later."""
        ...

    def rows(self) -> Iterable[Row]:
        """All records."""
        ...

    def close(self) -> None:
        """Give back connections and files."""
        ...


def write_csv(fp: TextIO, rows: Iterable[Row]) -> None:
    """Write rows as ``ip,sender,recipient,firstseen,lastseen,cnt,umis``, addresses quoted."""
    writer = csv.writer(fp, lineterminator="\n")
    for triple, state, umis in rows:
        addresses = triple.ip, quote_address(triple.sender), quote_address(triple.recipient)
        writer.writerow((*addresses, *state, umis or ""))


def read_csv(fp: Iterable[str]) -> Iterator[Row]:
    """The rows of what ``write_csv`` wrote, with or without a line of column names.

    Raises ValueError with the number of the line that is none.
    """
    reader = csv.reader(fp)
    for fields in reader:
        if not fields or fields == ["ip", "sender", "recipient", *State._fields, "umis"]:
            continue
        try:
            yield _parse_row(fields)
        except ValueError as exc:
            raise ValueError(f"line {reader.line_num}: {exc}") from exc


def _parse_row(fields: list[str]) -> Row:
    if len(fields) != 7:
        raise ValueError(f"7 columns expected, {len(fields)} found")
    ip, sender, recipient, firstseen, lastseen, cnt, umis = fields
    state = State(float(firstseen), float(lastseen), int(cnt))
    if not (math.isfinite(state.firstseen) and math.isfinite(state.lastseen) and state.cnt >= 0):
        raise ValueError(f"times and count must be finite and not negative: {state}")
    triple = Triple.parse(ip, unquote_address(sender), unquote_address(recipient))
    return Row(triple, state, umis or None)
