"""Callbacks that are coroutines: all right to type checkers.

Never imported, only read by ``test_typing.py``.
"""

from __future__ import annotations

import asyncio

import Milter


class Each(Milter.Base):
    async def connect(self, name: str, kind: int, address: Milter.Address) -> int:
        return Milter.CONTINUE

    @Milter.noreply
    async def hello(self, helo: str) -> int:
        return Milter.CONTINUE

    @Milter.symlist("i")
    async def envfrom(self, sender: str, *esmtp: str) -> int:
        return Milter.CONTINUE

    @Milter.decode("bytes")
    async def envrcpt(self, recipient: bytes, *esmtp: bytes) -> int:
        return Milter.CONTINUE

    async def data(self) -> int:
        return Milter.CONTINUE

    async def header(self, key: str, text: str) -> int:
        return Milter.CONTINUE

    async def eoh(self) -> int:
        return Milter.CONTINUE

    async def body(self, piece: bytes) -> int:
        return Milter.CONTINUE

    async def unknown(self, line: str) -> int:
        return Milter.CONTINUE

    async def eom(self) -> int:
        self.addheader("X-Bits", str(self.actions))
        return Milter.ACCEPT

    async def abort(self) -> int:
        return Milter.CONTINUE

    async def close(self) -> int:
        return Milter.CONTINUE


class Mixed(Milter.Milter):
    async def connect(self, name: str, kind: int, address: Milter.Address) -> int:
        return Milter.CONTINUE

    def hello(self, helo: str) -> Milter.Answer:
        return super().hello(helo)

    def envfrom(self, sender: str, *esmtp: str) -> Milter.Answer:
        return self.look_up(sender) if sender != "<>" else Milter.CONTINUE

    async def look_up(self, sender: str) -> int:
        return Milter.REJECT

    def eom(self) -> int:
        return Milter.ACCEPT


async def main() -> None:
    Milter.factory = Mixed
    await Milter.serve("mixed", "unix:/run/mixed", drain_timeout=5, socket_mode=0o660)


Milter.factory = Each
Milter.runmilter("each", "unix:/run/each", loop_factory=asyncio.new_event_loop)
