"""The file of one recorded session, which grows while the session goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Callable

from ..mta.recording import FORM, VERSION, Entry, Splitter
from ..mta.words import Side

SUFFIX = ".milter"
UNFINISHED = ".part"

_HEAD = f"""\
{FORM} {VERSION}
# A session between an MTA and a milter. PRIVATE DATA: it holds addresses, headers and bodies of
# mail as they were. Read it through before you pass it on; data may be changed, for example to XXX.
"""


class SessionFile:
    """Writes down what goes through a relay; that this fails is no matter of the session's.

    Args:
        path: without the suffix of files that are not finished.
        about: a line about the session.
        limit: the largest size in bytes; what would be more is left out.
        complain: called with a text, once, where the file cannot be written.
    """

    def __init__(self, path: str, about: str, limit: int, complain: Callable[[str], None]) -> None:
        self.path = path
        self._limit = limit
        self._complain = complain
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._splitters = {side: Splitter() for side in Side}
        self._size = 0
        self._file = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file = os.open(path + UNFINISHED, flags, 0o600)
        except OSError as exc:
            self._give_up(exc)
        self._is_open = self._file >= 0
        self._append(f"{_HEAD}# {about}\n")

    def said(self, side: Side, data: bytes) -> None:
        """Write down what a side has said."""
        with self._lock:
            if self._is_open:
                now = self._now()
                for command, rest in self._splitters[side].feed(data):
                    self._add(Entry.packet(side, now, command, rest))

    def ended(self, side: Side, how: str) -> None:
        """Write down how a side has ended."""
        with self._lock:
            rest = self._splitters[side].rest()
            if rest:
                self._add(Entry.packet(side, self._now(), None, rest))
            self._add(Entry(side, self._now(), how))

    def close(self) -> bool:
        """End the file; returns whether there is one."""
        with self._lock:
            self._is_open = False
            if self._file < 0:
                return False
            try:
                os.close(self._file)
                os.rename(self.path + UNFINISHED, self.path)
            except OSError as exc:
                self._give_up(exc)
            return True

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _add(self, entry: Entry) -> None:
        # The escapes of a byte take four at most; do not make text that cannot fit.
        text = entry.as_text() if len(entry.data) <= self._limit else ""
        cut = f"cut {self._now():.6f}\n"
        if not text or self._size + len(text.encode()) + len(cut) > self._limit:
            self._append(cut)
            self._is_open = False
        else:
            self._append(text)

    def _append(self, text: str) -> None:
        if not self._is_open:
            return
        data = text.encode()
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as exc:
            self._is_open = False
            self._give_up(exc)
            self._leave_whole_lines()
        else:
            self._size += len(data)

    def _leave_whole_lines(self) -> None:
        """Take away what was written in part, so that the rest can be read."""
        with contextlib.suppress(OSError):  # then it cannot be read to its end
            os.ftruncate(self._file, self._size)

    def _give_up(self, error: OSError) -> None:
        self._complain(f"cannot write {self.path}: {error.strerror}; the session goes on")
