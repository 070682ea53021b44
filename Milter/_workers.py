"""Serve with several processes: the supervisor, and what a worker does around ``main()``.

The listening socket is opened once, here; each worker is forked from this process and runs its
own libmilter on the inherited descriptor. The supervisor has no thread but its own, holds the
other end of each worker's lifeline, and waits: for a worker to end, a signal, or a stop.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import operator
import os
import select
import signal
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import milter

from ._logging import logger

_log = logger("milter.workers")

MAX_WORKERS = 512

#: A worker that serves for less than this many seconds has "died at once".
QUICK = 2.0
#: Seconds to wait before a worker is started anew after so many such deaths; then the last.
PAUSES = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
#: So many such deaths in a row are too many where no other worker serves.
TOO_MANY = 5
#: Seconds that a worker may take, beyond the drain timeout, until it is killed.
GRACE = 3.0
#: So many exceptions in the supervisor itself, and it lets go of all.
MAX_FAILURES = 20
#: Seconds between looks at the workers where the system does not tell of their end.
LOOK = 0.1

#: Asks a process to end, if it has no handler of its own.
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Where the application handles these, its handler runs in the workers too.
_PASSED_ON = (*_STOPS, signal.SIGUSR1, signal.SIGUSR2)

#: What a worker reports: 'r', it is ready, or 's', it was told to stop the filter; and its pid.
_REPORT = struct.Struct("@ci")


def worker_count(workers: object) -> int:
    """How many processes ``workers=`` stands for; 0 is one per core that this process may use.

    Raises:
        TypeError: it is no int.
        milter.InvalidArgument: it is negative or too high.
    """
    if isinstance(workers, bool):
        raise TypeError(f"workers must be an int, not {workers!r}")
    try:
        count = operator.index(workers)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"workers must be an int, not {workers!r}") from None
    if not 0 <= count <= MAX_WORKERS:
        raise milter.InvalidArgument(
            f"workers must be from 0 (one per core) to {MAX_WORKERS}, not {workers!r}"
        )
    if count == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        count = min(cores or 1, MAX_WORKERS)
    return count


def check_worker_init(worker_init: object) -> None:
    """Raise TypeError where ``worker_init=`` is neither None nor callable."""
    if worker_init is not None and not callable(worker_init):
        raise TypeError(f"worker_init must be callable or None, not {worker_init!r}")


def check_pinning(pin: object) -> None:
    """Refuse ``pin_workers=`` where it is no bool, or the system cannot do it.

    Raises:
        TypeError: it is no bool.
        milter.error: processes cannot be bound to a core here.
    """
    if not isinstance(pin, bool):
        raise TypeError(f"pin_workers must be True or False, not {pin!r}")
    if pin and not hasattr(os, "sched_setaffinity"):
        raise milter.error("pin_workers: this system does not bind processes to a core")


def check_threads() -> None:
    """Refuse to fork a process in which other threads run.

    A thread is not in the child, but the locks that it held at that moment are, for good.

    Raises:
        milter.error: there are such threads; it names them.
    """
    names = [repr(each.name) for each in threading.enumerate() if each is not _this_thread()]
    deadline = time.monotonic() + 1
    while not names:
        try:
            tasks = os.listdir("/proc/self/task")
        except OSError:
            return
        if len(tasks) <= 1:
            return
        if time.monotonic() > deadline:
            names = [_task_name(task) for task in tasks if int(task) != os.getpid()]
        time.sleep(0.005)  # a thread that was joined may still be on its way out
    raise milter.error(
        f"workers cannot be forked while other threads run ({', '.join(names)}): "
        "start threads in worker_init, or use workers=1"
    )


def _this_thread() -> threading.Thread:
    return threading.current_thread()


def _task_name(task: str) -> str:
    try:
        with open(f"/proc/self/task/{task}/comm", encoding="utf-8", errors="replace") as file:
            return f"{file.read().strip()!r}, not of Python"
    except OSError:
        return f"task {task}"


#: A worker is being forked; False in the worker.
_forks_worker = False
#: Who supervises in this process.
_supervisor: _Supervisor | None = None


def forks_worker() -> bool:
    """For functions that run after a fork: whether the child is a worker."""
    return _forks_worker


def _after_fork_in_child() -> None:
    if _supervisor is not None and not _forks_worker:
        _supervisor.let_go()


os.register_at_fork(after_in_child=_after_fork_in_child)


def supervise(
    count: int,
    worker_init: Callable[[], object] | None = None,
    *,
    pin: bool = False,
    on_ready: Callable[[], object] | None = None,
    on_stop: Callable[[], object] | None = None,
    on_beat: Callable[[], object] | None = None,
    beat: float | None = None,
    on_signal: Callable[[], object] | None = None,
    news: int = -1,
    on_news: Callable[[], bool] | None = None,
) -> None:
    """Serve on the open socket with so many processes; returns when all have ended.

    Args:
        count: how many.
        worker_init: called in each worker before it serves.
        pin: whether each keeps to one core.
        on_ready: called here once, when all serve.
        on_stop: called here once, when they are about to be stopped.
        on_beat: called here every ``beat`` seconds once all serve.
        beat: see there; None means never.
        on_signal: called here for each signal that asks for a stop. With it, these signals go on
            to be handled so after this has returned.
        news: a descriptor to watch, or -1.
        on_news: called here when that can be read, until it returns False.

    Raises:
        milter.error: the workers die at once, again and again; or one did not end well when
            all were stopped.
        SystemExit: ``sys.exit()`` was called in a callback.
    """
    _Supervisor(
        count, worker_init, pin, on_ready, on_stop, on_beat, beat, on_signal, news, on_news
    ).run()


class _Worker:
    """A place for a worker process, and the process that has it now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0  # 0: there is none
        self.pidfd = -1
        self.lifeline = -1
        self.ready_at: float | None = None
        self.ever_ready = False  # this process or one before
        self.failures = 0  # deaths at once, in a row
        self.due = 0.0  # when to start the next
        self.asked_to_stop = False  # it asked for the filter's stop
        self.was_killed = False

    def __str__(self) -> str:
        return f"worker {self.number + 1} (pid {self.pid})"


class _Supervisor:
    def __init__(
        self,
        count: int,
        worker_init: Callable[[], object] | None,
        pin: bool,
        on_ready: Callable[[], object] | None,
        on_stop: Callable[[], object] | None,
        on_beat: Callable[[], object] | None,
        beat: float | None,
        on_signal: Callable[[], object] | None,
        news: int,
        on_news: Callable[[], bool] | None,
    ) -> None:
        self._workers = [_Worker(number) for number in range(count)]
        self._worker_init = worker_init
        self._pin = pin
        self._on_ready = on_ready
        self._on_stop = on_stop
        self._on_beat = on_beat
        self._beat = beat
        self._signal_hook = on_signal
        self._news = news
        self._on_news = on_news
        self._next_beat: float | None = None
        self._told_of_ready = False
        self._pid = os.getpid()
        self._stop = False
        self._stopping = False
        self._deadline = 0.0
        self._troubles: list[str] = []  # what did not end well
        self._raised: BaseException | None = None
        self._failures = 0  # exceptions in the supervisor
        self._handlers: dict[int, Any] = {}
        self._wakeup = self._reports = (-1, -1)
        self._wakeup_before = -1

    # --- from start to end -----------------------------------------------------------------

    def run(self) -> None:
        global _supervisor
        with contextlib.ExitStack() as stack:
            try:
                stack.callback(self._forget)
                _supervisor = self
                check_threads()
                self._prepare(stack)
                # From here on handlers run in milter._await() alone: what they raise finds every
                # worker as the lines below left it.
                stack.callback(milter._hold_signals, False)
                milter._hold_signals(True)
            except BaseException:
                if not self._is_child():
                    _close_socket()
                raise
            while not self._has_ended():
                if self._is_child():
                    return
                try:
                    self._turn()
                except BaseException as exc:
                    if self._is_child():
                        raise
                    self._raised = self._raised or exc
                    self._stop = True
                    self._failures += 1
                    if self._failures > MAX_FAILURES:
                        self._kill_all()
                        raise
        if self._raised is not None:
            raise self._raised
        if self._troubles:
            raise milter.error("the filter did not stop well: " + "; ".join(self._troubles))

    @staticmethod
    def _forget() -> None:
        global _supervisor
        _supervisor = None

    def let_go(self) -> None:
        """In a child that a handler forked: it has the signals that it would have without us."""
        if self._wakeup[1] >= 0:
            self._return_wakeup_fd()
        self._restore_handlers()

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        # What stands now is in all the workers: keep the garbage collector from writing to it.
        if gc.get_freeze_count() == 0:
            gc.collect()
            gc.freeze()
            stack.callback(gc.unfreeze)
        milter._share_socket(len(self._workers))
        stack.callback(milter._end_sharing)
        stack.callback(milter._forget_stop)  # another that came while the workers ended
        self._reports = _pipe(stack)
        self._wakeup = _pipe(stack)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        stack.callback(self._return_wakeup_fd)
        if self._signal_hook is None:
            stack.callback(self._restore_handlers)
        for number in _STOPS:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._handlers[number] = handler
                signal.signal(number, self._on_signal)

    def _return_wakeup_fd(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # the program may have closed its own
            signal.set_wakeup_fd(self._wakeup_before)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_child():  # it came before what follows a fork
            signal.signal(number, self._handlers[number])
            signal.raise_signal(number)
            return
        self._stop = True
        if self._signal_hook is not None:
            self._signal_hook()
            if self._stopping:
                self._set_deadline()  # it may have less patience than before

    def _is_child(self) -> bool:
        """Whether a handler forked, and this is the child: the filter is the parent's."""
        return os.getpid() != self._pid

    def _has_ended(self) -> bool:
        return self._stopping and not any(worker.pid for worker in self._workers)

    def _turn(self) -> None:
        """Do what is due, then wait for news."""
        # First: workers that are told to stop otherwise would run their handlers as they end.
        self._pass_on(_read(self._wakeup[0]))
        self._take_news()
        self._read_reports()
        for worker in self._workers:
            if worker.pid:
                self._reap(worker)
        if milter._stop_state()[0]:  # no `or`: a signal in the middle of it would be lost
            self._stop = True
        if self._stop and not self._stopping:
            self._begin_to_stop()
        now = time.monotonic()
        if self._stopping:
            self._kill_late_ones(now)
        else:
            for worker in self._workers:
                if not worker.pid and worker.due <= now:
                    self._start(worker)
            self._tell_of_ready(now)
        self._tell_of_life(now)
        self._wait()

    def _wait(self) -> None:
        """Sleep until something happens or is due."""
        if self._has_ended() or (self._stop and not self._stopping):
            return
        now = time.monotonic()
        times = [worker.due for worker in self._workers if not worker.pid and not self._stopping]
        times += [self._deadline] if self._stopping else []
        times += [] if self._next_beat is None else [self._next_beat]
        descriptors = [self._reports[0], self._wakeup[0]]
        descriptors += [self._news] if self._news >= 0 else []
        for worker in self._workers:
            if worker.pidfd >= 0:
                descriptors.append(worker.pidfd)
            elif worker.pid:
                times.append(now + LOOK)
        timeout = -1 if not times else int(max(0.0, min(times) - now) * 1000) + 1
        try:
            milter._await(descriptors, min(timeout, 1_000_000_000))
        except BaseException as exc:  # of a handler: it ends the filter, in order
            if self._is_child():
                raise
            self._raised = self._raised or exc
            self._stop = True

    def _take_news(self) -> None:
        if self._news < 0 or self._on_news is None:
            return
        poll = select.poll()
        poll.register(self._news, select.POLLIN)
        if poll.poll(0):
            if not self._on_news():
                self._news = -1
            if self._stopping:
                self._set_deadline()  # as after a signal

    def _pass_on(self, numbers: bytes) -> None:
        """Pass signals on to the workers, where the application has a handler for them."""
        for number in numbers:
            if self._wakeup_before >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._wakeup_before, bytes([number]))
            if number in _PASSED_ON and signal.getsignal(number) != self._on_signal:
                for worker in self._workers:
                    _send(worker, number)

    def _tell_of_ready(self, now: float) -> None:
        if self._told_of_ready or not self._all_were_ready:
            return
        self._told_of_ready = True
        if self._on_ready is not None:
            self._on_ready()
        if self._beat is not None:
            self._next_beat = now

    def _tell_of_life(self, now: float) -> None:
        if self._next_beat is not None and self._next_beat <= now and self._beat is not None:
            self._next_beat = now + self._beat
            if self._on_beat is not None:
                self._on_beat()

    # --- starting ---------------------------------------------------------------------------

    def _start(self, worker: _Worker) -> None:
        global _forks_worker
        try:
            check_threads()
            lifeline = os.pipe()
        except (milter.error, OSError) as exc:
            if not self._all_were_ready:
                raise
            # A thread of a reload ends by itself: no reason to give the filter up.
            self._failed_to_start(worker, exc, for_good=not isinstance(exc, milter.error))
            return
        _flush_streams()  # or the worker would write it once more
        _forks_worker = True
        try:
            pid = milter._fork_worker(functools.partial(self._work, worker, lifeline))
        except OSError as exc:
            _close(*lifeline)
            self._failed_to_start(worker, exc)
            return
        except BaseException:
            _close(*lifeline)
            raise
        finally:
            _forks_worker = False
        os.close(lifeline[0])
        worker.pid, worker.lifeline = pid, lifeline[1]
        worker.ready_at, worker.asked_to_stop, worker.was_killed = None, False, False
        worker.pidfd = _pidfd(pid)

    def _failed_to_start(self, worker: _Worker, exc: Exception, *, for_good: bool = True) -> None:
        pause = self._count_failure(worker, f"cannot be started: {exc}", for_good=for_good)
        _log.error(
            "worker %d cannot be started: %s; next attempt in %g s", worker.number + 1, exc, pause
        )

    def _work(self, worker: _Worker, lifeline: tuple[int, int]) -> int:
        """Be the worker, in the child, and return its exit status."""
        global _forks_worker, _supervisor
        _forks_worker, _supervisor = False, None
        try:
            self._return_wakeup_fd()
            self._restore_handlers()
            _close(lifeline[1], self._reports[0], *self._wakeup)
            _close(*(fd for each in self._workers for fd in (each.lifeline, each.pidfd) if fd >= 0))
            milter._become_worker(worker.number, lifeline[0], self._reports[1])
            _leave_terminal()
            _forget_exit_functions()
            atexit.register(logging.shutdown)
            status = self._serve(worker)
            threading._shutdown()  # type: ignore[attr-defined] # wait for non-daemon threads
            atexit._run_exitfuncs()
            return status
        finally:
            _flush_streams()

    def _serve(self, worker: _Worker) -> int:
        """Run ``worker_init`` and ``main()``; returns the exit status."""
        try:
            milter._hold_signals(False)  # signals that came before are for this process by now
            if self._pin:
                _keep_to_core(worker.number)
            if self._worker_init is not None:
                self._worker_init()
            milter.main()
        except SystemExit as exc:
            return _status_of(exc)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BaseException as exc:  # noqa: BLE001 - there is nobody above to see it
            _log.error("a worker (pid %d) ends:", os.getpid(), exc_info=exc)
            return 1
        return 0

    # --- ending -----------------------------------------------------------------------------

    @property
    def _all_were_ready(self) -> bool:
        # Not all at one time: the first may be gone before the last is there.
        return all(worker.ever_ready for worker in self._workers)

    def _read_reports(self) -> None:
        data = _read(self._reports[0])
        for what, pid in _REPORT.iter_unpack(data):
            for worker in self._workers:
                if worker.pid == pid:
                    if what == b"r":
                        worker.ready_at = time.monotonic()
                        worker.ever_ready = True
                        _log.info("%s serves", worker)
                    else:
                        worker.asked_to_stop = True
                        self._stop = True

    def _reap(self, worker: _Worker) -> None:
        try:
            pid, wait_status = os.waitpid(worker.pid, os.WNOHANG)
        except ChildProcessError:
            # The program ignores SIGCHLD, or waits for all children itself.
            pid, wait_status = worker.pid, None
        if pid == 0:
            return
        self._read_reports()  # its last
        milter._worker_gone(worker.number)
        code = None if wait_status is None else os.waitstatus_to_exitcode(wait_status)
        name, reason = str(worker), _reason(code)
        _close(*(fd for fd in (worker.lifeline, worker.pidfd) if fd >= 0))
        worker.pid, worker.lifeline, worker.pidfd = 0, -1, -1
        if self._stop or self._stopping:
            self._ended_at_stop(worker, name, code, reason)
        else:
            pause = self._count_failure(worker, f"{name} {reason}")
            if not self._stop:
                _log.warning(
                    "%s %s; a new one is started %s",
                    name,
                    reason,
                    f"in {pause:g} s" if pause else "now",
                )

    def _ended_at_stop(self, worker: _Worker, name: str, code: int | None, reason: str) -> None:
        if worker.asked_to_stop and code is not None and code > 0:
            self._raised = self._raised or SystemExit(code)
            return
        if code in (0, None) or -(code or 0) in _STOPS:  # it was asked to from outside as well
            return
        if worker.ready_at is None and code == 128 + signal.SIGINT:
            return
        if worker.was_killed:
            reason = "did not end in time and was killed"
        self._troubles.append(f"{name} {reason}")
        _log.error("%s %s", name, reason)

    def _count_failure(self, worker: _Worker, what: str, *, for_good: bool = True) -> float:
        """Take note that a worker died; returns how long to wait before the next, in seconds.

        ``for_good``: where all have died several times the filter is given up.
        """
        now = time.monotonic()
        if worker.ready_at is not None and now - worker.ready_at >= QUICK:
            worker.failures = 0
        worker.failures += 1
        pause = PAUSES[min(worker.failures, len(PAUSES)) - 1]
        worker.due = now + pause
        worker.ready_at = None
        serves = any(each.ready_at is not None for each in self._workers)
        if for_good and worker.failures >= TOO_MANY and not (serves and self._all_were_ready):
            raise milter.error(
                f"workers die at once, {worker.failures} times in a row; the last: {what}"
            )
        return pause

    def _begin_to_stop(self) -> None:
        self._stopping = True
        self._set_deadline()
        _close_socket()
        for worker in self._workers:
            if worker.ready_at is None:
                _send(worker, signal.SIGTERM)  # it may be busy with worker_init
            if worker.lifeline >= 0:
                os.close(worker.lifeline)
                worker.lifeline = -1
        if self._on_stop is not None:
            self._on_stop()

    def _set_deadline(self) -> None:
        _, drain, close = milter._stop_state()
        self._deadline = time.monotonic() + (drain + close) / 1000 + GRACE

    def _kill_late_ones(self, now: float) -> None:
        if now < self._deadline:
            return
        self._kill_all()
        self._deadline = now + 1

    def _kill_all(self) -> None:
        for worker in self._workers:
            worker.was_killed = True
            _send(worker, signal.SIGKILL)


# --- small parts ---------------------------------------------------------------------------------


def _close_socket() -> None:
    """Stop listening, for all processes, and remove the unix socket if it is still ours."""
    milter.stop()
    milter.main()


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    stack.callback(_close, *ends)
    for end in ends:
        os.set_blocking(end, False)
    return ends


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):  # None, closed; and a handler may raise here, too
            stream.flush()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _read(descriptor: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, 4096)
    return b""


def _send(worker: _Worker, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if worker.pidfd >= 0:
            signal.pidfd_send_signal(worker.pidfd, number)  # never to another with that number
        elif worker.pid:
            os.kill(worker.pid, number)


def _pidfd(pid: int) -> int:
    """A descriptor that is readable when the process has ended, or -1."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def _forget_exit_functions() -> None:
    """What the program registered is for the supervisor to do, once."""
    atexit._clear()
    with contextlib.suppress(KeyError, AttributeError):
        # It registers itself only once; a worker's own temporary directories need it anew.
        finalize: Any = sys.modules["weakref"].finalize
        finalize._registry.clear()
        finalize._registered_with_atexit = False


def _keep_to_core(number: int) -> None:
    """Keep to one of the cores that this process may use: each number to the next.

    Left alone, libmilter's threads hand a connection on from core to core, and what Python has
    in its caches goes with it.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def _leave_terminal() -> None:
    """Several processes cannot read from one standard input."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.fstat(0).st_mode):  # that may be the inherited listening socket
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)


def _status_of(exc: SystemExit) -> int:
    """The exit status, as the interpreter finds it; a text is printed."""
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF
    print(exc.code, file=sys.stderr)
    return 1


def _reason(code: int | None) -> str:
    if code is None:
        return "has ended"
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
