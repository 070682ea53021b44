"""The MTA's side of the milter protocol: a client for tests and tools.

A mail filter answers questions that a mail transfer agent (MTA) asks it over a
socket.  This module asks them, as Postfix and sendmail do, and tells what the
filter wants done to the message.  It needs nothing but the standard library.

>>> from Milter.mta import MTA, Client, Verdict
>>> message = b"Subject: hello\\r\\n\\r\\nA body.\\r\\n"
>>> with MTA.connect("unix:/run/filter.sock", wait_for=5) as mta:  # doctest: +SKIP
...     result = mta.send(
...         message,
...         sender="alice@example.com",
...         recipients=["bob@example.org"],
...         client=Client("mail.example.com", "192.0.2.7"),
...         helo="mail.example.com",
...         macros={"i": "4XyZ0123", "CONNECT:j": "mx.example.org"},
...     )
...     assert result.verdict in (Verdict.ACCEPT, Verdict.CONTINUE)
...     print(result.message["Subject"], result.recipients, result.modifications)

Several messages may follow each other on one connection.  Leaving the ``with``
block sends QUIT and waits until the filter has closed the connection, so that
nothing the filter says too much goes unnoticed.

The single steps are methods too, one for each command; each returns a
:class:`Reply`:

>>> with MTA.connect("inet:8891@127.0.0.1") as mta:  # doctest: +SKIP
...     mta.connect_info("mail.example.com", "192.0.2.7", 2525, macros={"j": "mx"})
...     mta.helo("mail.example.com")
...     mta.mail("<alice@example.com>", "SIZE=1000")
...     assert mta.rcpt("<bob@example.org>").verdict is Verdict.CONTINUE
...     mta.data(); mta.header("Subject", "hello"); mta.eoh(); mta.body(b"A body.\\r\\n")
...     print(mta.eom().modifications)

Steps are not held to SMTP's order, so that a test can break it;
:meth:`MTA.send` keeps it.  For what no MTA would say there are
:meth:`MTA.send_packet`, :meth:`MTA.send_raw` and :meth:`MTA.read_packet`.

**Text.**  Arguments are ``str`` or ``bytes``.  A ``str`` travels as UTF-8 with
``surrogateescape``, and text that comes back is decoded so; whatever a filter
says can be compared and sent again without loss.  Header names and values and
the body are ``bytes`` in results.

**Strictness.**  The filter is held to the protocol: it may ask only for what
was offered, must answer each step once with an answer that the step allows,
must stay silent where silence was agreed, may modify only at the end of the
message and only as agreed, and each packet must have the form that its command
prescribes.  What breaks a rule is a :class:`ProtocolError`.  A filter that does
not answer in time is a :class:`FilterTimeout`, one that hangs up a
:class:`FilterClosed`.  Each says at which stage, and what was received.

**MTAs differ** in how they apply edits; see :class:`Dialect`.

The wire format is that of sendmail's libmilter, header ``libmilter/mfdef.h``;
comments beside the constants cite its names.
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Union

__all__ = [
    "MTA",
    "Action",
    "AddHeader",
    "AddRecipient",
    "Address",
    "ChangeHeader",
    "ChangeSender",
    "Client",
    "DeleteRecipient",
    "Dialect",
    "Family",
    "FilterClosed",
    "FilterTimeout",
    "FilterUnreachable",
    "Header",
    "HeaderEdit",
    "InsertHeader",
    "MTAError",
    "Message",
    "Modification",
    "Negotiated",
    "NegotiationError",
    "Offer",
    "Packet",
    "ProtocolError",
    "Quarantine",
    "RefusedRecipient",
    "ReplaceBody",
    "Reply",
    "Result",
    "SmtpReply",
    "SocketAddress",
    "Stage",
    "Step",
    "Verdict",
    "flag_names",
    "parse_socket",
]

Text = Union[str, bytes]
MacroValues = Mapping[str, Text]

CHUNK_SIZE = 65535  # MILTER_CHUNK_SIZE: bytes of body in one packet
MAX_DATA_SIZE = 65535  # MILTER_MAX_DATA_SIZE: what libmilter accepts in one command
MDS_256K_SIZE = 256 * 1024 - 1  # MILTER_MDS_256K
MDS_1M_SIZE = 1024 * 1024 - 1  # MILTER_MDS_1M
MAX_REPLY_SIZE = 16 * 1024 * 1024  # ours: a longer length field can only be garbage
MAX_REPLY_LINES = 32  # MAXREPLIES of libmilter
MAX_REPLY_LINE = 980  # MAXREPLYLEN of libmilter, bytes of text in one line
OPTION_SIZE = 12  # MILTER_OPTLEN: version, actions, protocol steps


# --- the vocabulary of mfdef.h -----------------------------------------------------------


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

_NO_STEP = {
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

_NO_REPLY = {
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

# SMFIM_*: how a filter's list of macros numbers the stages.
_MACRO_STAGES = (
    Stage.CONNECT,
    Stage.HELO,
    Stage.MAIL,
    Stage.RCPT,
    Stage.DATA,
    Stage.EOM,
    Stage.EOH,
)

# The order in which an MTA comes to know its macros.
_MACRO_ORDER = (
    Stage.CONNECT,
    Stage.HELO,
    Stage.MAIL,
    Stage.RCPT,
    Stage.DATA,
    Stage.EOH,
    Stage.EOM,
)

# Where sendmail's and Postfix's default configurations send a macro.
_USUAL_STAGE = {
    "j": Stage.CONNECT,
    "_": Stage.CONNECT,
    "v": Stage.CONNECT,
    "{daemon_name}": Stage.CONNECT,
    "{daemon_addr}": Stage.CONNECT,
    "{daemon_port}": Stage.CONNECT,
    "{if_name}": Stage.CONNECT,
    "{if_addr}": Stage.CONNECT,
    "{client_connections}": Stage.CONNECT,
    "{tls_version}": Stage.HELO,
    "{cipher}": Stage.HELO,
    "{cipher_bits}": Stage.HELO,
    "{cert_subject}": Stage.HELO,
    "{cert_issuer}": Stage.HELO,
    "i": Stage.MAIL,
    "{auth_type}": Stage.MAIL,
    "{auth_authen}": Stage.MAIL,
    "{auth_ssf}": Stage.MAIL,
    "{auth_author}": Stage.MAIL,
    "{mail_mailer}": Stage.MAIL,
    "{mail_host}": Stage.MAIL,
    "{mail_addr}": Stage.MAIL,
    "{rcpt_mailer}": Stage.RCPT,
    "{rcpt_host}": Stage.RCPT,
    "{rcpt_addr}": Stage.RCPT,
    "{msg_id}": Stage.EOM,
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

_VERDICT_OF_REPLY = {
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


_SKIPPABLE = {
    Dialect.POSTFIX: frozenset((Stage.RCPT, Stage.HEADER, Stage.BODY, Stage.UNKNOWN)),
    Dialect.SENDMAIL: frozenset((Stage.BODY,)),
}


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


# --- errors -----------------------------------------------------------------------------------


class MTAError(Exception):
    """Base of what goes wrong between the MTA and a filter.

    :ivar stage: the :class:`Stage` at which it happened, None before the first.
    :ivar received: the bytes of the offending packet, or of an unfinished one.
    """

    def __init__(self, message: str, stage: Stage | None = None, received: bytes = b"") -> None:
        super().__init__(message)
        self.stage = stage
        self.received = received

    def __str__(self) -> str:
        text = str(self.args[0])
        if self.stage is not None:
            text = f"at {self.stage}: {text}"
        if self.received:
            shown = repr(self.received[:80]) + ("…" if len(self.received) > 80 else "")
            text = f"{text}; received {shown}"
        return text


class ProtocolError(MTAError):
    """The filter did what the milter protocol does not allow."""


class NegotiationError(ProtocolError):
    """The filter's answer to the negotiation does not fit the offer."""


class FilterTimeout(MTAError, TimeoutError):
    """The filter did not answer, or did not read, within the time allowed."""


class FilterClosed(MTAError, ConnectionError):
    """The filter closed the connection where an answer was due."""


class FilterUnreachable(MTAError, ConnectionError):
    """No connection to the filter could be made."""


# --- small helpers ---------------------------------------------------------------------------


def _to_bytes(value: Text) -> bytes:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)


def _to_str(value: Text) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def _c_string(what: str, value: Text) -> bytes:
    """*value* as the wire carries a string: its bytes and a NUL."""
    data = _to_bytes(value)
    if b"\0" in data:
        raise ValueError(f"{what} {value!r}: a NUL would end it on the wire")
    return data + b"\0"


def _strip_brackets(address: str) -> str:
    return address[1:-1] if address.startswith("<") and address.endswith(">") else address


# --- socket addresses -------------------------------------------------------------------------


@dataclass(frozen=True)
class SocketAddress:
    """Where a filter listens.

    :ivar family: ``AF_UNIX``, ``AF_INET`` or ``AF_INET6``.
    :ivar address: a path, or a host and a port.
    """

    family: socket.AddressFamily
    address: str | tuple[str, int]

    def __str__(self) -> str:
        if isinstance(self.address, str):
            return f"unix:{self.address}"
        host, port = self.address
        if self.family == socket.AF_INET6:
            return f"inet6:{port}@[{host}]"
        return f"inet:{port}@{host}"


def parse_socket(spec: str, *, postfix: bool = False) -> SocketAddress:
    """Read the address of a filter as libmilter's ``smfi_setconn`` writes it.

    ``unix:/path``, ``local:/path``, ``/path``, ``inet:port@host``, ``inet:port``
    (the local host), ``inet6:port@[address]``; a port is a number or a service name.

    :param postfix: also take Postfix's order ``inet:host:port``, and
        ``inet:[address]:port`` for IPv6.
    :raises ValueError: *spec* is none of these, or the path is too long for a socket.
    """
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme == "" or "/" in scheme:
        return _unix_address(spec, rest if colon and not scheme else spec)
    scheme = scheme.lower()
    if scheme in ("unix", "local"):
        return _unix_address(spec, rest)
    if scheme not in ("inet", "inet6"):
        raise ValueError(
            f"socket {spec!r}: unknown kind {scheme!r}; use unix:, local:, inet: or inet6:"
        )
    port, at, host = rest.partition("@")
    if not at and ":" in rest:
        host, _, port = rest.rpartition(":")
        if not postfix:
            raise ValueError(
                f"socket {spec!r} is in Postfix's order; libmilter writes {scheme}:{port}@{host}"
            )
    return _inet_address(spec, scheme, host, port)


def _unix_address(spec: str, path: str) -> SocketAddress:
    if not path:
        raise ValueError(f"socket {spec!r}: the path is empty")
    room = 107  # sun_path is 108 bytes on Linux, with the final NUL
    if len(os.fsencode(path)) > room:
        raise ValueError(f"socket {spec!r}: a socket path has at most {room} bytes")
    return SocketAddress(socket.AF_UNIX, path)


def _inet_address(spec: str, scheme: str, host: str, port: str) -> SocketAddress:
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if scheme == "inet6" or (bracketed and ":" in host):
        return SocketAddress(socket.AF_INET6, (host or "::1", _port_number(spec, port)))
    return SocketAddress(socket.AF_INET, (host or "127.0.0.1", _port_number(spec, port)))


def _port_number(spec: str, port: str) -> int:
    if port.isascii() and port.isdigit():
        number = int(port)
    else:
        try:
            number = socket.getservbyname(port, "tcp")
        except OSError:
            raise ValueError(f"socket {spec!r}: unknown port {port!r}") from None
    if not 0 < number < 65536:
        raise ValueError(f"socket {spec!r}: port {number} is not between 1 and 65535")
    return number


# --- packets ----------------------------------------------------------------------------------


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
        return _frame(self.command, self.data)


def _frame(command: bytes, data: bytes = b"") -> bytes:
    return struct.pack("!I", len(data) + len(command)) + command + data


class _Wire:
    """Packets over a socket, every wait with a deadline."""

    def __init__(self, sock: socket.socket, trace: Callable[[str, bytes], None] | None) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._trace = trace
        self._buffer = bytearray()
        self._eof = False
        self.stage: Stage | None = None

    @property
    def is_open(self) -> bool:
        return self._sock.fileno() >= 0

    def close(self) -> None:
        self._sock.close()

    def write(self, data: bytes, timeout: float) -> None:
        """Send all of *data*; *timeout* (seconds) bounds the whole."""
        self._require_open()
        if self._trace is not None:
            self._trace(">", data)
        deadline = time.monotonic() + timeout
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                if not self._poll(select.POLLOUT, deadline):
                    raise FilterTimeout(
                        f"the filter did not read {len(view)} bytes within {timeout:g} s",
                        self.stage,
                    ) from None
            except OSError as exc:
                raise self._closed(f"cannot write to the filter: {exc.strerror}") from exc

    def read(self, deadline: float, waited: float) -> Packet:
        """The next packet, or :class:`FilterTimeout` at *deadline* (*waited* is for the text)."""
        self._require_open()
        while True:
            packet = self._take()
            if packet is not None:
                if self._trace is not None:
                    self._trace("<", bytes(packet))
                return packet
            if self._eof:
                where = " in the middle of a packet" if self._buffer else ""
                error = self._closed(f"the filter closed the connection{where}")
                self._buffer.clear()
                raise error
            if not self._receive(deadline) and not self._eof:
                raise FilterTimeout(
                    f"no {'complete ' if self._buffer else ''}answer within {waited:g} s",
                    self.stage,
                    bytes(self._buffer),
                )

    def pending(self, deadline: float) -> tuple[bytes, bool]:
        """What has come in unread by *deadline*, and whether the stream has ended."""
        self._require_open()
        while not self._buffer and not self._eof and self._receive(deadline):
            pass
        return self.buffered, self._eof

    def rest(self, deadline: float) -> tuple[bytes, bool]:
        """All that comes in until the stream ends or *deadline*, and whether it has ended."""
        self._require_open()
        while not self._eof and self._receive(deadline):
            pass
        return self.buffered, self._eof

    @property
    def buffered(self) -> bytes:
        return bytes(self._buffer)

    def _require_open(self) -> None:
        if not self.is_open:
            raise FilterClosed("the connection to the filter is closed", self.stage)

    def _closed(self, text: str) -> FilterClosed:
        return FilterClosed(text, self.stage, bytes(self._buffer))

    def _take(self) -> Packet | None:
        if len(self._buffer) < 4:
            return None
        (length,) = struct.unpack_from("!I", self._buffer)
        if length == 0:
            raise ProtocolError("a packet without a command", self.stage, bytes(self._buffer))
        if length > MAX_REPLY_SIZE:
            raise ProtocolError(
                f"a packet of {length} bytes, more than {MAX_REPLY_SIZE}",
                self.stage,
                bytes(self._buffer),
            )
        if len(self._buffer) < 4 + length:
            return None
        command, data = bytes(self._buffer[4:5]), bytes(self._buffer[5 : 4 + length])
        del self._buffer[: 4 + length]
        return Packet(command, data)

    def _receive(self, deadline: float) -> bool:
        """Take in more bytes, or the end of the stream; False once *deadline* has passed."""
        while True:
            in_time = time.monotonic() < deadline
            try:
                data = self._sock.recv(256 * 1024)
            except BlockingIOError:
                if not in_time or not self._poll(select.POLLIN, deadline):
                    return False
                continue
            except OSError:
                # A reset is the harsh form of closing.
                data = b""
            self._buffer += data
            self._eof = not data
            return in_time

    def _poll(self, event: int, deadline: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, event)
        remaining = deadline - time.monotonic()
        # Round up, so that a wait of less than 1 ms does not spin.
        return bool(poller.poll(max(0, int(remaining * 1000) + 1) if remaining > 0 else 0))


# --- SMTP replies and modifications --------------------------------------------------------


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

_FIELD_NAME = re.compile(rb"[!-9;-~\x80-\xff]+")
# A line end that no space or tab follows ends the field: what comes next would be forged.
# A CR on its own is one to some programs, and to others not.
_FORGING_LINE_END = re.compile(rb"\r(?!\n)|\n(?![ \t])")


class _Parser:
    """Reads a packet's data by the wire format; a violation is a :class:`ProtocolError`."""

    def __init__(self, packet: Packet, stage: Stage) -> None:
        self._packet = packet
        self._stage = stage

    def error(self, text: str) -> ProtocolError:
        return ProtocolError(f"{self._packet.name} {text}", self._stage, bytes(self._packet))

    def nothing(self) -> None:
        if self._packet.data:
            raise self.error(f"with {len(self._packet.data)} bytes of data, none is allowed")

    def strings(self, data: bytes, least: int, most: int) -> list[bytes]:
        if not data.endswith(b"\0"):
            raise self.error("does not end in NUL")
        parts = data[:-1].split(b"\0")
        if not least <= len(parts) <= most:
            allowed = str(least) if least == most else f"{least} or {most}"
            raise self.error(f"has {len(parts)} strings instead of {allowed}")
        return parts

    def address(self) -> str:
        return self.address_and_params(most=1)[0]

    def address_and_params(self, most: int = 2) -> tuple[str, str | None]:
        parts = self.strings(self._packet.data, 1, most)
        if not parts[0]:
            raise self.error("has an empty address")
        if any(b"\r" in part or b"\n" in part for part in parts):
            raise self.error("has a line end in an address or its parameters")
        return _to_str(parts[0]), _to_str(parts[1]) if len(parts) > 1 else None

    def reason(self) -> str:
        (reason,) = self.strings(self._packet.data, 1, 1)
        if not reason:
            raise self.error("has an empty reason")
        return _to_str(reason)

    def header(self, data: bytes) -> tuple[bytes, bytes]:
        name, value = self.strings(data, 2, 2)
        if not _FIELD_NAME.fullmatch(name):
            raise self.error(f"has the header name {name!r}")
        if _FORGING_LINE_END.search(value):
            raise self.error("has a line end in the value that is no fold")
        return name, value

    def indexed_header(self) -> tuple[int, bytes, bytes]:
        data = self._packet.data
        if len(data) < 4:
            raise self.error("is too short for an index")
        (index,) = struct.unpack_from("!i", data)
        if index < 0:
            raise self.error(f"has the index {index}")
        return (index, *self.header(data[4:]))

    def body_chunk(self) -> bytes:
        if len(self._packet.data) > CHUNK_SIZE:
            raise self.error(f"has {len(self._packet.data)} bytes, more than {CHUNK_SIZE}")
        return self._packet.data

    def smtp_reply(self) -> SmtpReply:
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
            None if xcode is None else _to_str(xcode),
            tuple(_to_str(text.replace(b"%%", b"%")) for text in texts),
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


def _parse_add_header(parser: _Parser, packet: Packet) -> Modification:
    return AddHeader(*parser.header(packet.data))


def _parse_insert_header(parser: _Parser, packet: Packet) -> Modification:
    return InsertHeader(*parser.indexed_header())


def _parse_change_header(parser: _Parser, packet: Packet) -> Modification:
    return ChangeHeader(*parser.indexed_header())


def _parse_add_recipient(parser: _Parser, packet: Packet) -> Modification:
    return AddRecipient(parser.address())


def _parse_add_recipient_par(parser: _Parser, packet: Packet) -> Modification:
    address, params = parser.address_and_params()
    return AddRecipient(address, params, with_params=True)


def _parse_delete_recipient(parser: _Parser, packet: Packet) -> Modification:
    return DeleteRecipient(parser.address())


def _parse_change_sender(parser: _Parser, packet: Packet) -> Modification:
    return ChangeSender(*parser.address_and_params())


def _parse_replace_body(parser: _Parser, packet: Packet) -> Modification:
    return ReplaceBody(parser.body_chunk())


def _parse_quarantine(parser: _Parser, packet: Packet) -> Modification:
    return Quarantine(parser.reason())


_MODIFICATIONS: dict[bytes, tuple[Action, Callable[[_Parser, Packet], Modification]]] = {
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


# --- messages and envelopes ------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """One header field.

    :ivar name: the field name.
    :ivar value: what follows the colon and one space, with LF alone at each fold.
    :ivar separator: the bytes between them, normally ``b": "``.
    """

    name: bytes
    value: bytes
    separator: bytes = b": "

    def __bytes__(self) -> bytes:
        return self.name + self.separator + self.value

    def wire_value(self, leading_space: bool) -> bytes:
        """The value as an MTA sends it, with its leading space only under ``SMFIP_HDR_LEADSPC``."""
        if not leading_space:
            return self.value
        return self.separator[self.separator.index(b":") + 1 :] + self.value

    @classmethod
    def from_wire(cls, name: Text, value: Text, leading_space: bool) -> Header:
        """The header that an MTA makes of a name and a value from the wire."""
        data = _to_bytes(value).replace(b"\r\n", b"\n")
        if not leading_space:
            return cls(_to_bytes(name), data)
        if data.startswith(b" "):
            return cls(_to_bytes(name), data[1:])
        return cls(_to_bytes(name), data, b":")


_HEADER_LINE = re.compile(rb"([!-9;-~\x80-\xff]+)([ \t]*:)( ?)(.*)", re.DOTALL)


@dataclass
class Message:
    """A message: *headers* in order, and *body* with the line ends that go over the wire."""

    headers: list[Header] = field(default_factory=list)
    body: bytes = b""

    @classmethod
    def parse(cls, data: bytes) -> Message:
        """Read a message as an MTA does.

        Lines may end in CRLF or LF; the body gets CRLF, headers get LF at their
        folds.  The first line that is neither a header nor a fold begins the body,
        as does an empty one.  An mbox ``From`` line at the very top is dropped.
        """
        # The lines of each header, joined once: there may be any number of folds.
        headers: list[list[bytes]] = []
        start = 0
        for line, end in _lines(data):
            text = line.rstrip(b"\n").rstrip(b"\r")
            if start == 0 and text.startswith(b"From ") and not headers:
                start = end
                continue
            if text[:1] in (b" ", b"\t") and headers:
                headers[-1].append(text)
            elif _HEADER_LINE.fullmatch(text):
                headers.append([text])
            else:
                if not text:
                    start = end
                break
            start = end
        fields = [_split_header(b"\n".join(lines)) for lines in headers]
        return cls(fields, _crlf(data[start:]))

    def as_bytes(self, eol: bytes = b"\r\n") -> bytes:
        """The whole message with *eol* at each line's end (folds and body included)."""
        head = b"".join(bytes(header) + b"\n" for header in self.headers) + b"\n"
        body = self.body if eol == b"\r\n" else self.body.replace(b"\r\n", eol)
        return head.replace(b"\n", eol) + body

    def get_all(self, name: str) -> list[str]:
        """The values of all headers called *name*, in any case, top to bottom."""
        wanted = _to_bytes(name).lower()
        return [_to_str(header.value) for header in self.headers if header.name.lower() == wanted]

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of the first header called *name*, or *default*."""
        values = self.get_all(name)
        return values[0] if values else default

    def __getitem__(self, name: str) -> str:
        """The value of the first header called *name*; KeyError where there is none."""
        values = self.get_all(name)
        if not values:
            raise KeyError(name)
        return values[0]

    def __contains__(self, name: str) -> bool:
        return bool(self.get_all(name))


def _lines(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each line of *data* with its LF, and the offset of its end."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end], end
        start = end


def _crlf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _split_header(line: bytes) -> Header:
    found = _HEADER_LINE.fullmatch(line)
    assert found is not None
    name, colon, space, value = found.groups()
    return Header(name, value, colon + space)


@dataclass(frozen=True)
class Address:
    """An envelope address and its ESMTP parameters.

    :ivar address: without its angle brackets.
    :ivar params: the parameters, each ``NAME`` or ``NAME=VALUE``.
    :ivar rejected: for a recipient that the MTA itself has refused: its SMTP reply,
        such as ``"550 5.1.1 User unknown"``.  A filter hears of it only under
        ``SMFIP_RCPT_REJ``.
    """

    address: str
    params: tuple[str, ...] = ()
    rejected: str | None = None

    @classmethod
    def make(cls, value: AddressLike) -> Address:
        """An address from a text, or from a sequence of the address and its parameters."""
        if isinstance(value, Address):
            return value
        if isinstance(value, (str, bytes)):
            return cls(_strip_brackets(_to_str(value)))
        address, *params = value
        return cls(_strip_brackets(_to_str(address)), tuple(_to_str(param) for param in params))

    def __str__(self) -> str:
        return " ".join((f"<{self.address}>", *self.params))


AddressLike = Union[Address, str, bytes, Sequence[Text]]


@dataclass(frozen=True)
class Client:
    """The SMTP client that the MTA tells the filter about.

    :ivar name: its host name, ``[address]`` where it has none.
    :ivar address: an IPv4 or IPv6 address, a socket path, or None where it is not known.
    :ivar port: its TCP port, 0 where it is not known.
    """

    name: Text = "localhost"
    address: Text | None = "127.0.0.1"
    port: int = 0


@dataclass
class HeaderEdit:
    """What became of one header: None as *before* is an addition, as *after* a deletion."""

    before: Header | None
    after: Header | None
    own: bool = False  #: the MTA's own, which the filter does not see


class _HeaderEditor:
    """The headers of a message under a filter's edits, with what was there before."""

    def __init__(
        self, headers: Iterable[Header], own: Header | None, dialect: Dialect, leading_space: bool
    ) -> None:
        self.edits = [HeaderEdit(header, header) for header in headers]
        if own is not None:
            self.edits.insert(0, HeaderEdit(own, own, own=True))
        self._dialect = dialect
        self._leading_space = leading_space

    @property
    def headers(self) -> list[Header]:
        return [edit.after for edit in self.edits if edit.after is not None]

    def add(self, name: bytes, value: bytes) -> None:
        position = len(self.edits)
        if self._dialect is Dialect.SENDMAIL:
            named = (n for n, edit in enumerate(self.edits) if _is_named(edit, name))
            position = next(named, position)
        self.edits.insert(position, self._new(name, value))

    def insert(self, index: int, name: bytes, value: bytes) -> None:
        counted = [
            position
            for position, edit in enumerate(self.edits)
            if edit.after is not None or self._dialect is Dialect.SENDMAIL
        ]
        position = counted[index] if index < len(counted) else len(self.edits)
        self.edits.insert(position, self._new(name, value))

    def change(self, index: int, name: bytes, value: bytes) -> None:
        edit = self._find(max(index, 1), name)
        if edit is None:
            if value:
                self.add(name, value)
        elif value:
            if self._dialect is Dialect.SENDMAIL:
                name = _name_of(edit)
            edit.after = Header.from_wire(name, value, self._leading_space)
        else:
            edit.after = None
        # What was neither there before nor is afterwards leaves no trace for Postfix;
        # sendmail goes on counting it.
        if self._dialect is Dialect.POSTFIX:
            self.edits = [e for e in self.edits if e.before is not None or e.after is not None]

    def _new(self, name: bytes, value: bytes) -> HeaderEdit:
        return HeaderEdit(None, Header.from_wire(name, value, self._leading_space))

    def _find(self, index: int, name: bytes) -> HeaderEdit | None:
        for edit in self._countable():
            if _is_named(edit, name):
                index -= 1
                if index == 0:
                    return edit
        return None

    def _countable(self) -> list[HeaderEdit]:
        """The headers that ``chgheader`` counts."""
        return [
            edit
            for edit in self.edits
            if not edit.own and (edit.after is not None or self._dialect is Dialect.SENDMAIL)
        ]


def _name_of(edit: HeaderEdit) -> bytes:
    header = edit.after or edit.before
    return b"" if header is None else header.name


def _is_named(edit: HeaderEdit, name: bytes) -> bool:
    return _name_of(edit).lower() == name.lower()


class _EnvelopeEditor:
    """The envelope of a message under a filter's edits."""

    def __init__(self, sender: Address, recipients: Iterable[Address], dialect: Dialect) -> None:
        self.sender = sender
        self._dialect = dialect
        # What tells recipients apart, and the recipients.
        self._recipients: list[tuple[object, Address]] = []
        for recipient in recipients:
            # An MTA gives the client's recipients an ORCPT where they come without.
            self._append(recipient, default_orcpt=f"rfc822;{recipient.address}")

    @property
    def recipients(self) -> list[Address]:
        return [recipient for _, recipient in self._recipients]

    def change_sender(self, address: str, params: str | None) -> None:
        kept = self.sender.params if params is None else tuple(params.split())
        self.sender = Address(_strip_brackets(address), kept)

    def add(self, address: str, params: str | None) -> None:
        self._append(Address(_strip_brackets(address), tuple((params or "").split())))

    def delete(self, address: str) -> None:
        unwanted = _strip_brackets(address)
        self._recipients = [entry for entry in self._recipients if entry[1].address != unwanted]

    def _append(self, recipient: Address, default_orcpt: str = "") -> None:
        key = self._key(recipient, default_orcpt)
        if all(key != other for other, _ in self._recipients):
            self._recipients.append((key, recipient))

    def _key(self, recipient: Address, default_orcpt: str) -> object:
        if self._dialect is Dialect.SENDMAIL:
            return recipient.address
        pairs = (param.partition("=") for param in recipient.params)
        values = {name.upper(): value for name, _, value in pairs}
        orcpt = values.get("ORCPT", default_orcpt)
        return tuple(map(str.lower, (recipient.address, values.get("NOTIFY", ""), orcpt)))


# --- offers and replies ----------------------------------------------------------------------


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

        :raises ValueError: for another version.
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
        return self.verdict in (Verdict.ACCEPT, *_GOES_ON)


# --- the MTA ------------------------------------------------------------------------------


class MTA:
    """A connection to a filter, seen from the MTA; see the module's text for an example.

    Made by :meth:`connect`; the constructor takes a socket that is connected
    already and negotiates on it unless *offer* is None (then :meth:`negotiate` may
    be called, or not).

    :param sock: a connected stream socket, which this object owns from now on.
    :param timeout: seconds that any one answer may take; a progress packet starts them anew.
    :param total_timeout: seconds that an answer may take with all its progress
        packets and modifications.
    :param dialect: see :class:`Dialect`.
    :param trace: called with ``">"`` or ``"<"`` and the bytes of whatever is sent or received.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        offer: Offer | None = Offer(),
        timeout: float = 10.0,
        total_timeout: float = 300.0,
        dialect: Dialect = Dialect.POSTFIX,
        trace: Callable[[str, bytes], None] | None = None,
    ) -> None:
        self._wire = _Wire(sock, trace)
        self.timeout = timeout
        self.total_timeout = total_timeout
        self.dialect = dialect
        self.offer: Offer | None = None
        self._negotiated = Negotiated(6, CURRENT_ACTIONS, Step.NONE)
        self._macros: dict[Stage, dict[str, bytes]] = {}
        self._skipped: set[Stage] = set()
        self._greeting: list[Reply] | None = None
        if offer is not None:
            try:
                self.negotiate(offer)
            except BaseException:
                self.close()
                raise

    @classmethod
    def connect(
        cls,
        address: str | SocketAddress,
        *,
        offer: Offer | None = Offer(),
        timeout: float = 10.0,
        total_timeout: float = 300.0,
        wait_for: float = 0.0,
        postfix_syntax: bool = False,
        dialect: Dialect = Dialect.POSTFIX,
        trace: Callable[[str, bytes], None] | None = None,
    ) -> MTA:
        """Connect to the filter at *address* and negotiate.

        :param address: as for :func:`parse_socket`.
        :param wait_for: seconds to keep trying while the filter does not listen yet.
        :param postfix_syntax: take ``inet:host:port`` too.
        :raises ValueError: *address* is no socket address.
        :raises FilterUnreachable: nobody listens there, or not within the time.
        :raises NegotiationError: the filter asks for more than was offered.
        """
        if isinstance(address, str):
            address = parse_socket(address, postfix=postfix_syntax)
        return cls(
            _open_socket(address, timeout, wait_for),
            offer=offer,
            timeout=timeout,
            total_timeout=total_timeout,
            dialect=dialect,
            trace=trace,
        )

    def __enter__(self) -> MTA:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._wire.is_open:
                self.quit()
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket without a word to the filter."""
        self._wire.close()

    # packets

    def send_raw(self, data: bytes) -> None:
        """Send *data* as it is."""
        self._wire.write(data, self.timeout)

    def send_packet(self, command: bytes, data: bytes = b"") -> None:
        """Send one packet, whatever its content."""
        self.send_raw(_frame(command, data))

    def read_packet(self, timeout: float | None = None) -> Packet:
        """The next packet from the filter.

        :param timeout: seconds to wait for all of it, :attr:`timeout` where it is None.
        :raises FilterTimeout: it did not come in time.
        :raises FilterClosed: the filter closed the connection.
        """
        wait = self.timeout if timeout is None else timeout
        return self._wire.read(time.monotonic() + wait, wait)

    def expect_nothing(self, wait: float = 0.0) -> None:
        """Check that the filter has said nothing that is still unread.

        Each step checks this before it sends anything, and :meth:`quit` checks it
        reliably, because it reads to the end of the connection.

        :param wait: seconds to wait for what must not come.
        :raises ProtocolError: something came.
        :raises FilterClosed: the filter closed the connection.
        """
        data, closed = self._wire.pending(time.monotonic() + wait)
        if data:
            raise ProtocolError("the filter speaks where nothing was due", self._wire.stage, data)
        if closed:
            raise FilterClosed("the filter closed the connection", self._wire.stage)

    def expect_close(self, timeout: float | None = None) -> None:
        """Wait until the filter closes the connection, and check that it says nothing before.

        :raises FilterTimeout: it does not close in time.
        :raises ProtocolError: it says something.
        """
        wait = self.timeout if timeout is None else timeout
        data, closed = self._wire.rest(time.monotonic() + wait)
        if data:
            raise ProtocolError("the filter speaks where nothing was due", self._wire.stage, data)
        if not closed:
            raise FilterTimeout(
                f"the filter did not close the connection within {wait:g} s", self._wire.stage
            )

    # negotiation

    @property
    def negotiated(self) -> Negotiated:
        """What was agreed on; before negotiation, as if the filter had asked for nothing."""
        return self._negotiated

    def negotiate(self, offer: Offer) -> Negotiated:
        """Offer *offer* to the filter and return what it takes (``SMFIC_OPTNEG``).

        :raises NegotiationError: the filter's answer does not fit the offer.
        """
        self._wire.stage = Stage.NEGOTIATE
        self.expect_nothing()
        self.offer = offer
        self.send_packet(
            b"O", struct.pack("!III", offer.version, int(offer.actions), int(offer.steps))
        )
        self._negotiated = _parse_negotiation(self.read_packet(), offer)
        self._check_buffer_empty()
        return self._negotiated

    # macros

    def set_macros(self, stage: Stage | str, values: MacroValues) -> None:
        """Define macros, to be sent with each further command of *stage*.

        Where the filter has named the macros it wants at a stage, just those are
        sent that have a value there or at an earlier stage.

        :param stage: one of CONNECT, HELO, MAIL, RCPT, DATA, EOH, EOM.
        :param values: names of more than one letter get their braces where they lack them.
        """
        self._macros.setdefault(_macro_stage(stage), {}).update(_macro_table(values))

    def has_macro(self, stage: Stage | str, name: str) -> bool:
        """Whether :meth:`set_macros` has defined the macro *name* for *stage*."""
        return _braced(name) in self._macros.get(_macro_stage(stage), {})

    def _macros_for(self, stage: Stage, extra: MacroValues | None) -> dict[str, bytes]:
        table = dict(self._macros.get(stage, {}))
        if extra:
            table.update(_macro_table(extra))
        wanted = self._negotiated.macros.get(stage)
        if wanted is None:
            return table
        known: dict[str, bytes] = {}
        for earlier in _MACRO_ORDER[: _MACRO_ORDER.index(stage)]:
            known.update(self._macros.get(earlier, {}))
        known.update(table)
        return {name: known[_braced(name)] for name in wanted if _braced(name) in known}

    def _macro_packet(self, stage: Stage, extra: MacroValues | None) -> bytes:
        if stage not in _MACRO_STAGES:
            if extra:
                raise ValueError(f"no macros are sent at {stage}")
            return b""
        table = self._macros_for(stage, extra)
        if not table:
            return b""
        pairs = b"".join(
            _c_string("macro name", name) + _c_string(f"macro {name}", value)
            for name, value in table.items()
        )
        return _frame(b"D", stage.value + pairs)

    # steps

    def connect_info(
        self,
        hostname: Text = "localhost",
        address: Text | None = "127.0.0.1",
        port: int = 0,
        *,
        family: Family | None = None,
        macros: MacroValues | None = None,
    ) -> Reply:
        """Tell of the SMTP client (``SMFIC_CONNECT``).

        :param address: IPv4, IPv6, a path (``/…``), or None for an unknown family.
        :param family: skips the check of *address* and sends it as of this family.
        :raises ValueError: *address* is none of these.
        """
        if family is None:
            family, address = _client_family(address)
        payload = _c_string("hostname", hostname) + family.value
        if family is not Family.UNKNOWN:
            if not 0 <= port < 65536:
                raise ValueError(f"port {port} is not between 0 and 65535")
            payload += struct.pack("!H", port) + _c_string("address", address or "")
        return self._step(Stage.CONNECT, payload, macros)

    def helo(self, hostname: Text, *, macros: MacroValues | None = None) -> Reply:
        """HELO or EHLO (``SMFIC_HELO``)."""
        return self._step(Stage.HELO, _c_string("hostname", hostname), macros)

    def mail(self, sender: Text, *params: Text, macros: MacroValues | None = None) -> Reply:
        """MAIL with the address as it is given, normally in ``<>`` (``SMFIC_MAIL``)."""
        self._skipped.clear()
        return self._step(Stage.MAIL, _envelope("sender", sender, params), macros)

    def rcpt(
        self,
        recipient: Text,
        *params: Text,
        rejected: str | None = None,
        macros: MacroValues | None = None,
    ) -> Reply:
        """RCPT with the address as it is given, normally in ``<>`` (``SMFIC_RCPT``).

        :param rejected: the SMTP reply with which the MTA itself refused the recipient,
            such as ``"550 5.1.1 User unknown"``.  Then the step is sent only under
            ``SMFIP_RCPT_REJ``, and the macros ``{rcpt_mailer}``, ``{rcpt_host}`` and
            ``{rcpt_addr}`` say ``error``, the enhanced code and the text.
        """
        payload = _envelope("recipient", recipient, params)
        if rejected is None:
            return self._step(Stage.RCPT, payload, macros)
        rejection = _rejection_macros(rejected)
        if not self._negotiated.steps & Step.RCPT_REJ:
            return Reply(Stage.RCPT, Verdict.NOT_SENT)
        return self._step(Stage.RCPT, payload, {**rejection, **(macros or {})})

    def data(self, *, macros: MacroValues | None = None) -> Reply:
        """DATA (``SMFIC_DATA``); not sent before protocol version 4."""
        return self._step(Stage.DATA, b"", macros)

    def header(self, name: Text, value: Text) -> Reply:
        """One header (``SMFIC_HEADER``).

        :param value: what goes over the wire: LF alone at folds; with the leading
            space only where ``SMFIP_HDR_LEADSPC`` was agreed.  :meth:`send` sees to both.
        """
        payload = _c_string("header name", name) + _c_string("header value", value)
        return self._step(Stage.HEADER, payload)

    def eoh(self, *, macros: MacroValues | None = None) -> Reply:
        """End of headers (``SMFIC_EOH``)."""
        return self._step(Stage.EOH, b"", macros)

    def body(self, data: bytes) -> Reply:
        """The body or a part of it (``SMFIC_BODY``), in chunks of at most 65535 bytes.

        Stops at the first chunk whose answer is not CONTINUE; after SKIP, nothing is
        sent until the next MAIL.
        """
        reply = Reply(Stage.BODY, Verdict.NOT_SENT)
        for start in range(0, len(data), CHUNK_SIZE):
            reply = self._step(Stage.BODY, data[start : start + CHUNK_SIZE])
            if reply.verdict not in (Verdict.CONTINUE, Verdict.NO_REPLY):
                break
        return reply

    def eom(self, data: bytes = b"", *, macros: MacroValues | None = None) -> Reply:
        """End of message (``SMFIC_BODYEOB``), with the body's last bytes if *data* has any."""
        return self._step(Stage.EOM, data, macros)

    def unknown(self, command: Text) -> Reply:
        """An SMTP command that the MTA does not know (``SMFIC_UNKNOWN``); version 3 and later."""
        return self._step(Stage.UNKNOWN, _c_string("command", command))

    def abort(self) -> None:
        """Give up the current message (``SMFIC_ABORT``); there is no answer."""
        self._command(Stage.ABORT)
        self._skipped.clear()

    def quit(self, timeout: float | None = None) -> None:
        """End the connection (``SMFIC_QUIT``), and check that the filter closes it in silence.

        :raises ProtocolError: the filter had said, or still says, something.
        :raises FilterTimeout: the filter does not close the connection in time.
        """
        self._command(Stage.QUIT)
        self.expect_close(timeout)
        self.close()

    def quit_nc(self) -> None:
        """End the session but keep the connection for the next (``SMFIC_QUIT_NC``, version 6).

        :raises ValueError: the filter speaks an older version.
        """
        if self._negotiated.version < _SINCE_VERSION[Stage.QUIT_NC]:
            raise ValueError("SMFIC_QUIT_NC needs protocol version 6")
        self._command(Stage.QUIT_NC)
        self._greeting = None
        self._skipped.clear()
        self._macros.clear()

    def _command(self, stage: Stage) -> None:
        self.expect_nothing()
        self._wire.stage = stage
        self.send_packet(stage.value)

    def _step(self, stage: Stage, payload: bytes, macros: MacroValues | None = None) -> Reply:
        room = self._max_data()
        if len(payload) > room:
            raise ValueError(f"{stage}: {len(payload)} bytes, a command holds at most {room}")
        self.expect_nothing()
        if self._negotiated.version < _SINCE_VERSION.get(stage, 0):
            return Reply(stage, Verdict.NOT_SENT)
        self._wire.stage = stage
        sent = stage not in self._skipped and not self._agreed(_NO_STEP, stage)
        # MTAs send the envelope's macros even with a step that the filter does not want.
        data = self._macro_packet(stage, macros) if sent or stage is not Stage.EOH else b""
        if sent:
            data += _frame(stage.value, payload)
        if data:
            self.send_raw(data)
        if not sent:
            return Reply(stage, Verdict.NOT_SENT)
        if self._agreed(_NO_REPLY, stage):
            return Reply(stage, Verdict.NO_REPLY)
        return self._read_reply(stage)

    def _agreed(self, bits: Mapping[Stage, Step], stage: Stage) -> bool:
        return bool(self._negotiated.steps & bits.get(stage, Step.NONE))

    def _max_data(self) -> int:
        steps = self._negotiated.steps
        if steps & Step.MDS_1M:
            return MDS_1M_SIZE
        return MDS_256K_SIZE if steps & Step.MDS_256K else MAX_DATA_SIZE

    # answers

    def _read_reply(self, stage: Stage) -> Reply:
        limit = time.monotonic() + self.total_timeout
        modifications: list[Modification] = []
        progress = 0
        while True:
            packet = self._read_until(limit)
            parser = _Parser(packet, stage)
            if packet.command == b"p":
                self._check_progress(parser, stage)
                progress += 1
            elif packet.command in _MODIFICATIONS:
                modifications.append(self._modification(packet, parser, stage))
            else:
                verdict, smtp = self._final(packet, parser, stage)
                self._check_buffer_empty()
                if verdict is Verdict.SKIP:
                    self._skipped.add(stage)
                return Reply(stage, verdict, smtp, tuple(modifications), progress)

    def _read_until(self, limit: float) -> Packet:
        now = time.monotonic()
        if now + self.timeout <= limit:
            return self._wire.read(now + self.timeout, self.timeout)
        return self._wire.read(limit, self.total_timeout)

    def _check_progress(self, parser: _Parser, stage: Stage) -> None:
        parser.nothing()
        if self.dialect is Dialect.SENDMAIL and stage is not Stage.EOM:
            raise parser.error("outside of the end of message")

    def _modification(self, packet: Packet, parser: _Parser, stage: Stage) -> Modification:
        action, parse = _MODIFICATIONS[packet.command]
        if stage is not Stage.EOM:
            raise parser.error("outside of the end of message")
        if not self._negotiated.actions & action:
            raise parser.error(f"without {action.name}, which the filter did not ask for")
        return parse(parser, packet)

    def _final(
        self, packet: Packet, parser: _Parser, stage: Stage
    ) -> tuple[Verdict, SmtpReply | None]:
        if packet.command == b"y":
            smtp = parser.smtp_reply()
            return (Verdict.TEMPFAIL if smtp.code < 500 else Verdict.REJECT), smtp
        verdict = _VERDICT_OF_REPLY.get(packet.command)
        if verdict is None:
            raise parser.error("is no answer to this step")
        parser.nothing()
        if verdict is Verdict.SKIP:
            if not self._negotiated.steps & Step.SKIP:
                raise parser.error("without SKIP, which was not agreed on")
            if stage not in _SKIPPABLE[self.dialect]:
                raise parser.error("is no answer to this step")
        if verdict is Verdict.DISCARD and stage in (Stage.CONNECT, Stage.HELO):
            raise parser.error("before there is a message")
        return verdict, None

    def _check_buffer_empty(self) -> None:
        data = self._wire.buffered
        if data:
            raise ProtocolError("the filter goes on after its answer", self._wire.stage, data)

    # whole messages

    def greet(
        self,
        client: Client | None = None,
        helo: Text | None = None,
        *,
        macros: MacroValues | None = None,
    ) -> list[Reply]:
        """Connect and HELO, as at the start of an SMTP session.

        :meth:`send` does this at the first message.  Where the filter accepts or
        refuses here, it is asked no more: all messages get this verdict.

        :param client: :class:`Client` by default, that is localhost.
        :param helo: the client's name by default.
        """
        if self._greeting is not None:
            raise ValueError(_GREETED)
        client = client or Client()
        self._define(macros, Stage.CONNECT)
        self._greeting = [self.connect_info(client.name, client.address, client.port)]
        if self._greeting[0].verdict.goes_on:
            self._greeting.append(self.helo(client.name if helo is None else helo))
        return self._greeting

    def send(
        self,
        message: bytes | Message,
        *,
        recipients: Sequence[AddressLike],
        sender: AddressLike = "",
        client: Client | None = None,
        helo: Text | None = None,
        macros: MacroValues | None = None,
        body_in_eom: bool = False,
        own_received: Header | None = None,
    ) -> Result:
        """Bring a message before the filter, and do with it what the filter says.

        :param message: read by :meth:`Message.parse` where it is bytes; sent as it is
            where it is a :class:`Message`.
        :param recipients: at least one; each an address, an :class:`Address`, or a
            sequence of an address and its ESMTP parameters.  Angle brackets are added.
        :param sender: likewise; empty for a bounce.
        :param client: first message of a session only; see :meth:`greet`.
        :param helo: likewise.
        :param macros: by name, sent at the stage where MTAs send them by default
            (others as early as possible), or by ``"STAGE:name"``.  ``{mail_addr}``
            and ``{rcpt_addr}`` are set from the envelope where they are not given.
        :param body_in_eom: send the last piece of the body with the end of message.
        :param own_received: a header that the MTA puts on top, unseen by the filter.
        :raises ValueError: no recipient; *client* or *helo* with a later message; a NUL
            in a text; a header longer than a command holds.
        """
        if isinstance(recipients, (str, bytes)):
            raise ValueError(f"recipients {recipients!r}: give a sequence of addresses")
        if not recipients:
            raise ValueError("recipients: at least one is needed")
        if not isinstance(message, Message):
            message = Message.parse(message)
        transaction = _Transaction(
            self, message, Address.make(sender), [Address.make(item) for item in recipients]
        )
        lasting = {stage: dict(table) for stage, table in self._macros.items()}
        try:
            greeting = self._greeting
            if greeting is None:
                greeting = self.greet(client, helo, macros=macros)
            elif client is not None or helo is not None:
                raise ValueError(_GREETED)
            else:
                self._define(macros, Stage.MAIL)
            return transaction.run(greeting, body_in_eom, own_received)
        finally:
            # The next message has macros of its own; the session's stay.
            for stage in _MACRO_ORDER[2:]:
                self._macros[stage] = lasting.get(stage, {})

    def _define(self, macros: MacroValues | None, early: Stage) -> None:
        for name, value in (macros or {}).items():
            prefix, colon, rest = name.partition(":")
            if colon:
                self.set_macros(prefix, {rest: value})
            else:
                self.set_macros(_USUAL_STAGE.get(_braced(name), early), {name: value})


_GREETED = "client and helo were told at the start of the session; quit_nc() starts a new one"


class _Transaction:
    """One message on its way through the steps."""

    def __init__(
        self, mta: MTA, message: Message, sender: Address, recipients: list[Address]
    ) -> None:
        self._mta = mta
        self._message = message
        self._sender = sender
        self._asked = recipients
        self._refused: list[RefusedRecipient] = []
        self._replies: list[Reply] = []

    def run(self, greeting: list[Reply], body_in_eom: bool, own: Header | None) -> Result:
        self._replies = list(greeting)
        decided = next((reply for reply in greeting if not reply.verdict.goes_on), None)
        if decided is None:
            decided = self._decide(body_in_eom)
            if decided.stage is Stage.RCPT and decided.verdict is not Verdict.ACCEPT:
                self._mta.abort()
        return self._result(decided, own)

    def _decide(self, body_in_eom: bool) -> Reply:
        for step in self._steps(body_in_eom):
            self._replies.append(step)
            if not step.verdict.goes_on and not self._only_one_recipient(step):
                return step
        if len(self._refused) < len(self._asked):
            return self._replies[-1]
        # Nobody is left to get the message: the last refusal stands for all.
        last = self._refused[-1]
        if last.recipient.rejected is None:
            return last.reply
        return Reply(Stage.RCPT, Verdict.REJECT, _parse_rejection(last.recipient.rejected))

    def _steps(self, body_in_eom: bool) -> Iterator[Reply]:
        mta = self._mta
        macros = self._with_default("{mail_addr}", Stage.MAIL, self._sender.address)
        yield mta.mail(f"<{self._sender.address}>", *self._sender.params, macros=macros)
        yield from self._envelope_recipients()
        if len(self._refused) == len(self._asked):
            return
        yield mta.data()
        leading_space = bool(mta.negotiated.steps & Step.HDR_LEADSPC)
        for header in self._message.headers:
            yield mta.header(header.name, header.wire_value(leading_space))
        yield mta.eoh()
        body, rest = self._message.body, b""
        if body_in_eom and not mta.negotiated.steps & Step.NOBODY:
            cut = max(len(body) - 1, 0) // CHUNK_SIZE * CHUNK_SIZE
            body, rest = body[:cut], body[cut:]
        reply = mta.body(body)
        if body:
            yield reply
        yield mta.eom(b"" if reply.verdict is Verdict.SKIP else rest)

    def _envelope_recipients(self) -> Iterator[Reply]:
        for recipient in self._asked:
            macros = self._with_default("{rcpt_addr}", Stage.RCPT, recipient.address)
            if recipient.rejected is not None:
                macros = None
            reply = self._mta.rcpt(
                f"<{recipient.address}>",
                *recipient.params,
                rejected=recipient.rejected,
                macros=macros,
            )
            if recipient.rejected is not None or self._only_one_recipient(reply):
                self._refused.append(RefusedRecipient(recipient, reply))
            yield reply

    def _not_refused(self) -> list[Address]:
        refused = [id(one.recipient) for one in self._refused]
        return [one for one in self._asked if one.rejected is None and id(one) not in refused]

    def _with_default(self, name: str, stage: Stage, value: str) -> MacroValues | None:
        return None if self._mta.has_macro(stage, name) else {name: value}

    @staticmethod
    def _only_one_recipient(reply: Reply) -> bool:
        """Whether the reply is about this recipient and not about the message."""
        return reply.stage is Stage.RCPT and reply.verdict in (Verdict.REJECT, Verdict.TEMPFAIL)

    def _result(self, decided: Reply, own: Header | None) -> Result:
        mta = self._mta
        leading_space = bool(mta.negotiated.steps & Step.HDR_LEADSPC)
        headers = _HeaderEditor(self._message.headers, own, mta.dialect, leading_space)
        result = Result(
            verdict=decided.verdict,
            stage=decided.stage,
            smtp=decided.smtp,
            sender=self._sender,
            recipients=self._not_refused(),
            refused=self._refused,
            message=Message([], self._message.body),
            modifications=decided.modifications,
            replies=self._replies,
        )
        if result.accepted:
            envelope = _EnvelopeEditor(result.sender, result.recipients, mta.dialect)
            for modification in decided.modifications:
                _apply(modification, result, headers, envelope)
            result.sender, result.recipients = envelope.sender, envelope.recipients
        result.message.headers = headers.headers
        result.header_edits = headers.edits
        return result


def _apply(
    modification: Modification, result: Result, headers: _HeaderEditor, envelope: _EnvelopeEditor
) -> None:
    """Do what the filter asks for, to *result* or with one of the editors."""
    if isinstance(modification, AddHeader):
        headers.add(modification.name, modification.value)
    elif isinstance(modification, InsertHeader):
        headers.insert(modification.index, modification.name, modification.value)
    elif isinstance(modification, ChangeHeader):
        headers.change(modification.index, modification.name, modification.value)
    elif isinstance(modification, ReplaceBody):
        kept = result.message.body if result.body_replaced else b""
        result.message.body = kept + modification.chunk
        result.body_replaced = True
    elif isinstance(modification, Quarantine):
        result.quarantine = modification.reason
    elif isinstance(modification, DeleteRecipient):
        envelope.delete(modification.address)
    elif isinstance(modification, ChangeSender):
        envelope.change_sender(modification.address, modification.params)
    else:
        envelope.add(modification.address, modification.params)


# --- details of the steps -----------------------------------------------------------------


def _open_socket(address: SocketAddress, timeout: float, wait_for: float) -> socket.socket:
    start = time.monotonic()
    while True:
        try:
            return _try_socket(address, timeout)
        except OSError as exc:
            patience = _patience(exc, timeout, wait_for)
            if time.monotonic() >= start + patience:
                waited = f" (tried for {patience:g} s)" if patience else ""
                raise FilterUnreachable(
                    f"cannot connect to the filter at {address}: {exc.strerror or exc}{waited}"
                ) from exc
        time.sleep(0.01)


def _patience(error: OSError, timeout: float, wait_for: float) -> float:
    """The seconds to keep trying after *error*."""
    if error.errno == errno.EAGAIN:
        # The queue of a unix socket is full: the filter is there, but busy.
        return max(timeout, wait_for)
    return wait_for if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else 0.0


def _try_socket(address: SocketAddress, timeout: float) -> socket.socket:
    target: str | tuple[str, int] = address.address
    if not isinstance(target, str):
        host, port = target
        # The first address, as libmilter itself listens on the first one only.
        found = socket.getaddrinfo(host, port, address.family, socket.SOCK_STREAM)
        target = found[0][4][:2]  # type: ignore[assignment]
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return sock


def _parse_negotiation(packet: Packet, offer: Offer) -> Negotiated:
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
        if number >= len(_MACRO_STAGES):
            raise error(f"names macros for the stage number {number}")
        names, nul, rest = data[4:].partition(b"\0")
        if not nul:
            raise error("has a list of macros that does not end in NUL")
        stage = _MACRO_STAGES[number]
        if stage in lists:
            raise error(f"names the macros for {stage} twice")
        lists[stage] = tuple(_to_str(name) for name in re.split(rb"[\s,]+", names) if name)
        data = rest
    return lists


def _macro_stage(stage: Stage | str) -> Stage:
    known = {one.name: one for one in _MACRO_ORDER}
    name = stage.name if isinstance(stage, Stage) else stage.upper()
    if name not in known:
        raise ValueError(f"macro stage {name!r} is none of {', '.join(known)}")
    return known[name]


def _braced(name: str) -> str:
    if len(name) == 3 and name[0] == "{" and name[2] == "}":
        return name[1]
    return name if len(name) <= 1 or name.startswith("{") else "{" + name + "}"


def _macro_table(values: MacroValues) -> dict[str, bytes]:
    if any(not name for name in values):
        raise ValueError("a macro needs a name")
    return {_braced(name): _to_bytes(value) for name, value in values.items()}


def _envelope(what: str, address: Text, params: Sequence[Text]) -> bytes:
    return _c_string(what, address) + b"".join(_c_string("parameter", param) for param in params)


def _parse_rejection(reply: str) -> SmtpReply:
    found = re.fullmatch(r"([45]\d\d) (?:([45]\.\d{1,3}\.\d{1,3}) )?(.*)", reply)
    if not found:
        raise ValueError(f"rejected {reply!r}: give an SMTP reply such as '550 5.1.1 User unknown'")
    code, xcode, text = found.groups()
    return SmtpReply(int(code), xcode, (text,))


def _rejection_macros(reply: str) -> dict[str, Text]:
    smtp = _parse_rejection(reply)
    return {
        "{rcpt_mailer}": "error",
        "{rcpt_host}": smtp.xcode or f"{smtp.code // 100}.0.0",
        "{rcpt_addr}": smtp.text,
    }


def _client_family(address: Text | None) -> tuple[Family, Text | None]:
    if address is None:
        return Family.UNKNOWN, None
    text = _to_str(address)
    if text.startswith("/"):
        return Family.UNIX, text
    # sendmail writes this prefix before an IPv6 address.
    plain = text[5:] if text.lower().startswith("ipv6:") else text
    try:
        found = ipaddress.ip_address(plain)
    except ValueError:
        raise ValueError(
            f"client address {text!r} is neither an IP address nor a path nor None"
        ) from None
    return (Family.INET if found.version == 4 else Family.INET6), text
