"""Filter classes with coroutine callbacks: coroutines.py SOCKET CLASS [OPTIONS].

OPTIONS is a dict, the keywords of ``runmilter``.

What happens is said on standard output, a line for each event.
"""

from __future__ import annotations

import ast
import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import threading
import types
import warnings
from typing import Any, ClassVar

import milter

import Milter
from Milter import _async, _awaited
from Milter.testctx import TestCtx


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


CLIENT: contextvars.ContextVar[str] = contextvars.ContextVar("CLIENT", default="nobody")


class EachStep(Milter.Base):
    """Coroutines in all steps, one after the other, with an action and a plain one between."""

    async def connect(self, host: str, family: Any, address: Any) -> int:
        CLIENT.set(host)
        self.steps = ["connect"]
        await asyncio.sleep(0)
        return Milter.CONTINUE

    async def hello(self, name: str) -> int:
        self.steps.append("hello")
        return Milter.CONTINUE

    def envfrom(self, sender: str, *params: str) -> Any:
        return self.answer("envfrom")  # a plain method that returns an awaitable

    async def answer(self, step: str) -> int:
        await asyncio.sleep(0.001)
        self.steps.append(step)
        return Milter.CONTINUE

    def envrcpt(self, to: str, *params: str) -> int:
        self.steps.append("envrcpt")
        return Milter.CONTINUE

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        await asyncio.sleep(0)
        self.steps.append("header")
        return Milter.CONTINUE

    async def eom(self) -> int:
        await asyncio.create_task(self.act())
        return Milter.ACCEPT

    async def act(self) -> None:
        self.addheader("X-Steps", " ".join(self.steps))
        self.addheader("X-Client", CLIENT.get())

    async def close(self) -> int:
        await asyncio.sleep(0)
        say("closed", CLIENT.get())
        return Milter.CONTINUE


class AllSteps(Milter.Base):
    """Each callback but negotiate is a coroutine."""

    async def note(self, step: str) -> int:
        await asyncio.sleep(0)
        say("step", step)
        return Milter.CONTINUE

    async def connect(self, host: str, family: Any, address: Any) -> int:
        return await self.note("connect")

    async def hello(self, name: str) -> int:
        return await self.note("hello")

    async def envfrom(self, sender: str, *params: str) -> int:
        return await self.note("envfrom")

    async def envrcpt(self, to: str, *params: str) -> int:
        return await self.note("envrcpt")

    async def data(self) -> int:
        return await self.note("data")

    async def header(self, name: str, value: str) -> int:
        return await self.note("header")

    async def eoh(self) -> int:
        return await self.note("eoh")

    async def body(self, chunk: bytes) -> int:
        return await self.note("body")

    async def eom(self) -> int:
        return await self.note("eom")

    async def unknown(self, command: str) -> int:
        return await self.note("unknown")

    async def abort(self) -> int:
        return await self.note("abort")

    async def close(self) -> int:
        return await self.note("close")


class Acting(Milter.Base):
    """Each action, with other work of the loop between them; some in tasks that are awaited."""

    async def envrcpt(self, to: str, *params: str) -> int:
        await asyncio.sleep(0)
        self.macro = self.getsymval("{rcpt_addr}")
        return Milter.CONTINUE

    async def eom(self) -> int:
        await asyncio.gather(self.change_headers(), asyncio.create_task(self.change_envelope()))
        self.progress()
        await asyncio.sleep(0)
        self.replacebody("new\r\n")
        await asyncio.sleep(0)
        self.quarantine("held")
        return Milter.CONTINUE

    async def change_headers(self) -> None:
        self.addheader("X-Macro", str(self.macro))
        self.addheader("X-First", "1", 0)
        self.chgheader("Subject", 1, None)
        await asyncio.sleep(0)

    async def change_envelope(self) -> None:
        await asyncio.sleep(0)
        self.chgfrom("<x@b>")
        self.addrcpt("<y@d>")
        await asyncio.sleep(0)
        self.delrcpt("<c@d>")


class Failing(Milter.Base):
    """What the recipient's name says goes wrong."""

    async def envrcpt(self, to: str, *params: str) -> Any:
        await asyncio.sleep(0)
        if "raise" in to:
            raise KeyError("of the coroutine")
        if "none" in to:
            return None
        if "reply" in to:
            self.setreply("550", "5.7.1", "not you")
            return Milter.REJECT
        return Milter.CONTINUE


class Meeting(Milter.Base):
    """Each recipient waits until 40 are there: none of them comes on if one blocks the others."""

    here = 0
    all_here: asyncio.Event

    async def envrcpt(self, to: str, *params: str) -> int:
        if Meeting.here == 0:
            Meeting.all_here = asyncio.Event()
        Meeting.here += 1
        if Meeting.here == 40:
            say("threads", len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0)
            Meeting.all_here.set()
        await Meeting.all_here.wait()
        return Milter.CONTINUE


class Sharing(Milter.Base):
    """Awaits first of all what others await too: three tasks, or the recipients of all connections.

    What it is the recipient's name says.
    """

    here = 0
    lookup: ClassVar[asyncio.Future[int] | None] = None

    async def envrcpt(self, to: str, *params: str) -> int:
        kind = to.strip("<>").partition("@")[0]
        loop = asyncio.get_running_loop()
        if kind == "nothing":
            return Milter.CONTINUE
        if kind == "lookup":
            return await self.look_up()
        event = asyncio.Event()
        lock, queue, future = asyncio.Lock(), asyncio.Queue[int](), loop.create_future()
        condition = asyncio.Condition(lock)
        task = asyncio.ensure_future(self.wait(event))
        if kind == "done":
            future.set_result(None)

        async def wait() -> None:
            if kind in ("future", "done"):
                await future
            elif kind == "task":
                await task
            elif kind == "event":
                await event.wait()
            elif kind == "queue":
                queue.put_nowait(await queue.get() - 1)
            elif kind == "condition":
                async with condition:
                    await condition.wait()
            else:
                async with lock:
                    await asyncio.sleep(0)

        others = [asyncio.ensure_future(wait()) for _ in range(3)]
        settled = asyncio.ensure_future(self.settle(event, future, queue, condition))
        await wait()
        await asyncio.gather(task, settled, *others)
        return Milter.CONTINUE

    async def settle(self, event: Any, future: Any, queue: Any, condition: Any) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        event.set()
        queue.put_nowait(4)
        if not future.done():
            future.set_result(None)
        async with condition:
            condition.notify_all()

    async def wait(self, event: asyncio.Event) -> None:
        await event.wait()

    def look_up(self) -> asyncio.Future[int]:
        """The answer for all that ask until it is there, which is when eight do."""
        Sharing.here += 1
        if Sharing.here % 8 == 1:
            Sharing.lookup = asyncio.get_running_loop().create_future()
        assert Sharing.lookup is not None
        if Sharing.here % 8 == 0:
            Sharing.lookup.set_result(Milter.REJECT)
        return Sharing.lookup


@types.coroutine
def wait_by_generator(result: int) -> Any:
    """As the libraries do that know more than one kind of loop."""
    yield
    return result


class Generating(Milter.Base):
    """What is to be awaited is a generator."""

    def envfrom(self, sender: str, *params: str) -> Any:
        return wait_by_generator(Milter.CONTINUE)

    @types.coroutine
    def envrcpt(self, to: str, *params: str) -> Any:
        yield from asyncio.sleep(0).__await__()
        return Milter.REJECT

    @Milter.noreply
    def header(self, name: str, value: str) -> Any:
        return wait_by_generator(Milter.CONTINUE)

    def eom(self) -> Any:
        yield
        return Milter.REJECT


class Waiting(Milter.Base):
    """Never ends by itself."""

    async def envrcpt(self, to: str, *params: str) -> int:
        say("waits")
        try:
            await asyncio.Event().wait()
        finally:
            say("cancelled")
        return Milter.CONTINUE


class WaitingUnanswered(Milter.Base):
    """Never ends by itself, in a step without reply, as those up to the end of the message are."""

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        say("waits")
        try:
            await asyncio.Event().wait()
        finally:
            say("cancelled")
        return Milter.CONTINUE

    @Milter.noreply
    def eoh(self) -> int:
        return Milter.CONTINUE

    @Milter.noreply
    def body(self, chunk: bytes) -> int:
        return Milter.CONTINUE

    def eom(self) -> int:
        say("eom")
        return Milter.ACCEPT


class LeadingUnanswered(WaitingUnanswered):
    """All are coroutines, so that their loop leads the native engine."""

    @Milter.noreply
    async def eoh(self) -> int:
        return Milter.CONTINUE

    @Milter.noreply
    async def body(self, chunk: bytes) -> int:
        return Milter.CONTINUE

    async def eom(self) -> int:
        say("eom")
        return Milter.ACCEPT

    async def close(self) -> int:
        return Milter.CONTINUE


class Mixed(Milter.Base):
    """A plain callback sets a variable, coroutines read and set it, a plain one reads it."""

    def connect(self, host: str, family: Any, address: Any) -> int:
        CLIENT.set(host)
        return Milter.CONTINUE

    async def envfrom(self, sender: str, *params: str) -> int:
        await asyncio.sleep(0)
        self.first = CLIENT.get()
        CLIENT.set(f"{self.first}+{sender}")
        return Milter.CONTINUE

    def eom(self) -> int:
        self.addheader("X-Client", CLIENT.get())
        return Milter.ACCEPT


class PlainAlone(Milter.Base):
    """Plain callbacks set a variable and read it."""

    def connect(self, host: str, family: Any, address: Any) -> int:
        self.seen = [CLIENT.get()]
        CLIENT.set(host)
        return Milter.CONTINUE

    def hello(self, name: str) -> int:
        self.seen.append(CLIENT.get())
        return Milter.CONTINUE

    def eom(self) -> int:
        self.addheader("X-Seen", " ".join([*self.seen, CLIENT.get()]))
        return Milter.ACCEPT


class Returning(PlainAlone):
    """Nobody knows of the coroutine before it is returned."""

    def envfrom(self, sender: str, *params: str) -> Any:
        return self.answer()

    async def answer(self) -> int:
        await asyncio.sleep(0)
        self.seen.append(CLIENT.get())
        return Milter.CONTINUE


def hidden(method: Any) -> Any:
    """A decorator that does not say what it decorates."""

    def call(self: Any, *args: Any) -> Any:
        return method(self, *args)

    return call


class Hidden(PlainAlone):
    @hidden
    async def envfrom(self, sender: str, *params: str) -> int:
        await asyncio.sleep(0)
        self.seen.append(CLIENT.get())
        return Milter.CONTINUE


class NegotiatingAlone(PlainAlone):
    """Nobody looks at the class, as its negotiate leaves that out."""

    def negotiate(self, opts: list[int]) -> int:
        self._actions, self._protocol = opts[0], 0
        opts[1:] = [0] * len(opts[1:])
        return Milter.CONTINUE

    async def envfrom(self, sender: str, *params: str) -> int:
        self.seen.append(CLIENT.get())
        return Milter.CONTINUE


class InTurn(Milter.Base):
    """Headers come without waiting for an answer; their coroutines must not overlap."""

    busy = 0
    most = 0
    count = 0

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        self.busy += 1
        self.most = max(self.most, self.busy)
        for _ in range(3):
            await asyncio.sleep(0)
        self.busy -= 1
        self.count += 1
        return Milter.CONTINUE

    async def eom(self) -> int:
        self.addheader("X-Most", f"{self.most} of {self.count}")
        return Milter.ACCEPT


class Decorated(Milter.Base):
    """The decorators, each on a coroutine."""

    @Milter.nocallback
    async def hello(self, name: str) -> int:
        return Milter.CONTINUE

    @Milter.symlist("{client_ptr}", "i")
    async def envfrom(self, sender: str, *params: str) -> int:
        return Milter.CONTINUE

    @Milter.decode("bytes")
    async def envrcpt(self, to: bytes, *params: bytes) -> int:
        say("recipient", to)
        return Milter.CONTINUE

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        return Milter.REJECT


class HangingUp(Milter.Base):
    """Waits for ever in the step that the client's name says."""

    async def connect(self, host: str, family: Any, address: Any) -> int:
        self.where = host
        return await self.step("connect")

    async def step(self, name: str) -> int:
        if name == self.where:
            say("waits in", name)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                say("cancelled in", name)
                raise
        return Milter.CONTINUE

    async def envfrom(self, sender: str, *params: str) -> int:
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> int:
        return await self.step("envrcpt")

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        return await self.step("header")

    async def eom(self) -> int:
        return await self.step("eom")

    async def abort(self) -> int:
        await asyncio.sleep(0.01)
        say("aborted")
        return Milter.CONTINUE

    async def close(self) -> int:
        await asyncio.sleep(0.01)
        say("closed")
        return Milter.CONTINUE


class Twice(Milter.Base):
    """Waits in each header, and answers though it was cancelled: the MTA is gone all the same."""

    count = 0

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        self.count += 1
        if self.count == 1:
            say("waits")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say("cancelled", self.count)
        return Milter.CONTINUE

    def abort(self) -> int:
        say("aborted")
        return Milter.CONTINUE


class Grumbling(Milter.Base):
    """Raises another exception as it is cancelled, as libraries do that wrap what happens."""

    async def envrcpt(self, to: str, *params: str) -> int:
        say("waits")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise KeyError("of the library") from None
        return Milter.CONTINUE

    def abort(self) -> int:
        say("aborted")
        return Milter.CONTINUE

    def close(self) -> int:
        say("closed")
        return Milter.CONTINUE


class Itself(Milter.Base):
    """Cancels its own task, in a step without reply."""

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return Milter.CONTINUE


class Odd:
    """What no task can wait for."""

    def __await__(self) -> Any:
        yield 3


class Ungrateful(Odd):
    """Nor can it be cancelled."""

    def __await__(self) -> Any:
        yield self

    def cancel(self) -> None:
        raise KeyError("of what is awaited")


class Cancelled(Milter.Base):
    """Something is cancelled; what it is the recipient's name says."""

    async def envrcpt(self, to: str, *params: str) -> int:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        if "later" in to:
            await asyncio.sleep(0)
        if "itself" in to:
            task.cancel()
            await asyncio.sleep(0)
        elif "group" in to:
            await self.fail_in_a_group()
        if "odd" in to:
            task.cancel()
            await Odd()
        elif "ungrateful" in to:
            task.cancel()
            await Ungrateful()
        other = asyncio.ensure_future(asyncio.Event().wait())
        loop.call_soon(other.cancel)
        await other
        return Milter.CONTINUE

    async def fail_in_a_group(self) -> None:
        """Leaves asyncio counting the task as cancelled, up to Python 3.12."""

        async def fail() -> None:
            raise KeyError("of a group")

        try:
            async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined,unused-ignore]
                group.create_task(fail())
                group.create_task(asyncio.Event().wait())
        except Exception as error:  # noqa: BLE001 - its class is not there before Python 3.11
            say(type(error).__name__)


class Stubborn(Milter.Base):
    """Does not end when it is cancelled, in the step that the client's name says."""

    async def connect(self, host: str, family: Any, address: Any) -> int:
        self.where = host
        return Milter.CONTINUE

    async def stay(self, step: str) -> int:
        if step == self.where:
            say("waits")
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    say("swallowed")
                    try:
                        await asyncio.Event().wait()
                    finally:
                        self.try_to_act()
        return Milter.CONTINUE

    def try_to_act(self) -> None:
        try:
            self.addheader("X-Late", "1")
        except milter.error as error:
            say("refused:", error)

    async def eom(self) -> int:
        return await self.stay("eom")

    async def close(self) -> int:
        return await self.stay("close")


class Impatient(Stubborn):
    """The same where not much time is given."""


class Leftover(Milter.Base):
    """A task that goes on after its callback."""

    async def eom(self) -> int:
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self.later())
        return Milter.ACCEPT

    async def later(self) -> None:
        await self.go.wait()
        try:
            self.addheader("X-Late", "1")
        except milter.error as error:
            say("refused:", error)

    async def envfrom(self, sender: str, *params: str) -> int:
        if hasattr(self, "go"):
            self.go.set()
            await self.task
        return Milter.CONTINUE


class Pausing(Milter.Base):
    """Takes 200 ms for each recipient, and for the end of each message."""

    waiting = most = 0  # callbacks at a time

    async def pause(self) -> None:
        cls = type(self)
        cls.waiting += 1
        cls.most = max(cls.most, cls.waiting)
        await asyncio.sleep(0.2)
        cls.waiting -= 1

    async def envrcpt(self, to: str, *params: str) -> int:
        say("waits")
        await self.pause()
        return Milter.CONTINUE

    async def eom(self) -> int:
        await self.pause()
        say(f"together: {self.most}")
        self.addheader("X-Paused", "twice")
        return Milter.CONTINUE


class Background(Milter.Base):
    """Leaves a task running, which ends with the filter."""

    tasks: ClassVar[set[Any]] = set()

    async def envfrom(self, sender: str, *params: str) -> int:
        Background.tasks.add(asyncio.create_task(self.run()))
        await asyncio.sleep(0)
        return Milter.CONTINUE

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            say("background ended")


class ExitingAtEnd(Background):
    """A task of it exits as it is cancelled at the filter's end, while others end."""

    async def envfrom(self, sender: str, *params: str) -> int:
        Background.tasks.add(asyncio.create_task(self.exit()))
        return await super().envfrom(sender, *params)

    async def exit(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            sys.exit(5)

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            say("background ended")


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


class FailingWithin(Milter.Base):
    """Fails where there is something of ours around the coroutine: a decorator, and in close."""

    @Milter.noreply
    async def header(self, name: str, value: str) -> int:
        raise KeyError("of header")

    async def close(self) -> int:
        await asyncio.sleep(0)
        raise KeyError("of close")


class Blocking(Milter.Base):
    """Blocks the loop, in the standard library."""

    async def envfrom(self, sender: str, *params: str) -> int:
        await self.wait()
        return Milter.CONTINUE

    async def wait(self) -> None:
        subprocess.run(["sleep", "1.5"], check=True)  # in the loop


class Negotiating(Milter.Base):
    """A mistake: negotiation is no coroutine."""

    async def negotiate(self, opts: list[int]) -> int:  # type: ignore[override]
        return Milter.CONTINUE


class Nested(Milter.Base):
    """A mistake: a coroutine returns one."""

    async def step(self) -> int:
        return Milter.CONTINUE

    async def envfrom(self, sender: str, *params: str) -> Any:
        return self.step()


class Meddling(Milter.Base):
    """Does to the loop what the recipient's name says."""

    async def envrcpt(self, to: str, *params: str) -> int:
        if "stop" in to:
            asyncio.get_running_loop().stop()
        elif "exit" in to:
            Background.tasks.add(asyncio.create_task(self.exit()))
        elif "fork" in to:
            self.fork()
        await asyncio.sleep(0)
        return Milter.CONTINUE

    async def exit(self) -> None:
        sys.exit(3)

    def fork(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that the child lacks
            pid = os.fork()
        if pid:
            say("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


class Exiting(Milter.Base):
    async def envfrom(self, sender: str, *params: str) -> int:
        await asyncio.sleep(0)
        sys.exit(3)


def make_loop() -> asyncio.AbstractEventLoop:
    say("a loop is made in", os.getpid())
    return asyncio.new_event_loop()


def make_failing_loop() -> asyncio.AbstractEventLoop:
    """Its first task cannot be made."""
    loop = asyncio.new_event_loop()

    def fail(*args: Any, **kwargs: Any) -> Any:
        loop.set_task_factory(None)
        raise RuntimeError("no task")

    loop.set_task_factory(fail)
    return loop


def lack_a_thread() -> None:
    """The first thread cannot be started."""
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        threading.Thread.start = start  # type: ignore[method-assign]
        raise RuntimeError("no thread")

    threading.Thread.start = fail  # type: ignore[method-assign]


def run_raw(socket: str) -> None:
    """The extension alone, without classes."""

    async def answer(ctx: Any, *args: Any) -> int:
        await asyncio.sleep(0)
        say("raw", len(args))
        return milter.REJECT if args and args[0] == b"<no@d>" else milter.CONTINUE

    for name in ("connect", "helo", "envfrom", "envrcpt", "header", "eoh", "body", "eom", "abort"):
        getattr(milter, f"set_{name}_callback")(answer)
    milter.set_close_callback(answer)
    milter.register("raw", unknown=answer, data=answer)
    milter.setconn(socket)
    milter.main()


def use_stand_in() -> None:
    """A session without a filter, as tests have it."""
    ctx = TestCtx()
    ctx._connect("client.example")
    ctx._close()


def run_in_daemon_thread(socket: str, **options: Any) -> None:
    """The program ends on SIGUSR1, with the filter still there."""
    end = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: end.set())
    threading.Thread(
        target=Milter.runmilter, args=("coroutines", socket), kwargs=options, daemon=True
    ).start()
    end.wait()
    say("the program ends")


if __name__ == "__main__":
    socket, name, *more = sys.argv[1:]
    if name == "raw":
        run_raw(socket)
        sys.exit()
    Milter.factory = globals()[name]
    options: dict[str, Any] = ast.literal_eval(more[0]) if more else {}
    if name == "Impatient":
        _async._HUNG_UP_PATIENCE = _awaited.PATIENCE = _awaited.LAST_SECONDS = 0.2
    if options.pop("make_loop", False):
        options["loop_factory"] = make_loop
    if options.pop("failing_loop", False):
        options["loop_factory"] = make_failing_loop
    if options.pop("no_thread", False):
        lack_a_thread()
    if "policy" in options:
        milter.set_exception_policy(getattr(milter, options.pop("policy")))
    if options.pop("uvloop", False):
        import uvloop

        options["loop_factory"] = uvloop.new_event_loop
    if options.pop("stand_in", False):
        use_stand_in()
    if options.pop("daemon", False):
        run_in_daemon_thread(socket, **options)
        sys.exit()
    Milter.runmilter("coroutines", socket, **options)
    say("loops left", [t.name for t in threading.enumerate() if "coroutines" in t.name])
