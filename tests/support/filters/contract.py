"""A filter that makes calls on its context as it is told, and tells what came of each.

    contract.py SOCKET [PLAN]

PLAN is a Python literal: ``{"negotiate": CALLS, "symlists": {stage: macros}}``, what to do
at negotiation. The macro ``{plan}`` says what to do later: ``{"calls": {stage: CALLS},
"verdicts": {stage: verdict}}``. CALLS is a list of (method of the context, arguments). When the
connection closes the filter writes a line with the outcomes: a list of (stage, method, name
of the exception or ``"ok"``, its text or the result).

The tests use the class with the stand-in for the context too.
"""

from __future__ import annotations

import ast
import sys
import warnings

import Milter

STAGES = ["connect", "hello", "envfrom", "envrcpt", "data", "header", "eoh", "body", "eom"]
STAGES += ["abort", "close"]


class Planned(Milter.Base):
    """Follows the plan; ``outcomes`` holds what came of it."""

    at_negotiation: dict = {}  # noqa: RUF012 - set once, before the filter runs
    finished = staticmethod(lambda outcomes: None)

    def __init__(self):
        self.outcomes = []
        self.plan = {}

    def _attempt(self, stage, calls):
        for method, args in calls:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = "ok", getattr(self._ctx, method)(*args)
            except Exception as error:  # noqa: BLE001 - it is the outcome
                result = type(error).__name__, str(error)
            self.outcomes.append((stage, method, *result))

    def _step(self, stage):
        self._attempt(stage, self.plan.get("calls", {}).get(stage, []))
        return self.plan.get("verdicts", {}).get(stage, Milter.CONTINUE)

    def negotiate(self, opts):
        self._attempt("negotiate", self.at_negotiation.get("negotiate", []))
        for stage, macros in self.at_negotiation.get("symlists", {}).items():
            self._ctx.setsymlist(stage, macros)
        return super().negotiate(opts)

    def connect(self, hostname, family, hostaddr):
        self.plan = ast.literal_eval(self.getsymval("{plan}") or "{}")
        return self._step("connect")

    def hello(self, hostname):
        return self._step("hello")

    def envfrom(self, f, *params):
        return self._step("envfrom")

    def envrcpt(self, to, *params):
        return self._step("envrcpt")

    def data(self):
        return self._step("data")

    def header(self, field, value):
        return self._step("header")

    def eoh(self):
        return self._step("eoh")

    def body(self, blk):
        return self._step("body")

    def eom(self):
        return self._step("eom")

    def abort(self):
        return self._step("abort")

    def close(self):
        self._step("close")
        self.finished(self.outcomes)
        return Milter.CONTINUE


def main():
    if len(sys.argv) > 2:
        Planned.at_negotiation = ast.literal_eval(sys.argv[2])
    Planned.finished = staticmethod(lambda outcomes: print(f"outcomes {outcomes!r}", flush=True))
    Milter.factory = Planned
    Milter.runmilter("contract", sys.argv[1])


if __name__ == "__main__":
    main()
