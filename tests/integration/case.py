"""The case format: one SMTP dialogue, one filter, and what must be seen on every MTA.

A :class:`Case` says what the client says and is answered, what the filter does, what it sees,
and what is delivered.  It runs unchanged on the mock (``Milter.mta``), on Postfix and on
sendmail.  Where one of them differs, a :class:`Differs` in the case says how and why; these make
the table in ``docs/mta-differences.md``.

The filter's process reads this module too, and may run on another version of pymilter: nothing
here needs more than Python.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Union

MTAS = ("mock", "postfix", "sendmail")

Expected = Union[str, "re.Pattern[str]"]
Seen = Union[str, Sequence[Any]]

#: A reply that never comes, as the client has given up before.
SKIPPED = "-"

HEADERS = (
    "From: Alice <alice@example.com>",
    "To: Bob <bob@example.org>",
    "Subject: hello",
    "Date: Thu, 01 Jan 2026 12:00:00 +0000",
    "Message-Id: <1@example.com>",
)
BODY = b"A body.\r\n"


def message(
    *extra: str, headers: Sequence[str] = HEADERS, body: bytes = BODY, encoding: str = "utf-8"
) -> bytes:
    """A message: the usual headers, then *extra* ones, and a body."""
    lines = "".join(f"{line}\n" for line in (*headers, *extra)).replace("\n", "\r\n")
    return lines.encode(encoding, "surrogateescape") + b"\r\n" + body


MESSAGE = message()


class Like:
    """Equal to every text in which the pattern is found; for use in what a filter sees."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and re.search(self.pattern, other) is not None

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __repr__(self) -> str:
        return f"Like({self.pattern!r})"


class _Anything:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "ANY"


ANY = _Anything()


# --- the dialogue -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One thing that the client does.

    :ivar do: ``banner``, ``command``, ``content`` (the message and its final dot), ``starttls``,
        ``auth``, ``drop`` (close the socket without QUIT), ``partial``,
        ``reconnect`` or ``pipeline``.
    :ivar text: the command, or the message.
    :ivar expect: how the reply begins (its lines joined by LF), or a pattern found in it.
    :ivar label: the name by which a :class:`Differs` speaks of the reply.
    :ivar part: ``mail``, ``rcpt``, ``data`` or ``end`` in a transaction: once it has failed, the
        client leaves out the rest of it.
    """

    do: str
    text: bytes = b""
    expect: Expected = ""
    label: str = ""
    part: str = ""
    steps: tuple[Step, ...] = ()


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def command(text: str | bytes, expect: Expected = "250", label: str = "") -> Step:
    """A command outside of a transaction, or in the middle of one."""
    line = _bytes(text)
    return Step("command", line, expect, label or line.split(b" ")[0].decode().lower())


def banner(expect: Expected = "220") -> Step:
    return Step("banner", expect=expect, label="banner")


def hello(name: str | bytes = "client.example", expect: Expected = "250", label: str = "") -> Step:
    return command(b"EHLO " + _bytes(name), expect, label or "helo")


def start_tls() -> Step:
    return Step("starttls", b"STARTTLS", "220", "starttls")


def authenticate() -> Step:
    """AUTH PLAIN as ``tester`` with the password ``secret``."""
    return Step("auth", b"AUTH PLAIN AHRlc3RlcgBzZWNyZXQ=", "235", "auth")


def drop() -> Step:
    """Close the socket as a client does that crashes."""
    return Step("drop", label="drop")


def partial(text: bytes) -> Step:
    """A part of the content, to which no reply is due."""
    return Step("partial", text, label="partial")


def reconnect() -> Step:
    """QUIT, and another connection."""
    return Step("reconnect", label="reconnect")


def pipelined(*steps: Step) -> Step:
    """The steps' commands in one write, then the replies to all of them."""
    return Step("pipeline", label="pipeline", steps=steps)


def is_positive(expect: Expected) -> bool:
    """Whether a client goes on after this reply."""
    text = expect if isinstance(expect, str) else expect.pattern
    return text.lstrip("^")[:1] in ("2", "3", "")


def mail(
    *recipients: str | bytes,
    sender: str | bytes = "<alice@example.com>",
    content: bytes = MESSAGE,
    mail: Expected = "250",
    rcpt: Expected | Sequence[Expected] = "250",
    data: Expected = "354",
    end: Expected = "250",
    number: str = "",
    until: str = "end",
) -> tuple[Step, ...]:
    """A transaction.

    :param recipients: with their ESMTP parameters; Bob by default.
    :param sender: with its ESMTP parameters.
    :param rcpt: one expectation for all recipients, or one for each.
    :param number: what tells these labels from those of another transaction.
    :param until: the last part to come.
    """
    whom = recipients or ("<bob@example.org>",)
    answers = [rcpt] * len(whom) if isinstance(rcpt, (str, re.Pattern)) else list(rcpt)
    steps = [Step("command", b"MAIL FROM:" + _bytes(sender), mail, f"mail{number}", "mail")]
    for index, (one, answer) in enumerate(zip(whom, answers)):
        label = f"rcpt{number}" + (f".{index + 1}" if len(whom) > 1 else "")
        steps.append(Step("command", b"RCPT TO:" + _bytes(one), answer, label, "rcpt"))
    steps.append(Step("command", b"DATA", data, f"data{number}", "data"))
    steps.append(Step("content", content, end, f"end{number}", "end"))
    parts = ("mail", "rcpt", "data", "end")
    wanted = parts[: parts.index(until) + 1]
    return tuple(step for step in steps if step.part in wanted)


def session(*parts: Step | tuple[Step, ...], greeting: bool = True) -> tuple[Step, ...]:
    """A dialogue of these parts, after the banner and EHLO."""
    steps: list[Step] = [banner(), hello()] if greeting else []
    for part in parts:
        steps.extend((part,) if isinstance(part, Step) else part)
    return tuple(steps)


@dataclass(frozen=True)
class Submission:
    """A local submission: ``sendmail ARGUMENTS < content``, in place of a dialogue."""

    arguments: tuple[str, ...] = ("-i", "-t")
    content: bytes = MESSAGE
    status: int = 0


# --- the filter -------------------------------------------------------------------------------

Action = Callable[[Any], Any]


@dataclass(frozen=True)
class Filter:
    """What the filter does.

    :ivar on: what it does at a stage, by the callback's name: called with the filter (a
        ``Milter.Base``), whose ``args`` are the callback's arguments; what it returns is the
        verdict, CONTINUE where that is None or a tuple (of calls made in a row).
    :ivar off: callbacks that are ``@nocallback``.
    :ivar noreply: callbacks that are ``@noreply``.
    :ivar symlist: the macros to ask for, by callback.
    :ivar macros: the macros to note at each stage, by callback.
    :ivar decorate: names of class decorators of the package (``rejected_recipients`` …).
    :ivar functions: functions of a whole message (``Milter.mailfilter``) in place of all that, each
        with its options; together they are a chain.
    """

    on: Mapping[str, Action] = field(default_factory=dict)
    off: tuple[str, ...] = ()
    noreply: tuple[str, ...] = ()
    symlist: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    macros: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    decorate: tuple[str, ...] = ()
    functions: tuple[tuple[Action, Mapping[str, Any]], ...] = ()


# --- what must be seen ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Mail:
    """A message as the next hop gets it.

    :ivar sender: with its DSN parameters; SIZE, BODY and SMTPUTF8 are left out.
    :ivar recipients: likewise, in any order; ORCPT is left out where it says the same address.
    :ivar headers: all, in order, folds as LF; the MTA's own Received is left out unless the
        case is about it (``Case.received``), then it is ``Received: own``.
    :ivar body: compared byte for byte; a function of the body returns whether it is right.
    """

    sender: str = "<alice@example.com>"
    recipients: tuple[str, ...] = ("<bob@example.org>",)
    headers: Any = HEADERS
    body: bytes | Callable[[bytes], bool] = BODY


@dataclass(frozen=True)
class Held:
    """A message in quarantine.

    :ivar reason: a text that the MTA keeps or logs with it.
    """

    sender: str = "alice@example.com"
    reason: str = ""


@dataclass(frozen=True)
class Differs:
    """How one MTA differs from the case, and why.

    :ivar mta: one of MTAS, or several separated by spaces.
    :ivar why: a sentence about the MTA, for the documentation.
    :ivar replies: other replies, by the label of the step.
    :ivar seen: replaces the case's, as do the others, where it is not None.
    """

    mta: str
    why: str
    replies: Mapping[str, Expected] = field(default_factory=dict)
    seen: Seen | None = None
    delivered: Sequence[Mail] | None = None
    held: Sequence[Held] | None = None
    connections: int | None = None


@dataclass(frozen=True)
class Case:
    """One case.

    :ivar name: unique; what the case shows, in a few words.
    :ivar seen: what the filter sees: a text of callback names in order (``header*5`` for five in a
        row), or a list of names and of tuples ``(name, *arguments)``, with a dict of macros last
        where the filter notes them.  One connection comes after the other.  None leaves it open.
    :ivar delivered: the messages that reach the next hop.
    :ivar held: the messages in quarantine.
    :ivar port: which listener of the MTA: it decides how the filter is reached (``unix``, ``inet``,
        ``inet6``), that the client comes over IPv6 (``ipv6``), or that the MTA waits two seconds
        for an answer and no longer (``impatient``).
    :ivar connections: how many the MTA makes to the filter; all must be closed in the end.
    :ivar topic: the chapter of the table of differences.
    """

    name: str
    dialogue: tuple[Step, ...] | Submission = field(default_factory=lambda: session(mail()))
    filter: Filter = Filter()
    seen: Seen | None = None
    delivered: Sequence[Mail] = (Mail(),)
    held: Sequence[Held] = ()
    differs: tuple[Differs, ...] = ()
    port: str = "unix"
    connections: int = 1
    received: bool = False
    topic: str = ""

    @property
    def authenticates(self) -> bool:
        """Whether the client uses AUTH, for which the MTA needs a password."""
        return not isinstance(self.dialogue, Submission) and any(
            step.do == "auth" for step in self.dialogue
        )

    def on(self, mta: str) -> Case:
        """The case as it is on *mta*, its differences applied."""
        case = self
        for one in self.differs:
            if mta in one.mta.split():
                case = case._apply(one)
        if isinstance(case.dialogue, Submission):
            return case
        return replace(case, dialogue=_consequences(case.dialogue))

    def _apply(self, differs: Differs) -> Case:
        changes: dict[str, Any] = {
            name: getattr(differs, name)
            for name in ("seen", "delivered", "held", "connections")
            if getattr(differs, name) is not None
        }
        if differs.replies:
            assert not isinstance(self.dialogue, Submission)
            labels = set(_labels(self.dialogue))
            unknown = set(differs.replies) - labels
            if unknown:
                raise ValueError(f"case {self.name!r}: no steps {unknown}, only {labels}")
            changes["dialogue"] = _replace_replies(self.dialogue, differs.replies)
        return replace(self, **changes)


def _labels(steps: Sequence[Step]) -> list[str]:
    return [label for step in steps for label in [step.label, *_labels(step.steps)]]


def _replace_replies(steps: Sequence[Step], replies: Mapping[str, Expected]) -> tuple[Step, ...]:
    return tuple(
        replace(
            step,
            expect=replies.get(step.label, step.expect),
            steps=_replace_replies(step.steps, replies),
        )
        for step in steps
    )


def _consequences(steps: Sequence[Step]) -> tuple[Step, ...]:
    """What a client does not get to say after a refusal is skipped."""
    walk = Transaction()
    result = []
    for step in steps:
        if step.steps:
            for one in step.steps:
                walk.answered(one, is_positive(one.expect))
        elif not walk.wants(step):
            step = replace(step, expect=SKIPPED)
        else:
            walk.answered(step, is_positive(step.expect))
        result.append(step)
    return tuple(result)


class Transaction:
    """Which parts of a transaction a client goes on with, given the replies so far."""

    def __init__(self) -> None:
        self._mail = self._rcpt = self._data = False

    def wants(self, step: Step) -> bool:
        return {"rcpt": self._mail, "data": self._rcpt, "end": self._data}.get(step.part, True)

    def answered(self, step: Step, positive: bool) -> None:
        if step.part == "mail":
            self._mail, self._rcpt, self._data = positive, False, False
        elif step.part == "rcpt":
            self._rcpt = self._rcpt or positive
        elif step.part == "data":
            self._data = positive


# --- what was seen -----------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came out of a run.

    :ivar replies: the label of each step and the reply to it.
    :ivar seen: for each callback the connection's number, whether its verdict ended the message,
        the callback's name and its arguments.
    """

    replies: list[tuple[str, str]] = field(default_factory=list)
    seen: list[list[Any]] = field(default_factory=list)
    delivered: list[Mail] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)


def expand(seen: Seen) -> list[Any]:
    """*seen* as a list: one item for each event."""
    if not isinstance(seen, str):
        return [item if isinstance(item, str) else list(item) for item in seen]
    events: list[Any] = []
    for word in seen.split():
        name, _, count = word.partition("*")
        events.extend([name] * int(count or 1))
    return events


def problems(case: Case, outcome: Outcome) -> list[str]:
    """What of *outcome* is not as *case* (applied to the MTA) says; empty where all is well."""
    return [
        *_reply_problems(case, outcome),
        *_seen_problems(case, outcome),
        *_order_problems(outcome),
        *_mail_problems(case, outcome),
        *_held_problems(case, outcome),
    ]


def _flat(steps: Sequence[Step]) -> list[Step]:
    return [one for step in steps for one in (_flat(step.steps) if step.steps else [step])]


def _reply_problems(case: Case, outcome: Outcome) -> list[str]:
    if isinstance(case.dialogue, Submission):
        wanted = [("status", str(case.dialogue.status))]
        return [] if outcome.replies == wanted else [f"replies: {outcome.replies} not {wanted}"]
    found = []
    steps = [
        step for step in _flat(case.dialogue) if step.do not in ("drop", "partial", "reconnect")
    ]
    for step, (label, reply) in zip(steps, outcome.replies):
        assert step.label == label
        if isinstance(step.expect, re.Pattern):
            right = step.expect.search(reply) is not None
        elif step.expect == SKIPPED:
            right = reply == SKIPPED
        else:
            right = reply.startswith(step.expect) and reply != SKIPPED
        if not right:
            found.append(f"reply to {label}: {reply!r}, expected {step.expect!r}")
    if len(steps) != len(outcome.replies):
        found.append(f"{len(outcome.replies)} replies to {len(steps)} steps")
    return found


def _seen_problems(case: Case, outcome: Outcome) -> list[str]:
    if case.seen is None:
        return []
    wanted = expand(case.seen)
    # One connection after the other: nobody promises the order of two that are open together.
    seen = [event[2:] for event in sorted(outcome.seen, key=lambda event: int(event[0]))]
    shaped = [
        event[0] if index < len(wanted) and isinstance(wanted[index], str) else event
        for index, event in enumerate(seen)
    ]
    if wanted == shaped:
        return []
    lines = [f"the filter saw: {' '.join(str(event[0]) for event in seen)}"]
    lines.append(f"expected:       {' '.join(w if isinstance(w, str) else w[0] for w in wanted)}")
    for index, (want, got) in enumerate(zip(wanted, shaped)):
        if want != got:
            lines.append(f"event {index}: {got!r}, expected {want!r}")
    return ["\n  ".join(lines)]


_CONTENT = ("data", "header", "eoh", "body", "eom")


def _order_problems(outcome: Outcome) -> list[str]:
    """What no application may ever see, whatever the case."""
    found = []
    for number in {event[0] for event in outcome.seen}:
        names = [event[2] for event in outcome.seen if event[0] == number]
        if names.count("close") != 1 or names[-1] != "close":
            found.append(f"connection {number}: close is not once and last: {names}")
        if "connect" in names[1:]:
            found.append(f"connection {number}: connect comes late: {names}")
        ends = [event[1] for event in outcome.seen if event[0] == number]
        # Without MAIL nobody can tell where messages begin.
        if "envfrom" in names or not {"envrcpt", *_CONTENT}.intersection(names):
            bad = _bad_order(names, ends)
            found.extend(f"connection {number}: {text}: {names}" for text in bad)
    return found


def _bad_order(names: Sequence[str], ends: Sequence[bool]) -> list[str]:
    found = []
    open_message = False
    at = -1
    for name, ended in zip(names, ends):
        if name == "envfrom":
            if open_message:
                found.append("a message begins within another")
            open_message, at = True, -1
        elif name == "abort":
            if not open_message:
                found.append("abort without a message that is open")
            open_message = False
        elif name in _CONTENT:
            if not open_message or _CONTENT.index(name) < at:
                found.append(f"{name} out of order")
            at = _CONTENT.index(name)
            open_message = name != "eom"
        elif name == "envrcpt" and (not open_message or at >= 0):
            found.append("envrcpt out of order")
        open_message = open_message and not ended
    return found


def _mail_problems(case: Case, outcome: Outcome) -> list[str]:
    if len(case.delivered) != len(outcome.delivered):
        return [f"delivered {outcome.delivered!r:.3000}, expected {list(case.delivered)!r:.1000}"]
    # MTAs promise no order of delivery; what is said is of the one that they mostly have.
    orders = itertools.permutations(outcome.delivered) if len(outcome.delivered) < 4 else ()
    problems = [_problems_of(case, order) for order in (outcome.delivered, *orders)]
    return [] if [] in problems else problems[0]


def _problems_of(case: Case, delivered: Sequence[Mail]) -> list[str]:
    found = []
    for want, got in zip(case.delivered, delivered):
        if _sorted(want.sender) != got.sender:
            found.append(f"delivered from {got.sender!r}, expected {want.sender!r}")
        if sorted(map(_sorted, want.recipients)) != sorted(got.recipients):
            found.append(f"delivered to {got.recipients}, expected {want.recipients}")
        if want.headers != got.headers:
            found.append(
                "headers:\n    "
                + "\n    ".join(map(repr, got.headers))
                + "\n  expected:\n    "
                + "\n    ".join(map(repr, want.headers))
            )
        assert isinstance(got.body, bytes)
        if not (want.body(got.body) if callable(want.body) else want.body == got.body):
            found.append(
                f"body of {len(got.body)} bytes: {got.body[:200]!r}, expected {want.body!r:.200}"
            )
    return found


def _sorted(address: str) -> str:
    """An address with its parameters in the order in which the sink gives them."""
    bare, bracket, params = address.rpartition(">")
    return " ".join([bare + bracket, *sorted(params.split())])


def _held_problems(case: Case, outcome: Outcome) -> list[str]:
    right = len(case.held) == len(outcome.held) and all(
        want.sender == got.sender and want.reason in got.reason
        for want, got in zip(case.held, outcome.held)
    )
    return [] if right else [f"held: {outcome.held}, expected {list(case.held)}"]
