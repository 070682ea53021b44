"""Callbacks that are coroutines, in the tools for tests, the metrics and the command line."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import io
import os
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import milter
import pytest
from support.process import WAIT, python_command

import Milter
from Milter import test as milter_test
from Milter.mta import FilterClosed, Verdict
from Milter.testctx import TestCtx

CLIENT: contextvars.ContextVar[str] = contextvars.ContextVar("CLIENT", default="nobody")


class Stamp(Milter.Base):
    """Plain methods and coroutines."""

    closed = 0

    def connect(self, host: str, family: int, address: Any) -> int:
        CLIENT.set(host)
        return Milter.CONTINUE

    @Milter.noreply
    async def hello(self, name: str) -> int:
        await asyncio.sleep(0)
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> Any:
        await asyncio.sleep(0)
        if to == "<raise@x>":
            raise KeyError(to)
        if to == "<refuse@x>":
            self.setreply("550", "5.7.1", "no")
            return Milter.REJECT
        return None if to == "<none@x>" else Milter.CONTINUE

    async def eom(self) -> int:
        await asyncio.create_task(self.act())
        return Milter.ACCEPT

    async def act(self) -> None:
        self.addheader("X-Client", CLIENT.get())

    async def close(self) -> int:
        Stamp.closed += 1
        assert self.context is not None
        return Milter.CONTINUE


class Negotiating(Milter.Base):
    async def negotiate(self, opts: list[int]) -> int:  # type: ignore[override]
        return Milter.CONTINUE


@pytest.fixture(autouse=True)
def factory() -> Iterator[None]:
    before = Milter.factory
    yield
    Milter.factory = before


def test_the_stand_in_awaits_what_callbacks_return() -> None:
    """Also within a loop of the test's own; in the variables of the connection."""
    Milter.factory = Stamp

    def session() -> bytes:
        ctx = TestCtx()
        assert ctx._connect("client.example") == milter.CONTINUE
        assert ctx._feedFile(io.BytesIO(b"A: b\n\nbody\n")) == milter.ACCEPT
        assert ctx._body is not None
        before = Stamp.closed
        ctx._close()
        assert Stamp.closed == before + 1
        return ctx._body.getvalue()

    async def within() -> bytes:
        return session()

    wanted = b"A: b\nX-Client: client.example\n\nbody\n"
    assert session() == wanted
    assert asyncio.run(within()) == wanted


def test_what_a_coroutine_raises_or_returns_comes_out_of_the_stand_in() -> None:
    Milter.factory = Stamp
    ctx = TestCtx()
    ctx._connect()
    ctx._envfrom("<a@x>")
    with pytest.raises(KeyError, match="raise@x"):
        ctx._envrcpt("<raise@x>")
    with pytest.raises(milter.error, match="envrcpt callback returned None: not an int"):
        ctx._envrcpt("<none@x>")
    assert ctx._envrcpt("<refuse@x>") == milter.REJECT
    assert ctx._reply == ("550", "5.7.1", "no")
    ctx._abort()


class Cancelled(Milter.Base):
    async def cancel(self) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return Milter.CONTINUE

    async def hello(self, name: str) -> int:
        return await self.cancel() if name == "cancel" else Milter.CONTINUE

    async def envfrom(self, sender: str, *params: str) -> int:
        return await self.cancel()


def test_what_was_cancelled_puts_the_message_off_in_the_stand_in() -> None:
    """As in a filter; where there is no message, the session goes on."""
    Milter.factory = Cancelled
    ctx = TestCtx()
    ctx._connect()
    if sys.version_info < (3, 11):  # nobody knows whose task it was
        with pytest.raises(asyncio.CancelledError):
            ctx._envfrom("<a@x>")
    else:
        assert ctx._envfrom("<a@x>") == milter.TEMPFAIL
        assert ctx._helo("cancel") == milter.CONTINUE


def test_the_stand_in_awaits_generators_that_may_be() -> None:
    class Generating(Milter.Base):
        @types.coroutine
        def envfrom(self, sender: str, *params: str) -> Any:
            yield
            return Milter.DISCARD

        @Milter.nocallback
        @types.coroutine
        def hello(self, name: str) -> Any:
            yield
            return Milter.CONTINUE

    Milter.factory = Generating
    ctx = TestCtx()
    ctx._opts = [ctx._opts[0], 0, 0, 0]  # each step is sent
    ctx._connect()
    assert ctx._envfrom("<a@x>") == milter.DISCARD


def test_negotiation_is_no_coroutine_in_the_stand_in() -> None:
    Milter.factory = Negotiating
    with pytest.raises(milter.error, match="so it is no coroutine; write it without async"):
        TestCtx()._connect()


def test_the_older_stand_in_too() -> None:
    class Tested(milter_test.TestBase, Stamp):
        def __init__(self) -> None:
            milter_test.TestBase.__init__(self)

    tested = Tested()
    tested.connect("client.example")
    before = Stamp.closed
    assert tested.feedFile(io.BytesIO(b"A: b\n\nbody\n")) == milter.ACCEPT
    assert Stamp.closed == before + 1
    assert tested._body is not None
    assert b"X-Client: client.example\n" in tested._body.getvalue()


def test_a_session_leaves_no_task_behind(tmp_path: Path) -> None:
    """At the end of the test run, in development mode, with warnings as errors."""
    script = tmp_path / "run.py"
    script.write_text(
        "import asyncio, Milter\n"
        "from Milter.testctx import TestCtx\n"
        "class Filter(Milter.Base):\n"
        "    async def connect(self, *args):\n"
        "        self.task = asyncio.create_task(asyncio.sleep(1000))\n"
        "        return Milter.CONTINUE\n"
        "Milter.factory = Filter\n"
        "TestCtx()._connect()\n"
    )
    command = [python_command()[0], "-X", "dev", "-W", "error", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    # Development mode also tells of what takes a tenth of a second, on a busy machine.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.returncode, done.stdout, said) == (0, "", [])


class Slow(Milter.Base):
    async def envrcpt(self, to: str, *params: str) -> int:
        await asyncio.sleep(0.2)
        return Milter.REJECT


@pytest.mark.milter_app(filter=Slow)
def test_the_plugin_runs_them(mta: Any) -> None:
    result = mta.send(b"\r\n", recipients=["bob@example.org"])
    assert [str(one.reply.verdict) for one in result.refused] == [str(Verdict.REJECT)]


def test_the_time_of_a_callback_is_that_of_waiting_too(
    run_filter: Callable[..., Any],
) -> None:
    running = run_filter(
        source=(
            "import asyncio, sys, Milter\n"
            "from Milter import metrics\n"
            "class Slow(Milter.Base):\n"
            "    async def envrcpt(self, *args):\n"
            "        await asyncio.sleep(0.2)\n"
            "        return Milter.REJECT\n"
            "    async def close(self):\n"
            "        stage = metrics.snapshot().stages['envrcpt']\n"
            "        given = sum(stage.verdicts.values())\n"
            "        print('told', stage.calls, given, stage.seconds, flush=True)\n"
            "        return Milter.CONTINUE\n"
            "metrics.enable()\n"
            "Milter.factory = Slow\n"
            "Milter.runmilter('slow', sys.argv[1])\n"
        )
    )
    with running.mta() as mta:
        mta.connect_info("c")
        mta.helo("h")
        mta.mail("<a@b>")
        mta.rcpt("<c@d>")
    _, calls, rejects, seconds = running.wait_for("told").split()
    assert (calls, rejects) == ("1", "1")
    assert 0.19 < float(seconds) < WAIT


@pytest.mark.engine("native")
def test_no_verdict_is_counted_where_the_mta_has_hung_up(run_filter: Callable[..., Any]) -> None:
    running = run_filter(
        source=(
            "import asyncio, sys, Milter\n"
            "from Milter import metrics\n"
            "class Waiting(Milter.Base):\n"
            "    async def envrcpt(self, *args):\n"
            "        print('waits', flush=True)\n"
            "        await asyncio.Event().wait()\n"
            "    async def close(self):\n"
            "        stage = metrics.snapshot().stages['envrcpt']\n"
            "        print('told', stage.calls, *stage.verdicts.items(), flush=True)\n"
            "        return Milter.CONTINUE\n"
            "metrics.enable()\n"
            "Milter.factory = Waiting\n"
            "Milter.runmilter('waiting', sys.argv[1])\n"
        )
    )
    mta = running.mta()
    mta.connect_info("c")
    mta.helo("h")
    mta.mail("<a@b>")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(mta.rcpt, "<c@d>")
        running.wait_for("waits")
        with socket.socket(fileno=os.dup(mta.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)
        assert running.wait_for("told") == "told 1 ('NOREPLY', 1)"
        with pytest.raises(FilterClosed):
            answer.result(WAIT)
    mta.close()


def test_serve_takes_the_keywords_of_runmilter() -> None:
    """But for those of workers and of the loop, which is the program's."""
    theirs = inspect.signature(Milter.runmilter).parameters
    ours = inspect.signature(Milter.serve).parameters
    left_out = {"workers", "worker_init", "pin_workers", "loop_factory"}
    assert list(ours) == [name for name in theirs if name not in left_out]
    assert all(ours[name] == theirs[name] for name in ours)


def test_run_takes_such_a_class(directory: Path, run_filter: Callable[..., Any]) -> None:
    """`--check` finds what is wrong with it: negotiate alone must not be async."""
    (directory / "module.py").write_text(
        "import Milter\n"
        "class Good(Milter.Base):\n"
        "    async def envrcpt(self, to, *params):\n"
        "        return Milter.REJECT\n"
        "class Bad(Good):\n"
        "    async def negotiate(self, opts):\n"
        "        return Milter.CONTINUE\n"
        "    async def hello(self):\n"
        "        return Milter.CONTINUE\n"
    )

    def check(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*python_command(), "-m", "Milter", "run", "--check", f"module:{name}"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )

    assert check("Good").returncode == 0
    bad = check("Bad")
    assert bad.returncode == 1
    told = bad.stdout + bad.stderr
    assert "Bad.negotiate is async" in told
    assert "Bad.hello cannot be called as it will be" in told
    running = run_filter(
        source=(
            "import os, sys\n"
            f"os.chdir({str(directory)!r})\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'Milter', 'run', 'module:Good',\n"
            "    '--socket', sys.argv[1]])\n"
        )
    )
    with running.mta() as mta:
        mta.connect_info("c")
        mta.helo("h")
        mta.mail("<a@b>")
        assert mta.rcpt("<c@d>").verdict.name == "REJECT"
    assert running.stop() == 0
