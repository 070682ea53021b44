"""What the greylist tests do in other processes: greylist_worker.py MODULE DBNAME MODE ARGUMENT…"""

from __future__ import annotations

import importlib
import os
import sys

IP, RECIPIENT = "192.0.2.1", "rcpt@example.com"


def sender(number: int) -> str:
    return f"user{number}@example.org"


def fill(greylist, first: int, last: int) -> None:
    """Check new triples, saying which ones are committed."""
    for number in range(first, last):
        greylist.check(IP, sender(number), RECIPIENT)
        os.write(1, b"%d\n" % number)


def hammer(greylist, triples: int, rounds: int) -> None:
    """Check triples whose greylisting is over, again and again; print what came back."""
    os.write(1, b"ready\n")
    sys.stdin.readline()
    for _ in range(rounds):
        for number in range(triples):
            print(number, greylist.check(IP, sender(number), RECIPIENT, timeinc=3600))


def fork(greylist) -> None:
    """Check in a child process with the parent's greylist, and in the parent at the same time."""
    greylist.check(IP, sender(0), RECIPIENT)
    child = os.fork()
    for _ in range(100):
        os.write(1, b"%d\n" % greylist.check(IP, sender(0), RECIPIENT, timeinc=3600))
    if child == 0:
        greylist.close()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit(f"the child failed: {status}")


def main() -> None:
    module, dbname, mode, *numbers = sys.argv[1:]
    with importlib.import_module(module).Greylist(dbname) as greylist:
        {"fill": fill, "hammer": hammer, "fork": fork}[mode](greylist, *map(int, numbers))


if __name__ == "__main__":
    main()
