"""What each callback gets, as the MTA sent it: types, addresses, steps; abort and close."""

from __future__ import annotations

import resource
import socket
import sys
from typing import Any, Callable

import pytest
from support.wire import TRACE, session

from Milter.mta import Action, Family, Offer, Step, Verdict

MAXIMAL_PATH = "/" + "p" * 106  # sun_path holds 108 bytes on Linux, one of them the final NUL


@pytest.fixture(scope="module")
def scripted(run_shared_filter: Callable[..., Any]) -> Any:
    return run_shared_filter("scripted")


def test_each_callback_gets_its_arguments_in_their_types(scripted: Any) -> None:
    with session(scripted, **TRACE) as each:
        each.connect("client.example", "192.0.2.7", 2525)
        each.mta.helo("helo.example")
        each.mta.mail("<alice@example.com>", "SIZE=100", "BODY=8BITMIME")
        each.mta.rcpt("<bob@example.org>")
        each.mta.rcpt("<carol@example.org>", "NOTIFY=NEVER")
        each.mta.data()
        each.mta.header("Subject", " hello\n\tworld")
        each.mta.header("X-Empty", "")
        each.mta.eoh()
        each.mta.body(b"line\r\nbytes \x00\xff\r\n")
        each.mta.eom()
        each.mta.unknown("XBOGUS with arguments")
    assert each.said() == [
        ("connect", "client.example", socket.AF_INET, ("192.0.2.7", 2525)),
        ("helo", "helo.example"),
        ("envfrom", b"<alice@example.com>", b"SIZE=100", b"BODY=8BITMIME"),
        ("envrcpt", b"<bob@example.org>"),
        ("envrcpt", b"<carol@example.org>", b"NOTIFY=NEVER"),
        ("data",),
        ("header", "Subject", b" hello\n\tworld"),
        ("header", "X-Empty", b""),
        ("eoh",),
        ("body", b"line\r\nbytes \x00\xff\r\n"),
        ("eom",),
        ("unknown", "XBOGUS with arguments"),
        ("close",),
    ]


@pytest.mark.parametrize(
    ("address", "port", "family", "seen"),
    [
        ("192.0.2.7", 0, socket.AF_INET, ("192.0.2.7", 0)),
        ("255.255.255.255", 65535, socket.AF_INET, ("255.255.255.255", 65535)),
        ("2001:db8::7", 2525, socket.AF_INET6, ("2001:db8::7", 2525, 0, 0)),
        ("IPv6:2001:DB8:0:0::7", 25, socket.AF_INET6, ("2001:db8::7", 25, 0, 0)),
        ("::ffff:192.0.2.7", 25, socket.AF_INET6, ("::ffff:192.0.2.7", 25, 0, 0)),
        ("::1", 25, socket.AF_INET6, ("::1", 25, 0, 0)),
        ("/run/submit.sock", 0, socket.AF_UNIX, "/run/submit.sock"),
        (MAXIMAL_PATH, 0, socket.AF_UNIX, MAXIMAL_PATH),
        (b"/run/\xff\xe9.sock", 0, socket.AF_UNIX, "/run/\udcff\udce9.sock"),
        (None, 0, 0, None),
    ],
    ids=str,
)
def test_the_address_of_the_client(
    scripted: Any, address: Any, port: int, family: int, seen: Any
) -> None:
    with session(scripted, connect=TRACE["connect"]) as each:
        each.connect("client.example", address, port)
    assert each.said() == [("connect", "client.example", family, seen)]


def test_an_empty_unix_path_is_a_path(scripted: Any) -> None:
    with session(scripted, connect=TRACE["connect"]) as each:
        each.connect("localhost", "", family=Family.UNIX)
    assert each.said() == [("connect", "localhost", socket.AF_UNIX, "")]


def test_more_parameters_than_the_stack_has_room_for(scripted: Any) -> None:
    params = [f"X-{number}={number}" for number in range(1000)]
    with session(scripted, envfrom=TRACE["envfrom"], envrcpt=TRACE["envrcpt"]) as each:
        each.connect()
        for count in (13, 14, 15, 16, 1000):
            assert each.mta.mail("<>", *params[:count]).verdict is Verdict.CONTINUE
            assert each.mta.rcpt("<b@c>", *params[:count]).verdict is Verdict.CONTINUE
    sent = [tuple(param.encode() for param in params[:n]) for n in (13, 14, 15, 16, 1000)]
    assert each.said() == [
        said for args in sent for said in (("envfrom", b"<>", *args), ("envrcpt", b"<b@c>", *args))
    ]


def test_a_body_of_many_chunks_arrives_whole(scripted: Any) -> None:
    body = bytes(range(256)) * 1024
    with session(
        scripted,
        body="store.__dict__.setdefault('body', []).append(args[0])",
        eom="say(type(store.body[0]).__name__, len(store.body), b''.join(store.body) == "
        "bytes(range(256)) * 1024)",
    ) as each:
        each.envelope()
        each.content(body=body)
    assert each.said() == [("bytes", 5, True)]


def test_body_data_in_the_end_of_the_message_comes_before_eom(scripted: Any) -> None:
    with session(scripted, body=TRACE["body"], eom=TRACE["eom"]) as each:
        each.envelope()
        each.mta.eoh()
        each.mta.eom(b"the rest\r\n")
    assert each.said() == [("body", b"the rest\r\n"), ("eom",)]


def test_the_context_is_one_object_for_a_connection(scripted: Any) -> None:
    keep = "store.__dict__.setdefault('seen', []).append(ctx)"
    with session(
        scripted,
        **{stage: keep for stage in TRACE if stage != "close"},
        close=keep + "; say(len(store.seen), len({id(c) for c in store.seen}))",
    ) as each:
        each.message()
    assert each.said() == [(10, 1)]


def test_priv_is_kept_between_callbacks_and_gone_after_close(scripted: Any) -> None:
    with session(
        scripted,
        connect="say(ctx.getpriv(), ctx.setpriv(['first']))",
        helo="say(ctx.getpriv(), ctx.setpriv('second'), ctx.setpriv(None), ctx.getpriv())",
    ) as each:
        each.connect()
        each.mta.helo("h")
    assert each.said() == [(None, None), (["first"], ["first"], "second", None)]


# --- text --------------------------------------------------------------------------------------


# Every byte but NUL, which ends a string on the wire, and LF and CR, which end a line.
ALL_BYTES = bytes(sorted(set(range(1, 256)) - {10, 13}))
NAME_BYTES = bytes(sorted(set(range(33, 256)) - {58, 127}))  # fit for a header's name


def test_no_byte_becomes_an_exception(scripted: Any) -> None:
    text = ALL_BYTES.decode("utf-8", "surrogateescape")
    bodies = {**TRACE, "eoh": "say(ctx.getsymval('{all}'), ctx.getsymval(b'{all}'))"}
    with session(scripted, **bodies) as each:
        each.connect(ALL_BYTES, b"/" + ALL_BYTES[:100])
        each.mta.helo(ALL_BYTES)
        each.mta.unknown(ALL_BYTES)
        each.mta.mail(ALL_BYTES, ALL_BYTES)
        each.mta.rcpt(ALL_BYTES, ALL_BYTES, macros={"{all}": ALL_BYTES})
        each.mta.header(ALL_BYTES, ALL_BYTES)
        each.mta.eoh()
    path = (b"/" + ALL_BYTES[:100]).decode("utf-8", "surrogateescape")
    assert each.said() == [
        ("connect", text, socket.AF_UNIX, path),
        ("helo", text),
        ("unknown", text),
        ("envfrom", ALL_BYTES, ALL_BYTES),
        ("envrcpt", ALL_BYTES, ALL_BYTES),
        ("header", text, ALL_BYTES),
        (text, text),
        ("abort",),
        ("close",),
    ]


# --- abort and close ---------------------------------------------------------------------------

ENDS = {"abort": TRACE["abort"], "close": TRACE["close"]}


def test_abort_comes_once_for_a_message_however_often_the_mta_says_it(scripted: Any) -> None:
    with session(scripted, **ENDS) as each:
        each.connect()
        each.mta.helo("h")
        each.mta.mail("<a@b>")
        for _ in range(3):
            each.mta.abort()
        each.mta.mail("<a@b>")
        each.mta.rcpt("<c@d>")
        each.mta.abort()
    assert each.said() == [("abort",), ("abort",), ("close",)]


def test_no_abort_after_the_end_of_the_message(scripted: Any) -> None:
    with session(scripted, **ENDS) as each:
        each.message()
        each.mta.abort()
    assert each.said() == [("close",)]


def test_no_abort_before_there_is_a_message(scripted: Any) -> None:
    with session(scripted, **ENDS) as each:
        each.connect()
        each.mta.abort()
        each.mta.helo("h")
        each.mta.abort()
    assert each.said() == [("close",)]


@pytest.mark.parametrize("verdict", ["REJECT", "TEMPFAIL", "ACCEPT", "DISCARD"])
@pytest.mark.parametrize("stage", ["envfrom", "data", "header", "eoh", "body", "eom"])
def test_no_abort_after_a_verdict_that_ends_the_message(
    scripted: Any, stage: str, verdict: str
) -> None:
    with session(scripted, **ENDS, **{stage: f"return milter.{verdict}"}) as each:
        each.connect()
        steps = [
            lambda: each.mta.mail("<a@b>"),
            lambda: each.mta.rcpt("<c@d>"),
            each.mta.data,
            lambda: each.mta.header("Subject", "hello"),
            each.mta.eoh,
            lambda: each.mta.body(b"text\r\n"),
            each.mta.eom,
        ]
        for step in steps:
            if not step().verdict.goes_on:
                break
        each.mta.abort()
    assert each.said() == [("close",)]


@pytest.mark.parametrize("verdict", ["REJECT", "TEMPFAIL"])
def test_a_refused_recipient_does_not_end_the_message(scripted: Any, verdict: str) -> None:
    with session(scripted, **ENDS, envrcpt=f"return milter.{verdict}") as each:
        each.connect()
        each.mta.mail("<a@b>")
        each.mta.rcpt("<c@d>")
        each.mta.rcpt("<e@f>")
        each.mta.abort()
    assert each.said() == [("abort",), ("close",)]


def test_a_message_without_abort_after_an_early_verdict_is_followed_by_the_next(
    scripted: Any,
) -> None:
    with session(scripted, **ENDS, data="return milter.REJECT") as each:
        each.connect()
        each.transaction()  # sendmail may leave out ABORT here
        each.mta.mail("<a@b>")
        each.mta.abort()
    assert each.said() == [("abort",), ("close",)]


def test_a_lost_connection_is_an_abort_and_a_close(scripted: Any) -> None:
    with session(scripted, **ENDS) as each:
        each.envelope()
        each.mta.close()
    assert each.said() == [("abort",), ("close",)]


def test_a_quit_in_a_message_is_an_abort_and_a_close(scripted: Any) -> None:
    with session(scripted, **ENDS) as each:
        each.envelope()
    assert each.said() == [("abort",), ("close",)]


def test_close_does_not_run_where_no_callback_created_a_context(run_filter: Any) -> None:
    setup = (
        "old = milter.set_close_callback(None)\n"
        "milter.set_close_callback(lambda ctx: (say('close'), old(ctx)))"
    )
    running = run_filter("scripted", setup)
    probe = running.mta(offer=None)
    probe.quit()
    with session(running, offer=Offer()) as each:
        each.connect()
    assert running.stop() == 0
    assert running.output.count("'close'") == 1


def test_contexts_are_counted(run_filter: Any) -> None:
    running = run_filter("scripted")
    for _ in range(3):
        with session(running) as each:
            each.connect()
        each.said()
    with session(running, helo="say(*milter.getdiag()[:2])") as each:
        each.connect()
        each.mta.helo("h")
        with session(running, helo="say(*milter.getdiag()[:2])") as other:
            other.connect()
            other.mta.helo("h")
    assert each.said() == [(4, 3)]
    assert other.said() == [(5, 3)]


# --- after close -------------------------------------------------------------------------------

EVERY_METHOD = """
calls = {
    "addheader": lambda ctx: ctx.addheader("a", "b"),
    "insheader": lambda ctx: ctx.addheader("a", "b", 0),
    "addrcpt": lambda ctx: ctx.addrcpt("a@b"),
    "addrcpt_par": lambda ctx: ctx.addrcpt("a@b", "NOTIFY=NEVER"),
    "chgfrom": lambda ctx: ctx.chgfrom("a@b"),
    "chgheader": lambda ctx: ctx.chgheader("a", 1, "b"),
    "delrcpt": lambda ctx: ctx.delrcpt("a@b"),
    "getpriv": lambda ctx: ctx.getpriv(),
    "getsymval": lambda ctx: ctx.getsymval("i"),
    "progress": lambda ctx: ctx.progress(),
    "quarantine": lambda ctx: ctx.quarantine("a"),
    "replacebody": lambda ctx: ctx.replacebody(b"a"),
    "setpriv": lambda ctx: ctx.setpriv(1),
    "setreply": lambda ctx: ctx.setreply("550"),
    "setsymlist": lambda ctx: ctx.setsymlist(0, "i"),
}
assert {name for name in dir(ctx) if name[0] != "_"} - {"actions", "protocol"} == (
    set(calls) - {"insheader", "addrcpt_par"}
)
"""


@pytest.mark.parametrize("thread", [False, True], ids=["here", "another thread"])
def test_after_close_every_method_is_a_bad_context(scripted: Any, thread: bool) -> None:
    with session(scripted, connect="milter.kept = ctx") as each:
        each.connect()
    each.said()
    use = (
        EVERY_METHOD
        + """
def use(ctx):
    for name, call in calls.items():
        try:
            call(ctx)
        except milter.error as exc:
            if str(exc) != "bad context":
                say(name, str(exc))
        else:
            say(name, "went through")
"""
    )
    use += (
        "import threading; t = threading.Thread(target=use, args=(milter.kept,)); "
        "t.start(); t.join()"
        if thread
        else "use(milter.kept)"
    )
    with session(scripted, eom=use + "\nsay(len(calls), 'tried')\ndel milter.kept") as each:
        each.message()
    assert each.said() == [(15, "tried")]


def test_in_close_the_connection_is_still_there(scripted: Any) -> None:
    with session(
        scripted,
        connect="ctx.setpriv('mine')",
        close="say(ctx.getpriv(), ctx.getsymval('j')); attempt(lambda: ctx.addheader('a', 'b'))",
    ) as each:
        each.connect(macros={"j": "mx.example.org"})
    said = each.said()
    assert said[0] == ("mine", "mx.example.org")
    assert said[1][2] == "smfi_addheader: only allowed in the eom callback"


# --- steps -------------------------------------------------------------------------------------


def test_a_rejected_recipient_is_shown_where_that_was_agreed(scripted: Any) -> None:
    with session(
        scripted, envrcpt="say(*args, ctx.getsymval('{rcpt_mailer}'), ctx.getsymval('{rcpt_host}'))"
    ) as each:
        each.connect()
        each.mta.mail("<a@b>")
        each.mta.rcpt("<c@d>", rejected="550 5.1.1 User unknown")
        each.mta.rcpt("<e@f>", macros={"{rcpt_mailer}": "smtp", "{rcpt_host}": "f"})
    assert each.said() == [(b"<c@d>", "error", "5.1.1"), (b"<e@f>", "smtp", "f")]


def test_skip_ends_the_body(scripted: Any) -> None:
    with session(scripted, body="say(len(args[0])); return milter.SKIP") as each:
        each.envelope()
        each.mta.eoh()
        assert each.mta.body(bytes(200_000)).verdict is Verdict.SKIP
        assert each.mta.eom().verdict is Verdict.CONTINUE
    assert each.said() == [(65535,)]


def test_callbacks_replaced_while_running_take_effect(run_filter: Any) -> None:
    running = run_filter("scripted")
    with session(
        running,
        helo="store.old = milter.set_eoh_callback(lambda ctx: (say('new'), milter.TEMPFAIL)[1])",
        eoh="say('old')",
        unknown="say(milter.set_eoh_callback(store.old) is not store.old)",
    ) as each:
        each.envelope()
        assert each.mta.eoh().verdict is Verdict.TEMPFAIL
        each.mta.unknown("restore")
        each.transaction()
        assert each.mta.eoh().verdict is Verdict.CONTINUE
    assert each.said() == [("new",), (True,), ("old",)]


def test_a_callback_removed_while_running_is_not_called(run_filter: Any) -> None:
    running = run_filter("scripted")
    with session(
        running,
        helo="milter.set_eoh_callback(None)",
        eoh="say('called')",
        data="say('data')",
    ) as each:
        each.message()
    assert each.said() == [("data",)]


def test_the_actions_that_were_agreed_are_on_the_context(scripted: Any) -> None:
    wanted = Offer(actions=Action.ADDHDRS | Action.CHGFROM, steps=Step.SKIP | Step.NOEOH)
    with session(scripted, offer=wanted, connect="say(ctx.actions, ctx.protocol)") as each:
        each.connect()
    assert each.said() == [(int(Action.ADDHDRS | Action.CHGFROM), int(Step.SKIP))]


STACK = """
import ctypes
libc = ctypes.CDLL(None)
attributes = ctypes.create_string_buffer(256)
size = ctypes.c_size_t()
libc.pthread_self.restype = ctypes.c_ulong
libc.pthread_getattr_np(ctypes.c_ulong(libc.pthread_self()), attributes)
libc.pthread_attr_getstacksize(attributes, ctypes.byref(size))
say(size.value)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the C library of Linux")
def test_callbacks_have_a_stack_that_recursion_fits_on(run_filter: Callable[..., Any]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (256 * 1024, hard))
    try:
        running = run_filter("scripted")
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    with session(running, helo=STACK) as each:
        each.connect()
        each.mta.helo("h")
    ((size,),) = each.said()
    assert int(size) >= 1024 * 1024


def test_a_context_takes_no_more_than_a_kilobyte(scripted: Any) -> None:
    with session(scripted, connect="import sys\nsay(sys.getsizeof(ctx))") as each:
        each.connect()
    ((size,),) = each.said()
    assert int(size) <= 1024
