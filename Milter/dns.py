"""DNS look-ups with a cache that lives as long as a message is looked at.

Needs dnspython, which the extra ``dns`` installs (``pip install 'pymilter[dns]'``); it is
imported at the first look-up. Importing this module asks no server.

By default the servers of ``/etc/resolv.conf`` are asked, each session reading it anew;
``Session(servers=[("127.0.0.1", 5353)])`` asks others.
"""

from __future__ import annotations

import ipaddress
import re
import struct
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Union

from ._extras import unusable

if TYPE_CHECKING:
    import dns.rdata
    import dns.resolver

__all__ = ["MAX_CACHED", "MAX_CNAME", "DNSError", "DNSLookup", "Session"]

#: The longest chain of CNAME records that is followed.
MAX_CNAME = 10

#: How many answers a session remembers; whose servers answer, strangers choose.
MAX_CACHED = 1000

#: How long one look-up may take in seconds, all servers and repetitions included.
TIMEOUT = 20.0

#: A record's data: dotted text (A), 16 bytes (AAAA), ``(preference, host)`` (MX), a tuple of
#: bytes (TXT, SPF), text (all others).
Data = Union[str, bytes, "tuple[int, str]", "tuple[bytes, ...]"]
#: A record: ``((owner name, type), data)``.
Record = tuple[tuple[str, str], Data]
#: A server to ask: its address, or its address and port.
Server = Union[str, "tuple[str, int]"]


class DNSError(Exception):
    """A question that got no usable answer: a time-out, a server failure, a loop of aliases."""


def DNSLookup(
    name: str, qtype: str, resolver: dns.resolver.Resolver | None = None, timeout: float = TIMEOUT
) -> list[Record]:
    """Ask the name servers one question and return every record of the answer.

    Answers that do not fit a datagram are asked for again over TCP; a server that fails or
    does not answer is followed by the next.

    Args:
        name: the domain name; one that is not ASCII is converted (IDNA).
        qtype: the record type, ``"MX"`` for example.
        resolver: a dnspython resolver; by default one made from ``/etc/resolv.conf``.
        timeout: seconds that the whole look-up may take.

    Returns:
        The records of the answer and additional sections; empty for a name that does not exist, has
        no such record, or cannot exist (an empty or over-long label).

    Raises:
        DNSError: no server gave an answer in time.
        ValueError: *qtype* is no record type.
        ImportError: dnspython is not installed.
    """
    _require_dnspython()
    import dns.exception
    import dns.rdataclass
    import dns.resolver

    rdtype = _record_type(qtype)
    query = _query_name(name)
    if query is None:
        return []
    try:
        if resolver is None:
            resolver = dns.resolver.Resolver()
        answer = resolver.resolve(
            query, rdtype, raise_on_no_answer=False, search=False, lifetime=max(timeout, 0.001)
        )
    except dns.resolver.NXDOMAIN:
        return []
    except (dns.exception.DNSException, OSError) as exc:
        raise DNSError(f"{qtype} {name!r}: {exc}") from exc
    return [
        ((_host(rrset.name), dns.rdatatype.to_text(rrset.rdtype)), _data(rdata))
        for section in (answer.response.answer, answer.response.additional)
        for rrset in section
        # In another class the same type may hold anything.
        if rrset.rdclass == dns.rdataclass.IN
        for rdata in rrset
    ]


def _require_dnspython() -> None:
    """Import dnspython, or say how to get it."""
    try:
        import dns.resolver  # noqa: F401 - only whether it can be imported
    except ImportError as exc:
        raise unusable("Milter.dns", "dnspython", "dns", exc) from exc


def _record_type(qtype: str) -> dns.rdatatype.RdataType:
    """Return dnspython's number for a record type that a filter may ask for."""
    import dns.exception
    import dns.rdatatype

    try:
        rdtype = dns.rdatatype.from_text(qtype)
    except (dns.exception.DNSException, ValueError) as exc:
        raise ValueError(f"qtype must be a DNS record type, not {qtype!r}") from exc
    if dns.rdatatype.is_metatype(rdtype):
        raise ValueError(f"qtype must be a type that records have, not {qtype!r}")
    return rdtype


def _query_name(name: str) -> dns.name.Name | None:
    """Make a name to ask for; None where no such name can exist."""
    import dns.exception
    import dns.name

    # Converting to IDNA takes time in the square of the length; 253 characters and their
    # escapes (\DDD) always fit.
    if not name.strip(".") or len(name) > 4 * 253:
        return None
    try:
        return dns.name.from_text(name)
    except (dns.exception.DNSException, UnicodeError, IndexError, struct.error):
        return None


def _host(name: dns.name.Name) -> str:
    """Write a domain name without its final dot."""
    return name.to_text(omit_final_dot=True)


def _data(rdata: dns.rdata.Rdata) -> Data:
    """Return a record's data in the form that the module promises."""
    import dns.rdatatype
    from dns.rdtypes.ANY import MX, URI
    from dns.rdtypes.mxbase import MXBase
    from dns.rdtypes.nsbase import NSBase
    from dns.rdtypes.txtbase import TXTBase

    if isinstance(rdata, (MX.MX, MXBase)):
        return rdata.preference, _host(rdata.exchange)
    if isinstance(rdata, TXTBase):
        return tuple(rdata.strings)
    if isinstance(rdata, NSBase):  # CNAME, DNAME, NS and PTR share it
        return _host(rdata.target)
    if isinstance(rdata, URI.URI):
        # Each version of dnspython has a form of its own, and none had some of these texts.
        return f"{rdata.priority} {rdata.weight} {_quoted(rdata.target)}"
    try:
        text = rdata.to_text()
    except Exception:  # noqa: BLE001 - dnspython promises none
        return rdata.to_generic().to_text()  # RFC 3597, 5: \# length hexadecimal
    if rdata.rdtype == dns.rdatatype.AAAA:
        return ipaddress.IPv6Address(text).packed
    return text


def _quoted(data: bytes) -> str:
    """Write a character-string as zone files do (RFC 1035 section 5.1)."""
    special = re.compile(rb'(["\\])|[^ -~]')
    text = special.sub(lambda m: b"\\" + (m[1] or b"%03d" % ord(m[0])), data)
    return f'"{text.decode("ascii")}"'


_own_lookup = DNSLookup


class Session:
    """Look-ups that remember their answers; make one for each message.

    Args:
        resolver: a dnspython resolver to ask through.
        servers: name servers to ask instead of those in ``/etc/resolv.conf``: IP addresses, or
            pairs of address and port.
        timeout: seconds that one look-up may take.

    Raises:
        ValueError: both *resolver* and *servers*, or a server that is no address and port.
    """

    #: Which records of an answer are believed beyond the question, as pairs of the type
    #: asked for and the type that may be kept.  Of the host addresses that come along, those of
    #: hosts that the answer names, and inside the domain asked for, are kept: nobody but its own
    #: servers can have made them up.
    SAFE2CACHE: ClassVar[frozenset[tuple[str, str]]] = frozenset(
        [(t, t) for t in ("A", "AAAA", "CNAME", "MX", "NS", "PTR", "SPF", "TXT")]
        + [(t, t) for t in ("CAA", "SOA", "SRV", "TLSA")]
        + [(t, host) for t in ("CNAME", "MX", "NS") for host in ("A", "AAAA")]
    )

    def __init__(
        self,
        resolver: dns.resolver.Resolver | None = None,
        *,
        servers: Iterable[Server] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        if resolver is not None and servers is not None:
            raise ValueError("give resolver or servers, not both")
        #: Answers: ``(name in lower case without final dot, type)`` to the list of data.
        self.cache: dict[tuple[str, str], list[Data]] = {}
        #: Seconds that one look-up may take.
        self.timeout = timeout
        self._resolver = resolver
        self._servers = None if servers is None else [_server(server) for server in servers]
        if self._servers is not None and len(dict(self._servers)) != len(self._servers):
            raise ValueError(f"servers: an address stands there twice: {self._servers!r}")

    def dns(
        self,
        name: str,
        qtype: str,
        cnames: Iterable[str] | None = None,
        timeout: float | None = None,
    ) -> list[Data]:
        """Return the data of all records of a type that a name has.

        CNAME records are followed, at most :data:`MAX_CNAME` of them.

        Args:
            name: the domain name.
            qtype: the record type, ``"A"`` for example.
            cnames: names already gone through on the way to *name*, to recognise a loop.
            timeout: seconds that this call may take; :attr:`timeout` by default.

        Returns:
            A new list: dotted text (A), 16 bytes (AAAA), ``(preference, host)`` (MX), a tuple of
            bytes (TXT, SPF), text (all others); empty where the name does not exist, has no such
            record, or cannot exist.

        Raises:
            DNSError: no server answered in time, or aliases form a loop or too long a chain.
            ValueError: *qtype* is no record type.
            ImportError: dnspython is not installed.
        """
        owner = name.lower().rstrip(".")
        qtype = qtype.upper()
        if not owner.isascii():
            _require_dnspython()
            query = _query_name(owner)
            if query is None:
                return []
            owner = _host(query).lower()
        known = self.cache.get((owner, qtype))
        if known is None:
            known = self._ask(owner, qtype, [*(cnames or ()), owner], timeout)
            if (qtype, qtype) in self.SAFE2CACHE:
                self.cache[owner, qtype] = known
                while len(self.cache) > MAX_CACHED:
                    del self.cache[next(iter(self.cache))]
        return list(known)

    def dns_txt(self, domainname: str, enc: str | None = "ascii") -> list[str]:
        """Return the TXT records of a name, the strings of each joined.

        Args:
            domainname: the domain name.
            enc: the encoding; bytes it does not have become lone surrogates, as in all text from
                the network here, and ``text.encode(enc, "surrogateescape")`` is the original.

        Raises:
            DNSError: as for :meth:`dns`.
        """
        return [
            b"".join(s for s in strings if isinstance(s, bytes)).decode(
                enc or "ascii", "surrogateescape"
            )
            for strings in self.dns(domainname, "TXT")
            if isinstance(strings, tuple)
        ]

    def _ask(self, owner: str, qtype: str, chain: list[str], timeout: float | None) -> list[Data]:
        """Ask for a name, and for what its aliases lead to."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        found: dict[tuple[str, str], list[Data]] = {}
        for (name, rtype), data in self._lookup(owner, qtype, deadline - time.monotonic()):
            found.setdefault((name.lower().rstrip("."), rtype.upper()), []).append(data)
        self._keep_hosts(owner, qtype, found)
        end = owner
        while not (answer := found.get((end, qtype))):
            alias = found.get((end, "CNAME"))
            if not alias:
                if end == owner:
                    return []
                # The server left the rest of the way to us.
                return self.dns(end, qtype, chain[:-1], max(deadline - time.monotonic(), 0))
            end = str(alias[0]).lower().rstrip(".")
            if end in chain:
                raise DNSError(
                    f"{qtype} {chain[0]!r}: the CNAME of {chain[-1]!r} leads back to {end!r}"
                )
            if len(chain) > MAX_CNAME:
                raise DNSError(f"{qtype} {chain[0]!r}: more than {MAX_CNAME} CNAMEs in a row")
            chain.append(end)
        return answer

    def _lookup(self, name: str, qtype: str, timeout: float) -> list[Record]:
        """Call :func:`DNSLookup`, or what the application put in its place."""
        if DNSLookup is not _own_lookup:
            return DNSLookup(name, qtype)
        if self._resolver is None and self._servers is not None:
            _require_dnspython()
            import dns.resolver

            self._resolver = dns.resolver.Resolver(configure=False)
            self._resolver.nameservers = [address for address, _ in self._servers]
            self._resolver.nameserver_ports = dict(self._servers)
        return DNSLookup(name, qtype, self._resolver, timeout)

    def _keep_hosts(self, owner: str, qtype: str, found: dict[tuple[str, str], list[Data]]) -> None:
        """Remember the addresses of hosts that the answer names, where they can be believed."""
        types = [t for t in ("A", "AAAA") if t != qtype and (qtype, t) in self.SAFE2CACHE]
        if not types:
            return
        for data in found.get((owner, qtype), ()):
            host = str(data[-1] if isinstance(data, tuple) else data).lower().rstrip(".")
            if host == owner or host.endswith("." + owner):
                for rtype in types:
                    if (host, rtype) in found:
                        self.cache.setdefault((host, rtype), found[host, rtype])


def _server(server: Server) -> tuple[str, int]:
    """Check the address and port of a server."""
    address, port = (server, 53) if isinstance(server, str) else server
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(f"servers: {address!r} must be the IP address of a name server") from None
    if not 0 < port < 65536:
        raise ValueError(f"servers: the port of {address} must be 1 to 65535, not {port!r}")
    return address, port
