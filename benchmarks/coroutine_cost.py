#!/usr/bin/env python3
"""What coroutine callbacks cost: python benchmarks/coroutine_cost.py [--engine native]

Prints the messages in a second of 16 connections to a filter whose callbacks do nothing, plain and
as coroutines, and the relation of the two.  Then, of 1,000 connections that each wait a second in
`envrcpt` at the same time: messages in a second, threads of the process at most, and the memory
that each takes which waits, in KiB.  Takes about half a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
from pathlib import Path

from measuring import (
    ROOT,
    Filter,
    Subject,
    Times,
    Workload,
    allow_many_files,
    build,
    measure,
    running,
)

CONNECTIONS = 1000
PLAIN = Workload("noop", "noop", connections=16)
COROUTINES = Workload("async", "coroutine", connections=16)
WAITING = Workload("async", "waiting", connections=CONNECTIONS)


class Watch:
    """The most threads and memory that a process has while it is looked at."""

    def __init__(self, served: Filter) -> None:
        self._served = served
        self._end = threading.Event()
        self.threads = self.memory = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        (process,) = self._served.processes()
        while not self._end.wait(0.1):
            status = Path(f"/proc/{process}/status").read_text()
            (threads,) = (line for line in status.splitlines() if line.startswith("Threads:"))
            self.threads = max(self.threads, int(threads.split()[1]))
            self.memory = max(self.memory, self._served.memory()["pss"])

    def stop(self) -> None:
        """Look no more."""
        self._end.set()
        self._thread.join()


def main() -> int:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", default="native", choices=["native", "libmilter"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "bench")
    arguments = parser.parse_args()
    allow_many_files()
    load, floor = build(arguments.build)
    subject = Subject("ours", sys.executable, engine=arguments.engine)
    rates: dict[str, list[float]] = {PLAIN.filter: [], COROUTINES.filter: []}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for _ in range(arguments.rounds):
            for workload in (PLAIN, COROUTINES):
                with running(subject, workload, floor, work) as served:
                    sample = measure(served, workload, load, Times(0.3, 1.0))
                rates[workload.filter].append(sample["rate"])
        plain, coroutines = (statistics.median(rates[name]) for name in rates)
        print(
            f"16 connections, nothing done: plain {plain:.0f}/s, coroutines {coroutines:.0f}/s, "
            f"relation {coroutines / plain:.2f}"
        )
        with running(subject, WAITING, floor, work) as served:
            before = served.memory()["pss"]
            watch = Watch(served)
            sample = measure(served, WAITING, load, Times(2.0, 4.0))
            watch.stop()
    each = (watch.memory - before) / CONNECTIONS / 1024
    print(
        f"{CONNECTIONS} connections that wait 1 s: {sample['rate']:.0f}/s, "
        f"{watch.threads} threads, {each:.1f} KiB for each"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
