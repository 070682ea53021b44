"""Policies for senders from sendmail's access map.

An entry such as ``SPF-Fail:example.com  REJECT`` says what to do with mail whose sender is in that
domain when some check, here SPF, comes to some result; what the words mean is up to the filter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

from ._dbmfile import Reader, open_reader

__all__ = ["MTAPolicy", "dbmopen"]

_LONGEST_DOMAIN = 255


class _Conf(Protocol):
    """The settings that a policy reads; each but ``access_file`` may be missing."""

    access_file: str | os.PathLike[str] | None


def dbmopen(fname: str | os.PathLike[str], mode: str = "r") -> Reader:
    """Open the map *fname*: a Berkeley DB file (as ``makemap hash`` makes) or one of a dbm kind.

    The suffix ``.db`` may be left out, as in sendmail's own configuration.  *mode* is ``"r"``,
    since the map is the MTA's.  The result has ``get(key)``, ``keys()`` and ``close()``.

    Raises FileNotFoundError, OSError, ValueError for a file of no known kind, and ImportError that
    names the extra to install (``pymilter[policy]``) for a Berkeley DB file without berkeleydb.
    """
    if mode != "r":
        raise ValueError(f"mode must be 'r', not {mode!r}: access maps are only read")
    return open_reader(os.fspath(fname))


class MTAPolicy:
    """The access map's entries for one sender, as a context manager.

    *sender* is the envelope sender, with or without ``<>``.  The map is *access_file* or else
    ``conf.access_file``; where both are None there is no policy.  ``conf.access_file_nulls`` is
    true for maps made with ``makemap -N`` (keys end in a null byte); ``conf.access_file_colon``,
    true where it is missing, says that tags are written ``prefix:`` and not ``prefix!``.

    ::

        with MTAPolicy(sender, conf) as policy:
            if policy.getPolicy("SPF-Fail") == "REJECT":
                ...
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
        """Open the map; raises what ``dbmopen`` does."""
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
        """The value of the most specific entry with tag *pfx*, or None.

        Tried in this order: ``pfx:sender``, ``pfx:domain``, ``pfx:.parent`` for each parent domain,
        ``pfx:``, ``pfx``; each as written and then in lower case, which is how ``makemap`` folds
        keys unless told not to.  Raises OSError where the map cannot be read.
        """
        if self.acf is None:
            return None
        for name in self._names(pfx):
            for spelling in dict.fromkeys((name, name.lower())):
                value = self.acf.get(_encode(spelling) + b"\0" * self.use_nulls)
                if value is not None:
                    return value.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return None

    def _names(self, pfx: str) -> Iterator[str]:
        tag = pfx + (":" if self.use_colon else "!")
        if self.sender:
            yield tag + self.sender
            if self.domain:
                yield tag + self.domain
            parent = self.domain if len(self.domain) <= _LONGEST_DOMAIN else ""
            while "." in parent:
                parent = parent.partition(".")[2]
                yield f"{tag}.{parent}"
        yield tag
        yield pfx


def _encode(name: str) -> bytes:
    """The name as the MTA wrote it; what no MTA can have written matches nothing."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace")
