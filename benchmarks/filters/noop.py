#!/usr/bin/env python3
"""A filter that does nothing but add one header; every callback is overridden.

usage: noop.py SOCKET [--workers N]

Like its neighbours it is written as an application would be, for any release of pymilter.
"""

from __future__ import annotations

import argparse
from typing import Any

import Milter


class Noop(Milter.Base):  # type: ignore[misc, unused-ignore]  # some releases have no types
    """All steps come, and all are answered."""

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        return Milter.CONTINUE

    def hello(self, hostname: str) -> int:
        return Milter.CONTINUE

    def envfrom(self, f: str, *params: str) -> int:
        return Milter.CONTINUE

    def envrcpt(self, to: str, *params: str) -> int:
        return Milter.CONTINUE

    def data(self) -> int:
        return Milter.CONTINUE

    def header(self, field: str, value: str) -> int:
        return Milter.CONTINUE

    def eoh(self) -> int:
        return Milter.CONTINUE

    def body(self, blk: bytes) -> int:
        return Milter.CONTINUE

    def unknown(self, cmd: str) -> int:
        return Milter.CONTINUE

    def eom(self) -> int:
        self.addheader("X-Bench", "checked")
        return Milter.CONTINUE

    def abort(self) -> int:
        return Milter.CONTINUE

    def close(self) -> int:
        return Milter.CONTINUE


def serve(factory: type[Milter.Base]) -> None:
    """Run the filter where the command line says, until it is stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", help="where to listen, in libmilter's form")
    parser.add_argument("--workers", type=int, help="how many processes; one without a supervisor")
    parser.add_argument("--pin", action="store_true", help="each process keeps to a core")
    arguments = parser.parse_args()
    # pymilter knows none of these.
    options = {} if arguments.workers is None else {"workers": arguments.workers}
    if arguments.pin:
        options["pin_workers"] = True
    Milter.factory = factory
    Milter.set_flags(Milter.ADDHDRS)
    Milter.runmilter("bench", arguments.socket, 600, **options)


if __name__ == "__main__":
    serve(Noop)
