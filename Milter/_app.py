"""A filter run as a process of its own, for tests: see ``Milter.pytest_plugin``."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from ._base import Base
    from .mailfilter import Filter
    from .mta import MTA, Recording, Replay, Result

    #: A filter class, a function of ``Milter.mailfilter``, ``"module:Class"``, the path of a
    #: script, or the name of a module.
    FilterLike = Union[type[Base], Filter, str, os.PathLike[str]]

#: Bound of every wait, in seconds: far above what a loaded machine needs.
WAIT = 30.0

# The search path comes first, as this process has it, so that nothing in the current directory
# is taken for a module of the library.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); "
    "from Milter._app import serve; sys.exit(serve(sys.argv[1:]))"
)

running: list[MilterApp] = []  # what the plugin shows the output of


class MilterApp:
    """A filter that runs as a process, and is stopped at the end of the ``with`` block.

    Fixtures of a wider scope than ``milter_app`` use it by itself::

        @pytest.fixture(scope="module")
        def app():
            with MilterApp(Hello) as app:
                yield app

    Attributes:
        socket: where it listens, as libmilter writes it (``unix:/path``, ``inet:port@host``).
        process: the process.
        results: what became of the last messages that went by ``send`` of its connections.
    """

    def __init__(
        self,
        filter: FilterLike,
        *arguments: str,
        socket: str = "unix",
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float = WAIT,
    ) -> None:
        """Start the filter and wait until it listens.

        Args:
            filter: what to run: a filter class or a filter of ``Milter.mailfilter``, which must
                stand at the top level of its module; ``"module:Class"``; the path of a script
                (``.py``); the name of a module for ``python -m``.
            arguments: for a class or function: options of ``python -m Milter run``, such as
                ``"--workers", "2"``. For a script or module: its own, in which ``{socket}``
                stands for the address; where none has it, ``--socket ADDRESS`` is added.
            socket: ``"unix"`` for a new one in a directory of its own, ``"inet"`` for a free
                port on 127.0.0.1, or an address as libmilter writes it.
            env: additions to the environment.
            cwd: the directory to run it in; the current one by default.
            timeout: the bound of each wait, in seconds.

        Raises:
            TypeError, ValueError: the filter or the socket is none of these.
            RuntimeError: the filter ended before it listened; the message has its output.
            TimeoutError: it does not listen in time; likewise.
        """
        self._timeout = timeout
        self._directory = tempfile.TemporaryDirectory(prefix="milter-")
        self._stopped = False
        try:
            self.socket = self._address(socket)
            self.process = subprocess.Popen(
                _command(filter, self.socket, arguments),
                env=_environment(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            self._directory.cleanup()
            raise
        self.name = os.fspath(filter) if isinstance(filter, (str, os.PathLike)) else filter.__name__
        self.results: deque[Result] = deque(maxlen=5)
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        running.append(self)
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> MilterApp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish()

    def __repr__(self) -> str:
        return f"<MilterApp {self.name} at {self.socket}, pid {self.pid}>"

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.process.pid

    @property
    def output(self) -> str:
        """What the filter wrote to standard output and standard error so far."""
        deadline = time.monotonic() + self._timeout
        with self._news:
            while not self._ended and self._has_news(0) and time.monotonic() < deadline:
                self._news.wait(0.01)  # what it wrote before an answer is there before that
            return "".join(self._lines)

    def mta(self, **options: Any) -> MTA:
        """Connect to the filter as an MTA.

        Args:
            options: those of ``Milter.mta.MTA.connect``, such as ``dialect``.

        Returns:
            The connection, for a ``with`` block.
        """
        options.setdefault("timeout", self._timeout)
        options.setdefault("wait_for", self._timeout)
        connection: MTA = _recording_mta().connect(self.socket, **options)
        connection.results = self.results  # type: ignore[attr-defined]
        return connection

    def replay(self, recording: Recording | str | os.PathLike[str], **options: Any) -> Replay:
        """Play a session that ``python -m Milter record`` has written to the filter.

        Args:
            recording: the session, or its file.
            options: those of ``Milter.mta.MTA.replay``, such as ``ignored_headers``.

        Returns:
            What came of it: ``difference`` is None where the filter answers as it did then.

        Raises:
            OSError, ValueError: the file cannot be read, or is no recording.
        """
        return self.mta(offer=None).replay(recording, **options)

    def wait_for_output(self, text: str, count: int = 1, timeout: float | None = None) -> str:
        """Wait until the filter has written lines that hold a text.

        Args:
            text: what to look for.
            count: how many such lines there must be.
            timeout: seconds to wait; that of the filter by default.

        Returns:
            The last of these lines, without its line end.

        Raises:
            TimeoutError: they did not come in time, or the filter ended without them.
        """
        wait = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + wait
        with self._news:
            while True:
                found = [line for line in self._lines if text in line]
                if len(found) >= count:
                    return found[count - 1].rstrip("\n")
                left = deadline - time.monotonic()
                if left <= 0 or self._ended:
                    why = "the filter ended" if self._ended else f"{wait:g} s passed"
                    raise TimeoutError(
                        f"{why} without {count} line(s) with {text!r}; its output:\n"
                        + "".join(self._lines)
                    )
                self._news.wait(left)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the filter as an administrator would.

        Args:
            number: the signal to send.

        Returns:
            The exit status: 0 after a clean stop, the negative number of a signal that ended it.

        Raises:
            TimeoutError: it did not end in time, and was killed.
        """
        self._stopped = True
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"{self.name} did not end within {self._timeout:g} s after signal {number}; "
                f"its output:\n{self.output}"
            ) from None
        finally:
            self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """End the filter and all its processes without asking."""
        self._stopped = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Workers are in its process group, and could outlive it.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(self._timeout)
        self._reader.join(self._timeout)
        if self in running:
            running.remove(self)
        self._directory.cleanup()

    def finish(self) -> None:
        """Stop the filter at the end of a test.

        Raises:
            RuntimeError: it had ended by itself, or ended with another exit status than 0;
                the message has its output. A filter that was stopped before is left alone.
            TimeoutError: it did not end in time, and was killed.
        """
        if self._stopped:
            return
        early = self.process.poll() is not None
        status = self.stop()
        if early or status:
            when = "before it was stopped" if early else "when it was stopped"
            raise RuntimeError(
                f"{self.name} ended with status {status} {when}; its output:\n{self.output}"
            )

    def _address(self, wanted: str) -> str:
        if wanted == "unix":
            return f"unix:{self._directory.name}/socket"
        if wanted == "inet":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                return f"inet:{probe.getsockname()[1]}@127.0.0.1"
        from .mta import parse_socket

        parse_socket(wanted)
        return wanted

    def _read(self) -> None:
        """Take what it writes; what has left the pipe is in the lines as soon as the lock is."""
        assert self.process.stdout is not None
        data, rest = b"", b""
        with self.process.stdout as stream:
            while not self._ended:
                self._has_news(None)
                with self._news:
                    data = os.read(stream.fileno(), 65536)
                    *lines, rest = (rest + data).split(b"\n")
                    lines = [line + b"\n" for line in lines] + ([] if data or not rest else [rest])
                    self._lines += [line.decode(errors="backslashreplace") for line in lines]
                    self._ended = not data
                    self._news.notify_all()

    def _has_news(self, timeout: float | None) -> bool:
        """Whether something waits in the pipe, or its end."""
        stdout = self.process.stdout
        if stdout is None or stdout.closed:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            return bool(selector.select(timeout))

    def _wait_until_it_listens(self) -> None:
        from .mta import MTA, FilterUnreachable

        deadline = time.monotonic() + self._timeout
        while True:
            try:
                # Not a word is said: no filter object is made for this connection.
                MTA.connect(self.socket, offer=None).close()
                return
            except FilterUnreachable as exc:
                if self.process.poll() is not None:
                    self._reader.join(self._timeout)
                    raise RuntimeError(
                        f"{self.name} ended with status {self.process.returncode} before it "
                        f"listened at {self.socket}; its output:\n{self.output}"
                    ) from None
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"{self.name} does not listen at {self.socket} after "
                        f"{self._timeout:g} s ({exc}); its output:\n{self.output}"
                    ) from None
            time.sleep(0.01)


@functools.cache
def _recording_mta() -> Any:
    """An MTA that remembers what became of its messages."""
    from .mta import MTA

    class RecordingMTA(MTA):
        """An MTA that remembers what became of its messages."""

        results: deque[Result]

        def send(self, *args: Any, **options: Any) -> Result:
            result = super().send(*args, **options)
            self.results.append(result)
            return result

    return RecordingMTA


def _environment(additions: Mapping[str, str] | None) -> dict[str, str]:
    """This environment, with modules found where this process finds them."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **(additions or {})}


def _python() -> list[str]:
    """This interpreter with its options."""
    options = ["-X", "dev"] if sys.flags.dev_mode else []
    # pytest turns warnings into errors within its own process; only -W goes to children.
    for option in sys.warnoptions:
        options += ["-W", option]
    return [sys.executable, *options]


def _command(filter: FilterLike, address: str, arguments: Sequence[str]) -> list[str]:
    if not isinstance(filter, (str, os.PathLike)):
        _check_object(filter)
        return [*_bootstrap(), *_object_address(filter), "--socket", address, *arguments]
    text = os.fspath(filter)
    if ":" in text:
        return [*_bootstrap(), "", text, "--socket", address, *arguments]
    if not any("{socket}" in argument for argument in arguments):
        arguments = [*arguments, "--socket", "{socket}"]
    own = [argument.replace("{socket}", address) for argument in arguments]
    if not isinstance(filter, str) or text.endswith(".py"):
        if not Path(text).is_file():
            raise ValueError(f"filter {text!r}: there is no such script")
        return [*_python(), os.path.abspath(text), *own]
    if not all(part.isidentifier() for part in text.split(".")):
        raise ValueError(
            f"filter {text!r}: neither a class nor module:Class, the path of a script (.py) or "
            "the name of a module"
        )
    return [*_python(), "-m", text, *own]


def _bootstrap() -> list[str]:
    path = [os.path.abspath(entry) for entry in sys.path]
    return [*_python(), "-c", _BOOTSTRAP, "\n".join(path)]


def _check_object(filter: object) -> None:
    """Check that this can be a filter.

    Raises:
        TypeError: it is an object of the filter's class, or anything else.
    """
    from ._base import Base

    if isinstance(filter, Base):
        name = type(filter).__name__
        raise TypeError(f"filter is an object of {name}: give the class, milter_app({name})")
    if isinstance(filter, type) and not issubclass(filter, Base):
        raise TypeError(
            f"filter {filter.__name__} is no filter class, which must be derived from Milter.Base"
        )
    if not callable(filter):
        raise TypeError(
            f"filter {filter!r} is neither a class nor a function, module:Class, the path of a "
            "script (.py) or the name of a module"
        )


def _object_address(filter: type[Base] | Filter) -> tuple[str, str]:
    """The file that a class or function stands in, and ``module:Class``."""
    module, name = filter.__module__, filter.__qualname__
    file = None
    if isinstance(filter, type):
        if "<locals>" not in name:
            file = inspect.getfile(filter)
    else:
        # What a chain is called is what it was assigned to.
        places: list[Any] = [sys.modules.get(module), *sys.modules.values()]
        for place in places:
            names = _names_of(filter, place)
            if names and getattr(place, "__file__", None):
                module, name, file = place.__name__, names[0], place.__file__
                break
    if file is None:
        raise ValueError(
            f"filter {name or filter.__name__}: another process can import only a class or a "
            "function that stands at the top level of a module, not one made within a function"
        )
    return file, f"{module}:{name}"


def _names_of(value: object, module: Any) -> list[str]:
    """What a value is called in a module."""
    known = list(getattr(module, "__dict__", {}).items())
    return [name for name, each in known if each is value]


def serve(arguments: list[str]) -> int:
    """What the process does for a class: ``python -m Milter run`` with what was imported."""
    file, spec, *options = arguments
    module, _, attribute = spec.partition(":")
    if file:
        if module == "__main__":
            module = "__milter_app__"
        _import_file(module, file)
    from .__main__ import main

    return main(["run", f"{module}:{attribute}", *options])


def _import_file(name: str, file: str) -> None:
    """Import a module by its name, or from its file where that name does not lead there.

    Test runners import files that no search path leads to.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not os.path.samefile(spec.origin, file):
        spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
