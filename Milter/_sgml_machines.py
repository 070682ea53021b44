"""State machines that find where a construct of SGML or HTML ends, however the text is cut.

A table has a row for each state: what to search for, where each character found leads, and where
any other does. So no text is looked at twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "ANGLE",
    "CHARREF_END",
    "COMMENT",
    "COMMENT_HTML",
    "DECLARATION",
    "ENTITY_END",
    "GREATER",
    "MARKED",
    "MARKED_HEAD",
    "MARKED_MS",
    "Machine",
    "RawEnd",
    "SHORT",
    "TAG",
    "TAG_HTML",
    "WS",
]

_END = -1  # the construct ends after this character
_END_BEFORE = -2  # the construct ends before this character

_Table = Mapping[int, tuple["re.Pattern[str]", Mapping[str, int], int]]


def _state(pattern: str, moves: Mapping[str, int], other: int = _END) -> Any:
    """One state: what to search, where the character found leads, where any other leads."""
    table: dict[str, int] = {}
    for characters, target in moves.items():
        table.update(dict.fromkeys(characters, target))
    return re.compile(pattern), table, other


# HTML's white space (the HTML standard, section 13.2.5); \s has more, which no browser skips.
WS = " \t\n\r\f"


def _tag_table(splits: bool) -> _Table:
    """The states of a tag; with `splits` an unquoted ``<`` ends it (SGML's unclosed tag)."""
    less, stop = ("<", {">": _END, "<": _END_BEFORE}) if splits else ("", {">": _END})
    name, before, attribute, after, value, double, single, plain = range(8)
    return {
        name: _state(rf"[{WS}/>{less}]", {WS + "/": before, **stop}),
        before: _state(rf"[^{WS}/]", stop, attribute),
        attribute: _state(rf"[{WS}/>={less}]", {WS: after, "/": before, "=": value, **stop}),
        after: _state(rf"[^{WS}]", {"=": value, "/": before, **stop}, attribute),
        value: _state(rf"[^{WS}]", {'"': double, "'": single, **stop}, plain),
        double: _state('"', {'"': before}),
        single: _state("'", {"'": before}),
        plain: _state(rf"[{WS}>{less}]", {WS: before, **stop}),
    }


TAG = _tag_table(splits=True)
TAG_HTML = _tag_table(splits=False)
COMMENT: _Table = {
    0: _state("-", {"-": 1}),
    1: _state(r"[\s\S]", {"-": 2}, 0),
    2: _state("[^-]", {">": _END, WS: 3}, 0),
    3: _state(r"\S", {">": _END, "-": 1}, 0),
}
COMMENT_HTML: _Table = {
    0: _state("-", {"-": 1}),
    1: _state(r"[\s\S]", {"-": 2}, 0),
    2: _state("[^-]", {">": _END, "!": 3}, 0),
    3: _state(r"[\s\S]", {">": _END, "-": 1}, 0),
    4: _state(r"[\s\S]", {">": _END, "-": 5}, 0),  # just after <!--
    5: _state(r"[\s\S]", {">": _END, "-": 2}, 0),  # just after <!---
}
DECLARATION: _Table = {
    0: _state("[>\"'[-]", {">": _END, '"': 1, "'": 2, "[": 6, "-": 3}),
    1: _state('"', {'"': 0}),
    2: _state("'", {"'": 0}),
    3: _state(r"[\s\S]", {"-": 4, ">": _END, '"': 1, "'": 2, "[": 6}, 0),
    4: _state("-", {"-": 5}),
    5: _state(r"[\s\S]", {"-": 0}, 4),
    # the internal subset between brackets
    6: _state("[]\"'-]", {"]": 0, '"': 7, "'": 8, "-": 9}),
    7: _state('"', {'"': 6}),
    8: _state("'", {"'": 6}),
    9: _state(r"[\s\S]", {"-": 10, "]": 0, '"': 7, "'": 8}, 6),
    10: _state("-", {"-": 11}),
    11: _state(r"[\s\S]", {"-": 6}, 10),
}
MARKED: _Table = {  # ]]>, with white space anywhere inside
    0: _state("]", {"]": 1}),
    1: _state(r"\S", {"]": 2}, 0),
    2: _state(r"\S", {"]": 2, ">": _END}, 0),
}
MARKED_MS: _Table = {  # ]>, with white space inside
    0: _state("]", {"]": 1}),
    1: _state(r"\S", {"]": 1, ">": _END}, 0),
}
MARKED_HEAD: _Table = {  # the keyword of a marked section, as far as it can be judged
    0: _state(r"\S", {}, 1),
    1: _state(r"[^a-zA-Z]", {}),
}
GREATER: _Table = {0: _state(">", {">": _END})}
ANGLE: _Table = {0: _state("[<>]", {">": _END, "<": _END_BEFORE})}
SHORT: _Table = {0: _state("[/<>]", {})}
CHARREF_END: _Table = {0: _state("[^0-9]", {})}
ENTITY_END: _Table = {0: _state("[^-.a-zA-Z0-9]", {})}


class Machine:
    """Looks for the end of one construct and remembers where it stands between two texts."""

    __slots__ = ("state", "table")

    def __init__(self, table: _Table, state: int = 0) -> None:
        self.table = table
        self.state = state

    def scan(self, text: str, pos: int = 0) -> int:
        """The index in `text` at which the construct ends, or -1 where it goes on."""
        table, state = self.table, self.state
        while True:
            pattern, moves, other = table[state]
            found = pattern.search(text, pos)
            if found is None:
                self.state = state
                return -1
            pos = found.end()
            state = moves.get(found.group(), other)
            if state < 0:
                return pos if state == _END else pos - 1


class RawEnd:
    """Looks for the end tag of an element whose content is no markup."""

    __slots__ = ("overlap", "pattern", "tail")

    def __init__(self, pattern: re.Pattern[str], overlap: int) -> None:
        self.pattern = pattern
        self.overlap = overlap
        self.tail = ""

    def scan(self, text: str, pos: int = 0) -> int:
        """0 where the end tag has begun by the end of `text`, -1 where it has not."""
        window = self.tail + text[pos:]
        if self.pattern.search(window):
            return 0
        self.tail = window[-self.overlap :]
        return -1
