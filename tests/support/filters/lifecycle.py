"""A filter whose life the tests watch: lifecycle.py SOCKET [OPTION...].

It says on standard output what happens, a line for each event, and holds a callback
where the test wants it held.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import ClassVar

import Milter


def say(*words: object) -> None:
    """Write a line in one piece, from any thread."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--on", choices=("main", "daemon", "thread"), default="main")
    parser.add_argument("--wait", choices=sorted(WAITS), default="join", help="main thread's work")
    parser.add_argument("--threads", type=int, default=0, help="extra threads before main()")
    parser.add_argument("--wakeup", choices=("none", "pipe", "asyncio"), default="none")
    parser.add_argument("--handle", nargs=2, action="append", default=[], metavar=("SIG", "WAY"))
    parser.add_argument("--at", nargs=2, action="append", default=[], metavar=("CALLBACK", "WHAT"))
    parser.add_argument("--drain", type=float)
    parser.add_argument("--block", help="a signal to block in the main thread")
    parser.add_argument("--told", help="a FIFO: wait for a byte from it, with --wait told")
    parser.add_argument("--last", help="a FIFO: wait for a byte from it in the last atexit")
    parser.add_argument("--ending", choices=("return", "exit", "raise"), default="return")
    return parser.parse_args()


# --- what a callback can be told to do ---------------------------------------------------


def hold(fifo: str) -> None:
    """Block without the interpreter lock until the test writes a byte."""
    with open(fifo, "rb", buffering=0) as stream:
        stream.read(1)


def spin(_: str) -> None:
    """Keep the interpreter busy for ever."""
    while True:
        pass


def leave(status: str) -> None:
    sys.exit(int(status))


def interrupt(_: str) -> None:
    raise KeyboardInterrupt


def stop(_: str) -> None:
    Milter.stop()


def show_signals(_: str) -> None:
    """What a child process finds: as a program of its own, and as a fork of this one."""
    lines = "print(*(s for s in open('/proc/self/status') if s[:3] == 'Sig'), sep='')"
    command = [sys.executable, "-I", "-c", lines]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    say("subprocess:", *child.stdout.split())
    pid = os.fork()
    if pid == 0:
        with open("/proc/self/status", encoding="ascii") as status:
            say("fork:", *[w for line in status if line[:3] == "Sig" for w in line.split()])
        os._exit(0)
    os.waitpid(pid, 0)


def child_that_waits(_: str) -> None:
    """A fork that waits for the signal that ends it."""
    pid = os.fork()
    if pid == 0:
        try:
            say("child", os.getpid())
            while True:
                time.sleep(0.02)  # a signal just before a long one would not end it
                # CPython 3.13 does not look for signals between two instructions where another
                # thread than the main one forked; this call does.
                signal.pthread_kill(threading.get_ident(), 0)
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        say("child ended: signal", os.WTERMSIG(status))
    else:
        say("child ended: status", os.WEXITSTATUS(status))


WHATS = {
    "hold": hold,
    "spin": spin,
    "exit": leave,
    "interrupt": interrupt,
    "stop": stop,
    "signals": show_signals,
    "child": child_that_waits,
}


class Watched(Milter.Base):
    """Says which callback runs and does there what the command line says."""

    todo: ClassVar[dict[str, tuple[str, str]]] = {}

    def step(self, name: str) -> int:
        say("in", name)
        what, argument = self.todo.get(name, ("", ""))
        if what:
            WHATS[what](argument)
            say("out", name)
        return Milter.CONTINUE

    def envfrom(self, f: str, *params: str) -> int:
        return self.step("envfrom")

    def header(self, field: str, value: str) -> int:
        return self.step("header")

    def body(self, blk: bytes) -> int:
        return self.step("body")

    def eom(self) -> int:
        self.step("eom")
        self.addheader("X-Stamp", "before")
        self.chgheader("Subject", 1, "changed")
        self.addrcpt("<added@example.com>")
        self.replacebody(b"new body\r\n")
        self.setreply("550", "5.7.1", "never sent")
        return Milter.ACCEPT

    def abort(self) -> int:
        return self.step("abort")

    def close(self) -> int:
        return self.step("close")


# --- what was there before the filter ----------------------------------------------------


def handler(way: str) -> object:
    def handle(number: int, frame: object) -> None:
        say("handler", signal.Signals(number).name, way)
        if way == "stop":
            Milter.stop()
        elif way == "raise":
            raise RuntimeError("raised by the handler")
        elif way == "exit":
            sys.exit(5)
        elif way == "fork":
            fork_from_handler()

    return signal.SIG_IGN if way == "ignore" else handle


def fork_from_handler() -> None:
    """A child that gets a signal of its own, which must not reach the parent."""
    pid = os.fork()
    if pid == 0:
        signal.raise_signal(signal.SIGUSR2)
        say("child done")
        os._exit(0)
    os.waitpid(pid, 0)


def use_wakeup(kind: str) -> contextlib.ExitStack:
    """Have Python's signals wake something of the application's."""
    stack = contextlib.ExitStack()
    if kind == "pipe":
        reader, writer = socket.socketpair()
        stack.enter_context(reader)
        stack.enter_context(writer)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        stack.callback(lambda: say("wakeup bytes", *read_all(reader)))
        stack.callback(lambda: say("wakeup kept", signal.set_wakeup_fd(-1) == writer.fileno()))
    elif kind == "asyncio":
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        loop.add_signal_handler(signal.SIGUSR2, lambda: None)
        before = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(before)
        stack.callback(lambda: say("wakeup kept", signal.set_wakeup_fd(before) == before))
    return stack


def read_all(reader: socket.socket) -> bytes:
    reader.setblocking(False)
    try:
        return reader.recv(4096)
    except BlockingIOError:
        return b""


# --- the filter, and what the main thread does meanwhile -----------------------------------


def run(options: argparse.Namespace) -> None:
    try:
        Milter.runmilter("watched", options.socket, drain_timeout=options.drain)
    finally:
        say("after runmilter")


def wait_sleep(worker: threading.Thread) -> None:
    time.sleep(3600)


def wait_event(worker: threading.Thread) -> None:
    threading.Event().wait()


def wait_join(worker: threading.Thread) -> None:
    worker.join()


def wait_pause(worker: threading.Thread) -> None:
    while True:
        signal.pause()
        say("pause returned")


def wait_pause_once(worker: threading.Thread) -> None:
    signal.pause()
    say("pause returned")


def wait_told(worker: threading.Thread) -> None:
    hold(arguments().told)


def wait_sigwait(worker: threading.Thread) -> None:
    signal.sigwait({signal.SIGTERM})
    say("sigwait returned")
    Milter.stop()
    worker.join()


def wait_busy(worker: threading.Thread) -> None:
    """Never in a system call, and mostly with the interpreter lock."""
    while True:
        pass


def wait_asyncio(worker: threading.Thread) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def on_term() -> None:
            say("handler in the loop")
            Milter.stop()
            ended.set()

        loop.add_signal_handler(signal.SIGTERM, on_term)
        say("loop runs")
        await ended.wait()

    asyncio.run(serve())
    worker.join()


WAITS = {
    "join": wait_join,
    "sleep": wait_sleep,
    "event": wait_event,
    "busy": wait_busy,
    "pause": wait_pause,
    "pause-once": wait_pause_once,
    "sigwait": wait_sigwait,
    "told": wait_told,
    "asyncio": wait_asyncio,
}


def last_words(fifo: str | None) -> None:
    """The last of the program's own code to run."""
    say("atexit, registered early")
    if fifo:
        hold(fifo)


def main() -> None:
    options = arguments()
    atexit.register(last_words, options.last)
    Watched.todo = {name: what.partition(":")[::2] for name, what in options.at}
    Milter.factory = Watched
    for name, way in options.handle:
        signal.signal(getattr(signal, f"SIG{name}"), handler(way))
    if options.block:
        signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, f"SIG{options.block}")})
    forever = threading.Event()
    for _ in range(options.threads):
        threading.Thread(target=forever.wait, daemon=True).start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    with use_wakeup(options.wakeup):
        if options.on == "main":
            run(options)
        else:
            started = threading.Event()

            def run_once_started() -> None:
                started.wait()  # else a signal may come while start() still waits
                run(options)

            worker = threading.Thread(target=run_once_started, daemon=options.on == "daemon")
            try:
                worker.start()
                started.set()
                WAITS[options.wait](worker)
            except KeyboardInterrupt:
                say("KeyboardInterrupt in the main thread")
                raise
    say("mask kept", signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask)
    say("handlers kept", [signal.getsignal(n) for n in signal.valid_signals()] == handlers)
    atexit.register(say, "atexit, registered late")
    say("end of the program")
    if options.ending == "exit":
        sys.exit(3)
    if options.ending == "raise":
        raise RuntimeError("raised by the program")


if __name__ == "__main__":
    main()
