"""The names inside of zips."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from Milter._mime.codings import to_text
from Milter._mime.limits import Budget, LimitExceeded, ZipLimit, settings
from Milter._mime.names import extensions

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"PK00PK\x03\x04", b"PK\x07\x08PK\x03\x04")
ZIP_TYPES = {
    *("application/zip", "application/x-zip", "application/x-zip-compressed"),
    *("application/zip-compressed", "multipart/x-zip"),
}
_ZIP_METHODS = {bytes((method, 0)) for method in (*range(21), *range(93, 100))}  # APPNOTE 4.4.5
_ZIP_BEGINNINGS = (b"PK\x03\x04", b"PK\x05\x06")
_LOCAL = b"PK\x03\x04"
_ENTRY = b"PK\x01\x02"


class _Header(NamedTuple):
    """Where a header of a member has what (APPNOTE 4.3.7 and 4.3.12)."""

    size: int
    method: int
    file_size: int  # unpacked
    name_size: int  # and behind it that of the extra field


_LOCAL_HEADER = _Header(size=30, method=8, file_size=22, name_size=26)
_ENTRY_HEADER = _Header(size=46, method=10, file_size=24, name_size=28)
_UNICODE_PATH = 0x7075
_HIDDEN_DIRECTORY = 0x2000  # flag bit 13: names masked by central directory encryption


def is_zip_name(name: str) -> bool:
    return any(extension == ".zip" for extension in extensions(name))


def zipnames(txt: bytes) -> list[tuple[str, str]]:
    """``("zipname", name)`` for each name inside of a zip, zips in it included.

    A name that ends in ``/`` is a directory's.

    Args:
        txt: the zip.

    Raises:
        zipfile.BadZipFile: it cannot be read, or goes past a bound.
    """
    return names_in_zip(txt, Budget())


def names_in_zip(data: bytes, budget: Budget) -> list[tuple[str, str]]:
    names: dict[str, None] = {}
    try:
        _scan_zip(data, 1, names, budget)
    except zipfile.BadZipFile:
        raise
    except LimitExceeded as exc:
        raise ZipLimit(str(exc)) from exc
    except Exception as exc:  # zipfile raises nearly anything on bad input
        raise zipfile.BadZipFile(f"zip cannot be read: {exc!r}") from exc
    return [("zipname", name) for name in names]


def _scan_zip(data: bytes, depth: int, names: dict[str, None], budget: Budget) -> None:
    if depth > settings.MAX_ZIP_DEPTH:
        raise ZipLimit(f"more than {settings.MAX_ZIP_DEPTH} zips within each other")
    if not data.startswith(ZIP_MAGIC):
        raise zipfile.BadZipFile("does not begin as a zip does")
    if data.count(_ENTRY) + len(names) > settings.MAX_ZIP_NAMES:
        raise ZipLimit(f"more than {settings.MAX_ZIP_NAMES} names")
    _check_extra(data)
    # Readers differ about which of several directories counts, and whether any: look at all.
    for mark, header in ((_LOCAL, _LOCAL_HEADER), (_ENTRY, _ENTRY_HEADER)):
        names.update(dict.fromkeys(_names_in_headers(data, mark, header, budget)))
    read: set[int] = set()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.flag_bits & _HIDDEN_DIRECTORY:
                raise ZipLimit("names are encrypted")
            found = [info.filename]
            if info.orig_filename != info.filename:
                found.append(info.orig_filename)
            for name in found:
                _count_name(len(name), budget)
            names.update(dict.fromkeys(found))
            if info.compress_type == _number(data, info.header_offset + _LOCAL_HEADER.method):
                read.add(info.header_offset)
            member = _read_member(archive, info, budget)
            if member is not None:
                _scan_zip(member, depth + 1, names, budget)
    for member in _members_without_entry(data, read, budget):
        _scan_zip(member, depth + 1, names, budget)


def _check_extra(data: bytes) -> None:
    """Raise where the directory holds more of extra fields than zipfile could read in time.

    It takes time quadratic in those of one member, and reads all members at once.
    """
    total = 0
    for found in re.finditer(_ENTRY, data):
        at = found.start() + 30
        total += int.from_bytes(data[at : at + 2], "little")
        if total > settings.MAX_ZIP_EXTRA:
            raise ZipLimit(f"more than {settings.MAX_ZIP_EXTRA} bytes of extra fields")


def _count_name(size: int, budget: Budget) -> None:
    """Account for one name in a zip; raise where it is too long, or where they are too many."""
    if size > settings.MAX_ZIP_NAME:
        raise ZipLimit(f"a name of more than {settings.MAX_ZIP_NAME} bytes")
    budget.unpack(size)


def _number(data: bytes, at: int, size: int = 2) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _names_in_headers(data: bytes, mark: bytes, header: _Header, budget: Budget) -> Iterator[str]:
    """The names in all headers of one kind: a reader may go by any of them.

    What looks like the start of a header may be any data; then its name may have any length, and
    overlap with that of the next one.
    """
    count = 0
    for found in budget.timed(re.finditer(mark, data)):
        start = found.start()
        size = _number(data, start + header.name_size)
        name_at = start + header.size
        if not size or name_at + size > len(data):
            continue
        if size > settings.MAX_ZIP_NAME and (
            data[start + header.method : start + header.method + 2] not in _ZIP_METHODS
        ):
            continue  # no header, and if it were one: nobody could unpack the file
        count += 1
        if count > settings.MAX_ZIP_NAMES:
            raise ZipLimit(f"more than {settings.MAX_ZIP_NAMES} names")
        _count_name(size, budget)
        name = to_text(data[name_at : name_at + size])
        yield name
        if name.endswith("/") and _number(data, start + header.file_size, 4):
            yield name.rstrip("/")  # no directory, for those who drop the slash
        extra_size = _number(data, start + header.name_size + 2)
        extra = data[name_at + size : name_at + size + extra_size]
        for name in _unicode_paths(extra):
            _count_name(len(name), budget)
            yield name


def _unicode_paths(extra: bytes) -> list[str]:
    """The names in the Unicode path fields of a member (APPNOTE 4.6.9)."""
    names = []
    pos = 0
    while pos + 4 <= len(extra):
        kind = _number(extra, pos)
        size = _number(extra, pos + 2)
        if kind == _UNICODE_PATH and size > 5:
            names.append(to_text(extra[pos + 9 : pos + 4 + size]))
        pos += 4 + size
    return names


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: Budget) -> bytes | None:
    """The content of a member that is a zip itself, None for any other."""
    named = is_zip_name(info.filename)
    if info.is_dir() or not (info.file_size or info.compress_size):
        return None
    if not _can_be_read(info.filename, info.flag_bits, info.compress_type):
        return None
    with archive.open(info) as member:
        head = member.read(4)
        if not named and head not in _ZIP_BEGINNINGS:
            return None
        pieces = [head]
        while pieces[-1]:
            budget.unpack(len(pieces[-1]))
            pieces.append(member.read(65536))
    return b"".join(pieces)


def _can_be_read(name: str, flags: int, method: int) -> bool:
    """Whether a member may be read; raise where it is a zip, by its name, that may not."""
    if not flags & 1 and method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return True
    if is_zip_name(name):
        if flags & 1:
            raise ZipLimit(f"encrypted zip within: {name!r}")
        # bzip2 and LZMA would let the sender choose how much memory the decoder takes
        raise ZipLimit(f"unusual compression of {name!r}")
    return False


def _members_without_entry(data: bytes, read: set[int], budget: Budget) -> Iterator[bytes]:
    """The zips among the members of which the directory that zipfile took knows nothing.

    Readers that recover files, or that take another directory, go by the local headers.  The
    names in a zip that is stored uncompressed were found with all others; a zip within it may
    be compressed.
    """
    for found in budget.timed(re.finditer(_LOCAL, data)):
        start = found.start()
        method = _number(data, start + _LOCAL_HEADER.method)
        if start in read or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            continue
        content = (
            start
            + _LOCAL_HEADER.size
            + sum(_number(data, start + _LOCAL_HEADER.name_size + more) for more in (0, 2))
        )
        if method == zipfile.ZIP_STORED:
            continue  # its headers stand in `data`, and are found here
        member = _inflated_zip(data, content, budget)
        if member is not None:
            yield member


def _inflated_zip(data: bytes, start: int, budget: Budget) -> bytes | None:
    """The deflated zip that begins at `start`, as far as it goes; None where there is none."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    pieces: list[bytes] = []
    source = memoryview(data)[start:]
    try:
        pieces.append(inflate.decompress(source[:512], 4))
        if pieces[0] not in _ZIP_BEGINNINGS:
            return None
        pending = inflate.unconsumed_tail + bytes(source[512 : 512 + 65536])
        used = 512 + 65536
        while not inflate.eof:
            pieces.append(inflate.decompress(pending, 65536))
            budget.unpack(len(pieces[-1]))
            pending = inflate.unconsumed_tail
            if not pending:
                pending = bytes(source[used : used + 65536])
                used += 65536
                if not pending and not pieces[-1]:
                    break
    except zlib.error:
        pass  # what came before may be read all the same
    return b"".join(pieces) if pieces else None
