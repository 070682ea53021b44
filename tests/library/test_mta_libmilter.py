"""The MTA's side proven against the real libmilter."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.mta import (
    ACCEPT,
    DISCARD,
    NOREPLY,
    REJECT,
    SIMPLE,
    SKIP,
    TEMPFAIL,
    WAIT,
    LibmilterFilter,
    build_filter,
    records,
)

from Milter.mta import (
    MTA,
    AddHeader,
    AddRecipient,
    Address,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    FilterClosed,
    FilterTimeout,
    InsertHeader,
    Message,
    Offer,
    ProtocolError,
    Quarantine,
    ReplaceBody,
    SmtpReply,
    Stage,
    Step,
    Verdict,
)

# --- the real libmilter ---------------------------------------------------------------------------

Start = Callable[..., LibmilterFilter]


@pytest.fixture(scope="session")
def filter_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_filter(tmp_path_factory.mktemp("mta_filter"))


@pytest.fixture
def start(filter_program: Path) -> Iterator[Start]:
    """Start the C filter with these settings; see ``mta_filter.c``."""
    with contextlib.ExitStack() as stack:

        def start_filter(**settings: str) -> LibmilterFilter:
            # Not tmp_path: a socket's path has little room.
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mta-")))
            running = LibmilterFilter(filter_program, directory, settings)
            stack.callback(running.stop)
            return running

        yield start_filter


def connect(running: LibmilterFilter, **options: Any) -> MTA:
    return MTA.connect(running.address, wait_for=WAIT, timeout=WAIT, **options)


def test_libmilter_hears_every_step(start: Start) -> None:
    running = start()
    body = bytes(range(256)) * 300
    with connect(running) as mta:
        mta.connect_info(b"mx\xff.example.com", "192.0.2.1", 2525)
        mta.helo("gr\u00fc\udcff")
        mta.unknown(b"XYZZY \xff")
        mta.mail("<a@x>", "SIZE=9", b"X=\xff")
        mta.rcpt("<b@x>")
        mta.rcpt("<c@x>", "NOTIFY=NEVER")
        mta.data()
        mta.header(b"X-\xff", b"\xfe\n\tfold")
        mta.header("Empty", "")
        mta.eoh()
        mta.body(body)
        assert mta.eom(b"the rest").verdict is Verdict.CONTINUE
        mta.mail("<>")
        mta.abort()
    client = ["connect", b"mx\xff.example.com".hex(), "inet", "192.0.2.1", "2525"]
    assert running.lines()[1] == client
    assert running.calls("helo", "unknown", "mail", "rcpt", "header") == [
        *[[b"gr\xc3\xbc\xff"], [b"XYZZY \xff"], [b"<a@x>", b"SIZE=9", b"X=\xff"]],
        *[[b"<b@x>"], [b"<c@x>", b"NOTIFY=NEVER"], [b"X-\xff", b"\xfe\n\tfold"], [b"Empty", b""]],
        [b"<>"],
    ]
    assert [len(data) for (data,) in running.calls("body")] == [65535, 76800 - 65535, 8]
    assert b"".join(data for (data,) in running.calls("body")) == body + b"the rest"
    assert running.names() == [
        *["negotiate", "connect", "helo", "unknown", "mail", "rcpt", "rcpt", "data", "header"],
        *["header", "eoh", "body", "body", "body", "eom", "mail", "abort", "close"],
    ]


@pytest.mark.parametrize(
    ("address", "port", "heard"),
    [
        ("192.0.2.1", 25, "inet 192.0.2.1 25"),
        ("2001:db8::1", 65535, "inet6 2001:db8::1 65535"),
        ("IPv6:2001:db8::1", 1, "inet6 2001:db8::1 1"),
        ("/run/client", 0, "unix /run/client"),
        (None, 0, "none"),
    ],
)
def test_libmilter_hears_of_clients(
    start: Start, address: str | None, port: int, heard: str
) -> None:
    running = start()
    with connect(running) as mta:
        assert mta.connect_info("mx", address, port).verdict is Verdict.CONTINUE
    assert running.lines()[1] == ["connect", b"mx".hex(), *heard.split()]


@pytest.mark.parametrize("version", [2, 3, 4, 5, 6])
def test_libmilter_in_each_version(start: Start, version: int) -> None:
    running = start(F_AFLAGS="0x3f", F_EOM=records(("addheader", "X-Seen", "yes")))
    with connect(running, offer=Offer.for_version(version)) as mta:
        assert mta.negotiated.version == version
        for _ in range(2):
            result = mta.send(SIMPLE, sender="a@x", recipients=["b@x"])
            assert result.message["X-Seen"] == "yes"
        mta.unknown("XYZZY")
    names = running.names()
    assert names.count("data") == (2 if version >= 4 else 0)
    assert names.count("unknown") == (1 if version >= 3 else 0)
    offer = Offer.for_version(version)
    # libmilter feigns the no-reply bits that the MTA does not have.
    offered = int(offer.steps) | 0xFF080
    assert running.lines()[0] == ["negotiate", f"{int(offer.actions):x}", f"{offered:x}"]


def test_libmilter_refuses_an_offer_that_is_too_small(start: Start) -> None:
    running = start(F_AFLAGS="0x40")
    with pytest.raises(FilterClosed) as caught:
        connect(running, offer=Offer.for_version(2))
    assert caught.value.stage is Stage.NEGOTIATE


def test_libmilter_feigns_silence_for_an_mta_that_cannot_do_without_replies(start: Start) -> None:
    running = start(F_AFLAGS="0", F_PFLAGS=hex(Step.NR_HELO), F_VERDICT_helo=NOREPLY)
    with connect(running, offer=Offer.for_version(4)) as mta:
        assert mta.negotiated.steps == Step.NONE
        assert mta.helo("x").verdict is Verdict.CONTINUE


def test_libmilter_modifies(start: Start) -> None:
    running = start(
        F_EOM=records(
            ("addheader", "X-Added", "one\n\ttwo"),
            ("insheader", "0", "X-Top", ""),
            ("chgheader", "subject", "1", "changed"),
            ("chgheader", "X-Gone", "1"),
            ("progress",),
            ("addrcpt", "<c@x>"),
            ("addrcpt_par", "<d@x>", "NOTIFY=NEVER"),
            ("addrcpt_par", "<e@x>"),
            ("delrcpt", "<b@x>"),
            ("chgfrom", "<n@x>", "RET=HDRS"),
            ("chgfrom", "<m@x>"),
            ("bigbody", "140000"),
            ("replacebody", "\udcff"),
            ("quarantine", "odd \udcff"),
        ),
        F_VERDICT_eom=ACCEPT,
    )
    with connect(running) as mta:
        result = mta.send(
            b"Subject: hello\nX-Gone: 1\n\nx\n", sender=("a@x", "SIZE=1"), recipients=["b@x"]
        )
    assert "failed" not in running.names()
    assert result.modifications[:4] == (
        AddHeader(b"X-Added", b"one\n\ttwo"),
        InsertHeader(0, b"X-Top", b""),
        ChangeHeader(1, b"subject", b"changed"),
        ChangeHeader(1, b"X-Gone", b""),
    )
    assert result.modifications[4:10] == (
        AddRecipient("<c@x>"),
        AddRecipient("<d@x>", "NOTIFY=NEVER", True),
        AddRecipient("<e@x>", None, True),
        DeleteRecipient("<b@x>"),
        ChangeSender("<n@x>", "RET=HDRS"),
        ChangeSender("<m@x>"),
    )
    assert [len(one.chunk) for one in result.modifications if isinstance(one, ReplaceBody)] == [
        *[65535, 65535, 8930, 1]
    ]
    assert result.modifications[-1] == Quarantine("odd \udcff")
    assert result.message.as_bytes(b"\n") == (
        b"X-Top: \nsubject: changed\nX-Added: one\n\ttwo\n\n" + b"x" * 140000 + b"\xff"
    )
    assert [str(one) for one in result.recipients] == ["<c@x>", "<d@x> NOTIFY=NEVER", "<e@x>"]
    assert result.sender == Address("m@x", ("RET=HDRS",))
    assert (result.verdict, result.quarantine) == (Verdict.ACCEPT, "odd \udcff")
    assert result.replies[-1].progress == 1


STAGE_NAMES = ["connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom"]
STAGES = dict(zip(STAGE_NAMES, (*Stage,)[1:10]))


@pytest.mark.parametrize("name", STAGE_NAMES)
@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (REJECT, Verdict.REJECT),
        (TEMPFAIL, Verdict.TEMPFAIL),
        (ACCEPT, Verdict.ACCEPT),
        (DISCARD, Verdict.DISCARD),
    ],
)
def test_libmilter_decides(start: Start, name: str, code: str, verdict: Verdict) -> None:
    running = start(**{f"F_VERDICT_{name}": code})
    early = name in ("connect", "helo")
    if early and code == DISCARD:
        with pytest.raises(ProtocolError, match="DISCARD before"), connect(running) as mta:
            mta.send(SIMPLE, recipients=["b@x"])
        return
    with connect(running) as mta:
        results = [mta.send(SIMPLE, recipients=["b@x", "c@x"]) for _ in range(2)]
    for result in results:
        assert (result.verdict, result.stage) == (verdict, STAGES[name])
    # The second message is a new question, unless the first answer was about the connection.
    assert running.names().count(name) >= (1 if early else 2)
    assert running.names()[-1] == "close"
    assert "eom" not in running.names() or name == "eom"


def test_libmilter_replies(start: Start) -> None:
    running = start(
        F_VERDICT_rcpt=REJECT,
        F_ONLY_RCPT="<b@x>",
        F_REPLY_rcpt=records(("550", "5.1.1", "who\udcff?")),
        F_VERDICT_eom=TEMPFAIL,
        F_REPLY_eom=records(("451", "4.7.1", "one", "", "100%% three")),
    )
    with connect(running) as mta:
        result = mta.send(SIMPLE, recipients=["b@x", "c@x"])
    assert result.refused[0].reply.smtp == SmtpReply(550, "5.1.1", ("who\udcff?",))
    assert result.smtp == SmtpReply(451, "4.7.1", ("one", "", "100% three"))
    assert result.verdict is Verdict.TEMPFAIL


def test_libmilter_fills_in_the_enhanced_code_of_a_multi_line_reply(start: Start) -> None:
    running = start(F_VERDICT_mail=REJECT, F_REPLY_mail=records(("550", "", "", "two")))
    with connect(running) as mta:
        assert mta.send(SIMPLE, recipients=["b@x"]).smtp == SmtpReply(550, "5.0.0", ("", "two"))


NO_STEPS = (0x7F & ~int(Step.NOMAIL)) | int(Step.NODATA | Step.NOUNKNOWN)


def test_libmilter_gets_only_the_steps_it_wants(start: Start) -> None:
    running = start(F_PFLAGS=hex(NO_STEPS), F_MACROS="j i {rcpt_addr}")
    with connect(running) as mta:
        result = mta.send(SIMPLE, recipients=["b@x"], macros={"j": "mx", "i": "Q1"})
        assert mta.unknown("XYZZY").verdict is Verdict.NOT_SENT
    assert result.verdict is Verdict.CONTINUE
    assert running.names() == ["negotiate", "mail", "eom", *["macro"] * 3, "close"]
    assert running.calls("macro") == [[b"j", b"mx"], [b"i", b"Q1"], [b"{rcpt_addr}", b"b@x"]]


NO_REPLIES = [
    *[Step.NR_CONN, Step.NR_HELO, Step.NR_MAIL, Step.NR_RCPT, Step.NR_DATA],
    *[Step.NR_HDR, Step.NR_EOH, Step.NR_BODY],
]


def test_libmilter_without_replies(start: Start) -> None:
    quiet = {f"F_VERDICT_{name}": NOREPLY for name in STAGE_NAMES[:-1]}
    running = start(F_PFLAGS=hex(sum(NO_REPLIES)), **quiet)
    with connect(running) as mta:
        for _ in range(3):
            result = mta.send(SIMPLE, recipients=["b@x", "c@x"])
            assert result.verdict is Verdict.CONTINUE
            assert {reply.verdict for reply in result.replies[:-1]} == {Verdict.NO_REPLY}
    assert running.names().count("eom") == 3


def test_libmilter_skips(start: Start) -> None:
    running = start(F_PFLAGS=hex(Step.SKIP), F_VERDICT_body=SKIP)
    message = Message([], b"x" * 65535 * 4)
    with connect(running) as mta:
        for _ in range(2):
            assert mta.send(message, recipients=["b@x"]).verdict is Verdict.CONTINUE
    assert running.names().count("body") == 2
    running = start(F_VERDICT_body=SKIP)
    with connect(running) as mta, pytest.raises(ProtocolError, match="without SKIP"):
        mta.send(message, recipients=["b@x"])
        pytest.fail("skip passed")


def test_libmilter_names_its_macros(start: Start) -> None:
    running = start(
        F_SYMLISTS=records(("0", "{client_ptr} j"), ("2", "i"), ("3", ""), ("5", "{late}")),
        F_MACROS="j v {client_ptr} i {rcpt_addr} {late}",
    )
    with connect(running) as mta:
        assert mta.negotiated.macros == {
            Stage.CONNECT: ("{client_ptr}", "j"),
            Stage.MAIL: ("i",),
            Stage.RCPT: (),
            Stage.EOM: ("{late}",),
        }
        mta.send(
            SIMPLE,
            recipients=["b@x"],
            macros={"j": "mx", "v": "1", "i": b"Q\xff", "EOM:late": "yes"},
        )
    assert running.calls("macro") == [
        *[[b"j", b"mx"], [b"v"], [b"{client_ptr}"], [b"i", b"Q\xff"]],
        *[[b"{rcpt_addr}"], [b"{late}", b"yes"]],
    ]


def test_libmilter_hears_of_rejected_recipients(start: Start) -> None:
    running = start(F_PFLAGS=hex(Step.RCPT_REJ))
    with connect(running) as mta:
        result = mta.send(
            SIMPLE,
            recipients=[Address("b@x", rejected="550 5.1.1 User unknown"), "c@x"],
        )
    assert result.recipients == [Address("c@x")]
    assert running.calls("rcpt") == [[b"<b@x>"], [b"<c@x>"]]
    assert running.calls("rejected") == [[b"5.1.1", b"User unknown"]]


def test_libmilter_keeps_the_leading_space(start: Start) -> None:
    for steps, heard in [("0", b"hello"), (hex(Step.HDR_LEADSPC), b" hello")]:
        running = start(F_PFLAGS=steps, F_EOM=records(("addheader", "X", " v")))
        with connect(running) as mta:
            result = mta.send(SIMPLE, recipients=["b@x"])
        assert running.calls("header") == [[b"Subject", heard]]
        added = b"X: v" if heard.startswith(b" ") else b"X:  v"
        assert bytes(result.message.headers[-1]) == added


def test_libmilter_takes_a_new_session_on_the_connection(start: Start) -> None:
    running = start()
    with connect(running) as mta:
        for name in ("one", "two"):
            mta.send(SIMPLE, recipients=["b@x"], helo=name)
            mta.quit_nc()
    assert running.calls("helo") == [[b"one"], [b"two"]]
    assert running.names().count("close") == 3


def test_libmilter_answers_twice_to_a_body_rejected_in_end_of_message(start: Start) -> None:
    """A fault of libmilter: the reply to the body, then the same as the reply to the end."""
    running = start(F_VERDICT_body=REJECT)
    with pytest.raises(ProtocolError, match=r"goes on|nothing was due"), connect(running) as mta:
        mta.mail("<a@x>")
        mta.rcpt("<b@x>")
        mta.eoh()
        assert mta.eom(b"body").verdict is Verdict.REJECT


def test_libmilter_ignores_what_is_out_of_order(start: Start) -> None:
    running = start()
    with connect(running) as mta:
        mta.timeout = 0.3
        mta.connect_info()
        with pytest.raises(FilterTimeout):
            mta.rcpt("<b@x>")
        mta.timeout = WAIT
        assert mta.mail("<a@x>").verdict is Verdict.CONTINUE


def test_libmilter_hangs_up_on_garbage(start: Start) -> None:
    running = start()
    with connect(running) as mta:
        mta.send_raw(b"\xff\xff\xff\xffgarbage")
        mta.expect_close()
        mta.close()
    with connect(running) as mta:
        assert mta.send(SIMPLE, recipients=["b@x"]).accepted


def test_libmilter_over_tcp(start: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = start(F_SOCKET=f"inet:{port}@127.0.0.1", F_EOM=records(("addheader", "X", "v")))
    with connect(running) as mta:
        for _ in range(5):
            assert mta.send(SIMPLE, recipients=["b@x"]).message["X"] == "v"
    with MTA.connect(f"inet:127.0.0.1:{port}", postfix_syntax=True, timeout=WAIT) as mta:
        assert mta.send(SIMPLE, recipients=["b@x"]).accepted


def test_many_connections_at_once(start: Start) -> None:
    running = start(F_EOM=records(("addheader", "X", "v")))
    connect(running).close()

    def work(_: int) -> None:
        for _ in range(5):
            with connect(running) as mta:
                assert mta.send(SIMPLE, recipients=["b@x"]).message["X"] == "v"

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(work, range(10), timeout=WAIT * 2))
    assert running.names().count("eom") == 50
