"""Steps that the MTA waits for no answer to: silence kept, and exceptions answered later."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from support.wire import TRACE, session

from Milter.mta import Offer, Reply, SmtpReply, Step, Verdict

SOFT = (
    Verdict.TEMPFAIL,
    SmtpReply(451, "4.3.0", ("pymilter: untrapped exception in scripted",)),
)
BITS = {
    "connect": Step.NR_CONN,
    "helo": Step.NR_HELO,
    "unknown": Step.NR_UNKN,
    "envfrom": Step.NR_MAIL,
    "envrcpt": Step.NR_RCPT,
    "data": Step.NR_DATA,
    "header": Step.NR_HDR,
    "eoh": Step.NR_EOH,
    "body": Step.NR_BODY,
}
ALL_BITS = Step(sum(BITS.values()))


@pytest.fixture(scope="module")
def silent_at(run_shared_filter: Callable[..., Any]) -> Callable[..., Any]:
    """Filters that ask for no reply at these stages, started when first asked for."""
    running: dict[tuple[str, Step], Any] = {}

    def find(*stages: str, policy: str = "TEMPFAIL") -> Any:
        bits = Step(sum(BITS[stage] for stage in stages))
        if (policy, bits) not in running:
            running[policy, bits] = run_shared_filter(
                "scripted",
                f"milter.set_exception_policy(milter.{policy})",
                f"args[0][1] &= milter.P_SKIP | {int(bits)}",
            )
        return running[policy, bits]

    return find


def outcome(reply: Reply) -> tuple[Verdict, SmtpReply | None]:
    return reply.verdict, reply.smtp


@pytest.mark.parametrize("result", ["NOREPLY", "CONTINUE"])
def test_silence_at_every_step(silent_at: Callable[..., Any], result: str) -> None:
    bodies = dict.fromkeys(BITS, f"say(stage); return milter.{result}")
    with session(silent_at(*BITS), **bodies) as each:
        assert each.reach("body").verdict is Verdict.NO_REPLY
        assert each.mta.eom().verdict is Verdict.CONTINUE
    assert [said[0] for said in each.said()] == list(BITS)
    assert each.log() == ""


def test_where_the_mta_knows_no_silence_libmilter_answers(silent_at: Callable[..., Any]) -> None:
    bodies = dict.fromkeys(BITS, "say(stage); return milter.NOREPLY")
    with session(silent_at(*BITS), offer=Offer(steps=Step.SKIP), **bodies) as each:
        assert each.reach("body").verdict is Verdict.CONTINUE
        assert each.mta.eom().verdict is Verdict.CONTINUE
    assert [said[0] for said in each.said()] == list(BITS)


def test_a_callback_that_is_not_set_is_silent_too(run_filter: Callable[..., Any]) -> None:
    setup = "\n".join(f"milter.set_{each}_callback(None)" for each in ("header", "eoh", "body"))
    running = run_filter("scripted", setup, f"args[0][1] &= {int(ALL_BITS)}")
    with session(running) as each:
        assert each.reach("body").verdict is Verdict.NO_REPLY
        assert each.mta.eom().verdict is Verdict.CONTINUE


@pytest.mark.parametrize("offer", [Offer(), Offer(steps=Step.SKIP)], ids=["agreed", "simulated"])
@pytest.mark.parametrize(
    ("stage", "pays"),
    [
        ("connect", "helo"),
        ("helo", "envfrom"),
        ("envfrom", "envrcpt"),
        ("envrcpt", "data"),
        ("data", "header"),
        ("header", "eoh"),
        ("eoh", "body"),
        ("body", "eom"),
    ],
)
def test_an_exception_is_answered_at_the_next_step_with_a_reply(
    silent_at: Callable[..., Any], stage: str, pays: str, offer: Offer
) -> None:
    bodies = {**TRACE, stage: "raise ValueError(tag)"}
    with session(silent_at(stage), offer=offer, **bodies) as each:
        assert outcome(each.reach(pays)) == SOFT
    assert pays not in [said[0] for said in each.said()]
    assert each.log().count(f"exception in the {stage} callback") == 1
    assert each.log().count(f"ValueError: {each.tag}") == 1


@pytest.mark.parametrize("stage", ["data", "header", "eoh", "body"])
def test_the_debt_outlasts_further_silent_steps(silent_at: Callable[..., Any], stage: str) -> None:
    bodies = {**TRACE, stage: "raise ValueError(tag)"}
    with session(silent_at(*BITS), **bodies) as each:
        assert outcome(each.reach("eom")) == SOFT
        each.transaction()
        assert outcome(each.content()) == SOFT
    # After the exception the application hears no more of the message.
    stages = ["envfrom", "envrcpt", "data", "header", "eoh", "body", "eom"]
    before = stages[: stages.index(stage)]
    start = ["connect", "helo", "unknown"]
    assert [said[0] for said in each.said()] == [*start, *before, *before, "close"]


@pytest.mark.parametrize(
    "result", ["REJECT", "TEMPFAIL", "ACCEPT", "DISCARD", "SKIP", "QUARANTINE", "VERSION"]
)
@pytest.mark.parametrize("offer", [Offer(), Offer(steps=Step.SKIP)], ids=["agreed", "simulated"])
def test_a_verdict_where_silence_was_agreed_is_an_error(
    silent_at: Callable[..., Any], result: str, offer: Offer
) -> None:
    with session(silent_at("header"), offer=offer, header=f"return milter.{result}") as each:
        assert outcome(each.reach("eoh")) == SOFT
    assert each.log().count("milter.error: the header callback returned") == 1


@pytest.mark.parametrize("result", ["None", "'x'", "99", "2**70"])
def test_what_is_no_verdict_where_silence_was_agreed(
    silent_at: Callable[..., Any], result: str
) -> None:
    with session(silent_at("header"), header=f"return {result}") as each:
        assert outcome(each.reach("eoh")) == SOFT
    assert each.log().count("milter.error: the header callback returned") == 1


@pytest.mark.parametrize(
    ("policy", "verdict"),
    [
        ("TEMPFAIL", Verdict.TEMPFAIL),
        ("REJECT", Verdict.REJECT),
        ("ACCEPT", Verdict.ACCEPT),
        ("CONTINUE", Verdict.CONTINUE),
    ],
)
def test_the_debt_is_the_policys(
    silent_at: Callable[..., Any], policy: str, verdict: Verdict
) -> None:
    running = silent_at("header", policy=policy)
    with session(running, header="raise ValueError(tag)", eoh="say(stage)") as each:
        assert each.reach("eoh").verdict is verdict
    assert each.said() == ([("eoh",)] if policy == "CONTINUE" else [])


def test_a_debt_from_mail_refuses_each_recipient(silent_at: Callable[..., Any]) -> None:
    with session(
        silent_at("envfrom"), envfrom="raise ValueError(tag)", envrcpt="say(stage)", abort="say(1)"
    ) as each:
        assert outcome(each.reach("envrcpt")) == SOFT
        assert outcome(each.mta.rcpt("<carol@example.org>")) == SOFT
        assert outcome(each.mta.data()) == SOFT


def test_the_debt_lapses_at_abort(silent_at: Callable[..., Any]) -> None:
    body = "store.n = getattr(store, 'n', 0) + 1\nif store.n == 1: raise ValueError(tag)"
    with session(silent_at("envfrom"), envfrom=body, envrcpt="say(stage)") as each:
        assert outcome(each.reach("envrcpt")) == SOFT
        each.mta.abort()
        each.mta.mail("<a@b>")
        assert each.mta.rcpt("<c@d>").verdict is Verdict.CONTINUE
    assert each.said() == [("envrcpt",)]


def test_the_debt_lapses_at_abort_before_it_was_paid(silent_at: Callable[..., Any]) -> None:
    with session(
        silent_at("envfrom", "envrcpt"),
        envrcpt="store.n = getattr(store, 'n', 0) + 1\nif store.n == 1: raise ValueError(tag)",
        data="say(stage)",
    ) as each:
        each.reach("envrcpt")
        each.mta.abort()
        each.mta.mail("<a@b>")
        each.mta.rcpt("<c@d>")
        assert each.mta.data().verdict is Verdict.CONTINUE
    assert each.said() == [("data",)]


def test_the_debt_lapses_at_the_next_mail(silent_at: Callable[..., Any]) -> None:
    with session(
        silent_at("envrcpt"),
        envrcpt="store.n = getattr(store, 'n', 0) + 1\nif store.n == 1: raise ValueError(tag)",
        data="say(stage)",
    ) as each:
        each.reach("envrcpt")
        # sendmail may leave out the ABORT
        assert each.mta.mail("<a@b>").verdict is Verdict.CONTINUE
        each.mta.rcpt("<c@d>")
        assert each.mta.data().verdict is Verdict.CONTINUE
    assert each.said() == [("data",)]


def test_a_paid_debt_is_gone_with_its_message(silent_at: Callable[..., Any]) -> None:
    with session(
        silent_at("header"),
        header="store.n = getattr(store, 'n', 0) + 1\nif store.n == 1: raise ValueError(tag)",
    ) as each:
        assert outcome(each.reach("eoh")) == SOFT
        each.mta.abort()
        each.transaction()
        assert each.content().verdict is Verdict.CONTINUE


@pytest.mark.parametrize("stage", ["connect", "helo"])
def test_a_debt_of_the_connection_holds_for_all_of_it(
    silent_at: Callable[..., Any], stage: str
) -> None:
    bodies = {**TRACE, stage: "raise ValueError(tag)"}
    with session(silent_at(stage), **bodies) as each:
        each.connect()
        greeting = each.mta.helo("h")
        if stage == "connect":
            assert outcome(greeting) == SOFT
        for _ in range(2):
            assert outcome(each.mta.mail("<a@b>")) == SOFT
            each.mta.abort()
        assert each.mta.unknown("XBOGUS").verdict is Verdict.CONTINUE
    assert not {"envfrom", "abort"} & {said[0] for said in each.said()}
    assert each.log().count("exception in the") == 1


def test_an_exception_in_an_unknown_command_leaves_no_debt(silent_at: Callable[..., Any]) -> None:
    with session(silent_at("unknown"), unknown="raise ValueError(tag)") as each:
        assert each.reach("eom").verdict is Verdict.CONTINUE
    assert each.log().count("exception in the unknown callback") == 1


def test_an_unknown_command_is_no_part_of_the_message(silent_at: Callable[..., Any]) -> None:
    with session(silent_at("unknown"), unknown="raise ValueError(tag)") as each:
        each.connect()
        each.mta.helo("h")
        each.mta.mail("<a@b>")
        each.mta.unknown("XBOGUS")
        each.mta.rcpt("<c@d>")
        each.mta.data()
        assert each.content().verdict is Verdict.CONTINUE
    assert each.log().count("exception in the unknown callback") == 1


def test_no_abort_for_a_message_that_the_application_never_saw(
    silent_at: Callable[..., Any],
) -> None:
    with session(
        silent_at("connect", "envfrom"), connect="1/0", envfrom="say(stage)", abort="say(stage)"
    ) as each:
        each.connect()
        assert outcome(each.mta.helo("h")) == SOFT
        each.mta.mail("<a@b>")
        each.mta.abort()
    assert each.said() == []
