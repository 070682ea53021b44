"""``run --access-log`` behind real MTAs: a line for each message, whatever becomes of it."""

from __future__ import annotations

import os
import re
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration import laboratory
from integration.laboratory import Bench
from integration.processes import WAIT, end, wait_until

MESSAGE = b"Subject: test\r\n\r\ntext\r\n"
FROM = "from=<alice@example.com>"
CLIENT = re.compile(r"client=\S*\[(IPv6:)?(127\.0\.0\.1|::1)\]")


@pytest.fixture(scope="module", params=["postfix", "sendmail"])
def serving(request: pytest.FixtureRequest, lab: laboratory.Laboratory) -> Iterator[Bench]:
    """An MTA whose filter is ``python -m Milter run``, in the place of that of the cases."""
    laboratory.require(request.param)
    made = lab.bench(request.param)
    behaviour = made.filter()
    behaviour.kill()
    command = [sys.executable, "-m", "Milter", "run"]
    command += [f"{Path(__file__).with_name('access_filter.py')}:Staged", "--mode", "0666"]
    command += ["--socket", behaviour.socket, "--access-log", str(made.base / "access")]
    with (made.base / "run.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until("it serves", lambda: b" serves on " in (made.base / "run.log").read_bytes())
        yield made
    finally:
        end(process)
        (made.base / "access").unlink()
        made.server.settle()
        made.taken()
        behaviour.restart()


@pytest.fixture
def bench(serving: Bench) -> Bench:
    """The same, with an empty access log."""
    os.truncate(serving.base / "access", 0)
    return serving


def lines(bench: Bench, count: int) -> list[str]:
    """The log, once it has so many lines, without time and process, client and milliseconds."""

    text = (bench.base / "access").read_text
    wait_until(f"{count} lines", lambda: text().count("\n") >= count)
    found = []
    for line in text().splitlines():
        shown = re.fullmatch(r"\S+ \[\d+\] (id=\S+ )(\S+ )(.*) ms=\d+\.\d{3}", line)
        assert shown is not None, line
        assert CLIENT.fullmatch(shown[2].strip()), line
        found.append(shown[1] + shown[3])
    assert len(found) == count, found
    return found


def smtp_to(bench: Bench) -> smtplib.SMTP:
    return smtplib.SMTP(*bench.server.addresses["unix"], timeout=WAIT)


def queued(bench: Bench, text: bytes) -> str:
    """The queue id of an MTA's reply to a message."""
    pattern = r"queued as (\S+)" if bench.mta == "postfix" else r"2\.0\.0 (\S+) Message accepted"
    found = re.search(pattern, text.decode())
    assert found is not None, text
    return found[1]


def send(smtp: smtplib.SMTP, sender: str, *recipients: str) -> list[tuple[int, bytes]]:
    """Send a message as far as that is allowed; returns the replies."""
    replies = [smtp.mail(f"{sender}@example.com")]
    if replies[-1][0] == 250:
        replies += [smtp.rcpt(each) for each in recipients or ("bob@example.org",)]
    if any(code == 250 for code, _ in replies[1:]):
        try:
            replies.append(smtp.data(MESSAGE))
        except smtplib.SMTPDataError as exc:
            replies.append((exc.smtp_code, bytes(exc.smtp_error)))
    if replies[-1][0] != 250:
        smtp.rset()
    return replies


def assert_refused(replies: list[tuple[int, bytes]], text: str) -> None:
    """The last reply is the filter's; sendmail puts the address before it at MAIL and RCPT."""
    code, said = replies[-1]
    assert (code, said.decode().endswith(text)) == (550, True), replies


def test_what_is_accepted(bench: Bench) -> None:
    """Several messages of a connection, each with its own queue id."""
    with smtp_to(bench) as smtp:
        smtp.ehlo("client.example")
        ids = [
            queued(bench, send(smtp, "alice", *recipients)[-1][1])
            for recipients in (
                ("bob@example.org",),
                ("gone@example.org", "bob@example.org", "copy@example.org"),
            )
        ]
    assert len(set(ids)) == 2
    ending = "verdict=accept stage=eom actions=addheader(X-Seen),delrcpt(<copy@example.org>)"
    assert lines(bench, 2) == [
        f"id={ids[0]} {FROM} to=<bob@example.org> {ending}",
        (
            f"id={ids[1]} {FROM} to=<bob@example.org>,<copy@example.org> "
            f'refused="<gone@example.org> (550 5.1.1 no such user)" {ending}'
        ),
    ]


def test_what_is_refused_at_each_stage(bench: Bench) -> None:
    """One message after another in one connection; what was no message has no line."""
    stages = ["mail", "data", "header", "eoh", "body", "eom"]
    with smtp_to(bench) as smtp:
        assert smtp.ehlo("rejected.example")[0] in (250, 550)
        assert smtp.mail("alice@example.com")[0] == 550
    with smtp_to(bench) as smtp:
        smtp.ehlo("client.example")
        for stage in stages:
            assert_refused(send(smtp, f"reject-{stage}"), f"not at {stage}")
        assert send(smtp, "later-eom")[-1][0] == 451
        assert send(smtp, "drop-eoh")[-1][0] == 250
        assert_refused(send(smtp, "alice", "gone@example.org"), "no such user")
        assert_refused(send(smtp, "reject-rcpt"), "not at rcpt")
    found = lines(bench, len(stages) + 4)
    shown = [re.sub(r"id=\S+ ", "", line) for line in found]
    recipient = {"mail": "-"}
    to = "to=<bob@example.org>"
    seen = "actions=addheader(X-Seen),delrcpt(<copy@example.org>)"
    assert shown[:6] == [
        f"from=<reject-{stage}@example.com> to={recipient.get(stage, '<bob@example.org>')} "
        f'verdict=reject stage={name} reply="550 5.7.1 not at {stage}"'
        + (f" {seen}" if stage == "eom" else "")
        for stage, name in zip(stages, ["envfrom", *stages[1:]])
    ]
    assert shown[6:] == [
        f"from=<later-eom@example.com> {to} verdict=tempfail stage=eom {seen}",
        f"from=<drop-eoh@example.com> {to} verdict=discard stage=eoh",
        (
            f'{FROM} to=- refused="<gone@example.org> (550 5.1.1 no such user)" '
            "verdict=abort stage=abort"
        ),
        (
            "from=<reject-rcpt@example.com> to=- "
            'refused="<bob@example.org> (550 5.7.1 not at rcpt)" '
            "verdict=abort stage=abort"
        ),
    ]


def test_what_is_aborted(bench: Bench) -> None:
    """By the client: with RSET, by hanging up before the message and in the midst of it."""
    with smtp_to(bench) as smtp:
        smtp.ehlo("client.example")
        smtp.mail("one@example.com")
        smtp.rcpt("bob@example.org")
        smtp.rset()
        smtp.mail("two@example.com")
        smtp.rcpt("bob@example.org")
    with smtp_to(bench) as smtp:
        smtp.ehlo("client.example")
        smtp.mail("three@example.com")
        smtp.rcpt("bob@example.org")
        assert smtp.docmd("DATA")[0] == 354
        smtp.send(b"Subject: te")
        smtp.close()
    found = lines(bench, 3)
    for sender, line in zip(("one", "two", "three"), found):
        assert re.fullmatch(
            rf"id=\S+ from=<{sender}@example\.com> to=<bob@example\.org> verdict=abort "
            r"stage=(abort|close)",
            line,
        ), found
