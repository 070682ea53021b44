"""stop(), main() and their fellows in any order, and what ends a program in a callback."""

from __future__ import annotations

import os
import signal
import time

import pytest
from support.lifecycle import MESSAGE, RECIPIENTS, USERS, Held, Sending, gone, path_of
from support.process import WAIT

from Milter.mta import NegotiationError, Verdict


@pytest.fixture
def scenario(run_filter):
    return lambda name, **keywords: run_filter("call_order", name, **keywords)


def send(filter_):
    with filter_.mta() as mta:
        return mta.send(MESSAGE, recipients=RECIPIENTS)


# --- stop() -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when", [pytest.param("main", marks=pytest.mark.engine("libmilter")), "opensocket"]
)
def test_stop_before_main_makes_it_return_at_once(scenario, when):
    filter_ = scenario(f"stop-before-{when}")
    assert filter_.wait() == 0
    lines = filter_.output.splitlines()
    assert lines[:3] == ["stop: None", "main: None", "socket there: False"]
    if when == "main":
        assert "again: error" in lines[3]


def test_stop_from_a_thread(scenario):
    filter_ = scenario("stop-from-a-thread")
    with filter_.mta() as mta:
        assert mta.send(MESSAGE, recipients=RECIPIENTS).verdict is Verdict.ACCEPT
        mta.expect_close()
        mta.close()
    assert filter_.wait() == 0
    assert "stop: None" in filter_.output
    assert "main: None" in filter_.output


def test_stop_from_a_callback_lets_its_message_end(scenario):
    filter_ = scenario("stop-from-a-callback")
    with filter_.mta() as mta:
        result = mta.send(MESSAGE, recipients=RECIPIENTS)
        mta.expect_close()
        mta.close()
    assert result.verdict is Verdict.ACCEPT
    assert result.message["X-Stamp"] == "after stop"
    assert filter_.wait() == 0
    assert filter_.output.count("stop: None") == 2
    assert "main: None" in filter_.output


# --- calls out of order ------------------------------------------------------------------------


def test_the_native_engine_serves_again_after_a_stop(scenario):
    filter_ = scenario("main-again")
    for count in range(1, 5):
        filter_.wait_for(f"main {count - 1}: None")
        with filter_.mta(wait_for=WAIT) as mta:
            assert mta.send(MESSAGE, recipients=RECIPIENTS).verdict is Verdict.ACCEPT
            mta.expect_close()
            mta.close()
    assert filter_.wait() == 0
    assert filter_.output.count("socket there: False") == 3
    assert "left: 0 1" in filter_.output


@pytest.mark.engine("libmilter")
def test_a_second_main_is_an_error(scenario):
    filter_ = scenario("second-main")
    assert send(filter_).verdict is Verdict.ACCEPT
    assert filter_.stop() == 0
    for call in ("main in a callback", "main in a thread"):
        assert filter_.wait_for(call) == (
            f"{call}: error: main: it runs already; there is one filter to a process"
        )
    assert "main: None" in filter_.output.splitlines()
    assert "cannot start again" in filter_.wait_for("main after it: error")
    for call in ("opensocket", "setconn", "set_engine"):
        assert filter_.wait_for(f"{call} after it") == (
            f"{call} after it: error: {call}: libmilter cannot start again in a process where it "
            "was stopped"
        )


@pytest.mark.engine("libmilter")
def test_a_second_runmilter_is_an_error(scenario):
    filter_ = scenario("second-runmilter")
    assert send(filter_).verdict is Verdict.ACCEPT
    assert filter_.stop() == 0
    assert "runmilter: None" in filter_.output.splitlines()
    for call in ("runmilter again", "runmilter elsewhere"):
        filter_.wait_for(f"{call}: error")
    assert "socket there: False" in filter_.output


@pytest.mark.parametrize(("missing", "calls"), [("register", 4), ("setconn", 2)])
def test_what_is_missing_is_named(scenario, missing, calls):
    filter_ = scenario(f"before-{missing}")
    filter_.wait_for("now")  # and then it runs all the same
    assert send(filter_).verdict is Verdict.ACCEPT
    assert filter_.stop() == 0
    lines = filter_.output.splitlines()
    lines = lines[: lines.index("now")]
    assert sum(f"call {missing}() first" in line for line in lines) == calls
    if missing == "register":
        assert "socket there: False" in lines
    assert "main: None" in filter_.output


def test_settings_are_refused_while_the_filter_runs(scenario):
    filter_ = scenario("while-running")
    assert send(filter_).verdict is Verdict.ACCEPT
    assert filter_.stop() == 0
    for call in ("opensocket twice", "setconn when open"):
        assert f"{call}: error: {call.split()[0]}: the socket is open already" in filter_.output
    for call in ("opensocket", "setconn"):
        assert f"{call}: error: {call}: it runs already; there is one filter" in filter_.output
    assert "register: error: register: not while main() runs" in filter_.output


# --- what ends a program, in a callback ----------------------------------------------------------

STAGES = ("connect", "helo", "envfrom", "header", "body", "eom")


@pytest.mark.parametrize("stage", STAGES)
def test_exit_in_a_callback_ends_the_program(scenario, stage):
    filter_ = scenario(f"exit-in-{stage}")
    with filter_.mta() as mta:
        result = mta.send(MESSAGE, recipients=RECIPIENTS)
        mta.expect_close()
        mta.close()
    assert result.verdict is Verdict.TEMPFAIL
    assert result.smtp is not None
    assert (result.smtp.code, result.smtp.xcode) == (451, "4.3.0")
    assert filter_.wait() == 3
    assert "after main" in filter_.output
    assert "Traceback" not in filter_.output
    assert not os.path.exists(path_of(filter_.socket))


def test_exit_in_negotiate_ends_the_program(scenario):
    filter_ = scenario("exit-in-negotiate")
    with pytest.raises((NegotiationError, ConnectionError)):
        filter_.mta()
    assert filter_.wait() == 3
    assert "after main" in filter_.output


def test_exit_in_abort_ends_the_program(scenario):
    filter_ = scenario("exit-in-abort")
    with filter_.mta() as mta:
        mta.greet()
        mta.mail("<s@example.com>")
        mta.abort()
        mta.expect_close()
        mta.close()
    assert filter_.wait() == 3


def test_exit_in_close_ends_the_program(scenario):
    filter_ = scenario("exit-in-close")
    assert send(filter_).verdict is Verdict.ACCEPT
    assert filter_.wait() == 3


def test_exit_with_a_text_says_it(scenario):
    filter_ = scenario("exit-text")
    with filter_.mta() as mta:
        assert mta.send(MESSAGE, recipients=RECIPIENTS).verdict is Verdict.TEMPFAIL
        mta.expect_close()
        mta.close()
    assert filter_.wait() == 1
    assert "a last word" in filter_.output.splitlines()


@pytest.mark.parametrize("stage", ["connect", "eom", "close"])
def test_an_interrupt_in_a_callback_ends_the_program_as_ctrl_c_does(scenario, stage):
    filter_ = scenario(f"interrupt-in-{stage}")
    with filter_.mta() as mta:
        result = mta.send(MESSAGE, recipients=RECIPIENTS)
        if stage != "close":
            assert result.verdict is Verdict.TEMPFAIL
            mta.expect_close()
            mta.close()
    assert filter_.wait() == -signal.SIGINT
    assert "after main" in filter_.output
    assert filter_.output.count("Traceback") == 1


def test_exit_in_a_callback_lets_other_messages_end(run_filter, directory):
    hold = Held(directory, "eom")
    filter_ = run_filter("lifecycle", *hold.options, "--at", "abort", "exit:7")
    with filter_.mta() as mta, filter_.mta() as other:
        message = Sending(mta)
        filter_.wait_for("in eom")
        other.greet()
        other.mail("<s@example.com>")
        other.abort()  # where it exits
        gone(filter_.socket)
        hold.release()
        assert message.result().message["X-Stamp"] == "before"
        for each in (mta, other):
            each.expect_close()
            each.close()
    assert filter_.wait() == 7
    assert "in close" in filter_.output
    hold.close()


def test_exit_in_a_callback_beside_the_main_thread(scenario):
    filter_ = scenario("exit-in-a-thread")
    with filter_.mta() as mta:
        assert mta.send(MESSAGE, recipients=RECIPIENTS).verdict is Verdict.TEMPFAIL
        mta.expect_close()
        mta.close()
    assert filter_.wait() == 0
    assert "main: SystemExit: 4" in filter_.output
    assert "the main thread goes on" in filter_.output


# --- fork ----------------------------------------------------------------------------------------


def test_a_filter_can_become_a_daemon_once_its_socket_is_open(scenario):
    filter_ = scenario("daemonise")
    filter_.wait_for("parent ends")
    child = int(filter_.wait_for("child").split()[1])
    try:
        assert filter_.process.wait(20) == 0
        assert os.path.exists(path_of(filter_.socket))
        for _ in range(2):
            assert send(filter_).verdict is Verdict.ACCEPT
        begin = time.monotonic()
        os.kill(child, signal.SIGTERM)
        filter_.wait_for("main: None")
        assert time.monotonic() - begin < 2
        assert not os.path.exists(path_of(filter_.socket))
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("user", USERS)
def test_forked_children_leave_the_filter_and_its_socket_alone(run_filter, public, user):
    path = public / "s"
    filter_ = run_filter("call_order", "fork-without-main", *user, socket=f"unix:{path}")
    filter_.wait_for("child: 0")
    before = path.stat().st_ino
    begin = time.monotonic()
    assert send(filter_).verdict is Verdict.ACCEPT
    filter_.wait_for("child: 0", 2)
    os.kill(filter_.pid, signal.SIGUSR1)
    filter_.wait_for("child: 0", 3)
    assert time.monotonic() - begin < 5
    assert path.stat().st_ino == before
    assert send(filter_).verdict is Verdict.ACCEPT
    assert filter_.stop() == 0
    assert filter_.output.count("child: 0") == 5
    assert "socket there: False" in filter_.output
