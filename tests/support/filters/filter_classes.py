"""Filter classes of all kinds: filter_classes.py SOCKET CLASS.

What the methods get is said on standard output, a line for each call.
"""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

import Milter


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Accepting(Milter.Base):
    def eom(self) -> int:
        say("eom of", type(self).__name__)
        self.addheader("X-Class", type(self).__name__)
        return Milter.ACCEPT


# --- what is replaced while the filter runs -----------------------------------------------


class Second(Accepting):
    def header(self, field: str, value: str) -> int:
        say("header of Second", field)
        return Milter.CONTINUE


class Replaced(Accepting):
    """Installs another class while its own connection is open."""

    def eom(self) -> int:
        Milter.factory = Second
        return super().eom()


def replaced_connect(ctx: Any, hostname: str, family: int, address: Any) -> int:
    say("replaced connect_callback", hostname)
    return ORIGINALS["connect_callback"](ctx, hostname, family, address)


def replaced_negotiate(ctx: Any, options: list[int]) -> int:
    say("replaced negotiate_callback", len(options))
    return ORIGINALS["negotiate_callback"](ctx, options)


def replaced_close(ctx: Any) -> int:
    say("replaced close_callback")
    return ORIGINALS["close_callback"](ctx)


ORIGINALS = {
    name: getattr(Milter, name)
    for name in ("connect_callback", "negotiate_callback", "close_callback")
}


class Replacing(Accepting):
    """Replaces the package's functions while the filter runs."""

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        return Milter.CONTINUE

    def eom(self) -> int:
        Milter.connect_callback = replaced_connect
        Milter.negotiate_callback = replaced_negotiate
        Milter.close_callback = replaced_close
        return super().eom()


class Dropped(Accepting):
    """Puts nothing in the place of the connection's object."""

    made = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self.made)
        say("made", self.number)

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        self._ctx.setpriv(None)
        return Milter.CONTINUE

    def hello(self, hostname: str) -> int:
        say("hello", self.number)
        return Milter.CONTINUE


# --- inheritance and negotiation --------------------------------------------------------------


class Parent(Accepting):
    def header(self, field: str, value: str) -> int:
        say("header", field)
        return Milter.CONTINUE

    def close(self) -> int:
        Milter.factory = Child
        say("parent closed")
        return Milter.CONTINUE


class Child(Parent):
    """Overrides more than the class whose connections were negotiated first."""

    def envrcpt(self, to: str, *params: str) -> int:
        say("envrcpt", to)
        return Milter.CONTINUE

    def body(self, blk: bytes) -> int:
        say("body", len(blk))
        return Milter.CONTINUE


class LessChild(Child):
    """Turns off again what a base class handles."""

    @Milter.nocallback
    def header(self, field: str, value: str) -> int:
        say("header that is off", field)
        return Milter.CONTINUE

    def close(self) -> int:
        return Milter.CONTINUE


class WrongNoCallback(Accepting):
    @Milter.nocallback
    def header(self, field: str, value: str) -> int:
        return Milter.REJECT


class Symlists(Accepting):
    """Macro lists beside the other decorators, in either order."""

    @Milter.symlist("i", "{auth_authen}")
    @Milter.noreply
    def envfrom(self, f: str, *params: str) -> int:
        say("envfrom", self.getsymval("i"), self.getsymval("{auth_authen}"), self.getsymval("j"))
        return Milter.CONTINUE

    @Milter.noreply
    @Milter.symlist("{rcpt_addr}")
    @Milter.symlist("{rcpt_host}")
    def envrcpt(self, to: str, *params: str) -> int:
        say("envrcpt", self.getsymval("{rcpt_addr}"), self.getsymval("{rcpt_host}"))
        return Milter.CONTINUE

    @Milter.symlist()
    @Milter.decode("bytes")
    def hello(self, hostname: str) -> int:
        say("hello", self.getsymval("{tls_version}"))
        return Milter.CONTINUE


class FailingSilently(Accepting):
    """Raises where the MTA waits for no reply."""

    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        say("header", field)
        if value == "fail":
            raise LookupError("raised in a method without reply")
        return Milter.CONTINUE

    @Milter.noreply
    def body(self, blk: bytes) -> int:
        say("body")
        return Milter.CONTINUE


class WrongNoReply(Accepting):
    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        return Milter.REJECT


class NoReplyAbove(Accepting):
    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        say("header", field)
        return Milter.CONTINUE


class NoReplyTwice(NoReplyAbove):
    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        return super().header(field.upper(), value)


class FailingNegotiation(Accepting):
    @classmethod
    def protocol_mask(klass) -> int:
        raise LookupError("raised in negotiation")

    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        say("header", field)
        return Milter.CONTINUE


class Everything(Accepting):
    """Overrides every callback; says the steps that were agreed."""

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        say("connect", hostname, family, hostaddr, f"{self._protocol:#x} {self._actions:#x}")
        return Milter.CONTINUE

    def hello(self, hostname: str) -> int:
        say("hello", hostname)
        return Milter.CONTINUE

    @Milter.noreply
    def envfrom(self, f: str, *params: str) -> int:
        say("envfrom", f, *params)
        return Milter.CONTINUE

    def envrcpt(self, to: str, *params: str) -> int:
        say("envrcpt", to, *params, "mailer", self.getsymval("{rcpt_mailer}"))
        return Milter.CONTINUE

    def data(self) -> int:
        say("data")
        return Milter.CONTINUE

    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        say("header", field, value)
        return Milter.CONTINUE

    def eoh(self) -> int:
        say("eoh")
        return Milter.CONTINUE

    def body(self, blk: bytes) -> int:
        say("body", blk)
        return Milter.CONTINUE

    def unknown(self, cmd: str) -> int:
        say("unknown", cmd)
        return Milter.CONTINUE

    def abort(self) -> int:
        say("abort")
        return Milter.CONTINUE

    def close(self) -> int:
        say("close")
        return Milter.CONTINUE


@Milter.rejected_recipients
class Rejected(Everything):
    pass


# --- text and bytes ------------------------------------------------------------------------------


def decoding(strategy: str) -> type[Milter.Base]:
    class Decoding(Accepting):
        @Milter.decode(strategy)
        def envfrom(self, f: Any, *params: Any) -> int:
            say("envfrom", *map(ascii, (f, *params)))
            return Milter.CONTINUE

        @Milter.decode(strategy)
        def envrcpt(self, to: Any, *params: Any) -> int:
            say("envrcpt", *map(ascii, (to, *params)))
            return Milter.CONTINUE

        @Milter.decode(strategy)
        def header(self, field: str, value: Any) -> int:
            say("header", ascii(field), ascii(value))
            return Milter.CONTINUE

    return Decoding


class OverridesBytes(Accepting):
    def envfrom_bytes(self, *b: bytes) -> int:
        say("envfrom_bytes", *b)
        return Milter.CONTINUE

    def header_bytes(self, fld: str, val: bytes) -> int:
        say("header_bytes", fld, val)
        return Milter.CONTINUE


class AssignsBytes(Accepting):
    def __init__(self) -> None:
        self.header_bytes = self.header
        self.envrcpt_bytes = self.envrcpt

    def header(self, field: str, value: Any) -> int:
        say("header", field, ascii(value))
        return Milter.CONTINUE

    def envrcpt(self, to: Any, *params: Any) -> int:
        say("envrcpt", ascii(to))
        return Milter.CONTINUE


class RoundTrip(Milter.Base):
    """Writes every header back as it came."""

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        self.headers: list[tuple[str, str]] = []
        return Milter.CONTINUE

    def header(self, field: str, value: str) -> int:
        self.headers.append((field, value))
        return Milter.CONTINUE

    def eom(self) -> int:
        seen: dict[str, int] = {}
        for field, value in self.headers:
            seen[field] = seen.get(field, 0) + 1
            self.chgheader(field, seen[field], value)
            self.addheader("X-" + field, value)
        return Milter.ACCEPT


@Milter.header_leading_space
class ExactRoundTrip(RoundTrip):
    pass


# --- actions ---------------------------------------------------------------------------------


class TriesAll(Milter.Base):
    """Tries each action, and says which were refused, and by what."""

    def eom(self) -> int:
        for name, arguments in (
            ("addheader", ("X-A", "a")),
            ("chgheader", ("Subject", 1, "changed")),
            ("addrcpt", ("<a@example.com>",)),
            ("addrcpt", ("<p@example.com>", ["NOTIFY=NEVER", b"ORCPT=rfc822;x"])),
            ("delrcpt", ("<r@example.com>",)),
            ("chgfrom", ("<n@example.com>", "RET=HDRS")),
            ("replacebody", ("text\r\n",)),
            ("quarantine", ("held",)),
        ):
            try:
                getattr(self, name)(*arguments)
            except Milter.DisabledAction as exc:
                say(f"{name} {len(arguments)}: {isinstance(exc, RuntimeError)} {exc}")
            else:
                say(f"{name} {len(arguments)}: done")
        return Milter.ACCEPT


class ReturnsQuarantine(Milter.Base):
    def eom(self) -> int:
        return Milter.QUARANTINE


class Quarantines(Milter.Base):
    def eom(self) -> int:
        self.quarantine("to be looked at")
        return Milter.ACCEPT


class Rejecting(Milter.Base):
    def envrcpt(self, to: str, *params: str) -> int:
        if "plain" in to:
            self.setreply("550", "5.7.1")
        elif "lines" in to:
            self.setreply("550", "5.7.1", "one", "two: 100%%", "three")
        elif "keyword" in to:
            self.setreply(rcode="451", xcode="4.7.1", msg="later")
            return Milter.TEMPFAIL
        elif "percent" in to:
            try:
                self.setreply("550", "5.7.1", "100% wrong")
            except ValueError as exc:
                say("refused:", exc)
        else:
            return Milter.CONTINUE
        return Milter.REJECT


class Skipping(Milter.Base):
    def header(self, field: str, value: str) -> int:
        say("header", field)
        return Milter.CONTINUE

    def body(self, blk: bytes) -> int:
        say("body", len(blk))
        return Milter.SKIP


class ZeroIndex(Milter.Base):
    def eom(self) -> int:
        self.chgheader("Subject", 0, "zero")
        self.addheader("X-Top", "top", 0)
        return Milter.ACCEPT


class CloseFails(Accepting):
    def close(self) -> int:
        raise LookupError("raised in close")


class Logging(Milter.Milter):
    pass


CLASSES = {
    name: thing
    for name, thing in list(globals().items())
    if isinstance(thing, type) and issubclass(thing, Milter.Base)
}

if __name__ == "__main__":
    chosen, _, strategy = sys.argv[2].partition(":")
    Milter.factory = decoding(strategy) if strategy else CLASSES[chosen]
    Milter.runmilter("classes", sys.argv[1])
