"""Names of files in other headers, and in what only some readers take for a header."""

from __future__ import annotations

import io

import pytest

import mime


def read(raw):
    return mime.message_from_file(io.BytesIO(raw))


def harmful(raw):
    msg = read(raw)
    changed = mime.defang(msg, scan_zip=True)
    assert changed or msg.as_bytes() == raw
    return changed


BIN = b"Content-Type: application/octet-stream\n"
ATTACHED = b"Content-Type: text/plain\nContent-Disposition: attachment\n"


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Description: setup.exe",
        b"Content-Description: =?utf-8?Q?setup=2Eexe?=",
        b"Content-Description: =?utf-8?B?c2V0dXAuZXhl?=",
        b'Content-Description: "setup.exe"',
        b"Content-Description: my new\n setup.exe",
        b"Content-Description: <setup.exe>",
        b"Content-Description: setup.txt\nContent-Description: setup.exe",
        b"Content-Description: www.example.com",
        b"Content-Description:\rsetup.exe",
        b"content-DESCRIPTION:setup.exe",
        b"Content-Name: setup.exe",
        b"X-Sun-Data-Name: setup.exe",
        b"Content-Location: setup.exe",
        b"Content-Location: file:///C:/temp/setup.exe",
        b"Content-Location: dir/setup.exe?x",
        b"Content-Location: setup%2Eexe",
    ],
)
@pytest.mark.parametrize(
    "part", [BIN, ATTACHED, BIN + b'Content-Disposition: inline; filename=""\n']
)
def test_files_that_another_header_names(part, header):
    assert harmful(part + header + b"\n\nMZ\n")


def test_a_zip_that_its_description_names():
    raw = BIN + b"Content-Description: a.zip\n\nno zip\n"
    assert harmful(raw)
    assert ("content-description", "a.zip") in read(raw).getnames()


@pytest.mark.parametrize(
    "raw",
    [
        BIN + b"Content-Description: See www.example.com",
        BIN + b"Content-Description: the logo of example.com.",
        BIN + b"Content-Description: =?utf-8?Q?Gr=C3=BC=C3=9Fe?= from me@example.com",
        BIN + b"Content-Description: me@example.com",
        BIN + b"Content-Description: Me <me@example.com>",
        BIN + b"Content-Description: https://example.com",
        BIN + b"Content-Description: " + b"very " * 60 + b"long.exe",
        BIN.replace(b"stream", b"stream; name=a.pdf") + b"Content-Description: of shop.com",
        BIN + b"Content-Disposition: attachment; filename=a.pdf\nContent-Description: setup.exe",
        b"Content-Type: application/pgp-signature\nContent-Description: OpenPGP digital signature",
        b"Content-Type: application/pgp-encrypted\nContent-Description: PGP/MIME version",
        b"Content-Type: text/plain\nContent-Description: how to run setup.exe",
        b"Content-Type: text/plain\nContent-Description: setup.exe",
        b"Content-Description: example.com",
        b"Content-Type: text/html\nContent-Description: newsletter of node.js",
        b"Content-Type: image/png\nContent-Description: the logo of node.js",
        b"Content-Type: message/rfc822\nContent-Description: Forwarded message from a@example.com",
        b"Content-Type: message/rfc822\nContent-Description: www.example.com",
        b"Content-Type: message/delivery-status\nContent-Description: Delivery report of mx.com",
        b"Content-Type: image/gif\nContent-Location: http://example.com/pixel.asp",
        b"Content-Type: image/gif\nContent-Location: pixel.asp",
        BIN + b"Content-Location: http://example.com",
        BIN + b"Content-Location: https://example.com/x/setup.exe",
        BIN + b"Content-Location: //example.com",
        BIN + b"Content-Location: cid:1@example.com",
        BIN + b"Content-Base: http://example.com",
        BIN + b"Content-ID: <part1.2@example.com>",
        BIN + b"X-Attachment-Id: f_example.com",
        BIN + b"X-MS-Has-Attach: a.exe",
        BIN + b"Subject: setup.exe",
        BIN + b"Content-Description: all about http://www.example.ws",
        # what message/partial and message/external-body have of their own
        b'Content-Type: message/partial; id="1@example.com"; number=1; total=2',
        b'Content-Type: message/external-body; access-type=ftp; site="ftp.example.com"; name=a',
        b"Content-Type: message/external-body; server=a@example.com; subject=a.com",
        b"Content-Type: message/external-body; access-type=URL; URL=http://example.com",
        # mail programs name a message that they attach by its subject
        b'Content-Type: message/rfc822; name="Your order at example.com"',
        b'Content-Type: message/rfc822\nContent-Disposition: attachment; filename="Re: www.a.com!"',
    ],
)
def test_prose_and_addresses_are_no_names(raw):
    assert not harmful(raw + b"\n\nx\n")


@pytest.mark.parametrize(
    "raw",
    [
        BIN + b"Content-Description: invoice:setup.exe",
        BIN + b"Content-Description: invoice www.setup.exe",
        BIN + b"Content-Description: invoice a@setup.exe",
        BIN + b"Content-Description: invoice ://setup.exe",
        BIN + b"Content-Location: invoice:setup.exe",
        BIN.replace(b"stream", b"stream; name=example.com") + b"X: y",
        BIN.replace(b"stream", b"stream; id=a.exe") + b"X: y",
        b'Content-Type: message/external-body; access-type=anon-ftp; site="a"; name=setup.exe',
        b"Content-Type: message/rfc822; name=setup.com",
        b'Content-Type: message/rfc822; name="my www.setup.hta"',
    ],
)
def test_what_only_resembles_prose_and_addresses(raw):
    assert harmful(raw + b"\n\nx\n")


def test_a_picture_with_a_program_for_its_description():
    assert harmful(b"Content-Type: image/png\nContent-Description: setup.exe\n\nx\n")


# -- a CR alone, which ends a line for some readers and is a part of the value for others


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Disposition:\rattachment; filename=run.exe",
        b"Content-Disposition: attachment;\rfilename=run.exe",
        b"Content-Type: application/octet-stream; name=\rrun.exe",
        b'Content-Disposition: attachment; filename="ru\rn.exe"',
        b'Content-Disposition: attachment; filename="run.ex\re"',
        b"Content-Disposition: attachment; filename=a.pdf\r; filename=run.exe",
        b"Content-Type: application/x;\r\n name=a\r\n b\rc.exe",
        b"Subject: x\nContent-Type:\rapplication/x; name=run.exe\nTo: y",
        b"Content-Type:\rmessage/rfc822\n\nContent-Type: application/x; name=run.exe",
        (b"Content-Type: multipart/mixed;\rboundary=b\n\n"
        b"--b\nContent-Type: a/b; name=run.exe\n\nx\n--b--"),
        b"Content-Type:\rtext/html\n\n<script>x()</script>",
        (b"Content-Type: text/html\nContent-Transfer-Encoding:\rbase64\n\n"
        b"PHNjcmlwdD54KCk8L3NjcmlwdD4="),
    ],
)  # fmt: skip
def test_a_lone_cr_within_a_header(header):
    raw = header + (b"" if b"\n\n" in header else b"\n\nMZ") + b"\n"
    assert harmful(raw)
    assert harmful(b"MIME-Version: 1.0\nX: \ry\n" + raw)
    part = b"Content-Type: multipart/mixed; boundary=o\n\n--o\n" + raw + b"\n--o--\n"
    assert harmful(part)


@pytest.mark.parametrize(
    "header",
    [
        b"Subject: a\rb",
        b"Subject: a\rContent-Typical: c.exe",
        b"Content-Type: text/plain\rX-Mailer: foo",
        b"Content-Type: text/plain; charset=us-ascii\r\r",
        b"Content-Type: text/plain;\r charset=us-ascii",
        b"Content-Disposition: attachment;\rfilename=a.pdf",
        b"Content-Description: a\rb.pdf",
        b"Received: a\r\r\n b",
    ],
)
def test_a_lone_cr_that_hides_nothing(header):
    for end in (b"\n", b"\r\n"):
        assert not harmful(b"MIME-Version: 1.0" + end + header + end + end + b"a\rb.exe" + end)


WHOLE = (
    b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=o\r\n\r\n--o\r\n"
    b"Content-Type: text/html\r\n\r\n<p>hi\r\n--o\r\n"
    b"Content-Type: application/pdf; name=a.pdf\r\n\r\nx\r\n--o--\r\n"
)
_HTML = b"Subject: a\rb\nContent-Type: text/html\nContent-Transfer-Encoding: base64\n\n"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        # a program that had CRLF in its input writes CR CR LF
        (WHOLE.replace(b"\r\n", b"\r\r\n"), False),
        (WHOLE.replace(b"1.0\r", b"1.0\r\r\r"), False),
        (WHOLE.replace(b"\r\n", b"\r"), False),
        (b"Subject: a\rb\nContent-Type: text/plain\n\nhi\n", False),
        (_HTML + b"PHA+aGk=\n", False),
        # what only some readers see in these counts as before
        (WHOLE.replace(b"\r\n", b"\r\r\n").replace(b"a.pdf", b"a.exe"), True),
        (WHOLE.replace(b"1.0\r", b"1.0\r\r").replace(b"<p>", b"<script>x()</script>"), True),
        (b"Subject: a\rb\nContent-Type: text/plain; name=a.exe\n\nhi\n", True),
        (_HTML + b"PHNjcmlwdD54KCk8L3NjcmlwdD4=\n", True),
    ],
)
def test_lone_crs_in_whole_messages(raw, expected):
    asked = []
    msg = read(raw)
    assert mime.defang(msg, check=lambda n: [asked.append(n), mime.check_ext(n)][1]) is expected
    assert len(set(asked)) == len(asked) <= 1
    assert expected or msg.as_bytes() == raw


def test_a_replaced_part_keeps_nothing_of_what_a_lone_cr_hid():
    msg = read(b"Content-Disposition:\rattachment; filename=run.exe\n\nMZ\n")
    assert mime.defang(msg) and ("filename", "run.exe") not in msg.getnames()
    again = read(msg.as_bytes())
    assert not mime.defang(again)
