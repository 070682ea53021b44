"""Domains compared as domains: upper and lower case, a final dot, Unicode and ASCII form.

RFC 5890 section 2.3.2.4 says that a U-label and its A-label are one, RFC 5321 section 2.4 that case
means nothing. A sender chooses the form, and must be found, or not found, under each of them.

Python's own codec ``idna`` is of 2003, in which ``straße`` and ``strasse`` were one: they are two
owners' domains since RFC 5891. It also raises for what is no domain, which any mail may hold.
"""

from __future__ import annotations

import re
import stringprep
import unicodedata
from typing import TypeVar, overload

__all__ = ["DomainDict", "canonical", "canonical_address", "unicode_form"]

_T = TypeVar("_T")
_V = TypeVar("_V")

#: The longest label, in octets of its ASCII form (RFC 1035 section 2.3.4).
_LONGEST_LABEL = 63
_PREFIX = "xn--"
#: The full stop and what IDNA takes for one (RFC 3490 section 3.1).
_DOTS = re.compile("[.\u3002\uff0e\uff61]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HOST_NAME = re.compile("[a-z0-9_-]*")
#: They make a difference in some scripts (RFC 5892 appendix A), though nothing is to be seen.
_JOINERS = "\u200c\u200d"


def canonical(domain: str) -> str:
    """Return the form in which two domains are one exactly where they are equal.

    That is ASCII, in lower case, without a final dot. A label that has no such form, hostile or
    damaged, is put in lower case and otherwise left alone. Never raises on a str.

    >>> canonical("B\u00dcCHER.Example."), canonical("xn--BCHER-kva.example")
    ('xn--bcher-kva.example', 'xn--bcher-kva.example')
    """
    if domain.isascii():
        return domain.lower().rstrip(".")
    return ".".join(map(_to_ascii, _DOTS.split(domain))).rstrip(".")


def unicode_form(domain: str) -> str:
    """Return the form of a domain that is written in Unicode, in lower case, without a final dot.

    >>> unicode_form("xn--bcher-kva.example") == "b\u00fccher.example"
    True
    """
    return ".".join(map(_to_unicode, canonical(domain).split(".")))


def canonical_address(address: str) -> str:
    """Return an address, in angle brackets or not, with its domain in the canonical form.

    The local part stays as it is: its host decides what case means there (RFC 5321 section 2.4).

    >>> canonical_address("<Joe@Example.COM.>")
    '<Joe@example.com>'
    """
    local, at, domain = address.rpartition("@")
    if not at or '"' in domain:  # an "@" within a quoted local part is none before a domain
        return address
    bare = domain[:-1] if domain.endswith(">") else domain
    return f"{local}@{canonical(bare)}{domain[len(bare) :]}"


def _to_ascii(label: str) -> str:
    """Return the A-label of a label; one that can have none in lower case."""
    mapped = label.lower() if label.isascii() else _mapped(label)
    if mapped.isascii():
        # Some characters stand for several, which may be others than letters: "a/b", "1.".
        return mapped if label.isascii() or _HOST_NAME.fullmatch(mapped) else label.lower()
    # Its time goes with the square of the length; a surrogate stands for a byte that is no UTF-8.
    if len(mapped) < _LONGEST_LABEL and not _SURROGATE.search(mapped):
        ascii_form = _PREFIX + mapped.encode("punycode").decode("ascii")
        if len(ascii_form) <= _LONGEST_LABEL:
            return ascii_form
    return mapped


def _mapped(label: str) -> str:
    """Bring a label into the form that U-labels have (Unicode Technical Standard 46, section 4)."""
    text = unicodedata.normalize("NFKC", label)
    # Each by itself: a sigma at the end of a word is another letter in a domain.
    lower = "".join(c.lower() for c in text if c in _JOINERS or not stringprep.in_table_b1(c))
    return unicodedata.normalize("NFKC", lower)


def _to_unicode(label: str) -> str:
    """Return the U-label of an A-label; anything else as it is."""
    if not label.startswith(_PREFIX) or len(label) > _LONGEST_LABEL:
        return label
    try:
        text = label[len(_PREFIX) :].encode("ascii").decode("punycode")
    except (ValueError, OverflowError):
        return label
    return text if not text.isascii() and _to_ascii(text) == label else label


class DomainDict(dict[str, _V]):
    """A dict with domains for keys, which any form of the domain finds.

    Its keys are in lower case and without a final dot, in ASCII or in Unicode.
    """

    def key_for(self, domain: str) -> str:
        """Return the key that a domain has or, where it has none, would be set under."""
        forms = canonical(domain), unicode_form(domain)
        for form in (domain, *forms):
            if super().__contains__(form):
                return form
        return forms[0 if domain.isascii() else 1]

    def __missing__(self, domain: str) -> _V:
        """Return the value for a domain in another form than its key's."""
        key = self.key_for(domain) if isinstance(domain, str) else domain
        if not super().__contains__(key):
            raise KeyError(domain)
        return super().__getitem__(key)

    def __contains__(self, domain: object) -> bool:
        """Whether there is a value for a domain, in whatever form."""
        return super().__contains__(self.key_for(domain) if isinstance(domain, str) else domain)

    @overload
    def get(self, domain: str, default: None = None, /) -> _V | None: ...
    @overload
    def get(self, domain: str, default: _V | _T, /) -> _V | _T: ...
    def get(self, domain: str, default: object = None, /) -> object:
        """Return the value for a domain, in whatever form, or else the default."""
        return self[domain] if domain in self else default  # noqa: SIM401 - it is what get() is
