"""``runmilter(workers=N)``: several processes serve on one socket."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from support import faults
from support.lifecycle import (
    MESSAGE,
    RECIPIENTS,
    USERS,
    WAIT,
    Held,
    Sending,
    at_once,
    bits,
    wait_until,
)

import Milter
from Milter.mta import FilterClosed, FilterUnreachable, MTAError, Verdict

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks into /proc, and at how accepts are spread"
)


@pytest.fixture(params=["unix", "inet"])
def where(request, unix_socket, free_port):
    return unix_socket() if request.param == "unix" else f"inet:{free_port()}@127.0.0.1"


def children(pid: int) -> list[int]:
    """The workers that there are now; one that has ended and was not waited for is none."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
                    found.append(int(child))
    return sorted(found)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all("State:\tT" in (task / "status").read_text() for task in tasks)


def workers_of(filter_, count: int) -> list[int]:
    """Wait until so many workers serve."""
    wait_until(lambda: len(children(filter_.pid)) == count, f"{count} workers")
    pids = children(filter_.pid)
    for pid in pids:
        filter_.wait_for(f"(pid {pid}) serves")
    return pids


def header(result, name: str) -> str:
    return result.message[name]


def send(filter_):
    with filter_.mta() as mta:
        return mta.send(MESSAGE, recipients=RECIPIENTS)


class Load:
    """Clients that send one message after the other, until they are stopped."""

    def __init__(self, filter_, clients: int = 4) -> None:
        self._filter = filter_
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.passed: dict[str, list[float]] = {}  # by worker: when
        self.refused = 0  # before a message began
        self.lost: list[str] = []  # in the middle of one
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while not self._end.is_set():
            begun = False
            try:
                with self._filter.mta(wait_for=0) as mta:
                    mta.greet()
                    for _ in range(20):
                        if self._end.is_set():
                            return
                        begun = False
                        reply = mta.mail("<s@example.com>")
                        if reply.verdict is Verdict.TEMPFAIL:
                            assert reply.smtp.xcode == "4.3.2"
                            with self._lock:
                                self.refused += 1
                            break
                        begun = True
                        self._finish(mta)
                        begun = False
            except (MTAError, OSError) as exc:
                with self._lock:
                    if begun:
                        self.lost.append(repr(exc))
                    else:
                        self.refused += 1
                self._end.wait(0.01)

    def _finish(self, mta) -> None:
        assert mta.rcpt("<r@example.com>").verdict.goes_on
        mta.header("Subject", "hello")
        mta.eoh()
        mta.body(b"body\r\n")
        reply = mta.eom()
        assert reply.verdict is Verdict.ACCEPT
        worker = next(
            m.value.decode().strip() for m in reply.modifications if m.name == b"X-Worker"
        )
        with self._lock:
            self.passed.setdefault(worker, []).append(time.monotonic())

    def wait_for(self, count: int) -> None:
        before = self.count()
        wait_until(lambda: self.count() >= before + count, f"{count} messages passed")

    def count(self) -> int:
        with self._lock:
            return sum(map(len, self.passed.values()))

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()


# --- serving ---------------------------------------------------------------------------------


def test_messages_pass_and_the_program_runs_on_in_one_process_only(run_filter, where):
    filter_ = run_filter("workers", "--init", "ok", socket=where)
    pids = workers_of(filter_, 2)
    assert header(send(filter_), "X-Worker") in map(str, pids)
    assert filter_.stop() == 0, filter_.output
    lines = filter_.output.splitlines()
    assert {line for line in lines if "init in" in line} == {f"init in {pid} 0" for pid in pids}
    assert {line for line in lines if "exit of" in line} == {f"exit of {pid}" for pid in pids}
    assert [line for line in lines if "finally" in line] == [f"finally in {filter_.pid}"]
    assert lines.count(f"end of the program in {filter_.pid}") == 1
    assert "WARNING" not in filter_.output and "ERROR" not in filter_.output
    if where.startswith("unix"):
        assert not os.path.exists(where[5:])


#: What a connection waits for the worker whose turn it is, in seconds: PATIENCE in src/workers.c.
PATIENCE = 0.003


def sockets_of(pids: list[int]) -> list[int]:
    """How many sockets each of these processes has."""
    found = []
    for pid in pids:
        links = []
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(each))
        found.append(sum(link.startswith("socket:") for link in links))
    return found


def spread(filter_, count: int) -> tuple[list[int], bool]:
    """Which connections each worker gets of so many, and whether none had to wait for its own."""
    prompt, mtas = True, []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            begin = time.monotonic()
            mtas.append(stack.enter_context(filter_.mta()))  # to the answer of whoever took it
            prompt = prompt and time.monotonic() - begin < PATIENCE
        seen = [m.send(MESSAGE, recipients=RECIPIENTS).message["X-Worker"] for m in mtas]
    return [seen.count(pid) for pid in set(seen)], prompt


@pytest.mark.parametrize("workers", [2, 3])
def test_long_connections_are_spread(run_filter, where, workers):
    """Where a worker is late for its turn, as on a busy machine, the connection has had to wait.

    Others do not wait for that worker again until it comes for one.  So such rounds are not judged,
    nor those after them until all have their share again; and no round begins before all know that
    the last one has ended.
    """
    filter_ = run_filter("workers", "--workers", str(workers), socket=where)
    pids = workers_of(filter_, workers)
    idle = sockets_of(pids)
    rounds, uneven, all_are_there, judged = 0, 0, False, []
    while len(judged) < 20 and rounds < 200:
        wait_until(lambda: sockets_of(pids) == idle, "the workers close what was closed")
        counts, prompt = spread(filter_, 2 * workers)
        rounds += 1
        even = counts == [2] * workers
        if prompt and all_are_there:
            judged.append(even)
        elif prompt:
            uneven += not even
        all_are_there = prompt and (all_are_there or even)
    assert uneven < 100, "workers that have their turn do not come back"
    if len(judged) < 20:
        pytest.skip(f"only {len(judged)} of {rounds} rounds were without delays of this machine")
    assert sum(judged) >= 19  # by chance it would be 11 to 17
    assert filter_.stop() == 0, filter_.output


def test_a_worker_that_hangs_holds_nobody_up(run_filter, where):
    filter_ = run_filter("workers", socket=where)
    pids = workers_of(filter_, 2)
    with filter_.mta() as mta:
        busy = int(mta.send(MESSAGE, recipients=RECIPIENTS).message["X-Worker"])
        idle = next(pid for pid in pids if pid != busy)
        os.kill(idle, signal.SIGSTOP)
        try:
            wait_until(lambda: stopped(idle), "all its threads stop")
            begin = time.monotonic()
            for _ in range(50):
                with filter_.mta() as other:  # the idle one's turn
                    assert other.helo("x").verdict is Verdict.CONTINUE
            assert time.monotonic() - begin < 2
        finally:
            os.kill(idle, signal.SIGCONT)
    assert filter_.stop() == 0, filter_.output


def test_numbers_are_unique_in_all_workers_and_after_restarts(run_filter):
    filter_ = run_filter("workers")
    seen, randoms = [], []
    for _ in range(3):
        pids = workers_of(filter_, 2)
        with contextlib.ExitStack() as stack:
            mtas = [stack.enter_context(filter_.mta()) for _ in range(4)]
            results = [mta.send(MESSAGE, recipients=RECIPIENTS) for mta in mtas]
        seen += [int(header(result, "X-Number")) for result in results]
        randoms += [header(result, "X-Random") for result in results]
        os.kill(pids[0], signal.SIGKILL)
        filter_.wait_for(f"(pid {pids[0]}) was killed by SIGKILL")
    assert seen == list(range(1, 13))
    assert len(set(randoms)) == 12
    assert filter_.stop() == 0, filter_.output


def test_one_for_each_core(run_filter):
    filter_ = run_filter("workers", "--workers", "0", "--init", "ok")
    result = send(filter_)
    cores = len(os.sched_getaffinity(0))
    if cores > 1:
        workers_of(filter_, cores)
    else:
        assert header(result, "X-Worker") == str(filter_.pid)
    assert filter_.stop() == 0, filter_.output


def cores_of(pid: int) -> set[frozenset[int]]:
    """The cores that the threads of a process may use."""
    return {
        frozenset(os.sched_getaffinity(int(task.name)))
        for task in Path(f"/proc/{pid}/task").iterdir()
    }


def test_workers_keep_to_a_core_each_if_asked(run_filter):
    mine = sorted(os.sched_getaffinity(0))
    filter_ = run_filter("workers", "--workers", "3", "--pin")
    pids = workers_of(filter_, 3)
    send(filter_)
    place = {pid: number for number, pid in enumerate(order_of_start(filter_))}
    wanted = [{frozenset([mine[number % len(mine)]])} for number in range(3)]
    assert [cores_of(pid) for pid in sorted(pids, key=place.__getitem__)] == wanted
    assert cores_of(filter_.pid) == {frozenset(mine)}
    victim = order_of_start(filter_)[1]
    os.kill(victim, signal.SIGKILL)
    filter_.wait_for(f"(pid {victim}) was killed by SIGKILL")
    (again,) = set(workers_of(filter_, 3)) - set(pids)
    assert cores_of(again) == wanted[1]
    assert filter_.stop() == 0, filter_.output


def order_of_start(filter_) -> list[int]:
    """The first process of each worker, by the worker's number."""
    first = dict(reversed(re.findall(r"worker (\d) \(pid (\d+)\) serves", filter_.output)))
    return [int(first[number]) for number in sorted(first)]


def test_workers_go_where_they_like_if_not_asked(run_filter):
    filter_ = run_filter("workers")
    for pid in workers_of(filter_, 2):
        assert cores_of(pid) == {frozenset(os.sched_getaffinity(0))}
    assert filter_.stop() == 0, filter_.output


@pytest.mark.parametrize("pin", [1, "yes", []])
def test_pinning_is_yes_or_no(pin):
    with pytest.raises(TypeError, match="pin_workers must be True or False, not"):
        Milter.runmilter("bad", "unix:/nowhere/socket", workers=2, pin_workers=pin)


def test_pinning_where_the_system_cannot(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(Milter.error, match="pin_workers: this system does not bind"):
        Milter.runmilter("bad", "unix:/nowhere/socket", workers=2, pin_workers=True)


def test_one_worker_is_this_process(run_filter):
    filter_ = run_filter("workers", "--workers", "1", "--init", "ok")
    assert header(send(filter_), "X-Worker") == str(filter_.pid)
    assert children(filter_.pid) == []
    assert filter_.stop() == 0, filter_.output
    assert f"init in {filter_.pid} 0" in filter_.output


PLAIN = """
import os, signal, sys
import Milter

class Filter(Milter.Base):
    pass

Milter.factory = Filter
"""


def test_what_the_program_has_said_is_said_once(run_filter):
    """What stands in a stream's buffer is not each worker's, too."""
    source = PLAIN + "print('begins')\nMilter.runmilter('plain', sys.argv[1], workers=2)\n"
    running = run_filter(source=source, env={"PYTHONUNBUFFERED": ""})
    running.mta().close()
    assert running.stop() == 0
    assert running.output.count("begins") == 1


def test_a_wakeup_descriptor_that_is_closed_ends_no_worker(run_filter):
    source = PLAIN + (
        "read, write = os.pipe()\n"
        "os.set_blocking(write, False)\n"
        "signal.set_wakeup_fd(write)\n"
        "os.close(read)\n"
        "os.close(write)\n"
        "Milter.runmilter('plain', sys.argv[1], workers=2)\n"
    )
    running = run_filter(source=source)
    with running.mta() as mta:
        mta.greet()
    assert running.stop() == 0


@pytest.mark.engine("native")
@pytest.mark.parametrize("how", ["workers", "child"])
def test_a_process_that_has_served_may_fork_what_serves_next(run_filter, how):
    """On our own engine, which serves again."""
    source = PLAIN + (
        "signal.signal(signal.SIGALRM, lambda *_: Milter.stop())\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "Milter.runmilter('plain', sys.argv[1] + '.first')\n"
        "print('again', flush=True)\n"
        "workers = 2 if sys.argv[2] == 'workers' else 1\n"
        "if workers == 1 and (pid := os.fork()):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "Milter.runmilter('plain', sys.argv[1], workers=workers)\n"
    )
    running = run_filter(None, how, source=source)
    running.wait_for("again")
    with running.mta() as mta:
        mta.greet()
    assert running.stop() == 0


RUNS = [(2, 2), (2, 1), (1, 2), (2, 4, 1, 3)]


@pytest.mark.engine("native")
@pytest.mark.parametrize("runs", RUNS, ids=lambda runs: "-".join(map(str, runs)))
def test_filters_with_and_without_workers_follow_each_other(run_filter, runs):
    """In one process, as our own engine serves again; numbers go on."""
    again = [word for count in runs[1:] for word in ("--again", str(count))]
    filter_ = run_filter("workers", "--workers", str(runs[0]), *again)
    numbers = []
    for run, count in enumerate(runs, 1):
        if count > 1:
            filter_.wait_for(") serves", sum(each for each in runs[:run] if each > 1))
        serving = children(filter_.pid) or [filter_.pid]
        assert len(serving) == count
        seen = set()

        def all_have_one(serving=serving, seen=seen) -> bool:
            with contextlib.ExitStack() as stack:
                mtas = [stack.enter_context(filter_.mta()) for _ in serving]
                for mta in mtas:
                    result = mta.send(MESSAGE, recipients=RECIPIENTS)
                    seen.add(int(header(result, "X-Worker")))
                    numbers.append(int(header(result, "X-Number")))
            return seen == set(serving)

        wait_until(all_have_one, "messages by all workers")
        if run < len(runs):
            with contextlib.closing(filter_.mta()) as mta:
                mta.send(MESSAGE, sender="<stop@example.com>", recipients=RECIPIENTS)
            filter_.wait_for(f"has run with {count}", runs[:run].count(count))
    assert len(set(numbers)) == len(numbers)
    assert filter_.stop() == 0, filter_.output


@pytest.mark.engine("native")
def test_a_stop_while_workers_end_is_not_for_the_next_filter(run_filter, directory):
    hold = Held(directory, "eom")
    with contextlib.closing(hold):
        filter_ = run_filter(
            "workers",
            *("--hold", f"{directory}/eom.fifo", "--handle", "WINCH", "stop", "--again", "2"),
        )
        workers_of(filter_, 2)
        with contextlib.closing(filter_.mta()) as mta:
            message = Sending(mta)
            filter_.wait_for("holds in")
            for count in (1, 2):
                filter_.process.send_signal(signal.SIGWINCH)
                filter_.wait_for("WINCH in", count)
                wait_until(lambda: len(children(filter_.pid)) == 1, "the idle worker ends")
            hold.release()
            assert message.result().accepted
        filter_.wait_for(") serves", 4)
        with contextlib.closing(filter_.mta()) as mta:
            message = Sending(mta)
            hold.release()
            assert message.result().accepted
    assert filter_.stop() == 0, filter_.output


def test_a_child_that_a_callback_forks_is_no_worker(run_filter):
    filter_ = run_filter("workers")
    with filter_.mta() as mta:
        assert mta.send(MESSAGE, sender="<fork@example.com>", recipients=RECIPIENTS).accepted
    assert filter_.wait_for("child:") == (
        "child: main: the filter is that of the process which forked this one"
    )
    assert filter_.stop() == 0, filter_.output


def test_a_child_that_stays_behind_keeps_no_port(run_filter, free_port):
    filter_ = run_filter("workers", socket=f"inet:{free_port()}@127.0.0.1")
    mta = filter_.mta()
    assert mta.send(MESSAGE, sender="<linger@example.com>", recipients=RECIPIENTS).accepted
    mta.close()  # without a farewell: the child has the connection too, and nobody ends it
    child = int(filter_.wait_for("lingers:").split()[-1])
    try:
        filter_.process.send_signal(signal.SIGTERM)
        # Its output does not end: the child has that too.
        assert filter_.process.wait(WAIT) == 0, filter_.output
        with pytest.raises(FilterUnreachable):
            filter_.mta(wait_for=0)
    finally:
        os.kill(child, signal.SIGKILL)


# --- workers that die -------------------------------------------------------------------------


def test_a_killed_worker_fails_only_its_messages(run_filter, where):
    filter_ = run_filter("workers", "--workers", "4", socket=where)
    pids = workers_of(filter_, 4)
    load = Load(filter_, 8)
    wait_until(lambda: set(map(str, pids)) <= set(load.passed), "messages by all workers")
    os.kill(pids[0], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: set(children(filter_.pid)) - set(pids), "a new worker")
    (new,) = set(children(filter_.pid)) - set(pids)
    wait_until(lambda: str(new) in load.passed, "a message by the new worker")
    took = load.passed[str(new)][0] - killed
    load.wait_for(50)
    load.stop()
    patient = "TEST_PATIENCE" in os.environ or os.getloadavg()[0] >= 2 * (os.cpu_count() or 1)
    assert took < (5 if patient else 1)
    assert len(load.lost) <= 8  # no more than were in progress
    assert f"(pid {pids[0]}) was killed by SIGKILL" in filter_.output
    assert filter_.stop() == 0, filter_.output


def test_sigterm_under_load_loses_nothing(run_filter, where):
    filter_ = run_filter("workers", socket=where)
    workers_of(filter_, 2)
    load = Load(filter_, 8)
    load.wait_for(400)  # all have connected anew
    wait_until(lambda: len(load.passed) == 2, "messages by both workers")
    filter_.process.send_signal(signal.SIGTERM)
    assert filter_.wait() == 0
    load.stop()
    assert load.lost == []
    assert load.refused > 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ended with status 1"),
        ("exit", "ended with status 7"),
        ("kill", "was killed by SIGKILL"),
    ],
)
def test_workers_that_always_die_end_the_filter(run_filter, how, reason):
    filter_ = run_filter("workers", "--init", how)
    assert filter_.wait() == 2
    assert re.search(
        rf"failed: workers die at once, 5 times in a row; the last: worker \d \(pid \d+\) {reason}",
        filter_.output,
    )
    assert not os.path.exists(filter_.socket[5:])
    if how == "raise":
        assert "RuntimeError: no database" in filter_.output


def test_while_others_serve_it_does_not_give_up(run_filter, directory):
    filter_ = run_filter("workers", "--init", f"except:{directory}/count")
    pids = workers_of(filter_, 2)
    os.kill(pids[0], signal.SIGKILL)
    filter_.wait_for("status 1; a new one is started in", 5)
    assert header(send(filter_), "X-Worker") == str(pids[1])
    took = time.monotonic()
    assert filter_.stop() == 0  # in the pause
    assert at_once(time.monotonic() - took)


@pytest.mark.skipif(not faults.possible(), reason="system calls cannot be made to fail here")
@pytest.mark.parametrize(
    ("kind", "first", "told"),
    [
        (faults.PROCESSES, 1, r"worker 1 cannot be started: .*; next attempt in"),
        (faults.THREADS_OF_MAIN, 1, r"worker 1 \(pid \d+\) ended with status 1; a new one"),
        # The one that watches the supervisor: without it the worker serves nobody.
        pytest.param(
            faults.THREADS_OF_MAIN,
            2,
            r"worker 1 \(pid \d+\) ended with status 0; a new one",
            marks=pytest.mark.engine("libmilter"),
        ),
    ],
    ids=["process", "engine", "porter"],
)
def test_a_worker_that_lacks_a_process_or_a_thread(run_filter, tmp_path, where, kind, first, told):
    """It is started again until it can be; the other one serves meanwhile."""
    faulty = faults.Faults(tmp_path)
    faulty.env.pop("PYTHONMALLOC", None)
    filter_ = run_filter("workers", socket=where, env=faulty.env)
    first_pid = int(re.search(r"pid (\d+)", filter_.wait_for("worker 1 (pid"))[1])
    pids = workers_of(filter_, 2)
    (other,) = set(pids) - {first_pid}
    with faulty.failing(kind, first, faults.ALWAYS):
        os.kill(first_pid, signal.SIGKILL)
        wait_until(lambda: re.search(told, filter_.output), "no word of it")
        for _ in range(3):
            assert header(send(filter_), "X-Worker") == str(other)
    wait_until(lambda: set(workers_of(filter_, 2)) - set(pids), "a new worker")

    def serving() -> set[str]:
        with contextlib.ExitStack() as stack:
            mtas = [stack.enter_context(filter_.mta()) for _ in range(4)]
            return {header(mta.send(MESSAGE, recipients=RECIPIENTS), "X-Worker") for mta in mtas}

    wait_until(lambda: len(serving()) == 2, "messages by the new worker too")
    assert filter_.stop() == 0, filter_.output


@pytest.mark.parametrize("user", USERS)
def test_a_worker_may_be_stopped_alone(run_filter, public, user):
    path = public / "s"
    filter_ = run_filter("workers", *user, socket=f"unix:{path}")
    pids = workers_of(filter_, 2)
    before = path.stat().st_ino
    os.kill(pids[0], signal.SIGTERM)
    filter_.wait_for(f"(pid {pids[0]}) ended with status 0; a new one is started now")
    assert path.stat().st_ino == before  # it is for the supervisor to remove
    assert pids[1] in workers_of(filter_, 2)
    assert send(filter_).accepted
    assert filter_.stop() == 0, filter_.output
    assert not path.exists()


# --- stopping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_drain_all(run_filter, directory, where, number):
    hold = Held(directory, "eom")
    with contextlib.closing(hold):
        filter_ = run_filter("workers", "--hold", f"{directory}/eom.fifo", socket=where)
        pids = workers_of(filter_, 2)
        mtas, messages = [], []
        for _ in range(20):  # two, where the workers are as fast as each other
            mtas.append(filter_.mta())
            messages.append(Sending(mtas[-1]))
            filter_.wait_for("holds in", len(mtas))
            if {f"holds in {pid}" for pid in pids} <= set(filter_.output.splitlines()):
                break
        filter_.process.send_signal(number)

        def refuses() -> bool:
            try:
                filter_.mta(wait_for=0).close()
            except (FilterUnreachable, FilterClosed):
                return True
            return False

        wait_until(refuses, "it still takes connections")
        for _ in messages:
            hold.release()
        results = [message.result() for message in messages]
    assert all(result.accepted for result in results)
    assert {int(header(result, "X-Worker")) for result in results} == set(pids)
    assert filter_.wait() == 0
    for mta in mtas:
        mta.close()


def test_a_signal_while_the_supervisor_looks_is_not_lost(run_filter):
    filter_ = run_filter("workers", "--end-in-the-middle")
    workers_of(filter_, 2)
    filter_.process.send_signal(signal.SIGUSR1)
    assert filter_.wait() == 0, filter_.output


def test_handlers_that_raise_come_as_often_as_they_like(run_filter, directory):
    """Not one finds the supervisor, or a message, in the middle of something."""
    hold = Held(directory, "eom")
    names = ("TERM", "HUP", "USR1", "USR2")
    handle = [word for name in names for word in ("--handle", name, "exit")]
    with contextlib.closing(hold):
        filter_ = run_filter("workers", *handle, "--hold", f"{directory}/eom.fifo")
        workers_of(filter_, 2)
        with contextlib.closing(filter_.mta()) as mta:
            message = Sending(mta)
            filter_.wait_for("holds in")
            for number in range(60):
                filter_.process.send_signal(getattr(signal, f"SIG{names[number % 4]}"))
                time.sleep(number % 3 / 1000)  # signals of one kind that wait are one
            wait_until(lambda: len(children(filter_.pid)) == 1, "the idle worker ends")
            hold.release()
            assert message.result().accepted
    assert filter_.wait() == 5, filter_.output
    assert "failed" not in filter_.output


def test_what_a_worker_registered_with_atexit_runs_to_its_end(run_filter):
    """Its handler has raised before it is told to stop: not while it ends."""
    filter_ = run_filter("workers", "--workers", "4", "--init", "late", "--handle", "TERM", "exit")
    pids = workers_of(filter_, 4)
    assert filter_.stop() == 5, filter_.output
    for pid in pids:
        assert f"has left: {pid}" in filter_.output


def test_a_stop_of_the_whole_group_is_one_stop(run_filter):
    """A service manager sends its SIGTERM to the workers too, when they may have drained."""
    filter_ = run_filter("workers", "--init", "late")
    pids = workers_of(filter_, 2)
    filter_.process.send_signal(signal.SIGTERM)
    for pid in pids:
        filter_.wait_for(f"leaves: {pid}")
        os.kill(pid, signal.SIGTERM)
    assert filter_.wait() == 0, filter_.output
    for pid in pids:
        assert f"has left: {pid}" in filter_.output
    assert "failed" not in filter_.output


def test_a_worker_whose_last_words_are_interrupted_ends(run_filter):
    filter_ = run_filter("workers", "--init", "flush")
    workers_of(filter_, 2)
    assert filter_.stop() == 0, filter_.output
    lines = filter_.output.splitlines()
    assert [line for line in lines if "finally" in line] == [f"finally in {filter_.pid}"]
    assert "failed" not in filter_.output


def test_a_stop_in_worker_init_stops_all(run_filter):
    filter_ = run_filter("workers", "--init", "stop")
    assert filter_.wait() == 0, filter_.output
    assert "failed" not in filter_.output


def test_a_stop_in_a_worker_that_drains_alone_stops_all(run_filter):
    filter_ = run_filter("workers")
    workers_of(filter_, 2)
    with contextlib.ExitStack() as stack:
        mtas: dict[str, list[object]] = {}
        while not any(len(there) == 2 for there in mtas.values()):
            mta = stack.enter_context(contextlib.closing(filter_.mta()))
            worker = mta.send(MESSAGE, recipients=RECIPIENTS).message["X-Worker"]
            mtas.setdefault(worker, []).append(mta)
        worker, (first, second) = next(item for item in mtas.items() if len(item[1]) == 2)
        assert first.mail("<a@example.com>").verdict is Verdict.CONTINUE
        os.kill(int(worker), signal.SIGTERM)

        def drains() -> bool:
            refused = second.mail("<b@example.com>").verdict is Verdict.TEMPFAIL
            second.abort()
            return refused

        wait_until(drains, "the worker takes no more")
        assert first.rcpt("<stop@example.org>").verdict is Verdict.CONTINUE
        first.abort()
    assert filter_.wait() == 0, filter_.output


def test_a_worker_may_ask_for_more_time_to_drain(run_filter, directory):
    hold = Held(directory, "eom")
    with contextlib.closing(hold):
        filter_ = run_filter(
            "workers",
            *("--hold", f"{directory}/eom.fifo", "--init", "drain", "--drain", "0", "--grace", "0"),
        )
        workers_of(filter_, 2)
        with contextlib.closing(filter_.mta()) as mta:
            message = Sending(mta)
            filter_.wait_for("holds in")
            filter_.process.send_signal(signal.SIGTERM)
            # By the supervisor's own time it would be killed after two seconds.
            deadline = time.monotonic() + 2.5
            while time.monotonic() < deadline:
                assert filter_.process.poll() is None and children(filter_.pid)
                time.sleep(0.05)
            hold.release()
            assert message.result().accepted
    assert filter_.wait() == 0, filter_.output


def test_temporary_directories_of_workers_go_with_them(run_filter, directory):
    filter_ = run_filter("workers", "--init", "temporary", "--directory", str(directory))
    workers_of(filter_, 2)
    names = sorted(name.partition("-")[0] for name in os.listdir(directory) if "-" in name)
    assert names == ["program", "worker", "worker"]
    victim = children(filter_.pid)[0]
    os.kill(victim, signal.SIGTERM)
    filter_.wait_for(f"(pid {victim}) ended with status 0; a new one is started now")
    assert any(name.startswith("program-") for name in os.listdir(directory))
    workers_of(filter_, 2)
    assert filter_.stop() == 0, filter_.output
    assert not [name for name in os.listdir(directory) if "-" in name]


def test_a_worker_that_does_not_end_is_killed_and_reported(run_filter):
    filter_ = run_filter("workers", "--init", "hang", "--drain", "0")
    filter_.wait_for("init in", 2)
    assert filter_.stop() == 2
    assert "failed: the filter did not stop well: worker" in filter_.output
    assert filter_.output.count("did not end in time and was killed") >= 2


def test_a_stop_while_workers_prepare(run_filter):
    filter_ = run_filter("workers", "--init", "sleep")
    filter_.wait_for("init in", 2)
    begin = time.monotonic()
    assert filter_.stop() == 0, filter_.output
    assert at_once(time.monotonic() - begin)


def test_stop_in_a_callback_stops_all(run_filter):
    filter_ = run_filter("workers")
    with contextlib.closing(filter_.mta()) as mta:
        assert mta.send(MESSAGE, sender="<stop@example.com>", recipients=RECIPIENTS).accepted
    assert filter_.wait() == 0
    assert "WARNING" not in filter_.output


def test_exit_in_a_callback_stops_all_with_its_status(run_filter):
    filter_ = run_filter("workers")
    with contextlib.closing(filter_.mta()) as mta:
        mta.send(MESSAGE, sender="<exit@example.com>", recipients=RECIPIENTS)
    assert filter_.wait() == 3


def test_workers_end_when_the_supervisor_is_killed(run_filter, where, directory):
    hold = Held(directory, "eom")
    with contextlib.closing(hold):
        filter_ = run_filter("workers", "--hold", f"{directory}/eom.fifo", socket=where)
        pids = workers_of(filter_, 2)
        with contextlib.closing(filter_.mta()) as mta:
            message = Sending(mta)
            holder = int(filter_.wait_for("holds in").split()[-1])
            filter_.process.kill()
            wait_until(lambda: [p for p in pids if alive(p)] == [holder], "the idle one ends")
            hold.release()
            assert message.result().accepted
        wait_until(lambda: not any(map(alive, pids)), "the workers end")
    again = run_filter("workers", socket=where)
    assert send(again).accepted
    assert again.stop() == 0, again.output


def test_workers_that_prepare_end_with_the_supervisor(run_filter):
    filter_ = run_filter("workers", "--init", "hang")
    filter_.wait_for("init in", 2)
    pids = children(filter_.pid)
    filter_.process.kill()
    wait_until(lambda: not any(map(alive, pids)), "the workers end")


def test_a_socket_that_another_filter_made_is_left(run_filter):
    old = run_filter("workers")
    workers_of(old, 2)
    new = run_filter("workers", socket=old.socket)
    workers_of(new, 2)
    assert old.stop() == 0
    assert send(new).accepted
    assert new.stop() == 0


# --- signals of the application ---------------------------------------------------------------


def test_a_handler_runs_in_all_processes(run_filter):
    filter_ = run_filter("workers", "--handle", "HUP", "note", "--handle", "USR1", "note")
    pids = [filter_.pid, *workers_of(filter_, 2)]
    for name in ("HUP", "USR1"):
        os.kill(filter_.pid, getattr(signal, f"SIG{name}"))
        for pid in pids:
            filter_.wait_for(f"{name} in {pid}")
    assert send(filter_).accepted
    assert filter_.stop() == 0, filter_.output


@pytest.mark.parametrize(("action", "status"), [("stop", 0), ("exit", 5)])
def test_a_handler_may_stop_the_filter(run_filter, action, status):
    filter_ = run_filter("workers", "--handle", "TERM", action)
    workers_of(filter_, 2)
    assert filter_.stop() == status
    assert f"TERM in {filter_.pid}" in filter_.output
    assert f"finally in {filter_.pid}" in filter_.output


def started_by(filter_, whom: object) -> set[tuple[str, frozenset[int]]]:
    """What was started there, and which signals it has blocked."""
    filter_.wait_for(f"thread by {whom}, blocked:")
    lines = re.findall(rf"^(\w+) by {whom}, blocked: (\w+)", filter_.output, re.MULTILINE)
    return {(way, frozenset(bits(mask))) for way, mask in lines}


@pytest.mark.parametrize("blocked", [(), ("WINCH",)])
def test_what_a_handler_starts_has_the_signals_of_the_program(run_filter, blocked):
    """In the supervisor as in the workers: programs, forks and threads."""
    options = ["--block", *blocked] if blocked else []
    filter_ = run_filter("workers", "--handle", "USR1", "show", *options)
    pids = [filter_.pid, *workers_of(filter_, 2)]
    os.kill(filter_.pid, signal.SIGUSR1)
    mask = frozenset(getattr(signal, f"SIG{name}") for name in blocked)
    for pid in pids:
        ways = started_by(filter_, pid)
        assert ways == {(way, mask) for way in ("subprocess", "spawn", "fork", "thread")}
    assert filter_.stop() == 0, filter_.output


def test_what_a_handler_of_the_log_starts_has_the_signals_of_the_program(run_filter):
    filter_ = run_filter("workers", "--show-in-log")
    filter_.wait_for("serves", 2)
    assert {mask for _, mask in started_by(filter_, "log")} == {frozenset()}
    assert filter_.stop() == 0, filter_.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_child_that_a_handler_forks_ends_by_a_signal(run_filter, number):
    filter_ = run_filter("workers", "--handle", "WINCH", "fork")
    workers_of(filter_, 2)
    os.kill(filter_.pid, signal.SIGWINCH)
    os.kill(int(filter_.wait_for("waits:").split()[-1]), number)
    assert filter_.wait_for("waited:") == f"waited: {-number}"
    assert send(filter_).accepted
    assert filter_.stop() == 0, filter_.output


def test_a_signal_to_a_child_that_a_handler_forks_is_not_for_the_workers(run_filter):
    """The program handles it: the child runs that handler, and nobody else."""
    filter_ = run_filter("workers", "--handle", "WINCH", "fork", "--handle", "TERM", "exit")
    workers_of(filter_, 2)
    os.kill(filter_.pid, signal.SIGWINCH)
    child = int(filter_.wait_for("waits:").split()[-1])
    os.kill(child, signal.SIGTERM)
    assert filter_.wait_for("waited:") == "waited: 5"
    assert send(filter_).accepted
    os.kill(filter_.pid, signal.SIGTERM)
    assert filter_.wait() == 5
    lines = [line for line in filter_.output.splitlines() if line.startswith("TERM in")]
    assert lines[0] == f"TERM in {child}"
    assert f"TERM in {filter_.pid}" in lines


def test_a_child_that_a_handler_forks_is_no_supervisor(run_filter):
    """There the call returns; the filter goes on."""
    filter_ = run_filter("workers", "--handle", "WINCH", "fork-on")
    pids = workers_of(filter_, 2)
    os.kill(filter_.pid, signal.SIGWINCH)
    assert filter_.wait_for("waited:") == "waited: 0"
    assert filter_.output.count("finally in") == 1
    assert children(filter_.pid) == pids
    assert send(filter_).accepted
    assert filter_.stop() == 0, filter_.output


def test_a_signal_to_a_thread_that_a_handler_started_is_not_lost(run_filter):
    filter_ = run_filter("workers", "--handle", "USR1", "thread", "--handle", "USR2", "note")
    workers_of(filter_, 2)
    os.kill(filter_.pid, signal.SIGUSR1)
    filter_.wait_for(f"thread is over in {filter_.pid}")
    filter_.wait_for(f"USR2 in {filter_.pid}")
    assert filter_.stop() == 0, filter_.output


# --- refused ----------------------------------------------------------------------------------


def test_other_threads_are_refused(run_filter):
    filter_ = run_filter("workers", "--thread")
    assert filter_.wait() == 2
    assert "cannot be forked while other threads run ('pool')" in filter_.output
    assert not os.path.exists(filter_.socket[5:])


def test_threads_that_python_does_not_know_are_refused(run_filter):
    source = """
import ctypes, sys, time, Milter, milter
libc = ctypes.CDLL(None)
thread = ctypes.c_ulong()
pause = ctypes.cast(libc.pause, ctypes.c_void_p)
assert libc.pthread_create(ctypes.byref(thread), None, pause, None) == 0
try:
    Milter.runmilter("native", sys.argv[1], workers=2)
except milter.error as exc:
    print(exc, flush=True)
    sys.exit(2)
"""
    filter_ = run_filter(source=source)
    assert filter_.wait() == 2
    assert "not of Python" in filter_.output


@pytest.mark.parametrize("workers", [-1, 513])
def test_a_bad_number_is_refused(workers):
    with pytest.raises(Milter.error, match=r"workers must be from 0 .* to 512") as caught:
        Milter.runmilter("bad", "unix:/nowhere/socket", workers=workers)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("workers", [True, "2", 1.5, None])
def test_what_is_no_number_is_refused(workers):
    with pytest.raises(TypeError, match="workers must be an int, not"):
        Milter.runmilter("bad", "unix:/nowhere/socket", workers=workers)


def test_an_init_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="worker_init must be callable"):
        Milter.runmilter("bad", "unix:/nowhere/socket", workers=2, worker_init="open_pool")
