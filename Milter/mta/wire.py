"""Packets: how they are framed, and what those of a filter say.  No I/O.

Who breaks the wire format gets a :class:`~Milter.mta.ProtocolError`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .errors import NegotiationError, ProtocolError
from .vocabulary import (
    V1_ACTIONS,
    V1_STEPS,
    Action,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    InsertHeader,
    Modification,
    Negotiated,
    Offer,
    Quarantine,
    ReplaceBody,
    SmtpReply,
    Stage,
    Step,
    Text,
    Verdict,
    flag_names,
    to_bytes,
    to_str,
)

CHUNK_SIZE = 65535  # MILTER_CHUNK_SIZE: bytes of body in one packet
MAX_DATA_SIZE = 65535  # MILTER_MAX_DATA_SIZE: what libmilter accepts in one command
MDS_256K_SIZE = 256 * 1024 - 1  # MILTER_MDS_256K
MDS_1M_SIZE = 1024 * 1024 - 1  # MILTER_MDS_1M
MAX_REPLY_SIZE = 16 * 1024 * 1024  # ours: a longer length field can only be garbage
MAX_REPLY_LINES = 32  # MAXREPLIES of libmilter
MAX_REPLY_LINE = 980  # MAXREPLYLEN of libmilter, bytes of text in one line
OPTION_SIZE = 12  # MILTER_OPTLEN: version, actions, protocol steps

# SMFIM_*: how a filter's list of macros numbers the stages.
MACRO_STAGES = (
    Stage.CONNECT,
    Stage.HELO,
    Stage.MAIL,
    Stage.RCPT,
    Stage.DATA,
    Stage.EOM,
    Stage.EOH,
)

VERDICT_OF_REPLY = {
    b"c": Verdict.CONTINUE,
    b"a": Verdict.ACCEPT,
    b"r": Verdict.REJECT,
    b"t": Verdict.TEMPFAIL,
    b"d": Verdict.DISCARD,
    b"s": Verdict.SKIP,
    b"4": Verdict.SHUTDOWN,
    b"f": Verdict.CONN_FAIL,
}

_REPLY_NAMES = {
    b"+": "SMFIR_ADDRCPT",
    b"-": "SMFIR_DELRCPT",
    b"2": "SMFIR_ADDRCPT_PAR",
    b"4": "SMFIR_SHUTDOWN",
    b"O": "SMFIC_OPTNEG",
    b"a": "SMFIR_ACCEPT",
    b"b": "SMFIR_REPLBODY",
    b"c": "SMFIR_CONTINUE",
    b"d": "SMFIR_DISCARD",
    b"e": "SMFIR_CHGFROM",
    b"f": "SMFIR_CONN_FAIL",
    b"h": "SMFIR_ADDHEADER",
    b"i": "SMFIR_INSHEADER",
    b"l": "SMFIR_SETSYMLIST",
    b"m": "SMFIR_CHGHEADER",
    b"p": "SMFIR_PROGRESS",
    b"q": "SMFIR_QUARANTINE",
    b"r": "SMFIR_REJECT",
    b"s": "SMFIR_SKIP",
    b"t": "SMFIR_TEMPFAIL",
    b"y": "SMFIR_REPLYCODE",
}


# --- packets -------------------------------------------------------------------------------------


class Packet(NamedTuple):
    """One packet from the filter.

    :ivar command: the command byte.
    :ivar data: what follows it.
    """

    command: bytes
    data: bytes

    @property
    def name(self) -> str:
        """The packet's name in ``mfdef.h``, or its command byte where there is none."""
        return _REPLY_NAMES.get(self.command, repr(self.command))

    def __bytes__(self) -> bytes:
        return frame(self.command, self.data)


def frame(command: bytes, data: bytes = b"") -> bytes:
    """A packet as it travels."""
    return struct.pack("!I", len(data) + len(command)) + command + data


def c_string(what: str, value: Text) -> bytes:
    """*value* as the wire carries a string: its bytes and a NUL."""
    data = to_bytes(value)
    if b"\0" in data:
        raise ValueError(f"{what} {value!r}: a NUL would end it on the wire")
    return data + b"\0"


class Inbox:
    """Bytes come in, packets go out.

    :ivar ended: whether no more bytes will come.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.ended = False

    @property
    def unread(self) -> bytes:
        """What has come in and is in no packet yet that was taken."""
        return bytes(self._buffer)

    def __bool__(self) -> bool:
        return bool(self._buffer)

    def receive(self, data: bytes) -> None:
        """Take in bytes; none at all are the end of the stream."""
        self._buffer += data
        self.ended = self.ended or not data

    def clear(self) -> None:
        """Forget what has come in."""
        self._buffer.clear()

    def take(self, stage: Stage | None) -> Packet | None:
        """The next packet, None where it has not come in as a whole."""
        if len(self._buffer) < 4:
            return None
        (length,) = struct.unpack_from("!I", self._buffer)
        if length == 0:
            raise ProtocolError("a packet without a command", stage, self.unread)
        if length > MAX_REPLY_SIZE:
            raise ProtocolError(
                f"a packet of {length} bytes, more than {MAX_REPLY_SIZE}", stage, self.unread
            )
        if len(self._buffer) < 4 + length:
            return None
        command, data = bytes(self._buffer[4:5]), bytes(self._buffer[5 : 4 + length])
        del self._buffer[: 4 + length]
        return Packet(command, data)


# --- answers and modifications -------------------------------------------------------------------


_FIELD_NAME = re.compile(rb"[!-9;-~\x80-\xff]+")
# A line end that no space or tab follows ends the field: what comes next would be forged.
# A CR on its own is one to some programs, and to others not.
_FORGING_LINE_END = re.compile(rb"\r(?!\n)|\n(?![ \t])")


class Parser:
    """Reads a packet's data by the wire format; a violation is a :class:`ProtocolError`."""

    def __init__(self, packet: Packet, stage: Stage) -> None:
        self._packet = packet
        self._stage = stage

    def error(self, text: str) -> ProtocolError:
        """The error that *text* tells of this packet."""
        return ProtocolError(f"{self._packet.name} {text}", self._stage, bytes(self._packet))

    def nothing(self) -> None:
        """The packet has no data."""
        if self._packet.data:
            raise self.error(f"with {len(self._packet.data)} bytes of data, none is allowed")

    def strings(self, data: bytes, least: int, most: int) -> list[bytes]:
        """Strings that end in NUL, *least* to *most* of them."""
        if not data.endswith(b"\0"):
            raise self.error("does not end in NUL")
        parts = data[:-1].split(b"\0")
        if not least <= len(parts) <= most:
            allowed = str(least) if least == most else f"{least} or {most}"
            raise self.error(f"has {len(parts)} strings instead of {allowed}")
        return parts

    def address(self) -> str:
        """An address alone."""
        return self.address_and_params(most=1)[0]

    def address_and_params(self, most: int = 2) -> tuple[str, str | None]:
        """An address, and ESMTP parameters where there are some."""
        parts = self.strings(self._packet.data, 1, most)
        if not parts[0]:
            raise self.error("has an empty address")
        if any(b"\r" in part or b"\n" in part for part in parts):
            raise self.error("has a line end in an address or its parameters")
        return to_str(parts[0]), to_str(parts[1]) if len(parts) > 1 else None

    def reason(self) -> str:
        """A reason for people."""
        (reason,) = self.strings(self._packet.data, 1, 1)
        if not reason:
            raise self.error("has an empty reason")
        return to_str(reason)

    def header(self, data: bytes | None = None) -> tuple[bytes, bytes]:
        """A header's name and value."""
        name, value = self.strings(self._packet.data if data is None else data, 2, 2)
        if not _FIELD_NAME.fullmatch(name):
            raise self.error(f"has the header name {name!r}")
        if _FORGING_LINE_END.search(value):
            raise self.error("has a line end in the value that is no fold")
        return name, value

    def indexed_header(self) -> tuple[int, bytes, bytes]:
        """An index, and a header's name and value."""
        data = self._packet.data
        if len(data) < 4:
            raise self.error("is too short for an index")
        (index,) = struct.unpack_from("!i", data)
        if index < 0:
            raise self.error(f"has the index {index}")
        return (index, *self.header(data[4:]))

    def body_chunk(self) -> bytes:
        """A part of a body."""
        if len(self._packet.data) > CHUNK_SIZE:
            raise self.error(f"has {len(self._packet.data)} bytes, more than {CHUNK_SIZE}")
        return self._packet.data

    def smtp_reply(self) -> SmtpReply:
        """An SMTP reply of one line or several."""
        (data,) = self.strings(self._packet.data, 1, 1)
        lines = data.split(b"\r\n")
        if len(lines) > MAX_REPLY_LINES:
            raise self.error(f"has {len(lines)} lines, more than {MAX_REPLY_LINES}")
        code = lines[0][:3]
        last = len(lines) - 1
        texts = [self._reply_line(line, code, number == last) for number, line in enumerate(lines)]
        xcode = _common_xcode(texts)
        if xcode is not None:
            texts = [text[len(xcode) :].lstrip(b" ") for text in texts]
        if any(len(text) > MAX_REPLY_LINE for text in texts):
            raise self.error(f"has a line of more than {MAX_REPLY_LINE} bytes")
        return SmtpReply(
            int(code),
            None if xcode is None else to_str(xcode),
            tuple(to_str(text.replace(b"%%", b"%")) for text in texts),
        )

    def _reply_line(self, line: bytes, code: bytes, last: bool) -> bytes:
        if not re.fullmatch(rb"[45][0-9][0-9][ -][^\r\n]*", line):
            raise self.error(f"has a line that is no SMTP reply: {line!r}")
        if line[:3] != code:
            raise self.error(f"changes its code from {code!r} to {line[:3]!r}")
        if (line[3:4] == b" ") != last:
            raise self.error(
                "goes on after a line that says it is the last"
                if not last
                else "ends with a line that says another follows"
            )
        if b"%" in line.replace(b"%%", b""):
            raise self.error("has a single %, for which sendmail drops the reply")
        return line[4:]


def _common_xcode(texts: Sequence[bytes]) -> bytes | None:
    codes = {
        found.group(1) if found else None
        for found in (re.match(rb"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: |$)", text) for text in texts)
    }
    return codes.pop() if len(codes) == 1 else None


def _parse_add_header(parser: Parser) -> Modification:
    return AddHeader(*parser.header())


def _parse_insert_header(parser: Parser) -> Modification:
    return InsertHeader(*parser.indexed_header())


def _parse_change_header(parser: Parser) -> Modification:
    return ChangeHeader(*parser.indexed_header())


def _parse_add_recipient(parser: Parser) -> Modification:
    return AddRecipient(parser.address())


def _parse_add_recipient_par(parser: Parser) -> Modification:
    address, params = parser.address_and_params()
    return AddRecipient(address, params, with_params=True)


def _parse_delete_recipient(parser: Parser) -> Modification:
    return DeleteRecipient(parser.address())


def _parse_change_sender(parser: Parser) -> Modification:
    return ChangeSender(*parser.address_and_params())


def _parse_replace_body(parser: Parser) -> Modification:
    return ReplaceBody(parser.body_chunk())


def _parse_quarantine(parser: Parser) -> Modification:
    return Quarantine(parser.reason())


#: By command: the action that the filter must have asked for, and how to read the packet.
MODIFICATIONS: dict[bytes, tuple[Action, Callable[[Parser], Modification]]] = {
    b"h": (Action.ADDHDRS, _parse_add_header),
    b"i": (Action.ADDHDRS, _parse_insert_header),
    b"m": (Action.CHGHDRS, _parse_change_header),
    b"+": (Action.ADDRCPT, _parse_add_recipient),
    b"2": (Action.ADDRCPT_PAR, _parse_add_recipient_par),
    b"-": (Action.DELRCPT, _parse_delete_recipient),
    b"e": (Action.CHGFROM, _parse_change_sender),
    b"b": (Action.CHGBODY, _parse_replace_body),
    b"q": (Action.QUARANTINE, _parse_quarantine),
}


# --- negotiation ---------------------------------------------------------------------------------


def parse_negotiation(packet: Packet, offer: Offer) -> Negotiated:
    """Read the answer to an offer.

    Raises:
        NegotiationError: it does not fit the offer.
    """

    def error(text: str) -> NegotiationError:
        return NegotiationError(text, Stage.NEGOTIATE, bytes(packet))

    if packet.command != b"O":
        raise error(f"answered with {packet.name} instead of SMFIC_OPTNEG")
    if len(packet.data) < OPTION_SIZE:
        raise error(f"answered with {len(packet.data)} bytes, at least {OPTION_SIZE} are due")
    version, actions, steps = struct.unpack_from("!III", packet.data)
    if not 2 <= version <= offer.version:
        raise error(f"answered with version {version} to an offer of {offer.version}")
    too_much = Action(actions & ~int(offer.actions or V1_ACTIONS))
    if too_much:
        raise error(f"asks for actions that were not offered: {', '.join(flag_names(too_much))}")
    not_offered = Step(steps & ~int(offer.steps or V1_STEPS))
    if not_offered:
        raise error(f"asks for steps that were not offered: {', '.join(flag_names(not_offered))}")
    macros = _parse_symlists(packet.data[OPTION_SIZE:], error)
    if macros and not offer.actions & Action.SETSYMLIST:
        raise error("names macros although SETSYMLIST was not offered")
    return Negotiated(version, Action(actions), Step(steps), macros)


def _parse_symlists(
    data: bytes, error: Callable[[str], NegotiationError]
) -> dict[Stage, tuple[str, ...]]:
    lists: dict[Stage, tuple[str, ...]] = {}
    while data:
        if len(data) < 4:
            raise error("has a list of macros without a stage")
        (number,) = struct.unpack_from("!I", data)
        if number >= len(MACRO_STAGES):
            raise error(f"names macros for the stage number {number}")
        names, nul, rest = data[4:].partition(b"\0")
        if not nul:
            raise error("has a list of macros that does not end in NUL")
        stage = MACRO_STAGES[number]
        if stage in lists:
            raise error(f"names the macros for {stage} twice")
        lists[stage] = tuple(to_str(name) for name in re.split(rb"[\s,]+", names) if name)
        data = rest
    return lists
