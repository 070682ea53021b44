"""Hostile values for actions, and the filters that try them; both sides of test_injection.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Union

from integration.case import Case, Filter

import Milter

COUNT = 220  # values for each action
CHANGES = 20  # headers in a message: Postfix does not find its way among many more changes
SEED = 20260101

Value = Union[str, bytes]

#: What ends a line, or a string, for somebody.
_ENDS = ("\r\n", "\n", "\r", "\r\r\n", "\n\r", "\0", "\r\n\r\n", "\n\n", "\r\n.\r\n", "\n.\n")
#: What only looks so, or does so elsewhere.
_ODD = ("\r\n ", "\n\t", "\n ", "\v", "\f", "\x85", "\u2028", "\u2029", "\x1b[2J", "\udc8d\udc8a",
        "\\r\\n", "%0d%0a", "=?utf-8?q?=0D=0A?=", "\ud800", "\x7f", "\b", "\t", " ")  # fmt: skip
#: What an attacker would have there.
_PAYLOADS = ("X-Evil: 1", "Bcc: <evil@example.net>", "MAIL FROM:<evil@example.net>",
             "RCPT TO:<evil@example.net>", "250 2.0.0 evil", "550 5.7.1 evil", "<evil@example.net>",
             "evil@example.net", "QUIT", "RSET", "DATA", "EVIL", "NOTIFY=NEVER", "X-Evil",
             "milter-hold: evil")  # fmt: skip
_REST = ("plain", "a@example.org", "<a@example.org>", ">", "<", ",", ";", ":", "(", ")", '"', "\\",
         "%", "%s%n", "%%", "@", " BODY=8BITMIME", " ORCPT=rfc822;evil", "gr\u00fc\u00df", "\u7532",
         "\udcff", "x" * 990, "y" * 3000, "")  # fmt: skip


def values(action: str) -> list[Value]:
    """The values for an action; always the same.

    Each has something that could end a line or an address, and something after it; some are bytes.
    """
    source = random.Random(f"{SEED} {action}")
    made: list[Value] = []
    seen: set[Value] = set()
    while len(made) < COUNT:
        breaks = source.choice((_ENDS, _ODD, _ODD, _REST))
        parts = [source.choice(_REST), source.choice(breaks), source.choice(_PAYLOADS)]
        parts += source.choices((*_ENDS, *_ODD, *_REST), k=source.randrange(3))
        text = "".join(parts)
        value: Value = text
        if source.random() < 0.25 and "\ud800" not in text:
            value = text.encode("utf-8", "surrogateescape")
        if value not in seen:
            seen.add(value)
            made.append(value)
    return made


def attempt(f: Any, number: int, how: str, action: Callable[[], object]) -> None:
    """Call the action, and say whether it was refused; nothing else may come of it."""
    try:
        action()
    except ValueError as exc:
        assert isinstance(exc, Milter.error)
        f.say("tried", number, how, "refused")
    else:
        f.say("tried", number, how, "passed")


def twice(f: Any, number: int, method: str, *arguments: Any) -> None:
    """Through the context, then through the filter object: that comes last and holds."""
    for how, owner in (("ctx", f._ctx), ("base", f)):
        attempt(f, number, how, lambda on=owner: getattr(on, method)(*arguments))


# --- one message for all values ----------------------------------------------------------------


def add_values(f: Any) -> None:
    for number, value in enumerate(values("addheader")):
        attempt(f, number, "ctx", lambda n=number, v=value: f._ctx.addheader(f"X-C{n}", v))
        attempt(f, number, "base", lambda n=number, v=value: f.addheader(f"X-B{n}", v))


def insert_values(f: Any) -> None:
    for number, value in enumerate(values("insheader")):
        attempt(f, number, "ctx", lambda n=number, v=value: f._ctx.addheader(f"X-C{n}", v, 1))
        attempt(f, number, "base", lambda n=number, v=value: f.addheader(f"X-B{n}", v, 1))


def add_names(f: Any) -> None:
    for number, value in enumerate(values("header name")):
        attempt(f, number, "ctx", lambda n=number, v=value: f._ctx.addheader(v, f"c{n}."))
        attempt(f, number, "base", lambda n=number, v=value: f.addheader(v, f"b{n}."))


def add_parameters(f: Any) -> None:
    for number, value in enumerate(values("addrcpt parameters")):
        twice(f, number, "addrcpt", f"p{number}@example.org", value)


def delete_recipients(f: Any) -> None:
    for number, value in enumerate(values("delrcpt")):
        twice(f, number, "delrcpt", value)


# --- one message, or one recipient, for each value ----------------------------------------------


def note_number(f: Any) -> None:
    """The recipient says which value it is: <7@example.org>."""
    f.value_number = int(f.args[0].strip("<>").partition("@")[0])


def per_message(action: str, method: str, *before: Any) -> Filter:
    def at_end(f: Any) -> None:
        twice(f, f.value_number, method, *before, values(action)[f.value_number])

    return Filter(on={"envrcpt": note_number, "eom": at_end})


def change_values(f: Any) -> None:
    """As many as the message has headers for, from that number on."""
    for number in range(f.value_number, f.value_number + CHANGES):
        value = values("chgheader")[number]
        attempt(f, number, "ctx", lambda n=number, v=value: f._ctx.chgheader(f"X-C{n}", 1, v))
        attempt(f, number, "base", lambda n=number, v=value: f.chgheader(f"X-B{n}", 1, v))


def change_names(f: Any) -> None:
    """No message has such headers, which Postfix adds then."""
    for number in range(f.value_number, f.value_number + CHANGES):
        twice(f, number, "chgheader", values("chgheader name")[number], 1, f"n{number}.")


def after(beginning: str, value: Value) -> Value:
    """The value with something harmless before it."""
    return beginning + value if isinstance(value, str) else beginning.encode() + value


def reply(f: Any) -> int:
    note_number(f)
    value = values("setreply")[f.value_number]
    twice(f, f.value_number, "setreply", "550", "5.7.1", value)
    return Milter.REJECT


def reply_lines(f: Any) -> int:
    note_number(f)
    value = values("setreply lines")[f.value_number]
    twice(f, f.value_number, "setreply", "550", "5.7.1", "first", value, "last")
    return Milter.REJECT


def reply_code(f: Any) -> int:
    note_number(f)
    value = values("setreply code")[f.value_number]
    twice(f, f.value_number, "setreply", after("550", value), "5.7.1", "text")
    return Milter.REJECT


def reply_enhanced_code(f: Any) -> int:
    note_number(f)
    value = values("setreply enhanced code")[f.value_number]
    twice(f, f.value_number, "setreply", "550", after("5.7.1", value), "text")
    return Milter.REJECT


CASES = tuple(
    Case(f"hostile values: {name}", filter=filter_)
    for name, filter_ in {
        "addheader": Filter(on={"eom": add_values}),
        "insheader": Filter(on={"eom": insert_values}),
        "header name": Filter(on={"eom": add_names}),
        "chgheader": Filter(on={"envrcpt": note_number, "eom": change_values}),
        "chgheader name": Filter(on={"envrcpt": note_number, "eom": change_names}),
        "addrcpt": per_message("addrcpt", "addrcpt"),
        "addrcpt parameters": Filter(on={"eom": add_parameters}),
        "delrcpt": Filter(on={"eom": delete_recipients}),
        "chgfrom": per_message("chgfrom", "chgfrom"),
        "chgfrom parameters": per_message("chgfrom parameters", "chgfrom", "s@example.org"),
        "quarantine": per_message("quarantine", "quarantine"),
        "setreply": Filter(on={"envrcpt": reply}),
        "setreply lines": Filter(on={"envrcpt": reply_lines}),
        "setreply code": Filter(on={"envrcpt": reply_code}),
        "setreply enhanced code": Filter(on={"envrcpt": reply_enhanced_code}),
    }.items()
)
