"""The filter's base classes: decoding, negotiation, actions, logging."""

from __future__ import annotations

import inspect
import io
import logging
import subprocess
import sys

import milter
import pytest
from milter import (
    ALL_OPTS,
    CONTINUE,
    CURR_ACTS,
    NOREPLY,
    P_HDR_LEADSPC,
    P_NOBODY,
    P_NOHDRS,
    P_NOMAIL,
    P_NR_HDR,
    P_RCPT_REJ,
    P_SKIP,
    REJECT,
    SETSYMLIST,
)

import Milter

ALL_STEPS = 0x1FFFFF
NO_CALLBACK = sum(no_callback for _, no_callback in Milter.OPTIONAL_CALLBACKS.values())


class Recorder:
    """A context that notes each call and refuses none."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **keywords):
            assert not keywords
            self.calls.append((name, *args))
            return f"result of {name}"

        return call


def attached(klass=Milter.Base):
    """A filter object with a recording context, and that."""
    ctx = Recorder()
    filter_object = klass()
    filter_object._setctx(ctx)
    assert ctx.calls == [("setpriv", filter_object)]
    ctx.calls.clear()
    return filter_object, ctx


# Callbacks.


def test_every_callback_of_base_is_harmless():
    base = Milter.Base()
    assert base.connect("host", 0, None) == CONTINUE
    assert base.hello("host") == CONTINUE
    assert base.envfrom("<a@b>", "SIZE=1") == CONTINUE
    assert base.envrcpt("<a@b>", "NOTIFY=NEVER") == CONTINUE
    assert base.envfrom_bytes(b"<a@b>", b"\xff") == CONTINUE
    assert base.envrcpt_bytes(b"<a@b>", b"\xff") == CONTINUE
    assert base.data() == CONTINUE
    assert base.header("a", "b") == CONTINUE
    assert base.header_bytes("a", b"\xff") == CONTINUE
    assert base.eoh() == CONTINUE
    assert base.body(b"") == CONTINUE
    assert base.unknown("XYZZY") == CONTINUE
    assert base.eom() == CONTINUE
    assert base.abort() == CONTINUE
    assert base.close() == CONTINUE
    assert base.log("nothing") is None


def test_a_filter_needs_no_init():
    class Own(Milter.Base):
        def __init__(self):
            pass

    own = Own()
    assert (own._ctx, own._actions, own._protocol) == (None, CURR_ACTS, 0)


class Echo(Milter.Base):
    """Callbacks that return what they got."""

    def envfrom(self, *args):
        return args

    def envrcpt(self, *args):
        return args

    def header(self, field, value):
        return field, value


STRATEGIES = [
    (None, "caf\udce9", "café"),
    ("surrogateescape", "caf\udce9", "café"),
    ("bytes", b"caf\xe9", "café".encode()),
    ("strict", b"caf\xe9", "café"),
    ("ignore", "caf", "café"),
    ("replace", "caf\ufffd", "café"),
    ("backslashreplace", "caf\\xe9", "café"),
]


@pytest.mark.parametrize(("strategy", "of_latin1", "of_utf8"), STRATEGIES)
def test_decoding_strategies(strategy, of_latin1, of_utf8):
    mark = (lambda method: method) if strategy is None else Milter.decode(strategy)

    class Decoding(Echo):
        @mark
        def header(self, field, value):
            return value

        @mark
        def envfrom(self, f, *params):
            return [f, *params]

        @mark
        def envrcpt(self, to, *params):
            return [to, *params]

    decoding = Decoding()
    for _ in range(2):  # what it remembers of the first call is right for the second
        assert decoding.header_bytes("X", b"caf\xe9") == of_latin1
        assert decoding.header_bytes("X", "café".encode()) == of_utf8
        for callback in (decoding.envfrom_bytes, decoding.envrcpt_bytes):
            assert callback("café".encode()) == [of_utf8]
            assert callback(b"caf\xe9") == [of_latin1]


@pytest.mark.parametrize("name", ["envfrom", "envrcpt"])
def test_strict_keeps_all_values_of_an_envelope_as_bytes_if_one_is_none(name):
    strict = type("Strict", (Echo,), {name: Milter.decode("strict")(vars(Echo)[name])})
    callback = getattr(strict(), f"{name}_bytes")
    assert callback(b"<a@b>", b"X=\xff", b"SIZE=1") == (b"<a@b>", b"X=\xff", b"SIZE=1")
    assert callback(b"<a@b>", b"SIZE=1") == ("<a@b>", "SIZE=1")


def test_what_was_decoded_can_be_given_back():
    every_byte = bytes(range(1, 256))
    _, value = Echo().header_bytes("X", every_byte)
    assert value.encode("utf-8", "surrogateescape") == every_byte


def test_bytes_pass_through_where_the_method_is_assigned_or_overridden():
    class Overridden(Echo):
        def header_bytes(self, fld, val):
            return val

    echo = Echo()
    echo.header_bytes = echo.header
    assert echo.header_bytes("X", b"\xff") == ("X", b"\xff")
    assert Overridden().header_bytes("X", b"\xff") == b"\xff"


def test_a_subclass_decodes_as_its_own_method_says():
    class Parent(Echo):
        @Milter.decode("bytes")
        def header(self, field, value):
            return value

    class Child(Parent):
        def header(self, field, value):
            return value

    class Heir(Parent):
        pass

    assert Heir().header_bytes("X", b"y") == b"y"
    assert Child().header_bytes("X", b"y") == "y"


def test_a_method_that_was_replaced_between_connections_decodes_as_it_says():
    filter_object, ctx = attached(Echo)
    assert filter_object.header_bytes("X", b"y") == ("X", "y")
    filter_object.header = Milter.decode("bytes")(lambda field, value: value)
    filter_object._setctx(ctx)
    assert filter_object.header_bytes("X", b"y") == b"y"


# Steps.


def test_base_wants_no_optional_callback():
    assert ALL_STEPS & ~Milter.Base.protocol_mask() == NO_CALLBACK | P_SKIP


def test_the_logging_class_waits_for_nothing_it_logs():
    wanted = ALL_STEPS & ~Milter.Milter.protocol_mask()
    silent = ["connect", "hello", "envfrom", "envrcpt", "header", "eoh"]
    expected = P_SKIP | sum(Milter.OPTIONAL_CALLBACKS[name][0] for name in silent)
    expected |= sum(Milter.OPTIONAL_CALLBACKS[name][1] for name in ("data", "body", "unknown"))
    assert wanted == expected


def test_each_class_has_a_mask_of_its_own():
    class Parent(Milter.Base):
        def header(self, field, value):
            return CONTINUE

    class Child(Parent):
        def body(self, blk):
            return CONTINUE

    parent = Parent.protocol_mask()
    assert vars(Parent)["_protocol_mask"] == parent
    assert "_protocol_mask" not in vars(Child)
    assert Child.protocol_mask() == parent | P_NOBODY
    assert Parent.protocol_mask() == parent


def test_the_mask_is_worked_out_once():
    class Filter(Milter.Base):
        pass

    Filter.protocol_mask()
    Filter._protocol_mask = 0x123
    assert Filter.protocol_mask() == 0x123
    assert Filter().protocol_mask() == 0x123


def test_mixins_turn_callbacks_on():
    class ScansBody:
        def body(self, blk):
            return CONTINUE

    class Mixed(ScansBody, Milter.Base):
        pass

    class Shadowed(Milter.Base, ScansBody):
        pass

    assert Mixed.protocol_mask() & P_NOBODY
    assert not Shadowed.protocol_mask() & P_NOBODY


def test_overriding_the_form_that_gets_bytes_turns_the_callback_on():
    class Raw(Milter.Base):
        def header_bytes(self, fld, val):
            return CONTINUE

        @Milter.noreply
        def envfrom_bytes(self, *b):
            return CONTINUE

    wanted = ALL_STEPS & ~Raw.protocol_mask()
    assert wanted & (P_NOHDRS | P_NR_HDR) == 0
    assert wanted & (P_NOMAIL | milter.P_NR_MAIL) == milter.P_NR_MAIL


def test_data_of_an_application_that_is_named_like_a_callback_turns_none_on():
    class OfTheInstance(Milter.Base):
        def __init__(self):
            self.data = {}

        def header(self, field, value):
            return CONTINUE

    class OfTheClass(Milter.Base):
        data = ()

    nodata = milter.P_NODATA
    assert OfTheInstance()._wanted_steps() & (nodata | P_NOHDRS) == nodata
    assert OfTheClass()._wanted_steps() & nodata


# Negotiation.


def negotiated(klass, actions=CURR_ACTS, steps=ALL_STEPS, prepare=None):
    """A filter object that has negotiated, what it answered, its options and its context."""
    filter_object, ctx = attached(klass)
    if prepare is not None:
        prepare(filter_object)
    opts = [actions, steps, 7, 7]
    verdict = filter_object.negotiate(opts)
    return filter_object, verdict, opts, ctx


@pytest.mark.parametrize("actions", [CURR_ACTS, milter.V1_ACTS, 0, 0x40000001])
@pytest.mark.parametrize("steps", [ALL_STEPS, 0x7F, 0, 0xFFFFFFFF, P_SKIP, NO_CALLBACK])
def test_negotiation_asks_for_no_more_than_is_offered(actions, steps):
    filter_object, verdict, opts, _ = negotiated(Milter.Milter, actions, steps)
    assert verdict == CONTINUE
    assert opts == [actions, steps & ALL_STEPS & ~Milter.Milter.protocol_mask(), 0, 0]
    assert (filter_object._actions, filter_object._protocol) == (opts[0], opts[1])
    assert bool(opts[1] & P_SKIP) == bool(steps & P_SKIP)


def test_enabled_steps_beyond_the_known_ones_are_asked_for():
    @(lambda klass: Milter.enable_protocols(klass, milter.P_MDS_1M | P_RCPT_REJ))
    class Large(Milter.Base):
        pass

    _, _, opts, _ = negotiated(Large, steps=0xFFFFFFFF)
    assert opts[1] == NO_CALLBACK | P_SKIP | P_RCPT_REJ | milter.P_MDS_1M


def test_methods_assigned_to_the_instance_are_sent():
    def prepare(filter_object):
        filter_object.body = lambda blk: CONTINUE
        filter_object.header = Milter.noreply(Echo.header).__get__(filter_object)

    _, _, opts, _ = negotiated(Milter.Base, prepare=prepare)
    assert opts[1] == NO_CALLBACK & ~P_NOBODY & ~P_NOHDRS | P_SKIP | P_NR_HDR


def test_a_method_assigned_to_the_instance_keeps_enabled_steps():
    @Milter.header_leading_space
    class Filter(Milter.Base):
        pass

    def prepare(filter_object):
        filter_object.eoh = lambda: CONTINUE

    _, _, opts, _ = negotiated(Filter, prepare=prepare)
    assert opts[1] == NO_CALLBACK & ~milter.P_NOEOH | P_SKIP | P_HDR_LEADSPC


def test_noreply_holds_only_where_it_was_agreed():
    class Silent(Milter.Base):
        @Milter.noreply
        def header(self, field, value):
            return CONTINUE

    agreed, _, _, _ = negotiated(Silent)
    refused, _, _, _ = negotiated(Silent, steps=ALL_STEPS & ~P_NR_HDR)
    assert agreed.header_bytes("a", b"b") == NOREPLY
    assert refused.header_bytes("a", b"b") == CONTINUE


class Lists(Milter.Base):
    """Macro lists in each of the ways they can be given."""

    @Milter.symlist("j", "{if_name}")
    def connect(self, hostname, family, hostaddr):
        return CONTINUE

    @Milter.symlist("i")
    @Milter.noreply
    @Milter.symlist("{auth_authen}")
    def envfrom(self, f, *params):
        return CONTINUE

    @Milter.symlist("{rcpt_addr}")
    def envrcpt_bytes(self, *b):
        return CONTINUE

    @Milter.symlist()
    def eom(self):
        return CONTINUE


def test_symlists_are_sent_at_negotiation():
    _, verdict, opts, ctx = negotiated(Lists)
    assert verdict == CONTINUE
    assert sorted(ctx.calls) == [
        ("setsymlist", milter.M_CONNECT, "j {if_name}"),
        ("setsymlist", milter.M_ENVFROM, "{auth_authen} i"),
        ("setsymlist", milter.M_ENVRCPT, "{rcpt_addr}"),
        ("setsymlist", milter.M_EOM, ""),
    ]
    assert opts[1] == ALL_STEPS & ~Lists.protocol_mask()


def test_symlists_are_not_sent_where_they_are_not_offered():
    _, verdict, _, ctx = negotiated(Lists, actions=CURR_ACTS & ~SETSYMLIST)
    assert (verdict, ctx.calls) == (CONTINUE, [])


def test_a_subclass_sends_its_own_lists():
    class Child(Lists):
        def connect(self, hostname, family, hostaddr):
            return CONTINUE

    _, _, _, ctx = negotiated(Child)
    assert [call[1] for call in ctx.calls] == [milter.M_ENVFROM, milter.M_ENVRCPT, milter.M_EOM]


def test_a_failure_is_logged_and_takes_all_options(caplog):
    class Broken(Lists):
        def setsymlist(self, stage, *macros):
            raise milter.error("no list for you")

    with caplog.at_level(logging.ERROR, "milter"):
        filter_object, verdict, opts, _ = negotiated(Broken, actions=0x1FF, steps=0x7FF)
    assert (verdict, opts) == (ALL_OPTS, [0x1FF, 0x7FF, 7, 7])
    assert (filter_object._actions, filter_object._protocol) == (0x1FF, P_SKIP)
    (record,) = caplog.records
    assert record.name == "milter"
    assert "Broken" in record.getMessage()
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "no list for you"


def test_a_failure_after_the_options_were_touched_gives_them_back(caplog):
    class Broken(Milter.Base):
        def _wanted_steps(self):
            raise RuntimeError("no steps")

    _, verdict, opts, _ = negotiated(Broken, steps=0)
    assert (verdict, opts) == (ALL_OPTS, [CURR_ACTS, 0, 7, 7])
    assert len(caplog.records) == 1


def test_reused_filter_objects_forget_the_last_negotiation():
    filter_object, _, _, ctx = negotiated(Milter.Milter, actions=1)
    assert filter_object._actions == 1
    filter_object._setctx(None)
    assert filter_object._ctx is None
    assert filter_object._actions == 1
    filter_object._setctx(ctx)
    assert (filter_object._ctx, filter_object._actions, filter_object._protocol) == (
        ctx,
        CURR_ACTS,
        0,
    )


# Actions.

ACTIONS = [
    ("addheader", ("X-A", "b"), "ADDHDRS", ("X-A", "b", -1)),
    ("addheader", ("X-A", b"b", 3), "ADDHDRS", ("X-A", b"b", 3)),
    ("chgheader", ("X-A", 0, "b"), "CHGHDRS", ("X-A", 0, "b")),
    ("chgheader", ("X-A", 2, None), "CHGHDRS", ("X-A", 2, None)),
    ("addrcpt", ("<a@b>",), "ADDRCPT", ("<a@b>", None)),
    ("addrcpt", ("<a@b>", "NOTIFY=NEVER"), "ADDRCPT_PAR", ("<a@b>", "NOTIFY=NEVER")),
    ("addrcpt", ("<a@b>", b"NOTIFY=NEVER"), "ADDRCPT_PAR", ("<a@b>", b"NOTIFY=NEVER")),
    ("addrcpt", ("<a@b>", ["A=1", "B"]), "ADDRCPT_PAR", ("<a@b>", "A=1 B")),
    ("addrcpt", ("<a@b>", (b"A=1", "B=\udcff")), "ADDRCPT_PAR", ("<a@b>", b"A=1 B=\xff")),
    ("addrcpt", ("<a@b>", []), "ADDRCPT", ("<a@b>", None)),
    ("addrcpt", ("<a@b>", ""), "ADDRCPT", ("<a@b>", "")),
    ("addrcpt", ("<a@b>", {"A=1": 1, "B": 2}), "ADDRCPT_PAR", ("<a@b>", "A=1 B")),
    ("delrcpt", ("<a@b>",), "DELRCPT", ("<a@b>",)),
    ("chgfrom", ("<a@b>",), "CHGFROM", ("<a@b>", None)),
    ("chgfrom", ("<a@b>", ["RET=HDRS", "ENVID=x"]), "CHGFROM", ("<a@b>", "RET=HDRS ENVID=x")),
    ("chgfrom", ("<a@b>", (b"RET=HDRS",)), "CHGFROM", ("<a@b>", b"RET=HDRS")),
    ("replacebody", (b"body",), "CHGBODY", (b"body",)),
    ("quarantine", ("reason",), "QUARANTINE", ("reason",)),
]


@pytest.mark.parametrize(("name", "args", "flag", "passed"), ACTIONS)
def test_actions_reach_the_context(name, args, flag, passed):
    filter_object, ctx = attached()
    getattr(filter_object, name)(*args)
    assert ctx.calls == [(name, *passed)]


@pytest.mark.parametrize(("name", "args", "flag", "passed"), ACTIONS)
def test_actions_that_were_not_negotiated_name_their_flag(name, args, flag, passed):
    filter_object, ctx = attached()
    filter_object._actions = CURR_ACTS & ~getattr(milter, flag)
    with pytest.raises(Milter.DisabledAction) as caught:
        getattr(filter_object, name)(*args)
    assert isinstance(caught.value, RuntimeError)
    assert str(caught.value) in {flag, "MODBODY"}
    assert getattr(milter, str(caught.value)) == getattr(milter, flag)
    assert ctx.calls == []
    # Its own flag is all that an action needs, with the one exception of added parameters.
    filter_object._actions = getattr(milter, flag) | milter.ADDRCPT
    getattr(filter_object, name)(*args)
    assert len(ctx.calls) == 1


def test_progress_and_macros_need_no_flag():
    filter_object, ctx = attached()
    filter_object._actions = 0
    filter_object.progress()
    assert filter_object.getsymval("i") == "result of getsymval"
    assert ctx.calls == [("progress",), ("getsymval", "i")]


def test_setsymlist_joins_and_limits():
    filter_object, ctx = attached()
    filter_object.setsymlist(milter.M_HELO, "{tls_version}", "{cipher} {cipher_bits}")
    assert ctx.calls == [("setsymlist", milter.M_HELO, "{tls_version} {cipher} {cipher_bits}")]
    with pytest.raises(ValueError, match="more than 5 macros"):
        filter_object.setsymlist(milter.M_HELO, "a b c", "d e f")
    filter_object._actions = CURR_ACTS & ~SETSYMLIST
    with pytest.raises(Milter.DisabledAction, match=r"^SETSYMLIST$"):
        filter_object.setsymlist(milter.M_HELO, "i")
    assert len(ctx.calls) == 1


@pytest.mark.parametrize("call", ["progress", "getsymval", "addheader", "setreply"])
def test_without_a_connection_actions_say_so(call):
    args = {"getsymval": ("i",), "addheader": ("a", "b"), "setreply": ("550",)}.get(call, ())
    with pytest.raises(milter.error, match="no connection"):
        getattr(Milter.Base(), call)(*args)


@pytest.mark.parametrize(
    ("args", "keywords", "passed"),
    [
        (("550",), {}, ("550", None)),
        (("550", "5.7.1"), {}, ("550", "5.7.1")),
        (("550", "5.7.1", "no"), {}, ("550", "5.7.1", "no")),
        (
            ("550", None, "50%% off", "%%%%", b"100%%"),
            {},
            ("550", None, "50%% off", "%%%%", b"100%%"),
        ),
        ((), {"rcode": "451", "xcode": "4.7.1", "msg": "later"}, ("451", "4.7.1", "later")),
        (("550", "5.7.1", None, "second"), {}, ("550", "5.7.1", "second")),
    ],
)
def test_setreply_passes_what_it_is_given(args, keywords, passed):
    filter_object, ctx = attached()
    filter_object.setreply(*args, **keywords)
    assert ctx.calls == [("setreply", *passed)]


@pytest.mark.parametrize("line", ["50% off", "%", "100%%%", "%% %", b"50% off \xff"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_setreply_wants_percent_signs_doubled(line, place):
    filter_object, ctx = attached()
    lines = ["fine", "also fine", "%% too"]
    lines[place] = line
    shown = line if isinstance(line, str) else line.decode("latin-1")
    with pytest.raises(ValueError) as caught:
        filter_object.setreply("550", "5.7.1", *lines)
    assert str(caught.value) == f"'%' must be doubled: {shown}"
    assert isinstance(caught.value, milter.error)
    assert ctx.calls == []


# The logging class.


def log_lines(call, monkeypatch, encoding="ascii", errors="strict"):
    """What a call prints on a standard output of that encoding, as lines of bytes."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="\n")
    monkeypatch.setattr(sys, "stdout", out)
    assert call() in (CONTINUE, None)
    out.flush()
    return raw.getvalue().splitlines()


@pytest.mark.parametrize(
    ("name", "args", "line"),
    [
        ("connect", ("mx", 2, ("192.0.2.1", 25)), b"Milter: connect from mx at ('192.0.2.1', 25)"),
        (
            "connect",
            ("mx", 10, ("2001:db8::1", 25, 0, 0)),
            b"Milter: connect from mx at ('2001:db8::1', 25, 0, 0)",
        ),
        ("connect", ("mx", 1, "/run/mx\udcff"), b"Milter: connect from mx at /run/mx\\udcff"),
        ("connect", ("[local]", 0, None), b"Milter: connect from [local] at unknown"),
        ("hello", ("caf\udce9",), b"Milter: hello from caf\\udce9"),
        ("envfrom", ("<ü@b>", "SIZE=1"), b"Milter: mail from <\\xfc@b> ('SIZE=1',)"),
        ("envrcpt", ("<a@b>", "X"), b"Milter: rcpt to <a@b> ('X',)"),
        ("header", ("X", "a\n b\x1b[2J\x7f\x9b\r"), b"Milter: X: a\\n b\\x1b[2J\\x7f\\x9b\\r"),
        ("header", ("X", "tab\there"), b"Milter: X: tab\there"),
        ("eoh", (), b"Milter: eoh"),
        ("eom", (), b"Milter: eom"),
        ("abort", (), b"Milter: abort"),
        ("close", (), b"Milter: close"),
        ("log", ("a", 1, None), b"Milter: a 1 None"),
        ("log", (), b"Milter:"),
    ],
)
def test_each_callback_prints_a_line_whatever_it_holds(name, args, line, monkeypatch):
    filter_object = Milter.Milter()
    assert log_lines(lambda: getattr(filter_object, name)(*args), monkeypatch) == [line]


def test_characters_that_standard_output_has_are_printed(monkeypatch):
    lines = log_lines(lambda: Milter.Milter().log("ü☃\udcff"), monkeypatch, "utf-8")
    assert lines == ["Milter: ü☃\\udcff".encode()]


@pytest.mark.parametrize("gone", ["none", "closed", "broken"])
def test_logging_survives_the_loss_of_standard_output(gone, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    out = {"none": None, "closed": io.StringIO(), "broken": Broken()}[gone]
    if gone == "closed":
        out.close()
    monkeypatch.setattr(sys, "stdout", out)
    assert Milter.Milter().hello("mx") == CONTINUE


def test_a_line_is_written_in_one_piece(monkeypatch):
    written = []

    class Pieces(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Pieces())
    Milter.Milter().log("one", "line")
    assert written == ["Milter: one line\n"]


def test_the_verdict_of_an_override_is_its_own():
    class Rejects(Milter.Milter):
        def log(self, *msg):
            self.logged = msg

        def hello(self, hostname):
            super().hello(hostname)
            return REJECT

    rejects = Rejects()
    assert rejects.hello("mx") == REJECT
    assert rejects.logged == ("hello from mx",)


def test_what_an_own_log_gets():
    """One text for connect and HELO, and the parameters as they came: own ``log``s take them so."""
    lines = []

    class Logging(Milter.Milter):
        def log(self, *msg):
            lines.append(msg)

    filter_object = Logging()
    filter_object.connect("h", 2, ("192.0.2.1", 25))
    filter_object.hello("helo")
    filter_object.envfrom("<a@b>", "SIZE=1")
    filter_object.envrcpt("<c@d>")
    filter_object.header("A", "b")
    assert lines == [
        ("connect from h at ('192.0.2.1', 25)",),
        ("hello from helo",),
        ("mail from", "<a@b>", ("SIZE=1",)),
        ("rcpt to", "<c@d>", ()),
        ("A: b",),
    ]


def test_marks_of_callbacks_have_the_names_that_other_decorators_set():
    @Milter.symlist("{a}")
    @Milter.decode("strict")
    def envrcpt(self, to, *params):
        return CONTINUE

    assert envrcpt._symlist == ("{a}",)
    assert envrcpt.error_strategy == "strict"
    assert Milter.noreply(envrcpt).milter_protocol == milter.P_NR_RCPT
    assert Milter.Base.envrcpt.milter_protocol == milter.P_NORCPT


# --- public names --------------------------------------------------------------------------------


def test_what_was_negotiated_has_public_names():
    made = Milter.Base()
    assert (made.actions, made.protocol, made.context) == (Milter.CURR_ACTS, 0, None)
    made._actions, made._protocol, made._ctx = 3, 5, "context"
    assert (made.actions, made.protocol, made.context) == (3, 5, "context")


def test_an_applications_own_attributes_of_these_names_go_first():
    class Own(Milter.Base):
        protocol = "smtp"

        def __init__(self):
            self.actions = ["reject"]

        def context(self):
            return "mine"

    made = Own()
    made.actions.append("log")
    assert (made.actions, made.protocol, made.context()) == (["reject", "log"], "smtp", "mine")
    assert (made._actions, made._protocol, made._ctx) == (Milter.CURR_ACTS, 0, None)


def test_parameters_of_callbacks_keep_their_names_at_run_time():
    assert Milter.Base().header(field="Subject", value="x") == Milter.CONTINUE
    assert list(inspect.signature(Milter.Base.connect).parameters) == [
        "self", "hostname", "family", "hostaddr",
    ]  # fmt: skip


def test_address_is_there_at_run_time_but_for_no_star_import(tmp_path):
    code = (
        "import sys; before = set(sys.modules)\n"
        "from Milter import *\n"
        "import Milter, Milter._socket_setup\n"
        "new = set(sys.modules) - before\n"
        "print('Address' in globals(), sorted({'typing', 'logging'} & new))\n"
        "import typing\n"
        "print(len(typing.get_args(Milter.Address)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "False []\n4\n"
