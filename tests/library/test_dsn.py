"""Milter.dsn against real mail servers on loopback, well-behaved and otherwise."""

from __future__ import annotations

import doctest
import email
import email.message
import email.policy
import importlib.util
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Dialogue
from hypothesis import given
from hypothesis import strategies as st
from support.smtp_server import DRIP, DROP, FLOOD, STALL, TLS_FILE, Late, Step, serving

from Milter import _dsn_template, _smtp_body, dsn
from Milter.dns import DNSError, Session
from Milter.dsn import create_msg, send_dsn

MESSAGE = "Subject: hello\n\nbody\n"


class Zone:
    """A DNS session made of a table; what is an exception is raised."""

    def __init__(self, table: dict[tuple[str, str], Any] | None = None) -> None:
        self.table = {("a.test", "MX"): [(10, "mx.test")], ("mx.test", "A"): ["127.0.0.1"]}
        self.table.update(table or {})
        self.asked: list[tuple[str, str]] = []

    def dns(self, name: str, qtype: str) -> Any:
        self.asked.append((name, qtype))
        found = self.table.get((name, qtype), [])
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make send_dsn use a server's port, on loopback too."""
    monkeypatch.setattr(dsn, "AVOID", ())

    def use(server: Any) -> None:
        monkeypatch.setattr(dsn, "PORT", server.port)

    return use


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# --- the dialogue --------------------------------------------------------------------------


def test_callback_validation(port: Any) -> None:
    with serving({}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", session=Zone(), timeout=10) is None
    assert server.commands == ["ehlo me.test", "MAIL FROM:<>", "RCPT TO:<joe@a.test>", "QUIT"]


def test_callback_validation_with_a_sender(port: Any) -> None:
    with serving({}) as server:
        port(server)
        assert send_dsn("<joe@a.test>", "me.test", None, 10, Zone(), "us@me.test") is None
    assert server.commands[1:3] == ["MAIL FROM:<us@me.test>", "RCPT TO:<joe@a.test>"]


@pytest.mark.parametrize("script", [{"EHLO": b"502 what?"}, {"EHLO": b"500 what?\r\n"[:-2]}])
def test_helo_where_ehlo_is_not_known(port: Any, script: dict[str, Step]) -> None:
    with serving(script) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone()) is None
    assert server.commands[:3] == ["ehlo me.test", "helo me.test", "MAIL FROM:<>"]
    assert server.messages == [b"Subject: hello\r\n\r\nbody\r\n"]


@pytest.mark.parametrize(
    ("script", "reply"),
    [
        ({"banner": b"554 go away"}, (554, "go away")),
        ({"banner": b"421 busy"}, (421, "busy")),
        ({"EHLO": b"502 no", "HELO": b"550 not you"}, (550, "not you")),
        ({"MAIL": b"451 later"}, (451, "later")),
        ({"MAIL": b"550 no bounces"}, (550, "no bounces")),
        ({"RCPT": b"450 greylisted"}, (450, "greylisted")),
        ({"RCPT": b"550-5.1.1 no\r\n550 such user"}, (550, "5.1.1 no such user")),
        ({"RCPT": b"550 \x1b[31mred\xff"}, (550, " [31mred\ufffd")),
        ({"RCPT": b"354 out of step"}, (450, "out of step")),
        ({"DATA": b"250 not asked for"}, (450, "not asked for")),
        ({"DATA": b"554 no data"}, (554, "no data")),
        ({"DATA": b"451 not now"}, (451, "not now")),
        ({".": b"554 spam"}, (554, "spam")),
        ({".": b"452 full"}, (452, "full")),
    ],
)
def test_each_step_can_refuse(port: Any, script: dict[str, Step], reply: tuple[int, str]) -> None:
    with serving(script) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone()) == reply
        if not {"DATA", "."} & set(script):
            assert send_dsn("joe@a.test", "me.test", None, 10, Zone()) == reply


@pytest.mark.parametrize("step", ["banner", "EHLO", "MAIL", "RCPT", "DATA", "."])
def test_a_dropped_connection_is_temporary(port: Any, step: str) -> None:
    with serving({step: DROP}) as server, within(10):
        port(server)
        reply = send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone())
    assert reply == (450, "no mail server of a.test answers")


@pytest.mark.parametrize("step", ["banner", "EHLO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("how", [STALL, DRIP])
def test_the_timeout_bounds_the_whole_call(port: Any, step: str, how: Step) -> None:
    with serving({step: how}) as server, within(4):
        port(server)
        reply = send_dsn("joe@a.test", "me.test", MESSAGE, 0.5, Zone())
    assert reply == (450, "mail servers of a.test: out of time after 0.5 s")


def test_the_timeout_bounds_sending(port: Any) -> None:
    with serving({"body": STALL}) as server, within(4):
        port(server)
        message = b"Subject: big\r\n\r\n" + (b"x" * 998 + b"\r\n") * 30_000
        reply = send_dsn("joe@a.test", "me.test", message, 1.5, Zone())
    assert reply == (450, "mail servers of a.test: out of time after 1.5 s")


@pytest.mark.parametrize("step", ["banner", "EHLO", "MAIL", "RCPT", "DATA", "."])
def test_a_reply_without_end_is_not_collected(port: Any, step: str) -> None:
    """The time-out alone would let a stranger's server fill the memory for ten minutes."""
    with serving({step: FLOOD}) as server:
        port(server)
        tracemalloc.start()
        try:
            reply = send_dsn("joe@a.test", "me.test", MESSAGE, 60, Zone())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert reply == (450, "no mail server of a.test answers")
    assert peak < 1 << 20, peak


def test_a_long_reply_within_its_bound(port: Any) -> None:
    reply = b"".join(b"250-%d" % number + b"x" * 500 + b"\r\n" for number in range(100))
    with serving({"EHLO": reply + b"250 8BITMIME", "RCPT": reply + b"250 ok"}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone()) is None


def test_a_late_answer_in_time(port: Any) -> None:
    late = {"banner": Late(0.2, b"220 mx.test"), "MAIL": Late(0.2, b"250 ok")}
    with serving(late) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone()) is None


def test_no_time_at_all() -> None:
    reply = send_dsn("joe@a.test", "me.test", MESSAGE, 0, Zone())
    assert reply == (450, "mail servers of a.test: out of time after 0 s")


@pytest.mark.parametrize("how", [DROP, STALL, DRIP, FLOOD, b"500 what?"])
def test_the_answer_to_quit_changes_nothing(
    port: Any, monkeypatch: pytest.MonkeyPatch, how: Step
) -> None:
    monkeypatch.setattr(dsn, "QUIT_TIMEOUT", 0.2)
    with serving({"QUIT": how}) as server, within(5):
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 60, Zone()) is None


@pytest.mark.parametrize("banner", [b"220", b"220 ", b"220-\r\n220 "])
def test_an_empty_banner(port: Any, banner: bytes) -> None:
    with serving({"banner": banner}) as server:
        port(server)
        reply = send_dsn("joe@a.test", "me.test", None, 10, Zone())
    assert reply == (553, "127.0.0.1 greets with an empty banner")
    assert "MAIL FROM:<>" not in server.commands


@pytest.mark.parametrize("banner", [b"220 me.test ESMTP", b"220 ME.Test.", b"220-me.test\r\n220 x"])
def test_a_server_that_greets_as_ourselves(port: Any, banner: bytes) -> None:
    with serving({"banner": banner}) as server:
        port(server)
        reply = send_dsn("joe@a.test", "me.test", None, 10, Zone())
    assert isinstance(reply, tuple)
    assert reply[0] == 553
    assert "ourselves" in reply[1]


def test_a_refused_null_sender_is_replaced_for_a_message(port: Any) -> None:
    no_null: dict[str, Step] = {
        "MAIL FROM:<> BODY=8BITMIME": b"550 no null sender",
        "MAIL FROM:<>": b"550 no null sender",
    }
    with serving(no_null) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone()) is None
        assert server.commands[1:4] == [
            "MAIL FROM:<> BODY=8BITMIME",
            "rset",
            "MAIL FROM:<postmaster@me.test> BODY=8BITMIME",
        ]
        assert send_dsn("joe@a.test", "me.test", None, 10, Zone()) == (550, "no null sender")
        server.script["MAIL"] = b"550 no postmaster"
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone()) == (550, "no postmaster")


def test_several_recipients(port: Any) -> None:
    with serving({"RCPT TO:<b@a.test>": b"550 no b"}) as server:
        port(server)
        refused = {"b@a.test": (550, "no b")}
        assert send_dsn(["a@a.test", "b@A.TEST"], "me.test", None, 10, Zone()) is None
        assert send_dsn(["a@a.test", "b@a.test"], "me.test", MESSAGE, 10, Zone()) == refused
        assert len(server.messages) == 1
        assert send_dsn(["b@a.test"], "me.test", MESSAGE, 10, Zone()) == refused
        assert len(server.messages) == 1
        server.script["RCPT TO:<b@a.test>"] = b"450 b is busy"
        later = {"b@a.test": (450, "b is busy")}
        assert send_dsn(["b@a.test"], "me.test", MESSAGE, 10, Zone()) == later


# --- the message on the wire ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (MESSAGE, b"Subject: hello\r\n\r\nbody\r\n"),
        (MESSAGE.encode(), b"Subject: hello\r\n\r\nbody\r\n"),
        ("a: b\n\n.\n..x\n", b"a: b\r\n\r\n.\r\n..x\r\n"),
        ("a: b\r\n\r\nc\rd\ne\r\n", b"a: b\r\n\r\nc\r\nd\r\ne\r\n"),
        (b"a: b\n\nx\n.\r\ny\n", b"a: b\r\n\r\nx\r\n.\r\ny\r\n"),
        ("a: b\n\ncaf\u00e9 \udce9\n", b"a: b\r\n\r\ncaf\xc3\xa9 \xe9\r\n"),
        (email.message_from_string(MESSAGE), b"Subject: hello\r\n\r\nbody\r\n"),
        (
            email.message_from_string(MESSAGE, policy=email.policy.default),
            b"Subject: hello\r\n\r\nbody\r\n",
        ),
    ],
)
def test_forms_of_a_message(port: Any, message: Any, sent: bytes) -> None:
    with serving({}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", message, 10, Zone()) is None
    assert server.messages == [sent]


def test_eight_bit_text_for_a_seven_bit_server(port: Any) -> None:
    message = email.message_from_bytes(
        b"Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\ncaf\xc3\xa9\n"
    )
    with serving({"EHLO": b"250 mx.test"}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", message, 10, Zone()) is None
    assert server.messages[0].isascii()
    received = email.message_from_bytes(server.messages[0])
    assert received.get_payload(decode=True) == "caf\u00e9\r\n".encode()


def test_starttls(port: Any) -> None:
    with serving({"EHLO": b"250-mx.test\r\n250 STARTTLS"}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone()) is None
    assert server.commands[:4] == ["ehlo me.test", "STARTTLS", "ehlo me.test", "MAIL FROM:<>"]
    assert len(server.messages) == 1


@pytest.mark.parametrize(
    ("failing", "connections"), [({"STARTTLS": b"454 not now"}, 1), ({"handshake": b""}, 2)]
)
def test_starttls_that_fails(port: Any, failing: dict[str, Step], connections: int) -> None:
    with serving({"EHLO": b"250-mx.test\r\n250 STARTTLS", **failing}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 20, Zone()) is None
    assert len(server.messages) == 1
    assert server.connections == connections


def test_smtputf8_addresses(port: Any) -> None:
    with serving({"EHLO": b"250-mx.test\r\n250-8BITMIME\r\n250 SMTPUTF8"}) as server:
        port(server)
        assert send_dsn("jos\u00e9@a.test", "me.test", MESSAGE, 10, Zone()) is None
    assert server.commands[1:3] == [
        "MAIL FROM:<> SMTPUTF8 BODY=8BITMIME",
        "RCPT TO:<jos\u00e9@a.test>",
    ]


def test_smtputf8_not_offered(port: Any) -> None:
    with serving({}) as server:
        port(server)
        reply = send_dsn("jos\u00e9@a.test", "me.test", MESSAGE, 10, Zone())
    assert reply == (553, "5.6.7 the server does not offer SMTPUTF8")


def test_an_international_domain_needs_no_smtputf8(port: Any) -> None:
    zone = Zone({("xn--mnchen-3ya.test", "MX"): [(1, "mx.test")]})
    with serving({}) as server:
        port(server)
        assert send_dsn("joe@m\u00fcnchen.test", "me.test", None, 10, zone) is None
    assert server.commands[2] == "RCPT TO:<joe@xn--mnchen-3ya.test>"


def test_a_source_route_is_ignored(port: Any) -> None:
    with serving({}) as server:
        port(server)
        assert send_dsn("<@hop.test:joe@a.test>", "me.test", None, 10, Zone()) is None
    assert server.commands[2] == "RCPT TO:<joe@a.test>"


# --- which servers -------------------------------------------------------------------------


def test_the_preferred_server_is_tried_first(port: Any) -> None:
    zone = Zone(
        {
            ("a.test", "MX"): [(20, "second.test."), (10, "first.test")],
            ("first.test", "A"): ["127.0.0.1"],
            ("second.test", "A"): ["127.0.0.2"],
        }
    )
    with ExitStack() as stack:
        first = stack.enter_context(serving({}))
        second = stack.enter_context(serving({}, "127.0.0.2", first.port))
        port(first)
        assert send_dsn("joe@a.test", "me.test", None, 10, zone) is None
        assert (first.connections, second.connections) == (1, 0)
        for temporary in ({"RCPT": b"450 later"}, {"banner": b"554 no"}, {"MAIL": DROP}):
            first.script.update(temporary)
            before = second.connections
            assert send_dsn("joe@a.test", "me.test", None, 10, zone) is None
            assert second.connections == before + 1
        first.script.update({"banner": b"220 mx.test", "MAIL": b"250 ok", "RCPT": b"550 never"})
        assert send_dsn("joe@a.test", "me.test", None, 10, zone) == (550, "never")
        zone.table["first.test", "A"] = DNSError("no answer")
        assert send_dsn("joe@a.test", "me.test", None, 10, zone) is None


def test_no_mx_but_an_address(port: Any) -> None:
    zone = Zone({("b.test", "A"): ["127.0.0.1"]})
    with serving({}) as server:
        port(server)
        assert send_dsn("joe@b.test", "me.test", None, 10, zone) is None


def test_ipv6(port: Any) -> None:
    zone = Zone({("b.test", "AAAA"): [bytes(15) + b"\1", "no address"]})
    with serving({}, "::1") as server:
        port(server)
        assert send_dsn("joe@b.test", "me.test", None, 10, zone) is None
        assert send_dsn("joe@[IPv6:::1]", "me.test", None, 10, zone) is None
    assert server.connections == 2


def test_address_literals(port: Any) -> None:
    zone = Zone({("b.test", "MX"): [(1, "127.0.0.1")]})
    with serving({}) as server:
        port(server)
        assert send_dsn("joe@[127.0.0.1]", "me.test", None, 10, zone) is None
        assert zone.asked == []
        assert send_dsn("joe@b.test", "me.test", None, 10, zone) is None
    assert server.connections == 2


def test_a_host_that_only_the_system_knows(port: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsn, "_system_lookup", lambda host: ["127.0.0.1"])
    with serving({}) as server:
        port(server)
        assert send_dsn("joe@b.test", "me.test", None, 10, Zone()) is None


def test_the_system_may_not_know_or_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsn, "_system_lookup", lambda host: [])
    reply = send_dsn("joe@b.test", "me.test", None, 10, Zone())
    assert reply == (450, "no mail server of b.test answers")
    ended = threading.Event()
    monkeypatch.setattr(dsn, "_system_lookup", lambda host: [str(ended.wait(60))])
    reply = send_dsn("joe@b.test", "me.test", None, 0.3, Zone())
    ended.set()
    assert reply == (450, "mail servers of b.test: out of time after 0.3 s")


def test_the_system_lookup() -> None:
    assert "127.0.0.1" in dsn._system_lookup("127.0.0.1")
    assert dsn._system_lookup("." * 70) == []


def test_nobody_listens(port: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    port(type("Closed", (), {"port": free}))
    reply = send_dsn("joe@a.test", "me.test", None, 10, Zone())
    assert reply == (450, "no mail server of a.test answers")
    reply = send_dsn("joe@[127.0.0.1]", "me.test", None, 10, Zone())
    assert reply == (450, "no mail server of [127.0.0.1] answers")


MAPPED = bytes(10) + b"\xff\xff\x7f\0\0\1"


@pytest.mark.parametrize(
    "records",
    [
        {("b.test", "A"): ["127.0.0.1"]},
        {("b.test", "A"): ["0.0.0.0"]},
        {("b.test", "A"): ["127.1"]},
        {("b.test", "A"): ["localhost"]},
        {("b.test", "AAAA"): [bytes(15) + b"\1"]},
        {("b.test", "AAAA"): [bytes(16)]},
        {("b.test", "AAAA"): [MAPPED]},
        {("b.test", "AAAA"): [b"\xfe\x80" + bytes(13) + b"\1"]},
        {("b.test", "AAAA"): [b"\xff\x02" + bytes(13) + b"\1"]},
        {("b.test", "MX"): [(1, "127.0.0.1")]},
        {("b.test", "MX"): [(1, "localhost")]},
        {("b.test", "MX"): [(1, "mx.test"), (2, "x.test")], ("x.test", "A"): ["169.254.169.254"]},
    ],
)
def test_a_stranger_leads_nowhere_on_this_host(
    monkeypatch: pytest.MonkeyPatch, records: dict[tuple[str, str], Any]
) -> None:
    monkeypatch.setattr(dsn._Delivery, "attempt", lambda *args: pytest.fail(f"connects: {args}"))
    monkeypatch.setattr(dsn, "_system_lookup", lambda host: ["127.0.0.1", "::1"])
    reply = send_dsn("joe@b.test", "me.test", MESSAGE, 10, Zone(records))
    assert reply == (553, "5.4.4 no mail server of b.test has an address to connect to")


@pytest.mark.parametrize(
    "domain", ["[127.0.0.1]", "127.0.0.1", "[IPv6:::1]", "[IPv6:fe80::1%lo]", "[224.0.0.1]"]
)
def test_nor_does_an_address_for_a_domain(monkeypatch: pytest.MonkeyPatch, domain: str) -> None:
    monkeypatch.setattr(dsn._Delivery, "attempt", lambda *args: pytest.fail(f"connects: {args}"))
    reply = send_dsn(f"joe@{domain}", "me.test", None, 10, Zone())
    assert isinstance(reply, tuple)
    assert reply[0] == 553


def test_addresses_that_are_avoided_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def attempt(_self: Any, _host: str, address: str, _deadline: float) -> Any:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(dsn._Delivery, "attempt", attempt)
    zone = Zone(
        {
            ("b.test", "MX"): [(1, "mx.test"), (2, "x.test")],
            ("x.test", "A"): ["127.0.0.1", "192.0.2.1", "10.0.0.1"],
        }
    )
    temporary = (450, "no mail server of b.test answers")
    assert send_dsn("joe@b.test", "me.test", None, 10, zone) == temporary
    assert tried == ["192.0.2.1", "10.0.0.1"]
    tried.clear()
    private = [*dsn.AVOID, "10.0.0.0/8"]
    assert send_dsn("joe@b.test", "me.test", None, 10, zone, avoid=private) == temporary
    assert send_dsn("joe@b.test", "me.test", None, 10, zone, avoid=iter(private)) == temporary
    assert tried == ["192.0.2.1"] * 2
    tried.clear()
    assert send_dsn("joe@b.test", "me.test", None, 10, zone, avoid="192.0.2.*") == temporary
    assert tried == ["127.0.0.1", "127.0.0.1", "10.0.0.1"]
    # There may be others, whose addresses could not be found.
    zone.table["x.test", "A"] = DNSError("no answer")
    assert send_dsn("joe@b.test", "me.test", None, 10, zone) == temporary


def test_a_relay_on_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({}) as server:
        monkeypatch.setattr(dsn, "PORT", server.port)
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone(), avoid=()) is None
    assert len(server.messages) == 1


def test_null_mx() -> None:
    reply = send_dsn("joe@b.test", "me.test", None, 10, Zone({("b.test", "MX"): [(0, ".")]}))
    assert reply == (556, "5.1.10 b.test accepts no mail (null MX)")


def test_a_domain_in_a_reply_is_printable() -> None:
    """The text of a reply goes where those of servers go: into logs and on terminals."""
    for domain in ("b\u202e.test", "b\u2028.test", "b\u200b\u2066.test"):
        address = f"joe@{domain}"
        replies = [
            send_dsn(address, "me.test", None, 10, Zone()),
            send_dsn(address, "me.test", None, 0, Zone()),
            send_dsn(address, "me.test", None, 10, Nowhere()),
        ]
        assert [reply[0] for reply in replies if isinstance(reply, tuple)] == [450, 450, 556]
        assert all(reply[1].isprintable() for reply in replies if isinstance(reply, tuple))


class Nowhere:
    """A DNS session that knows of a null MX everywhere."""

    def dns(self, name: str, qtype: str) -> Any:
        return [(0, ".")] if qtype == "MX" else []


def test_dns_trouble() -> None:
    zone = Zone({("b.test", "MX"): DNSError("MX b.test:\n no answer")})
    reply = send_dsn("joe@b.test", "me.test", None, 10, zone)
    assert reply == (450, "DNS trouble: MX b.test: no answer")


@pytest.mark.skipif(importlib.util.find_spec("dns") is None, reason="needs the extra dns")
def test_with_a_real_session(port: Any) -> None:
    from support import dns_server

    records = {
        ("a.test", "MX"): dns_server.Answer(
            ["a.test MX 10 mx.a.test."], additional=["mx.a.test A 127.0.0.1"]
        ),
        ("mx.a.test", "AAAA"): [],
        ("slow.test", "MX"): dns_server.Answer(silent=True),
    }
    with serving({}) as server, dns_server.serving(records) as names:
        port(server)
        session = Session(servers=[("127.0.0.1", names.port)])
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, session) is None
        with within(5):
            reply = send_dsn("joe@slow.test", "me.test", None, 0.5, session)
    assert isinstance(reply, tuple)
    assert reply[0] == 450


# --- bad arguments -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mailfrom", "why"),
    [
        ([], "at least one"),
        ("", "e-mail address"),
        ("<>", "e-mail address"),
        ("joe", "domain"),
        ("joe@", "domain"),
        ("joe@a.test\r\nDATA", "e-mail address"),
        ("joe smith@a.test", "e-mail address"),
        ("joe@a.test> NOTIFY=NEVER", "e-mail address"),
        ('"joe\r\n"@a.test', "e-mail address"),
        ("joe@a.test\0", "e-mail address"),
        ("joe@a.test\x9b", "e-mail address"),
        ("jo\x85e@a.test", "e-mail address"),
        ('"joe\x1b[2J"@a.test', "e-mail address"),
        ('joe@"\x1b[2J"', "e-mail address"),
        ('joe@"> NOTIFY=NEVER"', "e-mail address"),
        ('"joe@b.test"a.test', "domain"),
        # These become ">" and a space in IDNA.
        ("joe@x\uff1e\u3000NOTIFY=NEVER.a.test", "e-mail address"),
        ("joe@x\uff1e.a.test", "e-mail address"),
        ("joe@x\u3000y.a.test", "e-mail address"),
        ('joe@"\uff1e\u3000NOTIFY=NEVER"', "e-mail address"),
        ("jo\udce9@a.test", "Unicode"),
        (["joe@a.test", "joe@b.test"], "one domain"),
    ],
)
def test_bad_addresses_are_errors(mailfrom: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        send_dsn(mailfrom, "me.test", session=Zone())


def test_a_bad_sender_is_an_error() -> None:
    for sender in ("x@y\r\nRSET", "x@y\uff1e\u3000NOTIFY=NEVER", 'x@"> y"'):
        with pytest.raises(ValueError, match="ourfrom"):
            send_dsn("joe@a.test", "me.test", session=Zone(), ourfrom=sender)


@pytest.mark.parametrize("local", ['"joe smith"', "a'b", '"a>b"'])
def test_unusual_addresses(port: Any, local: str) -> None:
    with serving({}) as server:
        port(server)
        assert send_dsn(f"{local}@a.test", "me.test", None, 10, Zone()) is None
    assert server.commands[2] == f"RCPT TO:<{local}@a.test>"


# --- an independent server -----------------------------------------------------------------


class Mailbox:
    """A handler for aiosmtpd."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.encrypted: list[bool] = []

    async def handle_RCPT(
        self, server: SMTP, session: Dialogue, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address.startswith("nobody"):
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"

    async def handle_DATA(self, server: SMTP, session: Dialogue, envelope: Envelope) -> str:
        self.envelopes.append(envelope)
        self.encrypted.append(session.ssl is not None)
        return "250 2.0.0 queued"


@pytest.mark.parametrize("tls", [False, True])
def test_aiosmtpd(port: Any, tls: bool) -> None:
    mailbox = Mailbox()
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS_FILE)
    controller = Controller(
        mailbox,
        hostname="127.0.0.1",
        port=0,
        server_hostname="mx.test",
        enable_SMTPUTF8=True,
        tls_context=context,
        require_starttls=tls,
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        controller.port = probe.getsockname()[1]
    controller.start()
    try:
        port(controller)
        msg = create_msg(
            type("V", (), {"sender": "jos\u00e9@a.test", "receiver": "me.test"}),
            template="Subject: caf\u00e9\n\n.\nna\u00efve %(sender)s\n",
        )
        assert send_dsn("jos\u00e9@a.test", "me.test", msg, 20, Zone()) is None
        assert send_dsn("nobody@a.test", "me.test", msg, 20, Zone()) == (550, "5.1.1 no such user")
        assert send_dsn("joe@a.test", "me.test", None, 20, Zone()) is None
    finally:
        controller.stop()
    (envelope,) = mailbox.envelopes
    assert mailbox.encrypted == [tls]
    assert envelope.mail_from in ("", "<>")
    assert envelope.rcpt_tos == ["jos\u00e9@a.test"]
    assert isinstance(envelope.content, bytes)
    received = email.message_from_bytes(envelope.content, policy=email.policy.default)
    assert received["Subject"] == "caf\u00e9"
    assert received.get_content().splitlines() == [".", "na\u00efve jos\u00e9@a.test"]
    assert b"To: jos\xc3\xa9@a.test\r\n" in envelope.content


# --- create_msg ----------------------------------------------------------------------------


class Vars:
    """An application's own object."""

    def __init__(self, **values: Any) -> None:
        self.sender = "joe@a.test"
        self.receiver = "me.test"
        self.__dict__.update(values)


class Query:
    """An SPF query object: one-letter attributes."""

    def __init__(self) -> None:
        self.h, self.s, self.i, self.r, self.o = (
            "helo.test",
            "joe@a.test",
            "1.2.3.4",
            "me.test",
            "a.test",
        )
        self.result, self.perm_error = "fail", None


def made(v: object, template: str, **more: Any) -> email.message.Message:
    msg = create_msg(v, template=template, **more)
    assert msg is not None
    return msg


def test_no_template_no_message() -> None:
    assert create_msg(Vars()) is None


def test_headers_are_added() -> None:
    msg = made(Vars(), "Subject: hi\n\nbody\n")
    assert msg["To"] == "joe@a.test"
    assert msg["From"] == "postmaster@me.test"
    assert msg["Auto-Submitted"] == "auto-generated"
    assert msg["MIME-Version"] == "1.0"
    assert msg["Date"]
    assert msg["Message-ID"].endswith("@me.test>")
    assert msg.get_content_type() == "text/plain"
    assert msg.get_payload() == "body\n"


def test_headers_of_the_template_stay() -> None:
    msg = made(
        Vars(),
        "to: Joe\nFROM: us@me.test\nauto-submitted: auto-replied\nDate: today\nMessage-ID: <1>\n"
        "Content-Type: text/plain; charset=us-ascii\nX-Long: one\n two\n\nbody",
    )
    names = ["To", "From", "Auto-Submitted", "Date", "Message-ID"]
    values = ["Joe", "us@me.test", "auto-replied", "today", "<1>"]
    assert [msg.get_all(name) for name in names] == [[value] for value in values]
    assert msg["X-Long"] == "one two"
    assert len(msg.get_all("MIME-Version", [])) == 1


@pytest.mark.parametrize("template", ["\nbody", "\r\nbody", "\n\nbody"])
def test_a_template_without_headers(template: str) -> None:
    msg = made(Vars(), template)
    assert msg["To"] == "joe@a.test"
    assert msg.get_payload().endswith("body")


def test_values() -> None:
    original = email.message_from_string("Subject: hi\nReceived-SPF: pass (x)\n\n")
    msg = made(
        Vars(num=3, raw=b"caf\xc3\xa9", nothing=None, text="two\nlines"),
        "Subject: Re: %(subject)s 100%%\nX-Rcpt: %(rcpt)s\n\n"
        "%(rcpt)s|%(spf_result)s|%(num)03d|%(nothing)s|%(text)s",
        rcptlist=["a@x", "b@y"],
        origmsg=original,
    )
    assert msg["Subject"] == "Re: hi 100%"
    assert msg["X-Rcpt"] == "a@x b@y"
    assert msg.get_payload() == "a@x\n\tb@y|pass (x)|003||two\nlines"
    assert made(Vars(raw=b"caf\xc3\xa9"), "\n%(raw)s").get_payload(decode=True) == b"caf\xc3\xa9"
    bare = made(Vars(), "\n%(subject)s.", origmsg=email.message_from_string("\n"))
    assert bare.get_payload() == "."


def test_an_spf_query_object() -> None:
    msg = made(
        Query(),
        "\n%(heloname)s %(sender)s %(connectip)s %(receiver)s %(sender_domain)s %(result)s"
        " [%(perm_error)s]",
    )
    assert msg["To"] == "joe@a.test"
    assert msg["From"] == "postmaster@me.test"
    assert msg.get_payload() == "helo.test joe@a.test 1.2.3.4 me.test a.test fail []"


def test_a_missing_value_is_named() -> None:
    with pytest.raises(KeyError, match="zork"):
        create_msg(Vars(), template="Subject: x\n\n%(zork)s")


@pytest.mark.parametrize("template", ["Subject\n\nx", "Two words: x\n\nx", ": x\n\nx"])
def test_a_bad_header_line_is_an_error(template: str) -> None:
    with pytest.raises(ValueError, match="header line"):
        create_msg(Vars(), template=template)


line_ends = st.sampled_from(["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85"])
hostile = st.lists(
    st.one_of(
        line_ends,
        st.sampled_from(["Bcc: x@y", "\u2028", "\u2029", " ", "\0", "%(x)s", "\n\n", "--b", "=?"]),
        st.text(max_size=5),
    )
).map("".join)


@given(hostile)
def test_a_value_cannot_add_headers(value: str) -> None:
    v = Vars(sender=value, receiver=value, subject=value)
    msg = made(v, "Subject: about %(subject)s\nX-A: %(sender)s\nReply-To: %(sender)s\n\n%(sender)s")
    wanted = ["Subject", "X-A", "Reply-To", "To", "From", "Auto-Submitted", "Date", "Message-ID"]
    wanted += ["MIME-Version", "Content-Type"]
    try:
        wire = _smtp_body.for_data(msg, eight_bit=True)
    except UnicodeEncodeError:
        assert any("\ud800" <= c <= "\udfff" for c in value)
        return
    for parser in (
        email.message_from_bytes(wire),
        email.message_from_bytes(wire, policy=email.policy.default),
    ):
        names = [name for name in parser if name != "Content-Transfer-Encoding"]
        assert sorted(names) == sorted(wanted)


MULTIPART = """Subject: report
Content-Type: multipart/report; boundary="b"; report-type=delivery-status

--b

To %(sender)s: caf\u00e9
--b
Content-Type: message/delivery-status

Reporting-MTA: dns; %(receiver)s

Final-Recipient: rfc822; %(sender)s
--b--
"""


@given(hostile)
def test_a_value_cannot_add_parts(value: str) -> None:
    msg = made(Vars(sender=value), MULTIPART)
    assert msg.is_multipart()
    first, status = msg.get_payload()
    assert not first.is_multipart()
    assert [list(block) for block in status.get_payload()] == [
        ["Reporting-MTA"],
        ["Final-Recipient"],
    ]


def test_text_other_than_ascii() -> None:
    msg = made(
        Vars(sender="jos\u00e9@a.test", name="Jos\u00e9"),
        "Subject: caf\u00e9\nFrom: %(name)s <us@me.test>\n\nna\u00efve",
    )
    wire = _smtp_body.for_data(msg, eight_bit=True)
    assert b"Subject: =?utf-8?" in wire
    assert b"From: =?utf-8?" in wire
    assert b"<us@me.test>" in wire
    assert b"To: jos\xc3\xa9@a.test" in wire
    received = email.message_from_bytes(wire, policy=email.policy.default)
    assert received["Subject"] == "caf\u00e9"
    assert str(received["From"]) == "Jos\u00e9 <us@me.test>"
    assert received.get_payload(decode=True).decode() == "na\u00efve"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("charset", "body", "data"),
    [
        ("iso-8859-1", "caf\u00e9", b"caf\xe9"),
        ("us-ascii", "caf\u00e9", b"caf\xc3\xa9"),
        ("x-none", "caf\u00e9", b"caf\xc3\xa9"),
        ("utf-8", "caf\udce9", b"caf\xef\xbf\xbd"),
    ],
)
def test_the_body_keeps_its_charset(charset: str, body: str, data: bytes) -> None:
    msg = made(Vars(body=body), f"Content-Type: text/plain; charset={charset}\n\n%(body)s")
    assert msg.get_payload(decode=True) == data


def test_examples_in_the_documentation() -> None:
    assert doctest.testmod(dsn).failed == 0
    assert doctest.testmod(_dsn_template).failed == 0


# --- replies and forms of a message --------------------------------------------------------

TWO_SERVERS = {
    ("a.test", "MX"): [(10, "mx1.test"), (20, "mx2.test")],
    ("mx1.test", "A"): ["127.0.0.1"],
    ("mx2.test", "A"): ["127.0.0.2"],
}


@contextmanager
def two_servers(port: Any, script: dict[str, Step]) -> Iterator[tuple[Any, Any]]:
    """The servers of TWO_SERVERS; the first follows the script."""
    with serving(script) as first, serving({}, "127.0.0.2", first.port) as second:
        port(first)
        yield first, second


@pytest.mark.parametrize("code", [b"200", b"211", b"221", b"250", b"251", b"252", b"299"])
@pytest.mark.parametrize("verb", ["banner", "EHLO", "MAIL", "RCPT", "."])
def test_the_first_digit_of_a_reply_decides(port: Any, verb: str, code: bytes) -> None:
    with two_servers(port, {verb: code + b" mx.test is fine"}) as (first, second):
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone(TWO_SERVERS)) is None
        if verb != ".":
            assert send_dsn("joe@a.test", "me.test", None, 10, Zone(TWO_SERVERS)) is None
    assert len(first.messages) == 1
    assert not second.connections


@pytest.mark.parametrize("code", [b"250", b"251", b"220"])
def test_a_message_that_was_not_asked_for_is_not_delivered(port: Any, code: bytes) -> None:
    with two_servers(port, {"DATA": code + b" fine"}) as (first, second):
        assert send_dsn("joe@a.test", "me.test", MESSAGE, 10, Zone(TWO_SERVERS)) is None
    assert first.commands[-1] == "QUIT"
    assert len(second.messages) == 1


def test_several_recipients_and_unusual_positive_replies(port: Any) -> None:
    script = {
        "DATA": b"354-go\r\n354 on",
        ".": b"259 queued",
        "RCPT TO:<b@a.test>": b"252 perhaps",
        "RCPT TO:<c@a.test>": b"550 no",
    }
    with serving(script) as server:
        port(server)
        found = send_dsn(["a@a.test", "b@a.test", "c@a.test"], "me.test", MESSAGE, 10, Zone())
    assert found == {"c@a.test": (550, "no")}
    assert len(server.messages) == 1


def test_a_message_that_a_server_cannot_take_goes_to_one_that_can(port: Any) -> None:
    message = b"To: <\xc3\xbc@x.test>\n\nbody\n"
    with serving({"EHLO": b"250 mx.test"}) as first:
        port(first)
        found = send_dsn("joe@a.test", "me.test", message, 10, Zone())
        assert found == (554, "5.6.3 an address in the header cannot be written in ASCII")
        with serving({}, "127.0.0.2", first.port) as second:
            assert send_dsn("joe@a.test", "me.test", message, 10, Zone(TWO_SERVERS)) is None
    assert not first.messages
    assert second.messages == [message.replace(b"\n", b"\r\n")]


EIGHT_BIT = b"Content-Type: text/plain; charset=%s\nMIME-Version: 1.0\n\n\xe9\n.\n"


@pytest.mark.parametrize("charset", [b"iso-8859-1", b"utf-8", b"x-nobody-knows", b"us-ascii"])
@pytest.mark.parametrize("form", [bytes, str, email.message.Message])
def test_a_seven_bit_server_gets_the_bytes_that_there_are(
    port: Any, charset: bytes, form: type
) -> None:
    raw = EIGHT_BIT % charset
    message: Any = raw if form is bytes else raw.decode("ascii", "surrogateescape")
    if form is email.message.Message:
        message = email.message_from_bytes(raw)
    with serving({"EHLO": b"250 mx.test"}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", message, 10, Zone()) is None
    assert server.messages[0].isascii()
    received = email.message_from_bytes(server.messages[0])
    assert received.get_payload(decode=True) == b"\xe9\r\n.\r\n"
    assert received["Content-Type"] == "text/plain; charset=" + charset.decode()


def test_no_line_is_too_long(port: Any) -> None:
    message = b"Subject: " + b"s" * 3000 + b"\n\n" + b"." * 3000 + b"\n"
    with serving({}) as server:
        port(server)
        assert send_dsn("joe@a.test", "me.test", message, 10, Zone()) is None
    assert max(map(len, server.messages[0].split(b"\r\n"))) <= 998
    assert email.message_from_bytes(server.messages[0]).get_payload(decode=True) == (
        b"." * 3000 + b"\r\n"
    )


@pytest.mark.parametrize("name", ["me.test", "ME.TEST.", "b\u00fccher.test", "XN--bcher-KVA.test"])
def test_a_server_that_greets_as_ourselves_in_another_form(port: Any, name: str) -> None:
    ours = "me.test" if "me" in name.lower() else "xn--bcher-kva.test"
    with serving({"banner": f"220 {name} ESMTP".encode()}) as server:
        port(server)
        found = send_dsn("joe@a.test", ours, None, 10, Zone())
    assert isinstance(found, tuple)
    assert found[0] == 553


def test_recipients_in_one_domain_in_several_forms(port: Any) -> None:
    zone = Zone({("xn--bcher-kva.test", "MX"): [(10, "mx.test")]})
    with serving({}) as server:
        port(server)
        forms = ["a@b\u00fccher.test", "b@XN--bcher-kva.test", "c@B\u00dcCHER.test."]
        assert send_dsn(forms, "me.test", None, 10, zone) is None


def test_attributes_for_a_template() -> None:
    values = dsn.Vars()
    values.sender, values.receiver = "joe@a.test", "me.test"  # type: ignore[attr-defined]
    msg = create_msg(values, template="Subject: to %(sender)s\n\nbody")
    assert msg is not None
    assert msg["Subject"] == "to joe@a.test"


def test_what_moved_says_that_it_is_here() -> None:
    assert dsn.create_msg.__module__ == dsn.Vars.__module__ == "Milter.dsn"
