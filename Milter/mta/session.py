"""The MTA's half of a conversation with a filter, without I/O.

A :class:`Session` is given commands and gives the bytes to send; it is fed what the filter sends
and gives events.  Whoever has a socket moves the bytes, and says when time is up::

    data = session.send(commands.helo("mail.example.com"))   # to the filter
    session.receive(what_came_in)                            # b"" at the end of the stream
    event = session.next_event()                             # None: more bytes are needed

An event is what was agreed on (:class:`~Milter.mta.Negotiated`), the answer to a command
(:class:`~Milter.mta.Reply`), or what came before it: ``PROGRESS``, or a modification.  A filter
that breaks the protocol is a :class:`~Milter.mta.ProtocolError`.

**What may follow what.**  An SMTP session is in one of a few states.  A command is due in some of
them only (``MAY_SAY``), and leads to one (``LEADS_TO``), unless the answer says otherwise:

- A verdict about one recipient (a refusal of RCPT), and what is said about an unknown command,
  change nothing.
- A verdict about a message (any other that does not go on) ends that message: ``READY``.
- A verdict about the connection (at connect and HELO, or SHUTDOWN) is the last: ``SETTLED``.

An MTA keeps to that, and a *strict* session refuses what breaks it.  Others take any command at any
time, so that tests can see what a filter does then.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping
from typing import Union

from .commands import Command
from .errors import FilterClosed, ProtocolError
from .macros import Macros
from .vocabulary import (
    CURRENT_ACTIONS,
    Dialect,
    Modification,
    Negotiated,
    Offer,
    Reply,
    SmtpReply,
    Stage,
    Step,
    Verdict,
)
from .wire import (
    MAX_DATA_SIZE,
    MDS_1M_SIZE,
    MDS_256K_SIZE,
    MODIFICATIONS,
    VERDICT_OF_REPLY,
    Inbox,
    Packet,
    Parser,
    frame,
    parse_negotiation,
)


class Progress(enum.Enum):
    """The filter asks for more time (``SMFIR_PROGRESS``)."""

    PROGRESS = "progress"


PROGRESS = Progress.PROGRESS

#: What a session tells of.
Event = Union[Negotiated, Reply, Progress, Modification]

Trace = Callable[[str, bytes], None]


# --- what may follow what ------------------------------------------------------------------------


class State(enum.Enum):
    """How far an SMTP session has come."""

    START = "nothing is agreed on"
    NEGOTIATED = "no client has connected"
    READY = "no message is under way"
    SENDER = "a message has its sender"
    RECIPIENTS = "a message has recipients"
    HEADERS = "the headers are on their way"
    BODY = "the body is on its way"
    SETTLED = "the filter has decided about the connection"
    ENDED = "the session is over"


_CLIENT_LEFT = {Stage.QUIT, Stage.QUIT_NC}

MAY_SAY: Mapping[State, frozenset[Stage]] = {
    State.START: frozenset({Stage.NEGOTIATE, Stage.QUIT}),
    State.NEGOTIATED: frozenset({Stage.CONNECT, *_CLIENT_LEFT}),
    State.READY: frozenset({Stage.HELO, Stage.MAIL, Stage.UNKNOWN, Stage.ABORT, *_CLIENT_LEFT}),
    State.SENDER: frozenset({Stage.RCPT, Stage.UNKNOWN, Stage.ABORT, *_CLIENT_LEFT}),
    State.RECIPIENTS: frozenset(
        {Stage.RCPT, Stage.DATA, Stage.UNKNOWN, Stage.ABORT, *_CLIENT_LEFT}
    ),
    State.HEADERS: frozenset({Stage.HEADER, Stage.EOH, Stage.ABORT, *_CLIENT_LEFT}),
    State.BODY: frozenset({Stage.BODY, Stage.EOM, Stage.ABORT, *_CLIENT_LEFT}),
    State.SETTLED: frozenset(_CLIENT_LEFT),
    State.ENDED: frozenset(),
}

#: UNKNOWN leads nowhere: it leaves all as it is.
LEADS_TO: Mapping[Stage, State] = {
    Stage.NEGOTIATE: State.NEGOTIATED,
    Stage.CONNECT: State.READY,
    Stage.HELO: State.READY,
    Stage.MAIL: State.SENDER,
    Stage.RCPT: State.RECIPIENTS,
    Stage.DATA: State.HEADERS,
    Stage.HEADER: State.HEADERS,
    Stage.EOH: State.BODY,
    Stage.BODY: State.BODY,
    Stage.EOM: State.READY,
    Stage.ABORT: State.READY,
    Stage.QUIT: State.ENDED,
    Stage.QUIT_NC: State.NEGOTIATED,
}

_OF_THE_MESSAGE = frozenset({State.SENDER, State.RECIPIENTS, State.HEADERS, State.BODY})


def next_state(state: State, command: Command, verdict: Verdict) -> State:
    """Where *command* and its answer lead from *state*."""
    stage = command.stage
    if verdict is Verdict.SHUTDOWN:
        return State.SETTLED
    if stage is Stage.UNKNOWN:
        ends = verdict in (Verdict.ACCEPT, Verdict.DISCARD) and state in _OF_THE_MESSAGE
        return State.READY if ends else state
    if command.refused:
        return state
    if verdict.goes_on:
        return LEADS_TO[stage]
    if stage in (Stage.CONNECT, Stage.HELO):
        return State.SETTLED
    about_one = stage is Stage.RCPT and verdict in (Verdict.REJECT, Verdict.TEMPFAIL)
    return state if about_one else State.READY


# --- what was agreed on --------------------------------------------------------------------------

NO_STEP = {
    Stage.CONNECT: Step.NOCONNECT,
    Stage.HELO: Step.NOHELO,
    Stage.MAIL: Step.NOMAIL,
    Stage.RCPT: Step.NORCPT,
    Stage.DATA: Step.NODATA,
    Stage.HEADER: Step.NOHDRS,
    Stage.EOH: Step.NOEOH,
    Stage.BODY: Step.NOBODY,
    Stage.UNKNOWN: Step.NOUNKNOWN,
}

NO_REPLY = {
    Stage.CONNECT: Step.NR_CONN,
    Stage.HELO: Step.NR_HELO,
    Stage.MAIL: Step.NR_MAIL,
    Stage.RCPT: Step.NR_RCPT,
    Stage.DATA: Step.NR_DATA,
    Stage.HEADER: Step.NR_HDR,
    Stage.EOH: Step.NR_EOH,
    Stage.BODY: Step.NR_BODY,
    Stage.UNKNOWN: Step.NR_UNKN,
}

# The first protocol version that has the command.
_SINCE_VERSION = {Stage.UNKNOWN: 3, Stage.DATA: 4, Stage.QUIT_NC: 6}

_SKIPPABLE = {
    Dialect.POSTFIX: frozenset((Stage.RCPT, Stage.HEADER, Stage.BODY, Stage.UNKNOWN)),
    Dialect.SENDMAIL: frozenset((Stage.BODY,)),
}

_WITHOUT_ANSWER = frozenset({Stage.ABORT, Stage.QUIT, Stage.QUIT_NC})


class Session:
    """One connection to a filter.

    Args:
        dialect: see :class:`~Milter.mta.Dialect`.
        strict: whether commands are held to SMTP's order.
        trace: called with ``"<"`` and the bytes of each packet that was received.
    :ivar stage: the last command, None before the first.
    :ivar state: how far the SMTP session has come.
    :ivar macros: what the MTA knows.
    :ivar offer: what was offered to the filter.
    :ivar negotiated: what was agreed on; before, as if the filter had asked for nothing.
    """

    def __init__(
        self,
        *,
        dialect: Dialect = Dialect.POSTFIX,
        strict: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self.dialect = dialect
        self.stage: Stage | None = None
        self.state = State.START
        self.macros = Macros()
        self.offer: Offer | None = None
        self.negotiated = Negotiated(6, CURRENT_ACTIONS, Step.NONE)
        self._strict = strict
        self._trace = trace
        self._inbox = Inbox()
        self._skipped: set[Stage] = set()
        # The command whose answer is due; what came before the answer; an answer that is known.
        self._due: Command | None = None
        self._modifications: list[Modification] = []
        self._progress = 0
        self._known: Reply | None = None

    @property
    def may_say(self) -> frozenset[Stage]:
        """The commands that an MTA may say next."""
        if self._due is not None:
            return frozenset()
        allowed = MAY_SAY[self.state]
        if self.negotiated.version < _SINCE_VERSION[Stage.QUIT_NC]:
            allowed -= {Stage.QUIT_NC}
        return allowed

    # what goes out

    def negotiate(self, offer: Offer) -> bytes:
        """The bytes of an offer; the event that follows is what was agreed on."""
        self.check_silence()
        command = Command(
            Stage.NEGOTIATE,
            struct.pack("!III", offer.version, int(offer.actions), int(offer.steps)),
        )
        self._begin(command)
        self.offer = offer
        self._due = command
        return frame(Stage.NEGOTIATE.value, command.payload)

    def send(self, command: Command) -> bytes:
        """The bytes that tell the filter of *command*, none where it does not want to know.

        Its answer is an event even where none is sent: NOT_SENT or NO_REPLY.

        Raises:
            ProtocolError: the filter has said something that was not due.
            ValueError: more than a command holds, or what the protocol cannot say.
        """
        room = self._max_data()
        if len(command.payload) > room:
            raise ValueError(
                f"{command.stage}: {len(command.payload)} bytes, a command holds at most {room}"
            )
        self.check_silence()
        if command.stage in _WITHOUT_ANSWER:
            return self._send_control(command)
        refused = command.refused and not self.negotiated.steps & Step.RCPT_REJ
        if refused or self.negotiated.version < _SINCE_VERSION.get(command.stage, 0):
            self._check_order(command.stage)
            self._answer(command, Reply(command.stage, Verdict.NOT_SENT))
            return b""
        if command.stage is Stage.MAIL:
            self._skipped.clear()
        stage = command.stage
        sent = stage not in self._skipped and not self._agreed(NO_STEP, stage)
        self._begin(command)
        # MTAs send the envelope's macros even with a step that the filter does not want.
        data = self._macro_packet(command) if sent or stage is not Stage.EOH else b""
        if not sent:
            self._answer(command, Reply(stage, Verdict.NOT_SENT))
            return data
        if self._agreed(NO_REPLY, stage):
            self._answer(command, Reply(stage, Verdict.NO_REPLY))
        else:
            self._due = command
        return data + frame(stage.value, command.payload)

    def _send_control(self, command: Command) -> bytes:
        if command.stage is Stage.QUIT_NC:
            if self.negotiated.version < _SINCE_VERSION[Stage.QUIT_NC]:
                raise ValueError("SMFIC_QUIT_NC needs protocol version 6")
            self.macros.clear()
        self._begin(command)
        self._skipped.clear()
        self._answer(command, Reply(command.stage, Verdict.NO_REPLY))
        return frame(command.stage.value)

    def _begin(self, command: Command) -> None:
        self._check_order(command.stage)
        self.stage = command.stage
        self._modifications = []
        self._progress = 0
        self._due = self._known = None

    def _check_order(self, stage: Stage) -> None:
        if self._strict and stage not in self.may_say:
            due = ", ".join(sorted(one.name for one in self.may_say)) or "nothing"
            raise ValueError(f"{stage.name} where an MTA may say {due}: {self.state.value}")

    def _macro_packet(self, command: Command) -> bytes:
        return self.macros.packet(command.stage, command.macros, self.negotiated.macros)

    def _agreed(self, bits: Mapping[Stage, Step], stage: Stage) -> bool:
        return bool(self.negotiated.steps & bits.get(stage, Step.NONE))

    def _max_data(self) -> int:
        steps = self.negotiated.steps
        if steps & Step.MDS_1M:
            return MDS_1M_SIZE
        return MDS_256K_SIZE if steps & Step.MDS_256K else MAX_DATA_SIZE

    # what comes in

    def receive(self, data: bytes) -> None:
        """Take in what the filter sent; no bytes are the end of the stream."""
        self._inbox.receive(data)

    @property
    def unread(self) -> bytes:
        """What came in and is in no event yet."""
        return self._inbox.unread

    @property
    def ended(self) -> bool:
        """Whether the stream has ended."""
        return self._inbox.ended

    def check_silence(self) -> None:
        """Check that nothing came in that is still unread, and that the stream has not ended.

        Raises:
            ProtocolError: something came.
            FilterClosed: the stream has ended.
        """
        if self._inbox:
            raise ProtocolError(
                "the filter speaks where nothing was due", self.stage, self._inbox.unread
            )
        if self._inbox.ended:
            raise FilterClosed("the filter closed the connection", self.stage)

    def next_packet(self) -> Packet | None:
        """The next packet, whatever it says; None where more bytes are needed.

        Raises:
            FilterClosed: the stream has ended, and no whole packet is left.
        """
        packet = self._inbox.take(self.stage)
        if packet is not None:
            if self._trace is not None:
                self._trace("<", bytes(packet))
            return packet
        if self._inbox.ended:
            where = " in the middle of a packet" if self._inbox else ""
            rest = self._inbox.unread
            self._inbox.clear()
            raise FilterClosed(f"the filter closed the connection{where}", self.stage, rest)
        return None

    def next_event(self) -> Event | None:
        """What the filter has said, None where more bytes are needed.

        Raises:
            ProtocolError: the filter may not say that.
            FilterClosed: the stream has ended, and an answer is due.
        """
        if self._known is not None:
            known, self._known = self._known, None
            return known
        if self._due is None:
            self.check_silence()
            return None
        packet = self.next_packet()
        if packet is None:
            return None
        if self._due.stage is Stage.NEGOTIATE:
            return self._take_negotiation(packet)
        return self._take(packet, self._due)

    def _take_negotiation(self, packet: Packet) -> Negotiated:
        assert self.offer is not None
        self.negotiated = parse_negotiation(packet, self.offer)
        self._due = None
        self.state = LEADS_TO[Stage.NEGOTIATE]
        self._check_nothing_follows()
        return self.negotiated

    def _take(self, packet: Packet, command: Command) -> Event:
        stage = command.stage
        parser = Parser(packet, stage)
        if packet.command == b"p":
            self._check_progress(parser, stage)
            self._progress += 1
            return PROGRESS
        if packet.command in MODIFICATIONS:
            modification = self._modification(packet, parser, stage)
            self._modifications.append(modification)
            return modification
        verdict, smtp = self._final(packet, parser, stage)
        self._check_nothing_follows()
        if verdict is Verdict.SKIP:
            self._skipped.add(stage)
        reply = Reply(stage, verdict, smtp, tuple(self._modifications), self._progress)
        self._answer(command, reply)
        self._known = None
        return reply

    def _answer(self, command: Command, reply: Reply) -> None:
        self._due = None
        self._known = reply
        self.state = next_state(self.state, command, reply.verdict)

    def _check_nothing_follows(self) -> None:
        if self._inbox:
            raise ProtocolError(
                "the filter goes on after its answer", self.stage, self._inbox.unread
            )

    def _check_progress(self, parser: Parser, stage: Stage) -> None:
        parser.nothing()
        if self.dialect is Dialect.SENDMAIL and stage is not Stage.EOM:
            raise parser.error("outside of the end of message")

    def _modification(self, packet: Packet, parser: Parser, stage: Stage) -> Modification:
        action, parse = MODIFICATIONS[packet.command]
        if stage is not Stage.EOM:
            raise parser.error("outside of the end of message")
        if not self.negotiated.actions & action:
            raise parser.error(f"without {action.name}, which the filter did not ask for")
        return parse(parser)

    def _final(
        self, packet: Packet, parser: Parser, stage: Stage
    ) -> tuple[Verdict, SmtpReply | None]:
        if packet.command == b"y":
            smtp = parser.smtp_reply()
            return (Verdict.TEMPFAIL if smtp.code < 500 else Verdict.REJECT), smtp
        verdict = VERDICT_OF_REPLY.get(packet.command)
        if verdict is None:
            raise parser.error("is no answer to this step")
        parser.nothing()
        if verdict is Verdict.SKIP:
            if not self.negotiated.steps & Step.SKIP:
                raise parser.error("without SKIP, which was not agreed on")
            if stage not in _SKIPPABLE[self.dialect]:
                raise parser.error("is no answer to this step")
        if verdict is Verdict.DISCARD and stage in (Stage.CONNECT, Stage.HELO):
            raise parser.error("before there is a message")
        return verdict, None
