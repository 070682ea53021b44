"""Processes that the cases need: started in sessions of their own, ended by process group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds: the bound of every wait, far above what a loaded machine needs.
WAIT = float(os.environ.get("PYMILTER_TEST_WAIT", "30"))


def wait_until(what: str, condition: Callable[[], Any], timeout: float = WAIT) -> Any:
    """Poll *condition* until it holds; its value.  For what gives no other notice."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(0.005)
    return value


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def has_ipv6() -> bool:
    try:
        free_port("::1")
    except OSError:
        return False
    return True


def end(process: subprocess.Popen[bytes], grace: float = 10.0) -> None:
    """End a process and all of its group: SIGTERM, then SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(grace)


def _accepts(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


class CaseFilter:
    """A running ``case_filter.py``."""

    def __init__(self, socket_name: str, python: str = sys.executable) -> None:
        self.socket = socket_name
        self._runs = 0
        self._python = python
        self._news = threading.Condition()
        self._events: list[list[Any]] = []
        self._ended = False
        self.log: list[str] = []
        self._start()

    def _start(self) -> None:
        script = Path(__file__).with_name("case_filter.py")
        self.process = subprocess.Popen(
            [self._python, str(script), self.socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0,  # the MTAs connect as users of their own
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                with self._news:
                    if line.startswith(b"["):
                        self._events.append(json.loads(line))
                    else:
                        self.log.append(line.decode(errors="backslashreplace").rstrip())
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _wait(self, what: str, condition: Callable[[], Any], timeout: float = WAIT) -> None:
        with self._news:
            done = self._news.wait_for(lambda: self._ended or condition(), timeout)
            if not done or not condition():
                raise TimeoutError(f"{what}; the filter said:\n{self._story()}")

    def _story(self) -> str:
        return "\n".join([*map(str, self._events[-40:]), *self.log[-40:]])

    def select(self, name: str) -> str:
        """Take up the case *name*; returns the mark of what happens in this run."""
        self._runs += 1
        run = f"run{self._runs}"
        with self._news:
            self._events.clear()
            self.log.clear()
        assert self.process.stdin is not None
        self.process.stdin.write(f"{run} {name}\n".encode())
        self.process.stdin.flush()
        self._wait("the filter does not take up the case", lambda: self._of(run, "ready"))
        return run

    def _of(self, run: str, name: str) -> list[list[Any]]:
        return [event for event in self._events if event[0] == run and event[2] == name]

    def wait_for(self, run: str, name: str, count: int = 1) -> None:
        """Wait until callback *name* has been called *count* times."""
        self._wait(f"no {count} times {name}", lambda: len(self._of(run, name)) >= count)

    def finish(self, run: str, connections: int) -> list[list[Any]]:
        """Wait until so many connections were closed.

        Returns what happened: the connection's number, whether the verdict has ended the message,
        the callback, its arguments.
        """
        self._wait(
            f"not {connections} connections closed",
            lambda: len(self._of(run, "close")) >= connections,
        )
        with self._news:
            events = [e for e in self._events if e[0] == run and e[2] != "ready"]
        return _with_ends(events)

    def listens(self) -> bool:
        """Whether its socket takes connections."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the filter has ended:\n{self._story()}")
        kind, _, rest = self.socket.partition(":")
        if kind == "unix":
            return _accepts(socket.AF_UNIX, rest)
        port, _, host = rest.partition("@")
        family = socket.AF_INET6 if kind == "inet6" else socket.AF_INET
        return _accepts(family, (host.strip("[]"), int(port)))

    def restart(self) -> None:
        self._start()
        wait_until("the filter listens", self.listens)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WAIT)
        self._close_input()
        self._thread.join(WAIT)

    def _close_input(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def stop(self) -> None:
        self._close_input()
        end(self.process)
        self._thread.join(WAIT)


def _with_ends(events: list[list[Any]]) -> list[list[Any]]:
    seen: list[list[Any]] = []
    for _, connection, name, *rest in events:
        if name == "over":
            last = next(event for event in reversed(seen) if event[0] == connection)
            last[1] = True
        else:
            seen.append([connection, False, name, *rest])
    return seen
