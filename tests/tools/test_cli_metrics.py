"""``python -m Milter run --metrics``: the exporter from the command line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import MESSAGE, Runner
from support.lifecycle import busy_listener, wait_until
from support.process import WAIT, Filter

from Milter._cli.exporter import Place

pytest.importorskip("prometheus_client")

Port = Callable[[], int]

MODULE = """
import Milter

class Hello(Milter.Base):
    pass
"""


@pytest.fixture(autouse=True)
def module(runner: Runner) -> None:
    (runner.place / "hello.py").write_text(MODULE)


def ask(address: int | Path) -> str:
    """What the exporter answers."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    with socket.socket(family) as client:
        client.settimeout(WAIT)
        client.connect(("127.0.0.1", address) if isinstance(address, int) else str(address))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        data = b""
        while piece := client.recv(65536):
            data += piece
    assert data.startswith(b"HTTP/1.0 200 ")
    return data.decode()


def messages(address: int | Path) -> float:
    (line,) = (
        each for each in ask(address).splitlines() if each.startswith("milter_messages_total")
    )
    return float(line.split()[1])


def send(filter_: Filter) -> None:
    with filter_.mta() as mta:
        mta.send(MESSAGE, recipients=["r@example.com"])


@pytest.mark.parametrize("engine", ["libmilter", "native"])
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("kind", ["port", "path"])
def test_it_answers_through_reloads(
    runner: Runner, free_port: Port, kind: str, workers: str, engine: str
) -> None:
    port, path = free_port(), runner.place / "run" / "metrics"
    option = str(port) if kind == "port" else "unix:run/metrics"
    where = port if kind == "port" else path
    filter_ = runner.start("hello:Hello", "--metrics", option, "--workers", workers, engine=engine)
    filter_.wait_for("metrics are on")  # when all workers serve; one of them takes messages before
    send(filter_)
    send(filter_)
    assert {messages(where) for _ in range(6)} == {2.0}
    with filter_.mta() as old:
        old.send(MESSAGE, recipients=["r@example.com"])
        for number in (1, 2):
            filter_.process.send_signal(signal.SIGHUP)
            filter_.wait_for("milter.run: reloaded:", number)
            # The new one alone answers, though the old one goes on with its connection; in a
            # moment, as threads and workers of the old one have to hear of it.
            wait_until(
                lambda: {messages(where) for _ in range(6)} == {0.0}, "the old one still answers"
            )
            send(filter_)
            assert {messages(where) for _ in range(6)} == {1.0}
        old.send(MESSAGE, recipients=["r@example.com"])
    assert filter_.stop() == 0, filter_.output
    assert not path.exists()


#: Added to the module: a generation that ends when its socket is open, and it does not serve yet.
FAILING = """
import os
import Milter.metrics

def fail(server):
    print("about to fail", sorted(os.listdir("run")), flush=True)
    {how}

Milter.metrics.PrometheusServer = fail
"""


@pytest.mark.parametrize("how", ["raise OSError(11, 'no more threads')", "os.kill(os.getpid(), 9)"])
def test_a_reload_that_fails_takes_no_path(runner: Runner, how: str) -> None:
    path = runner.place / "run" / "metrics"
    filter_ = runner.start("hello:Hello", "--metrics", "unix:run/metrics")
    send(filter_)
    before = path.stat().st_ino
    (runner.place / "hello.py").write_text(MODULE + FAILING.format(how=how))
    for number in (1, 2):
        filter_.process.send_signal(signal.SIGHUP)
        filter_.wait_for("milter.run: not reloaded", number)
        assert (path.stat().st_ino, messages(path)) == (before, 1.0)
    # That of the first was removed, where it could not remove it itself.
    assert "about to fail ['metrics', 'metrics.new', 's']" in filter_.output
    (runner.place / "hello.py").write_text(MODULE)
    filter_.process.send_signal(signal.SIGHUP)
    filter_.wait_for("milter.run: reloaded:")
    assert messages(path) == 0.0
    (runner.place / "hello.py").write_text(MODULE + FAILING.format(how=how))
    filter_.process.send_signal(signal.SIGHUP)
    filter_.wait_for("milter.run: not reloaded", 3)
    assert messages(path) == 0.0
    assert filter_.stop() == 0, filter_.output
    assert list((runner.place / "run").iterdir()) == []


def test_a_generation_that_dies_leaves_nothing_behind(runner: Runner) -> None:
    filter_ = runner.start("hello:Hello", "--metrics", "unix:run/metrics")
    filter_.wait_for("serves on")
    filter_.process.send_signal(signal.SIGHUP)
    pid = re.search(r"pid (\d+)", filter_.wait_for("milter.run: reloaded:"))
    assert pid is not None
    os.kill(int(pid[1]), signal.SIGKILL)
    assert filter_.wait() == 1
    assert list((runner.place / "run").iterdir()) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_is_taken(runner: Runner, free_port: Port, workers: str) -> None:
    """By something else, or by another filter of the same user."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        filter_ = runner.start(
            "hello:Hello", "--metrics", f"127.0.0.1:{port}", "--workers", workers
        )
        assert filter_.wait() == 1
    assert filter_.output.rstrip().endswith(
        f"python -m Milter run: error: --metrics: cannot listen on 127.0.0.1:{port}: "
        "Address already in use"
    )
    assert not (runner.place / "run" / "s").exists()
    port = free_port()
    first = runner.start("hello:Hello", "--metrics", str(port))
    first.wait_for("serves on")
    where = f"unix:{runner.place}/run/t"
    options = ("--metrics", str(port), "--socket", where)
    second = runner.start("hello:Hello", *options, socket=False)
    assert second.wait() == 1
    assert "Address already in use" in second.output
    assert messages(port) == 0.0


def test_a_path_that_is_taken(runner: Runner) -> None:
    place = runner.place
    (place / "file").write_text("")
    filter_ = runner.start("hello:Hello", "--metrics", "unix:file")
    assert filter_.wait() == 1
    assert "--metrics: cannot listen on unix:file: there is something that is no socket" in (
        filter_.output
    )
    first = runner.start("hello:Hello", "--metrics", "unix:run/metrics")
    first.wait_for("serves on")
    options = ("--metrics", "unix:run/metrics", "--socket", f"unix:{place}/run/t")
    second = runner.start("hello:Hello", *options, socket=False)
    assert second.wait() == 1
    assert "unix:run/metrics: another process listens there" in second.output
    first.process.kill()  # it leaves the socket behind
    first.wait()
    third = runner.start("hello:Hello", *options, socket=False)
    third.wait_for("serves on")
    assert messages(place / "run" / "metrics") == 0.0


@pytest.mark.parametrize("name", ["metrics", "metrics.new"])
def test_a_path_whose_owner_is_busy(runner: Runner, name: str) -> None:
    """So busy that nobody can even connect: it is neither waited for nor removed."""
    path = runner.place / "run" / name
    with busy_listener(path):
        inode = path.stat().st_ino
        filter_ = runner.start("hello:Hello", "--metrics", "unix:run/metrics")
        assert filter_.wait() == 1
        assert "--metrics: cannot listen on unix:run/metrics: " in filter_.output
        assert path.stat().st_ino == inode


def test_without_prometheus_client_that_is_named(runner: Runner) -> None:
    hidden = "No module named 'prometheus_client'"
    (runner.place / "prometheus_client.py").write_text(
        f"raise ModuleNotFoundError({hidden!r}, name='prometheus_client')\n"
    )
    done = subprocess.run(
        runner.words("hello:Hello", "--check", "--metrics", "1"),
        env={**os.environ, "PYTHONPATH": str(runner.place)},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "python -m Milter run: error: --metrics: the exporter needs the Python package "
        "prometheus-client: pip install prometheus-client\n"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("9801", Place("", "127.0.0.1", 9801)),
        ("0.0.0.0:0", Place("", "0.0.0.0", 0)),
        ("[::1]:9801", Place("", "::1", 9801)),
        ("unix:/run/a", Place("/run/a")),
    ],
)
def test_places(text: str, place: Place) -> None:
    assert Place.parse(text) == place


@pytest.mark.parametrize("text", ["", "a", "65536", ":9801", "unix:", "host:", "/run/a", "-1"])
def test_no_places(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Place.parse(text)
    assert str(caught.value) == (
        f"{text!r}: write PORT, HOST:PORT or unix:PATH, with a port from 0 to 65535 and an IPv6 "
        "address in brackets"
    )
