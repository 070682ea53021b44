"""Fixtures: filters run as processes, and sockets and directories for them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from support.engine import ENGINE, ENGINES
from support.process import FILTERS, Filter, python_command

# Whoever runs the tests may ignore signals (nohup, a shell's background jobs), and what is
# started from here would inherit that.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(
            _number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        choices=ENGINES,
        default=ENGINE,
        help="which engine the filters have that choose none (%(default)s)",
    )


# What a suite says of a commit should not depend on chance; scripts/fuzz looks for what is new.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine(name): what only this engine does")
    os.environ["PYMILTER_ENGINE"] = config.getoption("--engine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    engine = config.getoption("--engine")
    others = [
        item
        for item in items
        if any(engine not in mark.args for mark in item.iter_markers("engine"))
    ]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose name is short enough for a unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="milter-") as name:
        yield Path(name)


@pytest.fixture
def public(directory: Path) -> Path:
    """A directory in which every user may make sockets."""
    directory.chmod(0o777)
    return directory


@pytest.fixture
def unix_socket(directory: Path) -> Callable[[], str]:
    """Makes names for unix sockets: each call gives a new one, 'unix:PATH'."""
    numbers = itertools.count()
    return lambda: f"unix:{directory}/{next(numbers)}.sock"


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Finds TCP ports on the loopback interface that nobody listens on now."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find


def _filters(new_socket: Callable[[], str]) -> Iterator[Callable[..., Filter]]:
    started: list[Filter] = []

    def run(
        name: str | None = None,
        *arguments: str,
        source: str | None = None,
        socket: str | None = None,
        env: dict[str, str] | None = None,
        options: tuple[str, ...] = (),
    ) -> Filter:
        where = socket or new_socket()
        script = ["-c", source] if source is not None else [str(FILTERS / f"{name}.py")]
        command = [*python_command(), *options, *script, where, *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        started.append(Filter(command, where, environment))
        return started[-1]

    yield run
    for each in started:
        with contextlib.suppress(Exception):
            each.kill()
        print(f"What the filter wrote at {each.socket}:\n{each.all_output}")  # where a test failed


@pytest.fixture
def run_filter(unix_socket: Callable[[], str]) -> Iterator[Callable[..., Filter]]:
    """Starts filters: run_filter("name", *arguments) runs support/filters/name.py
    SOCKET *arguments.

    ``source=``: the text of a script instead, which gets the same arguments.  ``socket=``: where
    to listen; a fresh unix socket by default.  ``env=``: additions to the environment.
    What still runs at the end of the test is killed.
    """
    yield from _filters(unix_socket)


@pytest.fixture(scope="module")
def run_shared_filter() -> Iterator[Callable[..., Filter]]:
    """Like run_filter, for filters that the tests of a module share: they live as long as it."""
    with tempfile.TemporaryDirectory(prefix="milter-") as name:
        numbers = itertools.count()
        yield from _filters(lambda: f"unix:{name}/{next(numbers)}.sock")
