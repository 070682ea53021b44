"""Sessions that libmilter accepts and then forgets, as it could not start a thread for them."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from Milter.mta import MTA, FilterTimeout, Offer

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
    pytest.mark.engine("libmilter"),
]

STACK = 256 << 20  # bytes, of a thread
# Memory for another stack is refused while callbacks run: see fuzz/libmilter/lost_session.py.
FILTER = f"""
import resource, sys, threading, milter

released = threading.Event()

def limit_memory():
    with open("/proc/self/statm") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + {STACK // 4}, resource.RLIM_INFINITY))

def negotiate(ctx, options):
    if "limited" in sys.argv:
        limit_memory()
    return milter.ALL_OPTS

def connect(ctx, name, *_):
    if name == "release":
        released.set()
    elif name == "hold":
        print("held", flush=True)
        released.wait(60)
    return milter.CONTINUE

import logging
logging.basicConfig(format="%(levelname)s %(message)s")
milter.set_connect_callback(connect)
milter.register("lost", negotiate=negotiate)
milter.setconn(sys.argv[1])
print("ready", flush=True)
milter.main()
"""
LOST = "ERROR 1 of the MTA's connections had no answer to their first packet for 5 s"


@pytest.fixture
def large_stacks() -> Iterator[None]:
    """What is started meanwhile gives its threads large stacks."""
    before = resource.getrlimit(resource.RLIMIT_STACK)
    if before[1] != resource.RLIM_INFINITY and before[1] < STACK:
        pytest.skip("stacks are limited here")
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_STACK, before)


def offer_of(running: Any) -> MTA:
    """A connection that has sent its offer and waits for no answer."""
    unread = socket.socket(socket.AF_UNIX)
    unread.connect(running.socket.partition(":")[2])
    mta = MTA(unread, offer=None)
    mta.send_packet(b"O", struct.pack("!III", 6, 0x1FF, 0x1FFFFF))
    return mta


def test_a_lost_session_is_told_to_the_log(run_filter: Any, large_stacks: None) -> None:
    running = run_filter(None, "limited", source=FILTER, env={"MALLOC_ARENA_MAX": "1"})
    running.mta(offer=Offer()).close()  # it listens
    with contextlib.ExitStack() as stack:
        for count in range(1, 9):  # libmilter may have had a thread more than it needed
            mta = stack.enter_context(contextlib.closing(offer_of(running)))
            try:
                mta.read_packet(3)
            except FilterTimeout:
                break
            mta.send_packet(b"C", b"hold\0" + b"U")
            running.wait_for("held", count)
        running.wait_for(LOST)
        assert running.output.count("ERROR") == 1, running.output


def test_a_session_that_is_served_or_silent_is_not_taken_for_lost(run_filter: Any) -> None:
    """Callbacks that block, with more to read, and connections that never said anything."""
    running = run_filter(source=FILTER)
    with contextlib.ExitStack() as stack:
        for count in range(1, 4):
            mta = stack.enter_context(contextlib.closing(running.mta(offer=Offer())))
            mta.send_packet(b"C", b"hold\0" + b"U")
            mta.send_packet(b"H", b"client.example\0")
            running.wait_for("held", count)
        silent = stack.enter_context(socket.socket(socket.AF_UNIX))
        silent.connect(running.socket.partition(":")[2])
        # There is nothing to wait for: two looks would have been taken by then, and a third.
        threading.Event().wait(12)
        assert "ERROR" not in running.output, running.output
        with running.mta(offer=Offer()) as mta:
            mta.connect_info("release")
