"""Where all callbacks are coroutines, their event loop leads the native engine."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Callable

import pytest
from support.process import WAIT

from Milter.mta import MTA, AddHeader, FilterClosed, SmtpReply, Verdict

UVLOOP = pytest.mark.skipif(
    importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"
)
EAGER = pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks before Python 3.12")
SOFT = SmtpReply(451, "4.3.0", ("pymilter: untrapped exception in leading",))
LOOP = "the loop's thread"
ENGINE = "a thread of the engine"


@pytest.fixture
def leading(run_filter: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a class of the filter on the native engine, with keywords for runmilter."""

    def run(name: str, **options: Any) -> Any:
        return run_filter("leading", name, repr({"engine": "native", **options}))

    return run


def greet(mta: MTA, host: str = "client.example") -> None:
    mta.connect_info(host)
    mta.helo("h")


def message(mta: MTA, to: str = "<c@d>") -> Any:
    mta.mail("<a@b>")
    mta.rcpt(to)
    mta.data()
    mta.header("Subject", " x")
    mta.eoh()
    return mta.eom()


@pytest.mark.parametrize("loop", ["", pytest.param("uvloop", marks=UVLOOP)])
def test_the_loop_runs_the_callbacks(leading: Callable[..., Any], loop: str) -> None:
    """From the first coroutine on; what connect set in its variables is there."""
    running = leading("Leading", **({"uvloop": True} if loop else {}))
    for host in ("one.example", "two.example"):
        with running.mta() as mta:
            greet(mta, host)
            reply = message(mta)
            assert reply.verdict == Verdict.ACCEPT
            assert reply.modifications == (AddHeader(b"X-Before", host.encode()),)
            running.wait_for(f"envfrom on {LOOP} after {host}")
            running.wait_for(f"envrcpt on {LOOP} after {host}")
            mta.mail("<a@b>")
            assert mta.rcpt("<no@d>").verdict == Verdict.REJECT
    assert running.stop() == 0
    running.wait_for("served")


@pytest.mark.parametrize("name", ["Large", "LargeAfterAwaiting", "LargeBesidePlain"])
def test_an_mta_that_does_not_read_holds_up_no_loop(leading: Callable[..., Any], name: str) -> None:
    """What it does not take waits in the engine; coroutines go on, its own and others."""
    running = leading(name)
    size = 3_000_000
    with running.mta() as mta, running.mta() as other:
        greet(mta)
        mta.mail("<a@b>")
        mta.rcpt("<c@d>")
        mta.data()
        mta.header("Subject", " x")
        mta.eoh()
        mta.send_packet(b"E", b"")
        running.wait_for("written")
        greet(other)
        other.mail("<a@b>")
        assert other.rcpt("<no@d>").verdict == Verdict.REJECT
        while (packet := mta.read_packet()).command == b"b":
            size -= len(packet.data)
        assert (packet.command, size) == (b"a", 0)
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Plain", "hello"),
        ("Adapted", "hello"),
        ("Negotiating", "negotiate"),
        ("Assigned", "hello"),
    ],
)
def test_a_plain_callback_may_block_so_the_loop_does_not_run_it(
    leading: Callable[..., Any], name: str, plain: str
) -> None:
    running = leading(name)
    for _ in range(3):
        with running.mta() as mta:
            greet(mta)
            assert message(mta).verdict == Verdict.ACCEPT
    assert running.stop() == 0
    lines = running.output.split("\n")
    assert lines.count(f"{plain} on {ENGINE}") == 3
    assert lines.count(f"envrcpt on {LOOP} after client.example") == 3


def test_a_coroutine_around_a_plain_method_leads(leading: Callable[..., Any]) -> None:
    """It blocks nobody; nor does what our own decorators do."""
    running = leading("Offloading")
    for _ in range(2):
        with running.mta() as mta:
            greet(mta)
            assert message(mta).verdict == Verdict.ACCEPT
    assert running.stop() == 0
    lines = running.output.split("\n")
    assert lines.count("hello on asyncio") == 2
    assert lines.count(f"envfrom on {LOOP} after client.example") == 2


def test_plain_callbacks_of_another_class(leading: Callable[..., Any]) -> None:
    """Its instances are served with those of one that has nothing but coroutines."""
    running = leading("in_turn")
    for _ in range(4):
        with running.mta() as mta:
            greet(mta)
            assert message(mta).verdict in (Verdict.ACCEPT, Verdict.NOT_SENT, Verdict.CONTINUE)
    assert running.stop() == 0
    lines = running.output.split("\n")
    assert lines.count(f"hello on {ENGINE}") == 2
    assert lines.count(f"envrcpt on {LOOP} after client.example") == 2


def test_a_loop_that_watches_nothing_for_others(leading: Callable[..., Any]) -> None:
    running = leading("Leading", loop="deaf")
    for _ in range(2):
        with running.mta() as mta:
            greet(mta)
            assert message(mta).verdict == Verdict.ACCEPT
    running.wait_for(f"envrcpt on {LOOP} after client.example", 2)
    assert running.stop() == 0


def test_idle_connections_end_by_timers_that_are_early(leading: Callable[..., Any]) -> None:
    running = leading("Unusual", loop="early", timeout=1)
    with contextlib.suppress(FilterClosed), ExitStack() as stack:
        for _ in range(3):
            mta = stack.enter_context(running.mta())
            greet(mta)
            for _ in range(2):
                mta.mail("<x@b>")
        mta.expect_close(WAIT)
    assert running.stop() == 0


@pytest.mark.parametrize("loop", ["", "wrapping", pytest.param("eager", marks=EAGER)])
def test_what_may_happen_in_a_first_step(leading: Callable[..., Any], loop: str) -> None:
    """The task is that of the coroutine, for whoever asks; no other callback's."""
    running = leading("Unusual", **({"loop": loop} if loop else {}))
    with running.mta() as mta:
        greet(mta)
        assert mta.mail("<x@b>").verdict == Verdict.CONTINUE
        assert mta.mail("<cancels-and-returns@b>").verdict == Verdict.CONTINUE
        assert mta.mail("<x@b>").verdict == Verdict.CONTINUE
        assert mta.mail("<cancels-and-waits@b>").verdict == Verdict.TEMPFAIL
        assert mta.mail("<x@b>").verdict == Verdict.CONTINUE
        if loop != "wrapping":  # with that it ends where its task was cancelled before it began
            assert mta.mail("<cancels-and-looks@b>").verdict == Verdict.CONTINUE
            running.wait_for("cancelled as it likes")
        assert mta.mail("<x@b>").verdict == Verdict.CONTINUE
        if sys.version_info >= (3, 13):
            time.sleep(0.1)  # until its task has begun, which was made for <x@b>
            assert mta.mail("<takes-back@b>").verdict == Verdict.CONTINUE
        assert mta.mail("<shares@b>").verdict == Verdict.CONTINUE
        assert mta.mail("<cancels-future@b>").smtp == SOFT
        assert mta.mail("<raises@b>").smtp == SOFT
        assert mta.mail("<limit@b>").smtp == SmtpReply(450, "4.7.0", ("it took too long",))
        assert mta.mail("<forks@b>").verdict == Verdict.CONTINUE
        mta.rcpt("<c@d>")
    running.wait_for("child ended with 0")
    running.wait_for(f"tasks 0 on {LOOP}")
    assert running.stop() == 0
    assert "KeyError: 'in a first step'" in running.output
    assert "_async.py" not in running.output  # the traceback is of the filter's code
    assert "destroyed" not in running.output


def test_the_child_of_a_first_step_ends_as_it_says(leading: Callable[..., Any]) -> None:
    """Also where no task can be left after a fork, as from Python 3.14 on."""
    running = leading("Unusual", strict=True)
    with running.mta() as mta:
        greet(mta)
        for sender in ("<x@b>", "<x@b>", "<forks@b>"):
            assert mta.mail(sender).verdict == Verdict.CONTINUE
    running.wait_for("child ended with 0")
    assert running.stop() == 0
    assert "RuntimeError" not in running.output


def test_no_task_is_to_be_had(leading: Callable[..., Any]) -> None:
    """Nor has what would have run in it been made in vain."""
    running = leading("NoTask")
    with running.mta() as mta:
        greet(mta)
        for sender in ("<x@b>", "<x@b>", "<fails@b>"):
            assert mta.mail(sender).verdict == Verdict.CONTINUE
        mta.rcpt("<c@d>")
        mta.data()
        mta.header("Subject", " x")
        mta.eoh()
        assert mta.eom().smtp == SOFT
        assert message(mta).verdict == Verdict.CONTINUE
    running.wait_for(f"RuntimeError: no task on {LOOP}")
    assert running.stop() == 0
    assert "never awaited" not in running.output


def test_a_task_that_is_cancelled_before_it_begins(leading: Callable[..., Any]) -> None:
    """Though what it runs is its factory's, and awaits the callback's coroutine."""
    running = leading("Spoiling", loop="wrapping")
    for _ in range(5):
        with running.mta() as mta:
            greet(mta)
            mta.mail("<a@b>")
            assert mta.rcpt("<c@d>").verdict == Verdict.CONTINUE
            assert mta.rcpt("<waits@d>").verdict == Verdict.TEMPFAIL
    assert running.stop() == 0
    assert "never awaited" not in running.output


@pytest.mark.parametrize("sender", ["<a@b>", "<later@b>"])
def test_a_child_of_a_fork_cannot_await(leading: Callable[..., Any], sender: str) -> None:
    """Its loop would share the parent's descriptors, and take what wakes that."""
    running = leading("Forking")
    with running.mta() as mta:
        greet(mta)
        mta.mail(sender)
        for _ in range(3):
            assert mta.rcpt("<forks@d>").verdict == Verdict.CONTINUE
            for _ in range(20):
                assert mta.rcpt("<c@d>").verdict == Verdict.CONTINUE
    running.wait_for("RuntimeError: the child of a fork cannot await", 3)
    running.wait_for("child ended with 1", 3)
    assert running.stop() == 0


def test_others_are_served_while_a_first_step_blocks(leading: Callable[..., Any]) -> None:
    """As far as they need no coroutine; then the loop leads anew."""
    running = leading("Unusual")
    with running.mta() as mta, ThreadPoolExecutor(1) as pool:
        greet(mta)
        mta.mail("<x@b>")  # from here on the loop leads
        reply = pool.submit(mta.mail, "<blocks@b>")
        running.wait_for("blocks")
        with running.mta() as other:  # negotiates
            greet(other)
            assert not reply.done()
            assert other.mail("<x@b>").verdict == Verdict.CONTINUE
        assert reply.result(WAIT).verdict == Verdict.CONTINUE
        mta.rcpt("<c@d>")
    running.wait_for(f"tasks 0 on {LOOP}")
    assert running.stop() == 0


def test_an_abort_that_a_message_implies_may_wait(leading: Callable[..., Any]) -> None:
    """An MTA that begins another message without a word about the first."""
    running = leading("Aborting")
    with running.mta() as mta:
        greet(mta)
        for number in range(3):
            assert mta.mail(f"<{number}@b>").verdict == Verdict.CONTINUE
    running.wait_for("envfrom <2@b>")
    assert running.stop() == 0
    assert "while it aborts" not in running.output
    assert running.output.count("afterwards") == 3


def test_a_loop_that_is_blocked_for_good_does_not_keep_the_filter(
    leading: Callable[..., Any],
) -> None:
    """Nor the connections: when the time is over they are closed."""
    running = leading("Stuck", drain_timeout=1)
    with contextlib.suppress(FilterClosed), ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        mta, idle = (stack.enter_context(running.mta()) for _ in range(2))
        greet(idle)
        greet(mta)
        mta.mail("<x@b>")
        reply = pool.submit(mta.rcpt, "<c@d>")
        running.wait_for("blocks")
        running.process.send_signal(signal.SIGTERM)
        idle.expect_close(WAIT)
        with contextlib.suppress(FilterClosed):
            assert reply.result(WAIT).verdict == Verdict.TEMPFAIL
    assert running.wait() == 0
    running.wait_for("stopped with 1 messages still in progress after 1 s")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_in_progress_comes_to_its_end(leading: Callable[..., Any], workers: int) -> None:
    """A stop leaves the messages their time, whoever leads."""
    running = leading("Leading", **({"workers": workers} if workers > 1 else {}))
    with contextlib.suppress(FilterClosed), running.mta() as mta:
        greet(mta)
        assert message(mta).verdict == Verdict.ACCEPT
        mta.mail("<a@b>")
        running.process.send_signal(signal.SIGTERM)
        mta.rcpt("<c@d>")
        verdict = mta.eom().verdict
    assert verdict == Verdict.ACCEPT
    assert running.wait() == 0
