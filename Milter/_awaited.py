"""Callbacks that wait, and the tasks that go on with them.

For ``_async``, which has the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import types
from asyncio.tasks import _enter_task, _leave_task, _register_task, _unregister_task
from collections.abc import Coroutine

from ._advice import code_of
from ._later import Later, close_awaitable
from ._logging import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    import contextvars
    from collections.abc import Awaitable, Callable, Iterator
    from typing import Any

    from ._async import Runner

    Ended = Callable[[int, Any, "contextvars.Context | None"], object]
    Taken = tuple[Any, bool]  # what a step waits for, and whether it is a future that is awaited
    _Coroutine = Coroutine[Any, Any, None]
else:
    _Coroutine = Coroutine

# What has become of a callback, as the extension counts them.
RETURNED, RAISED, STOPPED, HUNG_UP, WAITS = range(5)

PATIENCE = 1.0  # seconds that a coroutine gets to end once it was cancelled, as the filter stops
_UNCANCELS = sys.version_info >= (3, 13)  # a task forgets what was taken back in the same step
LAST_SECONDS = 30.0  # for abort and close, of which nobody waits for the answer

_log = logger()


class Callback:
    """A callback that waits. But for ``__init__`` all runs on the loop's thread."""

    __slots__ = (
        "answered",
        "awaitable",
        "cancellation",
        "cancels",
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
        self.waits_for: Taken | None = None  # what its first step waits for, until its task does
        self.cancels = 0  # how many times its task was, when it last took a step
        self.cancellation: BaseException | None = None  # what it was told of that
        self.outcome: int | None = None
        self.value: Any = None
        self.why: int | None = None
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.gives_up_at: float | None = None  # by the loop's clock, once it was cancelled

    def begin(self, runner: Runner) -> None:
        """Take its first step; have a task go on where that does not end it."""
        self.runner = runner
        if runner.stopping and not self.is_last:
            self.leave_off()
            return
        try:
            driver = runner.spare_driver()
        except BaseException as error:  # noqa: BLE001 - of a task factory; the callback is answered
            close_awaitable(self.awaitable)
            self.answer(RAISED, error)
            return
        coroutine = coroutine_of(self.awaitable)
        self.task = driver.task
        try:
            waits_for = driver.first_step(coroutine, self.variables)
            self.wait(runner, driver, coroutine, waits_for)
        except BaseException as end:  # noqa: BLE001 - it is judged
            self.end(end)

    def wait(
        self,
        runner: Runner,
        driver: Driver,
        coroutine: Coroutine[Any, Any, Any],
        waits_for: Taken,
    ) -> None:
        """Have the task go on that was the current one in the first step."""
        self.runner = runner
        self.coroutine = coroutine
        self.waits_for = waits_for
        self.task = driver.task
        runner.waiting[id(self)] = self
        driver.go_on_with(self)
        if self.is_last:
            self.timer = runner.loop.call_later(LAST_SECONDS, self.take_too_long)

    def expect(self, ended: Ended | None) -> None:
        """Say who is told of the end; None: nobody can be, and it is cancelled."""
        if ended is None:
            self.cancel(STOPPED, PATIENCE)
        elif self.outcome is not None:
            ended(self.outcome, self.value, None)
        else:
            self.ended = ended

    # Steps of the task.

    def send(self, value: object) -> object:
        taken, self.waits_for = self.waits_for, None
        if taken is not None:
            return _give_back(taken)
        self.was_cancelled()
        return self.advance(self.coroutine.send, value)

    def throw(self, error: BaseException) -> object:
        taken, self.waits_for = self.waits_for, None
        if taken is not None:  # as a task does that is cancelled while it is in a step
            cancelling = getattr(self.task, "cancelling", None) if _UNCANCELS else None
            if cancelling is not None and not cancelling():
                return _give_back(taken)
            try:
                cancel = getattr(taken[0], "cancel", None)  # it may be anything
                if cancel is not None and cancel(*error.args[:1]):
                    return _give_back(taken)
            except Exception as failure:  # noqa: BLE001 - the coroutine is told of it
                error = failure
        if self.was_cancelled():
            self.cancellation = error
        return self.advance(self.coroutine.throw, error)

    def was_cancelled(self) -> bool:
        """Whether its task was cancelled since its last step; False where Python does not count.

        A number alone does not say so: up to Python 3.12 some of what TaskGroup has handled is
        counted on.
        """
        cancelling = getattr(self.task, "cancelling", None)
        before, self.cancels = self.cancels, 0 if cancelling is None else cancelling()
        return self.cancels > before

    def advance(self, step: Callable[[Any], object], value: object) -> object:
        try:
            waits_for = self.variables.run(step, value)
            self.runner.check_that_it_goes_on()
            return waits_for
        except BaseException as end:  # noqa: BLE001 - SystemExit too, which would end the loop
            self.end(end)
        raise StopIteration

    def end(self, end: BaseException) -> None:
        """It has returned, by a StopIteration, or raised this."""
        outcome, value = self.judge(end)
        if self.runner.is_the_parents():
            # It forked, and this is the child. It ends here, as the extension has it, or by itself
            # where none is there, in tests.
            self.answer(outcome, value)
            os._exit(int(outcome == RAISED))
        self.answer(outcome, value)
        self.task = None  # which has us: no circle shall be left for the garbage collector

    def task_has_ended(self, task: asyncio.Task[None]) -> None:
        """See to it that there is an answer where the task ended before our coroutine began.

        So it is when it is cancelled that early, or a task factory wraps what it is given.
        """
        if not self.answered:
            self.variables.run(self.coroutine.close)
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if task.cancelled():
                self.cancellation = error
            self.end(error or RuntimeError("its task has ended without it"))

    def judge(self, end: BaseException) -> tuple[int, Any]:
        if isinstance(end, StopIteration):
            return RETURNED, end.value
        if isinstance(end, asyncio.CancelledError):
            if self.why is not None:
                return self.why, None
            if end is self.cancellation and not self.runner.stopping:
                # By the program, as when asyncio.run() ends.
                _log.warning(
                    "the %s callback %s was cancelled by the program",
                    self.stage,
                    _place(self.awaitable),
                )
            if end is self.cancellation or self.runner.stopping:
                return STOPPED, None
            # It awaited what was cancelled, which is its own affair.
        # What it raises as it is cancelled is reported, but decides about no message.
        return (RAISED if self.why is None else self.why), without_our_frames(end)

    def leave_off(self) -> None:
        close_awaitable(self.awaitable)
        self.answer(STOPPED, None)

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
        if self.why != HUNG_UP:  # whatever comes after that, nobody waits for an answer
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
            LAST_SECONDS,
        )
        self.cancel(STOPPED, PATIENCE)

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
            self.answer(STOPPED if self.why is None else self.why, None, self.variables.copy())


def _take(waits_for: Any) -> Taken:
    """Take what a first step waits for, as the task will, which does so an iteration later.

    A future that is awaited says so until it was taken. Were that left for the task to see, another
    one that awaits the same future meanwhile would take the word away with it.
    """
    is_awaited = getattr(waits_for, "_asyncio_future_blocking", None) is True
    if is_awaited:
        waits_for._asyncio_future_blocking = False
    return waits_for, is_awaited


def _give_back(taken: Taken) -> Any:
    """For the task, which takes it at once."""
    waits_for, is_awaited = taken
    if is_awaited:
        waits_for._asyncio_future_blocking = True
    return waits_for


def unexpected(_outcome: int, _value: Any, _variables: contextvars.Context | None) -> None:
    """Nobody has said yet who expects the end."""


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def coroutine_of(awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    if type(awaitable) is types.CoroutineType:
        return awaitable
    return _await(awaitable)


class Driver(_Coroutine):
    """What a task runs: nothing at first, then a callback whose first step was taken without it.

    A task takes its first step when the loop has time for it (before Python 3.12 there is no other
    way), and most callbacks need one step and are done. So that step is taken at once, with a spare
    task as the current one, which is for the next callback if this one does not wait.
    """

    __slots__ = ("_callback", "_loop", "_park", "_runner", "task")

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._loop = runner.loop
        self._callback: Callback | None = None
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
    ) -> Taken:
        """Take it; what it waits for. StopIteration, or what it raises, ends the callback."""
        _enter_task(self._loop, self.task)
        try:
            waits_for = variables.run(coroutine.send, None)
            self._runner.check_that_it_goes_on()
            return _take(waits_for)
        finally:
            try:
                _leave_task(self._loop, self.task)
            except RuntimeError:  # from Python 3.14 on in the child of a fork: no loop runs there
                if not self._runner.is_the_parents():
                    raise

    def go_on_with(self, callback: Callback) -> None:
        """The task is this callback's from here on."""
        self._callback = callback
        self._runner.spare = None
        self._show(True)
        if self._park is not None and not self._park.done():
            self._park.set_result(None)
        self._park = None
        if getattr(self.task, "get_coro", lambda: self)() is not self:
            self.task.add_done_callback(callback.task_has_ended)
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
        raised = next(one for one in reversed(error[:2]) if one is not None)  # type, value, ...
        if isinstance(raised, type):
            raised = raised()
        if self._callback is None:
            raise raised
        return self._callback.throw(raised)

    def close(self) -> None:
        """For who ends coroutines."""
        if self._callback is not None:
            self._callback.coroutine.close()

    def __await__(self) -> Any:
        """For a task factory whose tasks run a coroutine of its own, which awaits this one."""
        return self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        # Tools that show tasks ask for cr_frame, cr_code and the like.
        callback = self._callback
        if callback is None:
            raise AttributeError(name)
        return getattr(callback.coroutine, name)


_OURS = (__name__, f"{__package__}._async", f"{__package__}._later")


def without_our_frames(error: BaseException) -> BaseException:
    """The traceback begins in the filter's code."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_globals.get("__name__") in _OURS:
        found = found.tb_next
    return error if found is None else error.with_traceback(found)


def _place(awaitable: object) -> str:
    """Which coroutine it is, for the log."""
    while isinstance(awaitable, Later):
        awaitable = awaitable.awaitable
    code = getattr(awaitable, "cr_code", None) or getattr(awaitable, "gi_code", None)
    code = code or code_of(awaitable)
    if code is None:
        return f"({type(awaitable).__name__})"
    name = getattr(awaitable, "__qualname__", code.co_name)
    return f"{name} ({code.co_filename}, line {code.co_firstlineno})"
