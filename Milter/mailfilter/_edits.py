"""What was changed, as the shortest list of actions that makes the MTA's message the same.

Changes and deletions mean the same to Postfix and to sendmail where the changes come first and
deletions go from the last header to the first. With a position in the middle they differ: to
Postfix it counts the headers that are left, below its own ``Received``; sendmail counts further
ones that nobody sees. So on sendmail, and on an MTA that does not say what it is, a header gets to
the middle by having those below it follow it to the end.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import milter

from ._addresses import Address, Recipients
from ._body import CHUNK, Spool
from ._headers import Header, Headers

if TYPE_CHECKING:
    from ._mail import Mail

#: A position that is past the end of every message.
END = 1_000_000

#: What sendmail's configuration defines: to it, such a header is there before it is added.
_SENDMAIL_OWN = frozenset(
    b"date from full-name message-id received resent-date resent-from resent-message-id "
    b"return-path".split()
)


class Action(NamedTuple):
    """A call of a context's method, and the flag that the MTA must have agreed to."""

    method: str
    args: tuple[Any, ...]
    flag: str


def all_actions(mail: Mail, *, on_postfix: bool, leading_space: bool) -> Iterator[Action]:
    """The actions that make the MTA's message the one that a function left."""
    yield from sender_actions(mail._came_from, mail._sender)
    yield from recipient_actions(mail._recipients)
    if mail._headers is not None:
        yield from HeaderActions(mail._headers, on_postfix, leading_space)
    if mail._spool is not mail._original and not mail._spool.equals(mail._original):
        yield from body_actions(mail._spool)


def sender_actions(before: Address | None, after: Address | None) -> Iterator[Action]:
    """smfi_chgfrom."""
    if before is None or after is None:
        return
    same_params = after._params_text == before._params_text
    if after.address != before.address or not same_params:
        params = None if same_params else after._params_text
        yield Action("chgfrom", (f"<{after.address}>", params), "CHGFROM")


def recipient_actions(recipients: Recipients) -> Iterator[Action]:
    """smfi_delrcpt, then smfi_addrcpt and smfi_addrcpt_par."""
    before, after = recipients._original, recipients._items
    if len(before) == len(after) and all(map(operator.is_, before, after)):
        return
    kept = {id(one) for one in after}
    gone = [one for one in before if id(one) not in kept]
    came = [one for one in after if not any(one is old for old in before)]
    # One that was taken away and put back as it was.
    for one in list(came):
        for old in gone:
            if old.address == one.address and old._params_text == one._params_text:
                gone.remove(old)
                came.remove(one)
                break
    for address in dict.fromkeys(one.address for one in gone):
        yield Action("delrcpt", (f"<{address}>",), "DELRCPT")
    for one in came:
        params = one._params_text
        flag = "ADDRCPT_PAR" if params else "ADDRCPT"
        yield Action("addrcpt", (f"<{one.address}>", params or None), flag)


def body_actions(spool: Spool) -> Iterator[Action]:
    """smfi_replacebody, a piece at a time; an empty body takes one call too."""
    for position in range(0, spool.size or 1, CHUNK):
        yield Action("replacebody", (_Piece(spool, position),), "MODBODY")


class _Piece:
    """A piece of a body, which is read when it is sent."""

    def __init__(self, spool: Spool, position: int) -> None:
        self._spool = spool
        self._position = position

    def read(self) -> bytes:
        return self._spool.read_at(self._position, CHUNK)


class _Planned(NamedTuple):
    """A header of the message as it shall be: the one that becomes it, if one does."""

    old: Header | None
    name: bytes
    value: bytes


class HeaderActions:
    """Iterate to get the actions for the headers."""

    def __init__(self, headers: Headers, on_postfix: bool, leading_space: bool) -> None:
        self._before = headers._before
        self._on_postfix = on_postfix
        self._leading_space = leading_space
        self._after = headers._items
        self._numbers: dict[int, int] = {}

    def __iter__(self) -> Iterator[Action]:
        before, after = self._before, self._after
        top = 0
        while top < len(after) and before and after[top]._original is None:
            top += 1
        end = top + len(before)
        if after[top:end] == before and all(one._original is None for one in after[end:]):
            # As most filters do: values are changed, and others are added above and below.
            yield from self._changes([(one, one._value) for one in before])
            yield from self._appended(list(map(_new, after[end:])))
            for one in reversed(after[:top]):
                yield self._insert(0, _new(one))
        else:
            yield from self._general()

    def _general(self) -> Iterator[Action]:
        plan = _planned(self._before, self._after)
        if not self._on_postfix:
            plan = _without_middle(plan)
        kept = [at for at, one in enumerate(plan) if one.old is not None]
        top, end = (kept[0], kept[-1] + 1) if kept else (0, 0)
        yield from self._changes([(one.old, one.value) for one in plan if one.old is not None])
        yield from self._deletions(plan)
        for at in range(top, end):
            if plan[at].old is None:
                # Below the MTA's own Received, which it counts.
                yield self._insert(at - top + 1, plan[at])
        yield from self._appended(plan[end:])
        for one in reversed(plan[:top]):
            yield self._insert(0, one)

    def _changes(self, pairs: Iterable[tuple[Header, bytes]]) -> Iterator[Action]:
        for old, value in pairs:
            if value is not old._original and value != old._original:
                # An empty value would delete it.
                wire = self._wire(value) or b" "
                yield Action("chgheader", (old._name, self._number(old), wire), "CHGHDRS")

    def _number(self, header: Header) -> int:
        """Which it is among those of its name."""
        if not self._numbers:
            self._numbers = _numbered(self._before)
        return self._numbers[id(header)]

    def _deletions(self, plan: Sequence[_Planned]) -> Iterator[Action]:
        kept = {id(one.old) for one in plan if one.old is not None}
        for old in reversed(self._before):
            if id(old) not in kept:
                yield Action("chgheader", (old._name, self._number(old), None), "CHGHDRS")

    def _appended(self, plan: Sequence[_Planned]) -> Iterator[Action]:
        there = {old._lower for old in self._before} | _SENDMAIL_OWN
        for one in plan:
            lower = one.name.lower()
            if self._on_postfix or lower not in there:
                yield Action("addheader", (one.name, self._wire(one.value)), "ADDHDRS")
            else:
                yield self._insert(END, one)
            there.add(lower)

    def _insert(self, position: int, one: _Planned) -> Action:
        return Action("addheader", (one.name, self._wire(one.value), position), "ADDHDRS")

    def _wire(self, value: bytes) -> bytes:
        """What stands after the colon, as the MTA wants it."""
        return value[1:] if not self._leading_space and value.startswith(b" ") else value


def _new(header: Header) -> _Planned:
    return _Planned(None, header._name, header._value)


def _numbered(headers: Sequence[Header]) -> dict[int, int]:
    """Of each header the number that it has among those of its name."""
    seen: dict[bytes, int] = {}
    numbers = {}
    for header in headers:
        numbers[id(header)] = seen[header._lower] = seen.get(header._lower, 0) + 1
    return numbers


def _planned(before: Sequence[Header], after: Sequence[Header]) -> list[_Planned]:
    """Match what is new with what is gone from the same place and has the same name."""
    plan: list[_Planned] = []
    gap: list[Header] = []  # new ones since the last that was kept
    done = 0
    places = {id(header): at for at, header in enumerate(before)}
    for header in after:
        at = places.get(id(header))
        if at is None:
            gap.append(header)
            continue
        plan += _matched(before[done:at], gap)
        plan.append(_Planned(header, header._name, header._value))
        done, gap = at + 1, []
    return [*plan, *_matched(before[done:], gap)]


def _matched(gone: Sequence[Header], new: Sequence[Header]) -> Iterator[_Planned]:
    """New headers, each with the header that can become it."""
    start = 0
    for header in new:
        for at in range(start, len(gone)):
            if gone[at]._name == header._name:
                yield _Planned(gone[at], header._name, header._value)
                start = at + 1
                break
        else:
            yield _Planned(None, header._name, header._value)


def _without_middle(plan: Sequence[_Planned]) -> list[_Planned]:
    """The same headers with no new one between old ones: the old ones below it are added anew."""
    kept = [at for at, one in enumerate(plan) if one.old is not None]
    if not kept:
        return list(plan)
    middle = (at for at in range(kept[0], kept[-1]) if plan[at].old is None)
    first = next(middle, len(plan))
    return [*plan[:first], *(_Planned(None, one.name, one.value) for one in plan[first:])]


def missing_flags(actions: Sequence[Action], agreed: int) -> list[str]:
    """The flags that these actions need and that were not agreed."""
    needed = dict.fromkeys(action.flag for action in actions)
    return [flag for flag in needed if not agreed & getattr(milter, flag)]
