"""A message on its way through a session: what an MTA says, and what comes of it.  No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import commands
from .commands import Command, Dialogue
from .edits import Editor, HeaderEdit
from .messages import Address, Client, Header, Message
from .session import Session
from .vocabulary import (
    MacroValues,
    Modification,
    Reply,
    SmtpReply,
    Stage,
    Step,
    Text,
    Verdict,
)
from .wire import CHUNK_SIZE


@dataclass(frozen=True)
class RefusedRecipient:
    """A recipient that does not get the message.

    :ivar recipient: the address.
    :ivar reply: what the filter said about it; the MTA itself refused it where
        :attr:`Address.rejected` is set.
    """

    recipient: Address
    reply: Reply


@dataclass
class Result:
    """What became of a message.

    Modifications take effect only where the message is accepted; with any other
    verdict the message and the envelope are as they were.

    :ivar verdict: the deciding verdict; CONTINUE at end of message accepts.
    :ivar stage: where it was given.
    :ivar smtp: the SMTP reply that goes with it, if the filter chose one.
    :ivar sender: the envelope sender.
    :ivar recipients: those that get the message.
    :ivar refused: those that do not.
    :ivar message: headers and body.
    :ivar quarantine: the reason for holding the message, None where it is not held.
    :ivar modifications: all that the filter asked for, in its order.
    :ivar header_edits: every header, the deleted ones too, in place.
    :ivar body_replaced: whether the filter gave a new body.
    :ivar replies: the answer to each step, in order.
    """

    verdict: Verdict
    stage: Stage
    smtp: SmtpReply | None
    sender: Address
    recipients: list[Address]
    refused: list[RefusedRecipient]
    message: Message
    quarantine: str | None = None
    modifications: tuple[Modification, ...] = ()
    header_edits: list[HeaderEdit] = field(default_factory=list)
    body_replaced: bool = False
    replies: list[Reply] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether the message is delivered or held (and neither refused nor discarded)."""
        return self.verdict is Verdict.ACCEPT or self.verdict.goes_on


def greeting(client: Client, helo: Text | None, replies: list[Reply]) -> Dialogue[None]:
    """Connect and HELO; *replies* gets the answers."""
    replies.append((yield commands.connect_info(client.name, client.address, client.port)))
    if replies[0].verdict.goes_on:
        replies.append((yield commands.helo(client.name if helo is None else helo)))


class Transaction:
    """One message on its way through the steps.

    Args:
        session: tells what was agreed on and which macros are known.
    """

    def __init__(
        self, session: Session, message: Message, sender: Address, recipients: list[Address]
    ) -> None:
        self._session = session
        self._message = message
        self._sender = sender
        self._asked = recipients
        self._refused: list[RefusedRecipient] = []
        self._replies: list[Reply] = []

    def run(
        self, greeting: list[Reply], *, body_in_eom: bool = False, own: Header | None = None
    ) -> Dialogue[Result]:
        """Go through the steps, in SMTP's order; gives what became of the message.

        Args:
            greeting: the answers to connect and HELO.
            body_in_eom: send the last piece of the body with the end of message.
            own: a header that the MTA puts on top, unseen by the filter.
        """
        self._replies = list(greeting)
        decided = next((reply for reply in greeting if not reply.verdict.goes_on), None)
        if decided is None:
            decided = yield from self._decide(body_in_eom)
            if decided.stage is Stage.RCPT and decided.verdict is not Verdict.ACCEPT:
                yield Command(Stage.ABORT)
        return self._result(decided, own)

    def _decide(self, body_in_eom: bool) -> Dialogue[Reply]:
        """Go on until an answer decides."""
        goes_on = yield from self._envelope()
        if goes_on and self._is_anybody_left():
            goes_on = yield from self._content(body_in_eom)
        if not goes_on or self._is_anybody_left():
            return self._replies[-1]
        # Nobody is left to get the message: the last refusal stands for all.
        last = self._refused[-1]
        if last.recipient.rejected is None:
            return last.reply
        smtp = commands.parse_rejection(last.recipient.rejected)
        return Reply(Stage.RCPT, Verdict.REJECT, smtp)

    def _is_anybody_left(self) -> bool:
        return len(self._refused) < len(self._asked)

    def _say(self, command: Command) -> Dialogue[bool]:
        """Say *command* and note the answer; gives whether the message goes on."""
        return self._note((yield command))

    def _note(self, reply: Reply) -> bool:
        self._replies.append(reply)
        return reply.verdict.goes_on

    def _envelope(self) -> Dialogue[bool]:
        macros = self._with_default("{mail_addr}", Stage.MAIL, self._sender.address)
        sender = f"<{self._sender.address}>"
        if not (yield from self._say(commands.mail(sender, self._sender.params, macros))):
            return False
        for recipient in self._asked:
            goes_on = yield from self._recipient(recipient)
            if not goes_on:
                return False
        return True

    def _recipient(self, recipient: Address) -> Dialogue[bool]:
        rejected = recipient.rejected
        macros = None
        if rejected is None:
            macros = self._with_default("{rcpt_addr}", Stage.RCPT, recipient.address)
        command = commands.rcpt(f"<{recipient.address}>", recipient.params, rejected, macros)
        goes_on = yield from self._say(command)
        reply = self._replies[-1]
        # Such a verdict is about this recipient and not about the message.
        refused = reply.verdict in (Verdict.REJECT, Verdict.TEMPFAIL)
        if rejected is not None or refused:
            self._refused.append(RefusedRecipient(recipient, reply))
        return goes_on or refused

    def _content(self, body_in_eom: bool) -> Dialogue[bool]:
        steps = self._session.negotiated.steps
        if not (yield from self._say(Command(Stage.DATA))):
            return False
        leading_space = bool(steps & Step.HDR_LEADSPC)
        for header in self._message.headers:
            command = commands.header(header.name, header.wire_value(leading_space))
            if not (yield from self._say(command)):
                return False
        if not (yield from self._say(Command(Stage.EOH))):
            return False
        body, rest = self._message.body, b""
        if body_in_eom and not steps & Step.NOBODY:
            cut = max(len(body) - 1, 0) // CHUNK_SIZE * CHUNK_SIZE
            body, rest = body[:cut], body[cut:]
        reply = yield from commands.body(body)
        if body and not self._note(reply):
            return False
        rest = b"" if reply.verdict is Verdict.SKIP else rest
        return (yield from self._say(Command(Stage.EOM, rest)))

    def _not_refused(self) -> list[Address]:
        refused = [id(one.recipient) for one in self._refused]
        return [one for one in self._asked if one.rejected is None and id(one) not in refused]

    def _with_default(self, name: str, stage: Stage, value: str) -> MacroValues | None:
        return None if self._session.macros.has(stage, name) else {name: value}

    def _result(self, decided: Reply, own: Header | None) -> Result:
        editor = Editor(
            self._message,
            self._sender,
            self._not_refused(),
            dialect=self._session.dialect,
            own_received=own,
            leading_space=bool(self._session.negotiated.steps & Step.HDR_LEADSPC),
        )
        result = Result(
            verdict=decided.verdict,
            stage=decided.stage,
            smtp=decided.smtp,
            sender=self._sender,
            recipients=self._not_refused(),
            refused=self._refused,
            message=self._message,
            modifications=decided.modifications,
            replies=self._replies,
        )
        if result.accepted:
            editor.apply(*decided.modifications)
            result.sender, result.recipients = editor.sender, editor.recipients
            result.quarantine = editor.quarantine
            result.body_replaced = editor.body_replaced
        result.message = editor.message
        result.header_edits = editor.header_edits
        return result
