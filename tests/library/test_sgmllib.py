"""The SGMLParser interface: events, splits, linear time."""

from __future__ import annotations

import gc
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Milter import sgmllib
from Milter.sgmllib import SGMLParseError, SGMLParser


class Recorder(SGMLParser):
    """Records every event; neighbouring data as one."""

    def __init__(self, verbose=0):
        self.events = []
        super().__init__(verbose)

    def add(self, *event):
        if event[0] == "data" and self.events and self.events[-1][0] == "data":
            event = ("data", self.events.pop()[1] + event[1])
        self.events.append(event)

    def handle_data(self, data):
        self.add("data", data)

    def handle_comment(self, data):
        self.add("comment", data)

    def handle_decl(self, decl):
        self.add("decl", decl)

    def unknown_decl(self, data):
        self.add("unknown_decl", data)

    def handle_pi(self, data):
        self.add("pi", data)

    def unknown_starttag(self, tag, attrs):
        self.add("start", tag, attrs)

    def unknown_endtag(self, tag):
        self.add("end", tag)

    def unknown_entityref(self, ref):
        self.add("entity", ref)

    def unknown_charref(self, ref):
        self.add("char", ref)


class Elements(Recorder):
    """Has methods for some tags."""

    def start_k(self, attrs):
        self.add("k", attrs)

    def end_k(self):
        self.add("/k")

    def start_open(self, attrs):
        self.add("open", attrs)

    def do_d(self, attrs):
        self.add("d", attrs)

    def start_lit(self, attrs):
        self.setliteral()

    def end_lit(self):
        self.add("/lit")

    def start_plain(self, attrs):
        self.setnomoretags()

    def report_unbalanced(self, tag):
        self.add("unbalanced", tag)


def events(text, cls=Recorder):
    parser = cls()
    parser.feed(text)
    parser.close()
    return parser.events


def start(tag, **attrs):
    return ("start", tag, list(attrs.items()))


CASES = [
    ("<A HREF='x'>t</A >", [start("a", href="x"), ("data", "t"), ("end", "a")]),
    ("<a b=c/d e>", [start("a", b="c/d", e="e")]),
    ("<a b = \"c\" d= 'e'f=g>", [start("a", b="c", d="e", f="g")]),
    ("<a b='x\n\ty' c=\"\">", [start("a", b="x\n\ty", c="")]),
    (
        "<a b=&lt; c='&#65;&amp;#66;' d=&lt e='&x; &#300;'>",
        [start("a", b="<", c="A&#66;", d="&lt", e="&x; &#300;")],
    ),
    ("<a href=foo'bar\"baz>", [start("a", href="foo'bar\"baz")]),
    ("<a b==c>", [start("a", b="=c")]),
    ('<a b="x>y" c>', [start("a", b="x>y", c="c")]),
    ('<a "b" =c $ 1d e>', [start("a", e="e")]),
    ("<a.b-c_d f.g-h_i:j=k>", [("start", "a.b-c_d", [("f.g-h_i:j", "k")])]),
    ("<a<b>x</a<b>", [start("a"), start("b"), ("data", "x"), ("end", "a"), start("b")]),
    ("<a b=<c>", [start("a", b=""), start("c")]),
    ("<br/>x<br />", [start("br"), ("data", "x"), start("br")]),
    ("<em/text/ more", [start("em"), ("data", "text"), ("end", "em"), ("data", " more")]),
    ("<em/a<b>", [start("em", a="a"), start("b")]),
    ("<i>a<>b</>", [start("i"), ("data", "a"), start("i"), ("data", "b"), ("end", "")]),
    ("1 < 2 <3> << & && &1 &; &#x41; &# -", [("data", "1 < 2 <3> << & && &1 &; &#x41; &# -")]),
    ("&lt;&#65;&#65x&gt,", [("data", "<AAx>,")]),
    ("&#200;&nbsp; &nosuch", [("char", "200"), ("entity", "nbsp"), ("data", " &nosuch")]),
    ("&#" + "9" * 5000 + ";", [("char", "9" * 5000)]),
    ("&amp", [("data", "&amp")]),
    ("a<!-- b -- >c<!--d-->", [("data", "a"), ("comment", " b "), ("data", "c"), ("comment", "d")]),
    ("<!----><!--->x-->", [("comment", ""), ("comment", "->x")]),
    ("<!-- - -- - --->", [("comment", " - -- - -")]),
    (
        '<!DOCTYPE a "b>c" [<!ATTLIST d e (a | b) > <!-- ] -->]>x',
        [("decl", 'DOCTYPE a "b>c" [<!ATTLIST d e (a | b) > <!-- ] -->]'), ("data", "x")],
    ),
    ("<!DOCTYPE a [<!ENTITY b 'c]>' - ->]>", [("decl", "DOCTYPE a [<!ENTITY b 'c]>' - ->]")]),
    ("<!doctype x -- > -- y>z", [("decl", "doctype x -- > -- y"), ("data", "z")]),
    ('<!spacer type="block" height=25>', [("unknown_decl", 'spacer type="block" height=25')]),
    ("<!a 'b>c'>", [("unknown_decl", "a 'b>c'")]),
    ("<!><!->x", [("data", "x")]),
    ("<![CDATA[a]b]] ]>c", [("unknown_decl", "CDATA[a]b]"), ("data", "c")]),
    ("<![if x]>y<![endif]>", [("unknown_decl", "if x"), ("data", "y"), ("unknown_decl", "endif")]),
    ("<?pi x?>y", [("pi", "pi x?"), ("data", "y")]),
    ("</ x ></>", [("end", "x"), ("end", "")]),
] + [
    (text, [("data", text)])
    for text in (
        "<",
        "<a",
        "<a b='x>",
        "</a",
        "<!",
        "<!-",
        "<!-- x --",
        "<!a 'b>",
        "<![",
        "<![cdata[x",
        "<?x",
        "&",
        "&#",
        "&#6",
        "<a/b",
        "<!--",
        "<!DOCTYPE [",
        "<![ temp",
    )
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_events(text, expected):
    assert events(text) == expected


@pytest.mark.parametrize(("text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_events_do_not_depend_on_the_cut(text, expected, size):
    parser = Recorder()
    for i in range(0, len(text), size):
        parser.feed(text[i : i + size])
    parser.close()
    assert parser.events == expected


MARKUP = st.lists(
    st.sampled_from(
        [
            "<",
            ">",
            "a",
            "/",
            "!",
            "--",
            "-",
            "?",
            "&",
            "#",
            ";",
            "1",
            '"',
            "'",
            "=",
            " ",
            "[",
            "]",
            "]]>",
            "<!--",
            "<a b=",
            "</a>",
            "<![if ",
            "<![CDATA[",
            "<!doctype ",
            "<k>",
            "</k>",
            "\n",
            "<lit>",
            "</lit>",
            "<d>",
            "é",
        ]
    ),
    max_size=30,
).map("".join)


def outcome(pieces, cls):
    parser = cls()
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.close()
    except SGMLParseError as exc:
        return str(exc)
    return parser.events


@given(MARKUP, st.integers(1, 5))
def test_any_markup_in_any_cut_gives_the_same_events(text, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert outcome(pieces, Elements) == outcome([text], Elements)


def test_complete_constructs_are_reported_at_once():
    parser = Recorder()
    parser.feed("<a b='c")
    assert parser.events == []
    parser.feed("'>tex")
    assert parser.events == [start("a", b="c"), ("data", "tex")]
    parser.feed("<!-- x")
    parser.feed(" --")
    assert len(parser.events) == 2
    parser.feed(">")
    assert parser.events[2] == ("comment", " x ")


def test_start_tag_text():
    texts = []

    class Parser(SGMLParser):
        def unknown_starttag(self, tag, attrs):
            texts.append(self.get_starttag_text())

    parser = Parser()
    assert parser.get_starttag_text() is None
    parser.feed("<a  B = 'c' ><d/e/<f<>")
    assert texts == ["<a  B = 'c' >", "<d/", "<f", "<>"]


def test_methods_for_tags():
    assert events("<k a=1><d/><D b></k>", Elements) == [
        ("k", [("a", "1")]),
        ("d", []),
        ("d", [("b", "b")]),
        ("/k",),
    ]


def test_an_end_tag_closes_what_is_open_inside():
    assert events("<k><open><k></open></k></k>", Elements) == [
        ("k", []),
        ("open", []),
        ("k", []),
        ("/k",),
        ("end", "open"),
        ("/k",),
        ("unbalanced", "k"),
    ]
    assert events("<k></>", Elements) == [("k", []), ("/k",)]


def test_handlers_see_tag_and_method():
    seen = []

    class Parser(Elements):
        def handle_starttag(self, tag, method, attrs):
            seen.append((tag, method.__name__, attrs))
            super().handle_starttag(tag, method, attrs)

        def handle_endtag(self, tag, method):
            seen.append((tag, method.__name__))
            super().handle_endtag(tag, method)

    assert events("<k></k>", Parser) == [("k", []), ("/k",)]
    assert seen == [("k", "start_k", []), ("k", "end_k")]


def test_literal_mode_ends_at_the_next_end_tag():
    assert events("<lit>a<b>&amp;<!--x-->< </b><c></lit>", Elements) == [
        ("data", "a<b>&amp;<!--x-->< "),
        ("end", "b"),
        start("c"),
        ("/lit",),
    ]


def test_no_more_tags():
    assert events("<plain><a>&amp;<!--", Elements) == [("data", "<a>&amp;<!--")]


def test_unbalanced_end_tags_are_printed_on_request(capsys):
    class Parser(SGMLParser):
        def end_k(self):
            raise AssertionError

    for verbose in (0, 1):
        parser = Parser(verbose)
        parser.feed("</k>")
    assert capsys.readouterr().out == "*** Unbalanced </k>\n*** Stack: []\n"


def test_conversions_can_be_overridden():
    class Parser(Recorder):
        entitydefs = {"x": "<X>"}  # noqa: RUF012

        def convert_charref(self, name):
            return self.convert_codepoint(int(name))

        def convert_codepoint(self, codepoint):
            return f"[{codepoint}]"

    assert events("&x;&#300;<a b='&#7;&x;'>", Parser) == [
        ("data", "<X>[300]"),
        start("a", b="[7]<X>"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [("65", "A"), ("127", "\x7f"), ("128", None), ("x41", None), ("", None), ("-1", None)],
)
def test_convert_charref(name, text):
    assert SGMLParser().convert_charref(name) == text


@pytest.mark.parametrize("text", ["<!DOCTYPE foo $ >", "<![foo[x]]>", "<!a {}>"])
def test_illegal_declarations_are_errors(text):
    with pytest.raises(SGMLParseError):
        events(text)


def test_error_is_a_runtime_error_and_a_subclass_may_go_on():
    class Parser(Recorder):
        def error(self, message):
            self.add("error", message)

    assert issubclass(SGMLParseError, RuntimeError)
    kinds = [e[0] for e in events("<!a $>x", Parser)]
    assert kinds == ["error", "unknown_decl", "data"]


def test_comments_and_sections_may_be_parsed_without_a_report():
    parser = Recorder()
    parser.rawdata = "<!--a--><![if x]>"
    assert parser.parse_comment(0, 0) == 8
    assert parser.parse_marked_section(8, 0) == 17
    assert parser.events == []


def test_reset():
    parser = Recorder()
    parser.feed("<a")
    parser.reset()
    parser.feed("b>")
    parser.close()
    assert parser.events == [("data", "b>")]


def test_base_class_ignores_everything():
    parser = SGMLParser()
    parser.feed("a<b>&nbsp;&#200;</b><!--c--><!doctype d><![if e]><?f?>&amp;<")
    parser.close()
    assert parser.rawdata == ""


def test_printing_parser(tmp_path, capsys, monkeypatch):
    page = tmp_path / "test.html"
    page.write_text(
        "<!doctype a><p x=y>Hi &amp; \xe9"
        + "z" * 80
        + "</p>&nbsp;&#200;<?q?><![if b]><!--"
        + "c" * 80
        + "-->end",
        encoding="latin-1",
    )
    sgmllib.test([str(page)])
    printed = capsys.readouterr().out
    assert "decl: 'doctype a'" in printed
    assert 'start tag: <p x="y">' in printed
    assert "end tag: </p>" in printed
    assert "*** unknown entity ref: &nbsp;" in printed
    assert "*** unknown char ref: &#200;" in printed
    assert "*** unknown decl: [if b]" in printed
    assert "pi: 'q?'" in printed
    assert "data: 'end'" in printed
    assert "..." in printed
    sgmllib.test(["-s", str(page)])
    assert capsys.readouterr().out == ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sgmllib"])
    sgmllib.test()
    assert capsys.readouterr().out == printed
    with page.open(encoding="latin-1", newline="") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        sgmllib.test(["-"])
    assert capsys.readouterr().out == printed
    with pytest.raises(OSError, match="nowhere"):
        sgmllib.test([str(tmp_path / "nowhere")])


HOSTILE = [
    "<",
    "<a ",
    '<a "',
    '<a b="',
    "<a b='\" ",
    "<!--",
    "<!-- -",
    "<!",
    '<!"',
    "<![cdata[",
    "] ]",
    "<![if ",
    "&",
    "&a",
    "&#",
    "&#1",
    '"',
    "-",
    "-- ",
    "</",
    "</a",
    "<?",
    "<a/",
    "<>",
    "<a =",
    "<!doctype [",
    "<b>",
    "<k>",
    "<open></k>",
    " ",
]


def seconds(text, size):
    parser = Elements()
    parser.handle_data = parser.unknown_endtag = lambda data: None
    gc.collect()
    gc.disable()  # it is not the parser's work to go through all objects of the test run
    try:
        began = time.process_time()
        for i in range(0, len(text), size):
            parser.feed(text[i : i + size])
        parser.close()
        return time.process_time() - began
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [1 << 30, 7])
@pytest.mark.parametrize("unit", HOSTILE)
def test_time_is_linear(unit, size):
    short, long = (unit * (n // len(unit)) for n in (10_000, 100_000))
    # 10 times the input; a quadratic parser would take 100 times as long.  The best of several
    # runs, as what else the machine does makes any single one longer.
    best_short = best_long = float("inf")
    for _ in range(8):
        best_short = min(best_short, seconds(short, size))
        best_long = min(best_long, seconds(long, size))
        if best_long <= 20 * best_short + 0.02:
            return
    pytest.fail(f"{best_long:.3f} s for ten times what takes {best_short:.3f} s")


def test_positions_are_not_kept():
    parser = SGMLParser()
    parser.feed("x\n<a>")
    assert parser.getpos() == (1, 0)
