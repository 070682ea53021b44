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
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

import milter

from ._borrowed import borrowed
from ._later import is_awaitable
from ._protocol import ALL_STEPS
from ._runner import CALLBACKS
from ._testctx.context import Context
from ._testctx.log import LazyLog as LazyLog
from ._testctx.macros import STAGES
from ._testctx.message import Text as Text
from ._testctx.message import as_bytes, as_text, split_message

if TYPE_CHECKING:
    from ._types import Address

if not TYPE_CHECKING:
    __getattr__ = borrowed(
        __name__,
        {
            "AF_INET": "socket:AF_INET",
            "AF_INET6": "socket:AF_INET6",
            "BytesIO": "io:BytesIO",
            "Milter": "Milter",
            "mime": "mime",
            "utils": "Milter.utils",
        },
    )

#: For each callback the protocol steps "wait for no reply" and "do not send it", 0 for none, and
#: whether it belongs to a message.
_STEPS = milter._steps()

#: How many bytes of the body the MTA sends at once (MILTER_CHUNK_SIZE).
CHUNK_SIZE = 65535

#: The client's port that ``connect`` is told.
CLIENT_PORT = 1234

LazyLog.__module__ = __name__


class _NoReply(int):
    """NOREPLY of ``connect``: the session goes on, so that it counts as CONTINUE as well.

    With pymilter it was the one or the other, depending on whether ``Milter.test`` had been
    imported; tests compare with either.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other in (int(self), milter.CONTINUE)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


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


class TestCtx(Context):
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
        _msg, _stage: the message and the stage, see there. They and ``_body`` can be assigned, for
            tests that call methods of the filter by themselves.
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
        super().__init__(list(self.default_opts))
        self._logfp = LazyLog(logfile)

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
        self._pretended = None
        self._at_stage = STAGES.get(step, self._at_stage)
        _, turned_off, in_message = _STEPS[step]
        if self.protocol & turned_off:
            return milter.CONTINUE
        if self._priv is None and step not in ("negotiate", "connect", "close"):
            raise RuntimeError(f"no filter is attached: call _connect() before {step}")
        if in_message:
            self._in_message = True
        result = self._call(step, args)
        verdict = milter._verdict(step, result, self.protocol)
        if verdict == milter.NOREPLY:
            verdict = milter.CONTINUE
        if step == "unknown" and verdict == milter.ACCEPT and not self._in_message:
            verdict = milter.CONTINUE
        # libmilter drops a reply of another class, which the log is told.
        if self._reply is not None and milter._sends_reply(step, verdict, str(self._reply[0])):
            self._reply_sent = True
        if milter._ends_message(step, verdict):
            self._in_message = False
        return verdict

    def _call(self, step: str, args: Sequence[Any]) -> Any:
        """Call a callback in the connection's variables; what is a coroutine is awaited."""
        if self._running is not None:  # by the callback itself, which is in them
            return CALLBACKS[step](self, *args)
        self._running = step
        try:
            result = self._variables.run(CALLBACKS[step], self, *args)
            return self._await(result, step) if is_awaitable(result) else result
        finally:
            self._running = None

    def _await(self, awaitable: Any, step: str) -> Any:
        """Await what a callback has returned, in the event loop of all callbacks."""
        from . import _async

        is_last = step in ("abort", "close")
        result, self._variables = _async.wait_in(awaitable, self, self._variables, step, is_last)
        return result

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
        if milter._verdict("negotiate", verdict, 0) == milter.ALL_OPTS:
            opts = [offer[0], offer[1] & milter.P_SKIP, 0, 0]
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
            CONTINUE; NOREPLY, which compares equal to CONTINUE too, where ``connect`` or
            ``hello`` is without a reply; or the verdict of the callback that ended the session,
            REJECT if the negotiation did.
        """
        family, hostaddr = _host_address(ip)
        if self._connected and not self._closed:
            self._close()
        self._reset_connection()
        if self._negotiate() == milter.REJECT:
            return milter.REJECT
        self._connected = True
        verdict = self._run("connect", host, int(family), hostaddr)
        if verdict == milter.CONTINUE:
            verdict = self._helo(helo)
        if verdict == milter.CONTINUE and (self._is_silent("connect") or self._is_silent("helo")):
            return _NoReply(milter.NOREPLY)
        return verdict

    def _is_silent(self, step: str) -> bool:
        """Whether a callback is called, but has no reply."""
        no_reply, turned_off, _ = _STEPS[step]
        return bool(self.protocol & no_reply) and not self.protocol & turned_off

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
        args = [as_bytes(value) for value in s]
        self._sender = as_text(args[0])
        return self._run("envfrom", *args)

    def _envrcpt(self, s: Text, *params: Text) -> int:
        """Play RCPT.

        Args:
            s: the recipient, in angle brackets, as str or bytes.
            params: the ESMTP parameters.

        Returns:
            The verdict, which is for this recipient.
        """
        return self._run("envrcpt", *[as_bytes(value) for value in (s, *params)])

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
        name, raw = as_bytes(fld), self._raw_value(as_bytes(val))
        self._stored.append(name, raw)
        return self._send_header(name, raw)

    def _send_header(self, name: bytes, raw: bytes) -> int:
        """Call the callback with what the MTA sends of a header that stands in the message."""
        value = raw
        if not self.protocol & milter.P_HDR_LEADSPC and raw.startswith(b" "):
            value = raw[1:]
        return self._run("header", as_text(name), value)

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
        self._result = io.BytesIO(self._stored.as_bytes())
        return verdict

    def _abort(self, close: bool = True) -> None:
        """Play a session that is cut off: ``abort``, where a message was under way, and ``close``.

        Args:
            close: False for the end of the message alone (RSET); the session goes on.
        """
        if self._in_message:
            self._run("abort")
            self._in_message = False
        if close:
            self._close()

    def _unknown(self, cmd: str) -> int:
        """Send an SMTP command that the MTA does not know.

        Args:
            cmd: the command line.

        Returns:
            The verdict.
        """
        return self._run("unknown", cmd)

    def _close(self) -> None:
        """Play the end of the connection; the context is of no use to the filter afterwards.

        The filter object can still be had, by ``getpriv``.
        """
        priv = self._priv
        try:
            if not self._closed:
                self._run("close")
        finally:
            self._priv = priv
            self._closed = True
            self._logfp.close()

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
        stored, fields, body = split_message(as_bytes(fp.read()))
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
