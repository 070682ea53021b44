"""A recorded session that is played to a filter again, and what it answers now."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import FilterClosed, FilterTimeout, MTAError, ProtocolError
from .recording import CLOSES, RAW, Entry, Recording, Splitter
from .renegotiated import Renegotiated
from .vocabulary import Modification, Reply, SmtpReply, Stage, Verdict
from .wire import MODIFICATIONS, VERDICT_OF_REPLY, Packet, Parser
from .words import Side, stage_of

if TYPE_CHECKING:
    from .client import MTA

_PROGRESS, _CONTINUE = b"p", b"c"


@dataclass(frozen=True)
class Difference:
    """Where a filter first answers something else than was recorded.

    :ivar line: of the recording.
    :ivar stage: what it answers to; None before the first.
    :ivar message: the number of the message in the session, 0 before the first.
    :ivar recorded: what the filter said then, in words.
    :ivar now: what it says now.
    :ivar note: of a negotiation that differs, what becomes of the rest of the session.
    :ivar goes_on: whether that was played.
    """

    line: int
    stage: Stage | None
    message: int
    recorded: str
    now: str
    note: str = ""
    goes_on: bool = False

    def __str__(self) -> str:
        where = f"line {self.line}, at {self.stage or 'the start'}"
        if self.message:
            where += f" of message {self.message}"
        note = f"\n  {self.note}" if self.note else ""
        return f"{where}\n  recorded  {self.recorded}\n  now       {self.now}{note}"


@dataclass
class Replay:
    """What came of playing a recording.

    :ivar differences: at most two, the second where the first is that of a negotiation after which
        the rest could be played.  The answer that holds one is heard out, and nothing is played
        after any other.
    :ivar answers: what the filter said now, each packet with the stage that it belongs to.
    """

    differences: list[Difference] = field(default_factory=list)
    answers: list[tuple[Stage, Packet]] = field(default_factory=list)

    @property
    def difference(self) -> Difference | None:
        """The first; None where all answers are as recorded."""
        return self.differences[0] if self.differences else None

    @property
    def replies(self) -> list[Reply]:
        """The answers as :class:`Reply`, one for each step that was answered.

        Raises:
            ProtocolError: the filter has said what no MTA understands.
        """
        found: list[Reply] = []
        modifications: list[Modification] = []
        progress = 0
        for stage, packet in self.answers:
            parser = Parser(packet, stage)
            if stage is Stage.NEGOTIATE:
                continue
            if packet.command == _PROGRESS:
                progress += 1
            elif packet.command in MODIFICATIONS:
                modifications.append(MODIFICATIONS[packet.command][1](parser))
            else:
                verdict, smtp = _final(packet, parser)
                found.append(Reply(stage, verdict, smtp, tuple(modifications), progress))
                modifications, progress = [], 0
        return found


def _is_of_mail(entry: Entry) -> bool:
    """Whether this is MAIL or the macros for it, which go out where the filter wants no MAIL."""
    mail = Stage.MAIL.value
    return entry.command == mail or (entry.name == "macros" and entry.data[:1] == mail)


def _final(packet: Packet, parser: Parser) -> tuple[Verdict, SmtpReply | None]:
    if packet.command == b"y":
        smtp = parser.smtp_reply()
        return (Verdict.TEMPFAIL if smtp.code < 500 else Verdict.REJECT), smtp
    verdict = VERDICT_OF_REPLY.get(packet.command)
    if verdict is None:
        raise parser.error("is no answer to this step")
    return verdict, None


class Player:
    """Plays a recording on a connection on which nothing was said yet.

    How often the filter asks for more time is not compared, as that depends on the machine.

    Args:
        ignored_headers: names of headers whose values may differ, such as those with a date.
        ignore_negotiation: that it differs is no difference, where the rest can be played.
    """

    def __init__(
        self,
        mta: MTA,
        ignored_headers: Collection[str] = (),
        ignore_negotiation: bool = False,
    ) -> None:
        self._mta = mta
        self._ignores_negotiation = ignore_negotiation
        self._way = Renegotiated()
        self._ignored = {
            name.encode("utf-8", "surrogateescape").lower() for name in ignored_headers
        }
        self._stage: Stage | None = None
        self._message = 0
        self._before: Entry | None = None
        self._is_broken = False
        self._replay = Replay()

    def play(self, recording: Recording) -> Replay:
        """Play it to the end, or to the first difference after the negotiation."""
        for entry in recording.entries:
            if entry.side is Side.MTA:
                now = self._say(entry)
                recorded = "no answer"
            elif self._is_left_out(entry):
                continue
            else:
                now = self._hear_end() if entry.is_end else self._hear(entry)
                recorded = str(entry)
            if now is not None and not self._goes_on(entry, recorded, now):
                break
            if entry.side is Side.FILTER and (entry.is_end or entry.name == RAW):
                break  # the filter says nothing more
        return self._replay

    def _is_left_out(self, entry: Entry) -> bool:
        """Whether the filter is not asked, or does not answer, where it did so then."""
        if entry.is_end or entry.name == RAW:
            return False
        silent = self._stage in self._way.left_out or self._stage in self._way.silent
        return silent or entry.command == _PROGRESS

    def _goes_on(self, entry: Entry, recorded: str, now: str) -> bool:
        """Note a difference; returns whether what follows can be played nevertheless."""
        if self._stage is Stage.NEGOTIATE and self._is_negotiation(entry):
            _, packet = self._replay.answers[-1]
            self._way = Renegotiated.between(entry.data, packet.data)
            if self._ignores_negotiation and not self._way.obstacle:
                return True
            note, goes_on = str(self._way), not self._way.obstacle
        else:
            note, goes_on = "", False
        self._replay.differences.append(
            Difference(entry.line, self._stage, self._message, recorded, now, note, goes_on)
        )
        return goes_on

    def _is_negotiation(self, entry: Entry) -> bool:
        command = Stage.NEGOTIATE.value
        answers = self._replay.answers
        return entry.command == command and bool(answers) and answers[-1][1].command == command

    def _say(self, entry: Entry) -> str | None:
        """Say it; returns what the filter answers, where it did not then and now does not go on."""
        self._stage = stage_of(entry.command or b"") or self._stage
        if _is_of_mail(entry) and not (self._before and _is_of_mail(self._before)):
            self._message += 1
        self._before = entry
        stage = stage_of(entry.command or b"")
        if self._is_broken or stage in self._way.left_out:
            return None
        try:
            if entry.is_end:
                self._mta.half_close()
            else:
                self._mta.send_raw(entry.wire)
        except FilterClosed:
            # What the filter has said before is still to be read.
            self._is_broken = True
        if stage in self._way.answered:
            return self._hear(Entry.packet(Side.FILTER, 0.0, _CONTINUE, b""))
        return None

    def _hear(self, entry: Entry) -> str | None:
        """What the filter says instead of what was recorded, None where it says just that."""
        try:
            packet = self._next()
        except FilterTimeout:
            return f"nothing within {self._mta.timeout:g} s"
        except MTAError as exc:
            if entry.name == RAW and exc.received and entry.data.startswith(exc.received[:4]):
                return None
            if isinstance(exc, FilterClosed) and not exc.received:
                return f"{CLOSES} the connection"
            return str(exc)
        if self._stage is not None:
            self._replay.answers.append((self._stage, packet))
        command, data = entry.command, entry.data
        if packet.command == command and self._comparable(command, packet.data) == (
            self._comparable(command, data)
        ):
            return None
        if packet.command in MODIFICATIONS:
            self._hear_out()
        return str(Entry.packet(Side.FILTER, 0.0, packet.command, packet.data))

    def _hear_out(self) -> None:
        """Take in the rest of an answer, so that what the filter decides now is known."""
        with contextlib.suppress(MTAError):
            packet = self._next()
            while self._stage is not None:
                self._replay.answers.append((self._stage, packet))
                if packet.command not in MODIFICATIONS:
                    break
                packet = self._next()

    def _next(self) -> Packet:
        while True:
            packet = self._mta.read_packet()
            if packet.command != _PROGRESS:
                return packet
            if self._stage is not None:
                self._replay.answers.append((self._stage, packet))

    def _comparable(self, command: bytes, data: bytes) -> bytes:
        """The data of a packet without what may differ."""
        start = {b"h": 0, b"i": 4, b"m": 4}.get(command)
        if start is None or not self._ignored:
            return data
        name, nul, value = data[start:].partition(b"\0")
        if name.lower() not in self._ignored:
            return data
        return data[:start] + name + nul + (b"ignored" if value.rstrip(b"\0") else b"")

    def _hear_end(self) -> str | None:
        try:
            self._mta.expect_close()
        except FilterTimeout:
            return "the connection stays open"
        except ProtocolError as exc:
            packets = list(Splitter().feed(exc.received))
            command, data = packets[0] if packets else (None, exc.received)
            return str(Entry.packet(Side.FILTER, 0.0, command, data))
        return None
