"""Signs of life while a function takes its time at the end of a message (smfi_progress)."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import milter

#: Seconds after which the MTA is told that the function is still at work, and then again.
SECONDS = 10.0

_news = threading.Condition()
#: Each context whose function runs, and when it is to give the next sign. A dict's single steps
#: need no lock.
_running: dict[Any, float] = {}
_thread: threading.Thread | None = None
_asleep = True  # the thread waits until it is called, or there is none


def begin(ctx: Any) -> None:
    """A function begins to run for a context."""
    _running[ctx] = time.monotonic() + SECONDS
    # While the thread is awake it looks again before this one is due, and need not be called.
    if _asleep:
        _wake()


def end(ctx: Any) -> None:
    """It has returned."""
    _running.pop(ctx, None)


def _wake() -> None:
    global _thread, _asleep
    with _news:
        _asleep = False
        if _thread is None:
            _thread = threading.Thread(target=_watch, name="milter-progress", daemon=True)
            _thread.start()
        else:
            _news.notify()


def _is_called() -> bool:
    return not _asleep


def _watch() -> None:
    global _asleep
    quiet = False  # nothing has run for as long as it slept
    while True:
        now = time.monotonic()
        running = list(_running.items())
        for ctx, at in running:
            if at <= now and ctx in _running:
                _running[ctx] = now + SECONDS
                _tell(ctx)
        with _news:
            next_at = min((at for at in list(_running.values())), default=now + SECONDS)
            _asleep = quiet and not _running
            if _asleep:
                _news.wait_for(_is_called)
            else:
                _news.wait(max(next_at - now, 0))
        quiet = not running and not _running


def _tell(ctx: Any) -> None:
    # Where the connection has ended, the filter hears of it by itself.
    with contextlib.suppress(milter.error):
        ctx.progress()


def _after_fork() -> None:
    global _news, _thread, _asleep
    _news = threading.Condition()
    _running.clear()
    _thread, _asleep = None, True


os.register_at_fork(after_in_child=_after_fork)
