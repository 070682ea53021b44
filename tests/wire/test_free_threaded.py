"""Without a global lock: callbacks that run at one time, and what others change under them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.wire import Session, session

from Milter.mta import FilterClosed, Offer, Verdict

pytestmark = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="this interpreter has a global lock; scripts/build-free-threaded makes one without",
)

CONNECTIONS = 8
ROUNDS = 25  # messages on each connection
WAIT = 60.0  # seconds: the bound of every wait


def run_python(source: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def under_load(running: Any, bodies: dict[str, str], messages: int = ROUNDS) -> list[Verdict]:
    """Many connections at once, each with many messages; the verdicts at their ends."""
    at_once = threading.Barrier(CONNECTIONS)

    def play(_: int) -> list[Verdict]:
        verdicts = []
        at_once.wait(WAIT)
        for _ in range(messages):
            with running.mta(offer=Offer()) as mta:
                each = Session(running, mta, bodies)
                each.envelope()
                verdicts.append(each.content().verdict)
        return verdicts

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return [verdict for each in pool.map(play, range(CONNECTIONS)) for verdict in each]


def closed_all(running: Any) -> None:
    """A last connection tells that no other is counted any more."""
    body = """
        import time
        end = time.monotonic() + 20
        diag = milter.getdiag()
        while diag[0] != diag[1] + 1 and time.monotonic() < end:
            time.sleep(0.005)
            diag = milter.getdiag()
        say('left', diag[0] - diag[1] - 1, diag.messages, diag.inside - 1)
    """
    with session(running, connect=body) as each:
        each.connect()
    assert each.said() == [("left", 0, 0, 0)]


@pytest.mark.parametrize("module", ["milter", "Milter", "mime", "Milter.config"])
def test_an_import_leaves_the_lock_off(module: str) -> None:
    source = f"import sys, {module}; print(sys._is_gil_enabled())"
    assert run_python(source) == "False"


def test_a_filter_runs_without_the_lock(run_filter: Any) -> None:
    running = run_filter("scripted")
    with session(running, eom="import sys; say(sys._is_gil_enabled())") as each:
        each.message()
    assert each.said() == [(False,)]


def test_callbacks_run_python_at_one_time(run_filter: Any) -> None:
    """Two spin, without ever blocking, until each has seen the other: a lock would be passed
    on between them too, but only every so often; that interval is made endless."""
    running = run_filter("scripted", "import sys; sys.setswitchinterval(1e6); milter.seen = {}")
    spin = """
        import time
        seen, end = milter.seen, time.monotonic() + 20
        for turn in range(100):
            seen[tag] = turn
            while len(seen) < 2 or min(seen.values()) < turn:  # once it has both it grows no more
                if time.monotonic() > end:
                    return milter.REJECT
    """
    at_once = threading.Barrier(2)

    def play(_: int) -> Verdict:
        with running.mta(offer=Offer()) as mta:
            each = Session(running, mta, {"eom": spin})
            each.envelope()
            at_once.wait(WAIT)
            return each.content().verdict

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(play, range(2))) == {Verdict.CONTINUE}


# --- what changes under the callbacks

REPLACER = """
import itertools, threading, time
milter.calls = [0, 0]

def fresh(number):
    def callback(ctx, *args):
        milter.calls[number] += 1
        return milter.CONTINUE
    return callback

def replace():
    on_off = itertools.cycle([True, True, False])
    while not getattr(milter, 'enough', False):
        for number, name in enumerate(['header', 'eoh']):
            set_it = getattr(milter, f'set_{name}_callback')
            set_it(fresh(number) if next(on_off) else None)

for _ in range(2):
    threading.Thread(target=replace, daemon=True).start()
"""


def test_callbacks_are_replaced_while_they_run(run_filter: Any) -> None:
    running = run_filter("scripted", REPLACER)
    assert set(under_load(running, {})) == {Verdict.CONTINUE}
    with session(running, connect="milter.enough = True; say(min(milter.calls) > 0)") as each:
        each.connect()
    assert each.said() == [(True,)]
    closed_all(running)
    assert running.stop() == 0


METHODS = """
import threading
milter.contexts, milter.wrong, milter.tried = [], [], 0

def use():
    while True:
        for ctx in milter.contexts[-20:]:
            for call in (lambda: ctx.setpriv(object()), ctx.getpriv,
                         lambda: ctx.getsymval('i'), lambda: ctx.setreply('550', '5.7.1', 'no'),
                         lambda: ctx.addheader('A', 'b'), lambda: (ctx.protocol, ctx.actions)):
                try:
                    call()
                except milter.error:
                    milter.tried += 1
                except BaseException as exc:
                    milter.wrong.append(repr(exc))

for _ in range(3):
    threading.Thread(target=use, daemon=True).start()
"""


def test_contexts_are_used_by_others_while_they_close(run_filter: Any) -> None:
    running = run_filter("scripted", METHODS)
    verdicts = under_load(running, {"connect": "milter.contexts.append(ctx)"})
    assert set(verdicts) == {Verdict.CONTINUE}
    body = "milter.contexts.clear(); say(milter.wrong, milter.tried > 0)"
    with session(running, connect=body) as each:
        each.connect()
    assert each.said() == [([], True)]
    closed_all(running)
    assert running.stop() == 0


COUNTER = """
import threading
milter.wrong = []

def watch():
    last = (0, 0)
    while True:
        diag = milter.getdiag()
        created, deleted, messages, inside = *diag, diag.messages, diag.inside
        if not (last[0] <= created and last[1] <= deleted <= created and messages >= 0 <= inside):
            milter.wrong.append((created, deleted, messages, inside))
        last = created, deleted

for _ in range(2):
    threading.Thread(target=watch, daemon=True).start()
"""


def test_counts_are_consistent_at_any_time(run_filter: Any) -> None:
    running = run_filter("scripted", COUNTER)
    assert set(under_load(running, {})) == {Verdict.CONTINUE}
    with session(running, connect="say(milter.wrong)") as each:
        each.connect()
    assert each.said() == [([],)]
    closed_all(running)


HOOKS = """
import sys, threading
milter.reports = 0
counter = threading.Lock()

def hook(kind, exc, traceback):
    with counter:
        milter.reports += 1

def replace():
    while not getattr(milter, 'enough', False):
        sys.excepthook = lambda kind, exc, traceback: hook(kind, exc, traceback)

sys.excepthook = hook
threading.Thread(target=replace, daemon=True).start()
"""


def test_the_excepthook_is_replaced_while_exceptions_are_reported(run_filter: Any) -> None:
    running = run_filter("scripted", HOOKS)
    verdicts = under_load(running, {"eom": "raise ValueError('boom')"})
    assert set(verdicts) == {Verdict.TEMPFAIL}
    with session(running, connect="milter.enough = True; say(milter.reports)") as each:
        each.connect()
    assert each.said() == [(CONNECTIONS * ROUNDS,)]


def test_many_callbacks_that_exit_at_once_end_the_filter_once(run_filter: Any) -> None:
    setup = f"import threading; milter.all_are_here = threading.Barrier({CONNECTIONS})"
    running = run_filter("scripted", setup)
    body = "milter.all_are_here.wait(20); raise SystemExit(7)"

    def play(_: int) -> Verdict | None:
        verdict = None
        # The filter may have closed the connection before this side says goodbye.
        with contextlib.suppress(FilterClosed), running.mta(offer=Offer()) as mta:
            Session(running, mta, {"envfrom": body}).connect()
            verdict = mta.mail("<alice@example.com>").verdict
        return verdict

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        assert set(pool.map(play, range(CONNECTIONS))) == {Verdict.TEMPFAIL}
    assert running.wait() == 7
    assert "Traceback" not in running.output


@pytest.mark.engine("native")
def test_our_own_engine_has_a_loop_for_each_processor(run_filter: Any) -> None:
    processors = sorted(os.sched_getaffinity(0))

    def threads(usable: list[int]) -> int:
        running = run_filter("scripted", f"import os; os.sched_setaffinity(0, {usable})")
        with session(running, connect="pass") as each:
            each.connect()
            count = len(os.listdir(f"/proc/{running.process.pid}/task"))
        return count

    assert threads(processors) - threads(processors[:1]) == len(processors) - 1


# --- setting up

RACE = """
import sys, threading
import milter

COUNT = 8
start = threading.Barrier(COUNT)
outcomes = []

def attempt(number):
    start.wait()
    try:
        milter.register(f"filter{{number}}")
        milter.setconn({socket!r})
    except milter.error:
        pass
    milter.settimeout(100 + number)
    milter.setmaxdatasize(65535 + number)
    try:
        milter.main()
        outcomes.append("ran")
    except milter.error as exc:
        outcomes.append(str(exc))
    milter.stop()  # by those who may not, too

threads = [threading.Thread(target=attempt, args=(n,)) for n in range(COUNT)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sorted(outcomes))
"""


@pytest.mark.engine("libmilter")  # with the others main() may be called again
def test_one_of_many_that_set_up_and_start_at_once_wins(unix_socket: Any) -> None:
    for _ in range(5):
        outcome = run_python(RACE.format(socket=unix_socket()))
        assert outcome.count("'ran'") == 1, outcome
        refusals = r"'main: (it runs already|libmilter cannot start again)[^']*'"
        assert len(re.findall(refusals, outcome)) == 7, outcome


MAPPED = """
import sys, threading
import milter

count = int(sys.argv[1])
here = []

def enable():
    here.append(None)
    while len(here) < count:  # closer together than any lock would let them go
        pass
    milter._metrics(True)  # as Milter.metrics.enable() does, after other things

threads = [threading.Thread(target=enable) for _ in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with open("/proc/self/maps") as maps:
    areas = [line.split()[0].split("-") for line in maps if line.split()[1] == "rw-s"]
print(sum(int(end, 16) - int(begin, 16) for begin, end in areas))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/maps")
def test_threads_that_enable_metrics_at_once_share_the_counters() -> None:
    """There is one area of memory for them; in another one what is counted would be lost."""
    one = run_python(MAPPED, "1")
    assert int(one) > 0
    assert [run_python(MAPPED, "2") for _ in range(3)] == [one] * 3
