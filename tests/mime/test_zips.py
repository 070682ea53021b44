"""Zips in which readers find different members."""

from __future__ import annotations

import struct
import zipfile
import zlib

import pytest
from support.mail import attached, removed, zipped
from support.timing import cpu_time_below

import mime


def local(name: bytes, data: bytes, method: int = 0, flags: int = 0) -> bytes:
    """A member with its local header (APPNOTE 4.3.7)."""
    packed = data
    if method == 8:
        deflate = zlib.compressobj(wbits=-15)
        packed = deflate.compress(data) + deflate.flush()
    sizes = (0, 0, 0) if flags & 8 else (zlib.crc32(data), len(packed), len(data))
    head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0, *sizes, len(name), 0)
    return head + name + packed


def entry(name: bytes, data: bytes, at: int, method: int = 0, extra: bytes = b"") -> bytes:
    """An entry of the directory (APPNOTE 4.3.12)."""
    size = len(data)
    packed = size
    if method == 8:
        deflate = zlib.compressobj(wbits=-15)
        packed = len(deflate.compress(data) + deflate.flush())
    head = struct.pack(
        *("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, method, 0, 0, zlib.crc32(data), packed, size),
        *(len(name), len(extra), 0, 0, 0, 0, at),
    )
    return head + name + extra


def end(count: int, size: int, at: int) -> bytes:
    """The end of a directory (APPNOTE 4.3.16)."""
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, at, 0)


def archive(members: list[bytes], *directories: list[bytes]) -> bytes:
    """A zip of these members, with one directory after the other."""
    data = b"".join(members)
    for entries in directories:
        data += b"".join(entries) + end(len(entries), sum(map(len, entries)), len(data))
    return data


def is_bad(data: bytes) -> bool:
    return removed(attached(data), scan_zip=True)


GOOD_MEMBER = local(b"a.txt", b"text")
GOOD_ENTRY = entry(b"a.txt", b"text", 0)
BAD_ENTRY = entry(b"a.exe", b"text", 0)


def test_a_zip_made_by_hand_is_one():
    assert not is_bad(archive([GOOD_MEMBER], [GOOD_ENTRY]))
    assert mime.zipnames(archive([GOOD_MEMBER], [GOOD_ENTRY])) == [("zipname", "a.txt")]


@pytest.mark.parametrize("directories", [([BAD_ENTRY], [GOOD_ENTRY]), ([GOOD_ENTRY], [BAD_ENTRY])])
def test_names_in_either_of_two_directories_count(directories):
    assert is_bad(archive([GOOD_MEMBER], *directories))


def test_an_entry_that_no_directory_counts():
    data = GOOD_MEMBER + BAD_ENTRY + GOOD_ENTRY
    assert is_bad(data + end(1, len(GOOD_ENTRY), len(GOOD_MEMBER) + len(BAD_ENTRY)))


def test_a_zip64_record_that_disagrees():
    data = GOOD_MEMBER + BAD_ENTRY + GOOD_ENTRY
    at = len(GOOD_MEMBER)
    record = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(GOOD_ENTRY), at + len(BAD_ENTRY)
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data), 1)
    assert is_bad(data + record + locator + end(1, len(BAD_ENTRY), at))


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("flags", [0, 8])
def test_a_zip_that_only_a_local_header_tells_is_looked_into(method, flags):
    inner = zipped("deep.exe", compression=8)
    hidden = local(b"b.zip", inner, method, flags)
    assert is_bad(archive([GOOD_MEMBER, hidden], [GOOD_ENTRY]))
    outer = zipped(("c.zip", archive([GOOD_MEMBER, hidden], [GOOD_ENTRY])), compression=8)
    assert is_bad(outer)
    good = local(b"b.zip", zipped("deep.txt", compression=8), method, flags)
    assert not is_bad(archive([GOOD_MEMBER, good], [GOOD_ENTRY]))


def test_a_member_is_read_as_its_local_header_has_it_too():
    inner = zipped("deep.exe", compression=8)
    member = local(b"b.bin", inner, method=8)
    shown = entry(b"b.bin", member[35:], 0, method=0)
    assert is_bad(archive([member], [shown]))


def test_a_member_without_a_name_is_looked_into():
    hidden = local(b"", zipped("deep.exe", compression=8), 8)
    assert is_bad(archive([GOOD_MEMBER, hidden], [GOOD_ENTRY]))


@pytest.mark.parametrize("at", [20, 100])
def test_a_hidden_zip_that_breaks_off_is_bad(at):
    inner = zipped(*(f"{n}.txt" for n in range(50)), compression=8)
    hidden = local(b"b.zip", inner, 8)
    assert is_bad(archive([GOOD_MEMBER, hidden[: len(hidden) - at]], [GOOD_ENTRY]))


def test_unicode_paths_in_every_header():
    path = b"\1" + struct.pack("<L", zlib.crc32(b"a.txt")) + b"a.exe"
    extra = struct.pack("<2H", 0x7075, len(path)) + path
    with_path = entry(b"a.txt", b"text", 0, extra=extra)
    assert is_bad(archive([GOOD_MEMBER], [with_path]))
    assert is_bad(archive([GOOD_MEMBER], [with_path], [GOOD_ENTRY]))
    member = bytearray(local(b"a.txt" + extra, b"text"))
    member[26:30] = struct.pack("<2H", 5, len(extra))
    assert is_bad(archive([bytes(member)], [GOOD_ENTRY]))


def test_directories_are_no_programs():
    assert not is_bad(zipped(("www.example.com/", b""), ("www.example.com/index.txt", b"x")))
    assert is_bad(zipped(("www.example.com/", b""), ("www.example.com/index.exe", b"x")))
    names = mime.zipnames(zipped(("www.example.com/", b"")))
    assert names == [("zipname", "www.example.com/")]


def test_a_directory_with_content_is_a_program():
    name, data = b"setup.exe/", b"MZ"
    assert is_bad(archive([local(name, data)], [entry(name, data, 0)]))
    assert is_bad(archive([local(name, data), GOOD_MEMBER], [entry(b"a.txt", b"text", 42)]))


def test_many_copies_of_a_name_are_one():
    inner = zipped(*(f"{n}.txt" for n in range(3_000)))
    outer = zipped(*(f"{n}.txt" for n in range(3_900)), ("b.zip", inner), compression=8)
    assert not is_bad(outer)


def test_hidden_members_are_bounded(monkeypatch):
    hidden = local(b"b.zip", zipped(("a.txt", bytes(10_000_000))), 8)
    data = archive([GOOD_MEMBER, *[hidden] * 20], [GOOD_ENTRY])
    monkeypatch.setattr(mime, "MAX_UNPACKED", 25_000_000)
    with pytest.raises(mime.LimitExceeded, match="unpacks to more than"):
        mime.zipnames(data)


def test_headers_without_end_take_linear_time():
    for piece in (b"PK\3\4", b"PK\1\2", local(b"", b"")[:30], local(b"", b"", 8)[:30]):
        data = GOOD_MEMBER + piece * (1_000_000 // len(piece))
        with cpu_time_below(20, piece), pytest.raises(zipfile.BadZipFile):
            mime.zipnames(data)
