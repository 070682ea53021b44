"""The stand-in for the context, and the mixin on top of it."""

from __future__ import annotations

import email
import io
import random
import socket
import time
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
    P_NOBODY,
    P_NR_HDR,
    P_SKIP,
    QUARANTINE,
    REJECT,
    SETSYMLIST,
    SKIP,
    TEMPFAIL,
)
from support.stand_in import MESSAGE, Logger, fed

import Milter
from Milter import test as milter_test
from Milter import testctx
from Milter._testctx.message import split_message
from Milter.mta import Message

# The session.


def test_a_whole_session_reaches_the_filter_in_order(play):
    ctx = play((Logger,))
    seen = ctx.getpriv().seen
    assert fed(ctx, b"A: b\nC:d\n\nbody\n", "s@x", "r@y", "<r@z>") == CONTINUE
    assert ctx._unknown("XYZZY") == CONTINUE
    assert ctx._close() is None
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
        ctx.addheader("A", "b")


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
    assert ctx._abort(close=False) is None
    assert ctx._close() is None


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
    ctx._abort(close=False)
    assert aborts() == 0
    ctx._envfrom("<a@b>")
    ctx._abort(close=False)
    ctx._abort(close=False)
    assert aborts() == 1
    fed(ctx)
    ctx._abort(close=False)
    assert aborts() == 1
    ctx.getpriv().verdicts = {"envrcpt": REJECT}
    assert fed(ctx) == REJECT
    ctx._abort(close=False)
    assert aborts() == 2
    for step in ("data", "header", "envfrom"):
        ctx.getpriv().verdicts = {step: TEMPFAIL}
        assert fed(ctx) == TEMPFAIL
        ctx._abort(close=False)
        assert aborts() == 2
    ctx.getpriv().verdicts = {"envrcpt": ACCEPT}
    fed(ctx)
    ctx._abort(close=False)
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
    assert ctx.getpriv() is filter_object  # for the test
    assert ctx._body.getvalue() == MESSAGE  # the records stay
    assert ctx._connect() == CONTINUE


def test_close_closes_also_when_the_filter_raises(play):
    def close(self):
        raise ZeroDivisionError

    ctx = play(close=close)
    with pytest.raises(ZeroDivisionError):
        ctx._close()
    with pytest.raises(milter.error, match="bad context"):
        ctx.setpriv(None)
    assert ctx.getpriv()._ctx is None


def test_private_data(play):
    ctx = play(session=False)
    assert ctx.getpriv() is None
    assert ctx.setpriv("a") is None
    assert ctx.setpriv("b") == "a"
    assert ctx.getpriv() == "b"


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
    assert filter_object._addrcpt == ["<a@b>", "<c@d>"]
    assert filter_object._standin._addrcpt == [("<a@b>", None), ("<c@d>", "X")]
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


@pytest.mark.parametrize("take_apart", [split_message, Message.parse])
def test_folds_without_end_cost_linear_time(take_apart):
    """Mail that a filter choked on is what both are used for."""

    def seconds(folds):
        data = b"A: b\n" + b" a fold of some length\n" * folds + b"\nbody"
        start = time.thread_time()
        take_apart(data)
        return time.thread_time() - start

    # Four times the folds; sixteen times the time, were it quadratic.
    assert any(seconds(160_000) / max(seconds(40_000), 1e-5) < 8 for _ in range(4))


# As tests that were written for pymilter have it.


STAND_INS = ["a context", "mixed in"]


@pytest.fixture(params=STAND_INS)
def by_hand(request, play, mixed):
    """A filter and where its records are, for tests that call its methods by themselves."""

    def by_hand(base=Milter.Base, **callbacks):
        if request.param == "mixed in":
            filter_object = mixed(base, **callbacks)
            filter_object.connect()
            return filter_object, filter_object
        ctx = play((base,), **callbacks)
        return ctx.getpriv(), ctx

    return by_hand


def test_an_abort_is_followed_by_a_close(play):
    ctx = play((Logger,))
    filter_object = ctx.getpriv()
    ctx._envfrom("<a@b>")
    assert ctx._abort() is None
    assert filter_object.seen[-2:] == [("abort",), ("close",)]
    assert filter_object._ctx is None
    assert ctx.getpriv() is filter_object
    ctx._abort()
    ctx._close()
    assert filter_object.seen[-2:] == [("abort",), ("close",)]


@pytest.mark.parametrize("silent", [["connect"], ["hello"], ["connect", "hello"]])
def test_a_connection_without_a_reply_goes_on(play, silent):
    """Tests compare with NOREPLY or with CONTINUE, which were the same under Milter.test."""
    seen = []

    def callback(name):
        def noted(self, *args):
            seen.append(name)
            return CONTINUE

        noted.__name__ = name
        return Milter.noreply(noted) if name in silent else noted

    both = {name: callback(name) for name in ("connect", "hello")}
    verdict = play(session=False, **both)._connect()
    assert seen == ["connect", "hello"]
    assert verdict == NOREPLY == Milter.NOREPLY
    assert verdict == CONTINUE
    assert [verdict != other for other in (CONTINUE, NOREPLY, REJECT)] == [False, False, True]
    assert verdict not in (REJECT, ACCEPT, TEMPFAIL, None, "7")
    assert isinstance(verdict, int) and hash(verdict) == hash(NOREPLY)


def test_a_connection_with_replies_is_continue_alone(play):
    verdict = play(session=False, connect=lambda *args: CONTINUE)._connect()
    assert (verdict == CONTINUE, verdict == NOREPLY) == (True, False)
    verdict = play((Milter.Milter,), session=False, hello=lambda *args: REJECT)._connect()
    assert (verdict == REJECT, verdict == NOREPLY) == (True, False)
    offered = [CURR_ACTS, 0, 0, 0]
    verdict = play((Milter.Milter,), session=False, opts=offered)._connect()
    assert (verdict == CONTINUE, verdict == NOREPLY) == (True, False)


def test_an_assigned_message_is_what_actions_change(by_hand):
    def eom(self):
        self.addheader("X-New", "caf\u00e9")
        self.addheader("X-Top", "a\n b", 0)
        self.chgheader("x-two", 2, "second")
        self.chgheader("X-TWO", 1, None)
        self.chgheader("X-Other", 1, "o")
        self.chgheader("X-Gone", 3, "")
        self.replacebody(b"new ")
        self.replacebody("body")
        self.addrcpt("<a@b>")
        self.setreply("550", "5.7.1", "no")
        return REJECT

    filter_object, records = by_hand(eom=eom)
    message = email.message_from_string("X-Two: 1\nX-Two: 2\nX-Gone: x\n\nold\n")
    records._msg = message
    records._body = io.BytesIO(b"something longer than it")
    assert filter_object.eom() == REJECT
    assert records._msg is message
    assert message.items() == [
        ("X-Top", "a\n b"),
        ("x-two", "second"),
        ("X-Gone", "x"),
        ("X-New", "caf\u00e9"),
        ("X-Other", "o"),
    ]
    assert records._body.getvalue() == b"new body"
    assert (records._headerschanged, records._bodyreplaced) == (True, True)
    assert [one if isinstance(one, str) else one[0] for one in records._addrcpt] == ["<a@b>"]
    assert records._reply == ("550", "5.7.1", "no")


def test_an_assigned_message_is_forgotten_at_the_next_one(by_hand):
    filter_object, records = by_hand()
    records._msg = email.message_from_string("A: b\n\n")
    records._body = io.BytesIO()
    feed = getattr(records, "feedFile", None) or records._feedFile
    feed(io.BytesIO(MESSAGE))
    assert records._msg.as_bytes() == MESSAGE
    assert records._body.getvalue() == MESSAGE
    with pytest.raises(milter.error, match="only allowed in the eom callback"):
        filter_object.addheader("A", "b")
    records._msg = records._body = None
    assert (records._msg, records._body) == (None, None)


def test_an_assigned_message_comes_out_of_eom(play):
    ctx = play(eom=lambda self: self.addheader("X", "y") or self.replacebody("new\n") or ACCEPT)
    for text in ("A: b\n\nold\n", "A: b\n\n"):
        ctx._msg = email.message_from_string(text)
        assert ctx._eom() == ACCEPT
        assert ctx._body.getvalue() == b"A: b\nX: y\n\nnew\n"


@pytest.mark.parametrize("stage", range(7))
def test_an_assigned_stage_is_where_methods_are_called(by_hand, stage):
    filter_object, records = by_hand()
    define = getattr(records, "setsymval", None) or records._setsymval
    define("{rcpt_addr}", "bob")
    records._symlist = [None] * 7
    records._symlist[stage] = "{rcpt_addr}" if stage == milter.M_HELO else "i"
    records._stage = stage
    assert records._stage == stage
    later = stage in (milter.M_DATA, milter.M_EOH, milter.M_EOM)
    expected = "bob" if later or stage == milter.M_HELO else None
    assert filter_object.getsymval("{rcpt_addr}") == expected
    if stage == milter.M_EOM:
        filter_object.addheader("A", "b")
    else:
        with pytest.raises(milter.error, match="only allowed in the eom callback"):
            filter_object.addheader("A", "b")
    records._stage = None
    assert records._stage is None


def test_a_stage_that_is_none_is_refused(play):
    with pytest.raises(ValueError, match=r"_stage: 7 is none of M_CONNECT to M_EOH"):
        play()._stage = 7


def test_the_protocol_can_be_assigned(play):
    ctx = play((Milter.Milter,))
    ctx._protocol = 0
    assert (ctx.protocol, ctx.actions) == (0, CURR_ACTS)
    assert ctx._opts[1] & P_NR_HDR


@pytest.mark.parametrize("step", ["eom", "envfrom"])
def test_the_mixin_calls_close_after_eom(mixed, step):
    filter_object = mixed()
    filter_object.connect()
    filter_object.verdicts = {step: REJECT}
    assert filter_object.feedFile(io.BytesIO(MESSAGE)) == REJECT
    assert [name for name, *_ in filter_object.seen][-1] == {"eom": "close"}.get(step, step)
    filter_object.verdicts = {}
    assert filter_object.feedFile(io.BytesIO(MESSAGE)) == CONTINUE
    assert filter_object.seen[-2:] == [("eom",), ("close",)]


def test_recipients_of_the_mixin_can_be_assigned(mixed):
    filter_object = mixed()
    filter_object._addrcpt = ["<a@b>"]
    assert filter_object._addrcpt == ["<a@b>"]


def test_what_moved_out_is_found_as_before():
    names = ["CHUNK_SIZE", "CLIENT_PORT", "LazyLog", "TestCtx", "Text"]
    assert [name for name in names if not hasattr(testctx, name)] == []
    assert {testctx.LazyLog.__module__, testctx.TestCtx.__module__} == {"Milter.testctx"}
