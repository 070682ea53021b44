"""Recorded sessions as text, and packets in words."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from support.mta import frame

from Milter.mta import Recording, Side
from Milter.mta.recording import Entry, Splitter
from Milter.mta.visible import escape, shortened, unescape
from Milter.mta.words import NAMES, describe

# --- bytes as text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain text", "plain text"),
        (b"a\0b\r\n\t\\", r"a\0b\r\n\t\\"),
        ("grün".encode(), "grün"),
        (b"\xff\x1b[2J", r"\xff\x1b[2J"),
        ("\u202e\u00a0".encode(), r"\xe2\x80\xae\xc2\xa0"),
        (b"end ", r"end\x20"),
        (b"", ""),
    ],
)
def test_what_cannot_be_printed_is_escaped(data: bytes, text: str) -> None:
    assert escape(data) == text
    assert unescape(text) == data


def test_any_bytes_come_back() -> None:
    source = random.Random(19)
    for size in (1, 2, 3, 50, 1000):
        for _ in range(50):
            data = source.randbytes(size)
            text = escape(data)
            assert text.isprintable()
            assert unescape(text) == data


@pytest.mark.parametrize("text", ["\\", "\\q", "\\x4", "\\xGG", "a\\"])
def test_what_is_no_escape(text: str) -> None:
    with pytest.raises(ValueError, match="is none of"):
        unescape(text)


def test_long_data_are_shortened() -> None:
    assert shortened(b"abc\n") == '"abc\\n"'
    assert shortened(b"a" * 100, 5) == '"aaaaa"… (100 bytes)'
    assert shortened("üüü".encode(), 3) == '"ü"… (6 bytes)'


# --- packets in words ----------------------------------------------------------------------------


def numbers(*values: int) -> bytes:
    return struct.pack(f"!{len(values)}I", *values)


@pytest.mark.parametrize(
    ("command", "data", "words"),
    [
        (b"O", numbers(6, 1, 2), "negotiation: version 6, actions ADDHDRS, steps NOHELO"),
        (b"D", b"Ci\0Q1\0{a}\0b c\0", "macros for connect: i=Q1, {a}=b c"),
        (b"D", b"M", "macros for MAIL: none"),
        (b"C", b"mx\x004\0\x19192.0.2.7\0", "connect: mx, INET 192.0.2.7, port 25"),
        (b"C", b"mx\0U", "connect: mx, address unknown"),
        (b"H", b"mx\0", "HELO: mx"),
        (b"M", b"<a@x>\0SIZE=9\0", "MAIL: <a@x> SIZE=9"),
        (b"R", b'<"b c"@x>\0', 'RCPT: <"b c"@x>'),
        (b"T", b"", "DATA"),
        (b"L", b"Subject\0one\n\ttwo\0", r"header: Subject: one\n\ttwo"),
        (b"N", b"", "end of headers"),
        (b"B", b"line\r\n", r'body: "line\r\n"'),
        (b"B", b"a" * 1000, f'body: "{"a" * 72}"… (1000 bytes)'),
        (b"E", b"", "end of message"),
        (b"U", b"FOO\x1b\0", r"unknown command: FOO\x1b"),
        (b"A", b"", "abort"),
        (b"Q", b"", "quit"),
        (b"K", b"", "quit, new connection follows"),
        # what has not the form that is due
        (b"O", b"\0\0", r'negotiation, malformed: "\0\0"'),
        (b"C", b"mx\0Z", r'connect, malformed: "mx\0Z"'),
        (b"C", b"mx\x004\0", r'connect, malformed: "mx\04\0"'),
        (b"D", b"Zi\0Q\0", r'macros, malformed: "Zi\0Q\0"'),
        (b"D", b"Ci\0", r'macros, malformed: "Ci\0"'),
        (b"L", b"Subject\0", r'header, malformed: "Subject\0"'),
        (b"M", b"<a@x>", 'MAIL, malformed: "<a@x>"'),
        (b"Q", b"x", 'quit, malformed: "x"'),
        (b"z", b"\x01", r"""unknown packet b'z' "\x01\"""".replace('\\"', '"')),
    ],
)
def test_what_an_mta_says(command: bytes, data: bytes, words: str) -> None:
    assert describe(Side.MTA, command, data) == words


@pytest.mark.parametrize(
    ("command", "data", "words"),
    [
        (
            b"O",
            numbers(6, 0, 0) + numbers(2) + b"i j\0",
            "negotiation: version 6, actions none, steps all, macros for MAIL: i j",
        ),
        (b"c", b"", "continue"),
        (b"f", b"", "connection failure"),
        (b"y", b"550 5.7.1 100%% no\0", "reply: 550 5.7.1 100% no"),
        (b"h", b"X-A\0 b\0", "add header: X-A: b"),
        (b"i", numbers(0) + b"X-A\0b\0", "insert header: at 0, X-A: b"),
        (b"m", numbers(1) + b"X-A\0b\0", "change header: number 1, X-A: b"),
        (b"m", numbers(2) + b"X-A\0\0", "change header: number 2, X-A is deleted"),
        (b"+", b"<a@x>\0", "add recipient: <a@x>"),
        (b"2", b"<a@x>\0NOTIFY=NEVER\0", "add recipient: <a@x> NOTIFY=NEVER"),
        (b"e", b"<a@x>\0", "change sender to: <a@x>"),
        (b"b", b"new", 'replace body: "new"'),
        (b"q", b"odd\0", "quarantine: odd"),
        (b"i", b"\0", r'insert header, malformed: "\0"'),
        (b"O", numbers(6, 0, 0) + numbers(99) + b"i\0", "negotiation, malformed: "),
        (b"c", b"x", 'continue, malformed: "x"'),
    ],
)
def test_what_a_filter_says(command: bytes, data: bytes, words: str) -> None:
    assert describe(Side.FILTER, command, data).startswith(words)
    if not words.endswith(": "):
        assert describe(Side.FILTER, command, data) == words


def test_no_packet_is_too_odd_for_words() -> None:
    source = random.Random(7)
    for side, names in NAMES.items():
        for command in names:
            for size in range(40):
                words = describe(side, command, source.randbytes(size))
                assert words.isprintable()


# --- bytes to packets ----------------------------------------------------------------------------


def test_packets_may_come_in_any_pieces() -> None:
    data = frame(b"H", b"mx\0") + frame(b"N") + frame(b"B", b"x" * 1000)
    for size in (1, 2, 5, 7, len(data)):
        splitter = Splitter()
        found = [
            packet
            for start in range(0, len(data), size)
            for packet in splitter.feed(data[start : start + size])
        ]
        assert found == [(b"H", b"mx\0"), (b"N", b""), (b"B", b"x" * 1000)]
        assert splitter.rest() == b""


@pytest.mark.parametrize("head", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_what_can_be_no_packet_is_kept(head: bytes) -> None:
    splitter = Splitter()
    assert list(splitter.feed(frame(b"N") + head + b"more")) == [
        (b"N", b""),
        (None, head + b"more"),
    ]
    assert list(splitter.feed(frame(b"N"))) == [(None, frame(b"N"))]


def test_a_packet_that_is_never_whole_is_kept() -> None:
    splitter = Splitter()
    assert list(splitter.feed(frame(b"H", b"mx\0")[:-1])) == []
    assert splitter.rest() == frame(b"H", b"mx\0")[:-1]


# --- files ---------------------------------------------------------------------------------------

HEAD = "milter-recording 1\n"


def parse(text: str) -> Recording:
    return Recording.parse((HEAD + text).encode())


def test_a_session_is_read() -> None:
    recording = parse(
        "# a comment\n"
        "\n"
        "mta 0.000100 header Subject\\0hello\\0\n"
        "mta 0.000200 body one\\r\\n\n"
        "+ two \\\\\\r\\n\n"
        "+\n"
        "#   in between\n"
        "+ grün\n"
        "filter 0.5 continue\n"
        "filter 1.000000 0x7a \\x01\n"
        "filter 1.100000 closes\n"
        "mta 1.200000 raw \\0\\0\n"
        "mta 1.300000 resets\n"
    )
    assert [entry.wire for entry in recording.entries] == [
        frame(b"L", b"Subject\0hello\0"),
        frame(b"B", b"one\r\ntwo \\\r\n" + "grün".encode()),
        frame(b"c"),
        frame(b"z", b"\x01"),
        b"",
        b"\0\0",
        b"",
    ]
    assert [entry.is_end for entry in recording.entries] == [False] * 4 + [True, False, True]
    assert recording.entries[2] == Entry(Side.FILTER, 0.5, "continue", b"", 10)
    assert not recording.is_cut
    assert parse("mta 0.1 quit\ncut 0.2\n").is_cut


def test_what_mail_programs_do_to_a_file_does_not_matter() -> None:
    text = HEAD + "mta 0.1 header A\\0b\\x20\\0\nfilter 0.2 continue\n"
    plain = Recording.parse(text.encode())
    assert Recording.parse(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()) == plain


def test_any_packet_comes_back() -> None:
    source = random.Random(5)
    entries = [
        Entry.packet(side, 0.25, command, source.randbytes(source.choice((0, 1, 7, 500))))
        for side in Side
        for command in [*(bytes([number]) for number in range(256)), None]
    ]
    body = "".join("zeile äöü\r\n" * 50).encode() + b"x" * 1000 + "ü".encode() * 200
    entries.append(Entry.packet(Side.MTA, 1.0, b"B", body))
    text = "".join(entry.as_text() for entry in entries)
    assert max(len(line) for line in text.split("\n") if not line.startswith("#")) < 600
    found = parse(text).entries
    assert [(one.side, one.wire) for one in found] == [(one.side, one.wire) for one in entries]


def test_a_body_reads_as_it_was() -> None:
    entry = Entry.packet(Side.MTA, 0.5, b"B", "one\r\nzwei ü\r\n\r\nend".encode())
    assert entry.as_text() == "mta 0.500000 body one\\r\\n\n+ zwei ü\\r\\n\n+ \\r\\n\n+ end\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: no recording, which begins with 'milter-recording 1'"),
        ("From: a\n", "line 1: no recording, which begins with 'milter-recording 1'"),
        ("milter-recording 2\n", "line 1: version '2' of the form, this reads 1 alone"),
        ("milter-recording\n", "line 1: version '' of the form, this reads 1 alone"),
        ("milter-recording 1", "line 1: no line end, the file is incomplete"),
        (HEAD + "mta 0.1 qu", "line 2: no line end, the file is incomplete"),
        (HEAD + "mta 0.1 data\n>quoted\n", "line 3: '>quoted' is none of"),
        (HEAD + "mta soon data\n", "line 2: 'mta soon data' is none of"),
        (HEAD + "mta -1.0 data\n", "line 2: 'mta -1.0 data' is none of"),
        (HEAD + "mta 0.1\n", "line 2: 'mta' without a name"),
        (HEAD + "mta 0.1 continue\n", "line 2: the mta has no packet 'continue'"),
        (HEAD + "filter 0.1 eom\n", "line 2: the filter has no packet 'eom'"),
        (HEAD + "mta 0.1 header A\\q\n", "line 2: the escape '\\\\q' is none of"),
        (HEAD + "+ more\n", "line 2: there is no packet before whose data this could be"),
        (HEAD + "mta 0.1 closes\n+ a\n", "line 3: there is no packet before whose data this"),
        (HEAD + "mta 0.1 closes now\n", "line 2: 'closes' has no data"),
        (HEAD + "mta 0.1 closes\nmta 0.2 quit\n", "line 3: the mta has closed the connection"),
        (HEAD + "cut 0.1 here\n", "line 2: 'cut' has a time alone"),
        (HEAD + "cut 0.1\nmta 0.2 quit\n", "line 3: nothing may follow after 'cut'"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "case.milter"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        Recording.load(path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_recording_that_is_no_text() -> None:
    with pytest.raises(ValueError) as caught:
        Recording.parse(HEAD.encode() + b"mta 0.1 header a\xff\n")
    assert str(caught.value) == "line 2: not UTF-8, byte 0xff"
