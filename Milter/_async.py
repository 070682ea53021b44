"""Coroutine callbacks: the event loop that awaits what callbacks return.

Imported when the first callback returns an awaitable, by the extension, which calls ``start``, or
``wait`` where the engine cannot suspend the callback; ``hung_up`` where the MTA is gone; and at the
filter's end ``cancel_all``, ``cancel_rest`` and ``end``. The loop has a thread of its own, but
where ``Milter.serve`` serves in that of the program.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import linecache
import os
import signal
import socket
import sys
import threading
from collections import deque

import milter

from . import _awaited, _later
from ._awaited import Callback, Driver
from ._later import close_awaitable
from ._logging import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from types import FrameType
    from typing import Any

    from milter import milterContext

    from ._awaited import Ended

    Place = tuple[str, int, str]  # file, line and function

_HUNG_UP_PATIENCE = 30.0  # seconds to end where the MTA has hung up: nobody waits then
_END_SECONDS = 5.0  # for the thread of the loop, once all tasks were cancelled
_SLOW_SECONDS = 1.0  # a loop that has no time for so long is blocked
_LOOK_SECONDS = 0.25  # how often that is looked at
_FRAMES = 6  # of the application, of which is told then
_LOOPS = ("asyncio.events", "asyncio.base_events", "asyncio.runners")
_STANDARD = os.path.join(os.path.dirname(os.__file__), "")
_OVER = -2  # milter._take_turn: the loop leads no longer

_log = logger()


class Runner:
    """A loop that awaits, and what waits in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.generation = _generation
        self.thread: threading.Thread | None = None  # its own; None: the loop is the program's
        self.ident: int | None = None
        self.watch: threading.Thread | None = None  # looks whether the loop is blocked
        self.stopping = False  # the deadline of the drain is over
        self.ending = False  # the filter has ended
        self.finishing = False  # nothing more may wait
        self.ended = threading.Event()  # nothing more is begun
        self.incoming: deque[Callback] = deque()
        self.called = False  # the loop will look at what comes in
        # By identity, as contexts of tests may compare as they like. The loop's thread's alone.
        self.waiting: dict[int, Callback] = {}
        self.left: set[asyncio.Task[None]] = set()
        self.spare: Driver | None = None
        self.can_lead = True
        self.lead: int | None = None  # the engine's descriptor, while the loop leads
        self.alarm: asyncio.TimerHandle | None = None

    def is_the_parents(self) -> bool:
        """Whether this is the child of a fork."""
        return self.generation != _generation

    def check_that_it_goes_on(self) -> None:
        """A coroutine waits: raise RuntimeError where that is in the child of a fork.

        Its loop would take from the parent's what wakes that, as the two share descriptors; from
        Python 3.14 on no task takes a step there anyway.
        """
        if self.is_the_parents():
            raise RuntimeError("the child of a fork cannot await: the event loop is the parent's")

    # From any thread.

    def start(self, callback: Callback) -> None:
        """Have the loop begin it. One call wakes the loop for all that has come until it looks."""
        callback.runner = self
        self.incoming.append(callback)
        if self.ended.is_set():  # at the filter's end; what came before that, abandon() has seen
            self._leave_off_incoming()
        elif not self.called:
            self.called = True
            try:
                self.loop.call_soon_threadsafe(self._begin_all)
            except RuntimeError:
                self.called = False
                if not self.ended.is_set():
                    self.incoming.remove(callback)
                    raise
                self._leave_off_incoming()

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Have the loop call it; False where the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return False
        return True

    def abandon(self) -> None:
        """The loop does not run, or is blocked: what waits goes on without it."""
        self._leave_off_incoming()
        for callback in list(self.waiting.values()):
            callback.answer(_awaited.STOPPED, None, callback.variables.copy())

    def _leave_off_incoming(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self.incoming.popleft().leave_off()

    # On the loop's thread.

    def _begin_all(self) -> None:
        self.called = False
        while True:
            try:
                callback = self.incoming.popleft()
            except IndexError:
                break
            callback.begin(self)
            if self.finishing:  # a close, after an abort that was cancelled
                callback.cancel(_awaited.STOPPED, _awaited.PATIENCE)
        if self.lead is None:
            self.take_lead()

    def spare_driver(self) -> Driver:
        if self.spare is None or self.spare.is_spoiled():
            self.spare = Driver(self)
        return self.spare

    def take_lead(self) -> None:
        """Have the loop wait for the engine's connections too, where all callbacks are coroutines.

        Then none of them has to be brought here, nor its answer to a thread of the engine.
        """
        if self.stopping or not self.can_lead:
            return
        descriptor = milter._attend(self.first_step)
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

    def first_step(
        self,
        awaitable: Awaitable[Any],
        ctx: milterContext,
        variables: contextvars.Context,
        stage: str,
        is_last: bool,
    ) -> tuple[int, Any]:
        """In a turn, for the extension: take the first step of what a callback returned.

        Args:
            awaitable: see ``start``, like all others.
            ctx: likewise.
            variables: likewise.
            stage: likewise.
            is_last: likewise.

        Returns:
            What has become of it, with the result or the exception; or that it waits, with an
            object whose ``expect`` is to be called with an ``ended`` as that of ``start``.
        """
        if not self.stopping or is_last:
            driver = self.spare_driver()  # a task factory may raise
            coroutine = _awaited.coroutine_of(awaitable)
            try:
                waits_for = driver.first_step(coroutine, variables)
            except StopIteration as end:
                return _awaited.RETURNED, end.value
            except BaseException as error:  # noqa: BLE001 - it is the callback's outcome
                return _awaited.RAISED, _awaited.without_our_frames(error)
            callback = Callback(awaitable, ctx, variables, stage, is_last, _awaited.unexpected)
            callback.wait(self, driver, coroutine, waits_for)
        else:
            callback = Callback(awaitable, ctx, variables, stage, is_last, _awaited.unexpected)
            callback.begin(self)  # which leaves it off
        return _awaited.WAITS, callback

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
                callback.cancel(_awaited.STOPPED, _awaited.PATIENCE)

    def cancel_of(self, ctx: object) -> None:
        for callback in list(self.waiting.values()):
            if callback.ctx is ctx and not callback.is_last:
                callback.cancel(_awaited.HUNG_UP, _HUNG_UP_PATIENCE)

    def cancel_rest(self) -> None:
        """At the end also those of abort and close."""
        self.stopping = True
        self.leave_lead()
        self._begin_all()
        for callback in list(self.waiting.values()):
            callback.cancel(_awaited.STOPPED, _awaited.PATIENCE)

    def finish(self) -> None:
        """Cancel all, and whatever comes after it."""
        self.finishing = True
        self.cancel_rest()

    async def wait_for_rest(self) -> None:
        """Until nothing waits any more."""
        self.loop.call_soon(self.finish)  # not here: first steps are taken in tasks of theirs
        await asyncio.sleep(0)
        end = self.loop.time() + _awaited.PATIENCE
        while True:  # after an abort comes a close
            tasks = [one.task for one in self.waiting.values() if one.task is not None]
            seconds = end - self.loop.time()
            if not tasks or seconds <= 0:
                break
            await asyncio.wait(tasks, timeout=seconds)
        for callback in list(self.waiting.values()):
            callback.give_up()


# --- the loop ------------------------------------------------------------------------------------

_lock = threading.Lock()
_runner: Runner | None = None
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


def _run_until_end(runner: Runner) -> None:
    """Run the loop, whatever a task of the program does to it."""
    while not runner.ending:
        try:
            runner.loop.run_forever()  # returns also where the program has stopped the loop
        except (SystemExit, KeyboardInterrupt) as error:
            _end_filter_with(error)


def _end_filter_with(error: BaseException) -> None:
    """A task has raised it, and it has come through all of asyncio.

    It ends the filter as in a callback, and what waits goes on until then.
    """
    if milter._is_running():
        milter._stop_with(error)
    else:  # the stand-in, in tests
        _log.error("a task raised %s", type(error).__name__, exc_info=error)


def _complete(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, object]) -> None:
    """Run it to its end, whatever a task that is cancelled meanwhile does to the loop."""
    task = loop.create_task(coroutine)
    while not task.done():
        try:
            loop.run_until_complete(task)
        except (SystemExit, KeyboardInterrupt) as error:
            _end_filter_with(error)
        except RuntimeError:
            if task.done():
                raise
            # Else a task has stopped the loop.


def _serve_loop(runner: Runner) -> None:
    """Be the loop's thread, until ``end`` stops it."""
    loop = runner.loop
    asyncio.set_event_loop(loop)
    try:
        _run_until_end(runner)
        _complete(loop, runner.wait_for_rest())
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            _complete(loop, _wait_for(left))
        for task in left:
            if not task.done():
                _log.warning("a task goes on though it was cancelled: %s", task)
                task._log_destroy_pending = False  # type: ignore[attr-defined]
        _complete(loop, loop.shutdown_asyncgens())
    finally:
        runner.ended.set()
        asyncio.set_event_loop(None)
        loop.close()


async def _wait_for(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks, timeout=_awaited.PATIENCE)


def _the_runner() -> Runner:
    """The loop that awaits, which is started here if it is the first time."""
    global _runner
    with _lock:
        if _runner is None:
            runner = Runner(_new_loop())
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
            atexit.register(_end_at_exit)
            _watch(runner)
        return _runner


def bind() -> Runner:
    """Have the running loop await, which is the program's.

    Raises:
        milter.error: no loop runs in this thread, or another one awaits already.
    """
    global _runner
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise milter.error("serve: it must be awaited in a running event loop of asyncio") from None
    end_leftover()
    with _lock:
        if _runner is not None:
            raise milter.error("serve: a filter runs already; there is one to a process")
        _runner = Runner(loop)
    _runner.ident = threading.get_ident()
    _watch(_runner)
    return _runner


@contextlib.contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Have signals wake the loop, even one that comes as it is about to sleep.

    Else Ctrl-C would have to wait for what wakes it next: often, as other threads make that moment
    longer. Where the program's loop sees to it by itself, that stays.
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


async def run_beside(
    runner: Runner, main: Callable[[], object], shut: Callable[[], object]
) -> None:
    """Call what serves on a thread of its own, and wait for it; stop it when that is cancelled.

    Args:
        runner: of the loop that runs.
        main: serves until ``milter.stop()``.
        shut: called instead where there is no thread to be had.
    """
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
        try:
            thread.start()
        except Exception:  # RuntimeError, as the system has no more of them
            shut()
            raise
        with _woken_by_signals(runner.loop):
            while not done.done():
                try:
                    await asyncio.wait([done])
                except asyncio.CancelledError as error:
                    cancelled = error
                    milter.stop()
        thread.join()
        if cancelled is not None:
            milter._forget_stop()  # main() may have ended before it came
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
    runner = _runner
    if runner is not None:
        runner.ended.set()
        try:
            await runner.wait_for_rest()
        finally:
            _take_away(runner)


def _take_away(runner: Runner) -> None:
    """It has ended, and the next callback that waits gets another one."""
    global _runner
    with _lock:
        if _runner is runner:
            _runner = None


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
    _the_runner().start(Callback(awaitable, ctx, variables, stage, is_last, ended))


def wait(
    awaitable: Awaitable[Any],
    ctx: object,
    variables: contextvars.Context,
    stage: str,
    is_last: bool,
    _unused: object = None,
) -> Any:
    """Await it while this thread, which is not the loop's, waits without the interpreter lock.

    Returns what it returns, and raises what it raises. Where it was cancelled, as the filter stops
    or by the program, it returns the verdict that puts the message off.
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

    callback = Callback(awaitable, ctx, variables, stage, is_last, ended)
    runner.start(callback)
    try:
        done.wait()
    except BaseException:  # Ctrl-C in a test
        runner.call(callback.cancel, _awaited.STOPPED, _awaited.PATIENCE)
        raise
    outcome, value, new = found
    if outcome == _awaited.RAISED:
        raise value
    if outcome != _awaited.RETURNED:
        value = milter.TEMPFAIL if _is_in_message(stage) else milter.CONTINUE
    return value, new or variables


def _is_in_message(stage: str) -> bool:
    _, _, in_message = milter._steps()[stage]
    return in_message


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


def cancel_rest() -> None:
    """The time for abort and close is over: cancel them, and a close that follows such an abort."""
    runner = _runner
    if runner is not None:
        runner.call(runner.cancel_rest)


def end() -> None:
    """The filter has ended: end the loop, and wait for its thread; in the program's, for its tasks.

    Where the loop has no time for that, what waits goes on without it.
    """
    runner = _runner
    if runner is None:
        return
    if runner.thread is not None:
        runner.call(runner.stop)
        runner.thread.join(_END_SECONDS)
        if runner.watch is not None and not runner.thread.is_alive():
            runner.watch.join(_SLOW_SECONDS + _LOOK_SECONDS)
        atexit.unregister(_end_at_exit)
        _take_away(runner)
    else:
        done = threading.Event()
        if runner.call(_end_in_program, runner, done):
            done.wait(_END_SECONDS)
    runner.abandon()


def end_leftover() -> None:
    """A filter begins: end the loop that was there for the stand-in, whose it is not."""
    runner = _runner
    if (
        runner is not None
        and runner.thread is not None
        and runner.ident != threading.get_ident()
        and not milter._is_running()
    ):
        end()


def _end_at_exit() -> None:
    """The program ends.

    Where a filter still runs, in a daemon thread, it drains first, and ends the loop: the extension
    sees to that afterwards, as it was registered earlier.
    """
    if not milter._is_running():
        end()


def _end_in_program(runner: Runner, done: threading.Event) -> None:
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


def _watch(runner: Runner) -> None:
    """Where the log is told so much: have a thread look whether the loop is blocked."""
    if _log.isEnabledFor(10):  # logging.DEBUG
        watch = threading.Thread(
            target=_look_for_blocks, args=(runner,), name="milter-loop-watch", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no thread is to be had: the loop does without
            watch.start()
            runner.watch = watch


def _look_for_blocks(runner: Runner) -> None:
    told: set[Place] = set()
    while not runner.ended.wait(_LOOK_SECONDS):
        alive = threading.Event()
        if not runner.call(alive.set):
            return
        if alive.wait(_SLOW_SECONDS):
            continue
        frames = _frames_of_application(sys._current_frames().get(runner.ident or 0))
        if frames and frames[0] not in told:
            told.add(frames[0])
            (file, line, _), *callers = frames
            _log.warning(
                "the event loop of coroutine callbacks is blocked for more than %g s, at %s: %s%s",
                _SLOW_SECONDS,
                _named(frames[0]),
                linecache.getline(file, line).strip() or "(no source)",
                "".join(f"; called at {_named(caller)}" for caller in callers),
            )
        while not alive.wait(_LOOK_SECONDS) and not runner.ended.is_set():
            pass


def _frames_of_application(innermost: FrameType | None) -> list[Place]:
    """Where a thread is: the innermost frame of the application, and then those that led there.

    Those of ours, of asyncio and of the standard library say nothing to whoever wrote the filter.
    Where there are no others, the innermost is all.
    """
    found: list[Place] = []
    frame = innermost
    while frame is not None and len(found) < _FRAMES:
        module = str(frame.f_globals.get("__name__", ""))
        if module in _LOOPS:  # what it was begun by has nothing to do with it
            break
        if _is_application(module, frame.f_code.co_filename):
            found.append(_place_of(frame))
        frame = frame.f_back
    return found or ([] if innermost is None else [_place_of(innermost)])


def _is_application(module: str, file: str) -> bool:
    if module.partition(".")[0] == __package__ or file.startswith("<frozen "):
        return False
    below = file[len(_STANDARD) :] if file.startswith(_STANDARD) else ""
    return not below or below.startswith(("site-packages", "dist-packages"))


def _place_of(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name


def _named(place: Place) -> str:
    return "{}:{} in {}".format(*place)
