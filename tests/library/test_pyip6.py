"""Milter.pyip6 against the standard ipaddress module and the published forms."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Milter.pyip6 import inet_ntop, inet_pton

# Words that are often zero, or the prefix of embedded IPv4 addresses: random bytes seldom are.
words = st.one_of(st.sampled_from([0, 0, 0, 1, 0xFFFF]), st.integers(0, 0xFFFF))
packed = st.lists(words, min_size=8, max_size=8).map(
    lambda ws: b"".join(w.to_bytes(2, "big") for w in ws)
)
address_like = st.text(alphabet="0123456789abcdefABCDEFg:.% x-+_\u0661", max_size=45)


@pytest.mark.parametrize(
    ("hexadecimal", "text"),
    [
        ("00" * 16, "::"),
        ("00" * 15 + "01", "::1"),
        ("00" * 12 + "01020304", "::1.2.3.4"),
        ("00" * 10 + "ffff01020304", "::FFFF:1.2.3.4"),
        ("20010db8000000000001000000000001", "2001:db8::1:0:0:1"),
        ("20010db8000000010000000000000001", "2001:db8:0:1::1"),
        ("20010db8000000010001000100010001", "2001:db8:0:1:1:1:1:1"),
        ("fe80" + "00" * 14, "fe80::"),
    ],
)
def test_ntop_writes_the_documented_form(hexadecimal: str, text: str) -> None:
    assert inet_ntop(bytes.fromhex(hexadecimal)) == text


@given(packed)
def test_ntop_agrees_with_ipaddress(s: bytes) -> None:
    text = inet_ntop(s)
    assert ipaddress.IPv6Address(text).packed == s
    if "." not in text:
        assert text == ipaddress.IPv6Address(s).compressed


@given(packed)
def test_pton_undoes_ntop(s: bytes) -> None:
    assert inet_pton(inet_ntop(s)) == s
    assert inet_pton(ipaddress.IPv6Address(s).exploded) == s


@given(st.one_of(address_like, st.text()))
def test_pton_accepts_what_ipaddress_accepts(text: str) -> None:
    try:
        want = ipaddress.ip_address("scope%" if "%" in text else text)
    except ValueError:
        with pytest.raises(ValueError, match=re.escape(text) + r"\Z") as caught:
            inet_pton(text)
        assert caught.value.args == (text,)
        return
    mapped = bytes(10) + b"\xff\xff" if want.version == 4 else b""
    assert inet_pton(text) == mapped + want.packed


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":::",
        "1:2",
        "1::2::3",
        "12345::",
        "1:2:3:4:5:6:7:8:9",
        "1:2:3:4:5:6:7::8",
        "1.2.3.4::",
        "::1.2.3",
        "::1.2.3.256",
        "01.2.3.4",
        "::1 ",
        "+1::",
        "0x1::",
        "1_0::",
        "::1%lo",
        "\u0661::",
        "1.2.3.4:1::",
        "1:2:3:4:5:6:7:1.2.3.4",
    ],
)
def test_pton_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text) + r"\Z") as caught:
        inet_pton(text)
    assert caught.value.args == (text,)


def test_a_bare_ipv4_address_is_mapped() -> None:
    assert inet_pton("1.2.3.4") == bytes(10) + b"\xff\xff\x01\x02\x03\x04"


@pytest.mark.parametrize("length", [0, 4, 15, 17])
def test_ntop_refuses_other_lengths(length: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        inet_ntop(bytes(length))
