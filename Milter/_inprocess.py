"""A filter that runs in the process of the tests, for debuggers: see ``Milter.pytest_plugin``."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import Milter

from ._app import WAIT, MilterApp, running
from ._cli.common import CommandError, load_filter
from .mta import MTA, FilterUnreachable

if TYPE_CHECKING:
    from ._app import FilterLike
    from .mta import Result

#: How long the MTA waits for an answer, in seconds: a person may look at the filter meanwhile.
PATIENCE = 3600.0


class InProcessApp(MilterApp):
    """A filter that runs in a thread of this process, on the engine ``native``.

    It is one at a time: a process has one ``Milter.factory`` and one socket of the MTA. What the
    filter writes is this process's output, so ``output`` is empty.
    """

    serving: InProcessApp | None = None  # the one that does

    def __init__(
        self, filter: FilterLike, *, socket: str = "unix", timeout: float = PATIENCE
    ) -> None:
        """Start the filter and wait until it listens.

        Args:
            filter: a filter class, a filter of ``Milter.mailfilter``, or ``"module:Class"``.
            socket: as ``MilterApp`` takes it.
            timeout: the bound of the MTA's waits, in seconds.

        Raises:
            RuntimeError: another one serves in this process, or this one cannot.
            TypeError, ValueError: the filter or the socket is none of these.
            TimeoutError: it does not listen in time.
        """
        if InProcessApp.serving is not None:
            raise RuntimeError(
                f"{InProcessApp.serving.name} serves in this process: one filter at a time can"
            )
        made: Any = filter
        if isinstance(filter, (str, os.PathLike)):
            if not can_serve(filter):
                raise ValueError(f"filter {filter!r}: in this process only a class or function can")
            try:
                made = load_filter(os.fspath(filter))
            except CommandError as exc:
                raise ValueError(f"filter {filter!r}: {exc}") from exc
        self._timeout = timeout
        self._directory = tempfile.TemporaryDirectory(prefix="milter-")
        self._stopped = False
        self.name = made.__name__
        self.results: deque[Result] = deque(maxlen=5)
        self._failure: BaseException | None = None
        self._factory, Milter.factory = Milter.factory, made
        try:
            self.socket = self._address(socket)
            self._thread = threading.Thread(target=self._serve, name=f"filter {self.name}")
            self._thread.daemon = True
            self._thread.start()
            InProcessApp.serving = self
            running.append(self)
            self._wait_until_it_serves()
        except BaseException:
            self.kill()
            raise

    def __repr__(self) -> str:
        return f"<InProcessApp {self.name} at {self.socket}>"

    @property
    def pid(self) -> int:
        """The number of this process."""
        return os.getpid()

    @property
    def output(self) -> str:
        """Nothing: what the filter writes is this process's own output."""
        return ""

    def mta(self, **options: Any) -> MTA:
        """Connect to the filter as an MTA; see ``MilterApp.mta``."""
        options.setdefault("total_timeout", self._timeout)
        return super().mta(**options)

    def wait_for_output(self, text: str, count: int = 1, timeout: float | None = None) -> str:
        """Cannot be: what the filter writes is this process's own output.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{self.name} runs in this process, and its output is this process's own: use "
            "capfd or caplog, or leave in_process out"
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the filter as ``Milter.stop()`` does.

        Args:
            number: is not looked at, as a signal would be this process's.

        Returns:
            0.

        Raises:
            RuntimeError: it could not serve, or could not go on.
            TimeoutError: a callback does not return.
        """
        self.kill()
        if self._failure is not None:
            raise RuntimeError(f"{self.name} could not go on: {self._failure}") from self._failure
        return 0

    def kill(self) -> None:
        """Stop the filter; a thread cannot be ended without asking.

        Raises:
            TimeoutError: a callback does not return.
        """
        if not self._stopped:
            self._stopped = True
            if self._thread.is_alive():
                Milter.stop()
            self._thread.join(WAIT)
        if self in running:
            running.remove(self)
        Milter.factory = self._factory
        self._directory.cleanup()
        if self._thread.is_alive():
            raise TimeoutError(f"a callback of {self.name} does not return")
        InProcessApp.serving = None

    def finish(self) -> None:
        """Stop the filter at the end of a test.

        Raises:
            RuntimeError: it could not go on.
            TimeoutError: a callback does not return.
        """
        if not self._stopped:
            self.stop()

    def _serve(self) -> None:
        try:
            Milter.runmilter(self.name, self.socket, drain_timeout=1, engine="native")
        except BaseException as exc:  # noqa: BLE001 - it is raised where the filter is stopped
            self._failure = exc

    def _wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                # Not a word is said: no filter object is made for this connection.
                MTA.connect(self.socket, offer=None).close()
                return
            except FilterUnreachable as exc:
                if not self._thread.is_alive():
                    raise RuntimeError(f"{self.name} cannot serve: {self._failure}") from None
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{self.name} does not listen: {exc}") from None
            time.sleep(0.01)


def can_serve(filter: FilterLike) -> bool:
    """Whether it is something that a thread of this process can serve: no script or module."""
    if isinstance(filter, (str, os.PathLike)):
        return ":" in os.fspath(filter)
    return True
