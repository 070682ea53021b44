"""Stopping with messages in progress: they end whole, nothing new begins."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from support import faults
from support.lifecycle import MESSAGE, Held, Sending, at_once, end, gone, idle, wait_until

from Milter.mta import FilterClosed, Stage, Verdict, parse_socket

main_thread = pytest.mark.parametrize(
    "where", [(), ("--threads", "2"), ("--on", "daemon", "--handle", "TERM", "stop")]
)


@pytest.fixture
def held(run_filter, directory):
    """Starts a filter that holds messages in a callback."""
    cleanup = contextlib.ExitStack()

    def start(callback, *options, **keywords):
        hold = Held(directory, callback)
        cleanup.callback(hold.close)
        return run_filter("lifecycle", *hold.options, *options, **keywords), hold

    with cleanup:
        yield start


@pytest.fixture
def connect():
    """Connects to a filter; closes what is left open at the end."""
    with contextlib.ExitStack() as stack:

        def open_(filter_, **options):
            mta = filter_.mta(**options)
            stack.callback(mta.close)
            return mta

        yield open_


def is_complete(result):
    """The message has all of the filter's changes and its verdict."""
    assert result.verdict is Verdict.ACCEPT
    assert result.message["X-Stamp"] == "before"
    assert result.message["Subject"] == "changed"
    assert [r.address for r in result.recipients] == ["r@example.com", "added@example.com"]
    assert result.message.body == b"new body\r\n"
    return True


def listening(pid):
    """The unix sockets on which a process listens: their lines in /proc/net/unix."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(descriptor))
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        lines = [line.split() for line in file]
    return [line for line in lines if line[3] == "00010000" and f"socket:[{line[6]}]" in links]


def test_nobody_can_reach_a_filter_that_stops(held, connect):
    filter_, hold = held("eom")
    message = Sending(connect(filter_))
    filter_.wait_for("in eom")
    assert len(listening(filter_.pid)) == 1
    os.kill(filter_.pid, signal.SIGTERM)
    wait_until(lambda: listening(filter_.pid) == [], "somebody could connect")
    hold.release()
    assert is_complete(message.result())
    assert filter_.wait() == 0


# --- messages in progress ------------------------------------------------------------------


@main_thread
@pytest.mark.parametrize("callback", ["envfrom", "header", "body", "eom"])
def test_a_message_in_progress_ends_whole(held, connect, callback, where):
    filter_, hold = held(callback, *where)
    mta = connect(filter_)
    message = Sending(mta)
    filter_.wait_for(f"in {callback}")
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    hold.release()
    assert is_complete(message.result())
    mta.expect_close()
    assert filter_.wait() == 0
    assert "in close" in filter_.output
    assert "after runmilter" in filter_.output
    assert "in abort" not in filter_.output


@pytest.mark.skipif(not faults.possible(), reason="system calls cannot be made slow here")
def test_the_drain_waits_for_the_reply_and_not_for_the_callback(held, connect, tmp_path):
    """libmilter writes it after the callback has returned, here half a second after."""
    slow = faults.Faults(tmp_path)
    slow.env.pop("PYTHONMALLOC", None)
    filter_, hold = held("eom", env=slow.env)
    message = Sending(connect(filter_))
    filter_.wait_for("in eom")
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    with slow.failing(faults.SLOW_SENDING, 1, faults.ALWAYS):
        hold.release()
        assert is_complete(message.result())
        assert filter_.wait() == 0
    assert slow.seen > 0


def test_a_message_between_two_steps_ends_whole(run_filter, connect):
    filter_ = run_filter("lifecycle")
    mta = connect(filter_)
    mta.greet()
    mta.mail("<s@example.com>")
    mta.rcpt("<r@example.com>")
    mta.header("Subject", "hello")
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    assert mta.eoh().verdict.goes_on
    assert mta.body(b"body\r\n").verdict is Verdict.CONTINUE
    reply = mta.eom()
    assert reply.verdict is Verdict.ACCEPT
    assert len(reply.modifications) == 4
    mta.expect_close()
    assert filter_.wait() == 0


def test_many_messages_end_whole(held, connect):
    filter_, hold = held("eom")
    messages = []
    for count in range(1, 9):
        # One by one: libmilter starts too few threads for a burst of callbacks that block.
        messages.append(Sending(connect(filter_)))
        filter_.wait_for("in eom", count)
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    for _ in messages:
        hold.release()
    assert all(is_complete(message.result()) for message in messages)
    assert filter_.wait() == 0
    assert filter_.output.count("in close") == len(messages)


def test_a_message_that_is_aborted_ends_the_drain(run_filter, connect):
    filter_ = run_filter("lifecycle")
    mta = connect(filter_)
    mta.greet()
    mta.mail("<s@example.com>")
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    begin = time.monotonic()
    mta.abort()
    assert filter_.wait() == 0
    assert at_once(time.monotonic() - begin)
    lines = filter_.output.splitlines()
    assert lines.index("in abort") < lines.index("in close")


def test_an_mta_that_goes_away_ends_the_drain(run_filter, connect):
    filter_ = run_filter("lifecycle")
    mta = connect(filter_)
    mta.greet()
    mta.mail("<s@example.com>")
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    begin = time.monotonic()
    mta.close()
    assert filter_.wait() == 0
    assert at_once(time.monotonic() - begin)
    assert "in close" in filter_.output


# --- what is new -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["unix", "inet", "inet-any", "inet6", "inet6-any"])
def test_new_connections_are_refused_at_once(held, connect, free_port, family):
    port = free_port()
    where = {
        "unix": None,
        "inet": f"inet:{port}@127.0.0.1",
        "inet-any": f"inet:{port}",
        "inet6": f"inet6:{port}@[::1]",
        "inet6-any": f"inet6:{port}",
    }[family]
    filter_, hold = held("eom", socket=where)
    address = parse_socket(filter_.socket)
    mta = connect(filter_)
    message = Sending(mta)
    filter_.wait_for("in eom")

    def refused() -> bool:
        with socket.socket(address.family) as probe:
            # The listening socket is gone, or it is another's: no connection comes about.
            return probe.connect_ex(address.address) != 0

    begin = time.monotonic()
    os.kill(filter_.pid, signal.SIGTERM)
    wait_until(refused, "new connections are still accepted")
    assert at_once(time.monotonic() - begin)
    assert all(refused() for _ in range(5))
    hold.release()
    assert is_complete(message.result())
    mta.expect_close()
    assert filter_.wait() == 0


def test_another_filter_can_take_over_while_the_old_one_drains(held, run_filter, connect):
    old, hold = held("eom")
    mta = connect(old)
    message = Sending(mta)
    old.wait_for("in eom")
    os.kill(old.pid, signal.SIGTERM)
    gone(old.socket)
    new = idle(run_filter("lifecycle", socket=old.socket))
    hold.release()
    assert is_complete(message.result())
    assert old.wait() == 0
    idle(new)
    assert new.stop() == 0


def test_another_filter_can_take_over_a_port(held, run_filter, connect, free_port):
    old, hold = held("eom", socket=f"inet:{free_port()}@127.0.0.1")
    mta = connect(old)
    message = Sending(mta)
    old.wait_for("in eom")
    os.kill(old.pid, signal.SIGTERM)
    address = parse_socket(old.socket).address

    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(address) != 0

    wait_until(refused, "the port is still taken")
    new = idle(run_filter("lifecycle", socket=old.socket))
    hold.release()
    assert is_complete(message.result())
    assert old.wait() == 0
    idle(new)


def test_a_new_message_on_an_open_connection_is_put_off(held, connect):
    filter_, hold = held("eom")
    other = connect(filter_)
    other.greet()
    message = Sending(connect(filter_))
    filter_.wait_for("in eom")
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    for _ in range(2):
        reply = other.mail("<s@example.com>")
        assert reply.verdict is Verdict.TEMPFAIL
        assert reply.smtp is not None
        assert (reply.smtp.code, reply.smtp.xcode) == (451, "4.3.2")
        assert "watched" in reply.smtp.text
    assert filter_.output.count("in envfrom") == 1  # the application saw only the first message
    hold.release()
    assert is_complete(message.result())
    other.expect_close()
    assert filter_.wait() == 0


def test_a_connection_between_negotiation_and_hello_is_put_off_too(held, connect):
    filter_, hold = held("eom")
    other = connect(filter_)
    message = Sending(connect(filter_))
    filter_.wait_for("in eom")
    os.kill(filter_.pid, signal.SIGTERM)
    gone(filter_.socket)
    result = other.send(MESSAGE, recipients=["<r@example.com>"])
    assert (result.verdict, result.stage) == (Verdict.TEMPFAIL, Stage.MAIL)
    assert result.smtp is not None and result.smtp.xcode == "4.3.2"
    hold.release()
    assert is_complete(message.result())
    assert filter_.wait() == 0


# --- without a descriptor left ---------------------------------------------------------------


def has_open(pid, path):
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(descriptor) == path:
                return True
    return False


def leave_gaps(pid):
    """Forbid a process numbers beyond those it has; returns what says how many are free."""
    used = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(used) + 1, most))
    return lambda: max(used) + 1 - len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets another process's limits")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("family", ["unix", "inet"])
def test_a_stop_needs_no_descriptor(
    held, run_filter, directory, connect, free_port, family, workers
):
    """Where the last was taken, and a connection waits for one, it drains as ever."""
    where = f"inet:{free_port()}@127.0.0.1" if family == "inet" else None
    if workers:
        hold = Held(directory, "eom")
        fifo = hold.options[-1].partition(":")[2]
        filter_ = run_filter("workers", "--hold", fifo, "--workers", str(workers), socket=where)
        served = [filter_.wait_for(") serves", count + 1) for count in range(workers)]
        pids = [int(re.search(r"pid (\d+)", line)[1]) for line in served]
    else:
        filter_, hold = held("eom", socket=where)
    message = Sending(connect(filter_))
    filter_.wait_for("holds in" if workers else "in eom")
    if not workers:
        pids = [filter_.pid]
    fifo = hold.options[-1].partition(":")[2]
    wait_until(lambda: any(has_open(pid, fifo) for pid in pids), "it does not hold")
    free = [leave_gaps(pid) for pid in pids]
    others = []
    while any(gaps() for gaps in free):
        others.append(connect(filter_))
    address = parse_socket(filter_.socket)
    with socket.socket(address.family) as waiting:
        waiting.connect(address.address)

        def refused() -> bool:
            with socket.socket(address.family) as probe:
                return probe.connect_ex(address.address) != 0

        filter_.process.send_signal(signal.SIGTERM)
        wait_until(refused, "new connections are still accepted")
        hold.release()
        if workers:
            assert message.result().verdict is Verdict.ACCEPT
        else:
            assert is_complete(message.result())
        for mta in others:
            mta.expect_close()
        assert filter_.wait() == 0, filter_.output
    if not workers:
        assert filter_.output.count("in close") == 1 + len(others)


# --- idle connections, and how long a stop takes --------------------------------------------


@pytest.mark.parametrize("options", [(), ("--threads", "2"), ("--wakeup", "asyncio")])
@pytest.mark.parametrize("connections", [0, 1, 5])
def test_an_idle_filter_stops_fast(run_filter, connect, connections, options):
    filter_ = run_filter("lifecycle", *options)
    idle(filter_)
    mtas = [connect(filter_) for _ in range(connections)]
    for mta in mtas[1:]:
        mta.greet()  # the first has only negotiated
    for mta in mtas[2:]:
        mta.send(MESSAGE, recipients=["<r@example.com>"])
    took = end(filter_)
    assert filter_.wait() == 0
    assert filter_.output.count("in close") == 1 + connections
    for mta in mtas:
        mta.expect_close()
    assert at_once(took)


def test_an_idle_filter_on_tcp_stops_fast(run_filter, connect, free_port):
    filter_ = run_filter("lifecycle", socket=f"inet:{free_port()}@127.0.0.1")
    idle(filter_)
    mta = connect(filter_)
    mta.greet()
    took = end(filter_)
    assert filter_.wait() == 0
    mta.expect_close()
    assert filter_.output.count("in close") == 2
    assert at_once(took)


# --- the deadline ------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0.5", "1"])
def test_the_deadline_cuts_a_message_that_never_ends(run_filter, connect, seconds):
    filter_ = run_filter("lifecycle", "--drain", seconds)
    mta = connect(filter_)
    mta.greet()
    mta.mail("<s@example.com>")
    took = end(filter_)
    assert filter_.wait() == 0
    mta.expect_close()
    assert float(seconds) <= took < 8
    assert "in close" in filter_.output
    assert "after runmilter" in filter_.output
    assert f"stopped with 1 messages still in progress after {seconds} s\n" in filter_.output


def test_a_callback_that_never_returns_is_left_behind(held, connect):
    filter_, _ = held("eom", "--drain", "0.5")
    message = Sending(connect(filter_))
    filter_.wait_for("in eom")
    took = end(filter_)
    assert filter_.wait() == 0
    assert 0.5 <= took < 8
    assert "end of the program" in filter_.output
    assert "Traceback" not in filter_.output
    assert isinstance(message.outcome(), FilterClosed)


def test_a_callback_that_spins_is_left_behind(run_filter, connect):
    filter_ = run_filter("lifecycle", "--drain", "0.5", "--at", "eom", "spin")
    message = Sending(connect(filter_))
    filter_.wait_for("in eom")
    took = end(filter_)
    assert filter_.wait() == 0
    assert 0.5 <= took < 8
    assert isinstance(message.outcome(), FilterClosed)


@pytest.mark.parametrize("what", ["hold", "spin"])
def test_others_end_well_beside_a_callback_that_never_returns(run_filter, directory, connect, what):
    hold = Held(directory, "header")
    options = hold.options if what == "hold" else ("--at", "header", "spin")
    with contextlib.closing(hold):
        filter_ = run_filter("lifecycle", "--drain", "4", *options)
        stuck = Sending(connect(filter_))
        filter_.wait_for("in header")
        other, idler = connect(filter_), connect(filter_)
        for mta in (other, idler):
            mta.greet()
        other.mail("<s@example.com>")
        other.rcpt("<r@example.com>")
        begin = time.monotonic()
        os.kill(filter_.pid, signal.SIGTERM)
        gone(filter_.socket)
        other.eoh()  # no header: it does not come where the first is
        other.body(b"body\r\n")
        reply = other.eom()
        assert reply.verdict is Verdict.ACCEPT
        assert len(reply.modifications) == 4
        for mta in (other, idler):
            mta.expect_close()
        assert filter_.wait() == 0
        assert 4 <= time.monotonic() - begin < 12
        assert filter_.output.count("in close") == 2
        assert "1 messages still in progress" in filter_.output
        assert isinstance(stuck.outcome(), FilterClosed)


def test_no_time_to_drain_cuts_at_once(run_filter, connect):
    filter_ = run_filter("lifecycle", "--drain", "0")
    mta = connect(filter_)
    mta.greet()
    mta.mail("<s@example.com>")
    took = end(filter_)
    assert filter_.wait() == 0
    mta.expect_close()
    assert at_once(took)
    assert "in close" in filter_.output
