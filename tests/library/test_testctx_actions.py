"""The stand-in for the context: what a filter may do to a message, when, and what becomes of it."""

from __future__ import annotations

import array
import email
import logging
import random
import sys
import types

import milter
import pytest
from milter import (
    ACCEPT,
    CONTINUE,
    CURR_ACTS,
    DISCARD,
    P_HDR_LEADSPC,
    REJECT,
    SETSYMLIST,
    TEMPFAIL,
)
from support.stand_in import MESSAGE, Logger, fed

import Milter

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

    missing = CURR_ACTS & ~getattr(milter, flag)
    ctx = play(eom=eom, opts=[missing, 0x1FFFFF, 0, 0])
    with pytest.raises(milter.error, match=f"{call}: {flag} was not negotiated with the MTA"):
        fed(ctx)
    ctx = play(eom=eom, opts=[getattr(milter, flag), 0x1FFFFF, 0, 0])
    assert fed(ctx) == ACCEPT


def test_what_belongs_to_no_callback_passes_outside_of_them(play):
    ctx = play()
    ctx._setsymval("i", "X")
    ctx.setreply("550", "5.7.1", "no")
    assert ctx._reply == ("550", "5.7.1", "no")
    assert ctx.getsymval("i") == "X"
    ctx.progress()
    assert ctx._progress == 0
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
    (LONE, "cannot be encoded, as it holds a lone surrogate"),
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


def test_symlists_do_nothing_where_they_are_not_offered(play):
    def negotiate(self, opts):
        self._ctx.setsymlist(milter.M_HELO, "i")
        return CONTINUE

    ctx = play(negotiate=negotiate, opts=[CURR_ACTS & ~SETSYMLIST, 0x1FFFFF, 0, 0])
    assert ctx._symlist == [None] * 7


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
