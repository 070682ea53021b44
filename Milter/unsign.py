"""The original address inside a signed envelope sender (SRS, BATV, SES)."""

from __future__ import annotations

import re

__all__ = ["unsign"]

# The shape decides, since the keys are the signer's: a tag of the right form in the right
# place.  Looser patterns would rewrite people's own addresses that contain "=".
_HASH = r"[A-Za-z0-9+/._-]{2,64}"
_HOST = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_SRS0_REST = rf"{_HASH}=[A-Za-z2-7]{{2}}=(?P<host>{_HOST})=(?P<user>.+)@[^@]*"

#: Sender Rewriting Scheme, one forwarder: SRS0=hash=day=domain=user@forwarder
_SRS0 = re.compile(rf"SRS0[=+-]{_SRS0_REST}", re.IGNORECASE | re.DOTALL)
#: several forwarders: SRS1=hash=first-forwarder=<SRS0 from its separator on>@last-forwarder
_SRS1 = re.compile(rf"SRS1[=+-]{_HASH}={_HOST}=[=+-]{_SRS0_REST}", re.IGNORECASE | re.DOTALL)
#: BATV: key digit, day (3 digits), 6 hex digits; most signers put the tag first, some last
_PRVS = re.compile(
    r"prvs=(?:[0-9]{4}[0-9a-f]{6}=(?P<user>.+)|(?P<user2>[^=]+)[=/][0-9]{4}[0-9a-f]{6})@(?P<host>[^@]*)",
    re.IGNORECASE | re.DOTALL,
)
#: Signed Envelope Sender: SES=tag=user@domain; a tag too short to tell from a word has a digit
_SES = re.compile(
    r"SES=(?:[A-Za-z0-9+/._-]{8,64}|(?=[^=]*[0-9])[A-Za-z0-9+/._-]{4,7})=(?P<user>.+)@(?P<host>[^@]*)",
    re.IGNORECASE | re.DOTALL,
)
#: BATV as Barracuda's gateways write it: a tag of hexadecimal digits between "=="
_BTV1 = re.compile(r"btv1==[0-9a-f]{8,16}==(?P<user>.+)@(?P<host>[^@]*)", re.IGNORECASE | re.DOTALL)
_SCHEMES = (_SRS0, _SRS1, _PRVS, _BTV1, _SES)

#: A local part in quotes: signers put the tag inside, as nothing may stand before the quotes.
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"(@[^@"]*)', re.DOTALL)
#: A local part that needs none (RFC 5321 section 4.1.2, RFC 6531 section 3.3).
_DOT_STRING = re.compile(r"[\w!#$%&'*+/=?^`{|}~-]+(?:\.[\w!#$%&'*+/=?^`{|}~-]+)*")

# No mail system carries longer addresses (RFC 5321 section 4.5.3.1.3 ends at 256), and the
# time to unwrap what somebody nested a thousand times stays bounded.
_LONGEST = 1024


def unsign(s: str) -> str:
    """Return the original address inside a signed envelope sender.

    Knows SRS0 and SRS1 (the Sender Rewriting Scheme of forwarders), BATV
    (``prvs=``, draft-levine-smtp-batv; ``btv1==``) and SES, also inside one another, in any case,
    with the local part in quotes or not, and with or without angle brackets.  Anything else,
    addresses that only look alike included, is returned unchanged.  No signature is verified: use
    the result to recognise a sender, never to trust one.

    Args:
        s: an address, ``user@domain``; more than 1,024 characters are left as they are.

    Returns:
        The innermost address; *s* itself where it carries no signature.

    >>> unsign("SRS0=8Y3CZ=3U=jsconnor.com=bills@bmsi.com")
    'bills@jsconnor.com'
    >>> unsign("prvs=0123abcdef=joe@example.com")
    'joe@example.com'
    >>> unsign("SRS0=no-signature@example.com")
    'SRS0=no-signature@example.com'
    """
    if len(s) > _LONGEST:
        return s
    if s.startswith("<") and s.endswith(">"):
        inner = s[1:-1]
        return s if (plain := unsign(inner)) == inner else f"<{plain}>"
    # Each step removes a tag, so this ends.
    while (plain := _strip_one(s)) != s:
        s = plain
    return s


def _strip_one(s: str) -> str:
    """Remove the outermost signature."""
    quoted = _QUOTED.fullmatch(s)
    bare = re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL) + quoted[2] if quoted else s
    for scheme in _SCHEMES:
        found = scheme.fullmatch(bare)
        if found:
            parts = found.groupdict()
            user = parts["user"] or parts.get("user2") or ""
            return f"{_in_quotes(user) if quoted else user}@{parts['host']}"
    return s


def _in_quotes(user: str) -> str:
    """Put a local part in quotes again, unless it needs none."""
    if _DOT_STRING.fullmatch(user) or _QUOTED.fullmatch(f"{user}@"):
        return user
    return '"' + re.sub(r'(["\\])', r"\\\1", user) + '"'
