"""Where ``send`` gets messages from: files, mbox files, directories and Maildirs."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO

STANDARD_INPUT = "-"

# What a mail program writes before each message: a sender, and a date that ends in a year.
_FROM_LINE = re.compile(rb"From .*\d{4}\s*$")
_QUOTED_FROM = re.compile(rb">+From ")


@dataclasses.dataclass(frozen=True)
class Source:
    """A message, or why it cannot be read.

    :ivar name: where it is from: a path, of an mbox file with ``#`` and the message's number.
    """

    name: str
    data: bytes = b""
    error: str | None = None


def is_one(names: list[str]) -> bool:
    """Whether these arguments name a single message: a file that holds one alone."""
    if len(names) != 1 or os.path.isdir(names[0]):
        return False
    return len(list(itertools.islice(find(names), 2))) == 1 if _is_mbox(names[0]) else True


def find(names: Iterable[str]) -> Iterator[Source]:
    """The messages that arguments stand for, in order.

    A directory stands for all files in it and below, sorted by their paths, without those whose
    names begin with a dot; a Maildir (``cur`` and ``new``) for what is in these two.
    """
    for name in names:
        if name != STANDARD_INPUT and os.path.isdir(name):
            yield from _of_directory(name)
        else:
            yield from _of_file(name)


def _of_directory(name: str) -> Iterator[Source]:
    try:
        paths = sorted(_files(name))
    except OSError as exc:
        yield _unreadable(name, exc)
        return
    if not paths:
        yield Source(name, error=f"there is no message in the directory {name!r}")
    for path in paths:
        yield from _of_file(path)


def _files(directory: str) -> Iterator[str]:
    def give_up(error: OSError) -> None:
        raise error

    for place, below, names in os.walk(directory, onerror=give_up):
        below[:] = [name for name in below if not name.startswith(".")]
        if {"cur", "new"} <= set(below):
            below[:], names = ["cur", "new"], []
        for name in names:
            path = os.path.join(place, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _of_file(name: str) -> Iterator[Source]:
    if name == STANDARD_INPUT and sys.stdin is None:
        yield Source(name, error="cannot read the message '-': standard input is closed")
        return
    try:
        if name == STANDARD_INPUT:
            yield Source(name, sys.stdin.buffer.read())
        elif _is_mbox(name):
            with open(name, "rb") as file:
                for number, data in enumerate(split_mbox(file), 1):
                    yield Source(f"{name}#{number}", data)
        else:
            with open(name, "rb") as file:
                yield Source(name, file.read())
    except OSError as exc:
        yield _unreadable(name, exc)


def _unreadable(name: str, error: OSError) -> Source:
    return Source(name, error=f"cannot read the message {name!r}: {error.strerror}")


def _is_mbox(name: str) -> bool:
    """Whether a file begins as an mbox does; a pipe, which can be read once, is none."""
    try:
        if not os.path.isfile(name):
            return False
        with open(name, "rb") as file:
            return _FROM_LINE.match(file.readline(1000)) is not None
    except OSError:
        return False


def split_mbox(file: BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    """The messages of an mbox file, one after the other, without their From lines.

    A From line begins a message at the file's start and after an empty line; the empty line before
    it belongs to neither.  One ``>`` goes from lines that begin with ``>From `` or ``>>From ``.
    """
    message: list[bytes] | None = None
    for line in file:
        if _FROM_LINE.match(line) and (not message or message[-1] in (b"\n", b"\r\n")):
            if message is not None:
                yield b"".join(message[:-1])
            message = []
        elif message is not None:
            message.append(line[1:] if _QUOTED_FROM.match(line) else line)
    if message is not None:
        last = message[:-1] if message and message[-1] in (b"\n", b"\r\n") else message
        yield b"".join(last)
