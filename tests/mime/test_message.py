"""MimeMessage: reads like the standard library, writes back byte for byte."""

from __future__ import annotations

import ast
import copy
import email
import email.message
import email.policy
import encodings
import inspect
import io
import pathlib
import re
import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.process import WAIT, python_command
from support.timing import cpu_time_below

import mime
from Milter._charsets import codec_for
from Milter.utils import parse_header

DATA = pathlib.Path(__file__).parent / "data"
SAMPLES = sorted(path.read_bytes() for path in DATA.glob("*.eml"))
SAMPLES += [sample.replace(b"\n", b"\r\n") for sample in SAMPLES]
FORWARDED = (DATA / "forwarded.eml").read_bytes()


def read(raw):
    return mime.message_from_file(io.BytesIO(raw))


PATCHES = """
import email, importlib, pkgutil, sys

def plain(value):
    return value.copy() if isinstance(value, (dict, list, set)) else value

def snapshot():
    owners = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "email"}
    for name, module in list(owners.items()):
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__.split(".")[0] == "email":
                owners[f"{name}.{key}"] = value
    return {
        f"{owner}.{key}": (value, plain(value))
        for owner, found in owners.items()
        for key, value in vars(found).items()
        if key not in ("_abc_impl", "__builtins__")
    }

for module in pkgutil.walk_packages(email.__path__, "email."):
    importlib.import_module(module.name)
before = snapshot()
assert len(before) > 500
{between}
import mime
after = snapshot()
print(sorted(
    name for name in before.keys() | after.keys()
    if name not in before or name not in after
    or before[name][0] is not after[name][0] or before[name][1] != after[name][1]
))
"""


@pytest.mark.parametrize(
    ("between", "changed"),
    [
        ("", []),
        # What the comparison sees.
        ("email.message.Message.walk = None", True),
        ("email.header.decode_header = None", True),
        ("email.charset.ALIASES['x'] = 'y'", True),
    ],
)
def test_importing_it_leaves_the_package_email_alone(between, changed):
    done = subprocess.run(
        [*python_command(), "-c", PATCHES.replace("{between}", between)],
        capture_output=True, text=True, check=True, timeout=WAIT,
    )  # fmt: skip
    found = ast.literal_eval(done.stdout)
    assert bool(found) == bool(changed), found


def only(msg, content_type):
    (part,) = (p for p in msg.walk() if p.get_content_type() == content_type)
    return part


TOKENS = st.sampled_from(
    [
        b"\n",
        b"\r\n",
        b"\r",
        b"--b",
        b"--b--",
        b"--c",
        b"\n--b\n",
        b"\n--c\n",
        b"\n--b--\n",
        b"Content-Type: multipart/mixed; boundary=b\n",
        b"Content-Type: multipart/mixed\n",
        b'Content-Type: multipart/digest; boundary="c"\r\n',
        b"Content-Type: message/rfc822\n",
        b"Content-Type: message/delivery-status\n",
        b"Content-Type: text/html; name=a.exe\n",
        b"Content-Transfer-Encoding: base64\n",
        b"Subject: x\n",
        b" folded\n",
        b"From x\n",
        b":bad\n",
        b"\xff\xfe",
        b"\x00",
        b"text ",
    ]
)
RAW = st.lists(TOKENS | TOKENS | st.binary(max_size=5), max_size=30).map(b"".join)


def shape(msg):
    payload = msg.get_payload() if msg.is_multipart() else msg._payload
    inside = [shape(part) for part in payload] if msg.is_multipart() else payload
    return (
        list(msg.raw_items()),
        inside,
        msg.preamble,
        msg.epilogue,
        msg.get_unixfrom(),
        msg.get_content_type(),
        [type(d) for d in msg.defects],
    )


@given(st.binary() | RAW)
def test_any_bytes_are_written_back(raw):
    msg = read(raw)
    assert msg.as_bytes() == bytes(msg) == raw
    assert not msg.ismodified()


@given(st.binary() | RAW)
def test_any_bytes_are_read_as_the_standard_library_reads_them(raw):
    assert shape(read(raw)) == shape(email.message_from_bytes(raw))


def header_ends_for_all(part):
    """Whether an empty line ends the header, also where a lone CR ends no line."""
    head, *rest = re.split(rb"\n\r?\n", part.as_bytes(), maxsplit=1)
    lines = head.replace(b"\r\n", b"\n").split(b"\n")
    fields = all(re.match(rb"[!-9;-~]*:|[ \t]", line) and b"\r" not in line for line in lines)
    return not part.keys() or bool(rest and fields)


@given(RAW, st.integers(0, 20))
@example(b'Content-Type: multipart/digest; boundary="c"\r\n--c\n\n\n', 1)
@example(b"Content-Type: message/delivery-status\n\xff\xfe\n\n--b", 2)
@example(b"Content-Type: message/delivery-status\n\ra: b\n\nc: d", 1)
def test_what_surrounds_a_modified_part_stays_as_it_is(raw, number):
    msg = read(raw)
    parts = list(msg.walk())
    part = parts[number % len(parts)]
    before = part.as_bytes()
    # else the header of what holds the part is given its empty line
    head_stays = all(map(header_ends_for_all, parts))
    part["X-New"] = "1"
    assert msg.ismodified() and part.modified
    head, _, tail = raw.partition(before or raw or b" ")
    written = msg.as_bytes()
    assert b"X-New: 1" in written
    if before and raw.find(before) == raw.rfind(before):  # count() passes over what overlaps
        assert written.endswith(tail)
        assert not head_stays or written.startswith(head)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("end", [b"\r", b"\r\r", b"\r\n\r", b"\r\r\n", b"\n\r", b"\n", b"\r\n"])
def test_where_the_header_of_a_modified_part_ends_nobody_doubts(newline, end):
    """Lone CRs, or a first line that is no header, end it as it was read."""
    raw = b"Content-Type: text/html" + end + b"<p>x" + newline * 2 + b"<script>y</script>" + newline
    msg = read(raw)
    msg.set_payload(msg.get_payload().replace("x", "z"))
    head, _, body = re.split(rb"(\n\r?\n)", msg.as_bytes(), maxsplit=1)
    assert head.rstrip(b"\r\n") == b"Content-Type: text/html"
    assert body.lstrip(b"\r\n").startswith(b"<p>z")
    again = read(msg.as_bytes())
    assert again.items() == [("Content-Type", "text/html")]


@pytest.mark.parametrize("raw", SAMPLES)
def test_samples(raw):
    msg = read(raw)
    assert msg.as_bytes() == raw
    out = io.BytesIO()
    msg.dump(out)
    mime.MimeGenerator(out).flatten(msg)
    assert out.getvalue() == raw + raw
    assert copy.deepcopy(msg).as_bytes() == raw


@pytest.mark.parametrize("raw", SAMPLES)
def test_a_new_header_is_the_only_change(raw):
    newline = b"\r\n" if b"\r\n" in raw else b"\n"
    msg = read(raw)
    msg["X-Checked"] = "yes"
    end = raw.index(newline * 2) + len(newline)
    assert msg.as_bytes() == raw[:end] + b"X-Checked: yes" + newline + raw[end:]


@pytest.mark.parametrize("raw", SAMPLES[:2])
def test_every_part_can_be_modified_alone(raw):
    for number, _ in enumerate(read(raw).walk()):
        for newline in (b"\n", b"\r\n"):
            source = raw.replace(b"\n", newline)
            msg = read(source)
            part = list(msg.walk())[number]
            before = part.as_bytes()
            assert source.count(before) == 1
            part["X-New"] = "1"
            changed = part.as_bytes() if part is msg else None
            written = msg.as_bytes()
            end = before.find(newline * 2) + len(newline)
            if before.find(newline * 2) < 0:  # a block of delivery-status
                end = len(before)
            after = before[:end] + b"X-New: 1" + newline + before[end:]
            assert written == source.replace(before, after)
            assert changed in (None, written)


def test_a_deleted_header_leaves_the_others_as_they_were():
    msg = read(FORWARDED)
    del msg["to"]
    assert msg.as_bytes() == FORWARDED.replace(b"To: b@example.org\n", b"")


def test_payload_changes_within():
    msg = read(FORWARDED)
    only(msg, "text/html").set_payload("<p>new</p>\n")
    only(msg, "application/octet-stream").set_payload("AA==\n")
    expected = FORWARDED.replace(b"<p>Gr=FC=DFe</p>", b"<p>new</p>\n")
    assert msg.as_bytes() == expected.replace(b"AAECAwQ=\n", b"AA==\n")


def test_lines_end_as_those_of_the_message():
    msg = read(FORWARDED.replace(b"\n", b"\r\n"))
    only(msg, "text/plain").set_payload("a\nb\r\n")
    msg["X-Folded"] = "a\n b"
    written = msg.as_bytes()
    assert b"\n\r\na\r\nb\r\n" in written and b"X-Folded: a\r\n b\r\n" in written
    assert written.count(b"\n") == written.count(b"\r\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda msg: msg.get_payload().pop(),
        lambda msg: msg.get_payload().reverse(),
        lambda msg: msg.attach(read(b"Content-Type: text/x-new\n\nnew")),
        lambda msg: msg.set_boundary("fresh"),
        lambda msg: msg.__delitem__("Content-Type"),
        lambda msg: setattr(msg, "preamble", "other"),
        lambda msg: setattr(msg, "epilogue", None),
    ],
)
def test_a_changed_structure_is_written_anew(change):
    msg = read(FORWARDED)
    change(msg)
    assert msg.modified
    written = read(msg.as_bytes())
    assert [p.get_content_type() for p in written.walk()][1:] == [
        p.get_content_type() for p in msg.walk()
    ][1:]
    assert b"<p>Gr=FC=DFe</p>\n--inner--" in msg.as_bytes()
    assert written["Subject"] == msg["Subject"]
    if msg.get("Content-Type"):
        assert written.get_boundary() == msg.get_boundary()
        assert (
            written.preamble == (msg.preamble + "\n" if msg.preamble == "other" else msg.preamble)
            or written.preamble.rstrip() == msg.preamble
        )


def test_a_boundary_that_occurs_in_a_part_is_replaced():
    msg = read(FORWARDED)
    msg.attach(read(b"\n--outer--\n"))
    written = read(msg.as_bytes())
    assert len(written.get_payload()) == 4
    assert written.get_boundary() not in (None, "outer")


def test_messages_made_from_nothing():
    msg = mime.MimeMessage()
    assert not msg.ismodified() and not msg.modified
    assert msg.as_bytes() == b"\n"
    msg["Subject"] = "x"
    msg.set_payload(b"\xff")
    assert msg.as_bytes() == b"Subject: x\n\n\xff"
    outer = mime.MimeMessage()
    outer.attach(msg)
    assert outer.get_content_type() == "text/plain"
    again = read(outer.as_bytes())
    assert again.get_payload(0)["subject"] == "x"
    assert again.get_payload(0).get_payload_decoded() == b"\xff"
    plain = email.message_from_bytes(b"A: b\n\nc\n")
    outer.attach(plain)
    assert outer.ismodified()
    assert b"A: b\n\nc\n" in outer.as_bytes()


def test_parts_of_other_classes_take_the_line_ends_of_the_message():
    msg = read(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nx\r\n--b--\r\n")
    msg.attach(email.message_from_bytes(b"A: b\n\nc\n"))
    assert b"A: b\r\n\r\nc\r\n" in msg.as_bytes()


def test_constructor_reads_files_and_text():
    assert mime.MimeMessage(io.BytesIO(b"A: b\n\nc"), 0).as_bytes() == b"A: b\n\nc"
    assert mime.MimeMessage(io.StringIO("A: b\n\n\xfc")).as_bytes() == b"A: b\n\n\xc3\xbc"


def test_generator_writes_mime_messages_within_others():
    outer = email.message.Message()
    outer["Content-Type"] = "multipart/mixed; boundary=xx"
    outer.set_payload([read(b"A:  b\n\n\xff\n")])
    out = io.BytesIO()
    mime.MimeGenerator(out).flatten(outer)
    assert b"--xx\nA:  b\n\n\xff\n\n--xx--" in out.getvalue()
    out = io.BytesIO()
    generator = mime.MimeGenerator(out)
    generator._dispatch(read(b"A: b\n\nbody"))
    assert out.getvalue() == b"body"


def test_unixfrom():
    msg = read(b"A: b\n\nc")
    assert msg.as_bytes(unixfrom=True).startswith(b"From nobody ")
    assert msg.as_bytes(unixfrom=True).endswith(b"\nA: b\n\nc")
    msg.set_unixfrom("From me")
    assert msg.as_bytes(True) == b"From me\nA: b\n\nc"
    raw = b"From x y\nA: b\n\nc"
    assert read(raw).as_bytes() == read(raw).as_bytes(True) == raw
    msg = read(raw)
    msg["C"] = "d"
    assert msg.as_bytes() == b"From x y\nA: b\nC: d\n\nc"


def test_a_policy_has_the_standard_generator_write():
    assert read(b"A:  b\n\nc").as_bytes(policy=email.policy.compat32) == b"A: b\n\nc"


def test_modified_can_be_set():
    msg = read(b"A:  b\n\nc\n")
    msg.modified = True
    assert msg.ismodified()
    assert msg.as_bytes() == b"A:  b\n\nc\n"
    msg.modified = False
    assert not msg.ismodified()


def test_header_values_cannot_add_headers():
    msg = read(b"A: b\n\nc")
    msg._headers.append(("X", "y\nEvil: z"))
    msg._headers.append(("Y", "a\n\nbody"))
    written = read(msg.as_bytes())
    assert written.keys() == ["A", "X", "Y"]
    assert written.get_payload() == "c"


def test_headers_without_an_empty_line_get_one():
    msg = read(b"A: b")
    msg["C"] = "d"
    assert msg.as_bytes() == b"A: b\nC: d\n\n"
    msg = read(b"A: b")
    msg.set_payload("x")
    assert msg.as_bytes() == b"A: b\n\nx"


def test_text_beyond_ascii():
    msg = read(b"Content-Type: text/plain; charset=iso-8859-1\n\nx")
    msg.set_payload("\xfc")
    assert msg.as_bytes().endswith(b"\n\n\xfc")
    assert msg.get_payload() == "\xfc"
    msg.set_payload("\u20ac")
    assert msg.get_content_charset() == "utf-8"
    assert msg.as_bytes().endswith("\n\n\u20ac".encode())
    msg = read(b"Content-Type: text/plain; charset=nonsense\n\nx")
    msg.set_payload("\u20ac\udc80")
    assert msg.get_content_charset() == "utf-8"
    assert msg.as_bytes().endswith(b"\xe2\x82\xac\x80")
    msg = read(b"\nx")
    msg.set_payload("\udcff")
    assert msg.as_bytes() == b"\n\xff"
    msg = read(b"\nx")
    msg.set_payload("\xfc", "utf-8")
    assert msg.get_payload(decode=True) == b"\xc3\xbc"
    msg._payload = "raw \u20ac"
    assert msg.as_bytes().endswith("raw \u20ac".encode())


def test_old_spellings():
    msg = read(
        b"Subject: a\nSubject: b\nContent-Type: Text/Plain; NAME=n.txt; charset=x\n"
        b"Content-Disposition: attachment; filename=f.txt\nContent-Transfer-Encoding: BASE64\n\n"
        b"YWJj\n"
    )
    assert msg.getheaders("subject") == ["a", "b"]
    assert msg.gettype() == "text/plain"
    assert msg.getparam("name") == "n.txt"
    assert msg.getparams() == [("Text/Plain".lower(), ""), ("name", "n.txt"), ("charset", "x")] or (
        msg.getparams()[1:] == [("name", "n.txt"), ("charset", "x")]
    )
    assert msg.getname() == "n.txt"
    assert msg.getfilename() == "f.txt"
    assert msg.getencoding() == "BASE64"
    assert not msg.ismultipart()
    assert msg.get_payload_decoded() == b"abc"
    out = io.BytesIO()
    assert msg.decode(out) == "BASE64"
    assert out.getvalue() == b"abc"
    assert msg.decode(None) == "BASE64"
    assert msg.get_submsg() is None
    bare = read(b"\n")
    assert bare.getname() is None and bare.getencoding() is None and bare.getparams() == []
    assert bare.get_filename("none") == "none"


def test_submessages():
    msg = read(FORWARDED)
    assert msg.ismultipart() and msg.get_submsg() is None
    part = only(msg, "message/rfc822")
    assert part.get_submsg()["Subject"] == "attached"
    part.set_payload([])
    assert part.get_submsg() is None
    assert msg.get_payload_decoded() == b""


@pytest.mark.parametrize(
    ("encoding", "body", "expected"),
    [
        ("base64", "Y W!Jj=\nZGVm===Z2hp\nx", b"abcdefghi"),
        ("base64; x", "YWJj", b"abc"),
        (" (c) base64", "YWJj", b"YWJj"),
        ('"quoted-printable"', "a=3Db=\nc", b"a=bc"),
        ("x-uuencode", "junk\nbegin 644 x\n#86)C\n`\nend\nmore", b"abc"),
        ("x-uuencode", "begin 644 x\n#86)CZZZZZ\n#\1\1\1\1\nend", b"abc"),
        ("7bit", "YWJj", b"YWJj"),
        ("nonsense", "YWJj", b"YWJj"),
    ],
)
def test_transfer_encodings(encoding, body, expected):
    raw = f"Content-Transfer-Encoding: {encoding}\n\n{body}".encode()
    assert read(raw).get_payload_decoded() == expected


@pytest.mark.parametrize(
    "charset",
    [
        "nonsense",
        "base64",
        "undefined",
        "idna",
        "x\0y",
        "\xfc",
        "punycode",
        "unicode_escape",
        "%s" * 50,
        "utf-16",
        "hz",
        "utf-7",
        "'",
        '"',
        "a" * 10000,
    ],
)
@pytest.mark.parametrize("form", ['charset="{}"', "charset*={}''x", "charset*0*=''{}"])
def test_charsets_that_do_not_exist(charset, form):
    raw = f"Content-Type: text/html; {form.format(charset)}\n\n".encode() + b"<b>\xff\xfc</b>"
    msg = read(raw)
    msg.get_content_charset()
    msg.get_charsets()
    assert isinstance(msg.get_payload(), str)
    assert msg.get_payload(decode=True) == b"<b>\xff\xfc</b>"
    assert mime.defang(msg) is False
    assert msg.as_bytes() == raw
    msg.set_payload("\u20ac")
    assert "\u20ac" in msg.as_bytes().decode("utf-8", "replace") or msg.get_content_charset()


CHARSETS = {
    "windows-1252": "\u20ac",
    "WINDOWS-1252": "\u20ac",
    "Windows_1252": "\u20ac",
    "cp1252": "\u20ac",
    "ISO_8859-1:1987": "\xe9",
    "iso-8859-15": "\u20ac",
    "gb18030": "\u4f60",
    "GB2312": "\u4f60",
    "koi8-r": "\u0416",
    "KOI8-U": "\u0416",
    "windows-1251": "\u0416",
    "iso-2022-jp": "\u3042",
    "csISO2022JP": "\u3042",
    "euc-jp": "\u3042",
    "cp932": "\u3042",
    "MS932": "\u3042",
    "Shift_JIS": "\u3042",
    "shift-jis": "\u3042",
    "sjis": "\u3042",
    "ms_kanji": "\u3042",
    "big5": "\u4f60",
    "Big5-HKSCS": "\u4f60",
    "ks_c_5601-1987": "\ud55c",
    "euc-kr": "\ud55c",
    "tis-620": "\u0e01",
    "macintosh": "\xe9",
    "UTF8": "\u20ac",
    " utf-8 ": "\u20ac",
    "utf-7": "\u20ac",
    "utf-16le": "\u20ac",
}


@pytest.mark.parametrize("charset", CHARSETS)
def test_charsets_of_ordinary_mail(charset):
    data = CHARSETS[charset].encode(charset.strip())
    msg = read(f'Content-Type: text/plain; charset="{charset}"\n\n'.encode() + data)
    if any(byte > 127 for byte in data):
        assert msg.get_payload() == CHARSETS[charset]
    name = "".join(f"%{byte:02x}" for byte in data)
    raw = f"Content-Disposition: x; filename*={charset.strip()}''{name}.txt\n\n"
    if charset != "utf-16le":  # where ASCII is not itself
        assert ("filename", CHARSETS[charset] + ".txt") in read(raw.encode()).getnames()
    msg.set_payload(CHARSETS[charset])
    assert msg.as_bytes().endswith(data)


def messages_naming(charset):
    yield f"Content-Type: text/html; charset={charset}\n\n<p>\xe9".encode("latin-1")
    yield f"Content-Disposition: x; filename*={charset}''a%E9\n\n".encode()
    yield f'Content-Type: x/y; name="=?{charset}?q?a=E9?="\n\n'.encode()


def use(raw):
    msg = read(raw)
    mime.defang(msg)
    msg.getnames()
    msg.get_payload()
    msg.set_payload("\u20ac")
    parse_header(raw.decode("latin-1"))


def test_names_of_charsets_are_not_kept():
    for raw in messages_naming("utf-8"):
        use(raw)
    known = set(encodings._cache)
    for charset in ("x-never-heard-of-{}", "utf-8-{}", "{}" + "y" * 100_000, "no.such.{}"):
        for number in range(3):
            for raw in messages_naming(charset.format(number)):
                use(raw)
    for spelling in ("UTF---8", "utf:_:8", "--utf8", "utf8--", "utf/8"):
        for raw in messages_naming(spelling):
            use(raw)
    assert {name for name in encodings._cache if name not in known} <= {"utf", "utf8", "utf_8"}


@pytest.mark.parametrize("charset", ["punycode", "idna", "Puny_Code"])
def test_slow_codecs_are_no_charsets(charset):
    text = "a" * 100_000 + "-" + "b" * 100_000
    with cpu_time_below(2):
        use(f"Content-Type: text/html; charset={charset}\n\n{text}".encode())
        name = text[:60_000]
        use(f"Content-Disposition: x; filename*={charset}''{name}-{name}\n\n".encode())
    assert codec_for(charset) is None


def test_get_payload_keeps_the_errors_of_the_standard_library():
    msg = read(FORWARDED)
    with pytest.raises(IndexError):
        msg.get_payload(7)
    with pytest.raises(TypeError):
        read(b"\nx").get_payload(1)


def test_several_messages_in_one_message_part():
    part = only(read(FORWARDED), "message/rfc822")
    part.attach(read(b"A: b\n\nc"))
    assert part.as_bytes().endswith(b"--third--\nA: b\n\nc")
    assert part.as_bytes().startswith(b"Content-Type: message/rfc822\n\nSubject: attached\n")


def test_parameters_that_cannot_be_decoded_stay_as_they_are(monkeypatch):
    def fail(params):
        raise ValueError("a bug")

    monkeypatch.setattr("email.utils.decode_params", fail)
    assert read(b"Content-Type: a/b; c=d\n\n").get_param("c") == "d"


def test_get_param_forms():
    msg = read(
        b'Content-Type: text/plain; a; b="c;\\"d"; e*=utf-8\'de\'%C3%BC; f*0=g; f*1=h; '
        b"i*99999999=j; K = l\n\n"
    )
    assert msg.get_param("a") == ""
    assert msg.get_param("b") == 'c;"d'
    assert msg.get_param("e") == ("utf-8", "de", "\xc3\xbc")
    assert msg.get_param("f") == "gh"
    assert msg.get_param("k") == "l"
    assert msg.get_param("b", unquote=False) == '"c;\\"d"'
    assert msg.get_param("none", 5) == 5
    assert msg.get_param("b", 5, "x-none") == 5
    assert msg.get_params(7, "x-none") == 7


def test_params_agree_with_the_standard_library():
    for value in ("text/plain; a=b", 'a/b; c="d e"; f', "x; a*0=b; a*1*=%20c; d*=x'y'z", "", ";;"):
        ours, theirs = read(b""), email.message.Message()
        ours["Content-Type"] = theirs["Content-Type"] = value
        assert ours.get_params() == theirs.get_params()


@pytest.mark.parametrize(
    ("raw", "boundary"),
    [
        (b'""b""', "b"),
        (b'"b"', "b"),
        (b"b", "b"),
        (b'"b', "b"),
        (b"'b'", "'b'"),
        (b'""', None),
        (b"x" * 1001, None),
        (b"x" * 1000, "x" * 1000),
        (b"*=us-ascii''b%20c", None),
    ],
)
def test_boundaries(raw, boundary):
    msg = read(b"Content-Type: multipart/mixed; boundary=" + raw + b"\n\n")
    assert msg.get_boundary() == boundary or raw.startswith(b"*")
    assert read(b"\n").get_boundary(3) == 3


def test_a_boundary_quoted_twice_is_found():
    raw = b'Content-Type: multipart/mixed; boundary=""b""\n\n--b\n\nx\n--b--\n'
    assert [p.get_payload() for p in read(raw).get_payload()] == ["x"]
    assert read(raw).as_bytes() == raw


# -- bounds


def nested(kind, depth):
    if kind == "message":
        return b"Content-Type: message/rfc822\n\n" * depth + b"\nx"
    return (
        b"".join(
            b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n" % (i, i) for i in range(depth)
        )
        + b"\nx"
    )


@pytest.mark.parametrize("kind", ["message", "multipart"])
def test_deep_nesting_is_bounded(kind):
    raw = nested(kind, 5000)
    msg = read(raw)
    assert msg.as_bytes() == raw
    limits = [p.limit for p in msg.walk() if p.limit]
    assert limits == [f"more than {mime.MAX_DEPTH} levels of nesting"]
    assert mime.defang(msg)
    assert b"more than 50 levels of nesting" in msg.as_bytes()
    shallow = read(nested(kind, 40))
    assert not mime.defang(shallow)


def test_many_parts_are_bounded():
    raw = b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\n" * 200_000 + b"--b--\n"
    msg = read(raw)
    assert msg.as_bytes() == raw
    assert len(msg.get_payload()) <= mime.MAX_PARTS
    assert mime.defang(msg)
    assert b"more than 10000 parts" in msg.as_bytes()


def test_time_to_read_is_bounded(monkeypatch):
    monkeypatch.setattr(mime, "MAX_SECONDS", -1.0)
    raw = b"Subject: x\n" + nested("multipart", 9) + b"\n--8\n\n" * 2000
    msg = read(raw)
    assert msg["Subject"] == "x"
    assert msg.as_bytes() == raw
    assert "to read" in msg.limit
    monkeypatch.undo()
    assert mime.defang(msg)
    assert b"to read" in msg.as_bytes()
    assert msg["Subject"] == "x"


@pytest.mark.parametrize("broken", [("_parse_headers",), ("_parse_headers", "_set_headersonly")])
def test_failures_of_the_standard_parser_are_survived(monkeypatch, broken):
    calls = []

    def fail(self, *args):
        calls.append(args)
        if len(calls) == 1 or len(broken) == 2:
            raise ZeroDivisionError("a bug")
        return original(self, *args)

    original = email.feedparser.FeedParser._parse_headers
    monkeypatch.setattr(email.feedparser.FeedParser, "_parse_headers", fail)
    raw = b"Subject: x\n\nbody"
    msg = read(raw)
    assert msg.as_bytes() == raw
    assert "a bug" in msg.limit
    assert msg["Subject"] == (None if len(broken) == 2 else "x")
    assert mime.defang(msg)


@pytest.mark.parametrize(
    "raw",
    [
        b"Content-Type: multipart/mixed" + b";" * 300_000 + b" boundary=b\n\n--b\n\n",
        b'Content-Type: text/plain; name="' + b'\\"' * 300_000 + b"\n\n",
        b"Content-Type: text/plain; name*" + b"9" * 300_000 + b"=x\n\n",
        b"Content-Type: text/plain" + b"; name*1*=a" * 50_000 + b"\n\n",
        b"Content-Disposition: x; filename=" + b"=?" * 300_000 + b"\n\n",
        b"Content-Disposition: x; filename=" + b"(" * 300_000 + b"\n\n",
        b"Content-Disposition: x; filename=" + b"()" * 300_000 + b"\n\n",
        b"Content-Type: (" + b"(" * 300_000 + b")" * 300_000 + b"\n\n",
        b"Content-Type: (" + b"\\" * 600_000 + b"\n\n",
        b"Content-Disposition: x; filename=x" + b'"' * 600_001 + b"\n\n",
        b'Content-Disposition: x; filename=x"' + b'\\"' * 300_000 + b"\n\n",
        b"Content-Transfer-Encoding: " + b"(" * 300_000 + b"\n\n",
        b"Content-Type: multipart/mixed; boundary=" + b"x" * 1_000_000 + b"\n\n--" + b"x" * 100,
        b"Content-Type: x; " + b"name " * 100_000 + b'"\n\n',
        b"Content-Transfer-Encoding: base64\n\n" + b"=" * 1_000_000,
        b"X: y\n" + b" z\n" * 1_000_000 + b"Content-Type: x/y; name=a.exe\n\n",
        b"Content-Disposition: x; filename=" + b"=?a?q?" * 200_000 + b"\n\n",
        b"Content-Disposition: x; filename=" + b"=?a" * 200_000 + b"\n\n",
        b"Content-Disposition: x" + b"".join(b"; f*%d=a" % (i * 2) for i in range(999)) + b"\n\n",
        b"\n" + b"begin 644 " * 100_000,
        b"\n" + b"begin 644 x\n" * 100_000,
        b"\nbegin" + b" " * 500_000 + b"644" + b" " * 500_000,
        b"\n" + b"begin 644 x\n" + b" " * 500_000 + b"x",
    ],
    ids=range(23),
)
def test_long_headers_take_linear_time(raw):
    in_linear_time(raw)


MIXED = b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\n"


@pytest.mark.parametrize(
    "raw",
    [
        MIXED + b"--bx\n" * 300_000,
        MIXED + b"--bx\njunk\n" * 200_000,
        MIXED + b"--bx\n" + b"junk\n" * 500_000,
        MIXED + b"--b\njunk\n" * 9_000 + b"junk\n" * 300_000,
        MIXED + b"--b\nX: y\r\r\n" * 9_000 + b"junk\r" * 300_000,
        MIXED + b"--b--\n" * 300_000,
        (MIXED + b"--b--\n") * 9_000,
        b"junk\r\r\n" * 300_000,
        b"X: y\r" * 300_000,
        nested("multipart", 40)
        + b"\n--39\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\n" * 4_000,
        nested("message", 45) + b"junk\n" * 100_000,
    ],
    ids=range(11),
)
def test_odd_structures_take_linear_time(raw):
    in_linear_time(raw)


def in_linear_time(raw):
    with cpu_time_below(10):
        msg = read(raw)
        msg.getnames(True)
        mime.defang(msg, scan_zip=True)
        msg.as_bytes()


def test_signatures():
    assert list(inspect.signature(mime.MimeMessage.get_param).parameters) == [
        "self",
        "param",
        "failobj",
        "header",
        "unquote",
    ]


def test_unquote():
    assert [mime.unquote(s) for s in ('"a"', "<a>", '"a', '"a\\"b"', "'a'", "", '"')] == [
        "a",
        "a",
        '"a',
        'a"b',
        "'a'",
        "",
        '"',
    ]


def test_parameters_end_at_semicolons_outside_of_quotes():
    msg = read(b'Content-Type: x/y;a=b; C="d;e"; f; G = "h\\"; i";\n\n')
    assert msg.get_params() == [
        ("x/y", ""),
        ("a", "b"),
        ("c", "d;e"),
        ("f", ""),
        ("g", 'h"; i'),
        ("", ""),
    ]
