"""Every verdict at every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from integration.case import (
    Case,
    Differs,
    Filter,
    Mail,
    banner,
    command,
    hello,
    mail,
    session,
)

import Milter

TOPIC = "Verdicts"

# What the filter sees of a message up to a stage.
UP_TO = {
    "connect": "connect",
    "hello": "connect hello",
    "envfrom": "connect hello envfrom",
    "envrcpt": "connect hello envfrom envrcpt",
    "data": "connect hello envfrom envrcpt data",
    "header": "connect hello envfrom envrcpt data header",
    "eoh": "connect hello envfrom envrcpt data header*5 eoh",
    "body": "connect hello envfrom envrcpt data header*5 eoh body",
    "eom": "connect hello envfrom envrcpt data header*5 eoh body eom",
}
ALL = UP_TO["eom"] + " close"

# The reply in which the client learns of a verdict.
REPLY_TO = {
    "envfrom": "mail",
    "envrcpt": "rcpt",
    "data": "data",
    "header": "end",
    "eoh": "end",
    "body": "end",
    "eom": "end",
}
CONTENT = ("header", "eoh", "body", "eom")

REJECTED = "550 5.7.1"
TEMPFAILED = "451 4."

REFUSED_AT_END = Differs(
    "sendmail",
    "A REJECT after DATA reaches the client as 554; Postfix says 550.",
    replies={"end": "554 5.7.1"},
)
REFUSED_SESSION = Differs(
    "sendmail",
    "After a REJECT at connect or HELO, MAIL is refused with the enhanced code 5.0.0; Postfix says "
    "5.7.1.",
    replies={"mail": "550 5.0.0"},
)
DISCARD_SEEN_TWICE = (
    "After DISCARD at MAIL or RCPT the message goes on as if it had been submitted locally: the "
    "filter of non_smtpd_milters, if it is the same, sees it once more on a connection of its own."
)


TRIO = ("<one@example.org>", "<two@example.org>", "<three@example.org>")
ONE_MESSAGE = ["envfrom", "envrcpt", "data", *["header"] * 5, "eoh", "body", "eom"]


def _first(f: Any) -> bool:
    f.messages = getattr(f, "messages", 0) + 1
    return bool(f.messages == 1)


def accept_first(f: Any) -> Any:
    return Milter.ACCEPT if _first(f) else None


def discard_first(f: Any) -> Any:
    return Milter.DISCARD if _first(f) else None


def refused_at(stage: str) -> str:
    """What the filter sees of a message that is refused at *stage*.

    The refusal of a recipient leaves the message open, until the client gives it up.
    """
    return UP_TO[stage] + (" abort close" if stage == "envrcpt" else " close")


def returns(verdict: int) -> Callable[[Any], int]:
    return lambda f: verdict


def replies(verdict: int, *reply: str) -> Callable[[Any], int]:
    def action(f: Any) -> int:
        f.setreply(*reply)
        return verdict

    return action


def _accepting() -> Iterator[Case]:
    for stage, seen in UP_TO.items():
        yield Case(
            f"ACCEPT at {stage}",
            filter=Filter(on={stage: returns(Milter.ACCEPT)}),
            seen=f"{seen} close",
            topic=TOPIC,
        )


def _refusing() -> Iterator[Case]:
    for stage, label in REPLY_TO.items():
        seen = refused_at(stage)
        for name, verdict, reply in (
            ("REJECT", Milter.REJECT, REJECTED),
            ("TEMPFAIL", Milter.TEMPFAIL, TEMPFAILED),
        ):
            yield Case(
                f"{name} at {stage}",
                session(mail(**{label: reply})),
                Filter(on={stage: returns(verdict)}),
                seen=seen,
                delivered=(),
                differs=(REFUSED_AT_END,) if label == "end" and name == "REJECT" else (),
                topic=TOPIC,
            )


def _discarding() -> Iterator[Case]:
    for stage in REPLY_TO:
        yield Case(
            f"DISCARD at {stage}",
            filter=Filter(on={stage: returns(Milter.DISCARD)}),
            seen=f"{UP_TO[stage]} close",
            delivered=(),
            differs=_discarded_again(stage),
            topic=TOPIC,
        )


def _discarded_again(stage: str) -> tuple[Differs, ...]:
    if stage not in ("envfrom", "envrcpt"):
        return ()
    seen = f"{UP_TO[stage]} close {UP_TO[stage]} close"
    return (Differs("postfix", DISCARD_SEEN_TWICE, seen=seen, connections=2),)


def _replying() -> Iterator[Case]:
    for stage, label in REPLY_TO.items():
        yield Case(
            f"a reply of the filter's own at {stage}",
            session(mail(**{label: "554 5.7.0 Not on a Monday"})),
            Filter(on={stage: replies(Milter.REJECT, "554", "5.7.0", "Not on a Monday")}),
            seen=refused_at(stage),
            delivered=(),
            topic=TOPIC,
        )


def _whole_session() -> Iterator[Case]:
    for stage in ("connect", "hello"):
        for name, verdict, reply in (
            ("REJECT", Milter.REJECT, REJECTED),
            ("TEMPFAIL", Milter.TEMPFAIL, TEMPFAILED),
        ):
            yield Case(
                f"{name} at {stage}",
                (
                    banner("554" if (stage, name) == ("connect", "REJECT") else "220"),
                    hello(),
                    *mail(mail=reply),
                ),
                Filter(on={stage: returns(verdict)}),
                seen=f"{UP_TO[stage]} close",
                delivered=(),
                differs=(REFUSED_SESSION,) if name == "REJECT" else (),
                topic=TOPIC,
            )


CASES = (
    Case("a message passes unchanged", seen=ALL, topic=TOPIC),
    *_accepting(),
    *_refusing(),
    *_discarding(),
    *_replying(),
    *_whole_session(),
    Case(
        "a reply of the filter's own at hello",
        session(mail(mail="554 5.7.0 Not on a Monday")),
        Filter(on={"hello": replies(Milter.REJECT, "554", "5.7.0", "Not on a Monday")}),
        seen="connect hello close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "a reply with 421 at hello hangs up",
        (banner(), hello(expect="421 4.7.0 Come back later"), *mail(mail="closed")),
        Filter(on={"hello": replies(Milter.TEMPFAIL, "421", "4.7.0", "Come back later")}),
        seen="connect hello close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "REJECT of one recipient of three",
        session(mail(*TRIO, rcpt=("250", "550 5.7.1", "250"))),
        Filter(on={"envrcpt": lambda f: Milter.REJECT if "two" in f.args[0] else None}),
        seen="connect hello envfrom envrcpt*3 data header*5 eoh body eom close",
        delivered=(Mail(recipients=("<one@example.org>", "<three@example.org>")),),
        topic=TOPIC,
    ),
    Case(
        "TEMPFAIL of one recipient, REJECT of another",
        session(mail(*TRIO, rcpt=("451 4.", "550 5.7.1", "250"))),
        Filter(
            on={
                "envrcpt": lambda f: {
                    "<one@example.org>": Milter.TEMPFAIL,
                    TRIO[1]: Milter.REJECT,
                }.get(f.args[0])
            }
        ),
        seen="connect hello envfrom envrcpt*3 data header*5 eoh body eom close",
        delivered=(Mail(recipients=("<three@example.org>",)),),
        topic=TOPIC,
    ),
    Case(
        "the next message is asked about again after ACCEPT",
        session(mail(), mail(number="2", end="550 5.7.1")),
        Filter(on={"envfrom": accept_first, "eom": returns(Milter.REJECT)}),
        seen="connect hello envfrom envfrom envrcpt data header*5 eoh body eom close",
        differs=(Differs("sendmail", REFUSED_AT_END.why, replies={"end2": "554 5.7.1"}),),
        topic=TOPIC,
    ),
    Case(
        "the next message is asked about again after DISCARD",
        session(mail(), mail(number="2")),
        Filter(on={"eoh": discard_first}),
        seen="connect hello envfrom envrcpt data header*5 eoh"
        " envfrom envrcpt data header*5 eoh body eom close",
        topic=TOPIC,
    ),
    Case(
        "an exception in a callback is TEMPFAIL with a reply",
        session(mail(end="451 4.3.0 pymilter: untrapped exception in casefilter")),
        Filter(on={"header": lambda f: 1 / 0}),
        seen="connect hello envfrom envrcpt data header close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "a verdict that is none is TEMPFAIL with a reply",
        session(mail(data="451 4.3.0")),
        Filter(on={"data": lambda f: "REJECT"}),
        seen="connect hello envfrom envrcpt data close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "DISCARD at connect is no verdict: TEMPFAIL",
        session(mail(mail="451 4.3.")),
        Filter(on={"connect": returns(Milter.DISCARD)}),
        seen="connect close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "an unknown command is told, and refused",
        session(command("XBOGUS now", "50"), mail()),
        seen=["connect", "hello", ("unknown", "XBOGUS now"), *ONE_MESSAGE, "close"],
        differs=(
            Differs(
                "postfix",
                "Of an unknown command the filter gets the first word alone.",
                seen=["connect", "hello", ("unknown", "XBOGUS"), *ONE_MESSAGE, "close"],
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "ACCEPT at an unknown command",
        session(command("XBOGUS now", "50"), mail()),
        Filter(on={"unknown": returns(Milter.ACCEPT)}),
        seen=["connect", "hello", "unknown", *ONE_MESSAGE, "close"],
        topic=TOPIC,
    ),
    Case(
        "ACCEPT at an unknown command within a message",
        session(mail(until="rcpt"), command("XBOGUS now", "50"), mail()[2:]),
        Filter(on={"unknown": returns(Milter.ACCEPT)}),
        seen="connect hello envfrom envrcpt unknown close",
        topic=TOPIC,
    ),
    Case(
        "REJECT at an unknown command within a message: the message goes on",
        session(mail(until="rcpt"), command("XBOGUS now", REJECTED), mail()[2:]),
        Filter(on={"unknown": returns(Milter.REJECT)}),
        seen="connect hello envfrom envrcpt unknown data header*5 eoh body eom close",
        topic=TOPIC,
    ),
    Case(
        "TEMPFAIL at an unknown command",
        session(command("XBOGUS now", TEMPFAILED), mail()),
        Filter(on={"unknown": returns(Milter.TEMPFAIL)}),
        seen=["connect", "hello", "unknown", *ONE_MESSAGE, "close"],
        topic=TOPIC,
    ),
    Case(
        "a reply of the filter's own to an unknown command",
        session(command("XBOGUS now", "554 5.7.0 No magic"), mail()),
        Filter(on={"unknown": replies(Milter.REJECT, "554", "5.7.0", "No magic")}),
        seen=["connect", "hello", "unknown", *ONE_MESSAGE, "close"],
        topic=TOPIC,
    ),
)
