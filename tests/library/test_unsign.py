"""Milter.unsign: what is unwrapped, and what only looks alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Milter.unsign import unsign


@pytest.mark.parametrize(
    ("signed", "plain"),
    [
        ("SRS0=8Y3CZ=3U=jsconnor.com=bills@bmsi.com", "bills@jsconnor.com"),
        ("srs0=8y3cz=3u=jsconnor.com=bills@bmsi.com", "bills@jsconnor.com"),
        ("SRS0+8Y3CZ=3U=jsconnor.com=bills@bmsi.com", "bills@jsconnor.com"),
        ("SRS0-8Y3CZ=3U=jsconnor.com=bills@bmsi.com", "bills@jsconnor.com"),
        ("SRS0=a+/Z=3U=example.com=a=b=c@bmsi.com", "a=b=c@example.com"),
        ('SRS0=abcd=3U=example.com="a@b"@bmsi.com', '"a@b"@example.com'),
        ("SRS1=Wxyz=first.org==8Y3CZ=3U=jsconnor.com=bills@last.net", "bills@jsconnor.com"),
        ("SRS1=Wxyz=first.org=+8Y3CZ=3U=jsconnor.com=bills@last.net", "bills@jsconnor.com"),
        ("prvs=0123abcdef=joe@example.com", "joe@example.com"),
        ("PRVS=9876ABCDEF=joe@example.com", "joe@example.com"),
        ("prvs=0123abcdef=a=b@example.com", "a=b@example.com"),
        ("prvs=joe=0123abcdef@example.com", "joe@example.com"),
        ("prvs=joe/0123abcdef@example.com", "joe@example.com"),
        ("SES=0a1b2c3d4e5f=joe@example.com", "joe@example.com"),
        ("ses=AbCdEfGhIjKl=joe@example.com", "joe@example.com"),
        ("SES=a1b2=joe@example.com", "joe@example.com"),
        ("<prvs=0123abcdef=joe@example.com>", "<joe@example.com>"),
        ("btv1==0723ac4f1b==joe@example.com", "joe@example.com"),
        ("BTV1==7353EABB1EA==joe@example.com", "joe@example.com"),
        ("<btv1==7353eabb1ea==a=b@example.com>", "<a=b@example.com>"),
        # The tag stands inside the quotes, which stay where they are needed.
        ('"SRS0=8Y3CZ=3U=example.com=joe doe"@fwd.org', '"joe doe"@example.com'),
        ('"SRS0=8Y3CZ=3U=example.com=joe"@fwd.org', "joe@example.com"),
        ('"SRS0=8Y3CZ=3U=example.com=a@b"@fwd.org', '"a@b"@example.com'),
        (r'"SRS0=8Y3CZ=3U=example.com=a\"b\\c"@fwd.org', r'"a\"b\\c"@example.com'),
        (r'"SRS0=8Y3CZ=3U=example.com=\"joe doe\""@fwd.org', '"joe doe"@example.com'),
        ('"SRS1=Wx=first.org==8Y3CZ=3U=example.com=joe doe"@last.net', '"joe doe"@example.com'),
        ('"prvs=0123abcdef=joe doe"@example.com', '"joe doe"@example.com'),
        ('<"prvs=0123abcdef=joe doe"@example.com>', '<"joe doe"@example.com>'),
        ('"prvs=joe doe/0123abcdef"@example.com', '"joe doe"@example.com'),
        ('prvs=0123abcdef="joe doe"@example.com', '"joe doe"@example.com'),
        ('"btv1==0723ac4f1b==joe doe"@example.com', '"joe doe"@example.com'),
        ('"SES=0a1b2c3d4e5f=joe doe"@example.com', '"joe doe"@example.com'),
        ('"SES=0a1b2c3d4e5f=.joe."@example.com', '".joe."@example.com'),
        ('"prvs=0123abcdef=j\u00fcrgen"@example.com', "j\u00fcrgen@example.com"),
    ],
)
def test_signed(signed: str, plain: str) -> None:
    assert unsign(signed) == plain


@pytest.mark.parametrize(
    ("signed", "plain"),
    [
        ("SRS0=8Y3CZ=3U=example.com=prvs=0123abcdef=joe@fwd.org", "joe@example.com"),
        ("prvs=0123abcdef=SRS0=8Y3CZ=3U=example.com=joe@fwd.org", "joe@example.com"),
        ("SRS0=aaaa=AB=fwd.org=SRS0=8Y3CZ=3U=example.com=joe@second.net", "joe@example.com"),
        ("SRS1=bb=x.org==8Y3CZ=3U=example.com=SES=0123456789ab=joe@y.net", "joe@example.com"),
        ("prvs=0123abcdef=prvs=joe=0123abcdef@example.com", "joe@example.com"),
        ('"SRS0=8Y3CZ=3U=a.com=prvs=0123abcdef=joe doe"@fwd.org', '"joe doe"@a.com'),
        ('"btv1==0123abcdef==SRS0=8Y3CZ=3U=a.com=joe doe"@fwd.org', '"joe doe"@a.com'),
    ],
)
def test_nested(signed: str, plain: str) -> None:
    assert unsign(signed) == plain


@pytest.mark.parametrize(
    "address",
    [
        "",
        "@",
        "<>",
        "joe@example.com",
        "<joe@example.com>",
        "srs0@example.com",
        "SRS0=joe@example.com",
        "SRS0=hash=joe@example.com",
        "SRS0=hash=3U=joe@example.com",
        "SRS0=hash=3U=example.com=@fwd.org",
        "SRS0=hash=day=example.com=joe@fwd.org",
        "SRS0=hash=3U=exa mple=joe@fwd.org",
        "SRS0=h=3U=example.com=joe@fwd.org",
        "SRS0hash=3U=example.com=joe@fwd.org",
        "xSRS0=8Y3CZ=3U=jsconnor.com=bills@bmsi.com",
        "SRS1=Wxyz=first.org=8Y3CZ=3U=jsconnor.com=bills@last.net",
        "SRS1=first.org==8Y3CZ=3U=jsconnor.com=bills@last.net",
        "SRS2=8Y3CZ=3U=jsconnor.com=bills@bmsi.com",
        "SRS0=8Y3CZ=3U=jsconnor.com=bills",
        "prvs@example.com",
        "prvs=joe@example.com",
        "prvs=news=joe@example.com",
        "prvs=012abcdef=joe@example.com",
        "prvs=0123abcdeg=joe@example.com",
        "prvs=0123abcdef0=joe@example.com",
        "prvs=0123abcdef=@example.com",
        "prvs==0123abcdef@example.com",
        "ses@example.com",
        "SES=joe@example.com",
        "SES=news=joe@example.com",
        "SES=a1=joe@example.com",
        "btv1==0123==joe@example.com",
        "btv1==0123abcdeg==joe@example.com",
        "btv1=0123abcdef=joe@example.com",
        "btv1==0123abcdef==@example.com",
        '"joe doe"@example.com',
        '"prvs=joe doe"@example.com',
        '"prvs=0123abcdef=joe doe@example.com',
        '"prvs=0123abcdef="@example.com',
        '"a"prvs=0123abcdef=joe@example.com',
        "bounce+prvs=0123abcdef=joe@example.com",
    ],
)
def test_look_alikes_stay(address: str) -> None:
    assert unsign(address) == address


pieces = st.sampled_from(
    [
        "SRS0=",
        "SRS1=",
        "prvs=",
        "SES=",
        "0123abcdef",
        "ab1+/",
        "=",
        "==",
        "3U",
        "example.com",
        "@",
        "joe",
        '"',
        "\\",
        " ",
        "btv1==",
        "<",
        ">",
        "\n",
        "�",
        "é",
        "/",
    ]
)


@given(st.one_of(st.text(), st.lists(pieces).map("".join)))
def test_any_text(text: str) -> None:
    plain = unsign(text)
    assert len(plain) <= len(text)
    assert unsign(plain) == plain


def test_deep_nesting_ends() -> None:
    assert unsign("prvs=0123abcdef=" * 40 + "joe@example.com") == "joe@example.com"
    too_long = "prvs=0123abcdef=" * 100_000 + "joe@example.com"
    assert unsign(too_long) is too_long
