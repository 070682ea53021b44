"""XML and drawings: what a browser would run of them goes, and data stays byte for byte."""

from __future__ import annotations

import base64
import gzip
import io
import time
import zlib

import pytest
from support.timing import cpu_time_below

import mime
from Milter._mime.limits import Budget
from Milter._mime.xml import inflate, xml_runs

XHTML = "http://www.w3.org/1999/xhtml"
SVG = "http://www.w3.org/2000/svg"
XSL = "http://www.w3.org/1999/XSL/Transform"
KINDS = [
    "Content-Type: text/xml",
    "Content-Type: application/xml; charset=utf-8",
    "Content-Type: application/rss+xml",
    "Content-Type: model/x3d+xml",
    "Content-Type: application/octet-stream; name=a.xml",
    "Content-Type: text/plain\nContent-Disposition: attachment; filename=a.XSL",
]


def result(data, headers):
    """What check_html and defang leave of a part; None where that is every byte of it."""
    data = data.encode() if isinstance(data, str) else data
    head = f"MIME-Version: 1.0\n{headers}\nContent-Transfer-Encoding: base64\n\n".encode()
    raw = head + base64.encodebytes(data)
    msg = mime.message_from_file(io.BytesIO(raw))
    changed = mime.defang(msg)
    assert changed == (msg.as_bytes() != raw)
    return msg.get_payload_decoded() if changed else None


SCRIPTS = [
    f'<html xmlns="{XHTML}"><script>x()</script></html>',
    f'<h:html xmlns:h="{XHTML}"><h:SCRIPT src="a"/></h:html>',
    f'<a><b c="d"><z:script xmlns:z="{XHTML}">x()</z:script></b></a>',
    f'<a xmlns:s="{SVG}"><s:g onload="x()"/></a>',
    f'<svg xmlns="{SVG}" onload="x()"/>',
    f'<svg xmlns="{SVG}"><handler type="application/ecmascript">x()</handler></svg>',
    f'<svg xmlns="{SVG}"><style>p{{width:expression(x())}}</style></svg>',
    f'<svg xmlns="{SVG}"><set attributeName="onmouseover" to="x()"/></svg>',
    f'<html xmlns="{XHTML}"><a href="java&#115;cript:x()">b</a></html>',
    f'<html xmlns="{XHTML.replace("h", "&#104;")}"><script>x()</script></html>',
    f'<!DOCTYPE a [<!ENTITY n "{XHTML}">]><html xmlns="&n;"><script>x()</script></html>',
    (
        f'<!DOCTYPE a [<!ENTITY j "java"> <!ENTITY s "script:x()">]>'
        f'<html xmlns="{XHTML}"><a href="&j;&s;">b</a></html>'
    ),
    f'<!DOCTYPE a [<!ATTLIST svg onload CDATA "x()">]><svg xmlns="{SVG}"/>',
    f'<!DOCTYPE a [<!ATTLIST svg xmlns CDATA "{SVG}">]><svg><script>x()</script></svg>',
    f"<!DOCTYPE a [<!ENTITY e \"&#60;script xmlns='{XHTML}'>x()&#60;/script>\">]><a>&e;</a>",
    f"<?xml-stylesheet type='text/xsl' href='#s'?><a><x:stylesheet xmlns:x='{XSL}'/></a>",
    '<?xml-stylesheet type="text/xsl" href="data:text/xml,x"?><a/>',
    '<?xml-stylesheet href="java&#115;cript:x()"?><a/>',
    (
        f'<x:stylesheet xmlns:x="{XSL}" xmlns:m="urn:schemas-microsoft-com:xslt"><m:script>x()'
        "</m:script></x:stylesheet>"
    ),
    '<a xmlns:x="http://www.w3.org/1999/xlink" x:type="simple" x:href="javascript:x()">b</a>',
    f'\n \ufeff<?xml version="1.1"?><svg xmlns="{SVG}"><script/></svg>',
    f'<svg xmlns="{SVG}"><script>x()</script><never closed',
    f'<!DOCTYPE html PUBLIC "a" "b"><html xmlns="{XHTML}">&nbsp;<script>x()</script></html>',
]
DATA = [
    "<a/>",
    "<script>x()</script>",
    "no XML at all, <script>",
    '<rss><item onload="x()"><description>&lt;script></description></item></rss>',
    (
        f'<feed><content type="xhtml"><div xmlns="{XHTML}"><p class="a">a</p></div></content>'
        '<x onclick="y"/></feed>'
    ),
    (
        f'<?xml version="1.0"?>\n<svg xmlns="{SVG}" xmlns:x="http://www.w3.org/1999/xlink"><title>a'
        '</title><a x:href="https://x.example/"><g/></a><style>p>q{fill:red}</style></svg>'
    ),
    f'<svg xmlns="{SVG}"><text>&lt;script> onload= javascript:</text><!-- <script> --></svg>',
    f'<svg xmlns="{SVG}"><text><![CDATA[<script>x()</script>]]></text></svg>',
    (
        f'<office:a xmlns:office="urn:o" xmlns:h="{XHTML}"><office:script office:onload="x()"/>'
        "</office:a>"
    ),
    f'<!DOCTYPE svg [<!ENTITY ns "{SVG}"><!ENTITY nbsp "&#160;">]><svg xmlns="&ns;"><g/></svg>',
    '<?xml version="1.0"?><?xml-stylesheet type="text/xsl" href="CDA.xsl"?><ClinicalDocument/>',
    f'<x:stylesheet xmlns:x="{XSL}"><x:template><script>y</script></x:template></x:stylesheet>',
    (
        '<?xml version="1.0"?><?mso-application progid="Excel.Sheet"?><Workbook xmlns:html='
        '"http://www.w3.org/TR/REC-html40"><Data><html:B>x</html:B></Data></Workbook>'
    ),
    f'<a xmlns:x="{XHTML}">' + "<!-- y -->" * 3 + "<never closed",
]


@pytest.mark.parametrize("headers", KINDS)
@pytest.mark.parametrize("text", SCRIPTS)
def test_xml_that_runs(text, headers):
    after = result(text, headers)
    assert after is not None
    shown = after.decode("utf-8", "replace")
    assert not xml_runs(shown, Budget()) or "has been removed" in shown


@pytest.mark.parametrize("headers", KINDS)
@pytest.mark.parametrize("text", DATA)
def test_xml_that_is_data(text, headers):
    assert result(text, headers) is None


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "cp037", "utf-7", "utf-32"])
def test_xml_in_charsets_unlike_ascii(codec):
    declared = f'<?xml version="1.0" encoding="{codec}"?>'
    for text, goes in ((SCRIPTS[0], True), (DATA[5].partition("\n")[2], False)):
        data = (declared + text).encode(codec)
        assert (result(data, "Content-Type: text/xml; charset=" + codec) is not None) is goes
        if codec not in ("utf-7", "utf-32"):  # it declares itself only to who can read it
            assert (result(data, "Content-Type: x/y; name=a.xml") is not None) is goes
    # whoever saves it knows no charset but that of its bytes
    assert result(SCRIPTS[0], "Content-Type: text/xml; charset=" + codec) is not None


def packed(text, **options):
    return gzip.compress(text.encode() if isinstance(text, str) else text, **options)


DRAWING_KINDS = [
    "Content-Type: image/svg+xml; name=a.svgz",
    "Content-Type: image/svg+xml",
    "Content-Type: application/octet-stream; name=a.svgz",
    "Content-Type: application/octet-stream; name=a.SVG",
]


@pytest.mark.parametrize("headers", DRAWING_KINDS)
def test_compressed_drawings(headers):
    good, bad = DATA[5], f'<svg xmlns="{SVG}"><script>x()</script></svg>'
    for data in (
        packed(good),
        packed(good) + b"<script>",
        packed(good)[:-12],
        packed(good)[:12] + b"<script>x()</script>",
        b"\x1f\x8b",
        b"\x1f\x8b<script>x()</script>",
        packed(b"<script>" * 1000),
    ):
        assert result(data, headers) is None
    named = b"\x1f\x8b\x08\x1e" + b"\0" * 6 + b"\2\0xya\0b\0cc" + packed(bad)[10:]
    for data in (
        packed(bad),
        packed(bad)[:-8],
        packed(bad)[:-4] + b"\0\0\0\0",
        packed(bad)[:-8] + b"\0" * 8 + packed(" "),
        packed(bad[:60]) + packed(bad[60:]),
        named,
    ):
        assert b"compressed drawing with a script" in (result(data, headers) or b"")


def test_a_page_is_a_page_whatever_its_first_bytes_are():
    for headers in (
        "Content-Type: text/html",
        "Content-Type: x/y; name=a.html",
        "Content-Type: text/html; name=a.svgz",
    ):
        assert result(b"\x1f\x8b<script>x()</script>", headers) is not None


def test_unpacking_is_bounded(monkeypatch):
    monkeypatch.setattr(mime, "MAX_UNPACKED", 1_000_000)
    bomb = packed(b" " * 20_000_000)
    with cpu_time_below(5):
        assert b"unpacks to more than" in (result(bomb, DRAWING_KINDS[0]) or b"")


def test_what_is_unpacked_before_a_fault():
    data = b"".join(b"%d " % (i * 7919 % 104729) for i in range(20_000))
    whole = packed(data)
    for cut in (15, 1000, len(whole) - 9, len(whole) - 1):
        plain = inflate(whole[:cut] + b"\xff" * 300, Budget())
        certain = zlib.decompressobj(-15).decompress(whole[10 : cut - 1])
        assert plain.startswith(certain[:-300]), cut
    assert inflate(whole, Budget()) == data


@pytest.mark.parametrize(
    "text",
    [
        f'<!DOCTYPE a [<!ENTITY a "{"x" * 1000}">]><a xmlns="{SVG}">' + "&a;" * 100_000 + "</a>",
        "<!DOCTYPE a ["
        '<!ENTITY a0 "x">'
        + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
        + f']><a xmlns="{SVG}">&a11;</a>',
        "<!DOCTYPE a [" + "".join(f'<!ENTITY a{i} "x">' for i in range(9999)) + "]><a/>",
    ],
    ids=["long", "deep", "many"],
)
def test_entities_that_grow_are_refused(text):
    with cpu_time_below(5):
        assert result(text, "Content-Type: text/xml") is not None


@pytest.mark.parametrize("unit", ["<a>", "<a b='c'/>", "&#65;", "<!-- ", "<?x ", "<a b='", "]]>"])
def test_xml_takes_linear_time(unit):
    def seconds(count):
        data = f'<svg xmlns="{SVG}">'.encode() + unit.encode() * count
        began = time.process_time()
        result(data, "Content-Type: text/xml")
        return time.process_time() - began

    assert any(seconds(80_000) <= 8 * seconds(20_000) + 0.1 for _ in range(3))


def test_the_time_for_xml_is_bounded(monkeypatch):
    data = f'<svg xmlns="{SVG}">'.encode() + b"<a/>" * 100_000 + b"</svg>"
    looks = iter(range(30))
    monkeypatch.setattr(time, "monotonic", lambda: 1e12 if next(looks, None) is None else 0.0)
    monkeypatch.setattr(mime, "MAX_SECONDS", 1.0)
    assert b"takes more than 1.0 s to check" in (result(data, "Content-Type: text/xml") or b"")
