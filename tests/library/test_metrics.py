"""Milter.metrics: what is counted in a filter, and how it is shown."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from support.lifecycle import gone
from support.process import WAIT, python_command

import Milter
from Milter import metrics
from Milter.mta import MTA, Stage, Verdict

FILTER = """
import sys, threading
import Milter
from Milter import metrics

class Counted(Milter.Base):
    def connect(self, *args):
        if args[0] == "tell":
            print("told", tell(), flush=True)
        return Milter.CONTINUE

    def envrcpt(self, recipient, *params):
        return Milter.REJECT if "refused" in recipient else Milter.CONTINUE

    def header(self, name, value):
        if name == "Bad":
            raise ValueError(value)
        return Milter.CONTINUE

    def eom(self):
        return Milter.ACCEPT

def tell():
    now = metrics.snapshot()
    stages = {
        name: (stage.calls, dict(stage.verdicts), stage.exceptions, stage.seconds)
        for name, stage in now.stages.items()
    }
    return now.connections, now.open_connections, now.messages, stages

Milter.factory = Counted
"""
ENABLED = FILTER + "metrics.enable()\n"
RUN = 'Milter.runmilter("counted", sys.argv[1])\n'

Run = Callable[..., Any]


def send(mta: MTA, *headers: bytes, recipients: tuple[str, ...] = ("r@example.org",)) -> Any:
    return mta.send(b"\r\n".join([*headers, b"", b"text\r\n"]), recipients=list(recipients))


def told(filter_: Any) -> tuple[int, int, int, dict[str, Any]]:
    """What the filter counted, by its own words; the asking counts as well."""
    before = filter_.output.count("told (")
    with filter_.mta() as mta:
        mta.connect_info("tell", "127.0.0.1", 1)
    line = filter_.wait_for("told (", before + 1)
    found: tuple[int, int, int, dict[str, Any]] = ast.literal_eval(line.partition(" ")[2])
    return found


def closed(filter_: Any) -> None:
    """Wait until no connection but the next is open."""
    for _ in range(200):
        if told(filter_)[1] == 1:
            return
    raise AssertionError("connections stay open")


def test_messages_verdicts_and_exceptions_are_counted(run_filter: Run) -> None:
    filter_ = run_filter(source=ENABLED + RUN)
    for _ in range(3):
        with filter_.mta() as mta:
            send(mta, b"Subject: a", b"X: y", recipients=("r@x", "refused@x"))
            send(mta, b"Bad: b")
    connections, still_open, messages, stages = told(filter_)
    assert connections == 4
    assert 1 <= still_open <= 4
    assert messages == 6
    assert stages["envrcpt"][:3] == (9, {"CONTINUE": 6, "REJECT": 3}, 0)
    assert stages["header"][:3] == (9, {"CONTINUE": 6, "TEMPFAIL": 3}, 3)
    assert stages["eom"][:3] == (3, {"ACCEPT": 3}, 0)
    assert stages["negotiate"][0] == 4
    assert stages["close"][1] == {}
    for calls, _verdicts, _exceptions, seconds in stages.values():
        assert seconds >= 0
        assert (seconds > 0) == (calls > 0)
    closed(filter_)


def test_several_threads_may_enable_it(run_filter: Run) -> None:
    """At once, on an interpreter without a global lock: see also test_free_threaded."""
    enable = (
        "threads = [threading.Thread(target=metrics.enable) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    filter_ = run_filter(source=FILTER + enable + RUN)
    with filter_.mta() as mta:
        send(mta, b"Subject: a")
    connections, _, messages, stages = told(filter_)
    assert (connections, messages) == (2, 1)
    assert stages["eom"][:2] == (1, {"ACCEPT": 1})
    assert filter_.stop() == 0


def test_nothing_is_counted_unless_wanted(run_filter: Run) -> None:
    filter_ = run_filter(source=FILTER + RUN)
    with filter_.mta() as mta:
        send(mta, b"Bad: b")
    connections, still_open, messages, stages = told(filter_)
    assert (connections, still_open, messages) == (0, 0, 0)
    assert all(stage == (0, {}, 0, 0.0) for stage in stages.values())


SLOW = """
import sys, threading
import Milter
from Milter import metrics

class Slow(Milter.Base):
    def eom(self):
        threading.Event().wait(0.05)
        return Milter.ACCEPT

    def close(self):
        stage = metrics.snapshot().stages["eom"]
        print("eom", stage.buckets, stage.quantile(1.0), stage.seconds, flush=True)
        return Milter.CONTINUE

metrics.enable()
Milter.factory = Slow
Milter.runmilter("slow", sys.argv[1])
"""


def test_times_fall_into_buckets(run_filter: Run) -> None:
    filter_ = run_filter(source=SLOW)
    with filter_.mta() as mta:
        send(mta, b"Subject: a")
    line = filter_.wait_for("eom (").partition(" ")[2]
    buckets, _, rest = line.partition(") ")
    counts = ast.literal_eval(buckets + ")")
    slowest, seconds = map(float, rest.split())
    assert seconds >= 0.05
    assert seconds <= slowest < 2 * seconds
    assert len(counts) == len(metrics.BOUNDS)
    assert counts[metrics.BOUNDS.index(slowest)] == sum(counts) == 1


SILENT = """
class Silent(Counted):
    @Milter.noreply
    def header(self, name, value):
        return super().header(name, value)

    def eoh(self):
        return Milter.CONTINUE
Milter.factory = Silent
"""


def test_what_a_step_without_reply_owes_is_counted_where_it_is_given(run_filter: Run) -> None:
    filter_ = run_filter(source=ENABLED + SILENT + RUN)
    with filter_.mta() as mta:
        assert send(mta, b"Subject: a", b"Bad: b").stage is Stage.EOH
    _, _, _, stages = told(filter_)
    assert stages["header"][:3] == (2, {"NOREPLY": 2}, 1)
    assert stages["eoh"][:3] == (1, {"TEMPFAIL": 1}, 0)


def test_messages_that_are_put_off_while_the_filter_stops_are_counted(run_filter: Run) -> None:
    filter_ = run_filter(source=ENABLED + RUN + 'print("told", tell(), flush=True)\n')
    with contextlib.closing(filter_.mta()) as first, contextlib.closing(filter_.mta()) as second:
        first.greet()
        second.greet()
        first.mail("<a@example.com>")
        first.rcpt("<r@example.org>")
        second.mail("<b@example.com>")
        os.kill(filter_.pid, signal.SIGTERM)
        gone(filter_.socket)
        assert second.rcpt("<r@example.org>").verdict is Verdict.TEMPFAIL
        assert first.eom().verdict is Verdict.ACCEPT
    line = filter_.wait_for("told (")
    assert filter_.wait() == 0
    _, _, messages, stages = ast.literal_eval(line.partition(" ")[2])
    assert messages == 2
    assert stages["envrcpt"][:3] == (2, {"CONTINUE": 1, "TEMPFAIL": 1}, 0)
    assert stages["eom"][:3] == (1, {"ACCEPT": 1}, 0)


WORKERS = 'Milter.runmilter("counted", sys.argv[1], workers=2)\n'


def test_worker_processes_share_the_counters(run_filter: Run) -> None:
    filter_ = run_filter(source=ENABLED + WORKERS)
    with filter_.mta() as first, filter_.mta() as second, filter_.mta() as third:
        for mta in (first, second, third):
            send(mta, b"Subject: a")
    connections, _, messages, stages = told(filter_)
    assert connections == 4
    assert messages == 3
    assert stages["eom"][1] == {"ACCEPT": 3}
    closed(filter_)


KILLED = """
import os, signal
class Killed(Counted):
    def envfrom(self, sender, *params):
        if sender == "<killed>":
            os.kill(os.getpid(), signal.SIGKILL)
        return Milter.CONTINUE
Milter.factory = Killed
"""


def test_a_killed_worker_leaves_its_counts_but_no_connections(run_filter: Run) -> None:
    filter_ = run_filter(source=ENABLED + KILLED + WORKERS)
    with filter_.mta() as mta:
        send(mta, b"Subject: a")
    with pytest.raises((EOFError, OSError)), filter_.mta() as mta:
        mta.connect_info("client", "127.0.0.1", 1)
        mta.mail("<killed>")
    filter_.wait_for("SIGKILL")
    closed(filter_)
    connections, _, messages, stages = told(filter_)
    assert connections >= 4
    assert messages == 2
    assert stages["eom"][1] == {"ACCEPT": 1}


def scraped(port: int, kind: str = "text/plain") -> dict[str, float]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": kind})
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for line in lines
        if not line.startswith("#")
        for name, _, value in [line.rpartition(" ")]
    }


def test_prometheus_collects(run_filter: Run) -> None:
    pytest.importorskip("prometheus_client")
    source = ENABLED + 'print("port", metrics.serve_prometheus(0).port, flush=True)\n' + RUN
    filter_ = run_filter(source=source)
    port = int(filter_.wait_for("port ").split()[1])
    with filter_.mta() as mta:
        send(mta, b"Bad: b")
        send(mta, b"Subject: a")
    found = scraped(port)
    assert found["milter_messages_total"] == 2
    assert found["milter_connections_total"] == 1
    assert found["milter_connections_open"] in (0, 1)
    assert found['milter_verdicts_total{stage="eom",verdict="ACCEPT"}'] == 1
    assert found['milter_verdicts_total{stage="header",verdict="TEMPFAIL"}'] == 1
    assert found['milter_exceptions_total{stage="header"}'] == 1
    assert found['milter_callback_seconds_count{stage="header"}'] == 2
    assert found['milter_callback_seconds_sum{stage="header"}'] > 0
    buckets = [
        value
        for name, value in found.items()
        if name.startswith("milter_callback_seconds_bucket{") and 'stage="header"' in name
    ]
    assert len(buckets) == len(metrics.BOUNDS)
    assert buckets == sorted(buckets)
    assert buckets[-1] == 2
    assert filter_.stop() == 0


def test_each_worker_answers_for_all(run_filter: Run, free_port: Callable[[], int]) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    source = ENABLED + (
        "def serve():\n    metrics.serve_prometheus(int(sys.argv[2]))\n"
        'Milter.runmilter("counted", sys.argv[1], workers=3, worker_init=serve)\n'
    )
    filter_ = run_filter(None, str(port), source=source)
    with filter_.mta() as first, filter_.mta() as second:
        send(first, b"Subject: a")
        send(second, b"Subject: a")
        assert {scraped(port)["milter_messages_total"] for _ in range(12)} == {2.0}
    assert filter_.stop() == 0


def test_a_port_that_is_taken_is_named() -> None:
    pytest.importorskip("prometheus_client")
    first = metrics.serve_prometheus(0)
    try:
        with pytest.raises(OSError, match=f"cannot serve metrics on 127.0.0.1 port {first.port}"):
            metrics.serve_prometheus(first.port)
    finally:
        first.close()
    metrics.serve_prometheus(first.port).close()


def test_without_prometheus_client_the_library_is_named() -> None:
    source = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from Milter import metrics; metrics.enable(); metrics.snapshot()\n"
        "try: metrics.serve_prometheus(0)\n"
        "except ImportError as exc: print(exc)\n"
    )
    done = subprocess.run(
        [*python_command(), "-c", source], capture_output=True, text=True, timeout=WAIT, check=True
    )
    assert done.stdout == (
        "the exporter needs the Python package prometheus-client: pip install prometheus-client\n"
    )


def test_importing_it_changes_nothing() -> None:
    source = (
        "import sys, milter, Milter.metrics\n"
        "print(milter._metrics(False), 'http.server' in sys.modules,"
        " 'prometheus_client' in sys.modules)\n"
    )
    done = subprocess.run(
        [*python_command(), "-c", source], capture_output=True, text=True, timeout=WAIT, check=True
    )
    assert done.stdout == "False False False\n"


def stage(*counts: int, exceptions: int = 0, **verdicts: int) -> metrics.Stage:
    buckets = (*counts, *[0] * (len(metrics.BOUNDS) - len(counts)))
    return metrics.Stage(verdicts, exceptions, float(sum(counts)), buckets)


def test_differences() -> None:
    names = {"eom": stage(1, 2, ACCEPT=3), "body": stage()}
    earlier = metrics.Snapshot(5, 2, 4, names)
    later = metrics.Snapshot(
        9, 1, 7, {**names, "eom": stage(1, 5, 1, exceptions=1, ACCEPT=6, REJECT=1)}
    )
    found = later - earlier
    assert (found.connections, found.open_connections, found.messages) == (4, 1, 3)
    assert found.stages["eom"].verdicts == {"ACCEPT": 3, "REJECT": 1}
    assert found.stages["eom"].exceptions == 1
    assert found.stages["eom"].calls == 4
    assert found.stages["body"].calls == 0


@pytest.mark.parametrize(
    ("share", "bound"), [(0, 1e-6), (0.5, 1e-6), (0.51, 4e-6), (0.99, 8e-6), (1, 8e-6)]
)
def test_quantiles(share: float, bound: float) -> None:
    assert stage(50, 0, 48, 2).quantile(share) == pytest.approx(bound)
    assert stage().quantile(share) == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_quantiles_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        stage(1).quantile(share)


def test_bounds_are_powers_of_two() -> None:
    assert metrics.BOUNDS[0] == pytest.approx(1e-6)
    assert metrics.BOUNDS[-1] == float("inf")
    assert all(b == pytest.approx(2 * a) for a, b in zip(metrics.BOUNDS[:-2], metrics.BOUNDS[1:]))
    assert len(metrics.snapshot().stages["eom"].buckets) in (0, len(metrics.BOUNDS))
    assert set(Milter.metrics.snapshot().stages) >= {"connect", "eom", "close"}
