"""What becomes of a message when an MTA does as a filter says.

:class:`Editor` applies modifications one by one, in the dialect of Postfix or of sendmail, which
:class:`~Milter.mta.Dialect` describes.  It asks nobody and sends nothing: who wants to know what a
list of actions would do to a message finds out here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .messages import Address, Header, Message, strip_brackets
from .vocabulary import (
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    Dialect,
    InsertHeader,
    Modification,
    Quarantine,
    ReplaceBody,
)


class Editor:
    """A message and its envelope under a filter's modifications.

    >>> editor = Editor(Message.parse(b"Subject: a\\n\\nText.\\n"), recipients=[Address("b@x")])
    >>> editor.apply(ChangeHeader(1, b"Subject", b"changed"), DeleteRecipient("<b@x>"))
    >>> editor.message.as_bytes()
    b'Subject: changed\\r\\n\\r\\nText.\\r\\n'
    >>> editor.recipients
    []

    What is given to it stays as it is.

    Args:
        message: the message that the filter saw.
        sender: the envelope sender.
        recipients: those that the filter has not refused.
        dialect: whose way of doing what the filter says.
        own_received: a header that the MTA puts on top, unseen by the filter.
        leading_space: whether values come with the space after the colon (``SMFIP_HDR_LEADSPC``).
    :ivar quarantine: the reason for holding the message, None where it is not held.
    :ivar body_replaced: whether there was a new body.
    """

    def __init__(
        self,
        message: Message,
        sender: Address = Address(""),
        recipients: Iterable[Address] = (),
        *,
        dialect: Dialect = Dialect.POSTFIX,
        own_received: Header | None = None,
        leading_space: bool = False,
    ) -> None:
        self._headers = HeaderEditor(
            message.headers, dialect, own=own_received, leading_space=leading_space
        )
        self._envelope = EnvelopeEditor(sender, recipients, dialect)
        self._new_body: list[bytes] = []
        self._old_body = message.body
        self.body_replaced = False
        self.quarantine: str | None = None

    def apply(self, *modifications: Modification) -> None:
        """Do what the filter says, in its order."""
        for modification in modifications:
            self._apply(modification)

    def _apply(self, modification: Modification) -> None:
        if isinstance(modification, AddHeader):
            self._headers.add(modification.name, modification.value)
        elif isinstance(modification, InsertHeader):
            self._headers.insert(modification.index, modification.name, modification.value)
        elif isinstance(modification, ChangeHeader):
            self._headers.change(modification.index, modification.name, modification.value)
        elif isinstance(modification, ReplaceBody):
            self._new_body.append(modification.chunk)
            self.body_replaced = True
        elif isinstance(modification, Quarantine):
            self.quarantine = modification.reason
        elif isinstance(modification, AddRecipient):
            self._envelope.add(modification.address, modification.params)
        elif isinstance(modification, DeleteRecipient):
            self._envelope.delete(modification.address)
        elif isinstance(modification, ChangeSender):
            self._envelope.change_sender(modification.address, modification.params)
        else:
            raise TypeError(f"{modification!r} is no modification")

    @property
    def body(self) -> bytes:
        """The body as it is now."""
        return b"".join(self._new_body) if self.body_replaced else self._old_body

    @property
    def message(self) -> Message:
        """The message as it is now; a new one each time."""
        return Message(self._headers.headers, self.body)

    @property
    def header_edits(self) -> list[HeaderEdit]:
        """Every header, the deleted ones too, in place."""
        return self._headers.edits

    @property
    def sender(self) -> Address:
        """The envelope sender as it is now."""
        return self._envelope.sender

    @property
    def recipients(self) -> list[Address]:
        """The recipients as they are now."""
        return self._envelope.recipients


@dataclass
class HeaderEdit:
    """What became of one header: None as *before* is an addition, as *after* a deletion."""

    before: Header | None
    after: Header | None
    own: bool = False  #: the MTA's own, which the filter does not see


class HeaderEditor:
    """The headers of a message under a filter's edits, with what was there before."""

    def __init__(
        self,
        headers: Iterable[Header],
        dialect: Dialect,
        *,
        own: Header | None = None,
        leading_space: bool = False,
    ) -> None:
        self.edits = [HeaderEdit(header, header) for header in headers]
        if own is not None:
            self.edits.insert(0, HeaderEdit(own, own, own=True))
        self._dialect = dialect
        self._leading_space = leading_space

    @property
    def headers(self) -> list[Header]:
        """Those that are left, top to bottom."""
        return [edit.after for edit in self.edits if edit.after is not None]

    def add(self, name: bytes, value: bytes) -> None:
        """``smfi_addheader``."""
        position = len(self.edits)
        if self._dialect is Dialect.SENDMAIL:
            named = (n for n, edit in enumerate(self.edits) if _is_named(edit, name))
            position = next(named, position)
        self.edits.insert(position, self._new(name, value))

    def insert(self, index: int, name: bytes, value: bytes) -> None:
        """``smfi_insheader``; *index* counts from 0."""
        counted = [
            position
            for position, edit in enumerate(self.edits)
            if edit.after is not None or self._dialect is Dialect.SENDMAIL
        ]
        position = counted[index] if index < len(counted) else len(self.edits)
        self.edits.insert(position, self._new(name, value))

    def change(self, index: int, name: bytes, value: bytes) -> None:
        """``smfi_chgheader``; *index* counts from 1 among the headers called *name*."""
        edit = self._find(max(index, 1), name)
        if edit is None:
            if value:
                self.add(name, value)
        elif value:
            if self._dialect is Dialect.SENDMAIL:
                name = _name_of(edit)
            edit.after = Header.from_wire(name, value, self._leading_space)
        else:
            edit.after = None
        # What was neither there before nor is afterwards leaves no trace for Postfix;
        # sendmail goes on counting it.
        if self._dialect is Dialect.POSTFIX:
            self.edits = [e for e in self.edits if e.before is not None or e.after is not None]

    def _new(self, name: bytes, value: bytes) -> HeaderEdit:
        return HeaderEdit(None, Header.from_wire(name, value, self._leading_space))

    def _find(self, index: int, name: bytes) -> HeaderEdit | None:
        for edit in self._countable():
            if _is_named(edit, name):
                index -= 1
                if index == 0:
                    return edit
        return None

    def _countable(self) -> list[HeaderEdit]:
        """The headers that ``chgheader`` counts."""
        return [
            edit
            for edit in self.edits
            if not edit.own and (edit.after is not None or self._dialect is Dialect.SENDMAIL)
        ]


def _name_of(edit: HeaderEdit) -> bytes:
    header = edit.after or edit.before
    return b"" if header is None else header.name


def _is_named(edit: HeaderEdit, name: bytes) -> bool:
    return _name_of(edit).lower() == name.lower()


class EnvelopeEditor:
    """The envelope of a message under a filter's edits."""

    def __init__(self, sender: Address, recipients: Iterable[Address], dialect: Dialect) -> None:
        self.sender = sender
        self._dialect = dialect
        # By what tells recipients apart.
        self._recipients: dict[object, Address] = {}
        for recipient in recipients:
            # An MTA gives the client's recipients an ORCPT where they come without.
            self._append(recipient, default_orcpt=f"rfc822;{recipient.address}")

    @property
    def recipients(self) -> list[Address]:
        """Those that are left, in order."""
        return list(self._recipients.values())

    def change_sender(self, address: str, params: str | None) -> None:
        """``smfi_chgfrom``; without parameters the old ones stay."""
        kept = self.sender.params if params is None else tuple(params.split())
        self.sender = Address(strip_brackets(address), kept)

    def add(self, address: str, params: str | None) -> None:
        """``smfi_addrcpt``, ``smfi_addrcpt_par``."""
        self._append(Address(strip_brackets(address), tuple((params or "").split())))

    def delete(self, address: str) -> None:
        """``smfi_delrcpt``: all recipients that are written just so."""
        unwanted = strip_brackets(address)
        for key in [key for key, one in self._recipients.items() if one.address == unwanted]:
            del self._recipients[key]

    def _append(self, recipient: Address, default_orcpt: str = "") -> None:
        self._recipients.setdefault(self._key(recipient, default_orcpt), recipient)

    def _key(self, recipient: Address, default_orcpt: str) -> object:
        if self._dialect is Dialect.SENDMAIL:
            return recipient.address
        pairs = (param.partition("=") for param in recipient.params)
        values = {name.upper(): value for name, _, value in pairs}
        orcpt = values.get("ORCPT", default_orcpt)
        return tuple(map(str.lower, (recipient.address, values.get("NOTIFY", ""), orcpt)))
