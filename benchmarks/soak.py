"""A mixed load on a filter for long, to see whether it grows: see --help and scripts/soak."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from measuring import FLAGS, BenchError, accepts, libmilter_flags  # noqa: E402

SETTLED = 50_000  # connections and messages after which nothing may grow
GROWTH = 1 << 20  # bytes that the resident set may grow by all the same
AT_EDGE = 10  # samples whose median counts at either end
ANSWER = 60.0  # seconds that the filter has for what it is asked
STEADY = 20  # looks, 0.05 s apart, at which nothing changes
ENDING = 90.0  # seconds until it must have let go of everything: threads may idle for 60


@dataclass(frozen=True)
class Sample:
    """The filter at one moment.

    ``seconds`` since the load began; ``connections`` and ``messages`` so far; ``rss`` in bytes;
    ``created`` to ``inside``: milter.getdiag(); ``reported``: exceptions that were logged.
    """

    seconds: float
    connections: int
    messages: int
    rss: int
    descriptors: int
    threads: int
    created: int
    deleted: int
    in_progress: int
    inside: int
    reported: int


class Watched:
    """The filter under load, whose life can be looked at."""

    def __init__(self, address: str, log: Path, engine: str | None) -> None:
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "filters" / "soak.py"), address],
                cwd=log.parent,
                env={**os.environ, **({"PYMILTER_ENGINE": engine} if engine else {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log = log

    def wait(self, address: str) -> None:
        """Wait until it listens."""
        deadline = time.monotonic() + ANSWER
        while not accepts(address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the filter does not listen: {self.said()}")
            time.sleep(0.01)

    def said(self) -> str:
        """The end of what it wrote to standard error."""
        return self._log.read_text(errors="replace")[-2000:].strip()

    def ask(self) -> list[int]:
        """milter.getdiag() and the number of exceptions that were reported."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], ANSWER)
            line = self._process.stdout.readline() if ready else ""
        except OSError:
            line = ""
        if not line:
            raise BenchError(f"the filter is silent, status {self._process.poll()}: {self.said()}")
        answer: list[int] = json.loads(line)
        return answer

    def look(self, seconds: float, connections: int, messages: int) -> Sample:
        """How it is now."""
        answer = self.ask()
        proc = Path("/proc", str(self._process.pid))
        status = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )
        rss = int(status["VmRSS"].split()[0]) * 1024
        descriptors = len(os.listdir(proc / "fd"))
        threads = int(status["Threads"])
        return Sample(seconds, connections, messages, rss, descriptors, threads, *answer)

    def end(self) -> int:
        """Let it stop by itself; returns its exit status."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            return self._process.wait(ANSWER)
        except subprocess.TimeoutExpired:
            self.kill()
            raise BenchError("the filter does not stop") from None

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


def compile_load(directory: Path) -> Path:
    """Build the generator."""
    program = directory / "soak"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, *FLAGS, *libmilter_flags()[:1], str(HERE / "soak.c"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{shlex.join(command)}\n{done.stderr}")
    return program


class Load:
    """The generator at work, whose lines are read by a thread of their own."""

    def __init__(self, program: Path, path: str, options: argparse.Namespace) -> None:
        seconds = options.minutes * 60 if options.minutes else 0
        count = 0 if options.minutes else options.messages
        self._process = subprocess.Popen(
            [str(program), path, str(options.connections), str(count), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def reports(self) -> Iterator[dict[str, Any]]:
        """What it says, once a second; the last report is final."""
        while True:
            try:
                line = self._lines.get(timeout=ANSWER * 2)
            except queue.Empty:
                raise BenchError("the load generator is stuck") from None
            if line is None:
                raise BenchError(f"the load generator ended with status {self._process.wait()}")
            report: dict[str, Any] = json.loads(line)
            yield report
            if report["done"]:
                return

    def end(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()


# --- the verdict ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What came out: ``faults`` is empty where all is well, ``growth`` None where not judged."""

    faults: list[str]
    growth: int | None
    settled_after: int


def growth(samples: list[Sample], settled_after: int) -> int | None:
    """By how much the resident set grew once it was settled, in bytes; None where too short."""
    settled = [
        sample.rss
        for sample in samples
        if min(sample.connections, sample.messages) >= settled_after
    ]
    if len(settled) < 2:
        return None
    edge = min(AT_EDGE, len(settled) // 2)
    return int(statistics.median(settled[-edge:]) - statistics.median(settled[:edge]))


def judge(
    samples: list[Sample], before: Sample, after: Sample, report: dict[str, Any], settled_after: int
) -> Verdict:
    """What is wrong with the filter, if anything."""
    faults = []
    grown = growth(samples, settled_after)
    if grown is not None and grown >= GROWTH:
        faults.append(f"memory grew by {grown / 1024:.0f} KiB after {settled_after:,} messages")
    if after.created != after.deleted:
        faults.append(f"{after.created} contexts created, {after.deleted} deleted")
    if after.in_progress or after.inside:
        faults.append(f"{after.in_progress} messages and {after.inside} callbacks are left")
    if after.descriptors > before.descriptors:
        faults.append(f"descriptors: {before.descriptors} before, {after.descriptors} after")
    if after.threads > before.threads:
        faults.append(f"threads: {before.threads} before, {after.threads} after")
    if report["errors"]:
        faults.append(f"{report['errors']} wrong answers, the first: {report['error']}")
    if report["raise"] > 100 and not after.reported:
        faults.append("no exception was reported")
    return Verdict(faults, grown, settled_after)


def settle(
    watched: Watched, report: dict[str, Any], seconds: float, bound: Sample | None
) -> Sample:
    """The filter once it has let go of what it had: down to `bound`, or of all that it will."""
    deadline = time.monotonic() + ENDING
    steady = 0
    last = None
    while True:
        now = watched.look(seconds, report["connections"], report["messages"])
        quiet = now.created == now.deleted and not now.in_progress and not now.inside
        held = (now.descriptors, now.threads)
        steady = steady + 1 if held == last else 0
        last = held
        if bound is None:
            enough = steady >= STEADY
        else:
            enough = now.descriptors <= bound.descriptors and now.threads <= bound.threads
        if (quiet and enough) or time.monotonic() > deadline:
            return now
        time.sleep(0.05)


# --- a run ------------------------------------------------------------------------------------


def progress(sample: Sample) -> None:
    """Say how far it is, on one line that is written over."""
    rate = sample.messages / sample.seconds if sample.seconds else 0.0
    end = "\r" if sys.stderr.isatty() else "\n"
    print(
        f"{sample.seconds:6.0f} s  {sample.connections:>9,} connections  "
        f"{sample.messages:>9,} messages  {rate:6,.0f}/s  {sample.rss / 2**20:6.1f} MiB  "
        f"{sample.descriptors} descriptors  {sample.threads} threads  "
        f"{sample.created - sample.deleted} contexts",
        end=end,
        file=sys.stderr,
        flush=True,
    )


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One soak; returns all that was seen."""
    program = compile_load(directory)
    address = f"unix:{directory}/s"
    watched = Watched(address, directory / "filter.log", options.engine)
    load = None
    report: dict[str, Any] = {}
    try:
        watched.wait(address)
        # Some messages, so that what libmilter and Python make once is there already.
        few = argparse.Namespace(minutes=0, messages=50, connections=options.connections)
        *_, report = Load(program, f"{directory}/s", few).reports()
        before = settle(watched, report, 0.0, None)
        load = Load(program, f"{directory}/s", options)
        began, told, samples = time.monotonic(), 0.0, []
        for report in load.reports():
            now = time.monotonic() - began
            samples.append(watched.look(now, report["connections"], report["messages"]))
            if now - told > (0.9 if sys.stderr.isatty() else 10):
                told = now
                progress(samples[-1])
        after = settle(watched, report, time.monotonic() - began, before)
        status = watched.end()
    finally:
        if load is not None:
            load.end()
        watched.kill()
    settled_after = min(SETTLED, int(min(report["connections"], report["messages"]) * 0.5))
    verdict = judge(samples, before, after, report, settled_after)
    if status:
        verdict.faults.append(f"the filter ended with status {status}: {watched.said()}")
    return {
        "python": sys.version.split()[0],
        "engine": options.engine or os.environ.get("PYMILTER_ENGINE") or "libmilter",
        "at_a_time": options.connections,
        "verdict": asdict(verdict),
        "load": report,
        "before": asdict(before),
        "after": asdict(after),
        "samples": [asdict(sample) for sample in samples],
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Memory, descriptors and threads over the messages."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    samples = result["samples"]
    messages = [sample["messages"] / 1000 for sample in samples]
    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    upper.plot(messages, [sample["rss"] / 2**20 for sample in samples], color="#0072b2")
    upper.axvline(result["verdict"]["settled_after"] / 1000, color="#999999", linestyle=":")
    upper.set_ylim(0, 1.2 * max(sample["rss"] for sample in samples) / 2**20)
    upper.set_ylabel("resident set (MiB)")
    upper.set_title(
        f"{result['load']['connections']:,} connections, {result['load']['messages']:,} messages"
    )
    for name, colour in (("threads", "#d55e00"), ("descriptors", "#009e73")):
        lower.plot(messages, [sample[name] for sample in samples], color=colour, label=name)
    contexts = [sample["created"] - sample["deleted"] for sample in samples]
    lower.plot(messages, contexts, color="#cc79a7", label="contexts")
    lower.set_ylim(0, 1.4 * max(sample["descriptors"] for sample in samples))
    lower.set_xlabel("messages (thousands)")
    lower.legend(loc="upper center", ncols=3)
    figure.savefig(file, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    add = parser.add_argument
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--minutes", type=float, default=0.0, metavar="M", help="how long")
    how_long.add_argument(
        "--messages",
        type=int,
        default=100_000,
        metavar="N",
        help="until there were so many connections and so many messages (100000)",
    )
    add("--connections", type=int, default=8, metavar="C", help="at a time (8)")
    add("--engine", choices=["libmilter", "native"], help="who speaks to the MTA (as usual)")
    add("--json", type=Path, metavar="FILE", help="write all that was seen")
    add("--plot", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.minutes < 0 or options.messages < 1 or options.connections < 1:
        parser.error("--minutes, --messages and --connections must be positive")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 where all is well, 1 where not, 2 where it could not run."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        try:
            result = run(options, Path(directory))
        except BenchError as exc:
            print(f"soak: {exc}", file=sys.stderr)
            return 2
    if options.json is not None:
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(result, options.plot)
    print(summary(result))
    for fault in result["verdict"]["faults"]:
        print(f"FAULT: {fault}")
    print(conclusion(result))
    return 1 if result["verdict"]["faults"] else 0


def summary(result: dict[str, Any]) -> str:
    """What was seen, on one line."""
    load, after, verdict = result["load"], result["after"], result["verdict"]
    if verdict["growth"] is None:
        memory = "memory not judged"
    else:
        memory = (
            f"memory grew by {verdict['growth'] / 1024:.0f} KiB after {verdict['settled_after']:,}"
        )
    return (
        f"{load['connections']:,} connections, {load['messages']:,} messages in "
        f"{after['seconds']:.0f} s; contexts: {after['created']:,} created, "
        f"{after['deleted']:,} deleted; {after['reported']:,} exceptions reported; {memory}; "
        f"descriptors {result['before']['descriptors']} before, {after['descriptors']} after; "
        f"threads {result['before']['threads']} before, {after['threads']} after"
    )


def conclusion(result: dict[str, Any]) -> str:
    """The verdict, which says no more than was judged."""
    if result["verdict"]["faults"]:
        return "FAILED"
    if result["verdict"]["growth"] is None:
        return "OK: nothing is left behind; too short to judge memory"
    return "OK: nothing leaks"


if __name__ == "__main__":
    sys.exit(main())
