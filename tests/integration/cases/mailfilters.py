"""Functions of whole messages: the same message arrives, whatever the MTA."""

from __future__ import annotations

import random
from typing import Any

from integration.case import (
    BODY,
    HEADERS,
    Action,
    Case,
    Differs,
    Filter,
    Held,
    Mail,
    Submission,
    authenticate,
    command,
    hello,
    mail,
    message,
    session,
    start_tls,
)
from support import random_mail

TOPIC = "Whole messages"
LARGE = 315_000  # lines of a body of 30 MB

LINES = ("X-A: one", "X-A: two", "X-A: three")
THREE = session(mail(content=message(*LINES)))


def does(function: Action, **options: Any) -> Filter:
    """A filter of one function; what it returns counts where it is a decision."""

    def call(m: Any) -> Any:
        found = function(m)
        return found if hasattr(found, "kind") else None

    return Filter(functions=((call, options),))


def mf() -> Any:
    """The package, which filters of older versions have not."""
    from Milter import mailfilter

    return mailfilter


def edits(name: str, function: Action, *headers: str, **options: Any) -> Case:
    """Of a message with three headers of one name."""
    return Case(
        f"mailfilter: {name}",
        THREE,
        does(function),
        delivered=(Mail(headers=headers, **options),),
        topic=TOPIC,
    )


NO_REASON = (
    Differs(
        "postfix",
        "The reason for a quarantine is not kept or logged: the log says only that a "
        "milter triggers HOLD.",
        held=(Held(reason="milter triggers HOLD action"),),
    ),
)
LONG = "X-Long: " + "word " * 13 + "word\n word" + " word" * 6


def _per_recipient(m: Any) -> Any:
    return mf().reject("5.1.1 nobody") if m.recipient == "bob@EXAMPLE.org" else None


def _facts(m: Any) -> None:
    auth = m.auth.name.partition("@")[0] if m.auth else "nobody"
    m.headers.add("X-Facts", f"{auth} {m.helo} {bool(m.tls and m.tls.bits)} {bool(m.queue_id)}")


def _moves(m: Any) -> None:
    m.headers.insert_after("Subject", "X-New", "new")
    m.recipients.replace("bob@example.org", "dan@example.org")


def _count(m: Any) -> None:
    m.connection["count"] = m.connection.get("count", 0) + 1
    m.headers.add("X-Count", str(m.connection["count"]))


def _large(m: Any) -> None:
    def chunks() -> Any:
        for _ in range(LARGE):
            yield b"0123456789" * 9 + b"12345678\r\n"

    m.body = chunks()


CASES = (
    edits("nothing is changed", lambda m: None, *HEADERS, *LINES),
    edits("add", lambda m: m.headers.add("X-A", "new"), *HEADERS, *LINES, "X-A: new"),
    edits("on top", lambda m: m.headers.insert(0, "X-A", "new"), "X-A: new", *HEADERS, *LINES),
    edits(
        "in the middle",
        lambda m: m.headers.insert_after("Subject", "X-New", "new"),
        *HEADERS[:3],
        "X-New: new",
        *HEADERS[3:],
        *LINES,
    ),
    edits(
        "before the last of several",
        lambda m: m.headers.insert_before(m.headers.find("x-a")[2], "X-New", "new"),
        *HEADERS,
        *LINES[:2],
        "X-New: new",
        LINES[2],
    ),
    edits(
        "one of several",
        lambda m: setattr(m.headers.find("X-A")[1], "value", "new"),
        *HEADERS,
        LINES[0],
        "X-A: new",
        LINES[2],
    ),
    edits("delete all", lambda m: m.headers.delete("X-A"), *HEADERS),
    edits("replace all by one", lambda m: m.headers.replace("X-A", "new"), *HEADERS, "X-A: new"),
    edits(
        "delete, and put back in the same place",
        lambda m: (m.headers.delete(m.headers[2]), m.headers.insert(2, "Subject", "new")),
        *HEADERS[:2],
        "Subject: new",
        *HEADERS[3:],
        *LINES,
    ),
    edits(
        "change twice",
        lambda m: [m.headers.__setitem__("Subject", value) for value in ("one", "two")],
        *HEADERS[:2],
        "Subject: two",
        *HEADERS[3:],
        *LINES,
    ),
    edits(
        "an empty value is no deletion",
        lambda m: m.headers.__setitem__("Subject", ""),
        *HEADERS[:2],
        "Subject: ",
        *HEADERS[3:],
        *LINES,
    ),
    edits(
        "a value of several lines",
        lambda m: m.headers.add("X-Folded", "one\n\ttwo\n three"),
        *HEADERS,
        *LINES,
        "X-Folded: one\n\ttwo\n three",
    ),
    edits(
        "a value that is not ASCII",
        lambda m: m.headers.__setitem__("Subject", "Grüße to all"),
        *HEADERS[:2],
        "Subject: =?utf-8?b?R3LDvMOfZQ==?= to all",
        *HEADERS[3:],
        *LINES,
    ),
    edits(
        "a long value",
        lambda m: m.headers.add("X-Long", " ".join(["word"] * 21)),
        *HEADERS,
        *LINES,
        LONG,
    ),
    edits(
        "the body grows",
        lambda m: setattr(m, "body", m.body.read() + b"More.\n"),
        *HEADERS,
        *LINES,
        body=BODY + b"More.\r\n",
    ),
    edits("the body shrinks", lambda m: setattr(m, "body", b"x"), *HEADERS, *LINES, body=b"x\r\n"),
    edits("no body is left", lambda m: setattr(m, "body", b""), *HEADERS, *LINES, body=b""),
    edits(
        "a binary body",
        lambda m: setattr(m, "body", b"\xff\x80\xe9\r\n.\r\n"),
        *HEADERS,
        *LINES,
        body=b"\xff\x80\xe9\r\n.\r\n",
    ),
    edits(
        "a large body",
        _large,
        *HEADERS,
        *LINES,
        body=lambda body: body == (b"0123456789" * 9 + b"12345678\r\n") * LARGE,
    ),
    edits(
        "the message as an object",
        lambda m: _object(m),
        *HEADERS[:2],
        "Subject: hello, all",
        *HEADERS[3:],
        *LINES,
        body=b"A body!\r\n",
    ),
    Case(
        "mailfilter: recipients",
        session(mail("<bob@example.org>", "<carl@example.org>")),
        does(
            lambda m: (m.recipients.remove("bob@EXAMPLE.org"), m.recipients.add("dan@example.org"))
        ),
        delivered=(Mail(recipients=("<carl@example.org>", "<dan@example.org>")),),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: a recipient with other parameters",
        filter=does(
            lambda m: (
                m.recipients.remove("bob@example.org"),
                m.recipients.add("bob@example.org", {"NOTIFY": "NEVER"}),
            )
        ),
        delivered=(Mail(recipients=("<bob@example.org> NOTIFY=NEVER",)),),
        differs=(
            Differs(
                "sendmail",
                "A recipient who is deleted and added again keeps the parameters that the client "
                "gave.",
                delivered=(Mail(recipients=("<bob@example.org> NOTIFY=FAILURE,DELAY",)),),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: the sender",
        filter=does(lambda m: setattr(m, "sender", "eve@example.com")),
        delivered=(Mail(sender="<eve@example.com>"),),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: the sender with parameters",
        filter=does(
            lambda m: setattr(m, "sender", mf().Address("eve@example.com", {"ENVID": "x1"}))
        ),
        delivered=(Mail(sender="<eve@example.com> ENVID=x1"),),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: quarantine",
        filter=does(lambda m: mf().quarantine("looks odd")),
        delivered=(),
        held=(Held(reason="looks odd"),),
        differs=NO_REASON,
        topic=TOPIC,
    ),
    Case(
        "mailfilter: quarantine at headers",
        filter=does(lambda m: mf().quarantine("looks odd"), at="headers"),
        delivered=(),
        held=(Held(reason="looks odd"),),
        differs=NO_REASON,
        topic=TOPIC,
    ),
    Case(
        "mailfilter: a reply of several lines, and nothing edited goes out",
        session(mail(end="550 5.7.1 100% spam\n5.7.1 go away")),
        does(lambda m: (m.headers.add("X-New", "x"), mf().reject("5.7.1 100% spam\ngo away"))[1]),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: for now",
        session(mail(end="451 4.7.1 later")),
        does(lambda m: mf().tempfail("later")),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: discarded",
        filter=does(lambda m: mf().discard()),
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: a decision for each recipient",
        session(mail("<bob@example.org>", "<carl@example.org>", rcpt=("550 5.1.1", "250"))),
        does(_per_recipient, at="rcpt"),
        delivered=(Mail(recipients=("<carl@example.org>",)),),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: several messages of a connection, one of them cut off",
        session(mail(), mail(number="2", until="rcpt"), command("RSET"), mail(number="3")),
        does(_count),
        delivered=(
            Mail(headers=(*HEADERS, "X-Count: 1")),
            Mail(headers=(*HEADERS, "X-Count: 2")),
        ),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: a local submission",
        Submission(),
        does(_moves),
        delivered=(
            Mail(
                "<root@mx.test.invalid>",
                ("<dan@example.org>",),
                (*HEADERS[:3], "X-New: new", *HEADERS[3:]),
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "mailfilter: who has logged in, and TLS",
        session(start_tls(), hello(label="again"), authenticate(), mail()),
        does(_facts),
        delivered=(Mail(headers=(*HEADERS, "X-Facts: tester client.example True True")),),
        topic=TOPIC,
    ),
)


def _object(m: Any) -> None:
    parsed = m.message
    parsed.replace_header("Subject", "hello, all")
    parsed.set_payload("A body!\r\n")
    m.message = parsed


def _random(m: Any) -> None:
    random_mail.edit(random.Random(int(m.headers["X-Seed"])), m)


# Not run as a case: test_mailfilter.py is about what comes of it.
RANDOM = Case("mailfilter: random edits", filter=does(_random))
