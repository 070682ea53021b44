"""The package's loggers. What they write forges no line, whatever mail put into it.

Exceptions of filters often quote the mail that they are about. In the text of one, of its notes,
its causes and the members of a group, control characters become visible before a handler sees
the record; the exception itself (``record.exc_info``) stays as it is.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Iterator, Sequence

from ._text import visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def logger(name: str = "milter") -> logging.Logger:
    """A logger of the package.

    Args:
        name: ``milter``, or one below it.
    """
    found = logging.getLogger(name)
    found.addFilter(_make_visible)  # only once, however often it is added
    return found


def _make_visible(record: logging.LogRecord) -> bool:
    """Change what the record says, where it is unfit for a log. Lets each record pass."""
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - of arguments that do not fit; handlers complain about them
        message = ""
    if visible(message) != message:
        record.msg, record.args = visible(message), None
    if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
        record.exc_text = _unless_fit(record.exc_info[1])
    return True


def _unless_fit(exception: BaseException) -> str | None:
    """The text of an exception where it has to be changed.

    Returns:
        None where there is nothing to change. Then handlers format it as they like.
    """
    try:
        shown = traceback.TracebackException(type(exception), exception, exception.__traceback__)
        before = "".join(shown.format())
        _harden(shown)
        after = "".join(shown.format())
        after = "\n".join(visible(line) for line in after.split("\n"))
    except Exception:  # noqa: BLE001 - memory, or an exception whose attributes fail
        return visible(f"{type(exception).__name__}: cannot be shown")
    return None if before == after else after.removesuffix("\n")


def _harden(shown: traceback.TracebackException) -> None:
    """Keep each piece of text from the program on one line, through the whole chain."""
    pending, seen = [shown], {id(shown)}
    while pending:
        one: Any = pending.pop()
        notes = getattr(one, "__notes__", None)
        if notes is not None:
            # As it is, a note begins a line of its own, which would look like any other of the log.
            listed = notes if isinstance(notes, Sequence) else [notes]
            one.__notes__ = [f"note: {_one_line(note)}" for note in listed]
        for frame in one.stack:
            frame.filename, frame.name = visible(frame.filename), visible(frame.name)
        one.format_exception_only = functools.partial(_lines, one.format_exception_only)
        for other in (one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())):
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                pending.append(other)


def _one_line(note: object) -> str:
    try:
        return visible(str(note))
    except Exception:  # noqa: BLE001 - as traceback itself says it of an exception
        return "<note str() failed>"


def _lines(format_exception_only: Any, *args: Any, **options: Any) -> Iterator[str]:
    """The lines that it gives, in each of which the line ends within are escaped."""
    for line in format_exception_only(*args, **options):
        yield visible(line.removesuffix("\n")) + "\n"
