"""Filters as processes of their own, and how long a test waits for anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from Milter.mta import MTA, FilterUnreachable

FILTERS = Path(__file__).with_name("filters")
# Seconds: the bound of every wait, far above what a loaded machine needs; more of them where
# filters run under a tool that slows them down.
WAIT = 20.0 * float(os.environ.get("TEST_PATIENCE", "1"))


def python_command() -> list[str]:
    """This interpreter with the options that the tests themselves run under."""
    options = ["-X", "dev"] if sys.flags.dev_mode else []
    # pytest turns warnings into errors within its own process; only -W goes to children.
    for option in sys.warnoptions:
        options += ["-W", option]
    return [sys.executable, *options]


class Filter:
    """A filter that runs as a process of its own.

    ``socket``: where it listens, in libmilter's form.  ``output``: what it wrote to
    standard output and standard error so far, without what every filter is told that runs as
    root, as tests may; ``all_output`` is with that.
    """

    def __init__(self, command: list[str], socket_name: str, env: dict[str, str]) -> None:
        self.socket = socket_name
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                with self._news:
                    self._lines.append(line.decode(errors="backslashreplace").rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._lines.append("")  # the end, so that waiters look again
            self._news.notify_all()

    @property
    def output(self) -> str:
        lines = self.all_output.split("\n")
        return "\n".join(line for line in lines if "the filter runs as root" not in line)

    @property
    def all_output(self) -> str:
        with self._news:
            return "\n".join(self._lines)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, text: str, count: int = 1) -> str:
        """Wait until a line that holds `text` was written `count` times; returns the last."""
        deadline = time.monotonic() + WAIT
        with self._news:
            while True:
                found = [line for line in self._lines if text in line]
                if len(found) >= count:
                    return found[count - 1]
                left = deadline - time.monotonic()
                if left <= 0 or (self._lines and self._lines[-1] == "" and not self._alive()):
                    raise AssertionError(f"no line with {text!r} in:\n" + "\n".join(self._lines))
                self._news.wait(min(left, 0.2))

    def _alive(self) -> bool:
        return self.process.poll() is None

    def mta(self, wait_for: float = WAIT, **options: Any) -> MTA:
        """A connection to the filter, which may still be starting.

        Where it cannot be reached, the error has what it wrote; it is not waited for once it died.
        """
        options.setdefault("timeout", WAIT)
        began = time.monotonic()
        deadline = began + wait_for
        while True:
            ended = not self._alive()
            left = 0.0 if ended else max(0.0, deadline - time.monotonic())
            try:
                return MTA.connect(self.socket, wait_for=min(left, 0.5), **options)
            except FilterUnreachable as error:
                if left > 0.5:
                    continue
                state = f"has ended with {self.process.poll()}" if ended else "runs"
                raise FilterUnreachable(
                    f"{error}; after {time.monotonic() - began:.1f} s the filter {state}, and has "
                    f"written:\n{self.output}"
                ) from error

    def wait(self, timeout: float = WAIT) -> int:
        """Wait until the process has ended; returns its exit status."""
        status = self.process.wait(timeout)
        self._reader.join(WAIT)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the filter as an administrator would; returns its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        if self._alive():
            self.process.kill()
        self.wait()
