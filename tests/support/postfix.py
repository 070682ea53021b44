"""Postfix's configuration, where tests write it."""

from __future__ import annotations

import os
from pathlib import Path


def settle(directory: Path) -> None:
    """Have ``main.cf`` look as if it had been written a while ago.

    Postfix's programs wait, up to two seconds, before they read one that has just changed: it might
    not be complete.
    """
    os.utime(directory / "main.cf", (1e9, 1e9))
