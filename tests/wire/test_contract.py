"""One contract for the context and its stand-in: each test runs on both.

The stand-in is ``Milter.testctx.TestCtx``; the real one is reached through the wire, by a filter in
a process of its own that ``Milter.mta`` plays the MTA for. Both run the filter
``contract``, which makes calls as it is told.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import io

import milter
import pytest
from milter import CURR_ACTS, SETSYMLIST, SKIP
from support.process import FILTERS

import Milter
from Milter.mta import Action, Client, Offer, Step
from Milter.testctx import TestCtx

MESSAGE = (
    b"Received: by mx\r\n"
    b"Subject:  old\r\n\tfolded\r\n"
    b"X-Twice: 1\r\n"
    b"x-twice:2\r\n"
    b"To: c@d\r\n"
    b"\r\n"
    b"line one\r\nline two\r\n"
)
ALL_STEPS = 0x1FFFFF


class Played:
    """What came of a session: outcomes by stage, and the message that is left."""

    def __init__(self, outcomes, message):
        self.outcomes = outcomes
        self.message = message

    def at(self, stage):
        return [tuple(rest) for where, *rest in self.outcomes if where == stage]

    @property
    def stages(self):
        """The stages at which calls were made, each once for each time it came."""
        return [where for where, *_ in self.outcomes]


def planned_class():
    spec = importlib.util.spec_from_file_location("contract", FILTERS / "contract.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Planned


def play_stand_in(monkeypatch, plan, at_negotiation, macros, actions, steps):
    klass = planned_class()
    klass.at_negotiation = at_negotiation
    monkeypatch.setattr(Milter, "factory", klass)
    ctx = TestCtx()
    ctx._opts = [actions, steps, 0, 0]
    for name, value in {**macros, "CONNECT:{plan}": repr(plan)}.items():
        # The stand-in has no stages to its macros; it knows where MTAs send these.
        ctx._setsymval(name.partition(":")[2], value)
    ctx._connect("localhost", "helo", "127.0.0.1")
    filter_object = ctx.getpriv()
    ctx._feedFile(io.BytesIO(MESSAGE), "s@x", "r@y", "r@z")
    message = ctx._body and ctx._body.getvalue()
    ctx._envfrom("<s@x>")
    ctx._abort()
    ctx._abort()
    ctx._close()
    return Played(filter_object.outcomes, message)


def play_wire(running, plan, macros, actions, steps):
    before = len([line for line in running.output.splitlines() if line.startswith("outcomes ")])
    offer = Offer(actions=Action(actions), steps=Step(steps))
    with running.mta(offer=offer) as mta:
        result = mta.send(
            MESSAGE,
            sender="s@x",
            recipients=["r@y", "r@z"],
            client=Client(),
            helo="helo",
            macros={**macros, "CONNECT:{plan}": repr(plan)},
        )
        mta.mail("<s@x>")
        mta.abort()
        mta.abort()
    line = running.wait_for("outcomes ", before + 1)
    return Played(ast.literal_eval(line.partition(" ")[2]), result.message.as_bytes())


@pytest.fixture(scope="module")
def shared(run_shared_filter):
    return run_shared_filter("contract")


@pytest.fixture
def play_on(request, monkeypatch):
    """Play a session with a plan on the context that is named first."""

    def play(kind, plan, at_negotiation=None, macros=None, actions=CURR_ACTS, steps=ALL_STEPS):
        offer = macros or {}, actions, steps
        if kind == "stand-in":
            return play_stand_in(monkeypatch, plan, at_negotiation or {}, *offer)
        if at_negotiation is None:
            return play_wire(request.getfixturevalue("shared"), plan, *offer)
        running = request.getfixturevalue("run_filter")("contract", repr(at_negotiation))
        return play_wire(running, plan, *offer)

    return play


@pytest.fixture(params=["stand-in", "wire"])
def play(request, play_on):
    """Play a session with a plan, on the one context and on the other."""
    return functools.partial(play_on, request.param)


# When.

AT_EOM = [
    ("smfi_addheader", "ADDHDRS", "addheader", ("X", "y")),
    ("smfi_insheader", "ADDHDRS", "addheader", ("X", "y", 0)),
    ("smfi_chgheader", "CHGHDRS", "chgheader", ("X", 1, "y")),
    ("smfi_addrcpt", "ADDRCPT", "addrcpt", ("<a@b>",)),
    ("smfi_addrcpt_par", "ADDRCPT_PAR", "addrcpt", ("<a@b>", "X=1")),
    ("smfi_delrcpt", "DELRCPT", "delrcpt", ("<a@b>",)),
    ("smfi_chgfrom", "CHGFROM", "chgfrom", ("<a@b>",)),
    ("smfi_chgfrom", "CHGFROM", "chgfrom", ("<a@b>", "RET=HDRS")),
    ("smfi_replacebody", "CHGBODY", "replacebody", (b"x",)),
    ("smfi_quarantine", "QUARANTINE", "quarantine", ("reason",)),
]
CALLS_AT_EOM = [(method, args) for _, _, method, args in AT_EOM]
ANYWHERE = [("setreply", ("550", "5.7.1", "no")), ("getsymval", ("{plan}",))]
STAGES = ["connect", "hello", "envfrom", "envrcpt", "data", "header", "eoh", "body"]
AFTER = ["abort", "close"]


def test_actions_belong_to_the_end_of_the_message(play):
    calls = dict.fromkeys([*STAGES, *AFTER, "eom"], CALLS_AT_EOM)
    played = play({"calls": calls})
    refused = [
        (method, "error", f"{call}: only allowed in the eom callback")
        for call, _, method, _ in AT_EOM
    ]
    done = [(method, "ok", None) for _, _, method, _ in AT_EOM]
    assert played.at("eom") == done
    for stage in [*STAGES, *AFTER]:
        assert played.at(stage)[: len(refused)] == refused, stage
        assert set(played.at(stage)) == set(refused), stage


def test_replies_and_macros_have_no_stage(play):
    plan = {"calls": dict.fromkeys([*STAGES, "eom", *AFTER], ANYWHERE)}
    played = play(plan)
    for stage in [*STAGES, "eom", *AFTER]:
        assert played.at(stage)[:2] == [("setreply", "ok", None), ("getsymval", "ok", repr(plan))]


def test_progress_may_be_called_anywhere(play):
    calls = [("progress", ())]
    played = play({"calls": dict.fromkeys([*STAGES, "eom", *AFTER], calls)}, {"negotiate": calls})
    assert set(played.stages) == {"negotiate", *STAGES, "eom", *AFTER}
    for stage in ["negotiate", *STAGES, "eom", *AFTER]:
        assert set(played.at(stage)) == {("progress", "ok", None)}, stage


def test_lists_belong_to_negotiation(play):
    calls = [("setsymlist", (milter.M_HELO, "i"))]
    played = play({"calls": dict.fromkeys([*STAGES, "eom", *AFTER], calls)})
    refused = ("setsymlist", "error", "smfi_setsymlist: only allowed in the negotiate callback")
    assert set(played.stages) == {*STAGES, "eom", *AFTER}
    assert {tuple(rest) for _, *rest in played.outcomes} == {refused}


def test_negotiation_knows_no_macros_and_no_message(play):
    calls = [*CALLS_AT_EOM, *ANYWHERE]
    played = play({}, {"negotiate": calls}, {"CONNECT:j": "mx"})
    refused = [
        (method, "error", f"{call}: only allowed in the eom callback")
        for call, _, method, _ in AT_EOM
    ]
    free = [("setreply", "ok", None), ("getsymval", "ok", None)]
    assert played.at("negotiate") == refused + free


@pytest.mark.parametrize(("call", "flag", "method", "args"), AT_EOM)
def test_actions_must_have_been_negotiated(play, call, flag, method, args):
    plan = {"calls": {"eom": [(method, args)]}}
    missing = play(plan, actions=CURR_ACTS & ~getattr(milter, flag))
    why = f"{call}: {flag} was not negotiated with the MTA"
    assert missing.at("eom") == [(method, "error", why)]
    assert missing.message == MESSAGE
    alone = play(plan, actions=getattr(milter, flag))
    assert alone.at("eom") == [(method, "ok", None)]


def test_lists_do_nothing_where_they_are_not_offered(play):
    at_negotiation = {"negotiate": [("setsymlist", (milter.M_HELO, "i"))]}
    played = play({}, at_negotiation, actions=CURR_ACTS & ~SETSYMLIST)
    assert played.at("negotiate") == [("setsymlist", "ok", None)]


@pytest.mark.parametrize("none", ["", b""])
def test_a_recipient_with_no_parameters_needs_no_action_for_them(play, none):
    plan = {"calls": {"eom": [("addrcpt", ("<a@b>", none))]}}
    for actions in (CURR_ACTS, milter.ADDRCPT, milter.ADDRCPT_PAR):
        assert play(plan, actions=actions).at("eom") == [("addrcpt", "ok", None)]


# What.

BAD_TEXT = ["a\0b", b"a\0b", "\ud800"]
# The last two show where an error begins to cut a value short.
BAD_LINE = [*BAD_TEXT, "a\nb", "a\r", b"\n", "a\r\n b", "x" * 76 + "\n", "x" * 77 + "\n"]
BAD_NAME = [*BAD_TEXT, "", "X:", "a b", "a\tb", "a\n", b"a\r", "a\x7f", ":", b"\x01", 1, None]
BAD_VALUE = [*BAD_TEXT, "a\nb", "a\r b", "a\n\n", "a\r\nB: c", b"a\n\r\n b", "a\r", "\r\r\n", 3]
GOOD_VALUE = [
    "",
    "a",
    "a\n b",
    "a\r\n\tb",
    "a\n",
    b"a\r\n",
    "\n",
    "\udcff",
    "ü",
    b"\xff",
    "a\n \n b",
]
BAD_REPLY = [*BAD_LINE, "x" * 981, "ü" * 491, "50%", "%%%", "%% %", 7]
GOOD_REPLY = ["", "x" * 980, "%%", "%%%%", b"\xff", "\udcff"]
BAD_CODE = ["250", "55", "5500", "", "5x0", b"999", "\u066550", "550 ", 550, None]
BAD_ENHANCED = ["", "5.7", "5.7.1.2", "6.1.1", "5.7.1000", "5..1", b"5.7.1 ", "5.\u0667.1", 5]

ARGUMENTS = [
    *[("addheader", (bad, "x"), "name") for bad in BAD_NAME],
    *[("addheader", ("X", bad), "value") for bad in [*BAD_VALUE, None]],
    *[("addheader", ("X", good), None) for good in GOOD_VALUE],
    *[("chgheader", (bad, 1, "x"), "name") for bad in BAD_NAME],
    *[("chgheader", ("X", 1, bad), "value") for bad in BAD_VALUE],
    *[("chgheader", ("X", 1, good), None) for good in [*GOOD_VALUE, None]],
    ("chgheader", ("X", -1, "y"), "idx"),
    ("chgheader", ("X", 0, "y"), None),
    *[
        (method, (bad,), argument)
        for method, argument in [
            ("addrcpt", "rcpt"),
            ("delrcpt", "rcpt"),
            ("chgfrom", "sender"),
            ("quarantine", "reason"),
        ]
        for bad in [*BAD_LINE, "", b"", None, 4]
    ],
    *[
        (method, ("<a@b>", bad), "params")
        for method in ("addrcpt", "chgfrom")
        for bad in [*BAD_LINE, 4]
    ],
    *[(method, ("<\udcff@b>", "X Y=\udcff"), None) for method in ("addrcpt", "chgfrom")],
    *[("replacebody", (bad,), "a bytes-like object") for bad in (None, 3, [1])],
    *[("replacebody", (good,), None) for good in (b"", "ü\udcff", b"x" * 2_000)],
    *[("setreply", (bad,), "rcode") for bad in BAD_CODE],
    *[("setreply", ("550", bad), "xcode") for bad in BAD_ENHANCED],
    *[("setreply", ("550", None, bad), "msg") for bad in BAD_REPLY],
    *[("setreply", ("550", None, "a", bad), "msg") for bad in BAD_REPLY],
    *[("setreply", ("550", None, good, good), None) for good in GOOD_REPLY],
    *[("setreply", args, None) for args in [("550",), ("451", "4.7.1"), ("550", "4.7.1", "x")]],
    ("setreply", ("550", None, *["x"] * 32), None),
    ("setreply", ("550", None, *["x"] * 33), "msg"),
    *[("getsymval", (bad,), "name") for bad in ("i\0", 3, None)],
]


def test_what_could_forge_is_refused(play):
    played = play({"calls": {"eom": [(method, args) for method, args, _ in ARGUMENTS]}})
    got = played.at("eom")
    assert len(got) == len(ARGUMENTS)
    for (method, args, argument), (_, kind, text) in zip(ARGUMENTS, got):
        if argument is None:
            assert (kind, text) == ("ok", None), (method, args)
        else:
            assert kind in ("InvalidArgument", "TypeError"), (method, args)
            assert argument in text, (method, args)


def test_both_refuse_in_the_same_words(play_on):
    plan = {"calls": {"eom": [(method, args) for method, args, _ in ARGUMENTS]}}
    assert play_on("stand-in", plan).outcomes == play_on("wire", plan).outcomes


# Header edits.

ORIGINAL = ["Received: by mx", "Subject:  old\\folded", "X-Twice: 1", "x-twice:2", "To: c@d"]


def replaced(at, *lines):
    """The original headers with one replaced by some lines."""
    return [*ORIGINAL[:at], *lines, *ORIGINAL[at + 1 :]]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([("addheader", ("X-New", "v\n\tw"))], [*ORIGINAL, "X-New: v\\w"]),
        ([("addheader", ("X-New", "v\r\n\tw\r\n"))], [*ORIGINAL, "X-New: v\\w"]),
        ([("addheader", ("X-New", b"\xff"))], [*ORIGINAL, "X-New: \udcff"]),
        ([("addheader", ("X-New", "v", 0))], ["X-New: v", *ORIGINAL]),
        ([("addheader", ("X-New", "v", 2))], [*ORIGINAL[:2], "X-New: v", *ORIGINAL[2:]]),
        ([("addheader", ("X-New", "v", 99))], [*ORIGINAL, "X-New: v"]),
        ([("chgheader", ("subject", 1, "new"))], replaced(1, "subject: new")),
        ([("chgheader", ("Subject", 0, "new"))], replaced(1, "Subject: new")),
        ([("chgheader", ("X-TWICE", 2, "new"))], replaced(3, "X-TWICE: new")),
        ([("chgheader", ("X-Twice", 1, None))], replaced(2)),
        ([("chgheader", ("X-Twice", 2, ""))], replaced(3)),
        ([("chgheader", ("X-Twice", 3, "new"))], [*ORIGINAL, "X-Twice: new"]),
        ([("chgheader", ("X-Twice", 3, None))], ORIGINAL),
        ([("chgheader", ("X-None", 1, ""))], ORIGINAL),
        (
            [("chgheader", ("X-Twice", 2, None)), ("chgheader", ("X-Twice", 1, None))],
            [*ORIGINAL[:2], *ORIGINAL[4:]],
        ),
        (
            [("chgheader", ("X-Twice", 1, None)), ("chgheader", ("X-Twice", 1, "new"))],
            [*ORIGINAL[:2], "X-Twice: new", ORIGINAL[4]],
        ),
        (
            [("addheader", ("X-Twice", "0", 0)), ("chgheader", ("X-Twice", 1, "new"))],
            ["X-Twice: new", *ORIGINAL],
        ),
    ],
)
def test_header_edits(play, edits, expected):
    played = play({"calls": {"eom": edits}})
    assert played.at("eom") == [(method, "ok", None) for method, _ in edits]
    head, _, body = played.message.partition(b"\r\n\r\n")
    text = head.decode("utf-8", "surrogateescape").replace("\r\n\t", "\\")
    assert text.split("\r\n") == expected
    assert body == b"line one\r\nline two\r\n"


def test_a_replaced_body(play):
    calls = [("replacebody", (b"new\r\n",)), ("replacebody", ("more \udcff\r\n",))]
    played = play({"calls": {"eom": calls}})
    assert played.message == MESSAGE.partition(b"line one")[0] + b"new\r\nmore \xff\r\n"


# Macros.


@pytest.mark.parametrize("given", ["i", b"{i}", "{auth_authen} i"])
def test_a_list_hides_the_other_macros_at_its_stage(play, given):
    names = ["j", "{j}", "i", "{i}", "{auth_authen}", "{unheard}", "unheard"]
    look = [("getsymval", (name,)) for name in names]
    macros = {"CONNECT:j": "mx", "MAIL:i": "Q", "MAIL:{auth_authen}": "bat"}
    played = play(
        {"calls": {"envfrom": look}},
        {"symlists": {milter.M_ENVFROM: given}},
        macros,
    )
    authen = "bat" if given == "{auth_authen} i" else None
    values = [value for _, _, value in played.at("envfrom")[: len(names)]]
    assert values == ["mx", "mx", "Q", "Q", authen, None, None]


# Steps.


@pytest.mark.parametrize(("stage", "times"), [("envrcpt", 2), ("header", 5), ("body", 1)])
def test_skip_leaves_out_the_rest_of_a_kind(play, stage, times):
    calls = {name: [("getsymval", ("x",))] for name in (stage, "eom")}
    played = play({"calls": calls})
    assert played.stages == [stage] * times + ["eom"]
    played = play({"calls": calls, "verdicts": {stage: SKIP}})
    assert played.stages == [stage, "eom"]
    assert played.message == MESSAGE


def test_one_abort_for_a_message(play):
    played = play({"calls": {"abort": [("getsymval", ("x",))], "close": [("getsymval", ("x",))]}})
    assert played.stages == ["abort", "close"]
