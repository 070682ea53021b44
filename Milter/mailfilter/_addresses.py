"""Envelope addresses, and the recipients of a message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Union

import milter

from .._domains import canonical_address
from .._esmtp import param2dict
from ._errors import Gate

Params = Mapping[str, Union[str, None]]
AddressLike = Union["Address", str]

_NO_PARAMS: Params = MappingProxyType({})


class Address:
    """An address of the envelope: a path of RFC 5321, without its angle brackets.

    It equals another, or a text, as RFC 5321 compares addresses: the domain without regard to
    case, a final dot and Unicode or ASCII form, the local part exactly, but for ``postmaster``.

    >>> Address("<joe@Example.COM>") == "joe@example.com", Address("Joe@a") == "joe@a"
    (True, False)

    Attributes:
        address: the address as it was written; empty for the sender of a bounce.
        params: its ESMTP parameters: names in upper case; None where one has no value.
    """

    __slots__ = ("_key", "address", "params")

    def __init__(self, address: str, params: Params | None = None) -> None:
        """Make an address.

        Args:
            address: with angle brackets or without.
            params: its ESMTP parameters, by name.

        Raises:
            ValueError: a line break or NUL in it, or in a parameter.
            TypeError: it is no text.
        """
        if not isinstance(address, str):
            raise TypeError(f"address: must be str, not {type(address).__name__}: {address!r}")
        milter._line("Address", "address", address)
        self.address = address[1:-1] if address[:1] == "<" and address[-1:] == ">" else address
        self.params: Params = _NO_PARAMS
        if params:
            pairs = {name.upper(): value for name, value in params.items()}
            milter._line("Address", "params", _joined(pairs))
            if any(" " in _written(*pair) for pair in pairs.items()):
                raise ValueError(f"Address: params: must not hold a space: {dict(params)!r}")
            self.params = MappingProxyType(pairs)
        self._key: str | None = None

    @classmethod
    def _received(cls, address: str, params: Iterable[str]) -> Address:
        """An address as the MTA gave it, which needs no checks."""
        made = cls.__new__(cls)
        made.address = address[1:-1] if address[:1] == "<" and address[-1:] == ">" else address
        made.params = MappingProxyType(param2dict(params)) if params else _NO_PARAMS
        made._key = None
        return made

    @property
    def local(self) -> str:
        """The local part, as it was written."""
        return self.address.rpartition("@")[0] or self.address

    @property
    def domain(self) -> str:
        """The domain in lower case, in its ASCII form; empty where there is none."""
        return self._canonical.rpartition("@")[2] if "@" in self.address else ""

    @property
    def _canonical(self) -> str:
        if self._key is None:
            key = canonical_address(self.address)
            local, at, domain = key.rpartition("@")
            if (local or key).lower() == "postmaster":  # RFC 5321, section 4.5.1
                key = f"postmaster{at}{domain}" if at else "postmaster"
            self._key = key
        return self._key

    @property
    def _params_text(self) -> str:
        return _joined(self.params)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            other = Address._received(other, ())
        return isinstance(other, Address) and self._canonical == other._canonical

    def __hash__(self) -> int:
        return hash(self._canonical)

    def __bool__(self) -> bool:
        """Whether it is an address, and not the empty sender of a bounce."""
        return bool(self.address)

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        extra = f", {dict(self.params)!r}" if self.params else ""
        return f"Address({self.address!r}{extra})"


def _written(name: str, value: str | None) -> str:
    return name if value is None else f"{name}={value}"


def _joined(params: Params) -> str:
    """Parameters as they stand in MAIL and RCPT."""
    return " ".join(_written(*pair) for pair in params.items())


def as_address(value: AddressLike) -> Address:
    """An address, or the text of one, as an address."""
    return value if isinstance(value, Address) else Address(value)


class Recipients:
    """The recipients of a message, in order; addresses are found as `Address` compares them.

    At the end of the message they can be changed. One that is added goes to the end.
    """

    __slots__ = ("_gate", "_items", "_original")

    def __init__(self, items: Iterable[Address] = (), gate: Gate | None = None) -> None:
        self._items = list(items)
        self._original = tuple(self._items)
        self._gate = gate or Gate()

    def _arrived(self, address: Address) -> None:
        """The client has named one more."""
        self._items.append(address)
        self._original += (address,)

    def add(self, address: AddressLike, params: Params | None = None) -> None:
        """Add a recipient (smfi_addrcpt); one that is there already stays as it is.

        Args:
            address: the address.
            params: ESMTP parameters (smfi_addrcpt_par), where it brings none with it.

        Raises:
            ValueError: no address, or what could not be passed on.
            NotNow: not at the end of the message.
        """
        self._gate.check("recipients")
        made = as_address(address) if params is None else Address(str(address), params)
        milter._nonempty_line("recipients.add", "address", made.address)
        if made not in self._items:
            self._items.append(made)

    def remove(self, address: AddressLike) -> None:
        """Remove a recipient, in all the ways in which it is written (smfi_delrcpt).

        Raises:
            ValueError: it is none of them.
            NotNow: not at the end of the message.
        """
        self._gate.check("recipients")
        if address not in self:
            raise ValueError(f"recipients.remove: {str(address)!r} is no recipient")
        self.discard(address)

    def discard(self, address: AddressLike) -> None:
        """Remove a recipient if it is one.

        Raises:
            NotNow: not at the end of the message.
        """
        self._gate.check("recipients")
        self._items = [one for one in self._items if one != address]

    def replace(self, old: AddressLike, new: AddressLike) -> None:
        """Put a recipient in the place of another.

        Raises:
            ValueError: *old* is none of them, or *new* could not be passed on.
            NotNow: not at the end of the message.
        """
        made = as_address(new)
        milter._nonempty_line("recipients.replace", "new", made.address)
        self.remove(old)
        self.add(made)

    def clear(self) -> None:
        """Remove all of them.

        Raises:
            NotNow: not at the end of the message.
        """
        self._gate.check("recipients")
        self._items = []

    def __contains__(self, address: object) -> bool:
        return any(one == address for one in self._items)

    def __iter__(self) -> Iterator[Address]:
        return iter(tuple(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Address:
        return self._items[index]

    def __repr__(self) -> str:
        return f"Recipients({[str(one) for one in self._items]!r})"
