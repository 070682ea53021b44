"""Filters as processes, and the load on them: one measurement at a time."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FLAGS = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]

STARTING = 30.0  # seconds that a filter may take until it listens
STOPPING = 10.0
SPARE = 60.0  # seconds that a measurement may take beyond those that it is meant to take


class BenchError(Exception):
    """A measurement that cannot be made, or a filter that does not do what it should."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    ``python``: the interpreter that has the package; None for the floor in C.
    ``workers``: the processes to ask for, None for an ordinary filter.  ``pinned``: each of these
    keeps to a core.  ``engine``: who speaks to the MTA, None for what is usual.  ``nodelay``: the
    floor with TCP_NODELAY, which libmilter does not set.  ``form``: which form of its filter the
    workload is measured with, for workloads that compare such forms.
    """

    name: str
    python: str | None = None
    workers: int | None = None
    pinned: bool = False
    engine: str | None = None
    nodelay: bool = False
    form: str | None = None

    def command(self, filter_name: str, address: str, floor: Path) -> list[str]:
        """The filter of that name as a command line."""
        if self.python is None:
            extra = {"big": ["--count-body"], "block": ["--block-ms", "50"]}.get(filter_name, [])
            return [str(floor), address, *extra, *["--nodelay"][: self.nodelay]]
        command = [self.python, str(HERE / "filters" / f"{filter_name}.py"), address]
        if self.workers is not None:
            command += ["--workers", str(self.workers)]
        if self.form is not None:
            command += ["--form", self.form]
        return [*command, "--pin"] if self.pinned else command

    def environment(self) -> dict[str, str]:
        """What its filter finds in its environment."""
        inherited = {name: text for name, text in os.environ.items() if name != "PYMILTER_ENGINE"}
        return inherited if self.engine is None else {**inherited, "PYMILTER_ENGINE": self.engine}


@dataclass(frozen=True)
class Workload:
    """One load on one kind of filter.

    ``load``: further options of the load generator.  ``subjects``: the kinds of subjects that
    it is for.  ``memory``: what counts is the memory of idle connections.
    """

    name: str
    filter: str
    transport: str = "unix"
    connections: int = 1
    load: dict[str, Any] = field(default_factory=dict)
    subjects: tuple[str, ...] = ("floor", "python")
    memory: bool = False
    stretch: float = 1.0

    @property
    def key(self) -> str:
        """The name by which it is chosen and under which its results stand."""
        return f"{self.name}/{self.transport}/{self.connections}"

    def suits(self, subject: Subject) -> bool:
        """Whether the subject takes part; more processes only where that is the point."""
        if subject.nodelay and self.transport != "tcp":
            return False
        if subject.form is not None or "forms" in self.subjects:
            return subject.form is not None and "forms" in self.subjects
        if subject.python is None:
            return "floor" in self.subjects
        if "coroutines" in self.subjects:
            return subject.workers is None and subject.name != "pymilter"
        if subject.workers is not None and subject.name in ("workers", "pinned", "native-workers"):
            return "workers" in self.subjects
        return "python" in self.subjects


@dataclass(frozen=True)
class Times:
    """How long a turn warms up and runs, in seconds, and how many turns there are in a round."""

    warmup: float
    duration: float
    turns: int = 1


# --- the programs in C ------------------------------------------------------------------------


def libmilter_flags() -> list[str]:
    """Where the compiler finds libmilter, as the build of the package does."""
    program = (
        "import setup; include = setup.find_include([]); lib = setup.find_lib(include);"
        "print(f'-I{include}' if str(include) != '/usr/include' else '');"
        "print(f'-L{lib} -Wl,-rpath,{lib}' if lib else '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"cannot find libmilter: {done.stderr.strip()}")
    return done.stdout.split()


def build(directory: Path) -> tuple[Path, Path]:
    """Compile the load generator and the floor where they are missing or old."""
    directory.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    for name in ("load", "floor"):
        source, program = HERE / f"{name}.c", directory / name
        newest = max(path.stat().st_mtime for path in (source, HERE / "packets.h"))
        if program.exists() and program.stat().st_mtime > newest:
            continue
        fresh = directory / f"{name}.{os.getpid()}"
        command = [*compiler, *FLAGS, *libmilter_flags(), str(source), "-o", str(fresh), "-lmilter"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"{shlex.join(command)}\n{done.stderr}")
        fresh.replace(program)
    return directory / "load", directory / "floor"


def has_workers(python: str) -> bool:
    """Whether that interpreter's pymilter knows worker processes."""
    program = (
        "import inspect, Milter, sys;"
        "sys.exit('workers' not in inspect.signature(Milter.runmilter).parameters)"
    )
    return subprocess.run([python, "-c", program], cwd="/", check=False).returncode == 0


def has_engine(subject: Subject) -> bool:
    """Whether that interpreter's pymilter serves by the engine that the subject asks for."""
    program = "import milter, sys; sys.exit(not hasattr(milter, 'set_engine'))"
    assert subject.python is not None
    return subprocess.run([subject.python, "-c", program], cwd="/", check=False).returncode == 0


# --- a filter ---------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(address: str) -> bool:
    """Whether somebody listens there."""
    kind, _, rest = address.partition(":")
    unix = kind == "unix"
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as probe:
        probe.settimeout(1)
        try:
            probe.connect(rest if unix else ("127.0.0.1", int(rest.partition("@")[0])))
        except OSError:
            return False
        return True


def descendants(parent: int) -> list[int]:
    """A process and all that it has started, and these in turn."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                status = Path("/proc", entry, "stat").read_text(errors="replace")
                # The command's name, in brackets, may hold anything.
                children.setdefault(int(status.rpartition(")")[2].split()[1]), []).append(
                    int(entry)
                )
    found = [parent]
    for process in found:
        found.extend(children.get(process, []))
    return found


class Filter:
    """A filter that runs, and listens at ``address``."""

    def __init__(
        self, command: list[str], address: str, log: Path, environment: dict[str, str]
    ) -> None:
        self.address = address
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                cwd=log.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, processes: int) -> None:
        """Wait until it listens, and runs in so many processes at least."""
        deadline = time.monotonic() + STARTING
        while len(self.processes()) < processes or not accepts(self.address):
            if self._process.poll() is not None:
                raise BenchError(self._complaint(f"ended with status {self._process.returncode}"))
            if time.monotonic() > deadline:
                raise BenchError(self._complaint(f"does not listen after {STARTING:g} s"))
            time.sleep(0.01)

    def _complaint(self, what: str) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"the filter {what}: {lines[-1] if lines else 'it said nothing'}"

    def processes(self) -> list[int]:
        """Its processes: one, or a supervisor and its workers."""
        return descendants(self._process.pid)

    def memory(self) -> dict[str, int]:
        """Its resident and its proportional set size over all processes, in bytes."""
        total = {"rss": 0, "pss": 0}
        for process in self.processes():
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name.lower() in total:
                    total[name.lower()] += int(rest.split()[0]) * 1024
        return total

    def stop(self) -> None:
        """End it, with all that it started, without ceremony: libmilter takes seconds to stop."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOPPING)


@contextlib.contextmanager
def running(subject: Subject, workload: Workload, floor: Path, work: Path) -> Iterator[Filter]:
    """A filter for the time of one round."""
    path = work / f"{subject.name}.sock"
    path.unlink(missing_ok=True)
    unix = workload.transport == "unix"
    address = f"unix:{path}" if unix else f"inet:{free_port()}@127.0.0.1"
    command = subject.command(workload.filter, address, floor)
    served = Filter(command, address, work / f"{subject.name}.log", subject.environment())
    try:
        served.wait(1 if subject.workers is None else 1 + subject.workers)
        yield served
    finally:
        served.stop()


# --- a load -----------------------------------------------------------------------------------


def load_command(load: Path, workload: Workload, address: str) -> list[str]:
    """The load generator's command line, without the times."""
    command = [str(load), "--socket", address]
    connections = 0 if workload.memory else workload.connections
    options: dict[str, Any] = {"connections": connections, **workload.load}
    if workload.memory:
        options["idle"] = workload.connections
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def _answer(process: subprocess.Popen[str], output: str, errors: str) -> dict[str, Any]:
    lines = output.strip().splitlines()
    if process.returncode not in (0, 1) or not lines:
        raise BenchError(f"the load generator failed: {errors.strip()}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if answer["errors"]:
        raise BenchError(f"{answer['errors']} connections failed, the first at {answer['error']}")
    return answer


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def measure_load(served: Filter, command: list[str], times: Times) -> dict[str, Any]:
    """Put a load on a filter and return what the generator reports."""
    command = [*command, "--warmup", str(times.warmup), "--duration", str(times.duration)]
    command += ["--pid", ",".join(map(str, served.processes()))]
    with _start(command) as process:
        try:
            output, errors = process.communicate(timeout=times.warmup + times.duration + SPARE)
        except BaseException:
            process.kill()
            raise
    sample = _answer(process, output, errors)
    if not sample["completed"]:
        raise BenchError("no message was completed in the time: give it more (--seconds)")
    sample["cpu_per_callback"] = sample["filter_cpu"] / max(sample["callbacks"], 1) * 1e6
    return sample


def measure_memory(served: Filter, command: list[str], connections: int) -> dict[str, Any]:
    """Compare a filter's memory before and while it has idle connections."""
    before = served.memory()
    with _start([*command, "--duration", str(SPARE)]) as process:
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], SPARE)
            line = process.stdout.readline() if ready else ""
            held = served.memory()
            output, errors = process.communicate(timeout=SPARE)
        except BaseException:
            process.kill()
            raise
    _answer(process, output or line, errors)
    sample: dict[str, Any] = {"connections": connections}
    for kind, size in before.items():
        sample[kind] = size
        sample[f"{kind}_held"] = held[kind]
        sample[f"{kind}_per_connection"] = (held[kind] - size) / connections
    return sample


def measure(served: Filter, workload: Workload, program: Path, times: Times) -> dict[str, Any]:
    """Make one measurement of a filter that runs, with this load generator.

    Raises:
        BenchError: the filter does not do what it should.
    """
    command = load_command(program, workload, served.address)
    if workload.memory:
        return measure_memory(served, command, workload.connections)
    warmup, duration = times.warmup * workload.stretch, times.duration * workload.stretch
    return measure_load(served, command, Times(warmup, duration))


def allow_many_files() -> None:
    """Let filters, which inherit it, have as many open files as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
