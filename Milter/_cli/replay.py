"""``python -m Milter send --replay``: does a filter answer as it did when this was recorded?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from ..mta import Difference, MTAError, Recording, Replay
from . import batch
from .common import EXIT_ERROR, EXIT_OK, complain, printable, show_report
from .exchange import Failure, Plan
from .session_file import SUFFIX
from .summary import failure


def replay(args: argparse.Namespace, plan: Plan) -> int:
    """Play each recording to the filter; returns the exit status."""
    names = list(_files(args.messages))
    progress = batch.Progress()
    statuses = {EXIT_OK}

    def work(number: int, name: str) -> tuple[str, Replay | Failure]:
        is_traced = plan.trace is not None and len(names) > 1
        return name, _play(plan, name, args, f"[{number}] " if is_traced else "")

    for name, found in batch.each(work, names, args.connections, progress):
        progress.done += 1
        progress.clear()
        statuses.add(_status(found))
        if args.json:
            show_report("send", json.dumps(_for_programs(name, found, args.socket)))
        elif isinstance(found, Failure):
            complain("send", found.text)
        else:
            show_report("send", _for_people(name, found))
        progress.show()
    progress.clear()
    # What is no recording, or cannot be read, counts before a difference.
    return max(statuses)


def _files(names: list[str]) -> Iterator[str]:
    """The files, and those that ``record`` has written to directories."""
    for name in names:
        if not os.path.isdir(name):
            yield name
            continue
        found = sorted(each for each in os.listdir(name) if each.endswith(SUFFIX))
        if not found:
            raise ValueError(f"there is no recording (*{SUFFIX}) in the directory {name!r}")
        yield from (os.path.join(name, each) for each in found)


def _play(plan: Plan, name: str, args: argparse.Namespace, prefix: str) -> Replay | Failure:
    try:
        recording = Recording.load(name)
    except OSError as exc:
        return Failure("message", f"cannot read the recording {name!r}: {exc.strerror}")
    except ValueError as exc:
        return Failure("message", str(exc))
    try:
        return plan.connect(None, prefix).replay(
            recording,
            ignored_headers=args.ignore,
            ignore_negotiation=args.ignore_negotiation,
        )
    except MTAError as exc:
        return Failure.of(exc)


def _status(found: Replay | Failure) -> int:
    if isinstance(found, Failure):
        return found.status
    return EXIT_OK if found.difference is None else EXIT_ERROR


def _for_people(name: str, found: Replay) -> str:
    if not found.differences:
        return f"{printable(name)}: as recorded"
    lines = [f"{printable(name)}: {each}" for each in found.differences]
    if len(lines) == 1 and found.differences[0].goes_on:
        lines.append(f"{printable(name)}: all else as recorded")
    return "\n".join(lines)


def _for_programs(name: str, found: Replay | Failure, socket: str) -> dict[str, Any]:
    if isinstance(found, Failure):
        return failure(found, socket=socket, file=name)
    said = [_as_json(each) for each in found.differences]
    return {
        "socket": socket,
        "file": name,
        "difference": said[0] if said else None,
        "differences": said,
    }


def _as_json(difference: Difference) -> dict[str, Any]:
    stage = difference.stage
    return {**dataclasses.asdict(difference), "stage": None if stage is None else stage.name}
