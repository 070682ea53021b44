"""What becomes of a message: returned by a function, or raised."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

import milter

from ..portable import reply_lines

Code = Union[int, str]

#: An enhanced status code (RFC 3463) before the text of a reply.
_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?:[ \t]+|$)")
_CODE = re.compile(r"[45]\d\d")

#: Delivery not authorized, message refused (RFC 3463, X.7.1), where nothing else is said.
_REFUSED = "7.1"


@dataclass(frozen=True)
class Decision:
    """What becomes of a message, a recipient or a connection.

    It is made by `accept`, `reject`, `tempfail`, `discard` and `quarantine`.

    Attributes:
        kind: ``"accept"``, ``"reject"``, ``"tempfail"``, ``"discard"`` or ``"quarantine"``.
        code: the reply code, such as ``"550"``; None for the MTA's own reply.
        enhanced: the enhanced status code (RFC 3463), such as ``"5.7.1"``.
        text: the text of the reply, with a line feed between its lines; of a quarantine the
            reason.
    """

    kind: str
    code: str | None = None
    enhanced: str | None = None
    text: str = ""

    @property
    def refuses(self) -> bool:
        """Whether the client is told that the message is not taken."""
        return self.kind in ("reject", "tempfail")

    @property
    def reply(self) -> tuple[str, ...]:
        """The arguments of ``setreply``; none where the MTA's own reply is to do."""
        if self.code is None:
            return ()
        return (self.code, self.enhanced or "", *reply_lines(self.text))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, self.code, self.enhanced, self.text)))


def accept() -> Decision:
    """The message passes, with what was changed; a function that returns None says the same.

    In a chain the functions after this one are not asked. At ``"connect"`` and ``"helo"`` all
    messages of the connection pass; at ``"rcpt"`` it is that recipient who is accepted.
    """
    return Decision("accept")


def reject(text: str = "", code: Code = 550, enhanced: str | None = None) -> Decision:
    """The message is refused for good; the client tells its user.

    Args:
        text: what the client is told. It may have several lines, any percent sign, and the
            enhanced status code in front: ``"5.7.1 we know you"``. Without a text and with the
            code 550 the MTA gives its own reply. Long lines are broken, control characters
            become ``?`` (`Milter.portable.reply_lines`).
        code: the reply code, 500 to 599 (RFC 5321, section 4.2).
        enhanced: the enhanced status code (RFC 3463); by default what the text begins with, else
            5.7.1.

    Raises:
        ValueError: a code that is none, or of another class than 5.
    """
    return _refusal("reject", "5", text, code, enhanced)


def tempfail(text: str = "", code: Code = 451, enhanced: str | None = None) -> Decision:
    """The message is refused for now; the client tries again.

    Args:
        text: as of `reject`.
        code: the reply code, 400 to 499. After 421 the MTA ends the connection.
        enhanced: as of `reject`, 4.7.1 where nothing else is said.

    Raises:
        ValueError: a code that is none, or of another class than 4.
    """
    return _refusal("tempfail", "4", text, code, enhanced)


def discard() -> Decision:
    """The client is told that the message was taken, and nobody gets it.

    Not at ``"connect"`` and ``"helo"``, where the protocol has no such answer.
    """
    return Decision("discard")


def quarantine(reason: str) -> Decision:
    """The message is taken, with what was changed, and held for the postmaster.

    Not at ``"connect"``, ``"helo"`` and ``"rcpt"``: it is a message that is held.

    Args:
        reason: one line, which the MTA notes with it.

    Raises:
        ValueError: no reason, or one of several lines or with NUL.
    """
    line = milter._nonempty_line("quarantine", "reason", reason)
    return Decision("quarantine", text=line.decode("utf-8", "surrogateescape"))


def _refusal(kind: str, digit: str, text: str, code: Code, enhanced: str | None) -> Decision:
    if not isinstance(text, str):
        raise TypeError(f"{kind}: text: must be str, not {type(text).__name__}: {text!r}")
    number = str(code)
    if isinstance(code, bool) or not _CODE.fullmatch(number) or number[0] != digit:
        raise ValueError(f"{kind}: code: must be {digit}00 to {digit}99: {code!r}")
    if enhanced is None:
        found = _ENHANCED.match(text)
        if found:
            enhanced, text = found[1], text[found.end() :]
    if not text and enhanced is None and number in ("550", "451"):
        return Decision(kind)
    enhanced = enhanced or f"{digit}.{_REFUSED}"
    if not _ENHANCED.fullmatch(enhanced) or enhanced[0] != digit:
        raise ValueError(
            f"{kind}: enhanced: must have the form of '{digit}.7.1': {enhanced!r} "
            f"(with the code {number})"
        )
    return Decision(kind, number, enhanced, text)


class Raised(Exception):
    """A decision that is raised rather than returned, also deep inside a helper function.

    Attributes:
        decision: the decision.
    """

    def __init__(self, decision: Decision) -> None:
        super().__init__(str(decision))
        self.decision = decision


class Accept(Raised):
    """`accept`, to be raised."""

    def __init__(self) -> None:
        super().__init__(accept())


class Reject(Raised):
    """`reject`, to be raised: ``raise mailfilter.Reject("5.7.1 no rockets")``."""

    def __init__(self, text: str = "", code: Code = 550, enhanced: str | None = None) -> None:
        super().__init__(reject(text, code, enhanced))


class Tempfail(Raised):
    """`tempfail`, to be raised."""

    def __init__(self, text: str = "", code: Code = 451, enhanced: str | None = None) -> None:
        super().__init__(tempfail(text, code, enhanced))


class Discard(Raised):
    """`discard`, to be raised."""

    def __init__(self) -> None:
        super().__init__(discard())


class Quarantine(Raised):
    """`quarantine`, to be raised."""

    def __init__(self, reason: str) -> None:
        super().__init__(quarantine(reason))


def as_decision(value: object, name: str) -> Decision | None:
    """What a function has returned as a decision.

    Raises:
        TypeError: it may not be returned; the text says what may.
    """
    if value is None or isinstance(value, Decision):
        return value
    if isinstance(value, Raised):
        return value.decision
    raise TypeError(
        f"{name} returned {value!r}: return None, accept(), reject(…), tempfail(…), discard() or "
        "quarantine(…) of Milter.mailfilter"
    )


#: What the protocol has no answer for.
IMPOSSIBLE = {
    ("discard", "connect"),
    ("discard", "helo"),
    ("quarantine", "connect"),
    ("quarantine", "helo"),
    ("quarantine", "rcpt"),
}


def check_stage(decision: Decision, stage: str, name: str) -> None:
    """Refuse a decision that a stage cannot carry.

    Raises:
        ValueError: it is one of ``IMPOSSIBLE``.
    """
    if (decision.kind, stage) in IMPOSSIBLE:
        raise ValueError(f"{name} returned {decision.kind}, which cannot be at={stage!r}")
