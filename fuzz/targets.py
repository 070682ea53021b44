"""What fuzz/python_run.py feeds: functions of any bytes, and what must hold for each.

A target raises for a finding, and takes whatever the documentation of what it calls says may be
raised.
"""

from __future__ import annotations

import configparser
import contextlib
import io
import os
import re
import socket
import tempfile
import zipfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mime
from Milter import _esmtp, cache, config, dynip, policy, sgmllib, unsign, utils
from Milter import dns as milter_dns
from Milter._mime import html as mime_html
from Milter._mime import limits
from Milter._mime import xml as xml_reader
from Milter.mta import (
    CURRENT_ACTIONS,
    Editor,
    Message,
    MTAError,
    Negotiated,
    Reply,
    Stage,
    Step,
)
from Milter.mta.commands import Command
from Milter.mta.session import Session

try:
    import html5lib  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the tests do without
    html5lib = None

_scratch = tempfile.mkdtemp(prefix="fuzz-python-")


def _text(data: bytes) -> str:
    """As the extension hands over what came from the wire."""
    return data.decode("utf-8", "surrogateescape")


def mime_message(data: bytes) -> None:
    """A message is written back as it came; what was made harmless stays so when read again."""
    msg = mime.message_from_file(io.BytesIO(data))
    assert msg.as_bytes() == data, "not written back byte for byte"
    for part in msg.walk():
        part.get_filename()
        part.get_content_charset()
        part.getparams()
        part.getname()
        if not part.is_multipart():
            part.get_payload_decoded()
    with contextlib.suppress(mime.LimitExceeded, zipfile.BadZipFile):
        msg.getnames(scan_zip=True)
    mime.defang(msg, scan_zip=True)
    harmless = msg.as_bytes()
    again = mime.message_from_file(io.BytesIO(harmless))
    mime.defang(again, scan_zip=True)
    # It may drop more attributes in doubt, but no part and no script.
    assert again.as_bytes().count(b"WARNING") <= harmless.count(b"WARNING"), (
        "a defanged message is still dangerous"
    )


def zip_names(data: bytes) -> None:
    """Nothing but BadZipFile."""
    with contextlib.suppress(zipfile.BadZipFile):
        mime.zipnames(data)


def _without_scripts(text: str) -> str:
    out = io.StringIO()
    parser = mime.HTMLScriptFilter(out)
    parser.feed(text)
    parser.close()
    return out.getvalue()


# Words that begin like event handlers, and are none of any browser's.
_WORDS = frozenset(
    (
        "one",
        "once",
        "only",
        "online",
        "onto",
        "ontology",
        "ongoing",
        "onward",
        "onwards",
        "onset",
        "onsite",
        "onion",
        "onyx",
        "onus",
    )
)


def _what_runs(text: str, scripting: bool) -> list[str]:
    """What a browser would run of some HTML, as a parser sees it that goes by the standard."""
    parser = html5lib.HTMLParser(html5lib.getTreeBuilder("etree"), namespaceHTMLElements=False)
    try:
        document = parser.parse(text, scripting=scripting)
    except Exception:  # noqa: BLE001 - it has faults of its own
        return []
    elements = [element for element in document.iter() if isinstance(element.tag, str)]
    runs = [element.tag for element in elements if element.tag.rpartition("}")[2] == "script"]
    for element in elements:
        for name, value in element.attrib.items():
            link = str(name) in ("href", "src", "action")
            scheme = "".join(c for c in value if c > " ").lower()
            # One that is empty does nothing, and no reader takes the next attribute for its value.
            handler = value and re.fullmatch("on[a-z]+", str(name)) and name not in _WORDS
            if handler or (link and scheme.startswith("javascript:")):
                runs.append(f"{name}={value}")
    return runs


class _InternetExplorer(mime.SGMLFilter):
    """Puts the content of conditional comments where the comments were."""

    def handle_comment(self, comment: str) -> None:
        start = re.match(r"\s*\[\s*if\b[^>]*>", comment, re.IGNORECASE)
        if start is None:
            super().handle_comment(comment)
        else:
            self.write(comment[start.end() :].partition("<![endif]")[0])


def _as_internet_explorer(text: str) -> str:
    out = io.StringIO()
    parser = _InternetExplorer(out)
    parser.feed(text)
    parser.close()
    return out.getvalue()


def html(data: bytes) -> None:
    """Nothing is left that runs, or that would be taken out again."""
    once = _without_scripts(_text(data))
    twice = _without_scripts(once)
    warning = mime.HTMLScriptFilter.msg
    assert twice.count(warning) <= once.count(warning), "a second pass found another script"
    budget = limits.Budget()
    checked = mime_html._filter_html(_text(data), budget)  # which leaves alone what it may
    again = mime_html._filter_html(checked, budget)
    assert again.count(warning) <= checked.count(warning), "a second check found another script"
    if html5lib is not None:
        for text in (once, checked, _as_internet_explorer(checked)):
            for scripting in (False, True):
                runs = _what_runs(text, scripting)
                assert not runs, f"a browser runs {runs}"


def xml(data: bytes) -> None:
    """What is left of XML does not run; what is packed can be anything."""
    text = _text(data)
    budget = limits.Budget()
    xml_reader.inflate(b"\x1f\x8b" + data, budget)
    with contextlib.suppress(mime.LimitExceeded):
        assert not xml_reader.xml_runs(mime_html._filter_xml(text, budget), budget)


class _Recorder(sgmllib.SGMLParser):
    """The data that a parser sees, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def handle_data(self, data: str) -> None:
        if self.seen and self.seen[-1][0] == "data":
            self.seen[-1] = ("data", self.seen[-1][1] + data)
        else:
            self.seen.append(("data", data))

    def unknown_starttag(self, tag: str, attributes: Any) -> None:
        self.seen.append(("start", tag, list(attributes)))

    def unknown_endtag(self, tag: str) -> None:
        self.seen.append(("end", tag))

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment", data))


def _parsed(pieces: list[str]) -> list[tuple[Any, ...]]:
    parser = _Recorder()
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.close()
    except sgmllib.SGMLParseError:
        return [("error",)]
    return parser.seen


def sgml(data: bytes) -> None:
    """Fed at once or in two pieces, it sees the same."""
    where, text = (data[0], _text(data[1:])) if data else (0, "")
    whole = _parsed([text])
    middle = min(where, len(text))
    assert _parsed([text[:middle], text[middle:]]) == whole, f"cut at {middle} it reads otherwise"


def header_values(data: bytes) -> None:
    """The functions on header values and addresses never raise on text."""
    text = _text(data)
    decoded = utils.parse_header(text)
    assert "=?" in text or decoded == text, "changed without an encoded word"
    name, address = utils.parseaddr(decoded)
    for value in (name, address):
        assert not set("\r\n\0") & set(value) or set("\r\n\0") & set(decoded)
    assert 1 <= len(utils.parse_addr(text)) <= 2
    mime.unquote(text)
    unsign.unsign(text)
    mime.check_ext(text)
    first, _, second = text.partition(" ")
    dynip.is_dynip(first, second)
    _esmtp.param2dict(text.split(" "))
    _esmtp.param2dict(data.split(b" "))


_no_names: Callable[..., Any] = lambda *args, **kwds: []  # noqa: E731


def networks(data: bytes) -> None:
    """A list of networks: no name is looked up, and OSError or ValueError for what is none."""
    address, *patterns = _text(data).replace("\0", "").split("\n")
    real = socket.getaddrinfo
    socket.getaddrinfo = _no_names
    try:
        with contextlib.suppress(OSError, ValueError):
            utils.addr2bin(address)
        with contextlib.suppress(OSError, ValueError):
            utils.iniplist(address, patterns)
        with contextlib.suppress(OSError, ValueError):
            utils.iniplist("192.0.2.7", [*patterns, address])
    finally:
        socket.getaddrinfo = real


class _FixedResolver:
    """Answers every question with what the fuzzer made of an answer."""

    def __init__(self, wire: bytes) -> None:
        self.wire = wire

    def resolve(self, name: Any, rdtype: Any, **options: Any) -> Any:
        import dns.exception
        import dns.message

        try:
            response = dns.message.from_wire(self.wire, ignore_trailing=True)
        except (dns.exception.DNSException, ValueError) as exc:
            # Its own resolver does so with what a server sends.
            raise dns.exception.DNSException(str(exc)) from exc
        return SimpleNamespace(response=response)


_QUESTION = b"\0\1\x81\x80\0\1\0\2\0\0\0\2\7example\3com\0\0\1\0\1"  # a header and one question


def dns_answers(data: bytes) -> None:
    """Whatever a name server answers: a list of data of the promised form, or DNSError."""
    wire = data if data[:1] == b"\0" else _QUESTION + data[1:]
    session = milter_dns.Session(_FixedResolver(wire))  # type: ignore[arg-type]
    for qtype in ("A", "AAAA", "MX", "TXT", "CNAME", "PTR", "SRV"):
        with contextlib.suppress(milter_dns.DNSError):
            for item in session.dns("example.com", qtype):
                assert isinstance(item, (str, bytes, tuple)), item
                assert qtype != "A" or isinstance(item, str)
                assert qtype != "AAAA" or (isinstance(item, bytes) and len(item) == 16)
                assert qtype != "MX" or isinstance(item[1], str)
    with contextlib.suppress(milter_dns.DNSError):
        for text in session.dns_txt("example.com"):
            text.encode("ascii", "surrogateescape")
    with contextlib.suppress(milter_dns.DNSError):
        session.dns(_text(data[:300]), "A")


def cache_file(data: bytes) -> None:
    """Any file can be loaded; what was stored through it comes back."""
    path = os.path.join(_scratch, "cache")
    with open(path, "wb") as file:
        file.write(data)
    for name in ("cache.old", "cache.lock"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(_scratch, name))
    first = cache.AddrCache(renew=7)
    first.load(path)
    sender = _text(data[:40])
    first[sender] = None
    first.addperm("kept@example.com")
    first.has_key(sender)
    again = cache.AddrCache(renew=7)
    again.load(path)
    assert again.has_precise_key("kept@example.com"), "a stored address is lost"
    kept = sender.split() == [sender] and not sender.startswith("#")
    with contextlib.suppress(UnicodeEncodeError):
        sender.encode("utf-8", "surrogateescape")
        assert not kept or again.has_precise_key(sender), f"{sender!r} is lost"


class _Map:
    """An access map that has one entry."""

    def __init__(self, key: bytes, value: bytes) -> None:
        self.entry = {key: value}

    def get(self, key: bytes) -> bytes | None:
        return self.entry.get(key)

    def keys(self) -> list[bytes]:
        return list(self.entry)

    def close(self) -> None:
        pass


def access_map(data: bytes) -> None:
    """Any sender can be looked up in any map; any file is a map, or refused as documented."""
    head, _, rest = data.partition(b"\n")
    value, _, content = rest.partition(b"\n")
    conf = SimpleNamespace(access_file=None, access_file_nulls=len(data) % 2)
    with policy.MTAPolicy(_text(head), conf) as rules:
        rules.acf = _Map(b"spf:" + head.rpartition(b"@")[2].lower(), value)
        result = rules.getPolicy("SPF")
        assert result is None or isinstance(result, str)
    path = os.path.join(_scratch, "access")
    for suffix in ("", ".dir", ".dat"):
        with open(path + suffix, "wb") as file:
            file.write(content if suffix != ".dat" else value)
    try:
        reader = policy.dbmopen(path)
    except (OSError, ValueError, ImportError):
        return
    reader.close()


def config_file(data: bytes) -> None:
    """A configuration that is no such thing is refused by configparser, a value by ValueError."""
    parser = config.MilterConfigParser({"port": "25"})
    # No file but those of this directory.
    text = _text(data).replace("/", "").replace("..", "")
    try:
        parser.read_string(text)
    except configparser.Error:
        return
    for section in [*parser.sections(), "none"]:
        for option in [*(parser.options(section) if section != "none" else ()), "port", "none"]:
            for method in (
                parser.get,
                parser.getint,
                parser.getfloat,
                parser.getboolean,
                parser.getdefault,
                parser.getintdefault,
                parser.getlist,
                lambda s, o: parser.getaddrset(s, o, _scratch),
                lambda s, o: parser.getaddrdict(s, o, _scratch),
            ):
                with contextlib.suppress(configparser.Error, ValueError, OSError):
                    method(section, option)
                # A default where there is neither section nor option.
                if section == "none" and method in (parser.get, parser.getlist):
                    method(section, option)


def _session_says(command: Command, steps: Step, pieces: list[bytes]) -> list[object]:
    """The events of an MTA's session to which a filter answers these bytes, an error the last."""
    session = Session()
    session.negotiated = Negotiated(6, CURRENT_ACTIONS, steps)
    session.send(command)
    said: list[object] = []
    try:
        for piece in [*pieces, b""]:
            session.receive(piece)
            while True:
                event = session.next_event()
                if event is None:
                    break
                said.append(event)
    except MTAError as exc:
        # How much had come in by then depends on the pieces.
        said.append((type(exc), exc.args[0]))
    return said


def mta_session(data: bytes) -> None:
    """What a filter says means the same in whatever pieces it comes."""
    stage = list(Stage)[data[0] % len(Stage)] if data else Stage.EOM
    if stage in (Stage.NEGOTIATE, Stage.ABORT, Stage.QUIT, Stage.QUIT_NC):
        stage = Stage.EOM
    steps = Step.SKIP if data[1:2] > b"\x7f" else Step.NONE
    said = data[2:]
    bytewise = [said[place : place + 1] for place in range(len(said))]
    at_once = _session_says(Command(stage), steps, [said] if said else [])
    apart = _session_says(Command(stage), steps, bytewise)
    # What goes on after an answer is noticed only where it comes with it.
    shorter = min(len(at_once), len(apart)) - 1
    assert at_once[:shorter] == apart[:shorter], "other events in other pieces"
    for event in at_once:
        if isinstance(event, Reply):
            Editor(Message.parse(b"A: 1\n\nb\n")).apply(*event.modifications)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "mime": mime_message,
    "zip": zip_names,
    "html": html,
    "xml": xml,
    "sgml": sgml,
    "header": header_values,
    "networks": networks,
    "dns": dns_answers,
    "cache": cache_file,
    "access": access_map,
    "config": config_file,
    "session": mta_session,
}
