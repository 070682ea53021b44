"""A filter that tries another path where its socket cannot be opened."""

from __future__ import annotations

import sys

import milter

import Milter


class Stamp(Milter.Base):
    def eom(self) -> int:
        self.addheader("X-Stamp", "yes")
        return Milter.ACCEPT


Milter.factory = Stamp
try:
    Milter.runmilter("retry", sys.argv[1])
except milter.error as exc:
    print("failed:", exc, flush=True)
    Milter.runmilter("retry", sys.argv[1].replace("/none", ""))
