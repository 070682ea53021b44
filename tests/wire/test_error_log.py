"""What the log is told of an exception: once, with stage, queue id, client and traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

FILTER = """
import logging, sys
import Milter

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")

class Failing(Milter.Base):
    def connect(self, *args):
        return Milter.CONTINUE

    def envrcpt(self, *args):  # or no message would have begun that could be aborted
        return Milter.CONTINUE

def fail(self, *args):
    raise ValueError("from the application")

# The stage that fails, with "-silent" where it answers nothing.
stage, _, silent = sys.argv[2].partition("-")
fail.__name__ = stage
setattr(Failing, stage, Milter.noreply(fail) if silent else fail)

Milter.factory = Failing
"""
RUN = 'Milter.runmilter("failing", sys.argv[1])\n'
WORKERS = 'Milter.runmilter("failing", sys.argv[1], workers=2)\n'

STAGES = (
    *("negotiate", "connect", "hello", "unknown", "envfrom", "envrcpt", "data", "header", "eoh"),
    *("body", "eom", "abort", "close"),
)
SILENT = ("connect", "hello", "envfrom", "envrcpt", "data", "header", "eoh", "body")

Run = Callable[..., Any]


def converse(filter_: Any, stage: str, name: str = "client.example", **macros: str) -> None:
    """A conversation up to that stage, or to its end."""
    given = {"{" + key + "}" if len(key) > 1 else key: value for key, value in macros.items()}
    # A filter that fails in negotiation has the MTA go on without it.
    with contextlib.suppress(OSError, EOFError), filter_.mta() as mta:
        steps: dict[str, Callable[[], object]] = {
            "connect": lambda: mta.connect_info(name, "192.0.2.1", 25, macros=given),
            "helo": lambda: mta.helo("client.example"),
            "unknown": lambda: mta.unknown("XYZZY"),
            "envfrom": lambda: mta.mail("<a@example.com>", macros={"i": "4F1A2"}),
            "envrcpt": lambda: mta.rcpt("<b@example.org>"),
            "data": lambda: mta.data(),
            "header": lambda: mta.header("Subject", "hello"),
            "eoh": lambda: mta.eoh(),
            "body": lambda: mta.body(b"text"),
            "abort": lambda: mta.abort() if stage == "abort" else None,
            "eom": lambda: mta.eom(),
        }
        for each, step in steps.items():
            step()
            if each == stage:
                break


def told_once(filter_: Any, stage: str, client: str) -> None:
    """One line, and one traceback after it."""
    line = filter_.wait_for("exception in")
    queue_id = "unknown" if stage in ("negotiate", "connect", "helo", "unknown") else "4F1A2"
    assert line == (
        f"ERROR milter: exception in the {stage} callback, queue id {queue_id}, client {client}"
    )
    filter_.wait_for("ValueError: from the application")
    assert filter_.stop() == 0
    assert filter_.output.count("exception in") == 1
    assert filter_.output.count("Traceback (most recent call last)") == 1
    assert filter_.output.count("ValueError: from the application") == 1


@pytest.mark.parametrize("stage", [*STAGES, *(f"{each}-silent" for each in SILENT)])
@pytest.mark.parametrize("how", [RUN, WORKERS], ids=["one process", "workers"])
def test_each_stage_is_told_with_queue_id_and_client(run_filter: Run, stage: str, how: str) -> None:
    filter_ = run_filter(None, stage, source=FILTER + how)
    stage = stage.partition("-")[0].replace("hello", "helo")
    converse(filter_, stage)
    # In negotiation the MTA has said nothing of the client yet.
    client = "unknown" if stage == "negotiate" else "client.example [192.0.2.1]"
    told_once(filter_, stage, client)


@pytest.mark.parametrize(
    ("macros", "client"),
    [
        ({"_": "mx.example.com [192.0.2.7]"}, "mx.example.com [192.0.2.7]"),
        ({"client_name": "mx", "client_addr": "192.0.2.8"}, "mx [192.0.2.8]"),
        ({"client_addr": "192.0.2.9"}, "unknown [192.0.2.9]"),
    ],
    ids=["default macros", "client macros", "address only"],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["connect", "eom", "abort", "close"])
def test_the_client_is_the_one_that_the_mta_names(
    run_filter: Run, stage: str, macros: dict[str, str], client: str
) -> None:
    filter_ = run_filter(None, stage, source=FILTER + RUN)
    converse(filter_, stage, **macros)
    told_once(filter_, stage, client)


def test_a_client_cannot_forge_lines_of_the_log(run_filter: Run) -> None:
    filter_ = run_filter(None, "eom", source=FILTER + RUN)
    converse(filter_, "eom", _="mx\nERROR milter: forged\r\x1b[2J" + "x" * 1000)
    line = filter_.wait_for("exception in")
    assert "client mx?ERROR milter: forged??[2Jxx" in line
    assert len(line) < 300
    assert "ERROR milter: forged" not in filter_.output.replace(line, "")


HOOK = """
import traceback

def hook(kind, exception, where):
    traceback.print_exception(kind, exception, where)

sys.excepthook = hook
"""


@pytest.mark.parametrize("stage", ["connect", "eom"])
def test_a_replaced_excepthook_does_not_hide_where_it_was(run_filter: Run, stage: str) -> None:
    """As a note of the exception, or before Python 3.11, which has none, in the log."""
    filter_ = run_filter(None, stage, source=FILTER + HOOK + RUN)
    converse(filter_, stage)
    line = filter_.wait_for("exception in")
    queue_id = "4F1A2" if stage == "eom" else "unknown"
    assert line.endswith(
        f"exception in the {stage} callback, queue id {queue_id}, client client.example [192.0.2.1]"
    )
    filter_.wait_for("ValueError: from the application")
    assert filter_.stop() == 0
    assert filter_.output.count("exception in") == 1
    assert filter_.output.count("ValueError: from the application") == 1
