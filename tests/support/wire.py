"""Sessions with the filter scripted, which does at each stage what the test says."""

from __future__ import annotations

import ast
import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from Milter.mta import MTA, Offer, Reply

STAGES = [
    "connect",
    "helo",
    "envfrom",
    "envrcpt",
    "data",
    "header",
    "eoh",
    "body",
    "eom",
    "abort",
    "close",
    "unknown",
]
TRACE = dict.fromkeys(STAGES, "say(stage, *args)")


class Session:
    """A connection to scripted with bodies for its callbacks."""

    def __init__(self, running: Any, mta: MTA, bodies: dict[str, str]) -> None:
        self.filter = running
        self.mta = mta
        self._bodies = bodies
        self.begin()

    def begin(self) -> None:
        """A new SMTP session, with a tag of its own."""
        self.tag = uuid.uuid4().hex
        self._connected = False
        self._start = len(self.filter.output.splitlines())

    @property
    def script(self) -> dict[str, str]:
        """The macros that tell the filter what to do; they go with the connection."""
        return {"{script}": json.dumps({"tag": self.tag, **self._bodies})}

    def connect(self, *args: Any, **options: Any) -> Reply:
        macros = {**self.script, **options.pop("macros", {})}
        self._connected = True
        return self.mta.connect_info(*args, macros=macros, **options)

    def envelope(self, *recipients: str) -> None:
        """From connect to DATA."""
        self.connect()
        self.mta.helo("client.example")
        self.transaction(*recipients)

    def transaction(self, *recipients: str) -> None:
        self.mta.mail("<alice@example.com>")
        for recipient in recipients or ("<bob@example.org>",):
            self.mta.rcpt(recipient)
        self.mta.data()

    def content(
        self,
        headers: Iterable[tuple[Any, Any]] = (("Subject", "hello"),),
        body: bytes = b"text\r\n",
    ) -> Reply:
        """From the first header to the verdict at end of message."""
        for name, value in headers:
            self.mta.header(name, value)
        self.mta.eoh()
        self.mta.body(body)
        return self.mta.eom()

    def message(self) -> Reply:
        """A whole message on a new connection."""
        self.envelope()
        return self.content()

    def reach(self, stage: str) -> Reply:
        """The answer to one step, after all steps that come before it."""
        steps: dict[str, Callable[[], Reply]] = {
            "connect": self.connect,
            "helo": lambda: self.mta.helo("client.example"),
            "unknown": lambda: self.mta.unknown("XBOGUS"),
            "envfrom": lambda: self.mta.mail("<alice@example.com>"),
            "envrcpt": lambda: self.mta.rcpt("<bob@example.org>"),
            "data": self.mta.data,
            "header": lambda: self.mta.header("Subject", "hello"),
            "eoh": self.mta.eoh,
            "body": lambda: self.mta.body(b"text\r\n"),
            "eom": self.mta.eom,
        }
        for name, step in steps.items():
            reply = step()
            if name == stage:
                return reply
            assert reply.verdict.goes_on, reply
        raise ValueError(stage)

    def next(self, count: int = 1) -> tuple[Any, ...]:
        """What the filter says in this session as its count-th word."""
        return self._parse(self.filter.wait_for(f"{self.tag} (", count))

    def said(self) -> list[tuple[Any, ...]]:
        """All that the filter said until it closed this session."""
        self.filter.wait_for(f"{self.tag} ('closed',)")
        lines = self.filter.output.split("\n")
        found = [self._parse(line) for line in lines if line.startswith(f"{self.tag} (")]
        assert found[-1] == ("closed",)
        return found[:-1]

    def _parse(self, line: str) -> tuple[Any, ...]:
        value: tuple[Any, ...] = ast.literal_eval(line[len(self.tag) + 1 :])
        return value

    def settle(self) -> None:
        """Wait until the filter is done with this session, so that no other sees its traces."""
        if self._connected:
            self.said()

    def log(self) -> str:
        """What the filter wrote during this session beside what it said."""
        self.said()
        lines = self.filter.output.split("\n")[self._start :]
        return "\n".join(line for line in lines if not line.startswith(self.tag))


@contextlib.contextmanager
def session(running: Any, *, offer: Offer | None = None, **bodies: str) -> Iterator[Session]:
    """A connection to scripted; at the end it is closed, and must be so in silence.

    The filter has to outlive it.
    """
    with running.mta(offer=offer or Offer()) as mta:
        made = Session(running, mta, bodies)
        yield made
    made.settle()
    assert running.process.poll() is None, running.output
