"""A recorded session that is played to a filter again: ``MTA.replay``."""

from __future__ import annotations

import contextlib
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.mta import OK, WAIT, Peer, Script, answers, frame, index, optneg, scripted

from Milter.mta import (
    MTA,
    AddHeader,
    ProtocolError,
    Recording,
    Replay,
    SmtpReply,
    Stage,
    Step,
    Verdict,
)

SESSION = """\
milter-recording 1
mta 0.1 negotiate \\0\\0\\0\\x06\\0\\0\\x01\\xff\\0\\x1f\\xff\\xff
filter 0.2 negotiate \\0\\0\\0\\x06\\0\\0\\x01\\xff\\0\\0\\0\\0
mta 0.3 macros Mi\\0Q1\\0
mta 0.3 mail <a@x>\\0
filter 0.4 continue
mta 0.5 eom
filter 0.6 progress
filter 0.7 addheader X-Date\\0monday\\0
filter 0.8 insheader \\0\\0\\0\\0X-Date\\0monday\\0
filter 0.9 reply 550 5.7.1 no\\0
mta 1.0 quit
filter 1.1 closes
mta 1.2 closes
"""

ADDED = frame(b"h", b"X-Date\0monday\0")
INSERTED = frame(b"i", index(0) + b"X-Date\0monday\0")
REPLY = frame(b"y", b"550 5.7.1 no\0")


def escaped(number: int) -> str:
    """In a recording."""
    return "".join(f"\\x{byte:02x}" for byte in struct.pack("!L", number))


def replay(script: Script, text: str = SESSION, **options: Any) -> Replay:
    """Play a session to a script, which goes on to the end of the connection."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            script(Peer(theirs))

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(serve)
        mta = MTA(ours, offer=None, timeout=options.pop("timeout", WAIT))
        try:
            found = mta.replay(Recording.parse(text.encode()), **options)
        finally:
            mta.close()
        done.result(WAIT)
    return found


def at_eom(*packets: bytes) -> Script:
    """A filter that says this at the end of the message, and ends at QUIT."""

    def script(peer: Peer) -> None:
        peer.answer(optneg(), OK, b"".join(packets))
        with contextlib.suppress(EOFError):
            peer.receive()

    return script


def test_the_same_answers() -> None:
    found = replay(at_eom(ADDED, INSERTED, REPLY))
    assert found.difference is None
    assert [(one.stage, one.verdict) for one in found.replies] == [
        (Stage.MAIL, Verdict.CONTINUE),
        (Stage.EOM, Verdict.REJECT),
    ]
    assert found.replies[1].smtp == SmtpReply(550, "5.7.1", ("no",))
    assert found.replies[1].modifications[0] == AddHeader(b"X-Date", b"monday")


def test_how_often_it_asks_for_time_does_not_matter() -> None:
    progress = frame(b"p")
    found = replay(at_eom(progress, progress, ADDED, progress, INSERTED, REPLY))
    assert found.difference is None
    assert found.replies[1].progress == 3


@pytest.mark.parametrize(
    ("script", "line", "stage", "message", "recorded", "now"),
    [
        (
            answers(negotiation=optneg(version=2)),
            *(3, Stage.NEGOTIATE, 0, "negotiation: version 6", "negotiation: version 2"),
        ),
        (
            answers(frame(b"r")),
            *(6, Stage.MAIL, 1, "continue", "reject"),
        ),
        (
            at_eom(frame(b"h", b"X-Date\0tuesday\0"), INSERTED, REPLY),
            *(9, Stage.EOM, 1, "add header: X-Date: monday", "add header: X-Date: tuesday"),
        ),
        (
            at_eom(ADDED, REPLY),
            *(10, Stage.EOM, 1, "insert header: at 0, X-Date: monday", "reply: 550 5.7.1 no"),
        ),
        (
            at_eom(ADDED, INSERTED, frame(b"y", b"551 5.7.1 no\0")),
            *(11, Stage.EOM, 1, "reply: 550 5.7.1 no", "reply: 551 5.7.1 no"),
        ),
        (
            at_eom(ADDED, INSERTED, REPLY, OK),
            *(13, Stage.QUIT, 1, "closes the connection", "continue"),
        ),
        (
            at_eom(ADDED, INSERTED, REPLY, b"\0\0\0\0"),
            *(13, Stage.QUIT, 1, "closes the connection", "bytes that are no packet"),
        ),
        (
            lambda peer: peer.answer(optneg(), OK),
            *(9, Stage.EOM, 1, "add header: X-Date: monday", "closes the connection"),
        ),
        (
            at_eom(b"\xff\xff\xff\xff"),
            *(9, Stage.EOM, 1, "add header: X-Date: monday", "at nothing"),
        ),
    ],
    ids=["offer", "verdict", "value", "missing", "reply", "more", "noise", "gone", "garbage"],
)
def test_the_first_difference(
    script: Script, line: int, stage: Stage, message: int, recorded: str, now: str
) -> None:
    found = replay(script).difference
    assert found is not None
    assert (found.line, found.stage, found.message) == (line, stage, message)
    assert found.recorded.startswith(recorded)
    if now == "at nothing":
        assert "a packet of 4294967295 bytes" in found.now
    else:
        assert found.now.startswith(now)


def test_the_answer_that_differs_is_heard_out() -> None:
    text = SESSION.replace("filter 0.9 reply 550 5.7.1 no\\0", "filter 0.9 continue")
    more = frame(b"q", b"odd\0")
    found = replay(at_eom(ADDED, INSERTED, more, frame(b"p"), more, frame(b"d")), text)
    assert found.difference is not None
    assert (found.difference.recorded, found.difference.now) == ("continue", "quarantine: odd")
    last = found.replies[-1]
    assert (last.stage, last.verdict, len(last.modifications)) == (Stage.EOM, Verdict.DISCARD, 4)


@pytest.mark.parametrize(
    ("then", "now", "script", "differences"),
    [
        # Other actions, and another list of macros.
        (0, optneg(actions=1, rest=struct.pack("!L", 3) + b"i\0"), [OK], []),
        # MAIL is not wanted any more; nor answered; is answered now.
        (0, optneg(steps=Step.NOMAIL), [], []),
        (0, optneg(steps=Step.NR_MAIL), [b""], []),
        (Step.NR_MAIL, optneg(), [OK], []),
        (Step.NR_MAIL, optneg(), [frame(b"r")], [("no answer", "reject")]),
        # Verdicts that it understands, and recipients that it is told of.
        (Step.SKIP, optneg(steps=Step.RCPT_REJ), [OK], []),
    ],
    ids=["actions", "unwanted", "silent", "answered", "rejected", "skip"],
)
def test_the_rest_is_played_after_another_negotiation(
    then: int, now: bytes, script: list[bytes], differences: list[tuple[str, str]]
) -> None:
    text = SESSION.replace("\\xff\\0\\0\\0\\0\n", f"\\xff{escaped(then)}\n")
    if then & Step.NR_MAIL:
        text = text.replace("filter 0.4 continue\n", "")

    def play(peer: Peer) -> None:
        with contextlib.suppress(EOFError):
            peer.answer(now, *script, ADDED + INSERTED + REPLY)
            peer.receive()

    found = replay(play, text)
    assert found.difference is not None
    assert (found.difference.stage, found.difference.goes_on) == (Stage.NEGOTIATE, True)
    assert [(each.recorded, each.now) for each in found.differences[1:]] == differences
    found = replay(play, text, ignore_negotiation=True)
    assert [(each.recorded, each.now) for each in found.differences] == differences


@pytest.mark.parametrize(
    ("then", "now", "why"),
    [
        (0, optneg(version=2), "the MTA would speak another version of the protocol"),
        (
            Step.NOHELO | Step.NODATA | Step.NOUNKNOWN,
            optneg(),
            "the filter wants HELO, DATA now, which the MTA did not send then",
        ),
        (
            0,
            optneg(steps=Step.HDR_LEADSPC),
            "the MTA would send other blanks before the values of headers",
        ),
        (
            Step.RCPT_REJ,
            optneg(),
            "the MTA would not send recipients that it refused itself",
        ),
    ],
)
def test_the_rest_cannot_be_played(then: int, now: bytes, why: str) -> None:
    text = SESSION.replace("\\xff\\0\\0\\0\\0\n", f"\\xff{escaped(then)}\n")
    for options in ({}, {"ignore_negotiation": True}):
        (found,) = replay(answers(negotiation=now), text, **options).differences
        assert not found.goes_on
        assert str(found).endswith(
            f"\n  the rest is not played, as {why}: record such a session anew"
        )


def test_a_difference_in_words() -> None:
    found = replay(at_eom(ADDED, OK))
    assert str(found.difference) == (
        "line 10, at end of message of message 1\n"
        "  recorded  insert header: at 0, X-Date: monday\n"
        "  now       continue"
    )


def test_a_filter_that_says_nothing() -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg())
        peer.drain()

    found = replay(script, timeout=0.1).difference
    assert found is not None
    assert (found.line, found.now) == (6, "nothing within 0.1 s")


def test_a_filter_that_stays() -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg(), OK, ADDED + INSERTED + REPLY)
        peer.receive()
        peer.drain()

    text = SESSION.replace("mta 1.2 closes\n", "")
    found = replay(script, text, timeout=0.2).difference
    assert found is not None
    assert (found.line, found.now) == (13, "the connection stays open")


def test_headers_whose_values_may_differ() -> None:
    script = at_eom(
        frame(b"h", b"X-Date\0tuesday\0"), frame(b"i", index(0) + b"X-Date\0wednesday\0"), REPLY
    )
    assert replay(script, ignored_headers=["x-date"]).difference is None
    # Its place and its name are no values.
    script = at_eom(ADDED, frame(b"i", index(1) + b"X-Date\0monday\0"), REPLY)
    found = replay(script, ignored_headers=["x-date"]).difference
    assert found is not None
    assert found.line == 10
    # That it is deleted is more than another value.
    text = SESSION.replace("insheader", "chgheader")
    script = at_eom(ADDED, frame(b"m", index(0) + b"X-Date\0\0"), REPLY)
    found = replay(script, text, ignored_headers=["X-Date"]).difference
    assert found is not None
    assert found.now == "change header: number 0, X-Date is deleted"


def test_what_comes_after_the_cut_is_not_compared() -> None:
    text = SESSION[: SESSION.index("filter 0.9")] + "cut 0.9\n"

    def script(peer: Peer) -> None:
        peer.answer(optneg(), OK, ADDED + INSERTED)
        peer.drain()

    assert replay(script, text).difference is None


def test_bytes_that_are_no_packets_are_said_again() -> None:
    text = "milter-recording 1\nmta 0.1 raw \\0\\0\\0\\0abc\nfilter 0.2 closes\nmta 0.3 closes\n"
    seen = bytearray()

    def script(peer: Peer) -> None:
        seen.extend(peer._exactly(7))

    assert replay(script, text).difference is None
    assert seen == b"\0\0\0\0abc"


def test_an_mta_that_hangs_up_does_so_again() -> None:
    text = SESSION[: SESSION.index("mta 0.5")] + "mta 0.5 closes\nfilter 0.6 closes\n"
    ends = []

    def script(peer: Peer) -> None:
        peer.answer(optneg(), OK)
        with pytest.raises(EOFError):
            peer.receive()
        ends.append("seen")

    assert replay(script, text).difference is None
    assert ends == ["seen"]


def test_messages_are_counted() -> None:
    text = SESSION.replace(
        "mta 1.0", "mta 0.9 macros Mi\\0Q2\\0\nmta 0.9 mail <a@x>\\0\nfilter 0.9 continue\nmta 1.0"
    )

    def script(peer: Peer) -> None:
        peer.answer(optneg(), OK, ADDED + INSERTED + REPLY, frame(b"t"))
        peer.drain()

    found = replay(script, text).difference
    assert found is not None
    assert (found.message, found.now) == (2, "tempfail")


def test_what_no_mta_understands_is_no_reply() -> None:
    text = SESSION.replace("filter 0.4 continue", "filter 0.4 0x7a")
    found = replay(answers(frame(b"z"), ADDED + INSERTED + REPLY), text, timeout=0.5)
    with pytest.raises(ProtocolError, match="is no answer to this step"):
        _ = found.replies


def test_replay_needs_a_connection_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "case.milter"
    path.write_text(SESSION)
    with scripted(answers()) as (mta, _), pytest.raises(ValueError) as caught:
        mta.replay(path)
    assert str(caught.value) == "replay needs a connection without negotiation: offer=None"
