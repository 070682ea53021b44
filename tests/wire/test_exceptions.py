"""Exceptions in callbacks: how they are reported, and what the MTA hears."""

from __future__ import annotations

import sys
from typing import Any, Callable

import pytest
from support.wire import Session, session

from Milter.mta import FilterClosed, Offer, SmtpReply, Step, Verdict

SOFT = SmtpReply(451, "4.3.0", ("pymilter: untrapped exception in scripted",))
CLIENT = "client localhost [127.0.0.1]"


@pytest.fixture(scope="module")
def scripted(run_shared_filter: Callable[..., Any]) -> Any:
    return run_shared_filter("scripted")


def test_the_report_has_traceback_stage_and_queue_id(scripted: Any) -> None:
    with session(scripted, data="def inner():\n    raise KeyError(tag)\ninner()") as each:
        each.connect()
        each.mta.helo("h")
        each.mta.mail("<a@b>", macros={"i": "4XyZ"})
        each.mta.rcpt("<c@d>")
        assert each.mta.data().smtp == SOFT
    lines = each.log().split("\n")
    assert lines[0] == f"exception in the data callback, queue id 4XyZ, {CLIENT}"
    assert lines[1] == "Traceback (most recent call last):"
    assert any(line.endswith("in inner") for line in lines)
    assert lines[-1] == f"KeyError: '{each.tag}'"


@pytest.mark.parametrize(
    ("queue_id", "shown"),
    [
        (b"\xff%s", r"\xff%s"),
        (b"a\r\n\tb\x7f", "a???b?"),
        ("a\x85b\x9bc\u2028d\u2029e".encode(), "a?b?c?d?e"),  # lines to some that read logs
        ("é€".encode(), "é€"),
        (b"x" * 199 + "€".encode(), "x" * 199 + r"\xe2"),
    ],
)
def test_a_queue_id_that_is_no_text(scripted: Any, queue_id: bytes, shown: str) -> None:
    with session(scripted, eom="raise KeyError(tag)") as each:
        each.envelope()
        each.mta.eoh()
        reply = each.mta.eom(macros={"i": queue_id})
    assert reply.smtp == SOFT
    assert f"exception in the eom callback, queue id {shown}, client" in each.log()


RECORD = """
import logging
class Handler(logging.Handler):
    def emit(self, record):
        kind, value, traceback = record.exc_info
        say(record.name, record.levelname, record.getMessage(), kind.__name__, str(value),
            traceback is value.__traceback__ is not None)
logging.getLogger().addHandler(Handler())
"""


def test_the_report_is_a_record_of_the_logger_milter(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted", RECORD)
    with session(running, eom="raise ValueError('100% of it')") as each:
        each.message()
    expected = (
        *("milter", "ERROR", f"exception in the eom callback, queue id unknown, {CLIENT}"),
        *("ValueError", "100% of it", True),
    )
    assert each.log() == f"negotiate {expected!r}"


@pytest.mark.parametrize(
    "methods",
    [
        "'__len__': lambda self: 0",
        "'__bool__': lambda self: False",
        "'__bool__': lambda self: 1 / 0",  # Python's own formatter does not survive this one
    ],
)
def test_an_exception_that_is_false_has_its_traceback(
    run_filter: Callable[..., Any], methods: str
) -> None:
    running = run_filter("scripted", RECORD)
    body = f"raise type('Odd', (Exception,), {{{methods}}})(tag)"
    with session(running, eom=body) as each:
        assert each.message().smtp == SOFT
    expected = (
        *("milter", "ERROR", f"exception in the eom callback, queue id unknown, {CLIENT}"),
        *("Odd", each.tag, True),
    )
    assert each.log() == f"negotiate {expected!r}"


HOOK = """
import sys, traceback
def hook(kind, value, tb):
    say(kind.__name__, str(value), tb is value.__traceback__ is not None,
        getattr(value, "__notes__", None))
    if str(value) == "hook":
        raise RuntimeError("of the hook itself")
sys.excepthook = hook
"""


def test_the_report_goes_to_a_replaced_excepthook(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted", HOOK)
    with session(running, eom="raise ValueError('seen')") as each:
        assert each.message().smtp == SOFT
    told = f"exception in the eom callback, queue id unknown, {CLIENT}"
    notes = [told] if sys.version_info >= (3, 11) else None
    seen = f"negotiate {('ValueError', 'seen', True, notes)!r}"
    # Exceptions have no notes before Python 3.11: the facts go to the log.
    assert set(each.log().splitlines()) == ({seen} if notes else {seen, told})


def test_an_excepthook_that_fails_itself_harms_nothing(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted", HOOK)
    with session(running, eom="raise ValueError('hook')") as each:
        assert each.message().smtp == SOFT
    assert "RuntimeError: of the hook itself" in each.log()


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("raise MemoryError(tag)", "MemoryError: {tag}"),
        ("raise GeneratorExit(tag)", "GeneratorExit: {tag}"),
        ("import asyncio; raise asyncio.CancelledError(tag)", "CancelledError: {tag}"),
        ("def f(): return f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("return bytes(2**62)", "MemoryError"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1/0})()", "\nE: <"),
        ("try:\n    1/0\nexcept ZeroDivisionError:\n    raise ValueError(tag) from None",
         "ValueError: {tag}"),
        ("raise UserWarning(tag)", "UserWarning: {tag}"),
        ("raise type('E', (Exception,), {'__len__': lambda self: 0})(tag)", "\nE: {tag}"),
        ("raise type('E', (Exception,), {'__bool__': lambda self: False})(tag)", "\nE: {tag}"),
        ("raise Exception('\\udcff\\x00' + tag)", "{tag}"),
    ],
)  # fmt: skip
def test_whatever_is_raised(scripted: Any, body: str, report: str) -> None:
    with session(scripted, eom=body) as each:
        assert each.message().smtp == SOFT
        each.mta.mail("<a@b>")
    assert report.format(tag=each.tag) in each.log()
    assert each.log().count("exception in the eom callback") == 1


# A child that is not ended goes on as a second filter on the same connection: the alarm ends it.
FORKING_HOOK = """
import logging, os, signal, sys

def hook(kind, exception, traceback):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        {does}
        return
    status = os.waitpid(child, 0)[1]
    say("child", os.WIFEXITED(status), os.WEXITSTATUS(status))

sys.excepthook = hook
"""


@pytest.mark.parametrize("does", ["pass", "raise ValueError"])
def test_a_child_that_the_excepthook_forks_ends(run_filter: Callable[..., Any], does: str) -> None:
    running = run_filter("scripted", FORKING_HOOK.replace("{does}", does))
    with session(running, eom="raise KeyError(tag)") as each:
        assert each.message().smtp == SOFT
        each.mta.expect_nothing()
        assert each.mta.mail("<a@b>").verdict is Verdict.CONTINUE
    assert running.wait_for("('child'") == "negotiate ('child', True, 0)"
    assert running.stop() == 0


@pytest.mark.parametrize("stage", ["abort", "close"])
def test_exceptions_in_abort_and_close_are_reported_and_no_more(scripted: Any, stage: str) -> None:
    with session(scripted, **{stage: "raise ValueError(tag)"}) as each:
        each.envelope()
        each.mta.abort()
        assert each.mta.mail("<a@b>").verdict is Verdict.CONTINUE
        assert each.mta.rcpt("<c@d>").verdict is Verdict.CONTINUE
    # The message that QUIT cuts off is aborted as well.
    times = 2 if stage == "abort" else 1
    # What close() raises is reported after the filter has said its last word.
    each.filter.wait_for(f"ValueError: {each.tag}", times)
    assert each.log().count(f"ValueError: {each.tag}") == times
    assert each.log().count(f"exception in the {stage} callback, queue id unknown") == times


def test_a_message_that_failed_does_not_hurt_the_next(scripted: Any) -> None:
    body = "store.n = getattr(store, 'n', 0) + 1\nif store.n == 1: raise ValueError(tag)"
    with session(scripted, eom=body) as each:
        assert each.message().smtp == SOFT
        each.transaction()
        assert each.content().verdict is Verdict.CONTINUE
    assert each.log().count("Traceback") == 1


# --- negotiation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("raise ValueError('in negotiate')", "ValueError: in negotiate"),
        ("return None", "returned None: not CONTINUE, ALL_OPTS or REJECT"),
        ("return 'x'", "returned 'x': not CONTINUE, ALL_OPTS or REJECT"),
        ("return milter.TEMPFAIL", "returned 4: not CONTINUE, ALL_OPTS or REJECT"),
        ("return milter.NOREPLY", "returned 7: not CONTINUE, ALL_OPTS or REJECT"),
        ("return 2**70", f"returned {2**70}: not CONTINUE, ALL_OPTS or REJECT"),
        (
            "args[0].clear(); return milter.CONTINUE",
            "left fewer than two options",
        ),
        ("args[0][:] = ['a', 'b']; return milter.CONTINUE", "TypeError"),
        ("args[0][0] = None; return milter.CONTINUE", "TypeError"),
        ("ctx.addheader('a', 'b')", "smfi_addheader: only allowed in the eom callback"),
        ("return milter.REJECT", None),
    ],
)
@pytest.mark.parametrize("policy", ["CONTINUE", "TEMPFAIL"])
def test_what_goes_wrong_in_negotiate_leaves_the_mta_without_the_filter(
    run_filter: Callable[..., Any], body: str, report: str | None, policy: str
) -> None:
    setup = (
        f"milter.set_exception_policy(milter.{policy})\n"
        "old = milter.set_close_callback(None)\n"
        "milter.set_close_callback(lambda ctx: (say('close'), old(ctx)))"
    )
    once = f"import sys\nif not hasattr(sys, 'once'):\n    sys.once = 1\n    {body}\n"
    once += "args[0][1] &= milter.P_SKIP"
    running = run_filter("scripted", setup, once)
    # libmilter hangs up, which both MTAs take for a filter that is not there.
    with pytest.raises(FilterClosed):
        running.mta()
    with session(running, offer=Offer(steps=Step.SKIP)) as each:
        assert each.message().verdict is Verdict.CONTINUE
    output = running.output
    assert output.count("exception in the negotiate callback") == (report is not None)
    if report is not None:
        assert output.count(report) == 1
    assert output.count("negotiate ('close',)") == 2


# --- the end of the filter ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "shown"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import sys; sys.exit('told to end')", 1, "told to end"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
    ],
)
@pytest.mark.parametrize("policy", ["TEMPFAIL", "ACCEPT"])
def test_an_exception_that_ends_a_program_ends_the_filter(
    run_filter: Callable[..., Any], body: str, status: int, shown: str, policy: str
) -> None:
    running = run_filter("scripted", f"milter.set_exception_policy(milter.{policy})")
    bystander, ending = (
        Session(running, running.mta(), {}),
        Session(running, running.mta(), {"header": body}),
    )
    bystander.envelope()  # a message in progress: it may end
    assert ending.reach("header").verdict is Verdict[policy]
    assert bystander.content().verdict is Verdict.CONTINUE
    for each in (bystander, ending):
        each.mta.expect_close()
        each.mta.close()
        assert each.said() == []
    assert running.wait() == status
    assert "main returned" not in running.output
    assert "exception in the" not in running.output
    assert shown in running.output


EXITING_LOG = """
import logging, sys
class Handler(logging.Handler):
    def emit(self, record):
        {does}
logging.getLogger().addHandler(Handler())
"""


@pytest.mark.parametrize(("does", "status"), [("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2)])
def test_a_handler_of_the_log_may_end_the_filter(
    run_filter: Callable[..., Any], does: str, status: int
) -> None:
    running = run_filter("scripted", EXITING_LOG.replace("{does}", does))
    with running.mta() as mta:
        each = Session(running, mta, {"header": "raise ValueError(tag)"})
        each.envelope()
        assert mta.header("Subject", "hello").smtp == SOFT
        mta.expect_close()
        mta.close()
        each.settle()
    assert running.wait() == status
    assert "main returned" not in running.output
