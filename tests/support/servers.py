"""Private PostgreSQL and Redis servers for the tests, on a unix socket and on loopback."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

START_SECONDS = 60
STOP_SECONDS = 30


def _missing(text: str) -> None:
    """Skip where something is missing, but not in CI, where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{text}, and CI has to have it")
    pytest.skip(text)


def need_module(name: str, extra: str) -> None:
    """Skip without an optional Python package; in CI only where its absence is being tested."""
    try:
        __import__(name)
    except ImportError:
        text = f"the Python package {name} (extra {extra}) is not installed"
        if os.environ.get("PYMILTER_TEST_WITHOUT_EXTRAS"):
            pytest.skip(text)
        _missing(text)


def _program(pattern: str, package: str) -> Path:
    found = shutil.which(pattern)
    if found:
        return Path(found)
    # Debian keeps the server's programs out of the PATH, one folder a version.
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{pattern}"))
    if not versions:
        _missing(f"{pattern} is not installed (Debian's package {package})")
    return versions[-1]


def _free_port() -> int:
    """A port below those that the system gives to clients, who could take it between two starts."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A server process that can be started, stopped, crashed and brought to a standstill."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="pymilter-"))
        self.log = self.folder / "log"
        self.identity: dict[str, object] = {}

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self.identity
            )
        end = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"{self.command()[0]} does not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End the process and wait for that."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.send_signal(how)
        process.wait(STOP_SECONDS)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def processes(self) -> list[int]:
        """The server and its children."""
        assert self.process is not None
        found = [self.process.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found

    @contextlib.contextmanager
    def hanging(self):
        """Everything of the server stands still, its sockets open."""
        processes = self.processes()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def discard(self) -> None:
        try:
            self.stop(signal.SIGINT)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


class PostgreSQL(Server):
    """PostgreSQL on a unix socket in its own folder, run by an unprivileged user."""

    def __init__(self) -> None:
        postgres = _program("postgres", "postgresql")
        super().__init__()
        self.postgres = str(postgres)
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.identity = {
                "user": nobody.pw_uid,
                "group": nobody.pw_gid,
                "extra_groups": [],
                "cwd": self.folder,
            }
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self.data = self.folder / "data"
        initdb = postgres.with_name("initdb")
        arguments = ["--auth=trust", "--username=milter", "--encoding=UTF8", "--locale=C"]
        subprocess.run(
            [initdb, *arguments, "--no-sync", self.data],
            check=True,
            capture_output=True,
            timeout=START_SECONDS,
            **self.identity,
        )

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "off",  # the machine does not crash in these tests, only processes do
            "shared_buffers": "16MB",
        }
        options = [word for item in settings.items() for word in ("-c", "=".join(item))]
        return [self.postgres, "-D", str(self.data), *options]

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("public"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, schema: str) -> str:
        """A URL under which the table is in a schema of its own."""
        return f"postgresql://milter@/postgres?host={self.folder}&options=-csearch_path%3D{schema}"

    def fresh_url(self) -> str:
        import psycopg

        schema = f"s{time.monotonic_ns()}"
        with psycopg.connect(self.url("public"), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
        return self.url(schema)


class Redis(Server):
    """Redis on a loopback port and a unix socket, every write in its journal."""

    def __init__(self) -> None:
        program = _program("redis-server", "redis-server")
        super().__init__()
        self.program = str(program)
        self.socket = self.folder / "socket"
        self.port = _free_port()

    def command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            # By the second it puts writing off while an earlier fsync takes long.
            "appendfsync": "always",
            "save": "",
            "daemonize": "no",
        }
        return [
            self.program,
            *(word for key, value in settings.items() for word in (f"--{key}", value)),
        ]

    def answers(self) -> bool:
        import redis

        client = redis.Redis(port=self.port, socket_timeout=5)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def fresh_url(self) -> str:
        import redis

        with redis.Redis(port=self.port, socket_timeout=5) as client:
            client.flushall()
        return self.url()
