"""Negotiation: what is asked for, with and without a negotiate callback, of any offer."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from support.wire import session

from Milter.mta import (
    CURRENT_ACTIONS,
    V1_ACTIONS,
    V1_STEPS,
    Action,
    Offer,
    Stage,
    Step,
    Verdict,
)

# What libmilter offers the filter in place of an MTA that does not: it then answers itself.
SIMULATED = Step.NR_CONN | Step.NR_HELO | Step.NR_MAIL | Step.NR_RCPT | Step.NR_DATA
SIMULATED |= Step.NR_UNKN | Step.NR_HDR | Step.NR_EOH | Step.NR_BODY

OFFERS = [
    *(Offer.for_version(version) for version in range(2, 7)),
    Offer(version=7),
    Offer(actions=Action.NONE),
    Offer(steps=Step.NONE),
    Offer(version=2, actions=Action.NONE, steps=Step.NONE),
    Offer(actions=Action.ADDHDRS, steps=Step.NOHELO),
    Offer(version=2, actions=Action.ADDHDRS, steps=Step.NONE),
    Offer(actions=CURRENT_ACTIONS | Action(0x200), steps=Step(0x3FFFFF)),
    Offer(steps=Step.MDS_256K | Step.MDS_1M | Step.SKIP),
]


def actions_of(offer: Offer) -> Action:
    """An offer of nothing at all is one of protocol version 1."""
    return offer.actions or V1_ACTIONS


@pytest.fixture(scope="module")
def filters(run_shared_filter: Callable[..., Any]) -> Callable[..., Any]:
    """Filters by their arguments, started when first asked for."""
    running: dict[tuple[str, ...], Any] = {}

    def find(*arguments: str) -> Any:
        if arguments not in running:
            running[arguments] = run_shared_filter("scripted", *arguments)
        return running[arguments]

    return find


@pytest.mark.parametrize("offer", OFFERS)
def test_the_callback_sees_the_offer(filters: Callable[..., Any], offer: Offer) -> None:
    running = filters("", "milter.seen = list(args[0]); args[0][1] = 0")
    with session(running, offer=offer, connect="say(*milter.seen)") as each:
        assert each.message().verdict is Verdict.CONTINUE
    ((actions, steps, *rest),) = each.said()
    assert actions == actions_of(offer)
    # libmilter keeps the size of packets to itself, as it does what it simulates.
    assert steps | SIMULATED == (offer.steps & ~Step(0x70000000) or V1_STEPS) | SIMULATED
    assert rest == [0, 0]


MORE = {
    "everything": "args[0][:] = [0xffffffff] * 4",
    "negative": "args[0][:] = [-1, -1, -1, -1]",
    "huge": "args[0][:] = [2**70 - 1, 2**70 - 1, 0, 0]",
    "longer": "args[0].extend([1, 2, 3]); args[0][1] = 0",
    "shorter": "del args[0][2:]; args[0][1] = 0",
    "nothing": "args[0][:] = [0, 0, 0, 0]",
    "booleans": "args[0][:] = [True, False, 0, 0]",
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("asked", MORE)
def test_whatever_is_asked_for_the_session_goes_on_with_what_was_offered(
    filters: Callable[..., Any], asked: str, offer: Offer
) -> None:
    with session(filters("", MORE[asked]), offer=offer) as each:
        agreed = each.mta.negotiated
        each.connect()
        each._connected = False  # it may have agreed on hearing nothing
        each.mta.helo("h")
        each.transaction()
        assert each.content().verdict is Verdict.CONTINUE
    expected = {"nothing": 0, "booleans": 1 & actions_of(offer)}
    assert agreed.actions == expected.get(asked, actions_of(offer))
    if asked == "everything":
        offered = offer.steps & ~Step(0x70000000) or V1_STEPS
        assert agreed.steps & ~Step(0x70000000) == offered


def test_all_opts_leaves_out_what_has_no_callback(filters: Callable[..., Any]) -> None:
    setup = "for each in ('helo', 'eoh', 'body'): getattr(milter, f'set_{each}_callback')(None)"
    setup += "\nmilter.register('x', data=None)"
    with session(filters(setup, "return milter.ALL_OPTS")) as each:
        agreed = each.mta.negotiated
    assert agreed.actions == CURRENT_ACTIONS
    assert agreed.steps == Step.NOHELO | Step.NOEOH | Step.NOBODY | Step.NODATA | Step.SKIP


def test_what_was_agreed_is_what_is_allowed(filters: Callable[..., Any]) -> None:
    running = filters("", "args[0][:2] = [milter.ADDHDRS, 0]")
    with session(
        running,
        connect="say(ctx.actions, ctx.protocol)",
        eom="ctx.addheader('a', 'b'); attempt(lambda: ctx.chgheader('a', 1, 'b'))",
    ) as each:
        assert len(each.message().modifications) == 1
    said = each.said()
    assert said[0] == (int(Action.ADDHDRS), 0)
    assert said[1][2] == "smfi_chgheader: CHGHDRS was not negotiated with the MTA"


# --- without a negotiate callback ----------------------------------------------------------------

WITHOUT = "milter.register('x', negotiate=None)"


@pytest.mark.parametrize("offer", OFFERS)
def test_the_default_asks_for_the_actions_that_were_set(
    filters: Callable[..., Any], offer: Offer
) -> None:
    running = filters(WITHOUT + "; milter.set_flags(milter.ADDHDRS | milter.CHGFROM)")
    with session(running, offer=offer) as each:
        assert each.mta.negotiated.actions == actions_of(offer) & (Action.ADDHDRS | Action.CHGFROM)
        assert each.mta.negotiated.steps & ~Step(0x70000000) == Step.NONE
        assert each.message().verdict is Verdict.CONTINUE


@pytest.mark.parametrize(
    ("callback", "step"),
    [
        ("connect", Step.NOCONNECT),
        ("helo", Step.NOHELO),
        ("envfrom", Step.NOMAIL),
        ("envrcpt", Step.NORCPT),
        ("header", Step.NOHDRS),
        ("eoh", Step.NOEOH),
        ("body", Step.NOBODY),
        ("data", Step.NODATA),
        ("unknown", Step.NOUNKNOWN),
        ("eom", Step.NONE),
        ("abort", Step.NONE),
    ],
)
def test_the_default_leaves_out_a_step_without_callback(
    run_filter: Callable[..., Any], callback: str, step: Step
) -> None:
    remove = f"milter.set_{callback}_callback(None)"
    if callback in ("data", "unknown"):
        remove = f"milter.register('x', {callback}=None)"
    with session(run_filter("scripted", f"{WITHOUT}; {remove}")) as each:
        assert each.mta.negotiated.steps == step
        assert each.mta.negotiated.actions == CURRENT_ACTIONS
        each.mta.helo("h")
        each.transaction()
        assert each.content().verdict is Verdict.CONTINUE


def test_no_callback_at_all(run_filter: Callable[..., Any]) -> None:
    """register() alone: everything is left out, and the end of a message is answered."""
    running = run_filter(
        source="import sys, milter\n"
        "milter.register('nothing'); milter.setconn(sys.argv[1]); milter.main()"
    )
    with running.mta() as mta:
        assert mta.negotiated.actions == Action.NONE
        assert mta.helo("h").verdict is Verdict.NOT_SENT
        assert mta.body(b"x").verdict is Verdict.NOT_SENT
        assert mta.eom().verdict is Verdict.CONTINUE
    with running.mta(offer=Offer(steps=Step.NONE)) as mta:
        assert mta.send(b"A: b\r\n\r\nc", recipients=["a@b"]).verdict is Verdict.CONTINUE


# --- lists of macros ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "sent"),
    [
        ("ctx.setsymlist(milter.M_EOM, 'j')", {Stage.EOM: ("j",)}),
        ("ctx.setsymlist(milter.M_EOM, b'j {x}')", {Stage.EOM: ("j", "{x}")}),
        ("ctx.setsymlist(stage=milter.M_EOM, macros=' j  i ')", {Stage.EOM: ("j", "i")}),
        (
            "ctx.setsymlist(milter.M_EOM, 'j i'); ctx.setsymlist(milter.M_EOM, b'i {x} j')",
            {Stage.EOM: ("j", "i", "{x}")},
        ),
        ("ctx.setsymlist(milter.M_EOM, 'i i i')", {Stage.EOM: ("i",)}),
        ("ctx.setsymlist(milter.M_EOM, '')", {Stage.EOM: ()}),
        ("args[0][0] = milter.ADDHDRS; ctx.setsymlist(milter.M_EOM, 'j')", {Stage.EOM: ("j",)}),
        (
            "[ctx.setsymlist(n, f'{{m{n}}}') for n in range(milter.M_CONNECT, milter.M_EOH + 1)]",
            {
                Stage.CONNECT: ("{m0}",),
                Stage.HELO: ("{m1}",),
                Stage.MAIL: ("{m2}",),
                Stage.RCPT: ("{m3}",),
                Stage.DATA: ("{m4}",),
                Stage.EOM: ("{m5}",),
                Stage.EOH: ("{m6}",),
            },
        ),
        (
            "ctx.setsymlist(milter.M_HELO, ' '.join(f'{{m{n}}}' for n in range(2000)))",
            {Stage.HELO: tuple(f"{{m{n}}}" for n in range(2000))},
        ),
        ("ctx.setsymlist(milter.M_EOM, 'j'); return milter.ALL_OPTS", {Stage.EOM: ("j",)}),
    ],
)
def test_lists_of_macros(
    run_filter: Callable[..., Any], calls: str, sent: dict[Stage, tuple[str, ...]]
) -> None:
    running = run_filter("scripted", "", f"args[0][1] = 0\n{calls}")
    for _ in range(2):  # nothing of one connection's lists is left to the next
        with running.mta() as mta:
            assert mta.negotiated.macros == sent


OWN_TYPES = """
args[0][1] = milter.P_SKIP
called = []

def never(name):
    def method(self, *arguments):
        called.append(name)
        raise RuntimeError(name)
    return method

def subclass(kind, *names):
    return type("Own", (kind,), {f"__{name}__": never(name) for name in names})

class Stage(subclass(int, "hash", "eq", "index", "int", "bool", "repr", "str")):
    __slots__ = ()

class Bytes(subclass(bytes, "iter", "len", "getitem", "contains", "bytes", "repr")):
    def split(self, *arguments):
        called.append("split")
        return 5

class Text(subclass(str, "iter", "len", "getitem", "contains", "str", "repr")):
    def split(self, *arguments):
        called.append("split")
        return 5

    def encode(self, *arguments):
        called.append("encode")
        return 5

ctx.setsymlist({stage}, {macros})
ctx.setsymlist({stage}, 'x j')
say(called)
"""


@pytest.mark.parametrize("stage", ["milter.M_EOM", "Stage(milter.M_EOM)"])
@pytest.mark.parametrize("macros", ["'j i'", "Bytes(b'j i')", "Text('j i')"])
def test_the_methods_of_an_applications_own_types_do_not_run(
    run_filter: Callable[..., Any], stage: str, macros: str
) -> None:
    """One could return anything, or go on in another thread after the negotiation."""
    negotiate = OWN_TYPES.replace("{stage}", stage).replace("{macros}", macros)
    with session(run_filter("scripted", "", negotiate)) as each:
        assert each.mta.negotiated.macros == {Stage.EOM: ("j", "i", "x")}
        assert each.mta.negotiated.steps == Step.SKIP
        each.connect()
    assert "negotiate ([],)" in each.filter.output.splitlines()


def test_only_the_macros_of_the_list_come(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted", "", "args[0][1] = 0; ctx.setsymlist(milter.M_ENVFROM, 'i')")
    with session(running, envfrom="say(ctx.getsymval('i'), ctx.getsymval('{x}'))") as each:
        each.connect()
        each.mta.mail("<a@b>", macros={"i": "4XyZ", "{x}": "unseen"})
    assert each.said() == [("4XyZ", None)]


STAGE = "setsymlist: stage: must be one of M_CONNECT to M_EOH: "


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ("7, 'j'", "InvalidArgument", STAGE + "7"),
        ("-1, 'j'", "InvalidArgument", STAGE + "-1"),
        ("2**70, 'j'", "InvalidArgument", STAGE + str(2**70)),
        ("5, 'a\\nb'", "InvalidArgument", "setsymlist: macros: must not hold CR or LF: 'a\\nb'"),
        ("5, 'a\\0b'", "InvalidArgument", "setsymlist: macros: must not hold NUL: 'a\\x00b'"),
        ("'5', 'j'", "TypeError", "setsymlist() argument 1 must be int, not str"),
        ("5, None", "TypeError", "setsymlist: macros must be str or bytes, not NoneType"),
        ("5, ['j']", "TypeError", "setsymlist: macros must be str or bytes, not list"),
    ],
)
def test_a_list_that_is_refused_leaves_the_rest_of_the_negotiation(
    run_filter: Callable[..., Any], arguments: str, kind: str, text: str
) -> None:
    negotiate = (
        "args[0][1] = milter.P_SKIP\nctx.setsymlist(milter.M_EOM, 'j')\n"
        f"attempt(lambda: ctx.setsymlist({arguments}))"
    )
    running = run_filter("scripted", "", negotiate)
    with session(running) as each:
        assert each.mta.negotiated.macros == {Stage.EOM: ("j",)}
        assert each.mta.negotiated.steps == Step.SKIP
        each.connect()
    assert f"('raised', ['{kind}'," in running.output
    assert repr(text) in running.output or ascii(text) in running.output


@pytest.mark.parametrize(
    "offer", [Offer(actions=CURRENT_ACTIONS & ~Action.SETSYMLIST), Offer.for_version(2)]
)
def test_a_list_that_the_mta_does_not_take(run_filter: Callable[..., Any], offer: Offer) -> None:
    negotiate = "args[0][1] = 0\nattempt(lambda: ctx.setsymlist(milter.M_EOM, 'j'))"
    running = run_filter("scripted", "", negotiate)
    body = "say(ctx.getsymval('i'), ctx.getsymval('j'))"
    with session(running, offer=offer, eom=body) as each:
        assert each.mta.negotiated.macros == {}
        each.mta.set_macros(Stage.EOM, {"i": "4X", "j": "mx"})
        assert each.message().verdict is Verdict.CONTINUE
    assert each.said() == [("4X", "mx")]
    assert "raised" not in running.output


def test_a_list_outside_negotiation(filters: Callable[..., Any]) -> None:
    body = "attempt(lambda: ctx.setsymlist(milter.M_EOM, 'j'))"
    with session(filters(), connect=body, eom=body, close=body) as each:
        assert each.message().verdict is Verdict.CONTINUE
    said = each.said()
    assert len(said) == 3
    for outcome, kinds, text in said:
        assert (outcome, kinds[0]) == ("raised", "error")
        assert text == "smfi_setsymlist: only allowed in the negotiate callback"


# --- a second session on one connection ----------------------------------------------------------


def test_the_next_session_keeps_what_was_agreed(run_filter: Callable[..., Any]) -> None:
    steps = Step.NR_HDR | Step.SKIP
    running = run_filter(
        "scripted", "", f"args[0][:2] = [milter.ADDHDRS | milter.CHGBODY, {int(steps)}]"
    )
    with session(
        running,
        connect="say(ctx.actions, ctx.protocol, ctx.getpriv()); ctx.setpriv('old')",
        header="return milter.NOREPLY",
        body="return milter.SKIP",
        eom="ctx.addheader('a', 'b'); attempt(lambda: ctx.chgfrom('a'))",
    ) as each:
        for _ in range(3):
            reply = each.message()
            assert reply.verdict is Verdict.CONTINUE
            assert len(reply.modifications) == 1
            last = each.tag
            each.mta.quit_nc()
            said = each.said()
            assert said[0] == (int(Action.ADDHDRS | Action.CHGBODY), int(steps), None)
            assert said[1][2] == "smfi_chgfrom: CHGFROM was not negotiated with the MTA"
            assert len(said) == 2
            each.begin()
            assert last != each.tag
        each.connect()
    assert each.log() == ""


def test_a_debt_ends_with_its_session(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted", "", "args[0][1] = milter.P_NR_CONN")
    with session(
        running, connect="milter.n = getattr(milter, 'n', 0) + 1\nif milter.n == 1: 1/0"
    ) as each:
        each.connect()
        assert each.mta.helo("h").verdict is Verdict.TEMPFAIL
        each.mta.unknown("XBOGUS")  # libmilter takes QUIT_NC after this or a whole message
        each.mta.quit_nc()
        each.begin()
        assert each.message().verdict is Verdict.CONTINUE


def test_close_runs_once_for_each_session(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted")
    with session(running, abort="say('abort')", close="say('close')") as each:
        for _ in range(3):
            each.message()
            each.mta.quit_nc()
            assert each.said() == [("close",)]
            each.begin()
        each.envelope()
    assert each.said() == [("abort",), ("close",)]


def test_each_session_has_a_context_of_its_own(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted")
    with session(
        running,
        connect="""
            if hasattr(milter, "old"):
                say(milter.old is ctx)
                attempt(lambda: milter.old.getsymval("i"))
            milter.old = ctx
        """,
    ) as each:
        each.message()
        each.mta.quit_nc()
        each.begin()
        each.connect()
    assert [said[0] for said in each.said()] == [False, "raised"]
    assert each.said()[1][2] == "bad context"
