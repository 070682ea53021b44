"""A list of macros that ends with a name: smfi_getsymval() goes on behind the list."""

from __future__ import annotations

import sys

from _case import CONNECT, WAIT, case, judge

from Milter.mta import FilterClosed

BODY = """
def look(ctx, *args):
    ctx.getsymval("{nothing}")
    return milter.CONTINUE
milter.set_envfrom_callback(look)
negotiate = None
"""
# What is behind the list decides: glibc then fills what is freed with what is no address.
FILLED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=90"}


def look() -> tuple[bool, str]:
    try:
        with case(BODY, **FILLED) as one:
            one.send(b"C", CONNECT)
            one.mta.read_packet()
            for pairs in range(30):
                for size in (8, 20, 24, 30, 40, 56, 72):
                    one.send(b"U", b"x" * size + b"\0")
                    one.mta.read_packet()
                    one.send(b"D", b"M" + b"a\0b\0" * pairs + b"j\0")
                    one.send(b"M", b"<a@b>\0")
                    one.mta.read_packet()
                    one.send(b"A")
    except FilterClosed:
        return True, f"{2 * pairs + 1} strings: the filter ended, status {one.process.wait(WAIT)}"
    return False, "always answered"


if __name__ == "__main__":
    sys.exit(judge(look))
