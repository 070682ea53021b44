"""What our own engine promises by itself: it sleeps, callbacks that block hold up nobody, and
descriptors that run out are waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import sysconfig
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import faults
from support.lifecycle import wait_until
from support.process import WAIT
from support.wire import Session, session

from Milter.mta import MTA, FilterClosed, MTAError, Offer, Verdict

pytestmark = [
    pytest.mark.engine("native"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]

Run = Callable[..., Any]


def passes(running: Any) -> None:
    """An honest connection is served in full."""
    with session(running) as each:
        assert each.message().verdict is Verdict.CONTINUE


# --- an idle filter ----------------------------------------------------------------------------


def switches(pid: int) -> list[str]:
    """How often each thread has gone to sleep."""
    found = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        found += re.findall(r"^voluntary_ctxt_switches:.*", status.read_text(), re.MULTILINE)
    return found


def is_at_rest(pid: int) -> bool:
    before = switches(pid)
    time.sleep(0.1)
    return switches(pid) == before


def calls_of(pid: int, meanwhile: Callable[[], object], report: Path) -> int:
    """How many system calls a process makes meanwhile, all its threads together."""
    command = ["strace", "-c", "-f", "-o", str(report), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        if "attached" not in said:
            strace.kill()
            pytest.skip(f"strace may not look here: {said.strip()}")
        try:
            meanwhile()
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate(timeout=WAIT)
    rows = [line.split() for line in report.read_text().splitlines()]
    return sum(int(row[3]) for row in rows if row and row[0][0].isdigit() and row[-1] != "total")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_an_idle_filter_sleeps(run_filter: Run, tmp_path: Path) -> None:
    """For ten seconds, with connections that are open and after a message."""
    running = run_filter("scripted")
    passes(running)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(running.mta(offer=Offer())).connect_info("client.example")
        wait_until(lambda: is_at_rest(running.pid), "it never rests")
        assert calls_of(running.pid, lambda: time.sleep(10), tmp_path / "idle") <= 5
    assert calls_of(running.pid, lambda: passes(running), tmp_path / "busy") > 20
    assert running.stop() == 0


# Keeps nothing, and says at HELO how much is allocated.
IN_USE = """
import ctypes

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]

def tell(ctx, name):
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Allocated
    say(mallinfo().uordblks)
    return milter.CONTINUE

milter.set_connect_callback(lambda ctx, *args: milter.CONTINUE)
milter.set_helo_callback(tell)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="malloc does not tell what is in use"
)
def test_idle_connections_take_little_memory(run_filter: Run) -> None:
    """Beside their objects, which have an allocator of their own; also after a message."""
    running = run_filter("scripted", IN_USE)
    macros = {"j": "mail.example.org", "{daemon_name}": "smtp", "v": "Postfix 3.7.11"}
    count, told = 200, 0

    def connected() -> MTA:
        mta = running.mta(offer=Offer())
        stack.enter_context(mta)
        mta.connect_info("client.example", macros=macros)
        return mta

    def in_use() -> int:
        nonlocal told
        told += 1
        asking.helo("client.example")
        return int(running.wait_for("negotiate (", told)[len("negotiate (") : -len(",)")])

    with contextlib.ExitStack() as stack:
        asking = connected()
        in_use()
        before = in_use()
        idle = [connected() for _ in range(count)]
        took = [(in_use() - before) / count]
        for mta in idle:
            mta.mail("<alice@example.com>")
            mta.rcpt("<bob@example.org>")
            mta.data()
            mta.header("Subject", "hello")
            mta.eoh()
            assert mta.eom().verdict is Verdict.CONTINUE
        took.append((in_use() - before) / count)
        assert max(took) < 768, took
    assert running.stop() == 0


# --- callbacks that block ----------------------------------------------------------------------


def test_a_callback_that_blocks_delays_no_other(run_filter: Run) -> None:
    """On another connection an answer takes a few milliseconds, now and then more where the machine
    is busy, and never as long as the one that blocks.
    """
    running = run_filter("scripted")
    with running.mta(offer=Offer()) as mta, session(running) as beside:
        beside.connect()
        blocking = Session(running, mta, {"helo": "import time; say('blocks'); time.sleep(2)"})
        blocking.connect()
        mta.send_packet(b"H", b"client.example\0")
        assert blocking.next() == ("blocks",)
        took = []
        while not select.select([mta], [], [], 0)[0]:
            began = time.monotonic()
            assert beside.mta.mail("<alice@example.com>").verdict is Verdict.CONTINUE
            beside.mta.abort()
            took.append(time.monotonic() - began)
        assert mta.read_packet().command == b"c"
    print(f"{len(took)} answers, p99 {1e3 * statistics.quantiles(took, n=100)[98]:.2f} ms")
    assert len(took) > 10
    assert statistics.quantiles(took, n=100)[98] < 0.1
    assert max(took) < 1


# How many callbacks began while another one waited, of how many.
LOOKS_UP = """
import time
waiting = beside = count = 0

def look_up(ctx, name):
    global waiting, beside, count
    count += 1
    beside += waiting > 0
    waiting += 1
    time.sleep(0.0003)
    waiting -= 1
    return milter.CONTINUE

milter.set_helo_callback(look_up)
milter.set_envfrom_callback(lambda ctx, *args: say("beside", beside, count) or milter.CONTINUE)
"""


def test_callbacks_that_wait_briefly_wait_at_the_same_time(run_filter: Run) -> None:
    """As for a database on the same machine: too short for the watch to notice."""
    running = run_filter("scripted", LOOKS_UP)
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(running.mta(offer=Offer())) for _ in range(8)]
        for each in several:
            each.connect_info("client.example")
        for _ in range(50):
            for each in several:
                each.send_packet(b"H", b"client.example\0")
            for each in several:
                assert each.read_packet().command == b"c"
        several[0].send_packet(b"M", b"<alice@example.com>\0")
        assert several[0].read_packet().command == b"c"
        beside, count = map(int, re.findall("[0-9]+", running.wait_for("beside")))
    assert beside > count / 2, (beside, count)  # which threads without a common lock count roughly


# Each header takes 0.1 ms of the processor: too short for the watch, and for a slow step.
COMPUTES = """
import time
count = 0

def compute(ctx, name, value):
    global count
    count += 1
    until = time.perf_counter() + 0.0001
    while time.perf_counter() < until:
        pass
    return milter.NOREPLY

milter.set_header_callback(compute)
milter.set_helo_callback(lambda ctx, name: say("helo after", count) or milter.CONTINUE)
"""


def unread_by_peer(mta: MTA) -> int:
    """How many bytes of a unix socket's its other end has not taken yet."""
    return struct.unpack("i", fcntl.ioctl(mta, termios.TIOCOUTQ, bytes(4)))[0]


def test_what_one_connection_sends_at_once_keeps_no_other_waiting(run_filter: Run) -> None:
    """Headers that need no answer, 1,500 of them in one write."""
    running = run_filter("scripted", COMPUTES, "[options] = args; options[1] &= milter.P_NR_HDR")
    with running.mta(offer=Offer()) as mta, running.mta(offer=Offer()) as beside:
        mta.connect_info("client.example")
        beside.connect_info("client.example")
        mta.mail("<alice@example.com>")
        mta.rcpt("<bob@example.org>")
        mta.send_raw((struct.pack("!I", 5) + b"La\0b\0") * 1500)
        wait_until(lambda: unread_by_peer(mta) == 0, "the filter has read all")
        beside.helo("client.example")
        count = int(re.findall("[0-9]+", running.wait_for("helo after"))[0])
    assert count < 1500


# A thread that has the interpreter lock for 200 ms at a time, as code in C may.
KEEPS_THE_LOCK = """
import ctypes, threading, time

def keep_the_lock():
    while True:
        ctypes.PyDLL(None).usleep(200_000)
        time.sleep(0.001)

threading.Thread(target=keep_the_lock, daemon=True).start()
"""


@pytest.mark.skipif(
    sysconfig.get_config_var("Py_GIL_DISABLED") == 1, reason="there is no lock to keep"
)
def test_who_waited_for_the_interpreter_lock_delays_no_other(
    run_filter: Run, tmp_path: Path
) -> None:
    """A callback that blocks is noticed also where it began long after its batch did."""
    running = run_filter("scripted", KEEPS_THE_LOCK)
    goes_on = f"""
        import os, time
        until = time.monotonic() + {WAIT}
        while not os.path.exists({str(tmp_path)!r} + "/" + stage) and time.monotonic() < until:
            time.sleep(0.02)
        say(os.path.exists({str(tmp_path)!r} + "/" + stage))
        """
    stages = ["helo", "envfrom", "envrcpt", "data"]  # each is slow once: that has to be noticed
    with running.mta(offer=Offer()) as mta, session(running) as beside:
        blocking = Session(running, mta, dict.fromkeys(stages, goes_on))
        blocking.connect()
        beside.connect()
        for count, stage in enumerate(stages, 1):
            packet = [b"Hx\0", b"M<a@example.com>\0", b"R<b@example.com>\0", b"T"][count - 1]
            mta.send_packet(packet[:1], packet[1:])
            assert beside.mta.mail("<alice@example.com>").verdict is Verdict.CONTINUE
            assert beside.mta.rcpt("<bob@example.org>").verdict is Verdict.CONTINUE
            beside.mta.abort()
            (tmp_path / stage).touch()
            assert blocking.next(count) == (True,)
            assert mta.read_packet().command == b"c"
    assert running.stop() == 0


# --- MTAs that do not read ---------------------------------------------------------------------


def connected_socket(running: Any) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(running.socket.partition(":")[2])
    return sock


def test_an_mta_that_reads_nothing_is_given_up(run_filter: Run) -> None:
    """Also where what it sent ahead waits for its turn."""
    running = run_filter("scripted", "milter.settimeout(1)")
    bodies = {"eom": "ctx.replacebody(b'x' * 200_000)"}
    message = [b"M<alice@example.com>\0", b"R<bob@example.org>\0", b"T", b"N", b"E"]
    passes(running)
    with connected_socket(running) as sock:
        talking = Session(running, MTA(sock, offer=Offer()), bodies)
        talking.connect()
        sock.settimeout(WAIT)  # MTA has made it one that does not wait
        sock.sendall(50 * b"".join(len(packet).to_bytes(4, "big") + packet for packet in message))
        talking.said()  # to its end
    passes(running)
    assert running.stop() == 0


def test_large_packets_of_many_connections_keep_apart(run_filter: Run) -> None:
    """Also where their halves come in turns, from more connections than memory is kept for."""
    running = run_filter("scripted")
    bodies = {"body": "say(len(args[0]), set(args[0]))"}
    largest = 65535
    passes(running)
    with contextlib.ExitStack() as stack:
        each = []
        for _ in range(12):
            sock = stack.enter_context(connected_socket(running))
            talking = Session(running, MTA(sock, offer=Offer()), bodies)
            talking.envelope()
            talking.mta.eoh()
            sock.settimeout(WAIT)
            each.append((sock, talking))
        for turn in range(3):
            size = largest - 9000 * turn  # the same memory, with other lengths
            chunks = [
                (size + 1).to_bytes(4, "big") + b"B" + bytes([number + turn]) * size
                for number in range(len(each))
            ]
            for begin, end in ((0, 20_000), (20_000, 50_000), (50_000, size + 5)):
                for number, (sock, _) in enumerate(each):
                    sock.sendall(chunks[number][begin:end])
            for number, (sock, talking) in enumerate(each):
                assert sock.recv(5, socket.MSG_WAITALL) == b"\0\0\0\1c"
                assert talking.next(turn + 1) == (size, {number + turn})
    assert running.stop() == 0


def test_after_half_a_packet_nothing_follows(run_filter: Run, tmp_path: Path) -> None:
    """Or the MTA would take it for the rest of what the filter gave up to write."""
    go_on = tmp_path / "go on"
    running = run_filter("scripted", "milter.settimeout(1)")
    bodies = {
        "eom": f"""
        import os, time
        attempt(lambda: ctx.replacebody(b'x' * 5_000_000))
        while not os.path.exists({str(go_on)!r}):
            time.sleep(0.01)
        """
    }
    passes(running)
    with connected_socket(running) as sock:
        mta = MTA(sock, offer=Offer())
        talking = Session(running, mta, bodies)
        talking.envelope()
        mta.eoh()
        mta.send_packet(b"E", b"")
        assert talking.next()[0] == "raised"
        sock.settimeout(WAIT)
        received = b""
        while select.select([sock], [], [], 0)[0]:
            received += sock.recv(1 << 20)
        go_on.touch()
        while more := sock.recv(1 << 20):
            received += more
    assert received.startswith((65536).to_bytes(4, "big") + b"bxxx")
    assert received.endswith(b"xxx")
    assert running.stop() == 0


def test_what_came_in_time_is_served_late(run_filter: Run) -> None:
    """The filter had no time itself for longer than it waits for its MTAs: nobody is late."""
    running = run_filter("scripted", "milter.settimeout(2)")
    with contextlib.ExitStack() as stack:
        waiting = [running.mta(offer=Offer()) for _ in range(100)]
        for mta in waiting:
            stack.callback(mta.close)
            mta.connect_info("client.example")
        running.process.send_signal(signal.SIGSTOP)
        try:
            for mta in waiting:
                mta.send_packet(b"H", b"client.example\0")
            time.sleep(2.5)
        finally:
            running.process.send_signal(signal.SIGCONT)
        assert {mta.read_packet().command for mta in waiting} == {b"c"}
        with pytest.raises(FilterClosed):  # who is late himself is given up
            waiting[0].read_packet()
    assert running.stop() == 0


def test_no_time_at_all_is_enough_to_be_served(run_filter: Run) -> None:
    running = run_filter("scripted", "milter.settimeout(0)")
    passes(running)
    assert running.stop() == 0


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_a_stop_cuts_no_answer_short(run_filter: Run, free_port: Callable[[], int]) -> None:
    """What is due to an MTA is written, also where its network takes it slowly."""
    size, port = 250_000, free_port()
    running = run_filter("scripted", socket=f"inet:{port}@127.0.0.1")
    passes(running)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        sock.connect(("127.0.0.1", port))
        mta = MTA(sock, offer=Offer(), timeout=WAIT)
        talking = Session(running, mta, {"eom": f"ctx.replacebody(b'x' * {size})\nsay('written')"})
        talking.envelope()
        mta.eoh()
        mta.send_packet(b"E", b"")
        assert talking.next() == ("written",)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(port), "it goes on listening")
        while (packet := mta.read_packet()).command == b"b":
            size -= len(packet.data)
        assert (packet.command, size) == (b"c", 0)
    assert running.wait() == 0


def test_the_longest_timeouts_are_long(run_filter: Run) -> None:
    """In milliseconds they are more than an int holds."""
    running = run_filter("scripted", "milter.settimeout(536870912)")
    size = 5_000_000
    bodies = {"eom": f"say('writes')\nctx.replacebody(b'x' * {size})"}
    with running.mta(offer=Offer()) as mta:
        talking = Session(running, mta, bodies)
        talking.envelope()
        mta.eoh()
        mta.send_packet(b"E", b"")
        assert talking.next() == ("writes",)
        while (packet := mta.read_packet()).command == b"b":
            size -= len(packet.data)
        assert (packet.command, size) == (b"c", 0)
    assert running.stop() == 0


# --- descriptors -------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_descriptors_that_run_out_are_waited_for(run_filter: Run) -> None:
    """That is told once, takes no processor time, and ends by itself."""
    running = run_filter("scripted")
    passes(running)
    used = len(os.listdir(f"/proc/{running.pid}/fd"))
    _, most = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (used + 2, most))
    with contextlib.ExitStack() as stack:
        served: list[MTA] = []
        with pytest.raises(MTAError):
            while len(served) < 8:
                served.append(stack.enter_context(running.mta(offer=Offer(), timeout=1)))
        assert served
        waiting = socket.socket(socket.AF_UNIX)
        stack.callback(waiting.close)
        waiting.connect(running.socket.partition(":")[2])
        before = cpu_seconds(running.pid)
        time.sleep(2.5)  # it tries again meanwhile, once a second
        assert cpu_seconds(running.pid) - before < 0.3
        assert running.output.count("cannot accept connections for now") == 1, running.output
        for old in served:  # each makes room for one that waits, and then there is none again
            old.close()
            mta = stack.enter_context(MTA(waiting, offer=Offer(), timeout=WAIT))
            assert mta.connect_info("client.example").verdict is Verdict.CONTINUE
            waiting = stack.enter_context(connected_socket(running))
        assert running.output.count("cannot accept connections for now") == 1, running.output
    passes(running)
    assert running.stop() == 0


@pytest.mark.skipif(not faults.possible(), reason="system calls cannot be made to fail here")
def test_a_socket_that_cannot_be_watched_is_not_forgotten(run_filter: Run, tmp_path: Path) -> None:
    """Accepting had paused; the kernel has no room for the socket when it is to go on."""
    faulty = faults.Faults(tmp_path)
    running = run_filter("scripted", env=faulty.env)
    passes(running)
    used = len(os.listdir(f"/proc/{running.pid}/fd"))
    _, most = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (used, most))
    waiting = connected_socket(running)
    running.wait_for("cannot accept connections for now")
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (most, most))
    with faulty.failing(faults.WATCHES, 1):
        wait_until(lambda: faulty.seen >= 1, "it does not try again")
        with MTA(waiting, offer=Offer(), timeout=WAIT) as mta:
            assert mta.connect_info("client.example").verdict is Verdict.CONTINUE
    passes(running)
    assert running.stop() == 0


@pytest.mark.parametrize("spare", range(9))
def test_few_descriptors_when_the_filter_starts(run_filter: Run, spare: int) -> None:
    """It says why it cannot start and ends, or serves, or says why it cannot do that."""
    setup = "import os, resource\nused = len(os.listdir('/proc/self/fd')) - 1\n"
    setup += "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    setup += f"resource.setrlimit(resource.RLIMIT_NOFILE, (used + {spare}, most))"
    running = run_filter("scripted", setup)

    def is_decided() -> bool:
        if running.process.poll() is not None or "cannot accept" in running.output:
            return True
        try:
            running.mta(offer=Offer(), wait_for=0, timeout=0.5).close()
        except (MTAError, OSError):
            return False
        return True

    wait_until(is_decided, "it neither serves nor says why")
    if running.process.poll() is None:
        assert running.stop() == 0
    else:
        assert running.wait() == 1
    served = running.process.returncode == 0 and "cannot accept" not in running.output
    assert served != ("Too many open files" in running.output)
