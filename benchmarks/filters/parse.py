#!/usr/bin/env python3
"""A filter that reads its mail: collects it, parses it, searches it and makes a digest of it.

usage: parse.py SOCKET [--workers N]

The header that it adds tells how many headers there are, how many addresses a regular
expression found, and the digest.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import re

from noop import Noop, serve

import Milter

ADDRESS = re.compile(rb"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")


class Parse(Noop):
    """What belongs to a message is set up when it begins."""

    def envfrom(self, f: str, *params: str) -> int:
        self.message = bytearray()
        return Milter.CONTINUE

    def header(self, field: str, value: str) -> int:
        self.message += f"{field}: {value}\r\n".encode("utf-8", "surrogateescape")
        return Milter.CONTINUE

    def eoh(self) -> int:
        self.message += b"\r\n"
        return Milter.CONTINUE

    def body(self, blk: bytes) -> int:
        self.message += blk
        return Milter.CONTINUE

    def eom(self) -> int:
        parsed = email.message_from_bytes(self.message, policy=email.policy.default)
        headers = [(name, str(value)) for name, value in parsed.items()]
        addresses = ADDRESS.findall(self.message)
        digest = hashlib.sha256(self.message).hexdigest()
        self.addheader("X-Bench", f"{len(headers)} {len(addresses)} {digest}")
        return Milter.CONTINUE


if __name__ == "__main__":
    serve(Parse)
