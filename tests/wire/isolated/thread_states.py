"""Each OS thread of libmilter has one thread state, which it gives back when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import milter
from driven import WAIT, is_native, run, thread_states, wait_until

from Milter.mta import MTA

TOGETHER = 30
ROUNDS = 4
go_on = threading.Event()
entered = threading.Semaphore(0)


def helo(ctx: Any, name: str) -> int:
    if name == "wait":
        entered.release()
        assert go_on.wait(WAIT)
    return milter.CONTINUE


def greet(mta: MTA) -> None:
    mta.helo("wait")
    mta.quit()


def occupy_threads(open_mta: Callable[..., MTA]) -> list[threading.Thread]:
    """So many callbacks at a time that each needs a thread of its own."""
    clients = []
    for _ in range(TOGETHER):
        mta = open_mta()
        mta.connect_info()
        clients.append(threading.Thread(target=greet, args=(mta,)))
        clients[-1].start()
        # One after the other: libmilter starts too few threads for many at the same moment.
        assert entered.acquire(timeout=WAIT)
    return clients


def drive(open_mta: Callable[..., MTA]) -> None:
    quiet = []
    for _ in range(ROUNDS):
        before = thread_states()
        clients = occupy_threads(open_mta)
        assert thread_states() >= 2 * TOGETHER + 2  # theirs, ours, main's and this one's
        go_on.set()
        for client in clients:
            client.join(WAIT)
        go_on.clear()
        if not is_native():  # which keeps them for a minute, for the next round
            wait_until(lambda before=before: thread_states() < before + TOGETHER // 2)
        quiet.append(thread_states())
    assert max(quiet) <= quiet[0] + 5, quiet
    many_callbacks_on_few_threads(open_mta)


def many_callbacks_on_few_threads(open_mta: Callable[..., MTA]) -> None:
    before = thread_states()
    for _ in range(50):
        with open_mta() as mta:
            mta.connect_info()
            for _ in range(5):
                mta.helo("again")
    assert thread_states() <= before + 5


if __name__ == "__main__":
    run(drive, connect=lambda ctx, *args: milter.CONTINUE, helo=helo)
