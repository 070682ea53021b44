"""The smallest filter that changes a message."""

from __future__ import annotations

import sys

import Milter


class Stamp(Milter.Base):
    def eom(self) -> int:
        self.addheader("X-Stamp", "yes")
        return Milter.ACCEPT


Milter.factory = Stamp
Milter.runmilter("stamp", sys.argv[1])
