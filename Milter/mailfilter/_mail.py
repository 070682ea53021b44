"""A message as a function sees it."""

from __future__ import annotations

import datetime
import io
import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Union, cast

from .._testctx.macros import CALLBACKS_OF_STAGES, USUAL_STAGES
from .._testctx.message import split_message
from . import _whole
from ._addresses import Address, AddressLike, Params, Recipients, as_address
from ._body import CHUNK, Body, Spool, spooled, with_crlf
from ._errors import STAGES, Gate, NotNow
from ._headers import Headers

if TYPE_CHECKING:
    from email.message import EmailMessage, Message

    from ._body import Content

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

#: Bytes of a body that may be in memory, unless a filter says otherwise.
SPOOL_AT = 1024 * 1024

_ORDER = {stage: number for number, stage in enumerate(STAGES)}

_OVER = "the function has returned, and the message is out of its hands"
_EARLY = "a message can be changed by functions with at='eom' only"


class Client:
    """The SMTP client.

    Attributes:
        host: its name as the MTA found it, or its address in brackets.
        address: its IP address; None where it has none, as in local submissions.
        port: its TCP port, 0 where it is not known.
        family: ``socket.AF_INET``, ``AF_INET6``, ``AF_UNIX``, or 0 where there is no address.
        path: of a unix socket, None for others.
    """

    __slots__ = ("_ip", "family", "host", "path", "port")

    def __init__(
        self, host: str = "localhost", address: str | IPAddress | None = None, port: int = 0
    ) -> None:
        """Say who a client is.

        Args:
            host: its name.
            address: its IP address, or the path of a unix socket; None where it has none.
            port: its TCP port.

        Raises:
            ValueError: the address is none.
        """
        self.host = host
        self.port = port
        self.path: str | None = None
        self._ip: str | IPAddress | None = None
        self.family = 0
        if isinstance(address, str) and address.startswith("/"):
            self.path, self.family = address, int(socket.AF_UNIX)
        elif address is not None:
            self._ip = ipaddress.ip_address(address)
            self.family = int(socket.AF_INET if self._ip.version == 4 else socket.AF_INET6)

    @classmethod
    def _connected(cls, host: str, family: int, hostaddr: Any) -> Client:
        """What ``connect`` was told."""
        made = cls(host)
        made.family = family
        if isinstance(hostaddr, str):
            made.path = hostaddr
        elif hostaddr is not None:
            made._ip, made.port = hostaddr[0], hostaddr[1]
        return made

    @property
    def address(self) -> IPAddress | None:
        """Its IP address; one that is IPv4 within IPv6 is given as IPv4."""
        if isinstance(self._ip, str):
            self._ip = ipaddress.ip_address(self._ip)
        return getattr(self._ip, "ipv4_mapped", None) or self._ip

    def __repr__(self) -> str:
        return f"Client({self.host!r}, {str(self._ip or self.path)!r}, {self.port})"


class Auth(NamedTuple):
    """Who has logged in, by SMTP AUTH.

    Attributes:
        name: the name that was given.
        mechanism: such as ``PLAIN``.
    """

    name: str
    mechanism: str


class TLS(NamedTuple):
    """The encryption of the connection.

    Attributes:
        version: such as ``TLSv1.3``.
        cipher: its name.
        bits: of the key, 0 where the MTA does not say.
    """

    version: str
    cipher: str
    bits: int


class Macros(Mapping[str, str]):
    """The macros that the MTA has sent so far.

    They are found with braces or without: ``macros["i"]``, ``macros["{client_ptr}"]``,
    ``macros["client_ptr"]``. Those that go through all of them see the ones that MTAs usually
    send and the ones that the filter asks for; `at` gives those of one stage.
    """

    __slots__ = ("_known", "_lookup")

    def __init__(
        self, lookup: Callable[[str], str | None] | None, known: Mapping[str, int] = USUAL_STAGES
    ) -> None:
        self._lookup = lookup
        self._known = known

    def __getitem__(self, name: str) -> str:
        if self._lookup is None:
            raise NotNow(f"macros[{name!r}]: {_OVER}")
        bare = name.strip("{}")
        value = self._lookup(bare if len(bare) == 1 else f"{{{bare}}}")
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._known if self.get(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def at(self, stage: str) -> dict[str, str]:
        """The macros that MTAs send at a stage, by name.

        Raises:
            ValueError: there is no such stage.
        """
        if stage not in _ORDER:
            raise ValueError(f"macros.at: stage must be one of {', '.join(STAGES)}: {stage!r}")
        return {name: self[name] for name in self if stage_of(self._known[name]) == stage}

    def __repr__(self) -> str:
        return f"Macros({dict(self)!r})" if self._lookup is not None else "<Macros, over>"


def stage_of(macro_stage: int) -> str:
    """The stage of a macro stage (M_*)."""
    name = CALLBACKS_OF_STAGES[macro_stage]
    return {"envfrom": "mail", "envrcpt": "rcpt", "eoh": "headers"}.get(name, name)


class Mail:
    """A message, with its envelope and all that is known of the client.

    What comes later than the stage at which a function runs, and what the filter has not asked
    for, raises `NotNow`; so does a change where nothing can be changed.

    Attributes:
        connection: a dict for the application, which the messages of a connection share.
        client: the SMTP client.
        helo: what the client calls itself; empty where it has not said so.
        macros: what the MTA has sent of itself and the session.
        recipient: the recipient that a function with ``at="rcpt"`` is asked about.
        truncated: whether the body is longer than ``max_body``, and what is here its beginning
            (``oversize="truncate"``).
    """

    # Most messages leave these as they are.
    macros: Macros = Macros(lambda name: None)
    recipient: Address | None = None
    truncated = False
    _at = _ORDER["eom"]
    _has_body = True
    _in_use = False  # a function has it in a thread beside the event loop
    _sender: Address | None = None
    _came_from: Address | None = None
    _headers: Headers | None = None
    _body: Body | None = None
    _parsed: tuple[object, EmailMessage] | None = None

    def __init__(
        self,
        client: Client | None = None,
        helo: str = "",
        connection: dict[Any, Any] | None = None,
        spool_at: int = SPOOL_AT,
    ) -> None:
        self.connection: dict[Any, Any] = {} if connection is None else connection
        self.client = client or Client()
        self.helo = helo
        self._gate = Gate()
        self._recipients = Recipients((), self._gate)
        self._pairs: list[tuple[bytes, bytes]] = []
        self._spool_at = spool_at
        self._spool = self._original = Spool(spool_at)
        self._time = time.time()

    # Making one.

    @classmethod
    def from_bytes(
        cls,
        message: bytes | Message,
        *,
        sender: AddressLike = "",
        recipients: Iterable[AddressLike] = (),
        client: Client | str | None = None,
        helo: str = "",
        macros: Mapping[str, str] | None = None,
        auth: Auth | None = None,
        tls: TLS | None = None,
        queue_id: str | None = None,
        connection: dict[Any, Any] | None = None,
    ) -> Mail:
        """Make a message for a test; nothing is asked or opened for it.

        Args:
            message: the message, with CRLF or LF at the end of lines, or an email message object.
            sender: the envelope sender.
            recipients: the envelope recipients.
            client: who sent it, or its IP address.
            helo: what the client calls itself.
            macros: the MTA's macros, by name, with braces or without.
            auth: who has logged in.
            tls: the encryption.
            queue_id: the MTA's name for the message.
            connection: what earlier messages of the connection have left.

        Raises:
            ValueError: an address is none.
        """
        if isinstance(client, str):
            client = Client(f"[{client}]", client)
        made = cls(client, helo, connection)
        whole = message if isinstance(message, bytes) else _whole.flattened(message)
        _, fields, body = split_message(whole)
        made._pairs = fields
        made._spool.write(with_crlf(body))
        made._sender = made._came_from = as_address(sender)
        for one in recipients:
            made._recipients._arrived(as_address(one))
        given = {name.strip("{}"): value for name, value in (macros or {}).items()}
        if auth is not None:
            given.update(auth_authen=auth.name, auth_type=auth.mechanism)
        if tls is not None:
            given.update(tls_version=tls.version, cipher=tls.cipher, cipher_bits=str(tls.bits))
        if queue_id is not None:
            given["i"] = queue_id
        known = {**{_braced(name): USUAL_STAGES["i"] for name in given}, **USUAL_STAGES}
        made.macros = Macros(lambda name: given.get(name.strip("{}")), known)
        return made

    def _copy(self, spool_at: int) -> Mail:
        """The message as it is now, for another go."""
        made = Mail(self.client, self.helo, self.connection, spool_at)
        made.macros, made._time, made._pairs = self.macros, self._time, self._pairs
        if self._headers is not None:
            made._pairs = [(one._name + one._wsp, one._value) for one in self._headers]
        made._sender = made._came_from = self._sender
        for one in self._recipients:
            made._recipients._arrived(one)
        for chunk in self._spool.chunks():
            made._spool.write(chunk)
        return made

    # The stages.

    def _open(self, stage: str) -> None:
        """A function runs: what is known by this stage can be read, at the last one changed."""
        self._at = _ORDER[stage]
        self._gate.why = None if stage == "eom" else _EARLY
        if self._body is not None:
            self._body.seek(0)

    def _shut(self) -> None:
        """The function has returned."""
        self._gate.why = _OVER

    def _discard(self) -> None:
        """Let go of all that takes room."""
        self._gate.why = _OVER
        self.macros = Macros(None)
        if self._in_use:
            return  # it reads on, and must not read from another file that has got the descriptor
        self._spool.close()
        self._original.close()
        self._parsed = None

    def _require(self, stage: str, what: str) -> None:
        if self._at < _ORDER[stage]:
            raise NotNow(
                f"mail.{what}: comes later than the function with at={STAGES[self._at]!r}; "
                f"it is known from {stage!r} on"
            )

    # What was known before the message.

    @property
    def auth(self) -> Auth | None:
        """Who has logged in (macros ``{auth_authen}``, ``{auth_type}``), None where nobody has."""
        name = self.macros.get("{auth_authen}")
        return Auth(name, self.macros.get("{auth_type}", "")) if name else None

    @property
    def tls(self) -> TLS | None:
        """The encryption (``{tls_version}``, ``{cipher}``, ``{cipher_bits}``), None without."""
        version = self.macros.get("{tls_version}")
        if not version:
            return None
        bits = self.macros.get("{cipher_bits}", "")
        return TLS(version, self.macros.get("{cipher}", ""), int(bits) if bits.isdigit() else 0)

    @property
    def queue_id(self) -> str | None:
        """The MTA's name for the message (macro ``i``), None where it has not given one yet.

        sendmail gives it with MAIL, Postfix with the first recipient that it accepts.
        """
        return self.macros.get("i") or None

    @property
    def received_at(self) -> datetime.datetime:
        """When MAIL came, in UTC."""
        return datetime.datetime.fromtimestamp(self._time, datetime.timezone.utc)

    # The envelope.

    @property
    def sender(self) -> Address:
        """The envelope sender; false where it is empty, as of a bounce.

        Setting it to a text changes the address and keeps the parameters (smfi_chgfrom); an
        `Address` with parameters has the MTA take these.
        """
        self._require("mail", "sender")
        return self._sender or Address("")

    @sender.setter
    def sender(self, sender: AddressLike) -> None:
        self._gate.check("mail.sender")
        made = as_address(sender)
        self._sender = made if made.params else Address(made.address, self._kept_params)

    @property
    def _kept_params(self) -> Params | None:
        return None if self._sender is None else self._sender.params

    @property
    def recipients(self) -> Recipients:
        """The recipients whom neither this filter nor, as far as it knows, the MTA has refused."""
        self._require("rcpt", "recipients")
        return self._recipients

    # The content.

    @property
    def headers(self) -> Headers:
        """The headers."""
        self._require("headers", "headers")
        if self._headers is None:
            self._headers = Headers(self._pairs, self._gate)
        return self._headers

    @property
    def body(self) -> Body:
        """The body: a binary file. Each function finds it at its beginning.

        Setting it to bytes, to a binary file (from where it stands) or to an iterable of bytes
        replaces it. That is read to its end at once; LF becomes CRLF, as SMTP has it.
        """
        self._require_body("body")
        if self._body is None:
            self._body = Body(self._spool)
        return self._body

    @body.setter
    def body(self, content: Content) -> None:
        self._gate.check("mail.body")
        self._require_body("body")
        if content is not None and content is self._body:
            return
        spool = spooled(content, self._spool_at)
        if self._spool is not self._original:
            self._spool.close()
        self._spool, self._body = spool, None

    def _require_body(self, what: str) -> None:
        self._require("eom", what)
        if not self._has_body:
            raise NotNow(f"mail.{what}: the filter was made with body=False")

    @property
    def size(self) -> int:
        """How many bytes the message has, headers included, as it is now."""
        self._require_body("size")
        return len(self.headers.as_bytes()) + 2 + self._spool.size

    def as_bytes(self) -> bytes:
        """The whole message as it is now, with CRLF at the end of lines."""
        self._require_body("as_bytes()")
        return b"".join((self.headers.as_bytes(), b"\r\n", *self._spool.chunks()))

    def open(self) -> Body:
        """The whole message as it is now, as a binary file, on disk where it is large."""
        self._require_body("open()")
        whole = Spool(self._spool_at)
        for chunk in self._chunks():
            whole.write(chunk)
        return Body(whole)

    def _chunks(self) -> Iterator[bytes]:
        yield self.headers.as_bytes() + b"\r\n"
        yield from self._spool.chunks(CHUNK)

    @property
    def message(self) -> EmailMessage:
        """The whole as an ``email.message.EmailMessage``, parsed when it is first asked for.

        It is the message as it is then. What is done to the object counts when it is assigned:
        ``mail.message = m`` takes over the headers and the body that differ and leaves all others
        byte for byte. Any ``email.message.Message`` will do, those of ``mime`` too.
        """
        self._require_body("message")
        now = (self._spool, self.headers.as_bytes())
        if self._parsed is None or self._parsed[0] != now:
            self._parsed = (now, _whole.parsed(io.BytesIO(self.as_bytes())))
        return self._parsed[1]

    @message.setter
    def message(self, message: Message) -> None:
        self._gate.check("mail.message")
        self._require_body("message")
        before = self.as_bytes()
        _whole.take_headers(self.headers, before, message)
        body = _whole.new_body(before, message)
        if body is not None:
            self.body = cast("Any", body)

    def __repr__(self) -> str:
        return f"<Mail from {str(self._sender or '')!r} to {[str(r) for r in self._recipients]!r}>"


def _braced(name: str) -> str:
    return name if len(name) == 1 else f"{{{name}}}"
