"""The real context's methods, for a filter under test: they note what they are asked for."""

from __future__ import annotations

import contextvars
import io
import time
from typing import TYPE_CHECKING, Any, cast

import milter

from .macros import CALLBACKS_OF_STAGES, STAGE_ORDER, is_sent, macro_name
from .message import AssignedMessage, StoredMessage, Text, as_bytes, as_text

if TYPE_CHECKING:
    from email.message import Message

    from typing_extensions import Buffer


class Context:
    """Methods and rules of ``milter.milterContext``, with a record of each.

    ``Milter.testctx.TestCtx`` adds the methods that drive a filter, and describes the records.
    """

    def __init__(self, offer: list[int]) -> None:
        """Make a context that no filter is attached to yet.

        Args:
            offer: what the MTA offers, ``[actions, steps, 0, 0]``.
        """
        self._opts: list[int] = offer
        self._offer: list[int] = []
        self._outcome: list[int] = []
        self._macros: dict[str, str] = {}
        self._symlist: list[str | None] = [None] * len(STAGE_ORDER)
        self._activity = time.time()
        self._reset_connection()

    def _reset_connection(self) -> None:
        """Begin a connection: nothing negotiated, no filter attached."""
        self._variables = contextvars.copy_context()  # of this connection's callbacks
        self._negotiated: list[int] | None = None
        self._connected = False
        self._closed = False
        self._running: str | None = None
        self._at_stage: int | None = None
        self._priv: Any = None
        self._pretended: str | None = None
        self._reply: tuple[str | None, ...] | None = None
        self._reply_sent = False
        self._reset_message()

    def _reset_message(self) -> None:
        """Begin a message: nothing of it has come and nothing was done to it."""
        self._in_message = False
        if self._reply_sent:
            self._reply, self._reply_sent = None, False
        self._sender: str | None = None
        self._envfromchanged = False
        self._chgfrom: list[tuple[str, str | None]] = []
        self._addrcpt: list[tuple[str, str | None]] = []
        self._delrcpt: list[str] = []
        self._headerschanged = False
        self._bodyreplaced = False
        self._result: io.BytesIO | None = None
        self._quarantine: str | None = None
        self._progress = 0
        self._stored = StoredMessage()

    # What can be read of the session.

    @property
    def actions(self) -> int:
        """The negotiated actions; all before negotiation."""
        return milter.CURR_ACTS if self._negotiated is None else self._negotiated[0]

    @property
    def protocol(self) -> int:
        """The negotiated protocol steps; 0 before negotiation."""
        return 0 if self._negotiated is None else self._negotiated[1]

    @property
    def _protocol(self) -> int:
        return self.protocol

    @_protocol.setter
    def _protocol(self, steps: int) -> None:
        self._negotiated = [self.actions, steps, 0, 0]

    @property
    def _stage(self) -> int | None:
        """The macro stage (M_*) of the callback that runs now; None outside of callbacks.

        A test that calls methods of the filter by itself can say here where they are called.
        """
        return self._at_stage if self._running or self._pretended else None

    @_stage.setter
    def _stage(self, stage: int | None) -> None:
        if stage is not None and stage not in CALLBACKS_OF_STAGES:
            raise ValueError(f"_stage: {stage!r} is none of M_CONNECT to M_EOH, and not None")
        self._pretended = None if stage is None else CALLBACKS_OF_STAGES[stage]
        self._at_stage = stage

    @property
    def _body(self) -> io.BytesIO | None:
        """After ``eom`` the whole resulting message, headers included; None before.

        A test that calls methods of the filter by itself can put a file here: they may then
        do what is for ``eom``, and ``replacebody`` writes into it.
        """
        return self._result

    @_body.setter
    def _body(self, file: io.BytesIO | None) -> None:
        self._pretended = None if file is None else "eom"
        self._result = file

    @property
    def _msg(self) -> Message | None:
        """The message as it stands now, parsed by ``mime``; None where nothing has come yet.

        A message that a test assigns is kept, and changed by what the filter does.
        """
        if isinstance(self._stored, AssignedMessage):
            return cast("Message", self._stored.message)
        if not self._stored.fields and not self._stored.body:
            return None
        import mime

        return cast("Message", mime.message_from_file(io.BytesIO(self._stored.as_bytes())))

    @_msg.setter
    def _msg(self, message: Message | None) -> None:
        self._stored = StoredMessage() if message is None else AssignedMessage(message)

    def _raw_value(self, value: bytes) -> bytes:
        """What stands after the colon, for a value from the filter's side."""
        return value if self.protocol & milter.P_HDR_LEADSPC else b" " + value

    # The methods of the real context.

    def _open(self) -> None:
        """Refuse what is done after the end of the connection.

        What every callback may do passes outside of callbacks too, though not with the real
        context: tests call methods of the filter by themselves.
        """
        if self._closed:
            raise milter.error("bad context")

    def _perform(self, call: str) -> None:
        """Refuse an action where the real context would, for the same reasons in the same order."""
        self._open()
        milter._check_moment(call, self._running or self._pretended, self.actions)

    def getpriv(self) -> Any:
        """The object kept for this connection, the filter, also after ``_close``; None without."""
        return self._priv

    def setpriv(self, priv: Any) -> Any:
        """Keep an object for this connection.

        Args:
            priv: any object.

        Returns:
            The one that it replaces, or None.

        Raises:
            milter.error: the connection is closed.
        """
        self._open()
        old, self._priv = self._priv, priv
        return old

    def getsymval(self, name: Text) -> str | None:
        """Look up a macro that was defined by ``_setsymval``.

        Where the filter has asked for a list of macros at this stage, the others are not seen,
        unless they came at an earlier stage: by a list there, or because MTAs send them there
        by default. In ``negotiate`` no macro has come yet.

        Args:
            name: its name, in braces where that is longer than one letter.

        Returns:
            Its value, or None.

        Raises:
            milter.error: the connection is closed.
        """
        wanted = macro_name(as_text(milter._text("getsymval", "name", name)))
        self._open()
        if self._running == "negotiate":
            return None
        if self._at_stage is not None and not is_sent(wanted, self._at_stage, self._symlist):
            return None
        for known, value in self._macros.items():
            if macro_name(known) == wanted:
                return value
        return None

    def setreply(
        self,
        rcode: Text,
        xcode: Text | None = None,
        msg: Text | None = None,
        *more: Text | None,
    ) -> None:
        """Record the SMTP reply in ``_reply``, if the real context would take it.

        Args:
            rcode: the reply code, 4xx or 5xx.
            xcode: the enhanced status code.
            msg: the first line of text.
            more: further lines.

        Raises:
            milter.InvalidArgument: a rule is broken, which the message names.
            milter.error: the connection is closed.
        """
        lines = (msg, *more)
        milter._check_reply(rcode, xcode, *lines)
        self._open()
        given = [rcode, xcode, *[one for one in lines if one is not None]]
        self._reply_sent = False
        self._reply = tuple(None if one is None else as_text(as_bytes(one)) for one in given)

    def setsymlist(self, stage: int, macros: Text) -> None:
        """Record a list of macros in ``_symlist``; lists for one stage are merged.

        Where the MTA does not offer SETSYMLIST it does nothing.

        Args:
            stage: one of M_CONNECT to M_EOH.
            macros: their names, separated by spaces.

        Raises:
            milter.InvalidArgument: no such stage, or a line break in the list.
            milter.error: not in ``negotiate``.
        """
        names = as_text(milter._symlist(stage, macros)).split()
        self._perform("smfi_setsymlist")
        if not self._offer[0] & milter.SETSYMLIST:
            return
        known = self._symlist[stage]
        self._symlist[stage] = " ".join(dict.fromkeys([*(known or "").split(), *names]))

    def addheader(self, field: Text, value: Text, idx: int = -1) -> None:
        """Add a header to the message.

        Args:
            field: its name.
            value: its value.
            idx: at which place among all headers; beyond the last, or below 0, at the end.

        Raises:
            milter.InvalidArgument: what could forge a header.
            milter.error: not in ``eom``, or ADDHDRS was not negotiated.
        """
        idx = milter._header_index("addheader", idx, True)
        name = milter._header_name("addheader", field)
        raw = self._raw_value(milter._header_value("addheader", value))
        self._perform("smfi_addheader" if idx < 0 else "smfi_insheader")
        self._headerschanged = True
        if idx < 0:
            self._stored.append(name, raw)
        else:
            self._stored.insert(idx, name, raw)

    def chgheader(self, field: Text, idx: int, value: Text | None) -> None:
        """Change or delete a header of the message.

        Args:
            field: its name.
            idx: which of that name, from 1 (0 stands for the first too); beyond the last a
                header is added. After a delete the following ones move up, as in Postfix.
            value: its new value; None or empty deletes it.

        Raises:
            milter.InvalidArgument: what could forge a header, or a negative index.
            milter.error: not in ``eom``, or CHGHDRS was not negotiated.
        """
        idx = milter._header_index("chgheader", idx, False)
        name = milter._header_name("chgheader", field)
        wire = b"" if value is None else milter._header_value("chgheader", value)
        self._perform("smfi_chgheader")
        self._headerschanged = True
        self._stored.change(name, idx, self._raw_value(wire) if wire else None)

    def addrcpt(self, rcpt: Text, params: Text | None = None) -> None:
        """Record an added recipient in ``_addrcpt``.

        Args:
            rcpt: the address.
            params: ESMTP parameters, separated by spaces.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no address.
            milter.error: not in ``eom``, or ADDRCPT (with params ADDRCPT_PAR) was not negotiated.
        """
        address = as_text(milter._nonempty_line("addrcpt", "rcpt", rcpt))
        extra = None if params is None else as_text(milter._line("addrcpt", "params", params))
        if extra == "" and not self.actions & milter.ADDRCPT_PAR:
            extra = None
        self._perform("smfi_addrcpt" if extra is None else "smfi_addrcpt_par")
        self._addrcpt.append((address, extra))

    def delrcpt(self, rcpt: Text) -> None:
        """Record a removed recipient in ``_delrcpt``.

        Args:
            rcpt: the address.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no address.
            milter.error: not in ``eom``, or DELRCPT was not negotiated.
        """
        address = as_text(milter._nonempty_line("delrcpt", "rcpt", rcpt))
        self._perform("smfi_delrcpt")
        self._delrcpt.append(address)

    def chgfrom(self, sender: Text, params: Text | None = None) -> None:
        """Change the envelope sender, ``_sender``.

        Args:
            sender: the address.
            params: ESMTP parameters, separated by spaces.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no address.
            milter.error: not in ``eom``, or CHGFROM was not negotiated.
        """
        address = as_text(milter._nonempty_line("chgfrom", "sender", sender))
        extra = None if params is None else as_text(milter._line("chgfrom", "params", params))
        self._perform("smfi_chgfrom")
        self._envfromchanged = True
        self._sender = address
        self._chgfrom.append((address, extra))

    def replacebody(self, chunk: str | Buffer) -> None:
        """Replace the body; further calls append.

        Args:
            chunk: the new body, any bytes-like object, or str.

        Raises:
            TypeError: it is neither.
            BufferError: it is not one piece of memory.
            milter.error: not in ``eom``, or MODBODY was not negotiated.
        """
        try:
            content = memoryview(as_bytes(chunk) if isinstance(chunk, str) else chunk)
        except TypeError:
            kind = type(chunk).__name__
            raise TypeError(f"a bytes-like object is required, not {kind!r}") from None
        if not content.c_contiguous:
            raise BufferError("memoryview: underlying buffer is not C-contiguous")
        self._perform("smfi_replacebody")
        self._bodyreplaced = True
        if self._stored.new_body is None:
            self._stored.new_body = bytearray()
        self._stored.new_body += content.tobytes()
        if self._running is None and self._result is not None:
            self._result.seek(0)
            self._result.truncate()
            self._result.write(self._stored.new_body)

    def quarantine(self, reason: Text) -> None:
        """Record in ``_quarantine`` why the message is to be held.

        Args:
            reason: one line.

        Raises:
            milter.InvalidArgument: a line break or NUL, or no reason.
            milter.error: not in ``eom``, or QUARANTINE was not negotiated.
        """
        wire = milter._nonempty_line("quarantine", "reason", reason)
        self._perform("smfi_quarantine")
        self._quarantine = as_text(wire)

    def progress(self) -> None:
        """Count a sign of life in ``_progress``; outside of ``eom`` it does nothing.

        Raises:
            milter.error: the connection is closed.
        """
        self._open()
        if (self._running or self._pretended) == "eom":
            self._progress += 1
            self._activity = time.time()
