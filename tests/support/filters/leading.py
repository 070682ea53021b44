"""Filters all of whose callbacks are coroutines, and others: leading.py SOCKET CLASS [OPTIONS].

OPTIONS is a dict, the keywords of ``runmilter``. Which thread runs a callback is said on standard
output, and other things that happen, a line for each.
"""

from __future__ import annotations

import ast
import asyncio
import contextvars
import functools
import os
import sys
import threading
import time
import warnings
from typing import Any

import Milter
from Milter import _awaited

BEFORE: contextvars.ContextVar[str] = contextvars.ContextVar("BEFORE", default="nothing")


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def where() -> str:
    name = threading.current_thread().name
    return "the loop's thread" if name == "milter-coroutines" else "a thread of the engine"


class Leading(Milter.Base):
    """Coroutines that do nothing, and one that waits."""

    async def connect(self, host: str, family: Any, address: Any) -> int:
        BEFORE.set(host)
        return Milter.CONTINUE

    async def envfrom(self, sender: str, *params: str) -> int:
        say("envfrom on", where(), "after", BEFORE.get())
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> int:
        await asyncio.sleep(0.01)
        say("envrcpt on", where(), "after", BEFORE.get())
        return Milter.REJECT if "no" in to else Milter.CONTINUE

    async def eom(self) -> int:
        self.addheader("X-Before", BEFORE.get())
        return Milter.ACCEPT


class Large(Leading):
    """An answer that is more than any socket takes at once: of 3 MB."""

    async def eom(self) -> int:
        self.replacebody(b"x" * 1_500_000)
        say("half")
        self.replacebody(b"x" * 1_500_000)
        say("written")
        return Milter.ACCEPT


class LargeAfterAwaiting(Large):
    async def eom(self) -> int:
        await asyncio.sleep(0)
        return await super().eom()


class LargeBesidePlain(LargeAfterAwaiting):
    def hello(self, name: str) -> int:
        return Milter.CONTINUE


class Plain(Leading):
    """One callback of the application's is plain, and may block."""

    def hello(self, name: str) -> int:
        say("hello on", where())
        return Milter.CONTINUE


class Negotiating(Leading):
    """The same is true of negotiation."""

    def negotiate(self, opts: list[int]) -> int:
        say("negotiate on", where())
        return super().negotiate(opts)


def waits_for_it(method: Any) -> Any:
    """A plain method of a coroutine, as adapters make it."""

    @functools.wraps(method)
    def wait(*args: Any) -> Any:
        return asyncio.run(method(*args))

    return wait


def in_a_thread(method: Any) -> Any:
    """A coroutine of a plain method."""

    @functools.wraps(method)
    async def wait(*args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, method, *args)

    return wait


class Adapted(Leading):
    """A coroutine within a plain method, which blocks."""

    @Milter.noreply
    @waits_for_it
    async def hello(self, name: str) -> int:
        say("hello on", where())
        return Milter.CONTINUE


class Offloading(Leading):
    """A plain method within a coroutine, and one of our decorators around a coroutine."""

    @in_a_thread
    def hello(self, name: str) -> int:
        say("hello on", threading.current_thread().name.partition("_")[0])
        return Milter.CONTINUE

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        return Milter.CONTINUE


class Assigned(Leading):
    """A plain callback of the instance."""

    def __init__(self) -> None:
        self.hello = lambda name: (say("hello on", where()), Milter.CONTINUE)[1]  # type: ignore[method-assign]


class NoCoroutines(Milter.Base):
    """Of a filter that has several classes."""

    def hello(self, name: str) -> int:
        say("hello on", where())
        return Milter.CONTINUE


class Unusual(Milter.Base):
    """What the sender's name says, in a first step."""

    async def envfrom(self, sender: str, *params: str) -> int:
        task = asyncio.current_task()
        assert task is not None
        if "cancels-and-returns" in sender:
            task.cancel()
        elif "cancels-and-waits" in sender:
            task.cancel()
            await asyncio.Event().wait()
        elif "cancels-and-looks" in sender:
            task.cancel("as it likes")
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError as error:
                say("cancelled", *error.args)
        elif "takes-back" in sender:
            task.cancel()
            task.uncancel()  # type: ignore[attr-defined,unused-ignore]
            await asyncio.sleep(0.01)
        elif "cancels-future" in sender:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        elif "shares" in sender:
            future = asyncio.get_running_loop().create_future()
            others = [asyncio.ensure_future(self.wait(future)) for _ in range(3)]
            asyncio.get_running_loop().call_later(0.01, future.set_result, None)
            await future
            await asyncio.gather(*others)
        elif "raises" in sender:
            raise KeyError("in a first step")
        elif "limit" in sender:
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 0.01)
            except asyncio.TimeoutError:
                self.setreply("450", "4.7.0", "it took too long")
                return Milter.TEMPFAIL
        elif "blocks" in sender:
            say("blocks")
            time.sleep(0.5)
        elif "forks" in sender:
            self.fork()
        return Milter.CONTINUE

    async def wait(self, future: asyncio.Future[None]) -> None:
        await future

    def fork(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that the child lacks
            pid = os.fork()
        if pid:
            say("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    async def envrcpt(self, to: str, *params: str) -> int:
        tasks = len(asyncio.all_tasks())
        say("tasks", tasks, "on", where())
        return Milter.CONTINUE


class Aborting(Milter.Base):
    """Takes its time to abort; nothing else of the connection comes meanwhile."""

    aborts = False

    async def envfrom(self, sender: str, *params: str) -> int:
        say("envfrom", sender, "while it aborts" if self.aborts else "afterwards")
        return Milter.CONTINUE

    async def abort(self) -> int:
        self.aborts = True
        await asyncio.sleep(0.05)
        self.aborts = False
        return Milter.CONTINUE


class NoTask(Milter.Base):
    """A further task is not to be had at once after some senders."""

    async def envfrom(self, sender: str, *params: str) -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def refuse(*args: Any, **options: Any) -> Any:
            loop.set_task_factory(None)
            raise RuntimeError(f"no task on {where()}")

        if "fails" in sender:
            task.cancel()
            loop.set_task_factory(refuse)
        return Milter.CONTINUE

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        return Milter.CONTINUE


class Spoiling(Milter.Base):
    """Cancels its task, which is a new one each time, so that it has not begun."""

    async def envrcpt(self, to: str, *params: str) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if "waits" in to:
            await asyncio.Event().wait()
        return Milter.CONTINUE


class Forking(Milter.Base):
    """Has a child that awaits: in a first step, or in another one where the sender says so."""

    async def envfrom(self, sender: str, *params: str) -> int:
        self.later = "later" in sender
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> int:
        if self.later:
            await asyncio.sleep(0.001)
        if "forks" in to:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads the child lacks
                pid = os.fork()
            if not pid:
                await asyncio.sleep(0)
                say("the child has awaited")
            else:
                say("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return Milter.CONTINUE


class Stuck(Milter.Base):
    """Blocks its loop for good, in no callback's first step."""

    async def envfrom(self, sender: str, *params: str) -> int:
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> int:
        await asyncio.sleep(0)
        say("blocks")
        time.sleep(60)
        return Milter.CONTINUE


class Deaf(asyncio.SelectorEventLoop):
    """A loop that watches no descriptors for others."""

    def add_reader(self, *args: Any) -> None:
        raise NotImplementedError


class Early(asyncio.SelectorEventLoop):
    """A loop that counts milliseconds, as libuv does: its timers may be early by a part of one."""

    def call_later(self, delay: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        return super().call_later(max(delay - 0.00099, 0), *args, **options)


def in_turn() -> Milter.Base:
    """Which class a connection gets may depend on anything."""
    kinds.reverse()
    return kinds[0]()


kinds: list[Any] = [NoCoroutines, Leading]


def wrapping() -> asyncio.AbstractEventLoop:
    """A loop whose tasks await what they are made of, as tools that trace tasks have it."""

    async def wrap(coroutine: Any) -> Any:
        return await coroutine

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        return asyncio.Task(wrap(coroutine), loop=loop, **options)

    loop = asyncio.new_event_loop()
    loop.set_task_factory(make)
    return loop


def eager() -> asyncio.AbstractEventLoop:
    """A loop whose tasks take their first step at once."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    return loop


def be_strict() -> None:
    """As Python 3.14 is: a task is left in a loop that runs, which none does after a fork."""
    leave = _awaited._leave_task

    def leave_task(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        if asyncio._get_running_loop() is not loop:
            raise RuntimeError(f"loop {loop} is not the running loop")
        leave(loop, task)

    _awaited._leave_task = leave_task


if __name__ == "__main__":
    socket, name, *more = sys.argv[1:]
    Milter.factory = globals()[name]
    options: dict[str, Any] = ast.literal_eval(more[0]) if more else {}
    loops = {"deaf": Deaf, "early": Early, "wrapping": wrapping, "eager": eager}
    if options.pop("strict", False):
        be_strict()
    if "loop" in options:
        options["loop_factory"] = loops[options.pop("loop")]
    if options.pop("uvloop", False):
        import uvloop

        options["loop_factory"] = uvloop.new_event_loop
    Milter.runmilter("leading", socket, **options)
    say("served")
