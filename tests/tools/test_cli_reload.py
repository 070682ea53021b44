"""``python -m Milter run`` and SIGHUP: new code serves, and no message notices."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import milter
import pytest
from support.lifecycle import wait_until
from support.process import WAIT, Filter, python_command

import Milter
from Milter.mta import MTA, FilterClosed, MTAError, Verdict

MESSAGE = b"Subject: a\r\n\r\nb\r\n"

Start = Callable[..., Filter]


def write(place: Path, version: str, more: str = "") -> None:
    """Write the module in one piece, so that no start finds half of it."""
    text = f"""
import Milter

class Hello(Milter.Base):
    def eom(self):
        self.addheader("X-Version", {version!r})
        return Milter.CONTINUE

{more}
"""
    (place / "hello.new").write_text(text)
    (place / "hello.new").replace(place / "hello.py")


@pytest.fixture
def place(directory: Path) -> Path:
    """A directory that every user may enter, with a module and a directory for the socket."""
    directory.chmod(0o755)
    (directory / "run").mkdir(mode=0o755)
    write(directory, "1")
    return directory


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """Start ``python -m Milter run hello:Hello`` in that directory."""
    started: list[Filter] = []

    def run(
        *options: str,
        where: str = "",
        env: dict[str, str] | None = None,
        before: list[str] | None = None,
    ) -> Filter:
        python = python_command() if before is None else [*before, *python_command()[1:]]
        words = [*python, "-m", "Milter", "run", "hello:Hello", *options]
        socket_name = f"unix:{place}/run/s"
        # No byte code: a file that changes twice within a second would be taken for the old one.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        words = ["env", "-C", str(place), *words, "--socket", where or socket_name]
        started.append(Filter(words, socket_name, environment))
        return started[-1]

    yield run
    for each in started:
        with contextlib.suppress(Exception):
            each.stop()
        each.kill()


def version(mta: MTA) -> str | None:
    """Which code a message meets."""
    result = mta.send(MESSAGE, recipients=["r@example.com"])
    assert result.verdict is Verdict.CONTINUE
    return result.message["X-Version"]


def reload(filter_: Filter, count: int, said: str = "milter.run: reloaded:") -> str:
    filter_.process.send_signal(signal.SIGHUP)
    return filter_.wait_for(said, count)


class Load:
    """Clients that send all the time, some messages on each connection."""

    def __init__(self, filter_: Filter, clients: int) -> None:
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.failures: list[BaseException] = []
        self.messages = 0
        self._filter = filter_
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(WAIT)

    def _send(self) -> None:
        try:
            while not self._end.is_set():
                with MTA.connect(self._filter.socket, timeout=WAIT) as mta:
                    for _ in range(3):
                        version(mta)
                        with self._lock:
                            self.messages += 1
        except BaseException as exc:  # noqa: BLE001 - for the test to see
            self.failures.append(exc)


@pytest.mark.parametrize("engine", ["libmilter", "native"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ten_reloads_under_load(start: Start, place: Path, workers: str, engine: str) -> None:
    log = ["--access-log", "access"] if engine == "native" else []
    filter_ = start("--workers", workers, *log, env={"PYMILTER_ENGINE": engine})
    with filter_.mta() as mta:
        assert version(mta) == "1"
    with Load(filter_, 8) as load:
        for number in range(1, 10):
            write(place, str(number + 1))
            if number % 2:
                reload(filter_, number)
            else:  # the next one is asked for while who served before still gives way
                reload(filter_, number + 1, "hello serves on")
        write(place, "broken", "1 / 0")
        line = reload(filter_, 1, "not reloaded, what served before still does")
    assert load.failures == []
    assert load.messages > 80
    assert "ZeroDivisionError: division by zero" in line
    with filter_.mta() as mta:
        assert version(mta) == "10"
    assert filter_.stop() == 0
    assert not (place / "run" / "s").exists()
    if log:  # every message has its line, whoever had it
        lines = (place / "access").read_text().splitlines()
        assert len(lines) == load.messages + 2
        # One that is replaced at once may have served nobody.
        assert len({line.split()[1] for line in lines}) >= 6  # processes


def test_a_connection_goes_on_with_who_has_it(start: Start, place: Path) -> None:
    filter_ = start()
    with filter_.mta() as old:
        assert version(old) == "1"
        write(place, "2")
        reload(filter_, 1)
        with filter_.mta() as new:
            assert version(new) == "2"
        assert version(old) == "1"
    # Nobody is left: the first generation is over, and the process that was started is not.
    with filter_.mta() as new:
        assert version(new) == "2"
    assert filter_.process.poll() is None
    assert filter_.stop() == 0
    # What there is to say of the socket and of its user was said at the start.
    assert filter_.all_output.count("runs as root") == (os.geteuid() == 0)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_does_not_wait_for_connections_of_before(
    start: Start, place: Path, workers: str
) -> None:
    filter_ = start("--workers", workers)
    first = filter_.mta()
    assert version(first) == "1"
    reload(filter_, 1)
    second = filter_.mta()
    assert version(second) == "1"
    reload(filter_, 2)
    assert filter_.stop() == 0
    assert not (place / "run" / "s").exists()
    for each in (first, second):
        each.close()


#: systemd signals each process of a service, and the process that was started passes that on.
TWICE = """
import atexit, os, signal

def once_more():
    os.kill(os.getpid(), signal.SIGTERM)
    print("ended in order", flush=True)

atexit.register(once_more)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_signal_is_no_failure(start: Start, place: Path, workers: str) -> None:
    filter_ = start("--workers", workers)
    serves = filter_.wait_for(" serves on ")  # from then on a signal is not libmilter's
    assert 0 < filter_.output.find("the engine is") < filter_.output.index(serves)
    write(place, "2", TWICE)
    reload(filter_, 1)
    assert filter_.stop() == 0, filter_.output
    assert "ended in order" in filter_.output


STOPPED_BY_A_CALLBACK = """
import os, time

def envfrom(self, sender, *params):
    if "stop" in sender:
        Milter.stop()
    return Milter.CONTINUE

Hello.envfrom = envfrom
until = time.monotonic() + 20
while os.path.exists("wait") and time.monotonic() < until:
    open("waits", "w").close()
    time.sleep(0.02)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_by_a_callback_while_a_generation_starts(
    start: Start, place: Path, workers: str
) -> None:
    """It ends the filter; nothing is left that nobody can reach."""
    write(place, "1", STOPPED_BY_A_CALLBACK)
    filter_ = start("--workers", workers)
    with filter_.mta() as waiting, filter_.mta() as mta:
        for each in (waiting, mta):
            each.greet()
        waiting.mail("<a@example.com>")  # the stop waits for this message
        (place / "wait").touch()
        reload(filter_, 1, "generation 2 is started")
        wait_until((place / "waits").exists, "the generation has not begun")
        mta.mail("<stop@example.com>")
        wait_until(lambda: not (place / "run" / "s").exists(), "it goes on listening")
        (place / "wait").unlink()
        filter_.wait_for(", which came too late, ends")
        waiting.abort()
        waiting.close()
        mta.close()
    assert filter_.wait() == 0
    assert "reloaded" not in filter_.output


FORKS = """
import multiprocessing, time

def envfrom(self, sender, *params):
    if "fork" in sender:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(20)
        print("the child has ended with", child.exitcode, flush=True)
    return Milter.CONTINUE

Hello.envfrom = envfrom
"""


def test_a_signal_to_a_child_that_a_callback_forked(start: Start, place: Path) -> None:
    """It is for the child: neither the filter nor a generation stops, and no reload is lost."""
    write(place, "1", FORKS)
    filter_ = start()
    with filter_.mta() as before:
        before.greet()
        write(place, "2")
        reload(filter_, 1)
        before.mail("<fork@example.com>")
        filter_.wait_for("the child has ended with -15")
        before.abort()
        with filter_.mta() as mta:
            assert version(mta) == "2"
        write(place, "3")
        reload(filter_, 2)
        with filter_.mta() as mta:
            assert version(mta) == "3"
    assert filter_.stop() == 0, filter_.output


FORKED_AT_IMPORT = """
import multiprocessing, time

child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
child.start()
print("the child is", child.pid, "of generation", flush=True)
"""


@pytest.mark.parametrize("reloads", [0, 1])
def test_a_signal_to_a_child_that_the_module_forked(
    start: Start, place: Path, reloads: int
) -> None:
    """SIGHUP means to it what it means to any process."""
    write(place, "1", FORKED_AT_IMPORT)
    filter_ = start()
    filter_.wait_for(" serves on ")
    for count in range(reloads):
        reload(filter_, count + 1)
    line = filter_.wait_for("the child is", reloads + 1)
    child = int(line.split("the child is ")[1].split()[0])
    os.kill(child, signal.SIGHUP)
    wait_until(lambda: has_ended(child), "the child lives on")
    with filter_.mta() as mta:
        assert version(mta) == "1"


def has_ended(pid: int) -> bool:
    """Perhaps its parent has not asked how."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


EXITS_BY_A_SIGNAL = """
import signal, sys

signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
"""


@pytest.mark.parametrize("reloads", [0, 1])
def test_a_handler_of_any_signal_that_exits(start: Start, place: Path, reloads: int) -> None:
    """It ends all, whichever connections there are, as where none was reloaded."""
    write(place, "1", EXITS_BY_A_SIGNAL)
    filter_ = start()
    with contextlib.closing(filter_.mta()) as before:
        before.greet()
        for count in range(reloads):
            reload(filter_, count + 1)
        filter_.process.send_signal(signal.SIGUSR1)
        assert filter_.wait() == 7, filter_.output
    assert not (place / "run" / "s").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_reload_after_a_stop_by_a_callback(start: Start, place: Path, workers: str) -> None:
    """It is none, and no error."""
    write(place, "1", STOPPED_BY_A_CALLBACK)
    filter_ = start("--workers", workers)
    filter_.wait_for(" serves on ")  # or it is remembered until then
    with filter_.mta() as waiting, filter_.mta() as mta:
        for each in (waiting, mta):
            each.greet()
        waiting.mail("<a@example.com>")  # the stop waits for this message
        mta.mail("<stop@example.com>")
        wait_until(lambda: not (place / "run" / "s").exists(), "it goes on listening")
        reload(filter_, 1, ", which came too late, ends")
        waiting.abort()
        waiting.close()
        mta.close()
    assert filter_.wait() == 0
    assert "not reloaded" not in filter_.output


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("del Hello", "module 'hello' has no class 'Hello'"),
        ("Hello.header = lambda self: 0", "Hello.header cannot be called as it will be"),
    ],
)
def test_code_that_cannot_serve_is_left_alone(
    start: Start, place: Path, more: str, reason: str
) -> None:
    filter_ = start()
    with filter_.mta() as mta:
        assert version(mta) == "1"
    write(place, "2", more)
    assert reason in reload(filter_, 1, "not reloaded, what served before still does")
    with filter_.mta() as mta:
        assert version(mta) == "1"
    write(place, "3")
    reload(filter_, 1)
    with filter_.mta() as mta:
        assert version(mta) == "3"
    assert filter_.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_is_told(start: Start, place: Path, workers: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{place}/notify")
        manager.settimeout(WAIT)

        def told(what: str) -> str:
            while True:
                text = manager.recv(4096).decode()
                if what in text:
                    return text

        env = {"NOTIFY_SOCKET": f"{place}/notify", "WATCHDOG_USEC": "200000"}
        filter_ = start("--workers", workers, env=env)
        told("READY=1")
        filter_.process.send_signal(signal.SIGHUP)
        assert re.search(r"RELOADING=1\nMONOTONIC_USEC=\d+$", told("RELOADING=1"))
        said = told("READY=1")
        assert "STATUS=serving on unix:" in said
        pid = re.search(r"generation 2 \(pid (\d+)\)$", said)
        assert pid is not None
        told("WATCHDOG=1")
        # Who hangs is not alive, though the process that systemd knows is.
        os.kill(int(pid[1]), signal.SIGSTOP)
        manager.settimeout(1.0)
        with pytest.raises(OSError, match="timed out"):
            for _ in range(20):
                manager.recv(4096)
        manager.settimeout(WAIT)
        os.kill(int(pid[1]), signal.SIGCONT)
        told("WATCHDOG=1")
        write(place, "2", "1 / 0")
        filter_.process.send_signal(signal.SIGHUP)
        assert "STATUS=serving; not reloaded: cannot import 'hello'" in told("READY=1")
        assert filter_.stop() == 0
        told("STOPPING=1")


def interpreter_for(user: str) -> str | None:
    """An interpreter of this version that a user may run; None where it is all root's own."""
    for each in (getattr(sys, "_base_executable", sys.executable), "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [each, "-c", "import sys; print(sys.version_info[:2], sys.abiflags)"],
                user=user,
                capture_output=True,
                text=True,
                timeout=WAIT,
                check=False,
            )
            if done.stdout.strip() == f"{sys.version_info[:2]} {sys.abiflags}":
                return each
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_user_and_the_socket_stay(start: Start, place: Path) -> None:
    # Where that user can read it.
    for found in (milter.__file__, Milter.__file__):
        if found.endswith("__init__.py"):
            shutil.copytree(Path(found).parent, place / "lib" / "Milter")
        else:
            (place / "lib").mkdir()
            shutil.copy(found, place / "lib")
    python = interpreter_for("nobody")
    filter_ = start(
        "--user",
        "nobody",
        before=[python or sys.executable],
        env={"PYTHONPATH": str(place / "lib")},
    )
    with filter_.mta() as mta:
        assert version(mta) == "1"
    before = (place / "run" / "s").stat()
    write(place, "2")
    if python is None:
        refusal = "not reloaded, what served before still does: [Errno 13] Permission denied"
        assert sys.executable in reload(filter_, 1, refusal)
    else:
        pid = re.search(r"pid (\d+)", reload(filter_, 1))
        assert pid is not None
        assert os.stat(f"/proc/{pid[1]}").st_uid == pwd.getpwnam("nobody").pw_uid
    after = (place / "run" / "s").stat()
    assert (after.st_ino, stat.S_IMODE(after.st_mode)) == (before.st_ino, 0o660)
    with filter_.mta() as mta:
        assert version(mta) == ("2" if python else "1")
    assert filter_.stop() == 0


INHERITING = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.dup2(listener.fileno(), 9)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def test_an_inherited_socket(start: Start, place: Path) -> None:
    path = f"{place}/run/s"
    filter_ = start(where="fd:9", before=[sys.executable, "-c", INHERITING, path])
    with filter_.mta() as mta:
        assert version(mta) == "1"
    write(place, "2")
    reload(filter_, 1)
    with filter_.mta() as mta:
        assert version(mta) == "2"
    assert filter_.stop() == 0
    assert (place / "run" / "s").exists()  # it is not ours to remove


def test_a_callback_that_changes_the_directory(start: Start, place: Path) -> None:
    """The socket is found again, and removed, though its name was relative."""
    write(
        place, "1", "import os\nHello.hello = lambda self, name: os.chdir('/') or Milter.CONTINUE"
    )
    filter_ = start(where="unix:run/s")
    with filter_.mta() as mta:
        assert version(mta) == "1"
    reload(filter_, 1)
    with filter_.mta() as mta:
        assert version(mta) == "1"
    assert filter_.stop() == 0
    assert not (place / "run" / "s").exists()


def test_a_retired_generation_ends_with_the_process_that_was_started(
    start: Start, place: Path
) -> None:
    """Also while an MTA keeps a connection to it."""
    filter_ = start()
    filter_.mta().close()
    reload(filter_, 1)
    with contextlib.closing(filter_.mta()) as mta:
        mta.greet()
        reload(filter_, 2)
        filter_.process.kill()
        with pytest.raises(FilterClosed):
            mta.read_packet()
    filter_.wait()


def test_generations_end_with_the_process_that_was_started(start: Start, place: Path) -> None:
    filter_ = start()
    with filter_.mta() as mta:
        assert version(mta) == "1"
    pid = re.search(r"pid (\d+)", reload(filter_, 1))
    assert pid is not None
    generation = os.pidfd_open(int(pid[1]))
    filter_.process.kill()
    try:
        assert select.select([generation], [], [], WAIT)[0]
    finally:
        os.close(generation)


#: Code that takes its time to import, for as long as the test wants.
SLOW = """
import os, time

until = time.monotonic() + 20
while os.path.exists("wait") and time.monotonic() < until:
    open("waits", "w").close()
    time.sleep(0.01)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_to_every_process(start: Start, place: Path, workers: str) -> None:
    """As of ``systemctl kill -s HUP``: who serves goes on until the next generation does."""
    filter_ = start("--workers", workers)
    filter_.mta().close()
    reload(filter_, 1)
    write(place, "3", SLOW)
    (place / "wait").touch()
    os.killpg(filter_.pid, signal.SIGHUP)
    filter_.wait_for("generation 3 is started")

    def begins() -> bool:
        os.killpg(filter_.pid, signal.SIGHUP)  # at each moment of its start
        return (place / "waits").exists()

    wait_until(begins, "the generation has not begun")
    for _ in range(3):
        with filter_.mta() as mta:
            assert version(mta) == "1"
    (place / "wait").unlink()
    filter_.wait_for("generation 4 is started")
    filter_.wait_for("milter.run: reloaded: generation 4")
    with filter_.mta() as mta:
        assert version(mta) == "3"
    assert filter_.stop() == 0
    assert "not reloaded" not in filter_.output


SIGHUP_OF_ITS_OWN = """
import signal

signal.signal(signal.SIGHUP, lambda *_: open("hung up", "w").close())
"""


def test_a_generation_whose_code_handles_the_signal_gives_way(start: Start, place: Path) -> None:
    filter_ = start()
    filter_.mta().close()
    write(place, "2", SIGHUP_OF_ITS_OWN)
    reload(filter_, 1)
    write(place, "3")
    reload(filter_, 2)
    with filter_.mta() as mta:
        assert version(mta) == "3"
    filter_.wait_for(") has ended")
    assert filter_.stop() == 0
    assert not (place / "hung up").exists()


#: For an interpreter of a generation, before it runs anything.
WAITING = """
import os, time

if "PYMILTER_GENERATION" in os.environ:
    with open("waits.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename("waits.new", "waits")
    until = time.monotonic() + 20
    while os.path.exists("wait") and time.monotonic() < until:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_generation_that_starts_when_its_overseer_is_dead(
    start: Start, place: Path, workers: str
) -> None:
    """It does not serve: nobody would stop or replace it."""
    (place / "first").mkdir()
    (place / "first" / "sitecustomize.py").write_text(WAITING)
    (place / "wait").touch()
    paths = [str(place / "first"), *filter(None, [os.environ.get("PYTHONPATH")])]
    filter_ = start("--workers", workers, env={"PYTHONPATH": os.pathsep.join(paths)})
    filter_.mta().close()
    filter_.wait_for(" serves on ")
    reload(filter_, 1, "generation 2 is started")
    wait_until((place / "waits").exists, "the generation has not begun")
    pid = int((place / "waits").read_text())
    generation = os.pidfd_open(pid)
    try:
        filter_.process.kill()
        filter_.process.wait(WAIT)
        (place / "wait").unlink()
        try:
            assert select.select([generation], [], [], WAIT)[0], filter_.output
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(generation, signal.SIGKILL)
    finally:
        os.close(generation)
    filter_.wait()
    assert filter_.output.count(" serves on ") == 1
    assert "the process that was started has ended" in filter_.output


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_before_the_filter_serves(start: Start, place: Path, workers: str) -> None:
    """What was imported by then may be old: it is remembered, and systemd is told nothing early."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{place}/notify")
        manager.settimeout(WAIT)
        write(place, "1", SLOW)
        (place / "wait").touch()
        filter_ = start("--workers", workers, env={"NOTIFY_SOCKET": f"{place}/notify"})
        wait_until((place / "waits").exists, "it does not begin")
        filter_.process.send_signal(signal.SIGHUP)
        write(place, "2")
        (place / "wait").unlink()
        said = [manager.recv(4096).decode().partition("unix:")[0] for _ in range(3)]
        assert said[0] == said[2] == "READY=1\nSTATUS=serving on "
        assert said[1].startswith("RELOADING=1\n")
        with filter_.mta() as mta:
            assert version(mta) == "2"
        assert filter_.stop() == 0
        assert "not reloaded" not in filter_.output


EXITING = """
import sys

def envfrom(self, sender, *params):
    if "exit" in sender:
        sys.exit(3)
    if "interrupt" in sender:
        raise KeyboardInterrupt
    return Milter.CONTINUE

Hello.envfrom = envfrom
"""


@pytest.mark.parametrize("what", ["exit", "interrupt"])
@pytest.mark.parametrize("reloads", [1, 2])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_exit_in_a_connection_of_before(
    start: Start, place: Path, workers: str, reloads: int, what: str
) -> None:
    """It ends who has that connection, whichever process that is, and nobody who serves now."""
    write(place, "1", EXITING)
    filter_ = start("--workers", workers)
    for number in range(1, reloads):
        filter_.mta().close()
        reload(filter_, number)
    with contextlib.closing(filter_.mta()) as old:
        assert version(old) == "1"
        write(place, "2")
        reload(filter_, reloads)
        with contextlib.suppress(MTAError):
            old.mail(f"<{what}@example.com>")
    retired = "hello, which a reload replaced" if reloads == 1 else "generation 2 (pid "
    line = filter_.wait_for(retired, 1 if reloads == 1 else 2)
    assert " ended" in line
    with filter_.mta() as mta:
        assert version(mta) == "2"
    assert filter_.stop() == 0
    assert not (place / "run" / "s").exists()


HANDLED = """
import signal, sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
"""


def test_a_handler_that_exits_after_a_reload(start: Start, place: Path) -> None:
    """It is meant for all of the filter, though connections of before go on."""
    write(place, "1", HANDLED)
    filter_ = start()
    with contextlib.closing(filter_.mta()) as old:
        assert version(old) == "1"
        reload(filter_, 1)
        filter_.process.send_signal(signal.SIGTERM)
    assert filter_.wait() == 5


#: A second SIGHUP comes at the very end of a thread that has nothing more to do.
AT_THE_END = """
import os, signal, threading
from Milter._cli import reload

if os.path.exists("broken") and "PYMILTER_STARTED" in os.environ:
    1 / 0
os.environ["PYMILTER_STARTED"] = "1"
begun, closed = threading.Event(), threading.Event()
close, spawn = reload.Overseer._close_listener, reload.Overseer._spawn

def close_late(self):
    if not closed.is_set():
        os.unlink("broken")
        os.kill(os.getpid(), signal.SIGHUP)
        begun.wait(1)  # which has to be in vain
        close(self)
        closed.set()

def spawn_late(self, listener):
    if not os.path.exists("broken"):
        begun.set()
        closed.wait(20)
    return spawn(self, listener)

reload.Overseer._close_listener, reload.Overseer._spawn = close_late, spawn_late
"""


def test_a_signal_as_the_thread_of_the_one_before_ends(start: Start, place: Path) -> None:
    write(place, "1", AT_THE_END)
    (place / "broken").touch()
    filter_ = start()
    filter_.mta().close()
    filter_.wait_for(" serves on ")
    reload(filter_, 1, "not reloaded, what served before still does")
    filter_.wait_for("milter.run: reloaded: generation 3")
    with filter_.mta() as mta:
        assert version(mta) == "1"
    assert filter_.stop() == 0
    assert filter_.output.count("not reloaded") == 1


MANY_FILES = """
import os, resource

if "PYMILTER_STARTED" not in os.environ:
    os.environ["PYMILTER_STARTED"] = "1"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (1500 if hard < 0 else min(hard, 1500), hard))
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
else:
    1 / 0
"""


@pytest.mark.skipif(
    0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1500, reason="so many cannot be open"
)
def test_a_process_with_many_files(start: Start, place: Path) -> None:
    """Those of a busy filter are connections."""
    write(place, "1", MANY_FILES)
    filter_ = start()
    filter_.mta().close()
    filter_.wait_for(" serves on ")
    for number in (1, 2):
        reload(filter_, number, "not reloaded, what served before still does")
    write(place, "2")
    reload(filter_, 1)
    with filter_.mta() as mta:
        assert version(mta) == "2"
    assert filter_.stop() == 0
    assert "reloading has failed" not in filter_.output


def test_workers_that_die_while_a_generation_starts(start: Start, place: Path) -> None:
    """They cannot be forked then, which does not end the filter; afterwards they are."""
    filter_ = start("--workers", "2")
    filter_.mta().close()
    filter_.wait_for(" serves on ")
    serving = re.findall(r"worker \d \(pid (\d+)\) serves", filter_.output)
    assert len(serving) == 2
    write(place, "2", f"{SLOW}\n1 / 0")
    (place / "wait").touch()
    reload(filter_, 1, "generation 2 is started")
    wait_until((place / "waits").exists, "the generation has not begun")
    for pid in serving:
        os.kill(int(pid), signal.SIGKILL)
    refusal = "cannot be started: workers cannot be forked while other threads run ('overseer')"
    filter_.wait_for(f"worker 1 {refusal}", 5)
    filter_.wait_for(f"worker 2 {refusal}", 5)
    (place / "wait").unlink()
    filter_.wait_for("not reloaded, what served before still does")
    for number in (1, 2):
        filter_.wait_for(f"milter.workers: worker {number} (pid ", 3)  # serves, was killed, serves
    with filter_.mta() as mta:
        assert version(mta) == "1"
    assert filter_.stop() == 0
