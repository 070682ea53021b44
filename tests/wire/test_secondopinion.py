"""The wire's format as miltertest (PyPI) sees it: written by others than our MTA's side."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any, Callable

import miltertest
import pytest
from miltertest import MilterConnection, constants

from Milter.mta import parse_socket

WAIT = 20.0
CONTINUE = (constants.SMFIR_CONTINUE, {})


@pytest.fixture(scope="module")
def scripted(run_shared_filter: Callable[..., Any]) -> Any:
    running = run_shared_filter("scripted")
    running.mta().close()  # it listens
    return running


@pytest.fixture
def connection(scripted: Any) -> Iterator[MilterConnection]:
    address = parse_socket(scripted.socket)
    with socket.socket(address.family) as sock:
        sock.settimeout(WAIT)
        sock.connect(address.address)
        yield MilterConnection(sock)
        sock.sendall(miltertest.codec.encode_msg(constants.SMFIC_QUIT))
        assert sock.recv(1) == b""  # nothing more was said


def begin(connection: MilterConnection, **bodies: str) -> None:
    connection.optneg_mta()
    script = {"tag": "second", **bodies}
    connection.send_macro(constants.SMFIC_CONNECT, **{"{script}": json.dumps(script), "j": "mx"})
    connection.send(
        constants.SMFIC_CONNECT,
        hostname="client.example",
        family=constants.SMFIA_INET,
        port=2525,
        address="192.0.2.7",
    )
    connection.send(constants.SMFIC_HELO, helo="helo.example")


def message(connection: MilterConnection) -> list[tuple[str, dict[str, Any]]]:
    connection.send_macro(constants.SMFIC_MAIL, i="4XyZ")
    connection.send(constants.SMFIC_MAIL, args=["<alice@example.com>", "SIZE=10"])
    connection.send(constants.SMFIC_RCPT, args=["<bob@example.org>"])
    connection.send(constants.SMFIC_DATA)
    connection.send_headers([("Subject", "hello"), ("To", "bob")])
    connection.send(constants.SMFIC_EOH)
    connection.send_body("text\r\n" * 20000)
    result: list[tuple[str, dict[str, Any]]] = connection.send_eom()
    return result


def test_negotiation(connection: MilterConnection) -> None:
    actions, steps = connection.optneg_mta(strict=True)
    assert actions == constants.SMFI_V6_ACTS
    assert steps == (constants.SMFIP_SKIP | constants.SMFIP_RCPT_REJ | constants.SMFIP_HDR_LEADSPC)


def test_each_step_reaches_its_callback(connection: MilterConnection, scripted: Any) -> None:
    stages = ("connect", "helo", "envfrom", "envrcpt", "data", "header", "eoh", "abort")
    bodies = dict.fromkeys(stages, "say(stage, *args, ctx.getsymval('j'), ctx.getsymval('i'))")
    bodies["body"] = "store.size = getattr(store, 'size', 0) + len(args[0])"
    begin(connection, tag="steps", eom="say(stage, store.size)", **bodies)
    assert message(connection) == [CONTINUE]
    connection.send_macro(constants.SMFIC_MAIL, i="4XyZ1")
    connection.send(constants.SMFIC_MAIL, args=["<>"])
    connection._send(constants.SMFIC_ABORT)
    scripted.wait_for("steps ('abort'")
    lines = [line for line in scripted.output.split("\n") if line.startswith("steps (")]
    assert lines == [
        "steps ('connect', 'client.example', 2, ('192.0.2.7', 2525), 'mx', None)",
        "steps ('helo', 'helo.example', 'mx', None)",
        "steps ('envfrom', b'<alice@example.com>', b'SIZE=10', 'mx', '4XyZ')",
        "steps ('envrcpt', b'<bob@example.org>', 'mx', '4XyZ')",
        "steps ('data', 'mx', '4XyZ')",
        "steps ('header', 'Subject', b'hello', 'mx', '4XyZ')",
        "steps ('header', 'To', b'bob', 'mx', '4XyZ')",
        "steps ('eoh', 'mx', '4XyZ')",
        "steps ('eom', 120000)",
        "steps ('envfrom', b'<>', 'mx', '4XyZ1')",
        "steps ('abort', 'mx', '4XyZ1')",
    ]


def test_each_action(connection: MilterConnection) -> None:
    begin(
        connection,
        eom="""
            ctx.addheader("X-Added", "grün\\n\\tfolded")
            ctx.addheader("X-Inserted", "value", 1)
            ctx.chgheader("Subject", 1, "changed")
            ctx.chgheader("To", 2, None)
            ctx.addrcpt("<carol@example.org>")
            ctx.addrcpt("<dave@example.org>", "NOTIFY=NEVER")
            ctx.delrcpt("<bob@example.org>")
            ctx.chgfrom("<x@example.com>", "RET=HDRS")
            ctx.progress()
            ctx.replacebody("new ü\\r\\n")
            return milter.ACCEPT
        """,
    )
    assert message(connection) == [
        (constants.SMFIR_ADDHEADER, {"name": "X-Added", "value": "grün\n\tfolded"}),
        (constants.SMFIR_INSHEADER, {"index": 1, "name": "X-Inserted", "value": "value"}),
        (constants.SMFIR_CHGHEADER, {"index": 1, "name": "Subject", "value": "changed"}),
        (constants.SMFIR_CHGHEADER, {"index": 2, "name": "To", "value": ""}),
        (constants.SMFIR_ADDRCPT, {"rcpt": "<carol@example.org>"}),
        (constants.SMFIR_ADDRCPT_PAR, {"rcpt": "<dave@example.org>", "args": ["NOTIFY=NEVER"]}),
        (constants.SMFIR_DELRCPT, {"rcpt": "<bob@example.org>"}),
        (constants.SMFIR_CHGFROM, {"from": "<x@example.com>", "args": ["RET=HDRS"]}),
        (constants.SMFIR_REPLBODY, {"buf": "new ü\r\n"}),
        (constants.SMFIR_ACCEPT, {}),
    ]


def test_quarantine(connection: MilterConnection) -> None:
    begin(connection, eom="ctx.quarantine('held')")
    # miltertest takes this for the last word.
    assert message(connection) == [(constants.SMFIR_QUARANTINE, {"reason": "held"})]
    assert connection.recv() == CONTINUE


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        ("return milter.ACCEPT", (constants.SMFIR_ACCEPT, {})),
        ("return milter.REJECT", (constants.SMFIR_REJECT, {})),
        ("return milter.TEMPFAIL", (constants.SMFIR_TEMPFAIL, {})),
        ("return milter.DISCARD", (constants.SMFIR_DISCARD, {})),
        (
            "ctx.setreply('550', '5.7.1', 'no'); return milter.REJECT",
            (constants.SMFIR_REPLYCODE, {"smtpcode": "550", "space": " ", "text": "5.7.1 no"}),
        ),
        (
            "ctx.setreply('450', None, 'a', 'b'); return milter.TEMPFAIL",
            (
                constants.SMFIR_REPLYCODE,
                {"smtpcode": "450", "space": "-", "text": "4.0.0 a\r\n450 4.0.0 b"},
            ),
        ),
        (
            "raise ValueError",
            (
                constants.SMFIR_REPLYCODE,
                {
                    "smtpcode": "451",
                    "space": " ",
                    "text": "4.3.0 pymilter: untrapped exception in scripted",
                },
            ),
        ),
    ],
)
def test_each_verdict(
    connection: MilterConnection, body: str, reply: tuple[str, dict[str, Any]]
) -> None:
    begin(connection, eom=body)
    assert message(connection) == [reply]


def test_the_next_session_on_the_connection(connection: MilterConnection) -> None:
    begin(connection)
    assert message(connection) == [CONTINUE]
    connection._send(constants.SMFIC_QUIT_NC)
    connection.send(
        constants.SMFIC_CONNECT, hostname="h", family=constants.SMFIA_INET6, port=1, address="::1"
    )
    connection.send(constants.SMFIC_HELO, helo="again")
    assert message(connection) == [CONTINUE]
