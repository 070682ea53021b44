"""Sessions: TLS, AUTH, several messages, what is broken off, and how the filter is reached."""

from __future__ import annotations

from typing import Any

from integration.case import (
    ANY,
    MESSAGE,
    Case,
    Differs,
    Filter,
    Like,
    Mail,
    Submission,
    authenticate,
    command,
    drop,
    hello,
    mail,
    partial,
    pipelined,
    reconnect,
    session,
    start_tls,
)

TOPIC = "Sessions"

AUTH = ("{auth_type}", "{auth_authen}")
ONE = "envfrom envrcpt data header*5 eoh body eom"
ONE_LIST = ["envfrom", "envrcpt", "data", *["header"] * 5, "eoh", "body", "eom"]
BOB = "<bob@example.org>"


def count(f: Any) -> None:
    f.messages = getattr(f, "messages", 0) + 1


def stamp(f: Any) -> None:
    f.addheader("X-Number", str(f.messages))


def numbered(number: int) -> Mail:
    return Mail(headers=(*Mail().headers, f"X-Number: {number}"))


CASES = (
    Case(
        "the client's name and address",
        seen=[
            ("connect", Like("localhost|^unknown|127.0.0.1"), 2, ["127.0.0.1", ANY]),
            ("hello", "client.example"),
            *ONE_LIST,
            "close",
        ],
        topic=TOPIC,
    ),
    Case(
        "a client over IPv6",
        seen=[("connect", ANY, 10, ["::1", ANY, ANY, ANY]), "hello", *ONE_LIST, "close"],
        port="ipv6",
        topic=TOPIC,
    ),
    Case("a filter on a TCP socket", seen=f"connect hello {ONE} close", port="inet", topic=TOPIC),
    Case(
        "a filter on an IPv6 socket",
        seen=f"connect hello {ONE} close",
        differs=(
            Differs(
                "sendmail",
                "The IPv6 address of a filter cannot be written as such (8.17 says Invalid "
                "argument): give a name that stands for it.",
            ),
        ),
        port="inet6",
        topic=TOPIC,
    ),
    Case(
        "HELO in place of EHLO",
        session(command("HELO client.example"), mail()),
        seen=f"connect hello hello {ONE} close",
        topic=TOPIC,
    ),
    Case(
        "a HELO name that is no UTF-8",
        session(hello(b"caf\xe9.example", label="helo2"), mail()),
        seen=["connect", "hello", ("hello", "caf\udce9.example"), *ONE_LIST, "close"],
        differs=(
            Differs(
                "postfix sendmail",
                "A HELO name that is no UTF-8 is refused before the filter hears of it.",
                replies={"helo2": "50"},
                seen=f"connect hello {ONE} close",
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "two messages in one session",
        session(mail(), mail(number="2")),
        Filter(on={"envfrom": count, "eom": stamp}),
        seen=f"connect hello {ONE} {ONE} close",
        delivered=(numbered(1), numbered(2)),
        topic=TOPIC,
    ),
    Case(
        "two sessions",
        session(mail(), reconnect(), session(mail(number="2"))),
        Filter(on={"envfrom": count, "eom": stamp}),
        seen=f"connect hello {ONE} close connect hello {ONE} close",
        delivered=(numbered(1), numbered(1)),
        connections=2,
        topic=TOPIC,
    ),
    Case(
        "RSET after RCPT",
        session(mail(until="rcpt"), command("RSET"), mail(number="2")),
        seen=f"connect hello envfrom envrcpt abort {ONE} close",
        topic=TOPIC,
    ),
    Case(
        "RSET after MAIL",
        session(mail(until="mail"), command("RSET"), mail(number="2")),
        seen=f"connect hello envfrom abort {ONE} close",
        topic=TOPIC,
    ),
    Case(
        "RSET twice, and between messages",
        session(
            command("RSET"),
            mail(until="rcpt"),
            command("RSET", label="rset2"),
            command("RSET", label="rset3"),
            mail(number="2"),
            command("RSET", label="rset4"),
        ),
        seen=f"connect hello envfrom envrcpt abort {ONE} close",
        topic=TOPIC,
    ),
    Case(
        "HELO in the middle of a message gives it up",
        session(mail(until="rcpt"), hello(label="helo2"), mail(number="2")),
        seen=f"connect hello envfrom envrcpt abort hello {ONE} close",
        topic=TOPIC,
    ),
    Case(
        "QUIT in the middle of a message",
        session(mail(until="rcpt")),
        seen="connect hello envfrom envrcpt abort close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "QUIT after MAIL",
        session(mail(until="mail")),
        seen="connect hello envfrom abort close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "a session without a message",
        session(),
        seen="connect hello close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "the client vanishes after the banner",
        session(greeting=False)[:0] + session()[:1] + (drop(),),
        seen="connect close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "the client vanishes after HELO",
        session(drop()),
        seen="connect hello close",
        delivered=(),
        topic=TOPIC,
    ),
    *(
        Case(
            f"the client vanishes after {until.upper()}",
            session(mail(until=until), drop()),
            seen=f"connect hello {seen} abort close",
            delivered=(),
            topic=TOPIC,
        )
        for until, seen in (
            ("mail", "envfrom"),
            ("rcpt", "envfrom envrcpt"),
            ("data", "envfrom envrcpt data"),
        )
    ),
    Case(
        "the client vanishes in the middle of the message",
        session(mail(until="data"), partial(MESSAGE[:-5]), drop()),
        seen="connect hello envfrom envrcpt data abort close",
        delivered=(),
        topic=TOPIC,
    ),
    Case(
        "the client vanishes after the message",
        session(mail(), drop()),
        seen=f"connect hello {ONE} close",
        topic=TOPIC,
    ),
    Case(
        "a pipelined envelope",
        session(pipelined(*mail(until="data")), mail()[-1]),
        seen=f"connect hello {ONE} close",
        topic=TOPIC,
    ),
    Case(
        "a pipelined envelope with three recipients, one refused",
        session(
            pipelined(
                *mail(
                    "<one@example.org>",
                    "<unknown@example.org>",
                    BOB,
                    rcpt=("250", "550 5.1.1", "250"),
                    until="data",
                )
            ),
            mail()[-1],
        ),
        seen="connect hello envfrom envrcpt*2 data header*5 eoh body eom close",
        delivered=(Mail(recipients=("<one@example.org>", BOB)),),
        topic=TOPIC,
    ),
    Case(
        "STARTTLS: HELO comes again, with the macros of TLS",
        session(start_tls(), hello(label="helo2"), mail()),
        Filter(macros={"hello": ("{tls_version}", "{cipher_bits}")}),
        seen=[
            "connect",
            ("hello", "client.example", {"{tls_version}": None, "{cipher_bits}": None}),
            (
                "hello",
                "client.example",
                {"{tls_version}": Like("^TLSv1"), "{cipher_bits}": Like("^[0-9]+$")},
            ),
            *ONE_LIST,
            "close",
        ],
        topic=TOPIC,
    ),
    Case(
        "AUTH: MAIL has its macros",
        session(authenticate(), mail()),
        Filter(macros={"envfrom": AUTH}),
        seen=[
            "connect",
            "hello",
            (
                "envfrom",
                "<alice@example.com>",
                {"{auth_type}": "PLAIN", "{auth_authen}": Like("^tester")},
            ),
            *ONE_LIST[1:],
            "close",
        ],
        topic=TOPIC,
    ),
    Case(
        "without AUTH there are no macros of it",
        filter=Filter(macros={"envfrom": AUTH}),
        seen=[
            "connect",
            "hello",
            ("envfrom", "<alice@example.com>", {"{auth_type}": None, "{auth_authen}": None}),
            *ONE_LIST[1:],
            "close",
        ],
        topic=TOPIC,
    ),
    Case(
        "AUTH=<> in MAIL is an argument",
        session(authenticate(), mail(sender="<alice@example.com> AUTH=<>")),
        seen=[
            "connect",
            "hello",
            ("envfrom", "<alice@example.com>", "AUTH=<>"),
            *ONE_LIST[1:],
            "close",
        ],
        topic=TOPIC,
    ),
    Case(
        "local submission: sendmail -t",
        Submission(),
        seen=[
            ("connect", "localhost", ANY, ANY),
            ("hello", ANY),
            ("envfrom", Like("^<root@")),
            ("envrcpt", BOB),
            *ONE_LIST[2:],
            "close",
        ],
        delivered=(Mail(sender="<root@mx.test.invalid>"),),
        differs=(
            Differs(
                "postfix",
                "The addresses of a local submission come without angle brackets.",
                seen=[
                    *["connect", "hello", ("envfrom", Like("^root@"))],
                    *[("envrcpt", "bob@example.org"), *ONE_LIST[2:], "close"],
                ],
            ),
            Differs(
                "sendmail",
                "A local submission is an SMTP session of the submission program: HELO may come "
                "twice, MAIL has parameters, and a Received header is there already.",
                seen=[
                    *["connect", "hello", "hello", ("envfrom", "<root@mx.test.invalid>", ANY, ANY)],
                    *[("envrcpt", BOB), "data", *["header"] * 6, "eoh", "body", "eom", "close"],
                ],
            ),
        ),
        topic=TOPIC,
    ),
    Case(
        "a bounce that the MTA makes itself",
        session(mail("<refused@example.org>")),
        seen=["connect", "hello", *ONE_LIST, "close"],
        delivered=(
            Mail("<>", ("<alice@example.com>",), headers=ANY, body=lambda body: b"refuses" in body),
        ),
        differs=(
            Differs(
                "mock",
                "No bounces are made.",
                delivered=(Mail(recipients=("<refused@example.org>",)),),
            ),
            Differs(
                "postfix",
                "With internal_mail_filter_classes = bounce the filter sees the MTA's own "
                "bounces too, on a connection of their own, with an empty sender and no angle "
                "brackets; sendmail never shows them.",
                seen=[
                    *["connect", "hello", *ONE_LIST, "close"],
                    *["connect", "hello", ("envfrom", ""), ("envrcpt", "alice@example.com")],
                    *["data", *["header"] * 9, "eoh", "body", "eom", "close"],
                ],
                connections=2,
            ),
        ),
        topic=TOPIC,
    ),
)
