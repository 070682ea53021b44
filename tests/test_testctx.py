"""The stand-in for the context, and the mixin on top of it."""

from __future__ import annotations

import array
import email
import io
import logging
import random
import socket
import sys
import time
import types
from typing import ClassVar

import milter
import pytest
from milter import (
    ACCEPT,
    ALL_OPTS,
    CONTINUE,
    CURR_ACTS,
    DISCARD,
    NOREPLY,
    P_HDR_LEADSPC,
    P_NOBODY,
    P_NR_HDR,
    P_SKIP,
    QUARANTINE,
    REJECT,
    SETSYMLIST,
    SKIP,
    TEMPFAIL,
)

import Milter
from Milter import test as milter_test
from Milter import testctx
from Milter.mta import Message

MESSAGE = (
    b"Received: by mx\n"
    b"From: a@b\n"
    b"Subject:  old\n\tfolded\n"
    b"X-Twice: 1\n"
    b"x-twice:2\n"
    b"To: c@d\n"
    b"\n"
    b"line one\nline two\n"
)


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Make the class of filter from callbacks and play a session; returns the context."""
    monkeypatch.chdir(tmp_path)

    def play(bases=(Milter.Base,), opts=None, session=True, **callbacks):
        klass = type("Played", bases, callbacks)
        monkeypatch.setattr(Milter, "factory", klass)
        ctx = testctx.TestCtx()
        if opts is not None:
            ctx._opts = list(opts)
        if session:
            assert ctx._connect() == CONTINUE
        return ctx

    return play


def fed(ctx, message=MESSAGE, *args):
    """The verdict on a message."""
    return ctx._feedFile(io.BytesIO(message), *args)


class Logger(Milter.Base):
    """A filter that notes what comes; ``verdicts`` holds what it returns where not CONTINUE."""

    verdicts: ClassVar[dict[str, object]] = {}

    def __init__(self):
        self.seen = []

    def _note(self, name, *args):
        self.seen.append((name, *args))
        return self.verdicts.get(name, CONTINUE)

    def connect(self, *args):
        return self._note("connect", *args)

    def hello(self, *args):
        return self._note("hello", *args)

    def envfrom(self, *args):
        return self._note("envfrom", *args)

    def envrcpt(self, *args):
        return self._note("envrcpt", *args)

    def data(self):
        return self._note("data")

    def header(self, *args):
        return self._note("header", *args)

    def eoh(self):
        return self._note("eoh")

    def body(self, blk):
        return self._note("body", blk)

    def unknown(self, cmd):
        return self._note("unknown", cmd)

    def eom(self):
        return self._note("eom")

    def abort(self):
        return self._note("abort")

    def close(self):
        return self._note("close")


# The session.


def test_a_whole_session_reaches_the_filter_in_order(play):
    ctx = play((Logger,))
    seen = ctx.getpriv().seen
    assert fed(ctx, b"A: b\nC:d\n\nbody\n", "s@x", "r@y", "<r@z>") == CONTINUE
    assert ctx._unknown("XYZZY") == CONTINUE
    assert ctx._close() == CONTINUE
    assert seen == [
        ("connect", "localhost", socket.AF_INET, ("1.2.3.4", 1234)),
        ("hello", "spamrelay"),
        ("envfrom", "<s@x>"),
        ("envrcpt", "<r@y>"),
        ("envrcpt", "<r@z>"),
        ("data",),
        ("header", "A", "b"),
        ("header", "C", "d"),
        ("eoh",),
        ("body", b"body\n"),
        ("eom",),
        ("unknown", "XYZZY"),
        ("close",),
    ]


def test_step_by_step(play):
    ctx = play((Logger,))
    seen = ctx.getpriv().seen
    del seen[:]
    assert ctx._helo("again") == CONTINUE
    assert ctx._envfrom("<s@x>", "SIZE=1", b"X=\xff") == CONTINUE
    assert ctx._sender == "<s@x>"
    assert ctx._envrcpt(b"<r@y>", "NOTIFY=NEVER") == CONTINUE
    assert ctx._data() == CONTINUE
    assert ctx._header("A", "caf\udce9") == CONTINUE
    assert ctx._header(b"B", b"x") == CONTINUE
    assert ctx._eoh() == CONTINUE
    assert ctx._feed_body(io.BytesIO(b"body\n")) == CONTINUE
    assert ctx._body is None
    assert ctx._eom() == CONTINUE
    assert ctx._body.getvalue() == b"A: caf\xe9\nB: x\n\nbody\n"
    assert seen == [
        ("hello", "again"),
        ("envfrom", "<s@x>", "SIZE=1", "X=\udcff"),
        ("envrcpt", "<r@y>", "NOTIFY=NEVER"),
        ("data",),
        ("header", "A", "caf\udce9"),
        ("header", "B", "x"),
        ("eoh",),
        ("body", b"body\n"),
        ("eom",),
    ]


@pytest.mark.parametrize(
    ("ip", "family", "address"),
    [
        ("192.0.2.1", socket.AF_INET, ("192.0.2.1", 1234)),
        ("2001:DB8:0::1", socket.AF_INET6, ("2001:db8::1", 1234, 0, 0)),
        ("/run/mx", socket.AF_UNIX, "/run/mx"),
        (None, 0, None),
    ],
)
def test_the_client_has_an_address_of_its_family(play, ip, family, address):
    ctx = play((Logger,), session=False)
    assert ctx._connect("host", "helo", ip) == CONTINUE
    assert ctx.getpriv().seen[0] == ("connect", "host", family, address)
    assert type(ctx.getpriv().seen[0][2]) is int


@pytest.mark.parametrize("ip", ["localhost", "1.2.3", "1::2::3", ""])
def test_an_address_that_is_none_is_refused(play, ip):
    ctx = play(session=False)
    with pytest.raises(ValueError, match="is no IP address"):
        ctx._connect(ip=ip)


@pytest.mark.parametrize("step", ["connect", "hello"])
@pytest.mark.parametrize("verdict", [REJECT, ACCEPT, TEMPFAIL])
def test_a_verdict_ends_the_begin_of_a_session(play, step, verdict):
    ctx = play((Logger,), session=False, verdicts={step: verdict})
    assert ctx._connect() == verdict
    assert ctx.getpriv().seen[-1][0] == step


@pytest.mark.parametrize("step", ["envfrom", "envrcpt", "data", "header", "eoh", "body", "eom"])
@pytest.mark.parametrize("verdict", [REJECT, ACCEPT, TEMPFAIL, DISCARD])
def test_a_verdict_stops_the_feed(play, step, verdict):
    ctx = play((Logger,), verdicts={step: verdict})
    assert fed(ctx) == verdict
    assert ctx.getpriv().seen[-1][0] == step
    assert [name for name, *_ in ctx.getpriv().seen].count(step) == 1
    assert (ctx._body is None) == (step != "eom")


@pytest.mark.parametrize("step", ["envfrom", "data", "eoh", "eom"])
def test_skip_is_for_steps_that_repeat(play, step):
    ctx = play((Logger,), verdicts={step: SKIP})
    with pytest.raises(milter.error, match="SKIP is only for steps that repeat"):
        fed(ctx)


@pytest.mark.parametrize(("step", "count"), [("header", 6), ("body", 2), ("envrcpt", 3)])
def test_skip_leaves_out_the_rest_of_a_kind(play, step, count):
    message = MESSAGE + b"x" * testctx.CHUNK_SIZE
    ctx = play((Logger,))
    assert fed(ctx, message, "s", "r", "r", "r") == CONTINUE
    assert [name for name, *_ in ctx.getpriv().seen].count(step) == count
    ctx = play((Logger,), verdicts={step: SKIP})
    assert fed(ctx, message, "s", "r", "r", "r") == CONTINUE
    names = [name for name, *_ in ctx.getpriv().seen]
    assert names.count(step) == 1
    assert names[-1] == "eom"
    assert ctx._body.getvalue() == message


def test_a_body_comes_in_pieces(play):
    body = random.Random(1).randbytes(3 * testctx.CHUNK_SIZE + 5)
    ctx = play((Logger,))
    fed(ctx, b"A: b\n\n" + body)
    pieces = [args[0] for name, *args in ctx.getpriv().seen if name == "body"]
    assert [len(piece) for piece in pieces] == [65535, 65535, 65535, 5]
    assert b"".join(pieces) == body


def test_a_feed_takes_text_files_and_default_addresses(play):
    ctx = play((Logger,))
    assert ctx._feedFile(io.StringIO("Subject: caf\udce9\n\nbody\n")) == CONTINUE
    seen = ctx.getpriv().seen
    assert ("envfrom", "<spam@adv.com>") in seen
    assert ("envrcpt", "<victim@lamb.com>") in seen
    assert ("header", "Subject", "caf\udce9") in seen
    assert ("body", b"body\n") in seen
    assert ctx._body.getvalue() == b"Subject: caf\xe9\n\nbody\n"


def test_feed_msg_reads_from_the_test_directory(play, tmp_path):
    ctx = play((Logger,))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "sample").write_bytes(MESSAGE)
    assert ctx._feedMsg("sample", "<s@x>", "r@y", "r@z") == CONTINUE
    assert ctx._body.getvalue() == MESSAGE
    envelope = [call for call in ctx.getpriv().seen if call[0].startswith("env")]
    assert envelope == [("envfrom", "<s@x>"), ("envrcpt", "<r@y>"), ("envrcpt", "<r@z>")]
    assert ctx._feedMsg("sample") == CONTINUE
    assert ("envrcpt", "<victim@lamb.com>") in ctx.getpriv().seen


def test_messages_follow_each_other(play):
    def eom(self):
        self.addheader("X", "y")
        self.chgfrom("<new@x>")
        self.addrcpt("<more@x>")
        self.delrcpt("<less@x>")
        self.replacebody(b"new")
        self.quarantine("odd")
        self.progress()
        return CONTINUE

    ctx = play(eom=eom)
    fed(ctx)
    assert ctx._progress == 1
    assert ctx._envfrom("<s@x>") == CONTINUE
    assert ctx._sender == "<s@x>"
    assert (ctx._addrcpt, ctx._delrcpt, ctx._chgfrom) == ([], [], [])
    assert (ctx._headerschanged, ctx._bodyreplaced, ctx._envfromchanged) == (False, False, False)
    assert (ctx._quarantine, ctx._progress, ctx._body) == (None, 0, None)
    fed(ctx, b"A: b\n\nc\n")
    assert ctx._body.getvalue() == b"A: b\nX: y\n\nnew"


def test_driving_without_a_session_says_what_to_do(play):
    ctx = play(session=False)
    with pytest.raises(RuntimeError, match=r"call _connect\(\) before envfrom"):
        ctx._envfrom("<a@b>")


def test_a_filter_attached_by_hand_is_driven_without_negotiation(play):
    ctx = play(session=False)
    filter_object = Logger()
    filter_object._setctx(ctx)
    assert fed(ctx) == CONTINUE
    assert filter_object.seen[-1] == ("eom",)
    assert (ctx.actions, ctx.protocol, ctx._protocol) == (CURR_ACTS, 0, 0)


def test_exceptions_come_out(play):
    def eom(self):
        raise ZeroDivisionError

    ctx = play(eom=eom)
    with pytest.raises(ZeroDivisionError):
        fed(ctx)
    with pytest.raises(milter.error, match="only allowed in the eom callback"):
        ctx.progress()


# What a callback may return.

BAD_VERDICTS = [
    ("eom", QUARANTINE, "not one of CONTINUE, REJECT"),
    ("eom", None, "not an int"),
    ("eom", "accept", "not an int"),
    ("eom", -1, "not one of"),
    ("eom", NOREPLY, "NOREPLY was not negotiated for this callback"),
    ("header", NOREPLY, "NOREPLY was not negotiated for this callback"),
    ("eom", ALL_OPTS, "not one of"),
    ("connect", DISCARD, "DISCARD is not allowed before there is a message"),
    ("hello", DISCARD, "DISCARD is not allowed before there is a message"),
]


@pytest.mark.parametrize(("step", "verdict", "why"), BAD_VERDICTS)
def test_a_result_that_is_no_verdict_is_an_error(play, step, verdict, why):
    ctx = play((Logger,), session=False, verdicts={step: verdict})
    name = "helo" if step == "hello" else step
    with pytest.raises(milter.error) as caught:
        ctx._connect()
        fed(ctx)
    assert str(caught.value).startswith(f"the {name} callback returned {verdict!r}: {why}")


def test_skip_must_have_been_negotiated(play):
    opts = [CURR_ACTS, 0x1FFFFF & ~P_SKIP, 0, 0]
    ctx = play((Logger,), opts=opts, verdicts={"body": SKIP})
    with pytest.raises(milter.error, match="SKIP was not negotiated"):
        fed(ctx)


def test_the_results_of_abort_and_close_do_not_matter(play):
    ctx = play((Logger,), verdicts={"abort": "junk", "close": None})
    ctx._envfrom("<a@b>")
    assert ctx._abort() == CONTINUE
    assert ctx._close() == CONTINUE


def test_noreply_counts_as_continue(play):
    ctx = play((Milter.Milter,))
    assert ctx.protocol & P_NR_HDR
    assert fed(ctx) == CONTINUE


def test_a_verdict_where_no_reply_was_agreed_is_an_error(play):
    def negotiate(self, opts):
        verdict = Milter.Base.negotiate(self, opts)
        opts[1] |= P_NR_HDR
        return verdict

    ctx = play((Logger,), negotiate=negotiate, verdicts={"header": REJECT})
    with pytest.raises(milter.error, match="no reply was negotiated for this callback"):
        fed(ctx)
    ctx = play((Logger,), negotiate=negotiate)
    assert fed(ctx) == CONTINUE


def test_one_abort_for_a_message_and_none_after_its_verdict(play):
    ctx = play((Logger,))
    seen = ctx.getpriv().seen
    aborts = lambda: [name for name, *_ in seen].count("abort")  # noqa: E731
    ctx._abort()
    assert aborts() == 0
    ctx._envfrom("<a@b>")
    ctx._abort()
    ctx._abort()
    assert aborts() == 1
    fed(ctx)
    ctx._abort()
    assert aborts() == 1
    ctx.getpriv().verdicts = {"envrcpt": REJECT}
    assert fed(ctx) == REJECT
    ctx._abort()
    assert aborts() == 2
    for step in ("data", "header", "envfrom"):
        ctx.getpriv().verdicts = {step: TEMPFAIL}
        assert fed(ctx) == TEMPFAIL
        ctx._abort()
        assert aborts() == 2
    ctx.getpriv().verdicts = {"envrcpt": ACCEPT}
    fed(ctx)
    ctx._abort()
    assert aborts() == 2


# Negotiation.


def test_everything_is_offered_by_default(play):
    offers = []

    def negotiate(self, opts):
        offers.append(list(opts))
        return Milter.Base.negotiate(self, opts)

    ctx = play(negotiate=negotiate)
    assert offers == [[CURR_ACTS, 0x1FFFFF, 0, 0]] == [testctx.TestCtx.default_opts]
    assert ctx._opts == [CURR_ACTS, 0x1FFFFF & ~Milter.Base.protocol_mask(), 0, 0]
    assert (ctx.actions, ctx.protocol) == tuple(ctx._opts[:2])
    ctx._connect()
    assert offers[1] == offers[0]
    ctx._opts = [1, P_NOBODY, 0, 0]
    ctx._connect()
    assert offers[2] == [1, P_NOBODY, 0, 0]
    assert ctx._opts == [1, P_NOBODY, 0, 0]


def test_a_subclass_can_offer_less(monkeypatch):
    class OldMta(testctx.TestCtx):
        default_opts: ClassVar[list[int]] = [milter.V2_ACTS, 0x7F, 0, 0]

    monkeypatch.setattr(Milter, "factory", Logger)
    ctx = OldMta()
    assert ctx._connect() == CONTINUE
    assert (ctx.actions, ctx.protocol) == (milter.V2_ACTS, 0)
    assert OldMta.default_opts == [milter.V2_ACTS, 0x7F, 0, 0]


def test_callbacks_that_are_off_are_not_called(play):
    def eom(self):
        return ACCEPT

    def fail(self, *args):
        raise AssertionError("called")

    off = dict.fromkeys(Milter.OPTIONAL_CALLBACKS, fail)
    for name, method in off.items():
        method = type(method)(method.__code__, method.__globals__, name)
        off[name] = Milter.nocallback(method)
    ctx = play(eom=eom, **off)
    assert fed(ctx) == ACCEPT
    assert ctx._unknown("XYZZY") == CONTINUE
    assert ctx._body.getvalue() == MESSAGE


def test_a_filter_can_refuse_the_session(play):
    ctx = play((Logger,), session=False, negotiate=lambda self, opts: REJECT)
    assert ctx._connect() == REJECT
    assert ctx.getpriv().seen == []


def test_all_options_means_every_step_with_a_reply(play):
    ctx = play((Logger,), negotiate=lambda self, opts: ALL_OPTS)
    assert ctx._opts == [CURR_ACTS, P_SKIP, 0, 0]
    assert fed(ctx) == CONTINUE


@pytest.mark.parametrize("result", [None, ACCEPT, NOREPLY, "junk"])
def test_negotiate_has_results_of_its_own(play, result):
    ctx = play(session=False, negotiate=lambda self, opts: result)
    with pytest.raises(milter.error, match="not CONTINUE, ALL_OPTS or REJECT"):
        ctx._connect()


def test_what_was_not_offered_is_not_agreed(play):
    def negotiate(self, opts):
        opts[0], opts[1] = 0xFFFF, P_NOBODY | P_SKIP
        return CONTINUE

    ctx = play(opts=[milter.ADDHDRS, P_SKIP, 0, 0], negotiate=negotiate)
    assert ctx._opts == [milter.ADDHDRS, P_SKIP, 0, 0]


def test_a_connection_closes_before_the_next_one(play):
    ctx = play((Logger,))
    first = ctx.getpriv()
    ctx._connect()
    assert first.seen[-1] == ("close",)
    assert first._ctx is None
    assert ctx.getpriv() is not first


def test_a_closed_context_is_of_no_use_to_the_filter(play):
    ctx = play((Logger,))
    fed(ctx)
    filter_object = ctx.getpriv()
    ctx._close()
    ctx._close()
    assert filter_object.seen.count(("close",)) == 1
    calls = [
        ("getpriv",),
        ("setpriv", None),
        ("getsymval", "i"),
        ("setreply", "550"),
        ("setsymlist", 0, "i"),
        ("addheader", "a", "b"),
        ("chgheader", "a", 1, "b"),
        ("addrcpt", "a"),
        ("delrcpt", "a"),
        ("chgfrom", "a"),
        ("replacebody", b""),
        ("quarantine", "a"),
        ("progress",),
    ]
    for name, *args in calls:
        with pytest.raises(milter.error, match=r"^bad context$"):
            getattr(ctx, name)(*args)
    assert ctx._body.getvalue() == MESSAGE  # the records stay
    assert ctx._connect() == CONTINUE


def test_close_closes_also_when_the_filter_raises(play):
    def close(self):
        raise ZeroDivisionError

    ctx = play(close=close)
    with pytest.raises(ZeroDivisionError):
        ctx._close()
    with pytest.raises(milter.error, match="bad context"):
        ctx.getpriv()


def test_private_data(play):
    ctx = play(session=False)
    assert ctx.getpriv() is None
    assert ctx.setpriv("a") is None
    assert ctx.setpriv("b") == "a"
    assert ctx.getpriv() == "b"


# What may be called when.

AT_EOM = [
    ("smfi_addheader", "ADDHDRS", "addheader", ("X", "y")),
    ("smfi_insheader", "ADDHDRS", "addheader", ("X", "y", 0)),
    ("smfi_chgheader", "CHGHDRS", "chgheader", ("X", 1, "y")),
    ("smfi_addrcpt", "ADDRCPT", "addrcpt", ("<a@b>",)),
    ("smfi_addrcpt_par", "ADDRCPT_PAR", "addrcpt", ("<a@b>", "X=1")),
    ("smfi_delrcpt", "DELRCPT", "delrcpt", ("<a@b>",)),
    ("smfi_chgfrom", "CHGFROM", "chgfrom", ("<a@b>",)),
    ("smfi_replacebody", "CHGBODY", "replacebody", (b"x",)),
    ("smfi_quarantine", "QUARANTINE", "quarantine", ("reason",)),
    ("smfi_progress", None, "progress", ()),
]
ELSEWHERE = ["negotiate", "connect", "hello", "envfrom", "envrcpt", "data", "header", "eoh"]
ELSEWHERE += ["body", "abort", "close"]


@pytest.mark.parametrize(("call", "flag", "name", "args"), AT_EOM)
def test_actions_belong_to_the_end_of_the_message(play, call, flag, name, args):
    tried = []

    def trying(step):
        def callback(self, *rest):
            if step == "negotiate":
                Milter.Base.negotiate(self, *rest)
            before = len(tried)
            try:
                getattr(self._ctx, name)(*args)
                tried.append((step, None))
            except milter.error as error:
                tried.append((step, str(error)))
            assert len(tried) == before + 1
            return CONTINUE

        callback.__name__ = step
        return callback

    ctx = play(session=False, **{step: trying(step) for step in [*ELSEWHERE, "eom"]})
    ctx._connect()
    fed(ctx, b"A: b\n\nc\n")
    ctx._envfrom("<a@b>")
    ctx._abort()
    ctx._close()
    refused = f"{call}: only allowed in the eom callback"
    results = dict(tried)
    assert results.pop("eom") is None
    assert results == dict.fromkeys(ELSEWHERE, refused)


@pytest.mark.parametrize(("call", "flag", "name", "args"), AT_EOM)
def test_actions_must_have_been_negotiated(play, call, flag, name, args):
    def eom(self):
        getattr(self._ctx, name)(*args)
        return ACCEPT

    missing = CURR_ACTS & ~getattr(milter, flag or "F_NONE")
    ctx = play(eom=eom, opts=[missing, 0x1FFFFF, 0, 0])
    if flag is None:
        assert fed(ctx) == ACCEPT
        return
    with pytest.raises(milter.error, match=f"{call}: {flag} was not negotiated with the MTA"):
        fed(ctx)
    ctx = play(eom=eom, opts=[getattr(milter, flag), 0x1FFFFF, 0, 0])
    assert fed(ctx) == ACCEPT


def test_actions_outside_of_callbacks_are_refused(play):
    ctx = play()
    for name, args in [("getsymval", ("i",)), ("setreply", ("550",))]:
        with pytest.raises(milter.error, match="only allowed while a callback of this connection"):
            getattr(ctx, name)(*args)
    with pytest.raises(milter.error, match="smfi_setsymlist: only allowed in the negotiate"):
        ctx.setsymlist(milter.M_HELO, "i")


def test_the_stage_is_that_of_the_running_callback(play):
    stages = []

    def note(self, *args):
        stages.append(self._ctx._stage)
        return CONTINUE

    names = ["connect", "hello", "envfrom", "envrcpt", "data", "eoh", "body", "eom", "close"]
    ctx = play(session=False, **dict.fromkeys(names, note))
    assert ctx._stage is None
    ctx._connect()
    fed(ctx, b"A: b\n\nc\n")
    assert ctx._stage is None
    ctx._close()
    expected = [
        milter.M_CONNECT,
        milter.M_HELO,
        milter.M_ENVFROM,
        milter.M_ENVRCPT,
        milter.M_DATA,
        milter.M_EOH,
        milter.M_EOH,
        milter.M_EOM,
        milter.M_EOM,
    ]
    assert stages == expected


# What is refused.

LONE = "\ud800"
TEXT_RULES = [
    ("a\0b", "must not hold NUL"),
    (b"a\0b", "must not hold NUL"),
    (LONE, "holds a surrogate that stands for no byte"),
]
LINE_RULES = [*TEXT_RULES, *[(bad, "must not hold CR or LF") for bad in ("a\nb", "a\r", b"\n")]]
NAME_RULES = [
    *TEXT_RULES,
    ("", "must not be empty"),
    *[
        (bad, "must not hold a colon, a space or a control character")
        for bad in ("X:", "a b", "a\tb", "a\n", b"a\r", "a\x7f", ":")
    ],
]
FOLD = "CR and LF are only allowed in a fold, before space or tab"
VALUE_RULES = [
    *TEXT_RULES,
    *[
        (bad, FOLD)
        for bad in ("a\nb", "a\r b", "a\n\n", "a\r\nB: c", b"a\n\r\n b", "a\r", "\r\r\n")
    ],
]
REPLY_LINE_RULES = [
    *LINE_RULES,
    ("x" * 981, "a line must not be longer than 980 bytes"),
    ("ü" * 491, "a line must not be longer than 980 bytes"),
    ("50%", "'%' must be doubled"),
    ("%%%", "'%' must be doubled"),
]
REFUSALS = [
    *[("addheader", "name", rule, (bad, "x"), 0) for bad, rule in NAME_RULES],
    *[("addheader", "value", rule, ("X", bad), 1) for bad, rule in VALUE_RULES],
    *[("chgheader", "name", rule, (bad, 1, "x"), 0) for bad, rule in NAME_RULES],
    *[("chgheader", "value", rule, ("X", 1, bad), 2) for bad, rule in VALUE_RULES],
    ("chgheader", "idx", "must not be negative", ("X", -1, "y"), 1),
    *[("addrcpt", "rcpt", rule, (bad,), 0) for bad, rule in LINE_RULES],
    *[("addrcpt", "params", rule, ("<a@b>", bad), 1) for bad, rule in LINE_RULES],
    *[("delrcpt", "rcpt", rule, (bad,), 0) for bad, rule in LINE_RULES],
    *[("chgfrom", "sender", rule, (bad,), 0) for bad, rule in LINE_RULES],
    *[("chgfrom", "params", rule, ("<a@b>", bad), 1) for bad, rule in LINE_RULES],
    *[("quarantine", "reason", rule, (bad,), 0) for bad, rule in LINE_RULES],
    *[(name, "rcpt", "must not be empty", ("",), 0) for name in ("addrcpt", "delrcpt")],
    ("chgfrom", "sender", "must not be empty", ("",), 0),
    ("quarantine", "reason", "must not be empty", (b"",), 0),
    *[("setreply", "msg", rule, ("550", None, bad), 2) for bad, rule in REPLY_LINE_RULES],
    *[("setreply", "msg", rule, ("550", None, "a", bad), 3) for bad, rule in REPLY_LINE_RULES],
    *[
        ("setreply", "rcode", "must be three digits, the first 4 or 5", (bad,), 0)
        for bad in ("250", "55", "5500", "", "5x0", b"999", "\u066550", "550 ")
    ],
    *[
        ("setreply", "xcode", "must have the form of '5.7.1'", ("550", bad), 1)
        for bad in (
            "",
            "5.7",
            "5.7.1.2",
            "6.1.1",
            "5.7.1000",
            "5..1",
            b"5.7.1 ",
            "5.7.x",
            "5.\u0667.1",
        )
    ],
]


@pytest.mark.parametrize(("call", "argument", "rule", "args", "place"), REFUSALS)
def test_what_could_forge_is_refused(play, call, argument, rule, args, place):
    caught = []

    def eom(self):
        with pytest.raises(milter.InvalidArgument) as error:
            getattr(self._ctx, call)(*args)
        caught.append(error.value)
        return ACCEPT

    ctx = play(eom=eom)
    fed(ctx)
    (error,) = caught
    shown = repr(args[place])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    assert str(error) == f"{call}: {argument}: {rule}: {shown}"
    assert isinstance(error, milter.error)
    assert isinstance(error, ValueError)
    assert ctx._reply is None
    assert (ctx._addrcpt, ctx._delrcpt, ctx._quarantine, ctx._chgfrom) == ([], [], None, [])
    assert not (ctx._headerschanged or ctx._envfromchanged)
    assert ctx._body.getvalue() == MESSAGE


@pytest.mark.parametrize(
    ("call", "args"),
    [
        ("addheader", (1, "x")),
        ("addheader", ("X", None)),
        ("addrcpt", (None,)),
        ("setreply", (550,)),
        ("setreply", ("550", "5.7.1", 3)),
        ("replacebody", (3,)),
        ("replacebody", (None,)),
    ],
)
def test_other_types_are_type_errors(play, call, args):
    def eom(self):
        with pytest.raises(TypeError):
            getattr(self._ctx, call)(*args)
        return ACCEPT

    assert fed(play(eom=eom)) == ACCEPT


def test_a_body_must_be_one_piece_of_memory(play):
    def eom(self):
        with pytest.raises(BufferError):
            self.replacebody(memoryview(b"abcd")[::2])
        return ACCEPT

    ctx = play(eom=eom)
    fed(ctx)
    assert ctx._bodyreplaced is False


def test_a_reply_has_at_most_32_lines(play):
    def eom(self):
        self._ctx.setreply("550", None, *["x"] * 32)
        with pytest.raises(milter.InvalidArgument, match="a reply has at most 32 lines"):
            self._ctx.setreply("550", None, *["x"] * 33)
        return REJECT

    ctx = play(eom=eom)
    fed(ctx)
    assert ctx._reply == ("550", None, *["x"] * 32)


def test_symlists_are_checked(play):
    def negotiate(self, opts):
        for stage in (-1, 7):
            with pytest.raises(milter.InvalidArgument, match="must be one of M_CONNECT to M_EOH"):
                self._ctx.setsymlist(stage, "i")
        with pytest.raises(milter.InvalidArgument, match="must not hold CR or LF"):
            self._ctx.setsymlist(milter.M_HELO, "i\nj")
        return CONTINUE

    assert play(negotiate=negotiate)._symlist == [None] * 7


def test_symlists_must_be_offered(play):
    def negotiate(self, opts):
        with pytest.raises(milter.error, match="the MTA did not offer SETSYMLIST"):
            self._ctx.setsymlist(milter.M_HELO, "i")
        return CONTINUE

    play(negotiate=negotiate, opts=[CURR_ACTS & ~SETSYMLIST, 0x1FFFFF, 0, 0])


# What is recorded.


def test_replies_are_recorded(play):
    seen = []

    def eom(self):
        for args in [("550",), ("550", "5.7.1"), ("451", None, "50%% off", b"caf\xe9")]:
            self.setreply(*args)
            seen.append(self._ctx._reply)
        return TEMPFAIL

    ctx = play(eom=eom)
    fed(ctx)
    assert seen == [("550", None), ("550", "5.7.1"), ("451", None, "50%% off", "caf\udce9")]
    assert ctx._reply == seen[-1]
    ctx._envfrom("<a@b>")
    assert ctx._reply is None


def test_a_reply_waits_for_its_verdict(play):
    def hello(self, hostname):
        self.setreply("550", "5.7.1", "no")
        return CONTINUE

    ctx = play(hello=hello, eom=lambda self: REJECT)
    fed(ctx)
    assert ctx._reply == ("550", "5.7.1", "no")
    fed(ctx)
    assert ctx._reply is None


def test_codes_of_two_classes_pass_with_a_warning(play):
    def eom(self):
        with pytest.warns(RuntimeWarning, match=r"enhanced code 4\.7\.1 is not that of 550"):
            self.setreply("550", "4.7.1", "no")
        return REJECT

    ctx = play(eom=eom)
    fed(ctx)
    assert ctx._reply == ("550", "4.7.1", "no")


@pytest.mark.parametrize(
    ("code", "verdict", "name"), [("451", REJECT, "REJECT"), ("550", TEMPFAIL, "TEMPFAIL")]
)
def test_a_reply_that_libmilter_drops_is_logged(play, caplog, code, verdict, name):
    def eom(self):
        self.setreply(code, None, "text")
        return verdict

    with caplog.at_level(logging.WARNING, "milter"):
        assert fed(play(eom=eom)) == verdict
    (record,) = caplog.records
    assert f"returned {name} after setreply with a {code[0]}xx code" in record.getMessage()


@pytest.mark.parametrize("verdict", [ACCEPT, CONTINUE, DISCARD])
def test_a_reply_without_a_use_is_not(play, caplog, verdict):
    def eom(self):
        self.setreply("550", None, "text")
        return verdict

    fed(play(eom=eom))
    assert caplog.records == []


def test_the_envelope_is_recorded(play):
    def eom(self):
        self.addrcpt("<a@b>")
        self.addrcpt(b"<\xff@b>", ["NOTIFY=NEVER", "X"])
        self.delrcpt("<victim@lamb.com>")
        self.chgfrom("<x@y>", b"RET=HDRS")
        return ACCEPT

    ctx = play(eom=eom)
    fed(ctx)
    assert ctx._addrcpt == [("<a@b>", None), ("<\udcff@b>", "NOTIFY=NEVER X")]
    assert ctx._delrcpt == ["<victim@lamb.com>"]
    assert (ctx._sender, ctx._envfromchanged) == ("<x@y>", True)
    assert ctx._chgfrom == [("<x@y>", "RET=HDRS")]


def test_quarantine_and_progress_are_recorded(play):
    def eom(self):
        self.progress()
        self.progress()
        assert self._ctx._activity > before
        self.quarantine("smells")
        return ACCEPT

    ctx = play(eom=eom)
    before, ctx._activity = -1.0, -1.0
    assert fed(ctx) == ACCEPT
    assert (ctx._quarantine, ctx._progress) == ("smells", 2)


@pytest.mark.parametrize(
    "chunks",
    [
        (b"new\r\n",),
        ("caf\udce9",),
        (bytearray(b"a"), memoryview(b"bcd")[1:]),
        (array.array("I"), array.array("H", [1, 2])),
        (memoryview(b"abcdefgh").cast("I"),),
        (b"",),
        (b"a", "b", b"c"),
    ],
)
def test_a_replaced_body_is_what_all_calls_gave(play, chunks):
    def eom(self):
        for chunk in chunks:
            self.replacebody(chunk)
        return ACCEPT

    ctx = play(eom=eom)
    fed(ctx)
    expected = b"".join(
        chunk.encode("utf-8", "surrogateescape") if isinstance(chunk, str) else bytes(chunk)
        for chunk in chunks
    )
    assert ctx._bodyreplaced is True
    assert ctx._body.getvalue() == MESSAGE.partition(b"\n\n")[0] + b"\n\n" + expected


def test_the_message_can_be_read_parsed(play, monkeypatch):
    def eom(self):
        self.chgheader("Subject", 1, "new")
        assert self._ctx._msg["Subject"] == "new"
        return ACCEPT

    parser = types.SimpleNamespace(message_from_file=email.message_from_binary_file)
    monkeypatch.setitem(sys.modules, "mime", parser)
    ctx = play(eom=eom)
    assert ctx._msg is None
    fed(ctx)
    assert ctx._msg.get_all("x-twice") == ["1", "2"]
    assert ctx._msg.get_payload() == "line one\nline two\n"
    ctx._envfrom("<a@b>")
    assert ctx._msg is None


# Headers.


def edited(play, *edits, message=MESSAGE, **keywords):
    """The headers after some edits at the end of the message."""

    def eom(self):
        for name, *args in edits:
            getattr(self, name)(*args)
        return ACCEPT

    ctx = play(eom=eom, **keywords)
    assert fed(ctx, message) == ACCEPT
    assert ctx._headerschanged is bool(edits)
    head, separator, body = ctx._body.getvalue().partition(b"\n\n")
    assert (separator, body) == (b"\n\n", b"line one\nline two\n")
    return head.decode("utf-8", "surrogateescape").replace("\n\t", "\\").split("\n")


ORIGINAL = ["Received: by mx", "From: a@b", "Subject:  old\\folded", "X-Twice: 1", "x-twice:2"]
ORIGINAL += ["To: c@d"]


def replaced(at, *lines):
    """The original headers with one replaced by some lines."""
    return [*ORIGINAL[:at], *lines, *ORIGINAL[at + 1 :]]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([], ORIGINAL),
        ([("addheader", "X-New", "v")], [*ORIGINAL, "X-New: v"]),
        ([("addheader", "X-New", "v\n\tw")], [*ORIGINAL, "X-New: v\\w"]),
        ([("addheader", "X-New", "v\r\n\tw\r\n")], [*ORIGINAL, "X-New: v\\w"]),
        ([("addheader", "X-New", b"\xff\n")], [*ORIGINAL, "X-New: \udcff"]),
        ([("addheader", "X-New", "")], [*ORIGINAL, "X-New: "]),
        ([("addheader", "X-New", "v", 0)], ["X-New: v", *ORIGINAL]),
        ([("addheader", "X-New", "v", 2)], [*ORIGINAL[:2], "X-New: v", *ORIGINAL[2:]]),
        ([("addheader", "X-New", "v", 99)], [*ORIGINAL, "X-New: v"]),
        ([("addheader", "X-New", "v", -2)], [*ORIGINAL, "X-New: v"]),
        ([("chgheader", "subject", 1, "new")], replaced(2, "subject: new")),
        ([("chgheader", "Subject", 0, "new")], replaced(2, "Subject: new")),
        ([("chgheader", "X-TWICE", 2, "new")], replaced(4, "X-TWICE: new")),
        ([("chgheader", "X-Twice", 1, None)], replaced(3)),
        ([("chgheader", "X-Twice", 0, "")], replaced(3)),
        ([("chgheader", "X-Twice", 2, "\n")], replaced(4)),
        ([("chgheader", "X-Twice", 3, "new")], [*ORIGINAL, "X-Twice: new"]),
        ([("chgheader", "X-Twice", 3, None)], ORIGINAL),
        ([("chgheader", "X-None", 1, "")], ORIGINAL),
        (
            [("chgheader", "X-Twice", 2, None), ("chgheader", "X-Twice", 1, None)],
            [*ORIGINAL[:3], *ORIGINAL[5:]],
        ),
        # After a delete the later ones move up: the second of two is the first now.
        (
            [("chgheader", "X-Twice", 1, None), ("chgheader", "X-Twice", 1, "new")],
            [*ORIGINAL[:3], "X-Twice: new", ORIGINAL[5]],
        ),
        (
            [("addheader", "X-Twice", "0", 0), ("chgheader", "X-Twice", 1, "new")],
            ["X-Twice: new", *ORIGINAL],
        ),
    ],
)
def test_header_edits(play, edits, expected):
    assert edited(play, *edits) == expected


def test_with_leading_space_values_are_exact(play):
    got = edited(
        play,
        ("addheader", "X-A", "v"),
        ("addheader", "X-B", "  v", 0),
        ("chgheader", "To", 1, "\tz"),
        bases=(Milter.header_leading_space(type("Exact", (Milter.Base,), {})),),
    )
    assert got == ["X-B:  v", *replaced(5, "To:\tz"), "X-A:v"]


@pytest.mark.parametrize(
    ("leading_space", "expected"),
    [
        (False, ["by mx", "a@b", " old\n\tfolded", "1", "2", "c@d"]),
        (True, [" by mx", " a@b", "  old\n\tfolded", " 1", "2", " c@d"]),
    ],
)
def test_the_filter_sees_values_as_negotiated(play, leading_space, expected):
    klass = type("Sees", (Logger,), {})
    if leading_space:
        Milter.header_leading_space(klass)
    for message in (MESSAGE, MESSAGE.replace(b"\n", b"\r\n")):
        ctx = play((klass,))
        fed(ctx, message)
        seen = [args[1] for name, *args in ctx.getpriv().seen if name == "header"]
        assert seen == expected
        assert ctx._body.getvalue() == message
    assert bool(ctx.protocol & P_HDR_LEADSPC) is leading_space


def test_a_header_fed_by_itself_is_stored_as_the_filter_saw_it(play):
    for klass in (Logger, Milter.header_leading_space(type("Sees", (Logger,), {}))):
        ctx = play((klass,))
        ctx._envfrom("<a@b>")
        ctx._header("X", " y\n z")
        ctx._eoh()
        ctx._eom()
        assert ("header", "X", " y\n z") in ctx.getpriv().seen
        space = b"" if ctx.protocol & P_HDR_LEADSPC else b" "
        assert ctx._body.getvalue() == b"X:" + space + b" y\n z\n\n"


def test_new_headers_take_the_line_end_of_the_message(play):
    def eom(self):
        self.addheader("X", "a\n b")
        self.chgheader("From", 1, "x\r\n y")
        return ACCEPT

    ctx = play(eom=eom)
    fed(ctx, MESSAGE.replace(b"\n", b"\r\n"))
    lines = ctx._body.getvalue().split(b"\r\n")
    assert b"\n" not in b"".join(lines)
    assert lines[1:3] == [b"From: x", b" y"]
    assert lines[lines.index(b"") - 2 : lines.index(b"")] == [b"X: a", b" b"]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\n",
        b"\r\n\r\n",
        b"A: b\n",
        b"A: b",
        b"A: b\r\n\nmixed\r\n",
        b"A: b\n \n\tc\n\n\nbody",
        b"A:b\n\r\nbody\n",
        b"A : b\r\r\n\r\nbody\r",
        b"no header at all\n",
        b": no name\n",
        b" folded from nothing\n\n",
        b"\xff\x00: \xff\x00\n\n\xff\x00",
    ],
)
def test_what_is_not_changed_stays_byte_for_byte(play, message):
    ctx = play((Logger,))
    assert fed(ctx, message) == CONTINUE
    assert ctx._body.getvalue() == message


def test_random_messages_stay_byte_for_byte(play):
    generator = random.Random(20240229)
    pieces = [b"A: b", b"C:", b" fold", b"\tfold", b"\n", b"\n", b"\r\n", b"\r", b"\xff", b": x"]
    ctx = play((Logger,))
    for _ in range(500):
        count = generator.randrange(12)
        # The empty line between: an MTA puts one in where it is missing.
        message = b"H: 1\n" + b"".join(generator.choices(pieces, k=count)) + b"\n\nbody"
        fed(ctx, message)
        fields = [args for name, *args in ctx.getpriv().seen if name == "header"]
        body = b"".join(args[0] for name, *args in ctx.getpriv().seen if name == "body")
        if b"\n\n" + body in message or b"\n\r\n" + body in message:
            assert ctx._body.getvalue() == message
        else:
            assert ctx._body.getvalue().endswith(b"\n" + body)
        assert fields[0] == ["H", "1"] or fields[0][1].startswith("1")
        ctx.getpriv().seen.clear()


def test_a_missing_empty_line_is_put_in(play):
    ctx = play((Logger,))
    fed(ctx, b"A: b\nno header\n")
    assert [call for call in ctx.getpriv().seen if call[0] in ("header", "body")] == [
        ("header", "A", "b"),
        ("body", b"no header\n"),
    ]
    assert ctx._body.getvalue() == b"A: b\n\nno header\n"


def test_a_header_can_follow_one_without_a_line_end(play):
    ctx = play(eom=lambda self: self.addheader("X", "y") or ACCEPT)
    fed(ctx, b"A: b")
    assert ctx._body.getvalue() == b"A: b\nX: y\n"


def test_the_line_of_a_mailbox_file_is_no_part_of_the_message(play):
    ctx = play((Logger,))
    fed(ctx, b"From a@b Mon Jan  1 00:00:00 2024\n" + MESSAGE)
    assert ctx._body.getvalue() == MESSAGE


# Macros.


def macros_seen(play, names, lists, opts=None):
    """For each step, the macros that getsymval knows there."""
    seen = {}

    def looking(step):
        def callback(self, *args):
            seen[step] = [name for name in names if self.getsymval(name) is not None]
            return CONTINUE

        callback.__name__ = step
        return Milter.symlist(*lists[step])(callback) if step in lists else callback

    steps = ["connect", "hello", "envfrom", "envrcpt", "data", "header", "eoh", "body", "eom"]
    ctx = play(session=False, opts=opts, **{step: looking(step) for step in steps})
    for name in names:
        ctx._setsymval(name, f"value of {name}")
    ctx._connect()
    fed(ctx, b"A: b\n\nc\n")
    return seen


def test_without_lists_every_macro_is_seen(play):
    seen = macros_seen(play, ["i", "{auth_authen}", "{own}"], {})
    assert set(map(tuple, seen.values())) == {("i", "{auth_authen}", "{own}")}


def test_a_list_hides_the_other_macros_at_its_stage(play):
    names = ["j", "i", "{auth_authen}", "{rcpt_addr}", "{own}"]
    seen = macros_seen(play, names, {"envfrom": ["{auth_authen}"], "eoh": ["{own}"]})
    assert seen["connect"] == seen["hello"] == seen["envrcpt"] == seen["data"] == names
    # What came with the connection is still there; i comes with MAIL and was not asked for.
    assert seen["envfrom"] == ["j", "{auth_authen}"]
    assert seen["header"] == names
    assert seen["eoh"] == seen["body"] == ["j", "{auth_authen}", "{rcpt_addr}", "{own}"]
    assert seen["eom"] == names


def test_an_empty_list_asks_for_no_macros(play):
    seen = macros_seen(play, ["j", "{own}"], {"connect": [], "hello": []})
    assert seen["connect"] == seen["hello"] == []
    assert seen["envfrom"] == ["j", "{own}"]


def test_lists_do_nothing_where_they_were_not_offered(play):
    opts = [CURR_ACTS & ~SETSYMLIST, 0x1FFFFF, 0, 0]
    seen = macros_seen(play, ["{own}"], {"connect": ["i"]}, opts)
    assert seen["connect"] == ["{own}"]


def test_lists_for_a_stage_are_merged(play):
    def negotiate(self, opts):
        self.setsymlist(milter.M_HELO, "i", "{a}")
        verdict = Milter.Base.negotiate(self, opts)
        self._ctx.setsymlist(milter.M_HELO, b"{b} i")
        return verdict

    @Milter.symlist("{c}", "{a}")
    def hello(self, hostname):
        return CONTINUE

    ctx = play(negotiate=negotiate, hello=hello)
    assert ctx._symlist[milter.M_HELO] == "i {a} {c} {b}"
    assert [entry for entry in ctx._symlist if entry is not None] == ["i {a} {c} {b}"]
    ctx._connect()
    assert ctx._symlist[milter.M_HELO] == "i {a} {c} {b}"


def test_braces_around_one_letter_do_not_count(play):
    values = []

    @Milter.symlist("{i}", "j")
    def hello(self, hostname):
        values.extend(map(self.getsymval, ["i", "{i}", "j", "{j}", "{long}", "long", "x"]))
        values.append(self._ctx.getsymval(b"i"))
        return CONTINUE

    ctx = play(session=False, hello=hello)
    ctx._setsymval("i", "queue")
    ctx._setsymval("{j}", "host")
    ctx._setsymval("{long}", "hidden")
    ctx._connect()
    assert values == ["queue", "queue", "host", "host", None, None, None, "queue"]
    assert ctx._macros == {"i": "queue", "{j}": "host", "{long}": "hidden"}
    ctx._setsymval("i", None)
    ctx._setsymval("nothing", None)
    assert ctx._macros == {"{j}": "host", "{long}": "hidden"}


def test_a_macro_that_the_mta_does_not_define_is_none(play):
    values = []

    def hello(self, hostname):
        values.append(self.getsymval("{nothing}"))
        with pytest.raises(milter.InvalidArgument, match="getsymval: name: must not hold NUL"):
            self.getsymval("i\0")
        return CONTINUE

    play(hello=hello)
    assert values == [None]


def test_no_macro_has_come_at_negotiation(play):
    values = []

    def negotiate(self, opts):
        values.append(self.getsymval("j"))
        return Milter.Base.negotiate(self, opts)

    ctx = play(session=False, negotiate=negotiate)
    ctx._setsymval("j", "mx")
    ctx._connect()
    assert values == [None]


# Files.


def test_no_file_is_written_unless_a_line_is_logged(play, tmp_path):
    ctx = play((Milter.Milter,), eom=lambda self: self.addheader("X", "y") or ACCEPT)
    assert fed(ctx) == ACCEPT
    ctx._close()
    assert list(tmp_path.iterdir()) == []


def test_logged_lines_are_appended(play, tmp_path):
    ctx = play()
    ctx._log("one", 1, "\ud800")
    ctx._close()
    ctx._log("two")
    ctx._close()
    assert (tmp_path / "test" / "milter.log").read_text() == "one 1 \\ud800\ntwo\n"
    again = testctx.TestCtx(tmp_path / "other")
    again._log()
    again._logfp.flush()
    assert (tmp_path / "other").read_text() == "\n"
    again._logfp.close()


def test_flushing_opens_no_file(tmp_path):
    log = testctx.LazyLog(str(tmp_path / "log"))
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


# The mixin.


@pytest.fixture
def mixed(monkeypatch, tmp_path):
    """Make a filter with TestBase mixed in."""
    monkeypatch.chdir(tmp_path)

    def mixed(base=Logger, **callbacks):
        def __init__(self):
            milter_test.TestBase.__init__(self)
            base.__init__(self)

        names = {**callbacks, "__init__": __init__}
        return type("Mixed", (milter_test.TestBase, base), names)()

    return mixed


def test_the_mixin_plays_a_session(mixed):
    filter_object = mixed(eom=lambda self: self.addheader("X", "y") or ACCEPT)
    assert filter_object.connect("host", "helo", "2001:db8::1") == CONTINUE
    assert filter_object.feedFile(io.BytesIO(MESSAGE), "s@x", "r@y", "r@z") == ACCEPT
    names = [name for name, *_ in filter_object.seen]
    assert names[:5] == ["connect", "hello", "envfrom", "envrcpt", "envrcpt"]
    assert filter_object.seen[0][3] == ("2001:db8::1", 1234, 0, 0)
    assert filter_object._headerschanged is True
    assert filter_object._body.getvalue().startswith(MESSAGE.partition(b"\n\n")[0] + b"\nX: y\n")
    assert filter_object._actions == CURR_ACTS
    assert filter_object._protocol == filter_object._opts[1] == P_SKIP


def test_the_mixin_leaves_the_factory_alone(mixed, monkeypatch):
    monkeypatch.setattr(Milter, "factory", None)
    filter_object = mixed()
    assert filter_object.connect() == CONTINUE
    assert filter_object.connect() == CONTINUE
    names = [call[0] for call in filter_object.seen]
    assert names == ["connect", "hello", "close", "connect", "hello"]


def test_the_mixin_passes_the_verdict_of_connect_on(mixed):
    class Refuses(Logger):
        def connect(self, hostname, family, hostaddr):
            super().connect(hostname, family, hostaddr)
            return TEMPFAIL

    filter_object = mixed(Refuses)
    for _ in range(2):
        assert filter_object.connect(ip=None) == TEMPFAIL
    assert filter_object.seen[0] == ("connect", "localhost", 0, None)


@pytest.mark.parametrize("base", [Milter.Base, Milter.Milter, Logger])
def test_the_mixin_negotiates_what_the_filter_wants(mixed, base):
    klass = base if base is not Logger else type("Plain", (Logger,), {})
    filter_object = mixed(klass)
    assert filter_object.connect() == CONTINUE
    assert filter_object._protocol == 0x1FFFFF & ~klass.protocol_mask()


def test_the_mixin_records_what_the_context_does(mixed):
    def eom(self):
        self.setreply("550", "5.7.1", "no")
        self.chgfrom("<x@y>")
        self.addrcpt("<a@b>")
        self.addrcpt("<c@d>", "X")
        self.delrcpt("<e@f>")
        self.replacebody(chunk="new")
        self.quarantine("odd")
        self.chgheader("To", 1, None)
        self.progress()
        assert self._stage == milter.M_EOM
        return REJECT

    @Milter.symlist("i")
    def hello(self, hostname):
        return CONTINUE

    filter_object = mixed(Milter.Base, eom=eom, hello=hello)
    assert filter_object._sender is None
    filter_object.setsymval("i", "X")
    filter_object.connect()
    assert filter_object.feedFile(io.BytesIO(MESSAGE)) == REJECT
    assert filter_object._reply == ("550", "5.7.1", "no")
    assert (filter_object._sender, filter_object._envfromchanged) == ("<x@y>", True)
    assert filter_object._addrcpt == [("<a@b>", None), ("<c@d>", "X")]
    assert filter_object._delrcpt == ["<e@f>"]
    assert (filter_object._bodyreplaced, filter_object._headerschanged) == (True, True)
    assert filter_object._quarantine == "odd"
    assert filter_object._macros == {"i": "X"}
    assert filter_object._symlist[milter.M_HELO] == "i"
    assert filter_object._stage is None
    assert b"To:" not in filter_object._body.getvalue()
    filter_object._reply = None
    assert filter_object._standin._reply is None


def test_the_mixin_keeps_to_the_rules(mixed):
    filter_object = mixed()
    filter_object.connect()
    with pytest.raises(milter.error, match="only allowed in the eom callback"):
        filter_object.addheader("X", "y")
    with pytest.raises(milter.error, match="only allowed in the negotiate callback"):
        filter_object.setsymlist(milter.M_HELO, "i", "j")
    filter_object._actions = 0
    with pytest.raises(Milter.DisabledAction, match="QUARANTINE"):
        filter_object.quarantine("odd")


def test_methods_of_a_mixed_filter_can_be_called_directly(mixed):
    filter_object = mixed()
    filter_object.setsymval("i", "X")
    assert filter_object.getsymval(name="i") == "X"
    filter_object.setreply("550", "5.7.1", "no")
    assert filter_object._reply == ("550", "5.7.1", "no")
    filter_object._standin._close()
    with pytest.raises(milter.error, match="bad context"):
        filter_object._standin.getsymval("i")


def test_the_mixin_feeds_files_of_the_test_directory(mixed, tmp_path):
    filter_object = mixed()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "sample").write_bytes(MESSAGE)
    filter_object.connect()
    assert filter_object.feedMsg("sample", "s@x", "r@y") == CONTINUE
    assert ("envrcpt", "<r@y>") in filter_object.seen
    assert filter_object._body.getvalue() == MESSAGE


def test_the_mixin_logs_to_its_file(mixed, tmp_path):
    filter_object = mixed(Milter.Milter)
    assert list(tmp_path.iterdir()) == []
    filter_object.connect("host", "helo", None)
    print("by hand", file=filter_object.logfp)
    filter_object._close()
    assert filter_object.logfp is None
    filter_object.log("gone")
    filter_object._close()
    lines = (tmp_path / "test" / "milter.log").read_text().splitlines()
    assert lines == ["connect from host at unknown", "hello from helo", "by hand"]


def test_pytest_does_not_collect_the_stand_ins():
    assert testctx.TestCtx.__test__ is False
    assert milter_test.TestBase.__test__ is False


@pytest.mark.parametrize("take_apart", [testctx._split_message, Message.parse])
def test_folds_without_end_cost_linear_time(take_apart):
    """Mail that a filter choked on is what both are used for."""

    def seconds(folds):
        data = b"A: b\n" + b" a fold of some length\n" * folds + b"\nbody"
        start = time.thread_time()
        take_apart(data)
        return time.thread_time() - start

    # Four times the folds; sixteen times the time, were it quadratic.
    assert any(seconds(160_000) / max(seconds(40_000), 1e-5) < 8 for _ in range(4))
