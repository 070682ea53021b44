"""``python -m Milter record``, and ``send --replay`` of what it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.engine import ENGINES
from support.lifecycle import busy_listener
from support.process import WAIT, Filter, python_command

from Milter.mta import MTA, Offer, Recording, Side, Verdict

MESSAGE = b"Subject: gr\xc3\xbc\xc3\x9fe\r\n\r\none line \r\n.\r\n\x00\xff\r\n"

Record = Callable[..., "Recorder"]


class Recorder:
    """A recorder that runs, and the directory that it writes to."""

    def __init__(self, process: Filter, directory: Path) -> None:
        self.process = process
        self.directory = directory

    def mta(self, **options: Any) -> MTA:
        return self.process.mta(**options)

    def connect(self) -> socket.socket:
        """A connection without a word of the protocol."""
        self.process.wait_for("listens on")
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(WAIT)
        connection.connect(self.process.socket.partition(":")[2])
        return connection

    def files(self, count: int = 1) -> list[Path]:
        """The recordings, once there are so many."""
        self.process.wait_for(f"{self.directory}/", count)
        return sorted(self.directory.glob("*.milter"))

    def only(self) -> Recording:
        (path,) = self.files()
        return Recording.load(path)


@pytest.fixture
def record(directory: Path) -> Iterator[Record]:
    """Start a recorder before the filter at this address."""
    with contextlib.ExitStack() as stack:

        def start(
            filter: str, *options: str, listen: str = "", prepare: str | None = None
        ) -> Recorder:
            where = listen or f"unix:{directory}/record.sock"
            to = directory / "recorded"
            command = [*python_command(), "-m", "Milter", "record", "--listen", where]
            command += ["--filter", filter, "--to", str(to), *options]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            if prepare is not None:
                script = "import sys, runpy, resource; exec(sys.argv.pop(1)); "
                script += "runpy.run_module('Milter', run_name='__main__', alter_sys=True)"
                command[1:] = ["-c", script, prepare, *command[command.index("record") :]]
            process = Filter(command, where, environment)
            stack.callback(process.kill)
            return Recorder(process, to)

        yield start


@contextlib.contextmanager
def serving(directory: Path, play: Callable[[socket.socket], None]) -> Iterator[str]:
    """A peer that plays this on each connection; gives its address."""
    with socket.socket(socket.AF_UNIX) as server, ThreadPoolExecutor(8) as pool:
        server.bind(f"{directory}/peer.sock")
        server.listen()

        def one(connection: socket.socket) -> None:
            connection.settimeout(WAIT)
            with connection:
                play(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    pool.submit(one, server.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"unix:{directory}/peer.sock"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(WAIT)


def everything(connection: socket.socket) -> bytes:
    """What comes to the end of the stream."""
    data = b""
    while True:
        more = connection.recv(65536)
        if not more:
            return data
        data += more


def replay(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python_command(), "-m", "Milter", "send", address, "--replay", *map(str, arguments)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=WAIT * 3,
        check=False,
    )


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_session_is_recorded_and_played_again(
    run_filter: Any, record: Record, engine: str
) -> None:
    filter_ = run_filter("stamp", env={"PYMILTER_ENGINE": engine})
    filter_.mta().quit()
    recorder = record(filter_.socket)
    with recorder.mta() as mta:
        for _ in range(2):
            result = mta.send(MESSAGE, sender="a@x", recipients=['"b c"@x'])
            assert (result.verdict, result.message["X-Stamp"]) == (Verdict.ACCEPT, "yes")
    (path,) = recorder.files()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text("utf-8")
    assert text.startswith("milter-recording 1\n# ")
    assert "PRIVATE DATA" in text
    assert text.count("filter ") - 1 >= text.count("X-Stamp\\0yes\\0") == 2
    done = replay(filter_.socket, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: as recorded\n", "")
    # The other engine answers alike.
    (other,) = set(ENGINES) - {engine}
    filter_ = run_filter("stamp", env={"PYMILTER_ENGINE": other})
    filter_.mta().quit()
    assert replay(filter_.socket, path).returncode == 0


EOM = """
ctx.addheader("X-Date", "monday")
ctx.setreply("550", "5.7.1", "no")
return milter.REJECT
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_difference_is_shown(run_filter: Any, record: Record, engine: str) -> None:
    filter_ = run_filter("scripted", env={"PYMILTER_ENGINE": engine})
    recorder = record(filter_.socket)
    with recorder.mta() as mta:
        script = json.dumps({"eom": EOM, "header": "say(*args)"})
        macros = {"CONNECT:{script}": script}
        assert mta.send(MESSAGE, recipients=["b@x"], macros=macros).verdict is Verdict.REJECT
    (path,) = recorder.files()
    # What the filter does is in the session: with another script, it is another filter.
    changed = path.read_text("utf-8").replace("5.7.1", "5.7.2", 1)
    assert changed.index("5.7.2") < changed.index("5.7.1")
    other = path.with_name("changed.milter")
    other.write_text(changed, "utf-8")
    done = replay(filter_.socket, path, other)
    assert done.returncode == 1
    lines = changed.split("\n")
    line = 1 + next(n for n, each in enumerate(lines) if " reply 550" in each)
    assert done.stdout == (
        f"{path}: as recorded\n"
        f"{other}: line {line}, at end of message of message 1\n"
        "  recorded  reply: 550 5.7.1 no\n"
        "  now       reply: 550 5.7.2 no\n"
    )
    done = replay(filter_.socket, "--json", path, other)
    same, differs = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert same == {
        "socket": filter_.socket,
        "file": str(path),
        "difference": None,
        "differences": [],
    }
    assert differs["difference"] == {
        "line": line,
        "stage": "EOM",
        "message": 1,
        "recorded": "reply: 550 5.7.1 no",
        "now": "reply: 550 5.7.2 no",
        "note": "",
        "goes_on": False,
    }
    assert differs["differences"] == [differs["difference"]]


#: A filter that asks for what is left here, and for MAIL alone of the steps before a message's end.
ASKING = """
import sys, Milter
class A(Milter.Base):
    {more}
    def envfrom(self, sender, *params): return Milter.CONTINUE
    def eom(self): return Milter.{verdict}
Milter.factory = A
Milter.runmilter('a', sys.argv[1])
"""
HELO = "def hello(self, name): return Milter.CONTINUE"


def test_another_negotiation(run_filter: Any, record: Record, directory: Path) -> None:
    """The rest is played where the MTA would have said the same, or less."""

    def asking(name: str, more: str = "", verdict: str = "ACCEPT") -> Filter:
        source = ASKING.format(more=more, verdict=verdict)
        filter_: Filter = run_filter(source=source, socket=f"unix:{directory}/{name}")
        filter_.mta().quit()
        return filter_

    recorder = record(asking("then", HELO).socket)
    with recorder.mta() as mta:
        mta.send(MESSAGE, recipients=["b@x"])
    (path,) = recorder.files()

    less = asking("less").socket
    done = replay(less, path)
    first, recorded, now, note, last = done.stdout.splitlines()
    assert re.fullmatch(rf"{path}: line \d+, at negotiation", first)
    assert ("NOHELO" in recorded, "NOHELO" in now) == (False, True)
    assert note == "  the rest is played without HELO"
    assert (done.returncode, last) == (1, f"{path}: all else as recorded")
    done = replay(less, "--ignore-negotiation", path)
    assert (done.returncode, done.stdout) == (0, f"{path}: as recorded\n")

    drops = asking("drops", verdict="DISCARD").socket
    for options, count in (((), 2), (("--ignore-negotiation",), 1)):
        done = replay(drops, *options, path)
        assert done.returncode == 1
        assert done.stdout.count(": line ") == count
        assert done.stdout.endswith("  recorded  accept\n  now       discard\n")

    more = asking("more", HELO + "\n    def data(self): return Milter.CONTINUE").socket
    for options in ((), ("--ignore-negotiation",)):
        done = replay(more, *options, path)
        assert done.returncode == 1
        assert done.stdout.splitlines()[3:] == [
            (
                "  the rest is not played, as the filter wants DATA now, which the MTA did not "
                "send then: record such a session anew"
            )
        ]


def test_values_that_may_differ(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("stamp")
    filter_.mta().quit()
    recorder = record(filter_.socket)
    with recorder.mta() as mta:
        mta.send(MESSAGE, recipients=["b@x"])
    (path,) = recorder.files()
    path.write_text(path.read_text("utf-8").replace("X-Stamp\\0yes", "X-Stamp\\0no"), "utf-8")
    assert replay(filter_.socket, path).returncode == 1
    assert replay(filter_.socket, path, "--ignore", "x-stamp").returncode == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("version", [2, 3, 4, 6])
def test_older_protocols(run_filter: Any, record: Record, engine: str, version: int) -> None:
    filter_ = run_filter(
        source="import sys, Milter\n"
        "class A(Milter.Base):\n"
        "    def header(self, name, value): return Milter.CONTINUE\n"
        "    def eom(self): return Milter.DISCARD\n"
        "Milter.factory = A\n"
        "Milter.runmilter('a', sys.argv[1])\n",
        env={"PYMILTER_ENGINE": engine},
    )
    filter_.mta().quit()
    recorder = record(filter_.socket)
    with recorder.mta(offer=Offer.for_version(version)) as mta:
        assert mta.negotiated.version == version
        assert mta.send(MESSAGE, recipients=["b@x"]).verdict is Verdict.DISCARD
    (path,) = recorder.files()
    assert replay(filter_.socket, path).returncode == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_several_smtp_sessions_on_a_connection(
    run_filter: Any, record: Record, engine: str
) -> None:
    filter_ = run_filter("stamp", env={"PYMILTER_ENGINE": engine})
    filter_.mta().quit()
    recorder = record(filter_.socket)
    with recorder.mta() as mta:
        for _ in range(3):
            assert mta.send(MESSAGE, recipients=["b@x"]).accepted
            mta.quit_nc()
    (path,) = recorder.files()
    assert [entry.name for entry in Recording.load(path).entries].count("quit_nc") == 3
    with filter_.mta(offer=None) as mta:
        replayed = mta.replay(path)
    assert replayed.difference is None
    assert [one.verdict for one in replayed.replies].count(Verdict.ACCEPT) == 3


def test_several_sessions_at_a_time(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("scripted")
    recorder = record(filter_.socket)
    count = 8
    barrier = threading.Barrier(count)

    def session(number: int) -> None:
        eom = f"ctx.addheader('X-Number', '{number}')"
        macros = {"CONNECT:{script}": json.dumps({"eom": eom})}
        with recorder.mta() as mta:
            barrier.wait(WAIT)
            for _ in range(5):
                result = mta.send(MESSAGE, recipients=["b@x"], macros=macros if _ == 0 else None)
                assert result.message["X-Number"] == str(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(session, range(count)))
    files = recorder.files(count)
    assert len(files) == count
    numbers = set()
    for path in files:
        said = {entry.data for entry in Recording.load(path).entries if entry.name == "addheader"}
        assert len(said) == 1
        numbers |= said
    assert len(numbers) == count
    done = replay(filter_.socket, recorder.directory, "--connections", "4")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("as recorded") == count


def test_it_is_reached_by_tcp(run_filter: Any, record: Record, free_port: Any) -> None:
    filter_ = run_filter("stamp", socket=f"inet:{free_port()}@127.0.0.1")
    filter_.mta().quit()
    recorder = record(filter_.socket, listen=f"inet:{free_port()}@127.0.0.1")
    with recorder.mta() as mta:
        assert mta.send(MESSAGE, recipients=["b@x"]).accepted
    assert replay(filter_.socket, *recorder.files()).returncode == 0


# --- bytes ---------------------------------------------------------------------------------------


def test_every_byte_goes_on_in_order(directory: Path, record: Record) -> None:
    """Both directions at once, with pieces of any size; what is said is no milter protocol."""
    source = random.Random(3)
    there, back = source.randbytes(3_000_000), source.randbytes(3_000_000)
    heard = []

    def play(connection: socket.socket) -> None:
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(connection.sendall, back)
            heard.append(everything(connection))
            sent.result(WAIT)

    with serving(directory, play) as address:
        recorder = record(address, "--max-size", "1000")
        with recorder.connect() as connection, ThreadPoolExecutor(1) as pool:
            received = pool.submit(everything, connection)
            view = memoryview(there)
            while view:
                size = source.choice((1, 3, 1000, 70_000))
                connection.sendall(view[:size])
                view = view[size:]
            connection.shutdown(socket.SHUT_WR)
            assert received.result(WAIT) == back
    assert heard == [there]
    assert recorder.only().is_cut


@pytest.mark.parametrize("first", list(Side), ids=str)
def test_who_closes_a_side_is_still_told_the_rest(
    directory: Path, record: Record, first: Side
) -> None:
    heard = []

    def begin(connection: socket.socket) -> bytes:
        connection.sendall(b"\0\0\0\1N")
        connection.shutdown(socket.SHUT_WR)
        return everything(connection)

    def follow(connection: socket.socket) -> bytes:
        data = everything(connection)
        connection.sendall(b"\0\0\0\3BX\0" * 100)
        return data

    def play(connection: socket.socket) -> None:
        heard.append((begin if first is Side.FILTER else follow)(connection))

    with serving(directory, play) as address:
        recorder = record(address)
        with recorder.connect() as connection:
            heard.append((begin if first is Side.MTA else follow)(connection))
    assert sorted(heard) == [b"\0\0\0\1N", b"\0\0\0\3BX\0" * 100]
    entries = recorder.only().entries
    assert [entry.side for entry in entries] == [first] * 2 + [first.other] * 101
    assert [entry.name for entry in entries if entry.is_end] == ["closes", "closes"]


def test_a_packet_that_is_cut_off_is_recorded(directory: Path, record: Record) -> None:
    heard = []
    with serving(directory, lambda connection: heard.append(everything(connection))) as address:
        recorder = record(address)
        with recorder.connect() as connection:
            connection.sendall(b"\0\0\0\1N\0\0\0\x09Lab")
        entries = recorder.only().entries
    assert heard == [b"\0\0\0\1N\0\0\0\x09Lab"]
    said = [(entry.name, entry.wire) for entry in entries if not entry.is_end]
    assert said == [("eoh", b"\0\0\0\1N"), ("raw", b"\0\0\0\x09Lab")]


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_filter_that_is_away(directory: Path, record: Record) -> None:
    recorder = record(f"unix:{directory}/gone.sock")
    with recorder.connect() as connection:
        assert connection.recv(1) == b""
    said = recorder.process.wait_for("the MTA's connection is closed")
    assert "cannot connect to the filter" in said
    assert list(recorder.directory.iterdir()) == []
    # It is no matter of the recorder's: once the filter is there, it is asked.
    with serving(directory, lambda connection: connection.sendall(b"\0\0\0\1c")) as address:
        os.rename(address.partition(":")[2], f"{directory}/gone.sock")
        with recorder.connect() as connection:
            assert everything(connection) == b"\0\0\0\1c"
        assert recorder.only().entries[0].name == "continue"


def test_a_filter_that_dies(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("scripted")
    recorder = record(filter_.socket)
    mta = recorder.mta()
    mta.connect_info("mx", macros={"{script}": json.dumps({"helo": "import os; os._exit(9)"})})
    with pytest.raises(ConnectionError):
        mta.helo("mx")
    mta.close()
    entries = recorder.only().entries
    assert [(one.side, one.name) for one in entries if one.side is Side.FILTER][-1][1] in (
        "closes",
        "resets",
    )


def test_an_mta_that_dies(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("scripted")
    recorder = record(filter_.socket)
    mta = recorder.mta()
    script = {"close": "say('closed')"}
    mta.connect_info("mx", macros={"{script}": json.dumps(script)})
    mta.mail("<a@x>")
    mta.close()
    filter_.wait_for("closed")
    assert recorder.only().entries[-1].is_end


def test_a_disk_that_is_full(run_filter: Any, record: Record) -> None:
    """A limit to the size of files stands for it: the error is another one."""
    filter_ = run_filter("stamp")
    filter_.mta().quit()
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    recorder = record(filter_.socket, prepare=limit)
    with recorder.mta() as mta:
        for _ in range(30):
            assert mta.send(MESSAGE, recipients=["b@x"]).accepted
    said = recorder.process.wait_for("cannot write")
    (path,) = recorder.files(2)  # it is named there, and where it is done
    assert f"cannot write {path}: File too large; the session goes on" in said
    assert recorder.process.output.count("cannot write") == 1
    # What is there can be read and played.
    assert 2000 < path.stat().st_size <= 3000
    assert replay(filter_.socket, path).returncode == 0


def test_a_directory_that_goes(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("stamp")
    filter_.mta().quit()
    recorder = record(filter_.socket)
    recorder.process.wait_for("listens on")
    recorder.directory.rmdir()
    with recorder.mta() as mta:
        assert mta.send(MESSAGE, recipients=["b@x"]).accepted
    said = recorder.process.wait_for("cannot write")
    assert said.endswith("No such file or directory; the session goes on")


def test_the_largest_size(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("stamp")
    filter_.mta().quit()
    recorder = record(filter_.socket, "--max-size", "3000")
    with recorder.mta() as mta:
        for _ in range(30):
            assert mta.send(MESSAGE, recipients=["b@x"]).accepted
    (path,) = recorder.files()
    assert 2000 < path.stat().st_size <= 3000
    assert Recording.load(path).is_cut
    assert replay(filter_.socket, path).returncode == 0


# --- start and stop ------------------------------------------------------------------------------


def test_a_stop_waits_for_sessions(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("stamp")
    recorder = record(filter_.socket)
    with recorder.mta() as mta:
        mta.connect_info("mx")
        (unfinished,) = recorder.directory.iterdir()
        assert unfinished.name.endswith(".milter.part")
        recorder.process.process.send_signal(signal.SIGTERM)
        _until_gone(recorder.process.socket.partition(":")[2])
        assert mta.send(MESSAGE, recipients=["b@x"], macros=None).accepted
    assert recorder.process.wait() == 0
    (path,) = recorder.directory.iterdir()
    assert Recording.load(path).entries[-1].is_end


def test_a_second_signal_ends_sessions(run_filter: Any, record: Record) -> None:
    filter_ = run_filter("stamp")
    recorder = record(filter_.socket)
    mta = recorder.mta()
    recorder.process.process.send_signal(signal.SIGTERM)
    _until_gone(recorder.process.socket.partition(":")[2])
    recorder.process.process.send_signal(signal.SIGTERM)
    mta.expect_close(WAIT)
    mta.close()
    assert recorder.process.wait() == 0
    assert len(recorder.files()) == 1


def _until_gone(path: str) -> None:
    pause = threading.Event()
    for _ in range(int(WAIT * 100)):
        if not os.path.exists(path):
            return
        pause.wait(0.01)
    raise AssertionError(f"{path} is still there")


def test_who_may_connect(run_filter: Any, record: Record, directory: Path) -> None:
    filter_ = run_filter("stamp")
    recorder = record(filter_.socket, "--mode", "0600")
    recorder.process.wait_for("listens on")
    assert stat.S_IMODE((directory / "record.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE(recorder.directory.stat().st_mode) == 0o700
    assert recorder.process.stop() == 0
    assert not (directory / "record.sock").exists()


def test_the_socket_of_another_is_left_alone(record: Record, directory: Path) -> None:
    recorder = record("unix:/no/such")
    recorder.process.wait_for("listens on")
    (directory / "record.sock").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{directory}/record.sock")
        assert recorder.process.stop() == 0
        assert (directory / "record.sock").exists()


def test_a_socket_whose_owner_is_busy_is_left_alone(record: Record, directory: Path) -> None:
    """So busy that nobody can even connect, which is not waited for."""
    path = directory / "record.sock"
    with busy_listener(path):
        inode = path.stat().st_ino
        recorder = record("unix:/no/such")
        assert recorder.process.wait() == 1
        assert "Address already in use" in recorder.process.output
        assert path.stat().st_ino == inode


def test_systemd_is_told(record: Record, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{directory}/notify")
        manager.settimeout(WAIT)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{directory}/notify")
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        recorder = record("unix:/no/such")
        assert manager.recv(4096).decode() == (
            f"READY=1\nSTATUS=recording on unix:{directory}/record.sock for the filter on "
            "unix:/no/such"
        )
        assert manager.recv(4096) == manager.recv(4096) == b"WATCHDOG=1"
        assert recorder.process.stop() == 0
        said = b"WATCHDOG=1"
        while said == b"WATCHDOG=1":
            said = manager.recv(4096)
        assert said == b"STOPPING=1"


def test_a_socket_that_was_left_is_no_obstacle(
    run_filter: Any, record: Record, directory: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{directory}/record.sock")
    filter_ = run_filter("stamp")
    filter_.mta().quit()
    with record(filter_.socket).mta() as mta:
        assert mta.send(MESSAGE, recipients=["b@x"]).accepted


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--listen", "8891"], 2, "socket '8891': write inet:8891 for a port"),
        (["--listen", "fd:3"], 2, "fd: is for run alone"),
        (["--filter", "unix:"], 2, "socket 'unix:'"),
        (["--group", "no such group"], 2, "--group 'no such group': there is no such group"),
        (["--listen", "inet:1@127.0.0.1", "--group", "root"], 2, "--group is for unix sockets"),
        (["--max-size", "10"], 2, "invalid size of at least 1000 bytes value: '10'"),
        (["--mode", "999"], 2, "--mode: invalid octal mode between 0 and 0777 value: '999'"),
        (["--listen", "inet:1@127.0.0.1", "--mode", "0600"], 2, "--mode is for unix sockets"),
        (["--to", "{file}"], 1, "Not a directory"),
        (["--listen", "unix:{file}"], 1, "what is there is no socket"),
        (["--listen", "unix:{directory}/no/such"], 3, "/no cannot be used: No such file or dir"),
        (
            ["--listen", "unix:{directory}/open/s"],
            3,
            "everybody may write to the socket's directory",
        ),
        (["--listen", "unix:{directory}/busy"], 1, "Address already in use"),
    ],
)
def test_what_it_cannot_do(directory: Path, options: list[str], status: int, said: str) -> None:
    (directory / "file").touch()
    (directory / "open").mkdir()
    (directory / "open").chmod(0o1777)
    known = {"--listen": f"unix:{directory}/a", "--filter": f"unix:{directory}/b"}
    known["--to"] = str(directory / "to")
    pairs = zip(options[::2], options[1::2])
    known.update(
        (name, value.format(file=directory / "file", directory=directory)) for name, value in pairs
    )
    arguments = [each for pair in known.items() for each in pair]
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(f"{directory}/busy")
        busy.listen()
        done = subprocess.run(
            [*python_command(), "-m", "Milter", "record", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("From: a\n", "line 1: no recording, which begins with 'milter-recording 1'"),
        ("milter-recording 9\n", "line 1: version '9' of the form, this reads 1 alone"),
        ("milter-recording 1\nmta 0.1 quit", "line 2: no line end, the file is incomplete"),
        (None, "cannot read the recording"),
    ],
)
def test_what_cannot_be_played(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "case.milter"
    if text is not None:
        path.write_text(text)
    done = replay("unix:/nowhere", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    found = json.loads(replay("unix:/nowhere", path, "--json").stdout)
    assert (found["file"], found["kind"], found["status"]) == (str(path), "message", 2)
    assert said in found["error"]


def test_nobody_to_play_to(tmp_path: Path) -> None:
    path = tmp_path / "case.milter"
    path.write_text("milter-recording 1\nmta 0.1 quit\n")
    done = replay(f"unix:{tmp_path}/gone", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot connect to the filter" in done.stderr
    done = replay(f"unix:{tmp_path}/gone", tmp_path / "gone")
    assert done.returncode == 2
    (tmp_path / "empty").mkdir()
    done = replay(f"unix:{tmp_path}/gone", tmp_path / "empty")
    assert done.returncode == 2
    assert "there is no recording (*.milter) in the directory" in done.stderr
