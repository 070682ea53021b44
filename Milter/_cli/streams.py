"""The standard streams of a command, which may be closed, full, or read by nobody any more.

What a command finds out is in its exit status.  That its words reach somebody is not its matter:
a service is started without standard output, and a monitor closes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TextIO

#: Stands for a standard output that was closed when the process was started.
_nowhere: TextIO | None = None


def prepare() -> None:
    """Make up for standard streams that the process was started without.

    Their descriptors lead to /dev/null from now on.  Otherwise the next sockets would get these
    numbers, and whatever writes to number 1 or 2 would write to the MTA.
    """
    global _nowhere
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _lead_to_null(number)
    if sys.stdout is None:
        sys.stdout = _nowhere = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    # What the encoding of the terminal lacks is no reason to say nothing.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def show(text: str) -> OSError | None:
    """Print *text*; returns the error where not all of it could be written."""
    if sys.stdout is _nowhere:
        return OSError(errno.EBADF, "it is closed")
    try:
        print(text, flush=True)
    except OSError as exc:
        _give_up(sys.stdout)
        return exc
    return None


def note(text: str, end: str = "\n") -> None:
    """Print *text* on standard error, if anybody takes it."""
    try:
        # In one piece: others may write at the same time.
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except OSError:
        _give_up(sys.stderr)


def settle() -> None:
    """Write out what is still buffered; Python would end with a status of its own over it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _give_up(stream)
        except ValueError:
            pass  # somebody has closed it


def is_hang_up(error: OSError) -> bool:
    """Whether nobody wants to read, which is no fault that anybody could mend."""
    return error.errno in (errno.EPIPE, errno.EBADF)


def _give_up(stream: TextIO) -> None:
    """Let what is written to a stream from now on, and what it has buffered, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        _lead_to_null(stream.fileno())
        stream.flush()


def _lead_to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        # Programs that the filter starts have it as well, as they would any standard stream.
        os.set_inheritable(number, True)
        return
    os.dup2(null, number)
    os.close(null)
