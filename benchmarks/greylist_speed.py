#!/usr/bin/env python3
"""Measure greylisting: checks a second from several threads.

usage: greylist_speed.py [--threads N] [--checks N] [URL...]

Measures the shelf and SQLite in a temporary folder, and each greylist whose URL is given
(postgresql://… or redis://…), whose records it leaves behind.  Half of the checks are of new
triples, half of active ones.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time

from Milter import greylist, greysql


def measure(grey: greylist.Greylist | greysql.Greylist, threads: int, checks: int) -> float:
    """Checks a second over all threads."""
    run = f"{os.getpid()}-{time.monotonic_ns()}"
    barrier = threading.Barrier(threads + 1)

    def work(number: int) -> None:
        barrier.wait()
        for count in range(checks // threads // 2):
            triple = ("192.0.2.1", f"user{count}@host{number}.{run}.example", "rcpt@example.org")
            grey.check(*triple)
            grey.check(*triple, timeinc=3600)
        barrier.wait()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    barrier.wait()
    elapsed = time.perf_counter() - begin
    for worker in workers:
        worker.join()
    return checks / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--checks", type=int, default=16_000)
    parser.add_argument("url", nargs="*", help="greylists on servers to measure too")
    args = parser.parse_args()
    print(f"{'store':12}{'threads':>8}{'checks':>9}{'checks/s':>10}")
    with tempfile.TemporaryDirectory() as folder:
        stores: list[tuple[str, greylist.Greylist | greysql.Greylist]] = [
            ("shelf", greylist.Greylist(os.path.join(folder, "shelf"))),
            ("sqlite", greysql.Greylist(os.path.join(folder, "sqlite"))),
            *((url.partition(":")[0], greysql.Greylist(url)) for url in args.url),
        ]
        for name, grey in stores:
            with grey:
                speed = measure(grey, args.threads, args.checks)
            print(f"{name:12}{args.threads:8}{args.checks:9}{speed:10,.0f}")


if __name__ == "__main__":
    main()
