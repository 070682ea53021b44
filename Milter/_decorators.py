"""Decorators that say what a filter wants from the MTA.

They only mark functions and classes. ``Base.protocol_mask`` and ``Base.negotiate``
read the marks when the MTA makes its offer.
"""

from __future__ import annotations

import codecs
import functools

from milter import CONTINUE, NOREPLY, P_HDR_LEADSPC, P_RCPT_REJ

import Milter

from ._later import Later, is_awaitable
from ._protocol import MACRO_CALLBACKS, MAX_MACROS, OPTIONAL_CALLBACKS

#: Attribute of a callback: the protocol steps (P_NR_* and P_NO*) that it asks for.
STEPS_MARK = "milter_protocol"
#: Attribute of a callback: the macros that it wants to be sent, as a tuple of names.
MACROS_MARK = "_symlist"
#: Attribute of a callback: how its text is decoded; the extension reads it too.
ERRORS_MARK = "error_strategy"
#: Attribute of a class: the protocol steps turned on for it by enable_protocols.
ENABLED_MARK = "_enabled_protocols"

#: Strategies of ``decode`` that are no codec error handler of that name's meaning.
SPECIAL_STRATEGIES = frozenset({"bytes", "strict"})

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])
    C = TypeVar("C", bound=type)


def callback_of(method: str) -> str:
    """The callback that a method belongs to: itself, or the text form of ``*_bytes``."""
    return method[: -len("_bytes")] if method.endswith("_bytes") else method


def _plain(func: Any) -> Any:
    """The function inside a staticmethod or classmethod, or the function itself."""
    return getattr(func, "__func__", func)


def _name_of(func: Any, decorator: str) -> str:
    name = getattr(_plain(func), "__name__", None)
    if not isinstance(name, str):
        raise ValueError(f"@{decorator} needs a named method, not {func!r}")
    return name


def _steps_of(func: Any, decorator: str) -> tuple[int, int]:
    name = _name_of(func, decorator)
    try:
        return OPTIONAL_CALLBACKS[callback_of(name)]
    except KeyError:
        optional = ", ".join(OPTIONAL_CALLBACKS)
        raise ValueError(
            f"@{decorator} applied to non-optional method: {name} (optional are {optional})"
        ) from None


def _caller(func: Any) -> Callable[..., Any]:
    """A plain function that calls a method as an attribute lookup would."""
    if not isinstance(func, (staticmethod, classmethod)):
        return func  # type: ignore[no-any-return]

    @functools.wraps(func.__func__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return func.__get__(self, type(self))(*args, **kwargs)

    return call


def _mark_steps(wrapper: Any, func: Any, steps: int) -> None:
    """Add steps to those of the function that is being wrapped."""
    setattr(wrapper, STEPS_MARK, getattr(func, STEPS_MARK, 0) | steps)


def _bad_return(name: str, decorator: str, verdict: object) -> RuntimeError:
    return RuntimeError(
        f"{name} return code must be CONTINUE with @{decorator}, but is {verdict!r}"
    )


def nocallback(func: F) -> F:
    """Turn an optional callback off.

    Where the MTA can, it does not send this step at all, which saves a round trip.
    Base turns every optional callback off and overriding one turns it on; use this
    to turn off again what a base class handles. The method must still return
    CONTINUE: an MTA that cannot leave the step out calls it.

    Args:
        func: one of the methods in ``OPTIONAL_CALLBACKS``.

    Raises:
        ValueError: the method is no optional callback.
        RuntimeError: when it is called, and returns anything but CONTINUE.
    """
    _, no_callback = _steps_of(func, "nocallback")
    call, name = _caller(func), _name_of(func, "nocallback")

    @functools.wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        verdict = call(self, *args, **kwargs)
        if is_awaitable(verdict):
            return Later(verdict, check)
        return check(verdict)

    def check(verdict: object) -> int:
        if verdict != CONTINUE:
            raise _bad_return(name, "nocallback", verdict)
        return CONTINUE

    _mark_steps(checked, call, no_callback)
    return checked  # type: ignore[return-value]


def noreply(func: F) -> F:
    """Let the MTA go on without waiting for the reply of an optional callback.

    Where that was negotiated, the callback must return CONTINUE and the MTA gets
    NOREPLY; elsewhere its result passes through unchanged.

    Args:
        func: one of the methods in ``OPTIONAL_CALLBACKS``.

    Raises:
        ValueError: the method is no optional callback.
        RuntimeError: when it is called where its reply was negotiated away, and
            returns anything but CONTINUE (or, from ``super()``, NOREPLY).
    """
    no_reply, _ = _steps_of(func, "noreply")
    call, name = _caller(func), _name_of(func, "noreply")

    @functools.wraps(call)
    def silent(self: Any, *args: Any, **kwargs: Any) -> Any:
        verdict = call(self, *args, **kwargs)
        if not self._protocol & no_reply:
            return verdict
        if is_awaitable(verdict):
            return Later(verdict, check)
        return check(verdict)

    def check(verdict: object) -> int:
        # A @noreply method that ends in super() has been through here already.
        if verdict not in (CONTINUE, NOREPLY):
            raise _bad_return(name, "noreply", verdict)
        return NOREPLY

    _mark_steps(silent, call, no_reply)
    return silent  # type: ignore[return-value]


def decode(strategy: str) -> Callable[[F], F]:
    """Choose how the text of ``envfrom``, ``envrcpt`` or ``header`` is decoded.

    What arrives is decoded as UTF-8; the strategy is for bytes that are not UTF-8,
    which real mail often has. Without this decorator it is ``surrogateescape``, which
    keeps every byte (``text.encode(errors="surrogateescape")`` gives them back).

    Args:
        strategy: ``"bytes"``: no decoding, the method gets bytes;
            ``"strict"``: str, but bytes where the value is not UTF-8 (in the envelope all
            values are bytes if any one of them is not UTF-8);
            ``"ignore"``, ``"replace"``, ``"backslashreplace"`` or any other error handler
            that ``codecs`` knows.

    Raises:
        ValueError: there is no such strategy or error handler.
    """
    if strategy not in SPECIAL_STRATEGIES:
        try:
            codecs.lookup_error(strategy)
        except (LookupError, TypeError):
            raise ValueError(
                f"@decode({strategy!r}): neither 'bytes', 'strict' nor a codec error handler"
            ) from None

    def mark(func: F) -> F:
        setattr(_plain(func), ERRORS_MARK, strategy)
        return func

    return mark


def symlist(*syms: str) -> Callable[[F], F]:
    """Name the only macros that the MTA shall send for a callback.

    Without it the MTA sends what its own configuration lists for that stage. The list is
    sent at negotiation, to an MTA that offers SETSYMLIST; several lists for one callback
    are merged.

    Args:
        syms: up to five names, with braces where they are longer than one letter:
            ``@symlist("i", "{auth_authen}")``. None at all asks for no macros.

    Raises:
        ValueError: more than five macros, or the method is none of ``MACRO_CALLBACKS``.
    """

    def mark(func: F) -> F:
        name = _name_of(func, "symlist")
        if callback_of(name) not in MACRO_CALLBACKS:
            stages = ", ".join(MACRO_CALLBACKS)
            raise ValueError(
                f"@symlist applied to non-symlist method: {name} (macro stages are {stages})"
            )
        plain = _plain(func)
        merged = tuple(dict.fromkeys((*getattr(plain, MACROS_MARK, ()), *syms)))
        if len(merged) > MAX_MACROS:
            raise ValueError(
                f"@symlist limited to {MAX_MACROS} macros by MTA: {name} lists {len(merged)}"
            )
        setattr(plain, MACROS_MARK, merged)
        return func

    return mark


def _forget_masks(klass: type) -> None:
    """Drop the cached masks of a class and of all that inherit from it."""
    if "_protocol_mask" in vars(klass):
        del klass._protocol_mask  # type: ignore[attr-defined]
    child: type
    for child in klass.__subclasses__():
        _forget_masks(child)


def enable_protocols(klass: C, mask: int) -> C:
    """Ask for optional protocol steps in all connections of a filter class.

    P_SKIP is asked for without this. What the MTA agreed to is in ``self._protocol``.

    Args:
        klass: the filter class, or a mixin for one. Subclasses inherit the steps.
        mask: steps to ask for, such as ``P_RCPT_REJ | P_HDR_LEADSPC``.

    Returns:
        The class, so that it can be used as the last line of a class decorator.
    """
    setattr(klass, ENABLED_MARK, vars(klass).get(ENABLED_MARK, 0) | mask)
    _forget_masks(klass)
    if hasattr(klass, "protocol_mask"):
        klass.protocol_mask()
    return klass


def rejected_recipients(klass: C) -> C:
    """Class decorator: see recipients too that the MTA has rejected already (P_RCPT_REJ).

    ``envrcpt`` recognises them by the macro ``{rcpt_mailer}``, which is then ``error``.

    Args:
        klass: the filter class.

    Returns:
        The class.
    """
    return Milter.enable_protocols(klass, P_RCPT_REJ)


def header_leading_space(klass: C) -> C:
    """Class decorator: get and send header values with their leading space (P_HDR_LEADSPC).

    Without it the MTA takes one space away from the start of each value that ``header``
    gets, and puts one before each value that the filter adds or changes. With it, values
    pass exactly as they stand in the message.

    Args:
        klass: the filter class.

    Returns:
        The class.
    """
    return Milter.enable_protocols(klass, P_HDR_LEADSPC)
