"""A filter that is killed in the middle of a message: what the MTA does, and what comes after."""

from __future__ import annotations

import os
import smtplib
from collections.abc import Iterator

import pytest
from integration import laboratory
from integration.case import HEADERS, MESSAGE
from integration.laboratory import Bench
from integration.processes import WAIT, wait_until
from integration.sink import as_mail

MTAS = ("postfix", "sendmail")

# What the client is told when the filter dies before it has answered, by the default action.
REFUSALS = {
    ("postfix", "unix"): "451",  # tempfail
    ("sendmail", "unix"): "451",  # F=T
    ("postfix", "reject"): "550",
    ("sendmail", "reject"): "554",  # F=R
}


@pytest.fixture(params=MTAS)
def bench(request: pytest.FixtureRequest, lab: laboratory.Laboratory) -> Iterator[Bench]:
    """An MTA whose filter waits at end of headers until it is killed."""
    laboratory.require(request.param)
    made = lab.bench(request.param)
    made.filter().select("a filter that waits at end of headers")
    yield made
    if made.filter().process.poll() is not None:
        made.filter().restart()


def send_and_kill(bench: Bench, port: str) -> tuple[int, str]:
    """Send a message, kill the filter while it has it; the reply to the client."""
    behaviour = bench.filter()
    run = behaviour.select("a filter that waits at end of headers")
    bench.taken()
    with smtplib.SMTP(*bench.server.addresses[port], timeout=WAIT) as smtp:
        smtp.ehlo("client.example")
        smtp.mail("alice@example.com")
        smtp.rcpt("bob@example.org")
        assert smtp.docmd("DATA")[0] == 354
        smtp.send(MESSAGE + b".\r\n")
        behaviour.wait_for(run, "eoh")
        behaviour.kill()
        code, text = smtp.getreply()
    return code, text.decode()


def deliver(bench: Bench, port: str) -> None:
    """The next message goes through the filter, started again, and is changed by it."""
    behaviour = bench.filter()
    behaviour.restart()
    run = behaviour.select("addheader appends")
    with smtplib.SMTP(*bench.server.addresses[port], timeout=WAIT) as smtp:
        smtp.ehlo("client.example")
        assert smtp.sendmail("alice@example.com", ["bob@example.org"], MESSAGE) == {}
    behaviour.finish(run, 1)
    bench.server.settle()
    (kept,) = bench.taken()
    assert as_mail(*kept, False).headers == (*HEADERS, "X-New: one", "X-Other: two")


@pytest.mark.parametrize("port", ["unix", "reject"])
def test_refused_and_not_delivered(bench: Bench, port: str) -> None:
    """tempfail and reject: the client keeps the message; it tries again after the restart."""
    code, text = send_and_kill(bench, port)
    assert str(code) == REFUSALS[bench.mta, port], text
    bench.server.settle()
    assert bench.taken() == []
    assert bench.server.held() == []
    deliver(bench, port)


def test_accepted_and_delivered_as_it_is(bench: Bench) -> None:
    """accept: the message goes on without the filter, unchanged."""
    code, text = send_and_kill(bench, "accept")
    assert code == 250, text
    bench.server.settle()
    (kept,) = bench.taken()
    mail = as_mail(*kept, False)
    assert mail.headers == HEADERS
    assert mail.recipients == ("<bob@example.org>",)
    deliver(bench, "accept")


def test_accepted_and_held(bench: Bench) -> None:
    """quarantine (Postfix): the message is accepted and held; F=4 (sendmail): 421, hang up."""
    code, text = send_and_kill(bench, "quarantine")
    bench.server.settle()
    assert bench.taken() == []
    held = bench.server.held()
    if bench.mta == "postfix":
        assert code == 250, text
        assert [one.sender for one in held] == ["alice@example.com"]
    else:
        assert code == 421, text
        assert held == []
    deliver(bench, "quarantine")


def test_killed_between_messages(bench: Bench) -> None:
    """One that dies while nothing is under way: the session is tempfailed, the next one served."""
    behaviour = bench.filter()
    run = behaviour.select("addheader appends")
    bench.taken()
    with smtplib.SMTP(*bench.server.addresses["unix"], timeout=WAIT) as smtp:
        smtp.ehlo("client.example")
        assert smtp.sendmail("alice@example.com", ["bob@example.org"], MESSAGE) == {}
        behaviour.wait_for(run, "eom")
        behaviour.kill()
        assert smtp.mail("alice@example.com")[0] == 451
    bench.server.settle()
    assert len(bench.taken()) == 1
    deliver(bench, "unix")


def test_no_filter_at_all(bench: Bench) -> None:
    """Nobody listens: the client is put off, and served once the filter is there."""
    bench.filter().kill()
    os.unlink(bench.filter().socket.partition(":")[2])
    bench.taken()
    with smtplib.SMTP(*bench.server.addresses["unix"], timeout=WAIT) as smtp:
        smtp.ehlo("client.example")
        assert smtp.mail("alice@example.com")[0] == 451
    deliver(bench, "unix")


def test_nothing_is_left_running(bench: Bench) -> None:
    """What the fixtures end is gone with all of its group."""
    made = Bench(bench.mta)
    made.filter()
    groups = [made.server.process.pid, made.filter().process.pid]
    made.close()
    wait_until("the processes have ended", lambda: not any(map(_alive, groups)))
    assert not made.base.exists()


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
