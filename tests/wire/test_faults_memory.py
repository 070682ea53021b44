"""Memory that runs out: each allocation of the module and of libmilter fails once.

The message at hand then gets a verdict, or its connection is closed, which an MTA takes as the
failure of the filter; every other connection is served as ever.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import faults
from support.process import python_command

from Milter.mta import FilterClosed, Offer, Reply, Verdict

pytestmark = pytest.mark.skipif(
    not faults.possible(), reason="allocations cannot be made to fail here"
)

# More than there is room for without an allocation, and not all of them UTF-8.
PARAMETERS = [b"X-%d=\xff" % number for number in range(20)]
CHANGES = 8  # that the filter makes to each message
MESSAGE = b"Subject: hello\r\nX-Other: one\r\n\r\nbody\r\n"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> faults.Faults:
    return faults.Faults(tmp_path_factory.mktemp("faults"))


def converse(running: Any) -> bool:
    """What an MTA can say, to a filter that does all that it can; was it served to the end?"""
    with running.mta(offer=Offer()) as mta:
        mta.set_macros("CONNECT", {"j": "mail.example.org"})
        mta.set_macros("MAIL", {"{mail_addr}": "alice@example.com"})
        steps: list[Callable[[], Reply]] = [
            lambda: mta.connect_info("client.example.com"),
            lambda: mta.helo("client.example.com"),
        ]
        if not all(step().verdict.goes_on for step in steps):
            return False
        mta.unknown("RAISE")
        if mta.mail("<alice@example.com>", "SIZE=10").verdict.goes_on:
            mta.rcpt("<refused@example.org>")
        mta.abort()
        steps = [
            lambda: mta.mail("<alice@example.com>", *PARAMETERS),
            lambda: mta.rcpt("<bob@example.org>", *PARAMETERS),
            mta.data,
            lambda: mta.header("Subject", b"caf\xe9"),
            mta.eoh,
            lambda: mta.body(b"body\r\n"),
        ]
        return all(step().verdict.goes_on for step in steps) and is_whole(mta.eom())


def is_whole(reply: Reply) -> bool:
    """The message passes; then it has every change that the filter makes."""
    if reply.verdict.goes_on:
        assert (len(reply.modifications), reply.progress) == (CHANGES, 1)
    return reply.verdict.goes_on


def honest(running: Any) -> None:
    """A connection that must be served in full."""
    with running.mta(offer=Offer()) as mta:
        result = mta.send(MESSAGE, recipients=["<bob@example.org>"])
    assert result.accepted
    assert result.message["X-Added"] == "one\n\ttwo"
    assert result.message["Subject"] == "changed"
    assert result.message.body == "n\xe4w\r\n".encode()


def contexts(running: Any) -> tuple[int, int]:
    with running.mta(offer=Offer()) as mta:
        mta.connect_info("client.example.com")
        reply = mta.unknown("DIAG")
    created, deleted = reply.smtp.text.split()
    return int(created), int(deleted)


@pytest.mark.skipif(
    hasattr(sys, "gettotalrefcount"),
    reason="a debug build of CPython asserts that it never runs out of memory",
)
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("count", "how"),
    [(1, ""), (40, ""), (1, "strict"), (1, "bytes"), (1, "replace"), (1, "hook")],
    ids=["one", "a-row-of-them", "strict", "bytes", "replace", "hook"],
)
def test_each_allocation_of_a_conversation(
    run_filter: Callable[..., Any], faulty: faults.Faults, count: int, how: str
) -> None:
    """Beside it a message that began before goes on after each failure, and ends whole."""
    running = run_filter("memory_faults", *[how] * bool(how), env=faulty.env)
    honest(running)
    answered = closed = 0
    with running.mta(offer=Offer()) as beside:
        beside.connect_info("client.example.com")
        beside.mail("<alice@example.com>")
        for first in itertools.count(1):
            with faulty.failing(faults.ALLOCATIONS, first, count):
                try:
                    answered += converse(running)
                except FilterClosed:
                    closed += 1
                seen = faulty.seen
            assert running.process.poll() is None, (first, running.output)
            assert beside.rcpt("<bob@example.org>").verdict is Verdict.CONTINUE, first
            if first % 10 == 0 or seen < first:
                honest(running)
            if seen < first:
                break
        assert beside.eoh().verdict.goes_on
        assert is_whole(beside.eom())
    assert first > (50 if "PYTHONMALLOC" in faulty.env else 20)  # or nothing was tried
    assert answered > 0
    assert closed > 0
    created, deleted = contexts(running)
    assert created - deleted <= 2  # its own, and one that is ending now
    assert running.stop() == 0


# --- import and setup --------------------------------------------------------------------------

TESTS = str(Path(__file__).parents[1])
# Each try is a child of its own, as what succeeded once would not be tried again.
SETUP = """
import importlib.util, os, sys
sys.path.insert(0, sys.argv[1])
from support import faults

tell = faults.Told(os.environ["FAULTS"])
spec = importlib.util.find_spec("milter")
path = os.path.join(sys.argv[2], "s")
if sys.argv[3] != "import":
    import milter

def load():
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.InvalidArgument, module.error) and module.milterContext
    assert module.CONTINUE == 0

def setup():
    steps = [
        lambda: milter.register("name", data=print, unknown=print, negotiate=print),
        lambda: milter.set_eom_callback(print),
        lambda: milter.set_flags(milter.ADDHDRS),
        lambda: milter.setconn("unix:" + (path if sys.argv[3] == "setup" else "s")),
        lambda: milter.setmaxdatasize(1 << 16),
        lambda: milter.set_drain_timeout(2.5),
        lambda: milter.getversion(),
        lambda: milter.getdiag(),
        lambda: milter._metrics(True),
        lambda: milter._metrics_snapshot(),
    ]
    for step in steps:
        yield step
    yield lambda: milter.opensocket(True)
    yield lambda: milter._share_socket(2)

def attempt(call):
    try:
        call()
    except (MemoryError, ImportError, OSError) as exc:
        return True
    except Exception as exc:
        if sys.argv[3] != "import" and isinstance(exc, milter.error):
            return True
        raise
    return False

os.chdir(sys.argv[2])
first = 0
while True:
    first += 1
    if os.path.exists(path):
        os.unlink(path)
    child = os.fork()
    if child == 0:
        calls = [load] if sys.argv[3] == "import" else setup()
        tell.arm(faults.ALLOCATIONS, first, 1)
        for call in calls:
            if attempt(call):
                tell.disarm()
                call()  # what failed works once there is memory again
                tell.rearm()
        tell.disarm()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    tell.disarm()
    assert status == 0, (first, status)
    if tell.seen < first:
        break
print("tried", first - 1)
"""


@pytest.mark.parametrize("what", ["import", "setup", "relative-path"])
def test_each_allocation_before_the_filter_runs(
    faulty: faults.Faults, directory: Path, what: str
) -> None:
    """It raises, and what was tried works when there is memory again."""
    if what == "import" and sys.version_info >= (3, 12):
        pytest.skip("this CPython crashes where it makes a type and memory is short")
    done = subprocess.run(
        [*python_command(), "-c", SETUP, TESTS, str(directory), what],
        env={**os.environ, **faulty.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tried = int(done.stdout.split()[-1])
    assert tried > (100 if what == "import" else 5)
