"""What mail wrote into an exception forges no line of the log, and steers no terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wire.test_error_log import converse

from Milter._logging import logger
from Milter._text import visible

Run = Callable[..., Any]

#: What would be a line of the log, and what would move the cursor, if it came through.
EVIL = "first\nERROR milter: forged\r\x1b[2J\x07\x7f\x9b\u2028\u202e\udc80"
SHOWN = r"first\nERROR milter: forged\r\x1b[2J\x07\x7f\x9b\u2028\u202e\x80"

needs_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 brought them")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a handler of logging's own kind writes for the package's records."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("milter").addHandler(handler)
    yield out
    logging.getLogger("milter").removeHandler(handler)


def raised(source: str) -> BaseException:
    """The exception that a piece of code raises."""
    try:
        exec(source, {"EVIL": EVIL, "__name__": "app"})
    except Exception as exc:  # noqa: BLE001 - whatever it is
        return exc
    raise AssertionError("nothing was raised")


KINDS = {
    "text": "raise ValueError(EVIL)",
    "type": "raise type(EVIL[:-1], (ValueError,), {})('x')",
    "cause": "raise ValueError('outer') from OSError(EVIL)",
    "cause of a cause": """
try:
    raise OSError('inner') from KeyboardInterrupt(EVIL)
except OSError as exc:
    raise ValueError('outer') from exc
""",
    "context": """
try:
    raise OSError(EVIL)
except OSError:
    raise ValueError('outer')
""",
    "syntax": "raise SyntaxError(EVIL, (EVIL, 1, 1, EVIL))",
    "file": "exec(compile('1/0', EVIL.encode('utf-8', 'replace').decode(), 'exec'))",
}
NOTED = {
    "note": "e = ValueError('x'); e.add_note(EVIL); raise e",
    "note that looks like a line": """
e = ValueError(EVIL); e.add_note('ERROR milter: forged'); raise e
""",
    "notes that are none": """
class Odd:
    def __repr__(self): return EVIL
e = ValueError('x'); e.__notes__ = Odd(); raise e
""",
    "group": "raise ExceptionGroup(EVIL, [ValueError(EVIL), OSError('x')])",
    "group in a group": """
raise ExceptionGroup('x', [ExceptionGroup('y', [KeyError(1), OSError(EVIL)])])
""",
    "note in a group": """
e = ValueError('x'); e.add_note(EVIL)
raise ExceptionGroup('x', [e]) from ExceptionGroup('y', [OSError(EVIL)])
""",
}


@pytest.mark.parametrize(
    "source",
    [
        *(pytest.param(source, id=kind) for kind, source in KINDS.items()),
        *(pytest.param(source, id=kind, marks=needs_notes) for kind, source in NOTED.items()),
    ],
)
def test_no_text_of_an_exception_forges_a_line(log: io.StringIO, source: str) -> None:
    exception = raised(source)
    logger().error("told: %s", "once", exc_info=exception)
    lines = log.getvalue().split("\n")
    assert lines[0] == "ERROR milter: told: once"
    assert not [line for line in lines[1:] if line.startswith(("ERROR", "first"))]
    assert visible(log.getvalue().replace("\n", "")) == log.getvalue().replace("\n", "")
    assert r"first\nERROR milter: forged\r\x1b[2J" in log.getvalue()
    assert "Traceback (most recent call last)" in log.getvalue()


@pytest.mark.parametrize("handler", ["own", "root"])
def test_handlers_are_given_the_exception_itself(handler: str) -> None:
    seen: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    where, keep = logging.getLogger("milter" if handler == "own" else None), Keep()
    exception = raised(KINDS["text"])
    where.addHandler(keep)
    try:
        logger().error("told", exc_info=exception)
    finally:
        where.removeHandler(keep)
    (record,) = seen
    assert record.exc_info is not None
    assert record.exc_info[1] is exception
    assert str(exception) == EVIL


INNOCENT = {
    "text": "raise ValueError('Größe 50 %, 日本語\u3000, a tab\\t, שלום\u200f')",
    "cause": "raise ValueError('outer') from OSError(2, 'No such file', '/x')",
    "no text": "raise ValueError",
    "broken": "class B(Exception):\n    def __str__(self): raise ValueError\nraise B",
    "syntax": "raise SyntaxError('bad', ('file', 3, 2, 'x = = 1\\n'))",
}


@pytest.mark.parametrize("source", INNOCENT.values(), ids=INNOCENT.keys())
def test_an_innocent_exception_is_left_to_the_formatter(log: io.StringIO, source: str) -> None:
    exception = raised(source)
    logger().error("told", exc_info=exception)
    expected = "".join(
        traceback.format_exception(type(exception), exception, exception.__traceback__)
    )
    assert log.getvalue() == f"ERROR milter: told\n{expected}"


def test_a_formatter_of_the_applications_own_is_asked(log: io.StringIO) -> None:
    class OneLine(logging.Formatter):
        def formatException(self, info: Any) -> str:
            return f"raised {info[1]!r}"

    logging.getLogger("milter").handlers[-1].setFormatter(OneLine())
    logger().error("told", exc_info=raised("raise ValueError('x')"))
    assert log.getvalue() == "told\nraised ValueError('x')\n"


def test_a_message_is_one_line_too(log: io.StringIO) -> None:
    logger("milter.run").error("cannot read %s", EVIL)
    assert log.getvalue() == f"ERROR milter.run: cannot read {SHOWN}\n"


def test_a_message_that_does_not_fit_is_left_to_the_handlers(
    log: io.StringIO, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("milter"), "propagate", False)  # pytest's would raise
    logger().error("%d", "no number")
    assert log.getvalue() == ""
    assert "--- Logging error ---" in capsys.readouterr().err


@needs_notes
def test_a_note_that_cannot_be_shown_hides_nothing_else(log: io.StringIO) -> None:
    source = "class Bad:\n    def __str__(self): raise ValueError\n"
    logger().error(
        "told", exc_info=raised(source + "e = KeyError(1); e.__notes__ = [Bad()]; raise e")
    )
    assert log.getvalue().endswith("KeyError: 1\nnote: <note str() failed>\n")


def test_a_chain_without_end_ends(log: io.StringIO) -> None:
    first, second = ValueError(EVIL), OSError("x")
    first.__cause__, second.__context__ = second, first
    logger().error("told", exc_info=first)
    assert log.getvalue().count(SHOWN) == 1


# --- in filters ----------------------------------------------------------------------------------

FILTER = """
import sys
import Milter
{setup}
class Failing(Milter.Base):
    def negotiate(self, opts):
        if "negotiate" in sys.argv:
            raise ValueError("from the application\\nERROR milter: forged\\x1b[2J")
        return super().negotiate(opts)

    def envrcpt(self, *args):  # or no message would have begun
        return Milter.CONTINUE

    def header(self, name, value):
        try:
            raise OSError(value)
        except OSError as exc:
            raise ValueError(f"from the application {{value}}") from exc

Milter.factory = Failing
"""
SETUPS = {
    "logging": (
        'import logging\nlogging.basicConfig(format="%(levelname)s %(name)s: %(message)s")'
    ),
    "a file": (
        "import logging\n"
        'logging.basicConfig(filename="/dev/stderr", encoding="utf-8", format="%(message)s")'
    ),
    "no handler": "import logging",
    "no logging": "",
}
RUNS = {
    "one process": 'Milter.runmilter("failing", sys.argv[1])\n',
    "workers": 'Milter.runmilter("failing", sys.argv[1], workers=2)\n',
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
@pytest.mark.parametrize("how", RUNS.values(), ids=RUNS.keys())
def test_a_header_in_an_exception_forges_nothing(run_filter: Run, setup: str, how: str) -> None:
    filter_ = run_filter(source=FILTER.format(setup=setup) + how)
    with filter_.mta() as mta:
        mta.send(
            b"X: a\r\n ERROR milter: forged\x1b[2J\xff\r\n\r\n", recipients=["b@example.org"]
        )  # fmt: skip
    filter_.wait_for("ValueError: from the application")
    assert filter_.stop() == 0
    lines = filter_.output.split("\n")
    assert not [line for line in lines if line.lstrip().startswith("ERROR milter: forged")]
    assert r"ValueError: from the application a\n ERROR milter: forged\x1b[2J\xff" in lines
    assert r"OSError: a\n ERROR milter: forged\x1b[2J\xff" in lines


def test_a_failure_in_negotiation_forges_nothing(run_filter: Run) -> None:
    filter_ = run_filter(
        None, "negotiate", source=FILTER.format(setup=SETUPS["logging"]) + RUNS["one process"]
    )
    converse(filter_, "negotiate")
    filter_.wait_for("ValueError: from the application")
    assert filter_.stop() == 0
    lines = filter_.output.split("\n")
    assert r"ValueError: from the application\nERROR milter: forged\x1b[2J" in lines


def test_a_worker_that_ends_forges_nothing(run_filter: Run) -> None:
    source = FILTER.format(setup=SETUPS["logging"]) + (
        "def fail():\n    raise ValueError('no database\\nERROR milter: forged')\n"
        'Milter.runmilter("failing", sys.argv[1], workers=2, worker_init=fail)\n'
    )
    filter_ = run_filter(source=source)
    filter_.wait_for("no database")
    assert filter_.wait() != 0
    assert r"ValueError: no database\nERROR milter: forged" in filter_.output.split("\n")


HOOK = """
def hook(kind, exception, where):
    print("hook", ascii(str(exception)), ascii(str(exception.__cause__)), flush=True)

sys.excepthook = hook
"""


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_a_replaced_excepthook_is_given_what_was_raised(run_filter: Run, setup: str) -> None:
    source = FILTER.format(setup=setup) + HOOK + RUNS["one process"]
    filter_ = run_filter(source=source)
    with filter_.mta() as mta:
        mta.send(b"X: a\r\n b\x1b[2J\r\n\r\n", recipients=["b@example.org"])
    line = filter_.wait_for("hook ")
    assert line == r"hook 'from the application a\n b\x1b[2J' 'a\n b\x1b[2J'"


def test_the_command_line_forges_nothing(run_filter: Run, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FILTER.format(setup=""))
    source = (
        f"import os, sys; os.chdir({os.fspath(tmp_path)!r}); sys.path.insert(0, '')\n"
        "from Milter.__main__ import main\n"
        "sys.exit(main(['run', 'failing:Failing', '--socket', sys.argv[1]]))\n"
    )
    filter_ = run_filter(source=source)
    with filter_.mta() as mta:
        mta.send(b"X: a\r\n ERROR: forged\x1b[2J\r\n\r\n", recipients=["b@example.org"])
    filter_.wait_for("ValueError: from the application")
    assert filter_.stop() == 0
    lines = filter_.output.split("\n")
    assert r"ValueError: from the application a\n ERROR: forged\x1b[2J" in lines


LOW_LEVEL = """
import sys
import milter

def fail(ctx, *args):
    raise ValueError("from the application\\nERROR forged\\x1b[2J")

milter.set_flags(0)
milter.set_envrcpt_callback(fail)
milter.register("failing")
milter.setconn(sys.argv[1])
milter.opensocket(True)
milter.main()
"""


def test_programs_on_the_extension_alone_forge_nothing_either(run_filter: Run) -> None:
    filter_ = run_filter(source=LOW_LEVEL)
    with filter_.mta() as mta:
        mta.send(b"X: a\r\n\r\n", recipients=["b@example.org"])
    filter_.wait_for("ValueError: from the application")
    assert filter_.stop() == 0
    assert r"ValueError: from the application\nERROR forged\x1b[2J" in filter_.output.split("\n")
