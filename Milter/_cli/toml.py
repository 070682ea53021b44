"""TOML files, which Python reads by itself from 3.11 on, and files whose keys are checked."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from typing import Any

from .._extras import unusable
from .common import CommandError

#: Python's own from 3.11 on, and before that the one that it was made of.
_LIBRARY = "tomllib" if sys.version_info >= (3, 11) else "tomli"


def _toml(needed_by: str) -> Any:
    try:
        return importlib.import_module(_LIBRARY)
    except ImportError as exc:
        hint = "Python reads TOML by itself from 3.11 on"
        raise CommandError(str(unusable(needed_by, "tomli", _LIBRARY, exc, hint))) from None


def read_text(option: str, path: str) -> str:
    """The text of a file that an option names.

    :raises CommandError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as exc:
        raise CommandError(f"{option} {path}: {exc.strerror}") from None
    except UnicodeDecodeError as exc:
        raise CommandError(f"{option} {path}: not in UTF-8: {exc}") from None


def parse(option: str, path: str, text: str) -> dict[str, Any]:
    """The tables of a TOML file.

    :raises CommandError: it is none, or the library is missing.
    """
    library = _toml(f"{option} {path}")
    try:
        found: dict[str, Any] = library.loads(text)
    except library.TOMLDecodeError as exc:
        raise CommandError(f"{option} {path}: not TOML: {exc}") from None
    return found


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What is to be said of a key that nobody knows, with the nearest that somebody does."""
    names = list(known)
    near = difflib.get_close_matches(key.replace("_", "-"), names, 1, 0.6)
    if not near:
        near = difflib.get_close_matches(key, names, 1, 0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}"
    return f"unknown key {key!r}: {hint}"


def kind_of(value: object) -> str:
    """What a value is called in TOML."""
    if isinstance(value, bool):
        return "a boolean"
    names = (
        (str, "a string"),
        (int, "an integer"),
        (float, "a float"),
        (list, "a list"),
        (dict, "a table"),
    )
    return next((name for each, name in names if isinstance(value, each)), "a date or a time")
