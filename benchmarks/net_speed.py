"""Print how long the small tools of the library take, beside the time each may take.

usage: python benchmarks/net_speed.py

Exits 1 where one takes longer.  Each figure is the best of several rounds, which leaves out
what else the machine did meanwhile.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Callable

from Milter import utils
from Milter.dns import Session
from Milter.dynip import is_dynip
from Milter.unsign import unsign
from Milter.utils import iniplist, parse_header, parseaddr

ROUNDS = 30


def best(call: Callable[[], Any], repeat: int = 100) -> float:
    """Return the shortest time of one call, in microseconds."""
    call()
    shortest = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest / repeat * 1e6


def main() -> int:
    networks = [f"10.{i >> 8}.{i & 255}.0/24" for i in range(5000)]
    networks += [f"2001:db8:{i:x}::/48" for i in range(5000)]
    mixed = [f"172.16.{i >> 8}.{i & 255}" for i in range(5000)]
    mixed += [f"192.{i % 200}.{i // 200}.*" for i in range(5000)]
    session = Session()
    session.cache["mail.example.com", "A"] = ["192.0.2.1"]
    word = "=?iso-8859-1?Q?Peter_=D8rum?= <orum@ditas.dk>"
    signed = "SRS0=8Y3CZ=3U=jsconnor.com=bills@bmsi.com"
    table: list[tuple[str, float, float]] = [
        ("iniplist, 10,000 networks, no match", best(lambda: iniplist("192.0.2.1", networks)), 100),
        ("iniplist, the same list, IPv6", best(lambda: iniplist("2001:db9::1", networks)), 100),
        ("iniplist, 10,000 addresses and globs", best(lambda: iniplist("1.2.3.4", mixed)), 100),
        (
            "iniplist, compiling 10,000 networks",
            best(lambda: utils._Patterns(networks), 1),
            500_000,
        ),
        ("Session.dns from its cache", best(lambda: session.dns("mail.example.com", "A")), 5),
        ("parse_header, one encoded word", best(lambda: parse_header(word)), 50),
        ("parseaddr", best(lambda: parseaddr("God@heaven <@hop.org:jeff@spec.org>")), 50),
        ("unsign, SRS0", best(lambda: unsign(signed)), 50),
        ("is_dynip", best(lambda: is_dynip("mail.example.com", "69.208.201.177")), 100),
    ]
    for name, took, limit in table:
        mark = "" if took < limit else "  TOO SLOW"
        print(f"{name:40} {took:12.2f} us  (limit {limit:,.0f}){mark}")
    return 1 if any(took >= limit for _, took, limit in table) else 0


if __name__ == "__main__":
    sys.exit(main())
