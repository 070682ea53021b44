"""Functions of a filter, and asking those of one stage."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable

from .._later import close_awaitable
from ._decisions import Decision, Raised, as_decision, check_stage
from ._errors import STAGES
from ._mail import SPOOL_AT, Mail

OVERSIZE = ("reject", "tempfail", "accept", "truncate")

#: How many macros a list may name, as sendmail takes them (MAXFILTERMACROS).
_NOT_THE_MESSAGE = "it must take one argument, the message (Milter.mailfilter.Mail)"


@dataclass(frozen=True)
class Function:
    """A function, and what it needs."""

    call: Callable[[Mail], Any]
    name: str
    at: str = "eom"
    body: bool = True
    macros: tuple[str, ...] = ()
    max_body: int | None = None
    oversize: str = "reject"
    spool_at: int = SPOOL_AT

    @cached_property
    def is_async(self) -> bool:
        """Whether it is a coroutine function."""
        call: Any = self.call
        return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
            getattr(call, "__call__", None)  # noqa: B004 - the method that would be called
        )


def make(call: Any, options: dict[str, Any]) -> Function:
    """A function with checked options.

    Raises:
        TypeError: it is no function, or one that cannot be called with a message; or an option
            of another type.
        ValueError: an option that is none of those that there are.
    """
    if not callable(call) or isinstance(call, type):
        raise TypeError(f"filter: must be a function, not {call!r}")
    name = getattr(call, "__name__", type(call).__name__)
    if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise TypeError(
            f"filter: {name} is a generator function (yield): it must return a decision"
        )
    try:
        inspect.signature(call).bind(None)
    except TypeError as exc:
        raise TypeError(f"filter: {name}: {_NOT_THE_MESSAGE}: {exc}") from None
    except ValueError:
        pass  # a builtin without a signature
    _check_options(**options)
    macros = options.pop("macros")
    return Function(call, name, macros=tuple(macros or ()), **options)


def _check_options(
    at: str, body: bool, macros: Any, max_body: int | None, oversize: str, spool_at: int
) -> None:
    if at not in STAGES:
        raise ValueError(f"filter: at: must be one of {', '.join(STAGES)}: {at!r}")
    if not isinstance(body, bool):
        raise TypeError(f"filter: body: must be a bool, not {body!r}")
    if isinstance(macros, str):
        raise TypeError(f"filter: macros: must be a list of names, not a str: {macros!r}")
    for name in macros or ():
        if not isinstance(name, str) or not name.strip("{}") or " " in name:
            raise ValueError(f"filter: macros: must be names such as '{{client_ptr}}': {name!r}")
    if oversize not in OVERSIZE:
        raise ValueError(f"filter: oversize: must be one of {', '.join(OVERSIZE)}: {oversize!r}")
    for what, value in (("max_body", max_body), ("spool_at", spool_at)):
        if value is None and what == "max_body":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"filter: {what}: must be a number of bytes, not {value!r}")
        if value < 0:
            raise ValueError(f"filter: {what}: must not be negative: {value}")


def _taken(value: object, function: Function, stage: str) -> Decision | None:
    """What a function has returned, as a decision that its stage can carry."""
    if value is None:
        return None
    try:
        decision = as_decision(value, function.name)
    except TypeError:
        close_awaitable(value)  # a coroutine that a coroutine has returned
        raise
    if decision is not None:
        check_stage(decision, stage, function.name)
    return decision


def decide(functions: Sequence[Function], mail: Mail, stage: str) -> Decision | Asked | None:
    """Ask functions, one after the other, until one has a decision.

    Returns:
        The decision; or what is to be awaited for it, where a function has returned an awaitable.

    Raises:
        TypeError: one has returned what is no decision.
        ValueError: one has returned a decision that the stage cannot carry.
    """
    for number, function in enumerate(functions):
        mail._open(stage)
        try:
            result = function.call(mail)
            if inspect.isawaitable(result):
                return Asked(result, functions[number:], mail, stage)
        except Raised as exc:
            result = exc.decision
        except BaseException:
            mail._shut()
            raise
        mail._shut()
        decision = _taken(result, function, stage)
        if decision is not None:
            return decision
    return None


async def decide_async(
    functions: Sequence[Function], mail: Mail, stage: str, *, in_threads: bool = True
) -> Decision | None:
    """What `decide` does, where some of the functions are coroutine functions.

    Args:
        functions: see `decide`, like all others.
        mail: likewise.
        stage: likewise.
        in_threads: whether plain functions, which may take their time, are run beside the loop.
    """
    for function in functions:
        mail._open(stage)
        try:
            if in_threads and not function.is_async:
                result = await _call_in_thread(function, mail)
            else:
                result = function.call(mail)
            if inspect.isawaitable(result):
                result = await result
        except Raised as exc:
            result = exc.decision
        finally:
            mail._shut()
        decision = _taken(result, function, stage)
        if decision is not None:
            return decision
    return None


class Asked:
    """An awaitable: the decision of a plain function that has returned one, or of those after it.

    It is no coroutine, as one that is closed before it was begun would not close the other one.
    """

    __slots__ = ("_functions", "_mail", "_result", "_stage")

    def __init__(
        self, result: Awaitable[Any], functions: Sequence[Function], mail: Mail, stage: str
    ) -> None:
        """Go on where `decide` has to wait.

        Args:
            result: what the first function has returned.
            functions: this one and those after it.
            mail: see `decide`.
            stage: likewise.
        """
        self._result = result
        self._functions = functions
        self._mail = mail
        self._stage = stage

    def __await__(self) -> Generator[Any, None, Decision | None]:
        """Wait for the decision."""
        return self.wait().__await__()

    async def wait(self, *, in_threads: bool = True) -> Decision | None:
        """The same, as `decide_async` does it."""
        try:
            result: Any = await self._result
        except Raised as exc:
            result = exc.decision
        finally:
            self._mail._shut()
        decision = _taken(result, self._functions[0], self._stage)
        if decision is not None:
            return decision
        rest = self._functions[1:]
        return await decide_async(rest, self._mail, self._stage, in_threads=in_threads)

    def close(self) -> None:
        """It will not be awaited."""
        close_awaitable(self._result)
        self._mail._shut()


# --- plain functions beside a loop ---------------------------------------------------------------


async def _call_in_thread(function: Function, mail: Mail) -> Any:
    """Call a plain function, which may block, in a thread of its own.

    One of an executor would hold up others, once all are busy, and the end of the process. The
    function has the variables of the connection (``contextvars``). Where this is cancelled,
    the function goes on to its end, as in a thread of the engine; but it changes nothing any more.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    variables = contextvars.copy_context()
    call = _Call(function.call)

    def run() -> None:
        variables.run(call.run, mail)
        mail._in_use = False
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(_settle, done)

    mail._in_use = True
    try:
        threading.Thread(target=run, name="milter-function", daemon=True).start()
    except BaseException:
        mail._in_use = False
        raise
    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError as error:
            mail._shut()
            cancelled = error
    try:
        if cancelled is not None and (call.error is None or isinstance(call.error, Exception)):
            close_awaitable(call.result)
            raise cancelled
        if call.error is not None:
            raise call.error
    finally:  # no circle of an exception and its frame shall be left for the garbage collector
        cancelled = call.error = None
    _take_over(variables)
    return call.result


class _Call:
    """A call of a function, and what became of it."""

    __slots__ = ("_function", "error", "result")

    def __init__(self, function: Callable[[Mail], Any]) -> None:
        self._function = function
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self, mail: Mail) -> None:
        try:
            self.result = self._function(mail)
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            self.error = error


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _take_over(variables: contextvars.Context) -> None:
    """Have here what was set in a copy of the context."""
    for variable, value in variables.items():
        if variable.get(_take_over) is not value:
            variable.set(value)
