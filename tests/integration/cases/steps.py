"""Protocol steps: what the filter asks for in negotiation."""

from __future__ import annotations

from typing import Any

from integration.case import ANY, Case, Differs, Filter, Like, Mail, mail, session

import Milter

TOPIC = "Steps and macros"

WHOLE = "connect hello envfrom envrcpt data header*5 eoh body eom close"
NAMES = ("connect", "hello", "envfrom", "envrcpt", "data", "header", "eoh", "body")


def seen_with(**macros: Any) -> list[Any]:
    """A whole message as the filter sees it, with what it notes of the macros at some stages."""
    arguments = {
        "connect": (ANY, ANY, ANY),
        "hello": (ANY,),
        "envfrom": (ANY,),
        "envrcpt": (ANY,),
        "body": (ANY,),
    }
    stages = [*NAMES[:5], *["header"] * 5, "eoh", "body", "eom", "close"]
    return [
        (stage, *arguments.get(stage, ()), macros[stage]) if stage in macros else stage
        for stage in stages
    ]


def macros_at(stage: str, **values: Any) -> tuple[Filter, list[Any]]:
    """A filter that notes macros at a stage (``i`` or ``rcpt_addr``), and what it must see."""
    named = {name if len(name) == 1 else f"{{{name}}}": value for name, value in values.items()}
    return Filter(macros={stage: tuple(named)}), seen_with(**{stage: named})


def macro_case(name: str, stage: str, *differs: Differs, **values: Any) -> Case:
    behaviour, seen = macros_at(stage, **values)
    return Case(name, filter=behaviour, seen=seen, differs=differs, topic=TOPIC)


def at(stage: str, **values: Any) -> list[Any]:
    return macros_at(stage, **values)[1]


def _without(stage: str) -> str:
    return " ".join(word for word in WHOLE.split() if word.partition("*")[0] != stage)


QUEUE_ID_EARLY = (
    "The queue id is known from MAIL on; to Postfix, after the first accepted recipient."
)
QUEUE_ID = Like("^[0-9A-Za-z]+$")

CASES = (
    *(
        Case(
            f"@nocallback on {stage}",
            filter=Filter(off=(stage,)),
            seen=_without(stage),
            topic=TOPIC,
        )
        for stage in NAMES
    ),
    *(
        Case(
            f"@noreply on {stage}",
            filter=Filter(noreply=(stage,)),
            seen=WHOLE,
            topic=TOPIC,
        )
        for stage in NAMES
    ),
    Case(
        "@noreply on everything",
        filter=Filter(noreply=NAMES, on={"eom": lambda f: f.addheader("X-New", "one")}),
        seen=WHOLE,
        delivered=(Mail(headers=(*Mail().headers, "X-New: one")),),
        topic=TOPIC,
    ),
    Case(
        "an exception under @noreply is TEMPFAIL at the next reply",
        session(mail(end="451 4.3.0")),
        Filter(noreply=("header",), on={"header": lambda f: 1 / 0}),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "SKIP at header",
        filter=Filter(on={"header": lambda f: Milter.SKIP}),
        seen="connect hello envfrom envrcpt data header eoh body eom close",
        differs=(
            Differs(
                "sendmail",
                "SKIP is understood at body only. At header the other headers still come, and "
                "the body does not.",
                seen="connect hello envfrom envrcpt data header*5 eoh eom close",
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "SKIP at envrcpt",
        session(mail("<one@example.org>", "<bob@example.org>")),
        Filter(on={"envrcpt": lambda f: Milter.SKIP}),
        seen="connect hello envfrom envrcpt data header*5 eoh body eom close",
        delivered=(Mail(recipients=("<one@example.org>", "<bob@example.org>")),),
        differs=(
            Differs(
                "sendmail",
                "SKIP at RCPT is an error: the message goes on without the filter.",
                seen="connect hello envfrom envrcpt abort close",
            ),
        ),
        topic=TOPIC,
    ),
    macro_case(
        "macros at connect",
        "connect",
        Differs(
            "sendmail",
            "{v} is not sent unless it is asked for.",
            seen=at(
                "connect", j="mx.test.invalid", daemon_name=Like("."), v=None, _=Like("127.0.0.1")
            ),
        ),
        j="mx.test.invalid",
        daemon_name=Like("."),
        v=Like("."),
        _=Like("127.0.0.1"),
    ),
    macro_case(
        "{client_addr} is not sent unless it is asked for",
        "connect",
        client_addr=None,
        client_port=None,
    ),
    macro_case("{if_addr} at connect", "connect", if_addr=None),
    macro_case("{daemon_port} at connect", "connect", daemon_port=None),
    macro_case("{mail_addr} at MAIL", "envfrom", mail_addr="alice@example.com"),
    macro_case("{mail_mailer} at MAIL", "envfrom", mail_mailer=Like(".")),
    macro_case("{rcpt_addr} at RCPT", "envrcpt", rcpt_addr="bob@example.org"),
    macro_case(
        "{rcpt_mailer} and {rcpt_host} at RCPT",
        "envrcpt",
        rcpt_mailer=Like("."),
        rcpt_host=Like("."),
    ),
    macro_case(
        "the queue id at MAIL",
        "envfrom",
        Differs("sendmail", QUEUE_ID_EARLY, seen=at("envfrom", i=QUEUE_ID)),
        i=None,
    ),
    macro_case(
        "the queue id at RCPT",
        "envrcpt",
        Differs("sendmail", QUEUE_ID_EARLY, seen=at("envrcpt", i=QUEUE_ID)),
        i=None,
    ),
    macro_case("the queue id at DATA", "data", i=QUEUE_ID),
    macro_case("the queue id at end of message", "eom", i=QUEUE_ID),
    macro_case("a macro of the connection at end of message", "eom", j="mx.test.invalid"),
    macro_case("{rcpt_addr} at DATA is the last one", "data", rcpt_addr="bob@example.org"),
    macro_case(
        "{msg_id} at end of message",
        "eom",
        Differs("sendmail", "{msg_id} is sent.", seen=at("eom", msg_id="<1@example.com>")),
        msg_id=None,
    ),
    macro_case("a macro that there is not", "eom", nonsense=None),
    Case(
        "@symlist: only the macros that were asked for",
        filter=Filter(
            symlist={"connect": ("j",), "envrcpt": ("{rcpt_addr}",)},
            macros={"connect": ("j", "{daemon_name}"), "envrcpt": ("{rcpt_addr}", "{rcpt_mailer}")},
        ),
        seen=seen_with(
            connect={"j": "mx.test.invalid", "{daemon_name}": None},
            envrcpt={"{rcpt_addr}": "bob@example.org", "{rcpt_mailer}": None},
        ),
        topic=TOPIC,
    ),
    Case(
        "@symlist: a macro that is not sent by default",
        filter=Filter(
            symlist={"hello": ("{client_addr}", "{client_name}")},
            macros={"hello": ("{client_addr}",)},
        ),
        seen=seen_with(hello={"{client_addr}": "127.0.0.1"}),
        topic=TOPIC,
    ),
    Case(
        "@symlist at every stage",
        filter=Filter(
            symlist=dict.fromkeys(
                ("connect", "hello", "envfrom", "envrcpt", "data", "eoh", "eom"), ("j", "i")
            ),
            macros={"eom": ("i", "j")},
        ),
        seen=seen_with(eom={"i": QUEUE_ID, "j": "mx.test.invalid"}),
        topic=TOPIC,
    ),
)
