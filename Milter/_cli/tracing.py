"""``send --trace``: what MTA and filter say to each other, on standard error."""

from __future__ import annotations

import time
from typing import Callable

from ..mta.recording import Entry, Splitter
from ..mta.words import Side, stage_of
from . import streams

Trace = Callable[[str, bytes], None]

_SIDES = {">": Side.MTA, "<": Side.FILTER}


def tracer(form: str | None, prefix: str = "") -> Trace | None:
    """What shows packets in *form*, ``words`` or ``raw``; None for None."""
    if form is None:
        return None
    return _Narrator(prefix).tell if form == "words" else _raw(prefix)


def _raw(prefix: str) -> Trace:
    return lambda direction, data: streams.note(f"{prefix}{direction} {data!r}")


class _Narrator:
    """Tells in words what goes over a connection, with the time since its first packet."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._start: float | None = None
        self._stage = ""
        self._splitters = {side: Splitter() for side in Side}

    def tell(self, direction: str, data: bytes) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now
        side = _SIDES[direction]
        for command, rest in self._splitters[side].feed(data):
            words = str(Entry.packet(side, 0.0, command, rest))
            if side is Side.MTA:
                stage = stage_of(command or b"")
                self._stage = f"{stage}: " if stage is not None else self._stage
            elif command != b"O":
                words = f"{self._stage}{words}"
            took = (now - self._start) * 1000
            streams.note(f"{self._prefix}{direction} {took:9.1f} ms  {words}")
