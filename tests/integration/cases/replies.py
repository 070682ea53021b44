"""Replies that the filter gives in its own words."""

from __future__ import annotations

from typing import Any

from integration.case import Case, Differs, Filter, mail, session

import Milter

TOPIC = "Replies"


def refused(*reply: str, verdict: int = Milter.REJECT) -> Filter:
    def action(f: Any) -> int:
        f.setreply(*reply)
        return verdict

    return Filter(on={"eom": action})


def case(name: str, end: str, behaviour: Filter, **others: Any) -> Case:
    return Case(name, session(mail(end=end)), behaviour, delivered=(), topic=TOPIC, **others)


GETS_CODE = (
    "A reply without an enhanced code, or without a text after it, gets the enhanced code X.0.0 "
    "put before it."
)

LINES = tuple(f"Line {number} of thirty-two" for number in range(1, 33))

CASES = (
    case("a code and a text", "550 5.7.1 No thanks", refused("550", "5.7.1", "No thanks")),
    case(
        "without an enhanced code",
        "550 No thanks",
        refused("550", None, "No thanks"),  # type: ignore[arg-type]
        differs=(Differs("sendmail", GETS_CODE, replies={"end": "550 5.0.0 No thanks"}),),
    ),
    case(
        "without a text",
        "550 5.7.1",
        refused("550", "5.7.1"),
        differs=(Differs("sendmail", GETS_CODE, replies={"end": "550 5.0.0 5.7.1"}),),
    ),
    case(
        "a code of its own with TEMPFAIL",
        "452 4.3.1 Disk full",
        refused("452", "4.3.1", "Disk full", verdict=Milter.TEMPFAIL),
    ),
    case("two lines", "550 5.7.1 One\n5.7.1 Two", refused("550", "5.7.1", "One", "Two")),
    case(
        "32 lines",
        "550 5.7.1 " + "\n5.7.1 ".join(LINES),
        refused("550", "5.7.1", *LINES),
    ),
    case("a percent sign", "550 5.7.1 100% sure", refused("550", "5.7.1", "100%% sure")),
    case(
        "percent signs that look like a format",
        "550 5.7.1 %s and %n",
        refused("550", "5.7.1", "%%s and %%n"),
    ),
    case(
        "percent signs in two lines",
        "550 5.7.1 50%\n5.7.1 60%",
        refused("550", "5.7.1", "50%%", "60%%"),
    ),
    case("a text of 900 characters", "550 5.7.1 " + "x" * 900, refused("550", "5.7.1", "x" * 900)),
    case(
        "a text in UTF-8",
        "550 5.7.1 Grüße",
        refused("550", "5.7.1", "Grüße"),
        differs=(
            Differs(
                "sendmail",
                "Replies go out in seven bits: text that is not ASCII is garbled.",
                replies={"end": "550 5.7.1 GrC"},
            ),
        ),
    ),
    case(
        "a 4xx reply with REJECT: the MTA's own",
        "55",
        refused("451", "4.7.1", "Never seen"),
    ),
    case(
        "a 5xx reply with TEMPFAIL: the MTA's own",
        "451 4.",
        refused("550", "5.7.1", "Never seen", verdict=Milter.TEMPFAIL),
    ),
    case(
        "421 at end of message hangs up",
        "421 4.7.0 Come back later",
        refused("421", "4.7.0", "Come back later", verdict=Milter.TEMPFAIL),
    ),
    Case(
        "a reply without a refusal is not sent",
        filter=refused("550", "5.7.1", "Never seen", verdict=Milter.CONTINUE),
        topic=TOPIC,
    ),
    Case(
        "a reply for one recipient only",
        session(
            mail(
                "<one@example.org>",
                "<bob@example.org>",
                rcpt=("550 5.1.1 Not one", "250"),
            )
        ),
        Filter(
            on={
                "envrcpt": lambda f: (
                    (f.setreply("550", "5.1.1", "Not one"), Milter.REJECT)[1]
                    if "one" in f.args[0]
                    else None
                )
            }
        ),
        differs=(
            Differs(
                "sendmail",
                "The address goes before the text of a reply with 550 at MAIL and RCPT.",
                replies={"rcpt.1": "550 5.1.1 <one@example.org>... Not one"},
            ),
        ),
        topic=TOPIC,
    ),
)
