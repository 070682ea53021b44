"""Milter.dns against a real name server on loopback, and without dnspython."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.timing import SLOWER

import Milter.dns
from Milter.dns import MAX_CNAME, DNSError, DNSLookup, Session

HAVE_DNSPYTHON = importlib.util.find_spec("dns") is not None
with_dnspython = pytest.mark.skipif(not HAVE_DNSPYTHON, reason="needs the extra dns")

if HAVE_DNSPYTHON:
    import dns.resolver
    from support.dns_server import Answer, Server, Zone, serving
else:  # the names that annotations and tables below mention
    Server = Zone = serving = Any

    def Answer(*_args: Any, **_kwargs: Any) -> Any: ...


ZONE: Zone = {
    ("example.com", "A"): ["example.com A 192.0.2.1", "example.com A 192.0.2.2"],
    ("example.com", "AAAA"): ["example.com AAAA 2001:db8::1"],
    ("example.com", "TXT"): [
        'example.com TXT "v=spf1 " "a -all"',
        'example.com TXT "caf\\195\\169"',
    ],
    ("example.com", "SPF"): ['example.com SPF "v=spf1 -all"'],
    ("example.com", "NS"): ["example.com NS ns.example.com."],
    ("example.com", "SRV"): ["example.com SRV 1 2 25 mail.example.com."],
    # priority 10, weight 1, and a target: no UTF-8, with what has to be escaped, an ordinary one
    ("odd.test", "URI"): [
        "odd.test URI \\# 5 000a0001f9",
        "odd.test URI \\# 7 000a0001225c00",
        'odd.test URI 10 1 "x:y"',
    ],
    ("1.2.0.192.in-addr.arpa", "PTR"): Answer(
        ["1.2.0.192.in-addr.arpa PTR mail.example.com."],
        additional=["mail.example.com A 203.0.113.66"],
    ),
    ("mx.test", "MX"): Answer(
        ["mx.test MX 20 b.mx.test.", "mx.test MX 10 a.mx.test.", "mx.test MX 30 mail.bank.test."],
        additional=[
            "a.mx.test A 192.0.2.10",
            "a.mx.test AAAA 2001:db8::10",
            "mail.bank.test A 203.0.113.66",
            "other.mx.test A 203.0.113.66",
            "www.bank.test A 203.0.113.66",
            "b.mx.test TXT poison",
        ],
    ),
    ("mail.bank.test", "A"): ["mail.bank.test A 192.0.2.99"],
    ("www.bank.test", "A"): ["www.bank.test A 192.0.2.98"],
    ("other.mx.test", "A"): ["other.mx.test A 192.0.2.97"],
    ("mail.example.com", "A"): ["mail.example.com A 192.0.2.25"],
    ("alias.test", "A"): [
        "alias.test CNAME Other.Test.",
        "other.test CNAME example.com.",
        "example.com A 203.0.113.66",
    ],
    ("alias.test", "CNAME"): ["alias.test CNAME other.test."],
    ("half.test", "A"): ["half.test CNAME example.com."],
    ("dangling.test", "A"): ["dangling.test CNAME gone.test."],
    ("empty.test", "A"): [],
    ("loop.test", "A"): ["loop.test CNAME pool.test.", "pool.test CNAME loop.test."],
    ("self.test", "A"): ["self.test CNAME self.test."],
    ("ping.test", "A"): ["ping.test CNAME pong.test."],
    ("pong.test", "A"): ["pong.test CNAME ping.test."],
    ("big.test", "TXT"): Answer(
        [f'big.test TXT "{i:0250}" "{i:0250}"' for i in range(20)], truncate=True
    ),
    ("broken.test", "A"): Answer(rcode="SERVFAIL"),
    ("refused.test", "A"): Answer(rcode="REFUSED"),
    ("silent.test", "A"): Answer(silent=True),
    ("forged.test", "A"): Answer(["forged.test A 203.0.113.66"], wrong_id=True),
    ("stranger.test", "A"): ["www.bank.test A 203.0.113.66"],
    ("xn--mnchen-3ya.test", "A"): ["xn--mnchen-3ya.test A 192.0.2.7"],
    ("a\\.b.test", "A"): ["a\\.b.test A 192.0.2.8"],
}
for _i in range(MAX_CNAME + 1):
    ZONE[f"c{_i}.test", "A"] = [f"c{_i}.test CNAME c{_i + 1}.test."]
ZONE[f"c{MAX_CNAME + 1}.test", "A"] = [f"c{MAX_CNAME + 1}.test A 192.0.2.3"]
_CHAIN = [f"d{i}.test CNAME d{i + 1}.test." for i in range(MAX_CNAME + 1)]
ZONE["d0.test", "A"] = [*_CHAIN, f"d{MAX_CNAME + 1}.test A 192.0.2.4"]
ZONE["d1.test", "A"] = [*_CHAIN[1:], f"d{MAX_CNAME + 1}.test A 192.0.2.4"]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with serving(ZONE) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.asked.clear()
    return shared_server


@pytest.fixture
def session(server: Server) -> Session:
    return Session(servers=[("127.0.0.1", server.port)], timeout=10)


# --- what comes back -----------------------------------------------------------------------


@with_dnspython
@pytest.mark.parametrize(
    ("name", "qtype", "data"),
    [
        ("example.com", "A", ["192.0.2.1", "192.0.2.2"]),
        ("EXAMPLE.com.", "a", ["192.0.2.1", "192.0.2.2"]),
        ("example.com", "AAAA", [bytes.fromhex("20010db8" + "0" * 23 + "1")]),
        ("mx.test", "MX", [(10, "a.mx.test"), (20, "b.mx.test"), (30, "mail.bank.test")]),
        ("example.com", "TXT", [(b"caf\xc3\xa9",), (b"v=spf1 ", b"a -all")]),
        ("example.com", "SPF", [(b"v=spf1 -all",)]),
        ("example.com", "NS", ["ns.example.com"]),
        ("1.2.0.192.in-addr.arpa", "PTR", ["mail.example.com"]),
        ("alias.test", "CNAME", ["other.test"]),
        ("example.com", "SRV", ["1 2 25 mail.example.com."]),
        ("odd.test", "URI", ['10 1 "\\249"', '10 1 "\\"\\\\\\000"', '10 1 "x:y"']),
        ("m\u00fcnchen.test", "A", ["192.0.2.7"]),
        ("a\\.b.test", "A", ["192.0.2.8"]),
        # nothing there
        ("nowhere.test", "A", []),
        ("empty.test", "A", []),
        ("stranger.test", "A", []),
        ("alias.test", "MX", []),
    ],
)
def test_data(session: Session, name: str, qtype: str, data: list[Any]) -> None:
    assert sorted(session.dns(name, qtype), key=repr) == sorted(data, key=repr)


@with_dnspython
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a..b",
        ".a.test",
        "a" * 64 + ".test",
        "a." * 127 + "test",
        "x" * 5000,
        "�.test",
        "a\\",
        "a\\2",
        "ü" * 70 + ".test",
        "a\\999.test",
    ],
)
def test_names_that_cannot_exist(session: Session, server: Server, name: str) -> None:
    assert session.dns(name, "A") == []
    assert server.asked == []


@with_dnspython
def test_dnslookup_returns_every_record(server: Server) -> None:
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = server.port
    found = DNSLookup("mx.test", "MX", resolver)
    assert (("mx.test", "MX"), (10, "a.mx.test")) in found
    assert (("a.mx.test", "A"), "192.0.2.10") in found
    assert (("b.mx.test", "TXT"), (b"poison",)) in found
    assert len(found) == 9
    assert Session(resolver).dns("mail.example.com", "A") == ["192.0.2.25"]


@with_dnspython
@pytest.mark.parametrize(
    ("encoding", "texts"),
    [
        ("ascii", ["v=spf1 a -all", "caf\udcc3\udca9"]),
        ("utf-8", ["v=spf1 a -all", "caf\u00e9"]),
        ("latin-1", ["v=spf1 a -all", "caf\u00c3\u00a9"]),
        (None, ["v=spf1 a -all", "caf\udcc3\udca9"]),
    ],
)
def test_txt(session: Session, encoding: str, texts: list[str]) -> None:
    assert sorted(session.dns_txt("example.com", enc=encoding)) == sorted(texts)


@with_dnspython
def test_a_long_answer_comes_over_tcp(session: Session, server: Server) -> None:
    texts = session.dns_txt("big.test")
    assert sorted(map(len, texts)) == [500] * 20
    assert [protocol for _, _, protocol in server.asked] == ["udp", "tcp"]


# --- aliases -------------------------------------------------------------------------------


@with_dnspython
def test_aliases_are_followed(session: Session, server: Server) -> None:
    assert session.dns("alias.test", "A") == ["203.0.113.66"]
    assert len(server.asked) == 1
    # What one domain says of another is no knowledge about the other.
    assert sorted(session.dns("example.com", "A")) == ["192.0.2.1", "192.0.2.2"]
    assert sorted(session.dns("half.test", "A")) == ["192.0.2.1", "192.0.2.2"]
    assert session.dns("dangling.test", "A") == []


@with_dnspython
@pytest.mark.parametrize("name", ["c1.test", "d1.test"])
def test_a_chain_of_max_cname(session: Session, name: str) -> None:
    assert session.dns(name, "A") in (["192.0.2.3"], ["192.0.2.4"])


@with_dnspython
@pytest.mark.parametrize("name", ["c0.test", "d0.test", "loop.test", "self.test", "ping.test"])
def test_loops_and_longer_chains_are_errors(session: Session, name: str) -> None:
    with pytest.raises(DNSError, match=name.partition(".")[0]):
        session.dns(name, "A")


@with_dnspython
def test_names_already_gone_through(session: Session) -> None:
    with pytest.raises(DNSError, match=r"leads back to 'example\.com'"):
        session.dns("half.test", "A", ["example.com"])


# --- failures ------------------------------------------------------------------------------


@with_dnspython
def test_an_error_is_one_line_whatever_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text goes into logs, and strangers choose the names."""

    def missing(*_args: Any, **_kwargs: Any) -> None:
        raise dns.resolver.NoResolverConfiguration

    name = "\x1b[2jx\nforged.test"
    monkeypatch.setattr(dns.resolver, "Resolver", missing)
    with pytest.raises(DNSError) as caught:
        Session().dns(name, "A")
    assert repr(name) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("length", [1, MAX_CNAME + 1])
def test_so_is_that_of_a_chain(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    def look_up(name: str, _qtype: str) -> Any:
        number = (int(name.partition("\n")[0]) + 1) % length
        return [((name, "CNAME"), f"{number}\n\x1b.test")]

    monkeypatch.setattr(Milter.dns, "DNSLookup", look_up)
    with pytest.raises(DNSError) as caught:
        Session().dns("0\n\x1b.test", "A")
    assert str(caught.value).isprintable()


@with_dnspython
@pytest.mark.parametrize("name", ["broken.test", "refused.test", "silent.test", "forged.test"])
def test_failures_are_errors_within_the_time(server: Server, name: str) -> None:
    session = Session(servers=[("127.0.0.1", server.port)], timeout=1)
    start = time.monotonic()
    with pytest.raises(DNSError, match=name):
        session.dns(name, "A")
    assert time.monotonic() - start < 5
    assert session.cache == {}


@with_dnspython
def test_the_next_server_is_asked() -> None:
    good, bad = (
        {("a.test", "A"): ["a.test A 192.0.2.1"]},
        {("a.test", "A"): ZONE["broken.test", "A"]},
    )
    with ExitStack() as stack:
        first = stack.enter_context(serving(bad))
        second = stack.enter_context(serving(good, "127.0.0.2"))
        session = Session(servers=[("127.0.0.1", first.port), ("127.0.0.2", second.port)])
        assert session.dns("a.test", "A") == ["192.0.2.1"]
        assert first.asked
        assert second.asked


@with_dnspython
@pytest.mark.parametrize("qtype", ["", "NONSENSE", "AXFR", "ANY", "TYPE70000"])
def test_a_bad_type_is_an_error(session: Session, qtype: str) -> None:
    with pytest.raises(ValueError, match="qtype must be"):
        session.dns("example.com", qtype)


@with_dnspython
def test_without_resolv_conf(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: Any, **_kwargs: Any) -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns.resolver, "Resolver", missing)
    with pytest.raises(DNSError, match=r"example\.com"):
        Session().dns("example.com", "A")


@pytest.mark.parametrize(
    ("servers", "why"),
    [
        (["ns.example.com"], "IP address"),
        ([("127.0.0.1", 0)], "port"),
        ([("127.0.0.1", 65536)], "port"),
        (["127.0.0.1", ("127.0.0.1", 5353)], "twice"),
    ],
)
def test_bad_servers_are_errors(servers: list[Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Session(servers=servers)


def test_resolver_or_servers() -> None:
    with pytest.raises(ValueError, match="not both"):
        Session(object(), servers=["127.0.0.1"])  # type: ignore[arg-type]


# --- the cache -----------------------------------------------------------------------------


@with_dnspython
def test_answers_are_remembered(session: Session, server: Server) -> None:
    for _ in range(3):
        session.dns("Example.COM", "A").append("changed by the caller")
        assert session.dns("nowhere.test", "A") == []
        session.dns("example.com", "SRV")
    assert len(session.dns("example.com.", "A")) == 2
    assert len(server.asked) == 3
    assert ("example.com", "A") in session.cache


@with_dnspython
def test_only_what_is_safe_is_believed(session: Session, server: Server) -> None:
    assert session.dns("1.2.0.192.in-addr.arpa", "PTR") == ["mail.example.com"]
    assert session.dns("mail.example.com", "A") == ["192.0.2.25"]
    session.dns("mx.test", "MX")
    server.asked.clear()
    assert session.dns("a.mx.test", "A") == ["192.0.2.10"]
    assert len(session.dns("a.mx.test", "AAAA")[0]) == 16
    assert server.asked == []
    assert session.dns("mail.bank.test", "A") == ["192.0.2.99"]
    assert session.dns("www.bank.test", "A") == ["192.0.2.98"]
    assert session.dns("other.mx.test", "A") == ["192.0.2.97"]
    assert session.dns("b.mx.test", "TXT") == []


@with_dnspython
def test_a_subclass_can_believe_nothing(server: Server) -> None:
    class Doubting(Session):
        SAFE2CACHE = frozenset()

    session = Doubting(servers=[("127.0.0.1", server.port)])
    for _ in range(2):
        session.dns("mx.test", "MX")
    assert len(server.asked) == 2
    assert session.cache == {}


def test_a_replaced_lookup_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(("a.test", "A"), "192.0.2.1"), (("A.test.", "TXT"), (b"x", b"y"))]
    monkeypatch.setattr(Milter.dns, "DNSLookup", lambda name, qtype: answers)
    session = Session()
    assert session.dns("a.test", "A") == ["192.0.2.1"]
    assert session.dns_txt("a.test") == ["xy"]


def test_a_session_remembers_so_many_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(name: str, qtype: str) -> list[tuple[tuple[str, str], str]]:
        asked.append(name)
        return [((name, qtype), "192.0.2.1")]

    monkeypatch.setattr(Milter.dns, "DNSLookup", look_up)
    session = Milter.dns.Session()
    for number in range(Milter.dns.MAX_CACHED + 50):
        assert session.dns(f"h{number}.test", "A") == ["192.0.2.1"]
        assert len(session.cache) <= Milter.dns.MAX_CACHED
    session.dns(f"h{number}.test", "A")
    assert asked.count(f"h{number}.test") == 1
    session.dns("h0.test", "A")
    assert asked.count("h0.test") == 2


def test_the_cache_answers_in_under_5_microseconds() -> None:
    session = Session()
    session.cache["mail.example.com", "A"] = ["192.0.2.1"]
    best = 1.0
    for _ in range(50):
        start = time.thread_time()
        for _ in range(100):
            session.dns("mail.example.com", "A")
        best = min(best, (time.thread_time() - start) / 100)
    assert best < 5e-6 * SLOWER


# --- the optional dependency ---------------------------------------------------------------


def test_safe2cache_keeps_what_applications_know() -> None:
    assert {("A", "A"), ("MX", "A"), ("MX", "MX"), ("NS", "A"), ("CNAME", "A")} < Session.SAFE2CACHE
    assert not {pair for pair in Session.SAFE2CACHE if pair[0] == "PTR"} - {("PTR", "PTR")}


def run_isolated(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_missing_dnspython_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dns", None)
    for ask in (Session().dns, Session(servers=["127.0.0.1"]).dns, DNSLookup):
        with pytest.raises(
            ImportError,
            match=r"^Milter\.dns needs the Python package dnspython: pip install dnspython$",
        ):
            ask("a.test", "A")
    with pytest.raises(
        ImportError,
        match=r"^Milter\.dns needs the Python package dnspython: pip install dnspython$",
    ):
        Session().dns("m\u00fcnchen.test", "A")


def test_importing_does_nothing() -> None:
    said = run_isolated(
        "import socket, sys\nsocket.socket = None\nimport Milter.dns\nMilter.dns.Session()\n"
        "Milter.dns.Session(servers=['192.0.2.1'])\nprint('dns' in sys.modules)"
    )
    assert said == "False\n"
