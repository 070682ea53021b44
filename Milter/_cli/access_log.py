"""``run --access-log``: a line for each message, of what the filter did with it.

The extension tells of each callback and of each action what it came to (``src/observer.c``), by
whichever way the filter did it. Where there is no access log, all that costs is a look at a flag.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

import milter

import Milter

from .. import _runner
from .._logging import logger
from .._protocol import ALL_STEPS
from .._text import visible

_log = logger("milter.run")

#: Whose steps the log needs, whatever the filter asks for: the callback, its step, and the flag by
#: which the MTA need not wait for an answer. For a message it waits: what it sends in one go before
#: it hangs up, libmilter does not read.
_STEPS = {
    "connect": (milter.P_NOCONNECT, milter.P_NR_CONN),
    "envfrom": (milter.P_NOMAIL, 0),
    "envrcpt": (milter.P_NORCPT, 0),
}
_VERDICTS = {
    milter.CONTINUE: "accept",  # of the last callback
    milter.ACCEPT: "accept",
    milter.REJECT: "reject",
    milter.TEMPFAIL: "tempfail",
    milter.DISCARD: "discard",
}
_REFUSALS = {milter.REJECT: "5", milter.TEMPFAIL: "4"}
#: The parameters of the context's methods, as far as they are told.
_PARAMETERS = {
    "addheader": ("field",),
    "addrcpt": ("rcpt",),
    "chgfrom": ("sender",),
    "chgheader": ("field", "idx", "value"),
    "delrcpt": ("rcpt",),
    "quarantine": ("reason",),
    "replacebody": ("body",),
}
#: How many actions of a message are told of; the rest is a number.
_MOST_ACTIONS = 100
#: What may stand in a line of text as it is.
_PLAIN = re.compile(r'[^\s",=\\]+')


class _Message:
    """What has become of a message so far."""

    def __init__(self, sender: str) -> None:
        self.sender = sender
        self.recipients: list[str] = []
        self.refused: list[tuple[str, str, str]] = []  # recipient, verdict, reply
        self.actions: list[str] = []
        self.more_actions = 0
        self.nanoseconds = 0

    def note(self, action: str) -> None:
        if self.actions[-1:] == [action]:
            return  # a body that is replaced piece by piece
        if len(self.actions) < _MOST_ACTIONS:
            self.actions.append(action)
        else:
            self.more_actions += 1


class _Connection:
    def __init__(self) -> None:
        self.name = ""
        self.address = ""
        self.message: _Message | None = None
        self.reply = ""  # that goes with the next refusal of its kind

    def take_reply(self, verdict: int) -> str:
        """The reply that the MTA gets with a verdict; libmilter drops one of another kind."""
        kind = _REFUSALS.get(verdict)
        if kind is None or self.reply[:1] != kind:
            return ""
        reply, self.reply = self.reply, ""
        return reply


class AccessLog:
    """Writes the log; the extension calls ``ended`` and ``acted``.

    :param target: a file, or ``-`` for standard output.
    :param form: ``text`` or ``json``.
    """

    def __init__(self, target: str, form: str) -> None:
        self._file = _File(target)
        self._format = _as_json if form == "json" else _as_text
        self._connections: dict[Any, _Connection] = {}

    def open(self) -> None:
        """Open the file, as the user that the filter has become.

        :raises OSError: it cannot be.
        """
        self._file.open()

    def attach(self, klass: type[Milter.Base]) -> None:
        """Have the extension tell of what a filter of this class does.

        To be called once the callbacks are registered.
        """
        wanted = ALL_STEPS & ~klass.protocol_mask()
        for name, (off, _) in _STEPS.items():
            if wanted & off:
                getattr(milter, f"set_{name}_callback")(_unless_off(name, off))
        Milter.negotiate_callback = _with_steps(Milter.negotiate_callback)
        milter._observe(self)

    # --- for the extension ---------------------------------------------------------------

    def acted(
        self, ctx: Any, method: str, args: tuple[Any, ...], keywords: dict[str, Any] | None
    ) -> None:
        """A method of a connection's context did what it was asked for."""
        connection = self._connections.get(ctx)
        if connection is None:
            connection = self._connections[ctx] = _Connection()
        if method == "setreply":
            connection.reply = _reply(args, keywords or {})
        elif connection.message is not None:
            connection.message.note(_action(method, args, keywords or {}))

    def ended(
        self, ctx: Any, stage: str, args: tuple[Any, ...] | None, verdict: int, elapsed: int
    ) -> None:
        """A callback has ended, and the MTA is told this verdict."""
        if stage == "close":
            connection = self._connections.pop(ctx, None)
            if connection is not None and connection.message is not None:
                self._write(connection, connection.message, None, "abort", stage, "")
            return
        if stage in ("negotiate", "unknown"):
            return
        connection = self._connections.get(ctx)
        if connection is None:
            connection = self._connections[ctx] = _Connection()
        reply = connection.take_reply(verdict)
        if stage == "connect":
            connection.name, connection.address = _client(args)
        elif stage == "envfrom":
            self._begin(ctx, connection, args)
        message = connection.message
        if message is None:
            return
        message.nanoseconds += elapsed
        if stage == "abort":
            self._end(ctx, connection, message, "abort", stage, "")
            return
        if stage == "envrcpt":
            _take_recipient(ctx, message, args, verdict, reply)
        if verdict != milter.NOREPLY and milter._ends_message(stage, verdict):
            self._end(ctx, connection, message, _VERDICTS.get(verdict, "accept"), stage, reply)

    def _begin(self, ctx: Any, connection: _Connection, args: tuple[Any, ...] | None) -> None:
        if connection.message is not None:
            # Its end was not told, and the macros are those of the next one.
            self._write(connection, connection.message, None, "abort", "envfrom", "")
        connection.message = _Message(_address(ctx, args, "{mail_addr}"))

    def _end(
        self,
        ctx: Any,
        connection: _Connection,
        message: _Message,
        verdict: str,
        stage: str,
        reply: str,
    ) -> None:
        connection.message = None
        self._write(connection, message, ctx.getsymval("i"), verdict, stage, reply)

    def _write(
        self,
        connection: _Connection,
        message: _Message,
        queue_id: str | None,
        verdict: str,
        stage: str,
        reply: str,
    ) -> None:
        actions = list(message.actions)
        if message.more_actions:
            actions.append(f"and {message.more_actions} more")
        fields = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "queue_id": queue_id,
            "client_name": connection.name or None,
            "client_address": connection.address or None,
            "sender": message.sender,
            "recipients": message.recipients,
            "refused": message.refused,
            "verdict": verdict,
            "stage": stage,
            "reply": reply or None,
            "actions": actions,
            "milliseconds": round(message.nanoseconds / 1e6, 3),
            "process": os.getpid(),
        }
        self._file.write(self._format(fields).encode("utf-8", "backslashreplace") + b"\n")


# --- the steps that it needs ----------------------------------------------------------------------


def _with_steps(negotiate: Callable[[Any, list[int]], int]) -> Any:
    """Have the MTA send the steps that the log needs, and wait for no answer where it can."""

    def widened(ctx: Any, opts: list[int]) -> int:
        offer = opts[1]
        verdict = negotiate(ctx, opts)
        if verdict == milter.CONTINUE:
            for off, silent in _STEPS.values():
                if opts[1] & off:
                    opts[1] = opts[1] & ~off | offer & silent
            ctx.getpriv()._protocol = opts[1]
        return verdict

    return widened


def _unless_off(name: str, off: int) -> Callable[..., int]:
    """A callback that the filter did not ask for: what it would do is not done."""
    callback = _runner.CALLBACKS[name]

    def call(ctx: Any, *args: Any) -> int:
        if _runner._filter_of(ctx)._wanted_steps() & off:
            return milter.CONTINUE
        verdict: int = callback(ctx, *args)
        return verdict

    return call


# --- what is told ---------------------------------------------------------------------------------


def _text(value: object) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "surrogateescape")
    return str(value)


def _client(args: tuple[Any, ...] | None) -> tuple[str, str]:
    name, _, address = args or ("", 0, None)
    if isinstance(address, tuple):
        address = address[0]
    return _text(name), "" if address is None else _text(address)


def _address(ctx: Any, args: tuple[Any, ...] | None, macro: str) -> str:
    """What MAIL or RCPT named, where the filter was not asked by the MTA's macro."""
    if args:
        return _text(args[0])
    found = ctx.getsymval(macro)
    return "unknown" if found is None else f"<{found}>"


def _take_recipient(
    ctx: Any, message: _Message, args: tuple[Any, ...] | None, verdict: int, reply: str
) -> None:
    recipient = _address(ctx, args, "{rcpt_addr}")
    if verdict in _REFUSALS:
        message.refused.append((recipient, _VERDICTS[verdict], reply))
    else:
        message.recipients.append(recipient)


def _reply(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
    """As the SMTP client gets it, line by line."""
    code, enhanced, *lines = milter._check_reply(*args, **keywords)
    head = " ".join(_text(part) for part in (code, enhanced) if part)
    texts = [_text(line).replace("%%", "%") for line in lines[0]]
    return f"{head} " + "\n".join(texts) if texts else head


def _action(method: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
    """An action and what it is about."""
    given = {**dict(zip(_PARAMETERS[method], args)), **keywords}
    if method == "replacebody":
        return method
    what = _text(given[_PARAMETERS[method][0]])
    if method == "chgheader":
        kind = method if given["value"] else "delheader"
        return f"{kind}({what}:{given['idx']})"
    return f"{method}({what})"


# --- lines ----------------------------------------------------------------------------------------


def _as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(
        {
            **{key: _visible(value) for key, value in fields.items()},
            "refused": [
                {"recipient": visible(who), "verdict": verdict, "reply": visible(reply) or None}
                for who, verdict, reply in fields["refused"]
            ],
        }
    )


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    return [_visible(each) for each in value] if isinstance(value, list) else value


def _as_text(fields: Mapping[str, Any]) -> str:
    name, address = fields["client_name"] or "unknown", fields["client_address"]
    refused = [f"{who} ({reply or verdict})" for who, verdict, reply in fields["refused"]]
    pairs = [
        ("id", [fields["queue_id"] or "-"]),
        ("client", [f"{name}[{address}]" if address else name]),
        ("from", [fields["sender"] or "<>"]),
        ("to", fields["recipients"] or ["-"]),
        ("refused", refused),
        ("verdict", [fields["verdict"]]),
        ("stage", [fields["stage"]]),
        ("reply", [fields["reply"]] if fields["reply"] else []),
        ("actions", fields["actions"]),
        ("ms", [f"{fields['milliseconds']:.3f}"]),
    ]
    shown = [f"{key}={_listed(values)}" for key, values in pairs if values]
    return f"{fields['time']} [{fields['process']}] {' '.join(shown)}"


def _listed(values: Iterable[str]) -> str:
    return ",".join(_quoted(each) for each in values)


def _quoted(value: str) -> str:
    """A value that can be told from what follows, and back into what it was."""
    text = visible(value.replace("\\", "\\\\"))
    return text if _PLAIN.fullmatch(text) else '"' + text.replace('"', '\\"') + '"'


# --- the file -------------------------------------------------------------------------------------


class _File:
    """Lines at the end of a file, which may be renamed at any time, as logrotate does.

    Each line is one write, so that those of several processes do not mix.
    """

    def __init__(self, target: str) -> None:
        self._path = "" if target == "-" else os.path.abspath(target)
        self._descriptor = -1
        self._lock = threading.Lock()
        self._failing = self._cut_off = False

    def open(self) -> None:
        """Open it.

        :raises OSError: it cannot be.
        """
        if not self._path:
            self._descriptor = sys.__stdout__.fileno() if sys.__stdout__ is not None else 1
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        descriptor = os.open(self._path, flags, 0o640)  # who writes to whom is nobody else's matter
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor

    def write(self, line: bytes) -> None:
        """Append a line. That it cannot be is said once, and no matter of the mail's."""
        with self._lock:
            failed: OSError | None = None
            try:
                if self._path and self._was_renamed():
                    self.open()
            except OSError as exc:
                failed = exc  # the one that was renamed still takes it
            try:
                self._put(line)
            except OSError as exc:
                failed = exc
            if failed is not None and not self._failing:
                _log.error("cannot write the access log %s: %s", self._path or "-", failed)
            elif failed is None and self._failing:
                _log.info("the access log %s is written again", self._path or "-")
            self._failing = failed is not None

    def _was_renamed(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            now, mine = os.stat(self._path), os.fstat(self._descriptor)
            return (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino)
        return True

    def _put(self, line: bytes) -> None:
        line = b"\n" + line if self._cut_off else line
        done = 0
        while done < len(line):
            try:
                done += os.write(self._descriptor, line[done:])
            finally:
                self._cut_off = 0 < done < len(line)
