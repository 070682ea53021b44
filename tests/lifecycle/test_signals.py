"""Signals while a filter runs: whose handler runs, and how the process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
from support.lifecycle import (
    MESSAGE,
    RECIPIENTS,
    Held,
    Sending,
    at_once,
    bits,
    end,
    gone,
    idle,
    passes,
    path_of,
    signal_set,
    there,
)

from Milter.mta import Verdict

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What may have been there before the filter, and must change nothing.
BEFORE = {
    "alone": (),
    "threads": ("--threads", "2"),
    "wakeup-fd": ("--wakeup", "pipe"),
    "asyncio": ("--wakeup", "asyncio", "--threads", "1"),
}
before = pytest.mark.parametrize("options", BEFORE.values(), ids=BEFORE.keys())
each_stop_signal = pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)


@pytest.fixture
def running(run_filter):
    """Starts a filter and waits until it has taken a message and is idle again."""
    return lambda *options: idle(run_filter("lifecycle", *options))


@pytest.fixture
def held(run_filter, directory):
    """Starts a filter that holds a message in eom; gives it, the message and the MTA."""
    cleanup = contextlib.ExitStack()

    def start(*options):
        hold = Held(directory, "eom")
        cleanup.callback(hold.close)
        filter_ = run_filter("lifecycle", *hold.options, *options)
        mta = filter_.mta()
        cleanup.callback(mta.close)
        message = Sending(mta)
        filter_.wait_for("in eom")
        return filter_, hold, message, mta

    with cleanup:
        yield start


# --- main() on the main thread ------------------------------------------------------------


@before
@each_stop_signal
def test_a_stop_signal_is_a_clean_stop(running, options, number):
    filter_ = running(*options)
    took = end(filter_, number)
    assert filter_.wait() == 0
    assert "after runmilter" in filter_.output
    assert "end of the program" in filter_.output
    assert "mask kept True" in filter_.output
    assert "handlers kept True" in filter_.output
    assert "Traceback" not in filter_.output
    assert "wakeup kept False" not in filter_.output
    assert ("wakeup kept True" in filter_.output) == ("--wakeup" in options)
    assert at_once(took)


def test_the_best_of_some_stops_takes_less_than_half_a_second(running):
    assert min(end(running("--threads", "2")) for _ in range(5)) < 0.5


@before
@each_stop_signal
def test_a_handler_of_the_application_runs_instead(running, options, number):
    name = number.name[3:]
    filter_ = running("--handle", name, "say", *options)
    for count in (1, 2):
        os.kill(filter_.pid, number)
        filter_.wait_for(f"handler {number.name} say", count)
        passes(filter_)
    os.kill(filter_.pid, signal.SIGHUP if number == signal.SIGTERM else signal.SIGTERM)
    assert filter_.wait() == 0
    assert "handlers kept True" in filter_.output


@before
@each_stop_signal
def test_a_handler_may_stop_the_filter(running, options, number):
    filter_ = running("--handle", number.name[3:], "stop", *options)
    took = end(filter_, number)
    assert filter_.wait() == 0
    assert at_once(took)
    assert f"handler {number.name} stop" in filter_.output
    assert "end of the program" in filter_.output


@before
def test_what_a_handler_raises_comes_out_of_main(running, options):
    filter_ = running("--handle", "TERM", "raise", *options)
    assert filter_.stop() == 1
    assert "RuntimeError: raised by the handler" in filter_.output
    assert "after runmilter" in filter_.output
    assert "end of the program" not in filter_.output


@before
def test_a_handler_may_exit(running, options):
    filter_ = running("--handle", "TERM", "exit", *options)
    assert filter_.stop() == 5
    assert "Traceback" not in filter_.output
    assert "after runmilter" in filter_.output


@each_stop_signal
def test_an_ignored_signal_stays_ignored(running, number):
    filter_ = running("--handle", number.name[3:], "ignore", "--threads", "1")
    assert number in signal_set(filter_.pid, "SigIgn")
    os.kill(filter_.pid, number)
    passes(filter_)
    other = signal.SIGHUP if number == signal.SIGTERM else signal.SIGTERM
    assert filter_.stop(other) == 0


@before
def test_other_handlers_run_promptly_while_main_waits(running, options):
    filter_ = running("--handle", "USR1", "say", *options)
    for count in range(1, 4):
        begin = time.monotonic()
        os.kill(filter_.pid, signal.SIGUSR1)
        filter_.wait_for("handler SIGUSR1 say", count)
        assert time.monotonic() - begin < 2
    passes(filter_)
    assert filter_.stop() == 0


def test_other_handlers_run_while_a_callback_is_busy(held):
    filter_, hold, message, mta = held("--handle", "USR1", "say")
    os.kill(filter_.pid, signal.SIGUSR1)
    filter_.wait_for("handler SIGUSR1 say")
    hold.release()
    assert message.result().verdict is Verdict.ACCEPT
    mta.quit()
    assert filter_.stop() == 0


def test_a_second_signal_does_not_cut_the_drain(held):
    filter_, hold, message, mta = held()
    os.kill(filter_.pid, signal.SIGINT)
    gone(filter_.socket)
    os.kill(filter_.pid, signal.SIGINT)
    os.kill(filter_.pid, signal.SIGTERM)
    hold.release()
    assert message.result().verdict is Verdict.ACCEPT
    mta.expect_close()
    assert filter_.wait() == 0


@each_stop_signal
def test_a_signal_in_the_first_moments_is_not_lost(run_filter, number):
    filters = [run_filter("stamp") for _ in range(6)]  # at once, so that they get in their way
    for filter_ in filters:
        filter_.mta().close()  # it has negotiated: main() runs, but hardly longer
        os.kill(filter_.pid, number)
    assert [filter_.wait() for filter_ in filters] == [0] * len(filters)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_before_main_runs_is_not_lost(run_filter, number):
    filters = [run_filter("stamp") for _ in range(6)]
    for filter_ in filters:
        there(filter_.socket)
        os.kill(filter_.pid, number)
    # Before main() has taken the signal, its default action is as good an end.
    assert {filter_.wait() for filter_ in filters} <= {0, -number}


def test_the_wakeup_fd_of_the_application_still_learns_of_signals(running):
    filter_ = running("--wakeup", "pipe", "--handle", "USR1", "say")
    os.kill(filter_.pid, signal.SIGUSR1)
    filter_.wait_for("handler SIGUSR1")
    assert filter_.stop() == 0
    assert filter_.wait_for("wakeup bytes").split()[2:] == [str(int(signal.SIGUSR1))]


def test_a_signal_that_the_program_blocks_stays_blocked(running):
    filter_ = running("--block", "TERM")
    assert signal.SIGTERM in signal_set(filter_.pid, "SigBlk")
    os.kill(filter_.pid, signal.SIGTERM)
    passes(filter_)
    assert filter_.stop(signal.SIGHUP) == 0
    assert "mask kept True" in filter_.output


# --- main() on another thread ----------------------------------------------------------------

main_waits = pytest.mark.parametrize("wait", ["sleep", "event", "pause", "join"])


@pytest.mark.parametrize("thread", ["daemon", "thread"])
@each_stop_signal
def test_a_handler_in_the_main_thread_may_stop_the_filter(running, thread, number):
    filter_ = running("--on", thread, "--handle", number.name[3:], "stop")
    assert at_once(end(filter_, number))
    assert filter_.wait() == 0
    assert f"handler {number.name} stop" in filter_.output
    assert "end of the program" in filter_.output


@pytest.mark.parametrize("wait", ["sleep", "event", "pause"])
def test_a_handler_in_the_main_thread_may_end_the_program(running, wait):
    filter_ = running("--on", "daemon", "--wait", wait, "--handle", "TERM", "exit")
    assert at_once(end(filter_))
    assert filter_.wait() == 5
    assert "Traceback" not in filter_.output
    assert "in close" in filter_.output


@main_waits
def test_other_handlers_run_in_the_main_thread(running, wait):
    filter_ = running("--on", "daemon", "--wait", wait, "--handle", "USR1", "say")
    os.kill(filter_.pid, signal.SIGUSR1)
    filter_.wait_for("handler SIGUSR1 say")
    passes(filter_)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("thread", "wait"),
    [
        ("daemon", "sleep"),
        ("daemon", "event"),
        ("daemon", "pause"),
        ("daemon", "busy"),
        ("thread", "join"),
    ],
)
def test_the_default_action_is_taken_after_the_drain(held, thread, wait, number):
    filter_, hold, message, mta = held("--on", thread, "--wait", wait)
    os.kill(filter_.pid, number)
    gone(filter_.socket)
    assert filter_.process.poll() is None
    hold.release()
    result = message.result()
    assert result.verdict is Verdict.ACCEPT
    assert len(result.modifications) == 4
    mta.expect_close()
    assert filter_.wait() == -number
    assert "in close" in filter_.output


@pytest.mark.parametrize("thread", ["daemon", "thread"])
def test_an_ignored_signal_stays_ignored_beside_another_thread(running, thread):
    filter_ = running("--on", thread, "--wait", "sleep", "--handle", "HUP", "ignore")
    os.kill(filter_.pid, signal.SIGHUP)
    passes(filter_)
    assert filter_.stop(signal.SIGTERM) == -signal.SIGTERM


def test_an_asyncio_program_stops_a_filter_in_a_thread(running):
    filter_ = running("--on", "thread", "--wait", "asyncio")
    filter_.wait_for("loop runs")
    assert filter_.stop() == 0
    assert "handler in the loop" in filter_.output
    assert "end of the program" in filter_.output


def test_an_asyncio_program_beside_a_filter_takes_the_default_action(running):
    filter_ = running("--on", "thread", "--wait", "asyncio")
    filter_.wait_for("loop runs")
    assert filter_.stop(signal.SIGHUP) == -signal.SIGHUP


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_the_main_thread_does_not_go_on_from_pause_before_the_action(held, number):
    filter_, hold, message, mta = held("--on", "daemon", "--wait", "pause-once")
    os.kill(filter_.pid, number)
    gone(filter_.socket)
    hold.release()
    assert message.result().verdict is Verdict.ACCEPT
    mta.expect_close()
    assert filter_.wait() == -number
    assert "pause returned" not in filter_.output
    if number == signal.SIGINT:
        assert "KeyboardInterrupt in the main thread" in filter_.output


def test_a_program_that_waits_for_a_blocked_signal_gets_it(held):
    filter_, hold, message, mta = held("--block", "TERM", "--on", "daemon", "--wait", "sigwait")
    os.kill(filter_.pid, signal.SIGTERM)
    filter_.wait_for("sigwait returned")  # its program stops the filter then
    hold.release()
    assert message.result().verdict is Verdict.ACCEPT
    mta.expect_close()
    assert filter_.wait() == 0
    assert "end of the program" in filter_.output


@pytest.mark.parametrize("wait", ["sleep", "event", "pause", "join", "busy"])
def test_the_default_of_an_interrupt_is_put_off_too(held, wait):
    filter_, hold, message, mta = held("--on", "daemon", "--wait", wait)
    os.kill(filter_.pid, signal.SIGINT)
    gone(filter_.socket)
    assert "KeyboardInterrupt" not in filter_.output
    hold.release()
    assert message.result().verdict is Verdict.ACCEPT
    mta.expect_close()
    assert filter_.wait() == -signal.SIGINT
    assert "KeyboardInterrupt in the main thread" in filter_.output


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("wait", ["sleep", "event"])
def test_the_idle_filter_on_another_thread_ends_at_once(running, number, wait):
    filter_ = running("--on", "daemon", "--wait", wait)
    took = end(filter_, number)
    assert filter_.wait() == -number
    assert at_once(took)
    assert not os.path.exists(path_of(filter_.socket))


# --- child processes --------------------------------------------------------------------------


def child_signals(line):
    words = line.split()[1:]
    return {
        words[i].rstrip(":"): bits(words[i + 1])
        for i in range(0, len(words), 2)
        if "Sig" in words[i] and "Q" not in words[i]
    }


@pytest.mark.parametrize("options", [(), ("--on", "daemon", "--wait", "sleep")])
def test_children_of_a_callback_have_the_signals_of_any_program(run_filter, options):
    filter_ = run_filter("lifecycle", *options, "--at", "eom", "signals")
    with filter_.mta() as mta:
        mta.send(MESSAGE, recipients=RECIPIENTS)
    for way in ("subprocess:", "fork:"):
        found = child_signals(filter_.wait_for(way))
        assert found["SigBlk"] == set(), way
        assert not found["SigIgn"] & {*STOP_SIGNALS}, way
        assert not found["SigCgt"] & {signal.SIGTERM, signal.SIGHUP}, way
    # As in every Python program: SIGINT has Python's own handler.
    assert signal.SIGINT in child_signals(filter_.wait_for("subprocess:"))["SigCgt"]
    assert filter_.stop() == (0 if not options else -signal.SIGTERM)


@each_stop_signal
def test_a_forked_child_ends_by_a_signal_and_the_filter_goes_on(run_filter, number):
    filter_ = run_filter("lifecycle", "--at", "header", "child")
    with filter_.mta() as mta:
        message = Sending(mta)
        os.kill(int(filter_.wait_for("child ").split()[1]), number)
        assert message.result().verdict is Verdict.ACCEPT
    how = filter_.wait_for("child ended").split()[2:]
    # Python has a handler of its own for SIGINT, in the child too: KeyboardInterrupt.
    assert how == (["status", "130"] if number == signal.SIGINT else ["signal", str(int(number))])
    assert filter_.process.poll() is None
    assert filter_.stop() == 0


def test_a_child_forked_by_a_handler_keeps_its_signals_to_itself(running):
    filter_ = running("--handle", "USR1", "fork", "--handle", "USR2", "say")
    os.kill(filter_.pid, signal.SIGUSR1)
    filter_.wait_for("child done")
    filter_.wait_for("handler SIGUSR2 say")  # once, in the child
    passes(filter_)
    assert filter_.stop() == 0
    assert filter_.output.count("handler SIGUSR2 say") == 1
