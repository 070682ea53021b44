"""What the cases share: a filter in a process of its own, and packets to it."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from Milter.mta import MTA

FILTER = """
import sys, milter
{body}
milter.register("case", negotiate=negotiate)
milter.setconn(sys.argv[1])
milter.main()
"""
WAIT = 20.0


class Case:
    """A filter and a connection to it, negotiated, with no wait for answers."""

    def __init__(self, mta: MTA, process: subprocess.Popen[bytes], socket: str) -> None:
        self.mta = mta
        self.process = process
        self.socket = socket

    def send(self, command: bytes, data: bytes = b"") -> None:
        self.mta.send_packet(command, data)

    def answers(self, until: float = 2.0) -> list[bytes]:
        """The answers that come until none has come for so many seconds."""
        found = []
        self.mta.timeout = until
        with contextlib.suppress(Exception):
            while True:
                found.append(self.mta.read_packet().command)
        return found


@contextlib.contextmanager
def case(body: str, **environment: str) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="case-") as directory:
        name = f"unix:{Path(directory, 'socket')}"
        process = subprocess.Popen(
            [sys.executable, "-c", FILTER.format(body=body), name],
            env={**os.environ, **environment},
        )
        try:
            with MTA.connect(name, wait_for=WAIT, timeout=WAIT) as mta:
                yield Case(mta, process, name)
        finally:
            process.kill()
            process.wait()


CONNECT = b"client.example\x004" + struct.pack("!H", 25) + b"192.0.2.7\0"
