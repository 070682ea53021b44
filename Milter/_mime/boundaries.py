"""What begins and ends the parts of a message, looked for in the text of one of them."""

from __future__ import annotations

import bisect
import re
from collections import Counter

DASHED_LINE = re.compile(rb"(?:(?<=[\r\n])|\A)--([^\r\n]*)")
_HEADER_IN_TEXT = re.compile(
    rb"[\r\n][ \t]*content-(?:type|disposition|transfer-encoding)[ \t\v\f\x1c-\x1f]*(?:[:\r\n]|\Z)",
    re.IGNORECASE,
)


class Boundaries:
    """What begins and ends the parts of a message, to look for in the text of one of them."""

    def __init__(self, boundaries: set[bytes]) -> None:
        self._exact = boundaries | {boundary + b"--" for boundary in boundaries}
        # In order, and none that begins as another: at most one can be the beginning of a line.
        self._beginnings: list[bytes] = []
        for boundary in sorted(boundaries):
            if not self._beginnings or not boundary.startswith(self._beginnings[-1]):
                self._beginnings.append(boundary)

    def _resembles(self, line: bytes) -> bool:
        at = bisect.bisect_right(self._beginnings, line)
        return at > 0 and line.startswith(self._beginnings[at - 1])

    def forged(self, before: bytes, after: bytes) -> bool:
        """Whether a text that was changed has parts that nobody checked.

        They begin at a line that was no boundary, or for those who compare only the beginning of
        a line (RFC 2046, 5.1.1) where a header follows, whatever stands between the two.
        """
        if not self._exact or b"--" not in after:
            return False
        found = DASHED_LINE.finditer(after)
        first = next((line for line in found if self._resembles(line[1])), None)
        if first is None:
            return False
        return bool(
            _HEADER_IN_TEXT.search(after, first.end()) or self._count(after) - self._count(before)
        )

    def _count(self, text: bytes) -> Counter[bytes]:
        lines = (found[1].rstrip(b" \t") for found in DASHED_LINE.finditer(text))
        return Counter(line for line in lines if line in self._exact)
