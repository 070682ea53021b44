"""The command line: ``python -m Milter``.

``run`` serves with a filter class, ``config`` prints what an MTA's configuration needs for it,
``check`` says whether a filter answers, ``send`` brings a message before it as an MTA would and
shows what came out.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from Milter import _cli_check, _cli_config, _cli_run
from Milter import mta as _mta
from Milter._cli_common import complain, printable, seconds
from Milter.mta import MTA, Address, Client, Dialect, Header, MTAError, Offer, Result, Verdict

EXIT_ACCEPTED = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    :param argv: the arguments after the program's name, ``sys.argv[1:]`` by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m Milter", description="Tools for mail filters (milters)."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _cli_run.add_parser(commands)
    _cli_config.add_parser(commands)
    _cli_check.add_parser(commands)
    _add_send(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and not (args.command == "config" and _cli_config.take_class(args, rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        status = run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    return status


class _UsageError(Exception):
    """Something in the arguments or the input that the user can mend."""


# --- send: the arguments ---------------------------------------------------------------------

_SEND_EPILOG = """\
SOCKET is written as libmilter writes it: unix:/path, local:/path, /path,
inet:port@host, inet6:port@[address].  MESSAGE is a file with LF or CRLF line
ends, or - for standard input.

An address may be followed by its ESMTP parameters:
  --rcpt 'bob@example.org NOTIFY=NEVER'

A macro goes out at the stage where MTAs send it by default, others with the
connection; STAGE is one of CONNECT HELO MAIL RCPT DATA EOH EOM.  The macros
j, _, i, {daemon_name}, {mail_addr} and {rcpt_addr} have values unless they are
given here.

In --json, text from the wire is UTF-8; any other byte becomes a lone surrogate
(\\udc80 to \\udcff, Python's surrogateescape).  A body that is not UTF-8 is in
"body_base64" instead of "body".

exit status:
  0  the message is accepted (or quarantined)
  1  the filter could not be spoken to, or broke the protocol
  2  wrong arguments or a message that cannot be read
  3  rejected
  4  temporary failure
  5  discarded
"""


def _add_send(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "send",
        help="bring a message before a filter, as an MTA would",
        description="Bring a message before a filter, as an MTA would, and show what came out.",
        epilog=_SEND_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_send)
    parser.add_argument("socket", metavar="SOCKET", help="where the filter listens")
    parser.add_argument("message", metavar="MESSAGE", help="the message's file, or -")
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
    group.add_argument("--client-port", metavar="N", type=int, default=0, help="(%(default)s)")
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
    group.add_argument(
        "--postfix-syntax", action="store_true", help="take a SOCKET of the form inet:host:port"
    )
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
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--output", metavar="FILE", help="also write the resulting message to FILE (LF line ends)"
    )
    group.add_argument("--trace", action="store_true", help="show the packets on standard error")


# --- send: the work -----------------------------------------------------------------------------


def _send(args: argparse.Namespace) -> int:
    try:
        message = _mta.Message.parse(_read(args.message))
        return _exchange(args, message)
    except (_UsageError, ValueError) as exc:
        complain("send", exc)
        return EXIT_USAGE
    except MTAError as exc:
        complain("send", exc)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 128 + 2


def _read(name: str) -> bytes:
    try:
        if name == "-":
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            return file.read()
    except OSError as exc:
        raise _UsageError(f"cannot read the message {name!r}: {exc.strerror}") from exc


def _exchange(args: argparse.Namespace, message: _mta.Message) -> int:
    recipients = [_address(text) for text in args.recipients or ["recipient@example.com"]]
    recipients += [
        dataclasses.replace(_address(text), rejected=reply) for text, reply in args.rejected
    ]
    client = Client(
        args.client_name,
        None if args.client_addr == "unknown" else args.client_addr,
        args.client_port,
    )
    macros = {**_default_macros(args), **dict(_macro(text) for text in args.macros)}
    mta = MTA.connect(
        args.socket,
        offer=Offer.for_version(args.protocol_version),
        timeout=args.timeout,
        wait_for=args.wait,
        postfix_syntax=args.postfix_syntax,
        dialect=Dialect(args.dialect),
        trace=_trace if args.trace else None,
    )
    try:
        result = mta.send(
            message,
            sender=_address(args.sender),
            recipients=recipients,
            client=client,
            helo=args.helo,
            macros=macros,
            body_in_eom=args.body_in_eom,
        )
        late = _quit(mta)
    finally:
        mta.close()
    _write_output(args.output, result)
    _show(args, mta, message, result)
    if late is not None:
        complain("send", late)
        return EXIT_ERROR
    return _EXIT_STATUS.get(result.verdict, EXIT_ACCEPTED)


def _quit(mta: MTA) -> MTAError | None:
    """End the connection; what goes wrong now must not hide the result."""
    try:
        mta.quit()
    except MTAError as exc:
        return exc
    return None


def _address(text: str) -> Address:
    text = text.strip()
    if text.startswith("<") and ">" in text:
        address, _, params = text.partition(">")
        return Address(address[1:], tuple(params.split()))
    words = text.split()
    return Address(words[0] if words else "", tuple(words[1:]))


def _macro(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.rpartition(":")[2]:
        raise _UsageError(f"macro {text!r}: write NAME=VALUE or STAGE:NAME=VALUE")
    return name, value


def _default_macros(args: argparse.Namespace) -> dict[str, str]:
    return {
        "j": socket.gethostname(),
        "_": f"{args.client_name} [{args.client_addr}]",
        "{daemon_name}": "pymilter-send",
        "i": secrets.token_hex(5).upper(),
    }


def _trace(direction: str, data: bytes) -> None:
    print(direction, data, file=sys.stderr)


def _write_output(name: str | None, result: Result) -> None:
    if name is None:
        return
    try:
        with open(name, "wb") as file:
            file.write(result.message.as_bytes(b"\n"))
    except OSError as exc:
        raise _UsageError(f"cannot write {name!r}: {exc.strerror}") from exc


# --- send: the report for people ---------------------------------------------------------------

_MARKS = {"+": "\033[32m", "-": "\033[31m", "!": "\033[33m"}


def _show(args: argparse.Namespace, mta: MTA, message: _mta.Message, result: Result) -> None:
    if args.json:
        print(json.dumps(_as_json(args, mta, result), indent=2))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for line in _report(args, mta, message, result):
            start = _MARKS.get(line[2:3]) if colour and line.startswith("  ") else None
            print(f"{start}{line}\033[0m" if start else line)
    sys.stdout.flush()


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _report(
    args: argparse.Namespace, mta: MTA, message: _mta.Message, result: Result
) -> Iterator[str]:
    yield from _report_verdict(args, mta, result)
    yield ""
    yield "Envelope"
    yield from _report_envelope(_address(args.sender), args, result)
    if result.modifications:
        yield ""
        yield "Modifications" + ("" if result.accepted else " (not made, see the verdict)")
        yield from _report_modifications(result)
    yield ""
    if not result.accepted:
        yield "Message: none, see the verdict"
        return
    yield "Message"
    yield from _report_message(message, result)


def _report_verdict(args: argparse.Namespace, mta: MTA, result: Result) -> Iterator[str]:
    agreed = mta.negotiated
    yield f"Filter      {printable(args.socket)}, protocol version {agreed.version}"
    yield f"  actions   {' '.join(_mta.flag_names(agreed.actions)) or 'none'}"
    yield f"  steps     {' '.join(_mta.flag_names(agreed.steps)) or 'all'}"
    for stage, names in agreed.macros.items():
        yield f"  macros    {stage}: {printable(' '.join(names)) or 'none'}"
    said = result.verdict.value
    if result.verdict is Verdict.CONTINUE:
        said += " (accepted)"
    yield f"Verdict     {said}, at {result.stage}"
    if result.smtp is not None:
        for number, line in enumerate(str(result.smtp).split("\n")):
            yield f"{'' if number else 'Reply':12}{printable(line)}"
    if result.quarantine is not None:
        yield f"Quarantine  {printable(result.quarantine)}"


def _report_envelope(before: Address, args: argparse.Namespace, result: Result) -> Iterator[str]:
    if result.sender != before:
        yield f"  - from  {printable(str(before))}"
        yield f"  + from  {printable(str(result.sender))}"
    else:
        yield f"    from  {printable(str(before))}"
    asked = [_address(text) for text in args.recipients or ["recipient@example.com"]]
    refused = [one.recipient for one in result.refused]
    for recipient in asked:
        if recipient not in refused:
            mark = " " if recipient in result.recipients else "-"
            yield f"  {mark} to    {printable(str(recipient))}"
    for recipient in result.recipients:
        if recipient not in asked:
            yield f"  + to    {printable(str(recipient))}"
    for one in result.refused:
        said = one.recipient.rejected or str(one.reply.smtp or one.reply.verdict.value)
        who = "the MTA" if one.recipient.rejected else "the filter"
        address = dataclasses.replace(one.recipient, rejected=None)
        yield f"  ! to    {printable(str(address))}: refused by {who}, {printable(said)}"


def _report_modifications(result: Result) -> Iterator[str]:
    for one in _joined_chunks(result.modifications):
        yield f"    {_describe(one)}"


def _joined_chunks(modifications: Iterable[_mta.Modification]) -> list[_mta.Modification]:
    """The modifications with all chunks of a new body as one, at the place of the first."""
    joined: list[_mta.Modification] = []
    place: int | None = None
    for one in modifications:
        if not isinstance(one, _mta.ReplaceBody):
            joined.append(one)
        elif place is None:
            place = len(joined)
            joined.append(one)
        else:
            first = joined[place]
            assert isinstance(first, _mta.ReplaceBody)
            joined[place] = _mta.ReplaceBody(first.chunk + one.chunk)
    return joined


def _describe(one: _mta.Modification) -> str:
    if isinstance(one, _mta.AddHeader):
        return f"add header {_field(one)}"
    if isinstance(one, _mta.InsertHeader):
        return f"insert header at {one.index} {_field(one)}"
    if isinstance(one, _mta.ChangeHeader):
        if not one.value:
            return f"delete header {printable(_text(one.name))}, number {one.index}"
        return f"change header number {one.index} {_field(one)}"
    if isinstance(one, _mta.ReplaceBody):
        return f"replace body, {len(one.chunk)} bytes"
    if isinstance(one, _mta.Quarantine):
        return f"quarantine: {printable(one.reason)}"
    if isinstance(one, _mta.DeleteRecipient):
        return f"delete recipient {printable(one.address)}"
    what = "add recipient" if isinstance(one, _mta.AddRecipient) else "change sender to"
    return f"{what} {printable(' '.join(filter(None, (one.address, one.params))))}"


def _field(one: _mta.AddHeader | _mta.InsertHeader | _mta.ChangeHeader) -> str:
    value = printable(_text(one.value).replace("\r\n", "\n").replace("\n", " "))
    return f"{printable(_text(one.name))}: {value.lstrip(' ')}"


def _report_message(message: _mta.Message, result: Result) -> Iterator[str]:
    for edit in result.header_edits:
        if edit.before == edit.after and edit.after is not None:
            yield from _header_lines(" ", edit.after)
            continue
        if edit.before is not None:
            yield from _header_lines("-", edit.before)
        if edit.after is not None:
            yield from _header_lines("+", edit.after)
    yield ""
    mark = " "
    if result.body_replaced:
        mark = "+"
        yield from _body_lines("-", message.body)
    yield from _body_lines(mark, result.message.body)


def _header_lines(mark: str, header: Header) -> Iterator[str]:
    for line in _text(bytes(header)).split("\n"):
        yield f"  {mark} {printable(line)}"


def _body_lines(mark: str, body: bytes) -> Iterator[str]:
    lines = _text(body.replace(b"\r\n", b"\n")).split("\n")
    if lines[-1] == "":
        lines.pop()
    for line in lines:
        yield f"  {mark} {printable(line)}".rstrip(" ")


# --- send: the report for programs ---------------------------------------------------------------


def _as_json(args: argparse.Namespace, mta: MTA, result: Result) -> dict[str, Any]:
    return {
        "socket": args.socket,
        "negotiated": _cli_check.negotiated_as_json(mta.negotiated),
        "verdict": result.verdict.value,
        "stage": result.stage.name,
        "accepted": result.accepted,
        "reply": _json_reply(result.smtp),
        "quarantine": result.quarantine,
        "sender": _json_address(result.sender),
        "recipients": [_json_address(one) for one in result.recipients],
        "refused": [
            {
                **_json_address(one.recipient),
                "by": "mta" if one.recipient.rejected else "filter",
                "verdict": one.reply.verdict.value,
                "reply": _json_reply(one.reply.smtp),
            }
            for one in result.refused
        ],
        "modifications": [_json_modification(one) for one in _joined_chunks(result.modifications)],
        "message": {
            "headers": [[_text(one.name), _text(one.value)] for one in result.message.headers],
            **_json_bytes("body", result.message.body),
        }
        if result.accepted
        else None,
        "replies": [
            {"stage": one.stage.name, "verdict": one.verdict.value} for one in result.replies
        ],
    }


def _json_reply(smtp: _mta.SmtpReply | None) -> dict[str, Any] | None:
    return None if smtp is None else dataclasses.asdict(smtp)


def _json_address(address: Address) -> dict[str, Any]:
    return {"address": address.address, "params": list(address.params)}


def _json_modification(one: _mta.Modification) -> dict[str, Any]:
    fields: dict[str, Any] = {"action": _ACTION_NAMES[type(one)]}
    for name, value in vars(one).items():
        if name == "chunk":
            fields.update(_json_bytes("body", value))
        elif name != "with_params":
            fields[name] = _text(value) if isinstance(value, bytes) else value
    return fields


_ACTION_NAMES: dict[type, str] = {
    _mta.AddHeader: "addheader",
    _mta.InsertHeader: "insheader",
    _mta.ChangeHeader: "chgheader",
    _mta.AddRecipient: "addrcpt",
    _mta.DeleteRecipient: "delrcpt",
    _mta.ChangeSender: "chgfrom",
    _mta.ReplaceBody: "replacebody",
    _mta.Quarantine: "quarantine",
}


def _json_bytes(key: str, data: bytes) -> dict[str, str]:
    try:
        return {key: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{key}_base64": base64.b64encode(data).decode("ascii")}


if __name__ == "__main__":
    sys.exit(main())
