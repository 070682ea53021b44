"""A filter that is killed, stopped and reloaded while mail comes from all sides.

What the client was told is true: a message that was accepted arrives once, with one stamp; one that
was not does not arrive.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import smtplib
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from integration import laboratory
from integration.laboratory import Bench
from integration.processes import WAIT, end, wait_until

MESSAGES = 25  # of each client
DISTURBANCES = 5
PATIENCE = 90.0  # seconds: until a client's message must have been accepted


class Run:
    """``python -m Milter run`` on the bench's socket."""

    def __init__(self, bench: Bench, engine: str, workers: int, descriptors: int) -> None:
        self._command = [sys.executable, "-m", "Milter", "run"]
        self._command += [f"{Path(__file__).with_name('stamping.py')}:Stamp"]
        self._command += ["--socket", f"unix:{bench.base}/filter.sock", "--engine", engine]
        self._command += ["--mode", "0666"]  # Postfix connects as a user of its own
        self._command += ["--workers", str(workers)] * (workers > 1)
        self._descriptors = descriptors
        self.log = bench.base / "run.log"

    def start(self) -> None:
        def limit() -> None:
            if self._descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self._descriptors, self._descriptors))

        before = self._said()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=limit,
            )
        self._wait_for_more(before)

    def _said(self) -> int:
        """How often it has said that it serves."""
        return self.log.read_bytes().count(b" serves on ") if self.log.exists() else 0

    def _wait_for_more(self, before: int) -> None:
        def serves() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self._said() > before

        try:
            wait_until("the filter serves", serves)
        except TimeoutError:
            pytest.fail(f"it does not serve:\n{self.log.read_text()}")

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    # --- what happens to it

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WAIT)
        self.start()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WAIT) == 0, self.log.read_text()
        self.start()

    def reload(self) -> None:
        before = self._said()
        self.process.send_signal(signal.SIGHUP)
        self._wait_for_more(before)

    def kill_a_worker(self) -> None:
        workers = self.workers()
        os.kill(random.choice(workers), signal.SIGKILL)
        wait_until("it is replaced", lambda: len(self.workers()) == len(workers))

    def nothing(self) -> None:
        pass


class Clients:
    """So many, each of which sends one message after another, a connection for each."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self._address = address
        self._count = count
        self._lock = threading.Condition()
        self.accepted = 0
        self.put_off = 0

    def __enter__(self) -> Clients:
        self._pool = ThreadPoolExecutor(self._count)
        self._done = [self._pool.submit(self._send_all, number) for number in range(self._count)]
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
        for each in self._done:
            each.result()

    def wait_for(self, accepted: int) -> None:
        with self._lock:
            assert self._lock.wait_for(lambda: self.accepted >= accepted, PATIENCE)

    def _send_all(self, number: int) -> None:
        for count in range(MESSAGES):
            self._send(f"{number}-{count}")

    def _send(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        message = f"Subject: load\r\nX-Name: {name}\r\n\r\ntext\r\n"
        while True:
            assert time.monotonic() < deadline, f"{name} is not accepted"
            try:
                with smtplib.SMTP(*self._address, timeout=PATIENCE) as smtp:
                    smtp.sendmail("alice@example.com", ["bob@example.org"], message)
            except smtplib.SMTPRecipientsRefused as exc:
                assert all(400 <= code < 500 for code, _ in exc.recipients.values()), exc
            except smtplib.SMTPResponseException as exc:
                assert 400 <= exc.smtp_code < 500, exc
            else:
                with self._lock:
                    self.accepted += 1
                    self._lock.notify_all()
                return
            with self._lock:
                self.put_off += 1
                self._lock.wait(0.05)  # a while, as an MTA would


@contextlib.contextmanager
def running(bench: Bench, engine: str, workers: int, descriptors: int) -> Iterator[Run]:
    made = Run(bench, engine, workers, descriptors)
    try:
        made.start()
        yield made
    finally:
        end(made.process)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["libmilter", "native"])
@pytest.mark.parametrize(
    ("what", "workers", "clients", "descriptors"),
    [
        (Run.kill, 1, 6, 0),
        (Run.terminate, 1, 6, 0),
        (Run.terminate, 2, 6, 0),
        (Run.reload, 1, 6, 0),
        (Run.reload, 2, 6, 0),
        (Run.kill_a_worker, 2, 6, 0),
        (Run.nothing, 1, 70, 64),
    ],
    ids=["kill", "term", "term-2", "hup", "hup-2", "kill-worker", "descriptors"],
)
def test_what_is_accepted_arrives_once(
    what: Callable[[Run], None], workers: int, clients: int, descriptors: int, engine: str
) -> None:
    laboratory.require("postfix")
    with contextlib.closing(Bench("postfix")) as bench:
        with running(bench, engine, workers, descriptors) as filter_:
            with Clients(bench.server.addresses["unix"], clients) as senders:
                steps = clients * MESSAGES // (DISTURBANCES + 1)
                for count in range(1, DISTURBANCES + 1):
                    senders.wait_for(count * steps)
                    what(filter_)
            bench.server.settle()
            arrived = bench.taken()
        if what in (Run.reload, Run.nothing):
            assert senders.put_off == 0, filter_.log.read_text()
    names: Counter[str] = Counter()
    for _, content in arrived:
        headers = content.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        (name,) = (line for line in headers if line.startswith("X-Name: "))
        names[name] += 1
        assert sum(line.startswith("X-Stamp: ") for line in headers) == 1, content
    wanted = {f"X-Name: {number}-{count}" for number in range(clients) for count in range(MESSAGES)}
    assert set(names) == wanted
    assert set(names.values()) == {1}
