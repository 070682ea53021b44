"""Calls that fail on demand in a process of choice; see faults.c, which does it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ALLOCATIONS, THREADS, WRITES, SHORT_WRITES, SLOW_SENDING, THREADS_OF_MAIN, PROCESSES = range(1, 8)
WATCHES = 8
ALWAYS = 1 << 40  # calls
_LAYOUT = struct.Struct("@4q")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "cc"))


def possible() -> bool:
    """Whether faults can be made here: glibc, a compiler, an interpreter without a sanitizer."""
    sanitized = "asan" in os.environ.get("LD_PRELOAD", "") or "valgrind" in os.environ.get(
        "LD_PRELOAD", ""
    )
    return (
        sys.platform.startswith("linux")
        and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
        and not sanitized
        and shutil.which(_compiler()[0]) is not None
    )


class Told:
    """The file that says what is to fail."""

    def __init__(self, name: str | Path) -> None:
        with open(name, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._kind = 0

    def arm(self, kind: int, first: int, count: int) -> None:
        """So many calls of this kind are to fail, from the first-th on."""
        _LAYOUT.pack_into(self._memory, 0, 0, first, count, 0)
        self._kind = kind
        self.rearm()

    def disarm(self) -> None:
        """Nothing fails any more, nor is counted."""
        self._memory[:8] = struct.pack("@q", 0)

    def rearm(self) -> None:
        """Go on where it was disarmed."""
        self._memory[:8] = struct.pack("@q", self._kind)

    @property
    def seen(self) -> int:
        """How many such calls there were since it was armed."""
        number: int = _LAYOUT.unpack_from(self._memory)[3]
        return number


class Faults:
    """What is to fail in the processes that run with ``env``."""

    def __init__(self, directory: Path) -> None:
        library = directory / "faults.so"
        source = Path(__file__).with_name("faults.c")
        flags = ["-O1", "-g", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run([*_compiler(), *flags, str(source), "-o", str(library), "-ldl"], check=True)
        told = directory / "faults"
        told.write_bytes(bytes(_LAYOUT.size))
        # Python's own pools would hide most allocations.
        self.env = {"LD_PRELOAD": str(library), "FAULTS": str(told)}
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):
            # Without a global lock objects come from an allocator that cannot be replaced; what
            # the module and libmilter ask the C library for fails all the same.
            self.env["PYTHONMALLOC"] = "malloc"
        self._told = Told(told)
        if sys.version_info[:2] == (3, 11):
            # This version goes on with the NULL that it got.
            self.env["FAULTS_SPARE"] = "PyThreadState_New"

    @contextmanager
    def failing(self, kind: int, first: int, count: int = 1) -> Iterator[None]:
        """So many calls of this kind fail from the first-th on, meanwhile."""
        self._told.arm(kind, first, count)
        try:
            yield
        finally:
            self._told.disarm()

    @property
    def seen(self) -> int:
        """How many such calls there were in the last block."""
        return self._told.seen
