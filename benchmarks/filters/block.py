#!/usr/bin/env python3
"""A filter that waits 50 ms at MAIL, as for an answer from a database or from the DNS.

usage: block.py SOCKET [--workers N]
"""

from __future__ import annotations

import time

from noop import Noop, serve

import Milter

SECONDS = 0.05


class Block(Noop):
    """In `sleep` the interpreter is free for other connections."""

    def envfrom(self, f: str, *params: str) -> int:
        time.sleep(SECONDS)
        return Milter.CONTINUE


if __name__ == "__main__":
    serve(Block)
