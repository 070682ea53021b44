"""What the tests of a filter's life share: holding a callback, waiting, looking at a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from Milter.mta import MTA, MTAError, Result
from support.process import WAIT

MESSAGE = b"Subject: hello\r\n\r\nbody\r\n"
RECIPIENTS = ["<r@example.com>"]
NOBODY = 65534

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="only root can become another user, into whose processes LeakSanitizer may not look",
)
#: Options of a filter that runs as whoever runs the tests, and as somebody without privileges:
#: only there libmilter itself removes sockets.
USERS = [
    pytest.param((), id="self"),
    pytest.param(("--uid", str(NOBODY)), marks=as_root, id="user"),
]


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll for something that the filter cannot tell of itself."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def path_of(socket_name: str) -> str:
    return socket_name.partition(":")[2]


def gone(socket_name: str) -> None:
    """Wait until a filter on a unix socket listens no more."""
    wait_until(lambda: not os.path.exists(path_of(socket_name)), "the filter still listens")


def there(socket_name: str) -> None:
    """Wait until a filter has made its unix socket."""
    wait_until(lambda: os.path.exists(path_of(socket_name)), "the filter does not listen")


def bits(value: str) -> set[int]:
    number = int(value, 16)
    return {n for n in range(1, 65) if number >> (n - 1) & 1}


def signal_set(pid: int, kind: str) -> set[int]:
    """One of the signal sets of a process: SigBlk, SigIgn or SigCgt."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(rf"^{kind}:\s*(\w+)", status, re.MULTILINE)
    assert found is not None
    return bits(found[1])


def passes(filter_: Any) -> Result:
    """The filter works: it takes a message."""
    with filter_.mta() as mta:
        result: Result = mta.send(MESSAGE, recipients=RECIPIENTS)
    assert result.message["X-Stamp"] == "before"
    assert result.message["Subject"] == "changed"
    assert [r.address for r in result.recipients] == ["r@example.com", "added@example.com"]
    assert result.message.body == b"new body\r\n"
    return result


def idle(filter_: Any) -> Any:
    """Wait until the filter has taken a message and nothing is under way."""
    passes(filter_)
    filter_.wait_for("in close")
    return filter_


def end(filter_: Any, number: int = signal.SIGTERM) -> float:
    """Stop a filter; returns how long its process took to end, in seconds."""
    begin = time.monotonic()
    os.kill(filter_.pid, number)
    filter_.process.wait(WAIT)
    took = time.monotonic() - begin
    filter_.wait()
    return took


class Sending:
    """A message on its way, sent by a thread of its own."""

    def __init__(self, mta: MTA, message: bytes = MESSAGE) -> None:
        self._outcome: Result | Exception | None = None

        def work() -> None:
            try:
                self._outcome = mta.send(message, recipients=RECIPIENTS)
            except (MTAError, OSError, AssertionError) as exc:
                self._outcome = exc

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def outcome(self) -> Result | Exception:
        """What became of the message, or what was raised."""
        self._thread.join(WAIT)
        assert self._outcome is not None, "the filter has not answered"
        return self._outcome

    def result(self) -> Result:
        outcome = self.outcome()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def at_once(took: float) -> bool:
    """Whether an idle filter stopped as fast as it has to: in half a second.

    Where more than the processors can do is going on, or the filter runs under a tool that slows it
    down, it only has to be faster than libmilter itself, which takes up to five seconds.
    """
    if "TEST_PATIENCE" in os.environ:
        return took < 4.5
    busy = os.getloadavg()[0] > 1.25 * (os.cpu_count() or 1)
    return took < (2.5 if busy else 0.5)


class Held:
    """A callback of a filter that waits in a FIFO until the test lets it go on."""

    def __init__(self, directory: Path, callback: str) -> None:
        path = directory / f"{callback}.fifo"
        os.mkfifo(path)
        # Open for both: neither side waits for the other to come.
        self._fifo = os.open(path, os.O_RDWR)
        self.options = ("--at", callback, f"hold:{path}")

    def release(self) -> None:
        """Let one callback go on."""
        os.write(self._fifo, b"!")

    def close(self) -> None:
        os.close(self._fifo)


@contextlib.contextmanager
def busy_listener(path: Path) -> Iterator[None]:
    """A socket on which somebody listens who accepts nobody, with as many before it as may be."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen(0)
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        yield
