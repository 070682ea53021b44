"""A session whose thread cannot be started: it is accepted, and nobody ever reads it.

Two connections keep libmilter's two threads busy, and there is no memory for the stack of a third
one when the next connection comes.  Our own engine has no thread for the second one either: it
waits for the first.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import struct
import sys
import tempfile

from _case import CONNECT, WAIT, case, judge

from Milter.mta import MTA, FilterTimeout

STACK = 256 << 20  # bytes, of a thread
BODY = f"""
import os, resource

def negotiate(ctx, options):
    with open("/proc/self/statm") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + {STACK // 4}, resource.RLIM_INFINITY))
    return milter.ALL_OPTS

def hold(ctx, *args):
    with open(os.environ["CASE_HELD"], "wb", buffering=0) as told:
        told.write(b".")
    open(os.environ["CASE_RELEASE"], "rb").close()
    return milter.CONTINUE

milter.set_connect_callback(hold)
"""


def look() -> tuple[bool, str]:
    limits = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, limits[1]))
    try:
        answered = is_third_answered()
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, limits)
    return not answered, f"a session that came while there was no memory: answered {answered}"


def is_third_answered() -> bool:
    with tempfile.TemporaryDirectory(prefix="case-") as directory, contextlib.ExitStack() as stack:
        fifos = {"CASE_HELD": f"{directory}/held", "CASE_RELEASE": f"{directory}/release"}
        for path in fifos.values():
            os.mkfifo(path)
        # One arena: others would be refused as well, and callbacks are to go on.
        first = stack.enter_context(case(BODY, MALLOC_ARENA_MAX="1", **fifos))
        second = stack.enter_context(
            contextlib.closing(MTA.connect(first.socket, offer=None, timeout=WAIT))
        )
        held = os.open(fifos["CASE_HELD"], os.O_RDWR)
        stack.callback(os.close, held)
        first.send(b"C", CONNECT)
        os.read(held, 1)
        offer(second)
        if select.select([second], [], [], 1.0)[0]:
            second.read_packet()
            second.send_packet(b"C", CONNECT)
            os.read(held, 1)
        third = socket.socket(socket.AF_UNIX)
        third.connect(first.socket.partition(":")[2])
        with contextlib.closing(MTA(third, offer=None)) as mta:
            offer(mta)
            answered = is_answered(mta, 1.0)
            release = os.open(fifos["CASE_RELEASE"], os.O_WRONLY)
            stack.callback(os.close, release)
            first.mta.read_packet()
            second.read_packet()
            return answered or is_answered(mta, 6.0)


def offer(mta: MTA) -> None:
    mta.send_packet(b"O", struct.pack("!III", 6, 0x1FF, 0x1FFFFF))


def is_answered(mta: MTA, within: float) -> bool:
    try:
        mta.read_packet(within)
    except FilterTimeout:
        return False
    return True


if __name__ == "__main__":
    sys.exit(judge(look))
