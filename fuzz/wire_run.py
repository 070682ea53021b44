"""Run fuzz/wire against fuzz/wire_filter.py, in phases, and give a verdict.

The interpreter that runs this runs the filter, so pymilter has to be installed there.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
START_SECONDS = 60
STOP_SECONDS = 60

# What is run: its name, its share of the conversations, and whether the callbacks are set on the
# extension itself and the packets are damaged.
PHASES = (
    ("well-formed packets, Milter.Base", 0.50, False, False),
    ("well-formed packets, bare extension", 0.15, True, False),
    ("malformed packets, Milter.Base", 0.25, False, True),
    ("malformed packets, bare extension", 0.10, True, True),
)


class Failure(Exception):
    """The filter does not even start."""


def start(arguments: list[str], socket: Path, log: Path) -> subprocess.Popen[bytes]:
    """A filter that listens."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "wire_filter.py"), f"unix:{socket}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + START_SECONDS
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure(f"the filter did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.05)
    return process


def stop(process: subprocess.Popen[bytes]) -> str | None:
    """End the filter; returns what was wrong with its end."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"the filter did not end within {STOP_SECONDS} s"
    if status < 0:
        return f"the filter was killed by {signal.Signals(-status).name}"
    return f"the filter ended with status {status}" if status else None


def run_phase(
    options: argparse.Namespace, first: int, count: int, bare: bool, malformed: bool
) -> tuple[list[str], str]:
    """What was found, and the generator's figures."""
    flags = ["--bare"] if bare else []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        directory = Path(name)
        log, noted = directory / "log", directory / "found"
        noted.touch()
        process = start([str(noted), *flags], directory / "socket", log)
        command = [options.generator, "--seed", options.seed, "--first", first]
        command += ["--conversations", count, "--threads", options.jobs, *flags]
        command += ["--timeout", options.timeout]
        command += ["--malformed", "1"] if malformed else []
        command += ["--trace"] if options.trace else []
        command += ["--with-known-faults"] if options.with_known_faults else []
        generator = subprocess.run(
            [*map(str, command), str(directory / "socket")],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        wrong = stop(process)
        found = re.findall(r"^FINDING: (.*)", generator.stdout, re.MULTILINE)
        if generator.returncode not in (0, 1):
            found.append(f"the generator ended with status {generator.returncode}")
        if wrong:
            found.append(wrong)
        text = noted.read_text(errors="replace").strip()
        if text:
            found.append(f"in the filter:\n{text}")
        output = log.read_text(errors="replace").strip()
        if found:
            print(f"The filter's output:\n{output[-10_000:]}")
        lines = generator.stdout.strip().splitlines() or ["no figures"]
        return found, f"{lines[-1]}; {output.splitlines()[-1] if output else 'no output'}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz wire", description=__doc__)
    parser.add_argument("generator", help="the program made from fuzz/wire.c")
    parser.add_argument("--conversations", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=lambda text: int(text, 0), default=secrets.randbits(32))
    parser.add_argument("--jobs", type=int, default=8, help="connections at a time")
    parser.add_argument("--timeout", type=int, default=30, help="seconds for one answer")
    parser.add_argument("--phase", type=int, choices=range(len(PHASES)), help="only this one")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--trace", action="store_true", help="show the packets")
    parser.add_argument("--with-known-faults", action="store_true", help="crash libmilter too")
    options = parser.parse_args()

    began = time.monotonic()
    total, failed, first = 0, 0, options.first
    for number, (name, share, bare, malformed) in enumerate(PHASES):
        if options.phase not in (None, number):
            continue
        count = options.conversations if options.phase is not None else 0
        count = count or max(1, round(options.conversations * share))
        print(f"{name}: {count} conversations, seed {options.seed} (phase {number})", flush=True)
        found, figures = run_phase(options, first, count, bare, malformed)
        print(f"  {figures}", flush=True)
        for each in found:
            print(f"  FOUND: {each}", flush=True)
        failed += len(found)
        total += count
        first += count
    seconds = time.monotonic() - began
    print(
        f"{total} conversations in {seconds:.0f} s with Python {sys.version.split()[0]}, "
        f"seed {options.seed}: " + (f"{failed} FINDINGS" if failed else "nothing found")
    )
    if failed:
        print("One of them again: --seed S --phase P --first NUMBER --conversations 1 --trace")
    return min(failed, 1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    sys.exit(main())
