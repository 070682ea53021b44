"""Programs that serve a filter in their own event loop: serving.py SOCKET PROGRAM [OPTIONS].

PROGRAM is the name of a coroutine function here, OPTIONS a dict, the keywords of ``serve``.
"""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import milter

import Milter
from Milter.testctx import TestCtx


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def on_signal(number: int, call: Callable[..., object], *args: object) -> None:
    """Have the program's loop call it."""
    with warnings.catch_warnings():
        # uvloop up to 0.21 asks asyncio whether it is a coroutine function, of which 3.14 warns.
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.get_running_loop().add_signal_handler(number, call, *args)


class Filter(Milter.Base):
    """Waits at a recipient "<wait@d>" until the program is told to go on."""

    go_on: asyncio.Event

    async def connect(self, host: str, family: Any, address: Any) -> int:
        say("in the program's loop:", threading.current_thread() is threading.main_thread())
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> int:
        if to == "<wait@d>":
            say("waits")
            try:
                await Filter.go_on.wait()
            except asyncio.CancelledError:
                say("cancelled")
                raise
        return Milter.CONTINUE

    def eom(self) -> int:
        self.addheader("X-Served", "in a loop")
        return Milter.ACCEPT


class Aborting(Milter.Base):
    """Its abort does not end before it is cancelled; then its close takes a while."""

    async def envfrom(self, sender: str, *params: str) -> int:
        return Milter.CONTINUE

    async def abort(self) -> int:
        say("abort waits")
        await asyncio.Event().wait()
        return Milter.CONTINUE

    async def close(self) -> int:
        await asyncio.sleep(0.1)
        say("close ended")
        return Milter.CONTINUE


async def aborting(socket: str, **options: Any) -> None:
    Milter.factory = Aborting
    task = asyncio.ensure_future(Milter.serve("serving", socket, **options))
    on_signal(signal.SIGTERM, task.cancel)
    await asyncio.wait([task])


async def beside(socket: str, **options: Any) -> None:
    """Another job goes on; SIGTERM, which is the program's own, cancels."""
    Filter.go_on = asyncio.Event()
    task = asyncio.ensure_future(Milter.serve("serving", socket, **options))
    on_signal(signal.SIGUSR1, say, "signal")
    on_signal(signal.SIGUSR2, Filter.go_on.set)
    on_signal(signal.SIGTERM, task.cancel)
    ticks = 0
    while not task.done():
        await asyncio.wait([task], timeout=0.01)
        ticks += 1
        say("tick", ticks)
    try:
        await task
    except asyncio.CancelledError:
        say("serve was cancelled")


async def stopped(socket: str, **options: Any) -> None:
    """Milter.stop() ends it without an exception."""
    Filter.go_on = asyncio.Event()
    on_signal(signal.SIGTERM, Milter.stop)
    say("serve returned", await Milter.serve("serving", socket, **options))


async def after_stand_in(socket: str, **options: Any) -> None:
    """A test has used the stand-in for a connection before."""
    ctx = TestCtx()
    ctx._connect("client.example")
    ctx._close()
    await stopped(socket)


async def plain(socket: str, **options: Any) -> None:
    """Nothing but serve; whoever runs the loop cancels it, as with Ctrl-C."""
    Filter.go_on = asyncio.Event()
    await Milter.serve("serving", socket, **options)


async def cut_off(socket: str, **options: Any) -> None:
    """The program's main coroutine ends while serve goes on: asyncio.run() cancels all."""
    Filter.go_on = asyncio.Event()
    end = asyncio.Event()
    on_signal(signal.SIGTERM, end.set)
    task = asyncio.ensure_future(Milter.serve("serving", socket, **options))
    await end.wait()
    say("serve goes on", not task.done())


async def twice(socket: str, **options: Any) -> None:
    first = asyncio.ensure_future(Milter.serve("serving", socket))
    await asyncio.sleep(0)
    try:
        await Milter.serve("serving", socket + "2")
    except milter.error as error:
        say("refused:", error)
    first.cancel()
    try:
        await first
    except asyncio.CancelledError:
        say("the first one served")


async def beside_runmilter(socket: str, **options: Any) -> None:
    thread = threading.Thread(target=Milter.runmilter, args=("serving", socket))
    thread.start()
    while not os.path.exists(socket[len("unix:") :]) or not milter._is_running():
        await asyncio.sleep(0.01)
    try:
        await Milter.serve("serving", socket + "2")
    except milter.error as error:
        say("refused:", error)
    Milter.stop()
    thread.join()


async def wrong(socket: str, **options: Any) -> None:
    """An error of setting up comes out of serve, and another one may serve then."""
    for bad in ({"socketname": "inet:nothing"}, {"socket_mode": "x"}):
        try:
            await Milter.serve(**{"name": "serving", "socketname": socket, **bad})
        except (milter.error, TypeError) as error:
            say("refused:", error)
    await stopped(socket)


async def again(socket: str, **options: Any) -> None:
    """One after the other, where the engine can."""
    for number in range(2):
        task = asyncio.ensure_future(Milter.serve("serving", socket))
        while not os.path.exists(socket[len("unix:") :]):
            await asyncio.sleep(0.01)
        say("serves", number)
        await asyncio.wait([task], timeout=0.1)
        task.cancel()
        await asyncio.wait([task])
        say("ended", task.cancelled())


async def cancelled_late(socket: str, **options: Any) -> None:
    """What serves has ended, and the loop did not come to see it before it is cancelled."""
    first = asyncio.ensure_future(Milter.serve("serving", socket))
    while not milter._is_running():
        await asyncio.sleep(0.01)
    Milter.stop()
    (thread,) = [each for each in threading.enumerate() if each.name == "milter-serve"]
    thread.join()
    first.cancel()
    await asyncio.wait([first])
    say("the first one was cancelled", first.cancelled())
    await stopped(socket)


async def without_thread(socket: str, **options: Any) -> None:
    """The system has no thread to give when the first one begins."""
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        threading.Thread.start = start  # type: ignore[method-assign]
        raise RuntimeError("no thread")

    threading.Thread.start = fail  # type: ignore[method-assign]
    try:
        await Milter.serve("serving", socket)
    except RuntimeError as error:
        say("refused:", error, "socket left:", os.path.exists(socket[len("unix:") :]))
    try:
        await stopped(socket)
    except milter.error:
        say("cannot serve again")  # so it is with libmilter


if __name__ == "__main__":
    socket, program, *more = sys.argv[1:]
    Milter.factory = Filter
    options = ast.literal_eval(more[0]) if more else {}
    if program == "outside":
        try:
            Milter.serve("serving", socket).send(None)
        except milter.error as error:
            say("refused:", error)
    elif options.pop("uvloop", False):
        import uvloop

        uvloop.run(globals()[program](socket, **options))
    else:
        asyncio.run(globals()[program](socket, **options))
    say("ends, threads", [t.name for t in threading.enumerate() if "milter" in t.name])
