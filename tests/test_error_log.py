"""What the log is told of an exception: once, with stage, queue id, client and traceback."""

from __future__ import annotations

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

    def eom(self):
        raise ValueError("from the application")

    def envrcpt(self, recipient, *params):
        if "odd" in recipient:
            raise ValueError("of a recipient")
        return Milter.CONTINUE

Milter.factory = Failing
Milter.runmilter("failing", sys.argv[1])
"""

Run = Callable[..., Any]


def fail(filter_: Any, name: str = "client.example", **macros: str) -> str:
    """Have it fail at the end of a message; returns the line of the log."""
    given = {"{" + key + "}" if len(key) > 1 else key: value for key, value in macros.items()}
    with filter_.mta() as mta:
        mta.connect_info(name, "192.0.2.1", 25, macros=given)
        mta.helo("client.example")
        mta.mail("<a@example.com>")
        mta.rcpt("<b@example.org>")
        mta.data()
        mta.eoh()
        assert not mta.eom(macros={"i": "4F1A2"}).verdict.goes_on
    line: str = filter_.wait_for("exception in")
    return line


@pytest.mark.parametrize(
    ("macros", "client"),
    [
        ({"_": "mx.example.com [192.0.2.7]"}, "mx.example.com [192.0.2.7]"),
        ({"client_name": "mx", "client_addr": "192.0.2.8"}, "mx [192.0.2.8]"),
        ({"client_addr": "192.0.2.9"}, "unknown [192.0.2.9]"),
        ({}, "client.example [192.0.2.1]"),
    ],
    ids=["default macros", "client macros", "address only", "no macros"],
)  # fmt: skip
def test_stage_queue_id_and_client_are_told(
    run_filter: Run, macros: dict[str, str], client: str
) -> None:
    filter_ = run_filter(source=FILTER)
    line = fail(filter_, **macros)
    assert line == (f"ERROR milter: exception in the eom callback, queue id 4F1A2, client {client}")
    filter_.wait_for("ValueError: from the application")
    assert filter_.stop() == 0
    assert filter_.output.count("exception in") == 1
    assert filter_.output.count("Traceback (most recent call last)") == 1
    assert filter_.output.count("ValueError: from the application") == 1


def test_a_client_cannot_forge_lines_of_the_log(run_filter: Run) -> None:
    filter_ = run_filter(source=FILTER)
    line = fail(filter_, _="mx\nERROR milter: forged\r\x1b[2J" + "x" * 1000)
    assert "client mx?ERROR milter: forged??[2Jxx" in line
    assert len(line) < 300
    assert "ERROR milter: forged" not in filter_.output.replace(line, "")
