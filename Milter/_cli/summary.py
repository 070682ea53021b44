"""What became of several messages: a line for each, and a summary."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..mta import Result
from . import report
from .common import printable
from .exchange import Exchange, Failure


def line(name: str, found: Exchange | Failure) -> str:
    """One message, for people."""
    if isinstance(found, Failure):
        return f"{'error':12}{'':12}  {printable(name)}: {printable(found.text)}"
    said = f"{verdict(found):12}{found.milliseconds:9.1f} ms  {printable(name)}"
    details = _details(found.outcome.result)
    if found.late is not None:
        details.append(f"error: {found.late.text}")
    return f"{said}{': ' if details else ''}{printable('; '.join(details))}"


def verdict(found: Exchange | Failure) -> str:
    """In one word or two."""
    if isinstance(found, Failure):
        return "error"
    result = found.outcome.result
    return "quarantine" if result.quarantine is not None else result.verdict.value


def _details(result: Result) -> list[str]:
    details = []
    if result.smtp is not None:
        details.append(str(result.smtp).replace("\n", " / "))
    if result.refused:
        details.append(_counted(len(result.refused), "recipient") + " refused")
    if result.accepted and result.modifications:
        details.append(_counted(len(result.modifications), "modification"))
    return details


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def for_programs(name: str, found: Exchange | Failure, socket: str) -> dict[str, Any]:
    """One message, as what JSON can hold."""
    if isinstance(found, Failure):
        return failure(found, socket=socket, file=name)
    said = {"file": name, "milliseconds": round(found.milliseconds, 3)}
    said.update(report.for_programs(found.outcome))
    if found.late is not None:
        said.update(failure(found.late))
    return said


def failure(found: Failure, **more: str) -> dict[str, Any]:
    """An error, as what JSON can hold."""
    return {**more, "error": found.text, "kind": found.kind, "status": found.status}


class Summary:
    """Counts what became of messages."""

    def __init__(self) -> None:
        self.messages = 0
        self.verdicts: collections.Counter[str] = collections.Counter()
        self._milliseconds: list[float] = []

    def add(self, found: Exchange | Failure) -> None:
        """Count one."""
        self.messages += 1
        self.verdicts[verdict(found)] += 1
        if isinstance(found, Exchange):
            self._milliseconds.append(found.milliseconds)

    def for_people(self, seconds: float) -> Iterator[str]:
        """The summary, line by line; *seconds* is what all of it took."""
        rate = self.messages / seconds if seconds else 0.0
        yield f"Messages    {self.messages} in {seconds:.1f} s, {rate:.0f} a second"
        yield "Verdicts    " + ", ".join(f"{n} {name}" for name, n in self.verdicts.most_common())
        if self._milliseconds:
            half, most, top = self._times()
            yield f"Time        p50 {half:.1f} ms, p99 {most:.1f} ms, longest {top:.1f} ms"

    def for_programs(self, seconds: float) -> dict[str, Any]:
        """The summary as what JSON can hold."""
        said: dict[str, Any] = {
            "messages": self.messages,
            "seconds": round(seconds, 3),
            "verdicts": dict(self.verdicts.most_common()),
            "milliseconds": None,
        }
        if self._milliseconds:
            half, most, top = (round(value, 3) for value in self._times())
            said["milliseconds"] = {"p50": half, "p99": most, "max": top}
        return said

    def _times(self) -> tuple[float, float, float]:
        values = sorted(self._milliseconds)
        return percentile(values, 50), percentile(values, 99), values[-1]


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank: the least of sorted *values* that *percent* of them do not exceed."""
    return values[max(math.ceil(len(values) * percent / 100), 1) - 1]
