"""Delivery status notifications, and validation of a sender by calling its mail server back.

:func:`send_dsn` speaks SMTP with the mail servers (MX) of a sender's domain: with a message it
delivers a notification, without one it stops before DATA and so learns whether the sender's
address would be accepted. :func:`create_msg` makes the message from a template.

The servers are tried in order of preference (RFC 5321 section 5.1), or the domain's own addresses
where it has no MX, over IPv4 and IPv6. The next one is tried after a temporary failure; a permanent
refusal of the sender, the recipient or the message is final. The first digit of a reply decides.

STARTTLS is used where offered (RFC 3207): certificates are not verified, as usual between mail
servers, and where the handshake fails the server is tried again without. Addresses that are not
ASCII need a server with SMTPUTF8 (RFC 6531); a domain is converted (IDNA). Text that is not ASCII
is sent in a transfer encoding to a server without 8BITMIME, and long lines to any, with their own
bytes.

Send notifications only to envelope senders that are known not to be forged, and remember the
results of validations: both cost other people's servers work.

The domain's servers are found through :mod:`Milter.dns` (extra ``dns``), or any object with
its ``dns(name, qtype)`` method given as *session*.
"""

from __future__ import annotations

import email.message
import ipaddress
import queue
import random
import re
import smtplib
import socket
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Union

from Milter import _domains, _smtp_body
from Milter._dsn_template import Vars, create_msg
from Milter._smtp_client import Client, Limits, NoEncryption, remaining
from Milter.dns import DNSError, Session
from Milter.utils import dnsre, iniplist, ip4re, ip6re, parse_addr

__all__ = ["Vars", "create_msg", "send_dsn"]

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

    Args:
        mailfrom: the address to send to, or a list of addresses in one domain.
        receiver: the name of the host that we are, for HELO.
        msg: the message; None validates the address only (MAIL and RCPT, then QUIT).
        timeout: seconds that the whole call may take. A *session* that is no
            :class:`Milter.dns.Session` is asked without a limit.
        session: where to look up MX and addresses; a new :class:`Milter.dns.Session` by default.
        ourfrom: the envelope sender, null by default; where a message's null sender is refused,
            ``postmaster@receiver`` is tried.
        avoid: addresses never connected to, as patterns of :func:`Milter.utils.iniplist`;
            ``Milter.dsn.AVOID`` by default. ``()`` allows all, for a *session* that leads to a
            relay on this host, and for tests; private networks may be added.

    Returns:
        None where all was accepted; ``(code, text)`` for a refusal; for a list of addresses, those
        refused at RCPT as a dict ``{address: (code, text)}`` (the message went to the others). 450
        stands for trouble with DNS, no server that answers (or whose reply never ends), and out of
        time; 553 for a server that greets with our name or none, and for a domain all of whose
        servers are in *avoid*; 554 for a message that the servers cannot be sent in any form; 556
        for a domain that takes no mail (RFC 7505).

    Raises:
        ValueError: an address is empty, has no domain or cannot be sent in a command; domains
            differ.
        ImportError: *session* is needed and dnspython is not installed.
    """
    recipients = [mailfrom] if isinstance(mailfrom, str) else list(mailfrom)
    domain = _common_domain(recipients)
    if ourfrom.strip("<>"):
        _check_address(ourfrom, "ourfrom")
    delivery = _Delivery(recipients, receiver, msg, ourfrom)
    avoided = AVOID if avoid is None else [avoid] if isinstance(avoid, str) else list(avoid)
    deadline = time.monotonic() + timeout
    shown = _one_line(domain)
    try:
        servers = _servers(domain, session or Session(), deadline, avoided)
        answer = delivery.first_answer(servers, deadline)
    except DNSError as exc:
        return 450, f"DNS trouble: {_one_line(str(exc))}"
    except TimeoutError:
        return 450, f"mail servers of {shown}: out of time after {timeout:g} s"
    except _AllAvoided:
        return 553, f"5.4.4 no mail server of {shown} has an address to connect to"
    except _NullMX:
        return 556, f"5.1.10 {shown} accepts no mail (null MX)"
    if isinstance(mailfrom, str) and isinstance(answer, dict):
        return next(iter(answer.values()), None)
    return (450, f"no mail server of {shown} answers") if answer is None else answer or None


class _Refused(Exception):
    """A server's refusal; the final ones need no second opinion of another server."""

    def __init__(self, reply: Reply, final: bool | None = None) -> None:
        super().__init__(reply)
        self.reply = reply
        self.final = reply[0] >= 500 if final is None else final


class _NullMX(Exception):
    """The domain declares that it accepts no mail (RFC 7505)."""


class _AllAvoided(Exception):
    """The domain's servers are all where none is connected to."""


def _check_address(address: str, argument: str) -> None:
    """Refuse what could not be sent between angle brackets."""
    bare = address[1:-1] if address.startswith("<") and address.endswith(">") else address
    # Unicode has other forms of the characters that end an address, a wide ">" for example, and
    # who converts the domain turns them into those.
    if not all(map(_can_be_sent, (bare, unicodedata.normalize("NFKC", bare)))):
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
        domains.add(_ascii_domain(parts[1]).lower().rstrip("."))
    if len(domains) > 1:
        raise ValueError(f"mailfrom must be addresses in one domain, not in {sorted(domains)}")
    return domains.pop()


def _ascii_domain(domain: str) -> str:
    """Convert a domain to IDNA; one that has no such form stays as it is."""
    return domain if domain.isascii() else _domains.canonical(domain)


def _servers(
    domain: str, session: Resolver, deadline: float, avoid: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Find the mail servers of a domain: host name and IP address, the preferred ones first.

    Raises:
        _AllAvoided: there are servers, and all of them in *avoid*.
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
    left = remaining(deadline)
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
        return answer.get(timeout=remaining(deadline))
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

    def first_answer(
        self, servers: Iterable[tuple[str, str]], deadline: float
    ) -> Reply | dict[str, Reply] | None:
        """Talk to one server after the other, until one says something final.

        Returns what was refused to whom, or all of it; None where no server answers.
        """
        last: Reply | dict[str, Reply] | None = None
        for host, address in servers:
            try:
                refused = self.attempt(host, address, deadline)
            except _Refused as exc:
                last = exc.reply
                if exc.final:
                    return last
            except (smtplib.SMTPException, OSError):
                pass  # RFC 5321 section 5.1: the next one
            else:
                last = refused
                codes = [code for code, _ in refused.values()]
                if len(codes) < len(self._recipients) or any(code >= 500 for code in codes):
                    return last
            remaining(deadline)
        return last

    def attempt(self, host: str, address: str, deadline: float) -> dict[str, Reply]:
        """Talk to one server; returns the refused recipients.

        Raises:
            _Refused: it refused all of it.
            OSError: the connection failed; so does smtplib.SMTPException.
        """
        try:
            return self._dialogue(host, address, deadline, encrypt=True)
        except NoEncryption:
            return self._dialogue(host, address, deadline, encrypt=False)

    def _dialogue(
        self, host: str, address: str, deadline: float, *, encrypt: bool
    ) -> dict[str, Reply]:
        limits = Limits(CONNECT_TIMEOUT, QUIT_TIMEOUT, MAX_REPLY)
        smtp = Client(self._receiver, deadline, limits)
        try:
            self._greet(smtp, address)
            if encrypt and smtp.has_extn("starttls"):
                smtp.encrypt(host if dnsre.match(host) else address)
            return self._transaction(smtp)
        finally:
            smtp.leave()

    def _greet(self, smtp: Client, address: str) -> None:
        """Connect and say EHLO, or HELO where that is not understood."""
        code, banner = smtp.connect(address, PORT)
        if not _is_positive(code):
            raise _Refused(_reply(code, banner), final=False)
        name = next(iter(banner.decode("utf-8", "surrogateescape").split()), "").rstrip(".")
        if not name:
            raise _Refused((553, f"{address} greets with an empty banner"), final=True)
        if _domains.canonical(name) == _domains.canonical(self._receiver):
            shown = _one_line(name)
            raise _Refused((553, f"{address} greets as {shown}, which is ourselves"), final=True)
        if not _is_positive(smtp.ehlo()[0]):
            code, text = smtp.helo()
            if not _is_positive(code):
                raise _Refused(_reply(code, text), final=False)

    def _transaction(self, smtp: Client) -> dict[str, Reply]:
        self._mail(smtp)
        refused = {}
        for recipient in self._recipients:
            code, text = smtp.docmd(f"RCPT TO:{_path(recipient)}")
            if not _is_positive(code):
                refused[recipient] = _reply(code, text)
        if self._msg is not None and len(refused) < len(self._recipients):
            self._send(smtp, self._msg)
        return refused

    def _send(self, smtp: Client, msg: email.message.Message | str | bytes) -> None:
        """Send the message, in a form that the server takes."""
        try:
            data = _smtp_body.for_data(msg, smtp.has_extn("8bitmime"))
        except _smtp_body.Unsendable as exc:
            # Another server may take it as it is.
            raise _Refused((554, f"5.6.3 {_one_line(str(exc))}"), final=False) from exc
        code, text = smtp.message(data)
        if not _is_positive(code):
            raise _Refused(_reply(code, text))

    def _mail(self, smtp: Client) -> None:
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
        if not _is_positive(code):
            raise _Refused(_reply(code, text))


def _path(address: str) -> str:
    """Put an address in angle brackets, its domain in ASCII."""
    if address.startswith("<") and address.endswith(">"):
        address = address[1:-1]
    address = re.sub("^@[^:]*:", "", address)  # RFC 5321 appendix C: ignore source routes
    local, at, domain = address.rpartition("@")
    return f"<{local}{at}{_ascii_domain(domain)}>"


def _is_positive(code: int) -> bool:
    """Whether a reply says that what was asked is done: its first digit (RFC 5321 4.2.1)."""
    return code // 100 == 2


def _reply(code: int, text: bytes) -> Reply:
    """Make a server's reply presentable: text, on one line, nothing but printable characters.

    A dialogue out of step (a code below 400 where none can stand) counts as a failure for now.
    """
    return code if code >= 400 else 450, _one_line(text.decode("utf-8", "replace"))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
