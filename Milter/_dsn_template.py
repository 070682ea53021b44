"""Notifications made from templates; `Milter.dsn` is where applications find this."""

from __future__ import annotations

import email.message
import email.utils
import re
from collections.abc import Iterable
from email.header import Header
from typing import Any, Callable

from . import _domains

__all__ = ["Vars", "create_msg"]


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

    Args:
        v: has the attributes, ``sender`` and ``receiver`` at least: the application's own object or
            an SPF query object, whose ``h s i r o result perm_error`` are ``heloname sender
            connectip receiver sender_domain result perm_error``.
        rcptlist: the recipients of the original message: ``%(rcpt)s``, one a line.
        origmsg: the original message: gives ``%(subject)s`` and ``%(spf_result)s`` (its
            Received-SPF header).
        template: the template; without one there is no message.

    Returns:
        The message, or None without a template.

    Raises:
        KeyError: the template names what *v* does not have.
        ValueError: the template has a header line without a colon.

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
        "Message-ID": email.utils.make_msgid(domain=_domains.canonical(str(values["receiver"]))),
        "MIME-Version": "1.0",
        "Content-Type": "text/plain",
    }.items():
        if name not in msg:
            _set_header(msg, name, str(default))
    values.clean = _header_text if msg.get_content_maintype() == "multipart" else str
    _set_body(msg, body % values)
    return msg


class Vars:
    """An object without attributes, to be given those that a template of `create_msg` names."""


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


for _public in (Vars, create_msg):
    _public.__module__ = "Milter.dsn"
