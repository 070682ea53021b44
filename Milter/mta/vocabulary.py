"""The words of the milter protocol: what MTA and filter tell each other, and what it is called.

The names in capital letters beside the constants are those of sendmail's ``libmilter/mfdef.h``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Union

Text = Union[str, bytes]
MacroValues = Mapping[str, Text]


def to_bytes(value: Text) -> bytes:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)


def to_str(value: Text) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


# --- flags and stages ----------------------------------------------------------------------------


class Action(enum.IntFlag):
    """What a filter may do to a message (``SMFIF_*``)."""

    NONE = 0  #: SMFIF_NONE
    ADDHDRS = 0x001  #: SMFIF_ADDHDRS
    CHGBODY = 0x002  #: SMFIF_CHGBODY
    ADDRCPT = 0x004  #: SMFIF_ADDRCPT
    DELRCPT = 0x008  #: SMFIF_DELRCPT
    CHGHDRS = 0x010  #: SMFIF_CHGHDRS
    QUARANTINE = 0x020  #: SMFIF_QUARANTINE
    CHGFROM = 0x040  #: SMFIF_CHGFROM
    ADDRCPT_PAR = 0x080  #: SMFIF_ADDRCPT_PAR
    SETSYMLIST = 0x100  #: SMFIF_SETSYMLIST


class Step(enum.IntFlag):
    """Protocol steps (``SMFIP_*``): what is not sent, not answered, or understood."""

    NONE = 0  #: every step is sent and answered
    NOCONNECT = 0x000001  #: SMFIP_NOCONNECT
    NOHELO = 0x000002  #: SMFIP_NOHELO
    NOMAIL = 0x000004  #: SMFIP_NOMAIL
    NORCPT = 0x000008  #: SMFIP_NORCPT
    NOBODY = 0x000010  #: SMFIP_NOBODY
    NOHDRS = 0x000020  #: SMFIP_NOHDRS
    NOEOH = 0x000040  #: SMFIP_NOEOH
    NR_HDR = 0x000080  #: SMFIP_NR_HDR, SMFIP_NOHREPL
    NOUNKNOWN = 0x000100  #: SMFIP_NOUNKNOWN
    NODATA = 0x000200  #: SMFIP_NODATA
    SKIP = 0x000400  #: SMFIP_SKIP
    RCPT_REJ = 0x000800  #: SMFIP_RCPT_REJ
    NR_CONN = 0x001000  #: SMFIP_NR_CONN
    NR_HELO = 0x002000  #: SMFIP_NR_HELO
    NR_MAIL = 0x004000  #: SMFIP_NR_MAIL
    NR_RCPT = 0x008000  #: SMFIP_NR_RCPT
    NR_DATA = 0x010000  #: SMFIP_NR_DATA
    NR_UNKN = 0x020000  #: SMFIP_NR_UNKN
    NR_EOH = 0x040000  #: SMFIP_NR_EOH
    NR_BODY = 0x080000  #: SMFIP_NR_BODY
    HDR_LEADSPC = 0x100000  #: SMFIP_HDR_LEADSPC
    MDS_256K = 0x10000000  #: SMFIP_MDS_256K
    MDS_1M = 0x20000000  #: SMFIP_MDS_1M


V1_ACTIONS = Action(0x00F)  # SMFI_V1_ACTS, what an offer of no actions at all stands for
V2_ACTIONS = Action(0x03F)  # SMFI_V2_ACTS
CURRENT_ACTIONS = Action(0x1FF)  # SMFI_CURR_ACTS
V1_STEPS = Step(0x3F)  # SMFI_V1_PROT, what an offer of no steps at all stands for
V2_STEPS = Step(0x7F)  # SMFI_V2_PROT
CURRENT_STEPS = Step(0x1FFFFF)  # SMFI_CURR_PROT


class Stage(enum.Enum):
    """The stages of a session; the value is the command byte (``SMFIC_*``)."""

    NEGOTIATE = b"O"  #: SMFIC_OPTNEG
    CONNECT = b"C"  #: SMFIC_CONNECT
    HELO = b"H"  #: SMFIC_HELO
    MAIL = b"M"  #: SMFIC_MAIL
    RCPT = b"R"  #: SMFIC_RCPT
    DATA = b"T"  #: SMFIC_DATA
    HEADER = b"L"  #: SMFIC_HEADER
    EOH = b"N"  #: SMFIC_EOH
    BODY = b"B"  #: SMFIC_BODY
    EOM = b"E"  #: SMFIC_BODYEOB
    UNKNOWN = b"U"  #: SMFIC_UNKNOWN
    ABORT = b"A"  #: SMFIC_ABORT
    QUIT = b"Q"  #: SMFIC_QUIT
    QUIT_NC = b"K"  #: SMFIC_QUIT_NC

    def __str__(self) -> str:
        return _STAGE_TEXT[self]


_STAGE_TEXT = {
    Stage.NEGOTIATE: "negotiation",
    Stage.CONNECT: "connect",
    Stage.HELO: "HELO",
    Stage.MAIL: "MAIL",
    Stage.RCPT: "RCPT",
    Stage.DATA: "DATA",
    Stage.HEADER: "header",
    Stage.EOH: "end of headers",
    Stage.BODY: "body",
    Stage.EOM: "end of message",
    Stage.UNKNOWN: "unknown command",
    Stage.ABORT: "abort",
    Stage.QUIT: "quit",
    Stage.QUIT_NC: "quit, new connection follows",
}


class Family(enum.Enum):
    """Address family of the SMTP client (``SMFIA_*``)."""

    UNKNOWN = b"U"  #: SMFIA_UNKNOWN: no address follows
    UNIX = b"L"  #: SMFIA_UNIX
    INET = b"4"  #: SMFIA_INET
    INET6 = b"6"  #: SMFIA_INET6


class Verdict(enum.Enum):
    """A filter's answer to a step.

    NOT_SENT and NO_REPLY are no answers: the step was not sent to the filter, or
    it was and no reply was agreed.  A reply code (``SMFIR_REPLYCODE``) counts as
    REJECT (5xx) or TEMPFAIL (4xx); :attr:`Reply.smtp` has its text.
    """

    CONTINUE = "continue"  #: SMFIR_CONTINUE
    ACCEPT = "accept"  #: SMFIR_ACCEPT
    REJECT = "reject"  #: SMFIR_REJECT
    TEMPFAIL = "tempfail"  #: SMFIR_TEMPFAIL
    DISCARD = "discard"  #: SMFIR_DISCARD
    SKIP = "skip"  #: SMFIR_SKIP
    SHUTDOWN = "shutdown"  #: SMFIR_SHUTDOWN: 421 and disconnect
    CONN_FAIL = "connection failure"  #: SMFIR_CONN_FAIL
    NO_REPLY = "no reply"  #: none was agreed for the step
    NOT_SENT = "not sent"  #: the filter did not want the step

    @property
    def goes_on(self) -> bool:
        """Whether the MTA goes on asking this filter about the message."""
        return self in _GOES_ON


_GOES_ON = frozenset((Verdict.CONTINUE, Verdict.SKIP, Verdict.NO_REPLY, Verdict.NOT_SENT))


class Dialect(enum.Enum):
    """Whose manners to follow where Postfix and sendmail differ.

    ================================  ==========================  ==========================
    matter                            POSTFIX                     SENDMAIL
    ================================  ==========================  ==========================
    ``chgheader`` of a deleted one    counts no more: later ones  still counts: later ones
                                      move up one index           keep their index
    ``insheader`` index               among the headers that are  deleted ones count too
                                      left
    ``addheader``                     appends                     goes before the first
                                                                  header of that name, else
                                                                  appends
    ``chgheader`` of ``subject``      the name changes with the   the name stays as it is
                                      value, to ``subject``
    ``addrcpt`` of a recipient who    goes out twice: only the    goes out once
    is there already                  client's has an ORCPT
    ``addrcpt`` twice of one new      goes out once, unless       goes out once, with the
    recipient                         NOTIFY or ORCPT differ      first parameters
    one new recipient in upper and    goes out once               goes out twice
    in lower case
    skip                              at RCPT, header, body and   at body only
                                      unknown command
    progress                          wherever a reply is due     at end of message only
    ================================  ==========================  ==========================

    Both agree on the rest: ``delrcpt`` removes all recipients that are written just
    so, upper and lower case included; a recipient whom the client names twice gets
    the message once.  ``chgheader`` counts from 1 among the headers of one
    name, without regard to case; 0 is taken as 1; past the last one it does what
    ``addheader`` does, or nothing where the value is empty; ``insheader`` with 0
    goes to the very top and past the end appends.  Where the MTA has put a
    Received header of its own on top (the *own_received* of :meth:`MTA.send`),
    the filter does not see it and ``chgheader`` does not count it, but
    ``insheader`` does.

    This was compared with Postfix 3.7 and sendmail 8.17, which do the same, with
    one exception: sendmail's list holds further headers that are never sent, as
    many as its configuration defines, and ``insheader`` counts them.  An index
    between 1 and the end can therefore come out higher up than here.
    """

    POSTFIX = "postfix"  #: the left column
    SENDMAIL = "sendmail"  #: the right one


def flag_names(flags: enum.IntFlag) -> list[str]:
    """The names of the bits set in *flags*; bits without a name come last as one hex number."""
    names = []
    rest = int(flags)
    for member in type(flags):
        if member.value and rest & member.value == member.value:
            names.append(str(member.name))
            rest &= ~member.value
    if rest:
        names.append(hex(rest))
    return names


# --- what a filter says --------------------------------------------------------------------------


@dataclass(frozen=True)
class SmtpReply:
    """The SMTP reply that a filter set (``smfi_setreply``, ``smfi_setmlreply``).

    :ivar code: 400 to 599.
    :ivar xcode: the enhanced status code (RFC 3463), None where not every line has the same.
    :ivar lines: the text of each line, without codes; ``%%`` has become ``%``.
    """

    code: int
    xcode: str | None
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The lines, joined by newlines."""
        return "\n".join(self.lines)

    def __str__(self) -> str:
        prefix = f"{self.xcode} " if self.xcode else ""
        last = len(self.lines) - 1
        return "\n".join(
            f"{self.code}{' ' if number == last else '-'}{prefix}{line}".rstrip(" ")
            for number, line in enumerate(self.lines)
        )


@dataclass(frozen=True)
class AddHeader:
    """``smfi_addheader`` of *name*.  *value* is as it came over the wire."""

    name: bytes
    value: bytes


@dataclass(frozen=True)
class InsertHeader:
    """``smfi_insheader`` of *name* with *value*: *index* counts from 0, the top."""

    index: int
    name: bytes
    value: bytes


@dataclass(frozen=True)
class ChangeHeader:
    """``smfi_chgheader``: *index* counts from 1 among the headers called *name*.

    An empty *value* deletes the header.
    """

    index: int
    name: bytes
    value: bytes


@dataclass(frozen=True)
class AddRecipient:
    """``smfi_addrcpt`` of *address*, or ``smfi_addrcpt_par`` where *with_params* is true.

    :ivar params: the ESMTP parameters, separated by spaces; None where there are none.
    """

    address: str
    params: str | None = None
    with_params: bool = False


@dataclass(frozen=True)
class DeleteRecipient:
    """``smfi_delrcpt`` of *address*."""

    address: str


@dataclass(frozen=True)
class ChangeSender:
    """``smfi_chgfrom`` to *address*.

    :ivar params: the ESMTP parameters, separated by spaces; None where there are none.
    """

    address: str
    params: str | None = None


@dataclass(frozen=True)
class ReplaceBody:
    """``smfi_replacebody``: *chunk* is one of the new body."""

    chunk: bytes


@dataclass(frozen=True)
class Quarantine:
    """``smfi_quarantine``, for *reason*."""

    reason: str


#: What a filter can ask for at the end of a message.
Modification = Union[
    AddHeader,
    InsertHeader,
    ChangeHeader,
    AddRecipient,
    DeleteRecipient,
    ChangeSender,
    ReplaceBody,
    Quarantine,
]


# --- offers and answers --------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What the MTA offers in negotiation (``SMFIC_OPTNEG``); any combination may be sent.

    An offer of no actions or no steps at all stands for those of protocol version 1.

    :ivar version: of the protocol.
    :ivar actions: what the filter may do.
    :ivar steps: what it may leave out, and what else the MTA understands.
    """

    version: int = 6
    actions: Action = CURRENT_ACTIONS
    steps: Step = CURRENT_STEPS

    @classmethod
    def for_version(cls, version: int) -> Offer:
        """What MTAs that speak protocol *version* (2 to 6) offer.

        Raises:
            ValueError: for another version.
        """
        if version not in range(2, 7):
            raise ValueError(f"protocol version {version} is not between 2 and 6")
        if version == 6:
            return cls()
        steps = V2_STEPS
        if version >= 3:
            steps |= Step.NOUNKNOWN
        if version >= 4:
            steps |= Step.NODATA
        return cls(version, V2_ACTIONS, steps)


@dataclass(frozen=True)
class Negotiated:
    """What MTA and filter agreed on.

    :ivar version: of the protocol.
    :ivar actions: what the filter may do.
    :ivar steps: what is left out, not answered, or understood.
    :ivar macros: for each stage for which the filter named the macros it wants, their names.
    """

    version: int
    actions: Action
    steps: Step
    macros: Mapping[Stage, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A filter's answer to one step.

    :ivar stage: the step.
    :ivar verdict: what the filter decided.
    :ivar smtp: the SMTP reply that the filter chose, if any.
    :ivar modifications: end of message only, in the filter's order.
    :ivar progress: how many progress packets came before the answer.
    """

    stage: Stage
    verdict: Verdict
    smtp: SmtpReply | None = None
    modifications: tuple[Modification, ...] = ()
    progress: int = 0
