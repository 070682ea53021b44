"""Many connections, with all that callbacks do and get wrong, leave nothing behind.

Texts are long, so that memory of C that is not freed shows in the size of the process.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable
from typing import Any

import milter
from driven import run, wait_until

from Milter.mta import MTA

LONG = "x" * 30_000
ROUNDS = 80
logging.getLogger("milter").addHandler(logging.NullHandler())
logging.getLogger("milter").propagate = False


class Application:
    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx
        self.texts: list[Any] = []


def connect(ctx: Any, *args: Any) -> int:
    application = Application(ctx)
    application.texts += args
    ctx.setpriv(application)
    return milter.CONTINUE


def keep(ctx: Any, *args: Any) -> int:
    application = ctx.getpriv()
    application.texts = [*args, ctx.getsymval("{long}"), ctx.getsymval("none")]
    return milter.CONTINUE


def eom(ctx: Any) -> int:
    ctx.addheader("X-Long", LONG + "\r\n folded\r\n")
    ctx.chgheader("X-Long", 1, LONG)
    ctx.chgfrom(LONG, LONG)
    ctx.addrcpt(LONG, LONG)
    ctx.replacebody(LONG)
    ctx.replacebody(bytearray(30_000))
    ctx.quarantine(LONG)
    ctx.setreply("550", "5.7.1", *["y" * 900] * 20)
    for refused in (
        lambda: ctx.addheader("X", LONG + "\nX-Forged: yes"),
        lambda: ctx.addheader(LONG + ":", LONG),
        lambda: ctx.chgheader("X", -1, LONG),
        lambda: ctx.addrcpt(LONG, LONG + "\n"),
        lambda: ctx.chgfrom(LONG + "\n", LONG),
        lambda: ctx.replacebody(3),
        lambda: ctx.quarantine(LONG + "\r"),
        lambda: ctx.setreply("550", "5.7.1", "y" * 900, LONG),
        lambda: ctx.setreply("550", LONG, LONG),
        lambda: ctx.setreply(LONG),
        lambda: ctx.setreply("550", "5.7.1", *[LONG] * 40),
        lambda: ctx.setsymlist(1, LONG),
        lambda: ctx.getsymval(LONG + "\0"),
    ):
        with contextlib.suppress(milter.error, TypeError):
            refused()
            raise AssertionError("was not refused")
    return milter.CONTINUE


def unknown(ctx: Any, command: str) -> Any:
    if command == "raise":
        raise ValueError(LONG)
    return command  # no verdict


def negotiate(ctx: Any, options: list[int]) -> int:
    ctx.setsymlist(milter.M_DATA, "{long}")
    ctx.setsymlist(milter.M_DATA, b"{long} i")
    options[1] = milter.P_NR_HDR
    return milter.CONTINUE


def session(mta: MTA) -> None:
    params = [f"X-{number}=1" for number in range(30)]
    mta.connect_info(LONG, "/" + "p" * 100, macros={"{long}": LONG})
    mta.helo(LONG)
    mta.unknown("raise")
    mta.unknown("return")
    mta.mail(LONG, *params, macros={"{long}": LONG})
    mta.rcpt(LONG, *params)
    mta.data()
    mta.header("X", LONG)
    mta.eoh()
    mta.body(LONG.encode())
    mta.eom()
    mta.quit_nc()  # and the next session on the same connection
    mta.connect_info(LONG)
    mta.helo(LONG)
    mta.mail(LONG)
    mta.abort()
    mta.quit()


def resident() -> int:
    """KiB of memory that the process takes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def measure(open_mta: Callable[..., MTA]) -> tuple[int, int, int]:
    for _ in range(ROUNDS):
        session(open_mta())
    wait_until(lambda: milter.getdiag()[0] == milter.getdiag()[1])
    gc.collect()
    total = sys.gettotalrefcount() if hasattr(sys, "gettotalrefcount") else 0
    return resident(), sys.getallocatedblocks(), total


def drive(open_mta: Callable[..., MTA]) -> None:
    for _ in range(4):
        measure(open_mta)  # what is only allocated once
    results = [measure(open_mta) for _ in range(4)]
    # Allocators have their ups and downs; what leaks grows every time.
    grown = [
        min(after[kind] - before[kind] for before, after in zip(results, results[1:]))
        for kind in range(3)
    ]
    # Less than one block, or half of a text, for each connection.
    assert grown[0] < ROUNDS * len(LONG) // 2048, f"{grown[0]} KiB more"
    assert grown[1] < ROUNDS, f"{grown[1]} blocks more"
    assert grown[2] < ROUNDS, f"{grown[2]} references more"
    assert not [each for each in gc.get_objects() if isinstance(each, Application)]


if __name__ == "__main__":
    run(
        drive,
        connect=connect,
        helo=keep,
        envfrom=keep,
        envrcpt=keep,
        data=keep,
        header=lambda ctx, *args: (keep(ctx, *args), milter.NOREPLY)[1],
        body=keep,
        eom=eom,
        unknown=unknown,
        negotiate=negotiate,
        abort=lambda ctx: None,
        close=lambda ctx: None,
    )
