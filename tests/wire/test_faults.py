"""What goes wrong around a filter and inside it, and what becomes then of the connection, of its
message, and of the others.

Beside what is here: memory, test_faults_memory; more of exceptions at each stage, test_exceptions,
test_verdicts, test_noreply and test_objects; a context that is closed, test_callbacks. In
lifecycle/: sys.exit() and KeyboardInterrupt, test_calls; a callback that does not return while the
filter is stopped, and a stop without descriptors, test_drain; workers that cannot be started,
test_workers; the program's end with live connections, test_exit; fork in a handler, test_signals.
A killed filter behind real MTAs: integration/test_crash.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import csv
import ctypes
import errno
import importlib
import io
import os
import resource
import signal
import socket
import struct
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from support import faults
from support.lifecycle import Held, gone, wait_until
from support.process import WAIT, python_command
from support.wire import Session, session

from Milter.mta import (
    MTA,
    FilterClosed,
    FilterTimeout,
    MTAError,
    Offer,
    Result,
    Stage,
    Step,
    Verdict,
)

Run = Callable[..., Any]
MESSAGE = b"Subject: hello\r\n\r\nbody\r\n"

needs_faults = pytest.mark.skipif(
    not faults.possible(), reason="system calls cannot be made to fail here"
)


def passes(running: Any) -> None:
    """An honest connection is served in full."""
    with session(running) as each:
        assert each.message().verdict is Verdict.CONTINUE


@pytest.fixture
def faulty(tmp_path: Path) -> faults.Faults:
    made = faults.Faults(tmp_path)
    made.env.pop("PYTHONMALLOC", None)
    return made


# --- threads -----------------------------------------------------------------------------------


only_libmilter = pytest.mark.engine("libmilter")


@needs_faults
@pytest.mark.parametrize(
    "first",
    [1, 2, pytest.param(3, marks=only_libmilter), pytest.param(4, marks=only_libmilter)],
)
def test_no_thread_when_the_filter_starts(
    run_filter: Run, faulty: faults.Faults, first: int
) -> None:
    """It says so and ends, or serves with fewer; it never hangs."""
    with faulty.failing(faults.THREADS, first, faults.ALWAYS):
        running = run_filter("scripted", env=faulty.env)
        wait_until(
            lambda: running.process.poll() is not None or faulty.seen >= first,
            "nothing fails",
        )
        if first == 1:
            assert running.wait() == 1
            assert "cannot start" in running.output
            return
    deadline = time.monotonic() + WAIT
    while running.process.poll() is None:
        with contextlib.suppress(MTAError, OSError):
            with running.mta(wait_for=0.1, timeout=1) as mta:
                mta.connect_info("client.example.com")
            break
        assert time.monotonic() < deadline, "it lives and serves nobody"
    if running.process.poll() is None:
        passes(running)
        assert running.stop() == 0
    else:
        assert running.wait() != 0


@needs_faults
@pytest.mark.engine("native")
def test_no_thread_for_callbacks_that_wait(run_filter: Run, faulty: faults.Faults) -> None:
    """Connections are served one after the other then, and each is answered."""
    running = run_filter("scripted", env=faulty.env)
    passes(running)

    def play(_: int) -> Verdict:
        with running.mta(offer=Offer()) as mta:
            each = Session(running, mta, {"helo": "import time; time.sleep(0.05)"})
            return each.message().verdict

    with faulty.failing(faults.THREADS, 1, faults.ALWAYS):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert set(pool.map(play, range(16))) == {Verdict.CONTINUE}
        assert faulty.seen > 0
    passes(running)
    assert running.stop() == 0


@needs_faults
@only_libmilter
def test_no_thread_while_the_filter_serves(
    run_filter: Run, faulty: faults.Faults, tmp_path: Path
) -> None:
    """Those that are there serve the connections that they get.

    libmilter never answers a connection for which it could not create a thread, and the MTA's own
    time-out ends it.
    """
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    running = run_filter("scripted", env=faulty.env)
    passes(running)
    with contextlib.ExitStack() as stack:
        callers = stack.enter_context(concurrent.futures.ThreadPoolExecutor(40))
        served = []
        with faulty.failing(faults.THREADS, 1, faults.ALWAYS):
            while not faulty.seen:  # each that is there waits, until one more is wanted
                assert len(served) < 40
                with contextlib.suppress(FilterTimeout):
                    mta = stack.enter_context(running.mta(offer=Offer(), timeout=1))
                    mta.timeout = WAIT
                    held = f"say(); open({str(gate)!r}, 'rb').close()"
                    one = Session(running, mta, {"envfrom": held})
                    served.append(callers.submit(one.message))
                    # Or none of those that wait is left to go on with it.
                    wait_until(
                        lambda one=one: faulty.seen or f"{one.tag} (" in running.output,
                        "it is not served",
                    )
            assert served
            opened = os.open(gate, os.O_WRONLY)
            stack.callback(os.close, opened)
            for message in served:
                assert message.result(WAIT).verdict is Verdict.CONTINUE
        passes(running)
    assert running.stop() == 0


# --- descriptors -------------------------------------------------------------------------------


def test_no_descriptor_left(run_filter: Run) -> None:
    """Connections wait then; those that are open go on, and once one ends the next is served."""
    running = run_filter("scripted")
    passes(running)
    used = len(os.listdir(f"/proc/{running.pid}/fd"))
    _, most = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (used + 8, most))
    served: list[MTA] = []
    with contextlib.ExitStack() as stack:
        with pytest.raises((MTAError, OSError)):
            for _ in range(16):
                served.append(stack.enter_context(running.mta(offer=Offer(), timeout=1)))
        assert served
        for mta in served:
            assert Session(running, mta, {}).message().verdict is Verdict.CONTINUE
    passes(running)
    assert running.stop() == 0


# --- the disk ----------------------------------------------------------------------------------

# A filter that asks the store that it is given for each recipient but one.
DISK = """
import sys
import Milter
from Milter.cache import AddrCache

directory, store = sys.argv[2:]
if store == "cache":
    cache = AddrCache(fname=directory + "/cache")
    def check(sender, recipient):
        cache[sender.strip("<>")] = None
elif store == "shelf":
    from Milter.greylist import Greylist
else:
    from Milter.greysql import Greylist
if store != "cache":
    grey = Greylist(directory + "/grey", 0, 1, 1)
    def check(sender, recipient):
        grey.check("192.0.2.1", sender, recipient)

class Checking(Milter.Base):
    def envfrom(self, sender, *params):
        self.sender = sender
        return Milter.CONTINUE

    def envrcpt(self, recipient, *params):
        if recipient != "<postmaster@example.org>":
            check(self.sender, recipient)
        return Milter.CONTINUE

Milter.factory = Checking
Milter.runmilter("disk", sys.argv[1], 60)
"""


def names_in(directory: Path, store: str) -> list[str]:
    """The senders that the store knows, as somebody reads it who comes later."""
    if store == "cache":
        lines = (directory / "cache").read_text().splitlines()
        assert all(len(line.split()) == 4 for line in lines), lines
        return [line.split("@")[0] for line in lines]
    module = importlib.import_module("Milter.greylist" if store == "shelf" else "Milter.greysql")
    with module.Greylist(directory / "grey", 0, 1, 1) as grey:
        table = io.StringIO()
        grey.export_csv(table)
    rows = list(csv.reader(table.getvalue().splitlines()))
    assert all(int(row[5]) == 0 for row in rows), rows
    return sorted(unquote(row[1]).split("@")[0].strip("<>") for row in rows)


@needs_faults
@pytest.mark.parametrize("kind", ["full", "filling"])
@pytest.mark.parametrize("store", ["cache", "shelf", "sqlite"])
def test_a_full_disk(
    run_filter: Run, faulty: faults.Faults, directory: Path, store: str, kind: str
) -> None:
    """The message that has to be noted is put off and leaves no trace; others that need no disk are
    served beside it; and once there is room the next is noted, beside what was there.
    """
    running = run_filter(None, str(directory), store, source=DISK, env=faulty.env)

    def attempt(mta: MTA, sender: str, recipient: str = "bob") -> Result:
        return mta.send(
            MESSAGE, sender=f"<{sender}@example.com>", recipients=[f"<{recipient}@example.org>"]
        )

    with running.mta(offer=Offer()) as mta, running.mta(offer=Offer()) as beside:
        assert attempt(mta, "before").accepted
        beside.greet()
        beside.mail("<alice@example.com>")
        with faulty.failing(
            faults.WRITES if kind == "full" else faults.SHORT_WRITES, 1, faults.ALWAYS
        ):
            result = attempt(mta, "during")
            assert beside.rcpt("<postmaster@example.org>").verdict is Verdict.CONTINUE
            assert beside.eom().verdict is Verdict.CONTINUE
        assert faulty.seen > 0
        assert (result.verdict, result.stage) == (Verdict.TEMPFAIL, Stage.RCPT)
        assert result.smtp is not None and result.smtp.code == 451
        assert attempt(mta, "later").accepted
        running.wait_for("Error")
    assert running.stop() == 0
    assert names_in(directory, store) == ["before", "later"]


# --- MTAs that stop, trickle or vanish ---------------------------------------------------------

STOPPED = """
import os, sys
from Milter.mta import MTA, Offer
with MTA.connect(sys.argv[1], timeout=60) as mta:
    mta.connect_info("client.example.com")
    mta.mail("<alice@example.com>")
    print("in the message", flush=True)
    sys.stdin.readline()
    mta.rcpt("<bob@example.org>")
    mta.data(); mta.eoh(); mta.body(b"text")
    print(mta.eom().verdict.name, flush=True)
"""


@contextlib.contextmanager
def stopped_mta(running: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*python_command(), "-c", STOPPED, running.socket],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as mta:
        try:
            assert mta.stdout is not None
            assert mta.stdout.readline() == "in the message\n"
            mta.send_signal(signal.SIGSTOP)
            yield mta
        finally:
            mta.kill()


def test_an_mta_that_is_stopped_for_a_while(run_filter: Run) -> None:
    """Others are served meanwhile; its message goes on where it was."""
    running = run_filter("scripted")
    passes(running)
    with stopped_mta(running) as mta:
        for _ in range(3):
            passes(running)
        mta.send_signal(signal.SIGCONT)
        assert mta.communicate("\n", timeout=WAIT)[0] == "CONTINUE\n"
        assert mta.returncode == 0


@pytest.mark.parametrize("half", [None, socket.SHUT_WR, socket.SHUT_RD])
def test_half_open_connections(run_filter: Run, half: int | None) -> None:
    """A peer that falls silent in a command, or has closed one direction only, is given up after
    the time-out: its message is aborted and its connection closed; others are served meanwhile.

    Between two commands libmilter looks for those that are silent every ten minutes only.
    """
    setup = (
        "milter.settimeout(1)\nmilter.set_abort_callback(lambda ctx: say('aborted'))\n"
        "milter.set_close_callback(lambda ctx: say('gone'))"
    )
    running = run_filter("scripted", setup)
    with running.mta(offer=Offer()) as mta:
        mta.connect_info("client.example.com")
        mta.mail("<alice@example.com>")
        mta.send_raw(b"\0\0\0")
        if half is not None:
            with socket.socket(fileno=os.dup(mta.fileno())) as same:
                same.shutdown(half)
        with running.mta() as other:
            assert other.send(MESSAGE, recipients=["<r@example.com>"]).accepted
        running.wait_for("('aborted',)")
        running.wait_for("('gone',)", 2)
        mta.close()


def test_a_byte_now_and_then(run_filter: Run) -> None:
    """Commands that come byte by byte hold up nobody else, and are answered, up to the verdict."""
    running = run_filter("scripted")
    over = threading.Event()
    failed: list[BaseException] = []

    def others() -> None:
        try:
            while not over.is_set():
                passes(running)
        except BaseException as exc:  # noqa: BLE001 - for the thread that waits
            failed.append(exc)

    commands = [
        (b"H", b"client.example.com\0"),
        (b"M", b"<alice@example.com>\0"),
        (b"R", b"<bob@example.org>\0"),
        (b"T", b""),
        (b"L", b"Subject\0hello\0"),
        (b"N", b""),
        (b"B", b"text\r\n"),
        (b"E", b""),
    ]
    with running.mta(offer=Offer()) as mta:
        eom = "ctx.addheader('X-Slow', 'yes'); return milter.ACCEPT"
        each = Session(running, mta, {"eom": eom})
        each.connect()
        busy = threading.Thread(target=others)
        busy.start()
        try:
            for command, data in commands:
                *packet, last = struct.pack("!I", len(data) + 1) + command + data
                for byte in packet:
                    mta.send_raw(bytes([byte]))
                passes(running)  # a whole message of another one meanwhile
                mta.send_raw(bytes([last]))
                answer = mta.read_packet()
                if command == b"E":
                    assert (answer.command, answer.data) == (b"h", b"X-Slow\0yes\0")
                    answer = mta.read_packet()
                assert answer.command == (b"a" if command == b"E" else b"c")
        finally:
            over.set()
            busy.join(WAIT)
    assert failed == []
    each.settle()


def test_an_mta_that_goes_while_a_change_is_written(run_filter: Run) -> None:
    """The action raises, the connection is closed, and nobody else notices."""
    running = run_filter("scripted")
    eom = "say('writing'); attempt(lambda: ctx.replacebody(b'x' * (64 << 20)))"
    with running.mta(offer=Offer()) as mta:
        each = Session(running, mta, {"eom": eom})
        each.envelope()
        mta.eoh()
        mta.send_packet(b"E")
        assert each.next() == ("writing",)
        passes(running)  # it writes, and the socket is full
        mta.close()
    each.settle()
    raised = each.said()[-1]
    assert raised[0] == "raised"
    assert "error" in raised[1]
    passes(running)


# --- what the C library does meanwhile ---------------------------------------------------------

STARTING = """
import atexit, threading  # as many programs do; else main() would run Python code to load them
import os, signal, sys
import milter

def stop(number, frame):
    print("handler", flush=True)
    sys.exit(5)

how = int(os.environ["FAULTS_SIGNAL"])
if how != signal.SIGINT:
    signal.signal(how, stop)
milter.register("starting")
milter.set_connect_callback(lambda ctx, *arguments: milter.REJECT)
milter.setconn(sys.argv[1])
try:
    milter.main()
    print("main returned", flush=True)
except BaseException as exc:
    print("main raised", repr(exc), flush=True)
print("the socket is there:", os.path.exists(sys.argv[1].partition(":")[2]))
"""


@needs_faults
@pytest.mark.parametrize(
    ("number", "raised"),
    [
        (signal.SIGTERM, "SystemExit(5)"),
        (signal.SIGUSR1, "SystemExit(5)"),
        (signal.SIGINT, "KeyboardInterrupt()"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_signal_while_main_starts(
    run_filter: Run, faulty: faults.Faults, number: signal.Signals, raised: str
) -> None:
    """What its handler raises stops the filter, and comes out of main()."""
    env = {**faulty.env, "FAULTS_SIGNAL": str(int(number))}
    running = run_filter(source=STARTING, env=env)
    assert running.wait() == 0
    words = ["handler"] * (number != signal.SIGINT)
    lines = [*words, f"main raised {raised}", "the socket is there: False"]
    assert running.output.split("\n") == [*lines, ""]


WORDS = """
import milter
milter.register("words")
milter.setconn("unix:/nowhere/at/all")
try:
    milter.opensocket(False)
except BaseException as exc:
    print(ascii([type(exc).__name__, str(exc), type(exc.__cause__).__name__]))
    print(ascii([exc.__cause__.errno, exc.__cause__.strerror]))
"""


@needs_faults
def test_an_error_in_words_that_are_not_utf_8(faulty: faults.Faults) -> None:
    """As in a locale with another encoding: it is said all the same, and loses no byte."""
    words = "Verzeichnis f\udcfcr S\udcf6ckel fehlt"
    env = {**os.environ, **faulty.env, "FAULTS_STRERROR": words}
    done = subprocess.run(
        [*python_command(), "-c", WORDS],
        env=env,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, cause = map(ast.literal_eval, done.stdout.splitlines())
    assert (said[0], said[2]) == ("error", "FileNotFoundError")
    assert f"/nowhere/at/all: {words}" in said[1]
    assert cause == [errno.ENOENT, words]


RESOLVING = """
import os, socket, threading
import milter

ours, theirs = socket.socketpair()
os.environ["FAULTS_RESOLVER"] = str(theirs.fileno())
taken = socket.socket()  # a port in use: the resolver is asked only to say what is wrong
taken.bind(("127.0.0.1", 0))
taken.listen()

def answer():
    ours.recv(1)
    ours.send(b"!")

thread = threading.Thread(target=answer, daemon=True)
thread.start()
milter.register("resolving")
milter.setconn("inet:%d@127.0.0.1" % taken.getsockname()[1])
try:
    milter.opensocket(False)
except milter.error as exc:
    print(exc)
thread.join({wait})
print(thread.is_alive())
taken.close()
"""


@needs_faults
def test_other_threads_run_while_the_resolver_is_asked(faulty: faults.Faults) -> None:
    """It returns only once another thread of Python has answered it."""
    resolver = ctypes.CDLL(None)
    resolver.gai_strerror.restype = ctypes.c_char_p
    done = subprocess.run(
        [*python_command(), "-c", RESOLVING.replace("{wait}", str(WAIT))],
        env={**os.environ, **faulty.env},
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, alive = done.stdout.splitlines()
    assert error.endswith(resolver.gai_strerror(socket.EAI_AGAIN).decode())
    assert alive == "False"


# --- children ----------------------------------------------------------------------------------

FORK = """
import os, sys
child = os.fork()
if child == 0:
    {does}
    return milter.REJECT
say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
{then}
"""


@pytest.mark.parametrize("stage", ["header", "eom"])
@pytest.mark.parametrize(
    ("does", "status"),
    [
        ("pass", 0),
        ("1/0", 1),
        ("raise RecursionError", 1),
        ("sys.exit(5)", 5),
        ("raise KeyboardInterrupt", 1),
        ("attempt(lambda: ctx.addheader('X-Child', 'x'))", 0),
        ("attempt(lambda: ctx.replacebody(b'child'))", 0),
        ("attempt(lambda: ctx.progress())", 0),
    ],
)
def test_a_child_that_a_callback_forks(run_filter: Run, stage: str, does: str, status: int) -> None:
    """It ends there as a program does; the message has the parent's reply, once, and the parent's
    change; the connection beside it and the filter go on.
    """
    running = run_filter("scripted")
    then = "ctx.addheader('X-Parent', 'x')" if stage == "eom" else ""
    bodies = {stage: FORK.format(does=does, then=then)}
    with session(running) as beside:
        beside.envelope()
        with session(running, **bodies) as each:
            reply = each.message()
            assert reply.verdict is Verdict.CONTINUE
            assert [m.name for m in reply.modifications] == [b"X-Parent"] * (stage == "eom")
            each.mta.expect_nothing()
            assert each.mta.mail("<carol@example.org>").verdict is Verdict.CONTINUE
            each.mta.abort()
        said = each.said()
        assert ("ended", status) in said
        raised = [word[2] for word in said if word[0] == "raised"]
        assert len(raised) == ("attempt" in does)
        assert all("this process is a fork of the filter" in text for text in raised)
        assert beside.content().verdict is Verdict.CONTINUE
    assert running.stop() == 0
    assert "main returned" in running.output


FORK_KNOWN = """
import logging, multiprocessing, os, sys, threading
logging.getLogger("app").warning("threading knows this thread")
child = os.fork()
if child == 0:
    def wait():
        threading.main_thread().join()
        say("the main thread has ended", threading.main_thread().name)
    threading.Thread(target=wait).start()
    {does}
    return milter.REJECT
say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
process = multiprocessing.get_context("fork").Process(target=say, args=["in a process"])
process.start()
process.join()
say("ended", process.exitcode)
"""


@pytest.mark.parametrize(("does", "status"), [("pass", 0), ("sys.exit(5)", 5)])
def test_a_child_that_is_forked_by_a_thread_that_has_logged(
    run_filter: Run, does: str, status: int
) -> None:
    """It ends as a main thread does: its threads are waited for, and nothing fails."""
    running = run_filter("scripted")
    with session(running, eom=FORK_KNOWN.format(does=does)) as each:
        assert each.message().verdict is Verdict.CONTINUE
    assert each.said() == [
        ("the main thread has ended", "MainThread"),
        ("ended", status),
        ("in a process",),
        ("ended", 0),
    ]
    assert running.stop() == 0
    assert "Error" not in running.output


FORK_BESIDE = """
import os, signal, threading
body = threading.Thread(target=ctx.replacebody, args=(b"x" * (16 << 20),))
body.start()
open({fifo!r}, "rb", 0).read(1)
child = os.fork()
if child == 0:
    signal.alarm(10)  # ends one that waits for a thread that is not there
    attempt(lambda: ctx.{call})
    return milter.CONTINUE
status = os.waitpid(child, 0)[1]
say("ended", os.WIFEXITED(status), os.WEXITSTATUS(status))
body.join()
"""


@pytest.mark.parametrize(
    "call",
    [
        "addheader('X-Child', 'x')",
        "replacebody(b'child')",
        "progress()",
        "getsymval('i')",
        "setreply('550', '5.7.1', 'child')",
    ],
)
def test_a_child_that_is_forked_while_another_thread_changes_the_message(
    run_filter: Run, directory: Path, call: str
) -> None:
    """That thread is not there to end its change: the child's own is refused at once."""
    running = run_filter("scripted")
    with contextlib.closing(Held(directory, "fork")) as hold:
        fifo = hold.options[-1].partition(":")[2]
        with session(running, eom=FORK_BESIDE.format(fifo=fifo, call=call)) as each:
            each.envelope()
            each.mta.eoh()
            each.mta.send_packet(b"E")
            first = each.mta.read_packet()
            assert first.command == b"b"  # and the rest is more than the socket takes
            hold.release()
            assert each.next(2) == ("ended", True, 0)
            size, answer = len(first.data), each.mta.read_packet()
            while answer.command == b"b":
                size, answer = size + len(answer.data), each.mta.read_packet()
            assert answer.command == b"c"
            assert size == 16 << 20
    (refused, _) = each.said()
    assert (refused[0], refused[1][0]) == ("raised", "error")
    assert "this process is a fork of the filter" in refused[2]


# --- applications that do wrong ----------------------------------------------------------------

FACTORY = """
import sys
import Milter

class Good(Milter.Base):
    def eom(self):
        self.addheader("X-Good", "yes")
        return Milter.CONTINUE

class Lasting(Good):
    def __del__(self):
        raise RuntimeError("in __del__")

made = []
only = Good()

def factory():
    made.append(None)
    if {wrong}:
        {body}
    return Good()

Milter.factory = factory
Milter.runmilter("factory", sys.argv[1], 60)
"""


def is_good(mta: MTA) -> bool:
    """The filter takes a message of this connection, with its change."""
    result = mta.send(MESSAGE, recipients=["<r@example.com>"])
    return result.accepted and result.message.get_all("X-Good") == ["yes"]


def is_refused(running: Any) -> bool:
    """A new connection does not get a message past the filter."""
    with contextlib.suppress(FilterClosed), running.mta(offer=Offer()) as mta:
        return not mta.send(MESSAGE, recipients=["<r@example.com>"]).accepted
    return True


@pytest.mark.parametrize(
    ("body", "logged"),
    [
        ("return None", "None"),
        ("return 5", "int"),
        ("return object()", "object"),
        ("return Good", "_setctx() missing"),
        ("raise ValueError('no filter')", "no filter"),
        ("raise RecursionError", "RecursionError"),
        ("return [].pop()", "IndexError"),
    ],
)
def test_a_factory_that_makes_no_filter(run_filter: Run, body: str, logged: str) -> None:
    """That connection does not get past the filter unseen; those beside and after it are served."""
    running = run_filter(source=FACTORY.format(body=body, wrong="len(made) == 2"))
    with running.mta(offer=Offer()) as beside:
        beside.greet()
        assert is_refused(running)
        running.wait_for(logged)
        assert is_good(beside)
    with running.mta(offer=Offer()) as mta:
        assert is_good(mta)
    assert running.stop() == 0


@pytest.mark.parametrize("body", ["return None", "raise ValueError('no filter')"])
def test_a_factory_that_fails_for_a_later_session(run_filter: Run, body: str) -> None:
    """sendmail plays several on a connection: that one is put off, the next is served."""
    running = run_filter(source=FACTORY.format(body=body, wrong="len(made) == 3"))
    with running.mta(offer=Offer()) as beside, running.mta(offer=Offer()) as mta:
        beside.greet()
        assert is_good(mta)
        mta.quit_nc()
        result = mta.send(MESSAGE, recipients=["<r@example.com>"])
        assert (result.verdict, result.stage) == (Verdict.TEMPFAIL, Stage.EOM)
        mta.quit_nc()
        assert is_good(mta)
        assert is_good(beside)
    assert running.stop() == 0


def test_a_factory_that_returns_one_object_twice(run_filter: Run) -> None:
    """While it serves a connection another one is refused, and it goes on with the first."""
    running = run_filter(source=FACTORY.format(body="return only", wrong="len(made) != 3"))
    with running.mta(offer=Offer()) as first:
        first.greet()
        first.mail("<alice@example.com>")
        first.rcpt("<bob@example.org>")
        assert is_refused(running)
        running.wait_for("the Good that it returned serves another connection")
        with running.mta(offer=Offer()) as other:
            assert is_good(other)  # with one of its own
            other.quit_nc()
            result = other.send(MESSAGE, recipients=["<r@example.com>"])
            assert result.verdict is Verdict.TEMPFAIL
        first.eoh()
        assert [m.name for m in first.eom().modifications] == [b"X-Good"]
        first.quit_nc()
        assert is_good(first)  # by the same, which is free again
    with running.mta(offer=Offer()) as mta:
        assert is_good(mta)
    assert running.stop() == 0


def test_a_filter_whose_end_raises(run_filter: Run) -> None:
    """What __del__ raises is told, and harms nothing."""
    running = run_filter(source=FACTORY.format(body="return Lasting()", wrong="len(made) > 1"))
    told = "RuntimeError: in __del__"

    def serve() -> None:
        with running.mta(offer=Offer()) as mta:
            assert is_good(mta)

    with running.mta(offer=Offer()) as beside:
        beside.greet()
        beside.mail("<alice@example.com>")
        for count in range(1, 4):
            serve()
            if sysconfig.get_config_var("Py_GIL_DISABLED"):
                # CPython puts an object's end off until the thread that made it runs Python again,
                # where another one let go of it last (biased reference counts, PEP 703).
                wait_until(lambda n=count: running.output.count(told) >= n or serve(), told)
            running.wait_for(told, count)
        beside.rcpt("<bob@example.org>")
        assert [m.name for m in beside.eom().modifications] == [b"X-Good"]
    assert running.stop() == 0


@pytest.mark.parametrize("stage", ["unknown", "abort", "close"])
def test_an_exception_between_messages(run_filter: Run, stage: str) -> None:
    """It costs no message, neither of its connection nor of the one beside it."""
    running = run_filter("scripted")
    with session(running) as beside:
        beside.envelope()
        with session(running, **{stage: "raise ValueError(tag)"}) as each:
            each.connect()
            each.mta.unknown("XBOGUS")
            each.mta.mail("<alice@example.com>")
            each.mta.abort()
            each.transaction()
            assert each.content().verdict is Verdict.CONTINUE
        running.wait_for(f"ValueError: {each.tag}")
        assert beside.content().verdict is Verdict.CONTINUE


def test_an_exception_in_negotiate(run_filter: Run) -> None:
    """That connection has no filter; the one beside it and the next have theirs."""
    negotiate = "milter.n = getattr(milter, 'n', 0) + 1\nif milter.n == 2: 1/0\n"
    running = run_filter("scripted", "", negotiate + "args[0][1] &= milter.P_SKIP")
    with session(running) as beside:
        beside.envelope()
        with pytest.raises(FilterClosed):
            running.mta()
        running.wait_for("ZeroDivisionError")
        passes(running)
        assert beside.content().verdict is Verdict.CONTINUE


def test_an_exit_in_a_step_without_reply(run_filter: Run) -> None:
    """The filter drains: the next step of that message brings the verdict that is owed, and the
    message beside it ends whole.
    """
    running = run_filter("scripted", "", f"args[0][1] &= milter.P_SKIP | {int(Step.NR_HDR)}")
    with running.mta(offer=Offer()) as mta, running.mta(offer=Offer()) as other:
        leaving = Session(running, mta, {"header": "raise SystemExit(3)"})
        beside = Session(running, other, {"eom": "ctx.addheader('X-Whole', 'yes')"})
        for each in (leaving, beside):
            each.envelope()
        assert mta.header("Subject", "hello").verdict is Verdict.NO_REPLY
        gone(running.socket)
        reply = mta.eoh()
        assert reply.verdict is Verdict.TEMPFAIL
        assert reply.smtp is not None and (reply.smtp.code, reply.smtp.xcode) == (451, "4.3.0")
        assert [m.name for m in beside.content().modifications] == [b"X-Whole"]
        for each in (leaving, beside):
            each.mta.expect_close()
            each.mta.close()
            each.settle()
    assert running.wait() == 3


def test_actions_on_the_context_of_another_connection(run_filter: Run) -> None:
    """Where that one is not in its eom they are refused; its message stays as it is."""
    running = run_filter("scripted")
    with running.mta(offer=Offer()) as first, running.mta(offer=Offer()) as second:
        kept = Session(running, first, {"data": "milter.other = ctx"})
        kept.envelope()
        eom = "attempt(lambda: milter.other.addheader('X-Wrong', 'x'))\n"
        eom += "attempt(lambda: milter.other.replacebody(b'x'))\n"
        eom += "attempt(lambda: milter.other.setreply('550', '5.7.1', 'wrong'))\n"
        eom += "ctx.addheader('X-Right', 'x')"
        acting = Session(running, second, {"eom": eom})
        reply = acting.message()
        assert [m.name for m in reply.modifications] == [b"X-Right"]
        for count, rule in enumerate(["in the eom callback"] * 2 + ["while a callback"], 1):
            raised, _, text = acting.next(count)
            assert raised == "raised"
            assert f"only allowed {rule}" in text
        reply = kept.content()
        assert reply.verdict is Verdict.CONTINUE
        assert reply.modifications == ()
    for each in (kept, acting):
        each.settle()


def test_actions_on_a_context_that_is_in_its_eom_too(run_filter: Run, directory: Path) -> None:
    """They change the message of that connection and no other."""
    running = run_filter("scripted")
    with contextlib.closing(Held(directory, "eom")) as hold:
        fifo = hold.options[-1].partition(":")[2]
        kept = "milter.other = ctx; say('in eom'); open({fifo!r}, 'rb', 0).read(1)"
        acting = "milter.other.addheader('X-Other', 'x'); ctx.addheader('X-Own', 'x')"
        with session(running, eom=kept.format(fifo=fifo)) as first:
            first.envelope()
            first.mta.eoh()
            first.mta.send_packet(b"E")
            assert first.next() == ("in eom",)
            with session(running, eom=acting) as second:
                assert [m.name for m in second.message().modifications] == [b"X-Own"]
            hold.release()
            assert first.mta.read_packet().data == b"X-Other\0x\0"
            assert first.mta.read_packet().command == b"c"


def test_a_context_that_another_connection_has_left(run_filter: Run) -> None:
    """Each action on it raises; the message at hand is served."""
    running = run_filter("scripted")
    with session(running, data="milter.left = ctx") as each:
        each.message()
    eom = "attempt(lambda: milter.left.addheader('X-Wrong', 'x')); ctx.addheader('X-Right', 'x')"
    with session(running, eom=eom) as each:
        assert [m.name for m in each.message().modifications] == [b"X-Right"]
        assert each.next()[0] == "raised"


@pytest.mark.parametrize(
    "stage", ["connect", "helo", "envfrom", "envrcpt", "data", "header", "eoh", "body", "eom"]
)
def test_recursion_at_any_stage(run_filter: Run, stage: str) -> None:
    """That step is put off; the connection beside it is served to the end."""
    running = run_filter("scripted")
    with session(running) as beside:
        beside.envelope()
        with session(running, **{stage: "def f(): return f()\nf()"}) as each:
            assert each.reach(stage).verdict is Verdict.TEMPFAIL
        assert beside.content().verdict is Verdict.CONTINUE
