"""What is wrong with a filter class, or looks so, before it serves: ``run --check``."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import Milter

from .._advice import code_of
from .._decorators import ERRORS_MARK
from .._later import within_our_decorators

if TYPE_CHECKING:
    from Milter import Base

#: How each callback is called: what stands in the call, and how it is written.
_CALLS: dict[str, tuple[int, bool, str]] = {
    "negotiate": (1, False, "self, opts"),
    "connect": (3, False, "self, hostname, family, hostaddr"),
    "hello": (1, False, "self, hostname"),
    "envfrom": (1, True, "self, sender, *params"),
    "envrcpt": (1, True, "self, recipient, *params"),
    "data": (0, False, "self"),
    "header": (2, False, "self, name, value"),
    "eoh": (0, False, "self"),
    "body": (1, False, "self, chunk"),
    "eom": (0, False, "self"),
    "abort": (0, False, "self"),
    "close": (0, False, "self"),
    "unknown": (1, False, "self, command"),
}
_BYTES = ("envfrom", "envrcpt", "header")

#: What the callbacks are called elsewhere: in libmilter, in SMTP, in other languages.
_OTHER_NAMES = {
    "helo": "hello",
    "ehlo": "hello",
    "mail": "envfrom",
    "mailfrom": "envfrom",
    "rcpt": "envrcpt",
    "rcptto": "envrcpt",
    "recipient": "envrcpt",
    "headers": "header",
    "endofheaders": "eoh",
    "endofheader": "eoh",
    "eod": "eom",
    "eob": "eom",
    "endofmessage": "eom",
    "endofdata": "eom",
    "endofbody": "eom",
    "disconnect": "close",
    "negotiation": "negotiate",
}

#: Methods that change a list, a dict or a set.
_CHANGES = frozenset(
    (
        *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem"),
        *("remove", "setdefault", "sort", "update", "write", "writelines"),
    )
)
_CONTAINERS = (list, dict, set, bytearray, io.StringIO, io.BytesIO)


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """Something to mend.

    :ivar file: where; empty where that is unknown.
    :ivar line: the same.
    :ivar is_error: whether mail would fail by it, rather than that it looks wrong.
    :ivar text: one line.
    """

    file: str
    line: int
    is_error: bool
    text: str

    def __str__(self) -> str:
        kind = "error" if self.is_error else "warning"
        return f"{self.file}:{self.line}: {kind}: {self.text}"


def inspect_filter(klass: type[Base]) -> list[Finding]:
    """Look at the methods of a filter class and of those that it inherits from.

    :param klass: the class.
    :returns: in the order of their places.
    """
    own = [each for each in klass.__mro__ if not _is_of_the_package(each)]
    used = _names_used(own)
    found: set[Finding] = set()
    for each in own:
        for name, value in vars(each).items():
            if _function(value) is not None:
                found.update(_of_method(klass, each, name, value, used))
        found.update(_of_state(each))
    return sorted(found)


def _is_of_the_package(klass: type) -> bool:
    return klass.__module__.partition(".")[0] in ("Milter", "milter", "builtins", "typing", "abc")


def _function(value: Any) -> FunctionType | None:
    inner = inspect.unwrap(getattr(value, "__func__", value))
    return inner if isinstance(inner, FunctionType) else None


def _names_used(classes: list[type]) -> set[str]:
    """The names that the classes' own code mentions: what it calls is no misspelt callback."""
    names: set[str] = set()
    for klass in classes:
        for value in vars(klass).values():
            code = code_of(value)
            names.update(code.co_names if code is not None else ())
    return names


def _finding(value: Any, is_error: bool, text: str) -> Finding:
    code = code_of(value)
    place = ("?", 0) if code is None else (code.co_filename, code.co_firstlineno)
    return Finding(*place, is_error, text)


# --- methods --------------------------------------------------------------------------------------


def _of_method(
    klass: type[Base], owner: type, name: str, value: Any, used: set[str]
) -> Iterator[Finding]:
    title = f"{owner.__name__}.{name}"
    callback = name[: -len("_bytes")] if name.endswith("_bytes") else name
    if callback in _CALLS and (name == callback or callback in _BYTES):
        yield from _of_arguments(title, callback, value, name)
        if callback == "negotiate" and inspect.iscoroutinefunction(_function(value)):
            yield _finding(
                value,
                True,
                f"{title} is async, but the MTA waits for its answer before all else: "
                "write it without async",
            )
        if _is_generator(value):
            yield _finding(
                value,
                True,
                f"{title} has a yield, so that calling it returns a generator and runs nothing of "
                "it: write it without yield",
            )
    elif not hasattr(Milter.Base, name) and name not in used:
        meant = _near(name)
        if meant is not None and not _has_own(klass, meant):
            yield _finding(
                value, False, f"{title} is no callback and is never called: did you mean {meant}?"
            )
    function = getattr(value, "__func__", value)
    if callback not in _BYTES and getattr(function, ERRORS_MARK, None) is not None:
        yield _finding(
            value, True, f"@decode on {title} does nothing: it is for envfrom, envrcpt and header"
        )


def _is_generator(value: Any) -> bool:
    """Whether calling a method runs nothing of it, as it has a ``yield``.

    What somebody else's decorator makes of a generator is not known. One that is marked by
    ``types.coroutine`` is to be awaited.
    """
    method = within_our_decorators(value)
    code = getattr(method, "__code__", None)
    return inspect.isasyncgenfunction(method) or (
        inspect.isgeneratorfunction(method)
        and code is not None
        and not code.co_flags & inspect.CO_ITERABLE_COROUTINE
    )


def _of_arguments(title: str, callback: str, value: Any, name: str) -> Iterator[Finding]:
    count, has_more, parameters = _CALLS[callback]
    try:
        signature = inspect.signature(getattr(value, "__func__", value))
    except (TypeError, ValueError):  # made in a way that cannot be looked into
        return
    attempts = [count, *([count + 1, count + 9] if has_more else [])]
    for attempt in attempts:
        try:
            signature.bind(*[None] * (attempt + (not isinstance(value, staticmethod))))
        except TypeError:
            times = f"{count} argument{'' if count == 1 else 's'}"
            more = " and any number of ESMTP parameters" if has_more else ""
            yield _finding(
                value,
                True,
                f"{title} cannot be called as it will be, with {times}{more}: "
                f"write def {name}({parameters})",
            )
            return


def _near(name: str) -> str | None:
    """The callback whose name was meant, or None."""
    plain = name.lower().replace("_", "")
    plain = plain[2:] if plain.startswith("on") and len(plain) > 4 else plain
    if plain in _CALLS and not name.startswith("_"):
        return plain
    if name.startswith("_"):
        return None
    if plain in _OTHER_NAMES:
        return _OTHER_NAMES[plain]
    # eon is near eom; with the length of get, no name is.
    found = difflib.get_close_matches(plain, _CALLS, 1, 0.8 if len(plain) > 3 else 0.6)
    return found[0] if found and abs(len(found[0]) - len(plain)) <= 1 else None


def _has_own(klass: type, name: str) -> bool:
    """Whether the class or one that it inherits from has this callback itself."""
    return any(
        form in vars(each)
        for each in klass.__mro__
        if not _is_of_the_package(each)
        for form in (name, f"{name}_bytes")
    )


# --- what belongs to a message -------------------------------------------------------------------


def _of_state(klass: type) -> Iterator[Finding]:
    """What callbacks change in the class, where all connections and messages share it."""
    try:
        lines, first = inspect.getsourcelines(klass)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        file = inspect.getsourcefile(klass) or "?"
    except (OSError, TypeError, SyntaxError):  # there is no source to look at
        return
    shared = {name for name, value in vars(klass).items() if isinstance(value, _CONTAINERS)}
    nodes = list(ast.walk(tree))
    own = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and _is_name(node.value, "self")
    }
    for node in nodes:
        name = _changed(node)
        if name in shared - own:
            yield Finding(
                file,
                first + node.lineno - 1,  # type: ignore[attr-defined]
                False,
                f"{klass.__name__}.{name} is changed by a method, but all connections and messages "
                f"share it, as it belongs to the class: set self.{name} in envfrom, which begins "
                "each message",
            )


def _changed(node: ast.AST) -> str | None:
    """The attribute of ``self`` whose value this changes in place."""
    target: ast.AST | None = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        target = node.func.value if node.func.attr in _CHANGES else None
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
        target = node.value
    if isinstance(target, ast.Attribute) and _is_name(target.value, "self"):
        return target.attr
    return None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
