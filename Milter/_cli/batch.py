"""Several pieces of work of ``send``, some at a time: results in order, progress, and the end."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from . import streams

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 4  # results that each connection may have waiting for their turn
_PATIENCE = 3.0  # seconds without a word of progress
_INTERVAL = 0.25  # seconds between two


def each(
    work: Callable[[int, T], R], things: Iterable[T], at_once: int, progress: Progress
) -> Generator[R, None, None]:
    """What *work* makes of the number of each thing, from 1, and of the thing itself; in order.

    :param at_once: how many threads work.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="send")
    try:
        for number, thing in enumerate(things, 1):
            waiting.append(pool.submit(work, number, thing))
            if len(waiting) > at_once * _AHEAD:
                yield _result(waiting.popleft(), progress)
        while waiting:
            yield _result(waiting.popleft(), progress)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[R], progress: Progress) -> R:
    while not wait([future], _INTERVAL).done:
        progress.show()
    return future.result()


class Progress:
    """How many are done, on standard error where that is a terminal and it takes a while."""

    def __init__(self) -> None:
        self.done = 0
        self._start = time.monotonic()
        self._last = self._start + _PATIENCE - _INTERVAL
        self._is_shown = False
        self._is_terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def show(self) -> None:
        """Say it, unless it was said just now."""
        now = time.monotonic()
        if not self._is_terminal or now - self._last < _INTERVAL:
            return
        self._last = now
        self._is_shown = True
        rate = self.done / (now - self._start)
        streams.note(f"\r\033[K{self.done} done, {rate:.0f} a second", end="")

    def clear(self) -> None:
        """Make room for something else."""
        if self._is_shown:
            self._is_shown = False
            streams.note("\r\033[K", end="")
