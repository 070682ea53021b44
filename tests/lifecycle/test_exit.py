"""The interpreter ends while libmilter's threads live: whole, bounded, and without a crash."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import milter
import pytest
from support.lifecycle import Held, Sending, gone, idle, path_of

from Milter.mta import FilterClosed, Verdict

STATUS = {"return": 0, "exit": 3, "raise": 1}
each_ending = pytest.mark.parametrize("ending", STATUS)
# -X dev checks the allocator and the thread states, and dumps the stack of a crash.
each_mode = pytest.mark.parametrize("mode", [(), ("-X", "dev")], ids=["plain", "dev"])


class Program:
    """A program that runs the filter in a daemon thread, and ends when it is told to."""

    def __init__(self, run_filter, directory, ending, *options, mode=(), at=None):
        self._end = Held(directory, "end")
        self.hold = Held(directory, at) if at else None
        fifo = self._end.options[-1].partition(":")[2]
        self.filter = run_filter(
            "lifecycle",
            *(self.hold.options if self.hold else ()),
            *("--on", "daemon", "--wait", "told", "--told", fifo, "--ending", ending),
            *options,
            options=mode,
        )

    def end(self) -> None:
        self._end.release()

    def check(self, ending: str) -> None:
        """It ended as its program says, without a word of a crash."""
        assert self.filter.wait() == STATUS[ending]
        output = self.filter.output
        lines = output.splitlines()
        assert "end of the program" in lines
        assert "atexit, registered late" in lines
        assert "atexit, registered early" in lines
        for trace in ("Fatal", "Exception ignored", "Current thread", "ResourceWarning", "Error "):
            assert trace not in output
        assert output.count("Traceback") == (ending == "raise")

    def close(self) -> None:
        self._end.close()
        if self.hold:
            self.hold.close()


@pytest.fixture
def program(run_filter, directory):
    with contextlib.ExitStack() as stack:

        def start(*arguments, **keywords):
            made = Program(run_filter, directory, *arguments, **keywords)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def connect():
    """Connects to a filter; closes what is left open at the end."""
    with contextlib.ExitStack() as stack:

        def open_(filter_, **options):
            mta = filter_.mta(**options)
            stack.callback(mta.close)
            return mta

        yield open_


@each_mode
@each_ending
def test_the_program_ends_while_the_filter_is_idle(program, connect, ending, mode):
    made = program(ending, mode=mode)
    idle(made.filter)
    mtas = [connect(made.filter) for _ in range(3)]
    mtas[0].greet()
    begin = time.monotonic()
    made.end()
    made.check(ending)
    assert time.monotonic() - begin < 4.5
    assert made.filter.output.count("in close") == 4
    assert not os.path.exists(path_of(made.filter.socket))
    for mta in mtas:
        mta.expect_close()


@each_mode
@each_ending
def test_the_program_ends_while_a_callback_runs(program, connect, ending, mode):
    made = program(ending, mode=mode, at="eom")
    mta = connect(made.filter)
    message = Sending(mta)
    made.filter.wait_for("in eom")
    made.end()
    gone(made.filter.socket)
    made.hold.release()
    result = message.result()
    assert result.verdict is Verdict.ACCEPT
    assert result.message["X-Stamp"] == "before"
    mta.expect_close()
    made.check(ending)
    assert "in close" in made.filter.output


@pytest.mark.parametrize(
    ("ending", "mode"), [("return", ()), ("exit", ("-X", "dev")), ("raise", ())], ids=STATUS
)
def test_the_program_ends_while_a_callback_blocks_for_ever(program, connect, ending, mode):
    made = program(ending, "--drain", "0.3", mode=mode, at="header")
    message = Sending(connect(made.filter))
    made.filter.wait_for("in header")
    begin = time.monotonic()
    made.end()
    made.check(ending)
    assert time.monotonic() - begin < 6
    assert isinstance(message.outcome(), FilterClosed)


def test_the_program_ends_while_a_callback_spins(program, connect):
    made = program("return", "--drain", "0.3", "--at", "eom", "spin", mode=("-X", "dev"))
    message = Sending(connect(made.filter))
    made.filter.wait_for("in eom")
    begin = time.monotonic()
    made.end()
    made.check("return")
    assert time.monotonic() - begin < 10
    assert isinstance(message.outcome(), FilterClosed)


def test_no_callback_begins_once_the_interpreter_ends(program, connect, directory):
    last = Held(directory, "last")
    fifo = last.options[-1].partition(":")[2]
    made = program("return", "--drain", "0.1", "--last", fifo, mode=("-X", "dev"), at="header")
    message = Sending(connect(made.filter))
    made.filter.wait_for("in header")
    made.end()
    made.filter.wait_for("atexit, registered early")  # our own part of the end is over
    made.hold.release()
    made.filter.wait_for("out header")
    assert isinstance(message.outcome(), FilterClosed)  # libmilter has closed the connection
    last.release()
    made.check("return")
    assert "in close" not in made.filter.output
    last.close()


@each_mode
def test_a_callback_that_is_left_behind_does_no_harm_after_main(
    run_filter, directory, connect, mode
):
    hold = Held(directory, "eom")
    filter_ = run_filter("lifecycle", *hold.options, "--drain", "0.2", options=mode)
    messages = []
    for count in range(1, 4):
        # One by one: libmilter starts too few threads for a burst of callbacks that block.
        messages.append(Sending(connect(filter_)))
        filter_.wait_for("in eom", count)
    filter_.process.send_signal(signal.SIGTERM)
    filter_.wait_for("after runmilter")
    for _ in messages:
        hold.release()  # they come back to an interpreter that ends or has ended
    assert filter_.wait() == 0
    assert "Fatal" not in filter_.output
    assert "Traceback" not in filter_.output
    hold.close()


LATE = """
import sys
import milter

def connect(ctx, *arguments):
    import threading  # which logging does too, when the first exception is reported
    return milter.CONTINUE

milter.register("late")
milter.set_connect_callback(connect)
milter.setconn(sys.argv[1])
milter.main()
import threading
print("main thread:", threading.main_thread() is threading.current_thread(), flush=True)
"""


def test_a_callback_that_is_the_first_to_import_threading(run_filter):
    """Before Python 3.13, the thread that does so is the main thread for it, which it waits for."""
    # Nothing that a site's .pth files load.
    filter_ = run_filter(
        source=LATE, options=("-S",), env={"PYTHONPATH": os.path.dirname(milter.__file__)}
    )
    with filter_.mta() as mta:
        mta.connect_info("client.example.com")
    assert filter_.stop() == 0
    assert "main thread: True" in filter_.output
