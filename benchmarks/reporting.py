"""From samples to tables, verdicts, a plot and a page of the documentation."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import BenchError

Results = dict[str, Any]

BEGIN = "<!-- benchmark: made by scripts/bench --update-docs, not by hand -->"
END = "<!-- end of benchmark -->"


# --- where it was measured --------------------------------------------------------------------


def _line(path: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip().strip('"') if found else None


def _libmilter() -> str | None:
    command = ["dpkg-query", "--show", "--showformat=${Version}", "libmilter1.0.1"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def describe_machine() -> dict[str, str]:
    """What the machine and its system are; nothing by which one could find it."""
    facts = {
        "CPU": _line("/proc/cpuinfo", r"^model name\s*:\s*(.*)$") or platform.processor(),
        "cores": str(os.cpu_count()),
        "kernel": f"{platform.system()} {re.split('[^0-9.]', platform.release())[0]}",
        "system": _line("/etc/os-release", "^PRETTY_NAME=(.*)$"),
        "libmilter": _libmilter(),
        "scheduler": _scheduler(),
    }
    return {name: value for name, value in facts.items() if value}


def _scheduler() -> str:
    """Whether a process is given its part of the processors, or each of its threads: where it is
    each thread, the load generator has less of them the more threads a filter has."""
    setting = _line("/proc/sys/kernel/sched_autogroup_enabled", r"^(\d)$")
    return {"1": "autogroup: sessions share", "0": "no autogroup"}.get(setting or "", "")


def describe_python(python: str) -> str:
    """The interpreter and its pymilter."""
    program = (
        "import importlib.metadata as m, platform, sysconfig;"
        "free = ' free-threaded' if sysconfig.get_config_var('Py_GIL_DISABLED') else '';"
        "print('pymilter ' + m.version('pymilter') + ', CPython '"
        " + platform.python_version() + free)"
    )
    done = subprocess.run(
        [python, "-c", program], cwd="/", capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


# --- figures ----------------------------------------------------------------------------------


def values(results: Results, key: str, subject: str, name: str) -> dict[str, float]:
    """One figure of a subject under a workload, by turn."""
    taken: dict[str, Any] = results["samples"].get(key, {}).get(subject, {})
    return {number: float(sample[name]) for number, sample in taken.items() if name in sample}


def median(results: Results, key: str, subject: str, name: str) -> float | None:
    """Its median over all turns, None where there is none."""
    found = values(results, key, subject, name)
    return statistics.median(found.values()) if found else None


def ratio(results: Results, key: str, name: str, subject: str, other: str) -> float | None:
    """The median of the ratios of two subjects in turns that follow each other."""
    mine, theirs = (values(results, key, one, name) for one in (subject, other))
    return median_ratio(mine, theirs)


def median_ratio(mine: dict[str, float], theirs: dict[str, float]) -> float | None:
    """The median of the ratios of what was measured in the same turn."""
    pairs = [mine[number] / theirs[number] for number in mine if theirs.get(number)]
    return statistics.median(pairs) if pairs else None


def shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """A figure as text, a dash where there is none."""
    return "-" if value is None else format(value * scale, form)


Row = list[str]

LOAD_HEAD = [
    *("workload", "socket", "conn", "subject", "msg/s", "/floor", "/pymilter"),
    *("p50 ms", "p99 ms", "max ms", "CPU us/callback", "load's CPU", "least:most"),
]
FORM_HEAD = ["connections", "asked", "steps a message", "CPU us a message", "of the first", "msg/s"]
MEMORY_HEAD = ["idle filter", "RSS MB", "PSS MB", "per idle connection: RSS kB", "PSS kB"]


def load_rows(results: Results) -> list[Row]:
    """A row for each workload and subject, in the order in which they were measured."""
    rows = []
    for key, subjects in results["samples"].items():
        name, transport, connections = key.split("/")
        if name == "function":
            continue  # has a table of its own: these subjects do not answer the same callbacks
        for subject in results["subjects"]:
            if subject not in subjects or median(results, key, subject, "rate") is None:
                continue

            def of(figure: str, key: str = key, subject: str = subject) -> float | None:
                return median(results, key, subject, figure)

            rows.append(
                [
                    *(name, transport, connections, subject, shown(of("rate"), ",.0f")),
                    shown(ratio(results, key, "rate", subject, "floor"), ".2f"),
                    shown(ratio(results, key, "rate", subject, "pymilter"), ".2f"),
                    *(shown(of(figure), ",.2f", 1e-3) for figure in ("p50", "p99", "max")),
                    shown(of("cpu_per_callback"), ",.1f"),
                    shown(of("own_share"), ".0%"),
                    f"{shown(of('least'), ',.0f')}:{shown(of('most'), ',.0f')}",
                ]
            )
    return rows


def form_rows(results: Results) -> list[Row]:
    """A row for each form of the filter of whole messages: what a message costs."""
    rows = []
    for key, subjects in results["samples"].items():
        name, _, connections = key.split("/")
        if name != "function":
            continue
        able = [one for one in results["subjects"] if one in subjects]
        costs = {
            subject: {
                number: sample["cpu_per_callback"] * sample["steps"]
                for number, sample in subjects[subject].items()
            }
            for subject in able
        }
        for subject in able:
            rows.append(
                [
                    *(connections, subject, shown(median(results, key, subject, "steps"), ".0f")),
                    shown(statistics.median(costs[subject].values()), ",.0f"),
                    shown(median_ratio(costs[subject], costs[able[0]]), ".2f"),
                    shown(median(results, key, subject, "rate"), ",.0f"),
                ]
            )
    return rows


def memory_rows(results: Results) -> list[Row]:
    """A row for each subject whose memory was measured."""
    rows = []
    for key, subjects in results["samples"].items():
        for subject in results["subjects"]:
            if subject in subjects and median(results, key, subject, "rss") is not None:
                figures = [median(results, key, subject, kind) for kind in ("rss", "pss")]
                each = [
                    median(results, key, subject, f"{kind}_per_connection")
                    for kind in ("rss", "pss")
                ]
                rows.append(
                    [
                        f"{subject}, {key.rpartition('/')[2]} connections",
                        *(shown(figure, ".1f", 1e-6) for figure in figures),
                        *(shown(figure, ".2f", 1e-3) for figure in each),
                    ]
                )
    return rows


# --- goals ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A figure that is asked for, and the one that was measured (None: it was not)."""

    text: str
    limit: float
    figure: float | None
    at_least: bool = True
    unit: str = ""

    @property
    def verdict(self) -> str:
        """In one word, or two."""
        if self.figure is None:
            return "not measured"
        reached = self.figure >= self.limit if self.at_least else self.figure <= self.limit
        return "reached" if reached else "NOT REACHED"


def _compared(results: Results, subject: str, transport: str, name: str) -> dict[str, float]:
    return values(results, f"noop/{transport}/1", subject, name)


def native_goals(results: Results) -> list[Goal]:
    """What our own engine promises, against libmilter in C."""

    def goal(text: str, limit: float, key: str, floor: str = "floor") -> Goal:
        return Goal(f"native, {text}", limit, ratio(results, key, "rate", "native", floor))

    def cost(other: str) -> float | None:
        return ratio(results, "churn/unix/16", "cpu_per_callback", "native", other)

    lasting = ((1, 1.0), (16, 1.1), (64, 1.4), (256, 1.3))
    return [
        *(
            goal(
                f"a connection for each message, {count}: messages/s of the floor's",
                limit,
                f"churn/unix/{count}",
            )
            for count, limit in ((16, 1.4), (64, 1.5))
        ),
        *(
            Goal(
                f"native, a connection for each message, 16: CPU time of {what}",
                limit,
                cost(other),
                at_least=False,
            )
            for other, what, limit in (
                ("floor", "the floor's", 0.6),
                ("ours", "the same on libmilter", 0.4),
            )
        ),
        *(
            goal(
                f"no-op, unix, {plural(count)}: messages/s of the floor's",
                limit,
                f"noop/unix/{count}",
            )
            for count, limit in lasting
        ),
        *(
            goal(
                f"no-op, TCP, {plural(count)}: messages/s of the floor's with TCP_NODELAY",
                limit,
                f"noop/tcp/{count}",
                "floor-nodelay",
            )
            for count, limit in lasting
        ),
        goal("no-op, TCP, 1 connection: messages/s of the floor's", 20.0, "noop/tcp/1"),
        goal("20 MB bodies: messages/s of the floor's", 1.0, "big/unix/4"),
        *(
            goal(
                f"blocking, {count} connections: messages/s of the floor's",
                0.95,
                f"block/unix/{count}",
            )
            for count in (32, 128)
        ),
        Goal(
            "native, parse, 2 workers, 4 connections: messages/s of pymilter's",
            1.8,
            ratio(results, "parse/unix/4", "rate", "native-workers", "pymilter"),
        ),
        *(
            Goal(
                f"native, {what} of that on libmilter",
                1.0,
                ratio(results, "idle/unix/1000", name, "native", "ours"),
                at_least=False,
            )
            for what, name in (
                ("idle filter: PSS", "pss"),
                ("each of 1,000 idle connections: PSS", "pss_per_connection"),
            )
        ),
        Goal(
            "native, each of 1,000 idle connections beside its objects: PSS kB",
            1.024,
            _beside_objects(results),
            at_least=False,
        ),
    ]


def _beside_objects(results: Results) -> float | None:
    """What an idle connection takes on our own engine, without what Python's objects do.

    These are what the filter in Python takes more on libmilter than the one in C.
    """
    native, ours, floor = (
        median(results, "idle/unix/1000", subject, "pss_per_connection")
        for subject in ("native", "ours", "floor")
    )
    if native is None or ours is None or floor is None:
        return None
    return (native - (ours - floor)) / 1e3


def plural(count: int) -> str:
    """``1 connection``, ``2 connections``."""
    return f"{count} connection{'s' * (count > 1)}"


def evaluate_goals(results: Results) -> list[Goal]:
    """What this project promises, against what was measured."""

    def speed(key: str, subject: str, other: str) -> float | None:
        return ratio(results, key, "rate", subject, other)

    def share(key: str, name: str) -> float | None:
        return ratio(results, key, name, "ours", "pymilter")

    goals = [
        *native_goals(results),
        *(
            Goal(
                f"no-op, unix, {plural(count)}: messages/s of the floor's",
                0.8 if count == 256 else 0.9,
                speed(f"noop/unix/{count}", "ours", "floor"),
            )
            for count in (1, 16, 64, 256)
        ),
    ]
    tcp = _compared(results, "ours", "tcp", "p50"), _compared(results, "ours", "unix", "p50")
    goals += [
        Goal(
            "no-op, unix, 1 connection: CPU time per callback of the floor's",
            1.15,
            ratio(results, "noop/unix/1", "cpu_per_callback", "ours", "floor"),
            at_least=False,
        ),
        Goal(
            "no-op, 1 connection: p50 over TCP of that over unix",
            2.0,
            median_ratio(*tcp),
            at_least=False,
        ),
        *(
            Goal(
                f"no-op, TCP, 1 connection: messages/s of {name}",
                20.0,
                speed("noop/tcp/1", "ours", other),
            )
            for other, name in (("floor", "the floor's"), ("pymilter", "pymilter's"))
        ),
        *(
            Goal(
                f"parse, 2 {what}, {count} connections: messages/s of pymilter's",
                1.7,
                speed(f"parse/unix/{count}", subject, "pymilter"),
            )
            for subject, what in (("workers", "workers"), ("pinned", "pinned workers"))
            for count in (4, 16)
        ),
        *(
            Goal(
                f"parse, 1 process, {plural(count)}: messages/s of pymilter's",
                1.05,
                speed(f"parse/unix/{count}", "ours", "pymilter"),
            )
            for count in (1, 4, 16)
        ),
        Goal(
            "blocking, 32 connections: messages/s of pymilter's",
            0.95,
            speed("block/unix/32", "ours", "pymilter"),
        ),
        Goal("20 MB bodies: messages/s of the floor's", 0.95, speed("big/unix/4", "ours", "floor")),
        *(
            Goal(text, 1.0, share("idle/unix/1000", name), at_least=False)
            for text, name in (
                ("idle filter: RSS of pymilter's", "rss"),
                ("idle filter: PSS of pymilter's", "pss"),
                ("each of 1,000 idle connections: RSS of pymilter's", "rss_per_connection"),
                ("each of 1,000 idle connections: PSS of pymilter's", "pss_per_connection"),
            )
        ),
    ]
    return goals


def goal_rows(goals: Sequence[Goal]) -> list[Row]:
    """A row for each goal."""
    return [
        [
            goal.text,
            f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}",
            shown(goal.figure, ".3f"),
            goal.verdict,
        ]
        for goal in goals
    ]


GOAL_HEAD = ["goal", "asked", "measured", "verdict"]


# --- text -------------------------------------------------------------------------------------


def plain_table(head: Row, rows: list[Row], left: Callable[[int], bool]) -> str:
    """Columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left(place) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in (head, *rows)
    )


def markdown_table(head: Row, rows: list[Row], left: Callable[[int], bool]) -> str:
    """The same for a page."""
    marks = [":--" if left(place) else "--:" for place in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def format_table(results: Results) -> str:
    """What was measured, for a terminal."""
    parts = []
    rows = load_rows(results)
    if rows:
        parts.append(plain_table(LOAD_HEAD, rows, lambda place: place in (0, 1, 3)))
    rows = form_rows(results)
    if rows:
        parts.append(plain_table(FORM_HEAD, rows, lambda place: place == 1))
    rows = memory_rows(results)
    if rows:
        parts.append(plain_table(MEMORY_HEAD, rows, lambda place: place == 0))
    return "\n\n".join(parts) or "nothing was measured"


def format_goals(goals: Sequence[Goal]) -> str:
    """The verdicts on what was measured, for a terminal."""
    rows = [row for row in goal_rows(goals) if row[2] != "-"]
    if not rows:
        return "no goal is about what was measured"
    return plain_table(GOAL_HEAD, rows, lambda place: place in (0, 3))


# --- the model --------------------------------------------------------------------------------

TARGET = 1_000_000 / 60  # messages/s: a million in a minute
CALLBACKS = 28  # of a message of the benchmark
BUSY = 0.6  # how much of a core is planned for; the rest is for bursts and the MTA's own
CORES = (2, 4, 8, 16)  # of a host

MODEL_HEAD = ["workload", "CPU ms/message", "messages/s and core", "cores in all"]
MODEL_HEAD += [f"hosts of {cores}" for cores in CORES]


def model_rows(results: Results) -> list[Row]:
    """How many cores and hosts a million messages a minute take, by what one message costs.

    Processes on one host, and hosts behind a balancer, share nothing but what the application
    shares: the CPU time of a message is taken as the same on each.
    """
    rows = []
    for key in ("noop/unix/16", "noop/tcp/16", "parse/unix/16"):
        cost = median(results, key, "ours", "cpu_per_callback")
        if cost is None:
            continue
        seconds = cost * CALLBACKS * 1e-6
        cores = TARGET * seconds / BUSY
        rows.append(
            [
                *(key, f"{seconds * 1e3:.2f}", f"{BUSY / seconds:,.0f}", f"{cores:,.0f}"),
                *(f"{math.ceil(cores / each):,}" for each in CORES),
            ]
        )
    return rows


# --- the page ---------------------------------------------------------------------------------


def page_section(results: Results, goals: Sequence[Goal]) -> str:
    """The generated part of docs/performance.md."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    versions = "; ".join(f"{name}: {what}" for name, what in results["versions"].items())
    measured = (
        f"Measured on {results['date']}: medians of {results['rounds']} rounds of "
        f"{results.get('turns', 1)} turns of {results['seconds']:g} s for each subject, generator "
        "and filter on the same machine."
    )
    parts = [
        measured,
        f"- Machine: {machine}\n- Subjects: {versions}",
        "### Goals",
        markdown_table(GOAL_HEAD, goal_rows(goals), lambda place: place in (0, 3)),
        "### Load",
        markdown_table(LOAD_HEAD, load_rows(results), lambda place: place in (0, 1, 3)),
    ]
    forms = form_rows(results)
    if forms:
        parts += [
            "### Functions of whole messages, by when they are asked",
            markdown_table(FORM_HEAD, forms, lambda place: place == 1),
        ]
    memory = memory_rows(results)
    if memory:
        parts += [
            "### Memory",
            markdown_table(MEMORY_HEAD, memory, lambda place: place == 0),
        ]
    model = model_rows(results)
    if model:
        parts += [
            "### A million messages a minute",
            f"Worker processes on all cores, {BUSY:.0%} of each in use, by the above.",
            markdown_table(MODEL_HEAD, model, lambda place: place == 0),
        ]
    return "\n\n".join(parts)


def update_docs(page: Path, results: Results, goals: Sequence[Goal]) -> None:
    """Put the section in its place between the markers.

    Raises:
        BenchError: the page has no such place.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{page}: lacks {BEGIN} or, after it, {END}")
    page.write_text(f"{before}{BEGIN}\n\n{page_section(results, goals)}\n\n{END}{after}")


# --- the plot ---------------------------------------------------------------------------------

COLOURS = {
    "floor": "0.45",
    "floor-nodelay": "0.7",
    "native": "C4",
    "native-workers": "C5",
    "ours": "C0",
    "pymilter": "C1",
    "workers": "C2",
    "pinned": "C3",
}


def _series(results: Results, workload: str) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for key in results["samples"]:
        if key.rpartition("/")[0] == workload:
            for subject in results["subjects"]:
                figure = median(results, key, subject, "rate")
                if figure is not None:
                    point = int(key.rpartition("/")[2]), figure
                    series.setdefault(subject, []).append(point)
    return series


def _draw_lines(axes: Any, title: str, series: dict[str, list[tuple[int, float]]]) -> None:
    for subject, points in series.items():
        xs, ys = zip(*sorted(points))
        axes.plot(xs, ys, marker="o", label=subject, color=COLOURS.get(subject))
    counts = sorted({count for points in series.values() for count, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="connections", ylabel="messages/s")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_bars(axes: Any, results: Results, keys: list[str]) -> None:
    """Messages/s of different orders of magnitude, as parts of the fastest."""
    measured = {subject for key in keys for subject in results["samples"][key]}
    subjects = [subject for subject in results["subjects"] if subject in measured]
    for place, subject in enumerate(subjects):
        heights = []
        for key in keys:
            best = max(median(results, key, one, "rate") or 0.0 for one in subjects)
            heights.append((median(results, key, subject, "rate") or 0.0) / (best or 1.0))
        width = 0.8 / len(subjects)
        xs = [x + place * width for x in range(len(keys))]
        axes.bar(xs, heights, width, label=subject, color=COLOURS.get(subject))
    names = ["{0}\n{2}".format(*key.split("/")) for key in keys]
    middles = [x + 0.4 - 0.4 / len(subjects) for x in range(len(keys))]
    axes.set_xticks(middles, names)
    axes.set_ylim(0, 1.3)  # room for the legend
    axes.set(title="the rest", ylabel="messages/s, of the fastest")
    axes.legend(ncols=2, loc="upper left")


def draw(results: Results, path: Path) -> None:
    """Draw what was measured into a file, whose suffix says in which format."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = {
        "no-op, unix socket": _series(results, "noop/unix"),
        "no-op, TCP": _series(results, "noop/tcp"),
        "parse": _series(results, "parse/unix"),
    }
    drawn = {title: series for title, series in lines.items() if series}
    bars = [key for key in results["samples"] if key.split("/")[0] in ("block", "big", "churn")]
    panels = len(drawn) + bool(bars)
    figure, grid = plt.subplots(1, max(panels, 1), figsize=(5 * max(panels, 1), 4), squeeze=False)
    for axes, (title, series) in zip(grid[0], drawn.items()):
        _draw_lines(axes, title, series)
    if bars:
        _draw_bars(grid[0][-1], results, bars)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
