"""A recorder between a real MTA and a filter: mail goes on, and the session can be played again."""

from __future__ import annotations

import smtplib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration import laboratory
from integration.laboratory import Bench
from integration.processes import WAIT
from support.process import Filter, python_command

from Milter.mta import Recording


@pytest.fixture(params=["postfix", "sendmail"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """An MTA of this test's own, whose filter is at ``filter.sock``."""
    laboratory.require(request.param)
    made = Bench(request.param)
    yield made
    made.close()


@pytest.fixture
def recorder(bench: Bench, run_filter: Any, directory: Path) -> Iterator[Filter]:
    """Stands where the MTA's filter is; the filter itself is somewhere else."""
    filter_ = run_filter("stamp")
    filter_.mta().quit()
    listen = f"unix:{bench.base}/filter.sock"
    command = [*python_command(), "-m", "Milter", "record", "--listen", listen]
    command += ["--filter", filter_.socket, "--to", str(directory / "to"), "--mode", "0666"]
    process = Filter(command, filter_.socket, {"PATH": "/usr/bin:/bin", "PYTHONUNBUFFERED": "1"})
    process.wait_for("listens on")
    yield process
    process.kill()


def test_what_a_real_mta_says_can_be_played_again(
    bench: Bench, recorder: Filter, directory: Path
) -> None:
    bench.taken()
    with smtplib.SMTP(*bench.server.addresses["unix"], timeout=WAIT) as smtp:
        for subject in ("one", "two"):
            message = f"Subject: {subject}\r\n\r\nBody of {subject}.\r\n"
            smtp.sendmail("ann@example.com", ["bob@example.org"], message)
    bench.server.settle()
    contents = [content for _, content in bench.taken()]
    assert [content.count(b"X-Stamp: yes") for content in contents] == [1, 1]
    # The bench itself has connected before, to see that the MTA listens.
    recorder.wait_for(".milter")
    recorder.stop()
    found = {path: Recording.load(path) for path in sorted((directory / "to").glob("*.milter"))}
    stamped = [
        path
        for path, recording in found.items()
        if [entry.name for entry in recording.entries].count("addheader")
    ]
    assert sum(path.read_text("utf-8").count("X-Stamp\\0yes") for path in stamped) == 2
    for path in found:
        with recorder.mta(offer=None) as mta:
            assert mta.replay(path).difference is None, path.read_text("utf-8")
