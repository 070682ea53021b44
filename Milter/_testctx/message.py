"""A message that a filter gets and changes, header by header."""

from __future__ import annotations

import re
from typing import Any, Union

import milter

#: What stands for text in calls; str goes out as UTF-8 with ``surrogateescape``.
Text = Union[str, bytes]


def as_bytes(value: Text) -> bytes:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def as_text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


class StoredMessage:
    """A message with its headers one by one, each as it stood, so that edits leave the rest."""

    def __init__(self) -> None:
        self.eol = b"\n"
        #: (name, the whole header with its line ends), from the top.
        self.fields: list[tuple[bytes, bytes]] = []
        self.separator = b""
        self.body = bytearray()
        self.new_body: bytearray | None = None

    def _field(self, name: bytes, raw: bytes) -> tuple[bytes, bytes]:
        """A header of this name with ``raw``, which has LF folds, after its colon."""
        return name, name + b":" + raw.replace(b"\n", self.eol) + self.eol

    def insert(self, at: int, name: bytes, raw: bytes) -> None:
        """Put a header at a place among all, or at the end where there are fewer."""
        if self.fields and not self.fields[-1][1].endswith(b"\n"):
            last, whole = self.fields[-1]
            self.fields[-1] = last, whole + self.eol
        self.fields.insert(at, self._field(name, raw))

    def append(self, name: bytes, raw: bytes) -> None:
        """Put a header at the end."""
        self.insert(len(self.fields), name, raw)

    def change(self, name: bytes, idx: int, raw: bytes | None) -> None:
        """Change, delete (None) or, beyond the last of that name, append a header.

        MTAs take index 0 for the first.
        """
        places = [i for i, field in enumerate(self.fields) if field[0].lower() == name.lower()]
        if max(idx, 1) <= len(places):
            at = places[max(idx, 1) - 1]
            self.fields[at : at + 1] = [] if raw is None else [self._field(name, raw)]
        elif raw is not None:
            self.append(name, raw)

    def as_bytes(self) -> bytes:
        """The whole message as it stands now."""
        body = self.body if self.new_body is None else self.new_body
        # MTAs mend what lacks the empty line after the headers.
        separator = self.separator or (self.eol if self.fields and body else b"")
        return b"".join(whole for _, whole in self.fields) + separator + body


class AssignedMessage(StoredMessage):
    """A message object that a test has assigned; what is done to the message is done to it."""

    def __init__(self, message: Any) -> None:
        super().__init__()
        self.message = message

    @staticmethod
    def _pair(name: bytes, raw: bytes) -> tuple[str, str]:
        return as_text(name), as_text(raw[1:] if raw.startswith(b" ") else raw)

    def insert(self, at: int, name: bytes, raw: bytes) -> None:
        fields = self.message.items()
        fields.insert(at, self._pair(name, raw))
        self._write(fields)

    def append(self, name: bytes, raw: bytes) -> None:
        field, value = self._pair(name, raw)
        self.message[field] = value

    def change(self, name: bytes, idx: int, raw: bytes | None) -> None:
        fields = self.message.items()
        wanted = as_text(name).lower()
        places = [i for i, (field, _) in enumerate(fields) if field.lower() == wanted]
        if max(idx, 1) <= len(places):
            at = places[max(idx, 1) - 1]
            fields[at : at + 1] = [] if raw is None else [self._pair(name, raw)]
            self._write(fields)
        elif raw is not None:
            self.append(name, raw)

    def _write(self, fields: list[tuple[str, Any]]) -> None:
        for name in set(self.message.keys()):
            del self.message[name]
        for name, value in fields:
            self.message[name] = value

    def as_bytes(self) -> bytes:
        whole: bytes = self.message.as_bytes()
        if self.new_body is None:
            return whole
        empty_line = re.search(rb"(\r?\n)\1", whole)
        return whole[: empty_line.end() if empty_line else len(whole)] + self.new_body


def _is_header_name(name: bytes) -> bool:
    try:
        milter._header_name("header", name)
    except milter.InvalidArgument:
        return False
    return True


def split_message(data: bytes) -> tuple[StoredMessage, list[tuple[bytes, bytes]], bytes]:
    """Take a message apart without changing a byte of it.

    Args:
        data: the message, with any line ends. A line ``From …`` of a mailbox file at its
            start is dropped.

    Returns:
        The message with its headers but no body yet; the headers, each a name and everything
        after its colon with LF folds; the body.
    """
    if data.startswith(b"From "):
        data = data.partition(b"\n")[2]
    stored = StoredMessage()
    if data.partition(b"\n")[0].endswith(b"\r"):
        stored.eol = b"\r\n"
    # Of each header its name, its lines after the colon, and where it begins.
    found: list[tuple[bytes, list[bytes], int]] = []
    body = len(data)
    at = 0
    while at < len(data):
        end = data.find(b"\n", at) + 1 or len(data)
        whole = data[at:end]
        line = whole[:-1] if whole.endswith(b"\n") else whole
        line = line[:-1] if line.endswith(b"\r") else line
        if not line:
            stored.separator = whole
            body = end
            break
        if line[:1] in (b" ", b"\t") and found:
            found[-1][1].append(line)
        else:
            name, colon, raw = line.partition(b":")
            name = name.rstrip(b" \t")
            if not colon or not _is_header_name(name):
                body = at
                break
            found.append((name, [raw], at))
        at = end
    ends = [begin for _, _, begin in found[1:]] + [at]
    stored.fields = [(name, data[begin:end]) for (name, _, begin), end in zip(found, ends)]
    fields = [(name, b"\n".join(lines)) for name, lines, _ in found]
    return stored, fields, data[body:]
