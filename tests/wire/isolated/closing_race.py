"""Threads use contexts while their connections close: errors, never freed memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import milter
from driven import run, wait_until

from Milter.mta import MTA

CONNECTIONS = 60
contexts: list[Any] = []
over = threading.Event()
counts = {"went through": 0, "bad context": 0, "other": 0}
unexpected: list[BaseException] = []

METHODS: list[Callable[[Any], object]] = [
    lambda ctx: ctx.addheader("X", "y" * 1000),
    lambda ctx: ctx.addheader("X", "y", 1),
    lambda ctx: ctx.chgheader("X", 1, "y"),
    lambda ctx: ctx.addrcpt("a@b"),
    lambda ctx: ctx.delrcpt("a@b"),
    lambda ctx: ctx.chgfrom("a@b"),
    lambda ctx: ctx.replacebody(b"y" * 1000),
    lambda ctx: ctx.quarantine("y"),
    lambda ctx: ctx.progress(),
    lambda ctx: ctx.getsymval("i"),
    lambda ctx: ctx.setreply("550", "5.7.1", "a", "b"),
    lambda ctx: ctx.setsymlist(1, "i"),
    lambda ctx: ctx.setpriv(ctx),
    lambda ctx: ctx.getpriv(),
    lambda ctx: (ctx.actions, ctx.protocol),
]


def use(number: int) -> None:
    while not over.is_set():
        for ctx in contexts[-8:]:
            for method in METHODS[number::2]:
                try:
                    method(ctx)
                except milter.error as exc:
                    kind = str(exc) if str(exc) in counts else "other"
                    counts[kind] += 1
                except BaseException as exc:  # noqa: BLE001 - the driver judges it
                    unexpected.append(exc)
                    return
                else:
                    counts["went through"] += 1


def keep(ctx: Any, *args: Any) -> int:
    contexts.append(ctx)
    return milter.CONTINUE


def drive(open_mta: Callable[..., MTA]) -> None:
    users = [threading.Thread(target=use, args=(number % 2,)) for number in range(4)]
    for user in users:
        user.start()
    try:
        for number in range(CONNECTIONS):
            mta = open_mta()
            mta.connect_info(macros={"i": "4XyZ"})
            mta.mail("a@b")
            mta.eoh()
            # While eom runs, threads write to the MTA; it hangs up in the middle of it.
            mta.send_packet(b"E")
            if number % 3:
                mta.read_packet()
            mta.close()
        wait_until(lambda: milter.getdiag()[0] == milter.getdiag()[1])
    finally:
        over.set()
        for user in users:
            user.join()
    assert not unexpected, unexpected
    assert all(counts.values()), counts


if __name__ == "__main__":
    run(
        drive,
        connect=keep,
        eom=lambda ctx: (ctx.getsymval("i"), milter.CONTINUE)[1],
        close=lambda ctx: None,
    )
