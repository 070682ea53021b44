"""An MTA's connection to a filter: moves bytes between a socket and a session, and keeps time."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import TypeVar, cast

from . import commands
from .address import SocketAddress, parse_socket
from .commands import Command, Dialogue
from .errors import FilterClosed, FilterTimeout, FilterUnreachable
from .messages import Address, AddressLike, Client, Header, Message
from .recording import Recording
from .replay import Player, Replay
from .session import Event, Session, Trace
from .transaction import Result, Transaction, greeting
from .vocabulary import (
    Dialect,
    Family,
    MacroValues,
    Negotiated,
    Offer,
    Reply,
    Stage,
    Text,
)
from .wire import Packet, frame

T = TypeVar("T")

_GREETED = "client and helo were told at the start of the session; quit_nc() starts a new one"


class _Transport:
    """A socket, every wait with a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock

    @property
    def is_open(self) -> bool:
        return self._sock.fileno() >= 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def half_close(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def send(self, data: bytes, deadline: float) -> int:
        """Send *data*; returns how many bytes were not taken by *deadline*."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                if not self._poll(select.POLLOUT, deadline):
                    break
        return len(view)

    def receive(self, deadline: float) -> tuple[bytes | None, bool]:
        """What comes in, b"" at the end of the stream, None where nothing does by *deadline*.

        And whether that was in time: what has come in already is taken even after the deadline.
        """
        while True:
            in_time = time.monotonic() < deadline
            try:
                return self._sock.recv(256 * 1024), in_time
            except BlockingIOError:
                if not in_time or not self._poll(select.POLLIN, deadline):
                    return None, False
            except OSError:
                # A reset is the harsh form of closing.
                return b"", in_time

    def _poll(self, event: int, deadline: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, event)
        remaining = deadline - time.monotonic()
        # Round up, so that a wait of less than 1 ms does not spin.
        return bool(poller.poll(max(0, int(remaining * 1000) + 1) if remaining > 0 else 0))


class MTA:
    """A connection to a filter, seen from the MTA; see the module's text for an example.

    Made by :meth:`connect`; the constructor takes a socket that is connected
    already and negotiates on it unless *offer* is None (then :meth:`negotiate` may
    be called, or not).

    Args:
        sock: a connected stream socket, which this object owns from now on.
        timeout: seconds that any one answer may take; a progress packet starts them anew.
        total_timeout: seconds that an answer may take with all its progress packets and
            modifications.
        dialect: see :class:`Dialect`.
        trace: called with ``">"`` or ``"<"`` and the bytes of whatever is sent or received.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        offer: Offer | None = Offer(),
        timeout: float = 10.0,
        total_timeout: float = 300.0,
        dialect: Dialect = Dialect.POSTFIX,
        trace: Trace | None = None,
    ) -> None:
        if not isinstance(sock, socket.socket):
            raise TypeError(f"MTA takes a connected socket, not {sock!r}: use MTA.connect(address)")
        self._transport = _Transport(sock)
        self._session = Session(dialect=dialect, trace=trace)
        self._trace = trace
        self.timeout = timeout
        self.total_timeout = total_timeout
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
        trace: Trace | None = None,
    ) -> MTA:
        """Connect to the filter at *address* and negotiate.

        Args:
            address: as for :func:`parse_socket`.
            wait_for: seconds to keep trying while the filter does not listen yet.
            postfix_syntax: take ``inet:host:port`` too.

        Raises:
            ValueError: *address* is no socket address.
            FilterUnreachable: nobody listens there, or not within the time.
            NegotiationError: the filter asks for more than was offered.
        """
        if isinstance(address, str):
            address = parse_socket(address, postfix=postfix_syntax)
        return cls(
            open_socket(address, timeout, wait_for),
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
            if kind is None and self.is_open:
                self.quit()
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket without a word to the filter."""
        self._transport.close()

    @property
    def is_open(self) -> bool:
        """Whether :meth:`close` has not been called yet; the filter may have hung up."""
        return self._transport.is_open

    def fileno(self) -> int:
        """The socket's descriptor, -1 where it is closed."""
        return self._transport.fileno()

    @property
    def dialect(self) -> Dialect:
        """See :class:`Dialect`; may be set."""
        return self._session.dialect

    @dialect.setter
    def dialect(self, dialect: Dialect) -> None:
        self._session.dialect = dialect

    # packets

    def send_raw(self, data: bytes) -> None:
        """Send *data* as it is."""
        self._require_open()
        if self._trace is not None:
            self._trace(">", data)
        try:
            left = self._transport.send(data, time.monotonic() + self.timeout)
        except OSError as exc:
            raise FilterClosed(
                f"cannot write to the filter: {exc.strerror}",
                self._session.stage,
                self._session.unread,
            ) from exc
        if left:
            raise FilterTimeout(
                f"the filter did not read {left} bytes within {self.timeout:g} s",
                self._session.stage,
            )

    def send_packet(self, command: bytes, data: bytes = b"") -> None:
        """Send one packet, whatever its content."""
        self.send_raw(frame(command, data))

    def half_close(self) -> None:
        """Say nothing more: the filter sees the end of the stream, and may still answer.

        Raises:
            FilterClosed: the connection is closed.
        """
        self._require_open()
        try:
            self._transport.half_close()
        except OSError as exc:
            raise FilterClosed(
                f"cannot write to the filter: {exc.strerror}", self._session.stage
            ) from exc

    def read_packet(self, timeout: float | None = None) -> Packet:
        """The next packet from the filter.

        Args:
            timeout: seconds to wait for all of it, :attr:`timeout` where it is None.

        Raises:
            FilterTimeout: it did not come in time.
            FilterClosed: the filter closed the connection.
        """
        wait = self.timeout if timeout is None else timeout
        return self._read(self._session.next_packet, time.monotonic() + wait, wait)

    def expect_nothing(self, wait: float = 0.0) -> None:
        """Check that the filter has said nothing that is still unread.

        Each step checks this before it sends anything, and :meth:`quit` checks it
        reliably, because it reads to the end of the connection.

        Args:
            wait: seconds to wait for what must not come.

        Raises:
            ProtocolError: something came.
            FilterClosed: the filter closed the connection.
        """
        self._require_open()
        deadline = time.monotonic() + wait
        while not self._session.unread and not self._session.ended and self._fill(deadline):
            pass
        self._session.check_silence()

    def expect_close(self, timeout: float | None = None) -> None:
        """Wait until the filter closes the connection, and check that it says nothing before.

        Raises:
            FilterTimeout: it does not close in time.
            ProtocolError: it says something.
        """
        self._require_open()
        wait = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + wait
        while not self._session.ended and self._fill(deadline):
            pass
        if self._session.unread:
            self._session.check_silence()
        if not self._session.ended:
            raise FilterTimeout(
                f"the filter did not close the connection within {wait:g} s", self._session.stage
            )

    def _require_open(self) -> None:
        if not self.is_open:
            raise FilterClosed("the connection to the filter is closed", self._session.stage)

    def _fill(self, deadline: float) -> bool:
        """Take in more bytes, or the end of the stream; False once *deadline* has passed."""
        data, in_time = self._transport.receive(deadline)
        if data is not None:
            self._session.receive(data)
        return in_time

    def _read(self, take: Callable[[], T | None], deadline: float, waited: float) -> T:
        """What *take* gives once enough has come in; *waited* is for the error's text."""
        self._require_open()
        while True:
            found = take()
            if found is not None:
                return found
            if not self._fill(deadline) and not self._session.ended:
                data = self._session.unread
                raise FilterTimeout(
                    f"no {'complete ' if data else ''}answer within {waited:g} s",
                    self._session.stage,
                    data,
                )

    # negotiation

    @property
    def offer(self) -> Offer | None:
        """What was offered, None before."""
        return self._session.offer

    @property
    def negotiated(self) -> Negotiated:
        """What was agreed on; before negotiation, as if the filter had asked for nothing."""
        return self._session.negotiated

    def negotiate(self, offer: Offer) -> Negotiated:
        """Offer *offer* to the filter and return what it takes (``SMFIC_OPTNEG``).

        Raises:
            NegotiationError: the filter's answer does not fit the offer.
        """
        self.expect_nothing()
        self.send_raw(self._session.negotiate(offer))
        return self._await(Negotiated)

    # macros

    def set_macros(self, stage: Stage | str, values: MacroValues) -> None:
        """Define macros, to be sent with each further command of *stage*.

        Where the filter has named the macros it wants at a stage, just those are
        sent that have a value there or at an earlier stage.

        Args:
            stage: one of CONNECT, HELO, MAIL, RCPT, DATA, EOH, EOM.
            values: names of more than one letter get their braces where they lack them.
        """
        self._session.macros.set(stage, values)

    def has_macro(self, stage: Stage | str, name: str) -> bool:
        """Whether :meth:`set_macros` has defined the macro *name* for *stage*."""
        return self._session.macros.has(stage, name)

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

        Args:
            address: IPv4, IPv6, a path (``/…``), or None for an unknown family.
            family: skips the check of *address* and sends it as of this family.

        Raises:
            ValueError: *address* is none of these.
        """
        return self._say(commands.connect_info(hostname, address, port, family, macros))

    def helo(self, hostname: Text, *, macros: MacroValues | None = None) -> Reply:
        """HELO or EHLO (``SMFIC_HELO``)."""
        return self._say(commands.helo(hostname, macros))

    def mail(self, sender: Text, *params: Text, macros: MacroValues | None = None) -> Reply:
        """MAIL with the address as it is given, normally in ``<>`` (``SMFIC_MAIL``)."""
        return self._say(commands.mail(sender, params, macros))

    def rcpt(
        self,
        recipient: Text,
        *params: Text,
        rejected: str | None = None,
        macros: MacroValues | None = None,
    ) -> Reply:
        """RCPT with the address as it is given, normally in ``<>`` (``SMFIC_RCPT``).

        Args:
            rejected: the SMTP reply with which the MTA itself refused the recipient, such as
                ``"550 5.1.1 User unknown"``.  Then the step is sent only under ``SMFIP_RCPT_REJ``,
                and the macros ``{rcpt_mailer}``, ``{rcpt_host}`` and ``{rcpt_addr}`` say ``error``,
                the enhanced code and the text.
        """
        return self._say(commands.rcpt(recipient, params, rejected, macros))

    def data(self, *, macros: MacroValues | None = None) -> Reply:
        """DATA (``SMFIC_DATA``); not sent before protocol version 4."""
        return self._say(Command(Stage.DATA, macros=macros or {}))

    def header(self, name: Text, value: Text) -> Reply:
        """One header (``SMFIC_HEADER``).

        Args:
            value: what goes over the wire: LF alone at folds; with the leading space only where
                ``SMFIP_HDR_LEADSPC`` was agreed.  :meth:`send` sees to both.
        """
        return self._say(commands.header(name, value))

    def eoh(self, *, macros: MacroValues | None = None) -> Reply:
        """End of headers (``SMFIC_EOH``)."""
        return self._say(Command(Stage.EOH, macros=macros or {}))

    def body(self, data: bytes) -> Reply:
        """The body or a part of it (``SMFIC_BODY``), in chunks of at most 65535 bytes.

        Stops at the first chunk whose answer is not CONTINUE; after SKIP, nothing is
        sent until the next MAIL.
        """
        return self._play(commands.body(data))

    def eom(self, data: bytes = b"", *, macros: MacroValues | None = None) -> Reply:
        """End of message (``SMFIC_BODYEOB``), with the body's last bytes if *data* has any."""
        return self._say(Command(Stage.EOM, data, macros or {}))

    def unknown(self, command: Text) -> Reply:
        """An SMTP command that the MTA does not know (``SMFIC_UNKNOWN``); version 3 and later."""
        return self._say(commands.unknown(command))

    def abort(self) -> None:
        """Give up the current message (``SMFIC_ABORT``); there is no answer."""
        self._say(Command(Stage.ABORT))

    def quit(self, timeout: float | None = None) -> None:
        """End the connection (``SMFIC_QUIT``), and check that the filter closes it in silence.

        Raises:
            ProtocolError: the filter had said, or still says, something.
            FilterTimeout: the filter does not close the connection in time.
        """
        self._say(Command(Stage.QUIT))
        self.expect_close(timeout)
        self.close()

    def quit_nc(self) -> None:
        """End the session but keep the connection for the next (``SMFIC_QUIT_NC``, version 6).

        Raises:
            ValueError: the filter speaks an older version.
        """
        self._say(Command(Stage.QUIT_NC))
        self._greeting = None

    def _say(self, command: Command) -> Reply:
        """Tell the filter of *command*, and wait for the answer where one is due."""
        self.expect_nothing()
        data = self._session.send(command)
        if data:
            self.send_raw(data)
        return self._await(Reply)

    def _play(self, dialogue: Dialogue[T]) -> T:
        """Say one command after the other; returns what comes of them."""
        try:
            command = next(dialogue)
            while True:
                command = dialogue.send(self._say(command))
        except StopIteration as end:
            result: T = end.value
            return result

    def _await(self, kind: type[T]) -> T:
        """The event of this kind; each one before it starts the wait for the next anew."""
        limit = time.monotonic() + self.total_timeout
        while True:
            event = self._next_event(limit)
            if isinstance(event, kind):
                return event

    def _next_event(self, limit: float) -> Event:
        deadline, waited = time.monotonic() + self.timeout, self.timeout
        if deadline > limit:
            deadline, waited = limit, self.total_timeout
        return cast("Event", self._read(self._session.next_event, deadline, waited))

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

        Args:
            client: :class:`Client` by default, that is localhost.
            helo: the client's name by default.
        """
        if self._greeting is not None:
            raise ValueError(_GREETED)
        self._session.macros.define(macros, Stage.CONNECT)
        replies: list[Reply] = []
        try:
            self._play(greeting(client or Client(), helo, replies))
        finally:
            self._greeting = replies or None
        return replies

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

        Args:
            message: read by :meth:`Message.parse` where it is bytes; sent as it is where it is a
                :class:`Message`.
            recipients: at least one; each an address, an :class:`Address`, or a sequence of an
                address and its ESMTP parameters.  Angle brackets are added.
            sender: likewise; empty for a bounce.
            client: first message of a session only; see :meth:`greet`.
            helo: likewise.
            macros: by name, sent at the stage where MTAs send them by default (others as early as
                possible), or by ``"STAGE:name"``.  ``{mail_addr}`` and ``{rcpt_addr}`` are set from
                the envelope where they are not given.
            body_in_eom: send the last piece of the body with the end of message.
            own_received: a header that the MTA puts on top, unseen by the filter.

        Raises:
            ValueError: no recipient; *client* or *helo* with a later message; a NUL in a text; a
                header longer than a command holds.
        """
        if isinstance(recipients, (str, bytes)):
            raise ValueError(f"recipients {recipients!r}: give a sequence of addresses")
        if not recipients:
            raise ValueError("recipients: at least one is needed")
        if isinstance(message, str):
            raise TypeError("message must be bytes or a Message, not str: encode it")
        if not isinstance(message, Message):
            message = Message.parse(message)
        transaction = Transaction(
            self._session,
            message,
            Address.make(sender),
            [Address.make(item) for item in recipients],
        )
        before = self._session.macros.copy()
        try:
            replies = self._greeting
            if replies is None:
                replies = self.greet(client, helo, macros=macros)
            elif client is not None or helo is not None:
                raise ValueError(_GREETED)
            else:
                self._session.macros.define(macros, Stage.MAIL)
            return self._play(transaction.run(replies, body_in_eom=body_in_eom, own=own_received))
        finally:
            # The next message has macros of its own; the session's stay.
            self._session.macros.end_message(before)

    # recorded sessions

    def replay(
        self,
        recording: Recording | str | os.PathLike[str],
        *,
        ignored_headers: Collection[str] = (),
        ignore_negotiation: bool = False,
    ) -> Replay:
        """Say what the MTA said in a recorded session, and compare the filter's answers.

        Nothing may have been said on the connection: make it by ``connect(…, offer=None)``.  It
        is closed afterwards.

        Args:
            recording: a session that ``python -m Milter record`` has written, or its file.
            ignored_headers: names of headers whose values may differ, such as those with a date.
            ignore_negotiation: that the filter negotiates something else is no difference, as
                long as the MTA would say the same, or less.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no recording; or something was said on the connection.
        """
        if not isinstance(recording, Recording):
            recording = Recording.load(recording)
        if self._session.stage is not None:
            raise ValueError("replay needs a connection without negotiation: offer=None")
        try:
            return Player(self, ignored_headers, ignore_negotiation).play(recording)
        finally:
            self.close()


# --- connecting ----------------------------------------------------------------------------------


def open_socket(address: SocketAddress, timeout: float, wait_for: float = 0.0) -> socket.socket:
    """A connection to a filter.

    Raises:
        FilterUnreachable: nobody listens there, or not within *wait_for* seconds.
    """
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
        try:
            found = socket.getaddrinfo(host, port, address.family, socket.SOCK_STREAM)
        except UnicodeError as exc:
            raise OSError("the host cannot be a name in the DNS") from exc
        target = found[0][4][:2]  # type: ignore[assignment]
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return sock
