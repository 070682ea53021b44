#!/usr/bin/env python3
"""What Milter.metrics costs: CPU time of a callback with it and without, in pairs.

usage: metrics_cost.py [--rounds N] [--duration SECONDS]

One filter that does nothing (filters/noop.py) serves all the time and is told by a signal to
count or not to; so what differs between two measurements is that alone. Needs pymilter in this
interpreter, and nothing else running on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import HERE, build

PROGRAM = f"""
import signal, sys
sys.path.insert(0, {str(HERE / "filters")!r})
import noop, Milter.metrics

def switch(number, frame):
    (Milter.metrics.enable if number == signal.SIGUSR1 else Milter.metrics.disable)()

signal.signal(signal.SIGUSR1, switch)
signal.signal(signal.SIGUSR2, switch)
noop.serve(noop.Noop)
"""
WARMUP = 0.3


def main() -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--duration", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        load, _floor = build(Path(directory))
        address = f"unix:{directory}/socket"
        filter_ = subprocess.Popen([sys.executable, "-c", PROGRAM, address])
        command = [str(load), "--socket", address, "--connections", "1"]
        command += ["--warmup", str(WARMUP), "--pid", str(filter_.pid)]

        def cost(counting: bool, duration: float) -> float:
            filter_.send_signal(signal.SIGUSR1 if counting else signal.SIGUSR2)
            done = subprocess.run(
                [*command, "--duration", str(duration)], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout)
            return float(found["filter_cpu"]) / float(found["callbacks"]) * 1e6

        try:
            wait_for(command, filter_)
            pairs = []
            for number in range(options.rounds):
                # Which comes first changes, in case the machine gets slower or faster.
                order = (False, True) if number % 2 else (True, False)
                each = {counting: cost(counting, options.duration) for counting in order}
                pairs.append((each[False], each[True]))
                without, with_ = pairs[-1]
                print(
                    f"{without:7.3f} us without, {with_:7.3f} us with: {with_ / without - 1:+.2%}"
                )
        finally:
            filter_.terminate()
            filter_.wait(20)
    shares = sorted(with_ / without - 1 for without, with_ in pairs)
    quarter = len(shares) // 4
    print(
        f"median {statistics.median(shares):+.2%}, half of all between "
        f"{shares[quarter]:+.2%} and {shares[-quarter - 1]:+.2%}"
    )
    return 0


def wait_for(command: list[str], filter_: subprocess.Popen[bytes]) -> None:
    """Until the filter serves: it has its signal handlers then."""
    for attempt in itertools.count():
        done = subprocess.run([*command, "--duration", "0.1"], capture_output=True, check=False)
        if done.returncode == 0:
            return
        if attempt == 100 or filter_.poll() is not None:
            raise SystemExit(done.stderr.decode())


if __name__ == "__main__":
    sys.exit(main())
