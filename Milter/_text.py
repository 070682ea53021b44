"""Text that strangers wrote, made fit for a line of a log."""

from __future__ import annotations

import re

#: What could begin another line, steer a terminal, turn the direction of what follows, or has no
#: code in UTF-8: control characters but the tab, separators, bidirectional marks, surrogates.
_UNFIT = re.compile("[\0-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_NAMED = {"\n": "\\n", "\r": "\\r"}


def visible(text: str) -> str:
    """Text as one line, with what is unfit for it written as an escape.

    Args:
        text: any text. Surrogates that stand for bytes (``surrogateescape``) become ``\\xNN``.
    """
    return _UNFIT.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    char = found[0]
    code = ord(char) - 0xDC00 if "\udc80" <= char <= "\udcff" else ord(char)
    return _NAMED.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
