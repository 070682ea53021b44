"""The rules of the extension's context object, in Python, for its stand-in in tests.

The extension checks what a filter wants to send before libmilter sees it. These functions
check the same, raise the same exceptions and say the same, so that a filter which passes
with the stand-in passes on the wire.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Union

import milter

from ._protocol import OPTIONAL_CALLBACKS

Text = Union[str, bytes]

MAX_REPLY_LINES = 32
MAX_REPLY_LINE = 980
_SHOWN = 80

_NAME = re.compile(rb"[^\x00-\x20\x7f:]+")
_REPLY_CODE = re.compile(r"[45][0-9]{2}")
_ENHANCED_CODE = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")
_PERCENTS = re.compile(rb"%+")

#: Steps of the conversation in which DISCARD has no message to discard.
#: Steps that may come several times in a row, so that the rest of them can be skipped.
_REPEATED = frozenset({"envrcpt", "header", "body", "unknown"})

_BEFORE_MESSAGE = frozenset({"connect", "helo"})
#: Steps whose result nobody reads.
_NO_VERDICT = frozenset({"abort", "close"})
#: Steps that belong to a message.
MESSAGE_STEPS = frozenset(
    {"envfrom", "envrcpt", "data", "header", "eoh", "body", "eom"},
)


def refuse(call: str, argument: str, rule: str, value: object) -> milter.InvalidArgument:
    """The exception for a value that breaks a rule; the caller raises it."""
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = f"{shown[: _SHOWN - 3]}..."
    return milter.InvalidArgument(f"{call}: {argument}: {rule}: {shown}")


def text(call: str, argument: str, value: object) -> bytes:
    """A text as it goes to libmilter: UTF-8, with bytes that were none given back."""
    if isinstance(value, str):
        try:
            wire = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            rule = "holds a surrogate that stands for no byte"
            raise refuse(call, argument, rule, value) from None
    elif isinstance(value, bytes):
        wire = value
    else:
        kind = type(value).__name__
        raise TypeError(f"{call}: {argument} must be str or bytes, not {kind}")
    if b"\0" in wire:
        raise refuse(call, argument, "must not hold NUL", value)
    return wire


def line(call: str, argument: str, value: object) -> bytes:
    """A text that has to stay on one line."""
    wire = text(call, argument, value)
    if b"\r" in wire or b"\n" in wire:
        raise refuse(call, argument, "must not hold CR or LF", value)
    return wire


def nonempty_line(call: str, argument: str, value: object) -> bytes:
    """An address or a reason."""
    wire = line(call, argument, value)
    if not wire:
        raise refuse(call, argument, "must not be empty", value)
    return wire


def header_name(call: str, value: object) -> bytes:
    """A header's name (RFC 5322, section 3.6.8), though bytes beyond ASCII pass."""
    wire = text(call, "name", value)
    if not wire:
        raise refuse(call, "name", "must not be empty", value)
    if not is_header_name(wire):
        rule = "must not hold a colon, a space or a control character"
        raise refuse(call, "name", rule, value)
    return wire


def is_header_name(wire: bytes) -> bool:
    """Whether these bytes can stand before the colon of a header."""
    return _NAME.fullmatch(wire) is not None


def header_value(call: str, value: object) -> bytes:
    """A header's value: line ends only as folds (RFC 5322, section 2.2.3), which become LF.

    One line end at the very end is dropped.
    """
    wire = text(call, "value", value).replace(b"\r\n", b"\n")
    if wire.endswith(b"\n"):
        wire = wire[:-1]
    if b"\r" in wire or re.search(rb"\n(?![ \t])", wire):
        rule = "CR and LF are only allowed in a fold, before space or tab"
        raise refuse(call, "value", rule, value)
    return wire


def reply(rcode: object, xcode: object, lines: Sequence[object]) -> None:
    """Check the arguments of setreply; ``lines`` holds every one given, None for none."""
    if len(lines) > MAX_REPLY_LINES:
        rule = f"a reply has at most {MAX_REPLY_LINES} lines: {len(lines)} were given"
        raise milter.InvalidArgument(f"setreply: msg: {rule}")
    code = text("setreply", "rcode", rcode).decode("latin-1")
    if not _REPLY_CODE.fullmatch(code):
        raise refuse("setreply", "rcode", "must be three digits, the first 4 or 5", rcode)
    if xcode is not None:
        enhanced = text("setreply", "xcode", xcode).decode("latin-1")
        if not _ENHANCED_CODE.fullmatch(enhanced):
            raise refuse("setreply", "xcode", "must have the form of '5.7.1'", xcode)
        if enhanced[0] != code[0]:
            warnings.warn(
                f"setreply: the class of the enhanced code {enhanced} is not that of {code}",
                RuntimeWarning,
                stacklevel=3,
            )
    for one in lines:
        if one is not None:
            _reply_line(one)


def _reply_line(value: object) -> None:
    wire = line("setreply", "msg", value)
    if len(wire) > MAX_REPLY_LINE:
        rule = f"a line must not be longer than {MAX_REPLY_LINE} bytes"
        raise refuse("setreply", "msg", rule, value)
    if any(len(run) % 2 for run in _PERCENTS.findall(wire)):
        raise refuse("setreply", "msg", "'%' must be doubled", value)


def symlist(stage: int, macros: object) -> list[str]:
    """The macros of a list for setsymlist."""
    if not milter.M_CONNECT <= stage <= milter.M_EOH:
        raise refuse("setsymlist", "stage", "must be one of M_CONNECT to M_EOH", stage)
    return line("setsymlist", "macros", macros).decode("utf-8", "surrogateescape").split()


def step_bits(step: str) -> tuple[int, int]:
    """The protocol steps "wait for no reply" and "do not send" of a callback, 0 for none."""
    return OPTIONAL_CALLBACKS.get("hello" if step == "helo" else step, (0, 0))


def check_verdict(step: str, verdict: object, protocol: int) -> int:
    """The verdict that the MTA gets, of what a callback returned.

    Args:
        step: the name of the callback.
        verdict: what it returned.
        protocol: the negotiated steps.

    Returns:
        The verdict; CONTINUE where none is sent.

    Raises:
        milter.error: it may not be returned there.
    """
    if step in _NO_VERDICT:
        return milter.CONTINUE
    silent = bool(protocol & step_bits(step)[0])
    why = _why_no_verdict(step, verdict, protocol, silent)
    if why is not None:
        raise milter.error(f"the {step} callback returned {verdict!r}: {why}")
    assert isinstance(verdict, int)
    return milter.CONTINUE if silent else int(verdict)


def _why_no_verdict(step: str, verdict: object, protocol: int, silent: bool) -> str | None:
    if not isinstance(verdict, int):
        return "not an int"
    if verdict == milter.CONTINUE:
        return None
    if verdict == milter.NOREPLY:
        return None if silent else "NOREPLY was not negotiated for this callback"
    if verdict not in (
        milter.REJECT,
        milter.DISCARD,
        milter.ACCEPT,
        milter.TEMPFAIL,
        milter.SKIP,
    ):
        return "not one of CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL, SKIP, NOREPLY"
    if verdict == milter.SKIP and not protocol & milter.P_SKIP:
        return "SKIP was not negotiated"
    if verdict == milter.SKIP and step not in _REPEATED:
        return "SKIP is only for steps that repeat"
    if verdict == milter.DISCARD and step in _BEFORE_MESSAGE:
        return "DISCARD is not allowed before there is a message"
    return "no reply was negotiated for this callback" if silent else None


def ends_message(step: str, verdict: int) -> bool:
    """Whether a verdict ends the message for this filter, so that no abort follows."""
    if verdict in (milter.ACCEPT, milter.DISCARD):
        return True
    if verdict in (milter.REJECT, milter.TEMPFAIL):
        return step != "envrcpt"
    return step == "eom"
