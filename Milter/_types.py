"""Types that applications may name, as ``Milter.NAME``; loaded when one is asked for."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Union

#: What ``connect`` gets as the client's address: (ip, port), (ip6, port, flowinfo, scope_id), the
#: path of a unix socket, or None where the MTA knows none.
Address = Union[tuple[str, int], tuple[str, int, int, int], str, None]

#: What a callback may return: a verdict, or what is awaited for one, as from ``async def``.
Answer = Union[int, Awaitable[int]]
