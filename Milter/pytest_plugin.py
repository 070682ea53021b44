"""Test filters with pytest: they run as processes and are asked as an MTA would ask them.

``pip install 'pymilter[test]'`` is all it takes, pytest finds the plugin by itself::

    import Milter, pytest
    from Milter.mta import Verdict

    class Hello(Milter.Base):
        def eom(self):
            self.addheader("X-Hello", "world")
            return Milter.CONTINUE

    @pytest.mark.milter_app(filter=Hello)
    def test_hello(mta):
        result = mta.send(b"Subject: hi\\r\\n\\r\\nA body.\\r\\n", recipients=["bob@example.org"])
        assert result.verdict is Verdict.CONTINUE
        assert result.message["X-Hello"] == "world"

Fixtures: ``milter_app`` starts filters, ``mta`` is a connection to one. With the option
``--milter-in-process`` classes and functions run in pytest's own process, where a debugger and
coverage see them. Where a test fails, its
report has what the filter wrote and what it did to the messages; comparisons of messages and
modifications show where they differ.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Callable

import pytest

from . import _app
from ._app import MilterApp

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .mta import MTA, Message, Modification, Result

__all__ = ["MilterApp", "changes", "milter_app", "mta"]

_MARKER = (
    "milter_app(*arguments, filter, **options): the filter that the fixture `mta` starts and "
    "connects to; the arguments are those of the fixture `milter_app`"
)

#: Attribute of a test: whether one of its phases has failed.
_FAILED = "_milter_failed"

_MAX_SHOWN = 2000  # bytes of a body in a description


# --- fixtures ------------------------------------------------------------------------------------


class _Apps:
    """What the fixture ``milter_app`` gives: starts filters when it is called.

    Args:
        in_process: whether filters run in this process where they can and nothing else is said.
    """

    def __init__(self, in_process: bool) -> None:
        self.started: list[MilterApp] = []
        self._in_process = in_process

    def __call__(
        self,
        filter: _app.FilterLike,
        *arguments: str,
        in_process: bool | None = None,
        **options: Any,
    ) -> MilterApp:
        """Start a filter; see ``MilterApp``."""
        if in_process is None:
            in_process = self._in_process and _can_be_in_process(filter, arguments, options)
        if in_process:
            self.started.append(_start_in_process(filter, arguments, options))
        else:
            self.started.append(MilterApp(filter, *arguments, **options))
        return self.started[-1]


def _can_be_in_process(
    filter: _app.FilterLike, arguments: Sequence[str], options: dict[str, Any]
) -> bool:
    from ._inprocess import InProcessApp, can_serve

    is_plain = not arguments and set(options) <= {"socket", "timeout"}
    return is_plain and can_serve(filter) and InProcessApp.serving is None


def _start_in_process(
    filter: _app.FilterLike, arguments: Sequence[str], options: dict[str, Any]
) -> MilterApp:
    from ._inprocess import InProcessApp

    others = sorted(set(options) - {"socket", "timeout"})
    if arguments or others:
        what = ", ".join([*map(repr, arguments), *(f"{name}=" for name in others)])
        raise ValueError(f"in_process: {what}: is for a filter that is a process of its own")
    return InProcessApp(filter, **options)


@pytest.fixture
def milter_app(request: pytest.FixtureRequest) -> Iterator[Callable[..., MilterApp]]:
    """Starts filters as processes; call it with the arguments of Milter.pytest_plugin.MilterApp.

    milter_app(Hello), milter_app("hello:Hello", "--workers", "2"), milter_app("hello.py").
    They are stopped at the end of the test, which fails where one does not end as it should.

    With in_process=True, or pytest's option --milter-in-process, a class or function runs in a
    thread of this process, on the engine native. That is for debuggers and coverage: one at a
    time, without options of its own, and its MTA waits an hour for each answer. With the option,
    a filter that cannot run so is a process as ever.
    """
    apps = _Apps(request.config.getoption("milter_in_process"))
    yield apps
    errors = []
    for app in apps.started:
        try:
            app.finish()
        except (RuntimeError, TimeoutError) as exc:
            errors.append(str(exc))
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)


@pytest.fixture
def mta(request: pytest.FixtureRequest, milter_app: Callable[..., MilterApp]) -> Iterator[MTA]:
    """A connection (Milter.mta.MTA) to the filter of the marker milter_app.

    Without the marker, to the last filter that other fixtures have started by milter_app.
    pytest takes a class that stands alone in a marker for what is to be marked, so name it:
    @pytest.mark.milter_app(filter=Hello).

    At the end of a test that has not failed it says QUIT, and the filter must say nothing more.
    """
    assert isinstance(milter_app, _Apps)
    marker = request.node.get_closest_marker("milter_app")
    if marker is not None and (marker.args or marker.kwargs):
        options = dict(marker.kwargs)
        first = [options.pop("filter")] if "filter" in options else []
        app = milter_app(*first, *marker.args, **options)
    elif milter_app.started:
        app = milter_app.started[-1]
    else:
        pytest.fail(
            "the fixture mta needs a filter: mark the test with "
            "@pytest.mark.milter_app(filter=Class), or have a fixture before it start one "
            "by milter_app",
            pytrace=False,
        )
    connection = app.mta()
    try:
        yield connection
        if not getattr(request.node, _FAILED, False) and connection.is_open:
            connection.quit()
    finally:
        connection.close()


# --- hooks ---------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that has filters run in this process."""
    parser.getgroup("milter").addoption(
        "--milter-in-process",
        action="store_true",
        help="run filters in this process where they can be, for debuggers and coverage",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _MARKER)


# The old form of a wrapper, which every pytest knows.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to the report of a failure what the filters wrote and did."""
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed:
        return
    setattr(item, _FAILED, True)
    for app in _app.running:
        done = "\n\n".join("\n".join(changes(result)) for result in app.results)
        for title, text in (("What the filter did", done), ("Output of the filter", app.output)):
            if text:
                report.sections.append((f"{title} {app.name}", text))


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Say what was meant where the marker has marked the filter in place of a test."""
    outcome: Any = yield
    report = outcome.get_result()
    if not isinstance(collector, pytest.Module):
        return
    marked = [name for scope in _scopes(collector, report) for name in _marked_filters(scope)]
    if marked:
        report.outcome = "failed"
        report.longrepr = "\n".join(
            f"@pytest.mark.milter_app({name}) marks {name} itself, and no test: "
            f"name it, @pytest.mark.milter_app(filter={name})"
            for name in dict.fromkeys(marked)
        )


def _scopes(module: pytest.Module, report: pytest.CollectReport) -> list[dict[str, Any]]:
    """What a module defines; where its import fails, as far as that went."""
    if report.passed:
        return [vars(module.obj)]
    excinfo = getattr(getattr(report, "call", None), "excinfo", None)
    entries = () if excinfo is None else excinfo.traceback
    return [each.frame.f_globals for each in entries if each.frame.code.name == "<module>"]


def _marked_filters(scope: dict[str, Any]) -> Iterator[str]:
    """The names of filters that bear the marker, which then has no arguments."""
    for name, value in list(scope.items()):
        marks = getattr(value, "__dict__", {}).get("pytestmark", ())
        if not isinstance(marks, list) or name.startswith(("test", "Test", "pytestmark")):
            continue
        for mark in marks:
            if getattr(mark, "name", "") == "milter_app" and not (mark.args or mark.kwargs):
                yield name


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Explain comparisons of what ``Milter.mta`` gives."""
    if "Milter.mta" not in sys.modules:
        return None
    from . import mta as _mta

    if op == "in" and isinstance(right, _mta.Message):
        return [f"no header {left!r} in the message:", *_message_lines(right, body=False)]
    if op != "==":
        return None
    if isinstance(left, _mta.Result) and isinstance(right, _mta.Result):
        return ["the results differ:", *_difference(_result_lines(left), _result_lines(right))]
    if isinstance(left, _mta.Message) and isinstance(right, _mta.Message):
        return ["the messages differ:", *_difference(_message_lines(left), _message_lines(right))]
    if isinstance(left, _mta.SmtpReply) and isinstance(right, _mta.SmtpReply):
        return ["the SMTP replies differ:", *_difference(_lines(left), _lines(right))]
    if _are_parts(left, right):
        assert isinstance(left, (list, tuple)) and isinstance(right, (list, tuple))
        difference = _difference(list(map(_describe, left)), list(map(_describe, right)))
        return ["what was done (-) differs from what was expected (+):", *difference]
    return None


# --- descriptions --------------------------------------------------------------------------------


def changes(result: Result) -> list[str]:
    """Say in lines of text what a filter did with a message.

    Args:
        result: what ``MTA.send`` returned.

    Returns:
        The verdict with its stage and SMTP reply, then a line for each change. Headers that came
        and went have ``+`` and ``-`` before them; the envelope, the quarantine and the new body
        follow.
        A message that is not accepted stays as it was.
    """
    lines = [f"{result.verdict.name} at {result.stage}"]
    if result.smtp is not None:
        lines += [f"  {line}" for line in str(result.smtp).split("\n")]
    for refused in result.refused:
        lines.append(f"recipient refused: {refused.recipient}")
        if refused.reply.smtp is not None:
            lines += [f"  {line}" for line in str(refused.reply.smtp).split("\n")]
    if not result.accepted:
        return lines
    for edit in result.header_edits:
        if edit.before != edit.after:
            lines += [f"- {line}" for line in _header_lines(edit.before)]
            lines += [f"+ {line}" for line in _header_lines(edit.after)]
    lines += filter(None, map(_other_change, result.modifications))
    if result.body_replaced:
        lines.append("new body:")
        lines += [f"+ {line}" for line in _body_lines(result.message.body)]
    return lines


def _other_change(modification: Modification) -> str:
    """A line on a change of something else than headers and body."""
    kind = type(modification).__name__
    text = _describe(modification)
    return "" if kind.endswith("Header") or kind == "ReplaceBody" else text


def _describe(part: object) -> str:
    """One line on one thing that a filter did, or on a part of a message."""
    from . import mta as _mta

    if isinstance(part, _mta.AddHeader):
        return f"add header {_text(part.name)}: {_text(part.value)}"
    if isinstance(part, _mta.InsertHeader):
        return f"insert header at {part.index} {_text(part.name)}: {_text(part.value)}"
    if isinstance(part, _mta.ChangeHeader):
        if not part.value:
            return f"delete header {part.index} {_text(part.name)}"
        return f"change header {part.index} {_text(part.name)}: {_text(part.value)}"
    if isinstance(part, _mta.AddRecipient):
        return f"add recipient {part.address}" + (f" {part.params}" if part.params else "")
    if isinstance(part, _mta.DeleteRecipient):
        return f"delete recipient {part.address}"
    if isinstance(part, _mta.ChangeSender):
        return f"change sender to {part.address}" + (f" {part.params}" if part.params else "")
    if isinstance(part, _mta.ReplaceBody):
        return f"replace body with {part.chunk!r}"
    if isinstance(part, _mta.Quarantine):
        return f"quarantine: {part.reason}"
    if isinstance(part, _mta.Header):
        return _text(bytes(part))
    return str(part) if isinstance(part, _mta.Address) else repr(part)


def _are_parts(left: object, right: object) -> bool:
    """Whether these are sequences of one type that hold parts of a message or modifications."""
    from . import mta as _mta

    known = (
        _mta.AddHeader,
        _mta.InsertHeader,
        _mta.ChangeHeader,
        _mta.AddRecipient,
        _mta.DeleteRecipient,
        _mta.ChangeSender,
        _mta.ReplaceBody,
        _mta.Quarantine,
        _mta.Header,
        _mta.Address,
    )
    if type(left) is not type(right) or not isinstance(left, (list, tuple)):
        return False
    assert isinstance(right, (list, tuple))
    return any(isinstance(part, known) for part in (*left, *right))


def _result_lines(result: Result) -> list[str]:
    return [
        *changes(result),
        f"sender: {result.sender}",
        *(f"recipient: {recipient}" for recipient in result.recipients),
        *_message_lines(result.message),
    ]


def _message_lines(message: Message, body: bool = True) -> list[str]:
    lines = [line for header in message.headers for line in _header_lines(header)]
    return [*lines, "", *_body_lines(message.body)] if body else lines


def _header_lines(header: object) -> list[str]:
    """The lines of one header, none for None."""
    return [] if header is None else _describe(header).split("\n")


def _body_lines(body: bytes) -> list[str]:
    lines = _text(body[:_MAX_SHOWN].replace(b"\r\n", b"\n")).split("\n")
    if lines[-1] == "":
        lines.pop()
    if len(body) > _MAX_SHOWN:
        lines.append(f"[... {len(body)} bytes in all]")
    return lines


def _lines(value: object) -> list[str]:
    return str(value).split("\n")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace").replace("\r", "\\r")


def _difference(left: Sequence[str], right: Iterable[str]) -> list[str]:
    """``-`` before lines that are only on the left, ``+`` on the right, and what is around them."""
    import difflib

    lines = [line for line in difflib.ndiff(left, list(right)) if not line.startswith("?")]
    changed = [number for number, line in enumerate(lines) if line[:2] != "  "]
    near = {number + step for number in changed for step in (-1, 0, 1)}
    shown: list[str] = []
    for number, line in enumerate(lines):
        if number in near:
            shown.append(line)
        elif not shown or shown[-1] != "  ...":
            shown.append("  ...")
    return shown
