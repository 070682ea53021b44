"""What the package asks the extension: the rules of what may be sent and returned, socket names."""

from __future__ import annotations

import itertools
from typing import Any

import milter
import pytest

from Milter._protocol import OPTIONAL_CALLBACKS
from Milter.testctx import TestCtx

# --- socket names

NAMES: list[tuple[str, tuple[Any, ...]]] = [
    ("/run/a", ("unix", "/run/a", None)),
    ("unix:/run/a", ("unix", "/run/a", None)),
    ("local:a/b", ("unix", "a/b", None)),
    (":a", ("unix", "a", None)),
    ("UNIX:/run/a", ("unix", "/run/a", None)),
    ("unix:/run/a:b@c", ("unix", "/run/a:b@c", None)),
    ("unix:/run/b\udcff", ("unix", "/run/b\udcff", None)),
    ("inet:8800", ("inet", None, "8800")),
    ("inet:0@127.0.0.1", ("inet", "127.0.0.1", "0")),
    ("inet:smtp@mail.example", ("inet", "mail.example", "smtp")),
    ("inet:65535@[127.0.0.1]", ("inet", "127.0.0.1", "65535")),
    ("inet6:8800@[::1]", ("inet6", "::1", "8800")),
    ("inet6:8800@::1", ("inet6", "::1", "8800")),
    ("fd:3", ("fd", 3, None)),
]
POSTFIX: list[tuple[str, tuple[Any, ...]]] = [
    ("inet:127.0.0.1:8800", ("inet", "127.0.0.1", "8800")),
    ("inet:mail.example:8800", ("inet", "mail.example", "8800")),
    ("inet:[::1]:8800", ("inet6", "::1", "8800")),
    ("inet6:[::1]:8800", ("inet6", "::1", "8800")),
]
REFUSED = [
    ("", "path is missing"),
    ("unix:", "path is missing"),
    ("a/b:c", "unknown scheme"),
    ("http://x", "unknown scheme"),
    ("inet:", "port is missing"),
    ("inet:@host", "port is missing"),
    ("inet:99@", "host after '@' is missing"),
    ("inet:65536", "number up to 65535"),
    ("inet:8x@host", "number up to 65535"),
    ("inet6:25@[::1", "']' after the host"),
    ("fd:", "number of a descriptor"),
    ("fd:-1", "number of a descriptor"),
    ("fd:12345678901", "number of a descriptor"),
]


@pytest.mark.parametrize(("name", "parts"), NAMES)
def test_a_socket_name_is_taken_apart(name: str, parts: tuple[Any, ...]) -> None:
    assert milter._parse_socket(name) == parts
    assert milter._parse_socket(name, True) == parts


@pytest.mark.parametrize(("name", "parts"), POSTFIX)
def test_the_order_of_postfix_is_taken_where_it_is_asked_for(
    name: str, parts: tuple[Any, ...]
) -> None:
    assert milter._parse_socket(name, True) == parts
    with pytest.raises(ValueError, match="the order of Postfix"):
        milter._parse_socket(name)


@pytest.mark.parametrize(("name", "why"), REFUSED)
def test_what_is_no_socket_name_is_refused_as_by_setconn(name: str, why: str) -> None:
    for either in (False, True):
        with pytest.raises(ValueError, match=why):
            milter._parse_socket(name, either)
    with pytest.raises(milter.InvalidArgument, match=why):
        milter.setconn(name)


@pytest.mark.parametrize("name", ["inet:host:70000", "inet::25", "inet:[::1:25"])
def test_the_order_of_postfix_has_to_be_whole(name: str) -> None:
    with pytest.raises(ValueError, match=r"port|host"):
        milter._parse_socket(name, True)


# --- what is sent


def test_arguments_are_checked_as_by_the_context() -> None:
    assert milter._text("call", "x", "a\udcff\n") == b"a\xff\n"
    assert milter._line("call", "x", b"a") == b"a"
    assert milter._nonempty_line("call", "x", "ü") == "ü".encode()
    assert milter._header_name("call", "X-A") == b"X-A"
    assert milter._header_value("call", "a\r\n b\r\n") == b"a\n b"


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        ("_text", ("call", "x", "a\0"), "call: x: must not hold NUL: 'a"),
        ("_text", ("call", "x", "\ud800"), "call: x: cannot be encoded, as it holds a lone"),
        ("_line", ("call", "x", "a\n"), "call: x: must not hold CR or LF"),
        ("_nonempty_line", ("call", "x", ""), "call: x: must not be empty"),
        ("_header_name", ("call", "a:"), "call: name: must not hold a colon"),
        ("_header_value", ("call", "a\nb"), "call: value: CR and LF are only allowed in a fold"),
        ("_check_reply", ("250",), "setreply: rcode: must be three digits"),
        ("_check_reply", ("550", "7"), "setreply: xcode: must have the form"),
        ("_check_reply", ("550", None, "50%"), "setreply: msg: '%' must be doubled"),
        ("_check_reply", ("550", None, *"x" * 33), "at most 32 lines: 33 were given"),
    ],
)
def test_what_breaks_a_rule_is_refused(check: str, arguments: Any, message: str) -> None:
    with pytest.raises(milter.InvalidArgument) as caught:
        getattr(milter, check)(*arguments)
    assert message in str(caught.value)


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="call: x must be str or bytes, not int"):
        milter._text("call", "x", 1)


def test_a_reply_is_checked() -> None:
    assert milter._check_reply("550") == (b"550", None, [])
    assert milter._check_reply("451", xcode="4.7.1", msg="later") == (b"451", b"4.7.1", [b"later"])
    assert milter._check_reply(b"550", None, None, "a", b"b") == (b"550", None, [b"a", b"b"])
    with pytest.warns(RuntimeWarning, match="class of the enhanced code 4.7.1 is not that of 550"):
        milter._check_reply("550", "4.7.1")


def test_an_index_is_checked() -> None:
    assert milter._header_index("addheader", -(1 << 70), True) == -1
    assert milter._header_index("chgheader", 7, False) == 7
    for below_zero in (False, True):
        with pytest.raises(milter.InvalidArgument, match="call: idx: must fit into 32 bits: 2147"):
            milter._header_index("call", 1 << 31, below_zero)
    with pytest.raises(milter.InvalidArgument, match="call: idx: must not be negative: -1"):
        milter._header_index("call", -1, False)
    with pytest.raises(TypeError):
        milter._header_index("call", "1", True)


def test_a_list_of_macros_is_checked() -> None:
    assert milter._symlist(milter.M_EOH, "i {x}") == b"i {x}"
    for stage in (milter.M_CONNECT - 1, milter.M_EOH + 1, 1 << 70):
        with pytest.raises(milter.InvalidArgument, match="setsymlist: stage: must be one of"):
            milter._symlist(stage, "i")
    with pytest.raises(milter.InvalidArgument, match="setsymlist: macros: must not hold CR or LF"):
        milter._symlist(milter.M_EOH, "i\n")


# --- when


def test_an_action_has_its_moment() -> None:
    milter._check_moment("smfi_addheader", "eom", milter.ADDHDRS)
    milter._check_moment("smfi_setsymlist", "negotiate", 0)
    for call, step, why in (
        ("smfi_addheader", "body", "smfi_addheader: only allowed in the eom callback"),
        ("smfi_addheader", None, "smfi_addheader: only allowed in the eom callback"),
        ("smfi_addheader", "eom", "smfi_addheader: ADDHDRS was not negotiated with the MTA"),
        ("smfi_setsymlist", "eom", "smfi_setsymlist: only allowed in the negotiate callback"),
    ):
        with pytest.raises(milter.error, match=f"^{why}$"):
            milter._check_moment(call, step, milter.CURR_ACTS & ~milter.ADDHDRS)
    with pytest.raises(ValueError, match="no action of that name"):
        milter._check_moment("addheader", "eom", 0)
    with pytest.raises(ValueError, match="no callback of that name"):
        milter._check_moment("smfi_addheader", "hello", 0)


def test_the_steps_are_those_of_the_protocol() -> None:
    steps = milter._steps()
    assert steps["helo"] == (milter.P_NR_HELO, milter.P_NOHELO, False)
    assert steps["body"] == (milter.P_NR_BODY, milter.P_NOBODY, True)
    assert steps["eom"] == (0, 0, True)
    options = {"hello" if name == "helo" else name: each[:2] for name, each in steps.items()}
    assert {name: each for name, each in options.items() if any(each)} == OPTIONAL_CALLBACKS


# --- what is returned


def test_a_verdict_is_judged() -> None:
    assert milter._verdict("body", milter.SKIP, milter.P_SKIP) == milter.SKIP
    assert milter._verdict("body", milter.CONTINUE, milter.P_NR_BODY) == milter.NOREPLY
    assert milter._verdict("body", milter.NOREPLY, milter.P_NR_BODY) == milter.NOREPLY
    assert milter._verdict("close", None, 0) == milter.CONTINUE


@pytest.mark.parametrize(
    ("step", "result", "protocol", "why"),
    [
        ("eom", None, 0, "not an int"),
        ("eom", 1 << 70, 0, "not one of CONTINUE"),
        ("eom", milter.SKIP, milter.P_SKIP, "SKIP is only for steps that repeat"),
        ("body", milter.SKIP, 0, "SKIP was not negotiated"),
        ("helo", milter.DISCARD, 0, "DISCARD is not allowed before"),
        ("header", milter.NOREPLY, 0, "NOREPLY was not negotiated"),
        ("header", milter.REJECT, milter.P_NR_HDR, "no reply was negotiated"),
    ],
)
def test_what_is_no_verdict_is_refused(step: str, result: Any, protocol: int, why: str) -> None:
    with pytest.raises(milter.error, match=f"the {step} callback returned .*: {why}"):
        milter._verdict(step, result, protocol)


def test_which_verdict_ends_a_message() -> None:
    steps = ("envfrom", "envrcpt", "body", "eom")
    verdicts = (milter.CONTINUE, milter.ACCEPT, milter.REJECT)
    found = [milter._ends_message(*each) for each in itertools.product(steps, verdicts)]
    no, yes = False, True
    assert found == [no, yes, yes, no, yes, no, no, yes, yes, yes, yes, yes]
    with pytest.raises(ValueError, match="no callback of that name"):
        milter._ends_message("hello", 0)


def test_what_negotiate_may_return() -> None:
    for result in (milter.CONTINUE, milter.ALL_OPTS, milter.REJECT):
        assert milter._verdict("negotiate", result, 0) == result
    for result in (None, milter.ACCEPT, 1 << 70):
        with pytest.raises(milter.error, match="not CONTINUE, ALL_OPTS or REJECT"):
            milter._verdict("negotiate", result, 0)


def test_which_reply_goes_out(caplog: pytest.LogCaptureFixture) -> None:
    assert milter._sends_reply("envfrom", milter.REJECT, "550")
    assert milter._sends_reply("envfrom", milter.TEMPFAIL, "451")
    assert not milter._sends_reply("envfrom", milter.CONTINUE, "550")
    assert caplog.messages == []
    assert not milter._sends_reply("envfrom", milter.TEMPFAIL, "550")
    assert "envfrom callback returned TEMPFAIL after setreply with a 5xx code" in caplog.text


def test_the_stand_in_warns_of_the_line_of_the_filter() -> None:
    with pytest.warns(RuntimeWarning, match="class of the enhanced code") as caught:
        TestCtx().setreply("550", "4.7.1")
    assert [each.filename for each in caught] == [__file__]
