"""One after the other to the interpreter lock: where libmilter's threads wait, and that they do.

How many changes of context it saves cannot be told on a machine that does other work too: it is
measured by benchmarks/bench.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.lifecycle import Held, wait_until

from Milter.mta import MTA, Offer

pytestmark = [
    pytest.mark.engine("libmilter"),
    pytest.mark.skipif(
        bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="there is no lock to wait for"
    ),
    pytest.mark.skipif(
        not os.access("/proc/self/syscall", os.R_OK), reason="where threads sleep cannot be seen"
    ),
]

# The stages hold: helo without the interpreter lock, body with it.
FILTER = """
import ctypes, os, sys
import Milter

letting_go, keeping = (os.open(name, os.O_RDWR) for name in sys.argv[2:])

class Holding(Milter.Base):
    def hello(self, hostname):
        os.write(1, b"waits\\n")
        os.read(letting_go, 1)
        return Milter.CONTINUE

    def envfrom(self, sender, *params):
        return Milter.CONTINUE

    def body(self, chunk):
        os.write(1, b"keeps the lock\\n")
        ctypes.PyDLL(None).read(keeping, ctypes.create_string_buffer(1), 1)
        return Milter.CONTINUE

Milter.factory = Holding
Milter.runmilter("holding", sys.argv[1], 60)
"""
CONNECTIONS = 6


def mappings(pid: int) -> Iterator[tuple[int, str]]:
    """The beginning and the file of each mapping that has one; what follows it without a name is
    its uninitialised data.
    """
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, _, _, _, _, *name = line.split(maxsplit=5)
        if name:
            yield int(place.partition("-")[0], 16), name[0]


def sleepers(pid: int) -> set[str]:
    """The threads that sleep on a word of the module's own."""
    files = sorted(mappings(pid))
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            words = (task / "syscall").read_text().split()
            word = int(words[1], 16) if len(words) > 3 else 0  # "running"
            file = next((name for begin, name in reversed(files) if begin <= word), "")
            if re.match(r"milter\..*\.so$", Path(file).name):
                found.add(task.name)
    return found


def test_one_waits_for_the_interpreter_lock_and_the_others_in_front_of_it(
    run_filter: Callable[..., Any], directory: Path
) -> None:
    letting_go, keeping = Held(directory, "helo"), Held(directory, "body")
    with contextlib.ExitStack() as stack:
        names = []
        for each in (letting_go, keeping):
            stack.callback(each.close)
            names.append(each.options[-1].partition(":")[2])
        running = run_filter(None, *names, source=FILTER)
        mtas: list[MTA] = [
            stack.enter_context(running.mta(offer=Offer())) for _ in range(CONNECTIONS + 1)
        ]
        # So that libmilter has a thread for each.
        for mta in mtas:
            mta.send_packet(b"H", b"client.example\0")
        running.wait_for("waits", len(mtas))
        for _ in mtas:
            letting_go.release()
        for mta in mtas:
            assert mta.read_packet().command == b"c"
        keeper, *others = mtas
        keeper.mail("<a@example.com>")
        keeper.rcpt("<b@example.org>")
        keeper.send_packet(b"B", b"text")
        running.wait_for("keeps the lock")
        assert sleepers(running.pid) == set()
        seen: set[str] = set()

        def several_were_seen() -> bool:
            # They wake now and then, to look at the holder; and libmilter may have put some of the
            # commands behind others.
            seen.update(sleepers(running.pid))
            return len(seen) >= 2

        for mta in others:
            mta.send_packet(b"M", b"<a@example.com>\0")
        wait_until(several_were_seen, "they are not there")
        keeping.release()
        assert keeper.read_packet().command == b"c"
        for mta in others:
            assert mta.read_packet().command == b"c"
    assert running.stop() == 0
