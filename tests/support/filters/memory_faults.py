"""Does everything that a filter can, for the tests of faults: memory_faults.py SOCKET [HOW].

HOW is how text is decoded (@decode), or "hook" for exceptions that go to a replaced excepthook.
"""

from __future__ import annotations

import sys
from typing import Any

import milter

import Milter


class Everything(Milter.Base):
    """Each stage, with its macros; each action; a reply for one recipient."""

    @Milter.symlist("{mail_addr}")
    def envfrom(self, sender: str, *parameters: str) -> int:
        self.getsymval("{mail_addr}")
        return Milter.CONTINUE

    def connect(self, hostname: str, family: int, address: Any) -> int:
        self.getsymval("j")
        return Milter.CONTINUE

    def hello(self, hostname: str) -> int:
        return Milter.CONTINUE

    def envrcpt(self, recipient: str, *parameters: str) -> int:
        if recipient == "<refused@example.org>":
            self.setreply("550", "5.1.1", "No such user", "really")
            return Milter.REJECT
        return Milter.CONTINUE

    def data(self) -> int:
        return Milter.CONTINUE

    @Milter.noreply
    def header(self, name: str, value: str) -> int:
        return Milter.CONTINUE

    def eoh(self) -> int:
        return Milter.CONTINUE

    def body(self, chunk: bytes) -> int:
        return Milter.CONTINUE

    def eom(self) -> int:
        self.addheader("X-Added", "one\n\ttwo")
        self.addheader("X-Inserted", "three", 0)
        self.chgheader("Subject", 1, "changed")
        self.chgfrom("<other@example.com>", "BODY=8BITMIME")
        self.addrcpt("<carol@example.org>", "NOTIFY=NEVER")
        self.delrcpt("<bob@example.org>")
        self.replacebody("n\xe4w\r\n")
        self.quarantine("why")
        self.progress()
        return Milter.CONTINUE

    def unknown(self, command: str) -> int:
        if command == "RAISE":
            raise ValueError(command)
        if command == "DIAG":
            created, deleted = milter.getdiag()
            self.setreply("550", "5.0.0", f"{created} {deleted}")
            return Milter.REJECT
        return Milter.CONTINUE

    def abort(self) -> int:
        return Milter.CONTINUE

    def close(self) -> int:
        return Milter.CONTINUE


def decoding(how: str) -> type[Everything]:
    """The filter with other decoders."""

    class Decoding(Everything):
        @Milter.symlist("{mail_addr}")
        @Milter.decode(how)
        def envfrom(self, sender: Any, *parameters: Any) -> int:
            return Milter.CONTINUE

        @Milter.decode(how)
        def envrcpt(self, recipient: Any, *parameters: Any) -> int:
            return Milter.CONTINUE

        @Milter.decode(how)
        def header(self, name: str, value: Any) -> int:
            return Milter.CONTINUE

    return Decoding


if __name__ == "__main__":
    how = (sys.argv[2:] or ["surrogateescape"])[0]
    Milter.factory = Everything
    if how == "hook":
        sys.excepthook = lambda kind, value, traceback: None
    elif how != "surrogateescape":
        Milter.factory = decoding(how)
    Milter.runmilter("faults", sys.argv[1], 60)
