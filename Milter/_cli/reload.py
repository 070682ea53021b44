"""Reload of ``python -m Milter run``: on SIGHUP a fresh interpreter serves before this one stops.

The process that was started stays, whatever comes after it, and signals are for it. As long as
nobody asked for a reload, it serves by itself. On the first SIGHUP it starts a thread, the
*overseer*, which runs the same command once more, as a *generation* that has the listening socket.
Once that serves, who served before accepts no more and ends when its last connection has; the
overseer passes on what the generations tell systemd. Where a generation cannot serve, it ends, and
nothing has changed for the one before.

A generation is told by its environment what it has inherited. It tells the overseer by packets on
a socket what it would tell systemd. On the same socket it is told that the next one serves; that
the overseer is gone, it knows by the end of it. SIGHUP means nothing to a generation: where each
process of a service gets one, the overseer has it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from types import FrameType

import milter

from .._logging import logger
from .._systemd import Notifier
from .common import EXIT_ERROR, CommandError, FilterSocket, printable

_log = logger("milter.run")

#: Which generation, the number of the listening socket, that of the socket to the overseer, and
#: how often to give a sign of life, in seconds, or 0.
VARIABLE = "PYMILTER_GENERATION"
#: What is the overseer's own of what systemd says.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")

#: Seconds that a generation may take to serve.
STARTING = 120.0
#: Seconds for which who served before goes on with the connections that it has.
PATIENCE = 3600.0
#: Seconds between looks at what systems do not tell by a descriptor.
_LOOK = 1.0
#: The same where it takes a moment.
_GLANCE = 0.005

#: The overseer's order to a generation: another one serves.
_GIVE_WAY = b"GIVE WAY"


def is_possible() -> bool:
    """Whether this system has the sockets that it takes."""
    return hasattr(socket, "SOCK_SEQPACKET")


# --- a generation ---------------------------------------------------------------------------------


class Generation(Notifier):
    """This process, as one of those that the overseer started: what it has, and what it tells.

    :ivar listener: the number of the listening socket.
    """

    def __init__(self, number: int, listener: int, overseer: int, interval: float) -> None:
        super().__init__({})
        self.number, self.listener = number, listener
        self._socket = socket.socket(fileno=overseer)
        self._interval = interval or None

    @classmethod
    def take(cls, environment: MutableMapping[str, str] = os.environ) -> Generation | None:
        """What the environment says, which it says no more then; None where it says nothing."""
        text = environment.pop(VARIABLE, "")
        number, listener, overseer, interval = [*text.split(":"), "", "", ""][:4]
        if not text:
            return None
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, leave_to_overseer)
        # A thread of the overseer's started it, which holds SIGHUP back, and may all others.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        for each in (int(listener), int(overseer)):
            os.set_inheritable(each, False)
        return cls(int(number), int(listener), int(overseer), float(interval))

    def failed(self, reason: object) -> None:
        """Tell why there will be none of this generation."""
        self.notify(f"FAILED={reason}")

    def notify(self, state: str) -> None:
        """Tell the overseer; where it is gone, nobody."""
        overseer = self._socket
        if overseer is not None:
            with contextlib.suppress(OSError):
                overseer.send(state.encode())

    def check_overseer(self) -> None:
        """Refuse to serve where nobody oversees that.

        :raises CommandError: the overseer is gone.
        """
        assert self._socket is not None
        try:
            is_there = bool(self._socket.recv(1, _PEEK))
        except BlockingIOError:
            is_there = True
        except OSError:
            is_there = False
        if not is_there:
            raise CommandError("the process that was started has ended", EXIT_ERROR)

    @property
    def descriptor(self) -> int:
        """It can be read when :meth:`take_order` is to be called."""
        assert self._socket is not None
        return self._socket.fileno()

    def take_order(self, give_way: Callable[[], object], stop: Callable[[], object]) -> bool:
        """Do what the overseer says, once it says something; whether it may say more.

        :param give_way: called where the next generation serves.
        :param stop: called where the overseer is gone.
        """
        overseer = self._socket
        if overseer is None:
            return False  # it was closed, as all ends
        try:
            order = overseer.recv(100)
        except OSError:
            order = b""
        if order == _GIVE_WAY:
            give_way()
        elif not order:
            stop()
        return bool(order)

    def watch(self, give_way: Callable[[], object], stop: Callable[[], object]) -> None:
        """Take all orders, by a thread."""

        def take_orders() -> None:
            while self.take_order(give_way, stop):
                pass

        threading.Thread(target=take_orders, name="overseer", daemon=True).start()

    def tell_when_deaf(self) -> None:
        """Tell when no new connection can come here any more; by a thread."""

        def wait() -> None:
            while milter._accepts():
                time.sleep(_GLANCE)
            self.notify("DEAF=1")

        threading.Thread(target=wait, name="deaf", daemon=True).start()


def leave_to_overseer(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGHUP in a generation: the overseer had it too."""


# --- the overseer ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Child:
    number: int
    process: subprocess.Popen[bytes]
    status: socket.socket
    deadline: float
    reason: str = ""

    def __str__(self) -> str:
        return f"generation {self.number} (pid {self.process.pid})"

    def give_way(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.status.send(_GIVE_WAY)

    def stop(self) -> None:
        self.process.terminate()  # never another process: it looks first

    def kill(self) -> None:
        self.process.kill()


class Overseer:
    """Starts generations in this process, the one that was started.

    :param argv: the arguments of ``python -m Milter``.
    :param directory: where it was started.
    :param where: where the filter listens.
    :param notifier: tells systemd.
    :param leave: called where a generation serves in the place of this process.
    :ivar has_handed_over: a generation serves in the place of this process.
    :ivar status: the exit status of the last generation, where it was not well.
    """

    def __init__(
        self,
        argv: list[str],
        directory: str,
        where: FilterSocket,
        notifier: Notifier,
        leave: Callable[[], object],
    ) -> None:
        self._words = [
            sys.executable,
            *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
            "-m",
            "Milter",
            *argv,
        ]
        self._directory = directory
        self._pid = os.getpid()
        self._notifier = notifier
        self._leave = leave
        # A callback may change the directory before it is removed.
        self._path = os.path.abspath(where.path) if where.kind == "unix" else ""
        self._inode = (-1, -1)
        self._inbox = (-1, -1)
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # a handler may interrupt itself
        self._runs = False
        self._listener = -1
        self._count = 1
        self._next: _Child | None = None
        self._current: _Child | None = None
        self._old: list[_Child] = []
        self._before: _Child | None = None  # takes new connections still
        self._news = ""  # to be told once nobody else does
        self._again = self._stopping = False
        self._serves = self._is_asked = False
        self.has_handed_over = False
        self.status = 0

    def note_socket(self) -> None:
        """The socket is open: remember which file it is."""
        if self._path:
            status = os.lstat(self._path)
            self._inode = (status.st_dev, status.st_ino)

    # --- on the main thread ---------------------------------------------------------------

    def on_hangup(self, _number: int, _frame: FrameType | None) -> None:
        """Handle SIGHUP: have a generation started."""
        if os.getpid() != self._pid:
            return  # a worker, whose supervisor knows
        if self._stopping:
            return
        if not self._serves:
            self._is_asked = True  # what was imported before may be old
            return
        with self._lock:
            begins, self._runs = not self._runs, True
            if self._inbox[0] < 0:
                self._inbox = os.pipe()
            self._tell(b"h")
        if begins:
            self._thread = threading.Thread(target=self._run, name="overseer", daemon=True)
            self._thread.start()

    def serves(self) -> None:
        """This process serves: what asked for a reload before is due."""
        self._serves = True
        if self._is_asked:
            self.on_hangup(signal.SIGHUP, None)

    def stop(self) -> None:
        """Stop all generations, and let this process have no more patience with connections."""
        with self._lock:
            self._stopping = True
            milter._hand_over(0)
        if self._thread is not None:
            self._tell(b"s")

    def let_go(self) -> None:
        """In a forked child: what tells generations that this process is gone is not to stay."""
        for child in (self._next, self._current, *self._old):
            if child is not None:
                child.status.close()

    def wait(self) -> None:
        """Return when the last generation has ended."""
        if self._thread is not None:
            self._thread.join()

    def _tell(self, what: bytes) -> None:
        os.write(self._inbox[1], what)

    # --- on the overseer's thread ---------------------------------------------------------

    def _run(self) -> None:
        # What is started begins with this, and a signal that comes then does not end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            while True:
                self._wait_for_news()
                for child in self._children():
                    if child.process.poll() is not None:
                        self._on_end(child)
                self._kill_late_one()
                self._announce()
                if self._may_end():
                    return
                if self._again and not (self._next or self._news or self._stopping):
                    self._start()
        except BaseException as exc:  # noqa: BLE001 - this thread has nobody above it
            _log.error("reloading has failed:", exc_info=exc)
            for child in self._children():
                child.kill()
            self.status = self.status or 1
            self._end_thread()

    def _may_end(self) -> bool:
        """Whether this thread has no more to do; workers can only be forked without it."""
        with self._lock:
            inbox = select.poll()  # select() takes no numbers above 1023
            inbox.register(self._inbox[0], select.POLLIN)
            waits = bool(inbox.poll(0))
            if not self._children() and not waits and (self._stopping or not self._again):
                self._end_thread()
        return not self._runs

    def _end_thread(self) -> None:
        """From then on a SIGHUP has the next one started, with a listener of its own."""
        with self._lock:
            self._close_listener()
            self._runs = False

    def _children(self) -> list[_Child]:
        return [each for each in (self._next, self._current, *self._old) if each is not None]

    def _wait_for_news(self) -> None:
        poll = select.poll()
        poll.register(self._inbox[0], select.POLLIN)
        children = {each.status.fileno(): each for each in self._children()}
        for descriptor in children:
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll((_GLANCE if self._news else _LOOK) * 1000):
            if descriptor == self._inbox[0]:
                self._on_order(os.read(descriptor, 100))
            else:
                self._on_status(children[descriptor])

    def _on_order(self, order: bytes) -> None:
        if b"s" in order:
            self._begin_to_stop()
        elif b"h" in order:
            self._again = True

    def _on_status(self, child: _Child) -> None:
        try:
            text = child.status.recv(8192).decode(errors="replace")
        except OSError:
            text = ""
        if not text:  # it has ended, or is about to
            child.status.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(_LOOK)
        elif text.startswith("READY=1") and child is self._next:
            self._promote(child, text.partition("STATUS=")[2])
        elif text.startswith("FAILED="):
            child.reason = text.partition("=")[2]
        elif text == "DEAF=1" and child is self._before:
            self._before = None
        elif text == "WATCHDOG=1" and child is self._current:
            self._notifier.alive()

    def _start(self) -> None:
        self._again = False
        self._count += 1
        # systemd compares it with its own clock (sd_notify(3), Type=notify-reload).
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        _log.info("reloading: generation %d is started", self._count)
        try:
            if self._listener < 0:
                self._listener = milter._listening_socket()
            self._next = self._spawn(self._listener)
        except (milter.error, OSError) as exc:
            if self._was_stopped():
                self._end_with_filter("a reload")
            else:
                self._refused(str(exc))

    def _was_stopped(self) -> bool:
        """Whether a callback has stopped the filter: that is meant for all of it."""
        return not self.has_handed_over and milter._is_stopped()

    def _end_with_filter(self, what: object) -> None:
        _log.info("%s, which came too late, ends with the filter", what)
        self._stopping = True
        self._begin_to_stop()

    def _spawn(self, listener: int) -> _Child:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
            interval = self._notifier.interval or 0
            environment[VARIABLE] = f"{self._count}:{listener}:{theirs.fileno()}:{interval}"
            try:
                process = subprocess.Popen(
                    self._words,
                    stdin=subprocess.DEVNULL,
                    cwd=self._directory,
                    env=environment,
                    pass_fds=(listener, theirs.fileno()),
                )
            except OSError:
                mine.close()
                raise
        return _Child(self._count, process, mine, time.monotonic() + STARTING)

    def _promote(self, child: _Child, status: str) -> None:
        """A generation serves: who did so before gives way."""
        if self._was_stopped():  # and the socket may be gone
            self._end_with_filter(child)
            return
        self._next = None
        before, self._current = self._current, child
        if before is not None:
            before.give_way()
            self._old.append(before)
        else:
            self._retire()
        self._before = before
        self._news = f"STATUS={status}, {child}"

    def _retire(self) -> None:
        """A generation serves in the place of this process.

        From this thread, not by a signal to the main one: signals of one kind that are pending are
        one signal, and SIGHUP from outside would be lost in it.
        """
        self.has_handed_over = True
        self._notifier.feed_no_more()
        with self._lock:
            if not self._stopping:
                self._leave()
                milter._hand_over(int(PATIENCE * 1000))
                milter.stop()

    def _announce(self) -> None:
        """Say that a generation serves, once no new connection comes to the one before."""
        if not self._news or self._before is not None or (not self._old and milter._accepts()):
            return
        _log.info("reloaded: %s serves", self._current)
        self._notifier.notify(f"READY=1\n{self._news}")
        self._news = ""

    def _refused(self, reason: str) -> None:
        _log.error("not reloaded, what served before still does: %s", printable(reason))
        self._notifier.notify(f"READY=1\nSTATUS=serving; not reloaded: {printable(reason)}")

    def _on_end(self, child: _Child) -> None:
        # What it said last may not have been read yet.
        with contextlib.suppress(OSError):
            while child.status.fileno() >= 0 and child.status.recv(1, _PEEK):
                self._on_status(child)
        child.status.close()
        code = child.process.returncode
        if child is self._next:
            self._next = None
            if not self._stopping and self._was_stopped():
                self._end_with_filter(child)
            elif not self._stopping:
                self._refused(child.reason or f"{child} ended with status {code}")
        elif child is self._current:
            self._current = None
            if code == -signal.SIGTERM and self._stopping:
                code = 0  # a second one, where it had ended but for its interpreter
            if code != 0:
                self.status = 1
            _log.log(40 if code else 20, "%s, which served, ended with status %d", child, code)
            if not self._stopping:
                self._stopping = True
                self._begin_to_stop()
        elif child in self._old:
            self._old.remove(child)
            self._before = None if self._before is child else self._before
            _log.info("%s has ended", child)

    def _begin_to_stop(self) -> None:
        self._again = False
        if self.has_handed_over and self._path:
            with contextlib.suppress(OSError):
                status = os.lstat(self._path)
                if (status.st_dev, status.st_ino) == self._inode:
                    os.unlink(self._path)
        self._close_listener()
        for child in self._children():
            child.stop()

    def _close_listener(self) -> None:
        if self._listener >= 0:
            os.close(self._listener)
            self._listener = -1

    def _kill_late_one(self) -> None:
        if self._next is not None and time.monotonic() > self._next.deadline:
            self._next.reason = f"{self._next} did not serve within {STARTING:g} s"
            self._next.kill()
            self._next.deadline = float("inf")


_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
