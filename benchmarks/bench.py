#!/usr/bin/env python3
"""Measure filters under load: how much a message costs, in C and in Python.

Subjects are the floor (a filter in C on libmilter), this project on its own engine and on
libmilter, pymilter 1.0.5 from PyPI, and this project with worker processes; the workload
`function` has its own, which are forms of one filter of whole messages. In a round each
subject's filter is started anew; then they take short turns, in another order each time, as a
machine's speed changes from second to second. Figures are medians over all turns; ratios are
medians of the ratios between turns that follow each other, so that what slows them all does not
count.

scripts/bench makes the environments and calls this.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import (
    ROOT,
    BenchError,
    Filter,
    Subject,
    Times,
    Workload,
    allow_many_files,
    build,
    has_engine,
    has_workers,
    measure,
    running,
)
from reporting import (
    describe_machine,
    describe_python,
    draw,
    evaluate_goals,
    format_goals,
    format_table,
    update_docs,
)

USUAL = "floor,floor-nodelay,native,ours,pymilter,workers,native-workers,pinned"
FORMS = "whole,no-body,at-rcpt,base-rcpt"
SUBJECT = "NAME=PYTHON[,workers=N][,engine=E]"
TRIES = 3  # for a measurement that other processes disturb
PARSE_ADDRESSES = 10  # what the regular expression of filters/parse.py finds in a message

FULL = Times(warmup=0.2, duration=0.4, turns=5)
QUICK = Times(warmup=0.2, duration=0.3, turns=2)


def workloads(load: Path) -> list[Workload]:
    """All that is measured, in the order of the table."""
    message = subprocess.run([str(load), "--print-message"], capture_output=True, check=True).stdout
    headers = 20
    parsed = f"{headers} {PARSE_ADDRESSES} {hashlib.sha256(message).hexdigest()}"
    big = 20 * 1000 * 1000
    return [
        *(
            Workload("churn", "noop", connections=connections, load={"per_connection": 1})
            for connections in (16, 64)
        ),
        *(
            Workload("noop", "noop", transport, connections)
            for transport in ("unix", "tcp")
            for connections in (1, 4, 16, 64, 256)
        ),
        *(
            Workload(
                "parse",
                "parse",
                connections=connections,
                load={"value": parsed},
                subjects=("python", "workers"),
            )
            for connections in (1, 4, 16)
        ),
        *(Workload("block", "block", connections=connections) for connections in (32, 128)),
        Workload("big", "big", connections=4, load={"body": big, "value": big}, stretch=2),
        Workload("async", "coroutine", connections=16, subjects=("coroutines",)),
        Workload("async", "waiting", connections=1000, subjects=("coroutines",), stretch=10),
        Workload("idle", "noop", connections=1000, memory=True),
        *(
            Workload(
                "function",
                "function",
                connections=connections,
                load={"field": "", "verdict": "a"},
                subjects=("forms",),
            )
            for connections in (1, 16)
        ),
    ]


QUICK_KEYS = {
    *("noop/unix/1", "noop/unix/16", "noop/unix/64", "noop/tcp/1", "noop/tcp/16"),
    *("parse/unix/4", "block/unix/32", "big/unix/4", "churn/unix/16", "churn/unix/64"),
    *("idle/unix/1000", "function/unix/1"),
}


def say(text: str) -> None:
    """Progress, for those who wait."""
    print(text, file=sys.stderr, flush=True)


# --- the command line -------------------------------------------------------------------------


def interpreter(text: str) -> str:
    """The path of an interpreter; filters run in another directory than this program."""
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no program")
    return os.path.abspath(found)


def parse_subject(text: str) -> Subject:
    """``NAME=PYTHON[,workers=N][,engine=E]``."""
    found = re.fullmatch(r"([^=]+)=([^,]+)(?:,workers=(\d+))?(?:,engine=(\w+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {SUBJECT}")
    name, python, workers, engine = found.groups()
    return Subject(name, interpreter(python), int(workers) if workers else None, engine=engine)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__.partition("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a rough picture in less than two minutes")
    add("--only", default="", help="workloads or parts of them: noop,parse or noop/unix/16")
    add("--rounds", type=int, help="how often each filter is started (5; quick: 2)")
    add("--turns", type=int, help="how many turns each has in a round (5; quick: 2)")
    add("--seconds", type=float, help="length of a turn (0.4; quick: 0.3)")
    add(
        "--subjects",
        default=f"{USUAL},{FORMS}",
        help=f"which of the usual subjects take part (all: {USUAL},{FORMS})",
    )
    add(
        "--subject",
        type=parse_subject,
        action="append",
        default=[],
        metavar=SUBJECT,
        help="a further subject: an interpreter that has a pymilter; may be given again",
    )
    add(
        "--ours",
        type=interpreter,
        default=sys.executable,
        metavar="PYTHON",
        help="the interpreter with this project (the one that runs this)",
    )
    add(
        "--pymilter",
        type=interpreter,
        metavar="PYTHON",
        help="the interpreter with pymilter 1.0.5",
    )
    add("--build", type=Path, default=ROOT / "build" / "benchmarks", help="where programs are put")
    add("--from", dest="source", type=Path, metavar="FILE", help="take the results of this file")
    add("--json", type=Path, metavar="FILE", help="write the results, each measurement of them")
    add("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    add(
        "--update-docs",
        type=Path,
        nargs="?",
        const=ROOT / "docs" / "performance.md",
        metavar="PAGE",
        help="put them into docs/performance.md",
    )
    add(
        "--calm",
        type=float,
        default=0.1,
        metavar="CORES",
        help="measure again where other processes use more of the machine than this (0.1)",
    )
    add("--list", action="store_true", help="list the workloads")
    chosen = parser.parse_args(arguments)
    for name in ("rounds", "turns"):
        number = getattr(chosen, name)
        if number is not None and number < 1:
            parser.error(f"--{name} {number}: at least 1")
    if chosen.seconds is not None and not 0 < chosen.seconds <= 600:
        parser.error(f"--seconds {chosen.seconds}: more than 0, at most 600")
    return chosen


def choose_subjects(chosen: argparse.Namespace) -> list[Subject]:
    """The subjects that the command line asks for."""
    known = {
        "floor": Subject("floor"),
        "floor-nodelay": Subject("floor-nodelay", nodelay=True),
        "native": Subject("native", chosen.ours, engine="native"),
        "ours": Subject("ours", chosen.ours),
        "pymilter": Subject("pymilter", chosen.pymilter),
        "workers": Subject("workers", chosen.ours, workers=2),
        "native-workers": Subject("native-workers", chosen.ours, workers=2, engine="native"),
        "pinned": Subject("pinned", chosen.ours, workers=2, pinned=True),
        **{form: Subject(form, chosen.ours, form=form) for form in FORMS.split(",")},
    }
    names = [name for name in chosen.subjects.split(",") if name]
    for name in names:
        if name not in known:
            raise BenchError(f"--subjects {name}: none of {', '.join(known)}")
        if name == "pymilter" and chosen.pymilter is None:
            raise BenchError("--pymilter names no interpreter (scripts/bench makes one)")
    subjects = [*(known[name] for name in names), *chosen.subject]
    if len({subject.name for subject in subjects}) < len(subjects) or not subjects:
        raise BenchError("subjects need names of their own, and there must be one at least")
    return subjects


def choose_workloads(every: list[Workload], chosen: argparse.Namespace) -> list[Workload]:
    """The workloads that the command line asks for."""
    parts = [part for part in chosen.only.split(",") if part]
    for part in parts:
        if not any(f"{workload.key}/".startswith(f"{part}/") for workload in every):
            raise BenchError(f"--only {part}: no such workload (--list)")
    if not parts:
        return [one for one in every if not chosen.quick or one.key in QUICK_KEYS]
    return [one for one in every if any(f"{one.key}/".startswith(f"{part}/") for part in parts)]


# --- the rounds -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all measurements have in common; ``calm``: see --calm."""

    programs: tuple[Path, Path]
    rounds: int
    times: Times
    calm: float


def measure_calmly(served: Filter, workload: Workload, setting: Setting) -> dict[str, Any]:
    """Measure again where other processes took part of the machine; the calmest one counts."""
    samples = []
    for _ in range(TRIES):
        samples.append(measure(served, workload, setting.programs[0], setting.times))
        if samples[-1].get("foreign_share", 0.0) <= setting.calm:
            break
    return min(samples, key=lambda sample: float(sample.get("foreign_share", 0.0)))


class Rounds:
    """The measurements: ``samples`` by workload, subject and turn, and ``failures``."""

    def __init__(self, setting: Setting, work: Path) -> None:
        self.samples: dict[str, dict[str, dict[str, Any]]] = {}
        self.failures: dict[str, str] = {}
        self._setting = setting
        self._work = work

    def play(self, number: int, workload: Workload, subjects: list[Subject]) -> None:
        """One round of a workload: a filter for each subject, which then take turns."""
        begun = time.monotonic()
        able = [one for one in subjects if f"{workload.key} {one.name}" not in self.failures]
        # What filters share in memory depends on which of them run.
        groups = [[one] for one in able] if workload.memory else [able]
        turns = 1 if workload.memory else self._setting.times.turns
        for group in groups:
            with contextlib.ExitStack() as stack:
                filters = {one.name: self._start(stack, workload, one) for one in group}
                for turn in range(turns):
                    first = turn % max(len(group), 1)
                    for subject in group[first:] + group[:first]:
                        self._take(f"{number}.{turn}", workload, subject, filters)
        self._tell(number, workload, able, time.monotonic() - begun)

    def _start(
        self, stack: contextlib.ExitStack, workload: Workload, subject: Subject
    ) -> Filter | None:
        try:
            floor = self._setting.programs[1]
            return stack.enter_context(running(subject, workload, floor, self._work))
        except BenchError as exc:
            self._fail(workload, subject, exc)
            return None

    def _take(
        self, number: str, workload: Workload, subject: Subject, filters: dict[str, Filter | None]
    ) -> None:
        served = filters[subject.name]
        if served is None:
            return
        try:
            sample = measure_calmly(served, workload, self._setting)
        except BenchError as exc:
            self._fail(workload, subject, exc)
            filters[subject.name] = None
            return
        self.samples.setdefault(workload.key, {}).setdefault(subject.name, {})[number] = sample

    def _fail(self, workload: Workload, subject: Subject, exc: BenchError) -> None:
        what = f"{workload.key} {subject.name}"
        self.failures[what] = str(exc)
        say(f"{what}: {exc}")

    def _tell(self, number: int, workload: Workload, subjects: list[Subject], took: float) -> None:
        parts = []
        for subject in subjects:
            taken = self.samples.get(workload.key, {}).get(subject.name, {})
            of_round = [taken[turn] for turn in taken if turn.startswith(f"{number}.")]
            if of_round:
                parts.append(f"{subject.name} {describe_samples(of_round, self._setting.calm)}")
        label = f"[{number + 1}/{self._setting.rounds}] {workload.key:16}"
        say(f"{label} {'; '.join(parts)}  {took:.1f} s")


def run_rounds(plan: list[Workload], subjects: list[Subject], setting: Setting) -> Rounds:
    """Measure everything."""
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        all_rounds = Rounds(setting, Path(work))
        for number in range(setting.rounds):
            for place, workload in enumerate(plan):
                fitting = [subject for subject in subjects if workload.suits(subject)]
                first = (number + place) % max(len(fitting), 1)
                all_rounds.play(number, workload, fitting[first:] + fitting[:first])
    return all_rounds


def describe_samples(samples: list[dict[str, Any]], calm: float) -> str:
    """A few words on what was just measured of one subject."""
    if "rss" in samples[0]:
        each = samples[0]["rss_per_connection"] / 1e3
        return f"{samples[0]['rss'] / 1e6:.1f} MB, {each:.1f} kB each"
    others = max(float(sample["foreign_share"]) for sample in samples)
    note = f" (disturbed: others used {others:.2f} cores)" if others > calm else ""
    return f"{statistics.median(sample['rate'] for sample in samples):.0f}/s{note}"


def able(subject: Subject) -> bool:
    """Whether the subject can run as it is meant to; says so where it cannot."""
    if subject.workers is not None and not has_workers(str(subject.python)):
        say(f"{subject.name} is left out: its runmilter() has no workers")
        return False
    if subject.engine is not None and not has_engine(subject):
        say(f"{subject.name} is left out: its milter has no set_engine()")
        return False
    return True


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; returns all there is to report."""
    programs = build(chosen.build)
    plan = choose_workloads(workloads(programs[0]), chosen)
    subjects = [subject for subject in choose_subjects(chosen) if able(subject)]
    rounds = chosen.rounds or (2 if chosen.quick else 5)
    times = QUICK if chosen.quick else FULL
    if chosen.seconds is not None:
        times = replace(times, duration=chosen.seconds)
    if chosen.turns is not None:
        times = replace(times, turns=chosen.turns)
    versions = {s.name: describe_python(s.python) for s in subjects if s.python is not None}
    begun = time.time()
    setting = Setting(programs, rounds, times, chosen.calm)
    taken = run_rounds(plan, subjects, setting)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime(begun)),
        "machine": describe_machine(),
        "subjects": [subject.name for subject in subjects],
        "versions": versions,
        "rounds": rounds,
        "turns": times.turns,
        "seconds": times.duration,
        "samples": taken.samples,
        "failures": taken.failures,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table; 1 where something could not be measured."""
    chosen = parse_arguments(arguments)
    try:
        if chosen.list:
            every = workloads(build(chosen.build)[0])
            print("\n".join(workload.key for workload in every))
            return 0
        allow_many_files()
        results = json.loads(chosen.source.read_text()) if chosen.source else run(chosen)
        goals = evaluate_goals(results)
        print(format_table(results))
        print()
        print(format_goals(goals))
        if chosen.json:
            chosen.json.write_text(json.dumps(results, indent=1) + "\n")
        if chosen.plot:
            draw(results, chosen.plot)
        if chosen.update_docs:
            update_docs(chosen.update_docs, results, goals)
    except BenchError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    for what, why in results["failures"].items():
        print(f"failed: {what}: {why}", file=sys.stderr)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
