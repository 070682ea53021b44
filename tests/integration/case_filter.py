"""The filter's side of the cases: a process that behaves as the current case says.

    case_filter.py SOCKET

It reads lines ``RUN CASE`` on standard input and from then on gives new connections the
behaviour of that case; it writes one JSON line for each thing that happens.  It runs on whatever
pymilter its interpreter has.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.case import Filter
from integration.cases import by_name

import Milter

STAGES = (
    "connect",
    "hello",
    "envfrom",
    "envrcpt",
    "data",
    "header",
    "eoh",
    "body",
    "unknown",
    "eom",
    "abort",
    "close",
)
MESSAGE_STAGES = ("envfrom", "data", "header", "eoh", "body", "eom")
GOING_ON = (Milter.CONTINUE, Milter.SKIP, Milter.NOREPLY)
LONG = 2000  # bytes of a body that are worth repeating

_lock = threading.Lock()
_connections = 0


def say(*values: Any) -> None:
    line = json.dumps(values) + "\n"
    with _lock:
        os.write(1, line.encode("ascii"))


def plain(value: Any) -> Any:
    """A callback's argument as JSON can carry it; bytes become Latin-1 text."""
    if isinstance(value, (bytes, bytearray)):
        return value.decode("latin-1") if len(value) <= LONG else f"{len(value)} bytes"
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def callback(stage: str, spec: Filter) -> Any:
    action = spec.on.get(stage)
    macros = spec.macros.get(stage)

    def method(self: Any, *args: Any) -> Any:
        self.args = args
        note = [plain(arg) for arg in args]
        if macros:
            note.append({name: self.getsymval(name) for name in macros})
        self.say(stage, *note)
        try:
            verdict = action(self) if action else None
        except Exception:
            self.note_end(stage)
            raise
        verdict = Milter.CONTINUE if verdict is None or isinstance(verdict, tuple) else verdict
        if verdict not in GOING_ON:
            self.note_end(stage)
        return verdict

    method.__name__ = method.__qualname__ = stage
    if stage in spec.symlist:
        method = Milter.symlist(*spec.symlist[stage])(method)
    if stage in spec.off:
        method = Milter.nocallback(method)
    if stage in spec.noreply:
        method = Milter.noreply(method)
    return method


def make_class(run: str, spec: Filter) -> Any:
    if spec.functions:
        return make_mailfilter(run, spec)

    def say_of(self: Any, *values: Any) -> None:
        say(run, self.number, *values)

    def init(self: Any) -> None:
        global _connections
        with _lock:
            _connections += 1
            self.number = _connections

    def note_end(self: Any, stage: str) -> None:
        """A verdict ends the message here: no abort follows."""
        if stage in MESSAGE_STAGES:
            self.say("over")

    names: dict[str, Any] = {stage: callback(stage, spec) for stage in STAGES}
    names.update(__init__=init, say=say_of, note_end=note_end)
    made = type("CaseFilter", (Milter.Base,), names)
    for name in spec.decorate:
        made = getattr(Milter, name)(made)
    return made


def make_mailfilter(run: str, spec: Filter) -> Any:
    """A filter of functions, which says when a connection has ended."""
    from Milter import mailfilter  # which older ones have not

    made = [mailfilter.filter(**options)(function) for function, options in spec.functions]

    session = mailfilter.chain(*made).session

    def close(self: Any) -> Any:
        say(run, 1, "close")
        return session.close(self)

    return type("CaseFilter", (session,), {"close": close})


def follow_orders() -> None:
    for line in sys.stdin:
        run, _, name = line.rstrip("\n").partition(" ")
        Milter.factory = make_class(run, by_name(name).filter)
        say(run, 0, "ready")


def main() -> None:
    Milter.factory = make_class("-", Filter())
    Milter.set_flags(Milter.CURR_ACTS)
    threading.Thread(target=follow_orders, daemon=True).start()
    Milter.runmilter("casefilter", sys.argv[1], 300)


if __name__ == "__main__":
    main()
