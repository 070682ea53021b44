"""What ``python -m Milter send`` has to tell, for people and for programs."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from .. import mta as _mta
from ..mta import Address, Header, Message, Negotiated, Result, Verdict
from .check import negotiated_as_json
from .common import printable


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A message that was brought before a filter, and what came of it.

    :ivar socket: where the filter listens, as the user wrote it.
    :ivar negotiated: what MTA and filter agreed on.
    :ivar sender: of the envelope, as it was.
    :ivar recipients: likewise, those included that the MTA itself refused.
    :ivar message: as it was.
    :ivar result: what came of it.
    """

    socket: str
    negotiated: Negotiated
    sender: Address
    recipients: list[Address]
    message: Message
    result: Result


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# --- for people ----------------------------------------------------------------------------------


def for_people(outcome: Outcome) -> Iterator[str]:
    """The report, line by line."""
    result = outcome.result
    yield from _report_verdict(outcome)
    yield ""
    yield "Envelope"
    yield from _report_envelope(outcome)
    if result.modifications:
        yield ""
        yield "Modifications" + ("" if result.accepted else " (not made, see the verdict)")
        yield from _report_modifications(result)
    yield ""
    if not result.accepted:
        yield "Message: none, see the verdict"
        return
    yield "Message"
    yield from _report_message(outcome.message, result)


def _report_verdict(outcome: Outcome) -> Iterator[str]:
    agreed, result = outcome.negotiated, outcome.result
    yield f"Filter      {printable(outcome.socket)}, protocol version {agreed.version}"
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


def _report_envelope(outcome: Outcome) -> Iterator[str]:
    before, result = outcome.sender, outcome.result
    if result.sender != before:
        yield f"  - from  {printable(str(before))}"
        yield f"  + from  {printable(str(result.sender))}"
    else:
        yield f"    from  {printable(str(before))}"
    asked = [one for one in outcome.recipients if one.rejected is None]
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


def _report_message(message: Message, result: Result) -> Iterator[str]:
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


# --- for programs --------------------------------------------------------------------------------


def for_programs(outcome: Outcome) -> dict[str, Any]:
    """The report as what JSON can hold."""
    result = outcome.result
    return {
        "socket": outcome.socket,
        "negotiated": negotiated_as_json(outcome.negotiated),
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
