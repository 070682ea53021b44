"""What the cases share: a filter in a process of its own, and packets to it, on each engine."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from Milter.mta import MTA, FilterClosed, FilterTimeout

FILTER = """
import sys, milter
{body}
milter.register("case", negotiate=negotiate)
milter.setconn(sys.argv[1])
milter.main()
"""
WAIT = 20.0
ENGINES = ("libmilter", "native")


def judge(look: Callable[[], tuple[bool, str]]) -> int:
    """Look for a fault on the engines that the command line names, by default on both.

    Args:
        look: whether the fault is there on the engine of PYMILTER_ENGINE, and what was seen.

    Returns:
        The exit status: 1 where our own engine has the fault, or where libmilter was looked at
        and has it no longer; else 0.
    """
    status = 0
    for engine in sys.argv[1:] or ENGINES:
        os.environ["PYMILTER_ENGINE"] = engine
        there, seen = look()
        print(f"{engine}: {'the fault is there' if there else 'no fault'}: {seen}", flush=True)
        status |= there != (engine == "libmilter")
    return status


class Case:
    """A filter and a connection to it, negotiated, with no wait for answers."""

    def __init__(self, mta: MTA, process: subprocess.Popen[bytes], socket: str) -> None:
        self.mta = mta
        self.process = process
        self.socket = socket

    def send(self, command: bytes, data: bytes = b"") -> None:
        self.mta.send_packet(command, data)

    def answers(self) -> list[str]:
        """The answers that come within 2 s, and half a second after each other, or "closed"."""
        found: list[str] = []
        try:
            while True:
                found.append(self.mta.read_packet(0.5 if found else 2.0).command.decode())
        except FilterTimeout:
            pass
        except FilterClosed:
            found.append("closed")
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
            with contextlib.closing(MTA.connect(name, wait_for=WAIT, timeout=WAIT)) as mta:
                yield Case(mta, process, name)
        finally:
            process.kill()
            process.wait()


CONNECT = b"client.example\x004" + struct.pack("!H", 25) + b"192.0.2.7\0"
