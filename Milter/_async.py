"""Coroutine callbacks: the event loop that awaits what callbacks return.

Imported when the first callback returns an awaitable, by the extension, which calls ``start``, or
``wait`` where the engine cannot suspend the callback; ``hung_up`` where the MTA is gone; and at the
filter's end ``cancel_all`` and ``end``. The loop has a thread of its own, but where
``Milter.serve`` serves in that of the program.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import signal
import socket
import sys
import threading
import traceback
import types
from asyncio.tasks import _enter_task, _leave_task, _register_task, _unregister_task
from collections import deque
from collections.abc import Coroutine

import milter

from . import _later
from ._advice import code_of
from ._later import Later, close_awaitable
from ._logging import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from typing import Any

    from milter import milterContext

    Ended = Callable[[int, Any, "contextvars.Context | None"], object]
    _Coroutine = Coroutine[Any, Any, None]
else:
    _Coroutine = Coroutine

# What has become of a callback, as the extension counts them.
_RETURNED, _RAISED, _STOPPED, _HUNG_UP, _WAITS = range(5)

_PATIENCE = 1.0  # seconds that a coroutine gets to end once it was cancelled, as the filter stops
_HUNG_UP_PATIENCE = 30.0  # the same where the MTA has hung up: nobody waits then
_LAST_SECONDS = 30.0  # for abort and close, of which nobody waits for the answer
_END_SECONDS = 5.0  # for the thread of the loop, once all tasks were cancelled
_SLOW_SECONDS = 1.0  # a loop that has no time for so long is blocked
_LOOK_SECONDS = 0.25  # how often that is looked at
_OVER = -2  # milter._take_turn: the loop leads no longer

_log = logger()


class _Callback:
    """A callback that waits. But for ``__init__`` all runs on the loop's thread."""

    __slots__ = (
        "answered",
        "awaitable",
        "coroutine",
        "ctx",
        "ended",
        "gives_up_at",
        "is_last",
        "outcome",
        "runner",
        "stage",
        "task",
        "timer",
        "value",
        "variables",
        "waits_for",
        "why",
    )

    def __init__(
        self,
        awaitable: Awaitable[Any],
        ctx: object,
        variables: contextvars.Context,
        stage: str,
        is_last: bool,
        ended: Ended,
    ) -> None:
        self.awaitable = awaitable
        self.ctx = ctx
        self.variables = variables
        self.stage = stage
        self.is_last = is_last
        self.ended = ended
        self.answered = False
        self.waits_for: Any = _NOTHING  # what its first step waits for, until its task does
        self.outcome: int | None = None
        self.value: Any = None
        self.why: int | None = None
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.gives_up_at: float | None = None  # by the loop's clock, once it was cancelled

    def begin(self, runner: _Runner) -> None:
        """Take its first step; have a task go on where that does not end it."""
        self.runner = runner
        if runner.stopping and not self.is_last:
            self.leave_off()
            return
        coroutine = _coroutine_of(self.awaitable)
        try:
            driver = runner.spare_driver()
        except BaseException as error:  # noqa: BLE001 - of a task factory; the callback is answered
            if coroutine is not self.awaitable:
                coroutine.close()
            close_awaitable(self.awaitable)
            self.answer(_RAISED, error)
            return
        self.task = driver.task
        try:
            waits_for = driver.first_step(coroutine, self.variables)
        except BaseException as end:  # noqa: BLE001 - it is judged
            self.end(end)
        else:
            self.wait(runner, driver, coroutine, waits_for)

    def wait(
        self,
        runner: _Runner,
        driver: _Driver,
        coroutine: Coroutine[Any, Any, Any],
        waits_for: object,
    ) -> None:
        """Have the task go on that was the current one in the first step."""
        self.runner = runner
        self.coroutine = coroutine
        self.waits_for = waits_for
        self.task = driver.task
        runner.waiting[id(self)] = self
        driver.go_on_with(self)
        if self.is_last:
            self.timer = runner.loop.call_later(_LAST_SECONDS, self.take_too_long)

    def expect(self, ended: Ended | None) -> None:
        """Say who is told of the end; None: nobody can be, and it is cancelled."""
        if ended is None:
            self.cancel(_STOPPED, _PATIENCE)
        elif self.outcome is not None:
            ended(self.outcome, self.value, None)
        else:
            self.ended = ended

    # Steps of the task.

    def send(self, value: object) -> object:
        waits_for, self.waits_for = self.waits_for, _NOTHING
        if waits_for is not _NOTHING:
            return waits_for
        return self.advance(self.coroutine.send, value)

    def throw(self, error: BaseException) -> object:
        waits_for, self.waits_for = self.waits_for, _NOTHING
        if waits_for is not _NOTHING and waits_for is not None and waits_for.cancel():
            return waits_for  # as a task does that is cancelled while it is in a step
        return self.advance(self.coroutine.throw, error)

    def advance(self, step: Callable[[Any], object], value: object) -> object:
        try:
            return self.variables.run(step, value)
        except BaseException as end:  # noqa: BLE001 - SystemExit too, which would end the loop
            self.end(end)
        raise StopIteration

    def end(self, end: BaseException) -> None:
        """It has returned, by a StopIteration, or raised this."""
        outcome, value = self.judge(end)
        if self.runner.generation != _generation:
            # It forked, and this is the child. It ends here, as the extension has it, or by itself
            # where none is there, in tests.
            self.answer(outcome, value)
            os._exit(int(outcome == _RAISED))
        self.answer(outcome, value)
        self.task = None  # which has us: no circle shall be left for the garbage collector

    def judge(self, end: BaseException) -> tuple[int, Any]:
        if isinstance(end, StopIteration):
            return _RETURNED, end.value
        if isinstance(end, asyncio.CancelledError):
            if self.why is not None:
                return self.why, None
            # By the program, as when asyncio.run() ends; or it awaited what was cancelled.
            cancelling = getattr(self.task, "cancelling", None)
            if (cancelling is not None and cancelling() > 0) or self.runner.stopping:
                return _STOPPED, None
        # One that it raises as it is cancelled is reported, but judges no message.
        return (_RAISED if self.why is None else self.why), _without_our_frames(end)

    def leave_off(self) -> None:
        close_awaitable(self.awaitable)
        self.answer(_STOPPED, None)

    def answer(
        self, outcome: int, value: Any, variables: contextvars.Context | None = None
    ) -> None:
        """The callback goes on; the first answer counts."""
        if self.answered:
            return
        self.answered = True
        self.outcome, self.value = outcome, value
        self.runner.waiting.pop(id(self), None)
        if self.timer is not None:
            self.timer.cancel()
        self.ended(outcome, value, variables)

    def cancel(self, why: int, patience: float) -> None:
        """Cancel it; what does not end then goes on alone, and its callback without it."""
        if self.answered:
            return
        if self.why != _HUNG_UP:  # whatever comes after that, nobody waits for an answer
            self.why = why
        if self.task is not None:
            self.task.cancel()
        gives_up_at = self.runner.loop.time() + patience
        if self.gives_up_at is None or gives_up_at < self.gives_up_at:
            if self.timer is not None:
                self.timer.cancel()
            self.gives_up_at = gives_up_at
            self.timer = self.runner.loop.call_at(gives_up_at, self.give_up)

    def take_too_long(self) -> None:
        _log.warning(
            "the %s callback %s was cancelled after %g s",
            self.stage,
            _place(self.awaitable),
            _LAST_SECONDS,
        )
        self.cancel(_STOPPED, _PATIENCE)

    def give_up(self) -> None:
        if not self.answered:
            _log.warning(
                "the %s callback %s goes on though it was cancelled; the connection goes on "
                "without it",
                self.stage,
                _place(self.awaitable),
            )
            if self.task is not None:
                self.runner.left.add(self.task)
                self.task.add_done_callback(self.runner.left.discard)
            # Its task still runs in the connection's variables, which no two may at once.
            self.answer(_STOPPED if self.why is None else self.why, None, self.variables.copy())


_NOTHING = object()


def _unexpected(_outcome: int, _value: Any, _variables: contextvars.Context | None) -> None:
    """Nobody has said yet who expects the end."""


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _coroutine_of(awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    if type(awaitable) is types.CoroutineType:
        return awaitable
    return _await(awaitable)


class _Driver(_Coroutine):
    """What a task runs: nothing at first, then a callback whose first step was taken without it.

    A task takes its first step when the loop has time for it (before Python 3.12 there is no other
    way), and most callbacks need one step and are done. So that step is taken at once, with a spare
    task as the current one, which is for the next callback if this one does not wait.
    """

    __slots__ = ("_callback", "_loop", "_park", "_runner", "task")

    def __init__(self, runner: _Runner) -> None:
        self._runner = runner
        self._loop = runner.loop
        self._callback: _Callback | None = None
        self._park: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] = runner.loop.create_task(self)
        self._show(False)

    def _show(self, on: bool) -> None:
        """Whether asyncio.all_tasks() and a complaint at the end know of the task."""
        (_register_task if on else _unregister_task)(self.task)
        with contextlib.suppress(AttributeError):  # a factory may make what it likes
            self.task._log_destroy_pending = on  # type: ignore[attr-defined]

    def is_spoiled(self) -> bool:
        """Whether somebody has cancelled the task, in a step that ended the callback."""
        if self._park is None:
            return self.task.done() or getattr(self.task, "_must_cancel", False)
        return self._park.done()

    def first_step(
        self, coroutine: Coroutine[Any, Any, Any], variables: contextvars.Context
    ) -> object:
        """Take it; what it waits for. StopIteration, or what it raises, ends the callback."""
        _enter_task(self._loop, self.task)
        try:
            return variables.run(coroutine.send, None)
        finally:
            _leave_task(self._loop, self.task)

    def go_on_with(self, callback: _Callback) -> None:
        """The task is this callback's from here on."""
        self._callback = callback
        self._runner.spare = None
        self._show(True)
        if self._park is not None and not self._park.done():
            self._park.set_result(None)
        self._park = None
        del self.task  # the callback's, and whose coroutine this is

    def send(self, value: Any) -> Any:
        """For the task."""
        if self._callback is not None:
            return self._callback.send(value)
        self._park = self._loop.create_future()
        self._park._asyncio_future_blocking = True
        return self._park

    def throw(self, *error: Any) -> Any:
        """For the task, where it was cancelled or what it waited for has failed."""
        if self._callback is None:
            raise error[0]
        return self._callback.throw(error[0])

    def close(self) -> None:
        """For who ends coroutines."""
        if self._callback is not None:
            self._callback.coroutine.close()

    def __await__(self) -> Any:
        """Nobody awaits it but its task."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        # Tools that show tasks ask for cr_frame, cr_code and the like.
        callback = self._callback
        if callback is None:
            raise AttributeError(name)
        return getattr(callback.coroutine, name)


class _Runner:
    """A loop that awaits, and what waits in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.generation = _generation
        self.thread: threading.Thread | None = None  # its own; None: the loop is the program's
        self.ident: int | None = None
        self.watch: threading.Thread | None = None  # looks whether the loop is blocked
        self.stopping = False  # the deadline of the drain is over
        self.ending = False  # the filter has ended
        self.ended = threading.Event()
        self.incoming: deque[_Callback] = deque()
        self.called = False  # the loop will look at what comes in
        # By identity, as contexts of tests may compare as they like. The loop's thread's alone.
        self.waiting: dict[int, _Callback] = {}
        self.left: set[asyncio.Task[None]] = set()
        self.spare: _Driver | None = None
        self.can_lead = True
        self.lead: int | None = None  # the engine's descriptor, while the loop leads
        self.alarm: asyncio.TimerHandle | None = None

    # From any thread.

    def start(self, callback: _Callback) -> None:
        """Have the loop begin it. One call wakes the loop for all that has come until it looks."""
        callback.runner = self
        self.incoming.append(callback)
        if not self.called:
            self.called = True
            try:
                self.loop.call_soon_threadsafe(self._begin_all)
            except RuntimeError:
                self.called = False
                self.incoming.remove(callback)
                raise

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Have the loop call it; False where the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return False
        return True

    def abandon(self) -> None:
        """The loop does not run, or is blocked: what waits goes on without it."""
        for callback in [*self.incoming, *self.waiting.values()]:
            callback.answer(_STOPPED, None, callback.variables.copy())

    # On the loop's thread.

    def _begin_all(self) -> None:
        self.called = False
        while True:
            try:
                callback = self.incoming.popleft()
            except IndexError:
                break
            callback.begin(self)
        if self.lead is None:
            self.take_lead()

    def spare_driver(self) -> _Driver:
        if self.spare is None or self.spare.is_spoiled():
            self.spare = _Driver(self)
        return self.spare

    def take_lead(self) -> None:
        """Have the loop wait for the engine's connections too, where all callbacks are coroutines.

        Then none of them has to be brought here, nor its answer to a thread of the engine.
        """
        if self.stopping or not self.can_lead:
            return
        descriptor = milter._attend(first_step)
        if descriptor >= 0:
            try:
                self.loop.add_reader(descriptor, self.take_turn)
            except Exception:  # noqa: BLE001 - some loops watch nothing for others; it goes without
                self.can_lead = False
                milter._dismiss()
                os.close(descriptor)
            else:
                self.lead = descriptor

    def take_turn(self) -> None:
        milliseconds = milter._take_turn()
        if milliseconds >= 0:
            if self.alarm is not None:
                self.alarm.cancel()
            self.alarm = self.loop.call_later(milliseconds / 1000, self.take_turn)
        elif milliseconds == _OVER:
            self.leave_lead()

    def leave_lead(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None
        if self.lead is not None:
            self.loop.remove_reader(self.lead)
            os.close(self.lead)
            self.lead = None

    def stop(self) -> None:
        """Have the loop's own thread end it."""
        self.ending = True
        self.loop.stop()

    def cancel_waiting(self) -> None:
        self.stopping = True
        for callback in list(self.waiting.values()):
            if not callback.is_last:
                callback.cancel(_STOPPED, _PATIENCE)

    def cancel_of(self, ctx: object) -> None:
        for callback in list(self.waiting.values()):
            if callback.ctx is ctx and not callback.is_last:
                callback.cancel(_HUNG_UP, _HUNG_UP_PATIENCE)

    def cancel_rest(self) -> None:
        """At the end also those of abort and close."""
        self.stopping = True
        self.leave_lead()
        self._begin_all()
        for callback in list(self.waiting.values()):
            callback.cancel(_STOPPED, _PATIENCE)

    async def wait_for_rest(self) -> None:
        """Until nothing waits any more."""
        self.cancel_rest()
        tasks = [one.task for one in self.waiting.values() if one.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_PATIENCE)
        for callback in list(self.waiting.values()):
            callback.give_up()


def _without_our_frames(error: BaseException) -> BaseException:
    """The traceback begins in the filter's code."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename == __file__:
        found = found.tb_next
    return error if found is None else error.with_traceback(found)


def _place(awaitable: object) -> str:
    """Which coroutine it is, for the log."""
    while isinstance(awaitable, Later):
        awaitable = awaitable.awaitable
    code = getattr(awaitable, "cr_code", None) or code_of(awaitable)
    if code is None:
        return f"({type(awaitable).__name__})"
    name = getattr(awaitable, "__qualname__", code.co_name)
    return f"{name} ({code.co_filename}, line {code.co_firstlineno})"


# --- the loop ------------------------------------------------------------------------------------

_lock = threading.Lock()
_runner: _Runner | None = None
_generation = 0  # of processes: one more in the child of each fork


def _new_loop() -> asyncio.AbstractEventLoop:
    if _later.loop_factory is None:
        return asyncio.new_event_loop()
    loop = _later.loop_factory()
    if not isinstance(loop, asyncio.AbstractEventLoop):
        raise TypeError(
            f"loop_factory must return an event loop of asyncio, not {type(loop).__name__}"
        )
    if loop.is_running() or loop.is_closed():
        state = "runs already" if loop.is_running() else "is closed"
        raise ValueError(f"loop_factory must return a new event loop, not one that {state}")
    return loop


def _run_until_end(runner: _Runner) -> None:
    """Run the loop, whatever a task of the program does to it."""
    while not runner.ending:
        try:
            runner.loop.run_forever()  # returns also where the program has stopped the loop
        except (SystemExit, KeyboardInterrupt) as error:
            # Raised in a task, it comes through all of asyncio. It ends the filter as in a
            # callback, and what waits goes on until then.
            if milter._is_running():
                milter._stop_with(error)
            else:  # the stand-in, in tests
                _log.error("a task raised %s", type(error).__name__, exc_info=error)


def _serve_loop(runner: _Runner) -> None:
    """Be the loop's thread, until ``end`` stops it."""
    loop = runner.loop
    asyncio.set_event_loop(loop)
    try:
        _run_until_end(runner)
        loop.run_until_complete(runner.wait_for_rest())
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=_PATIENCE))
        for task in left:
            if not task.done():
                _log.warning("a task goes on though it was cancelled: %s", task)
                task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        runner.ended.set()
        asyncio.set_event_loop(None)
        loop.close()


def _the_runner() -> _Runner:
    """The loop that awaits, which is started here if it is the first time."""
    global _runner
    with _lock:
        if _runner is None:
            runner = _Runner(_new_loop())
            runner.thread = threading.Thread(
                target=_serve_loop, args=(runner,), name="milter-coroutines", daemon=True
            )
            try:
                runner.thread.start()
            except BaseException:  # no thread is to be had now; perhaps for the next callback
                runner.loop.close()
                raise
            runner.ident = runner.thread.ident
            _runner = runner
            atexit.register(end)
            _watch(runner)
        return _runner


def bind() -> _Runner:
    """Have the running loop await, which is the program's.

    Raises:
        milter.error: no loop runs in this thread, or another one awaits already.
    """
    global _runner
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise milter.error("serve: it must be awaited in a running event loop of asyncio") from None
    with _lock:
        if _runner is not None:
            raise milter.error("serve: a filter runs already; there is one to a process")
        _runner = _Runner(loop)
    _runner.ident = threading.get_ident()
    _watch(_runner)
    return _runner


@contextlib.contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Have signals wake the loop, as it is about to sleep when one comes.

    With other threads about that takes it longer, so that Ctrl-C would often have to wait for what
    wakes it next. Where the program's loop sees to it by itself, that stays.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        try:
            before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        except ValueError:  # not on the main thread, which alone has to do with signals
            yield
            return
        if before != -1:
            signal.set_wakeup_fd(before)
            yield
            return
        loop.add_reader(reader, _drain, reader)
        try:
            yield
        finally:
            now = signal.set_wakeup_fd(-1)
            if now not in (writer.fileno(), -1):
                signal.set_wakeup_fd(now)
            loop.remove_reader(reader)


def _drain(reader: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        reader.recv(4096)


async def run_beside(runner: _Runner, main: Callable[[], object]) -> None:
    """Call what serves on a thread of its own, and wait for it; stop it when that is cancelled."""
    done = runner.loop.create_future()
    failure: list[BaseException] = []
    cancelled: asyncio.CancelledError | None = None

    def run() -> None:
        try:
            main()
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            failure.append(error)
        runner.call(_settle, done)

    thread = threading.Thread(target=run, name="milter-serve", daemon=True)
    milter._leave_signals(True)
    try:
        thread.start()
        with _woken_by_signals(runner.loop):
            while not done.done():
                try:
                    await asyncio.wait([done])
                except asyncio.CancelledError as error:
                    cancelled = error
                    milter.stop()
        thread.join()
    finally:
        milter._leave_signals(False)
    if failure:
        raise failure[0]
    if cancelled is not None:
        raise cancelled


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


async def unbind() -> None:
    """The filter in the program's loop has ended: its tasks end too."""
    global _runner
    with _lock:
        runner, _runner = _runner, None
    if runner is not None:
        runner.ended.set()
        await runner.wait_for_rest()


# --- what the extension calls --------------------------------------------------------------------


def start(
    awaitable: Awaitable[Any],
    ctx: milterContext,
    variables: contextvars.Context,
    stage: str,
    is_last: bool,
    ended: Ended,
) -> None:
    """Have the loop await what a callback returned.

    Args:
        awaitable: what it returned.
        ctx: the connection's context.
        variables: its contextvars context.
        stage: the callback's name.
        is_last: whether nobody waits for its answer, as it is abort or close.
        ended: called on the loop's thread, with what became of it, the value or the exception, and
            the variables that the connection has now, or None where these are the same.
    """
    _the_runner().start(_Callback(awaitable, ctx, variables, stage, is_last, ended))


def first_step(
    awaitable: Awaitable[Any],
    ctx: milterContext,
    variables: contextvars.Context,
    stage: str,
    is_last: bool,
) -> tuple[int, Any]:
    """Take the first step of what a callback returned, on the loop's thread, which leads.

    Args:
        awaitable: see ``start``, like all others.
        ctx: likewise.
        variables: likewise.
        stage: likewise.
        is_last: likewise.

    Returns:
        What has become of it, with the result or the exception; or that it waits, with an object
        whose ``expect`` is to be called with an ``ended`` as that of ``start``.
    """
    runner = _the_runner() if _runner is None else _runner
    if not runner.stopping or is_last:
        coroutine = _coroutine_of(awaitable)
        driver = runner.spare_driver()
        try:
            waits_for = driver.first_step(coroutine, variables)
        except StopIteration as end:
            return _RETURNED, end.value
        except BaseException as error:  # noqa: BLE001 - it is the callback's outcome
            return _RAISED, _without_our_frames(error)
        callback = _Callback(awaitable, ctx, variables, stage, is_last, _unexpected)
        callback.wait(runner, driver, coroutine, waits_for)
    else:
        callback = _Callback(awaitable, ctx, variables, stage, is_last, _unexpected)
        callback.begin(runner)  # which leaves it off
    return _WAITS, callback


def wait(
    awaitable: Awaitable[Any],
    ctx: object,
    variables: contextvars.Context,
    stage: str,
    is_last: bool,
    _unused: object = None,
) -> Any:
    """Await it while this thread, which is not the loop's, waits without the interpreter lock.

    Returns what it returns, and raises what it raises; CONTINUE where the filter stopped meanwhile.
    """
    value = wait_in(awaitable, ctx, variables, stage, is_last)[0]
    return value


def wait_in(
    awaitable: Awaitable[Any],
    ctx: object,
    variables: contextvars.Context,
    stage: str,
    is_last: bool,
) -> tuple[Any, contextvars.Context]:
    """The same; returns also the variables that the connection has afterwards."""
    runner = _the_runner()
    if runner.ident == threading.get_ident():
        close_awaitable(awaitable)
        raise RuntimeError(f"the {stage} callback cannot be waited for in its own event loop")
    done = threading.Event()
    found: list[Any] = []

    def ended(outcome: int, value: Any, new: contextvars.Context | None) -> None:
        if not found:
            found.extend((outcome, value, new))
        done.set()

    callback = _Callback(awaitable, ctx, variables, stage, is_last, ended)
    runner.start(callback)
    try:
        done.wait()
    except BaseException:  # Ctrl-C in a test
        runner.call(callback.cancel, _STOPPED, _PATIENCE)
        raise
    outcome, value, new = found
    if outcome == _RAISED:
        raise value
    return milter.CONTINUE if outcome != _RETURNED else value, new or variables


def hung_up(ctx: milterContext) -> None:
    """The MTA of a connection is gone, and nobody waits for its callback: cancel it."""
    runner = _runner
    if runner is not None:
        runner.call(runner.cancel_of, ctx)


def cancel_all() -> None:
    """The deadline of the drain is over: cancel what still waits; from any thread."""
    runner = _runner
    if runner is not None:
        runner.call(runner.cancel_waiting)


def end() -> None:
    """The filter has ended: end the loop, and wait for its thread; in the program's, for its tasks.

    Where the loop has no time for that, what waits goes on without it.
    """
    global _runner
    with _lock:
        runner = _runner
        if runner is not None and runner.thread is not None:
            _runner = None
    if runner is None:
        return
    if runner.thread is not None:
        runner.call(runner.stop)
        runner.thread.join(_END_SECONDS)
        if runner.watch is not None and not runner.thread.is_alive():
            runner.watch.join(_SLOW_SECONDS + _LOOK_SECONDS)
        atexit.unregister(end)
    else:
        done = threading.Event()
        if runner.call(_end_in_program, runner, done):
            done.wait(_END_SECONDS)
    runner.abandon()


def _end_in_program(runner: _Runner, done: threading.Event) -> None:
    task = runner.loop.create_task(runner.wait_for_rest())
    task.add_done_callback(lambda _: done.set())


def _forget() -> None:
    """In the child of a fork: the loop and its thread are the parent's."""
    global _generation, _lock, _runner
    _lock = threading.Lock()
    _runner = None
    _generation += 1


os.register_at_fork(after_in_child=_forget)


# --- a loop that is blocked ----------------------------------------------------------------------


def _watch(runner: _Runner) -> None:
    """Where the log is told so much: have a thread look whether the loop is blocked."""
    if _log.isEnabledFor(10):  # logging.DEBUG
        watch = threading.Thread(
            target=_look_for_blocks, args=(runner,), name="milter-loop-watch", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no thread is to be had: the loop does without
            watch.start()
            runner.watch = watch


def _look_for_blocks(runner: _Runner) -> None:
    told: set[tuple[str, int]] = set()
    while not runner.ended.wait(_LOOK_SECONDS):
        alive = threading.Event()
        if not runner.call(alive.set):
            return
        if alive.wait(_SLOW_SECONDS):
            continue
        frame = sys._current_frames().get(runner.ident or 0)
        place = ("?", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
        if frame is not None and place not in told:
            told.add(place)
            stack = "".join(traceback.format_stack(frame, 20)).rstrip()
            _log.warning(
                "the event loop of coroutine callbacks is blocked for more than %g s, at:\n%s",
                _SLOW_SECONDS,
                stack,
            )
        while not alive.wait(_LOOK_SECONDS) and not runner.ended.is_set():
            pass
