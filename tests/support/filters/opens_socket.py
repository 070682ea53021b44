"""Opening a socket: opens_socket.py SOCKET [OPTION...] says how it went, then runs the filter."""

from __future__ import annotations

import argparse
import os
import resource
import stat
import sys

import milter

import Milter


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Stamp(Milter.Base):
    def eom(self) -> int:
        self.addheader("X-Stamp", "yes")
        return Milter.ACCEPT


def fail(stage: str, exc: Exception) -> None:
    """Say all that an application can find out of a failure."""
    cause = exc.__cause__
    say(f"{stage} failed:", exc)
    say("types:", *(kind.__name__ for kind in type(exc).__mro__))
    if isinstance(cause, OSError):
        say("cause:", type(cause).__name__, cause.errno)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--keep", action="store_true", help="rmsock=False")
    parser.add_argument("--uid", type=int)
    parser.add_argument("--mode", type=lambda text: int(text, 8))
    parser.add_argument("--umask", type=lambda text: int(text, 8))
    parser.add_argument("--start-in")
    parser.add_argument("--chdir")
    parser.add_argument("--files", type=int, help="the soft limit of open files")
    parser.add_argument("--lazy", action="store_true", help="leave opensocket() to main()")
    options = parser.parse_args()
    if options.files:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.files, hard))
    if options.start_in:
        os.chdir(options.start_in)
    if options.uid:
        os.setgid(options.uid)
        os.setuid(options.uid)
    if options.umask is not None:
        os.umask(options.umask)
    Milter.factory = Stamp
    milter.register("sockets", negotiate=Milter.negotiate_callback)
    milter.set_eom_callback(lambda ctx: ctx.getpriv().eom())
    milter.set_close_callback(Milter.close_callback)
    try:
        milter.setconn(options.socket)
    except milter.error as exc:
        fail("setconn", exc)
    try:
        if not options.lazy:
            milter.opensocket(not options.keep)
    except milter.error as exc:
        fail("opensocket", exc)
    path = options.socket.rpartition(":")[2]
    if not options.lazy and os.path.exists(path):
        say("open:", stat.S_ISSOCK(os.stat(path).st_mode))
        if options.mode is not None:
            os.chmod(path, options.mode)
    else:
        say("open")
    if options.chdir:
        os.chdir(options.chdir)
    try:
        milter.main()
    except milter.error as exc:
        fail("main", exc)
    say("main returned")


if __name__ == "__main__":
    main()
