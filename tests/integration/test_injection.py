"""Hostile values in every action: refused, or harmless in what Postfix made of them."""

from __future__ import annotations

import re
import smtplib
from collections.abc import Iterator
from typing import Any

import pytest
from integration import laboratory
from integration.injection import CHANGES, COUNT, values
from integration.laboratory import Bench
from integration.processes import WAIT

BODY = b"The body.\r\n"
HEAD = b"From: <alice@example.com>\r\nSubject: hello\r\nDate: Thu, 01 Jan 2026 12:00:00 +0000\r\n"
PER_CONNECTION = 50  # Postfix hangs up after 100 refusals

Outcomes = dict[tuple[int, str], str]


@pytest.fixture
def bench(lab: laboratory.Laboratory) -> Iterator[Bench]:
    laboratory.require("postfix")
    made = lab.bench("postfix")
    made.taken()
    yield made


class Attempt:
    """The filter with the hostile values of an action, and a client."""

    def __init__(self, bench: Bench, action: str) -> None:
        self.bench = bench
        self.action = action
        self._filter = bench.filter()
        self._run = self._filter.select(f"hostile values: {action}")
        self._connections = 0

    def connect(self) -> smtplib.SMTP:
        smtp = smtplib.SMTP(*self.bench.server.addresses["unix"], timeout=WAIT)
        smtp.ehlo("client.example")
        self._connections += 1
        return smtp

    def outcomes(self) -> Outcomes:
        """What the filter said of each value, once all was delivered; both ways must agree."""
        self.bench.server.settle()
        events = self._filter.finish(self._run, self._connections)
        found = {(e[3], e[4]): e[5] for e in events if e[2] == "tried"}
        assert set(found) == {(n, how) for n in range(COUNT) for how in ("ctx", "base")}
        for number in range(COUNT):
            assert found[number, "ctx"] == found[number, "base"], values(self.action)[number]
        results = list(found.values())
        # Not all of them are refused: what is not passed on would show nothing.
        assert results.count("refused") >= COUNT // 5
        log = [line for line in self._filter.log if "runs as root" not in line]
        assert not log, log
        return found


def send(smtp: smtplib.SMTP, recipient: str, head: bytes = HEAD) -> None:
    """A message from nobody, so that none is bounced."""
    smtp.sendmail("", [recipient], head + b"\r\n" + BODY)


def checked_head(content: bytes) -> bytes:
    """The header section of what was delivered, which has proper lines and its own body."""
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n|\0", content)
    head, _, body = content.partition(b"\r\n\r\n")
    assert body == BODY
    return head


def one_message(attempt: Attempt) -> tuple[Outcomes, list[str], bytes]:
    """Send one; returns the outcomes, and all the recipients and the head delivered."""
    with attempt.connect() as smtp:
        send(smtp, "bob@example.org")
    outcomes = attempt.outcomes()
    # Postfix delivers to so many recipients at a time.
    delivered = attempt.bench.taken()
    assert {envelope.sender for envelope, _ in delivered} == {"<>"}
    (head,) = {checked_head(content) for _, content in delivered}
    return outcomes, [each for envelope, _ in delivered for each in envelope.recipients], head


def fields(head: bytes) -> list[tuple[bytes, bytes]]:
    """Names and values, in order, but for what Postfix adds itself."""
    lines = re.split(rb"\r\n(?![ \t])", head)
    split = [line.partition(b":") for line in lines]
    own = (b"received", b"message-id")
    return [(name, value) for name, _, value in split if name.lower() not in own]


def squeezed(value: str | bytes) -> bytes:
    """Without white space, which folding may change."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    return re.sub(rb"[ \t\r\n]+", b"", value)


SENT = [b"From", b"Subject", b"Date"]


@pytest.mark.parametrize("action", ["addheader", "insheader"])
def test_header_values(bench: Bench, action: str) -> None:
    outcomes, _, head = one_message(Attempt(bench, action))
    found = fields(head)
    ours = {name: value for name, value in found if name not in SENT}
    assert [name for name, _ in found if name not in ours] == SENT
    assert len(found) == len(SENT) + len(ours)
    passed = [
        (f"X-{letter}{number}".encode(), values(action)[number])
        for number in range(COUNT)
        for how, letter in (("ctx", "C"), ("base", "B"))
        if outcomes[number, how] == "passed"
    ]
    # Each is put before the one that was put there last.
    assert list(ours) == [name for name, _ in passed[:: -1 if action == "insheader" else 1]]
    for name, value in passed:
        assert squeezed(ours[name]) == squeezed(value)


def test_header_names(bench: Bench) -> None:
    outcomes, _, head = one_message(Attempt(bench, "header name"))
    found = fields(head)[len(SENT) :]
    passed = [
        (number, letter)
        for number in range(COUNT)
        for how, letter in (("ctx", "c"), ("base", "b"))
        if outcomes[number, how] == "passed"
    ]
    assert [got.strip() for _, got in found] == [f"{c}{n}.".encode() for n, c in passed]
    for (name, _), (number, _) in zip(found, passed):
        assert squeezed(name) == squeezed(values("header name")[number])


def test_changed_header_values(bench: Bench) -> None:
    attempt = Attempt(bench, "chgheader")
    with attempt.connect() as smtp:
        for first in range(0, COUNT, CHANGES):
            names = [f"X-{way}{n}" for n in range(first, first + CHANGES) for way in "CB"]
            send(smtp, f"{first}@example.org", HEAD + changeable(names))
    outcomes = attempt.outcomes()
    delivered = bench.taken()
    assert len(delivered) == COUNT // CHANGES
    found = [each for _, content in delivered for each in fields(checked_head(content))]
    found = [each for each in found if each[0] not in SENT]
    for number, value in enumerate(values("chgheader")):
        for way, how in (("C", "ctx"), ("B", "base")):
            expected = value if outcomes[number, how] == "passed" else b"as sent"
            name = f"X-{way}{number}".encode()
            got = [squeezed(text) for known, text in found if known == name]
            # An empty value deletes.
            assert got == ([squeezed(expected)] if expected else []), value
    assert {name[:3] for name, _ in found} == {b"X-C", b"X-B"}


def test_names_of_headers_to_change(bench: Bench) -> None:
    attempt = Attempt(bench, "chgheader name")
    with attempt.connect() as smtp:
        for first in range(0, COUNT, CHANGES):
            send(smtp, f"{first}@example.org")
    outcomes = attempt.outcomes()
    delivered = bench.taken()
    assert len(delivered) == COUNT // CHANGES
    found = [each for _, content in delivered for each in fields(checked_head(content))]
    found = [(squeezed(value), squeezed(name)) for name, value in found if name not in SENT]
    passed = [n for n in range(COUNT) if outcomes[n, "base"] == "passed"]
    expected = {(f"n{n}.".encode(), squeezed(values("chgheader name")[n])) for n in passed}
    assert set(found) == expected
    # Both ways add one where Postfix does not find again what it has just added.
    assert all(found.count(each) in (1, 2) for each in expected)


def changeable(names: list[str]) -> bytes:
    return "".join(f"{name}: as sent\r\n" for name in names).encode()


def test_parameters_of_recipients(bench: Bench) -> None:
    outcomes, found, _ = one_message(Attempt(bench, "addrcpt parameters"))
    passed = {number for number, how in outcomes if outcomes[number, how] == "passed"}
    addresses = [address for address, _ in map(split, found)]
    assert len(set(addresses)) == len(addresses)
    possible = {f"<p{number}@example.org>" for number in passed}
    assert set(addresses) <= {"<bob@example.org>", *possible}
    # Of what can be said there nothing may change what the client has asked for.
    assert [params for address, params in map(split, found) if address[:2] != "<p" and params] == []


def split(recipient: str) -> tuple[str, str]:
    """The address, and what follows it."""
    # Quoted, an address may hold a bracket itself; those that we gave are not.
    part = str.partition if recipient.startswith("<p") else str.rpartition
    address, end, params = part(recipient, ">")
    assert address.startswith("<")
    return address + end, params.strip()


def test_recipients_to_delete(bench: Bench) -> None:
    _, found, _ = one_message(Attempt(bench, "delrcpt"))
    assert found == ["<bob@example.org>"]


def messages(attempt: Attempt) -> None:
    """A message for each value."""
    for first in range(0, COUNT, PER_CONNECTION):
        with attempt.connect() as smtp:
            for number in range(first, min(first + PER_CONNECTION, COUNT)):
                send(smtp, f"{number}@example.org")


def number_of(envelope: Any) -> int:
    """Which value it was: the client's recipient says so."""
    found = [re.fullmatch(r"<(\d+)@example\.org>", each) for each in envelope.recipients]
    (number,) = {int(each[1]) for each in found if each}
    return number


def test_recipients(bench: Bench) -> None:
    attempt = Attempt(bench, "addrcpt")
    messages(attempt)
    outcomes = attempt.outcomes()
    delivered = bench.taken()
    assert {number_of(envelope) for envelope, _ in delivered} == set(range(COUNT))
    assert len(delivered) == COUNT
    for envelope, content in delivered:
        checked_head(content)
        number = number_of(envelope)
        added = [one for one in envelope.recipients if one != f"<{number}@example.org>"]
        assert len(added) <= (outcomes[number, "base"] == "passed"), values("addrcpt")[number]
        # ORCPT is Postfix's own: the address as it was given, encoded.
        assert all(re.match(r"ORCPT=\S*$|$", split(one)[1]) for one in added)


@pytest.mark.parametrize("action", ["chgfrom", "chgfrom parameters"])
def test_senders(bench: Bench, action: str) -> None:
    attempt = Attempt(bench, action)
    messages(attempt)
    outcomes = attempt.outcomes()
    delivered = bench.taken()
    assert len(delivered) == COUNT
    assert {number_of(envelope) for envelope, _ in delivered} == set(range(COUNT))
    for envelope, content in delivered:
        checked_head(content)
        number = number_of(envelope)
        assert envelope.recipients == [f"<{number}@example.org>"]
        if outcomes[number, "base"] == "refused":
            assert envelope.sender == "<>"
        else:
            assert split(envelope.sender)[1] == "", values(action)[number]


def test_reasons_for_quarantine(bench: Bench) -> None:
    attempt = Attempt(bench, "quarantine")
    messages(attempt)
    outcomes = attempt.outcomes()
    passed = {number for number, how in outcomes if outcomes[number, how] == "passed"}
    held = bench.server.held()
    assert len(held) == len(passed)
    assert all("milter triggers HOLD action" in each.reason for each in held)
    assert {number_of(envelope) for envelope, _ in bench.taken()} == set(range(COUNT)) - passed
    # One line of the log for each: no reason makes another.
    entry = re.compile(r"\w{3} [ \d]\d [\d:]{8} mx postfix/[\w-]+\[\d+\]: ")
    assert [line for line in bench.server.log.split("\n") if line and not entry.match(line)] == []


@pytest.mark.parametrize(
    ("action", "before", "behind"),
    [
        ("setreply", b"", b""),
        ("setreply lines", b"first", b"last"),
        ("setreply code", None, None),
        ("setreply enhanced code", None, None),
    ],
)
def test_replies(bench: Bench, action: str, before: bytes | None, behind: bytes | None) -> None:
    attempt = Attempt(bench, action)
    replies = {}
    for first in range(0, COUNT, PER_CONNECTION):
        with attempt.connect() as smtp:
            smtp.mail("")
            for number in range(first, min(first + PER_CONNECTION, COUNT)):
                replies[number] = smtp.rcpt(f"{number}@example.org")
                # What one reply has too much would be taken for the answer to this.
                assert smtp.docmd("VRFY", "nobody")[0] == 252, values(action)[number]
    outcomes = attempt.outcomes()
    for number, value in enumerate(values(action)):
        code, text = replies[number]
        assert code == 550
        lines = [b"5.7.1 Command rejected"]
        if before is None or behind is None:  # nothing may follow a code
            assert outcomes[number, "base"] == "refused", value
        elif outcomes[number, "base"] == "passed":
            given = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
            given = given.replace(b"%%", b"%")  # as replies are written
            lines = [b"5.7.1 " + line for line in (before, given, behind) if line]
        assert [squeezed(line) for line in text.split(b"\n")] == [squeezed(line) for line in lines]
