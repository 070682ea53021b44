"""A filter with worker processes: workers.py SOCKET --workers N [OPTION...].

It says in headers which process and which number a message had, and on standard output what
happens around the call.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import io
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import milter

import Milter


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Telling(Milter.Base):
    """The options decide what a message does."""

    options = argparse.Namespace()

    def hello(self, hostname: str) -> int:
        self.id = Milter.uniqueID()
        return Milter.CONTINUE

    def envfrom(self, sender: str, *params: str) -> int:
        if sender == "<stop@example.com>":
            Milter.stop()
        if sender == "<exit@example.com>":
            sys.exit(3)
        if sender == "<fork@example.com>":
            child = os.fork()
            if child == 0:
                try:
                    milter.main()
                except milter.error as exc:
                    say("child:", exc)
                return Milter.CONTINUE
            os.waitpid(child, 0)
        if sender == "<begin@example.com>":
            say("begins in", os.getpid())
        if sender == "<linger@example.com>":
            child = os.fork()
            if child == 0:
                say("lingers:", os.getpid())
                signal.pause()
        return Milter.CONTINUE

    def envrcpt(self, recipient: str, *params: str) -> int:
        if recipient == "<stop@example.org>":
            Milter.stop()
        return Milter.CONTINUE

    def eom(self) -> int:
        if self.options.hold:
            say("holds in", os.getpid())
            with open(self.options.hold, "rb", buffering=0) as fifo:
                fifo.read(1)
        self.addheader("X-Worker", str(os.getpid()))
        self.addheader("X-Number", str(self.id))
        self.addheader("X-Random", str(random.random()))
        return Milter.ACCEPT

    def close(self) -> int:
        return Milter.CONTINUE


class Unflushed(io.StringIO):
    """What a signal's handler may do to a worker as it ends."""

    def flush(self) -> None:
        raise KeyboardInterrupt


kept: list[object] = []


def init(how: str) -> None:
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # before the test can send it
    say("init in", os.getpid(), milter.getdiag()[0])
    atexit.register(say, "exit of", os.getpid())
    if how == "late":

        def leave() -> None:
            say("leaves:", os.getpid())
            time.sleep(0.3)
            say("has left:", os.getpid())

        atexit.register(leave)
    if how == "flush":
        sys.stdout = Unflushed()
    if how == "stop":
        Milter.stop()
    if how == "drain":
        Milter.set_drain_timeout(60)
    if how == "temporary":
        kept.append(tempfile.TemporaryDirectory(prefix="worker-", dir=Telling.options.directory))
    if how == "raise":
        raise RuntimeError("no database")
    if how == "exit":
        sys.exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sleep":
        time.sleep(60)
    if how == "hang":
        time.sleep(60)
    if how.startswith("except:"):  # all fail that come after the first so many
        with open(how.partition(":")[2], "ab") as file:
            file.write(b".")
            if file.tell() > Telling.options.workers:
                raise RuntimeError("no more connections")


def show_mask(where: str) -> None:
    """Which signals are blocked in what is started here."""
    command = [sys.executable, "-I", "-c", "print(*open('/proc/self/status'), sep='')"]

    def say_mask(way: str, status: str) -> None:
        blocked = next(line.split()[1] for line in status.splitlines() if line[:6] == "SigBlk")
        say(f"{way} by {where}, blocked:", blocked)

    def own_status() -> str:
        with open("/proc/thread-self/status", encoding="ascii") as file:
            return file.read()

    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    say_mask("subprocess", child.stdout)
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, write, 1)]
    spawned = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
    os.close(write)
    with open(read, encoding="ascii") as file:
        say_mask("spawn", file.read())
    os.waitpid(spawned, 0)
    forked = os.fork()
    if forked == 0:
        say_mask("fork", own_status())
        os._exit(0)
    os.waitpid(forked, 0)
    thread = threading.Thread(target=lambda: say_mask("thread", own_status()))
    thread.start()
    thread.join()


class Showing(logging.Handler):
    """What a handler of the log may start; it is told of each worker that serves."""

    def emit(self, record: logging.LogRecord) -> None:
        if "serves" in record.getMessage():
            show_mask("log")


def fork_from_handler(goes_on: bool) -> None:
    child = os.fork()
    if child == 0 and goes_on:
        return
    if child == 0:
        say("waits:", os.getpid())
        while True:
            time.sleep(0.02)
    status = os.waitpid(child, 0)[1]
    say("waited:", os.waitstatus_to_exitcode(status))


def take_signals_on_a_thread() -> None:
    """A thread that is started by a handler, and gets a signal in the place of the first."""

    def work() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def handle(name: str, action: str) -> None:
    def handler(_number: int, _frame: object) -> None:
        say(f"{name} in", os.getpid())
        if action == "stop":
            Milter.stop()
        elif action == "exit":
            sys.exit(5)
        elif action == "show":
            show_mask(str(os.getpid()))
        elif action in ("fork", "fork-on"):
            fork_from_handler(action == "fork-on")
        elif action == "thread":
            take_signals_on_a_thread()
            say("thread is over in", os.getpid())

    signal.signal(getattr(signal, f"SIG{name}"), handler)


def end_in_the_middle() -> None:
    """Once SIGUSR1 has come, SIGTERM comes while the supervisor asks whether to stop."""
    asked, told = milter._stop_state, []

    def ask() -> tuple[bool, int, int]:
        state = asked()
        if told:
            told.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    milter._stop_state = ask
    signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--init", default="")
    parser.add_argument("--drain", type=float)
    parser.add_argument("--hold")
    parser.add_argument("--handle", nargs=2, action="append", default=[])
    parser.add_argument("--thread", action="store_true")
    parser.add_argument("--end-in-the-middle", action="store_true")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--uid", type=int)
    parser.add_argument("--grace", type=float)
    parser.add_argument("--directory")
    parser.add_argument("--block")
    parser.add_argument("--again", type=int, action="append", default=[])
    parser.add_argument("--show-in-log", action="store_true")
    options = parser.parse_args()
    if options.uid:
        # That user may not be able to read what is imported later.
        for name in ("_socket_setup", "_workers"):
            importlib.import_module(f"Milter.{name}")
        os.setgid(options.uid)
        os.setuid(options.uid)
    if options.grace is not None:
        importlib.import_module("Milter._workers").GRACE = options.grace
    if options.directory:
        kept.append(tempfile.TemporaryDirectory(prefix="program-", dir=options.directory))
    logging.basicConfig(level="INFO", format="%(process)d %(name)s %(levelname)s %(message)s")
    if options.block:
        signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, f"SIG{options.block}")})
    if options.show_in_log:
        logging.getLogger().addHandler(Showing())
    for name, action in options.handle:
        handle(name, action)
    if options.end_in_the_middle:
        end_in_the_middle()
    if options.thread:
        threading.Thread(target=time.sleep, args=(60,), name="pool", daemon=True).start()
    Telling.options = options
    Milter.factory = Telling
    atexit.register(say, "end of the program in", os.getpid())
    say("program", os.getpid())
    try:
        for workers in (options.workers, *options.again):
            Milter.runmilter(
                "workers",
                options.socket,
                drain_timeout=options.drain,
                workers=workers,
                pin_workers=options.pin,
                worker_init=(lambda: init(options.init)) if options.init else None,
            )
            say("has run with", workers)
    except milter.error as exc:
        say("failed:", exc)
        sys.exit(2)
    finally:
        say("finally in", os.getpid())


if __name__ == "__main__":
    main()
