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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from integration import laboratory
from integration.laboratory import Bench
from integration.processes import WAIT, end, wait_until
from support import faults

MESSAGES = 25  # of each client
DISTURBANCES = 5
PATIENCE = 90.0  # seconds: until a client's message must have been accepted


class Run:
    """``python -m Milter run`` on the bench's socket."""

    def __init__(
        self,
        bench: Bench,
        engine: str,
        workers: int = 1,
        descriptors: int = 0,
        filter_: str = "Stamp",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", "Milter", "run"]
        self._command += [f"{Path(__file__).with_name('stamping.py')}:{filter_}"]
        self._command += ["--socket", f"unix:{bench.base}/filter.sock", "--engine", engine]
        self._command += ["--mode", "0666"]  # Postfix connects as a user of its own
        self._command += ["--workers", str(workers)] * (workers > 1)
        self._descriptors = descriptors
        self._env = {**os.environ, **(env or {})}
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
                env=self._env,
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

    def __init__(self, address: tuple[str, int], count: int, messages: int = MESSAGES) -> None:
        self._address = address
        self._count = count
        self._messages = messages
        self._lock = threading.Condition()
        self.names = {f"{each}-{number}" for each in range(count) for number in range(messages)}
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
        for count in range(self._messages):
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
def running(made: Run) -> Iterator[Run]:
    try:
        made.start()
        yield made
    finally:
        end(made.process)


def arrived_once(arrived: list[Any], senders: Clients) -> None:
    """All that the clients sent is there, and nothing else, with one stamp each."""
    names: Counter[str] = Counter()
    for _, content in arrived:
        headers = content.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        (name,) = (line for line in headers if line.startswith("X-Name: "))
        names[name] += 1
        assert sum(line.startswith("X-Stamp: ") for line in headers) == 1, content
    assert set(names) == {f"X-Name: {name}" for name in senders.names}
    assert set(names.values()) == {1}


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
        with running(Run(bench, engine, workers, descriptors)) as filter_:
            with Clients(bench.server.addresses["unix"], clients) as senders:
                steps = clients * MESSAGES // (DISTURBANCES + 1)
                for count in range(1, DISTURBANCES + 1):
                    senders.wait_for(count * steps)
                    what(filter_)
            bench.server.settle()
            arrived = bench.taken()
        if what in (Run.reload, Run.nothing):
            assert senders.put_off == 0, filter_.log.read_text()
    arrived_once(arrived, senders)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not faults.possible(), reason="system calls cannot be made to fail here")
@pytest.mark.parametrize(
    ("engine", "listener", "failing"),
    [("libmilter", "impatient", 6), ("native", "unix", faults.ALWAYS)],
)
def test_what_is_accepted_while_no_thread_starts_arrives_once(
    engine: str, listener: str, failing: int, tmp_path: Path
) -> None:
    """Each callback takes its time, so that more threads are wanted than there are.

    libmilter never answers a connection for which it could not create one: the client is told 451
    when Postfix's patience ends.
    """
    laboratory.require("postfix")
    faulty = faults.Faults(tmp_path)
    faulty.env.pop("PYTHONMALLOC", None)
    with contextlib.closing(Bench("postfix")) as bench:
        address = bench.server.addresses[listener]
        with running(Run(bench, engine, filter_="Slow", env=faulty.env)) as filter_:
            with Clients(address, 1, messages=1):
                pass  # what the engine starts with is there
            bench.server.settle()
            bench.taken()
            failures = faulty.failing(faults.THREADS, 1, failing)
            with failures, Clients(address, 6, messages=3) as senders:
                pass
            assert faulty.seen > 0
            bench.server.settle()
            arrived = bench.taken()
        if engine == "native":
            assert senders.put_off == 0, filter_.log.read_text()
    arrived_once(arrived, senders)
