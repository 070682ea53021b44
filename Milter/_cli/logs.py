"""The log of ``run``: its lines on standard error, or what ``--log-config`` says."""

from __future__ import annotations

import ast
import configparser
import contextlib
import json
import logging
import logging.config
import os
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from .._systemd import in_journal
from . import toml
from .common import EXIT_ERROR, CommandError

LEVELS = ("debug", "info", "warning", "error")


class _JournalFormatter(logging.Formatter):
    """Lines with the priority that the journal reads at their start (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4
        if record.levelno < logging.WARNING:
            priority = 6 if record.levelno >= logging.INFO else 7
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


class _JsonFormatter(logging.Formatter):
    """An object to a line, in ASCII, so that nothing in it can be taken for a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc)
        fields: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return json.dumps(fields)


def set_up(level: str, form: str, several: bool) -> None:
    """Write the log on standard error.

    :param level: one of ``LEVELS``.
    :param form: ``text`` or ``json``.
    :param several: processes write it.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    elif in_journal():
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        process = "[%(process)d] " if several else ""
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s {process}%(levelname)s %(name)s: %(message)s")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler])


# --- --log-config ---------------------------------------------------------------------------------

#: The sections of a dictionary for ``logging.config``, and whether each is a table of tables.
_SECTIONS = {
    "version": False,
    "formatters": True,
    "filters": True,
    "handlers": True,
    "loggers": True,
    "root": False,
    "incremental": False,
    "disable_existing_loggers": False,
}


class LogConfig:
    """A file for ``logging.config``: TOML, JSON or INI, by its suffix, else by what is in it.

    :param path: of the file.
    :raises CommandError: it cannot be read, or is wrong; the message names file, key and rule.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._ini: configparser.RawConfigParser | None = None
        self._dictionary: dict[str, Any] = {}
        text = toml.read_text("--log-config", path)
        form = os.path.splitext(path)[1].lower()
        if form not in (".toml", ".json", ".ini"):
            form = _form_of(text)
        if form == ".ini":
            self._ini = self._read_ini(text)
        else:
            found = self._read_json(text) if form == ".json" else None
            self._check(toml.parse("--log-config", path, text) if found is None else found)

    def apply(self, is_reload: bool = False) -> None:
        """Log as it says, and no longer as before.

        :param is_reload: who writes these files still must not lose them: where they are to begin
            anew, they go on.
        :raises CommandError: that cannot be, such as where a file cannot be written.
        """
        if is_reload:
            self._keep_files()
        try:
            if self._ini is not None:
                # What is typed for it since Python 3.12 only.
                source: Any = self._ini
                logging.config.fileConfig(source, disable_existing_loggers=False)
            else:
                logging.config.dictConfig(self._dictionary)
        except Exception as exc:
            # Whatever a handler raises that somebody wrote.
            raise CommandError(self._complaint(exc), EXIT_ERROR) from exc

    def _keep_files(self) -> None:
        for handler in self._dictionary.get("handlers", {}).values():
            if str(handler.get("mode", "")).startswith("w"):
                handler["mode"] = handler["mode"].replace("w", "a", 1)
        if self._ini is not None:
            for section in self._ini.sections():
                if section.startswith("handler_"):
                    _keep_file(self._ini[section])

    def _complaint(self, exc: Exception) -> str:
        """The section that cannot be configured, and why: the first cause of all."""
        where, cause = "", exc
        while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
            found = re.match(r"Unable to configure (\w+) '(.*)'", str(cause))
            if found and not where:
                where = f"{found[1]}s.{found[2]}: "
            cause = cause.__cause__
        return f"--log-config {self._path}: {where}{type(cause).__name__}: {cause}"

    def _refuse(self, key: str, rule: str) -> CommandError:
        return CommandError(f"--log-config {self._path}: {key}: {rule}")

    # --- TOML and JSON ---------------------------------------------------------------------

    def _read_json(self, text: str) -> Any:
        try:
            found = json.loads(text)
        except ValueError as exc:
            raise CommandError(f"--log-config {self._path}: not JSON: {exc}") from None
        if not isinstance(found, dict):
            raise CommandError(f"--log-config {self._path}: must be an object with sections")
        return found

    def _check(self, found: dict[str, Any]) -> None:
        for key in found:
            if key not in _SECTIONS:
                raise CommandError(f"--log-config {self._path}: {toml.unknown_key(key, _SECTIONS)}")
        if found.get("version") != 1 or isinstance(found["version"], bool):
            raise self._refuse("version", "must be 1, the only form that logging.config knows")
        for section, has_tables in _SECTIONS.items():
            if has_tables:
                self._check_tables(section, found.get(section, {}))
        for name, handler in found.get("handlers", {}).items():
            if "class" not in handler and "()" not in handler:
                raise self._refuse(
                    f"handlers.{name}", "has no class, such as 'logging.StreamHandler'"
                )
            self._check_names(f"handlers.{name}", handler, found)
        self._check_table("root", found.get("root", {}))
        for name, table in [("root", found.get("root", {})), *_named(found, "loggers")]:
            self._check_names(name, table, found)
        self._dictionary = {"disable_existing_loggers": False, **found}

    def _check_table(self, key: str, value: object) -> None:
        if not isinstance(value, dict):
            raise self._refuse(key, f"must be a table, not {toml.kind_of(value)}")

    def _check_tables(self, section: str, tables: Any) -> None:
        self._check_table(section, tables)
        for name, table in tables.items():
            self._check_table(f"{section}.{name}", table)

    def _check_names(self, where: str, table: dict[str, Any], found: dict[str, Any]) -> None:
        """The level, and the names of what stands in other sections."""
        level = table.get("level", "INFO")
        if isinstance(level, bool) or not isinstance(level, (str, int)):
            raise self._refuse(f"{where}.level", f"must be a name, not {toml.kind_of(level)}")
        if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
            raise self._refuse(
                f"{where}.level",
                f"{level!r} is no level: write DEBUG, INFO, WARNING, ERROR or CRITICAL",
            )
        for key, section in (
            ("handlers", "handlers"),
            ("filters", "filters"),
            ("formatter", "formatters"),
        ):
            if key not in table or (key == "handlers" and where.startswith("handlers.")):
                continue
            names = [table[key]] if key == "formatter" else table[key]
            if not isinstance(names, list):
                raise self._refuse(f"{where}.{key}", "must be a list of names")
            self._check_known(f"{where}.{key}", names, section, found.get(section, {}))

    def _check_known(
        self, where: str, names: Iterable[Any], section: str, known: Mapping[str, Any]
    ) -> None:
        for name in names:
            if isinstance(name, str) and name not in known:
                there = f"there are {', '.join(known)}" if known else "there are none"
                raise self._refuse(where, f"{name!r} is not among the {section}: {there}")

    # --- INI -------------------------------------------------------------------------------

    def _read_ini(self, text: str) -> configparser.RawConfigParser:
        parser = configparser.ConfigParser()
        try:
            parser.read_string(text, self._path)
            for section in ("loggers", "handlers", "formatters"):
                self._check_section(parser, section)
        except configparser.Error as exc:
            words = " ".join(str(exc).split())
            raise CommandError(f"--log-config {self._path}: not INI: {words}") from None
        return parser

    def _check_section(self, parser: configparser.ConfigParser, section: str) -> None:
        if not parser.has_option(section, "keys"):
            raise self._refuse(
                f"[{section}]", "must be there with keys=, the names of what follows"
            )
        names = [name.strip() for name in parser[section]["keys"].split(",")]
        for name in filter(None, names):
            if not parser.has_section(f"{section[:-1]}_{name}"):
                raise self._refuse(
                    f"[{section}] keys", f"there is no section [{section[:-1]}_{name}]"
                )
        if section == "loggers" and "root" not in names:
            raise self._refuse("[loggers] keys", "must have root among them")


def _named(found: Mapping[str, Any], section: str) -> list[tuple[str, Any]]:
    return [(f"{section}.{name}", table) for name, table in found.get(section, {}).items()]


def _keep_file(handler: configparser.SectionProxy) -> None:
    """Have a handler whose mode is the second argument, as a FileHandler's, or named, append."""
    with contextlib.suppress(ValueError, SyntaxError, configparser.Error):
        args = ast.literal_eval(handler.get("args", "()"))
        if isinstance(args, tuple) and str(args[1:2]).startswith("('w"):
            handler["args"] = repr((args[0], args[1].replace("w", "a", 1), *args[2:]))
        kwargs = ast.literal_eval(handler.get("kwargs", "{}"))
        if isinstance(kwargs, dict) and str(kwargs.get("mode", "")).startswith("w"):
            handler["kwargs"] = repr({**kwargs, "mode": kwargs["mode"].replace("w", "a", 1)})


def _form_of(text: str) -> str:
    """The suffix that a file should have."""
    if text.lstrip().startswith("{"):
        return ".json"
    lines = [line.strip() for line in text.splitlines()]
    # Each INI file for logging has this section with these keys, whose values are no TOML.
    is_ini = "[loggers]" in lines and any(line.replace(" ", "")[:5] == "keys=" for line in lines)
    return ".ini" if is_ini else ".toml"
