"""Policies for senders from sendmail's access map.

An entry such as ``SPF-Fail:example.com  REJECT`` says what to do with mail whose sender is in that
domain when some check, here SPF, comes to some result; what the words mean is up to the filter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import zip_longest
from typing import Protocol

from . import _domains
from ._dbmfile import Reader, open_reader

__all__ = ["MTAPolicy", "dbmopen"]

_LONGEST_DOMAIN = 255


class _Conf(Protocol):
    """The settings that a policy reads; each but ``access_file`` may be missing."""

    access_file: str | os.PathLike[str] | None


def dbmopen(fname: str | os.PathLike[str], mode: str = "r") -> Reader:
    """Open a map: a Berkeley DB file (as ``makemap hash`` makes) or one of a dbm kind.

    Args:
        fname: its file; the suffix ``.db`` may be left out, as in sendmail's own configuration.
        mode: ``"r"``, since the map is the MTA's.

    Returns:
        An object with ``get(key)``, ``keys()`` and ``close()``.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is of no known kind, or *mode* is not ``"r"``.
        ImportError: it is a Berkeley DB file and berkeleydb is not installed; the message names the
            extra (``pymilter[policy]``).
    """
    if mode != "r":
        raise ValueError(f"mode must be 'r', not {mode!r}: access maps are only read")
    return open_reader(os.fspath(fname))


class MTAPolicy:
    """The access map's entries for one sender, as a context manager.

    ::

        with MTAPolicy(sender, conf) as policy:
            if policy.getPolicy("SPF-Fail") == "REJECT":
                ...

    Args:
        sender: the envelope sender, with or without ``<>``.
        conf: the settings. ``access_file`` is the map; ``access_file_nulls`` is true for maps made
            with ``makemap -N`` (keys end in a null byte); ``access_file_colon``, true where it is
            missing, says that tags are written ``prefix:`` and not ``prefix!``.
        access_file: the map, in place of that of *conf*. Where both are None there is no policy.
    """

    def __init__(
        self,
        sender: str | None,
        conf: _Conf,
        access_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.sender = (sender or "").strip()
        if self.sender.startswith("<") and self.sender.endswith(">"):
            self.sender = self.sender[1:-1]
        # The same domain, as a sender may write it to be found under none of its entries.
        if "@" in self.sender and self.sender.endswith("."):
            self.sender = self.sender[:-1]
        self.domain = self.sender.rpartition("@")[2].lower()
        self.access_file = conf.access_file if access_file is None else access_file
        self.use_nulls = bool(getattr(conf, "access_file_nulls", False))
        self.use_colon = bool(getattr(conf, "access_file_colon", True))
        self.acf: Reader | None = None

    def __enter__(self) -> MTAPolicy:
        """Open the map.

        Raises:
            OSError: as for ``dbmopen``, and so do ValueError and ImportError.
        """
        if self.access_file is not None:
            self.acf = dbmopen(self.access_file, "r")
        return self

    def __exit__(self, t: object, v: object, b: object) -> None:
        """Close the map."""
        self.close()

    def close(self) -> None:
        """Close the map; there is no policy afterwards."""
        acf, self.acf = self.acf, None
        if acf is not None:
            acf.close()

    def getPolicy(self, pfx: str) -> str | None:
        """The value of the most specific entry with a tag.

        Tried in this order: ``pfx:sender``, ``pfx:domain``, ``pfx:.parent`` for each parent domain,
        ``pfx:``, ``pfx``; each as written and then in lower case, which is how ``makemap`` folds
        keys unless told not to.  A domain is tried as the sender wrote it, in ASCII and in Unicode
        (IDNA), since the map may have either.

        Args:
            pfx: the tag, without colon: ``"SPF-Fail"``.

        Returns:
            The value, or None where there is no such entry.

        Raises:
            OSError: the map cannot be read.
        """
        if self.acf is None:
            return None
        spellings = (spelling for name in self._names(pfx) for spelling in (name, name.lower()))
        for spelling in dict.fromkeys(spellings):
            value = self.acf.get(_encode(spelling) + b"\0" * self.use_nulls)
            if value is not None:
                return value.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return None

    def _names(self, pfx: str) -> Iterator[str]:
        tag = pfx + (":" if self.use_colon else "!")
        if self.sender:
            local, at, _ = self.sender.rpartition("@")
            forms = _forms(self.domain)
            yield tag + self.sender
            yield from (tag + local + at + form for form in forms)
            yield from (tag + form for form in forms if form)
            for parents in zip_longest(*map(_parents, forms)):
                yield from (f"{tag}.{parent}" for parent in parents if parent)
        yield tag
        yield pfx


def _forms(domain: str) -> list[str]:
    """The forms of a domain in which a map may have it, as written first."""
    forms = domain, _domains.canonical(domain), _domains.unicode_form(domain)
    return list(dict.fromkeys(forms))


def _parents(domain: str) -> Iterator[str]:
    """The domains above a domain, the nearest first."""
    while "." in domain and len(domain) <= _LONGEST_DOMAIN:
        domain = domain.partition(".")[2]
        yield domain


def _encode(name: str) -> bytes:
    """The name as the MTA wrote it; what no MTA can have written matches nothing."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace")
