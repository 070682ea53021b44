"""The filter for soak.c: does what the sender, or the client's name, asks for.

    soak.py SOCKET

For each line on standard input it answers what milter.getdiag() says, as a line of JSON; at the
end of standard input it stops.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

import milter

import Milter


class Raised(Exception):
    """What this filter raises where it is told to."""


class Soak(Milter.Base):
    """Raises, blocks, refuses and changes on demand."""

    told = ""

    def at(self, stage: str) -> int:
        if self.told == stage:
            raise Raised(stage)
        return Milter.CONTINUE

    @Milter.symlist("{mail_addr}")
    def envfrom(self, sender: str, *parameters: str) -> int:
        self.told = sender[1:].partition("@")[0]
        self.sender, self.size, self.names = sender, 0, []
        self.getsymval("{mail_addr}")
        return self.at("envfrom")

    def connect(self, hostname: str, family: int, address: Any) -> int:
        self.told = hostname.partition(".")[0]
        return self.at("connect")

    def hello(self, hostname: str) -> int:
        return self.at("hello")

    def envrcpt(self, recipient: str, *parameters: str) -> int:
        if recipient.startswith("<refused@"):
            self.setreply("550", "5.1.1", "No such user")
            return Milter.REJECT
        return self.at("envrcpt")

    def data(self) -> int:
        return self.at("data")

    @Milter.noreply
    def header(self, name: str, value: str) -> int:
        self.names.append(name)
        return self.at("header")

    def eoh(self) -> int:
        return self.at("eoh")

    def body(self, chunk: bytes) -> int:
        self.size += len(chunk)
        return self.at("body")

    def eom(self) -> int:
        if self.told == "block":
            time.sleep(0.02)
        if self.told == "change":
            self.addheader("X-Size", str(self.size))
            self.chgheader("X-Header-0", 1, "changed")
            self.addrcpt("<carol@example.org>")
            self.delrcpt("<bob@example.org>")
            self.replacebody(b"another body\r\n")
        return self.at("eom")

    def abort(self) -> int:
        return self.at("abort")

    def close(self) -> int:
        return self.at("close")


class Counter(logging.Handler):
    """Counts the exceptions that were reported, in place of writing a million tracebacks."""

    reported = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and isinstance(record.exc_info[1], Raised):
            Counter.reported += 1
        else:
            print(self.format(record), file=sys.stderr)


def tell() -> None:
    """Answer the lines on standard input."""
    for _ in sys.stdin:
        diag = milter.getdiag()
        print(json.dumps([*diag, diag.messages, diag.inside, Counter.reported]), flush=True)
    Milter.stop()


def main() -> None:
    logger = logging.getLogger("milter")
    logger.addHandler(Counter())
    logger.propagate = False
    Milter.factory = Soak
    threading.Thread(target=tell, daemon=True).start()
    Milter.runmilter("soak", sys.argv[1], 600)


if __name__ == "__main__":
    main()
