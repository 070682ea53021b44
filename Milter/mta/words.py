"""Packets in words, for people: what each says, however broken it is.  No I/O."""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence

from .visible import escape, shortened
from .vocabulary import Action, Family, Stage, Step, flag_names
from .wire import MACRO_STAGES, OPTION_SIZE


class Side(enum.Enum):
    """Who says something."""

    MTA = "mta"  #: the mail server
    FILTER = "filter"  #: the milter

    @property
    def other(self) -> Side:
        """To whom it is said."""
        return Side.FILTER if self is Side.MTA else Side.MTA


#: By side: what each command byte is called.
NAMES: dict[Side, dict[bytes, str]] = {
    Side.MTA: {b"D": "macros", **{stage.value: stage.name.lower() for stage in Stage}},
    Side.FILTER: {
        b"O": "negotiate",
        b"c": "continue",
        b"a": "accept",
        b"r": "reject",
        b"t": "tempfail",
        b"d": "discard",
        b"s": "skip",
        b"4": "shutdown",
        b"f": "conn_fail",
        b"p": "progress",
        b"y": "reply",
        b"h": "addheader",
        b"i": "insheader",
        b"m": "chgheader",
        b"+": "addrcpt",
        b"2": "addrcpt_par",
        b"-": "delrcpt",
        b"e": "chgfrom",
        b"b": "replacebody",
        b"q": "quarantine",
    },
}
COMMANDS = {
    side: {name: command for command, name in names.items()} for side, names in NAMES.items()
}

_STAGES = {stage.value: stage for stage in Stage}


def stage_of(command: bytes) -> Stage | None:
    """The stage of an MTA's command; None for macros, and for what is no command."""
    return _STAGES.get(command)


def describe(side: Side, command: bytes, data: bytes) -> str:
    """What a packet says, in one line; one that has not the form that is due is shown as it is."""
    name = NAMES[side].get(command)
    if name is None:
        return f"unknown packet {command!r} {shortened(data)}"
    writer = _WRITERS[side].get(command, _nothing)
    try:
        said = writer(data)
    except (ValueError, IndexError, struct.error):
        return f"{_label(side, command)}, malformed: {shortened(data)}"
    if side is Side.MTA and command == b"D":
        return f"macros for {said}"
    return f"{_label(side, command)}{': ' if said else ''}{said}"


def _label(side: Side, command: bytes) -> str:
    if side is Side.MTA and command != b"D":
        return str(_STAGES[command])
    return _LABELS.get(command, NAMES[side][command])


_LABELS = {
    b"D": "macros",
    b"O": "negotiation",
    b"f": "connection failure",
    b"y": "reply",
    b"h": "add header",
    b"i": "insert header",
    b"m": "change header",
    b"+": "add recipient",
    b"2": "add recipient",
    b"-": "delete recipient",
    b"e": "change sender to",
    b"b": "replace body",
}


# --- fields --------------------------------------------------------------------------------------


def _strings(data: bytes, least: int = 1, most: int | None = None) -> Sequence[bytes]:
    """The strings that end in NUL."""
    parts = data.split(b"\0")
    if parts.pop() or not least <= len(parts) <= (most or len(parts)):
        raise ValueError(data)
    return parts


def _nothing(data: bytes) -> str:
    if data:
        raise ValueError(data)
    return ""


def _options(data: bytes) -> str:
    version, actions, steps = struct.unpack_from("!III", data)
    said = (
        f"version {version}, actions {' '.join(flag_names(Action(actions))) or 'none'}, "
        f"steps {' '.join(flag_names(Step(steps))) or 'all'}"
    )
    rest = data[OPTION_SIZE:]
    while rest:
        (number,) = struct.unpack_from("!I", rest)
        names, nul, rest = rest[4:].partition(b"\0")
        if not nul:
            raise ValueError(data)
        said += f", macros for {MACRO_STAGES[number]}: {escape(names) or 'none'}"
    return said


def _macros(data: bytes) -> str:
    stage = _STAGES.get(data[:1])
    parts = _strings(data[1:], 0)
    if stage is None or len(parts) % 2:
        raise ValueError(data)
    pairs = zip(parts[::2], parts[1::2])
    said = ", ".join(f"{escape(name)}={escape(value)}" for name, value in pairs)
    return f"{stage}: {said or 'none'}"


def _client(data: bytes) -> str:
    name, _, rest = data.partition(b"\0")
    family = Family(rest[:1])
    if family is Family.UNKNOWN:
        return f"{escape(name)}, address unknown"
    (port,) = struct.unpack_from("!H", rest, 1)
    (address,) = _strings(rest[3:], 1, 1)
    return f"{escape(name)}, {family.name} {escape(address)}, port {port}"


def _words(data: bytes) -> str:
    return " ".join(escape(part) for part in _strings(data))


def _reply(data: bytes) -> str:
    (text,) = _strings(data, 1, 1)
    return escape(text.replace(b"%%", b"%"))


def _header(data: bytes) -> str:
    name, value = _strings(data, 2, 2)
    return f"{escape(name)}: {_abbreviated(value.lstrip(b' '))}"


def _abbreviated(value: bytes, most: int = 200) -> str:
    return escape(value) if len(value) <= most else shortened(value, most)


def _inserted(data: bytes) -> str:
    (number,) = struct.unpack_from("!i", data)
    return f"at {number}, {_header(data[4:])}"


def _changed(data: bytes) -> str:
    (number,) = struct.unpack_from("!i", data)
    name, value = _strings(data[4:], 2, 2)
    if not value:
        return f"number {number}, {escape(name)} is deleted"
    return f"number {number}, {_header(data[4:])}"


def _bytes(data: bytes) -> str:
    return shortened(data) if data else ""


_WRITERS: dict[Side, dict[bytes, Callable[[bytes], str]]] = {
    Side.MTA: {
        b"O": _options,
        b"D": _macros,
        b"C": _client,
        b"H": _words,
        b"M": _words,
        b"R": _words,
        b"L": _header,
        b"B": _bytes,
        b"E": _bytes,
        b"U": _words,
    },
    Side.FILTER: {
        b"O": _options,
        b"y": _reply,
        b"h": _header,
        b"i": _inserted,
        b"m": _changed,
        b"+": _words,
        b"2": _words,
        b"-": _words,
        b"e": _words,
        b"b": _bytes,
        b"q": _words,
    },
}
