"""A filter that waits, on Postfix: many sessions at a time, and a stop amid them."""

from __future__ import annotations

import signal
import smtplib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest
from integration import laboratory
from integration.laboratory import Bench
from integration.processes import WAIT
from support.process import Filter

SESSIONS = 50
WAITING = 0.4  # seconds for a message: 0.2 at RCPT and at its end
MOST = 5.0  # for all of them at a time; one after the other they would take 20


@pytest.fixture(params=["postfix"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    laboratory.require(request.param)
    made = Bench(request.param)
    yield made
    made.close()


@pytest.fixture
def pausing(bench: Bench, run_filter: Callable[..., Filter]) -> Filter:
    """The filter, which listens where the MTA looks for it."""
    socket = f"unix:{bench.base}/filter.sock"
    options = {"socket_mode": 0o666, "drain_timeout": 20}
    running: Filter = run_filter("coroutines", "Pausing", repr(options), socket=socket)
    running.mta().close()
    return running


def open_session(bench: Bench) -> smtplib.SMTP:
    smtp = smtplib.SMTP(*bench.server.addresses["unix"], timeout=WAIT)
    smtp.ehlo("client.example")
    return smtp


def send(smtp: smtplib.SMTP, number: int) -> int:
    """Send a message; the last reply's code, 0 where the MTA hung up."""
    try:
        for code, _ in (
            smtp.mail(f"sender{number}@example.com"),
            smtp.rcpt("bob@example.org"),
        ):
            if code != 250:
                return code
        text = f"From: sender{number}@example.com\r\nX-Number: {number}\r\n\r\nBody.\r\n"
        return smtp.data(text)[0]
    except smtplib.SMTPResponseException as error:
        return error.smtp_code
    except smtplib.SMTPServerDisconnected:
        return 0


def delivered(bench: Bench) -> dict[str, bytes]:
    bench.server.settle()
    return {envelope.sender.strip("<>"): content for envelope, content in bench.taken()}


def sessions(bench: Bench, pool: ThreadPoolExecutor) -> list[smtplib.SMTP]:
    return list(pool.map(lambda _: open_session(bench), range(SESSIONS)))


def test_many_wait_at_a_time(bench: Bench, pausing: Filter) -> None:
    with ThreadPoolExecutor(SESSIONS) as pool:
        opened = sessions(bench, pool)
        began = time.monotonic()
        codes = list(pool.map(send, opened, range(SESSIONS)))
        took = time.monotonic() - began
        for smtp in opened:
            smtp.close()
    assert codes == [250] * SESSIONS
    assert WAITING <= took < MOST
    together = int(pausing.wait_for("together: ", SESSIONS).rpartition(" ")[2])
    assert together > SESSIONS / 2
    print(f"{SESSIONS} messages in {took:.2f} s, {together} at a time", file=sys.stderr)
    found = delivered(bench)
    assert sorted(found) == sorted(f"sender{number}@example.com" for number in range(SESSIONS))
    assert all(b"X-Paused: twice" in content for content in found.values())
    assert pausing.stop() == 0


def test_a_stop_amid_them_loses_none(bench: Bench, pausing: Filter) -> None:
    """Each message is delivered, or its client told to come again; none is both or neither."""
    results: Any
    with ThreadPoolExecutor(SESSIONS) as pool:
        opened = sessions(bench, pool)
        results = pool.map(send, opened, range(SESSIONS))
        pausing.wait_for("waits", SESSIONS // 2)
        pausing.process.send_signal(signal.SIGTERM)
        codes = list(results)
        for smtp in opened:
            smtp.close()
    assert pausing.wait() == 0
    assert all(code == 250 or code // 100 == 4 or code == 0 for code in codes), codes
    accepted = [f"sender{number}@example.com" for number, code in enumerate(codes) if code == 250]
    assert len(accepted) >= SESSIONS // 2 - 1
    found = delivered(bench)
    assert sorted(found) == sorted(accepted)
    assert all(b"X-Paused: twice" in content for content in found.values())
    assert "exception" not in pausing.output
