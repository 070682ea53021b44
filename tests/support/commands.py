"""``python -m Milter run`` as a process, for tests of its options."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .process import Filter, python_command

MESSAGE = b"Subject: a\r\n\r\nb\r\n"


class Runner:
    """Starts filters in a directory of their own, where modules can be written before.

    ``place``: the directory. Every user may enter it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._started: list[Filter] = []
        place.chmod(0o755)
        (place / "run").mkdir(mode=0o755)

    def words(self, *arguments: str) -> list[str]:
        """The command, to be run in the directory."""
        return ["env", "-C", str(self.place), *python_command(), "-m", "Milter", "run", *arguments]

    def start(self, *arguments: str, engine: str = "libmilter", socket: bool = True) -> Filter:
        """Start it on a socket of the directory's."""
        where = f"unix:{self.place}/run/s"
        # No byte code: a file that changes twice within a second would be taken for the old one.
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYMILTER_ENGINE": engine,
        }
        words = self.words(*arguments, *(["--socket", where] if socket else []))
        self._started.append(Filter(words, where, environment))
        return self._started[-1]

    def end(self) -> None:
        for each in self._started:
            with contextlib.suppress(Exception):
                each.stop()
            each.kill()


@pytest.fixture
def runner(directory: Path) -> Iterator[Runner]:
    """For ``python -m Milter run``."""
    found = Runner(directory)
    yield found
    found.end()
