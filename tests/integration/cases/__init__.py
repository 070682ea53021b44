"""All cases, a module for each topic."""

from __future__ import annotations

from integration.case import Case
from integration.cases import bodies, envelope, headers, replies, sessions, steps, verdicts

MODULES = (verdicts, replies, envelope, headers, bodies, steps, sessions)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)

_BY_NAME = {case.name: case for case in CASES}
if len(_BY_NAME) != len(CASES):
    raise ValueError("two cases have one name")


def by_name(name: str) -> Case:
    return _BY_NAME[name]
