"""Callbacks that block, many at once: libmilter's pool is late with its threads.

The filter is in C (benchmarks/floor.c): the module keeps the pool from running dry.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _case import WAIT

from Milter.mta import MTA

FLOOR = Path(__file__).parents[2] / "benchmarks" / "floor.c"
CONNECTIONS = 24
BLOCKED = 0.5  # seconds


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="case-") as directory, contextlib.ExitStack() as stack:
        program, name = f"{directory}/floor", f"unix:{directory}/socket"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-O2", str(FLOOR), "-o", program, "-lmilter"], check=True)
        process = subprocess.Popen([program, name, "--block-ms", str(int(BLOCKED * 1000))])
        stack.callback(process.wait)
        stack.callback(process.kill)
        mtas = [
            stack.enter_context(MTA.connect(name, wait_for=WAIT, timeout=WAIT))
            for _ in range(CONNECTIONS)
        ]
        for mta in mtas:
            mta.connect_info("client.example.com")
        began = time.monotonic()
        for mta in mtas:
            mta.send_packet(b"M", b"<a@b>\0")
        for mta in mtas:
            mta.read_packet()
        took = time.monotonic() - began
    print(f"{CONNECTIONS} callbacks at once that take {BLOCKED:g} s each: {took:.1f} s")
    return 0 if took > 1.8 * BLOCKED else 1


if __name__ == "__main__":
    sys.exit(main())
