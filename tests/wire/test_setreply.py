"""Replies that a filter sets: what goes out, what is refused and why."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from support.wire import session

from Milter.mta import SmtpReply, Verdict


@pytest.fixture(scope="module")
def scripted(run_shared_filter: Callable[..., Any]) -> Any:
    return run_shared_filter("scripted")


LONG = "x" * 980
MANY = [f"line {n}" for n in range(32)]


@pytest.mark.parametrize(
    ("arguments", "reply"),
    [
        ("'550'", SmtpReply(550, None, ("",))),
        ("'550', '5.7.1'", SmtpReply(550, "5.7.1", ("",))),
        ("'550', None, 'no'", SmtpReply(550, None, ("no",))),
        ("'550', '5.7.1', 'no'", SmtpReply(550, "5.7.1", ("no",))),
        ("b'550', b'5.7.1', b'no'", SmtpReply(550, "5.7.1", ("no",))),
        ("rcode='550', xcode='5.7.1', msg='no'", SmtpReply(550, "5.7.1", ("no",))),
        ("'599', '5.999.999', 'no'", SmtpReply(599, "5.999.999", ("no",))),
        ("'500', '5.0.0', 'no'", SmtpReply(500, "5.0.0", ("no",))),
        ("'550', '5.7.1', 'one', 'two'", SmtpReply(550, "5.7.1", ("one", "two"))),
        ("'550', None, 'one', b'two', 'three'", SmtpReply(550, "5.0.0", ("one", "two", "three"))),
        ("'550', '5.7.1', 'one', None, 'three'", SmtpReply(550, "5.7.1", ("one", "three"))),
        ("'550', '5.7.1', None, 'two'", SmtpReply(550, "5.7.1", ("two",))),
        ("'550', '5.7.1', 'one', ''", SmtpReply(550, "5.7.1", ("one", ""))),
        ("'550', '5.7.1', '100%%'", SmtpReply(550, "5.7.1", ("100%",))),
        ("'550', '5.7.1', '%%%%n %%s'", SmtpReply(550, "5.7.1", ("%%n %s",))),
        ("'550', '5.7.1', 'grün \\udcff'", SmtpReply(550, "5.7.1", ("grün \udcff",))),
        (f"'550', '5.7.1', {LONG!r}", SmtpReply(550, "5.7.1", (LONG,))),
        (f"'550', '5.7.1', 'a', {LONG!r}", SmtpReply(550, "5.7.1", ("a", LONG))),
        (f"'550', '5.7.1', {'é' * 490!r}", SmtpReply(550, "5.7.1", ("é" * 490,))),
        (f"'550', '5.7.1', *{MANY!r}", SmtpReply(550, "5.7.1", tuple(MANY))),
        (f"'550', '5.7.1', *{[LONG] * 32!r}", SmtpReply(550, "5.7.1", (LONG,) * 32)),
    ],
    ids=[str(n) for n in range(21)],
)
@pytest.mark.parametrize("stage", ["envfrom", "eom"])
def test_a_reply_goes_out_as_it_was_set(
    scripted: Any, stage: str, arguments: str, reply: SmtpReply
) -> None:
    body = f"attempt(lambda: ctx.setreply({arguments})); return milter.REJECT"
    with session(scripted, **{stage: body}) as each:
        got = each.reach(stage)
    assert each.said() == [("returned", None)]
    assert (got.verdict, got.smtp) == (Verdict.REJECT, reply)


def test_a_temporary_one(scripted: Any) -> None:
    body = "ctx.setreply('451', '4.7.1', 'later', 'please'); return milter.TEMPFAIL"
    with session(scripted, envrcpt=body) as each:
        got = each.reach("envrcpt")
    assert (got.verdict, got.smtp) == (
        Verdict.TEMPFAIL,
        SmtpReply(451, "4.7.1", ("later", "please")),
    )


def test_the_last_reply_counts(scripted: Any) -> None:
    body = "ctx.setreply('451', '4.7.1', 'a', 'b'); ctx.setreply('550'); return milter.REJECT"
    with session(scripted, eom=body) as each:
        assert each.reach("eom").smtp == SmtpReply(550, None, ("",))


CODE = "rcode: must be three digits, the first 4 or 5"
ENHANCED = "xcode: must have the form of '5.7.1'"
PERCENT = "msg: '%' must be doubled"
LENGTH = "msg: a line must not be longer than 980 bytes"
LINE = "msg: must not hold CR or LF"


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        *((f"{code!r}", CODE) for code in ("", "5", "55", "5500", "250", "354", "650", "55x")),
        *((f"{code!r}", CODE) for code in ("5.5", " 550", "550 ", "-50", "45\n", "٤٥٠", b"250")),
        ("'5\\x000'", "rcode: must not hold NUL"),
        *((f"'550', {code!r}", ENHANCED) for code in ("", "5", "5.7", "5.7.", "5.7.1.1", "5..1")),
        *((f"'550', {code!r}", ENHANCED) for code in ("5.7.1 ", "3.7.1", "x.7.1", "5.1234.1")),
        *((f"'550', {code!r}", ENHANCED) for code in ("5.7.1234", "5.7.x", "55.7.1", " 5.7.1")),
        ("'550', '5.7.1\\0'", "xcode: must not hold NUL"),
        ("'550', '5.7.1', 'a\\rb'", LINE),
        ("'550', '5.7.1', 'a\\nb'", LINE),
        ("'550', '5.7.1', 'a\\r\\n250 ok'", LINE),
        ("'550', '5.7.1', 'a', b'b\\n'", LINE),
        ("'550', '5.7.1', 'a\\0b'", "msg: must not hold NUL"),
        ("'550', '5.7.1', '\\ud800'", "msg: cannot be encoded, as it holds a lone surrogate"),
        ("'550', '5.7.1', '100% sure'", PERCENT),
        ("'550', '5.7.1', '%'", PERCENT),
        ("'550', '5.7.1', '%%%'", PERCENT),
        ("'550', '5.7.1', 'a', '%s'", PERCENT),
        ("'550', '5.7.1', 'x' * 981", LENGTH),
        ("'550', '5.7.1', 'a', 'é' * 491", LENGTH),
        ("'550', '5.7.1', *['a'] * 33", "msg: a reply has at most 32 lines"),
        ("'550', '5.7.1', *['a'] * 1000", "msg: a reply has at most 32 lines"),
        ("'550', '5.7.1', *[None] * 33", "msg: a reply has at most 32 lines"),
    ],
)
def test_what_is_refused_says_which_rule(scripted: Any, arguments: str, rule: str) -> None:
    body = f"attempt(lambda: ctx.setreply({arguments})); return milter.REJECT"
    with session(scripted, eom=body) as each:
        got = each.reach("eom")
    ((outcome, kinds, text),) = each.said()
    assert outcome == "raised"
    assert {"error", "ValueError"} < set(kinds)
    assert text.startswith(f"setreply: {rule}: ")
    assert (got.verdict, got.smtp) == (Verdict.REJECT, None)


def test_a_refused_reply_leaves_the_one_before(scripted: Any) -> None:
    body = """
        ctx.setreply('550', '5.7.1', 'first')
        attempt(lambda: ctx.setreply('550', '5.7.1', 'a\\nb'))
        return milter.REJECT
    """
    with session(scripted, eom=body) as each:
        assert each.reach("eom").smtp == SmtpReply(550, "5.7.1", ("first",))


@pytest.mark.parametrize(("length", "count"), [(900, 3), (60, 29)])
def test_a_reply_that_a_packet_does_not_hold(
    run_filter: Callable[..., Any], length: int, count: int
) -> None:
    """libmilter would not send it, nor say so, and the MTA would wait for its answer."""
    running = run_filter("scripted", "milter.setmaxdatasize(2000)")
    lines = f"*['y' * {length}] * {count}"
    body = f"attempt(lambda: ctx.setreply('550', '5.7.1', {lines})); return milter.REJECT"
    with session(running, envfrom=body) as each:
        got = each.reach("envfrom")
    ((outcome, kinds, text),) = each.said()
    assert (outcome, kinds[0]) == ("raised", "InvalidArgument")
    size = (len("550-5.7.100 \r\n") + length) * count + 1
    assert text == (
        f"smfi_setreply: {size} bytes are too many, a packet to the MTA holds 2000 "
        "(see setmaxdatasize)"
    )
    assert (got.verdict, got.smtp) == (Verdict.REJECT, None)


def test_a_reply_that_a_packet_just_holds(run_filter: Callable[..., Any]) -> None:
    running = run_filter("scripted", "milter.setmaxdatasize(1500)")
    rest = 1500 - 1 - 2 * len("550-5.7.100 \r\n") - 980
    body = f"ctx.setreply('550', '5.7.100', 'y' * 980, 'z' * {rest}); return milter.REJECT"
    with session(running, envfrom=body) as each:
        assert each.reach("envfrom").smtp == SmtpReply(550, "5.7.100", ("y" * 980, "z" * rest))


@pytest.mark.parametrize(
    "arguments",
    ["", "550", "None", "'550', 5", "'550', '5.7.1', 1", "'550', '5.7.1', 'a', 1", "code='550'"],
)
def test_arguments_of_another_type(scripted: Any, arguments: str) -> None:
    with session(scripted, eom=f"attempt(lambda: ctx.setreply({arguments}))") as each:
        each.reach("eom")
    ((outcome, kinds, _),) = each.said()
    assert (outcome, kinds[0]) == ("raised", "TypeError")


@pytest.mark.parametrize(
    ("code", "enhanced"), [("550", "4.7.1"), ("450", "5.7.1"), ("550", "2.0.0")]
)
def test_an_enhanced_code_of_another_class_passes_with_a_warning(
    scripted: Any, code: str, enhanced: str
) -> None:
    verdict = "REJECT" if code[0] == "5" else "TEMPFAIL"
    body = f"""
        import warnings
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ctx.setreply("{code}", "{enhanced}", "text")
        say([(each.category.__name__, str(each.message)) for each in seen])
        return milter.{verdict}
    """
    with session(scripted, eom=body) as each:
        got = each.reach("eom")
    text = f"setreply: the class of the enhanced code {enhanced} is not that of {code}"
    assert each.said() == [([("RuntimeWarning", text)],)]
    assert got.smtp is not None
    assert (got.smtp.code, got.smtp.xcode) == (int(code), enhanced)


def test_the_warning_can_be_an_error(scripted: Any) -> None:
    body = """
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attempt(lambda: ctx.setreply("550", "4.7.1", "text"))
        return milter.REJECT
    """
    with session(scripted, eom=body) as each:
        assert each.reach("eom").smtp is None
    ((outcome, kinds, _),) = each.said()
    assert (outcome, kinds[0]) == ("raised", "RuntimeWarning")
