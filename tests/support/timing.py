"""Bounds of processor time, for what hostile input must not stretch."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

#: A debug build of CPython checks its own state at each step.
SLOWER = 4 if hasattr(sys, "gettotalrefcount") else 1


@contextlib.contextmanager
def cpu_time_below(seconds: float, what: object = "") -> Iterator[None]:
    """Fail where the block takes more processor time, in seconds of a release build."""
    began = time.process_time()
    yield
    taken = time.process_time() - began
    assert taken < seconds * SLOWER, f"{taken:.1f} s {what}"
