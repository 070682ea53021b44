"""Callbacks that block, many at once: libmilter's pool is late with its threads.

The filter on libmilter is in C (benchmarks/floor.c): the module keeps the pool from running dry.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _case import WAIT, case, judge

from Milter.mta import MTA

FLOOR = Path(__file__).parents[2] / "benchmarks" / "floor.c"
CONNECTIONS = 24
BLOCKED = 1.0  # seconds
BODY = f"""
import time
def block(ctx, *args):
    time.sleep({BLOCKED})
    return milter.CONTINUE
milter.set_envfrom_callback(block)
negotiate = None
"""


@contextlib.contextmanager
def floor() -> Iterator[str]:
    """A filter in C on libmilter itself; its socket."""
    with tempfile.TemporaryDirectory(prefix="case-") as directory:
        program, name = f"{directory}/floor", f"unix:{directory}/socket"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-O2", str(FLOOR), "-o", program, "-lmilter"], check=True)
        process = subprocess.Popen([program, name, "--block-ms", str(int(BLOCKED * 1000))])
        try:
            yield name
        finally:
            process.kill()
            process.wait()


def look() -> tuple[bool, str]:
    with contextlib.ExitStack() as stack:
        if os.environ["PYMILTER_ENGINE"] == "libmilter":
            name = stack.enter_context(floor())
        else:
            name = stack.enter_context(case(BODY)).socket
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
    seen = f"{CONNECTIONS} callbacks at once that take {BLOCKED:g} s each: {took:.2f} s"
    return took > 1.8 * BLOCKED, seen


if __name__ == "__main__":
    sys.exit(judge(look))
