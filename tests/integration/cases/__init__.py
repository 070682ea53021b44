"""All cases, a module for each topic."""

from __future__ import annotations

import time

from integration import injection
from integration.case import Case, Filter
from integration.cases import (
    bodies,
    envelope,
    headers,
    mailfilters,
    portable,
    replies,
    sessions,
    steps,
    verdicts,
)

MODULES = (verdicts, replies, envelope, headers, bodies, steps, sessions, portable, mailfilters)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)

_BY_NAME = {case.name: case for case in CASES}
if len(_BY_NAME) != len(CASES):
    raise ValueError("two cases have one name")


# Not run as a case: the tests that kill the filter use it.
WAITING = Case(
    "a filter that waits at end of headers",
    filter=Filter(on={"eoh": lambda f: time.sleep(600)}),
)
_BY_NAME[WAITING.name] = WAITING
_BY_NAME[mailfilters.RANDOM.name] = mailfilters.RANDOM
# Nor are these: test_injection.py is about what comes of them.
_BY_NAME.update((case.name, case) for case in injection.CASES)


def by_name(name: str) -> Case:
    return _BY_NAME[name]
