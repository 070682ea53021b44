"""``python -m Milter send``: bring a message before a filter, as an MTA would."""

from __future__ import annotations

import argparse
import json
import os
import sys

from ..mta import Dialect, MTAError, Result, Verdict
from . import batch, replay, report, sources, summary
from .common import EXIT_ERROR, SOCKET_HELP, complain, seconds, show_report
from .exchange import Exchange, Failure, Plan

EXIT_ACCEPTED = 0
EXIT_REJECTED = 3
EXIT_TEMPFAIL = 4
EXIT_DISCARDED = 5

_EXIT_STATUS = {
    Verdict.REJECT: EXIT_REJECTED,
    Verdict.TEMPFAIL: EXIT_TEMPFAIL,
    Verdict.SHUTDOWN: EXIT_TEMPFAIL,
    Verdict.CONN_FAIL: EXIT_TEMPFAIL,
    Verdict.DISCARD: EXIT_DISCARDED,
}


# --- the arguments -------------------------------------------------------------------------------

_SEND_EPILOG = f"""\
{SOCKET_HELP}
MESSAGE is a file with LF or CRLF line ends, or - for standard input; an mbox
file; a directory, which stands for all files in it and below, sorted; or a
Maildir.  With several messages, each has a connection of its own and a line in
the report, and a summary follows; the exit status is the lowest one of any
message that is not 0.

With --replay, each MESSAGE is a recording ("python -m Milter record"): what the
MTA said is said again, and the first answer of the filter that is not as
recorded is shown.  Where the filter negotiates something else, the rest is played
as far as the MTA would say the same or less, else it is said why not.  Options
about envelope and session have no effect then.

An address may be followed by its ESMTP parameters:
  --rcpt 'bob@example.org NOTIFY=NEVER'

A macro goes out at the stage where MTAs send it by default, others with the
connection; STAGE is one of CONNECT HELO MAIL RCPT DATA EOH EOM.  The macros
j, _, i, {{daemon_name}}, {{mail_addr}} and {{rcpt_addr}} have values unless they are
given here.

--json prints one object a message, with several messages each in one line, and
then {{"summary": …}}.  An error is an object with "error" (a text), "kind"
(arguments, message, unreachable, timeout, closed, protocol) and "status".
Text from the wire is UTF-8; any other byte becomes a lone surrogate
(\\udc80 to \\udcff, Python's surrogateescape).  A body that is not UTF-8 is in
"body_base64" instead of "body".

exit status:
  0  the message is accepted (or quarantined)
  1  the filter could not be spoken to, or broke the protocol
  2  wrong arguments or a message that cannot be read
  3  rejected
  4  temporary failure
  5  discarded
with --replay:
  0  the filter answers as recorded
  1  it does not, or could not be spoken to
  2  wrong arguments or what is no recording
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``python -m Milter``."""
    parser = commands.add_parser(
        "send",
        help="bring a message before a filter, as an MTA would",
        description="Bring a message before a filter, as an MTA would, and show what came out.",
        epilog=_SEND_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=send)
    parser.add_argument("socket", metavar="SOCKET", help="where the filter listens")
    parser.add_argument(
        "messages",
        metavar="MESSAGE",
        nargs="+",
        help="a message's file, an mbox, a directory, a Maildir, or -",
    )
    parser.add_argument(
        "--replay", action="store_true", help="play recorded sessions again, and compare"
    )
    parser.add_argument(
        "--ignore",
        metavar="HEADER",
        action="append",
        default=[],
        help="with --replay: do not compare the values of this header, may be repeated",
    )
    parser.add_argument(
        "--ignore-negotiation",
        action="store_true",
        help="with --replay: that the filter negotiates something else is no difference",
    )
    parser.add_argument(
        "--connections",
        metavar="N",
        type=_connections,
        default=1,
        help="how many messages to bring at a time (%(default)s)",
    )
    _add_envelope_options(parser.add_argument_group("envelope"))
    _add_session_options(parser.add_argument_group("SMTP session"))
    _add_protocol_options(parser.add_argument_group("protocol"))
    _add_output_options(parser.add_argument_group("output"))


def _add_envelope_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--from",
        dest="sender",
        metavar="ADDRESS",
        default="sender@example.com",
        help="the envelope sender (%(default)s); '' for a bounce",
    )
    group.add_argument(
        "--rcpt",
        dest="recipients",
        metavar="ADDRESS",
        action="append",
        help="an envelope recipient, may be repeated (recipient@example.com)",
    )
    group.add_argument(
        "--rejected-rcpt",
        dest="rejected",
        nargs=2,
        metavar=("ADDRESS", "REPLY"),
        action="append",
        default=[],
        help="a recipient that the MTA itself refuses, such as x@y '550 5.1.1 User unknown'",
    )


def _add_session_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--client-name", metavar="NAME", default="localhost", help="(%(default)s)")
    group.add_argument(
        "--client-addr",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="IPv4, IPv6, a /path, or unknown (%(default)s)",
    )
    group.add_argument("--client-port", metavar="N", type=_port, default=0, help="(%(default)s)")
    group.add_argument("--helo", metavar="NAME", help="(the client's name)")
    group.add_argument(
        "--macro",
        dest="macros",
        metavar="[STAGE:]NAME=VALUE",
        action="append",
        default=[],
        help="define a macro, may be repeated",
    )


def _add_protocol_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--protocol-version", metavar="N", type=int, default=6, help="2 to 6 (%(default)s)"
    )
    group.add_argument(
        "--dialect",
        choices=[dialect.value for dialect in Dialect],
        default=Dialect.POSTFIX.value,
        help="whose way of editing headers to follow (%(default)s)",
    )
    group.add_argument(
        "--body-in-eom", action="store_true", help="send the body's last piece in end of message"
    )
    # Postfix's order is always taken; for scripts that still ask for it.
    group.add_argument("--postfix-syntax", action="store_true", help=argparse.SUPPRESS)
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=10.0,
        help="for each answer of the filter (%(default)g)",
    )
    group.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0.0,
        help="keep trying while the filter does not listen yet (%(default)g)",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="print JSON, one object a message")
    group.add_argument(
        "--output", metavar="FILE", help="also write the resulting message to FILE (LF line ends)"
    )
    group.add_argument(
        "--trace",
        action="store_const",
        const="words",
        help="tell on standard error of each packet, in words and with its time",
    )
    # An option of its own: as a value of --trace, what follows that would be taken for it.
    group.add_argument(
        "--trace=raw",
        dest="trace",
        action="store_const",
        const="raw",
        help="likewise, its bytes as they are",
    )


def _connections(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise ValueError(text)
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError(text)
    return value


# argparse names the type in its complaint.
_port.__name__ = "port from 0 to 65535"
_connections.__name__ = "number of connections (1 to 1000)"


# --- the work ------------------------------------------------------------------------------------


def send(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    try:
        plan = Plan.of(args)
        _check_what_goes_together(args)
        if args.replay:
            return replay.replay(args, plan)
        if sources.is_one(args.messages):
            return _send_one(args, plan)
        if args.output is not None:
            raise ValueError("--output takes one message, not several")
        return _send_several(args, plan)
    except ValueError as exc:
        return _fail(args, Failure("arguments", str(exc)))
    except KeyboardInterrupt:
        return 128 + 2


def _check_what_goes_together(args: argparse.Namespace) -> None:
    """Refuse what would have no effect.

    :raises ValueError: an option is for the other use of the command.
    """
    if args.replay and args.output is not None:
        raise ValueError("--output is for messages, not for --replay")
    for option, value in (
        ("--ignore", args.ignore),
        ("--ignore-negotiation", args.ignore_negotiation),
    ):
        if value and not args.replay:
            raise ValueError(f"{option} is for --replay")


def _fail(args: argparse.Namespace, failure: Failure) -> int:
    """Say why nothing comes of it."""
    if args.json:
        show_report("send", json.dumps(summary.failure(failure, socket=args.socket)))
    complain("send", failure.text)
    return failure.status


def _send_one(args: argparse.Namespace, plan: Plan) -> int:
    (source,) = sources.find(args.messages)
    found = _bring(plan, source)
    if isinstance(found, Failure):
        return _fail(args, found)
    failure = _write_output(args.output, found.outcome.result)
    if failure is not None:
        return _fail(args, failure)
    if args.json:
        said = summary.for_programs(source.name, found, args.socket)
        show_report("send", json.dumps(said, indent=2))
    else:
        _show(found.outcome)
    if found.late is not None:
        complain("send", found.late.text)
    return _status(found)


def _send_several(args: argparse.Namespace, plan: Plan) -> int:
    is_traced = plan.trace is not None
    progress = batch.Progress()
    total = summary.Summary()
    statuses = {EXIT_ACCEPTED}

    def work(number: int, source: sources.Source) -> tuple[str, Exchange | Failure]:
        return source.name, _bring(plan, source, f"[{number}] " if is_traced else "")

    results = batch.each(work, sources.find(args.messages), args.connections, progress)
    for name, found in results:
        progress.done += 1
        progress.clear()
        total.add(found)
        statuses.add(_status(found))
        if args.json:
            show_report("send", json.dumps(summary.for_programs(name, found, args.socket)))
        else:
            show_report("send", summary.line(name, found))
        if isinstance(found, Failure) and found.kind == "unreachable":
            # It would be so with each that follows.
            complain("send", f"{found.text}; the messages after {name} were not sent")
            break
        progress.show()
    results.close()
    progress.clear()
    if args.json:
        show_report("send", json.dumps({"summary": total.for_programs(progress.seconds)}))
    else:
        show_report("send", "\n".join(["", *total.for_people(progress.seconds)]))
    return min(statuses - {EXIT_ACCEPTED}, default=EXIT_ACCEPTED)


def _bring(plan: Plan, source: sources.Source, prefix: str = "") -> Exchange | Failure:
    if source.error is not None:
        return Failure("message", source.error)
    try:
        return plan.bring(source.data, prefix)
    except MTAError as exc:
        return Failure.of(exc)
    except ValueError as exc:
        return Failure("message", str(exc))


def _status(found: Exchange | Failure) -> int:
    if isinstance(found, Failure):
        return found.status
    if found.late is not None:
        return EXIT_ERROR
    return _EXIT_STATUS.get(found.outcome.result.verdict, EXIT_ACCEPTED)


def _write_output(name: str | None, result: Result) -> Failure | None:
    if name is None:
        return None
    try:
        with open(name, "wb") as file:
            file.write(result.message.as_bytes(b"\n"))
    except OSError as exc:
        return Failure("arguments", f"cannot write {name!r}: {exc.strerror}")
    return None


_MARKS = {"+": "\033[32m", "-": "\033[31m", "!": "\033[33m"}


def _show(outcome: report.Outcome) -> None:
    lines = report.for_people(outcome)
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        lines = (_coloured(line) for line in lines)
    show_report("send", "\n".join(lines))


def _coloured(line: str) -> str:
    start = _MARKS.get(line[2:3]) if line.startswith("  ") else None
    return f"{start}{line}\033[0m" if start else line
