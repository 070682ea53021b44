"""Calls in and out of order: call_order.py SOCKET SCENARIO [--uid NUMBER].

Each scenario says a line for what each call did: its result, or the exception and its text.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable

import milter

import Milter


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def attempt(name: str, call: Callable[..., object], *arguments: object) -> None:
    """Call, and say how it ended."""
    try:
        result = call(*arguments)
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - said, not handled
        say(f"{name}: {type(exc).__name__}: {exc}")
    else:
        say(f"{name}: {result}")


class Idle(Milter.Base):
    """Takes every message."""

    def eom(self) -> int:
        say("eom")
        return Milter.ACCEPT


def set_up(name: str) -> None:
    Milter.factory = Idle
    milter.register("calls", negotiate=Milter.negotiate_callback)
    milter.set_connect_callback(Milter.connect_callback)
    milter.set_eom_callback(lambda ctx: ctx.getpriv().eom())
    milter.set_close_callback(Milter.close_callback)
    milter.setconn(name)


def stop_before_main(name: str) -> None:
    set_up(name)
    milter.opensocket(True)
    attempt("stop", milter.stop)
    attempt("main", milter.main)
    say("socket there:", os.path.exists(name.partition(":")[2]))
    attempt("again", milter.main)


def stop_before_opensocket(name: str) -> None:
    set_up(name)
    attempt("stop", milter.stop)
    attempt("main", milter.main)
    say("socket there:", os.path.exists(name.partition(":")[2]))


def stop_from_a_thread(name: str) -> None:
    set_up(name)
    go = threading.Event()
    Milter.factory = type("Going", (Idle,), {"eom": lambda self: go.set() or Milter.ACCEPT})
    threading.Thread(target=lambda: go.wait() and attempt("stop", milter.stop)).start()
    attempt("main", milter.main)


def stop_from_a_callback(name: str) -> None:
    set_up(name)

    def eom(ctx: object) -> int:
        attempt("stop", milter.stop)
        attempt("stop", milter.stop)
        ctx.getpriv().addheader("X-Stamp", "after stop")
        return Milter.ACCEPT

    milter.set_eom_callback(eom)
    attempt("main", milter.main)


def second_main(name: str) -> None:
    set_up(name)

    def eom(ctx: object) -> int:
        attempt("main in a callback", milter.main)
        thread = threading.Thread(target=attempt, args=("main in a thread", milter.main))
        thread.start()
        thread.join()
        return Milter.ACCEPT

    milter.set_eom_callback(eom)
    attempt("main", milter.main)
    attempt("main after it", milter.main)
    attempt("opensocket after it", milter.opensocket, True)
    attempt("setconn after it", milter.setconn, "unix:/nowhere/at/all")
    attempt("set_engine after it", milter.set_engine, "libmilter")


def main_again(name: str) -> None:
    """What is asked of one does not count for the next, and each has all that was set up."""
    set_up(name)
    milter.set_engine("native")
    attempt("stop", milter.stop)
    attempt("main 0", milter.main)

    def eom(ctx: object) -> int:
        milter.stop()
        return Milter.ACCEPT

    milter.set_eom_callback(eom)
    for count in range(1, 4):
        attempt(f"main {count}", milter.main)
        say("socket there:", os.path.exists(name.partition(":")[2]))
    milter.opensocket(True)
    attempt("main 4", milter.main)
    say("left:", milter.getdiag()[0] - milter.getdiag()[1], threading.active_count())


def second_runmilter(name: str) -> None:
    Milter.factory = Idle
    attempt("runmilter", Milter.runmilter, "calls", name)
    attempt("runmilter again", Milter.runmilter, "calls", name)
    attempt("runmilter elsewhere", Milter.runmilter, "calls", name + "2")
    say("socket there:", os.path.exists(name.partition(":")[2] + "2"))


def before_register(name: str) -> None:
    attempt("opensocket", milter.opensocket, True)
    attempt("main", milter.main)
    attempt("setconn", milter.setconn, name)
    attempt("opensocket", milter.opensocket, True)
    attempt("main", milter.main)
    say("socket there:", os.path.exists(name.partition(":")[2]))
    set_up(name)
    say("now")
    attempt("main", milter.main)


def before_setconn(name: str) -> None:
    milter.register("calls")
    attempt("opensocket", milter.opensocket, True)
    attempt("main", milter.main)
    set_up(name)
    say("now")
    attempt("main", milter.main)


def while_running(name: str) -> None:
    set_up(name)
    milter.opensocket(True)
    attempt("opensocket twice", milter.opensocket, True)
    attempt("setconn when open", milter.setconn, name + "2")

    def eom(ctx: object) -> int:
        attempt("register", milter.register, "other")
        attempt("opensocket", milter.opensocket, True)
        attempt("setconn", milter.setconn, name + "2")
        return Milter.ACCEPT

    milter.set_eom_callback(eom)
    attempt("main", milter.main)


def raise_in(stage: str, exception: BaseException) -> Callable[[str], None]:
    """A scenario: a callback raises what ends a program."""

    def scenario(name: str) -> None:
        set_up(name)

        def fail(ctx: object, *arguments: object) -> int:
            say("in", stage)
            raise exception

        # Without a negotiate callback every step is asked for that has a callback.
        milter.register("calls", negotiate=fail if stage == "negotiate" else None)
        milter.set_envfrom_callback(lambda ctx, *arguments: Milter.CONTINUE)
        if stage != "negotiate":
            getattr(milter, f"set_{stage}_callback")(fail)
        try:
            milter.main()
        finally:
            say("after main")

    return scenario


def exit_in_a_thread(name: str) -> None:
    set_up(name)
    milter.set_eom_callback(lambda ctx: sys.exit(4))
    thread = threading.Thread(target=attempt, args=("main", milter.main))
    thread.start()
    thread.join()
    say("the main thread goes on")


def daemonise(name: str) -> None:
    """Fork once the socket is open, as daemons do."""
    set_up(name)
    milter.opensocket(True)
    if os.fork():
        say("parent ends")
        return
    os.setsid()
    say("child", os.getpid())
    attempt("main", milter.main)


def fork_without_main(name: str) -> None:
    """Children that end as programs do leave the parent's socket alone."""
    set_up(name)
    milter.opensocket(True)
    attempt("child", fork_and_end)

    def eom(ctx: object) -> int:
        attempt("child", fork_and_end)
        return Milter.ACCEPT

    milter.set_eom_callback(eom)
    signal.signal(signal.SIGUSR1, lambda *_: attempt("child", fork_and_end))
    attempt("main", milter.main)
    attempt("child", fork_and_end)
    say("socket there:", os.path.exists(name.partition(":")[2]))


def fork_and_end() -> int:
    """Fork a child that runs what the interpreter's end runs; returns its status."""
    pid = os.fork()
    if pid == 0:
        milter.stop()  # a child's business only
        atexit._run_exitfuncs()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


SCENARIOS = {
    "stop-before-main": stop_before_main,
    "stop-before-opensocket": stop_before_opensocket,
    "stop-from-a-thread": stop_from_a_thread,
    "stop-from-a-callback": stop_from_a_callback,
    "second-main": second_main,
    "main-again": main_again,
    "second-runmilter": second_runmilter,
    "before-register": before_register,
    "before-setconn": before_setconn,
    "while-running": while_running,
    "exit-in-a-thread": exit_in_a_thread,
    "daemonise": daemonise,
    "fork-without-main": fork_without_main,
}
for _stage in (
    "negotiate",
    "connect",
    "helo",
    "envfrom",
    "header",
    "body",
    "eom",
    "abort",
    "close",
):
    SCENARIOS[f"exit-in-{_stage}"] = raise_in(_stage, SystemExit(3))
    SCENARIOS[f"interrupt-in-{_stage}"] = raise_in(_stage, KeyboardInterrupt())
SCENARIOS["exit-text"] = raise_in("eom", SystemExit("a last word"))

if __name__ == "__main__":
    if sys.argv[3:4] == ["--uid"]:
        os.setgid(int(sys.argv[4]))
        os.setuid(int(sys.argv[4]))
    SCENARIOS[sys.argv[2]](sys.argv[1])
