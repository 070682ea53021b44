"""The macros of an MTA: which it knows at which stage, and which of them it sends.  No I/O."""

from __future__ import annotations

from collections.abc import Mapping

from .vocabulary import MacroValues, Stage, to_bytes
from .wire import MACRO_STAGES, c_string, frame

# The order in which an MTA comes to know its macros.
MACRO_ORDER = (
    Stage.CONNECT,
    Stage.HELO,
    Stage.MAIL,
    Stage.RCPT,
    Stage.DATA,
    Stage.EOH,
    Stage.EOM,
)

# Where sendmail's and Postfix's default configurations send a macro.
USUAL_STAGE = {
    "j": Stage.CONNECT,
    "_": Stage.CONNECT,
    "v": Stage.CONNECT,
    "{daemon_name}": Stage.CONNECT,
    "{daemon_addr}": Stage.CONNECT,
    "{daemon_port}": Stage.CONNECT,
    "{if_name}": Stage.CONNECT,
    "{if_addr}": Stage.CONNECT,
    "{client_connections}": Stage.CONNECT,
    "{tls_version}": Stage.HELO,
    "{cipher}": Stage.HELO,
    "{cipher_bits}": Stage.HELO,
    "{cert_subject}": Stage.HELO,
    "{cert_issuer}": Stage.HELO,
    "i": Stage.MAIL,
    "{auth_type}": Stage.MAIL,
    "{auth_authen}": Stage.MAIL,
    "{auth_ssf}": Stage.MAIL,
    "{auth_author}": Stage.MAIL,
    "{mail_mailer}": Stage.MAIL,
    "{mail_host}": Stage.MAIL,
    "{mail_addr}": Stage.MAIL,
    "{rcpt_mailer}": Stage.RCPT,
    "{rcpt_host}": Stage.RCPT,
    "{rcpt_addr}": Stage.RCPT,
    "{msg_id}": Stage.EOM,
}


class Macros:
    """What the MTA knows, by stage."""

    def __init__(self) -> None:
        self._known: dict[Stage, dict[str, bytes]] = {}

    def set(self, stage: Stage | str, values: MacroValues) -> None:
        """Define macros for a stage, beside those that it has."""
        self._known.setdefault(_macro_stage(stage), {}).update(_macro_table(values))

    def define(self, values: MacroValues | None, early: Stage) -> None:
        """Define macros by ``"STAGE:name"``, or by name for the stage where MTAs send them.

        Args:
            early: the stage of those that MTAs do not send by default.
        """
        for name, value in (values or {}).items():
            prefix, colon, rest = name.partition(":")
            if colon:
                self.set(prefix, {rest: value})
            else:
                self.set(USUAL_STAGE.get(braced(name), early), {name: value})

    def has(self, stage: Stage | str, name: str) -> bool:
        """Whether the macro is defined for the stage."""
        return braced(name) in self._known.get(_macro_stage(stage), {})

    def copy(self) -> Macros:
        """Another one with the same macros."""
        copied = Macros()
        copied._known = {stage: dict(table) for stage, table in self._known.items()}
        return copied

    def end_message(self, before: Macros) -> None:
        """Have those of a message be as they were *before*; the session's stay."""
        for stage in MACRO_ORDER[2:]:
            self._known[stage] = before._known.get(stage, {})

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()

    def packet(
        self, stage: Stage, extra: MacroValues, wanted: Mapping[Stage, tuple[str, ...]]
    ) -> bytes:
        """The packet that goes before a command, empty where there is nothing to tell.

        Args:
            extra: macros for this command alone.
            wanted: by stage, the macros that the filter has named.
        """
        if stage not in MACRO_STAGES:
            if extra:
                raise ValueError(f"no macros are sent at {stage}")
            return b""
        table = self._for(stage, extra, wanted.get(stage))
        if not table:
            return b""
        pairs = b"".join(
            c_string("macro name", name) + c_string(f"macro {name}", value)
            for name, value in table.items()
        )
        return frame(b"D", stage.value + pairs)

    def _for(
        self, stage: Stage, extra: MacroValues, wanted: tuple[str, ...] | None
    ) -> dict[str, bytes]:
        table = {**self._known.get(stage, {}), **_macro_table(extra)}
        if wanted is None:
            return table
        known: dict[str, bytes] = {}
        for earlier in MACRO_ORDER[: MACRO_ORDER.index(stage)]:
            known.update(self._known.get(earlier, {}))
        known.update(table)
        return {name: known[braced(name)] for name in wanted if braced(name) in known}


def _macro_stage(stage: Stage | str) -> Stage:
    known = {one.name: one for one in MACRO_ORDER}
    name = stage.name if isinstance(stage, Stage) else stage.upper()
    if name not in known:
        raise ValueError(f"macro stage {name!r} is none of {', '.join(known)}")
    return known[name]


def braced(name: str) -> str:
    """A macro's name as it travels: in braces where it has more than one letter."""
    if len(name) == 3 and name[0] == "{" and name[2] == "}":
        return name[1]
    return name if len(name) <= 1 or name.startswith("{") else "{" + name + "}"


def _macro_table(values: MacroValues) -> dict[str, bytes]:
    if any(not name for name in values):
        raise ValueError("a macro needs a name")
    return {braced(name): to_bytes(value) for name, value in values.items()}
