"""A log file for tests."""

from __future__ import annotations

import os
from typing import IO


class LazyLog:
    """A text file to append lines to, which is opened when the first one is written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Remember where to write.

        Args:
            path: the file; its directory is made when it is needed.
        """
        self._file: IO[str] | None = None
        self.name = path

    def write(self, text: str) -> int:
        """Append text, with characters that have no byte form escaped.

        Args:
            text: what to write.

        Returns:
            How many characters were written.
        """
        if self._file is None:
            directory = os.path.dirname(os.fspath(self.name))
            if directory:
                os.makedirs(directory, exist_ok=True)
            self._file = open(  # noqa: SIM115 - it stays open until close()
                self.name, "a", encoding="utf-8", errors="backslashreplace"
            )
        return self._file.write(text)

    def flush(self) -> None:
        """Bring what was written so far to the file."""
        if self._file is not None:
            self._file.flush()

    def __del__(self) -> None:
        """Close the file: tests often leave that to the end."""
        self.close()

    def close(self) -> None:
        """Close the file, if it was ever opened."""
        if self._file is not None:
            self._file.close()
            self._file = None
