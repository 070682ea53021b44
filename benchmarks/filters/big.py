#!/usr/bin/env python3
"""A filter for big bodies: the header that it adds tells the length of the body.

usage: big.py SOCKET [--workers N]
"""

from __future__ import annotations

from noop import Noop, serve

import Milter


class Big(Noop):
    """Keeps nothing of the body."""

    def envfrom(self, f: str, *params: str) -> int:
        self.length = 0
        return Milter.CONTINUE

    def body(self, blk: bytes) -> int:
        self.length += len(blk)
        return Milter.CONTINUE

    def eom(self) -> int:
        self.addheader("X-Bench", str(self.length))
        return Milter.CONTINUE


if __name__ == "__main__":
    serve(Big)
