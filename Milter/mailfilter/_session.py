"""A connection of the MTA, for a filter made of functions: a ``Milter.Base`` like any other."""

from __future__ import annotations

import types
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Union

import milter

from .._base import Base, DisabledAction
from .._decorators import ENABLED_MARK, MACROS_MARK, STEPS_MARK
from .._later import Later
from .._logging import logger
from .._protocol import MACRO_CALLBACKS, MAX_MACROS, OPTIONAL_CALLBACKS
from .._testctx.macros import USUAL_STAGES, macro_name
from . import _progress
from ._addresses import Address
from ._calls import Asked, Function, decide, decide_async
from ._decisions import Decision, reject, tempfail
from ._edits import Action, _Piece, all_actions, missing_flags
from ._errors import STAGES
from ._mail import Client, Macros, Mail

if TYPE_CHECKING:
    Answer = Union[int, Awaitable[int]]

_log = logger("milter.mailfilter")

#: The callback of each stage at which functions run.
CALLBACK_OF = {
    "connect": "connect",
    "helo": "hello",
    "mail": "envfrom",
    "rcpt": "envrcpt",
    "data": "data",
    "headers": "eoh",
    "eom": "eom",
}
#: Stages at which the message goes on to the next function whatever happens.
_NEVER_LAST = ("helo", "rcpt")

_EDITS = (
    milter.ADDHDRS
    | milter.CHGHDRS
    | milter.ADDRCPT
    | milter.ADDRCPT_PAR
    | milter.DELRCPT
    | milter.CHGFROM
)


def too_large(oversize: str, limit: int) -> Decision | None:
    """What becomes of a message whose body is beyond ``max_body``; None where it goes on."""
    text = f"Message too large, its body has more than {limit} bytes"
    if oversize == "reject":
        return reject(text, 552, "5.3.4")
    if oversize == "tempfail":
        return tempfail(text, 452, "4.3.4")
    return Decision("accept") if oversize == "accept" else None


class Session(Base):
    """One connection. `session_class` makes a class of it that has the callbacks that it needs."""

    functions: ClassVar[dict[str, tuple[Function, ...]]]
    async_stages: ClassVar[frozenset[str]]
    last: ClassVar[str]
    has_body: ClassVar[bool]
    max_body: ClassVar[int | None]
    oversize: ClassVar[str]
    spool_at: ClassVar[int]
    wanted_actions: ClassVar[int]
    known_macros: ClassVar[dict[str, int]]

    def __init__(self) -> None:
        super().__init__()
        self._client: Client | None = None
        self._helo = ""
        self._shared: dict[Any, Any] = {}
        self._mail: Mail | None = None
        self._names: list[tuple[str, bytes]] = []
        self._verdict: Decision | None = None  # decided before the functions are asked
        self._hold: Decision | None = None

    # Negotiation.

    def negotiate(self, opts: list[int]) -> int:
        """Ask for the steps, macros and actions that the functions need, and for no others."""
        verdict = super().negotiate(opts)
        if verdict == milter.CONTINUE:
            opts[0] &= self.wanted_actions
            self._actions = opts[0]
        return verdict

    # Callbacks: `session_class` gives them their names.

    def _on_connect(self, hostname: str, family: int, hostaddr: Any) -> Answer:
        self._client = Client._connected(hostname, family, hostaddr)
        return self._ask("connect")

    def _on_hello(self, hostname: str) -> Answer:
        self._helo = hostname
        return self._ask("helo")

    def _on_envfrom(self, sender: str, *params: str) -> Answer:
        self._forget()
        mail = self._mail = self._new_mail()
        mail._sender = mail._came_from = Address._received(sender, params)
        return self._ask("mail")

    def _on_envrcpt(self, recipient: str, *params: str) -> Answer:
        mail = self._mail
        if mail is None:
            return milter.CONTINUE
        mail.recipient = Address._received(recipient, params)
        if "rcpt" in self.functions:
            return self._ask("rcpt")
        mail._recipients._arrived(mail.recipient)
        return milter.CONTINUE

    def _on_data(self) -> Answer:
        return self._ask("data")

    def _on_header_bytes(self, field: str, value: bytes) -> int:
        self._names.append((field, value))
        return milter.CONTINUE

    def _on_eoh(self) -> Answer:
        self._take_headers()
        return self._ask("headers")

    def _on_body(self, blk: bytes) -> int:
        mail = self._mail
        if mail is None or self._verdict is not None or mail.truncated:
            return self._no_more()
        limit = self.max_body
        try:
            if limit is not None and mail._spool.size + len(blk) > limit:
                return self._oversized(mail, blk[: limit - mail._spool.size], limit)
            mail._spool.write(blk)
        except OSError as exc:
            _log.error("cannot keep the body of %s: %s", mail.queue_id or "a message", exc)
            mail._spool.close()
            self._verdict = tempfail("4.3.0 Not enough room for the message, try again later")
            return self._no_more()
        return milter.CONTINUE

    def _on_eom(self) -> Answer:
        mail = self._mail
        if mail is None:
            return milter.CONTINUE
        functions = self.functions.get("eom", ())
        if self._verdict is not None or not functions:
            return self._end(mail, self._verdict)
        self._take_headers()
        if "eom" in self.async_stages:
            return self._finish_async(functions, mail)
        _progress.begin(self._ctx)
        asked = False
        try:
            decision = decide(functions, mail, "eom")
            asked = isinstance(decision, Asked)
            if isinstance(decision, Asked):
                return Later(decision, lambda found: self._end(mail, found), self._be_over)
            return self._end(mail, decision)
        finally:
            if not asked:
                self._be_over()

    def _be_over(self) -> None:
        _progress.end(self._ctx)
        self._forget()

    async def _finish_async(self, functions: Sequence[Function], mail: Mail) -> int:
        _progress.begin(self._ctx)
        try:
            decision = await decide_async(functions, mail, "eom")
            return self._end(mail, decision)
        finally:
            self._be_over()

    def abort(self) -> int:
        """The message ends here: nothing of it is kept."""
        self._forget()
        return milter.CONTINUE

    def close(self) -> int:
        """So does the connection."""
        self._forget()
        self._shared = {}
        return milter.CONTINUE

    # The message.

    def _new_mail(self) -> Mail:
        mail = Mail(self._client, self._helo, self._shared, self.spool_at)
        mail._has_body = self.has_body
        if self._ctx is not None:
            mail.macros = Macros(self._ctx.getsymval, self.known_macros)
        return mail

    def _take_headers(self) -> None:
        """Give the message its headers, with what stands after each colon."""
        mail = self._mail
        if mail is None or mail._pairs:
            return
        space = b"" if self._protocol & milter.P_HDR_LEADSPC else b" "
        pairs = [
            (name.encode("utf-8", "surrogateescape"), space + value) for name, value in self._names
        ]
        if any(b"\r" in value for _, value in pairs):
            pairs = [(name, value.replace(b"\r\n", b"\n")) for name, value in pairs]
        mail._pairs = pairs
        self._names = []

    def _forget(self) -> None:
        if self._mail is not None:
            self._mail._discard()
            self._mail = None
        self._names = []
        self._verdict = self._hold = None

    def _oversized(self, mail: Mail, rest: bytes, limit: int) -> int:
        self._verdict = too_large(self.oversize, limit)
        if self._verdict is None:
            mail._spool.write(rest)
            mail.truncated = True
        elif self._verdict.refuses:
            return self._answer("body", self._verdict)
        return self._no_more()

    def _no_more(self) -> int:
        """No more of the body, where the MTA can be told so."""
        silent = self._protocol & (milter.P_NR_BODY | milter.P_SKIP) != milter.P_SKIP
        return milter.CONTINUE if silent else milter.SKIP

    # Asking and answering.

    def _ask(self, stage: str) -> Answer:
        functions = self.functions.get(stage)
        if not functions or self._verdict is not None:
            return milter.CONTINUE
        mail = self._mail
        if mail is None:  # before MAIL there is a client, and no message
            mail = self._new_mail()
        if stage in self.async_stages:
            return self._ask_async(stage, functions, mail)
        decision = decide(functions, mail, stage)
        if isinstance(decision, Asked):
            return Later(decision, lambda found: self._decided(stage, mail, found))
        return self._decided(stage, mail, decision)

    async def _ask_async(self, stage: str, functions: Sequence[Function], mail: Mail) -> int:
        return self._decided(stage, mail, await decide_async(functions, mail, stage))

    def _decided(self, stage: str, mail: Mail, decision: Decision | None) -> int:
        if stage == "rcpt" and mail.recipient is not None:
            if decision is None or not decision.refuses:
                mail._recipients._arrived(mail.recipient)
            mail.recipient = None
        if decision is None:
            is_last = stage == self.last and stage not in _NEVER_LAST
            decision = Decision("accept") if is_last else None
        if decision is None:
            return milter.CONTINUE
        if decision.kind == "quarantine":
            self._verdict = decision
            return milter.CONTINUE
        if decision.kind == "accept" and stage == "rcpt":
            return milter.CONTINUE
        return self._answer(stage, decision)

    def _answer(self, stage: str, decision: Decision) -> int:
        """A decision as a verdict, with its reply."""
        if decision.reply and self._ctx is not None:
            self._ctx.setreply(*decision.reply)
        if stage != "rcpt" and stage not in ("connect", "helo"):
            self._forget()
        return {
            "accept": milter.ACCEPT,
            "reject": milter.REJECT,
            "tempfail": milter.TEMPFAIL,
            "discard": milter.DISCARD,
        }[decision.kind]

    def _end(self, mail: Mail, decision: Decision | None) -> int:
        """Tell the MTA at the end of the message what becomes of it."""
        if decision is None or decision.kind in ("accept", "quarantine"):
            self._apply(mail, decision)
            decision = Decision("accept")
        return self._answer("eom", decision)

    def _apply(self, mail: Mail, decision: Decision | None) -> None:
        """Do what was changed; all of it or, where something was not agreed, nothing."""
        ctx = self._context()
        on_postfix = (ctx.getsymval("v") or "").startswith("Postfix")
        leading_space = bool(self._protocol & milter.P_HDR_LEADSPC)
        actions = list(all_actions(mail, on_postfix=on_postfix, leading_space=leading_space))
        if decision is not None and decision.kind == "quarantine":
            actions.append(Action("quarantine", (decision.text,), "QUARANTINE"))
        missing = missing_flags(actions, self._actions)
        if missing:
            raise DisabledAction(f"{' '.join(missing)}: the MTA does not let a filter do that")
        for action in actions:
            first = action.args[0]
            args = (first.read(),) if isinstance(first, _Piece) else action.args
            getattr(ctx, action.method)(*args)


# --- the class of a filter -----------------------------------------------------------------------


def session_class(
    functions: Sequence[Function], name: str, module: str, doc: str | None
) -> type[Session]:
    """A class with the callbacks that functions need; all other steps are left out by the MTA.

    Raises:
        ValueError: functions that do not go together, or too many macros for a stage.
    """
    by_stage: dict[str, tuple[Function, ...]] = {}
    for function in functions:
        by_stage[function.at] = (*by_stage.get(function.at, ()), function)
    last = max(by_stage, key=STAGES.index)
    at_end = by_stage.get("eom", ())
    limits = {(f.max_body, f.oversize) for f in at_end if f.max_body is not None}
    if len(limits) > 1:
        raise ValueError(f"chain: max_body and oversize must be the same for all: {sorted(limits)}")
    max_body, oversize = limits.pop() if limits else (None, "reject")
    has_body = any(function.body for function in at_end)
    needed = _needed_steps(by_stage, last, has_body, max_body is not None)
    namespace: dict[str, Any] = {
        "__module__": module,
        "__doc__": doc,
        "functions": by_stage,
        "async_stages": frozenset(function.at for function in functions if function.is_async),
        "last": last,
        "has_body": has_body,
        "max_body": max_body,
        "oversize": oversize,
        "spool_at": min(function.spool_at for function in functions),
        ENABLED_MARK: milter.P_HDR_LEADSPC if "header" in needed else 0,
    }
    for callback, steps in needed.items():
        form = "header_bytes" if callback == "header" else callback
        namespace[form] = _marked(form, steps)
    lists = _macro_lists(functions, set(needed))
    namespace["wanted_actions"] = _wanted_actions(by_stage, has_body, bool(lists))
    namespace["known_macros"] = {
        **{macro: MACRO_CALLBACKS[stage] for stage, macros in lists.items() for macro in macros},
        **USUAL_STAGES,
    }
    for callback, macros in lists.items():
        setattr(namespace[callback], MACROS_MARK, tuple(macros))
    if namespace["async_stages"]:
        milter._note_coroutines(False)  # what collects the message is plain, and writes to disk
    return type(name, (Session,), namespace)


def _marked(form: str, steps: int) -> Callable[..., Any]:
    """A callback of `Session` of its own, as marks are put on the function."""
    plain: types.FunctionType = getattr(Session, f"_on_{form}")
    copy = types.FunctionType(
        plain.__code__, plain.__globals__, form, plain.__defaults__, plain.__closure__
    )
    copy.__qualname__ = f"Session.{form}"
    setattr(copy, STEPS_MARK, steps)
    return copy


def _needed_steps(
    by_stage: dict[str, tuple[Function, ...]], last: str, has_body: bool, is_limited: bool
) -> dict[str, int]:
    """The callbacks that are needed, and which of them need no reply."""
    until = STAGES.index(last)
    names = [name for stage, name in CALLBACK_OF.items() if STAGES.index(stage) <= until]
    needed: dict[str, int] = {}
    for stage, name in CALLBACK_OF.items():
        if name not in names or name == "eom":
            continue
        if stage in by_stage:
            needed[name] = 0
        elif name not in ("data", "eoh"):
            needed[name] = OPTIONAL_CALLBACKS[name][0]
    if until >= STAGES.index("headers"):
        needed["header"] = OPTIONAL_CALLBACKS["header"][0]
    if has_body:
        needed["body"] = 0 if is_limited else OPTIONAL_CALLBACKS["body"][0]
    return {**needed, "eom": 0}


def _wanted_actions(by_stage: dict[str, tuple[Function, ...]], has_body: bool, lists: bool) -> int:
    wanted = milter.SETSYMLIST if lists else 0
    if set(by_stage) & {"mail", "data", "headers", "eom"}:
        wanted |= milter.QUARANTINE
    if "eom" in by_stage:
        wanted |= _EDITS | (milter.MODBODY if has_body else 0)
    return wanted


#: What `Mail` itself reads, by callback: a list that is asked for takes the place of the MTA's own.
_OWN_MACROS = {
    "connect": ("v",),
    "hello": ("{tls_version}", "{cipher}", "{cipher_bits}"),
    "envfrom": ("i", "{auth_authen}", "{auth_type}"),
    "envrcpt": ("i",),
    "data": ("i",),
    "eoh": ("i",),
    "eom": ("i",),
}


def _macro_lists(functions: Sequence[Function], callbacks: set[str]) -> dict[str, list[str]]:
    """For each callback with macros that functions ask for the whole list.

    Raises:
        ValueError: more than an MTA takes for one stage.
    """
    callback_of = {stage: name for name, stage in MACRO_CALLBACKS.items()}
    lists: dict[str, list[str]] = {}
    for function in functions:
        for name in function.macros:
            bare = macro_name(f"{{{name.strip('{}')}}}")
            usual = callback_of.get(USUAL_STAGES.get(bare, -1), "")
            callback = usual if usual in callbacks else CALLBACK_OF[function.at]
            found = lists.setdefault(callback, list(_OWN_MACROS[callback]))
            if bare not in found:
                found.append(bare)
    for callback, macros in lists.items():
        if len(macros) > MAX_MACROS:
            raise ValueError(
                f"filter: macros: at most {MAX_MACROS} for a stage, and the filter itself reads "
                f"{', '.join(_OWN_MACROS[callback])} at {callback}: {' '.join(macros)}"
            )
    return lists
