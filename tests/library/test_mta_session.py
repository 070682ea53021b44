"""The MTA's half of the protocol without I/O: ``Milter.mta.session`` and what it is made of."""

from __future__ import annotations

import dataclasses
import enum
import pickle
import random
import struct
import sys
import typing
from collections.abc import Callable, Iterator

import pytest
from support.mta import frame, optneg

import Milter.mta
from Milter.mta import (
    Action,
    AddHeader,
    AddRecipient,
    Address,
    ChangeHeader,
    ChangeSender,
    Client,
    DeleteRecipient,
    Dialect,
    Editor,
    FilterClosed,
    Header,
    InsertHeader,
    Message,
    Negotiated,
    Offer,
    ProtocolError,
    Quarantine,
    ReplaceBody,
    Reply,
    Stage,
    Step,
    Verdict,
    commands,
)
from Milter.mta.commands import Command
from Milter.mta.session import LEADS_TO, MAY_SAY, PROGRESS, Event, Session, State, next_state
from Milter.mta.transaction import Transaction, greeting

MESSAGE = Message.parse(b"Subject: a\r\nX: 1\r\n\r\nbody\r\n")


def agreed(steps: int = 0, **options: typing.Any) -> Session:
    """A session after a negotiation in which the filter asked for these steps."""
    session = Session(**options)
    session.negotiate(Offer())
    session.receive(optneg(steps=steps))
    assert isinstance(session.next_event(), Negotiated)
    return session


def events(session: Session) -> Iterator[Event]:
    while True:
        event = session.next_event()
        if event is None:
            return
        yield event


# --- bytes in, events out ------------------------------------------------------------------------


def test_an_offer_and_what_comes_of_it() -> None:
    session = Session()
    assert session.negotiate(Offer()) == frame(b"O", struct.pack("!III", 6, 0x1FF, 0x1FFFFF))
    assert session.next_event() is None
    session.receive(optneg(actions=1, steps=2))
    assert session.next_event() == Negotiated(6, Action.ADDHDRS, Step.NOHELO)
    assert session.state is State.NEGOTIATED
    assert session.next_event() is None


def test_bytes_may_come_in_any_pieces() -> None:
    session = agreed()
    session.send(Command(Stage.EOM))
    said = frame(b"p") + frame(b"h", b"A\0b\0") + frame(b"y", b"550 5.7.1 no\0")
    found: list[Event] = []
    for number in range(len(said)):
        session.receive(said[number : number + 1])
        found += events(session)
    assert found[:2] == [PROGRESS, AddHeader(b"A", b"b")]
    (reply,) = found[2:]
    assert isinstance(reply, Reply)
    assert (reply.verdict, reply.progress) == (Verdict.REJECT, 1)
    assert reply.modifications == (AddHeader(b"A", b"b"),)


def test_what_came_before_an_answer_is_of_that_answer_alone() -> None:
    session = agreed()
    for before in (frame(b"p") + frame(b"h", b"A\0b\0"), b""):
        session.send(Command(Stage.EOM))
        session.receive(before + frame(b"c"))
        *others, reply = events(session)
        assert isinstance(reply, Reply)
        assert (reply.progress, len(reply.modifications), len(others)) == (
            (1, 1, 2) if before else (0, 0, 0)
        )


def test_an_answer_that_is_not_sent_is_an_event_too() -> None:
    session = agreed(Step.NOHELO | Step.NR_MAIL)
    assert session.send(commands.helo("x")) == b""
    assert session.next_event() == Reply(Stage.HELO, Verdict.NOT_SENT)
    assert session.send(commands.mail("<a@x>", ())) == frame(b"M", b"<a@x>\0")
    assert session.next_event() == Reply(Stage.MAIL, Verdict.NO_REPLY)
    assert session.send(Command(Stage.ABORT)) == frame(b"A")
    assert session.next_event() == Reply(Stage.ABORT, Verdict.NO_REPLY)


def test_speaking_out_of_turn() -> None:
    session = agreed()
    session.receive(frame(b"c"))
    for what in (session.next_event, lambda: session.send(commands.helo("x"))):
        with pytest.raises(ProtocolError, match="nothing was due"):
            what()


@pytest.mark.parametrize("rest", [b"", b"\0\0"])
def test_the_end_of_the_stream(rest: bytes) -> None:
    session = agreed()
    session.send(commands.helo("x"))
    if rest:
        session.receive(rest)
    session.receive(b"")
    with pytest.raises(FilterClosed) as caught:
        session.next_event()
    assert caught.value.received == rest
    assert session.ended


def test_packets_are_traced() -> None:
    seen: list[tuple[str, bytes]] = []
    session = Session(trace=lambda *what: seen.append(what))
    session.send(commands.helo("x"))
    session.receive(frame(b"c"))
    session.next_event()
    assert seen == [("<", frame(b"c"))]


# --- what may follow what ------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    assert set(MAY_SAY) == set(State)
    assert set(LEADS_TO) == {*Stage} - {Stage.UNKNOWN}
    reachable = {State.START, State.SETTLED, *LEADS_TO.values()}
    assert reachable == set(State)
    for state, allowed in MAY_SAY.items():
        for stage in allowed:
            assert next_state(state, Command(stage), Verdict.CONTINUE) in State


SMTP = "CONNECT HELO MAIL RCPT RCPT DATA HEADER HEADER EOH BODY BODY EOM MAIL RCPT ABORT HELO QUIT"


def test_a_strict_session_follows_smtp() -> None:
    session = agreed(strict=True)
    for name in SMTP.split():
        stage = Stage[name]
        assert stage in session.may_say
        session.send(Command(stage))
        if session._known is None:
            assert session.may_say == frozenset()  # an answer is due
            session.receive(frame(b"c"))
        session.next_event()
    assert session.may_say == frozenset()


@pytest.mark.parametrize(
    ("before", "stage"),
    [
        ("", Stage.MAIL),
        ("", Stage.EOM),
        ("CONNECT", Stage.CONNECT),
        ("CONNECT", Stage.RCPT),
        ("CONNECT HELO MAIL", Stage.MAIL),
        ("CONNECT HELO MAIL", Stage.DATA),
        ("CONNECT HELO MAIL RCPT", Stage.HEADER),
        ("CONNECT HELO MAIL RCPT DATA", Stage.BODY),
        ("CONNECT HELO MAIL RCPT DATA", Stage.UNKNOWN),
        ("CONNECT HELO MAIL RCPT DATA EOH", Stage.HEADER),
        ("CONNECT HELO MAIL RCPT DATA EOH EOM", Stage.BODY),
    ],
)
def test_what_may_not_follow(before: str, stage: Stage) -> None:
    for strict in (True, False):
        session = agreed(strict=strict)
        for name in before.split():
            session.send(Command(Stage[name]))
            session.receive(frame(b"c"))
            session.next_event()
        assert stage not in session.may_say
        if strict:
            state = session.state
            with pytest.raises(ValueError, match=f"{stage.name} where an MTA may say"):
                session.send(Command(stage))
            assert session.state is state
        else:
            session.send(Command(stage))


@pytest.mark.parametrize(
    ("state", "stage", "verdict", "after"),
    [
        (State.NEGOTIATED, Stage.CONNECT, Verdict.ACCEPT, State.SETTLED),
        (State.READY, Stage.HELO, Verdict.REJECT, State.SETTLED),
        (State.READY, Stage.MAIL, Verdict.TEMPFAIL, State.READY),
        (State.SENDER, Stage.RCPT, Verdict.REJECT, State.SENDER),
        (State.RECIPIENTS, Stage.RCPT, Verdict.TEMPFAIL, State.RECIPIENTS),
        (State.RECIPIENTS, Stage.RCPT, Verdict.ACCEPT, State.READY),
        (State.RECIPIENTS, Stage.RCPT, Verdict.SKIP, State.RECIPIENTS),
        (State.RECIPIENTS, Stage.DATA, Verdict.NOT_SENT, State.HEADERS),
        (State.HEADERS, Stage.HEADER, Verdict.DISCARD, State.READY),
        (State.BODY, Stage.BODY, Verdict.REJECT, State.READY),
        (State.BODY, Stage.EOM, Verdict.CONTINUE, State.READY),
        (State.BODY, Stage.BODY, Verdict.SHUTDOWN, State.SETTLED),
        (State.READY, Stage.UNKNOWN, Verdict.REJECT, State.READY),
        (State.SENDER, Stage.UNKNOWN, Verdict.REJECT, State.SENDER),
        (State.SENDER, Stage.UNKNOWN, Verdict.ACCEPT, State.READY),
    ],
)
def test_where_answers_lead(state: State, stage: Stage, verdict: Verdict, after: State) -> None:
    assert next_state(state, Command(stage), verdict) is after


def test_a_recipient_whom_the_mta_refuses_is_none() -> None:
    command = commands.rcpt("<a@x>", (), "550 5.1.1 User unknown")
    assert next_state(State.SENDER, command, Verdict.CONTINUE) is State.SENDER


def test_older_filters_know_no_next_session() -> None:
    session = Session()
    session.negotiate(Offer.for_version(2))
    session.receive(optneg(version=2, actions=0))
    session.next_event()
    assert session.may_say == {Stage.CONNECT, Stage.QUIT}


ANSWERS = [*[b"c"] * 12, b"a", b"r", b"t", b"d"]


@pytest.mark.parametrize("seed", range(200))
def test_a_transaction_keeps_to_the_order_whatever_the_filter_answers(seed: int) -> None:
    pick = random.Random(seed)
    bits = [0, Step.NOHELO, Step.NODATA, Step.NOBODY, Step.RCPT_REJ, Step.NR_RCPT, Step.SKIP]
    session = agreed(sum({int(pick.choice(bits)) for _ in range(3)}), strict=True)

    def play(dialogue: commands.Dialogue[typing.Any]) -> typing.Any:
        try:
            command = next(dialogue)
            while True:
                session.send(command)
                event = session.next_event()
                if event is None:
                    word = pick.choice(ANSWERS)
                    at_once = command.stage in (Stage.CONNECT, Stage.HELO)
                    session.receive(frame(b"c" if word == b"d" and at_once else word))
                    event = session.next_event()
                assert isinstance(event, Reply)
                command = dialogue.send(event)
        except StopIteration as end:
            return end.value

    replies: list[Reply] = []
    play(greeting(Client(), None, replies))
    for _ in range(3):
        rejected = "550 5.1.1 who?" if pick.random() < 0.2 else None
        whom = [Address("a@x"), Address("b@x", rejected=rejected), Address("c@x")]
        if session.state is State.SETTLED:
            assert not replies[-1].verdict.goes_on
        elif session.state is not State.READY:
            session.send(Command(Stage.ABORT))
            session.next_event()
        transaction = Transaction(session, MESSAGE, Address("s@x"), whom[: pick.randint(1, 3)])
        result = play(transaction.run(replies, body_in_eom=pick.random() < 0.5))
        assert session.state in (State.READY, State.SETTLED)
        assert result.accepted == (result.verdict.goes_on or result.verdict is Verdict.ACCEPT)


# --- what modifications do -----------------------------------------------------------------------


def edited(*modifications: typing.Any, **options: typing.Any) -> Editor:
    editor = Editor(MESSAGE, Address("s@x"), [Address("a@x"), Address("b@x")], **options)
    editor.apply(*modifications)
    return editor


def test_an_editor_does_all_that_a_filter_may_say() -> None:
    editor = edited(
        InsertHeader(0, b"Top", b"1"),
        ChangeHeader(1, b"x", b""),
        AddHeader(b"Subject", b"b"),
        ReplaceBody(b"new "),
        ReplaceBody(b"body\r\n"),
        AddRecipient("<c@x>", "NOTIFY=NEVER"),
        DeleteRecipient("<a@x>"),
        ChangeSender("<n@x>"),
        Quarantine("odd"),
    )
    assert editor.message.as_bytes() == b"Top: 1\r\nSubject: a\r\nSubject: b\r\n\r\nnew body\r\n"
    assert editor.recipients == [Address("b@x"), Address("c@x", ("NOTIFY=NEVER",))]
    assert (editor.sender, editor.quarantine) == (Address("n@x"), "odd")
    assert editor.body_replaced
    deleted = [edit.before for edit in editor.header_edits if edit.after is None]
    assert deleted == [Header(b"X", b"1")]


def test_an_editor_leaves_what_it_was_given() -> None:
    before = MESSAGE.as_bytes()
    whom = [Address("a@x")]
    editor = Editor(MESSAGE, Address("s@x"), whom)
    editor.apply(ChangeHeader(1, b"Subject", b"b"), ReplaceBody(b""), DeleteRecipient("a@x"))
    assert editor.message.as_bytes() == b"Subject: b\r\nX: 1\r\n\r\n"
    assert (MESSAGE.as_bytes(), whom) == (before, [Address("a@x")])
    editor.message.headers.clear()
    assert len(editor.message.headers) == 2


@pytest.mark.parametrize(
    ("dialect", "names"),
    [(Dialect.POSTFIX, [b"Subject", b"X", b"subject"]), (Dialect.SENDMAIL, [b"subject"] * 2)],
)
def test_an_editor_has_a_dialect(dialect: Dialect, names: list[bytes]) -> None:
    editor = edited(AddHeader(b"subject", b"b"), dialect=dialect)
    found = [header.name for header in editor.message.headers]
    assert found == ([b"subject", b"Subject", b"X"] if names[0] == names[-1] else names)


def test_an_editor_takes_modifications_only() -> None:
    with pytest.raises(TypeError, match="is no modification"):
        Editor(MESSAGE).apply(Verdict.ACCEPT)  # type: ignore[arg-type]


def test_many_recipients_take_linear_time() -> None:
    editor = Editor(MESSAGE)
    editor.apply(*(AddRecipient(f"<{number}@x>") for number in range(20000)))
    assert len(editor.recipients) == 20000


# --- what is found where -------------------------------------------------------------------------

PUBLIC = sorted(Milter.mta.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_that_they_are_found_here(name: str) -> None:
    value = getattr(Milter.mta, name)
    if isinstance(value, type) or callable(value):
        assert value.__module__ == "Milter.mta"
        assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        Action.ADDHDRS | Action.CHGBODY,
        Verdict.ACCEPT,
        Address("a@x", ("SIZE=1",)),
        AddHeader(b"a", b"b"),
        Message([Header(b"a", b"b")], b"c"),
        Milter.mta.Packet(b"c", b""),
        Negotiated(6, Action.NONE, Step.NONE, {Stage.HELO: ("i",)}),
    ],
)
def test_pickles_name_the_package(value: typing.Any) -> None:
    data = pickle.dumps(value)
    assert pickle.loads(data) == value
    assert b"Milter.mta." not in data.replace(b"Milter.mta\x94", b"")


OLD_NAMES = [
    *["CHUNK_SIZE", "MAX_DATA_SIZE", "MDS_256K_SIZE", "MDS_1M_SIZE", "MAX_REPLY_SIZE"],
    *["MAX_REPLY_LINES", "MAX_REPLY_LINE", "OPTION_SIZE", "V1_ACTIONS", "V2_ACTIONS"],
    *["CURRENT_ACTIONS", "V1_STEPS", "V2_STEPS", "CURRENT_STEPS", "Text", "MacroValues"],
    *["AddressLike", "Modification"],
]


@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_that_are_public_though_not_listed(name: str) -> None:
    assert hasattr(Milter.mta, name)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the annotations are of a later syntax")
@pytest.mark.parametrize("name", PUBLIC)
def test_annotations_can_be_read(name: str) -> None:
    value = getattr(Milter.mta, name)
    places: list[Callable[..., object]] = []
    if isinstance(value, type) and not issubclass(value, enum.Enum):
        if dataclasses.is_dataclass(value):
            assert set(typing.get_type_hints(value)) == {f.name for f in dataclasses.fields(value)}
        places = [one for one in vars(value).values() if callable(one)]
    elif callable(value):
        places = [value]
    for place in places:
        if hasattr(place, "__annotations__") and hasattr(place, "__globals__"):
            typing.get_type_hints(place)
