"""The envelope: addresses, ESMTP parameters, and changes to both."""

from __future__ import annotations

from typing import Any

from integration.case import (
    ANY,
    Case,
    Differs,
    Filter,
    Held,
    Like,
    Mail,
    mail,
    message,
    session,
)

import Milter

TOPIC = "Envelope"

REST = ["data", *["header"] * 5, "eoh", "body", "eom", "close"]
TRIO = ("<one@example.org>", "<two@example.org>", "<three@example.org>")


def at_end(*calls: tuple[Any, ...]) -> Filter:
    """A filter that makes these calls at end of message: (method, arguments…)."""
    return Filter(on={"eom": lambda f: tuple(getattr(f, name)(*args) for name, *args in calls)})


def to(*recipients: str, **others: Any) -> tuple[Mail, ...]:
    return (Mail(recipients=recipients, **others),)


BOB = "<bob@example.org>"
CAROL = "<carol@example.org>"

THERE_ALREADY = (
    "addrcpt of a recipient who is there already does nothing. To Postfix it is another one, as it "
    "lacks the ORCPT of the client's, and the next hop gets the message twice."
)
BY_CASE = (
    "Recipients whose addresses differ in upper and lower case are two. To Postfix they are one, "
    "except for delrcpt, which compares exactly as sendmail's does."
)

CASES = (
    Case(
        "addresses are seen as the client writes them",
        session(mail("<Bob.Builder@Example.ORG>", sender="<Alice+tag@Example.COM>")),
        seen=[
            "connect",
            "hello",
            ("envfrom", "<Alice+tag@Example.COM>"),
            ("envrcpt", "<Bob.Builder@Example.ORG>"),
            *REST,
        ],
        delivered=(Mail("<Alice+tag@Example.COM>", ("<Bob.Builder@Example.ORG>",)),),
        topic=TOPIC,
    ),
    Case(
        "a quoted local part",
        session(mail('<"odd name"@example.org>')),
        seen=["connect", "hello", "envfrom", ("envrcpt", '<"odd name"@example.org>'), *REST],
        delivered=to('<"odd name"@example.org>'),
        topic=TOPIC,
    ),
    Case(
        "parameters of MAIL are arguments",
        session(mail(sender="<alice@example.com> SIZE=500 BODY=8BITMIME RET=HDRS ENVID=QQ314159")),
        seen=[
            "connect",
            "hello",
            (
                "envfrom",
                "<alice@example.com>",
                "SIZE=500",
                "BODY=8BITMIME",
                "RET=HDRS",
                "ENVID=QQ314159",
            ),
            "envrcpt",
            *REST,
        ],
        delivered=(Mail("<alice@example.com> RET=HDRS ENVID=QQ314159"),),
        topic=TOPIC,
    ),
    Case(
        "parameters of RCPT are arguments",
        session(mail("<bob@example.org> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;robert@example.org")),
        seen=[
            *["connect", "hello", "envfrom"],
            ("envrcpt", BOB, "NOTIFY=SUCCESS,DELAY", "ORCPT=rfc822;robert@example.org"),
            *REST,
        ],
        delivered=to("<bob@example.org> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;robert@example.org"),
        topic=TOPIC,
    ),
    Case(
        "a bounce has the sender <>",
        session(mail(sender="<>")),
        seen=["connect", "hello", ("envfrom", "<>"), "envrcpt", *REST],
        delivered=(Mail("<>"),),
        topic=TOPIC,
    ),
    Case(
        "addrcpt",
        filter=at_end(("addrcpt", CAROL)),
        delivered=to(BOB, CAROL),
        topic=TOPIC,
    ),
    Case(
        "addrcpt without angle brackets",
        filter=at_end(("addrcpt", "carol@example.org")),
        delivered=to(BOB, CAROL),
        topic=TOPIC,
    ),
    Case(
        "addrcpt of one who is there already",
        filter=at_end(("addrcpt", BOB)),
        delivered=to(BOB, BOB),
        differs=(Differs("sendmail", THERE_ALREADY, delivered=to(BOB)),),
        topic=TOPIC,
    ),
    Case(
        "addrcpt twice of one who is there already",
        filter=at_end(("addrcpt", BOB), ("addrcpt", BOB)),
        delivered=to(BOB, BOB),
        differs=(Differs("sendmail", THERE_ALREADY, delivered=to(BOB)),),
        topic=TOPIC,
    ),
    Case(
        "addrcpt of one who is there already, with the same ORCPT",
        filter=at_end(("addrcpt", BOB, "ORCPT=rfc822;bob@example.org")),
        delivered=to(BOB),
        topic=TOPIC,
    ),
    Case(
        "addrcpt of one who is there already and delrcpt: nobody is left",
        filter=at_end(("addrcpt", BOB), ("delrcpt", BOB)),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "addrcpt twice of one new recipient",
        filter=at_end(("addrcpt", CAROL), ("addrcpt", CAROL)),
        delivered=to(BOB, CAROL),
        topic=TOPIC,
    ),
    Case(
        "addrcpt twice of one new recipient, with other parameters",
        filter=at_end(("addrcpt", CAROL), ("addrcpt", CAROL, "NOTIFY=NEVER")),
        delivered=to(BOB, CAROL, "<carol@example.org> NOTIFY=NEVER"),
        differs=(
            Differs(
                "sendmail",
                "addrcpt of one new recipient a second time does nothing. To Postfix it is another "
                "one where NOTIFY or ORCPT differ.",
                delivered=to(BOB, CAROL),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "addrcpt of one new recipient in two spellings of the domain",
        filter=at_end(("addrcpt", CAROL), ("addrcpt", "<carol@EXAMPLE.org>")),
        delivered=to(BOB, CAROL),
        differs=(Differs("sendmail", BY_CASE, delivered=to(BOB, CAROL, "<carol@EXAMPLE.org>")),),
        topic=TOPIC,
    ),
    Case(
        "addrcpt of one new recipient in two spellings of the local part",
        filter=at_end(("addrcpt", CAROL), ("addrcpt", "<Carol@example.org>")),
        delivered=to(BOB, CAROL),
        differs=(Differs("sendmail", BY_CASE, delivered=to(BOB, CAROL, "<Carol@example.org>")),),
        topic=TOPIC,
    ),
    Case(
        "addrcpt, delrcpt and addrcpt of one new recipient",
        filter=at_end(("addrcpt", CAROL), ("delrcpt", CAROL), ("addrcpt", CAROL)),
        delivered=to(BOB, CAROL),
        topic=TOPIC,
    ),
    Case(
        "the client names a recipient twice",
        session(mail(BOB, BOB)),
        seen=["connect", "hello", "envfrom", ("envrcpt", BOB), ("envrcpt", BOB), *REST],
        delivered=to(BOB),
        topic=TOPIC,
    ),
    Case(
        "delrcpt of one whom the client names twice",
        session(mail(BOB, BOB, CAROL)),
        at_end(("delrcpt", BOB)),
        delivered=to(CAROL),
        topic=TOPIC,
    ),
    Case(
        "addrcpt with NOTIFY and ORCPT",
        filter=at_end(("addrcpt", CAROL, "NOTIFY=NEVER ORCPT=rfc822;c@example.org")),
        delivered=to(BOB, "<carol@example.org> NOTIFY=NEVER ORCPT=rfc822;c@example.org"),
        topic=TOPIC,
    ),
    Case(
        "addrcpt with parameters in a sequence",
        filter=at_end(("addrcpt", CAROL, ["NOTIFY=NEVER", "ORCPT=rfc822;c@example.org"])),
        delivered=to(BOB, "<carol@example.org> NOTIFY=NEVER ORCPT=rfc822;c@example.org"),
        topic=TOPIC,
    ),
    Case(
        "delrcpt",
        session(mail(*TRIO)),
        at_end(("delrcpt", TRIO[1])),
        delivered=to(TRIO[0], TRIO[2]),
        topic=TOPIC,
    ),
    Case(
        "delrcpt in another spelling of the domain finds nobody",
        session(mail(*TRIO)),
        at_end(("delrcpt", "<two@EXAMPLE.org>")),
        delivered=to(*TRIO),
        topic=TOPIC,
    ),
    Case(
        "delrcpt of nobody does nothing",
        filter=at_end(("delrcpt", "<nobody@example.org>")),
        topic=TOPIC,
    ),
    Case(
        "delrcpt of the only one",
        filter=at_end(("delrcpt", BOB)),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "delrcpt and addrcpt of another",
        filter=at_end(("delrcpt", BOB), ("addrcpt", CAROL)),
        delivered=to(CAROL),
        topic=TOPIC,
    ),
    Case(
        "delrcpt and addrcpt of the same one",
        filter=at_end(("delrcpt", BOB), ("addrcpt", BOB)),
        delivered=to(BOB),
        topic=TOPIC,
    ),
    Case(
        "addrcpt and delrcpt of the same one",
        filter=at_end(("addrcpt", CAROL), ("delrcpt", CAROL)),
        delivered=to(BOB),
        topic=TOPIC,
    ),
    Case(
        "chgfrom",
        filter=at_end(("chgfrom", "<dave@example.com>")),
        delivered=(Mail("<dave@example.com>"),),
        topic=TOPIC,
    ),
    Case(
        "chgfrom to <>",
        filter=at_end(("chgfrom", "<>")),
        delivered=(Mail("<>"),),
        topic=TOPIC,
    ),
    Case(
        "chgfrom with RET and ENVID",
        filter=at_end(("chgfrom", "<dave@example.com>", "RET=HDRS ENVID=changed")),
        delivered=(Mail("<dave@example.com> RET=HDRS ENVID=changed"),),
        topic=TOPIC,
    ),
    Case(
        "chgfrom keeps the client's RET and ENVID",
        session(mail(sender="<alice@example.com> RET=HDRS ENVID=original")),
        at_end(("chgfrom", "<dave@example.com>")),
        delivered=(Mail("<dave@example.com> RET=HDRS ENVID=original"),),
        topic=TOPIC,
    ),
    Case(
        "a recipient whom the MTA refuses is not told by default",
        session(mail("<unknown@example.org>", BOB, rcpt=("550 5.1.1", "250"))),
        seen=["connect", "hello", "envfrom", ("envrcpt", BOB), *REST],
        topic=TOPIC,
    ),
    Case(
        "rejected_recipients: a recipient whom the MTA refuses is told",
        session(mail("<unknown@example.org>", BOB, rcpt=("550 5.1.1", "250"))),
        Filter(
            decorate=("rejected_recipients",),
            macros={"envrcpt": ("{rcpt_mailer}", "{rcpt_host}", "{rcpt_addr}")},
        ),
        seen=[
            *["connect", "hello", "envfrom"],
            (
                "envrcpt",
                "<unknown@example.org>",
                {
                    "{rcpt_mailer}": "error",
                    "{rcpt_host}": "5.1.1",
                    "{rcpt_addr}": Like("User unknown"),
                },
            ),
            ("envrcpt", BOB, ANY),
            *REST,
        ],
        differs=(
            Differs(
                "sendmail",
                "Recipients that its rules refuse are not told to the filter, with P_RCPT_REJ or "
                "without.",
                seen=["connect", "hello", "envfrom", ("envrcpt", BOB, ANY), *REST],
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "quarantine holds the message",
        filter=Filter(on={"eom": lambda f: (f.quarantine("looks odd"), Milter.CONTINUE)}),
        delivered=(),
        held=(Held(reason="looks odd"),),
        differs=(
            Differs(
                "postfix",
                "The reason for a quarantine is not kept or logged: the log says only that a "
                "milter triggers HOLD.",
                held=(Held(reason="milter triggers HOLD action"),),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "quarantine and DISCARD: nothing is held",
        filter=Filter(on={"eom": lambda f: f.quarantine("odd") or Milter.DISCARD}),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "quarantine and REJECT: nothing is held",
        session(mail(end="55")),
        Filter(on={"eom": lambda f: f.quarantine("odd") or Milter.REJECT}),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "SMTPUTF8: addresses in UTF-8",
        session(
            mail(
                "<jürgen@example.org>",
                sender="<grüße@example.com> SMTPUTF8",
                content=message("X-Name: Jürgen"),
            )
        ),
        seen=[
            *["connect", "hello"],
            ("envfrom", "<grüße@example.com>", "SMTPUTF8"),
            ("envrcpt", "<jürgen@example.org>"),
            "data",
            *["header"] * 5,
            ("header", "X-Name", "Jürgen"),
            *["eoh", "body", "eom", "close"],
        ],
        delivered=(
            Mail(
                "<grüße@example.com>",
                ("<jürgen@example.org>",),
                (*Mail().headers, "X-Name: Jürgen"),
            ),
        ),
        differs=(
            Differs(
                "sendmail",
                "Debian's sendmail is built without SMTPUTF8 and refuses such addresses.",
                replies={"mail": "501"},
                seen="connect hello close",
                delivered=(),
            ),
        ),
        topic=TOPIC,
    ),
)
