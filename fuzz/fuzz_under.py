"""A plugin for pytest: filters run under the command in the variable FUZZ_UNDER."""

from __future__ import annotations

import os
import shlex
import stat
import sys
import tempfile
from pathlib import Path

_directory = tempfile.TemporaryDirectory(prefix="under-")
_command = os.environ.get("FUZZ_UNDER")

if _command:
    # The tests start filters with sys.executable, so that is what stands in between.
    _wrapper = Path(_directory.name, "python")
    _wrapper.write_text(f'#!/bin/sh\nexec {_command} {shlex.quote(sys.executable)} "$@"\n')
    _wrapper.chmod(_wrapper.stat().st_mode | stat.S_IXUSR)
    sys.executable = str(_wrapper)
