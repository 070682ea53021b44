"""From signal to signal: what ends ``python -m Milter run``, and what has it reload."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import milter

import Milter

from .. import _workers
from .._systemd import Notifier
from .common import EXIT_ERROR, CommandError, FilterSocket
from .reload import PATIENCE, Generation, Overseer, is_possible, leave_to_overseer

_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class Life:
    """What this process is among the generations of a filter, and what signals mean to it.

    :param args: of the command.
    :param where: where the filter listens.
    :param generation: this process, where an overseer started it.
    :param leave: called where another generation serves from then on.
    :ivar notifier: tells systemd, or the overseer.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        where: FilterSocket,
        generation: Generation | None,
        leave: Callable[[], object],
    ) -> None:
        self._pid = os.getpid()
        self._generation = generation
        self._leave = leave
        self.notifier = generation or Notifier()
        self._overseer: Overseer | None = None
        self._program_handles = False  # some signal, by itself
        #: By the number of the signal: our handler, and what was there before.
        self._handlers: dict[int, tuple[Any, Any]] = {}
        if generation is not None:
            self._handlers[signal.SIGHUP] = (leave_to_overseer, signal.SIG_DFL)
        if generation is None and is_possible():
            self._overseer = Overseer(args.argv, args.directory, where, self.notifier, leave)
        self._forking = threading.local()
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork,
            after_in_child=self._after_fork_in_child,
        )

    def is_own_process(self) -> bool:
        """Whether this is no child that a callback or a handler forked."""
        return os.getpid() == self._pid

    def _before_fork(self) -> None:
        """Hold back what a child may get before it is told; Python forgets that there.

        Not on the main thread, where a handler may run by the way, and what it raises be lost.
        """
        if threading.get_ident() != threading.main_thread().ident:
            self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers)

    def _after_fork(self) -> None:
        mask = self._forking.__dict__.pop("mask", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _after_fork_in_child(self) -> None:
        """What asks for the end of a child that the program forks is not for the filter.

        A worker ends by its supervisor, whatever is sent to each process of a service.
        """
        if not _workers.forks_worker():
            self._put_back(self._handlers)
            if self._overseer is not None:
                self._overseer.let_go()
        self._after_fork()

    def socket_is_open(self) -> None:
        """To be called before the filter serves."""
        if self._overseer is not None:
            self._overseer.note_socket()
        if self._generation is not None:
            self._generation.check_overseer()

    def serves(self, status: str, workers: bool) -> None:
        """The filter serves from now on: tell whoever waits for that."""
        self.notifier.ready(status, feed=not workers)
        if self._overseer is not None:
            self._overseer.serves()
        if self._generation is not None and not workers:
            self._generation.watch(self._give_way, self._stop_here)

    # --- for the supervisor of workers -----------------------------------------------------

    @property
    def beat(self) -> float | None:
        """How often the supervisor is to call :meth:`on_beat`, in seconds; None for never."""
        return self.notifier.interval

    def on_beat(self) -> None:
        """Give a sign of life."""
        if not self.has_handed_over():
            self.notifier.alive()

    @property
    def news(self) -> int:
        """The descriptor that can be read when :meth:`on_news` is to be called, or -1."""
        return -1 if self._generation is None else self._generation.descriptor

    def on_news(self) -> bool:
        """Do what the overseer says; whether it may say more."""
        assert self._generation is not None
        return self._generation.take_order(self._give_way, self._stop_here)

    def on_stop(self) -> None:
        """The workers are about to be stopped; after a reload, others serve."""
        if self._overseer is None or not self._overseer.has_handed_over:
            self.notifier.stopping()

    def on_signal(self) -> None:
        """A signal asks for the end, again where it came before."""
        milter._hand_over(0)
        if self._overseer is not None:
            self.notifier.stopping()
            self._overseer.stop()

    def _stop_here(self) -> None:
        milter._hand_over(0)
        Milter.stop()

    def _give_way(self) -> None:
        """The next generation serves."""
        self._leave()
        milter._hand_over(int(PATIENCE * 1000))
        Milter.stop()
        assert self._generation is not None
        self._generation.tell_when_deaf()

    # --- signals ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def hangups(self) -> Iterator[None]:
        """Take SIGHUP for a reload, also before the filter serves."""
        overseer, before = self._overseer, signal.getsignal(signal.SIGHUP)
        if overseer is None or before != signal.SIG_DFL:
            yield
            return
        self._handlers[signal.SIGHUP] = (overseer.on_hangup, before)
        signal.signal(signal.SIGHUP, overseer.on_hangup)
        try:
            yield
        finally:
            self._put_back([signal.SIGHUP])

    def _put_back(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            handler, before = self._handlers[number]
            if signal.getsignal(number) == handler:
                signal.signal(number, before)

    @contextlib.contextmanager
    def signals(self, workers: bool) -> Iterator[None]:
        """Handle the signals for which the module has no handler.

        :param workers: those that ask for a stop are the supervisor's.
        """
        handlers = {} if workers else {signal.SIGTERM: self._on_stop, signal.SIGINT: self._on_stop}
        if self._overseer is None and self._generation is None and not workers:
            handlers[signal.SIGHUP] = self._on_stop
        ours = [handler for handler, _ in self._handlers.values()]
        for number in signal.valid_signals():
            there = signal.getsignal(number)
            if callable(there) and there not in (*_DEFAULT, *ours):
                self._program_handles = True
        installed = []
        for number, handler in handlers.items():
            before = signal.getsignal(number)
            if before in _DEFAULT:
                self._handlers[number] = (handler, before)
                installed.append(number)
                signal.signal(number, handler)
        try:
            yield
        finally:
            self._put_back(installed)
            if self._generation is not None and self.is_own_process():
                # systemd signals each process of a service, and then the overseer does: what comes
                # while the interpreter ends is no news.
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        if not self.is_own_process():  # it came before what follows a fork
            self._put_back([number])
            signal.raise_signal(number)
            return
        self.notifier.stopping()
        self.on_signal()
        Milter.stop()

    # --- the end ---------------------------------------------------------------------------

    def has_handed_over(self) -> bool:
        """Whether a generation serves in the place of this process."""
        return self._overseer is not None and self._overseer.has_handed_over

    def goes_on_after(self, exc: BaseException) -> bool:
        """Whether this is of connections of before a reload alone, with which others serve now.

        What a callback raises, ``sys.exit()`` too, is meant for the generation that it belongs to.
        A handler of the program that raises for a signal means all.
        """
        if not self.is_own_process():
            return False
        if isinstance(exc, (Milter.error, OSError)) or not self._program_handles:
            return self.has_handed_over()
        return False

    def end_generations(self) -> None:
        """Have all end in order where this process is about to."""
        if self.is_own_process() and self.has_handed_over():
            assert self._overseer is not None
            self._overseer.stop()
            self._overseer.wait()

    def wait_for_generations(self) -> None:
        """This process serves no more: stay for as long as a generation does.

        :raises CommandError: the last did not end well.
        """
        if self._overseer is None:
            return
        if not self._overseer.has_handed_over:
            self._overseer.stop()  # one may be about to start
        self._overseer.wait()
        if self._overseer.status:
            raise CommandError(
                "what served after a reload has ended: its reason is above", EXIT_ERROR
            )
