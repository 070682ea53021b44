"""ESMTP parameters as dictionaries and keywords."""

from __future__ import annotations

import pytest

import Milter


def test_param2dict_folds_names_and_keeps_values():
    params = ["size=1024", "BODY=8bitMIME", "smtputf8", "ORCPT=rfc822;a=b", "ENVID="]
    assert Milter.param2dict(params) == {
        "SIZE": "1024",
        "BODY": "8bitMIME",
        "SMTPUTF8": None,
        "ORCPT": "rfc822;a=b",
        "ENVID": "",
    }


def test_param2dict_takes_bytes_and_leaves_their_values_alone():
    params = [b"size=\xff=\x00", b"SMTPUTF8", "ret=HDRS"]
    assert Milter.param2dict(params) == {"SIZE": b"\xff=\x00", "SMTPUTF8": None, "RET": "HDRS"}


def test_param2dict_of_nothing_and_by_keyword():
    assert Milter.param2dict(()) == {}
    assert Milter.param2dict(str=iter(["a=1", "A=2"])) == {"A": "2"}


def test_a_name_that_is_not_utf8_can_be_given_back():
    (name,) = Milter.param2dict([b"x\xff=1"])
    assert name.encode("utf-8", "surrogateescape").lower() == b"x\xff"


def test_dictfromlist_drops_what_has_no_value():
    items = ["size=1024", "SMTPUTF8", b"ret=HDRS", "size", "x=", "=y", "="]
    assert Milter.dictfromlist(items) == {"SIZE": "1024", "RET": b"HDRS", "X": ""}


def test_envcallback_passes_values_by_keyword_and_flags_by_position():
    def envfrom(address, *flags, **keywords):
        return address, flags, keywords

    got = Milter.envcallback(envfrom, ["<a=b@c>", "SIZE=9", "SMTPUTF8", b"auth=<>", b"X"])
    assert got == ("<a=b@c>", ("SMTPUTF8", b"X"), {"SIZE": "9", "AUTH": b"<>"})


def test_envcallback_lets_a_keyword_be_a_parameter():
    def envrcpt(address, NOTIFY=None, ORCPT="none"):
        return NOTIFY, ORCPT

    assert Milter.envcallback(envrcpt, ("<a@b>", "NOTIFY=NEVER")) == ("NEVER", "none")
    with pytest.raises(TypeError):
        Milter.envcallback(envrcpt, ("<a@b>", "UNHEARD=OF"))


def test_envcallback_with_a_name_that_the_function_has_itself():
    def by_name(F, *flags, **keywords):
        return F, flags, keywords

    def by_position(F, /, *flags, **keywords):
        return F, flags, keywords

    args = ["<a@b>", "f=1", "FLAGS=2", "X", "=y"]
    with pytest.raises(TypeError, match="multiple values for argument 'F'"):
        Milter.envcallback(by_name, args)
    got = Milter.envcallback(by_position, args)
    assert got == ("<a@b>", ("X", "=y"), {"F": "1", "FLAGS": "2"})


@pytest.mark.parametrize("item", ["=x", "=", b"=x", ""])
def test_an_item_without_a_name_is_none_to_dictfromlist(item):
    assert Milter.dictfromlist([item, "A=1"]) == {"A": "1"}
