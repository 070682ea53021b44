"""Play the conversations of fuzz/wire.c to one filter on each engine, and compare the answers.

The interpreter that runs this runs the filters, so pymilter has to be installed there. Two
processes of fuzz/wire_filter.py, one on libmilter and one on our own engine, get the same
conversations at the same time. What comes back is compared packet by packet: answers, changes to
the message, and a digest of what the callbacks saw. The filter's findings, and those of the
generator's model of each engine, count as well.

What may differ is declared in docs/internals.md, and here: see DECLARED.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wire_run import Failure, start, stop

ENGINES = ("libmilter", "native")
KINDS = ("Escaped", "Bytes", "Strict", "Replaced", "bare")
#: Kinds of conversations, their shares, and how the generator is told of them.
PACKETS = {
    "orderly": (0.6, ["--orderly"]),
    "disorderly": (0.2, []),
    "malformed": (0.2, ["--malformed", "1"]),
}
SHOWN = 5  # differences of a phase that are shown in full

#: Name and reason of each difference that docs/internals.md declares.
DECLARED = {
    "ends": "a command that no MTA sends at this point, or at all, ends the connection",
    "once": "body data in the packet that ends the message has one answer, and the message its end",
}


@dataclass
class Answers:
    """What came back in one conversation: a hash for each packet, over all up to it."""

    how: str
    hashes: list[str]


def read_answers(path: Path) -> dict[int, Answers]:
    """What the generator wrote, by the number of the conversation."""
    found = {}
    for line in path.read_text().splitlines():
        number, how, *hashes = line.split()
        found[int(number)] = Answers(how, hashes)
    return found


def same(theirs: Answers, ours: Answers) -> bool:
    """Whether the answers of libmilter and of our own engine are the same.

    The generator does not listen any more once QUIT_NC came where libmilter drops it, and not to
    the second of two answers.
    """
    return "u" in (theirs.how, ours.how) or theirs.hashes == ours.hashes


def declared(theirs: Answers, ours: Answers, log: str) -> str | None:
    """Which declared difference it is: judged by what the native filter logged, played alone."""
    shorter = ours.hashes == theirs.hashes[: len(ours.hashes)]
    # Where the MTA has gone already, the command may never have been read.
    if shorter and (ours.how == "g" or re.search("ERROR .*(a command|a packet) ", log)):
        return "ends"
    return None


def generate(
    options: argparse.Namespace, engine: str, kind: str, work: Path, *extra: object
) -> subprocess.Popen[str]:
    """Begin to play conversations to the filter on one engine."""
    flags = ["--native"] if engine == "native" else []
    flags += ["--bare"] if kind == "bare" else []
    command = [options.generator, "--seed", options.seed, "--threads", options.jobs, *flags]
    command += ["--trace"] if options.trace else []
    command += ["--timeout", options.timeout, *extra, work / f"{engine}.socket"]
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace"
    )


@contextlib.contextmanager
def filters(kind: str, work: Path, found: list[str], tell: str = "--tell") -> Iterator[None]:
    """The filter on each engine; what is wrong with it at the end goes into ``found``."""
    running = {}
    for engine in ENGINES:
        noted = work / f"{engine}.found"
        noted.touch()
        os.environ["PYMILTER_ENGINE"] = engine
        running[engine] = start(
            [str(noted), tell, kind], work / f"{engine}.socket", work / f"{engine}.log"
        )
    try:
        yield
    finally:
        del os.environ["PYMILTER_ENGINE"]
        for engine, process in running.items():
            wrong = stop(process)
            if wrong:
                found.append(f"{engine}: {wrong}\n{(work / f'{engine}.log').read_text()[-4000:]}")
            text = (work / f"{engine}.found").read_text(errors="replace").strip()
            text = "\n".join(line for line in text.splitlines() if not line.startswith("logged: E"))
            if text:
                found.append(f"in the filter on {engine}:\n{text}")


def play_alone(
    options: argparse.Namespace, kind: str, number: int, extra: list[str]
) -> tuple[str, str]:
    """One conversation again, with filters of its own: where it differs, and what native logged."""
    told = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        work = Path(name)
        with filters(kind, work, [], "--tell-all"):
            for engine in ENGINES:
                alone = ["--first", str(number), "--conversations", "1", "--trace", *extra]
                _, errors = generate(options, engine, kind, work, *alone).communicate()
                saw = (work / f"{engine}.log").read_text(errors="replace")
                told.append(f"{errors}{saw}".splitlines())
        log = (work / "native.found").read_text(errors="replace")
    return "\n".join(difflib.unified_diff(*told, *ENGINES, lineterm="", n=2)), log


def compare(
    options: argparse.Namespace, kind: str, work: Path, extra: list[str], found: list[str]
) -> Counter[str]:
    """Judge the conversations of a phase; what is not declared goes into ``found``."""
    theirs, ours = (read_answers(work / f"{engine}.answers") for engine in ENGINES)
    counts: Counter[str] = Counter()
    looked_at = 0
    for number, expected in sorted(theirs.items()):
        got = ours.get(number)
        if got is not None and same(expected, got):
            counts["same"] += 1
            continue
        if expected.how == "s":  # our model of either engine has judged the answers
            counts["once"] += 1
            continue
        prefix = got is not None and got.hashes == expected.hashes[: len(got.hashes)]
        if got is not None and got.how == "e" and prefix:  # the generator's model says so too
            counts["ends"] += 1
            continue
        if prefix and expected.how == "m" and looked_at >= options.looked_at:
            counts["not looked at"] += 1  # malformed, and a beginning of libmilter's answers
            continue
        looked_at += 1
        difference, log = play_alone(options, kind, number, extra)
        name = declared(expected, got, log) if got is not None else None
        if name is not None:
            counts[name] += 1
            continue
        counts["different"] += 1
        if counts["different"] <= SHOWN:
            found.append(
                f"conversation {number} differs ({kind}):\n{difference[:6000]}\n{log[-1000:]}"
            )
    return counts


def run_phase(
    options: argparse.Namespace, kind: str, packets: str, first: int, count: int
) -> tuple[Counter[str], list[str]]:
    """One class of the filter, and one kind of conversations."""
    found: list[str] = []
    extra = PACKETS[packets][1]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        work = Path(name)
        with filters(kind, work, found, "--tell-all" if options.trace else "--tell"):
            playing = [
                generate(
                    options, engine, kind, work, "--first", first, "--conversations", count,
                    "--answers", work / f"{engine}.answers", *extra,
                )
                for engine in ENGINES
            ]  # fmt: skip
            for engine, generator in zip(ENGINES, playing):
                output, errors = generator.communicate()
                if options.trace:
                    log = (work / f"{engine}.log").read_text(errors="replace")
                    print(f"--- {engine}\n{errors}{log}")
                found += [
                    f"{engine}: {text}" for text in re.findall(r"^FINDING: (.*)", output, re.M)
                ]
                if generator.returncode not in (0, 1):
                    found.append(f"{engine}: the generator failed: {errors[-500:]}")
        return compare(options, kind, work, extra, found), found


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz differential", description=__doc__)
    parser.add_argument("generator", help="the program made from fuzz/wire.c")
    parser.add_argument("--conversations", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=lambda text: int(text, 0), default=secrets.randbits(32))
    parser.add_argument("--jobs", type=int, default=4, help="connections at a time and engine")
    parser.add_argument("--timeout", type=int, default=30, help="seconds for one answer")
    parser.add_argument("--kind", choices=KINDS, help="only this class of the filter")
    parser.add_argument("--packets", choices=PACKETS, help="only these")
    parser.add_argument("--trace", action="store_true", help="show what goes over the wire")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument(
        "--looked-at",
        type=int,
        default=3,
        metavar="N",
        help="how many malformed ones that end early to play again, to see why (3)",
    )
    options = parser.parse_args()

    began = time.monotonic()
    total: Counter[str] = Counter()
    failed = 0
    kinds = [options.kind] if options.kind else KINDS
    shares = {what: share for what, (share, _) in PACKETS.items()}
    if options.packets:
        shares = {options.packets: 1.0}
    phases = [(kind, what) for kind in kinds for what in shares]
    first = options.first
    for kind, what in phases:
        count = max(1, round(options.conversations * shares[what] / len(kinds)))
        counts, found = run_phase(options, kind, what, first, count)
        first += count
        total += counts
        failed += len(found)
        told = ", ".join(f"{number} {name}" for name, number in counts.items())
        seconds = time.monotonic() - began
        print(f"{seconds:6.0f} s  {what}, {kind}: {told}", flush=True)
        for each in found:
            print(f"  FOUND: {each}", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{sum(total.values())} conversations on both engines in {seconds:.0f} s, seed "
        f"{options.seed}: {total['same']} the same, {total['different']} different, "
        f"{total['not looked at']} malformed that end early and were not looked at; declared: "
        + (", ".join(f"{total[name]} {name}" for name in DECLARED if total[name]) or "none")
    )
    if failed:
        print("One again: --seed S --kind K --packets P --first NUMBER --conversations 1 --trace")
    return min(failed, 1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    try:
        sys.exit(main())
    except Failure as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2)
