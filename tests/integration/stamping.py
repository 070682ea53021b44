"""A filter for test_under_load.py: it stamps each message with its process."""

from __future__ import annotations

import os

import Milter


class Stamp(Milter.Base):
    def eom(self) -> int:
        self.addheader("X-Stamp", str(os.getpid()))
        return Milter.ACCEPT
