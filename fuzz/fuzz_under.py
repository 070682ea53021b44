"""A plugin for pytest: filters run under the command in FUZZ_UNDER, and end of their own accord.

FUZZ_PYTHON, if set, is the interpreter that they run on, with FUZZ_PATH as its PYTHONPATH.

Leaks are looked for when a process ends; one that is killed tells nothing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

END_SECONDS = 15

_directory = tempfile.TemporaryDirectory(prefix="under-")
_command = os.environ.get("FUZZ_UNDER", "")
_python = os.environ.get("FUZZ_PYTHON", sys.executable)
if "FUZZ_PATH" in os.environ:
    _command = f"env PYTHONPATH={shlex.quote(os.environ['FUZZ_PATH'])} {_command}"
_kill = subprocess.Popen.kill


def _end(process: subprocess.Popen[Any]) -> None:
    """SIGTERM first, SIGKILL for what does not end by that."""
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        _kill(process)


subprocess.Popen.kill = _end  # type: ignore[method-assign]


def pytest_configure(config: Any) -> None:
    """Put the command in between: the tests start filters with sys.executable.

    Where tests run in parallel, the processes that they run in are started with it too; those
    stay as they are.
    """
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if _command and not hands_out:
        wrapper = Path(_directory.name, "python")
        wrapper.write_text(f'#!/bin/sh\nexec {_command} {shlex.quote(_python)} "$@"\n')
        wrapper.chmod(0o755)
        sys.executable = str(wrapper)


def pytest_unconfigure() -> None:
    """By then all filters have ended."""
    _directory.cleanup()
