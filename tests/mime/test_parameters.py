"""Parameters of headers as mail has them: folded, in pieces, without semicolons, with junk."""

from __future__ import annotations

import io

import pytest

import mime


def read(raw):
    return mime.message_from_file(io.BytesIO(raw))


def defanged(raw, **options):
    msg = read(raw)
    mime.defang(msg, **options)
    return msg


BODY = b"--bound\n\nhi\n--bound\nContent-Type: a/b; name=%s\n\nMZ\n--bound--\n"

BOUNDARIES = [
    b'multipart/mixed;\n boundary="bound"\n\tX-Priority: 3',
    b'multipart/mixed;\r\n boundary="bound"\r\n X-Mailer: example.com',
    b'multipart/mixed; boundary="bound"\n\tX-Y: a; z="b"',
    b'multipart/mixed; boundary="bound" junk',
    b'multipart/mixed; boundary="bound" (comment)',
    b'multipart/mixed; boundary="bound"charset=us-ascii',
    b'multipart/mixed; boundary="bound" charset="us-ascii"; x=y',
    b"multipart/mixed; boundary=bound junk",
    b"multipart/mixed; boundary=bound (c (d))",
    b"multipart/mixed; boundary=bound\n\tX-Priority: 3",
    b'multipart/mixed; boundary=bound type="text/html"',
    b'multipart/mixed; charset="us-ascii" boundary="bound"',
    b"multipart/mixed; charset=us-ascii boundary=bound",
    b"multipart/mixed; charset=us-ascii\n\tboundary=bound; x=y",
    b"multipart/mixed boundary=bound",
    b'multipart/mixed boundary="bound"; charset=us-ascii',
    b"multipart/mixed; (comment) boundary=bound",
    b'multipart/mixed; boundary=""bound""',
    b'multipart/mixed; boundary="bound',
]


@pytest.mark.parametrize("value", BOUNDARIES)
def test_a_boundary_is_found_in_what_surrounds_it(value):
    header = b"MIME-Version: 1.0\nContent-Type: " + value + b"\n\n"
    clean = header + BODY % b"a.pdf"
    msg = defanged(clean)
    assert msg.get_boundary() == "bound" and len(msg.get_payload()) == 2
    assert not msg.ismodified() and msg.as_bytes() == clean
    msg = defanged(header + BODY % b"a.exe")
    good, bad = msg.get_payload()
    assert good.get_payload() == "hi" and "a.exe" in bad.get_payload()
    assert msg.as_bytes().startswith(header + b"--bound\n\nhi\n--bound\n")


@pytest.mark.parametrize(
    ("value", "mark"),
    [
        (b"boundary=bound junk", b"bound junk"),
        (b'boundary="bound" junk', b"bound"),
        (b"boundary=a b=c", b"a b=c"),
        (b'boundary="a" b"', b'a" b'),
    ],
)
def test_of_several_boundaries_that_counts_which_is_there(value, mark):
    body = BODY.replace(b"bound", mark) % b"a.pdf"
    raw = b"Content-Type: multipart/mixed; " + value + b"\n\n" + body
    msg = defanged(raw)
    assert len(msg.get_payload()) == 2 and msg.as_bytes() == raw
    del msg["Subject"]
    msg["Subject"] = "x"
    assert msg.as_bytes() == raw.replace(b"\n\n", b"\nSubject: x\n\n", 1)


def test_of_two_boundaries_that_are_both_there_none_counts():
    raw = b"Content-Type: multipart/mixed; boundary=one two\n\n" + BODY % b"a.pdf"
    raw = raw.replace(b"--bound\n", b"--one two\n", 1).replace(b"--bound", b"--one")
    assert "ambiguous boundary" in defanged(raw).get_payload()


@pytest.mark.parametrize(
    ("header", "charset"),
    [
        (b'text/plain; charset="koi8-r" junk', "koi8-r"),
        (b'text/plain; charset="koi8-r"\n\tX-Foo: 3', "koi8-r"),
        (b"text/plain; charset=koi8-r\n\tX-Foo: 3", "koi8-r"),
        (b"text/plain; charset=koi8-r format=flowed", "koi8-r"),
        (b'text/plain; charset="koi8-r"format=flowed', "koi8-r"),
        (b"text/plain; format=flowed charset=koi8-r", "koi8-r"),
        (b'text/plain; charset=koi8-r boundary="bound"', "koi8-r"),
        (b"text/plain charset=koi8-r", "koi8-r"),
        (b'text/plain; x="charset=koi8-r"', None),
        (b"text/plain; xcharset=koi8-r", None),
    ],
)
def test_charsets(header, charset):
    msg = read(b"Content-Type: " + header + b"\n\nx\n")
    assert msg.get_content_charset() == charset


@pytest.mark.parametrize(
    "header",
    [b"text/html charset=utf-7", b"text/html; a=b charset=utf-7", b'text/html; a="b"charset=utf-7'],
)
def test_scripts_in_a_charset_without_its_semicolon(header):
    raw = b"Content-Type: " + header + b"\n\n+ADw-script+AD4-x()+ADw-/script+AD4-\n"
    assert defanged(raw).ismodified()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b'"a.pdf"\n\tX-Foo: 3', "a.pdf"),
        (b'"a.pdf"\n\tX-Mailer: example.com', "a.pdf"),
        (b'"a.pdf" size=3', "a.pdf"),
        (b'"a.pdf"size=3', "a.pdf"),
        (b'"a b.pdf" (comment)', "a b.pdf"),
        (b"a.pdf size=3", "a.pdf"),
        (b"a.pdf\n\tX-Foo: 3", "a.pdf"),
        (b"my file.pdf", "my file.pdf"),
        (b"Re: my file.pdf", "Re: my file.pdf"),
        (b'"my "best" file.pdf"', 'my "best" file.pdf'),
        (b'"a\\"b.pdf"', 'a"b.pdf'),
        (b'"report of the\n southern branch.pdf"', "report of the southern branch.pdf"),
        (b'"quarterly report of the\r\n\tsouthern.pdf"', "quarterly report of the\tsouthern.pdf"),
        (b"long\n name.pdf", "long name.pdf"),
        (b'"a;\n b=c.pdf"', "a; b=c.pdf"),
    ],
)  # fmt: skip
def test_names_of_files(value, name):
    for header, read_name in (
        (b"Content-Disposition: attachment; filename=", "get_filename"),
        (b"Content-Type: application/pdf; name=", "get_filename"),
        (b"Content-Type: application/pdf; name=", "getname"),
    ):
        raw = header + value + b"\n\nx\n"
        msg = read(raw)
        assert getattr(msg, read_name)() == name
        assert name in [n for _, n in msg.getnames()]
        assert not mime.defang(msg) and msg.as_bytes() == raw


def test_a_name_after_a_missing_semicolon():
    raw = b'Content-Type: application/pdf\nContent-Disposition: attachment filename="a.pdf"\n\nx\n'
    assert read(raw).get_filename() == "a.pdf"
    assert defanged(raw).as_bytes() == raw


@pytest.mark.parametrize(
    "header",
    [
        b'application/x; name="a.txt" filename="b.exe"',
        b'application/x; foo="c.txt" filename="b.exe" bar="d.txt"',
        b'application/x; boundary="c" name="b.exe"; x=y',
        b'application/x name="b.exe" foo="d.txt"',
        b"application/x; name=b.exe size=3",
        b"application/x; name=a.txt\n .exe",
        b'application/x; name="a" .exe',
        b"application/x; name=my b.exe",
        b'application/x; name="b.exe"\n\tX-Foo: c.txt',
        b'application/x; a=b name*0="b.e"; name*1=xe',
    ],
)
def test_bad_names_among_junk(header):
    assert defanged(b"Content-Type: " + header + b"\n\nx\n").ismodified()


@pytest.mark.parametrize(
    "header",
    [
        b'multipart/mixed boundary="=_1@example.com"\n\n--=_1@example.com\n\nx\n',
        b"text/plain charset=us-ascii x=y\n\nx",
        b'text/plain; boundary="1@example.com" (x)\n\nx',
    ],
)
def test_what_is_no_name(header):
    raw = b"Content-Type: " + header + b"\n"
    assert defanged(raw).as_bytes() == raw


# -- RFC 2231's pieces


@pytest.mark.parametrize(
    ("pieces", "names"),
    [
        (b'filename*0="bill of shop.com"; filename*1="pany.pdf"', ["bill of shop.company.pdf"]),
        (b'filename*1="com.pdf"; filename*0="invoice of shop."', ["invoice of shop.com.pdf"]),
        (b'filename*0="shop.com invo"; filename*1="ice.pdf"', ["shop.com invoice.pdf"]),
        (b"filename*0=run.exe; filename*1=cutive.pdf", ["run.executive.pdf"]),
        (b"filename*0*=utf-8''shop.com; filename*1*=pany%20a.pdf", ["shop.company a.pdf"]),
        (b"filename*0*=utf-8''shop.com; filename*1=\"pany (a.com) b.pdf\"", None),
    ],
)  # fmt: skip
def test_pieces_of_a_name_are_none(pieces, names):
    raw = b"Content-Type: application/pdf\nContent-Disposition: attachment; " + pieces + b"\n\nx\n"
    asked = []
    assert not mime.defang(read(raw), None, asked.append)
    assert not any(name.endswith((".com", ".exe")) for name in asked)
    if names:
        assert read(raw).get_filename() == names[0] == asked[0]
    assert defanged(raw).as_bytes() == raw


@pytest.mark.parametrize(
    "pieces",
    [
        b'filename*0="a.p"; filename*1="df.exe"',
        b'filename*1=".exe"; filename*0="a.pdf"',
        b"filename*0=a.exe; filename*2=.pdf",  # many stop at the gap
        b"filename*0=a.exe; filename*1=.pdf; filename*1=",
        b"filename*0=a; filename*1=.exe; filename*1=.pdf",
        b'filename*0="a.e" x=y; filename*1="xe"',
        b"filename*0*=utf-8''a.e; filename*1*=%78e",
    ],
)
def test_bad_names_in_pieces(pieces):
    raw = b"Content-Disposition: attachment; " + pieces + b"\n\nx\n"
    assert defanged(raw).ismodified()
