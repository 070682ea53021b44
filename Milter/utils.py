"""Addresses, host names and header values: the small tools that most filters need.

Everything here takes text straight from the network, so nothing here trusts it: whole matches
only, ASCII digits only, time linear in the input.
"""

from __future__ import annotations

import binascii
import email
import re
import socket
import struct
import threading
from binascii import a2b_base64
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from email.header import decode_header
from fnmatch import fnmatchcase, translate

from . import _charsets

__all__ = [
    "MASK",
    "MASK6",
    "PAT_IP4",
    "addr2bin",
    "bin2long6",
    "cidr",
    "decode",
    "dnsre",
    "inet_ntop",
    "inet_pton",
    "iniplist",
    "ip4re",
    "ip6re",
    "parse_addr",
    "parse_header",
    "parseaddr",
    # Not ours, but filters have them from here: ``from Milter.utils import *`` gave them.
    "a2b_base64",
    "decode_header",
    "email",
    "fnmatchcase",
    "re",
    "socket",
    "struct",
]

#: All 32 bits of an IPv4 address.
MASK = 0xFFFFFFFF
#: All 128 bits of an IPv6 address.
MASK6 = (1 << 128) - 1

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
#: Pattern text for an IPv4 address, without groups or anchors, to build other patterns from.
PAT_IP4 = r"\.".join([_OCTET] * 4)


def _pat_ip6() -> str:
    """Build the nine forms of RFC 3986's IPv6address."""
    word, tail = "[0-9a-f]{1,4}", f"(?:[0-9a-f]{{1,4}}:[0-9a-f]{{1,4}}|{PAT_IP4})"
    forms = [
        f"(?:{word}:){{6}}{tail}",
        f"::(?:{word}:){{5}}{tail}",
        f"(?:{word})?::(?:{word}:){{4}}{tail}",
    ]
    for before, after in ((1, 3), (2, 2), (3, 1), (4, 0)):
        forms.append(f"(?:(?:{word}:){{0,{before}}}{word})?::(?:{word}:){{{after}}}{tail}")
    forms += [f"(?:(?:{word}:){{0,5}}{word})?::{word}", f"(?:(?:{word}:){{0,6}}{word})?::"]
    return "|".join(forms)


#: Matches a whole IPv4 address, four decimal octets without leading zeros.
ip4re = re.compile(rf"\A{PAT_IP4}\Z")
#: Matches a whole IPv6 address without scope, in any case (RFC 4291 section 2.2).
ip6re = re.compile(rf"\A(?:{_pat_ip6()})\Z", re.IGNORECASE | re.ASCII)
#: Matches a whole host name of letters, digits and hyphens, a final dot allowed (RFC 1123
#: section 2.1); never an address, since the last label begins with a letter.
dnsre = re.compile(
    r"\A(?=.{1,254}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])\.?\Z",
    re.IGNORECASE | re.ASCII,
)


# --- addresses -----------------------------------------------------------------------------


def bin2long6(s: bytes) -> int:
    """Return the 16 bytes of an IPv6 address as an int.

    Raises:
        ValueError: *s* is not 16 bytes long.
    """
    if len(s) != 16:
        raise ValueError(f"s must be the 16 bytes of an IPv6 address, not {len(s)}: {s!r}")
    return int.from_bytes(s, "big")


def inet_ntop(s: bytes) -> str:
    """Write a 16-byte IPv6 address as text, as the platform's ``inet_ntop(3)`` does.

    Raises:
        ValueError: *s* is not 16 bytes long.
    """
    return socket.inet_ntop(socket.AF_INET6, s)


def inet_pton(s: str) -> bytes:
    """Read an IPv6 address into 16 bytes.

    Raises:
        OSError: *s* is no IPv6 address.
    """
    if not ip6re.match(s):
        raise OSError(f"Invalid IPv6 address: {s!r}")
    return socket.inet_pton(socket.AF_INET6, s)


def addr2bin(s: str) -> int:
    """Return an IPv4 or IPv6 address as an int.

    Args:
        s: the address as text.

    Raises:
        OSError: *s* is neither (OSError is what ``socket.error`` names).

    >>> hex(addr2bin("192.168.0.1"))
    '0xc0a80001'
    >>> addr2bin("::1")
    1
    """
    if ip4re.match(s):
        return int.from_bytes(socket.inet_aton(s), "big")
    if ip6re.match(s):
        return int.from_bytes(socket.inet_pton(socket.AF_INET6, s), "big")
    raise OSError(f"Invalid IP address: {s!r}")


def cidr(i: int, n: int, mask: int = MASK) -> int:
    """Return the network part of an address.

    Args:
        i: the address.
        n: prefix length in bits; more than the width of *mask* leaves every bit.
        mask: :data:`MASK` for IPv4, :data:`MASK6` for IPv6.

    Raises:
        ValueError: *n* is negative.

    >>> hex(cidr(0xC0A80001, 24))
    '0xc0a80000'
    """
    if n < 0:
        raise ValueError(f"n must be a prefix length of 0 or more, not {n!r}")
    return ~(mask >> n) & mask & i


class _Patterns:
    """A list of address patterns, compiled: a check costs one set look-up per prefix length."""

    _MAPPED = 0xFFFF << 32

    def __init__(self, patterns: Iterable[str]) -> None:
        self._networks: dict[int, dict[int, set[int]]] = {32: {}, 128: {}}
        self._prefixes: dict[int, set[str]] = {}
        self._hosts: dict[tuple[str, int | None], None] = {}
        self._everything = False
        globs: list[str] = []
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"iplist: {pattern!r} must be a str")
            text = pattern.strip().lower()
            if any(c in text for c in "*?["):
                self._add_glob(text, globs)
            else:
                self._add_network(text)
        self._glob = re.compile("|".join(map(translate, globs))).match if globs else None

    def _add_glob(self, text: str, others: list[str]) -> None:
        """Keep ``literal*`` as a prefix, which is a set look-up, and collect the rest."""
        literal = text[:-1]
        if text.endswith("*") and not any(c in literal for c in "*?["):
            self._prefixes.setdefault(len(literal), set()).add(literal)
        else:
            others.append(text)

    def _add_network(self, text: str) -> None:
        """Take an address, a network, or a host name; anything else matches nothing."""
        base, slash, bits = text.partition("/")
        width = 32 if ip4re.match(base) else 128 if ip6re.match(base) else 0
        if not width and not dnsre.match(base):
            return
        n = _prefix_length(text, bits, width or 128) if slash else width
        if slash and n == 0 and width:
            self._everything = True
        if not width:
            self._hosts[base, n if slash else None] = None
            return
        address = addr2bin(base)
        self._add_bits(width, n, address)
        if width == 128 and n >= 96 and address >> 32 == 0xFFFF:
            self._add_bits(32, n - 96, address & MASK)

    def _add_bits(self, width: int, n: int, address: int) -> None:
        shift = width - n
        self._networks[width].setdefault(shift, set()).add(address >> shift)

    def cover(self, ipaddr: str) -> bool:
        """Whether any pattern covers the address; names are resolved if nothing else does."""
        is_v6 = ":" in ipaddr
        address = addr2bin(ipaddr)
        if self._everything or self._in_networks(128 if is_v6 else 32, address):
            return True
        mapped = is_v6 and address >> 32 == 0xFFFF
        if mapped and self._in_networks(32, address & MASK):
            return True
        texts = [ipaddr.lower()]
        if is_v6:
            texts.append(socket.inet_ntop(socket.AF_INET6, address.to_bytes(16, "big")))
        if mapped:
            texts.append(socket.inet_ntoa(address.to_bytes(16, "big")[12:]))
        return any(map(self._in_globs, texts)) or self._is_host(
            address & MASK if mapped else address, 128 if is_v6 and not mapped else 32
        )

    def _in_networks(self, width: int, address: int) -> bool:
        return any(address >> shift in nets for shift, nets in self._networks[width].items())

    def _in_globs(self, text: str) -> bool:
        return any(text[:n] in literals for n, literals in self._prefixes.items()) or bool(
            self._glob and self._glob(text)
        )

    def _is_host(self, address: int, width: int) -> bool:
        """Whether a named host has the address, or one in the same /n.

        A prefix of up to 32 bits speaks of the name's IPv4 addresses, a longer one of its IPv6
        addresses: ``/24`` of an IPv6 address would be half a continent.
        """
        for name, n in self._hosts:
            if n is not None and (n <= 32) != (width == 32):
                continue
            shift = 0 if n is None else width - n
            for other, other_width in _resolve(name):
                if other_width == width and other >> shift == address >> shift:
                    return True
        return False


def _prefix_length(pattern: str, bits: str, width: int) -> int:
    """Read what follows the slash."""
    if not re.fullmatch("[0-9]{1,3}", bits) or int(bits) > width:
        raise ValueError(f"iplist: {pattern!r} must end in a prefix length of 0 to {width}")
    return int(bits)


def _resolve(name: str) -> Iterator[tuple[int, int]]:
    """Ask the system for a host's addresses: each as an int, and its width in bits."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for _family, _type, _proto, _canonical, sockaddr in found:
        text = str(sockaddr[0]).partition("%")[0]
        yield addr2bin(text), 128 if ":" in text else 32


#: How many compiled lists are kept.  Applications have a handful, read from their configuration.
_KEPT_LISTS = 64
_compiled: OrderedDict[int, tuple[list[str], _Patterns]] = OrderedDict()
_compiled_lock = threading.Lock()


def _compile(iplist: Iterable[str]) -> _Patterns:
    """Return the compiled form of a list of patterns.

    Found by the list's identity and then compared with the copy it was compiled from: that
    makes a list changed in place, or a new one at the same address, a miss, and is quick since
    the items of an unchanged list are the very same objects.
    """
    patterns = [iplist] if isinstance(iplist, str) else list(iplist)
    key = id(iplist)
    with _compiled_lock:
        known = _compiled.get(key)
        if known and known[0] == patterns:
            _compiled.move_to_end(key)
            return known[1]
    compiled = _Patterns(patterns)
    with _compiled_lock:
        _compiled[key] = patterns, compiled
        _compiled.move_to_end(key)
        while len(_compiled) > _KEPT_LISTS:
            _compiled.popitem(last=False)
    return compiled


def iniplist(ipaddr: str, iplist: Iterable[str]) -> bool:
    """Tell whether any pattern of a list covers an address.

    A pattern is

    - an address or a network: ``192.168.0.1``, ``192.168.0.0/16``, ``2001:db8::/32``;
    - a glob over the address's text: ``192.168.0.*``; an IPv6 address is compared as given
      and in its shortest form, in lower case;
    - a host name, resolved at each check that nothing else decides (which waits for the
      system's resolver; an unresolvable name does not match), alone or with a prefix length:
      up to ``/32`` it applies to the name's IPv4 addresses, above to its IPv6 addresses.

    Anything else matches nothing.  A network of prefix length 0, ``0.0.0.0/0`` or ``::/0``, covers
    every address of either kind; others cover addresses of their own kind.  An IPv4-mapped IPv6
    address (``::ffff:1.2.3.4``) is the IPv4 address too, in *ipaddr* as in the patterns.

    The list is compiled once and found again by its identity and content, so that passing the
    same list each time is quick, however long, and a change in place is seen at once.

    Args:
        ipaddr: the address to look for.
        iplist: the patterns; a str counts as a list of one.

    Raises:
        ValueError: *ipaddr* is no address, or a pattern has a bad prefix length.
        TypeError: a pattern is no str.

    >>> iniplist("192.168.0.45", ["10.0.0.0/8", "192.168.0.*"])
    True
    >>> iniplist("192.168.1.45", ["10.0.0.0/8", "192.168.0.*"])
    False
    """
    if not (ip4re.match(ipaddr) or ip6re.match(ipaddr)):
        raise ValueError(f"Invalid ip syntax:{ipaddr!r}")
    return _compile(iplist).cover(ipaddr)


# --- mail addresses ------------------------------------------------------------------------

_QUOTED = r'"[^"\\]*(?:\\.[^"\\]*)*'


def _unquote(inner: str) -> str:
    """Undo the backslashes inside a quoted string."""
    return re.sub(r"\\(.)", r"\1", inner, flags=re.DOTALL)


def _plain(token: str) -> str:
    """Take the quotes and backslashes off a token; the closing quote may be missing."""
    quoted = re.match(_QUOTED, token, re.DOTALL)
    return _unquote(quoted[0][1:] if quoted else token)


def parse_addr(t: str) -> list[str]:
    """Split an envelope address into local part and domain.

    Angle brackets, a source route and the quotes around the local part are taken off; the split
    is at the last ``@``.

    Args:
        t: an address as MAIL FROM or RCPT TO give it.

    Returns:
        ``[localpart, domain]``, or ``[localpart]`` where there is no domain.

    >>> parse_addr('<"user@bar"@example.com>')
    ['user@bar', 'example.com']
    >>> parse_addr("@hop:user@example.com")
    ['user', 'example.com']
    >>> parse_addr("postmaster")
    ['postmaster']
    """
    t = t.strip()
    if t.startswith("<") and t.endswith(">"):
        t = t[1:-1].strip()
    if t.startswith("@"):
        route, colon, rest = t.partition(":")
        t = rest if colon else route
    quoted = re.match(_QUOTED + '"', t, re.DOTALL)
    if quoted:
        local, rest = _unquote(quoted[0][1:-1]), t[quoted.end() :]
        if not rest:
            return [local]
        if rest.startswith("@") and "@" not in rest[1:]:
            return [local, rest[1:]]
    return t.rsplit("@", 1)


#: A quoted string, an escaped character, a domain literal, white space, a special, other text.
_TOKEN = re.compile(rf'{_QUOTED}"?|\\.?|\[[^][]*\]|\s+|[()<>,;:"[]|[^\s()<>,;:"\\[]+', re.DOTALL)


_UNCLOSED = re.compile(rf"{_QUOTED}\Z", re.DOTALL)


def _tokens(text: str) -> list[str]:
    """Cut a header value; a quote that nothing closes is a character like any other."""
    tokens: list[str] = _TOKEN.findall(text)
    for at in range(max(0, len(tokens) - 2), len(tokens)):  # a backslash may follow
        if _UNCLOSED.match(tokens[at]):
            return [*tokens[:at], '"', *_TOKEN.findall("".join(tokens[at:])[1:])]
    return tokens


def _ends_in_its_address(tokens: list[str]) -> bool:
    """Whether the only address in angle brackets ends the value, comments aside."""
    depth = 0
    opened = closed = False
    for token in tokens:
        if token == "(":
            depth += 1
        elif token == ")" and depth:
            depth -= 1
        elif depth or token.isspace():
            continue
        elif closed or (opened and token == "<"):
            return False
        elif token == "<":
            opened = True
        elif token == ">":
            closed = opened
    return closed


class _Mailbox:
    """The first mailbox of an address header, taken apart token by token.

    Programs write names without the quotes that RFC 5322 asks for where these hold commas, colons,
    semicolons and ``@``.  So where the value ends in its only address in angle brackets, all that
    stands before is the name; otherwise these characters mean what they do in a list.
    """

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._alone = _ends_in_its_address(self._tokens)
        self._tokens.reverse()  # so that taking the next one is cheap
        self._group: list[str] = []  # the name, up to a colon
        self._comments_close = True
        self._odd = False  # whether the name is none by the RFC
        self._name: list[str] = []  # what a name would be, quotes undone
        self._spec: list[str] = []  # what an address would be, quotes kept
        self._first: str | None = None  # the address before the first comma
        self._comments: list[str] = []

    def parse(self) -> tuple[str, str]:
        while self._tokens:
            token = self._tokens.pop()
            if token == "(" and self._is_comment():
                self._comment()
            elif token == "<":
                return self._with_angle()
            elif token == ":":
                self._group += [*self._name, token]
                self._name, self._spec, self._first = [], [], None
            elif token in ",;":
                if self._ends_at(token):
                    break
            elif token.isspace():
                self._space()
            else:
                self._word(token)
        spec = _squeeze(self._spec)
        spec = _first_word(spec) if self._first is None else self._first
        if not _can_be_one(spec):
            return "", ""
        return _one_line(" ".join(self._comments)), spec

    def _space(self) -> None:
        if self._group and not self._name:
            self._group.append(" ")
        for pieces in (self._name, self._spec):
            if pieces and pieces[-1] != " ":
                pieces.append(" ")

    def _ends_at(self, token: str) -> bool:
        """Whether a comma or semicolon ends the mailbox, and what to remember if it does not.

        A comma without an address before it may be one in an unquoted name, ``Doe, John <a@b>``.
        """
        if self._first is None:
            spec = _squeeze(self._spec)
            if spec:
                self._first = _first_word(spec)
                if not self._alone and ("@" in spec or token == ";"):
                    return True
        if self._name:
            self._name.append(token)
            self._odd = True
        return False

    def _word(self, token: str) -> None:
        """Take what may be a word of a name, or a piece of an address."""
        quoted = token[0] == '"' != token
        before = self._spec[-1] if self._spec else " "
        if before != " " and (quoted or before[0] == '"' != before):
            self._name.append(" ")
        self._name.append(_plain(token) if quoted or token[0] == "\\" else token)
        if token not in ")>(":
            self._spec.append(token)
        if not quoted and (token[0] in ")>[(" or "@" in token):
            self._odd = True

    def _is_comment(self) -> bool:
        """Whether a parenthesis begins a comment: without an address it has to be closed, too."""
        if self._spec or not self._comments_close:
            return self._comments_close
        depth = 1
        for token in reversed(self._tokens):
            depth += {"(": 1, ")": -1}.get(token, 0)
            if not depth:
                return True
        self._comments_close = False
        return False

    def _comment(self) -> None:
        """Take a comment; its inner parentheses are dropped and their text kept."""
        depth, text = 1, []
        while self._tokens and depth:
            token = self._tokens.pop()
            if token == "(":
                depth += 1
            elif token == ")":
                depth -= 1
            else:
                text.append(_unquote(token) if token[0] == "\\" else token)
        self._comments.append(" ".join("".join(text).split()))

    def _with_angle(self) -> tuple[str, str]:
        """Take an address in angle brackets; what stood before it is the name."""
        spec: list[str] = []
        while self._tokens:
            token = self._tokens.pop()
            if token == ">":
                break
            if token == "(":
                self._comment()
            elif token == "<":
                spec = []
            elif not token.isspace():
                spec.append(token)
        address = _one_line("".join(spec), "")
        if address.startswith("@") and ":" in address:
            address = address.partition(":")[2]
        if self._alone and (self._odd or not "".join(self._name).strip()):
            self._name = [*self._group, *self._name]
        name = _one_line("".join(self._name)).strip()
        if self._comments:
            name = f"{name} ({' '.join(self._comments)})" if name else " ".join(self._comments)
        return _one_line(name), address if _can_be_one(address) else ""


def _first_word(spec: str) -> str:
    """What may be an address where there is none with a domain: the first word, without quotes."""
    quoted = re.match(_QUOTED + '"', spec, re.DOTALL)
    if quoted and not spec.startswith(("@", "."), quoted.end()):
        return _unquote(quoted[0][1:-1])
    return spec if "@" in _bare(spec) else spec.partition(" ")[0]


def _bare(address: str) -> str:
    """An address without what stands in quotes or brackets."""
    return re.sub(rf'{_QUOTED}"?|\[[^][]*\]', "[]", address, flags=re.DOTALL)


def _can_be_one(address: str) -> bool:
    """Whether an address has one way to be read: no second ``@``, and a domain after it if any.

    Programs disagree on ``a@b@c``, and a sender could pass a check made for one of the domains.
    """
    bare = _bare(address)
    return bare.count("@") < 2 and not bare.endswith("@")


def _one_line(text: str, instead: str = " ") -> str:
    """Replace line ends, so that a folded header gives no folded result."""
    return re.sub(r"[\r\n]+[ \t]*", instead, text)


def _squeeze(pieces: list[str]) -> str:
    """Join the pieces of an address; white space around its dots, ``@`` and after that is none."""
    out = ""
    domain = False
    for i, piece in enumerate(pieces):
        if piece == " ":
            after = pieces[i + 1][0] if i + 1 < len(pieces) else "."
            if domain or out[-1] in "@." or after in "@.":
                continue
        domain = domain or ("@" in piece and piece[0] != '"')
        out += piece
    return _one_line(out, "").strip()


def parseaddr(t: str) -> tuple[str, str]:
    """Return the name and the address of the first mailbox in a header value.

    Like :func:`email.utils.parseaddr`, but the same in every Python version, and it also reads
    what mail programs of all kinds write: unquoted ``@``, commas, semicolons and colons in the name
    where the value ends in its only address in angle brackets, a source route in the address,
    comments in comments, quotes and parentheses that nothing closes.  Never raises on a str.

    An address that programs read differently, with two ``@`` outside of quotes or nothing
    after the ``@``, is no address: it gives ``''``, as :func:`email.utils.parseaddr` does.

    Args:
        t: the value of From, To, Reply-To…; decode it first for a readable name.

    Returns:
        ``(full name, address)``, each ``''`` where missing.

    >>> parseaddr("God@heaven <@hop.org:jeff@spec.org>")
    ('God@heaven', 'jeff@spec.org')
    >>> parseaddr("Real Name ((comment)) <addr@example.com>")
    ('Real Name (comment)', 'addr@example.com')
    >>> parseaddr("a@example.com (Full Name)")
    ('Full Name', 'a@example.com')
    >>> parseaddr("joe@example.com, Sales; EMEA <a@example.com>")
    ('joe@example.com, Sales; EMEA', 'a@example.com')
    """
    return _Mailbox(t).parse()


# --- header values -------------------------------------------------------------------------

_WORD_START = re.compile(r"=\?([^\s?*]{1,64})(?:\*[^\s?]{0,64})?\?([bBqQ])\?")


def decode(s: str | bytes, convert_eols: str | bytes | None = None) -> bytes:
    r"""Decode base64 whose padding may be missing.

    Args:
        s: the base64 text; characters outside its alphabet are skipped.
        convert_eols: replaces each CRLF of the result, ``"\n"`` for example; None keeps it.

    Raises:
        binascii.Error: a single character is left over, which stands for no byte.

    >>> decode("QUI")
    b'AB'
    """
    data = s.encode("ascii", "replace") if isinstance(s, str) else s
    # Padding inside means that two encoded texts were put together.
    chunks = re.sub(rb"[^A-Za-z0-9+/=]+", b"", data).split(b"=")
    out = b"".join(a2b_base64(chunk + b"=" * (-len(chunk) % 4)) for chunk in chunks)
    if convert_eols is not None:
        eol = convert_eols.encode() if isinstance(convert_eols, str) else convert_eols
        out = out.replace(b"\r\n", eol)
    return out


def parse_header(val: str) -> str:
    """Decode the RFC 2047 words of a header value.

    Base64 without its padding, words inside other text, white space and any other junk are taken
    as mail programs write them, charsets under all the names that mail has for them. Words whose
    charset is unknown are read as UTF-8 where they are valid; what cannot be decoded stays as it
    is, and bytes that the charset lacks become U+FFFD. Folds are undone where anything was decoded.
    A word cannot bring in a line end, which becomes a space; other control characters, NUL too,
    stay as they were encoded.  Never raises on a str.

    Args:
        val: the value as the MTA hands it over.

    Returns:
        The decoded value; *val* itself where it has no word to decode.

    >>> parse_header("=?iso-8859-1?Q?Peter_=D8rum?= <orum@ditas.dk>")
    'Peter \u00d8rum <orum@ditas.dk>'
    """
    out: list[str] = []
    words: list[_Word] = []  # those that follow one another with nothing but white space between
    done = look = 0
    while (start := val.find("=?", look)) >= 0:
        head = _WORD_START.match(val, start)
        if not head:
            look = start + 2
            continue
        end = val.find("?=", head.end())
        if end < 0:
            break
        look = end + 2
        word = _Word.decoded(head[1], head[2], val[head.end() : end])
        if word is None:
            continue
        gap = val[done:start]
        if words and not gap.isspace() and gap:
            out.append(_join(words))
            words = []
        if not words:  # blanks at the very beginning are the header's, not the value's
            out.append(_unfold(gap) if done else _unfold(gap).lstrip())
        if words and words[-1].codec == word.codec:
            # One character's bytes may be spread over two words.
            words[-1].pieces += word.pieces
        else:
            words.append(word)
        done = look
    if not done:
        return val
    return "".join([*out, _join(words), _unfold(val[done:])])


class _Word:
    """The bytes of an encoded word, or of several in a row, and the charset they are in."""

    def __init__(self, charset: str, codec: str, data: bytes) -> None:
        self.charset = charset
        self.codec = codec
        self.pieces = [data]  # joined once, since a sender may write any number of words

    @classmethod
    def decoded(cls, charset: str, encoding: str, text: str) -> _Word | None:
        """Undo base64 or quoted-printable; None for what cannot be made text."""
        try:
            if encoding in "bB":
                data = decode(text)
            else:
                data = _decode_q(text.encode("utf-8", "surrogateescape"))
        except ValueError:  # binascii.Error and UnicodeEncodeError are such
            return None
        codec = _charsets.codec_for(charset)
        if codec is None:
            charset = codec = "utf-8"
            try:
                data.decode()
            except UnicodeDecodeError:
                return None
        return cls(charset, codec, data)

    def __str__(self) -> str:
        text = _charsets.decode(b"".join(self.pieces), self.charset) or ""
        return re.sub("[\ud800-\udfff]", "\ufffd", re.sub(r"[\r\n]+", " ", text))


def _decode_q(data: bytes) -> bytes:
    """Undo the "Q" encoding (RFC 2047 section 4.2)."""
    return re.sub(
        rb"=([0-9A-Fa-f]{2})", lambda m: binascii.unhexlify(m[1]), data.replace(b"_", b" ")
    )


def _join(words: Iterable[_Word]) -> str:
    return "".join(map(str, words))


def _unfold(text: str) -> str:
    """Remove the line ends of folds; the white space after them stays (RFC 5322 section 2.2.3)."""
    return re.sub(r"\r?\n(?=[ \t])", "", text)
