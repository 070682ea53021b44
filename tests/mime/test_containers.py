"""Names that the content of a part tells: uuencode, yEnc, BinHex, MacBinary, AppleSingle."""

from __future__ import annotations

import base64
import binascii
import struct

import pytest
from support.mail import part, read, removed
from support.timing import cpu_time_below

DATA = binascii.b2a_uu(b"MZ\x90" + b"\0" * 42)
LETTERS = b"!\"#$%&'()*+,-012345689@ABCDEFGHIJKLMNPQRSTUVXYZ[`abcdefhijklmpqr"


def text(body: bytes) -> bytes:
    return part("Content-Type: text/plain", body)


def binhex(name: bytes, data: bytes = b"MZ", size: int = 0) -> bytes:
    """A file in BinHex 4.0 (RFC 1741), without its check sums, which nobody checks."""
    packed = bytes([size or len(name)]) + name + b"\0APPLmdos"
    packed += struct.pack(">HLLH", 0, len(data), 0, 0) + data + bytes(4)
    if not size:  # else it is packed already
        packed = packed.replace(b"\x90", b"\x90\0")
    bits = "".join(f"{byte:08b}" for byte in packed)
    bits += "0" * (-len(bits) % 6)
    letters = bytes(LETTERS[int(bits[at : at + 6], 2)] for at in range(0, len(bits), 6))
    lines = [letters[at : at + 64] for at in range(0, len(letters), 64)]
    begin = b"(This file must be converted with BinHex 4.0)\n\n:"
    return begin + b"\n".join(lines) + b":\n"


def mac_binary(name: bytes) -> bytes:
    head = bytearray(128)
    head[1 : 2 + len(name)] = bytes([len(name)]) + name
    head[65:73] = b"APPLmdos"
    return bytes(head) + b"MZ"


def apple_file(name: bytes, magic: int = 0x00051600) -> bytes:
    entries = [(9, 62, 32), (3, 94, len(name))]
    head = struct.pack(">LL16xH", magic, 0x00020000, len(entries))
    table = b"".join(struct.pack(">LLL", *entry) for entry in entries)
    return (head + table).ljust(62, b"\0") + bytes(32) + name


@pytest.mark.parametrize(
    "line",
    [
        *(b"begin 7 ", b"begin 0000644 ", b"begin 644 ", b"begin\t644\t", b"begin 644  \t"),
        *(b"begin 00000000000000100644 ", b"begin  0644   ", b"begin  ", b"begin 7  "),
    ],
)
def test_first_lines_of_uuencode(line):
    for body in (line + b"setup.exe\n" + DATA, b"Hello\r" + line + b"setup.exe\r" + DATA):
        assert removed(text(body))
        assert removed(text(body.replace(b"\n", b"\r\n")))
    assert not removed(text(line + b"setup.txt\n" + DATA))


@pytest.mark.parametrize(
    "body",
    [
        b"begin 7 days before www.example.com\nDear all,\n",
        b"begin  www.example.com\n-----\n",
        b"begin  www.example.com\nSEE ABOVE\n",
        b"begin www.example.com\n" + DATA,
        b"begin 9 www.example.com\n" + DATA,
        b"begin 644 www.example.com is down\n" + DATA,
        b"beginning 644 www.example.com\n" + DATA,
        b"=ybegin line=128 size=2\nname=setup.exe\n",
        b"=ybegin line=128 size=2 name=setup.txt\nw\x84\n",
        b"a =ybegin line=128 size=2 name=setup.exe\n",
        b"BinHex 4.0 is old, see www.example.com\n:or not\n",
        b"(This file must be converted with BinHex 4.0)\nand is not here\n",
        binhex(b"letter.txt"),
    ],
)
def test_innocent_text(body):
    assert not removed(text(body))


@pytest.mark.parametrize(
    "line",
    [
        b"=ybegin line=128 size=2 name=setup.scr\n",
        b"=ybegin part=1 line=128 size=2 name=my setup.scr\n=ypart begin=1 end=2\n",
        b"=ybegin part=1 total=2 line=128 size=2 name=setup.scr  \n",
        b"=ybegin name=setup.scr\n",
    ],
)
def test_yenc(line):
    body = b"Hello\n" + line + b"w\x84\n=yend size=2\n"
    assert removed(text(body))
    assert removed(text(body.replace(b"\n", b"\r\n")))
    coded = base64.encodebytes(body)
    assert removed(part("Content-Type: text/plain\nContent-Transfer-Encoding: base64", coded))


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Type: text/plain",
        "Content-Type: application/octet-stream\nContent-Transfer-Encoding: mac-binhex40",
        "Content-Type: application/octet-stream\nContent-Transfer-Encoding: x-mac-binhex40",
        "Content-Type: application/mac-binhex40",
        "Content-Type: application/mac-binhex40; name=letter.hqx",
    ],
)
def test_binhex(headers):
    assert removed(part(headers, binhex(b"setup.exe")))
    assert removed(part(headers, binhex(b"setup.exe").replace(b"\n", b"\r\n")))
    assert removed(part(headers, b"A file\n" + binhex(b"a" * 59 + b".exe")))
    assert not removed(part(headers, binhex(b"letter.doc")))
    assert ("binhexname", "letter.doc") in read(part(headers, binhex(b"letter.doc"))).getnames()


def test_binhex_repeats():
    packed = binhex(b"a\x90\x0a.exe", size=14)  # ten times the same letter
    assert ("binhexname", "aaaaaaaaaa.exe") in read(text(packed)).getnames()
    assert removed(text(packed))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("application/x-macbinary", mac_binary),
        ("application/macbinary", mac_binary),
        ("application/octet-stream", mac_binary),
        ("application/applefile", apple_file),
        ("application/octet-stream", apple_file),
        ("application/applefile", lambda name: apple_file(name, 0x00051607)),
    ],
)
def test_macintosh_files(kind, make):
    def coded(name):
        body = base64.encodebytes(make(name))
        return part(f"Content-Type: {kind}\nContent-Transfer-Encoding: base64", body)

    assert removed(coded(b"setup.exe"))
    assert not removed(coded(b"letter.doc"))
    assert [name for _, name in read(coded(b"letter.doc")).getnames()] == ["letter.doc"]


@pytest.mark.parametrize(
    "data",
    [
        bytes(200),
        bytes([0, 5]) + b"a\0\0\0\0" + bytes(150),
        bytes([0, 70]) + b"x.exe" * 40,
        mac_binary(b"a.exe")[:100],
        mac_binary(b"a.exe")[:74] + b"\1" + mac_binary(b"a.exe")[75:],
        apple_file(b"a.exe")[:40],
        b"\0\5\x16\0" + b"\xff" * 60,
        b"\0\5\x16\7" + bytes(22),
    ],
)
def test_data_that_only_resembles_them(data):
    body = base64.encodebytes(data)
    raw = part("Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64", body)
    assert not removed(raw)


def test_names_are_found_in_linear_time():
    for piece in (b"\nbegin 7 ", b"\nbegin  x", b"\n=ybegin ", b"BinHex", b"BinHex\n:!!!!"):
        msg = read(text(piece * (500_000 // len(piece))))
        with cpu_time_below(20, piece):
            msg.getnames()
