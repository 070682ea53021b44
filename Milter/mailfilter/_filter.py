"""Filters made of functions: the decorator, chains, running them and trying them out."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Union, cast, overload

import Milter

from ._addresses import Address, Recipients
from ._calls import Asked, Function, decide, decide_async, make
from ._decisions import Decision, accept
from ._edits import Action, _Piece, all_actions
from ._errors import STAGES
from ._headers import Headers
from ._mail import SPOOL_AT, Mail
from ._session import Session, session_class, too_large

if TYPE_CHECKING:
    from email.message import EmailMessage

    from ..mta import Dialect, Modification

Returned = Union[Decision, None]
FilterFunction = Callable[[Mail], Union[Returned, Awaitable[Returned]]]


class Filter:
    """A filter made of functions: a ``Milter.factory``, and a callable like its function.

    Called with a message it calls its function; without, as ``Milter.factory`` is, it makes the
    object for a connection.

    Attributes:
        session: the class of these objects, a ``Milter.Base``.
    """

    __name__: str
    __qualname__: str

    def __init__(self, parts: Sequence[Function], like: object, name: str) -> None:
        functools.update_wrapper(cast("Any", self), cast("Any", like))
        self.__name__ = name
        self.__qualname__ = getattr(like, "__qualname__", name)
        self._parts = tuple(parts)
        module = getattr(like, "__module__", None) or __name__
        self.session: type[Session] = session_class(self._parts, name, module, self.__doc__)

    @overload
    def __call__(self, mail: None = None) -> Session: ...
    @overload
    def __call__(self, mail: Mail) -> Any: ...
    def __call__(self, mail: Mail | None = None) -> Any:
        """Call the function with a message; without one make the object for a connection."""
        if mail is None:
            return self.session()
        if len(self._parts) > 1:
            raise TypeError(f"{self.__name__} has several functions: use check(mail)")
        return self._parts[0].call(mail)

    def __repr__(self) -> str:
        stages = ", ".join(f"{part.name} at {part.at}" for part in self._parts)
        return f"<mailfilter {stages}>"

    def check(self, mail: Mail) -> Result:
        """Ask the functions about a message, each at its stage, without an MTA.

        No socket is opened, no process and no thread is started. An exception comes out as it is,
        where an MTA would be given the policy's answer. Coroutine functions are run by
        ``asyncio.run``.

        Args:
            mail: the message (`Mail.from_bytes`), which stays as it is.

        Returns:
            What was decided, and what became of the message.

        Raises:
            TypeError: a function has returned what is no decision.
        """
        if not isinstance(mail, Mail):
            raise TypeError(f"check: mail: must be a Mail (Mail.from_bytes), not {mail!r:.60}")
        result = Result(mail._copy(self.session.spool_at))
        if any(part.is_async for part in self._parts):
            asyncio.run(self._walk_async(result))
        else:
            self._walk(result)
        result.mail._at = STAGES.index("eom")
        result.mail._has_body = True
        return result

    def _walk(self, result: Result) -> None:
        steps = self._steps(result)
        decision: Decision | None = None
        try:
            while True:
                parts, stage = steps.send(decision)
                found = decide(parts, result.mail, stage)
                if isinstance(found, Asked):
                    found = asyncio.run(found.wait(in_threads=False))
                decision = found
        except StopIteration:
            pass

    async def _walk_async(self, result: Result) -> None:
        steps = self._steps(result)
        asked = next(steps, None)
        while asked is not None:
            decision = await decide_async(asked[0], result.mail, asked[1], in_threads=False)
            try:
                asked = steps.send(decision)
            except StopIteration:
                asked = None

    def _steps(
        self, result: Result
    ) -> Generator[tuple[tuple[Function, ...], str], Decision | None, None]:
        """Yields functions and their stage, takes their decision."""
        mail = result.mail
        mail._has_body = self.session.has_body
        for stage in STAGES:
            parts = self.session.functions.get(stage, ())
            if stage == "rcpt" and parts:
                came, mail._recipients = mail._recipients, Recipients(gate=mail._gate)
                for one in came:
                    mail.recipient = one
                    decision = yield parts, stage
                    if decision is not None and decision.refuses:
                        result.refused.append((one, decision))
                    else:
                        mail._recipients._arrived(one)
                mail.recipient = None
                if came and not mail._recipients:
                    result.decision = result.refused[-1][1]
                    return
            elif parts:
                if stage == "eom" and self._is_too_large(result):
                    return
                decision = yield parts, stage
                if decision is not None:
                    result.decision = decision
                    return

    def _is_too_large(self, result: Result) -> bool:
        limit, mail = self.session.max_body, result.mail
        if limit is None or mail._spool.size <= limit:
            return False
        decision = too_large(self.session.oversize, limit)
        if decision is not None:
            result.decision = decision
            return True
        beginning = mail._spool.read_at(0, limit)
        mail._spool = mail._original = type(mail._spool)(mail._spool_at)
        mail._spool.write(beginning)
        mail.truncated = True
        return False


class Result:
    """What a filter made of a message.

    Attributes:
        decision: what becomes of the message. Where all recipients were refused, what the last of
            them was.
        refused: the recipients who were refused, each with its decision.
        mail: the message as the functions left it.
    """

    def __init__(self, mail: Mail) -> None:
        self.decision: Decision = accept()
        self.refused: list[tuple[Address, Decision]] = []
        self.mail = mail

    @property
    def is_delivered(self) -> bool:
        """Whether the message is taken and goes on, at once or after a quarantine."""
        return self.decision.kind in ("accept", "quarantine")

    @property
    def sender(self) -> Address:
        """The envelope sender, as the functions left it."""
        return self.mail._sender or Address("")

    @property
    def recipients(self) -> Recipients:
        """The recipients, as the functions left them."""
        return self.mail._recipients

    @property
    def headers(self) -> Headers:
        """The headers, as the functions left them."""
        return self.mail.headers

    @property
    def message(self) -> EmailMessage:
        """The message, as the functions left it."""
        return self.mail.message

    def as_bytes(self) -> bytes:
        """The message, as the functions left it, with CRLF at the end of lines."""
        return self.mail.as_bytes()

    @property
    def actions(self) -> list[Modification]:
        """What Postfix is told to do; nothing where the message is not taken."""
        from ..mta import Dialect

        return self.actions_for(Dialect.POSTFIX)

    def actions_for(self, dialect: Dialect, *, leading_space: bool = False) -> list[Modification]:
        """What an MTA is told to do; nothing where the message is not taken.

        Args:
            dialect: which MTA.
            leading_space: whether values have the space after the colon, as under P_HDR_LEADSPC,
                which the filter asks for where the MTA offers it.
        """
        from .. import mta

        if not self.is_delivered:
            return []
        on_postfix = dialect is mta.Dialect.POSTFIX
        actions = all_actions(self.mail, on_postfix=on_postfix, leading_space=leading_space)
        found = [_modification(action) for action in actions]
        if self.decision.kind == "quarantine":
            found.append(mta.Quarantine(self.decision.text))
        return found

    def __repr__(self) -> str:
        return f"<Result {self.decision}, {len(self.actions)} actions>"


def _modification(action: Action) -> Modification:
    """An action as an MTA sees it."""
    from .. import mta

    args = action.args
    if action.method == "addheader":
        name, value, *position = args
        if position:
            return mta.InsertHeader(position[0], name, value)
        return mta.AddHeader(name, value)
    if action.method == "chgheader":
        return mta.ChangeHeader(args[1], args[0], args[2] or b"")
    if action.method == "replacebody":
        piece: _Piece = args[0]
        return mta.ReplaceBody(piece.read())
    kinds: dict[str, Callable[..., Modification]] = {
        "addrcpt": mta.AddRecipient,
        "delrcpt": mta.DeleteRecipient,
        "chgfrom": mta.ChangeSender,
    }
    return kinds[action.method](*args)


# --- making them ---------------------------------------------------------------------------------


@overload
def filter(function: FilterFunction, /) -> Filter: ...
@overload
def filter(
    function: None = None,
    /,
    *,
    at: str = "eom",
    body: bool = True,
    macros: Iterable[str] | None = None,
    max_body: int | None = None,
    oversize: str = "reject",
    spool_at: int = SPOOL_AT,
) -> Callable[[FilterFunction], Filter]: ...
def filter(
    function: Any = None,
    /,
    *,
    at: str = "eom",
    body: bool = True,
    macros: Iterable[str] | None = None,
    max_body: int | None = None,
    oversize: str = "reject",
    spool_at: int = SPOOL_AT,
) -> Any:
    """Make a filter of a function, plain or ``async def``, that takes a message.

    What it returns, or raises, decides; None means `accept`. It is called from several threads at
    a time, for messages of different connections; ``async def`` in the event loop, which it must
    not block.

    Args:
        function: the function, where the decorator stands without parentheses.
        at: when it is called: ``"eom"`` when the message is complete, and can be changed;
            ``"connect"``, ``"helo"``, ``"mail"``, ``"rcpt"`` (once for each recipient),
            ``"data"`` or ``"headers"`` earlier: then nothing that comes later is asked of the MTA.
        body: whether it needs the body; without, the MTA does not send it.
        macros: further macros to ask the MTA for, by name: ``["{client_ptr}"]``.
        max_body: bytes of a body that are taken; None for any number.
        oversize: what becomes of a message with a longer one: ``"reject"``, ``"tempfail"``,
            ``"accept"`` (the function is not asked) or ``"truncate"`` (it gets the beginning, and
            ``mail.truncated`` is true).
        spool_at: bytes of a body that are kept in memory; a longer one is in a temporary file.

    Returns:
        The filter; with keywords alone a decorator that makes it.

    Raises:
        TypeError: it is no function that can be called with a message, or an argument's type.
        ValueError: an argument that is none of those above.
    """
    options = {
        "at": at,
        "body": body,
        "macros": list(macros) if macros is not None and not isinstance(macros, str) else macros,
        "max_body": max_body,
        "oversize": oversize,
        "spool_at": spool_at,
    }

    def decorate(function: Any) -> Filter:
        part = make(function, dict(options))
        return Filter([part], function, part.name)

    return decorate if function is None else decorate(function)


def chain(*filters: Filter | FilterFunction) -> Filter:
    """Make one filter of several: each function is asked at its stage, in this order within one.

    The first that has a decision ends it; one that returns None lets the next one go on.

    Args:
        filters: filters, or functions, which are asked at the end of the message.

    Raises:
        TypeError: one of them is no filter and no function.
        ValueError: none at all, or filters that differ in ``max_body`` or ``oversize``.
    """
    if not filters:
        raise ValueError("chain: needs at least one filter")
    made = [as_filter(one) for one in filters]
    parts = [part for one in made for part in one._parts]
    result = Filter(parts, made[0], "_".join(part.name for part in parts))
    result.__doc__ = None
    result.__qualname__ = ""  # the name that it is assigned to is not known
    return result


def as_filter(value: Any) -> Filter:
    """A filter as it is; a function as a filter.

    Raises:
        TypeError: it is neither.
    """
    return value if isinstance(value, Filter) else filter(value)


def run(
    filter: Filter | FilterFunction, socket: str, name: str | None = None, **options: Any
) -> None:
    """Serve the MTA with a filter until it is stopped: ``Milter.runmilter`` with it as the factory.

    Args:
        filter: the filter, or a function.
        socket: where to listen: ``"unix:/path"``, ``"inet:port@host"``.
        name: its name, for logs and error replies; by default that of the function.
        options: those of ``Milter.runmilter``: ``timeout``, ``workers``, ``socket_mode``, ``user``
            and so on.

    Raises:
        TypeError: it is no filter, or an option that there is not.
        milter.error: it cannot start or cannot go on.
        ValueError: an argument is refused.
    """
    made = as_filter(filter)
    Milter.factory = made
    Milter.runmilter(name or made.__name__, socket, **options)
