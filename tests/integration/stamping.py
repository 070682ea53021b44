"""Filters for test_under_load.py: they stamp each message with their process."""

from __future__ import annotations

import os
import time

import Milter


class Stamp(Milter.Base):
    def eom(self) -> int:
        self.addheader("X-Stamp", str(os.getpid()))
        return Milter.ACCEPT


class Slow(Stamp):
    def header(self, name: str, value: str) -> int:
        time.sleep(0.005)
        return Milter.CONTINUE
