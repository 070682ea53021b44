#!/usr/bin/env python3
"""A filter that waits a second at the first recipient of each message, in a coroutine.

usage: waiting.py SOCKET [--workers N]
"""

from __future__ import annotations

import asyncio

from noop import serve

import Milter

SECONDS = 1.0


class Waiting(Milter.Base):  # type: ignore[misc, unused-ignore]  # some releases have no types
    """Only that, and the header that the load generator looks for."""

    waited = False

    async def envrcpt(self, to: str, *params: str) -> int:
        if not self.waited:
            self.waited = True
            await asyncio.sleep(SECONDS)
        return Milter.CONTINUE

    def eom(self) -> int:
        self.waited = False
        self.addheader("X-Bench", "checked")
        return Milter.CONTINUE


if __name__ == "__main__":
    serve(Waiting)
