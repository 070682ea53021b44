"""A filter that does at each stage what the test says, and tells what it saw.

    scripted.py SOCKET [SETUP [NEGOTIATE [NAME]]]

SETUP is Python that runs before main(), NEGOTIATE the body of the negotiate callback.  The
other callbacks get their bodies from the MTA, so that one process serves many tests: the
macro {script}, sent with the connection, is a JSON object of stage names and function bodies.
Where a body does not return, the verdict is CONTINUE.

A body sees: ctx, args (the arguments after the context), stage, milter, tag (a word that is
this connection's own), store (a namespace that lasts as long as the connection),
say(*values), which writes a line that the test can read back, and attempt(callable), which
says what came out of it.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import types
import weakref
from typing import Any, Callable

import milter

# libmilter offers the filter no-reply bits that the MTA does not: it then answers in its place.
ALL_STEPS_AND_REPLIES = """
[options] = args
options[1] &= milter.P_SKIP | milter.P_RCPT_REJ | milter.P_HDR_LEADSPC
"""


def compiled(body: str) -> Callable[..., Any]:
    source = (
        "def callback(ctx, args, stage, store, say, attempt, tag, milter):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\n    return milter.CONTINUE\n"
    )
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(source, namespace)
    function: Callable[..., Any] = namespace["callback"]
    return function


class Connection:
    def __init__(self, script: dict[str, str]) -> None:
        self.tag = script.pop("tag", "-")
        self.bodies = {stage: compiled(body) for stage, body in script.items()}
        self.store = types.SimpleNamespace()

    def say(self, *values: object) -> None:
        # One write for each line: other threads write too.
        os.write(1, f"{self.tag} {values!a}\n".encode())

    def attempt(self, call: Callable[[], object]) -> None:
        try:
            result = call()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the test judges it
            kinds = [kind.__name__ for kind in type(exc).__mro__]
            self.say("raised", kinds, str(exc))
        else:
            self.say("returned", result)

    def call(self, stage: str, ctx: Any, args: tuple[Any, ...]) -> Any:
        body = self.bodies.get(stage)
        if body is None:
            return milter.CONTINUE
        return body(ctx, args, stage, self.store, self.say, self.attempt, self.tag, milter)


# A context can be weakly referenced and hashed: its private object is left to the tests.
connections: weakref.WeakKeyDictionary[Any, Connection] = weakref.WeakKeyDictionary()


def on_stage(stage: str) -> Callable[..., Any]:
    def callback(ctx: Any, *args: Any) -> Any:
        if stage == "connect":
            connections[ctx] = Connection(json.loads(ctx.getsymval("{script}") or "{}"))
        connection = connections.get(ctx)
        if connection is None:
            return milter.CONTINUE
        try:
            return connection.call(stage, ctx, args)
        finally:
            if stage == "close":
                connection.say("closed")

    return callback


def main() -> None:
    socket_name, setup, negotiate, name = (sys.argv[1:] + [""] * 4)[:4]
    ours = Connection({"tag": "negotiate", "negotiate": negotiate or ALL_STEPS_AND_REPLIES})
    milter.set_flags(milter.CURR_ACTS)
    for stage in [
        "connect",
        "helo",
        "envfrom",
        "envrcpt",
        "header",
        "eoh",
        "body",
        "eom",
        "abort",
        "close",
    ]:
        getattr(milter, f"set_{stage}_callback")(on_stage(stage))
    milter.register(
        name or "scripted",
        unknown=on_stage("unknown"),
        data=on_stage("data"),
        negotiate=lambda ctx, *args: ours.call("negotiate", ctx, args),
    )
    exec(textwrap.dedent(setup), {"milter": milter, "say": ours.say})
    milter.setconn(socket_name)
    milter.main()
    ours.say("main returned")


if __name__ == "__main__":
    main()
