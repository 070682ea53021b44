"""Looks at everything it gets, whatever it is: reads_everything.py SOCKET."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import milter

MACROS = ("i", "{i}", "j", "{client_addr}", "x", "", "{", "{}", b"\xff")


def look(ctx: Any, *args: Any) -> int:
    for value in args:
        repr(value)
        if isinstance(value, (str, bytes)):
            assert 0 not in (value if isinstance(value, bytes) else value.encode(errors="replace"))
    for name in MACROS:
        repr(ctx.getsymval(name))
    return milter.CONTINUE


def on_body(ctx: Any, chunk: bytes) -> int:
    look(ctx)
    return milter.CONTINUE


def on_eom(ctx: Any) -> int:
    look(ctx)
    with contextlib.suppress(milter.error):  # the MTA may be gone
        ctx.addheader("X-Seen", "yes")
    return milter.CONTINUE


def on_negotiate(ctx: Any, options: list[int]) -> int:
    options[1] &= milter.P_SKIP | milter.P_RCPT_REJ | milter.P_HDR_LEADSPC
    return milter.CONTINUE


def main() -> None:
    for stage in ("connect", "helo", "envfrom", "envrcpt", "header", "eoh", "abort", "close"):
        getattr(milter, f"set_{stage}_callback")(look)
    milter.set_body_callback(on_body)
    milter.set_eom_callback(on_eom)
    milter.register("curious", unknown=look, data=look, negotiate=on_negotiate)
    milter.setconn(sys.argv[1])
    milter.main()


if __name__ == "__main__":
    main()
