"""Messages as functions see and change them; nothing here needs a socket, process or thread."""

from __future__ import annotations

import datetime
import email.message
import io
import ipaddress
import socket
import threading
from typing import Any

import milter
import pytest

import mime
from Milter import mailfilter
from Milter.mailfilter import Address, Client, Mail

MESSAGE = (
    b"Received: from a by b\r\nFrom: =?utf-8?q?J=C3=B6rg?= <joe@example.com>\r\n"
    b"Subject: =?iso-8859-1?q?caf=E9?=\r\n =?utf-8?q?_ol=C3=A9?=\r\nX-A: one\r\nx-a:two\r\n"
    b"X-Raw: caf\xe9\r\nX-Utf: Gr\xc3\xbc\xc3\x9fe\r\n\r\nline\r\n"
)


def mail(data: bytes = MESSAGE, **options: Any) -> Mail:
    options.setdefault("recipients", ["bob@example.org"])
    return Mail.from_bytes(data, sender="joe@example.com", **options)


# --- facts ---------------------------------------------------------------------------------------


def test_the_client_is_known_by_name_address_port_and_family() -> None:
    client = mail(client=Client("mx.example.com", "192.0.2.7", 2525)).client
    assert (client.host, client.port) == ("mx.example.com", 2525)
    assert client.address == ipaddress.ip_address("192.0.2.7")
    assert client.family == socket.AF_INET
    assert mail(client="2001:db8::1").client.family == socket.AF_INET6
    assert mail(client="2001:db8::1").client.host == "[2001:db8::1]"
    local = Client("localhost", "/run/x")
    assert (local.address, local.path, local.family) == (None, "/run/x", socket.AF_UNIX)
    assert (Client().address, Client().family) == (None, 0)
    assert Client("x", "::ffff:192.0.2.7").address == ipaddress.ip_address("192.0.2.7")


def test_facts_of_the_session_come_from_macros() -> None:
    made = mail(
        macros={"i": "4XyZ", "{auth_authen}": "joe", "auth_type": "PLAIN", "{client_ptr}": "mx"},
        tls=mailfilter.TLS("TLSv1.3", "AES", 256),
        helo="mx.example.com",
    )
    assert made.auth == ("joe", "PLAIN")
    assert made.tls == ("TLSv1.3", "AES", 256)
    assert (made.queue_id, made.helo) == ("4XyZ", "mx.example.com")
    assert made.macros["client_ptr"] == made.macros["{client_ptr}"] == "mx"
    assert made.macros.at("helo") == {
        "{tls_version}": "TLSv1.3",
        "{cipher}": "AES",
        "{cipher_bits}": "256",
    }
    assert "{auth_authen}" in made.macros.at("mail")
    assert "{none}" not in made.macros
    bare = mail()
    assert (bare.auth, bare.tls, bare.queue_id, dict(bare.macros)) == (None, None, None, {})
    with pytest.raises(ValueError, match=r"stage must be one of connect, .*: 'x'"):
        bare.macros.at("x")


def test_the_time_of_a_message_is_in_utc() -> None:
    received = mail().received_at
    age = datetime.datetime.now(datetime.timezone.utc) - received
    assert datetime.timedelta() <= age < datetime.timedelta(minutes=5)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("<joe@Example.COM>", "joe@example.com.", True),
        ("Joe@example.com", "joe@example.com", False),
        ("joe@b\u00fccher.example", "joe@xn--bcher-kva.example", True),
        ("PostMaster@example.com", "postmaster@EXAMPLE.com", True),
        ("Postmaster", "postmaster", True),
        ('"a@b"@example.com', '"a@b"@EXAMPLE.com', True),
        ("", "", True),
    ],
)
def test_addresses_compare_as_rfc_5321_says(one: str, other: str, same: bool) -> None:
    assert (Address(one) == Address(other)) is same
    assert (Address(one) == other) is same
    assert not same or hash(Address(one)) == hash(Address(other))


def test_an_address_has_parts_and_parameters() -> None:
    one = Address("<Joe@Example.com>", {"size": "9", "SMTPUTF8": None})
    assert (str(one), one.local, one.domain) == ("Joe@Example.com", "Joe", "example.com")
    assert dict(one.params) == {"SIZE": "9", "SMTPUTF8": None}
    assert not Address("")
    with pytest.raises(TypeError):
        one.params["X"] = "y"  # type: ignore[index]


# --- recipients ----------------------------------------------------------------------------------


def test_recipients_are_an_ordered_collection() -> None:
    found = mail(recipients=["bob@example.org", "Carl@example.org"]).recipients
    assert "bob@EXAMPLE.org" in found
    assert "carl@example.org" not in found
    found.add("dan@example.org")
    found.add("bob@Example.ORG")  # is there already
    found.replace("bob@example.org", "eve@example.org")
    assert list(map(str, found)) == ["Carl@example.org", "dan@example.org", "eve@example.org"]
    found.remove("dan@EXAMPLE.ORG")
    found.discard("nobody@example.org")
    assert len(found) == 2
    assert found[0] == "Carl@example.org"
    found.clear()
    assert not list(found)
    with pytest.raises(ValueError, match=r"recipients.remove: 'x@example.org' is no recipient"):
        found.remove("x@example.org")


@pytest.mark.parametrize("bad", ["a@b\r\nRCPT TO:<c@d>", "a\0b", ""])
def test_addresses_that_could_not_be_passed_on_are_refused(bad: str) -> None:
    with pytest.raises(milter.InvalidArgument, match="address"):
        mail().recipients.add(bad)


def test_parameters_that_would_become_others_are_refused() -> None:
    with pytest.raises(ValueError, match="must not hold a space"):
        Address("a@b", {"NOTIFY": "NEVER ORCPT=x"})
    with pytest.raises(TypeError, match="address: must be str, not bytes"):
        Address(b"a@b")  # type: ignore[arg-type]


# --- headers -------------------------------------------------------------------------------------


def test_values_are_text_whatever_the_bytes() -> None:
    headers = mail().headers
    assert headers["subject"] == "caf\u00e9 ol\u00e9"
    assert headers["X-RAW"] == "caf\udce9"
    assert headers["X-Utf"] == "Gr\u00fc\u00dfe"
    assert headers.get_all("x-A") == ["one", "two"]
    assert headers.get("None") is None
    assert headers.get("None", "") == ""
    assert headers["None"] == ""
    assert "None" not in headers


def test_raw_is_what_came() -> None:
    made = mail()
    assert made.headers[2].raw == (b"Subject: =?iso-8859-1?q?caf=E9?=\r\n =?utf-8?q?_ol=C3=A9?=")
    assert made.headers[4].raw == b"x-a:two"
    assert made.as_bytes() == MESSAGE
    assert made.open().read() == MESSAGE
    assert made.size == len(MESSAGE)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "Gr\u00fc\u00dfe an alle",
        "two  spaces \u00e9  \u00e9 x",
        "=?utf-8?q?literal?=",
        "\U0001f41f" * 60,
        "word " * 60 + "end",
        "\u00e9" + " word" * 40,
        "tab\tinside \u00e9\t\u00e9",
        "a" * 500,
    ],
)
def test_what_is_set_is_read(text: str) -> None:
    made = mail()
    made.headers["Subject"] = text
    assert made.headers["Subject"] == text
    raw = made.headers.first("Subject").raw  # type: ignore[union-attr]
    assert raw.isascii()
    lines = raw.split(b"\r\n")
    assert max(map(len, lines)) <= 78 or " " not in text
    # Other programs read the same.
    parsed = made.message
    assert parsed["Subject"] == text or " " in text


def test_display_names_are_encoded_and_addresses_stay() -> None:
    made = mail()
    made.headers["From"] = "J\u00f6rg M\u00fcller <joe@example.com>"
    assert made.headers[1].raw.endswith(b"?= <joe@example.com>")
    assert made.headers["From"] == "J\u00f6rg M\u00fcller <joe@example.com>"
    assert made.message["From"].addresses[0].addr_spec == "joe@example.com"


def test_bytes_and_folded_text_are_taken_as_they_are() -> None:
    made = mail()
    made.headers["Subject"] = b"=?utf-8?q?=C3=A9?="
    made.headers.add("X-Folded", "one\r\n\ttwo")
    assert made.headers["Subject"] == "\u00e9"
    assert made.headers[-1].raw == b"X-Folded: one\r\n\ttwo"


def test_what_was_no_utf8_goes_out_as_it_came() -> None:
    made = mail()
    made.headers["X-Raw"] = "[x] " + made.headers["X-Raw"]
    assert made.headers.first("X-Raw").raw == b"X-Raw: [x] caf\xe9"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value"),
    [("X-A", "a\nBcc: eve"), ("X-A", "a\r\n\r\nbody"), ("X-A", "a\0"), ("X:A", "a"), ("", "a"),
     ("X A", "a"), ("X-A", "a\rb"), ("X-A", b"a\nb")],
)  # fmt: skip
def test_what_could_forge_a_header_is_refused(name: str, value: str | bytes) -> None:
    made = mail()
    for call in (made.headers.add, lambda n, v: made.headers.insert(0, n, v), made.headers.replace):
        with pytest.raises(milter.InvalidArgument):
            call(name, value)
    assert made.as_bytes() == MESSAGE


def test_headers_are_put_where_one_says() -> None:
    made = mail(b"A: 1\nB: 2\nb: 3\nC: 4\n\n")
    made.headers.insert(0, "Top", "t")
    made.headers.insert_before("b", "Before", "x")
    made.headers.insert_after("B", "After", "y")
    made.headers.insert_after(made.headers.find("b")[0], "Between", "z")
    names = [header.name for header in made.headers]
    assert names == ["Top", "A", "Before", "B", "Between", "b", "After", "C"]
    assert made.headers[0].is_new
    with pytest.raises(KeyError):
        made.headers.insert_before("None", "X", "y")


def test_headers_are_replaced_and_deleted() -> None:
    made = mail()
    made.headers.replace("X-A", "new")
    assert made.headers.get_all("X-A") == ["new"]
    assert made.headers.delete("x-a") == 1
    del made.headers["None"]
    del made.headers["Subject"]
    assert "Subject" not in made.headers
    assert made.headers.delete(made.headers[0]) == 1
    assert len(made.headers) == 3


def test_a_header_of_another_message_is_refused() -> None:
    made = mail()
    with pytest.raises(ValueError, match="is no header of this message"):
        made.headers.delete(mail().headers[0])
    with pytest.raises(TypeError, match="name: must be str, not bytes"):
        made.headers.delete(b"Subject")  # type: ignore[arg-type]


# --- body ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spool_at", [0, 10, 1 << 20])
def test_the_body_is_a_seekable_file_in_memory_or_on_disk(spool_at: int) -> None:
    content = b"line one\r\nline two\r\n" * 5000
    seen: list[Any] = []

    @mailfilter.filter(spool_at=spool_at)
    def looks(m: Mail) -> None:
        m.body = io.BytesIO(content)
        seen.append(m._spool.on_disk)
        seen.append(m.body.read(4))
        assert m.body.seek(-4, io.SEEK_END) == len(content) - 4
        seen.append(m.body.read())
        m.body.seek(0)
        seen.append(sum(1 for _ in m.body))
        assert bytes(m.body) == content
        assert len(m.body) == len(content)
        with pytest.raises(io.UnsupportedOperation):
            m.body.write(b"x")

    came = mail()
    came._spool_at = spool_at
    looks.check(came)
    assert seen == [spool_at < len(content), b"line", b"wo\r\n", 10000]


@pytest.mark.parametrize(
    "content",
    [
        b"a\nb\r\n",
        bytearray(b"a\nb\r\n"),
        io.BytesIO(b"a\nb\r\n"),
        [b"a\nb\r", b"\n"],
        iter([b"a", b"\n", b"b\r\n"]),
    ],
)
def test_a_new_body_is_bytes_a_file_or_chunks_with_crlf(content: Any) -> None:
    made = mail()
    made.body = content
    assert bytes(made.body) == b"a\r\nb\r\n"


@pytest.mark.parametrize("bad", ["text", 7, ["text"], None])
def test_a_new_body_is_nothing_else(bad: Any) -> None:
    made = mail()
    with pytest.raises(TypeError, match=r"mail\.body: .*must be bytes"):
        made.body = bad
    assert made.as_bytes() == MESSAGE


# --- the whole as an object ----------------------------------------------------------------------


def test_an_object_that_was_not_changed_changes_nothing() -> None:
    @mailfilter.filter
    def same(m: Mail) -> None:
        m.message = m.message

    result = same.check(mail())
    assert result.actions == []
    assert result.as_bytes() == MESSAGE


def test_what_differs_in_an_object_is_taken_over() -> None:
    made = mail()
    changed = made.message
    changed.replace_header("X-Utf", "new")
    del changed["X-A"]
    changed["X-New"] = "\u00e9"
    changed.set_payload("other\r\n")
    made.message = changed
    out = made.as_bytes()
    assert b"X-Raw: caf\xe9\r\nX-Utf: new\r\n" in out
    assert out.startswith(MESSAGE.partition(b"X-A")[0])
    assert made.message["X-New"] == "\u00e9"
    assert bytes(made.body) == b"other\r\n"


def test_a_new_object_takes_the_place_of_all() -> None:
    made = mail()
    other = email.message.EmailMessage()
    other["Subject"] = "new"
    other.set_content("text\n")
    made.message = other
    assert [header.name for header in made.headers][:1] == ["Subject"]
    assert bytes(made.body) == b"text\r\n"


def test_messages_of_mime_are_objects_too() -> None:
    data = (
        b"Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
        b"--b\r\nContent-Type: text/plain\r\n\r\nhello\r\n"
        b'--b\r\nContent-Type: application/x-msdownload; name="a.exe"\r\n\r\nMZ\r\n--b--\r\n'
    )
    made = mail(data)
    parsed = mime.message_from_file(made.open())
    mime.defang(parsed, savname=None)
    made.message = parsed
    assert b"MZ" not in made.as_bytes()
    assert made.headers["Subject"] == "x"


# --- decisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decision", "reply"),
    [
        (mailfilter.reject(), ()),
        (mailfilter.reject("no"), ("550", "5.7.1", "no")),
        (mailfilter.reject("5.1.1 nobody\nat all"), ("550", "5.1.1", "nobody", "at all")),
        (mailfilter.reject("100% spam", 554, "5.6.0"), ("554", "5.6.0", "100%% spam")),
        (mailfilter.reject("a\r\nb\x07"), ("550", "5.7.1", "a", "b?")),
        (mailfilter.tempfail("4.2.1 busy"), ("451", "4.2.1", "busy")),
        (mailfilter.tempfail(code="421"), ("421", "4.7.1", "")),
        (mailfilter.accept(), ()),
        (mailfilter.discard(), ()),
    ],
)
def test_replies(decision: mailfilter.Decision, reply: tuple[str, ...]) -> None:
    assert decision.reply == reply
    assert decision.refuses == (decision.kind in ("reject", "tempfail"))


@pytest.mark.parametrize(
    ("call", "arguments", "text"),
    [
        (mailfilter.reject, ("no", 450), "reject: code: must be 500 to 599: 450"),
        (mailfilter.reject, ("4.7.1 no",), "enhanced: must have the form of '5.7.1': '4.7.1'"),
        (mailfilter.tempfail, ("no", 550), "tempfail: code: must be 400 to 499: 550"),
        (mailfilter.reject, ("no", 550, "x"), "enhanced: must have the form"),
        (mailfilter.reject, (b"no",), "reject: text: must be str, not bytes"),
        (mailfilter.quarantine, ("a\nb",), "quarantine: reason"),
        (mailfilter.quarantine, ("",), "quarantine: reason"),
        (mailfilter.Reject, ("no", True), "code"),
    ],
)
def test_replies_that_cannot_be(call: Any, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call(*arguments)


@pytest.mark.parametrize("raised", [True, False])
@pytest.mark.parametrize(
    "made",
    [
        mailfilter.Reject("5.1.1 x"), mailfilter.Tempfail(), mailfilter.Discard(),
        mailfilter.Accept(), mailfilter.Quarantine("odd"),
    ],
)  # fmt: skip
def test_decisions_are_returned_or_raised_from_deep_inside(
    made: mailfilter.Raised, raised: bool
) -> None:
    def helper() -> Any:
        if raised:
            raise made
        return made.decision

    assert mailfilter.filter(lambda m: helper()).check(mail()).decision == made.decision


# --- check ---------------------------------------------------------------------------------------


def test_check_leaves_the_message_as_it_is_and_starts_nothing() -> None:
    @mailfilter.filter
    def tag(m: Mail) -> None:
        m.headers["Subject"] = "[x] " + m.headers["Subject"]
        m.recipients.add("archive@example.org")
        m.sender = "list@example.org"

    came, before = mail(), threading.active_count()
    for _ in range(2):
        result = tag.check(came)
        assert result.decision == mailfilter.accept()
        assert result.headers["Subject"] == "[x] caf\u00e9 ol\u00e9"
        assert [type(action).__name__ for action in result.actions] == [
            "ChangeSender", "AddRecipient", "ChangeHeader",
        ]  # fmt: skip
        assert (str(result.sender), len(result.recipients)) == ("list@example.org", 2)
        assert result.is_delivered
    assert came.as_bytes() == MESSAGE
    assert threading.active_count() == before
    assert tag(mail()) is None  # an ordinary callable


def test_nothing_that_was_edited_goes_out_with_a_refusal() -> None:
    @mailfilter.filter
    def no(m: Mail) -> mailfilter.Decision:
        m.headers.add("X", "y")
        return mailfilter.reject("no")

    assert no.check(mail()).actions == []


def test_recipients_are_decided_on_one_by_one() -> None:
    @mailfilter.filter(at="rcpt")
    def odd(m: Mail) -> mailfilter.Decision | None:
        assert m.recipient is not None
        assert m.recipient not in m.recipients
        return mailfilter.reject("5.1.1 no") if m.recipient.local == "bob" else None

    result = odd.check(mail(recipients=["bob@a.example", "carl@a.example"]))
    assert result.decision.kind == "accept"
    assert [(str(one), one_decision.enhanced) for one, one_decision in result.refused] == [
        ("bob@a.example", "5.1.1")
    ]
    assert list(map(str, result.recipients)) == ["carl@a.example"]
    assert odd.check(mail(recipients=["bob@a.example"])).decision.refuses


def test_a_chain_asks_each_at_its_stage_until_one_decides() -> None:
    asked: list[str] = []

    def asks(name: str, answer: Any = None, **options: Any) -> mailfilter.Filter:
        def function(m: Mail) -> Any:
            asked.append(name)
            return answer

        return mailfilter.filter(**options)(function)

    end, first = asks("end"), asks("first", at="mail")
    mailfilter.chain(end, first, asks("second", at="mail")).check(mail())
    assert asked == ["first", "second", "end"]
    asked.clear()
    no = asks("no", mailfilter.tempfail(), at="headers")
    result = mailfilter.chain(end, no, first).check(mail())
    assert (asked, result.decision.kind) == (["first", "no"], "tempfail")


def test_coroutine_functions_are_run_too() -> None:
    @mailfilter.filter
    async def tag(m: Mail) -> mailfilter.Decision | None:
        m.headers["Subject"] = "new"
        raise mailfilter.Quarantine("odd")

    @mailfilter.filter(at="mail")
    def first(m: Mail) -> None:
        m.connection["seen"] = True

    def by_plain(m: Mail) -> Any:
        return tag(m)

    def where(m: Mail) -> None:
        m.connection["thread"] = threading.current_thread()

    here = threading.current_thread()
    for chain in ((first, where, tag), (first, where, by_plain), (first, by_plain)):
        result = mailfilter.chain(*chain).check(mail())
        assert (result.decision.kind, result.headers["Subject"]) == ("quarantine", "new")
        assert result.mail.connection.pop("thread", here) is here
        assert result.mail.connection == {"seen": True}


@pytest.mark.parametrize(
    ("oversize", "kind", "size"),
    [
        ("reject", "reject", 6),
        ("tempfail", "tempfail", 6),
        ("accept", "accept", 6),
        ("truncate", "discard", 3),
    ],
)
def test_bodies_that_are_too_large(oversize: str, kind: str, size: int) -> None:
    @mailfilter.filter(max_body=3, oversize=oversize)
    def only_when_truncated(m: Mail) -> mailfilter.Decision:
        assert m.truncated
        return mailfilter.discard()

    result = only_when_truncated.check(mail())
    assert (result.decision.kind, len(result.mail.body)) == (kind, size)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["connect", "helo", "mail", "rcpt", "data", "headers"])
def test_what_comes_later_is_not_there_and_nothing_can_be_changed(stage: str) -> None:
    later = {
        "connect": "sender", "helo": "sender", "mail": "recipients", "rcpt": "headers",
        "data": "headers", "headers": "body",
    }[stage]  # fmt: skip
    failed: list[str] = []

    @mailfilter.filter(at=stage)
    def looks(m: Mail) -> None:
        with pytest.raises(mailfilter.NotNow, match=f"mail.{later}: comes later .*at='{stage}'"):
            getattr(m, later)
        with pytest.raises(mailfilter.NotNow, match="at='eom' only"):
            m.sender = "x@y"
        failed.append(stage)

    looks.check(mail())
    assert failed == [stage]


def test_the_body_that_was_not_asked_for_is_not_there() -> None:
    @mailfilter.filter(body=False)
    def looks(m: Mail) -> None:
        for name in ("body", "size", "message"):
            with pytest.raises(mailfilter.NotNow, match="body=False"):
                getattr(m, name)
        m.headers["Subject"] = "new"

    assert looks.check(mail()).headers["Subject"] == "new"


def test_late_edits_are_errors() -> None:
    kept: list[Mail] = []
    mailfilter.filter(lambda m: kept.append(m)).check(mail())
    late = kept[0]
    edits: list[Any] = [
        lambda: late.headers.add("X", "y"),
        lambda: late.headers.__setitem__("Subject", "y"),
        lambda: setattr(late.headers[0], "value", "y"),
        lambda: late.headers.delete("Subject"),
        lambda: late.recipients.add("x@y"),
        lambda: late.recipients.clear(),
        lambda: setattr(late, "sender", "x@y"),
        lambda: setattr(late, "body", b""),
        lambda: setattr(late, "message", email.message.EmailMessage()),
    ]
    for edit in edits:
        with pytest.raises(mailfilter.NotNow, match="has returned"):
            edit()
    assert late.as_bytes() == MESSAGE


@pytest.mark.parametrize("value", [0, True, "reject", mailfilter.reject, b""])
def test_what_is_no_decision_may_not_be_returned(value: object) -> None:
    @mailfilter.filter
    def odd(m: Mail) -> Any:
        return value

    with pytest.raises(TypeError, match=r"odd returned .*: return None, accept\(\), reject"):
        odd.check(mail())


@pytest.mark.parametrize("stage", ["connect", "helo", "rcpt"])
def test_a_decision_that_the_stage_cannot_carry(stage: str) -> None:
    for answer in (mailfilter.quarantine("x"), mailfilter.discard()):
        if (answer.kind, stage) == ("discard", "rcpt"):
            continue
        odd = mailfilter.filter(at=stage)(lambda m, answer=answer: answer)
        with pytest.raises(ValueError, match=f"{answer.kind}, which cannot be at='{stage}'"):
            odd.check(mail())


def _generator(m: Mail) -> Any:
    yield m


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        (7, {}, "must be a function, not 7"),
        (Mail, {}, "must be a function"),
        (lambda: None, {}, "must take one argument, the message"),
        (lambda a, b: None, {}, "must take one argument, the message"),
        (_generator, {}, "generator function"),
        (print, {"at": "end"}, "at: must be one of connect, .*: 'end'"),
        (print, {"oversize": "drop"}, "oversize: must be one of reject, .*: 'drop'"),
        (print, {"max_body": -1}, "max_body: must not be negative: -1"),
        (print, {"max_body": "1M"}, "max_body: must be a number of bytes, not '1M'"),
        (print, {"spool_at": None}, "spool_at: must be a number of bytes, not None"),
        (print, {"body": 1}, "body: must be a bool"),
        (print, {"macros": "i"}, "macros: must be a list"),
        (print, {"macros": [""]}, "macros: must be names"),
        (print, {"macros": ["{a}", "{b}", "{c}", "{d}", "{e}"]}, "at most 5 for a stage"),
    ],
)
def test_what_cannot_be_a_filter_is_refused_when_it_is_made(
    function: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        mailfilter.filter(**options)(function)
    if not options:
        with pytest.raises(TypeError, match=text):
            mailfilter.run(function, "inet:0@127.0.0.1")


def test_chains_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mailfilter.chain()
    with pytest.raises(ValueError, match="must be the same for all"):
        mailfilter.chain(
            mailfilter.filter(max_body=1)(lambda m: None),
            mailfilter.filter(max_body=2)(lambda m: None),
        )
    with pytest.raises(TypeError, match=r"check: mail: must be a Mail"):
        mailfilter.filter(lambda m: None).check(MESSAGE)  # type: ignore[arg-type]
