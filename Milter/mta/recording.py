"""Sessions between an MTA and a filter as text: what ``python -m Milter record`` writes.

The first line is ``milter-recording 1``: the form, and its version.  Lines that begin with ``#``
and empty ones say nothing.  Each other line is one of

- ``mta SECONDS NAME DATA``: a packet, or an event, of the MTA;
- ``filter SECONDS NAME DATA``: likewise of the filter;
- ``+ DATA``: more data of the packet before;
- ``cut SECONDS``: the rest was left out, as the recording had its largest size

in the order in which they came.  The time counts from the connection.  NAME is the packet's
command, such as ``header`` or ``addheader``; ``0x7a`` where the protocol has none; ``raw`` for
bytes that are no packet; or ``closes`` or ``resets``, for the end of what this side says.  DATA is
UTF-8, in which what cannot be printed is ``\\0 \\n \\r \\t \\\\`` or ``\\xNN``; it begins after one
blank.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .visible import escape, unescape
from .wire import MAX_REPLY_SIZE, frame
from .words import COMMANDS, NAMES, Side, describe

FORM = "milter-recording"
VERSION = 1

RAW = "raw"
CLOSES = "closes"
RESETS = "resets"

#: Packets that are easier to read in words, as they hold numbers in binary.
_BINARY = frozenset({"negotiate", "connect", "insheader", "chgheader"})
_PIECE = 120  # bytes in a line of data
_LINE = re.compile(r"(mta|filter|cut) (\d{1,9}\.\d{1,6})(?: (\S+)(?: (.*))?)?")
_NUMBERED = re.compile(r"0x([0-9a-f]{2})")


@dataclass(frozen=True)
class Entry:
    """A packet or an event of a recorded session.

    :ivar side: whose it is.
    :ivar seconds: since the connection was made.
    :ivar name: as the recording has it.
    :ivar data: of the packet.
    :ivar line: where it stands in the recording, 0 where it does not yet.
    """

    side: Side
    seconds: float
    name: str
    data: bytes = b""
    line: int = 0

    @classmethod
    def packet(cls, side: Side, seconds: float, command: bytes | None, data: bytes) -> Entry:
        """A packet, or with no command bytes that are none."""
        if command is None:
            return cls(side, seconds, RAW, data)
        return cls(side, seconds, NAMES[side].get(command, f"0x{command.hex()}"), data)

    @property
    def command(self) -> bytes | None:
        """The command byte of a packet, None for what is none."""
        numbered = _NUMBERED.fullmatch(self.name)
        if numbered is not None:
            return bytes.fromhex(numbered[1])
        return COMMANDS[self.side].get(self.name)

    @property
    def is_end(self) -> bool:
        """Whether it is the end of what this side says."""
        return self.name in (CLOSES, RESETS)

    @property
    def wire(self) -> bytes:
        """The bytes that travel."""
        if self.name == RAW:
            return self.data
        command = self.command
        return b"" if command is None else frame(command, self.data)

    def __str__(self) -> str:
        if self.is_end:
            return f"{self.name} the connection"
        if self.command is None:
            return f"bytes that are no packet: {escape(self.data[:80])}"
        return describe(self.side, self.command, self.data)

    def as_text(self) -> str:
        """Its lines in a recording."""
        pieces = [escape(piece) for piece in _pieces(self.data)] or [""]
        head = f"{self.side.value} {self.seconds:.6f} {self.name} {pieces[0]}".rstrip(" ")
        lines = [head, *(f"+ {piece}" for piece in pieces[1:])]
        if self.name in _BINARY:
            lines.append(f"#   {self}")
        return "".join(f"{line}\n" for line in lines)


def _pieces(data: bytes) -> Iterator[bytes]:
    """The parts of *data* that get a line each: up to a line end, or of a size that can be read."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start, start + _PIECE) + 1
        if not end:
            end = min(start + _PIECE, len(data))
            # Not within a character, whose bytes would be escaped.
            back = end
            while end - back < 3 and back < len(data) and 0x80 <= data[back] < 0xC0:
                back -= 1
            end = back
        yield data[start:end]
        start = end


@dataclass(frozen=True)
class Recording:
    """A recorded session, as ``python -m Milter record`` writes it to a file.

    :ivar entries: packets and events in order.
    :ivar is_cut: whether what followed was left out, as the recording had its largest size.
    """

    entries: tuple[Entry, ...]
    is_cut: bool = False

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no recording; the message has the file, the line and the rule.
        """
        with open(path, "rb") as file:
            data = file.read()
        try:
            return cls.parse(data)
        except ValueError as exc:
            raise ValueError(f"{os.fspath(path)}: {exc}") from None

    @classmethod
    def parse(cls, data: bytes) -> Recording:
        """Read the content of a file.

        Raises:
            ValueError: it is no recording; the message has the line and the rule.
        """
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            number = data.count(b"\n", 0, exc.start) + 1
            raise ValueError(f"line {number}: not UTF-8, byte 0x{data[exc.start]:02x}") from None
        lines = [line.rstrip("\r") for line in text.split("\n")]
        _check_head(lines[0])
        if lines.pop():
            raise ValueError(f"line {len(lines) + 1}: no line end, the file is incomplete")
        reader = _Reader()
        for number, line in enumerate(lines[1:], 2):
            try:
                reader.take(line, number)
            except ValueError as exc:
                raise ValueError(f"line {number}: {exc}") from None
        return cls(tuple(reader.entries()), reader.is_cut)


def _check_head(line: str) -> None:
    form, _, version = line.partition(" ")
    if form != FORM:
        raise ValueError(f"line 1: no recording, which begins with '{FORM} {VERSION}'")
    if version != str(VERSION):
        raise ValueError(f"line 1: version {version!r} of the form, this reads {VERSION} alone")


class _Reader:
    """Lines go in, entries come out."""

    def __init__(self) -> None:
        self.is_cut = False
        self._found: list[tuple[Entry, list[bytes]]] = []

    def take(self, line: str, number: int) -> None:
        if not line or line.startswith("#"):
            return
        if self.is_cut:
            raise ValueError("nothing may follow after 'cut'")
        if line == "+" or line.startswith("+ "):
            if not self._found or self._found[-1][0].is_end:
                raise ValueError("there is no packet before whose data this could be")
            self._found[-1][1].append(unescape(line[2:]))
            return
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"{line[:60]!r} is none of 'mta …', 'filter …', '+ …', 'cut …', '# …'")
        who, seconds, name, data = found.groups()
        if (who == "cut") != (name is None):
            raise ValueError("'cut' has a time alone" if name else f"'{who}' without a name")
        if who == "cut":
            self.is_cut = True
            return
        entry = Entry(Side(who), float(seconds), name, line=number)
        if entry.command is None and name not in (RAW, CLOSES, RESETS):
            raise ValueError(f"the {who} has no packet {name!r}")
        if entry.is_end and data:
            raise ValueError(f"{name!r} has no data")
        if any(each.is_end and each.side is entry.side for each, _ in self._found):
            raise ValueError(f"the {who} has closed the connection before")
        self._found.append((entry, [unescape(data or "")]))

    def entries(self) -> Iterator[Entry]:
        for entry, pieces in self._found:
            yield Entry(entry.side, entry.seconds, entry.name, b"".join(pieces), entry.line)


class Splitter:
    """Bytes of one side come in, packets go out; what cannot be one is given as it is."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_raw = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes | None, bytes]]:
        """Each packet that is whole now: command and data; no command for what is no packet."""
        self._buffer += data
        while self._buffer:
            if self._is_raw:
                yield None, self.rest()
                return
            if len(self._buffer) < 4:
                return
            (length,) = struct.unpack_from("!I", self._buffer)
            if not 0 < length <= MAX_REPLY_SIZE:
                # Nobody can say where the next one would begin.
                self._is_raw = True
                continue
            if len(self._buffer) < 4 + length:
                return
            packet = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            yield packet[:1], packet[1:]

    def rest(self) -> bytes:
        """What is left: a packet that has not come in as a whole."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest
