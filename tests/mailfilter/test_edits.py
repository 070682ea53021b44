"""Edits become actions: what an MTA makes of these is the message that the function left."""

from __future__ import annotations

import random

import pytest
from support import random_mail

from Milter import mailfilter
from Milter.mta import (
    Address,
    Dialect,
    Editor,
    Header,
    Message,
)

OWN = Header(b"Received", b"by mx")


def applied(
    result: mailfilter.Result, data: bytes, dialect: Dialect, came: mailfilter.Mail
) -> Editor:
    """What an MTA makes of the actions."""
    editor = Editor(
        Message.parse(data),
        Address.make(str(came.sender)),
        [Address.make(str(one)) for one in came.recipients],
        dialect=dialect,
        own_received=OWN,
        leading_space=True,
    )
    editor.apply(*result.actions_for(dialect, leading_space=True))
    return editor


def without_own(editor: Editor) -> bytes:
    message = editor.message
    message.headers = [header for header in message.headers if header != OWN]
    return message.as_bytes()


@pytest.mark.parametrize("dialect", Dialect)
def test_the_actions_make_of_any_message_the_edited_one(dialect: Dialect) -> None:
    counts: dict[str, int] = {}
    for seed in range(1000):
        rng = random.Random(seed)
        data = random_mail.message(rng)
        came = mailfilter.Mail.from_bytes(
            data, sender="ann@example.com", recipients=random_mail.recipients(rng)
        )
        changed = mailfilter.filter(lambda mail, rng=rng: random_mail.edit(rng, mail))
        result = changed.check(came)
        editor = applied(result, data, dialect, came)
        assert without_own(editor) == result.as_bytes(), seed
        assert editor.sender.address == str(result.sender), seed
        assert [one.address for one in editor.recipients] == [
            str(one) for one in result.recipients
        ], seed
        for action in result.actions_for(dialect):
            counts[type(action).__name__] = counts.get(type(action).__name__, 0) + 1
    # Each kind of action was among them, many times.
    assert len(counts) == 7
    assert min(counts.values()) > 50, counts
