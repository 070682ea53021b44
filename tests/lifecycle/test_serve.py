"""Milter.serve(): a filter in the event loop of a program."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.engine import engine
from support.process import WAIT

from Milter.mta import MTA, AddHeader, FilterClosed, SmtpReply

LOOPS = [
    "asyncio",
    pytest.param(
        "uvloop",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"
        ),
    ),
]
STAMP = (AddHeader(b"X-Served", b"in a loop"),)
LATER = SmtpReply(451, "4.3.2", ("pymilter: stopping, try again later: serving",))


@pytest.fixture
def serving(run_filter: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a program of the filter, with keywords for serve."""
    return lambda program, **options: run_filter("serving", program, repr(options))


def begin(mta: MTA) -> None:
    mta.connect_info("client.example")
    mta.helo("h")
    mta.mail("<a@b>")


def wait_until_gone(running: Any) -> None:
    """Until it listens no more."""
    deadline = time.monotonic() + WAIT
    while os.path.exists(running.socket[len("unix:") :]):
        assert time.monotonic() < deadline, running.output
        time.sleep(0.01)


def end_of(running: Any) -> None:
    """It has ended, and left nothing behind."""
    running.wait_for("ends, threads []")
    assert running.wait() == 0
    for complaint in ("never awaited", "destroyed", "Traceback", "is pending"):
        assert complaint not in running.output


def serves_and_ends(running: Any) -> None:
    """A filter that Milter.stop() ends."""
    with running.mta() as mta:
        begin(mta)
        mta.rcpt("<c@d>")
        assert mta.eom().modifications == STAMP
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("serve returned None")
    end_of(running)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_program_goes_on_beside_the_filter(serving: Callable[..., Any], loop: str) -> None:
    """Cancelling drains: the message in progress ends; signals are the program's."""
    running = serving("beside", uvloop=loop == "uvloop", socket_mode=0o640)
    with contextlib.suppress(FilterClosed), running.mta() as mta:
        assert os.stat(running.socket[len("unix:") :]).st_mode & 0o777 == 0o640
        begin(mta)
        running.wait_for("in the program's loop: True")
        running.process.send_signal(signal.SIGUSR1)
        running.wait_for("signal")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(mta.rcpt, "<wait@d>")
            running.wait_for("waits")
            running.process.send_signal(signal.SIGTERM)
            wait_until_gone(running)
            running.wait_for("tick ", running.output.count("tick ") + 3)
            assert not waiting.done()
            running.process.send_signal(signal.SIGUSR2)
            assert waiting.result(WAIT).smtp is None
        assert mta.eom().modifications == STAMP
    running.wait_for("serve was cancelled")
    end_of(running)


def test_what_waits_at_the_deadline_is_cancelled(serving: Callable[..., Any]) -> None:
    running = serving("beside", drain_timeout=0.3)
    mta = running.mta()
    begin(mta)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mta.rcpt, "<wait@d>")
        running.wait_for("waits")
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGTERM)  # once more changes nothing
        assert waiting.result(WAIT).smtp == LATER
    running.wait_for("cancelled")
    running.wait_for("serve was cancelled")
    end_of(running)
    with contextlib.suppress(FilterClosed):
        mta.close()


def test_close_comes_after_an_abort_that_waits_at_the_end(serving: Callable[..., Any]) -> None:
    running = serving("aborting", drain_timeout=0)
    mta = running.mta()
    begin(mta)
    mta.abort()
    running.wait_for("abort waits")
    running.process.send_signal(signal.SIGTERM)
    end_of(running)
    assert running.output.index("close ended") < running.output.index("ends, threads")
    assert "goes on though it was cancelled" not in running.output
    with contextlib.suppress(FilterClosed):
        mta.close()


@pytest.mark.parametrize("program", ["stopped", "after_stand_in"])
def test_stop_ends_it_without_an_exception(serving: Callable[..., Any], program: str) -> None:
    """Nor is the loop of a test with the stand-in, before, taken for a filter that runs."""
    running = serving(program)
    with running.mta() as mta:
        begin(mta)
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("serve returned None")
    end_of(running)


def test_signals_are_left_to_the_program(serving: Callable[..., Any]) -> None:
    """SIGTERM, of which the program takes no notice, ends it as it ends any other."""
    running = serving("plain")
    with running.mta() as mta:
        begin(mta)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == -signal.SIGTERM


def test_ctrl_c_drains(serving: Callable[..., Any]) -> None:
    """asyncio.run() has it cancel the program's main coroutine (3.11 and later)."""
    running = serving("plain")
    mta = running.mta()
    begin(mta)
    mta.rcpt("<c@d>")
    running.process.send_signal(signal.SIGINT)
    wait_until_gone(running)
    assert mta.eom().modifications == STAMP
    with contextlib.suppress(FilterClosed):
        mta.close()
    running.wait_for("KeyboardInterrupt")
    running.wait()


def test_a_loop_that_is_run_to_its_end(serving: Callable[..., Any]) -> None:
    """asyncio.run() cancels all tasks, also what callbacks wait for: that message is put off."""
    running = serving("cut_off")
    mta = running.mta()
    begin(mta)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mta.rcpt, "<wait@d>")
        running.wait_for("waits")
        running.process.send_signal(signal.SIGTERM)
        reply = waiting.result(WAIT)
    assert reply.smtp is not None and reply.smtp.code == 451
    with contextlib.suppress(FilterClosed):
        mta.close()
    running.wait_for("serve goes on True")
    running.wait_for("ends, threads []")
    assert running.wait() == 0


@pytest.mark.parametrize(
    ("program", "refusal"),
    [
        ("outside", "serve: it must be awaited in a running event loop of asyncio"),
        ("twice", "serve: a filter runs already; there is one to a process"),
        ("beside_runmilter", "serve: a filter runs already; there is one to a process"),
    ],
)
def test_where_it_is_refused(serving: Callable[..., Any], program: str, refusal: str) -> None:
    running = serving(program)
    running.wait_for(f"refused: {refusal}")
    if program == "twice":
        running.wait_for("the first one served")
    end_of(running)


def test_what_is_wrong_with_an_argument_is_raised(serving: Callable[..., Any]) -> None:
    running = serving("wrong")
    running.wait_for("refused: ", 2)
    serves_and_ends(running)


def test_no_thread_to_serve_on(serving: Callable[..., Any]) -> None:
    """Its socket is closed again, and the next one serves where the engine can."""
    running = serving("without_thread")
    running.wait_for("refused: no thread socket left: False")
    if engine() == "native":
        serves_and_ends(running)
    else:
        running.wait_for("cannot serve again")
        end_of(running)


@pytest.mark.engine("native")
def test_a_late_cancel_does_not_stop_the_next_one(serving: Callable[..., Any]) -> None:
    running = serving("cancelled_late")
    running.wait_for("the first one was cancelled True")
    serves_and_ends(running)


@pytest.mark.engine("native")
def test_one_after_the_other(serving: Callable[..., Any]) -> None:
    running = serving("again")
    running.wait_for("ended True", 2)
    end_of(running)
