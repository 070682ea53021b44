"""Functions of a filter, and asking those of one stage."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

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

    @property
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
    decision = as_decision(value, function.name)
    if decision is not None:
        check_stage(decision, stage, function.name)
    return decision


def decide(functions: Sequence[Function], mail: Mail, stage: str) -> Decision | None:
    """Ask functions, one after the other, until one has a decision.

    Raises:
        TypeError: one has returned what is no decision.
        ValueError: one has returned a decision that the stage cannot carry.
    """
    for function in functions:
        mail._open(stage)
        try:
            result = function.call(mail)
        except Raised as exc:
            result = exc.decision
        finally:
            mail._shut()
        decision = _taken(result, function, stage)
        if decision is not None:
            return decision
    return None


async def decide_async(functions: Sequence[Function], mail: Mail, stage: str) -> Decision | None:
    """What `decide` does, where some of the functions are coroutine functions."""
    for function in functions:
        mail._open(stage)
        try:
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
