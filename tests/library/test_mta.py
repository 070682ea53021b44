"""The MTA's side, strict against a scripted filter.

test_mta_messages has whole messages, test_mta_libmilter the proof that libmilter sees it likewise.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.mta import (
    OK,
    SIMPLE,
    WAIT,
    Peer,
    answers,
    frame,
    index,
    optneg,
    scripted,
)

from Milter.mta import (
    CURRENT_STEPS,
    MTA,
    Action,
    AddHeader,
    AddRecipient,
    Address,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    Dialect,
    Family,
    FilterClosed,
    FilterTimeout,
    FilterUnreachable,
    InsertHeader,
    Message,
    MTAError,
    NegotiationError,
    Offer,
    Packet,
    ProtocolError,
    Quarantine,
    ReplaceBody,
    SmtpReply,
    Stage,
    Step,
    Verdict,
    flag_names,
    parse_socket,
)


def violation(said: str) -> AbstractContextManager[pytest.ExceptionInfo[ProtocolError]]:
    return pytest.raises(ProtocolError, match=said)


def late(said: str) -> AbstractContextManager[pytest.ExceptionInfo[FilterTimeout]]:
    return pytest.raises(FilterTimeout, match=said)


# --- negotiation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OK, "SMFIR_CONTINUE instead of SMFIC_OPTNEG"),
        (frame(b"O"), "0 bytes"),
        (frame(b"O", bytes(11)), "11 bytes"),
        (optneg(version=1), "version 1 to an offer of 6"),
        (optneg(version=0), "version 0"),
        (optneg(version=7), "version 7"),
        (optneg(actions=0x200), "actions that were not offered: 0x200"),
        (optneg(steps=0x200000), "steps that were not offered: 0x200000"),
        (optneg(rest=b"\0\0\0"), "without a stage"),
        (optneg(rest=index(7) + b"i\0"), "stage number 7"),
        (optneg(rest=index(0) + b"i j"), "does not end in NUL"),
        (optneg(rest=index(0) + b"i\0" + index(0) + b"j\0"), "connect twice"),
        (optneg() + OK, "goes on after its answer"),
        (frame(b"p") + optneg(), "SMFIR_PROGRESS"),
    ],
)
def test_negotiation_violations(answer: bytes, said: str) -> None:
    with pytest.raises(ProtocolError) as caught, scripted(answers(negotiation=answer)):
        pass
    assert said in str(caught.value)
    assert caught.value.stage is Stage.NEGOTIATE
    assert caught.value.received


def test_negotiation_holds_to_each_offer() -> None:
    offer = Offer(4, Action.ADDHDRS | Action.CHGHDRS, Step.NOHELO | Step.NOBODY)
    for answer, said in [
        (optneg(6, 0, 0), "version 6 to an offer of 4"),
        (optneg(4, Action.ADDHDRS | Action.CHGBODY, 0), "CHGBODY"),
        (optneg(4, 0, Step.NOHELO | Step.SKIP | Step.NR_HDR), "NR_HDR, SKIP"),
        (optneg(4, 0, 0, index(1) + b"i\0"), "SETSYMLIST was not offered"),
    ]:
        script = answers(negotiation=answer)
        with pytest.raises(NegotiationError, match=said), scripted(script, offer=offer):
            pass
    with scripted(answers(negotiation=optneg(2, 1, 1 << 4)), offer=offer) as (mta, peer):
        assert (mta.negotiated.version, mta.negotiated.actions) == (2, Action.ADDHDRS)
        assert mta.negotiated.steps == Step.NOBODY
    assert peer.seen == [(b"O", struct.pack("!LLL", 4, 0x11, 0x12))]


def test_an_empty_offer_stands_for_version_1() -> None:
    offer = Offer(2, Action.NONE, Step.NONE)
    with scripted(answers(negotiation=optneg(2, 0xF, 0x3F)), offer=offer) as (mta, _):
        assert flag_names(mta.negotiated.actions) == ["ADDHDRS", "CHGBODY", "ADDRCPT", "DELRCPT"]
    for answer in (optneg(2, 0x10, 0), optneg(2, 0, 0x40)):
        with pytest.raises(NegotiationError), scripted(answers(negotiation=answer), offer=offer):
            pass


@pytest.mark.parametrize(
    ("version", "actions", "steps"),
    [(2, 0x3F, 0x7F), (3, 0x3F, 0x17F), (4, 0x3F, 0x37F), (5, 0x3F, 0x37F), (6, 0x1FF, 0x1FFFFF)],
)
def test_what_each_version_offers(version: int, actions: int, steps: int) -> None:
    assert Offer.for_version(version) == Offer(version, Action(actions), Step(steps))


@pytest.mark.parametrize("version", [0, 1, 7])
def test_other_versions_are_refused(version: int) -> None:
    with pytest.raises(ValueError, match=f"version {version} "):
        Offer.for_version(version)


def test_symlists_are_parsed() -> None:
    rest = index(0) + b"j {client_addr}\0" + index(5) + b"{msg_id},i\0" + index(6) + b"\0"
    with scripted(answers(negotiation=optneg(rest=rest))) as (mta, _):
        assert dict(mta.negotiated.macros) == {
            Stage.CONNECT: ("j", "{client_addr}"),
            Stage.EOM: ("{msg_id}", "i"),
            Stage.EOH: (),
        }


def test_flag_names_show_bits_without_a_name() -> None:
    assert flag_names(Step(0x400 | 0x4000000)) == ["SKIP", "0x4000000"]
    assert flag_names(Action.NONE) == []


# --- answers ------------------------------------------------------------------------------------


def mail(mta: MTA) -> object:
    return mta.mail("<a@example.com>")


def eom(mta: MTA) -> object:
    return mta.eom()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (frame(b"z"), r"b'z' is no answer to this step"),
        (frame(b"O", bytes(12)), "SMFIC_OPTNEG is no answer"),
        (frame(b"l", b"x\0"), "SMFIR_SETSYMLIST is no answer"),
        (frame(b"c", b"\0"), "SMFIR_CONTINUE with 1 bytes of data"),
        (frame(b"a", b"x"), "SMFIR_ACCEPT with 1 bytes"),
        (frame(b"p", b"x") + OK, "SMFIR_PROGRESS with 1 bytes"),
        (OK + OK, "goes on after its answer"),
        (OK + b"\0", "goes on after its answer"),
        (frame(b"h", b"X\0y\0") + OK, "SMFIR_ADDHEADER outside of the end of message"),
        (frame(b"q", b"why\0") + OK, "SMFIR_QUARANTINE outside of the end of message"),
        (frame(b"s"), "SMFIR_SKIP without SKIP"),
        (b"\0\0\0\0", "without a command"),
        (b"\xff\xff\xff\xff", "a packet of 4294967295 bytes"),
        (b"220 mail.example.com ESMTP\r\n", "a packet of"),
    ],
)
def test_violations_at_mail(answer: bytes, said: str) -> None:
    with scripted(answers(answer)) as (mta, _), violation(said) as caught:
        mail(mta)
    assert caught.value.stage is Stage.MAIL
    assert caught.value.received
    assert "at MAIL" in str(caught.value)


@pytest.mark.parametrize("step", [lambda mta: mta.connect_info(), lambda mta: mta.helo("x")])
def test_discard_before_there_is_a_message(step: Callable[[MTA], object]) -> None:
    with scripted(answers(frame(b"d"))) as (mta, _), pytest.raises(ProtocolError, match="before"):
        step(mta)


@pytest.mark.parametrize(
    ("reply", "code", "xcode", "lines"),
    [
        (b"550 5.7.1 go away", 550, "5.7.1", ("go away",)),
        (b"451 come back", 451, None, ("come back",)),
        (b"550 ", 550, None, ("",)),
        (b"550 5.7.1", 550, "5.7.1", ("",)),
        (b"450-4.2.1 one\r\n450-4.2.1 \r\n450 4.2.1 three", 450, "4.2.1", ("one", "", "three")),
        (b"554-5.0.0 one\r\n554 two", 554, None, ("5.0.0 one", "two")),
        (b"550 100%% sure", 550, None, ("100% sure",)),
        (b"550 5.7.1 gr\xc3\xbc\xdfe", 550, "5.7.1", ("gr\u00fc\udcdfe",)),
        (b"550 4.7.1 class differs", 550, "4.7.1", ("class differs",)),
        (b"550-" + b"\r\n550-".join([b"x"] * 31) + b"\r\n550 x", 550, None, ("x",) * 32),
    ],
)
def test_reply_codes(reply: bytes, code: int, xcode: str | None, lines: tuple[str, ...]) -> None:
    with scripted(answers(frame(b"y", reply + b"\0"))) as (mta, _):
        answer = mta.rcpt("<b@example.org>")
    assert answer.verdict is (Verdict.TEMPFAIL if code < 500 else Verdict.REJECT)
    assert answer.smtp == SmtpReply(code, xcode, lines)
    assert answer.smtp.text == "\n".join(lines)


def test_a_reply_reads_as_smtp() -> None:
    assert str(SmtpReply(550, "5.7.1", ("one", "two"))) == "550-5.7.1 one\n550 5.7.1 two"
    assert str(SmtpReply(451, None, ("",))) == "451"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"550 5.7.1 no NUL", "does not end in NUL"),
        (b"550 one\0two\0", "2 strings instead of 1"),
        (b"\0", "no SMTP reply"),
        (b"55\0", "no SMTP reply"),
        (b"250 fine\0", "no SMTP reply"),
        (b"350 go on\0", "no SMTP reply"),
        (b"5a0 x\0", "no SMTP reply"),
        (b"550\0", "no SMTP reply"),
        (b"550text\0", "no SMTP reply"),
        (b"550-5.7.1 only\0", "says another follows"),
        (b"550 one\r\n550 two\0", "says it is the last"),
        (b"550-one\r\n551 two\0", "changes its code"),
        (b"550-one\r\ntwo\0", "no SMTP reply"),
        (b"550-one\n550 two\0", "no SMTP reply"),
        (b"550 one\r\n\0", "says it is the last|no SMTP reply"),
        (b"550 100% sure\0", "single %"),
        (b"550 100%%% sure\0", "single %"),
        (b"550 " + b"x" * 981 + b"\0", "more than 980"),
        (b"550-" + b"\r\n550-".join([b"x"] * 32) + b"\r\n550 x\0", "33 lines"),
    ],
)
def test_malformed_reply_codes(reply: bytes, said: str) -> None:
    with scripted(answers(frame(b"y", reply))) as (mta, _), violation(said):
        mail(mta)


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (b"c", Verdict.CONTINUE),
        (b"a", Verdict.ACCEPT),
        (b"r", Verdict.REJECT),
        (b"t", Verdict.TEMPFAIL),
        (b"d", Verdict.DISCARD),
        (b"4", Verdict.SHUTDOWN),
        (b"f", Verdict.CONN_FAIL),
    ],
)
def test_verdicts(command: bytes, verdict: Verdict) -> None:
    with scripted(answers(frame(command))) as (mta, _):
        reply = mta.data()
    assert (reply.stage, reply.verdict, reply.smtp) == (Stage.DATA, verdict, None)


def test_packets_may_come_in_any_pieces() -> None:
    whole = frame(b"p") + frame(b"h", b"X-A\0b\0") + frame(b"y", b"550 no\0")

    def script(peer: Peer) -> None:
        peer.answer(optneg())
        peer.command()
        for byte in whole:
            peer.send(bytes([byte]))
            time.sleep(0.001)
        peer.drain()

    with scripted(script) as (mta, _):
        reply = mta.eom()
    assert reply.progress == 1
    assert reply.modifications == (AddHeader(b"X-A", b"b"),)
    assert reply.smtp == SmtpReply(550, None, ("no",))


# --- modifications --------------------------------------------------------------------------------

MODIFICATIONS = [
    (b"h", b"X-A\0value\0", AddHeader(b"X-A", b"value"), Action.ADDHDRS),
    (b"h", b"X\xff\0\xfe\n\ta\r\n b\0", AddHeader(b"X\xff", b"\xfe\n\ta\r\n b"), Action.ADDHDRS),
    (b"h", b"X-A\0\0", AddHeader(b"X-A", b""), Action.ADDHDRS),
    (b"i", index(0) + b"X-A\0v\0", InsertHeader(0, b"X-A", b"v"), Action.ADDHDRS),
    (b"m", index(2) + b"X-A\0v\0", ChangeHeader(2, b"X-A", b"v"), Action.CHGHDRS),
    (b"m", index(0) + b"X-A\0\0", ChangeHeader(0, b"X-A", b""), Action.CHGHDRS),
    (b"+", b"<b@x>\0", AddRecipient("<b@x>"), Action.ADDRCPT),
    (b"2", b"<b@x>\0", AddRecipient("<b@x>", None, True), Action.ADDRCPT_PAR),
    (
        b"2",
        b"<b@x>\0NOTIFY=NEVER\0",
        AddRecipient("<b@x>", "NOTIFY=NEVER", True),
        Action.ADDRCPT_PAR,
    ),
    (b"-", b"<b\xff@x>\0", DeleteRecipient("<b\udcff@x>"), Action.DELRCPT),
    (b"e", b"<>\0", ChangeSender("<>"), Action.CHGFROM),
    (b"e", b"<a@x>\0SIZE=1\0", ChangeSender("<a@x>", "SIZE=1"), Action.CHGFROM),
    (b"b", b"", ReplaceBody(b""), Action.CHGBODY),
    (b"b", b"x\0\xff\r\n", ReplaceBody(b"x\0\xff\r\n"), Action.CHGBODY),
    (b"b", b"x" * 65535, ReplaceBody(b"x" * 65535), Action.CHGBODY),
    (b"q", b"looks odd\0", Quarantine("looks odd"), Action.QUARANTINE),
]


@pytest.mark.parametrize(("command", "data", "expected", "action"), MODIFICATIONS)
def test_modifications(command: bytes, data: bytes, expected: object, action: Action) -> None:
    said = frame(command, data) + OK
    with scripted(answers(said, negotiation=optneg(actions=int(action)))) as (mta, _):
        (found,) = mta.eom().modifications
    assert found == expected
    without = optneg(actions=0x1FF & ~int(action))
    with (
        scripted(answers(said, negotiation=without)) as (mta, _),
        violation(f"without {action.name}"),
    ):
        mta.eom()
    with scripted(answers(said)) as (mta, _), pytest.raises(ProtocolError, match="outside"):
        mta.body(b"x")


@pytest.mark.parametrize(
    ("command", "data", "said"),
    [
        (b"h", b"", "does not end in NUL"),
        (b"h", b"X-A\0value", "does not end in NUL"),
        (b"h", b"X-A\0", "1 strings instead of 2"),
        (b"h", b"X-A\0v\0w\0", "3 strings instead of 2"),
        (b"h", b"\0value\0", "header name b''"),
        (b"h", b"X A\0value\0", "header name b'X A'"),
        (b"h", b"X-A:\0value\0", "header name"),
        (b"h", b"X\n-A\0value\0", "header name"),
        (b"h", b"X-A\0one\nX-Evil: two\0", "no fold"),
        (b"h", b"X-A\0one\r two\0", "no fold"),
        (b"h", b"X-A\0one\rtwo\0", "no fold"),
        (b"h", b"X-A\0one\r\n\0", "no fold"),
        (b"i", b"\0\0\0", "too short for an index"),
        (b"i", index(-1) + b"X\0v\0", "index -1"),
        (b"i", index(1) + b"X\0v", "does not end in NUL"),
        (b"m", b"X-A\0v\0", "header name|strings|index"),
        (b"m", index(1) + b"X\0", "1 strings"),
        (b"+", b"", "does not end in NUL"),
        (b"+", b"\0", "empty address"),
        (b"+", b"<b@x>", "does not end in NUL"),
        (b"+", b"<b@x>\0NOTIFY=NEVER\0", "2 strings instead of 1"),
        (b"+", b"<b@x>\r\nDATA\0", "line end"),
        (b"2", b"<b@x>\0A\0B\0", "3 strings instead of 1 or 2"),
        (b"2", b"<b@x>\0A\nB\0", "line end"),
        (b"-", b"\0", "empty address"),
        (b"e", b"\0", "empty address"),
        (b"e", b"<a@x>\0A", "does not end in NUL"),
        (b"b", b"x" * 65536, "more than 65535"),
        (b"q", b"", "does not end in NUL"),
        (b"q", b"\0", "empty reason"),
        (b"q", b"a\0b\0", "2 strings"),
        (b"s", b"", "without SKIP"),
    ],
)
def test_malformed_modifications(command: bytes, data: bytes, said: str) -> None:
    with scripted(answers(frame(command, data) + OK)) as (mta, _), violation(said) as caught:
        mta.eom()
    assert caught.value.stage is Stage.EOM
    assert caught.value.received == frame(command, data)


# --- time, and the end of the connection ------------------------------------------------------


@contextlib.contextmanager
def takes(least: float, most: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert least <= time.monotonic() - start < most


@pytest.mark.parametrize("part", [b"", b"\0", OK[:4], frame(b"y", b"550 not all of it")[:12]])
def test_a_missing_answer(part: bytes) -> None:
    with (
        scripted(answers(part), timeout=0.2) as (mta, _),
        takes(0.2, 5),
        late(r"within 0\.2 s") as caught,
    ):
        mail(mta)
    assert caught.value.received == part
    assert isinstance(caught.value, TimeoutError)


def test_dripping_bytes_do_not_put_off_the_timeout() -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg())
        peer.command()
        for byte in frame(b"y", b"550 " + b"x" * 2000):
            peer.send(bytes([byte]))
            time.sleep(0.01)

    with scripted(script, timeout=0.3) as (mta, _), takes(0.3, 15), late("no complete answer"):
        mail(mta)


def test_progress_starts_the_wait_anew() -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg())
        peer.command()
        for _ in range(8):
            time.sleep(0.2)
            peer.send(frame(b"p"))
        peer.send(OK)
        peer.drain()

    with scripted(script, timeout=1.5) as (mta, _), takes(1.6, 15):
        assert mta.eom().progress == 8


def test_progress_without_end_is_bounded() -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg())
        peer.command()
        while True:
            peer.send(frame(b"p"))

    with scripted(script, total_timeout=0.3) as (mta, _), takes(0.3, 5), late(r"within 0\.3 s"):
        mta.eom()


def test_a_filter_that_does_not_read() -> None:
    done = threading.Event()

    def script(peer: Peer) -> None:
        peer.answer(optneg(steps=int(Step.NR_BODY)))
        done.wait(WAIT)

    with scripted(script, timeout=0.2) as (mta, _):
        with takes(0.2, 5), pytest.raises(FilterTimeout, match="did not read"):
            mta.body(b"x" * 4_000_000)
        done.set()


@pytest.mark.parametrize(("part", "where"), [(b"", ""), (OK[:3], "in the middle of a packet")])
def test_a_filter_that_hangs_up(part: bytes, where: str) -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg(), part)

    with scripted(script) as (mta, _):
        with pytest.raises(FilterClosed, match=f"closed the connection {where}".strip()) as caught:
            mail(mta)
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.stage is Stage.MAIL
        with pytest.raises(FilterClosed):
            mta.helo("x")
    with pytest.raises(FilterClosed, match="is closed"):
        mta.helo("x")


def test_writing_to_a_filter_that_has_hung_up() -> None:
    with scripted(lambda peer: peer.answer(optneg())) as (mta, _):
        assert mta.expect_close() is None
        with pytest.raises(FilterClosed, match="cannot write to the filter: Broken pipe"):
            mta.send_raw(b"x")


def test_progress_packets_belong_to_the_end_of_message_for_sendmail() -> None:
    said = frame(b"p") + OK
    with scripted(answers(said, said), dialect=Dialect.SENDMAIL) as (mta, _):
        assert mta.eom().progress == 1
        with pytest.raises(ProtocolError, match="SMFIR_PROGRESS outside"):
            mail(mta)
    with scripted(answers(said)) as (mta, _):
        assert mta.mail("<>").progress == 1


def test_quit_reads_to_the_end() -> None:
    def stray(peer: Peer) -> None:
        peer.answer(optneg(), OK)
        peer.receive()
        peer.send(OK)

    with scripted(stray) as (mta, peer), pytest.raises(ProtocolError, match="nothing was due"):
        mail(mta)
        mta.quit()
    assert peer.seen[-1] == (b"Q", b"")
    with scripted(stray) as (mta, _):
        with violation("nothing was due"), mta:
            mail(mta)
        with pytest.raises(FilterClosed, match="the connection to the filter is closed"):
            mail(mta)
    # An exception on the way out is not hidden by what quit() would find.
    with scripted(stray) as (mta, _), pytest.raises(KeyError), mta:
        raise KeyError


def test_quit_waits_for_the_close() -> None:
    with scripted(answers()) as (mta, _), takes(0.2, 5), late(r"close the connection within 0\.2"):
        mta.quit(timeout=0.2)
    with scripted(lambda peer: peer.answer(optneg(), b"")) as (mta, _):
        mta.quit()
        mta.close()


def test_expect_nothing_waits_for_what_must_not_come() -> None:
    release = threading.Event()

    def script(peer: Peer) -> None:
        peer.answer(optneg())
        release.wait(WAIT)
        peer.send(OK)
        peer.drain()

    with scripted(script) as (mta, _):
        mta.expect_nothing()
        with takes(0.1, 5):
            mta.expect_nothing(0.1)
        release.set()
        with takes(0, 5), pytest.raises(ProtocolError, match="nothing was due"):
            mta.expect_nothing(WAIT)
        # It is still there, and stops the next step from taking it for its answer.
        with pytest.raises(ProtocolError, match="nothing was due"):
            mail(mta)


# --- steps that are not sent, not answered, or cut short ---------------------------------------

STEPS: list[tuple[Stage, Step, Step, Callable[[MTA], object]]] = [
    (Stage.CONNECT, Step.NOCONNECT, Step.NR_CONN, lambda mta: mta.connect_info()),
    (Stage.HELO, Step.NOHELO, Step.NR_HELO, lambda mta: mta.helo("x")),
    (Stage.MAIL, Step.NOMAIL, Step.NR_MAIL, lambda mta: mta.mail("<a@x>")),
    (Stage.RCPT, Step.NORCPT, Step.NR_RCPT, lambda mta: mta.rcpt("<b@x>")),
    (Stage.DATA, Step.NODATA, Step.NR_DATA, lambda mta: mta.data()),
    (Stage.HEADER, Step.NOHDRS, Step.NR_HDR, lambda mta: mta.header("A", "b")),
    (Stage.EOH, Step.NOEOH, Step.NR_EOH, lambda mta: mta.eoh()),
    (Stage.BODY, Step.NOBODY, Step.NR_BODY, lambda mta: mta.body(b"x")),
    (Stage.UNKNOWN, Step.NOUNKNOWN, Step.NR_UNKN, lambda mta: mta.unknown("XYZZY")),
]


@pytest.mark.parametrize(("stage", "no_step", "no_reply", "step"), STEPS)
def test_steps_not_wanted(
    stage: Stage, no_step: Step, no_reply: Step, step: Callable[[MTA], object]
) -> None:
    def script(peer: Peer, steps: Step) -> None:
        peer.answer(optneg(steps=int(steps)))
        if steps == no_reply:
            assert peer.command()[0] == stage.value
        peer.answer(frame(b"a"))
        peer.receive()

    with scripted(lambda peer: script(peer, no_step)) as (mta, peer), mta:
        assert step(mta).verdict is Verdict.NOT_SENT  # type: ignore[attr-defined]
        assert mta.eom().verdict is Verdict.ACCEPT
    assert [command for command, _ in peer.seen] == [b"O", b"E", b"Q"]

    with scripted(lambda peer: script(peer, no_reply)) as (mta, peer), mta:
        assert step(mta).verdict is Verdict.NO_REPLY  # type: ignore[attr-defined]
        assert mta.eom().verdict is Verdict.ACCEPT
    assert [command for command, _ in peer.seen] == [b"O", stage.value, b"E", b"Q"]


@pytest.mark.parametrize(("stage", "no_step", "no_reply", "step"), STEPS)
def test_an_answer_where_silence_was_agreed(
    stage: Stage, no_step: Step, no_reply: Step, step: Callable[[MTA], object]
) -> None:
    with scripted(answers(OK, negotiation=optneg(steps=int(no_reply)))) as (mta, _):
        step(mta)
        with pytest.raises(ProtocolError, match="nothing was due") as caught:
            mta.expect_nothing(WAIT)
    assert caught.value.stage is stage
    assert caught.value.received == OK


def test_old_versions_lack_commands() -> None:
    for version, names in [(2, b"OE"), (3, b"OUE"), (4, b"OUTE"), (5, b"OUTE"), (6, b"OUTE")]:
        script = answers(OK, OK, OK, negotiation=optneg(version=version, actions=0))
        with scripted(script, offer=Offer.for_version(6)) as (mta, peer):
            sent = {step.verdict for step in (mta.unknown("X"), mta.data(), mta.eom())}
            if version < 6:
                with pytest.raises(ValueError, match="version 6"):
                    mta.quit_nc()
        assert (Verdict.NOT_SENT in sent) == (version < 4)
        assert b"".join(command for command, _ in peer.seen) == names


def test_skip_ends_the_body() -> None:
    body = b"x" * (65535 * 3)
    script = answers(OK, OK, frame(b"s"), OK, OK, OK, negotiation=optneg(steps=int(Step.SKIP)))
    with scripted(script) as (mta, peer):
        mail(mta)
        assert mta.body(body).verdict is Verdict.SKIP
        assert mta.body(b"more").verdict is Verdict.NOT_SENT
        assert mta.eom().verdict is Verdict.CONTINUE
        mail(mta)
        assert mta.body(b"next message").verdict is Verdict.CONTINUE
    assert [(command, len(data)) for command, data in peer.seen[2:4]] == [(b"B", 65535)] * 2


@pytest.mark.parametrize(
    ("dialect", "allowed"),
    [
        (Dialect.POSTFIX, {Stage.RCPT, Stage.HEADER, Stage.BODY, Stage.UNKNOWN}),
        (Dialect.SENDMAIL, {Stage.BODY}),
    ],
)
@pytest.mark.parametrize(("stage", "no_step", "no_reply", "step"), STEPS)
def test_where_skip_is_allowed(
    dialect: Dialect,
    allowed: set[Stage],
    stage: Stage,
    no_step: Step,
    no_reply: Step,
    step: Callable[[MTA], object],
) -> None:
    script = answers(frame(b"s"), negotiation=optneg(steps=int(Step.SKIP)))
    with scripted(script, dialect=dialect) as (mta, _):
        if stage in allowed:
            assert step(mta).verdict is Verdict.SKIP  # type: ignore[attr-defined]
        else:
            with pytest.raises(ProtocolError, match="SMFIR_SKIP is no answer"):
                step(mta)


# --- what goes over the wire -------------------------------------------------------------------


def sent(
    work: Callable[[MTA], object], count: int = 1, **negotiation: int | bytes
) -> list[tuple[bytes, bytes]]:
    """The packets that *work* sends, each command answered with CONTINUE."""
    script = answers(*[OK] * count, negotiation=optneg(**negotiation))  # type: ignore[arg-type]
    with scripted(script) as (mta, peer):
        work(mta)
    return peer.seen[1:]


@pytest.mark.parametrize(
    ("work", "packets"),
    [
        (
            lambda mta: mta.connect_info("mx", "192.0.2.1", 25),
            [(b"C", b"mx\x004\0\x19192.0.2.1\0")],
        ),
        (
            lambda mta: mta.connect_info("mx", "2001:db8::1", 65535),
            [(b"C", b"mx\x006\xff\xff2001:db8::1\0")],
        ),
        (
            lambda mta: mta.connect_info("mx", "IPv6:2001:db8::1"),
            [(b"C", b"mx\x006\0\0IPv6:2001:db8::1\0")],
        ),
        (lambda mta: mta.connect_info("mx", "/run/x"), [(b"C", b"mx\0L\0\0/run/x\0")]),
        (lambda mta: mta.connect_info(b"m\xff", None), [(b"C", b"m\xff\0U")]),
        (
            lambda mta: mta.connect_info("mx", "junk", family=Family.INET),
            [(b"C", b"mx\x004\0\0junk\0")],
        ),
        (lambda mta: mta.helo("gr\u00fc\udcff"), [(b"H", b"gr\xc3\xbc\xff\0")]),
        (lambda mta: mta.mail("<>"), [(b"M", b"<>\0")]),
        (
            lambda mta: mta.mail(b"<a@x>", "SIZE=1", b"X=\xff"),
            [(b"M", b"<a@x>\0SIZE=1\0X=\xff\0")],
        ),
        (lambda mta: mta.rcpt("<b@x>", "NOTIFY=NEVER"), [(b"R", b"<b@x>\0NOTIFY=NEVER\0")]),
        (lambda mta: mta.data(), [(b"T", b"")]),
        (lambda mta: mta.header("A", "b\n c"), [(b"L", b"A\0b\n c\0")]),
        (lambda mta: mta.header(b"\xff", ""), [(b"L", b"\xff\0\0")]),
        (lambda mta: mta.eoh(), [(b"N", b"")]),
        (lambda mta: mta.body(b""), []),
        (lambda mta: mta.body(b"\0\xff"), [(b"B", b"\0\xff")]),
        (lambda mta: mta.eom(), [(b"E", b"")]),
        (lambda mta: mta.eom(b"rest"), [(b"E", b"rest")]),
        (lambda mta: mta.unknown("XYZZY a"), [(b"U", b"XYZZY a\0")]),
        (lambda mta: mta.abort(), [(b"A", b"")]),
        (lambda mta: mta.quit_nc(), [(b"K", b"")]),
        (
            lambda mta: mta.helo("x", macros={"j": b"\xff", "tls_version": "1"}),
            [(b"D", b"Hj\0\xff\0{tls_version}\x001\0"), (b"H", b"x\0")],
        ),
        (lambda mta: mta.send_packet(b"Z", b"\0"), [(b"Z", b"\0")]),
        (lambda mta: mta.send_raw(b"\0\0\0\2Zz"), [(b"Z", b"z")]),
    ],
)
def test_packets(work: Callable[[MTA], object], packets: list[tuple[bytes, bytes]]) -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg())
        for command, _ in packets:
            assert peer.receive()[0] == command
            if command not in b"DAKZ":
                peer.send(OK)

    with scripted(script) as (mta, peer):
        work(mta)
        mta.expect_close()
    assert peer.seen[1:] == packets


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda mta: mta.connect_info("mx", "example.com"), "neither an IP address"),
        (lambda mta: mta.connect_info("mx", "192.0.2.1", 65536), "port 65536"),
        (lambda mta: mta.connect_info("m\0x"), "hostname 'm.x00x': a NUL"),
        (lambda mta: mta.helo(b"x\0"), "NUL"),
        (lambda mta: mta.mail("<a@x>", "A=\0"), "parameter"),
        (lambda mta: mta.header("A", "b\0c"), "header value"),
        (lambda mta: mta.header("A", "b" * 65535), "header: 65538 bytes"),
        (lambda mta: mta.eom(b"x" * 65536), "65536 bytes"),
        (lambda mta: mta.helo("x", macros={"": "v"}), "needs a name"),
        (lambda mta: mta.set_macros("HEADER", {}), "macro stage 'HEADER'"),
        (lambda mta: mta.rcpt("<b@x>", rejected="no"), "rejected 'no'"),
        (lambda mta: mta.send(SIMPLE, recipients=[]), "at least one"),
        (lambda mta: mta.send(SIMPLE, recipients="b@x"), "sequence"),
    ],
)
def test_bad_arguments(work: Callable[[MTA], object], said: str) -> None:
    with scripted(answers()) as (mta, peer), pytest.raises(ValueError, match=said):
        work(mta)
    assert len(peer.seen) == 1


def test_larger_commands_where_that_is_agreed() -> None:
    offer = Offer(6, steps=CURRENT_STEPS | Step.MDS_256K)
    script = answers(OK, negotiation=optneg(steps=int(Step.MDS_256K)))
    with scripted(script, offer=offer) as (mta, peer):
        mta.header("A", "b" * 100_000)
        with pytest.raises(ValueError, match="at most 262143"):
            mta.header("A", "b" * 300_000)
    assert len(peer.seen[1][1]) == 100_003


def test_read_packet() -> None:
    with scripted(answers(frame(b"?", b"x"))) as (mta, _):
        mta.send_packet(b"Z")
        packet = mta.read_packet()
        assert packet == Packet(b"?", b"x")
        assert bytes(packet) == frame(b"?", b"x")
        with pytest.raises(FilterTimeout):
            mta.read_packet(0.01)


def test_trace() -> None:
    seen: list[tuple[str, bytes]] = []
    script = answers(OK)
    with scripted(script, trace=lambda way, data: seen.append((way, data))) as (mta, _):
        mta.data()
    assert seen[0][0] == ">"
    assert seen[1:] == [("<", optneg()), (">", frame(b"T")), ("<", OK)]


# --- macros ---------------------------------------------------------------------------------------


def test_macros_go_out_with_their_stage() -> None:
    def work(mta: MTA) -> None:
        mta.set_macros(Stage.MAIL, {"i": "Q1"})
        mta.set_macros("RCPT", {"rcpt_mailer": "local"})
        mta.mail("<a@x>")
        mta.rcpt("<b@x>", macros={"{rcpt_mailer}": "smtp"})
        mta.rcpt("<c@x>")
        mta.header("A", "b")

    assert [data for command, data in sent(work, 4) if command == b"D"] == [
        b"Mi\0Q1\0",
        b"R{rcpt_mailer}\0smtp\0",
        b"R{rcpt_mailer}\0local\0",
    ]


def test_only_the_macros_that_the_filter_named() -> None:
    lists = index(2) + b"{unknown} {i} j\0" + index(3) + b"\0" + index(5) + b"{late} {mail_addr}\0"

    def work(mta: MTA) -> None:
        mta.set_macros("CONNECT", {"j": "mx", "v": "1"})
        mta.set_macros("MAIL", {"i": "Q1", "mail_addr": "a@x"})
        mta.set_macros("EOM", {"late": "yes"})
        mta.helo("x")
        mta.mail("<a@x>")
        mta.rcpt("<b@x>", macros={"rcpt_addr": "b@x"})
        mta.eom()

    macros = [data for command, data in sent(work, 4, rest=lists) if command == b"D"]
    assert macros == [b"M{i}\0Q1\0j\0mx\0", b"E{late}\0yes\0{mail_addr}\0a@x\0"]


def test_macros_go_out_even_where_the_step_does_not() -> None:
    steps = int(Step.NOHELO | Step.NOEOH)
    packets = sent(
        lambda mta: (mta.helo("x", macros={"a": "1"}), mta.eoh(macros={"b": "2"}), mta.data()),
        steps=steps,
    )
    assert packets == [(b"D", b"Ha\x001\0"), (b"T", b"")]


def test_rejected_recipients() -> None:
    def work(mta: MTA) -> None:
        reply = mta.rcpt("<b@x>", rejected="550 5.1.1 User unknown")
        assert (reply.verdict is Verdict.NOT_SENT) == (not mta.negotiated.steps)

    assert sent(work) == []
    macros = b"R{rcpt_mailer}\0error\0{rcpt_host}\x005.1.1\0{rcpt_addr}\0User unknown\0"
    assert sent(work, steps=int(Step.RCPT_REJ)) == [(b"D", macros), (b"R", b"<b@x>\0")]


# --- messages, addresses, sockets ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "headers", "body"),
    [
        (b"", [], b""),
        (b"\n", [], b""),
        (b"A: 1\n\nx\n", [(b"A", b"1")], b"x\r\n"),
        (b"A: 1\r\n\r\nx\r\ny\n", [(b"A", b"1")], b"x\r\ny\r\n"),
        (b"A: 1\n\tb\r\n c\n\n", [(b"A", b"1\n\tb\n c")], b""),
        (b"A: 1\nno header\nx\n", [(b"A", b"1")], b"no header\r\nx\r\n"),
        (b" not a fold\nA: 1\n", [], b" not a fold\r\nA: 1\r\n"),
        (b"From a@x Mon\nA: 1\n\nx", [(b"A", b"1")], b"x"),
        (b"A: 1\nFrom b@x\n\n", [(b"A", b"1")], b"From b@x\r\n\r\n"),
        (b"A: 1", [(b"A", b"1")], b""),
        (b"A:\nB: \n\n\n", [(b"A", b""), (b"B", b"")], b"\r\n"),
        (b"\xff: \xfe\n\n\xfd\r", [(b"\xff", b"\xfe")], b"\xfd\r"),
        (b"A: a\rb\n\n", [(b"A", b"a\rb")], b""),
    ],
)
def test_parse_messages(data: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    message = Message.parse(data)
    assert [(header.name, header.value) for header in message.headers] == headers
    assert message.body == body


def test_an_untouched_message_comes_back_byte_for_byte() -> None:
    for eol in (b"\n", b"\r\n"):
        lines = [b"A: 1", b"B :2", b"C:  3", b"\tfold", b"", b"body", b"", b".", b""]
        data = eol.join(lines)
        assert Message.parse(data).as_bytes(eol) == data


def test_reading_headers() -> None:
    message = Message.parse(b"Subject: gr\xc3\xbc\xff\nsubject: two\n\n")
    assert message["SUBJECT"] == "gr\u00fc\udcff"
    assert message.get_all("Subject") == ["gr\u00fc\udcff", "two"]
    assert message.get("X") is None
    assert message.get("X", "otherwise") == "otherwise"
    assert "subject" in message
    assert "x" not in message
    with pytest.raises(KeyError):
        message["x"]


def test_addresses() -> None:
    assert Address.make("<a@x>") == Address.make(b"a@x") == Address("a@x")
    assert Address.make(("<a@x>", "SIZE=1", b"X=\xff")) == Address("a@x", ("SIZE=1", "X=\udcff"))
    assert str(Address("", ("BODY=8BITMIME",))) == "<> BODY=8BITMIME"


@pytest.mark.parametrize(
    ("spec", "family", "address"),
    [
        ("unix:/run/x", socket.AF_UNIX, "/run/x"),
        ("local:/run/x", socket.AF_UNIX, "/run/x"),
        ("UNIX:run/x", socket.AF_UNIX, "run/x"),
        ("/run/x", socket.AF_UNIX, "/run/x"),
        ("unix:/run/a:b", socket.AF_UNIX, "/run/a:b"),
        (":/run/x", socket.AF_UNIX, "/run/x"),
        ("inet:8891@192.0.2.1", socket.AF_INET, ("192.0.2.1", 8891)),
        ("inet:8891@[192.0.2.1]", socket.AF_INET, ("192.0.2.1", 8891)),
        ("inet:8891@mail.example.com", socket.AF_INET, ("mail.example.com", 8891)),
        ("inet:8891", socket.AF_INET, ("127.0.0.1", 8891)),
        ("inet:smtp@localhost", socket.AF_INET, ("localhost", 25)),
        ("inet6:8891@[2001:db8::1]", socket.AF_INET6, ("2001:db8::1", 8891)),
        ("inet6:8891@2001:db8::1", socket.AF_INET6, ("2001:db8::1", 8891)),
        ("inet6:8891", socket.AF_INET6, ("::1", 8891)),
    ],
)
def test_socket_addresses(spec: str, family: int, address: object) -> None:
    for postfix in (False, True):
        found = parse_socket(spec, postfix=postfix)
        assert (found.family, found.address) == (family, address)
        assert parse_socket(str(found)) == found


@pytest.mark.parametrize(
    ("spec", "family", "address"),
    [
        ("inet:192.0.2.1:8891", socket.AF_INET, ("192.0.2.1", 8891)),
        ("inet:localhost:smtp", socket.AF_INET, ("localhost", 25)),
        ("inet:[2001:db8::1]:8891", socket.AF_INET6, ("2001:db8::1", 8891)),
    ],
)
def test_socket_addresses_of_postfix(spec: str, family: int, address: object) -> None:
    with pytest.raises(ValueError, match=r"the order of Postfix; it is written inet6?:"):
        parse_socket(spec)
    found = parse_socket(spec, postfix=True)
    assert (found.family, found.address) == (family, address)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "path is missing"),
        ("unix:", "path is missing"),
        ("unix:/" + "x" * 107, "longer than 106 bytes"),
        ("tcp:8891@localhost", "unknown scheme"),
        ("inet:0@localhost", "port 0"),
        ("inet:65536", "up to 65535"),
        ("inet:@localhost", "port is missing"),
        ("inet:no-such-service@localhost", "no TCP service of that name"),
        ("fd:3", "a descriptor cannot be connected to"),
    ],
)
def test_bad_socket_addresses(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_socket(spec)
    assert repr(spec) in str(caught.value)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's, as tmp_path may not."""
    with tempfile.TemporaryDirectory(prefix="mta-") as name:
        yield Path(name)


def test_nobody_listens(directory: Path) -> None:
    path = directory / "none.sock"
    with takes(0, 5), pytest.raises(FilterUnreachable, match="No such file"):
        MTA.connect(f"unix:{path}")
    with takes(0.2, 5), pytest.raises(FilterUnreachable, match=r"tried for 0\.2 s"):
        MTA.connect(f"unix:{path}", wait_for=0.2)
    path.write_text("no socket")
    with takes(0, 5), pytest.raises(FilterUnreachable, match="refused"):
        MTA.connect(f"unix:{path}")
    (directory / "file").write_text("")
    with takes(0, 5), pytest.raises(FilterUnreachable, match="Not a directory"):
        MTA.connect(f"unix:{directory}/file/x", wait_for=60)


def test_waits_until_the_filter_listens(directory: Path) -> None:
    path = directory / "late.sock"

    def listen() -> None:
        time.sleep(0.2)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            time.sleep(0.1)  # bound, but not listening: refused until then
            server.listen()
            connection, _ = server.accept()
            with connection:
                Peer(connection).answer(optneg())

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        MTA.connect(f"unix:{path}", wait_for=WAIT).close()
    finally:
        thread.join(WAIT)


def test_a_busy_filter_is_worth_waiting_for(directory: Path) -> None:
    path = directory / "busy.sock"
    with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
        server.bind(str(path))
        server.listen(0)
        # Fill the queue; from then on connecting gives EAGAIN.
        for _ in range(2):
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                other.connect(str(path))
        with takes(0.2, 5), pytest.raises(FilterUnreachable, match=r"tried for 0\.2 s"):
            MTA.connect(f"unix:{path}", timeout=0.2)
        timer = threading.Timer(0.2, lambda: server.accept()[0].close())
        timer.start()
        MTA.connect(f"unix:{path}", timeout=WAIT, offer=None).close()
        timer.join(WAIT)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_tcp(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as server:
        try:
            server.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        server.listen()
        port = server.getsockname()[1]
        kind = "inet" if family == socket.AF_INET else "inet6"

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                peer = Peer(connection)
                peer.answer(optneg(), frame(b"a"))
                peer.receive()

        thread = threading.Thread(target=serve)
        thread.start()
        with MTA.connect(f"{kind}:{port}@[{host}]", timeout=WAIT) as mta:
            assert mta.helo("x").verdict is Verdict.ACCEPT
        thread.join(WAIT)


def test_tcp_does_not_wait_for_acknowledgements() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        with contextlib.closing(MTA(sock, offer=None)):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_failed_negotiation_closes_the_socket() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(OK)
        with pytest.raises(ProtocolError):
            MTA(ours, timeout=WAIT)
    assert ours.fileno() == -1


def test_errors_say_all() -> None:
    error = FilterTimeout("no answer", Stage.EOM, b"x" * 100)
    assert str(error) == f"at end of message: no answer; received {b'x' * 80!r}…"
    assert isinstance(error, (MTAError, TimeoutError))
    assert str(FilterClosed("gone")) == "gone"


def test_the_package_needs_the_standard_library_and_the_extension_only() -> None:
    import Milter.mta

    code = (
        "import importlib.util, sys\n"
        f"file, places = {Milter.mta.__file__!r}, {list(Milter.mta.__path__)!r}\n"
        "spec = importlib.util.spec_from_file_location(\n"
        "    'lone_mta', file, submodule_search_locations=places\n"
        ")\n"
        "module = sys.modules['lone_mta'] = importlib.util.module_from_spec(spec)\n"
        "before = set(sys.modules)\n"
        "spec.loader.exec_module(module)\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "ours = {'lone_mta', 'milter', 'Milter', 'mime'}\n"
        "known = getattr(sys, 'stdlib_module_names', loaded - ours)\n"
        "assert loaded - set(known) == {'lone_mta', 'milter'}, loaded - set(known)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=WAIT)
