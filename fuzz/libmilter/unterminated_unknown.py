"""An unknown command without its NUL: libmilter passes it on, and no length with it."""

from __future__ import annotations

import sys

from _case import CONNECT, case, judge

from Milter.mta import FilterClosed

# The callback answers with the length of what it got.
BODY = """
def unknown(ctx, command):
    ctx.setreply("550", "5.0.0", str(len(command)))
    return milter.REJECT
register = milter.register
milter.register = lambda *args, **options: register(*args, unknown=unknown, **options)
negotiate = None
"""
# What libmilter asks for and does not fill is then no NUL.
FILLED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=90"}


def look() -> tuple[bool, str]:
    with case(BODY, **FILLED) as one:
        one.send(b"C", CONNECT)
        one.mta.read_packet()
        for size in range(1, 60):
            one.send(b"U", b"x" * size)
            try:
                got = int(one.mta.read_packet().data.rstrip(b"\0").split()[-1])
            except FilterClosed:
                return False, f"{size} bytes without NUL: the connection was closed"
            if got != size:
                return True, f"{size} bytes without NUL: the callback got {got}"
    return False, "the callback always got what was sent"


if __name__ == "__main__":
    sys.exit(judge(look))
