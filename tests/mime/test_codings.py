"""Transfer encodings that readers decode in several ways, and charsets that have other names."""

from __future__ import annotations

import base64
import binascii

import pytest
from support.mail import defanged, part, read, removed, zipped
from support.timing import cpu_time_below

import mime

SCRIPT = b"<script>x()</script>"
HTML = "Content-Type: text/html\nContent-Transfer-Encoding: "


def is_clean(raw: bytes) -> bool:
    """Whether no script is left in a message of HTML, and none was there in the first place."""
    result = defanged(raw)
    assert b"<script" not in result.get_payload_decoded()
    return not result.ismodified() and result.as_bytes() == raw


def base64_of(text: bytes) -> bytes:
    return base64.b64encode(text)


BASE64 = base64_of(b"<p>a</p>" + SCRIPT)


@pytest.mark.parametrize(
    "encoded",
    [
        BASE64[:1] + b"=" + BASE64[1:],  # passed over
        BASE64[:2] + b"==" + BASE64[2:],
        b"=" + BASE64,
        base64_of(b"<p>a") + b"=\n=" + base64_of(SCRIPT),  # padding, and a new group of four
        base64_of(b"<p>") + b"Q===" + base64_of(SCRIPT),
        b"Q==C" + base64_of(SCRIPT),  # in the place of a character
        b"QQ=C" + base64_of(SCRIPT),
        b"===C" + base64_of(SCRIPT),
        base64_of(b"<p>abc") + b"===" + b"C" + base64_of(SCRIPT),
        base64_of(b"<scr") + base64_of(b"ipt>x()</script>"),
    ],
)
def test_base64_with_an_equals_sign_inside(encoded):
    assert not is_clean(part(HTML + "base64", encoded + b"\n"))


def test_names_in_base64_that_is_read_in_two_ways():
    inner = part("X: y\nContent-Type: application/x; name=a.exe", b"MZ\n")
    encoded = base64_of(inner)
    for text in (encoded, encoded[:1] + b"=" + encoded[1:], b"Q==C" + base64_of(b" :\n" + inner)):
        raw = part("Content-Type: message/rfc822\nContent-Transfer-Encoding: base64", text + b"\n")
        assert removed(raw), text


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\n_______\nlist mailing list\nlist@example.com\n",
        base64_of(b"<p>another block of base64</p>") + b"\n",
        b"=\n==\n",
    ],
)
def test_base64_with_something_innocent_after_its_end(rest):
    assert is_clean(part(HTML + "base64", base64_of(b"<p>caf\xe9</p>") + b"\n" + rest))


def test_a_zip_in_several_blocks_of_base64_is_read():
    data = zipped(("a.txt", bytes(range(256))), compression=8)
    blocks = b"\n".join(base64_of(data[at : at + 100]) for at in range(0, len(data), 100))
    raw = part("Content-Type: application/zip\nContent-Transfer-Encoding: base64", blocks + b"\n")
    assert not removed(raw, scan_zip=True)


@pytest.mark.parametrize(
    "text",
    [
        b"a=\r" + SCRIPT,  # Python drops what follows up to the end of the line
        b"=\r" + SCRIPT + b"\nb",
        b"a= \r" + SCRIPT,
        b'a=\r<a href=3D"javascript:x()">b</a>',
        b"<scr=\ript>x()</script>",  # the end of a line
        b"<scr= \nipt>x()</script>",  # RFC 2045, 6.7, (3): blanks at its end do not count
        b"<scr=\t \r\nipt>x()</script>",
        b"<scr= \ript>x()</script>",
        b"a==3Cscript>x()</script>",  # Python takes two for one
        b"a=\r=3Cscript>x()</script>",
        b"a=\n=\r=3Cscript=3Ex()</script>",
        b"=3Cscr==\n=\ript>x()</script>" + SCRIPT,
    ],
)
def test_quoted_printable_that_is_read_in_two_ways(text):
    assert not is_clean(part(HTML + "quoted-printable", text + b"\n"))


@pytest.mark.parametrize(
    "text",
    [
        b"<a href=3D'http://a.example/?b=3Dc=\n=3Dd'>e</a>",
        b"<a href='http://a.example/?b==c= d=\te'>f</a>",
        b"a=\rb",
        b"a= \nb=",
        b"a==",
    ],
)
def test_innocent_quoted_printable_stays(text):
    assert is_clean(part(HTML + "quoted-printable", text + b"\n"))
    assert is_clean(part(HTML + "quoted-printable", text))


def test_a_name_in_quoted_printable_that_is_read_in_two_ways():
    uu = b"begin 644 a.exe\n" + binascii.b2a_uu(b"MZ")
    split = uu.replace(b"begin", b"be=\rgin")
    for text in (b"a=\r" + uu.replace(b"\n", b"=0A"), b"x= \n\n" + split):
        raw = part("Content-Type: text/plain\nContent-Transfer-Encoding: quoted-printable", text)
        assert removed(raw), text


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable"])
def test_readings_take_linear_time(encoding):
    for text in (b"=\r", b"= ", b"A=", b"==A"):
        msg = read(part(HTML + encoding, text * (500_000 // len(text))))
        with cpu_time_below(20, text):
            assert mime.defang(msg) == (encoding == "base64" or text != b"A=")


def test_base64_in_lines_of_their_own_is_read():
    line = base64_of(b"a line of text and a word\n") + b"\n"
    assert line.endswith(b"=\n")
    assert is_clean(part(HTML + "base64", line * 5_000))


UTF_7 = b"+ADw-script+AD4-x()+ADw-/script+AD4-\n"


@pytest.mark.parametrize(
    "charset",
    [
        *("utf-7", "UTF7", "u7", "x-utf-7", "csUTF7", "unicode-1-1-utf-7", "csUnicode11UTF7"),
        *("unicode-2-0-utf-7", "unicode20utf7", "cp65000", "Windows-65000", "x-unicode-2-0-utf-7"),
    ],
)
def test_names_of_utf_7(charset):
    raw = part(f"Content-Type: text/html; charset={charset}", UTF_7)
    result = defanged(raw)
    assert b"script" not in result.as_bytes().replace(b"embedded script removed", b"")


def word_of(charset: str, name: str) -> str:
    """An RFC 2047 word, of EBCDIC whatever it says."""
    return f"=?{charset}?B?{base64_of(name.encode('cp500')).decode()}?="


@pytest.mark.parametrize(
    "charset",
    [
        *("ibm037", "cp037", "ebcdic-cp-us", "ibm500", "cp1140", "IBM-273", "x-ebcdic-germany"),
        *("ibm1047", "cp1047", "IBM-1047", "x-IBM1047", "ccsid1047", "ibm277", "ibm-278", "cp280"),
        *(
            "IBM284",
            "ibm285",
            "ibm297",
            "ibm871",
            "EBCDIC-FR",
            "ebcdic-uk",
            "CCSID01141",
            "ibm1149",
        ),
        *("csIBM871", "x-EBCDIC-Italy", "ebcdic-int", "ibm-924", "ibm1149"),
    ],
)
def test_names_of_ebcdic(charset):
    word = word_of(charset, "setup.exe")
    assert removed(part(f'Content-Type: application/octet-stream; name="{word}"', b"MZ\n"))
    extended = "".join(f"%{byte:02X}" for byte in "setup.exe".encode("cp500"))
    assert removed(part(f"Content-Type: x/y; name*={charset}''{extended}", b"MZ\n"))
    harmless = word_of(charset, "setup.pdf")
    assert not removed(part(f'Content-Type: application/octet-stream; name="{harmless}"', b"MZ\n"))


@pytest.mark.parametrize(
    "charset", ["ibm1047x", "ebcdi", "ibm850", "cp1252", "ibm99999999", "e" * 500]
)
def test_no_names_of_ebcdic(charset):
    word = word_of(charset, "setup.exe")
    assert not removed(part(f'Content-Type: application/octet-stream; name="{word}"', b"MZ\n"))


def test_text_is_not_written_in_a_charset_that_is_only_like_the_declared_one():
    msg = read(part("Content-Type: text/plain; charset=ibm1047", b"x"))
    msg.set_payload("gr\xfcn")
    assert msg.get_content_charset() == "utf-8"
    assert msg.get_payload_decoded() == "gr\xfcn".encode()


@pytest.mark.parametrize(
    "encoding",
    ["base64", "quoted-printable", "x-uuencode", "uuencode", "x-uue", "UUE", "8bit", "x-own"],
)
def test_what_is_left_of_html_is_in_the_encoding_that_it_names(encoding):
    html = b"<p>one = 1</p><script>alert(1)</script>" + b"<p>two</p>\n" * 9
    encoded = {
        "base64": base64.encodebytes,
        "quoted-printable": binascii.b2a_qp,
        "8bit": bytes,
        "x-own": bytes,
    }.get(encoding, uuencoded)
    once = defanged(part(HTML + encoding, encoded(html)))
    assert once["Content-Transfer-Encoding"] == encoding
    raw = once.as_bytes()
    left = read(raw).get_payload(decode=True)
    assert b"script>" not in left
    assert left.endswith(b"<p>two</p>\n" * 9) and left.startswith(b"<p>one = 1</p>")
    again = read(raw)
    assert not mime.defang(again)
    assert again.as_bytes() == raw


def uuencoded(data):
    lines = [binascii.b2a_uu(data[i : i + 45]) for i in range(0, len(data), 45)]
    return b"begin 644 a.html\n" + b"".join(lines) + b"`\nend\n"
