"""Test filters without an MTA: a stand-in for the connection's context.

A test sets ``Milter.factory``, makes a :class:`TestCtx`, plays a session through it and looks
at what the filter did::

    Milter.factory = MyMilter
    ctx = TestCtx()
    ctx._setsymval("{auth_authen}", "batman")
    assert ctx._connect(ip="192.0.2.1") == Milter.CONTINUE
    with open("message.eml", "rb") as fp:
        verdict = ctx._feedFile(fp, "sender@example.com", "rcpt@example.com")
    assert verdict == Milter.ACCEPT
    assert b"X-Seen-By:" in ctx._body.getvalue()
    ctx._close()

The filter is driven over the same road as by ``Milter.runmilter``, and the context holds it
to the rules of the real one: what may be called when, what is refused with which exception,
what a callback may return. An exception in a callback, and a result that is no verdict,
come out of the driving method, where the real context would apply the exception policy.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, ClassVar, Union, cast

import milter

from . import _rules
from ._protocol import ALL_STEPS, MACRO_CALLBACKS
from ._runner import CALLBACKS

if TYPE_CHECKING:
    from email.message import Message

    from typing_extensions import Buffer

    from ._base import Address

_log = logging.getLogger("milter")

#: What stands for text in calls; str goes out as UTF-8 with ``surrogateescape``.
Text = Union[str, bytes]

#: How many bytes of the body the MTA sends at once (MILTER_CHUNK_SIZE).
CHUNK_SIZE = 65535

#: The client's port that ``connect`` is told.
CLIENT_PORT = 1234

#: Where sendmail and Postfix send common macros unless a list says otherwise.
_USUAL_STAGES: dict[str, int] = {
    name: stage
    for stage, names in (
        (
            milter.M_CONNECT,
            (
                "j _ v {daemon_name} {daemon_addr} {daemon_port} {if_name} {if_addr}"
                " {client_addr} {client_name} {client_port} {client_ptr}"
            ),
        ),
        (milter.M_HELO, "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}"),
        (
            milter.M_ENVFROM,
            (
                "i {auth_type} {auth_authen} {auth_ssf} {auth_author}"
                " {mail_mailer} {mail_host} {mail_addr}"
            ),
        ),
        (milter.M_ENVRCPT, "{rcpt_mailer} {rcpt_host} {rcpt_addr}"),
    )
    for name in names.split()
}

#: The stages in the order in which a session reaches them.
_STAGE_ORDER = (
    milter.M_CONNECT,
    milter.M_HELO,
    milter.M_ENVFROM,
    milter.M_ENVRCPT,
    milter.M_DATA,
    milter.M_EOH,
    milter.M_EOM,
)

#: The macro stage of each step; those without one see what the step before them saw.
_STAGES = {"helo" if name == "hello" else name: stage for name, stage in MACRO_CALLBACKS.items()}

#: What an action needs to have been negotiated, by libmilter's name of the call.
_NEEDED_ACTION = {
    "smfi_addheader": "ADDHDRS",
    "smfi_insheader": "ADDHDRS",
    "smfi_chgheader": "CHGHDRS",
    "smfi_addrcpt": "ADDRCPT",
    "smfi_addrcpt_par": "ADDRCPT_PAR",
    "smfi_delrcpt": "DELRCPT",
    "smfi_chgfrom": "CHGFROM",
    "smfi_replacebody": "CHGBODY",
    "smfi_quarantine": "QUARANTINE",
}


def _as_bytes(value: Text) -> bytes:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _as_text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _in_brackets(address: str) -> str:
    """An envelope address as it stands in MAIL and RCPT."""
    return address if address.startswith("<") else f"<{address}>"


def _host_address(ip: str | None) -> tuple[int, Address]:
    """The family and address that ``connect`` gets for a client."""
    if ip is None:
        return 0, None
    if ip.startswith("/"):
        return socket.AF_UNIX, ip
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        text = socket.inet_ntop(family, socket.inet_pton(family, ip))
    except OSError:
        raise ValueError(f"ip: {ip!r} is no IP address, no path and not None") from None
    if family == socket.AF_INET6:
        return family, (text, CLIENT_PORT, 0, 0)
    return family, (text, CLIENT_PORT)


def _macro_name(name: str) -> str:
    """A macro's name as libmilter compares it: braces around one letter do not count."""
    return name[1] if len(name) == 3 and name[0] == "{" and name[2] == "}" else name


class LazyLog:
    """A text file to append lines to, which is opened when the first one is written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Remember where to write.

        Args:
            path: the file; its directory is made when it is needed.
        """
        self._file: IO[str] | None = None
        self.name = path

    def write(self, text: str) -> int:
        """Append text, with characters that have no byte form escaped.

        Args:
            text: what to write.

        Returns:
            How many characters were written.
        """
        if self._file is None:
            directory = os.path.dirname(os.fspath(self.name))
            if directory:
                os.makedirs(directory, exist_ok=True)
            self._file = open(  # noqa: SIM115 - it stays open until close()
                self.name, "a", encoding="utf-8", errors="backslashreplace"
            )
        return self._file.write(text)

    def flush(self) -> None:
        """Bring what was written so far to the file."""
        if self._file is not None:
            self._file.flush()

    def __del__(self) -> None:
        """Close the file: tests often leave that to the end."""
        self.close()

    def close(self) -> None:
        """Close the file, if it was ever opened."""
        if self._file is not None:
            self._file.close()
            self._file = None


class _StoredMessage:
    """A message with its headers one by one, each as it stood, so that edits leave the rest."""

    def __init__(self) -> None:
        self.eol = b"\n"
        #: (name, the whole header with its line ends), from the top.
        self.fields: list[tuple[bytes, bytes]] = []
        self.separator = b""
        self.body = bytearray()
        self.new_body: bytearray | None = None

    def _field(self, name: bytes, raw: bytes) -> tuple[bytes, bytes]:
        """A header of this name with ``raw``, which has LF folds, after its colon."""
        return name, name + b":" + raw.replace(b"\n", self.eol) + self.eol

    def insert(self, at: int, name: bytes, raw: bytes) -> None:
        """Put a header at a place among all, or at the end where there are fewer."""
        if self.fields and not self.fields[-1][1].endswith(b"\n"):
            last, whole = self.fields[-1]
            self.fields[-1] = last, whole + self.eol
        self.fields.insert(at, self._field(name, raw))

    def append(self, name: bytes, raw: bytes) -> None:
        """Put a header at the end."""
        self.insert(len(self.fields), name, raw)

    def change(self, name: bytes, idx: int, raw: bytes | None) -> None:
        """Change, delete (None) or, beyond the last of that name, append a header.

        MTAs take index 0 for the first.
        """
        places = [i for i, field in enumerate(self.fields) if field[0].lower() == name.lower()]
        if max(idx, 1) <= len(places):
            at = places[max(idx, 1) - 1]
            self.fields[at : at + 1] = [] if raw is None else [self._field(name, raw)]
        elif raw is not None:
            self.append(name, raw)

    def as_bytes(self) -> bytes:
        """The whole message as it stands now."""
        body = self.body if self.new_body is None else self.new_body
        # MTAs mend what lacks the empty line after the headers.
        separator = self.separator or (self.eol if self.fields and body else b"")
        return b"".join(whole for _, whole in self.fields) + separator + body


def _split_message(data: bytes) -> tuple[_StoredMessage, list[tuple[bytes, bytes]], bytes]:
    """Take a message apart without changing a byte of it.

    Args:
        data: the message, with any line ends. A line ``From …`` of a mailbox file at its
            start is dropped.

    Returns:
        The message with its headers but no body yet; the headers, each a name and everything
        after its colon with LF folds; the body.
    """
    if data.startswith(b"From "):
        data = data.partition(b"\n")[2]
    stored = _StoredMessage()
    if data.partition(b"\n")[0].endswith(b"\r"):
        stored.eol = b"\r\n"
    # Of each header its name, its lines after the colon, and where it begins.
    found: list[tuple[bytes, list[bytes], int]] = []
    body = len(data)
    at = 0
    while at < len(data):
        end = data.find(b"\n", at) + 1 or len(data)
        whole = data[at:end]
        line = whole[:-1] if whole.endswith(b"\n") else whole
        line = line[:-1] if line.endswith(b"\r") else line
        if not line:
            stored.separator = whole
            body = end
            break
        if line[:1] in (b" ", b"\t") and found:
            found[-1][1].append(line)
        else:
            name, colon, raw = line.partition(b":")
            name = name.rstrip(b" \t")
            if not colon or not _rules.is_header_name(name):
                body = at
                break
            found.append((name, [raw], at))
        at = end
    ends = [begin for _, _, begin in found[1:]] + [at]
    stored.fields = [(name, data[begin:end]) for (name, _, begin), end in zip(found, ends)]
    fields = [(name, b"\n".join(lines)) for name, lines, _ in found]
    return stored, fields, data[body:]


class TestCtx:
    """Stand-in for ``milter.milterContext``, with methods that play the MTA.

    The methods of the real context (``addheader``, ``setreply``, …) have their names here and
    obey its rules; those that begin with an underscore drive the filter. They return CONTINUE,
    or the verdict that ends the session, the message or (in ``_envrcpt``) the recipient. A
    callback that was turned off at negotiation is not called and NOREPLY counts as CONTINUE.

    What the filter did can be read at any time, also after ``_close``:

    Attributes:
        default_opts: what the MTA offers, ``[actions, steps, 0, 0]``: everything. Change it
            in a subclass, or ``_opts`` of an instance before ``_connect``.
        _opts: the offer, after negotiation what was agreed.
        _macros: the macros that are defined, name to value.
        _symlist: for each stage (index M_*) the macro list that the filter asked for, its names
            separated by spaces, or None.
        _reply: what ``setreply`` last got, ``(rcode, xcode, line, …)``; None without, and again at
            MAIL once a verdict has sent it.
        _sender: the envelope sender, as changed by ``chgfrom``; None before MAIL.
        _envfromchanged: whether ``chgfrom`` was called for this message.
        _chgfrom: each ``(sender, params)`` of a call of ``chgfrom``.
        _addrcpt: each ``(rcpt, params)`` of a call of ``addrcpt``; params is None without.
        _delrcpt: each recipient of a call of ``delrcpt``.
        _headerschanged: whether ``addheader`` or ``chgheader`` was called for this message.
        _bodyreplaced: whether ``replacebody`` was called for this message.
        _body: after ``eom`` the whole resulting message, headers included, as an
            ``io.BytesIO``; None before. Headers that were not changed are there byte for byte.
        _quarantine: the reason that ``quarantine`` was given; None without.
        _progress: how many times ``progress`` was called for this message.
        _activity: when a callback or ``progress`` was last called (``time.time()``).
    """

    __test__ = False  # pytest takes the name for that of a test class

    default_opts: ClassVar[list[int]] = [milter.CURR_ACTS, ALL_STEPS, 0, 0]

    def __init__(self, logfile: str | os.PathLike[str] = "test/milter.log") -> None:
        """Make a context that no filter is attached to yet.

        Args:
            logfile: where ``_log`` writes; opened at the first line.
        """
        self._logfp = LazyLog(logfile)
        self._opts: list[int] = list(self.default_opts)
        self._offer: list[int] = []
        self._outcome: list[int] = []
        self._macros: dict[str, str] = {}
        self._symlist: list[str | None] = [None] * len(_STAGE_ORDER)
        self._activity = time.time()
        self._reset_connection()

    def _reset_connection(self) -> None:
        """Begin a connection: nothing negotiated, no filter attached."""
        self._negotiated: list[int] | None = None
        self._connected = False
        self._closed = False
        self._running: str | None = None
        self._at_stage: int | None = None
        self._priv: Any = None
        self._reply: tuple[str | None, ...] | None = None
        self._reply_sent = False
        self._reset_message()

    def _reset_message(self) -> None:
        """Begin a message: nothing of it has come and nothing was done to it."""
        self._in_message = False
        if self._reply_sent:
            self._reply, self._reply_sent = None, False
        self._sender: str | None = None
        self._envfromchanged = False
        self._chgfrom: list[tuple[str, str | None]] = []
        self._addrcpt: list[tuple[str, str | None]] = []
        self._delrcpt: list[str] = []
        self._headerschanged = False
        self._bodyreplaced = False
        self._body: io.BytesIO | None = None
        self._quarantine: str | None = None
        self._progress = 0
        self._stored = _StoredMessage()

    # What can be read of the session.

    @property
    def actions(self) -> int:
        """The negotiated actions; all before negotiation."""
        return milter.CURR_ACTS if self._negotiated is None else self._negotiated[0]

    @property
    def protocol(self) -> int:
        """The negotiated protocol steps; 0 before negotiation."""
        return 0 if self._negotiated is None else self._negotiated[1]

    @property
    def _protocol(self) -> int:
        return self.protocol

    @property
    def _stage(self) -> int | None:
        """The macro stage (M_*) of the callback that runs now; None outside of callbacks."""
        return None if self._running is None else self._at_stage

    @property
    def _msg(self) -> Message | None:
        """The message as it stands now, parsed by ``mime``; None where nothing has come yet."""
        if not self._stored.fields and not self._stored.body:
            return None
        import mime

        return cast("Message", mime.message_from_file(io.BytesIO(self._stored.as_bytes())))

    def _log(self, *msg: object) -> None:
        """Write a line to the log file, which is opened at the first one.

        Args:
            msg: any objects, written with spaces between them.
        """
        print(*msg, file=cast("IO[str]", self._logfp))

    # Driving the filter.

    def _setsymval(self, name: str, val: str | None) -> None:
        """Define a macro of the MTA.

        Args:
            name: its name, in braces where that is longer than one letter.
            val: its value; None makes it undefined again.
        """
        if val is None:
            self._macros.pop(name, None)
        else:
            self._macros[name] = val

    def _run(self, step: str, *args: Any) -> int:
        """Call one callback as the extension does and check its result."""
        self._activity = time.time()
        self._at_stage = _STAGES.get(step, self._at_stage)
        if self.protocol & _rules.step_bits(step)[1]:
            return milter.CONTINUE
        if self._priv is None and step not in ("negotiate", "connect", "close"):
            raise RuntimeError(f"no filter is attached: call _connect() before {step}")
        if step in _rules.MESSAGE_STEPS:
            self._in_message = True
        self._running = step
        try:
            result = CALLBACKS[step](self, *args)
        finally:
            self._running = None
        verdict = _rules.check_verdict(step, result, self.protocol)
        if step == "unknown" and verdict == milter.ACCEPT and not self._in_message:
            verdict = milter.CONTINUE
        self._check_reply_class(step, verdict)
        if _rules.ends_message(step, verdict):
            self._in_message = False
        return verdict

    def _check_reply_class(self, step: str, verdict: int) -> None:
        """Say what libmilter does without a word: it drops a reply of the other class."""
        wanted = {milter.TEMPFAIL: "4", milter.REJECT: "5"}.get(verdict)
        if wanted is None or self._reply is None:
            return
        given = str(self._reply[0])[0]
        if given == wanted:
            self._reply_sent = True
            return
        _log.warning(
            "the %s callback returned %s after setreply with a %sxx code: "
            "libmilter drops that reply, the verdict stands",
            step,
            "TEMPFAIL" if wanted == "4" else "REJECT",
            given,
        )

    def _negotiate(self) -> int:
        """Offer ``_opts`` to a new filter object; what it takes is in ``_opts`` afterwards.

        Returns:
            CONTINUE, ALL_OPTS, or REJECT: the MTA goes on without the filter.

        Raises:
            milter.error: the filter's ``negotiate`` returns anything else.
        """
        # What a test has set there is an offer, what the last negotiation left there is none.
        if self._opts != self._outcome:
            self._offer = list(self._opts)
        offer = self._offer
        self._symlist = [None] * len(self._symlist)
        self._negotiated = None
        self._running = "negotiate"
        opts = list(offer)
        try:
            verdict = self._make_filter(opts)
        finally:
            self._running = None
        if verdict == milter.ALL_OPTS:
            opts = [offer[0], offer[1] & milter.P_SKIP, 0, 0]
        elif verdict not in (milter.CONTINUE, milter.REJECT):
            raise milter.error(
                f"the negotiate callback returned {verdict!r}: not CONTINUE, ALL_OPTS or REJECT"
            )
        # libmilter would end the session over more than was offered, so the extension clears it.
        self._opts = [opts[0] & offer[0], opts[1] & offer[1], 0, 0]
        self._negotiated = self._outcome = list(self._opts)
        return cast(int, verdict)

    def _make_filter(self, opts: list[int]) -> Any:
        """Have the filter object made, and let it negotiate."""
        return CALLBACKS["negotiate"](self, opts)

    def _connect(
        self, host: str = "localhost", helo: str = "spamrelay", ip: str | None = "1.2.3.4"
    ) -> int:
        """Play the begin of a session: negotiate, connect and HELO.

        A session that is still open is closed first.

        Args:
            host: the client's name.
            helo: what it calls itself.
            ip: its address: IPv4, IPv6, the path of a unix socket (it begins with a slash), or
                None for one that the MTA does not know.

        Returns:
            CONTINUE, or the verdict of the callback that ended the session; REJECT if the
            negotiation did.
        """
        family, hostaddr = _host_address(ip)
        if self._connected and not self._closed:
            self._close()
        self._reset_connection()
        if self._negotiate() == milter.REJECT:
            return milter.REJECT
        self._connected = True
        verdict = self._run("connect", host, int(family), hostaddr)
        if verdict != milter.CONTINUE:
            return verdict
        return self._helo(helo)

    def _helo(self, helo: str) -> int:
        """Play HELO.

        Args:
            helo: what the client calls itself.

        Returns:
            The verdict.
        """
        return self._run("helo", helo)

    def _envfrom(self, *s: Text) -> int:
        """Play MAIL; a new message begins.

        Args:
            s: the sender, in angle brackets, and the ESMTP parameters, as str or bytes.

        Returns:
            The verdict.
        """
        self._reset_message()
        args = [_as_bytes(value) for value in s]
        self._sender = _as_text(args[0])
        return self._run("envfrom", *args)

    def _envrcpt(self, s: Text, *params: Text) -> int:
        """Play RCPT.

        Args:
            s: the recipient, in angle brackets, as str or bytes.
            params: the ESMTP parameters.

        Returns:
            The verdict, which is for this recipient.
        """
        return self._run("envrcpt", *[_as_bytes(value) for value in (s, *params)])

    def _data(self) -> int:
        """Play DATA.

        Returns:
            The verdict.
        """
        return self._run("data")

    def _header(self, fld: Text, val: Text) -> int:
        """Send one header.

        Args:
            fld: its name.
            val: its value as the filter is to see it: without the leading space, unless
                P_HDR_LEADSPC was agreed.

        Returns:
            The verdict.
        """
        name, raw = _as_bytes(fld), self._raw_value(_as_bytes(val))
        self._stored.append(name, raw)
        return self._send_header(name, raw)

    def _raw_value(self, value: bytes) -> bytes:
        """What stands after the colon, for a value from the filter's side."""
        return value if self.protocol & milter.P_HDR_LEADSPC else b" " + value

    def _send_header(self, name: bytes, raw: bytes) -> int:
        """Call the callback with what the MTA sends of a header that stands in the message."""
        value = raw
        if not self.protocol & milter.P_HDR_LEADSPC and raw.startswith(b" "):
            value = raw[1:]
        return self._run("header", _as_text(name), value)

    def _eoh(self) -> int:
        """Play the end of the headers.

        Returns:
            The verdict.
        """
        self._stored.separator = self._stored.eol
        return self._run("eoh")

    def _feed_body(self, bfp: IO[bytes]) -> int:
        """Send the body in pieces of 65,535 bytes, none after the filter says SKIP.

        Args:
            bfp: a binary file, read to its end.

        Returns:
            The verdict: CONTINUE where all were taken or the rest was skipped.
        """
        content = bfp.read()
        self._stored.body += content
        for at in range(0, len(content), CHUNK_SIZE):
            verdict = self._run("body", content[at : at + CHUNK_SIZE])
            if verdict == milter.SKIP:
                break
            if verdict != milter.CONTINUE:
                return verdict
        return milter.CONTINUE

    def _eom(self) -> int:
        """Play the end of the message; ``_body`` is the resulting message afterwards.

        Returns:
            The verdict.
        """
        verdict = self._run("eom")
        self._body = io.BytesIO(self._stored.as_bytes())
        return verdict

    def _abort(self) -> int:
        """Play the end of a message that did not come to ``eom``, or nothing without one.

        Returns:
            CONTINUE: what the filter returns is ignored.
        """
        if self._in_message:
            self._run("abort")
            self._in_message = False
        return milter.CONTINUE

    def _unknown(self, cmd: str) -> int:
        """Send an SMTP command that the MTA does not know.

        Args:
            cmd: the command line.

        Returns:
            The verdict.
        """
        return self._run("unknown", cmd)

    def _close(self) -> int:
        """Play the end of the connection; the context is of no use to the filter afterwards.

        Returns:
            CONTINUE: what the filter returns is ignored.
        """
        try:
            if not self._closed:
                self._run("close")
        finally:
            self._closed = True
            self._logfp.close()
        return milter.CONTINUE

    def _feedFile(
        self,
        fp: IO[Any],
        sender: str = "spam@adv.com",
        rcpt: str = "victim@lamb.com",
        *rcpts: str,
    ) -> int:
        """Send a whole message, from MAIL to the end of message.

        Args:
            fp: the message: a binary file (a text file is encoded as UTF-8). The filter gets
                body and line ends as they stand there.
            sender: the envelope sender; angle brackets are put around it where it has none.
            rcpt: the recipient, likewise.
            rcpts: further recipients.

        Returns:
            The verdict of ``eom``, or the first other than CONTINUE, which ends it. SKIP leaves out
            the rest of the same kind instead.
        """
        stored, fields, body = _split_message(_as_bytes(fp.read()))
        verdict = self._envfrom(_in_brackets(sender))
        if verdict not in (milter.CONTINUE, milter.SKIP):
            return verdict
        self._stored = stored
        steps: Sequence[tuple[Callable[..., int], Sequence[tuple[Any, ...]]]] = (
            (self._envrcpt, [(_in_brackets(to),) for to in (rcpt, *rcpts)]),
            (self._data, [()]),
            (self._send_header, fields),
            (self._run, [("eoh",)]),
            (self._feed_body, [(io.BytesIO(body),)]),
        )
        for step, calls in steps:
            verdict = self._each(step, calls)
            if verdict != milter.CONTINUE:
                return verdict
        return self._eom()

    @staticmethod
    def _each(step: Callable[..., int], calls: Sequence[tuple[Any, ...]]) -> int:
        """Take one step for each tuple of arguments, until the filter wants no more."""
        for args in calls:
            verdict = step(*args)
            if verdict == milter.SKIP:
                break
            if verdict != milter.CONTINUE:
                return verdict
        return milter.CONTINUE

    def _feedMsg(self, fname: str, sender: str = "spam@adv.com", *rcpts: str) -> int:
        """Send a message from a file in the directory ``test``; see ``_feedFile``.

        Args:
            fname: the file's name there.
            sender: the envelope sender.
            rcpts: the recipients; without any, that of ``_feedFile``.

        Returns:
            The verdict.
        """
        with open(os.path.join("test", fname), "rb") as fp:
            return self._feedFile(fp, sender, *rcpts)

    # The methods of the real context.

    def _open(self) -> None:
        if self._closed:
            raise milter.error("bad context")

    def _perform(self, call: str, stage: str | None = "eom") -> None:
        """Refuse a call where the real context would, for the same reasons in the same order."""
        self._open()
        if stage is not None and self._running != stage:
            raise milter.error(f"{call}: only allowed in the {stage} callback")
        if self._running is None:
            raise milter.error(f"{call}: only allowed while a callback of this connection runs")
        needed = _NEEDED_ACTION.get(call)
        if needed is not None and not self.actions & getattr(milter, needed):
            raise milter.error(f"{call}: {needed} was not negotiated with the MTA")

    def getpriv(self) -> Any:
        """The object kept for this connection, the filter; None without.

        Raises:
            milter.error: the connection is closed.
        """
        self._open()
        return self._priv

    def setpriv(self, priv: Any) -> Any:
        """Keep an object for this connection.

        Args:
            priv: any object.

        Returns:
            The one that it replaces, or None.

        Raises:
            milter.error: the connection is closed.
        """
        self._open()
        old, self._priv = self._priv, priv
        return old

    def getsymval(self, name: Text) -> str | None:
        """Look up a macro that was defined by ``_setsymval``.

        Where the filter has asked for a list of macros at this stage, the others are not seen,
        unless they came at an earlier stage: by a list there, or because MTAs send them there
        by default. In ``negotiate`` no macro has come yet.

        Args:
            name: its name, in braces where that is longer than one letter.

        Returns:
            Its value, or None.

        Raises:
            milter.error: no callback of this connection runs.
        """
        wanted = _macro_name(_as_text(_rules.text("getsymval", "name", name)))
        self._perform("smfi_getsymval", None)
        if not self._is_sent(wanted):
            return None
        for known, value in self._macros.items():
            if _macro_name(known) == wanted:
                return value
        return None

    def _is_sent(self, name: str) -> bool:
        """Whether the MTA has sent a macro by now."""
        if self._running == "negotiate":
            return False
        if self._at_stage is None:
            return True
        if self._symlist[self._at_stage] is None:
            return True
        for stage in _STAGE_ORDER[: _STAGE_ORDER.index(self._at_stage) + 1]:
            macros = self._symlist[stage]
            if macros is None:
                sent = _USUAL_STAGES.get(name) == stage
            else:
                sent = name in map(_macro_name, macros.split())
            if sent:
                return True
        return False

    def setreply(
        self,
        rcode: Text,
        xcode: Text | None = None,
        msg: Text | None = None,
        *more: Text | None,
    ) -> None:
        """Record the SMTP reply in ``_reply``, if the real context would take it.

        Args:
            rcode: the reply code, 4xx or 5xx.
            xcode: the enhanced status code.
            msg: the first line of text.
            more: further lines.

        Raises:
            milter.InvalidArgument: a rule is broken, which the message names.
            milter.error: no callback of this connection runs.
        """
        lines = (msg, *more)
        _rules.reply(rcode, xcode, lines)
        self._perform("smfi_setreply", None)
        given = [rcode, xcode, *[one for one in lines if one is not None]]
        self._reply_sent = False
        self._reply = tuple(None if one is None else _as_text(_as_bytes(one)) for one in given)

    def setsymlist(self, stage: int, macros: Text) -> None:
        """Record a list of macros in ``_symlist``; lists for one stage are merged.

        Args:
            stage: one of M_CONNECT to M_EOH.
            macros: their names, separated by spaces.

        Raises:
            milter.InvalidArgument: no such stage, or a line break in the list.
            milter.error: not in ``negotiate``, or the MTA does not offer SETSYMLIST.
        """
        names = _rules.symlist(stage, macros)
        self._perform("smfi_setsymlist", "negotiate")
        if not self._offer[0] & milter.SETSYMLIST:
            raise milter.error("smfi_setsymlist: the MTA did not offer SETSYMLIST")
        known = self._symlist[stage]
        self._symlist[stage] = " ".join(dict.fromkeys([*(known or "").split(), *names]))

    def addheader(self, field: Text, value: Text, idx: int = -1) -> None:
        """Add a header to the message.

        Args:
            field: its name.
            value: its value.
            idx: at which place among all headers; beyond the last, or below 0, at the end.

        Raises:
            milter.InvalidArgument: what could forge a header.
            milter.error: not in ``eom``, or ADDHDRS was not negotiated.
        """
        name = _rules.header_name("addheader", field)
        raw = self._raw_value(_rules.header_value("addheader", value))
        if idx > 2**31 - 1:
            raise _rules.refuse("addheader", "idx", "must fit into 32 bits", idx)
        self._perform("smfi_addheader" if idx < 0 else "smfi_insheader")
        self._headerschanged = True
        if idx < 0:
            self._stored.append(name, raw)
        else:
            self._stored.insert(idx, name, raw)

    def chgheader(self, field: Text, idx: int, value: Text | None) -> None:
        """Change or delete a header of the message.

        Args:
            field: its name.
            idx: which of that name, from 1 (0 stands for the first too); beyond the last a
                header is added. After a delete the following ones move up, as in Postfix.
            value: its new value; None or empty deletes it.

        Raises:
            milter.InvalidArgument: what could forge a header, or a negative index.
            milter.error: not in ``eom``, or CHGHDRS was not negotiated.
        """
        if idx < 0:
            raise _rules.refuse("chgheader", "idx", "must not be negative", idx)
        name = _rules.header_name("chgheader", field)
        wire = b"" if value is None else _rules.header_value("chgheader", value)
        self._perform("smfi_chgheader")
        self._headerschanged = True
        self._stored.change(name, idx, self._raw_value(wire) if wire else None)

    def addrcpt(self, rcpt: Text, params: Text | None = None) -> None:
        """Record an added recipient in ``_addrcpt``.

        Args:
            rcpt: the address.
            params: ESMTP parameters, separated by spaces.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no address.
            milter.error: not in ``eom``, or ADDRCPT (with params ADDRCPT_PAR) was not negotiated.
        """
        address = _as_text(_rules.nonempty_line("addrcpt", "rcpt", rcpt))
        extra = None if params is None else _as_text(_rules.line("addrcpt", "params", params))
        self._perform("smfi_addrcpt" if params is None else "smfi_addrcpt_par")
        self._addrcpt.append((address, extra))

    def delrcpt(self, rcpt: Text) -> None:
        """Record a removed recipient in ``_delrcpt``.

        Args:
            rcpt: the address.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no address.
            milter.error: not in ``eom``, or DELRCPT was not negotiated.
        """
        address = _as_text(_rules.nonempty_line("delrcpt", "rcpt", rcpt))
        self._perform("smfi_delrcpt")
        self._delrcpt.append(address)

    def chgfrom(self, sender: Text, params: Text | None = None) -> None:
        """Change the envelope sender, ``_sender``.

        Args:
            sender: the address.
            params: ESMTP parameters, separated by spaces.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no address.
            milter.error: not in ``eom``, or CHGFROM was not negotiated.
        """
        address = _as_text(_rules.nonempty_line("chgfrom", "sender", sender))
        extra = None if params is None else _as_text(_rules.line("chgfrom", "params", params))
        self._perform("smfi_chgfrom")
        self._envfromchanged = True
        self._sender = address
        self._chgfrom.append((address, extra))

    def replacebody(self, chunk: str | Buffer) -> None:
        """Replace the body; further calls append.

        Args:
            chunk: the new body, any bytes-like object, or str.

        Raises:
            TypeError: it is neither.
            BufferError: it is not one piece of memory.
            milter.error: not in ``eom``, or MODBODY was not negotiated.
        """
        try:
            content = memoryview(_as_bytes(chunk) if isinstance(chunk, str) else chunk)
        except TypeError:
            kind = type(chunk).__name__
            raise TypeError(f"a bytes-like object is required, not {kind!r}") from None
        if not content.c_contiguous:
            raise BufferError("memoryview: underlying buffer is not C-contiguous")
        self._perform("smfi_replacebody")
        self._bodyreplaced = True
        if self._stored.new_body is None:
            self._stored.new_body = bytearray()
        self._stored.new_body += content.tobytes()

    def quarantine(self, reason: Text) -> None:
        """Record in ``_quarantine`` why the message is to be held.

        Args:
            reason: one line.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no reason.
            milter.error: not in ``eom``, or QUARANTINE was not negotiated.
        """
        wire = _rules.nonempty_line("quarantine", "reason", reason)
        self._perform("smfi_quarantine")
        self._quarantine = _as_text(wire)

    def progress(self) -> None:
        """Count a sign of life in ``_progress``.

        Raises:
            milter.error: not in ``eom``.
        """
        self._perform("smfi_progress")
        self._progress += 1
        self._activity = time.time()
