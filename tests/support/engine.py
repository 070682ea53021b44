"""Which engine the filters under test have: pytest's ``--engine``, or PYMILTER_ENGINE."""

from __future__ import annotations

import os

ENGINES = ("libmilter", "native")
ENGINE = os.environ.get("PYMILTER_ENGINE") or "libmilter"


def engine() -> str:
    """In a test: which one it is."""
    return os.environ["PYMILTER_ENGINE"]
