"""Overrides that call what they are given by names of their own: no type checker may mind.

Never imported, only read by ``test_typing.py``.
"""

from __future__ import annotations

import milter

import Milter


class Named(Milter.Base):
    def connect(self, name: str, kind: int, address: Milter.Address) -> Milter.Answer:
        self.peer = address
        return super().connect(name, kind, address)

    def hello(self, helo: str) -> int:
        return Milter.CONTINUE

    def envfrom(self, sender: str, *esmtp: str) -> Milter.Answer:
        return super().envfrom(sender, *esmtp)

    @Milter.noreply
    def envrcpt(self, recipient: str, *esmtp: str) -> int:
        return Milter.CONTINUE

    @Milter.decode("bytes")
    def header(self, key: str, text: bytes) -> int:
        return Milter.CONTINUE

    def body(self, piece: bytes) -> int:
        return Milter.CONTINUE

    def unknown(self, line: str) -> int:
        return Milter.CONTINUE

    def eom(self) -> int:
        if self.actions & Milter.ADDHDRS and not self.protocol & Milter.P_SKIP:
            context: milter.milterContext | None = self.context
            assert context is self._ctx
            self.addheader("X-Bits", str(self.actions + self._actions + self._protocol))
        return Milter.CONTINUE


class Logging(Milter.Milter):
    def connect(self, name: str, kind: int, address: Milter.Address) -> Milter.Answer:
        return super().connect(name, kind, address)

    def hello(self, helo: str) -> int:
        return Milter.CONTINUE

    def envfrom(self, sender: str, *esmtp: str) -> int:
        return Milter.CONTINUE

    def envrcpt(self, recipient: str, *esmtp: str) -> int:
        return Milter.CONTINUE

    def header(self, key: str, text: str) -> int:
        return Milter.CONTINUE


def host(address: Milter.Address) -> str | None:
    return address[0] if isinstance(address, tuple) else address
