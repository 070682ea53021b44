"""A filter on a listening socket that is open already: inherited_socket.py SOCKET KIND.

It makes the descriptor itself, as a service manager would hand it over.
"""

from __future__ import annotations

import os
import socket
import sys

import milter

import Milter


class Stamp(Milter.Base):
    def eom(self) -> int:
        self.addheader("X-Stamp", "yes")
        return Milter.ACCEPT


def descriptor(name: str, kind: str) -> int:
    if kind == "none":
        return 99
    if kind == "file":
        return os.open(__file__, os.O_RDONLY)
    if kind == "idle":
        return socket.socket(socket.AF_UNIX).detach()
    if kind == "inet":
        port, _, host = name.partition(":")[2].partition("@")
        server = socket.create_server((host, int(port)))
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(name.partition(":")[2])
        server.listen()
    return server.detach()


def main() -> None:
    name, kind = sys.argv[1:]
    Milter.factory = Stamp
    try:
        Milter.runmilter("inherit", f"fd:{descriptor(name, kind)}")
    except milter.error as exc:
        print("failed:", exc, type(exc.__cause__).__name__, flush=True)
        sys.exit(2)
    print("main returned", flush=True)


if __name__ == "__main__":
    main()
