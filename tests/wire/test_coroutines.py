"""Callbacks that are coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib.util
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Callable

import pytest
from support.commands import Runner
from support.engine import engine
from support.mta import frame
from support.process import FILTERS, WAIT

import Milter
from Milter import _async, _awaited
from Milter.mta import (
    MTA,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    FilterClosed,
    InsertHeader,
    Packet,
    Quarantine,
    ReplaceBody,
    SmtpReply,
    Stage,
    Step,
    Verdict,
)

UVLOOP = pytest.mark.skipif(
    importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"
)
LOOPS = ["", pytest.param("uvloop", marks=UVLOOP)]
PUT_OFF = b"451 4.3.2 pymilter: stopping, try again later: coroutines\0"
SOFT = SmtpReply(451, "4.3.0", ("pymilter: untrapped exception in coroutines",))


@pytest.fixture
def coroutines(run_filter: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a class of the filter, with keywords for runmilter."""

    def run(name: str, **options: Any) -> Any:
        return run_filter("coroutines", name, repr(options))

    return run


def envelope(mta: MTA, sender: str = "<a@b>", host: str = "client.example") -> None:
    mta.connect_info(host)
    mta.helo("h")
    mta.mail(sender)


def until_header(mta: MTA) -> None:
    envelope(mta)
    mta.rcpt("<c@d>")
    mta.data()


def message(mta: MTA, host: str = "client.example") -> Any:
    envelope(mta, host=host)
    mta.rcpt("<c@d>")
    mta.data()
    mta.header("Subject", " x")
    mta.eoh()
    return mta.eom()


def hang_up(mta: MTA) -> None:
    """End a connection on which another thread waits for an answer."""
    with socket.socket(fileno=os.dup(mta.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("loop", LOOPS)
def test_coroutines_and_plain_methods_in_turn(coroutines: Callable[..., Any], loop: str) -> None:
    """Actions reach the MTA from a task too; what connect set in its context is there in eom."""
    running = coroutines("EachStep", **({"uvloop": True} if loop else {}))
    with running.mta() as mta:
        reply = message(mta)
    assert reply.verdict == Verdict.ACCEPT
    assert reply.modifications == (
        AddHeader(b"X-Steps", b"connect hello envfrom envrcpt header"),
        AddHeader(b"X-Client", b"client.example"),
    )
    running.wait_for("closed client.example")
    assert running.stop() == 0
    assert "Error" not in running.output


def test_each_step_may_be_a_coroutine(coroutines: Callable[..., Any]) -> None:
    running = coroutines("AllSteps")
    with running.mta() as mta:
        mta.connect_info("client.example")
        mta.helo("h")
        mta.unknown("NONSENSE")
        mta.mail("<a@b>")
        mta.rcpt("<c@d>")
        mta.data()
        mta.header("Subject", " x")
        mta.eoh()
        mta.body(b"x\r\n")
        assert mta.eom().verdict == Verdict.CONTINUE
        mta.mail("<again@b>")
        mta.abort()
    running.wait_for("step close")
    first = "connect hello unknown envfrom envrcpt data header eoh body eom envfrom abort close"
    steps = [line.split()[1] for line in running.output.split("\n") if line.startswith("step ")]
    assert steps == first.split()
    assert running.stop() == 0


def test_actions_work_until_the_coroutine_returns(coroutines: Callable[..., Any]) -> None:
    """All of them, in their order, also from tasks that it awaits."""
    running = coroutines("Acting")
    with running.mta() as mta:
        envelope(mta)
        mta.rcpt("<c@d>", macros={"{rcpt_addr}": "c@d"})
        mta.data()
        mta.header("Subject", " x")
        mta.eoh()
        reply = mta.eom()
    assert reply.verdict == Verdict.CONTINUE
    assert reply.modifications == (
        AddHeader(b"X-Macro", b"c@d"),
        InsertHeader(0, b"X-First", b"1"),
        ChangeHeader(1, b"Subject", b""),
        ChangeSender("<x@b>"),
        AddRecipient("<y@d>"),
        DeleteRecipient("<c@d>"),
        ReplaceBody(b"new\r\n"),
        Quarantine("held"),
    )


@pytest.mark.parametrize("name", ["client.example", "other.example"])
def test_plain_callbacks_share_the_variables_of_their_connection(
    coroutines: Callable[..., Any], name: str
) -> None:
    running = coroutines("Mixed")
    with running.mta() as one, running.mta() as other:
        envelope(one, "<1@b>", name)
        envelope(other, "<2@b>", "third.example")
        for mta, client in ((one, f"{name}+<1@b>"), (other, "third.example+<2@b>")):
            mta.rcpt("<c@d>")
            assert mta.eom().modifications == (AddHeader(b"X-Client", client.encode()),)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("PlainAlone", 2), ("Returning", 3), ("Hidden", 3), ("NegotiatingAlone", 3)],
)
def test_no_connection_sees_the_variables_of_another(
    coroutines: Callable[..., Any], name: str, steps: int
) -> None:
    """From the first callback on, whether or not anybody knows of a coroutine yet."""
    running = coroutines(name)
    with running.mta() as one, running.mta() as other:
        both = ((one, "one.example"), (other, "other.example"))
        for mta, client in both:
            mta.connect_info(client)
        for mta, _ in both:
            mta.helo("h")
        for mta, client in both:
            mta.mail("<a@b>")
            mta.rcpt("<c@d>")
            seen = " ".join(["nobody", *[client] * steps])
            assert mta.eom().modifications == (AddHeader(b"X-Seen", seen.encode()),)


def test_the_steps_of_a_connection_never_overlap(coroutines: Callable[..., Any]) -> None:
    """Nor where the MTA does not wait for answers."""
    running = coroutines("InTurn")
    with running.mta() as mta:
        envelope(mta)
        mta.rcpt("<c@d>")
        mta.data()
        for number in range(20):
            assert mta.header("X", f" {number}").verdict == Verdict.NO_REPLY
        assert mta.eom().modifications == (AddHeader(b"X-Most", b"1 of 20"),)


def test_what_goes_wrong_is_what_goes_wrong_in_any_callback(
    coroutines: Callable[..., Any],
) -> None:
    running = coroutines("Failing")
    with running.mta() as mta:
        mta.connect_info("client.example", "192.0.2.1", 25)
        mta.helo("h")
        mta.mail("<a@b>", macros={"i": "4F1A2", "_": "client.example [192.0.2.1]"})
        assert mta.rcpt("<good@d>").verdict == Verdict.CONTINUE
        assert mta.rcpt("<raise@d>").smtp == SOFT
        assert mta.rcpt("<none@d>").smtp == SOFT
        assert mta.rcpt("<reply@d>").smtp == SmtpReply(550, "5.7.1", ("not you",))
        assert mta.rcpt("<good@d>").verdict == Verdict.CONTINUE
    assert running.stop() == 0
    told = "exception in the envrcpt callback, queue id 4F1A2, client client.example [192.0.2.1]"
    assert running.output.count(told) == 2
    # The traceback begins in the filter.
    frames = re.findall(r'File ".*/(\w+\.py)", line', running.output.partition("KeyError:")[0])
    assert frames == ["coroutines.py"]
    assert "the envrcpt callback returned None: not an int" in running.output


def test_tracebacks_begin_in_the_filter(coroutines: Callable[..., Any]) -> None:
    """Also where something of ours is around the coroutine: @noreply, and in close."""
    running = coroutines("FailingWithin")
    with running.mta() as mta:
        envelope(mta)
        mta.header("A", "b")
        assert mta.eom().smtp == SOFT
    running.wait_for("KeyError: 'of close'")
    assert running.stop() == 0
    frames = re.findall(r'File ".*/(\w+\.py)", line .*, in (\w+)', running.output)
    assert frames == [("coroutines.py", "header"), ("coroutines.py", "close")]


COUNTS = sys.version_info >= (3, 11)  # how many times a task was cancelled
GROUPS = pytest.mark.skipif(not COUNTS, reason="no TaskGroup before Python 3.11")


@pytest.mark.parametrize("whose", ["another", pytest.param("group", marks=GROUPS)])
@pytest.mark.parametrize("step", ["first", "later"])
def test_that_something_else_was_cancelled_is_an_exception(
    coroutines: Callable[..., Any], whose: str, step: str
) -> None:
    """Like any other, whatever was cancelled before that: the filter does not stop."""
    running = coroutines("Cancelled", policy="REJECT")
    with running.mta() as mta:
        envelope(mta)
        assert mta.rcpt(f"<{whose}.{step}@d>").verdict == Verdict.REJECT
    assert running.stop() == 0
    assert running.output.count("exception in the envrcpt callback") == 1
    assert running.output.count("ExceptionGroup") == (1 if whose == "group" else 0)


@pytest.mark.parametrize("name", ["itself", "later.itself", "odd", "later.odd"])
def test_a_coroutine_that_is_cancelled_by_the_program_is_put_off(
    coroutines: Callable[..., Any], name: str
) -> None:
    """It is answered, whatever it waits for, and the log is told."""
    running = coroutines("Cancelled")
    with running.mta() as mta:
        envelope(mta)
        reply = mta.rcpt(f"<{name}@d>")
        assert reply.smtp is not None and reply.smtp.code == 451
        reply = mta.rcpt(f"<{name}@d>")
    if COUNTS:
        running.wait_for("the envrcpt callback Cancelled.envrcpt (", 2)
        running.wait_for("was cancelled by the program", 2)
    assert running.stop() == 0
    assert running.output.count("exception in the envrcpt callback") == (0 if COUNTS else 2)


def test_what_cannot_be_cancelled_does_not_keep_the_mta_waiting(
    coroutines: Callable[..., Any],
) -> None:
    running = coroutines("Cancelled")
    with running.mta() as mta:
        envelope(mta)
        assert mta.rcpt("<ungrateful@d>").smtp == SOFT
    running.wait_for("KeyError: 'of what is awaited'")
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("policy", "code", "verdict"),
    [("REJECT", 554, Verdict.REJECT), ("CONTINUE", None, Verdict.CONTINUE)],
)
def test_the_policy_is_that_of_any_callback(
    coroutines: Callable[..., Any], policy: str, code: int | None, verdict: Verdict
) -> None:
    running = coroutines("Failing", policy=policy)
    with running.mta() as mta:
        envelope(mta)
        reply = mta.rcpt("<raise@d>")
        assert reply.verdict == verdict
        assert (reply.smtp.code if reply.smtp else None) == code


def test_sys_exit_in_a_coroutine_ends_the_filter(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Exiting")
    with contextlib.suppress(OSError, EOFError), running.mta() as mta:
        envelope(mta)
    assert running.wait() == 3


@pytest.mark.parametrize("loop", LOOPS)
def test_those_that_wait_do_not_hold_up_the_others(
    coroutines: Callable[..., Any], loop: str
) -> None:
    """Nor do they hold threads of the engine `native`."""
    running = coroutines("Meeting", **({"uvloop": True} if loop else {}))

    def send(number: int) -> Verdict:
        with running.mta() as mta:
            envelope(mta)
            return mta.rcpt(f"<{number}@d>").verdict

    with ThreadPoolExecutor(40) as pool:
        assert set(pool.map(send, range(40))) == {Verdict.CONTINUE}
    line = running.wait_for("threads")
    if sys.platform == "linux":
        threads = int(line.split()[-1])
        # A few come and go as the machine is loaded; benchmarks/coroutine_cost.py counts them.
        assert threads < 20 if engine() == "native" else threads >= 40


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_awaited_may_be_awaited_by_others(
    coroutines: Callable[..., Any], loop: str
) -> None:
    """Each gets what came of it, the callback and the others."""
    running = coroutines("Sharing", **({"uvloop": True} if loop else {}))
    with running.mta() as mta:
        envelope(mta)
        for kind in ("future", "task", "done", "event", "queue", "condition", "lock"):
            mta.rcpt("<nothing@d>")  # the task of one that does not wait is the next one's
            assert mta.rcpt(f"<{kind}@d>").smtp is None, kind
    assert running.stop() == 0
    for complaint in ("Error", "never", "destroyed"):
        assert complaint not in running.output


def test_connections_may_share_what_is_looked_up(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Sharing")
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        mtas = [stack.enter_context(running.mta()) for _ in range(8)]
        for mta in mtas:
            envelope(mta)
        for _ in range(20):
            replies = pool.map(lambda mta: mta.rcpt("<lookup@d>").verdict, mtas)
            assert set(replies) == {Verdict.REJECT}
    assert running.stop() == 0
    assert "Error" not in running.output


def test_generators_that_may_be_awaited_are(coroutines: Callable[..., Any]) -> None:
    """Others are a mistake."""
    running = coroutines("Generating")
    with running.mta() as mta:
        envelope(mta)
        assert mta.rcpt("<c@d>").verdict == Verdict.REJECT
        mta.data()
        assert mta.header("A", " b").verdict == Verdict.NO_REPLY
        assert mta.eom().smtp == SOFT
    running.wait_for("the eom callback returned <generator object Generating.eom at")
    assert running.stop() == 0
    assert running.output.count("exception in the ") == 1


# --- the decorators ------------------------------------------------------------------------------


def test_decorators_apply_to_coroutines(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Decorated")
    with running.mta() as mta:
        negotiated = mta.negotiated
        assert Step.NOHELO in negotiated.steps
        assert Step.NR_HDR in negotiated.steps
        assert negotiated.macros == {Stage.MAIL: ("{client_ptr}", "i")}
        envelope(mta)
        mta.rcpt(b"<caf\xe9@d>")
        running.wait_for(r"recipient b'<caf\xe9@d>'")
        mta.data()
        assert mta.header("Subject", " x").verdict == Verdict.NO_REPLY
        assert mta.eom().smtp == SOFT
    running.wait_for("header return code must be CONTINUE with @noreply, but is")


# --- hanging up ----------------------------------------------------------------------------------


@pytest.mark.engine("native")
@pytest.mark.parametrize(
    ("step", "loop"),
    [
        ("connect", ""),
        ("envrcpt", ""),
        ("header", ""),
        ("eom", ""),
        pytest.param("envrcpt", "uvloop", marks=UVLOOP),
    ],
)
def test_what_waits_when_the_mta_hangs_up_is_cancelled(
    coroutines: Callable[..., Any], step: str, loop: str
) -> None:
    """Then abort and close follow, which are not."""
    running = coroutines("HangingUp", **({"uvloop": True} if loop else {}))
    mta = running.mta()
    with ThreadPoolExecutor(1) as pool:
        talk = pool.submit(message, mta, step)
        running.wait_for(f"waits in {step}")
        hang_up(mta)
        running.wait_for("closed")
        with contextlib.suppress(FilterClosed):
            talk.result(WAIT)
    mta.close()
    lines = running.output.split("\n")
    wanted = [f"waits in {step}", f"cancelled in {step}", "aborted", "closed"]
    assert [line for line in lines if line in wanted] == [
        line for line in wanted if line != "aborted" or step != "connect"
    ]
    assert "exception" not in running.output
    with running.mta() as another:
        assert message(another, "nowhere").verdict == Verdict.CONTINUE
    assert running.stop() == 0


@pytest.mark.engine("native")
def test_each_that_waits_after_a_hang_up_is_cancelled(coroutines: Callable[..., Any]) -> None:
    """Not the first one alone: it may have answered all the same, and the next step be there."""
    running = coroutines("Twice")
    mta = running.mta()
    envelope(mta)
    mta.rcpt("<c@d>")
    mta.data()
    mta.header("A", " 1")
    running.wait_for("waits")
    mta.header("B", " 2")
    hang_up(mta)
    mta.close()
    running.wait_for("cancelled 1")
    running.wait_for("aborted")  # so the second one waits no more, if it has begun at all
    assert running.stop() == 0


@pytest.mark.engine("native")
def test_what_a_cancelled_one_raises_is_reported_and_changes_nothing(
    coroutines: Callable[..., Any],
) -> None:
    """When the MTA has hung up: abort and close follow, as after any other."""
    running = coroutines("Grumbling", policy="REJECT")
    mta = running.mta()
    with ThreadPoolExecutor(1) as pool:
        envelope(mta)
        answer = pool.submit(mta.rcpt, "<c@d>")
        running.wait_for("waits")
        hang_up(mta)
        running.wait_for("closed")
        with contextlib.suppress(FilterClosed):
            answer.result(WAIT)
    mta.close()
    assert "\naborted\n" in running.output
    assert running.output.count("KeyError: 'of the library'") == 1
    assert running.output.count("exception in the envrcpt callback") == 1


@pytest.mark.engine("libmilter")
def test_with_libmilter_nobody_knows_that_the_mta_has_hung_up(
    coroutines: Callable[..., Any],
) -> None:
    """Its end is seen when the coroutine has ended."""
    running = coroutines("HangingUp", drain_timeout=0)
    mta = running.mta()
    with ThreadPoolExecutor(1) as pool:
        talk = pool.submit(message, mta, "envrcpt")
        running.wait_for("waits in envrcpt")
        hang_up(mta)
        with contextlib.suppress(FilterClosed):
            talk.result(WAIT)
    mta.close()
    assert "cancelled" not in running.output
    assert running.stop() == 0
    assert "cancelled in envrcpt" in running.output


def test_abort_and_close_may_be_coroutines(coroutines: Callable[..., Any]) -> None:
    """Of a message that is reset, and at the end of the connection; steps go on in turn."""
    running = coroutines("HangingUp")
    with running.mta() as mta:
        envelope(mta)
        mta.abort()
        mta.mail("<again@b>")
        assert mta.rcpt("<c@d>").verdict == Verdict.CONTINUE
        running.wait_for("aborted")
        mta.quit()
    running.wait_for("closed")
    assert [line for line in running.output.split("\n") if line in ("aborted", "closed")] == [
        "aborted",
        "aborted",
        "closed",
    ]


def test_many_that_close_hold_no_thread(coroutines: Callable[..., Any]) -> None:
    running = coroutines("HangingUp")
    for _ in range(20):
        with running.mta() as mta:
            mta.connect_info("client.example")
    running.wait_for("closed", 20)
    assert running.stop() == 0


# --- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_what_waits_at_the_end_of_the_drain_is_cancelled(
    coroutines: Callable[..., Any], loop: str
) -> None:
    """The message is put off; the loop's thread ends with the filter."""
    options = {"drain_timeout": 0, "uvloop": True} if loop else {"drain_timeout": 1}
    running = coroutines("Waiting", **options)
    mta = running.mta()
    with ThreadPoolExecutor(1) as pool:
        envelope(mta)
        answer = pool.submit(mta.rcpt, "<c@d>")
        running.wait_for("waits")
        running.process.send_signal(signal.SIGTERM)
        assert answer.result(WAIT).smtp == SmtpReply(
            451, "4.3.2", ("pymilter: stopping, try again later: coroutines",)
        )
        running.wait_for("cancelled")
        running.wait_for("loops left []")
    with contextlib.suppress(FilterClosed):
        mta.close()
    assert running.wait() == 0


def test_a_filter_in_a_daemon_thread_drains_at_the_end_of_the_program(
    coroutines: Callable[..., Any],
) -> None:
    """Its coroutines too go on until the deadline."""
    running = coroutines("Pausing", daemon=True, drain_timeout=10)
    mta = running.mta()
    with ThreadPoolExecutor(1) as pool:
        envelope(mta)
        answer = pool.submit(mta.rcpt, "<c@d>")
        running.wait_for("waits")
        running.process.send_signal(signal.SIGUSR1)
        running.wait_for("the program ends")
        assert answer.result(WAIT).smtp is None
    assert mta.eom().modifications == (AddHeader(b"X-Paused", b"twice"),)
    with contextlib.suppress(FilterClosed):
        mta.close()
    assert running.wait() == 0
    for complaint in ("Traceback", "never awaited", "destroyed"):
        assert complaint not in running.output


def test_what_a_cancelled_one_raises_judges_no_message(coroutines: Callable[..., Any]) -> None:
    """The message is put off, whatever the policy; what was raised is in the log."""
    running = coroutines("Grumbling", drain_timeout=0, policy="REJECT")
    mta = running.mta()
    with ThreadPoolExecutor(1) as pool:
        envelope(mta)
        answer = pool.submit(mta.rcpt, "<c@d>")
        running.wait_for("waits")
        running.process.send_signal(signal.SIGTERM)
        assert answer.result(WAIT).smtp == SmtpReply(
            451, "4.3.2", ("pymilter: stopping, try again later: coroutines",)
        )
    with contextlib.suppress(FilterClosed):
        mta.close()
    assert running.wait() == 0
    assert running.output.count("exception in the envrcpt callback") == 1
    assert "KeyError: 'of the library'" in running.output


def test_a_step_without_reply_that_is_cancelled_is_made_up_for(
    coroutines: Callable[..., Any],
) -> None:
    """The message does not go on as if nothing had been: the next answer puts it off."""
    running = coroutines("Itself")
    with running.mta() as mta:
        envelope(mta)
        mta.rcpt("<c@d>")
        mta.data()
        mta.header("A", " 1")
        assert mta.eom().smtp == SOFT


def test_a_step_without_reply_that_the_drain_cuts_short_is_made_up_for(
    coroutines: Callable[..., Any],
) -> None:
    """The next answer says why: nothing was raised."""
    running = coroutines("WaitingUnanswered", drain_timeout=1)
    mta = running.mta()
    until_header(mta)
    mta.send_raw(frame(b"L", b"A\0 1\0") + frame(b"N") + frame(b"E"))
    running.wait_for("waits")
    running.process.send_signal(signal.SIGTERM)
    assert mta.read_packet(WAIT) == Packet(b"y", PUT_OFF)
    mta.expect_close(WAIT)
    mta.close()
    assert running.wait() == 0
    assert not re.search("^eom$", running.output, re.MULTILINE)


@pytest.mark.parametrize("name", ["WaitingUnanswered", "LeadingUnanswered"])
@pytest.mark.parametrize("much", [False, True])
def test_what_was_sent_meanwhile_is_answered_after_the_drain(
    coroutines: Callable[..., Any], name: str, much: bool
) -> None:
    """The next step that has a reply has it, though the connection is closed then."""
    running = coroutines(name, drain_timeout=1)
    mta = running.mta()
    until_header(mta)
    mta.header("A", " 1")
    running.wait_for("waits")
    for _ in range(100 if much else 0):  # more than one read, or one turn, takes in
        mta.send_packet(b"L", b"B\0" + b" 2" * 100 + b"\0")
    mta.send_packet(b"N")
    if much:
        mta.send_packet(b"B", b"x" * 40000)
    mta.send_packet(b"D", b"Ei\0QUEUED\0")
    mta.send_packet(b"E")
    running.process.send_signal(signal.SIGTERM)
    assert mta.read_packet(WAIT) == Packet(b"y", PUT_OFF)
    mta.expect_close(WAIT)
    mta.close()
    assert running.wait() == 0
    assert not re.search("^eom$", running.output, re.MULTILINE)


@pytest.mark.parametrize("sent", [b"", frame(b"N"), frame(b"B", b"cut short")[:-1]])
def test_after_the_drain_nobody_waits_for_what_the_mta_has_not_sent(
    coroutines: Callable[..., Any], sent: bytes
) -> None:
    running = coroutines("WaitingUnanswered", drain_timeout=0)
    mta = running.mta()
    until_header(mta)
    mta.header("A", " 1")
    running.wait_for("waits")
    mta.send_raw(sent)
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    mta.expect_close(WAIT)
    assert time.monotonic() - began < 1.9  # after 2 s connections that are left would be closed
    mta.close()
    assert running.wait() == 0


def test_a_coroutine_before_a_message_goes_on_until_the_deadline_too(
    coroutines: Callable[..., Any],
) -> None:
    running = coroutines("HangingUp", drain_timeout=1)
    with ThreadPoolExecutor(1) as pool:
        mta = running.mta()
        talk = pool.submit(message, mta, "connect")
        running.wait_for("waits in connect")
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("cancelled in connect")
        assert time.monotonic() - began > 0.9
        with contextlib.suppress(OSError, EOFError):
            talk.result(WAIT)
        assert running.wait() == 0
        mta.close()


@pytest.mark.parametrize("step", ["eom", "close"])
def test_a_coroutine_that_does_not_end_is_left_behind(
    coroutines: Callable[..., Any], step: str
) -> None:
    """The filter ends all the same; what is left acts no more."""
    running = coroutines("Impatient", drain_timeout=0)
    mta = running.mta()
    with ThreadPoolExecutor(1) as pool:
        talk = pool.submit(message, mta, step)
        if step == "close":
            assert talk.result(WAIT).verdict == Verdict.CONTINUE
            mta.close()
        running.wait_for("waits")
        running.process.send_signal(signal.SIGTERM)
        if step == "eom":
            assert talk.result(WAIT).smtp.code == 451
    running.wait_for(f"the {step} callback ")
    running.wait_for("goes on though it was cancelled; the connection goes on without it")
    running.wait_for("loops left []")
    assert running.wait() == 0
    assert "refused: " in running.output
    with contextlib.suppress(FilterClosed):
        mta.close()


def test_a_close_that_does_not_end_is_cancelled_by_and_by(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Impatient")
    with running.mta() as mta:
        message(mta, "close")
    running.wait_for("was cancelled after 0.2 s")
    running.wait_for("swallowed")
    assert running.stop() == 0


def test_a_task_that_is_left_acts_no_more(coroutines: Callable[..., Any]) -> None:
    """Not in the callback that began it: the next one may be another message's."""
    running = coroutines("Leftover")
    with running.mta() as mta:
        assert message(mta).modifications == ()
        mta.mail("<next@b>")
    running.wait_for("refused: smfi_addheader: only allowed in the eom callback")


def test_tasks_of_the_program_end_with_the_filter(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Background")
    with running.mta() as mta:
        envelope(mta)
    assert running.stop() == 0
    lines = running.output.split("\n")
    assert lines.index("background ended") < lines.index("loops left []")
    assert "never awaited" not in running.output and "destroyed" not in running.output


def test_sys_exit_as_a_task_is_cancelled_at_the_end(coroutines: Callable[..., Any]) -> None:
    """It is the program's exit status; the others end as ever."""
    running = coroutines("ExitingAtEnd")
    with running.mta() as mta:
        envelope(mta)
    assert running.stop() == 5
    running.wait_for("background ended")
    assert "never awaited" not in running.output and "destroyed" not in running.output


def test_close_comes_after_an_abort_that_waits_at_the_end(coroutines: Callable[..., Any]) -> None:
    """In the same loop, and to its end."""
    running = coroutines("Aborting", drain_timeout=0, make_loop=True)
    mta = running.mta()
    envelope(mta)
    mta.abort()
    running.wait_for("abort waits")
    assert running.stop() == 0
    lines = running.output.split("\n")
    assert lines.index("close ended") < lines.index("loops left []")
    assert running.output.count("a loop is made") == 1
    assert "goes on though it was cancelled" not in running.output
    with contextlib.suppress(FilterClosed):
        mta.close()


# --- the loop ------------------------------------------------------------------------------------


def test_the_loop_is_made_by_the_factory_when_it_is_needed(coroutines: Callable[..., Any]) -> None:
    running = coroutines("EachStep", make_loop=True)
    with running.mta() as mta:
        assert "a loop is made" not in running.output
        message(mta)
    running.wait_for(f"a loop is made in {running.pid}")
    assert running.stop() == 0
    assert running.output.count("a loop is made") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_loop_of_the_stand_in_is_no_filter_s(
    coroutines: Callable[..., Any], workers: int
) -> None:
    """It has ended before the filter begins, which has one that is made as it says."""
    running = coroutines("EachStep", stand_in=True, make_loop=True, workers=workers)
    with running.mta() as mta:
        assert "a loop is made" not in running.output
        message(mta)
    running.wait_for("a loop is made in ")
    assert running.stop() == 0


def test_each_worker_has_a_loop(coroutines: Callable[..., Any]) -> None:
    running = coroutines("EachStep", make_loop=True, workers=2)

    def send(_: int) -> Verdict:
        with running.mta() as mta:
            return message(mta).verdict

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(send, range(16))) == {Verdict.ACCEPT}
    assert running.stop() == 0
    made = re.findall(r"a loop is made in (\d+)", running.output)
    assert 1 <= len(set(made)) == len(made) <= 2
    assert str(running.pid) not in made


FACTORIES = {
    "3": "TypeError: loop_factory must be callable or None, not int",
    "lambda: 3": "TypeError: loop_factory must return an event loop of asyncio, not int",
    "lambda: closed": "ValueError: loop_factory must return a new event loop, not one that is clo",
    "lambda: 1 / 0": "ZeroDivisionError: ",
    "lambda: sys.exit(7)": "",
}


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_loop_factory_that_is_none(run_filter: Callable[..., Any], factory: str) -> None:
    source = (
        "import asyncio, sys, Milter\n"
        "closed = asyncio.new_event_loop()\n"
        "closed.close()\n"
        "class Filter(Milter.Base):\n"
        "    async def envfrom(self, *args):\n"
        "        return Milter.CONTINUE\n"
        "Milter.factory = Filter\n"
        f"Milter.runmilter('coroutines', sys.argv[1], loop_factory={factory})\n"
    )
    running = run_filter(source=source)
    if factory == "3":
        running.wait_for(FACTORIES[factory])
        assert running.wait() == 1
        return
    with contextlib.suppress(OSError, EOFError), running.mta() as mta:
        envelope(mta)
        if FACTORIES[factory]:
            assert mta.mail("<again@b>").smtp == SOFT
    if FACTORIES[factory]:
        running.wait_for(FACTORIES[factory], 2)
        assert running.stop() == 0
    else:
        assert running.wait() == 7
    assert "never awaited" not in running.output


@pytest.mark.parametrize("lacking", ["no_thread", "failing_loop"])
def test_what_cannot_be_begun_is_answered(coroutines: Callable[..., Any], lacking: str) -> None:
    """And what can be begun afterwards goes on."""
    running = coroutines("Failing", **{lacking: True})
    with running.mta() as mta:
        envelope(mta)
        assert mta.rcpt("<good@d>").smtp == SOFT
        assert mta.rcpt("<good@d>").verdict == Verdict.CONTINUE
        assert mta.rcpt("<reply@d>").smtp == SmtpReply(550, "5.7.1", ("not you",))
    running.wait_for("RuntimeError: no ")
    assert running.stop() == 0
    assert "never awaited" not in running.output


def test_a_loop_that_the_filter_stops_goes_on(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Meddling")
    with running.mta() as mta:
        envelope(mta)
        assert mta.rcpt("<stop@d>").verdict == Verdict.CONTINUE
        assert mta.rcpt("<good@d>").verdict == Verdict.CONTINUE
    assert running.stop() == 0
    running.wait_for("loops left []")


def test_sys_exit_in_a_task_ends_the_filter(coroutines: Callable[..., Any]) -> None:
    """Not its loop alone, for which all would wait: the message in progress comes to its end."""
    running = coroutines("Meddling")
    with contextlib.suppress(FilterClosed), running.mta() as mta:
        envelope(mta)
        assert mta.rcpt("<exit@d>").verdict == Verdict.CONTINUE
        assert mta.rcpt("<good@d>").verdict == Verdict.CONTINUE
        assert mta.eom().verdict == Verdict.CONTINUE
        assert running.wait() == 3


def test_the_child_of_a_coroutine_that_forks_ends(coroutines: Callable[..., Any]) -> None:
    """As that of any callback: the connections are the parent's, which alone answers."""
    running = coroutines("Meddling")
    with running.mta() as mta:
        envelope(mta)
        assert mta.rcpt("<fork@d>").verdict == Verdict.CONTINUE
        assert mta.rcpt("<good@d>").verdict == Verdict.CONTINUE
    running.wait_for("child ended with ")
    assert running.stop() == 0


def test_what_comes_with_the_end_of_the_loop_is_begun() -> None:
    """As a close callback does that a thread of the engine hands over just then."""

    async def close() -> int:
        return Milter.ACCEPT

    async def end() -> list[tuple[Any, ...]]:
        answers: list[tuple[Any, ...]] = []
        runner = _async.Runner(asyncio.get_running_loop())
        runner.start(
            _awaited.Callback(
                close(),
                None,
                contextvars.copy_context(),
                "close",
                True,
                lambda *answer: answers.append(answer),
            )
        )
        await runner.wait_for_rest()
        return answers

    assert asyncio.run(end()) == [(_awaited.RETURNED, Milter.ACCEPT, None)]


def test_a_loop_that_is_blocked_is_told_of_with_the_place(runner: Runner) -> None:
    """Once for each place, where the log is told so much."""
    filter_ = f"{FILTERS}/coroutines.py:Blocking"
    running = runner.start(filter_, "--log-level", "debug", engine=engine())
    with running.mta() as mta:
        envelope(mta)
        mta.mail("<again@b>")
    running.wait_for("the event loop of coroutine callbacks is blocked for more than 1 s, at ")
    assert running.stop() == 0
    (told,) = re.findall(" is blocked for more than 1 s, at (.*)", running.output)
    # The filter's frames alone, the innermost first, in a line that one can read.
    place = re.escape(str(FILTERS / "coroutines.py")) + r":\d+ in "
    source = re.escape('subprocess.run(["sleep", "1.5"], check=True)  # in the loop')
    assert re.fullmatch(f"{place}wait: {source}; called at {place}envfrom", told)


# --- what is wrong -------------------------------------------------------------------------------


def test_negotiation_is_no_coroutine(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Negotiating")
    with contextlib.suppress(OSError, EOFError), running.mta() as mta:
        mta.connect_info("c")
    running.wait_for("so it is no coroutine; write it without async")
    assert running.stop() == 0
    assert "never awaited" not in running.output


def test_a_coroutine_that_returns_one(coroutines: Callable[..., Any]) -> None:
    running = coroutines("Nested")
    with running.mta() as mta:
        mta.connect_info("c")
        mta.helo("h")
        assert mta.mail("<a@b>").smtp == SOFT
    running.wait_for("not an int; the coroutine that returned it must await it")
    assert running.stop() == 0
    assert "never awaited" not in running.output


def test_callbacks_of_the_extension_may_be_coroutines(coroutines: Callable[..., Any]) -> None:
    running = coroutines("raw")
    with running.mta() as mta:
        envelope(mta)
        assert mta.rcpt("<no@d>").verdict == Verdict.REJECT
        assert mta.rcpt("<yes@d>").verdict == Verdict.CONTINUE
        mta.data()
        mta.abort()
    running.wait_for("raw 0", 3)  # data, abort and close
    assert running.stop() == 0
    assert "never awaited" not in running.output
