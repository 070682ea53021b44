"""What applications written for pymilter find in `mime`; seen on pymilter 1.0.5 as a black box."""

from __future__ import annotations

import email
import email.encoders
import email.generator
import email.message
import email.utils
import io
import re
import socket
import sys
import threading
import zipfile

import pytest
from support.process import WAIT

import Milter
import Milter.sgmllib
import mime


def read(raw):
    return mime.message_from_file(io.BytesIO(raw))


BAD = (
    b"MIME-Version: 1.0\nContent-Type: application/octet-stream; name=a.exe\n"
    b"Content-Disposition: attachment; filename=a.exe\nContent-Transfer-Encoding: base64\n\nTVo=\n"
)
SCRIPT = b"Content-Type: text/html\n\n<p>a<script>x()</script>\n"


def mixed(*parts):
    body = b"".join(b"--b\n" + part for part in parts)
    return b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n" + body + b"--b--\n"


# -- names


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("BytesGenerator", email.generator.BytesGenerator),
        ("BytesIO", io.BytesIO),
        ("HTMLParser", Milter.sgmllib.SGMLParser),
        ("Message", email.message.Message),
        ("Milter", Milter),
        ("StringIO", io.StringIO),
        ("email", email),
        ("encoders", email.encoders),
        ("message_from_binary_file", email.message_from_binary_file),
        ("quote", email.utils.quote),
        ("re", re),
        ("socket", socket),
        ("sys", sys),
        ("zipfile", zipfile),
    ],
)
def test_what_pymilter_imports_is_there(name, what):
    assert getattr(mime, name) is what
    found: dict[str, object] = {}
    exec("from mime import *", found)
    assert found[name] is what


def test_the_extensions_of_pymilter():
    assert mime.extlist.startswith("ade,adp,asd,asx,asp,bas,") and len(mime.extlist) == 165
    listed = ["." + extension for extension in mime.extlist.split(",")]
    assert len(listed) == 42 and set(listed) <= set(mime.bad_extensions)
    assert all(mime.check_ext("x" + extension) for extension in listed)


def test_private_functions():
    assert mime._parseparam("a/b; C=d") == ["a/b", "c=d"]
    assert mime._unquotevalue('"a"') == "a"
    assert mime._unquotevalue(("us-ascii", "", '"x"')) == ("us-ascii", "", "x")


# -- headerchange


def changes(act, raw=b"X-A: 1\nX-A: 2\n\nhi\n"):
    """(name, value, values of that name in the moment of the call) for what `act` does."""
    told = []
    msg = read(raw)
    msg.headerchange = lambda m, name, value: told.append((name, value, m.getheaders(name)))
    act(msg)
    return told


def test_deleting_is_told_before_the_headers_go():
    def act(msg):
        del msg["x-a"]
        assert "X-A" not in msg

    assert changes(act) == [("x-a", None, ["1", "2"])]


def test_headers_that_are_not_there_are_told_too():
    def act(msg):
        del msg["Nowhere"]

    assert changes(act) == [("Nowhere", None, None)]


def test_adding_is_told_after():
    def act(msg):
        msg["X-A"] = "3"
        msg["X-B"] = 7
        msg.add_header("X-C", "a", b="c")

    assert changes(act) == [
        ("X-A", "3", ["1", "2", "3"]),
        ("X-B", "7", [7]),
        ("X-C", 'a; b="c"', ['a; b="c"']),
    ]


def test_replacing_is_not_told():
    def act(msg):
        msg.replace_header("x-a", "3")
        with pytest.raises(KeyError):
            msg.replace_header("Nowhere", "3")

    assert changes(act) == []


def test_a_parameter_is_a_header_deleted_and_added():
    def act(msg):
        msg.set_param("charset", "utf-8")

    assert changes(act, b"Content-Type: text/html\n\n") == [
        ("Content-Type", None, ["text/html"]),
        ("Content-Type", 'text/html; charset="utf-8"', ['text/html; charset="utf-8"']),
    ]


def test_an_exception_stops_a_deletion():
    def refuse(msg, name, value):
        raise RuntimeError

    msg = read(b"X-A: 1\n\n")
    msg.headerchange = refuse
    with pytest.raises(RuntimeError):
        del msg["X-A"]
    assert msg["X-A"] == "1"
    with pytest.raises(RuntimeError):
        msg["X-B"] = "1"
    assert msg["X-B"] == "1"


@pytest.mark.parametrize("check", [mime.check_name, mime.defang])
def test_how_a_warning_takes_the_place_of_a_part(check):
    plain = "text/plain; name=WARNING.TXT"
    assert changes(check, BAD) == [
        ("content-type", None, ["application/octet-stream; name=a.exe"]),
        ("content-disposition", None, ["attachment; filename=a.exe"]),
        ("content-transfer-encoding", None, ["base64"]),
        ("Content-Type", plain, [plain]),
    ]
    assert [c[2] for c in changes(check, b"Content-Disposition: x; filename=a.exe\n\n")] == [
        *(None, ["x; filename=a.exe"], None, [plain]),
    ]


def test_an_application_that_counts_what_it_deletes():
    """As filters do that pass each change on to the MTA."""
    sent = []

    def change(msg, name, value):
        if value is None:
            sent.extend(("delete", name, n) for n, _ in enumerate(msg.getheaders(name) or ()))
        else:
            sent.append(("add", name, value))

    msg = read(BAD)
    msg.headerchange = change
    assert mime.defang(msg)
    assert sent == [
        ("delete", "content-type", 0),
        ("delete", "content-disposition", 0),
        ("delete", "content-transfer-encoding", 0),
        ("add", "Content-Type", "text/plain; name=WARNING.TXT"),
    ]


@pytest.mark.parametrize("encoding", ["7bit", "8bit", "quoted-printable", "base64"])
def test_check_html_keeps_the_transfer_encoding(encoding):
    bodies = {
        "base64": b"PHA+YTxzY3JpcHQ+eCgpPC9zY3JpcHQ+\n",
        "8bit": b"<p>\xe4<script>x()</script>\n",
    }
    head = b"Content-Type: text/html\nContent-Transfer-Encoding: %s\n\n" % encoding.encode()
    raw = head + bodies.get(encoding, b"<p>a<script>x()</script>\n")
    assert changes(mime.check_html, raw) == []
    msg = read(raw)
    mime.check_html(msg)
    assert msg.ismodified() and msg.getencoding() == encoding
    assert b"script" not in read(msg.as_bytes()).get_payload_decoded().replace(b"script rem", b"")


# -- defang as an object


def test_defang_is_an_object_that_can_be_had_anew():
    assert isinstance(mime.defang, mime._defang) and mime.defang.scan_html
    msg = read(BAD)
    assert mime._defang()(msg) and "WARNING" in msg["Content-Type"]


def test_html_is_left_alone_where_nobody_wants_it_scanned(monkeypatch):
    monkeypatch.setattr(mime.defang, "scan_html", False)
    raw = mixed(SCRIPT, b"\nhi\n")
    msg = read(raw)
    assert not mime.defang(msg) and msg.as_bytes() == raw
    assert mime.defang(read(mixed(SCRIPT, BAD)))
    own = mime._defang()
    assert own.scan_html and own(read(raw))


def test_a_subclass_sees_each_part_that_holds_no_others():
    seen = []

    class Own(mime._defang):
        def _chk_name(self, msg):
            before = msg.get_content_type()
            result = super()._chk_name(msg)
            seen.append((before, msg.ismodified(), self._savname, self._check, self.scan_zip))
            return result

    forwarded = b"Content-Type: message/rfc822\n\n" + SCRIPT
    assert Own()(read(mixed(BAD, b"\nhi\n", forwarded)), "saved", mime.check_ext, True, True)
    rest = ("saved", mime.check_ext, True)
    assert seen == [
        ("application/octet-stream", True, *rest),
        ("text/plain", False, *rest),
        ("text/html", True, *rest),
    ]
    with pytest.raises(AttributeError):
        Own()._savname  # noqa: B018


def test_threads_do_not_see_each_others_arguments():
    barrier = threading.Barrier(2, timeout=WAIT)
    found = {}

    class Own(mime._defang):
        def _chk_name(self, msg):
            barrier.wait()
            found[self._savname] = self._check("x")
            barrier.wait()
            return super()._chk_name(msg)

    own = Own()
    threads = [
        threading.Thread(target=own, args=(read(b"\nhi\n"), name, {"x": name}.get))
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert found == {"one": "one", "two": "two"}


def test_each_name_is_asked_for_once():
    asked = []
    for raw in (BAD, BAD.replace(b"a.exe", b"a.txt"), SCRIPT.replace(b"html", b"html; name=a.htm")):
        mime.defang(read(mixed(raw, b"\nhi\n")), None, asked.append, True, True)
    mime.defang(read(mixed(b'Content-Type: a/b; name=""\n\nx\n')), None, asked.append)
    assert asked == ["a.exe", "a.txt", "a.htm"]


# -- messages


def test_submsg():
    msg = read(mixed(BAD, b"Content-Type: message/rfc822\n\n" + BAD))
    first, second = msg.get_payload()
    assert msg.submsg == [first, second] and first.submsg is None
    assert second.submsg == second.get_payload()
    msg.set_payload("x")
    assert msg.submsg is None
    fresh = mime.MimeMessage()
    assert fresh.submsg is None
    fresh.submsg = ["anything"]
    assert fresh.submsg == ["anything"] and fresh.get_submsg() is None


# -- what applications assign to


@pytest.mark.parametrize(
    ("name", "value", "raw"),
    [
        ("MAX_DEPTH", 1, mixed(mixed(mixed(b"\nx\n")))),
        ("MAX_PARTS", 2, mixed(b"\nx\n", b"\ny\n", b"\nz\n")),
        ("MAX_PARAMETERS", 1, b"Content-Type: a/b; c=d; e=f\n\nx\n"),
        ("MAX_NAME_TEXT", 9, b"Content-Type: text/plain\n\nx\n"),
        ("MAX_BOUNDARY", 0, mixed(b"Content-Type: text/plain\n\nx\n")),
        ("MAX_HEADER_LINES", 1, b"A: b\nC: d\n\nx\n"),
        ("MAX_MARKUP", 1, b"Content-Type: text/html\n\n<p style=a:b><p style=a:b>\n"),
        ("MAX_SECONDS", -1.0, b"Content-Type: text/html\n\nx\n"),
    ],
)
def test_bounds_can_be_assigned(monkeypatch, name, value, raw):
    assert not mime.defang(read(raw))
    monkeypatch.setattr(mime, name, value)
    assert mime.defang(read(raw))


def test_extensions_and_the_warning_can_be_assigned(monkeypatch):
    raw = b"Content-Type: a/b; name=a.odd\n\nx\n"
    assert not mime.defang(read(raw))
    monkeypatch.setattr(mime, "bad_extensions", [".odd"])
    monkeypatch.setattr(mime, "virus_msg", "no %s on %s, see %s")
    msg = read(raw)
    assert mime.defang(msg, "there") and not mime.defang(read(BAD))
    assert msg.get_payload() == f"no a.odd on {socket.gethostname()}, see there"
