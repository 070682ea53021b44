"""Messages in the form that a server takes: what it is given holds the bytes that there were."""

from __future__ import annotations

import contextlib
import email
import email.header
import email.message
import email.policy
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Milter._smtp_body import LONGEST_LINE, Unsendable, for_data

LATIN = "caf\u00e9 \u00fc"
HEAD = b"From: a@b.test\r\nSubject: x\r\nMIME-Version: 1.0\r\n"


def sendable(data: bytes, eight_bit: bool = False) -> bool:
    lines = data.split(b"\r\n")
    return (eight_bit or data.isascii()) and not any(
        len(line) > LONGEST_LINE or b"\r" in line or b"\n" in line for line in lines
    )


def leaves(data: bytes) -> list[bytes]:
    return [
        part.get_payload(decode=True)
        for part in email.message_from_bytes(data).walk()
        if not part.is_multipart()
    ]


def crlf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


# Charsets that fit the bytes, that do not, and that nobody knows.
CHARSETS = [
    "utf-8",
    "iso-8859-1",
    "us-ascii",
    "x-nobody-knows",
    "utf-16",
    "unknown-8bit",
    '""',
    "8bit",
]
BYTES = [
    LATIN.encode(),
    LATIN.encode("latin-1"),
    b"\x80\xff\xfe",
    "\u20ac".encode("utf-16"),
    b"a\xe9\r\n" * 99,
]


@pytest.mark.parametrize("encoding", [b"", b"8bit", b"binary", b"7bit"])
@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("body", BYTES, ids=range(len(BYTES)))
def test_bytes_of_any_charset_are_sent_as_they_are(
    body: bytes, charset: str, encoding: bytes
) -> None:
    head = HEAD + b"Content-Type: text/plain; charset=%s\r\n" % charset.encode()
    if encoding:
        head += b"Content-Transfer-Encoding: %s\r\n" % encoding
    message = head + b"\r\n" + body
    want = crlf(body.replace(b"\r", b"\n") if b"\r" in body and b"\r\n" not in body else body)
    for form in (
        message,
        message.decode("ascii", "surrogateescape"),
        email.message_from_bytes(message),
    ):
        wire = for_data(form, eight_bit=False)
        assert sendable(wire)
        assert [crlf(leaf) for leaf in leaves(wire)] == [want]
        assert b"Content-Type: text/plain; charset=%s" % charset.encode() in wire
        assert wire.count(b"Content-Transfer-Encoding") == 1
        assert for_data(wire, eight_bit=False) == wire
    assert for_data(message, eight_bit=True) == crlf(message) or not body.isascii()


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("us-ascii", LATIN),
        ("iso-8859-1", LATIN),
        ("iso-8859-1", "\u20ac"),
        ("x-nobody-knows", LATIN),
        (None, LATIN),
    ],
)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_text_that_a_message_holds_without_its_bytes(
    charset: str | None, text: str, eight_bit: bool
) -> None:
    message = email.message.Message()
    message["Subject"] = "x"
    message["Content-Type"] = f"text/plain; charset={charset}" if charset else "text/plain"
    message.set_payload(text + "\n")
    wire = for_data(message, eight_bit)
    assert sendable(wire, eight_bit)
    received = email.message_from_bytes(wire)
    payload = received.get_payload(decode=True)
    assert isinstance(payload, bytes)
    codec = received.get_content_charset() or "utf-8"
    assert payload.decode(codec if codec in ("utf-8", "iso-8859-1") else "utf-8").strip() == text
    assert message.get_payload() == text + "\n"  # the application's own is as it was


@pytest.mark.parametrize("text", ["\ud800", "a\ud800b\udce9", "\udfff\u00e9"])
def test_surrogates_that_stand_for_no_byte(text: str) -> None:
    message = email.message.Message()
    message["Subject"] = text
    message.set_payload(text)
    for form in (f"Subject: {text}\n\n{text}\n", message):
        wire = for_data(form, eight_bit=False)
        assert sendable(wire)
        assert b"?" in wire
        assert sendable(for_data(form, eight_bit=True), eight_bit=True)


def test_parts_are_encoded_each_by_itself() -> None:
    message = (
        b"Subject: x\r\nMIME-Version: 1.0\r\nContent-Transfer-Encoding: 8bit\r\n"
        b'Content-Type: multipart/mixed; boundary="a b"\r\n\r\nfor old readers: \xe9\r\n'
        b"--a b\r\n\r\nplain\r\n"
        b"--a b  \r\nContent-Type: text/html; charset=utf-8\r\n\r\n<p>\xc3\xa9\r\n"
        b"--a b\r\nContent-Type: application/x-own\r\nContent-Transfer-Encoding: binary\r\n"
        b"\r\n\xff\r\n\xfe\r\n"
        b"--a b\r\n\r\n\xe9 has no header\r\n"
        b"--a b\r\nContent-Type: multipart/alternative; boundary=a\r\n"
        b"\r\n--a\r\n\r\n\xe9\r\n--a--\r\n\r\n"
        b"--a b--\r\nafter: \xe9"
    )
    wire = for_data(message, eight_bit=False)
    assert sendable(wire)
    want = [b"plain", b"<p>\xc3\xa9", b"\xff\r\n\xfe", b"\xe9 has no header", b"\xe9"]
    assert [leaf.removesuffix(b"\r\n") for leaf in leaves(wire)] == want
    assert b"--a b\r\n\r\nplain\r\n--a b  \r\n" in wire
    assert b"Content-Transfer-Encoding: 7bit\r\nContent-Type: multipart/mixed" in wire
    assert b"application/x-own\r\nContent-Transfer-Encoding: base64\r\n" in wire
    assert b"\r\n\r\nfor old readers: =E9\r\n" in wire
    assert wire.endswith(b"--a b--\r\nafter: =E9")
    assert b"charset=unknown-8bit" in wire
    assert for_data(message, eight_bit=True) == message


@pytest.mark.parametrize("kind", [b"message/rfc822", b"multipart/digest; boundary=b"])
def test_messages_within_are_encoded_inside(kind: bytes) -> None:
    inner = b"Subject: \xc3\xa9\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\xc3\xa9\r\n"
    if b"digest" in kind:
        inner = b"--b\r\n\r\n" + inner + b"\r\n--b--\r\n"
    message = (
        HEAD + b"Content-Type: " + kind + b"\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + inner
    )
    wire = for_data(message, eight_bit=False)
    assert sendable(wire)
    assert b"Content-Transfer-Encoding: 7bit\r\n\r\n" in wire
    part = list(email.message_from_bytes(wire).walk())[-1]
    assert part.get_payload(decode=True) == b"\xc3\xa9\r\n"
    assert str(email.header.make_header(email.header.decode_header(part["Subject"]))) == "\u00e9"


@pytest.mark.parametrize(
    ("encoding", "body", "want"),
    [
        (b"base64", b"QUJD" * 400, b"ABC" * 400),
        (b"base64", b"QUJ\xe9D\r\n", b"ABC"),
        (b"quoted-printable", b"=C3=A9 \xc3\xa9 " * 400, b"\xc3\xa9 \xc3\xa9 " * 400),
        (b"quoted-printable", b"a" * 1000 + b"=\r\nb", b"a" * 1000 + b"b"),
        (
            b"7bit",
            b"a" * 1000 + b"\r\n." + b"\r\nb" * 1000,
            b"a" * 1000 + b"\r\n." + b"\r\nb" * 1000,
        ),
    ],
)
def test_what_has_an_encoding_keeps_it(encoding: bytes, body: bytes, want: bytes) -> None:
    head = (
        HEAD + b"Content-Type: text/plain\r\nContent-Transfer-Encoding: " + encoding + b"\r\n\r\n"
    )
    wire = for_data(head + body, eight_bit=False)
    assert sendable(wire)
    assert leaves(wire)[0].replace(b"\n", b"\r\n").replace(b"\r\r", b"\r").rstrip() == want.rstrip()


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("line", [b"x" * 999, b"y " * 5000, b"\xc3\xa9" * 500, b"=" * 2000])
@pytest.mark.parametrize(
    "kind", [b"text/plain", b"text/html; charset=utf-8", b"application/octet-stream"]
)
def test_long_lines_are_encoded(eight_bit: bool, line: bytes, kind: bytes) -> None:
    message = HEAD + b"Content-Type: " + kind + b"\r\n\r\nshort\r\n" + line + b"\r\n"
    wire = for_data(message, eight_bit)
    assert sendable(wire, eight_bit)
    assert leaves(wire) == [b"short\r\n" + line + b"\r\n"]
    fits = HEAD + b"\r\n" + b"x" * 998 + b"\r\n"
    assert for_data(fits, eight_bit) == fits


@pytest.mark.parametrize(
    "field",
    [
        b"Subject: " + b"word " * 1000,
        b"References: " + b"<%s@x>\r\n\t" % (b"i" * 300) * 9 + b"<%s@x>" % (b"i" * 2000),
        b"X-Blob: " + b"b" * 5000,
        b"X-Blob:" + b" " * 5000 + b"b",
        b"To: " + b", ".join(b"person%d@example.com" % n for n in range(900)),
        b"X" * 1200 + b": long name",
    ],
    ids=range(6),
)
def test_long_fields_are_folded(field: bytes) -> None:
    wire = for_data(field + b"\r\nX-Next: y\r\n\r\nbody\r\n", eight_bit=False)
    assert sendable(wire)
    head, _, body = wire.partition(b"\r\n\r\n")
    assert body == b"body\r\n"
    assert head.endswith(b"\r\nX-Next: y")
    assert all(line.strip() for line in head.split(b"\r\n"))
    squeezed = b"".join(head.split())
    assert squeezed == b"".join(field.split()) + b"X-Next:y"


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("Subject", "Gr\u00fc\u00dfe an alle", "Gr\u00fc\u00dfe an alle"),
        ("Subject", "viel " + "\u00fc\u20ac" * 300, "viel " + "\u00fc\u20ac" * 300),
        ("Subject", "\u00fc \u00fc x \u00fc", "\u00fc \u00fc x \u00fc"),
        ("From", '"M\u00fcller, J\u00fcrgen" <j@x.test>', "M\u00fcller, J\u00fcrgen <j@x.test>"),
        ("From", "J\u00fcrgen M\u00fcller <j@x.test>", "J\u00fcrgen M\u00fcller <j@x.test>"),
        (
            "To",
            "a@b.test, J\u00fcrgen <j@x.test>, c@d.test",
            "a@b.test, J\u00fcrgen <j@x.test>, c@d.test",
        ),
        ("To", "j@x.test (J\u00fcrgen)", "j@x.test (J\u00fcrgen)"),
        ("To", "<j@b\u00fccher.test>", "<j@xn--bcher-kva.test>"),
    ],
)
def test_fields_are_encoded(name: str, value: str, want: str) -> None:
    for codec in ("utf-8", "latin-1"):
        try:
            raw = value.encode(codec)
        except UnicodeEncodeError:
            continue
        if codec == "latin-1" and "xn--" in want:
            continue  # such a domain is none
        wire = for_data(f"{name}: ".encode() + raw + b"\r\n\r\nbody\r\n", eight_bit=False)
        assert sendable(wire)
        assert max(map(len, wire.split(b"\r\n"))) <= LONGEST_LINE
        field = email.message_from_bytes(wire)[name]
        if codec == "utf-8":
            decoded = str(email.header.make_header(email.header.decode_header(field)))
            assert " ".join(decoded.split()) == want
        else:
            pieces = email.header.decode_header(field)
            found = b"".join(p if isinstance(p, bytes) else p.encode() for p, _ in pieces)
            assert b"".join(found.split()) == b"".join(want.encode(codec).split())
            assert "unknown-8bit" in field


@pytest.mark.parametrize(
    "value",
    ['attachment; filename="\u00fc;\\"x\\".txt"; size=3', "attachment;\r\n filename=\u00fc.txt"],
)
def test_parameters_are_encoded(value: str) -> None:
    wire = for_data(f"Content-Disposition: {value}\r\n\r\nbody\r\n".encode(), eight_bit=False)
    assert sendable(wire)
    name = email.message_from_bytes(wire).get_filename()
    assert name in ('\u00fc;"x".txt', "\u00fc.txt")


@pytest.mark.parametrize(
    "message",
    [
        b"To: <\xc3\xbc@x.test>\r\n\r\nbody\r\n",
        b'To: "\xc3\xbc"@x.test\r\n\r\nbody\r\n',
        b"To: <a@\xff.test>\r\n\r\nbody\r\n",
        HEAD + b"Content-Type: multipart/mixed; boundary=b\r\n\r\n\xe9 without parts\r\n",
        HEAD + b"Content-Type: multipart/mixed\r\n\r\n--b\r\n\r\n\xe9\r\n--b--\r\n",
        HEAD + b"Content-Transfer-Encoding: x-uuencode\r\n\r\n\xe9\r\n",
        HEAD + b"Content-Type: message/partial\r\n\r\n\xe9\r\n",
    ],
)
def test_what_has_no_such_form_is_refused(message: bytes) -> None:
    with pytest.raises(Unsendable):
        for_data(message, eight_bit=False)
    assert for_data(message, eight_bit=True) == message


def test_nesting_has_an_end() -> None:
    head = b"Content-Type: message/rfc822\r\n\r\n"
    assert sendable(for_data(head * 40 + b"\r\n\xe9\r\n", eight_bit=False))
    with pytest.raises(Unsendable, match="deep"):
        for_data(head * 4000 + b"\r\n\xe9\r\n", eight_bit=False)


@pytest.mark.parametrize(
    "data",
    [
        b"\xe9" + (b"a" * 997 + b"\r\n") * 20_000,
        b"\xe9" + b"a" * 3_000_000,
        b"X: \xe9" + b"a" * 3_000_000,
        b"To: \xe9" + b'"\\' * 1_000_000,
        b"Content-Type: text/plain; \xe9" + b";" * 1_000_000 + b" " * 1_000_000,
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\xe9" * 300_000,
        b"a:\r\n " * 500_000 + b"\xe9",
    ],
    ids=range(7),
)
def test_time_is_linear(data: bytes) -> None:
    start = time.monotonic()
    with contextlib.suppress(Unsendable):
        assert sendable(for_data(data, eight_bit=False))
    assert time.monotonic() - start < 30


PIECES = [
    *(
        "\r",
        "\n",
        "\r\n",
        ":",
        ";",
        "=",
        "\t",
        "a",
        "\xe9",
        "\xc3\xa9",
        '"',
        "(",
        ")",
        "<",
        ">",
        "@",
    ),
    *(",", "--b", "--b--", "\\"),
    " ",
    "\r\n\r\n",
    "x" * 999,
    "Content-Type: text/plain; charset=x\r\n",
    "Content-Type: multipart/mixed; boundary=b\r\n",
    "Content-Type: message/rfc822\r\n",
    "Content-Type: ",
    "Content-Transfer-Encoding: 8bit\r\n",
    "Content-Transfer-Encoding: base64\r\n",
    "Content-Transfer-Encoding: quoted-printable\r\n",
    "Content-Disposition: attachment; filename=",
    "Subject: ",
    "From: ",
    "\r\n--b\r\n",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join), st.booleans())
def test_any_message_is_sendable_or_refused(text: str, eight_bit: bool) -> None:
    for form in (text.encode("latin-1"), text):
        form_bytes: Any = form
        try:
            wire = for_data(form_bytes, eight_bit)
        except Unsendable:
            assert not eight_bit or len(text) > LONGEST_LINE
            continue
        assert sendable(wire, eight_bit)
