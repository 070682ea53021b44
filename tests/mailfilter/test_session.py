"""Filters of functions on a connection: what is asked of the MTA, and what it is told."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import milter
import pytest
from support.process import WAIT, python_command

import Milter
from Milter import mailfilter
from Milter.mailfilter import Mail
from Milter.mta import FilterClosed, Stage, Step, Verdict
from Milter.pytest_plugin import MilterApp
from Milter.testctx import TestCtx

MESSAGE = b"Subject: hi\r\nX-A:one\r\n\r\nA body.\r\n"


def connected(made: mailfilter.Filter, monkeypatch: pytest.MonkeyPatch, **macros: str) -> TestCtx:
    """A session with a filter; with the macros that are given."""
    monkeypatch.setattr(Milter, "factory", made)
    ctx = TestCtx()
    for name, value in macros.items():
        ctx._setsymval(name, value)
    assert ctx._connect(host="mx.example.com", helo="helo.example", ip="192.0.2.7") in (
        Milter.CONTINUE,
        Milter.ACCEPT,
    )
    return ctx


def feed(ctx: TestCtx, data: bytes = MESSAGE, *recipients: str) -> int:
    verdict = ctx._feedFile(
        io.BytesIO(data), "joe@example.com", *(recipients or ("bob@b.example",))
    )
    return int(verdict)


# --- what is asked of the MTA --------------------------------------------------------------------

NOTHING = {"connect", "hello", "envfrom", "envrcpt", "data", "unknown", "eoh", "body", "header"}


@pytest.mark.parametrize(
    ("at", "options", "needed"),
    [
        ("connect", {}, {"connect"}),
        ("helo", {}, {"connect", "hello"}),
        ("mail", {}, {"connect", "hello", "envfrom"}),
        ("rcpt", {}, {"connect", "hello", "envfrom", "envrcpt"}),
        ("data", {}, {"connect", "hello", "envfrom", "envrcpt", "data"}),
        ("headers", {}, {"connect", "hello", "envfrom", "envrcpt", "header", "eoh"}),
        ("eom", {"body": False}, {"connect", "hello", "envfrom", "envrcpt", "header"}),
        ("eom", {}, {"connect", "hello", "envfrom", "envrcpt", "header", "body"}),
    ],
)
def test_nothing_that_comes_later_is_asked_of_the_mta(
    at: str, options: dict[str, Any], needed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = connected(mailfilter.filter(at=at, **options)(lambda m: None), monkeypatch)
    off = {name for name, (_, no) in Milter.OPTIONAL_CALLBACKS.items() if ctx.protocol & no}
    assert off == NOTHING - needed
    silent = {name for name, (nr, _) in Milter.OPTIONAL_CALLBACKS.items() if ctx.protocol & nr}
    decides = {"helo": "hello", "mail": "envfrom", "rcpt": "envrcpt", "headers": "eoh"}.get(at, at)
    assert silent == needed - {decides}
    assert bool(ctx.protocol & milter.P_HDR_LEADSPC) == ("header" in needed)
    assert bool(ctx.actions & milter.ADDHDRS) == (at == "eom")
    assert bool(ctx.actions & milter.MODBODY) == (needed == NOTHING - {"data", "eoh", "unknown"})
    assert bool(ctx.actions & milter.QUARANTINE) == (at not in ("connect", "helo", "rcpt"))


def test_a_chain_asks_for_what_any_of_its_functions_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = mailfilter.chain(
        mailfilter.filter(at="rcpt")(lambda m: None),
        mailfilter.filter(body=False)(lambda m: None),
    )
    ctx = connected(chain, monkeypatch)
    assert ctx.protocol & milter.P_NOBODY
    assert not ctx.protocol & (milter.P_NOHDRS | milter.P_NR_RCPT)


def test_macros_are_asked_for_where_mtas_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    wants = mailfilter.filter(macros=["client_ptr", "{msg_id}"])(lambda m: None)
    ctx = connected(wants, monkeypatch)
    assert ctx._symlist[milter.M_CONNECT] == "v {client_ptr}"
    assert ctx._symlist[milter.M_EOM] == "i {msg_id}"
    assert ctx._symlist[milter.M_ENVFROM] is None
    assert not any(connected(mailfilter.filter(lambda m: None), monkeypatch)._symlist)


# --- what a function sees, and what is done ------------------------------------------------------


def test_a_function_sees_the_whole_message(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @mailfilter.filter
    def looks(m: Mail) -> None:
        seen.append((m.client.host, str(m.client.address), m.helo, str(m.sender)))
        seen.append(([str(one) for one in m.recipients], m.queue_id, m.auth, m.as_bytes()))

    ctx = connected(looks, monkeypatch, i="4XyZ", **{"{auth_authen}": "joe"})
    assert feed(ctx) == Milter.ACCEPT
    assert seen == [
        ("mx.example.com", "192.0.2.7", "helo.example", "joe@example.com"),
        (["bob@b.example"], "4XyZ", ("joe", ""), MESSAGE),
    ]
    # It changed nothing, so nothing was sent.
    assert not (ctx._headerschanged or ctx._bodyreplaced or ctx._addrcpt or ctx._envfromchanged)


def test_edits_are_done_when_the_function_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    @mailfilter.filter
    def edits(m: Mail) -> mailfilter.Decision:
        m.headers["Subject"] = "[x] " + m.headers["Subject"]
        m.recipients.add("archive@b.example", {"NOTIFY": "NEVER"})
        m.recipients.remove("bob@B.example")
        m.sender = "list@b.example"
        m.body = m.body.read() + b"-- \nfooter\n"
        return mailfilter.quarantine("odd")

    ctx = connected(edits, monkeypatch)
    assert feed(ctx) == Milter.ACCEPT
    assert ctx._addrcpt == [("<archive@b.example>", "NOTIFY=NEVER")]
    assert ctx._delrcpt == ["<bob@b.example>"]
    assert ctx._chgfrom == [("<list@b.example>", None)]
    assert ctx._quarantine == "odd"
    assert ctx._body is not None
    assert ctx._body.getvalue() == (
        b"Subject: [x] hi\r\nX-A:one\r\n\r\nA body.\r\n-- \r\nfooter\r\n"
    )


@pytest.mark.parametrize("at", ["mail", "data", "headers", "eom"])
def test_refusals_have_their_reply_at_each_stage(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @mailfilter.filter(at=at)
    def no(m: Mail) -> None:
        if at == "eom":
            m.headers.add("X", "y")
        raise mailfilter.Reject("5.6.1 100% no\nreally")

    ctx = connected(no, monkeypatch)
    assert feed(ctx) == Milter.REJECT
    assert ctx._reply == ("550", "5.6.1", "100%% no", "really")
    assert not ctx._headerschanged


def test_a_connection_is_refused_or_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Milter, "factory", mailfilter.filter(at="connect")(lambda m: mailfilter.tempfail("later"))
    )
    ctx = TestCtx()
    assert ctx._connect() == Milter.TEMPFAIL
    assert ctx._reply == ("451", "4.7.1", "later")
    monkeypatch.setattr(Milter, "factory", mailfilter.filter(at="connect")(lambda m: None))
    assert TestCtx()._connect() == Milter.ACCEPT


def test_each_recipient_has_a_decision_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    @mailfilter.filter(at="rcpt")
    def checks(m: Mail) -> mailfilter.Decision | None:
        if m.recipient == "bob@b.example":
            return mailfilter.reject("5.1.1 no")
        return mailfilter.accept() if m.recipient == "carl@b.example" else None

    seen: list[list[str]] = []
    counts = mailfilter.filter(lambda m: seen.append([str(one) for one in m.recipients]))
    ctx = connected(mailfilter.chain(checks, counts), monkeypatch)
    assert ctx._envfrom("<joe@example.com>") == Milter.CONTINUE
    verdicts = [ctx._envrcpt(f"<{name}@b.example>") for name in ("bob", "carl", "dan")]
    assert verdicts == [Milter.REJECT, Milter.CONTINUE, Milter.CONTINUE]
    assert ctx._eoh() == Milter.CONTINUE
    assert ctx._eom() == Milter.ACCEPT
    assert seen == [["carl@b.example", "dan@b.example"]]


def test_messages_share_the_connection_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @mailfilter.filter
    def counts(m: Mail) -> None:
        m.connection["count"] = m.connection.get("count", 0) + 1
        seen.append((m.connection["count"], len(m.headers), len(m.recipients), bytes(m.body)))

    ctx = connected(counts, monkeypatch)
    feed(ctx)
    ctx._envfrom("<cut@off>")
    ctx._envrcpt("<a@b>")
    ctx._abort(close=False)
    feed(ctx, b"\r\n", "x@b.example")
    ctx._close()
    assert seen == [(1, 2, 1, b"A body.\r\n"), (2, 0, 1, b"")]


def test_a_message_that_is_over_can_neither_be_read_nor_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Mail] = []
    ctx = connected(mailfilter.filter(lambda m: kept.append(m)), monkeypatch, i="4XyZ")
    feed(ctx)
    with pytest.raises(mailfilter.NotNow, match="has returned"):
        kept[0].headers.add("X", "y")
    with pytest.raises(mailfilter.NotNow, match="has returned"):
        kept[0].macros["i"]
    with pytest.raises(ValueError, match="message that is over"):
        kept[0].body.read()
    assert not ctx._headerschanged


def test_what_is_no_decision_is_an_exception_and_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @mailfilter.filter
    def odd(m: Mail) -> Any:
        m.headers.add("X", "y")
        return Milter.ACCEPT

    ctx = connected(odd, monkeypatch)
    with pytest.raises(TypeError, match=rf"odd returned {Milter.ACCEPT}: return None, accept\(\)"):
        feed(ctx)
    assert not ctx._headerschanged


def test_what_the_mta_does_not_let_a_filter_do_is_an_exception_and_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @mailfilter.filter
    def edits(m: Mail) -> None:
        m.headers.add("X", "y")
        m.body = b"new"

    monkeypatch.setattr(TestCtx, "default_opts", [milter.ADDHDRS, milter.CURR_PROT, 0, 0])
    ctx = connected(edits, monkeypatch)
    with pytest.raises(Milter.DisabledAction, match="MODBODY: the MTA does not let"):
        feed(ctx)
    assert not ctx._headerschanged


def test_without_leading_space_values_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        TestCtx, "default_opts", [milter.CURR_ACTS, milter.CURR_PROT & ~milter.P_HDR_LEADSPC, 0, 0]
    )
    tag = mailfilter.filter(lambda m: m.headers.__setitem__("Subject", "new"))
    ctx = connected(tag, monkeypatch)
    feed(ctx)
    assert ctx._body is not None
    assert ctx._body.getvalue().startswith(b"Subject: new\r\nX-A:one\r\n")


# --- bodies that are too large -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("oversize", "verdict", "reply"),
    [
        ("reject", Milter.REJECT, ("552", "5.3.4")),
        ("tempfail", Milter.TEMPFAIL, ("452", "4.3.4")),
        ("accept", Milter.ACCEPT, None),
        ("truncate", Milter.ACCEPT, None),
    ],
)
def test_a_body_beyond_max_body(
    oversize: str, verdict: int, reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    made = mailfilter.filter(max_body=5, oversize=oversize)(
        lambda m: seen.append((bytes(m.body), m.truncated))
    )
    ctx = connected(made, monkeypatch)
    assert feed(ctx) == verdict
    assert (ctx._reply or (None,))[:2] == (reply or (None,))
    assert seen == ([(b"A bod", True)] if oversize == "truncate" else [])
    assert not ctx._bodyreplaced


def test_a_disk_without_room_is_a_failure_for_now(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The temporary directory is not there; the next test has one that is full."""
    monkeypatch.setattr("tempfile.tempdir", "/none")
    asked: list[Mail] = []
    ctx = connected(mailfilter.filter(spool_at=3)(lambda m: asked.append(m)), monkeypatch)
    with caplog.at_level(logging.ERROR, "milter.mailfilter"):
        assert feed(ctx) == Milter.TEMPFAIL
    assert ctx._reply == ("451", "4.3.0", "Not enough room for the message, try again later")
    assert "cannot keep the body of a message" in caplog.text
    assert asked == []
    # The connection goes on.
    assert feed(ctx, b"\r\n") == Milter.ACCEPT


# --- over the wire -------------------------------------------------------------------------------

WIRE = """
import asyncio, contextvars, os, resource, signal, tempfile, threading, time
from Milter import mailfilter
from Milter.mailfilter import _progress

_progress.SECONDS = 0.05
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

@mailfilter.filter(spool_at=1000)
def slow(mail):
    if "X-Fail" in mail.headers:
        mail.headers.add("X-New", "y")
        raise KeyError("oops")
    if "X-Wait" in mail.headers:
        while not os.path.exists(mail.headers["X-Wait"]):
            time.sleep(0.01)
    mail.headers.add("X-Left", str(len(os.listdir(tempfile.gettempdir()))))
    mail.body = mail.body.read() + b"more\\r\\n"

@mailfilter.filter(at="rcpt")
def early(mail):
    if mail.recipient == "nobody@b.example":
        return mailfilter.reject("5.1.1 no")

both = mailfilter.chain(early, slow)

@mailfilter.filter(at="rcpt")
async def early_async(mail):
    await asyncio.sleep(0)
    if mail.recipient == "nobody@b.example":
        raise mailfilter.Reject("5.1.1 no")

@mailfilter.filter
async def stamp_async(mail):
    await asyncio.sleep(0)
    mail.headers.add("X-Async", mail.queue_id)

asynchronous = mailfilter.chain(early_async, stamp_async)

def plain(mail):
    mail.headers.add("X-Plain", "yes")

all_here = threading.Barrier(4, timeout=20)
CLIENT = contextvars.ContextVar("CLIENT", default="nobody")

@mailfilter.filter(at="mail")
def set_client(mail):
    CLIENT.set(str(mail.sender))

@mailfilter.filter(at="mail")
async def see_client(mail):
    await asyncio.sleep(0)
    mail.connection["client"] = CLIENT.get()

def meet(mail):
    all_here.wait()
    mail.headers.add("X-Order", "plain")
    mail.headers.add("X-Client", f"{CLIENT.get()} {mail.connection['client']}")

async def after(mail):
    await asyncio.sleep(0)
    mail.headers.add("X-Order", "async")

def decide(mail):
    mail.headers.add("X-Order", "plain again")
    if mail.sender == "joe@example.com":
        raise mailfilter.Quarantine("joe")

beside = mailfilter.chain(set_client, see_client, meet, after, decide)

def outlives(mail):
    print("at work", flush=True)
    deadline = time.monotonic() + 20
    try:
        while "X-Go" not in mail.headers and time.monotonic() < deadline:
            mail.headers["X-Late"] = "1"
            time.sleep(0.01)
    except mailfilter.NotNow as error:
        print("refused:", error, len(mail.body.read()), flush=True)

outliving = mailfilter.chain(mailfilter.filter(spool_at=10)(outlives), after)

@mailfilter.filter(at="rcpt")
def early_by_plain(mail):
    return ask(mail)

async def ask(mail):
    await asyncio.sleep(0)
    if mail.recipient == "nobody@b.example":
        raise mailfilter.Reject("5.1.1 no")

def stamp_by_plain(mail):
    return after(mail)

by_plain = mailfilter.chain(early_by_plain, plain, stamp_by_plain, decide)

async def nested(mail):
    return after(mail)
"""


@pytest.fixture
def module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wire_filter.py").write_text(WIRE)
    (tmp_path / "spool").mkdir()
    return "wire_filter"


def test_over_the_wire(module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]) -> None:
    app = milter_app(f"{module}:slow", env={"TMPDIR": str(tmp_path / "spool")}, cwd=tmp_path)
    with app.mta() as mta:
        # What is on disk has no name.
        result = mta.send(b"Subject: x\r\n\r\n" + b"x" * 5000 + b"\r\n", recipients=["a@b"])
        assert result.message["X-Left"] == "0"
        assert result.message.body.endswith(b"more\r\n")
        # A disk that is full: for now, noted, and nothing is left.
        result = mta.send(b"Subject: x\r\n\r\n" + b"x" * 300_000 + b"\r\n", recipients=["a@b"])
        assert result.verdict is Verdict.TEMPFAIL
        assert str(result.smtp).startswith("451 4.3.0 Not enough room")
        app.wait_for_output("cannot keep the body")
        assert list((tmp_path / "spool").iterdir()) == []
        # An exception: the policy's answer, and no edit.
        result = mta.send(b"X-Fail: x\r\n\r\n", recipients=["a@b"])
        assert result.verdict is Verdict.TEMPFAIL
        assert result.modifications == ()
        app.wait_for_output("KeyError: 'oops'")
        result = mta.send(b"Subject: x\r\n\r\n", recipients=["a@b"])
        assert result.verdict is Verdict.ACCEPT


def test_signs_of_life_are_sent_while_a_function_takes_its_time(
    module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]
) -> None:
    app = milter_app(f"{module}:slow", cwd=tmp_path)
    done = tmp_path / "done"
    with app.mta() as mta:
        mta.greet()
        mta.mail("<joe@example.com>")
        mta.rcpt("<a@b>")
        mta.header("X-Wait", f" {done}")
        mta.send_packet(Stage.EOM.value, b"")
        for _ in range(2):
            assert mta.read_packet().command == b"p"
        done.touch()
        answers = iter(lambda: mta.read_packet().command, b"a")
        assert {b"h", b"b"} <= set(answers)


def test_coroutine_functions_serve(
    module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]
) -> None:
    with milter_app(f"{module}:asynchronous", cwd=tmp_path).mta() as mta:
        for queue_id in ("4XyZ", "4XyA"):
            recipients = ["nobody@b.example", "a@b.example"]
            result = mta.send(b"\r\n", recipients=recipients, macros={"i": queue_id})
            assert [str(one.recipient) for one in result.refused] == ["<nobody@b.example>"]
            assert result.message["X-Async"] == queue_id


def test_plain_functions_beside_coroutines_hold_up_no_other_message(
    module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]
) -> None:
    """Each waits until four are there; what they change, and set, comes in their order."""
    app = milter_app(f"{module}:beside", cwd=tmp_path)

    def send(number: int) -> Any:
        with app.mta() as mta:
            return mta.send(b"\r\n", sender=f"{number}@b", recipients=["a@b"])

    with ThreadPoolExecutor(4) as pool:
        for number, result in enumerate(pool.map(send, range(4))):
            added = [(one.name, one.value.strip()) for one in result.modifications]
            assert added == [
                (b"X-Order", b"plain"),
                (b"X-Client", b"%d@b %d@b" % (number, number)),
                (b"X-Order", b"async"),
                (b"X-Order", b"plain again"),
            ]


@pytest.mark.engine("native")
def test_a_plain_function_whose_message_is_over_changes_nothing(
    module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]
) -> None:
    """It goes on to its end beside a coroutine, and can read meanwhile."""
    app = milter_app(f"{module}:outliving", cwd=tmp_path)
    mta = app.mta()
    with ThreadPoolExecutor(1) as pool:
        message = b"\r\n" + b"x" * 5000 + b"\r\n"
        waiting = pool.submit(mta.send, message, recipients=["a@b"])
        app.wait_for_output("at work")
        with socket.socket(fileno=os.dup(mta.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(FilterClosed):
            waiting.result(WAIT)
    mta.close()
    refusal = app.wait_for_output("refused: ")
    assert refusal.endswith(" 5002")
    assert "function has returned" in refusal
    with app.mta() as mta:
        result = mta.send(b"X-Go: on\r\n\r\n", recipients=["a@b"])
        assert result.message["X-Order"] == "async"
    assert app.stop() == 0
    assert "exception" not in app.output


def test_a_plain_function_may_return_what_is_to_be_awaited(
    module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]
) -> None:
    app = milter_app(f"{module}:by_plain", cwd=tmp_path)
    for sender, actions in (("ann@b", 3), ("joe@example.com", 4)):
        with app.mta() as mta:
            recipients = ["nobody@b.example", "a@b.example"]
            result = mta.send(b"\r\n", sender=sender, recipients=recipients)
            assert [str(one.recipient) for one in result.refused] == ["<nobody@b.example>"]
            names = [getattr(one, "name", None) for one in result.modifications]
            assert names == [b"X-Plain", b"X-Order", b"X-Order", None][:actions]
    assert app.stop() == 0
    assert "never" not in app.output


def test_a_coroutine_function_that_returns_one_is_refused(
    module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]
) -> None:
    app = milter_app(f"{module}:nested", cwd=tmp_path)
    with app.mta() as mta:
        assert mta.send(b"\r\n", recipients=["a@b"]).verdict is Verdict.TEMPFAIL
    app.wait_for_output("TypeError: nested returned <coroutine object after")
    assert app.stop() == 0
    assert "never" not in app.output


def test_a_chain_and_a_plain_function_are_run_by_name(
    module: str, tmp_path: Any, milter_app: Callable[..., MilterApp]
) -> None:
    with milter_app(f"{module}:both", cwd=tmp_path).mta() as mta:
        result = mta.send(b"\r\n", recipients=["nobody@b.example", "a@b.example"])
        assert [str(one.recipient) for one in result.refused] == ["<nobody@b.example>"]
        assert mta.negotiated.steps & Step.NODATA
    with milter_app(f"{module}:plain", cwd=tmp_path).mta() as mta:
        assert mta.send(b"\r\n", recipients=["a@b"]).message["X-Plain"] == "yes"


# --- commands ------------------------------------------------------------------------------------


def command(directory: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What ``python -m Milter`` says."""
    return subprocess.run(
        [*python_command(), "-m", "Milter", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def test_config_prints_for_functions(module: str, tmp_path: Any) -> None:
    (tmp_path / "asks.py").write_text(
        "from Milter import mailfilter\n"
        "@mailfilter.filter(at='mail', macros=['{client_ptr}', '{daemon_name}'])\n"
        "def asks(mail): pass\n"
    )
    options = ("--name", "asks", "--socket", "unix:/run/asks/sock")
    shown = command(tmp_path, "config", "postfix", "asks:asks", *options).stdout
    assert "# Callbacks: connect hello envfrom eom\n" in shown
    assert "# Macros for connect: v {client_ptr} {daemon_name}\n" in shown
    # The list that Postfix has, where it is here, or a command that asks for that.
    assert re.search(r"['\"]milter_connect_macros = .* \{client_ptr\}['\"]\n", shown)
    shown = command(tmp_path, "config", "postfix", f"{module}:plain", *options).stdout
    assert "# Callbacks: connect hello envfrom envrcpt body header eom\n" in shown


def test_what_cannot_be_a_filter_is_refused_by_the_commands(tmp_path: Any) -> None:
    (tmp_path / "wrong.py").write_text("def takes_none():\n    pass\n")
    done = command(tmp_path, "run", "wrong:takes_none", "--socket", f"unix:{tmp_path}/s")
    assert done.returncode == 2
    assert "takes_none: it must take one argument, the message" in done.stderr
    assert not (tmp_path / "s").exists()
