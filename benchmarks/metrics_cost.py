#!/usr/bin/env python3
"""What Milter.metrics costs: instructions of a callback with it and without, in pairs.

usage: metrics_cost.py [--rounds N] [--messages N] [--limit PERCENT]
       metrics_cost.py --cpu [--rounds N] [--duration SECONDS] [--limit PERCENT]

One filter that does nothing (filters/noop.py) serves all the time and is told by a signal to
count or not to; so what differs between two measurements is that alone. Needs pymilter in this
interpreter.

Instructions are counted by valgrind (callgrind), in all threads and libraries of the process:
what else the machine does is no matter. Those of the kernel are not counted, on either side, and
so a callback seems smaller than it is; nor are those of its clock, as valgrind has a system call
in its place (two looks at it take some 150 instructions more). --cpu: CPU time instead, with
all of that, which takes a machine with nothing else to do, or many rounds.

Ends with status 1 where the median is above --limit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring import HERE, build

from Milter.mta import MTA

PROGRAM = f"""
import signal, sys
sys.path.insert(0, {str(HERE / "filters")!r})
import noop, Milter.metrics

def switch(number, frame):
    (Milter.metrics.enable if number == signal.SIGUSR1 else Milter.metrics.disable)()
    print("counting" if number == signal.SIGUSR1 else "not counting", flush=True)

signal.signal(signal.SIGUSR1, switch)
signal.signal(signal.SIGUSR2, switch)
noop.serve(noop.Noop)
"""
WARMUP = 0.3
MESSAGE = b"".join(b"X-Header-%d: value\r\n" % number for number in range(20)) + b"\r\ntext\r\n"
RECIPIENTS = ["<a@example.org>", "<b@example.org>", "<c@example.org>"]
# envfrom, data, eoh, body, eom, and a header or envrcpt each.
CALLBACKS = 5 + 20 + len(RECIPIENTS)

#: Serve for a while and tell what one callback takes.
Cost = Callable[[], float]


def main() -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--messages", type=int, default=50, help="in each measurement")
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of instructions")
    parser.add_argument("--duration", type=float, default=2.0, help="of one with --cpu")
    parser.add_argument("--limit", type=float, metavar="PERCENT", help="status 1 if above")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/socket"
        if options.cpu:
            unit = "us"
            measuring = cpu_time(address, directory, options.duration)
        else:
            unit = "instructions"
            measuring = instructions(address, directory, options.messages)
        with measuring as (filter_, cost):
            pairs = list(measure(filter_, cost, options.rounds, unit))
    shares = sorted(with_ / without - 1 for without, with_ in pairs)
    quarter = len(shares) // 4
    median = statistics.median(shares)
    print(
        f"median {median:+.2%}, half of all between "
        f"{shares[quarter]:+.2%} and {shares[-quarter - 1]:+.2%}"
    )
    if options.limit is not None and median * 100 > options.limit:
        print(f"more than {options.limit:g} %")
        return 1
    return 0


def measure(
    filter_: subprocess.Popen[str], cost: Cost, rounds: int, unit: str
) -> Iterator[tuple[float, float]]:
    """The costs without counting and with it, a pair a round."""
    for number in range(rounds):
        # Which comes first changes, in case the machine gets slower or faster.
        each = {}
        for counting in (False, True) if number % 2 else (True, False):
            switch(filter_, counting)
            each[counting] = cost()
        without, with_ = each[False], each[True]
        print(
            f"{without:9.3f} {unit} without, {with_:9.3f} with: {with_ / without - 1:+.2%}",
            flush=True,
        )
        yield without, with_


def switch(filter_: subprocess.Popen[str], counting: bool) -> None:
    """Have the filter count or not, and wait until it does so."""
    assert filter_.stdout is not None
    filter_.send_signal(signal.SIGUSR1 if counting else signal.SIGUSR2)
    expected = "counting\n" if counting else "not counting\n"
    for line in filter_.stdout:
        if line == expected:
            return
    raise SystemExit("the filter has ended")


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A filter as a process, ended at the end."""
    filter_ = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield filter_
    finally:
        filter_.terminate()
        filter_.wait(20)


@contextlib.contextmanager
def cpu_time(
    address: str, directory: str, duration: float
) -> Iterator[tuple[subprocess.Popen[str], Cost]]:
    """Measure in microseconds of CPU time."""
    load, _floor = build(Path(directory))
    with running([sys.executable, "-c", PROGRAM, address]) as filter_:
        command = [str(load), "--socket", address, "--connections", "1"]
        command += ["--warmup", str(WARMUP), "--pid", str(filter_.pid)]

        def cost() -> float:
            done = subprocess.run(
                [*command, "--duration", str(duration)], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout)
            return float(found["filter_cpu"]) / float(found["callbacks"]) * 1e6

        wait_for(command, filter_)
        yield filter_, cost


@contextlib.contextmanager
def instructions(
    address: str, directory: str, messages: int
) -> Iterator[tuple[subprocess.Popen[str], Cost]]:
    """Measure in instructions."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is missing: apt-get install valgrind, or --cpu")
    out = Path(directory, "callgrind")
    command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"]
    with running([*command, sys.executable, "-c", PROGRAM, address]) as filter_:
        serial = itertools.count(1)

        def dump() -> int:
            """The instructions since the last time."""
            subprocess.run(
                ["callgrind_control", "--dump", str(filter_.pid)],
                capture_output=True,
                check=True,
            )
            text = Path(f"{out}.{next(serial)}").read_text()
            total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
            assert total is not None, text[-1000:]
            return int(total[1])

        with MTA.connect(address, timeout=60, wait_for=120) as mta:

            def cost() -> float:
                dump()
                for _ in range(messages):
                    mta.send(MESSAGE, recipients=RECIPIENTS)
                return dump() / (messages * CALLBACKS)

            mta.send(MESSAGE, recipients=RECIPIENTS)  # the filter has its signal handlers then
            cost()  # what is done once is done
            yield filter_, cost


def wait_for(command: list[str], filter_: subprocess.Popen[str]) -> None:
    """Until the filter serves: it has its signal handlers then."""
    for attempt in itertools.count():
        done = subprocess.run([*command, "--duration", "0.1"], capture_output=True, check=False)
        if done.returncode == 0:
            return
        if attempt == 100 or filter_.poll() is not None:
            raise SystemExit(done.stderr.decode())


if __name__ == "__main__":
    sys.exit(main())
