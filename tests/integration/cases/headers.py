"""Changes to headers."""

from __future__ import annotations

from typing import Any

from integration.case import HEADERS, Case, Differs, Filter, Like, Mail, mail, message, session

import Milter

TOPIC = "Headers"

LINES = ("X-A: one", "X-A: two", "X-A: three")
THREE = session(mail(content=message(*LINES)))

# sendmail's own fields come with an order of their own.
RENUMBER = (
    "chgheader goes on counting a header that was deleted, so that the others keep their index."
)
FIRST_OF_NAME = (
    "addheader of a name that is there already goes before the first header of that name, not to "
    "the end."
)
KEEPS_NAME = "chgheader keeps the name as the message spells it; Postfix takes the filter's."


def adds(*headers: tuple[Any, ...]) -> Filter:
    return Filter(on={"eom": lambda f: tuple(f.addheader(*header) for header in headers)})


def changes(*headers: tuple[Any, ...]) -> Filter:
    return Filter(on={"eom": lambda f: tuple(f.chgheader(*header) for header in headers)})


def delivers(*headers: str) -> tuple[Mail, ...]:
    return (Mail(headers=headers),)


def own_first(*headers: str) -> tuple[Mail, ...]:
    return delivers("Received: own", *headers)


def _reject_first(f: Any) -> Any:
    f.messages = getattr(f, "messages", 0) + 1
    f.addheader("X-New", str(f.messages))
    return Milter.REJECT if f.messages == 1 else None


BEFORE_HEADERS = ["connect", "hello", "envfrom", "envrcpt", "data"]
AFTER_HEADERS = ["eoh", "body", "eom", "close"]


CASES = (
    Case(
        "addheader appends",
        filter=adds(("X-New", "one"), ("X-Other", "two")),
        delivered=delivers(*HEADERS, "X-New: one", "X-Other: two"),
        topic=TOPIC,
    ),
    Case(
        "addheader of a name that is there",
        THREE,
        adds(("X-A", "four")),
        delivered=delivers(*HEADERS, *LINES, "X-A: four"),
        differs=(
            Differs("sendmail", FIRST_OF_NAME, delivered=delivers(*HEADERS, "X-A: four", *LINES)),
        ),
        topic=TOPIC,
    ),
    Case(
        "addheader twice of one new name",
        filter=adds(("X-New", "one"), ("X-New", "two")),
        delivered=delivers(*HEADERS, "X-New: one", "X-New: two"),
        differs=(
            Differs(
                "sendmail", FIRST_OF_NAME, delivered=delivers(*HEADERS, "X-New: two", "X-New: one")
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "insert at 0: above the MTA's own Received",
        filter=adds(("X-New", "one", 0)),
        received=True,
        delivered=delivers("X-New: one", "Received: own", *HEADERS),
        topic=TOPIC,
    ),
    Case(
        "insert at 1: below the MTA's own Received",
        filter=adds(("X-New", "one", 1)),
        received=True,
        delivered=own_first("X-New: one", *HEADERS),
        topic=TOPIC,
    ),
    Case(
        "insert at 2: below the first header of the message",
        filter=adds(("X-New", "one", 2)),
        received=True,
        delivered=own_first(HEADERS[0], "X-New: one", *HEADERS[1:]),
        differs=(
            Differs(
                "sendmail",
                "An index for an insert counts headers that the configuration defines and that are "
                "never sent, so that the new one can come out higher up.",
                delivered=own_first("X-New: one", *HEADERS),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "insert past the end appends",
        filter=adds(("X-New", "one", 99)),
        received=True,
        delivered=own_first(*HEADERS, "X-New: one"),
        topic=TOPIC,
    ),
    Case(
        "insert twice at 0: the last one is on top",
        filter=adds(("X-New", "one", 0), ("X-New", "two", 0)),
        received=True,
        delivered=delivers("X-New: two", "X-New: one", "Received: own", *HEADERS),
        topic=TOPIC,
    ),
    *(
        Case(
            f"chgheader of number {number} of three",
            THREE,
            changes(("X-A", number, "new")),
            delivered=delivers(*HEADERS, *(*LINES[: number - 1], "X-A: new", *LINES[number:])),
            topic=TOPIC,
        )
        for number in (1, 2, 3)
    ),
    Case(
        "chgheader with index 0 changes the first",
        THREE,
        changes(("X-A", 0, "new")),
        delivered=delivers(*HEADERS, "X-A: new", *LINES[1:]),
        topic=TOPIC,
    ),
    Case(
        "chgheader past the last one adds",
        THREE,
        changes(("X-A", 4, "new")),
        delivered=delivers(*HEADERS, *LINES, "X-A: new"),
        differs=(
            Differs(
                "sendmail",
                "chgheader past the last header of that name adds one, before the first of that "
                "name.",
                delivered=delivers(*HEADERS, "X-A: new", *LINES),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "chgheader of a name that is not there adds",
        filter=changes(("X-New", 1, "new")),
        delivered=delivers(*HEADERS, "X-New: new"),
        topic=TOPIC,
    ),
    Case(
        "chgheader of a name in another case",
        filter=changes(("SUBJECT", 1, "changed")),
        delivered=delivers(*HEADERS[:2], "SUBJECT: changed", *HEADERS[3:]),
        differs=(
            Differs(
                "sendmail",
                KEEPS_NAME,
                delivered=delivers(*HEADERS[:2], "Subject: changed", *HEADERS[3:]),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "chgheader without a value deletes",
        filter=changes(("Subject", 1, None)),
        delivered=delivers(*HEADERS[:2], *HEADERS[3:]),
        topic=TOPIC,
    ),
    Case(
        "delete of three from the highest index down",
        THREE,
        changes(("X-A", 3, ""), ("X-A", 2, ""), ("X-A", 1, "")),
        delivered=delivers(*HEADERS),
        topic=TOPIC,
    ),
    Case(
        "delete of two from the lowest index up",
        THREE,
        changes(("X-A", 1, ""), ("X-A", 2, "")),
        delivered=delivers(*HEADERS, "X-A: two"),
        differs=(Differs("sendmail", RENUMBER, delivered=delivers(*HEADERS, "X-A: three")),),
        topic=TOPIC,
    ),
    Case(
        "delete of one that is not there does nothing",
        filter=changes(("X-A", 1, "")),
        topic=TOPIC,
    ),
    Case(
        "delete and add again",
        filter=Filter(
            on={"eom": lambda f: (f.chgheader("Subject", 1, ""), f.addheader("Subject", "new"))}
        ),
        delivered=delivers(*HEADERS[:2], *HEADERS[3:], "Subject: new"),
        differs=(
            Differs(
                "sendmail",
                "A deleted header still holds its place: one that is added with its name goes "
                "there.",
                delivered=delivers(*HEADERS[:2], "Subject: new", *HEADERS[3:]),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "a folded value goes out as it is",
        filter=adds(("X-Long", "one\n\ttwo\n three")),
        delivered=delivers(*HEADERS, "X-Long: one\n\ttwo\n three"),
        topic=TOPIC,
    ),
    Case(
        "a value folded with CRLF goes out as one with LF",
        filter=adds(("X-Long", "one\r\n two")),
        delivered=delivers(*HEADERS, "X-Long: one\n two"),
        topic=TOPIC,
    ),
    Case(
        "a long value is not folded",
        filter=adds(("X-Long", "word " * 60 + "end")),
        delivered=delivers(*HEADERS, "X-Long: " + "word " * 60 + "end"),
        topic=TOPIC,
    ),
    Case(
        "a folded header is seen with LF alone",
        session(mail(content=message("X-Folded: one\n\ttwo"))),
        seen=[
            *BEFORE_HEADERS,
            *["header"] * 5,
            ("header", "X-Folded", "one\n\ttwo"),
            *AFTER_HEADERS,
        ],
        delivered=delivers(*HEADERS, "X-Folded: one\n\ttwo"),
        topic=TOPIC,
    ),
    Case(
        "a value in UTF-8",
        filter=adds(("X-Name", "Grüße 🐟")),
        delivered=delivers(*HEADERS, "X-Name: Grüße 🐟"),
        topic=TOPIC,
    ),
    Case(
        "a value with bytes that are no UTF-8 is written back as it came",
        session(mail(content=message("X-Raw: caf\udce9"))),
        Filter(
            on={
                "header": lambda f: setattr(f, "last", f.args[1]),
                "eom": lambda f: f.addheader("X-Copy", f.last),
            }
        ),
        seen=[
            *BEFORE_HEADERS,
            *["header"] * 5,
            ("header", "X-Raw", "caf\udce9"),
            *AFTER_HEADERS,
        ],
        delivered=delivers(*HEADERS, "X-Raw: caf\udce9", "X-Copy: caf\udce9"),
        topic=TOPIC,
    ),
    Case(
        "an empty header is seen, and kept",
        session(mail(content=message("X-Empty:", "X-Space: "))),
        seen=[
            *BEFORE_HEADERS,
            *["header"] * 5,
            ("header", "X-Empty", ""),
            ("header", "X-Space", ""),
            *AFTER_HEADERS,
        ],
        delivered=delivers(*HEADERS, "X-Empty:", "X-Space: "),
        topic=TOPIC,
    ),
    Case(
        "without P_HDR_LEADSPC values come without their first space",
        session(mail(content=message("X-None:one", "X-One: two", "X-Two:  three"))),
        Filter(on={"eom": lambda f: f.addheader("X-New", "four")}),
        seen=[
            *BEFORE_HEADERS,
            *["header"] * 5,
            ("header", "X-None", "one"),
            ("header", "X-One", "two"),
            ("header", "X-Two", " three"),
            *AFTER_HEADERS,
        ],
        delivered=delivers(*HEADERS, "X-None:one", "X-One: two", "X-Two:  three", "X-New: four"),
        topic=TOPIC,
    ),
    Case(
        "with P_HDR_LEADSPC values come and go as they are",
        session(mail(content=message("X-None:one", "X-One: two", "X-Two:  three"))),
        Filter(
            on={
                "eom": lambda f: (
                    f.addheader("X-New", " four"),
                    f.addheader("X-Bare", "five"),
                    f.chgheader("Subject", 1, "  six"),
                )
            },
            decorate=("header_leading_space",),
        ),
        seen=[
            *BEFORE_HEADERS,
            ("header", "From", " Alice <alice@example.com>"),
            *["header"] * 4,
            ("header", "X-None", "one"),
            ("header", "X-One", " two"),
            ("header", "X-Two", "  three"),
            *AFTER_HEADERS,
        ],
        delivered=delivers(
            *HEADERS[:2],
            "Subject:  six",
            *HEADERS[3:],
            "X-None:one",
            "X-One: two",
            "X-Two:  three",
            "X-New: four",
            "X-Bare:five",
        ),
        topic=TOPIC,
    ),
    Case(
        "names and values of headers are seen as the message has them",
        seen=[
            *BEFORE_HEADERS,
            ("header", "From", "Alice <alice@example.com>"),
            ("header", "To", "Bob <bob@example.org>"),
            ("header", "Subject", "hello"),
            ("header", "Date", Like("^Thu, 01 Jan 2026")),
            ("header", "Message-Id", "<1@example.com>"),
            *AFTER_HEADERS,
        ],
        topic=TOPIC,
    ),
    Case(
        "changes are dropped where the message is refused",
        session(mail(end="5"), mail(number="2")),
        Filter(on={"eom": _reject_first}),
        delivered=(Mail(headers=(*HEADERS, "X-New: 2")),),
        topic=TOPIC,
    ),
)
