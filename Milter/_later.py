"""What a callback has returned to be awaited, with something that is done to the result."""

from __future__ import annotations

import contextlib
from types import GeneratorType

from ._advice import layers_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Awaitable, Callable, Generator
    from typing import Any

    LoopFactory = Callable[[], AbstractEventLoop]

# inspect.CO_COROUTINE, for which inspect would take a megabyte, and CO_ITERABLE_COROUTINE: what
# types.coroutine makes of a generator.
_CO_COROUTINE, _CO_ITERABLE_COROUTINE = 0x80, 0x100

_DECORATORS = f"{__package__}._decorators"

#: What makes the loop that has a thread of its own; kept here, as most filters need no asyncio.
loop_factory: LoopFactory | None = None


def set_loop_factory(factory: LoopFactory | None) -> None:
    """Say what makes the loop that has a thread of its own; None is asyncio's.

    Raises:
        TypeError: it cannot be called.
    """
    global loop_factory
    if factory is not None and not callable(factory):
        raise TypeError(f"loop_factory must be callable or None, not {type(factory).__name__}")
    loop_factory = factory


def close_awaitable(awaitable: object) -> None:
    """It will not be awaited, and need not complain of that.

    Args:
        awaitable: a coroutine, or what else can be awaited; only where it can be closed.
    """
    with contextlib.suppress(Exception):  # it has no such method, or will not be closed
        awaitable.close()  # type: ignore[attr-defined]


def is_awaitable(result: object) -> bool:
    """Whether a callback's result is no verdict but something to be awaited."""
    return type(result) is not int and (hasattr(result, "__await__") or _is_generator(result))


def _is_generator(result: object) -> bool:
    """Whether it is one that ``types.coroutine`` lets be awaited."""
    return type(result) is GeneratorType and bool(result.gi_code.co_flags & _CO_ITERABLE_COROUTINE)


def _returns_coroutine(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and bool(code.co_flags & (_CO_COROUTINE | _CO_ITERABLE_COROUTINE))


def is_coroutine(method: Any) -> bool:
    """Whether a method is ``async def``, or has to do with one that is, within decorators."""
    return any(_returns_coroutine(layer) for layer in layers_of(method))


def only_makes_coroutine(method: Any) -> bool:
    """Whether calling a method runs nothing of the application's, as the coroutine does it all.

    What another one's decorator does may take its time, such as waiting for the coroutine.
    """
    return _returns_coroutine(within_our_decorators(method))


def within_our_decorators(method: Any) -> Any:
    """The function that the decorators of ``Milter`` call, be it the method itself."""
    for layer in layers_of(method):
        if getattr(layer, "__globals__", {}).get("__name__") != _DECORATORS:
            return layer
    return None


class Later:
    """An awaitable around another one.

    It is no coroutine, as one that is closed before it was begun would not close the other one.

    Attributes:
        awaitable: the other one.
    """

    __slots__ = ("_check", "_last", "awaitable")

    def __init__(
        self,
        awaitable: Awaitable[Any],
        check: Callable[[Any], int] | None = None,
        last: Callable[[], object] | None = None,
    ) -> None:
        """Wrap an awaitable.

        Args:
            awaitable: what is awaited.
            check: gets its result, and returns what is the result then, or raises.
            last: called at the end in any case, also where nothing is awaited at all.
        """
        self.awaitable = awaitable
        self._check = check
        self._last = last

    def __await__(self) -> Generator[Any, None, int]:
        """Await the other one."""
        try:
            awaitable: Any = self.awaitable
            if not _is_generator(awaitable):
                awaitable = awaitable.__await__()
            result: int = yield from awaitable
            return result if self._check is None else self._check(result)
        finally:
            if self._last is not None:
                self._last()

    def close(self) -> None:
        """It will not be awaited."""
        close_awaitable(self.awaitable)
        if self._last is not None:
            self._last()
