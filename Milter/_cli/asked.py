"""What a filter class asks an MTA for, as comments and macros of its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .. import _base
from .._decorators import MACROS_MARK
from .._protocol import MACRO_CALLBACKS, OPTIONAL_CALLBACKS

if TYPE_CHECKING:
    from Milter import Base


def asked_for(mark: str, klass: type[Base] | None) -> Iterator[str]:
    """Comments that say which callbacks and macros a class asks for."""
    if klass is None:
        return
    steps = _base.callback_steps(klass)
    used = [name for name, (_, off) in OPTIONAL_CALLBACKS.items() if not steps & off]
    yield f"{mark} Callbacks: {' '.join([*used, 'eom'])}"
    for callback in MACRO_CALLBACKS:
        macros = wanted_macros(klass, callback)
        if macros is not None:
            yield f"{mark} Macros for {callback}: {' '.join(macros) or 'none'}"


def wanted_macros(klass: type[Base], callback: str) -> tuple[str, ...] | None:
    """What ``@symlist`` names for a callback of a class; None where it has none."""
    found: tuple[str, ...] | None = None
    for name in (callback, f"{callback}_bytes"):
        marked = getattr(getattr(klass, name, None), MACROS_MARK, None)
        found = found if marked is None else marked
    return found


def missing_macros(klass: type[Base] | None, callback: str, default: str) -> list[str]:
    """The macros that the MTA does not send by default, in its notation."""
    wanted = wanted_macros(klass, callback) if klass is not None else None
    names = [name if len(name) == 1 else f"{{{name.strip('{}')}}}" for name in wanted or ()]
    return [name for name in dict.fromkeys(names) if name not in default.split()]
