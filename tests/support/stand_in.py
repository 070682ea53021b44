"""A message, and a filter that notes what comes, for tests of the context's stand-in."""

from __future__ import annotations

import io
from typing import ClassVar

from milter import CONTINUE

import Milter

MESSAGE = (
    b"Received: by mx\n"
    b"From: a@b\n"
    b"Subject:  old\n\tfolded\n"
    b"X-Twice: 1\n"
    b"x-twice:2\n"
    b"To: c@d\n"
    b"\n"
    b"line one\nline two\n"
)


def fed(ctx, message=MESSAGE, *args):
    """The verdict on a message."""
    return ctx._feedFile(io.BytesIO(message), *args)


class Logger(Milter.Base):
    """A filter that notes what comes; ``verdicts`` holds what it returns where not CONTINUE."""

    verdicts: ClassVar[dict[str, object]] = {}

    def __init__(self):
        self.seen = []

    def _note(self, name, *args):
        self.seen.append((name, *args))
        return self.verdicts.get(name, CONTINUE)

    def connect(self, *args):
        return self._note("connect", *args)

    def hello(self, *args):
        return self._note("hello", *args)

    def envfrom(self, *args):
        return self._note("envfrom", *args)

    def envrcpt(self, *args):
        return self._note("envrcpt", *args)

    def data(self):
        return self._note("data")

    def header(self, *args):
        return self._note("header", *args)

    def eoh(self):
        return self._note("eoh")

    def body(self, blk):
        return self._note("body", blk)

    def unknown(self, cmd):
        return self._note("unknown", cmd)

    def eom(self):
        return self._note("eom")

    def abort(self):
        return self._note("abort")

    def close(self):
        return self._note("close")
