"""``run --config``: a TOML file for the options, before which the command line goes."""

from __future__ import annotations

import argparse
from typing import Any

from . import toml
from .common import CommandError

#: Which options stand on the command line alone.
_NOT_IN_A_FILE = ("help", "check", "config")


def apply_file(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set what the command line leaves open, which is None in *args*, as the file says.

    :param parser: of the command.
    :param args: what the command line says, changed in place.
    :raises CommandError: the file cannot be read, or a key or a value is none.
    """
    path = args.config
    options = {_key(action): action for action in parser._actions if _is_in_a_file(action)}
    for key, value in toml.parse("--config", path, toml.read_text("--config", path)).items():
        action = options.get(key)
        if key in _NOT_IN_A_FILE:
            raise CommandError(f"--config {path}: {key}: is for the command line alone")
        if action is None:
            raise CommandError(f"--config {path}: {toml.unknown_key(key, options)}")
        try:
            found = _value(action, value)
        except ValueError as exc:
            raise CommandError(f"--config {path}: {key}: {exc}") from None
        if getattr(args, action.dest) is None:
            setattr(args, action.dest, found)


def _is_in_a_file(action: argparse.Action) -> bool:
    return action.dest not in _NOT_IN_A_FILE


def _key(action: argparse.Action) -> str:
    return action.dest.replace("_", "-")


def _value(action: argparse.Action, value: Any) -> Any:
    """A value as the command line would give it; ValueError says what it must be."""
    rule = _rule(action)
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"must be {rule}, not {_shown(value)}")
        return value
    kinds: tuple[type, ...] = getattr(action.type, "kinds", (str,))
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"must be {rule}, not {_shown(value)}")
    if not callable(action.type):
        found = value
    else:
        is_mode = isinstance(value, int) and getattr(action.type, "is_octal", False)
        try:
            found = action.type(f"{value:o}" if is_mode else str(value))
        except (ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"must be {rule}, not {value!r}") from None
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"must be {rule}, not {value!r}")
    return found


def _rule(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "true or false"
    if action.choices is not None:
        return "one of " + ", ".join(map(repr, action.choices))
    if action.type is None:
        return "a string"
    name = getattr(action.type, "__name__", "value")
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _shown(value: object) -> str:
    kind = toml.kind_of(value)
    return f"the string {value!r}" if isinstance(value, str) else kind
