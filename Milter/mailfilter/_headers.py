"""The headers of a message: an ordered multi-dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar, Union, overload

import milter

from . import _text
from ._errors import Gate

Value = Union[str, bytes]

_T = TypeVar("_T")


class Header:
    """One header of a message.

    Its value can be set: ``header.value = "…"``.
    """

    __slots__ = ("_gate", "_lower", "_name", "_original", "_value", "_wsp")

    def __init__(
        self, name: bytes, value: bytes, original: bytes | None, gate: Gate, wsp: bytes = b""
    ) -> None:
        # What stands after the colon, with LF at its folds.
        self._value = value
        self._original = original
        self._name = name
        self._lower = name.lower()
        self._gate = gate
        self._wsp = wsp  # white space before the colon

    @property
    def name(self) -> str:
        """Its name, as it is spelled."""
        return self._name.decode("utf-8", "surrogateescape")

    @property
    def value(self) -> str:
        """Its value as text: folds undone, RFC 2047 words decoded.

        Setting it encodes what needs it and folds at 78 columns; bytes, and text with folds of its
        own, are taken as they are.
        """
        return _text.decoded(self._value)

    @value.setter
    def value(self, value: Value) -> None:
        self._gate.check("header.value")
        self._value = _text.encoded("header.value", self._name, value)

    @property
    def raw(self) -> bytes:
        """All of it as it stands in the message, with CRLF at its folds and none at its end."""
        return self._line.replace(b"\n", b"\r\n")

    @property
    def _line(self) -> bytes:
        return self._name + self._wsp + b":" + self._value

    @property
    def is_new(self) -> bool:
        """Whether it was added, and did not come with the message."""
        return self._original is None

    def __repr__(self) -> str:
        return f"<Header {self.name}: {self.value}>"


NameOrHeader = Union[str, Header]


class Headers:
    """The headers of a message, in order; names without regard to case.

    ``headers["Subject"]`` is the first one's text; setting it changes that one, or appends.
    Iterating gives `Header` objects. They can be changed at the end of the message.
    """

    __slots__ = ("_before", "_gate", "_items")

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]] = (), gate: Gate | None = None) -> None:
        """Take what came over the wire: names, and what stands after the colon, with LF folds."""
        self._gate = gate = gate or Gate()
        self._items = [Header(name, value, value, gate) for name, value in pairs]
        for header in self._items:
            if header._name.endswith((b" ", b"\t")):
                bare = header._name.rstrip(b" \t")
                header._wsp = header._name[len(bare) :]
                header._name, header._lower = bare, bare.lower()
        self._before = self._items[:]

    # Reading.

    @overload
    def __getitem__(self, key: str) -> str: ...
    @overload
    def __getitem__(self, key: int) -> Header: ...
    def __getitem__(self, key: str | int) -> str | Header:
        """The text of the first header of a name, or the header at a position.

        Any message may lack any header, so that one that is not there is empty text, and no
        exception; ``in`` and `get` tell the difference.

        Raises:
            IndexError: there is no such position.
        """
        if isinstance(key, int):
            return self._items[key]
        found = self.first(key)
        return "" if found is None else found.value

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: _T) -> str | _T: ...
    def get(self, name: str, default: object = None) -> object:
        """The text of the first header of a name, or the default."""
        found = self.first(name)
        return default if found is None else found.value

    def get_all(self, name: str) -> list[str]:
        """The texts of all headers of a name, from the top."""
        return [header.value for header in self.find(name)]

    def first(self, name: str) -> Header | None:
        """The first header of a name, None where there is none."""
        wanted = _key(name)
        for header in self._items:
            if header._lower == wanted:
                return header
        return None

    def find(self, name: str) -> list[Header]:
        """All headers of a name, from the top."""
        wanted = _key(name)
        return [header for header in self._items if header._lower == wanted]

    def __contains__(self, name: object) -> bool:
        if isinstance(name, Header):
            return any(header is name for header in self._items)
        return isinstance(name, str) and self.first(name) is not None

    def __iter__(self) -> Iterator[Header]:
        return iter(tuple(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def as_bytes(self) -> bytes:
        """All of them as they stand in the message, CRLF at the end of each line."""
        return b"".join(header._line + b"\n" for header in self._items).replace(b"\n", b"\r\n")

    def __repr__(self) -> str:
        return f"<Headers {[header.name for header in self._items]!r}>"

    # Changing.

    def __setitem__(self, name: str, value: Value) -> None:
        """Change the first header of a name, or append one.

        Raises:
            ValueError: what could forge a header (``milter.InvalidArgument``).
            NotNow: not at the end of the message.
        """
        found = self.first(name)
        if found is None:
            self.add(name, value)
        else:
            self._gate.check("headers")
            found._value = _text.encoded("headers", found._name, value)

    def __delitem__(self, name: str) -> None:
        """Delete all headers of a name, if there are any.

        Raises:
            NotNow: not at the end of the message.
        """
        self.delete(name)

    def add(self, name: str, value: Value) -> Header:
        """Append a header.

        Args:
            name: its name.
            value: its text; or bytes, which are taken as they are.

        Returns:
            The new header.

        Raises:
            ValueError: what could forge a header (``milter.InvalidArgument``).
            NotNow: not at the end of the message.
        """
        return self.insert(len(self._items), name, value)

    def insert(self, position: int, name: str, value: Value) -> Header:
        """Insert a header.

        Args:
            position: where it will be, from 0 for the top; as of ``list.insert``. The MTA's own
                ``Received`` is not counted: a header on top goes above it.
            name: as of `add`.
            value: as of `add`.

        Returns:
            The new header.

        Raises:
            ValueError: what could forge a header (``milter.InvalidArgument``).
            NotNow: not at the end of the message.
        """
        self._gate.check("headers")
        wire = milter._header_name("headers", name)
        made = Header(wire, _text.encoded("headers", wire, value), None, self._gate)
        self._items.insert(position, made)
        return made

    def insert_before(self, where: NameOrHeader, name: str, value: Value) -> Header:
        """Insert a header before the first one of a name, or before a header.

        Raises:
            KeyError: there is none of that name.
            ValueError: it is no header of this message, or what could forge a header.
            NotNow: not at the end of the message.
        """
        return self.insert(self._positions(where)[0], name, value)

    def insert_after(self, where: NameOrHeader, name: str, value: Value) -> Header:
        """Insert a header after the last one of a name, or after a header.

        Raises:
            KeyError: there is none of that name.
            ValueError: it is no header of this message, or what could forge a header.
            NotNow: not at the end of the message.
        """
        return self.insert(self._positions(where)[-1] + 1, name, value)

    def replace(self, name: str, value: Value) -> Header:
        """Have one header of a name and no more: the first is changed, others are deleted.

        Returns:
            That header, appended where there was none.

        Raises:
            ValueError: what could forge a header (``milter.InvalidArgument``).
            NotNow: not at the end of the message.
        """
        found = self.find(name)
        if not found:
            return self.add(name, value)
        found[0].value = value
        for header in found[1:]:
            self.delete(header)
        return found[0]

    def delete(self, which: NameOrHeader) -> int:
        """Delete all headers of a name, or one header.

        Returns:
            How many were deleted.

        Raises:
            ValueError: it is no header of this message.
            NotNow: not at the end of the message.
        """
        self._gate.check("headers")
        if isinstance(which, Header):
            self._items.pop(self._positions(which)[0])
            return 1
        wanted = _key(which)
        left = [header for header in self._items if header._lower != wanted]
        count = len(self._items) - len(left)
        self._items[:] = left
        return count

    def _positions(self, which: NameOrHeader) -> list[int]:
        if isinstance(which, Header):
            found = [at for at, header in enumerate(self._items) if header is which]
            if not found:
                raise ValueError(f"headers: {which!r} is no header of this message")
            return found
        wanted = _key(which)
        found = [at for at, header in enumerate(self._items) if header._lower == wanted]
        if not found:
            raise KeyError(which)
        return found


def _key(name: str) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"headers: name: must be str, not {type(name).__name__}: {name!r}")
    return name.encode("utf-8", "surrogateescape").lower()
