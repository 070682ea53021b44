"""Partners for the tests of the MTA's side: a scripted filter, and one on the real libmilter."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from Milter.mta import MTA

FIELD, RECORD = "\x1f", "\x1e"
ALL_ACTIONS = "0x1ff"
WAIT = 20.0  # seconds that nothing here takes unless something is wrong

# SMFIS_* of libmilter/mfapi.h
REJECT, DISCARD, ACCEPT, TEMPFAIL, NOREPLY, SKIP = "1", "2", "3", "4", "7", "8"


def frame(command: bytes, data: bytes = b"") -> bytes:
    """A packet, built independently of the module under test."""
    return struct.pack("!L", 1 + len(data)) + command + data


def index(number: int) -> bytes:
    """As a packet has it."""
    return struct.pack("!l", number)


OK = frame(b"c")
SIMPLE = b"Subject: hello\r\n\r\nbody\r\n"


def optneg(version: int = 6, actions: int = 0x1FF, steps: int = 0, rest: bytes = b"") -> bytes:
    """A filter's answer to the negotiation."""
    return frame(b"O", struct.pack("!LLL", version, actions, steps) + rest)


class Peer:
    """The filter's end of a connection, for scripts."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT)
        self._sock = sock
        self.seen: list[tuple[bytes, bytes]] = []

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def receive(self) -> tuple[bytes, bytes]:
        """The MTA's next packet."""
        (length,) = struct.unpack("!L", self._exactly(4))
        packet = self._exactly(1), self._exactly(length - 1)
        self.seen.append(packet)
        return packet

    def command(self) -> tuple[bytes, bytes]:
        """The MTA's next packet that is answered: no macro definition, no abort."""
        packet = self.receive()
        while packet[0] in (b"D", b"A"):
            packet = self.receive()
        return packet

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def answer(self, *replies: bytes) -> None:
        """Answer one command after the other with these raw bytes."""
        for reply in replies:
            self.command()
            self.send(reply)

    def drain(self) -> None:
        """Read until the MTA has closed its end."""
        with contextlib.suppress(OSError):
            while self._sock.recv(65536):
                pass


Script = Callable[[Peer], None]


@contextlib.contextmanager
def scripted(script: Script, **options: Any) -> Iterator[tuple[MTA, Peer]]:
    """An MTA whose filter runs *script* in a thread, then closes its end.

    The time-outs of the options hold once negotiation is over: a busy machine may take longer
    for that than a test wants to wait for what never comes.
    """
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)

    def play() -> None:
        # The MTA hangs up on the script, as it should, where that breaks a rule.
        with theirs, contextlib.suppress(EOFError, OSError):
            script(peer)

    timeouts = {name: options.pop(name) for name in ("timeout", "total_timeout") if name in options}
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(play)
        try:
            with contextlib.closing(MTA(ours, timeout=WAIT, **options)) as mta:
                for name, seconds in timeouts.items():
                    setattr(mta, name, seconds)
                yield mta, peer
        finally:
            ours.close()
        done.result(WAIT)


def answers(*replies: bytes, negotiation: bytes | None = None, rest: bytes = b"") -> Script:
    """A script: negotiate, answer each command in turn, then say *rest* and listen on."""

    def script(peer: Peer) -> None:
        peer.answer(optneg() if negotiation is None else negotiation, *replies)
        if rest:
            peer.send(rest)
        peer.drain()

    return script


def records(*items: Sequence[str]) -> str:
    """Records as the C filter reads them from the environment."""
    return "".join(FIELD.join(item) + RECORD for item in items)


def build_filter(directory: Path) -> Path:
    """Compile ``mta_filter.c`` against libmilter; skips the test where that cannot be had."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    probe = directory / "probe.c"
    probe.write_text("#include <libmilter/mfapi.h>\nint main(void) { return smfi_main(); }\n")
    found = subprocess.run(
        [compiler, str(probe), "-o", str(directory / "probe"), "-lmilter", "-lpthread"],
        capture_output=True,
        timeout=WAIT * 3,
        check=False,
    )
    if found.returncode:
        pytest.skip("no libmilter to compile against")
    program = directory / "mta_filter"
    subprocess.run(
        [
            *[compiler, "-O1", "-Wall", "-Wextra", "-o", str(program)],
            *[str(Path(__file__).with_name("mta_filter.c")), "-lmilter", "-lpthread"],
        ],
        timeout=WAIT * 3,
        check=True,
    )
    return program


class LibmilterFilter:
    """A running process of ``mta_filter.c``."""

    def __init__(self, program: Path, directory: Path, settings: Mapping[str, str]) -> None:
        self.address = settings.get("F_SOCKET") or f"unix:{directory / 'filter.sock'}"
        self._log = directory / "filter.log"
        environment = {**os.environ, "F_AFLAGS": ALL_ACTIONS, **settings}
        environment.update(F_SOCKET=self.address, F_LOG=str(self._log))
        self._process = subprocess.Popen([str(program)], env=environment)

    def stop(self) -> None:
        # libmilter takes seconds to stop by itself, and has nothing to lose here.
        self._process.kill()
        self._process.wait(WAIT)

    def lines(self) -> list[list[str]]:
        """The callbacks so far: name and arguments, these still in hexadecimal."""
        return [line.split() for line in self._log.read_text().splitlines()]

    def calls(self, *names: str) -> list[list[bytes]]:
        """The arguments of the callbacks called *names*, in order."""
        return [
            [b"" if item == "-" else bytes.fromhex(item) for item in line[1:]]
            for line in self.lines()
            if line[0] in names
        ]

    def names(self) -> list[str]:
        """The callbacks so far, by name."""
        return [line[0] for line in self.lines()]
