"""Random messages and random edits of them, from a seed."""

from __future__ import annotations

import random
from typing import Any

from Milter import mailfilter

NAMES = ("X-A", "X-B", "Subject", "x-a", "X-Long-Name-Of-A-Header")
WORDS = ("one", "two", "Grüße", "5%", "=?", "文字", "caf\udce9", "a" * 40, "(x)", '"q"', "ß" * 50)
#: What every message has, or an MTA would add it; and what tests tell messages apart by.
KEPT = ("From", "Date", "Message-Id", "X-Seed")
#: As MTAs hand them over, and as they stand in messages.
RAW = (
    b" one",
    b"none",
    b"  two ",
    b" a\n\tb",
    b" a\n b\n c",
    b"",
    b" caf\xe9",
    b" =?utf-8?q?=C3=A9?=",
)
PEOPLE = ("ann@example.com", "bob@example.org", "carl@example.net", "Dora@example.com")


def text(rng: random.Random) -> str:
    """The value of a header."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def message(rng: random.Random) -> bytes:
    """A message with CRLF at the end of lines."""
    fields = [b"From: ann@example.com", b"Date: Thu, 01 Jan 2026 12:00:00 +0000"]
    for _ in range(rng.randint(0, 9)):
        fields.insert(
            rng.randint(0, len(fields)), rng.choice(NAMES).encode() + b":" + rng.choice(RAW)
        )
    head = b"".join(field.replace(b"\n", b"\r\n") + b"\r\n" for field in fields)
    return head + b"\r\n" + body(rng)


def body(rng: random.Random) -> bytes:
    """Lines with CRLF."""
    lines = rng.choices(
        (b"text", b"", b".", b"..dots", b"\xe9\xff\x80", b"x" * 900), k=rng.randint(0, 5)
    )
    return b"".join(line + b"\r\n" for line in lines)


def recipients(rng: random.Random) -> list[str]:
    """At least one."""
    return rng.sample(PEOPLE, rng.randint(1, 3))


def edit(rng: random.Random, mail: Any) -> None:
    """Up to six edits of a message."""
    for _ in range(rng.randint(0, 6)):
        rng.choice(EDITS)(rng, mail)


def _set(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.headers[rng.choice(NAMES)] = text(rng)


def _add(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.headers.add(rng.choice(NAMES), text(rng))


def _insert(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.headers.insert(rng.randint(0, len(mail.headers)), rng.choice(NAMES), text(rng))


def _delete(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.headers.delete(rng.choice(NAMES))


def _delete_one(rng: random.Random, mail: mailfilter.Mail) -> None:
    found = [header for header in mail.headers if header.name not in KEPT]
    if found:
        mail.headers.delete(rng.choice(found))


def _change_one(rng: random.Random, mail: mailfilter.Mail) -> None:
    found = [header for header in mail.headers if header.name not in KEPT]
    if found:
        rng.choice(found).value = text(rng)


def _replace(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.headers.replace(rng.choice(NAMES), text(rng))


def _new_body(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.body = body(rng)


def _add_recipient(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.recipients.add(rng.choice(PEOPLE))


def _remove_recipient(rng: random.Random, mail: mailfilter.Mail) -> None:
    if len(mail.recipients) > 1:
        mail.recipients.discard(rng.choice(PEOPLE))


def _new_sender(rng: random.Random, mail: mailfilter.Mail) -> None:
    mail.sender = rng.choice(PEOPLE)


EDITS = (
    _set, _add, _insert, _insert, _delete, _delete_one, _change_one, _change_one, _replace,
    _new_body, _add_recipient, _remove_recipient, _new_sender,
)  # fmt: skip
