"""Configuration files of filters: ``configparser`` with lists of addresses and quieter defaults."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from configparser import ConfigParser, NoOptionError, NoSectionError
from typing import Any, NoReturn

from ._domains import DomainDict

__all__ = ["MilterConfigParser"]

_FILE = "file:"


class _Defaults(dict[str, str]):
    """The defaults as a dict that can also be called, as ``ConfigParser.defaults`` is."""

    def __call__(self) -> Mapping[str, str]:
        return self


class MilterConfigParser(ConfigParser):
    r"""A ``ConfigParser`` whose defaults do not show up as options of every section.

    A section or option that is missing is no error for the methods of this class.

    Args:
        defaults: values that ``get`` alone gives, for options that a section has not.

    >>> config = MilterConfigParser({"port": "1025"})
    >>> config.read_string("[milter]\ntrusted = root@example.com, admin@Example.org")
    >>> config.get("milter", "port"), config.has_option("milter", "port")
    ('1025', False)
    >>> config.getlist("milter", "trusted")
    ['root@example.com', 'admin@Example.org']
    >>> config.getaddrset("milter", "trusted")
    {'example.com': ['root'], 'example.org': ['admin']}
    """

    def __init__(self, defaults: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._own = _Defaults(defaults or {})
        self.defaults = self._own  # type: ignore[method-assign]

    def get(  # type: ignore[override]
        self, sect: str, opt: str, fallback: Any = None, **kwds: Any
    ) -> Any:
        """The option's value.

        Args:
            sect: the section.
            opt: the option.
            fallback: what is returned where the section has it not; None is the parser's default.
            kwds: those of ``ConfigParser.get``.

        Raises:
            configparser.InterpolationError: a lone ``%`` refers to no option.
        """
        if self.has_option(sect, opt):
            return super().get(sect, opt, **kwds)
        return self._own.get(opt) if fallback is None else fallback

    def getint(self, section: str, option: str, **kwds: Any) -> Any:
        """The option as an int, as ``ConfigParser.getint``, the defaults taken into account."""
        return (
            super().getint(section, option, **kwds)
            if self._has(section, option, kwds)
            else kwds["fallback"]
        )

    def getfloat(self, section: str, option: str, **kwds: Any) -> Any:
        """The option as a float, as ``ConfigParser.getfloat``, the defaults taken into account."""
        if self._has(section, option, kwds):
            return super().getfloat(section, option, **kwds)
        return kwds["fallback"]

    def getboolean(self, section: str, option: str, **kwds: Any) -> Any:
        """The option as a bool, as ``ConfigParser.getboolean``, with the defaults."""
        if self._has(section, option, kwds):
            return super().getboolean(section, option, **kwds)
        return kwds["fallback"]

    def _has(self, sect: str, opt: str, kwds: Mapping[str, Any]) -> bool:
        """Whether there is a value; raises where there is none and no fallback either."""
        if self.has_option(sect, opt):
            return True
        if "fallback" in kwds:
            return False
        if opt in self._own:
            return True
        if not self.has_section(sect):
            raise NoSectionError(sect)
        raise NoOptionError(opt, sect)

    def getdefault(self, sect: str, opt: str, default: Any = None) -> Any:
        """The option's value, without the parser's own defaults.

        Args:
            sect: the section.
            opt: the option.
            default: what is returned where the section has it not.
        """
        return self.get(sect, opt) if self.has_option(sect, opt) else default

    def getintdefault(self, sect: str, opt: str, default: Any = None) -> Any:
        """The option's value as an int, without the parser's own defaults.

        Args:
            sect: the section.
            opt: the option.
            default: what is returned where the section has it not.

        Raises:
            ValueError: it is no whole number.
        """
        if not self.has_option(sect, opt):
            return default
        value = self.get(sect, opt)
        try:
            return int(value)
        except ValueError:
            self._refuse(sect, opt, value, "not a whole number")

    def getlist(self, sect: str, opt: str) -> list[str]:
        """The option's comma-separated items without surrounding space; empty ones do not count.

        Args:
            sect: the section.
            opt: the option.
        """
        value = self.get(sect, opt) if self.has_option(sect, opt) else ""
        return [item for item in (part.strip() for part in value.split(",")) if item]

    def getaddrset(
        self, sect: str, opt: str, dir: str | os.PathLike[str] = ""
    ) -> dict[str, list[str]]:
        """The option's addresses as a map of domains to local parts.

        The domains are in lower case and without a final dot; the map finds one in any form: in
        upper case, with a final dot, in Unicode or in ASCII (IDNA).

        Items are ``user@dom``, with or without ``<>``, where an empty user conventionally stands
        for all; and ``file:NAME``, a list of words in the file NAME: addresses, or local parts in
        the domain that the file is named after.  ``#`` begins a comment there.

        Args:
            sect: the section.
            opt: the option.
            dir: where the files are.

        Raises:
            ValueError: an item is neither.
            OSError: a file cannot be read.
        """
        result = DomainDict[list[str]]()
        for item in self.getlist(sect, opt):
            if item.startswith(_FILE):
                name = item[len(_FILE) :].strip()
                words, domain = _words(os.path.join(dir, name)), os.path.basename(name)
            else:
                words, domain = iter([item]), ""
            for word in words:
                user, at, host = word.strip("<>").rpartition("@")
                if not at:
                    user, host = host, domain
                if not host:
                    self._refuse(sect, opt, word, "neither user@domain nor file:NAME")
                result.setdefault(result.key_for(host), []).append(user)
        return result

    def getaddrdict(self, sect: str, opt: str, dir: str | os.PathLike[str] = "") -> dict[str, str]:
        """A map of addresses to the option that lists them.

        An item ``file:NAME`` stands for the words in that file.  An address that several options
        list belongs to the last.

        Args:
            sect: the section.
            opt: the option that names the others.
            dir: where the files are.

        Raises:
            OSError: a file cannot be read.
        """
        result: dict[str, str] = {}
        for name in self.getlist(sect, opt):
            for item in self.getlist(sect, name):
                if item.startswith(_FILE):
                    path = os.path.join(dir, item[len(_FILE) :].strip())
                    result.update((word, name) for word in _words(path))
                else:
                    result[item] = name
        return result

    @staticmethod
    def _refuse(sect: str, opt: str, value: str, rule: str) -> NoReturn:
        raise ValueError(f"option {opt!r} in section {sect!r}: {value!r} is {rule}")


def _words(path: str | os.PathLike[str]) -> Iterator[str]:
    """The words of a text file, without comments."""
    # An editor may have put a byte order mark before the first.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as fp:
        for line in fp:
            yield from line.partition("#")[0].split()
