"""Garbage on the wire: it may end its own connection, and harms no other."""

from __future__ import annotations

import itertools
import random
import socket
import struct
from typing import Any, Callable

import pytest
from support.process import WAIT
from support.wire import session

from Milter.mta import AddHeader, Verdict, parse_socket

COMMANDS = b"OCHMRTLNBEUAQKD"
MESSAGE = b"Subject: hello\r\n\r\ntext\r\n"


def packet(command: bytes, data: bytes = b"") -> bytes:
    if command == b"D" and (data[1:].count(b"\0") % 2 or not data.endswith(b"\0")):
        # A name without value in a list of macros: smfi_getsymval() itself then reads past the
        # end of its list, and the module has no way to see it coming.
        data = b"C"
    return struct.pack("!I", 1 + len(data)) + command + data


NEGOTIATION = packet(b"O", struct.pack("!III", 6, 0x1FF, 0x1FFFFF))
DIALOGUE = [
    NEGOTIATION,
    packet(b"D", b"Cj\0mx\0{daemon_name}\0d\0"),
    packet(b"C", b"client.example\0004" + struct.pack("!H", 25) + b"192.0.2.7\0"),
    packet(b"H", b"helo.example\0"),
    packet(b"U", b"XBOGUS\0"),
    packet(b"D", b"Mi\x004XyZ\0"),
    packet(b"M", b"<a@b>\0SIZE=1\0"),
    packet(b"R", b"<c@d>\0NOTIFY=NEVER\0"),
    packet(b"T"),
    packet(b"L", b"Subject\0hello\0"),
    packet(b"N"),
    packet(b"B", b"text\r\n"),
    packet(b"E"),
    packet(b"Q"),
]


@pytest.fixture(scope="module")
def curious(run_shared_filter: Callable[..., Any]) -> Any:
    running = run_shared_filter("reads_everything")
    running.mta().close()  # it listens
    return running


def throw(running: Any, data: bytes) -> bytes:
    """Send *data* and end the connection; returns what came back."""
    address = parse_socket(running.socket)
    received = b""
    with socket.socket(address.family) as sock:
        sock.settimeout(WAIT)
        sock.connect(address.address)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(65536):
                received += more
        except (BrokenPipeError, ConnectionResetError):
            pass
    return received


def still_serves(running: Any) -> None:
    with running.mta() as mta:
        result = mta.send(MESSAGE, recipients=["bob@example.org"])
    assert result.verdict is Verdict.CONTINUE
    assert result.modifications == (AddHeader(b"X-Seen", b"yes"),)
    assert running.process.poll() is None
    assert "Traceback" not in running.output


def test_the_dialogue_itself_is_honest(curious: Any) -> None:
    received = throw(curious, b"".join(DIALOGUE))
    assert received.endswith(packet(b"h", b"X-Seen\0yes\0") + packet(b"c"))
    still_serves(curious)


def test_bytes_that_are_no_packets(curious: Any) -> None:
    rng = random.Random(1)
    for size in (0, 1, 2, 3, 4, 5, 8, 100, 10_000):
        for _ in range(10):
            throw(curious, rng.randbytes(size))
    for text in (b"GET / HTTP/1.0\r\n\r\n", b"EHLO me\r\n", b"\0" * 1000, b"\xff" * 1000):
        throw(curious, text)
    still_serves(curious)


@pytest.mark.parametrize("length", [0, 1, 65536, 65537, 2**20, 2**31 - 1, 2**31, 2**32 - 1])
def test_lengths_that_lie(curious: Any, length: int) -> None:
    lie = struct.pack("!I", length)
    for command in COMMANDS:
        throw(curious, lie + bytes([command]))
        throw(curious, NEGOTIATION + lie + bytes([command]) + b"x" * 1000)
    still_serves(curious)


def test_random_packets_after_negotiation(curious: Any) -> None:
    rng = random.Random(2)
    for _ in range(300):
        packets = [NEGOTIATION]
        for _ in range(rng.randrange(1, 8)):
            data = rng.choice((b"", b"\0", b"a\0b\0", b"<a@b>\0", rng.randbytes(rng.randrange(40))))
            packets.append(packet(bytes([rng.choice(COMMANDS)]), data))
        throw(curious, b"".join(packets))
    still_serves(curious)


@pytest.mark.parametrize("command", [bytes([each]) for each in COMMANDS])
@pytest.mark.parametrize("prefix", [2, 3, 4, 7, 9, 11, 12])
def test_each_command_without_its_data_or_with_odd_ones(
    curious: Any, command: bytes, prefix: int
) -> None:
    before = b"".join(DIALOGUE[:prefix])
    for data in (
        b"",
        b"\0",
        b"\0\0\0",
        b"a",
        b"a\0",
        b"a\0b",
        b"\xff" * 50,
        b"C",
        b"Ca",
        b"Ca\0\0",
    ):
        throw(curious, before + packet(command, data) + packet(b"Q"))
    still_serves(curious)


def damaged(rng: random.Random) -> bytes:
    """The dialogue with one thing wrong."""
    packets = list(DIALOGUE)
    where = rng.randrange(len(packets))
    command, data = packets[where][4:5], bytearray(packets[where][5:])
    kind = rng.randrange(6)
    if kind == 0 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == 2:
        data += rng.randbytes(rng.randrange(1, 30))
    elif kind == 3:
        command = bytes([rng.randrange(256)])
    elif kind == 4:
        packets.insert(where, packets.pop(rng.randrange(len(packets))))
        return b"".join(packets)
    else:
        data = data.replace(b"\0", b"x")
    packets[where] = packet(command, bytes(data))
    return b"".join(packets)


def test_a_dialogue_with_one_thing_wrong(curious: Any) -> None:
    rng = random.Random(3)
    for _ in range(400):
        throw(curious, damaged(rng))
    still_serves(curious)


def test_commands_out_of_order(curious: Any) -> None:
    rng = random.Random(4)
    for _ in range(150):
        order = rng.sample(DIALOGUE, len(DIALOGUE))
        throw(curious, NEGOTIATION + b"".join(order))
    still_serves(curious)


def test_a_dialogue_that_ends_at_any_byte(curious: Any) -> None:
    whole = b"".join(DIALOGUE)
    for end in range(len(whole)):
        throw(curious, whole[:end])
    still_serves(curious)


def test_a_dialogue_in_pieces_of_one_byte(curious: Any) -> None:
    address = parse_socket(curious.socket)
    with socket.socket(address.family) as sock:
        sock.settimeout(WAIT)
        sock.connect(address.address)
        for byte in itertools.chain.from_iterable(DIALOGUE):
            sock.sendall(bytes([byte]))
        received = b""
        while more := sock.recv(65536):
            received += more
    assert received == throw(curious, b"".join(DIALOGUE))


def test_garbage_beside_an_honest_session(curious: Any) -> None:
    rng = random.Random(5)
    with curious.mta() as mta:
        mta.connect_info()
        for step in (
            lambda: mta.helo("h"),
            lambda: mta.mail("<a@b>"),
            lambda: mta.rcpt("<c@d>"),
            mta.data,
            lambda: mta.header("Subject", "hello"),
            mta.eoh,
            lambda: mta.body(b"text\r\n"),
            mta.eom,
        ):
            for _ in range(5):
                throw(curious, damaged(rng))
            assert step().verdict is Verdict.CONTINUE


# glibc then fills what it allocates: no stray NUL ends a text that has none.
FILLED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=90"}


@pytest.mark.engine("native")
def test_an_unknown_command_without_its_end_ends_the_connection(
    run_filter: Callable[..., Any],
) -> None:
    running = run_filter("scripted")
    with running.mta() as mta:
        mta.connect_info("client.example")
        mta.send_packet(b"U", b"xxxx")
        mta.expect_close()
        mta.close()
    with running.mta() as mta:
        assert mta.helo("client.example").verdict is Verdict.CONTINUE


@pytest.mark.engine("libmilter")
@pytest.mark.parametrize("size", [24, 40, 56, 120, 1032, 4104])
def test_an_unknown_command_without_its_end(run_filter: Callable[..., Any], size: int) -> None:
    """libmilter passes it on as it is; the module ends it where the allocation ends."""
    running = run_filter("scripted", env=FILLED)
    with session(running, unknown="say(args[0])") as each:
        each.connect()
        for _ in range(5):
            each.mta.send_packet(b"U", b"x" * size)
            assert each.mta.read_packet().command == b"c"
    for (command,) in each.said():
        assert command.startswith("x" * size)
        # These sizes fill an allocation, or one that is larger by what cannot be split off.
        assert len(command) in (size, size + 16)
