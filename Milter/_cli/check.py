"""``python -m Milter check``: does a filter answer, and what does it negotiate?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from Milter import mta as _mta
from Milter.mta import MTA, Negotiated, Offer, SocketAddress

from .common import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_USAGE,
    SOCKET_HELP,
    FilterSocket,
    complain,
    error_as_json,
    error_kind,
    printable,
    seconds,
    show_report,
)

_EPILOG = f"""\
{SOCKET_HELP}
The filter sees a connection that ends after negotiation, without a client and
without a message.

exit status:
  0  a filter answers
  1  nobody answers there in time, or what answers is no filter
  2  wrong arguments
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``python -m Milter``."""
    parser = commands.add_parser(
        "check",
        help="say whether a filter answers, and what it negotiates",
        description="Say whether a filter answers, and what it negotiates.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=check)
    parser.add_argument("socket", metavar="SOCKET", help="where the filter listens")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.add_argument(
        "--quiet", action="store_true", help="print nothing where a filter answers: a health check"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=10.0,
        help="for each answer of the filter (%(default)g)",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0.0,
        help="keep trying while the filter does not listen yet (%(default)g)",
    )


def check(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    try:
        address = FilterSocket.parse(args.socket).address
    except ValueError as exc:
        if args.json:
            failure = error_as_json(str(exc), "arguments", EXIT_USAGE, socket=args.socket)
            show_report("check", failure)
        complain("check", exc)
        return EXIT_USAGE
    try:
        agreed = _negotiate(address, args.timeout, args.wait)
    except (_mta.MTAError, OSError) as exc:
        if args.json:
            more = {"socket": args.socket, "answers": False}
            failure = error_as_json(str(exc), error_kind(exc), EXIT_ERROR, **more)
            show_report("check", failure)
        complain("check", exc)
        return EXIT_ERROR
    if args.json:
        report = {"socket": args.socket, "answers": True, "negotiated": negotiated_as_json(agreed)}
        show_report("check", json.dumps(report, indent=2))
    elif not args.quiet:
        show_report("check", "\n".join(_report(args.socket, agreed)))
    return EXIT_OK


def _negotiate(address: SocketAddress, timeout: float, wait: float) -> Negotiated:
    with MTA.connect(address, offer=Offer(), timeout=timeout, wait_for=wait) as mta:
        return mta.negotiated


def negotiated_as_json(agreed: Negotiated) -> dict[str, Any]:
    """What MTA and filter agreed on, for programs."""
    return {
        "version": agreed.version,
        "actions": _mta.flag_names(agreed.actions),
        "steps": _mta.flag_names(agreed.steps),
        "macros": {stage.name: list(names) for stage, names in agreed.macros.items()},
    }


def _report(name: str, agreed: Negotiated) -> Iterator[str]:
    yield f"A filter answers on {printable(name)}."
    yield from negotiated_for_people(agreed)


def negotiated_for_people(agreed: Negotiated) -> Iterator[str]:
    """What MTA and filter agreed on, line by line."""
    yield f"  version   {agreed.version}"
    yield f"  actions   {' '.join(_mta.flag_names(agreed.actions)) or 'none'}"
    yield f"  steps     {' '.join(_mta.flag_names(agreed.steps)) or 'all'}"
    for stage, names in agreed.macros.items():
        yield f"  macros    {stage}: {printable(' '.join(names)) or 'none'}"
