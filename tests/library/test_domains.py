"""Domains compared as domains, in all modules that compare them."""

from __future__ import annotations

import copy
import json
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Milter._domains import DomainDict, canonical, canonical_address, unicode_form

A = "xn--bcher-kva.example"
U = "b\u00fccher.example"

# Each line is one domain, in the forms that mail and configurations write.
ONE_DOMAIN = [
    ["example.com", "EXAMPLE.com", "example.com.", "Example.Com.", "\uff45xample\uff0ecom"],
    [
        A,
        U,
        U.upper(),
        A.upper(),
        U + ".",
        A + ".",
        "bu\u0308cher.example",
        "b\u00fccher\u3002example",
    ],
    ["xn--strae-oqa.de", "stra\u00dfe.de", "STRA\u1e9eE.de", "Stra\u00dfe.DE."],
    ["strasse.de", "STRASSE.DE"],
    ["xn--nxasmm1c.gr", "\u03b2\u03cc\u03bb\u03bf\u03c2.gr"],
    ["xn--nxasmq6b.gr", "\u03b2\u03cc\u03bb\u03bf\u03c3.gr", "\u0392\u038c\u039b\u039f\u03a3.gr"],
    ["mx.xn--mller-kva.xn--p1ai", "mx.m\u00fcller.\u0440\u0444", "MX.xn--mller-kva.\u0420\u0424"],
    ["[192.0.2.1]"],
    ["[ipv6:2001:db8::1]", "[IPv6:2001:DB8::1]"],
    ["_dmarc.xn--tda.de", "_dmarc.\u00fc.de"],
    ["localhost", "LocalHost."],
    [""],
]
PAIRS = [(forms[0], form) for forms in ONE_DOMAIN for form in forms]

NO_DOMAINS = [
    "a..b",
    "xn--",
    "xn--\u00fc",
    "xn--a",
    "xn--99999999",
    "xn--zzzzzzzzzzzz.de",
    "xn--\udcff",
    "\udcff\udcfe.example",
    "\ud800.example",
    "\u00fc" * 64,
    "\u00fc" * 100_000,
    "x" * 100_000,
    ".".join(["\u00fc"] * 10_000),
    "\u2488com",
    "a\u2100b.de",
    "\u0000",
    " ",
    ".",
    "....",
    "-\u00fc-.de",
]


@pytest.mark.parametrize(("one", "form"), PAIRS)
def test_all_forms_of_a_domain_are_one(one: str, form: str) -> None:
    assert canonical(form) == one
    assert canonical(unicode_form(form)) == one
    assert unicode_form(form) == unicode_form(one)


def test_bytes_that_are_no_text_get_no_ascii_form() -> None:
    for label in ("\udcff", "\ud800", "\u00fc\udcff"):
        assert canonical(f"{label}.example") == f"{label}.example"


def test_different_domains_stay_different() -> None:
    forms = [forms[0] for forms in ONE_DOMAIN]
    assert len({canonical(form) for form in forms}) == len(forms)
    # What one character stands for makes no other domain of it.
    assert canonical("exa\u2488com") != "exa1.com"
    assert canonical("a\uff0fb.com") != "a/b.com"


@pytest.mark.parametrize("domain", NO_DOMAINS)
def test_what_is_no_domain_is_no_exception(domain: str) -> None:
    start = time.monotonic()
    found = canonical(domain)
    assert canonical(found) == found
    assert canonical(domain + ".") == found
    unicode_form(domain)
    canonical_address(f"<x@{domain}>")
    assert time.monotonic() - start < 5


@given(st.one_of(st.text(), st.text(alphabet="xn-aA.\u00fc\u00dc\u3002\udcff0")))
def test_any_text_has_one_canonical_form(text: str) -> None:
    found = canonical(text)
    assert canonical(found) == found
    assert canonical(unicode_form(text)) == found


@pytest.mark.parametrize(
    ("address", "want"),
    [
        ("<Joe@Example.COM>", "<Joe@example.com>"),
        ("Joe@Example.COM.", "Joe@example.com"),
        (f"<J\u00fcrgen@{U}>", f"<J\u00fcrgen@{A}>"),
        ('<"a@B"@Example.COM>', '<"a@B"@example.com>'),
        ('"A@B"', '"A@B"'),
        ("<>", "<>"),
        ("Postmaster", "Postmaster"),
        ("A@", "A@"),
    ],
)
def test_an_address_keeps_its_local_part(address: str, want: str) -> None:
    assert canonical_address(address) == want


# --- a dict of domains ---------------------------------------------------------------------


@pytest.mark.parametrize("key", [A, U])
def test_a_dict_of_domains_finds_each_form(key: str) -> None:
    domains = DomainDict[int]()
    domains[domains.key_for(key)] = 1
    domains[domains.key_for("Example.COM.")] = 2
    for form in (U, A, U.upper(), A + "."):
        assert domains[form] == 1
        assert form in domains
        assert domains.get(form) == 1
        assert domains.key_for(form) == key
    assert domains == {key: 1, "example.com": 2}
    assert repr(domains) == repr({key: 1, "example.com": 2})
    assert json.loads(json.dumps(domains)) == domains
    with pytest.raises(KeyError, match="other"):
        domains["other.example"]
    assert domains.get("other.example", 7) == 7
    assert domains.get("other.example") is None
    assert 5 not in domains
    with pytest.raises(KeyError, match="5"):
        domains[5]  # type: ignore[index]
    for other in (copy.copy(domains), copy.deepcopy(domains), pickle.loads(pickle.dumps(domains))):
        assert other == domains
    assert pickle.loads(pickle.dumps(domains))[U.upper()] == 1
