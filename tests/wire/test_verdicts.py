"""Results of callbacks: what is a verdict and where, and what an MTA hears if one is not."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from support.wire import session

from Milter.mta import Offer, Reply, SmtpReply, Stage, Step, Verdict

REPLYING = ["connect", "helo", "unknown", "envfrom", "envrcpt", "data"]
REPLYING += ["header", "eoh", "body", "eom"]

TEXT = "pymilter: untrapped exception in scripted"
POLICIES = {
    "TEMPFAIL": (Verdict.TEMPFAIL, SmtpReply(451, "4.3.0", (TEXT,))),
    "REJECT": (Verdict.REJECT, SmtpReply(554, "5.3.0", (TEXT,))),
    "CONTINUE": (Verdict.CONTINUE, None),
    "ACCEPT": (Verdict.ACCEPT, None),
}


@pytest.fixture(scope="module")
def with_policy(run_shared_filter: Callable[..., Any]) -> Callable[[str], Any]:
    """A filter for each exception policy, started when it is first asked for."""
    running: dict[str, Any] = {}

    def find(policy: str) -> Any:
        if policy not in running:
            setup = f"milter.set_exception_policy(milter.{policy})"
            running[policy] = run_shared_filter("scripted", setup)
        return running[policy]

    return find


@pytest.fixture(scope="module")
def scripted(run_shared_filter: Callable[..., Any]) -> Any:
    return run_shared_filter("scripted")


def outcome(reply: Reply) -> tuple[Verdict, SmtpReply | None]:
    return reply.verdict, reply.smtp


# --- good ones ---------------------------------------------------------------------------------


VERDICTS = ["CONTINUE", "REJECT", "ACCEPT", "TEMPFAIL", "DISCARD"]
EARLY = ("connect", "helo")  # where DISCARD is not allowed


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        (stage, verdict)
        for stage in REPLYING
        for verdict in VERDICTS
        if (stage, verdict) != ("unknown", "ACCEPT")  # see the next test
        if verdict != "DISCARD" or stage not in EARLY
    ],
)
def test_each_verdict_reaches_the_mta(scripted: Any, stage: str, verdict: str) -> None:
    with session(scripted, **{stage: f"return milter.{verdict}"}) as each:
        assert outcome(each.reach(stage)) == (Verdict[verdict], None)
    assert each.log() == ""


def test_accept_at_an_unknown_command_is_for_a_message(scripted: Any) -> None:
    """Outside of one it makes Postfix's smtpd panic."""
    with session(scripted, unknown="return milter.ACCEPT") as each:
        assert each.reach("unknown").verdict is Verdict.CONTINUE
        each.mta.mail("<alice@example.com>")
        assert each.mta.unknown("XBOGUS").verdict is Verdict.ACCEPT
    assert each.log() == ""


@pytest.mark.parametrize("stage", ["envrcpt", "header", "body", "unknown"])
def test_skip_reaches_the_mta(scripted: Any, stage: str) -> None:
    with session(scripted, **{stage: "return milter.SKIP"}) as each:
        assert each.reach(stage).verdict is Verdict.SKIP


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("import enum; return enum.IntEnum('V', {'OK': 3}).OK", Verdict.ACCEPT),
        ("import enum; return enum.IntFlag('V', {'NO': 1}).NO", Verdict.REJECT),
        ("return False", Verdict.CONTINUE),
        ("return True", Verdict.REJECT),
        ("return type('Own', (int,), {})(4)", Verdict.TEMPFAIL),
    ],
)
def test_whatever_is_an_int_is_taken_as_one(scripted: Any, body: str, verdict: Verdict) -> None:
    with session(scripted, eom=body) as each:
        assert each.reach("eom").verdict is verdict
    assert each.log() == ""


# --- bad ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["connect", "helo", "envfrom", "data", "eoh", "eom"])
def test_skip_is_no_answer_to_a_step_that_comes_once(scripted: Any, stage: str) -> None:
    with session(scripted, **{stage: "return milter.SKIP"}) as each:
        assert each.reach(stage).verdict is Verdict.TEMPFAIL
    assert f"the {stage} callback returned 8: SKIP is only for steps that repeat" in each.log()


NO_VERDICT = "not one of CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL, SKIP, NOREPLY"
BAD = [
    ("None", "None", "not an int; let it return a verdict, such as Milter.CONTINUE"),
    ("'accept'", "'accept'", "not an int"),
    ("3.0", "3.0", "not an int"),
    ("(0,)", r"(0,)", "not an int"),
    ("99", "99", NO_VERDICT),
    ("-1", "-1", NO_VERDICT),
    ("2**70", str(2**70), NO_VERDICT),
    ("-2**70", str(-(2**70)), NO_VERDICT),
    ("2**32", str(2**32), NO_VERDICT),
    ("milter.QUARANTINE", "32", NO_VERDICT),
    ("milter.ALL_OPTS", "10", NO_VERDICT),
    ("milter.NOREPLY", "7", "NOREPLY was not negotiated for this callback"),
]


@pytest.mark.parametrize(("result", "shown", "why"), BAD, ids=[each[0] for each in BAD])
def test_what_is_no_verdict_is_reported_and_gets_the_policys(
    scripted: Any, result: str, shown: str, why: str
) -> None:
    with session(scripted, eom=f"return {result}") as each:
        assert outcome(each.reach("eom")) == POLICIES["TEMPFAIL"]
        each.mta.mail("<a@b>")  # exactly one reply was sent, and the session goes on
    assert each.log().count(f"milter.error: the eom callback returned {shown}: {why}") == 1
    assert each.log().count("Traceback") == 0


WRONG_ARITY = """
import sys
import Milter

class Wrong(Milter.Base):
    def helo(self):
        pass

    def hello(self):
        return self.helo(1)

Milter.factory = Wrong
Milter.runmilter("wrong", sys.argv[1])
"""


def test_a_wrong_number_of_arguments_names_the_method_and_its_place(
    run_filter: Callable[..., Any], tmp_path: Any
) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG_ARITY)
    filter_ = run_filter(source=f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')")
    with filter_.mta() as mta:
        assert mta.greet()[-1].verdict is Verdict.TEMPFAIL
    line = filter_.wait_for("in the helo callback")
    assert line.endswith(f"; Wrong.hello is defined in {file}, line 9")
    assert filter_.stop() == 0


def test_a_wrong_call_within_a_callback_is_in_the_traceback(
    run_filter: Callable[..., Any], tmp_path: Any
) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG_ARITY.replace("def hello(self)", "def eoh(self)"))
    filter_ = run_filter(source=f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')")
    with filter_.mta() as mta:
        mta.greet()
        mta.mail("<a@b>")
        mta.rcpt("<c@d>")
        assert mta.eoh().verdict is Verdict.TEMPFAIL
        mta.abort()
    assert not filter_.wait_for("in the eoh callback").endswith(", line 9")
    assert filter_.stop() == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stage", REPLYING)
@pytest.mark.parametrize("body", ["return None", "raise ValueError(tag)"], ids=["None", "raise"])
def test_the_policy_holds_at_each_stage(
    with_policy: Callable[[str], Any], policy: str, stage: str, body: str
) -> None:
    with session(with_policy(policy), **{stage: body}) as each:
        assert outcome(each.reach(stage)) == POLICIES[policy]
    report = each.log()
    assert report.count(f"exception in the {stage} callback, queue id unknown") == 1
    if body == "return None":
        assert report.count(f"milter.error: the {stage} callback returned None: not an int") == 1
    else:
        assert report.count(f"ValueError: {each.tag}") == 1
        assert report.count("Traceback (most recent call last):") == 1


@pytest.mark.parametrize("stage", EARLY)
def test_discard_before_there_is_a_message(scripted: Any, stage: str) -> None:
    with session(scripted, **{stage: "return milter.DISCARD"}) as each:
        assert outcome(each.reach(stage)) == POLICIES["TEMPFAIL"]
    assert "DISCARD is not allowed before there is a message" in each.log()


def test_skip_that_was_not_negotiated(scripted: Any) -> None:
    with session(scripted, offer=Offer(steps=Step.RCPT_REJ), body="return milter.SKIP") as each:
        assert outcome(each.reach("body")) == POLICIES["TEMPFAIL"]
    assert "milter.error: the body callback returned 8: SKIP was not negotiated" in each.log()


@pytest.mark.parametrize("stage", ["abort", "close"])
@pytest.mark.parametrize("result", ["None", "99", "'x'", "milter.REJECT"])
def test_the_results_of_abort_and_close_are_ignored(scripted: Any, stage: str, result: str) -> None:
    with session(scripted, **{stage: f"return {result}"}) as each:
        each.envelope()
        each.mta.abort()
        each.mta.mail("<a@b>")
    assert each.log() == ""


def test_the_policy_can_be_changed_while_running(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted")
    with session(
        running, helo="milter.set_exception_policy(milter.REJECT)", eom="return None"
    ) as each:
        assert outcome(each.reach("eom")) == POLICIES["REJECT"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a" * 60, "a" * 40),
        ("100% mail", "100% mail"),
        ("%" * 60, "%" * 40),
        ("%s%n", "%s%n"),
        ("fünf", "fünf"),
        ("é" * 60, "é" * 40),
        ("a" + "€" * 60, "a" + "€" * 39),
        ("a" + "\udc80" * 1000, "a" + "\udc80" * 159),  # bytes that begin no character
    ],
)
def test_the_name_in_the_reply(run_filter: Callable[..., Any], name: str, shown: str) -> None:
    running = run_filter("scripted", "", "", name)
    with session(running, eom="return None") as each:
        reply = each.reach("eom")
    expected = f"pymilter: untrapped exception in {shown}"
    assert outcome(reply) == (Verdict.TEMPFAIL, SmtpReply(451, "4.3.0", (expected,)))


# --- a reply that does not fit -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "verdict", "fits"),
    [
        ("550", "REJECT", True),
        ("450", "TEMPFAIL", True),
        ("450", "REJECT", False),
        ("550", "TEMPFAIL", False),
    ],
)
def test_a_reply_of_another_class_than_the_verdict_is_logged(
    scripted: Any, code: str, verdict: str, fits: bool
) -> None:
    with session(
        scripted, eom=f"ctx.setreply('{code}', None, 'text'); return milter.{verdict}"
    ) as each:
        reply = each.reach("eom")
        each.mta.mail("<a@b>")
        assert each.mta.rcpt("<c@d>").verdict is Verdict.CONTINUE
    assert reply.verdict is Verdict[verdict]
    assert reply.smtp == (SmtpReply(int(code), None, ("text",)) if fits else None)
    said = f"the eom callback returned {verdict} after setreply with a {code[0]}xx code"
    assert each.log().count(said) == (not fits)


@pytest.mark.parametrize("verdict", ["CONTINUE", "ACCEPT", "DISCARD"])
def test_a_reply_with_a_verdict_that_has_none_is_no_matter(scripted: Any, verdict: str) -> None:
    with session(
        scripted, eom=f"ctx.setreply('550', '5.7.1', 'text'); return milter.{verdict}"
    ) as each:
        assert outcome(each.reach("eom")) == (Verdict[verdict], None)
    assert each.log() == ""


def test_a_reply_waits_for_the_step_that_refuses(scripted: Any) -> None:
    with session(
        scripted, helo="ctx.setreply('550', '5.7.1', 'later')", envrcpt="return milter.REJECT"
    ) as each:
        reply = each.reach("envrcpt")
        assert reply.smtp == SmtpReply(550, "5.7.1", ("later",))
        assert each.mta.rcpt("<c@d>") == Reply(Stage.RCPT, Verdict.REJECT)


def test_the_policys_reply_replaces_one_that_waits(scripted: Any) -> None:
    with session(
        scripted, eom="ctx.setreply('550', '5.7.1', 'of the application'); return None"
    ) as each:
        assert outcome(each.reach("eom")) == POLICIES["TEMPFAIL"]
