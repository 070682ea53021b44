"""Test filters without an MTA: the older way, a class mixed into the filter's own.

::

    class TestedMilter(TestBase, MyMilter):
        def __init__(self):
            TestBase.__init__(self)
            MyMilter.__init__(self)

    milter = TestedMilter()
    milter.setsymval("{auth_authen}", "batman")
    assert milter.connect() == Milter.CONTINUE
    with open("message.eml", "rb") as fp:
        assert milter.feedFile(fp) == Milter.ACCEPT
    assert milter._headerschanged

New tests are better off with :class:`Milter.testctx.TestCtx`, which leaves the filter's class
as it is. This one works through it and keeps to the same rules.
"""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any, cast

from ._base import Base, callback_steps
from ._borrowed import borrowed
from ._later import is_awaitable
from ._testctx.log import LazyLog
from .testctx import TestCtx

if TYPE_CHECKING:
    from milter import milterContext
    from typing_extensions import Buffer


if not TYPE_CHECKING:
    __getattr__ = borrowed(__name__, {"BytesIO": "io:BytesIO", "Milter": "Milter", "mime": "mime"})


class _HeldCtx(TestCtx):
    """A context whose filter object is there already."""

    def __init__(self, held: TestBase, logfile: str | os.PathLike[str]) -> None:
        super().__init__(logfile)
        self._held = held

    def _make_filter(self, opts: list[int]) -> Any:
        self._held._setctx(cast("milterContext", self))
        return self._held.negotiate(opts)


def _record(name: str) -> property:
    """A record of the stand-in, as an attribute of the filter."""

    def get(self: TestBase) -> Any:
        return getattr(self._standin, name)

    def put(self: TestBase, value: Any) -> None:
        setattr(self._standin, name, value)

    return property(get, put, doc=f"See ``Milter.testctx.TestCtx``, attribute ``{name}``.")


class TestBase(Base):
    """Mixin that plays the MTA for the filter class it is mixed into; it comes first.

    After ``connect`` and ``feedFile`` or ``feedMsg`` the records say what the filter did.
    They are those of :class:`Milter.testctx.TestCtx`, where each is described: ``_reply``,
    ``_sender``, ``_envfromchanged``, ``_delrcpt``, ``_headerschanged``, ``_bodyreplaced``,
    ``_body``, ``_msg``, ``_macros``, ``_symlist``, ``_opts``, ``_stage``, ``_quarantine``.
    ``_addrcpt`` has the addresses alone, without parameters.

    Attributes:
        logfp: the log that ``log`` writes to, a text file that is opened at the first line;
            None after ``_close``.
    """

    __test__ = False  # pytest takes the name for that of a test class

    def __init__(self, logfile: str | os.PathLike[str] = "test/milter.log") -> None:
        """Prepare the stand-in for the connection.

        Args:
            logfile: where ``log`` writes.
        """
        self.logfp: LazyLog | None = LazyLog(logfile)
        self._standin = _HeldCtx(self, logfile)
        self._connecting = False
        self._setctx(cast("milterContext", self._standin))

    _reply = _record("_reply")
    _sender = _record("_sender")
    _envfromchanged = _record("_envfromchanged")
    _delrcpt = _record("_delrcpt")
    _headerschanged = _record("_headerschanged")
    _bodyreplaced = _record("_bodyreplaced")
    _body = _record("_body")
    _msg = _record("_msg")
    _macros = _record("_macros")
    _symlist = _record("_symlist")
    _opts = _record("_opts")
    _stage = _record("_stage")
    _quarantine = _record("_quarantine")

    @property
    def _addrcpt(self) -> list[str]:
        """Each recipient of a call of ``addrcpt``."""
        return [recipient for recipient, _ in self._standin._addrcpt]

    @_addrcpt.setter
    def _addrcpt(self, recipients: list[str]) -> None:
        self._standin._addrcpt = [(recipient, None) for recipient in recipients]

    def _wanted_steps(self) -> int:
        # `connect` here plays the MTA; whether the callback is wanted, the filter's own says.
        return super()._wanted_steps() | callback_steps(super(), ["connect"])

    def log(self, *msg: object) -> None:
        """Write a line to the log file.

        Args:
            msg: any objects, written with spaces between them.
        """
        if self.logfp is not None:
            self.logfp.write(" ".join(map(str, msg)) + "\n")

    def setsymval(self, name: str, val: str | None) -> None:
        """Define a macro of the MTA.

        Args:
            name: its name, in braces where that is longer than one letter.
            val: its value; None makes it undefined again.
        """
        self._standin._setsymval(name, val)

    def connect(self, host: str = "localhost", helo: Any = "spamrelay", ip: Any = "1.2.3.4") -> int:
        """Play the begin of a session: negotiate, connect and HELO.

        Args:
            host: the client's name.
            helo: what it calls itself.
            ip: its address; see ``Milter.testctx.TestCtx._connect``.

        Returns:
            CONTINUE, or the verdict that ended the session.
        """
        if self._connecting:
            # The callback itself, on its way to the filter.
            self._connecting = False
            called: Any = super().connect(host, helo, ip)
            return called  # type: ignore[no-any-return]
        self._connecting = True
        try:
            return self._standin._connect(host, helo, ip)
        finally:
            self._connecting = False

    def feedFile(
        self,
        fp: IO[Any],
        sender: str = "spam@adv.com",
        rcpt: str = "victim@lamb.com",
        *rcpts: str,
    ) -> int:
        """Send a whole message; see ``Milter.testctx.TestCtx._feedFile``.

        After ``eom`` the filter's ``close`` is called too, as tests of this kind expect it.

        Args:
            fp: the message, a binary file.
            sender: the envelope sender.
            rcpt: the recipient.
            rcpts: further recipients.

        Returns:
            The verdict.
        """
        verdict = self._standin._feedFile(fp, sender, rcpt, *rcpts)
        if self._standin._body is not None:
            closed: Any = self.close()
            if is_awaitable(closed):
                self._standin._await(closed, "close")
        if self.logfp is not None:
            self.logfp.flush()
        return verdict

    def feedMsg(self, fname: str, sender: str = "spam@adv.com", *rcpts: str) -> int:
        """Send a message from a file in the directory ``test``.

        Args:
            fname: the file's name there.
            sender: the envelope sender.
            rcpts: the recipients; without any, that of ``feedFile``.

        Returns:
            The verdict.
        """
        with open(os.path.join("test", fname), "rb") as fp:
            return self.feedFile(fp, sender, *rcpts)

    def _close(self) -> None:
        """Close the log file."""
        if self.logfp is not None:
            self.logfp.close()
            self.logfp = None

    # Actions whose arguments have had other names here.

    def getsymval(self, name: str) -> str | None:
        """Look up a macro; see ``Milter.testctx.TestCtx.getsymval``.

        Args:
            name: its name.

        Returns:
            Its value, or None.
        """
        return super().getsymval(name)

    def setsymlist(self, stage: int, macros: str = "", *more: str) -> None:
        """Name the macros to be sent at a stage; see ``Base.setsymlist``.

        Args:
            stage: one of the M_* constants.
            macros: their names, or the first of them.
            more: the others.
        """
        super().setsymlist(stage, macros, *more)

    def replacebody(self, chunk: str | Buffer) -> None:
        """Replace the body; see ``Base.replacebody``.

        Args:
            chunk: the new body; further calls append.
        """
        super().replacebody(chunk)
