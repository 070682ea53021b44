"""The object layer on the wire: filter classes as applications write them."""

from __future__ import annotations

import pytest
from support.lifecycle import MESSAGE, RECIPIENTS

from Milter.mta import (
    Action,
    AddHeader,
    AddRecipient,
    Address,
    ChangeHeader,
    ChangeSender,
    InsertHeader,
    Offer,
    Stage,
    Step,
    Verdict,
)

ALL_NO_REPLY = (
    Step.NR_HDR
    | Step.NR_CONN
    | Step.NR_HELO
    | Step.NR_MAIL
    | Step.NR_RCPT
    | Step.NR_DATA
    | Step.NR_UNKN
    | Step.NR_EOH
    | Step.NR_BODY
)
POLICY = ("451", "4.3.0")


@pytest.fixture
def classes(run_filter):
    return lambda name: run_filter("filter_classes", name)


def send(filter_, message=MESSAGE, recipients=RECIPIENTS, offer=None, **options):
    with filter_.mta(offer=offer or Offer()) as mta:
        return mta.send(message, recipients=recipients, **options)


def lines(filter_, first):
    """All that the filter said of one kind, without the first word; it is stopped for that."""
    if filter_.process.poll() is None:
        filter_.stop()
    return [
        line.partition(" ")[2] for line in filter_.output.splitlines() if line.startswith(first)
    ]


def tempfailed_by_policy(reply):
    return (
        reply.verdict is Verdict.TEMPFAIL
        and reply.smtp is not None
        and (str(reply.smtp.code), reply.smtp.xcode) == POLICY
        and "untrapped exception in classes" in reply.smtp.text
    )


# --- names -----------------------------------------------------------------------------------


def test_everything_by_star(run_filter):
    filter_ = run_filter("star_import")
    ids = []
    for _ in range(2):
        message = send(filter_).message
        assert message["X-Extra-Names"] == "none"
        assert message["X-Same"] == "True"
        ids.append(int(message["X-Id"]))
    assert ids == [1, 2]
    assert filter_.stop() == 0
    assert filter_.output == ""


# --- what is replaced while the filter runs ----------------------------------------------------


def test_a_factory_that_is_replaced_makes_the_next_connections(classes):
    filter_ = classes("Replaced")
    with filter_.mta() as old:
        assert old.send(MESSAGE, recipients=RECIPIENTS).message["X-Class"] == "Replaced"
        with filter_.mta() as new:
            assert Step.NOHDRS not in new.negotiated.steps
            assert new.send(MESSAGE, recipients=RECIPIENTS).message["X-Class"] == "Second"
        # A connection keeps its object, whatever the factory is by now.
        assert old.send(MESSAGE, recipients=RECIPIENTS).message["X-Class"] == "Replaced"
    filter_.wait_for("header of Second Subject")


def test_functions_of_the_package_that_are_replaced_are_used(classes):
    filter_ = classes("Replacing")
    with filter_.mta() as mta:
        mta.send(MESSAGE, recipients=RECIPIENTS)
    filter_.wait_for("replaced close_callback")
    assert "replaced connect_callback" not in filter_.output
    with filter_.mta() as mta:
        filter_.wait_for("replaced negotiate_callback 4")
        mta.greet()
        filter_.wait_for("replaced connect_callback localhost")
        assert mta.send(MESSAGE, recipients=RECIPIENTS).message["X-Class"] == "Replacing"
    filter_.wait_for("replaced close_callback", 2)


# --- inheritance and negotiation -----------------------------------------------------------------


def test_a_subclass_that_overrides_more_gets_more(classes):
    filter_ = classes("Parent")
    with filter_.mta() as mta:
        agreed = mta.negotiated.steps
        assert Step.NOBODY | Step.NORCPT in agreed
        assert Step.NOHDRS not in agreed
        mta.send(MESSAGE, recipients=RECIPIENTS)
    filter_.wait_for("parent closed")
    with filter_.mta() as mta:
        agreed = mta.negotiated.steps
        assert not agreed & (Step.NOBODY | Step.NORCPT | Step.NOHDRS)
        assert Step.NOEOH in agreed
        assert mta.send(MESSAGE, recipients=RECIPIENTS).message["X-Class"] == "Child"
    assert lines(filter_, "envrcpt") == ["<r@example.com>"]
    assert lines(filter_, "header") == ["Subject", "Subject"]
    assert lines(filter_, "body") == ["6"]  # the first connection had none


def test_nocallback_turns_off_what_a_base_class_handles(classes):
    filter_ = classes("LessChild")
    with filter_.mta() as mta:
        assert Step.NOHDRS in mta.negotiated.steps
        assert not mta.negotiated.steps & (Step.NOBODY | Step.NORCPT)
        mta.send(MESSAGE, recipients=RECIPIENTS)
    assert lines(filter_, "header") == []
    assert lines(filter_, "body") == ["6"]


def test_nocallback_is_called_where_the_mta_sends_the_step_all_the_same(classes):
    filter_ = classes("LessChild")
    offer = Offer(steps=Step.SKIP)
    assert send(filter_, offer=offer).verdict is Verdict.ACCEPT
    assert lines(filter_, "header that is off") == ["that is off Subject"]


def test_a_wrong_result_of_nocallback_is_an_error(classes):
    filter_ = classes("WrongNoCallback")
    assert send(filter_).verdict is Verdict.ACCEPT  # never called
    result = send(filter_, offer=Offer(steps=Step.SKIP))
    assert tempfailed_by_policy(result)
    assert "RuntimeError" in filter_.wait_for("@nocallback")


def test_symlist_with_noreply(classes):
    filter_ = classes("Symlists")
    with filter_.mta() as mta:
        assert mta.negotiated.macros[Stage.MAIL] == ("i", "{auth_authen}")
        assert set(mta.negotiated.macros[Stage.RCPT]) == {"{rcpt_addr}", "{rcpt_host}"}
        assert mta.negotiated.macros[Stage.HELO] == ()
        assert Step.NR_MAIL | Step.NR_RCPT in mta.negotiated.steps
        mta.set_macros(Stage.CONNECT, {"j": "mx.example.com"})
        mta.set_macros(Stage.HELO, {"{tls_version}": "TLSv1.3"})
        mta.set_macros(Stage.MAIL, {"i": "4XyZ", "{auth_authen}": "user", "{mail_host}": "h"})
        mta.set_macros(
            Stage.RCPT, {"{rcpt_addr}": "r", "{rcpt_host}": "host", "{rcpt_mailer}": "m"}
        )
        mta.greet()
        assert mta.mail("<s@example.com>").verdict is Verdict.NO_REPLY
        assert mta.rcpt("<r@example.com>").verdict is Verdict.NO_REPLY
        assert mta.eom().verdict is Verdict.ACCEPT
    assert lines(filter_, "hello") == ["None"]
    assert lines(filter_, "envfrom") == ["4XyZ user mx.example.com"]
    assert lines(filter_, "envrcpt") == ["r host"]


def test_symlist_where_the_mta_has_none(classes):
    filter_ = classes("Symlists")
    with filter_.mta(offer=Offer(actions=Action.ADDHDRS)) as mta:
        assert not mta.negotiated.macros
        assert Step.NR_MAIL in mta.negotiated.steps  # nothing else is lost with it
        assert mta.send(MESSAGE, recipients=RECIPIENTS).verdict is Verdict.ACCEPT
    filter_.stop()
    assert "Traceback" not in filter_.output


def test_an_exception_without_reply_is_answered_at_the_next_step(classes):
    filter_ = classes("FailingSilently")
    with filter_.mta() as mta:
        assert Step.NR_HDR | Step.NR_BODY in mta.negotiated.steps
        mta.greet()
        mta.mail("<s@example.com>")
        mta.rcpt("<r@example.com>")
        assert mta.header("X-One", "fail").verdict is Verdict.NO_REPLY
        assert mta.header("X-Two", "fine").verdict is Verdict.NO_REPLY
        assert mta.body(b"body\r\n").verdict is Verdict.NO_REPLY
        assert tempfailed_by_policy(mta.eom())
        # The next message is another matter.
        assert mta.send(MESSAGE, recipients=RECIPIENTS).verdict is Verdict.ACCEPT
    assert lines(filter_, "eom") == ["of FailingSilently"]
    assert filter_.output.count("LookupError: raised in a method without reply") == 1


def test_a_wrong_result_of_noreply_is_an_error(classes):
    filter_ = classes("WrongNoReply")
    result = send(filter_)
    assert result.stage is Stage.EOM
    assert tempfailed_by_policy(result)
    assert "RuntimeError" in filter_.wait_for("@noreply")
    # To an MTA that waits, libmilter answers CONTINUE itself; the policy comes later again.
    result = send(filter_, offer=Offer(steps=Step.SKIP))
    assert result.stage is Stage.EOH
    assert tempfailed_by_policy(result)


def test_noreply_that_calls_super(classes):
    filter_ = classes("NoReplyTwice")
    with filter_.mta() as mta:
        assert Step.NR_HDR in mta.negotiated.steps
        assert mta.send(MESSAGE, recipients=RECIPIENTS).verdict is Verdict.ACCEPT
    assert lines(filter_, "header") == ["SUBJECT"]
    filter_.stop()
    assert "Traceback" not in filter_.output


def test_a_failure_in_negotiation_is_logged_and_takes_all_options(classes):
    filter_ = classes("FailingNegotiation")
    assert send(filter_).message["X-Class"] == "FailingNegotiation"
    filter_.wait_for("LookupError: raised in negotiation")
    filter_.wait_for("Traceback")
    assert lines(filter_, "header") == ["Subject"]


@pytest.mark.parametrize("version", [2, 3, 4, 6])
def test_an_older_mta(classes, version):
    filter_ = classes("Everything")
    with filter_.mta(offer=Offer.for_version(version)) as mta:
        assert mta.negotiated.version == version
        if version < 6:
            assert not mta.negotiated.steps & (ALL_NO_REPLY & ~Step.NR_HDR)
        mta.greet()
        assert mta.unknown("XYZZY").verdict is (
            Verdict.CONTINUE if version >= 3 else Verdict.NOT_SENT
        )
        result = mta.send(MESSAGE, recipients=RECIPIENTS)
    assert result.message["X-Class"] == "Everything"
    filter_.stop()
    said = [line.split()[0] for line in filter_.output.splitlines()]
    expected = ["connect", "hello", "unknown", "envfrom", "envrcpt", "data"]
    expected += ["header", "eoh", "body", "eom", "close"]
    if version < 3:
        expected.remove("unknown")
    if version < 4:
        expected.remove("data")
    assert said == expected


@pytest.mark.parametrize("steps", [Step.NONE, Step.SKIP, Step.NOHELO | Step.NR_HDR])
def test_an_mta_with_few_options(classes, steps):
    filter_ = classes("Everything")
    # An offer of no steps at all stands for those of version 1.
    with filter_.mta(offer=Offer(steps=steps)) as mta:
        if steps:
            assert not mta.negotiated.steps & ~steps
        result = mta.send(MESSAGE, recipients=RECIPIENTS)
    assert result.message["X-Class"] == "Everything"
    assert lines(filter_, "header") == ["Subject hello"]
    filter_.stop()
    assert "Traceback" not in filter_.output


def test_recipients_that_the_mta_rejected(classes):
    filter_ = classes("Rejected")
    gone = Address("gone@example.com", rejected="550 5.1.1 User unknown")
    with filter_.mta() as mta:
        assert Step.RCPT_REJ in mta.negotiated.steps
        result = mta.send(MESSAGE, recipients=[*RECIPIENTS, gone])
    assert [r.recipient.address for r in result.refused] == ["gone@example.com"]
    assert lines(filter_, "envrcpt") == [
        "<r@example.com> mailer None",
        "<gone@example.com> mailer error",
    ]
    other = classes("Everything")
    with other.mta() as mta:
        assert Step.RCPT_REJ not in mta.negotiated.steps
        mta.send(MESSAGE, recipients=[*RECIPIENTS, gone])
    assert lines(other, "envrcpt") == ["<r@example.com> mailer None"]


# --- text and bytes ------------------------------------------------------------------------------

GOOD, BAD = "J\xfcrgen".encode(), b"J\xfcrgen"
STRATEGIES = {
    "surrogateescape": ("'J\\xfcrgen'", "'J\\udcfcrgen'"),
    "bytes": ("b'J\\xc3\\xbcrgen'", "b'J\\xfcrgen'"),
    "strict": ("'J\\xfcrgen'", "b'J\\xfcrgen'"),
    "ignore": ("'J\\xfcrgen'", "'Jrgen'"),
    "replace": ("'J\\xfcrgen'", "'J\\ufffdrgen'"),
    "backslashreplace": ("'J\\xfcrgen'", "'J\\\\xfcrgen'"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decode(classes, strategy):
    filter_ = classes(f"Decoding:{strategy}")
    good, bad = STRATEGIES[strategy]
    with filter_.mta() as mta:
        assert mta.mail(GOOD, b"SIZE=1").verdict is Verdict.CONTINUE
        assert mta.rcpt(BAD, b"NOTIFY=NEVER").verdict is Verdict.CONTINUE
        for value in (GOOD, BAD):
            assert mta.header("X-Name", value).verdict is Verdict.CONTINUE
    assert lines(filter_, "header") == [f"'X-Name' {good}", f"'X-Name' {bad}"]
    as_bytes = strategy == "bytes"
    assert lines(filter_, "envfrom") == [f"{good} {'b' * as_bytes}'SIZE=1'"]
    # In the envelope all values are bytes if any one is not UTF-8.
    as_bytes = strategy in ("bytes", "strict")
    assert lines(filter_, "envrcpt") == [f"{bad} {'b' * as_bytes}'NOTIFY=NEVER'"]


def test_overriding_the_form_that_gets_bytes(classes):
    filter_ = classes("OverridesBytes")
    with filter_.mta() as mta:
        assert not mta.negotiated.steps & (Step.NOHDRS | Step.NOMAIL)
        mta.mail(BAD, b"SIZE=1")
        mta.header("X-Name", BAD)
    assert lines(filter_, "envfrom_bytes") == ["b'J\\xfcrgen' b'SIZE=1'"]
    assert lines(filter_, "header_bytes") == ["X-Name b'J\\xfcrgen'"]


def test_assigning_the_form_that_gets_bytes(classes):
    filter_ = classes("AssignsBytes")
    with filter_.mta() as mta:
        assert not mta.negotiated.steps & (Step.NOHDRS | Step.NORCPT)
        mta.mail("<s@example.com>")
        mta.rcpt(BAD)
        mta.header("X-Name", BAD)
    assert lines(filter_, "envrcpt") == ["b'J\\xfcrgen'"]
    assert lines(filter_, "header") == ["X-Name b'J\\xfcrgen'"]


FOLDED = (
    b"Subject: plain\r\n"
    b"X-Two:  two spaces\r\n"
    b"X-None:no space\r\n"
    b"X-Tab:\ttab\r\n"
    b"X-Fold: first\r\n\tsecond\r\n  third\r\n"
    b"X-Bytes: J\xfcrgen \xff\xfe\r\n"
    b"X-Twice: one\r\n"
    b"X-Twice: two\r\n"
    b"\r\nbody\r\n"
)


def test_headers_come_back_exactly_with_their_leading_space(classes):
    filter_ = classes("ExactRoundTrip")
    with filter_.mta() as mta:
        assert Step.HDR_LEADSPC in mta.negotiated.steps
        result = mta.send(FOLDED, recipients=RECIPIENTS)
    headers = [bytes(header) for header in result.message.headers]
    original = (
        FOLDED.partition(b"\r\n\r\n")[0].replace(b"\r\n\t", b"\n\t").replace(b"\r\n ", b"\n ")
    )
    expected = original.split(b"\r\n")
    assert headers[: len(expected)] == expected
    assert headers[len(expected) :] == [b"X-" + line for line in expected]


def test_headers_come_back_without_their_leading_space_as_values(classes):
    filter_ = classes("RoundTrip")
    with filter_.mta() as mta:
        assert Step.HDR_LEADSPC not in mta.negotiated.steps
        result = mta.send(FOLDED, recipients=RECIPIENTS)
    values = {
        header.name: header.value
        for header in result.message.headers
        if header.name not in (b"X-Twice", b"X-X-Twice")
    }
    assert values[b"X-Fold"] == values[b"X-X-Fold"] == b"first\n\tsecond\n  third"
    assert values[b"X-Bytes"] == values[b"X-X-Bytes"] == b"J\xfcrgen \xff\xfe"
    assert values[b"X-Two"] == values[b"X-X-Two"] == b" two spaces"


# --- actions --------------------------------------------------------------------------------


def test_all_actions(classes):
    filter_ = classes("TriesAll")
    result = send(filter_, sender="<s@example.com>")
    assert result.quarantine == "held"
    assert result.message.body == b"text\r\n"
    assert result.message["Subject"] == "changed"
    assert AddRecipient("a@example.com") in [
        AddRecipient(m.address.strip("<>"))
        for m in result.modifications
        if isinstance(m, AddRecipient)
    ]
    assert {m.params for m in result.modifications if isinstance(m, AddRecipient)} == {
        None,
        "NOTIFY=NEVER ORCPT=rfc822;x",
    }
    (change,) = (m for m in result.modifications if isinstance(m, ChangeSender))
    assert (change.address.strip("<>"), change.params) == ("n@example.com", "RET=HDRS")
    assert [r.address for r in result.recipients] == ["a@example.com", "p@example.com"]
    filter_.stop()
    assert filter_.output.count(": done") == 8


FLAGS = {
    "addheader 2": (Action.ADDHDRS, "ADDHDRS"),
    "chgheader 3": (Action.CHGHDRS, "CHGHDRS"),
    "addrcpt 1": (Action.ADDRCPT, "ADDRCPT"),
    "addrcpt 2": (Action.ADDRCPT_PAR, "ADDRCPT_PAR"),
    "delrcpt 1": (Action.DELRCPT, "DELRCPT"),
    "chgfrom 2": (Action.CHGFROM, "CHGFROM"),
    "replacebody 1": (Action.CHGBODY, "MODBODY"),
    "quarantine 1": (Action.QUARANTINE, "QUARANTINE"),
}


@pytest.mark.parametrize("missing", FLAGS)
def test_an_action_that_was_not_offered_names_its_flag(classes, missing):
    flag, name = FLAGS[missing]
    filter_ = classes("TriesAll")
    with filter_.mta(offer=Offer(actions=Offer().actions & ~flag)) as mta:
        assert not mta.negotiated.actions & flag
        result = mta.send(MESSAGE, recipients=RECIPIENTS)
    assert result.verdict is Verdict.ACCEPT  # the filter lives without
    assert filter_.wait_for(f"{missing}: ").split(": ")[1] == f"True {name}"


def test_a_flag_is_no_verdict(classes):
    filter_ = classes("ReturnsQuarantine")
    with filter_.mta() as mta:
        for _ in range(2):
            result = mta.send(MESSAGE, recipients=RECIPIENTS)
            assert tempfailed_by_policy(result)
            assert result.quarantine is None
    filter_.wait_for("eom callback returned 32", 2)


def test_quarantine_is_an_action(classes):
    result = send(classes("Quarantines"))
    assert result.quarantine == "to be looked at"
    assert result.verdict is Verdict.ACCEPT


def test_replies(classes):
    filter_ = classes("Rejecting")
    names = ("plain", "lines", "keyword", "percent", "good")
    result = send(filter_, recipients=[f"<{name}@example.com>" for name in names])
    said = {r.recipient.address.partition("@")[0]: r.reply for r in result.refused}
    assert [r.address for r in result.recipients] == ["good@example.com"]
    assert said["plain"].smtp is not None
    assert (said["plain"].smtp.code, said["plain"].smtp.xcode) == (550, "5.7.1")
    assert said["lines"].smtp.lines == ("one", "two: 100%", "three")
    assert said["keyword"].verdict is Verdict.TEMPFAIL
    assert (said["keyword"].smtp.code, said["keyword"].smtp.text) == (451, "later")
    assert (said["percent"].verdict, said["percent"].smtp) == (Verdict.REJECT, None)
    assert filter_.wait_for("refused:") == "refused: '%' must be doubled: 100% wrong"


def test_skip(classes):
    filter_ = classes("Skipping")
    with filter_.mta() as mta:
        assert Step.SKIP in mta.negotiated.steps
        result = mta.send(b"Subject: long\r\n\r\n" + b"x" * 200_000, recipients=RECIPIENTS)
    assert result.verdict is Verdict.CONTINUE
    assert lines(filter_, "body") == ["65535"]


def test_index_zero_goes_out_as_zero(classes):
    result = send(classes("ZeroIndex"))
    assert result.modifications == (
        ChangeHeader(0, b"Subject", b"zero"),
        InsertHeader(0, b"X-Top", b"top"),
    )


def test_an_exception_in_close_harms_nothing(classes):
    filter_ = classes("CloseFails")
    for count in (1, 2):
        assert send(filter_).verdict is Verdict.ACCEPT
        filter_.wait_for("LookupError: raised in close", count)
    assert filter_.stop() == 0


def test_none_in_place_of_the_object_has_a_new_one_made(classes):
    filter_ = classes("Dropped")
    with filter_.mta() as mta:
        mta.connect_info("client.example.com", "192.0.2.7", 25)
        assert mta.helo("client").verdict is Verdict.CONTINUE
        mta.mail("<s@example.com>")
        reply = mta.eom()
        assert reply.modifications == (AddHeader(b"X-Class", b"Dropped"),)
        assert reply.verdict is Verdict.ACCEPT
    assert lines(filter_, "made") == ["1", "2"]
    assert lines(filter_, "hello") == ["2"]
    assert "Traceback" not in filter_.output


# --- the logging class, and an application's own runner -------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (None, "unknown"),
        ("192.0.2.7", "('192.0.2.7', 25)"),
        ("2001:db8::7", "('2001:db8::7', 25, 0, 0)"),
        ("/run/client", "/run/client"),
    ],
)
def test_the_logging_class(classes, address, said):
    filter_ = classes("Logging")
    with filter_.mta() as mta:
        assert Step.NR_CONN | Step.NR_HDR in mta.negotiated.steps
        mta.connect_info("client.example.com", address, 25 if address else 0)
        mta.helo("client")
        mta.mail("<s@example.com>", "SIZE=1")
        mta.rcpt(b"<J\xfcrgen@example.com>")
        mta.header("X-Evil", "one\n\ttwo \x1b[31m")
        mta.eoh()
        assert mta.eom().verdict is Verdict.CONTINUE
    assert filter_.stop() == 0
    said_lines = filter_.output.splitlines()
    assert said_lines[0] == f"Milter: connect from client.example.com at {said}"
    assert all(line.startswith("Milter: ") for line in said_lines)  # nothing breaks a line
    assert "\x1b" not in filter_.output


@pytest.mark.parametrize("negotiate", [(), ("negotiate",)])
@pytest.mark.parametrize("version", [2, 6])
def test_an_applications_own_runner(run_filter, negotiate, version):
    filter_ = run_filter("own_runner", *negotiate)
    with filter_.mta(offer=Offer.for_version(version)) as mta:
        mta.connect_info("client.example.com", "192.0.2.7", 25)
        mta.helo("client")
        for _ in range(2):
            mta.mail("<s@example.com>", "SIZE=10", "BODY=8BITMIME")
            mta.rcpt("<r@example.com>", "NOTIFY=NEVER")
            mta.data()
            mta.header("Subject", "hello")
            mta.eoh()
            mta.body(b"body\r\n")
            reply = mta.eom()
            assert reply.modifications == (AddHeader(b"X-Own", b"yes"),)
            assert reply.verdict is Verdict.ACCEPT
        mta.unknown("XYZZY")
    assert filter_.stop() == 0
    message = [
        "envfrom <s@example.com> ('SIZE=10', 'BODY=8BITMIME') {'SIZE': '10', 'BODY': '8BITMIME'}",
        "envrcpt <r@example.com> ('NOTIFY=NEVER',)",
        "header Subject hello",
        "body b'body\\r\\n'",
    ]
    assert filter_.output.rstrip("\n").splitlines() == [
        "connect client.example.com 2 ('192.0.2.7', 25)",
        *message,
        *message,
        "close",
        "after run",
    ]
