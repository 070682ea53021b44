"""Whole messages: what a filter makes of them, by a scripted filter."""

from __future__ import annotations

import pytest
from support.mta import (
    OK,
    SIMPLE,
    Peer,
    answers,
    frame,
    index,
    optneg,
    scripted,
)

from Milter.mta import (
    Address,
    Client,
    Dialect,
    Header,
    Message,
    SmtpReply,
    Stage,
    Verdict,
)

# --- whole messages against a script ------------------------------------------------------------


def test_send_follows_smtp() -> None:
    with scripted(answers(*[OK] * 11)) as (mta, peer):
        result = mta.send(
            b"A: 1\nB:2\n\tfold\n\nline\n",
            sender=("<a@x>", "SIZE=9"),
            recipients=["b@x", Address("c@x", ("NOTIFY=NEVER",))],
            client=Client("mx.example.com", "192.0.2.1", 25),
            helo="helo.example.com",
            macros={"i": "Q1", "j": "mx", "whatever": "1", "EOH:x": "2", "{msg_id}": "<m>"},
        )
    assert result.verdict is Verdict.CONTINUE
    assert result.stage is Stage.EOM
    assert result.accepted
    assert [packet for packet in peer.seen[1:] if packet[0] != b"D"] == [
        (b"C", b"mx.example.com\x004\0\x19192.0.2.1\0"),
        (b"H", b"helo.example.com\0"),
        (b"M", b"<a@x>\0SIZE=9\0"),
        (b"R", b"<b@x>\0"),
        (b"R", b"<c@x>\0NOTIFY=NEVER\0"),
        (b"T", b""),
        (b"L", b"A\x001\0"),
        (b"L", b"B\x002\n\tfold\0"),
        (b"N", b""),
        (b"B", b"line\r\n"),
        (b"E", b""),
    ]
    assert [data for command, data in peer.seen if command == b"D"] == [
        b"Cj\0mx\0{whatever}\x001\0",
        b"Mi\0Q1\0{mail_addr}\0a@x\0",
        b"R{rcpt_addr}\0b@x\0",
        b"R{rcpt_addr}\0c@x\0",
        b"Nx\x002\0",
        b"E{msg_id}\0<m>\0",
    ]


@pytest.mark.parametrize(
    ("stage", "replies", "commands"),
    [
        (Stage.CONNECT, 0, b"C"),
        (Stage.HELO, 1, b"CH"),
        (Stage.MAIL, 2, b"CHM"),
        (Stage.DATA, 4, b"CHMRT"),
        (Stage.HEADER, 5, b"CHMRTL"),
        (Stage.EOH, 6, b"CHMRTLN"),
        (Stage.BODY, 7, b"CHMRTLNB"),
        (Stage.EOM, 8, b"CHMRTLNBE"),
    ],
)
@pytest.mark.parametrize("verdict", [b"r", b"t", b"a", b"4"])
def test_send_stops_at_a_verdict(
    stage: Stage, replies: int, commands: bytes, verdict: bytes
) -> None:
    with scripted(answers(*[OK] * replies, frame(verdict))) as (mta, peer):
        result = mta.send(SIMPLE, sender="a@x", recipients=["b@x"])
    assert result.stage is stage
    assert result.accepted == (verdict == b"a")
    assert result.recipients == [Address("b@x")]
    assert result.message.as_bytes() == SIMPLE
    assert b"".join(command for command, _ in peer.seen if command not in b"OD") == commands


def test_a_verdict_about_the_connection_holds_for_all_messages() -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg(), frame(b"y", b"554 no\0"))
        assert peer.receive()[0] == b"K"
        peer.answer(*[OK] * 9)
        peer.drain()

    with scripted(script) as (mta, _):
        for _ in range(2):
            result = mta.send(SIMPLE, recipients=["b@x"])
            assert (result.verdict, result.stage) == (Verdict.REJECT, Stage.CONNECT)
            assert result.smtp == SmtpReply(554, None, ("no",))
        mta.quit_nc()
        assert mta.send(SIMPLE, recipients=["b@x"]).stage is Stage.EOM


def test_the_session_is_told_once() -> None:
    with scripted(answers(*[OK] * 16)) as (mta, peer):
        mta.send(SIMPLE, recipients=["b@x"], macros={"j": "mx", "i": "Q1"})
        with pytest.raises(ValueError, match="start of the session"):
            mta.send(SIMPLE, recipients=["b@x"], helo="again")
        with pytest.raises(ValueError, match="start of the session"):
            mta.greet()
        mta.send(SIMPLE, recipients=["b@x"])
    commands = [command for command, _ in peer.seen]
    assert commands.count(b"C") == commands.count(b"H") == 1
    assert commands.count(b"M") == 2
    # The first message's queue id is not the second's.
    assert [data for command, data in peer.seen if data.startswith(b"M")] == [
        b"Mi\0Q1\0{mail_addr}\0\0",
        b"M{mail_addr}\0\0",
    ]


def test_recipients_are_refused_one_by_one() -> None:
    refusals = frame(b"y", b"550 5.1.1 who\0"), frame(b"t")
    with scripted(answers(OK, OK, OK, OK, *refusals, *[OK] * 5)) as (mta, _):
        result = mta.send(SIMPLE, recipients=["b@x", "c@x", "d@x"])
    assert result.accepted
    assert result.recipients == [Address("b@x")]
    assert [(one.recipient.address, one.reply.verdict) for one in result.refused] == [
        ("c@x", Verdict.REJECT),
        ("d@x", Verdict.TEMPFAIL),
    ]


@pytest.mark.parametrize(
    ("replies", "verdict"),
    [
        ([frame(b"y", b"550 5.1.1 who\0"), frame(b"t")], Verdict.TEMPFAIL),
        ([OK, frame(b"d")], Verdict.DISCARD),
    ],
)
def test_a_message_that_ends_at_rcpt_is_aborted(replies: list[bytes], verdict: Verdict) -> None:
    with scripted(answers(OK, OK, OK, *replies, *[OK] * 7)) as (mta, peer):
        result = mta.send(SIMPLE, recipients=["b@x", "c@x"])
        assert (result.verdict, result.stage) == (verdict, Stage.RCPT)
        assert not result.accepted
        assert mta.send(SIMPLE, recipients=["b@x"]).accepted
    commands = b"".join(command for command, _ in peer.seen if command not in b"OD")
    assert commands == b"CHMRRAMRTLNBE"


def test_a_message_accepted_at_rcpt_goes_to_all() -> None:
    with scripted(answers(OK, OK, OK, frame(b"r"), frame(b"a"))) as (mta, _):
        result = mta.send(SIMPLE, recipients=["b@x", "c@x", "d@x"])
    assert (result.verdict, result.stage) == (Verdict.ACCEPT, Stage.RCPT)
    assert result.recipients == [Address("c@x"), Address("d@x")]


def test_recipients_that_the_mta_refuses() -> None:
    rejected = Address("b@x", rejected="550 5.1.1 User unknown")
    with scripted(answers(OK, OK, OK, OK)) as (mta, peer):
        result = mta.send(SIMPLE, recipients=[rejected])
    assert (result.verdict, result.stage) == (Verdict.REJECT, Stage.RCPT)
    assert result.smtp == SmtpReply(550, "5.1.1", ("User unknown",))
    assert [command for command, _ in peer.seen if command not in b"OD"] == [b"C", b"H", b"M", b"A"]
    script = answers(OK, OK, OK, frame(b"r"), *[OK] * 6, negotiation=optneg(steps=0x800))
    with scripted(script) as (mta, peer):
        result = mta.send(SIMPLE, recipients=[rejected, "c@x"])
    assert result.accepted
    assert result.recipients == [Address("c@x")]
    assert [command for command, _ in peer.seen].count(b"R") == 2


def test_the_body_may_end_in_end_of_message() -> None:
    body = b"x" * 65535 * 2
    for size, chunks in [(0, []), (3, []), (65535, []), (65536, [65535]), (131070, [65535])]:
        message = Message([], body[:size])
        with scripted(answers(*[OK] * 9)) as (mta, peer):
            mta.send(message, recipients=["b@x"], body_in_eom=True)
        assert [len(data) for command, data in peer.seen if command == b"B"] == chunks
        assert [len(data) for command, data in peer.seen if command == b"E"] == [size - sum(chunks)]


def test_leading_space_of_header_values() -> None:
    message = b"A: one space\nB:none\nC:  two\nD:\ttab\nE :before\n\n"
    said = frame(b"h", b"X\0 v\0") + frame(b"h", b"Y\0v\0") + frame(b"m", index(1) + b"A\0 w\0")
    untouched = [b"B:none", b"C:  two", b"D:\ttab", b"E :before"]
    for steps, values, changed, added in [
        (0, [b"one space", b"none", b" two", b"\ttab", b"before"], b"A:  w", [b"X:  v", b"Y: v"]),
        (
            1 << 20,
            [b" one space", b"none", b"  two", b"\ttab", b"before"],
            b"A: w",
            [b"X: v", b"Y:v"],
        ),
    ]:
        script = answers(*[OK] * 11, said + OK, negotiation=optneg(steps=steps))
        with scripted(script) as (mta, peer):
            result = mta.send(message, recipients=["b@x"])
        wire = [data.split(b"\0")[1] for command, data in peer.seen if command == b"L"]
        assert wire == values
        lines = result.message.as_bytes(b"\n").splitlines()
        assert lines == [changed, *untouched, *added, b""]
        assert result.message["X"] == ("v" if steps else " v")


def test_modifications_apply_to_the_envelope_and_the_body() -> None:
    said = [
        (b"+", b"<c@x>\0"),
        (b"+", b"C@X\0"),  # the same one
        (b"2", b"<d@x>\0NOTIFY=NEVER ORCPT=rfc822;d@x\0"),
        (b"-", b"a@x\0"),
        (b"-", b"B@X\0"),  # another spelling
        (b"-", b"<nobody@x>\0"),
        (b"-", b"postmaster\0"),
        (b"e", b"<new@x>\0"),
        (b"q", b"first\0"),
        (b"q", b"second\0"),
        (b"b", b"one "),
        (b"h", b"X\0y\0"),
        (b"b", b"two"),
    ]
    script = answers(*[OK] * 10, b"".join(frame(*one) for one in said) + frame(b"a"))
    with scripted(script) as (mta, _):
        recipients = ["a@x", "b@x", "postmaster"]
        result = mta.send(SIMPLE, sender=("s@x", "SIZE=1"), recipients=recipients)
    assert [str(one) for one in result.recipients] == [
        "<b@x>",
        "<c@x>",
        "<d@x> NOTIFY=NEVER ORCPT=rfc822;d@x",
    ]
    assert str(result.sender) == "<new@x> SIZE=1"
    assert result.quarantine == "second"
    assert result.message.body == b"one two"
    assert result.body_replaced
    assert len(result.modifications) == len(said)


def test_a_new_sender_may_bring_its_own_parameters() -> None:
    for data, params in [(b"n@x\0", ("SIZE=1",)), (b"n@x\0RET=HDRS\0", ("RET=HDRS",))]:
        script = answers(*[OK] * 8, frame(b"e", data) + OK)
        with scripted(script) as (mta, _):
            result = mta.send(SIMPLE, sender=("s@x", "SIZE=1"), recipients=["a@x"])
        assert result.sender == Address("n@x", params)


def test_modifications_of_a_refused_message_are_void() -> None:
    said = frame(b"h", b"X\0y\0") + frame(b"+", b"c@x\0") + frame(b"q", b"why\0") + frame(b"r")
    with scripted(answers(*[OK] * 8, said)) as (mta, _):
        result = mta.send(SIMPLE, recipients=["b@x"])
    assert len(result.modifications) == 3
    assert result.quarantine is None
    assert result.recipients == [Address("b@x")]
    assert result.message.as_bytes() == SIMPLE


# --- header edits ---------------------------------------------------------------------------------

HEADERS = b"A: 1\nB: 2\nA: 3\nC: 4\nA: 5\n\n"


def add(name: bytes, value: bytes) -> bytes:
    return frame(b"h", name + b"\0" + value + b"\0")


def insert(number: int, name: bytes, value: bytes) -> bytes:
    return frame(b"i", index(number) + name + b"\0" + value + b"\0")


def change(number: int, name: bytes, value: bytes) -> bytes:
    return frame(b"m", index(number) + name + b"\0" + value + b"\0")


@pytest.mark.parametrize(
    ("edits", "postfix", "sendmail"),
    [
        ([add(b"D", b"x")], "A1 B2 A3 C4 A5 Dx", None),
        ([add(b"A", b"x")], "A1 B2 A3 C4 A5 Ax", "Ax A1 B2 A3 C4 A5"),
        ([insert(0, b"D", b"x")], "Dx A1 B2 A3 C4 A5", None),
        ([insert(1, b"D", b"x")], "A1 Dx B2 A3 C4 A5", None),
        ([insert(5, b"D", b"x")], "A1 B2 A3 C4 A5 Dx", None),
        ([insert(99, b"D", b"x")], "A1 B2 A3 C4 A5 Dx", None),
        ([insert(0, b"D", b"x"), insert(0, b"E", b"y")], "Ey Dx A1 B2 A3 C4 A5", None),
        ([change(1, b"A", b"x")], "Ax B2 A3 C4 A5", None),
        ([change(0, b"A", b"x")], "Ax B2 A3 C4 A5", None),
        ([change(3, b"a", b"x")], "A1 B2 A3 C4 ax", "A1 B2 A3 C4 Ax"),
        ([change(4, b"A", b"x")], "A1 B2 A3 C4 A5 Ax", "Ax A1 B2 A3 C4 A5"),
        ([change(99, b"A", b"x")], "A1 B2 A3 C4 A5 Ax", "Ax A1 B2 A3 C4 A5"),
        ([change(1, b"D", b"x")], "A1 B2 A3 C4 A5 Dx", None),
        ([change(2, b"a", b"")], "A1 B2 C4 A5", None),
        ([change(0, b"a", b"")], "B2 A3 C4 A5", None),
        ([change(4, b"A", b"")], "A1 B2 A3 C4 A5", None),
        # Deleting upwards from the first skips every other one for Postfix only.
        ([change(n, b"A", b"") for n in (1, 2, 3)], "B2 A3 C4", "B2 C4"),
        ([change(n, b"A", b"") for n in (3, 2, 1)], "B2 C4", None),
        ([change(1, b"A", b""), change(1, b"A", b"x")], "B2 Ax C4 A5", "Ax B2 A3 C4 A5"),
        ([change(1, b"A", b""), insert(1, b"D", b"x")], "B2 Dx A3 C4 A5", "Dx B2 A3 C4 A5"),
        ([insert(0, b"A", b"x"), change(1, b"A", b"y")], "Ay A1 B2 A3 C4 A5", None),
        ([insert(0, b"A", b"x"), change(1, b"A", b"")], "A1 B2 A3 C4 A5", None),
    ],
)
def test_header_edits(edits: list[bytes], postfix: str, sendmail: str | None) -> None:
    for dialect, expected in [(Dialect.POSTFIX, postfix), (Dialect.SENDMAIL, sendmail or postfix)]:
        script = answers(*[OK] * 11, b"".join(edits) + OK)
        with scripted(script, dialect=dialect) as (mta, _):
            result = mta.send(HEADERS, recipients=["b@x"])
        found = " ".join((one.name + one.value).decode() for one in result.message.headers)
        assert found == expected, dialect
        # The record of edits tells both what was there and what is.
        before = [edit.before for edit in result.header_edits if edit.before is not None]
        assert b"".join(bytes(one) + b"\n" for one in before) + b"\n" == HEADERS
        assert [e.after for e in result.header_edits if e.after] == result.message.headers


@pytest.mark.parametrize(
    ("edits", "postfix", "sendmail"),
    [
        ([insert(0, b"D", b"x")], "Dx R0 R1 A2", None),
        ([insert(1, b"D", b"x")], "R0 Dx R1 A2", None),
        ([change(1, b"R", b"x")], "R0 Rx A2", None),
        ([change(2, b"R", b"x")], "R0 R1 A2 Rx", "Rx R0 R1 A2"),
        # Its own header is passed over where it is no longer the topmost, too.
        ([insert(0, b"D", b"x"), change(1, b"R", b"y")], "Dx R0 Ry A2", None),
        ([insert(0, b"R", b"x"), change(1, b"R", b"y")], "Ry R0 R1 A2", None),
        ([insert(0, b"R", b"x"), change(2, b"R", b"y")], "Rx R0 Ry A2", None),
    ],
)
def test_header_edits_under_the_own_received(
    edits: list[bytes], postfix: str, sendmail: str | None
) -> None:
    for dialect, expected in [(Dialect.POSTFIX, postfix), (Dialect.SENDMAIL, sendmail or postfix)]:
        script = answers(*[OK] * 8, b"".join(edits) + OK)
        with scripted(script, dialect=dialect) as (mta, peer):
            result = mta.send(
                b"R: 1\nA: 2\n\n", recipients=["b@x"], own_received=Header(b"R", b"0")
            )
        found = " ".join((one.name + one.value).decode() for one in result.message.headers)
        assert found == expected, dialect
        assert [data for command, data in peer.seen if command == b"L"] == [
            b"R\x001\0",
            b"A\x002\0",
        ]


def add_rcpt(address: bytes, *params: bytes) -> bytes:
    return frame(b"2" if params else b"+", b"".join(text + b"\0" for text in (address, *params)))


def delete_rcpt(address: bytes) -> bytes:
    return frame(b"-", address + b"\0")


@pytest.mark.parametrize(
    ("edits", "postfix", "sendmail"),
    [
        ([], "b@x", None),
        ([add_rcpt(b"c@x")], "b@x c@x", None),
        ([add_rcpt(b"<c@x>")], "b@x c@x", None),
        ([add_rcpt(b"<c@x>"), add_rcpt(b"c@x")], "b@x c@x", None),
        # The client's recipients have an ORCPT, the filter's have what it gives them.
        ([add_rcpt(b"<b@x>")], "b@x b@x", "b@x"),
        ([add_rcpt(b"<b@x>", b"orcpt=rfc822;b@x")], "b@x", None),
        ([add_rcpt(b"<c@x>"), add_rcpt(b"<c@x>", b"NOTIFY=NEVER")], "b@x c@x c@x", "b@x c@x"),
        ([add_rcpt(b"<c@x>"), add_rcpt(b"<C@X>")], "b@x c@x", "b@x c@x C@X"),
        ([delete_rcpt(b"b@x")], "", None),
        ([delete_rcpt(b"<b@X>"), delete_rcpt(b"<B@x>")], "b@x", None),
        ([add_rcpt(b"<b@x>"), delete_rcpt(b"<b@x>")], "", None),
        ([add_rcpt(b"<c@x>"), delete_rcpt(b"<c@x>"), add_rcpt(b"<c@x>")], "b@x c@x", None),
    ],
)
def test_recipient_edits(edits: list[bytes], postfix: str, sendmail: str | None) -> None:
    for dialect in Dialect:
        script = answers(*[OK] * 9, b"".join(edits) + OK)
        with scripted(script, dialect=dialect) as (mta, _):
            result = mta.send(SIMPLE, recipients=["b@x", "b@x"])
        expected = postfix if sendmail is None or dialect is Dialect.POSTFIX else sendmail
        assert " ".join(one.address for one in result.recipients) == expected, dialect
