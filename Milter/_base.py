"""The filter's base classes: one instance for each connection from the MTA."""

from __future__ import annotations

import re
import sys
import types

import milter

from ._decorators import (
    ENABLED_MARK,
    MACROS_MARK,
    STEPS_MARK,
    nocallback,
    noreply,
)
from ._later import is_coroutine, only_makes_coroutine
from ._protocol import (
    ALL_STEPS,
    FEATURE_STEPS,
    MACRO_CALLBACKS,
    MAX_MACROS,
    OPTIONAL_CALLBACKS,
)
from ._text import visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from logging import Logger
    from typing import Any, ClassVar, TypeVar, Union

    from milter import milterContext
    from typing_extensions import Buffer, Concatenate, ParamSpec

    from ._types import Address, Answer

    Text = Union[str, bytes]

    _Self = TypeVar("_Self")
    _A = TypeVar("_A")
    _B = TypeVar("_B")
    _C = TypeVar("_C")
    _R = TypeVar("_R")
    _P = ParamSpec("_P")

    # To type checkers the parameters of a callback have no names, so that those who override it may
    # name them as they like. At run time they have: applications call super() with them.
    def _unnamed_1(
        callback: Callable[Concatenate[_Self, _A, _P], _R],
    ) -> Callable[Concatenate[_Self, _A, _P], _R]: ...
    def _unnamed_2(
        callback: Callable[Concatenate[_Self, _A, _B, _P], _R],
    ) -> Callable[Concatenate[_Self, _A, _B, _P], _R]: ...
    def _unnamed_3(
        callback: Callable[Concatenate[_Self, _A, _B, _C, _P], _R],
    ) -> Callable[Concatenate[_Self, _A, _B, _C, _P], _R]: ...

else:

    def _unnamed_1(callback):
        return callback

    _unnamed_2 = _unnamed_3 = _unnamed_1

#: A run of percent signs.
R = re.compile(r"%+")

#: Callbacks that also have a form that gets bytes.
_BYTES_CALLBACKS = frozenset({"envfrom", "envrcpt", "header"})

#: Attributes of an instance that change which steps its connection needs.
_CALLBACK_NAMES = frozenset(OPTIONAL_CALLBACKS) | {f"{name}_bytes" for name in _BYTES_CALLBACKS}

_ALL_CALLBACKS = (*sorted(_CALLBACK_NAMES), "eom", "abort", "close")

#: The types of the extension's methods, looked up on a class and on an instance.
_EXTENSION_METHODS = (types.MethodDescriptorType, types.BuiltinMethodType)


class DisabledAction(RuntimeError):
    """An action that was not negotiated with the MTA; the message names its flag."""


def _logger() -> Logger:
    from ._logging import logger  # logging takes a megabyte, which few filters ever need

    return logger()


def _bound_steps(owner: Any, name: str) -> int:
    """The steps that one callback of a class or an instance asks for."""
    # Applications keep data of their own under such names too (self.data = {}).
    places = (owner, type(owner), Base)
    method = next(found for place in places if callable(found := getattr(place, name, None)))
    if name in _BYTES_CALLBACKS:
        # Whoever replaces the form that gets bytes is called whatever the plain one is.
        as_bytes = getattr(owner, f"{name}_bytes")
        if not isinstance(as_bytes, _EXTENSION_METHODS):
            method = as_bytes
    steps: int = getattr(method, STEPS_MARK, 0)
    return steps


def _as_params(params: Text | Iterable[Text] | None) -> Text | None:
    """ESMTP parameters as the context takes them: one text, separated by spaces, or None."""
    if params is None or isinstance(params, (str, bytes)):
        return params
    items = list(params)
    if not items:
        return None
    if all(isinstance(item, str) for item in items):
        return " ".join(items)  # type: ignore[arg-type]
    return b" ".join(
        item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item for item in items
    )


def _check_percent(line: Text) -> None:
    """Refuse a reply line in which a percent sign is not doubled."""
    text = line.decode("latin-1") if isinstance(line, bytes) else line
    if any(len(run) % 2 for run in R.findall(text)):
        raise milter.InvalidArgument(f"'%' must be doubled: {text}")


class _Alias:
    """A public name of an attribute; what an application keeps under that name goes before it."""

    def __init__(self, name: str, doc: str) -> None:
        self._name = name
        self.__doc__ = doc

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        return self if instance is None else getattr(instance, self._name)

    def __repr__(self) -> str:
        return f"<public name of {self._name}>"


class Base(milter._Decoder):
    """One connection from the MTA: subclass it and override the callbacks you need.

    An instance is made for each connection by ``Milter.factory``. Its callbacks follow
    the SMTP session; each returns a verdict: CONTINUE to go on, ACCEPT, REJECT, TEMPFAIL or
    DISCARD to end (DISCARD not in ``connect`` and ``hello``), SKIP in ``body`` to get no
    more of it. In ``connect`` and ``hello`` the verdict is for the whole connection, in
    ``envrcpt`` for that recipient, elsewhere for the message.

    SKIP in ``header`` and ``envrcpt`` is for Postfix alone. sendmail (8.17) after SKIP in
    ``header`` sends all headers nevertheless, but not the body; SKIP in ``envrcpt`` is an error
    to it, and the message goes on without the filter. A filter for both returns CONTINUE there
    and ignores what it does not need.

    All callbacks except ``eom``, ``abort``, ``close`` and ``negotiate`` are off here,
    which means that the MTA does not send that step at all; overriding one turns it on.
    Messages follow each other on a connection, so set up what belongs to one message in
    ``envfrom``.

    Attributes:
        context: the connection's context (``milter.milterContext``), None after close.
        actions: the negotiated actions (flags like ``ADDHDRS``), all before negotiation.
        protocol: the negotiated protocol steps (flags like ``P_SKIP``), 0 before.

    ``_ctx``, ``_actions`` and ``_protocol`` are the names that applications have always read these
    by, and may go on to. A subclass may use the public ones for something of its own.
    """

    _ctx: milterContext | None = None
    _actions: int = milter.CURR_ACTS
    _protocol: int = 0
    _protocol_mask: ClassVar[int]
    _only_coroutines: ClassVar[bool] = False
    if TYPE_CHECKING:
        context: milterContext | None
        actions: int
        protocol: int
    else:
        context = _Alias("_ctx", "The connection's context (``milter.milterContext``), or None.")
        actions = _Alias("_actions", "The negotiated actions: flags like ``ADDHDRS``.")
        protocol = _Alias("_protocol", "The negotiated protocol steps: flags like ``P_SKIP``.")

    def _setctx(self, ctx: milterContext | None) -> None:
        """Attach this instance to a connection's context, or detach it with None.

        Args:
            ctx: the new context, whose private data this instance becomes.
        """
        self._ctx = ctx
        if ctx is not None:
            self._actions = milter.CURR_ACTS
            self._protocol = 0
            self._envfrom_errors = self._envrcpt_errors = self._header_errors = None
            ctx.setpriv(self)

    def log(self, *msg: object) -> None:
        """Note something about this connection; does nothing here, override it.

        Args:
            msg: any objects, to be written in a row.
        """

    # Callbacks, in the order of an SMTP session.

    @_unnamed_3
    @nocallback
    def connect(self, hostname: str, family: int, hostaddr: Address) -> Answer:
        """A client has connected to the MTA (xxfi_connect).

        Args:
            hostname: the client's name as the MTA found it, or its address in brackets.
            family: ``socket.AF_INET``, ``AF_INET6``, ``AF_UNIX``, or 0 where the MTA
                gave no address.
            hostaddr: ``(ip, port)``, ``(ip6, port, flowinfo, scope_id)``, the path of a unix
                socket, or None (local submission, unknown family).

        Returns:
            A verdict for the connection.
        """
        return milter.CONTINUE

    @_unnamed_1
    @nocallback
    def hello(self, hostname: str) -> Answer:
        """HELO or EHLO (xxfi_helo); may come more than once, or never.

        Args:
            hostname: what the client calls itself.

        Returns:
            A verdict for the connection.
        """
        return milter.CONTINUE

    @_unnamed_1
    @nocallback
    def envfrom(self, f: Any, *params: Any) -> Answer:
        """MAIL: a message begins (xxfi_envfrom).

        Args:
            f: the sender as the MTA gives it: in angle brackets where it came by SMTP, ``<>``
                for a bounce. Postfix gives those of local submissions without the brackets,
                and an empty text for the bounces that it makes itself (which filters see
                only under ``internal_mail_filter_classes``).
            params: the ESMTP parameters, each ``NAME`` or ``NAME=VALUE``. All are str,
                or what ``@decode`` says.

        Returns:
            A verdict for the message.
        """
        return milter.CONTINUE

    @_unnamed_1
    @nocallback
    def envrcpt(self, to: Any, *params: Any) -> Answer:
        """RCPT: a recipient of the message (xxfi_envrcpt).

        Args:
            to: the recipient as the MTA gives it: in angle brackets where it came by SMTP,
                without them in Postfix's local submissions and bounces.
            params: the ESMTP parameters, each ``NAME`` or ``NAME=VALUE``. All are str,
                or what ``@decode`` says.

        Returns:
            A verdict: REJECT and TEMPFAIL are for this recipient alone.
        """
        return milter.CONTINUE

    @nocallback
    def data(self) -> Answer:
        """DATA: all recipients are known (xxfi_data).

        Returns:
            A verdict for the message.
        """
        return milter.CONTINUE

    @_unnamed_2
    @nocallback
    def header(self, field: str, value: Any) -> Answer:
        """One header of the message (xxfi_header).

        Args:
            field: its name as spelled in the message.
            value: its value, without the first leading space unless P_HDR_LEADSPC was
                negotiated; folds are a line feed and the white space after it. It is str,
                or what ``@decode`` says.

        Returns:
            A verdict for the message.
        """
        return milter.CONTINUE

    @nocallback
    def eoh(self) -> Answer:
        """The headers have ended (xxfi_eoh).

        Returns:
            A verdict for the message.
        """
        return milter.CONTINUE

    @_unnamed_1
    @nocallback
    def body(self, blk: bytes) -> Answer:
        """A piece of the message's body (xxfi_body).

        Args:
            blk: up to 65,535 bytes as received, normally with CRLF line ends.

        Returns:
            A verdict for the message.
        """
        return milter.CONTINUE

    @_unnamed_1
    @nocallback
    def unknown(self, cmd: str) -> Answer:
        """An SMTP command that the MTA does not know (xxfi_unknown).

        Args:
            cmd: the command line; of Postfix the first word alone.

        Returns:
            A verdict. The MTA refuses the command whatever it is, after REJECT and TEMPFAIL with
            the filter's reply or one of that kind. A message that is under way goes on, but
            after ACCEPT without this filter. Between messages, CONTINUE goes to the MTA in place
            of ACCEPT, of which Postfix's smtpd would die (seen with 3.7).
        """
        return milter.CONTINUE

    def eom(self) -> Answer:
        """The message is complete (xxfi_eom): the place for all changes to it.

        Returns:
            The verdict for the message.
        """
        return milter.CONTINUE

    def abort(self) -> Answer:
        """The message has ended without ``eom`` (xxfi_abort); the connection goes on.

        Returns:
            A value that is ignored.
        """
        return milter.CONTINUE

    def close(self) -> Answer:
        """The connection has ended (xxfi_close); comes after ``abort`` too.

        Returns:
            A value that is ignored.
        """
        return milter.CONTINUE

    # The forms of callbacks that get bytes are the extension's: see milter._Decoder.

    # Negotiation.

    @classmethod
    def protocol_mask(cls) -> int:
        """The protocol steps that this class has no use for, to be cleared from the MTA's offer.

        It is worked out once for each class, from its own callbacks and decorators and the
        steps that ``enable_protocols`` turned on for it or a class that it inherits from,
        and kept in ``_protocol_mask``. What it leaves of an offer is the steps to ask for:
        P_NO* for callbacks that are off, P_NR_* for those without a reply, and P_SKIP.

        Returns:
            A mask of P_* flags, for ``offer & ~mask``.
        """
        mask: int | None = vars(cls).get("_protocol_mask")
        if mask is None:
            mask = ALL_STEPS & ~(cls._enabled_steps() | callback_steps(cls))
            cls._protocol_mask = mask
            cls._tell_of_coroutines()
        return mask

    @classmethod
    def _tell_of_coroutines(cls) -> None:
        """Have the extension know whether callbacks of this class are coroutines, and only such."""
        own = [
            method
            for name in ("negotiate", *_ALL_CALLBACKS)
            if (method := getattr(cls, name, None)) is not getattr(Base, name, None)
        ]
        if any(map(is_coroutine, own)):
            cls._only_coroutines = all(map(only_makes_coroutine, own))
            milter._note_coroutines(cls._only_coroutines)
        elif own:
            milter._dismiss()  # another class may have them

    @classmethod
    def _enabled_steps(cls) -> int:
        """P_SKIP and the steps that enable_protocols turned on, here or in a base class."""
        steps = milter.P_SKIP
        for base in cls.__mro__:
            steps |= vars(base).get(ENABLED_MARK, 0)
        return steps

    def _wanted_steps(self) -> int:
        """The steps to ask for in this connection, whatever the MTA offers."""
        wanted = ALL_STEPS & ~self.protocol_mask() | self._enabled_steps()
        own = vars(self)
        if any(callable(own[name]) for name in _CALLBACK_NAMES.intersection(own)):
            # Methods that were assigned to the instance replace those of its class.
            wanted = wanted & (FEATURE_STEPS | self._enabled_steps()) | callback_steps(self)
            milter._dismiss()  # some may be plain
        return wanted

    def negotiate(self, opts: list[int]) -> int:
        """Agree with the MTA on actions and protocol steps (xxfi_negotiate).

        All actions that the MTA offers are taken; of the steps it offers, those that this
        class can use (see ``protocol_mask``); macro lists of ``@symlist`` are sent.
        An override can call ``super().negotiate(opts)`` and change ``opts`` afterwards, if
        it keeps ``_actions`` and ``_protocol`` in step.

        Args:
            opts: the offer ``[actions, steps, 0, 0]``, changed in place to what the filter
                asks for.

        Returns:
            CONTINUE; or ALL_OPTS, with ``opts`` unchanged, after a failure, which is logged
            with its traceback (logger ``milter``).
        """
        offer = list(opts)
        try:
            if offer[0] & milter.SETSYMLIST:
                self._send_symlists()
            opts[1] = offer[1] & self._wanted_steps()
            opts[2:] = [0] * len(opts[2:])
        except Exception:  # noqa: BLE001 - whatever it was, the connection goes on, and it is logged
            _logger().exception("negotiation of %s failed; taking all options", type(self).__name__)
            opts[:] = offer
            # With ALL_OPTS libmilter sends every step, waits for replies and knows SKIP.
            self._actions, self._protocol = offer[0], offer[1] & milter.P_SKIP
            return milter.ALL_OPTS
        self._actions, self._protocol = opts[0], opts[1]
        return milter.CONTINUE

    def _send_symlists(self) -> None:
        """Send the macro list of each callback that has one."""
        for name, stage in MACRO_CALLBACKS.items():
            for form in (name, f"{name}_bytes") if name in _BYTES_CALLBACKS else (name,):
                macros = getattr(getattr(self, form), MACROS_MARK, None)
                if macros is not None:
                    self.setsymlist(stage, *macros)

    def setsymlist(self, stage: int, *macros: str) -> None:
        """Name the macros to be sent at a stage (smfi_setsymlist), during ``negotiate`` only.

        Args:
            stage: one of the M_* constants.
            macros: up to five names, with braces where they are longer than one letter.
                None at all asks for no macros.

        Raises:
            DisabledAction: the MTA does not offer SETSYMLIST.
            ValueError: more than five macros.
            milter.error: not in negotiation, or no such stage.
        """
        self._require(milter.SETSYMLIST, "SETSYMLIST")
        names = " ".join(macros)
        if len(names.split()) > MAX_MACROS:
            raise milter.InvalidArgument(f"more than {MAX_MACROS} macros for a stage: {names}")
        self._context().setsymlist(stage, names)

    # What a filter can ask and do.

    def _context(self) -> milterContext:
        if self._ctx is None:
            raise milter.error("no context: this filter object has no connection, or no longer")
        return self._ctx

    def _require(self, flag: int, name: str) -> None:
        if not self._actions & flag:
            raise DisabledAction(name)

    def getsymval(self, sym: str) -> str | None:
        """Look a macro of the MTA up (smfi_getsymval).

        Args:
            sym: its name, in braces where that is longer than one letter: ``"i"``,
                ``"{auth_authen}"``.

        Returns:
            Its value at this stage, or None where the MTA sent none.
        """
        return self._context().getsymval(sym)

    def setreply(
        self,
        rcode: Text,
        xcode: Text | None = None,
        msg: Text | None = None,
        *ml: Text,
    ) -> None:
        """Set the SMTP reply that goes with a verdict of REJECT or TEMPFAIL (smfi_setmlreply).

        Args:
            rcode: the reply code (RFC 5321, section 4.2): 5yz for REJECT, 4yz for TEMPFAIL.
            xcode: the enhanced status code (RFC 3463), of the same class.
            msg: the first line of text. A percent sign must be doubled.
            ml: further lines, 32 in all.

        Raises:
            ValueError: a percent sign is not doubled, or another rule is broken, which the
                message names (such an error is also a ``milter.error``).
        """
        lines = [line for line in (msg, *ml) if line is not None]
        for line in lines:
            _check_percent(line)
        self._context().setreply(rcode, xcode, *lines)

    def addheader(self, field: Text, value: Text, idx: int = -1) -> None:
        """Add a header, in ``eom`` only (smfi_addheader, smfi_insheader).

        Args:
            field: its name.
            value: its value; folds are a line feed followed by a space or tab.
            idx: where to insert it, 0 for the very top; -1 appends it.

        Raises:
            DisabledAction: ADDHDRS was not negotiated.
            milter.error: not in ``eom``, or a value that is refused (then a ValueError too).
        """
        self._require(milter.ADDHDRS, "ADDHDRS")
        self._context().addheader(field, value, idx)

    def chgheader(self, field: Text, idx: int, value: Text | None) -> None:
        """Change or delete a header, in ``eom`` only (smfi_chgheader).

        Args:
            field: its name.
            idx: which of the headers of that name, from 1.
            value: its new value; None or empty deletes it.

        Raises:
            DisabledAction: CHGHDRS was not negotiated.
            milter.error: not in ``eom``, or a value that is refused (then a ValueError too).
        """
        self._require(milter.CHGHDRS, "CHGHDRS")
        self._context().chgheader(field, idx, value)

    def addrcpt(self, rcpt: Text, params: Text | Iterable[Text] | None = None) -> None:
        """Add a recipient, in ``eom`` only (smfi_addrcpt, smfi_addrcpt_par).

        Args:
            rcpt: the address, normally in angle brackets.
            params: ESMTP parameters, as one text or a sequence of them.

        Raises:
            DisabledAction: ADDRCPT was not negotiated, or with parameters ADDRCPT_PAR.
            milter.error: not in ``eom``, or a value that is refused (then a ValueError too).
        """
        self._require(milter.ADDRCPT, "ADDRCPT")
        joined = _as_params(params)
        if joined:
            self._require(milter.ADDRCPT_PAR, "ADDRCPT_PAR")
        self._context().addrcpt(rcpt, joined)

    def delrcpt(self, rcpt: Text) -> None:
        """Remove a recipient, in ``eom`` only (smfi_delrcpt).

        Args:
            rcpt: the address as ``envrcpt`` got it.

        Raises:
            DisabledAction: DELRCPT was not negotiated.
            milter.error: not in ``eom``, or a value that is refused (then a ValueError too).
        """
        self._require(milter.DELRCPT, "DELRCPT")
        self._context().delrcpt(rcpt)

    def replacebody(self, body: str | Buffer) -> None:
        """Replace the body, in ``eom`` only (smfi_replacebody).

        Args:
            body: the new body, with CRLF line ends. Further calls append to it.

        Raises:
            DisabledAction: MODBODY was not negotiated.
            milter.error: not in ``eom``.
        """
        self._require(milter.MODBODY, "MODBODY")
        self._context().replacebody(body)

    def chgfrom(self, sender: Text, params: Text | Iterable[Text] | None = None) -> None:
        """Change the envelope sender, in ``eom`` only (smfi_chgfrom).

        Args:
            sender: the address, normally in angle brackets.
            params: ESMTP parameters, as one text or a sequence of them.

        Raises:
            DisabledAction: CHGFROM was not negotiated.
            milter.error: not in ``eom``, or a value that is refused (then a ValueError too).
        """
        self._require(milter.CHGFROM, "CHGFROM")
        self._context().chgfrom(sender, _as_params(params))

    def quarantine(self, reason: Text) -> None:
        """Hold the message for the postmaster, in ``eom`` only (smfi_quarantine).

        It is an action: ``eom`` still returns a verdict, such as ACCEPT.

        Args:
            reason: what the MTA shall note with it.

        Raises:
            DisabledAction: QUARANTINE was not negotiated.
            milter.error: not in ``eom``, or a value that is refused (then a ValueError too).
        """
        self._require(milter.QUARANTINE, "QUARANTINE")
        self._context().quarantine(reason)

    def progress(self) -> None:
        """Tell the MTA that ``eom`` is still at work, so that it waits on (smfi_progress).

        MTAs expect that at the end of the message alone: elsewhere nothing is sent.

        Raises:
            milter.error: the connection is closed.
        """
        self._context().progress()


def callback_steps(owner: Any, names: Iterable[str] = OPTIONAL_CALLBACKS) -> int:
    """The steps that callbacks of a class or an instance ask for, by their decorators."""
    steps = 0
    for name in names:
        steps |= _bound_steps(owner, name)
    return steps


def _printable(text: str, encoding: str) -> str:
    """Text as one line that can be written in an encoding, whatever mail put into it."""
    return visible(text.encode(encoding, "backslashreplace").decode(encoding))


class Milter(Base):
    """A filter that logs its callbacks and does nothing else.

    Each line goes to standard output by ``log``. The callbacks that the MTA need not wait
    for are ``@noreply``; subclasses that want to give a verdict override them.
    """

    def log(self, *msg: object) -> None:
        """Print a line that begins with ``Milter:``.

        What cannot be written (control characters, bytes that are not UTF-8, characters
        that standard output has no code for) is escaped; a standard output that is
        closed is no error.

        Args:
            msg: any objects, printed in a row with spaces between them.
        """
        out = sys.stdout
        if out is None:
            return
        text = " ".join(["Milter:", *map(str, msg)])
        try:
            # In one piece, as other threads write too.
            out.write(_printable(text, getattr(out, "encoding", None) or "utf-8") + "\n")
        except (OSError, ValueError):
            _logger().debug("standard output is gone, could not print: %r", text)

    @_unnamed_3
    @noreply
    def connect(self, hostname: str, family: int, hostaddr: Address) -> Answer:
        """Log the client's name and address; see ``Base.connect``."""
        self.log(f"connect from {hostname} at {'unknown' if hostaddr is None else hostaddr}")
        return milter.CONTINUE

    @_unnamed_1
    @noreply
    def hello(self, hostname: str) -> Answer:
        """Log what the client calls itself; see ``Base.hello``."""
        self.log(f"hello from {hostname}")
        return milter.CONTINUE

    @_unnamed_1
    @noreply
    def envfrom(self, f: Any, *params: Any) -> Answer:
        """Log the sender and the ESMTP parameters; see ``Base.envfrom``."""
        self.log("mail from", f, params)
        return milter.CONTINUE

    @_unnamed_1
    @noreply
    def envrcpt(self, to: Any, *params: Any) -> Answer:
        """Log a recipient and the ESMTP parameters; see ``Base.envrcpt``."""
        self.log("rcpt to", to, params)
        return milter.CONTINUE

    @_unnamed_2
    @noreply
    def header(self, field: str, value: Any) -> Answer:
        """Log a header; see ``Base.header``."""
        self.log(f"{field}: {value}")
        return milter.CONTINUE

    @noreply
    def eoh(self) -> Answer:
        """Log the end of the headers; see ``Base.eoh``."""
        self.log("eoh")
        return milter.CONTINUE

    def eom(self) -> Answer:
        """Log the end of the message; see ``Base.eom``."""
        self.log("eom")
        return milter.CONTINUE

    def abort(self) -> Answer:
        """Log that the message was cut off; see ``Base.abort``."""
        self.log("abort")
        return milter.CONTINUE

    def close(self) -> Answer:
        """Log the end of the connection; see ``Base.close``."""
        self.log("close")
        return milter.CONTINUE
