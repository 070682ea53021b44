"""Delivery status notifications, and validation of a sender by calling its mail server back.

:func:`send_dsn` speaks SMTP with the mail servers (MX) of a sender's domain: with a message it
delivers a notification, without one it stops before DATA and so learns whether the sender's
address would be accepted. :func:`create_msg` makes the message from a template.

Send notifications only to envelope senders that are known not to be forged, and remember the
results of validations: both cost other people's servers work.

The domain's servers are found through :mod:`Milter.dns` (extra ``dns``), or any object with
its ``dns(name, qtype)`` method given as *session*.
"""

from __future__ import annotations

import email.message
import email.policy
import email.utils
import io
import ipaddress
import queue
import random
import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from email.header import Header
from typing import Any, Callable, Protocol, Union

from Milter.dns import DNSError, Session
from Milter.utils import dnsre, iniplist, ip4re, ip6re, parse_addr

__all__ = ["create_msg", "send_dsn"]

#: The TCP port of mail servers. Tests, and sites behind a relay, may set another.
PORT = 25

#: The longest that connecting to one address may take, in seconds.
CONNECT_TIMEOUT = 30.0

#: The longest wait for the answer to QUIT, when all that matters has been said, in seconds.
QUIT_TIMEOUT = 5.0

#: The most bytes that one reply may have, all its lines together. RFC 5321 section 4.5.3.1.5
#: allows 512 a line, and no server sends a hundred of them.
MAX_REPLY = 65536

#: Where no mail server of a stranger can be, as patterns of :func:`Milter.utils.iniplist`: this
#: host, the local link, multicast, and what is reserved. Whoever has a domain says which addresses
#: its servers have, and could have services of this host talked to. Private networks
#: (``10.0.0.0/8``, ``fc00::/7``…) are not here, since domains inside a site have their servers
#: there; a site that has none may add them.
AVOID: Sequence[str] = (
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/3",
    "::/96",
    "fe80::/10",
    "ff00::/8",
)

#: An SMTP reply: code, and text on one line.
Reply = tuple[int, str]
#: What :func:`send_dsn` returns: None for success.
Result = Union[None, Reply, dict[str, Reply]]


class Resolver(Protocol):
    """What :func:`send_dsn` needs of a DNS session."""

    def dns(self, name: str, qtype: str) -> Sequence[Any]:
        """Return the data of a name's records; raise :class:`Milter.dns.DNSError`."""


# --- sending -------------------------------------------------------------------------------


def send_dsn(
    mailfrom: str | Sequence[str],
    receiver: str,
    msg: email.message.Message | str | bytes | None = None,
    timeout: float = 600,
    session: Resolver | None = None,
    ourfrom: str = "",
    *,
    avoid: Iterable[str] | None = None,
) -> Result:
    """Send a message to an envelope sender, or ask its server whether it would be accepted.

    The mail servers of the sender's domain are tried in order of preference (RFC 5321
    section 5.1), or the domain's own addresses where it has no MX, over IPv4 and IPv6. The next one
    is tried after a temporary failure; a permanent refusal of the sender, the recipient or
    the message is final.

    STARTTLS is used where offered (RFC 3207): certificates are not verified, as usual between
    mail servers, and where the handshake fails the server is tried again without. Addresses
    that are not ASCII need a server with SMTPUTF8 (RFC 6531); a domain is converted (IDNA).

    :param mailfrom: the address to send to, or a list of addresses in one domain
    :param receiver: the name of the host that we are, for HELO
    :param msg: the message; None validates the address only (MAIL and RCPT, then QUIT)
    :param timeout: seconds that the whole call may take. A *session* that is no
        :class:`Milter.dns.Session` is asked without a limit
    :param session: where to look up MX and addresses; a new :class:`Milter.dns.Session` by
        default
    :param ourfrom: the envelope sender, null by default; where a message's null sender
        is refused, ``postmaster@receiver`` is tried
    :param avoid: addresses never connected to, as patterns of :func:`Milter.utils.iniplist`;
        ``Milter.dsn.AVOID`` by default: this host, its link, multicast and what is reserved, to
        which a stranger's domain may lead as well as to anywhere else. ``()`` allows them, for a
        *session* that leads to a relay on this host, and for tests; private networks may be added
    :returns: None where all was accepted; ``(code, text)`` for a refusal; for a
        list of addresses, those refused at RCPT as a dict ``{address: (code, text)}`` (the
        message went to the others). 450 stands for trouble with DNS, no server that
        answers (or whose reply never ends), and out of time; 553 for a server that greets
        with our name or none, and for a domain all of whose servers are in *avoid*; 556 for
        a domain that takes no mail (RFC 7505)
    :raises ValueError: an address is empty, has no domain or cannot be sent in a command;
        domains differ
    :raises ImportError: *session* is needed and dnspython is not installed
    """
    recipients = [mailfrom] if isinstance(mailfrom, str) else list(mailfrom)
    domain = _common_domain(recipients)
    shown = _one_line(domain)
    if ourfrom.strip("<>"):
        _check_address(ourfrom, "ourfrom")
    delivery = _Delivery(recipients, receiver, msg, ourfrom)
    avoided = AVOID if avoid is None else [avoid] if isinstance(avoid, str) else list(avoid)
    deadline = time.monotonic() + timeout
    failure: Result = (450, f"no mail server of {shown} answers")
    try:
        for host, address in _servers(domain, session or Session(), deadline, avoided):
            try:
                refused = delivery.attempt(host, address, deadline)
            except _Refused as exc:
                failure = exc.reply
                if exc.final:
                    return failure
            except (smtplib.SMTPException, OSError):
                pass  # RFC 5321 section 5.1: the next one
            else:
                answer = next(iter(refused.values()), None)
                result: Result = answer if isinstance(mailfrom, str) else refused or None
                if len(refused) < len(recipients) or any(c >= 500 for c, _ in refused.values()):
                    return result
                failure = result
            _remaining(deadline)
    except DNSError as exc:
        return 450, f"DNS trouble: {_one_line(str(exc))}"
    except TimeoutError:
        return 450, f"mail servers of {shown}: out of time after {timeout:g} s"
    except _AllAvoided:
        return 553, f"5.4.4 no mail server of {shown} has an address to connect to"
    except _NullMX:
        return 556, f"5.1.10 {shown} accepts no mail (null MX)"
    return failure


class _Refused(Exception):
    """A server's refusal; the final ones need no second opinion of another server."""

    def __init__(self, reply: Reply, final: bool | None = None) -> None:
        super().__init__(reply)
        self.reply = reply
        self.final = reply[0] >= 500 if final is None else final


class _NoEncryption(Exception):
    """STARTTLS was accepted and the handshake failed."""


class _NullMX(Exception):
    """The domain declares that it accepts no mail (RFC 7505)."""


class _AllAvoided(Exception):
    """The domain's servers are all where none is connected to."""


def _remaining(deadline: float) -> float:
    """Return the seconds left.

    :raises TimeoutError: none are
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    return left


def _check_address(address: str, argument: str) -> None:
    """Refuse what could not be sent between angle brackets."""
    bare = address[1:-1] if address.startswith("<") and address.endswith(">") else address
    # IDNA has other forms of the characters that end an address, a wide ">" for example, and
    # turns them into those: what is sent counts as much as what was given.
    if not all(map(_can_be_sent, (bare, _path(address)[1:-1]))):
        raise ValueError(f"{argument}: {address!r} must be an e-mail address")
    try:
        bare.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{argument}: {address!r} must be ASCII or valid Unicode") from exc


def _can_be_sent(bare: str) -> bool:
    """Whether an address ends where its last character is, for every server.

    Control characters are not allowed in quotes either (RFC 5321 section 4.1.2), and a domain has
    no quotes.
    """
    unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', '"', bare)
    _, at, domain = unquoted.rpartition("@")
    if at and '"' in domain:
        return False
    controls = re.search(r"[\x00-\x1f\x7f-\x9f]", bare)
    return bool(bare) and not controls and not re.search("[ <>]", unquoted)


def _common_domain(addresses: Sequence[str]) -> str:
    """Return the domain of all addresses, as DNS has it."""
    if not addresses:
        raise ValueError("mailfrom must name at least one address")
    domains = set()
    for address in addresses:
        _check_address(address, "mailfrom")
        parts = parse_addr(address)
        if len(parts) < 2 or not parts[1] or '"' in parts[1]:
            raise ValueError(f"mailfrom: {address!r} must have a domain")
        domains.add(_ascii_domain(parts[1]).lower())
    if len(domains) > 1:
        raise ValueError(f"mailfrom must be addresses in one domain, not in {sorted(domains)}")
    return domains.pop()


def _ascii_domain(domain: str) -> str:
    """Convert a domain to IDNA; one that has no such form stays as it is."""
    if domain.isascii() or len(domain) > 255:
        return domain
    try:
        return domain.encode("idna").decode()
    except UnicodeError:
        return domain


def _servers(
    domain: str, session: Resolver, deadline: float, avoid: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Find the mail servers of a domain: host name and IP address, the preferred ones first.

    :raises _AllAvoided: there are servers, and all of them in *avoid*
    """
    usable = avoided = unknown = False
    for host in _exchanges(domain, session, deadline):
        try:
            addresses = _addresses(host, session, deadline)
        except DNSError:
            unknown = True
            continue  # the others may still be found
        for address in addresses:
            if _covers(avoid, address):
                avoided = True
            else:
                usable = True
                yield host, address
    if avoided and not usable and not unknown:
        raise _AllAvoided


def _exchanges(domain: str, session: Resolver, deadline: float) -> list[str]:
    """Return the hosts that take a domain's mail, the preferred ones first."""
    if _address_literal(domain):
        return [domain]
    exchanges = _ask(session, domain, "MX", deadline)
    hosts = [(preference, str(host).rstrip(".")) for preference, host in exchanges]
    if hosts and not any(host for _, host in hosts):
        raise _NullMX
    random.shuffle(hosts)  # equal preferences share the load
    hosts.sort(key=lambda mx: mx[0])
    return [host for _, host in hosts if host] or [domain]


def _covers(avoid: Sequence[str], address: str) -> bool:
    """Whether an address is to be avoided; so is what is none, as nobody knows where it leads."""
    if not avoid:
        return False
    address = address.partition("%")[0]
    known = ip4re.match(address) or ip6re.match(address)
    return not known or iniplist(address, avoid)


def _address_literal(domain: str) -> str | None:
    """Return the address in ``[192.0.2.1]``, ``[IPv6:2001:db8::1]`` or a bare address."""
    text = domain.strip("[]")
    if text.lower().startswith("ipv6:"):
        text = text[5:]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _addresses(host: str, session: Resolver, deadline: float) -> list[str]:
    """Return the IP addresses of a mail server, from DNS or else from the system."""
    literal = _address_literal(host)
    if literal:
        return [literal]
    found = [a for a in _ask(session, host, "A", deadline) if isinstance(a, str)]
    for packed in _ask(session, host, "AAAA", deadline):
        if isinstance(packed, bytes) and len(packed) == 16:
            found.append(str(ipaddress.IPv6Address(packed)))
    return found or _system_addresses(host, deadline)


def _ask(session: Resolver, name: str, qtype: str, deadline: float) -> Sequence[Any]:
    """Look something up within the time left."""
    left = _remaining(deadline)
    if isinstance(session, Session):
        return session.dns(name, qtype, timeout=min(left, session.timeout))
    return session.dns(name, qtype)


def _system_addresses(host: str, deadline: float) -> list[str]:
    """Ask the system, for hosts in ``/etc/hosts``; in a thread, since nothing else bounds it."""
    answer: queue.Queue[list[str]] = queue.Queue()

    def look_up() -> None:
        answer.put(_system_lookup(host))

    threading.Thread(target=look_up, name=f"look up {host}", daemon=True).start()
    try:
        return answer.get(timeout=_remaining(deadline))
    except queue.Empty:
        raise TimeoutError(f"looking up {host}") from None


def _system_lookup(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(info[4][0]) for info in found]


class _Delivery:
    """One message, or one question, and the dialogue that brings it to a server."""

    def __init__(
        self,
        recipients: Sequence[str],
        receiver: str,
        msg: email.message.Message | str | bytes | None,
        ourfrom: str,
    ) -> None:
        self._recipients = recipients
        self._receiver = receiver
        self._msg = msg
        self._sender = _path(ourfrom)

    def attempt(self, host: str, address: str, deadline: float) -> dict[str, Reply]:
        """Talk to one server; returns the refused recipients.

        :raises _Refused: it refused all of it
        :raises OSError: the connection failed; so does smtplib.SMTPException
        """
        try:
            return self._dialogue(host, address, deadline, encrypt=True)
        except _NoEncryption:
            return self._dialogue(host, address, deadline, encrypt=False)

    def _dialogue(
        self, host: str, address: str, deadline: float, *, encrypt: bool
    ) -> dict[str, Reply]:
        smtp = _Client(self._receiver, deadline)
        try:
            self._greet(smtp, address)
            if encrypt and smtp.has_extn("starttls"):
                smtp.encrypt(host if dnsre.match(host) else address)
            return self._transaction(smtp)
        finally:
            smtp.leave()

    def _greet(self, smtp: _Client, address: str) -> None:
        """Connect and say EHLO, or HELO where that is not understood."""
        code, banner = smtp.connect(address, PORT)
        if code != 220:
            raise _Refused(_reply(code, banner), final=False)
        name = next(iter(banner.decode("latin-1").split()), "").rstrip(".")
        if not name:
            raise _Refused((553, f"{address} greets with an empty banner"), final=True)
        if name.lower() == self._receiver.rstrip(".").lower():
            raise _Refused((553, f"{address} greets as {name}, which is ourselves"), final=True)
        if smtp.ehlo()[0] != 250:
            code, text = smtp.helo()
            if code != 250:
                raise _Refused(_reply(code, text), final=False)

    def _transaction(self, smtp: _Client) -> dict[str, Reply]:
        self._mail(smtp)
        refused = {}
        for recipient in self._recipients:
            code, text = smtp.docmd(f"RCPT TO:{_path(recipient)}")
            if code not in (250, 251):
                refused[recipient] = _reply(code, text)
        if self._msg is not None and len(refused) < len(self._recipients):
            try:
                code, text = smtp.data(_wire_form(self._msg, smtp.has_extn("8bitmime")))
            except smtplib.SMTPDataError as exc:
                # The message itself was not asked for.
                code, text = exc.smtp_code, _as_bytes(exc.smtp_error)
            if code != 250:
                raise _Refused(_reply(code, text))
        return refused

    def _mail(self, smtp: _Client) -> None:
        """Give the envelope sender; ours where a message's null one is refused."""
        options = ""
        if not all(_path(a).isascii() for a in (self._sender, *self._recipients)):
            if not smtp.has_extn("smtputf8"):
                raise _Refused((553, "5.6.7 the server does not offer SMTPUTF8"), final=False)
            smtp.command_encoding = "utf-8"
            options = " SMTPUTF8"
        if self._msg is not None and smtp.has_extn("8bitmime"):
            options += " BODY=8BITMIME"
        code, text = smtp.docmd(f"MAIL FROM:{self._sender}{options}")
        if code >= 500 and self._sender == "<>" and self._msg is not None:
            smtp.rset()
            code, text = smtp.docmd(f"MAIL FROM:<postmaster@{self._receiver}>{options}")
        if code != 250:
            raise _Refused(_reply(code, text))


def _path(address: str) -> str:
    """Put an address in angle brackets, its domain in ASCII."""
    if address.startswith("<") and address.endswith(">"):
        address = address[1:-1]
    address = re.sub("^@[^:]*:", "", address)  # RFC 5321 appendix C: ignore source routes
    local, at, domain = address.rpartition("@")
    return f"<{local}{at}{_ascii_domain(domain)}>"


def _reply(code: int, text: bytes) -> Reply:
    """Make a server's reply presentable: text, on one line, nothing but printable characters.

    A dialogue out of step (a code below 400 where none can stand) counts as a failure for now.
    """
    return code if code >= 400 else 450, _one_line(text.decode("utf-8", "replace"))


def _as_bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _wire_form(msg: email.message.Message | str | bytes, eight_bit: bool) -> bytes:
    """Write a message as DATA wants it: line ends CRLF and nothing else."""
    if isinstance(msg, email.message.Message):
        policy = msg.policy.clone(linesep="\r\n", cte_type="8bit" if eight_bit else "7bit")
        data = msg.as_bytes(policy=policy)
    elif isinstance(msg, str):
        data = msg.encode("utf-8", "surrogateescape")
    else:
        data = msg
    # A lone CR or LF might end the message early in the eyes of some servers.
    return re.sub(rb"\r\n|\r|\n", b"\r\n", data)


class _Client(smtplib.SMTP):
    """smtplib's client, every step of which ends at the deadline, and every reply at its size.

    A socket's time-out restarts with each byte that arrives, so it alone does not bound a
    reply; here it is set anew before each read. And smtplib collects the lines of a reply for as
    long as they come.
    """

    def __init__(self, local_hostname: str, deadline: float) -> None:
        self._deadline = deadline
        self._reply_size = 0
        super().__init__(local_hostname=local_hostname, timeout=CONNECT_TIMEOUT)

    def connect(
        self, host: str = "", port: int = 0, source_address: Any = None
    ) -> tuple[int, bytes]:
        self.timeout = min(CONNECT_TIMEOUT, _remaining(self._deadline))
        return super().connect(host, port)

    def getreply(self) -> tuple[int, bytes]:
        if self.file is None and self.sock is not None:
            self.file = io.BufferedReader(_ReplyReader(self._receive))
        self._reply_size = 0
        return super().getreply()

    def _receive(self, buffer: Any) -> int:
        """Read what has come of a reply, before the deadline; OSError where it is too long."""
        assert self.sock is not None
        if self._reply_size > MAX_REPLY:
            raise OSError(f"a reply of more than {MAX_REPLY} bytes")
        self.sock.settimeout(_remaining(self._deadline))
        size = self.sock.recv_into(buffer)
        self._reply_size += size
        return size

    def send(self, s: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(_remaining(self._deadline))
        super().send(s)

    def encrypt(self, host: str) -> None:
        """Switch to TLS and greet again; a server that changed its mind is left as it is.

        :raises _NoEncryption: the handshake failed
        """
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._host = host  # the name for SNI, which smtplib takes from here
        try:
            self.starttls(context=context)
        except smtplib.SMTPResponseException:
            return
        except ssl.SSLError as exc:
            raise _NoEncryption from exc
        self.ehlo()

    def leave(self) -> None:
        """Say QUIT; whatever becomes of it, the matter is settled."""
        self._deadline = min(self._deadline, time.monotonic() + QUIT_TIMEOUT)
        try:
            if self.sock is not None:
                self.docmd("QUIT")
        except (smtplib.SMTPException, OSError):
            pass
        finally:
            self.close()


class _ReplyReader(io.RawIOBase):
    """Makes a file for smtplib to read from."""

    def __init__(self, receive: Callable[[Any], int]) -> None:
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._receive(buffer)


# --- the message ---------------------------------------------------------------------------


def create_msg(
    v: object,
    rcptlist: Iterable[str] | None = None,
    origmsg: email.message.Message | None = None,
    template: str | None = None,
) -> email.message.Message | None:
    r"""Make a notification from a template.

    The template is header lines, an empty line and a body. ``%(name)s`` in any of them stands
    for the attribute *name* of *v*, ``%%`` for a percent sign. To (the sender), From
    (``postmaster@receiver``) and ``Auto-Submitted: auto-generated`` (RFC 3834) are added
    where the template lacks them, and what makes it a message of its own: Date, Message-ID,
    MIME-Version, Content-Type.

    A value cannot add header lines: line ends and other control characters in it become
    spaces in a header, and in the body of a multipart template, whose parts have headers too.

    :param v: has the attributes, ``sender`` and ``receiver`` at least: the application's own
        object or an SPF query object, whose ``h s i r o result perm_error`` are ``heloname
        sender connectip receiver sender_domain result perm_error``
    :param rcptlist: the recipients of the original message: ``%(rcpt)s``, one a line
    :param origmsg: the original message: gives ``%(subject)s`` and ``%(spf_result)s`` (its
        Received-SPF header)
    :param template: the template; without one there is no message
    :returns: the message, or None without a template
    :raises KeyError: the template names what *v* does not have
    :raises ValueError: the template has a header line without a colon

    >>> class Envelope:
    ...     sender, receiver = "joe@example.com", "mail.example.org"
    >>> msg = create_msg(Envelope, template="Subject: Hello %(sender)s\n\nFrom %(receiver)s")
    >>> msg["Subject"], msg["From"], msg.get_payload()
    ('Hello joe@example.com', 'postmaster@mail.example.org', 'From mail.example.org')
    """
    if template is None:
        return None
    values = _Values(v, rcptlist, origmsg)
    head, _, body = f"\n{template}".replace("\r\n", "\n").partition("\n\n")
    msg = email.message.Message()
    values.clean = _header_text
    for line in filter(None, re.sub(r"\n[ \t]+", " ", head).split("\n")):
        name, colon, value = line.partition(":")
        if not re.fullmatch("[!-9;-~]+", name) or not colon:
            raise ValueError(f"template: {line!r} must be a header line, 'Name: value'")
        _set_header(msg, name, value.strip() % values)
    for name, default in {
        "To": values["sender"],
        "From": f"postmaster@{values['receiver']}",
        "Auto-Submitted": "auto-generated",
        "Date": email.utils.formatdate(),
        "Message-ID": email.utils.make_msgid(domain=_ascii_domain(str(values["receiver"]))),
        "MIME-Version": "1.0",
        "Content-Type": "text/plain",
    }.items():
        if name not in msg:
            _set_header(msg, name, str(default))
    values.clean = _header_text if msg.get_content_maintype() == "multipart" else str
    _set_body(msg, body % values)
    return msg


class _Values:
    """The values that a template can name; text goes through ``clean``."""

    #: What an SPF query object calls them.
    _SPF = {  # noqa: RUF012 - never changed
        "heloname": "h",
        "sender": "s",
        "connectip": "i",
        "receiver": "r",
        "sender_domain": "o",
    }

    def __init__(
        self,
        v: object,
        rcptlist: Iterable[str] | None,
        origmsg: email.message.Message | None,
    ) -> None:
        self.clean: Callable[[str], str] = str
        self._v = v
        self._own: dict[str, Any] = {}
        if rcptlist is not None:
            self._own["rcpt"] = "\n\t".join(rcptlist)
        if origmsg is not None:
            self._own["subject"] = origmsg["Subject"]
            self._own["spf_result"] = origmsg["Received-SPF"]

    def __getitem__(self, name: str) -> Any:
        value = self._find(name)
        if value is None:
            return ""
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        return value if isinstance(value, (int, float)) else self.clean(str(value))

    def _find(self, name: str) -> Any:
        if name in self._own:
            return self._own[name]
        for attribute in (name, self._SPF.get(name, name)):
            if hasattr(self._v, attribute):
                return getattr(self._v, attribute)
        raise KeyError(f"template: %({name})s names no attribute of v: {self._v!r}")


def _header_text(text: str) -> str:
    """Leave nothing in a value that any parser could take for the end of a line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+[ \t]*", " ", text)


_ADDRESS_HEADERS = frozenset(["to", "from", "cc", "sender", "reply-to", "errors-to"])


def _set_header(msg: email.message.Message, name: str, value: str) -> None:
    """Add a header; text other than ASCII is encoded (RFC 2047), in addresses only the names."""
    if value.isascii():
        msg[name] = value
        return
    if name.lower() in _ADDRESS_HEADERS:
        full, address = email.utils.parseaddr(value)
        if address and address.isascii():
            msg[name] = email.utils.formataddr((_clean(full), address))
        else:
            # An address has no encoded form: raw UTF-8, for a server that knows SMTPUTF8.
            raw = value.encode("utf-8", "surrogateescape")
            msg[name] = raw.decode("ascii", "surrogateescape")
    else:
        msg[name] = Header(_clean(value), "utf-8", header_name=name).encode()


def _clean(text: str) -> str:
    """Replace the lone surrogates that stand for bytes which are no UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _set_body(msg: email.message.Message, body: str) -> None:
    """Set the body; text other than ASCII names its charset."""
    if msg.get_content_maintype() == "multipart":
        _set_parts(msg, body)
    elif body.isascii():
        msg.set_payload(body)
    else:
        charset = msg.get_content_charset() or "utf-8"
        try:
            body.encode(charset)
        except (LookupError, UnicodeError):
            charset, body = "utf-8", _clean(body)
        del msg["Content-Transfer-Encoding"], msg["MIME-Version"]
        msg.set_payload(body, charset)  # which puts both back


def _set_parts(msg: email.message.Message, body: str) -> None:
    """Set the parts of a multipart template."""
    head = f"Content-Type: {msg['Content-Type']}\n\n".encode()
    parts = email.message_from_bytes(head + body.encode("utf-8", "surrogateescape"))
    msg.set_payload(parts.get_payload())
    msg.preamble, msg.epilogue = parts.preamble, parts.epilogue
