"""``python -m Milter run``, as processes."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.lifecycle import busy_listener
from support.process import WAIT, Filter, python_command

from Milter.mta import MTA

HELLO = """
import Milter

class Hello(Milter.Base):
    def eom(self):
        self.addheader("X-Hello", "world")
        return Milter.CONTINUE

class Busy(Hello):
    def envfrom(self, sender, *params):
        return Milter.CONTINUE

class Stops(Hello):
    def envfrom(self, sender, *params):
        Milter.stop()
        return Milter.CONTINUE

class Needs(Milter.Base):
    def __init__(self, what):
        pass

not_a_filter = 3
"""

Run = Callable[..., Filter]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def command(*arguments: str) -> list[str]:
    return [*python_command(), "-m", "Milter", *arguments]


@pytest.fixture
def place(directory: Path) -> Path:
    """A directory with the module ``hello`` and a directory for sockets."""
    (directory / "hello.py").write_text(HELLO)
    (directory / "bad.py").write_text("import Milter\n1 / 0\n")
    (directory / "run").mkdir(mode=0o755)
    return directory


@pytest.fixture
def run(place: Path) -> Iterator[Run]:
    """Start ``python -m Milter run`` in the directory with the module."""
    started: list[Filter] = []
    here = os.getcwd()

    def start(
        *options: str,
        name: str = "hello:Hello",
        where: str = "",
        socket: str = "",
        env: dict[str, str] | None = None,
    ) -> Filter:
        where = where or f"unix:{place}/run/s"
        words = command("run", name, "--socket", socket or where, *options)
        os.chdir(place)
        try:
            started.append(Filter(words, where, {**os.environ, **(env or {})}))
        finally:
            os.chdir(here)
        return started[-1]

    yield start
    for each in started:
        with contextlib.suppress(Exception):
            each.kill()


def refused(place: Path, *arguments: str) -> tuple[int, str]:
    """The exit status and the one line that a call leaves."""
    done = subprocess.run(
        command("run", *arguments),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if "RuntimeWarning" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("python -m Milter run: error: ")
    assert done.stdout == ""
    return done.returncode, lines[0]


def test_a_class_serves_and_stops_in_good_order(run: Run, place: Path) -> None:
    filter_ = run("--name", "greeter")
    with filter_.mta() as mta:
        result = mta.send(b"Subject: a\r\n\r\nb\r\n", recipients=["r@example.com"])
    assert result.message["X-Hello"] == "world"
    assert filter_.stop() == 0
    assert not (place / "run" / "s").exists()
    assert "greeter serves on" in filter_.output
    assert "greeter has stopped" in filter_.output


LOOPS = """
import asyncio

def make():
    print("a loop is made", flush=True)
    return asyncio.new_event_loop()

nothing = 3
"""


def test_the_loop_of_coroutines_is_made_by_whom_it_names(run: Run, place: Path) -> None:
    """What a reload serves with has one of its own."""
    (place / "loops.py").write_text(LOOPS)
    (place / "waits.py").write_text(
        "import Milter\n"
        "class Waits(Milter.Base):\n"
        "    async def envrcpt(self, to, *params):\n"
        "        return Milter.REJECT\n"
    )
    filter_ = run("--loop-factory", "loops:make", name="waits:Waits")
    for count in (1, 2):
        with filter_.mta() as mta:
            assert mta.send(b"\r\n", recipients=["r@example.com"]).refused
        filter_.wait_for("a loop is made", count)
        if count == 1:
            filter_.process.send_signal(signal.SIGHUP)
            filter_.wait_for("milter.run: reloaded")
    assert filter_.stop() == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("make", "'make': write module:function, such as uvloop:new_event_loop"),
        ("loops:gone", "module 'loops' has no function 'gone'"),
        ("loops:nothing", "loops:nothing cannot be called"),
        ("no_such_loops:make", "there is no module 'no_such_loops'"),
    ],
)
def test_a_loop_factory_that_is_none(place: Path, name: str, said: str) -> None:
    (place / "loops.py").write_text(LOOPS)
    options = ("hello:Hello", "--check", "--loop-factory", name)
    code, line = refused(place, *options)
    assert code == 2
    assert line.startswith(f"python -m Milter run: error: --loop-factory: {said}")


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_other_signals_stop_it_too(run: Run, number: int) -> None:
    filter_ = run()
    filter_.wait_for("serves on")
    assert filter_.stop(number) == 0
    assert "Traceback" not in filter_.output


@pytest.mark.parametrize(
    "form",
    [
        "{path}",
        "local:{path}",
        "S=local:{path}, F=T, T=R:30s",
        "inet:{port}@127.0.0.1",
        "inet:127.0.0.1:{port}",
        "S=inet:{port}@localhost",
    ],
)
def test_the_socket_in_each_form(
    run: Run, place: Path, free_port: Callable[[], int], form: str
) -> None:
    path, port = place / "run" / "s", free_port()
    where = f"inet:{port}@127.0.0.1" if "inet" in form else f"unix:{path}"
    filter_ = run(where=where, socket=form.format(path=path, port=port))
    with filter_.mta():
        pass
    assert filter_.stop() == 0
    assert ("no authentication" in filter_.output) == ("inet" in form)


def test_an_existing_socket_of_nobody_is_replaced(run: Run, place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{place}/run/s")
    with run().mta():
        pass


def test_a_socket_that_is_served_is_left_alone(run: Run, place: Path) -> None:
    with run().mta():
        pass
    status, line = refused(place, "hello:Hello", "--socket", f"{place}/run/s")
    assert status == 1
    assert "another filter serves" in line
    with run(name="hello:Hello", where=f"unix:{place}/run/t").mta():
        pass


def test_a_socket_whose_owner_is_busy_is_left_alone(place: Path) -> None:
    """So busy that nobody can even connect, which is not waited for."""
    path = place / "run" / "s"
    with busy_listener(path):
        inode = path.stat().st_ino
        status, line = refused(place, "hello:Hello", "--socket", f"{path}")
        assert (status, path.stat().st_ino) == (1, inode)
        assert "another filter serves" in line


def test_mode_and_group(run: Run, place: Path) -> None:
    filter_ = run()
    filter_.wait_for("serves on")
    assert stat.S_IMODE((place / "run" / "s").stat().st_mode) == 0o660
    filter_ = run("--mode", "0600", where=f"unix:{place}/run/t")
    filter_.wait_for("serves on")
    assert stat.S_IMODE((place / "run" / "t").stat().st_mode) == 0o600


def test_a_world_writable_socket_is_warned_of(run: Run) -> None:
    assert "0666" in run("--mode", "0666").wait_for("WARNING")


NARROW = """
import os, sys
import milter
from Milter import __main__

open_socket = milter.opensocket

def open_and_look(remove):
    open_socket(remove)
    print(f"made with {os.stat(sys.argv[1]).st_mode & 0o777:04o}", flush=True)

milter.opensocket = open_and_look
sys.exit(__main__.main(["run", "hello:Hello", "--socket", sys.argv[1], "--mode", "0666"]))
"""


def test_nobody_else_can_connect_before_mode_and_group_are_set(place: Path) -> None:
    path = f"{place}/run/s"
    filter_ = Filter(
        [*python_command(), "-c", NARROW, path],
        f"unix:{path}",
        {**os.environ, "PYTHONPATH": str(place)},
    )
    try:
        assert filter_.wait_for("made with") == "made with 0600"
        filter_.wait_for("serves on")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
        assert filter_.stop() == 0
    finally:
        filter_.kill()


@root_only
def test_root_is_given_up_for_good(run: Run, place: Path) -> None:
    place.chmod(0o755)
    filter_ = run("--user", "nobody", "--group", "daemon")
    filter_.wait_for("serves on")
    status = Path(f"/proc/{filter_.pid}/status").read_text()
    nobody = pwd.getpwnam("nobody")
    assert re.search(r"^Uid:(.*)", status, re.MULTILINE)[1].split() == [str(nobody.pw_uid)] * 4
    assert re.search(r"^Gid:(.*)", status, re.MULTILINE)[1].split() == [str(nobody.pw_gid)] * 4
    groups = re.search(r"^Groups:(.*)", status, re.MULTILINE)[1].split()
    assert "0" not in groups
    made = (place / "run" / "s").stat()
    assert made.st_uid == nobody.pw_uid
    assert made.st_mode & 0o777 == 0o660
    assert "runs as root" not in filter_.all_output


@root_only
def test_going_on_as_root_is_warned_of(run: Run) -> None:
    filter_ = run()
    assert "--user" in filter_.wait_for("runs as root")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hello"], "module:Class"),
        (["nope:X"], "no module 'nope'"),
        (["hello:Nope"], "no class 'Nope'"),
        (["hello:not_a_filter"], "derived from Milter.Base"),
        (["json:JSONDecoder"], "derived from Milter.Base"),
        (["hello:Needs"], "without arguments"),
        (["bad:X"], "ZeroDivisionError"),
        (["hello:Hello", "--user", "no-such-user"], "no such user"),
        (["hello:Hello", "--group", "no-such-group"], "no such group"),
        (["hello:Hello", "--socket", "x25:1"], "unknown scheme"),
        (["hello:Hello", "--socket", "fd:x"], "fd:"),
        (["hello:Hello", "--socket", "inet:1@localhost", "--mode", "0600"], "--mode"),
    ],
)
def test_wrong_arguments(place: Path, arguments: list[str], words: str) -> None:
    status, line = refused(place, "--socket", f"{place}/run/s", *arguments)
    assert status == 2
    assert words in line
    assert not (place / "run" / "s").exists()


def test_a_directory_that_is_not_there(place: Path) -> None:
    status, line = refused(place, "hello:Hello", "--socket", f"{place}/none/s")
    assert status == 3
    assert f"install -d -m 0750 {place}/none" in line


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_directory_that_everybody_may_write_to(place: Path, mode: int) -> None:
    (place / "run").chmod(mode)
    status, line = refused(place, "hello:Hello", "--socket", f"{place}/run/s")
    assert status == 3
    assert "everybody may write" in line
    assert not (place / "run" / "s").exists()


def test_a_directory_above_that_everybody_may_write_to(place: Path) -> None:
    (place / "run" / "below").mkdir()
    (place / "run").chmod(0o777)
    status, line = refused(place, "hello:Hello", "--socket", f"{place}/run/below/s")
    assert status == 3
    assert f"chmod o-w {place}/run" in line


@root_only
def test_a_directory_of_another_user(place: Path) -> None:
    os.chown(place / "run", pwd.getpwnam("nobody").pw_uid, -1)
    status, line = refused(place, "hello:Hello", "--socket", f"{place}/run/s")
    assert status == 3
    assert "nobody" in line


def test_a_port_that_is_taken(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            command("run", "hello:Hello", "--socket", f"inet:127.0.0.1:{port}"),
            cwd=place,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
    assert done.returncode == 1
    assert "another process listens there" in done.stderr
    assert "Traceback" not in done.stderr


def test_in_the_journal_lines_have_a_priority_and_no_time(place: Path) -> None:
    read, write = os.pipe()
    status = os.fstat(write)
    env = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    words = command("run", "hello:Hello", "--socket", f"{place}/run/s", "--mode", "0666")
    with subprocess.Popen(words, cwd=place, env=env, stderr=write) as process:
        os.close(write)
        with os.fdopen(read) as stream:
            lines = []
            for line in stream:
                lines.append(line)
                if "serves on" in line:
                    process.terminate()
        assert process.wait(WAIT) == 0
    ours = [line for line in lines if "milter" in line]
    assert all(re.match(r"<[46]>milter(\.run)?: ", line) for line in ours)
    assert any(line.startswith("<4>") for line in ours)
    assert any(line.startswith("<6>") for line in ours)


def test_the_time_is_in_lines_elsewhere(run: Run) -> None:
    line = run(env={"JOURNAL_STREAM": "1:2"}).wait_for("serves on")
    assert re.match(r"\d{4}-\d\d-\d\d ", line)


class Manager:
    """Stands in for systemd: a datagram socket that notifications come to."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(WAIT)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.environment = {"NOTIFY_SOCKET": name}

    def wait_for(self, what: str) -> list[str]:
        """The states that come, up to *what*."""
        seen: list[str] = []
        while what not in seen:
            seen += self.socket.recv(4096).decode().split("\n")
        return seen


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, place: Path) -> Iterator[Manager]:
    name = f"{place}/notify" if request.param == "path" else f"@pymilter-{place.name}"
    made = Manager(name)
    yield made
    made.socket.close()


def test_systemd_is_notified(run: Run, manager: Manager) -> None:
    filter_ = run(env=manager.environment)
    assert manager.wait_for("READY=1")[0] == "READY=1"
    with filter_.mta(wait_for=0):
        pass
    filter_.process.terminate()
    seen = manager.wait_for("STOPPING=1")
    assert "WATCHDOG=1" not in seen
    assert filter_.wait() == 0


def test_stopping_is_told_before_messages_in_progress_have_ended(
    run: Run, manager: Manager
) -> None:
    filter_ = run(name="hello:Busy", env={**manager.environment, "WATCHDOG_USEC": "100000"})
    manager.wait_for("READY=1")
    mta = filter_.mta()
    with contextlib.closing(mta):
        mta.connect_info("localhost", "127.0.0.1", 1)
        mta.mail("<a@example.com>")
        filter_.process.terminate()
        manager.wait_for("STOPPING=1")
        # Draining may take longer than the watchdog waits.
        manager.wait_for("WATCHDOG=1")
        manager.wait_for("WATCHDOG=1")
        assert filter_.process.poll() is None
        mta.rcpt("<b@example.com>")
        assert mta.eom().modifications
    assert filter_.wait() == 0


def test_a_filter_that_stops_by_itself_tells_so_once(run: Run, manager: Manager) -> None:
    filter_ = run(name="hello:Stops", env=manager.environment)
    manager.wait_for("READY=1")
    with contextlib.closing(filter_.mta()) as mta:
        assert mta.send(b"Subject: a\r\n\r\nb\r\n", recipients=["r@example.com"]).accepted
    assert filter_.wait() == 0
    assert manager.wait_for("STOPPING=1") == ["STOPPING=1"]
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.socket.recv(4096)


def test_the_watchdog_is_fed(run: Run, manager: Manager) -> None:
    run(env={**manager.environment, "WATCHDOG_USEC": "100000"})
    manager.wait_for("READY=1")
    for _ in range(3):
        manager.wait_for("WATCHDOG=1")


def test_a_watchdog_of_another_process_is_not(run: Run, manager: Manager) -> None:
    filter_ = run(env={**manager.environment, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    filter_.wait_for("serves on")
    filter_.process.terminate()
    assert "WATCHDOG=1" not in manager.wait_for("STOPPING=1")


def test_a_manager_that_is_gone_is_no_reason_to_stop(run: Run, place: Path) -> None:
    filter_ = run(env={"NOTIFY_SOCKET": f"{place}/gone"})
    filter_.wait_for("cannot reach systemd")
    with filter_.mta():
        pass
    assert filter_.stop() == 0


def test_help_names_the_exit_statuses() -> None:
    done: Any = subprocess.run(
        command("run", "--help"), capture_output=True, text=True, timeout=WAIT, check=True
    )
    assert "exit status:" in done.stdout


def worker_pids(filter_: Filter, count: int) -> list[int]:
    """Wait until so many workers serve; returns their process ids."""
    filter_.wait_for(f"with {count} workers")
    before = filter_.output.partition(f"with {count} workers")[0]
    pids = re.findall(r"\(pid (\d+)\) serves", before)
    assert len(pids) == count
    return [int(pid) for pid in pids]


def test_workers_serve_and_stop_in_good_order(run: Run, place: Path) -> None:
    filter_ = run("--workers", "2")
    worker_pids(filter_, 2)
    with filter_.mta() as mta:
        result = mta.send(b"Subject: a\r\n\r\nb\r\n", recipients=["r@example.com"])
    assert result.message["X-Hello"] == "world"
    assert filter_.stop() == 0, filter_.output
    assert not (place / "run" / "s").exists()
    assert f"[{filter_.pid}] INFO" in filter_.output
    assert "hello has stopped" in filter_.output


def test_ready_is_told_when_all_workers_serve(run: Run, manager: Manager) -> None:
    filter_ = run(
        "--workers",
        "2",
        name="hello:Busy",
        env={**manager.environment, "WATCHDOG_USEC": "100000"},
    )
    first = manager.wait_for("READY=1")
    assert first[0] == "READY=1"
    for _ in range(3):
        manager.wait_for("WATCHDOG=1")
    pids = worker_pids(filter_, 2)
    with contextlib.closing(filter_.mta()) as mta:
        mta.connect_info("localhost", "127.0.0.1", 1)
        mta.mail("<a@example.com>")
        filter_.process.terminate()
        manager.wait_for("STOPPING=1")
        manager.wait_for("WATCHDOG=1")
        manager.wait_for("WATCHDOG=1")
        assert filter_.process.poll() is None
        mta.rcpt("<b@example.com>")
        assert mta.eom().modifications
    assert filter_.wait() == 0, filter_.output
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@root_only
def test_workers_are_not_root(run: Run, place: Path) -> None:
    place.chmod(0o755)
    filter_ = run("--workers", "2", "--user", "nobody")
    nobody = pwd.getpwnam("nobody")
    for pid in [filter_.pid, *worker_pids(filter_, 2)]:
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^Uid:(.*)", status, re.MULTILINE)[1].split() == [str(nobody.pw_uid)] * 4
    assert filter_.stop() == 0, filter_.output


@pytest.mark.parametrize("workers", ["-1", "two", "513"])
def test_bad_numbers_of_workers(place: Path, workers: str) -> None:
    done = subprocess.run(
        command("run", "hello:Hello", "--socket", f"unix:{place}/run/s", "--workers", workers),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 2
    assert "--workers" in done.stderr and "number from 0 to 512" in done.stderr


FAILS = """
import Milter

class Fails(Milter.Base):
    def eom(self):
        raise ValueError("first\\nsecond")
"""


def test_a_log_for_programs(run: Run, place: Path) -> None:
    (place / "fails.py").write_text(FAILS)
    filter_ = run("--log-format", "json", name="fails:Fails")
    with filter_.mta() as mta:
        mta.send(b"Subject: a\r\n\r\nb\r\n", recipients=["r@example.com"])
    assert filter_.stop() == 0
    records = [json.loads(line) for line in filter_.output.splitlines()]
    assert {each["process"] for each in records} == {filter_.pid}
    (served,) = (each for each in records if "serves on" in each["message"])
    assert (served["level"], served["logger"]) == ("info", "milter.run")
    (failed,) = (each for each in records if "exception in the eom callback" in each["message"])
    assert (failed["level"], failed["logger"]) == ("error", "milter")
    assert failed["exception"].startswith("Traceback (most recent call last):\n")
    assert failed["time"].endswith("+00:00")


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not here"
)
def test_a_socket_that_systemd_opens(place: Path, directory: Path) -> None:
    path = directory / "activated"
    environment = [f"--setenv={name}" for name in os.environ if name.startswith("PY")]
    run = command("run", "hello:Hello", "--socket", "fd:3")
    with subprocess.Popen(
        ["systemd-socket-activate", f"--listen={path}", *environment, *run],
        cwd=place,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            # The first connection has it run the command, and waits for that.
            for _ in range(2):
                with MTA.connect(f"unix:{path}", wait_for=WAIT, timeout=WAIT) as mta:
                    sent = mta.send(b"Subject: a\r\n\r\n", recipients=["bob@example.org"])
                assert sent.accepted
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=WAIT)[1]
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert "hello serves on fd:3" in said
    assert path.exists()  # it is not the filter's
