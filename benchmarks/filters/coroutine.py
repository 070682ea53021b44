#!/usr/bin/env python3
"""A filter that does nothing but add one header; every callback is a coroutine.

usage: coroutine.py SOCKET [--workers N]
"""

from __future__ import annotations

from typing import Any

from noop import serve

import Milter


class Coroutine(Milter.Base):  # type: ignore[misc, unused-ignore]  # some releases have no types
    """All steps come, and all are answered."""

    async def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        return Milter.CONTINUE

    async def hello(self, hostname: str) -> int:
        return Milter.CONTINUE

    async def envfrom(self, f: str, *params: str) -> int:
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> int:
        return Milter.CONTINUE

    async def data(self) -> int:
        return Milter.CONTINUE

    async def header(self, field: str, value: str) -> int:
        return Milter.CONTINUE

    async def eoh(self) -> int:
        return Milter.CONTINUE

    async def body(self, blk: bytes) -> int:
        return Milter.CONTINUE

    async def unknown(self, cmd: str) -> int:
        return Milter.CONTINUE

    async def eom(self) -> int:
        self.addheader("X-Bench", "checked")
        return Milter.CONTINUE

    async def abort(self) -> int:
        return Milter.CONTINUE

    async def close(self) -> int:
        return Milter.CONTINUE


if __name__ == "__main__":
    serve(Coroutine)
