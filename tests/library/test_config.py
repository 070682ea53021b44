"""Configuration: quieter defaults, lists, and sets of addresses."""

from __future__ import annotations

import configparser

import pytest

from Milter.config import MilterConfigParser

TEXT = r"""
[a]
x = 1, 2 ,3,
y = foo
empty =
i = 7
f = 1.5
b = yes
bad = seven
lone = 50%
ref = <%(y)s>
addrs = u@Dom.com, V@dom.com , <w@other.com>, "q@q"@third.com, @any.com
one = A@B.com, c@d.com
two = e@f.com, c@d.com
both = one, two, three
"""


@pytest.fixture
def config():
    parser = MilterConfigParser({"port": "1025", "y": "default"})
    parser.read_string(TEXT)
    return parser


def with_option(value):
    parser = MilterConfigParser()
    parser.read_string(f"[a]\nx = {value}\nlist = x\n")
    return parser


def test_defaults_are_not_options_of_sections(config):
    assert "port" not in config.options("a")
    assert not config.has_option("a", "port")
    assert "port" not in dict(config.items("a", raw=True))
    assert "port" not in config["a"]


def test_defaults_can_be_read(config):
    assert config.defaults["port"] == "1025"
    assert config.defaults()["port"] == "1025"
    assert MilterConfigParser().defaults == {}
    assert MilterConfigParser(None).defaults == {}


def test_defaults_of_one_parser_are_its_own():
    given = {"a": "1"}
    MilterConfigParser(given).defaults["b"] = "2"
    assert given == {"a": "1"}
    assert MilterConfigParser().defaults == {}


def test_get(config):
    assert config.get("a", "y") == "foo"
    assert config.get("a", "empty") == ""
    assert config.get("a", "ref") == "<foo>"
    assert config.get("a", "ref", raw=True) == "<%(y)s>"
    assert config.get("a", "y", vars={"y": "vars"}) == "vars"


def test_get_of_what_is_missing(config):
    assert config.get("a", "none") is None
    assert config.get("nowhere", "none") is None
    assert config.get("a", "none", "positional") == "positional"
    assert config.get("nowhere", "none", fallback="keyword") == "keyword"
    assert config.get("a", "port") == "1025"
    assert config.get("nowhere", "port") == "1025"
    assert config.get("a", "port", fallback="25") == "25"
    assert config["a"].get("none", "proxy") == "proxy"


def test_get_with_a_lone_percent(config):
    with pytest.raises(configparser.InterpolationError):
        config.get("a", "lone")


def test_typed_getters(config):
    assert config.getint("a", "i") == 7
    assert config.getfloat("a", "f") == 1.5
    assert config.getboolean("a", "b") is True
    assert config["a"].getint("i") == 7
    assert config.getint("a", "port") == 1025


@pytest.mark.parametrize("getter", ["getint", "getfloat", "getboolean"])
def test_typed_getters_of_what_is_missing(config, getter):
    get = getattr(config, getter)
    assert get("a", "none", fallback=3) == 3
    assert get("a", "port", fallback=3) == 3
    assert get("nowhere", "none", fallback=None) is None
    with pytest.raises(configparser.NoOptionError):
        get("a", "none")
    with pytest.raises(configparser.NoSectionError):
        get("nowhere", "none")


def test_getdefault(config):
    assert config.getdefault("a", "y", "other") == "foo"
    assert config.getdefault("a", "none", "other") == "other"
    assert config.getdefault("a", "none") is None
    assert config.getdefault("nowhere", "port", "other") == "other"


def test_getintdefault(config):
    assert config.getintdefault("a", "i") == 7
    assert config.getintdefault("a", "none", 9) == 9
    assert config.getintdefault("nowhere", "none") is None
    assert config.getintdefault("a", "port", 9) == 9
    for option in ("bad", "empty"):
        with pytest.raises(ValueError, match=f"option '{option}' in section 'a': .*whole number"):
            config.getintdefault("a", option, 9)


def test_getlist(config):
    assert config.getlist("a", "x") == ["1", "2", "3"]
    assert config.getlist("a", "y") == ["foo"]
    assert config.getlist("a", "empty") == []
    assert config.getlist("a", "none") == []
    assert config.getlist("nowhere", "port") == []


def test_list_over_several_lines():
    assert with_option("a,\n  b,\n  c").getlist("a", "x") == ["a", "b", "c"]


def test_getaddrset(config):
    assert config.getaddrset("a", "addrs") == {
        "dom.com": ["u", "V"],
        "other.com": ["w"],
        "third.com": ['"q@q"'],
        "any.com": [""],
    }
    assert config.getaddrset("a", "none") == {}
    assert config.getaddrset("a", "empty") == {}


def test_getaddrset_from_files(tmp_path):
    (tmp_path / "Example.com").write_text("one two  # not this\n\n# nor this\nthree\nx@other.org\n")
    config = with_option("u@dom.com, file:Example.com, v@example.com")
    expected = {"dom.com": ["u"], "example.com": ["one", "two", "three", "v"], "other.org": ["x"]}
    assert config.getaddrset("a", "x", str(tmp_path)) == expected
    assert config.getaddrset("a", "x", tmp_path) == expected
    absolute = with_option(f"file:{tmp_path}/Example.com")
    assert absolute.getaddrset("a", "x", "/elsewhere")["example.com"] == ["one", "two", "three"]


def test_getaddrset_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "example.com").write_bytes(b"caf\xe9\n")
    monkeypatch.chdir(tmp_path)
    found = with_option("file: example.com").getaddrset("a", "x")
    assert found == {"example.com": ["caf\udce9"]}


@pytest.mark.parametrize("item", ["dom.com", "user@", "<>", "FILE:x"])
def test_getaddrset_refuses_what_is_no_address(item):
    with pytest.raises(ValueError, match=r"option 'x' in section 'a': .* is neither user@domain"):
        with_option(item).getaddrset("a", "x")


@pytest.mark.parametrize("method", ["getaddrset", "getaddrdict"])
def test_list_file_that_is_missing(tmp_path, method):
    config = with_option("file:missing")
    option = "x" if method == "getaddrset" else "list"
    with pytest.raises(FileNotFoundError, match="missing"):
        getattr(config, method)("a", option, tmp_path)


def test_getaddrdict(config):
    assert config.getaddrdict("a", "both") == {"A@B.com": "one", "c@d.com": "two", "e@f.com": "two"}
    assert config.getaddrdict("a", "none") == {}
    assert config.getaddrdict("a", "one") == {}


def test_getaddrdict_from_files(tmp_path):
    (tmp_path / "list").write_text("u@x.com v@x.com\n# w@x.com\n")
    config = with_option("a@b.com, file:list")
    expected = {"a@b.com": "x", "u@x.com": "x", "v@x.com": "x"}
    assert config.getaddrdict("a", "list", str(tmp_path)) == expected


def test_is_a_config_parser(config):
    assert isinstance(config, configparser.ConfigParser)
    assert config.sections() == ["a"]


A, U = "xn--bcher-kva.example", "b\u00fccher.example"
FORMS = [A, U, A.upper(), U.upper(), A + ".", U + "."]


@pytest.mark.parametrize("written", FORMS)
@pytest.mark.parametrize("asked", FORMS)
def test_getaddrset_compares_domains_as_domains(written, asked):
    found = with_option(f"a@{written}, b@{asked}, c@other.example").getaddrset("a", "x")
    assert found[asked] == ["a", "b"]
    assert asked in found
    assert found.get(asked) == ["a", "b"]
    assert found.get("sub." + asked) is None
    assert set(found) <= {A, U, "other.example"}
    assert len(found) == 2


@pytest.mark.parametrize("domain", ["xn--\u00fc", "a..b", "\u00fc" * 100, "x" * 300])
def test_getaddrset_takes_what_is_no_domain(domain):
    found = with_option(f"a@{domain}").getaddrset("a", "x")
    assert found[domain] == ["a"]
    assert found[domain.upper()] == ["a"]


@pytest.mark.parametrize("method", ["getaddrset", "getaddrdict"])
def test_list_file_may_begin_with_a_byte_order_mark(tmp_path, method):
    (tmp_path / "example.com").write_bytes(b"\xef\xbb\xbfone@a.com two@b.com\n")
    option = "x" if method == "getaddrset" else "list"
    found = getattr(with_option("file:example.com"), method)("a", option, tmp_path)
    want = {"getaddrset": {"a.com": ["one"], "b.com": ["two"]}}
    assert found == want.get(method, {"one@a.com": "x", "two@b.com": "x"})


def test_parameters_of_the_readers_have_the_names_of_configparser(config):
    assert config.getint(section="a", option="i") == 7
    assert config.getfloat(section="a", option="i") == 7.0
    assert config.getboolean(section="a", option="none", fallback=True) is True
