"""Innocent HTML as newsletters, Outlook and people with typos write it: no byte of it changes.

Beside each kind of it stand the disguises that resemble it, and that do not pass.
"""

from __future__ import annotations

import io
import time

import pytest

import mime
from Milter._mime.css import bad_css
from Milter._mime.html import HTMLScriptFilter
from Milter._mime.markup import harmful, runs


def defanged(html, headers="Content-Type: text/html"):
    """What becomes of HTML, None where the message stays byte for byte."""
    raw = b"MIME-Version: 1.0\n" + headers.encode() + b"\n\n" + html.encode("utf-8")
    msg = mime.message_from_file(io.BytesIO(raw))
    changed = mime.defang(msg)
    assert changed == (msg.as_bytes() != raw)
    return msg.as_bytes().partition(b"\n\n")[2].decode() if changed else None


MSO_SETTINGS = (
    "<noscript><xml><o:OfficeDocumentSettings><o:AllowPNG/><o:PixelsPerInch>96"
    "</o:PixelsPerInch></o:OfficeDocumentSettings></xml></noscript>"
)
COMMENTS = [
    "<!-->",
    "<!--->",
    "<!-- --!>",
    "<!-- a -- > b -->",
    "<!-- <title>old</title> <style>p { color: red }</style> -->",
    "<!-- what the <title> says, and <style>, <textarea> and <a href= -->",
    '<!-- <td align="center" "> <p title="it\'s> -->',
    "<!-- onclick= is how, javascript: too; my transcript, ontology=x -->",
    "<!-- <p>onclick=x</p> -->",
    "<!--[if mso]><style>.a{font-family:Arial}</style><![endif]-->",
    "<!--[if (gte mso 9)|(IE)]><table width='600'><tr><td><![endif]-->",
    "<!--[if (gte mso 9)|(IE)]></td></tr></table><![endif]-->",
    f"<!--[if gte mso 9]>{MSO_SETTINGS}<![endif]-->",
    '<!--[if mso]><td align="center" "><![endif]-->',
    (
        '<!--[if mso]><v:rect xmlns:v="urn:schemas-microsoft-com:vml" fill="t" style="width:600px">'
        '<v:fill type="tile" src="https://x.example/a.png" /><v:textbox inset="0,0"><![endif]-->'
    ),
    "<!--[if !mso]><!--> <p>x</p> <!--<![endif]-->",
    "<!--[if !mso]><!-- --> <p>x</p> <!-- <![endif]-->",
    "<!--[if !mso]><!----> <p>x</p> <!----<![endif]-->",
    "<![if !mso]><p>x</p><![endif]>",
    '<?\n\nif (!$build) { echo "<p>Build"; } ?>',
    "<!--[if IE]><![if gte IE 7]>a<![endif]><![endif]-->",
    (
        "<!--[if mso]><style>v\\:* {behavior:url(#default#VML);} o\\:*{behavior:url(#default#x)}"
        "</style><![endif]-->"
    ),
]
STYLES = [
    "html{scroll-behavior:smooth}.l{overscroll-behavior:contain}",
    ".d{transition-behavior:allow-discrete} a{-x-behavior:url(x)}",
    ".behavior:hover{background:url(x.png)} #behavior:first-child > a{color:red}",
    ".behavior:not(a[href='x']){color:red}",
    "/* default behavior: url(x) is expression(1) and javascript: */ p{color:blue}",
    "/* it's \"quoted */ p{content:'behavior:url(x)'} q{content:\"expression(1)\"}",
    "p{behavior:none} q{behavior:inherit} r{behavior:smooth}",
    "/*<![CDATA[*/ p{color:red} /*]]>*/",
    "<!-- p > a {color:red} -->",
    'p{width:400px;voice-family:"\\"}\\"";voice-family:inherit;width:300px}',
    "@import url(https://x.example/a.css); @media only screen{a[x='y']{color:red}}",
    "p{background:url(data:image/png;base64,AA==)}",
    "@font-face{font-family:X;src:url('https://x.example/it''s.woff')}",
    ".expression{color:red} .my-expression (x) {color:red}",
]
MARKUP = [
    '<?xml:namespace prefix = o ns = "urn:schemas-microsoft-com:office:office" />',
    '<?xml:namespace prefix = geo ns = "urn:x-example" /><p>a',
    '<?xml version="1.0" encoding="UTF-8" standalone="no"?>',
    '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "http://www.w3.org/TR/x.dtd">',
    "<!DOCTYPE html SYSTEM 'about:legacy-compat'>",
    "<! once upon a time, on=ontology >",
    '<meta name="description" content="Data: see the XML page, and more">',
    '<meta property="og:title" content="javascript: is fun">',
    '<meta http-equiv="refresh" content="5; url=https://x.example/?data:text/html,x">',
    '<meta http-equiv="X-UA-Compatible" content="IE=edge">',
    '<p ontology="x" once=1 only online>',
    '<a href="https://x.example/?a=1&{{token}}&{$b}">x</a>',
    '<td align="center" ">',
    '<td width"50%"><hr size=1 width="80% noshade align="left">',
    '<img src="https://x.example/a.gif""><img src=b.gif width=1</td>',
    "<td<tr><b</b><p title='a -->'>",
    '</td width="5"></font color=red></script>',
    '<a title="<b>" href="<%= url %>">x</a>',
    "<title>1 < 2, <b>and</b> <a <c</title>",
    "<noscript><style>p{color:red}</style><img src=x></noscript>",
    "<noframes><body onward=x><p>x</noframes>",
    '<st1:title w:st="on">Mr</st1:title>',
    '<a href="unfinished subscription=1',
    '<animate attributeName="opacity" values="0;1">',
    '<svg><title>a</title><style>p{fill:red}</style><path d="M0 0"/></svg>',
]


@pytest.mark.parametrize("text", [*COMMENTS, *MARKUP, *(f"<style>{s}</style>" for s in STYLES)])
def test_innocent_html_stays_byte_for_byte(text):
    assert defanged(text + "<p>a\n") is None
    assert defanged(f"<html><body><p>before</p>\n{text}\n<p>after</p></body></html>") is None


@pytest.mark.parametrize("style", STYLES)
def test_innocent_styles_stay_in_attributes_and_comments(style):
    quoted = style.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    assert defanged(f'<p style="{quoted}">a</p>') is None
    assert "-->" in style or defanged(f"<!--[if mso]><style>{style}</style><![endif]-->a") is None


HARMFUL_STYLES = [
    "p{behavior:url(x.htc)}",
    "p{ behaviour : url(x.htc)}",
    "p{beh/**/avior:url(x.htc)}",
    "p{beh\\61vior:url(x.htc)}",
    "p{b\\65havior:u\\72l(x.htc)}",
    "p{behavior:url(#default#VML) url(x.htc)}",
    "p{behavior:url(#default#time2)}",
    "p{-behavior:url(x.htc)} ",
    "p{*behavior:url(x.htc)}",
    "p{.behavior:url(x.htc)}",
    "p{BEHAVIOR:\nURL(x.htc)}",
    "p{color:red;;behavior:'x.htc'}",
    ".behavior:hover{behavior:url(x.htc)}",
    "p{scroll-behavior:smooth;behavior:url(x.htc)}",
    "p{-moz-binding:url(x.xml#y)}",
    "p{width:expression(x())}",
    "p{width:exp/* */ression (x())}",
    "p{width:\uff45xpression(x())}",
    "p{content:'/*';width:expression(x());content:'*/'}",
    "p{content:'\n';width:expression(x());content:'\n'}",
    "p{a:url(x'y);width:expression(x());b:url(x'y)}",
    "p{content:\\';width:expression(x());content:\\'}",
    "p{background:url( 'javascript:x()')}",
    "@import'javascript:x()';",
    "@import url(data:text/css,p{behavior:url(x)});",
    "p{-o-link:'javascript:x()'}",
    "/* never closed */ /* p{width:expression(x())}",
]


@pytest.mark.parametrize("style", HARMFUL_STYLES)
def test_styles_that_run_scripts_do_not_pass(style):
    quoted = style.replace("&", "&amp;").replace('"', "&quot;")
    for html in (
        f"<style>{style}</style>a",
        f'<p style="{quoted}">a',
        f"<!--[if mso]><style>{style}</style><![endif]-->a",
        f"<!-- <style>{style}</style> -->a",
        f"<noscript><style>{style}</style></noscript>a",
        f"<svg><style><x>{style}</x></style></svg>a",
    ):
        result = defanged(html)
        assert result is not None, html
        assert "xpression" not in result, html


def test_markup_in_a_style_sheet_joins_nothing():
    """Within <svg> the tags are tags, and what is left is one word."""
    for text in ("ex</b>pression(x())", "java<![CDATA[script:x()", "ex<!-- a -->pression(x())"):
        assert defanged(f"<style>p{{a:url({text})}} q{{b:{text}}}</style>a") is not None


DISGUISES = [
    "<!--[if mso]><a onclick=x()><![endif]-->",
    "<!--[if mso]><a href='javascript:x()'>b</a><![endif]-->",
    "<!--[if !mso]><!--><script>x()</script><!--<![endif]-->",
    "<!--[if mso]><td align='center' '><script>x()</script><![endif]-->",
    "<!--[if mso]><noscript><a title='</noscript><img src=x onerror=x()>'></noscript><![endif]-->",
    '<!-- <a title="<img src=x onerror=x()>"> -->',
    "<!-- <a b=`<img src=x onerror=x()>`> -->",
    "<!-- <svg/onload=x()> -->",
    "<!-- <iframe srcdoc='x'> -->",
    "<!-- <?import namespace=t implementation=x> -->",
    "<!--><script>x()</script>-->",
    "<!-- --!><img src=x onerror=x()>-->",
    # a reader that enters here leaves within quotes, and finds the handler outside of ours
    '<!--[if IE]><a title="<![endif]--> <i alt=" onmouseover=x() y=">b</i>',
    '<!-- -- ><a title="--> <i alt=" onmouseover=x() y=">b</i>',
    # whose condition holds what would begin a comment, or a tag
    '<!--[if a<!--[if IE]><a title="b--> <i alt=" onmouseover=x() y=">b</i>',
    '<!--[if a<!--[if IE]><a title="<![endif]--> <i alt=" onmouseover=x() y=">b</i>',
    '<!--[if a<b title="]><a title="b--> <i alt=" onmouseover=x() y=">b</i>',
    "<!--[if a<!-- ]><img src=x onerror=x()><![endif]-->",
    "<!--[if IE]><style><![endif]--> p{width:expression(x())} <!--[if IE]></style><![endif]-->",
    '<svg><title><a b="</title></svg> <i alt=" onmouseover=x() y=">b</i>',
    '<svg><style><![CDATA[</style><a b="]]>" c="<i onload=x() d="">',
    '<td align="center" "> <i alt=" onmouseover=x() y=">b</i>',
    "<td align='center' '> <i alt=' onmouseover=x() y='>b</i>",
    '<a "> <i alt=" href=javascript:x() y=">b</i>',
    '<b<i title=" onclick=x() ">',
    '</td "> <i alt=" onmouseover=x() y=">b</i>',
    '<p title="a -->" alt=" onmouseover=x() y=">',
    '<p unknown-event=1 onwhatever="x()">',
    "<p onceover=x()>",
    '<?xml:namespace prefix = o onload = "x()" />',
    '<?xml-stylesheet href="javascript:x()"?>',
    '<?xml version="1.0" encoding="utf-7"?>',
    '<!DOCTYPE x [<!ENTITY a "&#60;script>x()&#60;/script>">]>',
    '<!DOCTYPE x [<!ENTITY a "java">]>',
    '<!ATTLIST svg onload CDATA "x()">',
    '<meta http-equiv=refresh content="0;url=data:text/html,x">',
    '<meta http-equiv=refresh content="0, javascript:x()">',
    '<meta content="text/html; charset=unicode-1-1-utf-7">',
    '<a href="x&{alert(1)};">',
    '<set attributeName="onmouseover" to="x()"/>',
    '<t:set attributeName="innerHTML" to="<img src=x onerror=x()>">',
    '<animate attributeName=href values="a;javascript:x()">',
    '<a href="x onclick=x()',
    # what is left and right of an attribute that goes must not become one
    '<i alt=\x0b onclick=x() y=" onmouseover=x() ">b</i>',
    '<i alt=\x0b <c y=" onmouseover=x() ">b</i>',
    '<i b=\xa0 alt=\x0b onclick=x() y=" onmouseover=x() ">b</i>',
    '<i a=1 onclick="x()"\x0by=" onmouseover=x() ">b</i>',
    "<a href onclick=x() =javascript:x()>b</a>",
    '<a href onclick="x()"=javascript:x()>b</a>',
    "<a href onclick=x()/ /=javascript:x()>b</a>",
    "<a href <b=1 =javascript:x()>b</a>",
]


@pytest.mark.parametrize("html", DISGUISES)
def test_what_resembles_it_does_not_pass(html):
    result = defanged(html + "a\n")
    assert result is not None
    gone = result.replace(mime.HTMLScriptFilter.msg, "")
    assert not runs(gone)
    assert defanged(gone) is None  # and nothing is in doubt any more


def test_drawing_programs_name_namespaces():
    svg = (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/x.dtd" [\n'
        '\t<!ENTITY ns_svg "http://www.w3.org/2000/svg">\n'
        '\t<!ENTITY nbsp "&#160;">\n]>\n'
        '<svg xmlns="&ns_svg;"><path d="M0,0"/></svg>\n'
    )
    for headers in ("Content-Type: image/svg+xml", "Content-Type: x/y; name=a.svg"):
        assert defanged(svg, headers) is None
        assert defanged(svg.replace("<path", "<path onclick='x()'"), headers) is not None
        assert defanged(svg.replace("http://www", "java"), headers) is not None


def test_modified():
    """As in pymilter: whether anything was removed so far."""
    for text, expected in (
        ("<p>x<!-- y --> <a href=z>", False),
        ("<p>x<script>y</script>", True),
        ("<p onclick=x>", True),
        ("<!-- <script> -->", True),
        ("<p>x\0", True),
        ("<a href='x", False),
        ("<a onclick='x", True),
        ("<style>p{width:expression(x())}</style>", True),
        ("<noscript><p onclick=x></noscript>", True),
        ("<noscript><p></noscript>", False),
        ("</p x=y>", True),
        ("</script>", True),
        ("<?import x>", True),
        ("<![CDATA[<b>]]>", True),
    ):
        parser = HTMLScriptFilter(io.StringIO())
        assert parser.modified is False
        parser.feed(text)
        parser.close()
        assert parser.modified is expected, text


def test_attributes_that_are_no_urls():
    assert not harmful("meta", "content", "data:text/html,x", refreshes=False)
    assert harmful("meta", "content", "0;data:text/html,x")
    assert not harmful("a", "href", "data: html without a comma")
    assert harmful("a", "href", "data:text/html;x=y,<b>")
    assert not bad_css("") and not runs("")


@pytest.mark.parametrize(
    "unit",
    [
        "<a b=\"<c d='",
        "<a/x=",
        "<a<",
        '<a b="',
        "<a x ",
        "<style>",
        "<style>/*",
        "<?x ",
        "<!x ",
        "<!x [",
        "<!--[if mso]>",
        '<td ">',
        "<td<",
        "<noscript>",
        "</p x>",
        "behavior:",
        "behavior:url(",
        "url( ",
        "\\",
        '"/*',
        "'\n",
        "data:",
        "&{",
        "javascript",
        "--------",
        "<!entity a ",
    ],
)
@pytest.mark.parametrize("frame", ["%s", "<!--[if x]>%s-->", "<style>%s</style>"])
def test_time_is_linear(unit, frame):
    def seconds(length):
        text = (frame % (unit * (length // len(unit)))).encode()
        msg = mime.message_from_file(io.BytesIO(b"Content-Type: text/html\n\n" + text))
        began = time.process_time()
        mime.check_html(msg)
        return time.process_time() - began

    # 10 times the input; a quadratic filter would take 100 times as long
    assert any(seconds(60_000) <= 25 * seconds(6_000) + 0.05 for _ in range(4))
