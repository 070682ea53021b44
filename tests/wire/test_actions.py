"""What a filter may do to a message: the form of each action on the wire, and all refusals."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from support.wire import STAGES, session

from Milter.mta import (
    Action,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    InsertHeader,
    Offer,
    Quarantine,
    ReplaceBody,
    Verdict,
)

ALL_BYTES = bytes(sorted(set(range(1, 256)) - {10, 13}))
NAME_BYTES = bytes(sorted(set(range(33, 256)) - {58, 127}))


@pytest.fixture(scope="module")
def scripted(run_shared_filter: Callable[..., Any]) -> Any:
    return run_shared_filter("scripted")


# --- the wire's form ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sent"),
    [
        ("addheader('X-A', 'value')", AddHeader(b"X-A", b"value")),
        ("addheader(b'X-A', b'value')", AddHeader(b"X-A", b"value")),
        ("addheader(name='X-A', value='value', idx=0)", InsertHeader(0, b"X-A", b"value")),
        ("addheader('X-A', 'value', 3)", InsertHeader(3, b"X-A", b"value")),
        ("addheader('X-A', 'value', 2**31 - 1)", InsertHeader(2**31 - 1, b"X-A", b"value")),
        ("addheader('X-A', 'value', -1)", AddHeader(b"X-A", b"value")),
        ("addheader('X-A', 'value', -5)", AddHeader(b"X-A", b"value")),
        ("addheader('X-A', '')", AddHeader(b"X-A", b"")),
        ("addheader('X-A', ' lead')", AddHeader(b"X-A", b" lead")),
        ("addheader('X-A', 'grün')", AddHeader(b"X-A", "grün".encode())),
        ("addheader('X-A', '\\udce9')", AddHeader(b"X-A", b"\xe9")),
        ("addheader('X\\udce9', '')", AddHeader(b"X\xe9", b"")),
        ("addheader('A' * 1000, 'b' * 60000)", AddHeader(b"A" * 1000, b"b" * 60000)),
        ("chgheader('X-A', 1, 'value')", ChangeHeader(1, b"X-A", b"value")),
        ("chgheader(name=b'X-A', idx=2, value=b'value')", ChangeHeader(2, b"X-A", b"value")),
        ("chgheader('X-A', 0, 'value')", ChangeHeader(0, b"X-A", b"value")),
        ("chgheader('X-A', 2**31 - 1, 'value')", ChangeHeader(2**31 - 1, b"X-A", b"value")),
        ("chgheader('X-A', 1, None)", ChangeHeader(1, b"X-A", b"")),
        ("chgheader('X-A', 1, '')", ChangeHeader(1, b"X-A", b"")),
        ("chgheader('X-A', 1, b'')", ChangeHeader(1, b"X-A", b"")),
        ("addrcpt('<a@b>')", AddRecipient("<a@b>")),
        ("addrcpt(b'<\\xff@b>')", AddRecipient("<\udcff@b>")),
        ("addrcpt('<\\udcff@b>', None)", AddRecipient("<\udcff@b>")),
        (
            "addrcpt('<a@b>', '')",
            AddRecipient("<a@b>", "", with_params=True),
        ),
        (
            "addrcpt(rcpt='<a@b>', params='NOTIFY=NEVER X=1')",
            AddRecipient("<a@b>", "NOTIFY=NEVER X=1", with_params=True),
        ),
        ("delrcpt('<a@b>')", DeleteRecipient("<a@b>")),
        ("delrcpt(rcpt=b'a@b')", DeleteRecipient("a@b")),
        ("chgfrom('<a@b>')", ChangeSender("<a@b>")),
        ("chgfrom('<>')", ChangeSender("<>")),
        ("chgfrom('<a@b>', None)", ChangeSender("<a@b>")),
        ("chgfrom(sender=b'<a@b>', params=b'RET=HDRS')", ChangeSender("<a@b>", "RET=HDRS")),
        ("quarantine('held for review')", Quarantine("held for review")),
        ("quarantine(reason=b'\\xff')", Quarantine("\udcff")),
        ("replacebody(b'new\\r\\n')", ReplaceBody(b"new\r\n")),
        ("replacebody(body='grün\\udcff\\0')", ReplaceBody("grün".encode() + b"\xff\0")),
        ("replacebody(b'')", ReplaceBody(b"")),
        ("replacebody('')", ReplaceBody(b"")),
        ("replacebody(bytearray(b'abc'))", ReplaceBody(b"abc")),
        ("replacebody(memoryview(b'abc')[1:])", ReplaceBody(b"bc")),
        ("replacebody(__import__('array').array('H', [0x4141, 0x4242]))", ReplaceBody(b"AABB")),
    ],
)
def test_each_action_on_the_wire(scripted: Any, call: str, sent: Any) -> None:
    with session(scripted, eom=f"attempt(lambda: ctx.{call})") as each:
        reply = each.message()
    assert each.said() == [("returned", None)]
    assert reply.modifications == (sent,)
    assert reply.verdict is Verdict.CONTINUE


def test_actions_keep_their_order(scripted: Any) -> None:
    body = "\n".join(f"ctx.addheader('X-{n}', '{n}')" for n in range(300))
    with session(scripted, eom=body) as each:
        reply = each.message()
    assert reply.modifications == tuple(AddHeader(b"X-%d" % n, b"%d" % n) for n in range(300))


def test_progress(scripted: Any) -> None:
    with session(scripted, eom="say(ctx.progress(), ctx.progress())") as each:
        reply = each.message()
    assert (reply.progress, reply.verdict) == (2, Verdict.CONTINUE)
    assert each.said() == [(None, None)]


def test_whatever_a_callback_received_can_be_written_back(scripted: Any) -> None:
    with session(
        scripted,
        connect="store.client = args",
        helo="store.helo = args[0]",
        envfrom="store.sender = args",
        envrcpt="store.rcpt = args",
        header="store.header = args",
        eom="""
            ctx.addheader('X-Host', store.client[0])
            ctx.addheader('X-Path', store.client[2])
            ctx.addheader('X-Helo', store.helo)
            ctx.addheader('X-Macro', ctx.getsymval('{m}'))
            ctx.addheader(*store.header)
            ctx.chgheader(store.header[0], 1, store.header[1])
            ctx.chgfrom(*store.sender)
            ctx.delrcpt(store.rcpt[0])
            ctx.addrcpt(*store.rcpt)
            ctx.quarantine(store.helo)
            ctx.replacebody(store.helo)
            """,
    ) as each:
        each.connect(ALL_BYTES, b"/" + ALL_BYTES[-100:], macros={"{m}": ALL_BYTES})
        each.mta.helo(ALL_BYTES)
        each.mta.mail(ALL_BYTES, ALL_BYTES)
        each.mta.rcpt(ALL_BYTES, ALL_BYTES)
        each.mta.data()
        reply = each.content([(NAME_BYTES, ALL_BYTES)])
    text = ALL_BYTES.decode("utf-8", "surrogateescape")
    assert reply.modifications == (
        AddHeader(b"X-Host", ALL_BYTES),
        AddHeader(b"X-Path", b"/" + ALL_BYTES[-100:]),
        AddHeader(b"X-Helo", ALL_BYTES),
        AddHeader(b"X-Macro", ALL_BYTES),
        AddHeader(NAME_BYTES, ALL_BYTES),
        ChangeHeader(1, NAME_BYTES, ALL_BYTES),
        ChangeSender(text, text),
        DeleteRecipient(text),
        AddRecipient(text, text, with_params=True),
        Quarantine(text),
        ReplaceBody(ALL_BYTES),
    )


def test_a_folded_header_goes_back_as_it_came(scripted: Any) -> None:
    value = b"one\n\ttwo\n three"
    with session(scripted, header="store.h = args", eom="ctx.addheader(*store.h)") as each:
        each.envelope()
        reply = each.content([("X-Folded", value)])
    assert reply.modifications == (AddHeader(b"X-Folded", value),)


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("a\r\n b", b"a\n b"),
        ("a\r\n\tb\n c", b"a\n\tb\n c"),
        ("a\n", b"a"),
        ("a\r\n", b"a"),
        ("a\r\n b\r\n", b"a\n b"),
        ("\n", b""),
        ("\n a", b"\n a"),
        (b"a\r\n \xff", b"a\n \xff"),
        ("a\n \n b", b"a\n \n b"),
    ],
)
@pytest.mark.parametrize("call", ["addheader('X', {!r})", "chgheader('X', 1, {!r})"])
def test_folds(scripted: Any, call: str, value: Any, sent: bytes) -> None:
    with session(scripted, eom=f"ctx.{call.format(value)}") as each:
        reply = each.message()
    assert [each.value for each in reply.modifications] == [sent]


# --- bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 65534, 65535, 65536, 131071, 20_000_001])
def test_bodies_of_any_size(scripted: Any, size: int) -> None:
    body = f"ctx.replacebody((bytes(range(251)) * ({size} // 251 + 1))[:{size}])"
    with session(scripted, eom=body) as each:
        reply = each.message()
    chunks = [each.chunk for each in reply.modifications]
    assert b"".join(chunks) == (bytes(range(251)) * (size // 251 + 1))[:size]
    assert all(len(chunk) == 65535 for chunk in chunks[:-1])


def test_a_body_beyond_what_libmilter_takes_in_one_call(scripted: Any) -> None:
    """Its size there is an int, and this module's pieces are 65535 KiB."""
    size = 65535 * 1024 + 5
    with session(scripted, eom=f"ctx.replacebody(bytes({size - 1}) + b'!')") as each:
        reply = each.message()
    chunks = [each.chunk for each in reply.modifications]
    assert sum(map(len, chunks)) == size
    assert chunks[-1] == b"\0\0\0\0!"


def test_a_body_that_is_a_file_in_memory(scripted: Any) -> None:
    body = """
        import mmap, tempfile
        with tempfile.TemporaryFile() as file:
            file.write(b"line\\r\\n" * 50000)
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                ctx.replacebody(view)
    """
    with session(scripted, eom=body) as each:
        reply = each.message()
    assert b"".join(each.chunk for each in reply.modifications) == b"line\r\n" * 50000


def test_further_bodies_append(scripted: Any) -> None:
    with session(scripted, eom="ctx.replacebody('a'); ctx.replacebody(b'b')") as each:
        reply = each.message()
    assert reply.modifications == (ReplaceBody(b"a"), ReplaceBody(b"b"))


def test_a_buffer_is_free_again_after_the_call(scripted: Any) -> None:
    body = "b = bytearray(b'abc'); ctx.replacebody(b); b.extend(b'd'); ctx.replacebody(b)"
    with session(scripted, eom=body) as each:
        reply = each.message()
    assert reply.modifications == (ReplaceBody(b"abc"), ReplaceBody(b"abcd"))


@pytest.mark.parametrize("body", ["None", "1", "['a']", "memoryview(b'abcd')[::2]"])
def test_what_is_no_body(scripted: Any, body: str) -> None:
    with session(scripted, eom=f"attempt(lambda: ctx.replacebody({body}))") as each:
        assert each.message().modifications == ()
    ((outcome, kinds, _),) = each.said()
    assert outcome == "raised"
    assert kinds[0] in ("TypeError", "BufferError")


# --- refusals ----------------------------------------------------------------------------------

NUL = "must not hold NUL"
LINE = "must not hold CR or LF"
NAME = "must not hold a colon, a space or a control character"
FOLD = "CR and LF are only allowed in a fold, before space or tab"
EMPTY = "must not be empty"
SURROGATE = "cannot be encoded, as it holds a lone surrogate"


def refusals() -> list[tuple[str, str, str, str]]:
    """(call, argument, rule, value)"""
    lines = [
        ("'a\\0b'", NUL),
        ("b'a\\0b'", NUL),
        ("'\\0'", NUL),
        ("'a\\rb'", LINE),
        ("'a\\nb'", LINE),
        ("'a\\r\\n b'", LINE),
        ("'a\\n'", LINE),
        ("b'a\\r\\nRCPT TO:<x>'", LINE),
        ("'\\ud800'", SURROGATE),
        ("'\\udc41'", SURROGATE),
    ]
    names = [(value, NUL) for value, rule in lines if rule is NUL]
    names += [
        ("''", EMPTY),
        ("b''", EMPTY),
        ("'\\udc0a'", SURROGATE),
        *((repr(f"X{char}Y"), NAME) for char in (":", " ", "\t", "\r", "\n", "\x01", "\x7f")),
        ("b'X: y'", NAME),
        ("' X'", NAME),
    ]
    values = [(value, NUL) for value, rule in lines if rule is NUL]
    values += [
        *((repr(value), FOLD) for value in ("a\rb", "a\r b", "a\nb", "a\r\nb", "a\n\nb")),
        *((repr(value), FOLD) for value in ("a\n\n", "a\r\n\r\n", "a\r", "\r", "a\n\r\n b")),
        *((repr(value), FOLD) for value in ("a\nX-Forged: yes", b"a\r\nX-Forged: yes")),
        *((repr(value), FOLD) for value in ("a\r\r\n b", "a\n b\nc", "a\n\x0bb", "a\n\xa0b")),
        ("'\\ud800'", SURROGATE),
    ]
    width = "must fit into 32 bits"
    nonempty = [*lines, ("''", EMPTY), ("b''", EMPTY)]
    table: list[tuple[str, str, list[tuple[str, str]]]] = [
        ("addheader({}, 'value')", "name", names),
        ("addheader({}, 'value', 0)", "name", names[:6]),
        ("addheader('X', {})", "value", values),
        ("addheader('X', {}, 1)", "value", values[:6]),
        ("chgheader({}, 1, 'value')", "name", names),
        ("chgheader('X', 1, {})", "value", values),
        ("addheader('X', 'value', {})", "idx", [(str(2**31), width), (str(2**63), width)]),
        (
            "chgheader('X', {}, 'value')",
            "idx",
            [("-1", "must not be negative"), (str(2**31), width), (str(2**63), width)],
        ),
        ("addrcpt({})", "rcpt", nonempty),
        ("addrcpt({}, 'X=1')", "rcpt", nonempty),
        ("addrcpt('<a@b>', {})", "params", lines),
        ("delrcpt({})", "rcpt", nonempty),
        ("chgfrom({})", "sender", nonempty),
        ("chgfrom('<a@b>', {})", "params", lines),
        ("quarantine({})", "reason", nonempty),
        ("getsymval({})", "name", [(value, rule) for value, rule in lines if rule is not LINE]),
    ]
    return [
        (call.format(value), argument, rule, value)
        for call, argument, bad in table
        for value, rule in bad
    ]


REFUSALS = refusals()


def test_what_could_forge_protocol_or_headers_is_refused(scripted: Any) -> None:
    """One session for all: that each is refused, how, and that nothing of it went out."""
    body = "\n".join(f"attempt(lambda: ctx.{call})" for call, *_ in REFUSALS)
    with session(scripted, eom=body) as each:
        reply = each.message()
    assert reply.modifications == ()
    assert reply.verdict is Verdict.CONTINUE
    said = each.said()
    assert len(said) == len(REFUSALS)
    for (call, argument, rule, value), (outcome, *rest) in zip(REFUSALS, said):
        assert outcome == "raised", call
        kinds, text = rest
        assert {"error", "ValueError"} < set(kinds), call
        method = call.partition("(")[0]
        shown = repr(eval(value))
        assert text == f"{method}: {argument}: {rule}: {shown}", call


def test_a_long_value_is_cut_in_the_error(scripted: Any) -> None:
    with session(scripted, eom="attempt(lambda: ctx.addheader('X', 'a\\n' * 10**6))") as each:
        each.message()
    ((_, _, text),) = each.said()
    assert text.endswith("a\\na...")
    assert len(text) < 200


@pytest.mark.parametrize(
    "call",
    [
        "addheader(1, 'a')",
        "addheader('a', None)",
        "addheader('a', 1)",
        "addheader('a', bytearray(b'a'))",
        "addheader('a')",
        "addheader('a', 'b', None)",
        "addheader('a', 'b', '0')",
        "chgheader('a', '1', 'b')",
        "chgheader('a', None, 'b')",
        "chgheader('a', 1)",
        "chgheader(None, 1, 'a')",
        "addrcpt(None)",
        "addrcpt('a', 1)",
        "delrcpt(None)",
        "delrcpt(['a'])",
        "chgfrom(None)",
        "quarantine(None)",
        "quarantine(1)",
        "progress(1)",
        "getsymval(None)",
        "getsymval(1)",
        "addheader('a', 'b', unknown=1)",
    ],
)
def test_arguments_of_another_type(scripted: Any, call: str) -> None:
    with session(scripted, eom=f"attempt(lambda: ctx.{call})") as each:
        assert each.message().modifications == ()
    ((outcome, kinds, _),) = each.said()
    assert (outcome, kinds[0]) == ("raised", "TypeError")


# --- where, and whether it was agreed ----------------------------------------------------------

ACTIONS = {
    "addheader('a', 'b')": ("smfi_addheader", "ADDHDRS"),
    "addheader('a', 'b', 0)": ("smfi_insheader", "ADDHDRS"),
    "chgheader('a', 1, 'b')": ("smfi_chgheader", "CHGHDRS"),
    "addrcpt('a')": ("smfi_addrcpt", "ADDRCPT"),
    "addrcpt('a', 'X=1')": ("smfi_addrcpt_par", "ADDRCPT_PAR"),
    "delrcpt('a')": ("smfi_delrcpt", "DELRCPT"),
    "chgfrom('a')": ("smfi_chgfrom", "CHGFROM"),
    "replacebody(b'a')": ("smfi_replacebody", "CHGBODY"),
    "quarantine('a')": ("smfi_quarantine", "QUARANTINE"),
}


@pytest.mark.parametrize("call", ACTIONS)
def test_an_action_that_was_not_negotiated(scripted: Any, call: str) -> None:
    name, flag = ACTIONS[call]
    others = Action(int(Offer().actions) & ~int(Action[flag]))
    with session(scripted, offer=Offer(actions=others), eom=f"attempt(lambda: ctx.{call})") as each:
        assert each.message().modifications == ()
    ((outcome, kinds, text),) = each.said()
    assert outcome == "raised"
    assert "error" in kinds
    assert text == f"{name}: {flag} was not negotiated with the MTA"


@pytest.mark.parametrize("call", ACTIONS)
def test_an_action_outside_the_end_of_the_message(scripted: Any, call: str) -> None:
    stages = ["connect", "helo", "envfrom", "envrcpt", "data", "header", "eoh", "body"]
    stages += ["unknown", "abort", "close"]
    bodies = dict.fromkeys(stages, f"attempt(lambda: ctx.{call})")
    with session(scripted, **bodies) as each:
        each.reach("body")
        each.mta.abort()
    name = ACTIONS[call][0]
    said = each.said()
    assert len(said) == len(stages)
    for outcome, kinds, text in said:
        assert outcome == "raised"
        assert "error" in kinds
        assert text == f"{name}: only allowed in the eom callback"


def test_progress_is_sent_at_the_end_of_the_message_alone(run_filter: Any) -> None:
    """libmilter would send it anywhere, and sendmail gives up a filter that does."""
    running = run_filter("scripted", "", "args[0][1] = 0\nsay(ctx.progress())")
    with session(running, **dict.fromkeys(STAGES, "say(ctx.progress())")) as each:
        mta = each.mta
        replies = [each.connect(), mta.helo("client.example"), mta.unknown("XBOGUS")]
        replies += [mta.mail("<alice@example.com>"), mta.rcpt("<bob@example.org>"), mta.data()]
        replies += [mta.header("Subject", "hello"), mta.eoh(), mta.body(b"text\r\n"), mta.eom()]
        assert [reply.progress for reply in replies] == [0] * 9 + [1]
        mta.mail("<alice@example.com>")
        mta.abort()
    assert each.said() == [(None,)] * 13


def test_progress_between_callbacks(scripted: Any) -> None:
    with session(scripted, connect="milter.kept = ctx") as each:
        each.envelope()
        with session(scripted, eom="say(milter.kept.progress())") as other:
            other.message()
        each.mta.expect_nothing(0.1)
    assert other.said() == [(None,)]
    with session(scripted, eom="attempt(milter.kept.progress)") as other:
        other.message()
    assert [said[2] for said in other.said()] == ["bad context"]


@pytest.mark.parametrize("call", [*ACTIONS, "getsymval('i')", "setreply('550')"])
def test_an_action_between_callbacks(scripted: Any, call: str) -> None:
    with session(scripted, connect="milter.kept = ctx") as each:
        each.envelope()
        with session(scripted, eom=f"attempt(lambda: milter.kept.{call})") as other:
            other.message()
    ((outcome, kinds, text),) = other.said()
    assert outcome == "raised"
    assert "error" in kinds
    assert "only allowed " in text


def test_an_action_from_another_thread_in_eom(scripted: Any) -> None:
    body = """
        import threading
        threads = [threading.Thread(target=ctx.addheader, args=("X", str(n))) for n in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    with session(scripted, eom=body) as each:
        reply = each.message()
    assert sorted(int(each.value) for each in reply.modifications) == list(range(20))


def test_an_action_on_a_connection_that_the_mta_has_left(scripted: Any) -> None:
    """The write fails; the callback hears of it, and the filter lives on."""
    body = """
        say("in eom")
        import time
        for _ in range(2000):
            try:
                ctx.replacebody(bytes(10**6))
            except milter.error as exc:
                return say(str(exc)) or milter.CONTINUE
    """
    with session(scripted, eom=body) as each:
        each.envelope()
        each.mta.eoh()
        each.mta.send_packet(b"E")
        each.next()
        each.mta.close()
    assert each.said()[1:] == [("smfi_replacebody failed: the connection to the MTA is broken",)]


# --- macros ------------------------------------------------------------------------------------


def test_macros(scripted: Any) -> None:
    body = """
        for name in ("i", "{i}", "{mail_addr}", "mail_addr", "{none}", "j", "{j}", b"{mail_addr}"):
            say(name, ctx.getsymval(name))
    """
    with session(scripted, eom=body) as each:
        each.connect(macros={"j": "mx"})
        each.mta.helo("h")
        each.mta.mail("<a@b>", macros={"i": "4XyZ", "{mail_addr}": "a@b"})
        each.mta.rcpt("<c@d>")
        each.mta.data()
        each.content()
    said = dict(each.said())
    assert said.pop("mail_addr") in (None, "a@b")  # libmilter's affair
    assert said == {
        "i": "4XyZ",
        "{i}": "4XyZ",
        "{mail_addr}": "a@b",
        "{none}": None,
        "j": "mx",
        "{j}": "mx",
        b"{mail_addr}": "a@b",
    }


def test_a_macro_of_a_message_is_gone_with_it(scripted: Any) -> None:
    with session(scripted, envfrom="say(ctx.getsymval('i'))") as each:
        each.connect()
        each.mta.helo("h")
        each.mta.mail("<a@b>", macros={"i": "first"})
        each.mta.abort()
        each.mta.mail("<a@b>", macros={"i": ""})
    assert each.said() == [("first",), ("",)]


@pytest.mark.parametrize("index", [2**31, 2**32, 2**32 + 1, 2**70, -(2**70), -(2**32) + 1])
def test_an_index_out_of_range(run_filter, index):
    with session(
        run_filter("scripted"), eom=f"attempt(lambda: ctx.chgheader('X', {index}, 'v'))"
    ) as each:
        assert each.message().modifications == ()
    ((outcome, kinds, _),) = each.said()
    assert outcome == "raised"
    assert "OverflowError" in kinds or {"error", "ValueError"} < set(kinds)


def test_a_surrogate_that_stands_for_no_byte_in_a_body(run_filter):
    with session(run_filter("scripted"), eom="attempt(lambda: ctx.replacebody('\\ud800'))") as each:
        each.message()
    ((_, kinds, _),) = each.said()
    assert {"error", "ValueError"} < set(kinds)


@pytest.mark.parametrize(
    "call",
    [
        "addheader('X', 'b' * 70000)",
        "addheader('X', 'b' * 70000, 0)",
        "chgheader('X', 1, 'b' * 70000)",
        "addrcpt('b' * 70000)",
        "delrcpt('b' * 70000)",
        "chgfrom('b' * 70000)",
        "quarantine('b' * 70000)",
    ],
)
def test_what_is_too_large_for_a_packet_says_so(run_filter, call):
    with session(run_filter("scripted"), eom=f"attempt(lambda: ctx.{call})") as each:
        assert each.message().modifications == ()
    ((outcome, kinds, text),) = each.said()
    assert outcome == "raised"
    assert {"error", "ValueError"} < set(kinds)
    assert "65535" in text or "too l" in text or "longer" in text, text
