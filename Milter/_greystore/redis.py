"""Greylist records in a Redis server, which several hosts may share.

Each record is a hash under a key of its own, and each check one Lua script, which the server runs
as a whole.  Redis itself forgets records some time after they no longer matter.  How much a
crash of the server loses is for its configuration to say (``appendonly``).  Needs Redis 5 or a
compatible server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from .._extras import unusable
from . import GRACE, MARGIN, TIMEOUT, Limits, Row, State, Store, StoreUnavailable, Triple

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as exc:
    raise unusable("a greylist on Redis", "redis", "redis", exc) from exc

_PREFIX = "milter:greylist:"
_MOST_CONNECTIONS = 16
_BATCH = 500

_NOW = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000 + ARGV[1]
"""
# The rule of _greystore.advance.
_CHECK = (
    _NOW
    + """
local old = redis.call('HMGET', KEYS[1], 'firstseen', 'lastseen', 'cnt')
local firstseen, lastseen, cnt = tonumber(old[1]), tonumber(old[2]), tonumber(old[3])
local grey, expire, retain = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if not (firstseen and lastseen and cnt)
    or cnt > 0 and now > lastseen + retain
    or cnt == 0 and (now > firstseen + expire or now < firstseen) then
  firstseen, cnt = now, 0
elseif cnt > 0 or now >= firstseen + grey then
  cnt = cnt + 1
end
redis.call('HSET', KEYS[1], 'firstseen', firstseen, 'lastseen', now, 'cnt', cnt)
redis.call('PEXPIRE', KEYS[1], cnt > 0 and ARGV[6] or ARGV[5])
return cnt
"""
)
_CLEAN = (
    _NOW
    + """
local lastseen = redis.call('HGET', KEYS[1], 'lastseen')
if lastseen and (tonumber(lastseen) or 0) < now - ARGV[2] then
  return redis.call('DEL', KEYS[1])
end
return 0
"""
)
_MERGE = """
local lastseen = tonumber(redis.call('HGET', KEYS[1], 'lastseen') or '')
if lastseen and lastseen >= tonumber(ARGV[2]) then
  return 0
end
redis.call('HSET', KEYS[1], 'firstseen', ARGV[1], 'lastseen', ARGV[2], 'cnt', ARGV[3],
    'umis', ARGV[4])
redis.call('PERSIST', KEYS[1])
return 1
"""


def open_store(url: str) -> RedisStore:
    """The store behind a ``redis://``, ``rediss://`` or ``unix://`` URL."""
    return RedisStore(url)


class RedisStore(Store):
    """The keys ``milter:greylist:ip:sender:recipient`` of one Redis database."""

    def __init__(self, url: str) -> None:
        # redis-py has more time for each by default, and tries several times.
        limits = {"timeout": TIMEOUT, "socket_timeout": TIMEOUT, "retry": Retry(NoBackoff(), 0)}
        if not url.lower().startswith("unix:"):
            # Earlier versions do not take it there, where connecting is immediate.
            limits["socket_connect_timeout"] = TIMEOUT
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url, max_connections=_MOST_CONNECTIONS, **limits
            )
        except ValueError as exc:
            # The URL itself may hold a password.
            raise ValueError(f"dbname is no URL that redis-py understands: {exc}") from None
        self._client: Any = redis.Redis(connection_pool=pool)
        self._check = self._client.register_script(_CHECK)
        self._clean = self._client.register_script(_CLEAN)
        self._merge = self._client.register_script(_MERGE)
        self._closed = False
        with self._errors():
            self._client.ping()

    def check(self, triple: Triple, limits: Limits, timeinc: float) -> int:
        keep = (math.ceil((time + MARGIN) * 1000) for time in (limits.expire, limits.retain))
        args = [float(timeinc), limits.grey + GRACE, limits.expire, limits.retain, *keep]
        with self._errors():
            return int(self._check(keys=[_PREFIX + triple.key], args=args))

    def clean(self, retain: float, timeinc: float) -> int:
        args = [float(timeinc), retain]
        removed = 0
        with self._errors():
            for keys in self._batches():
                removed += sum(self._each(self._clean, ((key, args) for key in keys)))
        return removed

    def merge(self, rows: list[Row]) -> None:
        records = iter(
            (_PREFIX + triple.key, [repr(state[0]), repr(state[1]), state.cnt, umis or ""])
            for triple, state, umis in rows
        )
        with self._errors():
            while batch := list(islice(records, _BATCH)):
                self._each(self._merge, batch)

    def rows(self) -> Iterable[Row]:
        with self._errors():
            for keys in self._batches():
                pipeline = self._client.pipeline(transaction=False)
                for key in keys:
                    pipeline.hmget(key, *State._fields, "umis")
                for key, values in zip(keys, pipeline.execute()):
                    row = _row(key, values)
                    if row is not None:
                        yield row

    def close(self) -> None:
        self._closed = True
        self._client.connection_pool.disconnect()

    def _batches(self) -> Iterator[list[bytes]]:
        found = self._client.scan_iter(match=_PREFIX + "*", count=_BATCH)
        while batch := list(islice(found, _BATCH)):
            yield batch

    def _each(self, script: Any, calls: Iterable[tuple[Any, list[Any]]]) -> list[int]:
        """Run a script for each key, one round trip for all of them."""
        pipeline = self._client.pipeline(transaction=False)
        for key, args in calls:
            script(keys=[key], args=args, client=pipeline)
        results: list[int] = pipeline.execute()
        return results

    @contextmanager
    def _errors(self) -> Iterator[None]:
        if self._closed:
            raise ValueError("the greylist is closed")
        try:
            yield
        except redis.RedisError as exc:
            raise StoreUnavailable(f"Redis: {exc}") from exc


def _row(key: bytes, values: list[bytes | None]) -> Row | None:
    """The row of a key's values; None for one that expired meanwhile, or that is none of ours."""
    try:
        triple = Triple.from_key(key.decode()[len(_PREFIX) :])
        firstseen, lastseen, cnt = (float(value or "none") for value in values[:3])
    except ValueError:
        return None
    return Row(triple, State(firstseen, lastseen, int(cnt)), (values[3] or b"").decode() or None)
