"""The body of a message: a file, in memory while it is small, on disk beyond."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, Union, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Content = Union[Buffer, IO[bytes], Iterable[bytes]]

#: Bytes that are read or sent at once: what a packet of the protocol holds.
CHUNK = 65535


class Spool:
    """Bytes that are written once and read by any number of readers, in memory or on disk."""

    def __init__(self, limit: int) -> None:
        """Make an empty one.

        Args:
            limit: how many bytes may be in memory.
        """
        self.limit = limit
        self.size = 0
        self._pieces: list[bytes] = []
        self._file: IO[bytes] | None = None
        self.closed = False

    def write(self, data: bytes) -> None:
        """Append; OSError where the disk is full."""
        self.size += len(data)
        if self._file is None:
            self._pieces.append(data)
            if self.size <= self.limit:
                return
            # It has no name, so nothing is left of it whatever happens.
            self._file = tempfile.TemporaryFile(prefix="milter-", buffering=0)  # noqa: SIM115
            pieces, self._pieces = self._pieces, []
        else:
            pieces = [data]
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[self._file.write(view) :]

    @property
    def on_disk(self) -> bool:
        """Whether it is on disk."""
        return self._file is not None

    def read_at(self, position: int, size: int) -> bytes:
        """Up to so many bytes from a position; fewer at the end alone."""
        if self.closed:
            raise ValueError("the body of a message that is over")
        if self._file is None:
            if len(self._pieces) > 1:
                self._pieces = [b"".join(self._pieces)]
            return self._pieces[0][position : position + size] if self._pieces else b""
        self._file.seek(position)
        found = bytearray()
        while len(found) < size:
            more = self._file.read(size - len(found))
            if not more:
                break
            found += more
        return bytes(found)

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """All of it, in pieces."""
        for position in range(0, self.size, size):
            yield self.read_at(position, size)

    def equals(self, other: Spool) -> bool:
        """Whether both hold the same."""
        if self.size != other.size:
            return False
        return all(mine == theirs for mine, theirs in zip(self.chunks(), other.chunks()))

    def close(self) -> None:
        """Let go of it; what is on disk is gone."""
        self.closed = True
        self._pieces = []
        if self._file is not None:
            self._file.close()

    def __del__(self) -> None:
        """Messages that nobody discards, as in tests, leave nothing open."""
        self.close()


class _Reader(io.RawIOBase):
    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._spool.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek: negative position {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._spool.read_at(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Body(io.BufferedReader):
    """The body of a message: a binary file that can be read and sought, not written.

    ``len(body)`` and ``bytes(body)`` are its size and all of it, wherever it is read.
    """

    def __init__(self, spool: Spool) -> None:
        super().__init__(_Reader(spool))
        self._spool = spool

    def __len__(self) -> int:
        return self._spool.size

    def __bool__(self) -> bool:
        return self._spool.size > 0

    def __bytes__(self) -> bytes:
        return self._spool.read_at(0, self._spool.size)

    def __repr__(self) -> str:
        return f"<Body of {self._spool.size} bytes>"


def spooled(content: Content, limit: int) -> Spool:
    """A new body, read to its end, with CRLF at the end of each line.

    Raises:
        TypeError: it is neither bytes, a binary file nor an iterable of bytes.
    """
    spool = Spool(limit)
    try:
        after_cr = False
        for piece in _pieces(content):
            if piece:
                spool.write(with_crlf(piece, after_cr))
                after_cr = piece.endswith(b"\r")
    except BaseException:
        spool.close()
        raise
    return spool


def with_crlf(data: bytes, after_cr: bool = False) -> bytes:
    """Bytes with CRLF where there is LF alone (RFC 5321, section 2.3.8)."""
    if data.count(b"\n") == data.count(b"\r\n"):
        return data
    first = data[:1] if after_cr and data.startswith(b"\n") else b""
    return first + data[len(first) :].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _pieces(content: Content) -> Iterator[bytes]:
    if isinstance(content, str):
        raise TypeError(f"mail.body: must be bytes, not str (encode it): {content[:40]!r}")
    read = getattr(content, "read", None)
    if read is not None:
        while piece := read(CHUNK):
            yield _bytes(piece)
        return
    try:
        view = memoryview(cast("Any", content))
    except TypeError:
        if not isinstance(content, Iterable):
            kind = type(content).__name__
            raise TypeError(
                f"mail.body: must be bytes, a binary file or an iterable of bytes, not {kind}"
            ) from None
        for piece in content:
            yield _bytes(piece)
    else:
        yield view.tobytes()


def _bytes(piece: object) -> bytes:
    if isinstance(piece, (bytes, bytearray, memoryview)):
        return bytes(piece)
    raise TypeError(f"mail.body: pieces must be bytes, not {type(piece).__name__}: {piece!r:.60}")
