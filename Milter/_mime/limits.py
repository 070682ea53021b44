"""The bounds of what is read and checked, and what a check has used of them so far."""

from __future__ import annotations

import logging
import time
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

# SMFIS_CONTINUE of libmilter's mfapi.h, as milter.CONTINUE; written out so that reading mail
# needs no milter connection.
CONTINUE = 0
log = logging.getLogger("mime")
_T = TypeVar("_T")


class _Settings:
    """What applications assign to in `mime`, as it stands at the moment: ``settings.MAX_PARTS``."""

    def __getattr__(self, name: str) -> Any:
        # late, as the façade imports all of this package
        import mime

        return getattr(mime, name)


settings = _Settings()


class LimitExceeded(Exception):
    """Something in the message goes past one of the bounds; the text says which."""


class ZipLimit(zipfile.BadZipFile, LimitExceeded):
    """An archive goes past a bound, or hides what it holds."""


class Budget:
    """The time, the markup and the unpacked bytes that one check of one message may use."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + settings.MAX_SECONDS
        self._bytes = settings.MAX_UNPACKED
        self._markup = settings.MAX_MARKUP
        self.boundaries: dict[Any, Any] = {}
        """What was found of a message, by its root; see `Milter._mime.boundaries`."""

    def check_time(self) -> None:
        """Raise LimitExceeded where the time is up."""
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"takes more than {settings.MAX_SECONDS} s to check")

    def timed(self, items: Iterable[_T]) -> Iterator[_T]:
        """The same items, with a look at the time now and then."""
        for count, item in enumerate(items, 1):
            yield item
            if not count % 64:
                self.check_time()

    def count(self, pieces: int = 1) -> None:
        """Account for pieces of markup; raise LimitExceeded where they are too many."""
        self._markup -= pieces
        if self._markup < 0:
            raise LimitExceeded(f"has more than {settings.MAX_MARKUP} pieces of markup to check")

    def tags(self, items: Iterable[_T]) -> Iterator[_T]:
        """The same items, each of which is a piece of markup."""
        for item in self.timed(items):
            self.count()
            yield item

    def attributes(self, items: Iterable[_T]) -> Iterator[_T]:
        """The same items, which are a tag's attributes: markup only where it has very many.

        These count twice, as each is kept for as long as the tag is looked at.
        """
        for number, item in enumerate(self.timed(items), 1):
            yield item
            if not number % 64:
                self.count(128)

    def unpack(self, size: int) -> None:
        """Account for `size` unpacked bytes; raise where they are too many."""
        self._bytes -= size
        if self._bytes < 0:
            raise ZipLimit(f"unpacks to more than {settings.MAX_UNPACKED} bytes")
        self.check_time()
