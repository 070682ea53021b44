"""``Milter.portable``: what it does comes out the same everywhere.

The actions import it when they are called: this module is read under other pymilters too.
"""

from __future__ import annotations

from typing import Any

from integration.case import HEADERS, Case, Differs, Filter, Like, Mail, mail, message, session

import Milter

TOPIC = "Milter.portable"

MIXED = ("X-A: one", "X-B: one", "X-A: two", "x-a: three", "X-B: two")
FOLDED = ("X-A: one\n two", "X-A: three")


def deletes(name: str, which: Any) -> Filter:
    def action(f: Any) -> None:
        from Milter.portable import delete_headers

        delete_headers(f, name, which)

    return Filter(on={"eom": action})


def deleting(name: str, extra: tuple[str, ...], behaviour: Filter, *left: str) -> Case:
    return Case(
        f"delete_headers: {name}",
        session(mail(content=message(*extra))),
        behaviour,
        delivered=(Mail(headers=(*HEADERS, *left)),),
        topic=TOPIC,
    )


def refuses(rcode: str, xcode: str | None, text: str, verdict: int = Milter.REJECT) -> Filter:
    def action(f: Any) -> int:
        from Milter.portable import set_reply

        set_reply(f, rcode, xcode, text)
        return verdict

    return Filter(on={"eom": action})


def refusing(name: str, end: str, behaviour: Filter) -> Case:
    return Case(f"set_reply: {name}", session(mail(end=end)), behaviour, delivered=(), topic=TOPIC)


def _note_early(f: Any) -> None:
    from Milter.portable import queue_id

    f.early = queue_id(f)


def _tell_early(f: Any) -> None:
    f.addheader("X-Early", str(f.early))


def _tell_whether_it_stays(f: Any) -> None:
    from Milter.portable import queue_id

    f.addheader("X-Id", f"{queue_id(f) == f.early} {f.early}")


def tells(*headers: Any) -> tuple[Mail, ...]:
    return (Mail(headers=(*HEADERS, *headers)),)


CASES = (
    deleting("all of a name", MIXED, deletes("X-A", 3), "X-B: one", "X-B: two"),
    deleting("some of a name", MIXED, deletes("X-A", [1, 3]), *MIXED[1:3], "X-B: two"),
    deleting("the name in another case", MIXED, deletes("x-b", 2), *MIXED[:1], *MIXED[2:4]),
    deleting(
        "in any order, one named twice",
        MIXED,
        deletes("X-A", (2, 1, 2)),
        *MIXED[1::2][:1],
        *MIXED[3:],
    ),
    deleting("more than there are", MIXED, deletes("X-B", 9), *MIXED[:1], *MIXED[2:4]),
    deleting("folded ones", FOLDED, deletes("X-A", 2)),
    deleting("none", MIXED, deletes("X-A", 0), *MIXED),
    refusing("a percent sign", "550 5.7.1 100% sure", refuses("550", "5.7.1", "100% sure")),
    refusing(
        "what looks like a format",
        "550 5.7.1 %s %n %% %",
        refuses("550", "5.7.1", "%s %n %% %"),
    ),
    refusing(
        "lines, with percent signs",
        "550 5.7.1 50% of it\n5.7.1 60% of that",
        refuses("550", "5.7.1", "50% of it\n60% of that\n"),
    ),
    refusing(
        "a temporary failure",
        "452 4.3.1 Disk 99% full",
        refuses("452", "4.3.1", "Disk 99% full", Milter.TEMPFAIL),
    ),
    refusing(
        "control characters",
        "550 5.7.1 a b?c",
        refuses("550", "5.7.1", "a\tb\x1bc"),
    ),
    refusing(
        "a text of more than a line",
        "550 5.7.1 " + "word " * 195 + "word\n5.7.1 " + "word " * 103 + "end",
        refuses("550", "5.7.1", "word " * 299 + "end"),
    ),
    refusing(
        "a text of more than 32 lines",
        "550 5.7.1 " + "\n5.7.1 ".join([*["1% more"] * 31, "1% more [...]"]),
        refuses("550", "5.7.1", "1% more\n" * 40),
    ),
    Case(
        "queue_id: from DATA on",
        filter=Filter(on={"data": _note_early, "eom": _tell_whether_it_stays}),
        delivered=tells(Like("^X-Id: True [0-9A-Za-z]+$")),
        topic=TOPIC,
    ),
    Case(
        "queue_id: not known yet",
        filter=Filter(on={"envfrom": _note_early, "eom": _tell_early}),
        delivered=tells("X-Early: None"),
        differs=(
            Differs(
                "sendmail",
                "queue_id has an answer from MAIL on; under Postfix, after the first accepted "
                "recipient.",
                delivered=tells(Like("^X-Early: [0-9A-Za-z]{9,}$")),
            ),
        ),
        topic=TOPIC,
    ),
)
