"""Scripts that need a process of their own: leaks, threads, races; under -X dev -W error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.process import WAIT

ISOLATED = Path(__file__).with_name("isolated")


@pytest.mark.parametrize("script", ["thread_hops", "thread_states", "leaks", "closing_race"])
def test_isolated(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(ISOLATED / f"{script}.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=5.5 * WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout == "ok\n"
