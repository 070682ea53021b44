"""What an error in a callback is said to be, beyond its traceback. The extension asks."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, TracebackType
    from typing import Any

#: The methods whose name is not that of the stage.
_METHODS = {"helo": "hello"}


def code_of(method: Any) -> CodeType | None:
    """The code of a function or method, within its decorators; None where it has none."""
    *_, innermost = layers_of(method)
    code: CodeType | None = getattr(innermost, "__code__", None)
    return code


def layers_of(method: Any) -> Iterator[Any]:
    """A method, and what its decorators have wrapped, from the outside to the inside."""
    for _ in range(100):  # no chain of decorators is longer; a circle is
        method = getattr(method, "__func__", method)
        yield method
        method = getattr(method, "__wrapped__", None)
        if method is None:
            break


def place_of(exception: BaseException, filter_object: object, stage: str) -> str:
    """Where the method is that was called with a number of arguments that it does not take.

    The traceback of such a TypeError does not say, as the method never began.

    Args:
        exception: what calling it raised.
        filter_object: whose method it is.
        stage: the extension's name of the callback.

    Returns:
        The place, to stand after a sentence; an empty text for other exceptions.
    """
    if not isinstance(exception, TypeError) or "argument" not in str(exception):
        return ""
    name = _METHODS.get(stage, stage)
    for each in (name, f"{name}_bytes"):
        code = code_of(getattr(filter_object, each, None))
        if code is None or f"{code.co_name}()" not in str(exception):
            continue
        if _has_begun(exception.__traceback__, code):
            return ""
        return (
            f"; {type(filter_object).__name__}.{each} is defined in "
            f"{code.co_filename}, line {code.co_firstlineno}"
        )
    return ""


def _has_begun(traceback: TracebackType | None, code: CodeType) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_code is code:
            return True
        traceback = traceback.tb_next
    return False
