"""Callbacks that block, many at a time: libmilter's pool of workers has to keep up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.wire import Session

from Milter.mta import Offer, Verdict

CONNECTIONS = 24


def barrier(parties: int) -> str:
    return f"import threading; milter.all_are_here = threading.Barrier({parties})"


@pytest.mark.parametrize("stage", ["connect", "envfrom", "eom"])
def test_a_burst_of_connections_that_block_is_served_at_once(run_filter: Any, stage: str) -> None:
    """Each of them waits in a callback until all the others are there too."""
    running = run_filter("scripted", barrier(CONNECTIONS))
    at_once = threading.Barrier(CONNECTIONS)

    def play(_: int) -> Verdict:
        with running.mta(offer=Offer()) as mta:
            each = Session(running, mta, {stage: "milter.all_are_here.wait(20)"})
            at_once.wait(20)
            each.envelope()
            return each.content().verdict

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        assert set(pool.map(play, range(CONNECTIONS))) == {Verdict.CONTINUE}


def test_connections_that_wait_for_others_do_not_hold_up_quick_ones(run_filter: Any) -> None:
    """Those that block are in a callback as long as the quick ones need."""
    running = run_filter("scripted", "import threading; milter.over = threading.Event()")
    blocked = "say('in'); milter.over.wait(20)"

    def wait(_: int) -> Verdict:
        with running.mta(offer=Offer()) as mta:
            each = Session(running, mta, {"helo": blocked})
            each.envelope()
            return each.content().verdict

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        waiting = pool.map(wait, range(CONNECTIONS))
        running.wait_for("('in',)", CONNECTIONS)
        for last in range(5):
            with running.mta(offer=Offer()) as mta:
                over = "milter.over.set()" if last == 4 else ""
                assert Session(running, mta, {"eom": over or "pass"}).message().verdict.goes_on
        assert set(waiting) == {Verdict.CONTINUE}
