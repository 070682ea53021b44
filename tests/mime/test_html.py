"""The HTML filters: what passes unchanged, and what does not pass."""

from __future__ import annotations

import html.parser
import io
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mime

MSG = mime.HTMLScriptFilter.msg


def filtered(text, cls=mime.HTMLScriptFilter, size=None):
    out = io.StringIO()
    parser = cls(out)
    for i in range(0, len(text), size or len(text) or 1):
        parser.feed(text[i : i + (size or len(text))])
    parser.close()
    return out.getvalue()


class Browser(html.parser.HTMLParser):
    """What a browser would run, by the standard library's independent parser."""

    def __init__(self, text):
        super().__init__()
        self.scripts = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if re.sub("[^a-z:]", "", tag).rpartition(":")[2].startswith("script"):
            self.scripts.append(tag)
        for name, value in attrs:
            link = re.sub(r"[\0- ]", "", value or "").lower()
            if name.startswith("on") or re.match("javascript:|vbscript:|data:text/html", link):
                self.scripts.append((tag, name, value))


UNCHANGED = [
    "",
    "plain text, 1 < 2 & 3 > 2, on load = x, javascript:x",
    "<! Illegal declaration used as comment> <![if conditional]> Optional <![endif]> <!-- c -->",
    '<P CLASS = x  >a &nbsp &#65 &#x41; &amp;<br/><BR /><a href="http://x/?a=1&b=2">t</A >',
    "<!--[if gte mso 9]><xml><o:p></o:p></xml><![endif]--><!--[if !mso]><!--> x <!--<![endif]-->",
    "<style><!-- p > a { color: red; behavior:url(#default#VML); } --></style>",
    "<style>/*<![CDATA[*/ p {color: red} /*]]>*/</style>",
    '<a href=x title="a > b" href=\'y\'>t</a><img alt="a<b" src=cid:x>',
    '<img src="data:image/png;base64,AA=="><img src="data:image/svg+xml,x">',
    '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0//EN" "http://www.w3.org/x.dtd">',
    '<?xml version="1.0"?><font color=red size=+1>x</FONT><p<',
    "<title>javascript: is fun</title><p>onclick=alert(1)",
    '<meta http-equiv="Content-Type" content="text/html; charset=utf-8">',
    '<a title="javascript: the good parts" href="https://x/?q=javascript:y">x</a>',
    "</x ></ p>< p><1><> </> &; &#; <a",
    "<p data-on=x data-onload=y on>",
    '<a href="unfinished',
    "<td nowrap style='color:red;background:url(x.png)'>",
    "<textarea>a &lt; <b>b</b></textarea>",
]

SCRIPTS = [
    "<script>alert(1)</script>x",
    "<SCRIPT SRC=http://x/a.js></SCRIPT>x",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<ScRiPt\n>alert(1)</sCrIpT\n>x",
    "<script/x>alert(1)</script >x",
    "<script>a<script>alert(1)</script>b</script>x",
    "<script><!-- </b> alert(1) //--></script>x",
    "<script>alert(1)",
    "<script",
    "<svg><script>alert(1)</script></svg>x",
    '<svg><script href="data:,alert(1)"/>x <b onload=x>',
    "<svg/onload=alert(1)>x",
    "<x:script>alert(1)</x:script>x",
    "<scr\0ipt>alert(1)</scr\0ipt>x",
    "<\0script>alert(1)</script>x",
    "<script\x0b>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '<img src=x OnError = "alert(1)">',
    '<img src="x"onerror=alert(1)>',
    "<img/src=x/onerror=alert(1)>",
    "<img src=x onerror\n=\nalert(1)>",
    "<img src=`x` onerror=alert(1)>",
    "<a href=x onclick=alert(1)",
    "<img src=x onerror=alert(1)//",
    "<input autofocus onfocus=alert(1) >",
    '<a href="javascript:alert(1)">x',
    '<a href=" &#1; java\nscript:alert(1)">x',
    '<a href="&#106;&#x61;vascript&colon;alert(1)">x',
    '<a href="&#0000000000000000106avascript:alert(1)">x',
    '<a href="&#x00000000000000006A;avascript:alert(1)">x',
    '<a href="jav&Tab;asc&NewLine;ript:alert(1)">x',
    '<a href="\u200bJaVaScRiPt:alert(1)">x',
    '<a href="view-source:javascript:alert(1)">x',
    "<a href='vbscript:msgbox(1)'>x",
    '<a href="livescript:x">',
    '<a href="data:text/html;base64,PHNjcmlwdD4=">x',
    "<a href=data:text/html,<script>alert(1)</script>>x",
    '<embed src="data:image/svg+xml;base64,xx">',
    "<form action=javascript:alert(1)><button formaction=javascript:alert(1)>",
    '<meta http-equiv=refresh content="0;url=javascript:alert(1)">',
    '<meta http-equiv=refresh content="0;url=data:text/html,x">',
    '<meta content="text/html; charset=utf-7">',
    '<animate attributeName=href values="a;javascript:alert(1)">',
    "<a xlink:href=javascript:alert(1)>x",
    '<iframe srcdoc="&lt;script>alert(1)&lt;/script>"></iframe>',
    '<object type="text/x-scriptlet" data=x></object>',
    '<a href="x&{alert(1)};">',
    '<div style="width:expression(alert(1))">',
    '<div style="width:exp/**/ression(alert(1))">',
    '<div style="width:\\65xpression(alert(1))">',
    '<div style="width:\uff45xpression(alert(1))">',
    '<div style="background:url(javascript:alert(1))">',
    '<div style="behavior:url(x.htc)">',
    "<style>b{x:expression(alert(1))}</style>x",
    "<style>@import 'javascript:alert(1)'; \\0 \\110000 </style>x",
    "<!--[if IE]><script>alert(1)</script><![endif]-->x",
    "<!--[if IE]><img src=x onerror=alert(1)><![endif]-->x",
    "<![if IE]><script>alert(1)</script><![endif]>x",
    "<!-- <script>alert(1)</script> -->x",
    "<!--><script>alert(1)</script>-->x",
    "<!---><img src=x onerror=alert(1)>-->x",
    "<!-- --!><img src=x onerror=alert(1)>-->x",
    '<!-- -- ><a title="--><img src=x onerror=alert(1)>">x',
    "<!-- <script>alert(1)",
    '<a "><script>alert(1)</script>">x',
    '<a title="</title><script>alert(1)</script>">x',
    "<a b='--><img src=x onerror=alert(1)>'>x",
    "<a<b onload=x>",
    '<textarea><a title="</textarea><img src=x onerror=alert(1)>">',
    "<svg><style><img src=x onerror=alert(1)></style>",
    '<svg><style><a title="</style><img src=x onerror=alert(1)>">',
    "<style><textarea></style><a title='</textarea><script>alert(1)</script>'>",
    "<style></title></style><script>alert(1)</script>",
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "<title><!--</title><img src=x onerror=alert(1)>-->",
    "<plaintext><script>alert(1)</script>",
    "<![CDATA[><img src=x onerror=alert(1)>]]>x",
    '<svg><![CDATA[><a title="]]><img src=x onerror=alert(1)>">x',
    "<!DOCTYPE x [<!ENTITY a '<script>alert(1)</script>'>]>",
    '<!x href="javascript:y">',
    '<?xml-stylesheet href="javascript:alert(1)"?>',
    '<?import namespace="t" implementation="#default#time2">',
    "</p onclick=alert(1)>",
    '</p "onclick=alert(1)>',
    "</ x onclick=alert(1)>",
]


@pytest.mark.parametrize("text", UNCHANGED)
def test_harmless_html_passes_unchanged(text):
    assert filtered(text) == text


@pytest.mark.parametrize("text", SCRIPTS)
def test_scripts_do_not_pass(text):
    result = filtered(text)
    assert result != text
    assert Browser(result).scripts == []
    shown = re.sub(r"""(title|b)=("[^"]*"|'[^']*')|noscript""", "", result.replace(MSG, ""))
    assert not re.search(r"(?i)<[^>]*script|\son\w+\s*=|javascript:|expression\(", shown)
    assert filtered(result) == result


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", SCRIPTS + UNCHANGED)
def test_the_result_does_not_depend_on_the_cut(text, size):
    assert filtered(text, size=size) == filtered(text)


@pytest.mark.parametrize("text", SCRIPTS + UNCHANGED)
def test_the_plain_filter_changes_nothing(text):
    assert filtered(text, mime.SGMLFilter) == text
    assert filtered(text, mime.SGMLFilter, 3) == text


@given(st.text(st.sampled_from("<>!-/?&#;[]\"'= \n\0aé\udc80script"), max_size=40))
def test_the_plain_filter_is_the_identity(text):
    assert filtered(text, mime.SGMLFilter) == text
    assert filtered(text, mime.SGMLFilter, 4) == text


PIECES = st.lists(
    st.sampled_from(
        [
            "<",
            ">",
            "<a ",
            "<p>",
            "</p>",
            '"',
            "'",
            "=",
            " ",
            "/",
            "x",
            "<!--",
            "-->",
            "--!>",
            "<!",
            "<script>",
            "</script>",
            "<script ",
            "<style>",
            "</style>",
            "<textarea>",
            "</textarea>",
            "title=",
            "href=",
            "javascript:",
            " onload=",
            "<svg>",
            "<![CDATA[",
            "]]>",
            "`",
            "\n",
            "<title>",
            "</title>",
            "&#106;",
            "<noscript>",
            "</noscript>",
            "<?",
            "<img src=x onerror=y>",
        ]
    ),
    max_size=25,
).map("".join)


@given(PIECES)
def test_nothing_made_of_hostile_pieces_runs(text):
    result = filtered(text)
    assert Browser(result).scripts == []
    again = filtered(result)
    assert Browser(again).scripts == []


def test_messages_stand_in_place_of_scripts():
    text = "<! x > <![if c]> y <![endif]> <!-- z -->\n"
    assert filtered(text + "<script lang=x> Dangerous </script>" + text) == text + MSG + text
    assert filtered("a<script>b</script>c<script>d") == f"a{MSG}c{MSG}"


def test_attributes_are_removed_one_by_one():
    assert filtered('<a  onclick="x" HREF=y\tonload=z/>') == "<a HREF=y>"
    assert filtered('<a b="1"onclick="x"href="y">') == '<a b="1" href="y">'
    assert filtered('<a b="1"onclick=x href="y">') == '<a b="1" href="y">'


def test_what_readers_might_cut_differently_is_removed():
    assert filtered("<!-- -- ><x-->y") == MSG + "y"
    assert filtered("<style><title></style>y") == f"<style>{MSG}</style>y"
    assert filtered("<a `=x>y") == "<a>y"


def test_output_comes_as_soon_as_it_can():
    out = io.StringIO()
    parser = mime.HTMLScriptFilter(out)
    for piece, expected in (
        ("a<b", "a"),
        (">", "a<b>"),
        ("<script>x</scr", f"a<b>{MSG}"),
        ("ipt>y", f"a<b>{MSG}y"),
    ):
        parser.feed(piece)
        assert out.getvalue() == expected


def test_msg_can_be_replaced():
    class Mine(mime.HTMLScriptFilter):
        msg = "[gone]"

    assert filtered("a<script>b</script><!--<script>--><style><script></style>", Mine) == (
        "a[gone][gone]<style>[gone]</style>"
    )


def test_subclasses_see_events():
    class Upper(mime.SGMLFilter):
        def handle_data(self, data):
            self.write(data.upper())

        def start_b(self, attrs):
            self.write("[")

        def end_b(self):
            self.write("]")

        def start_i(self, attrs):
            self.unknown_starttag("em", attrs)

        def do_x(self, attrs):
            self.handle_special("y")
            self.handle_special("y")
            self.handle_comment("z")
            self.handle_pi("p")
            self.handle_charref("1")
            self.handle_entityref("e")
            self.unknown_starttag("q", [("r", '"')])
            self.unknown_endtag("q")

    assert filtered("a<b>b</b><i c='d'><x>", Upper) == (
        "A[B]<i c='d'><x><!y><!--z--><?p>&#1;&e;<q r=\"&quot;\"></q>"
    )


def test_subclasses_of_the_script_filter_may_call_its_handlers():
    class Mine(mime.HTMLScriptFilter):
        def do_x(self, attrs):
            self._source = None
            self.handle_comment("c")
            self.unknown_starttag("q", [])
            self.unknown_endtag("q")

    assert filtered("<x>", Mine) == "<!--c--><q></q>"


@pytest.mark.parametrize(
    "unit",
    [
        "<script>",
        "<script/>",
        "<style><title>",
        "<style>/*",
        "<textarea>",
        "<a b='<c>'>",
        "<!-- -- >",
        "<a onx=1 ",
        "<!--<a-->",
        "<![CDATA[",
        "&#0",
        "<a href='a:a:",
        "<a style='/*",
        "<svg:script>",
        "</script>",
        "<p></b>",
        "<a content='data:",
        "on",
        "<a b=/on",
    ],
)
@pytest.mark.parametrize("frame", ["%s", '<a href="%s">', "<style>%s</style>", "<!--%s-->"])
def test_time_is_linear(unit, frame):
    def seconds(length):
        text = frame % (unit * (length // len(unit)))
        began = time.process_time()
        filtered(text)
        return time.process_time() - began

    # 10 times the input; a quadratic filter would take 100 times as long
    assert any(seconds(200_000) <= 20 * seconds(20_000) + 0.05 for _ in range(5))


def test_sections_before_one_end_take_linear_time():
    def seconds(count):
        text = "<![CDATA[" * count + ">"
        began = time.process_time()
        assert filtered(text) == " " * count + ">"
        return time.process_time() - began

    assert any(seconds(40_000) <= 8 * seconds(10_000) + 0.05 for _ in range(3))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 1000])
def test_sections_in_pieces(size):
    text = (
        "<![CDATA[a]]><![CDATA[<b]]><![CDATA[c]]> <![CDATA[<![CDATA[d]]><![CDATA[e>f]]><![CDATA[g"
    )
    expected = "<![CDATA[a]]> <b]]><![CDATA[c]]>  <![CDATA[d]]> e>f]]><![CDATA[g"
    assert filtered(text, size=size) == expected


def test_huge_references_are_bounded():
    text = '<a href="&#' + "9" * 100_000 + ';">x</a>'
    assert filtered(text) == text
    text = '<a href="&#' + "0" * 100_000 + '106;avascript:x">x</a>'
    assert filtered(text) == "<a>x</a>"


PIECES = (
    *("<a>", "<td>", "</td>", "<SCRIPT>", "</script>", "<o:p>", "</o:p>", "<x:script>", "<br />"),
    *("<style>", "</style>", "<title>", "</title>", "<noscript>", "</noscript>", "<xmp>", "<svg>"),
    *(
        "<!-- c -->",
        "<!--[if mso]>",
        "<![endif]-->",
        "<!>",
        "<?>",
        "</>",
        "</p >",
        "<b</b>",
        "</p 'onload=x>",
    ),
    *('<td width="5%" class="a b">', '<td class="x"id="y">', '<td/class="x">', '<td width="1"'),
    *("<p onclick=x>", "<a href=javascript:x>", "<scripty>", "<script/>", "<:a>", "<a:>"),
    *("<", ">", "&", "&amp;", '"', "'", "->", "--", "/", "!", "-", "[", "=", "`", "\n", " "),
    *("x", "java", "script:", "on", "alert(1)"),
)


NAMES = (
    "a",
    "td",
    "img",
    "x:y",
    "svg",
    "meta",
    "set",
    "A",
    "noscript",
    "style",
    "title",
    "scripts",
)
ATTRIBUTES = (
    *("a", "b=c", 'b="c d"', "b='c'", "width=5%", "on", "onx", "onload=y", "ONX", "only", "once=1"),
    *(
        "srcdoc",
        "srcdoc=a",
        'class="a"',
        "x:on=1",
        "/",
        "=",
        '""',
        "`a`",
        'b="`c"',
        "b=`c`",
        "b=c/",
    ),
    *(
        'b="c"d',
        "b=\n'c'",
        "b\n=c",
        "b=\x0bc",
        '="c"',
        "\x0b",
        "\u2003onx=y",
        "#",
        ".",
        "-",
        "_",
        "5",
    ),
    *("href=javascript:x", 'href="javascript:x"', 'src="https://a/b?c=d"', "href=https://a"),
    *('src="https://javascript:x"', 'b="&{c};"', 'b="c&d"', 'b="<c>"', 'b=">"', "b=c/onx=y"),
    *(
        'content="0;vbscript:x"',
        'content="0;data:text/html,x"',
        "http-equiv=refresh",
        "charset=utf-7",
    ),
    *(
        "type=text/x-scriptlet",
        "type=scriptlet",
        "attributename=onload",
        'to="javascript:x"',
        "to=x",
    ),
    *(
        'style="a:b"',
        'style="color:red;width : 5%"',
        'style="behavior:url(x)"',
        "style=a",
        "style=a:b",
    ),
    *('style="a;b:c;-moz-binding:url(x)"', 'style="javascript:x"', 'style="a:expression(x)"'),
    *(
        'style="a:b;behaviour :x"',
        'style="mso-behavior:x"',
        'style="a:,behavior:x"',
        'style="behavior"',
    ),
)


def any_tag(chance: random.Random) -> str:
    """A start tag, more or less."""
    parts = ["<" + chance.choice(NAMES)]
    for _ in range(chance.randint(0, 4)):
        parts += (chance.choice(("", " ", " ", " ", "/", "\n")), chance.choice(ATTRIBUTES))
    return "".join([*parts, chance.choice((">", ">", ">", " >", "/>", ""))])


def test_what_defang_passes_over_is_nothing_to_the_filter() -> None:
    """It does not look at each plain tag by itself; what becomes of the document is the same."""
    chance = random.Random(1)
    altered = 0
    for _ in range(6_000):
        count = chance.randint(1, 8)
        text = "".join(
            any_tag(chance) if chance.random() < 0.5 else chance.choice(PIECES)
            for _ in range(count)
        )
        head = "Content-Type: text/html; charset=utf-8\n\n"
        message = mime.message_from_file(io.BytesIO((head + text).encode()))
        mime.defang(message)
        body = message.as_bytes().decode().partition("\n\n")[2]
        assert body in (text, filtered(text)), text
        altered += body != text
    assert 2_000 < altered < 5_000
