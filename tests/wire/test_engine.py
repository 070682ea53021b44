"""What an engine does by itself, without Python: a filter in C on the table of functions."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from Milter.mta import MTA, Verdict

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
# Those parts of the lower floors that need no Python.
PLAIN = ("wake", "descriptors", "signal_sets", "socket_name")
WAIT = 20.0

pytestmark = [
    pytest.mark.skipif(not SOURCE.exists(), reason="the sources are not here"),
    pytest.mark.skipif(
        shutil.which(shlex.split(os.environ.get("CC", "cc"))[0]) is None,
        reason="needs a C compiler",
    ),
]


def build(made: Path, *flags: str) -> Path:
    """``engine_filter.c`` with all that an engine needs: if it needs more, this fails."""
    sources = [*SOURCE.glob("engine/**/*.c"), *(SOURCE / f"{name}.c" for name in PLAIN)]
    subprocess.run(
        [
            *shlex.split(os.environ.get("CC", "cc")),
            *("-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", *flags),
            *(f"-I{SOURCE}", "-o", str(made), str(ROOT / "tests/support/engine_filter.c")),
            *(*map(str, sorted(sources)), "-lmilter", "-pthread"),
        ],
        check=True,
    )
    return made


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("engine") / "engine_filter")


@pytest.fixture(scope="module")
def program_with_poll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For systems that have neither epoll nor kqueue."""
    return build(tmp_path_factory.mktemp("engine") / "engine_filter", "-DUSE_POLL")


@pytest.fixture(scope="module")
def program_watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By ThreadSanitizer, which ends it at the first race."""
    made = tmp_path_factory.mktemp("engine") / "engine_filter"
    try:
        return build(made, "-fsanitize=thread", "-Wno-tsan")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no ThreadSanitizer")


@pytest.fixture(
    params=[
        ("libmilter", "program", 1),
        ("native", "program", 1),
        ("native", "program_with_poll", 1),
        ("native", "program", 3),
        ("native", "program_with_poll", 3),
        ("native", "program_watched", 3),
    ],
    ids=[
        "libmilter",
        "native",
        "native-poll",
        "native-3-loops",
        "native-3-loops-poll",
        "native-3-loops-watched",
    ],
)
def running(
    request: pytest.FixtureRequest, unix_socket: Callable[[], str]
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its socket and its process, which serves, and ends well at the end of the test."""
    engine, name, loops = request.param
    program = request.getfixturevalue(name)
    address = unix_socket()
    process = subprocess.Popen(
        [str(program), address, str(loops)],
        env={**os.environ, "PYMILTER_ENGINE": engine, "TSAN_OPTIONS": "halt_on_error=1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "serving\n"
        yield address, process
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "ended\n"
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_suspended_callback_is_answered_when_it_is_completed(
    running: tuple[str, subprocess.Popen[str]],
) -> None:
    """Also where it is resumed before it has returned (a sender with '!'), and twice."""
    with MTA.connect(running[0], timeout=WAIT) as mta:
        mta.connect_info("client.example")
        for sender in ("<a@b>", "<ab@c>", "<!@b>", "<!b@c>") * 5:
            wanted = Verdict.TEMPFAIL if len(sender) % 2 else Verdict.CONTINUE
            assert mta.mail(sender).verdict == wanted, sender


def test_many_callbacks_are_suspended_at_a_time(
    running: tuple[str, subprocess.Popen[str]],
) -> None:
    """Each connection gets its own answer, and what comes after is served."""

    def play(number: int) -> list[str]:
        with MTA.connect(running[0], timeout=WAIT) as mta:
            mta.connect_info("client.example")
            for count in range(5):
                assert mta.mail(f"<{'x' * (number % 7)}@{'y' * (2 * count)}{number % 7}>")
            assert mta.mail("<ab@c>").verdict == Verdict.CONTINUE
            mta.rcpt("<d@e>")
            mta.data()
            mta.eoh()
            reply = mta.eom()
            assert reply.verdict == Verdict.CONTINUE
            return [str(change) for change in reply.modifications]

    with ThreadPoolExecutor(12) as pool:
        for changes in pool.map(play, range(36)):
            assert len(changes) == 1
            assert "X-Engine" in changes[0]


def test_connections_with_callbacks_that_take_long_come_and_go(
    running: tuple[str, subprocess.Popen[str]],
) -> None:
    def play(number: int) -> None:
        with MTA.connect(running[0], timeout=WAIT) as mta:
            mta.connect_info("client.example")
            for name in ("X-Quick", "X-Slow", "X-Quick") * 2:
                assert mta.mail("<ab@c>").verdict == Verdict.CONTINUE
                mta.rcpt("<d@e>")
                mta.data()
                assert mta.header(name, str(number)).verdict == Verdict.CONTINUE
                mta.eoh()
                assert len(mta.eom().modifications) == 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(play, range(48)))
