"""The filter that fuzz/wire.c talks to: wire_filter.py SOCKET FINDINGS [--bare|--tell[-all] NAME].

It does what the packets tell it. The last byte of a callback's arguments is the verdict: c, a,
r, t, d, s, n as libmilter's, R and T after a ``setreply``, x raises, z returns rubbish. The
sender's address holds the verdicts of the steps without arguments, and how many actions ``eom``
is to call with what it has seen.

Whatever an action raises that is not documented, and whatever is logged that was not told to
happen, is written to the file FINDINGS. With ``--bare`` the callbacks are set on the extension
itself; otherwise they are methods of ``Milter.Base``, in several ways to decode. With ``--tell``
it is the one class of that name, or ``bare``, and what it saw of a connection goes into a header
at the end of each message, so that two filters that answer alike also saw the same; with
``--tell-all`` it is printed too.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import sys
import traceback
import warnings
import zlib
from typing import Any

import milter

import Milter

VERDICTS = {
    "c": milter.CONTINUE,
    "a": milter.ACCEPT,
    "r": milter.REJECT,
    "t": milter.TEMPFAIL,
    "d": milter.DISCARD,
    "s": milter.SKIP,
    "n": milter.NOREPLY,
}
RUBBISH: tuple[Any, ...] = (None, "c", 99, -1, 1 << 70, 0.0, b"", milter.ALL_OPTS)
REPLY_STEPS = (
    milter.P_NR_CONN,
    milter.P_NR_HELO,
    milter.P_NR_MAIL,
    milter.P_NR_RCPT,
    milter.P_NR_DATA,
    milter.P_NR_UNKN,
    milter.P_NR_EOH,
    milter.P_NR_HDR | milter.P_NR_BODY,
)
FEATURES = milter.P_SKIP | milter.P_RCPT_REJ | milter.P_HDR_LEADSPC
# What the documentation says that an action may raise.
DOCUMENTED = (milter.error, TypeError, ValueError, Milter.DisabledAction)
# The MTA sent something before anything that makes a filter object; it was told to try later.
NO_OBJECT = "'NoneType' object has no attribute"


class Planned(Exception):
    """Raised because a packet said so."""


MACROS = ("i", "{i}", "j", "{fuzz}", "{client_addr}", "_", "{}")

PLANTED = os.environ.get("FUZZ_PLANT", "") == os.environ.get("PYMILTER_ENGINE", "none")

findings = sys.stderr
tells: Any = False
counts: collections.Counter[str] = collections.Counter()
refused = 0
done = 0


def found(what: str) -> None:
    """Write a finding down, once."""
    counts[what] += 1
    if counts[what] == 1:
        findings.write(what + "\n")
        findings.flush()


class Watch(logging.Handler):
    """Looks at what is logged: nothing but what was told to happen may go wrong."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            exception = record.exc_info[1]
            if isinstance(exception, Planned):
                return
            if isinstance(exception, milter.error) and "callback returned" in str(exception):
                return
            if isinstance(exception, AttributeError) and str(exception).startswith(NO_OBJECT):
                return
            found(f"{text}\n{''.join(traceback.format_exception(*record.exc_info))}")
        elif (
            "libmilter drops that reply" not in text
            and "runs as root" not in text
            and ("the engine is" not in text)
        ):
            found(f"logged: {record.levelname} {text}")


class Session:
    """What the packets say, for one connection; the context is ``self._ctx``."""

    _ctx: Any
    _actions: int
    _protocol: int

    def __init__(self) -> None:
        self.seen: list[Any] = ["x", b"y"]
        self.script = "cccc"
        self.count = self.seed = self.noted = 0

    def note(self, *values: Any) -> None:
        """Add to what is told at the end of the message."""
        if tells:
            macros = [self._ctx.getsymval(name) for name in MACROS] if self._ctx else None
            text = ascii((values, macros))
            self.noted = zlib.crc32(text.encode(), self.noted)
            if tells == "all":
                print("saw", text, flush=True)

    def remember(self, value: Any) -> None:
        self.seen.append(value)
        if len(self.seen) > 12:
            del self.seen[:6]

    def pick(self) -> Any:
        """One of the values seen lately, as it is or in another type."""
        self.seed = (self.seed * 1103515245 + 12345) & 0x7FFFFFFF
        number = self.seed >> 8
        value = self.seen[number % len(self.seen)]
        kind = (number >> 8) % 24
        if kind == 0 and isinstance(value, str):
            return value.encode("utf-8", "surrogateescape")
        if kind == 1 and isinstance(value, bytes):
            return value.decode("latin-1")
        if kind == 2:
            return value[:5]
        if kind == 3:
            return value[:0] + value[-1:] * 70_000 if number % 16 == 0 else value
        if kind == 4:
            return (None, 7, ["a", "b"], {"a": "b"}, "\ud800", "\0", bytearray(b"z"), "é\r\n x")[
                (number >> 16) % 8
            ]
        if kind == 5:
            return "X-Name"
        return value

    def number(self) -> Any:
        self.pick()
        return (0, 1, -1, 2**31 - 1, 2**31, 2**63, 2**64, -(2**31) - 1, 3, "1", None, 1.5)[
            (self.seed >> 8) % 12
        ]

    def act(self, which: int) -> None:
        """One action, with whatever arguments."""
        pick, who = self.pick, self.target
        if which == 0:
            who.addheader(pick(), pick())
        elif which == 1:
            who.addheader(pick(), pick(), self.number())
        elif which == 2:
            who.chgheader(pick(), self.number(), pick())
        elif which == 3:
            who.addrcpt(pick())
        elif which == 4:
            who.addrcpt(pick(), pick())
        elif which == 5:
            who.delrcpt(pick())
        elif which == 6:
            who.replacebody(pick())
        elif which == 7:
            who.chgfrom(pick(), pick())
        elif which == 8:
            who.quarantine(pick())
        elif which == 9:
            who.progress()
        elif which == 10:
            who.setreply(pick(), pick(), pick())
        elif which == 11:
            who.setreply("550", "5.7.1", *(pick() for _ in range(self.seed % 40)))
        elif which == 12:
            who.getsymval(pick())
        elif which == 13:
            who.setsymlist(self.number(), pick())
        elif which == 14:
            who.addheader("X-Fuzz", pick())
        else:
            who.addheader(pick(), "value")

    def act_safely(self, which: int) -> None:
        global done, refused
        try:
            self.act(which)
            done += 1
        except DOCUMENTED:
            refused += 1
        except Exception:  # noqa: BLE001 - to find these is what it is for
            found(f"action {which}:\n{traceback.format_exc()}")

    @property
    def target(self) -> Any:
        """Whose methods are called: the filter object's own, or the context's."""
        return self if isinstance(self, Milter.Base) else self._ctx

    def verdict(self, letter: str) -> Any:
        if letter == "c":
            return milter.CONTINUE
        if letter in "RT":
            code = "5" if letter == "R" else "4"
            try:
                self.target.setreply(code + "50", code + ".7.1", self.pick())
            except DOCUMENTED:
                pass
            except Exception:  # noqa: BLE001 - as above
                found(f"setreply:\n{traceback.format_exc()}")
            return milter.REJECT if letter == "R" else milter.TEMPFAIL
        if letter == "x":
            raise Planned
        if letter == "z":
            return RUBBISH[self.seed % len(RUBBISH)]
        return VERDICTS.get(letter, milter.CONTINUE)

    def take(self, *values: Any) -> Any:
        """A step with arguments: look at them all, and do what the last byte says."""
        self.note(*values)
        letter = "c"
        for value in values:
            if value:
                last = value[-1:]
                letter = last if isinstance(last, str) else last.decode("latin-1")
                self.remember(value)
            else:
                letter = "c"
        self.seed ^= len(self.seen) + len(values)
        if self.seed % 16 == 3:
            self.act_safely(self.seed % 14)  # refused: this is not the end of the message
        return self.verdict(letter)

    def negotiate(self, opts: list[int]) -> int:
        selector = opts[0] >> 9
        opts[0] &= 0x1FF
        if selector & 0xE00 == 0xE00:
            if selector & 1:
                raise Planned
            return milter.REJECT
        if selector & 2:
            opts[0] &= ~(selector >> 2 & 0xFF)
        self._actions = opts[0]
        if selector & 1 and opts[0] & milter.SETSYMLIST:
            self.target.setsymlist(milter.M_CONNECT, "j {fuzz}")
            self.target.setsymlist(milter.M_ENVFROM, "i")
            self.act_safely(13)
        wanted = opts[1] & FEATURES
        if selector & 0x100:
            for bit, step in enumerate(REPLY_STEPS):
                if selector & 1 << bit:
                    wanted |= step
        opts[1] = wanted
        self._protocol = wanted
        return milter.CONTINUE

    def connect(self, hostname: str, family: int, hostaddr: Any) -> Any:
        self.note(family, hostaddr)
        return self.take(hostname)

    def hello(self, hostname: str) -> Any:
        return self.take(hostname)

    def envfrom(self, f: Any, *params: Any) -> Any:
        text = f.decode("latin-1") if isinstance(f, bytes) else f
        try:
            self.script, self.count, self.seed = text[1:5], int(text[5]), int(text[6:14], 16)
        except (ValueError, IndexError):
            self.script, self.count = "cccc", 3
        self.script = self.script.ljust(4, "c")
        return self.take(f, *params)

    def envrcpt(self, to: Any, *params: Any) -> Any:
        return self.take(to, *params)

    def data(self) -> Any:
        self.note("data")
        self.remember(self.target.getsymval("{fuzz}") or "")
        return self.verdict(self.script[0])

    def header(self, field: Any, value: Any) -> Any:
        self.remember(field)
        return self.take(value)

    def eoh(self) -> Any:
        self.note("eoh")
        self.target.getsymval("i")
        return self.verdict(self.script[1])

    def body(self, blk: bytes) -> Any:
        return self.take(blk)

    def eom(self) -> Any:
        self.note("eom")
        self.target.getsymval("{nothing}")
        if self.count == 9:
            self.target.addheader("X-Honest", "yes")
            return milter.CONTINUE
        for _ in range(self.count):
            self.pick()
            self.act_safely((self.seed >> 10) % 16)
        if tells and self._ctx.actions & milter.ADDHDRS:
            if PLANTED:
                self.noted ^= 1  # what a test of the comparison looks for
            with contextlib.suppress(milter.error):  # the MTA has gone
                self.target.addheader("X-Noted", f"{self.noted:08x}")
        return self.verdict(self.script[2])

    def abort(self) -> Any:
        self.note("abort")
        if self.script[3] == "x":
            raise Planned
        return milter.CONTINUE

    def close(self) -> Any:
        if self.script[3] == "x":
            raise Planned
        return milter.CONTINUE

    def unknown(self, cmd: str) -> Any:
        return self.take(cmd)


class Escaped(Session, Milter.Base):
    """Text that is not UTF-8 comes with surrogates."""


class Bytes(Session, Milter.Base):
    """The envelope and the values of headers come as bytes."""

    envfrom = Milter.decode("bytes")(lambda self, *b: Session.envfrom(self, *b))
    envrcpt = Milter.decode("bytes")(lambda self, *b: Session.envrcpt(self, *b))
    header = Milter.decode("bytes")(lambda self, name, value: Session.header(self, name, value))


class Strict(Session, Milter.Base):
    """What is not UTF-8 comes as bytes."""

    envfrom = Milter.decode("strict")(lambda self, *b: Session.envfrom(self, *b))
    envrcpt = Milter.decode("strict")(lambda self, *b: Session.envrcpt(self, *b))
    header = Milter.decode("strict")(lambda self, name, value: Session.header(self, name, value))


class Replaced(Session, Milter.Base):
    """What is not UTF-8 is replaced; the header's form that gets bytes is overridden."""

    envfrom = Milter.decode("replace")(lambda self, *b: Session.envfrom(self, *b))
    envrcpt = Milter.decode("ignore")(lambda self, *b: Session.envrcpt(self, *b))

    def header_bytes(self, fld: str, val: bytes) -> Any:
        return Session.header(self, fld, val)


def method(name: str) -> Any:
    """A callback of the extension that calls the session's method of that name."""

    def call(ctx: Any, *args: Any) -> Any:
        session = ctx.getpriv()
        if session is None:
            session = Session()
            session._ctx = ctx
            ctx.setpriv(session)
        try:
            return getattr(session, name)(*args)
        finally:
            if name == "close":
                session._ctx = None

    return call


def run_bare(socket: str) -> None:
    for step in ("connect", "envfrom", "envrcpt", "header", "eoh", "body", "eom", "abort", "close"):
        getattr(milter, f"set_{step}_callback")(method(step))
    milter.set_helo_callback(method("hello"))
    milter.register(
        "fuzzed 100% ok",
        unknown=method("unknown"),
        data=method("data"),
        negotiate=method("negotiate"),
    )
    milter.setconn(socket)
    milter.opensocket(True)
    milter.main()


def main() -> None:
    global findings, tells
    socket, path, *flags = sys.argv[1:]
    tells = "all" if "--tell-all" in flags else "--tell" in flags
    findings = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    logging.basicConfig(handlers=[Watch()], level=logging.DEBUG, force=True)
    warnings.simplefilter("ignore", RuntimeWarning)  # the class of an enhanced code
    sys.unraisablehook = lambda what: found(f"unraisable: {what}")
    every = {each.__name__: each for each in (Escaped, Bytes, Strict, Replaced)}
    if flags and flags[-1] in ("--bare", "bare"):
        run_bare(socket)
    else:
        classes = itertools.cycle([every[flags[-1]]] if tells else every.values())
        Milter.factory = lambda: next(classes)()
        Milter.runmilter("fuzzed 100% ok", socket, 600)
    left = milter.getdiag()
    created = left.created
    if created != left.deleted or left.messages or left.inside:
        found(
            f"left over: contexts {created} - {left.deleted}, messages {left.messages}, "
            f"threads {left.inside}"
        )
    print(f"{created} contexts, actions: {done} done, {refused} refused as documented", flush=True)


if __name__ == "__main__":
    main()
